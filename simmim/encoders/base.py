"""The protocol between encoders and the rest of the toolkit.

An encoder family is a frozen configuration (`EncoderConfig`), a module (`Encoder`) and presets, put together in an
`EncoderFamily`. Methods, training, transfer, evaluation and file formats use what this file declares and nothing else.

Shape letters: B images, H W height and width of a feature map in tokens, C channels. Sizes are (height, width). Images are
(B, channels, height, width); tokens between `embed` and `encode` are (B, H, W, C); maps that are returned are (B, C, H, W).
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from simmim.encoders.cost import CostModel

Size = tuple[int, int]
State = dict[str, Tensor]
Config = TypeVar("Config", bound="EncoderConfig")


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Attributes:
        features: (B, C, H, W), the last stage's map after the final norm.
        pooled: (B, C), the mean of `features` over the map.
        stages: on request the map of each stage before downsampling and without the final norm, (B, C_i, H_i, W_i) at
            `Encoder.strides`; else None.
    """

    features: Tensor
    pooled: Tensor
    stages: tuple[Tensor, ...] | None


class EncoderConfig(ABC):
    """The architecture of one encoder: a frozen dataclass of plain values, checked on construction.

    Attributes:
        in_channels: channels of the images.
        patch_size: side of a patch in pixels, the resolution of masks.
        input_projection: name of the weight, (C, in_channels, …), that reads the images.
        size_fields: the fields that make two encoders the same preset, whatever their windows, channels and patches.
    """

    in_channels: int
    patch_size: int
    input_projection: ClassVar[str]
    size_fields: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map."""

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's map."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks in all stages, by which stochastic depth and layer decay go."""

    @property
    def is_small(self) -> bool:
        """Whether the encoder is narrower than a published model, so that it takes larger batches and learning rates."""
        return self.channels[0] < 96

    @property
    def default_drop_path(self) -> float:
        """Stochastic depth for fine-tuning where the user gives none."""
        return 0.0

    @abstractmethod
    def describe(self) -> str:
        """The architecture in a few words, for the summary of a run: "window 12, patch 4 px"."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""

        def plain(value: Any) -> Any:
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return {key: plain(value) for key, value in dataclasses.asdict(self).items()}  # type: ignore[call-overload]

    # --- how a configuration follows the images --------------------------------------------------------------------

    def for_image_size(self, image_size: Size) -> dict[str, Any]:
        """The fields that follow from the images where the user leaves them open, and their values; for fresh encoders."""
        return {}

    def moved(self: Config, trained_size: Size, image_size: Size) -> Config:
        """Pre-trained at `trained_size`, to be used at `image_size`: attention windows grow with the image, for instance."""
        return self

    def trained_at(self: Config, image_size: Size) -> Config:
        """With all written down that whoever loads the weights must know of the images they were trained on."""
        return self

    def untrained(self: Config) -> Config:
        """The same architecture without what `trained_at` has written down."""
        return self

    # --- how weights follow a configuration -------------------------------------------------------------------------

    @classmethod
    def infer(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the names and shapes of weights say of their architecture, as fields of this class; may be empty.

        Raises:
            ValueError: when these are not the weights of such an encoder, naming what it would have.
        """
        return {}

    def adapt(self: Config, state: State, config: Config) -> tuple[State, tuple[str, ...]]:
        """Weights of this architecture for another one, and a sentence for each change.

        The base class changes input channels (`with_channels`). Weights that still do not fit are an error later.
        """
        if config.in_channels == self.in_channels:
            return state, ()
        name = self.input_projection
        state = {**state, name: with_channels(state[name], config.in_channels)}
        return state, (f"{self.in_channels} input channels to {config.in_channels}",)


class Encoder(nn.Module, ABC):
    """A network from images to feature maps.

    Args:
        config: the architecture.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations: less memory,
            about a third more time, same outputs and gradients.
        sequential_attention: attend to this number of windows at a time and recompute each group in the backward pass;
            None for all at once. Same outputs and gradients.

    Raises:
        ValueError: when `sequential_attention` is not a positive number, or the encoder has no such computation.
    """

    supports_sequential_attention: ClassVar[bool] = False

    def __init__(
        self, config: EncoderConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.save_memory(checkpoint_activations, sequential_attention)

    def save_memory(self, checkpoint_activations: bool, sequential_attention: int | None) -> None:
        """Set how the backward pass saves memory, as the constructor does. For encoders that were loaded: no file holds these
        arguments.

        Raises:
            ValueError: as the constructor.
        """
        if sequential_attention is not None and not self.supports_sequential_attention:
            raise ValueError(f"sequential_attention is {sequential_attention}: this encoder has no windows, leave it out")
        if sequential_attention is not None and sequential_attention < 1:
            raise ValueError(f"sequential_attention is {sequential_attention}: give 1 window at a time or more, or none")
        self.checkpoint_activations, self.sequential_attention = checkpoint_activations, sequential_attention

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map, for dense heads."""
        return self.config.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's map, for dense heads."""
        return self.config.strides

    @property
    def dim(self) -> int:
        """Channels of the last feature map."""
        return self.config.channels[-1]

    @property
    def stride(self) -> int:
        """Pixels of the image per token of the last feature map."""
        return self.config.strides[-1]

    # --- from images to features ------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Normalized images, (B, channels, height, width), to tokens of the first stage, (B, H, W, C), one per patch.

        Images that the patch does not divide are padded.

        Raises:
            ValueError: when the images have another number of channels or dimensions (`check_images`).
        """

    @abstractmethod
    def encode(self, tokens: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Tokens of the first stage, (B, H, W, C), through all stages and the final norm."""

    def forward(self, images: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Encode normalized images, (B, channels, height, width), of any height and width.

        Args:
            return_stages: also return the map of every stage.

        Raises:
            ValueError: when the images have another number of channels or dimensions than the encoder takes.
        """
        return self.encode(self.embed(images), return_stages)

    def features(self, images: Tensor, per_stage: bool = False) -> Tensor | tuple[Tensor, ...]:
        """What heads and indexes take: the pooled features, (B, C), or with `per_stage` each stage's map,
        (B, channels[i], H_i, W_i) at strides[i], of normalized images of any size."""
        output = self(images, return_stages=per_stage)
        return output.stages if per_stage else output.pooled

    def check_images(self, images: Tensor) -> None:
        """Refuse what `embed` cannot take.

        Raises:
            ValueError: naming both shapes.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this encoder takes "
                f"(batch, {self.config.in_channels}, height, width)"
            )

    @contextlib.contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """A context in which nothing changes the weights, so that what depends on them alone is computed once.

        Parts that can make use of it have a context manager `cache_while_fixed`.
        """
        with contextlib.ExitStack() as stack:
            for part in self.modules():
                if hasattr(part, "cache_while_fixed"):
                    stack.enter_context(part.cache_while_fixed())
            yield

    def has_kernels(self, device: torch.device) -> bool:
        """Whether blocks are computed by kernels of the encoder's own on a device, and not by its plain lines."""
        return False

    def describe_kernels(self, device: torch.device) -> str:
        """What the summary of a run says of kernels on a device: that there are some, or why not; empty for nothing."""
        return ""

    # --- parts -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated units in order, (B, H, W, C) to the same shape: what is recomputed, sharded and compiled one by one."""

    @abstractmethod
    def named_stages(self) -> dict[str, nn.Module]:
        """Blocks and what lies between stages, in order, by names for people: stage0.block0, …, stage0.merging, ….

        The activation monitor watches the outputs of these.
        """

    @abstractmethod
    def stage_modules(self) -> list[list[nn.Module]]:
        """The modules of each stage: the patch embedding with the first, a downsampling with the stage before it.

        The final norm belongs to no stage. Fine-tuning freezes whole stages from the front.
        """

    # --- parameters --------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """n, the number of blocks: layers are 0 (patch embedding), 1 … n (blocks), n + 1 (final norm and heads)."""
        return self.config.num_blocks

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """The layer, 0 to n + 1, of a parameter by its name in this encoder.

        Raises:
            KeyError: for a name that is none of this encoder's, so that a new parameter cannot go without a layer.
        """

    def no_decay(self) -> tuple[str, ...]:
        """Parts of parameter names whose weights never decay, whatever their shape. Each must match a parameter.

        Vectors (biases, norms) never decay and need not be named.
        """
        return ()


@dataclass(frozen=True)
class EncoderFamily:
    """All that the registry knows of one kind of encoder.

    Attributes:
        name: as it stands in files and settings.
        title: as it stands in texts: "SwinV2".
        config: the class of its configurations.
        build: an encoder of a configuration, `checkpoint_activations` and `sequential_attention`, with the kernels that
            the family has put in.
        presets: configurations by name; names are unique over all families.
        paper: what a model card cites.
        cost: FLOPs and memory of a training step, by which `simmim plan` works; None where the family has no such model.
    """

    name: str
    title: str
    config: type[EncoderConfig]
    build: Callable[..., Encoder]
    presets: Mapping[str, EncoderConfig]
    paper: str = ""
    cost: CostModel[Any] | None = None


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection, (C, channels before, …), for other input channels: summed to one; else repeated in turn and
    scaled, so that images alike in all channels are projected to the same tokens."""
    before = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight[:, torch.arange(channels) % before]
    if channels % before == 0 or before == 1:
        return repeated * (before / channels)
    # Channels that do not come in whole turns: scaled as one sum, tap by tap, that keeps images alike in all channels.
    return repeated + (weight.sum(dim=1, keepdim=True) - repeated.sum(dim=1, keepdim=True)) / channels


def with_fields(config: Config, **overrides: Any) -> Config:
    """`config` with some fields replaced.

    Raises:
        ValueError: for an unknown field, naming the nearest known one; for a value out of range.
    """
    from simmim.messages import did_you_mean

    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in overrides:
        if name not in known:
            raise ValueError(f"unknown encoder setting {name!r}{did_you_mean(name, known)}")
    return replace(config, **overrides)  # type: ignore[type-var]
