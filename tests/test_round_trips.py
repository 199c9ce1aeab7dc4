"""Checkpoints through each format and back, bit by bit. Features in other libraries are compared in test_parity.py."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion import FORMATS, assert_round_trip, forms_of, random_checkpoint, same_tensors, source_of
from random_encoders import random_images

from simmim import load_encoder
from simmim.checkpoints import read
from simmim.checkpoints.export import export
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.registry import format_named
from simmim.checkpoints.own_files import save_checkpoint
from simmim.checkpoints.source import DESCRIPTION
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config


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
    resizing = {"micro": {"interpolation": "bicubic", "crop": 0.9}, "tiny": {"fit": "squash"}}.get(preset, {})
    before = random_checkpoint(SwinV2Config.from_preset(preset, **overrides), (size, size), **resizing)
    for form in forms_of(format):
        assert_round_trip(before, read(export(before, format, tmp_path / form, form).folder), format, form)


def in_memory(checkpoint, format, form):
    """Written and read without a disk."""
    return format_named(format).read(source_of(checkpoint, format, form), {})


@pytest.mark.parametrize("preset", ["small", "base"])
def test_round_trip_of_larger_encoders(preset, tmp_path):
    before = random_checkpoint(SwinV2Config.from_preset(preset), (256, 256))
    assert_round_trip(before, read(save_checkpoint(tmp_path, before)), "safetensors", "simmim")
    for format in ("official", "timm", "hf"):
        form = "classifier" if format == "timm" else "simmim"
        after = in_memory(before, format, form)
        # In the format hf preprocessing is in a file of its own.
        assert_round_trip(before, replace(after, preprocessing=before.preprocessing), format, form)


@pytest.mark.parametrize("preset", ["huge", "giant-1b", "giant-3b"])
def test_round_trip_of_the_largest_by_name_and_shape(preset):
    """Without values. Formats that have no place for the extra norms refuse them, and hold the encoder without them."""
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
    """Where a map is lower than the window, height and width have pre-trained windows of their own, and keep them."""
    before = random_checkpoint(SwinV2Config.from_preset("micro"), (64, 160), ())
    assert before.config.pretrained_window_sizes == (8, 8, (4, 8), (2, 5))
    exported = export(before, format, tmp_path / format, "encoder")
    after = read(exported.folder)
    assert_round_trip(before, after, format, "encoder")
    images = random_images(1, 3, 64, 160)
    with torch.no_grad():
        expected = build(before.config).eval()
        expected.load_state_dict(before.encoder)
        assert torch.equal(load_encoder(exported.folder)(images).features, expected(images).features)
    assert any("square images" in note for note in exported.notes) == (format == "official")


@pytest.mark.parametrize(
    "size, form, message",
    [
        ((64, 160), "encoder", "uses windows [8, 8, 4, 2] where this encoder at 64×160 px has"),
        ((256, 320), "encoder", "looks at the height alone and at 256×320 px does not shift both sides of stage 4's"),
        ((128, 160), "simmim", "masked image modeling takes square images, not 128×160 px"),
        ((120, 120), "encoder", "uses windows [8, 8, 7, 3] where"),
    ],
)
def test_sizes_at_which_transformers_would_compute_something_else(size, form, message, tmp_path):
    window = 4 if form == "simmim" else 8
    preset = "nano" if form == "simmim" else "micro"
    checkpoint = random_checkpoint(SwinV2Config.from_preset(preset, window_size=window), size)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        export(checkpoint, "hf", tmp_path / "hf", form)
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("format", ["official", "timm", "hf"])
def test_a_folder_is_described_in_its_formats_own_terms_too(format, tmp_path):
    """Without this toolkit's part of config.json: the same weights in the same architecture. The path of a file means its
    folder."""
    config = SwinV2Config.from_preset("micro", window_size=12, pretrained_window_sizes=(8, 8, 8, 4))
    before = random_checkpoint(replace(config, shift_before_padding=format == "timm"), (192, 192), interpolation="bicubic")
    folder = export(before, format, tmp_path / format, "classifier").folder
    assert read(next(folder.glob("model.*"))).config == read(folder / "config.json").config == before.config
    config_file = json.loads((folder / "config.json").read_text())
    del config_file[DESCRIPTION]
    (folder / "config.json").write_text(json.dumps(config_file))
    after = read(folder)
    assert after.config == before.config and same_tensors(after.encoder, before.encoder)
    assert after.preprocessing.image_size == (192, 192) and after.preprocessing.interpolation == "bicubic"
    if format != "official":
        assert after.preprocessing == before.preprocessing and after.classes == before.classes
    assert same_tensors(after.head, before.head)
