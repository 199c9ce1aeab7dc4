"""Rows read from a data set's table: what `datasets` gives, in whatever order its rows are."""

import pickle

import datasets
import pytest

from simmim.data import dataset_from_paths
from simmim.data.index import read_arrow, write_paths
from simmim.data.rows import Rows, is_plain

PATHS = [f"/images/{number}.png" for number in range(30)]
LABELS = [number % 4 for number in range(30)]


def with_bytes():
    """Some rows hold the file's content, with a name or without one, and some a path; of classes with names."""
    rows = [
        {"bytes": b"%d" % number if number % 3 else None, "path": None if number % 3 == 1 else path}
        for number, path in enumerate(PATHS)
    ]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=list("abcd"))}
    return datasets.Dataset.from_dict({"image": rows, "label": LABELS}, features=datasets.Features(features))


def mapped(folder):
    write_paths(folder / "index.arrow", iter(PATHS))
    return read_arrow(folder / "index.arrow")


SOURCES = {
    "paths": lambda folder: dataset_from_paths(PATHS),
    "labels": lambda folder: dataset_from_paths(PATHS, LABELS),
    "names of classes": lambda folder: dataset_from_paths(PATHS).add_column("label", list(map(str, LABELS))),
    "bytes": lambda folder: with_bytes(),
    "a mapped file": mapped,
    "selected": lambda folder: mapped(folder).select([7, 3, 3, 29]),
    "a range": lambda folder: with_bytes().select(range(4, 20)),
    "shuffled twice": lambda folder: with_bytes().shuffle(seed=1).select(range(3, 20)).shuffle(seed=2),
    "joined": lambda folder: datasets.concatenate_datasets([with_bytes().select([5, 1, 2]), with_bytes()]),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_rows_are_those_of_the_data_set(kind, tmp_path):
    source = SOURCES[kind](tmp_path)
    assert is_plain(source)
    rows = Rows(source)
    for copy in (rows, pickle.loads(pickle.dumps(rows))):
        assert [copy[number] for number in range(len(source))] == list(source)
        assert copy[-1] == source[len(source) - 1]
        with pytest.raises(IndexError):
            copy[len(source)]


def test_a_mapped_table_is_not_sent_to_processes(tmp_path):
    write_paths(tmp_path / "index.arrow", (f"/images/{number}.png" for number in range(20_000)))
    rows = Rows(read_arrow(tmp_path / "index.arrow"))
    assert rows[19_999]["image"]["path"] == "/images/19999.png"
    assert len(pickle.dumps(rows)) < 20_000


@pytest.mark.parametrize(
    "changed",
    [
        lambda source: source.with_transform(lambda rows: {"image": rows["image"]}),
        lambda source: source.cast_column("image", datasets.Image(decode=True)),
        lambda source: list(source),
    ],
)
def test_what_the_table_does_not_tell_is_left_to_the_data_set(changed):
    source = changed(with_bytes())
    assert not is_plain(source)
    if isinstance(source, list):
        assert Rows(source)[3] == source[3]
