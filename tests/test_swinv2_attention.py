"""Windowed attention: windows and shifts by brute force, position bias, logit scale, and precision under autocast."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from brute_force_attention import assert_brute_force
from random_encoders import random_images, randomize, randomized_swinv2
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.encoders.registry import build
from simmim.encoders.shifted_windows.geometry import relative_position_index, shift_mask
from simmim.encoders.swinv2 import SwinV2Config, model
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.encoders.swinv2.kernels import dispatch
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, SwinV2Block, WindowAttention

CPU = torch.device("cpu")


# --- windows and shifts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, window_size, window, shift",
    [
        ((8, 12), 4, (4, 4), (2, 2)),
        ((12, 4), 4, (4, 4), (2, 0)),
        ((10, 7), 4, (4, 4), (2, 2)),  # padded to 12 × 8
        ((3, 9), 4, (3, 4), (0, 2)),
        ((7, 7), 3, (3, 3), (1, 1)),  # odd window, padded to 9 × 9
        ((3, 4), 4, (3, 4), (0, 0)),
        ((1, 6), 4, (1, 4), (0, 2)),
        ((5, 5), 1, (1, 1), (0, 0)),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_windowed_attention_by_brute_force(size, window_size, window, shift, shifted):
    block = randomize(SwinV2Block(8, 2, window_size, shifted, None, 4.0, 0.0, False))
    assert_brute_force(block, size, window, shift if shifted else (0, 0), window)


def test_pretrained_window_by_brute_force():
    block = randomize(SwinV2Block(8, 2, 4, True, 6, 4.0, 0.0, False))
    assert_brute_force(block, (8, 8), (4, 4), (2, 2), (6, 6))
    assert_brute_force(block, (3, 8), (3, 4), (0, 2), (6, 6))


def test_shifted_windows_isolate_regions():
    """One token changed: the tokens of its piece change in a shifted block, and every other token keeps its bits."""
    block = randomize(SwinV2Block(8, 2, 4, True, None, 4.0, 0.0, False))
    with torch.no_grad():
        block.attn.logit_scale.clamp_(max=math.log(10))
        x = random_images(1, 8, 8, 8)
        before = block(x)
        piece = (torch.arange(8) - 2) // 4
        labels = piece[:, None] * 10 + piece[None, :]
        for row, column in [(0, 0), (0, 4), (1, 7), (4, 4), (7, 7), (7, 0), (2, 1)]:
            changed = x.clone()
            changed[0, row, column] += 1.0
            moved = (block(changed) != before).any(dim=-1)[0]
            assert torch.equal(moved, labels == labels[row, column]), (row, column)


@pytest.mark.parametrize("size, window, shift", [((8, 8), (4, 4), (2, 2)), ((6, 9), (3, 3), (1, 1))])
def test_shift_mask_counts(size, window, shift):
    """Zero exactly between tokens of one piece: its squared size summed over pieces."""
    mask = shift_mask(size, window, shift, CPU)
    sides = [[s] + [w] * (side // w - 1) + [w - s] for side, w, s in zip(size, window, shift)]
    assert (mask == 0).sum() == sum((a * b) ** 2 for a, b in itertools.product(*sides))
    assert set(mask.unique().tolist()) == {-100.0, 0.0}
    assert torch.equal(mask, mask.transpose(1, 2))


@torch.no_grad()
def test_shift_mask_is_added_once():
    """Regions are 100 apart as in the reference. Visible at the clamp only: cosine -1 inside, 1 across, is a tie of 100."""
    attn = WindowAttention(2, 1)
    for parameter in attn.parameters():
        parameter.zero_()
    attn.logit_scale.fill_(MAX_LOGIT_SCALE - math.log(2))  # temperature 1 / 50: logits -50 inside, 50 - 100 across
    attn.qkv.weight.copy_(torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0], [0, 1], [0, 0]]))
    attn.proj.weight.copy_(torch.eye(2))
    # Queries are channel 0; keys and values are channel 1. Token 0 sees itself at -1 and token 1 at +1.
    x = torch.tensor([[[1.0, -1.0], [1.0, 1.0]]])
    mask = torch.tensor([[[0.0, -100.0], [-100.0, 0.0]]])
    out = attn(x, (1, 2), (1, 2), mask)
    assert out[0, 0, 0].item() == pytest.approx(0.0, abs=1e-4)  # half of -1 and half of 1
    assert out[0, 1, 0].item() == pytest.approx(1.0, abs=1e-4)


def test_small_maps_use_one_window():
    """A map within the window: a shifted block equals a plain one, and a larger window setting changes nothing."""
    x = random_images(2, 4, 4, 8)
    blocks = [
        randomize(SwinV2Block(8, 2, window, shifted, None, 4.0, 0.0, False))
        for window, shifted in [(4, False), (4, True), (16, True)]
    ]
    with torch.no_grad():
        outputs = [block(x) for block in blocks]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("size", [(64, 64), (37, 53), (8, 120), (24, 24)])
def test_configured_windows_are_those_used(size):
    config = SwinV2Config(8, (2, 2, 1), (1, 1, 1), window_size=6, patch_size=2)
    encoder, used = randomized_swinv2(config), {}
    for stage, layer in enumerate(encoder.layers):
        for block in layer.blocks:
            block.attn.register_forward_pre_hook(
                lambda module, args, stage=stage: used.setdefault(stage, set()).add(args[1])
            )
    encoder(random_images(1, 3, *size))
    assert used == {stage: {window} for stage, window in enumerate(config.windows(size))}


# --- position bias and temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, pretrained", [((8, 8), (8, 8)), ((24, 24), (12, 12)), ((3, 7), (3, 7)), ((5, 6), (8, 8)), ((1, 4), (1, 4))]
)
def test_log_spaced_coords(window, pretrained):
    """Equation 4 for each pair of tokens in float64, found through the index."""
    coords = log_spaced_coords(window, pretrained, CPU)
    assert coords.dtype == torch.float32 and coords.shape == ((2 * window[0] - 1) * (2 * window[1] - 1), 2)
    index = relative_position_index(window, CPU).reshape(math.prod(window), -1)
    tokens = list(itertools.product(range(window[0]), range(window[1])))
    for (i, a), (j, b) in itertools.product(enumerate(tokens), repeat=2):
        if (i * 7 + j) % max(len(tokens) // 16, 1):  # all rows and columns, not all of 24⁴ pairs
            continue
        for axis in (0, 1):
            scaled = 8 * (a[axis] - b[axis]) / max(pretrained[axis] - 1, 1)
            expected = math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)
            assert coords[index[i, j], axis].item() == pytest.approx(expected, abs=1e-6)
    if window == pretrained and min(window) > 1:
        assert coords.abs().amax(dim=0).tolist() == pytest.approx([math.log2(9) / 3] * 2)


def test_position_bias_range():
    """Within (0, 16), 8 where the MLP gives 0, and dependent on the offset alone."""
    attn = randomize(WindowAttention(32, 4))
    with torch.no_grad():
        bias = attn.position_bias((4, 5), (4, 5))
        assert bias.shape == (4, 20, 20) and bias.dtype == torch.float32
        assert 0 < bias.min() < 7 and 9 < bias.max() < 16
        assert torch.equal(bias[:, 0, 6], bias[:, 13, 19]) and not torch.equal(bias[:, 0, 6], bias[:, 6, 0])
        attn.cpb_mlp[2].weight.zero_()
        assert (attn.position_bias((4, 5), (4, 5)) == 8).all()


def test_logit_scale_is_clamped_at_log_100():
    attn = randomize(WindowAttention(16, 2))
    x, arguments = random_images(3, 16, 16), ((4, 4), (4, 4), None)
    outputs = []
    with torch.no_grad():
        for scale in (math.log(100), 5.0, 50.0, math.log(90)):
            attn.logit_scale.fill_(scale)
            outputs.append(attn(x, *arguments))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[3]).abs().max() > 1e-3


# --- precision -----------------------------------------------------------------------------------------------------


class RecordSoftmax(TorchDispatchMode):
    """Keeps what each softmax takes and gives."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.calls.append((args[0], out))
        return out


@torch.no_grad()
def test_attention_is_float32_under_autocast():
    """From the same bfloat16 queries and keys, the weights are those of float64 arithmetic within 1e-5, at scale 100."""
    attn = randomize(WindowAttention(64, 2))
    attn.logit_scale.fill_(MAX_LOGIT_SCALE)
    x = random_images(2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with RecordSoftmax() as record:
            out = attn(x, (8, 8), (8, 8), None)
        bias = torch.cat((attn.q_bias, torch.zeros(64), attn.v_bias))
        qkv = F.linear(x, attn.qkv.weight, bias)
    assert out.dtype == qkv.dtype == torch.bfloat16
    ((logits, weights),) = record.calls
    assert logits.dtype == weights.dtype == torch.float32
    q, k, _ = qkv.double().unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    expected = 100 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT + attn.position_bias((8, 8), (8, 8)).double()
    assert expected.max() - expected.min() > 60
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.double(), expected.softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale, tolerance", [(10, 0.06), (100, 0.3)])
@torch.no_grad()
def test_encoder_under_autocast_is_near_float32(scale, tolerance):
    """At 100 the eight bits of queries and keys alone move logits by some tenths, through four blocks."""
    encoder = randomized_swinv2(SwinV2Config(32, (2, 2), (2, 4), window_size=4))
    images = random_images(2, 3, 64, 64)
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn.logit_scale.fill_(math.log(scale))
    full = encoder(images).features
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images).features.float()
    assert 0 < (half - full).norm() / full.norm() < tolerance


@pytest.mark.parametrize("mode", ["kernels", "reference implementation"])
def test_position_bias_is_cached_while_weights_are_fixed(mode, request, monkeypatch):
    """Once per block and window size in passes without gradients; with gradients and afterwards it is computed again."""
    if mode == "reference implementation":
        request.getfixturevalue("reference_implementation")
    encoder = randomize(build(SwinV2Config(16, (2, 1), (1, 2), window_size=4))).eval()
    calls = []

    def count_calls(*arguments):
        calls.append(arguments)
        return log_spaced_coords(*arguments)

    for module in (model, dispatch):
        monkeypatch.setattr(module, "log_spaced_coords", count_calls)
    images, oblong_images = random_images(2, 3, 32, 32), random_images(2, 3, 32, 12)
    with torch.no_grad():
        expected = [encoder(batch).features for batch in (images, oblong_images)]
    with encoder.fixed_weights():
        calls.clear()
        for _ in range(3):
            with torch.no_grad():
                actual = [encoder(batch).features for batch in (images, oblong_images)]
            assert all(map(torch.equal, actual, expected))
        assert len(calls) == 2 * 3, "two window sizes in three blocks"
        encoder(images).features.sum().backward()
        assert len(calls) == 3 * 3
        assert encoder.layers[0].blocks[0].attn.cpb_mlp[2].weight.grad.abs().max() > 0
    with torch.no_grad():
        encoder.layers[0].blocks[0].attn.cpb_mlp[2].weight.mul_(-1.0)
        assert not torch.equal(encoder(images).features, expected[0])
