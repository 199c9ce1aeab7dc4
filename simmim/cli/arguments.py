"""The words after `simmim COMMAND`: settings of a stage, or a few options; what is wrong with them is said in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise


class UsageError(ValueError):
    """What the user typed cannot work; the message says why and what would."""


SHORT_FLAGS = {"--data": "--data.path"}
SWITCHES = ("--resume", "--overwrite", "--freeze")


def parse(name: str, settings_class: type, arguments: Sequence[str]):
    """Parse the words after `simmim NAME` into a `settings_class`; prints and exits for --help and --print_config.

    Every field is a flag and a YAML key; --config FILE gives many at once and later words win.

    Raises:
        UsageError: for unknown keys, naming the nearest, and for values of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=f"simmim {name}",
        exit_on_error=False,
        allow_abbrev=False,
        # The parser's own would list every setting, a page before the first word on any.
        usage=f"simmim {name} --data PATH --out RUN{'' if name == 'pretrain' else ' --init ENCODER'} [--SETTING VALUE …]",
        description=settings_class.__doc__.splitlines()[0],
        epilog="--data PATH is --data.path PATH; hyphens and underscores are alike: --image-size 192.",
    )
    parser.add_argument("--config", action="config", help="YAML file of settings, a recipe of configs/ for instance.")
    parser.add_class_arguments(settings_class, None)
    for action in parser._actions:
        if action.option_strings == ["--data"]:
            action.metavar, action.help = "PATH", "short for --data.path."
    keys = [action.dest for action in parser._actions if action.dest not in ("help", "print_config")]
    try:
        values = parser.instantiate(parser.parse_args(canonical(arguments)))
    except ArgumentError as error:
        raise UsageError(explain(str(error), keys, given_configs(arguments))) from None
    return settings_class(**{field.name: getattr(values, field.name) for field in fields(settings_class)})


def given_configs(arguments: Sequence[str]) -> list[str]:
    """The files that --config names."""
    apart = [word for before, word in pairwise(arguments) if before == "--config"]
    return apart + [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]


def canonical(arguments: Sequence[str]) -> list[str]:
    """Words as the parser knows them: short flags long, hyphens in names underscores, bare switches true."""
    words = []
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
            flag = SHORT_FLAGS.get(flag, flag)
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            if flag in SWITCHES and not equals and following.startswith("--"):
                equals, value = "=", "true"
            word = flag + equals + value
        words.append(word)
    return words


def explain(message: str, keys: Sequence[str], configs: Sequence[str] = ()) -> str:
    """The parser's complaint in one line, with the nearest known key where one is unknown.

    Args:
        configs: the files that were given by --config.
    """
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown:
        if not unknown[1].startswith("--"):
            return f"unexpected word {unknown[1]!r}: every setting has a name, --data PATH for instance"
        name = unknown[1].lstrip("-").partition("=")[0]
        return f"unknown setting {name!r}{nearest(name, keys)}"
    unknown = re.search(r"Group '([^']+)' does not accept (?:nested key|option) '([^']+)'", message)
    if unknown:
        name = f"{unknown[1]}.{unknown[2]}"
        return f"unknown setting {name!r}{nearest(name, keys)}"
    unknown = re.search(r"(?:[Kk]ey|[Oo]ption) '([^']+)' is not (?:expected|accepted|defined)", message)
    if unknown:
        return f"unknown setting {unknown[1]!r}{nearest(unknown[1], keys)}"
    required = re.search(r'Key "([^"]+)" is required|required: (.+)', message)
    if required:
        names = re.split(r"[,\s]+", (required[1] or required[2]).strip())
        flags = ["--data" if name == "data.path" else "--" + name.lstrip("-").replace("_", "-") for name in names if name]
        return f"missing: give {' and '.join(flags)}"
    absent = re.search(r'key "config": File does not exist: (.+)', message)
    if absent:
        return f"{absent[1].strip()} does not exist: --config takes a YAML file of settings"
    broken = re.search(r'Problems parsing config: (.+?)(?: in "<unicode string>"(.*))?$', message, re.S)
    if broken:
        return f"{' or '.join(configs) or '--config'} is no YAML: {' '.join(broken[1].split())}{broken[2] or ''}"
    wrong = re.search(r'key "([^"]+)":.*?(?:[Gg]iven|Got) value(?: type: [^\n]+?\s+Given value)?: (.+)', message, re.S)
    expected = list(dict.fromkeys(re.findall(r"Expected an? (?:<class ')?([\w. \[\], ]+)", message)))
    if wrong and expected:
        kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": ""}
        wanted = " or ".join(filter(None, (kinds.get(kind, kind.strip()) for kind in expected)))
        return f"{wrong[1]} is {' '.join(wrong[2].split())!r}: give {wanted}"
    group = re.search(r'key "([^"]+)": Unable to load config', message)
    if group:
        return f"{group[1]} is a group of settings: give its keys, {group[1]}.path for instance"
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def options(name: str, arguments: Sequence[str], purpose: str, **flags: tuple[type, object, str]):
    """Parse a command of a few flags, each (type, default, help); a default of ... makes it required.

    Raises:
        UsageError: for unknown or missing flags and wrong values.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"simmim {name}", exit_on_error=False, allow_abbrev=False, description=purpose)
    for flag, (kind, default, text) in flags.items():
        required = {"required": True} if default is ... else {"default": default}
        parser.add_argument(f"--{flag}", type=kind, help=text, **required)
    try:
        return parser.parse_args(canonical_plain(arguments))
    except ArgumentError as error:
        raise UsageError(explain(str(error), list(flags))) from None


def canonical_plain(arguments: Sequence[str]) -> list[str]:
    """As `canonical`, for commands without groups."""
    return [word.replace("--data.path", "--data") for word in canonical(arguments)]


def nearest(name: str, known: Sequence[str]) -> str:
    """The tail of a message: the nearest known name."""
    import difflib

    # A key may be a group's (model.mask_ration) or lack its group (mask_ratio).
    endings = {key.rsplit(".", 1)[-1]: key for key in known} | {key: key for key in known}
    close = difflib.get_close_matches(name, endings, n=1, cutoff=0.5)
    if not close:
        close = difflib.get_close_matches(name.rsplit(".", 1)[-1], endings, n=1, cutoff=0.5)
    return f"; did you mean {endings[close[0]]!r}?" if close else f"; known: {', '.join(known)}"
