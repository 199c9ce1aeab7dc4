"""Networks of Hugging Face transformers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simmim.encoders.backbone.layers import layers_by_name
from simmim.encoders.backbone.networks import NetworkOutput
from simmim.messages import did_you_mean, first_line

if TYPE_CHECKING:
    from simmim.encoders.backbone.config import BackboneConfig

# Of models of images and text, the part of the images: model type to that of its `vision_config`.
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# A model whose forward pass masks at random, and the same network without.
UNMASKED = {"vit_mae": "vit"}
# Networks with a pooler that published weights mostly lack, and that is no part of what they were trained for.
WITHOUT_POOLER = ("vit", "deit", "vit_msn")
# Fields of a configuration that say nothing of the network.
NOT_STORED = ("transformers_version", "architectures", "torch_dtype", "dtype", "id2label", "label2id", "_name_or_path")
NO_DECAY = (
    *("position_embedding", "cls_token", "register_tokens", "mask_token", "head.probe"),
    *("relative_position_bias_table", "logit_scale", "continuous_position_bias_mlp"),
)
MAX_PREFIX = 64  # class and register tokens


def import_transformers() -> Any:
    """transformers.

    Raises:
        ValueError: when it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "this encoder is a network of transformers, which is not installed: pip install 'simmim-toolkit[hf]'"
        ) from error
    return transformers


def configuration(model_type: str, fields: Mapping[str, Any]) -> Any:
    """The library's configuration of a network of images alone, from the content of a config.json.

    Raises:
        ValueError: when the library does not know the model type, or the model does not take images.
    """
    transformers = import_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if model_type in TOWERS:
        model_type, fields = TOWERS[model_type], fields.get("vision_config") or {}
    model_type = UNMASKED.get(model_type, model_type)
    if model_type not in CONFIG_MAPPING_NAMES:
        nearest = did_you_mean(model_type, CONFIG_MAPPING_NAMES).partition(" known")[0].rstrip(";")
        raise ValueError(f"transformers {transformers.__version__} has no model type {model_type!r}{nearest}")
    own = {name: value for name, value in fields.items() if name not in (*NOT_STORED, "model_type")}
    try:
        config = transformers.AutoConfig.for_model(model_type, **own)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"transformers cannot read the configuration of a {model_type}: {first_line(error)}") from error
    if type(config) not in MODEL_MAPPING or "pixel_values" not in parameters_of(model_class(config).forward):
        raise ValueError(f"a {model_type} of transformers is no encoder of images: give a vision model")
    return config


def model_class(config: Any) -> Any:
    """The library's class of networks with this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def model_options(config: Any) -> dict[str, Any]:
    """Arguments of the class beside the configuration."""
    return {"add_pooling_layer": False} if config.model_type in WITHOUT_POOLER else {}


def parameters_of(function: Any) -> Mapping[str, Any]:
    """The names of a function's parameters."""
    return inspect.signature(function).parameters


def plain_fields(config: Any) -> dict[str, Any]:
    """What `configuration` makes the same configuration of."""
    return {name: value for name, value in config.to_diff_dict().items() if name not in (*NOT_STORED, "model_type")}


def build(config: BackboneConfig) -> nn.Module:
    fields = {**config.options, "num_channels": config.in_channels}
    own = configuration(config.architecture, fields)
    try:
        return model_class(own)(own, **model_options(own))
    except (TypeError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"transformers cannot build a {config.architecture}: {first_line(error)}") from error


def run(network: Any, images: Tensor, indices: tuple[int, ...] | None) -> NetworkOutput:
    with_maps = indices != ()
    if keeps_maps_for_asking(network):
        last, pooled, states = run_swin(network, images, with_maps)
    else:
        options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters_of(network.forward) else {}
        output = network(pixel_values=images, output_hidden_states=with_maps, return_dict=True, **options)
        last, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        states = (getattr(output, "hidden_states", None) or ())[1:]  # the first are the embedded patches
    if network.config.model_type == "clip_vision_model":  # the only one that leaves the final norm to its pooling
        last = getattr(network, "vision_model", network).post_layernorm(last)
    stride = stated_stride(network.config)
    chosen = [state for number, state in enumerate(states) if indices is None or number in indices]
    maps = [as_map(state, images, stride) for state in chosen]
    if pooled is None:
        pooled = last.mean(dim=(2, 3)) if last.ndim == 4 else pool_tokens(last, images, stride)
    found = () if any(one is None for one in maps) else tuple(one for one in maps if one is not None)
    return NetworkOutput(as_map(last, images, stride), pooled.flatten(1), found)


def keeps_maps_for_asking(network: Any) -> bool:
    """Whether it is a Swin, whose encoder returns maps before the downsampling on request alone."""
    encoder = getattr(network, "encoder", None)
    return encoder is not None and "output_hidden_states_before_downsampling" in parameters_of(encoder.forward)


def run_swin(network: Any, images: Tensor, with_maps: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The forward pass of a Swin or SwinV2: the last map after the norm, no pooled features, and the maps of all stages."""
    tokens, size = network.embeddings(images)
    output = network.encoder(
        tokens,
        size,
        output_hidden_states=True,
        output_hidden_states_before_downsampling=True,
        return_dict=True,
    )
    states = output.reshaped_hidden_states[1:]
    last = network.layernorm(output.last_hidden_state).transpose(1, 2).unflatten(2, states[-1].shape[-2:])
    return last, None, tuple(states) if with_maps else ()


def stated_stride(config: Any) -> int | None:
    """Pixels per token that a configuration states: the patch size; None for none."""
    stated = getattr(config, "patch_size", None)
    if isinstance(stated, list | tuple):
        return stated[0] if len(set(stated)) == 1 else None
    return stated if isinstance(stated, int) else None


def as_map(state: Tensor, images: Tensor, stride: int | None) -> Tensor | None:
    """A hidden state, a map (B, C, H, W) or tokens (B, N, C), as a map; None where tokens lie on no grid.

    Tokens are some prefix tokens and then the patches, row by row. Networks of stages have strides that are multiples of the
    patch size.
    """
    if state.ndim == 4:
        return state
    grid = grid_of(state, images, stride) if state.ndim == 3 else None
    if grid is None:
        return None
    return state[:, state.shape[1] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def grid_of(state: Tensor, images: Tensor, stride: int | None) -> tuple[int, int] | None:
    """Height and width in tokens of (B, N, C); None for no grid."""
    height, width = images.shape[-2:]
    for factor in (1, 2, 4, 8) if stride else ():
        side = stride * factor  # type: ignore[operator]
        grid = (height // side, width // side)
        if height % side == 0 and width % side == 0 and 0 <= state.shape[1] - grid[0] * grid[1] <= MAX_PREFIX:
            return grid
    if stride is None and (height % 32, width % 32) == (0, 0):  # networks of convolutions state none
        grid = (height // 32, width // 32)
        return grid if 0 <= state.shape[1] - grid[0] * grid[1] <= 1 else None
    return None


def pool_tokens(tokens: Tensor, images: Tensor, stride: int | None) -> Tensor:
    """The class token of (B, N, C) where there is a prefix, else the mean."""
    grid = grid_of(tokens, images, stride)
    has_prefix = grid is not None and tokens.shape[1] > grid[0] * grid[1]
    return tokens[:, 0] if has_prefix else tokens.mean(dim=1)


def layers(network: Any) -> dict[str, int]:
    return layers_by_name(name for name, _ in network.named_parameters())


def no_decay(network: Any) -> tuple[str, ...]:
    return NO_DECAY


def checkpoint_activations(network: Any, enabled: bool) -> None:
    if not enabled:
        network.gradient_checkpointing_disable()
    elif network.supports_gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise ValueError(f"checkpoint_activations is true: {type(network).__name__} has no such option, leave it out")


def load(config: Any, folder: str) -> tuple[nn.Module, list[str], list[str]]:
    """The network of a folder with safetensors, and the names of weights that it lacks, and of those that it has too many.

    Raises:
        ValueError: when the weights are of another shape.
    """
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    options |= {"ignore_mismatched_sizes": True}  # they are in the report, which names them
    try:
        with quiet():
            network, report = model_class(config).from_pretrained(
                folder, config=config, dtype=torch.float32, **model_options(config), **options
            )
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder} does not fit a {config.model_type} of transformers: {first_line(error)}") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{folder} does not fit a {config.model_type} of transformers: {name} is {tuple(found)} in the file and "
            f"{tuple(expected)} by its config.json"
        )
    return network, sorted(report["missing_keys"]), sorted(report["unexpected_keys"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which the library shows no progress and reports nothing: what matters is in the loading report."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
