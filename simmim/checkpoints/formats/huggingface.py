"""Hugging Face transformers' Swinv2: a folder of config.json, weights and, mostly, preprocessor_config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing, State, check_state, filled_windows, read_json
from simmim.checkpoints.formats import official
from simmim.checkpoints.formats.key_tables import KeyTable, all_or_none, with_suffixes
from simmim.checkpoints.weight_files import WeightFile
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.swinv2 import SwinV2Config

OURS, THEIRS = "layers.{i}.blocks.{j}.", "encoder.layers.{i}.blocks.{j}."
SELF = THEIRS + "attention.self."
TABLE = KeyTable(
    encoder=(
        *with_suffixes("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        *with_suffixes("patch_embed.norm", "embeddings.norm"),
        (OURS + "attn.qkv.weight", SELF + "(query|key|value).weight"),
        (OURS + "attn.q_bias", SELF + "query.bias"),
        (OURS + "attn.v_bias", SELF + "value.bias"),
        (OURS + "attn.logit_scale", SELF + "logit_scale"),
        *with_suffixes(OURS + "attn.cpb_mlp.0", SELF + "continuous_position_bias_mlp.0"),
        (OURS + "attn.cpb_mlp.2.weight", SELF + "continuous_position_bias_mlp.2.weight"),
        *with_suffixes(OURS + "attn.proj", THEIRS + "attention.output.dense"),
        *with_suffixes(OURS + "norm1", THEIRS + "layernorm_before"),  # named for V1: it comes after its branch
        *with_suffixes(OURS + "mlp.fc1", THEIRS + "intermediate.dense"),
        *with_suffixes(OURS + "mlp.fc2", THEIRS + "output.dense"),
        *with_suffixes(OURS + "norm2", THEIRS + "layernorm_after"),
        ("layers.{i}.downsample.reduction.weight", "encoder.layers.{i}.downsample.reduction.weight"),
        *with_suffixes("layers.{i}.downsample.norm", "encoder.layers.{i}.downsample.norm"),
        *with_suffixes("norm", "layernorm"),
    ),
    pretraining=(
        ("mask_token", "swinv2.embeddings.mask_token"),
        ("decoder.weight", "decoder.0.weight"),
        ("decoder.bias", "decoder.0.bias"),
    ),
    head=with_suffixes("head", "classifier"),
)
ANCHOR = "embeddings.patch_embeddings.projection.weight"
CLASSES = {
    "encoder": "Swinv2Model",
    "simmim": "Swinv2ForMaskedImageModeling",
    "classifier": "Swinv2ForImageClassification",
}
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers
FIXED = {"hidden_act": "gelu", "qkv_bias": True, "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}


def read(file: WeightFile, description: dict, folder_config: dict, folder: Path) -> Checkpoint:
    """A folder of transformers.

    Raises:
        ValueError: when the configuration asks for what SwinV2 as published has not, or weights do not fit it.
    """
    config, size, notes = architecture(folder_config, description, folder)
    prefix = official.prefix_of(file.tensors, ANCHOR)
    # By the blocks that there are and not by those that the configuration has, so that both can be compared.
    depths = depths_of(file.tensors, prefix)
    state, left = TABLE.to_ours(file.tensors, SwinV2Config(1, depths, (1,) * len(depths)), prefix)
    known = {theirs for _, theirs in (*TABLE.pretraining, *TABLE.head)} | {prefix + "embeddings.mask_token"}
    buffers = ("relative_coords_table", "relative_position_index")
    extra = [name for name in left if name not in known and not name.endswith(buffers)]
    check_state(config, state | {name: file.tensors[name] for name in extra}, file.source)
    head = official.head_of(all_or_none(TABLE.head, file.tensors, file.source))
    pretraining, more = official.pretraining_of(TABLE.pretraining, file.tensors, file)
    labels = folder_config.get("id2label") or {}
    names = [labels[key] for key in sorted(labels, key=int)]
    return Checkpoint(
        config,
        state,
        preprocessing(folder, size, config.in_channels, description),
        file.source,
        "hf",
        description.get("provenance", {"origin": "transformers", "architectures": folder_config.get("architectures")}),
        pretraining,
        head,
        official.class_names({"classes": names}, head),
        notes + more,
    )


def depths_of(tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, ...]:
    """How many blocks each stage has, by their names."""
    block = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\.")
    blocks = {(int(found[1]), int(found[2])) for name in tensors if (found := block.match(name))}
    return tuple(Counter(stage for stage, _ in sorted(blocks)).values())


def architecture(
    folder_config: dict, description: dict, folder: Path
) -> tuple[SwinV2Config, tuple[int, int], tuple[str, ...]]:
    """The encoder's settings, the size of its images, and notes.

    Raises:
        ValueError: for settings outside the published architecture.
    """
    for name, value in FIXED.items():
        if folder_config.get(name, value) != value:
            raise ValueError(
                f"{folder / 'config.json'} says {name} {folder_config[name]!r}: Swin Transformer V2 as published, and so "
                f"this toolkit, has {value!r}"
            )
    size = folder_config.get("image_size", 224)
    size = (size, size) if isinstance(size, int) else tuple(size)
    config = SwinV2Config(
        embed_dim=folder_config.get("embed_dim", 96),
        depths=folder_config.get("depths", (2, 2, 6, 2)),
        num_heads=folder_config.get("num_heads", (3, 6, 12, 24)),
        window_size=folder_config.get("window_size", 7),
        patch_size=folder_config.get("patch_size", 4),
        in_channels=folder_config.get("num_channels", 3),
        mlp_ratio=float(folder_config.get("mlp_ratio", 4.0)),
        drop_path_rate=folder_config.get("drop_path_rate", 0.1),
    )
    stored = folder_config.get("pretrained_window_sizes") or (0,) * len(config.depths)
    # Where 0 stands for the window in use it is transformers' own.
    filled = [side or own for side, own in zip(stored, windows_of_theirs(config, size))]
    config = filled_windows(config, filled, size)
    ours = SwinV2Config(**description["architecture"]) if description else None
    if ours and {**ours.as_dict(), "shift_before_padding": False} == {**config.as_dict(), "shift_before_padding": False}:
        config = ours
    difference = obstacle(config, size)
    return config, size, (difference,) if difference else ()


def preprocessing(folder: Path, size: tuple[int, int], channels: int, description: dict) -> Preprocessing:
    """From preprocessor_config.json, by this toolkit's description of it where that still holds; without one, as the
    published models': ImageNet's statistics, bicubic."""
    path = folder / "preprocessor_config.json"
    stored = read_json(path) if path.is_file() else {}
    if description:
        described = Preprocessing(**description["preprocessing"])
        expected = processor_config(described)
        if described.image_size == size and {name: stored.get(name) for name in expected} == expected:
            return described
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2
    mean, std = (stored.get(name) or value for name, value in zip(("image_mean", "image_std"), default))
    resample = {number: name for name, number in RESAMPLE.items()}.get(stored.get("resample", 3), "bicubic")
    crop = stored.get("crop_size") if stored.get("do_center_crop") else None
    edge = (stored.get("size") or {}).get("shortest_edge")
    if crop and edge:
        return Preprocessing(size, mean, std, resample, min(1.0, round(min(crop["height"], crop["width"]) / edge, 4)))
    return Preprocessing(size, mean, std, resample, 1.0, "squash" if stored else "crop")


# --- Writing ---------------------------------------------------------------------------------------------------------


def state_for(checkpoint: Checkpoint, form: str) -> State:
    """Every tensor of transformers' file."""
    state = TABLE.from_ours(checkpoint.encoder, checkpoint.config, "" if form == "encoder" else "swinv2.")
    if form == "simmim":
        parts = official.their_pretraining(checkpoint.pretraining)
        state |= {theirs: parts[ours] for ours, theirs in TABLE.pretraining}
    if form == "classifier":
        state |= {theirs: checkpoint.head[ours.removeprefix("head.")] for ours, theirs in TABLE.head}
    return state


def folder_config(checkpoint: Checkpoint, form: str) -> dict:
    """The config.json of transformers."""
    config, described = checkpoint.config, checkpoint.config.as_dict()
    height, width = checkpoint.preprocessing.image_size
    labels = dict(enumerate(checkpoint.classes)) if form == "classifier" else {}
    stages = [f"stage{stage + 1}" for stage in range(len(config.depths))]
    return {
        "model_type": "swinv2",
        "architectures": [CLASSES[form]],
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "embed_dim": config.embed_dim,
        "depths": described["depths"],
        "num_heads": described["num_heads"],
        "num_layers": len(config.depths),
        "hidden_size": config.dims[-1],
        "window_size": config.window_size,
        # 0 stands for the window in use, which is what 1 means where there is but one token.
        "pretrained_window_sizes": [0 if side == 1 else side for side in described["pretrained_window_sizes"]],
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path_rate,
        "encoder_stride": config.strides[-1],
        "stage_names": ["stem", *stages],
        "out_features": stages,
        "out_indices": list(range(1, len(stages) + 1)),
        "dtype": "float32",
        **FIXED,
        **({"id2label": labels, "label2id": {name: i for i, name in labels.items()}} if labels else {}),
    }


def processor_config(preprocessing: Preprocessing) -> dict:
    """The preprocessor_config.json that repeats `preprocessing`: shortest edge, then central crop, or squashed."""
    height, width = preprocessing.image_size
    shared = {
        "do_resize": True,
        "resample": RESAMPLE[preprocessing.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if preprocessing.fit == "squash":
        return {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}, **shared}
    side = min(height, width)
    # As many pixels on both sides of the crop: half a pixel would move every edge.
    margin = round((side / preprocessing.crop - side) / 2)
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": side + 2 * margin},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_convert_rgb": len(preprocessing.mean) == 3,
        **shared,
    }


def loading_code(folder: str, form: str, channels: int) -> str:
    """Lines of Python that load the folder."""
    auto = {
        "encoder": "AutoModel",
        "simmim": "AutoModelForMaskedImageModeling",
        "classifier": "AutoModelForImageClassification",
    }[form]
    processor = f"processor = AutoImageProcessor.from_pretrained({folder!r})\n" if channels in (1, 3) else ""
    names = f"AutoImageProcessor, {auto}" if processor else auto
    backbone = f"\n# each stage's maps: transformers.Swinv2Backbone.from_pretrained({folder!r})" if form == "encoder" else ""
    return f"from transformers import {names}\n\n{processor}model = {auto}.from_pretrained({folder!r}){backbone}"


def windows_of_theirs(config: SwinV2Config, image_size: tuple[int, int]) -> list[int]:
    """The window of each stage in transformers' Swinv2, which is fixed when it is built."""
    height = image_size[0] // config.patch_size
    return [min(config.window_size, height // 2**stage) for stage in range(len(config.depths))]


def obstacle(config: SwinV2Config, image_size: tuple[int, int]) -> str | None:
    """Why transformers' Swinv2 would compute something else, or None.

    It fixes every stage's window when it is built, from a map size that it rounds down where merging rounds up, by the
    height alone.
    """
    theirs, ours = windows_of_theirs(config, image_size), config.windows(image_size)
    size = "×".join(map(str, image_size))
    if any(window != (side, side) for window, side in zip(ours, theirs)):
        return f"transformers' Swinv2 uses windows {theirs} where this encoder at {size} px has {list(ours)}"
    height, width = (-(-side // config.patch_size) for side in image_size)
    for stage, (side, depth) in enumerate(zip(theirs, config.depths)):
        shifted = image_size[0] // config.patch_size // 2**stage > side
        if depth > 1 and ((height > side) != shifted or (width > side) != shifted):
            return (
                f"transformers' Swinv2 goes by the height alone and at {size} px {'shifts' if shifted else 'does not shift'}"
                f" both sides of stage {stage + 1}'s map, {height}×{width} tokens with windows of {side}"
            )
        height, width = -(-height // 2), -(-width // 2)
    pairs = config.pretrained_window_sizes or ()
    if not all(isinstance(side, int) for side in pairs):
        return f"transformers' Swinv2 knows square windows only, and this encoder was pre-trained with {list(pairs)}"
    return None
