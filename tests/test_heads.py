"""Attentive heads: their mathematics, fine-tuned classifiers with one, prediction, and other libraries' formats."""

import csv

import numpy as np
import pytest
import torch
from random_encoders import CONFIG, random_encoder, random_images, randomize
from torch import nn

from simmim.checkpoints import read, read_encoder
from simmim.checkpoints.export import export
from simmim.cli import main
from simmim.data import EvaluationView, normalize, open_images, open_picture
from simmim.encoders.heads import AttentiveHead, attend, build_head, head_input, head_of
from simmim.finetune import ClassificationSettings, LabeledSettings, finetune, load_classifier
from simmim.finetune.classification.model import Classifier
from simmim.finetune.settings import OptimSettings


def test_attention_is_that_of_pytorch():
    """`nn.MultiheadAttention` in float64 with one head and identities for projections. Rounding of the float32 softmax."""
    queries, tokens = random_images(3, 8, dtype=torch.float64), random_images(5, 7, 8, seed=2, dtype=torch.float64)
    theirs = nn.MultiheadAttention(8, 1, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(8, dtype=torch.float64).repeat(3, 1))
        theirs.out_proj.weight.copy_(torch.eye(8, dtype=torch.float64))
        expected, _ = theirs(queries.expand(5, 3, 8), tokens, tokens)
    torch.testing.assert_close(attend(queries, tokens), expected, rtol=1e-6, atol=1e-6)


def test_training_begins_with_mean_pooling():
    """Each query gathers the mean, so that the logits are those of a linear head with the sum of their weights. Every
    parameter gets a gradient."""
    encoder = random_encoder()
    model = Classifier(encoder, 5, "attentive")
    images = random_images(3, 1, 32, 32)
    output = encoder(images)
    torch.testing.assert_close(model.head.gather(output.features), output.pooled.repeat(1, 4), rtol=1e-5, atol=1e-6)
    summed = model.head.weight.view(5, 4, -1).sum(dim=1)
    torch.testing.assert_close(model(images), output.pooled @ summed.T, rtol=1e-4, atol=1e-5)
    model(images).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.head.parameters() if parameter is not model.head.bias)


def test_a_head_is_built_from_its_weights():
    for kind in ("linear", "attentive"):
        head = randomize(build_head(kind, 32, 5))
        again = head_of(head.state_dict(), 32)
        output = random_encoder()(random_images(2, 1, 24, 40))
        assert type(again) is type(head) and torch.equal(head(head_input(head, output)), again(head_input(again, output)))


@pytest.fixture(scope="module")
def run(digits, encoder_folder, tmp_path_factory):
    """A classifier of ten digits with an attentive head, a few steps long."""
    out = tmp_path_factory.mktemp("attentive") / "run"
    data = LabeledSettings(str(digits.labeled))
    optim = OptimSettings(lr=0.05, ema=0.0)
    common = {"steps": 20, "batch_size": 40, "validations": 1, "workers": 0, "optim": optim, "labels_per_class": 12}
    finetune(ClassificationSettings(data=data, out=str(out), init=str(encoder_folder), head="attentive", **common))
    return out


def logits_of(run, paths):
    saved = load_classifier(run)
    view = EvaluationView(saved.preprocessing.image_size, saved.preprocessing.crop)
    images = torch.stack([view(open_picture({"bytes": None, "path": str(path)}, 1)) for path in paths])
    with torch.no_grad():
        return saved, saved.model(normalize(images, saved.preprocessing.mean, saved.preprocessing.std))


def test_its_queries_are_trained_saved_and_predict(run, digits, tmp_path):
    state = read(run).head
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "queries": (4, 64),
        "weight": (10, 256),
        "bias": (10,),
    }
    assert state["queries"].abs().max() > 0
    paths = [row["image"]["path"] for row in open_images(digits.unlabeled).select(range(6))]
    (tmp_path / "images.txt").write_text("\n".join(paths))
    words = ("--images", tmp_path / "images.txt", "--out", tmp_path / "p.csv", "--workers", 0)
    assert main([str(word) for word in ("predict", "--run", run, *words)]) == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    saved, logits = logits_of(run, paths)
    assert isinstance(saved.model.head, AttentiveHead)
    for path, expected in zip(paths, logits.softmax(dim=1)):
        found = [float(rows[path][f"probability {name}"]) for name in saved.classes]
        assert found == pytest.approx(expected.tolist(), abs=2e-5)


def test_formats(run, tmp_path, capsys):
    """This toolkit's own and ONNX hold it; others hold the encoder alone, say so, and refuse it as a classifier."""
    checkpoint = read(run)
    exported = export(checkpoint, "safetensors", tmp_path / "own")
    assert exported.form == "classifier" and "learned queries" in (tmp_path / "own" / "README.md").read_text()
    for name, value in read(tmp_path / "own").head.items():
        assert torch.equal(value, checkpoint.head[name])
    assert export(checkpoint, "onnx", tmp_path / "onnx", dynamic_size=True).form == "classifier"
    for name in ("timm", "hf", "official"):
        plain = export(checkpoint, name, tmp_path / name)
        assert plain.form == "encoder" and "left out: the classifier's head" in plain.notes
    words = ["export", "--run", str(run), "--out", str(tmp_path / "no"), "--format", "timm", "--form", "classifier"]
    assert main(words) == 2
    said = "timm has no place for an attentive head: export as safetensors or onnx, or the encoder alone"
    assert said in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["inspect", "--path", str(run)]) == 0
    assert "attentive head of 10 classes" in capsys.readouterr().out


def test_onnx_runs_it(run, digits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(read(run), "onnx", tmp_path / "onnx", dynamic_size=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    saved = load_classifier(run)
    for size in ((32, 32), (40, 24)):
        images = random_images(3, 1, *size)
        with torch.no_grad():
            expected = saved.model(images)
        assert np.allclose(session.run(None, {"images": images.numpy()})[0], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_head_of_another_kind_is_not_taken_over(run, digits, tmp_path, capsys):
    words = ["--data", str(digits.labeled), "--init", str(run), "--steps", "1", "--batch-size", "20", "--workers", "0"]
    for kind, says in (("linear", "head of another kind replaced by a fresh one"), ("attentive", "same 10 classes loaded")):
        assert main(["finetune", "classification", *words, "--head", kind, "--out", str(tmp_path / kind)]) == 0
        assert says in capsys.readouterr().out
    assert main(["finetune", "classification", *words, "--head", "attentiv", "--out", str(tmp_path / "no")]) == 2
    assert "unknown head 'attentiv'; did you mean 'attentive'?" in capsys.readouterr().err


def test_weights_that_do_not_fit(run, tmp_path):
    from simmim.checkpoints.fitting import check_head

    checkpoint = read(run)
    head = {**checkpoint.head, "queries": torch.zeros(3, 64)}
    with pytest.raises(ValueError, match="holds a head"):
        check_head(head, checkpoint.classes, checkpoint.config, run)
    assert read_encoder(run).encoder.config.channels[-1] == 64 and CONFIG.channels[-1] == 32
