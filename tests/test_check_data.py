"""The check of all images before training: counts, unreadable images, duplicates, suggestions; and its benchmark."""

import json
import math
import os
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from loading_pipelines import heap_mib
from PIL import Image

from simmim.cli.check_report import as_json, printable, render, suggested_command, unreadable_text
from simmim.data import inspection, measure_images
from simmim.data.check import SHORT_SIDES_PX, check_images, histogram, median_of
from simmim.data.duplicates import find_duplicates, list_groups
from simmim.pretrain.resolve import resolve_settings
from simmim.pretrain.settings import PretrainSettings

ROOT = Path(__file__).parents[1]


def noise(height, width, *channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def source_of(paths):
    column = {"image": [str(path) for path in paths]}
    return datasets.Dataset.from_dict(column).cast_column("image", datasets.Image(decode=False))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """18 files, 14 of them readable; the shorter sides are 40 (8 of them), 100 (5) and 300."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(4):
        Image.fromarray(noise(40, 60, 3, seed=number)).save(folder / f"color-{number}.bmp")  # of one size in bytes
    for number in (1, 2):
        (folder / f"copy-{number}.bmp").write_bytes((folder / "color-0.bmp").read_bytes())
    Image.fromarray(noise(60, 40)).save(folder / "gray.png")
    Image.fromarray(noise(40, 40, 4)).save(folder / "transparent.png")
    Image.fromarray(noise(100, 140, 3)).convert("P").save(folder / "palette.gif")
    Image.fromarray(noise(100, 140, 4), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(100, 140).astype(np.uint16) * 200).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(100, 140, 3)).save(folder / "turned.jpg", exif=exif)
    exif[0x0112] = 1
    Image.fromarray(noise(100, 140, 3, seed=1)).save(folder / "upright.jpg", exif=exif)
    Image.fromarray(noise(400, 300, 3)).save(folder / "large.jpg")
    (folder / "cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:20_000])
    (folder / "cut-again.jpg").write_bytes((folder / "cut.jpg").read_bytes())
    (folder / "empty.png").touch()
    (folder / "text\n.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def report(corpus):
    return check_images(source_of(sorted(corpus.iterdir())), workers=0, path="my photos")


def test_counts(report, corpus):
    assert report.images == 18 and not report.sound
    assert report.formats == {"BMP": 6, "JPEG": 4, "PNG": 3, "GIF": 1}
    assert list(report.formats) == ["BMP", "JPEG", "PNG", "GIF"], "frequent ones first"
    assert report.modes == {"RGB": 9, "CMYK": 1, "I;16": 1, "L": 1, "P": 1, "RGBA": 1}
    assert report.channels == 3
    assert report.oriented == 1, "an orientation of 1 is none"
    assert report.mib == pytest.approx(sum(path.stat().st_size for path in corpus.iterdir()) / 2**20, abs=1e-3)


def test_sizes(report):
    assert report.short_sides_px == {32: 8, 64: 0, 96: 5, 128: 0, 192: 0, 256: 1}
    assert report.short_side_px == 40


@pytest.mark.parametrize("values", [[], [7], [1, 2], [5, 5, 9], [32, 33, 31, 10_000], list(range(100))])
def test_histogram_and_median_of_counts(values):
    counts = Counter(values)
    assert median_of(counts) == (sorted(values)[math.ceil(len(values) / 2) - 1] if values else 0)
    buckets = histogram(counts)
    assert sum(buckets.values()) == len(values)
    edges = [*SHORT_SIDES_PX, math.inf]
    for start, count in buckets.items():
        end = edges[edges.index(start) + 1]
        assert count == sum(start <= value < end for value in values)
    assert not values or (next(iter(buckets.values())) and list(buckets.values())[-1]), "no empty ends"


def test_unreadable_files_and_reasons(report, corpus):
    reasons = {os.path.basename(path): why for path, why in report.unreadable}
    assert reasons.keys() == {"cut.jpg", "cut-again.jpg", "empty.png", "text\n.jpg"}
    assert "truncated" in reasons["cut.jpg"]
    assert "empty" in reasons["empty.png"]
    assert all("\n" not in why and why for why in reasons.values())


def test_duplicates(report, corpus):
    """Equal bytes, not equal sizes; files that cannot be read are listed as such and not counted again."""
    names = [tuple(map(os.path.basename, group)) for group in report.duplicates]
    assert names == [("color-0.bmp", "copy-1.bmp", "copy-2.bmp")]
    assert (report.duplicate_groups, report.duplicates_removable) == (1, 2)


def test_listed_duplicates_are_limited_and_counted_in_full(corpus):
    source = source_of([corpus / f"color-{number}.bmp" for number in range(4)] * 3)
    report = check_images(source, workers=0)
    assert (report.duplicate_groups, report.duplicates_removable) == (4, 8)
    assert sum(map(len, report.duplicates)) == 12
    groups = find_duplicates(source, np.ones(12, dtype=np.int64), workers=0)
    assert list_groups(source, groups, max_files=3) == report.duplicates[:1]


def test_suggestions_are_the_defaults_of_pretraining(report, corpus):
    """The suggestion is what `simmim pretrain` would choose, and its command resolves to the same settings."""
    from simmim.cli.train import pretrain_settings

    images = measure_images(source_of(sorted(corpus.iterdir())))
    assert images.short_side_px == report.short_side_px
    resolved = resolve_settings(PretrainSettings(data="x", out="y"), images, report.images, "cpu", 0)
    largest = (resolved.preset, resolved.image_size)
    assert report.suggestion.scales[0] == largest
    words = shlex.split(suggested_command(report))
    assert words[:2] == ["simmim", "pretrain"]
    settings = pretrain_settings(words[2:])
    assert settings.data.path == "my photos"
    assert resolve_settings(settings, images, report.images, "cpu", 0).model == resolved.model


def test_suggestions_follow_the_images_and_the_device(tmp_path):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.jpg")
        Image.fromarray(noise(500, 300, seed=number)).save(paths[-1])
    source = source_of(paths)
    micro, pico = ("micro", 96), ("pico", 64)
    for device, expected in {"cpu": (micro, pico), "cuda": (("tiny", 192), micro, pico)}.items():
        assert check_images(source, workers=0, device=device).suggestion.scales == expected
    text = render(check_images(source, workers=0, device="cpu"))
    assert "suggested    micro at 96 px, or pico at 64 px where the run's time is too" in text
    assert check_images(source, workers=0).channels == 1


def test_workers_needed(report, corpus):
    assert report.images_per_second > 0
    assert report.workers_needed == {rate: math.ceil(rate / report.images_per_second) for rate in (100.0, 500.0, 2000.0)}
    asked = check_images(source_of([corpus / "gray.png"]), workers=0, images_per_second=1e9)
    assert asked.workers_needed == {1e9: math.ceil(1e9 / asked.images_per_second)}
    assert "the model would wait" in render(asked)


def test_the_report_does_not_depend_on_the_number_of_workers(corpus):
    source = source_of(sorted(corpus.iterdir()) * 4)
    reports = [check_images(source, workers=workers) for workers in (0, 2)]
    timed = {"images_per_second": 1.0, "workers_needed": {}}
    assert replace(reports[0], **timed) == replace(reports[1], **timed)


def test_text_and_json_agree(report):
    text, values = render(report), json.loads(as_json(report))
    assert text.splitlines()[0] == f"my photos: 18 images, {report.mib:.1f} MiB, 4 unreadable"
    assert [(entry["path"], entry["reason"]) for entry in values["unreadable"]] == list(report.unreadable)
    for entry in values["unreadable"]:
        path, why = map(printable, (entry["path"], entry["reason"]))
        assert f"  {path}: {why}" in text.splitlines()
    for name in ("formats", "modes"):
        listed = ", ".join(f"{key} {count}" for key, count in values[name].items())
        assert re.search(rf"^{name} +{re.escape(listed)}", text, re.M)
    drawn = dict(re.findall(r"^ +(\d+)–\d+ px  █* ?(\d+)$", text, re.M))
    assert {start: int(count) for start, count in drawn.items()} == values["short_sides_px"]
    fullest = max(values["short_sides_px"].values())
    assert text.count("█") == sum(math.ceil(40 * count / fullest) for count in values["short_sides_px"].values())
    assert values["duplicates"] == [list(group) for group in report.duplicates]
    assert values["suggestion"]["command"] in text
    assert values["workers_needed"].keys() == {"100", "500", "2000"}
    assert all(line.isprintable() for line in text.splitlines()), "a line break in a name does not break a line"


def test_long_lists_are_cut_in_text_and_whole_in_json(tmp_path):
    paths = [tmp_path / f"{number}.jpg" for number in range(25)]
    for path in paths:
        path.write_bytes(b"nothing")
    Image.fromarray(noise(32, 32)).save(tmp_path / "good.png")
    report = check_images(source_of([*paths, tmp_path / "good.png"]), workers=0)
    text = render(report)
    assert sum(str(path) in text for path in paths) == 20 and "… and 5 more: --json lists all" in text
    assert len(json.loads(as_json(report))["unreadable"]) == 25


def test_nothing_readable_is_reported_without_an_error(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    report = check_images(source_of([tmp_path / "a.jpg", tmp_path / "gone.png"]), workers=0)
    assert len(report.unreadable) == 2 and report.suggestion is None and report.images_per_second is None
    assert not report.sound and report.duplicate_groups == 0
    assert "2 unreadable" in render(report) and json.loads(as_json(report))["suggestion"] is None


def test_a_sound_set(tmp_path):
    Image.fromarray(noise(32, 32)).save(tmp_path / "a.png")
    report = check_images(source_of([tmp_path / "a.png"]), workers=0)
    assert report.sound
    text = render(report)
    assert "1 image, " in text and "all readable" in text and "duplicates   none" in text


def test_images_held_in_the_source(corpus):
    """Bytes without a path, as from Parquet: found by row, compared as files are."""
    rows = [{"bytes": (corpus / name).read_bytes(), "path": None} for name in ("gray.png", "cut.jpg", "gray.png")]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    report = check_images(datasets.Dataset.from_list([{"image": row} for row in rows], features=features), workers=0)
    assert [path for path, _ in report.unreadable] == ["row 1"]
    assert report.duplicates == (("row 0", "row 2"),)
    assert report.formats == {"PNG": 2}


def test_arrays_of_many_channels(tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", noise(10, 64, 48, seed=number))  # (channels, height, width)
    report = check_images(source_of(sorted(tmp_path.iterdir())), workers=0)
    assert (report.formats, report.modes, report.channels) == ({"NPY": 3}, {"10 channels": 3}, 10)
    assert report.sound and report.short_side_px == 48 and report.images_per_second > 0


def test_images_that_differ_in_channels_are_a_problem_and_still_read(tmp_path):
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", noise(10, 64, 64))
    report = check_images(source_of([tmp_path / "a.png", tmp_path / "b.npy"]), workers=0)
    assert not report.sound and not report.unreadable and report.channels is None
    assert "a.png has 3" in report.problem and "b.npy has 10" in report.problem
    assert report.problem in render(report) and report.modes == {"10 channels": 1, "RGB": 1}
    assert "simmim pretrain" not in render(report), "it would refuse these images"
    assert json.loads(as_json(report))["suggestion"]["command"] is None


@pytest.mark.parametrize(
    "count, images, says",
    [
        (1, 20, "; training replaces it by another image"),
        (5, 100, "; training replaces them by other images"),
        (
            3,
            22,
            ", more than the 5% at which training stops: mend or remove them, or allow more (--data.max_skipped_share 0.14)",
        ),
        (
            1,
            3,
            ", more than the 5% at which training stops: mend or remove it, or allow more (--data.max_skipped_share 0.34)",
        ),
    ],
)
def test_what_training_does_about_unreadable_images(count, images, says):
    """It stops at more than data.max_skipped_share of them, by default 5 %."""
    assert unreadable_text(count, images) == says


def test_images_too_large_for_training_are_listed(corpus):
    source = source_of([corpus / "large.jpg", corpus / "gray.png"])
    report = check_images(source, workers=0, max_pixels=300 * 400 - 1)
    assert [path for path, _ in report.unreadable] == [str(corpus / "large.jpg")]
    assert check_images(source, workers=0, max_pixels=300 * 400).sound


def test_duplicates_of_a_large_source_are_those_of_a_dictionary(tmp_path):
    """Against the plain way, for files of few sizes and contents, some of them gone."""
    drawn = np.random.default_rng(0).integers(0, 400, 600)
    rows, known = [], {}
    for row, content in enumerate(drawn.tolist()):
        rows.append(tmp_path / f"{row}.bin")
        rows[-1].write_bytes(content.to_bytes(2, "big") * (1 + content % 3))
        known.setdefault(content, []).append(row)
    sizes = np.array([path.stat().st_size for path in rows])
    gone = {row for row in range(600) if row % 10 == 7}
    for row in gone:
        rows[row].unlink()
    groups = [group.tolist() for group in find_duplicates(source_of(rows), sizes, workers=0)]
    left = [[row for row in group if row not in gone] for group in known.values()]
    assert groups == sorted(group for group in left if len(group) > 1)
    assert len(groups) > 100


def test_a_codec_that_raises_any_exception_does_not_end_the_check(corpus, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("by a codec")

    source = source_of([corpus / "gray.png"])
    monkeypatch.setattr(inspection, "open_picture", broken)
    report = check_images(source, workers=0)
    assert report.unreadable == ((str(corpus / "gray.png"), "ZeroDivisionError: by a codec"),)


def test_wrong_input_is_refused(corpus):
    source = source_of([corpus / "gray.png"])
    with pytest.raises(ValueError, match="'nothing' holds no images"):
        check_images(source.select([]), workers=0, path="nothing")
    with pytest.raises(ValueError, match="workers is -1: give 0 to read in the main process, or more"):
        check_images(source, workers=-1)
    for rate in (0, -5.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"images per second is .*: give a positive number"):
            check_images(source, workers=0, images_per_second=rate)


def test_the_benchmark_runs(fork_server, tmp_path):
    """Everything is measured, printed and written; no figure is held to a goal in a smoke run."""
    pytest.importorskip("sklearn", reason="the photographs are scikit-learn's")
    out = tmp_path / "loading.json"
    printed = fork_server.run_script(ROOT / "benchmarks/loading.py", "--quick", "--out", out)
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results.keys() == {"quick", "machine", "decoding", "waiting", "indexing", "memory"} and results["quick"]
    goals = {row["width_px"]: row["goal"] for row in results["decoding"]}
    assert goals == {500: 1.0, 1600: 4.0, 4000: 10.0}
    assert [row["content"] for row in results["decoding"]] == ["tiled", "resized"] * 3
    for row in results["decoding"]:
        assert row["images_per_second"].keys() == {"usual", "ours", "ours_normalized", "ours_first", "ours_kept"}
        assert min(row["images_per_second"].values()) > 0 and row["ratio"] > 0 and row["ratio_normalized"] > 0
    assert [(row["width_px"], row["workers"]) for row in results["waiting"]] == [
        (width, workers) for width in (500, 1600, 4000) for workers in (1, 2)
    ]
    assert all(0 < share < 100 for row in results["waiting"] for share in row["waiting_percent"].values())
    assert all(row["worker_cores"].keys() == {"usual", "ours"} for row in results["waiting"])
    assert min(results["indexing"]["files_per_second"].values()) > 0 and results["indexing"]["ratio_warm"] > 0
    memory = results["memory"]
    assert memory["mib"].keys() == memory["growth_percent"].keys() == memory["growth_error_percent"].keys()
    for looks in memory["mib"].values():
        assert len(looks) == len(memory["samples"]) == 3 and min(looks) > 0
    lines = [line for line in printed.splitlines() if not line.startswith("measuring ")]
    kinds = 3 + len(heap_mib())  # of memory
    assert len(lines) == 2 + 6 + 6 + 2 + kinds and all(line.count("|") == 6 for line in lines), "a Markdown table"
