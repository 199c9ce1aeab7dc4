"""What is done per image does not grow with the number of images: counted, not timed."""

import json
import os
import random
import sys
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from image_files import write_empty
from PIL import Image

from simmim.cli.features import print_unreadable
from simmim.data import dataset_from_paths, read_labeled_images, tiles
from simmim.data.addresses import Tile
from simmim.data.arrangement import check_labels
from simmim.data.label_map_files import SceneStatistics
from simmim.data.label_map_sources import read_folder_pair
from simmim.data.labels import class_indices, select_labeled_rows
from simmim.data.records import iterate_records, paths_of
from simmim.data.scene_draws import draw_scenes
from simmim.data.tiles import TiledImage, TilePlan, TileWalk
from simmim.evaluate.labeled import Pools, pool_rows
from simmim.evaluate.vectors import VectorFile
from simmim.files import atomic_write
from simmim.finetune.dense.prediction import write_png
from simmim.finetune.detection import prediction
from simmim.finetune.detection.inference import Found
from simmim.finetune.detection.labels import table
from simmim.finetune.detection.labels.base import ReadingOptions
from simmim.finetune.detection.prediction import FoundIn
from simmim.reading import TileSettings

calls = Counter()


@pytest.fixture(autouse=True)
def nothing_counted():
    calls.clear()


class Text(str):
    """A text that counts how often it is looked up and compared."""

    __slots__ = ()

    def __hash__(self):
        calls["hash"] += 1
        return super().__hash__()

    def __eq__(self, other):
        calls["compared"] += 1
        return super().__eq__(other)


class Number(int):
    """A number that counts how often it is looked up."""

    __slots__ = ()

    def __hash__(self):
        calls["hash"] += 1
        return super().__hash__()


@pytest.fixture
def count_reads(monkeypatch):
    """The reads of a data set's table, `reads`, and the objects that go into fingerprints, `fingerprint`."""
    from datasets import arrow_dataset
    from datasets.utils._dill import Pickler

    def counting(name, function):
        def counted(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(arrow_dataset, "query_table", counting("reads", arrow_dataset.query_table))
    monkeypatch.setattr(Pickler, "save", counting("fingerprint", Pickler.save))


def images_in_memory(count):
    rows = [{"bytes": bytes(1 + row % 50), "path": f"{row}.png"} for row in range(count)]
    return datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image(decode=False)}))


def test_folders_of_scenes_are_paired_by_one_look_at_each_name(tmp_path, monkeypatch):
    count = 300
    write_empty(*(tmp_path / kind / f"{number}.png" for kind in ("images", "masks") for number in range(count)))
    found = {Text(number): str(tmp_path / "masks" / f"{number}.png") for number in range(count)}
    monkeypatch.setattr("simmim.data.label_map_sources.find_stems", lambda folder: found)
    monkeypatch.setattr("simmim.data.label_map_sources.match_names", lambda images, labels, kind: list(found))
    assert len(read_folder_pair(tmp_path / "images", tmp_path / "masks")) == count
    assert calls["hash"] < 10 * count


def test_parts_of_a_csv_of_boxes_are_counted_once(tmp_path, monkeypatch):
    count = 300
    write_empty(*(tmp_path / f"{number}.png" for number in range(count)))
    part_of = table.part_of
    monkeypatch.setattr(table, "part_of", lambda *arguments: Text(part_of(*arguments)))
    lines = [f"{number}.png,cat,1,1,5,5,{'val' if number % 5 == 0 else 'train'}" for number in range(count)]
    file = tmp_path / "boxes.csv"
    file.write_text("\n".join(["path,class,xmin,ymin,xmax,ymax,split", *lines]))
    parts = table.TableReader().read(str(file), ReadingOptions()).parts
    assert {use: len(scenes) for use, scenes in parts.items()} == {"train": 240, "validation": 60}
    assert calls["compared"] < 20 * count


def test_scenes_are_drawn_by_one_look_at_each():
    count, classes = 300, 20
    scenes = [SceneStatistics("", (1, 1), {row % classes: 1}) for row in range(count)]
    rows = draw_scenes(scenes, [Number(row) for row in range(count)], 100, range(classes), random.Random(0))
    assert len(rows) == 100 and {row % classes for row in rows} == set(range(classes))
    assert calls["hash"] < 3 * count


def test_labels_are_read_and_drawn_at_once(tmp_path, count_reads):
    counts = {}
    for count in (50, 200):
        folder = tmp_path / str(count)
        write_empty(*(folder / name / f"{number}.png" for name in ("cat", "dog") for number in range(count)))
        calls.clear()
        labels = read_labeled_images(folder, None, seed=0)
        assert np.bincount(class_indices(labels.train)).tolist() == [count * 4 // 5] * 2
        counts[count] = dict(calls)
    assert counts[50] == counts[200]


def test_a_class_without_a_row_has_none():
    images = dataset_from_paths([f"{row}.png" for row in range(4)])
    chosen = select_labeled_rows(images, {"a": [2], "b": [], "c": [3, 0]}, ["a", "b", "c"])
    assert [row["image"]["path"] for row in chosen] == ["2.png", "3.png", "0.png"]
    assert class_indices(chosen).tolist() == [0, 2, 2] == list(chosen["label"])


def test_paths_are_read_without_the_files(count_reads):
    images = images_in_memory(200).select([199, *range(100)])
    expected = ["199.png", *(f"{row}.png" for row in range(100))]
    assert paths_of(images) == expected
    assert calls["reads"] == 1
    pool = pool_rows(images, [np.arange(101)])
    calls.clear()
    file = VectorFile("vectors.parquet", tuple(expected), np.zeros((101, 2), np.float32))
    assert len(file.of_pools(Pools(pool, pool))[0].rows) == 101
    assert calls["reads"] == 1


def test_records_come_some_at_a_time(count_reads):
    images = images_in_memory(100)
    assert list(iterate_records(images)) == [row["image"] for row in images]
    calls.clear()
    assert sum(1 for _ in iterate_records(images)) == 100 and calls["reads"] == 4


def test_labels_of_channels_are_read_at_once(count_reads):
    images = images_in_memory(100).add_column("label", [str(row // 2) for row in range(100)])
    calls.clear()
    check_labels(images, [[row, row + 1] for row in range(0, 100, 2)])
    assert calls["reads"] == 1


def test_boxes_are_written_an_image_at_a_time(tmp_path, monkeypatch):
    found = [
        FoundIn(f"{row}.png", (9, 9), Found(torch.ones(5, 4), torch.ones(5), torch.zeros(5, dtype=torch.int64)), None)
        for row in range(7)
    ]
    found[3] = found[3]._replace(found=Found(torch.ones(0, 4), torch.ones(0), torch.zeros(0, dtype=torch.int64)))
    written = []
    as_json = json.dumps
    monkeypatch.setattr(prediction.json, "dumps", lambda values, **how: (written.append(values), as_json(values, **how))[1])
    prediction.write_coco(tmp_path, found, ("cat",))
    assert max(len(values) for values in written if isinstance(values, list)) == 5
    text = (tmp_path / prediction.RESULTS).read_text()
    results = json.loads(text)
    assert text == as_json(results)  # one line
    assert [one["image_id"] for one in results] == [number for number in (1, 2, 3, 5, 6, 7) for _ in range(5)]
    assert results[0] == {"image_id": 1, "category_id": 1, "bbox": [1.0, 1.0, 0.0, 0.0], "score": 1.0}
    prediction.write_coco(tmp_path, found[3:4], ("cat",))
    assert (tmp_path / prediction.RESULTS).read_text() == "[]"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_first_images_that_cannot_be_read(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    print_unreadable({f"{number}.png": "empty file" for number in range(3000)})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:20] == [f"not read: {number}.png: empty file" for number in range(20)]
    assert lines[20:] == (["not read: … and 2,980 more: simmim check-data --json lists all"] if terminal else lines[20:])
    assert len(lines) == (21 if terminal else 3000)


def test_predictions_do_not_wait_for_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: calls.update(["synced"]))
    write_png(tmp_path / "masks" / "one.png", Image.new("L", (4, 4)))
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["one.png"] and not calls["synced"]
    with atomic_write(tmp_path / "classes.txt") as temporary:
        temporary.write_text("cat")
    assert calls["synced"] == 2  # the file and its folder


def test_tiles_are_made_where_they_are_asked_for(monkeypatch):
    """A walk over slides of a hundred million tiles neither lists them nor reads an image."""
    monkeypatch.setattr(tiles, "tile_record", lambda record, tile: calls.update(["tiles"]) or (record["path"], tile))
    images = dataset_from_paths([f"{number}.svs" for number in range(500)])
    slide = TiledImage((100_000, 80_000), 0, (100_000, 80_000), 224)
    walk = TileWalk(images, TilePlan(TileSettings(224), range(500), [slide] * 500), 0.25)
    assert len(walk) == 500 * 595 * 476 and not calls["tiles"]
    assert walk.place(len(walk) - 1) == (79_776, 99_776, 224, 224)
    assert walk[595 * 476]["image"] == ("1.svs", Tile(0, 0, 0, 224, 224)) and calls["tiles"] == 1
    assert walk[476]["image"] == ("0.svs", Tile(0, 0, 168, 224, 224)) and walk[475]["image"][1].left == 79_776
