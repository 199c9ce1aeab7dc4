"""The picture of activations: amplitudes from block to block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

FIRST_COLOR, LATEST_COLOR, GRID_COLOR = (150, 150, 150), (31, 90, 180), (225, 225, 225)
PLOT_PX, MARGIN_PX = (900, 480), (70, 34, 20, 54)  # width, height; left, top, right, bottom


def activation_plot(measures: Sequence[Mapping]) -> Image.Image:
    """Amplitudes from block to block on a logarithmic scale, the first measure in gray, the last one in blue; root mean
    squares as thick lines with points, maxima as thin lines.

    Args:
        measures: `{"step": …, "rms": {name: value}, "max": {name: value}}` each. Names are those of
            `Encoder.named_stages`; parts other than blocks are vertical lines. Values without a logarithm are left out.
    """
    names = list(measures[-1]["rms"])
    values = [value for measure in measures for kind in ("rms", "max") for value in measure[kind].values()]
    logs = [math.log10(value) for value in values if 0 < value < math.inf] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    left, top, right, bottom = MARGIN_PX
    width, height = PLOT_PX[0] - left - right, PLOT_PX[1] - top - bottom
    # At most a dozen lines, whatever number of decades a diverging run spans.
    decades = range(low, high + 1, max(1, (high - low) // 12))

    def place(index: int, value: float) -> tuple[float, float]:
        across = index / max(len(names) - 1, 1)
        return left + across * width, top + (high - math.log10(value)) / (high - low) * height

    picture = Image.new("RGB", PLOT_PX, "white")
    draw = ImageDraw.Draw(picture)
    for decade in decades:
        y = place(0, 10.0**decade)[1]
        draw.line([(left, y), (left + width, y)], fill=GRID_COLOR)
        draw.text((left - 8, y), f"1e{decade}", fill="black", anchor="rm", font_size=13)
    every = max(1, len(names) // 16)
    for index, name in enumerate(names):
        x = place(index, 1.0)[0]
        stage, _, part = name.partition(".")
        number = part.removeprefix("block")
        if not number.isdecimal():  # between two stages
            draw.line([(x, top), (x, top + height)], fill=GRID_COLOR, width=2)
            continue
        if int(number) == 0:
            draw.text((x, top + height + 22), stage, fill="black", anchor="ma", font_size=13)
        if int(number) % every == 0:
            draw.text((x, top + height + 6), number, fill="black", anchor="ma", font_size=13)
    for measure, color in zip((measures[0], measures[-1]), (FIRST_COLOR, LATEST_COLOR)):
        for kind, thickness in (("max", 1), ("rms", 3)):
            shown = [(index, measure[kind].get(name, 0.0)) for index, name in enumerate(names)]
            points = [place(index, value) if 0 < value < math.inf else None for index, value in shown]
            for start, end in itertools.pairwise(points):
                if start and end:
                    draw.line([start, end], fill=color, width=thickness)
            for x, y in filter(None, points if kind == "rms" else ()):
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=color)
    texts = ((f"step {measures[0]['step']:,}", FIRST_COLOR), (f"step {measures[-1]['step']:,}", LATEST_COLOR))
    draw.text((left, 8), "activations after each block: root mean square (points), maximum (thin)", "black", font_size=13)
    for number, (text, color) in enumerate(texts):
        draw.text((PLOT_PX[0] - right - 130 * (1 - number), 8), text, fill=color, anchor="ra", font_size=13)
    return picture
