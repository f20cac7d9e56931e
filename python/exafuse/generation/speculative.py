"""Generation with drafts: one call of the model verifies several proposed tokens of every row.

Greedy answers are those of one token at a time, up to the rounding of matrix products of another
shape; drawn ones have the same distribution. Rows of a batch advance by different numbers of
tokens; after each step every row of the cache is cut back to what was accepted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exafuse.batch import to_device
from exafuse.generation.acceptance import Decision, Drafts, OneRow, decide
from exafuse.generation.call import Call, DraftedModel
from exafuse.generation.drafts import check_kind, make_drafter
from exafuse.generation.output import DraftStats, GenerateOutput


def decode_with_drafts(call: Call, kind: str, num_draft_tokens: int) -> GenerateOutput:
    """Answer a call, drafting at most ``num_draft_tokens`` tokens of each row ahead.

    Raises:
        ValueError: a kind of drafting that the model does not offer, or settings that do not go
            together with drafts. Nothing has been computed then.
        RuntimeError: a row without any finite score.
    """
    model: DraftedModel = call.model
    prompt, device = call.prompt, model.device
    batch = prompt.ids.shape[0]
    check_kind(kind, model)
    _check(call, num_draft_tokens)
    drafter = make_drafter(kind, call, call.reserved + num_draft_tokens)
    rows = _Rows(call)
    chain = call.score_chain()
    cache = model.new_cache(batch, call.reserved + num_draft_tokens)
    if call.streamer is not None:
        call.streamer.put(prompt.ids.cpu())
    one_row = _one_row(call)

    last = None
    chunks = model.next_hidden(prompt.ids, cache, prompt.mask, call.progress, **call.media)
    for packing, embeds, states in chunks:
        drafter.read_prompt(packing, embeds, states)
        last = packing.last_states(states, last)
    assert last is not None  # a prompt has a token
    hidden = last[:, None]
    mark = cache.mark()
    drafts = Drafts.none(batch, device)
    while True:
        decision = decide(
            model.lm_head(hidden),
            drafts,
            chain,
            running=to_device(torch.tensor(rows.running), device),
            room=to_device(torch.tensor(rows.room), device),
            eos_ids=call.eos_ids,
            do_sample=call.do_sample,
            generator=call.draw.generator,
            one_row=one_row,
            keep_scores=call.keep_scores,
        )
        rows.take(decision, drafts)
        if rows.done:
            break
        cache.keep_after(mark, rows.fed)
        newest = to_device(torch.tensor([tokens[-1:] for tokens in rows.tokens]), device)
        drafts = Drafts.none(batch, device)
        if count := min(num_draft_tokens, max(rows.room) - 1):
            drafts = drafter.propose(count, chain, decision, hidden)
        feed = torch.cat((newest, drafts.ids), dim=1)
        ((packing, _, states),) = model.next_hidden(feed, cache)
        hidden = packing.pad(states)
    cache.keep_after(mark, rows.fed)
    scores = tuple(rows.scores[: rows.length]) if call.keep_scores else None
    return GenerateOutput(rows.sequences(), scores, cache, rows.stats(kind))


def _check(call: Call, num_draft_tokens: int) -> None:
    model, rows = call.model, call.prompt.ids.shape[0]
    if num_draft_tokens >= model.prefill_chunk:
        raise ValueError(
            f"num_draft_tokens: expected at most {model.prefill_chunk - 1} (the model's prefill "
            f"chunk less one), got {num_draft_tokens}"
        )
    for name, given in (
        ("logits_processor", call.processors),
        ("stopping_criteria", call.criteria),
    ):
        if given and rows > 1:
            raise ValueError(
                f"{name}, draft: expected a single row, got {rows}: with drafts the rows of a "
                "batch differ in length, and there are no ids [batch, length] to pass on; answer "
                "the rows one by one, or leave one of the two out"
            )
    if limit := call.rope_change(num_draft_tokens):
        raise ValueError(
            f"draft: RoPE of type {call.model.config.rope.rope_type!r} changes its frequencies "
            f"beyond {limit} positions, and so may the answer: prompt, answer and drafts come to "
            f"{call.end + num_draft_tokens}; expected at most {limit} (set max_new_tokens), or "
            "draft=None"
        )


def _one_row(call: Call) -> OneRow | None:
    """What the caller's own callables look at, if there are any."""
    if not call.processors and not call.criteria:
        return None
    columns = call.prompt.ids.shape[1]
    ids = call.prompt.ids.new_empty(1, call.total)
    ids[:, :columns] = call.prompt.ids
    return OneRow(ids, columns, call.criteria, () if call.keep_scores else None)


class _Rows:
    """The new tokens of each row, on the host, and which rows go on.

    A row that ends is padded; in a call that knows no padding it goes on, as every row must have
    as many tokens as the last one to end.
    """

    def __init__(self, call: Call):
        batch, columns = call.prompt.ids.shape
        self._call = call
        self._limit = call.total - columns
        self._strings = call.stop_strings()
        self._ended: list[int | None] = [None] * batch  # tokens of the rows that have ended
        self._streamed = 0
        self._counts = np.zeros(5, dtype=np.int64)  # of DraftStats
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.scores: list[Tensor] = []

    @property
    def running(self) -> list[bool]:
        """The rows that take more tokens."""
        goes_on = self._call.pad_id is None
        return [
            len(tokens) < self._limit and (ended is None or goes_on)
            for tokens, ended in zip(self.tokens, self._ended, strict=True)
        ]

    @property
    def room(self) -> list[int]:
        """Tokens that each row can still take; 0 where it does not run."""
        pairs = zip(self.tokens, self.running, strict=True)
        return [self._limit - len(tokens) if running else 0 for tokens, running in pairs]

    @property
    def fed(self) -> list[int]:
        """Tokens of each row that belong into the cache: all that count, but the newest."""
        length = self.length if self.done else self._limit
        return [max(min(len(tokens), length) - 1, 0) for tokens in self.tokens]

    @property
    def length(self) -> int:
        """New columns of the output, if no row brings more."""
        ends = zip(self.tokens, self._ended, strict=True)
        return max(len(tokens) if ended is None else ended for tokens, ended in ends)

    @property
    def done(self) -> bool:
        """Whether the output is complete."""
        pairs = zip(self.tokens, self._ended, strict=True)
        if any(ended is None and len(tokens) < self._limit for tokens, ended in pairs):
            return False
        return self._call.pad_id is not None or min(map(len, self.tokens)) >= self.length

    def take(self, decision: Decision, drafts: Drafts) -> None:
        """Append what a step brought, stream what is complete.

        RuntimeError if a running row had no finite score to choose by.
        """
        before, room, running = list(map(len, self.tokens)), self.room, self.running
        for row, new in enumerate(decision.tokens):
            kept = self._append(row, new, decision)
            if drafts.ids.shape[1] or before[row]:  # else the prompt's own step
                proposed = min(drafts.counts[row], room[row])
                accepted = min(decision.accepted[row], kept)
                self._counts[1:] += (running[row], proposed, accepted, kept)
        self._counts[0] += any(before)
        for j, scores in enumerate(decision.scores):
            for row, new in enumerate(decision.tokens):
                if j < min(len(new), len(self.tokens[row]) - before[row]):
                    column = before[row] + j
                    while len(self.scores) <= column:
                        self.scores.append(torch.zeros_like(scores))
                    self.scores[column][row] = scores[row]
        self._stream()

    def _append(self, row: int, new: list[int], decision: Decision) -> int:
        """Append a row's tokens as far as it goes; how many these were."""
        tokens = self.tokens[row]
        for j, token in enumerate(new):
            was_open = self._ended[row] is None
            if was_open and 0 <= decision.unusable[row] <= j:
                raise RuntimeError(
                    f"scores of rows [{row}] at new token {len(tokens) + 1}: expected finite ones, "
                    "got NaN or nothing above -inf; look at the dtype (float16 overflows) and at "
                    "the processors"
                )
            tokens.append(token)
            if not was_open:
                continue
            by_text = self._strings is not None and self._strings.completes(row, token)
            if by_text or (decision.ended[row] and j == len(new) - 1):
                self._ended[row] = len(tokens)
                if self._call.pad_id is not None:
                    return j + 1
        return len(new)

    def _stream(self) -> None:
        """Put the columns that every row has reached, each as the ids ``[batch]`` of one step."""
        if self._call.streamer is None:
            return
        pad = self._call.pad_id
        pairs = zip(self.tokens, self._ended, strict=True)
        open_rows = [len(tokens) for tokens, ended in pairs if ended is None or pad is None]
        ready = min(self.length, *open_rows) if open_rows else self.length
        for column in range(self._streamed, ready):
            ids = [row[column] if column < len(row) else (pad or 0) for row in self.tokens]
            self._call.streamer.put(torch.tensor(ids))
        self._streamed = max(self._streamed, ready)

    def sequences(self) -> Tensor:
        """int64 ``[batch, prompt + new]`` on the model's device."""
        length, pad = self.length, self._call.pad_id or 0
        new = [(tokens + [pad] * length)[:length] for tokens in self.tokens]
        return torch.cat((self._call.prompt.ids, torch.tensor(new).to(self._call.model.device)), 1)

    def stats(self, kind: str) -> DraftStats:
        """The figures of all steps after the prompt's."""
        steps, row_steps, drafted, accepted, new_tokens = self._counts.tolist()
        return DraftStats(kind, steps, row_steps, drafted, accepted, new_tokens)
