"""Runs honesty cases: ``run_honesty.py [--schedule S] NAME...``; one line of outcome each."""

import sys
from pathlib import Path

import _honesty

from emulator.control import Emulator


def main() -> None:
    arguments = sys.argv[1:]
    emulator = Emulator(Path(_honesty.__file__))
    emulator.set("gpu", "sm_90")
    if arguments[:1] == ["--schedule"]:
        emulator.set("schedule", arguments[1])
        arguments = arguments[2:]
    for name in arguments:
        try:
            _honesty.run(name)
            print(f"{name}: passed", flush=True)
        except (RuntimeError, AssertionError) as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
