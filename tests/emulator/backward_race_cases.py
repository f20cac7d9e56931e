"""Random calls of the kernels that compute gradients, for race_cases.py."""

from __future__ import annotations

from collections.abc import Callable

import _C_emulated as C
import backward_oracles
import numpy as np
from numeric import assert_close

from emulator.race_arrays import Cases, empty, read, store

DTYPES = ("bfloat16", "float16", "float32")
# One hidden size or more for each way in which the kernels share out a row.
HIDDEN = (8, 16, 64, 264, 1024, 2056, 4096, 16392)
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
                assert_close(
                    read(result, dtype),
                    want.value,
                    magnitude=want.magnitude,
                    dtype=dtype,
                    correctly_rounded=None,
                    label=f"{op} {dtype} {rows} x {hidden}",
                )

    return run


OPS: dict[str, Callable[[Cases], None]] = {
    "rms_norm_backward": norms("rms_norm_backward"),
    "add_rms_norm_backward": norms("add_rms_norm_backward"),
}
