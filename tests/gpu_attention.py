"""The kernels for a GPU, against the encoder's own lines in float64. test_gpu_attention.py runs this file in a process of
its own: on a GPU, or, where there is none, interpreted, which Triton decides when it is imported."""

import functools
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from simmim.encoders.layers import RowIndex
from simmim.encoders.registry import build
from simmim.encoders.shifted_windows.geometry import partition, roll, shift_mask, window_labels
from simmim.encoders.swinv2 import SwinV2Config, kernels
from simmim.encoders.swinv2.kernels import dispatch, self_test
from simmim.encoders.swinv2.kernels import gpu as calls
from simmim.encoders.swinv2.kernels.gpu import supports_window_attention, window_attention
from simmim.encoders.swinv2.kernels.windows import Windows, grouped_windows, window_indices
from simmim.encoders.swinv2.model import attend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
GIVEN = ("qkv", "q_bias", "v_bias", "scale", "bias")


class Case(NamedTuple):
    """A map of tokens and how it is attended to."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    heads: int = 1
    head_dim: int = 16
    images: int = 1
    shift_before_padding: bool = False
    groups: int = 0  # of tokens, that differ from image to image; 0 for none

    @property
    def padded(self):
        return tuple(-(-side // w) * w for side, w in zip(self.size, self.window))

    def windows(self) -> Windows:
        windows = window_indices(self.size, self.window, self.shift, self.padded, self.shift_before_padding, DEVICE)
        return grouped_windows(windows, self.tokens_by_group(), self.window, self.shift)

    def tokens_by_group(self) -> Tensor | None:
        """(B, H, W) uint8."""
        if not self.groups:
            return None
        drawn = torch.rand(self.images, *self.size, generator=torch.Generator().manual_seed(1)) * self.groups
        return drawn.to(DEVICE, torch.uint8)


CASES = {
    "one block": Case((4, 8), (4, 4), heads=2, images=2),
    "fewer tokens than a block": Case((2, 6), (2, 3), (0, 1), head_dim=8, images=2),
    "two blocks, padded, shifted": Case((7, 9), (5, 5), (2, 2), heads=2, head_dim=12),
    "shifted before padding": Case((7, 9), (5, 5), (2, 2), heads=1, head_dim=12, shift_before_padding=True),
    "one window of many blocks": Case((9, 9), (9, 9), heads=1, head_dim=40),
    "many blocks, padded, shifted": Case((9, 10), (9, 9), (0, 4), heads=1, head_dim=32),
    "groups": Case((8, 4), (4, 4), images=2, groups=3),
    "groups, two blocks, shifted": Case((5, 10), (5, 5), (0, 2), head_dim=12, images=2, groups=2),
}


class Numbers(NamedTuple):
    """What attention takes, and the gradient of what it gives."""

    qkv: Tensor
    q_bias: Tensor
    v_bias: Tensor
    scale: Tensor
    bias: Tensor
    grad: Tensor


def numbers_of(case, dtype=torch.float32) -> Numbers:
    """Temperatures of 1 to 1/11."""
    draw = torch.Generator().manual_seed(0)
    rows, dim = case.images * case.size[0] * case.size[1], case.heads * case.head_dim
    tokens = case.window[0] * case.window[1]
    made = Numbers(
        torch.randn(rows, 3 * dim, generator=draw).to(dtype),
        torch.randn(dim, generator=draw) * 0.3,
        torch.randn(dim, generator=draw) * 0.3,
        1 + 10 * torch.rand(case.heads, 1, 1, generator=draw),
        torch.randn(case.heads, tokens, tokens, generator=draw) * 2,
        torch.randn(rows, dim, generator=draw).to(dtype),
    )
    return Numbers(*(x.to(DEVICE) for x in made))


def by_kernels(case, numbers, attention=window_attention) -> dict[str, Tensor]:
    """What comes out, and all gradients."""
    given = [x.clone().requires_grad_() for x in numbers[:5]]
    windows = case.windows()
    mixed = attention(*given, windows.token_of, windows.region_of, case.images)
    return {"mixed": mixed.detach()} | dict(zip(GIVEN, torch.autograd.grad(mixed, given, numbers.grad)))


def by_reference(case, numbers, dtype=torch.float64) -> dict[str, Tensor]:
    """The same by the reference implementation in float64, or with what the encoder rounds under autocast in `dtype`."""
    given = [x.to(torch.float64 if dtype == torch.float64 else x.dtype).clone().requires_grad_() for x in numbers[:5]]
    qkv, q_bias, v_bias, scale, bias = given
    rows = qkv.view(case.images, *case.size, -1)
    windows = partition(rows, case.window, case.shift, case.padded, case.shift_before_padding)
    windows = (windows + torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))).to(dtype)
    windows = rearrange(windows, "b n (t h d) -> b n t h d", t=3, h=case.heads)
    mask = shift_mask(case.padded, case.window, case.shift, qkv.device) if any(case.shift) else None
    groups = case.tokens_by_group()
    mask = mask if groups is None else window_labels(groups, case.window, case.shift)
    # A table with one row for each pair.
    table, index = rearrange(bias, "h i j -> (i j) h"), RowIndex(torch.arange(bias[0].numel(), device=bias.device))
    windows = attend(windows, scale, table, index, mask).flatten(-2)
    count, (height, width) = case.padded[0] // case.window[0], case.size
    rows = rearrange(windows, "(b m n) (p q) c -> b (m p) (n q) c", b=case.images, m=count, p=case.window[0])
    before = case.shift_before_padding
    rows = roll(rows[:, :height, :width], case.shift) if before else roll(rows, case.shift)[:, :height, :width]
    mixed = rows.reshape(len(numbers.grad), -1)
    grads = torch.autograd.grad(mixed, given, numbers.grad.to(mixed.dtype))
    return {"mixed": mixed.detach()} | dict(zip(GIVEN, grads))


def assert_as_exact(case, numbers):
    """As the reference implementation is in the type that the numbers have."""
    actual, expected = by_kernels(case, numbers), by_reference(case, numbers)
    plain = by_reference(case, numbers, numbers.qkv.dtype)
    for what, value in expected.items():
        assert actual[what].dtype == plain[what].dtype, what
        # One number a head, the small sum of many large ones: which rounding is luckier differs.
        times = 4 if what == "scale" else 1.5
        assert distance(actual[what], value) < times * distance(plain[what], value) + 1e-6, what


def distance(actual, expected):
    """Of two tensors, as a share of the second's length."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(autouse=True)
def _few_heads_in_a_trial(monkeypatch):
    """Interpreted, each takes its time. By how many a trial judges is tested in test_gpu_attention.py."""
    if INTERPRETED:
        monkeypatch.setattr(self_test, "HEADS", 1)


@pytest.fixture(autouse=True)
def _products_as_on_a_gpu(monkeypatch):
    """Products as a GPU computes them. Triton's interpreter (3.7) multiplies bfloat16 as integers and truncates where
    GPUs round; numpy's order of summation depends on the processor and on which operand is transposed. What takes a third of
    the time to no effect is left out."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, numpy_type = builder.cast_impl, functools.cache(interpreter._get_np_dtype)
    # Without `debug` nothing looks at whether integers overflowed.
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)

    def values(x):
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def cast_impl(self, x, dst_type):
        if dst_type.scalar != tl.bfloat16 or x.dtype.scalar != tl.float32:
            return cast(self, x, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    def create_dot(self, a, b, addend, *precision):
        rows, columns, result = values(a), values(b), addend.data.astype(np.float32)
        for column, row in zip(rows.T, columns):
            result = result + column[:, None] * row[None, :]
        return interpreter.TensorHandle(result, addend.dtype.scalar)

    patch = interpreter._patch_lang

    def patch_lang(function):
        """Functions that a kernel calls patch the language again, to the same effect, which takes half of the time."""
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        is_patched = not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if is_patched else patch(function)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    # The table of types, made at each call anew.
    monkeypatch.setattr(
        interpreter, "_get_np_dtype", lambda kind: np.dtype(np.uint64) if kind.scalar.is_ptr() else numpy_type(kind.scalar)
    )
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name):
    case = CASES[name]
    numbers = numbers_of(case)
    actual, expected = by_kernels(case, numbers), by_reference(case, numbers)
    for what, value in expected.items():
        assert actual[what].shape == value.shape, what
        assert distance(actual[what], value) < 5e-6, what


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_the_reference(dtype, lowest):
    """Logits are not rounded, at the lowest temperature either, where they reach 100."""
    case = CASES["two blocks, padded, shifted"]
    numbers = numbers_of(case, dtype)
    if lowest:
        numbers.scale.fill_(100.0)
    assert_as_exact(case, numbers)


def test_small_gradients_survive_float16():
    """Those of single logits would be near the smallest float16, 6e-8."""
    case = CASES["one window of many blocks"]
    numbers = numbers_of(case, torch.float16)
    numbers.grad.mul_(1e-4)
    assert_as_exact(case, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_too_small_to_normalize(dtype):
    """Their own gradients are scaled by up to 1e12, as those of `normalize`, and no other token's are. One token is zero."""
    case = CASES["two blocks, padded, shifted"]
    numbers = numbers_of(case, dtype)
    numbers.q_bias.zero_()
    small = torch.zeros(len(numbers.qkv), dtype=torch.bool, device=DEVICE)
    small[[3, 20]] = True
    rows = numbers.qkv.view(len(small), 3, -1)
    rows[3, :2] = 0
    rows[20, :2] *= 1e-13  # in float16 this is 0 too
    actual, expected = by_kernels(case, numbers), by_reference(case, numbers)
    near = 5e-6 if dtype == torch.float32 else 2e-3
    for what in ("mixed", "v_bias", "scale", "bias"):
        assert distance(actual[what], expected[what]) < near, what
    actual, expected = (x["qkv"].view(len(small), 3, -1) for x in (actual, expected))
    assert distance(actual[~small], expected[~small]) < near
    assert distance(actual[small, 2], expected[small, 2]) < near
    if dtype == torch.float32:
        assert expected[small, :2].norm() > 1e10
        assert distance(actual[small, :2], expected[small, :2]) < near


def test_what_is_not_a_number_stays_in_its_window():
    case = CASES["one block"]
    numbers = numbers_of(case)
    numbers.qkv[0, case.heads * case.head_dim] = torch.nan  # of token 0 a key of head 0
    mixed = by_kernels(case, numbers)["mixed"].view(case.images, *case.size, case.heads, -1)
    spoilt = torch.zeros_like(mixed, dtype=torch.bool)
    spoilt[0, :4, :4, 0] = True
    assert torch.equal(mixed.isnan(), spoilt)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_however_the_work_is_shared(programs, monkeypatch):
    """Windows in one chunk, in unequal ones, and each alone; blocks of a window in one program, some, and each in one."""
    monkeypatch.setattr(calls.Call, "wanted_programs", lambda self, kernel: programs)
    for name in ("one block", "many blocks, padded, shifted"):
        case = CASES[name]._replace(heads=1)
        numbers = numbers_of(case)
        actual, expected = by_kernels(case, numbers), by_reference(case, numbers)
        for what, value in expected.items():
            assert distance(actual[what], value) < 5e-6, (name, what)


def test_the_same_every_time():
    case = CASES["two blocks, padded, shifted"]._replace(heads=1)
    first, second = (by_kernels(case, numbers_of(case, torch.bfloat16)) for _ in range(2))
    for what in first:
        assert torch.equal(first[what], second[what]), what


def test_only_the_gradients_that_are_asked_for():
    """Also: a scale of one dimension, and a position bias that is a view of its table."""
    case = CASES["fewer tokens than a block"]
    numbers, windows = numbers_of(case), case.windows()
    expected = by_reference(case, numbers)
    qkv, scale = numbers.qkv.clone().requires_grad_(), numbers.scale.flatten().requires_grad_()
    bias = numbers.bias.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    mixed = window_attention(qkv, numbers.q_bias, numbers.v_bias, scale, bias, *windows[:2], case.images)
    mixed.backward(numbers.grad)
    assert distance(qkv.grad, expected["qkv"]) < 5e-6
    assert scale.grad.shape == (case.heads,)
    assert distance(scale.grad, expected["scale"].flatten()) < 5e-6


def test_compiled():
    """One node of the graph: nothing of it is traced."""
    case = CASES["fewer tokens than a block"]
    numbers = numbers_of(case)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    eager = by_kernels(case, numbers)
    for what, value in by_kernels(case, numbers, compiled).items():
        assert torch.equal(value, eager[what]), what


@pytest.mark.parametrize("name", ["one block", "fewer tokens than a block"])
def test_the_operator_is_what_it_says(name):
    case = CASES[name]._replace(images=1, heads=1)
    windows = case.windows()
    given = [x.clone().requires_grad_() for x in numbers_of(case)[:5]]
    checks = torch.library.opcheck(calls._forward, (*given, windows.token_of, windows.region_of, case.images))
    assert checks and set(checks.values()) == {"SUCCESS"}


# --- In the encoder ------------------------------------------------------------------------------------------------------


ENCODERS = {
    "shifted": SwinV2Config(16, (2, 2), (1, 2), window_size=4),
    "padded": SwinV2Config(12, (2,), (1,), window_size=5),
    "shifted before padding": SwinV2Config(12, (2,), (1,), window_size=5, shift_before_padding=True),
}


def encoder_of(config):
    """One whose every parameter matters."""
    torch.manual_seed(0)
    encoder = build(config).to(DEVICE)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, 1.5 if "norm" in name or "scale" in name else 0.0, 0.2)
    return encoder


def encoded(encoder, images):
    """Features and all gradients, by name."""
    encoder.zero_grad()
    features = encoder(images).features
    (features * torch.linspace(-1, 1, features.numel(), device=DEVICE).sin().view_as(features)).sum().backward()
    return {"features": features.detach()} | {name: value.grad.clone() for name, value in encoder.named_parameters()}


@pytest.fixture
def seen(monkeypatch):
    """What `supports_attention` answered."""
    answers, supports = [], self_test.supports_attention
    monkeypatch.setattr(dispatch, "supports_attention", lambda *asked: answers.append(supports(*asked)) or answers[-1])
    return answers


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder(name, seen):
    encoder = encoder_of(ENCODERS[name])
    images = torch.randn(1, 3, 24, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = encoded(encoder, images)
    assert seen == [True] * sum(ENCODERS[name].depths)
    with kernels.disabled():
        expected = encoded(encoder.double(), images.double())
    for what, value in expected.items():
        assert distance(actual[what], value) < 1e-3 if "cpb" in what else 1e-4, what


def test_encoder_compiled():
    """The trial is made while the compiler traces, and leaves nothing in the graph."""
    encoder = encoder_of(SwinV2Config(16, (2,), (1,), window_size=4))
    images = torch.randn(1, 3, 16, 32).to(DEVICE)
    with kernels.disabled():
        expected = encoded(encoder, images)
    self_test.passes_self_test.cache_clear()
    torch._dynamo.reset()
    for block in encoder.layers[0].blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    actual = encoded(encoder, images)
    assert self_test.passes_self_test.cache_info().misses == 1
    for what, value in expected.items():
        assert distance(actual[what], value) < 1e-4, what


def test_encoder_listened_to(seen):
    """Who hooks into a block's attention is called."""
    encoder, called = encoder_of(ENCODERS["shifted"]), []
    encoder.layers[0].blocks[1].attn.register_forward_hook(lambda *call: called.append(call))
    encoder(torch.randn(1, 3, 32, 32).to(DEVICE))
    assert len(called) == 1
    assert seen == [True, False, True, True]


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 20), (torch.bfloat16, 16), (torch.float16, 16)])
def test_a_trial_passes(dtype, tokens, monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(self_test, "HEADS", 2)
    assert self_test.find_difference(DEVICE, dtype, tokens, 12, attend) == ""


def test_a_trial_that_fails_is_told_once(seen, monkeypatch):
    """Kernels that are wrong, or do not compile, are not used, and the reference implementation computes instead."""
    encoder, images = encoder_of(ENCODERS["padded"]), torch.randn(1, 3, 32, 32).to(DEVICE)
    state = torch.get_rng_state()

    def wrong(*given, images):
        return window_attention(*given[:4], given[4] * 1.2, *given[5:], images)

    def fails(*given, images):
        raise RuntimeError("no such instruction\nin a long tale")

    for attention, problem in (
        (wrong, "differs from that of the reference implementation by"),
        (fails, "no such instruction$"),
    ):
        seen.clear()
        self_test.passes_self_test.cache_clear()
        monkeypatch.setattr(self_test, "window_attention", attention)
        with pytest.warns(UserWarning, match=problem) as told:
            encoder(images)
        assert len(told) == 1
        assert seen == [False, False]
    self_test.passes_self_test.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_compares_groups(monkeypatch):
    """Kernels that read the labels of the first image for all are found out."""

    def same_for_all(*given, images):
        labels = given[-1]
        return window_attention(*given[:-1], labels if labels is None else labels[: len(given[-2])], images=images)

    monkeypatch.setattr(self_test, "window_attention", same_for_all)
    found = self_test.find_difference(DEVICE, torch.float32, 16, 12, attend)
    assert "differs from that of the reference implementation" in found


def test_other_groups_change_no_bit():
    """At the lowest temperature, in the output and in all gradients of the group's own tokens."""
    case = CASES["groups"]
    numbers, others = numbers_of(case), (case.tokens_by_group() != 1).flatten()
    numbers.scale.fill_(100.0)
    numbers.grad[others] = 0
    changed = numbers._replace(qkv=torch.where(others[:, None], 3 - numbers.qkv, numbers.qkv))
    first, second = (by_kernels(case, given) for given in (numbers, changed))
    assert torch.equal(first["mixed"][~others], second["mixed"][~others])
    assert all(torch.equal(first[what], second[what]) for what in GIVEN)
    assert not first["qkv"][others].any()


def test_encoder_with_groups(seen):
    config = ENCODERS["shifted"]
    encoder, images = encoder_of(config), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    units = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.uint8)
    groups = units.repeat_interleave(2, 1).repeat_interleave(2, 2)
    actual = encoder.encode(encoder.embed(images), groups=groups).features
    assert seen == [True] * sum(config.depths)
    with kernels.disabled():
        expected = encoder.double().encode(encoder.embed(images.double()), groups=groups).features
    assert distance(actual.detach(), expected.detach()) < 1e-4


def test_takes():
    assert supports_window_attention(DEVICE, torch.bfloat16, 144, 32)
    assert supports_window_attention(DEVICE, torch.float32, 64, 12)
    for refused in ((torch.float64, 64, 32), (torch.bfloat16, 577, 32), (torch.float32, 257, 32), (torch.bfloat16, 64, 129)):
        assert not supports_window_attention(DEVICE, *refused)
