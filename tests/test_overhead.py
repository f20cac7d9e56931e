"""What a call costs on the host, against bounds that a busy machine keeps too."""

from __future__ import annotations

import pytest
import torch
from kernel_backends import Backend, emulated

from benchmarks import bench_overhead
from benchmarks.case import Settings

__all__ = ["emulated"]  # a fixture

CPU = torch.device("cpu")
# Microseconds: what is promised with a result buffer, for up to four tensors and for more.
FEW, MANY = 2.0, 5.0
PROMISED = {
    "rms_norm": FEW,
    "add_rms_norm": FEW,
    "rms_norm_add": FEW,
    "silu_and_mul": FEW,
    "qk_norm_rope": MANY,
    "qk_norm_rope_cache": MANY,
    "apply_rope": MANY,
    "flash_attn_with_kvcache": MANY,
    "flash_attn_func": MANY,
}
NOISE = 4  # other processes on the same cores, slower cores than those it was measured on


@pytest.mark.emulated
def test_calls_with_buffers_keep_to_their_budget(emulated: Backend) -> None:
    calls = bench_overhead.op_calls(CPU, torch.bfloat16)
    assert set(calls) == set(PROMISED)
    with torch.no_grad():
        for op, call in calls.items():
            times = bench_overhead.host_us(lambda c=call: c.buffered(emulated.ops), 20, 100)
            assert times[0] <= NOISE * PROMISED[op], f"{op}: {times[0]:.2f} us"


@pytest.mark.emulated
def test_every_contender_has_a_row(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(function: bench_overhead.Function, *_: int) -> list[float]:
        function()
        return [1.0]

    monkeypatch.setattr(bench_overhead, "host_us", once)
    rows = list(bench_overhead.run(Settings(device=CPU, quick=True)))
    assert {row.op for row in rows} == set(PROMISED)
    assert all(row.status == "ok" and row.suite == "overhead" for row in rows)
    of_norm = {row.contender for row in rows if row.op == "rms_norm"}
    assert {"exafuse, out=", "Library.define", "custom_op", "F.rms_norm"} <= of_norm


def test_without_kernels_a_row_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(device: torch.device) -> None:
        raise bench_overhead.BackendError("no kernels here")

    monkeypatch.setattr(bench_overhead, "backend_for", nothing)
    (row,) = bench_overhead.run(Settings(device=CPU))
    assert (row.status, row.reason) == ("unsupported", "no kernels here")
