"""What is trained and what of it is kept: frozen stages, averaged weights, early stop, balance, the report of classes."""

import csv
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support, top_k_accuracy_score

from simmim import load_encoder
from simmim.checkpoints import read
from simmim.checkpoints.export import export
from simmim.data import EvaluationView, read_labeled_images
from simmim.defaults import default_ema
from simmim.encoders.swinv2 import PRESETS
from simmim.finetune import ClassificationSettings, LabeledSettings, finetune, load_classifier
from simmim.finetune.averaging import AverageWeights, decay_at
from simmim.finetune.classification.balance import BalancedSamples, balanced_order, class_weights
from simmim.finetune.classification.defaults import resolve_augmentation, resolve_settings
from simmim.finetune.classification.metrics import ClassMetrics, class_rows
from simmim.finetune.classification.module import ClassificationFinetuning
from simmim.finetune.classification.report import (
    class_table,
    confusion_picture,
    titled,
    write_class_report,
    write_class_table,
)
from simmim.finetune.early_stop import StopEarly
from simmim.finetune.run import KeepBest
from simmim.finetune.settings import EncoderSettings, OptimSettings
from simmim.training.saving import SaveRun


def settings(digits, encoder_folder, out, **more):
    return ClassificationSettings(
        **{
            "data": LabeledSettings(str(digits.labeled)),
            "out": str(out),
            "init": str(encoder_folder),
            "labels_per_class": 4,
            "steps": 12,
            "batch_size": 20,
            "validations": 3,
            "optim": OptimSettings(lr=0.05, ema=0.0),
            **more,
        }
    )


def trained_state(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


# --- frozen parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2])
def test_only_the_last_stages_are_trained(digits, encoder_folder, tmp_path, monkeypatch, stages):
    """What lies before them stays bit-identical, is in no optimizer group, drops no paths and has no graph."""
    seen = []
    step = ClassificationFinetuning.training_step

    def spy(self, batch, index):
        blocks = [stage.blocks[0] for stage in self.model.encoder.layers]
        hooks = [block.register_forward_hook(lambda *call: graphs.append(call[2].requires_grad)) for block in blocks]
        graphs = []
        loss = step(self, batch, index)
        names = {name for group in self.optimizers().param_groups for name in group["names"]}
        seen.append(([block.training for block in blocks], graphs, names))
        for hook in hooks:
            hook.remove()
        return loss

    monkeypatch.setattr(ClassificationFinetuning, "training_step", spy)
    chosen = settings(
        digits, encoder_folder, tmp_path / "run", train_stages=stages, encoder=EncoderSettings(drop_path_rate=0.5)
    )
    state = trained_state(finetune(chosen, quiet=True).run)["state_dict"]
    frozen = ("patch_embed.", *(f"layers.{stage}." for stage in range(3 - stages)))
    for name, value in load_encoder(encoder_folder).state_dict().items():
        unchanged = torch.equal(state[f"model.encoder.{name}"], value)
        assert unchanged == name.startswith(frozen) or "cpb_mlp" in name, name
    for training, graphs, names in seen:
        assert training == graphs == [False] * (3 - stages) + [True] * stages
        assert not any(name.removeprefix("encoder.").startswith(frozen) for name in names)
        assert {"head.weight", "head.bias", "encoder.norm.weight", "encoder.layers.2.blocks.0.attn.qkv.weight"} <= names
    assert len(seen) == 12


def test_all_stages_are_all(digits, encoder_folder, tmp_path):
    whole = finetune(settings(digits, encoder_folder, tmp_path / "a", train_stages=3), quiet=True)
    state = trained_state(whole.run)["state_dict"]
    plain = trained_state(finetune(settings(digits, encoder_folder, tmp_path / "b"), quiet=True).run)["state_dict"]
    assert all(torch.equal(value, plain[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="train_stages is 4, the encoder has 3 stages: give 1 to 3"):
        finetune(settings(digits, encoder_folder, tmp_path / "c", train_stages=4), quiet=True)
    assert not (tmp_path / "c").exists()


# --- averaged weights ------------------------------------------------------------------------------------------------


def test_average_equals_a_computation_in_float64(digits, encoder_folder, tmp_path, monkeypatch):
    """And is what is validated and exported, while training goes on from the weights themselves."""
    course, validated = [], []
    end, check = SaveRun.on_train_batch_end, ClassificationFinetuning.on_validation_epoch_end

    def spy(self, trainer, module, *rest):
        course.append({name: value.detach().double() for name, value in module.model.named_parameters()})
        end(self, trainer, module, *rest)

    def look(self):
        validated.append({name: value.detach().clone() for name, value in self.model.named_parameters()})
        check(self)

    start = {}

    def before(self, trainer, module):
        start.update({name: value.detach().double().clone() for name, value in module.model.named_parameters()})
        begin(self, trainer, module)

    begin = AverageWeights.on_fit_start
    monkeypatch.setattr(AverageWeights, "on_fit_start", before)
    monkeypatch.setattr(SaveRun, "on_train_batch_end", spy)
    monkeypatch.setattr(ClassificationFinetuning, "on_validation_epoch_end", look)
    optim = OptimSettings(lr=0.05, ema=0.7, accumulate=2)
    result = finetune(settings(digits, encoder_folder, tmp_path / "run", optim=optim), quiet=True)
    assert len(course) == 24, "two batches a step"
    average, expected = start, []
    for step, weights in enumerate(course[1::2]):
        decay = min(0.7, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
        expected.append(average)
    for step, weights in zip((4, 8, 12, 12), validated, strict=True):
        torch.testing.assert_close(weights, {k: v.float() for k, v in expected[step - 1].items()}, rtol=1e-5, atol=1e-6)
    state = trained_state(result.run)
    for name, value in course[-1].items():
        assert torch.equal(state["state_dict"][f"model.{name}"], value.float()), "a checkpoint holds the weights"
    exported = load_classifier(result.run).model.state_dict()
    assert any(all(torch.equal(exported[name], weights[name]) for name in weights) for weights in validated)
    assert json.loads((result.run / "encoder/config.json").read_text())["provenance"]["weights"] == (
        "moving average of decay 0.7"
    )


def test_training_does_not_feel_the_average(digits, encoder_folder, tmp_path):
    pair = []
    for ema in (0.0, 0.9):
        chosen = settings(digits, encoder_folder, tmp_path / str(ema), optim=OptimSettings(ema=ema))
        pair.append(trained_state(finetune(chosen, quiet=True).run))
    assert all(torch.equal(value, pair[1]["state_dict"][name]) for name, value in pair[0]["state_dict"].items())


def test_decay_grows_to_its_value():
    assert [decay_at(0, 0.9), decay_at(80, 0.9), decay_at(10**6, 0.9)] == [0.1, 0.9, 0.9]
    assert default_ema(500) == pytest.approx(1 - 1 / 25) and default_ema(10**9) == 0.9999 and default_ema(10) == 0


# --- early stop ------------------------------------------------------------------------------------------------------


def test_stops_when_nothing_gets_better_and_stays_stopped(digits, encoder_folder, tmp_path, monkeypatch, capsys):
    """A rate of nearly nothing: the first validation stays the best."""
    still = OptimSettings(lr=1e-9, warmup_lr=1e-10, min_lr=0.0, ema=0.0)
    chosen = settings(
        digits,
        encoder_folder,
        tmp_path / "run",
        steps=40,
        validations=10,
        patience=3,
        optim=still,
    )
    result = finetune(chosen, quiet=True)
    assert trained_state(result.run)["global_step"] == 16
    assert "stopped early after 16 steps: 3 validations without better accuracy" in capsys.readouterr().out
    again = finetune(replace(chosen, resume=True), quiet=True)
    assert trained_state(again.run)["global_step"] == 16 and again.metrics == result.metrics
    assert (result.num_validations, again.num_validations) == (4, 4), (
        "the last weights are looked at twice, which is one look"
    )
    provenance = json.loads((result.run / "encoder/config.json").read_text())["provenance"]
    assert provenance["steps"] == 4 and provenance["validation"] == "best of 4 validations, on 60 images"


def test_validations_that_an_earlier_version_did_not_count():
    """They lie at even distances: after 16 of 40 steps with 10 validations there were 4."""
    chosen = SimpleNamespace(out="run", validations=10, num_steps=lambda num_images: 40)
    best = KeepBest(SimpleNamespace(settings=chosen, train=range(3)))
    best.load_state_dict({"value": 0.5})
    best.count(16)
    assert best.num_validations == 4
    best.count(20)
    best.count(20)
    assert best.num_validations == 5


@pytest.mark.parametrize(
    "state",
    [
        {"best": 0.5, "without": 2},  # as version 0.1 wrote it
        {"best_score": torch.tensor(0.5), "wait_count": 2, "patience": 3, "stopped_epoch": 0},
    ],
)
def test_patience_counts_on_after_a_resume(state):
    stop = StopEarly("accuracy", 3)
    stop.load_state_dict(state)
    assert (stop.best_score.item(), stop.wait_count) == (0.5, 2)


# --- balance ---------------------------------------------------------------------------------------------------------


def test_weights_are_inverse_frequencies_of_mean_one():
    weights = class_weights([0] * 6 + [1] * 3 + [2], 3)
    assert torch.allclose(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert (weights[torch.tensor([0] * 6 + [1] * 3 + [2])]).mean().item() == pytest.approx(1)


def test_balanced_epochs_show_classes_and_their_images_equally_often():
    rows = [list(range(10)), [10, 11, 12], [13]]
    for epoch in range(4):
        order = balanced_order(rows, 14, seed=3, epoch=epoch)
        assert len(set(order)) == 14, "no image twice in the same way"
        seen = Counter(row for row, _ in order)
        totals = [sum(seen[row] for row in of_class) for of_class in rows]
        assert sum(totals) == 14 and max(totals) - min(totals) <= 1
        for of_class in rows:
            times = [seen[row] for row in of_class]
            assert max(times) - min(times) <= 1
    assert balanced_order(rows, 14, 3, 0) == balanced_order(rows, 14, 3, 0) != balanced_order(rows, 14, 3, 1)


def test_balanced_samples_follow_from_seed_epoch_and_index(digits):
    labels = read_labeled_images(digits.labeled, None, seed=0)
    uneven = labels.train.select([*range(24), *range(24, 27)])  # 24 zeros and 3 ones
    first, second = (BalancedSamples(uneven, EvaluationView((32, 32)), 1, seed=5) for _ in range(2))
    keys = [(epoch, index) for epoch in (0, 1) for index in range(27)]
    samples = {key: first[key] for key in keys}
    for key in reversed(keys):
        other = second[key]
        assert other["seed"] == samples[key]["seed"] and torch.equal(other["image"], samples[key]["image"])
        assert uneven[first.row_of(key)]["label"] == samples[key]["label"]
    assert Counter(samples[0, index]["label"] for index in range(27)) in ({0: 14, 1: 13}, {0: 13, 1: 14})
    assert len({sample["seed"] for sample in samples.values()}) == 54, "another view each time"


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_balanced_runs_train(digits, encoder_folder, tmp_path, balance):
    data = LabeledSettings(str(digits.labeled), balance=balance)
    assert finetune(settings(digits, encoder_folder, tmp_path / "run", data=data), quiet=True).metrics["macro_f1"] >= 0


# --- metrics and the class report ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 8, 400)
    logits = generator.normal(size=(400, 8)) + 1.2 * np.eye(8)[labels]
    logits[:, 7] = -9  # never predicted
    metrics = ClassMetrics(8)
    for part in range(0, 400, 64):
        metrics.update(torch.from_numpy(logits[part : part + 64]).float(), torch.from_numpy(labels[part : part + 64]))
    return labels, logits, metrics


def test_rates_are_sklearn_s(judged):
    labels, logits, metrics = judged
    predicted = logits.argmax(axis=1)
    rates = {name: metric.compute().item() for name, metric in metrics.rates.items()}
    assert rates == {
        "accuracy": pytest.approx((predicted == labels).mean(), abs=1e-6),
        "macro_f1": pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6),
        "top5_accuracy": pytest.approx(top_k_accuracy_score(labels, logits, k=5), abs=1e-6),
    }
    assert set(ClassMetrics(5).rates) == {"accuracy", "macro_f1"}


def test_the_class_table_is_sklearn_s(judged, tmp_path):
    labels, logits, metrics = judged
    predicted = logits.argmax(axis=1)
    metrics.confusions.reset()
    metrics.confusions.update(torch.from_numpy(logits), torch.from_numpy(labels))
    table = metrics.pop_confusions()
    assert np.array_equal(table.numpy(), confusion_matrix(labels, predicted, labels=range(8)))
    rows = class_rows(table, "abcdefgh")
    expected = precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    for place, row in enumerate(rows):
        values = [row.precision, row.recall, row.f1, row.images]
        assert values == pytest.approx([column[place] for column in expected], nan_ok=True)
    write_class_table(tmp_path / "classes.csv", rows, 40)
    with (tmp_path / "classes.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["class"] for row in written] == list("abcdefgh") and written[7]["precision"] == ""
    assert {row["step"] for row in written} == {"40"}
    assert float(written[2]["recall"]) == pytest.approx(rows[2].recall, abs=1e-6)
    assert len(class_table(tmp_path / "classes.csv").splitlines()) == 9
    many = [replace(row, name=f"{row.name}{number}") for number in range(4) for row in rows]
    write_class_table(tmp_path / "many.csv", many, 40)
    assert "the 10 of 32 classes" in class_table(tmp_path / "many.csv")


def test_the_confusion_picture_shows_shares_of_rows():
    """Of few classes with names, of many as plain pixels: white for nothing, dark blue for a whole row."""
    picture = np.asarray(confusion_picture(torch.diag(torch.arange(50) % 2), ["x"] * 50))
    cell = len(picture) // 50
    assert (picture[cell // 2, cell // 2] == 255).all(), "no images of this class"
    assert tuple(picture[cell + cell // 2, cell + cell // 2]) == (8, 48, 107)
    named = confusion_picture(torch.eye(3).long() * 7, ["one", "two", "a very long name of a class"])
    assert named.size[0] == named.size[1] and 150 < named.size[0] < 400


def test_the_confusion_picture_says_that_it_is_of_the_best_validation(tmp_path):
    """And after which step; the file is the picture that is returned."""
    counts, names = torch.eye(3).long() * 7, ["one", "two", "three"]
    picture = np.asarray(write_class_report(tmp_path, counts, names, 1200))
    expected, other = (
        np.asarray(titled(confusion_picture(counts, names), f"the best validation, after {step} steps"))
        for step in ("1,200", "1,300")
    )
    assert np.array_equal(picture, expected) and not np.array_equal(picture, other)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "confusions.png")), picture)


def test_a_run_leaves_the_report_of_its_best_model(digits, encoder_folder, tmp_path, capsys):
    result = finetune(settings(digits, encoder_folder, tmp_path / "run", monitor="macro_f1"))
    said = capsys.readouterr().out
    assert "macro_f1" in said
    with (result.run / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and sum(int(row["images"]) for row in rows) == 60
    assert np.mean([float(row["f1"]) for row in rows]) == pytest.approx(result.best, abs=1e-5), "the best, not the last"
    assert Image.open(result.run / "confusions.png").size[0] > 200
    assert "precision  recall" in said and "chosen   " in said
    config = json.loads((result.run / "encoder/config.json").read_text())
    assert config["provenance"]["macro_f1"] == pytest.approx(result.best)
    assert config["provenance"]["validation"] == "best of 3 validations, on 60 images"
    assert "keeps    the best of 3 validations" in said and "% best of 3 validations, on 60 validation images" in said
    assert "of the best of 3 validations, which is higher than new images would give:\nclass " in said
    export(read(result.run), "safetensors", tmp_path / "exported")
    metrics = (tmp_path / "exported/README.md").read_text().split("## Metrics")[1].split("##")[0]
    assert "- macro f1: " in metrics and "- validation: best of 3 validations, on 60 images" in metrics


# --- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, channels, per_class, expected",
    [
        (32, 1, 10, (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1)),
        (32, 3, 5000, (0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 1)),
        (64, 3, 40, (0.5, 0.0, 0.0, 0.0, 0.0, 0.75, 5)),
        (224, 3, 10, (0.5, 9.0, 0.0, 0.0, 0.0, 0.75, 5)),
        (224, 3, 1300, (0.5, 9.0, 0.8, 1.0, 0.25, 0.875, 1)),
        (128, 1, 1300, (0.5, 5.0, 0.8, 1.0, 0.25, 0.875, 1)),
    ],
)
def test_augmentation_follows_from_size_and_labels(side, channels, per_class, expected):
    data, reasons = resolve_augmentation(LabeledSettings("x"), side, channels, per_class)
    evaluation = data.evaluation_crop, data.evaluation_views or 1
    assert (data.flip, data.rand_augment, data.mixup, data.cutmix, data.erasing, *evaluation) == expected
    assert len(reasons) == 1 and f"{side} px" in reasons[0] and f"{per_class:,} labels per class" in reasons[0]
    given = LabeledSettings("x", flip=0.25, mixup=0.1, evaluation_crop=0.5, evaluation_views=10)
    kept, _ = resolve_augmentation(given, side, channels, per_class)
    assert (kept.flip, kept.mixup, kept.evaluation_crop, kept.evaluation_views) == (0.25, 0.1, 0.5, 10), "what is given wins"
    assert resolve_augmentation(data, side, channels, per_class) == (data, []), "what is resolved stays so"


def test_whole_images_are_seen_once():
    """Five crops of all of an image would mostly be the same."""
    for whole in (LabeledSettings("x", evaluation_crop=1.0), LabeledSettings("x", crop_scale=(1.0, 1.0))):
        data, _ = resolve_augmentation(whole, 64, 3, 10)
        assert (data.evaluation_crop, data.evaluation_views) == (1.0, None)


def test_without_kornia(monkeypatch, digits, encoder_folder, tmp_path):
    monkeypatch.setattr("simmim.finetune.augment.color.has_kornia", lambda: False)
    monkeypatch.setattr("simmim.finetune.classification.defaults.has_kornia", lambda: False)
    data, reasons = resolve_augmentation(LabeledSettings("x"), 224, 3, 10)
    assert data.rand_augment == 0 and "kornia is not installed" in reasons[-1]
    asked = LabeledSettings(str(digits.labeled), rand_augment=5.0)
    with pytest.raises(ValueError, match=r"need kornia, .* pip install 'simmim-toolkit\[finetune\]'"):
        finetune(settings(digits, encoder_folder, tmp_path / "run", data=asked), quiet=True)
    assert not (tmp_path / "run").exists()


def test_stochastic_depth_follows_from_depth():
    rates = {name: config.default_drop_path for name, config in PRESETS.items()}
    assert rates["nano"] == 0 and rates["micro"] == rates["tiny"] == rates["base"] == 0.1 and rates["large"] == 0.2


# --- other numbers of channels -----------------------------------------------------------------------------------------


def test_an_encoder_of_another_channel_count_is_adapted_and_says_so(encoder_folder, tmp_path, capsys):
    """A gray encoder on five bands, with changes that make sense for measurements."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for label in ("wet", "dry"):
            (tmp_path / "bands" / part / label).mkdir(parents=True)
            for number in range(count):
                bands = generator.integers(0, 256, (40, 40, 5), dtype=np.uint8)
                np.save(tmp_path / "bands" / part / label / f"{number}.npy", bands)
    data = LabeledSettings(str(tmp_path / "bands"), rand_augment=9.0, color_jitter=0.4, mixup=0.8)
    run = ClassificationSettings(data=data, out=str(tmp_path / "run"), init=str(encoder_folder), steps=3, batch_size=6)
    finetune(run)
    assert "adapted" in capsys.readouterr().out
    assert load_classifier(tmp_path / "run").model.encoder.config.in_channels == 5


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LabeledSettings("x", mixup=-0.1), "data.mixup is -0.1: give a number from 0, for none, to 100"),
        (lambda: LabeledSettings("x", rand_augment=11.0), "data.rand_augment is 11.0: .* to 10"),
        (lambda: LabeledSettings("x", color_jitter=1.5), "data.color_jitter is 1.5"),
        (lambda: LabeledSettings("x", erasing=1.5), "data.erasing is 1.5: give a probability"),
        (lambda: LabeledSettings("x", mix_probability=2), "data.mix_probability is 2: give a probability"),
        (lambda: LabeledSettings("x", rand_augment_operations=0), "data.rand_augment_operations is 0"),
        (lambda: LabeledSettings("x", balance="weight"), "unknown data.balance 'weight'; did you mean 'weights'"),
        (lambda: ClassificationSettings(data="x", out="y", monitor="acuracy"), "monitor 'acuracy'; did you mean 'accuracy'"),
        (lambda: ClassificationSettings(data="x", out="y", init="e", train_stages=0), "train_stages is 0: give a positive"),
        (lambda: ClassificationSettings(data="x", out="y", train_stages=1), "train_stages with init: none"),
        (lambda: ClassificationSettings(data="x", out="y", init="e", train_stages=1, freeze=True), "give one of them"),
        (lambda: ClassificationSettings(data="x", out="y", patience=0), "patience is 0: give a positive number"),
        (lambda: OptimSettings(ema=1.0), r"optim.ema is 1.0: give a decay in \[0, 1\)"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("labels, decay, why", [(20, 0.65, "for 20 labels per class"), (21, 0.75, "as published")])
def test_few_labels_keep_the_first_layers(encoder_folder, labels, decay, why):
    config = load_encoder(encoder_folder).config
    settings = ClassificationSettings(data="images", out="run", image_size=32)
    chosen, reasons = resolve_settings(settings, 10 * labels, 10, config, "cpu")
    assert chosen.optim.layer_decay == decay and f"layer decay {decay}: {why}" in reasons
    given = replace(settings, optim=OptimSettings(layer_decay=0.9))
    chosen, reasons = resolve_settings(given, 10 * labels, 10, config, "cpu")
    assert chosen.optim.layer_decay == 0.9 and not any("layer decay" in reason for reason in reasons)
