"""The teacher: the moving average of the student's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from simmim.finetune.averaging import AverageWeights


class Teacher(AverageWeights):
    """`AverageWeights` that also predicts in the course of a step. It is what a run validates and exports."""

    @property
    def state_key(self) -> str:
        return AverageWeights.__qualname__

    @contextmanager
    def predicting(self, model: nn.Module) -> Iterator[None]:
        """A context in which `model` has the average's weights and is in evaluation mode, without stochastic depth."""
        modes = [(module, module.training) for module in model.modules()]
        self.swap(model, True)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            self.swap(model, False)
