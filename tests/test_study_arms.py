"""Arms of a study with unlabeled images: which runs there are, with which rates and images, and what is reported of them."""

import csv
import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from image_files import notices

from simmim.cli import main
from simmim.cli.train import study_settings
from simmim.data import read_labeled_images
from simmim.finetune import ClassificationSettings
from simmim.finetune.classification.preparation import read_labels
from simmim.finetune.classification.self_training.prepare import read_unlabeled
from simmim.finetune.classification.study import STUDY
from simmim.finetune.label_study import study as study_module
from simmim.finetune.label_study.arms import Arm
from simmim.finetune.label_study.contrasts import contrasts_of
from simmim.finetune.label_study.report import plot, report
from simmim.finetune.label_study.results import Rates, Side, StudyResult, Trial
from simmim.finetune.label_study.study import prepare_study, rate_grid
from simmim.finetune.label_study.trials import Tuning, build_job, run_arms


def words(digits, encoder_folder, out, *more):
    data = ["--data", str(digits.labeled), "--data.flip", "0", "--init", str(encoder_folder), "--out", str(out)]
    short = ["--steps", "3", "--batch-size", "10", "--labels", "1,2", "--seeds", "2", "--folds", "2", "--processes", "1"]
    return ["study", *data, *short, "--lr-factors", "[0.5,1]", "--layer-decays", "[]", *more]


def semi_words(digits, encoder_folder, out, *more):
    return words(digits, encoder_folder, out, "--unlabeled", str(digits.unlabeled), *more)


@pytest.fixture
def in_this_process(monkeypatch):
    """Trials in this process: starting others takes longer than the trials."""
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())


def rows(file):
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def jobs_of(settings, tmp_path):
    """The jobs of a prepared study, without running them; and its result."""
    prepared, jobs = prepare_study(settings), []

    def run(job):
        jobs.append(job)
        tuned = {"none": 0.5}.get(job.settings.init, 1.0)
        if job.settings.data.unlabeled:
            tuned = 1.5 - tuned
        return {"accuracy": 0.9 if job.settings.optim.lr_factor == tuned else 0.5, "validation_loss": 1.0}

    tuning = Tuning(rate_grid(settings), settings.folds, settings.tuning_seeds, prepared.tuned)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    result = run_arms(prepared.arms, prepared.labels, seeds, tmp_path, 0, tuning, run=run, left_out=prepared.left_out)
    return jobs, replace(result, notes=prepared.notes)


def test_what_no_run_has_is_said_before_the_runs(monkeypatch):
    """Which are silent: without kornia none has RandAugment, where the images are large enough for it."""
    runs = Arm("pre-trained", ClassificationSettings(data="x", out="run", init="encoder"))

    def said(side_px, installed):
        monkeypatch.setattr("simmim.finetune.classification.defaults.has_kornia", lambda: installed)
        encoder, size = SimpleNamespace(config=SimpleNamespace(in_channels=3)), SimpleNamespace(image_size=(side_px,) * 2)
        start = SimpleNamespace(settings=runs.settings, preprocessing=size, encoder=encoder)
        return notices(STUDY.check_start, runs, start, None, "cpu")[1]

    [line] = said(224, installed=False)
    assert "kornia is not installed" in line and line.endswith("; none of the study's runs has it")
    assert said(224, installed=True) == said(32, installed=False) == []


# --- Which runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, tuned, rates",
    [
        ([], {"plain"}, {"pre-trained": 1.0, "from scratch": 0.5, "pre-trained semi": 1.0, "from scratch semi": 0.5}),
        (["--arms", "semi"], {"plain"}, {"pre-trained semi": 1.0, "from scratch semi": 0.5}),
        (["--arms", "semi", "--tune-arms"], {"semi"}, {"pre-trained semi": 0.5, "from scratch semi": 1.0}),
        (
            ["--arms", "semi,plain", "--tune-arms"],
            {"plain", "semi"},
            {"pre-trained": 1.0, "from scratch": 0.5, "pre-trained semi": 0.5, "from scratch semi": 1.0},
        ),
    ],
)
def test_semi_takes_the_rates_of_the_same_start_unless_it_chooses_its_own(
    more, tuned, rates, digits, encoder_folder, tmp_path
):
    """With given accuracies. All arms of a seed have the same labels."""
    settings = study_settings(semi_words(digits, encoder_folder, tmp_path / "out", "--semi-steps", "7", *more)[1:])
    jobs, result = jobs_of(settings, tmp_path)
    held_out = [job for job in jobs if job.settings.data.fold]
    assert {"semi" if job.settings.data.unlabeled else "plain" for job in held_out} == tuned
    assert {trial.arm: trial.rates.lr_factor for trial in result.trials} == rates and [*result.arms] == [*rates]
    judged = [job.settings for job in jobs if not job.settings.data.fold]
    assert len(judged) == len(rates) * 2 * 2 and len({job.name for job in jobs}) == len(jobs)
    assert {chosen.steps for chosen in judged if chosen.data.unlabeled} == {7}
    assert {chosen.steps for chosen in judged if not chosen.data.unlabeled} <= {3}
    assert {chosen.data.validation_seed for chosen in judged} == {None}, "the source's test part judges"
    cells = report(result).splitlines()[2]
    assert ("(as pre-trained at 2)" in cells) == (tuned == {"plain"})


def test_unlabeled_images_that_are_all_labeled_at_a_number_leave_semi_out(digits, encoder_folder, tmp_path, capsys):
    """The training folder as unlabeled images: at "all" none of them is unlabeled."""
    images = str(digits.labeled / "train")
    call = words(digits, encoder_folder, tmp_path / "out", "--unlabeled", images, "--labels", "2,all")
    _, result = jobs_of(study_settings(call[1:]), tmp_path)
    assert {(trial.arm, trial.labels) for trial in result.trials if trial.arm.endswith("semi")} == {
        ("pre-trained semi", 2),
        ("from scratch semi", 2),
    }
    said = capsys.readouterr().out
    assert "left out   semi with all labels per class: all unlabeled images are labeled ones" in said
    text = report(result)
    (every,) = [line for line in text.splitlines() if line.startswith("| all |") and "±" in line][:1]
    assert every.count("–") >= 2 and "With all labels per class none of these images is unlabeled." in text


def test_judging_images_that_are_labeled_too_are_told(digits, encoder_folder, tmp_path):
    """As a single run tells it: the runs of a study are silent. Those that any encoder was pre-trained with, too."""
    shutil.copytree(digits.labeled, labeled := tmp_path / "labeled")
    for name in ("one", "two"):
        shutil.copy(next((labeled / "test" / "3").glob("*.png")), labeled / "train" / "3" / f"{name}.png")
    shutil.copytree(encoder_folder, other := tmp_path / "other")
    config = {"data": {"path": str(labeled / "test" / "4")}, "model": {}}
    (other / "config.yaml").write_text(json.dumps(config))
    call = words(digits, encoder_folder, tmp_path / "out", "--data", str(labeled), "--against", str(other))
    lines = notices(prepare_study, study_settings(call[1:]))[1]
    assert [line.partition(":")[0] for line in lines] == [
        "1 of 60 validation images is also among the training images",
        f"6 of 60 validation images are also among the pre-training images of {other}",
    ]


def test_what_the_first_seed_labels_is_unlabeled_in_the_others(digits, encoder_folder, tmp_path, capsys):
    """The training folder as unlabeled images, of which each seed labels all but one a class: what seed 0 leaves is labeled
    by others, which leave what it has."""
    images = str(digits.labeled / "train")
    call = words(digits, encoder_folder, tmp_path / "out", "--unlabeled", images, "--labels", "23", "--seeds", "5")
    prepared = prepare_study(study_settings(call[1:]))
    assert not prepared.left_out and "left out" not in capsys.readouterr().out


def test_unlabeled_images_that_are_all_labeled_in_some_run_of_every_number_are_refused(digits, encoder_folder, tmp_path):
    """Seed 0 has not drawn them, others have: before the runs, not in a plot of an arm without any."""
    (tmp_path / "images").mkdir()
    first = {row["image"]["path"] for row in read_labeled_images(digits.labeled, 12, seed=0).train}
    other = next(path for path in sorted((digits.labeled / "train").rglob("*.png")) if str(path) not in first)
    shutil.copy(other, tmp_path / "images")
    call = words(digits, encoder_folder, tmp_path / "out", "--labels", "12", "--seeds", "5")
    with pytest.raises(ValueError, match=r"all 1 image of .* are labeled or judge: give others, or fewer labels"):
        prepare_study(study_settings([*call[1:], "--unlabeled", str(tmp_path / "images")]))


def test_judging_images_are_among_no_unlabeled_ones(digits, encoder_folder, tmp_path, capsys):
    """Under other names: by content. Said once for the study. Labels that are held out to choose rates judge too."""
    shutil.copytree(digits.unlabeled, tmp_path / "images")
    judging = sorted((digits.labeled / "test").rglob("*.png"))[:3]
    for number, image in enumerate(judging):
        shutil.copy(image, tmp_path / f"images/other-name-{number}.png")
    call = words(digits, encoder_folder, tmp_path / "out", "--unlabeled", str(tmp_path / "images"))
    settings = study_settings(call[1:])
    prepared = prepare_study(settings)
    said = capsys.readouterr().out
    assert said.count("unlabeled  ") == 1 and "; 3 of them judge and are left out; " in said
    semi = next(arm for arm in prepared.arms if arm.recipe == "semi")
    chosen = build_job(semi, 2, 0, Rates(1.0, None), (0, 2)).settings
    labels = read_labels(chosen)
    found, held_out = read_unlabeled(chosen, labels), [Path(row["image"]["path"]) for row in labels.validation]
    contents = {Path(row["image"]["path"]).read_bytes() for row in found.images}
    assert found.num_judging == 3 + len(held_out) and not contents & {file.read_bytes() for file in (*judging, *held_out)}


def test_a_start_whose_name_is_an_arm_s_is_numbered():
    given = ["--data", "images", "--out", "out", "--init", "enc", "--against", "a/net semi,b/net,c/from scratch"]
    assert [*study_settings(given).start_names()] == ["pre-trained", "net semi", "net 2", "from scratch 2"]


# --- As a whole ------------------------------------------------------------------------------------------------------


def test_a_study_grows_by_the_unlabeled_images(digits, encoder_folder, tmp_path, in_this_process, capsys, monkeypatch):
    """A plain study goes on with semi: no plain trial is run again, and another ratio runs the semi ones again."""
    out = tmp_path / "study"
    assert main(words(digits, encoder_folder, out)) == 0
    plain = {file: file.stat().st_mtime_ns for file in (out / "trials").rglob("*.json")}
    grown = semi_words(digits, encoder_folder, out, "--semi-steps", "4", "--resume", "--self-training.ratio")
    assert main([*grown, "2"]) == 0
    said = capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in plain} == plain
    assert "8 to tune" in said and "16 to judge" in said
    results = rows(out / "results.csv")
    arms = ["pre-trained", "from scratch", "pre-trained semi", "from scratch semi"]
    assert [row["arm"] for row in results] == arms * 4
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "| labels per class | pre-trained | from scratch | pre-trained semi | from scratch semi | seeds |" in table
    assert "pre-trained semi over pre-trained |" in table and "Your" in table
    run = out / "runs/2-labels/from+scratch+semi-seed-1"
    assert (run / "pseudo-labels.csv").is_file() and "ratio: 2" in (run / "config.yaml").read_text()
    assert "steps: 4" in (run / "config.yaml").read_text()
    capsys.readouterr()
    assert main([*grown, "3"]) == 0
    assert "run again  8 trials stored with other settings" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in plain} == plain
    monkeypatch.setattr(study_module, "run_arms", None)
    assert main([*grown, "3", "--steps", "5"]) == 2, "a plain study's own settings may not change"
    assert "steps was 3, is 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        (("--arms", "plain,semy"), "unknown arm 'semy'; did you mean 'semi'?"),
        (("--arms", "plain,semi"), "semi learns from unlabeled images, give them by data.unlabeled"),
        (("--arms", "plain", "--unlabeled", "x"), "no arm learns from it: add semi to arms"),
        (("--semi-steps", "5"), "semi_steps and tune_arms are about unlabeled images"),
        (("--tune-arms",), "semi_steps and tune_arms are about unlabeled images"),
        (("--semi-steps", "0", "--unlabeled", "x"), "semi_steps is 0: give 1 or more"),
        (("--self-training.ratio", "2"), "self_training is about unlabeled images"),
        (("--unlabeled", "no/such/images"), "no/such/images"),
        (("--unlabeled", "digits", "--self-training.start", "0.9"), "start is 0.9: of 3 steps none is left for"),
        (("--unlabeled", "digits", "--optim.ema", "0"), "optim.ema is 0: with data.unlabeled the average"),
    ],
)
def test_refused(more, said, digits, encoder_folder, tmp_path, capsys):
    out = tmp_path / "study"
    more = [str(digits.unlabeled) if word == "digits" else word for word in more]
    assert main(words(digits, encoder_folder, out, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not out.exists()


# --- The report ------------------------------------------------------------------------------------------------------


def result_of(scores, labels=(10, 20, 40), seeds=4):
    """A study of arms whose scores, a list by labels, are the same with all seeds but for small
    noises, one shared and one of the arm."""
    trials = []
    for arm, values in scores.items():
        for value, score in zip(labels, values):
            for seed in range(seeds):
                own = {"pre-trained": seed % 2, "pre-trained semi": seed // 2, "from scratch semi": 2 * (seed // 2)}
                noise = 0.002 * seed + 0.001 * own.get(arm, 0)
                trials.append(Trial(arm, value, seed, Rates(1.0, None), score + noise, 1.0))
    sides = {arm: Side(arm.removesuffix(" semi"), "semi" if arm.endswith(" semi") else "plain") for arm in scores}
    return StudyResult(tuple(scores), tuple(trials), (), {value: value for value in labels}, sides=sides)


FOUR = {
    "pre-trained": (0.6, 0.7, 0.8),
    "from scratch": (0.5, 0.6, 0.72),
    "pre-trained semi": (0.65, 0.75, 0.85),
    "from scratch semi": (0.5, 0.65, 0.73),
}


def test_pre_training_and_self_training_are_told_apart():
    contrasts = [(contrast.first, contrast.second) for contrast in contrasts_of(result_of(FOUR))]
    assert contrasts == [
        ("pre-trained", "from scratch"),
        ("pre-trained semi", "from scratch semi"),
        ("pre-trained semi", "pre-trained"),
        ("from scratch semi", "from scratch"),
        ("pre-trained semi", "from scratch"),
    ]


def test_what_labels_are_worth():
    """From scratch 10, 20 and 40 labels have 50, 60 and 72 %: 60 % are 20 labels, and 70 % 20 · 2^(10 / 12) = 36. 80 % are
    more than was measured, and with no more labels than 40: not said."""
    *_, plain, semi, pretrained, scratch, both = report(result_of(FOUR)).splitlines()
    worth = (
        r"Your 10 labels per class are worth 20 \(95 % interval 20\); 20 labels per class are worth 36 \([^)]*\) without "
    )
    assert re.fullmatch(worth + r"pre-training\.", plain)
    assert semi.startswith("With unlabeled images, your 10 labels per class are worth 20 (95 % interval 20)")
    assert pretrained.startswith("With pre-training, your 10 labels per class are worth 14")
    assert "20 labels per class are worth 27" in scratch and "10 labels" not in scratch
    assert scratch.endswith(" without unlabeled images.") and both.endswith(" without either.")
    assert both.startswith("Your 10 labels per class are worth 27 (95 % interval 27)") and "more than 40" in both


def test_labels_whose_gain_may_be_chance_are_said_to_be_worth_nothing_more():
    result = result_of({"pre-trained": (0.5, 0.6), "from scratch": (0.5, 0.6)}, labels=(10, 20))
    assert report(result).splitlines()[-1] == (
        "Your labels are not shown to be worth more than without pre-training: no gain is beyond chance."
    )


def test_the_plot_has_a_color_per_start_and_dashes_for_unlabeled_images():
    lines = [container.lines[0] for container in plot(result_of(FOUR)).axes[0].containers]
    assert [line.get_color() for line in lines] == ["C0", "C1", "C0", "C1"]
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--"]


def test_the_identity_of_a_semi_trial_holds_its_settings(digits, encoder_folder, tmp_path):
    def identity(*more):
        settings = study_settings(semi_words(digits, encoder_folder, tmp_path / "out", *more)[1:])
        arm = next(arm for arm in prepare_study(settings).arms if arm.recipe == "semi")
        return json.dumps(build_job(arm, 2, 0, Rates(1.0, None)).identity)

    assert identity() == identity("--tune-arms") != identity("--self-training.start", "0.2")
    assert identity() != identity("--semi-steps", "9")
