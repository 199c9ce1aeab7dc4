"""ViT in timm: its Beit, which has the same parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.official import Architecture
from simmim.checkpoints.formats.timm import TimmFormat, TimmTableRows, stated_preprocessing, stated_size
from simmim.checkpoints.formats.vit.recognition import (
    NAMES,
    check_size,
    config_of,
    fitted,
    infer_fields,
    is_vit,
    our_shapes,
    pooling_note,
    table_for,
    their_shapes,
)
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile
from simmim.encoders.base import EncoderConfig, State
from simmim.encoders.vit.config import BLOCKS, SHARED, ViTConfig

HEAD = weight_and_bias("head", "head")
SIZES = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "in_channels": "in_chans",
    "patch_size": "patch_size",
}


class ViTTimm(TimmTableRows):
    """timm's beit models."""

    table, buffers = KeyTable(NAMES, head=HEAD), re.compile(r"relative_position_index$|k_bias$")
    first_conv = "patch_embed.proj"
    classifier = "head"

    def detect(self, source: Source) -> bool:
        # The names are the authors'.
        return is_vit(source.weights.tensors) and "pretrained_cfg" in source.config

    def table_for(self, config: EncoderConfig) -> KeyTable:
        assert isinstance(config, ViTConfig)
        return table_for(config, NAMES, HEAD, ())

    def our_shapes(self, state: State) -> State:
        return our_shapes(state)

    def their_shapes(self, state: State) -> State:
        return their_shapes(state)

    def global_pool(self, config: EncoderConfig) -> str:
        return "avg" if isinstance(config, ViTConfig) and config.norm_after_pooling else "token"

    def read_architecture(
        self, encoder: State, file: WeightFile, source: Source, overrides: Mapping[str, Any]
    ) -> Architecture:
        if source.description:
            return *read_description(source, ViTConfig), ()
        arguments, inferred = source.config.get("model_args") or {}, infer_fields(encoder, stated_size(source))
        # What the folder says must agree with the weights: otherwise a missing block would go unnoticed.
        fields = inferred | {ours: arguments[name] for ours, name in SIZES.items() if name in arguments}
        if fields["layer_scale"] and arguments.get("init_values"):
            fields["layer_scale"] = arguments["init_values"]
        config = ViTConfig(**fields)
        stated = source.config.get("pretrained_cfg") or source.config
        return config, stated_preprocessing(stated, stated_size(source) or config.image_size), ()

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint)

    def architecture_name(self, checkpoint: Checkpoint) -> str:
        """The registered name of base, which the arguments turn into any size."""
        return "beit_base_patch16_224"

    def model_arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        return {
            "img_size": list(checkpoint.preprocessing.image_size),
            **{theirs: fields[ours] for ours, theirs in SIZES.items()},
            "init_values": config.layer_scale,  # timm takes None for its default
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": config.position_bias == BLOCKS,
            "use_shared_rel_pos_bias": config.position_bias == SHARED,
            "global_pool": self.global_pool(config),
        }

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        check_size(checkpoint, TimmFormat.title)
        return pooling_note(checkpoint, TimmFormat.title, form)


ROWS = ViTTimm()
