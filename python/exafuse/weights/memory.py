"""Does it fit? Free memory of the machine or the GPU, compared with what is about to be
allocated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from exafuse.errors import DoesNotFitError

_NO_LIMIT = 2**60  # control groups write "max" or a number near 2^63 for "no limit"


def check_fits(num_bytes: int, device: str | torch.device, what: str) -> None:
    """Raise if ``num_bytes`` are more than what is free on ``device``.

    Args:
        num_bytes: what is about to be allocated.
        device: ``cpu`` or a CUDA device; other devices cannot be asked and pass.
        what: names it in the message, as in "the weights".

    Raises:
        DoesNotFitError: with both figures and the ways out.
    """
    device = torch.device(device)
    free = free_bytes(device)
    if free is not None and num_bytes > free:
        raise DoesNotFitError(
            f"{what}: needs {_gib(num_bytes)} on {device}, {_gib(free)} are free. Ways out: "
            "a smaller dtype (dtype='bfloat16' takes half of float32); a device with more memory, "
            "or transformers with device_map='auto', which spreads a model over several; a shorter "
            "context or a smaller batch, if it is the cache that does not fit"
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Torch keeps freed blocks for itself; they are as good as free.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + idle)
    if device.type == "cpu":
        figures = [_available_in_machine(), *_available_in_control_groups(Path("/proc"))]
        return min((figure for figure in figures if figure is not None), default=None)
    return None


def _available_in_machine() -> int | None:
    """What the kernel says can be allocated without swapping."""
    available = _read_fields(Path("/proc/meminfo")).get("MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _available_in_control_groups(proc: Path, mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Limit minus use for each control group this process is in, and for those above it."""
    for line in _read_text(proc / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used, reclaimable = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimable = "total_inactive_file"
        else:
            continue
        # Inside a container the path may name the group as the host sees it; the
        # container then finds
        # its own group at the mount's root, which the walk upwards ends with.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _available_in_group(group, limit, used, reclaimable)


def _available_in_group(group: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    limit_text, used_text = _read_text(group / limit).strip(), _read_text(group / used).strip()
    if limit_text.isdigit() and used_text.isdigit() and int(limit_text) < _NO_LIMIT:
        # Cached file pages count as used, but give way.
        cached = _read_fields(group / "memory.stat").get(reclaimable, 0)
        yield max(0, int(limit_text) - int(used_text) + cached)


def _read_fields(path: Path) -> dict[str, int]:
    """Lines of "name number" as a dict."""
    pairs = (line.split()[:2] for line in _read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read_text(path: Path) -> str:
    """The file's text; empty where the system has no such file or does not show it."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
