"""SimMIM with contrast (`simmim.methods.contrast`): views, the momentum encoder, the loss, and what a step costs."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import memory as benchmark
import pytest
import torch
import torch.nn.functional as F
from image_files import write_images
from memory import LiveBytes
from torch.utils.flop_counter import FlopCounterMode

from simmim.data import ImageSamples, RandomView, StreamedSamples, collate, dataset_from_paths, find_images
from simmim.encoders import registry
from simmim.encoders.cost import Setup
from simmim.encoders.swinv2 import SwinV2Config
from simmim.methods.contrast import Contrast, ContrastSettings, change_tone, info_nce, momentum_at
from simmim.methods.simmim import SimMIM
from simmim.planning.plan import plan_for
from simmim.planning.step import step_flops, step_memory
from simmim.pretrain.module import PretrainingModule
from simmim.training.optim import adamw, parameter_groups

SIZE = (32, 32)
CONFIG = SwinV2Config(16, (1, 2), (1, 2), window_size=4, in_channels=3, drop_path_rate=0.9)
SETTINGS = ContrastSettings(projector_dim=16, projection_dim=8)
SEEDS = [1, 2, 3, 4]


def make(config=CONFIG, settings=SETTINGS, size=SIZE):
    """A method whose blocks are no identities, in training mode."""
    torch.manual_seed(0)
    method = Contrast.build(registry.build(config), settings.resolve(size, config))
    for parameter in method.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    method.weights_loaded()
    return method.train()


def draw_images(*size, count=4):
    return torch.randn(count, 3, *(size or SIZE), generator=torch.Generator().manual_seed(len(size)))


# --- views -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 4, (28, 36))
    return folder


def test_further_views_leave_all_else_as_it_is(folder):
    """Bit for bit, seeds too; they are crops of their own, and follow from seed, epoch and index."""
    source = dataset_from_paths(find_images(folder))
    further = [RandomView((8, 24)), RandomView((16, 16))]
    plain, several = (ImageSamples(source, RandomView((16, 16)), 3, 5, further=views) for views in ((), further))
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    alone, batch = collate([plain[key] for key in keys]), collate([several[key] for key in reversed(keys)])
    assert "views" not in alone
    assert torch.equal(alone["image"], batch["image"].flip(0)) and alone["seed"] == batch["seed"][::-1]
    wide, square = batch["views"]
    assert wide.shape == (8, 3, 8, 24) and square.shape == alone["image"].shape
    assert not any(map(torch.equal, square, batch["image"]))
    again = collate([several[key] for key in keys])
    assert all(torch.equal(first, second.flip(0)) for first, second in zip(batch["views"], again["views"]))
    assert not torch.equal(again["views"][1][:4], again["views"][1][4:]), "other views in the next epoch"


def test_further_views_of_a_stream(folder):
    stream = dataset_from_paths(find_images(folder)).to_iterable_dataset(num_shards=2)
    plain, several = (
        StreamedSamples(stream, RandomView((16, 16)), 3, 5, buffer=2, further=views) for views in ((), [RandomView((8, 8))])
    )
    for alone, sample in itertools.islice(zip(plain, several), 6):
        assert torch.equal(alone["image"], sample["image"]) and alone["seed"] == sample["seed"]
        assert sample["views"][0].shape == (3, 8, 8)


@pytest.mark.parametrize("scale, expected", [(1.0, (48, 96)), (0.5, (24, 48)), (0.6, (32, 56)), (0.01, (8, 8))])
def test_the_size_of_the_other_view(scale, expected):
    """A multiple of the last stage's stride, 8 px."""
    assert replace(SETTINGS, view_scale=scale).further_views((48, 96), CONFIG) == (expected,)


def test_tones_follow_from_the_seed_of_an_image():
    images = draw_images()
    changed = change_tone(images, SEEDS, 0.4, 0.5)
    assert torch.equal(changed[1:3], change_tone(images[1:3], SEEDS[1:3], 0.4, 0.5))
    assert all(not torch.equal(*pair) for pair in zip(changed, images))
    assert torch.equal(change_tone(images, SEEDS, 0.0, 0.0), images)


def test_some_views_are_gray():
    """By their probability, and nothing else of them without jitter."""
    images = draw_images().repeat(100, 1, 1, 1)
    changed = change_tone(images, range(400), 0.0, 0.3)
    gray = (changed - images.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-5
    torch.testing.assert_close(changed[~gray], images[~gray])
    assert 0.2 < gray.float().mean() < 0.4


def test_measurements_keep_their_proportions():
    """Five channels are shifted by one number, and stretched about their means by one factor, both as large as is said."""
    images = draw_images().repeat(50, 2, 1, 1)[:, :5] + torch.arange(5.0)[:, None, None]
    changed = change_tone(images, range(200), 0.4, 1.0)
    shift, gain = (changed - images).mean(dim=(2, 3)), changed.std(dim=(2, 3)) / images.std(dim=(2, 3))
    assert (shift - shift[:, :1]).abs().max() < 1e-4 and (gain - gain[:, :1]).abs().max() < 1e-4
    for found in (shift, gain - 1):
        assert 0.35 < found.max() < 0.401 and -0.401 < found.min() < -0.35


def test_no_data_stays_no_data():
    """The mean, in views whose tone is shifted."""
    module = PretrainingModule(make(), (0.5,) * 3, (0.25,) * 3, lambda step: 0.0, 0.0, 1.0)
    view = torch.rand(4, 3, 8, 8)
    view[:, :, :2] = torch.nan
    (changed,) = module.views({"views": [view], "seed": SEEDS})
    assert not changed[:, :, :2].any() and changed[:, :, 2:].all()


# --- the momentum encoder ----------------------------------------------------------------------------------------------


def test_the_momentum_encoder_has_no_gradient_no_stochastic_depth_and_the_kernels():
    method, views = make(), draw_images()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = method.keys(views), method.keys(views)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second) and not first.requires_grad
    assert (
        method.training and method.encoder.training and not any(part.training for part in method.momentum_encoder.modules())
    )
    assert not any(part.training for part in method.momentum_projector.modules())
    assert [type(part) for part in method.momentum_encoder.modules()] == [type(part) for part in method.encoder.modules()]
    expected = method.eval().projector(method.encoder(views).pooled)
    torch.testing.assert_close(first, expected, rtol=0, atol=0)
    masks = method.draw(SIZE, SEEDS, torch.device("cpu"))
    method.train()(views, masks, views=[views]).loss.backward()
    assert all(parameter.grad is None for parameter in method.momentum_encoder.parameters())


def test_the_average_is_that_of_float64():
    """Over 200 steps whose weights move, within a few roundings of float32."""
    method = make()
    followers, followed = method.averaged()
    exact = [value.double() for value in followers]
    generator = torch.Generator().manual_seed(3)
    for step in range(200):
        for value in followed:
            value.data += 0.01 * torch.randn(value.shape, generator=generator)
        progress = (step + 1) / 200
        method.after_step(progress)
        momentum = 1 - 0.01 * (math.cos(math.pi * progress) + 1) / 2
        exact = [momentum * mean + (1 - momentum) * value.double() for mean, value in zip(exact, followed)]
    assert followers[0].dtype == torch.float32
    torch.testing.assert_close([value.double() for value in followers], exact, rtol=0, atol=2e-6)
    assert max((value - mean).abs().max() for value, mean in zip(followed, followers)) > 0.01


def test_momentum_rises_to_one():
    values = [momentum_at(progress, 0.99) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert values == pytest.approx([0.99, 1 - 0.01 * (1 + math.sqrt(0.5)) / 2, 0.995, 1.0])


def test_buffers_are_copied():
    """An encoder with batch norm has statistics."""
    method = make()
    for encoder in (method.encoder, method.momentum_encoder):
        encoder.register_buffer("mean", torch.zeros(3))
    method.encoder.mean += 1
    method.after_step(1.0)
    assert torch.equal(method.momentum_encoder.mean, torch.ones(3))


# --- the loss ----------------------------------------------------------------------------------------------------------


def test_info_nce_by_hand():
    """In float64, a pair at a time, and its gradient; half precision is compared in float32."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    queries.requires_grad_()

    def by_hand(queries):
        total = 0
        for i in range(5):
            similar = [F.cosine_similarity(queries[i], keys[j], dim=0) / 0.2 for j in range(5)]
            total = total - similar[i] + torch.stack(similar).logsumexp(0)
        return total / 5

    loss, agreement = info_nce(queries, keys, 0.2)
    torch.testing.assert_close(loss, by_hand(queries))
    nearest = [max(range(5), key=lambda j, i=i: F.cosine_similarity(queries[i], keys[j], dim=0)) for i in range(5)]
    assert agreement == sum(i == j for i, j in enumerate(nearest)) / 5
    gradient, expected = (torch.autograd.grad(value, queries)[0] for value in (loss, by_hand(queries)))
    torch.testing.assert_close(gradient, expected)
    assert info_nce(keys, keys, 0.2)[1] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(queries.bfloat16(), keys.bfloat16(), 0.2)[0].dtype == torch.float32


def test_the_loss_is_simmim_and_the_contrast_by_its_weight():
    """Without another view it is SimMIM's, bit for bit."""
    method, images = make(replace(CONFIG, drop_path_rate=0.0)), draw_images()
    plain = SimMIM(method.encoder)
    plain.load_state_dict({name: method.state_dict()[name] for name in plain.state_dict()})
    masks = method.draw(SIZE, SEEDS, torch.device("cpu"))
    pixels = plain(images, masks).loss
    assert torch.equal(method(images, masks).loss, pixels) and method(images, masks).metrics is None
    loss, _, metrics = method(images, masks, views=[draw_images(24, 16)])
    assert torch.equal(metrics["masked_l1"], pixels) and metrics.keys() == {"masked_l1", "contrast", "agreement"}
    torch.testing.assert_close(loss, pixels + 0.5 * metrics["contrast"])
    assert not any(value.requires_grad for value in metrics.values()) and metrics["contrast"] > 0.1


def test_earlier_stages_are_compared_too():
    """Their means are normalized, so that they weigh as much at any amplitude."""
    method = make(settings=replace(SETTINGS, contrast_stages=2))
    assert method.projector[0].in_features == 16 + 32
    stages = [
        10 * draw_images(4, 4)[:, :1].repeat(1, 16, 1, 1) + torch.arange(16.0)[:, None, None],
        torch.zeros(4, 32, 2, 2),
    ]
    output = SimpleNamespace(stages=tuple(stages), pooled=torch.ones(4, 32))
    pooled = method.pooled(output)
    assert pooled.shape == (4, 48) and torch.equal(pooled[:, 16:], output.pooled)
    torch.testing.assert_close(pooled[:, :16].mean(dim=1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[:, :16].std(dim=1, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_it_learns_to_agree():
    """Eight images are told apart by what is left of them, far better than by chance."""
    settings = replace(SETTINGS, contrast_weight=5.0, temperature=0.1, momentum=0.9)
    method, images = make(replace(CONFIG, drop_path_rate=0.0), settings), draw_images(32, 32, count=8)
    optimizer = adamw(parameter_groups(method, 1e-2, 0.0))
    agreement, contrast = [], []
    for step in range(80):
        masks = method.draw(SIZE, [100 * step + i for i in range(8)], torch.device("cpu"))
        output = method(images, masks, views=[images.flip(-1)])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(step / 80)
        agreement.append(float(output.metrics["agreement"]))
        contrast.append(float(output.metrics["contrast"]))
    assert sum(agreement[-10:]) / 10 > 0.6 and agreement[0] < 0.3
    assert sum(contrast[-10:]) / 10 < math.log(8) / 2 < contrast[0]


# --- settings and cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("contrast_weight", 0, "contrast_weight is 0: give a positive number"),
        ("temperature", -0.1, "temperature is -0.1"),
        ("momentum", 1.5, "momentum is 1.5: give a number from 0 to 1"),
        ("projector_dim", 0, "projector_dim is 0"),
        ("view_scale", 0.0, "view_scale is 0: give a number above 0"),
        ("view_gray", 2.0, "view_gray is 2"),
    ],
)
def test_settings_out_of_range(setting, value, message):
    with pytest.raises(ValueError, match=message):
        ContrastSettings(**{setting: value})


def test_the_ends_of_a_range_are_in_it():
    for momentum in (0.0, 1.0):
        assert ContrastSettings(momentum=momentum).momentum == momentum


def test_more_stages_than_there_are():
    with pytest.raises(ValueError, match="contrast_stages is 3 and the encoder has 2 stages"):
        ContrastSettings(contrast_stages=3).resolve(SIZE, CONFIG)


@pytest.mark.usefixtures("reference_implementation")
@pytest.mark.parametrize("scale, checkpointed", [(1.0, False), (0.5, True)])
def test_the_plan_of_a_step(scale, checkpointed):
    """FLOPs of a step within 1 %, of the state within 0.01 %, of the rest of the peak within 10 %."""
    size, batch, config = (64, 64), 4, replace(CONFIG, embed_dim=32, drop_path_rate=0.0)
    settings = replace(SETTINGS, view_scale=scale, projector_dim=512, projection_dim=128).resolve(size, config)
    method = Contrast.build(registry.build(config, checkpointed), settings).train()
    images, masks = draw_images(*size), method.draw(size, SEEDS, torch.device("cpu"))
    views = [draw_images(*settings.further_views(size, config)[0])]
    setup = Setup(batch, 1, "32-true", "ddp", checkpointed, device="cpu")
    with FlopCounterMode(display=False) as counter:
        loss = method(images, masks, views=views).loss
        forward = counter.get_total_flops()
        loss.backward()
    planned = step_flops(config, size, setup, Contrast, settings=settings)
    assert planned.forward == pytest.approx(forward / batch, rel=0.01)
    assert planned.training == pytest.approx(counter.get_total_flops() / batch, rel=0.01)
    optimizer = adamw(parameter_groups(method, 1e-4, 0.05))
    optimizer.step()
    del loss
    state = [value for moments in optimizer.state.values() for value in moments.values()]
    optimizer.zero_grad()
    benchmark.clear_caches()
    fixed = sum(tensor.nbytes for tensor in (*method.parameters(), *state))
    known = [*method.parameters(), *state, images, masks, *views]
    with LiveBytes(known) as live:
        method(images, masks, views=views).loss.backward()
        optimizer.step()
    predicted = step_memory(config, size, setup, Contrast, settings)
    assert predicted.parameters + predicted.optimizer == pytest.approx(fixed, rel=1e-4)
    real = live.peak + images.nbytes + views[0].nbytes
    assert predicted.peak - predicted.parameters - predicted.optimizer == pytest.approx(real, rel=0.1)


def test_a_plan_counts_what_large_batches_cost():
    """Similarities: a product of outputs with each image's of all devices, in both directions for the queries alone. Memory:
    the outputs of all devices and two values of each similarity; and bfloat16 copies of the weights of the heads."""
    size, outputs = (64, 64), SETTINGS.projection_dim
    settings = SETTINGS.resolve(size, CONFIG)

    def costs(batch, devices, precision="32-true", settings=settings):
        setup = Setup(batch, devices, precision, "ddp", False, device="cpu")
        return Contrast.head_flops(CONFIG, settings, size, setup), Contrast.head_layers(CONFIG, settings, size, setup)[-1]

    (one, on_one), (four, on_four) = costs(32, 1), costs(32, 4)
    assert four.forward - one.forward == 2 * outputs * 32 * 3 and four.training - one.training == 2 * 2 * outputs * 32 * 3
    assert on_four.kept - on_one.kept == 4 * 32 * 3 * (outputs + 2 * 32) and on_four.forward == on_one.forward
    hidden, dim = settings.projector_dim, settings.features_dim(CONFIG)
    wider, _ = costs(32, 1, settings=replace(settings, projector_dim=2 * hidden))
    project, predict = 2 * hidden * (dim + outputs), 4 * hidden * outputs  # of two layers each, twice the multiply-adds
    assert wider.forward - one.forward == 2 * project + predict
    assert wider.training - one.training == project + 3 * (project + predict), "the momentum projector has no backward pass"
    small = costs(32, 1, settings=replace(settings, view_scale=0.5))[1]
    assert on_one.kept - small.kept == 32 * 3 * 4 * (64 * 64 - 32 * 32), "float32 of three channels of the other views"
    cast = costs(32, 1, "bf16-mixed")[1]
    assert cast.kept - on_one.kept == 2 * on_one.parameters


@pytest.mark.usefixtures("reference_implementation")
def test_the_plan_of_the_momentum_encoder_has_room_for_it():
    """What its pass needs, which keeps nothing, and not half more: training keeps what this pass lets go."""
    size, batch, config = (64, 64), 8, replace(CONFIG, embed_dim=32, drop_path_rate=0.0)
    settings, views = SETTINGS.resolve(size, config), draw_images(*size, count=batch)
    encoder = Contrast.build(registry.build(config), settings).train().momentum_encoder
    benchmark.clear_caches()
    with LiveBytes([*encoder.parameters(), views]) as live, torch.no_grad():
        encoder(views)
    planned = Contrast.head_layers(config, settings, size, Setup(batch, 1, "32-true", "ddp", False, device="cpu"))[-1]
    assert live.peak <= planned.forward < 1.5 * live.peak


def test_the_plan_of_the_heads_has_room_for_them():
    """Projectors and predictor of many images, forward and backward: what they need, and not a quarter more."""
    batch, config = 2048, replace(CONFIG, drop_path_rate=0.0)
    settings = replace(SETTINGS, projector_dim=512, projection_dim=64).resolve(SIZE, config)
    method, dim = Contrast.build(registry.build(config), settings).train(), settings.features_dim(config)
    features, others = torch.randn(batch, dim, requires_grad=True), torch.randn(batch, dim)
    with LiveBytes([*method.parameters(), features, others]) as live:
        with torch.no_grad():
            keys = method.momentum_projector(others)
        queries = method.predictor(method.projector(features))
        (F.normalize(queries, dim=1) * F.normalize(keys, dim=1)).sum().backward()
    planned = Contrast.head_layers(config, settings, SIZE, Setup(batch, 1, "32-true", "ddp", False, device="cpu"))[-1].kept
    planned -= 4 * batch * (3 * 32 * 32 + 64 + 2 * batch)  # views, keys of all devices, similarities
    assert live.peak <= planned < 1.25 * live.peak


def test_a_plan_by_its_settings():
    """The other view costs a forward pass, a small one less; what is divided among devices is refused."""
    options = {"method": "contrast", "encoder": {"window_size": 6}, "batch_size": 64}
    whole = plan_for("micro", 96, model={}, **options)
    half = plan_for("micro", 96, model={"view_scale": 0.5}, **options)
    plain = plan_for("micro", 96, encoder={"window_size": 6}, batch_size=64)
    assert 1.25 < whole.training_flops / plain.training_flops < 1.4
    assert 1.05 < half.training_flops / plain.training_flops < 1.2
    with pytest.raises(ValueError, match="strategy is fsdp, which method contrast does not support: give ddp"):
        plan_for("micro", 96, devices=2, strategy="fsdp", **options)
    giant = plan_for("giant-3b", 192, devices=8, method="contrast", batch_size=1024)
    assert giant.recommended is None or giant.recommended.strategy == "ddp"
