"""Host time of a call: what Python, checks and the binding cost before a kernel is launched.

Every tensor has no rows, so that a call does all its work on the host, the checks included, and
ends where it would launch: nothing of a kernel is in the figure, on a GPU and on the emulated
extension alike. (A launch adds about two microseconds of CUDA driver.) Times are the median, the
quartiles and, under ``extra``, the minimum over repeats of many calls.

    python -m benchmarks.bench_overhead [--device cuda] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from exafuse import ops
from exafuse.errors import BackendError
from exafuse.ops.registered import library
from torch import Tensor

from .case import Settings
from .results import Row

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4096, 32, 8, 128
REPEATS, CALLS = 15, 1000
Function = Callable[[], Any]


class Op(NamedTuple):
    """How an op is called, as a function of the module that has it.

    ``buffered`` has result buffers, ``plain`` makes its results, ``trained`` has an input that
    requires a gradient (None for the ops without one). ``schema`` and ``run`` are those of the op
    as others would register it: the results' buffers are its last arguments.
    """

    buffered: Callable[[ModuleType], Any]
    plain: Callable[[ModuleType], Any]
    trained: Callable[[ModuleType], Any] | None
    schema: str = ""
    run: Callable[..., Callable[[ModuleType], Any]] | None = None
    inputs: tuple[Any, ...] = ()


def op_calls(device: torch.device, dtype: torch.dtype) -> dict[str, Op]:
    """Every op without rows: ``[0, 4096]`` and heads of 128 as in models of 8B."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    x, residual, y, z = (empty(0, HIDDEN) for _ in range(4))
    weight, head = torch.ones(HIDDEN, device=device), torch.ones(HEAD_DIM, device=device)
    leaf = empty(0, HIDDEN).requires_grad_()
    gate_up, gate = empty(0, 2 * HIDDEN), empty(0, 2 * HIDDEN).requires_grad_()
    qkv = empty(0, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    qkv_leaf = qkv.clone().requires_grad_()
    q_out, k_out, v_out = (empty(0, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    table = empty(128, HEAD_DIM // 2, dtype=torch.float32)
    positions, slots = empty(0, dtype=torch.int32), empty(0, dtype=torch.int64)
    rope = (HEADS, KV_HEADS, head, head, table, table, positions, 1e-6)
    cache = {n: empty(1, 128, KV_HEADS, HEAD_DIM) for n in ("k_cache", "v_cache")}
    cache_write: dict[str, Any] = {**cache, "slot_mapping": slots}
    q, keys = empty(0, 1, HEADS, HEAD_DIM), empty(0, 128, KV_HEADS, HEAD_DIM)
    seqlens, attended = empty(0, dtype=torch.int32), empty(0, 1, HEADS, HEAD_DIM)
    decode: dict[str, Any] = {"cache_seqlens": seqlens, "causal": True}
    return {
        "rms_norm": Op(
            lambda m: m.rms_norm(x, weight, 1e-6, out=y),
            lambda m: m.rms_norm(x, weight, 1e-6),
            lambda m: m.rms_norm(leaf, weight, 1e-6),
            "(Tensor x, Tensor weight, float eps, Tensor(a!) y) -> ()",
            lambda x, weight, eps, y: lambda m: m.rms_norm(x, weight, eps, out=y),
            (x, weight, 1e-6, y),
        ),
        "add_rms_norm": Op(
            lambda m: m.add_rms_norm(x, residual, weight, 1e-6, out=(y, z)),
            lambda m: m.add_rms_norm(x, residual, weight, 1e-6),
            lambda m: m.add_rms_norm(leaf, residual, weight, 1e-6),
            "(Tensor x, Tensor r, Tensor weight, float eps, Tensor(a!) y, Tensor(b!) z) -> ()",
            lambda x, r, weight, eps, y, z: lambda m: m.add_rms_norm(x, r, weight, eps, out=(y, z)),
            (x, residual, weight, 1e-6, y, z),
        ),
        "rms_norm_add": Op(
            lambda m: m.rms_norm_add(x, residual, weight, 1e-6, out=y),
            lambda m: m.rms_norm_add(x, residual, weight, 1e-6),
            lambda m: m.rms_norm_add(leaf, residual, weight, 1e-6),
        ),
        "silu_and_mul": Op(
            lambda m: m.silu_and_mul(gate_up, out=y),
            lambda m: m.silu_and_mul(gate_up),
            lambda m: m.silu_and_mul(gate),
            "(Tensor gate_up, Tensor(a!) y) -> ()",
            lambda gate_up, y: lambda m: m.silu_and_mul(gate_up, out=y),
            (gate_up, y),
        ),
        "qk_norm_rope": Op(
            lambda m: m.qk_norm_rope(qkv, *rope, out=(q_out, k_out, v_out)),
            lambda m: m.qk_norm_rope(qkv, *rope),
            lambda m: m.qk_norm_rope(qkv_leaf, *rope),
        ),
        "qk_norm_rope_cache": Op(
            lambda m: m.qk_norm_rope_cache(qkv, *rope, **cache_write, out=q_out),
            lambda m: m.qk_norm_rope_cache(qkv, *rope, **cache_write),
            None,
            "(Tensor qkv, int heads, int kv_heads, Tensor q_weight, Tensor k_weight, Tensor cos,"
            " Tensor sin, Tensor positions, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache,"
            " Tensor slots, Tensor(c!) q) -> ()",
            lambda *a: (
                lambda m: m.qk_norm_rope_cache(
                    *a[:9], k_cache=a[9], v_cache=a[10], slot_mapping=a[11], out=a[12]
                )
            ),
            (qkv, *rope, *cache.values(), slots, q_out),
        ),
        "apply_rope": Op(
            lambda m: m.apply_rope(q_out, k_out, table, table, positions, out=(q_out, k_out)),
            lambda m: m.apply_rope(q_out, k_out, table, table, positions),
            None,
        ),
        "flash_attn_with_kvcache": Op(
            lambda m: m.flash_attn_with_kvcache(q, keys, keys, **decode, out=attended),
            lambda m: m.flash_attn_with_kvcache(q, keys, keys, **decode),
            None,
        ),
        "flash_attn_func": Op(
            lambda m: m.flash_attn_func(q, keys, keys, causal=True, out=attended),
            lambda m: m.flash_attn_func(q, keys, keys, causal=True),
            None,
        ),
    }


def registrations(op: str, call: Op, module: ModuleType) -> dict[str, Function]:
    """The call with result buffers, as ops that others register: the same work, another door."""
    if call.run is None:
        return {}
    make = call.run

    def run(*arguments: Any) -> None:
        make(*arguments)(module)

    others = torch.library.Library("exafuse_overhead", "FRAGMENT")
    defined, custom = f"{op}_defined", f"{op}_custom"
    if not hasattr(torch.ops.exafuse_overhead, defined):
        others.define(defined + call.schema)
        others.impl(defined, run, "CompositeExplicitAutograd")
        torch.library.custom_op(
            f"exafuse_overhead::{custom}",
            run,
            mutates_args=_mutated(call.schema),
            schema=call.schema,
        )
        _kept.append(others)
    defined_op = getattr(torch.ops.exafuse_overhead, defined)
    custom_op = getattr(torch.ops.exafuse_overhead, custom)
    return {
        "Library.define": lambda: defined_op(*call.inputs),
        "custom_op": lambda: custom_op(*call.inputs),
    }


_kept: list[Any] = []  # a library that is gone takes its ops with it


def _mutated(schema: str) -> tuple[str, ...]:
    arguments = schema[1 : schema.rindex(") ->")].split(",")
    return tuple(argument.split()[-1] for argument in arguments if "!" in argument)


def contenders(op: str, call: Op, module: ModuleType) -> Iterator[tuple[str, bool, Function]]:
    """``(name, whether grad mode is on, call)``."""
    yield "exafuse, out=", False, lambda: call.buffered(module)
    yield "exafuse", False, lambda: call.plain(module)
    yield "exafuse, grad mode on", True, lambda: call.plain(module)
    if call.trained is not None:
        trained = call.trained
        yield "exafuse, a gradient to follow", True, lambda: trained(module)
    for name, function in registrations(op, call, module).items():
        yield name, False, function
    if op == "rms_norm":
        x, weight, eps, _ = call.inputs
        weight = weight.to(x.dtype)
        yield "F.rms_norm", False, lambda: F.rms_norm(x, (HIDDEN,), weight, eps)


def host_us(function: Function, repeats: int = REPEATS, calls: int = CALLS) -> list[float]:
    """Microseconds of a call in each repeat, sorted."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        for _ in range(calls):
            function()
        times.append((time.perf_counter_ns() - begin) / calls / 1000)
    return sorted(times)


def backend_for(device: torch.device) -> ModuleType:
    """The ops with kernels for ``device``; BackendError says why there are none."""
    return ops.for_path("cuda" if device.type == "cuda" else "emulated")


@contextmanager
def _inside_registered(module: ModuleType) -> Iterator[None]:
    """Registered ops run on ``module`` too, which on a CPU they would not."""
    before, library.direct.ops = library.direct.ops, module
    try:
        yield
    finally:
        library.direct.ops = before


def run(settings: Settings) -> Iterator[Row]:
    """Rows of the suite "overhead"."""
    case = "host time a call, no rows"
    repeats, calls = (3, 300) if settings.quick else (REPEATS, CALLS)
    try:
        module = backend_for(settings.device)
    except BackendError as error:
        yield Row("overhead", "all", case, "exafuse", "unsupported", reason=str(error))
        return
    for op, call in op_calls(settings.device, settings.dtype).items():
        for name, grad, function in contenders(op, call, module):
            with torch.set_grad_enabled(grad), _inside_registered(module):
                times = host_us(function, repeats, calls)
            q1, median, q3 = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
            yield Row(
                *("overhead", op, case, name, "ok"),
                path=module.path,
                time_us=median,
                q1_us=q1,
                q3_us=q3,
                repeats=repeats,
                mode="host",
                extra={"min_us": times[0], "calls": calls},
            )


def main() -> None:
    """Parse the command line, print one line a contender."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    arguments = parser.parse_args()
    settings = Settings(device=torch.device(arguments.device), quick=arguments.quick)
    print(f"{'op':24} {'contender':30} {'median us':>10} {'min us':>8}")
    for row in run(settings):
        if row.status != "ok":
            print(f"{row.op:24} {row.contender:30} {row.reason}")
        else:
            print(f"{row.op:24} {row.contender:30} {row.time_us:10.2f} {row.extra['min_us']:8.2f}")


if __name__ == "__main__":
    main()
