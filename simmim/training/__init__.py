"""What both stages put around Lightning: trainer, data module, progress line, metrics file, checkpoints.

Training is one loop over steps: batches come from one endless stream (`simmim.data.EndlessBatchSampler`), an epoch is a number
of samples, and a run resumes at any step by taking the stream from there.
"""

from simmim.training.interruption import Interrupted, StopOnSignal
from simmim.training.logs import MetricsCsv
from simmim.training.progress import ProgressLine, SkippedImages, StepSeeds, Throughput
from simmim.training.run import FinishedRun, TrainingRun, check_before_start, run_training
from simmim.training.saving import SavedModel, SavePolicy, SaveRun, usable_checkpoint
from simmim.training.settings import OptimizerSettings, RunSettings
from simmim.training.streams import StreamData, TrackStreamPosition, ValidatedStreamData, per_device_batch
from simmim.training.trainer import (
    build_trainer,
    check_trainer_keys,
    default_precision,
    device_type,
    is_first_process,
    machine,
)
from simmim.training.watch import ActivationMonitor, NumericalGuard

__all__ = [
    "ActivationMonitor",
    "FinishedRun",
    "Interrupted",
    "MetricsCsv",
    "NumericalGuard",
    "OptimizerSettings",
    "ProgressLine",
    "RunSettings",
    "SavePolicy",
    "SaveRun",
    "SavedModel",
    "SkippedImages",
    "StepSeeds",
    "StopOnSignal",
    "StreamData",
    "Throughput",
    "TrackStreamPosition",
    "TrainingRun",
    "ValidatedStreamData",
    "build_trainer",
    "check_before_start",
    "check_trainer_keys",
    "default_precision",
    "device_type",
    "is_first_process",
    "machine",
    "per_device_batch",
    "run_training",
    "usable_checkpoint",
]
