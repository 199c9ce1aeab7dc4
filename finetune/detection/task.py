"""Detection as a task: its runs, described by `preparation`, and predictions, without training libraries."""

from __future__ import annotations

from pathlib import Path

from simmim.checkpoints.export import Exported
from simmim.finetune.detection.export import FORM, export_detector
from simmim.finetune.detection.model import FILES
from simmim.finetune.detection.prediction import detect
from simmim.finetune.detection.settings import DetectionSettings
from simmim.finetune.task import Predictions, PreparedTask, ReportLine, Task
from simmim.messages import counted


class Detection(Task):
    """Boxes around objects, and the objects' masks where labels have them."""

    form = FORM

    def prepare(self, settings: DetectionSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
        """Images with boxes, a pyramid head on the encoder's stages, losses per positive point."""
        from simmim.finetune.detection.preparation import prepare

        return prepare(settings, device, report_line)

    def recognizes(self, path: str | Path) -> bool:
        """By the description beside the head's weights."""
        return FILES.find(path) is not None

    def predict(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        overlays: bool = True,
    ) -> Predictions:
        """The boxes in each image, to a folder."""
        out = Path(out or "predictions")
        result = detect(run, images, out, batch_size, overlays)
        boxes = counted(sum(result.boxes.values()), "box")
        counts = f"{counted(result.count, 'image')}, {boxes}, {len(result.unreadable):,} unreadable"
        listed = ", ".join(f"{name} {count:,}" for name, count in result.boxes.items())
        return Predictions(out, result.unreadable, f"{counts}: {out}\nboxes    {listed}")

    def export(
        self, run: str | Path, out: str | Path, format: str, image_size: tuple[int, int] | None, license: str | None
    ) -> Exported:
        """Encoder and head, as this toolkit's own files or as ONNX."""
        return export_detector(run, out, format, image_size, license)
