"""Dense predictions of images of any size: windows that cover the image, their averages, classes of resized logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.finetune.dense.windows import OVERLAP, pad_to, window_starts
from simmim.finetune.segmentation.model import HeadShape, Segmenter
from simmim.finetune.segmentation.sliding import dense_logits, most_likely_class, sliding_logits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (1, 1), (1, 2), window_size=4))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return Segmenter(encoder, 3, HeadShape(width=16)).eval()


@pytest.mark.parametrize("side, window", [(10, 16), (16, 16), (17, 16), (40, 16), (64, 64), (1000, 97), (3, 1), (50, 2)])
def test_windows_cover_a_side_and_overlap(side, window):
    starts = window_starts(side, window)
    assert starts[0] == 0
    assert side <= window or starts[-1] == side - window
    for before, after in itertools.pairwise(starts):
        assert 0 < after - before <= max(1, window * (1 - OVERLAP))


@pytest.mark.parametrize("size", [(32, 32), (20, 32), (32, 9), (7, 13)])
def test_one_window_is_the_whole_image(model, size):
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole, slid = (dense_logits(model, images, (32, 32), inference) for inference in ("whole", "slide"))
    assert whole.shape == (2, 3, *size)
    assert torch.equal(whole, slid)


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_padding_moves_no_pixel(model, inference):
    """The encoder pads images to whole patches: who does it before has the same logits at the same places."""
    images, window = torch.randn(1, 3, 30, 53), (30, 30)
    padded = F.pad(images, (0, 3, 0, 2))
    with torch.no_grad():
        found = dense_logits(model, images, window, inference, model.stride)
        if inference == "whole":
            expected = dense_logits(model, padded, window, inference)
        else:
            views = (F.pad(images[..., left : left + 30], (0, 2, 0, 2)) for left in (0, 12, 23))
            expected = torch.zeros(1, 3, 30, 53)
            for left, view in zip((0, 12, 23), views):
                expected[..., left : left + 30] += dense_logits(model, view, (32, 32), "whole")[..., :30, :30]
            expected /= torch.tensor([1.0] * 12 + [2.0] * 11 + [3.0] * 7 + [2.0] * 12 + [1.0] * 11)
    assert window_starts(53, 30) == [0, 12, 23]
    torch.testing.assert_close(found, expected[..., :30, :53], atol=1e-6, rtol=1e-5)


def test_overlapping_windows_are_averaged(model):
    """Against a plain loop over windows and pixels."""
    images = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        found = dense_logits(model, images, (32, 32), "slide")
        total, count = torch.zeros(2, 3, 45, 70, dtype=torch.float64), torch.zeros(45, 70)
        for top in (0, 13):
            for left in (0, 19, 38):
                logits = model(images[:, :, top : top + 32, left : left + 32])
                logits = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
                total[:, :, top : top + 32, left : left + 32] += logits
                count[top : top + 32, left : left + 32] += 1
    assert window_starts(45, 32) == [0, 13] and window_starts(70, 32) == [0, 19, 38]
    torch.testing.assert_close(found, (total / count).float(), atol=1e-6, rtol=1e-5)


def test_windows_per_forward_do_not_matter(model):
    images = torch.randn(1, 3, 50, 80)
    with torch.no_grad():
        together, single = (sliding_logits(model, images, (32, 32), 4, count) for count in (8, 1))
    torch.testing.assert_close(single, together, atol=1e-6, rtol=1e-5)


def test_auto_passes_images_whole_up_to_four_windows():
    calls = []

    def model(images):
        calls.append(tuple(images.shape[2:]))
        return images[:, :2, ::4, ::4]

    dense_logits(model, torch.zeros(1, 3, 64, 64), (32, 32))
    assert calls == [(64, 64)]
    dense_logits(model, torch.zeros(1, 3, 64, 65), (32, 32))
    assert set(calls[1:]) == {(32, 32)}


def test_small_images_are_padded_with_the_mean():
    images = torch.ones(1, 2, 3, 5)
    padded = pad_to(images, (4, 4))
    assert padded.shape == (1, 2, 4, 5)
    assert torch.equal(padded[:, :, :3], images) and not padded[:, :, 3:].any()


@pytest.mark.parametrize("max_scores", [2**26, 100, 1])
def test_classes_are_those_of_the_resized_logits(max_scores):
    logits = torch.randn(2, 7, 5, 6)
    expected = F.interpolate(logits, (13, 17), mode="bilinear", align_corners=False).argmax(dim=1)
    assert torch.equal(most_likely_class(logits, (13, 17), max_scores), expected)
    assert torch.equal(most_likely_class(logits, (5, 6), max_scores), logits.argmax(dim=1))
