"""The decoding loop itself, on a model that answers by script: no waits, leftovers or hangs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from exafuse.generation.stopping import StopCheck
from generation_pair import FAMILIES, Pair
from host_reads import HostReads
from scripted_model import Collector, ScriptedModel
from torch import Tensor


def test_the_step_after_the_end_is_cut() -> None:
    model = ScriptedModel([[11, 12, 13, 7, 14, 15]])
    streamer = Collector()
    out = model.generate([1, 2, 3], eos_token_id=7, max_new_tokens=20, streamer=streamer)
    assert out.tolist() == [[1, 2, 3, 11, 12, 13, 7]]
    assert streamer.steps == [[11], [12], [13], [7]]
    assert len(model.calls) == 5, "one step more than tokens: the flag is read one step late"
    assert [call.shape[1] for call in model.calls] == [3, 1, 1, 1, 1]


def test_no_step_is_wasted_when_the_length_ends_it() -> None:
    model = ScriptedModel([[11, 12, 13]])
    assert model.generate([1], max_new_tokens=3).tolist() == [[1, 11, 12, 13]]
    assert len(model.calls) == 3
    model = ScriptedModel([[11, 12, 7]])
    assert model.generate([1], max_new_tokens=3, eos_token_id=7).tolist() == [[1, 11, 12, 7]]
    assert len(model.calls) == 3


def test_the_returned_cache_holds_all_but_the_last_token() -> None:
    for kwargs in ({"max_new_tokens": 3}, {"max_new_tokens": 20, "eos_token_id": 7}):
        model = ScriptedModel([[11, 12, 7, 13]])
        out = model.generate([1, 2], return_dict_in_generate=True, **kwargs)
        assert out.sequences.tolist() == [[1, 2, 11, 12, 7]]
        assert out.past_key_values.get_seq_length() == 4


def test_rows_are_padded_after_their_eos() -> None:
    model = ScriptedModel([[7, 20, 21, 22], [11, 8, 23, 24], [11, 12, 13, 8]])
    out = model.generate([[1], [2], [3]], max_new_tokens=9, eos_token_id=[7, 8])
    assert out.tolist() == [[1, 7, 7, 7, 7], [2, 11, 8, 7, 7], [3, 11, 12, 13, 8]]
    assert model.calls[2].tolist() == [[7], [8], [12]], "finished rows are fed their padding"


class Silent:
    """A streamer that does not look at what it is given."""

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"

    def end(self) -> None:
        pass


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_no_step_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, batch: int, do_sample: bool
) -> None:
    """From the second step on, nothing reads a tensor's value on the host."""
    reads = HostReads(monkeypatch)

    class Watched(ScriptedModel):
        def next_logits(self, *args, **kwargs):
            if len(self.calls) == 1:
                reads.counts.clear()
            return super().next_logits(*args, **kwargs)

    warpers = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01} if do_sample else {}
    model = Watched([[*range(20, 40)]] * batch)
    with reads:
        out = model.generate(
            [[1, 2, 3]] * batch,
            do_sample=do_sample,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            max_new_tokens=20,
            eos_token_id=[5, 6],
            streamer=Silent(),
            logits_processor=[lambda ids, scores: scores + 0.1],
            stopping_criteria=[lambda ids, scores: ids[:, -1] == 4],
            **warpers,
        )
        assert reads.counts == Counter()
        # The counter does see what it is there for.
        torch.multinomial(torch.ones(3), 1)
        assert bool(out.any())
        assert float(out.max()) > 0
        seen = {"multinomial": 1, "__bool__": 1, "__float__": 1, "_local_scalar_dense": 2}
        assert seen.items() <= reads.counts.items(), reads.counts
    assert len(model.calls) == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_of_a_real_model_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """Layers, rings and the cache of a ragged batch too, once the prompt is in."""
    model = Pair(family, tmp_path).ours
    reads = HostReads(monkeypatch)
    next_logits, steps = model.next_logits, []

    def watched(*args, **kwargs):
        if len(steps) == 1:
            reads.counts.clear()
        steps.append(1)
        return next_logits(*args, **kwargs)

    monkeypatch.setattr(model, "next_logits", watched)
    # The plain PyTorch ops do read lengths; the kernels that take their place never do.
    monkeypatch.setattr(model, "backend", reads.not_counting(model.backend))
    with reads:
        config = {"pad_token_id": 0, "eos_token_id": 5}
        rows = [[11, 12, 13], [14, 15, 16, 17, 18, 19, 20, 21]]
        model.generate(rows, max_new_tokens=9, generation_config=config, streamer=Silent())
        assert reads.counts == Counter()
    assert len(steps) == 9


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu() -> None:
    """Torch itself raises on any operation that would block after the first step."""

    class Watched(ScriptedModel):
        def next_logits(self, *args, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if self.calls else "default")
            return super().next_logits(*args, **kwargs)

    script = [[*range(20, 40)], [*range(30, 35), 5, *range(30, 44)]]
    for do_sample in (False, True):
        outputs = []
        for device in ("cuda", "cpu"):
            model = Watched(script, device=device)
            streamer = Collector()
            try:
                out = model.generate(
                    [[1, 2, 3]] * 2,
                    do_sample=do_sample,
                    top_k=1 if do_sample else None,
                    max_new_tokens=30,
                    eos_token_id=[5, 39],
                    streamer=streamer,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
            outputs.append((out.tolist(), streamer.steps, len(model.calls)))
        assert outputs[0] == outputs[1]


def test_both_slots_of_the_stop_check_are_independent() -> None:
    check = StopCheck(2, torch.device("cpu"), pad_token_id=None, streamer=(seen := Collector()))
    seen.prompt = [[0]]
    on, off = torch.tensor([True, True]), torch.tensor([False, False])
    check.send(torch.tensor([1, 2]), on, off)
    check.send(torch.tensor([3, 4]), off, off)
    assert check.next_report() is True
    check.send(torch.tensor([5, 6]), off, off)
    assert check.next_report() is False
    assert seen.steps == [[1, 2], [3, 4]]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_bad_logits_are_an_error_not_a_hang(do_sample: bool, bad: float, step: int) -> None:
    model = ScriptedModel([[11] * 5, [12] * 5])
    model.logits[step, 1] = bad
    streamer = Collector()
    with pytest.raises(RuntimeError, match=rf"scores of rows \[1\] at new token {step + 1}"):
        model.generate([[1], [2]], do_sample=do_sample, max_new_tokens=5, streamer=streamer)
    assert streamer.ended == 1
    assert len(streamer.steps) == step, "the token chosen from nothing is not shown"


def test_bad_logits_of_a_finished_row_do_no_harm() -> None:
    model = ScriptedModel([[7, 1, 1, 1], [11, 12, 13, 14]])
    model.logits[1:, 0] = math.nan
    out = model.generate([[1], [2]], eos_token_id=7, max_new_tokens=4)
    assert out.tolist() == [[1, 7, 7, 7, 7], [2, 11, 12, 13, 14]]


def test_everything_masked_by_a_processor_is_an_error() -> None:
    model = ScriptedModel([[11, 12]])
    with pytest.raises(RuntimeError, match="expected finite ones, got NaN or nothing above -inf"):
        model.generate(
            [1], max_new_tokens=2, logits_processor=[lambda ids, s: torch.full_like(s, -math.inf)]
        )


class Impatient(Collector):
    """Presses Ctrl-C at the nth call of ``put`` (the prompt is the first)."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def put(self, value: Tensor) -> None:
        super().put(value)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 2, 4])
def test_interrupt_ends_the_streamer_and_leaves_the_model_usable(at: int) -> None:
    model = ScriptedModel([[11, 12, 13, 14, 15, 16]])
    expected = model.generate([1, 2], max_new_tokens=6).tolist()
    streamer = Impatient(at)
    with pytest.raises(KeyboardInterrupt):
        model.generate([1, 2], max_new_tokens=6, streamer=streamer)
    assert streamer.ended == 1
    assert len(streamer.steps) == at - 1
    assert model.generate([1, 2], max_new_tokens=6).tolist() == expected


def test_streamer_is_ended_when_the_call_is_refused() -> None:
    """A thread that reads from the streamer must not wait forever for a call that was wrong."""
    streamer = Collector()
    with pytest.raises(ValueError, match="temperature"):
        ScriptedModel([[1]]).generate([1], temperature=0.0, streamer=streamer)
    assert (streamer.prompt, streamer.ended) == ([], 1)


def test_streamer_gets_the_prompt_first() -> None:
    streamer = Collector()
    ScriptedModel([[11, 12], [13, 14]]).generate(
        [[1, 2], [3, 4]], max_new_tokens=2, streamer=streamer
    )
    assert streamer.prompt == [[1, 2], [3, 4]]
    assert streamer.steps == [[11, 13], [12, 14]]
    assert streamer.ended == 1


def test_progress_reports_the_prompt_only() -> None:
    seen: list[tuple[int, int]] = []
    ScriptedModel([[11, 12, 13]]).generate(
        [1, 2, 3, 4], max_new_tokens=3, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 4)]


def test_size_of_the_cache() -> None:
    model = ScriptedModel([[1]], context=50_000)
    model.generate([1, 2, 3], max_new_tokens=5, eos_token_id=1)
    model.generate([1, 2, 3], max_new_tokens=40_000, eos_token_id=1)
    model.generate([1, 2, 3], max_new_tokens=40_000, eos_token_id=1, cache_implementation="static")
    assert model.caches == [(1, 8), (1, 1027), (1, 40_003)]
