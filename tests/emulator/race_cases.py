"""Random calls of every op on numpy arrays, judged against the oracles, for ThreadSanitizer.

``race_cases.py [--op OP] [--cases N] [--schedule S] [--plant]`` prints "<op>: <cases>" for each op,
or those asked for. The sanitizer adds its reports and its exit status; ``--plant`` adds a kernel
with a race, which must change both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import _C_emulated as C
import numpy as np
import oracles
from numeric import assert_bitwise_equal, assert_close, assert_rope_close

from emulator import attention_race_cases, backward_race_cases
from emulator.control import SCHEDULES, Emulator
from emulator.race_arrays import Cases, empty, read, store

DTYPES = ("bfloat16", "float16", "float32")
# One hidden size or more for each way in which the norms share out a row.
HIDDEN = (8, 16, 64, 264, 1024, 2048, 2056, 4096, 5120, 16392)
HEAD_DIMS = (8, 16, 40, 64, 80, 96, 128)
EPS = 1e-5


def norms(op: str) -> Callable[[Cases], None]:
    def run(cases: Cases) -> None:
        dtype = str(cases.pick(*DTYPES))
        hidden = int(cases.pick(*HIDDEN))
        rows = cases.number(1, 9 if hidden <= 2048 else 3)
        x, residual = cases.values(dtype, rows, hidden), cases.values(dtype, rows, hidden)
        if dtype == "bfloat16" and cases.pick(True, False):
            x[0] *= 2.0**80  # its squares overflow fp32: the row is summed a second time
        weight = cases.values(dtype, hidden)
        given = cases.gapped(store(x, dtype)), cases.gapped(store(residual, dtype))
        out, residual_out = empty(x, dtype), empty(x, dtype)
        if op == "rms_norm":
            C.rms_norm(given[0], store(weight, dtype), EPS, out)
            expected, magnitude = oracles.rms_norm(x, weight, EPS), None
        elif op == "add_rms_norm":
            C.add_rms_norm(*given, store(weight, dtype), EPS, out, residual_out)
            expected, total = oracles.add_rms_norm(x, residual, weight, EPS, dtype)
            assert_bitwise_equal(residual_out, store(total, dtype), "residual_out")
            magnitude = None
        else:
            C.rms_norm_add(*given, store(weight, dtype), EPS, out)
            expected = oracles.rms_norm_add(x, residual, weight, EPS)
            magnitude = np.abs(residual) + np.abs(oracles.rms_norm(x, weight, EPS))
        label = f"{op} {dtype} {rows} x {hidden}"
        assert_close(read(out, dtype), expected, magnitude=magnitude, dtype=dtype, label=label)

    return run


def heads(with_cache: bool) -> Callable[[Cases], None]:
    def run(cases: Cases) -> None:
        dtype = str(cases.pick(*DTYPES))
        head_dim = int(cases.pick(*HEAD_DIMS))
        num_kv_heads = cases.number(1, 3)
        num_heads = num_kv_heads * cases.number(1, 4)
        tokens, table = cases.number(1, 9), 50
        qkv = cases.values(dtype, tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        has_norm, has_rope = cases.pick(True, False), cases.pick(True, True, False)
        q_weight, k_weight = cases.values(dtype, head_dim), cases.values(dtype, head_dim)
        angles = cases.random.uniform(0, 6.3, (table, head_dim // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        positions = cases.random.integers(0, table, tokens).astype(np.int32)
        weights = (store(q_weight, dtype), store(k_weight, dtype)) if has_norm else (None, None)
        rope = (cos, sin, positions) if has_rope else (None, None, None)
        arguments = (cases.gapped(store(qkv, dtype)), None, None, num_heads, num_kv_heads)
        q, k, v = oracles.qk_norm_rope(
            qkv,
            num_heads,
            num_kv_heads,
            q_weight if has_norm else None,
            k_weight if has_norm else None,
            *rope,
            EPS,
        )
        label = f"{dtype} {tokens} tokens, {num_heads}/{num_kv_heads} heads of {head_dim}"
        q_out, k_out, v_out = empty(q, dtype), empty(k, dtype), empty(v, dtype)
        if with_cache:
            cache_rows, slots = 2, 16
            cache_shape = (cache_rows, slots, num_kv_heads, head_dim)
            k_cache, v_cache = (store(cases.values(dtype, *cache_shape), dtype) for _ in range(2))
            slot_mapping = cases.random.permutation(cache_rows * slots)[:tokens].astype(np.int64)
            slot_mapping[cases.random.random(tokens) < 0.2] = -1
            k_before, v_before = read(k_cache, dtype), read(v_cache, dtype)
            C.qk_norm_rope_cache(
                *arguments, *weights, *rope, EPS, k_cache, v_cache, slot_mapping, q_out
            )
            k_wanted, written = oracles.cache_write(k_before, k, slot_mapping)
            v_wanted, _ = oracles.cache_write(v_before, v, slot_mapping)
            assert_bitwise_equal(v_cache, store(v_wanted, dtype), f"v_cache {label}")
            k_got = read(k_cache, dtype)
            assert_bitwise_equal(k_got[~written], k_before[~written], f"k_cache {label}")
            assert_rope_close(k_got, k_wanted, dtype=dtype, label=f"k_cache {label}")
        else:
            C.qk_norm_rope(*arguments, *weights, *rope, EPS, q_out, k_out, v_out)
            assert_rope_close(read(k_out, dtype), k, dtype=dtype, label=f"k {label}")
            assert_bitwise_equal(v_out, store(v, dtype), f"v {label}")
        assert_rope_close(read(q_out, dtype), q, dtype=dtype, label=f"q {label}")

    return run


def apply_rope(cases: Cases) -> None:
    dtype = str(cases.pick(*DTYPES))
    head_dim = int(cases.pick(*HEAD_DIMS))
    tokens, table = cases.number(1, 9), 50
    q = cases.values(dtype, tokens, cases.number(1, 6), head_dim)
    k = cases.values(dtype, tokens, cases.number(1, 3), head_dim)
    angles = cases.random.uniform(0, 6.3, (table, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = cases.random.integers(0, table, tokens).astype(np.int32)
    q_out, k_out = empty(q, dtype), empty(k, dtype)
    given = cases.gapped(store(q, dtype)), cases.gapped(store(k, dtype))
    C.apply_rope(*given, cos, sin, positions, q_out, k_out)
    q_wanted, k_wanted = oracles.apply_rope(q, k, cos, sin, positions)
    assert_rope_close(read(q_out, dtype), q_wanted, dtype=dtype, label=f"q {dtype} {q.shape}")
    assert_rope_close(read(k_out, dtype), k_wanted, dtype=dtype, label=f"k {dtype} {k.shape}")


def silu_and_mul(cases: Cases) -> None:
    dtype = str(cases.pick(*DTYPES))
    rows, width = cases.number(1, 9), 8 * cases.number(1, 300)
    gate, up = 4 * cases.values(dtype, rows, width), cases.values(dtype, rows, width)
    out = empty(gate, dtype)
    if cases.pick(True, False):
        C.silu_and_mul(store(np.concatenate([gate, up], axis=1), dtype), None, out)
    else:
        C.silu_and_mul(cases.gapped(store(gate, dtype)), cases.gapped(store(up, dtype)), out)
    expected = oracles.silu_and_mul(gate, up)
    assert_close(read(out, dtype), expected, dtype=dtype, label=f"{dtype} {rows} x {width}")


OPS: dict[str, Callable[[Cases], None]] = {
    "rms_norm": norms("rms_norm"),
    "add_rms_norm": norms("add_rms_norm"),
    "rms_norm_add": norms("rms_norm_add"),
    "qk_norm_rope": heads(with_cache=False),
    "qk_norm_rope_cache": heads(with_cache=True),
    "apply_rope": apply_rope,
    "silu_and_mul": silu_and_mul,
    **backward_race_cases.OPS,
    **attention_race_cases.OPS,
}
# Attention is slow in this build; of its ops, one case for so many of the others'.
ATTENTION_SHARE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="default: every op")
    parser.add_argument("--cases", type=int, default=24, help="per op")
    parser.add_argument("--schedule", choices=SCHEDULES, default="forward")
    parser.add_argument("--gpu", default="sm_80", help="the emulated one")
    parser.add_argument("--plant", action="store_true", help="run a kernel with a race as well")
    arguments = parser.parse_args()
    emulator = Emulator(Path(C.__file__))
    emulator.set("schedule", arguments.schedule)
    emulator.set("gpu", arguments.gpu)
    for number, (op, run) in enumerate(OPS.items()):
        if arguments.op and op not in arguments.op:
            continue
        share = ATTENTION_SHARE if op in attention_race_cases.OPS else 1
        count = -(-arguments.cases // share)
        for i in range(count):
            run(Cases(1000 * number + i))
        print(f"{op}: {count}", flush=True)
    if arguments.plant:
        import _honesty

        _honesty.run("bug counter without atomics")


if __name__ == "__main__":
    main()
