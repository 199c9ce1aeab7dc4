"""Sums in a fixed order: what replaces, on a GPU, backward passes of torch that add in another order every time."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.encoders import layers
from simmim.encoders.layers import RowIndex, gather_rows
from simmim.encoders.registry import build
from simmim.encoders.shifted_windows import geometry
from simmim.encoders.swin import SwinConfig
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.vit import ViTConfig
from simmim.encoders.vit import model as vit
from simmim.methods.canvas import Canvas, CanvasSettings
from simmim.methods.simmim import SimMIM

CPU = torch.device("cpu")
# Whose CUDA kernels add by atomic operations or may choose an algorithm that does (torch.use_deterministic_algorithms).
OTHER_ORDERS = {"index_add", "index_put", "scatter_add", "convolution_backward", "embedding_dense_backward", "index_reduce"}
ENCODERS = {
    "swinv2": SwinV2Config(16, (2, 2), (2, 2), window_size=4, drop_path_rate=0.1),
    "swin": SwinConfig(16, (2, 2), (2, 2), window_size=4, image_size=(32, 32)),
    "vit, a bias of all blocks": ViTConfig(16, 2, 2, image_size=(32, 32), patch_size=8),
    "vit, biases of each block, moved": ViTConfig(16, 2, 2, image_size=(16, 32), patch_size=8, position_bias="blocks"),
}


class BackwardCalls(TorchDispatchMode):
    """Names of operators, without the underscore of those that work in place."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().removeprefix("aten::").partition(".")[0].rstrip("_"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Encoders compute as on a device with atomic sums."""
    for module in (layers, geometry, vit):
        monkeypatch.setattr(module, "has_atomic_sums", lambda device: True)


@pytest.mark.parametrize("window", [(1, 1), (6, 6), (3, 7), (12, 12)])
def test_gradients_of_a_gather_are_those_of_float64(window):
    """Within float32's rounding; and each place of a row is added once."""
    index, places = geometry.relative_position_index(window, CPU), geometry.pairs_of_offsets(window, CPU)
    check_places(index, places)
    torch.manual_seed(0)
    table, grad = torch.randn(len(places), 3, requires_grad=True), torch.randn(len(index), 3)
    out = gather_rows(table, RowIndex(index, places))
    assert torch.equal(out, table[index])
    expected = torch.zeros(len(places), 3, dtype=torch.float64).index_add_(0, index, grad.double())
    (actual,) = torch.autograd.grad(out, table, grad)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("num_class_tokens", [1, 3, 40])
def test_places_of_a_vit(num_class_tokens):
    """Offsets, and the three rows of class tokens, of which there may be more than patches."""
    places = (3, 4), num_class_tokens, CPU
    check_places(vit.index_of_pairs(*places), vit.pairs_of_rows(*places))


def check_places(row_of, places_of):
    """Every row has the places that read it, each once."""
    for row, found in enumerate(places_of.tolist()):
        assert sorted(place for place in found if place < len(row_of)) == (row_of == row).nonzero().flatten().tolist()
    assert places_of.max() <= len(row_of)


def test_a_patch_projection_is_its_convolution():
    """In float64: the result and all gradients, of patches that are no squares of channels that are no colors."""
    torch.manual_seed(0)
    proj, images = nn.Conv2d(5, 7, 4, 4).double(), torch.randn(2, 5, 12, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for project in (layers.project_by_linear, layers.project_patches):
        out = project(proj, images)
        gradients = torch.autograd.grad(out.square().sum(), [images, proj.weight, proj.bias])
        results.append((out, *gradients))
    assert results[0][0].shape == (2, 3, 2, 7)
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def loss_and_gradients(model, images, mask):
    """Of a step of float64, whose rounding the comparison does not see, and the names of the backward pass's operators."""
    torch.manual_seed(0)
    loss = model(images, mask).loss
    with BackwardCalls() as calls:
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    return {"loss": loss.detach()} | {n: g for n, g in zip(names, gradients) if g is not None}, calls.names


@pytest.mark.parametrize("method", ["simmim", "canvas"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_step_adds_in_a_fixed_order(name, method, request, reference_implementation):
    """The same losses and gradients, and no operator that adds in another order every time; there were some."""
    config, size = ENCODERS[name], (32, 32)
    torch.manual_seed(0)
    encoder = build(config)
    if method == "canvas":
        settings = CanvasSettings(share=2).resolve(size, config)
        model, mask = Canvas(encoder, settings), settings.canvas(config).draw(size, [0, 1], CPU)
    else:
        model, mask = SimMIM(encoder), torch.rand(2, *(side // config.patch_size for side in size)) < 0.5
    model = model.double().train()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, calls = loss_and_gradients(model, images, mask)
    assert {"index_add", "convolution_backward"} <= calls
    request.getfixturevalue("as_on_a_gpu")
    actual, calls = loss_and_gradients(model, images, mask)
    assert not calls & OTHER_ORDERS
    assert actual.keys() == expected.keys() and len(actual) > 20
    for what, value in expected.items():
        torch.testing.assert_close(actual[what], value, rtol=1e-9, atol=1e-12, msg=what)


@pytest.mark.parametrize("name", ["swinv2", "vit, biases of each block, moved"])
def test_it_compiles(name, as_on_a_gpu, reference_implementation):
    torch.manual_seed(0)
    encoder, images = build(ENCODERS[name]).eval(), torch.randn(1, 3, 32, 32)
    wanted = list(encoder.blocks()[0].parameters())
    expected = torch.autograd.grad(encoder(images).features.square().sum(), wanted)
    torch._dynamo.reset()
    encoder.blocks()[0].compile(backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(encoder(images).features.square().sum(), wanted)
    torch._dynamo.reset()
    for value, other in zip(actual, expected):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
