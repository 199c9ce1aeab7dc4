"""The command: help, exit codes, and wrong input refused in one line with exit code 2 and nothing written."""

import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim.checkpoints import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.cli.main import COMMANDS
from simmim.cli.train import next_steps, pretrain_settings
from simmim.encoders.swinv2 import SwinV2, SwinV2Config

ROOT = Path(__file__).resolve().parent.parent


def in_subprocess(*arguments, cwd):
    """The command in a process of its own, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "simmim.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


def write_images(folder, count=8):
    folder.mkdir(parents=True)
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the refused calls below name."""
    here = tmp_path_factory.mktemp("cli")
    write_images(here / "images")
    for name in ("a", "b"):
        write_images(here / "labeled" / name, 4)
    write_images(here / "one" / "a", 2)
    for part in ("train", "test"):
        for name in ("a", "b"):
            write_images(here / "split" / part / name, 4)
    for name in ("a", "b"):
        (here / "torn" / name).mkdir(parents=True)
        for number in range(2):
            (here / "torn" / name / f"{number}.png").write_text("no image")
    for name in ("images", "masks"):
        write_images(here / "scenes" / name, 2)
    (here / "half" / "b").mkdir(parents=True)
    write_images(here / "half" / "a", 4)
    for number in range(4):
        (here / "half" / "b" / f"{number}.png").write_text("no image")
    (here / "rows.csv").write_text("path,label\n")
    (here / "kept.csv").write_text("mine")
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("mine")
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("no image")
    (here / "model.pth").write_bytes(b"no encoder")
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("data: {path: images}\n")
    (here / "top.yaml").write_text("data: {path: images}\nout: new\nepoch: 3\n")
    (here / "nested.yaml").write_text("data: {path: images}\nout: new\nmodel: {mask_ration: 0.5}\n")
    (here / "data.yaml").write_text("data: {path: images, flop: 0.5}\nout: new\n")
    (here / "trainer.yaml").write_text("data: {path: images}\nout: new\ntrainer: {strateggy: ddp}\n")
    (here / "type.yaml").write_text("data: {path: images}\nout: new\nmodel: {mask_ratio: most}\n")
    (here / "broken.yaml").write_text("data: [\n")
    encoder = SwinV2(SwinV2Config(16, (1, 1), (2, 2), window_size=4))
    save_encoder(here / "encoder", encoder, Preprocessing((32, 32), (0.5,) * 3, (0.2,) * 3), {})
    return here


def listing(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


PRETRAIN = "pretrain --data images --out new"
FINETUNE = "finetune classification --data labeled --out new"
PROBE, KNN = "probe --run encoder --data split", "knn --run encoder --data split"


@pytest.mark.parametrize(
    "words, texts",
    [
        ("pretrian --data images", ["unknown command 'pretrian'", "did you mean 'pretrain'?"]),
        ("--data images", ["unknown command '--data'", "known: demo, check-data, pretrain"]),
        (f"{PRETRAIN} --model.mask_ration 0.5", ["unknown setting 'model.mask_ration'", "'model.mask_ratio'?"]),
        (f"{PRETRAIN} --model.mask-ration=0.5", ["unknown setting 'model.mask_ration'", "'model.mask_ratio'?"]),
        (f"{PRETRAIN} --mask-ratio 0.5", ["unknown setting 'mask_ratio'", "'model.mask_ratio'?"]),
        (f"{PRETRAIN} --batchsize 8", ["unknown setting 'batchsize'", "'batch_size'?"]),
        (f"{PRETRAIN} stray", ["unexpected word 'stray'"]),
        ("pretrain --config top.yaml", ["epoch"]),
        ("pretrain --config nested.yaml", ["unknown setting 'model.mask_ration'", "'model.mask_ratio'?"]),
        ("pretrain --config data.yaml", ["unknown setting 'data.flop'", "'data.flip'?"]),
        ("pretrain --config trainer.yaml", ["unknown setting 'trainer.strateggy'", "'trainer.strategy'?"]),
        ("pretrain --config type.yaml", ["mask_ratio", "most"]),
        ("pretrain --config broken.yaml", ["broken.yaml is not valid YAML: while parsing", "line 2"]),
        ("pretrain --config absent.yaml", ["absent.yaml' does not exist: --config takes a YAML file"]),
        (f"{PRETRAIN} --preset tyni", ["unknown preset 'tyni'", "did you mean 'tiny'?"]),
        (f"{PRETRAIN} --epochs many", ["epochs is 'many': give a number"]),
        (f"{PRETRAIN} --batch-size 1.5", ["batch_size is '1.5': give a whole number"]),
        (f"{PRETRAIN} --epochs -1", ["epochs is -1.0: give a positive number"]),
        (f"{PRETRAIN} --resume perhaps", ["resume is 'perhaps': give true or false"]),
        (f"{PRETRAIN} --data.flip 2", ["data.flip is 2.0: give a probability"]),
        (f"{PRETRAIN} --data.crop_scale [0.9,0.5]", ["data.crop_scale is (0.9, 0.5)"]),
        ("pretrain", ["missing: give --data and --out"]),
        (f"{PRETRAIN} --epoch 5", ["unknown setting 'epoch'; did you mean 'epochs'?"]),
        (f"{PRETRAIN} --devices many", ["devices is 'many'"]),
        (f"{PRETRAIN} --precision 17", ["precision '17' does not work here"]),
        (f"{PRETRAIN} --model.encoder.depths x", ["depths is 'x'"]),
        ("pretrain --data images --out images/0.png/run", ["'images/0.png/run' cannot be made (Not a directory)"]),
        ("pretrain --out absent --resume", ["no run to resume at 'absent'", "--data starts a run there"]),
        (f"{PRETRAIN} --image-size 0", ["image_size is 0"]),
        (f"{PRETRAIN} --model.mask_unit 0", ["mask unit is 0 px"]),
        (f"{PRETRAIN} --seed -1", ["seed is -1"]),
        (f"{PRETRAIN} --data.std [0]", ["data.std is (0.0,)"]),
        (f"{PRETRAIN} --trainer.max_epochs 3", ["is set by the run"]),
        (f"{PRETRAIN} --model.encoder.in_channels 4", ["in_channels is 4"]),
        ("pretrain --out new", ["missing: give --data"]),
        ("pretrain --data images", ["missing: give --out"]),
        ("pretrain --data absent --out new", ["'absent' does not exist: give a folder of images, a glob"]),
        ("pretrain --data empty --out new", ["image folder 'empty' is empty: give one with images"]),
        ("pretrain --data texts --out new", ["image folder 'texts' holds", "but no image"]),
        (f"{PRETRAIN} --model.mask_unit 12", ["does not divide an image of 32×32 px; units that do: 4, 8, 16"]),
        (f"{PRETRAIN} --image-size 30", ["no mask unit fits images of 30×30 px"]),
        (f"{PRETRAIN} --model.encoder.window_siz 4", ["unknown encoder setting 'window_siz'", "'window_size'?"]),
        (f"{PRETRAIN} --trainer.strateggy fsdp", ["unknown setting 'trainer.strateggy'", "'trainer.strategy'?"]),
        (f"{PRETRAIN} --optim.accumulate 3 --batch-size 8", ["does not divide", "give a multiple of 3"]),
        ("pretrain --data images --out full", ["folder 'full' is not empty and holds no run: give a new folder"]),
        ("pretrain --data images --out run", ["run folder 'run' is not empty; --resume goes on", "--overwrite"]),
        ("pretrain --data images --out full --overwrite", ["'full' holds no run", "left alone"]),
        ("pretrain --data images --out full --resume", ["'full' holds no run to resume"]),
        ("pretrain --data images --out run --resume --overwrite", ["resume and overwrite exclude each other"]),
        ("pretrain --data images --out model.pth", ["run folder 'model.pth' is a file"]),
        ("export --run absent --out new", ["no encoder at 'absent': there is no such file or folder"]),
        ("export --run images --out new", ["no encoder in 'images': expected encoder.safetensors and config.json"]),
        ("export --run model.pth --out new", ["model.pth is no"]),
        ("export --run encoder --out full", ["'full' exists and is not empty: give a new folder"]),
        ("export --run encoder --out model.pth", ["'model.pth' exists"]),
        ("export --run encoder --out new --format onxx", ["unknown format 'onxx'", "did you mean 'onnx'?"]),
        ("export --rum encoder --out new", ["unknown setting 'rum'", "'run'?"]),
        ("export --out new", ["missing: give --run"]),
        ("predict --run absent --images images --out new", ["no encoder at 'absent'"]),
        ("predict --run images --images images --out new", ["no encoder in 'images'"]),
        ("predict --run encoder --images images --out new", ["holds an encoder but no classifier"]),
        ("predict --run encoder --images images --out model.pth", ["'model.pth' exists: give a new file"]),
        ("reconstruct --run absent --images images --out new.png", ["no run at 'absent': expected absent/config.yaml"]),
        ("reconstruct --run images --images images --out new.png", ["no run at 'images'"]),
        ("reconstruct --run run --images images --out new.png", ["run 'run' is no pre-training run"]),
        ("reconstruct --run run --images images --out new.txt", ["'new.txt' is no picture's name: end it in .png"]),
        ("reconstruct --run run --images images --out new.png --count many", ["count is 'many': give a whole number"]),
        ("reconstruct --run run --images images --out new.png --count 0", ["count is 0: give 1 or more"]),
        ("finetune", ["which task?", "classification"]),
        ("finetune --data labeled", ["which task?"]),
        ("finetune classifcation --data labeled --out new", ["unknown task 'classifcation'", "'classification'?"]),
        ("finetune haiku --data labeled --out new", ["unknown task 'haiku'", "known: classification"]),
        ("finetune classification --data one --out new", ["has 1 class folder: give at least two"]),
        ("finetune classification --data absent --out new", ["labeled folder 'absent' does not exist"]),
        (f"{FINETUNE} --labels-per-class 0", ["0 labels per class asked for: give 1 or more"]),
        (f"{FINETUNE} --image-size 3", ["image_size is 3, less than a patch of the encoder: give 4 or more"]),
        ("finetune classification --data scenes --out new", ["'scenes' has images and masks", "finetune segmentation"]),
        (f"{FINETUNE} --init model.pth", ["model.pth is no"]),
        (f"{FINETUNE} --init absent", ["no encoder at 'absent'"]),
        (f"{FINETUNE} --init images", ["no encoder in 'images'"]),
        (f"{FINETUNE} --freeze", ["--freeze with --init none"]),
        (f"{FINETUNE} --init encoder --encoder.preset nano", ["use them with --init none"]),
        (f"{FINETUNE} --encoder.preset tyni", ["unknown preset 'tyni'", "'tiny'?"]),
        (f"{FINETUNE} --data.affine.degres 3", ["unknown setting 'data.affine.degres'", "'data.affine.degrees'?"]),
        (f"{FINETUNE} --data.affine.degrees -3", ["data.affine.degrees is -3.0: give a number from 0 on"]),
        (f"{PRETRAIN} --probe.data absent", ["labeled folder 'absent' does not exist"]),
        (f"{PRETRAIN} --probe.data texts", ["labeled folder 'texts' has 0 class folders: give at least two"]),
        (f"{PRETRAIN} --probe.data torn", ["none of 4 images can be read; the first, torn/a/0.png: not an image"]),
        (f"{PRETRAIN} --probe.data labeled --probe.method kn", ["unknown probe.method 'kn'", "'knn'?"]),
        (f"{PRETRAIN} --probe.every-epochs 0", ["probe.every_epochs is 0.0: give a positive number"]),
        (f"{PRETRAIN} --probe.dat labeled", ["unknown setting 'probe.dat'", "'probe.data'?"]),
        ("probe --run absent --data labeled", ["no encoder at 'absent'"]),
        ("probe --data labeled", ["missing: give --run"]),
        ("knn --run encoder", ["missing: give --data"]),
        (f"{KNN} --ot r.json", ["unknown setting 'ot'", "'out'?"]),
        (f"{KNN} --out r.txt", ["'r.txt' is of no known format: end it in .json, .csv, .md"]),
        (f"{PROBE} --out kept.csv", ["'kept.csv' exists: give a new file"]),
        (f"{PROBE} --stage 2 --out r.csv", ["stage is '2': give all, final, 0, 1"]),
        (f"{KNN} --pooling max", ["unknown pooling 'max': give all, mean, 2x2"]),
        (f"{KNN} --k 0", ["k is 0: give 1 or more neighbors"]),
        (f"{PROBE} --seeds 0", ["seeds is 0: give 1 or more"]),
        (f"{PROBE} --seed -1", ["seed is -1: give 0 or more"]),
        (f"{PROBE} --labels-per-class -3", ["labels_per_class is -3: give 1 or more"]),
        (f"{PROBE} --seeds 3", ["every draw is the same: give labels_per_class, or one seed"]),
        (f"{KNN} --seeds 3 --labels-per-class 9", ["every draw is the same: give labels_per_class below", ", or one seed"]),
        (f"{PROBE} --batch-size 0", ["batch_size is 0"]),
        ("knn --run encoder --data one", ["has 1 class folder: give at least two"]),
        ("knn --run encoder --data absent", ["labeled folder 'absent' does not exist"]),
        ("knn --run encoder --data images", ["'images' has 0 class folders"]),
        ("demo --out full", ["'full' exists", "--overwrite", "--out"]),
        ("demo --out model.pth", ["'model.pth' exists"]),
        ("embed --run encoder --images images --out new.csv", ["'new.csv' is no Parquet file's name: end it in .parquet"]),
        (f"{FINETUNE} --encoder.window_size 0", ["encoder.window_size is 0: give tokens per side, 1 or more"]),
        ("finetune classification --data rows.csv --out new", ["rows.csv has no rows"]),
        ("finetune classification --data kept.csv --out new", ["kept.csv has no column of paths", "columns are mine"]),
        ("demo --out full --overwrite", ["'full' exists"]),
        ("demo --seeds 1 --out new", ["seeds is 1: give 2 or more"]),
        ("demo --sedes 3 --out new", ["unknown setting 'sedes'", "'seeds'?"]),
    ],
)
def test_wrong_input(place, monkeypatch, capsys, words, texts):
    """Exit code 2, one line on stderr that explains it, nothing on stdout, no file created or changed."""
    monkeypatch.chdir(place)
    before = listing(place)
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("simmim: ") and err.endswith("\n")
    assert all(text in err for text in texts), err
    assert listing(place) == before


@pytest.mark.parametrize(
    "words, text",
    [
        (f"{PRETRAIN} --model.mask_ration 0.5", "did you mean 'model.mask_ratio'?"),
        ("export --run absent --out new", "no encoder at 'absent'"),
        ("pretrain --data images --out full", "folder 'full' is not empty and holds no run"),
    ],
)
def test_wrong_input_in_a_process_of_its_own(place, words, text):
    """The exit code, and no warning or traceback around the line."""
    ended = in_subprocess(*words.split(), cwd=place)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1 and ended.stderr.startswith("simmim: ") and text in ended.stderr
    assert not (place / "new").exists()


def test_a_class_that_cannot_be_read_is_named(place, monkeypatch, capsys):
    """After the images were read, so below a progress bar."""
    monkeypatch.chdir(place)
    assert main(["probe", "--run", "encoder", "--data", "half"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "that can be read are all of one class" in line and "half/b/0.png: not an image" in line


def test_interruption(monkeypatch, capsys):
    def interrupted(run, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("simmim.checkpoints.read", interrupted)
    assert main(["export", "--run", "x", "--out", "new"]) == 130
    assert capsys.readouterr().err == "simmim: interrupted\n"


def test_an_interrupted_study_says_how_to_resume(place, monkeypatch, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("simmim.finetune.study", interrupted)
    monkeypatch.chdir(place)
    for out, more in (("run", "; simmim study --out run --resume goes on"), ("new", "")):
        assert main(["study", "--data", "split", "--init", "encoder", "--out", out]) == 130
        assert capsys.readouterr().err == f"simmim: interrupted{more}\n"


@pytest.mark.parametrize("words", ["inspect encoder", "check-data images --workers 0"])
def test_output_that_the_reader_closes_is_no_error(place, words):
    """As by `simmim inspect … | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "simmim.cli", *words.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        env=environment,
    )
    os.close(writer)
    assert ended.returncode == 141 and "Broken" not in ended.stderr and "Traceback" not in ended.stderr


def test_bugs_are_not_hidden(monkeypatch):
    def broken(run, **_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("simmim.checkpoints.read", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["export", "--run", "x", "--out", "new"])


# --- help ------------------------------------------------------------------------------------------------------------


def test_overview_lists_the_commands(capsys):
    for words in ([], ["-h"], ["--help"]):
        assert main(words) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.startswith("usage: simmim COMMAND")
        assert all(f"  {command.name} " in out and command.purpose in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("simmim 0.")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["pretrian"]])
def test_overview_loads_nothing_heavy(words, tmp_path):
    code = (
        "import sys; from simmim.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'numpy', 'PIL', 'datasets', 'jsonargparse', 'pytorch_lightning'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == "[]"


def test_overview_appears_at_once(tmp_path):
    """Within 0.3 s of processor time; by the clock where the machine is free."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert in_subprocess("--help", cwd=tmp_path).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


SHARED = [
    *("--config", "--data.path", "--out", "--preset", "--image_size", "--epochs", "--batch_size", "--seed"),
    *("--workers", "--devices", "--precision", "--resume", "--overwrite", "--print_config"),
]


@pytest.mark.parametrize(
    "words, flags",
    [
        ("pretrain", [*SHARED, "--model.mask_unit", "--model.encoder", "--optim.lr", "--trainer"]),
        (
            "finetune classification",
            [flag for flag in SHARED if flag != "--preset"]
            + ["--init", "--labels_per_class", "--freeze", "--encoder.preset", "--optim.layer_decay", "--trainer"]
            + ["--data.affine.degrees"],
        ),
        ("reconstruct", ["--run", "--images", "--out", "--count", "--seed"]),
        ("export", ["--run", "--format", "--out", "--form", "--license", "--dynamic_size"]),
        ("inspect", ["--path", "--window_size"]),
        ("plan", ["--preset", "--image", "--devices", "--device_memory_gib"]),
        ("embed", ["--run", "--images", "--out", "--stage", "--pooling"]),
        ("probe", ["--run", "--data", "--labels_per_class", "--seed", "--seeds", "--stage", "--pooling", "--k", "--out"]),
        ("knn", ["--run", "--data", "--labels_per_class", "--seed", "--seeds", "--stage", "--pooling", "--k", "--out"]),
        ("study", ["--data.path", "--init", "--labels", "--seeds", "--against", "--lr_factors", "--folds", "--processes"]),
        ("predict", ["--run", "--images", "--out", "--batch_size"]),
        ("demo", ["--out", "--seeds", "--overwrite"]),
        ("check-data", ["--path", "--column", "--images_per_second", "--workers", "--json"]),
    ],
)
def test_help_of_each_command(words, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--help"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == ""
    assert out.startswith(f"usage: simmim {words}")
    named = set(out.replace("=", " ").replace("]", " ").replace(",", " ").split())
    assert set(flags) <= named, set(flags) - named


def test_every_command_has_its_help_tested(capsys):
    tested = {words.split()[0] for words, _ in test_help_of_each_command.pytestmark[0].args[1]}
    assert tested == {command.name for command in COMMANDS}
    assert main(["finetune", "--help"]) == 0
    assert "classification" in capsys.readouterr().out


def test_help_explains_the_settings(capsys):
    """Each setting's help is its docstring."""
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "share of the units that is masked" in out and "passes over the images" in out
    assert "forward passes per optimizer step" in out


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_copies_the_encoder(place, tmp_path, capsys):
    """Into a new or an empty folder, which the output names."""
    before = listing(place / "encoder")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new" / "deep", tmp_path / "empty"):
        assert main(["export", "--run", str(place / "encoder"), "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert f"exported the encoder to {out}; load it with" in printed and f"read_encoder({str(out)!r})" in printed
        assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "encoder.safetensors"]
        for name in ("config.json", "encoder.safetensors"):
            assert (out / name).read_bytes() == (place / "encoder" / name).read_bytes()
    assert load_encoder(out).config == load_encoder(place / "encoder").config and listing(place / "encoder") == before


def test_exit_codes_of_check_data(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["check-data", "images"]) == 0
    assert "all readable" in capsys.readouterr().out
    (place / "images" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    try:
        assert main(["check-data", "images", "--json"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert [entry["path"] for entry in report["unreadable"]] == [str(place / "images" / "torn.png")]
        assert main(["check-data", "--path", "images"]) == 1
        assert "torn.png" in capsys.readouterr().out
    finally:
        (place / "images" / "torn.png").unlink()
    assert main(["check-data", "scenes"]) == 0
    assert "scenes/masks holds label maps, which count as images here" in capsys.readouterr().out
    for words, text in (([], "missing: give --path"), (["absent"], "does not exist"), (["images", "--jsn"], "'json'?")):
        assert main(["check-data", *words]) == 2
        assert text in capsys.readouterr().err


def test_next_commands_are_quoted_for_a_shell():
    """A glob as the source, and a folder with a space, are one word each where the lines are pasted."""
    settings = pretrain_settings(["--data", "my photos/*.png", "--out", "run 1"])
    words = [shlex.split(line.removeprefix("next:")) for line in next_steps(settings, Path("run 1")).splitlines()]
    assert words[0] == ["simmim", "reconstruct", "--run", "run 1", "--images", "my photos/*.png", "--out", "grid.png"]
    assert [line[2:4] for line in words[1:]] == [["--run", "run 1"], ["classification", "--init"]]
    assert words[2][-2:] == ["--out", "run 1-finetuned"]
