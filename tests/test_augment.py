"""Affine changes of labeled images against known numbers."""

import math

import numpy as np
import pytest
import torch

from simmim.finetune.augment.affine import AffineSettings, affine_matrix, warp

IDENTITY = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
SEEDS = list(range(2000))


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def matrix_of(*arguments, **keywords):
    """`affine_matrix` for one image, (1, 2, 3)."""
    return torch.tensor([affine_matrix(*arguments, **keywords)])


def test_all_zero_is_the_identity():
    settings = AffineSettings()
    assert not settings.active and torch.equal(settings.matrices(SEEDS[:50]), IDENTITY.expand(50, 2, 3))
    for name in ("degrees", "zoom", "shear", "shift"):
        assert AffineSettings(**{name: 0.1}).active


def test_matrices_follow_from_the_seeds():
    settings = AffineSettings(10, 0.1, 0.1, 0.05)
    first = settings.matrices(SEEDS)
    assert first.dtype == torch.float32 and torch.equal(settings.matrices(SEEDS), first)
    assert torch.equal(settings.matrices([7, 3]), first[[7, 3]]), "whatever the batch"
    assert len({tuple(matrix.flatten().tolist()) for matrix in first}) == len(SEEDS)


def test_rotations_stay_in_their_range():
    matrices = AffineSettings(degrees=30).matrices(SEEDS).double()
    linear, shift = matrices[..., :2], matrices[..., 2]
    assert torch.allclose(linear @ linear.mT, torch.eye(2).double(), atol=1e-6)
    assert torch.allclose(torch.linalg.det(linear), torch.ones(1).double(), atol=1e-6) and (shift == 0).all()
    angles = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0]))
    assert angles.abs().max() <= 30 + 1e-4 and angles.min() < -29 and angles.max() > 29
    assert abs(angles.mean()) < 4 * 30 / (3 * len(SEEDS)) ** 0.5


def test_zooms_stay_in_their_range():
    """0.8 to 1 / 0.8 on each axis, and independently."""
    matrices = AffineSettings(zoom=0.2).matrices(SEEDS)
    zooms = torch.stack([matrices[:, 0, 0], matrices[:, 1, 1]])
    assert (matrices[:, [0, 1], [1, 0]] == 0).all() and (matrices[..., 2] == 0).all()
    assert zooms.min() >= 0.8 - 1e-6 and zooms.max() <= 1.25 + 1e-6 and zooms.min() < 0.805 and zooms.max() > 1.24
    assert abs(torch.corrcoef(zooms)[0, 1]) < 0.1 and abs(zooms.log().mean()) < 0.02


def test_shears_and_shifts_stay_in_their_range():
    sheared = AffineSettings(shear=0.3).matrices(SEEDS)
    assert torch.equal(sheared[:, 1], IDENTITY[:, 1].expand(len(SEEDS), 3)) and (sheared[:, 0, 0] == 1).all()
    assert 0.29 < sheared[:, 0, 1].abs().max() <= 0.3 and (sheared[:, 0, 1] < -0.29).any()
    shifted = AffineSettings(shift=0.05).matrices(SEEDS)
    assert torch.equal(shifted[..., :2], IDENTITY[..., :2].expand(len(SEEDS), 2, 2))
    assert 0.099 < shifted[..., 2].abs().max() <= 0.1, "a side is 2 long in these coordinates"
    assert abs(torch.corrcoef(shifted[..., 2].T)[0, 1]) < 0.1


@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
def test_the_identity_changes_nothing(size):
    images = random_images(2, 3, *size)
    assert torch.allclose(warp(images, IDENTITY.expand(2, 2, 3)), images, atol=1e-5)


@pytest.mark.parametrize("right, down", [(2, 0), (0, 3), (-1, 2)])
def test_shift_by_whole_pixels(right, down):
    """A matrix leads from output to input: a positive x moves the content to the left. Edge pixels continue outwards."""
    height, width = 8, 10
    images = random_images(1, 2, height, width)
    matrix = IDENTITY.clone()
    matrix[0, :, 2] = torch.tensor([2 * right / width, 2 * down / height])
    rows = np.clip(np.arange(height) + down, 0, height - 1)
    columns = np.clip(np.arange(width) + right, 0, width - 1)
    assert torch.allclose(warp(images, matrix), images[:, :, rows][..., columns], atol=1e-5)


def test_shift_is_a_share_of_the_side():
    images = random_images(1, 1, 8, 16)
    moved = warp(images, matrix_of(shift_x=2 * 0.25, shift_y=2 * 0.25))
    assert torch.allclose(moved[:, :, :-2, :-4], images[:, :, 2:, 4:], atol=1e-5)


def test_positive_rotation_is_counterclockwise():
    """By 90°, 180° and 270° as torch.rot90 does it."""
    images = random_images(2, 3, 9, 9)
    for quarter in (1, 2, 3):
        matrices = matrix_of(angle=math.radians(90 * quarter)).expand(2, 2, 3)
        assert torch.allclose(warp(images, matrices), torch.rot90(images, quarter, (2, 3)), atol=1e-4)


def test_order_of_rotation_shear_and_zoom():
    """Rotation · shear · zoom, as the matrix product of the three."""
    angle, zoom = math.radians(20), 1 / (1 - 0.2)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = rotation @ torch.tensor([[1.0, 0.3], [0.0, 1.0]]) @ torch.diag(torch.tensor([zoom, zoom]))
    matrix = matrix_of(angle, zoom, zoom, shear=0.3, shift_x=0.2, shift_y=0.2)[0]
    assert torch.allclose(matrix[:, :2], expected, atol=1e-6) and torch.allclose(matrix[:, 2], torch.tensor(0.2))


def test_each_image_has_its_own_matrix():
    images, settings = random_images(3, 1, 12, 12), AffineSettings(10, 0.1, 0.1, 0.05)
    together = warp(images, settings.matrices([5, 6, 7]))
    for index in range(3):
        alone = warp(images[index : index + 1], settings.matrices([5 + index]))
        assert torch.allclose(alone[0], together[index], atol=1e-6)
    assert (together - images).abs().flatten(1).max(dim=1).values.min() > 0.05


@pytest.mark.parametrize("values", [{"degrees": -1}, {"zoom": 1.0}, {"zoom": -0.1}, {"shear": -0.1}, {"shift": -0.01}])
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=r"data\.affine\.\w+ is .+: give a number from 0 on"):
        AffineSettings(**values)


def test_a_rotation_of_an_image_that_is_not_square_is_a_rotation():
    """A horizontal line that is rotated by 45° has as many rows as columns, whatever the image's sides."""
    image = torch.zeros(1, 1, 33, 65)
    image[0, 0, 16, 22:43] = 1
    rotated = warp(image, matrix_of(angle=math.radians(45)))[0, 0]
    rows, columns = torch.nonzero(rotated > 0.3, as_tuple=True)
    assert abs((rows.max() - rows.min()) - (columns.max() - columns.min())) <= 1
