"""The commands that train: pretrain, finetune, study."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simmim.cli.arguments import UsageError, parse, read_config, split_words, values_of

if TYPE_CHECKING:
    from simmim.finetune.label_study.settings import StudyFields
    from simmim.finetune.settings import TransferSettings
    from simmim.pretrain.settings import PretrainSettings


def run_pretrain(words: Sequence[str]) -> None:
    """simmim pretrain"""
    settings = pretrain_settings(words)
    from simmim.data.readers import check_sources_exist

    check_sources_exist(settings.data.path)  # before Lightning is imported, which takes a while
    from simmim.pretrain import pretrain

    run = pretrain(settings)
    from simmim.training.trainer import is_first_process

    if is_first_process():
        print(next_steps(settings, run))


def next_steps(settings: PretrainSettings, run: Path) -> str:
    """The commands for which the run is ready, quoted for a shell: a source may be a glob."""
    from simmim.methods.registry import method_named

    folder, labeled_run, images = map(shlex.quote, (str(run), f"{run}-finetuned", str(settings.data.path)))
    commands = [f"simmim finetune classification --init {folder} --data LABELED_FOLDER --out {labeled_run}"]
    if settings.probe.data is None:  # else the run has measured it
        commands.insert(0, f"simmim probe --run {folder} --data LABELED_FOLDER")
    if method_named(settings.method).predicts_pixels:
        commands.insert(0, f"simmim reconstruct --run {folder} --images {images} --out grid.png")
    return "next: " + "\n      ".join(commands)


def pretrain_settings(words: Sequence[str]) -> PretrainSettings:
    """The settings of `simmim pretrain`. The method says which settings there are under `model`."""
    from simmim.methods.registry import METHODS, default_method
    from simmim.pretrain.settings import PretrainSettings, settings_class

    words = with_saved_config(words)
    usage = "simmim pretrain --data PATH --out RUN [--SETTING VALUE …]"
    own = settings_class(method_in(words) or default_method())
    helps = {"method": f"how the encoder learns: {', '.join(METHODS)}.", "preset": f"size of a fresh encoder: {sizes()}."}
    return parse("pretrain", own, words, result_class=PretrainSettings, usage=usage, config=True, helps=helps)


def sizes() -> str:
    """The encoders' presets, for a help text."""
    from simmim.encoders.registry import presets

    return ", ".join(presets())


def method_in(words: Sequence[str]) -> str | None:
    """The method that the words name, by a flag or in a --config file; the last one wins. None where there is none."""
    return named_in(words, "method")


def named_in(words: Sequence[str], key: str) -> str | None:
    """The value of a setting that says which others there are, as of `method_in`."""
    value = None
    for word in split_words(words):
        if word.key == key and word.value:
            value = word.value
        elif word.key == "config":
            value = read_config(word.value).get(key, value)
    return value


def run_finetune(words: Sequence[str]) -> None:
    """simmim finetune TASK"""
    from simmim.finetune.registry import TASKS

    if words and words[0] in ("-h", "--help"):
        print(f"usage: simmim finetune TASK [options]\n\ntasks: {', '.join(TASKS)}\n\n--help after a task lists its options")
        return
    if not words or words[0].startswith("-"):
        raise UsageError(f"which task? give one of: simmim finetune {' | '.join(TASKS)}")
    settings = finetune_settings(words[0], words[1:])
    from simmim.finetune import finetune

    finetune(settings)


def finetune_settings(task: str, words: Sequence[str]) -> TransferSettings:
    """The settings of `simmim finetune TASK`.

    Raises:
        ValueError: for an unknown task, naming the nearest known one.
    """
    from simmim.finetune.registry import settings_class

    usage = f"simmim finetune {task} --data PATH --out RUN --init ENCODER [--SETTING VALUE …]"
    return parse(f"finetune {task}", settings_class(task), with_saved_config(words), usage=usage, config=True)


def run_study(words: Sequence[str]) -> int | None:
    """simmim study"""
    settings: Any = study_settings(words)  # the fields of the task's settings too
    from simmim.finetune import study
    from simmim.finetune.label_study.report import report
    from simmim.training.run_folder import CONFIG

    try:
        result = study(settings)
    except KeyboardInterrupt:
        if not (Path(settings.out).expanduser() / CONFIG).is_file():
            raise
        raise KeyboardInterrupt(f"simmim study --out {shlex.quote(str(settings.out))} --resume goes on") from None
    print(f"\n{report(result)}\n\nplot and numbers: {settings.out}")
    return 0


def study_settings(words: Sequence[str]) -> StudyFields:
    """The settings of `simmim study`. The task says which there are.

    Raises:
        ValueError: for an unknown task, naming the nearest known one.
    """
    words = with_saved_config(words)
    task = named_in(words, "task") or "classification"
    if task == "classification":  # spares the training libraries
        from simmim.finetune.label_study.settings import StudySettings

        settings_class: type = StudySettings
    else:
        from simmim.finetune.registry import study_of

        settings_class = study_of(task).settings
    usage = "simmim study [--task TASK] --data PATH --out RUN --init ENCODER [--SETTING VALUE …]"
    return parse("study", settings_class, words, usage=usage, config=True)


def with_saved_config(words: Sequence[str]) -> list[str]:
    """With --resume, the run's own configuration comes first, so that --out alone has to be given again.

    Raises:
        UsageError: when there is no run to resume, and nothing to start one with.
    """
    resume, out = values_of(words, "resume"), values_of(words, "out")
    if not resume or resume[-1] != "true" or not out:
        return list(words)
    from simmim.training.run_folder import CONFIG

    saved = Path(out[-1]).expanduser() / CONFIG
    if saved.is_file():
        return ["--config", str(saved), *words]
    if not any(values_of(words, key) for key in ("data", "data.path", "config")):
        raise UsageError(f"no run to resume at {out[-1]!r}: there is no {saved}; --data starts a run there")
    return list(words)
