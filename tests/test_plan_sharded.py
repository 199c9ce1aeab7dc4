"""Memory of a sharded step, of a mesh whose other devices do not exist, as it is planned."""

import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_plan import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simmim.encoders.cost import Setup
from simmim.encoders.swin import SwinConfig
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.vit import ViTConfig
from simmim.methods.canvas import Canvas
from simmim.methods.simmim import SimMIM
from simmim.planning.step import step_memory
from simmim.training.sharding import shard


class ResidentBytes(TorchDispatchMode):
    """As LiveBytes, but also right where a tensor's storage is freed and allocated again, as FSDP does; slower."""

    def __init__(self, known):
        super().__init__()
        self.known, self.storages, self.peak = {tensor.untyped_storage()._cdata for tensor in known}, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((out, args)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.storages[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage())
        alive = [storage for reference in self.storages.values() if (storage := reference()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive))
        return out


@pytest.fixture
def four_devices():
    """A mesh of this process and three that do not exist. Communication does nothing, but allocates its memory here."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=4)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("reference_implementation")
@pytest.mark.parametrize("name", ["swinv2", "swin", "vit", "canvas"])
def test_memory_under_fsdp(four_devices, name):
    """Memory of a model that is mostly parameters, sharded as a run is, within 8 %."""
    size, kind, batch = (96, 96), *((Canvas, 3) if name == "canvas" else (SimMIM, 1))
    config = SwinV2Config(96, (1, 1, 3), (3, 6, 12), window_size=6)
    config = SwinConfig(96, (1, 1, 3), (3, 6, 12), window_size=6, image_size=size) if name == "swin" else config
    config = ViTConfig(192, 4, 3, patch_size=16, image_size=size) if name == "vit" else config
    settings = kind.settings_class().resolve(size, config)
    for precision, checkpointed in itertools.product(("32-true", "bf16-mixed"), (False, True)):
        model, images, masks = make(config, size, batch, checkpointed, None)
        if kind is Canvas:
            model = Canvas(model.encoder, settings).train()
            masks = model.draw(size, list(range(batch)), torch.device("cpu"))
        mesh = {"data_parallel": four_devices}
        shard(SimpleNamespace(device_mesh=mesh, trainer=SimpleNamespace(precision=precision)), model)

        def take_step(model=model, images=images, masks=masks, half=precision == "bf16-mixed"):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(images, masks).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        take_step()
        with ResidentBytes([*(parameter.to_local() for parameter in model.parameters()), images, masks]) as resident:
            take_step()
        setup = Setup(batch, 4, precision, "fsdp", checkpointed, device="cpu")
        predicted = step_memory(config, size, setup, kind, settings)
        above = predicted.peak - predicted.parameters - predicted.optimizer
        assert above == pytest.approx(resident.peak + images.nbytes, rel=0.08), (precision, checkpointed)
