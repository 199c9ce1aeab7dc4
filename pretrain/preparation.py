"""What a run is made of: look at images, machine and initial encoder, fill in what the user left open, find the length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from simmim.checkpoints import read
from simmim.checkpoints.checkpoint import Checkpoint
from simmim.data import (
    ImageSamples,
    ImageStatistics,
    Source,
    default_num_workers,
    hold_out,
    measure_for_encoder,
    measure_images,
    open_source,
)
from simmim.data.channel_hints import hint_of
from simmim.data.kept_pictures import KeptPictures
from simmim.data.tiles import TilePlan, measure_tiles, plan_tiles
from simmim.defaults import ENOUGH_IMAGES_SEEN, default_scales
from simmim.messages import notify
from simmim.pretrain.calibration import (
    DEFAULT_S,
    LONG_S,
    WARM_UP_STEPS,
    busy_lines,
    chosen_line,
    epochs_in,
    estimate_line,
    is_short,
    num_processes,
    parse_length,
    run_seconds,
    seconds_per_step,
)
from simmim.pretrain.image_sizes import at_sizes, step_shares
from simmim.pretrain.keeping import resolve_cache
from simmim.pretrain.model import build_method, read_settings
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.resolve import resolve_settings
from simmim.pretrain.samples import random_views
from simmim.pretrain.settings import DataSettings, PretrainSettings
from simmim.pretrain.validation import default_steps_between
from simmim.reading import AUTO, Reading
from simmim.training.devices import default_precision, device_type
from simmim.training.run_folder import CONFIG, checkpoints_folder
from simmim.training.settings import KEEP_DECODED_MIB
from simmim.training.threads import read_usage

if TYPE_CHECKING:
    import datasets


class Resolved(NamedTuple):
    """What a run is made of, once everything that the user left open is filled in.

    Attributes:
        settings: complete.
        source: the images to train on.
        keep_decoded: whether images stay in memory once they are decoded.
        initial: the checkpoint that the weights start from; None for fresh ones.
        held_out: the images to validate with, which `source` does not have; None where there are none.
        short_side_px: of the images' files.
        tiles: those of the images, where they are read by tiles.
        kept: images that are kept shrunk on disk; None where none are.
        statistics: of a sample of the images.
        planned_s: the time for which the epochs were chosen; None where they were not.
    """

    settings: PretrainSettings
    source: Source
    keep_decoded: bool
    initial: Checkpoint | None
    held_out: datasets.Dataset | None = None
    short_side_px: int = 0
    tiles: TilePlan | None = None
    kept: KeptPictures | None = None
    statistics: ImageStatistics | None = None
    planned_s: float | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps that see each image once."""
        return self.source.num_images / self.settings.batch_size

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of some epochs, at least 1."""
        return max(1, round(epochs * self.steps_per_epoch))


class Found(NamedTuple):
    """What a run finds: images, machine, and the encoder to start from. None of it depends on the run's length.

    Attributes:
        source, held_out, tiles, keep_decoded, statistics, initial: those of `Resolved`.
        device: cuda, mps or cpu.
    """

    source: Source
    held_out: datasets.Dataset | None
    tiles: TilePlan | None
    keep_decoded: bool
    statistics: ImageStatistics
    initial: Checkpoint | None
    device: str


def resolve_length(settings: PretrainSettings) -> tuple[Resolved, list[str]]:
    """`resolve_run`, with as many epochs as fit into the time that is given, or on a CPU into an hour where neither time nor
    epochs are, and with encoder and images as large as that length suits; and lines about it. A run that is resumed keeps
    what was chosen.

    Raises:
        ValueError: for a time that is none, is given with epochs, or for several devices; as `resolve_run`.
    """
    seconds = None if settings.time is None else parse_length(settings.time)
    device = str(settings.trainer.get("accelerator", "auto"))
    device = device if device in WARM_UP_STEPS else device_type()
    if settings.resume and (Path(settings.out).expanduser() / CONFIG).is_file():
        resolved = resolve_run(as_chosen(settings, read_settings(settings.out)))
        return resolved._replace(planned_s=seconds), []
    if seconds is not None and settings.epochs is not None:
        raise ValueError(f"both time {settings.time} and epochs {settings.epochs:g} are given: give one of them")
    is_single = num_processes(settings, device) == 1
    if seconds is not None and not is_single:
        raise ValueError(f"time is {settings.time} and there are several devices, which it does not measure: give epochs")
    found, usage = look(settings), read_usage()
    settings, scale, step_s = fit_scale(settings, found, seconds, device)
    resolved = fill_in(settings, found)
    num_images, batch_size = resolved.source.num_images, resolved.settings.batch_size
    if not is_single or (seconds is None and is_short(resolved.settings, num_images)):
        return resolved, scale
    step_s = step_s or measure_step(resolved, device)
    by_default = seconds is None and settings.epochs is None and device == "cpu"
    if by_default and run_seconds(resolved.settings, num_images, step_s) > LONG_S:
        seconds = DEFAULT_S
    chosen = scale
    if seconds is not None:
        epochs = epochs_in(seconds, step_s, batch_size, num_images)
        chosen = [*scale, chosen_line(resolved.settings, epochs, num_images, step_s)]
        resolved = fill_in(replace(settings, epochs=epochs), found)._replace(planned_s=seconds)
    busy = busy_lines(usage, device, is_chosen=seconds is not None)
    return resolved, [*chosen, f"time     {estimate_line(resolved.settings, num_images, step_s)}", *busy]


def as_chosen(settings: PretrainSettings, stored: PretrainSettings) -> PretrainSettings:
    """The settings of a run that is resumed, where what they leave open is as in those that it was started with: what a
    measure, the disk's free space, or an encoder that is no longer read has decided."""
    left_open = {name for name in ("epochs", "preset", "image_size") if getattr(settings, name) is None}
    left_open -= {"image_size"} if settings.image_sizes is not None else set()
    chosen: dict[str, Any] = {name: getattr(stored, name) for name in left_open}
    data = {name: getattr(stored.data, name) for name in ("channels", "mean", "std") if getattr(settings.data, name) is None}
    if settings.data.cache == "auto":
        data["cache"] = stored.data.cache
    chosen["data"] = replace(settings.data, **data)
    if settings.init != "none" and settings.method == stored.method:
        encoder = {**stored.model.encoder, **settings.model.encoder}
        chosen["model"] = replace(settings.model, encoder=encoder)
        if settings.image_sizes is not None and settings.model_by_size is None:
            chosen["model_by_size"] = stored.model_by_size
    return replace(settings, **chosen)


def fit_scale(
    settings: PretrainSettings, found: Found, seconds: float | None, device: str
) -> tuple[PretrainSettings, list[str], float | None]:
    """The settings with preset and image size as large as suits the run's length (`default_scales`), where a fresh encoder's
    are open; why they are not the largest, a line or none; and the seconds of a step, where they were measured for it.

    Args:
        seconds: the run's length, where it is given.
        device: where it is measured: cuda, mps or cpu. On a GPU a run without a given length has the largest.
    """
    is_open = settings.init == "none" and settings.image_sizes is None and not settings.model.encoder
    if not is_open or (seconds is None and device != "cpu"):
        return settings, [], None
    given_px = None if settings.image_size is None else min(settings.size)
    scales = default_scales(found.statistics.short_side_px, device, settings.preset, given_px)
    reason, has_epochs = [], settings.epochs is not None
    for number, scale in enumerate(scales, start=1):
        settings = replace(settings, preset=scale.preset, image_size=settings.image_size if given_px else scale.side_px)
        step_s = None
        if number == len(scales):
            break
        seen, step_s = images_seen(fill_in(settings, found), seconds, has_epochs, device)
        if seen >= ENOUGH_IMAGES_SEEN:
            break
        about = float(f"{seen:.2g}")
        reason = [
            f"chosen   {scales[number]}: {scale} would see {about:,.0f} images in this run, and of fewer than a million a "
            f"smaller encoder learned more (--preset {scale.preset} --image-size {scale.side_px})"
        ]
    return settings, reason, step_s


def images_seen(
    resolved: Resolved, seconds: float | None, are_epochs_given: bool, device: str
) -> tuple[float, float | None]:
    """How many images a run would show its encoder, each as often as there are epochs, and the seconds of a step where they
    had to be measured.

    Args:
        seconds: the run's length. Without one it has the epochs that are given, else the default ones or those of an hour.
        are_epochs_given: by the user.
        device: where a step is measured, if one needs to be.
    """
    settings, num_images = resolved.settings, resolved.source.num_images
    whole = settings.epochs * num_images
    is_known = are_epochs_given or whole < ENOUGH_IMAGES_SEEN or num_processes(settings, device) > 1
    if seconds is None and is_known:
        return whole, None
    step_s = measure_step(resolved, device)
    fitting = epochs_in(seconds or DEFAULT_S, step_s, settings.batch_size, num_images) * num_images
    return (fitting if seconds else min(whole, fitting)), step_s


def measure_step(resolved: Resolved, device: str) -> float:
    """Seconds of an optimizer step of a run, which draws nothing that the run would; the mean where images grow."""
    data, seconds = resolved.settings.data, []
    for settings in at_sizes(resolved.settings):
        with torch.random.fork_rng(devices=[]):
            method = build_method(settings)
            module = PretrainingModule(method, data.mean, data.std, lambda step: 0.0, 0.0, settings.optim.clip)
        view, *further = random_views(settings)
        options = (data.channels, settings.seed, resolved.keep_decoded, data.max_pixels, data.reading, further)
        seconds.append(seconds_per_step(module, ImageSamples(resolved.source.head, view, *options), settings, device))
    return sum(share * each for share, each in zip(step_shares(resolved.settings), seconds))


def resolve_run(settings: PretrainSettings) -> Resolved:
    """Look at the images, the machine and the encoder to start from, and fill in what the user left open."""
    return fill_in(settings, look(settings))


def look(settings: PretrainSettings) -> Found:
    """Open the images, measure a sample of them, and read the encoder to start from."""
    # A run that is resumed no longer needs the encoder it started from, which may be gone.
    has_checkpoint = settings.resume and any(checkpoints_folder(Path(settings.out).expanduser()).glob("*.ckpt"))
    initial = read(settings.init) if settings.init != "none" and not has_checkpoint else None
    if initial is not None:
        initial.config.check_pretraining()
    data = settings.data
    reading = open_reading(settings, initial, resumes=has_checkpoint)
    source, held_out = open_source(data.path, data.column, data.streaming, data.count, reading), None
    if data.validation is not None:
        source, held_out = hold_out(source, data.validation, settings.seed)
    plan = tile_plan(data, source.images, reading)
    of_initial = data.range == "auto" and initial is not None
    files = source.head
    source, images = measure_source(settings, source, plan, reading, measure_for_encoder if of_initial else measure_images)
    if images.channels == 1 and not (reading.channel_files or data.streaming) and (hint := hint_of(files)):
        notify(hint.describe("--data.channel_files"))
    keep_decoded = images.decoded_mib <= KEEP_DECODED_MIB and not source.streaming and plan is None
    return Found(source, held_out, plan, keep_decoded, images, initial, device_type())


def fill_in(settings: PretrainSettings, found: Found) -> Resolved:
    """What a run is made of, by its settings and what it finds."""
    source, held_out, tiles, keep_decoded, images, initial, device = found
    # Images that are in memory already are cropped faster than they could be sent between processes.
    workers = 0 if keep_decoded and device == "cpu" else default_num_workers(device)
    settings = resolve_settings(settings, images, source.num_images, device, workers, initial)
    precision = settings.precision or default_precision(device, settings.encoder_config())
    settings = replace(settings, precision=precision)
    if held_out is not None and settings.validate_every_epochs is None:
        num_steps = max(1, round(settings.epochs * source.num_images / settings.batch_size))
        every_steps = default_steps_between(num_steps, len(held_out), settings.batch_size)
        settings = replace(settings, validate_every_epochs=every_steps * settings.batch_size / source.num_images)
    may_keep = not (source.streaming or keep_decoded or tiles)
    settings, kept = resolve_cache(settings, source, images, random_views(settings) if may_keep else [])
    return Resolved(settings, source, keep_decoded, initial, held_out, images.short_side_px, tiles, kept, images)


def tile_plan(data: DataSettings, images: datasets.Dataset, reading: Reading) -> TilePlan | None:
    """The tiles that the settings ask for; None where images are read whole."""
    if data.tiles is None:
        return None
    return plan_tiles(images, data.tiles, reading, data.max_pixels, 0.0 if data.strict else data.max_skipped_share)


def measure_source(
    settings: PretrainSettings,
    source: Source,
    plan: TilePlan | None,
    reading: Reading,
    measure: Callable[..., ImageStatistics],
) -> tuple[Source, ImageStatistics]:
    """The source of a run, of whose tiles there are some by number, and its statistics."""
    data = settings.data
    if plan is None:
        options = {"channels": data.channels, "max_pixels": data.max_pixels, "num_images": source.num_images}
        return source, measure(source.head, reading=reading, **options)
    measured = measure_tiles(source.images, plan, settings.seed, reading, data.channels, data.max_pixels, measure)
    return Source(source.images, len(plan), measured.tiles, streaming=False), measured.statistics


def open_reading(settings: PretrainSettings, initial: Checkpoint | None, resumes: bool) -> Reading:
    """How files become pictures as the settings say; what they leave open is as in the run that is resumed, or as in the
    encoder to start from."""
    reading, known = settings.data.reading, None
    if resumes and (Path(settings.out).expanduser() / CONFIG).is_file():
        known = read_settings(settings.out).data.reading
    elif initial and initial.preprocessing.reading:
        known = initial.preprocessing.reading
        known = known if known.is_deep else replace(known, range="auto")
    if known is None:
        return reading
    left_open = {name: value for name, value in vars(known).items() if getattr(reading, name) == getattr(AUTO, name)}
    return replace(reading, **left_open)
