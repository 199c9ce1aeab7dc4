"""Views of unlabeled scenes, and of others of which a box is pasted into them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simmim.data import ImageSamples
from simmim.data.pillow_guard import UNREADABLE
from simmim.finetune.augment.mixing import MixSettings
from simmim.finetune.segmentation.views import RandomScene

NO_BOX = (0, 0, 0, 0)


class UnlabeledScenes(ImageSamples):
    """Samples of unlabeled images by (epoch, index), with crops of theirs that teacher and student share.

    A sample has `image`; `label_map`, 0 inside the image and the view's `ignored_id` outside of it; and `box`: top, left,
    bottom and right in pixels of the part that another image fills, of which `partner` and `partner_map` are such a crop.
    The box is empty, and there is no partner, where nothing is pasted. Which images meet depends on (seed, epoch, index)
    alone, and not on the batch, so that batches are the same on any number of devices.

    Args:
        source: column `image`, undecoded.
        view: of images and label maps, as for the labeled images; any crop, whatever its classes.
        cutmix: probability that a box is pasted.
        dtype: of the label maps.
        channels, seed, options: as of `ImageSamples`.
    """

    def __init__(
        self, source, view: RandomScene, cutmix: float, dtype: np.dtype, channels: int, seed: int, **options: Any
    ) -> None:
        super().__init__(source, view, channels, seed, **options)  # type: ignore[arg-type]
        self.size, self.dtype = view.size, dtype
        self.mixing = MixSettings(cutmix=1.0, probability=cutmix)

    def view_of(self, index: int, generator: random.Random) -> dict:
        """A crop of the image at `index`, and what is pasted into it."""
        image, label_map, gray_copies = self.crop_of(index, generator)
        sample = {"image": image, "label_map": label_map, "gray_copies": gray_copies, "box": torch.tensor(NO_BOX)}
        top, left, bottom, right = self.mixing.draw(generator.getrandbits(62), *self.size).box or NO_BOX
        partner = generator.randrange(len(self))
        if bottom <= top or right <= left:
            return sample
        try:
            pasted, pasted_map, _ = self.crop_of(partner, generator)
        except UNREADABLE:  # it is named where it is a sample of its own
            return sample
        box = torch.tensor((top, left, bottom, right))
        return {**sample, "box": box, "partner": pasted, "partner_map": pasted_map}

    def crop_of(self, index: int, generator: random.Random) -> tuple[Tensor, Tensor, list[str]]:
        """A crop, where it is inside the image, and the image's path if it is a color image read as gray.

        Raises:
            One of `UNREADABLE`.
        """
        picture, _ = self.load(index)
        inside = np.broadcast_to(np.zeros((), self.dtype), picture.size)
        image, label_map = self.view(picture, inside, generator)  # type: ignore[call-arg, arg-type]
        return image, label_map, [self.name_of(index)] if picture.loses_color else []
