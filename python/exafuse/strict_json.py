"""JSON from outside, read strictly: one meaning per file or an error that names it.

Python's ``json`` accepts what the standard forbids (NaN, a repeated key silently replaced by the
last one) and can be driven into unbounded nesting. A checkpoint's files are read here instead.
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
    """``repr`` for an error message: at most a line, printable whatever the value holds."""
    try:
        text = _short.repr(value)
    except ValueError:  # an int too long for Python to print
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "..."
    return text


def read_json(
    path: Path, what: str, limit_bytes: int, error: type[ExafuseError] = ConfigError
) -> Any:
    """The value in the JSON file ``path``, as strict as ``parse_json``.

    Refused, with an ``error`` that names the file: no such file, not a regular file (a FIFO does
    not block), more than ``limit_bytes``. ``what`` says in the message what the file is for.
    """
    return parse_json(
        _read_regular_file(path, what, limit_bytes, error), f"{_printable(path)}: {what}", error
    )


def parse_json(data: bytes | bytearray, what: str, error: type[ExafuseError] = ConfigError) -> Any:
    """The value that ``data`` holds as JSON.

    Refused, with an ``error`` that begins with ``what``: a byte-order mark, not UTF-8, a key that
    occurs twice in one object, NaN and Infinity literals, numbers beyond the range of a float,
    integers of thousands of digits, nesting deeper than the parser's stack, text after the value.
    """

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise error(f"{what}: expected each key once, got {shorten(key)} twice")
                seen.add(key)
        return result

    def finite(literal: str) -> float:
        value = float(literal)
        if not math.isfinite(value):
            raise error(f"{what}: expected finite numbers, got {shorten(literal)}")
        return value

    def no_constant(literal: str) -> Any:
        raise error(f"{what}: expected JSON, got {literal}, which JSON does not have")

    if data.startswith(_UTF8_BOM):
        raise error(f"{what}: expected plain UTF-8, got a byte-order mark before it; remove it")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise error(f"{what}: expected UTF-8, got {exc.reason} at byte {exc.start}") from None
    try:
        return json.loads(
            text, object_pairs_hook=unique_keys, parse_float=finite, parse_constant=no_constant
        )
    except RecursionError:
        raise error(f"{what}: expected a flat document, got nesting too deep to parse") from None
    except json.JSONDecodeError as exc:
        where = f"line {exc.lineno} column {exc.colno}"
        raise error(f"{what}: expected JSON, got something else at {where} ({exc.msg})") from None
    except ExafuseError:  # from the hooks above; itself a ValueError
        raise
    except ValueError:  # Python's limit on the digits of one integer
        raise error(f"{what}: expected ordinary numbers, got thousands of digits") from None


def _read_regular_file(path: Path, what: str, limit_bytes: int, error: type[ExafuseError]) -> bytes:
    name = _printable(path)
    try:
        # O_NONBLOCK: opening a FIFO must return, so that the check below can refuse it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:  # ValueError: a NUL byte in the path
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise error(f"{name}: {what}: cannot open the file ({reason})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{name}: {what}: expected a regular file, got a folder, pipe or device")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit_bytes + 1) if status.st_size <= limit_bytes else b""
    finally:
        os.close(descriptor)
    size = max(status.st_size, len(data))
    if size > limit_bytes:
        raise error(f"{name}: {what}: expected at most {limit_bytes:,} bytes, got {size:,}")
    return data


def _printable(path: Path) -> str:
    """The path for a message: a NUL byte or a lone surrogate in it must not break the printing."""
    text = str(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) < 1000 else f"{text[:200]}...{text[-200:]}"
