"""Block masks: exact counts, whole units, and randomness that only the generator or an image's seed decides."""

import math
from fractions import Fraction

import pytest
import torch

from simmim.methods.masking import BlockMasking


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def units_of(mask, scale):
    """(B, H, W) cut into (B, rows, columns, scale²)."""
    return mask.unfold(1, scale, scale).unfold(2, scale, scale).flatten(3)


@pytest.mark.parametrize("ratio", [0.05, 0.07, 0.1, 0.25, 0.28, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.75, 0.9])
@pytest.mark.parametrize(
    "unit_px, patch_size, size",
    [(32, 4, (192, 192)), (16, 4, (160, 16)), (8, 2, (40, 40)), (16, 8, (160, 160)), (4, 4, (20, 56)), (5, 5, (15, 50))],
)
def test_count_and_whole_units(ratio, unit_px, patch_size, size):
    """⌈ratio · units⌉ of the decimal ratio, in exact arithmetic: 0.6 · 10 is 6, 0.55 · 100 is 55, 0.28 · 25 is 7."""
    masking = BlockMasking(unit_px, ratio, patch_size)
    rows, columns = size[0] // unit_px, size[1] // unit_px
    expected = math.ceil(Fraction(str(ratio)) * rows * columns)
    assert masking.grid(size) == (rows, columns) and masking.num_masked_units(size) == expected
    mask = masking.draw(5, size, generator())
    assert mask.dtype == torch.bool and mask.shape == (5, size[0] // patch_size, size[1] // patch_size)
    units = units_of(mask, unit_px // patch_size)
    assert units.shape[1:3] == (rows, columns)
    assert torch.equal(units.any(-1), units.all(-1))
    assert units.any(-1).sum(dim=(1, 2)).tolist() == [expected] * 5


@pytest.mark.parametrize("ratio, units, count", [(0.6, 10, 6), (0.55, 100, 55), (0.07, 100, 7), (0.6, 36, 22), (0.01, 4, 1)])
def test_known_counts(ratio, units, count):
    assert BlockMasking(4, ratio).num_masked_units((4, 4 * units)) == count


def test_true_is_masked():
    """At a ratio of 0.9 most is True."""
    assert BlockMasking(8, 0.9).draw(2, (80, 80), generator()).float().mean().item() == pytest.approx(0.9)


def test_the_generator_decides():
    masking, size = BlockMasking(16, 0.5), (96, 128)
    first = masking.draw(4, size, generator(1))
    assert torch.equal(masking.draw(4, size, generator(1)), first)
    assert not torch.equal(masking.draw(4, size, generator(2)), first)
    going_on = generator(1)
    masking.draw(4, size, going_on)
    assert not torch.equal(masking.draw(4, size, going_on), first)
    assert len({tuple(mask.flatten().tolist()) for mask in first}) == 4


def test_image_seeds_ignore_batch_and_generator():
    masking, size = BlockMasking(16, 0.6), (96, 64)
    batch = masking.draw(3, size, generator(0), seeds=[7, 8, 9])
    for index, seed in enumerate([7, 8, 9]):
        assert torch.equal(masking.draw(1, size, generator(index + 50), seeds=[seed])[0], batch[index])
    assert torch.equal(masking.draw(3, size, generator(5), seeds=[9, 7, 8]), batch[[2, 0, 1]])
    assert not torch.equal(batch[0], batch[1]) and not torch.equal(batch[1], batch[2])
    same = masking.draw(2, size, generator(), seeds=[4, 4])
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("seeds", [[1, 2], [1, 2, 3, 4], []])
def test_one_seed_per_image(seeds):
    with pytest.raises(ValueError):
        BlockMasking(16).draw(3, (96, 96), generator(), seeds=seeds)


@pytest.mark.parametrize("seeded", [False, True])
def test_uniform(seeded):
    """Each unit is masked with the ratio's frequency and each pair with that of draws without replacement."""
    draws, units, count = 8000, 20, 8
    seeds = list(range(draws)) if seeded else None
    mask = BlockMasking(4, 0.4).draw(draws, (16, 20), generator(), seeds).flatten(1).double()
    frequency = mask.mean(0)
    assert (frequency - count / units).abs().max() < 5 * (0.4 * 0.6 / draws) ** 0.5
    pairs = mask.T @ mask / draws
    expected = count * (count - 1) / (units * (units - 1))
    off_diagonal = pairs[~torch.eye(units, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 5 * (expected * (1 - expected) / draws) ** 0.5


@pytest.mark.parametrize("seeds", [None, [1, 2]])
def test_global_randomness_is_untouched(seeds):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = BlockMasking().draw(2, (192, 192), generator(), seeds)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(BlockMasking().draw(2, (192, 192), generator(), seeds), first)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"unit_px": 30},
            "mask unit is 30 px and patches are 4 px: give a multiple of the patch size, for instance 28 or 32",
        ),
        ({"unit_px": 2}, "4 or 8"),
        ({"unit_px": 0}, "multiple of the patch size"),
        ({"unit_px": -4}, "multiple of the patch size"),
        ({"ratio": 0.0}, "mask ratio is 0.0: give a number between 0 and 1"),
        ({"ratio": 1.0}, "mask ratio is 1.0"),
        ({"ratio": -0.1}, "mask ratio is -0.1"),
        ({"ratio": 60}, "mask ratio is 60"),
        ({"ratio": float("nan")}, "mask ratio is nan"),
        ({"patch_size": 0}, "patch size is 0 px"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        BlockMasking(**settings)


@pytest.mark.parametrize(
    "unit_px, size, message",
    [
        (32, (200, 200), r"mask unit of 32 px does not divide an image of 200×200 px; units that do: 4, 8, 20, 40, 100$"),
        (32, (96, 80), r"96×80 px; units that do: 4, 8, 16$"),
        (32, (224, 30), "choose another image size"),
        (32, (0, 32), "does not divide"),
    ],
)
def test_units_that_do_not_fit(unit_px, size, message):
    masking = BlockMasking(unit_px)
    for call in (masking.grid, masking.num_masked_units, lambda size: masking.draw(1, size, generator())):
        with pytest.raises(ValueError, match=message):
            call(size)


def test_suggested_units_fit():
    for unit in (4, 8, 20, 40, 100):
        assert BlockMasking(unit).draw(1, (200, 200), generator()).shape == (1, 50, 50)


@pytest.mark.parametrize("unit_px, ratio, size", [(32, 0.6, (32, 32)), (32, 0.6, (32, 64)), (16, 0.95, (64, 64))])
def test_ratios_that_mask_all_units(unit_px, ratio, size):
    message = rf"mask ratio {ratio} masks all \d+ units of {unit_px} px .* give a smaller unit or ratio"
    with pytest.raises(ValueError, match=message):
        BlockMasking(unit_px, ratio).draw(1, size, generator())
