"""The kernels for a CPU: they compute what the encoder's own lines do, and stand aside where they cannot."""

import math
import os
import platform
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from memory import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode

from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config, kernels, model
from simmim.encoders.swinv2.kernels import block as calls
from simmim.encoders.swinv2.kernels import dispatch, eligibility, library

CASES = {
    "divided, heads of 32": (SwinV2Config(64, (2, 2), (2, 4), window_size=8), (64, 96)),
    "padded, heads of 12": (SwinV2Config(24, (2, 2), (2, 4), window_size=5), (37, 53)),
    "shifted before padding": (SwinV2Config(32, (2, 2), (2, 4), window_size=5, shift_before_padding=True), (37, 53)),
    "heads of 40, shifted along one axis": (SwinV2Config(40, (2,), (1,), window_size=6), (24, 80)),
    "one window of 3 tokens": (SwinV2Config(16, (1,), (2,), window_size=8), (4, 12)),
    "odd map": (SwinV2Config(32, (1, 1), (1, 2), window_size=4), (36, 52)),
    "extra norms": (SwinV2Config(16, (1, 1, 2), (1, 2, 4), window_size=4, extra_norm_every=1), (64, 64)),
    "drop path": (SwinV2Config(16, (2, 2), (2, 4), window_size=4, drop_path_rate=0.5), (32, 48)),
}


@torch.no_grad()
def randomized(config):
    """An encoder whose every parameter matters, with temperatures on either side of the clamp."""
    torch.manual_seed(0)
    encoder = build(config).train()
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.uniform_(1.0, 5.0)
        elif parameter.ndim == 1:
            parameter.normal_(float(name.endswith("weight")), 0.2)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return encoder


def soften(encoder):
    """Temperatures of 1/7: at the lowest ones the rounding of bfloat16 decides which token is attended to."""
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(2.0)


def results(encoder, images, half=False):
    """Features and all gradients of a loss of which every feature is a part."""
    encoder.zero_grad()
    images = images.clone().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        features = encoder(images).features
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).sin().view_as(features)
    (features.double() * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}
    return {"features": features.detach(), "images": images.grad, **gradients}


def distance(actual, expected):
    """Of two tensors, as a share of the second's length."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def images_of(config, size, count=2):
    return torch.randn(count, config.in_channels, *size, generator=torch.Generator().manual_seed(1))


def test_the_machine_has_them():
    """Everything below would otherwise compare the reference implementation with itself."""
    assert kernels.get_kernels() is not None, kernels.unavailable_reason()
    config, size = CASES["drop path"]
    assert taken(build(config), images_of(config, size)) == [True] * 5


@pytest.mark.parametrize("case", CASES)
def test_equal_to_float64(case, monkeypatch):
    """Output and every gradient are as near to the reference implementation in float64 as that is in float32."""
    config, size = CASES[case]
    encoder, images = randomized(config), images_of(config, size)
    factors = torch.tensor([2.0, 0.0])  # of a whole batch, in all precisions alike
    monkeypatch.setattr(model.DropPath, "factors", lambda self, x: factors.to(x.dtype))
    actual = results(encoder, images)
    with kernels.disabled():
        plain, expected = results(encoder, images), results(encoder.double(), images.double())
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        # Gradients of temperatures and position biases are sums that nearly cancel.
        allowed = 20 if "logit_scale" in name or "cpb" in name else 6
        assert distance(actual[name], value) < min(allowed * distance(plain[name], value) + 1e-6, 2e-3), name


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=x86-64-v3"])
def test_older_processors_compute_the_same(flag, tmp_path, monkeypatch):
    """Vectors of four and of eight numbers, on whatever runs this."""
    config, size = CASES["padded, heads of 12"]
    encoder, images = randomized(config), images_of(config, size)
    soften(encoder)
    expected = [results(encoder, images, half) for half in (False, True)]
    monkeypatch.setattr(library, "processor_flag", lambda: flag)
    file = tmp_path / "kernels.so"
    assert library.compile_kernels(library.find_compiler(), Path(library.__file__).parent, file)
    other = library.KernelLibrary(file)
    monkeypatch.setattr(calls, "get_kernels", lambda: other)
    for half, found in zip((False, True), expected):
        for name, value in results(encoder, images, half).items():
            assert distance(value, found[name]) < (0.1 if half else 1e-4), name


@pytest.mark.parametrize("case", ["divided, heads of 32", "padded, heads of 12", "drop path"])
def test_bfloat16_is_as_accurate_as_the_reference(case, monkeypatch):
    """Under autocast both round products; the main path here is float32, so that the error is no larger."""
    config, size = CASES[case]
    encoder, images = randomized(config), images_of(config, size)
    factors = torch.tensor([2.0, 0.0])
    monkeypatch.setattr(model.DropPath, "factors", lambda self, x: factors.to(x.dtype))
    soften(encoder)
    actual = results(encoder, images, half=True)
    with kernels.disabled():
        plain = results(encoder, images, half=True)
        expected = results(encoder.double(), images.double())
    ours, theirs = ({name: distance(found[name], expected[name]) for name in expected} for found in (actual, plain))
    assert ours["features"] < theirs["features"] < 0.05
    assert all(value.dtype == torch.float32 for name, value in actual.items() if name != "features")
    assert math.fsum(ours.values()) < 1.2 * math.fsum(theirs.values())
    assert max(ours[name] / theirs[name] for name in ours) < 4


@pytest.fixture(scope="module")
def delayed_kernels(tmp_path_factory):
    """Kernels with delays before the pieces, other ones for each thread."""
    file = tmp_path_factory.mktemp("kernels") / "delayed.so"
    delay = "(struct timespec[]){{0, ((piece) * 7919 + (long)pthread_self() / 4096) % 5 * 40000}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FLAGS", (*library.FLAGS, f"-DBEFORE_PIECE(piece)=nanosleep({delay}, NULL)"))
        assert library.compile_kernels(library.find_compiler(), Path(library.__file__).parent, file)
    return library.KernelLibrary(file)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["padded, heads of 12", "odd map", "drop path"])
def test_threads_do_not_change_a_bit(case, half, delayed_kernels, monkeypatch):
    """Whichever thread does a piece, and however late: with 1 to 3 threads, and with delays, so that each run shares the
    pieces in another way."""
    config, size = CASES[case]
    encoder, images = randomized(config), images_of(config, size, count=3)
    monkeypatch.setattr(model.DropPath, "factors", lambda self, x: torch.tensor([2.0, 0.0, 2.0]).to(x.dtype))
    one = results(encoder, images, half)
    # The rest are sums by torch, which may cut them into other parts with other threads.
    ours = [name for name in one if re.search(r"features|_bias|scale|cpb|norm[12]|layers.*[cj].bias|sample.norm", name)]
    for threads, is_delayed in ((2, False), (3, False), (2, True), (3, True)):
        if is_delayed:
            monkeypatch.setattr(calls, "get_kernels", lambda: delayed_kernels)
        try:
            torch.set_num_threads(threads)
            found = results(encoder, images, half)
        finally:
            torch.set_num_threads(1)
        for name in ours:
            assert torch.equal(found[name], one[name]), (name, threads)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads as Linux lists them")
def test_a_forked_process_shares_work_as_well():
    """It has none of its parent's threads, and starts its own."""
    run = kernels.get_kernels().call
    x, bias = torch.randn(4096, 64), torch.randn(64)

    def gelu(threads):
        out = torch.empty_like(x)
        run("gelu_forward", *map(calls.address, (x, bias, out)), *x.shape, 0, threads)
        return out

    expected = gelu(2)
    child = os.fork()
    if not child:
        is_equal = torch.equal(gelu(2), expected) and torch.equal(gelu(3), expected)
        os._exit(0 if is_equal and len(os.listdir("/proc/self/task")) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(gelu(3), expected)


def test_gelu_and_its_slope_to_the_last_digits():
    """Over all of the curve, both tails and a row that fills no vector; the exact form, not the one by tanh."""
    x = torch.linspace(-12, 12, 7 * 101).view(7, 101)
    bias, slope = torch.linspace(-1, 1, 101), torch.linspace(1, 2, 7 * 101).view(7, 101)
    exact = (x.double() + bias.double()).requires_grad_()
    value = F.gelu(exact)
    (value * slope.double()).sum().backward()
    active, again, grad, grad_bias = torch.empty_like(x), torch.empty_like(x), slope.clone(), torch.empty(101)
    run = kernels.get_kernels().call
    run("gelu_forward", *map(calls.address, (x, bias, active)), 7, 101, 0, 1)
    run("gelu_backward", *map(calls.address, (x, bias, grad, again, grad_bias)), 7, 101, 0, 1)
    assert (active == again).all()
    assert (active - value).abs().max() < 2e-6 and (grad - exact.grad).abs().max() < 2e-6
    assert (grad_bias - exact.grad.sum(0)).abs().max() < 1e-5


def test_gelu_and_its_slope_in_bfloat16():
    """By polynomials: no further from the exact curve than the nearest bfloat16 is, and a hundred-thousandth."""
    x = torch.linspace(-12, 12, 9 * 4001).view(9, 4001).bfloat16()
    exact = x.double().requires_grad_()
    value = F.gelu(exact)
    value.sum().backward()
    bias, active, again, grad = torch.zeros(4001), torch.empty_like(x), torch.empty_like(x), torch.ones_like(x)
    grad_bias, run = torch.empty(4001), kernels.get_kernels().call
    run("gelu_forward", *map(calls.address, (x, bias, active)), 9, 4001, 1, 1)
    run("gelu_backward", *map(calls.address, (x, bias, grad, again, grad_bias)), 9, 4001, 1, 1)
    assert (active == again).all()
    for found, curve in ((active, value), (grad, exact.grad)):
        assert ((found.double() - curve).abs() < curve.abs() * 2**-8 + 1e-5).all()


def test_attention_at_the_ends_of_its_logits():
    """Equal, opposite and zero queries at the lowest temperature: 100 + 16 at most, and no division by zero."""
    config = SwinV2Config(16, (2,), (1,), window_size=4)
    encoder = randomized(config)
    attention = encoder.layers[0].blocks[1].attn
    with torch.no_grad():
        attention.logit_scale.fill_(10.0)
        attention.q_bias.zero_()
        attention.qkv.weight[16:32] = attention.qkv.weight[:16]
    x = torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    x[0, 2] = 0
    x[0, 3] = -x[0, 4]
    block = encoder.layers[0].blocks[1]
    actual = block(x)
    assert torch.isfinite(actual).all()
    assert distance(actual, block.double()(x.double())) < 1e-5


@pytest.mark.parametrize("name", ["attn.q_bias", "attn.v_bias", "attn.logit_scale", "mlp.fc1.bias", "norm2.weight"])
def test_what_is_not_a_number_stays_so(name):
    """In the output and every gradient that the reference implementation makes NaN: the guard of a run looks there."""
    config, size = CASES["divided, heads of 32"]
    encoder, images = randomized(config), images_of(config, size)
    with torch.no_grad():
        encoder.layers[1].blocks[1].get_parameter(name).view(-1)[0] = math.nan
    actual = results(encoder, images)
    with kernels.disabled():
        expected = results(encoder, images)
    for key, value in expected.items():
        assert value.isnan().any() == actual[key].isnan().any(), key


def test_what_is_not_asked_for_is_not_computed():
    """A frozen encoder gives its images' gradient and none of its own; without gradients nothing is kept."""
    config, size = CASES["divided, heads of 32"]
    encoder, images = randomized(config), images_of(config, size)
    expected = results(encoder, images)["images"]
    encoder.requires_grad_(False)
    images.requires_grad_()
    features = encoder(images).features
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).sin().view_as(features)
    (features.double() * weights).sum().backward()
    assert distance(images.grad, expected) < 1e-6
    with torch.inference_mode():
        assert (encoder(images).features == features).all()


def test_checkpointed_blocks_give_the_same_bits():
    """Recomputed in the backward pass, drop path included."""
    config, size = CASES["drop path"]
    encoder, images = randomized(config), images_of(config, size)
    expected = results(encoder, images)
    encoder.checkpoint_activations = True
    for name, value in results(encoder, images).items():
        assert (value == expected[name]).all(), name


def test_a_step_keeps_less_than_two_thirds():
    """Bytes of live tensors at the most during a step, without weights: no windows, no attention weights, no GELU."""

    def most():
        encoder, images = build(SwinV2Config(32, (2, 2), (1, 2), window_size=12)), torch.randn(4, 3, 96, 96)
        with LiveBytes([*encoder.parameters(), images]) as live:
            encoder(images).features.sum().backward()
        return live.peak

    ours = most()
    with kernels.disabled():
        assert ours < 0.67 * most()


class Scaled(torch.nn.Linear):
    """A layer that somebody made their own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Twice(dispatch.KernelBlock):
    """A block likewise."""

    def windowed_attention(self, x, windows_at_once=None, groups=None):
        return 2 * super().windowed_attention(x, windows_at_once, groups)


def taken(encoder, images):
    """Of each block and merging in turn, whether the kernels did it."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("supports_block", "supports_merging"):
            supports = getattr(eligibility, name)
            patch.setattr(dispatch, name, lambda module, x, supports=supports: seen.append(supports(module, x)) or seen[-1])
        encoder(images)
    return seen


def refused(encoder, images):
    """Whether no block of the encoder, and no merging, is done by kernels."""
    return not any(taken(encoder, images))


def test_they_stand_aside():
    """For what they do not know: other precisions, listeners inside a block, torch.func and its batches, windows so large
    that their scratch would not fit."""
    config, size = CASES["drop path"]
    images = images_of(config, size)
    assert refused(build(config).double(), images.double())
    assert refused(build(config).bfloat16(), images.bfloat16())
    with torch.autocast("cpu", torch.float16):
        assert refused(build(config), images)
    encoder = build(config)
    for block in (block for stage in encoder.layers for block in stage.blocks):
        block.norm1.register_forward_hook(lambda *call: None)
    assert taken(encoder, images) == [False, False, True, False, False]
    encoder.layers[0].downsample.norm.register_forward_hook(lambda *call: None)
    assert refused(encoder, images)
    for changed in (Scaled(64, 16), torch.nn.Linear(64, 16).bfloat16()):
        encoder = build(SwinV2Config(16, (1,), (2,), window_size=4))
        encoder.layers[0].blocks[0].mlp.fc2 = changed
        if changed.weight.dtype == torch.float32:
            assert refused(encoder, images)
        else:
            assert not eligibility.supports_block(encoder.layers[0].blocks[0], torch.zeros(1, 8, 8, 16))
    encoder = build(SwinV2Config(16, (1,), (2,), window_size=4))
    assert not refused(encoder, images)
    encoder.layers[0].blocks[0].mlp.act = torch.nn.GELU("tanh")
    assert refused(encoder, images)
    encoder.layers[0].blocks[0] = Twice(16, 2, 4, False, None, 4.0, 0.0, False)
    assert refused(encoder, images)
    encoder = build(config).eval()
    per_image = torch.func.vmap(lambda image: encoder(image[None]).pooled[0])(images)
    assert distance(per_image, encoder(images).pooled) < 1e-5
    block = build(SwinV2Config(16, (1,), (1,), window_size=96)).layers[0].blocks[0]
    assert eligibility.supports_block(block, torch.zeros(1, 32, 32, 16)) and not eligibility.supports_block(
        block, torch.zeros(1, 96, 96, 16)
    )
    assert not eligibility.supports_block(block, torch.zeros(0, 32, 32, 16))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not eligibility.supports_block(block, torch.zeros(1, 32, 32, 16))
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *call: None)
    assert not eligibility.supports_block(block, torch.zeros(1, 32, 32, 16))
    hook.remove()
    assert eligibility.supports_block(block, torch.zeros(1, 32, 32, 16))


OTHER_PARTS = {
    "a layer without bias": ("mlp.fc1", lambda: torch.nn.Linear(16, 64, bias=False)),
    "a norm without weights": ("norm1", lambda: torch.nn.LayerNorm(16, elementwise_affine=False)),
    "another activation": ("mlp.act", torch.nn.ReLU),
    "no norm": ("norm2", torch.nn.Identity),
    "no drop path": ("drop_path", torch.nn.Identity),
    "another MLP": ("mlp", lambda: torch.nn.Sequential(torch.nn.Linear(16, 16))),
}


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_blocks_that_were_changed_run_their_own_lines(name):
    """What comes out is what the block's parts make of it, whatever they are."""
    encoder = randomized(SwinV2Config(16, (1,), (2,), window_size=4))
    place, make = OTHER_PARTS[name]
    encoder.layers[0].blocks[0].set_submodule(place, make())
    assert refused(encoder, torch.zeros(1, 3, 32, 32))
    block = encoder.layers[0].blocks[0]
    block.windowed_attention = lambda x, windows_at_once=None, groups=None: 0 * x
    assert torch.isfinite(block(torch.zeros(1, 8, 8, 16))).all()


@pytest.mark.parametrize("change", ["another layer", "a bias", "another norm"])
def test_mergings_that_were_changed_run_their_own_lines(change):
    config = SwinV2Config(16, (1, 1), (2, 4), window_size=4)
    encoder, images = randomized(config), images_of(config, (32, 32))
    merging = encoder.layers[0].downsample
    if change == "another layer":
        merging.reduction = Scaled(64, 32, bias=False)
    elif change == "a bias":
        merging.reduction = torch.nn.Linear(64, 32)
    else:
        merging.norm = torch.nn.Identity()
    assert taken(encoder, images) == [True, False, True]
    x = torch.randn(2, 8, 8, 16)
    neighbors = torch.cat([x[:, p::2, q::2] for q in (0, 1) for p in (0, 1)], dim=-1)
    assert distance(merging(x), merging.norm(merging.reduction(neighbors))) < 1e-6


def test_no_images_no_features():
    """An empty batch, as the reference implementation handles it."""
    assert build(SwinV2Config(16, (1,), (2,), window_size=4))(torch.zeros(0, 3, 32, 32)).pooled.shape == (0, 16)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_single_map_in_another_layout(half):
    """Channels first in memory, as of a convolution: the rows of one such map, unlike those of two, are a view of it."""
    block = randomized(SwinV2Config(16, (1,), (2,), window_size=4)).layers[0].blocks[0]
    rows = torch.randn(1, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for x in (rows, rows.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert eligibility.supports_block(block, x)
            out = block(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_nan_of_one_image_stays_there():
    """In gradients too, with heads that fill no vector: rows of scratch serve one image after another."""
    config, size = CASES["padded, heads of 12"]
    encoder, images = randomized(config), images_of(config, size, count=3)
    images[1, 0, 5, 5] = math.nan
    images.requires_grad_()
    encoder(images).pooled.square().sum(dim=1).sum().backward()
    assert images.grad[1].isnan().any() and torch.isfinite(images.grad[0]).all() and torch.isfinite(images.grad[2]).all()


def test_a_backward_pass_under_autocast_after_a_forward_pass_without(monkeypatch):
    """The products' type is the forward pass's, with oneDNN's products and with torch's."""
    config, size = CASES["divided, heads of 32"]
    encoder, images = randomized(config), images_of(config, size)
    expected = results(encoder, images)
    for onednn in (True, False):
        monkeypatch.setattr(calls, "ONEDNN", onednn)
        encoder.zero_grad()
        features = encoder(images).features
        weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).sin().view_as(features)
        loss = (features.double() * weights).sum()
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        for name, parameter in encoder.layers.named_parameters():
            assert distance(parameter.grad, expected[f"layers.{name}"]) < 5e-2, name
