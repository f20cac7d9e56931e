"""A pytest plugin that makes torchvision importable beside a CPU build of torch.

torchvision as package registries carry it expects a CUDA build of torch: its compiled operators do
not load here, and importing it fails because their schemas are missing. Its Python part, all that
the processors use, works once the schemas exist. Installed apart from everything else, in
``torchvision-only`` of the environment, because where it can be found transformers tries to import
it.

    python -m pytest -p torchvision_shim tests/torchvision_parity.py
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "torchvision-only"


def find() -> Path | None:
    """Where torchvision is installed, in the environment itself or apart; None if nowhere."""
    spec = importlib.util.find_spec("torchvision")
    places = list(spec.submodule_search_locations or []) if spec else []
    places += [str(FOLDER / "torchvision")] if (FOLDER / "torchvision").is_dir() else []
    return Path(places[0]) if places else None


def load() -> None:
    """Import torchvision, its operators declared first if its compiled part does not load."""
    place = find()
    if place is None:
        raise ImportError(f"torchvision is neither installed nor in {FOLDER}")
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    importlib.invalidate_caches()
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        source = (place / "_meta_registrations.py").read_text()
        registered = r'register_(?:meta\("|fake\("torchvision::)(\w+)"\)'
        library = torch.library.Library("torchvision", "DEF")
        for operator in re.findall(registered, source):
            library.define(f"{operator}(Tensor x) -> Tensor")
        KEPT.append(library)  # the schemas go with it
        import torchvision  # noqa: F401


KEPT: list[torch.library.Library] = []


def pytest_configure() -> None:
    load()
