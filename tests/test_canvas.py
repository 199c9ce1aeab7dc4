"""Several images on one canvas: how units are dealt out, what is predicted, what it costs, and what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from memory import LiveBytes, clear_caches
from test_groups import prepared, ragged_encoding
from test_kernels import distance
from torch.utils.flop_counter import FlopCounterMode

from simmim.data import EndlessBatchSampler
from simmim.encoders.cost import Setup
from simmim.encoders.swinv2 import PRESETS, SwinV2, SwinV2Config, kernels
from simmim.methods.canvas import Canvas, CanvasSettings, default_decoder_dim
from simmim.methods.masking import SharedCanvas
from simmim.methods.pixels import masked_l1
from simmim.methods.simmim import SimMIM
from simmim.planning.plan import plan_for
from simmim.planning.step import step_flops, step_memory

CPU = torch.device("cpu")
CONFIG, SIZE = SwinV2Config(16, (2, 2), (1, 2), window_size=4), (32, 64)


def canvas_of(config=CONFIG, size=SIZE, **settings):
    """A canvas whose every parameter matters."""
    torch.manual_seed(0)
    model = Canvas(prepared(config), CanvasSettings(**settings).resolve(size, config))
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            parameter.data.normal_(0, 0.1)
    return model


def images_of(count, size=SIZE, seed=1):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_mask_tokens_begin_as_those_of_simmim():
    """A normal distribution with a deviation of 0.02, as the authors draw theirs; 512 numbers."""
    torch.manual_seed(0)
    config = replace(CONFIG, embed_dim=512, num_heads=(16, 32))
    settings = CanvasSettings(mask_unit=4, shared_stages=1).resolve(SIZE, config)
    token = Canvas(prepared(config), settings).mask_token
    assert token.shape == (512,) and token.std().item() == pytest.approx(0.02, rel=0.15) and token.mean().abs() < 0.004


# --- who shows what -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [2, 3, 4, 7])
@pytest.mark.parametrize("unit, size", [(8, (32, 64)), (16, (48, 48)), (8, (24, 40))])
def test_every_unit_is_visible_in_one_image_and_parts_are_equal(share, unit, size):
    """Whole units, and parts that differ by one unit where the number of images does not divide theirs."""
    canvas = SharedCanvas(share, unit, 4, 8)
    units, side = (size[0] // unit) * (size[1] // unit), unit // 4
    visible = ~canvas.draw(size, list(range(5 * share)), CPU)
    assert visible.shape == (5 * share, size[0] // 4, size[1] // 4)
    assert (visible.view(5, share, *visible.shape[1:]).sum(1) == 1).all()
    whole = visible.unfold(1, side, side).unfold(2, side, side).flatten(3)
    assert torch.equal(whole.all(-1), whole.any(-1))
    counts = whole.any(-1).sum((1, 2))
    assert set(counts.tolist()) <= {units // share, -(-units // share)}
    fewest, most = canvas.num_masked_units(size)
    assert (units - counts.max(), units - counts.min()) == (fewest, most)


def test_masks_are_uniform_for_every_image_and_unit():
    """12 units for 5 images: each unit is visible in each image in a fifth of the draws, within 4.5 standard deviations."""
    canvases, share = 6000, 5
    masks = SharedCanvas(share, 8, 8, 8).draw((24, 32), list(range(canvases * share)), CPU)
    frequency = (~masks).view(canvases, share, 12).float().mean(0)
    assert (frequency - 1 / share).abs().max() < 4.5 * math.sqrt(0.2 * 0.8 / canvases)


def test_the_seeds_of_its_images_decide_a_canvas():
    """All of them, and their order, and nothing else."""
    canvas = SharedCanvas(3, 8, 4, 8)
    whole = canvas.draw(SIZE, [1, 2, 3, 4, 5, 6, 7, 8], CPU)
    assert torch.equal(whole[3:6], canvas.draw(SIZE, [4, 5, 6], CPU))
    assert torch.equal(whole[6:], canvas.draw(SIZE, [7, 8], CPU))
    for other in ([1, 2, 4], [9, 2, 3], [3, 2, 1]):
        assert not torch.equal(whole[:3], canvas.draw(SIZE, other, CPU))


def test_the_same_canvases_on_one_device_and_on_two():
    """Each device's part of a batch holds whole canvases, so that their images and masks are the same."""

    def canvases(world):
        samplers = [iter(EndlessBatchSampler(40, 24 // world, 3, rank, world)) for rank in range(world)]
        batches = []
        for _ in range(4):
            keys = [next(sampler) for sampler in samplers]
            seeds = [[1000 * epoch + index for epoch, index in part] for part in keys]
            masks = torch.cat([SharedCanvas(3, 8, 4, 8).draw(SIZE, part, CPU) for part in seeds])
            batches.append(([key for part in keys for key in part], masks))
        return batches

    for (keys, masks), (other_keys, other_masks) in zip(canvases(1), canvases(2)):
        assert keys == other_keys and torch.equal(masks, other_masks)


# --- what is predicted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [2, 3, 4])
def test_as_each_image_alone(share):
    """Prediction and loss, of a reference that encodes each image's visible tokens alone and puts them on its grid."""
    model, images = canvas_of(share=share).double(), images_of(2 * share).double()
    mask = model.draw(SIZE, list(range(len(images))), CPU)
    loss, prediction, _ = model(images, mask, return_reconstruction=True)
    grid, dim = tuple(side // model.encoder.stride for side in SIZE), model.decoder.dim
    expected = []
    for image, masked in zip(images, mask):
        tokens = model.mask_token.expand(*grid, dim).clone()
        for place, feature in ragged_encoding(model.encoder, image, ~masked).items():
            tokens[place] = model.decoder.embed(feature.view(1, -1, 1, 1))[0, 0, 0]
        expected.append(model.pixels.predict(model.decoder.encode(tokens[None]).features, SIZE)[0])
    expected = torch.stack(expected)
    assert distance(prediction.detach(), expected.detach()) < 1e-10
    assert loss.item() == pytest.approx(masked_l1(expected, images, mask, 4).item(), rel=1e-10)
    assert model(images, mask).loss.item() == pytest.approx(loss.item(), rel=1e-10), "masked cells alone"
    assert torch.equal(model.reconstruct(images, mask).prediction, prediction)


@pytest.mark.parametrize("way", ["plain", "kernels"])
def test_masked_pixels_change_no_bit(way):
    """At the lowest temperature, whatever the pixels are; and others' visible pixels neither."""
    model, images = canvas_of(share=3), images_of(6)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(10.0)
    mask = model.draw(SIZE, list(range(6)), CPU)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    changed = images.masked_fill(hidden, torch.nan)
    changed[1] = changed[4] = 100.0
    with torch.no_grad(), kernels.disabled() if way == "plain" else torch.no_grad():
        first, second = (model(given, mask, return_reconstruction=True).reconstruction for given in (images, changed))
    for image in (0, 2, 3, 5):
        assert torch.equal(first[image], second[image])
    assert not torch.equal(first[1], second[1])


def test_a_canvas_that_is_not_full():
    """Pictures are of any number of images: those of the last canvas are what they are on a full one."""
    model, images = canvas_of(share=3), images_of(6)
    mask = model.draw(SIZE, list(range(6)), CPU)
    whole = model.reconstruct(images, mask).prediction
    for count in (4, 5):
        part = model.reconstruct(images[:count], mask[:count]).prediction
        assert distance(part, whole[:count]) < 1e-5
    assert model.reconstruct(images[:1], mask[:1]).prediction.shape == (1, 3, *SIZE)


def test_normalized_targets():
    model, images = canvas_of(norm_target_patch=5), images_of(3) * 3 + 7
    mask = model.draw(SIZE, [1, 2, 3], CPU)
    assert model(images, mask).loss < 2  # of targets of deviation 1; raw ones are 7 away
    assert 4 < model.reconstruct(images, mask).prediction.mean() < 10
    state = {name: value.clone() for name, value in model.own_state().items()}
    assert "normalized over 47 px" in model.load_own_state(state, {"norm_target_patch": 47})
    assert model.load_own_state(state, {"norm_target_patch": 5}) == "mask token and decoder"


@pytest.mark.parametrize("memory", [(True, None), (False, 3), (True, 1)])
def test_checkpoints_and_sequential_attention_change_nothing(memory):
    """Of encoder and decoder, by the reference implementation in float64; both are asked for when the method is built."""
    results = []
    for checkpointed, at_once in ((False, None), memory):
        encoder = SwinV2(replace(CONFIG, drop_path_rate=0.5), checkpointed, at_once)
        model = Canvas(encoder, CanvasSettings(decoder_depth=2).resolve(SIZE, CONFIG)).double()
        assert (model.decoder.checkpoint_activations, model.decoder.sequential_attention) == (checkpointed, at_once)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0.1, 0.3, generator=generator)
        torch.manual_seed(5)
        loss = model(images_of(6).double(), model.draw(SIZE, list(range(6)), CPU)).loss
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for first, second in zip(*results):
        assert distance(first.detach(), second.detach()) < 1e-10


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, window, side, unit, dim",
    [("tiny", 12, 192, 32, 256), ("base", 12, 192, 32, 512), ("micro", 8, 128, 32, 256), ("nano", 4, 32, 8, 96)],
)
def test_defaults(preset, window, side, unit, dim):
    config = replace(PRESETS[preset], window_size=window)
    settings = CanvasSettings().resolve((side, side), config)
    assert (settings.mask_unit, settings.decoder_dim, settings.decoder_depth) == (unit, dim, 1)
    assert settings.images_per_input == settings.share == 3


def test_decoder_channels_by_defaults_are_a_multiple_of_32():
    """As many as the encoder ends with, at least 32, at most 256, or 512 after 1,024 and more."""
    dims = {16: 32, 32: 32, 60: 32, 96: 96, 256: 256, 1023: 256, 1024: 512, 1536: 512}
    assert {dim: default_decoder_dim(replace(CONFIG, embed_dim=dim, depths=(2,), num_heads=(1,))) for dim in dims} == dims


@pytest.mark.parametrize(
    "settings, size, message",
    [
        (
            {"mask_unit": 6},
            SIZE,
            "mask_unit is 6 px and the last stage on canvases has a token for 4 px: give a multiple of 4 px",
        ),
        ({"mask_unit": 16}, (32, 40), "window_size is 4, which pads"),
        ({"mask_unit": 24}, SIZE, "mask unit of 24 px does not divide an image of 32×64 px; units that do: 8, 16, 32"),
        ({"mask_unit": 32}, SIZE, "share is 3 and images of 32×64 px have 2 mask units of 32 px: give a smaller"),
        ({"share": 33}, SIZE, "share is 33 and images of 32×64 px have 32 mask units of 8 px"),
        ({"share": 1}, SIZE, "share is 1: give the number of images on a canvas, 2 to 64"),
        ({"share": 65}, SIZE, "share is 65: give the number of images on a canvas, 2 to 64"),
        ({}, (32, 36), "give multiples of the last stage's stride, 8 px"),
        ({"decoder_dim": 40}, SIZE, "decoder_dim is 40: give a multiple of 32"),
        ({"decoder_depth": 0}, SIZE, "decoder_depth is 0: give 1 block or more"),
    ],
)
def test_settings_that_cannot_work(settings, size, message):
    with pytest.raises(ValueError, match=message):
        CanvasSettings(**settings).resolve(size, CONFIG)


def test_masks_that_are_none_of_a_canvas():
    model, images = canvas_of(share=2), images_of(4)
    mask = model.draw(SIZE, [1, 2, 3, 4], CPU)
    with pytest.raises(ValueError, match="two images of canvas 1 show the same patch"):
        model(images, torch.cat((mask[:3], mask[2:3])))
    for wrong in (mask.float(), mask[:3], mask[:, :4]):
        with pytest.raises(ValueError, match=r"mask is .*: expected bool \(4, 8, 16\), True = masked"):
            model(images, wrong)


# --- cost ---------------------------------------------------------------------------------------------------------------


def flops_of(config, size, share, options=(False, None)):
    """Of forward pass and training step per image, as the plan has it and as torch counts."""
    settings = CanvasSettings(share=share).resolve(size, config)
    with torch.device("meta"):
        model = Canvas(SwinV2(config, *options), settings).train()
        images = torch.zeros(2 * share, config.in_channels, *size)
        mask = torch.zeros(2 * share, *(side // config.patch_size for side in size), dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, mask).loss
        forward = counter.get_total_flops()
        loss.backward()
    setup = Setup(2 * share, 1, "32-true", "ddp", *options)
    planned = step_flops(config, size, setup, Canvas, settings=settings)
    return planned, (forward / (2 * share), counter.get_total_flops() / (2 * share))


@pytest.mark.parametrize("share, options", [(2, (False, None)), (3, (True, None)), (4, (True, 2))])
def test_flops(share, options):
    """Forward within 0.1 %, a training step within 1 %."""
    planned, counted = flops_of(PRESETS["nano"], (64, 64), share, options)
    assert planned.forward == pytest.approx(counted[0], rel=1e-3)
    assert planned.training == pytest.approx(counted[1], rel=0.01)


@pytest.mark.usefixtures("reference_implementation")
@pytest.mark.parametrize("options", [(False, None), (True, None), (False, 8)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_memory(precision, options):
    """Bytes after the forward pass and at the peak of a step within 8 %, beside parameters and optimizer."""
    config, size, batch = PRESETS["nano"], (32, 32), 48
    settings = CanvasSettings().resolve(size, config)
    model, images = Canvas(SwinV2(config, *options), settings).train(), torch.zeros(batch, 3, *size)
    mask = model.draw(size, list(range(batch)), CPU)
    clear_caches()
    with LiveBytes([*model.parameters(), images, mask]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(images, mask).loss
        kept = live.live
        loss.backward()
    setup = Setup(batch, 1, precision, "ddp", *options, device="cpu")
    planned = step_memory(config, size, setup, Canvas, settings)
    assert planned.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert planned.activations == pytest.approx(images.nbytes + kept, rel=0.08)
    assert planned.peak - planned.parameters - planned.optimizer == pytest.approx(images.nbytes + live.peak, rel=0.08)


@pytest.mark.parametrize("preset, gflops", [("tiny", {3: 2.42, 4: 1.85}), ("base", {3: 8.15, 4: 6.20})])
def test_a_third_and_a_quarter_of_the_cost(preset, gflops):
    """At 192 px and window 12, of 7.08 and 23.65 GFLOP an image."""
    for share, expected in gflops.items():
        result = plan_for(preset, 192, method="canvas", model={"share": share})
        assert result.forward_flops / 1e9 == pytest.approx(expected, rel=0.02)
        assert result.requested.batch_per_device % share == result.largest_batch % share == 0
        whole = plan_for(preset, 192, batch_size=result.requested.batch_per_device)
        assert result.memory.activations < 0.6 * whole.memory.activations


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 128}, "128 images per device do not divide by 3, .* give a batch that is a multiple of 3"),
        ({"batch_size": 96, "devices": 2, "model": {"share": 5}}, "give a batch that is a multiple of 10"),
        ({"model": {"mask_ratio": 0.6}}, "model.mask_ratio is no setting of canvas: model.share decides"),
        ({"model": {"shar": 3}}, "unknown setting 'model.shar'; did you mean 'share'"),
        ({"encoder": {"window_size": 7}}, "window_size is 7, which pads .* for instance 6"),
    ],
)
def test_plans_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_for("tiny", 192, method="canvas", **settings)


# --- mask tokens between stages -----------------------------------------------------------------------------------------

LATE = SwinV2Config(16, (2, 2, 2), (1, 2, 2), window_size=4)  # strides 4, 8, 16


def shared_part(encoder, num_stages):
    """The first stages as an encoder of their own, without a norm."""
    part = SwinV2(encoder.config.first_stages(num_stages)).to(encoder.norm.weight)
    part.norm = torch.nn.Identity()
    names = part.state_dict().keys()
    part.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in names})
    return part


@pytest.mark.parametrize("share, unit, num_stages", [(2, 8, 2), (3, 8, 2), (3, 4, 1)])
def test_late_tokens_as_each_image_alone(share, unit, num_stages):
    """A reference encodes each image's visible tokens alone by the first stages, puts mask tokens into its grid and goes on
    densely."""
    size = (32, 64)
    model, images = canvas_of(LATE, size, share=share, mask_unit=unit).double(), images_of(2 * share, size).double()
    encoder = model.encoder
    assert model.is_late and model.num_shared == num_stages and model.decoder is None
    assert f"mask tokens after stage {num_stages} of 3" in model.describe(size)
    mask = model.draw(size, list(range(len(images))), CPU)
    loss, prediction, _ = model(images, mask, return_reconstruction=True)
    part, stride = shared_part(encoder, num_stages), encoder.strides[num_stages - 1]
    expected = []
    for image, masked in zip(images, mask):
        tokens = model.mask_token.expand(*(side // stride for side in size), -1).clone()
        for place, feature in ragged_encoding(part, image, ~masked).items():
            tokens[place] = feature
        features = encoder.encode_rest(tokens[None], num_stages).features
        expected.append(model.pixels.predict(features, size)[0])
    expected = torch.stack(expected)
    assert distance(prediction.detach(), expected.detach()) < 1e-10
    assert loss.item() == pytest.approx(masked_l1(expected, images, mask, 4).item(), rel=1e-10)
    assert model(images, mask).loss.item() == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize("way", ["plain", "kernels"])
def test_late_tokens_of_one_image_that_shows_all_are_a_plain_encoding(way):
    """Bit for bit: both halves of the encoder are the whole."""
    size = (32, 64)
    model, images = canvas_of(LATE, size, share=2, mask_unit=8), images_of(1, size)
    mask = torch.zeros(1, 8, 16, dtype=torch.bool)
    with torch.no_grad(), kernels.disabled() if way == "plain" else torch.no_grad():
        plain = model.pixels.predict(model.encoder(images).features, size)
        assert distance(model(images, mask, return_reconstruction=True).reconstruction, plain) < 1e-5
        halves = model.encoder.encode_rest(model.encoder.encode_first(model.encoder.embed(images), 2), 2)
        whole = model.encoder(images)
        assert torch.equal(halves.features, whole.features) and torch.equal(halves.pooled, whole.pooled)


@pytest.mark.parametrize("way", ["plain", "kernels"])
def test_masked_pixels_change_no_bit_with_late_tokens(way):
    """Nor do others' visible pixels."""
    size = (32, 64)
    model, images = canvas_of(LATE, size, share=3, mask_unit=8), images_of(6, size)
    mask = model.draw(size, list(range(6)), CPU)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    changed = images.masked_fill(hidden, torch.nan)
    changed[1] = changed[4] = 100.0
    with torch.no_grad(), kernels.disabled() if way == "plain" else torch.no_grad():
        first, second = (model(given, mask, return_reconstruction=True).reconstruction for given in (images, changed))
    for image in (0, 2, 3, 5):
        assert torch.equal(first[image], second[image])
    assert not torch.equal(first[1], second[1])


def test_when_tokens_are_late():
    """Where the unit is smaller than the last stride, or on request; every parameter gets a gradient."""
    size = (32, 64)
    for given, expected in (
        ({}, (16, 3)),
        ({"mask_unit": 8}, (8, 2)),
        ({"mask_unit": 4}, (4, 1)),
        ({"shared_stages": 2}, (8, 2)),
        ({"shared_stages": 1, "mask_unit": 16}, (16, 1)),
    ):
        settings = CanvasSettings(**given).resolve(size, LATE)
        assert (settings.mask_unit, settings.num_shared(LATE)) == expected, given
        assert settings.resolve(size, LATE) == settings
        model = Canvas(SwinV2(LATE), settings)
        again = Canvas.settings_from({**model.provenance(), "method": "canvas"})
        shapes = {name: tuple(value.shape) for name, value in model.own_state().items()}
        assert shapes == Canvas.expected_state(LATE, settings) == Canvas.expected_state(LATE, again)
    model = canvas_of(LATE, size, share=2, mask_unit=8)
    model(images_of(4, size), model.draw(size, [1, 2, 3, 4], CPU)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_maps_of_late_stages_may_be_padded():
    """By windows that divide the shared maps alone; not by sizes that these do not divide."""
    config = SwinV2Config(16, (1, 1, 1), (1, 2, 2), window_size=6)
    size = (48, 48)  # maps of 12, 6 and 3 tokens
    model = canvas_of(config, size, share=2, mask_unit=8)
    assert torch.isfinite(model(images_of(2, size), model.draw(size, [1, 2], CPU)).loss)
    odd = (24, 24)  # maps of 6, 3 and 2 tokens, of which the last is padded
    model = canvas_of(replace(config, window_size=3), odd, share=2, mask_unit=8)
    assert torch.isfinite(model(images_of(2, odd), model.draw(odd, [1, 2], CPU)).loss)


def test_late_tokens_cost():
    """FLOPs as torch counts them, between those of a canvas for all stages and of SimMIM."""
    config, size, share = replace(PRESETS["micro"], window_size=4), (64, 64), 2
    settings = CanvasSettings(share=share, mask_unit=16).resolve(size, config)
    assert settings.num_shared(config) == 3
    with torch.device("meta"):
        model = Canvas(SwinV2(config), settings).train()
        images, mask = torch.zeros(4, 3, *size), torch.zeros(4, 16, 16, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, mask).loss
        forward = counter.get_total_flops()
        loss.backward()
    setup = Setup(4, 1, "32-true", "ddp")
    planned = step_flops(config, size, setup, Canvas, settings=settings)
    assert planned.forward == pytest.approx(forward / 4, rel=1e-3)
    assert planned.training == pytest.approx(counter.get_total_flops() / 4, rel=0.01)
    whole = step_flops(config, size, setup, Canvas, settings=CanvasSettings(share=share).resolve(size, config))
    assert whole.forward < planned.forward < step_flops(config, size, setup, SimMIM).forward


@pytest.mark.usefixtures("reference_implementation")
def test_late_tokens_memory():
    """Within 8 %, as of other canvases."""
    size, batch = (32, 32), 48
    settings = CanvasSettings(mask_unit=8).resolve(size, LATE)
    model, images = Canvas(SwinV2(LATE), settings).train(), torch.zeros(batch, 3, *size)
    mask = model.draw(size, list(range(batch)), CPU)
    clear_caches()
    with LiveBytes([*model.parameters(), images, mask]) as live:
        loss = model(images, mask).loss
        kept = live.live
        loss.backward()
    planned = step_memory(LATE, size, Setup(batch, 1, "32-true", "ddp", device="cpu"), Canvas, settings)
    assert planned.parameters == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert planned.activations == pytest.approx(images.nbytes + kept, rel=0.08)
    assert planned.peak - planned.parameters - planned.optimizer == pytest.approx(images.nbytes + live.peak, rel=0.08)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask_unit": 6}, "mask_unit is 6 px and the last stage on canvases has a token for 4 px: give a multiple of 4 px"),
        ({"mask_unit": 8, "shared_stages": 3}, "mask_unit is 8 px and the last stage on canvases has a token for 16 px"),
        ({"shared_stages": 4}, "shared_stages is 4: give 1 to 3"),
        ({"shared_stages": 0}, "shared_stages is 0: give 1 to 3"),
        ({"mask_unit": 8, "decoder_dim": 32}, "mask tokens come after stage 2 of 3, where there is no decoder: leave out"),
    ],
)
def test_late_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        CanvasSettings(**settings).resolve((32, 64), LATE)
