"""The contenders of benchmarks/step.py: SimMIM of this toolkit, of transformers, around timm's encoder, and of the authors.

Each is a module with `forward(images, mask)`, the loss, and `features(images)`, pooled features (B, C). Masks are (B, H, W)
bool at patch resolution, True = masked.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from simmim.encoders.base import EncoderConfig
    from simmim.methods.canvas import CanvasSettings

PEERS = ("transformers", "timm", "authors")
SHARES = {f"canvas{share}": share for share in (2, 3, 4)}  # ours with that many images on a canvas


@dataclass(frozen=True)
class Work:
    """What every contender computes.

    Args:
        preset, size, window: of the encoder; size in pixels, window in tokens.
        batch: images per step.
        precision: float32 or bf16 (autocast).
        device: cpu or cuda.
        weights: folder with the contenders' initial weights.
        threads: threads of torch on a CPU; 0 leaves the choice to torch.
        features: a step is a forward pass of the encoder, without gradients.
        authors: folder of the authors' checkout; empty without it.
    """

    preset: str
    size: int
    window: int
    batch: int
    precision: str
    device: str
    weights: str = ""
    threads: int = 0
    features: bool = False
    authors: str = ""


def missing_peers(authors: Path | None) -> dict[str, str]:
    """The peers that cannot take part, and why."""
    packages = [name for name in PEERS if name != "authors"]
    missing = {name: "is not installed" for name in packages if importlib.util.find_spec(name) is None}
    if authors is None:
        missing["authors"] = "needs a checkout, --authors DIR"
    elif "timm" in missing:
        missing["authors"] = "needs timm"
    return missing


def draw_batch(work: Work, name: str = "ours") -> tuple[Tensor, Tensor]:
    """Images, (B, 3, size, size), and masks, (B, H, W) bool, the same for every contender but those on canvases."""
    from simmim.methods.masking import BlockMasking

    size, seeds = (work.size, work.size), list(range(work.batch))
    images = torch.randn(work.batch, 3, *size, generator=torch.Generator().manual_seed(1))
    if name in SHARES:
        config, settings = canvas_of(name, work)
        mask = settings.canvas(config).draw(size, seeds, torch.device("cpu"))
    else:
        mask = BlockMasking().draw(work.batch, size, torch.Generator(), seeds)
    return images.to(work.device), mask.to(work.device)


def write_weights(folder: Path, preset: str, size: int, window: int) -> None:
    """Write the weights of one random model in the format of each contender."""
    from safetensors.torch import save_file

    from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
    from simmim.checkpoints.formats.base import ExportOptions
    from simmim.checkpoints.formats.registry import format_named
    from simmim.encoders import registry
    from simmim.methods.simmim import SimMIM

    torch.manual_seed(0)
    config = registry.preset_config(preset, window_size=window)
    model = SimMIM(registry.build(config))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # weights of 0 would hide differences between the blocks
            nn.init.constant_(parameter, 0.5)
    save_file(model.state_dict(), folder / "ours.safetensors")
    checkpoint = Checkpoint(
        config=config.with_training_size((size, size)),
        encoder=model.encoder.state_dict(),
        preprocessing=Preprocessing((size, size), (0.5,) * 3, (0.2,) * 3),
        source=folder,
        pretraining=model.own_state(),
    )
    for format, form, file in (("timm", "encoder", "timm"), ("official", "simmim", "authors")):
        save_file(format_named(format).rows_for(config).state(checkpoint, form), folder / f"{file}.safetensors")
    (folder / "transformers").mkdir()
    format_named("hf").write(checkpoint, "simmim", folder / "transformers", ExportOptions())


def build_contender(name: str, work: Work) -> nn.Module:
    """A contender with the weights that all share."""
    if name == "ours":
        return build_ours(work)
    if name in SHARES:
        return build_canvas(name, work)
    if name == "transformers":
        return build_transformers(work)
    return build_timm(work) if name == "timm" else build_authors(work)


class WithLoss(nn.Module):
    """A model whose output has a field `loss`.

    Args:
        flat_masks: the model takes masks as (B, H · W), as transformers' does.
    """

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


def build_ours(work: Work) -> WithLoss:
    """This toolkit's, with kernels, as a run builds it."""
    from safetensors.torch import load_file

    from simmim.encoders import registry
    from simmim.methods.simmim import SimMIM

    model = SimMIM(registry.build(registry.preset_config(work.preset, window_size=work.window)))
    model.load_state_dict(load_file(Path(work.weights) / "ours.safetensors"))
    return WithLoss(model)


def canvas_of(name: str, work: Work) -> tuple[EncoderConfig, CanvasSettings]:
    """The encoder's architecture and the settings of a contender on canvases."""
    from simmim.encoders.registry import preset_config
    from simmim.methods.canvas import CanvasSettings

    config = preset_config(work.preset, window_size=work.window)
    return config, CanvasSettings(share=SHARES[name]).resolve((work.size, work.size), config)


def build_canvas(name: str, work: Work) -> WithLoss:
    """This toolkit's encoder with several images on a canvas. Its decoder is fresh: no other contender has one."""
    from safetensors.torch import load_file

    from simmim.encoders import registry
    from simmim.methods.canvas import Canvas

    config, settings = canvas_of(name, work)
    model = Canvas(registry.build(config), settings)
    weights = load_file(Path(work.weights) / "ours.safetensors")
    encoder = {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
    model.encoder.load_state_dict(encoder)
    return WithLoss(model)


def build_transformers(work: Work) -> WithLoss:
    """transformers' Swinv2ForMaskedImageModeling."""
    from transformers import Swinv2ForMaskedImageModeling
    from transformers.utils import logging

    logging.disable_progress_bar()
    return WithLoss(Swinv2ForMaskedImageModeling.from_pretrained(Path(work.weights) / "transformers"), flat_masks=True)


# --- timm --------------------------------------------------------------------------------------------------------------


class TimmSimMIM(nn.Module):
    """SimMIM around timm's encoder, as one would write it: mask token, encoder, 1 × 1 convolution, pixel shuffle, L1."""

    def __init__(self, encoder: nn.Module, dim: int, stride: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.embed_dim))
        self.decoder = nn.Sequential(nn.Conv2d(dim, stride**2 * 3, 1), nn.PixelShuffle(stride))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss."""
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


def build_timm(work: Work) -> TimmSimMIM:
    """SimMIM around timm's encoder."""
    import timm
    from safetensors.torch import load_file

    from simmim.encoders.registry import preset_config

    config = preset_config(work.preset, window_size=work.window)
    encoder = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=work.size,
        window_size=work.window,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        num_classes=0,
        drop_path_rate=0.0,
    )
    encoder.load_state_dict(load_file(Path(work.weights) / "timm.safetensors"), strict=False)
    model = TimmSimMIM(encoder, config.dims[-1], config.strides[-1])
    ours = load_file(Path(work.weights) / "ours.safetensors")
    # The rows of our decoder's weight are (channel, row, column), the order of a pixel shuffle.
    model.mask_token.data.copy_(ours["mask_token"])
    model.decoder[0].weight.data.copy_(ours["decoder.weight"][:, :, None, None])
    model.decoder[0].bias.data.copy_(ours["decoder.bias"])
    return model


# --- The authors' code -------------------------------------------------------------------------------------------------


class AuthorsSimMIM(nn.Module):
    """The authors' own SimMIM, built as their `build_simmim` does; its target is not normalized.

    Args:
        checkout: folder with their models/.
        config: of the encoder.
        size: side of the images in pixels.
    """

    def __init__(self, checkout: Path, config, size: int) -> None:
        super().__init__()
        theirs = import_authors_module(checkout, "simmim")
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
        """The loss. Their data loader gives masks as integers, 1 for masked."""
        return self.model(images, mask.long())

    def features(self, images: Tensor) -> Tensor:
        """(B, C), pooled."""
        return self.model.encoder.forward_features(images)


def import_authors_module(checkout: Path, name: str) -> types.ModuleType:
    """A file of their models/, without the package's __init__, which imports all their models and what those need."""
    package = types.ModuleType("authors")
    package.__path__ = [str(checkout / "models")]
    sys.modules["authors"] = package
    return importlib.import_module(f"authors.{name}")


def build_authors(work: Work) -> AuthorsSimMIM:
    """The authors' model."""
    from safetensors.torch import load_file

    from simmim.encoders.registry import preset_config

    authors = AuthorsSimMIM(Path(work.authors), preset_config(work.preset, window_size=work.window), work.size)
    authors.model.load_state_dict(load_file(Path(work.weights) / "authors.safetensors"))
    return authors
