"""The numbers of the SimMIM paper's own encoders, Swin and ViT, from its authors' code (tests/golden/README.md)."""

import re

import pytest
import torch
from conversion import GOLDEN, golden
from safetensors import safe_open

from simmim.encoders.registry import build
from simmim.encoders.swin import SwinConfig
from simmim.encoders.vit import ViTConfig
from simmim.methods.simmim import SimMIM


def our_names(tensors, prefix):
    """The authors' names to ours: mask token and decoder by the method, the rest by the encoder."""
    ours = {}
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name == "head.weight" or name == "head.bias":
            continue
        if name == "encoder.mask_token":
            name, value = "mask_token", value.flatten()
        elif name.startswith("decoder.0."):
            name, value = name.replace(".0.", "."), value.flatten(1) if name.endswith("weight") else value
        if "cls_token" in name:
            value = value.flatten()
        if not any(".blocks." in name for name in tensors if ".layers." in name):
            for pattern, ours_name in VIT_NAMES.items():
                name = re.sub(pattern, ours_name, name)
        ours[name] = value
    return ours


def swin(sizes):
    return SwinConfig(
        sizes["embed_dim"],
        sizes["depths"],
        sizes["num_heads"],
        sizes["window_size"],
        image_size=(sizes["image_size"],) * 2,
    )


def vit(sizes, **more):
    return ViTConfig(
        sizes["embed_dim"],
        sizes["depth"],
        sizes["num_heads"],
        sizes["patch_size"],
        layer_scale=sizes["init_values"],
        image_size=(sizes["image_size"],) * 2,
        **more,
    )


# The authors' names of ViT's parts, and ours.
VIT_NAMES = {
    r"\bcls_token$": "patch_embed.class_token",
    r"\brel_pos_bias\.relative_position_bias_table$": "position_bias.table",
    r"\bblocks\.": "layers.",
    r"\brelative_position_bias_table$": "position_bias.table",
    r"\bfc_norm\.": "norm.",
}
PRETRAINED = {
    "swin": ("simmim_swin_v1_micro.safetensors", swin),
    "vit": ("simmim_vit_micro_shared_rpb.safetensors", vit),
}


@pytest.fixture(scope="module", params=PRETRAINED)
def pretrained(request):
    """The SimMIM model and the golden numbers."""
    file, config = PRETRAINED[request.param]
    metadata, tensors = golden(file)
    model = SimMIM(build(config(metadata["sizes"])))
    model.load_state_dict(our_names(tensors, "model."))
    return model, tensors


def test_features_and_reconstruction(pretrained):
    model, numbers = pretrained
    images, mask = numbers["input.image"], numbers["input.mask"].bool()
    with torch.no_grad():
        features = model.encoder.encode(model.substitute(model.encoder.embed(images), mask)).features
        output = model(images, mask, return_reconstruction=True)
    torch.testing.assert_close(features, numbers["output.features"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.reconstruction, numbers["output.reconstruction"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("option", ["plain", "sequential"])
def test_loss_and_every_gradient(pretrained, option):
    model, numbers = pretrained
    if option == "sequential" and not model.encoder.supports_sequential_attention:
        pytest.skip("no windows")
    model.encoder.save_memory(True, 3 if option == "sequential" else None)
    model.train().zero_grad()
    images, mask = numbers["input.image"], numbers["input.mask"].bool()
    output = model(images, mask, return_reconstruction=True)
    assert abs(output.loss.item() - numbers["output.loss_l1"].item()) < 1e-5
    # One pixel of Swin's prediction is within 4e-7 of its target, less than rounding, and on the other side of it there. The
    # gradient of its error is a sign, so the signs are those of the golden reconstruction.
    patch = model.encoder.config.patch_size
    masked = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    signs = (numbers["output.reconstruction"] - images).sign() * masked
    output.reconstruction.backward(signs / (masked.sum() + 1e-5) / images.shape[1])
    expected = our_names(numbers, "grad.")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 5e-4 * expected[name].norm(), name


CLASSIFIERS = {
    "swin": ("classifier_swin_v1_micro.safetensors", swin),
    "vit": (
        "classifier_vit_micro_rpb.safetensors",
        lambda sizes: vit(sizes, position_bias="blocks", norm_after_pooling=True),
    ),
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_logits(family):
    """Of the fine-tuned layout: ViT with a position bias a block, and a norm after pooling."""
    sizes = golden(PRETRAINED[family][0])[0]["sizes"]
    file, config = CLASSIFIERS[family]
    with safe_open(GOLDEN / file, "pt") as opened:
        numbers = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    encoder = build(config(sizes)).eval()
    encoder.load_state_dict(our_names(numbers, "model."))
    with torch.no_grad():
        logits = encoder(numbers["input.image"]).pooled @ numbers["model.head.weight"].T + numbers["model.head.bias"]
    torch.testing.assert_close(logits, numbers["output.logits"], atol=5e-5, rtol=0)
