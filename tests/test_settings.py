"""What the user leaves open follows from the images and the machine; what cannot work is refused by name."""

from dataclasses import fields, is_dataclass, replace
from functools import partial

import pytest
import yaml

from simmim.cli.train import finetune_settings, pretrain_settings
from simmim.data import ImageStatistics
from simmim.defaults import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    default_batch_size,
    default_finetuning_epochs,
    default_image_size,
    default_mask_unit,
    default_preset,
    default_pretraining_epochs,
    default_scales,
)
from simmim.encoders.swinv2 import PRESETS
from simmim.finetune.classification.settings import ClassificationSettings, LabeledSettings
from simmim.finetune.settings import EncoderSettings
from simmim.finetune.settings import OptimSettings as FinetuneOptimSettings
from simmim.finetune.start import find_start
from simmim.methods.simmim import SimMIMSettings
from simmim.pretrain.resolve import resolve_settings
from simmim.pretrain.settings import DataSettings, OptimSettings, PretrainSettings
from simmim.pretrain.summary import size_reason
from simmim.training.run_folder import as_yaml, differences, plain

DIGITS = ImageStatistics(short_side_px=28, channels=1, decoded_mib=3.0, mean=(0.131,), std=(0.308,))
PHOTOS = ImageStatistics(short_side_px=375, channels=3, decoded_mib=5e4, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
fine = partial(ClassificationSettings, data="x")
THUMBNAILS = ImageStatistics(short_side_px=96, channels=3, decoded_mib=200.0, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))


def settings_for(**changes):
    return PretrainSettings(**{"data": "images", "out": "run", **changes})


def resolved(images=DIGITS, count=4000, device="cpu", workers=2, **changes):
    return resolve_settings(settings_for(**changes), images, count, device, workers)


# --- pre-training ----------------------------------------------------------------------------------------------------


def test_digits_on_a_laptop():
    chosen = resolved()
    assert (chosen.image_size, chosen.size, chosen.preset) == (32, (32, 32), "nano")
    assert (chosen.model.mask_unit, chosen.model.encoder) == (4, {"window_size": 4})
    assert (chosen.epochs, chosen.batch_size, chosen.workers) == (800.0, 128, 2)
    assert (chosen.optim.lr, chosen.optim.warmup_epochs) == (2.3e-2, 10)
    assert (chosen.data.channels, chosen.data.mean, chosen.data.std) == (1, (0.131,), (0.308,))
    assert (chosen.save_every_steps, chosen.reconstruct_every_epochs) == (50, 40.0)
    config = chosen.encoder_config()
    assert (config.in_channels, config.window_size, config.depths, config.patch_size) == (1, 4, (2, 2), 4)
    assert chosen.model.masking(4).num_masked_units(chosen.size) == 39, "0.6 of 8 × 8 units, rounded up"


@pytest.mark.parametrize("batch_size, peak", [(64, 4e-3), (256, 8e-3), (1024, 1.6e-2)])
def test_the_peak_rate_of_a_small_encoder_grows_with_the_root_of_the_batch(batch_size, peak):
    schedule = resolved(batch_size=batch_size, epochs=10.0).schedule()
    rate = schedule.by_step(steps_per_epoch=100, global_batch=batch_size)
    assert max(map(rate, range(1000))) == pytest.approx(peak, rel=0.02)


def test_short_runs_have_fewer_pictures():
    """40 steps, with a picture every 20 and not every 2."""
    chosen = resolved(count=64, epochs=10.0, batch_size=16)
    assert (chosen.reconstruct_every_epochs, chosen.activations_every_epochs) == (5.0, 5.0)
    assert resolved(count=64, epochs=10.0, batch_size=16, reconstruct_every_epochs=0.5).reconstruct_every_epochs == 0.5


@pytest.mark.parametrize(
    "device, preset, batch_size, lr, side",
    [("cpu", "micro", 128, 2.3e-2, 96), ("mps", "tiny", 128, 1e-4, 192), ("cuda", "tiny", 128, 1e-4, 192)],
)
def test_photos(device, preset, batch_size, lr, side):
    """192 px, mask unit 32, window 12 as published, half of each on a CPU; ImageNet's statistics, whatever the images'."""
    chosen = resolved(PHOTOS, 1_281_167, device, 8)
    assert (chosen.image_size, chosen.preset, chosen.batch_size, chosen.workers) == (side, preset, batch_size, 8)
    assert (chosen.model.mask_unit, chosen.encoder_config().window_size) == (side // 6, side // 16)
    assert (chosen.data.mean, chosen.data.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (chosen.epochs, chosen.optim.lr, chosen.optim.warmup_epochs) == (100.0, lr, 10)
    assert chosen.save_every_steps == 1000
    assert chosen.model.masking(4).num_masked_units(chosen.size) == 22 and chosen.encoder_config().in_channels == 3


@pytest.mark.parametrize(
    "side, device, given, size, lines",
    [
        (375, "cpu", None, 96, 1),
        (375, "cuda", None, 192, 0),
        (375, "cuda", None, 96, 0),
        (375, "cpu", 96, 96, 0),
        (96, "cpu", None, 96, 0),
        (375, "cpu", None, 64, 0),
    ],
)
def test_the_size_that_a_cpu_brings_is_said(side, device, given, size, lines):
    said = size_reason(settings_for(image_size=given), settings_for(image_size=size), side, device)
    assert [line.startswith("chosen   96 px, the most on a CPU: 192 px") for line in said] == [True] * lines


def test_thumbnails():
    chosen = resolved(THUMBNAILS, 50_000, "cuda")
    assert (chosen.image_size, chosen.preset, chosen.model.mask_unit) == (96, "tiny", 16)
    assert (chosen.encoder_config().window_size, chosen.epochs, chosen.save_every_steps) == (6, 400.0, 391)


@pytest.mark.parametrize("images", [DIGITS, THUMBNAILS, PHOTOS])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_needed_stays_open(images, device):
    chosen = resolved(images, device=device)
    may = {"precision", "model.norm_target_patch", "model.sequential_attention", "data.column", "data.count"}
    may |= {"probe.data", "probe.column", "probe.label_column", "probe.labels_per_class"}
    may |= {"data.validation", "validate_every_epochs", "data.pages", "data.channel_files", "data.channels_used"}
    may |= {"data.tile", "data.tile_level", "data.pixel_size"}
    may |= {"time", "image_sizes", "image_size_shares", "model_by_size"}
    assert open_keys(chosen) == may, "what may stay so"
    assert resolve_settings(chosen, PHOTOS, 7, "cuda", 0) == chosen, "resolving resolved settings changes nothing"


def open_keys(settings, prefix=""):
    found = set()
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            found.add(prefix + field.name)
        elif is_dataclass(value):
            found |= open_keys(value, f"{prefix}{field.name}.")
    return found


def test_what_is_given_wins():
    given = {
        "data": DataSettings("images", channels=3, mean=[0.1, 0.2, 0.3], std=[1, 2, 3], crop_scale=[0.2, 1.0]),
        "preset": "base",
        "image_size": [96, 64],
        "epochs": 3.0,
        "batch_size": 7,
        "workers": 0,
        "reconstruct_every_epochs": 0.5,
        "save_every_steps": 9,
        "model": SimMIMSettings(mask_unit=8, mask_ratio=0.75, encoder={"window_size": 5, "depths": [1, 1, 1, 1]}),
        "optim": OptimSettings(lr=0.5, warmup_epochs=0.0),
    }
    chosen = resolved(**given)
    for key, value in given.items():
        assert getattr(chosen, key) == (tuple(value) if isinstance(value, list) else value)
    assert chosen.size == (96, 64) and chosen.encoder_config().depths == (1, 1, 1, 1)
    assert chosen.schedule().warmup_epochs == 0.0
    assert resolved(epochs=4.0).optim.warmup_epochs == 0.4, "a tenth of a short run"
    as_color = resolved(data=DataSettings("images", channels=3))
    assert (as_color.data.mean, as_color.encoder_config().in_channels) == (IMAGENET_MEAN, 3)
    assert resolved(model=SimMIMSettings(encoder={"patch_size": 2}), image_size=32).encoder_config().window_size == 4


def test_resolving_changes_no_input():
    encoder = {"depths": [1, 1]}
    settings = settings_for(model=SimMIMSettings(encoder=encoder))
    resolve_settings(settings, DIGITS, 100, "cpu", 0)
    assert encoder == {"depths": [1, 1]} and settings == settings_for(model=SimMIMSettings(encoder={"depths": [1, 1]}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": SimMIMSettings(mask_unit=12)}, "unit of 12 px does not divide .* 32×32 px; units that do: 4, 8, 16$"),
        ({"model": SimMIMSettings(mask_unit=32), "image_size": (96, 80)}, "96×80 px; units that do: 4, 8, 16$"),
        ({"model": SimMIMSettings(mask_unit=6)}, "mask unit is 6 px and patches are 4 px: give a multiple"),
        ({"model": SimMIMSettings(mask_ratio=1.5)}, "mask ratio is 1.5: give a number between 0 and 1"),
        ({"image_size": 30}, "no mask unit fits images of 30×30 px with patches of 4 px: .* multiple of 4$"),
        ({"preset": "tyni"}, "unknown preset 'tyni'; did you mean 'tiny'"),
        ({"model": SimMIMSettings(encoder={"window": 7})}, "unknown encoder setting 'window'; did you mean 'window_s"),
        ({"model": SimMIMSettings(encoder={"depth": [1]})}, "unknown encoder setting 'depth'; did you mean 'depths'"),
        ({"model": SimMIMSettings(encoder={"depths": [1, 1, 1]})}, "give one number of heads per stage"),
        ({"data": DataSettings("images", mean=(0.5, 0.5, 0.5))}, r"data.mean \(0.5, 0.5, 0.5\) .* each of 1 channels"),
        ({"data": DataSettings("images", channels=3, std=(0.5,))}, r"std \(0.5,\) need one number for each of 3"),
        ({"optim": OptimSettings(schedule="cosinus")}, "schedule is 'cosinus': give 'cosine' or 'multistep'"),
        ({"optim": OptimSettings(warmup_epochs=30), "epochs": 20}, "warm-up of 30 epochs in a run of 20"),
        ({"optim": OptimSettings(lr=-1.0)}, "learning rate -1.0 over 800.0 epochs: give positive numbers"),
        ({"optim": OptimSettings(lr=0.0)}, "learning rate 0.0"),
    ],
)
def test_settings_that_cannot_be_resolved(changes, message):
    with pytest.raises(ValueError, match=message):
        resolved(**changes)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DataSettings("x", crop_scale=(0.9, 0.5)), r"data.crop_scale is \(0.9, 0.5\): .* 0 < low <= high <= 1"),
        (lambda: DataSettings("x", crop_scale=(0.0, 1.0)), "data.crop_scale"),
        (lambda: DataSettings("x", crop_scale=(0.5, 1.1)), "data.crop_scale"),
        (lambda: DataSettings("x", crop_ratio=(0.0, 1.0)), r"data.crop_ratio is \(0.0, 1.0\): give width over height"),
        (lambda: DataSettings("x", crop_ratio=(2.0, 1.0)), "data.crop_ratio"),
        (lambda: DataSettings("x", flip=1.5), "data.flip is 1.5: give a probability"),
        (lambda: DataSettings("x", channels=0), "data.channels is 0: give a positive number"),
        (lambda: OptimSettings(accumulate=0), "optim.accumulate is 0: give 1 or more"),
        (lambda: OptimSettings(clip=0.0), "optim.clip is 0.0: give a positive norm"),
        (lambda: settings_for(epochs=0), "epochs is 0: give a positive number"),
        (lambda: settings_for(batch_size=-8), "batch_size is -8"),
        (lambda: settings_for(log_every_steps=0), "log_every_steps is 0"),
        (lambda: settings_for(save_every_steps=0), "save_every_steps is 0"),
        (lambda: settings_for(reconstruct_every_epochs=-1.0), "reconstruct_every_epochs is -1.0"),
        (lambda: settings_for(workers=-1), "workers is -1: give 0 to load in the main process, or more"),
        (lambda: LabeledSettings("x", crop_scale=(0.9, 0.5)), "data.crop_scale"),
        (lambda: LabeledSettings("x", crop_ratio=(2.0, 1.0)), "data.crop_ratio"),
        (lambda: LabeledSettings("x", flip=-0.1), "data.flip is -0.1: give a probability"),
        (lambda: LabeledSettings("x", evaluation_crop=0.0), r"data.evaluation_crop is 0.0: give a share .* \(0, 1\]"),
        (lambda: FinetuneOptimSettings(label_smoothing=1.0), "optim.label_smoothing is 1.0"),
        (lambda: FinetuneOptimSettings(accumulate=0), "optim.accumulate is 0"),
        (lambda: FinetuneOptimSettings(clip=-1.0), "optim.clip is -1.0"),
        (lambda: fine(out="run", validations=0), "validations is 0: give a positive number"),
        (lambda: fine(out="run", workers=-2), "workers is -2"),
        (lambda: fine(out="run", freeze=True), "freeze: true with init: none would train a head on random"),
        (lambda: fine(out="run", init="enc", encoder=EncoderSettings(like="a")), "use them with init: none"),
        (lambda: fine(out="run", init="enc", encoder=EncoderSettings(preset="nano")), "with init: none"),
    ],
)
def test_settings_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- round trips -----------------------------------------------------------------------------------------------------


def config_of(settings, folder):
    path = folder / "config.yaml"
    path.write_text(as_yaml(settings), encoding="utf-8")
    return ["--config", str(path)]


@pytest.mark.parametrize(
    "settings",
    [
        settings_for(),
        resolved(),
        resolved(PHOTOS, device="cuda", precision="bf16-mixed"),
        resolved(
            data=DataSettings("ein Ordner/ä: x", channels=3, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), flip=0.0),
            image_size=(64, 96),
            devices=2,
            seed=123456789,
            epochs=0.25,
            model=SimMIMSettings(norm_target_patch=47, encoder={"depths": [1, 1, 1, 1], "drop_path_rate": 0.1}),
            optim=OptimSettings(schedule="multistep", milestones=(0.1, 0.2), warmup_lr=1e-10, accumulate=4),
            trainer={"strategy": "ddp", "benchmark": True, "limit_train_batches": 0.5},
        ),
        resolved(devices="0,1", out="~/runs/1e3"),
        settings_for(out="123", preset="nano"),
    ],
)
def test_pretraining_settings_survive_yaml(settings, tmp_path):
    """config.yaml, given to --config, is the same settings, types included."""
    again = pretrain_settings(config_of(settings, tmp_path))
    assert again == settings and differences(plain(settings), plain(again)) == []
    assert isinstance(again.data.crop_scale, tuple) and isinstance(again.optim.milestones, tuple)
    assert yaml.safe_load(as_yaml(settings)).keys().isdisjoint(("resume", "overwrite"))


@pytest.mark.parametrize(
    "settings",
    [
        ClassificationSettings(data="images", out="run"),
        ClassificationSettings(
            data="images", out="run", init="other/run", labels_per_class=5, freeze=True, image_size=(32, 64)
        ),
        ClassificationSettings(
            data=LabeledSettings("x", crop_scale=(0.9, 1.0), evaluation_crop=0.875),
            out="run",
            epochs=2.5,
            encoder=EncoderSettings(preset="nano", drop_path_rate=0.0, window_size=5),
            optim=FinetuneOptimSettings(lr=1e-5, layer_decay=1.0, warmup_epochs=0.0),
            trainer={"deterministic": True},
        ),
    ],
)
def test_finetuning_settings_survive_yaml(settings, tmp_path):
    again = finetune_settings("classification", config_of(settings, tmp_path))
    assert again == settings and isinstance(again.data.affine.degrees, float | int)


def test_later_words_win(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml(resolved(epochs=5.0)), encoding="utf-8")
    words = ["--epochs", "7", "--config", str(path), "--epochs", "9", "--model.mask-ratio=0.5", "--data", "other"]
    again = pretrain_settings(words)
    expected = resolved(epochs=5.0)
    expected = replace(expected, epochs=9.0, data=replace(expected.data, path="other"))
    assert again == replace(expected, model=replace(expected.model, mask_ratio=0.5))


# --- defaults --------------------------------------------------------------------------------------------------------


def test_default_image_size():
    sides = {1: 32, 28: 32, 32: 32, 63: 32, 64: 64, 100: 96, 191: 160, 192: 192, 375: 192, 4000: 192}
    for device in ("cuda", "mps"):
        assert {side: default_image_size(side, device) for side in sides} == sides
    assert {side: default_image_size(side, "cpu") for side in sides} == {side: min(size, 96) for side, size in sides.items()}


def test_default_image_size_of_a_preset():
    sizes = {"pico": (64, 64), "micro": (96, 96), "tiny": (96, 192), "base": (96, 192), "swin-tiny": (96, 192)}
    assert {name: tuple(default_image_size(375, device, name) for device in ("cpu", "cuda")) for name in sizes} == sizes
    assert default_image_size(40, "cpu", "pico") == 32


def test_default_scales():
    tiny, micro, pico = ("tiny", 192), ("micro", 96), ("pico", 64)
    assert default_scales(375, "cuda") == [tiny, micro, pico] and default_scales(375, "cpu") == [micro, pico]
    assert default_scales(100, "cuda") == [("tiny", 96), micro, pico]
    assert default_scales(64, "cpu") == [("micro", 64), pico]
    assert default_scales(28, "cpu") == default_scales(28, "cuda") == [("nano", 32)]
    assert default_scales(375, "cpu", side_px=128) == [("micro", 128), ("pico", 128)]
    assert default_scales(375, "cpu", preset="tiny") == [("tiny", 96)]
    assert default_scales(375, "cpu", "pico", 48) == [("pico", 48)], "what is given stays"


def test_default_preset_and_batch():
    assert [default_preset(side, device) for side in (32, 48) for device in ("cpu", "cuda", "mps")] == ["nano"] * 6
    assert [default_preset(64, device) for device in ("cpu", "cuda", "mps")] == ["micro", "tiny", "tiny"]
    sizes = {("cpu", True): 128, ("cpu", False): 32, ("cuda", True): 512, ("cuda", False): 128}
    assert {key: default_batch_size(*key) for key in sizes} == sizes


def test_default_window():
    sides = {192: 12, 96: 6, 32: 4, 16: 4}
    assert {side: PRESETS["nano"].fields_for_size((side, side))["window_size"] for side in sides} == sides
    assert PRESETS["nano"].fields_for_size((96, 192)) == {"window_size": 6}, "the shorter side"
    assert PRESETS["pico"].fields_for_size((64, 64)) == {"window_size": 8}, "stages of one block have no shifted windows"


@pytest.mark.parametrize(
    "size, patch_size, unit",
    [
        ((192, 192), 4, 32),
        ((224, 224), 4, 32),
        ((32, 32), 4, 4),
        ((96, 192), 4, 16),
        ((48, 64), 4, 8),
        ((36, 36), 4, 4),
        ((20, 20), 4, 4),
        ((8, 8), 4, 4),
        ((32, 32), 2, 4),
        ((192, 192), 16, 32),
        ((160, 160), 4, 20),
    ],
)
def test_default_mask_unit(size, patch_size, unit):
    assert default_mask_unit(size, patch_size) == unit


@pytest.mark.parametrize("size, patch_size", [((30, 30), 4), ((4, 4), 4), ((32, 33), 4), ((64, 64), 64)])
def test_no_mask_unit_fits(size, patch_size):
    message = f"no mask unit fits images of {size[0]}×{size[1]} px with patches of {patch_size} px: "
    with pytest.raises(ValueError, match=message):
        default_mask_unit(size, patch_size)


def test_default_lengths():
    counts = {10: 800, 25_000: 800, 40_000: 500, 100_000: 200, 200_000: 100, 10_000_000: 100}
    assert {count: default_pretraining_epochs(count) for count in counts} == counts
    lengths = {(50, 25): 250, (100, 100): 500, (1000, 64): 100, (320, 64): 100, (319, 64): 101, (20_001, 64): 30}
    assert {key: default_finetuning_epochs(*key) for key in lengths} == lengths


def test_validation_images_stay_in_memory_only_beside_those_of_training():
    """512 MiB hold three times the images of training: twice as many validation images fit, more do not."""
    images = replace(THUMBNAILS, decoded_mib=512 / 3)
    start = find_start(ClassificationSettings(data="x", out="y", encoder=EncoderSettings(preset="pico")), images, "cpu")
    assert start.keep_decoded and start.settings.workers == 0
    assert start.keeps(range(20), range(10)) and not start.keeps(range(21), range(10))
    loaded = find_start(replace(start.settings, workers=2), images, "cpu")
    assert not loaded.keep_decoded and not loaded.keeps(range(1), range(10)), "each loading process would hold them"
