"""The cost of checkpoints in a real run: time for which training waits, and processor time of the thread that writes them.

OMP_NUM_THREADS=1 python benchmarks/saving.py --preset micro --image-size 96 --every 50
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from simmim.data.digits import write_digits
from simmim.training.saving import CheckpointWriter, SaveRun


class Timer:
    """Adds up the seconds that a method takes.

    Args:
        owner: class of the method.
        name: of the method, which is replaced.
        clock: a function that returns seconds.
    """

    def __init__(self, owner: type, name: str, clock: Callable[[], float]) -> None:
        self.seconds, self.calls = 0.0, 0
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            started = clock()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds, self.calls = self.seconds + clock() - started, self.calls + 1

        setattr(owner, name, timed)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints; a run chooses 50 or more")
    options = parser.parse_args()
    from simmim.pretrain import PretrainSettings, SimMIMSettings, pretrain

    waiting = Timer(SaveRun, "save", time.perf_counter)
    writing = Timer(CheckpointWriter, "write", time.thread_time)
    with tempfile.TemporaryDirectory() as folder:
        digits = write_digits(Path(folder) / "digits", count=1000)
        settings = PretrainSettings(
            data=str(digits.unlabeled),
            out=str(Path(folder) / "run"),
            preset=options.preset,
            image_size=options.image_size,
            batch_size=options.batch_size,
            epochs=options.steps * options.batch_size / 800,
            save_every_steps=options.every,
            workers=0,
            model=SimMIMSettings(),
        )
        started = time.perf_counter()
        pretrain(settings)
        total = time.perf_counter() - started
        size = max(path.stat().st_size for path in (Path(folder) / "run" / "checkpoints").iterdir()) / 2**20
    print(
        "\n| checkpoints | MiB each | run, s | training waits, s | share | writing thread, processor s | share |\n"
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        f"| {writing.calls} | {size:.0f} | {total:.1f} | {waiting.seconds:.2f} | {waiting.seconds / total:.1%} | "
        f"{writing.seconds:.2f} | {writing.seconds / total:.1%} |"
    )


if __name__ == "__main__":
    main()
