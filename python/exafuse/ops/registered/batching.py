"""``torch.vmap`` over the registered ops.

An op whose mapped arguments hold rows takes the mapped dimension as more rows, in one launch.
Where something else is mapped too (a weight for each example), and for the ops whose rows belong
to sequences, the examples run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exafuse.ops.registered.library import register_batching, registered

Results = tuple[Any, Any]  # results and the dimension of each that is mapped


def _each(name: str, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Results:
    """The examples one after the other; those of mapped caches are written in place."""
    declared = getattr(registered, name).default._schema.arguments
    for argument, dim in zip(declared, in_dims, strict=True):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and dim is None:
            raise ValueError(
                f"{argument.name}: every example of vmap would write into the same cache; "
                f"map it too, or call {name} once for all of them"
            )
    results = []
    for i in range(info.batch_size):
        example = (x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True))
        results.append(getattr(registered, name)(*example))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def _rule(name: str, rows: tuple[str, ...], flat: bool) -> Callable[..., Results]:
    declared = [a.name for a in getattr(registered, name).default._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Results:
        mapped = {n for n, d in zip(declared, in_dims, strict=True) if d is not None}
        if not mapped or not mapped <= set(rows):
            return _each(name, info, in_dims, args)
        folded = []
        for argument, x, dim in zip(declared, args, in_dims, strict=True):
            if argument not in rows or x is None:
                folded.append(x)
                continue
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            folded.append(x.flatten(0, 1) if flat else x)
        results = getattr(registered, name)(*folded)
        single = isinstance(results, Tensor)
        taken = (results,) if single else results
        if flat:
            taken = tuple(x.unflatten(0, (info.batch_size, -1)) for x in taken)
        return (taken[0], 0) if single else (taken, (0,) * len(taken))

    return rule


def _one_by_one(name: str) -> Callable[..., Results]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Results:
        return _each(name, info, in_dims, args)

    return rule


# Which arguments hold rows; whether the rows are the first dimension alone.
_ROWS: dict[str, tuple[tuple[str, ...], bool]] = {
    "rms_norm": (("x",), False),
    "add_rms_norm": (("x", "residual"), False),
    "rms_norm_add": (("x", "residual"), False),
    "silu_and_mul": (("gate", "up"), False),
    "qk_norm_rope": (("q", "k", "v", "positions"), True),
    "flash_attn_func": (("q", "k", "v"), True),
}
_SEQUENCES = (
    "flash_attn_append_kvcache",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "qk_norm_rope_cache",
    "vision_attn",
)


def register_rules() -> None:
    """For every op that is defined by now."""
    for name, (rows, flat) in _ROWS.items():
        register_batching(name, _rule(name, rows, flat))
    for name in _SEQUENCES:
        register_batching(name, _one_by_one(name))
