"""Windowed attention computed piece by piece in float64, without cyclic shift, attention mask or index table."""

import itertools
import math

import torch
import torch.nn.functional as F
from random_encoders import random_images


def brute_force_attention(block, x, window, shift, pretrained):
    """One image's windowed attention (H, W, C) in float64, without cyclic shift, mask or index.

    Shifted windows cut the zero-padded map at shift, shift + window, …; the pieces at the edges are smaller. Tokens
    attend to those of their own piece.
    """
    attn, size = block.attn, x.shape[:2]
    padded = [math.ceil(side / w) * w for side, w in zip(size, window)]
    x = F.pad(x, (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
    dim, heads = x.shape[-1], attn.num_heads
    weights = {name: value.double() for name, value in attn.state_dict().items()}
    pieces = {}
    for row, column in itertools.product(*map(range, padded)):
        piece = ((row - shift[0]) // window[0], (column - shift[1]) // window[1])
        pieces.setdefault(piece, []).append((row, column))
    out = torch.zeros_like(x)
    for tokens in pieces.values():
        places = torch.tensor(tokens)
        inside = x[places[:, 0], places[:, 1]]
        q, k, v = (inside @ weights["qkv.weight"].T).split(dim, dim=-1)
        q, v = q + weights["q_bias"], v + weights["v_bias"]
        offset = (places[:, None] - places[None, :]).double() * 8 / torch.tensor([max(p - 1, 1) for p in pretrained])
        coords = offset.sign() * torch.log2(1 + offset.abs()) / 3
        hidden = (coords @ weights["cpb_mlp.0.weight"].T + weights["cpb_mlp.0.bias"]).relu()
        bias = 16 / (1 + torch.exp(-(hidden @ weights["cpb_mlp.2.weight"].T)))
        mixed = []
        for head in range(heads):
            part = slice(head * dim // heads, (head + 1) * dim // heads)
            a, b = q[:, part], k[:, part]
            norms = a.norm(dim=-1)[:, None].clamp(min=1e-12) * b.norm(dim=-1)[None, :].clamp(min=1e-12)
            scale = min(math.exp(weights["logit_scale"][head].item()), 100.0)
            logits = scale * (a @ b.T) / norms + bias[..., head]
            share = torch.exp(logits - logits.amax(dim=1, keepdim=True))
            mixed.append(share / share.sum(dim=1, keepdim=True) @ v[:, part])
        out[places[:, 0], places[:, 1]] = torch.cat(mixed, -1) @ weights["proj.weight"].T + weights["proj.bias"]
    return out[: size[0], : size[1]]


@torch.no_grad()
def assert_brute_force(block, size, window, shift, pretrained):
    """Float64 within 1e-6: the coordinates are float32 by design, all else is float64."""
    block = block.double()
    # At 10 the mask's -100 leaks e⁻⁶⁴; the brute force has no leak.
    block.attn.logit_scale.clamp_(max=math.log(10))
    x = random_images(2, *size, block.norm1.weight.numel(), dtype=torch.float64)
    actual = block.windowed_attention(x)
    for image, result in zip(x, actual):
        expected = brute_force_attention(block, image, window, shift, pretrained)
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
