"""Masks of objects in parts: run lengths and polygons as COCO's, views in step with pixels, conditional convolutions, the
dice loss, grids of logits, and how masks are judged."""

import json
import random
import re

import numpy as np
import pycocotools.mask as coco
import pytest
import torch
from mask_files import CLASSES, box_of, draw_scenes, run_lengths, write_scenes
from PIL import Image

from simmim.data import Picture, open_picture
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.finetune.detection import losses
from simmim.finetune.detection.ap import MASKS, Judged, average_precision, coco_labels, coco_results
from simmim.finetune.detection.condinst import CHANNELS, NUM_PARAMETERS, mask_logits
from simmim.finetune.detection.inference import find_boxes
from simmim.finetune.detection.labels.base import ReadingOptions
from simmim.finetune.detection.labels.masks import read_mask
from simmim.finetune.detection.labels.scenes import Objects, read_boxed_scenes
from simmim.finetune.detection.losses import dice_losses, sum_losses, target_stride
from simmim.finetune.detection.masks import coco_rle, draw, pack, resized, sample
from simmim.finetune.detection.model import Detector, HeadShape
from simmim.finetune.detection.onnx import export_onnx
from simmim.finetune.detection.soft_masks import SoftMask
from simmim.finetune.detection.views import RandomBoxes, Targets
from simmim.messages import Notice


def random_pixels(generator, size, kind):
    """A mask: nothing, everything, noise, a run over the edges of columns, or a few rectangles."""
    if kind == "noise":
        return generator.random(size) < 0.4
    pixels = np.full(size, kind == "all")
    if kind == "columns":
        pixels.T.reshape(-1)[size[0] // 2 : -1] = True
        pixels = np.ascontiguousarray(pixels)
        flat = np.zeros(size[0] * size[1], dtype=bool)
        flat[size[0] // 2 : -1] = True
        pixels = flat.reshape(size[1], size[0]).T
    if kind == "rectangles":
        for _ in range(3):
            top, left = (int(generator.integers(0, side)) for side in size)
            pixels[top : top + int(generator.integers(1, 9)), left : left + int(generator.integers(1, 9))] = True
    return pixels


# --- run lengths and polygons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "all", "noise", "columns", "rectangles"])
@pytest.mark.parametrize("size", [(7, 5), (1, 9), (9, 1), (40, 33)])
def test_run_lengths_are_those_of_pycocotools(kind, size):
    """Compressed and not, to a mask and back."""
    pixels = random_pixels(np.random.default_rng(1), size, kind)
    for compressed in (True, False):
        mask = read_mask(run_lengths(pixels, compressed), size, "here")
        assert np.array_equal(draw(mask, size), pixels)
        assert mask.area == pixels.sum() == np.unpackbits(np.frombuffer(mask.bits, np.uint8)).sum()
    assert coco_rle(mask, size) == run_lengths(pixels)
    assert pack(pixels) == mask
    if pixels.any():
        x, y, width, height = box_of(pixels)
        assert mask.box == (x, y, x + width, y + height)


def test_polygons_are_rasterized_as_by_pycocotools():
    """Of several parts, which may overlap and reach out of the image."""
    generator = np.random.default_rng(2)
    for _ in range(200):
        parts = [generator.uniform(-8, 50, 2 * generator.integers(3, 9)).tolist() for _ in range(generator.integers(1, 4))]
        expected = coco.decode(coco.merge(coco.frPyObjects(parts, 37, 41)))
        assert np.array_equal(draw(read_mask(parts, (37, 41), "here"), (37, 41)), expected.astype(bool))


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([[1, 1, 5, 5]], "polygon 0 has 4 numbers, expected x and y of 3 points or more"),
        ([[1, 1, 5, 5, 3, 2], [1, 2, 3, 4, 5, 6, 7]], "polygon 1 has 7 numbers"),
        ([[1, 1, 5, "5", 3, 2]], "polygon 0 is no list of numbers"),
        ([[1, 1, 5, float("nan"), 3, 2]], "polygon 0 has numbers that are not finite"),
        ("text", "segmentation 'text', expected polygons or run lengths"),
        ({"size": [10, 8]}, "run lengths without size or counts"),
        ({"size": [8, 10], "counts": [80]}, r"run lengths of 8x10 pixels, and the image has 10x8 \(height x width\)"),
        ({"size": [10, 8], "counts": [10, 20]}, "run lengths of 30 pixels, and the image has 10 x 8 = 80"),
        ({"size": [10, 8], "counts": [-1, 81]}, "no whole numbers from 0"),
        ({"size": [10, 8], "counts": [1.5, 78.5]}, "no whole numbers from 0"),
        ({"size": [10, 8], "counts": "05"}, "run lengths of 5 pixels"),
        ({"size": [10, 8], "counts": "zzz~~~"}, "broken run lengths"),
        ({"size": [10, 8], "counts": "a b"}, "broken run lengths"),
    ],
)
def test_broken_masks_are_refused_in_one_line(segmentation, message):
    with pytest.raises(ValueError, match=r"^file, annotation 3: ") as error:
        read_mask(segmentation, (10, 8), "file, annotation 3")
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


# --- labels ------------------------------------------------------------------------------------------------------------


def edit(file, change):
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))


def test_masks_are_read_where_every_object_has_one(tmp_path):
    scenes = draw_scenes(6, 0)
    file = write_scenes(tmp_path, scenes)
    everything = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert everything.has_masks and any("masks of all objects are learned" in note for note in everything.notes)
    number = 0
    for row, objects in zip(everything.train, everything.train_objects):
        shapes = scenes[int(row["image"]["path"][-6:-4]) - 1]
        for shape, mask in zip(shapes, objects.masks, strict=True):
            assert np.array_equal(draw(mask, (48, 48)), shape.pixels)
            number += 1
    assert number > 4
    for wanted in (False, None):
        if wanted is None:
            edit(file, lambda annotations: [one.update(segmentation=[]) for one in annotations])
        boxes = read_boxed_scenes(str(tmp_path), None, 0, masks=wanted)
        assert not boxes.has_masks and {one.masks for one in boxes.train_objects} == {None}
    with pytest.raises(ValueError, match="annotation 100 has no mask, as 9 of 9 objects"):
        read_boxed_scenes(str(tmp_path), None, 0, masks=True)


def test_some_objects_without_masks_are_refused(tmp_path):
    file = write_scenes(tmp_path, draw_scenes(6, 0))
    edit(file, lambda annotations: annotations[2].pop("segmentation"))
    with pytest.raises(ValueError, match=r"annotation \d+ has no mask, as 1 of 9 objects .*head.masks false"):
        read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert not read_boxed_scenes(str(tmp_path), None, 0, masks=False).has_masks
    edit(file, lambda annotations: annotations[2].update(iscrowd=1))
    crowded = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    [[mask, box]] = [
        (objects.masks[number], objects.boxes[number])
        for objects in (*crowded.train_objects, *crowded.validation_objects)
        for number in np.flatnonzero(objects.ignored)
    ]
    assert mask.box == tuple(box) and mask.pixels.all(), "a crowd without a mask hides its box"


def test_boxes_written_as_polygons_are_boxes(tmp_path):
    def as_boxes(annotations):
        for one in annotations:
            x, y, width, height = one["bbox"]
            one["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]

    edit(write_scenes(tmp_path, draw_scenes(6, 0)), as_boxes)
    assert not read_boxed_scenes(str(tmp_path), None, 0, masks=None).has_masks
    assert read_boxed_scenes(str(tmp_path), None, 0, masks=True).has_masks


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_masks_are_those_of_the_upright_picture(orientation, drawn_on, tmp_path):
    """Every bright pixel, and no other."""
    file = write_scenes(tmp_path, draw_scenes(4, 3, (32, 48)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in (tmp_path / "images" / "train").iterdir():
        stored = Image.open(image)
        if drawn_on == "upright":
            inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's operations that undo the turn
            stored = stored.transpose(inverse[orientation]) if orientation > 1 else stored
        stored.save(image, exif=exif)
    scenes = read_boxed_scenes(str(tmp_path), None, 0, exif=drawn_on, masks=None)
    for row, objects in zip(scenes.train, scenes.train_objects):
        picture = open_picture({"bytes": None, "path": row["image"]["path"]}, 1)
        pixels = picture.crop((0, 0, *picture.size[::-1]), picture.size)[0].numpy()
        found = np.any([draw(mask, picture.size) for mask in objects.masks], axis=0)
        assert np.array_equal(found, pixels > 100)
        for mask, box in zip(objects.masks, objects.boxes):
            assert mask.box == tuple(box)
    assert file.is_file()


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
    mask = SoftMask(logits.numpy(), (8, 12), (4, 4))
    expected = np.zeros((40, 40), dtype=bool)
    expected[8:32, 12:32] = large
    assert np.array_equal(draw(mask.packed((40, 40)), (40, 40)), expected)
    assert np.array_equal(draw(mask.packed((20, 20)), (20, 20)), expected[:20, :20])
    assert np.array_equal(draw(mask.moved((-8, 3)).packed((40, 40)), (40, 40))[:32, 3:], expected[8:, :-3])
    assert mask.scaled(2, 3)[1:] == ((16, 36), (8, 12)) and mask.packed((4, 4)).area == 0


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


# --- instance maps -----------------------------------------------------------------------------------------------------


def write_instance_maps(folder, scenes, part="", by_class=False, ending="png", first=300):
    """Images and maps of one part; objects are numbered from `first` on, with gaps."""
    images = folder / "images" / part
    images.mkdir(parents=True, exist_ok=True)
    for number, shapes in enumerate(scenes):
        pixels = np.zeros(shapes[0].pixels.shape, dtype=np.uint8)
        maps = {}
        for index, shape in enumerate(shapes):
            pixels[shape.pixels] = 200
            values = maps.setdefault(shape.name if by_class else "", np.zeros(pixels.shape, dtype=np.uint16))
            values[shape.pixels] = first + 7 * index
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
        for name, values in maps.items():
            home = folder / "instances" / name / part
            home.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(home / f"{number:02d}.{ending}")
    return folder


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_instance_maps_are_masks_of_each_number(ending, by_class, parts, tmp_path):
    """16 bits, with parts and without, of one class or a folder a class."""
    scenes = draw_scenes(8, 4)
    for part in parts:
        write_instance_maps(tmp_path, scenes, part, by_class, ending)
    found = read_boxed_scenes(str(tmp_path), None, 0, masks=None)
    assert found.classes == (CLASSES if by_class else ("object",)) and found.has_masks
    assert any("labels are instance maps" in note for note in found.notes)
    everything = list(zip(found.train, found.train_objects))
    everything += [] if len(parts) > 1 else list(zip(found.validation, found.validation_objects))
    assert len(everything) == 8
    for row, objects in everything:
        shapes = scenes[int(row["image"]["path"][-6:-4])]
        pairs = {found.classes[label] + str(mask.box): mask for label, mask in zip(objects.classes, objects.masks)}
        assert len(pairs) == len(shapes)
        for shape in shapes:
            x, y, width, height = box_of(shape.pixels)
            name = (shape.name if by_class else "object") + str((float(x), float(y), float(x + width), float(y + height)))
            assert np.array_equal(draw(pairs[name], shape.pixels.shape), shape.pixels)
    named = read_boxed_scenes(str(tmp_path), None, 0, ReadingOptions(classes=CLASSES if by_class else ("cell",)))
    assert named.classes == (CLASSES if by_class else ("cell",)) and not named.has_masks


def test_instance_maps_that_are_wrong_are_refused_or_told(tmp_path):
    folder = write_instance_maps(tmp_path, draw_scenes(6, 4), first=1)
    one = folder / "instances" / "00.png"
    values = np.array(Image.open(one))
    (folder / "instances" / "99.png").write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"99\.png has no image"):
        read_boxed_scenes(str(folder), None, 0)
    (folder / "instances" / "99.png").unlink()
    Image.fromarray(values[:-1]).save(one)
    with pytest.raises(ValueError, match=r"00\.png states 47x48 pixels, and the image has 48x48"):
        read_boxed_scenes(str(folder), None, 0)
    one.write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=r"instance map .*00\.png cannot be read"):
        read_boxed_scenes(str(folder), None, 0)
    one.unlink()
    with pytest.warns(Notice, match="1 of 6 images .* have no instance map and count as images without objects"):
        read_boxed_scenes(str(folder), None, 0)
    for file in (folder / "instances").iterdir():
        Image.fromarray(((np.array(Image.open(file)) > 0) * 255).astype(np.uint8)).save(file)
    with pytest.warns(Notice, match="holds the one number 255: are they masks of a class"):
        read_boxed_scenes(str(folder), None, 0)
