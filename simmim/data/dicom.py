"""DICOM files through pydicom: a frame is an image, or a tile of a slide, in the units that slope and intercept give."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from simmim.data.deep import StoredValues
from simmim.data.dicom_series import shows_beside
from simmim.data.dicom_slides import DicomSlide, is_slide, slide_size
from simmim.data.file_checks import BY_TILES, check_size, pick_image
from simmim.data.file_formats import MICROSCOPY, SLIDE, FileFormat
from simmim.data.pillow_guard import silence_logger
from simmim.data.records import Record
from simmim.data.windows import WindowedImage
from simmim.reading import Reading

PREAMBLE_BYTES, MAGIC = 128, b"DICM"


class DicomFormat(FileFormat):
    """DICOM files of the standard's form, with a preamble.

    Slope and intercept (or the modality's table) are applied, inverted gray is turned, palettes and YBR become RGB. Pixels
    of the padding value are no data.
    """

    name = "DICOM"

    def detect(self, head: bytes) -> bool:
        return head[PREAMBLE_BYTES : PREAMBLE_BYTES + len(MAGIC)] == MAGIC

    def read(self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int) -> StoredValues:
        dataset = read_dataset(stream, pixels=False)
        if reads_slide(dataset, reading.pages):
            height, width = slide_size(dataset)
            check_size((height, width), max_pixels, BY_TILES)
            return DicomSlide(stream, dataset, finish_frame).read(0, (0, 0, width, height))
        dataset = read_dataset(stream)
        if "Rows" not in dataset or "Columns" not in dataset:
            raise ValueError("a DICOM file without a picture")
        check_size((int(dataset.Rows), int(dataset.Columns)), max_pixels)
        frames = pick_image(divide_frames(dataset, reading.pages), page)
        planes = [read_frame(dataset, frame) for frame in frames]
        return StoredValues(planes[0] if len(planes) == 1 else np.concatenate(planes))

    def count(self, stream: BinaryIO, reading: Reading) -> int:
        dataset = read_dataset(stream, pixels=False)
        return 1 if reads_slide(dataset, reading.pages) else len(divide_frames(dataset, reading.pages))

    def kind_without_up(self, stream: BinaryIO) -> str | None:
        modality = read_dataset(stream, pixels=False).get("Modality")
        return {"SM": SLIDE, "GM": MICROSCOPY}.get(modality)  # slide and general microscopy

    def open_windows(
        self, stream: BinaryIO, record: Record, reading: Reading, page: int | None, max_pixels: int
    ) -> WindowedImage:
        try:
            dataset = read_dataset(stream, pixels=False)
            if reads_slide(dataset, reading.pages):
                return DicomSlide(stream, dataset, finish_frame)
        except BaseException:
            stream.close()
            raise
        return super().open_windows(stream, record, reading, page, max_pixels)


def reads_slide(dataset: Any, pages: str | None) -> bool:
    """Whether a file is read as the slide whose tiles its frames are."""
    return is_slide(dataset) and pages in (None, "first")


def read_dataset(stream: BinaryIO, pixels: bool = True) -> Any:
    """A `pydicom.Dataset`.

    Args:
        pixels: read them too.

    Raises:
        ValueError: where pydicom is not installed; for what a slide's files show beside the specimen, as it may be a label.
    """
    try:
        import pydicom
    except ImportError:
        raise ValueError("a DICOM file: pip install 'simmim-toolkit[dicom]'") from None
    silence_logger("pydicom")
    stream.seek(0)
    dataset = pydicom.dcmread(stream, stop_before_pixels=not pixels)
    if beside := shows_beside(dataset):
        told = {
            "ImageType": "\\".join(dataset.get("ImageType") or ()),
            "SpecimenLabelInImage": dataset.get("SpecimenLabelInImage"),
        }
        facts = ", ".join(f"{name} {value}" for name, value in told.items() if value)
        raise ValueError(f"the {beside} of a DICOM slide, which is never read ({facts}): give the files of slides")
    return dataset


def divide_frames(dataset: Any, pages: str | None) -> list[tuple[int, ...]]:
    """For each image of a file, the numbers of the frames that are its channels; each frame is an image by default."""
    count = int(dataset.get("NumberOfFrames") or 1)
    if pages == "first":
        return [(0,)]
    return [tuple(range(count))] if pages == "channels" else [(frame,) for frame in range(count)]


def read_frame(dataset: Any, frame: int) -> np.ndarray:
    """A frame as (channels, height, width): as stored, or float32 where slope, intercept or padding change it.

    Raises:
        Exception: of pydicom, for files without pixels and compressions that nothing installed decodes.
    """
    from pydicom.pixels import pixel_array

    return finish_frame(dataset, pixel_array(dataset, index=frame))


def finish_frame(dataset: Any, values: np.ndarray) -> np.ndarray:
    """A frame as pydicom decodes it, (height, width) or (height, width, 3), as of `read_frame`."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    if values.ndim == 3:
        return np.moveaxis(values, -1, 0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return np.moveaxis(apply_color_lut(values, dataset), -1, 0)
    missing = padding(dataset, values)
    units = apply_modality_lut(values, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        # White is the smallest value: turned about the middle of what can be stored, in its units.
        low, high = apply_modality_lut(np.array(stored_range(dataset, values.dtype), values.dtype), dataset)
        units = (low + high - units.astype(np.float64)) if units.dtype.kind == "f" else low + high - units
    if missing is not None and missing.any():
        units = np.where(missing, np.nan, units)
    return units[None].astype(np.float32) if units.dtype.kind == "f" else units[None].astype(values.dtype)


def stored_range(dataset: Any, dtype: np.dtype) -> tuple[int, int]:
    """The smallest and largest value that a frame can store."""
    bits = int(dataset.get("BitsStored") or 8 * dtype.itemsize)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)


def padding(dataset: Any, values: np.ndarray) -> np.ndarray | None:
    """Where stored values mean that there is no data; None where the file names no such value."""
    low = dataset.get("PixelPaddingValue")
    if low is None:
        return None
    high = dataset.get("PixelPaddingRangeLimit", low)
    return (values >= min(low, high)) & (values <= max(low, high))
