"""Weight files that are refused: files that would run code, files in which a tensor is missing, left over or of another
shape, and files that hold something else. The error is one line with the file's name, and nothing is written."""

import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import types
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conversion import (
    CLASSES,
    FORMATS,
    SMALL,
    forms_of,
    random_checkpoint,
    refused,
    released,
    rewritten,
    same_tensors,
    source_of,
    weights_file,
)
from safetensors.torch import save_file

from simmim import load_encoder
from simmim.checkpoints import read, read_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.fitting import check_head, check_pretraining
from simmim.checkpoints.formats.registry import format_named
from simmim.checkpoints.formats.swinv2.huggingface import PROJECTION
from simmim.checkpoints.formats.swinv2.official import BUFFERS
from simmim.checkpoints.own_files import HEAD_CONFIG, save_checkpoint
from simmim.checkpoints.weight_files import read_weight_file
from simmim.cli import main
from simmim.encoders.swinv2 import SwinV2Config

# --- code in files ---------------------------------------------------------------------------------------------------


class Payload:
    """Calls `function` with `arguments` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@contextlib.contextmanager
def a_yacs_module():
    """A stand-in for yacs while a file is written, as the authors' programs have it."""
    module, parent = types.ModuleType("yacs.config"), types.ModuleType("yacs")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    parent.config = module
    before = {name: sys.modules.get(name) for name in ("yacs", "yacs.config")}
    sys.modules |= {"yacs": parent, "yacs.config": module}
    try:
        yield module.CfgNode
    finally:
        for name, value in before.items():
            sys.modules.pop(name, None)
            if value is not None:
                sys.modules[name] = value


CALLS = {
    "os.system": ("system", lambda mark: Payload(os.system, f"touch {mark}")),
    "exec": ("exec", lambda mark: Payload(exec, f"open({str(mark)!r}, 'w').close()")),
    "subprocess": ("check_call", lambda mark: Payload(subprocess.check_call, ["touch", str(mark)])),
}
FILES = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "raw pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


def with_payload(place, payload, cfg_node):
    """A checkpoint as the authors write it, with `payload` at one place."""
    content = {"model": released()["model"], "optimizer": {"state": {}}, "config": {"DATA": {"IMG_SIZE": 128}}}
    if place == "whole file":
        return payload
    if place == "config":
        content["config"]["TRAIN"] = payload
    if place == "optimizer":
        content["optimizer"]["state"][0] = [payload]
    if place == "state of the CfgNode":
        content["config"] = cfg_node(DATA={})
        content["config"].__dict__["__immutable__"] = payload
    return content


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("place", ["whole file", "config", "optimizer", "state of the CfgNode"])
@pytest.mark.parametrize("call", CALLS)
def test_no_file_gets_to_run_code(call, place, layout, tmp_path, monkeypatch):
    """Each file runs its call when it is unpickled as usual; here it is refused and nothing runs."""
    monkeypatch.chdir(tmp_path)
    path, mark = tmp_path / "model.pth", tmp_path / "was_run"
    name, payload = CALLS[call]
    with a_yacs_module() as cfg_node:
        FILES[layout](with_payload(place, payload(mark.name), cfg_node), path)
        with contextlib.suppress(RuntimeError):
            torch.load(path, weights_only=False)
    assert mark.exists()
    mark.unlink()
    for load in (read, load_encoder):
        with pytest.raises(ValueError, match=r"model\.pth .*(refused|fetch it again)") as caught:
            load(path)
        assert "\n" not in str(caught.value) and not mark.exists()
        if layout != "raw pickle":
            assert name in str(caught.value), caught.value


def test_the_command_refuses_a_file_that_would_run_code(digits, tmp_path, capsys):
    """By every command: exit code 2, one line, no file made."""
    path, mark = tmp_path / "model.pth", tmp_path / "was run"
    torch.save({"model": released()["model"], "config": Payload(os.system, f"touch '{mark}'")}, path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "swinv2"}')
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(path.read_bytes())
    out = str(tmp_path / "out")
    for words in (
        ["inspect", str(tmp_path / "hf")],
        ["inspect", str(path)],
        ["export", "--run", str(path), "--out", out, "--format", "hf"],
        ["embed", "--run", str(path), "--images", str(digits.unlabeled), "--out", out],
        ["pretrain", "--data", str(digits.unlabeled), "--out", out, "--init", str(path)],
        ["finetune", "classification", "--data", str(digits.labeled), "--out", out, "--init", str(path)],
    ):
        assert main(words) == 2, words
        printed, error = capsys.readouterr()
        assert error.count("\n") == 1 and "system" in error and "refused" in error, error
        assert printed == "" and not mark.exists() and not Path(out).exists()


# --- strictness ------------------------------------------------------------------------------------------------------


def our_names(format, config, form):
    """For every tensor in a file its name in the format and ours."""
    if format == "safetensors":
        return {name: name for name in random_checkpoint(config, (32, 32)).encoder}
    table = import_module(format_named(format).families["swinv2"]).TABLE
    prefix = {("official", "simmim"): "encoder.", ("hf", "simmim"): "swinv2.", ("hf", "classifier"): "swinv2."}
    prefix = prefix.get((format, form), "")
    names = {prefix + their: our for our, theirs in table.names(config).items() for their in theirs}
    names |= {their: our for our, their in (table.pretraining if form == "simmim" else ())}
    return names | {their: our for our, their in (table.head if form == "classifier" else ())}


@pytest.mark.parametrize("format, form", [(format, form) for format in FORMATS for form in forms_of(format)])
def test_every_tensor_counts(format, form, tmp_path):
    """A tensor that is missing, of another shape or unexpected is an error that names it, for each tensor of each format."""
    checkpoint = random_checkpoint(replace(SMALL, depths=(1, 1)), (32, 32))
    folder = export(checkpoint, format, tmp_path / "out", form).folder
    file = weights_file(folder)
    whole, content = file.read_bytes(), read_weight_file(file)
    names = our_names(format, checkpoint.config, form)
    stored = {name for name in content.tensors if not BUFFERS.search(name)}
    assert stored == names.keys()
    for theirs, ours in names.items():
        for change in ("missing", "reshaped"):
            tensors = dict(content.tensors)
            value = tensors.pop(theirs)
            if change == "reshaped":
                tensors[theirs] = torch.zeros(value.shape[0] + 1, *value.shape[1:])
            if file.suffix == ".pth":
                torch.save({**content.values, "model": tensors}, folder / "new")
            else:
                save_file(tensors, folder / "new")
            (folder / "new").replace(file)
            with pytest.raises(ValueError) as caught:
                read(folder)
            message = str(caught.value)
            assert "\n" not in message and str(folder) in message
            assert theirs in message or ours in message or ours.removeprefix("head.") in message, (theirs, change, message)
            # Both sides, of the whole where a part of a joined tensor was reshaped.
            assert change == "missing" or re.search(r" for \(|differ in shape|expected ", message), message
    (folder / "new").write_bytes(whole)
    (folder / "new").replace(file)
    rewritten(folder, lambda state: {**state, f"{next(iter(stored)).rpartition('.')[0]}.extra": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 unexpected \(.*extra\)"):
        read(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_another_preset_or_depth_is_named(format, tmp_path):
    """A folder with another depth than its description, by one block or by a preset: the error names both sides."""
    tiny = SwinV2Config(8, (2, 2, 6, 2), (1, 1, 2, 2), window_size=4)
    folder, deeper = (
        export(random_checkpoint(config, (32, 32), ()), format, tmp_path / str(config.depths), "encoder").folder
        for config in (tiny, replace(tiny, depths=(2, 2, 18, 2)))
    )
    rewritten(folder, lambda state: {name: value for name, value in state.items() if "layers.2.blocks.5." not in name})
    message = r"missing \(.*layers\.2\.blocks\.5\..*The file holds depths \(2, 2, 5, 2\) for \(2, 2, 6, 2\)"
    with pytest.raises(ValueError, match=message):
        read(folder)
    weights_file(deeper).replace(weights_file(folder))
    message = r"unexpected \(.*The file holds depths \(2, 2, 18, 2\) for \(2, 2, 6, 2\)"
    with pytest.raises(ValueError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_sizes_that_the_files_own_configuration_contradicts():
    """Without this toolkit's description sizes are checked against the other library's configuration or name."""
    tiny = random_checkpoint(SwinV2Config.from_preset("tiny"), (256, 256), (), meta=True)
    small = random_checkpoint(SwinV2Config.from_preset("small"), (256, 256), (), meta=True)
    message = r"The file holds depths \(2, 2, 18, 2\) for \(2, 2, 6, 2\), as the preset small has"
    for format in ("official", "timm", "hf"):
        source, other = (source_of(checkpoint, format, "encoder", described=False) for checkpoint in (small, tiny))
        stated = replace(source, config=other.config, weights=replace(source.weights, values=other.weights.values))
        with pytest.raises(ValueError, match=message):
            format_named(format).read(stated, {})
    named = {key: value for key, value in stated_by_timm(tiny).items() if key != "model_args"}
    source = replace(source_of(small, "timm", "encoder", described=False), config=named)
    with pytest.raises(ValueError, match=message):
        format_named("timm").read(source, {})


def stated_by_timm(checkpoint):
    return source_of(checkpoint, "timm", "encoder", described=False).config


def test_parts_of_another_size_are_refused(tmp_path):
    checkpoint = random_checkpoint(SMALL, (32, 32))
    with pytest.raises(ValueError, match=r"holds a head .*\(2, 9\).*expected .*\(3, 16\).* for 3 classes"):
        check_head({"weight": torch.zeros(2, 9), "bias": torch.zeros(2)}, CLASSES, SMALL, Path("file"))
    with pytest.raises(
        ValueError, match=r"does not fit SimMIM with this encoder: 2 missing \(decoder\.weight, decoder\.bias\)"
    ):
        check_pretraining(replace(checkpoint, pretraining={"mask_token": torch.zeros(8)}), Path("file"))
    with pytest.raises(ValueError, match=r"file: unknown method 'mae'; known: canvas, contrast, simmim"):
        check_pretraining(replace(checkpoint, method="mae"), Path("file"))
    folder = export(checkpoint, "hf", tmp_path / "hf", "encoder").folder
    wider = "encoder.layers.0.blocks.0.attention.self.key.weight"
    rewritten(folder, lambda state: {**state, wider: torch.zeros(8, 9)})
    with pytest.raises(ValueError, match=r"key\.weight \(8, 9\).*are parts of layers\.0\.blocks\.0\.attn\.qkv\.weight"):
        read(folder)
    folder = save_checkpoint(tmp_path / "ours", checkpoint)
    (folder / HEAD_CONFIG).unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors has no head\.json"):
        read(folder)


def test_a_mask_token_without_a_decoder_is_ignored_with_a_note(tmp_path):
    """An encoder cut out of the authors' SimMIM model, and transformers' encoder with a mask token."""
    checkpoint = random_checkpoint(SMALL, (32, 32), ())
    for format, name in (("official", "mask_token"), ("hf", "embeddings.mask_token")):
        folder = export(checkpoint, format, tmp_path / format, "encoder").folder
        rewritten(folder, lambda state, name=name: {**state, name: torch.zeros(1, 1, 8)})
        saved = read_encoder(folder)
        assert same_tensors(saved.checkpoint.encoder, checkpoint.encoder) and not saved.checkpoint.pretraining
        assert saved.report.adapted == ("mask token ignored: there is no decoder",)


# --- wrong input through the command ---------------------------------------------------------------------------------


def resnet():
    shapes = {"conv1.weight": (8, 3, 7, 7), "layer1.0.conv1.weight": (8, 8, 3, 3), "fc.bias": (9,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def swin_v1(prefix=""):
    block = "layers.0.blocks.0.attn."
    names = (block + "relative_position_bias_table", block + "qkv.weight", "patch_embed.proj.weight")
    return {prefix + name: torch.zeros(4, 4) for name in names}


def swin_v1_of_transformers():
    block = "swin.encoder.layers.0.blocks.0.attention.self."
    return {block + "relative_position_bias_table": torch.zeros(4, 4), f"swin.{PROJECTION}": torch.zeros(4, 3, 4, 4)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one file of each kind that cannot be read, and some that can."""
    here = tmp_path_factory.mktemp("wrong")
    good = random_checkpoint(SMALL, (32, 32), ())
    encoder = export(replace(good, pretraining={}), "safetensors", here / "encoder").folder
    torch.save(resnet(), here / "resnet.pth")
    torch.save({"model": swin_v1()}, here / "v1.pth")
    torch.save({"model": swin_v1("encoder.")}, here / "v1_simmim.pth")
    (here / "cut.safetensors").write_bytes((encoder / "encoder.safetensors").read_bytes()[:-100])
    for name in ("text.pth", "text.txt"):
        (here / name).write_text("These are no weights, whatever the file is called.\n" * 9)
    (here / "empty.pth").write_bytes(b"")
    torch.save(torch.zeros(3), here / "tensor.pth")
    torch.save({"epoch": 3, "note": "no weights"}, here / "notes.pth")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    torch.save(optimizer.state_dict(), here / "optimizer.pth")
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 3}, here / "optimizer_only.pth")
    incomplete = {
        name: value
        for name, value in format_named("official").rows_for(SMALL).state(good, "encoder").items()
        if "logit_scale" not in name
    }
    torch.save({"model": incomplete}, here / "incomplete.pth")
    for name, change in (("relu", {"hidden_act": "relu"}), ("absolute", {"use_absolute_embeddings": True})):
        folder = export(good, "hf", here / name, "encoder").folder
        config_file = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config_file | change))
    (export(good, "hf", here / "no config", "encoder").folder / "config.json").unlink()
    weightless = export(good, "hf", here / "weightless", "encoder").folder
    (weightless / "model.safetensors").unlink()
    (here / "v1 hf").mkdir()
    save_file(swin_v1_of_transformers(), here / "v1 hf" / "model.safetensors")
    (here / "v1 hf" / "config.json").write_text('{"model_type": "swin"}')
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("mine")
    return here


UNREADABLE = {
    "resnet.pth": ["holds a ResNet", "Expected an encoder (SwinV2, Swin, ViT) of this toolkit"],
    "v1.pth": ["patch_embed.proj.weight has shape (4, 4): a Swin Transformer has"],
    "v1_simmim.pth": ["patch_embed.proj.weight has shape (4, 4): a Swin Transformer has"],
    "v1 hf": ["does not fit the architecture expected of it", "missing"],
    "cut.safetensors": ["is not a whole safetensors file"],
    "text.pth": ["is not a whole weight file"],
    "text.txt": ["is no weight file: expected safetensors or a PyTorch checkpoint"],
    "empty.pth": ["is not a whole weight file"],
    "tensor.pth": ["holds a Tensor: expected weights by name"],
    "notes.pth": ["holds no weights", "found epoch, note"],
    "optimizer.pth": ["holds the state of an optimizer and no model"],
    "optimizer_only.pth": ["holds the state of an optimizer and no model"],
    "incomplete.pth": ["holds no whole Swin Transformer V2: there is no logit_scale"],
    "no config": ["holds a model of transformers and no config.json lies beside it"],
    "weightless": ["no encoder in", "expected encoder.safetensors"],
    "relu": ["hidden_act 'relu'", "has 'gelu'"],
    "absolute": ["use_absolute_embeddings True", "has False"],
    "absent.pth": ["there is no such file or folder"],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_refused_by_every_command(name, place, digits, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for words in (
        ["inspect", name],
        ["export", "--run", name, "--out", "new", "--format", "timm"],
        ["finetune", "classification", "--data", str(digits.labeled), "--out", "new", "--init", name],
    ):
        refused(words, [name, *UNREADABLE[name]], place, capsys)


@pytest.mark.parametrize(
    "words, texts",
    [
        ("--out full", ["'full' exists and is not empty: give a new folder"]),
        ("--out text.txt", ["'text.txt' exists"]),
        (
            "--out new --format onxx",
            ["unknown format 'onxx'; did you mean 'onnx'? known: hf, official, onnx, safetensors, timm"],
        ),
        ("--out new --form head", ["unknown form 'head'; known: canvas, classifier, contrast, encoder, simmim"]),
        ("--out new --form classifier", ["has no head: it cannot be exported in the form classifier"]),
        ("--out new --form simmim", ["has no mask token and decoder"]),
        ("--out new --format timm --form simmim", ["has no mask token and decoder"]),
        ("--out new --format hf --image-size 36", ["transformers' Swinv2", "export as safetensors, timm or onnx"]),
    ],
)
def test_exports_that_are_refused(words, texts, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    refused(["export", "--run", "encoder", *words.split()], texts, place, capsys)


def test_a_form_that_the_format_does_not_have(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "encoder", random_checkpoint(SMALL, (32, 32)))
    monkeypatch.chdir(tmp_path)
    for format in ("timm", "onnx"):
        words = ["export", "--run", "encoder", "--out", "new", "--format", format, "--form", "simmim"]
        refused(
            words,
            [f"{format} has no place for the mask token and decoder of SimMIM: export as safetensors or official or hf"],
            tmp_path,
            capsys,
        )


def test_an_onnx_file_is_not_read(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"graph")
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(ValueError, match="is an ONNX model, made to be run and not read back"):
            read(path)
