"""benchmarks/canvas.py: canvases against SimMIM at equal images and equal time, in small."""

import json
import shutil

import canvas
import pytest

SHARED = "--preset nano --image_size 32 --precision 32-true --model.encoder.embed_dim 16 --model.encoder.depths [1,2]"
SHARED += " --model.encoder.num_heads [1,2]"
CANDIDATES = """
dense: --method simmim --model.mask_ratio 0.6
canvas: --method canvas --model.share 3
late: --method canvas --model.share 2 --model.mask_unit 4 then 0.25 --method simmim
"""


@pytest.fixture
def contest(digits, tmp_path, monkeypatch):
    """contest(*more words): what the benchmark prints, in this process."""
    monkeypatch.setattr(canvas, "in_process", lambda work, *arguments: work(*arguments))
    (tmp_path / "candidates.yaml").write_text(CANDIDATES)
    shutil.copytree(digits.labeled, tmp_path / "development")
    words = ["--data", digits.unlabeled, "--labeled", digits.labeled, "--development", tmp_path / "development"]
    words += ["--candidates", tmp_path / "candidates.yaml", "--out", tmp_path / "out", "--batch-size", "12"]

    def contest(*more):
        # With an equals sign: the value begins with two hyphens.
        return canvas.main([*map(str, words), f"--shared={SHARED}", *map(str, more)])

    return contest


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_rates_are_chosen_and_differences_are_paired(contest, digits, tmp_path, monkeypatch, capsys):
    """By the other labels; at as many steps and at as many as cost the same; no draw of labels is of two seeds."""
    trained, tuned = {}, []

    def pretrain_steps(search, words, steps, run):
        run.mkdir(parents=True)
        name = "late" if "--model.mask_unit" in words or "--init" in words else "canvas" if "canvas" in words else "dense"
        rate = float(words[words.index("--optim.lr") + 1]) / 7.4e-2
        trained.setdefault(name, []).append((steps, round(rate, 1), search.seed, "--init" in words))
        return 60.0 * steps

    def finetune_once(search, start, rate, seed, run):
        tuned.append((search.labeled, search.labels, rate, seed))
        path = start[1].split("/")[-2:]
        if search.labeled == str(digits.labeled):  # canvas is better by 1, 2 and 3 points for seeds 0, 1 and 2
            return 0.3 + 0.01 * seed + (0.01 * (seed // 2 + 1) if path[0] == "canvas" else 0.0)
        best = {"dense": (1.0, 3.0), "canvas": (2.0, 1.0), "late": (1.0, 1.0)}[path[0]]
        return 0.5 - abs(float(path[1].split("-")[3]) - best[0]) / 10 - abs(rate - best[1]) / 100

    costs = {"dense": 2.0, "canvas": 1.0}
    monkeypatch.setattr(canvas, "pretrain_steps", pretrain_steps)
    monkeypatch.setattr(canvas, "finetune_once", finetune_once)
    monkeypatch.setattr(
        canvas, "measure_step", lambda search, words, trial: costs[trial.parent.name.replace("late", "canvas")]
    )
    monkeypatch.setattr(canvas, "score_frozen", lambda search, run, draws: {"knn": 0.2, "probe": 0.01 * search.labels})
    words = ("--minutes", 2, "--pretrain-rates", 1, 2, "--rates", 1, 3, "--labels", 10, 20, "--draws", 2, "--seeds", 3)
    assert contest(*words) == 0
    table = capsys.readouterr().out
    rows = rows_of(table)
    assert [row[:4] for row in rows[::2]] == [
        ["dense", "images and time", "60", "60.0"],
        ["canvas", "images", "60", "60.0"],
        ["canvas", "time", "120", "120.0"],
        ["late", "images", "60", "60.0"],
        ["late", "time", "120", "120.0"],
    ]
    assert [row[4:7] for row in rows[:4]] == [
        ["× 1*", "10", "× 3*"],
        ["× 1*", "20", "× 3*"],
        ["× 2*", "10", "× 1*"],
        ["× 2*", "20", "× 1*"],
    ]
    # Draws 0 to 5 have the mean 2.5; the differences 1, 2, 3 have the interval 2 ± 4.303 / √3.
    assert rows[0][7:] == ["20.0", "10.0", "32.5"] and rows[2][7:] == [
        "20.0 (+0.0 ± 0.0)",
        "10.0 (+0.0 ± 0.0)",
        "34.5 (+2.0 ± 2.5)",
    ]
    assert trained["dense"] == [
        (60, 1.0, 1000, False),
        (60, 2.0, 1000, False),
        *((60, 1.0, seed, False) for seed in range(3)),
    ]
    assert trained["late"][-2:] == [(90, 1.0, 2, False), (30, 1.0, 2, True)], "a quarter goes on as another method"
    assert {seed for labeled, *_, seed in tuned if labeled == str(digits.labeled)} == set(range(6))
    assert {seed for labeled, *_, seed in tuned if labeled != str(digits.labeled)} == {2000, 2001}
    monkeypatch.setattr(canvas, "in_process", None)
    monkeypatch.setattr(canvas, "measure_step", None)
    assert contest(*words) == 0 and capsys.readouterr().out == table, "nothing is done twice"
    assert table.splitlines()[0].endswith("| fine-tuning's rate | k-NN | probe | fine-tuned |")
    assert contest(*words, "--kinds", "fine-tuned") == 0
    shorter = capsys.readouterr().out
    assert shorter.splitlines()[0].endswith("| fine-tuning's rate | fine-tuned |")
    assert rows_of(shorter) == [[*row[:7], row[9]] for row in rows]


def test_a_tiny_contest(contest, tmp_path, monkeypatch, capsys):
    """With real runs, in two parts: one candidate alone, then the rest and the table."""
    monkeypatch.setattr(canvas, "measure_step", lambda search, words, trial: 0.5 if "canvas" in words else 1.0)
    words = ("--minutes", 0.05, "--pretrain-rates", 1, "--rates", 1, "--labels", 2, "--draws", 1, "--seeds", 1, "--steps", 1)
    assert contest(*words, "--only", "late") == 0 and not capsys.readouterr().out
    assert contest(*words) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[:3] for row in rows[:3]] == [
        ["dense", "images and time", "3"],
        ["canvas", "images", "3"],
        ["canvas", "time", "6"],
    ]
    assert all(0 <= float(cell.split()[0]) <= 100 for row in rows for cell in row[7:]) and len(rows) == 5
    described = json.loads(next((tmp_path / "out" / "late").glob("4-*seed-0/encoder/config.json")).read_text())
    assert described["method"] == "simmim" and described["provenance"]["steps"] == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--batch-size", 14), "canvas: a batch of 14 images is no multiple of 3"),
        (("--shared=--image_size 32",), "dense: the size of the encoder is open"),
        (("--shared=--preset nano --image_sise 32",), "unknown setting 'image_sise'"),
        (("--only", "cnavas"), "no candidate 'cnavas': give some of dense, canvas, late"),
        (("--minutes", 3), "has results of minutes '2.0', not '3.0': give another --out"),
    ],
)
def test_wrong_input(contest, tmp_path, monkeypatch, capsys, words, message):
    """One line, exit code 2."""
    monkeypatch.setattr(canvas, "table", lambda *_: iter(()))
    if "--minutes" in words:
        assert contest("--minutes", 2) == 0
    with pytest.raises(SystemExit) as ended:
        contest(*words)
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
