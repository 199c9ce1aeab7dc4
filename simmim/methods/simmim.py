"""SimMIM (arXiv 2111.09886): mask, encode, predict the pixels by one linear layer, L1 over what was masked.

Shape letters: B images, H W tokens of the first stage in height and width, C channels of a feature map. A mask is
(B, H, W) bool at patch resolution, True = masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from simmim.defaults import default_mask_unit
from simmim.encoders.base import Encoder, EncoderConfig, Size
from simmim.encoders.cost import Flops, LayerCost, Setup
from simmim.execution import to_device
from simmim.methods.base import Method, MethodOutput, MethodSettings, Reconstruction
from simmim.methods.masking import BlockMasking
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


@dataclass(frozen=True)
class SimMIMSettings(MethodSettings):
    """Masking, target, and changes to the preset's encoder.

    Args:
        mask_unit: side of a mask unit in pixels; by default the largest that leaves six units or more per side.
        mask_ratio: share of the units that is masked.
        norm_target_patch: side in pixels, odd, of the sliding patch that normalizes the target (47 as published for
            192 px); raw pixels by default.
        encoder: settings of the encoder that replace the preset's, such as window_size, drop_path_rate or depths.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: attend to this number of windows at a time and recompute each group's attention in the
            backward pass: less memory where images or windows are large.
    """

    absent: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("share", "shared_stages", "decoder_dim", "decoder_depth"), "images share a canvas with --method canvas"
    )

    mask_unit: int | None = None
    mask_ratio: float = 0.6
    norm_target_patch: int | None = None

    def resolve(self, image_size: Size, config: EncoderConfig) -> SimMIMSettings:
        """With a mask unit that suits the images.

        Raises:
            ValueError: when no unit fits, the given one does not divide the image, or nothing would be left visible.
        """
        unit = default_mask_unit(image_size, config.patch_size) if self.mask_unit is None else self.mask_unit
        resolved = replace(self, mask_unit=unit)
        resolved.masking(config.patch_size).num_masked_units(image_size)
        return resolved

    def masking(self, patch_size: int) -> BlockMasking:
        """How masks are drawn, once resolved."""
        assert self.mask_unit is not None, "settings are not resolved"
        return BlockMasking(self.mask_unit, self.mask_ratio, patch_size)


class SimMIM(Method):
    """An encoder under masked image modeling.

    Args:
        encoder: any encoder; the mask token stands for masked patches after its `embed`.
        norm_target_patch: side in pixels, odd, of the sliding patch by whose mean and deviation each target pixel is
            normalized (47 for Swin V2's own pre-training); None predicts raw, that is only preprocessed, pixels.
        masking: how masks are drawn; not needed where masks are given.
    """

    name = "simmim"
    title = "SimMIM"
    own_parts = "mask token and decoder"
    paper = "arXiv 2111.09886"
    loss_name = "masked_l1"
    loss_description = "mean absolute error over the masked pixels; 1 is a standard deviation of the normalized images"
    settings_class = SimMIMSettings

    def __init__(self, encoder: Encoder, norm_target_patch: int | None = None, masking: BlockMasking | None = None) -> None:
        super().__init__()
        check_target_patch(norm_target_patch)
        self.encoder = encoder
        self.norm_target_patch, self.masking = norm_target_patch, masking
        self.mask_token = nn.Parameter(torch.zeros(encoder.channels[0]))
        self.decoder = PixelDecoder(encoder)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @classmethod
    def build(cls, encoder: Encoder, settings: SimMIMSettings) -> SimMIM:
        """From resolved settings."""
        return cls(encoder, settings.norm_target_patch, settings.masking(encoder.config.patch_size))

    def forward(
        self, images: Tensor, mask: Tensor, return_reconstruction: bool = False, valid: Tensor | None = None
    ) -> MethodOutput:
        """Loss of predicting the masked pixels of `images` from the visible ones.

        Args:
            images: (B, channels, height, width), float, normalized.
            mask: (B, H, W) bool, True = masked.
            valid: bool of the images' shape, where they have data; None for everywhere.
        """
        tokens = self.encoder.embed(images)
        tokens = self.substitute(tokens, mask)
        features = self.encoder.encode(tokens).features
        prediction = self.decoder.predict(features, images.shape[-2:]) if return_reconstruction else None  # type: ignore[arg-type]
        loss = self.decoder.loss(features, self.targets(images, valid), mask, prediction, valid)
        return MethodOutput(loss, prediction)

    def change_size(self, config: EncoderConfig, settings: SimMIMSettings) -> None:
        """As `Method.change_size`: other mask units."""
        super().change_size(config, settings)
        self.masking = settings.masking(config.patch_size)

    def substitute(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Masked tokens, (B, H, W, C), replaced by the one learned mask token."""
        if mask.shape != tokens.shape[:3] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}: expected bool {tuple(tokens.shape[:3])}, True = masked, "
                "one entry per patch"
            )
        return torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)

    def targets(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the masked pixels are compared with: the images, or the images normalized over a sliding patch."""
        return pixel_targets(images, self.norm_target_patch, valid)

    def draw(self, image_size: Size, seeds: Sequence[int], device: torch.device) -> Tensor:
        """Masks, (B, H, W) bool, True = masked. They are drawn on the host, and so the same on every device."""
        assert self.masking is not None, "masks are given to a SimMIM without masking"
        return to_device(self.masking.draw(len(seeds), image_size, torch.Generator(), list(seeds)), device)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Reconstruction:
        """The prediction as pixels in the scale of `images` (`as_pixels`), for pictures."""
        prediction = self(images, mask, return_reconstruction=True).reconstruction
        return Reconstruction(mask, as_pixels(prediction, images, self.norm_target_patch))

    def describe(self, image_size: Size) -> str:
        """How much is masked."""
        assert self.masking is not None
        units = math.prod(self.masking.grid(image_size))
        return f"{self.masking.num_masked_units(image_size)} of {units} units of {self.masking.unit_px} px masked"

    def provenance(self) -> dict[str, Any]:
        """Masking and target."""
        assert self.masking is not None
        return {
            "mask_unit": self.masking.unit_px,
            "mask_ratio": self.masking.ratio,
            "norm_target_patch": self.norm_target_patch,
        }

    # --- own state ---------------------------------------------------------------------------------------------------

    @classmethod
    def expected_state(cls, config: EncoderConfig, settings: SimMIMSettings) -> dict[str, tuple[int, ...]]:
        """Mask token and decoder."""
        decoder = decoder_shapes(config, config.channels[-1])
        return {"mask_token": (config.channels[0],)} | {f"decoder.{name}": shape for name, shape in decoder.items()}

    def load_own_state(self, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> str:
        """Take over mask token and decoder, and note a decoder that was trained for other targets."""
        return super().load_own_state(state, provenance) + note_on_targets(provenance, self.norm_target_patch)

    def no_decay(self) -> tuple[str, ...]:
        """The mask token, as the reference means to."""
        return ("mask_token",)

    # --- cost --------------------------------------------------------------------------------------------------------

    @classmethod
    def head_flops(
        cls, config: EncoderConfig, settings: SimMIMSettings, image_size: Size, setup: Setup, predicted: float = 1.0
    ) -> Flops:
        """FLOPs of the decoder. A CPU predicts only the cells that are masked (`PixelDecoder.masked_cells`)."""
        forward = predicted * decoder_flops(config, config.channels[-1], image_size)
        return Flops(forward, 3 * forward)  # a product has two gradients

    @classmethod
    def head_layers(cls, config: EncoderConfig, settings: SimMIMSettings, image_size: Size, setup: Setup) -> list[LayerCost]:
        """Memory of decoder and loss, with every pixel predicted; the mask token counts among the parameters."""
        return [decoder_cost(config, config.channels[-1], image_size, setup, config.channels[0])]
