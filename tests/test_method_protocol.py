"""What every method of pre-training promises (`simmim.methods.base`): all of them and a toy, on SwinV2 and a toy encoder."""

import pytest
import torch
import toy_encoder
from toy_method import ToyMethod, ToySettings

from simmim.encoders import registry as encoders
from simmim.encoders.swinv2 import SwinV2Config
from simmim.methods.canvas import Canvas, CanvasSettings
from simmim.methods.contrast import Contrast, ContrastSettings
from simmim.methods.registry import METHODS, method_named
from simmim.methods.simmim import SimMIM, SimMIMSettings
from simmim.training.optim import parameter_rules

SIZE = (32, 64)
METHOD_SETTINGS = {
    SimMIM: SimMIMSettings(),
    ToyMethod: ToySettings(),
    Canvas: CanvasSettings(share=2),
    Contrast: ContrastSettings(projector_dim=16, projection_dim=8, contrast_stages=2),
}
CONFIGS = {
    "swinv2": SwinV2Config(16, (1, 1), (1, 2), window_size=4, in_channels=2),
    "toy": toy_encoder.ToyConfig(widths=(6, 8), in_channels=2),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(encoders.FAMILIES, "toy", "toy_encoder")
    monkeypatch.setitem(METHODS, "toy", ("toy_method", "ToyMethod"))


PAIRS = [(method, name) for method in METHOD_SETTINGS for name in CONFIGS if (method, name) != (Canvas, "toy")]


@pytest.fixture(params=PAIRS, ids=str)
def method(request):
    """A method around an encoder."""
    kind, name = request.param
    torch.manual_seed(0)
    encoder = encoders.build(CONFIGS[name])
    return kind.build(encoder, METHOD_SETTINGS[kind].resolve(SIZE, encoder.config))


def images():
    return torch.randn(3, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def loss_of(method):
    """With as many views of an image as the method takes."""
    settings, seeds = METHOD_SETTINGS[type(method)], [1, 2, 3]
    sizes = settings.further_views(SIZE, method.encoder.config)
    generator = torch.Generator().manual_seed(2)
    views = method.change_views([torch.randn(3, 2, *size, generator=generator) for size in sizes], seeds)
    return method(images(), method.draw(SIZE, seeds, torch.device("cpu")), **({"views": views} if views else {})).loss


def test_draws_depend_on_the_seeds_of_an_input_alone(method):
    """On those of the images that the encoder takes as one: not on the batch that they are in, nor on global generators."""
    count = METHOD_SETTINGS[type(method)].images_per_input
    seeds = list(range(5, 5 + 3 * count))
    whole = method.draw(SIZE, seeds, torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(whole[count : 2 * count], method.draw(SIZE, seeds[count : 2 * count], torch.device("cpu")))
    assert torch.equal(whole, method.draw(SIZE, seeds, torch.device("cpu")))
    assert not torch.equal(whole[0], whole[count])


def test_every_parameter_gets_a_gradient(method):
    """But those that follow others and are no part of the method's own state."""
    for parameter in method.parameters():
        parameter.data.normal_(0, 0.1)  # SwinV2's blocks begin as identities
    loss = loss_of(method)
    loss.backward()
    assert loss.ndim == 0
    trained = {f"encoder.{name}" for name, _ in method.encoder.named_parameters()} | method.own_state().keys()
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_own_state_is_what_is_expected_and_loads(method):
    state = method.own_state()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    settings = METHOD_SETTINGS[type(method)]
    assert shapes == dict(method.expected_state(method.encoder.config, settings))
    assert not any(name.startswith("encoder.") for name in state)
    other = {name: torch.full_like(value, 2.0) for name, value in state.items()}
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    assert method.own_parts in method.load_own_state(other, {})
    assert all(torch.equal(method.own_state()[name], value) for name, value in other.items())
    assert all(torch.equal(method.encoder.state_dict()[name], value) for name, value in before.items())


def test_patterns_match_and_every_parameter_has_a_rule(method):
    rules = parameter_rules(method, 0.05, 0.5)
    assert rules.keys() == {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert all(rules[name].lr_scale == 1.0 for name in method.own_state())
    for pattern in (*method.no_decay(), *method.encoder.no_decay()):
        matched = [name for name in rules if pattern in name]
        assert matched and all(rules[name].weight_decay == 0.0 for name in matched)


def test_pixels_or_a_reason(method):
    """A reconstruction has the images' shape and scale; a method without one says so."""
    drawn = method.draw(SIZE, [1, 2, 3], torch.device("cpu"))
    if method.predicts_pixels:
        mask, prediction = method.reconstruct(images(), drawn)
        assert prediction.shape == images().shape
        assert mask.dtype == torch.bool and mask.shape == drawn.shape
    else:
        with pytest.raises(ValueError, match="predicts no pixels"):
            method.reconstruct(images(), drawn)


def test_what_follows_the_weights_moves_after_a_step(method):
    """Nothing that is trained, and all else; weights that are loaded are where it begins."""
    before = {name: value.clone() for name, value in method.state_dict().items()}
    frozen = {name for name, parameter in method.named_parameters() if not parameter.requires_grad}
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    method.after_step(0.5)
    for name, value in method.state_dict().items():
        moved = (value - before[name]).mean()
        assert 0 < moved < 1 if name in frozen else moved == 1, name
    method.weights_loaded()
    state = method.state_dict()
    assert all(torch.equal(state[name], state[name.removeprefix("momentum_")]) for name in frozen)


def test_it_describes_itself(method):
    assert method.describe(SIZE)
    assert method.provenance()
    settings = method.settings_from({**method.provenance(), "method": method.title, "steps": 7})
    assert method.expected_state(method.encoder.config, settings).keys() == method.own_state().keys()
    assert method.loss_name and method.loss_description and method.title


def test_names():
    for kind in METHOD_SETTINGS:
        assert method_named(kind.name) is kind
    with pytest.raises(ValueError, match="unknown method 'simmin'; did you mean 'simmim'"):
        method_named("simmin")
