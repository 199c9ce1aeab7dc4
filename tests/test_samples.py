"""Samples by (epoch, index), their order, and batches of them."""

import itertools
import random
import sys

import numpy as np
import pytest
import torch
from image_files import write_images
from PIL import Image

from simmim.data import (
    CenterView,
    EndlessBatchSampler,
    ImageSamples,
    Picture,
    RandomView,
    SequentialBatchSampler,
    build_loader,
    collate,
    dataset_from_paths,
    find_images,
)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 10, (28, 36))
    return folder


def samples_of(folder, seed=0, labels=None, keep_decoded=False, view=None):
    source = dataset_from_paths(find_images(folder), labels)
    return ImageSamples(source, view or RandomView((16, 16)), 3, seed, keep_decoded)


def same_sample(a, b):
    return torch.equal(a["image"], b["image"]) and all(a.get(key) == b.get(key) for key in ("seed", "label", "skipped"))


def test_samples_follow_from_seed_epoch_and_index(image_folder):
    """In whatever order, by whatever object they are fetched; and nothing global is drawn from."""
    keys = [(epoch, index) for epoch in (0, 1, 7) for index in range(10)]
    first = samples_of(image_folder)
    torch.manual_seed(0)
    random.seed(0)
    expected = {key: first[key] for key in keys}
    for key in random.Random(1).sample(keys, len(keys)):
        random.seed(key[0])
        np.random.seed(key[1])
        torch.manual_seed(key[1])
        assert same_sample(first[key], expected[key])
        assert same_sample(samples_of(image_folder)[key], expected[key])
    for sample in expected.values():
        assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.uint8
    assert len({sample["seed"] for sample in expected.values()}) == len(keys)
    for index in range(10):
        assert not torch.equal(expected[0, index]["image"], expected[1, index]["image"])
    other = samples_of(image_folder, seed=1)
    assert all(not same_sample(other[key], expected[key]) for key in keys)
    assert {other[key]["seed"] for key in keys}.isdisjoint(sample["seed"] for sample in expected.values())


def test_labels_come_with_their_images(image_folder):
    labels = [index * 3 % 7 for index in range(10)]
    samples = samples_of(image_folder, labels=labels, view=CenterView((28, 36)))
    for index, path in enumerate(find_images(image_folder)):
        assert samples[0, index]["label"] == labels[index]
        assert np.array_equal(samples[0, index]["image"].permute(1, 2, 0), np.asarray(Image.open(path)))
    batch = collate([samples[0, index] for index in (4, 2)])
    assert batch["label"].tolist() == [labels[4], labels[2]]
    assert "label" not in samples_of(image_folder)[0, 0]


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    """Ten images, of which 3 and 4 are unreadable."""
    folder = tmp_path_factory.mktemp("damaged")
    paths = write_images(folder, 10)
    with open(paths[3], "wb"):
        pass
    with open(paths[4], "w") as file:
        file.write("no image")
    return folder


def test_unreadable_images_are_replaced(damaged_folder):
    """By the same one each time, by others in other epochs, with the label of what is shown; and are listed."""
    samples = samples_of(damaged_folder, labels=range(10), view=CenterView((32, 32)))
    paths = find_images(damaged_folder)
    seen = set()
    for epoch in range(12):
        sample = samples[epoch, 3]
        assert same_sample(samples_of(damaged_folder, labels=range(10), view=CenterView((32, 32)))[epoch, 3], sample)
        assert sample["skipped"][0] == (paths[3], "empty file")
        assert {path for path, _ in sample["skipped"]} <= {paths[3], paths[4]}
        shown = np.asarray(Image.open(paths[sample["label"]]))
        assert np.array_equal(sample["image"].permute(1, 2, 0), shown)
        seen.add(sample["label"])
    assert len(seen) > 3 and seen.isdisjoint((3, 4))
    assert samples[0, 5]["skipped"] == []
    batch = collate([samples[0, index] for index in (3, 5, 4)])
    assert batch["skipped"] == samples[0, 3]["skipped"] + samples[0, 4]["skipped"]
    assert {path for path, _ in batch["skipped"]} == {paths[3], paths[4]}


def test_a_set_of_unreadable_images_ends_with_an_error(tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        path.write_text("no image")
    with pytest.raises(ValueError, match=r"32 images in a row could not be read, the last .*\.png: not an image"):
        samples_of(tmp_path)[0, 0]


def test_kept_images_give_the_same_samples(damaged_folder):
    kept, fresh = samples_of(damaged_folder, keep_decoded=True), samples_of(damaged_folder)
    for key in [(epoch, index) for epoch in range(3) for index in range(10)]:
        assert same_sample(kept[key], fresh[key])
    assert sorted(kept.cache) == [0, 1, 2, 5, 6, 7, 8, 9]
    folder_again = samples_of(damaged_folder, keep_decoded=True)
    folder_again.cache[0] = (Picture(Image.new("RGB", (32, 32), "red")), None)
    assert (folder_again[5, 0]["image"][0] == 255).all(), "kept images are what is shown"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_workers_change_nothing(damaged_folder, keep_decoded):
    """0, 1 and 3 processes give bit-identical batches, over an epoch's end and with unreadable images."""
    results = []
    for workers in (0, 1, 3):
        samples = samples_of(damaged_folder, seed=5, labels=range(10), keep_decoded=keep_decoded)
        loader = build_loader(samples, workers, EndlessBatchSampler(10, 4, seed=5))
        results.append(list(itertools.islice(loader, 7)))
        del loader
    for batch, *others in zip(*results):
        assert batch["image"].shape == (4, 3, 16, 16)
        for other in others:
            assert torch.equal(batch["image"], other["image"]) and torch.equal(batch["label"], other["label"])
            assert batch["seed"] == other["seed"] and batch["skipped"] == other["skipped"]
    assert any(batch["skipped"] for batch in results[0])


def keys_of(stream, count):
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("count, batch_size", [(10, 4), (10, 5), (7, 3), (3, 8), (1, 1), (5, 7)])
def test_every_epoch_is_a_permutation(count, batch_size):
    taken = keys_of(EndlessBatchSampler(count, batch_size, seed=0), 6 * count)
    assert {len(batch) for batch in taken} == {batch_size}
    keys = [key for batch in taken for key in batch]
    epochs = 6 * batch_size
    assert [epoch for epoch, _ in keys] == [epoch for epoch in range(epochs) for _ in range(count)]
    orders = [[index for epoch, index in keys[first : first + count]] for first in range(0, len(keys), count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 4:
        assert len({tuple(order) for order in orders}) > epochs * 0.8


def test_order_follows_the_seed():
    assert keys_of(EndlessBatchSampler(50, 8, seed=1), 20) == keys_of(EndlessBatchSampler(50, 8, seed=1), 20)
    assert keys_of(EndlessBatchSampler(50, 8, seed=1), 20) != keys_of(EndlessBatchSampler(50, 8, seed=2), 20)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_process(world):
    """Global batch by global batch, rank r holding its r-th part."""
    alone = keys_of(EndlessBatchSampler(10, 3 * world, seed=4), 11)
    ranks = [keys_of(EndlessBatchSampler(10, 3, 4, rank, world), 11) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == alone


@pytest.mark.parametrize("start", [1, 2, 5, 13])
@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_start_skips_batches(start, rank, world):
    whole = keys_of(EndlessBatchSampler(10, 4, 0, rank, world), start + 8)
    assert keys_of(EndlessBatchSampler(10, 4, 0, rank, world, start), 8) == whole[start:]


def test_stream_can_be_iterated_again():
    stream = EndlessBatchSampler(10, 4, 0)
    assert keys_of(stream, 5) == keys_of(stream, 5)


@pytest.mark.parametrize("count, batch_size, world", [(10, 4, 1), (10, 5, 1), (11, 3, 2), (2, 4, 3), (7, 2, 4), (64, 64, 1)])
def test_in_order_covers_everything_once(count, batch_size, world):
    ranks = [SequentialBatchSampler(count, batch_size, rank, world) for rank in range(world)]
    taken = [list(order) for order in ranks]
    assert sorted(key for rank in taken for batch in rank for key in batch) == [(0, index) for index in range(count)]
    assert [len(order) for order in ranks] == [len(batches) for batches in taken]
    for rank in taken:
        assert all(len(batch) == batch_size for batch in rank[:-1])
        assert [key for batch in rank for key in batch] == sorted(key for batch in rank for key in batch)


def test_importing_sets_nothing_global():
    """Truncated images stay errors: nobody sets PIL's flag that has them padded with gray."""
    from PIL import ImageFile

    assert "simmim.data" in sys.modules and ImageFile.LOAD_TRUNCATED_IMAGES is False
