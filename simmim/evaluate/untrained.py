"""The same encoder with random weights, which a pre-training must beat."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig
from simmim.evaluate.attentive import mean_token
from simmim.evaluate.labeled import Split
from simmim.evaluate.neighbors import held_out_knn_accuracy
from simmim.evaluate.scores import FeatureScore, score_features


def untrained_encoder(config: EncoderConfig, seed: int) -> Encoder:
    """The encoder with which a pre-training of that seed begins. Global generators stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would change those of all devices
        return registry.build(config).eval()


def score_untrained(
    split: Split,
    method: str,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    attentive: Mapping[str, int] = MappingProxyType({}),
) -> FeatureScore | None:
    """The score of one of the untrained encoder's features: the one whose nearest neighbors classify the training vectors
    best, each held out in turn. For the linear probe, too, which would take long for all of them. Where the tokens of its
    stage are among the features, cross-validation decides between both.

    Args:
        attentive: as of `score_features`.

    Returns:
        None where a class has a single label, which cannot be held out.
    """
    pooled = {
        name: mean_token(vectors, attentive[name]) if name in attentive else vectors for name, vectors in split.train.items()
    }
    held_out = {
        name: held_out_knn_accuracy(vectors, split.train_labels, k, temperature, device, split.train_files)
        for name, vectors in pooled.items()
    }
    by_accuracy = {name: accuracy for name, accuracy in held_out.items() if accuracy is not None}
    if not by_accuracy:
        return None
    best = max(by_accuracy, key=lambda name: (by_accuracy[name], -pooled[name].shape[1]))
    names = dict.fromkeys((best, *(name for name in attentive if name.partition(", ")[0] == best.partition(", ")[0])))
    train, test = ({name: part[name] for name in names} for part in (split.train, split.test))
    scores = score_features(
        split._replace(train=train, test=test), method, k, temperature, device=device, attentive=attentive
    )
    return scores.best
