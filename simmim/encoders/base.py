"""The protocol between encoders and the rest of the toolkit.

An encoder family is a frozen configuration (`EncoderConfig`), a module (`Encoder`) and presets, joined in an
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
from torch.utils.checkpoint import checkpoint

from simmim.messages import did_you_mean

if TYPE_CHECKING:
    from simmim.encoders.cost import CostModel

Size = tuple[int, int]
State = dict[str, Tensor]
Config = TypeVar("Config", bound="EncoderConfig")

MAX_GROUPS = 64  # of tokens on one map that are kept apart
NARROWEST_PUBLISHED = 96  # channels of the first stage: Swin's and ConvNeXt's tiny


class EncoderOutput(NamedTuple):
    """What an encoder returns.

    Attributes:
        features: (B, C, H, W), the map of the last stage after the final norm.
        pooled: (B, C), the mean of `features` over the map; the norm of the mean where pooling comes before the final norm.
        stages: on request the map of each stage, before downsampling and without the final norm, (B, C_i, H_i, W_i) at
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
        size_fields: the fields by which a preset is recognized. Input channels, patch size and the like are left out.
        supports_groups: whether its encoders keep groups of tokens apart (`Encoder.encode`).
        changeable_fields: fields that follow the image size and that no weight's shape depends on. An encoder can change
            them while it trains (`Encoder.change_config`).
    """

    in_channels: int
    patch_size: int
    input_projection: ClassVar[str]
    size_fields: ClassVar[tuple[str, ...]]
    supports_groups: ClassVar[bool] = False
    changeable_fields: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map."""

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's map. The first is the patch size."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of blocks in all stages. Stochastic depth and layer decay depend on it."""

    @property
    def is_small(self) -> bool:
        """Whether the encoder is narrower than the published models. Defaults then use larger batches and learning rates."""
        return self.channels[0] < NARROWEST_PUBLISHED

    @property
    def default_drop_path(self) -> float:
        """Stochastic depth for fine-tuning where the user sets none. Only encoders with a field `drop_path_rate` use it."""
        return 0.0

    @abstractmethod
    def describe(self) -> str:
        """The architecture in a few words, for the summary of a run: "window 12, patch 4 px"."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML."""

        def to_plain(value: Any) -> Any:
            return [to_plain(item) for item in value] if isinstance(value, tuple) else value

        return {key: to_plain(value) for key, value in dataclasses.asdict(self).items()}  # type: ignore[call-overload]

    # --- how a configuration depends on the image size ---------------------------------------------------------------

    def fields_for_size(self, image_size: Size) -> dict[str, Any]:
        """Values of the fields that depend on the image size, for a fresh encoder whose user sets none."""
        return {}

    def adapt_to_size(self: Config, trained_size: Size, image_size: Size) -> Config:
        """The configuration to use at `image_size` after pre-training at `trained_size`: larger windows, for instance."""
        return self

    def with_training_size(self: Config, image_size: Size) -> Config:
        """A copy that records what a user of the weights must know about the image size they were trained at."""
        return self

    def without_training_size(self: Config) -> Config:
        """A copy without the record of `with_training_size`, for training from scratch."""
        return self

    def for_fine_tuning(self: Config) -> Config:
        """The configuration to fine-tune after pre-training, where an architecture changes there."""
        return self

    def check_maps(self) -> None:  # noqa: B027  # most encoders have maps
        """Check that the features of encoders of this architecture lie on a grid, for tasks that need maps.

        Raises:
            ValueError: when they do not, naming the encoder.
        """

    def check_pretraining(self) -> None:  # noqa: B027  # most encoders can be pre-trained
        """Check that a method of pre-training can change tokens between `Encoder.embed` and `Encoder.encode`.

        Raises:
            ValueError: when it cannot, naming the encoder.
        """

    # --- several images on one canvas --------------------------------------------------------------------------------

    def check_groups(self, image_size: Size) -> None:
        """Check that encoders of this architecture keep groups of tokens apart (`Encoder.encode`) at `image_size`.

        For the first stages alone, `first_stages` has the architecture.

        Raises:
            ValueError: when no encoder of the family does, or none does at this size, saying what would help.
        """
        if not self.supports_groups:
            raise ValueError("this encoder cannot keep several images on one canvas apart: choose another method")

    def first_stages(self: Config, num_stages: int) -> Config:
        """The architecture of the first stages alone, 1 to all.

        Raises:
            ValueError: when the encoder has one stage, or cannot be parted (`Encoder.encode_first`).
        """
        if num_stages == len(self.channels):
            return self
        raise ValueError(
            "this encoder cannot be parted between stages: choose mask units that its last stage's stride divides"
        )

    def decoder_config(self, dim: int, depth: int) -> EncoderConfig:
        """The architecture of a light decoder of this family for the last feature map, where `supports_groups`.

        It is an encoder of one stage whose images are the feature map and whose patches are single tokens: `embed` projects
        their channels, and `encode` lets every token attend to every other on a map of any size.

        Args:
            dim: its channels.
            depth: its number of blocks.

        Raises:
            ValueError: for channels that the family cannot have, and when it has no such decoder.
        """
        raise ValueError("this encoder has no decoder: choose another method")

    # --- how weights depend on a configuration -----------------------------------------------------------------------

    @classmethod
    def infer_fields(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of this class that follow from names and shapes of weights; may be empty.

        Raises:
            ValueError: when the weights are not of this family, naming what is missing.
        """
        return {}

    def adapt_weights(self: Config, state: State, config: Config) -> tuple[State, tuple[str, ...]]:
        """Weights of this architecture, changed to fit `config`, and one line of text per change.

        The base class changes the input channels (`change_input_channels`). Whatever else does not fit is refused when the
        weights are loaded.
        """
        if config.in_channels == self.in_channels:
            return state, ()
        name = self.input_projection
        state = {**state, name: change_input_channels(state[name], config.in_channels)}
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
        ValueError: when `sequential_attention` is not positive, or the encoder does not support it.
    """

    supports_sequential_attention: ClassVar[bool] = False

    def __init__(
        self, config: EncoderConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.save_memory(checkpoint_activations, sequential_attention)

    def save_memory(self, checkpoint_activations: bool, sequential_attention: int | None) -> None:
        """Set how the backward pass saves memory, as the constructor does.

        For encoders that were loaded, because no file holds these arguments.

        Raises:
            ValueError: as the constructor.
        """
        if sequential_attention is not None and not self.supports_sequential_attention:
            raise ValueError(f"sequential_attention is {sequential_attention}: this encoder has no windows, leave it out")
        if sequential_attention is not None and sequential_attention < 1:
            raise ValueError(f"sequential_attention is {sequential_attention}: give 1 window at a time or more, or none")
        self.checkpoint_activations, self.sequential_attention = checkpoint_activations, sequential_attention

    def change_config(self, config: EncoderConfig) -> None:
        """Compute as an encoder of `config` from now on, with the same weights.

        Args:
            config: one that differs from this encoder's in `EncoderConfig.changeable_fields` alone.

        Raises:
            ValueError: for another.
        """
        free = {name: getattr(config, name) for name in self.config.changeable_fields}
        if type(config) is not type(self.config) or with_fields(self.config, **free) != config:
            raise ValueError(f"this encoder's weights are of {self.config} and not of {config}")
        self.config = config

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage's map."""
        return self.config.channels

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the image per token of each stage's map."""
        return self.config.strides

    @property
    def dim(self) -> int:
        """Channels of the last map."""
        return self.config.channels[-1]

    @property
    def stride(self) -> int:
        """Pixels of the image per token of the last map."""
        return self.config.strides[-1]

    # --- from images to features -------------------------------------------------------------------------------------

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Normalized images, (B, channels, height, width), to tokens of the first stage, (B, H, W, C), one per patch.

        Images that the patch does not divide are padded at the bottom and right.

        Raises:
            ValueError: when the images have another number of channels or dimensions (`check_images`).
        """

    @abstractmethod
    def encode(self, tokens: Tensor, return_stages: bool = False, groups: Tensor | None = None) -> EncoderOutput:
        """Tokens of the first stage, (B, H, W, C), through all stages and the final norm.

        Blocks are called by `run_block`, which implements `checkpoint_activations`.

        Args:
            groups: (B, H, W) uint8, 0 to `MAX_GROUPS` − 1, the group of each token. Tokens of different groups do not
                influence one another: each group is encoded as if its tokens were alone on the map. A token of the last map
                must be of one group: groups are constant over squares of `stride` pixels. Such encoders read each patch by
                itself in `embed`. None for one group.

        Raises:
            ValueError: for groups that the encoder does not support (`check_groups`).
        """

    def encode_first(self, tokens: Tensor, num_stages: int, groups: Tensor | None = None) -> Tensor:
        """Tokens of the first stage, (B, H, W, C), through the first stages, of an encoder that has `first_stages`.

        Args:
            groups: as in `encode`, constant over squares of the last of these stages' stride.

        Returns:
            The map of stage `num_stages`, counted from 1, before downsampling and without a norm, (B, h, w, C').
        """
        raise NotImplementedError

    def encode_rest(self, tokens: Tensor, num_stages: int) -> EncoderOutput:
        """What `encode_first` returns, through the downsampling, the stages that are left and the final norm. Both together
        are `encode`."""
        raise NotImplementedError

    def forward(self, images: Tensor, return_stages: bool = False) -> EncoderOutput:
        """Encode normalized images, (B, channels, height, width), of any height and width.

        Args:
            return_stages: also return the map of each stage.

        Raises:
            ValueError: when the images have another number of channels or dimensions than the encoder expects.
        """
        return self.encode(self.embed(images), return_stages)

    def features(self, images: Tensor, per_stage: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Features of normalized images of any size, for heads and for search.

        Returns:
            The pooled features, (B, C); with `per_stage` the map of each stage, (B, channels[i], H_i, W_i) at strides[i].
        """
        output = self(images, return_stages=per_stage)
        return output.stages if per_stage else output.pooled

    def check_images(self, images: Tensor) -> None:
        """Check that `embed` supports these images.

        Raises:
            ValueError: naming the shape and the expected one.
        """
        if images.ndim != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images have shape {tuple(images.shape)}: this encoder takes "
                f"(batch, {self.config.in_channels}, height, width)"
            )

    def check_groups(self, tokens: Tensor, groups: Tensor | None, num_stages: int | None = None) -> None:
        """Check that `encode` supports these groups of tokens, (B, H, W, C), or `encode_first` in its first stages.

        Raises:
            ValueError: naming what it does not support.
        """
        if groups is None:
            return
        size = tuple(self.config.patch_size * side for side in tokens.shape[1:3])
        config = self.config if num_stages is None else self.config.first_stages(num_stages)
        config.check_groups(size)  # type: ignore[arg-type]
        if groups.shape != tokens.shape[:3] or groups.dtype != torch.uint8:
            raise ValueError(
                f"groups are {groups.dtype} {tuple(groups.shape)}: expected uint8 {tuple(tokens.shape[:3])}, one per patch"
            )

    def run_block(self, block: nn.Module, *arguments: Any) -> Tensor:
        """block(*arguments), recomputed in the backward pass if `checkpoint_activations` is set."""
        if self.checkpoint_activations and self.training and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    # --- how it is computed ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """A context in which nothing changes the weights. An encoder may then cache what depends on the weights alone."""
        yield

    def has_kernels(self, device: torch.device) -> bool:
        """Whether the encoder's own kernels compute whole blocks on `device`. torch.compile is then not applied to them."""
        return False

    def describe_kernels(self, device: torch.device) -> str:
        """For the summary of a run: that there are kernels for `device`, or why not; empty if the encoder has none."""
        return ""

    # --- parts -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated units in order. They are recomputed, sharded and compiled one by one."""

    @abstractmethod
    def named_stages(self) -> dict[str, nn.Module]:
        """Blocks and downsamplings in order, by readable names: stage0.block0, …, stage0.merging, stage1.block0, ….

        The activation monitor watches their outputs.
        """

    @abstractmethod
    def stage_modules(self) -> list[list[nn.Module]]:
        """The modules of each stage: the patch embedding with the first, a downsampling with the stage before it.

        Together they hold every parameter but those of the final norm. Fine-tuning freezes whole stages, first to last.
        """

    # --- parameters --------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """n, the number of blocks. Layers are 0 (patch embedding), 1 … n (blocks) and n + 1 (final norm and heads)."""
        return self.config.num_blocks

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """The layer, 0 to n + 1, of the parameter with this name.

        Raises:
            KeyError: for a name that is not a parameter of this encoder. A new parameter must be given a layer.
        """

    def no_decay(self) -> tuple[str, ...]:
        """Substrings of the names of parameters that never decay, whatever their shape. Each must match a parameter.

        Vectors (biases, norms) never decay and need no entry.
        """
        return ()


@dataclass(frozen=True)
class EncoderFamily:
    """What the registry knows about one kind of encoder.

    Attributes:
        name: the name in files and settings: "swinv2".
        title: the name in texts: "SwinV2".
        config: the class of its configurations.
        build: from a configuration, `checkpoint_activations` and `sequential_attention` to a freshly initialized encoder,
            with the kernels of the family if it has any.
        presets: configurations by name. Names are unique over all families.
        paper: what a model card cites.
        cost: FLOPs and memory of a training step, for `simmim plan`; None if the family has no cost model.
    """

    name: str
    title: str
    config: type[EncoderConfig]
    build: Callable[[Any, bool, int | None], Encoder]
    presets: Mapping[str, EncoderConfig]
    paper: str = ""
    cost: CostModel[Any] | None = None


def change_input_channels(weight: Tensor, channels: int) -> Tensor:
    """A patch projection, (C, old channels, …), for another number of input channels, (C, channels, …).

    One channel gets the sum of the old ones. More channels get the old ones in turn, scaled such that images that are equal
    in all channels are projected to the same tokens as before.
    """
    old_channels = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight[:, torch.arange(channels) % old_channels]
    if channels % old_channels == 0:
        return repeated * (old_channels / channels)
    # The last turn is incomplete: an equal correction of every channel keeps the sum over channels.
    return repeated + (weight.sum(dim=1, keepdim=True) - repeated.sum(dim=1, keepdim=True)) / channels


def with_fields(config: Config, **overrides: Any) -> Config:
    """`config` with some fields replaced.

    Raises:
        ValueError: for an unknown field, naming the nearest known one; for a value out of range.
    """
    check_fields(type(config), overrides)
    return replace(config, **overrides)  # type: ignore[type-var]


def check_fields(config: type[EncoderConfig], names: Mapping[str, Any]) -> None:
    """Check that a configuration class has these fields.

    Raises:
        ValueError: for an unknown field, naming the nearest known one.
    """
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown encoder setting {name!r}{did_you_mean(name, known)}")
