"""Images from a folder to batches: what is found, how files become pixels, and who sees which sample when."""

import itertools
import os
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import (
    UNREADABLE,
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
    measure_images,
    open_picture,
    read_image,
    read_labeled_images,
)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder, count, size=(32, 32), first=0):
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{first + number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(random_pixels(*size, 3, seed=first + number)).save(path)
    return [str(path) for path in paths]


def write_empty(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def record(path):
    return {"path": str(path), "bytes": None}


def pixels_of(path, channels=3):
    return np.asarray(read_image(record(path), channels))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_images_are_found_wherever_they_lie(tmp_path):
    """Nested, upper case, odd names, uncommon extensions; sorted by path; nothing hidden and nothing else."""
    images = ["b.png", "a/z.JPG", "a/deep/er/x.tiff", "ä ö %2F.jpeg", "a.b.webp", "new\nline.pgm", "-f.bmp", "#.jfif"]
    write_empty(*(tmp_path / name for name in images))
    hidden = [".hidden.png", ".folder/x.png", "a/.thumbs/y.jpg"]
    write_empty(*(tmp_path / name for name in [*hidden, "notes.txt", "png", "x.png.part", "a/z.json"]))
    assert find_images(tmp_path) == sorted(str(tmp_path / name) for name in images)
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_links_are_followed_once(tmp_path):
    """A loop ends, a folder reached twice counts once, a linked file and a folder elsewhere count, a dead link does not
    stop the search."""
    write_empty(tmp_path / "set/a/1.png", tmp_path / "elsewhere/2.png")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(".")
    (tmp_path / "set/again").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/dead").symlink_to(tmp_path / "nowhere")
    found = find_images(tmp_path / "set")
    assert sorted(os.path.basename(path) for path in found) == ["1.png", "2.png"]
    assert found == sorted(found)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    write_empty(tmp_path / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images("~") == [str(tmp_path / "x.png")]


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    write_empty(*(tmp_path / name for name in ("text/a.txt", "text/deep/b.csv", "hidden/.x.png", "file.png")))
    for name, message in {
        "missing": "missing' does not exist: give a folder that holds images",
        "empty": "empty' is empty: give one with images .avif, bmp, gif, .* nested",
        "hidden": "hidden' is empty",
        "text": "text' holds 2 files but no image: give one with images",
        "file.png": "file.png' is a file: give a folder that holds images",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_images(tmp_path / name)


def paths_and_labels(part):
    return list(zip([row["path"] for row in part["image"]], part["label"]))


def test_plain_class_folders_hold_out_a_fifth_of_each(tmp_path):
    for name, count in {"cat": 10, "dog": 5, "ant": 2, "bee": 19}.items():
        write_empty(*(tmp_path / name / f"{number}.png" for number in range(count)))
    labels = read_labeled_images(tmp_path, None, seed=0)
    assert labels.classes == ("ant", "bee", "cat", "dog")
    train, validation = paths_and_labels(labels.train), paths_and_labels(labels.validation)
    assert Counter(label for _, label in validation) == {0: 1, 1: 3, 2: 2, 3: 1}
    assert Counter(label for _, label in train) == {0: 1, 1: 16, 2: 8, 3: 4}
    assert sorted(path for path, _ in train + validation) == find_images(tmp_path)
    assert all(path.split("/")[-2] == labels.classes[label] for path, label in train + validation)


def test_labels_follow_the_seed(tmp_path):
    """Same seed, same labels; another seed, others. The hold-out does not depend on how many labels are used, and never
    meets them."""
    for name in ("a", "b", "c"):
        write_empty(*(tmp_path / name / f"{number:02d}.png" for number in range(20)))
    for count in (1, 5, 16):
        labels = read_labeled_images(tmp_path, count, seed=3)
        train, validation = paths_and_labels(labels.train), paths_and_labels(labels.validation)
        assert Counter(label for _, label in train) == {0: count, 1: count, 2: count}
        assert not set(train) & set(validation) and len(set(train)) == 3 * count
        again = read_labeled_images(tmp_path, count, seed=3)
        assert (paths_and_labels(again.train), paths_and_labels(again.validation)) == (train, validation)
        assert paths_and_labels(read_labeled_images(tmp_path, None, seed=3).validation) == validation
    other = read_labeled_images(tmp_path, 5, seed=4)
    assert paths_and_labels(other.train) != paths_and_labels(read_labeled_images(tmp_path, 5, seed=3).train)
    assert paths_and_labels(other.validation) != validation


@pytest.mark.parametrize("validation_name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders(tmp_path, validation_name):
    """With folders for both nothing is held out, and the seed decides the labels alone."""
    for name in ("x", "y"):
        write_empty(*(tmp_path / "train" / name / f"{number}.png" for number in range(6)))
        write_empty(*(tmp_path / validation_name / name / f"v{number}.png" for number in range(3)))
    labels = read_labeled_images(tmp_path, None, seed=0)
    assert labels.classes == ("x", "y")
    assert [path for path, _ in paths_and_labels(labels.train)] == find_images(tmp_path / "train")
    assert [path for path, _ in paths_and_labels(labels.validation)] == find_images(tmp_path / validation_name)
    some = [paths_and_labels(read_labeled_images(tmp_path, 2, seed).train) for seed in (0, 0, 1)]
    assert some[0] == some[1] != some[2] and Counter(label for _, label in some[0]) == {0: 2, 1: 2}
    for seed in (0, 1):
        assert read_labeled_images(tmp_path, 2, seed).validation["label"][:] == [0] * 3 + [1] * 3


def test_class_called_test_is_a_class(tmp_path):
    """Without a train folder beside it, `test` is a class like another."""
    write_empty(*(tmp_path / name / f"{number}.png" for name in ("test", "flight") for number in range(5)))
    assert read_labeled_images(tmp_path, None, 0).classes == ("flight", "test")


@pytest.mark.parametrize("count", [0, 9, 50])
def test_more_labels_than_images(tmp_path, count):
    write_empty(*(tmp_path / "many" / f"{number}.png" for number in range(100)))
    write_empty(*(tmp_path / "few" / f"{number}.png" for number in range(10)))
    message = f"{count} labels per class asked for, class 'few' has 8 training images: give 1 to 8"
    with pytest.raises(ValueError, match=message):
        read_labeled_images(tmp_path, count, 0)


def test_class_folders_that_cannot_work(tmp_path):
    write_empty(*(tmp_path / "one/a" / f"{number}.png" for number in range(3)))
    write_empty(tmp_path / "single/a/1.png", tmp_path / "single/b/1.png", tmp_path / "single/b/2.png")
    write_empty(tmp_path / "blank/a/1.png", tmp_path / "blank/a/2.png")
    (tmp_path / "blank/b").mkdir()
    write_empty(*(tmp_path / "other" / part / "1.png" for part in ("train/a", "train/b", "val/a", "val/c")))
    for name, message in {
        "missing": "missing' does not exist: give a folder with one subfolder a class",
        "one": "one' has 1 class folder: give at least two",
        "one/a": "a' has 0 class folders: give at least two",
        "single": "class 'a' has 1 image: give at least 2",
        "blank": "b' is empty",
        "other": "classes differ between .*: only in one of them: b, c",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_labeled_images(tmp_path / name, None, 0)


# --- decoding --------------------------------------------------------------------------------------------------------


def gray_of(rgb):
    """ITU-R 601 luma by hand; the last bit is a matter of rounding."""
    return rgb.astype(np.float64) @ (0.299, 0.587, 0.114)


def over_white(values, alpha):
    alpha = alpha.astype(np.float64)[..., None] / 255
    return values * alpha + 255 * (1 - alpha)


def assert_close(actual, expected, within=1.0):
    assert actual.shape == expected.shape and actual.dtype == np.uint8
    assert np.abs(actual.astype(np.float64) - expected).max() <= within


def test_gray_and_color(tmp_path):
    gray, rgb = random_pixels(7, 5), random_pixels(7, 5, 3, seed=1)
    Image.fromarray(gray).save(tmp_path / "l.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    assert np.array_equal(pixels_of(tmp_path / "l.png", 1), gray)
    assert np.array_equal(pixels_of(tmp_path / "l.png"), np.stack([gray] * 3, axis=-1))
    assert np.array_equal(pixels_of(tmp_path / "rgb.png"), rgb)
    assert_close(pixels_of(tmp_path / "rgb.png", 1), gray_of(rgb))
    data = (tmp_path / "rgb.png").read_bytes()
    assert np.array_equal(np.asarray(read_image({"path": None, "bytes": data}, 3)), rgb)


def test_bilevel(tmp_path):
    bits = random_pixels(9, 11) > 127
    Image.fromarray(bits).save(tmp_path / "1.png")
    assert Image.open(tmp_path / "1.png").mode == "1"
    assert np.array_equal(pixels_of(tmp_path / "1.png", 1), bits * np.uint8(255))


def test_transparency_is_laid_over_white(tmp_path):
    rgb, gray, alpha = random_pixels(8, 8, 3), random_pixels(8, 8, seed=1), random_pixels(8, 8, seed=2)
    alpha[0], alpha[1] = 0, 255
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    Image.fromarray(np.dstack([gray, alpha]), "LA").save(tmp_path / "la.png")
    assert [Image.open(tmp_path / name).mode for name in ("rgba.png", "la.png")] == ["RGBA", "LA"]
    shown = pixels_of(tmp_path / "rgba.png")
    assert (shown[0] == 255).all() and np.array_equal(shown[1], rgb[1])
    assert_close(shown, over_white(rgb, alpha))
    assert_close(pixels_of(tmp_path / "la.png", 1), over_white(gray[..., None], alpha)[..., 0], within=1.5)


def test_palette_with_and_without_transparency(tmp_path):
    palette, indices = random_pixels(4, 3, seed=5), random_pixels(6, 6) % 4
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "p.png")
    image.save(tmp_path / "one.png", transparency=2)
    image.save(tmp_path / "each.png", transparency=bytes([0, 100, 255, 30]))
    image.save(tmp_path / "p.gif", transparency=1)
    rgb = palette[indices]
    assert Image.open(tmp_path / "one.png").mode == "P"
    assert np.array_equal(pixels_of(tmp_path / "p.png"), rgb)
    assert np.array_equal(pixels_of(tmp_path / "one.png"), np.where((indices == 2)[..., None], 255, rgb))
    assert np.array_equal(pixels_of(tmp_path / "p.gif"), np.where((indices == 1)[..., None], 255, rgb))
    assert_close(pixels_of(tmp_path / "each.png"), over_white(rgb, np.array([0, 100, 255, 30])[indices]))


def test_one_transparent_color(tmp_path):
    """PNG's tRNS in gray and RGB files: that color is see-through, others are not."""
    gray, rgb = random_pixels(6, 6), random_pixels(6, 6, 3, seed=1)
    Image.fromarray(gray).save(tmp_path / "l.png", transparency=int(gray[2, 3]))
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=tuple(map(int, rgb[1, 4])))
    assert np.array_equal(pixels_of(tmp_path / "l.png", 1), np.where(gray == gray[2, 3], 255, gray))
    seen_through = (rgb == rgb[1, 4]).all(axis=-1, keepdims=True)
    assert np.array_equal(pixels_of(tmp_path / "rgb.png"), np.where(seen_through, 255, rgb))


def test_cmyk(tmp_path):
    inks = random_pixels(8, 8, 4)
    Image.fromarray(inks, "CMYK").save(tmp_path / "cmyk.tif")
    assert Image.open(tmp_path / "cmyk.tif").mode == "CMYK"
    white, ink = 255 - inks[..., :3].astype(np.float64), inks[..., 3:].astype(np.float64)
    assert_close(pixels_of(tmp_path / "cmyk.tif"), white * (255 - ink) / 255)


@pytest.mark.parametrize(
    "name, kind", [("16.png", np.uint16), ("16.tif", np.uint16), ("32.tif", np.int32), ("f.tif", np.float32)]
)
def test_deep_images_are_scaled_by_their_range(tmp_path, name, kind):
    values = np.random.default_rng(0).uniform(300, 40_000, (9, 7))
    values = (values / 1e4 - 2 if kind is np.float32 else values).astype(kind)
    Image.fromarray(values).save(tmp_path / name)
    assert Image.open(tmp_path / name).mode[0] in "IF"
    low, high = values.min().astype(np.float64), values.max().astype(np.float64)
    shown = pixels_of(tmp_path / name, 1)
    assert_close(shown, (values - low) / (high - low) * 255, within=0.5 + 1e-4)
    assert shown.min() == 0 and shown.max() == 255
    assert np.array_equal(pixels_of(tmp_path / name)[..., 1], shown)


def test_deep_images_without_contrast_and_with_holes(tmp_path):
    Image.fromarray(np.full((4, 4), 777, dtype=np.uint16)).save(tmp_path / "flat.png")
    assert (pixels_of(tmp_path / "flat.png", 1) == 0).all()
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    values[1, 1] = np.nan
    Image.fromarray(values).save(tmp_path / "hole.tif")
    shown = pixels_of(tmp_path / "hole.tif", 1)
    assert shown[1, 1] == 0 and shown[3, 3] == 255 and shown[2, 0] == round(8 / 15 * 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A picture stored as EXIF's orientation says comes out upright, pixel by pixel."""
    upright = random_pixels(6, 10, 3, seed=orientation)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    assert Image.open(tmp_path / "x.png").getexif()[0x0112] == orientation
    assert np.array_equal(pixels_of(tmp_path / "x.png"), upright)


def broken_files(folder):
    """Paths of files that no reader can make an image of."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(random_pixels(64, 64, 3)).save(folder / "whole.png")
    Image.fromarray(random_pixels(64, 64, 3)).save(folder / "whole.jpg")
    for kind in ("png", "jpg"):
        whole = folder / f"whole.{kind}"
        (folder / f"cut.{kind}").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        whole.unlink()
    (folder / "text.png").write_text("not a picture, whatever its name says")
    (folder / "empty.jpg").touch()
    (folder / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "folder.png").mkdir()
    return sorted(str(path) for path in folder.iterdir())


def test_broken_files_are_unreadable(tmp_path):
    paths = [*broken_files(tmp_path), str(tmp_path / "gone.png")]
    assert len(paths) == 7
    for path in paths:
        with pytest.raises(UNREADABLE):
            read_image(record(path), 3)


def test_decompression_bombs_are_unreadable(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    with pytest.raises(UNREADABLE, match="10000 pixels, more than the limit of 9999"):
        open_picture(record(tmp_path / "bomb.png"), 1, max_pixels=9999)


# --- image statistics ----------------------------------------------------------------------------------------------------


def survey_of(folder, **arguments):
    return measure_images(dataset_from_paths(find_images(folder)), **arguments)


def test_survey_of_small_images(tmp_path):
    """Up to 64 px nothing is scaled down, and the statistics are those of all pixels."""
    sizes = [(20, 30), (64, 40), (50, 10)]
    arrays = [random_pixels(*size, 3, seed=index) // (index + 1) for index, size in enumerate(sizes)]
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    seen = survey_of(tmp_path)
    pixels = np.concatenate([array.reshape(-1, 3) for array in arrays]) / 255
    assert (seen.channels, seen.short_side_px) == (3, 20)
    assert seen.mean == pytest.approx(pixels.mean(axis=0), abs=6e-4)
    assert seen.std == pytest.approx(pixels.std(axis=0), abs=6e-4)
    assert seen.decoded_mib == pytest.approx(len(pixels) * 3 / 2**20)


def test_survey_tells_gray_from_color(tmp_path):
    gray = random_pixels(28, 28)
    Image.fromarray(gray).save(tmp_path / "0.png")
    Image.fromarray(gray > 127).save(tmp_path / "1.png")
    Image.fromarray(np.dstack([gray, np.full_like(gray, 255)]), "LA").save(tmp_path / "2.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "3.png")
    Image.fromarray(gray.astype(np.float32)).save(tmp_path / "4.tif")
    assert survey_of(tmp_path).channels == 1 and len(survey_of(tmp_path).mean) == 1
    assert survey_of(tmp_path, channels=3).channels == 3 and len(survey_of(tmp_path, channels=3).std) == 3
    Image.fromarray(random_pixels(28, 28, 3)).save(tmp_path / "5.png")
    assert survey_of(tmp_path).channels == 3
    assert survey_of(tmp_path, channels=1).channels == 1


def test_survey_of_gray_images(tmp_path):
    arrays = [random_pixels(28, 28, seed=seed) // 3 for seed in range(4)]
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{index}.png")
    seen = survey_of(tmp_path)
    assert seen.mean == pytest.approx((np.stack(arrays).mean() / 255,), abs=6e-4)
    assert seen.std == pytest.approx((np.stack(arrays).std() / 255,), abs=6e-4)
    assert seen.decoded_mib == pytest.approx(4 * 28 * 28 / 2**20)
    Image.new("L", (28, 28)).save(tmp_path / "flat.png")
    for index in range(4):
        (tmp_path / f"{index}.png").unlink()
    assert survey_of(tmp_path).std == (0.01,), "a deviation to divide by is never 0"


def test_survey_passes_over_broken_images(tmp_path):
    broken_files(tmp_path / "set")
    (tmp_path / "set" / "folder.png").rmdir()
    with pytest.raises(ValueError, match=r"none of 5 sampled images can be read; the first, .*cut.jpg: "):
        survey_of(tmp_path / "set")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "set" / "good.png")
    seen = survey_of(tmp_path / "set")
    assert (seen.short_side_px, seen.mean) == (30, (1.0, 0.0, 0.0))


def test_survey_takes_an_even_sample(tmp_path):
    """The first and last are in it; the share of all memory is extrapolated."""
    for index in range(20):
        height, value = (90, 255) if index in (0, 19) else (10, 0)
        Image.new("L", (10, height), value).save(tmp_path / f"{index:02d}.png")
    seen = survey_of(tmp_path, sampled=2)
    assert seen.mean == (1.0,) and seen.short_side_px == 10
    assert seen.decoded_mib == pytest.approx(20 * 900 / 2**20)


# --- samples and their order -----------------------------------------------------------------------------------------


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
