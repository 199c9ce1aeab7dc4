"""Settings with a new name. The old name is still understood: as a flag, in YAML, and in the folder of an earlier run."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

# Old name to new name, as dotted keys.
RENAMED_SETTINGS = {"data.colour_jitter": "data.color_jitter"}


def current_name(key: str) -> str:
    """The name that a setting has today."""
    return RENAMED_SETTINGS.get(key, key)


def with_current_names(values: Mapping[str, Any], known: Container[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Settings as nested mappings, with old names replaced.

    Args:
        known: the settings that there are, as dotted keys; a setting whose new name is not among them stays as it is.

    Returns:
        The settings, and the old names that were found, as dotted keys.

    Raises:
        ValueError: when a setting stands under its old name and under its new one.
    """
    renamed, old_names = dict(values), []
    for old, new in RENAMED_SETTINGS.items():
        group, old_leaf = old.split(".")
        inside = renamed.get(group)
        if not isinstance(inside, Mapping) or old_leaf not in inside or (known is not None and new not in known):
            continue
        new_leaf = new.split(".")[1]
        if new_leaf in inside:
            raise ValueError(f"{old} is the old name of {new}, and both are given: give {new} alone")
        # In the same place, so that a printed configuration keeps its order.
        renamed[group] = {new_leaf if leaf == old_leaf else leaf: value for leaf, value in inside.items()}
        old_names.append(old)
    return renamed, old_names
