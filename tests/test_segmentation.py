"""Segmentation in parts: mean IoU, losses, weights; saving and loading; pictures and predicted label maps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from simmim import load_encoder
from simmim.checkpoints.checkpoint import Preprocessing
from simmim.checkpoints.own_files import save_encoder
from simmim.data import normalize, open_picture
from simmim.data.label_map_files import read_label_map
from simmim.data.label_maps import ClassScheme
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.finetune.dense.pictures import palette
from simmim.finetune.dense.prediction import output_names
from simmim.finetune.segmentation.iou import class_table, iou_by_class, mean_iou, pixel_accuracy, write_class_table
from simmim.finetune.segmentation.model import HeadShape, SavedSegmenter, Segmenter, load_segmenter, save_segmenter
from simmim.finetune.segmentation.module import SegmentationFinetuning, balanced_weights, pixel_loss
from simmim.finetune.segmentation.overlays import MIN_CELL_PX, overlay, overlay_grid
from simmim.finetune.segmentation.prediction import segment
from simmim.finetune.segmentation.sliding import most_likely_class
from simmim.finetune.settings import OptimSettings


def random_label_maps(classes=5, ignored=255, shape=(4, 30, 40), seed=0, present=None):
    """Labels with ignored pixels, and predictions."""
    generator = np.random.default_rng(seed)
    labels, predicted = (torch.from_numpy(generator.integers(0, present or classes, size=shape)) for _ in range(2))
    labels[torch.from_numpy(generator.random(shape) < 0.2)] = ignored
    return labels, predicted


def confusion_of(labels, predicted, classes, ignored=255):
    return MulticlassConfusionMatrix(classes, ignore_index=ignored)(predicted, labels)


@pytest.mark.parametrize("seed, present", [(0, None), (1, None), (2, 3)])
def test_iou_equals_a_count_and_torchmetrics(seed, present):
    """With ignored pixels, and with classes that never occur."""
    labels, predicted = random_label_maps(seed=seed, present=present)
    confusion = confusion_of(labels, predicted, 5)
    counted = labels != 255
    ious = iou_by_class(confusion)
    for number in range(5):
        one, other = (labels == number) & counted, (predicted == number) & counted
        union = (one | other).sum().item()
        expected = (one & other).sum().item() / union if union else math.nan
        assert ious[number].item() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    jaccard = MulticlassJaccardIndex(5, ignore_index=255)(predicted, labels)
    assert mean_iou(confusion) == pytest.approx(jaccard.item(), abs=1e-6)
    assert pixel_accuracy(confusion) == pytest.approx((labels == predicted)[counted].double().mean().item(), abs=1e-12)


def test_counts_of_parts_add_up():
    labels, predicted = random_label_maps()
    parts = sum(confusion_of(labels[row : row + 1], predicted[row : row + 1], 5) for row in range(4))
    assert torch.equal(parts, confusion_of(labels, predicted, 5))


def test_table_of_classes(tmp_path):
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    write_class_table(tmp_path / "iou.csv", confusion, ("ground", "house", "tree, tall"), 30)
    lines = class_table(tmp_path / "iou.csv").splitlines()
    assert lines[2] == "| ground | 66.7% | 75.0% | 85.7% | 66.7% |"
    assert lines[3] == "| house | 50.0% | 75.0% | 60.0% | 33.3% |"
    assert lines[4] == "| tree, tall | – | – | – | 0.0% |"
    assert (tmp_path / "iou.csv").read_text().splitlines()[1].endswith(",0.6667,30")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0, 1.0, 3.0)])
def test_loss_is_the_mean_over_pixels_that_are_not_ignored(weights, smoothing):
    labels, _ = random_label_maps()
    logits = torch.randn(4, 5, 8, 10, generator=torch.Generator().manual_seed(0))
    enlarged = F.interpolate(logits, (30, 40), mode="bilinear", align_corners=False).double()
    weights = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(
        enlarged, labels, weight=None if weights is None else weights.double(), ignore_index=255, label_smoothing=smoothing
    )
    assert pixel_loss(logits, labels, 255, weights, smoothing).item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_of_ignored_pixels_alone_is_zero():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 8, 8), 255), 255)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_balanced_weights():
    weights = balanced_weights((900, 90, 10))
    assert sum(weight * share for weight, share in zip(weights, (0.9, 0.09, 0.01))) == pytest.approx(1)
    assert weights[2] / weights[0] == pytest.approx(math.sqrt(90))
    first, none, last = balanced_weights((900, 0, 100))  # a class that another fold has
    assert none == 0 and (first, last) == pytest.approx(balanced_weights((900, 100)))


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.5])
def test_training_adds_the_weighted_loss_of_the_auxiliary_head(saved, weight):
    """Both losses have the smoothing and the weights of the classes."""
    optim, weights = OptimSettings(label_smoothing=0.1), (0.5, 2.0, 1.0)
    module = SegmentationFinetuning(
        saved.model, saved.preprocessing, saved.scheme, "auto", lambda step: 0.1, optim, weight, weights
    )
    module.log = lambda *_, **__: None
    labels, _ = random_label_maps(classes=3, shape=(2, 32, 32))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    output = saved.model(normalize(images, saved.preprocessing.mean, saved.preprocessing.std), with_auxiliary=True)
    main, auxiliary = (
        pixel_loss(logits, labels, 255, torch.tensor(weights), 0.1) for logits in (output.logits, output.auxiliary)
    )
    batch = {"image": images, "label_map": labels.to(torch.uint8), "seed": [0, 1]}
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, main + weight * auxiliary)
    assert abs(main - auxiliary) > 0.01, "so that one cannot stand for the other"


def test_every_validation_starts_from_zero(saved):
    """Each pixel that is not ignored counts once, and the logged mean is that of the counts."""
    module = SegmentationFinetuning(
        saved.model, saved.preprocessing, saved.scheme, "auto", lambda step: 0.1, OptimSettings(label_smoothing=0.0)
    )
    logged = {}
    module.log, module.log_dict = (lambda *_, **__: None), (lambda values, **_: logged.update(values))
    labels, _ = random_label_maps(classes=3, shape=(8, 32, 32))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    expected = confusion_of(labels, most_likely_class(saved.logits(images), (32, 32)), 3)
    for _ in range(2):
        module.on_validation_epoch_start()
        for first in (0, 4):
            batch = {"image": images[first : first + 4], "label_map": labels[first : first + 4].to(torch.uint8)}
            with torch.no_grad():
                module.validation_step(batch, 0)
        module.on_validation_epoch_end()
        assert torch.equal(module.confusion, expected)
        assert logged["mean_iou"] == pytest.approx(mean_iou(expected))
        assert len(module.shown) == 6 and torch.equal(module.shown[5].image, images[5])


# --- pictures ----------------------------------------------------------------------------------------------------------


def test_colors_differ():
    for count, apart in ((21, 50), (40, 15)):
        colors = palette(count).astype(int)
        distances = np.abs(colors[:, None] - colors[None]).sum(axis=-1) + 1000 * np.eye(count)
        assert distances.min() > apart
    assert np.array_equal(palette(10), palette(40)[:10])


def test_overlay_leaves_ignored_pixels():
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    label_map = np.array([[0, 1], [255, 1]])
    mixed = overlay(image, label_map, palette(2))
    assert mixed[1, 0].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == (0.45 * 100 + 0.55 * palette(2)[1]).round().astype(int).tolist()


def test_grid_shows_every_image_and_class():
    images = [torch.zeros(1, 16, 16, dtype=torch.uint8), torch.zeros(5, 700, 300, dtype=torch.uint8)]
    label_maps = [torch.ones(8, 8, dtype=torch.long), torch.full((9, 4), 255)]
    picture = overlay_grid(images, label_maps, label_maps, tuple("abcdefghijklmnopqrstuvwxyz"))
    pixels = np.array(picture)
    assert picture.width >= 3 * MIN_CELL_PX
    colors = {tuple(color) for color in palette(26).tolist()}
    assert colors <= {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0).tolist()}, "the legend"


# --- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved():
    torch.manual_seed(0)
    model = Segmenter(build(SwinV2Config(16, (1, 1), (1, 2), window_size=4)), 3, HeadShape(width=16)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    scheme = ClassScheme(("ground", "house", "tree"), (0, 4, 7), 255)
    return SavedSegmenter(model, scheme, Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)), 32, "auto")


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_segmenter(path / "encoder", saved, {"method": "segmentation"})
    return path


def test_a_saved_segmenter_is_loaded_as_it_was(saved, folder):
    read = load_segmenter(folder)
    assert (read.scheme, read.preprocessing, read.short_side, read.inference) == (
        saved.scheme,
        saved.preprocessing,
        saved.short_side,
        saved.inference,
    )
    images = torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8)
    assert torch.equal(read.logits(images), saved.logits(images))
    assert torch.equal(load_segmenter(folder / "encoder").logits(images), saved.logits(images))
    torch.testing.assert_close(
        load_encoder(folder)(torch.ones(1, 3, 32, 32)).pooled, saved.model.encoder(torch.ones(1, 3, 32, 32)).pooled
    )


def test_files_that_are_no_segmenter_are_refused(saved, folder, tmp_path):
    save_encoder(tmp_path / "encoder", saved.model.encoder, saved.preprocessing, {})
    with pytest.raises(ValueError, match="an encoder but no segmenter: give a run of simmim finetune segmentation"):
        load_segmenter(tmp_path / "encoder")
    with pytest.raises(ValueError, match="no encoder at"):
        load_segmenter(folder / "typo")
    save_segmenter(tmp_path / "torn", saved, {})
    file = tmp_path / "torn" / "segmentation.json"
    file.write_text(file.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(ValueError, match=r"segmentation\.safetensors does not fit its description: .*of another shape"):
        load_segmenter(tmp_path / "torn")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Parts of real photographs, of several sizes and kinds."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    first, second = load_sample_images().images
    Image.fromarray(first[:200, :300]).save(folder / "a.jpg", quality=95)
    Image.fromarray(second[:200, :300]).convert("L").save(folder / "inner" / "b.png")
    Image.fromarray(second[:90, :40]).save(folder / "c.webp", lossless=True)
    Image.fromarray(first[100:220, :500]).save(folder / "c.png")
    (folder / "torn.jpg").write_bytes((folder / "a.jpg").read_bytes()[:50])
    return folder


def test_predicted_label_maps_are_the_segmenter_s_at_the_images_sizes(saved, folder, photos, tmp_path):
    result = segment(folder, photos, tmp_path / "out", batch_size=2)
    assert result.count == 4 and list(result.unreadable) == [str(photos / "torn.jpg")]
    files = {"a": "a.jpg", "inner/b": "inner/b.png", "c.webp": "c.webp", "c.png": "c.png"}
    written = tmp_path / "out" / "masks"
    paths = sorted(str(path.relative_to(written)) for path in written.rglob("*.png"))
    assert paths == sorted(f"{name}.png" for name in files)
    totals = np.zeros(3, dtype=int)
    for name, file in files.items():
        picture = open_picture({"bytes": None, "path": str(photos / file)}, 3)
        height, width = picture.size
        factor = 32 / min(height, width)
        pixels = picture.crop((0, 0, width, height), (round(height * factor), round(width * factor)))
        logits = F.interpolate(saved.logits(pixels[None]), (height, width), mode="bilinear", align_corners=False)
        label_map = read_label_map({"bytes": None, "path": str(written / f"{name}.png")})
        expected = np.array(saved.scheme.values)[logits[0].argmax(dim=0).numpy()]
        assert label_map.shape == (height, width) and (label_map == expected).mean() > 0.9999, name
        totals += [int((label_map == value).sum()) for value in saved.scheme.values]
        overlaid = Image.open(tmp_path / "out" / "overlays" / f"{name}.png")
        assert overlaid.size == (width, height) and overlaid.mode == "RGB"
    assert list(result.pixels.values()) == totals.tolist()
    assert Image.open(written / "a.png").mode == "P"
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["ground", "house", "tree"]


def test_prediction_refuses_existing_folders_and_unreadable_images(folder, photos, tmp_path):
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "file").touch()
    with pytest.raises(ValueError, match="exists: give a new folder"):
        segment(folder, photos, tmp_path / "existing")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "torn.jpg").write_bytes((photos / "torn.jpg").read_bytes())
    with pytest.raises(ValueError, match="none of 1 image can be read"):
        segment(folder, tmp_path / "torn", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_names_of_predicted_label_maps(tmp_path):
    inside = [str(tmp_path / name) for name in ("x/1.png", "y/1.png", "2.jpg", "2.png")]
    assert output_names(inside, tmp_path) == ["x/1", "y/1", "2.jpg", "2.png"]
    assert output_names([None, "a/1.png", "b/1.png"], tmp_path / "list.txt") == ["000000", "1.png", "1.png-000002"]
