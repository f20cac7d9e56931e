"""The ops as functions: kernels where they can run, :mod:`exafuse.reference` everywhere else.

Same names and signatures as :mod:`exafuse.reference`, which is also the definition of each op.
``EXAFUSE_BACKEND`` = auto, cuda, reference or emulated, read at import, chooses the path of all ops
at once (see :mod:`exafuse.ops.front_door`); :func:`for_path` gives the same functions with a path
of their own.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import torch

from exafuse.errors import BackendError
from exafuse.ops.attention import AttentionOps
from exafuse.ops.front_door import (
    BACKENDS,
    GRADIENTS,
    KERNELS,
    backend_from_environment,
    cuda_problem,
    emulator_problem,
)
from exafuse.ops.qk_norm_rope import RopeOps
from exafuse.ops.rms_norm import NormOps
from exafuse.ops.silu_and_mul import ActivationOps

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "qk_norm_rope",
    "qk_norm_rope_cache",
    "rms_norm",
    "rms_norm_add",
    "silu_and_mul",
    "vision_attn",
]


class Ops(NormOps, RopeOps, ActivationOps, AttentionOps):
    """Every op on one backend, as methods."""


_default = Ops(backend_from_environment())
path = _default.path

add_rms_norm = _default.add_rms_norm
apply_rope = _default.apply_rope
flash_attn_func = _default.flash_attn_func
flash_attn_varlen_func = _default.flash_attn_varlen_func
flash_attn_with_kvcache = _default.flash_attn_with_kvcache
qk_norm_rope = _default.qk_norm_rope
qk_norm_rope_cache = _default.qk_norm_rope_cache
rms_norm = _default.rms_norm
rms_norm_add = _default.rms_norm_add
silu_and_mul = _default.silu_and_mul
vision_attn = _default.vision_attn

# Gradients, for exafuse.ops.registered alone: they belong to no API.
add_rms_norm_backward = _default.add_rms_norm_backward
qk_norm_rope_backward = _default.qk_norm_rope_backward
rms_norm_backward = _default.rms_norm_backward
silu_and_mul_backward = _default.silu_and_mul_backward


@functools.cache
def for_path(backend: str) -> ModuleType:
    """The same functions on a backend of the caller's choice, whatever EXAFUSE_BACKEND says.

    Args:
        backend: "auto" (this module itself), "cuda", "reference" or "emulated".

    Returns:
        A module with the functions of ``__all__`` and its backend's name as ``path``.

    Raises:
        BackendError: the backend is unknown or cannot run here; the message says why.
    """
    if backend == "auto":
        return sys.modules[__name__]
    ops = Ops(backend)
    problem = {"cuda": cuda_problem, "emulated": emulator_problem}.get(backend, str)()
    if problem:
        raise BackendError(
            f"backend {backend!r} cannot run here: {problem} (`exafuse info` says more)"
        )
    module = ModuleType(f"{__name__}.for_path({backend!r})", __doc__)
    for name in (*__all__, *GRADIENTS):
        setattr(module, name, getattr(ops, name))
    module.path = backend  # type: ignore[attr-defined]
    return module


def path_for(device: torch.device) -> str:
    """ "cuda", "emulated" or "reference": what ops with a kernel take on tensors of ``device``."""
    return _default.path_for(device)[0]


def paths() -> dict[str, tuple[str, str]]:
    """For each op ``(path, reason)`` on this machine's default device; never raises."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    taken = _default.path_for(device)
    if device.type == "cpu" and taken[0] == "reference" and path in ("auto", "cuda"):
        taken = ("reference", cuda_problem())
    return dict.fromkeys(__all__, taken)


assert set(__all__) == set(KERNELS)
assert path in BACKENDS
