"""Where a fine-tuning run starts: pre-trained weights, an architecture without its weights, or a preset."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import build_encoder
from simmim.data import ImageStatistics, default_num_workers, measure_for_encoder, measure_images
from simmim.data.decode import MAX_PIXELS
from simmim.data.image_statistics import sample_records
from simmim.data.sources import suit_reading
from simmim.data.value_ranges import sample_values, settle_reading
from simmim.defaults import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_image_size,
    default_preset,
    encoder_channels,
    plain_size,
)
from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, with_fields
from simmim.finetune.settings import EncoderSettings, Settings, TransferSettings
from simmim.messages import without_notices
from simmim.reading import AUTO, Reading
from simmim.training.devices import default_precision
from simmim.training.settings import KEEP_DECODED_MIB

if TYPE_CHECKING:
    import datasets

# As KEEP_DECODED_MIB, where no further process loads. Few labels are seen hundreds of times, and to decode photographs of
# 192 px takes as much processor time as a step of a small encoder on them at 64 px.
KEEP_DECODED_ALONE_MIB = 512
# Fields of an encoder's configuration that fine-tuning may change. An encoder need not have them.
OPTIONAL_FIELDS = ("window_size", "drop_path_rate")


class Start(NamedTuple):
    """The state before the first step, apart from the task.

    Attributes:
        encoder: the encoder to train.
        preprocessing: the preprocessing of its images.
        settings: with image size, encoder, workers and precision resolved.
        source: what encoder or architecture were read from; None for a preset.
        keep_decoded: whether decoded training images fit into memory.
        room_for: how many further images fit too, for each training image.
    """

    encoder: Encoder
    preprocessing: Preprocessing
    settings: TransferSettings
    source: Checkpoint | None
    keep_decoded: bool
    room_for: float = 0.0

    def keeps(self, validation: Sized, train: Sized) -> bool:
        """Whether decoded validation images fit into memory beside those of training."""
        return self.keep_decoded and len(validation) <= self.room_for * len(train)


def find_start(
    settings: Settings, images: ImageStatistics, device: str, report_line: Callable[[str], object] | None = None
) -> Start:
    """Pre-trained weights (`init`), an architecture without its weights (`encoder.like`), or a preset from scratch.

    Args:
        images: statistics of the training images.
        device: cuda, mps or cpu.
        report_line: called with the report of the weights that were loaded.

    Raises:
        ValueError: when there is no encoder, it lacks a setting that is given, or images are smaller than its patch.
    """
    source = settings.init if settings.init != "none" else settings.encoder.like
    if source is None:
        checkpoint = None
        encoder, preprocessing, settings = start_from_preset(settings, images, device)
    else:
        checkpoint = read(source, **given_fields(settings.encoder))
        encoder, preprocessing, settings = start_from_checkpoint(settings, checkpoint, images, report_line)
    limit_mib = KEEP_DECODED_ALONE_MIB if device == "cpu" and not settings.workers else KEEP_DECODED_MIB
    keep_decoded = images.decoded_mib <= limit_mib
    room_for = limit_mib / max(images.decoded_mib, 1e-9) - 1
    workers = settings.workers
    if workers is None:
        # Images in memory are cropped faster than they could be sent between processes.
        workers = 0 if keep_decoded and device == "cpu" else default_num_workers(device)
    precision = settings.precision or default_precision(device, encoder.config)
    settings = replace(settings, workers=workers, precision=precision)
    return Start(encoder, preprocessing, settings, checkpoint, keep_decoded, room_for)


def takes_larger_images(settings: TransferSettings, side_px: int, images: ImageStatistics, device: str) -> bool:
    """Whether a square of this side is larger than the images that `find_start` takes where the user gives no size, those
    of the encoder or as suits a preset, and the encoder takes it.

    Raises:
        ValueError: as `find_start`.
    """
    source = settings.init if settings.init != "none" else settings.encoder.like
    if source is None:
        return side_px > default_image_size(images.short_side_px, device)
    checkpoint = read(source, **given_fields(settings.encoder))
    trained_size = checkpoint.preprocessing.image_size
    if side_px <= min(trained_size):
        return False
    try:
        checkpoint.config.for_fine_tuning().adapt_to_size(trained_size, (side_px, side_px))
    except ValueError:  # a network of another library, for images of one size
        return False
    return True


def find_reading(settings: TransferSettings) -> Reading | None:
    """How the images are read: as the settings say, and in what they leave open as the encoder's images were. None where
    neither tells.

    Raises:
        ValueError: as `find_start`; for values on another scale than the encoder's.
    """
    given, known = settings.data.reading, encoder_reading(settings)
    changes = {name: value for name, value in vars(given).items() if value != getattr(AUTO, name)}
    if known is None:
        return given if changes else None
    if settings.init != "none" and changes.get("range") == "type":
        del changes["range"]  # the encoder's; whether it is that of the images' type, `check_type_range` tells of the images
    for name in ("range", "transform"):
        if settings.init != "none" and name in changes and changes[name] != getattr(known, name):
            refuse_scale(settings, name, f"{changes[name]!r}", known)
    if known.range == "image" and "transform" in changes:
        changes.setdefault("range", "auto")
    if "channel_files" not in changes:
        known = suit_reading(settings.data.path, known)
    return replace(known, **changes)


def refuse_scale(settings: TransferSettings, name: str, given: str, known: Reading) -> NoReturn:
    """Refuse values on another scale than the encoder's.

    Args:
        name, given: the setting and what it is.
        known: how the encoder's images were read.

    Raises:
        ValueError: always, naming both.
    """
    stated = known.describe() or f"data.range {known.range}"
    raise ValueError(
        f"data.{name} is {given}, and the encoder in {settings.init} was trained with {stated}, which its weights expect: "
        f"leave out data.{name}, or train from scratch with init: none"
    )


def check_type_range(settings: TransferSettings, train: datasets.Dataset, known: Reading) -> None:
    """Check that data.range type is, of these images, the range that the encoder was trained with.

    Args:
        known: how the encoder's images were read.

    Raises:
        ValueError: where it is another one, with both.
    """
    records = sample_records(train)
    if known.range == "type" or not records:
        return
    if not known.is_deep:  # 8-bit values are the same by both
        deep = sorted(sample_values(records, known, MAX_PIXELS, levels=False)[0].kinds.keys() - {"uint8", "bool"})
        if deep:
            refuse_scale(settings, "range", f"'type', of these images the whole range of {' and '.join(deep)}", known)
        return
    with without_notices():
        found = settle_reading(replace(known, range="type"), records, len(known.range))
    if found.range == "type":
        refuse_scale(settings, "range", "'type', which leaves these images' 8-bit values as they are", known)
    if found.is_deep and found.range != known.range:  # it is not where no image can be read, which is said later
        refuse_scale(settings, "range", f"'type', of these images {found.describe()}", known)


def encoder_reading(settings: TransferSettings) -> Reading | None:
    """How the images of the encoder that lends weights or architecture were read; None where that is not known, and for a
    preset.

    Raises:
        ValueError: as `find_start`.
    """
    source = settings.init if settings.init != "none" else settings.encoder.like
    if source is None:
        return None
    checkpoint = read(source, **given_fields(settings.encoder))
    # This toolkit wrote down how it reads images, once there was more than one way.
    known = checkpoint.preprocessing.reading is not None or "toolkit" in checkpoint.provenance
    return checkpoint.preprocessing.reading_or_default if known else None


def measure_training_images(settings: TransferSettings, train: datasets.Dataset) -> ImageStatistics:
    """Statistics of the training images, read as `find_reading` tells, else as suits them.

    Raises:
        ValueError: as `find_reading`, `check_type_range` and `measure_images`.
    """
    reading = find_reading(settings)
    if settings.init != "none" and settings.data.range == "type" and reading is not None:
        check_type_range(settings, train, reading)
    if settings.init == "none" and reading is not None and settings.data.range != "auto":
        return measure_images(train, reading=reading)
    return measure_for_encoder(train, reading)


def start_from_preset(settings: Settings, images: ImageStatistics, device: str) -> tuple[Encoder, Preprocessing, Settings]:
    """A fresh encoder of a preset, its preprocessing by the statistics of the images, and the resolved settings."""
    chosen = settings.encoder
    settings = replace(settings, image_size=settings.image_size or default_image_size(images.short_side_px, device))
    preset = chosen.preset or default_preset(min(settings.size), device)
    config = registry.preset_config(preset, in_channels=images.channels)
    config = apply_encoder_settings(with_fields(config, **config.fields_for_size(settings.size)), chosen)
    settings = replace(settings, encoder=replace(resolved_encoder_settings(chosen, config), preset=preset))
    check_size(settings, config)
    color = images.channels == 3 and not images.reading.is_deep
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if color else (images.mean, images.std)
    encoder = registry.build(config, chosen.checkpoint_activations, chosen.sequential_attention)
    return encoder, Preprocessing(settings.size, mean, std, reading=images.reading), settings


def start_from_checkpoint(
    settings: Settings, checkpoint: Checkpoint, images: ImageStatistics, report_line: Callable[[str], object] | None
) -> tuple[Encoder, Preprocessing, Settings]:
    """The encoder of a checkpoint, adapted to images and settings, its preprocessing, and the resolved settings. With `init`
    none the weights are fresh.

    Args:
        images: statistics of the training images, as from `measure_for_encoder`.
    """
    chosen, trained_size = settings.encoder, checkpoint.preprocessing.image_size
    settings = replace(settings, image_size=settings.image_size or plain_size(trained_size))
    config = checkpoint.config.for_fine_tuning().adapt_to_size(trained_size, settings.size)
    config = with_fields(config, in_channels=encoder_channels(checkpoint.config.in_channels, images.channels))
    config = apply_encoder_settings(config, chosen)
    settings = replace(settings, encoder=resolved_encoder_settings(chosen, config))
    check_size(settings, config)
    saved = build_encoder(checkpoint, **{field.name: getattr(config, field.name) for field in fields(config)})  # type: ignore[arg-type]
    encoder = saved.encoder
    if settings.init == "none":
        encoder = registry.build(encoder.config.without_training_size())
    elif report_line:
        report_line(str(saved.report))
    encoder.save_memory(chosen.checkpoint_activations, chosen.sequential_attention)
    # Training views are bilinear, whatever the encoder was trained on before; so is the view that evaluates them.
    preprocessing = replace(
        saved.preprocessing, image_size=settings.size, interpolation="bilinear", fit="crop", reading=images.reading, views=1
    )
    known = checkpoint.preprocessing.reading_or_default
    same_scale = (known.range, known.transform) == (images.reading.range, images.reading.transform)
    if not same_scale and (images.reading.is_deep or known.is_deep):
        # The encoder's statistics are of values on another scale.
        preprocessing = replace(preprocessing, mean=images.mean, std=images.std)
    return encoder, preprocessing, settings


def check_size(settings: Settings, config: EncoderConfig) -> None:
    """Refuse images that are smaller than one patch.

    Raises:
        ValueError: naming the least size.
    """
    if min(settings.size) < config.patch_size:
        raise ValueError(
            f"image_size is {settings.image_size}, less than a patch of the encoder: give {config.patch_size} or more"
        )


# --- Settings of the encoder -------------------------------------------------------------------------------------------


def given_fields(chosen: EncoderSettings) -> dict[str, Any]:
    """The optional fields that the user gives."""
    values = {name: getattr(chosen, name) for name in OPTIONAL_FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def apply_encoder_settings(config: EncoderConfig, chosen: EncoderSettings) -> EncoderConfig:
    """`config` with the fields that the user gives, and with default stochastic depth where the user leaves it open.

    Raises:
        ValueError: for a field that the encoder does not have.
    """
    known = {field.name for field in fields(config)}  # type: ignore[arg-type]
    changes = given_fields(chosen)
    for name, value in changes.items():
        if name not in known:
            title = registry.family_of(config).title
            raise ValueError(f"encoder.{name} is {value}: {title} encoders have no such setting, leave it out")
    if "drop_path_rate" in known:
        changes.setdefault("drop_path_rate", config.default_drop_path)
    return with_fields(config, **changes)


def resolved_encoder_settings(chosen: EncoderSettings, config: EncoderConfig) -> EncoderSettings:
    """`chosen` with the optional fields of `config`; None for those that the encoder does not have."""
    return replace(chosen, **{name: getattr(config, name, None) for name in OPTIONAL_FIELDS})
