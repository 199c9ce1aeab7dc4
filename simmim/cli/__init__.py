"""The command `simmim`. It imports everything lazily, and no other package imports it."""

from simmim.cli.main import main

__all__ = ["main"]
