"""Another library's network under this toolkit's protocol.

Shape letters: B images, H W height and width of a map in tokens, C channels.
"""

from __future__ import annotations

from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from simmim.encoders.backbone.config import BackboneConfig
from simmim.encoders.backbone.networks import adapter_of
from simmim.encoders.base import Encoder, EncoderOutput


class Backbone(Encoder):
    """A network of timm or transformers.

    `features` is the last map after the final norm. `pooled` is what the network itself makes of an image: DINOv2's, MAE's
    and CLIP's class token, SigLIP's learned attention, a mean in ConvNeXt and Swin. Where that has another width than the
    map, it is the mean of the map.

    Attributes:
        network: of the library.
    """

    config: BackboneConfig

    def __init__(
        self, config: BackboneConfig, checkpoint_activations: bool = False, sequential_attention: int | None = None
    ) -> None:
        super().__init__(config)
        self.network = adapter_of(config.library).build(config)
        for name, parameter in self.network.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)  # of a pre-training that is over
        self.save_memory(checkpoint_activations, sequential_attention)

    def save_memory(self, checkpoint_activations: bool, sequential_attention: int | None) -> None:
        changes = checkpoint_activations != getattr(self, "checkpoint_activations", False)
        super().save_memory(checkpoint_activations, sequential_attention)
        if changes:
            adapter_of(self.config.library).checkpoint_activations(self.network, checkpoint_activations)

    def embed(self, images: Tensor) -> Tensor:
        """As of `Encoder`; only SimMIM needs it.

        Raises:
            ValueError: always.
        """
        self.config.check_pretraining()
        raise AssertionError("check_pretraining raises")

    def encode(self, tokens: Tensor, return_stages: bool = False, groups: Tensor | None = None) -> EncoderOutput:
        """As `embed`."""
        return self.embed(tokens)  # type: ignore[return-value]

    def forward(self, images: Tensor, return_stages: bool = False) -> EncoderOutput:
        self.check_images(images)
        config, size = self.config, (images.shape[-2], images.shape[-1])
        config.check_size(size)
        if config.fixed_size is None and config.has_maps:
            images = F.pad(images, (0, -size[1] % config.strides[-1], 0, -size[0] % config.strides[-1]))
        output = adapter_of(config.library).run(self.network, images, config.map_indices if return_stages else ())
        if output.last is None:
            last = output.pooled[:, :, None, None]
            return EncoderOutput(last, output.pooled, (last,) if return_stages else None)
        last = crop(output.last, size, config.strides[-1])
        pooled = output.pooled if output.pooled.shape[1] == last.shape[1] else last.mean(dim=(2, 3))
        if not return_stages:
            return EncoderOutput(last, pooled, None)
        maps = [crop(one, size, stride) for one, stride in zip(output.maps, config.strides)]
        if not maps or maps[-1].shape[1] != last.shape[1]:
            maps[-1:] = [last]
        return EncoderOutput(last, pooled, tuple(maps))

    # --- parts ---------------------------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        """None: they are neither sharded nor compiled one by one."""
        return []

    def named_stages(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def stage_modules(self) -> list[list[nn.Module]]:
        """The layers in as many parts as there are maps, each of an equal number of layers."""
        num_stages, num_layers = len(self.config.channels), self.config.num_layers
        stages: list[list[nn.Module]] = [[] for _ in range(num_stages)]
        for prefix, module in self.named_modules():
            own = dict(module.named_parameters(recurse=False))
            by_stage: dict[int, list[nn.Parameter]] = {}
            for name, value in own.items():
                layer = self.layer_of(f"{prefix}.{name}" if prefix else name)
                if layer <= num_layers:
                    stage = max(layer - 1, 0) * num_stages // max(num_layers, 1)
                    by_stage.setdefault(stage, []).append(value)
            whole = len(by_stage) == 1 and not list(module.children())
            for stage, values in by_stage.items():
                stages[stage].append(module if whole else nn.ParameterList(values))
        return stages

    # --- parameters ----------------------------------------------------------------------------------------------------

    @cached_property
    def layers(self) -> dict[str, int]:
        """The layer of each parameter by its name in this encoder."""
        found = adapter_of(self.config.library).layers(self.network)
        return {f"network.{name}": layer for name, layer in found.items()}

    def layer_of(self, name: str) -> int:
        return self.layers[name]

    def no_decay(self) -> tuple[str, ...]:
        names = [name for name, _ in self.named_parameters()]
        stated = adapter_of(self.config.library).no_decay(self.network)
        return tuple(part for part in stated if any(part in name for name in names))


def crop(map: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """A map of padded images, (B, C, H, W), without the tokens that are padding alone."""
    height, width = (-(-side // stride) for side in size)
    return map[..., :height, :width]
