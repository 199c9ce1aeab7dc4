"""SimMIM: what the prediction and the loss may see, the loss and the normalized target by brute force."""

import math

import pytest
import torch
from random_encoders import randomize
from transformers_swinv2 import from_transformers

from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.methods.masking import BlockMasking
from simmim.methods.pixels import masked_l1, sliding_statistics
from simmim.methods.simmim import SimMIM


@torch.no_grad()
def random_model(norm_target_patch=None, seed=0, **settings):
    """Stride 8 and unit 4 px unless told; every parameter moved off its start, so that no gradient is zero by design."""
    config = SwinV2Config(**{"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SimMIM(SwinV2(config), norm_target_patch)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def random_batch(batch, channels, height, width, unit_px=4, ratio=0.6, seed=1, patch_size=4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, channels, height, width, generator=generator)
    return images, BlockMasking(unit_px, ratio, patch_size).draw(batch, (height, width), generator)


def as_pixels(mask, patch_size=4):
    return mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]


# --- what depends on what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_target_patch", [None, 5])
@pytest.mark.parametrize("channels, size", [(1, (32, 48)), (4, (36, 36)), (3, (40, 28))])
def test_reconstruction_never_sees_masked_pixels(channels, size, norm_target_patch):
    """Other pixels under the mask: the same bits everywhere. Other visible pixels: another reconstruction."""
    model = random_model(norm_target_patch, in_channels=channels)
    images, mask = random_batch(2, channels, *size)
    hidden = as_pixels(mask)
    with torch.no_grad():
        before = model(images, mask, return_reconstruction=True)
        for noise in (torch.randn_like(images) * 100, torch.full_like(images, float("nan"))):
            changed = model(torch.where(hidden, noise, images), mask, return_reconstruction=True)
            assert torch.equal(changed.reconstruction, before.reconstruction)
            assert changed.loss != before.loss
        visible = model(torch.where(hidden, images, images + 1), mask, return_reconstruction=True)
    assert before.reconstruction.shape == images.shape
    assert (visible.reconstruction - before.reconstruction)[hidden.expand_as(images)].abs().mean() > 1e-3


def test_loss_never_sees_visible_pixels():
    """Neither reconstruction nor target there changes a bit of the loss, and the gradient is exactly zero."""
    images, mask = random_batch(3, 2, 24, 32)
    hidden = as_pixels(mask).expand_as(images)
    reconstruction = torch.randn_like(images).requires_grad_()
    loss = masked_l1(reconstruction, images, mask, 4)
    noise = torch.randn_like(images) * 1000
    assert torch.equal(masked_l1(torch.where(hidden, reconstruction, noise), images, mask, 4), loss)
    assert torch.equal(masked_l1(reconstruction, torch.where(hidden, images, noise), mask, 4), loss)
    assert not torch.equal(masked_l1(torch.where(hidden, noise, reconstruction), images, mask, 4), loss)
    loss.backward()
    assert (reconstruction.grad[~hidden] == 0).all()
    expected = torch.sign(reconstruction - images).detach() / hidden.sum()
    torch.testing.assert_close(reconstruction.grad[hidden], expected[hidden], atol=1e-9, rtol=1e-5)


def test_no_gradient_from_masked_pixels_through_the_encoder():
    model = random_model()
    images, mask = random_batch(2, 3, 32, 32)
    images.requires_grad_()
    model(images, mask, return_reconstruction=True).reconstruction.square().sum().backward()
    hidden = as_pixels(mask).expand_as(images)
    assert (images.grad[hidden] == 0).all() and images.grad[~hidden].abs().min() > 0


def test_mask_token_stands_at_masked_tokens_only():
    model = random_model()
    images, mask = random_batch(2, 3, 32, 40)
    tokens = model.encoder.embed(images)
    substituted = model.substitute(tokens, mask)
    assert torch.equal(substituted[~mask], tokens[~mask])
    assert torch.equal(substituted[mask], model.mask_token.expand_as(tokens[mask]))


@pytest.mark.parametrize("norm_target_patch", [None, 7])
@pytest.mark.parametrize("settings, size", [({"in_channels": 1}, (48, 32)), ({"in_channels": 4}, (36, 36))])
def test_every_parameter_gets_a_gradient(settings, size, norm_target_patch):
    model = random_model(norm_target_patch, **settings)
    model(*random_batch(2, settings["in_channels"], *size)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_fresh_model():
    """At the start: mask token of deviation 0.02, a finite loss, and a head sized by stride and channels."""
    model = SimMIM(SwinV2(SwinV2Config.from_preset("nano", in_channels=2)))
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.4)
    assert model.decoder.weight.shape == (8 * 8 * 2, 96)
    output = model(*random_batch(1, 2, 32, 32))
    assert output.reconstruction is None and output.loss.isfinite()


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, patch_size", [((2, 3, 16, 24), 4), ((1, 1, 18, 13), 4), ((3, 4, 8, 8), 2)])
def test_masked_l1_by_brute_force(shape, patch_size):
    generator = torch.Generator().manual_seed(0)
    reconstruction, target = torch.randn(2, *shape, generator=generator)
    rows, columns = (math.ceil(side / patch_size) for side in shape[2:])
    mask = torch.rand(shape[0], rows, columns, generator=generator) < 0.5
    total, count = 0.0, 0
    for image in range(shape[0]):
        for row in range(shape[2]):
            for column in range(shape[3]):
                if mask[image, row // patch_size, column // patch_size]:
                    error = reconstruction[image, :, row, column].double() - target[image, :, row, column].double()
                    total, count = total + error.abs().sum().item(), count + shape[1]
    assert masked_l1(reconstruction, target, mask, patch_size).item() == pytest.approx(total / count, rel=1e-6)


def test_masked_l1_of_nothing_and_everything():
    images, mask = random_batch(2, 3, 16, 16)
    assert masked_l1(images, images + 1, torch.zeros_like(mask), 4) == 0
    assert masked_l1(images, images + 1, torch.ones_like(mask), 4).item() == pytest.approx(1.0, rel=1e-6)


def test_masked_l1_is_a_mean_over_all_masked_pixels():
    """Not the mean of the images' means, and not over visible pixels."""
    mask = torch.tensor([[[True, False]], [[True, True]]])
    target = torch.zeros(2, 1, 1, 2)
    reconstruction = torch.tensor([[[[3.0, 100.0]]], [[[6.0, 9.0]]]])
    assert masked_l1(reconstruction, target, mask, 1).item() == pytest.approx((3 + 6 + 9) / 3, rel=1e-5)


@pytest.mark.parametrize("norm_target_patch", [None, 5])
@pytest.mark.parametrize("size", [(36, 36), (36, 44), (37, 30)])
def test_forward_at_sizes_the_stride_does_not_divide(size, norm_target_patch):
    """Stride 8: 36 px give 9 patches and 5 tokens, hence 40 px of which 36 count. At 37 × 30 even patches are cut."""
    model = random_model(norm_target_patch)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, *size, generator=generator)
    mask = torch.rand(2, *(math.ceil(side / 4) for side in size), generator=generator) < 0.6
    output = model(images, mask, return_reconstruction=True)
    assert output.reconstruction.shape == images.shape
    hidden = as_pixels(mask)[..., : size[0], : size[1]].expand_as(images)
    error = (output.reconstruction - model.targets(images)).abs()[hidden].double().mean()
    assert output.loss.item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("norm_target_patch", [None, 5])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_only_masked_cells_are_predicted(share, norm_target_patch):
    """Loss and every gradient equal those of predicting all pixels. Cells of 8 px are masked as a whole or not at all."""
    model = random_model(norm_target_patch).double()
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(3, 3, 40, 24, generator=generator).double()
    cells = torch.rand(3, 5, 3, generator=generator) < share
    mask = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(model.decoder.masked_cells(mask, images), cells)
    predicted = []
    model.decoder.register_forward_hook(lambda module, inputs, output: predicted.append(output[..., 0].numel()))
    found = []
    for whole in (False, True):
        model.zero_grad()
        output = model(images, mask, return_reconstruction=whole)
        output.loss.backward()
        found.append((output.loss.detach(), *(parameter.grad for parameter in model.parameters())))
    assert predicted == [cells.sum().item(), 3 * 5 * 3]
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=1e-9)


def test_all_cells_are_predicted_where_one_is_masked_in_part():
    model, images = random_model(), torch.zeros(1, 3, 16, 16)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert torch.equal(model.decoder.masked_cells(mask, images), torch.zeros(1, 2, 2, dtype=torch.bool))
    mask[0, 0, :2] = True
    assert model.decoder.masked_cells(mask, images) is None
    mask[0, 1, :2] = True
    assert model.decoder.masked_cells(mask, images).tolist() == [[[True, False], [False, False]]]
    assert model.decoder.masked_cells(mask, images[..., :15]) is None


def test_prediction_puts_each_token_on_its_cell():
    """Output (channel · stride + row) · stride + column of a token is that pixel of its cell."""
    model = random_model(in_channels=2)
    features = torch.randn(1, 32, 3, 4)
    image = model.decoder.predict(features, (24, 32))
    assert image.shape == (1, 2, 24, 32)
    for row, column, channel, p, q in [(0, 0, 0, 0, 0), (2, 1, 1, 3, 6), (1, 3, 0, 7, 2)]:
        pixels = model.decoder(features[0, :, row, column])
        actual = image[0, channel, row * 8 + p, column * 8 + q]
        torch.testing.assert_close(actual, pixels[(channel * 8 + p) * 8 + q], atol=1e-5, rtol=0)
    assert torch.equal(model.decoder.predict(features, (20, 29)), image[..., :20, :29])


def test_bfloat16_autocast_is_near_float32():
    model = random_model()
    images, mask = random_batch(2, 3, 64, 64)
    full = model(images, mask).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, mask).loss
        half.backward()
    assert half.dtype == torch.float32
    assert 0 < abs(half.item() - full.item()) < 0.01 * full.item()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 8, 8),
        torch.zeros(2, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, dtype=torch.bool),
        torch.zeros(2, 8, 9, dtype=torch.bool),
        torch.zeros(2, 64, dtype=torch.bool),
        torch.zeros(2, 32, 32, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype}-{tuple(mask.shape)}",
)
def test_other_masks_are_refused(mask):
    with pytest.raises(ValueError, match=r"expected bool \(2, 8, 8\), True = masked"):
        random_model()(torch.zeros(2, 3, 32, 32), mask)


# --- the normalized target -----------------------------------------------------------------------------------------


def brute_force_statistics(images, patch_px):
    """Mean and sqrt(unbiased variance + 1e-6) of each clipped square, in float64."""
    images, half = images.double(), patch_px // 2
    mean, deviation = torch.zeros_like(images), torch.zeros_like(images)
    for row in range(images.shape[2]):
        for column in range(images.shape[3]):
            square = images[..., max(row - half, 0) : row + half + 1, max(column - half, 0) : column + half + 1].flatten(2)
            mean[..., row, column] = square.mean(-1)
            deviation[..., row, column] = (square.var(-1, unbiased=True) + 1e-6).sqrt()
    return mean, deviation


@pytest.mark.parametrize("shape", [(2, 3, 13, 17), (1, 1, 6, 40), (1, 4, 9, 2)])
@pytest.mark.parametrize("patch_px", [3, 5, 47])
def test_sliding_statistics_by_brute_force(shape, patch_px):
    """Borders included; 47 px covers whole images. The mean of 30 would cost float32 the variance, were it not removed."""
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.5 + 30
    expected_mean, expected_deviation = brute_force_statistics(images, patch_px)
    mean, deviation = sliding_statistics(images, patch_px)
    assert mean.dtype == deviation.dtype == torch.float32 and mean.shape == deviation.shape == images.shape
    torch.testing.assert_close(mean.double(), expected_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(deviation.double(), expected_deviation, atol=2e-5, rtol=0)
    mean, deviation = sliding_statistics(images.double(), patch_px)
    torch.testing.assert_close(mean, expected_mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(deviation, expected_deviation, atol=1e-10, rtol=0)


def test_flat_images_have_finite_targets():
    """Where nothing varies the deviation is its floor of 1e-3 and the target zero."""
    model = random_model(47)
    images = torch.full((1, 3, 32, 32), 2.5)
    _, deviation = sliding_statistics(images, 47)
    torch.testing.assert_close(deviation, torch.full_like(images, 1e-3), atol=1e-6, rtol=0)
    assert model.targets(images).abs().max() < 1e-3


def test_raw_targets_are_the_images():
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(random_model().targets(images), images)


@pytest.mark.parametrize("patch_px", [46, 2, 1, 0, -3])
def test_patches_without_a_center_are_refused(patch_px):
    with pytest.raises(ValueError, match=f"norm_target_patch is {patch_px}: give an odd number of pixels"):
        random_model(patch_px)


@pytest.mark.parametrize("norm_target_patch", [None, 5, 47])
def test_reconstruct_inverts_normalized_targets(norm_target_patch, monkeypatch):
    """A model that predicted the targets perfectly would reconstruct the images."""
    model = random_model(norm_target_patch)
    images, mask = random_batch(2, 3, 36, 40)
    images = images * 0.3 + 1
    monkeypatch.setattr(model.decoder, "predict", lambda features, size: model.targets(images))
    torch.testing.assert_close(model.reconstruct(images, mask).prediction, images, atol=1e-5, rtol=0)
    assert model(images, mask).loss == 0


def test_reconstruct_is_the_prediction_put_to_scale():
    images, mask = random_batch(2, 3, 32, 32)
    raw, normalized = random_model(), random_model(5)
    mean, deviation = sliding_statistics(images, 5)
    with torch.no_grad():
        prediction = raw(images, mask, return_reconstruction=True).reconstruction
    assert torch.equal(raw.reconstruct(images, mask).prediction, prediction)
    torch.testing.assert_close(
        normalized.reconstruct(images, mask).prediction, mean + deviation * prediction, atol=1e-5, rtol=0
    )
    assert not raw.reconstruct(images, mask).prediction.requires_grad


# --- parity --------------------------------------------------------------------------------------------------------


def test_equals_transformers():
    """Loss and reconstruction of Swinv2ForMaskedImageModeling, for square images and raw targets, all it knows."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Swinv2ForMaskedImageModeling(
        transformers.Swinv2Config(
            image_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, encoder_stride=8, num_channels=2
        )
    )
    randomize(theirs).eval()
    weights = theirs.state_dict()
    inner = {key.removeprefix("swinv2."): weights.pop(key) for key in list(weights) if key.startswith("swinv2.")}
    token = inner.pop("embeddings.mask_token").flatten()
    model = random_model(in_channels=2)
    config = model.encoder.config
    encoder = {f"encoder.{key}": value for key, value in from_transformers(inner, config).items()}
    head = {"decoder.weight": weights["decoder.0.weight"].flatten(1), "decoder.bias": weights["decoder.0.bias"]}
    model.load_state_dict({**encoder, **head, "mask_token": token})
    images, mask = random_batch(2, 2, 64, 64, unit_px=16)
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=mask.flatten(1))
        actual = model(images, mask, return_reconstruction=True)
    torch.testing.assert_close(actual.reconstruction, expected.reconstruction, atol=1e-4, rtol=0)
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
