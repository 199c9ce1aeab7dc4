"""A toy encoder, method and format, each registered by one line, go through the whole toolkit by the command."""

import json
import shutil

import pytest
import torch
from PIL import Image

from simmim import load_encoder
from simmim.checkpoints.formats import registry as formats
from simmim.cli import main
from simmim.encoders import registry as encoders
from simmim.methods import registry as methods

SHORT = ("--epochs", "1", "--batch-size", "40", "--workers", "0")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """The one line of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.FAMILIES, "toy", "toy_encoder")
        patch.setitem(methods.METHODS, "toy", ("toy_method", "ToyMethod"))
        patch.setitem(formats.FORMATS, "toy", ("toy_format", "ToyFormat"))
        yield


def simmim(*words):
    """Run the command, which must succeed."""
    assert main([str(word) for word in words]) == 0, words


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A toy encoder pre-trained by SimMIM."""
    folder = tmp_path_factory.mktemp("toys") / "run"
    simmim("pretrain", "--data", digits.unlabeled, "--out", folder, "--preset", "toy", "--image-size", "32", *SHORT)
    return folder


@pytest.fixture(scope="module")
def classifier(run, digits):
    """A classifier fine-tuned from it."""
    folder = run.parent / "classifier"
    simmim("finetune", "classification", "--data", digits.labeled, "--out", folder, "--init", run, *SHORT)
    return folder


def test_pretraining_writes_what_it_is(run):
    description = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert description["architecture"]["family"] == "toy"
    encoder = load_encoder(run)
    assert type(encoder).__name__ == "ToyEncoder"
    assert encoder(torch.zeros(1, 1, 36, 20)).pooled.shape == (1, encoder.dim)


def test_pretraining_resumes_and_continues(run, digits, capsys):
    simmim("pretrain", "--out", run, "--resume")
    simmim("pretrain", "--data", digits.unlabeled, "--init", run, "--out", run.parent / "continued", *SHORT)
    assert "mask token and decoder" in capsys.readouterr().out


def test_reconstructions(run, digits):
    picture = run.parent / "grid.png"
    simmim("reconstruct", "--run", run, "--images", digits.unlabeled, "--out", picture, "--count", "3")
    assert Image.open(picture).width > 0


@pytest.mark.parametrize("format_name", ["safetensors", "toy"])
def test_export_and_back(run, format_name, capsys):
    folder = run.parent / format_name
    simmim("export", "--run", run, "--format", format_name, "--out", folder)
    for name, value in load_encoder(run).state_dict().items():
        assert torch.equal(load_encoder(folder).state_dict()[name], value)
    simmim("inspect", folder)
    assert "Toy" in capsys.readouterr().out
    assert "Toy" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("format_name", ["official", "timm", "hf", "onnx"])
def test_formats_without_a_place_for_it_say_so(run, format_name, capsys):
    words = ["export", "--run", run, "--format", format_name, "--out", run.parent / "none"]
    assert main([str(word) for word in words]) == 2
    assert "Toy" in capsys.readouterr().err
    assert not (run.parent / "none").exists()


def test_classification(classifier, digits, capsys):
    out = classifier.parent / "predictions.csv"
    simmim("predict", "--run", classifier, "--images", digits.labeled / "test", "--out", out, "--workers", "0")
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1 + 60
    simmim("export", "--run", classifier, "--out", classifier.parent / "exported-classifier")
    assert "classifier" in capsys.readouterr().out


def test_classification_from_scratch_and_frozen(run, digits, tmp_path):
    words = ("finetune", "classification", "--data", digits.labeled, *SHORT)
    simmim(*words, "--out", tmp_path / "scratch", "--init", "none", "--encoder.like", run)
    simmim(*words, "--out", tmp_path / "preset", "--init", "none", "--encoder.preset", "toy", "--image-size", "32")
    simmim(*words, "--out", tmp_path / "frozen", "--init", run, "--train-stages", "1")
    pretrained, frozen = load_encoder(run).state_dict(), load_encoder(tmp_path / "frozen").state_dict()
    changed = {name for name, value in pretrained.items() if not torch.equal(value, frozen[name])}
    assert changed and all(name.startswith(("stages.2.", "norm.")) for name in changed), changed
    for name in ("scratch", "preset"):
        encoder = load_encoder(tmp_path / name)
        assert encoder.config == load_encoder(run).config
        assert not torch.equal(encoder.patches.weight, pretrained["patches.weight"])


def test_settings_that_it_does_not_have(run, digits, tmp_path, capsys):
    words = ["finetune", "classification", "--data", digits.labeled, "--out", tmp_path / "run", "--init", run, *SHORT]
    for setting in ("--encoder.window_size=4", "--encoder.drop_path_rate=0.1", "--encoder.sequential_attention=2"):
        assert main([str(word) for word in (*words, setting)]) == 2
        assert setting.lstrip("-").partition("=")[0].rpartition(".")[2] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_segmentation(run, digits, tmp_path):
    scenes = tmp_path / "scenes"
    for name in ("images", "masks"):
        (scenes / name).mkdir(parents=True)
    for file in sorted(digits.unlabeled.iterdir())[::12]:
        shutil.copy(file, scenes / "images")
        Image.open(file).point(lambda value: int(value > 100)).save(scenes / "masks" / file.name)
    words = ("--data", scenes, "--init", run, "--head.width", "16", "--epochs", "1", "--batch-size", "4", "--workers", "0")
    simmim("finetune", "segmentation", "--out", tmp_path / "segmenter", *words)
    simmim("predict", "--run", tmp_path / "segmenter", "--images", scenes / "images", "--out", tmp_path / "masks")
    assert len(list((tmp_path / "masks").rglob("*.png"))) >= 20


def test_frozen_features(run, digits, tmp_path, capsys):
    simmim("probe", "--run", run, "--data", digits.labeled, "--workers", "0", "--labels-per-class", "5")
    simmim("knn", "--run", run, "--data", digits.labeled, "--workers", "0")
    assert capsys.readouterr().out.count("stage 2") >= 2
    out = tmp_path / "vectors.parquet"
    simmim("embed", "--run", run, "--images", digits.unlabeled, "--out", out, "--workers", "0")
    assert out.is_file()


def test_a_plan_needs_a_cost_model(capsys):
    assert main(["plan", "--preset", "toy", "--image", "32"]) == 2
    assert "toy" in capsys.readouterr().err.lower()


def test_a_method_of_its_own(digits, tmp_path, capsys):
    """Its settings are `model.…`, its state is in checkpoints and exports, and the encoder that comes out is a plain one."""
    run = tmp_path / "run"
    words = ("pretrain", "--data", digits.unlabeled, "--method", "toy", "--image-size", "32", *SHORT)
    simmim(*words, "--out", run, "--preset", "toy")
    description = json.loads((run / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert description["method"] == "toy"
    simmim("pretrain", "--out", run, "--resume")
    simmim(*words, "--out", tmp_path / "swin", "--preset", "nano", "--model.encoder.embed_dim", "12")
    assert type(load_encoder(run)).__name__ == "ToyEncoder"
    words = ("finetune", "classification", "--data", digits.labeled, "--init", run, *SHORT)
    simmim(*words, "--out", tmp_path / "labeled")
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(tmp_path / "none"), "--method", "toyy"]) == 2
    assert "did you mean 'toy'" in capsys.readouterr().err
