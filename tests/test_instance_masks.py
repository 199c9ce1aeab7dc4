"""Masks of objects in parts: views in step with pixels, conditional convolutions, the dice loss, grids of logits, and how
masks are judged."""

import random

import numpy as np
import pytest
import torch
from mask_files import CLASSES, draw_scenes, random_pixels, run_lengths
from PIL import Image

from simmim.data import Picture
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.finetune.detection import losses
from simmim.finetune.detection.ap import MASKS, Judged, average_precision, coco_labels, coco_results
from simmim.finetune.detection.condinst import CHANNELS, NUM_PARAMETERS, mask_logits
from simmim.finetune.detection.inference import Found, best_or_trusted, find_boxes
from simmim.finetune.detection.labels.scenes import Objects
from simmim.finetune.detection.losses import dice_losses, sum_losses, target_stride
from simmim.finetune.detection.masks import coco_rle, draw, pack, resized, sample
from simmim.finetune.detection.model import Detector, HeadShape
from simmim.finetune.detection.onnx import export_onnx
from simmim.finetune.detection.soft_masks import SoftMask, cells_between
from simmim.finetune.detection.views import RandomBoxes, Targets

# --- views -------------------------------------------------------------------------------------------------------------


def drawn(size=(60, 90)):
    """A dark picture with a disk, a triangle and a frame, each in a brightness of its own."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    frame = (abs(rows - 30) < 14) & (abs(columns - 75) < 12) & ~((abs(rows - 30) < 6) & (abs(columns - 75) < 5))
    shapes = [(rows - 20) ** 2 + (columns - 18) ** 2 < 150, (columns > 34) & (columns < 30 + rows / 2), frame]
    pixels = np.zeros(size, dtype=np.uint8)
    for level, shape in zip((120, 180, 240), shapes):
        pixels[shape] = level
    masks = tuple(map(pack, shapes))
    boxes = np.array([mask.box for mask in masks], dtype=np.float32)
    return Picture(Image.fromarray(pixels), 1), Objects(boxes, np.arange(3), np.zeros(3, dtype=bool), masks)


@pytest.mark.parametrize("seed", range(8))
def test_masks_stay_on_what_is_drawn(seed):
    """Through scale, crop, flip and padding. Where the view is half as bright as the object, or brighter, is its mask: they
    differ nowhere by more than a pixel, and along the whole outline by less than half of one."""
    picture, objects = drawn()
    image, targets = RandomBoxes((64, 72), 0, (0.5, 2.0), 0.5, (0,))(picture, objects, random.Random(seed))
    assert targets.masks.shape == (len(targets.boxes), 64, 72) and set(targets.masks.unique().tolist()) <= {0, 255}
    masks = targets.masks.bool()
    assert masks.any(dim=0).sum() > 100
    grown, shrunk = (sign * torch.nn.functional.max_pool2d(sign * masks.float(), 3, 1, 1) > 0.5 for sign in (1, -1))
    for number, mask, near, deep in zip(targets.classes.tolist(), masks, grown, shrunk):
        bright = (image[0] >= (120, 180, 240)[number] / 2) & ~(grown & (masks != mask)).any(dim=0)
        differs = (bright & torch.nn.functional.max_pool2d(near[None].float(), 3, 1, 1)[0].bool()) ^ mask
        assert not (differs & (deep | ~near)).any()
        assert differs.sum() < (mask & ~deep).sum() / 2


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_masks_are_exact_at_their_own_scale(flip, stride):
    """Pixel by pixel, mirrored too; of cells their share."""
    picture, objects = drawn()
    image, targets = RandomBoxes((64, 95), 0, (1.0, 1.0), flip, (0,), stride)(picture, objects, random.Random(0))
    assert targets.classes.tolist() == [0, 1, 2]
    for mask, level in zip(targets.masks.numpy(), (120, 180, 240)):
        pixels = np.zeros((66, 96), dtype=int)
        pixels[:64, :95] = image[0].numpy() == level
        cells = pixels[: -(-64 // stride) * stride, : -(-95 // stride) * stride].reshape(
            -(-64 // stride), stride, -1, stride
        )
        assert np.array_equal(mask, cells.sum(axis=(1, 3)) * 255 // stride**2) and mask.any()


def test_objects_outside_a_crop_have_no_mask():
    picture, objects = drawn()
    for seed in range(20):
        _, targets = RandomBoxes((24, 24), 0, (1.0, 1.0), 0.5, (0,), 2)(picture, objects, random.Random(seed))
        assert len(targets.masks) == len(targets.boxes) and targets.masks.shape[1:] == (12, 12)
        for mask, box in zip(targets.masks, targets.boxes):
            rows, columns = mask.nonzero().unbind(dim=1)
            if len(rows):
                assert 2 * columns.min() + 1 >= box[0] - 1 and 2 * columns.max() + 1 <= box[2] + 1
                assert 2 * rows.min() + 1 >= box[1] - 1 and 2 * rows.max() + 1 <= box[3] + 1


def test_samples_of_a_mask():
    pixels = np.zeros((6, 8), dtype=bool)
    pixels[2:5, 3:7] = [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    mask = pack(pixels)
    assert np.array_equal(sample(mask, np.arange(6), np.arange(8)) > 0, pixels)
    assert np.array_equal(sample(mask, np.arange(6)[::-1], np.arange(8)) > 0, pixels[::-1])
    assert not sample(mask, np.full(4, -1), np.arange(8)).any()
    assert sample(mask, np.arange(6), np.arange(8), 2)[1].tolist() == [0, 127, 191, 127]
    assert np.array_equal(draw(resized(mask, (6, 8), (12, 16)), (12, 16)), pixels.repeat(2, 0).repeat(2, 1))


# --- conditional convolutions ------------------------------------------------------------------------------------------


def test_masks_equal_networks_that_are_evaluated_cell_by_cell():
    """In float64, by the paper's figure 3: ten inputs, the first two the place seen from the point, ReLU between the layers,
    one logit."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(CHANNELS, 5, 7, generator=generator)
    parameters = torch.randn(3, NUM_PARAMETERS, generator=generator)
    points, units = torch.tensor([[3.0, 9.0], [20.0, 2.0], [14.0, 14.0]]), torch.tensor([32.0, 32, 64])
    found = mask_logits(features, 4, parameters, points, units)
    assert found.shape == (3, 5, 7) and NUM_PARAMETERS == 169
    for number in range(3):
        values = parameters[number].double()
        weights = values[:80].reshape(8, 10), values[80:144].reshape(8, 8), values[144:152].reshape(1, 8)
        biases = values[152:160], values[160:168], values[168:]
        for row in range(5):
            for column in range(7):
                place = (torch.tensor([column * 4 + 2.0, row * 4 + 2.0]).double() - points[number].double()) / units[number]
                cell = torch.cat([place, features[:, row, column].double()])
                for layer, (weight, bias) in enumerate(zip(weights, biases)):
                    cell = weight @ cell + bias
                    cell = cell.clamp(min=0) if layer < 2 else cell
                assert found[number, row, column].item() == pytest.approx(cell.item(), rel=1e-4, abs=1e-4)


def test_dice_loss_equals_its_equation():
    """1 − 2 Σ p q / (Σ p² + Σ q²), after bilinear enlargement, over the cells that lie in the view."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, generator=generator)
    wanted = torch.randint(0, 256, (2, 5, 7), generator=generator, dtype=torch.uint8)
    large = torch.nn.functional.interpolate(logits[None].double(), scale_factor=2, mode="bilinear")[0, :, :5, :7].sigmoid()
    share = wanted.double() / 255
    expected = 1 - 2 * (large * share).sum((1, 2)) / ((large**2).sum((1, 2)) + (share**2).sum((1, 2)))
    assert dice_losses(logits, wanted, 2).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    perfect = torch.where(torch.tensor([[1, 0], [0, 1]]).bool(), 50.0, -50.0)[None]
    assert dice_losses(perfect, (perfect > 0).to(torch.uint8) * 255, 1).item() == pytest.approx(0, abs=1e-5)
    assert [target_stride(stride) for stride in (1, 2, 4, 5)] == [1, 1, 2, 5]


def small_detector(channels=1, num_stages=2, num_above=0):
    torch.manual_seed(0)
    config = SwinV2Config(16, (1,) * num_stages, (1, 2, 2, 4, 4)[:num_stages], window_size=4, in_channels=channels)
    return Detector(build(config), 3, HeadShape(16, 1, num_above, True))


def targets_of(size, boxes, ignored=()):
    """Objects of class 2 whose masks fill their boxes, in cells of 2 px."""
    cells = torch.zeros(len(boxes), -(-size[0] // 2), -(-size[1] // 2), dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(cells, boxes):
        mask[y1 // 2 : y2 // 2, x1 // 2 : x2 // 2] = 255
    flags = torch.tensor([number in ignored for number in range(len(boxes))], dtype=torch.bool)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Targets(corners, torch.full((len(boxes),), 2), flags, cells)


@pytest.mark.parametrize("most", [256, 5])
def test_the_loss_of_masks_is_that_of_assigned_points(most, monkeypatch):
    """Of all of them, or of some that are evenly spread and stand for all; ignored objects have none."""
    monkeypatch.setattr(losses, "MAX_MASKS", most)
    predictions = small_detector()(torch.randn(2, 1, 37, 51, generator=torch.Generator().manual_seed(1)))
    targets = [
        targets_of((37, 51), [[30, 20, 50, 36], [4, 4, 30, 20]], {0}),
        targets_of((37, 51), [[2, 2, 20, 36], [24, 8, 48, 30]]),
    ]
    sums, values = sum_losses(predictions, targets), []
    counts = [height * width for height, width in predictions.sizes]
    for row, one in enumerate(targets):
        boxes, masks = one.boxes[~one.ignored], one.masks[~one.ignored]
        owner = losses.assign_points(predictions.points, predictions.strides, counts, boxes)
        for point in (owner >= 0).nonzero()[:, 0]:
            logits = mask_logits(
                predictions.mask_features[row],
                4,
                predictions.mask_parameters[row, point][None],
                predictions.points[point][None],
                8 * predictions.strides[point][None],
            )
            values.append(dice_losses(logits, masks[owner[point]][None], 2)[0].item())
    count = len(values)
    assert count == sums.num_positive > 8
    if most < count:
        values = [values[round(number * (count - 1) / (most - 1))] for number in range(most)]
    assert sums.masks.item() == pytest.approx(np.mean(values) * count, rel=1e-4)
    assert sums.total.item() == pytest.approx((sums.classes + 2 * sums.boxes + sums.centerness + sums.masks).item())


@pytest.mark.parametrize("boxes, ignored", [([], ()), ([[4, 4, 30, 20]], {0})])
def test_gradients_are_finite_without_objects(boxes, ignored):
    """And every parameter has one, as several devices need."""
    model = small_detector()
    sums = sum_losses(model(torch.randn(1, 1, 37, 51)), [targets_of((37, 51), boxes, ignored)])
    sums.total.backward()
    assert sums.masks == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not model.head.control.weight.grad.any()


@pytest.mark.parametrize("num_stages, channels, num_above", [(1, 1, 0), (2, 4, 1), (3, 10, 0), (5, 3, 1)])
def test_any_number_of_stages_channels_and_odd_sizes(num_stages, channels, num_above, tmp_path):
    """Gradients, masks of the image's size, and the ONNX file, which is compared with PyTorch."""
    model = small_detector(channels, num_stages, num_above)
    images = torch.randn(2, channels, 37, 51)
    sums = sum_losses(model(images), [targets_of((37, 51), [[4, 4, 30, 20]]), targets_of((37, 51), [])])
    sums.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert model.head.control.weight.grad.any() and model.head.masks.reduce.weight.grad.any()
    model.eval()
    torch.nn.init.normal_(model.head.control.weight, std=0.3)
    assert export_onnx(model, tmp_path / "model.onnx", (37, 51)) < 0.01
    for way in ("whole", "tiles"):
        [found] = find_boxes(model, images[:1], (32, 32), way)
        assert len(found.masks) == len(found.boxes) > 0
        assert found.draw_masks((37, 51)).shape == (len(found.boxes), 37, 51)
        assert coco_rle(found.at((37, 51), (370, 510)).masks[0].packed((370, 510)), (370, 510))["size"] == [370, 510]


# --- grids of logits ---------------------------------------------------------------------------------------------------


def test_grids_are_read_at_the_centers_of_pixels():
    """As torch enlarges a map, at a place of its own, clipped by the image."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(logits[None, None], scale_factor=4, mode="bilinear")[0, 0].numpy() > 0
    mask = SoftMask(logits.numpy(), (8, 12), (4, 4), (0, 0, 40, 40))
    expected = np.zeros((40, 40), dtype=bool)
    expected[8:32, 12:32] = large
    assert np.array_equal(draw(mask.packed((40, 40)), (40, 40)), expected)
    assert np.array_equal(draw(mask.packed((20, 20)), (20, 20)), expected[:20, :20])
    assert np.array_equal(draw(mask.moved((-8, 3)).packed((40, 40)), (40, 40))[:32, 3:], expected[8:, :-3])
    assert mask.scaled(2, 3)[1:] == ((16, 36), (8, 12), (0, 0, 80, 120)) and mask.packed((4, 4)).area == 0
    limited = draw(mask._replace(limits=(10, 14.4, 30.6, 31)).packed((40, 40)), (40, 40))
    assert np.array_equal(limited[10:31, 14:31], expected[10:31, 14:31]) and limited.sum() == limited[10:31, 14:31].sum()
    assert mask.moved((2, 3)).limits == (2, 3, 42, 43)


def test_masks_of_tiles_lie_where_those_of_the_whole_image_do():
    """A network whose mask is the object's brightness, whichever part of the image it sees."""
    from simmim.finetune.detection.pyramid import Predictions, grid_points

    def model(images):
        sizes, strides = (tuple(side // 4 for side in images.shape[2:]),), (4,)
        points, of_points = grid_points(sizes, strides)
        logits = torch.full((len(images), len(points), 1), -9.0)
        distances = torch.ones(len(images), len(points), 4)
        for row, image in enumerate(images[:, 0]):
            for level in (1.0, 2.0):
                rows, columns = (image == level).nonzero().unbind(dim=1)
                if len(rows):
                    box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                    point = (points - (box[:2] + box[2:]) / 2).square().sum(dim=1).argmin()
                    logits[row, point] = level
                    distances[row, point] = (box - points[point].repeat(2)) * torch.tensor([-1, -1, 1, 1])
        parameters = torch.zeros(len(images), len(points), NUM_PARAMETERS)
        parameters[..., 2] = parameters[..., 80] = parameters[..., 144] = 1  # the first feature goes through
        parameters[..., -1] = -0.5
        features = torch.zeros(len(images), CHANNELS, *sizes[0])
        features[:, 0] = torch.nn.functional.avg_pool2d((images > 0).float(), 4)[:, 0]
        centers = torch.full(logits.shape[:2], 9.0)
        return Predictions(logits, distances, centers, points, of_points, sizes, parameters, features)

    image = torch.zeros(1, 1, 64, 128)
    image[0, 0, 8:24, 16:28], image[0, 0, 32:60, 52:72] = 1, 2
    for way in ("whole", "tiles"):
        [found] = find_boxes(model, image, (64, 64), way)
        masks = found.draw_masks((64, 128))
        assert len(masks) == 2
        for mask, (x1, y1, x2, y2) in zip(masks, found.boxes.int().tolist()):
            wanted = torch.zeros(64, 128, dtype=torch.bool)
            wanted[y1:y2, x1:x2] = True
            assert (mask ^ wanted).sum() <= 4, "but for rounded corners"
        for mask, (x1, y1, x2, y2) in zip(found.masks, found.boxes.tolist()):
            down, across = (y2 - y1) / 20, (x2 - x1) / 20
            assert mask.limits == pytest.approx((y1 - down, x1 - across, y2 + down, x2 + across)), "a twentieth of each side"


def test_cells_around_a_box_surround_it_by_their_centers():
    """All places between two are read between centers, as far as there are cells, and no further cell is taken."""
    for stride, count in ((4, 9), (8, 5), (3, 7)):
        centers = [stride * (cell + 0.5) for cell in range(count)]
        for low in np.arange(-2, stride * count, 0.7).tolist():
            high = low + 1.3 * stride
            first, last = cells_between(low, high, stride, count)
            assert first == max([0, *(cell for cell in range(count) if centers[cell] <= low)])
            after = [cell + 1 for cell in range(count) if centers[cell] >= high]
            assert last == max(first + 1, min([count, *after]))


def test_more_objects_are_counted_than_are_judged():
    """The best 100 of any score, and all others that are trusted, with their masks."""
    scores, classes = torch.linspace(1, 0, 300), torch.arange(300) % 2
    masks = tuple(SoftMask(np.full((1, 1), number, np.float32), (0, 0), (4, 4), (0, 0, 4, 4)) for number in range(300))
    found = Found(torch.arange(1200).reshape(300, 4).float(), scores, classes, masks)
    kept = best_or_trusted(found, (0.5, 0.9))
    numbers = [number for number in range(300) if number < 100 or (number % 2 == 0 and scores[number] >= 0.5)]
    assert [int(mask.logits[0, 0]) for mask in kept.masks] == numbers == (kept.boxes[:, 0] / 4).int().tolist()


# --- how good masks are ------------------------------------------------------------------------------------------------


def test_masks_are_judged_as_by_pycocotools():
    """With crowds, an empty mask, and masks that are shifted."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator, images = np.random.default_rng(0), []
    for row, shapes in enumerate(draw_scenes(14, 5, (64, 64))):
        given = [run_lengths(shape.pixels) for shape in shapes]
        found = [np.roll(shape.pixels, generator.integers(-3, 4, 2), (0, 1)) for shape in shapes]
        found += [np.zeros((64, 64), bool)] * (row % 3 == 0) + [random_pixels(generator, (64, 64), "rectangles")]
        classes = np.array([CLASSES.index(shape.name) for shape in shapes])
        more = generator.integers(0, 2, len(found) - len(shapes))
        images.append(
            Judged(
                row,
                np.zeros((len(given), 4)),
                classes,
                generator.random(len(given)) < 0.2,
                np.zeros((len(found), 4)),
                generator.random(len(found)),
                np.concatenate([classes, more]),
                given,
                [run_lengths(pixels) for pixels in found],
                (64, 64),
            )
        )
    scores = average_precision(images, 2, MASKS)
    truth = COCO()
    truth.dataset = {"info": {}, **coco_labels(images, 2, MASKS)}
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(coco_results(images, MASKS)), "segm")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert scores.overall == pytest.approx(judge.stats[:3], abs=1e-6) and 0.1 < scores.overall[0] < 0.9
    assert scores.by_size["small"] == pytest.approx(judge.stats[3], abs=1e-6)
