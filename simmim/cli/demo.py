"""The demo: both stages on real digits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simmim.cli.arguments import UsageError, parse

# The from-scratch arm's own rates: the best that benchmarks/demo_search.py found for it.
SCRATCH_TWIN = {"scratch_lr": 0.65536, "scratch_layer_decay": 0.65}
LABELS_PER_CLASS = (5, 10)
LABELS_WITH_UNLABELED, WITH_UNLABELED = 5, "pre-trained, with unlabeled"

if TYPE_CHECKING:
    from simmim.data.digits import DigitFolders


@dataclass(frozen=True)
class DemoOptions:
    """Pre-train on 4,000 real digits, look at reconstructions, and compare with training from scratch on few labels.

    Args:
        out: folder to create.
        seeds: fine-tuning runs per arm, each with labels of its own.
        overwrite: delete the folder of an earlier demo first.
    """

    out: str = "demo-run"
    seeds: int = 5
    overwrite: bool = False


def run_demo(words: Sequence[str]) -> None:
    """simmim demo"""
    options = parse("demo", DemoOptions, words)
    out, started = Path(options.out).expanduser(), time.monotonic()
    if options.seeds < 2:
        raise UsageError(f"seeds is {options.seeds}: give 2 or more, so that there is a standard error")
    if out.exists() and options.overwrite and (out / "digits").is_dir():
        shutil.rmtree(out)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UsageError(f"{options.out!r} exists: simmim demo --overwrite starts again, --out gives another folder")
    from simmim.cli.train import pretrain_settings
    from simmim.data.digits import write_digits

    print("1/4 writing 5,000 real handwritten digits", flush=True)
    digits = write_digits(out / "digits")

    from simmim.pretrain import pretrain
    from simmim.pretrain.reconstruct import reconstruct

    print("2/4 pre-training on 4,000 of them, without labels", flush=True)
    recipe = ["--config", str(recipe_path("pretrain/demo.yaml"))]
    run = pretrain(pretrain_settings([*recipe, "--data", str(digits.unlabeled), "--out", str(out / "pretrain")]))

    print("3/4 reconstructing digits that the model has not seen", flush=True)
    picture = reconstruct(run, digits.labeled / "test", out / "reconstructions.png", count=16)

    print("4/4 fine-tuning with 5 and 10 labels per class, the same from scratch, and with unlabeled digits", flush=True)
    table = compare_arms(run, digits, out, options.seeds)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(
        f"\nTest accuracy in percent on 1,000 digits, mean ± standard error:\n\n{table}\n\n"
        f"reconstructions  {picture}\n"
        f"encoder          {run / 'encoder'}\n"
        f"curves           tensorboard --logdir {out}\n"
        f"your own images  simmim pretrain --data FOLDER --out runs/first\n\n"
        f"took {(time.monotonic() - started) / 60:.1f} minutes"
    )


def compare_arms(run: Path, digits: DigitFolders, out: Path, num_seeds: int) -> str:
    """Fine-tune the encoder of `run`, its twin from scratch, and the encoder with the unlabeled digits too; the tables of
    their accuracies."""
    from simmim.cli.train import finetune_settings
    from simmim.data import available_cores
    from simmim.finetune.classification.settings import ClassificationSettings
    from simmim.finetune.label_study.arms import Arm, pretrained_and_scratch
    from simmim.finetune.label_study.report import comparison_table
    from simmim.finetune.label_study.trials import run_arms

    def settings_of(recipe: str, folder: Path, *more: str) -> ClassificationSettings:
        words = ["--config", str(recipe_path(recipe)), "--data", str(digits.labeled), "--out", str(folder)]
        settings = finetune_settings("classification", [*words, "--init", str(run), *more])
        assert isinstance(settings, ClassificationSettings)
        return settings

    processes, folder = min(available_cores(), 4), out / "finetune"
    arms = pretrained_and_scratch(settings_of("finetune/demo.yaml", folder), **SCRATCH_TWIN)
    plain = run_arms(arms, dict(zip(LABELS_PER_CLASS, LABELS_PER_CLASS)), range(num_seeds), folder, processes)
    folder, count = out / "finetune-unlabeled", LABELS_WITH_UNLABELED
    arm = Arm(WITH_UNLABELED, settings_of("finetune/demo-unlabeled.yaml", folder, "--unlabeled", str(digits.unlabeled)))
    semi = run_arms([arm], {count: count}, range(num_seeds), folder, processes)
    first = comparison_table(plain.trials, plain.arms, LABELS_PER_CLASS)
    second = comparison_table((*semi.trials, *plain.trials), (WITH_UNLABELED, arms[0].name), [count])
    return f"{first}\n\n{second}"


def recipe_path(name: str) -> Path:
    """A recipe of configs/, in a checkout and in an installed package."""
    import simmim

    return Path(simmim.__file__).resolve().parent / "configs" / name
