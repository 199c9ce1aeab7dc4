"""Fine-tuning from a pre-trained encoder against training from scratch with few labeled scenes: mean IoU, paired by seed.

    python benchmarks/scenes.py --out scenes
    simmim pretrain --config configs/pretrain/scenes.yaml --data scenes/unlabeled --out scenes/pretrain
    python benchmarks/segmentation.py --scenes scenes --init scenes/pretrain --out scenes/study

It is `simmim study --task segmentation` with the recipe of configs/finetune/scenes-segmentation.yaml; further settings of
a study may follow and win. Both arms have the same architecture, labels, views, steps and batches. Each arm's learning rate
and layer decay are the best of the same grid, by cross-validation on the labeled scenes of the first seed. The scenes of
labeled/val judge the arms and choose nothing. No scene is in the draws of two seeds. The arms are compared at the last step,
not at the best one. A later call goes on where an earlier one was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRID = ["--lr-factors", "[0.5,1,2]", "--layer-decays", "[0.65,0.9]"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or continue the study, and print its report. Exit code 2 where it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scenes", type=Path, required=True, help="folder of benchmarks/scenes.py")
    parser.add_argument("--config", default=str(ROOT / "configs/finetune/scenes-segmentation.yaml"), help="recipe")
    options, more = parser.parse_known_args(arguments)
    data = str(options.scenes / "labeled")
    return study("segmentation", options.config, data, ["--labels", "20,100", "--disjoint", *GRID, *more])


def study(task: str, config: str, data: str, more: Sequence[str]) -> int:
    """`simmim study`, which goes on with what its folder holds; its exit code.

    Args:
        more: settings that follow and win.
    """
    from simmim.cli import main as simmim
    from simmim.cli.arguments import values_of
    from simmim.training.run_folder import CONFIG

    (out,) = values_of(more, "out")[-1:] or ("",)
    resume = ["--resume"] if (Path(out) / CONFIG).is_file() else []
    return simmim(["study", "--task", task, "--config", config, "--data", data, *more, *resume])


if __name__ == "__main__":
    sys.exit(main())
