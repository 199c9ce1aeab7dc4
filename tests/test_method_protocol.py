"""What every method of pre-training promises (`simmim.methods.base`): SimMIM and a toy, on SwinV2 and a toy encoder."""

import pytest
import torch
import toy_encoder
from toy_method import ToyMethod, ToySettings

from simmim.encoders import registry as encoders
from simmim.encoders.swinv2 import SwinV2Config
from simmim.methods.registry import METHODS, method_named
from simmim.methods.simmim import SimMIM, SimMIMSettings
from simmim.training.optim import parameter_rules

SIZE = (32, 48)
METHOD_SETTINGS = {SimMIM: SimMIMSettings(), ToyMethod: ToySettings()}
CONFIGS = {
    "swinv2": SwinV2Config(16, (1, 1), (1, 2), window_size=4, in_channels=2),
    "toy": toy_encoder.ToyConfig(widths=(6, 8), in_channels=2),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(encoders.FAMILIES, "toy", "toy_encoder")
    monkeypatch.setitem(METHODS, "toy", ("toy_method", "ToyMethod"))


@pytest.fixture(params=[(method, name) for method in METHOD_SETTINGS for name in CONFIGS], ids=str)
def method(request):
    """A method around an encoder."""
    kind, name = request.param
    torch.manual_seed(0)
    encoder = encoders.build(CONFIGS[name])
    return kind.build(encoder, METHOD_SETTINGS[kind].resolve(SIZE, encoder.config))


def images():
    return torch.randn(3, 2, *SIZE, generator=torch.Generator().manual_seed(1))


def test_draws_depend_on_an_image_s_seed_alone(method):
    """Not on the batch that it is in, nor on global generators."""
    whole = method.draw(SIZE, [5, 6, 7], torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(whole[1:2], method.draw(SIZE, [6], torch.device("cpu")))
    assert torch.equal(whole, method.draw(SIZE, [5, 6, 7], torch.device("cpu")))
    assert not torch.equal(whole[0], whole[1])


def test_every_parameter_gets_a_gradient(method):
    for parameter in method.parameters():
        parameter.data.normal_(0, 0.1)  # SwinV2's blocks begin as identities
    loss = method(images(), method.draw(SIZE, [1, 2, 3], torch.device("cpu"))).loss
    loss.backward()
    assert loss.ndim == 0
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_own_state_is_what_is_expected_and_loads(method):
    state = method.own_state()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == dict(method.expected_state(method.encoder.config))
    assert not any(name.startswith("encoder.") for name in state)
    other = {name: torch.full_like(value, 2.0) for name, value in state.items()}
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    assert method.own_parts in method.load_own_state(other, {})
    assert all(torch.equal(method.own_state()[name], value) for name, value in other.items())
    assert all(torch.equal(method.encoder.state_dict()[name], value) for name, value in before.items())


def test_patterns_match_and_every_parameter_has_a_rule(method):
    rules = parameter_rules(method, 0.05, 0.5)
    assert rules.keys() == dict(method.named_parameters()).keys()
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


def test_it_describes_itself(method):
    assert method.describe(SIZE)
    assert method.provenance()
    assert method.loss_name and method.loss_description and method.title


def test_names():
    assert method_named("simmim") is SimMIM and method_named("toy") is ToyMethod
    with pytest.raises(ValueError, match="unknown method 'simmin'; did you mean 'simmim'"):
        method_named("simmin")
