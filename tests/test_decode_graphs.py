"""``generate(cuda_graph=True)``: the step of fixed buffers, its capture and its replays.

Without a GPU, recorded_graph.py stands in for the graph: it replays operators and kernels, not
Python.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import exafuse
import pytest
import tiny_models
import torch
from exafuse.generation import graphs
from exafuse.generation.generate import GenerationConfig
from exafuse.models import decoder
from exafuse.ops.front_door import emulator_problem
from generation_pair import FAMILIES, left_padded, prompt
from host_reads import HostReads
from recorded_graph import RecordedGraphs
from scripted_model import ScriptedModel

emulated = [
    pytest.mark.emulated,
    pytest.mark.skipif(bool(emulator_problem()), reason=emulator_problem()),
]
BACKENDS = [pytest.param("emulated", marks=emulated), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_said", set())


def model_of(family: str, folder: Path, backend: str, **overrides: Any) -> Any:
    theirs = tiny_models.build(family, seed=5, **FAMILIES[family], **overrides)
    tiny_models.save(theirs, folder)
    device = "cuda" if backend == "cuda" else "cpu"
    return exafuse.from_pretrained(
        folder, backend=backend, dtype="bfloat16", device=device, progress=False
    )


def recorded(monkeypatch: pytest.MonkeyPatch, model: Any) -> RecordedGraphs | None:
    """Makes graphs of the model's steps possible on a CPU; None on a GPU, where they are."""
    if model.device.type == "cuda":
        return None
    stand_in = RecordedGraphs(model.backend.rms_norm.__self__)
    monkeypatch.setattr(graphs, "capture", stand_in.capture)
    monkeypatch.setattr(graphs, "device_problem", lambda _: "")
    return stand_in


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7},
    "drawn": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    "private": {"do_sample": True, "seed": 11, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", CALLS)
def test_replayed_steps_give_the_same_answer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    family: str,
    kind: str,
) -> None:
    """Ragged rows, windows that slide past their edge, marks of penalties, draws."""
    model = model_of(family, tmp_path, backend)
    stand_in = recorded(monkeypatch, model)
    ids, mask = left_padded()
    call = {
        "attention_mask": mask,
        "max_new_tokens": 14,
        "generation_config": GenerationConfig(pad_token_id=0),
        "return_dict_in_generate": True,
        "output_scores": True,
        "cache_implementation": "static",  # the same launches, so the same bits
        **CALLS[kind],
    }
    torch.manual_seed(1)
    plain = model.generate(ids, **call)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    replayed = model.generate(ids, cuda_graph=True, **call)
    assert torch.equal(plain.sequences, replayed.sequences)
    assert len(plain.scores) == len(replayed.scores) == 14
    for ours, theirs in zip(replayed.scores, plain.scores, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), after)
    cache, expected = replayed.past_key_values, plain.past_key_values
    assert (cache.lengths, cache.seen) == (expected.lengths, expected.seen)
    assert cache.num_positions == expected.num_positions
    assert torch.equal(cache.seqlens, expected.seqlens)
    assert torch.equal(cache.next_positions, expected.next_positions)
    assert not caplog.records
    if stand_in is not None:
        # The prompt gives the first token, a step launched from Python the second.
        assert (stand_in.captures, stand_in.replays) == (1, 11)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_conversation_goes_on_from_the_cache_of_a_replayed_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = model_of("exaone4", tmp_path, backend)
    recorded(monkeypatch, model)
    ids = prompt(2, 7)
    outputs = [
        model.generate(
            ids, max_new_tokens=9, cuda_graph=graph, return_dict_in_generate=True, seed=3
        )
        for graph in (False, True)
    ]
    more = prompt(2, 4).to(model.device)
    logits = [
        model(more, past_key_values=output.past_key_values).logits.float() for output in outputs
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(logits[0], logits[1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_end_at_their_eos_and_the_surplus_step_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = model_of("llama", tmp_path, backend)
    recorded(monkeypatch, model)
    ids = prompt(3, 5)
    free = model.generate(ids, max_new_tokens=12, cache_implementation="static")
    eos = [int(free[0, 5 + 3]), int(free[1, 5 + 6]), int(free[2, 5 + 5])]
    call = {"max_new_tokens": 40, "eos_token_id": eos, "return_dict_in_generate": True}
    plain = model.generate(ids, cache_implementation="static", **call)
    replayed = model.generate(ids, cuda_graph=True, **call)
    assert plain.sequences.shape[1] < 5 + 12 + 1
    assert torch.equal(plain.sequences, replayed.sequences)
    assert replayed.past_key_values.lengths == plain.past_key_values.lengths


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_a_step_reads_nothing_and_keeps_its_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    model = model_of("exaone4", tmp_path, backend)
    reads = HostReads(monkeypatch)
    cache = model.new_cache(2, 64)
    model.next_logits(prompt(2, 6), cache)
    rotary = model.fixed_rotary(cache, 64)
    ids = torch.tensor([3, 4])

    def places() -> list[int]:
        buffers = [cache.seqlens, cache.next_positions]
        buffers += [tensor for layer in cache.layers for tensor in (layer.k, layer.v)]
        return [tensor.data_ptr() for tensor in buffers]

    before = places()
    reads.counts.clear()
    with reads:
        model.fixed_logits(ids, cache, rotary)
        model.fixed_logits(ids, cache, rotary)
    assert not reads.counts
    assert places() == before
    assert cache.seqlens.tolist() == [8, 8]


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_the_stand_in_notices_a_buffer_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """What would go wrong on a GPU has to go wrong here."""
    model = model_of("llama", tmp_path, backend)
    recorded(monkeypatch, model)
    right = decoder.fixed_step

    def wrong(cache: Any, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        step = right(cache, cos, sin)
        cache.next_positions -= 1
        cache.next_positions = cache.next_positions + 1
        return step

    call = {"max_new_tokens": 24, "return_dict_in_generate": True, "cuda_graph": True}
    expected = model.generate(prompt(2, 5), **call).past_key_values.next_positions
    monkeypatch.setattr(decoder, "fixed_step", wrong)
    got = model.generate(prompt(2, 5), **call).past_key_values.next_positions
    assert expected.tolist() == [28, 28]
    assert not torch.equal(got, expected)


def test_a_step_that_cannot_be_captured_runs_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama", tmp_path, "reference")
    monkeypatch.setattr(graphs, "device_problem", lambda _: "")

    def refused(step: Any, generator: Any, device: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refused)
    expected = model.generate(prompt(2, 5), max_new_tokens=8, seed=1)
    for _ in range(2):
        assert torch.equal(
            model.generate(prompt(2, 5), max_new_tokens=8, seed=1, cuda_graph=True), expected
        )
    (record,) = caplog.records
    assert "cannot be captured: operation not permitted" in record.getMessage()


def stopped(ids: torch.Tensor, scores: Any) -> bool:
    return ids.shape[1] >= 9


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("the model is on the cpu", {}),
        ("Python that runs at every token", {"stopping_criteria": [stopped]}),
        ("Python that runs at every token", {"logits_processor": [lambda ids, scores: scores]}),
        ("with drafts", {"draft": "prompt_lookup"}),
    ],
)
def test_what_rules_a_graph_out_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, reason: str, call: dict[str, Any]
) -> None:
    model = model_of("llama", tmp_path, "reference")
    ids = prompt(1, 5)
    caplog.set_level(logging.WARNING)
    expected = model.generate(ids, max_new_tokens=8, **call)
    for _ in range(2):
        got = model.generate(ids, max_new_tokens=8, cuda_graph=True, **call)
        assert torch.equal(got, expected)
    (record,) = caplog.records
    assert record.getMessage().startswith("cuda_graph: every step is launched from Python")
    assert reason in record.getMessage()


def test_frequencies_that_change_rule_a_graph_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "device_problem", lambda _: "")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = model_of(
        "llama", tmp_path, "reference", rope_parameters=rope, max_position_embeddings=16
    )
    limit = model.config.max_position_embeddings
    model.generate(prompt(1, 5), max_new_tokens=limit, cuda_graph=True, max_length=None)
    assert f"change beyond {limit} positions" in caplog.text


def test_other_models_go_without(caplog: pytest.LogCaptureFixture) -> None:
    model = ScriptedModel([[11, 12, 13]])
    out = model.generate([1], max_new_tokens=3, cuda_graph=True)
    assert out.tolist() == [[1, 11, 12, 13]]
    assert model.caches == [(1, 4)]
    assert "ScriptedModel has no step of fixed buffers" in caplog.text
