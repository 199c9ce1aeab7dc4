"""What a detection run shows of its validations: a table of classes, precision over recall, and pictures of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image

from simmim.files import atomic_write
from simmim.finetune.dense.pictures import enlarged
from simmim.finetune.detection.ap import class_table, write_class_table
from simmim.finetune.detection.inference import trusted
from simmim.finetune.detection.module import DetectionFinetuning, ShownImage
from simmim.finetune.detection.pictures import (
    COLUMNS,
    MAX_CELL_PX,
    MIN_CELL_PX,
    box_grid,
    draw_boxes,
    palette,
    precision_plot,
)
from simmim.training.loggers import log_picture

CLASSES, CURVES, PICTURE = "ap.csv", "precision-recall.png", "boxes.png"


class LogBoxes(pl.Callback):
    """Logs the first validation images with given and found boxes after every validation in training."""

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionFinetuning) -> None:
        """Log one picture, of the first process's images."""
        if not trainer.is_global_zero or not module.shown or trainer.state.fn != "fit":
            return
        picture = draw_shown(module.shown, module.classes, module.scores.thresholds)
        log_picture(trainer.loggers, "boxes", picture, trainer.global_step - 1, ", ".join(COLUMNS))


def report_validation(run: Path, module: DetectionFinetuning) -> None:
    """Write ap.csv, a row per class, precision-recall.png and boxes.png."""
    scores, classes = module.scores, module.classes
    write_class_table(run / CLASSES, scores, classes, module.trainer.global_step)
    pictures = {CURVES: precision_plot(scores.precision, scores.by_class[:, 1].tolist(), classes)}
    if module.shown:
        pictures[PICTURE] = draw_shown(module.shown, classes, scores.thresholds)
    for name, picture in pictures.items():
        with atomic_write(run / name) as temporary:
            picture.save(temporary, format="png")


def closing_text(run: Path) -> str:
    """The table of ap.csv."""
    return f"{class_table(run / CLASSES)}\n" if (run / CLASSES).is_file() else ""


def draw_shown(shown: Sequence[ShownImage], classes: Sequence[str], thresholds: Sequence[float]) -> Image.Image:
    """Images, the boxes that are given, and those that were found with a score from their class's threshold on."""
    colors, rows = palette(len(classes)), []
    for one in shown:
        image = Image.fromarray(enlarged(one.image, MIN_CELL_PX, MAX_CELL_PX))
        across, down = image.width / one.own_size[1], image.height / one.own_size[0]
        found = trusted(one.found, thresholds)
        given_px, found_px = (boxes.numpy() * [across, down, across, down] for boxes in (one.given.boxes, found.boxes))
        hidden = one.given.ignored.tolist()
        given_picture = draw_boxes(image, given_px, one.given.classes.tolist(), colors, hidden=hidden)
        found_picture = draw_boxes(image, found_px, found.classes.tolist(), colors, found.scores.tolist())
        rows.append((image, given_picture, found_picture))
    return box_grid(rows, classes)
