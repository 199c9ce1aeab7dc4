"""Swin and ViT: how position biases move to other windows and grids, groups of tokens, layer decay, and short runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from random_encoders import random_images, randomize

from simmim.checkpoints import Preprocessing, read, save_encoder
from simmim.cli import main
from simmim.encoders.position_tables import geometric_positions, move_table, num_offsets, side_of_table
from simmim.encoders.registry import build
from simmim.encoders.swin import SwinConfig
from simmim.encoders.vit import ViTConfig
from simmim.training.optim import parameter_rules

SWIN = SwinConfig(16, (1, 2, 2), (1, 2, 4), window_size=4, image_size=(64, 64))
VIT = ViTConfig(16, 3, 2, patch_size=8, image_size=(48, 48))


def encoder_of(config):
    return randomize(build(config)).eval()


# --- position biases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [(6, 7), (12, 14), (14, 6), (3, 8), (7, 24)])
def test_a_moved_table_is_the_references(old, new):
    """A bicubic spline over a geometric sequence of offsets, which scipy's interp2d was for the SimMIM repository."""
    interpolate = pytest.importorskip("scipy.interpolate")
    table = torch.randn(num_offsets((old, old)), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions, targets = geometric_positions(old, new).numpy(), np.arange(1 - new, new)
    for head, moved in enumerate(move_table(table, (old, old), (new, new)).T):
        values = table[:, head].view(2 * old - 1, -1).numpy()
        expected = interpolate.RectBivariateSpline(positions, positions, values, s=0)(targets, targets)
        np.testing.assert_allclose(moved.view(2 * new - 1, -1).numpy(), expected, atol=1e-12)


def test_positions_are_a_geometric_sequence():
    """From 6 tokens to 7: five steps 1, q, q², … that end at the new outermost offset; never denser than 1.01."""
    positions = geometric_positions(6, 7)
    steps = positions[6:] - positions[5:-1]
    torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((4,), float(steps[1]), dtype=torch.float64))
    assert positions[-1] == pytest.approx(6, abs=1e-4) and steps[0] == 1 and torch.equal(positions, -positions.flip(0))
    assert geometric_positions(14, 6)[13 + 2] == pytest.approx(1 + 1.01, abs=1e-5)


def test_small_and_oblong_tables():
    """Of one and two tokens a side too; axes are moved apart; the same grid changes nothing."""
    table = torch.arange(15.0)[:, None]  # 2 × 3 tokens
    assert move_table(table, (2, 3), (2, 3)) is table
    rows = move_table(table, (2, 3), (2, 1)).view(3, 1)
    assert torch.equal(rows[:, 0], table.view(3, 5)[:, 2])
    assert move_table(torch.ones(1, 2), (1, 1), (4, 3)).shape == (7 * 5, 2)
    torch.testing.assert_close(move_table(torch.ones(9, 1), (2, 2), (5, 3)), torch.ones(45, 1))
    assert [side_of_table(rows) for rows in (1, 9, 169, 10, 16, 0, -2)] == [1, 2, 7, None, None, None, None]


@pytest.mark.parametrize("config", [SWIN, VIT, VIT.for_fine_tuning()], ids=["swin", "vit", "fine-tuned vit"])
def test_moved_weights_compute_what_the_encoder_computes_at_that_size(config):
    """Of a smaller map, and for ViT of a larger one; shared position biases become one for each block."""
    encoder = encoder_of(config)
    for size in ((24, 24), (64, 40)) if isinstance(config, ViTConfig) else ((24, 24), (40, 24)):
        target = replace(config, image_size=size)
        if isinstance(config, ViTConfig):
            target = replace(target, position_bias="blocks")
        state, notes = config.adapt_weights(encoder.state_dict(), target)
        moved = build(target).eval()
        moved.load_state_dict(state)
        with torch.no_grad():
            images = random_images(2, 3, *size)
            torch.testing.assert_close(moved(images).features, encoder(images).features, atol=1e-5, rtol=1e-4)
        assert any("interpolated" in note for note in notes)


def test_fine_tuning_of_vit_changes_its_architecture():
    tuned = VIT.for_fine_tuning()
    state, notes = VIT.adapt_weights(encoder_of(VIT).state_dict(), tuned)
    assert notes == ("the shared position bias to one for each block", "a fresh norm, after pooling")
    assert torch.equal(state["norm.weight"], torch.ones(16)) and not state["norm.bias"].any()
    assert tuned.for_fine_tuning() == tuned and SWIN.for_fine_tuning() == SWIN
    assert tuned.adapt_weights(state, tuned)[1] == ()


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SWIN, VIT], ids=["swin", "vit"])
def test_groups_do_not_influence_one_another(config):
    """Other pixels of one group change no feature of the other, and do change its own."""
    encoder, cell = encoder_of(config), config.strides[-1]
    images = random_images(1, 3, *config.image_size)
    rows = torch.arange(config.image_size[0] // config.patch_size) * config.patch_size // cell % 2
    groups = (rows[:, None] + torch.zeros(config.image_size[1] // config.patch_size)).to(torch.uint8)[None]
    pixels = groups.repeat_interleave(config.patch_size, 1).repeat_interleave(config.patch_size, 2).bool()[:, None]
    changed = torch.where(pixels, images + 1, images)
    with torch.no_grad():
        before, after = (encoder.encode(encoder.embed(which), groups=groups).features for which in (images, changed))
    own = groups[:, :: cell // config.patch_size, :: cell // config.patch_size].bool()[:, None].expand_as(before)
    assert torch.equal(before[~own], after[~own]) and (before[own] - after[own]).abs().max() > 0.1


def test_one_group_is_no_group():
    encoder, images = encoder_of(VIT), random_images(1, 3, 48, 48)
    tokens = encoder.embed(images)
    with torch.no_grad():
        grouped = encoder.encode(tokens, groups=torch.zeros(1, 6, 6, dtype=torch.uint8))
        torch.testing.assert_close(grouped.features, encoder.encode(tokens).features)


# --- optimization ----------------------------------------------------------------------------------------------------


def test_layer_decay_of_swin_is_the_references():
    """Merging after a stage's last block; tables never decay."""
    rules = parameter_rules(build(SWIN), 0.05, 0.5)
    scales = {
        "patch_embed.norm.weight": 6,
        "layers.0.blocks.0.attn.qkv.weight": 5,
        "layers.0.downsample.reduction.weight": 5,
        "layers.1.blocks.1.mlp.fc1.weight": 3,
        "layers.1.downsample.norm.weight": 3,
        "layers.2.blocks.1.norm1.bias": 1,
        "norm.weight": 0,
    }
    assert {name: rules[name].lr_scale for name in scales} == {name: 0.5**power for name, power in scales.items()}
    decays = {name for name, rule in rules.items() if rule.weight_decay}
    assert decays == {name for name, value in build(SWIN).named_parameters() if value.ndim > 1 and "table" not in name}


def test_layer_decay_of_vit_is_the_references():
    """The class token is of the first layer and the shared position bias of the last; position biases decay."""
    rules = parameter_rules(build(VIT), 0.05, 0.5)
    scales = {
        "patch_embed.class_token": 4,
        "patch_embed.proj.weight": 4,
        "layers.0.gamma_1": 3,
        "layers.2.attn.qkv.weight": 1,
        "position_bias.table": 0,
        "norm.bias": 0,
    }
    assert {name: rules[name].lr_scale for name in scales} == {name: 0.5**power for name, power in scales.items()}
    assert rules["position_bias.table"].weight_decay == 0.05 and not rules["patch_embed.class_token"].weight_decay
    rules = parameter_rules(build(VIT.for_fine_tuning()), 0.05, 0.5)
    assert rules["layers.1.attn.position_bias.table"].lr_scale == 0.25


# --- short runs ------------------------------------------------------------------------------------------------------

TINY = {
    "swin-nano": ["--model.encoder.embed_dim=16", "--model.encoder.depths=[1,1]", "--model.encoder.num_heads=[1,2]"],
    "vit-nano": ["--model.encoder.embed_dim=16", "--model.encoder.depth=2", "--model.encoder.num_heads=2"],
}


@pytest.mark.parametrize("preset", TINY)
def test_a_run_and_what_follows_it(preset, digits, tmp_path, capsys):
    """Pre-training, more of it at another size, fine-tuning at another size, prediction and features."""
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    shared = ["--workers", "0", "--batch-size", "8"]
    words = ["--data", str(digits.unlabeled), "--out", str(run), "--preset", preset, "--epochs", "0.1", *shared]
    assert main(["pretrain", *words, *TINY[preset]]) == 0
    assert read(run).config.image_size == (32, 32) and read(run).pretraining
    words = ["--data", str(digits.unlabeled), "--out", str(tmp_path / "more"), "--init", str(run), "--image-size", "48"]
    assert main(["pretrain", *words, "--epochs", "0.04", *shared]) == 0
    assert "position biases interpolated" in capsys.readouterr().out
    words = ["--data", str(digits.labeled), "--out", str(tuned), "--init", str(run), "--image-size", "40", "--steps", "1"]
    assert main(["finetune", "classification", *words, "--labels-per-class", "1", *shared]) == 0
    found = read(tuned).config
    assert found.image_size == (40, 40) and getattr(found, "norm_after_pooling", True)
    assert main(["predict", "--run", str(tuned), "--images", str(digits.labeled), "--out", str(tmp_path / "p.csv")]) == 0
    assert main(["embed", "--run", str(run), "--images", str(digits.labeled), "--out", str(tmp_path / "v.parquet")]) == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--preset", "vit-tiny", "--image-size", "100"], "100"),
        (["--preset", "swin-nano", "--model.encoder.window_size=0"], "window_size is 0: give a positive number"),
        (["--preset", "vit-nano", "--model.encoder.position_bias=both"], "position_bias is 'both': give shared or blocks"),
        (["--preset", "vit-nano", "--model.encoder.window_size=7"], "unknown encoder setting 'window_size'"),
        (["--preset", "vit-nano", "--model.sequential_attention=2"], "this encoder has no windows"),
    ],
)
def test_wrong_settings_end_in_one_line(words, message, digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(out), "--epochs", "0.1", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("simmim: ") and message in error and not out.exists()


@pytest.mark.parametrize("config", [SWIN, VIT], ids=["swin", "vit"])
def test_segmentation(config, scene_folder, tmp_path):
    """ViT has one map, of which the head makes do."""
    encoder = save_encoder(tmp_path / "encoder", encoder_of(config), Preprocessing((48, 48), (0.5,) * 3, (0.2,) * 3), {})
    run = tmp_path / "run"
    words = f"--init {encoder} --data {scene_folder} --out {run} --labels 2 --steps 1 --workers 0 --batch-size 2"
    assert main(["finetune", "segmentation", *words.split()]) == 0
    assert read(run).config.for_fine_tuning() == read(run).config


@pytest.mark.parametrize("preset", TINY)
def test_canvas(preset, digits, tmp_path):
    """Several images on a canvas, with a decoder of the encoder's own kind."""
    words = ["--data", str(digits.unlabeled), "--out", str(tmp_path / "run"), "--preset", preset, "--method", "canvas"]
    assert main(["pretrain", *words, "--epochs", "0.03", "--batch-size", "6", "--workers", "0", *TINY[preset]]) == 0
    assert read(tmp_path / "run").method == "canvas"
