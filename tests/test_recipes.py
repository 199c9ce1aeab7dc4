"""Every recipe of configs/ is read by the command, and its model, masking and schedule are built."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simmim.cli.train import finetune_settings as read_finetune_settings
from simmim.cli.train import pretrain_settings as read_pretrain_settings
from simmim.data import ImageStatistics
from simmim.encoders.swin import PRESETS as SWIN_PRESETS
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.vit import PRESETS as VIT_PRESETS
from simmim.finetune.detection.defaults import resolve_head
from simmim.finetune.detection.model import Detector
from simmim.finetune.detection.model import HeadShape as DetectorShape
from simmim.finetune.segmentation.model import HeadShape, Segmenter
from simmim.finetune.settings import resolve_schedule
from simmim.pretrain.model import build_method
from simmim.pretrain.resolve import resolve_settings
from simmim.training.optim import parameter_rules

CONFIGS = Path(__file__).parents[1] / "configs"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
SEGMENTATION = sorted((CONFIGS / "finetune").glob("*-segmentation.yaml"))
DETECTION = sorted((CONFIGS / "finetune").glob("*-detection.yaml"))
FINETUNE = sorted(set((CONFIGS / "finetune").glob("*.yaml")) - {*SEGMENTATION, *DETECTION})
PHOTOS = ImageStatistics(short_side_px=400, channels=3, decoded_mib=1e5, mean=(0.5,) * 3, std=(0.2,) * 3)


def pretrain_settings(path, count=1_281_167):
    settings = read_pretrain_settings(["--config", str(path), "--data", "images", "--out", "run"])
    return resolve_settings(settings, PHOTOS, count, device="cpu", workers=0)


def finetune_settings(path):
    return read_finetune_settings("classification", ["--config", str(path), "--data", "images", "--out", "run"])


def test_there_are_recipes_for_each_stage():
    own = {"demo", "tiny-one-gpu", "micro-laptop", "fashion-mnist"}
    assert {path.stem for path in PRETRAIN} == own | {
        "swinv2-base-192",
        "swin-base-192",
        "vit-base-224",
        "scenes",
        "tiny-canvas",
        "refine-small",
    }
    assert {path.stem for path in FINETUNE} == own | {"swinv2-base-224", "swin-base-224", "vit-base-224", "demo-unlabeled"}


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretraining_recipe_builds(path):
    settings = pretrain_settings(path)
    with torch.device("meta"):
        model = build_method(settings)
        images = torch.empty(2, 3, *settings.size)
        rows, columns = (side // settings.encoder_config().patch_size for side in settings.size)
        assert model(images, torch.ones(2, rows, columns, dtype=torch.bool)).loss.shape == ()
    assert " masked" in model.describe(settings.size)
    assert settings.batch_size % settings.model.images_per_input == 0
    rate = settings.schedule().by_step(1000, settings.batch_size)
    rates = [rate(step) for step in range(0, round(1000 * settings.epochs), 100)]
    assert math.isclose(max(rates), settings.optim.lr * settings.batch_size / 512)
    assert min(rates) >= 0
    assert rates[-1] < max(rates) / 5


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_finetuning_recipe_builds(path):
    settings = resolve_schedule(finetune_settings(path), num_images=1000, device="cpu", small=True)
    rate = settings.schedule().by_step(100, settings.batch_size)
    assert math.isclose(rate(round(100 * settings.optim.warmup_epochs)), settings.optim.lr * settings.batch_size / 512)
    with torch.device("meta"):
        window = settings.encoder.window_size or 8
        encoder = SwinV2(SwinV2Config.from_preset("micro", window_size=window))
        assert encoder(torch.empty(1, 3, *settings.size)).pooled.shape == (1, encoder.dim)
    scales = {rule.lr_scale for rule in parameter_rules(encoder, 0.05, settings.optim.layer_decay).values()}
    assert len(scales) == 14  # patch embedding, twelve blocks, final norm


def test_there_are_recipes_for_segmentation():
    assert {path.stem for path in SEGMENTATION} == {"scenes-segmentation", "tiny-segmentation"}


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation_recipe_builds(path):
    words = ["--config", str(path), "--data", "scenes", "--out", "run"]
    settings = read_finetune_settings("segmentation", words)
    settings = resolve_schedule(settings, num_images=1000, device="cpu", small=False)
    rate = settings.schedule().by_step(1000 / settings.batch_size, settings.batch_size)
    warm = round(1000 / settings.batch_size * settings.optim.warmup_epochs)
    assert math.isclose(rate(warm), settings.optim.lr * settings.batch_size / 512, rel_tol=1e-3)
    with torch.device("meta"):
        encoder = SwinV2(SwinV2Config.from_preset("tiny", window_size=settings.encoder.window_size or 8))
        model = Segmenter(encoder, 20, HeadShape(settings.head.width, settings.head.norm or "batch"))
        height, width = settings.size
        assert model(torch.empty(2, 3, height, width)).shape == (2, 20, height // 4, width // 4)
    parameter_rules(model, 0.05, settings.optim.layer_decay)  # every parameter has its place


def test_detection_recipe_builds():
    """The published rate at 16 images, warm-up and drop path; short sides of 480 to 800 px."""
    assert {path.stem for path in DETECTION} == {"micro-detection", "scenes-detection", "tiny-detection"}
    for path in DETECTION:
        settings = read_finetune_settings("detection", ["--config", str(path), "--data", "objects", "--out", "run"])
        if path.stem == "scenes-detection":  # as scenes-segmentation, for a benchmark
            assert (settings.head.width, settings.image_size, settings.steps) == (32, 64, 800)
            continue
        small = "micro" in path.stem
        settings = resolve_schedule(settings, num_images=118_000, device="cpu", small=small)
        rate = settings.schedule().by_step(118_000 / settings.batch_size, settings.batch_size)
        peak = max(rate(step) for step in range(0, settings.num_steps(118_000), 10))
        assert math.isclose(peak, 0.26 * 8 / 512 if small else 1e-4, rel_tol=0.01)
        with torch.device("meta"):
            config = SwinV2Config.from_preset("micro" if small else "tiny", window_size=settings.encoder.window_size or 8)
            head = resolve_head(settings.head, small, masks=False)
            model = Detector(SwinV2(config), 20, DetectorShape(head.width, head.convolutions, int(not small)))
        parameter_rules(model, settings.optim.weight_decay, settings.optim.layer_decay)  # every parameter has its place
        assert (head.width, head.convolutions) == ((64, 2) if small else (256, 4))
    assert [settings.data.short_side * scale for scale in settings.data.scale] == [480, 800]
    assert (settings.encoder.drop_path_rate, settings.optim.layer_decay, settings.epochs) == (0.2, 1.0, 36)


def test_base_recipe_is_the_published_one():
    settings = pretrain_settings(CONFIGS / "pretrain" / "swinv2-base-192.yaml")
    assert settings.encoder_config() == SwinV2Config(128, (2, 2, 18, 2), (4, 8, 16, 32), window_size=12, drop_path_rate=0.1)
    assert (settings.size, settings.model.mask_unit, settings.model.mask_ratio) == ((192, 192), 32, 0.6)
    assert settings.model.masking(4).num_masked_units(settings.size) == 22
    assert settings.model.norm_target_patch == 47
    assert (settings.data.crop_scale, settings.data.crop_ratio) == ((0.67, 1.0), pytest.approx((3 / 4, 4 / 3)))
    rate = settings.schedule().by_step(625, global_batch=2048)
    assert rate(0) == pytest.approx(2e-6)
    assert rate(10 * 625) == rate(700 * 625 - 1) == pytest.approx(4e-4)
    assert rate(700 * 625) == rate(800 * 625 - 1) == pytest.approx(4e-5)
    assert (settings.epochs, settings.optim.weight_decay, settings.optim.clip) == (800, 0.05, 5.0)


def test_base_finetuning_recipe_is_the_published_one():
    settings = finetune_settings(CONFIGS / "finetune" / "swinv2-base-224.yaml")
    optim = settings.optim
    assert (settings.size, settings.encoder.window_size, settings.encoder.drop_path_rate) == ((224, 224), 14, 0.1)
    assert (settings.epochs, optim.warmup_epochs, optim.lr, optim.min_lr) == (100, 20, 1.25e-3, 2.5e-7)
    assert (optim.layer_decay, optim.weight_decay, optim.label_smoothing) == (0.75, 0.05, 0.1)
    data = settings.data
    assert (data.rand_augment, data.rand_augment_operations, data.rand_augment_spread, data.color_jitter) == (9, 2, 0.5, 0)
    assert (data.mixup, data.cutmix, data.mix_probability, data.erasing) == (0.8, 1.0, 1.0, 0.25)
    assert (data.crop_scale, data.flip, data.evaluation_crop, data.affine.active) == ((0.08, 1.0), 0.5, 0.875, False)
    assert optim.ema == 0
    # The windows that 192 px and window 12 leave in the encoder's config are the published 12-12-12-6.
    pretrained = replace(SwinV2Config.from_preset("base"), window_size=12).windows((192, 192))
    assert [max(window) for window in pretrained] == [12, 12, 12, 6]


def test_recipes_of_the_papers_encoders_are_the_published_ones():
    """The configurations of the SimMIM repository: Swin-B of 100 epochs, ViT-B of 800."""
    swin, vit = (pretrain_settings(CONFIGS / "pretrain" / f"{name}.yaml") for name in ("swin-base-192", "vit-base-224"))
    assert swin.encoder_config() == replace(SWIN_PRESETS["swin-base"], window_size=6, image_size=(192, 192))
    assert vit.encoder_config() == replace(VIT_PRESETS["vit-base"], drop_path_rate=0.1, image_size=(224, 224))
    for settings, units in ((swin, 22), (vit, 30)):
        assert settings.model.masking(settings.encoder_config().patch_size).num_masked_units(settings.size) == units
        assert settings.model.norm_target_patch is None
    rate = swin.schedule().by_step(625, global_batch=2048)
    assert (rate(0), rate(6250)) == (pytest.approx(4e-6), pytest.approx(8e-4)) and swin.optim.min_lr == 1e-5
    rate = vit.schedule().by_step(625, global_batch=2048)
    assert (rate(0), rate(6250), rate(700 * 625)) == (pytest.approx(2e-6), pytest.approx(4e-4), pytest.approx(4e-5))
    swin, vit = (finetune_settings(CONFIGS / "finetune" / f"{name}.yaml") for name in ("swin-base-224", "vit-base-224"))
    assert (swin.encoder.window_size, swin.encoder.drop_path_rate, swin.optim.layer_decay) == (7, 0.1, 0.9)
    assert (vit.encoder.window_size, vit.encoder.drop_path_rate, vit.optim.layer_decay) == (None, 0.1, 0.65)
    adapted = SWIN_PRESETS["swin-base"].adapt_to_size((192, 192), (224, 224))
    assert replace(adapted, window_size=swin.encoder.window_size).windows((224, 224)) == ((7, 7),) * 4
