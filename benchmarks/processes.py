"""Processes that compute only when they are asked to, so that no two compute at once; and their memory.

The process that measures holds a `Worker` for each of the others. A worker reads lines from its standard input and answers
each by a line of JSON (`answer`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Worker:
    """A Python script that runs in a process of its own and answers questions.

    Args:
        arguments: of the interpreter: the script and its own arguments.
        environment: variables of the process; by default those of this process.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: str) -> dict:
        """Send a line and return the answer to it."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        """The next answer. Other output, of libraries for instance, is skipped."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{' '.join(self.process.args[1:])} ended with code {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def answer(values: dict) -> None:
    """Answer a question, in the worker's process."""
    print(json.dumps(values), flush=True)


def reset_peak() -> None:
    """Set this process's high-water mark, VmHWM, to what is resident now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_mib(field: str) -> float:
    """This process's resident set, VmRSS, or its high-water mark, VmHWM, in MiB. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))
