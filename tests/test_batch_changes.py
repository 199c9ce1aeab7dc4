"""Random changes of labeled batches: operations against PIL, draws against their distributions, targets against pixels."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from simmim.data import normalize
from simmim.data.deep import DeepPicture, StoredValues
from simmim.finetune.augment.affine import AffineSettings
from simmim.finetune.augment.batch import BatchChanges
from simmim.finetune.augment.color import (
    MOVEMENTS,
    OPERATIONS,
    Change,
    ColorSettings,
    movement_matrices,
    operations_for,
    recolor,
)
from simmim.finetune.augment.erasing import AREA, draw_box, erase
from simmim.finetune.augment.mixing import Mix, MixSettings, draw_cut, mix
from simmim.finetune.classification.module import soft_cross_entropy
from simmim.reading import Reading

SEEDS = list(range(3000))
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def photographs(size=48, channels=3):
    """Crops of a real photograph, (8, channels, size, size) uint8."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)
    crops = [pixels[:, 30 * row : 30 * row + size, 60 * row : 60 * row + size] for row in range(8)]
    return torch.stack(crops).repeat(1, 2, 1, 1)[:, :channels]


# --- colors ---------------------------------------------------------------------------------------------------------


def by_pil(name, level, sign, image):
    """The operation by PIL."""
    factor = 1 + sign * 0.9 * level
    if name in ("brightness", "contrast", "saturation", "sharpness"):
        kind = {"saturation": "Color"}.get(name, name.capitalize())
        return getattr(ImageEnhance, kind)(image).enhance(factor)
    if name == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - level) + 0.5))
    if name == "posterize":
        return ImageOps.posterize(image, max(4 - int(4 * level), 1))
    if name == "solarize_add":
        table = [min(value + round(0.43 * level * 255), 255) if value < 128 else value for value in range(256)]
        return image.point(table * len(image.getbands()))
    return {"auto_contrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[name](image)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_equal_pil_s(name, sign):
    """Within 2 of 255 at all but 1 % of the pixels: PIL rounds intermediate results."""
    images = photographs()
    changed = recolor(images, range(8), [[Change(name, 0.9, sign)] for _ in images], ColorSettings(rand_augment=9))
    for before, after in zip(images, changed):
        expected = np.asarray(by_pil(name, 0.9, sign, Image.fromarray(before.permute(1, 2, 0).numpy())))
        difference = np.abs(after.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
        assert (difference > 2).mean() < 0.01, (difference.max(), difference.mean())
    assert changed.dtype == torch.uint8


def by_kornia(name, level, sign, images):
    """The operation on 8-bit images as version 0.1 computed it."""
    import kornia.enhance

    values, factors = images.float() / 255, torch.full((len(images),), 1 + sign * 0.9 * level)
    kornias = {
        "brightness": lambda: kornia.enhance.adjust_brightness_accumulative(values, factors),
        "contrast": lambda: kornia.enhance.adjust_contrast_with_mean_subtraction(values, factors),
        "saturation": lambda: kornia.enhance.adjust_saturation_with_gray_subtraction(values, factors),
        "sharpness": lambda: kornia.enhance.sharpness(values, factors),
        "posterize": lambda: kornia.enhance.posterize(values, torch.full((len(images),), max(4 - int(4 * level), 1))),
        "equalize": lambda: kornia.enhance.equalize(values),
        "invert": lambda: 1 - values,
        "solarize": lambda: torch.where(values >= torch.tensor(1 - level), 1 - values, values),
        "solarize_add": lambda: torch.where(values < 0.5, (values + torch.tensor(0.43 * level)).clamp(max=1), values),
        "auto_contrast": lambda: (
            (values - values.amin((-2, -1), True)) / (values.amax((-2, -1), True) - values.amin((-2, -1), True))
        ),
    }
    return (kornias[name]() * 255).round().clamp(0, 255).to(torch.uint8)


def deep_copies(images):
    """The same as 16-bit files, read by the range of their type: (B, channels, height, width) float32."""
    stored = (StoredValues(image.numpy().astype(np.uint16) * 257) for image in images)
    pictures = [DeepPicture(one, None, Reading(((0, 65535),) * images.shape[1])) for one in stored]
    return torch.stack([picture.crop((0, 0, *picture.size[::-1]), picture.size) for picture in pictures])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_a_deep_copy_is_changed_as_its_image(name, sign):
    """The image bit for bit as ever; the copy within the rounding to levels, which it is spared."""
    settings = ColorSettings(rand_augment=9)
    for channels in (1, 3) if name != "saturation" else (3,):
        images = photographs(channels=channels)
        for level in (0.3, 0.9):
            changes = [[Change(name, level, sign)] for _ in images]
            changed = recolor(images, range(8), changes, settings)
            assert torch.equal(changed, by_kornia(name, level, sign, images))
            of_copies = recolor(deep_copies(images), range(8), changes, settings)
            assert of_copies.dtype == torch.float32
            assert (of_copies * 255 - changed.float()).abs().max() < 0.5 + 1e-3


def test_drawn_changes_of_deep_copies_are_those_of_their_images():
    """Jitter and two operations each. Equalizing rounds jittered images to levels before it counts, and their copies not."""
    settings = ColorSettings(rand_augment=9.0, jitter=0.4)
    images = photographs().repeat(20, 1, 1, 1)
    changes = settings.draw_changes(range(160), 3)
    changed = recolor(images, range(160), changes, settings)
    of_copies = recolor(deep_copies(images), range(160), changes, settings, (0.3, 0.4, 0.5))
    alike = [all(change.name != "equalize" for change in of_image) for of_image in changes]
    assert sum(alike) > 140
    off = ((of_copies * 255 - changed.float()).abs() > 0.51).float().mean(dim=(1, 2, 3))[torch.tensor(alike)]
    assert off.max() < 0.01, "but for pixels on a threshold"


def test_deep_values_keep_their_depth():
    """What lies between two levels of 8 bits is neither lost nor out of order."""
    orders = torch.stack([torch.randperm(64 * 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    values = (orders / 64**2 * 0.05 + 0.4).view(2, 1, 64, 64)  # 13 levels
    order = values.flatten(1).argsort(dim=1)
    for name in ("equalize", "auto_contrast", "invert", "brightness", "contrast", "solarize_add"):
        changed = recolor(values, range(2), [[Change(name, 0.3, 1)]] * 2, ColorSettings(rand_augment=9)).flatten(1)
        assert min(len(row.unique()) for row in changed) > 3500, name
        steps = changed.gather(1, order).diff(dim=1) * (-1 if name == "invert" else 1)
        assert steps.min() >= 0, name
    assert changed.max() < 0.6 and changed.min() > 0.5
    equalized = recolor(values, range(2), [[Change("equalize", 0.3, 1)]] * 2, ColorSettings(rand_augment=9))
    shares = torch.arange(64 * 64) / (16 * 255)  # a step of (4,096 − 1) // 255 pixels a level
    assert torch.allclose(equalized.flatten(1).sort(dim=1).values, shares.clamp(max=1).expand(2, -1), atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_pixels_without_data_stay_without_and_count_in_no_distribution(name):
    """The encoder sees the mean there, whatever is inverted or stretched around them."""
    images = deep_copies(photographs()) * 0.5 + 0.2
    with_holes = images.clone()
    with_holes[:, :, :16] = torch.nan
    settings = ColorSettings(rand_augment=9)
    changes, mean = [[Change(name, 0.9, -1)] for _ in images], (0.05, 0.9, 0.99)
    changed = recolor(with_holes, range(8), changes, settings, mean)
    assert torch.equal(changed.isnan(), with_holes.isnan())
    if name not in ("contrast", "sharpness"):  # which look at what is around a pixel, where the mean stands for the holes
        rest = recolor(images[:, :, 16:].contiguous(), range(8), changes, settings, mean)
        assert torch.allclose(changed[:, :, 16:], rest, atol=1e-6)
    augment = BatchChanges(color=ColorSettings(9.0, 2, 0.5, jitter=0.4)).augment
    for seeds in (range(8), range(8, 16)):
        still = [all(change.name not in MOVEMENTS for change in row) for row in settings.draw_changes(seeds, 3)]
        normalized = augment(with_holes, seeds, mean, (0.2,) * 3)
        assert any(still) and (normalized[torch.tensor(still)][:, :, :12].abs().max() < 1e-5)


def test_every_image_has_its_own_operations_in_order():
    images = photographs()
    first, second = Change("brightness", 0.5, 1), Change("invert", 0.0, 1)
    changes = [[], [first], [second], [first, second], [second, first], [Change("rotate", 1.0, 1)], [], [second]]
    changed = recolor(images, range(8), changes, ColorSettings(rand_augment=9))
    alone = [recolor(images[row : row + 1], [row], [changes[row]], ColorSettings(rand_augment=9)) for row in range(8)]
    assert torch.equal(changed, torch.cat(alone))
    assert torch.equal(changed[[0, 5, 6]], images[[0, 5, 6]])
    assert not torch.equal(changed[3], recolor(images[3:4], [3], [[second, first]], ColorSettings(rand_augment=9))[0])


def test_draws_follow_from_seeds_alone():
    settings = ColorSettings(rand_augment=9.0, operations=2, spread=0.5)
    drawn = settings.draw_changes(SEEDS, 3)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert settings.draw_changes([7, 3], 3) == [drawn[7], drawn[3]]
    changes = [change for of_image in drawn for change in of_image]
    assert abs(len(changes) / (2 * len(SEEDS)) - 0.5) < 4 * 0.5 / (2 * len(SEEDS)) ** 0.5, "each with probability one half"
    counts = Counter(change.name for change in changes)
    assert set(counts) == set(operations_for(3)) and len(counts) == 15
    assert max(counts.values()) < 1.35 * min(counts.values())
    levels = np.array([change.level for change in changes])
    assert abs(levels.mean() - 0.9) < 0.01 and 0.03 < levels.std() < 0.06 and levels.max() <= 1
    assert abs(sum(change.sign for change in changes)) < 4 * len(changes) ** 0.5


def test_operations_depend_on_the_channels():
    assert "saturation" not in operations_for(1) and "invert" in operations_for(1)
    assert set(operations_for(5)) == {*MOVEMENTS, "brightness", "contrast", "sharpness"}


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels):
    changes = BatchChanges(AffineSettings(10, 0.1), ColorSettings(9.0, 2, 0.5, jitter=0.4), 0.5, MixSettings(0.8, 1.0))
    images = photographs(channels=channels)
    labels = F.one_hot(torch.arange(8), 8).float()
    changed = changes.augment(images, SEEDS[:8], (0.5,) * channels, (0.5,) * channels)
    mixed, targets = changes.mix(changed, labels, SEEDS[:8])
    assert mixed.shape == images.shape and mixed.dtype == torch.float32 and mixed.isfinite().all()
    assert not torch.equal(changed, mixed) and torch.allclose(targets.sum(dim=1), torch.ones(8), atol=1e-6)


def test_jitter_stays_in_its_range():
    factors = ColorSettings(jitter=0.4).draw_jitter(SEEDS)
    assert factors[:, 0].tolist() == pytest.approx([0.629027, 0.64625, 0.638935], abs=1e-6), "the draws of version 0.1"
    assert factors.shape == (3, len(SEEDS)) and factors.min() >= 0.6 and factors.max() <= 1.4
    assert factors.min() < 0.602 and factors.max() > 1.398 and torch.corrcoef(factors).triu(1).abs().max() < 0.1
    images = photographs()
    jittered = recolor(images, range(8), [[] for _ in images], ColorSettings(jitter=0.4))
    assert (jittered.flatten(1) != images.flatten(1)).any(dim=1).all()


def test_movements_are_matrices_from_output_to_input():
    """Level 1 of a translation is 0.45 of a side, which is 2 long in these coordinates; movements are multiplied."""
    changes = [[Change("translate_x", 1.0, 1)], [Change("invert", 1.0, 1)], [Change("rotate", 1.0, 1)] * 3]
    matrices = movement_matrices(changes)
    assert torch.allclose(matrices[0], torch.tensor([[1, 0, 0.9], [0, 1, 0]]))
    assert torch.allclose(matrices[1], torch.eye(3)[:2])
    assert torch.allclose(matrices[2], torch.tensor([[0.0, -1, 0], [1, 0, 0]]), atol=1e-6), "three times 30°"
    assert movement_matrices([[Change("invert", 1.0, 1)]]) is None


def test_affine_changes_and_movements_are_one_warp():
    """A shift by two columns and one by three are a shift by five."""
    images = photographs()
    both = BatchChanges(color=ColorSettings(9.0))
    first = torch.eye(3)[:2].repeat(8, 1, 1)
    first[:, 0, 2] = 2 * 2 / 48
    moved = first.clone()
    moved[:, 0, 2] = 2 * 3 / 48

    class Shift(AffineSettings):
        active = True

        def matrices(self, seeds):
            return first

    both = BatchChanges(affine=Shift())
    assert torch.allclose(both.matrices(SEEDS[:8], moved)[:, 0, 2], torch.tensor(2 * 5 / 48))
    assert torch.equal(both.matrices(SEEDS[:8], None), first)
    assert torch.equal(BatchChanges().augment(images, SEEDS[:8], **PLAIN), normalize(images, **PLAIN)), "no changes"


# --- erasing ---------------------------------------------------------------------------------------------------------


def test_erased_boxes():
    boxes = [draw_box(seed, 0.25, 60, 90) for seed in SEEDS]
    drawn = np.array([box for box in boxes if box is not None])
    assert abs(len(drawn) / len(SEEDS) - 0.25) < 0.03
    top, left, rows, columns = drawn.T
    assert (top >= 0).all() and (left >= 0).all() and (top + rows <= 60).all() and (left + columns <= 90).all()
    share, ratio = rows * columns / 5400, rows / columns
    assert share.min() > AREA[0] * 0.8 and share.max() < AREA[1] * 1.1 and ratio.min() > 0.25 and ratio.max() < 4
    assert [draw_box(seed, 0.0, 60, 90) for seed in SEEDS[:20]] == [None] * 20


def test_noise_fills_the_box_alone():
    images = torch.full((40, 3, 32, 32), 7.0)
    erased = erase(images, SEEDS[:40], 0.5)
    for row, seed in enumerate(SEEDS[:40]):
        changed = (erased[row] != 7).any(dim=0)
        box = draw_box(seed, 0.5, 32, 32)
        if box is None:
            assert not changed.any()
        else:
            top, left, rows, columns = box
            expected = torch.zeros(32, 32, dtype=torch.bool)
            expected[top : top + rows, left : left + columns] = True
            assert torch.equal(changed, expected)
    noise = erased[erased != 7]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(erase(images[5:9], SEEDS[5:9], 0.5), erased[5:9]), "whatever the batch"
    assert (images == 7).all(), "the batch itself is not changed"


# --- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 12), (32, 32), (6, 5)])
@pytest.mark.parametrize("settings", [MixSettings(0.8, 0), MixSettings(0, 1.0), MixSettings(0.8, 1.0, 0.6)])
def test_targets_match_the_share_of_the_pixels(settings, size):
    """The mean over the pixels of images of one value each is the mean of the values in the shares of the targets."""
    count, values = 64, torch.arange(64.0)
    images = values.view(-1, 1, 1, 1).expand(count, 2, *size).clone()
    targets = torch.eye(count)
    mixed, shared = mix(images, targets, [settings.draw(seed, *size) for seed in SEEDS[:count]])
    assert torch.allclose(shared.double().sum(dim=1), torch.ones(count).double(), atol=1e-6) and (shared >= 0).all()
    assert torch.allclose(mixed.double().mean(dim=(1, 2, 3)), shared.double() @ values.double(), atol=1e-4)
    assert ((shared > 0).sum(dim=1) <= 2).all() and (shared.diag() < 1).any()


def test_boxes_are_clipped_at_the_edges():
    """Boxes of three quarters of the area, against a count of their pixels."""
    clipped = 0
    for seed in SEEDS[:300]:
        one = draw_cut(0.25, random.Random(seed), 20, 30)
        top, left, bottom, right = one.box
        assert 0 <= top <= bottom <= 20 and 0 <= left <= right <= 30
        inside = np.zeros((20, 30), bool)
        inside[top:bottom, left:right] = True
        assert one.share == pytest.approx(1 - inside.mean(), abs=1e-12)
        clipped += one.share > 0.26
    assert clipped > 200


def test_shares_have_a_beta_distribution_and_both_kinds_are_equally_frequent():
    drawn = [MixSettings(0.8, 1.0).draw(seed, 200, 200) for seed in SEEDS]
    blended = np.array([one.share for one in drawn if one.box is None])
    assert abs(len(blended) / len(drawn) - 0.5) < 0.04
    assert abs(blended.mean() - 0.5) < 0.02 and blended.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.06)
    alone = [MixSettings(0.8, 0.0, 0.3).draw(seed, 8, 8) for seed in SEEDS]
    assert abs(np.mean([one == Mix(1.0) for one in alone]) - 0.7) < 0.03


def test_loss_of_mixed_and_smoothed_targets():
    """Against float64: smoothed targets are (1 − s) of each share, and s spread over all classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    shares = torch.rand(6, 4, generator=generator)
    shares /= shares.sum(dim=1, keepdim=True)
    weights = torch.tensor([0.5, 1.0, 1.0, 2.0])
    soft = shares.double() * 0.9 + 0.1 / 4
    losses = -(soft * logits.double().log_softmax(dim=1)).sum(dim=1)
    assert torch.allclose(soft.sum(dim=1), torch.ones(6).double(), atol=1e-6)
    assert soft_cross_entropy(logits, shares, 0.1).item() == pytest.approx(losses.mean().item(), abs=1e-6)
    weighed = (losses * (shares.double() @ weights.double())).mean()
    assert soft_cross_entropy(logits, shares, 0.1, weights).item() == pytest.approx(weighed.item(), abs=1e-6)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert soft_cross_entropy(logits, F.one_hot(labels, 4).float(), 0.1).item() == pytest.approx(hard.item(), abs=1e-6)
