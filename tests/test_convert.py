"""Encoders from and to other formats: what goes out comes back bit by bit, the authors' file gives the authors' numbers,
what is adapted is said, and training goes on from any of them. Features in other libraries are compared in test_parity.py;
files that must not be read are in test_refused_weights.py."""

import json
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_swinv2 import random_images, randomize

from simmim import load_encoder
from simmim.checkpoints.checkpoint import (
    Checkpoint,
    Preprocessing,
    check_state,
    save_checkpoint,
)
from simmim.checkpoints.export import DESCRIPTION, described, export
from simmim.checkpoints.formats import huggingface, official, timm
from simmim.checkpoints.formats.huggingface import read
from simmim.checkpoints.reading import read_encoder
from simmim.checkpoints.weight_files import HARMLESS, WeightFile
from simmim.cli import main
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.methods.simmim import SimMIM

GOLDEN = Path(__file__).parent / "golden"
RELEASED = GOLDEN / "official_simmim_pretrain_swinv2_micro.pth"
CLASSES = ("cat", "Hündchen", "hedgehog, European")
SMALL = SwinV2Config(8, (1, 2), (1, 2), window_size=4)
FORMATS = ("safetensors", "official", "timm", "hf")


@lru_cache(maxsize=2)
def random_checkpoint(config, size, classes=CLASSES, meta=False, **preprocessing):
    """A model with every part, all of it random, as if it had been pre-trained at `size`."""
    config = config.trained_at(size)
    with torch.device("meta" if meta else "cpu"):
        model, head = SimMIM(SwinV2(config)), torch.nn.Linear(config.dims[-1], max(len(classes), 1))
    if not meta:
        randomize(model), randomize(head, seed=1)
    statistics = (tuple(0.3 + 0.01 * i for i in range(config.in_channels)), (0.25,) * config.in_channels)
    return Checkpoint(
        config,
        model.encoder.state_dict(),
        Preprocessing(size, *statistics, **preprocessing),
        Path("random"),
        provenance={
            "method": "SimMIM",
            "data": "hedgerow",
            "images": 12_345,
            "loss": 0.1234,
            "mask_unit": 32,
            "mask_ratio": 0.6,
            "norm_target_patch": None,
        },
        pretraining={name: value.detach() for name, value in model.own_state().items()},
        head={name: value.detach() for name, value in head.state_dict().items()} if classes else {},
        classes=classes,
    )


def same_tensors(first, second):
    """The same names, shapes and types, and where there are values the same bits."""
    kinds = [{name: (value.shape, value.dtype) for name, value in state.items()} for state in (first, second)]
    if kinds[0] != kinds[1]:
        return False
    return all(value.is_meta or second[name].is_meta or torch.equal(value, second[name]) for name, value in first.items())


def assert_round_trip(before, after, format, form):
    """All that the form holds is back as it was, and nothing else has come."""
    everything = format == "safetensors"
    assert after.config == before.config
    assert after.preprocessing == before.preprocessing
    assert after.provenance == before.provenance
    assert same_tensors(after.encoder, before.encoder)
    assert same_tensors(after.pretraining, before.pretraining if form == "simmim" or everything else {})
    assert same_tensors(after.head, before.head if form == "classifier" or everything else {})
    assert after.classes == (before.classes if form == "classifier" or everything else ())
    assert after.format == ("simmim" if everything else format)


def weights_file(folder):
    return next(path for path in folder.iterdir() if path.name in ("encoder.safetensors", "model.safetensors", "model.pth"))


def rewritten(folder, change):
    """The folder with its weights changed. By another file in their place: they may be mapped."""
    file = weights_file(folder)
    if file.suffix == ".pth":
        content = torch.load(file, weights_only=True)
        torch.save({**content, "model": change(content["model"])}, folder / "new")
    else:
        save_file(change(load_file(file)), folder / "new")
    (folder / "new").replace(file)


def refused(words, said, folder, capsys):
    """Exit code 2, one line on stderr that says what is meant, nothing on stdout, nothing made or changed."""

    def listing():
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = listing()
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("simmim: "), error
    assert all(text in error for text in said), error
    assert listing() == before


# --- round trips -----------------------------------------------------------------------------------------------------


def forms_of(format):
    """The forms that differ."""
    return {"safetensors": ["encoder"], "timm": ["encoder", "classifier"]}.get(format, ["encoder", "simmim", "classifier"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "preset, size, overrides",
    [
        ("nano", 32, {"in_channels": 1}),
        ("micro", 96, {"drop_path_rate": 0.2}),
        ("tiny", 224, {"window_size": 14, "pretrained_window_sizes": (12, 12, 12, 6)}),
    ],
)
def test_round_trip_on_disk(preset, size, overrides, format, tmp_path):
    """Through `export` and `read`, in every form."""
    how = {"micro": {"interpolation": "bicubic", "crop": 0.9}, "tiny": {"fit": "squash"}}.get(preset, {})
    before = random_checkpoint(SwinV2Config.from_preset(preset, **overrides), (size, size), **how)
    for form in forms_of(format):
        assert_round_trip(before, read(export(before, format, tmp_path / form, form).folder), format, form)


def in_memory(checkpoint, format, form):
    """Out and back without a disk, as `export` and `read` do it."""
    description = json.loads(json.dumps(described(checkpoint, form)))
    if format == "safetensors":
        check_state(checkpoint.config, checkpoint.encoder, checkpoint.source)
        return replace(checkpoint, config=SwinV2Config(**description["architecture"]))
    module = {"official": official, "timm": timm, "hf": huggingface}[format]
    file = WeightFile(Path("folder/model"), module.state_for(checkpoint, form))
    if format == "official":
        return official.read(file, description, {})
    if format == "timm":
        return timm.read(file, description, {}, timm.folder_config(checkpoint, form, "mit"))
    folder_config = json.loads(json.dumps(huggingface.folder_config(checkpoint, form)))
    return huggingface.read(file, description, folder_config, Path("."))


@pytest.mark.parametrize("preset", ["small", "base"])
def test_round_trip_in_memory(preset, tmp_path):
    before = random_checkpoint(SwinV2Config.from_preset(preset), (256, 256))
    for format in FORMATS:
        form = "classifier" if format == "timm" else "simmim"
        after = in_memory(before, format, form)
        # Preprocessing is in a file of its own in the format hf.
        assert_round_trip(
            before,
            replace(after, preprocessing=before.preprocessing, format=after.format),
            *(("safetensors", form) if format == "safetensors" else (format, form)),
        )


@pytest.mark.parametrize("preset", ["huge", "giant-1b", "giant-3b"])
def test_round_trip_of_the_largest_by_name_and_shape(preset):
    """Without values. What has no place for the extra norms refuses them; without extra norms it takes all the rest."""
    before = random_checkpoint(SwinV2Config.from_preset(preset), (256, 256), meta=True)
    for form in ("encoder", "simmim", "classifier"):
        assert_round_trip(before, in_memory(before, "official", form), "official", form)
    check_state(before.config, before.encoder, before.source)
    for format in ("timm", "hf"):
        with pytest.raises(ValueError, match=r"has no place for the extra norms of huge and giants: export as") as caught:
            export(before, format, "nowhere")
        assert "\n" not in str(caught.value) and not Path("nowhere").exists()
        with pytest.raises(ValueError, match=r"no place for layers\.2\.blocks\.5\.norm3\.weight"):
            in_memory(before, format, "encoder")
    plain = random_checkpoint(SwinV2Config.from_preset(preset, extra_norm_every=0), (256, 256), meta=True)
    for format in ("official", "timm", "hf"):
        after = in_memory(plain, format, "classifier")
        assert_round_trip(plain, replace(after, preprocessing=plain.preprocessing), format, "classifier")


@pytest.mark.parametrize("format", ["safetensors", "official", "timm"])
def test_round_trip_of_oblong_images(format, tmp_path):
    """Maps lower than the window were scaled apart in height and width, and stay so."""
    before = random_checkpoint(SwinV2Config.from_preset("micro"), (64, 160), ())
    assert before.config.pretrained_window_sizes == (8, 8, (4, 8), (2, 5))
    exported = export(before, format, tmp_path / format, "encoder")
    after = read(exported.folder)
    assert_round_trip(before, after, format, "encoder")
    images = random_images(1, 3, 64, 160)
    with torch.no_grad():
        expected = SwinV2(before.config).eval()
        expected.load_state_dict(before.encoder)
        assert torch.equal(load_encoder(exported.folder)(images).features, expected(images).features)
    assert any("square images" in note for note in exported.notes) == (format == "official")


@pytest.mark.parametrize(
    "size, form, said",
    [
        ((64, 160), "encoder", "uses windows [8, 8, 4, 2] where this encoder at 64×160 px has"),
        ((256, 320), "encoder", "goes by the height alone and at 256×320 px does not shift both sides of stage 4's"),
        ((128, 160), "simmim", "masked image modeling takes square images, not 128×160 px"),
        ((120, 120), "encoder", "uses windows [8, 8, 7, 3] where"),
    ],
)
def test_sizes_at_which_transformers_would_compute_something_else(size, form, said, tmp_path):
    window = 4 if form == "simmim" else 8
    preset = "nano" if form == "simmim" else "micro"
    checkpoint = random_checkpoint(SwinV2Config.from_preset(preset, window_size=window), size)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        export(checkpoint, "hf", tmp_path / "hf", form)
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("format", ["official", "timm", "hf"])
def test_a_folder_is_described_in_its_formats_own_terms_too(format, tmp_path):
    """Without what this toolkit left in config.json: the same weights in the same architecture. A path of weights stands for
    its folder."""
    config = SwinV2Config.from_preset("micro", window_size=12, pretrained_window_sizes=(8, 8, 8, 4))
    before = random_checkpoint(replace(config, shift_before_padding=format == "timm"), (192, 192), interpolation="bicubic")
    folder = export(before, format, tmp_path / format, "classifier").folder
    assert read(next(folder.glob("model.*"))).config == read(folder / "config.json").config == before.config
    described_so = json.loads((folder / "config.json").read_text())
    del described_so[DESCRIPTION]
    (folder / "config.json").write_text(json.dumps(described_so))
    after = read(folder)
    assert after.config == before.config and same_tensors(after.encoder, before.encoder)
    assert after.preprocessing.image_size == (192, 192) and after.preprocessing.interpolation == "bicubic"
    if format != "official":
        assert after.preprocessing == before.preprocessing and after.classes == before.classes
    assert same_tensors(after.head, before.head)


# --- the authors' file -----------------------------------------------------------------------------------------------


def golden(name):
    with safe_open(GOLDEN / name, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture
def no_yacs(monkeypatch):
    """`import yacs` fails, wherever these tests run."""
    monkeypatch.setitem(sys.modules, "yacs", None)
    monkeypatch.setitem(sys.modules, "yacs.config", None)


def released():
    """What the authors' file holds, its configuration as a plain dict."""
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(RELEASED, weights_only=True)


def assert_golden(path, **overrides):
    """Features and loss of the SimMIM model are the authors'."""
    _, numbers = golden("simmim_swinv2_micro.safetensors")
    checkpoint = read(path, **overrides)
    model = SimMIM(load_encoder(path, **overrides)).eval()
    images, mask = numbers["input.image"], numbers["input.mask"].bool()
    with torch.no_grad():
        if checkpoint.pretraining:
            model.load_state_dict(checkpoint.pretraining, strict=False)
            assert abs(model(images, mask).loss - numbers["output.loss_l1"]) < 1e-5
        else:
            model.mask_token.copy_(numbers["model.encoder.mask_token"].flatten())
        features = model.encoder.encode(model.substitute(model.encoder.embed(images), mask)).features
    difference = (features - numbers["output.features"]).abs().max().item()
    print(f"features apart {difference:.1e}")
    assert difference < 5e-5
    return checkpoint


def test_the_authors_file_gives_their_numbers(no_yacs):
    checkpoint = assert_golden(RELEASED)
    assert checkpoint.format == "official" and checkpoint.pretraining
    assert checkpoint.config == SwinV2Config(
        8, (2, 2, 2, 2), (1, 2, 4, 8), window_size=8, pretrained_window_sizes=(8, 8, 8, 4)
    )
    assert checkpoint.preprocessing == Preprocessing((128, 128), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert checkpoint.provenance == {
        "origin": "the authors' code",
        "method": "SimMIM",
        "epochs": 800,
        "mask_unit": 32,
        "mask_ratio": 0.6,
    }


LAYOUTS = {
    "rpe_mlp": lambda name: name.replace("cpb_mlp", "rpe_mlp"),
    "module.": lambda name: f"module.{name}",
    "module. and compiled": lambda name: f"module._orig_mod.{name.replace('cpb_mlp', 'rpe_mlp')}",
    "a classifier's": lambda name: name.removeprefix("encoder."),
}


def written(path, model, **beside):
    torch.save({"model": model, **beside}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_authors_other_layouts(layout, tmp_path, no_yacs):
    content = released()
    model = {LAYOUTS[layout](name): value for name, value in content["model"].items()}
    assert_golden(written(tmp_path / "model.pth", model, config=content["config"]))


def test_sizes_from_the_configuration_or_from_the_buffers_alone(tmp_path, no_yacs):
    """As a classifier's layout: without buffers but with the configuration, and the other way round."""
    content, whole = released(), read(RELEASED)
    model = {name.removeprefix("encoder."): value for name, value in content["model"].items()}
    weights = {name: value for name, value in model.items() if not official.BUFFERS.search(name)}
    assert len(weights) < len(model)
    for kept, beside in ((weights, {"config": content["config"]}), (model, {})):
        checkpoint = assert_golden(written(tmp_path / "model.pth", kept, **beside))
        assert checkpoint.config == whole.config and checkpoint.preprocessing.image_size == (128, 128)


def reference_buffers(window, pretrained, windows_of_map, block):
    """What the authors' modules store of one block, by the paper's equation 4 and one row of the mask for each window."""
    offsets = torch.arange(1 - window, window, dtype=torch.float32) * 8 / max(pretrained - 1, 1)
    axis = offsets.sign() * torch.log2(1 + offsets.abs()) / 3
    table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    buffers = {f"{block}.attn.relative_coords_table": table[None]}
    if windows_of_map > 1 and block.endswith(".1"):
        buffers[f"{block}.attn_mask"] = torch.zeros(windows_of_map, window**2, window**2)
    return buffers


@pytest.fixture(scope="module")
def transferred():
    """The golden classifier moved from window 8 to 12: numbers, weights, and the authors' buffers."""
    _, numbers = golden("classifier_swinv2_micro_window_transfer.safetensors")
    model = {name.removeprefix("model."): value for name, value in numbers.items() if name.startswith("model.")}
    buffers = {}
    for stage, (window, pretrained, count) in enumerate(zip((12, 12, 12, 6), (8, 8, 8, 4), (16, 4, 1, 1))):
        for block in range(2):
            buffers |= reference_buffers(window, pretrained, count, f"layers.{stage}.blocks.{block}")
    return numbers, model, buffers


def logits_of(path, images, **overrides):
    saved = read_encoder(path, **overrides)
    with torch.no_grad():
        pooled = saved.encoder(images).pooled
    head = saved.checkpoint.head
    return saved, torch.nn.functional.linear(pooled, head["weight"], head["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_moved_window_is_read_from_the_buffers(transferred, dtype, tmp_path):
    """Moved from 8 to 12 and 128 to 192 px, which nothing but the buffers say; also where they are half as precise."""
    numbers, model, buffers = transferred
    stored = model | {name: value.to(dtype) for name, value in buffers.items()}
    saved, logits = logits_of(written(tmp_path / "model.pth", stored), numbers["input.image"])
    assert saved.encoder.config.window_size == 12 and saved.encoder.config.pretrained_window_sizes == (8, 8, 8, 4)
    assert saved.preprocessing.image_size == (192, 192)
    torch.testing.assert_close(logits, numbers["output.logits"], atol=5e-5, rtol=0)


def test_a_window_that_nothing_tells(transferred, tmp_path):
    """Asked for by name; given, the file loads; the published kind of file name tells it."""
    numbers, model, _ = transferred
    path = written(tmp_path / "weights.pth", model)
    with pytest.raises(ValueError, match=r"weights\.pth does not tell its window.*give .*window_size") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)
    saved = read_encoder(path, window_size=8)
    assert saved.encoder.config.window_size == 8 and saved.preprocessing.image_size == (256, 256)
    assert any("window 8 as given" in note for note in saved.report.adapted)
    for name in (
        "swinv2_base_patch4_window8to12_128to192_22kto1k_ft.pth",
        "swinv2_window8to12_128to192/2024.pth",
        "2024/swinv2_window8to12_128to192.pth",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved, logits = logits_of(written(tmp_path / name, model), numbers["input.image"])
        assert saved.preprocessing.image_size == (192, 192)
        assert saved.encoder.config.pretrained_window_sizes == (8, 8, 8, 4)
        torch.testing.assert_close(logits, numbers["output.logits"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "name, window, pretrained, size",
    [
        ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", 16, (12, 12, 12, 6), 256),
        ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", 24, (12, 12, 12, 6), 384),
        ("swinv2_base_patch4_window12_192_22k.pth", 12, (12, 12, 12, 6), 192),
        ("swinv2_tiny_patch4_window16_256.pth", 16, (16, 16, 16, 8), 256),
    ],
)
def test_published_file_names(name, window, pretrained, size, transferred, tmp_path):
    checkpoint = read(written(tmp_path / name, transferred[1]))
    assert (checkpoint.config.window_size, checkpoint.config.pretrained_window_sizes) == (window, pretrained)
    assert checkpoint.preprocessing.image_size == (size, size)
    assert checkpoint.notes == (f"window {window} and {size} px as the file's name says",)


def test_an_export_for_the_authors_code_has_their_names_and_buffers(tmp_path):
    """Read, exported and read by torch.load: the released file's very keys, and every value with its type, buffers too."""
    folder = export(read(RELEASED), "official", tmp_path / "out").folder
    theirs, ours = released(), torch.load(folder / "model.pth", weights_only=True)
    assert ours["model"].keys() == theirs["model"].keys()
    assert same_tensors(ours["model"], dict(theirs["model"]))
    buffers = [name for name in ours["model"] if official.BUFFERS.search(name)]
    assert {name.rsplit(".", 1)[-1] for name in buffers} == {"relative_coords_table", "relative_position_index", "attn_mask"}
    stated, expected = ours["config"]["MODEL"]["SWINV2"], theirs["config"]["MODEL"]["SWINV2"]
    assert {name: expected[name] for name in stated if name != "PRETRAINED_WINDOW_SIZES"} == {
        name: value for name, value in stated.items() if name != "PRETRAINED_WINDOW_SIZES"
    }
    assert ours["config"]["DATA"] == dict(theirs["config"]["DATA"])


def test_buffers_of_a_moved_window_are_the_papers(transferred):
    _, _, buffers = transferred
    config = SwinV2Config(8, (2, 2, 2, 2), (1, 2, 4, 8), window_size=12, pretrained_window_sizes=(8, 8, 8, 4))
    ours = official.buffers_of(config, (192, 192))
    assert {name for name in ours if "index" not in name} == buffers.keys()
    for name, value in buffers.items():
        assert ours[name].shape == value.shape
        if "table" in name:
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
    assert log_spaced_coords((12, 12), (8, 8), torch.device("cpu")).max() > 1


# --- what is adapted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [(3, 1), (1, 3), (3, 4), (3, 6), (4, 3), (3, 2)])
def test_other_channels_keep_a_gray_image_s_features(before, after, tmp_path):
    """An image alike in all channels has the features it had, and the report says what was done."""
    checkpoint = random_checkpoint(replace(SMALL, in_channels=before), (32, 32))
    folder = save_checkpoint(tmp_path / "encoder", checkpoint)
    gray, lines = random_images(2, 1, 32, 32), []
    saved = read_encoder(folder, report=lines.append, in_channels=after)
    with torch.no_grad():
        expected = load_encoder(folder)(gray.expand(-1, before, -1, -1)).features
        actual = saved.encoder(gray.expand(-1, after, -1, -1)).features
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert saved.encoder.config.in_channels == len(saved.preprocessing.mean) == len(saved.preprocessing.std) == after
    assert saved.preprocessing.mean == pytest.approx((sum(checkpoint.preprocessing.mean) / before,) * after)
    assert f"adapted    {before} input channels to {after}" in lines[0].splitlines()


def test_the_report_tells_what_became_of_everything(tmp_path):
    checkpoint = random_checkpoint(SMALL, (32, 32))
    official_folder = export(checkpoint, "official", tmp_path / "official", "simmim").folder
    lines = []
    read_encoder(official_folder, report=lines.append, window_size=6, in_channels=1)
    tensors, values = len(checkpoint.encoder), sum(value.numel() for value in checkpoint.encoder.values())
    values -= 2 * 8 * 16  # one channel instead of three
    assert lines[0].splitlines() == [
        f"loaded     {tensors} of {tensors} tensors, {values / 1e6:.2f} M values, from {official_folder / 'model.pth'} "
        "(the authors' code)",
        "adapted    3 input channels to 1",
        "adapted    window 4 to 6, position bias scaled by the pre-trained windows 4, 4",
    ]
    timm_folder = export(checkpoint, "timm", tmp_path / "timm").folder
    read_encoder(timm_folder, report=lines.append)
    assert lines[1].splitlines()[1:] == [
        "missing    mask token and decoder: fresh where pre-training goes on",
        "unexpected a head of 3 classes",
    ]


# --- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_half_precision_is_read_as_float32(format, dtype, tmp_path):
    checkpoint = random_checkpoint(SMALL, (32, 32), ())
    folder = export(checkpoint, format, tmp_path / "out", "encoder").folder

    def halved(state):
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}

    rewritten(folder, halved)
    assert same_tensors(read(folder).encoder, {name: value.to(dtype).float() for name, value in checkpoint.encoder.items()})


@pytest.fixture
def hf_folder(tmp_path):
    return export(random_checkpoint(SMALL, (32, 32)), "hf", tmp_path / "hf", "simmim").folder


def test_a_folder_in_shards(hf_folder):
    whole, state = read(hf_folder), load_file(hf_folder / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, hf_folder / file)
    (hf_folder / "model.safetensors").unlink()
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file in shards for name in shards[file]}}))
    assert_round_trip(whole, replace(read(hf_folder), source=whole.source), "hf", "simmim")
    (hf_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002-of-00002\.safetensors, which is not beside it"):
        read(hf_folder)
    save_file({names[1]: state[names[1]]}, hf_folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"index\.json promises .*, which no shard holds"):
        read(hf_folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index\.json lists no weights"):
        read(hf_folder)


def test_a_folder_with_pytorch_model_bin(hf_folder):
    whole = read(hf_folder)
    torch.save(load_file(hf_folder / "model.safetensors"), hf_folder / "pytorch_model.bin")
    (hf_folder / "model.safetensors").unlink()
    assert_round_trip(whole, read(hf_folder), "hf", "simmim")


# --- cards and inspection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [*FORMATS, "onnx"])
def test_the_model_card_and_the_printed_lines(format, tmp_path, monkeypatch):
    """Front matter with the license; data, preprocessing, recipe, metrics and classes; lines that load the folder. timm's
    lines run in test_parity.py."""
    checkpoint = random_checkpoint(SMALL, (32, 32), interpolation="bicubic", crop=0.875)
    exported = export(checkpoint, format, tmp_path / "out", "classifier", license="cc-by-4.0")
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "image-classification" and front["tags"]
    for line in (
        "- data: hedgerow",
        "- images: 12345",
        "- method: SimMIM",
        "- mask ratio: 0.6",
        "- loss: 0.1234",
        "32×32 px, bicubic, central crop 0.875, values in [0, 1], mean [0.3, 0.31, 0.32], std [0.25, 0.25, 0.25]",
        "cat, Hündchen, hedgehog, European",
        "| window | 4, pre-trained with [4, 4] |",
    ):
        assert line in text, line
    code = text.split("```python\n")[1].split("\n```")[0]
    assert code.replace("FOLDER", str(exported.folder.resolve())) == exported.code
    unlicensed = export(checkpoint, format, tmp_path / "unlicensed", "encoder").folder
    assert "license: unknown\n" in (unlicensed / "README.md").read_text(encoding="utf-8")
    if format == "timm":
        return
    names = {}
    exec(exported.code, names)
    images = random_images(1, 3, 32, 32)
    logits = torch.nn.functional.linear(
        load_encoder(save_checkpoint(tmp_path / "ours", checkpoint))(images).pooled,
        checkpoint.head["weight"],
        checkpoint.head["bias"],
    ).detach()
    if format == "safetensors":
        assert names["features"].shape == (1, 16)
    if format == "official":
        assert same_tensors(names["state"], official.state_for(checkpoint, "classifier"))
    if format == "hf":
        torch.testing.assert_close(names["model"].eval()(images).logits, logits, atol=1e-4, rtol=0)
        assert names["processor"].crop_size["height"] == 32
    if format == "onnx":
        found = names["session"].run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    checkpoint = random_checkpoint(SwinV2Config.from_preset("nano"), (64, 64))
    folder = export(checkpoint, "official", tmp_path / "out", "classifier").folder
    for words in (["inspect", str(folder)], ["inspect", "--path", str(folder / "model.pth")]):
        assert main(words) == 0
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert rows["format"] == "official, as of the authors' code" and rows["size"].startswith("nano, ")
        assert rows["holds"] == "encoder; head of 3 classes: cat, Hündchen, hedgehog, European"
        assert rows["window"] == "4, pre-trained with [4, 4]" and rows["images"].startswith("64×64 px, 3 channels, bilinear")
        assert "method SimMIM, data hedgerow" in rows["from"] and "None" not in rows["from"]
        assert rows["exports"].startswith("as safetensors; official; timm; hf; onnx")
    assert main(["inspect", str(RELEASED)]) == 0
    out = capsys.readouterr().out
    assert "encoder; mask token and decoder" in out and "8, pre-trained with [8, 8, 8, 4]" in out and "128×128 px" in out
    huge = SwinV2Config(8, (1, 1, 2), (1, 1, 1), window_size=4, extra_norm_every=2)
    save_checkpoint(tmp_path / "huge", random_checkpoint(huge, (32, 32)))
    assert main(["inspect", str(tmp_path / "huge")]) == 0
    assert "not timm (timm has no place for the extra norms" in capsys.readouterr().out


# --- training goes on ------------------------------------------------------------------------------------------------


def first_weights(monkeypatch, module_class):
    """The state of the model before the first step of the next run, in a dict that fills when it starts."""
    seen, setup = {}, module_class.configure_optimizers

    def spy(self):
        seen.update({name: value.clone() for name, value in self.model.state_dict().items()})
        return setup(self)

    monkeypatch.setattr(module_class, "configure_optimizers", spy)
    return seen


def pretrain_words(digits, out, init, *more):
    return [
        "pretrain",
        "--data",
        str(digits.unlabeled),
        "--out",
        str(out),
        "--init",
        str(init),
        "--epochs",
        "0.03",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--model.mask-unit",
        "8",
        *more,
    ]


@pytest.fixture(scope="module")
def gray_checkpoint():
    return random_checkpoint(replace(SMALL, in_channels=1), (32, 32), ())


@pytest.mark.parametrize(
    "format, form", [("safetensors", "encoder"), ("official", "simmim"), ("hf", "simmim"), ("timm", "encoder")]
)
def test_pretraining_goes_on_from(format, form, gray_checkpoint, digits, tmp_path, monkeypatch, capsys):
    """Two steps more. Before the first the weights are the source's: encoder, and where the file has them mask token and
    decoder; the report says which."""
    from simmim.pretrain.module import PretrainingModule

    folder = export(gray_checkpoint, format, tmp_path / "source", form).folder
    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", folder)) == 0
    out, encoder = capsys.readouterr().out, {f"encoder.{name}": value for name, value in gray_checkpoint.encoder.items()}
    expected = encoder if format == "timm" else encoder | gray_checkpoint.pretraining
    assert same_tensors({name: seen[name] for name in expected}, expected)
    assert ("loaded     mask token and decoder" in out) == (format != "timm")
    assert ("missing    mask token and decoder: fresh" in out) == (format == "timm")
    assert seen.keys() == encoder.keys() | gray_checkpoint.pretraining.keys()
    after = read(tmp_path / "run")
    assert after.config == replace(gray_checkpoint.config, shift_before_padding=after.config.shift_before_padding)
    assert after.provenance["init"] == "source" and not same_tensors(after.encoder, gray_checkpoint.encoder)
    assert after.preprocessing.mean == (0.3,)


def test_pretraining_goes_on_from_the_authors_file(digits, tmp_path, monkeypatch, capsys):
    """Gray digits are read as the three channels that the encoder takes."""
    from simmim.pretrain.module import PretrainingModule

    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", RELEASED, "--image-size", "64")) == 0
    assert "loaded     mask token and decoder" in capsys.readouterr().out
    checkpoint = read(RELEASED)
    expected = {f"encoder.{name}": value for name, value in checkpoint.encoder.items()} | checkpoint.pretraining
    assert same_tensors(seen, expected)
    assert read(tmp_path / "run").config == replace(checkpoint.config, window_size=4)


def test_pretraining_adapts_another_channel_count(gray_checkpoint, digits, tmp_path, monkeypatch, capsys):
    """Three channels of an encoder of one: the projection is a third for each, the decoder fresh, and the report says so."""
    from simmim.pretrain.module import PretrainingModule

    folder = save_checkpoint(tmp_path / "source", gray_checkpoint)
    seen = first_weights(monkeypatch, PretrainingModule)
    assert main(pretrain_words(digits, tmp_path / "run", folder, "--data.channels", "3")) == 0
    out = capsys.readouterr().out
    assert "adapted    1 input channels to 3" in out and "adapted    mask token and decoder are fresh" in out
    weight = gray_checkpoint.encoder["patch_embed.proj.weight"]
    torch.testing.assert_close(seen["encoder.patch_embed.proj.weight"], weight.repeat(1, 3, 1, 1) / 3)
    assert seen["decoder.weight"].shape == (8 * 8 * 3, 16)


def test_a_preset_and_an_encoder_exclude_each_other(digits, tmp_path, capsys):
    words = pretrain_words(digits, tmp_path / "run", RELEASED, "--preset", "nano")
    refused(words, ["--preset describes a fresh encoder, and --init brings its own: give one of them"], tmp_path, capsys)


def finetune_words(digits, out, init, *more):
    return [
        "finetune",
        "classification",
        "--data",
        str(digits.labeled),
        "--out",
        str(out),
        "--init",
        str(init),
        "--labels-per-class",
        "1",
        "--steps",
        "1",
        "--batch-size",
        "5",
        "--workers",
        "0",
        *more,
    ]


@pytest.mark.parametrize(
    "classes, said",
    [
        (tuple("0123456789"), "adapted    head of the same 10 classes loaded"),
        (tuple("9876543210"), "adapted    head of 10 classes replaced by a fresh one of 10"),
        (CLASSES, "adapted    head of 3 classes replaced by a fresh one of 10"),
        ((), ""),
    ],
)
def test_finetuning_keeps_the_head_of_the_same_classes(classes, said, digits, tmp_path, monkeypatch, capsys):
    from simmim.finetune.classification.module import ClassificationFinetuning

    checkpoint = random_checkpoint(replace(SMALL, in_channels=1), (32, 32), classes)
    folder = export(checkpoint, "timm", tmp_path / "source").folder
    seen = first_weights(monkeypatch, ClassificationFinetuning)
    assert main(finetune_words(digits, tmp_path / "run", folder)) == 0
    out = capsys.readouterr().out
    assert said in out and ("head of" in out) == bool(said)
    assert same_tensors({name: seen[f"encoder.{name}"] for name in checkpoint.encoder}, checkpoint.encoder)
    kept = bool(classes) and same_tensors({name: seen[f"head.{name}"] for name in checkpoint.head}, checkpoint.head)
    assert kept == (classes == tuple("0123456789"))


def test_the_encoder_trains_in_training_mode(gray_checkpoint, digits, tmp_path, monkeypatch):
    """Stochastic depth acts on an encoder that was read, as on a fresh one."""
    from simmim.finetune.classification.module import ClassificationFinetuning

    modes, step = set(), ClassificationFinetuning.training_step

    def spy(self, *batch):
        modes.update(module.training for module in self.model.modules())
        return step(self, *batch)

    monkeypatch.setattr(ClassificationFinetuning, "training_step", spy)
    folder = save_checkpoint(tmp_path / "source", gray_checkpoint)
    assert main(finetune_words(digits, tmp_path / "run", folder)) == 0
    assert modes == {True}


def test_finetuning_reports_a_moved_window(gray_checkpoint, digits, tmp_path, capsys):
    folder = export(gray_checkpoint, "official", tmp_path / "source", "simmim").folder
    assert main(finetune_words(digits, tmp_path / "run", folder, "--image-size", "64")) == 0
    assert "adapted    window 4 to 8, position bias scaled by the pre-trained windows 4, 4" in capsys.readouterr().out
    assert read(tmp_path / "run").config.pretrained_window_sizes == (4, 4)
