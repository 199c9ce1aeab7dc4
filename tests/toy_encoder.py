"""A toy encoder of a few convolutions, and an example for a new encoder family.

`registry.FAMILIES["toy"] = "toy_encoder"` registers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderConfig, EncoderFamily, EncoderOutput


@dataclass(frozen=True)
class ToyConfig(EncoderConfig):
    """The architecture of a toy encoder.

    Args:
        widths: channels of each stage.
        patch_size: side of a patch in pixels.
        in_channels: channels of the images.

    Raises:
        ValueError: for a setting out of range.
    """

    widths: tuple[int, ...] = (8, 12, 16)
    patch_size: int = 4
    in_channels: int = 3

    input_projection: ClassVar[str] = "patches.weight"
    size_fields: ClassVar[tuple[str, ...]] = ("widths",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list in YAML and JSON
        if not self.widths or min(*self.widths, self.patch_size, self.in_channels) < 1:
            raise ValueError(
                f"widths {self.widths}, patch {self.patch_size}, {self.in_channels} channels: give positive numbers"
            )

    @property
    def channels(self) -> tuple[int, ...]:
        return self.widths

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.patch_size * 2**stage for stage in range(len(self.widths)))

    @property
    def num_blocks(self) -> int:
        return len(self.widths)

    def describe(self) -> str:
        return f"patch {self.patch_size} px"


class ToyBlock(nn.Module):
    """A residual 3 × 3 convolution: (B, H, W, C) to the same shape."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = rearrange(self.norm(x), "b h w c -> b c h w")
        return x + rearrange(F.gelu(self.conv(y)), "b c h w -> b h w c")


class ToyDownsampling(nn.Module):
    """A strided convolution: (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, new C)."""

    def __init__(self, dim: int, new_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, new_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(rearrange(x, "b h w c -> b c h w"), 2)
        return rearrange(self.conv(x), "b c h w -> b h w c")


class ToyEncoder(Encoder):
    """One block per stage."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, checkpoint_activations=False, sequential_attention=None) -> None:
        super().__init__(config, checkpoint_activations, sequential_attention)
        widths = config.widths
        self.patches = nn.Conv2d(config.in_channels, widths[0], config.patch_size, config.patch_size)
        self.stages = nn.ModuleList(map(ToyBlock, widths))
        self.downsamplings = nn.ModuleList(map(ToyDownsampling, widths, widths[1:]))
        self.norm = nn.LayerNorm(widths[-1])

    def embed(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return rearrange(self.patches(pad_to_multiple(images, self.config.patch_size)), "b c h w -> b h w c")

    def encode(self, tokens: Tensor, return_stages: bool = False, groups: Tensor | None = None) -> EncoderOutput:
        self.check_groups(tokens, groups)  # refuses them
        x, maps = tokens, []
        for index, block in enumerate(self.stages):
            x = self.run_block(block, x)
            maps.append(rearrange(x, "b h w c -> b c h w"))
            if index < len(self.downsamplings):
                x = self.downsamplings[index](x)
        x = rearrange(self.norm(x), "b h w c -> b c h w")
        return EncoderOutput(x, x.mean(dim=(2, 3)), tuple(maps) if return_stages else None)

    def blocks(self) -> list[nn.Module]:
        return list(self.stages)

    def named_stages(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for index, block in enumerate(self.stages):
            modules[f"stage{index}.block0"] = block
            if index < len(self.downsamplings):
                modules[f"stage{index}.downsampling"] = self.downsamplings[index]
        return modules

    def stage_modules(self) -> list[list[nn.Module]]:
        stages = [[block, *self.downsamplings[index : index + 1]] for index, block in enumerate(self.stages)]
        return [[self.patches, *stages[0]], *stages[1:]]

    def layer_of(self, name: str) -> int:
        match name.split("."):
            case ["patches", _]:
                return 0
            case ["stages" | "downsamplings", index, *_]:
                return int(index) + 1
            case ["norm", _]:
                return self.num_layers + 1
        raise KeyError(f"{name} is no parameter of this encoder")


def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W), padded with zeros at the bottom and right to multiples of `side`."""
    return F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))


FAMILY = EncoderFamily(
    name="toy", title="Toy", config=ToyConfig, build=ToyEncoder, presets={"toy": ToyConfig()}, paper="none"
)
