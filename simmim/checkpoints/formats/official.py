"""The authors' checkpoints (Swin-Transformer and SimMIM repositories): `.pth` files with `model` and `config`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from simmim.checkpoints.checkpoint import Checkpoint, Preprocessing
from simmim.checkpoints.fitting import check_state
from simmim.checkpoints.formats.base import ExportOptions
from simmim.checkpoints.formats.foreign import ForeignFormat, Rows, read_description
from simmim.checkpoints.formats.key_tables import KeyTable, prefix_of, weight_and_bias
from simmim.checkpoints.formats.parts import SIMMIM, class_names, parts_of_form, read_head, read_simmim
from simmim.checkpoints.source import Source
from simmim.checkpoints.weight_files import WeightFile, as_plain_values
from simmim.defaults import IMAGENET_MEAN, IMAGENET_STD
from simmim.encoders.base import EncoderConfig, Size, State

Architecture = tuple[EncoderConfig, Preprocessing, tuple[str, ...]]


class OfficialRows(Rows):
    """An encoder family of the authors' repositories.

    Attributes:
        table: its key table.
        buffers: what its modules store beside the weights. They are only a source of sizes here.
        anchor: the end of the first name of every file.
        config_class: of the family.
    """

    table: ClassVar[KeyTable]
    buffers: ClassVar[re.Pattern[str]]
    anchor: ClassVar[str] = "patch_embed.proj.weight"
    config_class: ClassVar[type[EncoderConfig]]

    @abstractmethod
    def find_architecture(
        self, state: State, buffers: State, settings: Mapping, file: WeightFile, overrides: Mapping[str, Any]
    ) -> Architecture:
        """Architecture and preprocessing of a file without this toolkit's description, and notes on what was concluded.

        Args:
            state: the encoder's tensors under the authors' names, without prefix.
            settings: the stored configuration; empty if there is none.

        Raises:
            ValueError: if they do not follow from the file.
        """

    @abstractmethod
    def settings(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The part of the authors' training configuration that describes the model, as plain values."""

    @abstractmethod
    def buffers_of(self, checkpoint: Checkpoint) -> State:
        """What the authors' modules store beside the weights, so that they load the file strictly."""

    def current_name(self, name: str) -> str:
        """The name that the authors' code has today for a tensor of an older file."""
        return name

    def table_for(self, config: EncoderConfig) -> KeyTable:
        """The key table of an architecture."""
        return self.table

    def our_shapes(self, state: State) -> State:
        """Tensors under our names in our shapes."""
        return state

    def their_shapes(self, state: State) -> State:
        """The inverse of `our_shapes`, under their names."""
        return state

    def read(self, source: Source, overrides: Mapping[str, Any]) -> Checkpoint:
        file, description = source.weights, source.description
        tensors = {self.current_name(name): value for name, value in file.tensors.items()}
        prefix = prefix_of(tensors, self.anchor)
        encoder = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        buffers = {name: encoder.pop(name) for name in list(encoder) if self.buffers.search(name)}
        settings = as_plain_values(file.values.get("config") or {})
        notes: tuple[str, ...] = ()
        if description:
            config, preprocessing = read_description(source, self.config_class)
        else:
            config, preprocessing, notes = self.find_architecture(encoder, buffers, settings, file, overrides)
        state, left_over = self.table_for(config).to_ours(encoder, config)
        left_over += [name for name in tensors if not name.startswith(prefix)]
        known = {theirs.removeprefix(prefix) for _, theirs in (*self.table.pretraining, *self.table.head)} | {"mask_token"}
        extra = [name for name in left_over if name not in known]
        state = self.our_shapes(state)
        check_state(config, state | {name: (encoder | tensors)[name] for name in extra}, file.source)
        head = read_head(self.table, encoder, file)
        # The mask token is a part of the authors' encoder, whatever its prefix.
        mask_token = {"encoder.mask_token": encoder["mask_token"]} if "mask_token" in encoder else {}
        pretraining, more_notes = read_simmim(self.table.pretraining, tensors | mask_token, file)
        return Checkpoint(
            config,
            state,
            preprocessing,
            file.source,
            "official",
            provenance=description.get("provenance", provenance_in(settings, bool(pretraining))),
            pretraining=pretraining,
            head=head,
            classes=class_names(description.get("classes"), head),
            notes=notes + more_notes,
        )

    def state(self, checkpoint: Checkpoint, form: str) -> State:
        """With the authors' prefix in the form simmim, without it in the forms encoder and classifier."""
        prefix = "encoder." if form == SIMMIM else ""
        weights = self.their_shapes(self.table_for(checkpoint.config).from_ours(checkpoint.encoder, checkpoint.config))
        encoder = {**weights, **self.buffers_of(checkpoint)}
        return {prefix + name: value for name, value in encoder.items()} | parts_of_form(self.table, checkpoint, form)


# Rows of SimMIM's own weights and of a classifier's head, alike in all families.
PRETRAINING_ROWS = (
    ("mask_token", "encoder.mask_token"),
    ("decoder.weight", "decoder.0.weight"),
    ("decoder.bias", "decoder.0.bias"),
)
HEAD_ROWS = weight_and_bias("head", "head")
# Image size in pixels and window, as file names have them: the Swin-Transformer repository's window12_192 and
# window12to16_192to256, the SimMIM repository's img192_window6.
FILE_NAME = re.compile(r"window(?P<before>\d+)(?:to(?P<window>\d+))?_(?P<size_before>\d{2,4})(?:to(?P<size>\d{2,4}))?(?!\d)")
SIMMIM_FILE_NAME = re.compile(r"img(?P<size>\d{2,4})(?:_window(?P<window>\d+))?(?!\d)")


def provenance_in(settings: Mapping, has_pretraining: bool) -> dict[str, Any]:
    """What the stored configuration records of the training."""
    provenance = {"origin": "the authors' code", "method": "SimMIM" if has_pretraining else "classification"}
    data, simmim = settings.get("DATA", {}), settings.get("MODEL", {}).get("SIMMIM", {})
    if "EPOCHS" in settings.get("TRAIN", {}):
        provenance["epochs"] = settings["TRAIN"]["EPOCHS"]
    if "MASK_RATIO" in data:
        provenance |= {"mask_unit": data.get("MASK_PATCH_SIZE"), "mask_ratio": data["MASK_RATIO"]}
    target = simmim.get("NORM_TARGET", {})
    if target.get("ENABLE"):
        provenance["norm_target_patch"] = target.get("PATCH_SIZE", 47)
    return provenance


def preprocessing_of(state: State, size: Size, channels: int) -> Preprocessing:
    """The preprocessing of published models: ImageNet's statistics for three channels; of classifiers with a crop."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    is_classifier = any(name.startswith("head") for name in state)
    return Preprocessing(size, mean, std, *(("bicubic", 0.875) if is_classifier else ()))


def stored_settings(checkpoint: Checkpoint, kind: str, drop_path_rate: float, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a file's configuration says of images, masks, target and encoder.

    Args:
        kind: the authors' name of the family.
        own: its settings.
    """
    height, width = checkpoint.preprocessing.image_size
    data: dict[str, Any] = {"IMG_SIZE": height if height == width else [height, width]}
    if "mask_ratio" in checkpoint.provenance:
        data |= {"MASK_PATCH_SIZE": checkpoint.provenance["mask_unit"], "MASK_RATIO": checkpoint.provenance["mask_ratio"]}
    model: dict[str, Any] = {"TYPE": kind, "DROP_PATH_RATE": drop_path_rate, kind.upper(): dict(own)}
    if checkpoint.provenance.get("norm_target_patch"):
        model["SIMMIM"] = {"NORM_TARGET": {"ENABLE": True, "PATCH_SIZE": checkpoint.provenance["norm_target_patch"]}}
    return {"DATA": data, "MODEL": model}


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with tuples for lists, as a configuration has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


class OfficialFormat(ForeignFormat):
    """A folder with model.pth, and a config.json of this toolkit beside it where this toolkit has written it."""

    name = "official"
    title = "the authors' code"
    library = "pytorch"
    weight_names = ("model.pth",)
    families: ClassVar[dict[str, str]] = {
        "swinv2": "simmim.checkpoints.formats.swinv2.official",
        "swin": "simmim.checkpoints.formats.swin.official",
        "vit": "simmim.checkpoints.formats.vit.official",
    }
    methods = ("simmim",)
    prefers_pretraining = True

    def write(self, checkpoint: Checkpoint, form: str, folder: Path, options: ExportOptions) -> None:
        rows: OfficialRows = self.rows_for(checkpoint.config)
        # Clones, because a file holds the whole storage of a tensor.
        weights = {name: value.detach().cpu().clone() for name, value in rows.state(checkpoint, form).items()}
        torch.save({"model": weights, "config": rows.settings(checkpoint)}, folder / "model.pth")
        self.write_config(checkpoint, form, folder, options)

    def folder_config(self, checkpoint: Checkpoint, form: str, options: ExportOptions) -> dict[str, Any]:
        return {"format": self.name}

    def loading_code(self, checkpoint: Checkpoint, form: str, path: str) -> str:
        return (
            "import torch\n\n"
            f"state = torch.load({path + '/model.pth'!r}, weights_only=True)['model']  # for the authors' modules, strictly"
        )
