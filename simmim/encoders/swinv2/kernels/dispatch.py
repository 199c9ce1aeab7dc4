"""Where kernels are put into an encoder, and the only place that decides whether a call takes them.

The classes here have the parameters of the model's own classes and their plain lines, to which they fall back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.base import Size
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.encoders.swinv2.kernels.block import bias_of_offsets, join_attention, join_mlp, merge
from simmim.encoders.swinv2.kernels.eligibility import supports_block, supports_merging
from simmim.encoders.swinv2.kernels.gpu import window_attention
from simmim.encoders.swinv2.kernels.library import is_disabled, kernels, reason
from simmim.encoders.swinv2.kernels.self_test import supports_attention
from simmim.encoders.swinv2.kernels.windows import window_indices
from simmim.encoders.swinv2.model import DropPath, Mlp, PatchMerging, SwinV2, SwinV2Block, WindowAttention, attend
from simmim.execution import without_autocast


def use(encoder: SwinV2) -> SwinV2:
    """Put kernels into an encoder, in place, and return it.

    Names, weights and results stay. A call still takes the plain lines where a kernel does not apply: other devices or
    types, hooks or changed parts, torch.compile, `disabled`, SIMMIM_KERNELS=0 (see `eligibility` and `self_test`).
    """
    for module in encoder.modules():
        module.__class__ = KERNEL_CLASSES.get(type(module), type(module))
    return encoder


class KernelAttention(WindowAttention):
    """Window attention that keeps its position bias while the weights are fixed."""

    kept_tables: dict[tuple[Size, Size], Tensor] | None = None

    @contextlib.contextmanager
    def cache_while_fixed(self) -> Iterator[None]:
        """A context in which calls without gradients compute the position bias of each kind of window once."""
        self.kept_tables = {}
        try:
            yield
        finally:
            self.kept_tables = None

    def position_table(self, window: Size, pretrained: Size) -> Tensor:
        """As of `WindowAttention`."""
        return self.kept(window, pretrained, super().position_table)

    def position_table_by_kernel(self, window: Size, pretrained: Size) -> Tensor:
        """`position_table` by the kernel for a CPU."""

        def compute(window: Size, pretrained: Size) -> Tensor:
            coords = log_spaced_coords(window, pretrained, self.cpb_mlp[0].weight.device)
            return bias_of_offsets(self.cpb_mlp, coords)

        return self.kept(window, pretrained, compute)

    def kept(self, window: Size, pretrained: Size, compute: Callable[[Size, Size], Tensor]) -> Tensor:
        """A table from the cache, where there is one, else computed and put there."""
        if self.kept_tables is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute(window, pretrained)
        if (window, pretrained) not in self.kept_tables:
            self.kept_tables[window, pretrained] = compute(window, pretrained)
        return self.kept_tables[window, pretrained]


class KernelBlock(SwinV2Block):
    """A block by kernels: whole on a CPU, its attention on a GPU."""

    attn: KernelAttention

    # The parts that the kernels compute, and their classes. norm3 is applied after them.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {
        "attn": KernelAttention,
        "attn.qkv": nn.Linear,
        "attn.proj": nn.Linear,
        "attn.cpb_mlp": nn.Sequential,
        "attn.cpb_mlp.0": nn.Linear,
        "attn.cpb_mlp.1": nn.ReLU,
        "attn.cpb_mlp.2": nn.Linear,
        "norm1": nn.LayerNorm,
        "mlp": Mlp,
        "mlp.fc1": nn.Linear,
        "mlp.act": nn.GELU,
        "mlp.fc2": nn.Linear,
        "norm2": nn.LayerNorm,
        "drop_path": DropPath,
    }

    def forward(self, x: Tensor, windows_at_once: int | None = None) -> Tensor:
        """As of `SwinV2Block`."""
        # Whoever has replaced the attention of one block wants that attention.
        own = getattr(self.windowed_attention, "__func__", None) is KernelBlock.windowed_attention
        if windows_at_once is None and own and supports_block(self, x):
            return self.norm3(self.by_kernels(x))
        return super().forward(x, windows_at_once)

    def by_kernels(self, x: Tensor) -> Tensor:
        """Both branches of `SwinV2Block.forward` on a CPU, without the norm after them."""
        size = tuple(x.shape[1:3])
        window, shift, padded = self.geometry(size)
        windows = window_indices(size, window, shift, padded, self.shift_before_padding, x.device)
        with without_autocast(x.device):
            scale = self.attn.inverse_temperature()
            table = self.attn.position_table_by_kernel(window, self.pretrained(window))
        drop = self.drop_path
        keep = drop.factors(x) if drop.active else None
        x, tokens = join_attention(x, self.attn, self.norm1, keep, windows, scale, table)
        return join_mlp(x, tokens, self.mlp, self.norm2, drop.factors(x) if drop.active else None)

    def windowed_attention(self, x: Tensor, windows_at_once: int | None = None) -> Tensor:
        """As of `SwinV2Block`; on a GPU by kernels that find a window's tokens where they are."""
        window, shift, padded = self.geometry(x.shape[1:3])
        if windows_at_once is not None or not supports_attention(self.attn, x, window, attend):
            return super().windowed_attention(x, windows_at_once)
        attn = self.attn
        windows = window_indices(tuple(x.shape[1:3]), window, shift, padded, self.shift_before_padding, x.device)
        with without_autocast(x.device):
            scale, bias = attn.inverse_temperature(), attn.position_bias(window, self.pretrained(window))
        qkv = F.linear(x, attn.qkv.weight).flatten(0, 2)
        mixed = window_attention(qkv, attn.q_bias, attn.v_bias, scale, bias, windows.token_of, windows.region_of, len(x))
        return attn.proj(mixed.view(*x.shape[:3], -1))


class KernelMerging(PatchMerging):
    """Patch merging by a kernel on a CPU."""

    # As of `KernelBlock`.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {"reduction": nn.Linear, "norm": nn.LayerNorm}

    def forward(self, x: Tensor) -> Tensor:
        """As of `PatchMerging`."""
        if supports_merging(self, x):
            return merge(x, self.reduction, self.norm)
        return super().forward(x)


class KernelSwinV2(SwinV2):
    """An encoder with kernels put in."""

    def has_kernels(self, device: torch.device) -> bool:
        """On a CPU, where they could be compiled."""
        return device.type == "cpu" and not is_disabled() and kernels() is not None

    def describe_kernels(self, device: torch.device) -> str:
        """On a CPU, whether they could be compiled, else why not."""
        if device.type != "cpu":
            return ""
        return "compiled kernels" if kernels() else f"no compiled kernels, so slower: {reason()}"


KERNEL_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    WindowAttention: KernelAttention,
    SwinV2Block: KernelBlock,
    PatchMerging: KernelMerging,
    SwinV2: KernelSwinV2,
}
