"""The encoder as a whole: shapes of its outputs, independence of images and sizes, drop path and initial values."""

import math

import pytest
import torch
from random_encoders import random_images, randomized_swinv2

from simmim.encoders.layers import DropPath, project_patches, recompute
from simmim.encoders.shifted_windows.geometry import relative_position_index, shift_mask
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.encoders.swinv2.model import WindowAttention

SMALL = SwinV2Config(16, (2, 2), (2, 4), window_size=4)


# --- shapes and state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("patch_size, channels, size", [(2, 1, (40, 24)), (4, 3, (37, 53)), (8, 10, (64, 96))])
def test_shapes(stages, patch_size, channels, size):
    config = SwinV2Config(
        8, (2,) * stages, tuple(2**i for i in range(stages)), window_size=4, patch_size=patch_size, in_channels=channels
    )
    encoder = randomized_swinv2(config)
    assert config.strides == tuple(patch_size * 2**i for i in range(stages)) and encoder.stride == config.strides[-1]
    assert config.dims == tuple(8 * 2**i for i in range(stages)) and encoder.dim == config.dims[-1]
    with torch.no_grad():
        output = encoder(random_images(2, channels, *size), return_stages=True)
    for stage, dim, stride in zip(output.stages, config.dims, config.strides, strict=True):
        assert stage.shape == (2, dim, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
    assert output.features.shape == output.stages[-1].shape
    torch.testing.assert_close(output.pooled, output.features.mean(dim=(2, 3)), atol=1e-6, rtol=0)
    with torch.no_grad():
        normed = encoder.norm(output.stages[-1].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(output.features, normed, atol=1e-6, rtol=0)


def test_stages_only_on_request():
    assert randomized_swinv2(SMALL)(random_images(1, 3, 32, 32)).stages is None


def test_one_model_many_sizes():
    """Sizes leave no trace: bit-identical results on return, and a state dict of parameters alone."""
    encoder = randomized_swinv2(SMALL)
    names = list(encoder.state_dict())
    assert names == [name for name, _ in encoder.named_parameters()] and not list(encoder.buffers())
    images = {size: random_images(1, 3, *size) for size in [(48, 48), (37, 53), (16, 64)]}
    with torch.no_grad():
        first = encoder(images[48, 48]).features
        for other in images.values():
            encoder(other)
        assert torch.equal(encoder(images[48, 48]).features, first)
    assert list(encoder.state_dict()) == names


def test_batch_members_are_independent():
    encoder, images = randomized_swinv2(SMALL), random_images(3, 3, 40, 56)
    with torch.no_grad():
        together = encoder(images).features
        for i in range(3):
            torch.testing.assert_close(encoder(images[i : i + 1]).features[0], together[i], atol=1e-5, rtol=0)


def test_training_after_inference_mode():
    """Masks and coordinates first made in inference mode serve a backward pass later."""
    for cached in (log_spaced_coords, relative_position_index, shift_mask):
        cached.cache_clear()
    encoder, images = randomized_swinv2(SMALL), random_images(1, 3, 48, 48)
    with torch.inference_mode():
        encoder(images)
    encoder.train()(images).features.square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_checkpointed_equals_plain():
    """Outputs and gradients, with drop path drawing the same images in the recomputation."""
    config = SwinV2Config(16, (2, 2), (2, 4), window_size=4, drop_path_rate=0.5)
    images, results = random_images(4, 3, 48, 40), []
    for checkpointed in (False, True):
        encoder = randomized_swinv2(config, checkpoint_activations=checkpointed).train()
        torch.manual_seed(3)
        output = encoder(images, return_stages=True)
        (output.features.square().mean() + output.stages[0].sin().mean()).backward()
        results.append((output.features, {name: p.grad for name, p in encoder.named_parameters()}))
    (plain, gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(plain, recomputed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed_gradients[name], gradient, atol=1e-7, rtol=1e-6, msg=name)


@pytest.mark.parametrize("size", [(64, 96), (40, 72), (32, 80)])
def test_transposed_images_and_weights(size):
    """Rows and columns play the same part: 64 × 96 shifts in both axes, 40 × 72 pads too, 32 × 80 fits one axis."""
    config = SwinV2Config(16, (2, 2), (2, 4), window_size=5 if size == (40, 72) else 8, in_channels=2)
    encoder, turned = randomized_swinv2(config).double(), SwinV2(config).double().eval()
    weights = {}
    for name, value in encoder.state_dict().items():
        if name == "patch_embed.proj.weight":
            value = value.transpose(2, 3)
        elif name.endswith("cpb_mlp.0.weight"):
            value = value.flip(1)
        elif name.endswith("reduction.weight"):
            value = value.unflatten(1, (2, 2, -1)).transpose(1, 2).flatten(1)
        weights[name] = value
    turned.load_state_dict(weights)
    images = random_images(2, 2, *size, dtype=torch.float64)
    with torch.no_grad():
        output, mirrored = encoder(images, return_stages=True), turned(images.mT, return_stages=True)
        plain = encoder(images.mT).features.mT
    for a, b in zip((output.features, *output.stages), (mirrored.features, *mirrored.stages)):
        torch.testing.assert_close(b.mT, a, atol=1e-10, rtol=0)
    torch.testing.assert_close(mirrored.pooled, output.pooled, atol=1e-10, rtol=0)
    assert (plain - output.features).abs().max() > 0.1


def test_merging_column_order():
    """Published weights read the neighbors as (0, 0), (1, 0), (0, 1), (1, 1), row and column."""
    merging = SwinV2(SMALL).layers[0].downsample
    seen = []
    merging.reduction.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    merging(torch.arange(4.0).reshape(1, 2, 2, 1).expand(1, 2, 2, 16))
    assert seen[0][0, 0, 0, ::16].tolist() == [0.0, 2.0, 1.0, 3.0]


# --- drop path and initialization ----------------------------------------------------------------------------------


def test_drop_path_rates_rise_linearly():
    encoder = SwinV2(SwinV2Config(8, (2, 2, 6, 2), (1, 1, 1, 1), drop_path_rate=0.22))
    rates = [module.rate for module in encoder.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    single = SwinV2(SwinV2Config(8, (1,), (1,), drop_path_rate=0.2))
    assert single.layers[0].blocks[0].drop_path.rate == 0.0


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    drop = DropPath(0.3).train()
    out = drop(torch.ones(20000, 2, 3, 1)).flatten(1)
    assert torch.equal(out, out[:, :1].expand_as(out))
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.7])
    assert out.mean().item() == pytest.approx(1.0, abs=0.025)  # 5 standard errors
    x = random_images(4, 5)
    assert drop.eval()(x) is x and DropPath(0.0).train()(x) is x


def test_recompute_keeps_no_activations():
    """The function is computed again in the backward pass, and once where there is none."""
    calls, x = [], torch.ones(3, requires_grad=True)
    recompute(lambda x: calls.append(None) or x.exp(), x).sum().backward()
    assert len(calls) == 2 and torch.equal(x.grad, x.detach().exp())
    with torch.no_grad():
        recompute(lambda x: calls.append(None) or x.exp(), x)
    assert len(calls) == 3


def test_patches_of_images_that_are_channels_last_need_no_copy():
    torch.manual_seed(0)
    proj, images = torch.nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 16, 24)
    plain, kept = (project_patches(proj, images, channels_last) for channels_last in (False, True))
    torch.testing.assert_close(kept, plain)
    assert kept.is_contiguous() and not plain.is_contiguous()


def test_fresh_blocks_are_the_identity():
    encoder = SwinV2(SwinV2Config(32, (2, 2), (2, 4), window_size=4))
    for stage, dim in zip(encoder.layers, (32, 64)):
        for block in stage.blocks:
            assert not block.norm1.weight.any() and not block.norm2.weight.any()
            x = random_images(2, 6, 9, dim)
            assert torch.equal(block(x), x)


def test_initial_values():
    encoder = SwinV2(SwinV2Config(64, (2, 2), (2, 4)))
    for name, module in encoder.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, WindowAttention):
            assert torch.allclose(module.logit_scale, torch.tensor(10.0).log())
            assert not module.q_bias.any() and not module.v_bias.any() and module.qkv.bias is None
    assert (encoder.norm.weight == 1).all() and (encoder.patch_embed.norm.weight == 1).all()
    assert (encoder.layers[0].downsample.norm.weight == 1).all()


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 32, 32, 3)])
def test_images_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"this encoder takes \(batch, 3, height, width\)"):
        SwinV2(SMALL)(torch.zeros(shape))
