"""What the tests of formats share: random checkpoints, comparisons, changed files, and the authors' file."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from random_encoders import randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from simmim.checkpoints import Checkpoint, Preprocessing
from simmim.checkpoints.formats.base import ExportOptions
from simmim.checkpoints.formats.foreign import description_of
from simmim.checkpoints.formats.registry import format_named
from simmim.checkpoints.source import DESCRIPTION, Source
from simmim.checkpoints.weight_files import SAFE_GLOBALS, WeightFile
from simmim.cli import main
from simmim.encoders.registry import build
from simmim.encoders.swinv2 import SwinV2Config
from simmim.methods.simmim import SimMIM

GOLDEN = Path(__file__).parent / "golden"
RELEASED = GOLDEN / "official_simmim_pretrain_swinv2_micro.pth"
CLASSES = ("cat", "Hündchen", "hedgehog, European")
SMALL = SwinV2Config(8, (1, 2), (1, 2), window_size=4)
FORMATS = ("safetensors", "official", "timm", "hf")


@lru_cache(maxsize=2)
def random_checkpoint(config, size, classes=CLASSES, meta=False, **preprocessing):
    """A model with every part, all of it random, as if it had been pre-trained at `size`."""
    config = config.with_training_size(size)
    with torch.device("meta" if meta else "cpu"):
        model, head = SimMIM(build(config)), torch.nn.Linear(config.channels[-1], max(len(classes), 1))
    if not meta:
        randomize(model), randomize(head, seed=1)
    statistics = (tuple(0.3 + 0.01 * i for i in range(config.in_channels)), (0.25,) * config.in_channels)
    return Checkpoint(
        config,
        model.encoder.state_dict(),
        Preprocessing(size, *statistics, **preprocessing),
        Path("random"),
        provenance={
            "method": "SimMIM",
            "data": "hedgerow",
            "images": 12_345,
            "loss": 0.1234,
            "mask_unit": 32,
            "mask_ratio": 0.6,
            "norm_target_patch": None,
        },
        pretraining={name: value.detach() for name, value in model.own_state().items()},
        head={name: value.detach() for name, value in head.state_dict().items()} if classes else {},
        classes=classes,
    )


def forms_of(format):
    """The forms of a format that differ."""
    return {"safetensors": ["encoder"], "timm": ["encoder", "classifier"]}.get(format, ["encoder", "simmim", "classifier"])


# --- comparison ------------------------------------------------------------------------------------------------------


def same_tensors(first, second):
    """The same names, shapes and types, and where there are values the same bits."""
    kinds = [{name: (value.shape, value.dtype) for name, value in state.items()} for state in (first, second)]
    if kinds[0] != kinds[1]:
        return False
    return all(value.is_meta or second[name].is_meta or torch.equal(value, second[name]) for name, value in first.items())


def assert_round_trip(before, after, format, form):
    """Everything that the form holds is back unchanged, and nothing else has come."""
    everything = format == "safetensors"
    assert after.config == before.config
    assert after.preprocessing == before.preprocessing
    assert after.provenance == before.provenance
    assert same_tensors(after.encoder, before.encoder)
    assert same_tensors(after.pretraining, before.pretraining if form == "simmim" or everything else {})
    assert same_tensors(after.head, before.head if form == "classifier" or everything else {})
    assert after.classes == (before.classes if form == "classifier" or everything else ())
    assert after.format == format


# --- files and sources -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceInMemory(Source):
    """A folder that is not on disk."""

    weights: WeightFile = None
    config: dict = field(default_factory=dict)


def source_of(checkpoint, format, form, described=True):
    """What a foreign format's files hold, without writing them; without this toolkit's description if asked for."""
    target, file = format_named(format), Path("folder/model")
    rows = target.rows_for(checkpoint.config)
    config = target.folder_config(checkpoint, form, ExportOptions())
    config |= {DESCRIPTION: description_of(checkpoint, form)} if described else {}
    values = {"config": rows.settings(checkpoint)} if format == "official" else {}
    weights = WeightFile(file, rows.state(checkpoint, form), values)
    return SourceInMemory(file, weights, json.loads(json.dumps(config)))


def weights_file(folder):
    return next(path for path in folder.iterdir() if path.name in ("encoder.safetensors", "model.safetensors", "model.pth"))


def rewritten(folder, change):
    """Change a folder's weights, by another file in their place: they may be mapped."""
    file = weights_file(folder)
    if file.suffix == ".pth":
        content = torch.load(file, weights_only=True)
        torch.save({**content, "model": change(content["model"])}, folder / "new")
    else:
        save_file(change(load_file(file)), folder / "new")
    (folder / "new").replace(file)


def golden(name):
    """Metadata and tensors of a golden file."""
    with safe_open(GOLDEN / name, "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def released():
    """What the authors' file holds, its configuration as a plain dict."""
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        return torch.load(RELEASED, weights_only=True)


# --- the command -----------------------------------------------------------------------------------------------------


def refused(words, texts, folder, capsys):
    """Exit code 2, one line on stderr with these texts, nothing on stdout, no file made or changed."""

    def listing():
        return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = listing()
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("simmim: "), error
    assert all(text in error for text in texts), error
    assert listing() == before
