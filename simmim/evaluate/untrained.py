"""The same encoder with random weights, which a pre-training must beat."""

from __future__ import annotations

import torch

from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig
from simmim.evaluate.labeled import Split
from simmim.evaluate.neighbors import held_out_knn_accuracy
from simmim.evaluate.scores import FeatureScore, score_features


def untrained_encoder(config: EncoderConfig, seed: int) -> Encoder:
    """The encoder with which a pre-training of that seed begins. Global generators stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would change those of all devices
        return registry.build(config).eval()


def score_untrained(
    split: Split, method: str, k: int = 20, temperature: float = 0.07, device: str | torch.device = "cpu"
) -> FeatureScore | None:
    """The score of one of the untrained encoder's features: the one whose nearest neighbors classify the training vectors
    best, each held out in turn. For the linear probe, too, which would take long for all of them.

    Returns:
        None where a class has a single label, which cannot be held out.
    """
    held_out = {
        name: held_out_knn_accuracy(vectors, split.train_labels, k, temperature, device)
        for name, vectors in split.train.items()
    }
    by_accuracy = {name: accuracy for name, accuracy in held_out.items() if accuracy is not None}
    if not by_accuracy:
        return None
    best = max(by_accuracy, key=lambda name: (by_accuracy[name], -split.train[name].shape[1]))
    chosen = split._replace(train={best: split.train[best]}, test={best: split.test[best]})
    return score_features(chosen, method, k, temperature, device=device).rows[0]
