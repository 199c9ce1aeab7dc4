"""Reading an encoder from anywhere: what a path holds is found from the files themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from simmim.checkpoints.checkpoint import (
    CONFIG,
    FORMAT_NAMES,
    WEIGHTS,
    Checkpoint,
    SavedEncoder,
    build_encoder,
    check_head,
    check_pretraining,
    read_checkpoint,
    read_json,
)
from simmim.checkpoints.formats import huggingface, official, timm
from simmim.checkpoints.weight_files import INDEX, WeightFile, read_weight_file
from simmim.encoders.base import Encoder

DESCRIPTION = "simmim"  # the key of a foreign config.json under which this toolkit leaves what the format has no place for
WEIGHT_NAMES = ("model.safetensors", INDEX, "pytorch_model.bin", "model.pth", "pytorch_model.bin.index.json")


def load_encoder(path: str | Path, **overrides) -> Encoder:
    """An encoder, in evaluation mode, from whatever holds one.

    Args:
        path: a run folder, an exported folder, an authors' .pth file, timm's or transformers' folder or weight file.
        overrides: settings of `SwinV2Config` to change while loading: `window_size=14`, `drop_path_rate=0.1`,
            `in_channels=1`.

    Raises:
        ValueError: when there is no encoder at `path`, or not every weight fits.
    """
    return read_encoder(path, **overrides).encoder


def read_encoder(path: str | Path, report: Callable[[str], None] | None = None, **overrides) -> SavedEncoder:
    """As `load_encoder`, with the preprocessing, the provenance and all else that was found; `report` is called with the
    text of the `LoadReport`.

    Raises:
        ValueError: as `load_encoder`.
    """
    saved = build_encoder(read(path, **overrides), **overrides)
    if report:
        report(str(saved.report))
    return saved


def read(path: str | Path, **overrides) -> Checkpoint:
    """The model at `path` under this toolkit's names, whatever the format.

    Args:
        overrides: of them window_size is looked at, for files that do not tell theirs.

    Raises:
        ValueError: when there is none, it is no Swin Transformer V2, or its parts do not fit one another.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"no encoder at {str(path)!r}: there is no such file or folder")
    if path.suffix == ".onnx" or (path / "model.onnx").is_file():
        raise ValueError(f"{str(path)!r} is an ONNX model, made to be run and not read back: give what it was exported from")
    folder, file = located(path)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if (folder / WEIGHTS).is_file() and (file is None or file.name in (WEIGHTS, CONFIG)):
        return read_checkpoint(folder)
    if file is None or file.name == CONFIG:
        file = next((folder / name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"no encoder in {str(folder)!r}: expected {WEIGHTS}, or one of {', '.join(WEIGHT_NAMES)}")
    weights = read_weight_file(file)
    description = config.get(DESCRIPTION) or {}
    try:
        checkpoint = understood(weights, description, config, folder, overrides)
    except ValueError as error:
        raise ValueError(str(error) if str(folder) in str(error) else f"{file}: {error}") from error
    check_pretraining(checkpoint, file)
    check_head(checkpoint.head, checkpoint.classes, checkpoint.config, file)
    return checkpoint


def understood(weights: WeightFile, description: dict, config: dict, folder: Path, overrides: Mapping) -> Checkpoint:
    """A foreign file by the reader of its format, which its names tell.

    Args:
        description: what this toolkit left in `config`, the folder's config.json.

    Raises:
        ValueError: as `read`.
    """
    file = weights.source
    check_kind(weights.tensors, file)
    if any(name.endswith(huggingface.ANCHOR) for name in weights.tensors):
        if config.get("model_type") != "swinv2":
            found = f"{CONFIG} beside it says model_type {config['model_type']!r}" if "model_type" in config else ""
            raise ValueError(
                f"{file} holds a model of transformers and {found or f'no {CONFIG} lies beside it'}: give a whole folder, "
                "with model_type 'swinv2'"
            )
        return huggingface.read(weights, description, config, folder)
    timm_like = any(re.search(r"(^|\.)head\.fc\.|layers[._][1-9]\d*\.downsample\.", name) for name in weights.tensors)
    # The authors' merging closes a stage, timm's opens the next; two stages have layers.0 or layers.1, never both.
    authors = any(re.search(r"layers\.0\.downsample\.", name) for name in weights.tensors)
    if (timm_like and not authors) or "pretrained_cfg" in config:
        return timm.read(weights, description, overrides, config)
    return official.read(weights, description, overrides)


def located(path: Path) -> tuple[Path, Path | None]:
    """The folder and, if a file was meant, the file.

    Raises:
        ValueError: when a folder holds neither an encoder nor a run with one.
    """
    if path.is_file():
        return path.parent, path
    names = (WEIGHTS, CONFIG, *WEIGHT_NAMES)
    for folder in (path, path / "encoder"):
        found = [name for name in names if (folder / name).is_file()]
        if WEIGHTS in found and CONFIG not in found:
            break
        if found and found != [CONFIG]:
            return folder, None
    raise ValueError(
        f"no encoder in {str(path)!r}: expected {WEIGHTS} and {CONFIG} there or in its folder encoder/, or a folder of timm "
        "or transformers"
    )


def check_kind(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse weights of other networks, by name where it can be told.

    Raises:
        ValueError: saying what the weights look like.
    """
    names = list(tensors)

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    swin = some(r"layers[._]0\.blocks\.0\.(attn|attention\.self)\.")
    projection = some(r"patch_embed\.proj\.weight$") or some(re.escape(huggingface.ANCHOR))
    if swin and some("logit_scale$") and projection:
        return
    if some("relative_position_bias_table$"):
        kind = "a Swin Transformer V1: its position bias is a table of one window, and it has no cosine attention"
    elif some(r"^(.*\.)?layer1\.0\.conv1\.") or some(r"stages\.0\.layers\.0\.convolution"):
        kind = "a ResNet"
    elif some(r"cls_token$") and some(r"(blocks|layer|layers)\.0\."):
        kind = "a ViT"
    elif some(r"stages\.0\.(blocks\.)?0\.(dwconv|conv_dw)"):
        kind = "a ConvNeXt"
    elif swin:
        kind = "no whole Swin Transformer V2: there is no " + ("logit_scale" if projection else "patch_embed.proj.weight")
    else:
        kind = f"something else, {len(names)} tensors: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    raise ValueError(f"{file} holds {kind}. Expected a Swin Transformer V2 of {', '.join(FORMAT_NAMES.values())}")
