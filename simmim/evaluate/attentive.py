"""The attentive probe: learned queries over the tokens of a frozen map, and logistic regression on what they gather.

After arXiv 2506.10178, where it reads out of encoders of masked image modeling what the mean of the map loses. With tokens
that are all equal it is logistic regression.

Shape letters: T images to train on, N tokens of a map, C channels, M queries, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.encoders.base import EncoderConfig, EncoderOutput, Size
from simmim.encoders.heads import attend
from simmim.evaluate.probe import ProbeResult, fit_and_test

MAX_SIDE = 8  # tokens; larger maps are averaged down to it
NUM_QUERIES, QUERY_STD = 4, 0.02  # different queries at first: equal ones would stay equal
STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # fewer than of the linear probe, as a fit takes longer
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Tokens:
    """The tokens of a stage's map, or of the last one after the norm, averaged down to at most `MAX_SIDE` per side.

    Args:
        image_size: (height, width) that the encoder sees.
        stage: as of `Feature`.
    """

    image_size: Size
    stage: int | None = None

    @property
    def name(self) -> str:
        """Name in tables and keys: "stage 2, attentive"."""
        return f"{'final' if self.stage is None else f'stage {self.stage}'}, attentive"

    def channels(self, config: EncoderConfig) -> int:
        """C for an encoder of this architecture."""
        return config.channels[-1 if self.stage is None else self.stage]

    def dim(self, config: EncoderConfig) -> int:
        """N · C for an encoder of this architecture."""
        stride = config.strides[-1 if self.stage is None else self.stage]
        height, width = (min(-(-side // stride), MAX_SIDE) for side in self.image_size)
        return height * width * self.channels(config)

    def extract(self, images: Tensor, output: EncoderOutput) -> Tensor:
        """(B, N · C) float32, token by token."""
        assert self.stage is None or output.stages is not None, "the encoder was not asked for its stages"
        features = (output.features if self.stage is None else output.stages[self.stage]).float()  # type: ignore[index]
        height, width = (min(side, MAX_SIDE) for side in features.shape[-2:])
        return F.adaptive_avg_pool2d(features, (height, width)).flatten(2).transpose(1, 2).flatten(1)


def mean_token(vectors: np.ndarray, channels: int) -> np.ndarray:
    """The mean over the tokens: (T, N · C) to (T, C)."""
    return vectors.reshape(len(vectors), -1, channels).mean(axis=1)


def attentive_probe(
    train: np.ndarray,
    train_labels: Sequence[int] | np.ndarray,
    test: np.ndarray,
    test_labels: Sequence[int] | np.ndarray,
    channels: int,
    seed: int = 0,
    files: np.ndarray | None = None,
) -> ProbeResult:
    """M queries and a linear layer, fitted to standardized tokens by L-BFGS in float32.

    The loss is that of logistic regression, cross entropy + ‖weights‖² / (2 · c · T) with queries among the weights, and its
    penalty is chosen in the same way, of `STRENGTHS`, on the same folds as by `linear_probe`.

    Args:
        train, test: (T, N · C) and (…, N · C), token by token.
        channels: C.
        seed: of the division into folds.
        files: as of `linear_probe`.

    Raises:
        ValueError: as `linear_probe`.
    """

    def fits(vectors: np.ndarray, labels: np.ndarray, strengths: Sequence[float]):
        return attentive_fits(vectors, labels, strengths, channels)

    return fit_and_test(train, train_labels, test, test_labels, seed, files, fits, STRENGTHS, np.float32)


def first_queries(channels: int) -> Tensor:
    """The queries that a fit begins with, (M, C): near zero, where attention is even, and each another."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_QUERIES, channels, generator=generator) * QUERY_STD


def attentive_fits(
    vectors: np.ndarray, labels: np.ndarray, strengths: Sequence[float], channels: int
) -> Iterator[tuple[Callable[[np.ndarray], np.ndarray], bool]]:
    """Fit one inverse strength after another, each from the solution before it; as `logistic_fits`."""
    tokens = torch.from_numpy(np.ascontiguousarray(vectors)).view(len(vectors), -1, channels)
    mean, std = tokens.mean(dim=(0, 1)), tokens.std(dim=(0, 1)).clamp(min=1e-6)
    tokens = (tokens - mean) / std
    classes, targets = np.unique(labels, return_inverse=True)
    target = torch.from_numpy(targets)
    queries = first_queries(channels).requires_grad_()
    weight = torch.zeros(len(classes), NUM_QUERIES * channels, requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)

    def logits(inputs: Tensor) -> Tensor:
        return F.linear(attend(queries, inputs).flatten(1), weight, bias)

    def predict(others: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(np.ascontiguousarray(others)).view(len(others), -1, channels)
        with torch.no_grad():
            best = [logits((part - mean) / std).argmax(dim=1) for part in inputs.split(1024)]
        return classes[torch.cat(best).numpy()]

    for c in strengths:
        optimizer = torch.optim.LBFGS([queries, weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

        def loss(c: float = c, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            penalty = (queries.square().sum() + weight.square().sum()) / (2 * c * len(tokens))
            value = F.cross_entropy(logits(tokens), target) + penalty
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        yield predict, optimizer.state[queries]["n_iter"] < MAX_ITERATIONS
