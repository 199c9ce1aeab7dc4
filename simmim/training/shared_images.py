"""The images that an encoder has been pre-trained on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from simmim.data import open_images
from simmim.messages import without_notices
from simmim.renamed_settings import with_current_names
from simmim.training.run_folder import CONFIG

if TYPE_CHECKING:
    import datasets


def pretraining_images(init: str) -> datasets.Dataset | None:
    """The images of the pre-training run that an encoder comes from; None where that is unknown, or they are not here.

    Only folders, globs and lists of files are opened, which costs next to nothing.

    Args:
        init: a run folder, or the encoder/ in one.
    """
    folder = Path(init).expanduser()
    file = next((path for path in (folder / CONFIG, folder.parent / CONFIG) if path.is_file()), None)
    if file is None:
        return None
    try:
        settings, _ = with_current_names(yaml.safe_load(file.read_text(encoding="utf-8")))
        if "model" not in settings:  # a fine-tuning, whose images have labels
            return None
        data = settings["data"] if isinstance(settings["data"], dict) else {"path": settings["data"]}
        paths = [data["path"]] if isinstance(data["path"], str) else data["path"]
        if data.get("streaming") or not all(map(is_cheap, paths)):
            return None
        with without_notices():  # the pre-training has told them
            return open_images(paths, data.get("column"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def is_cheap(path: str) -> bool:
    """Whether a source of images is files here that are listed without being read."""
    from simmim.data.readers import detect_reader

    expanded = os.path.expanduser(path)
    return (os.path.exists(expanded) or any(sign in path for sign in "*?[")) and not detect_reader(path)[0].has_columns
