"""One argument made wrong in every way, for the tests of what the ops refuse."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import numpy as np
import torch

BF16 = torch.bfloat16
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64),
)


class NoTensor:
    """No tensor, whatever it says of itself."""

    shape = (2, 20, 4, 16)
    dtype = BF16
    requires_grad = is_cuda = False


def misaligned(like: torch.Tensor) -> torch.Tensor:
    """The same shape at an odd address."""
    size = like.numel() * like.element_size()
    raw = torch.frombuffer(bytearray(size + 1), dtype=torch.uint8, offset=1, count=size)
    return torch.frombuffer(raw.numpy(), dtype=like.dtype).view(like.shape)


def columns(like: torch.Tensor) -> torch.Tensor:
    """The same shape, every second element of the last dimension of a wider tensor."""
    return torch.zeros(*like.shape[:-1], 2 * like.shape[-1], dtype=like.dtype)[..., ::2]


def wrong_tensors(
    value: torch.Tensor,
    optional: bool = False,
    dtypes: Container[torch.dtype] = (),
    free_dims: Container[int] = (),
    strided: bool = True,
) -> Iterator[tuple[str, Any, bool]]:
    """What must not stand in place of `value`, as `(what, instead, on kernels alone)`.

    Args:
        optional: None is right too.
        dtypes: those that are right beside its own.
        free_dims: dimensions of any size.
        strided: whether kernels want stride 1 in the last dimension.
    """
    for other in ("x", 3.5, [1, 2], {}, np.zeros((2, 3)), NoTensor(), torch.float16):
        yield type(other).__name__, other, False
    if not optional:
        yield "None", None, False
    for dtype in DTYPES:
        if dtype != value.dtype and dtype not in dtypes:
            yield f"{dtype}", value.to(dtype), False
    yield "a conjugated view", value.to(torch.complex64).conj(), False
    for dim in range(value.dim()):
        for change in (-1, 1) if dim not in free_dims else ():
            shape = list(value.shape)
            shape[dim] += change
            yield f"shape {shape}", torch.zeros(shape, dtype=value.dtype), False
    yield "one dimension more", value[None].clone(), False
    yield "one dimension less", value[0].clone(), False
    yield "no dimension", torch.zeros((), dtype=value.dtype), False
    yield "another device", value.to("meta"), False
    if value.shape[-1] > 1 and strided:
        yield "stride 2", columns(value), True
    yield "odd address", misaligned(value), True


def wrong_numbers(zero: bool = False) -> Iterator[tuple[str, Any]]:
    """What is no count; 0 as well where `zero` says that it is none."""
    for value in (None, "x", 3.0, torch.tensor(3), -1, 2**31, 2**70, -(2**63)):
        yield f"{value!r}", value
    if zero:
        yield "0", 0
