"""Swin in transformers: SwinModel, SwinForMaskedImageModeling and SwinForImageClassification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.huggingface import HuggingFaceFormat, HuggingFaceTableRows, blocks_of, check_config, states
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.parts import SIMMIM
from simmim.checkpoints.formats.swin.recognition import config_of, fitted, is_swin, padding_note
from simmim.checkpoints.source import Source
from simmim.encoders.base import EncoderConfig, Size
from simmim.encoders.swin.config import SwinConfig

OURS, THEIRS = "layers.{i}.blocks.{j}.", "encoder.layers.{i}.blocks.{j}."
SELF = THEIRS + "attention.self."
TABLE = KeyTable(
    encoder=(
        *weight_and_bias("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *weight_and_bias("patch_embed.norm", "embeddings.norm"),
        (OURS + "attn.relative_position_bias_table", SELF + "relative_position_bias_table"),
        *((OURS + f"attn.qkv.{part}", SELF + f"(query|key|value).{part}") for part in ("weight", "bias")),
        *weight_and_bias(OURS + "attn.proj", THEIRS + "attention.output.dense"),
        *weight_and_bias(OURS + "norm1", THEIRS + "layernorm_before"),
        *weight_and_bias(OURS + "mlp.fc1", THEIRS + "intermediate.dense"),
        *weight_and_bias(OURS + "mlp.fc2", THEIRS + "output.dense"),
        *weight_and_bias(OURS + "norm2", THEIRS + "layernorm_after"),
        ("layers.{i}.downsample.reduction.weight", "encoder.layers.{i}.downsample.reduction.weight"),
        *weight_and_bias("layers.{i}.downsample.norm", "encoder.layers.{i}.downsample.norm"),
        *weight_and_bias("norm", "layernorm"),
    ),
    pretraining=(
        ("mask_token", "swin.embeddings.mask_token"),
        ("decoder.weight", "decoder.0.weight"),
        ("decoder.bias", "decoder.0.bias"),
    ),
    head=weight_and_bias("head", "classifier"),
)
CLASSES = {ENCODER: "SwinModel", SIMMIM: "SwinForMaskedImageModeling", CLASSIFIER: "SwinForImageClassification"}
# What Swin has as published; transformers' configuration could say otherwise.
FIXED = {"hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}


class SwinHuggingFace(HuggingFaceTableRows):
    """transformers' Swin models."""

    table, model = TABLE, "swin"

    def detect(self, source: Source) -> bool:
        return is_swin(source.weights.tensors, self.projection) and states(source, FIXED)

    def read_architecture(self, source: Source) -> tuple[SwinConfig, Size, tuple[str, ...]]:
        check_config(source, "swin", FIXED, "Swin Transformer")
        stored = source.config
        size = stored.get("image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        config = SwinConfig(
            embed_dim=stored.get("embed_dim", 96),
            depths=stored.get("depths", (2, 2, 6, 2)),
            num_heads=stored.get("num_heads", (3, 6, 12, 24)),
            window_size=stored.get("window_size", 7),
            patch_size=stored.get("patch_size", 4),
            in_channels=stored.get("num_channels", 3),
            mlp_ratio=float(stored.get("mlp_ratio", 4.0)),
            drop_path_rate=stored.get("drop_path_rate", 0.1),
            image_size=size,
        )
        if source.description:
            described, _ = read_description(source, SwinConfig)
            # transformers has no place for this field.
            if {**described.as_dict(), "shift_before_padding": False} == config.as_dict():
                return described, size, ()
        # Its tables are for the whole window in every stage.
        whole = replace(config, image_size=None)
        return (config if config.largest_windows == whole.largest_windows else whole), size, ()

    def config_of_names(self, tensors: Mapping[str, Tensor], prefix: str, config: EncoderConfig) -> SwinConfig:
        depths = blocks_of(tensors, prefix)
        return SwinConfig(1, depths, (1,) * len(depths))

    def fitted(self, checkpoint: Checkpoint) -> Checkpoint:
        return fitted(checkpoint, f"{HuggingFaceFormat.title}' Swin")

    def folder_config(self, checkpoint: Checkpoint, form: str) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        height, width = checkpoint.preprocessing.image_size
        stages = [f"stage{stage + 1}" for stage in range(len(config.depths))]
        return {
            "model_type": "swin",
            "architectures": [CLASSES[form]],
            "image_size": height if height == width else [height, width],
            "patch_size": config.patch_size,
            "num_channels": config.in_channels,
            "embed_dim": config.embed_dim,
            "depths": fields["depths"],
            "num_heads": fields["num_heads"],
            "num_layers": len(config.depths),
            "hidden_size": config.channels[-1],
            "window_size": config.window_size,
            "mlp_ratio": config.mlp_ratio,
            "drop_path_rate": config.drop_path_rate,
            "encoder_stride": config.strides[-1],
            "stage_names": ["stem", *stages],
            "out_features": stages,
            "out_indices": list(range(1, len(stages) + 1)),
            "dtype": "float32",
            **FIXED,
        }

    def backbone_class(self) -> str:
        return "SwinBackbone"

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        config, size = config_of(checkpoint), checkpoint.preprocessing.image_size
        side = config.window_size
        # It has no tables for smaller windows, and looks at the smaller side alone when it decides whether to shift.
        for depth, sides in zip(config.depths, config.maps(size)):
            if min(sides) < side or (depth > 1 and min(sides) == side < max(sides)):
                raise ValueError(
                    f"transformers' Swin does not support a window of {side} on a map of {sides[0]}×{sides[1]} tokens, "
                    f"which a stage has at {size[0]}×{size[1]} px: export as safetensors, official or timm"
                )
        return padding_note(checkpoint, HuggingFaceFormat.title, shifts_before_padding=False)


ROWS = SwinHuggingFace()
