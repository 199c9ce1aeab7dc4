"""Classification as a task: its runs, described by `preparation`, and predictions, without training libraries."""

from __future__ import annotations

from pathlib import Path

from simmim.finetune.classification.prediction import predict
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.finetune.task import Predictions, PreparedTask, ReportLine, Task
from simmim.messages import counted


class Classification(Task):
    """One class per image."""

    def prepare(self, settings: ClassificationSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
        """Images by class, a head on the encoder, cross entropy."""
        from simmim.finetune.classification.preparation import prepare

        return prepare(settings, device, report_line)

    def predict(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        overlays: bool = True,
    ) -> Predictions:
        """Class and probabilities of each image, to a CSV file."""
        return self.predict_views(run, images, out, batch_size, num_workers, None, None)

    def predict_views(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None,
        batch_size: int,
        num_workers: int | None,
        views: int | None,
        crop: float | None,
    ) -> Predictions:
        """As `predict`, by the mean over some crops of each image; None for as the classifier was judged."""
        out = Path(out or "predictions.csv")
        count, unreadable = predict(run, images, out, batch_size, num_workers, views, crop)
        return Predictions(out, unreadable, f"{counted(count, 'image')} classified, {len(unreadable):,} unreadable: {out}")
