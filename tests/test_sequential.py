"""Sequential attention and activation checkpoints: the same results, and what they leave in memory, in bytes of tensors."""

from functools import lru_cache

import pytest
import torch
from memory import LiveBytes

from simmim.encoders.shifted_windows import geometry, model
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.methods.simmim import SimMIM

pytestmark = pytest.mark.usefixtures("reference_implementation")
SWITCHES = {"plain": {}, "sequential": {"sequential_attention": 3}, "checkpointed": {"checkpoint_activations": True}}
SWITCHES["both"] = SWITCHES["sequential"] | SWITCHES["checkpointed"]


@torch.no_grad()
def randomize(module, seed=0):
    """Every parameter random and of a size that matters, and temperatures on either side of the clamp."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("logit_scale"):
            parameter.uniform_(1.0, 5.0, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(float(name.endswith("weight")), 0.2, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return module


def random_images(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def run(config, images, half=False, **switches):
    """Features of all stages and all gradients, of the images too, with drop path drawn alike."""
    encoder = randomize(SwinV2(config, **switches)).to(images.dtype).train()
    images = images.clone().requires_grad_()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = encoder(images, return_stages=True)
    loss = output.features.double().square().mean() + output.stages[0].double().sin().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return {"features": output.features.detach(), "images": images.grad, **gradients}


@lru_cache
def run_plainly(config, size, dtype, half=False, in_float64=False):
    """`run` without switches, on three images drawn in `dtype`; once for all tests that compare with it."""
    images = random_images(3, 3, *size, dtype=dtype)
    return run(config, images.double() if in_float64 else images, half)


def assert_equal_within(actual, expected, share, exact=None):
    """Of each tensor's largest number; ten times that for temperatures, whose gradients are sums that nearly cancel.

    Args:
        exact: the results in float64. A tensor that is as far from them as `expected`, within 1 %, also counts as equal: the
            last bits of a sum depend on its order, which some processors' matrix products choose by the number of rows.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        allowed = share * (10 if name.endswith("logit_scale") else 1) * value.abs().max()
        if (actual[name] - value).abs().max() > allowed:
            assert exact is not None, name
            errors = [(results[name].double() - exact[name]).abs().max() for results in (actual, expected)]
            assert errors[0] <= 1.01 * errors[1], name


# 48 × 48 tokens in 16 windows of 144, as 768 px and windows of 24 at a quarter of the size. Bytes of all logits.
LARGE = SwinV2Config(24, (2, 2), (3, 6), window_size=12), (192, 192)
LOGITS = 16 * 3 * 144**2 * 4
CASES = [
    # Map of 16 × 24 tokens, 6 windows an image, shifted in both axes; then 8 × 12, which no window divides.
    (SwinV2Config(16, (2, 2), (2, 4), window_size=8, drop_path_rate=0.5), (64, 96)),
    (SwinV2Config(16, (2, 2), (2, 4), window_size=5, drop_path_rate=0.5), (37, 53)),  # padded in both stages
    (SwinV2Config(16, (2, 2), (2, 4), window_size=5, shift_before_padding=True), (37, 53)),
    (SwinV2Config(16, (2, 2), (2, 4), window_size=8, pretrained_window_sizes=(4, 4)), (32, 80)),  # one axis shifted
]
IDS = ["divided", "padded", "shifted before", "one axis"]


# float32 itself is 1e-4 from float64 in these gradients.
PRECISIONS = {
    "float64": (torch.float64, False, 1e-12),
    "float32": (torch.float32, False, 1e-6),
    "bfloat16": (torch.float32, True, 1e-6),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("switches", ["sequential", "both"])
@pytest.mark.parametrize("config, size", CASES, ids=IDS)
def test_sequential_equals_plain(config, size, switches, precision):
    """Outputs and every gradient."""
    dtype, half, share = PRECISIONS[precision]
    images = random_images(3, 3, *size, dtype=dtype)
    exact = run_plainly(config, size, torch.float32, in_float64=True) if dtype == torch.float32 else None
    actual = run(config, images, half, **SWITCHES[switches])
    assert_equal_within(actual, run_plainly(config, size, dtype, half), share, exact)


@pytest.mark.parametrize("precision, share", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("config, size", CASES, ids=IDS)
def test_one_head_at_a_time_equals_plain(config, size, precision, share, monkeypatch):
    """Within what other kernels round differently: in bfloat16 a few last bits of eight, through two blocks."""
    dtype, half, _ = PRECISIONS[precision]
    images = random_images(3, 3, *size, dtype=dtype)
    plain = run_plainly(config, size, dtype, half)
    monkeypatch.setattr(model, "PIECE_LOGITS", 1)
    assert_equal_within(run(config, images, half, **SWITCHES["both"]), plain, share)


@pytest.mark.parametrize("at_once", [1, 2, 6, 17, 10**6])
def test_any_number_of_windows_at_once(at_once):
    config, size = CASES[0]
    images = random_images(3, 3, *size, dtype=torch.float64)
    assert_equal_within(run(config, images, sequential_attention=at_once), run_plainly(config, size, torch.float64), 1e-12)


def test_switched_at_run_time_and_in_evaluation():
    """Without gradients the pieces are as small; with them, evaluation has pieces too."""
    config, size = LARGE
    encoder, images = randomize(SwinV2(config)).eval(), random_images(1, 3, *size)
    with torch.no_grad():
        plain = encoder(images).features
        encoder.sequential_attention = 1
        with LiveBytes() as live:
            assert torch.allclose(encoder(images).features, plain, atol=1e-5, rtol=0)
    assert live.largest < LOGITS / 3
    with LiveBytes() as live:
        encoder(images).features.square().mean().backward()
    assert live.largest < LOGITS / 3
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("switches, calls", [("plain", 1), ("sequential", 1), ("checkpointed", 2), ("both", 2)])
def test_position_bias_is_computed_once_a_block(switches, calls):
    """Once in the forward pass, and once more where the block is recomputed; not once a piece."""
    config, size = CASES[0]
    encoder, seen = randomize(SwinV2(config, **SWITCHES[switches])).train(), []
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn.cpb_mlp.register_forward_hook(lambda module, args, out: seen.append(module))
    encoder(random_images(2, 3, *size)).features.square().mean().backward()
    assert len(seen) == calls * sum(config.depths)


@pytest.mark.parametrize("count", [0, -1])
def test_sequential_attention_out_of_range(count):
    with pytest.raises(ValueError, match=rf"sequential_attention is {count}: give 1 window at a time or more"):
        SwinV2(CASES[0][0], sequential_attention=count)


# --- memory --------------------------------------------------------------------------------------------------------


def step(config, size, batch=1, **switches):
    """Bytes of a SimMIM step, parameters and images not counted: what the forward pass leaves, peak, largest tensor, all."""
    for cached in (
        log_spaced_coords,
        geometry.relative_position_index,
        geometry.shift_mask,
        geometry.shift_regions,
    ):
        cached.cache_clear()
    simmim, images = SimMIM(SwinV2(config, **switches)).train(), random_images(batch, 3, *size)
    mask = torch.ones(batch, size[0] // config.patch_size, size[1] // config.patch_size, dtype=torch.bool)
    with LiveBytes([*simmim.parameters(), images, mask]) as live:
        loss = simmim(images, mask).loss
        kept = live.live
        loss.backward()
    return kept, live.peak, live.largest, live.total


def test_peak_of_a_step():
    """Both switches: at most 40 % of plain; each alone less than plain, and less is kept for the backward pass."""
    at_once = {
        name: switches | ({"sequential_attention": 1} if "sequential_attention" in switches else {})
        for name, switches in SWITCHES.items()
    }
    kept, peak, *_ = zip(*(step(*LARGE, **at_once[name]) for name in ("plain", "checkpointed", "sequential", "both")))
    assert peak[3] <= 0.4 * peak[0]
    assert peak[3] < 0.7 * min(peak[1], peak[2]) and max(peak[1], peak[2]) < 0.7 * peak[0]
    assert kept[2] < 0.6 * kept[0] and kept[3] <= kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize("switches", ["sequential", "both"])
def test_no_tensor_holds_all_windows(switches):
    """Neither all logits, nor a head of them, nor all masks, nor a gradient of any."""
    assert step(*LARGE)[2] == LOGITS
    assert step(*LARGE, **SWITCHES[switches] | {"sequential_attention": 1})[2] < LOGITS / 3


def test_one_large_window_is_taken_by_heads(monkeypatch):
    """A window over the whole map of 24 × 24: no tensor of all heads' logits, nor of all biases."""
    config, size, head = SwinV2Config(32, (2,), (8,), window_size=24), (96, 96), 576**2 * 4
    assert step(config, size)[2] == 8 * head
    whole = step(config, size, sequential_attention=1)
    assert whole[2] == 8 * head  # these few are within PIECE_LOGITS
    monkeypatch.setattr(model, "PIECE_LOGITS", 2 * 576**2)
    kept, peak, largest, _ = step(config, size, sequential_attention=1)
    assert largest < 4 * head
    assert peak < 0.6 * whole[1] and kept == whole[0]


def test_number_of_pieces_costs_no_memory():
    """What is kept stays; and what is made in all, as gradients of 16 slices, each as large as the whole, would not."""
    kept, _, _, made = zip(*(step(*LARGE, sequential_attention=at_once) for at_once in (1, 4, 16)))
    assert max(kept) - min(kept) < 0.01 * min(kept)
    assert made[0] < 1.2 * made[2]
