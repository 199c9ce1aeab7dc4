"""SimMIM with contrast: the masked image also agrees with another view of itself, and not with other images.

The masked image goes through the encoder once. Its masked pixels are predicted as in SimMIM (arXiv 2111.09886), and the mean
of its features, projected, has to find the other view of the same image among those of the batch (InfoNCE). Other views are
encoded whole by a momentum encoder, a moving average of the encoder, without gradient.

After CMAE (arXiv 2207.13532), from which it differs: SimMIM's masked input and linear decoder in place of MAE's, and so no
decoder of features; another crop, as SimMIM crops, with shifts of tone, in place of a crop shifted by some pixels; layer
norm in place of batch norm in the projectors, so that nothing but the negatives depends on the batch. As in MoCo v3
(arXiv 2104.02057) there is no queue: the negatives are the other images of the batch, on all devices. Where batches are
accumulated, they are those of one forward pass.

Shape letters: B images, H W tokens of the first stage in height and width, F pooled features, P channels of the projection,
G images on all devices. A mask is (B, H, W) bool at patch resolution, True = masked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simmim.encoders import registry
from simmim.encoders.base import Encoder, EncoderConfig, EncoderOutput, Size
from simmim.encoders.cost import Flops, LayerCost, Setup
from simmim.execution import at_least_float32, rows_of_all_processes, to_device, without_autocast
from simmim.methods.base import MethodOutput
from simmim.methods.simmim import SimMIM, SimMIMSettings

MOMENTUM_PARTS = ("momentum_encoder.", "momentum_projector.")
RGB = 3  # channels of which tone and gray are known


@dataclass(frozen=True)
class ContrastSettings(SimMIMSettings):
    """Masking, target, contrast, and changes to the preset's encoder.

    Args:
        contrast_weight: of the contrast in the loss, beside the masked pixels, whose weight is 1.
        temperature: by which similarities, −1 to 1, are divided; CMAE has 0.07, MoCo v3 0.2.
        momentum: of the momentum encoder after the first step; it rises to 1 along a half cosine.
        contrast_stages: number of stages, counted from the last, whose mean features are compared, side by side.
        projector_dim: channels of the hidden layer of projector and predictor.
        projection_dim: channels in which views are compared.
        view_scale: side of the other view over that of the image; smaller views cost less, as its square.
        view_jitter: largest shift of brightness and change of contrast of the other view, of a deviation; in color half as
            much for each channel.
        view_gray: probability that the other view of a color image is gray.
        mask_unit: side of a mask unit in pixels; by default the largest that leaves six units or more per side.
        mask_ratio: share of the units that is masked.
        norm_target_patch: side in pixels, odd, of the sliding patch that normalizes the target (47 as published for
            192 px); raw pixels by default.
        encoder: settings of the encoder that replace the preset's, such as window_size, drop_path_rate or depths.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: attend to this number of windows at a time and recompute each group's attention in the
            backward pass: less memory where images or windows are large.
    """

    contrast_weight: float = 0.5
    temperature: float = 0.2
    momentum: float = 0.99
    contrast_stages: int = 1
    projector_dim: int = 512
    projection_dim: int = 128
    view_scale: float = 1.0
    view_jitter: float = 0.4
    view_gray: float = 0.2

    def __post_init__(self) -> None:
        for name in ("contrast_weight", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} is {getattr(self, name):g}: give a positive number")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"model.momentum is {self.momentum:g}: give a number from 0 to 1, as 0.99")
        for name in ("contrast_stages", "projector_dim", "projection_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: give 1 or more")
        if not 0 < self.view_scale <= 2:
            raise ValueError(f"model.view_scale is {self.view_scale:g}: give a number above 0, at most 2")
        for name in ("view_jitter", "view_gray"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"model.{name} is {getattr(self, name):g}: give a number from 0 to 1")

    @property
    def smallest_batch(self) -> int:
        """An image and one other."""
        return 2

    def further_views(self, image_size: Size, config: EncoderConfig) -> tuple[Size]:
        """The one other view: `view_scale` of the image's sides, to the nearest multiple of the last stage's stride."""
        if self.view_scale == 1:
            return (image_size,)
        stride = config.strides[-1]
        height, width = (max(round(side * self.view_scale / stride), 1) * stride for side in image_size)
        return ((height, width),)

    def resolve(self, image_size: Size, config: EncoderConfig) -> ContrastSettings:
        """As `SimMIMSettings.resolve`.

        Raises:
            ValueError: also for more stages than the encoder has.
        """
        if self.contrast_stages > len(config.channels):
            raise ValueError(
                f"model.contrast_stages is {self.contrast_stages} and the encoder has {len(config.channels)} stages"
            )
        return super().resolve(image_size, config)  # type: ignore[return-value]

    def features_dim(self, config: EncoderConfig) -> int:
        """F, the channels of what is projected."""
        return sum(config.channels[-self.contrast_stages :])


class Contrast(SimMIM):
    """An encoder under masked image modeling, a momentum encoder beside it, and what compares their features.

    Args:
        encoder: any encoder.
        settings: resolved.
    """

    name = "contrast"
    title = "SimMIM with contrast"
    own_parts = "mask token, decoder and projector"
    paper = "arXiv 2207.13532"
    loss_name = "total"
    loss_description = (
        "mean absolute error over the masked pixels plus the contrast by its weight; on held-out images the pixels alone"
    )
    settings_class = ContrastSettings
    supports_sharding = False

    def __init__(self, encoder: Encoder, settings: ContrastSettings) -> None:
        super().__init__(encoder, settings.norm_target_patch, settings.masking(encoder.config.patch_size))
        self.settings = settings
        inputs, hidden, outputs = settings.features_dim(encoder.config), settings.projector_dim, settings.projection_dim
        self.projector, self.predictor = two_layers(inputs, hidden, outputs), two_layers(outputs, hidden, outputs)
        with torch.random.fork_rng(devices=[]):  # copies are made below, so that nothing depends on what is drawn here
            self.momentum_encoder = registry.build(encoder.config, False, encoder.sequential_attention)
            self.momentum_projector = two_layers(inputs, hidden, outputs)
        for part in (self.momentum_encoder, self.momentum_projector):
            part.requires_grad_(False)
        self.weights_loaded()
        self.train(self.training)

    @classmethod
    def build(cls, encoder: Encoder, settings: ContrastSettings) -> Contrast:  # type: ignore[override]
        """From resolved settings."""
        return cls(encoder, settings)

    # --- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        return_reconstruction: bool = False,
        valid: Tensor | None = None,
        views: Sequence[Tensor] = (),
    ) -> MethodOutput:
        """Loss of predicting the masked pixels, and of finding each image's other view by the visible ones.

        Args:
            images: (B, channels, height, width), float, normalized.
            mask: (B, H, W) bool, True = masked.
            valid: bool of the images' shape, where they have data; None for everywhere.
            views: the other view of each image, (B, channels, h, w), in any size; without it there is no contrast.
        """
        tokens = self.substitute(self.encoder.embed(images), mask)
        output = self.encoder.encode(tokens, return_stages=self.settings.contrast_stages > 1)
        prediction = self.decoder.predict(output.features, images.shape[-2:]) if return_reconstruction else None  # type: ignore[arg-type]
        pixels = self.decoder.loss(output.features, self.targets(images, valid), mask, prediction, valid)
        if not views:
            return MethodOutput(pixels, prediction)
        queries = self.predictor(self.projector(self.pooled(output)))
        contrast, agreement = info_nce(queries, self.keys(views[0]), self.settings.temperature)
        parts = {"masked_l1": pixels.detach(), "contrast": contrast.detach(), "agreement": agreement}
        return MethodOutput(pixels + self.settings.contrast_weight * contrast, prediction, parts)

    def change_size(self, config: EncoderConfig, settings: ContrastSettings) -> None:  # type: ignore[override]
        """As `SimMIM.change_size`, of the momentum encoder too."""
        super().change_size(config, settings)
        self.momentum_encoder.change_config(config)
        self.settings = settings

    def pooled(self, output: EncoderOutput) -> Tensor:
        """Mean features of the last map and, normalized, of the stages before it that are compared: (B, F)."""
        if output.stages is None:
            return output.pooled
        earlier = output.stages[-self.settings.contrast_stages : -1]
        # Their maps have had no norm, and amplitudes that grow with depth.
        means = [at_least_float32(stage).mean(dim=(2, 3)) for stage in earlier]
        normalized = [F.layer_norm(mean, mean.shape[1:]).to(output.pooled.dtype) for mean in means]
        return torch.cat([*normalized, output.pooled], dim=1)

    @torch.no_grad()
    def keys(self, views: Tensor) -> Tensor:
        """Projections of the other views by the momentum encoder, (B, P)."""
        tokens = self.momentum_encoder.embed(views)
        output = self.momentum_encoder.encode(tokens, return_stages=self.settings.contrast_stages > 1)
        return self.momentum_projector(self.pooled(output))

    def change_views(self, views: Sequence[Tensor], seeds: Sequence[int]) -> list[Tensor]:
        """Shifted tones, and some in gray."""
        return [change_tone(view, seeds, self.settings.view_jitter, self.settings.view_gray) for view in views]

    def train(self, mode: bool = True) -> Contrast:
        """Training mode of all that is trained. The momentum encoder has no stochastic depth."""
        super().train(mode)
        self.momentum_encoder.eval()
        self.momentum_projector.eval()
        return self

    # --- the momentum encoder ----------------------------------------------------------------------------------------

    def averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters of momentum encoder and projector, and those that they follow."""
        followers = chain(self.momentum_encoder.parameters(), self.momentum_projector.parameters())
        return list(followers), list(chain(self.encoder.parameters(), self.projector.parameters()))

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Momentum encoder ← m · momentum encoder + (1 − m) · encoder, and the projector likewise, in their own number type;
        buffers are copied."""
        followers, followed = self.averaged()
        update = get_ema_multi_avg_fn(momentum_at(progress, self.settings.momentum))
        update(followers, [value.detach() for value in followed], None)
        self.copy_buffers()

    @torch.no_grad()
    def weights_loaded(self) -> None:
        """Begin with copies of encoder and projector."""
        for follower, value in zip(*self.averaged(), strict=True):
            follower.copy_(value)
        self.copy_buffers()

    def copy_buffers(self) -> None:
        """Copy what is no parameter, statistics of batch norms for instance."""
        for follower, value in zip(self.momentum_encoder.buffers(), self.encoder.buffers(), strict=True):
            follower.copy_(value)

    # --- looking at it -----------------------------------------------------------------------------------------------

    def describe(self, image_size: Size) -> str:
        """How much is masked, and what is compared."""
        ((height, width),) = self.settings.further_views(image_size, self.encoder.config)
        return (
            f"{super().describe(image_size)}, contrast by {self.settings.contrast_weight:g} with another view of "
            f"{height}×{width} px"
        )

    def provenance(self) -> dict[str, Any]:
        """Masking, target and contrast, by the names of the settings."""
        inherited = {"encoder", "checkpoint_activations", "sequential_attention"}
        own = {name: value for name, value in vars(self.settings).items() if name not in inherited}
        return {**super().provenance(), **own}

    # --- own state ---------------------------------------------------------------------------------------------------

    def own_state(self) -> dict[str, Tensor]:
        """Without the momentum encoder, which begins as a copy."""
        return {name: value for name, value in super().own_state().items() if not name.startswith(MOMENTUM_PARTS)}

    @classmethod
    def expected_state(cls, config: EncoderConfig, settings: ContrastSettings) -> dict[str, tuple[int, ...]]:  # type: ignore[override]
        """Mask token, decoder, projector and predictor."""
        hidden, outputs = settings.projector_dim, settings.projection_dim
        return {
            **super().expected_state(config, settings),
            **two_layers_shapes("projector", settings.features_dim(config), hidden, outputs),
            **two_layers_shapes("predictor", outputs, hidden, outputs),
        }

    # --- cost --------------------------------------------------------------------------------------------------------

    @classmethod
    def head_flops(  # type: ignore[override]
        cls, config: EncoderConfig, settings: ContrastSettings, image_size: Size, setup: Setup, predicted: float = 1.0
    ) -> Flops:
        """FLOPs of decoder, projectors, and the momentum encoder's forward pass, which a training step has alone."""
        pixels = super().head_flops(config, settings, image_size, setup, predicted)
        (view_size,) = settings.further_views(image_size, config)
        cost = registry.family_of(config).cost
        assert cost is not None, "an encoder that can be planned has a cost"
        hidden, outputs = settings.projector_dim, settings.projection_dim
        project, predict = 2 * hidden * (settings.features_dim(config) + outputs), 4 * hidden * outputs
        similar = 2 * outputs * setup.batch_per_device * setup.devices
        momentum = cost.flops(config, view_size, setup).forward + project
        forward = pixels.forward + momentum + project + predict + similar
        # Negatives have no gradient, and nor has what computes them.
        return Flops(forward, pixels.training + momentum + 3 * (project + predict) + 2 * similar)

    @classmethod
    def head_layers(  # type: ignore[override]
        cls, config: EncoderConfig, settings: ContrastSettings, image_size: Size, setup: Setup
    ) -> list[LayerCost]:
        """Memory of decoder and loss; of projector, predictor, momentum encoder and the other views."""
        (view_size,) = settings.further_views(image_size, config)
        cost = registry.family_of(config).cost
        assert cost is not None, "an encoder that can be planned has a cost"
        # A pass without gradients keeps its layer's input alone, as one whose activations are recomputed.
        layers = cost.layers(config, view_size, replace(setup, checkpoint_activations=True))
        working = max(layer.kept + layer.forward for layer in layers)
        shapes = cls.expected_state(config, settings)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        trained = sum(size for name, size in sizes.items() if name.startswith(("projector.", "predictor.")))
        frozen = sum(layer.parameters for layer in layers)
        frozen += sum(size for name, size in sizes.items() if name.startswith("projector."))
        batch, images = setup.batch_per_device, setup.batch_per_device * setup.devices
        views = batch * math.prod(view_size) * config.in_channels * 4
        vectors = batch * (settings.features_dim(config) + 8 * settings.projector_dim + 6 * settings.projection_dim)
        kept = views + 4 * (vectors + images * (settings.projection_dim + 2 * batch)) + setup.weight_copies(trained)
        return [
            *super().head_layers(config, settings, image_size, setup),
            LayerCost(trained, kept, forward=working, frozen=frozen),
        ]


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with layer norm and GELU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs))


def two_layers_shapes(name: str, inputs: int, hidden: int, outputs: int) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the parameters of `two_layers` in a part of that name."""
    return {
        f"{name}.0.weight": (hidden, inputs),
        f"{name}.0.bias": (hidden,),
        f"{name}.1.weight": (hidden,),
        f"{name}.1.bias": (hidden,),
        f"{name}.3.weight": (outputs, hidden),
        f"{name}.3.bias": (outputs,),
    }


def momentum_at(progress: float, base: float) -> float:
    """Momentum of the update at a share `progress` of the run, in [0, 1]: from `base` along a half cosine to 1, as in BYOL
    (arXiv 2006.07733)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE: mean cross entropy of each query's own key among the keys of all devices, by cosine over temperature.

    The gradient reaches the queries alone, so that the mean over devices of each one's gradient is that of all images.

    Args:
        queries, keys: (B, P), row by row of the same images.

    Returns:
        The loss and the share of queries whose own key is the most similar one, scalars, at least float32.
    """
    with without_autocast(queries.device):
        queries, keys = (F.normalize(at_least_float32(rows), dim=1) for rows in (queries, keys))
        everything, first = rows_of_all_processes(keys)
        similarities = queries @ everything.T / temperature  # (B, G)
        own = torch.arange(first, first + len(queries), device=queries.device)
        agreement = (similarities.detach().argmax(dim=1) == own).to(similarities.dtype).mean()
        return F.cross_entropy(similarities, own), agreement


def change_tone(images: Tensor, seeds: Sequence[int], jitter: float, gray: float) -> Tensor:
    """Shift brightness and change contrast of each image; in color those of its channels too, and some become gray.

    Images of other than three channels are measurements: their channels change together.

    Args:
        images: (B, channels, height, width), normalized, so that 1 is a deviation.
        seeds: one per image.
        jitter: largest shift of brightness, and of contrast beside 1; half as much for each channel.
        gray: probability of gray.
    """
    channels = images.shape[1]
    if not jitter and not (gray and channels == RGB):
        return images
    rows = []
    for seed in seeds:
        generator = random.Random(f"{seed}/tone")
        draws = [generator.uniform(-1, 1) for _ in range(2 + 2 * RGB)]
        rows.append([*draws, float(generator.random() < gray)])
    drawn = to_device(torch.tensor(rows, dtype=images.dtype), images.device)
    shift, gain, becomes_gray = drawn[:, :1], drawn[:, 1:2], drawn[:, -1:].bool()
    if channels == RGB:
        shift, gain = shift + drawn[:, 2 : 2 + RGB] / 2, gain + drawn[:, 2 + RGB : -1] / 2
        images = torch.where(becomes_gray[..., None, None], images.mean(dim=1, keepdim=True), images)
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (images - mean) * (1 + jitter * gain)[..., None, None] + mean + jitter * shift[..., None, None]
