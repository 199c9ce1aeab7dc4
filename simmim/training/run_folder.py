"""The run folder: locked by one process, never overwritten by accident, its configuration written once."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from simmim.files import atomic_write, remove_temporary_files
from simmim.renamed_settings import with_current_names

CONFIG, CHECKPOINTS, LAST, BEST = "config.yaml", "checkpoints", "last.ckpt", "best.ckpt"
ENCODER = "encoder"
LOCK = ".lock"
# Settings that do not change the result of a run, so that a resumed run may have other ones. A settings class may add to
# them by `may_change_on_resume`, dotted keys too.
MAY_CHANGE_ON_RESUME = (
    "resume",
    "overwrite",
    "out",
    "workers",
    "devices",
    "trainer",
    "loggers",
    "save_every_minutes",
    "keep_checkpoints",
    "compile",
)


def checkpoints_folder(run: Path) -> Path:
    """Where a run's checkpoints are."""
    return run / CHECKPOINTS


def plain(value):
    """Settings as plain values for YAML and JSON: dataclasses to dicts, tuples to lists, paths to text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def as_yaml(settings) -> str:
    """Settings as the YAML that `--config` reads back."""
    values = plain(settings)
    for name in ("resume", "overwrite"):
        values.pop(name, None)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def check_run_folder(out: str | Path, resume: bool, overwrite: bool) -> None:
    """Refuse a run folder that is in use, before anything is computed or written.

    Raises:
        ValueError: when it holds something and neither `resume` nor `overwrite` says what is to become of that; when it
            is to be overwritten and is no run; when both are given.
    """
    run = Path(out).expanduser()
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on with the run, or start it again")
    if run.exists() and not run.is_dir():
        raise ValueError(f"run folder {str(run)!r} is a file: give a new folder")
    if not run.is_dir() or not any(entry.name != LOCK for entry in run.iterdir()):
        return
    holds_config = (run / CONFIG).is_file()
    holds_run = holds_config or any(checkpoints_folder(run).glob("*.ckpt"))
    if overwrite and not holds_config:
        raise ValueError(f"folder {str(run)!r} holds no run ({CONFIG} is missing) and is left alone: give a new folder")
    if resume and not holds_run:
        raise ValueError(f"folder {str(run)!r} holds no run to resume: give a run's folder, or a new one")
    if not holds_run:
        raise ValueError(f"folder {str(run)!r} is not empty and holds no run: give a new folder")
    if not resume and not overwrite:
        raise ValueError(
            f"run folder {str(run)!r} is not empty; resume: true goes on with the run, overwrite: true starts it again"
        )


@contextlib.contextmanager
def locked_run_folder(settings) -> Iterator[Path]:
    """Create the run folder of `settings` (which has out, resume and overwrite) or resume in it, write its configuration,
    and lock it against other processes until the block ends.

    Raises:
        ValueError: as `check_run_folder`; when another process has locked it; when a run is resumed with settings that
            differ from those it was started with, naming them.
    """
    check_run_folder(settings.out, settings.resume, settings.overwrite)
    run = Path(settings.out).expanduser()
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run folder {str(run)!r} cannot be made ({error.strerror}): give another") from error
    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        message = f"run folder {str(run)!r} is in use by another process: wait for it, or give a new folder"
        raise ValueError(message) from None
    try:
        write_run_folder(run, settings)
        yield run
    except FileNotFoundError as error:
        if (run / CONFIG).is_file():
            raise
        raise FileNotFoundError(f"run folder {str(run)!r} is gone, moved or deleted while it was in use") from error
    finally:
        lock.release()
        (run / LOCK).unlink(missing_ok=True)


def write_run_folder(run: Path, settings) -> None:
    """Empty `run` if it is to be overwritten; write the configuration, or check that it is the same as before.

    Raises:
        ValueError: when it is not.
    """
    if settings.overwrite:
        for entry in run.iterdir():  # the entries and not the folder, which may be a link
            if entry.name == LOCK:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    config = run / CONFIG
    if config.is_file():
        started, _ = with_current_names(yaml.safe_load(config.read_text(encoding="utf-8")))
        changed = differences(with_defaults(started, settings), yaml.safe_load(as_yaml(settings)))
        free = (*MAY_CHANGE_ON_RESUME, *getattr(settings, "may_change_on_resume", ()))
        changed = [text for text in changed if not f"{text.split(' ')[0]}.".startswith(tuple(f"{name}." for name in free))]
        if changed:
            raise ValueError(
                f"run {str(run)!r} was started with other settings: {'; '.join(changed)}. "
                "Resume it with its own, or give a new run folder"
            )
    else:
        with atomic_write(config) as temporary:
            temporary.write_text(as_yaml(settings), encoding="utf-8")
    checkpoints_folder(run).mkdir(exist_ok=True)
    for folder in (checkpoints_folder(run), run / ENCODER):  # of a process that was killed: as large as a checkpoint
        remove_temporary_files(folder)


def differences(old, new, prefix: str = "") -> list[str]:
    """Dotted keys by which two nested dicts differ, as "key was OLD, is NEW"."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{prefix} was {old}, is {new}"]
    found = []
    for key in sorted(old.keys() | new.keys()):
        found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    return found


def with_defaults(stored: dict, settings) -> dict:
    """A stored configuration with the settings that its version did not have yet, as that version did: at their defaults, or
    as the settings' class says in `earlier`."""
    filled = {**getattr(settings, "earlier", {}), **stored}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value) and isinstance(filled.get(field.name), dict):
            filled[field.name] = with_defaults(filled[field.name], value)
        elif field.name not in filled and field.default is not MISSING:
            filled[field.name] = plain(field.default)
    return filled
