"""Color images in runs that read all as gray: the decision says what it rests on, and every such image is counted."""

import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from image_files import notices
from PIL import Image

from simmim.data import (
    EvaluationView,
    ImageSamples,
    StreamedSamples,
    collate,
    dataset_from_paths,
    find_images,
    measure_images,
    open_picture,
)
from simmim.messages import Notice
from simmim.training.gray_copies import GrayCopies


@pytest.fixture
def folder(tmp_path):
    """Nine gray images of several kinds, and four in color, which a sample of three does not meet."""
    gray, color = np.full((8, 8), 90, np.uint8), np.zeros((8, 8, 3), np.uint8)
    color[..., 0] = 200
    for number in range(13):
        in_color = number in (1, 2, 3, 4)
        image = Image.fromarray(color if in_color else gray)
        if number in (2, 5):
            image = image.convert("P")
        image.save(tmp_path / f"{number:02d}.{'jpg' if number in (3, 6) else 'png'}")
    return tmp_path


IN_COLOR = ["01.png", "02.png", "03.jpg", "04.png"]


def names(paths):
    return [path.rsplit("/", 1)[-1] for path in paths]


def test_gray_says_from_how_many_images_it_was_decided(folder):
    source = dataset_from_paths(find_images(folder))
    statistics, lines = notices(lambda: measure_images(source, num_samples=3))
    assert statistics.channels == 1
    assert lines == ["gray: decided from 3 of 13 images; color images among the others are read as gray, and counted"]
    assert notices(lambda: measure_images(source, 1, num_samples=3))[1] == [], "as the user asks"
    statistics, lines = notices(lambda: measure_images(source))
    assert statistics.channels == 3 and lines == [], "all were measured"
    gray = source.select([0, 5, 6, 7])
    assert notices(lambda: measure_images(gray))[1] == []
    [line] = notices(lambda: measure_images(gray, num_images=90))[1]  # the head of a stream
    assert "decided from 4 of 90 images" in line


def test_a_picture_tells_whether_it_loses_its_color(folder):
    for path in find_images(folder):
        for channels, expected in ((1, names([path])[0] in IN_COLOR), (3, False), (None, False)):
            picture = open_picture({"path": path, "bytes": None}, channels)
            assert (picture.loses_color, picture.decoded().loses_color) == (expected, expected), (path, channels)


@pytest.mark.parametrize("keep_decoded", [False, True])
def test_samples_name_their_color_images(folder, keep_decoded):
    source = dataset_from_paths(find_images(folder))
    samples = ImageSamples(source, EvaluationView((4, 4)), 1, seed=0, keep_decoded=keep_decoded)
    for epoch in range(2):
        batch = collate([samples[epoch, index] for index in range(len(samples))])
        assert names(batch["gray_copies"]) == IN_COLOR
    assert "gray_copies" not in collate([ImageSamples(source, EvaluationView((4, 4)), 3, seed=0)[0, 1]])
    rows = [{"image": {"path": path, "bytes": None}} for path in find_images(folder)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=1)
    streamed = StreamedSamples(stream, EvaluationView((4, 4)), 1, seed=0, buffer=2)
    taken = [sample for _, sample in zip(range(13), streamed)]
    assert sorted(names(collate(taken)["gray_copies"])) == IN_COLOR


def test_a_run_counts_each_once(capsys):
    for quiet, expected in ((False, "2 color images were read as gray, the first b.png\n"), (True, "")):
        counter, trainer = GrayCopies(quiet), SimpleNamespace(progress_bar_metrics={}, is_global_zero=True)
        for paths in ((), ("b.png",), ("a.png", "b.png")):
            counter.on_train_batch_end(trainer, None, None, {"gray_copies": list(paths)} if paths else {})
        assert trainer.progress_bar_metrics == {"color as gray": 2}
        counter.on_train_end(trainer)
        assert capsys.readouterr().out == expected


def test_notices_can_be_left_out():
    from simmim.messages import notify, without_notices

    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        with without_notices():
            notify("known already")
        with pytest.raises(Notice):
            notify("not known yet")


def test_a_study_says_what_its_runs_lack(monkeypatch):
    from simmim.finetune import LabeledSettings
    from simmim.finetune.classification import study

    def start(side_px, **data):
        return SimpleNamespace(
            settings=SimpleNamespace(data=LabeledSettings("labeled", **data)),
            preprocessing=SimpleNamespace(image_size=(side_px, side_px)),
            encoder=SimpleNamespace(config=SimpleNamespace(in_channels=3)),
        )

    for installed, expected in ((False, 1), (True, 0)):
        monkeypatch.setattr("simmim.finetune.classification.defaults.has_kornia", lambda installed=installed: installed)
        lines = notices(study.tell_what_runs_lack, start(128))[1]
        assert [line.startswith("no RandAugment: kornia is not installed") for line in lines] == [True] * expected
        assert notices(study.tell_what_runs_lack, start(32))[1] == [], "thumbnails have none anyway"
        assert notices(study.tell_what_runs_lack, start(128, rand_augment=0.0))[1] == [], "as the user asks"
