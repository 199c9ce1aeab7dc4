"""Exported folders: weights in one of the formats, the preprocessing, and a model card. Each appears whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from simmim.checkpoints.card import model_card
from simmim.checkpoints.checkpoint import Checkpoint
from simmim.checkpoints.formats.base import CLASSIFIER, ENCODER, ExportOptions, Format, form_names
from simmim.checkpoints.formats.registry import format_named, names
from simmim.messages import did_you_mean
from simmim.methods.registry import method_named


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Args:
        folder: what was made.
        form: encoder, classifier, or the name of a method of pre-training.
        contents: what the folder holds, in words.
        notes: what the other library computes or keeps differently, one sentence each.
        code: lines of Python that load the folder.
    """

    folder: Path
    form: str
    contents: str
    notes: tuple[str, ...]
    code: str


def export(
    checkpoint: Checkpoint,
    format: str,
    out: str | Path,
    form: str | None = None,
    image_size: tuple[int, int] | None = None,
    license: str | None = None,
    features: str = "pooled",
    dynamic_size: bool = False,
) -> Exported:
    """Write `checkpoint` into the new folder `out`.

    Args:
        format: name of a format; safetensors is this toolkit's own and holds everything.
        form: what other formats hold: encoder; classifier; or the name of a method of pre-training, such as simmim, for the
            encoder with the method's own weights. By default the classifier if there is one, else what the format is used
            for most.
        image_size: (height, width) that formats of a fixed size are made for; the checkpoint's own by default.
        license: what the card says; by default what the provenance says, else unknown.
        features, dynamic_size: as of `ExportOptions`.

    Raises:
        ValueError: if `out` is in use, a name is unknown, or the format cannot represent the model.
    """
    out = Path(out).expanduser()
    check_new(out)
    target = format_named(format)
    preprocessing = replace(checkpoint.preprocessing, image_size=image_size or checkpoint.preprocessing.image_size)
    # The architecture is what was trained, at its own image size; only then comes the size that is asked for.
    config = checkpoint.config.with_training_size(checkpoint.preprocessing.image_size)
    checkpoint = replace(checkpoint, config=config, preprocessing=preprocessing)
    form = choose_form(checkpoint, target, form)
    checkpoint = target.fitted(checkpoint)
    notes = target.limits(checkpoint, form)
    if license:
        checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "license": license})
    license = str(checkpoint.provenance.get("license", "unknown"))
    card = model_card(checkpoint, target, form, notes, license)

    with new_folder(out) as temporary:
        target.write(checkpoint, form, temporary, ExportOptions(license, features, dynamic_size))
        (temporary / "README.md").write_text(card, encoding="utf-8")
    code = target.loading_code(checkpoint, form, str(out.resolve()))
    return Exported(out, form, describe_form(form), notes, code)


def check_new(out: Path) -> None:
    """Refuse a folder that is in use.

    Raises:
        ValueError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not empty: give a new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end, whole or not at all.

    Raises:
        ValueError: as `check_new`.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def choose_form(checkpoint: Checkpoint, format: Format, form: str | None) -> str:
    """The form to write.

    Args:
        form: the form that is asked for; None for the format's default.

    Raises:
        ValueError: if it is unknown, or the checkpoint or the format has no such form.
    """
    if form is None:
        return format.default_form(checkpoint)
    if form not in form_names():
        raise ValueError(f"unknown form {form!r}{did_you_mean(form, form_names())}")
    if form in format.forms(checkpoint):
        return form
    if form == CLASSIFIER and checkpoint.head:
        able = [name for name in names() if format_named(name).holds_head(checkpoint)]
        raise ValueError(
            f"{format.name} has no place for an attentive head: export as {' or '.join(able)}, or the encoder alone"
        )
    if form == CLASSIFIER:
        raise ValueError(f"{checkpoint.source} has no head: it cannot be exported in the form {form}")
    method = method_named(form)
    if not checkpoint.pretraining or checkpoint.method != form:
        raise ValueError(f"{checkpoint.source} has no {method.own_parts}: it cannot be exported in the form {form}")
    able = [name for name in names() if format_named(name).holds_method(form)]
    raise ValueError(
        f"{format.name} has no place for the {method.own_parts} of {method.title}: export as {' or '.join(able)}, or the "
        "encoder alone"
    )


def describe_form(form: str) -> str:
    """What a folder of this form holds, in words."""
    return form if form in (ENCODER, CLASSIFIER) else f"encoder, {method_named(form).own_parts}"
