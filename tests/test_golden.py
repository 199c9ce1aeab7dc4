"""The reference implementation's numbers, with every parameter random, reproduced (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.methods.pixels import masked_l1
from simmim.methods.simmim import SimMIM

GOLDEN = Path(__file__).parent / "golden"


def read(name):
    with safe_open(GOLDEN / name, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def to_our_names(tensors, prefix):
    """The reference keeps the mask token in the encoder and its head is a 1 × 1 convolution in a Sequential."""
    ours = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).replace("decoder.0.", "decoder.")
            if name == "encoder.mask_token":
                name, value = "mask_token", value.flatten()
            if name == "decoder.weight":
                value = value.flatten(1)
            ours[name] = value
    return ours


def encoder_config(metadata, **more):
    return SwinV2Config(
        metadata["embed_dim"], metadata["depths"], metadata["num_heads"], window_size=metadata["window_size"], **more
    )


@pytest.fixture(autouse=True, params=["kernels", "reference implementation"])
def _mode(request):
    """Everything by the kernels of a CPU, and by the lines that every device runs."""
    if request.param == "reference implementation":
        request.getfixturevalue("reference_implementation")


@pytest.fixture(scope="module")
def simmim_golden():
    metadata, tensors = read("simmim_swinv2_micro.safetensors")
    model = SimMIM(build(encoder_config(metadata)))
    model.load_state_dict(to_our_names(tensors, "model."))
    return model, tensors


def test_features_and_reconstruction(simmim_golden):
    model, golden = simmim_golden
    images, mask = golden["input.image"], golden["input.mask"].bool()
    with torch.no_grad():
        features = model.encoder.encode(model.substitute(model.encoder.embed(images), mask)).features
        output = model(images, mask, return_reconstruction=True)
    torch.testing.assert_close(features, golden["output.features"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.reconstruction, golden["output.reconstruction"], atol=5e-5, rtol=0)


def test_loss_and_every_gradient(simmim_golden):
    model, golden = simmim_golden
    model.zero_grad()
    loss = model(golden["input.image"], golden["input.mask"].bool()).loss
    loss.backward()
    assert abs(loss.item() - golden["output.loss_l1"].item()) < 1e-5
    expected = to_our_names(golden, "grad.")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-4 * expected[name].norm(), name


@pytest.mark.parametrize("_mode", ["kernels"], indirect=True)  # which a compiler does not see
def test_traced_by_the_compiler(simmim_golden):
    """As torch.compile sees the model, forward and backward; what it makes of that is not ours to test."""
    model, golden = simmim_golden
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = compiled(golden["input.image"], golden["input.mask"].bool()).loss
    loss.backward()
    assert abs(loss.item() - golden["output.loss_l1"].item()) < 1e-5
    for name, expected in to_our_names(golden, "grad.").items():
        assert (model.get_parameter(name).grad - expected).norm() <= 5e-4 * expected.norm(), name


def test_normalized_target_and_its_loss(simmim_golden):
    model, golden = simmim_golden
    images, mask = golden["input.image"], golden["input.mask"].bool()
    model = SimMIM(model.encoder, norm_target_patch=47)
    targets = model.targets(images)
    torch.testing.assert_close(targets, golden["output.normalized_target"], atol=5e-5, rtol=0)
    loss = masked_l1(golden["output.reconstruction"], targets, mask, patch_size=4)
    assert abs(loss.item() - golden["output.loss_l1_normalized_target"].item()) < 1e-5


def test_window_transfer():
    metadata, golden = read("classifier_swinv2_micro_window_transfer.safetensors")
    encoder = build(encoder_config(metadata, pretrained_window_sizes=metadata["pretrained_window_sizes"]))
    weights = to_our_names(golden, "model.")
    head_weight, head_bias = weights.pop("head.weight"), weights.pop("head.bias")
    encoder.load_state_dict(weights)
    with torch.no_grad():
        pooled = encoder(golden["input.image"]).pooled
    torch.testing.assert_close(pooled, golden["output.pooled"], atol=5e-5, rtol=0)
    torch.testing.assert_close(pooled @ head_weight.T + head_bias, golden["output.logits"], atol=5e-5, rtol=0)
