"""Networks of timm and transformers as encoders: the features of their libraries, in every comparison and fine-tuned."""

import math
import shutil

import pytest
import torch
from image_files import write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_backbones import NAMES, SIDE_PX, TIMM, import_timm, save
from transformers_swinv2 import transformers_twin

from simmim.checkpoints import read_encoder
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main
from simmim.encoders import registry
from simmim.encoders.backbone.measure import measured_config
from simmim.encoders.backbone.transformers_networks import plain_fields
from simmim.encoders.swinv2 import SwinV2Config
from simmim.evaluate import Comparison, EncoderPass, compare, write_embeddings
from simmim.finetune import (
    ClassificationSettings,
    HeadSettings,
    SceneSettings,
    SegmentationSettings,
    finetune,
    load_classifier,
    load_segmenter,
    predict,
)
from simmim.training.optim import parameter_rules

HERE = EncoderPass(workers=0)
IMAGE = torch.randn(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name to (folder, network), each made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            made[name] = folder, save(name, folder)
        return made[name]

    return get


@torch.no_grad()
def by_library(name, network):
    """(pooled, map of the last layer after its norm) as the library itself computes them."""
    if name in TIMM:
        features = network.forward_features(IMAGE)
        pooled = network.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            return pooled, features.permute(0, 3, 1, 2) if features.shape[-1] == pooled.shape[1] else features
        return pooled, features[:, network.num_prefix_tokens :].transpose(1, 2).unflatten(2, (SIDE_PX // 16,) * 2)
    if name == "mae":  # in order, and nothing masked
        network.config.mask_ratio = 0.0
        side = SIDE_PX // 8
        tokens = network.vit(IMAGE, noise=torch.arange(side**2).repeat(2, 1)).last_hidden_state
    else:
        tower = getattr(network, "vision_model", network)
        output = tower(pixel_values=IMAGE)
        tokens = output.last_hidden_state
        if name in ("dinov2", "dinov3", "siglip", "swin", "convnext", "resnet", "clip"):
            pooled = output.pooler_output.flatten(1)
            if name == "clip":
                tokens = tower.post_layernorm(tokens)
            return pooled, tokens if tokens.ndim == 4 else as_grid(tokens)
    return tokens[:, 0], as_grid(tokens)


def as_grid(tokens):
    """Patches of a square image, which are the last tokens, as a map."""
    side = math.isqrt(tokens.shape[1])
    return tokens[:, tokens.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))


@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_librarys(name, folders):
    """Pooled features, the last map, and all maps at their strides, for any image size."""
    folder, network = folders(name)
    encoder = read_encoder(folder).encoder
    pooled, features = by_library(name, network)
    with torch.no_grad():
        output = encoder(IMAGE, return_stages=True)
        torch.testing.assert_close(output.pooled, pooled, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(output.features, features, atol=2e-6, rtol=1e-5)
        for height, width in ((SIDE_PX, SIDE_PX), (SIDE_PX + 5, SIDE_PX + 37)):
            maps = encoder(torch.randn(1, 3, height, width), return_stages=True).stages
            sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in encoder.strides]
            assert [tuple(map.shape[2:]) for map in maps] == sizes
            assert tuple(map.shape[1] for map in maps) == encoder.channels
        assert torch.equal(encoder.features(IMAGE), output.pooled)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_told(name, folders):
    """Layer decay slows the first layers, every block has a layer of its own, and stages together hold all but the head."""
    encoder = read_encoder(folders(name)[0]).encoder
    num_layers = encoder.num_layers
    used = {encoder.layer_of(parameter) for parameter, _ in encoder.named_parameters()}
    assert used >= set(range(num_layers + 1))
    assert max(used) == num_layers + (not name.endswith("resnet"))  # nothing follows the blocks of a ResNet
    rules = parameter_rules(encoder, 0.05, 0.5)
    projection = encoder.config.input_projection
    assert rules[projection].lr_scale <= 0.5**num_layers
    ids = [id(value) for stage in encoder.stage_modules() for part in stage for value in part.parameters()]
    assert len(ids) == len(set(ids))
    others = {name for name, value in encoder.named_parameters() if id(value) not in ids}
    assert others == {name for name, _ in encoder.named_parameters() if encoder.layer_of(name) == num_layers + 1}


def test_swinv2_of_transformers_is_ours():
    """The same weights in both give the same features and maps."""
    config = SwinV2Config(16, (1, 2), (1, 2), window_size=4)
    theirs, ours = transformers_twin(config, SIDE_PX)
    found = measured_config("transformers", "swinv2", plain_fields(theirs.config), (SIDE_PX, SIDE_PX), 3)
    wrapped = registry.build(found).eval()
    wrapped.network.load_state_dict(theirs.state_dict())
    assert (found.channels, found.strides) == (config.channels, config.strides)
    with torch.no_grad():
        expected, output = ours(IMAGE, return_stages=True), wrapped(IMAGE, return_stages=True)
    torch.testing.assert_close(output.pooled, expected.pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.features, expected.features, atol=1e-4, rtol=1e-4)
    for mine, other in zip(expected.stages, output.stages, strict=True):
        torch.testing.assert_close(other, mine, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_probe_embed_and_fine_tune(name, digits, folders, tmp_path):
    """Every network goes through the comparison, the Parquet file, a short fine-tuning, prediction and our own folder."""
    saved = read_encoder(folders(name)[0])
    small = saved.preprocessing.__class__((32, 32), saved.preprocessing.mean, saved.preprocessing.std)
    folder = save_encoder(tmp_path / "small", saved.encoder, small, saved.provenance)
    saved = read_encoder(folder)
    report = compare(saved, Comparison(str(digits.labeled), "knn", 2, untrained=False), HERE, quiet=True)
    assert {row.name for row in report.draws[0].rows} >= {"final", f"stage {len(saved.encoder.channels) - 1}"}
    written = write_embeddings(saved, str(digits.labeled / "test"), tmp_path / "out.parquet", options=HERE)
    assert (written.count, written.dim) == (60, saved.encoder.dim)
    settings = ClassificationSettings(
        data=str(digits.labeled), out=str(tmp_path / "run"), init=str(folder), labels_per_class=2, steps=2, validations=1
    )
    finetune(settings, quiet=True)
    tuned = load_classifier(tmp_path / "run")
    assert tuned.model.encoder.config == saved.encoder.config
    before, after = saved.encoder.state_dict(), tuned.model.encoder.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert saved.encoder.config.input_projection in changed
    assert predict(tmp_path / "run", digits.labeled / "test", tmp_path / "out.csv") == (60, {})


# --- refusals ----------------------------------------------------------------------------------------------------------


def refused(words, capsys):
    """Exit code 2 and one line, which is returned."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("simmim: "), error
    return error


def saved_by_timm(folder, name, **arguments):
    """A random network of timm in a folder."""
    network = import_timm().create_model(name, **arguments)
    import_timm().models.save_for_hf(network, folder, model_args=arguments, safe_serialization=True)
    return str(folder)


def test_what_a_network_cannot_do_is_said_in_one_line(digits, scene_folder, folders, tmp_path, capsys):
    """Pre-training, another library's format, maps of a network that has none."""
    folder = str(folders("timm resnet")[0])
    line = refused(["pretrain", "--data", str(digits.unlabeled), "--init", folder, "--out", str(tmp_path / "a")], capsys)
    assert "resnet18 of timm, which no method here pre-trains" in line
    for format in ("hf", "timm", "onnx", "official"):
        line = refused(["export", "--run", folder, "--format", format, "--out", str(tmp_path / "b")], capsys)
        assert "export as safetensors" in line
    arguments = {"embed_dim": (8, 16), "depth": ((1, 1, 0),), "num_heads": (1, 1)}
    blind = saved_by_timm(tmp_path / "no maps", "crossvit_tiny_240", **arguments)
    words = ["finetune", "segmentation", "--data", str(scene_folder), "--init", blind, "--out", str(tmp_path / "c")]
    assert "crossvit_tiny_240 of timm has no feature maps" in refused(words, capsys)


def test_incomplete_and_pickled_weights_are_refused(folders, tmp_path, capsys):
    folder, _ = folders("timm resnet")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if name != "layer2.0.conv1.weight"}, broken / "model.safetensors"
    )
    assert "lacks 1 weights of the network (layer2.0.conv1.weight)" in refused(["inspect", str(broken)], capsys)
    save_file({**state, "bn1.weight": torch.zeros(3)}, broken / "model.safetensors")
    assert "does not fit the network" in refused(["inspect", str(broken)], capsys)
    (broken / "model.safetensors").unlink()
    torch.save(state, broken / "pytorch_model.bin")
    assert "nothing pickled of other networks is read" in refused(["inspect", str(broken)], capsys)


def test_images_of_another_size_or_number_of_channels(digits, folders, tmp_path, capsys):
    """A network of one size says which; one whose images pass through one weight takes other channels."""
    mixer = saved_by_timm(tmp_path / "mixer", "mixer_s16_224", img_size=32)
    words = ["finetune", "classification", "--data", str(digits.labeled), "--init", mixer, "--out", str(tmp_path / "run")]
    line = refused([*words, "--image-size", "40"], capsys)
    assert "image_size is 40 × 40: mixer_s16_224 takes images of 32 × 32 px alone, give 32" in line
    gray = read_encoder(folders("dinov2")[0], in_channels=1).encoder
    color = read_encoder(folders("dinov2")[0]).encoder
    with torch.no_grad():
        expected = color(IMAGE[:, :1].expand(-1, 3, -1, -1)).pooled
        torch.testing.assert_close(gray(IMAGE[:, :1]).pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "timm convnext"])
def test_maps_are_segmented(name, folders, tmp_path):
    """UPerNet on the maps of a plain transformer and of a network of stages; the model is read again from its run."""
    for part, count in (("train", 4), ("val", 2)):
        write_images(tmp_path / part / "images", count, size=(64, 64))
        (tmp_path / part / "masks").mkdir()
        for number in range(count):
            Image.open(tmp_path / part / "images" / f"{number:03d}.png").convert("L").point(
                lambda value: int(value > 128)
            ).save(tmp_path / part / "masks" / f"{number:03d}.png")
    settings = SegmentationSettings(
        data=SceneSettings(str(tmp_path)),
        out=str(tmp_path / "run"),
        init=str(folders(name)[0]),
        image_size=SIDE_PX,
        steps=1,
        batch_size=2,
        validations=1,
        workers=0,
        head=HeadSettings(width=16),
    )
    finetune(settings, quiet=True)
    segmenter = load_segmenter(tmp_path / "run")
    assert segmenter.logits(torch.zeros(1, 3, SIDE_PX, SIDE_PX, dtype=torch.uint8)).shape == (1, 2, SIDE_PX, SIDE_PX)
    assert segmenter.model.encoder.config == read_encoder(folders(name)[0]).encoder.config
