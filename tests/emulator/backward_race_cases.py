"""Random calls of the kernels that compute gradients, for race_cases.py."""

from __future__ import annotations

from collections.abc import Callable

import _C_emulated as C
import backward_oracles
import numpy as np
from numeric import assert_bitwise_equal, assert_close

from emulator.race_arrays import Cases, empty, read, store

DTYPES = ("bfloat16", "float16", "float32")
# One hidden size or more for each way in which the kernels share out a row.
HIDDEN = (8, 16, 64, 264, 1024, 2056, 4096, 16392)
HEAD_DIMS = (8, 16, 40, 64, 80, 96, 128)
EPS = 1e-5


def norms(op: str) -> Callable[[Cases], None]:
    def run(cases: Cases) -> None:
        dtype = str(cases.pick(*DTYPES))
        hidden = int(cases.pick(*HIDDEN))
        rows = cases.number(1, 20 if hidden <= 1024 else 11)
        x, grad, past = (cases.values(dtype, rows, hidden) for _ in range(3))
        if dtype == "bfloat16" and cases.pick(True, False):
            x[0] *= 2.0**80  # its squares overflow fp32: the row is summed a second time
        weight = cases.values(dtype, hidden)
        inputs = [cases.gapped(store(array, dtype)) for array in (grad, past, x)]
        grad_x, grad_weight = empty(x, dtype), empty(weight, dtype)
        num_bytes = C.rms_norm_backward_workspace(rows, hidden, 4 if dtype == "float32" else 2)
        workspace = np.full(num_bytes // 4, np.nan, dtype=np.float32)
        results = (grad_x, grad_weight, workspace)
        if cases.number(0, 3) == 0:
            results = (grad_x, None, None)
        if op == "rms_norm_backward":
            C.rms_norm_backward(inputs[0], inputs[2], store(weight, dtype), EPS, *results)
            wanted = backward_oracles.rms_norm(grad, x, weight, EPS)
        else:
            C.add_rms_norm_backward(*inputs, store(weight, dtype), EPS, *results)
            wanted = backward_oracles.rms_norm(grad, x, weight, EPS, past)
        for result, want in zip(results[:2], wanted, strict=True):
            if result is not None:
                _judge(result, want, dtype, f"{op} {dtype} {rows} x {hidden}")

    return run


def silu_and_mul(cases: Cases) -> None:
    dtype = str(cases.pick(*DTYPES))
    rows, width = cases.number(1, 9), 8 * cases.number(1, 300)
    grad, gate, up = (cases.values(dtype, rows, width) for _ in range(3))
    gate = 4 * gate
    if cases.pick(True, False):
        packed = store(np.concatenate([gate, up], axis=1), dtype)
        out = store(np.full(packed.shape, np.nan), dtype)
        C.silu_and_mul_backward(cases.gapped(store(grad, dtype)), packed, None, out, None)
        results = out[:, :width], out[:, width:]
    else:
        results = empty(gate, dtype), empty(up, dtype)
        inputs = (cases.gapped(store(x, dtype)) for x in (grad, gate, up))
        C.silu_and_mul_backward(*inputs, *results)
    wanted = backward_oracles.silu_and_mul(grad, gate, up)
    for result, want in zip(results, wanted, strict=True):
        _judge(result, want, dtype, f"{dtype} {rows} x {width}")


def heads(cases: Cases) -> None:
    dtype = str(cases.pick(*DTYPES))
    head_dim = int(cases.pick(*HEAD_DIMS))
    num_kv_heads = cases.number(1, 3)
    counts = (num_kv_heads * cases.number(1, 4), num_kv_heads, num_kv_heads)
    tokens, rows = int(cases.pick(1, 5, 9, 40, 1100 if head_dim == 8 else 70)), 50
    grads, inputs = ([cases.values(dtype, tokens, n, head_dim) for n in counts] for _ in range(2))
    has_norm, has_rope = cases.pick(True, True, False), cases.pick(True, False)
    weights = [cases.values(dtype, head_dim) if has_norm else None for _ in range(2)]
    table: tuple[np.ndarray | None, ...] = (None, None, None)
    if has_rope:
        angles = cases.random.uniform(0, 6.3, (rows, head_dim // 2))
        positions = cases.random.integers(0, rows, tokens).astype(np.int32)
        table = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), positions)
    results = [empty(x, dtype) for x in grads]
    of_weights = [None if w is None else empty(w, dtype) for w in weights]
    element_size = 4 if dtype == "float32" else 2
    num_bytes = C.qk_norm_rope_backward_workspace(tokens, head_dim, element_size)
    C.qk_norm_rope_backward(
        *(cases.gapped(store(x, dtype)) for x in grads),
        *(cases.gapped(store(x, dtype)) for x in inputs[:2]),
        *(None if w is None else store(w, dtype) for w in weights),
        *(*table, EPS, np.full(num_bytes // 4, np.nan, dtype=np.float32)),
        *(*results, *of_weights),
    )
    label = f"{dtype} {tokens} tokens, {counts} heads of {head_dim}"
    for part in range(2):
        of_x, of_weight = backward_oracles.norm_rope(
            grads[part], inputs[part], weights[part], *table, EPS
        )
        _judge(results[part], of_x, dtype, label)
        if of_weight is not None:
            _judge(of_weights[part], of_weight, dtype, f"weights of {label}")
    assert_bitwise_equal(results[2], store(grads[2], dtype), f"v of {label}")


def _judge(
    result: np.ndarray | None, want: backward_oracles.Gradient, dtype: str, label: str
) -> None:
    assert result is not None
    assert_close(
        read(result, dtype),
        want.value,
        magnitude=want.magnitude,
        dtype=dtype,
        correctly_rounded=None,
        label=label,
    )


OPS: dict[str, Callable[[Cases], None]] = {
    "rms_norm_backward": norms("rms_norm_backward"),
    "add_rms_norm_backward": norms("add_rms_norm_backward"),
    "qk_norm_rope_backward": heads,
    "silu_and_mul_backward": silu_and_mul,
}
