"""What an optimizer step makes the host wait for: values that are read from the device, and copies to it. On a CPU nothing
waits, and the calls that would are counted."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from short_runs import train
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.data import normalize
from simmim.data.views import channel_constants
from simmim.methods.masking import BlockMasking, SharedCanvas
from simmim.training.module import TrainingModule
from simmim.training.optim import adamw

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::lift_fresh")


class Waits(TorchDispatchMode):
    """Counts reads of values, and tensors that are made of numbers of the host."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().partition(".")[0] in READS:
            self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


class CountWaits(pl.Callback):
    """Waits of the steps that are not logged, from a batch's start to its end."""

    def __init__(self, monkeypatch):
        self.waits, to_list = {}, torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda value: self.read() or to_list(value))
        self.mode = None

    def read(self):
        if self.mode is not None:
            self.mode.calls.append("tolist")

    def on_train_batch_start(self, trainer, *_):
        self.mode = Waits().__enter__()

    def on_train_batch_end(self, trainer, *_):
        self.mode.__exit__(None, None, None)
        self.waits[trainer.global_step], self.mode = self.mode.calls, None


@pytest.fixture(scope="module")
def images(digits):
    return digits.unlabeled


@pytest.mark.usefixtures("reference_implementation")
def test_a_step_reads_once(images, tmp_path, monkeypatch):
    """Loss and norm together, for the guard, and copies no number of the host, where it computes as on a GPU."""
    counter = CountWaits(monkeypatch)
    train(images, tmp_path / "run", counter, steps=5, log_every=5, save_every=100)
    assert len(counter.waits) == 5
    for step in (2, 3, 4):
        assert counter.waits[step] == ["tolist"], step


def test_constants_stay_on_the_device():
    """Made once; in inference mode too, after which they still take part in training."""
    channel_constants.cache_clear()
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.inference_mode():
        normalize(images, (0.1, 0.2, 0.3), [0.5, 0.25, 0.125])
    weight = torch.ones(3, 1, 1, requires_grad=True)
    result = normalize(images, [0.1, 0.2, 0.3], (0.5, 0.25, 0.125))
    (result * weight * channel_constants((0.1, 0.2, 0.3), images.device)).sum().backward()
    assert channel_constants.cache_info().misses == 2
    exact = (images.double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor([0.5, 0.25, 0.125]).view(
        -1, 1, 1
    )
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def test_masks_are_drawn_on_the_host(monkeypatch):
    """Whatever the device of the images: the same masks, and one copy."""
    from simmim.encoders.registry import build
    from simmim.encoders.swinv2 import SwinV2Config
    from simmim.methods.canvas import Canvas, CanvasSettings
    from simmim.methods.simmim import SimMIM

    config, copies = SwinV2Config(16, (1, 1), (1, 2), window_size=4), []
    for module in ("simmim", "canvas"):
        monkeypatch.setattr(f"simmim.methods.{module}.to_device", lambda x, device: copies.append((x, device)) or x)
    drawn = SimMIM(build(config), masking=BlockMasking(8, 0.5)).draw((32, 32), [1, 2], torch.device("cuda"))
    settings = CanvasSettings(share=2).resolve((32, 32), config)
    shared = Canvas(build(config), settings).draw((32, 32), [1, 2], torch.device("cuda"))
    assert [device.type for _, device in copies] == ["cuda"] * 2
    assert torch.equal(drawn, BlockMasking(8, 0.5).draw(2, (32, 32), torch.Generator(), [1, 2]))
    assert torch.equal(shared, SharedCanvas(2, settings.mask_unit, 4, 8).draw((32, 32), [1, 2], torch.device("cpu")))


@pytest.mark.parametrize("large", [1.0, 1e-3])
def test_clipping_by_the_norm_without_the_scale(large, monkeypatch):
    """float16's scale is still in the gradients when they are clipped, where the optimizer is fused: the step is that of a
    run without a scale, and so is the norm that is logged."""
    weights, norms = [], []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        module = TrainingModule(model, lambda step: 1.0, 0.0, clip=0.1)
        optimizer = adamw([{"params": list(model.parameters()), "lr": 0.1}])
        optimizer.param_groups[0]["eps"] = 1.0  # so that the size of a gradient matters
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16) if scaled else None
        plugin = SimpleNamespace(scaler=scaler)
        module._trainer = SimpleNamespace(precision_plugin=plugin, global_step=0, log_every_n_steps=2, should_stop=False)
        monkeypatch.setattr(module, "log", lambda name, value: norms.append(float(value)))
        loss = large * model(torch.ones(2, 4)).square().sum()
        (scaler.scale(loss) if scaled else loss).backward()
        module.configure_gradient_clipping(optimizer)
        scaler.step(optimizer) if scaled else optimizer.step()
        weights.append(model.weight.detach().clone())
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and (norms[0] > 0.1) == (large == 1.0)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
