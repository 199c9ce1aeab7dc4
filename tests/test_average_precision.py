"""Average precision: equal to pycocotools, the table, the thresholds, the curves."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from simmim.finetune.detection.ap import (
    Judged,
    average_precision,
    best_thresholds,
    class_table,
    coco_labels,
    coco_results,
    write_class_table,
)
from simmim.finetune.detection.pictures import palette, precision_plot


def boxes_of(generator, count, side=300):
    corner = generator.uniform(0, side * 0.7, (count, 2))
    return np.concatenate([corner, corner + generator.uniform(3, side * 0.6, (count, 2))], axis=1).astype(np.float32)


def judged(seed, num_images=12, num_classes=4, crowds=0.2, most=7, missing=()):
    """Images with given boxes of which some are ignored, and found ones near them and elsewhere; some images have none."""
    generator, images = np.random.default_rng(seed), []
    for row in range(num_images):
        count = 0 if row % 5 == 4 else int(generator.integers(0, most))
        boxes, classes = boxes_of(generator, count), generator.integers(0, num_classes, count)
        boxes, classes = (values[~np.isin(classes, missing)] for values in (boxes, classes))
        near = boxes[generator.random(len(boxes)) < 0.8]
        near_classes = classes[: len(near)]
        others = boxes_of(generator, 0 if row % 5 == 3 else 4)
        found = np.concatenate([near + generator.normal(0, 4, near.shape).astype(np.float32), others])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_classes = np.concatenate([near_classes, generator.integers(0, num_classes, len(others))])
        ignored = generator.random(len(boxes)) < crowds
        images.append(Judged(row, boxes, classes, ignored, found, generator.random(len(found)), found_classes))
    return images


def by_pycocotools(images, num_classes):
    """(AP, AP50, AP75, small, medium, large), and the precisions."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **coco_labels(images, num_classes)}
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(coco_results(images)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[:6], judge.eval["precision"][:, :, :, 0, -1]


@pytest.mark.parametrize(
    "seed, options",
    [
        (0, {}),
        (1, {"crowds": 0.0}),
        (2, {"missing": (1, 3)}),
        (3, {"num_classes": 1, "most": 3}),
        (4, {"num_images": 3, "most": 400, "num_classes": 1}),
        (5, {"crowds": 0.7}),
    ],
)
def test_it_equals_pycocotools(seed, options):
    """With crowds, empty images, missing classes, and more boxes than count."""
    images, num_classes = judged(seed, **options), options.get("num_classes", 4)
    scores = average_precision(images, num_classes)
    stats, precision = by_pycocotools(images, num_classes)
    assert scores.overall == pytest.approx(stats[:3], abs=1e-6)
    for size, expected in zip(("small", "medium", "large"), stats[3:]):
        assert scores.by_size.get(size, -1) == pytest.approx(expected, abs=1e-6)
    for number in range(num_classes):
        known = precision[:, :, number]
        expected = np.nan if (known < 0).all() else known.mean()
        assert scores.by_class[number, 0] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert any(np.isnan(scores.by_class[:, 0])) == bool(options.get("missing"))
    assert scores.overall[0] > 0.02


def test_an_image_counts_once_and_no_box_found_is_zero():
    images = judged(0)
    assert average_precision([*images, images[2]], 4).overall == average_precision(images, 4).overall
    nothing = dict(found_boxes=np.zeros((0, 4)), found_scores=np.zeros(0), found_classes=np.zeros(0, int))
    scores = average_precision([one._replace(**nothing) for one in images], 4)
    assert scores.overall == (0, 0, 0) and scores.thresholds == (1.0,) * 4
    perfect = [
        one._replace(found_boxes=one.boxes, found_scores=np.full(len(one.boxes), 0.7), found_classes=one.classes)
        for one in judged(0, crowds=0.0)
    ]
    scores = average_precision(perfect, 4)
    assert scores.overall == pytest.approx((1, 1, 1)) and scores.thresholds == pytest.approx((0.6999,) * 4)


def test_thresholds_have_the_best_f1():
    """Recall 0.4 at precision 1 is F1 0.571, 0.8 at 0.5 is 0.615, all at 0.2 is 0.333.

    The threshold is a little below, so that the box is shown whose score it is."""
    precision = np.concatenate([np.full(41, 1.0), np.full(40, 0.5), np.full(20, 0.2)])
    scores = np.concatenate([np.full(41, 0.9), np.full(40, 0.6), np.full(20, 0.1)])
    assert best_thresholds(precision[None], scores[None]) == pytest.approx((0.5999,))


def test_table_and_curves(tmp_path):
    scores = average_precision(judged(2, missing=(1, 3)), 4)
    write_class_table(tmp_path / "ap.csv", scores, ("a", "b", "c, d", "e"), 7)
    assert (tmp_path / "ap.csv").read_text().splitlines()[2] == "b,,,,0,7"
    lines = class_table(tmp_path / "ap.csv").splitlines()
    assert lines[0] == "| class | AP | AP50 | AP75 | boxes |"
    assert lines[3] == "| b | – | – | – | 0 |" and lines[4].startswith("| c, d | ")
    assert (
        lines[2] == f"| a | {' | '.join(f'{value:.1%}' for value in scores.by_class[0].round(4))} | {scores.num_boxes[0]} |"
    )
    plot = np.array(precision_plot(scores.precision, scores.by_class[:, 1].tolist(), ("a", "b", "c", "d"))).reshape(-1, 3)
    counts = [(plot == color).all(axis=1).sum() for color in palette(4)]
    swatch = min(counts)
    assert counts[0] > swatch + 100 and counts[2] > swatch + 100, "lines of the classes that have boxes"
    assert counts[1] == counts[3] == swatch, "and the legend alone of the others"
