"""What a labeled task contributes to a fine-tuning run; `simmim.finetune.run` does what all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data.samples import ImageSamples, IndexedSamples
from simmim.finetune.settings import TransferSettings
from simmim.reading import TileSettings

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from simmim.checkpoints.export import Exported
    from simmim.finetune.averaging import AverageWeights
    from simmim.training.loggers import LossNames
    from simmim.training.module import TrainingModule

ReportLine = Callable[[str], object]  # prints or logs one line of text


def no_report(run: Path, module: pl.LightningModule) -> None:
    """Write nothing."""


def no_text(run: Path) -> str:
    """No text."""
    return ""


class SaveModel(Protocol):
    """Writes a model into a folder so that it can be read without the run."""

    def __call__(self, folder: Path, model: Any, /, provenance: dict) -> object: ...


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """All that a run needs to know of its task, from settings and labels.

    Attributes:
        settings: resolved; no setting is open.
        module: what is trained. Its `model` holds an encoder as `encoder` and is in training mode.
        source: what the encoder was read from; None for a preset.
        train: samples by key, of which those with labels make an epoch.
        validation: samples by (epoch, index).
        validation_batch_size: validation images per batch and device.
        classes: names of the classes.
        monitor: the validation metric by which the best model is chosen, as the module logs it: in [0, 1], higher is better.
        loss: under which name and description loggers show the module's loss.
        save: writes a model into a folder so that it can be read without the run. Called with folder, model and provenance.
        provenance: what an exported model says of the choice of its labels.
        reasons: a line for each value that was chosen for the user: the value, then why.
        test_validates: whether the validation images are a part that is called test.
        average: averages the weights for validation and export, in place of a plain average of decay optim.ema.
        callbacks: further callbacks. They are called before the best model is exported.
        report: writes into the run folder what the validation that has just ended says of the best model so far. Called with
            run folder and module, in the first process alone.
        closing_text: text about the best model to print at the end of the run, lines that end in a line break; empty for
            none. Called with the run folder.
    """

    settings: TransferSettings
    module: TrainingModule
    source: Checkpoint | None
    train: IndexedSamples
    validation: ImageSamples
    validation_batch_size: int
    classes: tuple[str, ...]
    monitor: str
    loss: LossNames
    save: SaveModel
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    test_validates: bool = False
    average: AverageWeights | None = None
    callbacks: tuple[pl.Callback, ...] = ()
    report: Callable[[Path, pl.LightningModule], object] = no_report
    closing_text: Callable[[Path], str] = no_text


@dataclass(frozen=True)
class Predictions:
    """What was predicted for images.

    Attributes:
        out: the file or folder that was written.
        unreadable: why each image could not be read, by path.
        summary: what was predicted, in lines.
    """

    out: Path
    unreadable: Mapping[str, str]
    summary: str


class Task(ABC):
    """One labeled task. It has no state: `prepare` returns all that a run needs.

    Attributes:
        form: of `simmim export`, which `export` writes; None for a task whose head other libraries do not get.
    """

    form: ClassVar[str | None] = None

    @abstractmethod
    def prepare(self, settings: TransferSettings, device: str, report_line: ReportLine | None = None) -> PreparedTask:
        """Read the labels, resolve the settings, and build samples, model and training module.

        Weights are drawn from torch's global generator, which the run has seeded.

        Args:
            settings: of this task's settings class.
            device: cuda, mps or cpu.
            report_line: called with a line for what was loaded, and for a head that came with the encoder.

        Raises:
            ValueError: for settings, labels or an encoder that cannot work. Nothing has been written.
        """

    def recognizes(self, path: str | Path) -> bool:
        """Whether `path`, a run or what it exported, holds a model of this task, by its files' names."""
        return False

    def predict(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        overlays: bool = True,
    ) -> Predictions:
        """Apply the model in `run` to images.

        Args:
            images: a folder, or any other source of images that pre-training reads.
            out: file or folder to write; the task's usual name by default. It must not exist yet.
            batch_size: images per forward pass.
            num_workers: processes that load images; by default what suits the machine.
            overlays: whether predictions that are pictures are also drawn over the images.

        Raises:
            ValueError: when `run` holds no model of this task, no image can be read, or `out` exists.
        """
        raise ValueError(f"{type(self).__name__} has no predictions to write: load its model in Python")

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
        """As `predict`, by other crops of each image than in validation.

        Args:
            views, crop: their number and their share of the sides, as of `simmim.evaluate.see_crops`.

        Raises:
            ValueError: as `predict`, for values out of range, and for a task whose predictions are places in images.
        """
        raise ValueError(f"{run} finds places in images, and sees them whole: leave out views and crop")

    def predict_tiles(
        self,
        run: str | Path,
        images: str | Path,
        out: str | Path | None,
        batch_size: int,
        tiles: TileSettings,
        overlap: float,
    ) -> Predictions:
        """As `predict`, tile by tile.

        Args:
            tiles: their size and resolution.
            overlap: of neighboring tiles, as a share of their sides.

        Raises:
            ValueError: as `predict`, and for a task that has no predictions of parts.
        """
        raise ValueError(f"{run} predicts for whole images: leave out tile; simmim embed --tile gives vectors of tiles")

    def export(
        self, run: str | Path, out: str | Path, format: str, image_size: tuple[int, int] | None, license: str | None
    ) -> Exported:
        """Write the model in `run`, encoder and head, into the new folder `out`, for others to load.

        Args:
            format: name of a format.
            image_size: (height, width) that formats of a fixed size are made for; that of training by default.
            license: what the model card says; by default what the provenance says, else unknown.

        Raises:
            ValueError: when `run` holds no model of this task, the format has no place for it, or `out` is in use.
        """
        raise ValueError(f"{type(self).__name__} has no form of export of its own: leave --form out")
