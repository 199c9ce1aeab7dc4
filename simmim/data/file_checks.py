"""What of a file is refused before it is decoded."""

from __future__ import annotations

from simmim.data.orientation import Size
from simmim.messages import counted

BY_TILES = ": read it by tiles (data.tile)"  # formats of which parts can be read


def pick_image(images: list[tuple[int, ...]], page: int | None) -> tuple[int, ...]:
    """The pages of one of a file's images.

    Raises:
        ValueError: when the file holds several and none is asked for, or fewer than that.
    """
    if page is None and len(images) > 1:
        raise ValueError(
            f"holds {counted(len(images), 'image')}, and a source that is read in order does not divide files: give "
            "data.pages channels or first"
        )
    if (page or 0) >= len(images):
        raise ValueError(f"holds {counted(len(images), 'image')}, and has no page {page}")
    return images[page or 0]


def check_size(size: Size, max_pixels: int, remedy: str = "") -> None:
    """Refuse an image without pixels, or with too many.

    Args:
        remedy: what else to do, for the message.

    Raises:
        ValueError: with its size.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height}x{width} pixels (height x width)")
    if height * width > max_pixels:
        pixels = f"{height}x{width} = {height * width} pixels (height x width)"
        raise ValueError(f"{pixels}, more than the limit of {max_pixels}{remedy}")
