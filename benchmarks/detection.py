"""Detection from a pre-trained encoder against training from scratch with few labeled images: AP, paired by seed.

    python benchmarks/scenes.py --out scenes
    simmim pretrain --config configs/pretrain/scenes.yaml --data scenes/unlabeled --out scenes/pretrain
    python benchmarks/detection.py --scenes scenes --init scenes/pretrain --out scenes/detection-study
    python benchmarks/detection.py --data blood-cells --init runs/cells --out runs/cells-study --steps 500 --image-size 160

The first is of garments on photographs (configs/finetune/scenes-detection.yaml), the second of any labeled images, for
instance BCCD's blood cells. It is `simmim study --task detection`; further settings of a study may follow and win. The
protocol is that of benchmarks/segmentation.py, with layer decays of 0.75 and 1; the draws of different seeds share images
where --data is given, unless --disjoint is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from segmentation import ROOT, study

GRID = ["--lr-factors", "[0.5,1,2]", "--layer-decays", "[0.75,1]"]  # see finetune/detection/defaults.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or continue the study, and print its report. Exit code 2 where it cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scenes", type=Path, help="folder of benchmarks/scenes.py")
    source.add_argument("--data", help="any images with boxes")
    parser.add_argument("--config", help="recipe; by default that of the scenes or of blood cells")
    options, more = parser.parse_known_args(arguments)
    name = "scenes-detection" if options.scenes else "micro-detection"
    config = options.config or str(ROOT / f"configs/finetune/{name}.yaml")
    data = str(options.scenes / "labeled") if options.scenes else options.data
    own = ["--labels", "20,100", *["--disjoint"] * bool(options.scenes)]
    return study("detection", config, data, [*own, *GRID, *more])


if __name__ == "__main__":
    sys.exit(main())
