"""The mask of a transformers model as a few numbers per row instead of ``[B, 1, Q, K]`` booleans.

transformers hands whatever its mask function returns to every attention call of that layer kind,
as long as it has four dimensions. A :class:`CompactMask` therefore travels as an int32 tensor
``[batch, causal, window, bounds]``. What the host must know is in its shape, so that reading it
never waits for the device and survives ``torch.compile``; what only the device knows is in its
values:

* ``causal`` = 1: queries stand at the end of the keys and see none behind them; 2: no such bound;
* ``window`` = 1 + W: a query sees the W keys that end with itself; 1: no such bound;
* ``bounds`` = 2: ``[..., 0]`` is the number of keys that exist, ``[..., 1]`` the first of them that
  is no padding; 1: every key exists and none is padding (the values mean nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompactMask:
    """Which keys the queries of a call see, in slots of the key tensor.

    Attributes:
        causal: query j of Q sees no slot beyond ``length - Q + j``.
        window: it sees the last ``window`` slots up to that one; None = all.
        lengths: int32 ``[batch]``, slots that hold a key; None = all of them.
        first: int32 ``[batch]``, first slot that is no padding; None with ``lengths``.
    """

    causal: bool
    window: int | None
    lengths: Tensor | None = None
    first: Tensor | None = None

    @property
    def window_size(self) -> tuple[int, int]:
        """As flash attention counts: keys to the left and right of the query, -1 = open."""
        return (-1 if self.window is None else self.window - 1), (0 if self.causal else -1)

    def pack(self, batch_size: int, device: torch.device | str) -> Tensor:
        """The tensor that stands for it."""
        if self.lengths is None or self.first is None:
            values = torch.zeros(1, batch_size, dtype=torch.int32, device=device)
        else:
            values = torch.stack((self.lengths, self.first)).to(device, torch.int32)
        # Each bound is one contiguous row of memory, which kernels read as it is.
        packed = values.t()[:, None, None, :]
        causal, window = 1 if self.causal else 2, 1 + (self.window or 0)
        return packed.expand(batch_size, causal, window, values.shape[0])

    @classmethod
    def unpack(cls, mask: Tensor | None) -> CompactMask | None:
        """The mask that ``mask`` stands for; None if it is an ordinary mask.

        Raises:
            ValueError: another int32 mask, which would be nobody's.
        """
        if mask is None or mask.dtype != torch.int32 or mask.ndim != 4:
            return None
        if mask.shape[1] not in (1, 2) or mask.shape[3] not in (1, 2):
            raise ValueError(
                "attention_mask: expected a bool or floating-point mask with four dimensions, got "
                f"int32 {tuple(mask.shape)}"
            )
        causal, window = mask.shape[1] == 1, mask.shape[2] - 1 or None
        if mask.shape[3] == 1:
            return cls(causal, window)
        return cls(causal, window, mask[:, 0, 0, 0].contiguous(), mask[:, 0, 0, 1].contiguous())

    def explicit(self, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
        """Boolean ``[batch or 1, 1, seqlen_q, seqlen_k]``, for attention that needs one."""
        slots = torch.arange(seqlen_k, device=device)
        if self.lengths is None or self.first is None:
            length = torch.full((1,), seqlen_k, device=device)
            first = torch.zeros_like(length)
        else:
            length, first = self.lengths.long(), self.first.long()
        seen = (slots >= first[:, None]) & (slots < length[:, None])
        seen = seen[:, None, None, :].expand(-1, 1, seqlen_q, -1)
        query = length[:, None] - seqlen_q + torch.arange(seqlen_q, device=device)
        query = query[:, None, :, None]
        if self.causal:
            seen = seen & (slots <= query)
        if self.window is not None:
            seen = seen & (slots > query - self.window)
        return seen


def same_function(a: Any, b: Any) -> bool:
    """Whether two functions run the same code over the same enclosed values.

    transformers composes masks of closures made anew for every call; this tells a plain sliding
    window from one that something else was joined to.
    """
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same_function, a, b))
    if isinstance(a, Callable) and isinstance(b, Callable):  # type: ignore[arg-type]
        if a is b:
            return True
        if getattr(a, "__code__", None) is not getattr(b, "__code__", 0):
            return False
        mine, theirs = a.__closure__ or (), b.__closure__ or ()
        return all(
            same_function(x.cell_contents, y.cell_contents)
            for x, y in zip(mine, theirs, strict=True)
        )
    return type(a) is type(b) and isinstance(a, int | float | str | None) and a == b
