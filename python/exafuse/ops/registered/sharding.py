"""How the registered ops act on DTensors: on rows apart, and attention on heads apart too.

torch asks for a strategy of each op the first time that the op meets a DTensor. A caller's layout
that is none of these is redistributed to one of them; ops without an entry take no DTensors, and
``torch.distributed.tensor.experimental.local_map`` runs them on local parts.
"""

from __future__ import annotations

import functools
from typing import Any

from exafuse.ops.registered.library import registered

# Arguments with rows (of a dimension 0 that may be split), then results: "r" with rows, "w" the
# gradient of a weight, which is a sum over rows.
_ROWS: dict[str, tuple[tuple[str, ...], str]] = {
    "rms_norm": (("x",), "r"),
    "rms_norm_add": (("x", "residual"), "r"),
    "add_rms_norm": (("x", "residual"), "rr"),
    "silu_and_mul": (("gate", "up"), "r"),
    "qk_norm_rope": (("q", "k", "v", "positions"), "rrr"),
    "flash_attn_func": (("q", "k", "v"), "rr"),
    "rms_norm_backward": (("grad", "x"), "rw"),
    "add_rms_norm_backward": (("grad", "grad_residual", "new_residual"), "rw"),
    "silu_and_mul_backward": (("grad", "gate", "up"), "rr"),
    "qk_norm_rope_backward": (
        ("grad_q", "grad_k", "grad_v", "q", "k", "positions"),
        "rrww",
    ),
    "flash_attn_backward": (("grad", "q", "k", "v", "out", "lse"), "rrr"),
}


def allow_dtensors(op: str) -> None:
    """Called when a DTensor arrives at ``op``; TypeError for an op that takes none."""
    if op not in (*_ROWS, "apply_rope"):
        raise TypeError(
            f"{op} takes no DTensors: run it on the local parts, by "
            "torch.distributed.tensor.experimental.local_map or .to_local()"
        )
    _tell_torch()


@functools.cache
def _tell_torch() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for name in _ROWS:
        register_sharding(getattr(registered, name).default)(functools.partial(_layouts, name))


def _layouts(name: str, *args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
    """What may lie on one dimension of a mesh, as ``(of the results, of the arguments)``."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rows, results = _ROWS[name]
    names = [argument.name for argument in getattr(registered, name).default._schema.arguments]
    given = list(zip(names, args, strict=False))

    def layout(split: dict[str, int], of_results: list[Any]) -> tuple[list[Any], list[Any]]:
        inputs: list[Any] = []
        for argument, spec in given:
            if spec is None or isinstance(spec, (int, float)):
                inputs.append(None)
            else:
                inputs.append(Shard(split[argument]) if argument in split else Replicate())
        return of_results, inputs

    layouts = [layout({}, [Replicate()] * len(results))]
    by_kind = {"r": Shard(0), "w": Partial()}
    # The one dimension of a single row is no dimension of rows.
    if next(spec for argument, spec in given if argument in rows).ndim > 1:
        layouts.append(layout(dict.fromkeys(rows, 0), [by_kind[kind] for kind in results]))
    if name.startswith("flash_attn"):
        split = {**dict.fromkeys(rows, 2), "lse": 1}
        backward = name.endswith("backward")
        layouts.append(layout(split, [Shard(2)] * 3 if backward else [Shard(2), Shard(1)]))
    return layouts
