"""Reconstruction pictures: what was visible is shown as it was, what was masked as it was predicted."""

import numpy as np
import pytest
import torch

from simmim.pretrain.reconstruction_grid import (
    COLUMNS,
    GAP_PX,
    LABEL_PX,
    MASK_GRAY,
    reconstruction_grid,
    reconstruction_panels,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def example(count=3, channels=3, size=(8, 12), patch=4, seed=0):
    """Images and predictions in [0, 1], the same normalized, and a mask with both kinds of entries in each image."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    shown = torch.rand(2, count, channels, *size, generator=generator)
    mask = torch.rand(count, size[0] // patch, size[1] // patch, generator=generator) < 0.5
    mask[:, 0, 0], mask[:, -1, -1] = True, False
    return shown, (shown - mean) / std, mask


def hidden_pixels(mask, patch=4):
    """(B, H, W) to (B, height, width), by way of numpy."""
    return torch.from_numpy(np.kron(mask.numpy(), np.ones((patch, patch), dtype=bool)))


@pytest.mark.parametrize("size, patch", [((8, 12), 4), ((24, 8), 8), ((6, 6), 1)])
def test_panels(size, patch):
    shown, (images, prediction), mask = example(size=size, patch=patch)
    panels = reconstruction_panels(images, mask, prediction, MEAN, STD)
    assert panels.shape == (3, 4, 3, *size)
    original, masked, pasted, full = panels.unbind(1)
    hidden = hidden_pixels(mask, patch)[:, None].expand_as(original)
    assert (original - shown[0]).abs().max() < 1e-6 and (full - shown[1]).abs().max() < 1e-6
    assert torch.equal(pasted[~hidden], original[~hidden]) and torch.equal(pasted[hidden], full[hidden])
    assert torch.equal(masked[~hidden], original[~hidden]) and (masked[hidden] == MASK_GRAY).all()
    assert not torch.equal(pasted, original) and not torch.equal(pasted, full)


def test_out_of_range_predictions_are_clipped():
    _, (images, prediction), mask = example()
    panels = reconstruction_panels(images, mask, prediction * 100, MEAN, STD)
    assert panels.min() == 0 and panels.max() == 1


def test_inputs_are_left_alone():
    _, (images, prediction), mask = example()
    before = [value.clone() for value in (images, mask, prediction)]
    reconstruction_grid(images, mask, prediction, MEAN, STD)
    assert all(torch.equal(old, new) for old, new in zip(before, (images, mask, prediction)))


def test_one_channel_is_gray():
    shown, (images, prediction), mask = example(channels=1)
    panels = reconstruction_panels(images, mask, prediction, MEAN[:1], STD[:1])
    assert panels.shape == (3, 4, 3, 8, 12)
    assert torch.equal(panels[:, :, 0], panels[:, :, 1]) and torch.equal(panels[:, :, 0], panels[:, :, 2])
    assert (panels[:, 0, :1] - shown[0]).abs().max() < 1e-6
    picture = np.asarray(reconstruction_grid(images, mask, prediction, MEAN[:1], STD[:1]))
    assert (picture[..., :1] == picture).all()


def test_many_channels_are_a_composite():
    """The first is red, and none is left out."""
    images = torch.zeros(1, 5, 8, 8)
    images[0, 0, :4], images[0, 4, 4:] = 0.5, 1.0
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    panels = reconstruction_panels(images, mask, images, [0.0] * 5, [1.0] * 5)
    red, magenta = panels[0, 0, :, 0, 0], panels[0, 0, :, 7, 0]
    assert torch.equal(red, torch.tensor([0.5, 0.0, 0.0])) and torch.allclose(magenta, torch.tensor([0.8, 0.0, 1.0]))
    assert (panels[0, 1] == MASK_GRAY).all(), "five half bright channels would be white"


def test_a_composite_of_bright_channels_is_not_white():
    """As of satellites: colors are apart as long as the channels are, and the prediction is as bright as the original."""
    images = torch.full((1, 5, 8, 8), 0.9)
    images[0, 1, :4] = 0.5
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    panels = reconstruction_panels(images, mask, images, [0.0] * 5, [1.0] * 5)
    upper, lower = panels[0, 0, :, 0, 0], panels[0, 0, :, 7, 0]
    assert lower.max() == 1.0 and (lower - upper).max() > 0.1
    assert torch.equal(panels[0, 0], panels[0, 3]) and torch.equal(panels[0, 0], panels[0, 1])


def cell(picture, row, column, view, size, block=0):
    """Pixels of one cell, by the picture's own rules: four cells a block, labels above."""
    height, width = size
    left = column * block + view * (width + GAP_PX)
    top = LABEL_PX + row * (height + GAP_PX)
    return picture[top : top + height, left : left + width]


def test_large_images_are_shown_pixel_by_pixel():
    size = (96, 128)
    shown, (images, prediction), mask = example(2, size=size)
    picture = reconstruction_grid(images, mask, prediction, MEAN, STD)
    assert picture.mode == "RGB"
    assert picture.size == (4 * 128 + 3 * GAP_PX, LABEL_PX + 2 * (96 + GAP_PX))
    pixels, panels = np.asarray(picture), reconstruction_panels(images, mask, prediction, MEAN, STD)
    for row in range(2):
        for view in range(4):
            expected = (panels[row, view] * 255).round().permute(1, 2, 0).numpy()
            assert np.array_equal(cell(pixels, row, 0, view, size), expected)
        gap = pixels[LABEL_PX + row * (96 + GAP_PX) :, 128 : 128 + GAP_PX]
        assert (gap == 255).all(), "cells are apart"
    original = np.asarray((shown[0, 1] * 255).round().permute(1, 2, 0))
    assert np.abs(cell(pixels, 1, 0, 0, size) - original).max() <= 1
    gray = cell(pixels, 0, 0, 1, size)[:4, :4]
    assert (gray == round(MASK_GRAY * 255)).all(), "the first patch of the example is masked"
    assert (pixels[:LABEL_PX] < 128).any(), "columns are labeled"


@pytest.mark.parametrize("size, factor", [((32, 32), 3), ((8, 12), 8), ((28, 28), 4), ((96, 96), 1), ((50, 90), 2)])
def test_small_images_are_enlarged_by_whole_pixels(size, factor):
    _, (images, prediction), mask = example(1, size=size, patch=2)
    picture = reconstruction_grid(images, mask, prediction, MEAN, STD)
    height, width = size[0] * factor, size[1] * factor
    assert picture.size == (4 * width + 3 * GAP_PX, LABEL_PX + height + GAP_PX)
    panel = (reconstruction_panels(images, mask, prediction, MEAN, STD)[0, 2] * 255).round().permute(1, 2, 0).numpy()
    expected = np.kron(panel, np.ones((factor, factor, 1)))
    assert np.array_equal(cell(np.asarray(picture), 0, 0, 2, (height, width)), expected)


@pytest.mark.parametrize("count, across, rows", [(5, 2, 3), (4, 2, 2), (3, 3, 1), (7, 3, 3), (2, 1, 2)])
def test_images_beside_one_another(count, across, rows):
    size = (96, 100)
    _, (images, prediction), mask = example(count, size=size)
    picture = reconstruction_grid(images, mask, prediction, MEAN, STD, across)
    block = len(COLUMNS) * (100 + GAP_PX) + 3 * GAP_PX
    assert picture.size == (across * block - 4 * GAP_PX, LABEL_PX + rows * (96 + GAP_PX))
    panels = (reconstruction_panels(images, mask, prediction, MEAN, STD) * 255).round()
    for index in range(count):
        for view in (0, 3):
            shown = cell(np.asarray(picture), index // across, index % across, view, size, block)
            assert np.array_equal(shown, panels[index, view].permute(1, 2, 0).numpy())
