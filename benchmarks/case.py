"""A case (an op on tensors of one shape) and its contenders (who can compute it)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .shapes import Sizes, sizes
from .timing import Call, Effort

Inputs = dict[str, Any]
# From one set of inputs to a call whose results are the outputs of the case, as a sequence. What a
# library does once for many calls (layout, plan, compilation) is done here.
Prepare = Callable[[Inputs], Call]

FULL, QUICK = Effort(repeats=30, seconds=0.25), Effort(repeats=15, seconds=0.05)
EPS = 1e-6


class Unsupported(Exception):
    """A contender cannot compute this case; the message says what it lacks."""


@dataclass(frozen=True)
class Contender:
    """Who computes a case: ``peer`` is its entry in peers.py ("" for exafuse itself)."""

    name: str
    prepare: Prepare
    peer: str = ""


@dataclass(frozen=True)
class Case:
    """An op on inputs of one shape.

    Attributes:
        suite, op, name, model, parameters: what it is; names are unique within an op.
        bytes: each input read once, each output written once.
        flops: multiplications and additions of matrix products.
        make: a set of inputs from a seeded generator; equal seeds give equal tensors.
        expected: the outputs by definition.
        contenders: exafuse first.
        reads: next to nothing is written, so the floor is that of reading.
    """

    suite: str
    op: str
    name: str
    bytes: int
    make: Callable[[torch.Generator], Inputs]
    expected: Callable[[Inputs], Sequence[Tensor]]
    contenders: Sequence[Contender]
    model: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    reads: bool = False


@dataclass(frozen=True)
class Settings:
    """What a run was asked for. ``peers``: only these; None = all there are. ``profile``: a folder
    for traces of whole models, or None."""

    device: torch.device
    quick: bool = False
    peers: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    profile: str | None = None

    @property
    def sizes(self) -> Sizes:
        return sizes(self.device.type, self.quick)

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize


class Maker:
    """Random tensors on the device of a generator, of one dtype."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype = generator, dtype
        self.device = generator.device

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Numbers around 0, of standard deviation ``scale``."""
        x = torch.empty(shape, dtype=self.dtype, device=self.device)
        return x.normal_(0.0, scale, generator=self.generator)

    def weight(self, size: int) -> Tensor:
        """Norm weights around 1."""
        return 1 + self.normal(size, scale=0.1)

    def unwritten(self, *shape: int) -> Tensor:
        """A result buffer of NaN: what a kernel leaves out shows."""
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)


def unwritten_like(x: Tensor, *shape: int) -> Tensor:
    """A result buffer of NaN with the dtype and device of ``x``, and its shape if none is given."""
    return torch.full(shape or x.shape, float("nan"), dtype=x.dtype, device=x.device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes; it compiles at the first call, before anything is timed.

    Nothing of the compiler is loaded before that.
    """

    @functools.cache
    def version() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return lambda *arguments, **options: version()(*arguments, **options)
