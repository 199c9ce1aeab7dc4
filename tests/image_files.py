"""Writing image files for tests, and reading them back."""

import gzip
import io
import struct
import warnings

import numpy as np
import torch
from PIL import Image

from simmim.data import read_image
from simmim.messages import Notice

EXACT = {"quality": 100, "subsampling": 0}  # JPEG's least loss


def noise(*shape, seed=0, kind=np.uint8):
    """Random numbers over the whole range of a type."""
    return np.random.default_rng(seed).integers(0, np.iinfo(kind).max + 1, shape, dtype=kind)


def flat_blocks(*channels, seed=0):
    """32 × 48 pixels in flat squares of 16 px, which lossy formats keep within a few levels."""
    return np.random.default_rng(seed).integers(30, 226, (2, 3, *channels), dtype=np.uint8).repeat(16, 0).repeat(16, 1)


def over_white(values, alpha):
    """Colors laid over white, as floats."""
    alpha = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return values * alpha + 255 * (1 - alpha)


def by_range(values, low=None, high=None):
    """Values scaled from their range, or the given one, to 0 to 255, as floats."""
    values = np.asarray(values, dtype=np.float64)
    low, high = values.min() if low is None else low, values.max() if high is None else high
    return (values - low) / (high - low) * 255


def saved(pixels, mode=None, **options):
    """A function that writes to a path by Pillow. It writes copies: some formats leave their settings in the image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    more = [frame.copy() for frame in options.pop("append_images", ())]
    return lambda path: image.copy().save(path, **options, **({"append_images": more} if more else {}))


def tiff(pixels, **options):
    """A function that writes to a path by tifffile."""

    def write(path):
        import tifffile

        tifffile.imwrite(path, pixels, **options)

    return write


def array(values):
    """A function that writes an array to a path."""

    def write(path):
        with open(path, "wb") as file:
            np.save(file, values)

    return write


def oriented(upright, number, **options):
    """A function that writes a picture stored in an EXIF orientation, tagged with it."""
    exif = Image.Exif()
    exif[0x0112] = number
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[number]
    return saved(np.ascontiguousarray(stored), exif=exif, **options)


def record(path):
    """The record of a file on disk."""
    return {"path": str(path), "bytes": None}


def whole_pixels(picture):
    """All pixels of a picture, (height, width, channels)."""
    whole = picture.crop((0, 0, *picture.size[::-1]), picture.size)
    assert whole.shape == (picture.channels, *picture.size)
    assert whole.dtype == torch.uint8 and whole.is_contiguous()
    return whole.permute(1, 2, 0).numpy()


def photo(height, width, seed=0):
    """Noise with a photograph's spectrum, 1/f, and hard edges."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))
    phases = [np.exp(2j * np.pi * chance.random(amplitude.shape)) for _ in range(4)]
    layers = [np.fft.irfft2(amplitude * phase, (height, width)) for phase in phases]
    layers = [layer / layer.std() for layer in layers]
    pixels = np.stack([0.9 * layers[3] + 0.3 * layer for layer in layers[:3]], axis=-1)
    for _ in range(20):
        top, left = chance.integers(0, height), chance.integers(0, width)
        pixels[top : top + height // 5, left : left + width // 5] += chance.normal(0, 0.7, 3)
    return np.clip(128 + 50 * pixels, 0, 255).astype(np.uint8)


def jpeg_bytes(pixels, **options):
    """A JPEG file in memory."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def psnr(view, expected):
    """Peak signal-to-noise ratio in dB."""
    return 10 * np.log10(255**2 / max(np.mean((view.double().numpy() - expected.astype(np.float64)) ** 2), 1e-9))


def write_images(folder, count, size=(32, 32), first=0):
    """Write PNG files of noise, numbered from `first`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first + number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(noise(*size, 3, seed=first + number)).save(path)
    return [str(path) for path in paths]


def write_empty(*paths):
    """Write empty files and the folders they are in."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def pixels_of(path, channels=3):
    """All pixels of a file as `read_image` gives them."""
    return np.asarray(read_image(record(path), channels))


def broken_files(folder):
    """Write files that cannot be read as images, and a folder, and return their paths."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(noise(64, 64, 3)).save(folder / "whole.png")
    Image.fromarray(noise(64, 64, 3)).save(folder / "whole.jpg")
    for kind in ("png", "jpg"):
        whole = folder / f"whole.{kind}"
        (folder / f"cut.{kind}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        whole.unlink()
    (folder / "text.png").write_text("not a picture, whatever its name says")
    (folder / "empty.jpg").touch()
    (folder / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "folder.png").mkdir()
    return sorted(str(path) for path in folder.iterdir())


def notices(read, *arguments):
    """What `read` returns, and the notices that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        result = read(*arguments)
    return result, [str(warning.message) for warning in caught if warning.category is Notice]


def write_idx_files(folder, parts):
    """The four files of Fashion-MNIST.

    Args:
        parts: images, (count, 28, 28) uint8, and labels, (count,) uint8, by the name of the part, train and t10k.
    """
    folder.mkdir()
    for name, (images, labels) in parts.items():
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
