"""Reconstructions of any images by a run's model, as one picture."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from simmim.data import UNREADABLE, EvaluationView, describe_error, normalize, open_images, open_picture
from simmim.data.tiles import plan_tiles, sample_tiles
from simmim.files import atomic_write
from simmim.messages import counted
from simmim.pretrain.model import load_pretrained
from simmim.pretrain.reconstruction_grid import reconstruction_grid


def reconstruct(run: str | Path, images: str | Path, out: str | Path, count: int = 8, seed: int = 0) -> Path:
    """Draw `count` images below `images` by `seed`, or tiles where the run was trained on tiles, mask and reconstruct them,
    and write the grid to `out`.

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
    model, settings = load_pretrained(run)
    source = open_images(images, reading=settings.data.reading)
    if settings.data.tiles:
        plan = plan_tiles(source, settings.data.tiles, settings.data.reading, settings.data.max_pixels)
        how = (settings.data.channels, settings.data.max_pixels, settings.data.reading)
        source, _ = sample_tiles(source, plan, count, seed, how)
    view = EvaluationView(settings.size)
    order = random.Random(seed).sample(range(len(source)), len(source))
    pixels, first_error = [], None
    for row in order:
        record = source[row]["image"]
        try:
            pixels.append(
                view(open_picture(record, settings.data.channels, settings.data.max_pixels, settings.data.reading))
            )
        except UNREADABLE as error:
            first_error = first_error or f"{record['path']}: {describe_error(error)}"
        if len(pixels) == count:
            break
    if not pixels:
        raise ValueError(f"none of {counted(len(source), 'image')} can be read; the first, {first_error}")
    batch = normalize(torch.stack(pixels), settings.data.mean, settings.data.std)
    seeds = [random.Random(f"{seed}/{row}").getrandbits(62) for row in range(len(batch))]
    mask, prediction = model.reconstruct(batch, model.draw(settings.size, seeds, torch.device("cpu")))
    across = 2 if len(batch) > 4 else 1
    picture = reconstruction_grid(batch, mask, prediction, settings.data.mean, settings.data.std, across)
    with atomic_write(out) as temporary:
        picture.save(temporary, format={"jpg": "jpeg"}.get(out.suffix[1:].lower(), out.suffix[1:]))
    return out
