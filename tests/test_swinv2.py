"""The encoder against transformers' Swinv2, against brute-force attention in float64, and against itself.

Where transformers (5.x, modeling_swinv2.py) departs from the paper, its reference code or ours:

- It fixes each stage's window when it is built, from `config.image_size` with the map's sides halved downwards, while
  merging pads and so halves upwards. At 120 px the third map is 8 × 8 and gets a window of 7, padded to 14
  (`test_transformers_window_follows_rounded_down_map`).
- Window and shift of both axes follow the map's height. A 4 × 16 map gets windows of 4 × 4 and a 16 × 4 one is padded
  to 16 × 8; an 8 × 16 map is not shifted at all. Ours choose per axis (`test_transformers_window_follows_height`).
- It adds the shift mask twice, so regions are 200 apart and not the reference's 100. Invisible until a trained
  temperature makes cosine logits differ by about as much (`test_shift_mask_is_added_once`).
- Logits and softmax run in the precision of the moment, so in bfloat16 under autocast; ours stay float32.
- It has no extra norm on the main path, so huge and the giants cannot be held in it.
- `hidden_states` of its model are taken after merging; before merging they come from its backbone. None are normed.

All comparisons here use sizes at which none of this matters, except the tests named.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from simmim.checkpoints.formats.swinv2.huggingface import TABLE
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import PRESETS, SwinV2, SwinV2Config, model
from simmim.encoders.swinv2.geometry import log_spaced_coords, relative_position_index, shift_mask
from simmim.encoders.swinv2.kernels import dispatch
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, DropPath, SwinV2Block, WindowAttention

CPU = torch.device("cpu")
SMALL = SwinV2Config(16, (2, 2), (2, 4), window_size=4)


@torch.no_grad()
def randomize(module, seed=0, max_logit_scale=3.5):
    """Every parameter random and of a size that matters. Temperatures of 100 would magnify float32's own error."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("logit_scale"):
            parameter.uniform_(1.0, max_logit_scale, generator=generator)
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.2, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return module


def random_images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_encoder(config, **kwargs):
    return randomize(SwinV2(config, **kwargs)).eval()


# --- parity with transformers --------------------------------------------------------------------------------------


def from_transformers(state, config):
    """transformers' state dict under our names: strict on both sides, query, key and value joined."""
    ours, left = TABLE.to_ours(state, config)
    assert not left
    return ours


def transformers_twin(config, image_size, max_logit_scale=3.5):
    """A random Swinv2Model built for `image_size` and our encoder with the same weights."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Swinv2Model(
        transformers.Swinv2Config(
            image_size=image_size,
            patch_size=config.patch_size,
            num_channels=config.in_channels,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window_size,
            pretrained_window_sizes=config.pretrained_window_sizes or (0,) * len(config.depths),
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=0.0,
        )
    )
    randomize(theirs, max_logit_scale=max_logit_scale).eval()
    with torch.device("meta"):
        ours = SwinV2(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config), assign=True)
    return theirs, ours.eval()


@torch.inference_mode()
def run_transformers(theirs, images):
    """(features, pooled, stage maps before merging) in our shapes."""
    tokens, size = theirs.embeddings(images)
    encoded = theirs.encoder(
        tokens, size, output_hidden_states=True, output_hidden_states_before_downsampling=True, return_dict=True
    )
    stages = encoded.reshaped_hidden_states[1:]
    features = theirs.layernorm(encoded.last_hidden_state).transpose(1, 2)
    return features.reshape(stages[-1].shape), theirs.pooler(features).flatten(1), stages


@torch.inference_mode()
def assert_same(theirs, ours, images, atol):
    features, pooled, stages = run_transformers(theirs, images)
    output = ours(images, return_stages=True)
    assert len(output.stages) == len(stages)
    for index, (expected, actual) in enumerate(zip(stages, output.stages)):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=f"stage {index}")
    torch.testing.assert_close(output.features, features, atol=atol, rtol=0)
    torch.testing.assert_close(output.pooled, pooled, atol=atol, rtol=0)
    assert output.features.std() > 0.3  # nothing above compared zeros


@pytest.mark.parametrize(
    "preset, overrides, size",
    [
        ("tiny", {"window_size": 8}, (256, 256)),
        ("tiny", {"window_size": 16}, (256, 256)),
        ("tiny", {"window_size": 8}, (224, 224)),  # maps of 28 and 14 are padded to 32 and 16
        ("tiny", {"window_size": 14, "pretrained_window_sizes": (12, 12, 12, 6)}, (224, 224)),
        ("tiny", {"window_size": 24, "pretrained_window_sizes": (12, 12, 12, 6)}, (384, 384)),
        ("tiny", {"window_size": 8, "in_channels": 1}, (288, 320)),  # padded in every stage, shifted in both axes
        ("base", {"window_size": 12}, (192, 192)),
        ("micro", {"window_size": 7, "patch_size": 2}, (110, 110)),  # odd window, odd maps
        ("micro", {"window_size": 8}, (254, 255)),  # the patch does not divide the image
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_equals_transformers(preset, overrides, size):
    config = SwinV2Config.from_preset(preset, **overrides)
    built_for = [-(-side // config.patch_size) * config.patch_size for side in size]
    if preset == "micro" and config.patch_size == 2:
        built_for = [112, 112]  # 55 halves to 28, 14, 7; transformers would count 27, 13, 6 (see the module docstring)
    theirs, ours = transformers_twin(config, built_for)
    assert_same(theirs, ours, random_images(1, config.in_channels, *size), atol=1e-4)


def test_equals_transformers_in_float64():
    config = SwinV2Config(32, (2, 2, 2), (2, 4, 8), window_size=6, pretrained_window_sizes=(8, 8, 4))
    theirs, ours = transformers_twin(config, (112, 144), max_logit_scale=6.0)  # many above the clamp at log 100
    theirs, ours = theirs.double(), ours.double()
    images = random_images(2, 3, 112, 144, dtype=torch.float64)
    assert_same(theirs, ours, images, atol=1e-10)
    with torch.inference_mode():  # the whole model, not the parts that run_transformers puts together
        assert torch.equal(theirs(images).pooler_output, run_transformers(theirs, images)[1])


def test_transformers_window_follows_rounded_down_map():
    """30, 15 and 8 tokens a side: built for 120 px transformers counts 30, 15, 7; built for 128 px it agrees with us."""
    config = SwinV2Config(16, (2, 2, 2), (2, 2, 2), window_size=8)
    images = random_images(1, 3, 120, 120)
    assert config.windows((120, 120)) == ((8, 8),) * 3
    theirs, ours = transformers_twin(config, 120)
    _, _, stages = run_transformers(theirs, images)
    with torch.inference_mode():
        mine = ours(images, return_stages=True).stages
    for stage in (0, 1):
        torch.testing.assert_close(mine[stage], stages[stage], atol=1e-4, rtol=0)
    assert (mine[2] - stages[2]).abs().max() > 0.1
    assert theirs.encoder.layers[2].blocks[0].window_size == 7
    assert_same(*transformers_twin(config, 128), images, atol=1e-4)


@pytest.mark.parametrize(
    "size, windows, their_window, their_shift", [((16, 4), (8, 4), 8, 4), ((4, 16), (4, 8), 4, 0), ((8, 16), (8, 8), 8, 0)]
)
def test_transformers_window_follows_height(size, windows, their_window, their_shift):
    """Where one axis fits a window transformers departs; ours chooses window and shift per axis and is checked here."""
    config = SwinV2Config(16, (2,), (2,), window_size=8)
    pixels = tuple(side * 4 for side in size)
    assert config.windows(pixels) == (windows,)
    theirs, ours = transformers_twin(config, pixels)
    block = theirs.encoder.layers[0].blocks[1]
    assert (block.window_size, block.shift_size) == (their_window, their_shift)
    images = random_images(1, 3, *pixels)
    with torch.inference_mode():
        assert (ours(images).features - run_transformers(theirs, images)[0]).abs().max() > 0.1
    shift = tuple(4 if side > 8 else 0 for side in size)
    assert_brute_force(ours.layers[0].blocks[1], size, windows, shift, windows)


# --- windows, shifts and bias by brute force ---------------------------------------------------------------------


def brute_force_attention(block, x, window, shift, pretrained):
    """One image's windowed attention (H, W, C) in float64, without cyclic shift, mask or index.

    Shifted windows cut the zero-padded map at shift, shift + window, …; the pieces at the edges are smaller. Tokens
    attend to those of their own piece.
    """
    attn, size = block.attn, x.shape[:2]
    padded = [math.ceil(side / w) * w for side, w in zip(size, window)]
    x = F.pad(x, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    dim, heads = x.shape[-1], attn.num_heads
    weights = {name: value.double() for name, value in attn.state_dict().items()}
    pieces = {}
    for row, column in itertools.product(*map(range, padded)):
        piece = ((row - shift[0]) // window[0], (column - shift[1]) // window[1])
        pieces.setdefault(piece, []).append((row, column))
    out = torch.zeros_like(x)
    for tokens in pieces.values():
        places = torch.tensor(tokens)
        inside = x[places[:, 0], places[:, 1]]
        q, k, v = (inside @ weights["qkv.weight"].T).split(dim, dim=-1)
        q, v = q + weights["q_bias"], v + weights["v_bias"]
        offset = (places[:, None] - places[None, :]).double() * 8 / torch.tensor([max(p - 1, 1) for p in pretrained])
        coords = offset.sign() * torch.log2(1 + offset.abs()) / 3
        hidden = (coords @ weights["cpb_mlp.0.weight"].T + weights["cpb_mlp.0.bias"]).relu()
        bias = 16 / (1 + torch.exp(-(hidden @ weights["cpb_mlp.2.weight"].T)))
        mixed = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            a, b = q[:, part], k[:, part]
            norms = a.norm(dim=-1)[:, None].clamp(min=1e-12) * b.norm(dim=-1)[None, :].clamp(min=1e-12)
            scale = min(math.exp(weights["logit_scale"][head].item()), 100.0)
            logits = scale * (a @ b.T) / norms + bias[..., head]
            share = torch.exp(logits - logits.amax(dim=1, keepdim=True))
            mixed.append(share / share.sum(dim=1, keepdim=True) @ v[:, part])
        out[places[:, 0], places[:, 1]] = torch.cat(mixed, -1) @ weights["proj.weight"].T + weights["proj.bias"]
    return out[: size[0], : size[1]]


@torch.no_grad()
def assert_brute_force(block, size, window, shift, pretrained):
    """Float64 within 1e-6: the coordinates are float32 by design, all else is float64."""
    block = block.double()
    # At 10 the mask's -100 leaks e⁻⁶⁴; the brute force has no leak.
    block.attn.logit_scale.clamp_(max=math.log(10))
    x = random_images(2, *size, block.norm1.weight.numel(), dtype=torch.float64)
    actual = block.windowed_attention(x)
    for image, result in zip(x, actual):
        expected = brute_force_attention(block, image, window, shift, pretrained)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


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
    encoder, used = random_encoder(config), {}
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
    encoder = random_encoder(SwinV2Config(32, (2, 2), (2, 4), window_size=4))
    images = random_images(2, 3, 64, 64)
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn.logit_scale.fill_(math.log(scale))
    full = encoder(images).features
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images).features.float()
    assert 0 < (half - full).norm() / full.norm() < tolerance


# --- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, millions",
    [
        ("tiny", 27.58),
        ("small", 48.96),
        ("base", 86.89),
        ("large", 195.20),
        ("huge", 655.21),
        ("giant-1b", 1060.98),
        ("giant-3b", 2997.82),
    ],
)
def test_parameter_count(preset, millions):
    with torch.device("meta"):
        encoder = SwinV2(SwinV2Config.from_preset(preset, extra_norm_every=0))
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("preset", PRESETS)
def test_extra_norms(preset):
    """After every 6th block of the third stage of huge and the giants; nowhere else."""
    with torch.device("meta"):
        encoder = SwinV2(PRESETS[preset])
    found = [name for name, _ in encoder.named_parameters() if "norm3" in name and name.endswith("weight")]
    count = {"huge": 3, "giant-1b": 3, "giant-3b": 7}.get(preset, 0)
    assert found == [f"layers.2.blocks.{6 * i + 5}.norm3.weight" for i in range(count)]


def test_extra_norm_acts_on_the_main_path():
    encoder = random_encoder(SwinV2Config(8, (2, 2, 2, 2), (1, 1, 1, 1), window_size=4, extra_norm_every=2))
    assert [name for name in encoder.state_dict() if "norm3.weight" in name] == ["layers.2.blocks.1.norm3.weight"]
    norm = encoder.layers[2].blocks[1].norm3
    with torch.no_grad():
        norm.weight.fill_(1.0), norm.bias.zero_()
        last = encoder(random_images(1, 3, 64, 64), return_stages=True).stages[2]
    torch.testing.assert_close(last.mean(dim=1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.var(dim=1, unbiased=False), torch.ones(1, 4, 4), atol=1e-3, rtol=0)


def test_presets_survive_plain_values():
    for config in PRESETS.values():
        assert SwinV2Config(**config.as_dict()) == config


# --- shapes and state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("patch_size, channels, size", [(2, 1, (40, 24)), (4, 3, (37, 53)), (8, 10, (64, 96))])
def test_shapes(stages, patch_size, channels, size):
    config = SwinV2Config(
        8, (2,) * stages, tuple(2**i for i in range(stages)), window_size=4, patch_size=patch_size, in_channels=channels
    )
    encoder = random_encoder(config)
    assert config.strides == tuple(patch_size * 2**i for i in range(stages)) and encoder.stride == config.strides[-1]
    assert config.dims == tuple(8 * 2**i for i in range(stages)) and encoder.dim == config.dims[-1]
    with torch.no_grad():
        output = encoder(random_images(2, channels, *size), return_stages=True)
    for stage, dim, stride in zip(output.stages, config.dims, config.strides, strict=True):
        assert stage.shape == (2, dim, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert output.features.shape == output.stages[-1].shape
    torch.testing.assert_close(output.pooled, output.features.mean(dim=(2, 3)), atol=1e-6, rtol=0)
    with torch.no_grad():
        normed = encoder.norm(output.stages[-1].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(output.features, normed, atol=1e-6, rtol=0)


def test_stages_only_on_request():
    assert random_encoder(SMALL)(random_images(1, 3, 32, 32)).stages is None


def test_one_model_many_sizes():
    """Sizes leave no trace: bit-identical results on return, and a state dict of parameters alone."""
    encoder = random_encoder(SMALL)
    names = list(encoder.state_dict())
    assert names == [name for name, _ in encoder.named_parameters()] and not list(encoder.buffers())
    images = {size: random_images(1, 3, *size) for size in [(48, 48), (37, 53), (16, 64)]}
    with torch.no_grad():
        first = encoder(images[48, 48]).features
        for other in images.values():
            encoder(other)
        assert torch.equal(encoder(images[48, 48]).features, first)
    assert list(encoder.state_dict()) == names


def test_batch_members_are_independent():
    encoder, images = random_encoder(SMALL), random_images(3, 3, 40, 56)
    with torch.no_grad():
        together = encoder(images).features
        for i in range(3):
            torch.testing.assert_close(encoder(images[i : i + 1]).features[0], together[i], atol=1e-5, rtol=0)


def test_training_after_inference_mode():
    """Masks and coordinates first made in inference mode serve a backward pass later."""
    for cached in (log_spaced_coords, relative_position_index, shift_mask):
        cached.cache_clear()
    encoder, images = random_encoder(SMALL), random_images(1, 3, 48, 48)
    with torch.inference_mode():
        encoder(images)
    encoder.train()(images).features.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_checkpointed_equals_plain():
    """Outputs and gradients, with drop path drawing the same images in the recomputation."""
    config = SwinV2Config(16, (2, 2), (2, 4), window_size=4, drop_path_rate=0.5)
    images, results = random_images(4, 3, 48, 40), []
    for checkpointed in (False, True):
        encoder = random_encoder(config, checkpoint_activations=checkpointed).train()
        torch.manual_seed(3)
        output = encoder(images, return_stages=True)
        (output.features.square().mean() + output.stages[0].sin().mean()).backward()
        results.append((output.features, {name: p.grad for name, p in encoder.named_parameters()}))
    (plain, gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(plain, recomputed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient, atol=1e-7, rtol=1e-6, msg=name)


@pytest.mark.parametrize("size", [(64, 96), (40, 72), (32, 80)])
def test_transposed_images_and_weights(size):
    """Rows and columns play the same part: 64 × 96 shifts in both axes, 40 × 72 pads too, 32 × 80 fits one axis."""
    config = SwinV2Config(16, (2, 2), (2, 4), window_size=5 if size == (40, 72) else 8, in_channels=2)
    encoder, turned = random_encoder(config).double(), SwinV2(config).double().eval()
    weights = {}
    for name, value in encoder.state_dict().items():
        if name == "patch_embed.proj.weight":
            value = value.transpose(2, 3)
        elif name.endswith("cpb_mlp.0.weight"):
            value = value.flip(1)
        elif name.endswith("reduction.weight"):
            value = value.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
        weights[name] = value
    turned.load_state_dict(weights)
    images = random_images(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        output, mirrored = encoder(images, return_stages=True), turned(images.mT, return_stages=True)
        plain = encoder(images.mT).features.mT
    for a, b in zip((output.features, *output.stages), (mirrored.features, *mirrored.stages)):
        torch.testing.assert_close(b.mT, a, atol=1e-10, rtol=0)
    torch.testing.assert_close(mirrored.pooled, output.pooled, atol=1e-10, rtol=0)
    assert (plain - output.features).abs().max() > 0.1


def test_merging_column_order():
    """Published weights read the neighbors as (0, 0), (1, 0), (0, 1), (1, 1), row and column."""
    merging = SwinV2(SMALL).layers[0].downsample
    seen = []
    merging.reduction.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    merging(torch.arange(4.0).reshape(1, 2, 2, 1).expand(1, 2, 2, 16))
    assert seen[0][0, 0, 0, ::16].tolist() == [0.0, 2.0, 1.0, 3.0]


# --- drop path and initialization ----------------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly():
    encoder = SwinV2(SwinV2Config(8, (2, 2, 6, 2), (1, 1, 1, 1), drop_path_rate=0.22))
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    single = SwinV2(SwinV2Config(8, (1,), (1,), drop_path_rate=0.2))
    assert single.layers[0].blocks[0].drop_path.rate == 0.0


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    drop = DropPath(0.3).train()
    out = drop(torch.ones(20000, 2, 3, 1)).flatten(1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1.0, abs=0.025)  # 5 standard errors
    x = random_images(4, 5)
    assert drop.eval()(x) is x and DropPath(0.0).train()(x) is x


def test_fresh_blocks_are_the_identity():
    encoder = SwinV2(SwinV2Config(32, (2, 2), (2, 4), window_size=4))
    for stage, dim in zip(encoder.layers, (32, 64)):
        for block in stage.blocks:
            assert not block.norm1.weight.any() and not block.norm2.weight.any()
            x = random_images(2, 6, 9, dim)
            assert torch.equal(block(x), x)


def test_initial_values():
    encoder = SwinV2(SwinV2Config(64, (2, 2), (2, 4)))
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, WindowAttention):
            assert torch.allclose(module.logit_scale, torch.tensor(10.0).log())
            assert not module.q_bias.any() and not module.v_bias.any() and module.qkv.bias is None
    assert (encoder.norm.weight == 1).all() and (encoder.patch_embed.norm.weight == 1).all()
    assert (encoder.layers[0].downsample.norm.weight == 1).all()


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, overrides, message",
    [
        ("tyni", {}, "unknown preset 'tyni'; did you mean 'tiny'"),
        ("Base", {}, "did you mean 'base'"),
        ("giant", {}, "did you mean 'giant-"),
        ("zzz", {}, "known: base, giant-1b"),
        ("tiny", {"windw_size": 8}, "unknown encoder setting 'windw_size'; did you mean 'window_size'"),
        ("tiny", {"drop_path": 0.1}, "did you mean 'drop_path_rate'"),
    ],
)
def test_unknown_names_suggest_the_nearest(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        SwinV2Config.from_preset(preset, **overrides)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depths": ()}, "1 to 5 stages"),
        ({"depths": (1,) * 6, "num_heads": (1,) * 6}, "1 to 5 stages"),
        ({"depths": (2, 0), "num_heads": (1, 1)}, "at least one block"),
        ({"num_heads": (3, 6, 12)}, "one number of heads per stage"),
        ({"num_heads": (5, 6, 12, 24)}, "5 heads do not divide a stage's 96 channels"),
        ({"num_heads": (0, 6, 12, 24)}, "0 heads"),
        ({"pretrained_window_sizes": (8, 8)}, "4 in all"),
        ({"pretrained_window_sizes": (8, 8, 8, 0)}, "one positive size per stage"),
        ({"window_size": 0}, "window_size is 0: give a positive number"),
        ({"patch_size": -4}, "patch_size is -4"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"drop_path_rate": 1.0}, "probability in"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"extra_norm_every": -1}, "extra_norm_every is -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SwinV2Config(**settings)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
def test_images_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"this encoder takes \(batch, 3, height, width\)"):
        SwinV2(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("mode", ["kernels", "plain code"])
def test_position_bias_is_cached_while_weights_are_fixed(mode, request, monkeypatch):
    """Once per block and window size in passes without gradients; with gradients and afterwards it is computed again."""
    if mode == "plain code":
        request.getfixturevalue("plain_lines")
    encoder = build(SwinV2Config(16, (2, 1), (1, 2), window_size=4)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    calls = []

    def count_calls(*arguments):
        calls.append(arguments)
        return log_spaced_coords(*arguments)

    for module in (model, dispatch):
        monkeypatch.setattr(module, "log_spaced_coords", count_calls)
    images, oblong_images = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 12)
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
