"""What `exafuse info` says of kernels that ran on GPUs."""

from __future__ import annotations

import json

import pytest
from exafuse.cli import info, info_probes


def entry(changes=None, **checks):
    """A kernel's entry in a ledger: all passed, but for what is given."""
    verdicts = dict.fromkeys(("tests", "memcheck", "racecheck"), "passed") | checks
    found = {name: {"verdict": verdict, "cases": 1200} for name, verdict in verdicts.items()}
    return {"hash": "ab" * 32, "date": "2026-11-21", "checks": found} | (changes or {})


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    """Writes the ledger of a GPU where an installed package keeps it."""
    hashes = f"rms_norm={'ab' * 32},silu_and_mul={'cd' * 32}"
    build = {"archs": "80-real", "kernel_hashes": hashes}
    monkeypatch.setattr(info_probes, "_build_info", lambda: build)
    monkeypatch.setattr(info_probes, "PACKAGE_FOLDER", tmp_path / "python" / "exafuse")

    def write(gpu, text, folder="python/exafuse/benchmarks"):
        file = tmp_path / folder / "results" / gpu / "ledger.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text if isinstance(text, str) else json.dumps(text))

    return write


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (entry(), "verified on NVIDIA H200 (1200 cases, 2026-11-21)"),
        (
            entry(racecheck="absent"),
            "verified on NVIDIA H200 (1200 cases, 2026-11-21, without racecheck)",
        ),
        (entry(memcheck="failed"), "FAILED on NVIDIA H200 (memcheck; 2026-11-21)"),
        (entry(tests="not run"), "run on NVIDIA H200 not finished (2026-11-21)"),
        (entry({"hash": "ef" * 32}), "changed since its run on NVIDIA H200 (2026-11-21)"),
    ],
)
@pytest.mark.parametrize("folder", ["python/exafuse/benchmarks", "benchmarks"])
def test_ledger_of_gpu_runs(ledger, kernel, text, folder):
    ledger("nvidia-h200", {"gpu": "NVIDIA H200", "kernels": {"rms_norm": kernel}}, folder)
    rows = info.report()["ops"]["kernels"]
    assert rows == {"rms_norm": text, "silu_and_mul": "compiled, not yet verified on a GPU"}
    assert f"rms_norm: {text}" in info.render(info.report())


def test_ledgers_of_two_gpus(ledger):
    ledger("nvidia-a100", {"gpu": "NVIDIA A100", "kernels": {"rms_norm": entry()}})
    ledger("nvidia-h200", {"gpu": "NVIDIA H200", "kernels": {"rms_norm": entry()}})
    text = info.report()["ops"]["kernels"]["rms_norm"]
    assert [part.split(" (")[0] for part in text.split("; ")] == [
        "verified on NVIDIA A100",
        "verified on NVIDIA H200",
    ]


@pytest.mark.parametrize("text", ["{", "[]", "{}", {"gpu": "x", "kernels": {"rms_norm": {}}}])
def test_ledger_that_is_none(ledger, text):
    ledger("nvidia-h200", text)
    error = info.report()["ops"]["kernels"]["error"]
    assert "ledger.json: expected a ledger of GPU runs" in error
