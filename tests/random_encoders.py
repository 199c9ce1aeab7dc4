"""Encoders whose every parameter is random, so that each block changes the features."""

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
