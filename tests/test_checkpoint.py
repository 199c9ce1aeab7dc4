"""Encoders on disk: they are read back bit by bit, and damaged files are refused with a reason."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simmim.checkpoints import load_encoder, read_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import WEIGHTS, save_encoder
from simmim.checkpoints.source import CONFIG
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2, SwinV2Config

ROOT = Path(__file__).resolve().parent.parent
TINY = SwinV2Config(16, (1, 2), (2, 2), window_size=4)
COLOR = Preprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def random_encoder(config, seed=0):
    """With the kernels, as encoders are loaded. Every parameter is random, those of norms too: fresh blocks are the identity
    and would agree with anything."""
    generator = torch.Generator().manual_seed(seed)
    encoder = build(config)
    for parameter in encoder.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return encoder.eval()


def random_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def features_of(encoder, images):
    return encoder(images).features


@pytest.fixture
def saved(tmp_path):
    """An encoder folder to read, or to damage."""
    return save_encoder(tmp_path / "saved", random_encoder(TINY), COLOR, {"method": "SimMIM"})


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, size",
    [
        (TINY, (32, 32)),
        (SwinV2Config.from_preset("nano", in_channels=1), (32, 48)),
        (SwinV2Config.from_preset("micro", depths=(1, 1, 2, 1), window_size=6), (96, 96)),
        (SwinV2Config(32, (2,), (4,), window_size=4, patch_size=8), (64, 40)),
        (SwinV2Config(16, (2, 2), (2, 4), window_size=16), (24, 24)),
        (SwinV2Config(16, (1, 1, 2), (1, 2, 2), window_size=3, extra_norm_every=1, mlp_ratio=2.0), (44, 44)),
        (replace(TINY, pretrained_window_sizes=(7, 5)), (32, 32)),
        (SwinV2Config(16, (2, 2), (2, 2), window_size=6, patch_size=2, drop_path_rate=0.3), (20, 20)),
    ],
)
def test_features_come_back_bit_by_bit(tmp_path, config, size):
    """At the size of pre-training; also where the windows are larger than the map, and where sides are odd."""
    encoder = random_encoder(config)
    preprocessing = Preprocessing(size, (0.5,) * config.in_channels, (0.2,) * config.in_channels)
    images = random_images(2, config.in_channels, *size)
    expected = encoder(images)
    folder = save_encoder(tmp_path / "encoder", encoder, preprocessing, {"seed": 3})
    read = read_encoder(folder)
    windows = config.windows(size)
    assert all(rows == columns for rows, columns in windows)
    recorded = config.pretrained_window_sizes or tuple(rows for rows, _ in windows)
    assert read.encoder.config == replace(config, pretrained_window_sizes=recorded)
    assert read.preprocessing == preprocessing and read.provenance == {"seed": 3} and not read.encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(read.encoder.state_dict()[name], value), name
    actual = read.encoder(images)
    assert torch.equal(actual.features, expected.features) and torch.equal(actual.pooled, expected.pooled)


def test_recorded_windows_are_those_in_effect(tmp_path):
    """With 8, 4 and 2 tokens per side a window of 6 is 6, 4 and 2, and these are written."""
    config = SwinV2Config(16, (1, 1, 1), (2, 2, 2), window_size=6)
    folder = save_encoder(tmp_path, SwinV2(config), COLOR, {})
    assert json.loads((folder / CONFIG).read_text())["architecture"]["pretrained_window_sizes"] == [6, 4, 2]
    wide = save_encoder(tmp_path / "wide", SwinV2(config), replace(COLOR, image_size=(64, 96)), {})
    assert load_encoder(wide).config.pretrained_window_sizes == (6, 6, (4, 6))


def test_saving_again_keeps_the_windows_of_pretraining(saved, tmp_path):
    """Fine-tuned at other sizes, an encoder still scales its position bias by the windows it was pre-trained with."""
    again = load_encoder(saved, window_size=7)
    second = save_encoder(tmp_path / "again", again, replace(COLOR, image_size=(64, 64)), {})
    assert load_encoder(second).config == replace(TINY, window_size=7, pretrained_window_sizes=(4, 4))


def test_paths_that_mean_an_encoder(saved, tmp_path, monkeypatch):
    """Its folder, either of its files, a run that has it in encoder/, as text, from the home folder."""
    run = tmp_path / "run"
    run.mkdir()
    saved.rename(run / "encoder")
    (run / "config.yaml").write_text("out: run\n")
    images = random_images(1, 3, 32, 32)
    expected = features_of(random_encoder(TINY), images)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (run, run / "encoder", run / "encoder" / WEIGHTS, run / "encoder" / CONFIG, str(run), "~/run"):
        assert torch.equal(features_of(load_encoder(path), images), expected)


def test_another_window_keeps_the_recorded_ones(saved):
    """The bias at a larger window is interpolated from the pre-training window's range, not stretched over the new one:
    shared offsets, scaled alike, have the same bias."""
    small, large = load_encoder(saved), load_encoder(saved, window_size=8)
    assert large.config == replace(small.config, window_size=8)
    assert large.config.pretrained_window_sizes == (4, 4)
    attention = [encoder.layers[0].blocks[0].attn for encoder in (small, large)]
    with torch.no_grad():
        near = attention[0].position_bias((4, 4), (4, 4))[:, 0]
        far = attention[1].position_bias((8, 8), (4, 4))[:, 0].view(-1, 8, 8)[:, :4, :4].flatten(1)
    assert torch.allclose(near, far, atol=1e-6)
    for size in ((32, 32), (64, 64), (52, 76)):
        assert features_of(large, random_images(1, 3, *size)).isfinite().all()
    assert load_encoder(saved, drop_path_rate=0.25).config.drop_path_rate == 0.25


def test_report_names_what_was_loaded(saved):
    lines = []
    encoder = read_encoder(saved, report=lines.append).encoder
    tensors, values = len(encoder.state_dict()), sum(value.numel() for value in encoder.state_dict().values())
    assert lines[0].splitlines() == [
        f"loaded     {tensors} of {tensors} tensors, {values / 1e6:.2f} M values, from {saved / WEIGHTS} (this toolkit)",
        "missing    mask token and decoder: fresh where pre-training goes on",
    ]


def test_what_a_checkpoint_contains(saved):
    """The learned weights and nothing else, and a config.json with everything that their use requires."""
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    encoder = SwinV2(TINY)
    assert load_file(saved / WEIGHTS).keys() == {name for name, _ in encoder.named_parameters()}
    assert json.loads((saved / CONFIG).read_text()) == {
        "format": "simmim-encoder",
        "architecture": {"family": "swinv2", **TINY.as_dict(), "pretrained_window_sizes": [4, 4]},
        "preprocessing": {
            "image_size": [32, 32],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "crop": 1.0,
            "fit": "crop",
        },
        "provenance": {"method": "SimMIM"},
    }


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(path, message):
    """`load_encoder` says `message`, in one line, naming the path's last part."""
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value) and Path(path).name in str(caught.value)


def test_paths_without_an_encoder(saved, tmp_path):
    refused(tmp_path / "nowhere", "no encoder at '.*nowhere': there is no such file or folder")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no encoder in '.*folder': expected encoder.safetensors and config.json there or in")
    (tmp_path / "model.pth").write_bytes(b"PK")
    refused(tmp_path / "model.pth", "is not a whole PyTorch file")
    (saved / CONFIG).unlink()
    refused(saved, "expected encoder.safetensors and config.json")
    refused(saved / WEIGHTS, "expected encoder.safetensors and config.json")


@pytest.mark.parametrize("content", ["text", "few", "empty", "cut", "header"])
def test_torn_weights(saved, content):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(
        {
            "text": b"These are no weights, whatever the file is called. " * 50,
            "few": b"no",
            "empty": b"",
            "cut": whole[:-100],
            "header": whole[:100],
        }[content]
    )
    refused(saved / WEIGHTS, r"encoder.safetensors is not a whole safetensors file \(.*\): export the encoder again")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b'{"format": }'])
def test_broken_json(saved, content):
    (saved / CONFIG).write_bytes(content)
    refused(saved / CONFIG, "config.json is not valid JSON: ")


@pytest.mark.parametrize("content", ["[]", "{}", '"text"', "null", '{"format": "timm"}', '{"model_type": "swinv2"}'])
def test_another_format(saved, content):
    (saved / CONFIG).write_text(content)
    refused(saved / CONFIG, 'does not describe an encoder of this toolkit: expected "format": "simmim-encoder"')


def with_architecture(folder, **changes):
    """The folder's config.json describing another architecture than its weights have."""
    description = json.loads((folder / CONFIG).read_text())
    description["architecture"].update(changes)
    (folder / CONFIG).write_text(json.dumps(description))


def test_weights_of_another_architecture(saved):
    """Missing, unexpected and reshaped tensors are counted and the first ones named."""
    fits = "encoder.safetensors does not fit the architecture expected of it: "
    with_architecture(saved, depths=[1, 3])
    message = rf"{fits}17 missing \(layers\.1\.blocks\.2\.\S+, .*, …\)\. The .* \(1, 2\) for \(1, 3\)$"
    with pytest.raises(ValueError, match=message):
        load_encoder(saved)
    with_architecture(saved, depths=[1, 1])
    message = rf"{fits}17 unexpected \(layers\.1\.blocks\.1\.\S+, .*, …\)\. The .* \(1, 2\) for \(1, 1\)$"
    with pytest.raises(ValueError, match=message):
        load_encoder(saved)
    with_architecture(saved, depths=[1, 2], in_channels=1)
    message = rf"{fits}1 of another shape \(patch_embed\.proj\.weight \(16, 3, 4, 4\) for \(16, 1, 4, 4\)\)\. .* 3 for 1$"
    with pytest.raises(ValueError, match=message):
        load_encoder(saved)
    with_architecture(saved, depths=[2, 2], in_channels=3, num_heads=[4, 2])
    with pytest.raises(ValueError, match=rf"{fits}17 missing .*; 2 of another shape \(.*logit_scale .*cpb_mlp.2.wei"):
        load_encoder(saved)


def test_one_tensor_too_few_or_too_many(saved):
    state = load_file(saved / WEIGHTS)
    bias = state.pop("norm.bias")
    save_file(state, saved / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 missing \(norm\.bias\)$"):
        load_encoder(saved)
    save_file(state | {"norm.bias": bias, "mask_token": bias.clone()}, saved / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 unexpected \(mask_token\)$"):
        load_encoder(saved)


def test_weights_that_cannot_be_saved_leave_the_old(saved):
    """No file may have more than a kilobyte, as on a full disk."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(OSError, match=r"encoder\.safetensors cannot be written: .*File too large"):
            save_encoder(saved, random_encoder(TINY, seed=5), COLOR, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saving_over_a_classifier_leaves_none_of_its_head(tmp_path):
    head = {"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}
    folder = save_encoder(tmp_path / "saved", random_encoder(TINY), COLOR, {}, head, ("cat", "dog"))
    assert read_encoder(folder).checkpoint.classes == ("cat", "dog")
    save_encoder(folder, random_encoder(TINY, seed=5), COLOR, {})
    checkpoint = read_encoder(folder).checkpoint
    assert checkpoint.head == {} and checkpoint.classes == ()


def test_oblong_pretraining_loads_bit_identical(tmp_path):
    """Where a map is lower than the window, height and width are scaled differently, also after loading."""
    encoder = random_encoder(SwinV2Config(16, (1, 1, 1), (2, 2, 2), window_size=8))
    images = torch.randn(1, 3, 64, 128)
    folder = save_encoder(tmp_path, encoder, replace(COLOR, image_size=(64, 128)), {})
    with torch.no_grad():
        assert torch.equal(load_encoder(folder)(images).features, encoder(images).features)


@pytest.mark.parametrize("damage", [{"architecture": None}, {"preprocessing": None}, {"architecture": {"embed_dim": "x"}}])
def test_a_damaged_description_is_refused(tmp_path, damage):
    folder = save_encoder(tmp_path, SwinV2(SwinV2Config(16, (1,), (2,))), COLOR, {})
    description = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**description, **damage}))
    with pytest.raises(ValueError, match=r"damaged|whole number"):
        load_encoder(folder)


def test_a_misspelt_override_is_refused(tmp_path):
    folder = save_encoder(tmp_path, SwinV2(SwinV2Config(16, (1,), (2,))), COLOR, {})
    with pytest.raises(ValueError, match="did you mean 'window_size'"):
        load_encoder(folder, window=3)
