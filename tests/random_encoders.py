"""Encoders whose every parameter is random, so that each block changes the features, and random images."""

from contextlib import contextmanager
from unittest import mock

import torch

from simmim.checkpoints.checkpoint import Preprocessing
from simmim.encoders.swinv2 import SwinV2, SwinV2Config

CONFIG = SwinV2Config(16, (1, 2), (2, 2), window_size=4, in_channels=1, drop_path_rate=0.5)
GRAY = Preprocessing((32, 32), (0.13,), (0.31,))


@torch.no_grad()
def random_encoder(config=CONFIG, seed=0):
    """Weights of norms are around 1, all other parameters around 0."""
    generator = torch.Generator().manual_seed(seed)
    encoder = SwinV2(config)
    for name, parameter in encoder.named_parameters():
        parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.2, generator=generator)
    return encoder.eval()


@torch.no_grad()
def randomize(module, seed=0, max_logit_scale=3.5):
    """Give every parameter random values of a magnitude that matters for the output; returns the module.

    Args:
        max_logit_scale: upper end of the logit scales (logarithms). At the clamp, log 100, rounding in float32 is magnified.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("logit_scale"):
            parameter.uniform_(1.0, max_logit_scale, generator=generator)
        elif parameter.ndim == 1 and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.2, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return module


@contextmanager
def without_draws():
    """A module that is built here for `randomize` begins with zeros: drawing its values would take half of the time."""

    def zeros(tensor, *_, **__):
        # Not what is in memory: `trunc_normal_` draws again and again what is out of range.
        return tensor.zero_()

    with mock.patch.multiple(torch.Tensor, uniform_=zeros, normal_=zeros, erfinv_=zeros):
        yield


def randomized_swinv2(config, **kwargs):
    with without_draws():
        encoder = SwinV2(config, **kwargs)
    return randomize(encoder).eval()


def random_images(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
