"""The training images of a run as samples: indexed, by tiles or streamed, of one size or of growing ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simmim.data import GrowingSamples, GrowingStream, ImageSamples, RandomView, StreamedSamples
from simmim.data.tiles import TiledSamples
from simmim.pretrain.image_sizes import at_sizes, first_steps
from simmim.pretrain.settings import PretrainSettings

if TYPE_CHECKING:
    from simmim.pretrain.preparation import Resolved


def training_samples(resolved: Resolved, num_steps: int) -> ImageSamples | StreamedSamples | GrowingSamples:
    """The images in their endless order, cropped and flipped as the settings ask.

    Args:
        num_steps: of the run, among which growing sizes are divided.
    """
    settings, source, data = resolved.settings, resolved.source, resolved.settings.data
    parts = at_sizes(settings)
    first_batches = [step * settings.optim.accumulate for step in first_steps(settings, num_steps)]
    if not source.streaming:
        samples = [samples_at(resolved, part) for part in parts]
        return samples[0] if len(parts) == 1 else GrowingSamples(samples, first_batches)
    options = (data.channels, settings.seed, data.shuffle_buffer, data.max_pixels, data.reading)
    if len(parts) == 1:
        view, *further = random_views(settings)
        return StreamedSamples(source.images, view, *options, further)
    views = [random_views(part) for part in parts]
    at_once = settings.batch_size // settings.optim.accumulate
    return GrowingStream(source.images, views, first_batches, at_once, *options)


def samples_at(resolved: Resolved, settings: PretrainSettings) -> ImageSamples:
    """Samples of indexed images or tiles, of the one size of `settings`."""
    source, data = resolved.source, settings.data
    view, *further = random_views(settings)
    options = (view, data.channels, settings.seed)
    if resolved.tiles is not None:
        return TiledSamples(source.images, resolved.tiles, *options, data.max_pixels, data.reading, further)
    keep = resolved.keep_decoded
    return ImageSamples(source.images, *options, keep, data.max_pixels, data.reading, further, resolved.kept)


def random_views(settings: PretrainSettings) -> list[RandomView]:
    """The random views of an image, first the one that the encoder learns from."""
    data, size = settings.data, settings.size
    sizes = (size, *settings.model.further_views(size, settings.encoder_config()))
    return [RandomView(size, data.crop_scale, data.crop_ratio, data.flip, data.turns) for size in sizes]
