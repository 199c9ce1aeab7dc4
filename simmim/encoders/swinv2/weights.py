"""The architecture of a Swin Transformer V2 from the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from simmim.encoders.shifted_windows.weights import infer_stages


def infer_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `SwinV2Config` that follow from the names and shapes of an encoder's weights.

    Raises:
        ValueError: when a weight of every Swin Transformer V2 is missing, naming it.
    """
    fields = infer_stages(state, "Swin Transformer V2", "attn.logit_scale")
    extra_norms = [name for name in state if re.match(r"layers\.2\.blocks\.\d+\.norm3\.weight", name)]
    blocks_with_extra_norm = sorted(int(name.split(".")[3]) for name in extra_norms)
    return {**fields, "extra_norm_every": blocks_with_extra_norm[0] + 1 if blocks_with_extra_norm else 0}
