"""Benchmarks run as scripts: short measurements, and reports of earlier runs."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import detection
import gpu
import pytest
import recipe_search
import segmentation
import step
from PIL import Image
from torch import nn

from simmim.cli.train import study_settings
from simmim.finetune.label_study.results import Rates, Trial, write_trials
from simmim.finetune.label_study.study import rate_grid

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--preset nano --size 64 --window 4 --batch 2 --precision float32 --threads 1 --rounds 2"
OURS, THEIRS = (0.30, 0.28, 0.31), (0.27, 0.28, 0.25)


def table_row(output):
    """The cells of the last row of a table."""
    row = [line for line in output.splitlines() if line.startswith("|")][-1]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_step_is_measured(fork_server, tmp_path):
    words = (*SMALL.split(), "--contenders", "ours", "--json", tmp_path / "step.json")
    output = fork_server.run_script(BENCHMARKS / "step.py", *words, forked_workers=True)
    name, rate, _, ratio, *_ = table_row(output)
    assert name == "ours" and float(rate) > 0 and ratio == "1.00 ×"
    figures = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["float32"]
    assert len(figures["ours"]["seconds"]) == len(figures["gemm"]["gflops"]) == 2
    assert math.isfinite(figures["ours"]["loss"])


def test_first_epochs_are_compared(fork_server):
    """Of a checkout with itself, by small photographs."""
    words = ("--old", BENCHMARKS.parent, "--new", BENCHMARKS.parent, "--images", 2, "--rounds", 3, "--size", 300, 400)
    output = fork_server.run_script(BENCHMARKS / "first_epoch.py", *words, forked_workers=True)
    assert output.count("\n| /") == 2 and "without keeping" in output
    name, milliseconds, rate = table_row(output)
    assert "keeps" in name and float(milliseconds) > 0 and float(rate.split()[0]) > 0


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


def test_a_turn_on_a_gpu_leaves_room_for_the_next_contender(monkeypatch):
    """Memory is given back after the first steps and each turn, before the answer that lets another contender compute."""
    events = []
    monkeypatch.setattr(step, "release_memory", lambda device: events.append("release"))
    monkeypatch.setattr(step, "answer", lambda values: events.append(next(iter(values))))
    monkeypatch.setattr(step, "build_contender", lambda name, work: nn.Linear(1, 1))
    monkeypatch.setattr(step, "build_step", lambda *_, **__: lambda: events.append("step") or 0.0)
    monkeypatch.setattr(step, "measure_peak", lambda device: lambda: 1.0)
    monkeypatch.setattr(sys, "stdin", ["steps 3", "steps 1"])
    step.serve("transformers", step.Work("tiny", 192, 12, 16, "float32", "cpu"))
    first = ["step", "first_step_s", "step", "step", "release", "peak_mib"]
    assert events == [*first, *["step"] * 4, "release", "seconds", *["step"] * 2, "release", "seconds"]


def test_a_gpu_is_named_and_takes_more_steps_in_a_round(monkeypatch, capsys):
    """A step of a GPU is too short to be timed alone."""
    calls = []
    figures = {"gemm": {"gflops": [100.0]}, "ours": {"seconds": [1.0], "peak_mib": 1, "first_step_s": 1}}
    monkeypatch.setattr(step, "compare", lambda *arguments: calls.append(arguments[3]) or figures)
    monkeypatch.setattr(step.torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    for words in ("--device cuda", "--device cuda --steps 3", "--device cpu"):
        monkeypatch.setattr(step, "operations", lambda *_: 1e9)
        step.main([*SMALL.split(), "--contenders", "ours", *words.split()])
        assert ("float32, NVIDIA A100-SXM4-40GB, torch" in capsys.readouterr().out) == ("cuda" in words)
    assert calls == [20, 3, 1]


def test_canvases_are_measured(fork_server):
    """Images a second and peak memory of a batch of images, not of canvases."""
    words = [*SMALL.split(), "--rounds", 1, "--batch", 6, "--contenders", "ours", "canvas2", "canvas3"]
    output = fork_server.run_script(BENCHMARKS / "step.py", *words, forked_workers=True)
    rows = [line.split("|") for line in output.splitlines() if line.startswith("| canvas")]
    assert [row[1].strip() for row in rows] == ["canvas2", "canvas3"]
    assert all(float(row[2]) > 0 and float(row[5].replace(",", "")) >= 0 for row in rows)
    refused = fork_server.run_script(BENCHMARKS / "step.py", *SMALL.split(), "--contenders", "canvas3", code=2)
    assert "--batch 2 for canvas3: give a multiple of 3" in refused


def test_a_version_equals_itself(fork_server):
    """The losses of two processes with the same version are equal, step by step."""
    words = ("--old", BENCHMARKS.parent, "--new", BENCHMARKS.parent, *SMALL.split())
    output = fork_server.run_script(BENCHMARKS / "compare_versions.py", *words, forked_workers=True)
    precision, old, new, ratio, difference = table_row(output)
    assert precision == "float32" and min(float(old), float(new), float(ratio)) > 0 and difference == "0"


@pytest.mark.parametrize("benchmark", [segmentation, detection])
def test_the_benchmarks_of_scenes_are_studies(benchmark, tmp_path, monkeypatch):
    """Both sides choose from one grid, seeds share no scene, a later call goes on, and what follows wins."""
    calls, task = [], benchmark.__name__
    monkeypatch.setattr("simmim.cli.main", lambda words: calls.append(words) or 0)
    given = ["--scenes", "scenes", "--init", "encoder", "--out", str(tmp_path)]
    assert benchmark.main(given) == 0
    (tmp_path / "config.yaml").touch()
    assert benchmark.main([*given, "--seeds", "3", "--labels", "7"]) == 0
    first, second = calls
    assert "--resume" not in first and second[-1] == "--resume"
    settings = study_settings(second[1:-1])
    assert (settings.task, settings.data.path, settings.labels, settings.seeds) == (task, "scenes/labeled", (7,), 3)
    assert settings.disjoint and (settings.steps, settings.image_size) == (800, 64)
    assert len(rate_grid(settings)) == 6 and study_settings(first[1:]).labels == (20, 100)


def test_detection_is_measured_on_any_images(monkeypatch):
    calls = []
    monkeypatch.setattr("simmim.cli.main", lambda words: calls.append(words) or 0)
    assert detection.main(["--data", "cells", "--init", "encoder", "--out", "out"]) == 0
    settings = study_settings(calls[0][1:])
    assert (settings.data.path, settings.disjoint, settings.image_size) == ("cells", False, 160)


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


def test_the_checks_of_a_gpu_run_in_small(fork_server):
    """On a CPU; a part that fails is told, and the next one runs."""
    output = fork_server.run_script(BENCHMARKS / "gpu.py", "--dry", "--only", "attention", "profile")
    assert re.search(r"\| 1 \| 8², window 4 \| \d+\.\d+ \| \d+\.\d+ \|", output) and "a step waits for nothing" in output
    assert re.findall(r"(?m)^(\w+) +passed in \d+ s$", output) == ["attention", "profile"]
    assert "no GPU is there: give --dry" in fork_server.run_script(BENCHMARKS / "gpu.py", code=2)


def test_the_checks_of_a_gpu_end_in_time(monkeypatch, capfd):
    """In nine minutes; one that takes too long or fails does not keep the others from running; and commands are known."""
    assert sum(check.limit_s for check in gpu.CHECKS.values()) <= gpu.LIMIT_S == 540
    for name in ("step64", "step128"):
        for command in (gpu.CHECKS[name].command, gpu.CHECKS[name].dry):
            step.build_parser().parse_args(command[1:])
    limits = {"slow": 1, "wrong": 60, "good": 60}
    checks = {"slow": ("-c", "import time; time.sleep(60)"), "wrong": ("-c", "raise SystemExit(3)"), "good": ("-c", "")}
    monkeypatch.setattr(gpu, "CHECKS", {name: gpu.Check(limits[name], words, words) for name, words in checks.items()})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 1
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()[-3:]] == [
        ["slow", "out"],
        ["wrong", "failed"],
        ["good", "passed"],
    ]
