"""Semantic segmentation as a task: its runs, described by `preparation`, and predictions, without training libraries."""

from __future__ import annotations

from pathlib import Path

from simmim.finetune.segmentation.model import FILES
from simmim.finetune.segmentation.prediction import SegmentedImages, segment
from simmim.finetune.segmentation.settings import SegmentationSettings
from simmim.finetune.segmentation.tiled_prediction import segment_tiles
from simmim.finetune.task import Predictions, PreparedTask, ReportLine, Task
from simmim.messages import counted
from simmim.reading import TileSettings


class Segmentation(Task):
    """One class per pixel."""

    def prepare(self, settings: SegmentationSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
        """Images with label maps, UPerNet on the encoder's stages, cross entropy over pixels."""
        from simmim.finetune.segmentation.preparation import prepare

        return prepare(settings, device, report_line)

    def recognizes(self, path: str | Path) -> bool:
        """By the description beside the heads' weights."""
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
        """A label map for each image, to a folder."""
        out = Path(out or "predictions")
        return describe_result(segment(run, images, out, batch_size, overlays), out)

    def predict_tiles(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None,
        batch_size: int,
        tiles: TileSettings,
        overlap: float,
    ) -> Predictions:
        """A label map for each image, to a folder, read and written tile by tile."""
        out = Path(out or "predictions")
        return describe_result(segment_tiles(run, images, out, tiles, overlap, batch_size), out)


def describe_result(result: SegmentedImages, out: Path) -> Predictions:
    """What the command says of label maps."""
    total = sum(result.pixels.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in result.pixels.items() if count)
    counts = f"{counted(result.count, 'image')} segmented, {len(result.unreadable):,} unreadable"
    return Predictions(out, result.unreadable, f"{counts}: {out}\npixels   {shares}")
