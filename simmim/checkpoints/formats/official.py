"""The authors' checkpoints (Swin-Transformer and SimMIM repositories): `.pth` files that hold `model` and a yacs config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing, State, check_state, filled_windows
from simmim.checkpoints.formats.key_tables import KeyTable, all_or_none, same, with_suffixes
from simmim.checkpoints.weight_files import WeightFile, plain
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.swinv2.config import SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords, relative_position_index, shift_mask
from simmim.encoders.swinv2.weights import infer_architecture

BLOCK = "layers.{i}.blocks.{j}."
# This toolkit's names are the authors'.
TABLE = KeyTable(
    encoder=(
        *with_suffixes("patch_embed.proj", "patch_embed.proj"),
        *with_suffixes("patch_embed.norm", "patch_embed.norm"),
        *same(
            *(
                BLOCK + name
                for name in (
                    "attn.qkv.weight",
                    "attn.q_bias",
                    "attn.v_bias",
                    "attn.logit_scale",
                    "attn.cpb_mlp.0.weight",
                    "attn.cpb_mlp.0.bias",
                    "attn.cpb_mlp.2.weight",
                    "attn.proj.weight",
                    "attn.proj.bias",
                    "norm1.weight",
                    "norm1.bias",
                    "mlp.fc1.weight",
                    "mlp.fc1.bias",
                    "mlp.fc2.weight",
                    "mlp.fc2.bias",
                    "norm2.weight",
                    "norm2.bias",
                    "norm3.weight",
                    "norm3.bias",
                )
            )
        ),
        *same("layers.{i}.downsample.reduction.weight"),
        *with_suffixes("layers.{i}.downsample.norm", "layers.{i}.downsample.norm"),
        *with_suffixes("norm", "norm"),
    ),
    pretraining=(
        ("mask_token", "encoder.mask_token"),
        ("decoder.weight", "decoder.0.weight"),
        ("decoder.bias", "decoder.0.bias"),
    ),
    head=with_suffixes("head", "head"),
)
# Our settings that the authors' configuration holds too.
SIZES = {"embed_dim": "EMBED_DIM", "depths": "DEPTHS", "num_heads": "NUM_HEADS", "mlp_ratio": "MLP_RATIO"}
# Derived from sizes: stored by the authors' modules, here a source of the sizes and nothing else.
BUFFERS = re.compile(r"relative_coords_table$|relative_position_index$|attn_mask$|\.k_bias$")


def read(file: WeightFile, description: dict, overrides: Mapping) -> Checkpoint:
    """A file with the authors' names.

    Args:
        description: the folder's config.json, if there is one.
        overrides: of them window_size counts, where the file does not tell it.

    Raises:
        ValueError: when weights are missing or left over, or nothing tells the window.
    """
    tensors = {name.replace("rpe_mlp", "cpb_mlp"): value for name, value in file.tensors.items()}
    prefix = prefix_of(tensors)
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    buffers = {name: value for name, value in inside.items() if BUFFERS.search(name)}
    settings = plain(file.values.get("config") or {})
    config, preprocessing, notes = described_architecture(inside, buffers, settings, file, description, overrides)
    state, left = TABLE.to_ours({name: value for name, value in inside.items() if name not in buffers}, config)
    left += [name for name in tensors if not name.startswith(prefix)]
    known = {theirs.removeprefix(prefix) for _, theirs in (*TABLE.pretraining, *TABLE.head)} | {"mask_token"}
    extra = [name for name in left if name not in known]
    check_state(config, state | {name: tensors.get(name, inside.get(name)) for name in extra}, file.source)
    head = head_of(all_or_none(TABLE.head, inside, file.source))
    # The mask token is a part of the encoder, under whatever prefix.
    mask_token = {"encoder.mask_token": inside["mask_token"]} if "mask_token" in inside else {}
    pretraining, more = pretraining_of(TABLE.pretraining, tensors | mask_token, file)
    return Checkpoint(
        config,
        state,
        preprocessing,
        file.source,
        "official",
        description["provenance"] if "provenance" in description else provenance(settings, bool(pretraining)),
        pretraining,
        head,
        class_names(description, head),
        notes + more,
    )


def prefix_of(tensors: Mapping[str, Tensor], anchor: str = "patch_embed.proj.weight") -> str:
    """What stands before the encoder's names: "encoder." in SimMIM checkpoints, "" in classifiers."""
    return next(name for name in tensors if name.endswith(anchor)).removesuffix(anchor)


def head_of(parts: State) -> State:
    """A classifier's weight and bias under the names of a linear layer."""
    return {name.removeprefix("head."): value for name, value in parts.items()}


def pretraining_of(
    rows: tuple[tuple[str, str], ...], tensors: Mapping[str, Tensor], file: WeightFile
) -> tuple[State, tuple[str, ...]]:
    """Mask token and decoder in our shapes, and notes.

    Raises:
        ValueError: when a part of the decoder is there and another part is not.
    """
    names = dict(rows)
    if not any(names[part] in tensors for part in ("decoder.weight", "decoder.bias")):
        left_out = any(name.endswith("mask_token") for name in tensors)
        return {}, ("mask token left out, which has no decoder beside it",) if left_out else ()
    return shaped_pretraining(all_or_none(rows, tensors, file.source)), ()


def shaped_pretraining(parts: State) -> State:
    """Mask token and decoder in our shapes, (C,) and a linear layer's."""
    return {
        "mask_token": parts["mask_token"].flatten(),
        "decoder.weight": parts["decoder.weight"].flatten(1),
        "decoder.bias": parts["decoder.bias"],
    }


def their_pretraining(parts: State) -> State:
    """The inverse of `shaped_pretraining`: (1, 1, C) and a 1 × 1 convolution's."""
    return {
        "mask_token": parts["mask_token"].view(1, 1, -1),
        "decoder.weight": parts["decoder.weight"][:, :, None, None],
        "decoder.bias": parts["decoder.bias"],
    }


def class_names(description: Mapping, head: State) -> tuple[str, ...]:
    """The stored names, or numbers in their place."""
    if "weight" not in head:
        return ()
    stored = tuple(map(str, description.get("classes") or ()))
    return stored if len(stored) == len(head["weight"]) else tuple(f"class {i}" for i in range(len(head["weight"])))


# --- Sizes -----------------------------------------------------------------------------------------------------------


def described_architecture(
    state: State, buffers: State, settings: dict, file: WeightFile, description: dict, overrides: Mapping
) -> tuple[SwinV2Config, Preprocessing, tuple[str, ...]]:
    """Architecture and preprocessing, in order of trust: the description that this toolkit left, the stored buffers, the
    stored configuration, the published file's name; and notes on what was concluded.

    Raises:
        ValueError: when nothing tells the window.
    """
    shapes = infer_architecture(state)
    if description:
        config = SwinV2Config(**description["architecture"])
        return config, Preprocessing(**description["preprocessing"]), ()
    stored = settings.get("MODEL", {}).get("SWINV2", {})
    # Of what the configuration says too, the weights must be: a block that is missing would not be missed otherwise.
    sizes = {ours: stored[theirs] for ours, theirs in SIZES.items() if theirs in stored}
    shapes |= {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    notes = []
    windows, pretrained, image = sizes_in_buffers(buffers, shapes)
    window = max(windows) if windows else stored.get("WINDOW_SIZE")
    image = settings.get("DATA", {}).get("IMG_SIZE") or image
    pretrained = pretrained or stored.get("PRETRAINED_WINDOW_SIZES")
    if windows and stored.get("WINDOW_SIZE", 0) > window:
        # Maps smaller than the window, which shows at larger images.
        window = stored["WINDOW_SIZE"]
    named = re.search(r"window(\d+)(?:to(\d+))?_(\d{2,4})(?:to(\d{2,4}))?", f"{file.source.stem} {file.source.parent.name}")
    if window is None and named:
        window, image = int(named[2] or named[1]), image or int(named[4] or named[3])
        if named[2]:
            before = SwinV2Config(**{**shapes, "window_size": int(named[1])}).windows((int(named[3]),) * 2)
            pretrained = tuple(side for side, _ in before)
        notes.append(f"window {window} and {image} px as the file's name says")
    if window is None and overrides.get("window_size"):
        window = overrides["window_size"]
        notes.append(f"window {window} as given")
    if window is None:
        raise ValueError(
            f"{file.source} does not tell its window: no stored buffers or configuration, and no name like "
            "window8_256; give the window it was trained with, window_size"
        )
    if image is None:
        image = window * shapes["patch_size"] * 8
        notes.append(f"{image} px taken for its image size, eight windows a side")
    size = tuple(image) if isinstance(image, list | tuple) else (image, image)
    drop_path = settings.get("MODEL", {}).get("DROP_PATH_RATE", 0.0)
    config = filled_windows(SwinV2Config(**shapes, window_size=window, drop_path_rate=drop_path), pretrained, size)
    channels = shapes["in_channels"]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    classifier = any(name.startswith("head") for name in state)
    preprocessing = Preprocessing(size, mean, std, *(("bicubic", 0.875) if classifier else ()))
    return config, preprocessing, tuple(notes)


def sizes_in_buffers(buffers: State, shapes: dict) -> tuple[tuple[int, ...], tuple[int, ...], int | None]:
    """What the buffers that the authors' modules store say: each stage's window, the window it was pre-trained with, and
    the side of the images in pixels; empty and None where they are not stored.

    Of a window of w tokens pre-trained with p, the largest log-spaced coordinate is log2(1 + 8 (w − 1) / (p − 1)) / 3
    (equation 4 of the paper), which gives p. A shifted block's mask has a row for each of the map's windows.
    """
    windows, pretrained, image = [], [], None
    for stage, depth in enumerate(shapes["depths"]):
        table = buffers.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
        if table is None:
            return (), (), image
        window = (table.shape[1] + 1) // 2
        windows.append(window)
        largest = float(table.max())
        pretrained.append(round(1 + 8 * (window - 1) / (2 ** (3 * largest) - 1)) if window > 1 and largest > 0 else window)
        masks = [buffers.get(f"layers.{stage}.blocks.{block}.attn_mask") for block in range(depth)]
        mask = next((mask for mask in masks if mask is not None), None)
        stride = shapes["patch_size"] * 2**stage
        if image is None and (mask is not None or depth > 1):
            # A stage of two blocks or more without a mask has one window.
            image = window * stride * (math.isqrt(len(mask)) if mask is not None else 1)
    return tuple(windows), tuple(pretrained), image


def buffers_of(config: SwinV2Config, image_size: tuple[int, int]) -> State:
    """What the authors' modules store beside the weights, so that they load a file strictly."""
    height, width = (side // config.patch_size for side in image_size)
    cpu, buffers = torch.device("cpu"), {}
    for stage, (depth, window) in enumerate(zip(config.depths, config.windows(image_size))):
        shift = tuple(side // 2 if size > side else 0 for side, size in zip(window, (height, width)))
        pretrained = config.pretrained_window_sizes[stage] if config.pretrained_window_sizes else window
        pretrained = (pretrained, pretrained) if isinstance(pretrained, int) else pretrained
        tokens = window[0] * window[1]
        for block in range(depth):
            name = BLOCK.format(i=stage, j=block)
            table = log_spaced_coords(window, pretrained, cpu).view(1, 2 * window[0] - 1, 2 * window[1] - 1, 2)
            buffers[name + "attn.relative_coords_table"] = table.clone()
            index = relative_position_index(window, cpu).view(tokens, tokens)
            buffers[name + "attn.relative_position_index"] = index.clone()
            if block % 2 and any(shift):
                padded = tuple(-(-size // side) * side for size, side in zip((height, width), window))
                buffers[name + "attn_mask"] = shift_mask(padded, window, shift, cpu).clone()
        height, width = -(-height // 2), -(-width // 2)
    return buffers


def provenance(settings: dict, pretraining: bool) -> dict:
    """What the stored configuration tells of the training."""
    found = {"origin": "the authors' code", "method": "SimMIM" if pretraining else "classification"}
    data, simmim = settings.get("DATA", {}), settings.get("MODEL", {}).get("SIMMIM", {})
    if "EPOCHS" in settings.get("TRAIN", {}):
        found["epochs"] = settings["TRAIN"]["EPOCHS"]
    if "MASK_RATIO" in data:
        found |= {"mask_unit": data.get("MASK_PATCH_SIZE"), "mask_ratio": data["MASK_RATIO"]}
    target = simmim.get("NORM_TARGET", {})
    if target.get("ENABLE"):
        found["norm_target_patch"] = target.get("PATCH_SIZE", 47)
    return found


# --- Writing ---------------------------------------------------------------------------------------------------------


def state_for(checkpoint: Checkpoint, form: str) -> State:
    """Every tensor of the authors' file: form simmim with their prefix, encoder or classifier without."""
    prefix = "encoder." if form == "simmim" else ""
    names = {**checkpoint.encoder, **buffers_of(checkpoint.config, checkpoint.preprocessing.image_size)}
    state = {prefix + name: value for name, value in names.items()}
    if form == "simmim":
        parts = their_pretraining(checkpoint.pretraining)
        state |= {theirs: parts[ours] for ours, theirs in TABLE.pretraining}
    if form == "classifier":
        state |= {theirs: checkpoint.head[ours.removeprefix("head.")] for ours, theirs in TABLE.head}
    return state


def settings_for(checkpoint: Checkpoint) -> dict:
    """The part of the authors' configuration that describes the architecture, as plain values."""
    config, provenance = checkpoint.config, checkpoint.provenance
    height, width = checkpoint.preprocessing.image_size
    data = {"IMG_SIZE": height if height == width else [height, width]}
    if "mask_ratio" in provenance:
        data |= {"MASK_PATCH_SIZE": provenance["mask_unit"], "MASK_RATIO": provenance["mask_ratio"]}
    described = config.as_dict()
    model = {
        "TYPE": "swinv2",
        "DROP_PATH_RATE": config.drop_path_rate,
        "SWINV2": {
            "EMBED_DIM": config.embed_dim,
            "DEPTHS": described["depths"],
            "NUM_HEADS": described["num_heads"],
            "WINDOW_SIZE": config.window_size,
            "PRETRAINED_WINDOW_SIZES": described["pretrained_window_sizes"],
            "PATCH_SIZE": config.patch_size,
            "IN_CHANS": config.in_channels,
            "MLP_RATIO": config.mlp_ratio,
        },
    }
    if provenance.get("norm_target_patch"):
        model["SIMMIM"] = {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": provenance["norm_target_patch"]}}
    return {"DATA": data, "MODEL": model}
