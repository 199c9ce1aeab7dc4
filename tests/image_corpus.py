"""Image files of every mode and format, each with the pixels that must be read from it."""

import numpy as np
from image_files import EXACT, array, by_range, flat_blocks, noise, oriented, over_white, saved, tiff
from PIL import Image

GRAY, RGB, ALPHA, INKS = noise(9, 13), noise(9, 13, 3, seed=1), noise(9, 13, seed=2), noise(9, 13, 4, seed=3)
BLOCKS, GRAY_BLOCKS = flat_blocks(3), flat_blocks(seed=4)
PALETTE, INDICES = noise(5, 3, seed=5), noise(9, 13, seed=6) % 5
DEEP, FLOATS = noise(9, 13, seed=7, kind=np.uint16) // 3 + 500, np.random.default_rng(8).normal(0, 3, (9, 13))
BANDS = noise(12, 14, 10, seed=9)


def palette_image():
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def lab_of(rgb):
    """CIE L*a*b* of sRGB values by the published formulas, white D50, as the bytes of mode LAB."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    xyz = (
        linear
        @ np.array(
            [
                [0.4360747, 0.3850649, 0.1430804],
                [0.2225045, 0.7168786, 0.0606169],
                [0.0139322, 0.0971045, 0.7141733],
            ]
        ).T
        / (0.96422, 1.0, 0.82521)
    )
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    lab = np.stack([(116 * y - 16) * 2.55, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab.round().astype(int).astype(np.uint8)  # a* and b* are signed bytes


def ycbcr_of(rgb):
    """JFIF's formulas."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 128 + 0.564334 * (blue - luma), 128 + 0.713267 * (red - luma)], -1).round().astype(np.uint8)


CMY = (255.0 - BLOCKS[..., :3]).astype(np.uint8)
CMYK_BLOCKS = np.dstack([CMY, GRAY_BLOCKS // 4])
CMYK_SHOWN = BLOCKS * (255.0 - (GRAY_BLOCKS // 4)[..., None]) / 255
HOLES = FLOATS.astype(np.float32)
HOLES[0, :3] = np.nan, np.inf, -np.inf
HOLES_SHOWN = by_range(HOLES, HOLES[np.isfinite(HOLES)].min(), HOLES[np.isfinite(HOLES)].max())
HOLES_SHOWN[0, :3] = 0, 255, 0
FRAMES = [Image.fromarray(flat_blocks(3, seed=seed)) for seed in (20, 21, 22)]
# File name: how to write it, channels asked for, what must be whole_pixels, within how many levels.
CORPUS = {
    "1.png": (saved(GRAY > 127), 1, (GRAY > 127) * 255, 0),
    "1.tif": (saved(GRAY > 127), 1, (GRAY > 127) * 255, 0),
    "1-group4.tif": (saved(GRAY > 127, compression="group4"), 3, (GRAY > 127) * 255, 0),
    "l.png": (saved(GRAY), 1, GRAY, 0),
    "l-as-color.png": (saved(GRAY), 3, GRAY, 0),
    "l.jpg": (saved(GRAY_BLOCKS, **EXACT), 1, GRAY_BLOCKS, 2),
    "l-as-color.jpg": (saved(GRAY_BLOCKS, **EXACT), 3, GRAY_BLOCKS, 2),
    "l.pgm": (saved(GRAY), 1, GRAY, 0),
    "l.bmp": (saved(GRAY), 1, GRAY, 0),
    "l.gif": (saved(GRAY), 3, GRAY, 0),
    "white-is-0.tif": (tiff(GRAY, photometric="miniswhite"), 1, 255 - GRAY, 0),
    "la.png": (saved(np.dstack([GRAY, ALPHA]), "LA"), 1, over_white(GRAY[..., None], ALPHA), 1.5),
    "la.tif": (saved(np.dstack([GRAY, ALPHA]), "LA"), 3, over_white(GRAY[..., None], ALPHA), 1.5),
    "la-premultiplied.tif": (
        tiff(np.dstack([np.minimum(GRAY, ALPHA), ALPHA]), photometric="minisblack", extrasamples=[1]),
        1,
        np.minimum(GRAY, ALPHA) + 255.0 - ALPHA,
        2,
    ),
    "p.png": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.tif": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.bmp": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p.gif": (saved(palette_image()), 3, PALETTE[INDICES], 0),
    "p-clear.png": (saved(palette_image(), transparency=2), 3, over_white(PALETTE[INDICES], (INDICES != 2) * 255), 0),
    "p-clear.gif": (saved(palette_image(), transparency=1), 3, over_white(PALETTE[INDICES], (INDICES != 1) * 255), 0),
    "p-alphas.png": (
        saved(palette_image(), transparency=bytes([0, 90, 255, 30, 128])),
        3,
        over_white(PALETTE[INDICES], np.array([0, 90, 255, 30, 128])[INDICES]),
        1,
    ),
    "rgb.png": (saved(RGB), 3, RGB, 0),
    "rgb-as-gray.png": (saved(RGB), 1, RGB @ (0.299, 0.587, 0.114), 1),
    "rgb.bmp": (saved(RGB), 3, RGB, 0),
    "rgb.ppm": (saved(RGB), 3, RGB, 0),
    "rgb.tif": (saved(RGB), 3, RGB, 0),
    "rgb-lzw.tif": (saved(RGB, compression="tiff_lzw"), 3, RGB, 0),
    "rgb-planes.tif": (tiff(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), 3, RGB, 0),
    "rgb-tiles.tif": (tiff(RGB, photometric="rgb", tile=(16, 16)), 3, RGB, 0),
    "rgb.webp": (saved(RGB, lossless=True), 3, RGB, 0),
    "rgb.jp2": (saved(RGB), 3, RGB, 0),
    "rgb.qoi": (saved(RGB), 3, RGB, 0),
    "rgb.sgi": (saved(RGB), 3, RGB, 0),
    "rgb.jpg": (saved(BLOCKS, **EXACT), 3, BLOCKS, 3),
    "rgb-as-gray.jpg": (saved(BLOCKS, **EXACT), 1, BLOCKS @ (0.299, 0.587, 0.114), 3),
    "progressive.jpg": (saved(BLOCKS, progressive=True, **EXACT), 3, BLOCKS, 3),
    "stored-as-rgb.jpg": (saved(BLOCKS, keep_rgb=True, **EXACT), 3, BLOCKS, 3),
    "phone.mpo": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:], **EXACT), 3, np.asarray(FRAMES[0]), 3),
    "rgb-clear.png": (
        saved(RGB, transparency=tuple(map(int, RGB[3, 4]))),
        3,
        np.where((RGB == RGB[3, 4]).all(-1, keepdims=True), 255, RGB),
        0,
    ),
    "l-clear.png": (saved(GRAY, transparency=int(GRAY[3, 4])), 1, np.where(GRAY == GRAY[3, 4], 255, GRAY), 0),
    "rgba.png": (saved(np.dstack([RGB, ALPHA])), 3, over_white(RGB, ALPHA), 1),
    "rgba.tif": (saved(np.dstack([RGB, ALPHA])), 3, over_white(RGB, ALPHA), 1),
    "rgba.webp": (saved(np.dstack([RGB, ALPHA]), lossless=True, exact=True), 3, over_white(RGB, ALPHA), 1),
    "rgba-premultiplied.tif": (
        tiff(np.dstack([np.minimum(RGB, ALPHA[..., None]), ALPHA]), photometric="rgb", extrasamples=[1]),
        3,
        np.minimum(RGB, ALPHA[..., None]) + 255.0 - ALPHA[..., None],
        2,
    ),
    "rgba-as-4.png": (saved(np.dstack([RGB, ALPHA])), 4, np.dstack([RGB, ALPHA]), 0),
    "rgbx.tif": (tiff(np.dstack([RGB, ALPHA]), photometric="rgb", extrasamples=[0]), 3, RGB, 0),
    "rgbx-as-4.tif": (
        tiff(np.dstack([RGB, ALPHA]), photometric="rgb", extrasamples=[0]),
        4,
        np.dstack([RGB, ALPHA]),
        0,
    ),
    "cmyk.tif": (saved(INKS, "CMYK"), 3, (255.0 - INKS[..., :3]) * (255.0 - INKS[..., 3:]) / 255, 1),
    "cmyk.jpg": (saved(CMYK_BLOCKS, "CMYK", quality=100), 3, CMYK_SHOWN, 4),
    "ycbcr.tif": (saved(ycbcr_of(BLOCKS), "YCbCr"), 3, BLOCKS, 2),
    "lab.tif": (saved(Image.frombytes("LAB", (48, 32), lab_of(BLOCKS).tobytes())), 3, BLOCKS, 8),  # coarse
    "16.png": (saved(DEEP), 1, by_range(DEEP), 0.51),
    "16.pgm": (saved(DEEP), 1, by_range(DEEP), 0.51),
    "16-little.tif": (tiff(DEEP, byteorder="<"), 1, by_range(DEEP), 0.51),
    "16-big.tif": (tiff(DEEP, byteorder=">"), 3, by_range(DEEP), 0.51),
    "16-white-is-0.tif": (tiff(DEEP, photometric="miniswhite"), 1, 255 - by_range(DEEP), 0.51),
    "16-signed.tif": (tiff((DEEP - 9000).astype(np.int16)), 1, by_range((DEEP - 9000).astype(np.int16)), 0.51),
    "16-clear.png": (
        saved(DEEP, transparency=int(DEEP.max())),
        1,
        np.where(DEEP == DEEP.max(), 255, by_range(DEEP, high=np.sort(DEEP.ravel())[-2])),
        0.51,
    ),
    "32.tif": (saved(DEEP.astype(np.int32) * 70_000 - 10**9), 1, by_range(DEEP), 0.51),
    "32-unsigned.tif": (tiff(DEEP.astype(np.uint32) * 60_000), 1, by_range(DEEP), 0.51),
    "float.tif": (saved(FLOATS.astype(np.float32)), 1, by_range(FLOATS), 0.51),
    "float-big.tif": (tiff(FLOATS.astype(np.float32), byteorder=">"), 1, by_range(FLOATS), 0.51),
    "float64.tif": (tiff(FLOATS), 3, by_range(FLOATS), 0.51),
    "float.pfm": (saved(FLOATS.astype(np.float32)), 1, by_range(FLOATS), 0.51),
    "float-holes.tif": (saved(HOLES), 1, HOLES_SHOWN, 0.51),
    "float-rgb.tif": (tiff(np.float32(RGB) / 7 - 3, photometric="rgb"), 3, by_range(RGB), 0.51),
    "flat-16.png": (saved(np.full((5, 6), 777, np.uint16)), 1, np.zeros((5, 6)), 0),
    "animation.gif": (
        saved(palette_image(), save_all=True, append_images=[Image.new("P", (13, 9))]),
        3,
        PALETTE[INDICES],
        0,
    ),
    "animation.png": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), 3, np.asarray(FRAMES[0]), 0),
    "animation.webp": (
        saved(FRAMES[0], save_all=True, append_images=FRAMES[1:], lossless=True),
        3,
        np.asarray(FRAMES[0]),
        0,
    ),
    "pages.tif": (saved(FRAMES[0], save_all=True, append_images=FRAMES[1:]), 3, np.asarray(FRAMES[0]), 0),
    "png-called.jpg": (lambda path: Image.fromarray(RGB).save(path, "PNG"), 3, RGB, 0),
    "jpeg-called.png": (lambda path: Image.fromarray(BLOCKS).save(path, "JPEG", **EXACT), 3, BLOCKS, 3),
    "no-extension": (lambda path: Image.fromarray(RGB).save(path, "BMP"), 3, RGB, 0),
    "array-called.jpg": (array(RGB), 3, RGB, 0),
    "one-pixel.png": (saved(RGB[:1, :1]), 3, RGB[:1, :1], 0),
    "gray.npy": (array(GRAY), 1, GRAY, 0),
    "gray-as-color.npy": (array(GRAY), 3, GRAY, 0),
    "color.npy": (array(RGB), 3, RGB, 0),
    "color-first.npy": (array(RGB.transpose(2, 0, 1)), 3, RGB, 0),
    "color-as-gray.npy": (array(RGB), 1, RGB @ (0.299, 0.587, 0.114), 1),
    "bands.npy": (array(BANDS), 10, BANDS, 0),
    "bands-first.npy": (array(BANDS.transpose(2, 0, 1)), 10, BANDS, 0),
    "bands-fortran.npy": (array(np.asfortranarray(BANDS)), 10, BANDS, 0),
    "bands-16.npy": (array(BANDS * np.uint16(100) + np.uint16(7)), 10, by_range(BANDS), 0.51),
    "bands-64.npy": (array(BANDS.astype(np.int64) * -(10**15)), 10, by_range(-1.0 * BANDS), 0.51),
    "bands-float.npy": (array(BANDS / 9.0 - 4), 10, by_range(BANDS), 0.51),
    "bands-huge.npy": (array((BANDS / 127.5 - 1) * 1.7e308), 10, by_range(BANDS), 0.51),
    "bands-half.npy": (array(BANDS.astype(np.float16)), 10, by_range(BANDS), 0.51),
    "bands-bool.npy": (array(BANDS > 99), 10, (BANDS > 99) * 255, 0),
    "bands-nan.npy": (array(np.dstack([HOLES, HOLES])), 2, np.dstack([HOLES_SHOWN, HOLES_SHOWN]), 0.51),
    "all-nan.npy": (array(np.full((4, 5), np.nan)), 1, np.zeros((4, 5)), 0),
    "big-endian.npy": (array(DEEP.astype(">u2")), 1, by_range(DEEP), 0.51),
    "2.tif": (tiff(BANDS[..., :2], photometric="minisblack", planarconfig="contig"), 2, BANDS[..., :2], 0),
    "5.tif": (tiff(BANDS[..., :5], photometric="rgb", planarconfig="contig"), 5, BANDS[..., :5], 0),
    "10.tif": (tiff(BANDS, photometric="minisblack", planarconfig="contig", compression="zlib"), 10, BANDS, 0),
    "10-planes.tif": (
        tiff(BANDS.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate"),
        10,
        BANDS,
        0,
    ),
    "10-deep.tif": (
        tiff(BANDS * np.uint16(9), photometric="minisblack", planarconfig="contig", tile=(16, 16)),
        10,
        by_range(BANDS),
        0.51,
    ),
    "10-turned.tif": (
        tiff(BANDS, photometric="minisblack", planarconfig="contig", extratags=[(274, 3, 1, 6, True)]),
        10,
        np.rot90(BANDS, -1),
        0,
    ),
    **{f"turned-{number}.jpg": (oriented(BLOCKS, number, **EXACT), 3, BLOCKS, 3) for number in range(1, 9)},
    **{f"turned-{number}.png": (oriented(RGB, number), 3, RGB, 0) for number in range(1, 9)},
    "turned-6.tif": (oriented(RGB, 6), 3, RGB, 0),
    "turned-7.webp": (oriented(RGB, 7, lossless=True), 3, RGB, 0),
}
