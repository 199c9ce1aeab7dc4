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
    EndlessBatchSampler,
    EvaluationView,
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
    """Fetched in any order and by any object; no global generator is used."""
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
    samples = samples_of(image_folder, labels=labels, view=EvaluationView((28, 36)))
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
    """By the same image each time, by others in other epochs, with the replacement's label; and they are listed."""
    samples = samples_of(damaged_folder, labels=range(10), view=EvaluationView((32, 32)))
    paths = find_images(damaged_folder)
    replacements = set()
    for epoch in range(12):
        sample = samples[epoch, 3]
        assert same_sample(samples_of(damaged_folder, labels=range(10), view=EvaluationView((32, 32)))[epoch, 3], sample)
        assert sample["skipped"][0] == (paths[3], "empty file")
        assert {path for path, _ in sample["skipped"]} <= {paths[3], paths[4]}
        shown = np.asarray(Image.open(paths[sample["label"]]))
        assert np.array_equal(sample["image"].permute(1, 2, 0), shown)
        replacements.add(sample["label"])
    assert len(replacements) > 3 and replacements.isdisjoint((3, 4))
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


def test_cached_images_give_the_same_samples(damaged_folder):
    cached, fresh = samples_of(damaged_folder, keep_decoded=True), samples_of(damaged_folder)
    for key in [(epoch, index) for epoch in range(3) for index in range(10)]:
        assert same_sample(cached[key], fresh[key])
    assert sorted(cached.cache) == [0, 1, 2, 5, 6, 7, 8, 9]
    changed = samples_of(damaged_folder, keep_decoded=True)
    changed.cache[0] = (Picture(Image.new("RGB", (32, 32), "red")), None)
    assert (changed[5, 0]["image"][0] == 255).all(), "cached images are shown"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("keep_decoded", [False, True])
def test_batches_do_not_depend_on_the_number_of_workers(damaged_folder, keep_decoded):
    """0, 1 and 3 processes give bit-identical batches, across the end of an epoch and with unreadable images."""
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


def keys_of(order, count):
    return list(itertools.islice(order, count))


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


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_are_one_process(world_size):
    """Rank r has the r-th part of each global batch."""
    alone = keys_of(EndlessBatchSampler(10, 3 * world_size, seed=4), 11)
    ranks = [keys_of(EndlessBatchSampler(10, 3, 4, rank, world_size), 11) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks)] == alone


@pytest.mark.parametrize("start", [1, 2, 5, 13])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_start_skips_batches(start, rank, world_size):
    whole = keys_of(EndlessBatchSampler(10, 4, 0, rank, world_size), start + 8)
    assert keys_of(EndlessBatchSampler(10, 4, 0, rank, world_size, start), 8) == whole[start:]


def test_an_endless_sampler_can_be_iterated_again():
    order = EndlessBatchSampler(10, 4, 0)
    assert keys_of(order, 5) == keys_of(order, 5)


@pytest.mark.parametrize(
    "count, batch_size, world_size", [(10, 4, 1), (10, 5, 1), (11, 3, 2), (2, 4, 3), (7, 2, 4), (64, 64, 1)]
)
def test_a_sequential_sampler_gives_every_sample_once(count, batch_size, world_size):
    ranks = [SequentialBatchSampler(count, batch_size, rank, world_size) for rank in range(world_size)]
    taken = [list(order) for order in ranks]
    assert sorted(key for rank in taken for batch in rank for key in batch) == [(0, index) for index in range(count)]
    assert [len(order) for order in ranks] == [len(batches) for batches in taken]
    for rank in taken:
        assert all(len(batch) == batch_size for batch in rank[:-1])
        assert [key for batch in rank for key in batch] == sorted(key for batch in rank for key in batch)


def test_importing_changes_no_global_state():
    """Truncated images stay errors: PIL's global flag that pads them with gray is not set."""
    from PIL import ImageFile

    assert "simmim.data" in sys.modules and ImageFile.LOAD_TRUNCATED_IMAGES is False
