"""The suite of whole models: the same answers as transformers before anything is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import exafuse
import pytest
import torch
from exafuse import reference
from exafuse.config import load_config
from exafuse.models.loading import model_class

from benchmarks import bench_models, model_configs, transformers_models
from benchmarks.case import Settings
from benchmarks.results import Ceilings, Row, finish

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, quick=True, dtype=torch.float32)


def plan(monkeypatch: pytest.MonkeyPatch, models: Any, **changes: Any) -> None:
    lengths = model_configs.lengths("cpu", True)
    lengths = dataclasses.replace(lengths, models=tuple(models), steps=2, **changes)
    monkeypatch.setattr(bench_models, "lengths", lambda *_: lengths)
    monkeypatch.setattr(bench_models, "_rounds", lambda call, steps, _: [float(steps)] * 3)


def rows_of(settings: Settings = SETTINGS) -> list[Row]:
    with torch.no_grad():
        return list(bench_models.run(settings))


@pytest.mark.parametrize("model", model_configs.SMALL, ids=lambda model: model.name)
def test_everything_measured_agrees_with_transformers(
    monkeypatch: pytest.MonkeyPatch, model: model_configs.BenchModel
) -> None:
    # 300 tokens fill the rings of sliding layers and wrap them.
    plan(monkeypatch, [model], prompts=(40,), decode=((2, 300),))
    rows = rows_of()
    ops = {row.op for row in rows}
    assert ops == {"prefill", "first_token", "decode"}
    assert any("image" in row.case for row in rows) == (model.image_grid is not None)
    for row in rows:
        if "compiled" in row.contender:
            assert (row.status, row.time_us) == ("unsupported", None)
            continue
        assert row.status == "ok", row
        assert row.time_us == (2.0 if row.op == "decode" else 1.0)  # calls timed together
        assert row.extra["tokens_per_s"] > 0
        if row.contender.startswith("transformers") and row.op != "first_token":
            assert row.error is not None
            assert row.error < 1e-5


def test_a_peer_with_other_logits_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, model_configs.SMALL[2:3], prompts=(), decode=((1, 40),))
    right = bench_models.random_kv
    monkeypatch.setattr(bench_models, "random_kv", lambda *args, **_: right(*args[:3], next(seeds)))
    seeds = iter(range(100))
    eager = next(row for row in rows_of() if row.contender == "transformers eager")
    assert (eager.status, eager.time_us) == ("wrong", None)
    assert "logits differ from exafuse's by" in eager.reason


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, model_configs.SMALL[2:3], prompts=(2000,), decode=((1, 40), (1, 5000)))

    def full(*_args: Any, **_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("of the cache")

    monkeypatch.setattr(bench_models, "filled_cache", full)
    prefill, short, long = rows_of()
    assert (prefill.status, prefill.reason) == ("unsupported", "the context of the model is 1024")
    assert (short.status, short.case) == ("out of memory", "1 x 1 at 40")
    assert (long.status, long.case) == ("unsupported", "1 x 1 at 5000")


def test_a_model_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, model_configs.SMALL[2:4])

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise exafuse.DoesNotFitError("the random weights need 64 GB, 24 GB are free")

    monkeypatch.setattr(bench_models.exafuse, "from_config", refuse)
    assert [(row.status, row.model) for row in rows_of()] == [
        ("out of memory", "small Llama"),
        ("out of memory", "small Qwen2"),
    ]


def test_transformers_works_on_the_memory_of_our_weights() -> None:
    model = model_configs.SMALL[1]
    ours = exafuse.from_config(model.config, dtype="float32", device="cpu")
    theirs = transformers_models._build(ours, model.config)
    places = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert {p.untyped_storage().data_ptr() for p in theirs.parameters()} <= places


def test_costs_of_a_model_counted_by_hand() -> None:
    """Llama-3-8B: 8.03e9 weights, of which the embedding is looked up."""
    config = next(m.config for m in model_configs.RELEASED if m.name == "Llama-3-8B")
    with torch.device("meta"):
        model = model_class(config := load_config(config))(config, reference)
    embedding = 128256 * 4096
    assert (
        bench_models.products(model) == 32 * (4096 * 6144 + 4096**2 + 3 * 4096 * 14336) + embedding
    )
    assert (
        bench_models.kv_bytes(model.to(torch.bfloat16), 8, 1000) == 8 * 1000 * 32 * 2 * 8 * 128 * 2
    )
    tokens = 100
    layers = bench_models.products(model) - embedding
    attention = 4 * 32 * 32 * 128 * (tokens * (tokens + 1) // 2)
    assert (
        bench_models.prefill_flops(model, tokens) == 2 * (tokens * layers + embedding) + attention
    )


def test_keys_outside_the_window_are_no_traffic() -> None:
    config = model_configs.SMALL[0].config  # three of four layers see 32 tokens
    model = exafuse.from_config(config, dtype="float32", device="cpu")
    token = 2 * 2 * 16 * 4
    assert bench_models.kv_bytes(model, 1, 500) == token * (3 * 32 + 500)
    pairs = 3 * (32 * 33 // 2 + 68 * 32) + 100 * 101 // 2
    products = bench_models.products(model) - 512 * 64
    assert (
        bench_models.prefill_flops(model, 100) == 2 * (100 * products + 512 * 64) + 4 * 64 * pairs
    )


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(monkeypatch, model_configs.SMALL[2:3], prompts=(), decode=())
    assert rows_of(dataclasses.replace(SETTINGS, profile=str(tmp_path))) == []
    trace, table = tmp_path / "small-llama-decode.json", tmp_path / "small-llama-decode.txt"
    assert '"traceEvents"' in trace.read_text()
    assert "aten::linear" in table.read_text() or "aten::mm" in table.read_text()


def test_variants_of_ours_are_no_peers() -> None:
    rows = [
        Row("models", "decode", "1 x 1", name, "ok", time_us=time, q1_us=time, q3_us=time)
        for name, time in (("exafuse", 5.0), ("exafuse, no graph", 4.0), ("transformers sdpa", 9.0))
    ]
    finish(rows, Ceilings(1.0, 1.0, 1.0))
    assert rows[0].best_peer == "transformers sdpa"
    assert rows[0].ratio == pytest.approx(1.8)


def test_released_configs_have_their_sizes() -> None:
    sizes = {
        model.name: load_config(model.config).num_parameters() / 1e9
        for model in model_configs.RELEASED
    }
    assert sizes == pytest.approx(
        {
            "EXAONE-4.0-32B": 32.0,
            "EXAONE-4.0-1.2B": 1.28,
            "EXAONE-4.5-33B": 33.6,
            "Llama-3-8B": 8.03,
            "Qwen2-7B": 7.62,
        },
        rel=0.03,
    )
