"""The model of a run: built by its settings, started from weights, and read back from what a run left."""

from __future__ import annotations

from pathlib import Path

from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.fitting import build_encoder
from simmim.checkpoints.weight_files import read_torch_file
from simmim.encoders import registry
from simmim.methods.base import Method
from simmim.methods.registry import default_method, method_named
from simmim.pretrain.settings import DataSettings, OptimSettings, PretrainSettings, ProbeSettings, settings_class
from simmim.training.run_folder import CONFIG, checkpoints_folder
from simmim.training.saving import usable_checkpoint


def build_method(settings: PretrainSettings) -> Method:
    """The method of resolved settings with its encoder, freshly initialized."""
    model = settings.model
    encoder = registry.build(settings.encoder_config(), model.checkpoint_activations, model.sequential_attention)
    return method_named(settings.method).build(encoder, model)


def load_initial_weights(method: Method, source: Checkpoint) -> str:
    """Load the weights of `source` into `method`, those of the method among them where it has them and they fit.

    Returns:
        The report, with one line each for what was loaded, adapted, missing and unexpected.
    """
    config = method.encoder.config
    saved = build_encoder(source, **{name: getattr(config, name) for name in vars(config)})
    method.encoder.load_state_dict(saved.encoder.state_dict())
    report, shapes = str(saved.report), {name: tuple(value.shape) for name, value in source.pretraining.items()}
    if source.pretraining and source.method != method.name:
        report += f"\nadapted    {method.own_parts} are fresh: the source was trained by {source.method}"
    elif source.pretraining and shapes != {name: tuple(value.shape) for name, value in method.own_state().items()}:
        is_same = source.config.in_channels == config.in_channels
        what = "have other shapes" if is_same else "are for other channels"
        report += f"\nadapted    {method.own_parts} are fresh: those of the source {what}"
    elif source.pretraining:
        report += f"\nloaded     {method.load_own_state(source.pretraining, source.provenance)}"
    method.weights_loaded()
    return report


def load_pretrained(run: str | Path) -> tuple[Method, PretrainSettings]:
    """A run's whole model, with mask token and head, from its last checkpoint, and its settings.

    Raises:
        ValueError: when `run` holds no pre-training run or no checkpoint yet.
    """
    settings = read_settings(run)
    checkpoint = usable_checkpoint(Path(run).expanduser())
    if checkpoint is None:
        raise ValueError(f"run {str(run)!r} has no checkpoint yet: expected some in {checkpoints_folder(Path(run))}")
    model = build_method(settings)
    state = read_torch_file(checkpoint)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model.eval(), settings


def read_settings(run: str | Path) -> PretrainSettings:
    """The settings a run was started with.

    Raises:
        ValueError: when `run` holds no pre-training run.
    """
    import yaml

    path = Path(run).expanduser() / CONFIG
    if not path.is_file():
        raise ValueError(f"no run at {str(run)!r}: expected {path}")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "model" not in values:
        raise ValueError(f"run {str(run)!r} is no pre-training run")
    method = values.get("method", default_method())
    groups = {
        "data": DataSettings,
        "model": method_named(method).settings_class,
        "optim": OptimSettings,
        "probe": ProbeSettings,
    }
    stored = {name: {**getattr(kind, "earlier", {}), **values.get(name, {})} for name, kind in groups.items()}
    given = {**values, **{name: kind(**stored[name]) for name, kind in groups.items()}}
    return settings_class(method)(**given)
