"""The extension that holds the backward kernels of a backend; they have no op of their own."""

from __future__ import annotations

from types import ModuleType

from exafuse.ops import front_door
from kernel_backends import Backend


def backward_extension(backend: Backend) -> ModuleType:
    """The functions of csrc/ops_backward.h on this backend's tensors."""
    return front_door.load_emulated() if backend.name == "emulated" else front_door.load_cuda()
