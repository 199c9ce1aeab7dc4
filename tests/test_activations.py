"""The activation monitor: what it measures, shows, and leaves alone."""

import copy
import functools
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from short_runs import equal, metrics, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim.encoders.layers import DropPath
from simmim.training.activation_plot import activation_plot
from simmim.training.activations import ActivationMonitor, amplitude


@pytest.fixture(scope="module")
def images(digits):
    return digits.unlabeled


class Keep(pl.Callback):
    """The model and batch as they are when the monitor measures."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.model, self.batch = copy.deepcopy(module.model).double(), copy.deepcopy(batch)
            self.generator = torch.get_rng_state()


def drop_as_float32(block, x):
    """`DropPath.forward` with float32's draws, which float64's are not."""
    return block.__class__.forward(block, torch.ones(len(x), 1, 1, 1)) * x


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_amplitudes_are_those_of_a_float64_computation(images, tmp_path, checkpoint_activations):
    monitor, keep = ActivationMonitor(tmp_path / "run", every_steps=5), Keep(step=5)
    module = train(images, tmp_path / "run", keep, monitor, steps=7, checkpoint_activations=checkpoint_activations)
    seen = {}
    for name, part in keep.model.encoder.named_stages().items():
        part.register_forward_hook(lambda part, inputs, output, name=name: seen.update({name: output.detach()}))
    for block in keep.model.modules():
        if isinstance(block, DropPath):
            block.forward = functools.partial(drop_as_float32, block)
    inputs, mask = module.inputs(keep.batch)
    torch.set_rng_state(keep.generator)
    with torch.no_grad():
        keep.model(inputs.double(), mask)
    assert list(seen) == list(monitor.latest["rms"]) == ["stage0.block0", "stage0.block1", "stage0.merging", "stage1.block0"]
    for name, output in seen.items():
        assert monitor.latest["rms"][name] == pytest.approx(output.square().mean().sqrt().item(), rel=1e-5)
        assert monitor.latest["max"][name] == pytest.approx(output.abs().max().item(), rel=1e-5)
    assert (monitor.first["step"], monitor.latest["step"]) == (0, 5)

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("per_block/rms/stage0.merging")
    assert [event.step for event in scalars] == [0, 5]
    assert scalars[1].value == pytest.approx(monitor.latest["rms"]["stage0.merging"])
    assert {f"per_block/max/{name}" for name in seen} <= set(events.Tags()["scalars"])
    assert not any(name.startswith("activations") for name in metrics(tmp_path / "run"))


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_watching_activations_changes_nothing(images, tmp_path, checkpoint_activations):
    class NoHooks(pl.Callback):
        """Hooks are there for a measured forward pass and at no other time."""

        def on_before_backward(self, trainer, module, loss):
            assert not any(part._forward_hooks for part in module.modules())

    how = {"steps": 6, "checkpoint_activations": checkpoint_activations, "accumulate": 2}
    plain = train(images, tmp_path / "plain", **how)
    watched = train(images, tmp_path / "watched", ActivationMonitor(tmp_path / "watched", 2), NoHooks(), **how)
    assert equal(plain.state_dict(), watched.state_dict())
    for name in ("loss", "grad_norm"):
        assert metrics(tmp_path / "plain")[name] == metrics(tmp_path / "watched")[name]


def test_a_resumed_run_still_shows_its_first_measure(images, tmp_path):
    train(images, tmp_path / "run", ActivationMonitor(tmp_path / "run", 2), steps=4)
    monitor = ActivationMonitor(tmp_path / "run", 2)
    train(images, tmp_path / "run", monitor, steps=8, resume=tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (monitor.first["step"], monitor.latest["step"]) == (0, 6)
    with Image.open(tmp_path / "run" / "activations.png") as picture:
        assert picture.size == (900, 480)


def test_amplitude_of_what_float32_cannot_square():
    x = torch.tensor([3e30, -4e30])
    assert [value.item() for value in amplitude(x)] == pytest.approx([math.sqrt(12.5) * 1e30, 4e30], rel=1e-6)
    assert [value.item() for value in amplitude(torch.zeros(3))] == [0.0, 0.0]
    assert all(math.isnan(value.item()) for value in amplitude(torch.tensor([1.0, math.nan])))
    assert amplitude(torch.ones(2, dtype=torch.bfloat16))[0].dtype == torch.float32


def test_the_plot_has_both_measures_and_survives_any_value():
    names = [*(f"stage0.block{index}" for index in range(3)), "stage0.merging", "stage1.block0"]

    def measure(step, values):
        return {"step": step, "rms": dict(zip(names, values)), "max": dict(zip(names, [10 * value for value in values]))}

    first, latest = measure(0, [1.0] * 5), measure(1000, [1.0, 10.0, 100.0, 1.0, 1000.0])
    colors = {color for _, color in activation_plot([first, latest]).getcolors(10**6)}
    assert {(150, 150, 150), (31, 90, 180)} <= colors
    for odd in ([math.nan] * 5, [math.inf, 1.0, 0.0, 1.0, 1e300], [0.0] * 5):
        activation_plot([first, measure(1, odd)])
        activation_plot([measure(1, odd), measure(1, odd)])
    with pytest.raises(ValueError, match="give 1 or more"):
        ActivationMonitor(Path("run"), 0)
