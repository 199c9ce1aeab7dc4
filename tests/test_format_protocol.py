"""What every format, encoder and method gets from the protocol: a toy format that one line registers, formats that have no
place for an encoder or a method, and this toolkit's own format, which holds them all."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from conversion import CLASSES, SMALL, assert_round_trip, random_checkpoint, same_tensors
from random_encoders import random_images, randomize
from torch import nn
from toy_encoder import ToyConfig, ToyEncoder
from toy_method import ToyMethod

from simmim import load_encoder
from simmim.checkpoints import Checkpoint, Preprocessing, read, read_encoder, save_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.formats import registry
from simmim.checkpoints.inspect import inspect
from simmim.checkpoints.own_files import save_checkpoint
from simmim.cli import main
from simmim.encoders import registry as encoders
from simmim.encoders.base import EncoderFamily
from simmim.methods.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("official", "timm", "hf", "onnx")


@pytest.fixture
def toy_format(monkeypatch):
    """The one line that registers a format."""
    monkeypatch.setitem(registry.FORMATS, "toy", ("toy_format", "ToyFormat"))


@pytest.fixture
def toy_encoder(monkeypatch):
    """The one line that registers an encoder family."""
    monkeypatch.setitem(encoders.FAMILIES, "toy", "toy_encoder")


@pytest.fixture
def toy_method(monkeypatch):
    """The one line that registers a method."""
    monkeypatch.setitem(METHODS, "toy", ("toy_method", "ToyMethod"))


def toy_checkpoint(pretrained=False, classes=()):
    """A random toy encoder, with the toy method's own weights and a head if asked for."""
    encoder = randomize(ToyEncoder(ToyConfig()))
    own = randomize(ToyMethod(encoder, 0.5), seed=2).own_state() if pretrained else {}
    head = randomize(nn.Linear(16, len(classes)), seed=1).state_dict() if classes else {}
    return Checkpoint(
        encoder.config,
        encoder.state_dict(),
        Preprocessing((32, 32), (0.4,) * 3, (0.2,) * 3),
        Path("random"),
        provenance={"method": "toys"},
        method="toy" if pretrained else "simmim",
        pretraining={name: value.detach() for name, value in own.items()},
        head=head,
        classes=tuple(classes),
    )


# --- a new format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["encoder", "simmim", "classifier"])
def test_a_toy_format_is_exported_detected_and_read(toy_format, form, tmp_path):
    """By its folder, its file, and a run's folder; with everything that the form holds."""
    before = random_checkpoint(SMALL, (32, 32))
    folder = export(before, "toy", tmp_path / "run" / "encoder", form).folder
    for path in (folder, folder / "toy.npz", tmp_path / "run"):
        after = read(path)
        assert_round_trip(before, after, "toy", form)
    assert "(toy archives)" in str(read_encoder(folder).report)


def test_a_toy_format_is_listed_inspected_and_carded(toy_format, tmp_path, monkeypatch, capsys):
    """Through the command: help, export, model card, printed lines, inspection."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("source", random_checkpoint(SMALL, (32, 32)))
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "hf, onnx, toy" in " ".join(capsys.readouterr().out.split())
    assert main(["export", "--run", "source", "--format", "toy", "--out", "out", "--form", "simmim"]) == 0
    out = capsys.readouterr().out
    assert "note: NumPy computes nothing\nnote: left out: the classifier's head\n" in out
    assert "exported the encoder, mask token and decoder to out; load it with" in out and "numpy.load(" in out
    _, front, text = Path("out", "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "numpy"
    assert "## In toy archives\n\n- NumPy computes nothing\n" in text and "numpy.load('FOLDER/toy.npz')" in text
    assert main(["inspect", "out"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["format"] == "toy (toy archives)" and rows["holds"] == "encoder; mask token and decoder"
    assert "; toy (NumPy computes nothing, left out: mask token and decoder)" in rows["exports"]


def test_training_goes_on_from_a_toy_format(toy_format, digits, tmp_path, capsys):
    checkpoint = random_checkpoint(replace(SMALL, in_channels=1), (32, 32), ())
    folder = export(checkpoint, "toy", tmp_path / "source", "simmim").folder
    shared = ["--init", str(folder), "--workers", "0"]
    words = ["--data", str(digits.unlabeled), "--out", str(tmp_path / "pretrained"), "--epochs", "0.03", "--batch-size", "4"]
    assert main(["pretrain", *words, *shared, "--model.mask-unit", "8"]) == 0
    assert "loaded     mask token and decoder" in capsys.readouterr().out
    assert not same_tensors(read(tmp_path / "pretrained").encoder, checkpoint.encoder)
    words = ["--data", str(digits.labeled), "--out", str(tmp_path / "finetuned"), "--labels-per-class", "1", "--steps", "1"]
    assert main(["finetune", "classification", *words, *shared, "--batch-size", "5"]) == 0
    assert "(toy archives)" in capsys.readouterr().out


def test_what_a_toy_format_cannot_represent_is_refused(toy_format, tmp_path):
    checkpoint = random_checkpoint(replace(SMALL, in_channels=2), (32, 32))
    with pytest.raises(ValueError, match="no place for two channels"):
        export(checkpoint, "toy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = save_checkpoint(tmp_path / "ours", checkpoint)
    assert "not toy (toy archives have no place for two channels: export as safetensors)" in inspect(folder)


def test_names_of_formats():
    assert registry.names() == ("safetensors", "official", "timm", "hf", "onnx")


@pytest.mark.parametrize("name", [*registry.FORMATS])
def test_every_format_is_complete(name):
    """Its name is the registry's, and it is asked when a file is read."""
    format = registry.format_named(name)
    assert format.name == name and format.title and format.library and format.weight_names
    assert name in registry.DETECTION_ORDER


# --- a new encoder ---------------------------------------------------------------------------------------------------


def test_the_own_format_holds_a_toy_encoder(toy_encoder, tmp_path):
    """With a head; the card and `inspect` describe it by what the protocol tells."""
    before = toy_checkpoint(classes=CLASSES)
    exported = export(before, "safetensors", tmp_path / "out")
    after = read(exported.folder)
    assert after.config == before.config == ToyConfig() and after.classes == CLASSES
    assert same_tensors(after.encoder, before.encoder) and same_tensors(after.head, before.head)
    assert json.loads((exported.folder / "config.json").read_text())["architecture"] == {
        "family": "toy",
        "widths": [8, 12, 16],
        "patch_size": 4,
        "in_channels": 3,
    }
    images = random_images(2, 3, 40, 24)
    encoder = ToyEncoder(before.config).eval()
    encoder.load_state_dict(before.encoder)
    assert torch.equal(load_encoder(exported.folder)(images).features, encoder(images).features)
    names = {}
    exec(exported.code, names)
    assert names["features"].shape == (1, 16)
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "tags: [toy, simmim, self-supervised]" in card and "| encoder | patch 4 px |" in card
    assert "stages | 3, channels [8, 12, 16], strides [4, 8, 16] px |" in card
    text = inspect(exported.folder)
    assert "8 channels at stride 4 px, 12 channels at stride 8 px" in text and "as safetensors; not official" in text


@pytest.mark.parametrize("name", FOREIGN)
def test_a_format_without_rows_for_an_encoder_says_so(toy_encoder, name, tmp_path):
    title = registry.format_named(name).title
    family = encoders.load_family("toy").title
    with pytest.raises(ValueError, match=rf"^{title} has no {family} encoder: export as safetensors$"):
        export(toy_checkpoint(), name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_toy_encoder_is_adapted_while_it_is_read(toy_encoder, tmp_path):
    """Input channels change as in every encoder; an unknown field and a wrong weight are named."""
    folder = save_checkpoint(tmp_path, toy_checkpoint())
    saved = read_encoder(folder, in_channels=1)
    assert saved.encoder.config == ToyConfig(in_channels=1) and saved.report.adapted == ("3 input channels to 1",)
    gray = random_images(1, 1, 32, 32)
    expected = load_encoder(folder)(gray.expand(-1, 3, -1, -1)).features
    torch.testing.assert_close(saved.encoder(gray).features, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="unknown encoder setting 'window_size'"):
        load_encoder(folder, window_size=4)
    with pytest.raises(ValueError, match=r"patches\.weight \(8, 3, 4, 4\) for \(9, 3, 4, 4\)"):
        load_encoder(folder, widths=(9, 12, 16))


class WithBuffers(ToyEncoder):
    """A toy encoder with a buffer that is saved and one that is not."""

    def __init__(self, config, *arguments):
        super().__init__(config, *arguments)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)


@dataclass(frozen=True)
class WithBuffersConfig(ToyConfig):
    pass


FAMILY = EncoderFamily("buffers", "Buffers", WithBuffersConfig, WithBuffers, {})


def test_buffers_of_an_encoder(tmp_path, monkeypatch):
    """Saved ones come back; the others have the values that the encoder gives them; random numbers are not consumed."""
    monkeypatch.setitem(encoders.FAMILIES, "buffers", __name__)
    encoder = WithBuffers(WithBuffersConfig())
    encoder.count += 7
    folder = save_encoder(tmp_path, encoder, Preprocessing((32, 32), (0.4,) * 3, (0.2,) * 3), {})
    state = torch.get_rng_state()
    loaded = load_encoder(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert loaded.count == 7 and loaded.scale == 3.0
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in encoder.state_dict().items())


# --- a new method ----------------------------------------------------------------------------------------------------


def test_the_own_format_holds_a_methods_state(toy_encoder, toy_method, tmp_path):
    """By the method's name, whatever its shapes; its weights are checked by what the method expects."""
    before = toy_checkpoint(pretrained=True)
    exported = export(before, "safetensors", tmp_path / "out")
    after = read(exported.folder)
    assert exported.form == after.method == "toy" and exported.contents == "encoder, linear head"
    assert after.pretraining.keys() == {"head.weight", "head.bias"}
    assert same_tensors(after.pretraining, before.pretraining)
    assert "holds      encoder; linear head" in inspect(exported.folder)
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "with the linear head of Toy method" in card and "tags: [toy, toy, self-supervised]" in card
    wrong = replace(before, pretraining={"head.weight": torch.zeros(3, 9), "head.bias": torch.zeros(3)})
    folder = save_checkpoint(tmp_path / "wrong", wrong)
    message = r"pretraining\.safetensors does not fit Toy method with this encoder: .*head\.weight \(3, 9\) for \(3, 16\)"
    with pytest.raises(ValueError, match=message):
        read(folder)


def swinv2_of_the_toy_method():
    state = {"head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    return replace(random_checkpoint(SMALL, (32, 32), ()), method="toy", pretraining=state)


def test_other_formats_leave_out_a_methods_state(toy_method, tmp_path):
    """They have a place for SimMIM's alone: the encoder goes without, with a note, and the form is refused."""
    checkpoint = swinv2_of_the_toy_method()
    exported = export(checkpoint, "official", tmp_path / "encoder")
    assert exported.form == "encoder" and exported.notes == ("left out: linear head",)
    for name in FOREIGN:
        with pytest.raises(ValueError, match="no place for the linear head of Toy method: export as safetensors, or"):
            export(checkpoint, name, tmp_path / "out", "toy")
        with pytest.raises(ValueError, match="has no mask token and decoder"):
            export(checkpoint, name, tmp_path / "out", "simmim")
    assert not (tmp_path / "out").exists()


def test_an_unknown_method_is_named(toy_method, tmp_path, monkeypatch):
    folder = save_checkpoint(tmp_path, swinv2_of_the_toy_method())
    monkeypatch.delitem(METHODS, "toy")
    with pytest.raises(ValueError, match=r"pretraining\.safetensors: unknown method 'toy'; known: canvas, contrast, simmim"):
        read(folder)


# --- what earlier versions wrote -------------------------------------------------------------------------------------


def test_files_of_version_0_1_are_read(tmp_path):
    """They name neither a family nor a method, and SwinV2 in the marker."""
    before = random_checkpoint(SMALL, (32, 32))
    folder = save_checkpoint(tmp_path / "own", before)
    description = json.loads((folder / "config.json").read_text())
    del description["architecture"]["family"], description["method"]
    (folder / "config.json").write_text(json.dumps({**description, "format": "simmim-swinv2-encoder"}))
    assert_round_trip(before, read(folder), "safetensors", "simmim")
    for format in ("official", "timm", "hf"):
        folder = export(before, format, tmp_path / format, "encoder").folder
        description = json.loads((folder / "config.json").read_text())
        del description["simmim"]["architecture"]["family"]
        (folder / "config.json").write_text(json.dumps(description))
        assert_round_trip(before, read(folder), format, "encoder")
