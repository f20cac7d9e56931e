"""Files that a caller names: what is no readable file is refused in words that help."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exafuse.errors import ExafuseError, MediaError
from exafuse.strict_json import shorten

_URL_RE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|.{200,})|data:|www\.", re.DOTALL)


def regular_file(source: str | os.PathLike[str], where: str) -> Path:
    """``source`` as the path of a regular file.

    Raises ``ValueError`` for a URL, ``MediaError`` for what is no file. Nothing is opened.
    """
    text = os.fspath(source)
    if isinstance(source, str) and _URL_RE.match(source):
        what = "decode it" if source.startswith("data:") else "download it"
        raise ValueError(f"{where}: expected a file, got the URL {shorten(source)}; {what} first")
    try:
        path = Path(text).expanduser()
        if path.is_file():  # False for a folder, a FIFO, a device, a dead link
            return path
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL byte, a name too long, no home
        raise MediaError(f"{where}: {shorten(text)} is no path of a file: {error}") from None
    if exists:
        raise MediaError(f"{where}: expected a regular file, got a folder or a device: {text}")
    raise MediaError(f"{where}: no such file: {shorten(text)}")


@contextmanager
def media_errors(what: str) -> Iterator[None]:
    """Turns whatever a decoder raises inside into a ``MediaError`` that starts with ``what``.

    Decoders meet damaged data in any line of theirs: the kinds of exceptions have no end.
    """
    try:
        yield
    except ExafuseError:
        raise
    except Exception as error:
        # FFmpeg calls it so as well when a damaged file asks for too much.
        if isinstance(error, MemoryError) and not type(error).__module__.startswith("av."):
            raise
        reason = " ".join(str(error).split())[:300] or "no further word"
        raise MediaError(f"{what}: {type(error).__name__}: {reason}") from error
