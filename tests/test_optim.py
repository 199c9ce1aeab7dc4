"""Parameter rules, layer decay and schedules against the tables of the reference; one group per parameter."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_encoder import ToyConfig, ToyEncoder

from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.methods.simmim import SimMIM
from simmim.training.optim import (
    Schedule,
    adamw,
    parameter_groups,
    parameter_rules,
    scaled_lr,
    warmup_cosine,
    warmup_multistep,
)

GOLDEN = Path(__file__).parent / "golden"


def micro_encoder():
    return SwinV2(SwinV2Config(8, (2, 2, 2, 2), (1, 2, 4, 8)))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = micro_encoder()
        self.head = nn.Linear(self.encoder.dim, 5)


def test_layer_decay_table_is_the_reference_table():
    expected = json.loads((GOLDEN / "layer_decay_0.75_swinv2_micro.json").read_text())
    rules = parameter_rules(Classifier(), weight_decay=0.05, layer_decay=0.75)
    rules = {name.removeprefix("encoder."): rule for name, rule in rules.items()}
    assert rules.keys() == expected.keys()
    for name, rule in rules.items():
        assert rule.lr_scale == pytest.approx(expected[name]["lr_scale"], abs=1e-9), name
        assert rule.weight_decay == pytest.approx(expected[name]["weight_decay"], abs=1e-9), name


def test_schedules_are_the_reference_schedules():
    golden = json.loads((GOLDEN / "lr_schedules.json").read_text())
    for kind, table in golden.items():
        common = dict(
            lr=table["base_lr"],
            warmup_lr=table["warmup_lr"],
            warmup_steps=table["warmup_epochs"] * table["steps_per_epoch"],
        )
        total = table["epochs"] * table["steps_per_epoch"]
        for step, expected in enumerate(table["lr"]):
            if kind == "multistep":
                milestones = [epoch * table["steps_per_epoch"] for epoch in table["multisteps"]]
                got = warmup_multistep(step, **common, milestones=milestones, gamma=table["gamma"])
            else:
                got = warmup_cosine(step, **common, total_steps=total, min_lr=table["min_lr"])
            assert got == pytest.approx(expected, abs=1e-9), (kind, step)


@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_schedule_in_epochs_is_the_schedule_in_steps_scaled_by_the_batch(kind):
    table = json.loads((GOLDEN / "lr_schedules.json").read_text())[kind]
    decay = dict(milestones=(15,)) if kind == "multistep" else dict(min_lr=table["min_lr"])
    rates = table["base_lr"], table["epochs"], table["warmup_epochs"], table["warmup_lr"]
    schedule = Schedule(*rates, kind, **decay).by_step(table["steps_per_epoch"], global_batch=1024)
    assert [schedule(step) for step in range(len(table["lr"]))] == pytest.approx([2 * lr for lr in table["lr"]], abs=1e-9)


def test_a_cosine_ends_at_its_last_step():
    schedule = Schedule(1.0, 2, 0.5, 0.0, min_lr=0.25).by_step(10, global_batch=512)
    assert schedule(5) == 1.0 and schedule(12.5) == pytest.approx(0.625)
    assert schedule(20) == schedule(25) == 0.25 < schedule(19)
    assert Schedule(1.0, 2, 0.5, 0.0).by_step(10, global_batch=512)(20) == 0.0, "by default"


def test_runs_shorter_than_an_epoch_and_without_warmup():
    schedule = Schedule(1.0, 0.5, 0.0, 0.0).by_step(10, global_batch=512)
    assert schedule(0) == 1.0 and schedule(5) == 0.0
    assert Schedule(1.0, 0.5, 0.4, 0.0).by_step(10, global_batch=512)(5) == 0.0, "one step after the warm-up"
    assert Schedule(1.0, 0.5, 0.5, 0.0).by_step(10, global_batch=512)(4) == pytest.approx(0.8), "warm-up alone"


def test_every_parameter_sits_in_exactly_one_group():
    model = SimMIM(micro_encoder())
    for layer_decay in (1.0, 0.75):
        groups = parameter_groups(model, 1e-3, 0.05, layer_decay)
        placed = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(placed) == len(set(placed))
        assert set(placed) == {id(parameter) for parameter in model.parameters()}


def test_pretraining_decays_matrices_alone():
    rules = parameter_rules(SimMIM(micro_encoder()), weight_decay=0.05)
    for name, rule in rules.items():
        matrix = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight", "reduction.weight"))
        assert (rule.weight_decay == 0.05) == (matrix or name == "decoder.weight"), name


def test_frozen_parameters_are_in_no_group():
    model = Classifier()
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, 1e-3, 0.05)
    assert sum(len(group["params"]) for group in groups) == 2


def test_adamw_has_the_published_betas():
    optimizer = adamw(parameter_groups(SimMIM(micro_encoder()), 1e-3, 0.05))
    assert all(group["betas"] == (0.9, 0.999) for group in optimizer.param_groups)


def test_linear_scaling():
    assert scaled_lr(1e-4, 2048) == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decay="linear"), "'cosine' or 'multistep'"),
        (dict(warmup_epochs=30), "warm-up of 30 epochs in a run of 20"),
        (dict(lr=0.0), "positive"),
        (dict(epochs=0.0, warmup_epochs=0.0), "positive"),
    ],
)
def test_impossible_schedules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{**dict(lr=1e-3, epochs=20, warmup_epochs=2, warmup_lr=0.0), **settings})


class PatternEncoder(ToyEncoder):
    """A toy encoder with patterns of its own."""

    patterns = ()

    def no_decay(self):
        return self.patterns


@pytest.mark.parametrize("pattern", ["cpb_mlp", "mask_token"])
def test_a_pattern_that_matches_nothing_is_refused(pattern, monkeypatch):
    monkeypatch.setattr(PatternEncoder, "patterns", ("patches", pattern))
    with pytest.raises(AssertionError, match=pattern):
        parameter_rules(PatternEncoder(ToyConfig()), 0.05)


def test_patterns_of_the_model_are_checked_too():
    model = Classifier()
    model.no_decay = lambda: ("mask_token",)
    with pytest.raises(AssertionError, match="mask_token"):
        parameter_rules(model, 0.05)


def test_a_parameter_without_a_layer_is_refused():
    """Also where it is frozen, and without layer decay."""
    encoder = micro_encoder()
    encoder.adapter = nn.Linear(2, 2).requires_grad_(False)
    model = nn.Module()
    model.encoder = encoder
    for module in (encoder, model):
        with pytest.raises(KeyError, match=r"adapter\.weight is no parameter of this encoder"):
            parameter_rules(module, 0.05)


def test_an_encoder_without_patterns(monkeypatch):
    """Of a toy encoder all but vectors decay, and layers follow its blocks."""
    rules = parameter_rules(ToyEncoder(ToyConfig((4, 6))), 0.05, layer_decay=0.5)
    expected = {
        "patches.weight": (0.05, 0.125),
        "patches.bias": (0.0, 0.125),
        "stages.0.norm.weight": (0.0, 0.25),
        "stages.0.norm.bias": (0.0, 0.25),
        "stages.0.conv.weight": (0.05, 0.25),
        "stages.0.conv.bias": (0.0, 0.25),
        "stages.1.norm.weight": (0.0, 0.5),
        "stages.1.norm.bias": (0.0, 0.5),
        "stages.1.conv.weight": (0.05, 0.5),
        "stages.1.conv.bias": (0.0, 0.5),
        "downsamplings.0.conv.weight": (0.05, 0.25),
        "downsamplings.0.conv.bias": (0.0, 0.25),
        "norm.weight": (0.0, 1.0),
        "norm.bias": (0.0, 1.0),
    }
    assert {name: (rule.weight_decay, rule.lr_scale) for name, rule in rules.items()} == expected
    monkeypatch.setattr(PatternEncoder, "patterns", ("patches",))
    rules = parameter_rules(PatternEncoder(ToyConfig((4, 6))), 0.05)
    assert rules["patches.weight"].weight_decay == 0 and rules["stages.0.conv.weight"].weight_decay == 0.05


def test_layer_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"layer decay is 1\.5"):
        parameter_rules(torch.nn.Module(), 0.05, layer_decay=1.5)
