"""Several encoders and vectors of others on the same draws of labels: what is paired with what, and what each costs."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from tiny_backbones import import_timm, save

from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.cli import main
from simmim.encoders import registry
from simmim.encoders.backbone.measure import measured_config
from simmim.encoders.backbone.timm_networks import any_size_options
from simmim.evaluate import Comparison, EncoderPass, compare, compare_vectors, facts_of, read_vectors, write_embeddings
from simmim.evaluate.contest import Contest, names_of, paired_difference, write_contest
from simmim.evaluate.facts import EncoderFacts
from simmim.evaluate.scores import FeatureScore, FeatureScores
from simmim.finetune import study
from simmim.finetune.label_study.settings import StudySettings

HERE = EncoderPass(workers=0)


@pytest.fixture(scope="module")
def vectors(encoder_folder, digits, tmp_path_factory):
    """The final features of all labeled digits, as `simmim embed` writes them."""
    out = tmp_path_factory.mktemp("vectors") / "digits.parquet"
    write_embeddings(read_encoder(encoder_folder), str(digits.labeled / "**" / "*.png"), out, options=HERE)
    return out


# --- vectors -----------------------------------------------------------------------------------------------------------


def test_vectors_score_as_their_encoder(encoder_folder, digits, vectors):
    """The same vectors on the same draws give the same accuracies, wherever they come from."""
    comparison = Comparison(str(digits.labeled), labels_per_class=4, seeds=2, stage="final", pooling="mean", untrained=False)
    direct = compare(read_encoder(encoder_folder), comparison, HERE, quiet=True)
    stored = compare_vectors(read_vectors(vectors), comparison, HERE, quiet=True)
    for ours, theirs in zip(direct.draws, stored.draws, strict=True):
        assert theirs.row("vectors")[1:] == ours.row("final")[1:]
    assert stored.seeds == direct.seeds and stored.counts == direct.counts
    assert stored.facts.network == "vectors of 64 values" and "pixels" not in stored.table()


def rewritten(vectors, out, change):
    """A copy of a file of vectors whose table `change` has changed."""
    pq.write_table(change(pq.read_table(vectors)), out)
    return out


def with_paths(names):
    return lambda table: table.set_column(0, "path", pa.array(names(table["path"].to_pylist())))


def test_rows_are_found_by_path_in_any_order(digits, vectors, tmp_path):
    """Whole paths, absolute ones, and those of another machine, by as many last parts as tell images apart."""
    comparison = Comparison(str(digits.labeled), "knn", labels_per_class=4, untrained=False)
    expected = compare_vectors(read_vectors(vectors), comparison, HERE, quiet=True).draws
    shuffle = lambda table: table.take(np.random.default_rng(0).permutation(len(table)))  # noqa: E731
    elsewhere = with_paths(lambda paths: ["/elsewhere/" + path.split("/labeled/")[1] for path in paths])
    for number, change in enumerate((shuffle, elsewhere, lambda table: elsewhere(shuffle(table)))):
        changed = rewritten(vectors, tmp_path / f"{number}.parquet", change)
        assert compare_vectors(read_vectors(changed), comparison, HERE, quiet=True).draws == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda table: table.slice(0, 200), "has no vector for 100 of 300 images of the labels"),
        (lambda table: table.drop_columns("path"), "has the columns vector: expected one of paths (text), called path"),
        (lambda table: table.drop_columns("vector"), "expected one of vectors (lists of numbers), called vector"),
        (with_paths(lambda paths: ["same.png"] * len(paths)), "has no vector for 300 of 300 images"),
        (
            lambda table: table.set_column(1, "vector", pa.array([[1.0] * (1 + row % 2) for row in range(len(table))])),
            "differ in length",
        ),
        (lambda table: table.set_column(1, "vector", pa.array([[math.nan]] * len(table))), "are not finite"),
    ],
)
def test_wrong_vectors_are_one_line(digits, vectors, tmp_path, capsys, change, text):
    changed = rewritten(vectors, tmp_path / "changed.parquet", change)
    assert main(["knn", "--data", str(digits.labeled), "--vectors", str(changed)]) == 2
    error = capsys.readouterr().err
    assert text in error and error.splitlines()[-1].startswith("simmim: "), error


def test_other_files_are_no_vectors(digits, encoder_folder, tmp_path, capsys):
    for path, text in (("absent.parquet", "there is no such file"), (encoder_folder / "config.json", "is no Parquet file")):
        assert main(["probe", "--data", str(digits.labeled), "--vectors", str(path)]) == 2
        assert text in capsys.readouterr().err


# --- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [("vit_tiny_patch16_224", 5.52, 2.51), ("resnet50", 23.51, 8.17)],  # twice the published multiply-adds: 1.26 and 4.09
)
def test_parameters_and_flops_are_the_published_ones(name, parameters, gflops):
    import_timm()
    config = measured_config("timm", name, any_size_options(name, 3, {}), (224, 224), 3)
    facts = facts_of(config, Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3), {"trained_on": "photographs"})
    assert facts.parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    assert facts.flops / 1e9 == pytest.approx(gflops, abs=0.01)
    assert facts.sentence() == (
        f"{name} of timm, {facts.parameters / 1e6:.1f} M parameters, {facts.flops / 1e9:.2f} GFLOPs an image of 224×224 px, "
        "trained on photographs"
    )


def test_counted_flops_are_those_of_the_cost_model(monkeypatch):
    """Counting on the meta device and arithmetic agree where both are possible: the position bias's network aside."""
    config = registry.presets()["micro"]
    preprocessing = Preprocessing((96, 96), (0.5,) * 3, (0.5,) * 3)
    by_model = facts_of(config, preprocessing, {}).flops
    family = registry.family_of(config)
    monkeypatch.setattr("simmim.evaluate.facts.registry.family_of", lambda config: copy_without_cost(family))
    assert facts_of(config, preprocessing, {}).flops == pytest.approx(by_model, rel=0.05)


def copy_without_cost(family):
    from dataclasses import replace

    return replace(family, cost=None)


def test_a_card_tells_what_a_network_was_trained_on(tmp_path):
    for name, front, expected in (
        ("datasets", "---\nlicense: mit\ndatasets:\n- imagenet-1k\n- lvd142m\n---\n# A model\n", "imagenet-1k, lvd142m"),
        (
            "lines",
            "---\nlicense: mit\n---\n- **Dataset:** ImageNet-1k\n- **Pretrain Dataset:** LVD-142M\n",
            "ImageNet-1k, LVD-142M",
        ),
        ("none", "# A model\n", None),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save("resnet", folder)
        (folder / "README.md").write_text(front)
        saved = read_encoder(folder)
        assert saved.provenance.get("trained_on") == expected


# --- tables ------------------------------------------------------------------------------------------------------------


def test_differences_are_paired():
    ours, theirs = [0.5, 0.6, 0.9], [0.4, 0.5, 0.75]
    difference = paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert difference.p == pytest.approx(expected.pvalue)
    assert (difference.mean - difference.spread, difference.mean + difference.spread) == pytest.approx(
        (100 * low, 100 * high)
    )
    assert math.isnan(paired_difference([0.5], [0.4]).spread) and paired_difference([0.5], [0.4]).cell() == "+10.0"
    assert math.isnan(paired_difference([0.5, 0.5], [0.4, 0.4]).p)
    assert names_of(["runs/a/encoder", "hf:me/encoder", "timm:vit", "encoder"]) == (
        "encoder",
        "encoder 2",
        "vit",
        "encoder 3",
    )


def paired_report(*draws, baseline=None, method="probe"):
    """What a contest reads of a report: draws are (name, accuracy, cross-validated accuracy) of each feature."""
    rows = [tuple(FeatureScore(name, 8, 0.0, value, None, chosen, True) for name, value, chosen in draw) for draw in draws]
    scores = tuple(FeatureScores(of_draw, None, baseline) for of_draw in rows)
    facts, comparison = EncoderFacts("a network"), SimpleNamespace(method=method)
    return SimpleNamespace(draws=scores, seeds=range(5, 5 + len(draws)), comparison=comparison, facts=facts, as_dict=dict)


def test_a_paired_table_is_of_the_features_that_training_labels_choose(tmp_path):
    """Not of those that judging images would choose: `early` is the better one by them in the first report."""
    draws = [(("pixels", 0.9, 0.99), ("early", 0.8, 0.3), ("final", value, 0.5)) for value in (0.6, 0.7, 0.5)]
    other = [(("pixels", 0.9, 0.99), ("early", value, 0.5), ("final", 0.9, 0.4)) for value in (0.5, 0.5, 0.4)]
    contest = Contest(("ours", "other"), (paired_report(*draws, baseline="pixels"), paired_report(*other)))
    assert contest.accuracies(0) == ("final", [0.6, 0.7, 0.5])
    assert contest.accuracies(1)[0] == "pixels", "which is no baseline in the second report"
    contest = Contest(("ours", "other"), tuple(paired_report(*part, baseline="pixels") for part in (draws, other)))
    first, second = contest.table().splitlines()[2:4]
    half = stats.t.ppf(0.975, 2)
    assert first.startswith(f"| ours | 60.0 ± {half * 10 / 3**0.5:.1f} |  | final | a network |")
    gain = paired_difference([0.6, 0.7, 0.5], [0.5, 0.5, 0.4])
    assert f"{gain.mean:.1f}" == "13.3" and gain.cell().startswith(f"+13.3 ± {half * 10 / 3:.1f} (p = 0.0")
    assert second.startswith(f"| other | 46.7 ± {half * 10 / 3:.1f} | {gain.cell()} | early |")
    rows = contest.as_dict()["encoders"]
    assert rows[0]["difference"] is None and rows[1]["difference"]["mean"] == gain.mean
    lines = write_contest(contest, tmp_path / "contest.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "encoder,seed,feature,accuracy" and lines[2] == "ours,6,final,0.7" and lines[6] == "other,7,early,0.4"


@pytest.mark.parametrize("names, expected", [(("final", "early", "last"), "final"), (("a", "b", "c", "pixels"), "c")])
def test_a_paired_comparison_of_single_labels_takes_the_last_feature(names, expected):
    """A single label cannot be held out: no feature is chosen, whatever its accuracy."""
    report = paired_report([(name, 0.9 - number / 10, None) for number, name in enumerate(names)], baseline="pixels")
    contest = Contest(("one",), (report,))
    assert contest.accuracies(0)[0] == expected
    cells = [cell.strip() for cell in contest.table().splitlines()[2].split("|")]
    assert cells[1:5] == ["one", f"{100 * (0.9 - names.index(expected) / 10):.1f}", "", expected]
    assert "One draw of labels says nothing of chance" in contest.table()


def test_the_command_compares_an_encoder_a_network_and_vectors(encoder_folder, digits, vectors, tmp_path, capsys):
    """One table: accuracy, paired difference, parameters, FLOPs, size and origin of each; the same in the files."""
    folder = tmp_path / "dinov2"
    folder.mkdir()
    save("dinov2", folder)
    (folder / "README.md").write_text("---\ndatasets: [lvd142m]\n---\n")
    words = ["probe", "--run", str(encoder_folder), "--against", str(folder), "--vectors", str(vectors)]
    words += [
        "--data",
        str(digits.labeled),
        "--labels-per-class",
        "3",
        "--seeds",
        "2",
        "--stage",
        "final",
        "--pooling",
        "mean",
    ]
    words += ["--untrained", "false", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "out.json").read_text())
    ours, network, theirs = stored["encoders"]
    assert [one["name"] for one in stored["encoders"]] == [encoder_folder.name, "dinov2", "digits.parquet"]
    assert theirs["accuracy"] == ours["accuracy"] and theirs["difference"]["mean"] == 0
    assert network["facts"]["network"] == "dinov2 of transformers" and network["facts"]["trained_on"] == "lvd142m"
    mean = 100 * np.mean([own - other for own, other in zip(ours["accuracy"], network["accuracy"])])
    assert network["difference"]["mean"] == pytest.approx(mean)
    row = next(line for line in out.splitlines() if line.startswith("| dinov2"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith(f"{mean:+.1f} ± ") and cells[4:] == [
        "dinov2 of transformers",
        "0.1",
        "0.0115",
        "64×64",
        "lvd142m",
    ]
    for name in ("out.csv", "out.md"):
        assert main([*words[:1], "--vectors", f"{vectors},{vectors}", *words[7:], "--out", str(tmp_path / name)]) == 0
        capsys.readouterr()
    assert (tmp_path / "out.csv").read_text().count("digits.parquet 2") == 2
    assert "| digits.parquet 2 |" in (tmp_path / "out.md").read_text()


def test_a_contest_needs_something(digits, capsys):
    assert main(["probe", "--data", str(digits.labeled)]) == 2
    assert "give --run ENCODER, --vectors FILE, or both" in capsys.readouterr().err


def test_a_study_says_what_each_encoder_is(encoder_folder, digits, tmp_path, monkeypatch):
    """A network of transformers is an arm of a study, and the report has a row of facts for each encoder."""
    folder = tmp_path / "convnext"
    folder.mkdir()
    save("convnext", folder)
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())
    settings = StudySettings(
        data=str(digits.labeled),
        out=str(tmp_path / "study"),
        init=str(encoder_folder),
        against=str(folder),
        scratch=False,
        labels="1",
        seeds=2,
        lr_factors=(1.0,),
        layer_decays=(),
        image_size=32,
        steps=1,
        batch_size=10,
    )
    result = study(settings)
    assert {trial.arm for trial in result.trials} == {"pre-trained", "convnext"}
    row = next(line for line in (tmp_path / "study/table.md").read_text().splitlines() if line.startswith("| convnext |"))
    assert row.split("|")[2].strip() == "convnext of transformers" and row.split("|")[5].strip() == "32×32"
