"""Optimization as published: which parameters decay, layer-wise learning rates, schedules, learning-rate scaling.

Pure functions of names, numbers and steps, independent of Lightning.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from simmim.encoders.base import Encoder

REFERENCE_BATCH = 512  # images; learning rates are given per this batch size, as in the papers
FUSED_DEVICES = ("cuda", "cpu", "mps")  # on which torch's AdamW has a fused implementation


@dataclass(frozen=True)
class ParameterRule:
    """The weight decay of a parameter, and the factor of its learning rate."""

    weight_decay: float
    lr_scale: float


def parameter_rules(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> dict[str, ParameterRule]:
    """The rule of each trainable parameter, by name.

    Vectors (biases and norms) do not decay, nor do parameters that the encoder or the model names in `no_decay`.

    With layer decay d and n = `Encoder.num_layers`, a parameter of layer i (`Encoder.layer_of`) has the learning rate
    d^(n + 1 − i): the patch embedding d^(n + 1), the first block d^n. The final norm and all parameters outside the encoder
    have the full rate.

    Args:
        model: an encoder, or a module with an encoder in its attribute `encoder`.
        layer_decay: d, in (0, 1]; 1 gives all layers the full rate.

    Raises:
        ValueError: for a layer decay out of range.
        AssertionError: when a pattern of `no_decay` matches no parameter. Patterns that match nothing are how published code
            came to decay position biases.
        KeyError: when the encoder has no layer for one of its parameters.
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer decay is {layer_decay}: give a factor in (0, 1], 1 for none")
    encoder, prefix = (model, "") if isinstance(model, Encoder) else (cast(Encoder, model.encoder), "encoder.")
    last_layer = encoder.num_layers + 1
    patterns = no_decay_patterns(model, encoder)
    rules = {}
    for name, parameter in model.named_parameters():
        layer = encoder.layer_of(name.removeprefix(prefix)) if name.startswith(prefix) else last_layer
        if not parameter.requires_grad:
            continue
        is_vector = parameter.ndim <= 1 or name.endswith(".bias")
        decays = not is_vector and not any(pattern in name for pattern in patterns)
        rules[name] = ParameterRule(weight_decay if decays else 0.0, layer_decay ** (last_layer - layer))
    return rules


def no_decay_patterns(model: nn.Module, encoder: Encoder) -> set[str]:
    """Substrings of the names of parameters that never decay: those of the encoder, and of the model if it has any.

    Raises:
        AssertionError: when a pattern matches no parameter.
    """
    patterns = {*encoder.no_decay(), *(model.no_decay() if hasattr(model, "no_decay") else ())}
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        assert any(pattern in name for name in names), f"no_decay names {pattern}: no parameter has that in its name"
    return patterns


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups for a torch optimizer by `parameter_rules`. Each trainable parameter is in exactly one."""
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
    """AdamW with the betas of the papers, (0.9, 0.999), fused if all parameters are on devices that support it."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in parameters)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def scaled_lr(lr: float, global_batch: int) -> float:
    """A learning rate per 512 images, for `global_batch` images per optimizer step: linear, as in the papers."""
    return lr * global_batch / REFERENCE_BATCH


def lr_by_root(peak: float, at_batch: int, batch: int) -> float:
    """The learning rate per 512 images whose peak grows with the root of the batch from `peak` at `at_batch` images.

    That suits Adam (arXiv 2205.10287). In proportion to the batch, as settings are scaled, a rate that small batches need
    would diverge at large ones.
    """
    return float(f"{peak * math.sqrt(batch / at_batch) * REFERENCE_BATCH / batch:.2g}")


def warmup_multistep(
    step: int, *, lr: float, warmup_lr: float, warmup_steps: int, milestones: Iterable[int], gamma: float
) -> float:
    """Learning rate at optimizer step 0, 1, …: linear from `warmup_lr` to `lr`, then times `gamma` at each milestone."""
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    return lr * gamma ** bisect.bisect_right(sorted(milestones), step)


def warmup_cosine(step: int, *, lr: float, warmup_lr: float, warmup_steps: int, total_steps: int, min_lr: float) -> float:
    """Learning rate at optimizer step 0, 1, …: linear from `warmup_lr` to `lr`, then half a cosine down to `min_lr`."""
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule in epochs. `by_step` converts it to steps when the length of an epoch is known.

    Args:
        lr: peak learning rate per 512 images of global batch.
        epochs: length of the run.
        warmup_epochs: length of the linear warm-up; may be a fraction.
        warmup_lr: learning rate at the start of the warm-up, per 512 images.
        decay: "cosine" to `min_lr`, or "multistep" by `gamma` at `milestones`.
        min_lr: final learning rate per 512 images; cosine only.
        milestones: epochs; multistep only.
        gamma: factor at each milestone; multistep only.

    Raises:
        ValueError: for a setting out of range.
    """

    lr: float
    epochs: float
    warmup_epochs: float
    warmup_lr: float
    decay: str = "cosine"
    min_lr: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if self.decay not in ("cosine", "multistep"):
            raise ValueError(f"schedule is {self.decay!r}: give 'cosine' or 'multistep'")
        if self.lr <= 0 or self.epochs <= 0:
            raise ValueError(f"learning rate {self.lr} over {self.epochs} epochs: give positive numbers")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warm-up of {self.warmup_epochs} epochs in a run of {self.epochs}: give 0 to {self.epochs} epochs"
            )

    def by_step(self, steps_per_epoch: float, global_batch: int) -> Callable[[int], float]:
        """The learning rate as a function of the optimizer step, from 0, at `global_batch` images per step."""
        lr, warmup_lr, min_lr = (scaled_lr(rate, global_batch) for rate in (self.lr, self.warmup_lr, self.min_lr))
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if self.decay == "multistep":
            milestones = [round(epoch * steps_per_epoch) for epoch in self.milestones]
            return lambda step: warmup_multistep(
                step, lr=lr, warmup_lr=warmup_lr, warmup_steps=warmup_steps, milestones=milestones, gamma=self.gamma
            )
        total_steps = round(self.epochs * steps_per_epoch)
        return lambda step: warmup_cosine(
            step, lr=lr, warmup_lr=warmup_lr, warmup_steps=warmup_steps, total_steps=total_steps, min_lr=min_lr
        )
