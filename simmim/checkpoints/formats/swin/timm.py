"""Swin in timm: the authors' names, but each merging belongs to the stage that it leads to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.official import Architecture, with_tuples
from simmim.checkpoints.formats.swin import official
from simmim.checkpoints.formats.swin.recognition import (
    AUTHORS_PROJECTION,
    config_of,
    fitted,
    is_swin,
    padding_note,
    swin_config,
    table_windows,
)
from simmim.checkpoints.formats.timm import (
    TimmFormat,
    TimmTableRows,
    has_swin_names,
    stated_preprocessing,
    stated_size,
    under_closed_stage,
)
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
from simmim.encoders.base import State
from simmim.encoders.swin.config import SwinConfig

TABLE = KeyTable(
    encoder=tuple(
        (ours, theirs.replace("layers.{i}.downsample", "layers.{next}.downsample"))
        for ours, theirs in official.TABLE.encoder
    ),
    head=weight_and_bias("head", "head.fc"),
)
# Registered names by embed_dim and the blocks of the third stage.
NAMES = {
    96: {6: "swin_tiny_patch4_window7_224", 18: "swin_small_patch4_window7_224"},
    128: {18: "swin_base_patch4_window7_224"},
    192: {18: "swin_large_patch4_window7_224"},
}
SIZES = {
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "in_channels": "in_chans",
    "patch_size": "patch_size",
}


class SwinTimm(TimmTableRows):
    """timm's swin models."""

    table, buffers = TABLE, official.BUFFERS
    first_conv = "patch_embed.proj"
    classifier = "head.fc"

    def detect(self, source: Source) -> bool:
        # Models of that search (arXiv 2111.14725) have windows of their own in each stage.
        searched = str(source.config.get("architecture", "")).startswith("swin_s3")
        return is_swin(source.weights.tensors, AUTHORS_PROJECTION) and has_swin_names(source) and not searched

    def read_architecture(
        self, encoder: State, file: WeightFile, source: Source, overrides: Mapping[str, Any]
    ) -> Architecture:
        if source.description and source.config.get("architecture"):
            return *read_description(source, SwinConfig), ()
        state = {under_closed_stage(name): value for name, value in encoder.items()}
        size, arguments = stated_size(source), source.config.get("model_args") or {}
        if size is None:
            found, preprocessing, notes = official.find_architecture(state, {}, {}, file)
            assert isinstance(found, SwinConfig)
            return replace(found, shift_before_padding=True), preprocessing, notes
        inferred = SwinConfig.infer_fields(state)
        # What the folder says must agree with the weights: otherwise a missing block would go unnoticed.
        sizes = inferred | with_tuples({ours: arguments[name] for ours, name in SIZES.items() if name in arguments})
        config = swin_config(sizes, table_windows(state, len(inferred["depths"])), size)
        stated = source.config.get("pretrained_cfg") or source.config
        # Where windows do not divide a map, timm shifts it before it pads.
        return replace(config, shift_before_padding=True), stated_preprocessing(stated, size), ()

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint, TimmFormat.title)

    def architecture_name(self, checkpoint: Checkpoint) -> str:
        """The registered name of this size; tiny's for other sizes, which the arguments turn into any."""
        config = config_of(checkpoint)
        depth = config.depths[2] if len(config.depths) > 2 else 0
        return NAMES.get(config.embed_dim, {}).get(depth, NAMES[96][6])

    def model_arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        fields = checkpoint.config.as_dict()
        return {
            "img_size": list(checkpoint.preprocessing.image_size),
            **{theirs: fields[ours] for ours, theirs in SIZES.items()},
            "window_size": fields["window_size"],
        }

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        fitted(checkpoint, TimmFormat.title)
        return padding_note(checkpoint, TimmFormat.title, shifts_before_padding=True)


ROWS = SwinTimm()
