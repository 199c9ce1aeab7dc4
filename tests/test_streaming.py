"""Streams: every sample once per epoch over ranks and workers, and resuming from any stream position."""

import itertools
from collections import Counter

import datasets
import numpy as np
import pytest
import torch

from simmim.data import EndlessBatchSampler, ImageSamples, RandomView, StreamedSamples, build_loader, open_source
from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings, load_pretrained, pretrain

COUNT = 29  # prime: no number of ranks, workers or shards divides it


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Pictures whose pixels are their number, as a saved dataset."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("numbered")
    pictures = [Image.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in range(COUNT)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(folder)
    return str(folder)


def stream_of(numbered, shards, buffer=7):
    source = open_source(numbered).images.to_iterable_dataset(num_shards=shards)
    return StreamedSamples(source, RandomView((4, 4)), 3, seed=3, buffer=buffer)


def numbers(batch):
    return batch["image"][:, 0, 0, 0].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers", "shards"), [(1, 0, 1), (1, 2, 4), (2, 2, 8), (2, 2, 3), (2, 2, 1)])
def test_a_stream_gives_every_sample_once_per_epoch(numbered, ranks, workers, shards):
    """Also with fewer shards than workers, and with shards that do not divide among them."""
    counts_of = {0: Counter(), 1: Counter()}
    for rank in range(ranks):
        loader = build_loader(stream_of(numbered, shards).part(rank, ranks, 0, {}), workers, batch_size=2)
        # Enough for every worker to finish two epochs.
        for batch in itertools.islice(loader, 2 * COUNT + 4):
            for number, (_, epoch, _) in zip(numbers(batch), batch["stream_position"]):
                if epoch in counts_of:
                    counts_of[epoch][number] += 1
    for epoch, counts in counts_of.items():
        assert counts == Counter(range(COUNT)), epoch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_index_gives_every_sample_once_per_epoch(numbered):
    """Two ranks with two workers each; the batch does not divide the epoch."""
    images = open_source(numbered).images
    samples = ImageSamples(images, RandomView((4, 4)), 3, seed=3)
    parts = []
    for rank in range(2):
        loader = build_loader(samples, 2, EndlessBatchSampler(COUNT, 4, seed=3, rank=rank, world_size=2))
        parts.append([numbers(batch) for batch in itertools.islice(loader, 15)])
    order = [number for pair in zip(*parts) for part in pair for number in part]
    for epoch in range(4):
        assert sorted(order[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def test_each_epoch_and_seed_has_its_own_order(numbered):
    def order(seed):
        stream = stream_of(numbered, 4)
        stream.seed = seed
        taken = itertools.islice(stream, 2 * COUNT)
        return [int(sample["image"][0, 0, 0]) for sample in taken]

    first, again, other = order(0), order(0), order(1)
    assert first == again
    assert first != other
    assert first[:COUNT] != first[COUNT:]
    assert first[:COUNT] != sorted(first[:COUNT])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resuming_from_stream_positions_is_exact(numbered, workers):
    """After any number of batches, before and after the end of an epoch: same images, crops and seeds, in order."""
    whole = list(itertools.islice(build_loader(stream_of(numbered, 4), workers, batch_size=3), 24))
    for done in (1, 4, 11, 17):
        positions = {}
        for batch in whole[:done]:
            for worker, epoch, read in batch["stream_position"]:
                positions[worker] = (epoch, read)
        part = stream_of(numbered, 4).part(0, 1, done, positions)
        for expected, batch in zip(whole[done:], build_loader(part, workers, batch_size=3)):
            assert torch.equal(batch["image"], expected["image"])
            assert batch["seed"] == expected["seed"]
            assert batch["stream_position"] == expected["stream_position"]


def test_unreadable_rows_are_replaced_and_listed(tmp_path, numbered):
    rows = [dict(row["image"]) for row in open_source(numbered).images]
    rows[5] = {"bytes": b"no picture", "path": "five.jpg"}
    rows[6] = {"bytes": b"", "path": "six.jpg"}
    stream = datasets.Dataset.from_dict({"image": rows}).to_iterable_dataset(num_shards=2)
    samples = StreamedSamples(stream, RandomView((4, 4)), 3, seed=0, buffer=5)
    epoch = list(itertools.islice(samples, 60))
    listed = {path for sample in epoch for path, _ in sample["skipped"]}
    assert listed == {"five.jpg", "six.jpg"}
    shown = {int(sample["image"][0, 0, 0]) for sample in epoch}
    assert shown == set(range(COUNT)) - {5, 6}


MODEL = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "drop_path_rate": 0.1})


def test_resuming_among_unreadable_rows_is_exact(numbered, monkeypatch):
    """An image stands in for several that follow it, and does so where the stream is resumed between them."""
    readable = [row["image"] for row in open_source(numbered).images.select(range(4))]
    broken = {"bytes": b"no image", "path": "broken.png"}
    rows = [{"image": image} for image in (readable[0], broken, broken, broken, readable[1], broken, *readable[2:])]
    stream = stream_of(numbered, 1)
    monkeypatch.setattr(StreamedSamples, "rows", lambda self, epoch, node, num_nodes: iter(rows))

    def samples(positions):
        taken = itertools.islice(stream.part(0, 1, 0, positions), 2 * len(rows))
        return [(sample["stream_position"], sample["seed"], int(sample["image"][0, 0, 0])) for sample in taken]

    whole = samples({})
    assert [number for *_, number in whole[: len(rows)]] == [0, 0, 0, 0, 1, 1, 2, 3]
    for stop in range(1, len(rows)):
        assert samples({0: (0, stop)})[: len(rows)] == whole[stop : stop + len(rows)], stop


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streaming_run_resumes_exactly(digits, tmp_path, power_cut, workers):
    data = DataSettings(str(digits.unlabeled), streaming=True, shuffle_buffer=50)
    common = {"data": data, "preset": "nano", "epochs": 2.0, "batch_size": 32, "model": MODEL, "save_every_steps": 5}
    whole = pretrain(PretrainSettings(**common, workers=workers, out=str(tmp_path / "whole")))
    with power_cut(after_step=12):
        pretrain(PretrainSettings(**common, workers=workers, out=str(tmp_path / "cut")))
    with pytest.raises(ValueError, match=f"resume with workers {max(workers, 1)}"):
        pretrain(PretrainSettings(**common, workers=workers + 3, out=str(tmp_path / "cut"), resume=True))
    cut = pretrain(PretrainSettings(**common, workers=workers, out=str(tmp_path / "cut"), resume=True))
    first, second = (load_pretrained(run)[0].state_dict() for run in (whole, cut))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
