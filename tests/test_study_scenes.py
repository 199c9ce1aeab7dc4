"""Studies of segmentation and detection: draws, folds, judging images, and a study by the command."""

import csv
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simmim.cli import main
from simmim.cli.train import study_settings
from simmim.data.label_map_files import SceneStatistics
from simmim.data.scene_draws import SceneDraw, SceneSource
from simmim.finetune.dense.study import available_labels
from simmim.finetune.detection.settings import HeadSettings
from simmim.finetune.label_study.study import prepare_study, rate_grid
from simmim.finetune.label_study.trials import Tuning, measure_of, run_arms
from simmim.finetune.registry import TASKS, TaskEntry, study_of, task_named

TASK_WORDS = {
    "segmentation": ["--head.width", "16", "--head.norm", "image"],
    "detection": ["--head.width", "16", "--head.convolutions", "1"],
}
SCORES = {"segmentation": "mean_iou", "detection": "ap"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Trials in this process: starting others takes longer than the trials."""
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())


def words(task, data, encoder_folder, out, *more):
    short = ["--steps", "1", "--batch-size", "2", "--workers", "0", "--precision", "32-true", "--image-size", "32"]
    size = ["--labels", "5,6", "--seeds", "2", "--folds", "2", "--lr-factors", "[0.5,1]", "--layer-decays", "[]"]
    given = ["--data", str(data), "--init", str(encoder_folder), "--out", str(out)]
    return ["study", "--task", task, *given, *short, *size, *TASK_WORDS[task], *more]


def settings_of(task, data, encoder_folder, out, *more):
    return study_settings(words(task, data, encoder_folder, out, *more)[1:])


def rows(file):
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


# --- Draws -----------------------------------------------------------------------------------------------------------


def source_of(count=20, has_validation=True):
    """Scenes of which every third has class 1, and all have class 0."""
    scenes = [SceneStatistics("", (8, 8), {0: 60, 1: 4} if number % 3 == 0 else {0: 64}) for number in range(count)]
    return SceneSource("scenes", scenes, (0, 1), has_validation)


def test_folds_divide_the_labels_of_a_run():
    source = source_of()
    chosen = source.choose(7, 3, SceneDraw()).train
    held = []
    for part in range(3):
        train, validation = source.choose(7, 3, SceneDraw(fold=(part, 3)))
        assert sorted(train + validation) == chosen and len(validation) in (2, 3)
        held += validation
    assert sorted(held) == chosen


def test_pools_of_seeds_share_nothing_and_hold_every_class():
    source = source_of()
    drawn = [set(source.choose(4, seed, SceneDraw(pool=(seed, 4))).train) for seed in range(4)]
    assert len(set().union(*drawn)) == 16
    with pytest.raises(ValueError, match="and a class is in none of the 1: give more"):
        [source.choose(1, seed, SceneDraw(pool=(seed, 20))) for seed in range(20)]
    with pytest.raises(ValueError, match="20 labeled scenes cannot be divided into 21 parts"):
        source.choose(1, 0, SceneDraw(pool=(0, 21)))


def test_a_fifth_is_held_out_once_for_a_study():
    source = source_of(has_validation=False)
    (first, *others) = [source.choose(3, seed, SceneDraw(validation_seed=5)) for seed in range(4)]
    assert len(first.validation) == 4 and all(other.validation == first.validation for other in others)
    assert not {row for chosen in (first, *others) for row in chosen.train} & set(first.validation)
    assert source.choose(3, 0, SceneDraw()).validation != source.choose(3, 1, SceneDraw()).validation


@pytest.mark.parametrize("pages", [1, 3])
def test_a_fifth_or_folds_of_pages_are_whole_files(pages):
    """Pages of a file resemble one another: a fifth of the files, at least one, and folds of files."""
    files = tuple(number // pages for number in range(4 * pages))
    source = replace(source_of(4 * pages, has_validation=False), files=files)
    for seed in range(5):
        train, validation = source.choose(None, seed, SceneDraw())
        assert len(validation) == pages and sorted(train + validation) == list(range(4 * pages))
        assert not {files[row] for row in train} & {files[row] for row in validation}
        parts = [source.choose(None, seed, SceneDraw(fold=(part, 3))) for part in range(3)]
        assert sorted(row for _, held in parts for row in held) == train
        assert all(len(held) == pages for _, held in parts)
        assert not any({files[row] for row in part} & {files[row] for row in held} for part, held in parts)


def test_a_fifth_needs_two_scenes_or_files():
    single, one_file = source_of(1, False), replace(source_of(4, False), files=(0,) * 4)
    with pytest.raises(ValueError, match="'scenes' has 1 scene: give at least 2, one to train on"):
        single.choose(None, 0, SceneDraw())
    with pytest.raises(ValueError, match="has 4 scenes, pages of 1 file, which resemble one another: give at least 2 files"):
        one_file.choose(None, 0, SceneDraw())
    with pytest.raises(ValueError, match="has 2 scenes, pages of 1 file"):
        replace(source_of(2, False), files=(0, 0)).choose(None, 0, SceneDraw())
    assert [len(rows) for rows in source_of(2, False).choose(None, 0, SceneDraw())] == [1, 1]


def test_pools_of_as_many_scenes_as_classes():
    """Two classes that share no scene need two."""
    scenes = [SceneStatistics("", (8, 8), {number % 2: 64}) for number in range(10)]
    source = SceneSource("scenes", scenes, (0, 1), True)
    for seed in range(5):
        assert {row % 2 for row in source.choose(2, seed, SceneDraw()).train} == {0, 1}
    with pytest.raises(ValueError, match="1 labeled scene asked for, too few to have all 2 classes: give 2 or more"):
        source.choose(1, 0, SceneDraw())


def test_folds_of_too_few_files_are_refused_before_a_trial():
    """Where rates are chosen; a single rate divides nothing."""
    source = replace(source_of(12), files=tuple(number // 6 for number in range(12)))
    settings = study_of("segmentation").settings(data="scenes", out="run", init="encoder", labels="4,all", seeds=2, folds=3)
    with pytest.raises(ValueError, match="4 labeled scenes, pages of 2 files, cannot be divided into 3 parts"):
        available_labels(settings, source, None)
    for possible in (replace(settings, folds=2), replace(settings, lr_factors=(1.0,), layer_decays=())):
        assert available_labels(possible, source, None) == {4: 4, "all": 12.0}


def images_of(job):
    """Files of the images that a job trains on, and of those that validate it, as it reads them."""
    prepared = task_named(job.settings.task).prepare(job.settings, "cpu")
    return tuple({row["image"]["path"] for row in samples.source} for samples in (prepared.train, prepared.validation))


@pytest.mark.parametrize("task", TASK_WORDS)
@pytest.mark.parametrize("part", ["both", "train alone"])
def test_no_image_that_trains_or_tunes_judges(task, part, scene_folder, encoder_folder, tmp_path):
    data = scene_folder
    if part == "train alone":
        data = tmp_path / "scenes"
        shutil.copytree(scene_folder / "train", data)
        if task == "segmentation":
            shutil.copy(scene_folder / "classes.txt", data)  # beside images/ it could be YOLO's
        (data / "annotations").mkdir()
        shutil.copy(scene_folder / "annotations/train.json", data / "annotations")
    settings = settings_of(task, data, encoder_folder, tmp_path / "out", "--disjoint", "--seed", "3", "--labels", "5")
    prepared = prepare_study(settings)
    used, judging, by_seed = set(), set(), {}

    def run(job):
        train, validation = images_of(job)
        if job.settings.data.fold:
            used.update(train | validation)
        else:
            used.update(train)
            judging.add(frozenset(validation))
            by_seed.setdefault(job.settings.seed, []).append(train)
            assert job.settings.validations == 1
        return {SCORES[task]: 0.5, "validation_loss": 1.0}

    tuning = Tuning(rate_grid(prepared.settings), 2, 1, prepared.tuned)
    run_arms(prepared.arms, prepared.labels, settings.all_seeds, tmp_path, 0, tuning, run=run)
    (judging,) = judging
    assert len(judging) == (10 if part == "both" else 6) and not used & judging
    assert all(first == second for first, second in by_seed.values()), "labels alike for both sides"
    assert not by_seed[3][0] & by_seed[4][0] and len(by_seed[3][0]) == 5


# --- As a whole ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASK_WORDS)
def test_a_study_by_the_command(task, scene_folder, encoder_folder, tmp_path, in_this_process, capsys):
    """It goes on where it was stopped, by its folder alone, and is then as it was."""
    out = tmp_path / "study"
    assert main(words(task, scene_folder, encoder_folder, out, "--labels", "5,6,99")) == 0
    said = capsys.readouterr().out
    assert "judged by  10 images of the validation part" in said and "left out   99 labeled images: there are 30" in said
    results = rows(out / "results.csv")
    arms = ("pre-trained", "from scratch")
    kinds = [(row["labels"], row["seed"], row["arm"]) for row in results]
    assert kinds == [(labels, seed, arm) for labels in "56" for seed in "01" for arm in arms]
    assert all(0 <= float(row[SCORES[task]]) <= 1 for row in results) and len(rows(out / "tuning.csv")) == 2 * 2 * 2 * 2
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table.startswith("| labeled images | pre-trained | from scratch | paired gain | seeds |")
    assert {"segmentation": "Mean IoU", "detection": "AP"}[task] + " after the last step in percent" in table
    assert (out / "study.png").is_file()
    (out / "trials/5-labels/pre-trained-seed-0.json").unlink()
    (out / "results.csv").unlink()
    others = {file: file.stat().st_mtime_ns for file in (out / "trials").rglob("*.json")}
    assert main(["study", "--out", str(out), "--resume"]) == 0
    assert rows(out / "results.csv") == results and (out / "table.md").read_text(encoding="utf-8") == table
    assert {file: file.stat().st_mtime_ns for file in others} == others


@pytest.mark.parametrize("part", ["both", "train alone"])
def test_unlabeled_scenes_in_a_study(part, scene_folder, encoder_folder, tmp_path, capsys):
    """Both arms of a seed have the same labels, and no image that judges or is labeled is among the unlabeled ones. With all
    labels none is left, and the arm is left out."""
    data = scene_folder
    if part == "train alone":
        data = shutil.copytree(scene_folder / "train", tmp_path / "scenes")
        shutil.copy(scene_folder / "classes.txt", data)
    images = shutil.copytree((data / "train" if part == "both" else data) / "images", tmp_path / "photos")
    for number, file in enumerate((scene_folder / "val/images").iterdir()):
        shutil.copy(file, images / f"judging-{number}.png")  # or not, where a fifth of the others judges
    more = ("--labels", "5,all", "--unlabeled", str(images), "--semi-steps", "3", "--seed", "2")
    settings = settings_of("segmentation", data, encoder_folder, tmp_path / "out", *more)
    prepared = prepare_study(settings)
    said = capsys.readouterr().out
    judging = 10 if part == "both" else 6
    assert f"unlabeled  40 images; {judging} of them judge and are left out" in said
    left_out = "left out   semi with all labeled images: all unlabeled images are labeled ones"
    assert (left_out in said) == (part == "both") and len(prepared.left_out) == 2 * (part == "both")
    assert any("learn from the unlabeled images in photos too" in note for note in prepared.notes)
    assert [arm.name for arm in prepared.arms] == ["pre-trained", "from scratch", "pre-trained semi", "from scratch semi"]
    seen = {}

    def run(job):
        prepared_run = task_named("segmentation").prepare(job.settings, "cpu")
        train, validation = prepared_run.train, {row["image"]["path"] for row in prepared_run.validation.source}
        if job.arm.recipe == "semi":
            unlabeled = [row["image"]["path"] for row in train.unlabeled.source]
            used = {row["image"]["path"] for row in train.labeled.source}
            contents = [{Path(path).read_bytes() for path in paths} for paths in (unlabeled, used | validation)]
            assert not contents[0] & contents[1] and len(unlabeled) == 40 - judging - len(used)
            assert job.settings.steps == 3 and not job.settings.data.fold
            train = train.labeled
        if not job.settings.data.fold:
            paths = frozenset(row["image"]["path"] for row in train.source)
            seen.setdefault((job.trial({"mean_iou": 0, "validation_loss": 0}).labels, job.settings.seed), set()).add(paths)
        return {"mean_iou": 0.5, "validation_loss": 1.0}

    tuning = Tuning(rate_grid(prepared.settings), 2, 1, prepared.tuned)
    result = run_arms(
        prepared.arms, prepared.labels, settings.all_seeds, tmp_path, 0, tuning, run=run, left_out=prepared.left_out
    )
    assert len(seen) == 4 and all(len(alike) == 1 for alike in seen.values())
    assert len(result.trials) == 2 * 2 * 4 - 2 * len(prepared.left_out)


@pytest.mark.parametrize(
    "task, more, said",
    [
        ("segmentation", ("--labels", "1"), "1 labeled scene asked for, too few to have all 3 classes: give 2 or more"),
        ("detection", ("--labels", "31"), "31 labeled images asked for, there are 30 to train on: give up to 30, or all"),
        ("detection", ("--labels", "16", "--disjoint"), "there are 15 to train on for each of the seeds, which share none"),
        ("detection", ("--arms", "plain,semi"), "detection has no arm 'semi': it learns from labels alone"),
        ("segmentation", ("--arms", "plain,semi"), "semi learns from unlabeled images, give them by data.unlabeled"),
        ("segmentation", ("--arms", "plain", "--unlabeled", "x"), "no arm learns from it: add semi to arms"),
        ("segmentation", ("--semi-steps", "5"), "semi_steps and tune_arms are about unlabeled images"),
        ("segmentation", ("--unlabeled", "no/such/images"), "no/such/images"),
        ("segmentation", ("--arms", "simi"), "unknown arm 'simi'"),
        ("detection", ("--unlabeled", "x"), "unknown setting 'unlabeled'"),
        ("segmentation", ("--data.fold", "[0,2]"), "data.fold is set by the study"),
        ("segmentation", ("--data.pool", "[0,2]"), "data.pool is set by the study"),
        ("detection", ("--data.pool", "[2,2]"), "data.pool is (2, 2): give (part, parts)"),
        ("detection", ("--data", "no/such/folder"), "no/such/folder"),
        ("segmentation", ("--init", "none"), "a study compares an encoder with others: give it by init"),
    ],
)
def test_refused(task, more, said, scene_folder, encoder_folder, tmp_path, capsys):
    out = tmp_path / "study"
    assert main(words(task, scene_folder, encoder_folder, out, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0] and not out.exists()


def test_unknown_tasks_and_tasks_without_a_study_are_refused(monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "toy", TaskEntry("toy_task", "ToySettings", "ToyTask"))
    for task, said in (("segmentatoin", "did you mean 'segmentation'"), ("toy", "toy has no study")):
        assert main(["study", "--task", task, "--data", "x", "--init", "e", "--out", "o"]) == 2
        assert said in capsys.readouterr().err
    assert study_of("detection").measure.score == "ap"


@pytest.mark.parametrize("masks, score", [(None, "ap"), (False, "ap"), (True, "mask_ap")])
def test_a_study_of_detection_judges_masks_where_that_is_asked_for(masks, score):
    """Whatever the labels hold, all trials learn the same and are compared by the same."""
    study = study_of("detection")
    settings = study.settings(data="objects", out="run", init="encoder", head=HeadSettings(masks=masks))
    assert settings.head.masks is bool(masks) and settings.run_settings().head.masks is bool(masks)
    assert measure_of(settings.run_settings()).score == score


def test_scenes_have_the_boxes_of_what_is_visible(scene_folder):
    """Of every object in the label map, and tight."""
    from PIL import Image

    content = json.loads((scene_folder / "annotations/val.json").read_text())
    names = [category["name"] for category in content["categories"]]
    assert names == ["zero", "one"]
    for image in content["images"]:
        label_map = np.asarray(Image.open(scene_folder / image["file_name"].replace("images", "masks")))
        boxes = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        covered = np.zeros(label_map.shape, bool)
        for box in boxes:
            left, top, width, height = box["bbox"]
            inside = label_map[top : top + height, left : left + width] == box["category_id"]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
            covered[top : top + height, left : left + width] = True
        assert not (label_map > 0)[~covered].any() and boxes
