"""Model cards, printed lines that load an export, and the text of `simmim inspect`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conversion import FORMATS, RELEASED, SMALL, random_checkpoint, same_tensors
from random_encoders import random_images

from simmim import load_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.formats.registry import format_named
from simmim.checkpoints.own_files import save_checkpoint
from simmim.cli import main
from simmim.encoders.swinv2 import SwinV2Config


@pytest.mark.parametrize("format", [*FORMATS, "onnx"])
def test_the_model_card_and_the_printed_lines(format, tmp_path, monkeypatch):
    """Front matter with the license; data, preprocessing, recipe, metrics and classes; lines that load the folder. timm's
    lines run in test_parity.py."""
    checkpoint = random_checkpoint(SMALL, (32, 32), interpolation="bicubic", crop=0.875)
    exported = export(checkpoint, format, tmp_path / "out", "classifier", license="cc-by-4.0")
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "image-classification" and front["tags"]
    for line in (
        "- data: hedgerow",
        "- images: 12345",
        "- method: SimMIM",
        "- mask ratio: 0.6",
        "- loss: 0.1234",
        "32×32 px, bicubic, central crop 0.875, values in [0, 1], mean [0.3, 0.31, 0.32], std [0.25, 0.25, 0.25]",
        "cat, Hündchen, hedgehog, European",
        "| encoder | window 4 (pre-trained with [4, 4]), patch 4 px |",
    ):
        assert line in text, line
    code = text.split("```python\n")[1].split("\n```")[0]
    assert code.replace("FOLDER", str(exported.folder.resolve())) == exported.code
    unlicensed = export(checkpoint, format, tmp_path / "unlicensed", "encoder").folder
    assert "license: unknown\n" in (unlicensed / "README.md").read_text(encoding="utf-8")
    if format == "timm":
        return
    names = {}
    exec(exported.code, names)
    images = random_images(1, 3, 32, 32)
    logits = torch.nn.functional.linear(
        load_encoder(save_checkpoint(tmp_path / "ours", checkpoint))(images).pooled,
        checkpoint.head["weight"],
        checkpoint.head["bias"],
    ).detach()
    if format == "safetensors":
        assert names["features"].shape == (1, 16)
        assert names["classifier"].classes == checkpoint.classes and names["classes"][0] in checkpoint.classes
    if format == "official":
        assert same_tensors(names["state"], format_named("official").rows_for(SMALL).state(checkpoint, "classifier"))
    if format == "hf":
        torch.testing.assert_close(names["model"].eval()(images).logits, logits, atol=1e-4, rtol=0)
        assert names["processor"].crop_size["height"] == 32
    if format == "onnx":
        outputs = names["session"].run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(outputs, logits.numpy(), atol=1e-4)


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    checkpoint = random_checkpoint(SwinV2Config.from_preset("nano"), (64, 64))
    folder = export(checkpoint, "official", tmp_path / "out", "classifier").folder
    for words in (["inspect", str(folder)], ["inspect", "--path", str(folder / "model.pth")]):
        assert main(words) == 0
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert rows["format"] == "official (the authors' code)" and rows["encoder"].startswith("SwinV2 nano, ")
        assert rows["holds"] == "encoder; head of 3 classes: cat, Hündchen, hedgehog, European"
        assert rows["stages"] == "48 channels at stride 4 px, 96 channels at stride 8 px"
        assert rows["settings"] == "window 4 (pre-trained with [4, 4]), patch 4 px"
        assert rows["images"] == "3 channels, 64×64 px, bilinear, central crop 1"
        assert "method SimMIM, data hedgerow" in rows["from"] and "None" not in rows["from"]
        assert rows["exports"].startswith("as safetensors; official; timm; hf; onnx")
    fine_tuned = replace(checkpoint, provenance={"images": 20, "encoder": {"images": 4000, "seed": None}, "steps": 50})
    save_checkpoint(tmp_path / "fine-tuned", fine_tuned)
    assert main(["inspect", str(tmp_path / "fine-tuned")]) == 0
    assert "\nfrom       images 20, encoder (images 4000), steps 50\n" in capsys.readouterr().out
    assert main(["inspect", str(RELEASED)]) == 0
    out = capsys.readouterr().out
    assert (
        "encoder; mask token and decoder" in out
        and "window 8 (pre-trained with [8, 8, 8, 4])" in out
        and "128×128 px" in out
    )
    huge = SwinV2Config(8, (1, 1, 2), (1, 1, 1), window_size=4, extra_norm_every=2)
    save_checkpoint(tmp_path / "huge", random_checkpoint(huge, (32, 32)))
    assert main(["inspect", str(tmp_path / "huge")]) == 0
    assert "not timm (timm has no place for the extra norms" in capsys.readouterr().out
