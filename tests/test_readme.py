"""Every command and piece of Python in the README and its pages runs as it stands, in order, on real digits and scenes."""

import json
import re
import shlex
import shutil
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from fork_server import finish
from image_files import noise, write_idx_files
from PIL import Image

from simmim.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ("pretraining", "few-labels", "images", "results")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in DOCS)]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
# Only what takes long is shortened, and what may be missing on a machine replaced; everything else is the README's. By the
# fence of the block and the command.
ONE_EPOCH = "--epochs 1 --optim.warmup-epochs 0 --workers 0"
FEW_SECONDS = "--time 1s --preset nano --image-size 32 --batch-size 4 --workers 0"
SHORTER = {
    "console": {
        "pretrain": "--epochs 1 --batch-size 48 --workers 0 --model.encoder.embed_dim 16 --model.encoder.num_heads [1,2]",
        "finetune": "--epochs 1 --batch-size 40 --workers 0",
        "study": "--labels 2 --seeds 2 --folds 2 --steps 2 --batch-size 20 --lr-factors [1] --layer-decays []",
        "probe": "--seeds 2",
    },
    "sh": {
        "pretrain": ONE_EPOCH,
        "study": "--labels 1 --seeds 2 --steps 1 --batch-size 10 --lr-factors [1]",
        "benchmarks/fashion_mnist.py": "--source source --test 20",
        "benchmarks/scenes.py": "--objects digits --photos sklearn --unlabeled 20 --train 36 --validation 4",
        "benchmarks/segmentation.py": "--labels 16 --seeds 2 --lr-factors [1] --layer-decays [] --steps 1",
        "benchmarks/detection.py": "--labels 16 --seeds 2 --steps 1",
    },
}
NOT_RUN = {
    "make demo": "tests/test_demo.py runs simmim demo, shortened",
    ". .venv/bin/activate": "a shell's own",
}


def commands(fence):
    """The words of every command in the blocks of one kind."""
    for block in re.findall(rf"```{fence}\n(.*?)```", TEXT, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and " ".join(words) not in NOT_RUN:
                yield words


def run_commands(fence, folder, monkeypatch):
    """Run the commands of all blocks of one kind in a folder, in this process, and return their number."""
    monkeypatch.chdir(folder)
    # Trials in this process: starting others takes longer than the trials.
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())
    num_run = 0
    for words in commands(fence):
        if words[0].endswith("simmim"):
            command, run, words = words[1], main, words[1:]
        else:
            assert words[0] == "python"
            command, run, words = words[1], import_module(Path(words[1]).stem).main, words[2:]
        short = "" if "--print_config" in words else SHORTER[fence].get(command, "")
        if "--time" in words:  # in place of epochs
            short = FEW_SECONDS
        try:
            assert run([*words, *short.split()]) in (0, None), (command, words)
        except SystemExit as done:  # --print_config
            assert not done.code, (command, words)
        num_run += 1
    return num_run


@pytest.fixture(scope="module")
def place(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(digits.unlabeled, folder / "photos")
    shutil.copytree(digits.labeled, folder / "labeled")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_scenes(folder / "scenes", sorted(digits.unlabeled.iterdir())[::8])
    write_objects(folder / "objects", sorted(digits.unlabeled.iterdir())[::8])
    return folder


def write_scenes(folder, files):
    """Images and masks: what is ink and what is not."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "classes.txt").write_text("paper\nink\n")
    for file in files:
        shutil.copy(file, folder / "images")
        Image.open(file).point(lambda value: int(value > 100)).save(folder / "masks" / file.name)


def write_objects(folder, files):
    """Images and the boxes around their ink, as COCO JSON."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    labels = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "digit"}]}
    for number, file in enumerate(files):
        shutil.copy(file, folder / "images")
        x1, y1, x2, y2 = Image.open(file).point(lambda value: 255 * int(value > 100)).getbbox()
        labels["images"].append({"id": number, "file_name": file.name})
        box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1}
        labels["annotations"].append({"id": number, "image_id": number, **box})
    (folder / "annotations" / "train.json").write_text(json.dumps(labels))


def write_groceries(folder):
    """A clone of the groceries' data set: two classes, six photographs of each to learn from and two to judge by."""
    for part, count in (("train", 6), ("val", 1), ("test", 2)):
        paths = [f"{part}/Fruit/{name}/{name}_{part}{number}.jpg" for name in ("Apple", "Kiwi") for number in range(count)]
        for path, pixels in zip(paths, noise(len(paths), 40, 50)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / path)
        (folder / f"{part}.txt").write_text("\n".join(paths))


def test_commands_then_python(place, fork_server, monkeypatch):
    assert run_commands("console", place, monkeypatch) == 28
    assert (place / "grid.png").is_file()
    assert (place / "predictions.csv").is_file()
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 2
    # One process for all blocks: what one defines the next may use.
    finish([fork_server.start("--version", prelude="\n".join(blocks), cwd=place)])


def test_commands_of_the_tables(tmp_path, monkeypatch, capsys):
    """The comparisons of the README and its pages, from the source to the table."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    labels = np.arange(40, dtype=np.uint8) % 10
    write_idx_files(tmp_path / "source", {name: (noise(40, 28, 28), labels) for name in ("train", "t10k")})
    write_groceries(tmp_path / "GroceryStoreDataset" / "dataset")
    assert run_commands("sh", tmp_path, monkeypatch) == 10
    assert (tmp_path / "runs/fashion-study/results.csv").is_file()
    assert (tmp_path / "runs/groceries-study/results.csv").is_file()
    assert len(re.findall(r"^\| 16 \| .* \| .* \| .* \| 2 \|", capsys.readouterr().out, re.M)) == 2  # masks, boxes


def test_commands_for_many_devices():
    """Those of docs/scaling.md plan, or have settings that are known."""
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    found = [shlex.split(line[line.index("simmim") :])[1:] for line in lines if "simmim" in line]
    assert {words[0] for words in found} == {"plan", "pretrain"} and len(found) == 5
    for words in found:
        if words[0] == "plan":
            assert main(words) == 0
            continue
        with pytest.raises(SystemExit) as done:
            main([word for word in words if word != "--resume"] + ["--print_config"])
        assert not done.value.code, words


def test_commands_of_the_benchmarks_are_known():
    """Those that make the figures: every flag is one of its script, and every setting one of its command."""
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w+\n(.*?)^```$", text, re.S | re.M)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:benchmarks/)?\w+\.py --[^`]*)`", " ".join(text.split()))
    num_scripts = num_commands = 0
    for words in (shlex.split(line, comments=True) for line in lines):
        if any(word.endswith("/simmim") for word in words):
            with pytest.raises(SystemExit) as done:
                main([*words[1:], "--print_config"])
            assert not done.value.code, words
            num_commands += 1
        for script in (word for word in words if word.endswith(".py")):
            source = (ROOT / "benchmarks" / Path(script).name).read_text(encoding="utf-8")
            passed_on = ("--init", "--out") if "parse_known_args" in source else ()  # to the study that it calls
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            assert all(f'"{flag}"' in source or flag in passed_on for flag in flags), words
            num_scripts += 1
    assert num_scripts >= 15 and num_commands == 4


def test_every_block_is_known():
    """A block of another kind would run in no test."""
    assert set(re.findall(r"^```(\S+)$", TEXT, re.M)) == {"console", "sh", "python"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_links_to_is_there(page):
    for link in re.findall(r"\]\((?!http|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
