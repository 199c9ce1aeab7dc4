"""Heads that make class logits of what an encoder returns.

A linear head, `nn.Linear`, reads the pooled features. An attentive one has a few learned queries that attend over all tokens
of the last map, and a linear layer on what they gather: attentive probing as studied in arXiv 2506.10178, which frees the
read-out from the mean over the map. Keys and values are the tokens themselves, so that a query of zeros gathers their mean.

Shape letters: B images, H W height and width of a map in tokens, N = H · W, C channels, M queries, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simmim.encoders.base import EncoderOutput

HEADS = ("linear", "attentive")
NUM_QUERIES = 4


class AttentiveHead(nn.Linear):
    """A linear layer on the concatenation of what M queries gather.

    It is `nn.MultiheadAttention` with one head of C channels and without projections, before a linear layer.

    Args:
        dim: C.
        num_classes: K.
        num_queries: M.

    Attributes:
        queries: (M, C), zeros at first, so that training begins with mean pooling.
        weight, bias: (K, M · C) and (K,).
    """

    def __init__(self, dim: int, num_classes: int, num_queries: int = NUM_QUERIES) -> None:
        super().__init__(num_queries * dim, num_classes)
        self.queries = nn.Parameter(torch.zeros(num_queries, dim))

    def gather(self, features: Tensor) -> Tensor:
        """What the queries gather of a map, (B, C, H, W): (B, M · C)."""
        return attend(self.queries, features.flatten(2).transpose(1, 2)).flatten(1)


def attend(queries: Tensor, tokens: Tensor) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762, equation 1) of queries, (M, C), over tokens, (B, N, C), which are keys
    and values: (B, M, C)."""
    scores = tokens @ queries.to(tokens.dtype).T * queries.shape[-1] ** -0.5
    # The softmax in float32, as PyTorch's autocast has it.
    return scores.transpose(1, 2).float().softmax(dim=-1).to(tokens.dtype) @ tokens


def build_head(kind: str, dim: int, num_classes: int) -> nn.Linear:
    """A fresh head, one of `HEADS`."""
    head = AttentiveHead(dim, num_classes) if kind == "attentive" else nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def head_of(state: Mapping[str, Tensor], dim: int) -> nn.Linear:
    """The head with these weights."""
    num_classes = len(state["bias"])
    attentive = is_attentive(state)
    head = AttentiveHead(dim, num_classes, len(state["queries"])) if attentive else nn.Linear(dim, num_classes)
    head.load_state_dict(dict(state))
    return head


def is_attentive(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of an `AttentiveHead`."""
    return "queries" in state


def head_shapes(state: Mapping[str, Tensor], dim: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the weights of a head of this kind must have, of as many queries as they say."""
    if not is_attentive(state):
        return {"weight": (num_classes, dim), "bias": (num_classes,)}
    num_queries = len(state["queries"]) if state["queries"].ndim else 0
    return {"queries": (num_queries, dim), "weight": (num_classes, num_queries * dim), "bias": (num_classes,)}


def head_input(head: nn.Linear, output: EncoderOutput) -> Tensor:
    """What a head's linear layer reads of an encoder's output: (B, C), or (B, M · C)."""
    return head.gather(output.features) if isinstance(head, AttentiveHead) else output.pooled
