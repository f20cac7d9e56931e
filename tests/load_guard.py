"""A watch over code that reads files from a stranger: what it opens, runs, takes and how long."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ALLOWED_BYTES = 64 * 2**20
_FORBIDDEN = (
    "compile",
    "ctypes.dlopen",
    "exec",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
_watching: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and (event == "open" or event in _FORBIDDEN):
        _watching.append((event, arguments[0] if arguments else None))


# A hook stays for the life of the process; it listens only inside ``guarded``.
sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(folder: Path, seconds: float = 2.0, blocked_after: float = 20.0) -> Iterator[list[str]]:
    """Fail if the body runs code, opens a file elsewhere, takes too long or too much memory.

    Yields a list that afterwards holds the path of every file that was opened.
    The limit for memory is the size of the folder's files + 64 MiB. Time is the processor's, so
    that a busy machine changes nothing; a body that blocks is interrupted after ``blocked_after``.
    """
    global _watching
    file_bytes = sum(path.lstat().st_size for path in folder.iterdir())
    before = reset_peak_rss()
    tracemalloc.start()
    handler = signal.signal(signal.SIGALRM, _too_slow)
    timer = signal.setitimer(signal.ITIMER_REAL, blocked_after)
    start = time.process_time()
    _watching = []
    opened: list[str] = []
    try:
        yield opened
    finally:
        events, _watching = _watching, None
        elapsed = time.process_time() - start
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    resident = peak_rss() - before
    assert elapsed < seconds, f"took {elapsed:.2f} s"
    for what, used in (("traced", traced), ("resident", resident)):
        assert used <= file_bytes + ALLOWED_BYTES, f"{what} memory grew by {used / 2**20:.0f} MiB"
    for event, argument in events:
        assert event not in _FORBIDDEN, f"{event}: {argument!r}"
        if event == "open" and not isinstance(argument, int):
            path = os.fsdecode(argument)
            inside = os.path.dirname(path) == str(folder.resolve())
            opened.append(path)
            assert inside or path.startswith(("/proc/", "/sys/")), f"opened {path}"


def _too_slow(signum: int, frame: object) -> None:
    raise TimeoutError("the reader blocks")


def reset_peak_rss() -> int:
    """Set the kernel's mark of peak resident memory to the present and return it, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_rss()


def peak_rss() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
