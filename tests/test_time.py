"""The time that a pre-training takes: measured before it begins, and given in place of epochs."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from simmim.cli import main
from simmim.messages import every
from simmim.pretrain import (
    DataSettings,
    PretrainSettings,
    SimMIMSettings,
    calibration,
    load_pretrained,
    pace,
    preparation,
    pretrain,
)
from simmim.pretrain.calibration import epochs_in, estimate_line, length_text, num_processes, parse_length, seconds_per_step
from simmim.training import threads
from simmim.training.run_folder import write_run_folder

SMALL = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "drop_path_rate": 0.3})


def settings(digits, out, **more):
    common = {"preset": "nano", "batch_size": 32, "model": SMALL, "save_every_steps": 5, "workers": 0}
    data = DataSettings(str(digits.unlabeled))
    return PretrainSettings(**{"data": data, "out": str(out), "precision": "32-true", **common, **more})


@pytest.mark.parametrize(
    "text, seconds", [("1h", 3600), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("20 s", 20), ("1d 2h", 93_600)]
)
def test_lengths(text, seconds):
    assert parse_length(text) == seconds


@pytest.mark.parametrize("text", ["", "60", "1 hour", "h", "0m", "-1h", "1m1h"])
def test_what_is_no_length(text):
    with pytest.raises(ValueError, match="give a length of time as 1h, 90m or 1h30m"):
        parse_length(text)


def test_arithmetic():
    """An hour less a twentieth at half a second a step: 6,840 steps of 64 images."""
    assert epochs_in(3600, 0.5, 64, 2640) == 166.0
    assert [every(count, "step") for count in (1, 2, 1000)] == ["every step", "every 2 steps", "every 1,000 steps"]
    assert epochs_in(1, 60, 64, 64_000) == 0.001, "one step at least"
    given = SimpleNamespace(epochs=100.0, batch_size=64, time=None, image_sizes=None)
    line = estimate_line(given, 2640, 2.0)
    assert line.startswith("about 2 h 25 min on this machine, 2 s a step") and line.endswith(
        "--time 1h would take 41.5 epochs"
    )
    given.time = "3h"
    assert "would take" not in estimate_line(given, 2640, 2.0)
    given = SimpleNamespace(epochs=50.0, batch_size=64, time=None, image_sizes=None)
    assert "would take" not in estimate_line(given, 2640, 2.0), "1 h 12 min"
    assert [length_text(seconds) for seconds in (0.2, 59, 600, 7300, 400_000)] == [
        "1 s",
        "59 s",
        "10 min",
        "2 h 2 min",
        "4.6 days",
    ]


def test_num_processes(monkeypatch):
    def of(devices, **trainer):
        return num_processes(SimpleNamespace(devices=devices, trainer=trainer), "cpu")

    assert [of("auto"), of(3), of("0,1"), of("2", num_nodes=4)] == [1, 3, 2, 8]
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert of("auto") == 6


def test_a_step_is_computing_and_loading(monkeypatch):
    """96 images in three parts of 32 at 50 ms; loading takes 2 ms each, beside the steps where processes do it."""
    monkeypatch.setattr(calibration, "beside_others", lambda measure, most: 0.05)

    class Slow:
        def __len__(self):
            return 20

        def __getitem__(self, key):
            time.sleep(0.002)
            return {"image": torch.zeros(1, 2, 2, dtype=torch.uint8), "seed": 0, "skipped": []}

    def step_s(workers):
        given = SimpleNamespace(
            batch_size=96,
            workers=workers,
            precision="32-true",
            time=None,
            optim=SimpleNamespace(accumulate=2),
            model=SimpleNamespace(images_per_input=3),
        )
        return seconds_per_step(None, Slow(), given, "cpu")

    # 30 of the 48 images of a pass are measured: whole inputs of three.
    assert step_s(4) == pytest.approx(0.05 * 96 / 30)
    assert step_s(1) >= 0.192 and 0.05 * 96 / 30 + 0.192 <= step_s(0) < 0.05 * 96 / 30 + 0.192 * 3


def test_an_estimate_is_printed_and_changes_nothing(digits, tmp_path, monkeypatch, capsys):
    """With the measure of real steps and without."""
    plain = pretrain(settings(digits, tmp_path / "plain", epochs=0.6))
    assert "time     about" not in capsys.readouterr().out, "short runs are not measured"
    monkeypatch.setattr(calibration, "SHORT_PIXELS", 0.0)
    monkeypatch.setattr(calibration, "MEASURED_S", 0.05)
    monkeypatch.setattr(calibration, "NUM_MEASURES", 1)
    measured = pretrain(settings(digits, tmp_path / "measured", epochs=0.6))
    assert "time     about" in capsys.readouterr().out
    first, second = (load_pretrained(folder)[0].state_dict() for folder in (plain, measured))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_given_time_chooses_the_epochs_once(digits, tmp_path, monkeypatch, power_cut, capsys):
    """19 steps of 0.1 s fit into 2 s. A resumed run measures nothing and reaches the same weights."""
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: 0.1)
    whole = pretrain(settings(digits, tmp_path / "whole", time="2s"))
    out = capsys.readouterr().out
    assert "chosen   2.53 epochs: what this machine does in 2s, 5% of it left" in out and "time     about 2 s" in out
    stored = yaml.safe_load((whole / "config.yaml").read_text())
    assert (stored["time"], stored["epochs"]) == ("2s", 2.53)
    assert torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 19
    with power_cut(after_step=7):
        pretrain(settings(digits, tmp_path / "cut", time="2s"))
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: pytest.fail("measured again"))
    cut = pretrain(settings(digits, tmp_path / "cut", time="2s", resume=True))
    assert main(["pretrain", "--out", str(cut), "--resume"]) == 0
    first, second = (load_pretrained(folder)[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_on_a_cpu_a_run_without_a_length_takes_an_hour(digits, tmp_path, monkeypatch, capsys):
    """Where the default number of epochs would take longer, which is said; and the resumed run keeps what was chosen."""
    monkeypatch.setattr(calibration, "SHORT_PIXELS", 0.0)
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: 300.0)
    monkeypatch.setattr(preparation, "busy_lines", lambda *_, **__: [])  # of other processes of this machine
    look, looked = preparation.look, []
    monkeypatch.setattr(preparation, "look", lambda given: looked.append(given) or look(given))
    whole = pretrain(settings(digits, tmp_path / "whole"))
    assert len(looked) == 1, "images are opened and measured once, whatever the length"
    out = capsys.readouterr().out
    count = len(list(digits.unlabeled.iterdir()))
    epochs = epochs_in(3600, 300.0, 32, count)
    assert f"chosen   {epochs:g} epochs: what this CPU does in an hour; --epochs 800, as on a GPU, would take" in out
    assert "time     about 1 h 0 min on this machine, 3e+02 s a step as measured" in out and "--time 1h" not in out
    assert yaml.safe_load((whole / "config.yaml").read_text())["epochs"] == epochs
    pretrain(settings(digits, tmp_path / "whole", resume=True))
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: 1e-4)
    resolved, lines = preparation.resolve_length(settings(digits, tmp_path / "short"))
    assert resolved.settings.epochs == 800 and lines == ["time     about 1 s on this machine, 0.0001 s a step as measured"]


@pytest.mark.parametrize(
    "words, step_s, scale, line",
    [
        ({"time": "1h"}, {"micro": 0.01, "pico": 0.01}, ("micro", 96), None),
        (
            {"time": "1h"},
            {"micro": 0.5, "pico": 0.1},
            ("pico", 64),
            "chosen   pico at 64 px: micro at 96 px would see 220,000 ",
        ),
        (
            {},
            {"micro": 0.5, "pico": 0.1},
            ("pico", 64),
            "would see 9,600 images in this run, and of fewer than a million a sm",
        ),
        ({"epochs": 1e5}, {}, ("micro", 96), None),
        ({"epochs": 3.0}, {}, ("pico", 64), "micro at 96 px would see 36 images in this run"),
        ({"epochs": 3.0, "preset": "micro"}, {}, ("micro", 96), None),
        ({"epochs": 3.0, "image_size": 96}, {}, ("pico", 96), "chosen   pico at 96 px"),
    ],
)
def test_encoder_and_images_are_as_large_as_the_length_suits(tmp_path, monkeypatch, words, step_s, scale, line):
    """On a CPU, by the time that is given, an hour, or the epochs; and a resumed run keeps them without measuring."""
    for number in range(12):
        Image.new("RGB", (130, 110), (number * 20, 90, 90)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(calibration, "SHORT_PIXELS", 0.0)
    measured = []

    def measure_step(resolved, device):
        measured.append(resolved.settings.preset)
        return step_s.get(measured[-1], 1e-4)

    monkeypatch.setattr(preparation, "measure_step", measure_step)
    given = PretrainSettings(data=DataSettings(str(tmp_path)), out=str(tmp_path / "run"), batch_size=32, **words)
    resolved, lines = preparation.resolve_length(given)
    assert len(measured) == len(set(measured)), "each once"
    assert (resolved.settings.preset, resolved.settings.image_size) == scale
    said = [text for text in lines if " at " in text and text.startswith("chosen")]
    assert len(said) == (line is not None) and all(line in text for text in said)
    write_run_folder(tmp_path / "run", resolved.settings)
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: pytest.fail("measured again"))
    again, _ = preparation.resolve_length(replace(given, resume=True))
    assert again.settings == replace(resolved.settings, resume=True)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--time=soon"], "time is 'soon': give a length of time as 1h, 90m or 1h30m"),
        (["--time=1h", "--epochs=3"], "both time 1h and epochs 3 are given: give one of them"),
        (["--time=1h", "--devices=2"], "there are several devices, which it does not measure: give epochs"),
    ],
)
def test_wrong_input(digits, tmp_path, capsys, words, says):
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(tmp_path / "run"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def two_cores(monkeypatch):
    """`two_cores(others)`: of two cores other processes keep so many busy, a number for each look; the last one stays."""
    for name in threads.CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: {0, 1})
    number, slept = [2], []
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(threads.torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    monkeypatch.setattr(threads.time, "sleep", slept.append)

    def of(others):
        left = list(others)
        for module in (threads, calibration, preparation):
            monkeypatch.setattr(module, "read_usage", lambda: threads.Usage(0, 0, 0))

        def look(*_):
            return left.pop(0) if len(left) > 1 else left[0]

        for module in (threads, calibration):
            monkeypatch.setattr(module, "cores_of_others", look)
        return number, slept

    return of


@pytest.mark.parametrize(
    "others, most, times, expected, threads_then",
    [
        ([0.2], 3, [0.1], 0.1, [2]),
        ([1.0], 3, [0.3, 0.2, 0.9], 0.3, [1, 1, 1]),
        ([1.0, 0.0], 3, [5.0, 0.1, 0.1], 0.1, [1, 2, 2]),
        ([1.0], 1, [0.3], 0.3, [1]),
        ([1.0], 0, [0.3], 0.3, [2]),
    ],
)
def test_steps_are_measured_with_the_threads_of_the_run(two_cores, others, most, times, expected, threads_then):
    """Beside a process that keeps a core busy two threads would be measured as ten times slower than the run is; and a
    moment in which others are busy does not decide."""
    number, slept = two_cores(others)
    left, seen = list(times), []

    def measure():
        seen.append(number[0])
        return left.pop(0)

    assert calibration.beside_others(measure, most) == expected
    assert (seen, left, number) == (threads_then, [], [2])
    assert slept == [threads.FIRST_LOOK_S, *[calibration.PAUSE_S] * (len(times) - 1)][: len(times) * (most > 0)]


def test_threads_that_the_user_chose_are_measured(two_cores, monkeypatch):
    number, _ = two_cores([1.0])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert calibration.beside_others(lambda: number[0], 1) == 2


@pytest.mark.parametrize("text, measures", [("20s", 1), ("1h", 3), (None, 3)])
def test_a_short_run_is_measured_once(two_cores, monkeypatch, text, measures):
    two_cores([1.0])
    calls = []
    monkeypatch.setattr(calibration, "compute_seconds", lambda *_: calls.append(1) or 0.1)
    given = SimpleNamespace(
        batch_size=2,
        workers=1,
        precision="32-true",
        time=text,
        optim=SimpleNamespace(accumulate=1),
        model=SimpleNamespace(images_per_input=1),
    )
    seconds_per_step(None, Images(), given, "cpu")
    assert len(calls) == measures


class Images:
    """One image, as often as asked for."""

    def __len__(self):
        return 1

    def __getitem__(self, key):
        return {"image": torch.zeros(1, 2, 2, dtype=torch.uint8), "seed": 0, "skipped": []}


@pytest.mark.parametrize("busy", [False, True])
def test_a_busy_machine_is_said(two_cores, digits, tmp_path, monkeypatch, busy):
    two_cores([1.3 if busy else 0.1])
    monkeypatch.setattr(calibration, "SHORT_PIXELS", 0.0)
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: 0.1)
    says = "note     other processes kept 1.3 of 2 cores busy while steps were measured: "
    for length, then in (
        ({"time": "2s"}, "these epochs are what fits beside them"),
        ({"epochs": 3.0}, "without them the run is"),
    ):
        _, lines = preparation.resolve_length(settings(digits, tmp_path / "run", **length))
        said = [line for line in lines if line.startswith("note")]
        assert len(said) == busy and all(line.startswith(says + then) for line in said)


def watched(monkeypatch, planned_s, step_s, steps=1000, first=0):
    """What `PlanWatch` says of a run whose steps take so long, and after which of them."""
    now, said = [100.0], []
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pace.tqdm, "write", lambda line: said.append((trainer.global_step, line)))
    trainer = SimpleNamespace(global_step=first, max_steps=steps)
    watch = pace.PlanWatch(planned_s, 12.0, "1h")
    watch.on_train_start(trainer, None)
    for step in range(first + 1, steps + 1):
        trainer.global_step = step
        now[0] += step_s(step)
        watch.on_train_batch_end(trainer, None)
    return said


def test_a_run_that_is_much_faster_or_slower_than_planned_says_so_once(monkeypatch):
    assert watched(monkeypatch, 3600, lambda step: 0.36) == [
        (
            32,
            "the run is 10.0 times as fast as planned: it takes 6 min, not 1 h 0 min. 120 epochs would fit at this pace: "
            "begin again with --overwrite --epochs 120 in place of --time 1h, or leave it as it is",
        )
    ]
    assert (
        "2.0 times as slow as planned: it takes 2 h 0 min, not 1 h 0 min. 6 epochs would fit"
        in (watched(monkeypatch, 3600, lambda step: 7.2)[0][1])
    )
    assert not watched(monkeypatch, 3600, lambda step: 3.6 * 1.4) and not watched(monkeypatch, 3600, lambda step: 3.6 / 1.4)
    assert not watched(monkeypatch, 3600, lambda step: 3.6 if step > 1 else 900), "the first steps compile"


def test_when_a_pace_is_said(monkeypatch):
    """After ten seconds at the earliest, in the first half, of a resumed run from where it goes on."""
    assert watched(monkeypatch, 3600, lambda step: 0.036)[0][0] == 280
    (said,) = watched(monkeypatch, 3600, lambda step: 3.6 if step < 200 else 0.36)
    assert 300 < said[0] < 400, "others have ended"
    assert not watched(monkeypatch, 3600, lambda step: 3.6 if step < 450 else 0.36)
    assert watched(monkeypatch, 3600, lambda step: 0.36, first=300)[0][0] == 332


def test_a_run_watches_its_plan(digits, tmp_path, monkeypatch, capsys):
    """That was chosen by a measure, resumed or not; and no other run."""
    monkeypatch.setattr(preparation, "measure_step", lambda resolved, device: 300.0)
    monkeypatch.setattr(pace, "LEAST_S", 0.0)
    pretrain(settings(digits, tmp_path / "run", time="1h"))
    said = capsys.readouterr().out
    assert said.count("times as fast as planned") == 1 and "in place of --time 1h" in said
    with_epochs, _ = preparation.resolve_length(settings(digits, tmp_path / "epochs", epochs=3.0))
    resumed, _ = preparation.resolve_length(settings(digits, tmp_path / "run", time="1h", resume=True))
    assert (with_epochs.planned_s, resumed.planned_s) == (None, 3600.0)
