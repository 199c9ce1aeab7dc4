"""transformers' Swinv2Model as a reference: with the weights of an encoder of ours, and its outputs in our shapes."""

import pytest
import torch
from random_encoders import randomize, without_draws

from simmim.checkpoints.formats.swinv2.huggingface import TABLE
from simmim.encoders.swinv2 import SwinV2


def from_transformers(state, config):
    """transformers' state dict under our names: strict on both sides, query, key and value joined."""
    ours, left = TABLE.to_ours(state, config)
    assert not left
    return ours


def transformers_model(config, image_size, max_logit_scale=3.5):
    """A random Swinv2Model of an architecture, built for `image_size`."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Swinv2Config(
        image_size=image_size,
        patch_size=config.patch_size,
        num_channels=config.in_channels,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        pretrained_window_sizes=config.pretrained_window_sizes or (0,) * len(config.depths),
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=0.0,
    )
    with without_draws():
        model = transformers.Swinv2Model(theirs)
    return randomize(model, max_logit_scale=max_logit_scale).eval()


def transformers_twin(config, image_size, max_logit_scale=3.5):
    """A random Swinv2Model built for `image_size` and our encoder with the same weights."""
    theirs = transformers_model(config, image_size, max_logit_scale)
    with torch.device("meta"):
        ours = SwinV2(config)
    ours.load_state_dict(from_transformers(theirs.state_dict(), config), assign=True)
    return theirs, ours.eval()


@torch.inference_mode()
def run_transformers(theirs, images):
    """(features, pooled, stage maps before merging) in our shapes."""
    tokens, size = theirs.embeddings(images)
    encoded = theirs.encoder(
        tokens, size, output_hidden_states=True, output_hidden_states_before_downsampling=True, return_dict=True
    )
    stages = encoded.reshaped_hidden_states[1:]
    features = theirs.layernorm(encoded.last_hidden_state).transpose(1, 2)
    return features.reshape(stages[-1].shape), theirs.pooler(features).flatten(1), stages
