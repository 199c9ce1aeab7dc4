"""Puts kernels into an encoder. The only place that decides whether a call runs a kernel or the reference implementation.

Each class here is a class of `model.py` with the same parameters. It calls a kernel where the kernel supports the call, else
the reference implementation that it inherits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from simmim.encoders.base import Size
from simmim.encoders.layers import DropPath, Mlp, ProductWithBias
from simmim.encoders.swinv2.geometry import log_spaced_coords
from simmim.encoders.swinv2.kernels.block import bias_of_offsets, join_attention, join_mlp, merge
from simmim.encoders.swinv2.kernels.eligibility import supports_block, supports_merging
from simmim.encoders.swinv2.kernels.gpu import window_attention
from simmim.encoders.swinv2.kernels.library import get_kernels, is_disabled, unavailable_reason
from simmim.encoders.swinv2.kernels.self_test import supports_attention
from simmim.encoders.swinv2.kernels.windows import grouped_windows, window_indices
from simmim.encoders.swinv2.model import PatchMerging, SwinV2, SwinV2Block, WindowAttention, attend
from simmim.execution import without_autocast


def use(encoder: SwinV2) -> SwinV2:
    """Put kernels into an encoder, in place, and return it.

    The encoder and its blocks, attentions and mergings get the classes of this file. Parameters, their names and all results
    stay the same. A call still runs the reference implementation where no kernel supports it: on other devices or number
    types, with hooks or replaced parts inside a block, under torch.compile, inside `disabled` and with SIMMIM_KERNELS=0 (see
    `eligibility` and `self_test`).
    """
    for module in encoder.modules():
        module.__class__ = KERNEL_CLASSES.get(type(module), type(module))
    return encoder


class KernelSwinV2(SwinV2):
    """An encoder whose parts have kernels."""

    @contextlib.contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """A context in which calls without gradients compute the position bias of each block and window size once."""
        with contextlib.ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, KernelAttention):
                    stack.enter_context(module.cached_tables())
            yield

    def has_kernels(self, device: torch.device) -> bool:
        """Whether the kernels in C are used. Those for a GPU compute attention alone; torch.compile works around them."""
        return device.type == "cpu" and not is_disabled() and get_kernels() is not None

    def describe_kernels(self, device: torch.device) -> str:
        """On a CPU that there are kernels in C, or why not; elsewhere empty."""
        if device.type != "cpu":
            return ""
        return "compiled kernels" if get_kernels() else f"no compiled kernels, so slower: {unavailable_reason()}"


class KernelAttention(WindowAttention):
    """Window attention that can cache its position bias."""

    table_cache: dict[tuple[Size, Size], Tensor] | None = None

    @contextlib.contextmanager
    def cached_tables(self) -> Iterator[None]:
        """A context in which calls without gradients compute the position bias of each window size once."""
        self.table_cache = {}
        try:
            yield
        finally:
            self.table_cache = None

    def position_table(self, window: Size, pretrained: Size) -> Tensor:
        """As `WindowAttention.position_table`."""
        return self._cached(window, pretrained, super().position_table)

    def position_table_by_kernel(self, window: Size, pretrained: Size) -> Tensor:
        """`position_table` by the kernel for a CPU."""

        def compute(window: Size, pretrained: Size) -> Tensor:
            coords = log_spaced_coords(window, pretrained, self.cpb_mlp[0].weight.device)
            return bias_of_offsets(self.cpb_mlp, coords)

        return self._cached(window, pretrained, compute)

    def _cached(self, window: Size, pretrained: Size, compute: Callable[[Size, Size], Tensor]) -> Tensor:
        if self.table_cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute(window, pretrained)
        if (window, pretrained) not in self.table_cache:
            self.table_cache[window, pretrained] = compute(window, pretrained)
        return self.table_cache[window, pretrained]


class KernelBlock(SwinV2Block):
    """A block whose kernels compute all of it on a CPU and its attention on a GPU."""

    attn: KernelAttention

    # The parts that the kernel for a CPU replaces, and their classes. norm3 is applied after the kernel.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {
        "attn": KernelAttention,
        "attn.qkv": ProductWithBias,
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

    def forward(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """As `SwinV2Block.forward`."""
        # A subclass or an instance may have replaced `windowed_attention`.
        is_own = getattr(self.windowed_attention, "__func__", None) is KernelBlock.windowed_attention
        if windows_at_once is None and is_own and supports_block(self, x):
            return self.norm3(self.join_branches(x, groups))
        return super().forward(x, windows_at_once, groups)

    def join_branches(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """Both branches of `SwinV2Block.forward` by the kernels for a CPU, without norm3."""
        size = tuple(x.shape[1:3])
        window, shift, padded = self.geometry(size)
        windows = window_indices(size, window, shift, padded, self.shift_before_padding, x.device)
        windows = grouped_windows(windows, groups, window, shift)
        with without_autocast(x.device):
            scale = self.attn.inverse_temperature()
            table = self.attn.position_table_by_kernel(window, self.pretrained(window))
        drop = self.drop_path
        factors = drop.factors(x) if drop.is_active else None
        x, tokens = join_attention(x, self.attn, self.norm1, factors, windows, scale, table)
        return join_mlp(x, tokens, self.mlp, self.norm2, drop.factors(x) if drop.is_active else None)

    def windowed_attention(self, x: Tensor, windows_at_once: int | None = None, groups: Tensor | None = None) -> Tensor:
        """As `SwinV2Block.windowed_attention`; on a GPU by kernels that read a window's tokens in place."""
        window, shift, padded = self.geometry(x.shape[1:3])
        if windows_at_once is not None or not supports_attention(self.attn, x, window, attend):
            return super().windowed_attention(x, windows_at_once, groups)
        attn = self.attn
        windows = window_indices(tuple(x.shape[1:3]), window, shift, padded, self.shift_before_padding, x.device)
        windows = grouped_windows(windows, groups, window, shift)
        with without_autocast(x.device):
            scale, bias = attn.inverse_temperature(), attn.position_bias(window, self.pretrained(window))
        qkv = attn.qkv(x).flatten(0, 2)
        mixed = window_attention(qkv, attn.q_bias, attn.v_bias, scale, bias, windows.token_of, windows.region_of, len(x))
        return attn.proj(mixed.view(*x.shape[:3], -1))


class KernelMerging(PatchMerging):
    """Patch merging with a kernel for a CPU."""

    # As `KernelBlock.PARTS`.
    PARTS: ClassVar[dict[str, type[nn.Module]]] = {"reduction": nn.Linear, "norm": nn.LayerNorm}

    def forward(self, x: Tensor) -> Tensor:
        """As `PatchMerging.forward`."""
        if supports_merging(self, x):
            return merge(x, self.reduction, self.norm)
        return super().forward(x)


KERNEL_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    SwinV2: KernelSwinV2,
    SwinV2Block: KernelBlock,
    WindowAttention: KernelAttention,
    PatchMerging: KernelMerging,
}
