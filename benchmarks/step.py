"""The training step against transformers', timm's and the authors': same machine, images, masks and weights, interleaved.

    .venv/bin/python benchmarks/step.py --precision float32 bf16 --json step.json
    .venv/bin/python benchmarks/step.py --features              # inference: images to feature vectors
    .venv/bin/python benchmarks/step.py --authors DIR           # and the authors' published code, as it stands in DIR

Every contender is a process of its own that waits until it is asked for some steps, so that no two compute at once and each
round asks all of them in turn, each for one step that is not timed and then for those that are. A step is forward,
backward, and fused AdamW. Beside them the rate of a plain matrix product (2048³ on a CPU, 8192³ on CUDA), the median over a
second, is measured in every round; the share is what of that rate a step reaches by its own products' operations. Peers
that are not installed are left out by name. The authors' code is no package and not a part of this repository: DIR is a
checkout of https://github.com/microsoft/Swin-Transformer; it needs timm. Prints Markdown; --json writes every figure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim.cli.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("transformers", "timm", "authors")
MIB = 2**20
GEMM_SECONDS = 1.0
LOSS_TOLERANCE = 2e-3  # of one another at the first step; bfloat16 rounds each network differently


@dataclass(frozen=True)
class Work:
    """What every contender does.

    Args:
        preset, size, window: of the encoder; size in pixels.
        batch: images a step.
        precision: float32 or bf16 (autocast).
        device: cpu or cuda.
        weights: folder with the contenders' initial weights.
        threads: of a CPU; 0 leaves torch's choice.
        features: a step is the encoder alone, without gradients.
        authors: folder of the authors' checkout; empty without it.
    """

    preset: str
    size: int
    window: int
    batch: int
    precision: str
    device: str
    weights: str
    threads: int
    features: bool = False
    authors: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--window", type=int, default=12, help="tokens a side")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", nargs="+", default=["ours", *PEERS], help="with +compile for torch.compile")
    parser.add_argument("--authors", type=Path, metavar="DIR", help="checkout of microsoft/Swin-Transformer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender in a round")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--features", action="store_true", help="inference instead of training")
    parser.add_argument("--cold", action="store_true", help="compile with an empty cache")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.serve:
        serve(chosen.serve, Work(**json.loads(sys.stdin.readline())))
        return 0
    if chosen.authors and not (chosen.authors / "models/simmim.py").is_file():
        parser.error(f"--authors {chosen.authors} holds no models/simmim.py: give the root of a checkout")
    if unknown := [name for name in chosen.contenders if name.partition("+")[0] not in ("ours", *PEERS)]:
        parser.error(f"unknown contender {unknown[0]!r}: give some of ours, {', '.join(PEERS)}, with +compile or without")
    missing = missing_peers(chosen.authors)
    for name, reason in missing.items():
        print(f"{name} {reason}: left out", file=sys.stderr)
    names = [name for name in chosen.contenders if name.partition("+")[0] not in missing]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), chosen.preset, chosen.size, chosen.window)
        for precision in chosen.precision:
            work = Work(
                chosen.preset,
                chosen.size,
                chosen.window,
                chosen.batch,
                precision,
                chosen.device,
                folder,
                chosen.threads,
                chosen.features,
                str(chosen.authors.resolve()) if chosen.authors else "",
            )
            found[precision] = compare(names, work, chosen.rounds, chosen.steps, chosen.cold)
            print(f"\n{title(work)}\n\n{as_markdown(found[precision], work)}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


def missing_peers(authors: Path | None) -> dict[str, str]:
    """The peers that cannot take part, and why."""
    packages = [name for name in PEERS if name != "authors"]
    missing = {name: "is not installed" for name in packages if importlib.util.find_spec(name) is None}
    if authors is None:
        missing["authors"] = "is taken from a checkout, --authors DIR"
    elif "timm" in missing:
        missing["authors"] = "needs timm"
    return missing


def write_weights(folder: Path, preset: str, size: int, window: int) -> None:
    """One random model, as each contender reads it."""
    from safetensors.torch import save_file

    from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
    from simmim.checkpoints.formats.huggingface import folder_config, state_for
    from simmim.checkpoints.formats.official import state_for as state_for_authors
    from simmim.checkpoints.formats.timm import state_for as state_for_timm
    from simmim.encoders.swinv2 import SwinV2, SwinV2Config
    from simmim.methods.simmim import SimMIM

    torch.manual_seed(0)
    config = SwinV2Config.from_preset(preset, window_size=window)
    model = SimMIM(SwinV2(config))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # gains of 0 would hide every difference between the contenders
            nn.init.constant_(parameter, 0.5)
    save_file(model.state_dict(), folder / "ours.safetensors")
    checkpoint = Checkpoint(
        config=config.trained_at((size, size)),
        encoder=model.encoder.state_dict(),
        preprocessing=Preprocessing((size, size), (0.5,) * 3, (0.2,) * 3),
        source=folder,
        pretraining=model.own_state(),
    )
    save_file(state_for_timm(checkpoint, "encoder"), folder / "timm.safetensors")
    save_file(state_for_authors(checkpoint, "simmim"), folder / "authors.safetensors")
    hf = folder / "transformers"
    hf.mkdir()
    save_file(state_for(checkpoint, "simmim"), hf / "model.safetensors", metadata={"format": "pt"})
    (hf / "config.json").write_text(json.dumps(folder_config(checkpoint, "simmim")), encoding="utf-8")


# --- The contenders, each in its process ------------------------------------------------------------------------------


class TimmSimMIM(nn.Module):
    """SimMIM around timm's encoder, as one would write it: mask token, encoder, 1 × 1 convolution, pixel shuffle, L1."""

    def __init__(self, encoder: nn.Module, dim: int, stride: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.embed_dim))
        self.decoder = nn.Sequential(nn.Conv2d(dim, stride**2 * 3, 1), nn.PixelShuffle(stride))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss; `mask` (B, H, W) bool."""
        x = self.encoder.patch_embed(images)
        share = mask[..., None].to(x.dtype)
        x = x * (1 - share) + self.mask_token * share
        x = self.encoder.norm(self.encoder.layers(x)).permute(0, 3, 1, 2)
        pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        error = nn.functional.l1_loss(self.decoder(x), images, reduction="none")
        return (error * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]

    def features(self, images: Tensor) -> Tensor:
        """(B, C), pooled."""
        return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)


class AuthorsSimMIM(nn.Module):
    """The authors' own SimMIM, its target as it is, not normalized; built as their `build_simmim` does.

    Args:
        checkout: folder with their models/.
        config: of the encoder.
        size: of the images in pixels.
    """

    def __init__(self, checkout: Path, config, size: int) -> None:
        super().__init__()
        theirs = authors_module(checkout, "simmim")
        encoder = theirs.SwinTransformerV2ForSimMIM(
            img_size=size,
            patch_size=config.patch_size,
            in_chans=config.in_channels,
            num_classes=0,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window_size,
            mlp_ratio=config.mlp_ratio,
            qkv_bias=True,
            drop_rate=0.0,
            drop_path_rate=0.0,
            ape=False,
            patch_norm=True,
            use_checkpoint=False,
        )
        settings = types.SimpleNamespace(NORM_TARGET=types.SimpleNamespace(ENABLE=False))
        self.model = theirs.SimMIM(settings, encoder, config.strides[-1], config.in_channels, config.patch_size)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss; `mask` (B, H, W) bool, which their data gives as integers, 1 for masked."""
        return self.model(images, mask.long())

    def features(self, images: Tensor) -> Tensor:
        """(B, C), pooled."""
        return self.model.encoder.forward_features(images)


def authors_module(checkout: Path, name: str) -> types.ModuleType:
    """A file of their models/ without the package's __init__, which imports every model they have and what those need."""
    package = types.ModuleType("authors")
    package.__path__ = [str(checkout / "models")]
    sys.modules["authors"] = package
    return importlib.import_module(f"authors.{name}")


def make_contender(name: str, work: Work) -> nn.Module:
    """A model that takes images and masks and gives the loss, with the weights that all share."""
    from safetensors.torch import load_file

    from simmim.encoders.swinv2 import SwinV2Config

    folder = Path(work.weights)
    config = SwinV2Config.from_preset(work.preset, window_size=work.window)
    if name == "ours":
        from simmim.encoders.swinv2 import SwinV2
        from simmim.methods.simmim import SimMIM

        model = SimMIM(SwinV2(config))
        model.load_state_dict(load_file(folder / "ours.safetensors"))
        return Loss(model)
    if name == "transformers":
        from transformers import Swinv2ForMaskedImageModeling
        from transformers.utils import logging

        logging.disable_progress_bar()
        return Loss(Swinv2ForMaskedImageModeling.from_pretrained(folder / "transformers"), flat_masks=True)
    if name == "authors":
        authors = AuthorsSimMIM(Path(work.authors), config, work.size)
        authors.model.load_state_dict(load_file(folder / "authors.safetensors"))
        return authors
    import timm

    encoder = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=work.size,
        window_size=work.window,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        num_classes=0,
        drop_path_rate=0.0,
    )
    encoder.load_state_dict(load_file(folder / "timm.safetensors"), strict=False)
    model = TimmSimMIM(encoder, config.dims[-1], config.strides[-1])
    ours = load_file(folder / "ours.safetensors")
    # Decoder columns are (channel, row, column) in the order of a pixel shuffle, as ours are after one permutation.
    model.mask_token.data.copy_(ours["mask_token"])
    weight, bias = ours["decoder.weight"], ours["decoder.bias"]
    model.decoder[0].weight.data.copy_(weight[:, :, None, None])
    model.decoder[0].bias.data.copy_(bias)
    return model


class Loss(nn.Module):
    """A model whose output has a `loss`; transformers' takes masks as rows of tokens."""

    def __init__(self, model: nn.Module, flat_masks: bool = False) -> None:
        super().__init__()
        self.model, self.flat_masks = model, flat_masks

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss."""
        return self.model(images, mask.flatten(1) if self.flat_masks else mask).loss

    def features(self, images: Tensor) -> Tensor:
        """(B, C), pooled."""
        if self.flat_masks:
            return self.model.swinv2(images).last_hidden_state.mean(dim=1)
        return self.model.encoder(images).pooled


def serve(name: str, work: Work) -> None:
    """Be one contender: read "steps N" lines and answer each with a line of JSON, until the input ends."""
    library, _, compiled = name.partition("+")
    if work.threads:
        torch.set_num_threads(work.threads)
    if library == "ours" and work.device == "cpu":
        keep_freed_memory()  # as the command does
    if library in ("timm", "authors"):  # theirs imports timm's layers
        sys.path.insert(0, str(ROOT / "tests"))
        from timm_stub import stub_torchvision

        stub_torchvision()
    torch.mm(torch.ones(64, 64, device=work.device), torch.ones(64, 64, device=work.device))
    memory = memory_above(work.device)
    model = make_contender(library, work).to(work.device)
    images, mask = batch_of(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    run = model.features if work.features else model
    if compiled and library == "ours":
        from simmim.training.compiling import compile_blocks

        compile_blocks(model.model.encoder)  # as --compile does
    elif compiled:
        run = torch.compile(run)

    @torch.no_grad()
    def encode() -> float:
        """One batch to features; the mean of their squares."""
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            return run(images).float().square().mean().item()

    def train() -> float:
        """One optimizer step; its loss."""
        with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16"):
            loss = run(images, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    step = encode if work.features else train
    model.train(not work.features)
    started = time.perf_counter()
    first_loss = step()
    answer({"first_step_s": time.perf_counter() - started, "loss": first_loss})
    for _ in range(2):
        step()
    answer({"peak_mib": memory()})
    for line in sys.stdin:
        count = int(line.split()[1])
        step()  # while others had their turn, caches and what the system keeps in memory became theirs
        started = time.perf_counter()
        for _ in range(count):
            step()
        answer({"seconds": (time.perf_counter() - started) / count})


def answer(found: dict) -> None:
    """One line to whoever asked."""
    print(json.dumps(found), flush=True)


def batch_of(work: Work) -> tuple[Tensor, Tensor]:
    """Images, (B, 3, size, size), and masks, (B, H, W) bool, the same for every contender."""
    from simmim.methods.masking import BlockMasking

    images = torch.randn(work.batch, 3, work.size, work.size, generator=torch.Generator().manual_seed(1))
    masking = BlockMasking()
    mask = masking.draw(work.batch, (work.size, work.size), torch.Generator(), list(range(work.batch)))
    return images.to(work.device), mask.to(work.device)


def memory_above(device: str):
    """Start measuring; what is returned gives the peak above now, in MiB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() / MIB
    if not Path("/proc/self/clear_refs").exists():
        return lambda: float("nan")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_mib("VmRSS")
    return lambda: resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    """The process's resident set, VmRSS, or its high-water mark, VmHWM, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


# --- The comparison ---------------------------------------------------------------------------------------------------


def compare(names: list[str], work: Work, rounds: int, steps: int, cold: bool) -> dict[str, dict]:
    """All contenders' figures by name, and under "gemm" the rates of a matrix product, in GFLOP/s."""
    found: dict[str, dict] = {"gemm": {"gflops": []}}
    servers = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            print(f"{name}, {work.precision}: first step", file=sys.stderr, flush=True)
            environment = dict(os.environ)
            if "+" in name and cold:
                environment["TORCHINDUCTOR_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
            server = subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            stack.callback(server.kill)
            found[name] = {**ask(server, json.dumps(vars(work))), **listen(server), "seconds": []}
            servers[name] = server
        check_losses({name: found[name]["loss"] for name in names}, work.precision)
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            found["gemm"]["gflops"].append(gemm_gflops(work))
            order = names[number % len(names) :] + names[: number % len(names)]
            for name in order:
                found[name]["seconds"].append(ask(servers[name], f"steps {steps}")["seconds"])
    return found


def ask(server: subprocess.Popen, line: str) -> dict:
    """Send a line, and what comes back."""
    server.stdin.write(line + "\n")
    server.stdin.flush()
    return listen(server)


def listen(server: subprocess.Popen) -> dict:
    """The next answer; what libraries print between is skipped."""
    for line in server.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"a contender ended with code {server.wait()}")


def check_losses(losses: dict[str, float], precision: str) -> None:
    """All contenders compute the same, or the comparison is void."""
    low, high = min(losses.values()), max(losses.values())
    if high - low > LOSS_TOLERANCE * (10 if precision == "bf16" else 1):
        raise SystemExit(f"the contenders' first losses differ: {losses}")


def gemm_gflops(work: Work) -> float:
    """The rate of one matrix product, the median over a second: about what a step lasts."""
    if work.threads:
        torch.set_num_threads(work.threads)
    side = 2048 if work.device == "cpu" else 8192
    kind = torch.bfloat16 if work.precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=work.device, dtype=kind) for _ in range(2))
    took, until = [], time.perf_counter() + GEMM_SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        a @ b
        if work.device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(took) / 1e9


def title(work: Work) -> str:
    """What was compared."""
    return (
        f"{'features' if work.features else 'training'}, {work.preset}, {work.size} px, window {work.window}, "
        f"batch {work.batch}, {work.precision}, {work.device}, "
        f"torch {torch.__version__.partition('+')[0]}"
    )


def as_markdown(found: dict[str, dict], work: Work) -> str:
    """A row a contender: medians over the rounds, and ratios of what was measured in the same round."""
    gemm = found["gemm"]["gflops"]
    names = [name for name in found if name != "gemm"]
    ours = next((name for name in names if name.startswith("ours")), names[0])
    lines = [
        f"matrix product {statistics.median(gemm):,.0f} GFLOP/s, {operations(work, whole=True) / 1e9:.1f} GFLOP an image",
        "",
        f"| | images/s | share of the product's rate | {ours} against it | peak memory, MiB | first step, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in names:
        rates = [work.batch / seconds for seconds in found[name]["seconds"]]
        # On a CPU ours predicts nothing but what is masked; what it leaves out is not counted as done.
        a_image = operations(work, whole=not name.startswith("ours") or work.device != "cpu")
        shares = [rate * a_image / 1e9 / gflops for rate, gflops in zip(rates, gemm)]
        ratios = [theirs / mine for theirs, mine in zip(found[name]["seconds"], found[ours]["seconds"])]
        lines.append(
            f"| {name} | {statistics.median(rates):.2f} | {statistics.median(shares):.0%} | "
            f"{statistics.median(ratios):.2f} × | {found[name]['peak_mib']:,.0f} | {found[name]['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


def operations(work: Work, whole: bool) -> float:
    """FLOPs of the matrix products in one image's step, with the prediction of the whole image or of what is masked."""
    from simmim.encoders.cost import Setup
    from simmim.encoders.swinv2 import SwinV2Config
    from simmim.methods.simmim import SimMIM
    from simmim.planning.step import cost_model, step_flops

    config = SwinV2Config.from_preset(work.preset, window_size=work.window)
    size, setup = (work.size, work.size), Setup(work.batch, precision="32-true", device=work.device)
    if work.features:
        return cost_model(config).flops(config, size, setup).forward
    masked = batch_of(work)[1].float().mean().item()
    return step_flops(config, size, setup, SimMIM, predicted=1.0 if whole else masked).training


if __name__ == "__main__":
    sys.exit(main())
