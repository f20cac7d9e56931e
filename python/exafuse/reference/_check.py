"""Argument checks shared by the reference ops; every message is generated from the check
itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_TOKENS = 2**30  # positions and lengths of the kernels, so that sums of two fit 32 bits


class Shapes:
    """Symbolic dimensions of one call: the first use of a name binds it, later uses must agree."""

    def __init__(self, **known: int) -> None:
        self.known = dict(known)

    def match(self, name: str, tensor: Tensor, *dims: str | int) -> None:
        """Raise ValueError unless ``tensor`` has the shape ``dims``; ``"..."`` first means any
        leading."""
        check_tensor(name, tensor)
        shape = tuple(tensor.shape)  # a torch.Size is slower to walk
        pattern = dims
        if pattern[0] == "...":
            pattern = dims[1:]
            shape = shape[-len(pattern) :]
        ok = len(shape) == len(pattern)
        if ok:
            known = self.known
            for size, dim in zip(shape, pattern, strict=True):
                if size != (known.setdefault(dim, size) if isinstance(dim, str) else dim):
                    ok = False
        if not ok:
            raise ValueError(self._message(name, dims, tensor))

    def _message(self, name: str, dims: tuple[str | int, ...], tensor: Tensor) -> str:
        known = self.known
        words = [f"{d}={known[d]}" if isinstance(d, str) and d in known else str(d) for d in dims]
        return f"{name}: expected ({', '.join(words)}), got {tuple(tensor.shape)}"


def check_tensor(name: str, tensor: object) -> None:
    """Raise TypeError unless ``tensor`` is one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")


def check_float(name: str, tensor: Tensor, *also: torch.dtype) -> None:
    """Raise unless ``tensor`` is a bf16, fp16 or fp32 tensor (of one of ``also``, if given)."""
    check_tensor(name, tensor)
    allowed = also or FLOAT_DTYPES
    if tensor.dtype not in allowed:
        words = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(allowed))
        raise ValueError(
            f"{name}: expected dtype {words}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def check_tables(device: torch.device, **tables: Tensor | None) -> None:
    """Raise unless every table of numbers that is given is an int32 tensor on ``device``."""
    for name, table in tables.items():
        if table is not None:
            check_float(name, table, torch.int32)
            check_device(device, **{name: table})


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise unless every tensor that is given lives on ``device``."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.device != device:
            raise ValueError(f"{name}: expected {device}, got {tensor.device}")


def check_count(name: str, value: Any, low: int = 0, high: int = MAX_TOKENS) -> int:
    """``value`` itself; raises unless it is an int from ``low`` to ``high``."""
    if not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected from {low} to {high}, got {value}")
    return cast(int, value)


def check_eps(eps: object) -> None:
    """Raise unless ``eps`` is a finite number >= 0."""
    if not isinstance(eps, (float, int)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale of the scores, ``head_dim ** -0.5`` by default."""
    if softmax_scale is None:
        if head_dim < 1:
            raise ValueError(f"head_dim: expected at least 1, got {head_dim}")
        return float(head_dim**-0.5)
    if not isinstance(softmax_scale, (float, int)):
        raise TypeError(f"softmax_scale: expected a number, got {type(softmax_scale).__name__}")
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: expected a finite number > 0, got {softmax_scale}")
    return float(softmax_scale)


def check_window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    """The bounds of a window, ``causal`` folded in; bounds that no key can lie beyond are open."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(f"window_size: expected (left, right), got {window_size!r}") from None
    if not (isinstance(left, int) and isinstance(right, int)):
        raise TypeError(f"window_size: expected two ints, got {window_size!r}")
    if left < -1 or right < -1:
        raise ValueError(f"window_size: expected bounds >= -1 (-1 = open), got {window_size}")
    if causal:
        right = 0
    return (-1 if left > MAX_TOKENS else left), (-1 if right > MAX_TOKENS else right)


def refuse(**unsupported: object) -> None:
    """Raise for every flash-attn argument that is set but not implemented: none is ever
    ignored."""
    for name, value in unsupported.items():
        if isinstance(value, Tensor) or value not in (None, 0.0, False):
            raise ValueError(f"{name}: not implemented here, expected it to be left at its default")


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """Inside, products of fp32 tensors are fp32: no autocast, no TF32 or bf16 inside a product,
    whatever the process has chosen."""
    kind = device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False), _exact_products():
            yield
    else:
        with _exact_products():
            yield


@contextmanager
def _exact_products() -> Iterator[None]:
    if torch.compiler.is_compiling():  # the settings when compiled code runs are what counts
        yield
        return
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings are in use, and mixing the two is an error
        legacy = None
    if legacy == "highest":
        yield
        return
    backends: Any = torch.backends
    settings = [backends.cuda.matmul, backends.mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    if legacy is None:
        for setting in settings:
            setting.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for setting, precision in zip(settings, before, strict=True):
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision


def check_heads(num_heads: int, num_kv_heads: int) -> int:
    """The GQA group size; raises unless ``num_heads`` is a positive multiple of
    ``num_kv_heads``."""
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        check_count(name, value, low=-MAX_TOKENS)
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads: expected a positive multiple of num_kv_heads, "
            f"got {num_heads} heads over {num_kv_heads} kv heads"
        )
    return num_heads // num_kv_heads


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to follow an op on these tensors."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)


def check_tables_constant(cos: Tensor | None, sin: Tensor | None) -> None:
    """Raise if autograd would have to follow the tables of a rotation."""
    if needs_grad(cos, sin):
        raise ValueError("cos, sin: have no gradient here; pass them detached: cos.detach()")


def check_buffers(out: Any, count: int) -> Any:
    """The result buffers of an op with ``count`` results, None where the op makes its own."""
    if out is None:
        return (None,) * count
    if not isinstance(out, (tuple, list)) or len(out) != count:
        kind = f"{len(out)}" if isinstance(out, (tuple, list)) else type(out).__name__
        raise TypeError(f"out: expected a tuple of {count} tensors, got {kind}")
    return out


def deliver(result: Tensor, out: Tensor | None, name: str = "out") -> Tensor:
    """``result`` itself, or ``out`` filled with it when the caller brought a buffer."""
    if out is None:
        return result
    check_tensor(name, out)
    if needs_grad(result, out):
        raise ValueError(f"{name}: a preallocated output cannot carry a gradient; leave it out")
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"{name}: expected {tuple(result.shape)} {result.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    check_device(result.device, **{name: out})
    return out.copy_(result)
