"""Benchmarks run as scripts: short measurements, and reports of earlier runs."""

import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe_search
import segmentation
import step
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import ttest_rel

from simmim.finetune import run as finetune_run
from simmim.finetune.label_study.results import Rates, Trial, write_trials

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--preset nano --size 64 --window 4 --batch 2 --precision float32 --threads 1 --rounds 2"
OURS, THEIRS = (0.30, 0.28, 0.31), (0.27, 0.28, 0.25)


def table_row(output):
    """The cells of the last row of a table."""
    row = [line for line in output.splitlines() if line.startswith("|")][-1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_step_is_measured(fork_server, tmp_path):
    words = (*SMALL.split(), "--contenders", "ours", "--json", tmp_path / "step.json")
    output = fork_server.run_script(BENCHMARKS / "step.py", *words)
    name, rate, _, ratio, *_ = table_row(output)
    assert name == "ours" and float(rate) > 0 and ratio == "1.00 ×"
    figures = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["float32"]
    assert len(figures["ours"]["seconds"]) == len(figures["gemm"]["gflops"]) == 2
    assert math.isfinite(figures["ours"]["loss"])


def test_a_share_follows_from_the_figures_beside_it():
    """Also where rates and products vary from round to round: 16 images in 2 s of 21.4 GFLOP each are 171 of 200 GFLOP/s."""
    work = step.Work("tiny", 192, 12, 16, "float32", "cpu")
    seconds = [1.0, 2.0, 4.0]
    figures = {
        "gemm": {"gflops": [100.0, 200.0, 150.0, 250.0, 300.0]},
        "transformers": {"seconds": seconds, "peak_mib": 1, "first_step_s": 1},
    }
    name, rate, share, *_ = table_row(step.as_markdown(figures, work))
    assert (name, rate) == ("transformers", "8.00")
    assert share == f"{8 * step.operations(work) / 1e9 / 200:.0%}" == "86%"


def test_canvases_are_measured(fork_server):
    """Images a second and peak memory of a batch of images, not of canvases."""
    words = [*SMALL.split(), "--batch", 6, "--contenders", "ours", "canvas2", "canvas3"]
    output = fork_server.run_script(BENCHMARKS / "step.py", *words)
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| canvas")]
    assert [row[1].strip() for row in rows] == ["canvas2", "canvas3"]
    assert all(float(row[2]) > 0 and float(row[5].replace(",", "")) >= 0 for row in rows)
    refused = fork_server.run_script(BENCHMARKS / "step.py", *SMALL.split(), "--contenders", "canvas3", code=2)
    assert "--batch 2 for canvas3: give a multiple of 3" in refused


def test_a_version_equals_itself(fork_server):
    """The losses of two processes with the same version are equal, step by step."""
    words = ("--old", BENCHMARKS.parent, "--new", BENCHMARKS.parent, *SMALL.split())
    output = fork_server.run_script(BENCHMARKS / "compare_versions.py", *words)
    precision, old, new, ratio, difference = table_row(output)
    assert precision == "float32" and min(float(old), float(new), float(ratio)) > 0 and difference == "0"


def test_the_table_of_segmentation_is_paired_by_seed():
    """Gains 3, 0, 6: mean 3, deviation 3."""
    done = {
        segmentation.Trial(arm, 20, seed, 0.01, 0.9, False): {"mean_iou": value, "pixel_accuracy": 0.9}
        for arm, values in zip(segmentation.ARMS, (OURS, THEIRS))
        for seed, value in reversed([*enumerate(values)])
    }
    head, _, row = segmentation.results_table(done).splitlines()
    assert head == "| labeled scenes | pre-trained | from scratch | paired gain | seeds won |"
    gain = f"+3.0 ± {3 / math.sqrt(3):.1f} (p = {ttest_rel(OURS, THEIRS).pvalue:.2g})"
    assert row == f"| 20 | 29.7 ± 0.9 | 26.7 ± 0.9 | {gain} | 2 of 3 |"


def test_draws_of_scenes_share_nothing():
    names = [f"{number:05d}.png" for number in range(40)]
    parts = segmentation.divide_scenes(names, 5, num_seeds=4, num_tuning_seeds=2, num_validation=10)
    drawn = [*parts.tuning_validation, *itertools.chain(*parts.tuning, *parts.comparison)]
    assert sorted(drawn) == names and len(parts.comparison) == 4 and {*map(len, parts.comparison)} == {5}
    assert parts == segmentation.divide_scenes(names[::-1], 5, 4, 2, 10)  # whatever the folder's order
    with pytest.raises(ValueError, match="40 training scenes, 41 needed: 11 to judge the tuning, and 6 draws of 5"):
        segmentation.divide_scenes(names, 5, 4, 2, 11)


@pytest.fixture(scope="module")
def segmentation_words(scene_folder, encoder_folder, tmp_path_factory):
    """The command line of a benchmark in miniature: two rates, two seeds, four labels (fewer may lack a class), one step."""
    config = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    config.write_text("image_size: 32\nbatch_size: 2\nworkers: 0\nprecision: 32-true\nhead: {width: 16}\n")
    folders = ["--scenes", scene_folder.parent, "--init", encoder_folder, "--config", config, "--processes", 0]
    size = ["--labels", 4, "--seeds", 2, "--tuning-scenes", 3, "--steps", 1, "--lrs", 0.1, 0.2, "--layer-decays", 0.9]
    return [*map(str, folders), *map(str, size)]


def contents(folder):
    """The label maps and images of a folder, as bytes."""
    return {file.read_bytes() for file in folder.rglob("*.png")}


def test_segmentation_tunes_on_no_scene_that_judges(segmentation_words, scene_folder, tmp_path, monkeypatch, capsys):
    """Measured for real, in miniature. What each fine-tuning reads is seen where it reads it. Each arm takes the rate that
    its own tuning chose."""
    run, seen = finetune_run.finetune, []

    def finetune(settings, quiet):
        metrics = run(settings, quiet=quiet).metrics
        folder, arm = Path(settings.data.path), "from scratch" if settings.init == "none" else "pre-trained"
        seen.append((arm, settings.optim.lr, contents(folder / "train/images"), contents(folder / "val/images")))
        best = {"pre-trained": 0.1, "from scratch": 0.2}[arm]
        return SimpleNamespace(metrics=metrics | {"mean_iou": 0.5 - abs(settings.optim.lr - best)})

    monkeypatch.setattr(finetune_run, "finetune", finetune)
    assert segmentation.main([*segmentation_words, "--out", str(tmp_path / "study")]) == 0
    tuning, compared, judges = seen[:4], seen[4:], contents(scene_folder / "val/images")
    training = contents(scene_folder / "train/images")
    assert [(arm, lr) for arm, lr, *_ in tuning] == [*itertools.product(segmentation.ARMS, (0.1, 0.2))]
    for _, _, train, validation in tuning:
        assert len(train) == 4 and len(validation) == 3 and train | validation <= training
        assert not (train & validation or (train | validation) & judges)
    assert [(arm, lr) for arm, lr, *_ in compared] == [("pre-trained", 0.1)] * 2 + [("from scratch", 0.2)] * 2
    chosen_by = set().union(*(train | validation for _, _, train, validation in tuning))
    for _, _, train, validation in compared:
        assert validation == judges and not train & (chosen_by | judges)
    assert compared[0][2] == compared[2][2] and not compared[0][2] & compared[1][2]  # paired by seed, seeds disjoint
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 4 | 50.0 ± 0.0 | 50.0 ± 0.0 | +0.0")


def test_segmentation_takes_up_results_of_the_same_settings_alone(
    segmentation_words, scene_folder, tmp_path, monkeypatch, capsys
):
    counted = []

    def finetune(settings, quiet):
        counted.append(settings)
        return SimpleNamespace(metrics={"mean_iou": 0.5, "pixel_accuracy": 0.9})

    def num_computed(*more):
        counted.clear()
        assert segmentation.main([*segmentation_words, "--out", str(tmp_path / "study"), *map(str, more)]) == 0
        return len(counted), "computed anew" in capsys.readouterr().out

    monkeypatch.setattr(finetune_run, "finetune", finetune)
    assert num_computed() == (8, False)
    assert num_computed() == (0, False)
    assert num_computed("--steps", 2) == (8, True)
    other = load_file(Path(segmentation_words[3]) / "encoder.safetensors")
    shutil.copytree(segmentation_words[3], tmp_path / "encoder")
    save_file({name: value + 1 for name, value in other.items()}, tmp_path / "encoder/encoder.safetensors")
    assert num_computed("--steps", 2, "--init", tmp_path / "encoder") == (8, True)
    shutil.copytree(scene_folder, tmp_path / "scenes/labeled")
    assert num_computed("--steps", 2, "--init", tmp_path / "encoder", "--scenes", tmp_path / "scenes") == (0, False)
    mask = min((tmp_path / "scenes/labeled/val/masks").iterdir())
    Image.fromarray(np.asarray(Image.open(mask)) * 0).save(mask)
    # One label map of those that judge: the tuning stands, the comparison does not.
    assert num_computed("--steps", 2, "--init", tmp_path / "encoder", "--scenes", tmp_path / "scenes") == (4, True)
    (tmp_path / "study/trials.csv").write_text("of an earlier version, without what it was measured with\n")
    assert num_computed("--seeds", 1, "--lrs", 0.3) == (2, False)


def test_the_picture_shows_a_run_and_its_study(fork_server, tmp_path):
    """The picture has the size that the README shows, and curves in both halves."""
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{step},{1 / (step + 1)}\n" for step in range(40)))
    trials = [
        Trial(arm, labels, seed, Rates(1.0, 0.7), value + labels / 50, 1.0)
        for arm, values in (("pre-trained", OURS), ("from scratch", THEIRS))
        for labels in (1, 20)
        for seed, value in enumerate(values)
    ]
    write_trials(tmp_path / "results.csv", trials)
    words = ("--run", tmp_path, "--study", tmp_path, "--out", tmp_path / "picture.png")
    fork_server.run_script(BENCHMARKS / "fashion_picture.py", *words)
    picture = Image.open(tmp_path / "picture.png").convert("RGB")
    assert picture.size == (1100, 418)
    blue, orange = (31, 119, 180), (255, 127, 14)  # the first two colors of lines
    for box, colors in (((0, 0, 550, 418), {blue}), ((550, 0, 1100, 418), {blue, orange})):
        present = {color for _, color in picture.crop(box).getcolors(maxcolors=1 << 16)}
        assert present & {blue, orange} == colors


def test_recipe_search_gives_candidates_the_same_time(digits, encoder_folder, tmp_path, monkeypatch, capsys):
    """A step of the second candidate costs twice as much, so it gets half of the steps; nothing is done twice."""
    lengths = {}

    def pretrain_steps(search, words, steps, run):
        shutil.copytree(encoder_folder, run, dirs_exist_ok=True)
        lengths.setdefault(" ".join(words), []).append(steps)
        return 5 + steps * (0.02 if "nano" in words else 0.04)

    monkeypatch.setattr(recipe_search, "pretrain_steps", pretrain_steps)
    monkeypatch.setattr(recipe_search, "in_process", lambda work, *arguments: work(*arguments))
    (tmp_path / "candidates.yaml").write_text("small: --preset nano\nlarge: --preset micro\n")
    words = ["--candidates", tmp_path / "candidates.yaml", "--data", digits.unlabeled, "--labeled", digits.labeled]
    words += ["--out", tmp_path / "search", "--minutes", "0.1", "--labels", "2", "--steps", "1", "--draws", "1"]
    assert recipe_search.main([*map(str, words)]) == 0
    table = capsys.readouterr().out
    assert lengths == {"--preset nano": [8, 32, 300], "--preset micro": [8, 32, 150]}
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:]] == [["| small", "300", "20"], ["| large", "150", "40"]]
    monkeypatch.setattr(recipe_search, "in_process", None)
    assert recipe_search.main([*map(str, words)]) == 0 and capsys.readouterr().out == table
