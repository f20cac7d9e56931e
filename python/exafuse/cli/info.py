"""What is installed, what was built, and which path each op takes here: ``exafuse info``.

Every row is a probe of its own, run under a guard: one that fails prints its error in its row and
the rest go on, so that the report also works on the broken installation it is needed for.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from exafuse.cli.info_probes import LIBRARIES, PROBES, Probe

SCHEMA = 1
PATHS = "path of each op"
REINSTALL = "pip install --force-reinstall --no-cache-dir --no-deps"


def report() -> dict[str, Any]:
    """Run every probe; never raises.

    Returns ``{"schema": 1, section: {row: value}, ..., "problems": [text], "advice": [text]}``. A
    failed probe's value is ``{"error": text}``. ``problems`` are what keeps a fast path off or a
    row unknown.
    """
    result: dict[str, Any] = {"schema": SCHEMA}
    for section, probes in PROBES.items():
        result[section] = {name: _guarded(probe) for name, probe in probes.items()}
    result["problems"] = _guarded_list(lambda: _problems(result))
    result["advice"] = _guarded_list(lambda: _advice(result))
    return result


def render(result: Mapping[str, Any]) -> str:
    """The report as aligned text, one row per value."""
    lines: list[str] = []
    for section in PROBES:
        lines += ["", section] if lines else [section]
        for name, value in result[section].items():
            texts = _path_texts(value) if value is result["ops"].get(PATHS) else _texts(value)
            lines += [
                f"  {name if number == 0 else '':<18} {text}".rstrip()
                for number, text in enumerate(texts)
            ]
    for title in ("problems", "advice"):
        if result[title]:
            lines += ["", title, *(f"  - {text}" for text in result[title])]
    return "\n".join(lines)


def to_json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, default=str)


def _guarded(probe: Probe) -> Any:
    # A report must not fail, and a half-installed library raises anything, SystemExit included.
    try:
        return probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__}


def _guarded_list(probe: Callable[[], list[str]]) -> list[str]:
    value = _guarded(probe)
    return value if isinstance(value, list) else [value["error"]]


def _path_texts(paths: Any) -> list[str]:
    """One text for all ops that take the same path for the same reason."""
    if "error" in paths:
        return _texts(paths)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, taken in paths.items():
        groups.setdefault((taken["path"], taken["reason"]), []).append(name)
    texts = []
    for (path, reason), names in groups.items():
        texts += [f"{path}: {', '.join(names)}", f"  because: {reason}"]
    return texts


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        if set(value) == {"error"}:
            return [f"error: {value['error']}"]
        return [f"{name}: {', '.join(_texts(item))}" for name, item in value.items()] or ["none"]
    if isinstance(value, list | tuple):
        return [", ".join(_texts(item)) for item in value] or ["none"]
    return ["none" if value is None else str(value)]


def _problems(result: Mapping[str, Any]) -> list[str]:
    """Failed probes, missing or old libraries, and what keeps kernels off a GPU that is there."""
    problems = [
        f"{section}, {name}: {value['error']}"
        for section in PROBES
        for name, value in result[section].items()
        if isinstance(value, dict) and set(value) == {"error"}
    ]
    for name in LIBRARIES:
        text = str(result["libraries"][name])
        if text == "not installed" or "too old" in text:
            problems.append(f"{name}: {text}")
    if isinstance(result["gpu"]["devices"], list):
        paths = result["ops"][PATHS]
        if "error" not in paths:
            slow = [name for name, taken in paths.items() if taken["path"] != "cuda"]
            if slow:
                problems.append(f"there is a GPU, but these ops do not use it: {', '.join(slow)}")
        mismatch = [result["gpu"]["CUDA versions"], *_texts(result["gpu"]["code for it"])]
        problems += [
            text
            for text in map(str, mismatch)
            if "update the driver" in text or "no code for" in text
        ]
    return problems


def _rebuild() -> str:
    """How, from the folder with the sources that this installation was made from, if pip noted
    one: no package index has exafuse under this name."""
    try:
        origin = json.loads(distribution("exafuse").read_text("direct_url.json") or "{}")
        folder = Path(url2pathname(urlsplit(str(origin["url"])).path))
        is_folder = "dir_info" in origin and (folder / "pyproject.toml").is_file()
    except (PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        is_folder = False
    if not is_folder:
        return f"with `{REINSTALL} .` in the folder with exafuse's sources"
    editable = "--editable " if origin["dir_info"].get("editable") else ""
    return f"with `{REINSTALL} {editable}{shlex.quote(str(folder))}`"


def _advice(result: Mapping[str, Any]) -> list[str]:
    advice = []
    mode = result["build"]["mode"]
    if isinstance(mode, str) and not mode.startswith("CUDA extension"):
        advice.append(
            "pip keeps wheels that it built: after installing a compiler or the CUDA toolkit,"
            f" rebuild {_rebuild()}"
        )
    if isinstance(mode, dict):
        advice.append(f"the compiled extension does not load: rebuild it {_rebuild()}")
    if isinstance(result["gpu"]["devices"], list) and "CUDA none" in str(
        result["libraries"]["import torch"]
    ):
        advice.append("this torch was built without CUDA: install a CUDA build of torch")
    return advice
