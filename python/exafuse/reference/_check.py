"""Argument checks shared by the reference ops; every message is generated from the check
itself."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Shapes:
    """Symbolic dimensions of one call: the first use of a name binds it, later uses must agree."""

    def __init__(self, **known: int) -> None:
        self.known = dict(known)

    def match(self, name: str, tensor: Tensor, *dims: str | int) -> None:
        """Raise ValueError unless ``tensor`` has the shape ``dims``; ``"..."`` first means any
        leading."""
        shape = tuple(tensor.shape)  # a torch.Size is slower to walk
        pattern = dims
        if pattern[0] == "...":
            pattern = dims[1:]
            shape = shape[-len(pattern) :]
        ok = len(shape) == len(pattern)
        if ok:
            known = self.known
            for size, dim in zip(shape, pattern, strict=True):
                if size != (dim if isinstance(dim, int) else known.setdefault(dim, size)):
                    ok = False
        if not ok:
            raise ValueError(self._message(name, dims, tensor))

    def _message(self, name: str, dims: tuple[str | int, ...], tensor: Tensor) -> str:
        words = [f"{d}={self.known[d]}" if d in self.known else str(d) for d in dims]
        return f"{name}: expected ({', '.join(words)}), got {tuple(tensor.shape)}"


def check_float(name: str, tensor: Tensor, *also: torch.dtype) -> None:
    """Raise unless ``tensor`` is a bf16, fp16 or fp32 tensor (of one of ``also``, if given)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    allowed = also or FLOAT_DTYPES
    if tensor.dtype not in allowed:
        words = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(allowed))
        raise ValueError(
            f"{name}: expected dtype {words}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def check_heads(num_heads: int, num_kv_heads: int) -> int:
    """The GQA group size; raises unless ``num_heads`` is a positive multiple of
    ``num_kv_heads``."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            "num_heads: expected a positive multiple of num_kv_heads, "
            f"got {num_heads} heads over {num_kv_heads} kv heads"
        )
    return num_heads // num_kv_heads


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to follow an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def deliver(result: Tensor, out: Tensor | None, name: str = "out") -> Tensor:
    """``result`` itself, or ``out`` filled with it when the caller brought a buffer."""
    if out is None:
        return result
    if needs_grad(result, out):
        raise ValueError(f"{name}: a preallocated output cannot carry a gradient; leave it out")
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"{name}: expected {tuple(result.shape)} {result.dtype}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    return out.copy_(result)
