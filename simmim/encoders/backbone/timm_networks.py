"""Networks of timm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simmim.encoders.backbone.layers import is_numbered, layers_by_name, num_blocks_of
from simmim.encoders.backbone.networks import NetworkOutput
from simmim.messages import did_you_mean, first_line

if TYPE_CHECKING:
    from simmim.encoders.backbone.config import BackboneConfig

# Arguments with which networks take images of any size, the first that a network has.
ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def import_timm() -> Any:
    """timm.

    Raises:
        ValueError: when it is not installed, or something that it needs.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        missing = getattr(error, "name", None) or first_line(error)
        raise ValueError(
            f"this encoder is a network of timm, which cannot be imported ({missing} is missing): "
            "pip install timm torchvision, of the torch that is installed"
        ) from error
    return timm


def create(architecture: str, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """A network without a classifier, with random weights.

    Raises:
        ValueError: when timm does not know the name, or the network not the options.
    """
    timm = import_timm()
    name = architecture.partition(".")[0]
    if not timm.is_model(name):
        nearest = did_you_mean(name, timm.list_models()).partition(" known")[0].rstrip(";")
        raise ValueError(f"timm {timm.__version__} has no network {name!r}{nearest}")
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=0, in_chans=in_channels, **options)
    except (TypeError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"timm {timm.__version__} cannot build {architecture} of {options}: {first_line(error)}") from error


def any_size_options(architecture: str, in_channels: int, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with what makes the network take images of any size, if it can."""
    import_timm()
    for extra in ANY_SIZE[:-1]:
        try:
            with torch.device("meta"):
                create(architecture, in_channels, {**options, **extra})
        except ValueError:
            continue
        return {**options, **extra}
    return options


def build(config: BackboneConfig) -> nn.Module:
    return create(config.architecture, config.in_channels, config.options)


def run(network: Any, images: Tensor, indices: tuple[int, ...] | None) -> NetworkOutput:
    maps: tuple[Tensor, ...] = ()
    if indices != () and hasattr(network, "forward_intermediates"):
        chosen = None if indices is None else list(indices)
        features, found = network.forward_intermediates(images, indices=chosen, norm=False, output_fmt="NCHW")
        maps = tuple(found)
    else:
        features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    return NetworkOutput(as_map(network, features, images), pooled, maps)


def as_map(network: Any, features: Any, images: Tensor) -> Tensor | None:
    """What `forward_features` returns as a map, (B, C, H, W); None where it is none.

    Tokens of a plain transformer, (B, N, C), are its prefix tokens and then the patches, row by row.
    """
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4:
        return features.movedim(-1, 1) if getattr(network, "output_fmt", "NCHW") == "NHWC" else features
    if features.ndim != 3:
        return None
    tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
    height, width = images.shape[-2:]
    for stride in strides_of(network):
        if height % stride == 0 and width % stride == 0 and (height // stride) * (width // stride) == tokens.shape[1]:
            return tokens.transpose(1, 2).unflatten(2, (height // stride, width // stride))
    return None


def strides_of(network: Any) -> list[int]:
    """The strides that the network states, those of the last maps first."""
    info = getattr(network, "feature_info", None) or []
    stated = [entry["reduction"] for entry in (info if isinstance(info, list) else info.info)]
    return list(dict.fromkeys(reversed(stated)))


def layers(network: Any) -> dict[str, int]:
    """By timm's own groups, as its layer decay counts; by names where a network has none."""
    names = [name for name, _ in network.named_parameters()]
    if not hasattr(network, "group_matcher"):
        return layers_by_name(names)
    from timm.models import group_parameters

    try:
        found = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    except (TypeError, ValueError, NotImplementedError):
        return layers_by_name(names)
    # timm puts the final norm with the last block.
    last = max(found.values())
    num_blocks = num_blocks_of(found)
    if num_blocks == last:
        found |= {name: last + 1 for name, layer in found.items() if layer == last and not is_numbered(name)}
    return found


def no_decay(network: Any) -> tuple[str, ...]:
    stated = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    return tuple(f"network.{name}" for name in sorted(stated))


def checkpoint_activations(network: Any, enabled: bool) -> None:
    if hasattr(network, "set_grad_checkpointing"):
        network.set_grad_checkpointing(enabled)
    elif enabled:
        raise ValueError(f"checkpoint_activations is true: timm's {type(network).__name__} has no such option, leave it out")
