"""Settings of stage 1. `simmim.pretrain.resolve` fills in what the user leaves open."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any, ClassVar

from simmim.encoders import registry
from simmim.encoders.base import EncoderConfig
from simmim.messages import did_you_mean
from simmim.methods.base import MethodSettings
from simmim.methods.registry import default_method, method_named
from simmim.pretrain.image_sizes import checked_sizes
from simmim.reading import Reading, TileSettings, tile_settings
from simmim.training.optim import Schedule
from simmim.training.settings import OptimizerSettings, RunSettings, check_positive


@dataclass(frozen=True)
class DataSettings:
    """The unlabeled images and how they are cropped.

    Args:
        path: folder of images, nested at will; or a glob, a text file of paths, Parquet or Arrow files, WebDataset tar
            shards, a saved datasets folder, a hub id; or a list of several. A run goes on without subfolders that cannot be
            read, and names them; they are looked for again the next time.
        column: column of the images, in sources that have columns; found by default.
        streaming: read in order through a shuffle buffer, without an index or a local copy.
        shuffle_buffer: images in that buffer, per loading process.
        count: images per epoch of a stream whose length is not known before it is read.
        strict: stop at the first image that cannot be read.
        max_skipped_share: stop when a larger share of the images so far cannot be read. Other images replace these.
        max_pixels: larger images are not read, as a guard against decompression bombs.
        validation: images that are kept out of pre-training, and whose loss is logged: a share below 1, or their number.
            Which they are follows from the seed. By default none.
        channels: 1 for gray, 3 for color, or the number in TIFF and .npy files; found from the images by default.
        mean: mean of each channel, of values in [0, 1]; by default ImageNet's for color, else the images' own.
        std: standard deviation of each channel, as mean.
        range: values deeper than 8 bits are shares of one range a channel, the same for all images: auto estimates it from a
            sample, type takes the range of the files' type, [[low, high], …] gives it. image stretches every image by its
            own smallest and largest value, to 8 bits. 8-bit images stay as they are, unless numbers are given.
        transform: of deep values that span decades: log, sqrt, asinh, or none.
        pages: of TIFF files with several pages: channels of one image, images, or first, the others unread. By default the
            metadata of OME, ImageJ and GDAL tell, and files that tell nothing are refused.
        channel_files: channels are files of their own, and this is the pattern of their names without endings:
            {well}_s{site}_w{channel}. Files that agree but for {channel} are one image; * stands for what does not matter.
        channels_used: numbers, from 0, or names of the channels that are used, in this order; all by default.
        channel_names: of the channels that are used; those in the files by default.
        cache: keep images decoded on disk beside the index, shrunk to what crops need, so that later epochs and runs do
            not decode them again: auto where that pays, off, or at most a size, as 20GB.
        tile: side in pixels of tiles, of which images larger than a picture are read at random, never the whole file. An
            epoch has as many tiles of each image as cover its area. By default images are read whole.
        tile_level: level of the files' pyramids that tiles are of; by default 0, the full resolution.
        pixel_size: length of a tile's pixel in the unit that the files tell, µm or that of a map, in place of tile_level.
        max_background: tiles with a larger share of background (pixels without data, or within a 32nd of the range of the
            tile's median in every channel) are left out and counted; 1 leaves out none.
        crop_scale: range of the random crop's share of the area of the image or tile.
        crop_ratio: range of the crop's width over height.
        flip: probability of mirroring left and right.
        turns: turn by 0 to 3 quarters at random, for images without an up; with flip, vertical flips too.
    """

    path: str | list[str]
    column: str | None = None
    streaming: bool = False
    shuffle_buffer: int = 10_000
    count: int | None = None
    strict: bool = False
    max_skipped_share: float = 0.05
    max_pixels: int = 200_000_000
    validation: int | float | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    range: tuple[tuple[float, float], ...] | str = "auto"
    transform: str = "none"
    pages: str | None = None
    channel_files: str | None = None
    channels_used: tuple[int | str, ...] | None = None
    channel_names: tuple[str, ...] = ()
    cache: str | bool = "auto"
    tile: int | None = None
    tile_level: int | None = None
    pixel_size: float | None = None
    max_background: float = 0.95
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    flip: float = 0.5
    turns: bool = False

    # What versions did that had no such setting.
    earlier: ClassVar[dict[str, Any]] = {"range": "image", "pages": "first", "cache": "off"}

    def __post_init__(self) -> None:
        for name, value in vars(self.reading).items():
            object.__setattr__(self, name, value)
        for name in ("mean", "std", "crop_scale", "crop_ratio"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("channels", "count", "shuffle_buffer", "max_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"data.max_skipped_share is {self.max_skipped_share}: give a share from 0 to 1")
        check_validation(self.validation, self.streaming)
        if isinstance(self.cache, bool):  # as YAML reads off
            object.__setattr__(self, "cache", "auto" if self.cache else "off")
        if self.tiles and self.streaming:
            raise ValueError(
                "data.tile draws tiles from images by their number, and those of a stream have none: leave out data.tile or "
                "data.streaming"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"data.crop_scale is {self.crop_scale}: give shares of the area, 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"data.crop_ratio is {self.crop_ratio}: give width over height, 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip is {self.flip}: give a probability")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"data.std is {self.std}: give positive numbers")

    @property
    def reading(self) -> Reading:
        """How files become pictures.

        Raises:
            ValueError: for settings that are none.
        """
        return Reading(self.range, self.transform, self.pages, self.channel_files, self.channels_used, self.channel_names)

    @property
    def tiles(self) -> TileSettings | None:
        """Which part of an image is a tile; None where images are read whole.

        Raises:
            ValueError: for numbers out of range, and a level or length without tiles.
        """
        return tile_settings(self.tile, self.tile_level, self.pixel_size, self.max_background)

    def with_reading(self, reading: Reading) -> DataSettings:
        """These settings with all that `reading` settles."""
        return replace(self, **vars(reading))


def check_validation(validation: float | None, streaming: bool) -> None:
    """Check how many images are to be held out.

    Raises:
        ValueError: for what is neither a share nor a number, and for a stream, of which none can be.
    """
    if validation is None:
        return
    if not 0 < validation < math.inf or (validation >= 1 and validation != round(validation)):
        raise ValueError(f"data.validation is {validation:g}: give a share below 1, as 0.02, or a number of images, as 500")
    if streaming:
        raise ValueError(
            "data.validation holds out images by their number, and those of a stream have none: leave out data.validation "
            "or data.streaming"
        )


@dataclass(frozen=True)
class OptimSettings(OptimizerSettings):
    """AdamW, its schedule, and gradient clipping. Learning rates are per 512 images of the global batch.

    Args:
        lr: peak learning rate; by default 1e-4 as published for tiny to giant. For nano and micro a peak of 4e-3 at a batch
            of 64 images that grows with the root of the batch: 3.2e-2 per 512 images at 64, 1.1e-2 at 512.
        schedule: cosine or multistep.
        warmup_epochs: by default 10, or a tenth of shorter runs.
        milestones: epochs at which multistep multiplies by gamma.
        gamma: factor of multistep.
    """

    warmup_lr: float = 5e-7
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", tuple(self.milestones))


@dataclass(frozen=True)
class ProbeSettings:
    """Accuracy of the features on a small labeled set, measured in the course of pre-training, which stays unaffected. Off
    unless data is given.

    Args:
        data: labeled images, as fine-tuning takes them.
        every_epochs: a measure every `every_epochs` epochs and at the end; by default ten in all.
        labels_per_class: training images per class; all by default.
        method: knn, or probe for logistic regression, which takes longer.
        k: neighbors that vote.
        max_images: largest number of training images and of test images, evenly over the classes.
        column: column of the images, in sources that have columns; found by default.
        label_column: column of the labels; found by default.
    """

    data: str | None = None
    every_epochs: float | None = None
    labels_per_class: int | None = None
    method: str = "knn"
    k: int = 20
    max_images: int = 2000
    column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        if self.method not in PROBE_METHODS:
            raise ValueError(f"unknown probe.method {self.method!r}{did_you_mean(self.method, PROBE_METHODS)}")
        for name in ("every_epochs", "labels_per_class", "k", "max_images"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"probe.{name} is {getattr(self, name)}: give a positive number")


PROBE_METHODS = ("knn", "probe")
POSITIVE = (
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "reconstruct_every_epochs",
    "activations_every_epochs",
    "validate_every_epochs",
)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(RunSettings):
    """One pre-training run. Only the images and the run folder have no default.

    Args:
        data: the images; in Python a path alone will do.
        init: encoder to start from, in any format that `simmim.load_encoder` reads; the weights of the method come along
            where the file has them. With none the encoder starts fresh.
        method: how the encoder learns.
        preset: size of a fresh encoder: pico, nano, micro, tiny, small, base, large, huge, giant-1b, giant-3b.
        image_size: pixels the crops are resized to, one number or height and width.
        image_sizes: in place of image_size sizes that follow one another in the run, the smallest first, as [96, 128, 192]:
            early steps on smaller images take less time. Windows and mask units follow the size, and the encoder that is
            exported is of the last one.
        image_size_shares: share of the run's steps at each of image_sizes; by default equal shares.
        model_by_size: what of the settings of model differs at each of image_sizes, as a list of mappings. By default mask
            unit and window are those of a run at that size, unless model gives them; what a list leaves out is as in model.
        epochs: passes over the images. By default as many as make 20 million crops, 100 to 800; on a CPU that would need
            longer than an hour, as many as fit into one.
        time: length of the run, as 1h, 90m or 1h30m, in place of epochs: it measures a few of its steps on this machine, and
            takes as many epochs as fit. On a single device.
        reconstruct_every_epochs: a picture of reconstructions every `reconstruct_every_epochs` epochs; by default twenty
            in all, fewer in a short run.
        save_every_steps: a checkpoint every `save_every_steps` steps; by default once per epoch, within 50 to 1000 steps.
        save_every_minutes: a checkpoint every `save_every_minutes` minutes as well.
        keep_checkpoints: number of the newest checkpoints that stay, beside the best.
        activations_every_epochs: a measure of every block's output every `activations_every_epochs` epochs; by default as
            often as pictures.
        validate_every_epochs: the loss of the images that data.validation holds out every `validate_every_epochs` epochs and
            at the end; by default fifty measures, or as many as take a fiftieth of the time.
        model: settings of the method, and changes to the preset's encoder.
        optim: optimizer and schedule.
        probe: accuracy of the features on a small labeled set, logged beside the loss.
    """

    may_change_on_resume: ClassVar[tuple[str, ...]] = ("probe",)

    data: DataSettings
    method: str = default_method()
    preset: str | None = None
    image_sizes: tuple[int | tuple[int, int], ...] | None = None
    image_size_shares: tuple[float, ...] | None = None
    model_by_size: tuple[dict[str, Any], ...] | None = None
    time: str | None = None
    reconstruct_every_epochs: float | None = None
    save_every_steps: int | None = None
    save_every_minutes: float = 15.0
    keep_checkpoints: int = 2
    activations_every_epochs: float | None = None
    validate_every_epochs: float | None = None
    model: MethodSettings | None = None
    optim: OptimSettings = OptimSettings()
    probe: ProbeSettings = ProbeSettings()

    def __post_init__(self) -> None:
        if isinstance(self.data, str | list):
            object.__setattr__(self, "data", DataSettings(self.data))
        own = method_named(self.method).settings_class
        if self.model is None or isinstance(self.model, dict):
            object.__setattr__(self, "model", own(**(self.model or {})))
        if not isinstance(self.model, own):
            raise ValueError(f"model is {type(self.model).__name__}: the method {self.method} takes {own.__name__}")
        for name, value in checked_sizes(self).items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        check_positive(self, POSITIVE)
        if self.validate_every_epochs and self.data.validation is None:
            raise ValueError("validate_every_epochs needs images to validate with: give data.validation")
        if self.init != "none" and self.preset:
            raise ValueError("preset describes a fresh encoder, and init brings its own: give one of them")

    def encoder_config(self) -> EncoderConfig:
        """The architecture, once resolved."""
        if self.preset is None:
            return registry.config_from_dict(self.model.encoder)
        return registry.preset_config(self.preset, **{"in_channels": self.data.channels, **self.model.encoder})

    def schedule(self) -> Schedule:
        """The learning rate's course, once resolved."""
        optim = self.optim
        return Schedule(
            optim.lr,
            self.epochs,
            optim.warmup_epochs,
            optim.warmup_lr,
            optim.schedule,
            optim.min_lr,
            optim.milestones,
            optim.gamma,
        )


def settings_class(method: str) -> type[PretrainSettings]:
    """`PretrainSettings` whose `model` has the settings of one method, as the command offers them.

    Raises:
        ValueError: for an unknown method, naming the nearest known one.
    """
    model = method_named(method).settings_class
    fields = [("method", str, field(default=method)), ("model", model, field(default=model()))]
    namespace = {"__doc__": PretrainSettings.__doc__}
    bases = (PretrainSettings,)
    return make_dataclass("PretrainSettings", fields, bases=bases, namespace=namespace, frozen=True, kw_only=True)
