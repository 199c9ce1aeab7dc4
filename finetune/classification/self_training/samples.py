"""Two views of each unlabeled image."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor

from simmim.data import ImageSamples, Picture


class UnlabeledSamples(ImageSamples):
    """Samples of unlabeled images with two views: `image` for the student, `weak` for the teacher. Their `label` is the true
    one where it is known, else −1.

    Args:
        source: columns `image`, undecoded, and `label`.
        view: of the student.
        weak_view: of the teacher.
        channels, seed, options: as of `ImageSamples`.
    """

    def __init__(
        self,
        source,
        view: Callable[[Picture, random.Random], Tensor],
        weak_view: Callable[[Picture, random.Random], Tensor],
        channels: int,
        seed: int,
        **options: Any,
    ) -> None:
        super().__init__(source, view, channels, seed, **options)
        self.weak_view = weak_view

    def view_of(self, index: int, generator: random.Random) -> dict:
        """Both views of the image at `index`, and its label."""
        picture, label = self.load(index)
        image = self.view(picture, generator)
        # Crops that are as weak as the teacher's need no second one.
        weak = image if self.view == self.weak_view else self.weak_view(picture, generator)
        gray_copies = [self.name_of(index)] if picture.loses_color else []
        return {"image": image, "weak": weak, "label": label, "gray_copies": gray_copies}
