"""One token of every row at a time: each step launched from Python, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exafuse.generation import graphs
from exafuse.generation.call import Call
from exafuse.generation.output import GenerateOutput
from exafuse.generation.sampling import unusable_rows
from exafuse.generation.stopping import StopCheck, verdict


class Choice:
    """The newest token of every row and which rows go on, in tensors that stay where they are.

    Attributes:
        ids: int64 ``[batch]``.
        unfinished: bool ``[batch]``.
        unusable: bool ``[batch]``, running rows without a score to choose by.
        scores: fp32 ``[batch, vocab_size]`` that the newest ids were chosen by.
    """

    def __init__(self, call: Call) -> None:
        batch, device = call.prompt.ids.shape[0], call.model.device
        self._call, self._chain = call, call.score_chain()
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self.unusable = torch.zeros(batch, dtype=torch.bool, device=device)
        self.scores = torch.empty(0, device=device)

    def make(self, logits: Tensor, text: Tensor) -> None:
        """Choose from logits ``[batch, vocab_size]``; ``text`` int64 ``[batch, length so far]``."""
        call = self._call
        self.scores = scores = self._chain.scores(logits, text)
        self.unusable.copy_(unusable_rows(scores, call.do_sample) & self.unfinished)
        ids = call.draw.once(scores) if call.do_sample else scores.argmax(dim=-1)
        if call.pad_id is not None:
            ids = torch.where(self.unfinished, ids, call.pad_id)
        self.ids.copy_(ids)
        self._chain.record(self.ids)
        if call.settings.eos_token_ids:
            self.unfinished &= ~(self.ids[:, None] == call.eos_ids).any(dim=-1)


def decode(call: Call) -> GenerateOutput:
    """Answer a call without drafts.

    Raises:
        RuntimeError: a row without any finite score.
    """
    model, prompt, device = call.model, call.prompt, call.model.device
    batch, columns = prompt.ids.shape
    total, pad_id, draw = call.total, call.pad_id, call.draw
    ids = torch.empty(batch, total, dtype=torch.int64, device=device)
    ids[:, :columns] = prompt.ids
    check = StopCheck(batch, device, pad_id, call.streamer, call.stop_strings())
    choice = Choice(call)
    cache = model.new_cache(batch, call.reserved)
    if call.streamer is not None:
        call.streamer.put(prompt.ids.cpu())

    all_scores: tuple[Tensor, ...] | None = () if call.keep_scores else None
    length, surplus = columns, False
    with draw.noted():
        logits = model.next_logits(prompt.ids, cache, prompt.mask, call.progress, **call.media)
        choice.make(logits, ids[:, :length])
    del logits
    step = _make_step(call, cache, choice)
    while True:
        ids[:, length] = choice.ids
        length += 1
        if all_scores is not None:
            all_scores += (choice.scores.clone() if call.cuda_graph else choice.scores,)
        for criterion in call.criteria:
            done = verdict(criterion(ids[:, :length], all_scores), batch, device)
            choice.unfinished &= ~done
        check.send(choice.ids, choice.unfinished, choice.unusable)
        # The host looks at the step before while the device works on this one.
        surplus = length > columns + 1 and not check.next_report()
        if surplus or length == total:
            break
        with draw.noted():
            step(ids[:, :length])
    if surplus:  # the last step was queued before the host knew that all rows were done
        length -= 1
        if call.keep_cache:
            cache.crop(cache.get_seq_length() - 1)
        all_scores = all_scores[:-1] if all_scores is not None else None
        draw.revoke()
    else:
        check.next_report()
    sequences = ids if length == total else ids[:, :length].clone()
    if pad_id is not None:
        for row, new in check.ended_after.items():
            sequences[row, columns + new :] = pad_id
    return GenerateOutput(sequences, all_scores, cache if call.keep_cache else None)


def _make_step(call: Call, cache: Any, choice: Choice) -> Callable[[Tensor], None]:
    """What feeds the newest tokens and chooses those after them, given the text so far."""
    if call.cuda_graph:
        problem = graphs.problem(call)
        if not problem:
            return graphs.GraphStep(call, cache, choice.ids, lambda x: choice.make(x, call.no_text))
        graphs.say_once(problem)

    def step(text: Tensor) -> None:
        choice.make(call.model.next_logits(choice.ids[:, None], cache), text)

    return step
