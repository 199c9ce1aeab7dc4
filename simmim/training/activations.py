"""Amplitudes of the encoder's activations, block by block, in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from simmim.execution import at_least_float32
from simmim.files import atomic_write
from simmim.training.activation_plot import activation_plot


class ActivationMonitor(pl.Callback):
    """Measures root mean square and largest magnitude of the output of every part of the encoder, on one batch every
    `every_steps` steps.

    In a network that trains well the amplitude neither grows nor shrinks by orders of magnitude with depth. Where it does,
    first 16-bit precision overflows and then the run diverges (arXiv 2111.09883, figure 2). TensorBoard shows the measures
    as `per_block/rms/stage0.block1`, `per_block/max/stage0.merging`, …; RUN/activations.png shows the first one beside the
    latest. Results of training stay the same bit for bit. Between measures the model has no hooks.

    Args:
        run: the run folder.
        every_steps: counted from the first step of the run.
    """

    def __init__(self, run: Path, every_steps: int) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps is {every_steps}: give 1 or more")
        self.path, self.every_steps = Path(run) / "activations.png", every_steps
        self.first: dict | None = None  # {"step": …, "rms": {name: value}, "max": {name: value}}
        self.latest: dict | None = None
        self.step = -1
        self.hooks: list = []
        self.measured: dict[str, Tensor] = {}  # (2,) each, root mean square and maximum, on the device

    def state_dict(self) -> dict:
        """The first measure, which later ones are shown beside."""
        return {"first": self.first}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a checkpoint."""
        self.first = state["first"]

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        """Register hooks for the first batch of every `every_steps`-th step."""
        step, before = trainer.global_step, self.step
        self.step = step
        if step == before or step % self.every_steps or not trainer.is_global_zero:
            return
        self.measured = {}
        for name, part in module.model.encoder.named_stages().items():
            self.hooks.append(part.register_forward_hook(self.measure(name)))

    def measure(self, name: str) -> Callable:
        """A forward hook that measures the output of one part."""

        @torch.no_grad()
        def keep(part: nn.Module, inputs, output: Tensor) -> None:
            self.measured[name] = torch.stack(amplitude(output.detach()))

        return keep

    def on_before_backward(self, trainer: pl.Trainer, *_) -> None:
        """Remove the hooks before blocks are recomputed, copy the numbers to the host at once, log and draw them."""
        self.remove_hooks()
        if not self.measured:
            return
        names, values = list(self.measured), torch.stack(list(self.measured.values())).tolist()
        self.latest = {"step": self.step, "rms": {}, "max": {}}
        for name, (rms, largest) in zip(names, values):
            self.latest["rms"][name], self.latest["max"][name] = rms, largest
        self.measured = {}
        self.first = self.first or self.latest
        scalars = {f"per_block/{kind}/{name}": self.latest[kind][name] for kind in ("rms", "max") for name in names}
        for logger in trainer.loggers:
            logger.log_per_block(scalars, self.step)  # type: ignore[attr-defined]
        with atomic_write(self.path) as temporary:
            activation_plot([self.first, self.latest]).save(temporary, format="png")

    def on_exception(self, *_) -> None:
        """Remove the hooks."""
        self.remove_hooks()

    def remove_hooks(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def amplitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square and largest magnitude of all elements: two scalars, at least float32."""
    x = at_least_float32(x)
    low, high = x.aminmax()
    largest = torch.maximum(-low, high)
    # Relative to the largest: the square of 1e20, which a diverging network reaches, is beyond float32.
    return largest * (x / largest.clamp(min=torch.finfo(x.dtype).tiny)).square_().mean().sqrt(), largest
