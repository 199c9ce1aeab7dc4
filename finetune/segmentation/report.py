"""What a segmentation run shows of its validations: a table of classes, and pictures of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image

from simmim.files import atomic_write
from simmim.finetune.segmentation.iou import class_table, write_class_table
from simmim.finetune.segmentation.module import SegmentationFinetuning, ShownImage
from simmim.finetune.segmentation.overlays import COLUMNS, overlay_grid
from simmim.training.loggers import log_picture

CLASSES, PICTURE = "iou.csv", "masks.png"


class LogLabelMaps(pl.Callback):
    """Logs the first validation images with their labels and predictions after every validation in training."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = classes

    def on_validation_end(self, trainer: pl.Trainer, module: SegmentationFinetuning) -> None:
        """Log one picture, of the first process's images."""
        if not trainer.is_global_zero or not module.shown or trainer.state.fn != "fit":
            return
        picture = draw_predictions(module.shown, self.classes)
        log_picture(trainer.loggers, "masks", picture, trainer.global_step - 1, ", ".join(COLUMNS))


def report_validation(run: Path, module: SegmentationFinetuning, classes: Sequence[str]) -> None:
    """Write iou.csv, a row per class, and masks.png."""
    write_class_table(run / CLASSES, module.confusion, classes, module.trainer.global_step)
    if module.shown:
        with atomic_write(run / PICTURE) as temporary:
            draw_predictions(module.shown, classes).save(temporary, format="png")


def closing_text(run: Path) -> str:
    """The table of iou.csv."""
    return f"{class_table(run / CLASSES)}\n" if (run / CLASSES).is_file() else ""


def draw_predictions(shown: Sequence[ShownImage], classes: Sequence[str]) -> Image.Image:
    """Images, their labels and their predictions side by side."""
    images, labels, predictions = zip(*((one.image, one.label_map, one.predicted) for one in shown))
    return overlay_grid(images, labels, predictions, classes)
