"""Groups of tokens on one map: each is encoded as if its tokens alone had gone through the windows of that map."""

import itertools

import pytest
import torch
from test_kernels import distance, randomized
from toy_encoder import ToyConfig, ToyEncoder

from simmim.encoders.shifted_windows.geometry import additive_mask, shift_regions, window_labels
from simmim.encoders.swinv2 import SwinV2, SwinV2Config, kernels
from simmim.encoders.swinv2.kernels import dispatch
from simmim.training.compiling import compile_blocks

# Windows of 4, 6 and 12 tokens, two blocks a stage, of which the second is shifted along both axes, one or none; one of
# them with windows of pre-training and extra norms.
CASES = {
    "window 4": (SwinV2Config(16, (2, 2), (1, 2), window_size=4), (64, 96)),
    "window 6": (SwinV2Config(12, (2, 2, 1), (1, 2, 2), window_size=6), (48, 96)),
    "window 12": (
        SwinV2Config(16, (2, 2, 1), (2, 2, 4), 12, pretrained_window_sizes=(8, 8, 6), extra_norm_every=1),
        (48, 96),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def prepared(config):
    """An encoder whose every parameter matters and gets a gradient: no temperature is clamped, or so low that float32 is far
    from float64."""
    encoder = randomized(config)
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.clamp_(max=2.0)
    return encoder


def images_of(config, size, count=4):
    return torch.randn(count, config.in_channels, *size, generator=torch.Generator().manual_seed(1))


def random_groups(config, size, share, seed=0):
    """(2, H, W) uint8 at patch resolution: units of the last stride, dealt at random to `share` groups."""
    rows, columns = (side // config.strides[-1] for side in size)
    generator = torch.Generator().manual_seed(seed)
    units = torch.rand(2, rows * columns, generator=generator).argsort(1).remainder(share).view(2, rows, columns)
    side = config.strides[-1] // config.patch_size
    return units.to(torch.uint8).repeat_interleave(side, 1).repeat_interleave(side, 2)


# --- the reference: an image's visible tokens alone, window by window ---------------------------------------------------


def ragged_attention(block, x, places, size):
    """Attention of the tokens x, (n, C), at `places` of a map, within the block's windows of that map, however many tokens
    of each window there are."""
    attn, window, shift = block.attn, *block.geometry(size)[:2]
    shifted = [tuple((at - offset) % side for at, offset, side in zip(place, shift, size)) for place in places]
    of_window = {}
    for number, place in enumerate(shifted):
        of_window.setdefault(tuple(at // w for at, w in zip(place, window)), []).append(number)
    q, k, v = (x @ weight.T for weight in attn.qkv.weight.chunk(3))
    q, v = q + attn.q_bias, v + attn.v_bias
    out = torch.zeros_like(x)
    bias, scale = attn.position_bias(window, block.pretrained(window)), attn.inverse_temperature()
    for numbers in of_window.values():
        row = torch.tensor([shifted[n][0] % window[0] * window[1] + shifted[n][1] % window[1] for n in numbers])
        crossed = [tuple(at >= side - offset for at, side, offset in zip(shifted[n], size, shift)) for n in numbers]
        cut = torch.tensor([[-100.0 * (ours != theirs) for theirs in crossed] for ours in crossed]).to(x)
        split = [value[numbers].view(len(numbers), attn.num_heads, -1).transpose(0, 1) for value in (q, k, v)]
        unit_q, unit_k = (value / value.norm(dim=-1, keepdim=True) for value in split[:2])
        logits = unit_q @ unit_k.transpose(1, 2) * scale + bias[:, row][:, :, row] + cut
        out = out.index_copy(0, torch.tensor(numbers), (logits.softmax(-1) @ split[2]).transpose(0, 1).flatten(1))
    return attn.proj(out)


def ragged_encoding(encoder, image, visible):
    """Features of one image from the tokens where `visible`, (H, W) bool, is True: {place on the last map: (C,)}."""
    size = tuple(visible.shape)
    places = [tuple(place) for place in visible.nonzero().tolist()]
    x = encoder.patch_embed(image[None])[0][visible]
    for stage in encoder.layers:
        for block in stage.blocks:
            x = x + block.norm1(ragged_attention(block, x, places, size))
            x = block.norm3(x + block.norm2(block.mlp(x)))
        if stage.downsample is not None:
            at = {place: number for number, place in enumerate(places)}
            places = sorted({(row // 2, column // 2) for row, column in places})
            columns_first = [(0, 0), (1, 0), (0, 1), (1, 1)]
            parents = [[at[2 * row + p, 2 * column + q] for p, q in columns_first] for row, column in places]
            x = stage.downsample.norm(stage.downsample.reduction(x[torch.tensor(parents)].flatten(1)))
            size = tuple(side // 2 for side in size)
    return dict(zip(places, encoder.norm(x)))


def gradients(encoder, images, features):
    """Gradients of a sum of which every feature is a part, of all parameters and of the images."""
    named = {**dict(encoder.named_parameters()), "images": images}
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64).sin().view_as(features)
    return dict(zip(named, torch.autograd.grad((features.double() * weights).sum(), named.values())))


def by_groups(encoder, images, groups, share):
    """Features of two canvases, (2, C, h, w), of which group i shows images i and `share` + i, and all gradients."""
    images = images.clone().requires_grad_()
    side = encoder.config.patch_size
    shown = groups.long().repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None, None]
    both = images.view(2, share, *images.shape[1:])
    canvases = both.gather(1, shown.expand(-1, 1, *both.shape[2:])).squeeze(1)
    features = encoder.encode(encoder.embed(canvases), groups=groups).features
    return {"features": features.detach(), **gradients(encoder, images, features)}


def by_reference(encoder, images, groups, share):
    """The same by `ragged_encoding`."""
    images = images.clone().requires_grad_()
    rows, columns = (side // encoder.stride for side in images.shape[-2:])
    canvases = []
    for canvas in range(2):
        cells = {}
        for index in range(share):
            cells |= ragged_encoding(encoder, images[canvas * share + index], groups[canvas] == index)
        canvases.append(torch.stack([cells[place] for place in itertools.product(range(rows), range(columns))], dim=1))
    features = torch.stack(canvases).view(2, -1, rows, columns)
    return {"features": features.detach(), **gradients(encoder, images, features)}


@every_case
@pytest.mark.parametrize("share", [1, 2, 3, 4])
def test_each_group_is_encoded_alone(case, share):
    """Features and all gradients, by the reference implementation in float64 and by kernels in float32."""
    config, size = CASES[case]
    encoder = prepared(config)
    images, groups = images_of(config, size, 2 * share), random_groups(config, size, share)
    quick = by_groups(encoder, images, groups, share)
    encoder, images = encoder.double(), images.double()
    expected, actual = (run(encoder, images, groups, share) for run in (by_reference, by_groups))
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert distance(actual[name], value) < 1e-10, name
        assert distance(quick[name], value) < 1e-4, name


@every_case
@pytest.mark.parametrize("way", ["plain", "kernels", "checkpointed", "sequential", "bfloat16"])
def test_one_group_is_the_dense_encoder_bit_for_bit(case, way):
    config, size = CASES[case]
    encoder, images = prepared(config), images_of(config, size, 2)
    encoder.save_memory(way == "checkpointed", 3 if way == "sequential" else None)
    groups = torch.zeros(2, *(side // config.patch_size for side in size), dtype=torch.uint8)
    results = []
    for given in (None, groups):
        shown = images.clone().requires_grad_()
        with kernels.disabled() if way == "plain" else torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            features = encoder.encode(encoder.embed(shown), groups=given).features
        results.append({"features": features, **gradients(encoder, shown, features)})
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


@every_case
@pytest.mark.parametrize("way", ["plain", "kernels", "sequential", "bfloat16"])
def test_other_groups_change_no_bit_at_the_lowest_temperature(case, way):
    """Where −100 between groups would be a logit like any other."""
    config, size = CASES[case]
    encoder, images, groups = prepared(config), images_of(config, size, 2), random_groups(config, size, 3)
    for name, parameter in encoder.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(10.0)
    encoder.save_memory(False, 3 if way == "sequential" else None)
    cells = groups[:, :: encoder.stride // 4, :: encoder.stride // 4] == 1
    side = config.patch_size
    others = (groups != 1).repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    results = []
    for changed in (images, torch.where(others, 3 - 2 * images, images)):
        changed = changed.clone().requires_grad_()
        with kernels.disabled() if way == "plain" else torch.autocast("cpu", torch.bfloat16, enabled=way == "bfloat16"):
            features = encoder.encode(encoder.embed(changed), groups=groups).features.permute(0, 2, 3, 1)[cells]
        results.append((features, *gradients(encoder, changed, features).values()))
    assert all(torch.equal(*pair) for pair in zip(*results))
    assert torch.equal(results[0][-1] != 0, ~others.expand_as(images)), "only the group's own pixels have a gradient"


def test_compiled_blocks_compute_the_same():
    """Each block is one graph, without a break where labels are made."""
    config, size = SwinV2Config(16, (2,), (1,), window_size=4), (32, 32)
    encoder, images, groups = prepared(config), images_of(config, size, 4), random_groups(config, size, 2)
    reports = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with kernels.disabled():
        expected = by_groups(encoder, images, groups, 2)
        undo = compile_blocks(encoder, reports.append, backend="aot_eager")
        actual = by_groups(encoder, images, groups, 2)
        undo.close()
    assert not reports and not torch._dynamo.utils.counters["graph_break"]
    for name, value in expected.items():
        assert distance(actual[name], value) < 1e-5, name


def test_all_ways_agree():
    """Checkpoints, sequential attention and kernels: the same features and gradients."""
    config, size = CASES["window 6"]
    encoder, images, groups = prepared(config), images_of(config, size, 6), random_groups(config, size, 3)
    with kernels.disabled():
        expected = by_groups(encoder, images, groups, 3)
        for memory in ((True, None), (False, 5), (True, 1)):
            encoder.save_memory(*memory)
            for name, value in by_groups(encoder, images, groups, 3).items():
                assert distance(value, expected[name]) < 1e-4, (memory, name)
    encoder.save_memory(True, None)
    for name, value in by_groups(encoder, images, groups, 3).items():
        assert distance(value, expected[name]) < 2e-3 if "logit_scale" in name or "cpb" in name else 1e-4, name


def test_kernels_stay_on(monkeypatch):
    """With groups, every block is computed by the kernels."""
    config, size = CASES["window 6"]
    taken, supports = [], dispatch.supports_block
    monkeypatch.setattr(dispatch, "supports_block", lambda *asked: taken.append(supports(*asked)) or taken[-1])
    encoder = prepared(config)
    encoder.encode(encoder.embed(images_of(config, size, 2)), groups=random_groups(config, size, 3))
    assert taken == [True] * config.num_blocks


def test_two_threads_compute_the_same_groups():
    config, size = CASES["window 6"]
    encoder, images, groups = prepared(config), images_of(config, size, 6), random_groups(config, size, 3)
    one = by_groups(encoder, images, groups, 3)
    try:
        torch.set_num_threads(2)
        two = by_groups(encoder, images, groups, 3)
    finally:
        torch.set_num_threads(1)
    for name, value in one.items():
        assert distance(two[name], value) < 1e-4, name


def test_labels_and_their_mask():
    """A region is cut by −100 from another of its group and by −1e30 from other groups."""
    groups = torch.tensor([[[0, 0, 63, 63]] * 4]).to(torch.uint8)
    labels = window_labels(groups, (4, 4), (2, 0))
    assert labels.dtype == torch.uint8 and labels.view(4, 4).tolist() == [[0, 0, 252, 252]] * 2 + [[2, 2, 254, 254]] * 2
    mask = additive_mask(labels)[0]
    assert (mask[0, 1], mask[0, 8], mask[0, 2], mask[0, 10]) == (0, -100, -1e30, -1e30)
    regions = shift_regions((4, 4), (4, 4), (2, 2), torch.device("cpu"))
    assert set(additive_mask(regions).unique().tolist()) == {-100, 0}


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, size, message",
    [
        (SwinV2Config(16, (1, 1), (1, 1), window_size=4), (48, 32), r"window_size is 4, which pads .*, for instance 2"),
        (SwinV2Config(16, (1, 1), (1, 1), window_size=4), (32, 36), "give multiples of the last stage's stride, 8 px"),
        (ToyConfig(), (32, 32), "cannot keep several images on one canvas apart: choose another method"),
    ],
)
def test_sizes_and_encoders_that_are_not_supported(config, size, message):
    with pytest.raises(ValueError, match=message):
        config.check_groups(size)
    encoder = ToyEncoder(config) if isinstance(config, ToyConfig) else SwinV2(config)
    tokens = encoder.embed(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        encoder.encode(tokens, groups=torch.zeros(tokens.shape[:3], dtype=torch.uint8))


@pytest.mark.parametrize("groups", [torch.zeros(1, 8, 8), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_groups_of_another_shape_or_type_are_refused(groups):
    encoder = SwinV2(SwinV2Config(16, (1,), (1,), window_size=4))
    with pytest.raises(ValueError, match=r"groups are torch\..*: expected uint8 \(1, 8, 8\), one per patch"):
        encoder.encode(encoder.embed(torch.zeros(1, 3, 32, 32)), groups=groups)


def test_a_decoder_covers_the_whole_map():
    config = SwinV2Config(16, (1, 1), (1, 2)).decoder_config(64, 2)
    assert (config.dims, config.depths, config.num_heads, config.in_channels) == ((64,), (2,), (2,), 32)
    decoder = prepared(config)
    features = torch.randn(1, 32, 5, 9)
    changed = features.clone()
    changed[..., 0, 0] += 1
    first, second = (decoder(given).features for given in (features, changed))
    assert (first != second).any(dim=1).all(), "every token attends to every other"
    with pytest.raises(ValueError, match="decoder_dim is 48: give a multiple of 32"):
        config.decoder_config(48, 1)
    with pytest.raises(ValueError, match="this encoder has no decoder: choose another method"):
        ToyConfig().decoder_config(64, 1)
