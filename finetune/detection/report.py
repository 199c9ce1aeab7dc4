"""What a detection run shows of its validations: tables of classes, precision over recall, pictures of boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from PIL import Image

from simmim.files import atomic_write
from simmim.finetune.dense.pictures import enlarged
from simmim.finetune.detection.ap import class_table, write_class_table
from simmim.finetune.detection.inference import trusted
from simmim.finetune.detection.masks import resized
from simmim.finetune.detection.module import DetectionFinetuning, ShownImage
from simmim.finetune.detection.pictures import (
    COLUMNS,
    MAX_CELL_PX,
    MIN_CELL_PX,
    box_grid,
    draw_boxes,
    palette,
    precision_plot,
    tint_masks,
)
from simmim.training.loggers import log_picture

CLASSES, CURVES, PICTURE = "ap.csv", "precision-recall.png", "boxes.png"
MASK_CLASSES = "mask-ap.csv"  # where masks are learned


class LogBoxes(pl.Callback):
    """Logs the first validation images with given and found boxes after every validation in training."""

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionFinetuning) -> None:
        """Log one picture, of the first process's images."""
        if not trainer.is_global_zero or not module.shown or trainer.state.fn != "fit":
            return
        picture = draw_shown(module.shown, module.classes, module.main_scores.thresholds)
        log_picture(trainer.loggers, "boxes", picture, trainer.global_step - 1, ", ".join(COLUMNS))


def report_validation(run: Path, module: DetectionFinetuning) -> None:
    """Write ap.csv, a row per class, mask-ap.csv where masks are learned, precision-recall.png and boxes.png."""
    scores, classes = module.main_scores, module.classes
    write_class_table(run / CLASSES, module.scores, classes, module.trainer.global_step)
    if module.mask_scores:
        write_class_table(run / MASK_CLASSES, module.mask_scores, classes, module.trainer.global_step, "masks")
    pictures = {CURVES: precision_plot(scores.precision, scores.by_class[:, 1].tolist(), classes)}
    if module.shown:
        pictures[PICTURE] = draw_shown(module.shown, classes, scores.thresholds)
    for name, picture in pictures.items():
        with atomic_write(run / name) as temporary:
            picture.save(temporary, format="png")


def closing_text(run: Path) -> str:
    """The table of ap.csv, after that of mask-ap.csv where there is one."""
    boxes, masks = (f"{class_table(run / name)}\n" if (run / name).is_file() else "" for name in (CLASSES, MASK_CLASSES))
    return f"{masks}\n{boxes}" if masks else boxes


def draw_shown(shown: Sequence[ShownImage], classes: Sequence[str], thresholds: Sequence[float]) -> Image.Image:
    """Images, the boxes and masks that are given, and those that were found with a score from their class's threshold on."""
    colors, rows = palette(len(classes)), []
    for one in shown:
        image = Image.fromarray(enlarged(one.image, MIN_CELL_PX, MAX_CELL_PX))
        across, down = image.width / one.own_size[1], image.height / one.own_size[0]
        found = trusted(one.found, thresholds)
        given_px, found_px = (boxes.numpy() * [across, down, across, down] for boxes in (one.given.boxes, found.boxes))
        hidden, size = one.given.ignored.tolist(), (image.height, image.width)
        given_classes, found_classes = one.given.classes.tolist(), found.classes.tolist()
        given_picture = found_picture = image
        if one.masks is not None and found.masks is not None:
            given_masks = [resized(mask, one.own_size, size) for mask in one.masks]
            found_masks = [mask.scaled(down, across).packed(size) for mask in found.masks]
            given_picture = tint_masks(image, given_masks, given_classes, colors, hidden)
            found_picture = tint_masks(image, found_masks, found_classes, colors)
        given_picture = draw_boxes(given_picture, given_px, given_classes, colors, hidden=hidden)
        found_picture = draw_boxes(found_picture, found_px, found_classes, colors, found.scores.tolist())
        rows.append((image, given_picture, found_picture))
    return box_grid(rows, classes)
