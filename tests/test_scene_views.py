"""Views of scenes: image and label map in step, scale, padding, crops of several classes, samples by (epoch, index)."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from simmim.data import Picture, collate
from simmim.data.label_map_sources import read_scenes
from simmim.data.label_maps import ClassScheme
from simmim.finetune.dense.views import scaled_size
from simmim.finetune.segmentation.views import RandomScene, SceneSamples, WholeScene, largest_share, nearest_crop

SCHEME = ClassScheme(tuple("abcdefgh"), tuple(range(8)), 255)


def view_of(**changes):
    defaults = dict(size=(32, 40), short_side=0, scale=(0.5, 2.0), class_share=1.0, flip=0.5, fill=(7, 8, 9), ignored_id=255)
    return RandomScene(**{**defaults, **changes})


def scene(height=60, width=90, block=15):
    """A picture of flat blocks, the color of which is determined by their class, and its label map."""
    label_map = np.add.outer(np.arange(height) // block * 3, np.arange(width) // block).astype(np.uint8) % 8
    pixels = np.stack([label_map * 30, 255 - label_map * 30, label_map * 20 + 10], axis=-1).astype(np.uint8)
    return Picture(Image.fromarray(pixels), 3), label_map


def inner(labels):
    """Pixels whose neighbors within two pixels are of the same class, where bilinear filters show pure colors."""
    known = labels.float()[None, None]
    padded = F.pad(known, (2, 2, 2, 2), value=-1)
    return ((F.max_pool2d(padded, 5, 1) == known) & (-F.max_pool2d(-padded, 5, 1) == known))[0, 0]


@pytest.mark.parametrize("seed", range(25))
def test_image_and_label_map_stay_in_step(seed):
    """The colors of the view are those of its classes, at any scale, position and side."""
    picture, label_map = scene()
    image, labels = view_of()(picture, label_map, random.Random(seed))
    assert image.shape == (3, 32, 40) and image.dtype == torch.uint8 and labels.shape == (32, 40)
    pure = inner(labels) & (labels != 255)
    assert pure.sum() > 50
    expected = labels[pure].long() * 30
    assert (image[0][pure].long() - expected).abs().max() <= 2
    filled = labels == 255
    assert all((image[channel][filled] == value).all() for channel, value in enumerate((7, 8, 9)))


def test_scale_flip_and_position_vary_and_follow_from_the_generator():
    picture, label_map = scene()
    views = [view_of()(picture, label_map, random.Random(seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(views[0], views[1]))
    assert not torch.equal(views[0][1], views[2][1])
    plain = view_of(scale=(1.0, 1.0), flip=0.0, size=(60, 90))(picture, label_map, random.Random(0))
    assert np.array_equal(plain[1].numpy(), label_map)
    assert torch.equal(plain[0], picture.crop((0, 0, 90, 60), (60, 90)))
    flipped = view_of(scale=(1.0, 1.0), flip=1.0, size=(60, 90))(picture, label_map, random.Random(0))
    assert torch.equal(flipped[0].flip(-1), plain[0]) and torch.equal(flipped[1].flip(-1), plain[1])


def test_small_images_are_padded_to_the_right_and_below():
    picture, label_map = scene(20, 30, 5)
    image, labels = view_of(scale=(1.0, 1.0), flip=0.0)(picture, label_map, random.Random(0))
    assert np.array_equal(labels[:20, :30].numpy(), label_map)
    assert (labels[20:] == 255).all() and (labels[:, 30:] == 255).all()
    assert torch.equal(image[:, :20, :30], picture.crop((0, 0, 30, 20), (20, 30)))


def test_sizes_at_the_model_s_scale():
    assert scaled_size((60, 90), 30) == (30, 45)
    assert scaled_size((90, 60), 30, 2.0) == (90, 60)
    assert scaled_size((60, 90), 0) == (60, 90)
    assert scaled_size((1, 1000), 10, 0.01) == (1, 100)


@pytest.mark.parametrize("scaled", [(60, 90), (30, 45), (120, 180), (7, 200), (61, 37)])
def test_nearest_is_the_pixel_at_the_center(scaled):
    """Against torch's nearest-exact over the whole label map."""
    _, label_map = scene(block=1)
    whole = F.interpolate(torch.from_numpy(label_map)[None, None].double(), scaled, mode="nearest-exact")[0, 0].numpy()
    assert np.array_equal(nearest_crop(label_map, scaled, (0, 0), scaled), whole)
    part = nearest_crop(label_map, scaled, (2, 5), (4, 20))
    assert np.array_equal(part, whole[2:6, 5:25])


def test_crops_of_one_class_are_drawn_again():
    """One object in a large background: without the rule few crops hold it."""
    label_map = np.zeros((200, 200), dtype=np.uint8)
    label_map[90:110, 90:110] = 1
    picture = Picture(Image.fromarray(label_map * 200), 1)
    held = {}
    for share in (0.9, 1.0):
        view = view_of(size=(24, 24), scale=(1.0, 1.0), fill=(0,), flip=0.0, class_share=share)
        held[share] = sum((view(picture, label_map, random.Random(seed))[1] == 1).any() for seed in range(60))
    assert held[0.9] > 3 * max(held[1.0], 1)
    assert largest_share(np.array([[0, 0], [1, 255]], dtype=np.uint8), 255) == pytest.approx(2 / 3)
    assert largest_share(np.array([[0, 0], [0, 255]], dtype=np.uint8), 255) == 1.0


@pytest.fixture
def folder(tmp_path):
    """Five scenes of different heights in images/ and masks/."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for number in range(5):
        picture, label_map = scene(40 + number, 50)
        picture.image.save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(label_map).save(tmp_path / "masks" / f"{number}.png")
    return tmp_path


def test_samples_follow_from_seed_epoch_and_index(folder):
    source = read_scenes(str(folder))["train"]
    first, second = (SceneSamples(source, view_of(), SCHEME, 3, seed=3, keep_decoded=keep) for keep in (False, True))
    for key in ((0, 1), (4, 1), (0, 3)):
        for name in ("image", "label_map", "seed"):
            a, b = first[key][name], second[key][name]
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not torch.equal(first[0, 1]["label_map"], first[1, 1]["label_map"])
    batch = collate([first[0, index] for index in range(4)])
    assert batch["image"].shape == (4, 3, 32, 40) and batch["label_map"].shape == (4, 32, 40)


def test_an_unreadable_image_is_replaced_with_its_label_map(folder):
    (folder / "images" / "2.png").write_bytes(b"torn")
    source = read_scenes(str(folder))["train"]
    sample = SceneSamples(source, WholeScene(0), SCHEME, 3, seed=0)[0, 2]
    assert [path for path, _ in sample["skipped"]] == [str(folder / "images" / "2.png")]
    assert sample["image"].shape[1:] == sample["label_map"].shape


def test_a_label_map_of_another_size_than_its_image_is_unreadable(folder):
    """Height and width are not exchanged: a transposed label map does not fit."""
    Image.fromarray(scene(40, 50)[1].T.copy()).save(folder / "masks" / "0.png")
    sample = SceneSamples(read_scenes(str(folder))["train"], WholeScene(0), SCHEME, 3, seed=0)[0, 0]
    ((_, reason),) = sample["skipped"]
    assert "its label map has changed and is 50x40 pixels now (height x width)" in reason


def test_evaluation_shows_the_whole_image_and_its_label_map_unchanged(folder):
    source = read_scenes(str(folder))["train"]
    sample = SceneSamples(source, WholeScene(20), SCHEME, 3, seed=0)[0, 1]
    assert sample["image"].shape == (3, 20, 24)
    assert np.array_equal(sample["label_map"].numpy(), scene(41, 50)[1])
