"""Writing whole slides for tests: MIRAX (.mrxs beside a folder), Hamamatsu (.vms beside JPEG files) and Aperio (.svs)."""

import io
import struct

import numpy as np
from PIL import Image

TILE_PX = 16


def jpeg_of(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0, **options)
    return file.getvalue()


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def write_mirax(path, pixels, missing=(), fill=(250, 245, 240), um_per_px=0.25):
    """A slide of two levels in JPEG tiles, the coarser of one tile in four; (row, column) of `missing` tiles of 2 × 2 were
    not scanned. Gives the values of each level, (height, width, 3), with `fill` where nothing was scanned."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    path.write_bytes(jpeg_of(pixels[:8, :8]))
    rows, columns = pixels.shape[0] // TILE_PX, pixels.shape[1] // TILE_PX
    data, levels, pages = bytearray(b"head"), [], []
    for level in (0, 1):
        step = 2**level
        source = pixels[::step, ::step]
        seen = np.broadcast_to(np.array(fill, np.uint8), source.shape).copy()
        entries = []
        for row in range(0, rows, step):
            for column in range(0, columns, step):
                if (row // 2, column // 2) in missing:
                    continue
                top, left = row * TILE_PX // step, column * TILE_PX // step
                tile = jpeg_of(source[top : top + TILE_PX, left : left + TILE_PX])
                seen[top : top + TILE_PX, left : left + TILE_PX] = decoded(tile)
                entries.append((row * columns + column, len(data), len(tile), 0))
                data += tile
        levels.append(seen)
        pages.append(entries)
    (folder / "Data0000.dat").write_bytes(data)
    slide_id = "0123456789ABCDEF"
    root = 5 + len(slide_id) + 8
    heads, blob = [], b""
    place = root + 4 * len(pages)
    for entries in pages:
        heads.append(place)
        page = struct.pack("<2i", len(entries), 0) + b"".join(struct.pack("<4i", *entry) for entry in entries)
        listed = struct.pack("<2i", 0, place + 8) + page
        blob += listed
        place += len(listed)
    index = b"01.02" + slide_id.encode() + struct.pack("<2i", root, 0) + struct.pack(f"<{len(heads)}i", *heads) + blob
    (folder / "Index.dat").write_bytes(index)
    blue_green_red = fill[2] << 16 | fill[1] << 8 | fill[0]
    lines = [
        "[GENERAL]", "SLIDE_VERSION=01.02", f"SLIDE_ID={slide_id}", f"IMAGENUMBER_X={columns}", f"IMAGENUMBER_Y={rows}",
        "OBJECTIVE_MAGNIFICATION=20", "CameraImageDivisionsPerSide=1",
        "[HIERARCHICAL]", "INDEXFILE=Index.dat", "HIER_COUNT=1",
        "HIER_0_NAME=Slide zoom level", "HIER_0_COUNT=2", "HIER_0_VAL_0_SECTION=LEVEL_0", "HIER_0_VAL_1_SECTION=LEVEL_1",
        "NONHIER_COUNT=0", "[DATAFILE]", "FILE_COUNT=1", "FILE_0=Data0000.dat",
    ]  # fmt: skip
    for level in (0, 1):
        um = um_per_px * 2**level
        lines += [
            f"[LEVEL_{level}]", "OVERLAP_X=0", "OVERLAP_Y=0", f"MICROMETER_PER_PIXEL_X={um}", f"MICROMETER_PER_PIXEL_Y={um}",
            f"IMAGE_FILL_COLOR_BGR={blue_green_red}", f"DIGITIZER_WIDTH={TILE_PX}", f"DIGITIZER_HEIGHT={TILE_PX}",
            "IMAGE_FORMAT=JPEG", f"IMAGE_CONCAT_FACTOR={level}",
        ]  # fmt: skip
    (folder / "Slidedat.ini").write_text("\n".join(lines) + "\n")
    return levels


def write_vms(path, pixels, um_per_px=0.5):
    """A slide of one JPEG file with restart markers, an overview and a map."""
    stem = path.with_suffix("")
    names = {"ImageFile": f"{stem.name}.jpg", "MapFile": f"{stem.name}_map2.jpg", "MacroImage": f"{stem.name}_macro.jpg"}
    image = jpeg_of(pixels, restart_marker_blocks=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / names["ImageFile"]).write_bytes(image)
    (path.parent / names["MapFile"]).write_bytes(jpeg_of(np.ascontiguousarray(pixels[::4, ::4]), restart_marker_blocks=2))
    (path.parent / names["MacroImage"]).write_bytes(jpeg_of(pixels[:16, :16]))
    height, width = pixels.shape[:2]
    described = {
        "NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, **names, "OptimisationFile": f"{stem.name}.opt",
        "PhysicalWidth": round(width * um_per_px * 1000), "PhysicalHeight": round(height * um_per_px * 1000),
        "SourceLens": 20,
    }  # fmt: skip
    (path.parent / f"{stem.name}.opt").write_bytes(bytes(8))
    lines = ["[Virtual Microscope Specimen]", *(f"{name}={value}" for name, value in described.items())]
    path.write_text("\r\n".join(lines) + "\r\n")
    return decoded(image)
