"""The SimMIM paper's encoders, Swin and ViT, in the formats of their authors, timm and transformers, in both directions."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion import CLASSES, GOLDEN, assert_round_trip, golden, random_checkpoint, refused, rewritten, same_tensors
from random_encoders import random_images, randomize
from safetensors.torch import load_file, save_file

from simmim.checkpoints import load_encoder, read, read_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.fitting import build_encoder
from simmim.checkpoints.source import DESCRIPTION
from simmim.encoders.swin import SwinConfig
from simmim.encoders.vit import ViTConfig
from simmim.methods.simmim import SimMIM

SWIN = SwinConfig(16, (2, 2), (2, 4), window_size=4, image_size=(64, 64))
SMALL_MAP = SwinConfig(16, (2, 1), (2, 4), window_size=6, image_size=(48, 64))  # the second map has 6 × 8 tokens
SMALLER_MAP = SwinConfig(16, (1, 2), (2, 4), window_size=5, image_size=(32, 32))  # and here 4 × 4
VIT = ViTConfig(32, 2, 2, patch_size=8, image_size=(48, 48))
TUNED = replace(VIT, drop_path_rate=0.1, in_channels=1).for_fine_tuning()
OBLONG = replace(VIT, image_size=(32, 48), layer_scale=0.0).for_fine_tuning()
PUBLISHED = {
    "swin": ("official_simmim_pretrain_swin_v1_micro.pth", "simmim_swin_v1_micro.safetensors"),
    "vit": ("official_simmim_pretrain_vit_micro_shared_rpb.pth", "simmim_vit_micro_shared_rpb.safetensors"),
}


def logits_of(checkpoint, images):
    with torch.no_grad():
        return torch.nn.functional.linear(build_encoder(checkpoint).encoder(images).pooled, *checkpoint.head.values())


# --- the authors' files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_authors_file_gives_their_numbers(family):
    file, numbers = GOLDEN / PUBLISHED[family][0], golden(PUBLISHED[family][1])[1]
    checkpoint = read(file)
    model = SimMIM(load_encoder(file)).eval()
    model.load_state_dict(checkpoint.pretraining, strict=False)
    images, mask = numbers["input.image"], numbers["input.mask"].bool()
    with torch.no_grad():
        output = model(images, mask, return_reconstruction=True)
    torch.testing.assert_close(output.reconstruction, numbers["output.reconstruction"], atol=5e-5, rtol=0)
    assert abs(output.loss - numbers["output.loss_l1"]) < 1e-5
    assert checkpoint.format == "official" and checkpoint.provenance["method"] == "SimMIM"
    assert checkpoint.preprocessing.image_size == (96, 96)


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_authors_file_written_again_is_the_same(family, tmp_path):
    """Names, shapes, types and bits, buffers included, so that their modules load it strictly."""
    file = GOLDEN / PUBLISHED[family][0]
    folder = export(read(file), "official", tmp_path / "out").folder
    ours, theirs = (torch.load(path, weights_only=True)["model"] for path in (folder / "model.pth", file))
    assert same_tensors(ours, dict(theirs))


@pytest.mark.parametrize("family", ["swin_v1", "vit"])
def test_classifiers_of_the_authors(family, tmp_path):
    """In their fine-tuned layout, written by us from their numbers: logits, and names with buffers."""
    name = {"swin_v1": "classifier_swin_v1_micro", "vit": "classifier_vit_micro_rpb"}[family]
    numbers = load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("model."): value for key, value in numbers.items() if key.startswith("model.")}
    torch.save({"model": weights}, tmp_path / "classifier.pth")
    checkpoint = read(tmp_path / "classifier.pth")
    torch.testing.assert_close(logits_of(checkpoint, numbers["input.image"]), numbers["output.logits"], atol=5e-5, rtol=0)
    assert checkpoint.preprocessing.image_size == (96, 96) and checkpoint.preprocessing.crop == 0.875
    folder = export(checkpoint, "official", tmp_path / "out").folder
    written = torch.load(folder / "model.pth", weights_only=True)["model"]
    buffers = {name: value for name, value in written.items() if name not in weights}
    assert same_tensors({name: written[name] for name in weights}, weights)
    if family == "vit":
        assert buffers.keys() == {f"blocks.{block}.attn.relative_position_index" for block in range(3)}
    else:
        pretrained = torch.load(GOLDEN / PUBLISHED["swin"][0], weights_only=True)["model"]
        expected = {name.removeprefix("encoder."): value for name, value in pretrained.items()}
        assert same_tensors(buffers, {name: expected[name] for name in expected if name.endswith(("_index", "_mask"))})


@pytest.mark.parametrize(
    "name, size, note",
    [
        ("simmim_pretrain__swin_base__img192_window6__800ep.pth", 192, "192 px by the file's name"),
        ("swin_base_patch4_window7_224_22k.pth", 224, "224 px by the file's name"),
        ("weights.pth", 384, "image size assumed to be 384 px, eight windows per side"),
    ],
)
def test_the_image_size_of_a_file_without_buffers(name, size, note, tmp_path):
    """Windows are in the tables; the image size in the name."""
    config = SwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), window_size={192: 6, 224: 7}.get(size, 12))
    torch.save(randomize(build_of(config)).state_dict(), tmp_path / name)
    checkpoint = read(tmp_path / name)
    assert checkpoint.preprocessing.image_size == (size, size) and checkpoint.notes == (note,)
    assert checkpoint.config.largest_windows == config.largest_windows


def test_a_last_window_tells_the_image_size(tmp_path):
    torch.save(randomize(build_of(SMALLER_MAP)).state_dict(), tmp_path / "weights.pth")
    checkpoint = read(tmp_path / "weights.pth")
    assert checkpoint.config == SMALLER_MAP and checkpoint.notes == ("32 px by the last stage's window of 4",)


def build_of(config):
    from simmim.encoders.registry import build

    return build(config)


# --- round trips -----------------------------------------------------------------------------------------------------

FORMS = {
    "safetensors": ("encoder",),
    "official": ("encoder", "simmim", "classifier"),
    "timm": ("encoder", "classifier"),
    "hf": ("encoder", "simmim", "classifier"),
}


@pytest.mark.parametrize("format", FORMS)
@pytest.mark.parametrize(
    "config", [SWIN, SMALLER_MAP, VIT, TUNED, OBLONG], ids=["swin", "small map", "vit", "fine-tuned vit", "oblong vit"]
)
def test_round_trips(config, format, tmp_path):
    """With this toolkit's description, and without it but for what the format has no place for."""
    before = random_checkpoint(config, config.image_size)
    for form in FORMS[format]:
        kind = type(config)
        if (kind, format, form) == (ViTConfig, "hf", "simmim") or (format == "hf" and config in (SMALLER_MAP, OBLONG)):
            message = "predicts no pixels|mixes up the position biases of 32×48 px|window of 5 on a map of 4×4 tokens"
            with pytest.raises(ValueError, match=message):
                export(before, format, tmp_path / form, form)
            continue
        if form == "classifier" and config == VIT:
            with pytest.raises(ValueError, match="classifies by the class token, this one by the mean of the patches"):
                export(before, format, tmp_path / form, form)
            continue
        folder = export(before, format, tmp_path / form, form).folder
        assert_round_trip(before, read(folder), format, form)
        if format == "safetensors":
            continue
        file = folder / "config.json"
        described = json.loads(file.read_text())
        del described[DESCRIPTION]
        file.write_text(json.dumps(described))
        after = read(folder)
        assert replace(after.config, **tolerated(config, format)) == before.config
        assert same_tensors(after.encoder, before.encoder)


def tolerated(config, format):
    """What a format does not say of itself."""
    fields = {"shift_before_padding": False} if isinstance(config, SwinConfig) else {}
    return fields | ({} if format == "hf" else {"drop_path_rate": config.drop_path_rate})


def test_tables_are_written_for_the_image_size_that_is_asked_for(tmp_path):
    """At another size than trained: the file's features there are this encoder's."""
    for config, format in ((VIT, "official"), (TUNED, "timm"), (SMALLER_MAP, "official")):
        size = (24, 24) if config == SMALLER_MAP else (64, 64)
        before = random_checkpoint(config, config.image_size)
        folder = export(before, format, tmp_path / f"{format} {size}", "encoder", size).folder
        after, images = read(folder), random_images(2, config.in_channels, *size)
        assert after.config.image_size == size
        with torch.no_grad():
            features, expected = (build_encoder(which).encoder(images).features for which in (after, before))
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"windows \[\(5, 5\), \(5, 5\)\] at 64×64 px where this encoder has"):
        export(random_checkpoint(SMALLER_MAP, (32, 32)), "official", tmp_path / "larger", image_size=(64, 64))


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [SWIN, replace(SWIN, window_size=3), SMALL_MAP, VIT, TUNED, replace(VIT, layer_scale=0.0, norm_after_pooling=True)],
)
@torch.inference_mode()
def test_transformers_loads_an_export_and_is_read(config, tmp_path):
    """Features of an exported encoder, and logits of an exported classifier; then of what transformers has saved again."""
    import transformers

    checkpoint = random_checkpoint(config, config.image_size)
    images = random_images(2, config.in_channels, *config.image_size)
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    output, expected = model.eval()(images), build_encoder(checkpoint).encoder(images)
    tokens = output.last_hidden_state[:, -expected.features[0, 0].numel() :]
    if isinstance(config, SwinConfig) or not config.norm_after_pooling:
        torch.testing.assert_close(tokens, expected.features.flatten(2).transpose(1, 2), atol=1e-4, rtol=0)
    if isinstance(config, SwinConfig) or config.norm_after_pooling:
        torch.testing.assert_close(output.pooler_output, expected.pooled, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = read_encoder(tmp_path / "again").encoder
    torch.testing.assert_close(again(images).pooled, expected.pooled, atol=1e-5, rtol=0)
    if config == VIT:
        return
    folder = export(checkpoint, "hf", tmp_path / "classifier", "classifier").folder
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(model(images).logits, logits_of(checkpoint, images), atol=1e-4, rtol=0)
    assert tuple(model.config.id2label.values()) == CLASSES


@torch.inference_mode()
def test_transformers_loads_a_simmim_model(tmp_path):
    import transformers

    checkpoint = random_checkpoint(SWIN, (64, 64))
    folder = export(checkpoint, "hf", tmp_path / "hf", "simmim").folder
    theirs = transformers.AutoModelForMaskedImageModeling.from_pretrained(folder).eval()
    ours = SimMIM(build_encoder(checkpoint).encoder).eval()
    ours.load_state_dict(checkpoint.pretraining, strict=False)
    images, mask = random_images(2, 3, 64, 64), torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    expected, output = ours(images, mask, return_reconstruction=True), theirs(images, bool_masked_pos=mask.flatten(1))
    assert abs(output.loss - expected.loss) < 1e-5
    torch.testing.assert_close(output.reconstruction, expected.reconstruction, atol=1e-4, rtol=0)


# --- timm ------------------------------------------------------------------------------------------------------------

TIMM = {
    "swin": (SWIN, ()),
    "swin of a small map, classifier": (SMALLER_MAP, CLASSES),
    "swin, padded": (replace(SWIN, window_size=5, shift_before_padding=True), ()),
    "vit": (VIT, ()),
    "vit, classifier": (TUNED, CLASSES),
    "vit, oblong": (OBLONG, ()),
}


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """Every export loaded by timm, and two models that timm saved, in one process."""
    if not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    folder, jobs = tmp_path_factory.mktemp("timm"), []
    for name, (config, classes) in TIMM.items():
        exported = export(random_checkpoint(config, config.image_size, classes), "timm", folder / name)
        save_file({"images": random_images(2, config.in_channels, *config.image_size)}, folder / f"{name}.images")
        jobs.append(
            {
                "do": "load",
                "folder": str(exported.folder),
                "images": str(folder / f"{name}.images"),
                "out": str(folder / f"{name}.out"),
            }
        )
    for name, architecture, arguments in (
        ("saved swin", "swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [2, 2, 2, 2], "num_classes": 0}),
        ("saved beit", "beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}),
    ):
        save_file({"images": random_images(1, 3, 224, 224)}, folder / f"{name}.images")
        jobs.append(
            {
                "do": "save",
                "name": architecture,
                "arguments": arguments,
                "dtypes": ["float32"],
                "folder": str(folder / name),
                "images": str(folder / f"{name}.images"),
                "out": str(folder / f"{name}.out"),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = [sys.executable, str(Path(__file__).parent / "timm_stub.py"), str(folder / "jobs.json")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", TIMM)
@torch.inference_mode()
def test_timm_loads_an_export(name, timm_folder):
    config, classes = TIMM[name]
    checkpoint = random_checkpoint(config, config.image_size, classes)
    images = load_file(timm_folder / f"{name}.images")["images"]
    output = build_encoder(checkpoint).encoder(images, return_stages=True)
    results = load_file(timm_folder / f"{name}.out")
    for way in ("bare", "whole"):
        if isinstance(config, SwinConfig):
            for index, stage in enumerate(output.stages):
                torch.testing.assert_close(results[f"{way}.stage{index}"], stage, atol=1e-4, rtol=0)
        else:
            map_ = output.stages[0] if config.norm_after_pooling else output.features
            torch.testing.assert_close(results[f"{way}.tokens"], map_.flatten(2).transpose(1, 2), atol=1e-4, rtol=0)
        if isinstance(config, SwinConfig) or config.norm_after_pooling:
            torch.testing.assert_close(results[f"{way}.pooled"], output.pooled, atol=1e-4, rtol=0)
        if classes:
            torch.testing.assert_close(results[f"{way}.logits"], logits_of(checkpoint, images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["saved swin", "saved beit"])
@torch.inference_mode()
def test_models_that_timm_saved(name, timm_folder):
    saved, results = read_encoder(timm_folder / name), load_file(timm_folder / f"{name}.out")
    assert saved.checkpoint.format == "timm" and saved.preprocessing.image_size == (224, 224)
    images = load_file(timm_folder / f"{name}.images")["images"]
    torch.testing.assert_close(saved.encoder(images).pooled, results["float32.pooled"], atol=1e-4, rtol=0)


# --- wrong files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SWIN, VIT], ids=["swin", "vit"])
@pytest.mark.parametrize("format", ["official", "timm", "hf"])
def test_every_tensor_counts(config, format, tmp_path):
    folder = export(random_checkpoint(config, config.image_size, ()), format, tmp_path / "out", "encoder").folder
    file = next(path for path in folder.iterdir() if path.name in ("model.safetensors", "model.pth"))
    whole = file.read_bytes()
    content = torch.load(file, weights_only=True)["model"] if file.suffix == ".pth" else load_file(file)
    names = [name for name in content if not name.endswith(("_index", "_mask"))]
    for name in names[:: max(len(names) // 12, 1)]:
        for change in (lambda state, name=name: {k: v for k, v in state.items() if k != name}, reshape(name)):
            rewritten(folder, change)
            with pytest.raises(ValueError) as caught:
                read(folder)
            assert "\n" not in str(caught.value) and str(folder) in str(caught.value), caught.value
            (folder / "new").write_bytes(whole)
            (folder / "new").replace(file)


def reshape(name):
    return lambda state: {**state, name: torch.zeros(state[name].shape[0] + 1, *state[name].shape[1:])}


def test_a_checkpoint_of_another_family_is_refused(tmp_path, capsys):
    """A description of one family with the weights of another; Swin's position biases in a folder of Swin V2."""
    folders = {
        config: export(random_checkpoint(config, config.image_size, ()), "official", tmp_path / str(n), "encoder").folder
        for n, config in enumerate((SWIN, VIT))
    }
    (folders[SWIN] / "config.json").write_bytes((folders[VIT] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"describes another encoder than the weights, which are a Swin's"):
        read(folders[SWIN])
    refused(["inspect", str(folders[SWIN])], ["describes another encoder"], tmp_path, capsys)
