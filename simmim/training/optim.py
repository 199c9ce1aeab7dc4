"""Optimization as published: which parameters decay, layer-wise learning rates, schedules, learning-rate scaling.

Pure functions of names, numbers and steps; nothing here knows a Trainer.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from simmim.encoders.base import Encoder

REFERENCE_BATCH = 512  # images that learning rates are given per, as in the papers


@dataclass(frozen=True)
class ParameterRule:
    """How one parameter is optimized: its weight decay, and its share of the learning rate."""

    weight_decay: float
    lr_scale: float


def parameter_rules(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> dict[str, ParameterRule]:
    """The rule of every trainable parameter, by name.

    No decay for vectors (biases and norm weights) and for what encoder and model name as `no_decay`. With layer decay d and
    n = `Encoder.num_layers`, a parameter of layer i (`Encoder.layer_of`) learns at d^(n + 1 − i): the patch embedding at
    d^(n + 1), the first block at d^n, the final norm and all that is not the encoder's, the head, at full rate.

    Args:
        model: an encoder, or a module that has one as `encoder`.
        layer_decay: d above, in (0, 1]; 1 trains all layers alike.

    Raises:
        ValueError: for a layer decay out of range.
        AssertionError: when a pattern of `no_decay` matches no parameter: patterns that silently match nothing are how
            published code came to decay position biases.
        KeyError: when the encoder has no layer for one of its parameters.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer decay is {layer_decay}: give a factor in (0, 1], 1 for none")
    encoder, prefix = (model, "") if isinstance(model, Encoder) else (model.encoder, "encoder.")
    patterns = {*encoder.no_decay(), *(model.no_decay() if hasattr(model, "no_decay") else ())}
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        assert any(pattern in name for name in names), f"no parameter is called {pattern}"
    rules = {}
    for name, parameter in model.named_parameters():
        own = name.startswith(prefix)
        layer = encoder.layer_of(name.removeprefix(prefix)) if own else encoder.num_layers + 1
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim <= 1 or name.endswith(".bias")
        decayed = not vector and not any(pattern in name for pattern in patterns)
        rules[name] = ParameterRule(weight_decay if decayed else 0.0, layer_decay ** (encoder.num_layers + 1 - layer))
    return rules


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups for a torch optimizer; every trainable parameter sits in exactly one (see `parameter_rules`)."""
    groups: dict[ParameterRule, dict] = {}
    parameters = dict(model.named_parameters())
    for name, rule in parameter_rules(model, weight_decay, layer_decay).items():
        group = groups.setdefault(
            rule, {"params": [], "names": [], "weight_decay": rule.weight_decay, "lr": lr * rule.lr_scale}
        )
        group["params"].append(parameters[name])
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    """AdamW with the papers' betas (0.9, 0.999), in its fused form where all parameters' devices have one."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in ("cuda", "cpu", "mps") for parameter in parameters)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def scaled_lr(lr: float, global_batch: int) -> float:
    """A learning rate given per 512 images, for `global_batch` images an optimizer step: linear, as in the papers."""
    return lr * global_batch / REFERENCE_BATCH


def warmup_multistep(
    step: int, *, lr: float, warmup_lr: float, warmup_steps: int, milestones: Iterable[int], gamma: float
) -> float:
    """Learning rate at optimizer step 0, 1, …: linear from `warmup_lr`, then times `gamma` from each milestone on."""
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    return lr * gamma ** bisect.bisect_right(sorted(milestones), step)


def warmup_cosine(step: int, *, lr: float, warmup_lr: float, warmup_steps: int, total_steps: int, min_lr: float) -> float:
    """Learning rate at optimizer step 0, 1, …: linear from `warmup_lr`, then half a cosine to `min_lr` at the end."""
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule in epochs, turned into steps when the length of an epoch is known.

    Args:
        lr: peak learning rate per 512 images of global batch.
        epochs: length of the run.
        warmup_epochs: linear warm-up; fractions allowed.
        warmup_lr: where the warm-up starts, per 512 images.
        kind: "cosine" to `min_lr`, or "multistep" by `gamma` at `milestones`.
        min_lr: per 512 images; cosine only.
        milestones: epochs; multistep only.
        gamma: factor at each milestone.
    """

    lr: float
    epochs: float
    warmup_epochs: float
    warmup_lr: float
    kind: str = "cosine"
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.kind not in ("cosine", "multistep"):
            raise ValueError(f"schedule is {self.kind!r}: give 'cosine' or 'multistep'")
        if self.lr <= 0 or self.epochs <= 0:
            raise ValueError(f"learning rate {self.lr} over {self.epochs} epochs: give positive numbers")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warm-up of {self.warmup_epochs} epochs in a run of {self.epochs}: give 0 to {self.epochs} epochs"
            )

    def by_step(self, steps_per_epoch: int, global_batch: int) -> Callable[[int], float]:
        """The learning rate as a function of the optimizer step, from 0, at a global batch of `global_batch` images."""
        lr, warmup_lr, min_lr = (scaled_lr(rate, global_batch) for rate in (self.lr, self.warmup_lr, self.min_lr))
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if self.kind == "multistep":
            milestones = [round(epoch * steps_per_epoch) for epoch in self.milestones]
            return lambda step: warmup_multistep(
                step, lr=lr, warmup_lr=warmup_lr, warmup_steps=warmup_steps, milestones=milestones, gamma=self.gamma
            )
        total_steps = round(self.epochs * steps_per_epoch)
        return lambda step: warmup_cosine(
            step, lr=lr, warmup_lr=warmup_lr, warmup_steps=warmup_steps, total_steps=total_steps, min_lr=min_lr
        )
