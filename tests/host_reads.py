"""Counts what makes the host wait for a device, so that tests can demand that nothing does."""

from __future__ import annotations

from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
from exafuse.ops import front_door
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = [
    "__bool__",
    "__contains__",
    "__float__",
    "__index__",
    "__int__",
    "cpu",
    "item",
    "nonzero",
    "numpy",
    "tolist",
]
WAITING_OPS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique_dim",
}


class HostReads(TorchDispatchMode):
    """``counts`` by Python method and by ATen op, for what runs inside ``with``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.paused = False
        # A model that nobody looks at calls the kernels directly: so does this one.
        monkeypatch.setattr(front_door, "_watchers", lambda: 0)
        for name in READS:
            monkeypatch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))

    def _counting(self, name: str, original):
        def read(tensor: Tensor, *args, **kwargs):
            self.counts[name] += not self.paused
            return original(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING_OPS and not self.paused:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def not_counting(self, module: ModuleType) -> SimpleNamespace:
        """The functions of ``module``; what they read is not counted."""

        def wrapped(function):
            def call(*args, **kwargs):
                self.paused = True
                try:
                    return function(*args, **kwargs)
                finally:
                    self.paused = False

            return call

        functions = {k: wrapped(v) for k, v in vars(module).items() if callable(v)}
        return SimpleNamespace(**functions)
