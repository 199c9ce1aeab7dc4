"""SwinV2 under torchvision's names, as Satlas publishes it too: turned into the authors' names, which `official` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from simmim.checkpoints.source import Source
from simmim.encoders.base import State

PROJECTION = "features.0.0.weight"
# The modules in `features` are the patch embedding, then in turn a stage and the merging after it.
BLOCK = re.compile(r"features\.(\d*[13579])\.(\d+)\.(.+)")
MERGING = re.compile(r"features\.(\d*[02468])\.((?:reduction|norm)\..+)")
EMBEDDING = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm."}
MLP = {"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}


def is_torchvision(names: Mapping[str, Tensor]) -> bool:
    """Whether tensors are a SwinV2 under torchvision's names, with or without a prefix."""
    has_projection = any(name.endswith(PROJECTION) for name in names)
    return has_projection and any(re.search(r"features\.1\.0\.attn\.logit_scale$", name) for name in names)


def with_authors_names(source: Source) -> Source:
    """The same file with its tensors under the authors' names."""
    renamed = Source(source.file)
    renamed.__dict__["weights"] = replace(source.weights, tensors=authors_names(source.weights.tensors))
    return renamed


def authors_names(tensors: Mapping[str, Tensor]) -> State:
    """The tensors under the authors' names. Those of other modules than the encoder and its head are left out.

    torchvision has one bias for query, key and value, of which it sets the key's to zero at every call.
    """
    prefix = next(name for name in tensors if name.endswith(PROJECTION)).removesuffix(PROJECTION)
    state: State = {}
    for name, value in tensors.items():
        if not name.startswith(prefix):
            continue
        theirs = authors_name(name.removeprefix(prefix))
        if theirs.endswith("attn.qkv.bias"):
            query, _, values = value.chunk(3)
            state[theirs.replace("qkv.bias", "q_bias")], state[theirs.replace("qkv.bias", "v_bias")] = query, values
        else:
            state[theirs] = value
    return state


def authors_name(name: str) -> str:
    """The authors' name of one tensor."""
    if block := BLOCK.fullmatch(name):
        inner = block[3]
        for ours, theirs in MLP.items():
            inner = theirs + inner.removeprefix(ours) if inner.startswith(ours) else inner
        return f"layers.{int(block[1]) // 2}.blocks.{block[2]}.{inner}"
    if merging := MERGING.fullmatch(name):
        return f"layers.{int(merging[1]) // 2 - 1}.downsample.{merging[2]}"
    for ours, theirs in EMBEDDING.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
