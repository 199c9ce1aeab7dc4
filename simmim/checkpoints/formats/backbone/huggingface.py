"""transformers' networks of images in transformers' folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.backbone.origin import (
    check_complete,
    holds_safetensors,
    named_as_ours,
    origin_of,
    refuse_export,
)
from simmim.checkpoints.formats.huggingface import PROCESSOR, HuggingFaceFormat, HuggingFaceRows, read_preprocessing
from simmim.checkpoints.source import Source
from simmim.encoders.backbone.measure import measured_config
from simmim.encoders.backbone.transformers_networks import configuration, load, plain_fields
from simmim.encoders.base import Size, State
from simmim.files import read_json

OURS = ("swinv2",)  # their own rows read them; what those do not recognize is damaged
DEFAULT_SIDE_PX = 224


class HuggingFaceBackbones(HuggingFaceRows):
    """Any network of images of transformers that is no encoder of this toolkit."""

    def detect(self, source: Source) -> bool:
        return isinstance(source.config.get("model_type"), str) and holds_safetensors(source) and not_ours(source)

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        own = configuration(source.config["model_type"], source.config)
        channels = getattr(own, "num_channels", 3)
        size = image_size(source, own)
        config = measured_config("transformers", own.model_type, plain_fields(own), size, channels)
        network, missing, unexpected = load(own, str(source.folder))
        check_complete((name for name in missing if "mask_token" not in name), source)
        left_out = [name for name in unexpected if not name.startswith(("text_model", "decoder"))]
        note = f"left out: {', '.join(left_out[:3])}{', …' if len(left_out) > 3 else ''}, of a head"
        return Checkpoint(
            config,
            named_as_ours(network.state_dict()),
            read_preprocessing(source, size, channels),
            source.file,
            "hf",
            provenance=origin_of(
                "transformers", source.config["model_type"], source.folder, {"name": published_name(source)}
            ),
            notes=(note,) if left_out else (),
        )

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        raise NotImplementedError  # `differences` refuses the format first

    def folder_config(self, checkpoint: Checkpoint, form: str) -> dict[str, Any]:
        raise NotImplementedError

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        refuse_export(checkpoint, HuggingFaceFormat.title)
        return ()


ROWS = HuggingFaceBackbones()


def not_ours(source: Source) -> bool:
    """Whether the model type is none that this toolkit's encoders read."""
    return source.config["model_type"] not in OURS


def published_name(source: Source) -> str | None:
    """The name under which the model was published, where its config.json keeps it."""
    name = source.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not name.startswith((".", "/", "~")) else None


def image_size(source: Source, config: Any) -> Size:
    """(height, width) that the processor makes, else that of the configuration, else 224 px."""
    path = source.folder / PROCESSOR
    stored = read_json(path) if path.is_file() else {}
    crop = stored.get("crop_size") if stored.get("do_center_crop") else None
    for stated in (crop, stored.get("size"), getattr(config, "image_size", None)):
        if isinstance(stated, Mapping) and "height" in stated and "width" in stated:
            return stated["height"], stated["width"]
        if isinstance(stated, Mapping) and "shortest_edge" in stated:
            stated = stated["shortest_edge"]
        if isinstance(stated, int):
            return stated, stated
        if isinstance(stated, list | tuple) and len(stated) == 2:
            return stated[0], stated[1]
    return DEFAULT_SIDE_PX, DEFAULT_SIDE_PX
