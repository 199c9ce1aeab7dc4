"""SimMIM with several images on one canvas: the encoder computes visible patches alone, in the windows that it has.

k images share a canvas. Its mask units are dealt out to them at random, and each image shows on the canvas where its units
are. The encoder runs once over the canvas, densely; tokens of different images do not attend to one another. So every image
is encoded as if its visible tokens alone had gone through the windows of its map, at 1/k of the cost, and 1 − 1/k of it is
masked. Then each image's tokens return to their places on a grid of its own, a mask token fills the rest, and a light
decoder and SimMIM's linear layer predict the masked pixels. Targets and loss are SimMIM's (arXiv 2111.09886).

Where a token of the last stages is larger than a mask unit, as of thumbnails, the mask tokens come late: the first stages
share a canvas, then each image's tokens return to a grid of its own, mask tokens fill the rest, and the last stages and the
linear layer compute every image for itself, as SimMIM's do.

Consecutive images of a batch share a canvas, and a device's batch holds whole canvases. Indexed images have the same order
on any number of devices, and so the same companions; a stream is divided among devices and workers, and companions with it.

Stochastic depth of the encoder drops a branch for a canvas, and so for all images on it.

Shape letters: B images, k images on a canvas, H W tokens of the first stage in height and width, C channels of the encoder's
last map, h w its height and width, D channels of the decoder; with late mask tokens C' h' w' of the last map that is shared.
A mask is (B, H, W) bool at patch resolution, True = masked;
images n · k to n · k + k − 1 are on canvas n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, Size
from simmim.encoders.cost import CostModel, Flops, LayerCost, Setup
from simmim.execution import is_eager, to_device
from simmim.methods.base import Method, MethodOutput, MethodSettings, Reconstruction
from simmim.methods.masking import SharedCanvas, check_share, enlarge
from simmim.methods.pixels import (
    PixelDecoder,
    as_pixels,
    check_target_patch,
    decoder_cost,
    decoder_flops,
    decoder_shapes,
    note_on_targets,
    pixel_targets,
)

LARGEST_DEFAULT_UNIT_PX = 32  # as published for 192 px
UNITS_PER_SIDE = (6, 4, 2)  # of the default mask unit at least, the first that there is
DECODER_DIM, LARGE_DECODER_DIM, LARGE_ENCODER_DIM = 256, 512, 1024  # the last is that of base
DECODER_DIM_STEP = 32


@dataclass(frozen=True)
class CanvasSettings(MethodSettings):
    """Canvas, decoder and target, and changes to the preset's encoder.

    Args:
        share: images on a canvas. It decides how much of each is masked: 1/2, 2/3, 3/4 for 2, 3, 4.
        mask_unit: side of a mask unit in pixels, a multiple of the stride of the last stage that is shared; by default the
            largest up to 32 px that leaves six units or more per side.
        shared_stages: stages that the images on a canvas share, from the first one on. With fewer than all, mask tokens come
            after them, the other stages compute each image for itself, and there is no decoder but the linear layer. By
            default all whose stride divides the mask unit.
        decoder_dim: channels of the decoder; by default 256, from base on 512, and no more than the encoder's last map has.
        decoder_depth: number of blocks of the decoder.
        norm_target_patch: side in pixels, odd, of the sliding patch that normalizes the target (47 as published for
            192 px); raw pixels by default.
        encoder: settings of the encoder that replace the preset's, such as window_size, drop_path_rate or depths.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: attend to this number of windows at a time and recompute each group's attention in the
            backward pass: less memory where images or windows are large.
    """

    absent: ClassVar[Mapping[str, str]] = {"mask_ratio": "model.share decides, 1 − 1/share of each image is masked"}

    share: int = 3
    mask_unit: int | None = None
    shared_stages: int | None = None
    decoder_dim: int | None = None
    decoder_depth: int = 1
    norm_target_patch: int | None = None

    def __post_init__(self) -> None:
        check_share(self.share)
        if self.decoder_depth < 1:
            raise ValueError(f"model.decoder_depth is {self.decoder_depth}: give 1 block or more")

    @property
    def images_per_input(self) -> int:
        """The images on a canvas."""
        return self.share

    def resolve(self, image_size: Size, config: EncoderConfig) -> CanvasSettings:
        """With a mask unit that suits the images and the encoder, and the width of the decoder.

        Raises:
            ValueError: when the encoder cannot keep images apart at this size, no unit fits, or there are fewer units than
                images on a canvas.
        """
        num_stages = len(config.channels)
        if self.shared_stages is not None and not 1 <= self.shared_stages <= num_stages:
            raise ValueError(f"model.shared_stages is {self.shared_stages}: give 1 to {num_stages}, the encoder's stages")
        if self.mask_unit is None:
            stride = config.strides[(self.shared_stages or num_stages) - 1]
            return replace(self, mask_unit=default_unit(image_size, stride)).resolve(image_size, config)
        config.first_stages(self.num_shared(config)).check_groups(image_size)
        self.canvas(config).grid(image_size)
        if self.is_late(config):
            if self.decoder_dim is not None or self.decoder_depth != 1:
                raise ValueError(
                    f"mask tokens come after stage {self.num_shared(config)} of {num_stages}, where there is no decoder: "
                    "leave out model.decoder_dim and model.decoder_depth, or give a larger model.mask_unit"
                )
            return self
        resolved = replace(self, decoder_dim=self.decoder_dim or default_decoder_dim(config))
        resolved.decoder_config(config)
        return resolved

    def num_shared(self, config: EncoderConfig) -> int:
        """How many stages share a canvas, once resolved: those that are asked for, or all whose stride divides the unit."""
        if self.shared_stages is not None or self.mask_unit is None:
            return self.shared_stages or len(config.channels)
        return max(1, sum(self.mask_unit % stride == 0 for stride in config.strides))

    def is_late(self, config: EncoderConfig) -> bool:
        """Whether mask tokens come between stages, and not after the last one."""
        return self.num_shared(config) < len(config.channels)

    def canvas(self, config: EncoderConfig) -> SharedCanvas:
        """How units are dealt out, once resolved."""
        assert self.mask_unit is not None, "settings are not resolved"
        stride = config.strides[self.num_shared(config) - 1]
        return SharedCanvas(self.share, self.mask_unit, config.patch_size, stride)

    def decoder_config(self, config: EncoderConfig) -> EncoderConfig:
        """The architecture of the decoder after an encoder."""
        return config.decoder_config(self.decoder_dim or default_decoder_dim(config), self.decoder_depth)


def default_unit(image_size: Size, stride: int) -> int:
    """The largest multiple of the last shared stage's stride up to 32 px of which six fit on each side; where none does,
    four, two, or any that divides the image."""
    largest = max(LARGEST_DEFAULT_UNIT_PX, stride)
    fitting = [unit for unit in range(stride, largest + 1, stride) if not any(side % unit for side in image_size)]
    for units_per_side in UNITS_PER_SIDE:
        large_enough = [unit for unit in fitting if min(image_size) // unit >= units_per_side]
        if large_enough:
            return max(large_enough)
    return stride


def default_decoder_dim(config: EncoderConfig) -> int:
    """Channels of the decoder after an encoder, a multiple of `DECODER_DIM_STEP`."""
    dim = config.channels[-1]
    most = max(dim // DECODER_DIM_STEP, 1) * DECODER_DIM_STEP
    return min(LARGE_DECODER_DIM if dim >= LARGE_ENCODER_DIM else DECODER_DIM, most)


class Canvas(Method):
    """An encoder under masked image modeling with several images on a canvas.

    Args:
        encoder: one that keeps groups of tokens apart.
        settings: resolved.
    """

    name = "canvas"
    title = "SimMIM on shared canvases"
    own_parts = "mask token and decoder"
    paper = "arXiv 2111.09886"
    loss_name = "masked_l1"
    loss_description = "mean absolute error over the masked pixels; 1 is a standard deviation of the normalized images"
    settings_class = CanvasSettings

    def __init__(self, encoder: Encoder, settings: CanvasSettings) -> None:
        super().__init__()
        check_target_patch(settings.norm_target_patch)
        self.encoder, self.settings = encoder, settings
        self.canvas = settings.canvas(encoder.config)
        self.num_shared, self.is_late = settings.num_shared(encoder.config), settings.is_late(encoder.config)
        self.decoder: Encoder | None = None
        if self.is_late:
            self.pixels, dim = PixelDecoder(encoder), encoder.channels[self.num_shared - 1]
        else:
            config = settings.decoder_config(encoder.config)
            self.decoder = registry.build(config, encoder.checkpoint_activations, encoder.sequential_attention)
            self.pixels, dim = PixelDecoder(encoder, self.decoder.dim), self.decoder.dim
        self.mask_token = nn.Parameter(torch.zeros(dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @classmethod
    def build(cls, encoder: Encoder, settings: CanvasSettings) -> Canvas:
        """From resolved settings."""
        return cls(encoder, settings)

    def forward(
        self, images: Tensor, mask: Tensor, return_reconstruction: bool = False, valid: Tensor | None = None
    ) -> MethodOutput:
        """Loss of predicting the masked pixels of `images` from the visible ones.

        Args:
            images: (B, channels, height, width), float, normalized.
            mask: (B, H, W) bool, True = masked, as from `draw`.
            valid: bool of the images' shape, where they have data; None for everywhere.
        """
        canvases, groups = self.compose(images, mask)
        tokens = self.encoder.embed(canvases)
        if self.is_late:
            tokens = self.part(self.encoder.encode_first(tokens, self.num_shared, groups), mask)
            features = self.encoder.encode_rest(tokens, self.num_shared).features
        else:
            features = self.decode(self.encoder.encode(tokens, groups=groups).features, mask)
        prediction = self.pixels.predict(features, images.shape[-2:]) if return_reconstruction else None  # type: ignore[arg-type]
        targets = pixel_targets(images, self.settings.norm_target_patch, valid)
        return MethodOutput(self.pixels.loss(features, targets, mask, prediction, valid), prediction)

    def change_size(self, config: EncoderConfig, settings: CanvasSettings) -> None:
        """As `Method.change_size`: other mask units."""
        super().change_size(config, settings)
        self.settings, self.canvas = settings, settings.canvas(config)

    def compose(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The canvases, and whose each of their patches is.

        A last canvas may have fewer images; patches of no image are zeros and a group of their own.

        Returns:
            (⌈B/k⌉, channels, height, width), and (⌈B/k⌉, H, W) uint8, the number of the image on its canvas.
        """
        self.check_mask(images, mask)
        share, missing = self.settings.share, -len(images) % self.settings.share
        if missing:
            images = torch.cat((images, images.new_zeros(missing, *images.shape[1:])))
            mask = torch.cat((mask, mask.new_ones(missing, *mask.shape[1:])))
        canvases = torch.zeros_like(images[::share])
        groups = torch.full_like(mask[::share], share, dtype=torch.uint8)
        for index in range(share):
            visible = ~mask[index::share]
            groups = groups.masked_fill(visible, index)
            pixels = enlarge(visible, self.encoder.config.patch_size)[:, None]
            # Not a product: masked pixels stay out, whatever they are.
            canvases = torch.where(pixels, images[index::share], canvases)
        return canvases, groups

    def check_mask(self, images: Tensor, mask: Tensor) -> None:
        """Check that masks are for these images, and on a CPU that no patch is visible in two images of a canvas.

        Raises:
            ValueError: naming the shape, or the canvas.
        """
        expected = (len(images), *(side // self.encoder.config.patch_size for side in images.shape[-2:]))
        if tuple(mask.shape) != expected or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}: expected bool {expected}, True = masked, one entry per patch"
            )
        if mask.device.type == "cpu" and is_eager():
            for canvas, masks in enumerate(mask.split(self.settings.share)):
                if (len(masks) - masks.sum(dim=0) > 1).any():
                    raise ValueError(f"mask: two images of canvas {canvas} show the same patch; give masks as from draw")

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """From features of canvases, (⌈B/k⌉, C, h, w), to those of images, (B, D, h, w).

        Tokens of an image stay at their places, the mask token is at all others.
        """
        assert self.decoder is not None, "mask tokens come late"
        return self.decoder.encode(self.part(self.decoder.embed(features), mask)).features

    def part(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """From tokens of canvases, (⌈B/k⌉, h, w, C), to those of images, (B, h, w, C).

        Tokens of an image stay at their places, the mask token is at all others.
        """
        tokens = tokens.repeat_interleave(self.settings.share, dim=0)[: len(mask)]
        cell = self.canvas.stride // self.encoder.config.patch_size
        hidden = mask[:, ::cell, ::cell, None]
        return torch.where(hidden, self.mask_token.to(tokens.dtype), tokens)

    def draw(self, image_size: Size, seeds: Sequence[int], device: torch.device) -> Tensor:
        """Masks, (B, H, W) bool, True = masked. Those of a canvas depend on the seeds of its images. They are drawn on the
        host, and so the same on every device."""
        return to_device(self.canvas.draw(image_size, seeds, torch.device("cpu")), device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Reconstruction:
        """The prediction as pixels in the scale of `images` (`as_pixels`), for pictures."""
        prediction = self(images, mask, return_reconstruction=True).reconstruction
        return Reconstruction(mask, as_pixels(prediction, images, self.settings.norm_target_patch))

    def describe(self, image_size: Size) -> str:
        """How many images are on a canvas, and how much of each is masked."""
        fewest, most = self.canvas.num_masked_units(image_size)
        masked = str(most) if fewest == most else f"{fewest} or {most}"
        units, depth = math.prod(self.canvas.grid(image_size)), self.settings.decoder_depth
        text = f"{self.settings.share} images on a canvas, {masked} of {units} units of {self.canvas.unit_px} px masked"
        if self.decoder is None:
            num_stages = len(self.encoder.channels)
            return f"{text}, mask tokens after stage {self.num_shared} of {num_stages}, from where images are encoded alone"
        return f"{text}, decoder of {depth} block{'s' * (depth > 1)} with {self.decoder.dim} channels"

    def provenance(self) -> dict[str, Any]:
        """Canvas, decoder and target, by the names of the settings."""
        return {
            "share": self.settings.share,
            "mask_unit": self.settings.mask_unit,
            "shared_stages": self.num_shared,
            "decoder_dim": self.decoder and self.decoder.dim,
            "decoder_depth": self.settings.decoder_depth,
            "norm_target_patch": self.settings.norm_target_patch,
        }

    # --- own state ---------------------------------------------------------------------------------------------------

    @classmethod
    def expected_state(cls, config: EncoderConfig, settings: CanvasSettings) -> dict[str, tuple[int, ...]]:
        """Mask token, decoder and its linear layer; with late mask tokens no decoder."""
        if settings.is_late(config):
            token = {"mask_token": (config.channels[settings.num_shared(config) - 1],)}
            shapes = decoder_shapes(config, config.channels[-1])
            return token | {f"pixels.{name}": shape for name, shape in shapes.items()}
        decoder = settings.decoder_config(config)
        return {
            "mask_token": (decoder.channels[0],),
            **{f"decoder.{name}": shape for name, shape in state_shapes(decoder).items()},
            **{f"pixels.{name}": shape for name, shape in decoder_shapes(config, decoder.channels[-1]).items()},
        }

    def load_own_state(self, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> str:
        """Take over mask token and decoder, and note a decoder that was trained for other targets."""
        return super().load_own_state(state, provenance) + note_on_targets(provenance, self.settings.norm_target_patch)

    def no_decay(self) -> tuple[str, ...]:
        """The mask token, and what never decays in a decoder of the encoder's kind."""
        return ("mask_token", *(self.decoder.no_decay() if self.decoder else ()))

    # --- cost --------------------------------------------------------------------------------------------------------

    @classmethod
    def encoder_flops(
        cls, cost: CostModel, config: EncoderConfig, settings: CanvasSettings, image_size: Size, setup: Setup
    ) -> Flops:
        """As `Method.encoder_flops`. With late mask tokens the last stages compute every image."""
        shared = super().encoder_flops(cost, config, settings, image_size, setup)
        if not settings.is_late(config):
            return shared
        first = config.first_stages(settings.num_shared(config))
        without = super().encoder_flops(cost, first, settings, image_size, setup)
        whole, part = (cost.flops(of, image_size, setup) for of in (config, first))
        forward = without.forward + whole.forward - part.forward
        return Flops(forward, without.training + whole.training - part.training)

    @classmethod
    def encoder_layers(
        cls, cost: CostModel, config: EncoderConfig, settings: CanvasSettings, image_size: Size, setup: Setup
    ) -> Sequence[LayerCost]:
        """As `Method.encoder_layers`. With late mask tokens the last stages hold every image."""
        shared = super().encoder_layers(cost, config, settings, image_size, setup)
        if not settings.is_late(config):
            return shared
        first = config.first_stages(settings.num_shared(config))
        count = len(cost.layers(first, image_size, setup)) - 1  # its norm is none of these
        return [*shared[:count], *cost.layers(config, image_size, setup)[count:]]

    @classmethod
    def head_flops(
        cls, config: EncoderConfig, settings: CanvasSettings, image_size: Size, setup: Setup, predicted: float = 1.0
    ) -> Flops:
        """FLOPs of decoder and linear layer. Tokens are projected on the canvas, and decoded on each image's own grid."""
        if settings.is_late(config):
            forward = predicted * decoder_flops(config, config.channels[-1], image_size)
            return Flops(forward, 3 * forward)
        decoder, grid = settings.decoder_config(config), last_map(config, image_size)
        cost = registry.family_of(decoder).cost
        assert cost is not None, "an encoder that can be planned has a decoder that can"
        blocks = cost.flops(decoder, grid, setup)
        projection = 2 * math.prod(grid) * decoder.in_channels * decoder.channels[-1]
        saved = projection * (1 - 1 / settings.share)
        pixels = predicted * decoder_flops(config, decoder.channels[-1], image_size)
        # The cost of an encoder is without the gradient of its images, which here are features.
        training = blocks.training + projection + 3 * (pixels - saved)
        return Flops(blocks.forward - saved + pixels, training)

    @classmethod
    def head_layers(cls, config: EncoderConfig, settings: CanvasSettings, image_size: Size, setup: Setup) -> list[LayerCost]:
        """Memory of the images beside their canvases, of decoder, linear layer and loss."""
        images = setup.batch_per_device * math.prod(image_size) * config.in_channels * 4
        if settings.is_late(config):
            dim = config.channels[settings.num_shared(config) - 1]
            return [LayerCost(0, images), decoder_cost(config, config.channels[-1], image_size, setup, more_parameters=dim)]
        decoder, grid = settings.decoder_config(config), last_map(config, image_size)
        cost = registry.family_of(decoder).cost
        assert cost is not None, "an encoder that can be planned has a decoder that can"
        setup = replace(setup, strategy="ddp")  # FSDP gathers the encoder's blocks by themselves, and not the decoder's
        canvases = replace(setup, batch_per_device=math.ceil(setup.batch_per_device / settings.share))
        projection = cost.layers(decoder, grid, canvases)[0]
        # An encoder's images stay for the whole step; these features go once they are copied.
        features = canvases.batch_per_device * math.prod(grid) * decoder.in_channels * 4
        return [
            LayerCost(0, images),
            replace(projection, kept=projection.kept - features),
            *cost.layers(decoder, grid, setup)[1:],
            decoder_cost(config, decoder.channels[-1], image_size, setup, more_parameters=decoder.channels[0]),
        ]


def last_map(config: EncoderConfig, image_size: Size) -> Size:
    """Height and width of the encoder's last map."""
    height, width = (-(-side // config.strides[-1]) for side in image_size)
    return height, width


@lru_cache(maxsize=64)
def state_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder's parameters, from one on the meta device."""
    with torch.device("meta"):
        encoder = registry.build(config)
    return {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
