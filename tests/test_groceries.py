"""benchmarks/groceries.py, from a clone of the data set to folders of images."""

import groceries
import pytest
from PIL import Image

from simmim.data import open_images


@pytest.fixture
def clone(tmp_path):
    """Three photographs to learn from, one to choose by, and two to judge by, one of a class that is not to learn."""
    apples = "Fruit/Apple/Pink-Lady/Pink-Lady_001.jpg", "Fruit/Apple/Royal-Gala/Royal-Gala_001.jpg"
    paths = {
        "train": [*apples, "Vegetables/Leek/Leek_001.jpg"],
        "val": ["Vegetables/Leek/Leek_002.jpg"],
        "test": [apples[0], "Vegetables/Mushroom/Mushroom_001.jpg"],
    }
    root = tmp_path / "clone" / "dataset"
    for part, names in paths.items():
        for name in names:
            file = root / part / name
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (400, 300))
            exif = image.getexif()
            exif[0x0112] = 6  # to be turned by a quarter
            image.save(file, exif=exif)
        (root / f"{part}.txt").write_text("".join(f"{part}/{name}, 3, 0\n" for name in names))
    return tmp_path / "clone"


def test_folders(clone, tmp_path):
    out = tmp_path / "groceries"
    assert groceries.main(["--source", str(clone), "--out", str(out)]) == 0
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*.jpg"))
    assert files == [
        "development/train/Apple/Pink-Lady_001.jpg",
        "development/train/Apple/Royal-Gala_001.jpg",
        "development/train/Leek/Leek_001.jpg",
        "development/validation/Leek/Leek_002.jpg",
        "labeled/test/Apple/Pink-Lady_001.jpg",
        "labeled/train/Apple/Pink-Lady_001.jpg",
        "labeled/train/Apple/Royal-Gala_001.jpg",
        "labeled/train/Leek/Leek_001.jpg",
        "unlabeled/Leek_001.jpg",
        "unlabeled/Pink-Lady_001.jpg",
        "unlabeled/Royal-Gala_001.jpg",
    ]
    with Image.open(out / "unlabeled" / "Leek_001.jpg") as image:
        assert image.size == (192, 256)
    assert len(open_images(str(out / "unlabeled"))) == 3


def test_wrong_input(clone, tmp_path, capsys):
    assert groceries.main(["--source", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no dataset/train.txt" in capsys.readouterr().err
    assert groceries.main(["--source", str(clone), "--out", str(clone)]) == 2
    assert "exists; give a new folder" in capsys.readouterr().err
