"""The table of subcommands, and the choices that several of them offer.

A subcommand is one function: it gets an argument parser, declares its arguments and returns the
function that runs it. The decorator ``command`` enters it into the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int]
Declare = Callable[[argparse.ArgumentParser], Run]
COMMANDS: dict[str, tuple[str, Declare]] = {}

DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTISATIONS = ("int8", "int4", "fp8")
BACKENDS = ("auto", "cuda", "emulated", "reference")


def command(name: str, help_text: str) -> Callable[[Declare], Declare]:
    """Enter a subcommand: ``help_text`` is its line in ``exafuse --help``."""

    def enter(declare: Declare) -> Declare:
        COMMANDS[name] = (help_text, declare)
        return declare

    return enter
