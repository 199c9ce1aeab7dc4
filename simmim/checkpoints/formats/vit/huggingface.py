"""ViT in transformers: BeitModel and BeitForImageClassification, which have the same parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.huggingface import HuggingFaceFormat, HuggingFaceTableRows, check_config, states
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.parts import SIMMIM, parts_of_form
from simmim.checkpoints.formats.vit.recognition import (
    check_size,
    config_of,
    fitted,
    our_shapes,
    pooling_note,
    their_shapes,
)
from simmim.checkpoints.source import Source
from simmim.encoders.base import EncoderConfig, Size, State
from simmim.encoders.vit.config import BLOCKS, SHARED, ViTConfig

OURS, THEIRS = "layers.{i}.", "encoder.layer.{i}."
SELF = THEIRS + "attention.attention."
TABLE_NAME = "relative_position_bias.relative_position_bias_table"
ROWS_OF_BEIT = (
    *weight_and_bias("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("patch_embed.class_token", "embeddings.cls_token"),
    ("position_bias.table", f"encoder.{TABLE_NAME}"),
    (OURS + "attn.qkv.weight", SELF + "(query|key|value).weight"),
    (OURS + "attn.q_bias", SELF + "query.bias"),
    (OURS + "attn.v_bias", SELF + "value.bias"),
    (OURS + "attn.position_bias.table", SELF + TABLE_NAME),
    *weight_and_bias(OURS + "attn.proj", THEIRS + "attention.output.dense"),
    *weight_and_bias(OURS + "norm1", THEIRS + "layernorm_before"),
    *weight_and_bias(OURS + "mlp.fc1", THEIRS + "intermediate.dense"),
    *weight_and_bias(OURS + "mlp.fc2", THEIRS + "output.dense"),
    *weight_and_bias(OURS + "norm2", THEIRS + "layernorm_after"),
    (OURS + "gamma_1", THEIRS + "lambda_1"),
    (OURS + "gamma_2", THEIRS + "lambda_2"),
)
HEAD = weight_and_bias("head", "classifier")
NORM, NORM_AFTER_POOLING = weight_and_bias("norm", "layernorm"), weight_and_bias("norm", "pooler.layernorm")
CLASSES = {ENCODER: "BeitModel", CLASSIFIER: "BeitForImageClassification"}
# What SimMIM's ViT has; transformers' configuration could say otherwise.
FIXED = {"hidden_act": "gelu", "use_absolute_position_embeddings": False, "layer_norm_eps": 1e-6}


class ViTHuggingFace(HuggingFaceTableRows):
    """transformers' Beit models."""

    table, model = KeyTable(ROWS_OF_BEIT, head=HEAD), "beit"

    def detect(self, source: Source) -> bool:
        names = list(source.weights.tensors)
        block = re.compile(r"(^|\.)encoder\.layer\.0\.attention\.attention\.query\.weight$")
        return (
            any(block.search(name) for name in names)
            and any(name.endswith(self.projection) for name in names)
            and any(name.endswith(TABLE_NAME) for name in names)
            and states(source, FIXED)
        )

    def read_architecture(self, source: Source) -> tuple[ViTConfig, Size, tuple[str, ...]]:
        check_config(source, "beit", FIXED, "SimMIM's ViT")
        stored = source.config
        size = stored.get("image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        shared = stored.get("use_shared_relative_position_bias", False)
        dim = stored.get("hidden_size", 768)
        if shared == stored.get("use_relative_position_bias", False):
            raise ValueError(
                f"{source.folder / 'config.json'} says use_shared_relative_position_bias {shared} and "
                f"use_relative_position_bias {shared}: this toolkit's ViT has one of them"
            )
        config = ViTConfig(
            embed_dim=dim,
            depth=stored.get("num_hidden_layers", 12),
            num_heads=stored.get("num_attention_heads", 12),
            patch_size=stored.get("patch_size", 16),
            in_channels=stored.get("num_channels", 3),
            mlp_ratio=stored.get("intermediate_size", 3072) / dim,
            drop_path_rate=stored.get("drop_path_rate", 0.1),
            layer_scale=stored.get("layer_scale_init_value", 0.1),
            position_bias=SHARED if shared else BLOCKS,
            norm_after_pooling=stored.get("use_mean_pooling", True),
            image_size=size,
        )
        if source.description:
            described, _ = read_description(source, ViTConfig)
            if described.as_dict() == config.as_dict():
                return described, size, ()
        return config, size, ()

    def config_of_names(self, tensors: Mapping[str, Tensor], prefix: str, config: EncoderConfig) -> EncoderConfig:
        assert isinstance(config, ViTConfig)
        block = re.compile(re.escape(prefix) + r"encoder\.layer\.(\d+)\.")
        return replace(config, depth=len({match[1] for name in tensors if (match := block.match(name))}))

    def our_state(self, tensors: Mapping[str, Tensor], config: EncoderConfig, prefix: str) -> tuple[State, list[str]]:
        state, left_over = self.table_for(config).to_ours(tensors, config, prefix)
        return our_shapes(state), left_over

    def table_for(self, config: EncoderConfig) -> KeyTable:
        """The key table of an architecture."""
        assert isinstance(config, ViTConfig)
        return KeyTable((*ROWS_OF_BEIT, *(NORM_AFTER_POOLING if config.norm_after_pooling else NORM)), head=HEAD)

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        prefix = "" if form == ENCODER else f"{self.model}."
        encoder = self.table_for(checkpoint.config).from_ours(checkpoint.encoder, checkpoint.config, prefix)
        return their_shapes(encoder, f"{prefix}embeddings.cls_token") | parts_of_form(self.table, checkpoint, form)

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint)

    def folder_config(self, checkpoint: Checkpoint, form: str) -> dict[str, Any]:
        config = config_of(checkpoint)
        height, width = checkpoint.preprocessing.image_size
        return {
            "model_type": "beit",
            "architectures": [CLASSES[form]],
            "image_size": height if height == width else [height, width],
            "patch_size": config.patch_size,
            "num_channels": config.in_channels,
            "hidden_size": config.embed_dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
            "intermediate_size": int(config.embed_dim * config.mlp_ratio),
            "layer_scale_init_value": config.layer_scale,
            "drop_path_rate": config.drop_path_rate,
            "use_relative_position_bias": config.position_bias == BLOCKS,
            "use_shared_relative_position_bias": config.position_bias == SHARED,
            "use_mean_pooling": config.norm_after_pooling,
            "use_mask_token": False,
            "dtype": "float32",
            **FIXED,
        }

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        if form == SIMMIM:
            raise ValueError(
                "transformers' Beit predicts no pixels, so there is no place for SimMIM's mask token and decoder: export "
                "the encoder alone, or as official or safetensors"
            )
        height, width = checkpoint.preprocessing.image_size
        if height != width:
            # It reads a table with height and width in the other order (5.23).
            raise ValueError(
                f"transformers' Beit mixes up the position biases of {height}×{width} px: export as safetensors, official "
                "or timm"
            )
        check_size(checkpoint, HuggingFaceFormat.title)
        return pooling_note(checkpoint, HuggingFaceFormat.title, form)


ROWS = ViTHuggingFace()
