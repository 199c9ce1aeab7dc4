"""Reconstructions of any images by a run's model, as one picture."""
from __future__ import annotations

import random
from pathlib import Path

import torch

from pretrain.run import load_simmim
from simmim.data import UNREADABLE, CentreView, normalise, open_images, open_picture, reason
from simmim.files import whole_file
from simmim.visualise import reconstruction_grid


def reconstruct(run: str | Path, images: str | Path, out: str | Path, count: int = 8, seed: int = 0) -> Path:
    """Draw `count` images below `images` by `seed`, mask and reconstruct them, and write the grid to `out`.

    Raises:
        ValueError: when `run` holds no pre-trained model, no image can be read, or `out` exists.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"{str(out)!r} is no picture's name: end it in .png")
    if count < 1:
        raise ValueError(f"count is {count}: give 1 or more")
    model, settings = load_simmim(run)
    source = open_images(images)
    view = CentreView(settings.size)
    order = random.Random(seed).sample(range(len(source)), len(source))
    pixels, first_error = [], None
    for row in order:
        record = source[row]["image"]
        try:
            pixels.append(view(open_picture(record, settings.data.channels)))
        except UNREADABLE as error:
            first_error = first_error or f"{record['path']}: {reason(error)}"
        if len(pixels) == count:
            break
    if not pixels:
        raise ValueError(f"none of {len(source)} images can be read; the first, {first_error}")
    batch = normalise(torch.stack(pixels), settings.data.mean, settings.data.std)
    generator = torch.Generator().manual_seed(seed)
    mask = settings.masking().draw(len(batch), settings.size, generator)
    prediction = model.reconstruct(batch, mask)
    across = 2 if len(batch) > 4 else 1
    picture = reconstruction_grid(batch, mask, prediction, settings.data.mean, settings.data.std, across)
    with whole_file(out) as temporary:
        picture.save(temporary, format={"jpg": "jpeg"}.get(out.suffix[1:].lower(), out.suffix[1:]))
    return out
