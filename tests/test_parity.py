"""Parity with timm and transformers in both directions: weights that they save give the same features here, and weights
exported here give the same features there. Parity with the authors' code is held by golden numbers (test_authors_files.py,
test_golden.py)."""

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.cbook
import pytest
import torch
from conversion import random_checkpoint
from PIL import Image
from random_encoders import random_images, randomize
from safetensors.torch import load_file, save_file
from transformers_swinv2 import run_transformers, transformers_model

from simmim import load_encoder
from simmim.checkpoints import read, read_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.fitting import build_encoder
from simmim.data import EvaluationView, normalize, open_picture
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.methods.simmim import SimMIM

TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
BOTH_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Case:
    """A model that another library creates and saves.

    Args:
        name: id of the test, and name of the file or folder.
        size: side of the images in pixels.
        window: window size in tokens.
        pretrained: window sizes of the pre-training per stage, for a model transferred to another window.
        preset: of `SwinV2Config`.
        channels: of the images.
        dtypes: in which outputs are compared.
    """

    name: str
    size: int
    window: int
    pretrained: tuple[int, ...] | None = None
    preset: str = "micro"
    channels: int = 3
    dtypes: tuple[str, ...] = BOTH_DTYPES

    def config(self):
        return SwinV2Config.from_preset(self.preset, in_channels=self.channels)


# Pre-trained at 192 px with a window of 12, which the map of the last stage, 6 × 6, limits to 6.
TRANSFERRED = (12, 12, 12, 6)
CASES = [
    Case("tiny, 256 px, window 8", 256, 8, preset="tiny"),
    Case("256 px, window 16", 256, 16),
    Case("192 px, window 12, to 384 px, window 24", 384, 24, TRANSFERRED),
    Case("224 px, window 8", 224, 8),  # maps of 56, 28, 14 and 7 tokens: padded in the second and third stage
    Case("256 px, window 8, gray", 256, 8, channels=1),
    Case("256 px, window 16, gray", 256, 16, channels=1, dtypes=("float32",)),
    Case("384 px, window 24, gray", 384, 24, TRANSFERRED, channels=1, dtypes=("float32",)),
    Case("224 px, window 8, gray", 224, 8, channels=1, dtypes=("float32",)),
    Case("base, 256 px, window 8", 256, 8, preset="base"),
    Case("base, 192 px, window 12, to 384 px, window 24", 384, 24, TRANSFERRED, preset="base", dtypes=("float32",)),
]
# The second base model would take timm half a minute more and tests nothing that the others do not.
TIMM_CASES = [*CASES[:-2], replace(CASES[-2], dtypes=("float32",))]


@torch.inference_mode()
def outputs(encoder, images):
    """Pooled features and the feature map of each stage, by name."""
    output = encoder(images, return_stages=True)
    return {"pooled": output.pooled} | {f"stage{i}": stage for i, stage in enumerate(output.stages)}


def max_difference(ours, theirs):
    """Largest absolute difference over all outputs, after checking that names and shapes agree and that nothing is zero."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    assert all(value.std() > (0.3 if name.startswith("stage") else 0.02) for name, value in ours.items())
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def assert_same(encoder, images, theirs, dtype="float32"):
    encoder = encoder.to(getattr(torch, dtype))
    difference = max_difference(outputs(encoder, images.to(getattr(torch, dtype))), theirs)
    print(f"{dtype}: max difference {difference:.1e}")
    assert difference < TOLERANCE[dtype]


# --- from transformers -----------------------------------------------------------------------------------------------


def saved_by_transformers(config, size, folder):
    """A random Swinv2Model for images of `size`, saved by `save_pretrained`."""
    model = transformers_model(config, size)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_features_of_a_transformers_folder(case, tmp_path):
    config = replace(case.config(), window_size=case.window, pretrained_window_sizes=case.pretrained)
    theirs = saved_by_transformers(config, case.size, tmp_path)
    encoder, images = load_encoder(tmp_path), random_images(1, case.channels, case.size, case.size)
    assert encoder.config.pretrained_window_sizes == case.pretrained or not case.pretrained
    for dtype in case.dtypes:
        theirs, pixels = theirs.to(getattr(torch, dtype)), images.to(getattr(torch, dtype))
        _, pooled, stages = run_transformers(theirs, pixels)
        assert_same(encoder, images, {"pooled": pooled} | {f"stage{i}": map for i, map in enumerate(stages)}, dtype)


def test_window_transfer_while_loading(tmp_path):
    """A model saved at 192 px with a window of 12, loaded for 384 px with a window of 24 in both libraries."""
    import transformers

    saved_by_transformers(SwinV2Config.from_preset("micro", window_size=12), 192, tmp_path)
    transfer = {"image_size": 384, "window_size": 24, "pretrained_window_sizes": TRANSFERRED}
    theirs = transformers.Swinv2Model.from_pretrained(tmp_path, **transfer).eval()
    images, lines = random_images(1, 3, 384, 384), []
    saved = read_encoder(tmp_path, report=lines.append, window_size=24)
    _, pooled, stages = run_transformers(theirs, images)
    assert_same(saved.encoder, images, {"pooled": pooled} | {f"stage{i}": map for i, map in enumerate(stages)})
    assert "adapted    window 12 to 24, position bias scaled by the pre-trained windows 12, 12, 12, 6" in lines[0]


def test_image_size_at_which_transformers_has_another_window(tmp_path):
    """transformers halves maps rounding down, 30 to 15 to 7 tokens, and scales the position bias by that window. At other
    image sizes the features are equal; a note says that they differ at this one."""
    import transformers

    config = SwinV2Config(16, (2, 2, 2), (2, 2, 2), window_size=8)
    saved_by_transformers(config, 120, tmp_path)
    lines = []
    encoder = read_encoder(tmp_path, report=lines.append).encoder
    assert encoder.config.pretrained_window_sizes == (8, 8, 7)
    assert "Swinv2 uses windows [8, 8, 7] where this encoder at 120×120 px has [(8, 8), (8, 8), (8, 8)]" in lines[0]
    theirs = transformers.Swinv2Model.from_pretrained(tmp_path, image_size=128, pretrained_window_sizes=(8, 8, 7)).eval()
    images = random_images(1, 3, 128, 128)
    _, pooled, stages = run_transformers(theirs, images)
    assert_same(encoder, images, {"pooled": pooled} | {f"stage{i}": map for i, map in enumerate(stages)})


# --- to transformers -------------------------------------------------------------------------------------------------


def loaded_whole(auto, folder, unexpected=()):
    """Load a model with transformers and check that no weights are missing, and none unexpected but those named."""
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    assert set(report["unexpected_keys"]) == set(unexpected)
    return model.eval()


@pytest.mark.parametrize(
    "config, size",
    [
        (SwinV2Config.from_preset("micro"), (128, 128)),
        (SwinV2Config.from_preset("micro", window_size=12, pretrained_window_sizes=(8, 8, 8, 4)), (192, 192)),
        (SwinV2Config.from_preset("nano", in_channels=1, patch_size=2), (32, 32)),
        (SwinV2Config.from_preset("nano"), (96, 160)),
        (SwinV2Config(16, (1, 2, 1), (1, 2, 2), window_size=7, mlp_ratio=2.0, in_channels=5), (112, 112)),
    ],
    ids=["micro", "transferred window", "gray, patch 2", "oblong", "five channels"],
)
@torch.inference_mode()
def test_transformers_loads_an_exported_encoder(config, size, tmp_path):
    """Features of AutoModel and maps of Swinv2Backbone, which has no final norm and reports its weights as unexpected."""
    import transformers

    checkpoint = random_checkpoint(config, size, ())
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    images = random_images(2, config.in_channels, *size)
    expected = outputs(build_encoder(checkpoint).encoder, images)
    model = loaded_whole(transformers.AutoModel, folder)
    assert (model(images).pooler_output - expected["pooled"]).abs().max() < 1e-4
    backbone = loaded_whole(transformers.Swinv2Backbone, folder, {"layernorm.weight", "layernorm.bias"})
    maps = {f"stage{i}": stage for i, stage in enumerate(backbone(images).feature_maps)}
    assert max_difference(expected, {"pooled": expected["pooled"], **maps}) < 1e-4
    assert backbone.channels == list(config.dims)


@torch.inference_mode()
def test_auto_backbone_loads_an_exported_encoder(tmp_path, monkeypatch):
    """AutoBackbone of transformers 5 asks the hub whether the repository exists, even for a local folder. The answer is
    simulated here."""
    import transformers

    checkpoint = random_checkpoint(SwinV2Config.from_preset("nano"), (64, 64))
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *_, **__: True)
    backbone = transformers.AutoBackbone.from_pretrained(folder).eval()
    images = random_images(1, 3, 64, 64)
    maps = build_encoder(checkpoint).encoder.features(images, per_stage=True)
    for ours, theirs in zip(maps, backbone(images).feature_maps, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_transformers_loads_an_exported_classifier(tmp_path):
    """Logits and class names are equal."""
    import transformers

    classes = ("cat", "dog", "hedgehog")
    checkpoint = random_checkpoint(SwinV2Config.from_preset("micro"), (128, 128), classes)
    folder = export(checkpoint, "hf", tmp_path / "hf").folder
    model = loaded_whole(transformers.AutoModelForImageClassification, folder)
    images = random_images(2, 3, 128, 128)
    logits = torch.nn.functional.linear(build_encoder(checkpoint).encoder(images).pooled, *checkpoint.head.values())
    torch.testing.assert_close(model(images).logits, logits, atol=1e-4, rtol=0)
    assert model.config.id2label == dict(enumerate(classes)) and model.config.label2id["dog"] == 1


@torch.inference_mode()
def test_transformers_loads_an_exported_simmim_model(tmp_path):
    """Loss and reconstruction are equal for the same mask, which covers mask token, decoder and its pixel order."""
    import transformers

    checkpoint = random_checkpoint(SwinV2Config.from_preset("micro"), (128, 128))
    folder = export(checkpoint, "hf", tmp_path / "hf", "simmim").folder
    theirs = loaded_whole(transformers.AutoModelForMaskedImageModeling, folder)
    ours = SimMIM(build_encoder(checkpoint).encoder).eval()
    ours.load_state_dict(checkpoint.pretraining, strict=False)
    images, mask = random_images(2, 3, 128, 128), torch.rand(2, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.6
    expected, output = ours(images, mask, return_reconstruction=True), theirs(images, bool_masked_pos=mask.flatten(1))
    print(f"loss {expected.loss.item():.6f}, difference {abs(output.loss - expected.loss).item():.1e}")
    assert abs(output.loss - expected.loss) < 1e-5
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "side, crop, interpolation, fit, levels",
    [
        (224, 1.0, "bilinear", "crop", 1.5),
        (224, 1.0, "bicubic", "crop", 1.5),
        (224, 0.875, "bilinear", "crop", 0.1),
        (224, 0.875, "bicubic", "crop", 0.1),
        (256, 0.875, "bicubic", "crop", 3.0),
        (224, 1.0, "bicubic", "squash", 0.1),
    ],
)
def test_transformers_preprocesses_alike(side, crop, interpolation, fit, levels, tmp_path):
    """Preprocessing of a photograph of 512 × 600 px, compared by the mean absolute difference in gray levels of 255.

    transformers resizes to whole pixels before it crops, which may shift the view by a quarter of a pixel. A whole
    pixel would make a difference of nine levels."""
    import transformers

    size = (side, side)
    checkpoint = random_checkpoint(SwinV2Config.from_preset("nano"), size, interpolation=interpolation, crop=crop, fit=fit)
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    preprocessing = read(folder).preprocessing
    assert preprocessing == checkpoint.preprocessing
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(Image.open(path), return_tensors="pt")["pixel_values"]
    view = EvaluationView(size, crop, interpolation, fit)(open_picture({"path": str(path), "bytes": None}, 3))
    ours = normalize(view[None], preprocessing.mean, preprocessing.std)
    assert theirs.shape == ours.shape
    difference = (theirs - ours).abs() * torch.tensor(preprocessing.std).view(3, 1, 1) * 255
    print(f"difference in levels: mean {difference.mean():.2f}, median {difference.median():.2f}")
    assert difference.mean() < levels and difference.median() < 2


def test_transformers_preprocesses_gray_images_alike(tmp_path):
    import transformers

    checkpoint = random_checkpoint(SwinV2Config.from_preset("nano", in_channels=1), (64, 64))
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    pixels = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(tmp_path / "gray.png")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = processor(Image.open(tmp_path / "gray.png"), return_tensors="pt")["pixel_values"]
    ours = normalize(pixels[None, None], checkpoint.preprocessing.mean, checkpoint.preprocessing.std)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


# --- from timm and to timm -------------------------------------------------------------------------------------------

MICRO_TRANSFERRED = SwinV2Config.from_preset("micro", window_size=12, pretrained_window_sizes=(8, 8, 8, 4))
PADDED = {"shift_before_padding": True}
EXPORTS = {
    "encoder": (SwinV2Config.from_preset("nano"), (64, 64), ()),
    "classifier": (SwinV2Config.from_preset("micro", in_channels=1), (128, 128), ("cat", "dog", "hedgehog")),
    "oblong": (SwinV2Config.from_preset("micro", window_size=7, **PADDED), (96, 160), ()),
    "transferred window": (MICRO_TRANSFERRED, (192, 192), ()),
    "oblong pre-training": (
        SwinV2Config(16, (2, 2), (2, 4), pretrained_window_sizes=(8, (4, 8)), mlp_ratio=2.0),
        (64, 64),
        (),
    ),
    "patch 2": (SwinV2Config(16, (1, 2, 1), (1, 2, 2), window_size=5, patch_size=2, **PADDED), (44, 44), ("a", "b")),
}
# File names as timm publishes them. They are the only source of the window where there is no config.json.
BARE = {
    "swinv2_micro_window8_224.bin": Case("bare", 224, 8),
    "swinv2_micro_window12to24_192to384_ft.bin": Case("bare", 384, 24, TRANSFERRED, dtypes=("float32",)),
}
RESIZED = Case("resized", 128, 8)


def timm_name(case):
    """A model name that timm knows, of the preset's size; micro is tiny with other arguments."""
    return f"swinv2_{'tiny' if case.preset == 'micro' else case.preset}_window8_256"


def timm_arguments(case):
    arguments = {"img_size": case.size, "window_size": case.window, "in_chans": case.channels, "num_classes": 0}
    if case.pretrained:
        arguments["pretrained_window_sizes"] = case.pretrained
    if case.preset == "micro":
        arguments["embed_dim"] = case.config().embed_dim
    return arguments


def save_job(folder, case, **options):
    """A job of timm_stub.py: create and save the model, and compute its outputs."""
    save_file({"images": random_images(1, case.channels, case.size, case.size)}, folder / f"{case.name}.images")
    return {
        "do": "save",
        "name": timm_name(case),
        "arguments": timm_arguments(case),
        "dtypes": case.dtypes,
        "folder": str(folder / case.name),
        "images": str(folder / f"{case.name}.images"),
        "out": str(folder / f"{case.name}.out"),
        **options,
    }


def timm_jobs(folder):
    """The jobs of timm_stub.py: save every case, load every export, execute the loading code of every export."""
    jobs = [save_job(folder, case) for case in TIMM_CASES]
    for name, case in BARE.items():
        jobs.append(save_job(folder, replace(case, name=name), file=str(folder / name)))
    larger = replace(RESIZED, size=192)
    jobs.append({**save_job(folder, larger, resized=[192, 192]), "arguments": timm_arguments(RESIZED)})
    for name, (config, size, classes) in EXPORTS.items():
        exported = export(random_checkpoint(config, size, classes), "timm", folder / f"to {name}")
        save_file({"images": random_images(2, config.in_channels, *size)}, folder / f"to {name}.images")
        shared = {"folder": str(exported.folder), "images": str(folder / f"to {name}.images")}
        jobs.append({"do": "load", "out": str(folder / f"to {name}.out"), **shared})
        jobs.append({"do": "run", "code": exported.code, "out": str(folder / f"to {name}.run"), **shared})
    return jobs


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A folder with the results of timm, which runs once for all test processes."""
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "timm"
    with (root / "timm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "jobs.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "waiting.json").write_text(json.dumps(timm_jobs(folder)))
            script = [sys.executable, str(Path(__file__).parent / "timm_stub.py"), str(folder / "waiting.json")]
            done = subprocess.run(script, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stderr[-3000:]
            (folder / "waiting.json").rename(folder / "jobs.json")
    return folder


def from_timm(folder, name, dtype="float32"):
    """The outputs of a job, by name."""
    results = load_file(folder / f"{name}.out")
    return {key.removeprefix(f"{dtype}."): value for key, value in results.items() if key.startswith(f"{dtype}.")}


@pytest.mark.parametrize("case", TIMM_CASES, ids=lambda case: case.name)
def test_features_of_a_timm_folder(case, timm_folder):
    saved = read_encoder(timm_folder / case.name)
    assert saved.checkpoint.format == "timm" and saved.encoder.config.shift_before_padding
    assert saved.preprocessing.image_size == (case.size, case.size)
    images = load_file(timm_folder / f"{case.name}.images")["images"]
    for dtype in case.dtypes:
        assert_same(saved.encoder, images, from_timm(timm_folder, case.name, dtype), dtype)


@pytest.mark.parametrize("name", BARE)
def test_features_of_a_bare_timm_file(name, timm_folder, tmp_path):
    """A bare state dict: a published file name tells the window; for any other name it must be given."""
    saved, images = read_encoder(timm_folder / name), load_file(timm_folder / f"{name}.images")["images"]
    for dtype in BARE[name].dtypes:
        assert_same(saved.encoder, images, from_timm(timm_folder, name, dtype), dtype)
    (tmp_path / "weights.bin").write_bytes((timm_folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"weights\.bin does not store its window.*window_size"):
        load_encoder(tmp_path / "weights.bin")
    sizes = saved.encoder.config.pretrained_window_sizes
    encoder = load_encoder(tmp_path / "weights.bin", window_size=BARE[name].window, pretrained_window_sizes=sizes)
    assert_same(encoder, images, from_timm(timm_folder, name))


def test_timm_model_after_set_input_size(timm_folder):
    """`set_input_size` writes one window size per stage into timm's config.json."""
    arguments = json.loads((timm_folder / "resized" / "config.json").read_text())["model_args"]
    assert arguments["img_size"] == [192, 192] and isinstance(arguments["window_size"], list)
    images = load_file(timm_folder / "resized.images")["images"]
    encoder = load_encoder(timm_folder / "resized")
    assert encoder.config.window_size == 12
    assert_same(encoder, images, from_timm(timm_folder, "resized"))


@pytest.mark.parametrize("name", EXPORTS)
def test_timm_loads_an_export(name, timm_folder):
    """timm loads an export from the weights file with the arguments of config.json, from the folder, with `features_only`,
    and by the code that `simmim export` prints. Features, maps, logits, channels, strides and preprocessing are equal."""
    config, size, classes = EXPORTS[name]
    checkpoint = random_checkpoint(config, size, classes)
    images = load_file(timm_folder / f"to {name}.images")["images"]
    encoder, results = build_encoder(checkpoint).encoder, load_file(timm_folder / f"to {name}.out")
    expected = outputs(encoder, images)
    if classes:
        expected["logits"] = torch.nn.functional.linear(expected["pooled"], *checkpoint.head.values())
    ways = {
        way: {key.removeprefix(way): results[key] for key in results if key.startswith(way)} for way in ("bare.", "whole.")
    }
    for theirs in (*ways.values(), load_file(timm_folder / f"to {name}.run")):
        assert max_difference(expected, theirs) < 1e-4
    for stage in range(len(config.depths)):
        torch.testing.assert_close(results[f"maps.stage{stage}"], expected[f"stage{stage}"], atol=1e-4, rtol=0)
    assert tuple(results["channels"].tolist()) == encoder.channels and tuple(results["strides"].tolist()) == encoder.strides
    assert results["size"].tolist() == [config.in_channels, *size]
    torch.testing.assert_close(results["mean"], torch.tensor(checkpoint.preprocessing.mean))
    torch.testing.assert_close(results["std"], torch.tensor(checkpoint.preprocessing.std))


# --- dense heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (96, 150)])
def test_head_of_another_library_trains_on_the_maps(size):
    """transformers' UperNet head, built from `Encoder.channels`, accepts the maps; gradients reach the patch projection. The
    maps have the strides that the encoder states."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    encoder = randomize(SwinV2(SwinV2Config.from_preset("nano", depths=(1, 1, 1, 1), num_heads=(3, 6, 12, 24))))
    head = UperNetHead(UperNetConfig(hidden_size=32, num_labels=6, pool_scales=(1, 2)), in_channels=list(encoder.channels))
    images = random_images(2, 3, *size)
    maps = encoder.features(images, per_stage=True)
    for stage, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert stage.shape == (2, channels, *(-(-side // stride) for side in size))
    logits = head(maps)
    assert logits.shape == (2, 6, *maps[0].shape[2:])
    logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert gradients["patch_embed.proj.weight"].abs().max() > 0
    # Heads for dense prediction normalize the maps themselves; the encoder's final norm is for pooled features.
    assert {name for name, value in gradients.items() if value is None} == {"norm.weight", "norm.bias"}
