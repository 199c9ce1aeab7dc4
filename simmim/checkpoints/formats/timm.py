"""timm's swinv2 models: the authors' names, with each merging at the start of the stage it leads to."""

from __future__ import annotations

import re
from collections.abc import Mapping

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing, State, check_state, filled_windows
from simmim.checkpoints.formats import official
from simmim.checkpoints.formats.key_tables import KeyTable, all_or_none, with_suffixes
from simmim.checkpoints.weight_files import WeightFile
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.swinv2.config import PRESETS, SwinV2Config
from simmim.encoders.swinv2.weights import infer_architecture

TABLE = KeyTable(
    encoder=tuple(
        (ours, theirs.replace("layers.{i}.downsample", "layers.{next}.downsample"))
        for ours, theirs in official.TABLE.encoder
        if "norm3" not in ours
    ),
    head=with_suffixes("head", "head.fc"),
)
NAMES = {
    96: {6: "swinv2_tiny_window8_256", 18: "swinv2_small_window8_256"},
    128: {18: "swinv2_base_window8_256"},
    192: {18: "swinv2_large_window12_192"},
}
# Our settings that timm's arguments hold too; those of the images may be left out of them and differ from the name's.
SIZES = {"embed_dim": "embed_dim", "depths": "depths", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio"}
IMAGES = {"in_channels": "in_chans", "patch_size": "patch_size"}
# What timm's registered names mean, where a folder's config.json leaves it to them.
PUBLISHED_WINDOWS = {"12to16_192to256": (16, (12, 12, 12, 6)), "12to24_192to384": (24, (12, 12, 12, 6))}


def read(file: WeightFile, description: dict, overrides: Mapping, folder_config: dict) -> Checkpoint:
    """A file with timm's names; `folder_config` is the config.json that timm saves beside it.

    Raises:
        ValueError: as `official.read`.
    """
    prefix = official.prefix_of(file.tensors)
    inside = {name.removeprefix(prefix): value for name, value in file.tensors.items() if name.startswith(prefix)}
    buffers = {name for name in inside if official.BUFFERS.search(name)}
    merged = {rename(name): value for name, value in inside.items() if name not in buffers}
    shapes = infer_architecture(merged)
    config, preprocessing, notes = described_architecture(shapes, merged, file, description, overrides, folder_config)
    state, left = TABLE.to_ours({name: value for name, value in inside.items() if name not in buffers}, config)
    extra = [name for name in left if name not in {theirs for _, theirs in TABLE.head}]
    extra += [name for name in file.tensors if not name.startswith(prefix)]
    check_state(config, state | {name: inside.get(name, file.tensors.get(name)) for name in extra}, file.source)
    head = official.head_of(all_or_none(TABLE.head, inside, file.source))
    labels = folder_config.get("label_names") or folder_config.get("pretrained_cfg", {}).get("label_names")
    return Checkpoint(
        config,
        state,
        preprocessing,
        file.source,
        "timm",
        description.get("provenance", {"origin": "timm", "architecture": folder_config.get("architecture", "unknown")}),
        {},
        head,
        official.class_names({"classes": labels}, head),
        notes,
    )


def rename(name: str) -> str:
    """A merging under the number of the stage it closes."""
    parts = name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts)


def described_architecture(
    shapes: dict, state: State, file: WeightFile, description: dict, overrides: Mapping, folder_config: dict
) -> tuple[SwinV2Config, Preprocessing, tuple[str, ...]]:
    """Architecture and preprocessing from the folder's config.json: this toolkit's part of it where it still fits, else
    timm's; without the folder from the published file's name, as `official.described_architecture`."""
    trained = folder_config.get("pretrained_cfg") or folder_config
    arguments = folder_config.get("model_args") or {}
    name = folder_config.get("architecture") or trained.get("architecture") or ""
    size = arguments.get("img_size") or tuple(trained.get("input_size", ())[1:]) or None
    if description and name:
        config = SwinV2Config(**description["architecture"])
        if config.window_size == arguments.get("window_size", config.window_size):
            return config, Preprocessing(**description["preprocessing"]), ()
    published = next((value for key, value in PUBLISHED_WINDOWS.items() if key in name), None)
    found = re.search(r"window(\d+)_(\d+)", name)
    given = arguments.get("window_size")
    window = one_window(given, file) if given else published[0] if published else int(found[1]) if found else None
    if window is None or size is None:
        config, preprocessing, notes = official.described_architecture(state, {}, {}, file, {}, overrides)
        return timm_padding(config), preprocessing, notes
    pretrained = arguments.get("pretrained_window_sizes") or (published[1] if published else None)
    size = (size, size) if isinstance(size, int) else tuple(size)
    # Of what the folder says too, the weights must be: a block that is missing would not be missed otherwise.
    shapes |= stated_sizes(name, arguments)
    config = filled_windows(SwinV2Config(**shapes, window_size=window), pretrained, size)
    preprocessing = Preprocessing(
        size,
        trained.get("mean", IMAGENET_MEAN),
        trained.get("std", IMAGENET_STD),
        trained.get("interpolation", "bicubic"),
        trained.get("crop_pct") or 0.875,
        "squash" if trained.get("crop_mode") == "squash" else "crop",
    )
    return timm_padding(config), preprocessing, ()


def stated_sizes(name: str, arguments: Mapping) -> dict:
    """Sizes that timm's name and arguments of a model state, as settings of `SwinV2Config`."""
    preset = re.match(r"swinv2_(tiny|small|base|large)_", name)
    stated = {size: getattr(PRESETS[preset[1]], size) for size in SIZES} if preset else {}
    stated |= {size: arguments[theirs] for size, theirs in {**SIZES, **IMAGES}.items() if theirs in arguments}
    return {size: tuple(value) if isinstance(value, list) else value for size, value in stated.items()}


def one_window(stated: int | list, file: WeightFile) -> int:
    """The window of all stages; timm also takes height and width, and one for each stage.

    Raises:
        ValueError: when they differ.
    """
    if isinstance(stated, int):
        return stated
    sides = {side for stage in stated for side in (stage if isinstance(stage, list) else [stage])}
    if len(sides) != 1:
        raise ValueError(f"{file.source.parent / 'config.json'} says window_size {stated}: expected one size for all stages")
    return sides.pop()


def timm_padding(config: SwinV2Config) -> SwinV2Config:
    """`config` with maps shifted before they are padded, as timm does where windows do not divide them."""
    return SwinV2Config(**{**config.as_dict(), "shift_before_padding": True})


# --- Writing ---------------------------------------------------------------------------------------------------------


def state_for(checkpoint: Checkpoint, form: str) -> State:
    """Every tensor of timm's file."""
    state = TABLE.from_ours(checkpoint.encoder, checkpoint.config)
    if form == "classifier":
        state |= {theirs: checkpoint.head[ours.removeprefix("head.")] for ours, theirs in TABLE.head}
    return state


def model_arguments(checkpoint: Checkpoint) -> dict:
    """The arguments of `timm.create_model` that make this architecture of any of its swinv2 names."""
    config = checkpoint.config.as_dict()
    return {
        "img_size": list(checkpoint.preprocessing.image_size),
        "patch_size": config["patch_size"],
        "in_chans": config["in_channels"],
        "embed_dim": config["embed_dim"],
        "depths": config["depths"],
        "num_heads": config["num_heads"],
        "window_size": config["window_size"],
        "mlp_ratio": config["mlp_ratio"],
        "pretrained_window_sizes": config["pretrained_window_sizes"],
    }


def architecture_name(config: SwinV2Config) -> str:
    """The registered name of this size, or tiny's, which the arguments turn into any other."""
    depth = config.depths[2] if len(config.depths) > 2 else 0
    return NAMES.get(config.embed_dim, {}).get(depth, NAMES[96][6])


def folder_config(checkpoint: Checkpoint, form: str, license: str) -> dict:
    """The config.json that `timm.create_model("local-dir:FOLDER", pretrained=True)` reads."""
    preprocessing = checkpoint.preprocessing
    classes = list(checkpoint.classes) if form == "classifier" else []
    return {
        "architecture": architecture_name(checkpoint.config),
        "num_classes": len(classes),
        "num_features": checkpoint.config.dims[-1],
        "global_pool": "avg",
        "model_args": model_arguments(checkpoint),
        "pretrained_cfg": {
            "tag": "simmim",
            "custom_load": False,
            "input_size": [checkpoint.config.in_channels, *preprocessing.image_size],
            "fixed_input_size": True,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop,
            "crop_mode": "squash" if preprocessing.fit == "squash" else "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
            "license": license,
            **({"label_names": classes} if classes else {}),
        },
    }


def loading_code(folder: str, form: str) -> str:
    """Lines of Python that load the folder."""
    extra = "" if form == "classifier" else ", num_classes=0"
    return (
        "import timm\n\n"
        f"model = timm.create_model({'local-dir:' + folder!r}, pretrained=True{extra})\n"
        f"# each stage's maps: timm.create_model({'local-dir:' + folder!r}, pretrained=True, features_only=True)"
    )
