"""timm's networks in timm's folders."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.formats.backbone.origin import (
    check_complete,
    holds_safetensors,
    named_as_ours,
    origin_of,
    refuse_export,
)
from simmim.checkpoints.formats.timm import TimmFormat, TimmRows
from simmim.checkpoints.source import Source
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.backbone.measure import measured_config
from simmim.encoders.backbone.timm_networks import any_size_options, create, import_timm
from simmim.encoders.base import State
from simmim.messages import did_you_mean

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


class TimmBackbones(TimmRows):
    """Any network of timm that is no encoder of this toolkit."""

    first_conv = classifier = ""

    def detect(self, source: Source) -> bool:
        name = source.config.get("architecture")
        # A SwinV2 that its own rows do not recognize is damaged.
        return isinstance(name, str) and "model_type" not in source.config and holds_safetensors(source) and not_ours(name)

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        name = source.config["architecture"]
        stated = source.config.get("pretrained_cfg") or source.config
        arguments = dict(source.config.get("model_args") or {})
        input_size = stated.get("input_size") or (3, 224, 224)
        channels = arguments.pop("in_chans", None) or input_size[0]
        given = arguments.get("img_size") or input_size[1:]
        size = (given, given) if isinstance(given, int) else tuple(given)
        arguments.pop("num_classes", None)
        if source.config.get("global_pool"):
            arguments.setdefault("global_pool", source.config["global_pool"])
        arguments = any_size_options(name, channels, arguments)
        config = measured_config("timm", name, arguments, size, channels)
        state, unexpected = load(create(name, channels, arguments), source)
        tag = stated.get("tag") or name.partition(".")[2]
        return Checkpoint(
            config,
            state,
            Preprocessing(
                size,
                mean_of(stated, "mean", channels),
                mean_of(stated, "std", channels),
                stated["interpolation"] if stated.get("interpolation") in INTERPOLATIONS else "bicubic",
                stated.get("crop_pct") or 0.875,
                "squash" if stated.get("crop_mode") == "squash" else "crop",
            ),
            source.file,
            "timm",
            provenance=origin_of("timm", name.partition(".")[0], source.folder, {"tag": tag or None}),
            notes=unexpected,
        )

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        raise NotImplementedError  # `differences` refuses the format first

    def architecture_name(self, checkpoint: Checkpoint) -> str:
        raise NotImplementedError

    def model_arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        raise NotImplementedError

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        refuse_export(checkpoint, TimmFormat.title)
        return ()


ROWS = TimmBackbones()


def published_id(name: str) -> str:
    """The hub's id, owner/name, of weights that timm knows by name, "vit_small_patch14_dinov2.lvd142m".

    Raises:
        ValueError: for an unknown name, and for weights that are not on the hub.
    """
    timm = import_timm()
    known = timm.list_pretrained()
    if name not in known and not any(one.partition(".")[0] == name for one in known):
        nearest = did_you_mean(name, known).partition(" known")[0].rstrip(";")
        raise ValueError(f"timm {timm.__version__} has no weights {name!r}{nearest}")
    config = timm.get_pretrained_cfg(name)
    if not config.hf_hub_id:
        raise ValueError(f"timm's weights {name} are not on the hub: give a local folder, of timm.models.save_for_hf")
    return config.hf_hub_id


def not_ours(name: str) -> bool:
    """Whether a network of this name is no encoder of this toolkit."""
    return not name.startswith("swinv2_") or name.startswith("swinv2_cr")


def mean_of(stated: Mapping[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """Mean or standard deviation of each channel, as stated or as timm's default."""
    values = stated.get(name) or (IMAGENET_MEAN if name == "mean" else IMAGENET_STD)
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def load(network: nn.Module, source: Source) -> tuple[State, tuple[str, ...]]:
    """The weights of a network in a file, through what timm changes of published files, and a note on those left out.

    Raises:
        ValueError: when weights are missing or of another shape.
    """
    tensors = dict(source.weights.tensors)
    change = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if change is not None:
        tensors = change(tensors, network)
    try:
        missing, unexpected = network.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(f"{source.file} does not fit the network that its config.json names: {lines[0]}") from error
    check_complete(missing, source)
    note = f"left out: {', '.join(unexpected[:3])}{', …' if len(unexpected) > 3 else ''}, of a head or of buffers"
    return named_as_ours(network.state_dict()), (note,) if unexpected else ()
