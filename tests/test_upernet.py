"""The segmentation heads: equal to transformers' weight by weight, for any number of stages and any batch."""

import pytest
import torch
from torch import nn

from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.finetune.segmentation.model import HeadShape, Segmenter
from simmim.finetune.segmentation.upernet import FCN, UPerNet

CHANNELS = (16, 32, 64, 128)


def maps(batch=2, side=16, channels=CHANNELS):
    torch.manual_seed(1)
    return [torch.randn(batch, count, side >> stage, side >> stage) for stage, count in enumerate(channels)]


def transformers_name(name):
    """The name of a parameter in transformers' heads."""
    parts = name.split(".")
    inner = {"0": "conv", "1": "batch_norm"}
    if parts[0] == "classify":
        return "classifier." + parts[1]
    if parts[0] == "pools":
        return f"psp_modules.{parts[1]}.1.{inner[parts[3]]}.{parts[4]}"
    if parts[0] in ("pyramid", "fuse"):
        return f"{ {'pyramid': 'bottleneck', 'fuse': 'fpn_bottleneck'}[parts[0]] }.{inner[parts[1]]}.{parts[2]}"
    if parts[0] == "convolve":
        return f"convs.0.{inner[parts[1]]}.{parts[2]}"
    return f"{ {'laterals': 'lateral_convs', 'outputs': 'fpn_convs'}[parts[0]] }.{parts[1]}.{inner[parts[2]]}.{parts[3]}"


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


@pytest.mark.parametrize("training", [True, False])
def test_heads_equal_those_of_transformers(training):
    """With batch norms and without dropout, and the same weights, logits and gradients are transformers'."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    config = UperNetConfig(hidden_size=32, num_labels=5, pool_scales=(1, 2, 3, 6), auxiliary_channels=16)
    features = maps()
    for ours, reference in (
        (UPerNet(CHANNELS, 5, 32, "batch", dropout=0.0), UperNetHead(config, list(CHANNELS))),
        (FCN(CHANNELS[2], 5, 16, "batch", dropout=0.0), UperNetFCNHead(config, list(CHANNELS))),
    ):
        randomize(ours).train(training)
        state = {transformers_name(name): value for name, value in ours.state_dict().items()}
        # transformers registers each pooling's parts under a second name.
        reference.load_state_dict(state, strict=True)
        reference.train(training)
        expected = reference(features)
        found = ours(features if isinstance(ours, UPerNet) else features[2])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        gradients = dict(reference.named_parameters())
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[transformers_name(name)].grad, atol=1e-4, rtol=1e-4)


def test_a_batch_of_one_trains_like_any_other():
    """With norms of each image, its logits do not depend on the other images of the batch, even in training."""
    head = randomize(UPerNet(CHANNELS, 3, 32, "image", dropout=0.0)).train()
    features = maps(batch=3)
    together = head(features)
    for row in range(3):
        torch.testing.assert_close(head([one[row : row + 1] for one in features]), together[row : row + 1])
    assert together.isfinite().all() and together.std() > 0


@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize("depths", [(1,), (1, 1), (1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1)])
def test_any_number_of_stages_and_any_size(depths, norm):
    config = SwinV2Config(16, depths, tuple(2**stage for stage in range(len(depths))), window_size=4, in_channels=2)
    model = Segmenter(randomize(SwinV2(config)), 4, HeadShape(16, norm, 0.0)).train()
    images = torch.randn(2, 2, 40, 56)
    output = model(images, with_auxiliary=True)
    assert output.logits.shape == (2, 4, 10, 14)
    stage = max(0, len(depths) - 2)
    assert output.auxiliary.shape == (2, 4, -(-10 // 2**stage), -(-14 // 2**stage))
    torch.testing.assert_close(model(images), output.logits)
    (output.logits.square().mean() + output.auxiliary.square().mean()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [], "every parameter has a gradient, which distributed training needs"


def test_maps_are_normalized():
    model = Segmenter(randomize(SwinV2(SwinV2Config(16, (1, 1), (1, 2), window_size=4))), 2, HeadShape(width=16))
    images = torch.randn(1, 3, 32, 32)
    first, last = model.maps(images)
    torch.testing.assert_close(first.mean(dim=1), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.var(dim=1, unbiased=False), torch.ones(1, 8, 8), atol=1e-2, rtol=0)
    assert isinstance(model.norms[0], nn.LayerNorm) and len(model.norms) == 1
    assert torch.equal(last, model.encoder(images).features)


@pytest.mark.parametrize("width, norm, message", [(40, "image", "multiple of 16"), (32, "layer", "batch, image")])
def test_impossible_heads_are_refused(width, norm, message):
    with pytest.raises(ValueError, match=message):
        UPerNet(CHANNELS, 3, width, norm)
