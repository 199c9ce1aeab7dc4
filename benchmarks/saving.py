"""What checkpoints cost: time that training stands still for them, and processor time of the thread that writes them, as
shares of a real run's time.

    OMP_NUM_THREADS=1 python benchmarks/saving.py --preset micro --image-size 96 --every 50
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from simmim.data.digits import write_digits
from simmim.training.saving import CheckpointWriter, SaveRun


class Clock:
    """Seconds spent inside a function, by a clock."""

    def __init__(self, owner: type, name: str, now) -> None:
        self.seconds, self.calls = 0.0, 0
        inner = getattr(owner, name)

        def timed(*given, **named):
            began = now()
            try:
                return inner(*given, **named)
            finally:
                self.seconds, self.calls = self.seconds + now() - began, self.calls + 1

        setattr(owner, name, timed)


def main() -> None:
    """Run, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints; 50 is the most often by default")
    chosen = parser.parse_args()
    from simmim.pretrain import PretrainSettings, SimMIMSettings, pretrain

    standing = Clock(SaveRun, "save", time.perf_counter)
    writing = Clock(CheckpointWriter, "write", time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits", count=1000)
        settings = PretrainSettings(
            data=str(digits.unlabeled),
            out=str(Path(folder) / "run"),
            preset=chosen.preset,
            image_size=chosen.image_size,
            batch_size=chosen.batch_size,
            epochs=chosen.steps * chosen.batch_size / 800,
            save_every_steps=chosen.every,
            workers=0,
            model=SimMIMSettings(),
        )
        began = time.perf_counter()
        pretrain(settings)
        whole = time.perf_counter() - began
        size = max(path.stat().st_size for path in (Path(folder) / "run" / "checkpoints").iterdir()) / 2**20
    print(
        "\n| checkpoints | MiB each | run, s | standing still, s | share | writing thread, processor s | share |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        f"| {writing.calls} | {size:.0f} | {whole:.1f} | {standing.seconds:.2f} | {standing.seconds / whole:.1%} | "
        f"{writing.seconds:.2f} | {writing.seconds / whole:.1%} |"
    )


if __name__ == "__main__":
    main()
