"""The command `simmim`: the table of commands, their dispatch, and exit codes."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module

from simmim.cli.allocator import keep_freed_memory
from simmim.cli.arguments import UsageError, nearest
from simmim.cli.notices import notices_as_lines
from simmim.cli.termination import Terminated, raised_on_sigterm
from simmim.cli.waiting import let_waiting_threads_sleep

DESCRIPTION = "Pre-train an encoder on your own images without labels, look at it, export it, fine-tune it on few labels."


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: the first word after `simmim`.
        purpose: its line in the overview.
        home: module of `simmim.cli` and function, which takes the remaining words and returns the exit code, or None for 0.
            The module is imported when the command runs.
        trains: whether it answers SIGTERM itself, at the end of a step.
    """

    name: str
    purpose: str
    home: str
    trains: bool = False

    def run(self, words: Sequence[str]) -> int:
        """Run the command with the words after its name and return the exit code."""
        module, function = self.home.split(":")
        return getattr(import_module(f"simmim.cli.{module}"), function)(words) or 0


COMMANDS = (
    Command("demo", "the whole story on real digits, a few minutes on a laptop", "demo:run_demo", trains=True),
    Command("check-data", "what a folder holds, what cannot be read, and what to type next", "images:run_check_data"),
    Command("pretrain", "stage 1: learn from a folder of unlabeled images", "train:run_pretrain", trains=True),
    Command("reconstruct", "pictures of what a pre-trained model fills in", "images:run_reconstruct"),
    Command("finetune", "stage 2: transfer the encoder to a labeled task", "train:run_finetune", trains=True),
    Command(
        "study", "accuracy by labels per class: pre-trained, from scratch, other encoders", "train:run_study", trains=True
    ),
    Command("predict", "classify or segment images, or find objects, with a fine-tuned encoder", "images:run_predict"),
    Command("export", "the encoder or classifier for other libraries", "models:run_export"),
    Command("inspect", "what a weight file is, whether it loads and what it can be exported as", "models:run_inspect"),
    Command("plan", "parameters, FLOPs and memory of a model per device, before devices are rented", "models:run_plan"),
    Command("embed", "one vector per image, to Parquet", "features:run_embed"),
    Command("probe", "the quality of a frozen encoder's stages, by logistic regression on few labels", "features:run_probe"),
    Command("knn", "the same by nearest neighbors; nothing is fitted", "features:run_knn"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done. 1: check-data found something wrong. 2: wrong input or a full disk. 130, 138 or 143: stopped by Ctrl-C, SIGUSR1
    or SIGTERM, a training with everything saved. 141: the reader of the output has closed it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # At its exit Python would search everything for garbage, for a second or two.
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        if not words or words[0] in ("-h", "--help"):
            print(overview())
        elif words[0] == "--version":
            from simmim import __version__

            print(f"simmim {__version__}")
        else:
            command = command_named(words[0])
            keep_freed_memory()
            let_waiting_threads_sleep()
            with notices_as_lines(print_notice), nullcontext() if command.trains else raised_on_sigterm():
                code = command.run(words[1:])
            sys.stdout.flush()
            return code
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 141
        print_error(error)
        return 2
    except KeyboardInterrupt as error:
        print_error("; ".join(("interrupted", *map(str, error.args))))
        return 130
    except (Exception, Terminated) as error:
        if not hasattr(error, "exit_code"):
            raise
        print_error(error)
        return error.exit_code
    return 0


def overview() -> str:
    """The text of `simmim --help`. Nothing heavy is imported for it."""
    width = max(len(command.name) for command in COMMANDS)
    listed = "\n".join(f"  {command.name:<{width}}  {command.purpose}" for command in COMMANDS)
    return (
        f"usage: simmim COMMAND [options]\n\n{DESCRIPTION}\n\ncommands:\n{listed}\n\n"
        "simmim COMMAND --help lists the options of one. Start with: simmim demo"
    )


def command_named(name: str) -> Command:
    """The command of that name.

    Raises:
        UsageError: for an unknown name, naming the nearest known one.
    """
    names = [command.name for command in COMMANDS]
    if name in names:
        return COMMANDS[names.index(name)]
    known = f"; known: {', '.join(names)}" if name.startswith("-") else nearest(name, names)
    raise UsageError(f"unknown command {name!r}{known}")


def print_error(error: BaseException | str) -> None:
    """Print an error as one line on stderr."""
    print(f"simmim: {with_flags(' '.join(str(error).split()))}", file=sys.stderr)


def print_notice(text: str) -> None:
    """Print what the user should know, and what is no error, as one line on stderr."""
    print(f"simmim: note: {with_flags(' '.join(text.split()))}", file=sys.stderr, flush=True)


def with_flags(message: str) -> str:
    """A message of the library in the words of the command.

    The library names settings, as in YAML and Python: "resume: true goes on with the run". Where a message says which value
    to give, the command shows the flag. `NAME: true` becomes `--NAME`; `NAME: false` and `NAME: none` become `--NAME false`
    and `--NAME none`. Names alone stay as they are.
    """
    return re.sub(SETTING_WITH_VALUE, flag_with_value, message)


# Not inside paths and quotations.
SETTING_WITH_VALUE = r"(?<![\w./'\"-])([a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*): (true|false|none)(?![\w/'\"-]|\.\w)"


def flag_with_value(match: re.Match) -> str:
    """`--NAME` for `NAME: true`, else `--NAME VALUE`."""
    flag = "--" + match[1].replace("_", "-")
    return flag if match[2] == "true" else f"{flag} {match[2]}"


def output_is_closed() -> bool:
    """Whether the reader of the output, `head` for instance, has closed it. The rest of the output is then discarded."""
    try:
        print(flush=True)  # a closed pipe refuses the next write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
