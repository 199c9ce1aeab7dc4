"""The protocol between methods of pre-training and the rest of the toolkit.

A method holds an encoder and whatever else it trains. Runs, checkpoints, exports and pictures use what this file declares
and nothing else: they store a method's name and its state without knowing the shapes.

Shape letters: B images, H W tokens of the first stage in height and width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from simmim.encoders.base import Encoder, EncoderConfig, Size, State
from simmim.encoders.cost import CostModel, Flops, LayerCost, Setup

Settings = TypeVar("Settings", bound="MethodSettings")


class MethodOutput(NamedTuple):
    """What a method's forward pass returns.

    Attributes:
        loss: a scalar.
        reconstruction: on request, and where the method predicts pixels, (B, channels, height, width); else None.
        metrics: scalars to log beside the loss, its parts for instance, by name; None for none.
    """

    loss: Tensor
    reconstruction: Tensor | None = None
    metrics: Mapping[str, Tensor] | None = None


class Reconstruction(NamedTuple):
    """What a method makes of images, for pictures.

    Attributes:
        mask: (B, H, W) bool at patch resolution, True = masked.
        prediction: (B, channels, height, width) in the scale of the images.
    """

    mask: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class MethodSettings:
    """Settings of the model in pre-training; each method adds its own in a subclass.

    Args:
        encoder: settings of the encoder that replace the preset's, such as window_size, drop_path_rate or depths.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.
        sequential_attention: attend to this number of windows at a time and recompute each group's attention in the
            backward pass: less memory where images or windows are large.
    """

    # Settings of other methods that users may expect here, and why there is no such setting.
    absent: ClassVar[Mapping[str, str]] = {}

    encoder: dict[str, Any] = field(default_factory=dict)
    checkpoint_activations: bool = False
    sequential_attention: int | None = None

    @property
    def images_per_input(self) -> int:
        """Images that the encoder takes as one. A device's batch is a multiple of it, and consecutive images go together."""
        return 1

    @property
    def smallest_batch(self) -> int:
        """Images that the devices must have at once, all together: more than one where images are compared."""
        return 1

    def further_views(self, image_size: Size, config: EncoderConfig) -> Sequence[Size]:
        """The size, (height, width), of each view that a method takes of an image beside the one of `image_size`. They are
        crops of their own, drawn in the same way."""
        return ()

    def resolve(self: Settings, image_size: Size, config: EncoderConfig) -> Settings:
        """These settings with all filled in that the user left open.

        Raises:
            ValueError: when they cannot work on images of `image_size` (height, width) with that encoder.
        """
        return self


class Method(nn.Module, ABC):
    """An encoder under one method of pre-training.

    Attributes:
        name: as it stands in settings and files.
        title: as it stands in texts.
        own_parts: what the method trains beside the encoder, in words: "mask token and decoder".
        paper: what a model card cites.
        loss_name: of the loss, as metrics are grouped by it; described in `loss_description`.
        settings_class: what `build` takes.
        predicts_pixels: whether there are reconstructions to look at.
        supports_sharding: whether its weights may be divided among devices (FSDP).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    own_parts: ClassVar[str] = "own weights"
    paper: ClassVar[str] = ""
    loss_name: ClassVar[str]
    loss_description: ClassVar[str] = ""
    settings_class: ClassVar[type[MethodSettings]] = MethodSettings
    predicts_pixels: ClassVar[bool] = True
    supports_sharding: ClassVar[bool] = True

    encoder: Encoder

    @classmethod
    @abstractmethod
    def build(cls, encoder: Encoder, settings: Any) -> Method:
        """The method around an encoder, freshly initialized, from resolved settings of `settings_class`."""

    # --- training ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def draw(self, image_size: Size, seeds: Sequence[int], device: torch.device) -> Tensor:
        """The random part of a step on a batch, masks for instance: one row per image, from the seeds alone of the images
        that share its input (`MethodSettings.images_per_input` consecutive ones), so that it depends neither on the rest of
        the batch nor on the device's share of it."""

    @abstractmethod
    def forward(
        self, images: Tensor, drawn: Tensor, return_reconstruction: bool = False, valid: Tensor | None = None
    ) -> MethodOutput:
        """The loss of a batch.

        Args:
            images: (B, channels, height, width), float, normalized; zeros, the mean, where there is no data.
            drawn: as from `draw`.
            valid: bool of the images' shape, where they have data, which alone is learned from; None for everywhere.

        A method whose settings name further views also takes `views`, these views after `change_views`; without them its
        loss is of `images` alone, as on images that are held out.
        """

    def change_views(self, views: Sequence[Tensor], seeds: Sequence[int]) -> Sequence[Tensor]:
        """Random changes of further views beyond their crops, colors for instance, on their device.

        Args:
            views: as `images` of `forward`.
            seeds: one per image; an image's changes depend on its own alone.
        """
        return views

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step, where averages of weights move on.

        Args:
            progress: share of the run's optimizer steps that have been taken, in (0, 1].
        """

    def change_size(self, config: EncoderConfig, settings: Any) -> None:
        """Go on with images of another size, with the same weights.

        Args:
            config: of the encoder (`Encoder.change_config`).
            settings: of this method, resolved for that size.
        """
        self.encoder.change_config(config)

    def weights_loaded(self) -> None:
        """Called when the weights that training starts from are in place. Copies of them begin here."""

    # --- looking at it -----------------------------------------------------------------------------------------------

    def reconstruct(self, images: Tensor, drawn: Tensor) -> Reconstruction:
        """What the method predicts of `images`, as pixels in their scale; where `predicts_pixels`."""
        raise ValueError(f"{self.title} predicts no pixels: there is nothing to reconstruct")

    def describe(self, image_size: Size) -> str:
        """What a step does to images of `image_size`, in a line of the run's summary; empty for nothing."""
        return ""

    def provenance(self) -> dict[str, Any]:
        """What an exported encoder says of how it was trained."""
        return {}

    # --- own state ---------------------------------------------------------------------------------------------------

    def own_state(self) -> State:
        """The weights that are not the encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    @classmethod
    @abstractmethod
    def expected_state(cls, config: EncoderConfig, settings: Any) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of `own_state` around an encoder of that architecture, with settings of `settings_class`."""

    @classmethod
    def settings_from(cls, provenance: Mapping[str, Any]) -> MethodSettings:
        """The settings that the provenance of an exported encoder names; the others have their defaults.

        Raises:
            ValueError, TypeError: for values that are none of such settings.
        """
        own = {item.name for item in fields(cls.settings_class)} - {item.name for item in fields(MethodSettings)}
        return cls.settings_class(**{name: value for name, value in provenance.items() if name in own})

    def load_own_state(self, state: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> str:
        """Take over the weights of an earlier run.

        Args:
            state: as of `expected_state` for this encoder.
            provenance: what the earlier run said of itself.

        Returns:
            What was taken over, and what differs from the earlier run, in a line.
        """
        unexpected = self.load_state_dict(state, strict=False).unexpected_keys
        assert not unexpected, f"no weights of {self.title}: {unexpected}"
        return self.own_parts

    def no_decay(self) -> tuple[str, ...]:
        """Parts of the names of `own_state` whose weights never decay; each must match. Vectors never do."""
        return ()

    # --- cost --------------------------------------------------------------------------------------------------------

    @classmethod
    def encoder_flops(cls, cost: CostModel, config: EncoderConfig, settings: Any, image_size: Size, setup: Setup) -> Flops:
        """FLOPs of the encoder per image, by the cost model of its family.

        The encoder takes `settings.images_per_input` images as one.

        Args:
            settings: of `settings_class`.
        """
        images = settings.images_per_input
        of_input = cost.flops(config, image_size, setup.of_inputs(images))
        return Flops(of_input.forward / images, of_input.training / images)

    @classmethod
    def encoder_layers(
        cls, cost: CostModel, config: EncoderConfig, settings: Any, image_size: Size, setup: Setup
    ) -> Sequence[LayerCost]:
        """Memory of the encoder's layers in their order, as `encoder_flops`."""
        return cost.layers(config, image_size, setup.of_inputs(settings.images_per_input))

    @classmethod
    def head_flops(
        cls, config: EncoderConfig, settings: Any, image_size: Size, setup: Setup, predicted: float = 1.0
    ) -> Flops:
        """FLOPs per image of what comes after the encoder.

        Args:
            settings: of `settings_class`.
            predicted: share of the image that is predicted, in [0, 1].
        """
        return Flops(0.0, 0.0)

    @classmethod
    def head_layers(cls, config: EncoderConfig, settings: Any, image_size: Size, setup: Setup) -> Sequence[LayerCost]:
        """Memory of all that is not the encoder, the loss included, in the order of the forward pass; by default of the
        parameters alone."""
        return [LayerCost(sum(math.prod(shape) for shape in cls.expected_state(config, settings).values()), 0.0)]
