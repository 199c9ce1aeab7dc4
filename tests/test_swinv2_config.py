"""SwinV2's configuration: presets against the paper, and settings that are refused with what to do."""

import pytest
import torch
from random_encoders import random_images, randomized_swinv2

from simmim.encoders.swinv2 import PRESETS, SwinV2, SwinV2Config

# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, millions",
    [
        ("tiny", 27.58),
        ("small", 48.96),
        ("base", 86.89),
        ("large", 195.20),
        ("huge", 655.21),
        ("giant-1b", 1060.98),
        ("giant-3b", 2997.82),
    ],
)
def test_parameter_count(preset, millions):
    with torch.device("meta"):
        encoder = SwinV2(SwinV2Config.from_preset(preset, extra_norm_every=0))
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("preset", PRESETS)
def test_extra_norms(preset):
    """After every 6th block of the third stage of huge and the giants; nowhere else."""
    with torch.device("meta"):
        encoder = SwinV2(PRESETS[preset])
    found = [name for name, _ in encoder.named_parameters() if "norm3" in name and name.endswith("weight")]
    count = {"huge": 3, "giant-1b": 3, "giant-3b": 7}.get(preset, 0)
    assert found == [f"layers.2.blocks.{6 * i + 5}.norm3.weight" for i in range(count)]


def test_extra_norm_acts_on_the_main_path():
    encoder = randomized_swinv2(SwinV2Config(8, (2, 2, 2, 2), (1, 1, 1, 1), window_size=4, extra_norm_every=2))
    assert [name for name in encoder.state_dict() if "norm3.weight" in name] == ["layers.2.blocks.1.norm3.weight"]
    norm = encoder.layers[2].blocks[1].norm3
    with torch.no_grad():
        norm.weight.fill_(1.0), norm.bias.zero_()
        last = encoder(random_images(1, 3, 64, 64), return_stages=True).stages[2]
    torch.testing.assert_close(last.mean(dim=1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.var(dim=1, unbiased=False), torch.ones(1, 4, 4), atol=1e-3, rtol=0)


def test_presets_survive_plain_values():
    for config in PRESETS.values():
        assert SwinV2Config(**config.as_dict()) == config


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, overrides, message",
    [
        ("tyni", {}, "unknown preset 'tyni'; did you mean 'tiny'"),
        ("Base", {}, "did you mean 'base'"),
        ("giant", {}, "did you mean 'giant-"),
        ("zzz", {}, "known: base, giant-1b"),
        ("tiny", {"windw_size": 8}, "unknown encoder setting 'windw_size'; did you mean 'window_size'"),
        ("tiny", {"drop_path": 0.1}, "did you mean 'drop_path_rate'"),
    ],
)
def test_unknown_names_suggest_the_nearest(preset, overrides, message):
    with pytest.raises(ValueError, match=message):
        SwinV2Config.from_preset(preset, **overrides)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depths": ()}, "1 to 5 stages"),
        ({"depths": (1,) * 6, "num_heads": (1,) * 6}, "1 to 5 stages"),
        ({"depths": (2, 0), "num_heads": (1, 1)}, "at least one block"),
        ({"num_heads": (3, 6, 12)}, "one number of heads per stage"),
        ({"num_heads": (5, 6, 12, 24)}, "5 heads do not divide a stage's 96 channels"),
        ({"num_heads": (0, 6, 12, 24)}, "0 heads"),
        ({"pretrained_window_sizes": (8, 8)}, "4 in all"),
        ({"pretrained_window_sizes": (8, 8, 8, 0)}, "one positive size per stage"),
        ({"window_size": 0}, "window_size is 0: give a positive number"),
        ({"patch_size": -4}, "patch_size is -4"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"drop_path_rate": 1.0}, "probability in"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"extra_norm_every": -1}, "extra_norm_every is -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SwinV2Config(**settings)
