"""Rows of a data set, read from its table: `datasets` takes four times as long for one, of which an epoch has as many as
images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

COLUMNS = ("image", "label")


class Rows:
    """The rows of a data set by their numbers, as `source[number]` gives them: `image`, undecoded, and `label` if there is
    one. Each process finds the columns in the table by itself, so that a table that is mapped is not sent to it.

    Args:
        source: column `image`, undecoded.
    """

    def __init__(self, source: datasets.Dataset) -> None:
        self.source = source
        self.columns: Columns | None = None

    def __getitem__(self, number: int) -> dict[str, Any]:
        if self.columns is None:
            if not is_plain(self.source):
                return self.source[number]
            self.columns = Columns(self.source)
        return self.columns[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "columns": None}


class Columns:
    """The columns of a table of which `is_plain` is true."""

    def __init__(self, source: datasets.Dataset) -> None:
        table, order = source.data, source._indices
        image = table.column(COLUMNS[0])
        self.order = None if order is None else order.column(0)
        # Of a struct the parts are read faster than the whole. Files have no bytes in the table.
        parts = zip((field.name for field in image.type), image.flatten())
        self.parts = {name: part if part.null_count < len(part) else None for name, part in parts}
        self.others = {name: table.column(name) for name in COLUMNS[1:] if name in source.column_names}

    def __getitem__(self, number: int) -> dict[str, Any]:
        if self.order is not None:
            number = self.order[number].as_py()
        image = {name: part[number].as_py() if part is not None else None for name, part in self.parts.items()}
        return {COLUMNS[0]: image, **{name: column[number].as_py() for name, column in self.others.items()}}


def is_plain(source: datasets.Dataset) -> bool:
    """Whether a data set gives values as its table holds them, and tells the order of its rows, which it keeps to itself."""
    import datasets

    if not (hasattr(source, "_indices") and hasattr(source, "data")) or source.format["type"] is not None:
        return False
    columns = {name: source.features[name] for name in COLUMNS if name in source.column_names}
    image = columns.pop(COLUMNS[0], None)
    is_undecoded = isinstance(image, datasets.Image) and not image.decode
    return is_undecoded and all(isinstance(column, datasets.ClassLabel | datasets.Value) for column in columns.values())
