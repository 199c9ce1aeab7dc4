"""The report of `simmim check-data`, as text and as JSON."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

from simmim.messages import counted

if TYPE_CHECKING:
    from simmim.data.check import CheckReport, Suggestion

MAX_LINES = 20  # of a list of files
BAR_WIDTH = 40
BLOCKS = " ▁▂▃▄▅▆▇█"
SATURATED = 0.05  # share of a channel's values in the last part of its range


def render(report: CheckReport) -> str:
    """The report for a terminal."""
    num_unreadable = len(report.unreadable)
    lines = [
        f"{report.path}: {counted(report.images, 'image')}, {size_text(report.mib)}, "
        f"{f'{num_unreadable:,} unreadable' if num_unreadable else 'all readable'}"
    ]
    if report.problem:
        lines += ["", f"problem      {report.problem}"]
    if num_unreadable:
        lines += ["", f"unreadable   {share(num_unreadable, report.images)}{unreadable_text(num_unreadable, report.images)}"]
        lines += [f"  {printable(path)}: {printable(reason)}" for path, reason in report.unreadable[:MAX_LINES]]
        if num_unreadable > MAX_LINES:
            lines.append(f"  … and {num_unreadable - MAX_LINES:,} more: --json lists all")
    if report.suggestion is None:
        return "\n".join([*lines, *pages_text(report)])
    tags = f"{report.oriented:,} tagged by EXIF, turned upright" if report.oriented else "no tags"
    lines += [
        "",
        f"formats      {counts_text(report.formats)}",
        f"modes        {counts_text(report.modes)}"
        + (f"; a model sees {counted(report.channels, 'channel')}" if report.channels else ""),
        *([f"channels     {report.channel_hint.describe('--channel-files')}"] if report.channel_hint else []),
        f"orientation  {tags}",
        *turns_text(report),
        *values_text(report),
        *tiles_text(report),
        "",
        f"shorter side{' of tiles' if report.tiles else ''}, median {report.short_side_px:,} px",
        *bars(report.short_sides_px),
        "",
        *duplicates_text(report),
        "",
        *loading_text(report),
        *kept_text(report),
    ]
    if report.problem is None:  # with one pre-training refuses the images
        lines += ["", f"suggested    {scales_text(report.suggestion)}", f"  {printable(suggested_command(report))}"]
    return "\n".join(lines)


def unreadable_text(count: int, images: int) -> str:
    """What training does about images that cannot be read: it goes on without them, or stops as they are too many."""
    from simmim.pretrain.settings import DataSettings

    most = DataSettings.max_skipped_share
    if count <= most * images:
        return f"; training replaces {'it by another image' if count == 1 else 'them by other images'}"
    needed = math.ceil(100 * count / images) / 100
    return (
        f", more than the {most:.0%} at which training stops: mend or remove "
        f"{'it' if count == 1 else 'them'}, or allow more (--data.max_skipped_share {needed:g})"
    )


def as_json(report: CheckReport) -> str:
    """The report for programs: the fields of `CheckReport`, paths in full. Plain ASCII, for names of any encoding."""
    values = asdict(report) | {
        "unreadable": [{"path": path, "reason": reason} for path, reason in report.unreadable],
        "workers_needed": {f"{rate:g}": workers for rate, workers in report.workers_needed.items()},
    }
    values["kept"] = None if report.kept is None else report.kept._asdict()
    values["channel_hint"] = None if report.channel_hint is None else report.channel_hint._asdict()
    if report.suggestion is not None:
        values["suggestion"]["scales"] = [scale._asdict() for scale in report.suggestion.scales]
        values["suggestion"]["command"] = None if report.problem else suggested_command(report)
    return json.dumps(values, indent=2)


def scales_text(suggestion: Suggestion) -> str:
    """Encoder and image size, and the smaller ones that a run takes where its time is short."""
    largest, *smaller = map(str, suggestion.scales)
    if not smaller:
        return largest
    return f"{largest}, or {' or '.join(smaller)} where the run's time is too short for a million images"


def suggested_command(report: CheckReport) -> str:
    """The command line that pre-trains as suggested. Encoder and image size follow from images and time."""
    return (
        f"simmim pretrain --data {shlex.quote(report.path)} --out runs/first"
        f"{' --data.turns true' if report.suggestion.turns else ''}"
    ) + "".join(f" {shlex.quote(word)}" for word in report.flags)


def turns_text(report: CheckReport) -> list[str]:
    """Which images have no up, and that turning them is suggested, or why it is not."""
    if not report.without_up:
        return []
    kinds = ", ".join(counted(count, kind) for kind, count in report.without_up.items())
    advice = "--data.turns true turns them by quarters" if report.suggestion.turns else "the other images may have one"
    return [f"turns        {kinds} by their metadata, which have no up: {advice}"]


def pages_text(report: CheckReport) -> list[str]:
    """The command that tells what pages are, where that is what keeps files from being read."""
    if not any("give data.pages" in reason for _, reason in report.unreadable):
        return []
    return ["", f"next         simmim check-data {shlex.quote(printable(report.path))} --pages images (or channels, first)"]


def values_text(report: CheckReport) -> list[str]:
    """For images deeper than 8 bits a line a channel: its range, its histogram, and what is wrong with it."""
    if not report.ranges:
        return []
    names = report.channel_names or [str(channel) for channel in range(len(report.ranges))]
    ranges = [f"{low:,.6g} to {high:,.6g}" for low, high in report.ranges]
    name_width, range_width = max(map(len, names)), max(map(len, ranges))
    setting = "is given" if "--data.range" in report.flags else "auto takes it"
    scale = f"; histograms after {report.transform}" if report.transform != "none" else ""
    lines = [f"values       one range a channel for all images, as --data.range {setting}{scale}"]
    for name, covered, histogram, missing in zip(names, ranges, report.histograms, report.missing):
        fullest = max(histogram) or 1
        drawn = "".join(BLOCKS[math.ceil((len(BLOCKS) - 1) * share / fullest)] for share in histogram)
        notes = [f"{missing:.1%} without data"] if missing else []
        if missing == 1 or max(histogram) == 1:
            notes.append("dead: all values alike")
        elif histogram[-1] > SATURATED:
            notes.append(f"saturated: {histogram[-1]:.0%} at the upper end")
        lines.append("  ".join([f"  {name:<{name_width}}  {covered:<{range_width}}", drawn, *notes]))
    return lines


def tiles_text(report: CheckReport) -> list[str]:
    """How many tiles make an epoch, and how many of those drawn are background."""
    if report.tiles is None:
        return []
    share = "" if report.empty_share is None else f"; {report.empty_share:.0%} of those drawn are background, and left out"
    return [f"tiles        {report.tiles:,} an epoch, one of each image read here{share}"]


def bars(buckets: dict[int, int]) -> list[str]:
    """One line per bucket: its range in pixels, a bar as long as its share of the fullest, its count."""
    from simmim.data.check import SHORT_SIDES_PX

    ends = {start: end - 1 for start, end in pairwise(SHORT_SIDES_PX)}
    labels = [f"{start}–{ends[start]}" if start in ends else f"{start}–" for start in buckets]
    width, most = max(map(len, labels)), max(buckets.values())
    return [
        f"  {label:>{width}} px  {'█' * math.ceil(BAR_WIDTH * count / most)}{' ' * bool(count)}{count:,}"
        for label, count in zip(labels, buckets.values())
    ]


def duplicates_text(report: CheckReport) -> list[str]:
    """Groups of identical files, the first of them by name."""
    if not report.duplicate_groups:
        return ["duplicates   none"]
    lines = [
        f"duplicates   {counted(report.duplicate_groups, 'group')} of identical files; "
        f"{counted(report.duplicates_removable, 'image')} could be removed "
        f"({share(report.duplicates_removable, report.images)})"
    ]
    for group in report.duplicates[:MAX_LINES]:
        more = f", … ({len(group):,} in all)" if len(group) > 3 else ""
        lines.append(f"  {', '.join(map(printable, group[:3]))}{more}")
    if report.duplicate_groups > MAX_LINES:
        lines.append(f"  … and {report.duplicate_groups - MAX_LINES:,} more groups: see --json")
    return lines


def loading_text(report: CheckReport) -> list[str]:
    """Loading speed, and the number of processes that a model needs."""
    side = report.suggestion.image_size_px
    needs = ", ".join(f"{counted(workers, 'worker')} for {rate:,.6g}" for rate, workers in report.workers_needed.items())
    lines = [
        f"loading      {report.images_per_second:,.4g} images/s per worker at {side} px, files in the disk's cache",
        f"  a model's images/s need {needs}; this machine has {counted(report.cores, 'core')}",
    ]
    # A single rate is the model's own.
    if len(report.workers_needed) == 1 and max(report.workers_needed.values()) > report.cores:
        lines.append("  the model would wait for images: store them smaller, or train where there are more cores")
    return lines


def kept_text(report: CheckReport) -> list[str]:
    """What a run keeps of the images on disk."""
    if report.kept is None:
        return []
    (height, width), side = report.kept.size, report.suggestion.image_size_px
    taken = size_text(report.kept.num_bytes / 2**20)
    return [
        f"cache        {taken}: at {side} px a run keeps images at about {height}×{width} px on disk, so that each is "
        "decoded once; --data.cache off keeps none"
    ]


def share(part: int, whole: int) -> str:
    """A part of a whole, in percent, never rounded to none or all."""
    percent = 100 * part / whole
    return f"{part:,} of {whole:,}, " + ("under 0.1 %" if percent < 0.1 else f"{percent:.1f} %")


def size_text(mib: float) -> str:
    """In MiB, or in GiB from 1 GiB on."""
    return f"{mib / 1024:,.1f} GiB" if mib >= 1024 else f"{mib:,.1f} MiB"


def counts_text(counts: dict[str, int]) -> str:
    """JPEG 1,200, PNG 3."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def printable(text: str) -> str:
    """Text on one line that any terminal can show: file names may hold line breaks and bytes that are no text."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
