"""ONNX files compute PyTorch's numbers in ONNX Runtime, at every size and batch, and store nothing twice."""

import copy
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_checkpoint import random_encoder, random_images
from torch import nn

from simmim.checkpoints.formats.onnx import OnnxCheck, OnnxFormat, export_onnx
from simmim.checkpoints.formats.swinv2.onnx import ROWS as SWINV2
from simmim.checkpoints.formats.swinv2.onnx import SwinV2Onnx
from simmim.encoders.shifted_windows.geometry import MASKED_LOGIT
from simmim.encoders.swinv2 import SwinV2, SwinV2Config

ROOT = Path(__file__).resolve().parent.parent
TINY = SwinV2Config(16, (2, 2), (2, 4), window_size=4)
CONFIGS = {
    "plain": TINY,
    "one channel": replace(TINY, in_channels=1),
    "shift before padding": replace(TINY, shift_before_padding=True),
    "pretrained windows": replace(TINY, pretrained_window_sizes=(7, (3, 5))),
    "window of one": replace(TINY, window_size=1),
    "odd window and patch, extra norms": SwinV2Config(
        12, (1, 2, 2), (1, 2, 4), window_size=5, patch_size=3, mlp_ratio=2.0, extra_norm_every=1, drop_path_rate=0.5
    ),
}
# Windows divide; sides high and wide; odd maps; sides that the patch does not divide; maps smaller than the window in
# one axis, in both; one pixel.
SIZES = [(64, 64), (32, 96), (20, 36), (37, 51), (9, 100), (70, 13), (16, 16), (8, 8), (1, 1), (2, 65)]


def random_linear(inputs, outputs):
    linear = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return linear


def session_of(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def assert_close(actual, expected, label):
    """Within 1e-4, for outputs of the order of one."""
    expected = expected.numpy()
    assert actual.shape == expected.shape, label
    assert 0.02 < np.abs(expected).mean() < 10, label
    assert np.abs(actual - expected).max() < 1e-4, label


@pytest.fixture
def exported(tmp_path):
    """A function that exports to a new file, and gives its path and ONNX Runtime session."""

    def export(encoder, image_size=(32, 48), *args, **kwargs):
        file = tmp_path / "exported" / "encoder.onnx"
        difference = export_onnx(encoder, file, image_size, *args, **kwargs)
        assert isinstance(difference, float) and 0 < difference < 1e-4
        return file, session_of(file)

    return export


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 48), (37, 51), (9, 40)])
@torch.no_grad()
def test_a_fixed_size_at_any_batch(exported, name, size):
    encoder = random_encoder(CONFIGS[name])
    _, session = exported(encoder, size)
    images = random_images(8, encoder.config.in_channels, *size)
    expected = encoder(images).pooled
    for batch in range(1, 9):
        (pooled,) = session.run(["pooled"], {"images": images[:batch].numpy()})
        assert_close(pooled, expected[:batch], batch)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_any_size_and_batch_in_one_file(exported, name):
    encoder = random_encoder(CONFIGS[name])
    _, session = exported(encoder, dynamic_size=True)
    for number, size in enumerate([*SIZES, *SWINV2.check_sizes(encoder)]):
        images = random_images(1 + number % 8, encoder.config.in_channels, *size)
        (pooled,) = session.run(["pooled"], {"images": images.numpy()})
        assert_close(pooled, encoder(images).pooled, size)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_each_stage_is_an_output(exported, dynamic):
    encoder = random_encoder(CONFIGS["odd window and patch, extra norms"])
    _, session = exported(encoder, (50, 44), "stages", dynamic_size=dynamic)
    assert [output.name for output in session.get_outputs()] == ["stage_0", "stage_1", "stage_2"]
    for size in [(50, 44), (31, 64), (4, 7)] if dynamic else [(50, 44)]:
        images = random_images(2, 3, *size)
        for actual, expected in zip(session.run(None, {"images": images.numpy()}), encoder(images, True).stages):
            assert_close(actual, expected, size)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_logits_of_a_head(exported, dynamic):
    encoder = random_encoder(TINY)
    head = random_linear(32, 5)
    _, session = exported(encoder, (32, 48), "logits", head, dynamic)
    images = random_images(3, 3, 32, 48)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert_close(logits, head(encoder(images).pooled), "logits")


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_low_temperatures_are_clamped(exported, dynamic):
    """Logit scales that training raised above log 100, a temperature below 0.01."""
    encoder = random_encoder(TINY)
    for stage in encoder.layers:
        for block in stage.blocks:
            block.attn.logit_scale.fill_(8.0)
    _, session = exported(encoder, dynamic_size=dynamic)
    images = random_images(2, 3, 32, 48)
    (pooled,) = session.run(["pooled"], {"images": images.numpy()})
    assert_close(pooled, encoder(images).pooled, "clamped")


@torch.no_grad()
def test_half_precision_encoders_are_exported_in_float32(exported):
    encoder = random_encoder(TINY).bfloat16()
    _, session = exported(encoder)
    images = random_images(2, 3, 32, 48)
    (pooled,) = session.run(None, {"images": images.numpy()})
    assert_close(pooled, copy.deepcopy(encoder).float()(images).pooled, "float32")
    assert encoder.norm.weight.dtype == torch.bfloat16


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_file_of_the_encoders_own_weights(exported, dynamic):
    """Under their names, bit by bit, nothing beside them but small constants, and nothing beside the file."""
    encoder = random_encoder(TINY)
    head = random_linear(32, 5)
    file, session = exported(encoder, (32, 48), "logits", head, dynamic)
    assert [path.name for path in file.parent.iterdir()] == ["encoder.onnx"]
    model = onnx.load(file, load_external_data=False)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = encoder.state_dict() | {f"head.{key}": value for key, value in head.state_dict().items()}
    for name, value in weights.items():
        np.testing.assert_array_equal(stored.pop(name), value.numpy())
    assert sum(value.nbytes for value in stored.values()) < 2000
    assert not any(node.op_type == "Constant" for node in model.graph.node)
    assert model.opset_import[0].version == 17 and model.ir_version == 8
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(float)")
    assert images.shape == ["batch", 3, *(("height", "width") if dynamic else (32, 48))]


@pytest.mark.parametrize(
    "preset, window, side, dynamic",
    [
        ("small", 6, 96, False),
        ("tiny", 8, 128, True),
        ("micro", 16, 256, False),
        ("micro", 8, 128, True),
        ("nano", 4, 64, True),
    ],
)
def test_files_are_little_larger_than_the_weights(tmp_path, preset, window, side, dynamic):
    check = OnnxCheck(batches=(1,))  # batches are tested above, and slow here
    encoder = random_encoder(SwinV2Config.from_preset(preset, window_size=window))
    assert export_onnx(encoder, tmp_path / "encoder.onnx", (side, side), dynamic_size=dynamic, check=check) < 1e-4
    weights = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    assert weights < (tmp_path / "encoder.onnx").stat().st_size < 1.05 * weights


def test_metadata_travels_with_the_file(exported):
    metadata = {"mean": "[0.5, 0.5, 0.5]", "classes": '["Löwe", "cat"]', "empty": ""}
    file, session = exported(random_encoder(TINY), metadata=metadata)
    assert session.get_modelmeta().custom_metadata_map == metadata
    assert {entry.key: entry.value for entry in onnx.load(file).metadata_props} == metadata


def test_export_is_quiet_and_leaves_all_as_it_was(exported, capfd):
    """Modes, weights and random state are unchanged; nothing is printed and there is no warning."""
    encoder = random_encoder(TINY).train()
    encoder.layers[0].eval()  # as partly frozen encoders are
    modes = [module.training for module in encoder.modules()]
    weights, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported(encoder, dynamic_size=True)
    assert capfd.readouterr() == ("", "")
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


# --- the check -------------------------------------------------------------------------------------------------------


class WithoutMask(SwinV2Onnx):
    """A wrong graph: tokens attend across the borders that shifting brings into a window."""

    def compose(self, *arguments):
        model = super().compose(*arguments)
        for tensor in model.graph.initializer:
            if tensor.name == f"float_{MASKED_LOGIT}":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0.0, np.float32), tensor.name))
        return model


ROWS = WithoutMask()


@pytest.fixture
def without_mask(monkeypatch):
    """SwinV2's row of the format table is the wrong graph."""
    monkeypatch.setitem(OnnxFormat.families, "swinv2", __name__)


@pytest.mark.parametrize("outputs", ["pooled", "stages"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_file_with_other_numbers_is_refused(tmp_path, without_mask, outputs, dynamic):
    with pytest.raises(ValueError, match=r"is off by .* in ONNX Runtime, more than .*: no file was written"):
        export_onnx(random_encoder(TINY), tmp_path / "encoder.onnx", (32, 48), outputs, dynamic_size=dynamic)
    assert list(tmp_path.iterdir()) == []


def test_other_sizes_are_checked(tmp_path, without_mask):
    """At 16 × 16 pixels one window covers the map and nothing is shifted: only other sizes show the error."""
    export_onnx(random_encoder(TINY), tmp_path / "fixed.onnx", (16, 16))
    with pytest.raises(ValueError, match="of 20 × 16 pixels is off by"):
        export_onnx(random_encoder(TINY), tmp_path / "any.onnx", (16, 16), dynamic_size=True)
    assert [path.name for path in tmp_path.iterdir()] == ["fixed.onnx"]


def test_the_difference_found_is_returned(tmp_path, without_mask):
    """The largest over all batches, with a tolerance that accepts it."""
    encoder = random_encoder(TINY)
    difference = export_onnx(encoder, tmp_path / "encoder.onnx", (32, 48), check=OnnxCheck(tolerance=10.0))
    images = torch.randn(8, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    (pooled,) = session_of(tmp_path / "encoder.onnx").run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = np.abs(pooled - encoder(images).pooled.numpy()).max()
    assert difference == pytest.approx(expected, rel=1e-3) and difference > 1e-3


def test_large_outputs_are_compared_in_proportion(tmp_path):
    """A head whose logits reach thousands is off by more than 1e-4 where nothing is wrong."""
    head = random_linear(32, 5)
    with torch.no_grad():
        head.weight *= 1e4
    assert 1e-4 < export_onnx(random_encoder(TINY), tmp_path / "encoder.onnx", (32, 48), "logits", head) < 0.1


def test_numbers_that_are_none_are_refused(tmp_path):
    encoder = random_encoder(TINY)
    with torch.no_grad():
        encoder.norm.bias[3] = torch.nan
    with pytest.raises(ValueError, match="pooled of 1 image of 32 × 48 pixels is off by nan"):
        export_onnx(encoder, tmp_path / "encoder.onnx", (32, 48))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_an_earlier_file(exported, monkeypatch):
    encoder = random_encoder(TINY)
    file, _ = exported(encoder)
    before = file.read_bytes()
    monkeypatch.setitem(OnnxFormat.families, "swinv2", __name__)
    with pytest.raises(ValueError, match="is off by"):
        export_onnx(encoder, file, (32, 48))
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"outputs": "pool"}, "unknown outputs 'pool'; did you mean 'pooled'. known: logits, pooled, stages"),
        ({"outputs": "logits"}, "outputs 'logits' without a head"),
        ({"head": nn.Linear(32, 5)}, "outputs 'pooled' with a head"),
        ({"outputs": "logits", "head": nn.Linear(16, 5)}, "the head takes 16 features: this encoder gives 32"),
        ({"image_size": (32, 0)}, "image_size is .32, 0.: give height and width"),
        ({"image_size": (32,)}, "image_size is .32,.: give height and width"),
    ],
)
def test_settings_out_of_range(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(**{"encoder": SwinV2(TINY), "file": tmp_path / "a.onnx", "image_size": (32, 48)} | changes)
    assert list(tmp_path.iterdir()) == []


def test_more_than_one_file_holds(tmp_path):
    with torch.device("meta"):
        encoder = SwinV2(SwinV2Config.from_preset("huge"))
    with pytest.raises(ValueError, match=r"the weights take 2\.4 GiB: an ONNX file holds at most 2 GiB"):
        export_onnx(encoder, tmp_path / "huge.onnx", (192, 192))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package}.*: pip install 'simmim-toolkit\[onnx\]'"):
        export_onnx(SwinV2(TINY), tmp_path / "encoder.onnx", (32, 48))
