"""Optimizer steps that are not finite are skipped, and jumps of the loss are counted."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from simmim.files import atomic_write
from simmim.messages import counted
from simmim.training.run_folder import LAST, checkpoints_folder
from simmim.training.streams import StreamData

NON_FINITE_STEPS = "non-finite-steps.txt"
HEADER = "step\tevent\tvalues\tfiles of the batch\n"
# The losses of a plateau may lie so close that a rise of one part in a thousand is many deviations. That is no spike.
MIN_SPIKE = 0.1


class NumericalGuard(pl.Callback):
    """Skips optimizer steps whose loss or gradient is not finite, stops a run that takes no other steps, and counts spikes
    of the loss.

    A skipped step leaves weights and optimizer state as they are, bit for bit. The step counter, the schedule and the data
    go on, so that a resumed run sees the same batches at the same steps and decides alike. Several processes decide by the
    mean of their values, which is finite only where all are. `TrainingModule` calls `check_step` between clipping and the
    optimizer.

    Metrics, every `log_every_n_steps` steps: `skipped_steps` and `loss_spikes`, both counted from the start of the run.
    Each such step is a line of RUN/non-finite-steps.txt: the step as in metrics.csv, skipped or spike, the values, and the
    files of the batch.

    Args:
        stop_after: number of skipped steps in a row that stops the run.
        window_steps: number of the last losses that a loss is compared with.
        spike_mads: a spike is a finite loss above the median of those by more than `spike_mads` times their median absolute
            deviation (10 are 6.7 standard deviations of a normal distribution), and by more than a tenth of the median.
        min_past: number of losses before the first comparison, as the median of fewer says little.
    """

    def __init__(
        self, run: Path, stop_after: int = 5, window_steps: int = 100, spike_mads: float = 10.0, min_past: int = 20
    ) -> None:
        if stop_after < 1 or window_steps < min_past or spike_mads <= 0:
            raise ValueError(
                f"stop_after {stop_after}, window_steps {window_steps}, spike_mads {spike_mads:g}: give 1 step or more, "
                f"{min_past} steps or more, a positive factor"
            )
        self.run, self.path = Path(run), Path(run) / NON_FINITE_STEPS
        self.stop_after, self.spike_mads, self.min_past = stop_after, spike_mads, min_past
        self.past: deque[float] = deque(maxlen=window_steps)
        self.skipped = self.in_a_row = self.spikes = 0
        self.step = -1
        self.saved_step: int | None = None
        # Of the batches accumulated in this step: losses, each divided by their number, and what identifies the files.
        self.losses: list[Tensor] = []
        self.batches: list[dict] = []

    def state_dict(self) -> dict:
        """Counts, and the losses that later decisions depend on."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return {**counts, "past": list(self.past)}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a checkpoint."""
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]
        self.past.extend(state["past"])

    def on_save_checkpoint(self, trainer: pl.Trainer, *_) -> None:
        """Note the step of the newest checkpoint, for the message."""
        self.saved_step = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """Remove the steps after the checkpoint from the list: a resumed run takes them again."""
        self.saved_step = trainer.global_step or None
        if trainer.is_global_zero and self.path.is_file():
            _header, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if int(line.split("\t")[0]) < trainer.global_step]
            with atomic_write(self.path) as temporary:
                temporary.write_text(HEADER + "".join(kept), encoding="utf-8")

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, *_) -> None:
        """Keep what identifies the batch's files, but not its images."""
        if trainer.global_step != self.step:
            self.step, self.losses, self.batches = trainer.global_step, [], []
        light = {name: value for name, value in batch.items() if name in ("skipped", "stream_position", "file")}
        self.batches.append(light)

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss, without the scale that float16 gives it."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Divided by a tensor: to read the scale would be to wait for the device.
        self.losses.append(loss.detach() / scaler.scale(torch.ones_like(loss)) if scaler else loss.detach())

    def check_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Decide about the step that `optimizer` is about to take. A skipped step gets no gradients.

        Args:
            norm: of the gradient over all parameters, before clipping, a scalar.

        Raises:
            ValueError: when this is the `stop_after`-th skipped step in a row.
        """
        values = torch.stack([torch.stack(self.losses).sum().float(), norm.detach().float()])
        # The one wait for the device in a step. On CUDA the host comes to the optimizer's kernels only when the backward
        # pass is through, which costs the time to launch those of a fused AdamW.
        loss, norm = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            self.check_loss(trainer, loss)
            return
        self.skipped += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # float16 finds its scale by overflow, which is no fault while the scale can still fall.
        searching = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1
        self.in_a_row += not searching
        drop_gradients(optimizer, scaler)
        values_text = f"loss {loss:.6g}, gradient norm {norm:.6g}"
        self.record(trainer, "skipped", values_text)
        if self.in_a_row >= self.stop_after:
            raise ValueError(self.stop_message(values_text))

    def check_loss(self, trainer: pl.Trainer, loss: float) -> None:
        """Record a spike. The loss becomes part of the past either way."""
        if len(self.past) >= self.min_past and (spike := describe_spike(self.past, loss, self.spike_mads)):
            self.spikes += 1
            self.record(trainer, "spike", spike)
        self.past.append(loss)

    def record(self, trainer: pl.Trainer, event: str, values_text: str) -> None:
        """Write one line, with the files of all processes."""
        files = [
            file
            for part, batch in enumerate(self.batches)
            for file in batch_files(trainer, batch, self.step * trainer.accumulate_grad_batches + part)
        ]
        if trainer.world_size > 1:
            gathered: list = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, files)
            files = [file for part in gathered for file in part]
        if trainer.is_global_zero:
            is_new = not self.path.is_file()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(HEADER * is_new + "\t".join([str(self.step), event, values_text, *files]) + "\n")

    def stop_message(self, values_text: str) -> str:
        """Why the run stops and what can be done."""
        checkpoint = checkpoints_folder(self.run) / LAST
        if self.saved_step is None:
            saved, start = "no checkpoint was saved before", ""
        else:
            saved = f"the last good checkpoint is {checkpoint}, after {self.saved_step:,} steps"
            start = f", from the saved weights by init {self.run}"
        return (
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite and were skipped, the last of them "
            f"step {self.step} ({values_text}); {saved}. Likely the learning rate is too high, 16-bit precision overflows, "
            f"or the images listed in {self.path} are at fault: look at those, and start a new run with a lower optim.lr or "
            f"precision 32-true{start}"
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Log the counts, not through the module, which would first send each number to the device."""
        if self.skipped:
            trainer.progress_bar_metrics["skipped steps"] = self.skipped
        if trainer.global_step > self.step and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                counts: dict[str, float] = {"skipped_steps": self.skipped, "loss_spikes": self.spikes}
                logger.log_metrics(counts, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Print the count at the end."""
        if self.skipped and trainer.is_global_zero:
            verb = "was" if self.skipped == 1 else "were"
            print(f"{counted(self.skipped, 'step')} whose loss or gradient was not finite {verb} skipped; see {self.path}")


def describe_spike(past: Sequence[float], loss: float, mads: float) -> str:
    """The loss beside the median of the past, where it is a spike as `NumericalGuard` defines it; empty otherwise."""
    median = statistics.median(past)
    deviation = statistics.median(abs(value - median) for value in past)
    if loss - median <= max(mads * deviation, MIN_SPIKE * abs(median)):
        return ""
    return f"loss {loss:.6g}, median of the last {len(past)} {median:.6g} ± {deviation:.2g}"


def drop_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Make the next step of `optimizer` change nothing, neither weights nor its own state.

    An optimizer skips parameters without a gradient, weight decay and moments included, while the step itself is still
    called and counted. A float16 scaler that has yet to inspect the gradients must find some, and skips those that are not
    finite.
    """
    inspected_later = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = torch.full_like(parameter.grad, math.nan) if inspected_later else None


def batch_files(trainer: pl.Trainer, batch: Mapping, number: int) -> list[str]:
    """Paths of this process's batch, in the order of its images; positions in a stream that has no paths.

    Args:
        batch: what is there of `skipped`, `stream_position` and `file`.
        number: of the batch, from 0 at the start of the run.
    """
    if "stream_position" in batch:
        paths = batch.get("file", [None] * len(batch["stream_position"]))
        places = [
            f"image {number} of epoch {epoch} of worker {worker}" for worker, epoch, number in batch["stream_position"]
        ]
        return [path or place for path, place in zip(paths, places)]
    data: StreamData = trainer.datamodule  # type: ignore[attr-defined]
    unreadable = {path for path, _ in batch["skipped"]}
    paths = map(data.train.path_of, next(iter(data.batches(number))))
    return [f"{path} (unreadable, another in its place)" if path in unreadable else path for path in paths]
