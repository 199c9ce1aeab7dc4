"""Predictions of a fine-tuned classifier for a folder of images, to CSV."""
from __future__ import annotations

import csv
from pathlib import Path

import torch
from tqdm import tqdm

from finetune.classification import load_classifier
from simmim.data import UNREADABLE, CentreView, normalise, open_images, open_picture, reason
from simmim.files import whole_file
from simmim.training import device_type


def predict(run: str | Path, images: str | Path, out: str | Path, batch_size: int = 64) -> tuple[int, dict[str, str]]:
    """Classify every image below `images` and write path, class and probabilities to `out`, a row an image.

    Args:
        run: a run of `simmim finetune`, its folder encoder/, or a classifier in any format that `load_encoder` reads.
        out: CSV file to write, whole or not at all; must not exist yet.

    Returns:
        How many images were classified, and the reason of each that could not be read, by path.

    Raises:
        ValueError: when `run` is no classifier, there are no images, none can be read, or `out` exists.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{str(out)!r} exists: give a new file")
    saved = load_classifier(run)
    device = device_type()
    model = saved.model.to(device)
    source = open_images(images)
    preprocessing = saved.preprocessing
    view = CentreView(preprocessing.image_size, preprocessing.crop, preprocessing.interpolation, preprocessing.fit)
    channels = model.encoder.config.in_channels
    rows, unreadable, waiting = [], {}, []

    def classify() -> None:
        batch = torch.stack([pixels for _, pixels in waiting]).to(device)
        with torch.inference_mode():
            logits = model(normalise(batch, preprocessing.mean, preprocessing.std))
        for (path, _), shares in zip(waiting, logits.float().softmax(dim=1).tolist()):
            best = max(range(len(shares)), key=shares.__getitem__)
            rows.append([path, saved.classes[best], *(f"{share:.6f}" for share in shares)])
        waiting.clear()

    for row in tqdm(range(len(source)), desc="predicting", unit="image"):
        record = source[row]["image"]
        try:
            waiting.append((record["path"], view(open_picture(record, channels))))
        except UNREADABLE as error:
            unreadable[record["path"]] = reason(error)
        if len(waiting) == batch_size:
            classify()
    if waiting:
        classify()
    if not rows:
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of {len(unreadable)} images can be read; the first, {path}: {why}")
    with whole_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", *(f"probability {name}" for name in saved.classes)])
        writer.writerows(rows)
    return len(rows), unreadable
