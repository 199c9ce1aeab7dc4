"""What can go wrong inside the numbers: steps that are not finite, losses that jump, activations that grow with depth.

`NumericalGuard` decides about every optimizer step; `ActivationMonitor` looks inside the encoder now and then and changes
nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from simmim.data import EndlessBatchSampler, ImageSamples
from simmim.files import atomic_write
from simmim.training.run_folder import LAST, checkpoints_folder

NON_FINITE_STEPS = "non-finite-steps.txt"
HEADER = "step\tevent\tvalues\tfiles of the batch\n"
# A loss is compared with its past once there are so many values of it; before, a median says little.
PAST_AT_LEAST = 20
# A plateau's losses may lie so close that a rise of one part in a thousand is many deviations; that is no spike.
SPIKE_AT_LEAST = 0.1


class NumericalGuard(pl.Callback):
    """Skips optimizer steps whose loss or gradient is not finite, stops a run that has nothing else any more, and counts
    jumps of the loss.

    A skipped step leaves weights and optimizer state as they are, bit for bit; the step counter, the schedule and the data
    go on, so that a resumed run meets the same batches at the same steps and decides alike. Under several processes all
    decide by the mean of their values, which is finite only where all are. `TrainingModule` calls
    `check_step` between clipping and the optimizer.

    Metrics, every `log_every_n_steps`: `skipped_steps` and `loss_spikes`, both counted from the run's beginning. Every such
    step is a line of RUN/non-finite-steps.txt: step as in metrics.csv, skipped or spike, the values, and the batch's files.

    Args:
        stop_after: so many skipped steps in a row stop the run.
        window_steps: a spike is a finite loss above the median of so many last ones by more than
        spike_mads: times their median absolute deviation (10 are 6.7 standard deviations of a normal distribution), and by
            more than a tenth of the median.
    """

    def __init__(self, run: Path, stop_after: int = 5, window_steps: int = 100, spike_mads: float = 10.0) -> None:
        if stop_after < 1 or window_steps < PAST_AT_LEAST or spike_mads <= 0:
            raise ValueError(
                f"stop_after {stop_after}, window_steps {window_steps}, spike_mads {spike_mads:g}: give 1 step or more, "
                f"{PAST_AT_LEAST} steps or more, a positive factor"
            )
        self.run, self.path = Path(run), Path(run) / NON_FINITE_STEPS
        self.stop_after, self.spike_mads = stop_after, spike_mads
        self.past: deque[float] = deque(maxlen=window_steps)
        self.skipped = self.in_a_row = self.spikes = 0
        self.step, self.saved_step = -1, None
        # Of the batches accumulated in this step: losses, each divided by their number, and what tells the files.
        self.losses: list[Tensor] = []
        self.batches: list[dict] = []

    def state_dict(self) -> dict:
        """What later decisions and counts depend on."""
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes}
        return {**counts, "past": list(self.past)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.skipped, self.in_a_row, self.spikes = state["skipped"], state["in_a_row"], state["spikes"]
        self.past.extend(state["past"])

    def on_save_checkpoint(self, trainer: pl.Trainer, *_) -> None:
        """Remember what there is to go back to."""
        self.saved_step = trainer.global_step

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        """A resumed run takes its steps since the checkpoint again: they leave the list."""
        self.saved_step = trainer.global_step or None
        if trainer.is_global_zero and self.path.is_file():
            _, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if int(line.split("\t")[0]) < trainer.global_step]
            with atomic_write(self.path) as temporary:
                temporary.write_text(HEADER + "".join(kept), encoding="utf-8")

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, *_) -> None:
        """Keep what tells the batch's files, but not its images."""
        if trainer.global_step != self.step:
            self.step, self.losses, self.batches = trainer.global_step, [], []
        light = {name: value for name, value in batch.items() if name in ("skipped", "stream_position", "file")}
        self.batches.append({**light, "images": len(batch["image"])})

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        """Take the loss, undoing the scale that float16 gives it."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.losses.append(loss.detach() / scaler.get_scale() if scaler else loss.detach())

    def check_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Skip the step that `optimizer` is about to take, or let it pass.

        Args:
            norm: of the gradient over all parameters, before clipping, a scalar.

        Raises:
            ValueError: when this is the `stop_after`-th skipped step in a row.
        """
        values = torch.stack([torch.stack(self.losses).sum().float(), norm.detach().float()])
        # One wait for the device. On CUDA the host comes to the optimizer's kernels only when the backward pass is through,
        # which costs the time to launch those of a fused AdamW; `normalize` waits like this at every step already.
        loss, norm = trainer.strategy.reduce(values, reduce_op="mean").tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            self.watch_loss(trainer, loss)
            return
        self.skipped += 1
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # Overflow is how float16 finds its scale: while that can still fall, it is no trouble.
        searching = scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1
        self.in_a_row += not searching
        drop_gradients(optimizer, scaler)
        said = f"loss {loss:.6g}, gradient norm {norm:.6g}"
        self.note(trainer, "skipped", said)
        if self.in_a_row >= self.stop_after:
            raise ValueError(self.verdict(said))

    def watch_loss(self, trainer: pl.Trainer, loss: float) -> None:
        """Note the loss where it stands out of its past, of which it becomes part."""
        if len(self.past) >= PAST_AT_LEAST:
            median = statistics.median(self.past)
            deviation = statistics.median(abs(value - median) for value in self.past)
            if loss - median > max(self.spike_mads * deviation, SPIKE_AT_LEAST * abs(median)):
                self.spikes += 1
                said = f"loss {loss:.6g}, median of the last {len(self.past)} {median:.6g} ± {deviation:.2g}"
                self.note(trainer, "spike", said)
        self.past.append(loss)

    def note(self, trainer: pl.Trainer, event: str, said: str) -> None:
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
            fresh = not self.path.is_file()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(HEADER * fresh + "\t".join([str(self.step), event, said, *files]) + "\n")

    def verdict(self, said: str) -> str:
        """Why the run stops and what can be done."""
        checkpoint = checkpoints_folder(self.run) / LAST
        if self.saved_step is None:
            saved = "no checkpoint was saved before"
        else:
            saved = f"the last good checkpoint is {checkpoint}, after {self.saved_step:,} steps"
        return (
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite and were skipped, the last of them "
            f"step {self.step} ({said}); {saved}. Likely the learning rate is too high, 16-bit precision overflows, or the "
            f"images listed in {self.path} are at fault: look at those, and start a new run with a lower --optim.lr or "
            f"--precision 32-true" + ("" if self.saved_step is None else f", by --init {self.run} from the saved weights")
        )

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        """Log the counts. Past the module's own logging, which would send each number to the device first."""
        if self.skipped:
            trainer.progress_bar_metrics["skipped steps"] = self.skipped
        if trainer.global_step > self.step and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                counts = {"skipped_steps": self.skipped, "loss_spikes": self.spikes}
                logger.log_metrics(counts, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, *_) -> None:
        """Say so once more at the end."""
        if self.skipped and trainer.is_global_zero:
            print(f"{self.skipped} steps whose loss or gradient was not finite were skipped; see {self.path}")


def drop_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Make the optimizer's next step one that changes nothing, neither weights nor its own state.

    Parameters without a gradient are passed over, weight decay and moments included, while the step itself is still called
    and counted. A float16 scaler that has yet to look at the gradients wants to find some, and passes over what is not
    finite.
    """
    looked_at_later = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = torch.full_like(parameter.grad, math.nan) if looked_at_later else None


def batch_files(trainer: pl.Trainer, batch: Mapping, number: int) -> list[str]:
    """Paths of this process's batch, in the order of its images; of a stream that does not say them, places in it.

    Args:
        batch: `images`, how many, and of the batch itself what is there of `skipped`, `place` and `file`.
        number: of the batch, from 0 in the run's beginning.
    """
    if "stream_position" in batch:
        paths = batch.get("file", [None] * len(batch["stream_position"]))
        places = [f"image {taken} of epoch {epoch} of worker {worker}" for worker, epoch, taken in batch["stream_position"]]
        return [path or place for path, place in zip(paths, places)]
    samples: ImageSamples = trainer.datamodule.train
    order = EndlessBatchSampler(
        len(samples), batch["images"], samples.seed, trainer.global_rank, trainer.world_size, start=number
    )
    unreadable = {path for path, _ in batch["skipped"]}
    files = []
    for index in map(samples.row_of, next(iter(order))):
        path = samples.source[index]["image"]["path"] or f"image {index}"
        files.append(f"{path} (unreadable, another in its place)" if path in unreadable else path)
    return files


class ActivationMonitor(pl.Callback):
    """Measures root mean square and largest magnitude of what every encoder block and merging hands on, on one batch every
    so many steps.

    In a network that trains well the amplitude neither grows nor shrinks by orders of magnitude with depth; where it does,
    16-bit precision overflows first and the run then (arXiv 2111.09883, figure 2). Goes to TensorBoard as
    `per_block/rms/stage0.block1`, `per_block/max/stage0.merging`, …, and to RUN/activations.png, the first measure
    beside the latest. Results of training stay the same bit for bit. Between measures nothing is attached to the model.

    Args:
        every_steps: from the run's first step on.
    """

    def __init__(self, run: Path, every_steps: int) -> None:
        if every_steps < 1:
            raise ValueError(f"activations every {every_steps} steps: give 1 or more")
        self.path, self.every_steps = Path(run) / "activations.png", every_steps
        self.first: dict | None = None  # {"step": …, "rms": {name: value}, "max": {name: value}}
        self.latest: dict | None = None
        self.step = -1
        self.hooks: list = []
        self.seen: dict[str, Tensor] = {}

    def state_dict(self) -> dict:
        """The first measure, which a resumed run compares with."""
        return {"first": self.first}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.first = state["first"]

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Attach to the encoder for the first batch of every `every_steps`-th step."""
        step, before = trainer.global_step, self.step
        self.step = step
        if step == before or step % self.every_steps or not trainer.is_global_zero:
            return
        self.seen = {}
        for name, part in module.model.encoder.named_stages().items():
            self.hooks.append(part.register_forward_hook(self.measure(name)))

    def measure(self, name: str):
        """A forward hook that keeps two numbers of an output, on its device."""

        @torch.no_grad()
        def keep(part: nn.Module, inputs, output: Tensor) -> None:
            self.seen[name] = torch.stack(amplitude(output.detach()))

        return keep

    def on_before_backward(self, trainer: pl.Trainer, *_) -> None:
        """Detach before blocks are recomputed, bring the numbers over at once, log and draw them."""
        if not self.hooks:
            return
        self.detach()
        names, values = list(self.seen), torch.stack(list(self.seen.values())).tolist()
        self.latest = {"step": self.step, "rms": {}, "max": {}}
        for name, (rms, largest) in zip(names, values):
            self.latest["rms"][name], self.latest["max"][name] = rms, largest
        self.first = self.first or self.latest
        scalars = {f"per_block/{kind}/{name}": self.latest[kind][name] for kind in ("rms", "max") for name in names}
        for logger in trainer.loggers:
            logger.log_per_block(scalars, self.step)
        with atomic_write(self.path) as temporary:
            activation_plot([self.first, self.latest]).save(temporary, format="png")

    def on_exception(self, *_) -> None:
        """Leave the model as it was."""
        self.detach()

    def detach(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def amplitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and largest magnitude of all elements: two scalars, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = x.aminmax()
    largest = torch.maximum(-low, high)
    # Relative to the largest: the square of 1e20, which a diverging network reaches, is beyond float32.
    return largest * (x / largest.clamp(min=torch.finfo(x.dtype).tiny)).square_().mean().sqrt(), largest


FIRST_COLOR, LATEST_COLOR, GRID_COLOR = (150, 150, 150), (31, 90, 180), (225, 225, 225)
PLOT_PX, MARGIN_PX = (900, 480), (70, 34, 20, 54)  # width, height; left, top, right, bottom


def activation_plot(measures: Sequence[Mapping]) -> Image.Image:
    """Amplitudes from block to block on a logarithmic scale, the first measure in gray, the last in blue; root mean squares
    as thick lines with points, maxima as thin ones.

    Args:
        measures: `{"step": …, "rms": {name: value}, "max": {name: value}}` each. Values that a logarithm cannot show are
            left out.
    """
    names = list(measures[-1]["rms"])
    values = [value for measure in measures for kind in ("rms", "max") for value in measure[kind].values()]
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    left, top, right, bottom = MARGIN_PX
    width, height = PLOT_PX[0] - left - right, PLOT_PX[1] - top - bottom
    # No more than a dozen lines, however many decades a diverging run spans.
    decades = range(low, high + 1, max(1, (high - low) // 12))

    def place(index: int, value: float) -> tuple[float, float]:
        across = index / max(len(names) - 1, 1)
        return left + across * width, top + (high - math.log10(value)) / (high - low) * height

    picture = Image.new("RGB", PLOT_PX, "white")
    draw = ImageDraw.Draw(picture)
    for decade in decades:
        y = place(0, 10.0**decade)[1]
        draw.line([(left, y), (left + width, y)], fill=GRID_COLOR)
        draw.text((left - 8, y), f"1e{decade}", fill="black", anchor="rm", font_size=13)
    every = max(1, len(names) // 16)
    for index, name in enumerate(names):
        x = place(index, 1.0)[0]
        stage, part = name.split(".")
        if part == "merging":
            draw.line([(x, top), (x, top + height)], fill=GRID_COLOR, width=2)
        elif part == "block0":
            draw.text((x, top + height + 22), stage, fill="black", anchor="ma", font_size=13)
        if part != "merging" and int(part.removeprefix("block")) % every == 0:
            draw.text((x, top + height + 6), part.removeprefix("block"), fill="black", anchor="ma", font_size=13)
    for measure, color in zip((measures[0], measures[-1]), (FIRST_COLOR, LATEST_COLOR)):
        for kind, thickness in (("max", 1), ("rms", 3)):
            shown = [(index, measure[kind].get(name, 0.0)) for index, name in enumerate(names)]
            points = [place(index, value) if 0 < value < math.inf else None for index, value in shown]
            for start, end in itertools.pairwise(points):
                if start and end:
                    draw.line([start, end], fill=color, width=thickness)
            for x, y in filter(None, points if kind == "rms" else ()):
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
    texts = ((f"step {measures[0]['step']:,}", FIRST_COLOR), (f"step {measures[-1]['step']:,}", LATEST_COLOR))
    draw.text((left, 8), "activations after each block: root mean square (points), maximum (thin)", "black", font_size=13)
    for number, (text, color) in enumerate(texts):
        draw.text((PLOT_PX[0] - right - 130 * (1 - number), 8), text, fill=color, anchor="ra", font_size=13)
    return picture
