"""Images that grow in the course of a pre-training: the size of each step, what follows it, resuming, what is refused."""

import contextlib
import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from simmim import load_encoder
from simmim.cli import main
from simmim.data import GrowingStream, RandomView, build_loader
from simmim.encoders import registry
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.swinv2.kernels.windows import window_indices
from simmim.methods.registry import METHODS, method_named
from simmim.pretrain import DataSettings, PretrainSettings, load_pretrained, preparation, pretrain
from simmim.pretrain.calibration import estimate_line
from simmim.pretrain.image_sizes import at_sizes, by_size, describe_sizes, first_steps
from simmim.pretrain.model import build_method
from simmim.pretrain.module import PretrainingModule
from simmim.pretrain.samples import training_samples
from simmim.pretrain.settings import OptimSettings
from simmim.training.saving import saved_steps

SIZES = (16, 32, 48)
TINY = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}
WORDS = (
    "--image_sizes=[16,32,48]",
    "--preset=nano",
    "--batch-size=24",
    "--epochs=1.2",
    "--seed=3",
    "--workers=0",
    "--precision=32-true",
    "--save_every_steps=2",
    "--log_every_steps=1",
    "--data.validation=12",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,2]",
    "--model.encoder.num_heads=[1,2]",
    "--model.encoder.drop_path_rate=0.2",
    "--model.encoder.window_size=6",
)
WINDOWS = "--model_by_size=[{encoder: {window_size: 2}}, {encoder: {window_size: 4}}, {}]"


def settings_of(digits, out, **more):
    common = {"preset": "nano", "image_sizes": SIZES, "batch_size": 24, "workers": 0, "precision": "32-true", "epochs": 1.2}
    data = DataSettings(str(digits.unlabeled))
    return PretrainSettings(**{"data": data, "out": str(out), "model": {"encoder": TINY}, **common, **more})


def resolved_of(digits, out, **more):
    return preparation.resolve_run(settings_of(digits, out, **more))


def watch(monkeypatch):
    """Sizes and windows of the training steps, as they come."""
    seen, whole = [], PretrainingModule.training_step

    def training_step(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        windows = {block.window_size for block in self.model.encoder.blocks()}
        views = [tuple(view.shape[-2:]) for view in batch.get("views", ())]
        seen.append((batch["image"].shape[-1], windows, batch["seed"], views))
        return loss

    monkeypatch.setattr(PretrainingModule, "training_step", training_step)
    return seen


# --- settings -----------------------------------------------------------------------------------------------------------


def test_windows_and_units_follow_the_size(digits, tmp_path):
    """They are those of a run at that size, and all else is the same; the scale of the position bias is the first size's."""
    sizes = (64, 80, 128)
    settings = resolved_of(digits, tmp_path, image_sizes=sizes).settings
    assert settings.size == (128, 128) and settings.image_size == 128
    parts = at_sizes(settings)
    for part, size in zip(parts, sizes, strict=True):
        alone = resolved_of(digits, tmp_path, image_sizes=None, image_size=size).settings
        assert part.model.mask_unit == alone.model.mask_unit and part.size == (size, size)
        config = part.encoder_config()
        assert config.window_size == alone.encoder_config().window_size
        assert config.pretrained_window_sizes == (4, 4)
    assert [part.encoder_config().window_size for part in parts] == [4, 5, 8]
    assert [part.model.mask_unit for part in parts] == [8, 8, 16]
    assert resolved_of(digits, tmp_path, **vars_of(settings)).settings == settings, "of resolved settings, as on --resume"


def vars_of(settings):
    names = ("preset", "image_size", "image_sizes", "model_by_size", "model", "optim", "epochs")
    return {name: getattr(settings, name) for name in names}


def test_what_is_given_holds_at_every_size(digits, tmp_path):
    given = {"mask_unit": 8, "encoder": {**TINY, "window_size": 3}}
    settings = resolved_of(digits, tmp_path, model=given).settings
    for part in at_sizes(settings):
        assert part.model.mask_unit == 8 and part.encoder_config().window_size == 3
    own = ({"mask_unit": 4}, {"encoder": {"window_size": 2}}, {})
    settings = resolved_of(digits, tmp_path, model=given, model_by_size=own).settings
    assert [part.model.mask_unit for part in at_sizes(settings)] == [4, 8, 8]
    assert [part.encoder_config().window_size for part in at_sizes(settings)] == [3, 2, 3]


@pytest.mark.parametrize("preset, more", [("swin-nano", {}), ("vit-nano", {"embed_dim": 32, "depth": 1, "num_heads": 1})])
def test_tables_stay_those_of_the_last_size(digits, tmp_path, preset, more):
    """And are moved to smaller images with gradients."""
    encoder = more or TINY
    settings = resolved_of(digits, tmp_path, preset=preset, model={"encoder": encoder}).settings
    configs = {part.encoder_config() for part in at_sizes(settings)}
    assert len(configs) == 1 and settings.encoder_config() in configs
    module = module_of(settings)
    for size in SIZES:
        module.loss_of(batch_of(size, settings)).backward()
    tables = [value for name, value in module.model.encoder.named_parameters() if "table" in name]
    assert tables and all(table.grad.abs().sum() > 0 for table in tables)


def test_steps_of_each_size(digits, tmp_path):
    settings = resolved_of(digits, tmp_path).settings
    assert first_steps(settings, 9) == [0, 3, 6] and first_steps(settings, 10) == [0, 3, 7]
    uneven = replace(settings, image_size_shares=(0.5, 0.3, 0.2))
    assert first_steps(uneven, 10) == [0, 5, 8]
    assert first_steps(replace(settings, **dict.fromkeys(("image_sizes", "model_by_size"))), 10) == [0]
    with pytest.raises(ValueError, match="a run of 4 steps has none at 16 px: give more epochs"):
        first_steps(replace(settings, image_size_shares=(0.1, 0.4, 0.5)), 4)
    text = describe_sizes(settings, 9)
    assert text.startswith("16 px for 3 steps (mask unit 4 px, window 4") and text.count("then") == 2


# --- steps --------------------------------------------------------------------------------------------------------------


def module_of(settings):
    torch.manual_seed(0)
    method = build_method(settings)
    for parameter in method.parameters():
        parameter.data.normal_(0, 0.1)
    data = settings.data
    return PretrainingModule(method, data.mean, data.std, lambda step: 0.0, 0.0, 5.0, by_size(settings))


def batch_of(size, settings, count=6):
    generator = torch.Generator().manual_seed(size)
    shapes = [(size, size), *settings.model.further_views((size, size), settings.encoder_config())]
    image, *views = (torch.randint(256, (count, 1, *shape), generator=generator).byte() for shape in shapes)
    return {"image": image, "seed": list(range(count)), **({"views": views} if views else {})}


def by_size_of(method):
    unit = {} if method == "canvas" else {"mask_unit": 4}
    return ({**unit, "encoder": {"window_size": 2}}, {"encoder": {"window_size": 4}}, {})


@pytest.mark.parametrize("name", ["simmim", "canvas", "contrast"])
def test_the_loss_is_that_of_a_run_at_that_size(digits, tmp_path, name):
    """Bit for bit with the same weights, whatever sizes came before; and of every method that there is."""
    assert set(METHODS) == {"simmim", "canvas", "contrast"}
    model = {"encoder": {**TINY, "window_size": 6}}
    settings = resolved_of(digits, tmp_path, method=name, model=model, model_by_size=by_size_of(name)).settings
    assert [part.encoder_config().window_size for part in at_sizes(settings)] == [2, 4, 6]
    module = module_of(settings)
    module.eval()
    state = module.model.state_dict()
    for size in (16, 48, 32, 16, 48):
        (part,) = [part for part in at_sizes(settings) if part.size == (size, size)]
        encoder = registry.build(part.encoder_config())
        alone = method_named(name).build(encoder, part.model)
        alone.load_state_dict(state)
        plain = PretrainingModule(alone.eval(), module.mean, module.std, lambda step: 0.0, 0.0, 5.0)
        batch = batch_of(size, part)
        assert torch.equal(module.loss_of(batch), plain.loss_of(batch)), size
        module.loss_of(batch_of(size, part)).backward()
    images = torch.randn(2, 1, 32, 32)
    config = settings.encoder_config()
    assert module.model.encoder.config == config, "after the last size"
    again = registry.build(config).eval()
    again.load_state_dict(module.model.encoder.state_dict())
    assert torch.equal(module.model.encoder(images).pooled, again(images).pooled)


def test_a_first_size_is_as_a_fresh_run_of_that_size(digits, tmp_path):
    """The recorded scale of the position bias is the one that a fresh encoder has anyway."""
    settings = resolved_of(digits, tmp_path).settings
    first = at_sizes(settings)[0].encoder_config()
    encoders = [registry.build(config).eval() for config in (first, first.without_training_size())]
    for parameter in encoders[0].parameters():
        parameter.data.normal_(0, 0.1)
    encoders[1].load_state_dict(encoders[0].state_dict())
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(*(encoder(images).pooled for encoder in encoders))


def test_geometry_is_computed_once_for_a_size(digits, tmp_path):
    settings = resolved_of(digits, tmp_path).settings
    module = module_of(settings)
    for size in SIZES:
        module.loss_of(batch_of(size, settings))
    before = window_indices.cache_info().misses
    for size in SIZES * 2:
        module.loss_of(batch_of(size, settings))
    assert window_indices.cache_info().misses == before


def test_an_encoder_changes_what_can_change_alone():
    config = SwinV2Config(16, (1, 1), (1, 2), window_size=4)
    encoder = registry.build(config)
    encoder.change_config(replace(config, window_size=8))
    assert encoder.config.window_size == 8 and {block.window_size for block in encoder.blocks()} == {8}
    with pytest.raises(ValueError, match="weights are of"):
        encoder.change_config(replace(config, depths=(1, 2)))


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(digits):
    return ["pretrain", "--data", str(digits.unlabeled), *WORDS, WINDOWS]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """An uninterrupted run, and what it said."""
    folder, said = tmp_path_factory.mktemp("growing") / "run", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*words, "--out", str(folder)]) == 0
    return folder, said.getvalue()


def test_one_command(finished):
    folder, said = finished
    (line,) = [line for line in said.splitlines() if line.startswith("sizes ")]
    assert (
        "16 px for 4 steps (mask unit 8 px, window 2)" in line
        and "48 px for 4 steps" in line
        and "held-out loss at the last one" in line
    )
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored["image_sizes"] == [16, 32, 48] and stored["image_size"] == 48
    assert [len(changes) for changes in stored["model_by_size"]] == [1, 1, 0]
    described = json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))
    assert described["preprocessing"]["image_size"] in (48, [48, 48])
    assert load_encoder(folder).config.window_size == load_pretrained(folder)[1].encoder_config().window_size


@pytest.mark.parametrize(
    "kind, stop", [("simmim", 3), ("simmim", 4), ("simmim", 5), ("simmim", 8), ("canvas", 5), ("contrast", 5)]
)
def test_resumed_equals_uninterrupted(words, finished, tmp_path, power_cut, kind, stop):
    """Bit for bit: in the middle of a size, right before a change, and right at one. Sizes change after steps 4 and 7."""
    own = [] if kind == "simmim" else [f"--method={kind}"]
    whole = finished[0]
    if own:
        whole = tmp_path / "whole"
        assert main([*words, *own, "--out", str(whole)]) == 0
    with power_cut(after_step=stop):
        main([*words, *own, "--save_every_steps=1", "--out", str(tmp_path / "run")])
    assert max(saved_steps(tmp_path / "run")) == stop - 1, "it goes on from there"
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 0
    ours, theirs = (load_pretrained(folder)[0].state_dict() for folder in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_steps_come_in_their_sizes(digits, tmp_path, monkeypatch):
    """Accumulated, and with other views: image, window and seeds of every step; seeds are as in a run of one size."""
    seen = watch(monkeypatch)
    common = {"batch_size": 24, "epochs": 0.5, "method": "contrast", "init": "none", "save_every_steps": 100}
    model = {"encoder": {**TINY, "window_size": 6}, "view_scale": 0.5, "projector_dim": 16, "projection_dim": 8}
    more = {"model": model, "model_by_size": by_size_of("contrast"), "image_size_shares": (0.2, 0.4, 0.4)}
    pretrain(settings_of(digits, tmp_path / "run", **common, **more, optim=OptimSettings(accumulate=2)))
    assert [(size, windows) for size, windows, _, _ in seen] == [(16, {2})] * 2 + [(32, {4})] * 4 + [(48, {6})] * 4
    assert [views for *_, views in seen] == [[(8, 8)]] * 2 + [[(16, 16)]] * 4 + [[(24, 24)]] * 4
    resolved = resolved_of(digits, tmp_path, image_sizes=None, image_size=48)
    samples = training_samples(resolved, 5)
    batches = iter(samples.batches(12))
    for *_, seeds, _ in seen:
        assert seeds == [samples[key]["seed"] for key in next(batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_grows_by_batches(workers):
    """On two devices, read by one process or two, and from where it stopped."""
    pictures = [Image.fromarray(np.full((40, 40), value, np.uint8)) for value in range(0, 240, 5)]
    rows = [{"image": {"bytes": encoded(picture), "path": None}} for picture in pictures]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    views = [[RandomView((side, side))] for side in (8, 16, 24)]
    samples = GrowingStream(stream, views, [0, 3, 4], 8, 1, 0, 4)

    def batches(start, count, positions):
        loader = iter(build_loader(samples.part(1, 2, start, positions), workers, batch_size=4))
        return [next(loader) for _ in range(count)]

    whole = batches(0, 7, {})
    assert [batch["image"].shape for batch in whole] == [(4, 1, side, side) for side in (8, 8, 8, 16, 24, 24, 24)]
    for stop in (2, 3, 4):
        places = {worker: (epoch, read) for batch in whole[:stop] for worker, epoch, read in batch["stream_position"]}
        rest = batches(stop, 7 - stop, places)
        for ours, theirs in zip(rest, whole[stop:], strict=True):
            assert torch.equal(ours["image"], theirs["image"]) and ours["seed"] == theirs["seed"]


def test_a_stream_grows_by_steps(digits, tmp_path):
    """Of two accumulated batches each: both are of the step's size."""
    data, optim = DataSettings(str(digits.unlabeled), streaming=True, shuffle_buffer=10), OptimSettings(accumulate=2)
    samples = training_samples(resolved_of(digits, tmp_path, data=data, optim=optim), 6)
    loader = iter(build_loader(samples.part(0, 1, 0, {}), 0, batch_size=12))
    assert [next(loader)["image"].shape[-1] for _ in range(10)] == [16] * 4 + [32] * 4 + [48] * 2


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def test_the_time_of_all_sizes(digits, tmp_path, monkeypatch):
    """The mean over the steps."""
    resolved = resolved_of(digits, tmp_path, image_size_shares=(0.5, 0.3, 0.2))
    monkeypatch.setattr(preparation, "seconds_per_step", lambda module, samples, settings, device: float(settings.size[0]))
    assert preparation.measure_step(resolved, "cpu") == pytest.approx(0.5 * 16 + 0.3 * 32 + 0.2 * 48)
    assert "27 s a step as measured, the mean of all image sizes" in estimate_line(resolved.settings, 240, 27.2)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--image_sizes=[48,32]",), "image_sizes has 32 px after 48 px: give growing sizes, the smallest first"),
        (("--image_sizes=[32,32]",), "image_sizes has 32 px after 32 px: give growing sizes"),
        (("--image_sizes=[[16,32],[32,16]]",), "image_sizes has 32×16 px after 16×32 px: give growing sizes"),
        (("--image_sizes=[32]",), "give two sizes or more, as [96, 128, 192], or image_size"),
        (("--image_sizes=[0,32]",), "give pixels, one number or height and width for each size"),
        (("--image_sizes=[18,32]",), "at 18 px of image_sizes: no mask unit fits images of 18×18 px"),
        (
            ("--image_sizes=[32,40,48]", "--model.mask_unit=16"),
            "at 40 px of image_sizes: mask unit of 16 px does",
        ),
        (("--method=canvas", "--image_sizes=[16,36]"), "at 36 px of image_sizes: images of 36×36 px on one canvas"),
        (("--image-size=64",), "both image_sizes, which end at 48 px, and image_size 64 are given: give one of them"),
        (("--image_size_shares=[0.5,0.5,0.5]",), "with the sum 1.5: give positive shares that sum to 1"),
        (("--image_size_shares=[1.5,-0.5,0]",), "give positive shares that sum to 1"),
        (("--image_size_shares=[0.5,0.5]",), "image_size_shares has 2 entries and image_sizes has 3"),
        (("--image_sizes=null", "--image_size_shares=[1]"), "image_size_shares needs sizes"),
        (("--model_by_size=[{mask_unti: 4}, {}, {}]",), "unknown setting model_by_size.mask_unti; did you mean"),
        (("--model_by_size=[{mask_unit: x}, {}, {}]",), "model_by_size.mask_unit is 'x'"),
        (("--model_by_size=[{encoder: {depths: [1]}}, {}, {}]",), "model_by_size.encoder.depths cannot change"),
        (("--epochs=0.1",), "a run of 1 step has none at 16 px"),
    ],
)
def test_wrong_input(words, message, digits, tmp_path, capsys):
    """One line, exit code 2, and nothing is written."""
    out = tmp_path / "run"
    assert main(["pretrain", "--data", str(digits.unlabeled), "--out", str(out), *WORDS, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not out.exists()
