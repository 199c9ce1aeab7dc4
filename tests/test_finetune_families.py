"""Fine-tuning of an encoder family that is registered by one line and has no windows and no stochastic depth."""

import csv

import pytest
import torch
from toy_encoder import ToyConfig, ToyEncoder

from simmim import load_encoder
from simmim.checkpoints import read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.encoders import registry
from simmim.finetune import (
    ClassificationSettings,
    EncoderSettings,
    HeadSettings,
    SceneSettings,
    SegmentationSettings,
    finetune,
    load_classifier,
    load_segmenter,
    predict,
    segment,
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, "toy", "toy_encoder")


@pytest.fixture
def encoder_folder(tmp_path):
    """A toy encoder of gray 32 px images."""
    torch.manual_seed(0)
    encoder = ToyEncoder(ToyConfig(in_channels=1))
    return save_encoder(tmp_path / "toy", encoder, Preprocessing((32, 32), (0.13,), (0.31,)), {"method": "test"})


def classification(digits, out, **changes):
    values = {"data": str(digits.labeled), "out": str(out), "labels_per_class": 4, "steps": 6, "batch_size": 20}
    return ClassificationSettings(**{**values, "validations": 2, **changes})


def test_a_classifier_trains_its_last_stages_and_predicts(digits, encoder_folder, tmp_path):
    settings = classification(digits, tmp_path / "run", init=str(encoder_folder), train_stages=1)
    result = finetune(settings, quiet=True)
    before, after = load_encoder(encoder_folder).state_dict(), read_encoder(result.run).encoder.state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    first_stages = ("patches.", "stages.0.", "stages.1.", "downsamplings.")
    assert unchanged == {name for name in before if name.startswith(first_stages)}
    assert isinstance(load_classifier(result.run).model.encoder, ToyEncoder)
    count, unreadable = predict(result.run, digits.labeled / "test", tmp_path / "out.csv")
    assert (count, unreadable) == (60, {})
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= set("0123456789")


def test_from_scratch_by_a_preset_and_by_another_encoder(digits, encoder_folder, tmp_path):
    for name, chosen in (("preset", EncoderSettings(preset="toy")), ("like", EncoderSettings(like=str(encoder_folder)))):
        result = finetune(classification(digits, tmp_path / name, encoder=chosen), quiet=True)
        assert load_classifier(result.run).model.encoder.config == ToyConfig(in_channels=1)


def test_a_segmenter_has_a_norm_per_stage_and_predicts(scene_folder, encoder_folder, tmp_path):
    settings = SegmentationSettings(
        data=SceneSettings(str(scene_folder)),
        out=str(tmp_path / "run"),
        init=str(encoder_folder),
        steps=4,
        batch_size=4,
        validations=2,
        head=HeadSettings(width=16),
    )
    result = finetune(settings, quiet=True)
    assert result.score == result.metrics["mean_iou"]
    model = load_segmenter(result.run).model
    assert [norm.normalized_shape for norm in model.norms] == [(8,), (12,)]
    predicted = segment(result.run, scene_folder / "val" / "images", tmp_path / "out")
    assert predicted.count == len(list((scene_folder / "val" / "images").iterdir()))


@pytest.mark.parametrize(
    "chosen, message",
    [
        (EncoderSettings(window_size=4), r"encoder\.window_size is 4: Toy encoders have no such setting, leave it out"),
        (EncoderSettings(drop_path_rate=0.1), r"encoder\.drop_path_rate is 0\.1: Toy encoders have no such setting"),
        (EncoderSettings(sequential_attention=2), "sequential_attention is 2: this encoder has no windows, leave it out"),
    ],
)
def test_settings_that_the_encoder_does_not_have_are_refused(digits, encoder_folder, tmp_path, chosen, message):
    settings = classification(digits, tmp_path / "run", init=str(encoder_folder), encoder=chosen)
    with pytest.raises(ValueError, match=message):
        finetune(settings, quiet=True)
    assert not (tmp_path / "run").exists()
