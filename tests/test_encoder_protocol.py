"""What every encoder family promises to the rest of the toolkit: the registered ones, and a toy family of the tests."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from toy_encoder import ToyConfig

from simmim.encoders import registry
from simmim.encoders.swin import SwinConfig
from simmim.encoders.swinv2 import SwinV2Config
from simmim.encoders.vit import ViTConfig

CONFIGS = {
    "swinv2": SwinV2Config(16, (1, 2, 1), (1, 2, 4), window_size=4),
    "swinv2, extra norms": SwinV2Config(8, (1, 1, 2), (1, 1, 1), window_size=3, extra_norm_every=1),
    "swin": SwinConfig(16, (1, 2, 1), (1, 2, 4), window_size=4),
    "swin, for 48×32 px": SwinConfig(8, (1, 2, 1), (1, 1, 2), window_size=6, image_size=(48, 32)),
    "vit": ViTConfig(16, 3, 2, patch_size=4, image_size=(32, 48)),
    "vit, fine-tuned": ViTConfig(16, 2, 2, patch_size=8, image_size=(32, 32)).for_fine_tuning(),
    "toy": ToyConfig(),
    "toy of two stages": ToyConfig((4, 6), patch_size=3),
}
SIZES = [(32, 48), (37, 53), (24, 17)]

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def _register_toy(monkeypatch):
    monkeypatch.setitem(registry.FAMILIES, "toy", "toy_encoder")


@torch.no_grad()
def build(config, **options):
    """An encoder, every parameter of which is random."""
    torch.manual_seed(0)
    encoder = registry.build(config, **options)
    for parameter in encoder.parameters():
        parameter.normal_(0.1, 0.3)
    return encoder


def draw_images(config, size=(37, 53), count=2):
    return torch.randn(count, config.in_channels, *size, generator=torch.Generator().manual_seed(1))


def loss_of(output):
    """A loss with a contribution of every output."""
    return output.features.sin().mean() + output.pooled.square().mean() + sum(map.cos().mean() for map in output.stages)


# --- from images to features -----------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_shapes(config, channels, size):
    """Channels and strides of the configuration are those of tokens, maps and pooled features, for any image size."""
    config = replace(config, in_channels=channels)
    encoder = build(config).eval()
    assert (encoder.channels, encoder.strides) == (config.channels, config.strides)
    assert (encoder.dim, encoder.stride) == (config.channels[-1], config.strides[-1])
    assert config.strides[0] == config.patch_size
    images = draw_images(config, size)
    with torch.no_grad():
        tokens = encoder.embed(images)
        output = encoder.encode(tokens, return_stages=True)
        whole = encoder(images)
    expected = [
        (2, dim, *(math.ceil(side / stride) for side in size)) for dim, stride in zip(config.channels, config.strides)
    ]
    assert tokens.permute(0, 3, 1, 2).shape == expected[0]
    assert [map.shape for map in output.stages] == expected
    assert output.features.shape == expected[-1] and output.pooled.shape == (2, config.channels[-1])
    if not getattr(config, "norm_after_pooling", False):
        torch.testing.assert_close(output.pooled, output.features.mean(dim=(2, 3)), atol=1e-6, rtol=1e-5)
    assert whole.stages is None and torch.equal(whole.features, output.features)
    with torch.no_grad():
        assert torch.equal(encoder.features(images), output.pooled)
        assert all(map(torch.equal, encoder.features(images, per_stage=True), output.stages))


@every_config
@pytest.mark.parametrize("shape", [(1, 5, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
def test_images_of_another_shape_are_refused(config, shape):
    with pytest.raises(ValueError, match=r"images have shape .*: this encoder takes \(batch, 3, height, width\)"):
        build(config).embed(torch.zeros(shape))


@every_config
def test_fixed_weights_change_no_result(config):
    encoder, images = build(config).eval(), draw_images(config)
    with torch.no_grad():
        expected = encoder(images).features
        with encoder.fixed_weights():
            assert torch.equal(encoder(images).features, expected) and torch.equal(encoder(images).features, expected)


# --- gradients -------------------------------------------------------------------------------------------------------


@every_config
def test_every_parameter_gets_a_gradient(config):
    encoder = build(config).train()
    loss_of(encoder(draw_images(config), return_stages=True)).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_config
def test_checkpointed_equals_plain(config):
    """Outputs and gradients. Every block runs again in the backward pass."""
    results = []
    for checkpointed in (False, True):
        encoder, images = build(config, checkpoint_activations=checkpointed).train(), draw_images(config)
        calls = []
        for block in encoder.blocks():
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        output = encoder(images, return_stages=True)
        loss_of(output).backward()
        assert len(calls) == config.num_blocks * (2 if checkpointed else 1)
        results.append({"features": output.features, **{name: p.grad for name, p in encoder.named_parameters()}})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-7, rtol=1e-6, msg=name)


def test_sequential_attention_needs_windows():
    assert registry.build(CONFIGS["swinv2"], sequential_attention=2).sequential_attention == 2
    with pytest.raises(ValueError, match="sequential_attention is 2: this encoder has no windows"):
        registry.build(CONFIGS["toy"], sequential_attention=2)


# --- parts and parameters --------------------------------------------------------------------------------------------


@every_config
def test_blocks_keep_the_shape_of_tokens(config):
    encoder = build(config).eval()
    assert len(encoder.blocks()) == config.num_blocks == encoder.num_layers
    shapes = []
    for block in encoder.blocks():
        block.register_forward_hook(lambda module, inputs, output: shapes.append((inputs[0].shape, output.shape)))
    encoder(draw_images(config))
    assert len(shapes) == config.num_blocks and all(before == after for before, after in shapes)


@every_config
def test_stages_are_named_in_order(config):
    """Blocks and downsamplings, as they are called."""
    encoder, called = build(config).eval(), []
    modules = encoder.named_stages()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    encoder(draw_images(config))
    assert called == list(modules)
    assert [module for name, module in modules.items() if ".block" in name] == encoder.blocks()


@every_config
def test_stages_hold_every_parameter_but_the_final_norm_once(config):
    encoder = build(config)
    assert len(encoder.stage_modules()) == len(config.channels)
    in_stages = [id(p) for stage in encoder.stage_modules() for module in stage for p in module.parameters()]
    assert len(in_stages) == len(set(in_stages))
    rest = {name for name, parameter in encoder.named_parameters() if id(parameter) not in in_stages}
    assert rest == {"norm.weight", "norm.bias"}


@every_config
def test_every_parameter_has_a_layer(config):
    """From the patch embedding to the final norm, each layer has one; layers rise from stage to stage."""
    encoder = build(config)
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert set(layers.values()) == set(range(encoder.num_layers + 2))
    assert layers[config.input_projection] == 0
    shared = {"position_bias.table"} & layers.keys()
    assert {name for name, layer in layers.items() if layer == encoder.num_layers + 1} == {
        "norm.weight",
        "norm.bias",
        *shared,
    }
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    for number, block in enumerate(encoder.blocks(), start=1):
        assert {layers[names[parameter]] for parameter in block.parameters()} == {number}
    for name in ("adapter.weight", "layers", ""):
        with pytest.raises(KeyError):
            encoder.layer_of(name)


@every_config
def test_patterns_without_decay_match(config):
    encoder = build(config)
    for pattern in encoder.no_decay():
        assert any(pattern in name for name, _ in encoder.named_parameters()), pattern


@every_config
def test_copies_and_pickles_are_whole(config):
    """A copy has the same kind, names and results."""
    encoder, images = build(config).eval(), draw_images(config)
    with torch.no_grad():
        expected = encoder(images).features
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert type(other) is type(encoder) and list(other.state_dict()) == list(encoder.state_dict())
            assert [type(module) for module in other.modules()] == [type(module) for module in encoder.modules()]
            assert torch.equal(other(images).features, expected)


# --- configurations --------------------------------------------------------------------------------------------------


@every_config
def test_configurations_survive_plain_values(config):
    values = registry.config_as_dict(config)
    assert values["family"] == registry.family_of(config).name
    assert not any(isinstance(value, tuple) for value in values.values())
    assert registry.config_from_dict(values) == config


def test_plain_values_without_a_family_are_swinv2():
    values = registry.config_as_dict(CONFIGS["swinv2"])
    del values["family"]
    assert registry.config_from_dict(values) == CONFIGS["swinv2"]


def test_presets_of_all_families():
    presets = registry.presets()
    assert presets["toy"] == ToyConfig() and presets["tiny"] == SwinV2Config.from_preset("tiny")
    families = [registry.load_family(name) for name in registry.FAMILIES]
    assert len(presets) == sum(len(family.presets) for family in families), "a name stands for one preset"
    for name, config in presets.items():
        assert registry.preset_name(replace(config, in_channels=7)) == name
        assert registry.preset_config(name, in_channels=7) == replace(config, in_channels=7)
    assert registry.preset_name(ToyConfig((4, 6))) is None


@every_config
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
def test_weights_adapt_to_other_channels(config, channels):
    """Images that are equal in all channels keep their tokens."""
    new_config = replace(config, in_channels=channels)
    encoder, adapted = build(config).eval(), registry.build(new_config).eval()
    state, notes = config.adapt_weights(encoder.state_dict(), new_config)
    assert notes == (() if channels == 3 else (f"3 input channels to {channels}",))
    adapted.load_state_dict(state)
    gray = torch.randn(2, 1, 24, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        actual, expected = adapted.embed(gray.expand(-1, channels, -1, -1)), encoder.embed(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: registry.load_family("toi"), "unknown encoder family 'toi'; did you mean 'toy'"),
        (lambda: registry.preset_config("tinny"), "unknown preset 'tinny'; did you mean 'tiny'"),
        (lambda: registry.preset_config("toj"), "unknown preset 'toj'; did you mean 'toy'"),
        (lambda: registry.preset_config("toy", width=(8,)), "unknown encoder setting 'width'; did you mean 'widths'"),
        (lambda: registry.config_from_dict({"family": "swimv2"}), "unknown encoder family 'swimv2'; did you mean 'swinv2'"),
        (lambda: registry.config_from_dict({"family": "toy", "window_size": 8}), "unknown encoder setting 'window_size'"),
        (lambda: registry.config_from_dict({"windw_size": 8}), "did you mean 'window_size'"),
        (lambda: registry.config_from_dict({"family": "toy", "widths": [8, 0]}), "give positive numbers"),
    ],
)
def test_unknown_names_suggest_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_configuration_of_no_family_is_refused(monkeypatch):
    monkeypatch.delitem(registry.FAMILIES, "toy")
    with pytest.raises(ValueError, match="ToyConfig belongs to no registered encoder family; known: swinv2, swin, vit"):
        registry.build(ToyConfig())


@every_config
def test_sizes_and_texts(config):
    """Fields that depend on the image size are fields; records of training sizes can be taken back."""
    assert replace(config, **config.fields_for_size((96, 64))).in_channels == config.in_channels
    assert type(config.adapt_to_size((64, 64), (128, 96))) is type(config)
    assert config.with_training_size((64, 96)).without_training_size() == config
    assert str(config.patch_size) in config.describe()
    assert config.is_small and 0 <= config.default_drop_path < 1


def test_windows_grow_with_images_up_to_the_largest_published():
    """12 at 192 px is 14 at 224 px and 24 at 384 px; larger images have windows of 24, or of what an encoder has already."""
    for trained, side, window, expected in ((192, 224, 12, 14), (192, 384, 12, 24), (192, 800, 12, 24), (64, 288, 30, 30)):
        config = SwinV2Config(window_size=window)
        assert config.adapt_to_size((trained, trained), (side, side)).window_size == expected
