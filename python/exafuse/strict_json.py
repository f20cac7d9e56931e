"""JSON from outside, read strictly: one meaning per file or an error that names it.

Python's ``json`` accepts what the standard forbids (NaN, a repeated key silently replaced by the last
one) and can be driven into unbounded nesting. A checkpoint's files are read here instead.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from reprlib import Repr
from typing import Any

from exafuse.errors import ConfigError, ExafuseError

_UTF8_BOM = b"\xef\xbb\xbf"

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlist = _short.maxtuple = _short.maxdict = 4
_short.maxlevel = 2


def shorten(value: object) -> str:
    """``repr`` for an error message: never longer than a line, printable whatever the value holds."""
    try:
        text = _short.repr(value)
    except ValueError:  # an int too long for Python to print
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "..."
    return text


def read_json(
    path: Path, what: str, limit_bytes: int, error: type[ExafuseError] = ConfigError
) -> Any:
    """The value in the JSON file ``path``.

    Refused, with an ``error`` that names the file: no such file, not a regular file (a FIFO does not
    block), more than ``limit_bytes``, a byte-order mark, not UTF-8, a key that occurs twice in one
    object, NaN and Infinity literals, numbers beyond the range of a float, nesting deeper than the
    parser's stack, anything after the value. ``what`` says in the message what the file is for.
    """
    data = _read_regular_file(path, what, limit_bytes, error)

    def fail(reason: str) -> ExafuseError:
        return error(f"{path}: {what}: {reason}")

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise fail(f"the key {shorten(key)} occurs twice in one object; remove one")
                seen.add(key)
        return result

    def finite(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise fail(f"expected finite numbers, got {shorten(literal)}")
        return value

    def no_constant(literal: str) -> Any:
        raise fail(f"expected JSON, got the literal {literal}, which JSON does not have")

    if data.startswith(_UTF8_BOM):
        raise fail("expected plain UTF-8, got a byte-order mark; save the file without it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise fail(f"expected UTF-8, got byte {exc.start} that is not ({exc.reason})") from None
    try:
        return json.loads(
            text, object_pairs_hook=unique_keys, parse_float=finite, parse_constant=no_constant
        )
    except RecursionError:
        raise fail("expected a flat document, got nesting too deep to parse") from None
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise fail(f"expected JSON, got text that is not at {where} ({exc.msg})") from None
    except ExafuseError:
        raise
    except ValueError:  # Python's limit on the digits of one integer
        raise fail("expected numbers of ordinary length, got thousands of digits") from None


def _read_regular_file(path: Path, what: str, limit_bytes: int, error: type[ExafuseError]) -> bytes:
    try:
        # O_NONBLOCK: opening a FIFO must return, so that the check below can refuse it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the path
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise error(f"{shorten_path(path)}: {what}: cannot open the file ({reason})") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: {what}: expected a regular file, got a folder, pipe or device")
        data = file.read(limit_bytes + 1) if status.st_size <= limit_bytes else b""
    size = max(status.st_size, len(data))
    if size > limit_bytes:
        raise error(
            f"{path}: {what}: expected at most {limit_bytes:,} bytes, got {size:,}; "
            "this is not such a file"
        )
    return data


def shorten_path(path: Path) -> str:
    """The path, printable: a NUL byte or a lone surrogate in it must not break the message."""
    return str(path).encode("unicode_escape").decode("ascii") if "\0" in str(path) else str(path)
