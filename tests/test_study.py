"""Accuracy against labels: which images judge, equal tuning of all arms, and a study by the command."""

import csv
import json
import shutil
import statistics
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from simmim.cli import main
from simmim.cli.train import study_settings
from simmim.data import read_labeled_images
from simmim.finetune import ClassificationSettings, EncoderSettings, LabeledSettings, StudySettings, finetune
from simmim.finetune.classification.folds import assign_folds
from simmim.finetune.label_study.arms import Arm, pretrained_and_scratch
from simmim.finetune.label_study.report import comparison_table
from simmim.finetune.label_study.results import Rates, Trial, read_trials, write_trials
from simmim.finetune.label_study.study import prepare_study, rate_grid
from simmim.finetune.label_study.trials import (
    Tuning,
    best_rates,
    build_job,
    read_metrics,
    result_file,
    run_arms,
    tuning_cost,
)
from simmim.finetune.settings import OptimSettings
from simmim.messages import Notice


def trial(arm, labels, seed, accuracy, lr=0.1, loss=1.0, fold=None):
    return Trial(arm, labels, seed, Rates(lr, 0.75), accuracy, loss, fold)


def test_trials_are_read_as_they_were_written(tmp_path):
    trials = [trial("a, b", "all", 0, 0.1234, lr=0.25, loss=2.5), trial("c", 5, 1, 1.0, fold=(1, 3))]
    trials.append(replace(trials[1], rates=Rates(3.0, None), fold=None))
    write_trials(tmp_path / "trials.csv", trials)
    assert read_trials(tmp_path / "trials.csv") == trials


# --- Tuning ----------------------------------------------------------------------------------------------------------


def test_folds_are_stratified_and_even():
    """As scikit-learn divides: each class evenly, the parts' sizes too; every label in one part; by the seed alone."""
    labels = np.repeat([0, 1, 2], [7, 5, 6])
    parts = assign_folds(labels, 3, seed=4)
    for label in range(3):
        counts = np.bincount(parts[labels == label], minlength=3)
        assert counts.max() - counts.min() <= 1
    sizes = sorted(np.bincount(parts))
    reference = sorted(len(held) for _, held in StratifiedKFold(3, shuffle=True, random_state=0).split(labels, labels))
    assert sizes == reference == [6, 6, 6]
    assert (parts == assign_folds(labels, 3, seed=4)).all() and (parts != assign_folds(labels, 3, seed=5)).any()
    with pytest.raises(ValueError, match="no class has more than 7 labels, which cannot be divided into 8 parts"):
        assign_folds(labels, 8, seed=0)
    assert sorted(assign_folds(labels, 7, seed=0)[:7]) == list(range(7))


def test_folds_of_pages():
    """Those of a file are in one part. A class of fewer files than parts is in some of them, of one file in none, as with
    labels; where each image is a file, the parts are those without files."""
    labels = np.repeat([0, 1, 2, 3], [6, 4, 6, 3])
    files = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8])
    for seed in range(5):
        parts = assign_folds(labels, 3, seed, files)
        by_file = [[set(parts[files == file]) for file in np.unique(files[labels == label])] for label in range(4)]
        for label in (0, 1):
            assert sorted(map(sorted, by_file[label])) == [[0], [1], [2]]
        (first,), (second,) = by_file[2]
        assert first != second and min(first, second) >= 0
        assert by_file[3] == [{-1}]
        assert (assign_folds(labels, 3, seed, np.arange(len(labels))) == assign_folds(labels, 3, seed)).all()
    with pytest.raises(ValueError, match=r"pages of 3 files, held out whole, .* too few to choose rates by 3 parts"):
        assign_folds(np.repeat([0, 1], [4, 3]), 3, 0, np.array([0, 0, 1, 1, 2, 2, 2]))
    halves = assign_folds(np.repeat([0, 1], [4, 3]), 2, 0, np.array([0, 0, 1, 1, 2, 2, 2]))
    assert sorted(halves.tolist()) == [-1, -1, -1, 0, 0, 1, 1]


def test_folds_of_images_that_are_files_stay_as_they_were():
    """Stored trials of a study are those of these parts."""
    labels = np.repeat([0, 1, 2, 3], [5, 1, 2, 4])
    assert assign_folds(labels, 3, seed=7).tolist() == [0, 2, 0, 1, 1, -1, 2, 0, 1, 1, 0, 2]


def test_classes_with_fewer_labels_than_folds():
    """Each label of a small class is held out once, in parts of its own; a single one never, as nothing would be left."""
    labels = np.repeat([0, 1, 2], [7, 1, 2])
    for seed in range(5):
        parts = assign_folds(labels, 3, seed)
        assert sorted(np.bincount(parts[labels == 0])) == [2, 2, 3]
        assert parts[labels == 1].tolist() == [-1]
        assert len(set(parts[labels == 2])) == 2 and parts[labels == 2].min() >= 0


def test_a_class_with_fewer_labels_than_asked_for(digits, encoder_folder, tmp_path, capsys):
    """It gives what it has, also in the parts of the cross-validation; the others' draws are as without it."""
    from simmim.finetune.classification.preparation import read_labels

    for name, count in (("0", 1), ("1", 4), ("2", 24), ("3", 24)):
        for part in ("train", "test"):
            files = sorted((digits.labeled / part / name).glob("*.png"))[: count if part == "train" else None]
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for file in files:
                shutil.copy(file, tmp_path / "data" / part / name)
    settings = StudySettings(
        data=str(tmp_path / "data"), out=str(tmp_path), init=str(encoder_folder), labels="2,10,all,99", seeds=2, folds=3
    )
    prepared = prepare_study(settings)
    assert prepared.labels == {2: 7 / 4, 10: 25 / 4, "all": 53 / 4}
    said = "10 labels per class: 2 of 4 classes have fewer, the smallest 1, and all are taken"
    output = capsys.readouterr().out
    assert f"at most    {said}\n" in output
    assert "left out   99 labels per class: no class has more than 24 images\n" in output
    assert prepared.notes == (
        "With 2 labels per class: 1 of 4 classes has fewer, 1, and all are taken.",
        f"With {said}.",
        "A class with a single label is never held out to choose rates.",
    )
    sizes = {}

    def run(job):
        train, validation = (np.bincount(part["label"], minlength=4).tolist() for part in parts_of(job))
        sizes.setdefault((job.settings.labels_per_class, bool(job.settings.data.fold)), []).append((train, validation))
        return {"accuracy": 0.5, "validation_loss": 1.0}

    def parts_of(job):
        labels = read_labels(job.settings)
        return labels.train, labels.validation

    tuning = Tuning(rate_grid(prepared.settings)[:2], 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        result = run_arms(prepared.arms[:1], prepared.labels, (0,), tmp_path, processes=0, tuning=tuning, run=run)
    assert sizes[10, False] == [([1, 4, 10, 10], [6, 6, 6, 6])]
    folds = sizes[10, True]
    assert len(folds) == 2 * 3 and all(held[0] == 0 and min(train) > 0 for train, held in folds)
    assert np.sum([held for _, held in folds[:3]], axis=0).tolist() == [0, 4, 10, 10]
    assert len(sizes[2, True]) == 2 * 2 and len(sizes[None, True]) == 2 * 3
    assert comparison_table(result.trials, ("pre-trained",) * 2, tuple(result.labels)).splitlines()[3].startswith("| 10 |")


def test_arms_of_similar_names_have_files_of_their_own(tmp_path):
    """What an earlier version has stored, with hyphens for spaces, is still whose it is."""
    base = ClassificationSettings(data="images", out="unused", init="enc", optim=OptimSettings(lr=0.1, layer_decay=0.7))
    names = ["a b", "a-b", "a+b", "a%20b", "a  b", "a%2Bb"]
    arms = [Arm(name, base, fingerprint=number) for number, name in enumerate(names)]
    jobs = [build_job(arm, 2, 0, Rates(1.0, None)) for arm in arms]
    assert len({result_file(tmp_path, job) for job in jobs}) == len(jobs)
    assert all(" " not in job.name for job in jobs)
    older = tmp_path / "trials/2-labels/a-b-seed-0.json"
    older.parent.mkdir(parents=True)
    older.write_text(json.dumps({"identity": jobs[0].identity, "metrics": {"accuracy": 0.5}}))
    assert [read_metrics(job, tmp_path) for job in jobs] == [{"accuracy": 0.5}, *[None] * 5]


def test_a_fold_sees_none_of_the_validation_images(digits):
    from simmim.finetune.classification.preparation import read_labels

    settings = ClassificationSettings(data=LabeledSettings(str(digits.labeled)), out="unused", labels_per_class=5, seed=3)
    chosen = read_labeled_images(settings.data.path, 5, 3)
    ours = {row["image"]["path"] for row in chosen.train}
    held = []
    for part in range(3):
        fold = read_labels(replace(settings, data=replace(settings.data, fold=(part, 3))))
        train, validation = ({row["image"]["path"] for row in rows} for rows in (fold.train, fold.validation))
        assert train | validation == ours and not train & validation
        held += sorted(validation)
    assert sorted(held) == sorted(ours)


def images_of(job):
    """Paths of the images that a job trains on, and of those that it is validated with."""
    from simmim.finetune.classification.preparation import read_labels

    labels = read_labels(job.settings)
    return tuple({row["image"]["path"] for row in part} for part in (labels.train, labels.validation))


@pytest.mark.parametrize("part, num_judging", [("train", 40), ("", 60)])
def test_no_image_that_trains_or_tunes_in_any_seed_judges(part, num_judging, digits, encoder_folder, tmp_path):
    """Of labels without a validation part a fifth of each class (4 of 24) judges all seeds, arms and numbers of labels."""
    data = str(digits.labeled / part)
    settings = StudySettings(
        data=data, out=str(tmp_path), init=str(encoder_folder), labels="2,all", seeds=2, seed=5, tuning_seeds=2, folds=2
    )
    prepared = prepare_study(settings)
    settings, arms, labels = prepared.settings, prepared.arms, prepared.labels
    used, judging, validations = set(), set(), set()

    def run(job):
        train, held_out = images_of(job)
        if job.settings.data.fold:
            used.update(train | held_out)
        else:
            used.update(train)
            judging.add(frozenset(held_out))
            validations.add(job.settings.validations)
        return {"accuracy": 0.5, "validation_loss": 1.0}

    tuning = Tuning(rate_grid(settings)[:2], settings.folds, settings.tuning_seeds)
    run_arms(arms[:1], labels, (5, 6), tmp_path, processes=0, tuning=tuning, run=run)
    (judging,) = judging
    assert len(judging) == num_judging and not used & judging
    assert validations == {1}, "a judged run looks once: of two looks the better one could be taken"


def test_a_single_run_draws_its_own_validation_images_unless_told_otherwise(digits):
    settings = ClassificationSettings(data=LabeledSettings(str(digits.labeled / "train")), out="unused", labels_per_class=2)
    alike = replace(settings, data=replace(settings.data, validation_seed=0))
    (own, _, same, other) = (
        images_of(build_job(Arm("a", chosen), 2, seed, Rates(1.0, None)))
        for chosen, seed in ((settings, 0), (settings, 1), (alike, 0), (alike, 1))
    )
    assert same[1] == other[1] != own[1] and same[0] != other[0]


def test_the_rates_of_the_highest_held_out_accuracy_are_chosen():
    trials = [
        *(trial("a", 5, 0, accuracy, lr=0.1, fold=(part, 2)) for part, accuracy in enumerate((0.5, 0.7))),
        *(trial("a", 5, 0, accuracy, lr=0.2, fold=(part, 2)) for part, accuracy in enumerate((0.6, 0.7))),
        *(trial("a", 5, 0, accuracy, lr=0.3, loss=0.9, fold=(part, 2)) for part, accuracy in enumerate((0.8, 0.5))),
    ]
    assert best_rates(trials).lr_factor == 0.3, "0.2 and 0.3 have the same accuracy, 0.3 the lower loss"
    assert best_rates(trials[:4]).lr_factor == 0.2


def test_every_arm_is_tuned_on_the_same_grid_with_its_own_labels(tmp_path):
    """With given accuracies: which trials are run, and with which rates the final ones."""
    base = ClassificationSettings(data="images", out="unused", init="enc", optim=OptimSettings(lr=0.1, layer_decay=0.7))
    arms = [Arm("pre-trained", base), Arm("from scratch", replace(base, init="none"))]
    best = {("enc", 5): 0.3, ("enc", 2): 0.1, ("none", 5): 0.1, ("none", 2): 0.03}
    jobs = []

    def run(job):
        settings = job.settings
        jobs.append(job)
        best_factor = best.get((settings.init, settings.labels_per_class))
        return {"accuracy": 0.9 if settings.optim.lr_factor == best_factor else 0.5, "validation_loss": 1.0}

    tuning = Tuning(tuple(Rates(factor, 0.7) for factor in (0.03, 0.1, 0.3)), num_folds=3)
    result = run_arms(arms, {1: 1, 2: 2, 5: 5}, (0, 1), tmp_path, processes=0, tuning=tuning, run=run)
    held_out = [job for job in jobs if job.settings.data.fold]
    assert len(held_out) == 2 * 3 * (2 + 3), "arms × rates × folds, no more folds than labels"
    assert {job.settings.seed for job in held_out} == {0} and len({job.name for job in jobs}) == len(jobs)
    rates = {(t.arm, t.labels): t.rates.lr_factor for t in result.trials}
    assert rates == {
        ("pre-trained", 1): 0.1,
        ("pre-trained", 2): 0.1,
        ("pre-trained", 5): 0.3,
        ("from scratch", 1): 0.03,
        ("from scratch", 2): 0.03,
        ("from scratch", 5): 0.1,
    }, "one label cannot be held out: the rate at two serves"
    assert len(result.trials) == 2 * 3 * 2 and len(result.tuning) == len(held_out)


def test_a_layer_decay_of_one_is_tried_by_every_arm_unless_told_otherwise(tmp_path):
    """Both sides choose among each learning rate with the default decay, which follows from the labels, and with 1."""
    base = ClassificationSettings(data="images", out="unused", init="enc")
    own = replace(base, optim=OptimSettings(layer_decay=0.9))
    arms = [Arm("pre-trained", base), Arm("from scratch", replace(base, init="none")), Arm("own", own)]
    settings = study_settings(["--data", "images", "--out", "unused", "--init", "enc"])
    grid = rate_grid(settings)

    def run(job):
        return {"accuracy": job.settings.optim.layer_decay, "validation_loss": 1.0}

    tuning = Tuning(grid, num_folds=2)
    result = run_arms(arms, {5: 5, 50: 50}, (0, 1), tmp_path, processes=0, tuning=tuning, run=run)
    for arm, labels, decay in (("pre-trained", 5, 0.65), ("from scratch", 50, 0.75), ("own", 5, 0.9)):
        tried = {trial.rates for trial in result.tuning if (trial.arm, trial.labels) == (arm, labels)}
        assert tried == {Rates(factor, value) for factor in (0.3, 1.0, 3.0) for value in (decay, 1.0)}
    assert {trial.rates.layer_decay for trial in result.trials} == {1.0}
    assert tuning_cost(tuning, arms, {5: 5, 50: 50}, (0, 1)).startswith("72 to tune (6 rates, ")
    given = ["--data", "images", "--out", "unused", "--init", "enc", "--layer_decays"]
    assert {rates.layer_decay for rates in rate_grid(study_settings([*given, "[default,0.9]"]))} == {"default", 0.9}
    assert {rates.layer_decay for rates in rate_grid(study_settings([*given, "[]"]))} == {None}
    frozen = replace(settings, freeze=True, scratch=False, against="other")
    assert {rates.layer_decay for rates in rate_grid(frozen)} == {None}, "no decay reaches the head"


def test_the_identity_of_a_job_holds_all_that_its_result_depends_on():
    base = ClassificationSettings(data="images", out="unused", init="enc")
    job = build_job(Arm("a", base, 7), 5, 0, Rates(0.1, 0.7))
    same = build_job(Arm("a", replace(base, out="elsewhere", workers=3), 7), 5, 0, Rates(0.1, 0.7))
    assert job.identity == same.identity
    for other in (
        build_job(Arm("a", base, 8), 5, 0, Rates(0.1, 0.7)),
        build_job(Arm("a", replace(base, steps=3), 7), 5, 0, Rates(0.1, 0.7)),
        build_job(Arm("a", base, 7), 5, 1, Rates(0.1, 0.7)),
        build_job(Arm("a", base, 7), 5, 0, Rates(0.2, 0.7)),
        build_job(Arm("a", base, 7), 5, 0, Rates(0.1, 0.7), (0, 2)),
    ):
        assert other.identity != job.identity


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_killed_study_leaves_no_process(digits, encoder_folder, tmp_path, fork_server):
    """SIGKILL to the study alone; the processes of its trials end too."""
    call = words(digits, encoder_folder, tmp_path / "study", "--labels", "2", "--steps", "100000", "--lr-factors", "[1]")
    study = fork_server.start(*call)
    try:
        study.until((tmp_path / "study/runs/2-labels/pre-trained-seed-0/config.yaml").is_file)
        children = children_of(study.pid)
        assert len(children) >= 2
    finally:
        study.kill(group=False)
        study.wait()
    wait_until(lambda: not any(alive(child) for child in children))


def wait_until(done, seconds=90.0):
    """Poll ten times a second until `done()` is true."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def children_of(process):
    """Ids of the processes that `process` has started."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process):
    """Whether a process runs and is not a zombie."""
    try:
        return "Z" not in Path(f"/proc/{process}/status").read_text().split("State:")[1].split()[0]
    except FileNotFoundError:
        return False


# --- As a whole ------------------------------------------------------------------------------------------------------


def test_twin_from_scratch():
    """All settings are the same but for the weights, and the learning rate and layer decay that suit them."""
    optim = OptimSettings(lr=0.1, layer_decay=0.7)
    settings = ClassificationSettings(data="images", out="run", init="enc", optim=optim, epochs=3.0)
    pretrained, scratch = pretrained_and_scratch(settings, scratch_lr=0.2, scratch_layer_decay=0.9)
    assert pretrained == Arm("pre-trained", settings)
    assert scratch.settings == ClassificationSettings(
        data="images",
        out="run",
        encoder=EncoderSettings(like="enc"),
        optim=OptimSettings(lr=0.2, layer_decay=0.9),
        epochs=3.0,
    )


def words(digits, encoder_folder, out, *more):
    data = ["--data", str(digits.labeled), "--data.flip", "0", "--init", str(encoder_folder), "--out", str(out)]
    rates = ["--optim.lr", "0.3", "--optim.layer_decay", "0.7", "--lr-factors", "[0.5,1]", "--layer-decays", "[]"]
    short = ["--steps", "4", "--batch-size", "10", "--seeds", "2", "--folds", "2", "--processes", "2"]
    return ["study", *data, *rates, *short, *more]


@pytest.fixture(scope="module")
def finished(digits, encoder_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "run"
    assert main(words(digits, encoder_folder, out, "--labels", "1,2,999", "--against", str(encoder_folder))) == 0
    return out


def rows(file):
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def test_a_study_by_the_command(finished, encoder_folder):
    results, tuning = rows(finished / "results.csv"), rows(finished / "tuning.csv")
    arms = ("pre-trained", encoder_folder.name, "from scratch")
    kinds = [(row["labels_per_class"], row["seed"], row["arm"]) for row in results]
    assert kinds == [(labels, seed, arm) for labels in "12" for seed in "01" for arm in arms]
    assert len(tuning) == 3 * 2 * 2 and {row["fold"] for row in tuning} == {"1 of 2", "2 of 2"}
    by_kind = dict(zip(kinds, results))
    for labels in "12":
        for seed in "01":
            first, same = by_kind[labels, seed, "pre-trained"], by_kind[labels, seed, encoder_folder.name]
            assert first["accuracy"] == same["accuracy"], "the same encoder under another name"
    table = (finished / "table.md").read_text(encoding="utf-8")
    mean = statistics.fmean(float(by_kind["2", seed, "from scratch"]["accuracy"]) for seed in "01")
    assert f"| {100 * mean:.1f} ± " in table.splitlines()[3] and table.count("\n- With ") == 4
    assert (finished / "study.png").read_bytes().startswith(b"\x89PNG")
    kept = finished / "runs/2-labels/from+scratch-seed-1"
    assert (kept / "metrics.csv").is_file() and not (kept / "checkpoints").exists() and not (kept / "encoder").exists()
    assert not any((finished / "tuning-runs").rglob("*.yaml"))


def test_a_trial_is_a_run_with_the_same_labels(finished, digits, encoder_folder, tmp_path):
    row = next(row for row in rows(finished / "results.csv") if (row["labels_per_class"], row["seed"]) == ("2", "1"))
    settings = ClassificationSettings(
        data=LabeledSettings(str(digits.labeled), flip=0.0),
        out=str(tmp_path / "alone"),
        init=str(encoder_folder),
        labels_per_class=2,
        seed=1,
        steps=4,
        batch_size=10,
        validations=1,
        optim=OptimSettings(lr=0.3 * float(row["lr_factor"]), layer_decay=float(row["layer_decay"])),
    )
    assert finetune(settings, quiet=True).accuracy == pytest.approx(float(row["accuracy"]), abs=5e-5)


def test_a_study_goes_on_and_grows(finished, digits, encoder_folder, capsys, monkeypatch):
    """Trials with a stored result are not run again, those that are missing or of other weights are; seeds and labels may be
    added. Trials run in this process: starting another takes longer."""
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())
    before = rows(finished / "results.csv")
    older = finished / "trials/2-labels/pre-trained-seed-0.json"
    found = json.loads(older.read_text())
    del found["identity"]["settings"]["data"]["validation_seed"]  # an earlier version did not have it
    older.write_text(json.dumps(found))
    written = {file: file.stat().st_mtime_ns for file in (finished / "trials").rglob("*.json")}
    lost = finished / "trials/1-labels/pre-trained-seed-0.json"
    lost.unlink()
    stale = finished / "trials/1-labels/pre-trained-seed-1.json"
    found = json.loads(stale.read_text())
    stale.write_text(json.dumps({**found, "identity": {**found["identity"], "encoder": 1}}))
    call = words(digits, encoder_folder, finished, "--labels", "1,2", "--against", str(encoder_folder), "--seeds", "3")
    assert main([*call, "--processes", "1", "--resume"]) == 0
    after = rows(finished / "results.csv")
    assert [row for row in after if row["seed"] != "2"] == before
    assert len(after) == 2 * 3 * 3
    rewritten = {file for file, time in written.items() if file.stat().st_mtime_ns != time}
    assert rewritten == {lost, stale}
    assert "run again  1 trial stored with other settings, weights or judging images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, said",
    [
        (
            ("--labels", "999"),
            "999 labels per class asked for, no class has more than 24 training images: give up to 24, or all",
        ),
        (("--labels", "0"), "labels per class '0' is not a number from 1 on"),
        (("--labels", "2,2"), "give different numbers"),
        (("--labels", "few"), "labels per class 'few' is not a number"),
        (("--seeds", "1"), "seeds is 1: give 2 or more"),
        (("--lr-factors", "[0]"), "give positive factors of optim.lr"),
        (("--layer-decays", "[1.5]"), "layer_decays are (1.5,): give factors in (0, 1], or default"),
        (("--scratch", "false"), "there is nothing to compare with"),
        (("--init", "none"), "a study compares an encoder with others: give it by init"),
        (("--labels-per-class", "3"), "give a study's numbers by labels, as in 1,5,20"),
        (("--data.fold", "[0,2]"), "give the number of parts of its cross-validation by folds"),
        (("--against", "no/such/encoder"), "no/such/encoder"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--image-size", "3"), "less than a patch of the encoder: give 4 or more"),
    ],
)
def test_refused(more, said, digits, encoder_folder, tmp_path, capsys):
    out = tmp_path / "study"
    assert main(words(digits, encoder_folder, out, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not out.exists()


def test_an_existing_study_is_not_overwritten(finished, digits, encoder_folder, capsys):
    before = sorted(Path(finished).rglob("*"))
    assert main(words(digits, encoder_folder, finished)) == 2
    assert "--resume" in capsys.readouterr().err and sorted(Path(finished).rglob("*")) == before


def test_settings_of_a_run():
    settings = StudySettings(data="images", out="run", init="a/enc", against="b/enc,c/other", labels="1, all")
    assert settings.labels == (1, "all")
    assert settings.start_names() == {"pre-trained": "a/enc", "enc": "b/enc", "other": "c/other"}
    assert settings.run_settings() == ClassificationSettings(data="images", out="run", init="a/enc")
