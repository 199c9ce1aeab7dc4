"""ViT in the authors' checkpoints: names, the buffers that their modules store, and their training configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.key_tables import KeyTable
from simmim.checkpoints.formats.official import (
    HEAD_ROWS,
    PRETRAINING_ROWS,
    Architecture,
    OfficialRows,
    preprocessing_of,
    stored_settings,
)
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
from simmim.encoders.vit.config import SHARED, ViTConfig
from simmim.encoders.vit.model import index_of_pairs

TITLE = "the authors' code"
# Fields of our configuration that the authors' configuration has, too.
SIZES = {"embed_dim": "EMBED_DIM", "depth": "DEPTH", "num_heads": "NUM_HEADS", "mlp_ratio": "MLP_RATIO"}
INDEX = "relative_position_index"


class ViTOfficial(OfficialRows):
    """The authors' ViT: classifiers, SimMIM models, and encoders alone."""

    table = KeyTable(NAMES, PRETRAINING_ROWS, HEAD_ROWS)
    buffers, config_class = re.compile(rf"{INDEX}$"), ViTConfig

    def detect(self, source: Source) -> bool:
        return is_vit(source.weights.tensors)

    def table_for(self, config: EncoderConfig) -> KeyTable:
        assert isinstance(config, ViTConfig)
        return table_for(config, NAMES, HEAD_ROWS, PRETRAINING_ROWS)

    def our_shapes(self, state: State) -> State:
        return our_shapes(state)

    def their_shapes(self, state: State) -> State:
        return their_shapes(state)

    def find_architecture(
        self, state: State, buffers: State, settings: Mapping, file: WeightFile, overrides: Mapping[str, Any]
    ) -> Architecture:
        model = settings.get("MODEL", {})
        stored = model.get("VIT", {})
        # What the configuration says must agree with the weights: otherwise a missing block would go unnoticed.
        stated = {ours: stored[theirs] for ours, theirs in SIZES.items() if theirs in stored}
        image = settings.get("DATA", {}).get("IMG_SIZE")
        size = tuple(image) if isinstance(image, list) else image and (image, image)
        fields = infer_fields(state, size) | stated | {"drop_path_rate": model.get("DROP_PATH_RATE", 0.0)}
        if fields["layer_scale"] and stored.get("INIT_VALUES"):
            fields["layer_scale"] = stored["INIT_VALUES"]
        config = ViTConfig(**fields)
        return config, preprocessing_of(state, config.image_size, config.in_channels), ()

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint)

    def buffers_of(self, checkpoint: Checkpoint) -> State:
        config = config_of(checkpoint)
        grid = config.grid(config.image_size)
        tokens = 1 + grid[0] * grid[1]
        index = index_of_pairs(grid, 1, torch.device("cpu")).view(tokens, tokens)
        if config.position_bias == SHARED:
            return {f"rel_pos_bias.{INDEX}": index.clone()}
        return {f"blocks.{block}.attn.{INDEX}": index.clone() for block in range(config.depth)}

    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        own = {
            **{theirs: fields[ours] for ours, theirs in SIZES.items()},
            "PATCH_SIZE": config.patch_size,
            "IN_CHANS": config.in_channels,
            "QKV_BIAS": True,
            "INIT_VALUES": config.layer_scale or None,
            "USE_APE": False,
            "USE_RPB": config.position_bias != SHARED,
            "USE_SHARED_RPB": config.position_bias == SHARED,
            "USE_MEAN_POOLING": config.norm_after_pooling,
        }
        return stored_settings(checkpoint, "vit", config.drop_path_rate, own)

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        check_size(checkpoint, TITLE)
        return pooling_note(checkpoint, TITLE, form)


ROWS = ViTOfficial()
