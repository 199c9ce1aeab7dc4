"""HEIC: what pillow-heif reads of a file, or one line."""

import sys

import numpy as np
import pytest
from image_files import photo, psnr, record
from PIL import Image

from simmim.data import UNREADABLE, find_images, open_picture
from simmim.data.decode import count_images
from simmim.reading import AUTO

pillow_heif = pytest.importorskip("pillow_heif")


@pytest.mark.parametrize("channels", [1, 3])
def test_heic_files_are_read(tmp_path, channels):
    """As pillow-heif decodes them, near what was written; gray as gray."""
    pixels = photo(64, 96) if channels == 3 else photo(64, 96)[..., 0]
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=95)
    assert find_images(tmp_path) == [str(path)] and count_images(record(path), AUTO) == 1
    picture = open_picture(record(path), channels)
    view = picture.crop((0, 0, 96, 64), (64, 96))
    decoded = np.asarray(pillow_heif.open_heif(path)).reshape(64, 96, channels)
    np.testing.assert_array_equal(view.numpy(), np.moveaxis(decoded, -1, 0))
    assert psnr(view, np.moveaxis(pixels.reshape(64, 96, channels), -1, 0)) > 28
    with pytest.raises(UNREADABLE, match="more than the limit of 1000"):
        open_picture(record(path), channels, max_pixels=1000)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(Image.fromarray(photo(64, 96))).save(path)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UNREADABLE, match=r"^HEIC image: pip install 'simmim-toolkit\[heif\]', or convert it"):
        open_picture(record(path), 3)
