"""SwinV2 under torchvision's names: the encoder of the same weights, with and without a prefix, head and other modules."""

import pytest
import torch
from random_encoders import randomize
from safetensors.torch import save_file

from simmim.checkpoints import read_encoder
from simmim.encoders.swinv2 import SwinV2, SwinV2Config

CONFIG = SwinV2Config(16, (1, 2, 1), (1, 2, 2), window_size=4, in_channels=9)
PARTS = {"patch_embed.proj.": "features.0.0.", "patch_embed.norm.": "features.0.2."}
INNER = {"mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3."}


def torchvision_state(encoder, prefix=""):
    """The weights as torchvision's SwinTransformer with SwinTransformerBlockV2 and PatchMergingV2 has them."""
    state = {}
    for name, value in encoder.state_dict().items():
        for ours, theirs in {**PARTS, **INNER}.items():
            name = name.replace(ours, theirs)
        parts = name.split(".")
        if parts[0] == "layers":
            stage = int(parts[1])
            place = [str(2 * stage + 1), *parts[3:]] if parts[2] == "blocks" else [str(2 * stage + 2), *parts[3:]]
            name = ".".join(["features", *place])
        state[prefix + name] = value.clone()
    for name in [name for name in state if name.endswith("q_bias")]:
        query, values = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([query, torch.randn_like(query), values])
        table = torch.zeros(1, 2 * CONFIG.window_size - 1, 2 * CONFIG.window_size - 1, 2)
        state[name.replace("q_bias", "relative_coords_table")] = table + 1  # log2(1 + 8) / 3 at its edge
        state[name.replace("q_bias", "relative_position_index")] = torch.zeros(256, dtype=torch.int64)
    return state


@pytest.mark.parametrize("prefix", ["", "backbone.backbone."])
def test_the_encoder_of_the_same_weights(prefix, tmp_path):
    torch.manual_seed(0)
    encoder = randomize(SwinV2(CONFIG)).eval()
    state = torchvision_state(encoder, prefix)
    state |= {"fpn.0.weight": torch.zeros(3)} if prefix else {"head.weight": torch.ones(3, 64), "head.bias": torch.ones(3)}
    save_file(state, tmp_path / "swin.safetensors")
    saved = read_encoder(tmp_path / "swin.safetensors")
    image = torch.randn(1, 9, 64, 64)
    with torch.no_grad():
        expected, output = encoder(image, return_stages=True), saved.encoder(image, return_stages=True)
    for found, right in zip((output.features, *output.stages), (expected.features, *expected.stages), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert saved.encoder.config.window_size == 4 and saved.provenance["origin"] == "torchvision's names"
    assert bool(saved.checkpoint.head) == (not prefix)
