"""The ``exafuse`` command."""

from exafuse.cli.commands import main

__all__ = ["main"]
