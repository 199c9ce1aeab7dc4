"""The words after `simmim COMMAND`, read into a dataclass of settings.

Every field of the dataclass is a flag and a YAML key; nested dataclasses give dotted keys. jsonargparse converts the values
and prints help and configuration. Names are checked before it sees them, so that an unknown one is refused with the nearest
known one, and none of its messages has to be understood.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from simmim.renamed_settings import current_name, with_current_names


class UsageError(ValueError):
    """The user's words cannot work. The message says why, and what would."""


# A flag of its own for a setting that every run needs.
SHORT_FLAGS = {"data": "data.path", "unlabeled": "data.unlabeled"}
# Words that are no settings.
CONFIG, HELP, PRINT_CONFIG = "config", "help", "print_config"


# --- words -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A flag with its value, or a word without a flag.

    Attributes:
        key: the flag's name, hyphens as underscores; empty for a word without a flag.
        value: the text after it; None for a bare flag.
    """

    key: str
    value: str | None


def split_words(words: Sequence[str]) -> list[Word]:
    """Pair flags with their values: `--key value`, `--key=value` or `--key` alone. A value does not begin with `--`."""
    split, position = [], 0
    while position < len(words):
        word = words[position]
        position += 1
        if word == "-h":
            split.append(Word(HELP, None))
        elif not word.startswith("--"):
            split.append(Word("", word))
        else:
            name, equals, value = word[2:].partition("=")
            if not equals and position < len(words) and not words[position].startswith("--"):
                equals, value = "=", words[position]
                position += 1
            split.append(Word(name.replace("-", "_"), value if equals else None))
    return split


def values_of(words: Sequence[str], key: str) -> list[str]:
    """What `words` give for one flag, in their order; "true" where it is bare."""
    return ["true" if word.value is None else word.value for word in split_words(words) if word.key == key]


# --- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schema:
    """The settings of a dataclass.

    Attributes:
        hints: type of each setting, by dotted key.
        groups: keys of nested dataclasses.
        required: settings without a default.
        absent: why there is no such setting, of settings that one may expect; from the dataclasses' `absent`.
    """

    hints: dict[str, Any]
    groups: tuple[str, ...]
    required: tuple[str, ...]
    absent: dict[str, str]

    @classmethod
    def of(cls, settings_class: type, prefix: str = "") -> Schema:
        """The settings of `settings_class` and of the dataclasses inside it."""
        hints: dict[str, Any] = {}
        groups: list[str] = []
        required: list[str] = []
        absent = {prefix + name: reason for name, reason in getattr(settings_class, "absent", {}).items()}
        types_of_fields = typing.get_type_hints(settings_class)
        for field in fields(settings_class):
            key, hint = prefix + field.name, types_of_fields[field.name]
            if isinstance(hint, type) and is_dataclass(hint):
                inner = cls.of(hint, key + ".")
                hints |= inner.hints
                groups += [key, *inner.groups]
                absent |= inner.absent
                inner_required = inner.required
            else:
                hints[key] = hint
                inner_required = (key,)
            if field.default is MISSING and field.default_factory is MISSING:
                required += inner_required
        return cls(hints, tuple(groups), tuple(required), absent)

    def unknown(self, key: str) -> UsageError:
        """The error for a key that is no setting: why not, or the nearest known one."""
        if key in self.absent:
            return UsageError(f"{key} is no setting here: {self.absent[key]}")
        return UsageError(f"unknown setting {key!r}{nearest(key, list(self.hints))}")

    def accepts_any_key(self, key: str) -> bool:
        """Whether `key` is inside a setting that is a mapping of free keys, such as `trainer`."""
        return any(key.startswith(f"{name}.") and typing.get_origin(hint) is dict for name, hint in self.hints.items())

    def current_key(self, key: str) -> str:
        """The setting's name today: short flags are written out and renamed settings are found.

        Raises:
            UsageError: for an unknown setting, naming the nearest known one.
        """
        if key not in self.hints and SHORT_FLAGS.get(key) in self.hints:
            key = SHORT_FLAGS[key]
        if current_name(key) != key and current_name(key) in self.hints:
            note_on_renamed(key)
            key = current_name(key)
        if key not in self.hints and key not in self.groups and not self.accepts_any_key(key):
            raise self.unknown(key)
        return key

    def leaves(self, values: Mapping, prefix: str = "") -> dict[str, Any]:
        """Nested values by dotted key.

        Raises:
            UsageError: for an unknown key, and for a group that is no mapping.
        """
        leaves: dict[str, Any] = {}
        for name, value in values.items():
            key = f"{prefix}{name}"
            if key in self.hints:
                leaves[key] = value
            elif key not in self.groups:
                raise self.unknown(key)
            elif isinstance(value, Mapping):
                leaves |= self.leaves(value, f"{key}.")
            else:
                first = next(name for name in self.hints if name.startswith(f"{key}."))
                raise UsageError(f"{key} is a group of settings: give its keys, {first} for instance")
        return leaves


def note_on_renamed(key: str) -> None:
    """Tell the user that a setting has a new name."""
    print(f"note: {key} is now {current_name(key)}", file=sys.stderr)


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all where none is near."""
    import difflib

    # A key may have a misspelled end (model.mask_ration) or lack its group (mask_ratio).
    endings = {key.rsplit(".", 1)[-1]: key for key in known} | {key: key for key in known}
    for text in (name, name.rsplit(".", 1)[-1]):
        close = difflib.get_close_matches(text, endings, n=1, cutoff=0.5)
        if close:
            return f"; did you mean {endings[close[0]]!r}?"
    return f"; known: {', '.join(known)}"


# --- parsing -----------------------------------------------------------------------------------------------------------


def parse(
    name: str,
    settings_class: type,
    words: Sequence[str],
    *,
    result_class: type | None = None,
    usage: str | None = None,
    positional: str | None = None,
    config: bool = False,
    purpose: str | None = None,
    helps: Mapping[str, str] | None = None,
) -> Any:
    """The words after `simmim NAME` as a `settings_class`. Prints and exits for --help and --print_config.

    Args:
        result_class: what to build from the values, where it is another class with the same fields.
        usage: first line of the help; by default it lists all flags.
        purpose: second line of the help; by default the first line of the dataclass's docstring.
        positional: the setting that a word without a flag sets.
        config: whether there are --config FILE, which gives many settings at once, and --print_config. Later words win.
        helps: help of settings whose docstring cannot say it.

    Raises:
        UsageError: for an unknown or missing setting, naming it, and for a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    purpose = purpose or settings_class.__doc__.splitlines()[0]
    parser = make_parser(name, settings_class, usage, purpose, config, helps or {})
    schema = Schema.of(settings_class)
    split = split_words(words)
    if any(word.key == HELP for word in split):
        parser.print_help()
        raise SystemExit(0)
    arguments, assigned = resolve_words(with_values(split, schema, positional), schema, config)
    missing = [key for key in schema.required if key not in dict(assigned)]
    if missing and not any(word.key == PRINT_CONFIG for word in split):
        raise UsageError(f"missing: give {' and '.join(flag_of(key) for key in sorted(missing))}")
    try:
        values = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UsageError(wrong_value(assigned, schema) or " ".join(str(error).split())) from None
    return (result_class or settings_class)(**{field.name: getattr(values, field.name) for field in fields(settings_class)})


def resolve_words(words: Sequence[tuple[str, str]], schema: Schema, config: bool) -> tuple[list[str], list[tuple[str, Any]]]:
    """Words under the names of known settings.

    Args:
        words: flag and value of each.

    Returns:
        The words as jsonargparse reads them, and the settings that they assign: text of flags, values of YAML.

    Raises:
        UsageError: for unknown settings, and for files that hold none.
    """
    arguments: list[str] = []
    assigned: list[tuple[str, Any]] = []
    for word_key, text in words:
        if config and word_key == CONFIG:
            values, renamed = with_current_names(read_config(text), schema.hints)
            for old_name in renamed:
                note_on_renamed(old_name)
            assigned += schema.leaves(values).items()
            arguments.append(f"--config={json.dumps(values, default=str)}")
        elif config and word_key == PRINT_CONFIG:
            arguments.append("--print_config" + (f"={text}" if text else ""))
        else:
            key = schema.current_key(word_key)
            if key in schema.groups:
                value = group_value(text)
                assigned += schema.leaves(nested(key, value)).items()
                arguments.append(f"--{key}={json.dumps(value, default=str)}")
            else:
                assigned.append((key, text))
                arguments.append(f"--{key}={text}")
    return arguments, assigned


def make_parser(
    name: str, settings_class: type, usage: str | None, purpose: str, config: bool, helps: Mapping[str, str]
) -> Any:
    """jsonargparse's parser of a dataclass, whose docstrings are the help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"simmim {name}",
        exit_on_error=False,
        allow_abbrev=False,
        usage=usage,
        description=purpose,
        epilog="Hyphens and underscores are alike: --batch-size 64." if not config else CONFIG_EPILOG,
    )
    if config:
        parser.add_argument("--config", action="config", help="YAML file of settings, a recipe of configs/ for instance.")
    parser.add_class_arguments(settings_class, None)
    for action in parser._actions:
        if action.option_strings == ["--data"] and config:
            action.metavar, action.help = "PATH", "short for --data.path."
        action.help = helps.get(action.dest, action.help)
    return parser


CONFIG_EPILOG = "--data PATH is --data.path PATH; hyphens and underscores are alike: --image-size 192."


def with_values(words: Sequence[Word], schema: Schema, positional: str | None) -> list[tuple[str, str]]:
    """Flag and value of each word. Bare switches are true; a word without a flag sets the setting `positional`.

    Raises:
        UsageError: for a word that belongs to no flag, and for a flag without its value.
    """
    pairs = []
    for word in words:
        is_switch = schema.hints.get(word.key) is bool
        if not word.key:
            text = word.value or ""
            if positional is None or text.startswith("-"):
                raise UsageError(f"unexpected word {text!r}: every setting has a name, {example(schema)} for instance")
            pairs.append((positional, text))
        elif is_switch and word.value is None:
            pairs.append((word.key, "true"))
        elif is_switch and positional and word.value not in ("true", "false", None):
            pairs += [(word.key, "true"), (positional, word.value)]
        elif word.value is None and word.key != PRINT_CONFIG:
            if word.key != CONFIG:
                schema.current_key(word.key)  # an unknown setting is reported as such
            raise UsageError(f"{word.key} has no value: give --{word.key.replace('_', '-')} VALUE")
        else:
            pairs.append((word.key, word.value or ""))
    return pairs


def example(schema: Schema) -> str:
    """A setting to name in a message: the first that is required, else the first."""
    return f"{flag_of(next(iter((*schema.required, *schema.hints))))} VALUE"


def flag_of(key: str) -> str:
    """The flag by which a setting is given."""
    short = next((short for short, key_of_short in SHORT_FLAGS.items() if key_of_short == key), key)
    return "--" + short.replace("_", "-")


def read_config(path: str | None) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        UsageError: when there is no such file or it holds no settings.
    """
    import yaml
    from jsonargparse import get_loader

    file = Path(path or "").expanduser()
    if not file.is_file():
        raise UsageError(f"{path!r} does not exist: --config takes a YAML file of settings")
    try:
        values = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(text for text in (error.context, error.problem) if text)
        raise UsageError(f"{path} is not valid YAML: {problem}{where}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no settings: --config takes a YAML file of keys and values")
    return values


def group_value(text: str) -> Any:
    """The value of a flag that gives a group of settings: a YAML file, or a mapping such as {lr: 1e-3}."""
    import yaml
    from jsonargparse import get_loader

    if Path(text).expanduser().is_file():
        return read_config(text)
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text


def nested(key: str, value: Any) -> dict[str, Any]:
    """A value under a dotted key as nested mappings."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# --- values of the wrong type --------------------------------------------------------------------------------------------


def wrong_value(assigned: Sequence[tuple[str, Any]], schema: Schema) -> str:
    """A message about the first setting whose value is not of its type; empty where there is none."""
    for key, value in assigned:
        if key in schema.hints and not is_of_type(value, schema.hints[key]):
            return f"{key} is {value!r}: give {describe_type(schema.hints[key])}"
    return ""


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether jsonargparse can read `value`, text of a flag or a value of YAML, as a `hint`."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


NAMES_OF_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}


def describe_type(hint: Any) -> str:
    """What to give for a setting of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(one) for one in inner if one is not types.NoneType)
    if origin in (tuple, list):
        elements = [one for one in inner if one is not Ellipsis]
        listed = "…" if origin is list or Ellipsis in inner else ", ".join(describe_type(one) for one in elements)
        return f"a list, [{listed}]" if listed != "…" else f"a list, each {describe_type(elements[0])}: [A, B]"
    return NAMES_OF_TYPES.get(origin or hint, str(hint))
