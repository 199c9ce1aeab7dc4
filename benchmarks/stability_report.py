"""Results of benchmarks/stability.py, as Markdown tables and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_variants import WINDOW, Variant
from torch import Tensor

# Loss at each scale of the images, (seeds, scales), by bias and by whether windows grow with the image.
TransferLosses = Mapping[tuple[str, bool], Tensor]

NORM_COLORS = {"pre": "tab:red", "post": "tab:blue", "post from 1": "tab:green"}
BIAS_COLORS = {"table": "tab:red", "linear": "tab:orange", "log": "tab:blue"}


@dataclass(frozen=True)
class GrowthResult:
    """One training of the first experiment: amplitudes of the blocks' outputs, (blocks,), and losses, (steps,)."""

    variant: Variant
    width: int
    depth: int
    lr: float
    amplitudes: Tensor
    losses: Tensor

    @property
    def growth(self) -> float:
        """Amplitude of the last block over that of the first."""
        return (self.amplitudes[-1] / self.amplitudes[0]).item()

    @property
    def final_loss(self) -> float:
        """Mean of the last ten steps."""
        return self.losses[-10:].mean().item()

    @property
    def diverged(self) -> bool:
        """Whether the last losses are not finite or above the first."""
        return not math.isfinite(self.final_loss) or self.final_loss > self.losses[:5].mean().item()


@dataclass(frozen=True)
class AttentionResult:
    """One training of the second experiment.

    Attributes:
        maps: (blocks, h) each, as `stability.attention_maps` returns them.
        final_loss: mean of the last ten steps.
    """

    variant: Variant
    lr: float
    maps: dict[str, Tensor]
    final_loss: float


# --- Tables ------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the rest are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def growth_table(results: Sequence[GrowthResult]) -> str:
    """One row per training."""
    header = (
        "norm",
        "width",
        "depth",
        "learning rate",
        "first block",
        "last block",
        "last / first",
        "maximum",
        "final loss",
        "diverged",
    )
    rows = [
        (
            result.variant.norm,
            str(result.width),
            str(result.depth),
            f"{result.lr:g}",
            f"{result.amplitudes[0]:.2f}",
            f"{result.amplitudes[-1]:.2f}",
            f"{result.growth:.2f}",
            f"{result.amplitudes.max():.2f}",
            f"{result.final_loss:.3f}",
            "yes" if result.diverged else "no",
        )
        for result in results
    ]
    return table(header, rows)


def attention_table(results: Sequence[AttentionResult]) -> str:
    """One row per training."""
    header = (
        "norm, attention",
        "learning rate",
        "entropy, mean",
        "entropy, lowest head",
        "largest weight, mean",
        "heads whose largest weight is above 0.5",
        "greatest similarity",
        "final loss",
    )
    rows = [
        (
            f"{result.variant.norm}, {result.variant.attention}",
            f"{result.lr:g}",
            f"{result.maps['entropy'].mean():.2f}",
            f"{result.maps['entropy'].min():.2f}",
            f"{result.maps['largest'].mean():.2f}",
            f"{(result.maps['largest'] > 0.5).float().mean():.0%}",
            f"{result.maps['similarity'].max():.1f}",
            f"{result.final_loss:.3f}",
        )
        for result in results
    ]
    return table(header, rows)


def transfer_table(losses: TransferLosses, scales: Sequence[float], size_px: int) -> str:
    """One row per bias and kind of window: means over seeds, ± half their range.

    Args:
        size_px: side of the training images.
    """
    header = [f"{round(size_px * scale)} px, window {round(WINDOW * scale)}" for scale in scales]
    rows = []
    for (bias, grows), values in losses.items():
        half_range = (values.amax(dim=0) - values.amin(dim=0)) / 2
        name = f"{bias}, windows grow" if grows else f"{bias}, window stays {WINDOW}"
        rows.append((name, *(f"{mean:.3f} ± {half:.3f}" for mean, half in zip(values.mean(dim=0), half_range))))
    return table(("bias", *header), rows)


# --- The picture -------------------------------------------------------------------------------------------------------


def draw(
    path: Path,
    growth: Sequence[GrowthResult],
    attention: Sequence[AttentionResult],
    losses: TransferLosses,
    scales: Sequence[float],
) -> None:
    """Write a picture of amplitudes by depth and by width, entropies, and losses at larger windows; any may be empty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((by_depth, by_width), (heads, windows)) = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    lowest_lr = min((result.lr for result in growth), default=0.0)
    narrow = min((result.width for result in growth), default=0)
    shallow = min((result.depth for result in growth), default=0)
    growth = [result for result in growth if result.lr == lowest_lr]
    draw_growth(by_depth, [result for result in growth if result.width == narrow], "amplitude by depth")
    draw_growth(by_width, [result for result in growth if result.depth == shallow], "amplitude by width")
    draw_attention(heads, attention)
    draw_transfer(windows, losses, scales)
    for panel in (by_depth, by_width, heads, windows):
        if panel.lines:
            panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_growth(panel, results: Sequence[GrowthResult], title: str) -> None:
    """Amplitude of each block; larger models are drawn darker."""
    largest = max((result.width * result.depth for result in results), default=1)
    for result in results:
        opacity = 0.3 + 0.7 * result.width * result.depth / largest
        label = f"{result.variant.norm}, width {result.width}, depth {result.depth}"
        color = (NORM_COLORS[result.variant.norm], opacity)
        panel.plot(range(1, result.depth + 1), result.amplitudes, color=color, label=label)
    panel.set(title=title, yscale="log", xlabel="block", ylabel="root mean square of the main path")


def draw_attention(panel, results: Sequence[AttentionResult]) -> None:
    """Mean entropy of each block's heads, at the highest learning rate."""
    highest_lr = max((result.lr for result in results), default=0.0)
    for result in results:
        if result.lr == highest_lr:
            entropy = result.maps["entropy"].mean(dim=1)
            style = {
                "color": NORM_COLORS[result.variant.norm],
                "linestyle": "--" if result.variant.attention == "dot" else "-",
            }
            label = f"{result.variant.norm}, {result.variant.attention}"
            panel.plot(range(1, len(entropy) + 1), entropy, label=label, **style)
    panel.set(title=f"attention, rate {highest_lr:g}", xlabel="block", ylabel="entropy, share of the largest")


def draw_transfer(panel, losses: TransferLosses, scales: Sequence[float]) -> None:
    """Mean loss at each size of the window."""
    sides = [round(WINDOW * scale) for scale in scales]
    for (bias, grows), values in losses.items():
        label = f"{bias}, windows grow" if grows else None
        style = {"color": BIAS_COLORS[bias], "linestyle": "-" if grows else ":"}
        panel.plot(sides, values.mean(dim=0), marker="o", label=label, **style)
    panel.set(title=f"larger images (dotted: window stays {WINDOW})", xlabel="window", ylabel="SimMIM loss")
