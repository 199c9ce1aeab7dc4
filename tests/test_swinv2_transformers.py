"""The encoder against transformers' Swinv2.

Where transformers (5.x, modeling_swinv2.py) departs from the paper, its reference code or ours:

- It fixes each stage's window when it is built, from `config.image_size` with the map's sides halved downwards, while
  merging pads and so halves upwards. At 120 px the third map is 8 × 8 and gets a window of 7, padded to 14
  (`test_transformers_window_follows_rounded_down_map`).
- Window and shift of both axes follow the map's height. A 4 × 16 map gets windows of 4 × 4 and a 16 × 4 one is padded
  to 16 × 8; an 8 × 16 map is not shifted at all. Ours choose per axis (`test_transformers_window_follows_height`).
- It adds the shift mask twice, so regions are 200 apart and not the reference's 100. Invisible until a trained
  temperature makes cosine logits differ by about as much (`test_shift_mask_is_added_once`).
- Logits and softmax run in the precision of the moment, so in bfloat16 under autocast; ours stay float32.
- It has no extra norm on the main path, so huge and the giants cannot be held in it.
- `hidden_states` of its model are taken after merging; before merging they come from its backbone. None are normed.

All comparisons here use sizes at which none of this matters, except the tests named.
"""

import pytest
import torch
from brute_force_attention import assert_brute_force
from random_encoders import random_images
from transformers_swinv2 import run_transformers, transformers_twin

from simmim.encoders.swinv2 import SwinV2Config


@torch.inference_mode()
def assert_same(theirs, ours, images, atol):
    features, pooled, stages = run_transformers(theirs, images)
    output = ours(images, return_stages=True)
    assert len(output.stages) == len(stages)
    for index, (expected, actual) in enumerate(zip(stages, output.stages)):
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=f"stage {index}")
    torch.testing.assert_close(output.features, features, atol=atol, rtol=0)
    torch.testing.assert_close(output.pooled, pooled, atol=atol, rtol=0)
    assert output.features.std() > 0.3  # nothing above compared zeros


@pytest.mark.parametrize(
    "preset, overrides, size",
    [
        ("tiny", {"window_size": 8}, (256, 256)),
        ("micro", {"window_size": 16}, (256, 256)),
        ("micro", {"window_size": 8}, (224, 224)),  # maps of 28 and 14 are padded to 32 and 16
        ("micro", {"window_size": 14, "pretrained_window_sizes": (12, 12, 12, 6)}, (224, 224)),
        ("micro", {"window_size": 24, "pretrained_window_sizes": (12, 12, 12, 6)}, (384, 384)),
        ("micro", {"window_size": 8, "in_channels": 1}, (288, 320)),  # padded in every stage, shifted in both axes
        ("base", {"window_size": 12}, (192, 192)),
        ("micro", {"window_size": 7, "patch_size": 2}, (110, 110)),  # odd window, odd maps
        ("micro", {"window_size": 8}, (254, 255)),  # the patch does not divide the image
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_equals_transformers(preset, overrides, size):
    config = SwinV2Config.from_preset(preset, **overrides)
    built_for = [-(-side // config.patch_size) * config.patch_size for side in size]
    if preset == "micro" and config.patch_size == 2:
        built_for = [112, 112]  # 55 halves to 28, 14, 7; transformers would count 27, 13, 6 (see the module docstring)
    theirs, ours = transformers_twin(config, built_for)
    assert_same(theirs, ours, random_images(1, config.in_channels, *size), atol=1e-4)


def test_equals_transformers_in_float64():
    config = SwinV2Config(32, (2, 2, 2), (2, 4, 8), window_size=6, pretrained_window_sizes=(8, 8, 4))
    theirs, ours = transformers_twin(config, (112, 144), max_logit_scale=6.0)  # many above the clamp at log 100
    theirs, ours = theirs.double(), ours.double()
    images = random_images(2, 3, 112, 144, dtype=torch.float64)
    assert_same(theirs, ours, images, atol=1e-10)
    with torch.inference_mode():  # the whole model, not the parts that run_transformers puts together
        assert torch.equal(theirs(images).pooler_output, run_transformers(theirs, images)[1])


def test_transformers_window_follows_rounded_down_map():
    """30, 15 and 8 tokens a side: built for 120 px transformers counts 30, 15, 7; built for 128 px it agrees with us."""
    config = SwinV2Config(16, (2, 2, 2), (2, 2, 2), window_size=8)
    images = random_images(1, 3, 120, 120)
    assert config.windows((120, 120)) == ((8, 8),) * 3
    theirs, ours = transformers_twin(config, 120)
    _, _, stages = run_transformers(theirs, images)
    with torch.inference_mode():
        mine = ours(images, return_stages=True).stages
    for stage in (0, 1):
        torch.testing.assert_close(mine[stage], stages[stage], atol=1e-4, rtol=0)
    assert (mine[2] - stages[2]).abs().max() > 0.1
    assert theirs.encoder.layers[2].blocks[0].window_size == 7
    assert_same(*transformers_twin(config, 128), images, atol=1e-4)


@pytest.mark.parametrize(
    "size, windows, their_window, their_shift", [((16, 4), (8, 4), 8, 4), ((4, 16), (4, 8), 4, 0), ((8, 16), (8, 8), 8, 0)]
)
def test_transformers_window_follows_height(size, windows, their_window, their_shift):
    """Where one axis fits a window transformers departs; ours chooses window and shift per axis and is checked here."""
    config = SwinV2Config(16, (2,), (2,), window_size=8)
    pixels = tuple(side * 4 for side in size)
    assert config.windows(pixels) == (windows,)
    theirs, ours = transformers_twin(config, pixels)
    block = theirs.encoder.layers[0].blocks[1]
    assert (block.window_size, block.shift_size) == (their_window, their_shift)
    images = random_images(1, 3, *pixels)
    with torch.inference_mode():
        assert (ours(images).features - run_transformers(theirs, images)[0]).abs().max() > 0.1
    shift = tuple(4 if side > 8 else 0 for side in size)
    assert_brute_force(ours.layers[0].blocks[1], size, windows, shift, windows)
