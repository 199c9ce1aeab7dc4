"""Whether files look like the channels of images, by their names: a hint, which nothing follows by itself."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from simmim.data.arrangement import CHANNEL, group_paths, natural_order, pattern_expression
from simmim.messages import name_some

if TYPE_CHECKING:
    import datasets

LOOKED_AT = 20_000  # files
CHANNELS = range(2, 33)  # of an image
COMPLETE = 0.8  # share of the images that must have all channels, so that a few missing files hide nothing
MATCHED = 0.8  # share of the files that must be channels
# _w1, ch00, _C01, -ch1sk1fk1fl1, _B8A: the letters, and the channel's number.
NUMBERED = re.compile(
    r"(?:(?:^|(?<=[^A-Za-z]))([Cc]hannel|[Cc]han|CH|[Cc]h)|(?:^|(?<=[-_ .]))([wcCB]))[-_]?"
    r"(\d{1,3}A?)(?=$|[-_ .]|sk\d|[0-9A-F]{8}-)"
)
IDENTIFIER = re.compile(r"[0-9A-F]{8}-[0-9A-F]{4}-.*")  # that ImageXpress adds to a name: w1B3A46C1E-…
STAINS = "dapi hoechst draq5 gfp egfp yfp cfp rfp mcherry tdtomato fitc tritc cy3 cy5 cy7 texasred dna rna agp mito"
LIGHTS = "brightfield bf phase dic red green blue nir swir swir1 swir2 rededge thermal pan"
WORDS = frozenset((*STAINS.split(), *LIGHTS.split()))


class ChannelHint(NamedTuple):
    """A pattern by which files are channels of images.

    Attributes:
        pattern: for data.channel_files.
        names: of the channels.
    """

    pattern: str
    names: tuple[str, ...]

    def describe(self, flag: str) -> str:
        """What there is to say of it in a line.

        Args:
            flag: that takes the pattern.
        """
        return (
            f"file names look like {len(self.names)} channels of an image each ({name_some(self.names, 5)}): "
            f'{flag} "{self.pattern}" reads them so'
        )


def hint_of(source: datasets.Dataset) -> ChannelHint | None:
    """The hint for a source of files of one channel each; None where names tell nothing, or there are none.

    Args:
        source: with a column `image`, undecoded.
    """
    records = source[: min(len(source), LOOKED_AT)]["image"]
    paths = [record["path"] for record in records if record["bytes"] is None and record["path"]]
    return suggest_pattern(paths) if len(paths) == len(records) else None


def suggest_pattern(paths: Sequence[str]) -> ChannelHint | None:
    """The first pattern by which most files are channels of images that have all of them."""
    for pattern in candidates(paths):
        try:
            groups, unmatched = group_paths(paths, pattern_expression(pattern), pattern)
        except ValueError:  # two files would be one channel
            continue
        names = sorted({name for files in groups.values() for name in files}, key=natural_order)
        num_complete = sum(len(files) == len(names) for files in groups.values())
        if (
            len(groups) > 1
            and len(names) in CHANNELS
            and num_complete >= COMPLETE * len(groups)
            and len(unmatched) <= (1 - MATCHED) * len(paths)
        ):
            return ChannelHint(pattern, tuple(names))
    return None


def candidates(paths: Sequence[str]) -> Iterator[str]:
    """Patterns that the name of some file in the middle suggests."""
    path = paths[len(paths) // 2] if paths else ""
    folder, name = os.path.split(os.path.splitext(path)[0])
    for found in reversed(list(NUMBERED.finditer(name))):
        before, after = name[: found.start(3)], name[found.end(3) :]
        letters = re.search(r"[-_ .]?[A-Za-z]+[_-]?$", before)
        start = letters[0] if letters else ""
        first = "" if len(start) == len(before) else "{image}"
        if any(letter in start for letter in "{}*"):
            continue
        if not after or IDENTIFIER.match(after):
            yield f"{first}{start}{{{CHANNEL}}}{'*' if after else ''}"
        else:
            yield f"{first}{start}{{{CHANNEL}}}{after}"
            yield f"{first}{start}{{{CHANNEL}}}{re.match('[^0-9]*', after)[0]}{{rest}}"  # type: ignore[index]
    yield from worded(paths, name, folder)


def worded(paths: Sequence[str], name: str, folder: str) -> Iterator[str]:
    """Patterns of names, or of folders, that end in the name of a stain or a band."""
    for separator in "-_ .":
        labels = {os.path.splitext(path)[0].rpartition(separator)[2].lower() for path in paths}
        if separator in name and len(labels) in CHANNELS and labels & WORDS:
            yield f"{{image}}{separator}{{{CHANNEL}}}"
    folders: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        folders[os.path.basename(os.path.dirname(path))].add(os.path.basename(path))
    if len(folders) in CHANNELS and {label.lower() for label in folders} & WORDS:
        yield f"{{{CHANNEL}}}/{{image}}"
