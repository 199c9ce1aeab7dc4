"""Writing whole slides in DICOM for tests: levels, in tiles that are frames, and what scanners write beside them."""

import io

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"


def tiles_of(pixels, tile_px):
    """(top, left, tile) row by row, filled up with 0."""
    height, width = pixels.shape[:2]
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            part = pixels[top : top + tile_px, left : left + tile_px]
            rest = [(0, tile_px - part.shape[0]), (0, tile_px - part.shape[1])]
            yield top, left, np.pad(part, rest + [(0, 0)] * (pixels.ndim - 2))


def write_dicom_slide(path, paths, tile_px=16, jpeg=False, missing=None, offsets=True, mm_per_px=0.0005, **changes):
    """Write a slide.

    Args:
        paths: of each optical path (height, width, 3) uint8, or (height, width) uint16.
        jpeg: compress tiles.
        missing: tiles by number that are left out, for a file that names the place of each; None for one with all tiles.
        offsets: whether a compressed file tells where its tiles lie.
        changes: of elements.
    """
    first = paths[0]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SLIDE_CLASS
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = generate_uid(), generate_uid()
    dataset.Modality, dataset.ImageType = "SM", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.TotalPixelMatrixRows, dataset.TotalPixelMatrixColumns = first.shape[:2]
    dataset.TotalPixelMatrixFocalPlanes, dataset.NumberOfOpticalPaths = 1, len(paths)
    dataset.Rows = dataset.Columns = tile_px
    dataset.SamplesPerPixel = 3 if first.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if first.ndim == 3 else "MONOCHROME2"
    if first.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * first.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    measures, groups = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mm_per_px, mm_per_px], 0.001
    groups.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [groups]
    frames, places = [], []
    for pixels in paths:
        for number, (top, left, tile) in enumerate(tiles_of(pixels, tile_px)):
            if number not in (missing or ()):
                frames.append(tile)
                places.append((top, left))
    dataset.DimensionOrganizationType = "TILED_FULL" if missing is None else "TILED_SPARSE"
    if missing is not None:
        dataset.PerFrameFunctionalGroupsSequence = [place_of(top, left) for top, left in places]
    dataset.NumberOfFrames = len(frames)
    for name, value in changes.items():
        setattr(dataset, name, value)
    if jpeg:
        dataset.LossyImageCompression = "01"
        dataset.PixelData = encapsulate([as_jpeg(tile) for tile in frames], has_bot=offsets)
        dataset["PixelData"].VR = "OB"
    else:
        dataset.PixelData = np.stack(frames).tobytes()
        dataset["PixelData"].VR = "OB" if first.dtype == np.uint8 else "OW"
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def write_dicom_series(folder, pixels, reductions=(1, 2, 4), beside=("LABEL", "OVERVIEW", "THUMBNAIL"), **changes):
    """Write the files of a slide: 1.dcm, 2.dcm, … of its levels, named by how much each is reduced, and label.dcm, ….

    Args:
        pixels: of the finest level.
        beside: kinds of further pictures.
        changes: as of `write_dicom_slide`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"SeriesInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid(), **changes}
    for step in reductions:
        kind = ["ORIGINAL" if step == 1 else "DERIVED", "PRIMARY", "VOLUME", "NONE" if step == 1 else "RESAMPLED"]
        level = np.ascontiguousarray(pixels[::step, ::step])
        write_dicom_slide(folder / f"{step}.dcm", [level], mm_per_px=0.0005 * step, ImageType=kind, **whole)
    for name in beside:
        kind = ["DERIVED" if name == "THUMBNAIL" else "ORIGINAL", "PRIMARY", name, "NONE"]
        if name == "THUMBNAIL":
            kind[-1] = "RESAMPLED"
        write_dicom_slide(folder / f"{name.lower()}.dcm", [pixels[:16, :16]], ImageType=kind, **whole)
    return folder


def place_of(top, left):
    position, group = Dataset(), Dataset()
    position.RowPositionInTotalImagePixelMatrix, position.ColumnPositionInTotalImagePixelMatrix = top + 1, left + 1
    group.PlanePositionSlideSequence = [position]
    return group


def as_jpeg(tile):
    """Without a change of colors, as the file says RGB."""
    file = io.BytesIO()
    Image.fromarray(tile).save(file, "JPEG", quality=95, subsampling=0, keep_rgb=True)
    return file.getvalue()
