"""Tensors that make wrong kernels show themselves: poison, canaries, strides, odd sizes, extreme
values.

Whatever a kernel must not read is NaN, whatever it must not write is a canary, every layout that
the ops promise to take is generated from one contiguous tensor, and offsets beyond 2^31 elements
cost no memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import torch

# A byte no kernel writes by accident; as bfloat16, float16 and float32 it is a NaN as well.
CANARY = 0xFF
_MAP_NORESERVE = 0x4000  # Linux; Python 3.11 does not name it
_LIBC = ctypes.CDLL(None, use_errno=True)


def generator(*key: object) -> torch.Generator:
    """A torch generator seeded by the words of ``key``, alike in every process."""
    seed = 0x9E3779B97F4A7C15
    for byte in repr(key).encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**63
    return torch.Generator().manual_seed(seed)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor full of NaN (of -1 for integers): what an output holds before it is written."""
    count = torch.Size(shape).numel()
    raw = torch.full((count * dtype.itemsize,), CANARY, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


class Guarded:
    """A view inside a larger buffer of canary bytes; ``check()`` proves that nothing around it was
    written.

    ``tensor`` has the given shape and strides (in elements; None = contiguous) and starts
    ``offset`` elements into the buffer. Bytes in the gaps between its rows are canaries too. All of
    it starts as NaN.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
        margin: int = 256,
    ) -> None:
        strides = _contiguous(shape) if strides is None else strides
        empty = min(shape, default=1) == 0
        span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self._buffer = poisoned(margin + offset + span + margin, dtype=dtype)
        self._inside = torch.zeros(self._buffer.shape, dtype=torch.bool)
        self._inside.as_strided(shape, strides, margin + offset).fill_(True)
        self.tensor = self._buffer.as_strided(shape, strides, margin + offset)

    def check(self, label: str = "output") -> None:
        """Raises AssertionError naming the first element outside the tensor that was written."""
        raw = self._buffer.view(torch.uint8).reshape(self._buffer.numel(), -1)
        touched = (raw != CANARY).any(dim=1) & ~self._inside
        if touched.any():
            first = int(touched.nonzero()[0])
            start = self.tensor.storage_offset()
            raise AssertionError(
                f"{label}: {int(touched.sum())} elements outside the tensor were written; the "
                f"first lies {first - start} elements from its start and holds "
                f"{self._buffer[first].item()}"
            )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def layouts(x: torch.Tensor, align: int = 8) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, view)`` pairs: every layout of the values of ``x`` whose last dimension has stride
    1.

    Each view lives in its own buffer whose other elements are NaN. ``align`` is the number of
    elements that keeps rows on a 16-byte boundary; two of the layouts break it on purpose.
    """
    yield "contiguous", x.clone()
    if x.ndim == 0 or x.numel() == 0:
        return
    yield "padded rows", _placed(x, row_gap=align)
    yield "rows of odd stride", _placed(x, row_gap=1)
    yield "storage offset 1", _placed(x, offset=1)
    yield "storage offset 1 element short of aligned", _placed(x, offset=align - 1)
    if x.ndim >= 2:
        yield "every second row", _every_second(x)
        yield "column slice of a wider tensor", _placed(x, row_gap=3 * align, offset=align)
    if x.ndim >= 3:
        yield "outer dimensions transposed", x.transpose(0, 1).contiguous().transpose(0, 1)


def _placed(x: torch.Tensor, row_gap: int = 0, offset: int = 0) -> torch.Tensor:
    shape = tuple(x.shape)
    strides = [1] * x.ndim
    for dim in range(x.ndim - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1] + (row_gap if dim == x.ndim - 2 else 0)
    view = Guarded(shape, x.dtype, tuple(strides), offset=offset).tensor
    return view.copy_(x)


def _every_second(x: torch.Tensor) -> torch.Tensor:
    doubled = poisoned(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)
    return doubled[::2].copy_(x)


def odd_sizes(limit: int, multiple: int = 1) -> list[int]:
    """Sizes up to ``limit`` round powers of two and primes, as multiples of ``multiple``."""
    near = {2**p + d for p in range(0, limit.bit_length() + 1) for d in (-1, 0, 1)}
    primes = {3, 5, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521}
    return sorted(n * multiple for n in near | primes if n > 0 and n * multiple <= limit)


def extreme_rows(hidden: int, dtype: torch.dtype, *key: object) -> dict[str, torch.Tensor]:
    """Named rows ``[hidden]`` on which norms, activations and rotations are known to break."""
    info = torch.finfo(dtype)
    base = torch.randn(hidden, generator=generator("extreme", hidden, *key), dtype=torch.float64)
    one_hot = torch.zeros(hidden, dtype=torch.float64)
    one_hot[hidden // 2] = 1.0
    signs = 1.0 - 2.0 * (torch.arange(hidden, dtype=torch.float64) % 2)
    with_nan, with_inf = base.clone(), base.clone()
    with_nan[-1], with_inf[0] = torch.nan, torch.inf
    rows = {
        "zeros": torch.zeros(hidden, dtype=torch.float64),
        "minus zeros": -torch.zeros(hidden, dtype=torch.float64),
        "ones": torch.ones(hidden, dtype=torch.float64),
        "alternating": signs,
        "large": base * 1e4,
        "tiny": base * max(info.tiny, 1e-20),
        "subnormal": signs * info.smallest_normal / 4,
        "one hot": one_hot,
        "one large among small": base * 1e-3 + one_hot * 1e3,
        "one NaN": with_nan,
        "one infinity": with_inf,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns of a 16-bit dtype, NaN and infinities included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def before_guard_page(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of NaN that ends where the next page can be neither read nor written.

    A vector access that runs past the end by a single byte faults, which heap red zones may miss.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    page = mmap.PAGESIZE
    payload = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, payload + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(ctypes.c_void_p(address + payload), ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of the guard page failed")
    memory[payload - size : payload] = bytes([CANARY]) * size
    if size == 0:
        return poisoned(*shape, dtype=dtype)
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=payload - size)
    return whole.view(dtype).reshape(shape)


def sparse(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of zeros that takes memory only where touched: offsets beyond 2^31 for free."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements)
