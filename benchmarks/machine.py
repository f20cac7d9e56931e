"""What figures depend on besides the kernels: the device, its driver and clocks, the source."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from .timing import clocks, nvidia_smi


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: the device, driver, clocks, versions."""
    machine: dict[str, Any] = {
        "device": device.type,
        "name": platform.processor() or platform.machine(),
        "driver": "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "clocks_before": clocks(device),
    }
    software = f"torch {torch.__version__}, {machine['threads']} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["name"] = properties.name
        machine["driver"] = ", ".join(nvidia_smi(device, ["driver_version"])) or "unknown"
        machine["l2_bytes"] = getattr(properties, "L2_cache_size", 0)
        machine["multiprocessors"] = properties.multi_processor_count
        machine["power_limit"] = ", ".join(nvidia_smi(device, ["power.limit"])) or "unknown"
        software = f"driver {machine['driver']}, torch {torch.__version__}, CUDA {machine['cuda']}"
    else:
        machine["name"] = _cpu_name() or machine["name"]
    return machine | {"software": software}


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def slug(name: str) -> str:
    """The folder of a GPU: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of the checkout that this file is in, "-changed" if sources differ; else ""."""
    folder = Path(__file__).resolve().parent
    root = folder.parent
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout
            for words in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "csrc", "python"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("-changed" if changed.strip() else "")
