"""The attention ops. They have no kernels yet: every call runs in plain PyTorch, and says so once
where a kernel would be expected."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from exafuse import reference
from exafuse.ops.front_door import FrontDoor

P = ParamSpec("P")
R = TypeVar("R")


class AttentionOps(FrontDoor):
    """The ops of this file, on one backend; semantics in :mod:`exafuse.reference`."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.flash_attn_func = self._announced(reference.flash_attn_func)
        self.flash_attn_varlen_func = self._announced(reference.flash_attn_varlen_func)
        self.flash_attn_with_kvcache = self._announced(reference.flash_attn_with_kvcache)
        self.vision_attn = self._announced(reference.vision_attn)

    def _announced(self, function: Callable[P, R]) -> Callable[P, R]:
        op = function.__name__

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            self.without_kernel(op, args[0] if args else kwargs.get("q", kwargs.get("qkv")))
            return function(*args, **kwargs)

        return call
