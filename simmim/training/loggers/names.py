"""Names of metrics: plain in metrics.csv (`loss`, `lr`), grouped and described on a page (`loss/masked_l1`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Plain name to the name on the page and its description.
GROUPED = {
    "lr": ("optimizer/learning_rate", "of the parameter group that learns fastest, at the step's batch size"),
    "grad_norm": ("optimizer/gradient_norm", "L2 norm over all parameters, before clipping"),
    "images_per_s": (
        "speed/images_per_s",
        "all of the batches, over all devices, mean since the last point; validation, probes, pictures left out",
    ),
    "labeled_images_per_s": (
        "speed/labeled_images_per_s",
        "those of speed/images_per_s with labels, where others have none",
    ),
    "unlabeled_images_per_s": (
        "speed/unlabeled_images_per_s",
        "those of speed/images_per_s without labels; each is one image, though teacher and student see views of their own",
    ),
    "data_wait_share": ("speed/data_wait_share", "share of training time spent waiting for images, 0 to 1"),
    "masked_l1": ("loss/of_masked_pixels", "mean absolute error over the masked pixels, a part of the loss"),
    "contrast": ("loss/of_contrast", "cross entropy of an image's other view among those of the batch, before its weight"),
    "agreement": ("contrast/agreement", "share of masked images that are nearest to their own other view, 0 to 1"),
    "accuracy": ("validation/accuracy", "share of the validation images, 0 to 1"),
    "top5_accuracy": ("validation/top5_accuracy", "share whose class is among the five most likely, 0 to 1"),
    "macro_f1": ("validation/macro_f1", "mean of F1 over the classes, each with the same weight, 0 to 1"),
    "mean_iou": (
        "validation/mean_iou",
        "intersection over union of true and predicted pixels, mean over the classes, 0 to 1",
    ),
    "ap": (
        "validation/ap",
        "average precision of boxes by COCO's rules, mean over overlaps from 0.5 to 0.95 and over the classes, 0 to 1",
    ),
    "ap50": ("validation/ap50", "average precision of boxes at overlap 0.5, mean over the classes, 0 to 1"),
    "ap75": ("validation/ap75", "average precision of boxes at overlap 0.75, mean over the classes, 0 to 1"),
    "mask_ap": (
        "validation/mask_ap",
        "average precision of masks by COCO's rules, mean over overlaps from 0.5 to 0.95 and over the classes, 0 to 1",
    ),
    "mask_ap50": ("validation/mask_ap50", "average precision of masks at overlap 0.5, mean over the classes, 0 to 1"),
    "mask_ap75": ("validation/mask_ap75", "average precision of masks at overlap 0.75, mean over the classes, 0 to 1"),
    "pixel_accuracy": ("validation/pixel_accuracy", "share of the validation pixels that are not ignored, 0 to 1"),
    "skipped_steps": ("stability/skipped_steps", "steps so far whose loss or gradient was not finite"),
    "loss_spikes": ("stability/loss_spikes", "steps so far whose loss was far above the median of the last steps"),
    "probe_s": ("speed/probe_s", "seconds of the last probe on labeled images"),
}
# Descriptions of scalars that are logged by their grouped names, by group.
GROUPS = {
    "iou": "intersection over union of the class's true and predicted pixels in the validation images, 0 to 1",
    "ap_by_class": "average precision of the class's boxes in the validation images, 0 to 1",
    "mask_ap_by_class": "average precision of the class's masks in the validation images, 0 to 1",
    "mask_ap_by_size": "average precision of masks of up to 32² px (small), up to 96² (medium), and above (large), 0 to 1",
    "ap_by_size": "average precision of boxes of up to 32² px (small), up to 96² (medium), and above (large), 0 to 1",
    "knn": "share of labeled test images that their nearest labeled neighbors classify correctly by these features, 0 to 1; "
    "chosen: the features that the training labels alone would choose, pixels: the plain images, untrained: random weights",
    "probe": "share of labeled test images that logistic regression over these frozen features classifies correctly, 0 to "
    "1; chosen: the features that the training labels alone would choose, pixels: the plain images, untrained: random "
    "weights",
}
# Lightning adds it to whatever is logged. Batches come from one endless stream, so it is always 0.
IGNORED_METRICS = ("epoch",)


class LossNames(NamedTuple):
    """How loggers show the module's `loss` and `validation_loss`.

    Attributes:
        name: of the scalar inside its group, for example masked_l1.
        description: text beside the plot; empty for none.
    """

    name: str = "training"
    description: str = ""


@dataclass(frozen=True)
class Names:
    """Maps plain names of scalars to grouped ones.

    Args:
        loss: what training minimizes.
    """

    loss: LossNames

    def __call__(self, name: str) -> str:
        """The grouped name; a name that has a group already stays as it is."""
        if name in GROUPED:
            return GROUPED[name][0]
        if name == "loss":
            return f"loss/{self.loss.name}"
        if name == "validation_loss":
            return f"validation/{self.loss.name}"
        return name if "/" in name else f"other/{name}"

    def description(self, name: str) -> str:
        """Text beside the plot of a plain name; empty for a scalar that is not in the tables."""
        if name in ("loss", "validation_loss"):
            return self.loss.description
        return GROUPED[name][1] if name in GROUPED else GROUPS.get(name.partition("/")[0], "")

    def grouped(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics by grouped names, without those that say nothing."""
        return {self(name): value for name, value in metrics.items() if name not in IGNORED_METRICS}
