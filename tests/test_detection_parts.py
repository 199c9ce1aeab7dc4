"""Detection in parts: boxes, suppression, assignment of points, losses, views in step with boxes, images by tiles."""

import itertools
import random

import kornia
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers.loss.loss_for_object_detection import generalized_box_iou

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.data import Picture, open_picture
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.finetune.dense.pictures import enlarged
from simmim.finetune.detection.assignment import BACKGROUND, assign_points
from simmim.finetune.detection.boxes import generalized_overlaps, overlaps, suppress
from simmim.finetune.detection.inference import MAX_COUNTED, find_boxes, is_cut
from simmim.finetune.detection.labels.scenes import Objects
from simmim.finetune.detection.losses import centerness, focal_loss, inside_any, sum_losses
from simmim.finetune.detection.model import Detector, HeadShape
from simmim.finetune.detection.module import DetectionFinetuning
from simmim.finetune.detection.onnx import export_onnx
from simmim.finetune.detection.pictures import MAX_CELL_PX, MIN_CELL_PX
from simmim.finetune.detection.pyramid import Predictions, PyramidHead, grid_points
from simmim.finetune.detection.views import RandomBoxes, Targets, WholeImage, crop_objects, mirror
from simmim.finetune.settings import OptimSettings
from simmim.reading import Reading


def random_boxes(count, side=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side * 0.8
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * side * 0.4], dim=1)


def targets_of(boxes, classes=None, ignored=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    classes = torch.zeros(count, dtype=torch.long) if classes is None else torch.tensor(classes)
    return Targets(boxes, classes, torch.tensor(ignored or [False] * count, dtype=torch.bool))


# --- boxes -------------------------------------------------------------------------------------------------------------


def test_overlaps_equal_transformers():
    first, second = random_boxes(20), random_boxes(30, seed=1)
    expected = generalized_box_iou(first, second)
    torch.testing.assert_close(generalized_overlaps(first[:, None], second[None]), expected)
    assert overlaps(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 1, 3, 3])).item() == pytest.approx(1 / 7)
    assert generalized_overlaps(torch.tensor([0.0, 0, 1, 1]), torch.tensor([3.0, 0, 4, 1])).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("threshold, at_once", [(0.3, 1000), (0.6, 1000), (0.3, 70)])
def test_suppression_equals_kornia_class_by_class(threshold, at_once, monkeypatch):
    monkeypatch.setattr("simmim.finetune.detection.boxes.COMPARED_AT_ONCE", at_once)
    boxes, scores = random_boxes(300), torch.rand(300, generator=torch.Generator().manual_seed(2))
    classes = torch.arange(300) % 3
    kept = suppress(boxes, scores, classes, threshold)
    assert (scores[kept].diff() <= 0).all() and len(kept) < 300
    for number in range(3):
        rows = (classes == number).nonzero()[:, 0]
        expected = rows[kornia.geometry.bbox.nms(boxes[rows], scores[rows], threshold)]
        assert kept[classes[kept] == number].tolist() == expected.tolist()
    assert suppress(boxes[:0], scores[:0], classes[:0], threshold).tolist() == []


# --- which point learns what -------------------------------------------------------------------------------------------


def points_of(sizes, strides):
    points, of_points = grid_points(sizes, strides)
    return points, of_points, [height * width for height, width in sizes]


def test_points_are_centers_of_cells():
    points, strides, _ = points_of([(2, 3), (1, 2)], (4, 8))
    assert points.tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6], [4, 4], [12, 4]]
    assert strides.tolist() == [4] * 6 + [8] * 2


def test_assignment_by_hand():
    """One level of 5 × 5 cells of 4 px, anchors of 32 px. The box (4, 4, 16, 12) has its center at (10, 8): the nine nearest
    points are x 6, 10, 14 by y 2, 6, 10 (52 is the largest of their squared distances, 68 the next). All
    anchors contain the box, so all overlaps are 96 / 1024 and the deviation is 0: those inside the box are taken."""
    points, strides, sizes = points_of([(5, 5)], (4,))
    objects = assign_points(points, strides, sizes, torch.tensor([[4.0, 4, 16, 12]]))
    assert points[objects == 0].tolist() == [[6, 6], [10, 6], [14, 6], [6, 10], [10, 10], [14, 10]]
    assert (objects == BACKGROUND).sum() == 25 - 6


def test_assignment_by_threshold():
    """As the paper's algorithm 1, computed point by point, on random boxes over three levels."""
    sizes, strides_of = [(32, 40), (16, 20), (8, 10)], (4, 8, 16)
    points, strides, counts = points_of(sizes, strides_of)
    boxes = random_boxes(40, side=140, seed=3)
    anchors = torch.cat([points - 4 * strides[:, None], points + 4 * strides[:, None]], dim=1)
    best = {}
    for number, box in enumerate(boxes):
        center = (box[:2] + box[2:]) / 2
        candidates, first = [], 0
        for count in counts:
            distances = (points[first : first + count] - center).norm(dim=1)
            candidates += (distances.argsort()[:9] + first).tolist()
            first += count
        overlap = [overlaps(box, anchors[point]).item() for point in candidates]
        threshold = np.mean(overlap) + np.std(overlap, ddof=1)
        for point, value in zip(candidates, overlap):
            x, y = points[point].tolist()
            if value >= threshold and box[0] < x < box[2] and box[1] < y < box[3] and value > best.get(point, (0, 0))[0]:
                best[point] = value, number
    objects = assign_points(points, strides, counts, boxes)
    expected = [best[point][1] if point in best else BACKGROUND for point in range(len(points))]
    without = set(range(40)) - set(expected)
    assert 0 < len(without) < 10, "the paper leaves some objects without a point"
    differ = [number for number, wanted in zip(objects.tolist(), expected) if number != wanted]
    assert sorted(differ) == sorted(without), "each of them has one, and all else is the paper's"


@pytest.mark.parametrize(
    "sizes, strides", [([(3, 4)], (8,)), ([(1, 1)], (32,)), ([(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)], (4, 8, 16, 32, 64))]
)
def test_every_object_has_a_point(sizes, strides):
    """Tiny ones between points, too, as long as there are points enough."""
    points, of_points, counts = points_of(sizes, strides)
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.2], [0.0, 0, 20, 20], [7.9, 7.9, 8.1, 8.1], [0.2, 0.2, 0.4, 0.4]])
    objects = assign_points(points, of_points, counts, boxes)
    assert len(set(objects.tolist()) - {BACKGROUND}) == min(len(boxes), len(points))
    assert assign_points(points, of_points, counts, boxes[:0]).tolist() == [BACKGROUND] * len(points)


def test_an_object_keeps_its_last_point():
    """The large one, which has both points, spares one for the first tiny object and none for the second."""
    points, of_points, counts = points_of([(1, 2)], (8,))
    boxes = torch.tensor([[0.0, 0, 16, 8], [4.1, 4, 4.3, 4.2], [12.1, 4, 12.3, 4.2]])
    assert assign_points(points, of_points, counts, boxes[:1]).tolist() == [0, 0]
    assert sorted(assign_points(points, of_points, counts, boxes).tolist()) == [0, 1]


# --- losses ------------------------------------------------------------------------------------------------------------


def predictions_of(num_images=2, num_classes=3, sizes=((4, 4), (2, 2)), strides=(8, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    points, of_points = grid_points(sizes, strides)
    shape = (num_images, len(points))
    logits = torch.randn(*shape, num_classes, generator=generator).requires_grad_()
    distances = (1 + 10 * torch.rand(*shape, 4, generator=generator)).requires_grad_()
    centers = torch.randn(*shape, generator=generator).requires_grad_()
    return Predictions(logits, distances, centers, points, of_points, tuple(sizes))


def test_focal_loss_equals_its_equation():
    logits, wanted = torch.tensor([0.3, -1.2]), torch.tensor([1.0, 0.0])
    p = 1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(1.2))
    expected = [-0.25 * (1 - p[0]) ** 2 * np.log(p[0]), -0.75 * p[1] ** 2 * np.log(1 - p[1])]
    assert focal_loss(logits, wanted).tolist() == pytest.approx(expected)


def test_centerness_equals_its_equation():
    boxes = torch.tensor([[0.0, 0, 10, 20]] * 3)
    points = torch.tensor([[5.0, 10], [2, 10], [-1, 10]])
    assert centerness(points, boxes).tolist() == pytest.approx([1, (2 / 8) ** 0.5, 0])


def test_losses_are_those_of_assigned_points():
    predictions = predictions_of()
    targets = [targets_of([[2, 2, 20, 20], [15, 4, 30, 30]], [2, 0]), targets_of([[1, 1, 31, 30]], [1])]
    sums = sum_losses(predictions, targets)
    classes = boxes = centers = count = 0.0
    for row, one in enumerate(targets):
        owner = assign_points(predictions.points, predictions.strides, [16, 4], one.boxes)
        for point, number in enumerate(owner.tolist()):
            wanted = torch.zeros(3)
            if number != BACKGROUND:
                wanted[one.classes[number]] = 1
                box = predictions.boxes()[row, point]
                boxes += 1 - generalized_overlaps(box, one.boxes[number])
                aim = centerness(predictions.points[point : point + 1], one.boxes[number : number + 1])[0]
                centers += nn.functional.binary_cross_entropy_with_logits(predictions.centerness[row, point], aim)
                count += 1
            classes += focal_loss(predictions.logits[row, point], wanted).sum()
    for ours, expected in zip(sums, (classes, boxes, centers, torch.tensor(count))):
        torch.testing.assert_close(ours.float(), expected.float())
    assert sums.total.item() == pytest.approx((classes + 2 * boxes + centers).item(), rel=1e-5) and count >= 3


@pytest.mark.parametrize("boxes", [[], [[3, 3, 20, 20]]])
def test_losses_and_gradients_are_finite_without_objects(boxes):
    """With ignored ones alone, too: inside them nothing is background, outside everything is."""
    predictions = predictions_of(1)
    sums = sum_losses(predictions, [targets_of(boxes, ignored=[True] * len(boxes))])
    sums.total.backward()
    assert sums.num_positive == 0 and sums.total.isfinite() and sums.total > 0
    assert not predictions.distances.grad.any() and not predictions.centerness.grad.any()
    ignored = inside_any(predictions.points, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    assert ((predictions.logits.grad[0] != 0).all(dim=1) == ~ignored).all() and ignored.any() == bool(boxes)


# --- model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages, channels, num_above", [(1, 1, 0), (2, 4, 1), (3, 10, 0), (5, 3, 1)])
def test_any_number_of_stages_channels_and_odd_sizes(num_stages, channels, num_above, tmp_path):
    """Gradients, boxes inside the image, and the ONNX file."""
    torch.manual_seed(0)
    config = SwinV2Config(16, (1,) * num_stages, (1, 2, 2, 4, 4)[:num_stages], window_size=4, in_channels=channels)
    model = Detector(build(config), 3, HeadShape(16, 1, num_above))
    predictions = model(torch.randn(2, channels, 37, 51))
    sums = sum_losses(predictions, [targets_of([[4, 4, 30, 20]], [2]), targets_of([])])
    sums.total.backward()
    assert len(predictions.sizes) == num_stages + num_above and predictions.sizes[0] == (10, 13)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.eval()
    assert export_onnx(model, tmp_path / "model.onnx", (37, 51)) < 0.01
    for one in find_boxes(model, torch.randn(1, channels, 37, 51), (32, 32)):
        assert (one.boxes >= 0).all() and (one.boxes[:, 2] <= 51).all() and (one.boxes[:, 3] <= 37).all()
        assert len(one.boxes) and (one.scores.diff() <= 0).all()


def test_levels_share_towers_and_have_norms_of_their_own():
    head = PyramidHead((16, 32), (4, 8), 3, 16, 2)
    names = [name for name, _ in head.named_parameters()]
    assert len([name for name in names if "class_tower.convolutions" in name]) == 2
    assert len([name for name in names if "class_tower.norms" in name]) == 2 * 2 * 2  # convolutions, levels, weight and bias
    with torch.no_grad():
        head.class_tower.norms[1][1].weight.zero_()
        head.class_tower.norms[1][1].bias.zero_()
    first = head([torch.randn(1, 16, 8, 8), torch.randn(1, 32, 4, 4)]).logits[0]
    assert first[:64].std() > 0
    assert torch.equal(first[64:], head.classify.bias.expand(16, 3)), "the second level's norm is its own"


# --- views -------------------------------------------------------------------------------------------------------------


def drawn(height=60, width=90):
    """A dark picture with bright rectangles whose corners are known, each in a brightness of its own."""
    boxes = np.array([[5, 8, 25, 20], [40, 30, 80, 55], [60, 2, 72, 16]], dtype=np.float32)
    pixels = np.zeros((height, width), dtype=np.uint8)
    for level, (x1, y1, x2, y2) in zip((120, 180, 240), boxes.astype(int)):
        pixels[y1:y2, x1:x2] = level
    return Picture(Image.fromarray(pixels), 1), Objects(boxes, np.arange(3), np.zeros(3, dtype=bool))


def crossing(values, start, step, half):
    """The coordinate at which values, one per pixel, fall below `half` on the way from pixel `start`."""
    position = start
    while values[position + step] > half:
        position += step
    inner, outer = values[position].item(), values[position + step].item()
    return position + 0.5 + step * (inner - half) / (inner - outer)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_stay_on_what_is_drawn(seed):
    """Within half a pixel, through scale, crop, flip and padding: a side is where the brightness has half its height."""
    picture, objects = drawn()
    image, targets = RandomBoxes((64, 72), 0, (0.5, 2.0), 0.5, (0,))(picture, objects, random.Random(seed))
    assert image.shape == (1, 64, 72)
    num_sides = 0
    for box, number in zip(targets.boxes.tolist(), targets.classes.tolist()):
        half = (120, 180, 240)[number] / 2
        center = int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)
        if min(box[2] - box[0], box[3] - box[1]) < 6:
            continue  # a sliver at the edge of the view
        for axis, line in ((0, image[0, center[0]].float()), (1, image[0, :, center[1]].float())):
            for side, step in ((box[axis], -1), (box[axis + 2], 1)):
                if 1 < side < len(line) - 1:
                    assert abs(crossing(line, center[1 - axis], step, half) - side) < 0.5, (box, axis, step)
                    num_sides += 1
    assert num_sides >= 3


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_edges_are_exact_at_whole_scales(scale):
    """Every corner at the pixel, for the plain and the mirrored view."""
    picture, objects = drawn()
    size = (round(60 * scale), round(90 * scale))
    for flip in (0.0, 1.0):
        image, targets = RandomBoxes(size, 0, (scale, scale), flip, (0,))(picture, objects, random.Random(0))
        assert targets.classes.tolist() == [0, 1, 2]
        for (x1, y1, x2, y2), level in zip(targets.boxes.round().int().tolist(), (120, 180, 240)):
            mask = image[0] > level // 2
            inner = image[0, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            assert (inner == level).all()
            middle = (y1 + y2) // 2, (x1 + x2) // 2
            assert (
                mask[middle[0], x1] and not mask[middle[0], x1 - 1] and mask[middle[0], x2 - 1] and not mask[middle[0], x2]
            )
            assert mask[y1, middle[1]] and not mask[y1 - 1, middle[1]]
            assert mask[y2 - 1, middle[1]] and not mask[y2, middle[1]]


def test_deep_images_are_padded_with_no_data(tmp_path):
    """Float crops of values between the encoder's ends; outside the image NaN, which becomes the mean."""
    np.save(tmp_path / "a.npy", np.full((20, 30, 2), 1000, dtype=np.uint16))
    reading = Reading([[0, 4000], [0, 2000]])
    picture = open_picture({"bytes": None, "path": str(tmp_path / "a.npy")}, 2, reading=reading)
    objects = Objects(np.array([[2, 2, 6, 6]], dtype=np.float32), np.zeros(1, dtype=int), np.zeros(1, dtype=bool))
    image, targets = RandomBoxes((32, 32), 0, (1.0, 1.0), 0.0, (0, 0))(picture, objects, random.Random(0))
    assert image[:, :20, :30].amin(dim=(1, 2)).tolist() == image[:, :20, :30].amax(dim=(1, 2)).tolist() == [0.25, 0.5]
    assert image[:, 20:].isnan().all() and image[:, :, 30:].isnan().all()
    assert targets.boxes.tolist() == [[2, 2, 6, 6]]
    assert enlarged(image, MIN_CELL_PX, MAX_CELL_PX)[0, 0].tolist() == [64, 64, 64]


def test_crops_ignore_what_they_hardly_show():
    """29 % of a box is ignored, 31 % an object, none left out; what was ignored stays so."""
    boxes = np.array([[-7.1, 0, 2.9, 10], [-6.9, 0, 3.1, 10], [0, -20, 5, 0], [1, 1, 4, 4]], dtype=np.float32)
    objects = Objects(boxes, np.arange(4), np.array([False, False, False, True]))
    targets = crop_objects(objects, boxes, (0, 0), (10, 10))
    assert targets.classes.tolist() == [0, 1, 3] and targets.ignored.tolist() == [True, False, True]
    assert targets.boxes[:2].numpy() == pytest.approx(np.array([[0, 0, 2.9, 10], [0, 0, 3.1, 10]]), abs=1e-5)
    moved = crop_objects(objects, boxes, (2, 1), (10, 10))
    assert moved.boxes[-1].tolist() == [0, 0, 3, 2]
    assert mirror(targets.boxes, 10)[0].tolist() == pytest.approx([7.1, 0, 10, 10])


def test_crops_are_drawn_again_until_one_shows_an_object():
    pixels = Image.fromarray(np.zeros((100, 100), dtype=np.uint8))
    objects = Objects(np.array([[20, 20, 30, 30]], dtype=np.float32), np.zeros(1, dtype=int), np.zeros(1, dtype=bool))
    view = RandomBoxes((50, 50), 0, (1.0, 1.0), 0.0, (0,))
    shown = [len(view(Picture(pixels, 1), objects, random.Random(seed))[1].boxes) for seed in range(40)]
    assert sum(shown) > 34, "a single crop shows it in 729 of 2601 draws"


def test_whole_images_keep_their_boxes():
    picture, objects = drawn()
    image, targets = WholeImage(30)(picture, objects)
    assert image.shape == (1, 30, 45) and np.array_equal(targets.boxes.numpy(), objects.boxes)


# --- tiles -------------------------------------------------------------------------------------------------------------


class Blobs(nn.Module):
    """Finds the bright rectangles of an image exactly, whatever part of them a tile shows."""

    def forward(self, images):
        sizes, strides = (tuple(side // 4 for side in images.shape[2:]),), (4,)
        points, of_points = grid_points(sizes, strides)
        logits = torch.full((len(images), len(points), 1), -9.0)
        distances = torch.ones(len(images), len(points), 4)
        for row, level in itertools.product(range(len(images)), (1.0, 2.0, 3.0, 4.0)):
            rows, columns = (images[row, 0] == level).nonzero().unbind(dim=1)
            if len(rows):
                box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
                point = (points - (box[:2] + box[2:]) / 2).square().sum(dim=1).argmin()
                logits[row, point] = level
                distances[row, point] = (box - points[point].repeat(2)) * torch.tensor([-1, -1, 1, 1])
        return Predictions(logits, distances, torch.full(logits.shape[:2], 9.0), points, of_points, sizes)


def test_tiles_find_what_the_whole_image_shows():
    """Objects on the tiles' edges once, whole; one larger than the overlap is not lost."""
    image = torch.zeros(1, 1, 100, 164)
    boxes = [[8, 8, 24, 20], [56, 40, 72, 52], [140, 90, 164, 100], [100, 10, 112, 30]]
    for level, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        image[0, 0, y1:y2, x1:x2] = level
    whole, tiles = (find_boxes(Blobs(), image.repeat(2, 1, 1, 1), (64, 64), way) for way in ("whole", "tiles"))
    for one in (*whole, *tiles):
        assert sorted(one.boxes.tolist()) == sorted(boxes)
    large = torch.zeros(1, 1, 64, 160)
    large[0, 0, 20:40, 10:150] = 1
    [one] = find_boxes(Blobs(), large, (64, 64), "tiles")
    assert len(one.boxes) >= 2 and one.boxes[:, 0].min() == 10 and one.boxes[:, 2].max() == 150
    [automatic] = find_boxes(Blobs(), image, (64, 64))
    assert sorted(automatic.boxes.tolist()) == sorted(boxes)


class Grid(nn.Module):
    """Finds an object in each square of 8 px, by its four points, those to the right with more certainty."""

    def forward(self, images):
        sizes, strides = (tuple(side // 4 for side in images.shape[2:]),), (4,)
        points, of_points = grid_points(sizes, strides)
        corner = points // 8 * 8
        distances, certain = torch.cat([points - corner, corner + 8 - points], dim=1), corner[:, 0] / 100
        shape = (len(images), len(points))
        return Predictions(
            certain[None, :, None].repeat(len(images), 1, 1),
            distances.expand(*shape, 4),
            torch.zeros(shape),
            points,
            of_points,
            sizes,
        )


@pytest.mark.parametrize("inference", ["whole", "tiles"])
def test_as_many_objects_are_found_as_are_counted(inference):
    """Each is found by several points, and by several tiles, which begin at multiples of 40 px."""
    [found] = find_boxes(Grid(), torch.zeros(1, 1, 184, 304), (64, 64), inference, MAX_COUNTED)
    assert sorted(found.boxes[:, :2].tolist()) == [[x, y] for x in range(0, 304, 8) for y in range(0, 184, 8)]


def test_boxes_cut_by_inner_edges_alone_are_left_out():
    boxes = torch.tensor([[0.0, 10, 10, 20], [54, 10, 64, 20], [0, 10, 40, 20], [10, 0, 20, 10], [20, 20, 30, 30]])
    assert is_cut(boxes, (0, 0), (64, 64), (64, 100)).tolist() == [False, True, False, False, False]
    assert is_cut(boxes, (0, 36), (64, 64), (64, 100)).tolist() == [True, False, False, False, False]
    assert is_cut(boxes, (30, 36), (64, 64), (94, 100)).tolist() == [True, False, False, True, False]


# --- the step ----------------------------------------------------------------------------------------------------------


class Devices:
    """A trainer of several devices, of which the others have these counts of positive points and images."""

    def __init__(self, *others):
        self.others, self.world_size, self.strategy = others, 1 + len(others), self

    def reduce(self, values, reduce_op):
        assert reduce_op == "sum"
        return values + sum(map(torch.tensor, self.others)) if len(values) == 2 else values * self.world_size


@pytest.mark.parametrize("others", [(), ((40.0, 6.0),)])
def test_the_gradient_of_a_step_is_per_positive_point(others):
    """Of all parts and devices together, though each part has its own number of them, and one has none."""
    torch.manual_seed(0)
    model = Detector(build(SwinV2Config(16, (1,), (1,), window_size=4, in_channels=1)), 2, HeadShape(16, 1))
    preprocessing = Preprocessing((32, 32), (0.5,), (0.2,))
    module = DetectionFinetuning(
        model, preprocessing, ("a", "b"), "auto", lambda step: 0.1, OptimSettings(label_smoothing=0.0)
    )
    module.log = module.log_dict = lambda *_, **__: None
    module._trainer = Devices(*others)
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    targets = [
        targets_of([[2, 2, 20, 20], [15, 4, 30, 30]], [1, 0]),
        targets_of([[1, 1, 31, 30]], [1]),
        targets_of([]),
        targets_of([]),
    ]
    normalized = (images.float() / 255 - 0.5) / 0.2
    sums = sum_losses(model(normalized), targets)
    # The gradient is averaged over the devices' images: others, of no gradient here, have their share of the images.
    num_images = 4 + sum(images for _, images in others)
    num_positive = sums.num_positive + sum(points for points, _ in others)
    (sums.total / num_positive * num_images / 4).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # a second step begins anew
        model.zero_grad()
        for first in (0, 2):
            loss = module.training_step({"image": images[first : first + 2], "objects": targets[first : first + 2]}, 0)
            (loss / 2).backward()
        module.on_before_optimizer_step(None)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    value = module.training_step({"image": images, "objects": targets}, 0)
    assert value.item() == pytest.approx((sums.total / sums.num_positive).item(), rel=1e-5)
