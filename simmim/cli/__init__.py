"""The command `simmim`. It imports everything lazily and is imported by nobody."""

from simmim.cli.main import main

__all__ = ["main"]
