"""What reading a folder leaves out: folders that cannot be read, and files that are no images. It is said, never dropped."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field

from simmim.messages import counted, name_some, notify

# Files that lie beside images by habit, without being meant as images: of file managers, and labels. Lower case.
SIDE_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "classes.txt"))
SIDE_STEMS, SIDE_ENDINGS = frozenset(("readme", "license", "licence")), frozenset((".csv",))
ENDINGS_NAMED = 6


@dataclass
class LeftOut:
    """Counts and names of what is left out.

    Attributes:
        denied: folders, and links, that could not be read, with the reason.
        endings: number of files without an image's extension, by their ending; "no ending" where a name has none.
        num_side_files: files that lie beside images by habit and are not worth a line.
        slide_parts: number of files of DICOM slides that are no slides of their own, by what they are.
    """

    denied: dict[str, str] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    num_side_files: int = 0
    slide_parts: Counter[str] = field(default_factory=Counter)

    @property
    def num_files(self) -> int:
        """All files that are no images."""
        return self.num_side_files + self.endings.total() + self.slide_parts.total()

    def deny(self, path: str, error: OSError) -> None:
        """A folder or link that could not be read."""
        self.denied[path] = error.strerror or type(error).__name__

    def count(self, path: str) -> None:
        """A file without an image's extension."""
        name = os.path.basename(path).lower()
        stem, ending = os.path.splitext(name)
        if name in SIDE_FILES or stem in SIDE_STEMS or ending in SIDE_ENDINGS:
            self.num_side_files += 1
        else:
            self.endings[ending or "no ending"] += 1

    def add(self, other: LeftOut) -> None:
        """Add what another folder leaves out."""
        self.denied |= other.denied
        self.endings.update(other.endings)
        self.num_side_files += other.num_side_files
        self.slide_parts.update(other.slide_parts)

    def report(self, source: str) -> None:
        """A `Notice` for the folders, one for the files, and one for parts of slides.

        Args:
            source: where they were found, as the user gave it.
        """
        if self.denied:
            number, whose = len(self.denied), "its" if len(self.denied) == 1 else "their"
            named = name_some(f"{path} ({reason})" for path, reason in self.denied.items())
            notify(
                f"{source!r} is read without {counted(number, 'folder')} that cannot be read: {named}; {whose} images "
                "are missing now, and are looked for again the next time"
            )
        if self.endings:
            frequent = self.endings.most_common()
            named = ", ".join(f"{ending} {count:,}" for ending, count in frequent[:ENDINGS_NAMED])
            if len(frequent) > ENDINGS_NAMED:
                named += f", others {sum(count for _, count in frequent[ENDINGS_NAMED:]):,}"
            verb = "is" if self.endings.total() == 1 else "are"
            notify(f"{counted(self.endings.total(), 'file')} in {source!r} {verb} not read: {named}")
        if self.slide_parts:
            named = ", ".join(counted(count, part) for part, count in self.slide_parts.most_common())
            notify(f"of each DICOM slide in {source!r} the finest level is read; left aside: {named}")
