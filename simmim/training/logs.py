"""Where metrics go besides the screen."""
from __future__ import annotations

import csv
from pathlib import Path

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from simmim.files import whole_file


class MetricsCsv(Logger):
    """metrics.csv: a row a logged step, a column a metric. A resumed run drops rows from beyond its checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.columns = path, ["step"]
        self.rows: list[dict] = []  # not yet final: the last of them may still get columns after it was written
        self.offset: int | None = None  # where in the file the first of them belongs

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: the run folder holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row; metrics of one step share it."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1].update(metrics)
        else:
            self.rows.append({"step": step, **metrics})
            if len(self.rows) > 100:
                self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what has come since the last call; rewrites the file only for a new column or after a resume."""
        if not self.rows:
            return
        known = list(dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)]))
        if self.offset is None or known != self.columns:
            old = []
            if self.path.is_file():
                with self.path.open(newline="", encoding="utf-8") as file:
                    old = [row for row in csv.DictReader(file) if int(row["step"]) < self.rows[0]["step"]]
            self.columns = list(dict.fromkeys([*known, *(key for row in old for key in row)]))
            with whole_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(old)
            self.offset = self.path.stat().st_size
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            file.truncate(self.offset)
            file.seek(self.offset)
            writer = csv.DictWriter(file, self.columns)
            writer.writerows(self.rows[:-1])
            self.offset = file.tell()
            writer.writerow(self.rows[-1])
        self.rows = self.rows[-1:]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The last rows."""
        self.save()
