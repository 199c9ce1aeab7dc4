"""The demo, from digits to its table, and the search for its recipe, on digits that do not judge it."""

import re
from contextlib import nullcontext
from functools import partial

import demo_search
import pytest
import yaml
from PIL import Image

from simmim import load_encoder
from simmim.cli import demo, main
from simmim.data.digits import write_digits
from simmim.finetune.label_study.results import Rates, Trial

# What takes long, by recipe; everything else is the demo's.
SHORTER = {
    "pretrain/demo.yaml": {"epochs": 0.2, "optim": {"lr": 3.2e-2, "warmup_epochs": 0}},
    "finetune/demo.yaml": {"steps": 1},
    "finetune/demo-unlabeled.yaml": {"steps": 2},
}


@pytest.fixture
def shortened(monkeypatch, tmp_path):
    """300 digits, an epoch of a fifth, one step of each fine-tuning, in this process."""
    real = demo.recipe_path

    def recipe_path(name):
        file = tmp_path / name.replace("/", "-")
        recipe = yaml.safe_load(real(name).read_text(encoding="utf-8"))
        file.write_text(yaml.safe_dump(recipe | SHORTER[name]), encoding="utf-8")
        return file

    monkeypatch.setattr(demo, "recipe_path", recipe_path)
    monkeypatch.setattr("simmim.data.digits.write_digits", partial(write_digits, count=300))
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())


def test_the_demo_ends_with_its_table(shortened, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seeds", "2"]) == 0
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert re.findall(r"^\| (\d+) \| [\d.]+ ± [\d.]+ \| [\d.]+ ± [\d.]+ \| [+−-]", table, re.M) == ["5", "10", "5"]
    assert "| labels per class | pre-trained, with unlabeled | pre-trained | paired gain | seeds |" in table
    assert Image.open(out / "reconstructions.png").size[0] > 4 * 28
    assert load_encoder(out / "pretrain").config.channels == (32, 64)
    configs = [yaml.safe_load(file.read_text()) for file in (out / "finetune").rglob("config.yaml")]
    chosen = {(config["init"] == "none", config["seed"], config["labels_per_class"]) for config in configs}
    assert len(configs) == len(chosen) == 8
    configs += [yaml.safe_load(file.read_text()) for file in (out / "finetune-unlabeled").rglob("config.yaml")]
    with_unlabeled = [config for config in configs if config["data"]["unlabeled"]]
    assert [config["labels_per_class"] for config in with_unlabeled] == [5, 5] and len(configs) == 10
    for config in configs:
        if config["init"] == "none":
            assert (config["optim"]["lr"], config["optim"]["layer_decay"]) == tuple(demo.SCRATCH_TWIN.values())
            assert config["encoder"]["like"] == str(out / "pretrain")


def contents(folder):
    """The images of a folder, as bytes."""
    return {file.read_bytes() for file in folder.rglob("*.png")}


def test_development_digits_are_no_test_digits(digits, tmp_path):
    """Development and training digits together are the demo's training digits; a test digit is nowhere on the disk."""
    development = write_digits(tmp_path, count=300, development=True)
    assert sorted(path.name for path in development.labeled.iterdir()) == ["train", "val"]
    train, judges = (contents(development.labeled / part) for part in ("train", "val"))
    assert (len(train), len(judges)) == (180, 60) and not train & judges
    assert train == contents(development.unlabeled) and train | judges == contents(digits.unlabeled)
    assert not contents(tmp_path) & contents(digits.labeled / "test")


def test_the_search_takes_the_best_of_each_arm(encoder_folder, tmp_path, monkeypatch, capsys):
    """Scores are given: the pre-trained arm is best at 0.65536 and 0.8, the other at 0.32768 and 1, both after 1,400 steps,
    and the encoder of a pre-training with units of 8 px is better than the recipe's."""
    jobs = []

    def run_trial(job, out, keep_weights):
        jobs.append(job)
        rates = Rates(job.settings.optim.lr_factor, job.settings.optim.layer_decay)
        best = Rates(1, 1.0) if job.settings.init == "none" else Rates(2, 0.8)
        distance = abs(rates.lr_factor - best.lr_factor) + abs(rates.layer_decay - best.layer_decay)
        seed = job.settings.seed - 100
        gain = 0.05 * ("units of 8 px" in job.arm.name) + (job.settings.steps == 1400) * 0.01 * seed
        return {"accuracy": 0.5 - distance / 10 + 0.01 * seed + gain, "validation_loss": 1.0}

    monkeypatch.setattr(demo_search, "run_trial", run_trial)
    monkeypatch.setattr(demo_search, "write_digits", partial(write_digits, count=100))
    monkeypatch.setattr(demo_search.Search, "encoder", lambda self, name="", changes=(): encoder_folder)
    assert demo_search.main(["--out", str(tmp_path), "--seeds", "3", "--labels", "2"]) == 0
    text = capsys.readouterr().out
    assert "| pre-trained | 0.65536 | 0.8 | 51.0 |" in text and "| pre-trained | 0.16384 | 0.65 | 34.5 |" in text
    assert "| from scratch | 0.16384 | 0.65 | 42.5 |" in text and "| from scratch | 0.32768 | 0.8 | 49.0 |" in text
    edge = "at the edge of what was tried: learning rate"
    assert f"pre-trained: learning rate 0.65536, layer decay 0.8; {edge}\n" in text
    assert "from scratch: learning rate 0.32768, layer decay 1\n" in text
    assert "| the recipe's | 51.0 | 51.0 |\n| 350 steps | 51.0 (+0.0 ± 0.0) | 51.0 (+0.0 ± 0.0) |" in text
    assert "| 1,400 steps | 52.0 (+1.0 ± 0.6) | 52.0 (+1.0 ± 0.6) |" in text  # gains of 0, 1 and 2: 1 / √3
    assert "| the recipe's | 51.0 |\n| learning rate 0.016 | 51.0 (+0.0 ± 0.0) |" in text
    assert "| mask units of 8 px | 56.0 (+5.0 ± 0.0) |" in text
    assert len({job.name for job in jobs}) == 2 * 5 * 3 + (2 * 6 + 5) * 3
    affines = {(job.settings.data.affine.degrees, job.settings.data.affine.shift) for job in jobs}
    assert affines == {(15, 0.06), (0, 0), (7.5, 0.03), (30, 0.12)}
    labeled = tmp_path / "digits/labeled"
    assert {job.settings.data.path for job in jobs} == {str(labeled)} and not (labeled / "test").exists()
    assert min(job.settings.seed for job in jobs) > 50  # labels that the demo does not draw


def test_edges_of_a_grid():
    factors, decays = (0.5, 1, 2), (0.65, 0.8, 1.0)
    assert demo_search.edges(Rates(1, 0.8), factors, decays) == demo_search.edges(Rates(1, 1.0), factors, decays) == []
    assert demo_search.edges(Rates(0.5, 0.65), factors, decays) == ["learning rate", "layer decay"]
    trials = [Trial("a", 5, seed, Rates(1, 0.8), score, 1.0) for seed, score in enumerate((0.2, 0.4))]
    assert demo_search.mean_accuracies(trials) == {Rates(1, 0.8): pytest.approx(0.3)}
