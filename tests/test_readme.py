"""Every command and every piece of Python in the README runs as it stands there, in order, on real digits."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from fork_server import finish
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Only what takes long is shortened; everything else is the README's.
SHORTER = {
    "pretrain": shlex.split("--epochs 1 --batch-size 48 --model.encoder.embed_dim 16 --model.encoder.num_heads [1,2]"),
    "finetune": shlex.split("--epochs 1 --batch-size 40"),
    "study": shlex.split("--labels 1,2 --seeds 2 --folds 2 --steps 2 --batch-size 20"),
}


def commands():
    for block in re.findall(r"```console\n(.*?)```", README, re.S):
        for line in block.splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[0].endswith("simmim"):
                yield words[1:]


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(digits.unlabeled, folder / "photos")
    shutil.copytree(digits.labeled, folder / "labeled")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_scenes(folder / "scenes", sorted(digits.unlabeled.iterdir())[::8])
    return folder


def write_scenes(folder, files):
    """Images and masks: what is ink and what is not."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("paper\nink\n")
    for file in files:
        shutil.copy(file, folder / "images")
        Image.open(file).point(lambda value: int(value > 100)).save(folder / "masks" / file.name)


def test_commands_then_python(place, fork_server):
    count = 0
    for words in commands():
        short = () if "--print_config" in words else SHORTER.get(words[0], ())
        finish([fork_server.start(*words, *short, cwd=place)])
        count += 1
    assert count == 21
    assert (place / "grid.png").is_file()
    assert (place / "predictions.csv").is_file()
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    # One process for all blocks: what one defines the next may use.
    finish([fork_server.start("--version", prelude="\n".join(blocks), cwd=place)])


def test_what_the_readme_links_to_is_there():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
