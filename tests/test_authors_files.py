"""The authors' files: their numbers, how the window is found, and what an export for their code holds."""

import sys

import pytest
import torch
from conversion import RELEASED, golden, released, same_tensors

from simmim import load_encoder
from simmim.checkpoints import Preprocessing, read, read_encoder
from simmim.checkpoints.export import export
from simmim.checkpoints.formats.swinv2.official import BUFFERS, buffers_of
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.methods.simmim import SimMIM


@pytest.fixture
def no_yacs(monkeypatch):
    """`import yacs` fails, even if it is installed."""
    monkeypatch.setitem(sys.modules, "yacs", None)
    monkeypatch.setitem(sys.modules, "yacs.config", None)


def assert_golden(path, **overrides):
    """Features and loss of the SimMIM model are the authors'."""
    _, numbers = golden("simmim_swinv2_micro.safetensors")
    checkpoint = read(path, **overrides)
    model = SimMIM(load_encoder(path, **overrides)).eval()
    images, mask = numbers["input.image"], numbers["input.mask"].bool()
    with torch.no_grad():
        if checkpoint.pretraining:
            model.load_state_dict(checkpoint.pretraining, strict=False)
            assert abs(model(images, mask).loss - numbers["output.loss_l1"]) < 1e-5
        else:
            model.mask_token.copy_(numbers["model.encoder.mask_token"].flatten())
        features = model.encoder.encode(model.substitute(model.encoder.embed(images), mask)).features
    difference = (features - numbers["output.features"]).abs().max().item()
    print(f"features apart {difference:.1e}")
    assert difference < 5e-5
    return checkpoint


def test_the_authors_file_gives_their_numbers(no_yacs):
    checkpoint = assert_golden(RELEASED)
    assert checkpoint.format == "official" and checkpoint.pretraining
    assert checkpoint.config == SwinV2Config(
        8, (2, 2, 2, 2), (1, 2, 4, 8), window_size=8, pretrained_window_sizes=(8, 8, 8, 4)
    )
    assert checkpoint.preprocessing == Preprocessing((128, 128), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert checkpoint.provenance == {
        "origin": "the authors' code",
        "method": "SimMIM",
        "epochs": 800,
        "mask_unit": 32,
        "mask_ratio": 0.6,
    }


LAYOUTS = {
    "rpe_mlp": lambda name: name.replace("cpb_mlp", "rpe_mlp"),
    "module.": lambda name: f"module.{name}",
    "module. and compiled": lambda name: f"module._orig_mod.{name.replace('cpb_mlp', 'rpe_mlp')}",
    "a classifier's": lambda name: name.removeprefix("encoder."),
}


def written(path, model, **beside):
    torch.save({"model": model, **beside}, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_authors_other_layouts(layout, tmp_path, no_yacs):
    content = released()
    model = {LAYOUTS[layout](name): value for name, value in content["model"].items()}
    assert_golden(written(tmp_path / "model.pth", model, config=content["config"]))


def test_sizes_from_the_configuration_or_from_the_buffers_alone(tmp_path, no_yacs):
    """In a classifier's layout: without buffers but with the configuration, and the other way round."""
    content, whole = released(), read(RELEASED)
    model = {name.removeprefix("encoder."): value for name, value in content["model"].items()}
    weights = {name: value for name, value in model.items() if not BUFFERS.search(name)}
    assert len(weights) < len(model)
    for kept, beside in ((weights, {"config": content["config"]}), (model, {})):
        checkpoint = assert_golden(written(tmp_path / "model.pth", kept, **beside))
        assert checkpoint.config == whole.config and checkpoint.preprocessing.image_size == (128, 128)


def reference_buffers(window, pretrained, windows_of_map, block):
    """What the authors' modules store of one block, by the paper's equation 4 and with one row of the mask per window."""
    offsets = torch.arange(1 - window, window, dtype=torch.float32) * 8 / max(pretrained - 1, 1)
    axis = offsets.sign() * torch.log2(1 + offsets.abs()) / 3
    table = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    buffers = {f"{block}.attn.relative_coords_table": table[None]}
    if windows_of_map > 1 and block.endswith(".1"):
        buffers[f"{block}.attn_mask"] = torch.zeros(windows_of_map, window**2, window**2)
    return buffers


@pytest.fixture(scope="module")
def transferred():
    """The golden classifier moved from window 8 to 12: numbers, weights, and the authors' buffers."""
    _, numbers = golden("classifier_swinv2_micro_window_transfer.safetensors")
    model = {name.removeprefix("model."): value for name, value in numbers.items() if name.startswith("model.")}
    buffers = {}
    for stage, (window, pretrained, count) in enumerate(zip((12, 12, 12, 6), (8, 8, 8, 4), (16, 4, 1, 1))):
        for block in range(2):
            buffers |= reference_buffers(window, pretrained, count, f"layers.{stage}.blocks.{block}")
    return numbers, model, buffers


def logits_of(path, images, **overrides):
    saved = read_encoder(path, **overrides)
    with torch.no_grad():
        pooled = saved.encoder(images).pooled
    head = saved.checkpoint.head
    return saved, torch.nn.functional.linear(pooled, head["weight"], head["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_moved_window_is_read_from_the_buffers(transferred, dtype, tmp_path):
    """Moved from 8 to 12 and 128 to 192 px, which only the buffers store; also in half precision."""
    numbers, model, buffers = transferred
    stored = model | {name: value.to(dtype) for name, value in buffers.items()}
    saved, logits = logits_of(written(tmp_path / "model.pth", stored), numbers["input.image"])
    assert saved.encoder.config.window_size == 12 and saved.encoder.config.pretrained_window_sizes == (8, 8, 8, 4)
    assert saved.preprocessing.image_size == (192, 192)
    torch.testing.assert_close(logits, numbers["output.logits"], atol=5e-5, rtol=0)


def test_a_window_that_is_not_stored(transferred, tmp_path):
    """The error names the setting; with it the file loads; a file name as published has it."""
    numbers, model, _ = transferred
    path = written(tmp_path / "weights.pth", model)
    with pytest.raises(ValueError, match=r"weights\.pth does not store its window.*give .*window_size") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)
    saved = read_encoder(path, window_size=8)
    assert saved.encoder.config.window_size == 8 and saved.preprocessing.image_size == (256, 256)
    assert any("window 8 as given by window_size" in note for note in saved.report.adapted)
    for name in (
        "swinv2_base_patch4_window8to12_128to192_22kto1k_ft.pth",
        "swinv2_window8to12_128to192/2024.pth",
        "2024/swinv2_window8to12_128to192.pth",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        saved, logits = logits_of(written(tmp_path / name, model), numbers["input.image"])
        assert saved.preprocessing.image_size == (192, 192)
        assert saved.encoder.config.pretrained_window_sizes == (8, 8, 8, 4)
        torch.testing.assert_close(logits, numbers["output.logits"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "name, window, pretrained, size",
    [
        ("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth", 16, (12, 12, 12, 6), 256),
        ("swinv2_large_patch4_window12to24_192to384_22kto1k_ft.pth", 24, (12, 12, 12, 6), 384),
        ("swinv2_base_patch4_window12_192_22k.pth", 12, (12, 12, 12, 6), 192),
        ("swinv2_tiny_patch4_window16_256.pth", 16, (16, 16, 16, 8), 256),
    ],
)
def test_published_file_names(name, window, pretrained, size, transferred, tmp_path):
    checkpoint = read(written(tmp_path / name, transferred[1]))
    assert (checkpoint.config.window_size, checkpoint.config.pretrained_window_sizes) == (window, pretrained)
    assert checkpoint.preprocessing.image_size == (size, size)
    assert checkpoint.notes == (f"window {window} and {size} px by the file's name",)


def test_an_export_for_the_authors_code_has_their_names_and_buffers(tmp_path):
    """Read, exported and read by torch.load: the same keys, values and types as in the released file, buffers included."""
    folder = export(read(RELEASED), "official", tmp_path / "out").folder
    theirs, ours = released(), torch.load(folder / "model.pth", weights_only=True)
    assert ours["model"].keys() == theirs["model"].keys()
    assert same_tensors(ours["model"], dict(theirs["model"]))
    buffers = [name for name in ours["model"] if BUFFERS.search(name)]
    assert {name.rsplit(".", 1)[-1] for name in buffers} == {"relative_coords_table", "relative_position_index", "attn_mask"}
    stated, expected = ours["config"]["MODEL"]["SWINV2"], theirs["config"]["MODEL"]["SWINV2"]
    assert {name: expected[name] for name in stated if name != "PRETRAINED_WINDOW_SIZES"} == {
        name: value for name, value in stated.items() if name != "PRETRAINED_WINDOW_SIZES"
    }
    assert ours["config"]["DATA"] == dict(theirs["config"]["DATA"])


def test_buffers_of_a_moved_window_are_the_papers(transferred):
    _, _, buffers = transferred
    config = SwinV2Config(8, (2, 2, 2, 2), (1, 2, 4, 8), window_size=12, pretrained_window_sizes=(8, 8, 8, 4))
    ours = buffers_of(config, (192, 192))
    assert {name for name in ours if "index" not in name} == buffers.keys()
    for name, value in buffers.items():
        assert ours[name].shape == value.shape
        if "table" in name:
            torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
    assert log_spaced_coords((12, 12), (8, 8), torch.device("cpu")).max() > 1
