"""Reading: what is adapted is reported; half precision, shards and older file names are read, too."""

import json
from dataclasses import replace

import pytest
import torch
from conversion import FORMATS, SMALL, assert_round_trip, random_checkpoint, rewritten, same_tensors
from random_encoders import random_images
from safetensors.torch import load_file, save_file

from simmim import load_encoder
from simmim.checkpoints import read, read_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.own_files import save_checkpoint

# --- what is adapted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before, after", [(3, 1), (1, 3), (3, 4), (3, 6), (4, 3), (3, 2)])
def test_other_channels_keep_a_gray_image_s_features(before, after, tmp_path):
    """An image that is the same in all channels keeps its features, and the report names the change."""
    checkpoint = random_checkpoint(replace(SMALL, in_channels=before), (32, 32))
    folder = save_checkpoint(tmp_path / "encoder", checkpoint)
    gray, lines = random_images(2, 1, 32, 32), []
    saved = read_encoder(folder, report=lines.append, in_channels=after)
    with torch.no_grad():
        expected = load_encoder(folder)(gray.expand(-1, before, -1, -1)).features
        actual = saved.encoder(gray.expand(-1, after, -1, -1)).features
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert saved.encoder.config.in_channels == len(saved.preprocessing.mean) == len(saved.preprocessing.std) == after
    assert saved.preprocessing.mean == pytest.approx((sum(checkpoint.preprocessing.mean) / before,) * after)
    assert f"adapted    {before} input channels to {after}" in lines[0].splitlines()


def test_the_report_tells_what_became_of_everything(tmp_path):
    checkpoint = random_checkpoint(SMALL, (32, 32))
    official_folder = export(checkpoint, "official", tmp_path / "official", "simmim").folder
    lines = []
    read_encoder(official_folder, report=lines.append, window_size=6, in_channels=1)
    tensors, values = len(checkpoint.encoder), sum(value.numel() for value in checkpoint.encoder.values())
    values -= 2 * 8 * 16  # one channel instead of three
    assert lines[0].splitlines() == [
        f"loaded     {tensors} of {tensors} tensors, {values / 1e6:.2f} M values, from {official_folder / 'model.pth'} "
        "(the authors' code)",
        "adapted    3 input channels to 1",
        "adapted    window 4 to 6, position bias scaled by the pre-trained windows 4, 4",
    ]
    timm_folder = export(checkpoint, "timm", tmp_path / "timm").folder
    read_encoder(timm_folder, report=lines.append)
    assert lines[1].splitlines()[1:] == [
        "missing    mask token and decoder: fresh where pre-training goes on",
        "unexpected a head of 3 classes",
    ]


# --- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_half_precision_is_read_as_float32(format, dtype, tmp_path):
    checkpoint = random_checkpoint(SMALL, (32, 32), ())
    folder = export(checkpoint, format, tmp_path / "out", "encoder").folder

    def halved(state):
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}

    rewritten(folder, halved)
    assert same_tensors(read(folder).encoder, {name: value.to(dtype).float() for name, value in checkpoint.encoder.items()})


@pytest.fixture
def hf_folder(tmp_path):
    return export(random_checkpoint(SMALL, (32, 32)), "hf", tmp_path / "hf", "simmim").folder


def test_a_folder_in_shards(hf_folder):
    whole, state = read(hf_folder), load_file(hf_folder / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, hf_folder / file)
    (hf_folder / "model.safetensors").unlink()
    index = hf_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: file for file in shards for name in shards[file]}}))
    assert_round_trip(whole, replace(read(hf_folder), source=whole.source), "hf", "simmim")
    (hf_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json names model-00002-of-00002\.safetensors, which is not beside it"):
        read(hf_folder)
    save_file({names[1]: state[names[1]]}, hf_folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"index\.json promises .*, which no shard holds"):
        read(hf_folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index\.json lists no weights"):
        read(hf_folder)


def test_a_folder_with_pytorch_model_bin(hf_folder):
    whole = read(hf_folder)
    torch.save(load_file(hf_folder / "model.safetensors"), hf_folder / "pytorch_model.bin")
    (hf_folder / "model.safetensors").unlink()
    assert_round_trip(whole, read(hf_folder), "hf", "simmim")
