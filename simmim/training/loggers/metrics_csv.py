"""metrics.csv of a run."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from simmim.files import atomic_write
from simmim.training.loggers.base import RunLogger


class MetricsCsv(RunLogger):
    """metrics.csv: one row per logged step, one column per metric. A resumed run drops the rows beyond its checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.columns = path, ["step"]
        self.rows: list[dict] = []  # not final: the last one may still get values after it was written
        self.offset: int | None = None  # position in the file of the first of them

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Do nothing: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row. Metrics of one step share a row."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
            if len(self.rows) > 100:
                self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows since the last call. The file is rewritten only for a new column or after a resume.

        A kill at any moment leaves each row that was written before: a checkpoint may hold its step already.
        """
        if not self.rows:
            return
        known = list(dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)]))
        if self.offset is None or known != self.columns:
            old = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    old = [row for row in csv.DictReader(file) if None not in row.values()]  # a kill may cut the last one
                old = [row for row in old if int(row["step"]) < self.rows[0]["step"]]
            self.columns = list(dict.fromkeys([*known, *(key for row in old for key in row)]))
            header = dict(zip(self.columns, self.columns))
            final, last = self.as_text([header, *old, *self.rows[:-1]]), self.as_text(self.rows[-1:])
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(final + last)
            self.offset = len(final)
        else:
            final, last = self.as_text(self.rows[:-1]), self.as_text(self.rows[-1:])
            with self.path.open("r+b") as file:  # over what was the last row, and cut afterwards
                file.seek(self.offset)
                file.write(final + last)
                file.truncate()
            self.offset += len(final)
        self.rows = self.rows[-1:]

    def as_text(self, rows: list[dict]) -> bytes:
        """Rows as they stand in the file."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(rows)
        return text.getvalue().encode("utf-8")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last rows."""
        self.save()
