"""SwinV2 in transformers: Swinv2Model, Swinv2ForMaskedImageModeling and Swinv2ForImageClassification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER
from simmim.checkpoints.formats.foreign import read_description
from simmim.checkpoints.formats.huggingface import HuggingFaceFormat, HuggingFaceTableRows, blocks_of, check_config
from simmim.checkpoints.formats.key_tables import KeyTable, weight_and_bias
from simmim.checkpoints.formats.parts import SIMMIM
from simmim.checkpoints.formats.swinv2.recognition import (
    config_of,
    is_swinv2,
    padding_note,
    refuse_extra_norms,
    with_pretrained_windows,
)
from simmim.checkpoints.source import Source
from simmim.encoders.base import EncoderConfig, Size
from simmim.encoders.swinv2.config import SwinV2Config

OURS, THEIRS = "layers.{i}.blocks.{j}.", "encoder.layers.{i}.blocks.{j}."
SELF = THEIRS + "attention.self."
TABLE = KeyTable(
    encoder=(
        *weight_and_bias("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *weight_and_bias("patch_embed.norm", "embeddings.norm"),
        (OURS + "attn.qkv.weight", SELF + "(query|key|value).weight"),
        (OURS + "attn.q_bias", SELF + "query.bias"),
        (OURS + "attn.v_bias", SELF + "value.bias"),
        (OURS + "attn.logit_scale", SELF + "logit_scale"),
        *weight_and_bias(OURS + "attn.cpb_mlp.0", SELF + "continuous_position_bias_mlp.0"),
        (OURS + "attn.cpb_mlp.2.weight", SELF + "continuous_position_bias_mlp.2.weight"),
        *weight_and_bias(OURS + "attn.proj", THEIRS + "attention.output.dense"),
        *weight_and_bias(OURS + "norm1", THEIRS + "layernorm_before"),  # named for V1: in V2 it comes after its branch
        *weight_and_bias(OURS + "mlp.fc1", THEIRS + "intermediate.dense"),
        *weight_and_bias(OURS + "mlp.fc2", THEIRS + "output.dense"),
        *weight_and_bias(OURS + "norm2", THEIRS + "layernorm_after"),
        ("layers.{i}.downsample.reduction.weight", "encoder.layers.{i}.downsample.reduction.weight"),
        *weight_and_bias("layers.{i}.downsample.norm", "encoder.layers.{i}.downsample.norm"),
        *weight_and_bias("norm", "layernorm"),
    ),
    pretraining=(
        ("mask_token", "swinv2.embeddings.mask_token"),
        ("decoder.weight", "decoder.0.weight"),
        ("decoder.bias", "decoder.0.bias"),
    ),
    head=weight_and_bias("head", "classifier"),
)
PROJECTION = "embeddings.patch_embeddings.projection.weight"
CLASSES = {
    ENCODER: "Swinv2Model",
    SIMMIM: "Swinv2ForMaskedImageModeling",
    CLASSIFIER: "Swinv2ForImageClassification",
}
# What SwinV2 has as published; transformers' configuration could say otherwise.
FIXED = {"hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}


class SwinV2HuggingFace(HuggingFaceTableRows):
    """transformers' Swinv2 models."""

    table, model = TABLE, "swinv2"

    def detect(self, source: Source) -> bool:
        return is_swinv2(source.weights.tensors, PROJECTION)

    def read_architecture(self, source: Source) -> tuple[SwinV2Config, Size, tuple[str, ...]]:
        return read_architecture(source)

    def config_of_names(self, tensors: Mapping[str, Tensor], prefix: str, config: EncoderConfig) -> SwinV2Config:
        depths = blocks_of(tensors, prefix)
        return SwinV2Config(1, depths, (1,) * len(depths))

    def folder_config(self, checkpoint: Checkpoint, form: str) -> dict[str, Any]:
        config, fields = config_of(checkpoint), checkpoint.config.as_dict()
        height, width = checkpoint.preprocessing.image_size
        stages = [f"stage{stage + 1}" for stage in range(len(config.depths))]
        return {
            "model_type": "swinv2",
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
            # 0 stands for the window in use, which 1 means where a map has but one token.
            "pretrained_window_sizes": [0 if side == 1 else side for side in fields["pretrained_window_sizes"]],
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
        return "Swinv2Backbone"

    def differences(self, checkpoint: Checkpoint, form: str) -> tuple[str, ...]:
        refuse_extra_norms(checkpoint, HuggingFaceFormat.title)
        difference = window_difference(config_of(checkpoint), checkpoint.preprocessing.image_size)
        if difference:
            raise ValueError(f"{difference}: export as safetensors, timm or onnx, or at another image size")
        return padding_note(checkpoint, HuggingFaceFormat.title, shifts_before_padding=False)


ROWS = SwinV2HuggingFace()


# --- the architecture ------------------------------------------------------------------------------------------------


def read_architecture(source: Source) -> tuple[SwinV2Config, Size, tuple[str, ...]]:
    """The encoder's configuration, the size of its images, and notes.

    Raises:
        ValueError: if there is no configuration of a Swinv2, or it differs from the published architecture.
    """
    check_config(source, "swinv2", FIXED, "Swin Transformer V2")
    stored = source.config
    size = stored.get("image_size", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    config = SwinV2Config(
        embed_dim=stored.get("embed_dim", 96),
        depths=stored.get("depths", (2, 2, 6, 2)),
        num_heads=stored.get("num_heads", (3, 6, 12, 24)),
        window_size=stored.get("window_size", 7),
        patch_size=stored.get("patch_size", 4),
        in_channels=stored.get("num_channels", 3),
        mlp_ratio=float(stored.get("mlp_ratio", 4.0)),
        drop_path_rate=stored.get("drop_path_rate", 0.1),
    )
    pretrained = stored.get("pretrained_window_sizes") or (0,) * len(config.depths)
    # 0 stands for the window in use, and that is transformers' own.
    pretrained = [side or own for side, own in zip(pretrained, windows_of_transformers(config, size))]
    config = with_pretrained_windows(config, pretrained, size)
    if source.description:
        described, _ = read_description(source, SwinV2Config)
        # transformers has no place for this field.
        if {**described.as_dict(), "shift_before_padding": False} == config.as_dict():
            config = described
    difference = window_difference(config, size)
    return config, size, (difference,) if difference else ()


def windows_of_transformers(config: SwinV2Config, image_size: Size) -> list[int]:
    """The window of each stage in transformers' Swinv2, which is fixed when the model is built."""
    height = image_size[0] // config.patch_size
    return [min(config.window_size, height // 2**stage) for stage in range(len(config.depths))]


def window_difference(config: SwinV2Config, image_size: Size) -> str | None:
    """Why transformers' Swinv2 computes something else than this encoder, or None.

    It fixes every stage's window when it is built: from the height alone, and from a map size that it rounds down where
    merging rounds up.
    """
    theirs, ours = windows_of_transformers(config, image_size), config.windows(image_size)
    size = "×".join(map(str, image_size))
    if any(window != (side, side) for window, side in zip(ours, theirs)):
        return f"transformers' Swinv2 uses windows {theirs} where this encoder at {size} px has {list(ours)}"
    height, width = (-(-side // config.patch_size) for side in image_size)
    for stage, (side, depth) in enumerate(zip(theirs, config.depths)):
        shifted = image_size[0] // config.patch_size // 2**stage > side
        if depth > 1 and ((height > side) != shifted or (width > side) != shifted):
            shifts = "shifts" if shifted else "does not shift"
            return (
                f"transformers' Swinv2 looks at the height alone and at {size} px {shifts} both "
                f"sides of stage {stage + 1}'s map, {height}×{width} tokens with windows of {side}"
            )
        height, width = -(-height // 2), -(-width // 2)
    pretrained = config.pretrained_window_sizes or ()
    if not all(isinstance(side, int) for side in pretrained):
        return f"transformers' Swinv2 has square windows only, and this encoder was pre-trained with {list(pretrained)}"
    return None
