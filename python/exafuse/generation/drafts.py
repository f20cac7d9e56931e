"""Where drafted tokens come from: the model's own head for them, or the text so far."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from exafuse.batch import Packing
from exafuse.cache_columns import Mark
from exafuse.generation.acceptance import Decision, Drafts
from exafuse.generation.call import Call
from exafuse.generation.sampling import ScoreChain, draw

DRAFT_KINDS = ("mtp", "prompt_lookup")
_LONGEST_NGRAM = 3


class Drafter(Protocol):
    """Proposes tokens after each step."""

    kind: str

    def read_prompt(self, packing: Packing, embeds: Tensor, hidden: Tensor) -> None:
        """Take a chunk of the prompt: packed ``[num_tokens, hidden_size]``, what went into the
        first layer and what came out of the last norm."""

    def propose(self, count: int, chain: ScoreChain, decision: Decision, hidden: Tensor) -> Drafts:
        """At most ``count`` (>= 1) tokens to follow those of ``decision`` in every row.

        ``hidden [batch, positions, hidden_size]``: the states that ``decision`` was made from.
        ``chain`` has recorded its tokens.
        """


def check_kind(kind: str, model: Any) -> None:
    """Raise ValueError unless ``draft=`` names a way of drafting that the model has."""
    if kind not in DRAFT_KINDS:
        kinds = " or ".join(map(repr, DRAFT_KINDS))
        raise ValueError(f"draft: expected None, {kinds}, got {kind!r}")
    if kind == "mtp" and getattr(model, "mtp", None) is None:
        raise ValueError(
            "draft: 'mtp' needs a multi-token prediction head (weights mtp.*), and this "
            f"{model.config.model_type} model has none; use draft='prompt_lookup', or, if the "
            "checkpoint has the head, load it without mtp=False"
        )


def make_drafter(kind: str, call: Call, max_length: int) -> Drafter:
    """The drafter of a kind that :func:`check_kind` has let pass; if it needs a cache, one made for
    ``max_length`` tokens a row."""
    if kind == "mtp":
        return MtpDrafter(call, max_length)
    mask, rows = call.prompt.mask, call.prompt.ids.tolist()
    if mask is not None:
        padding = (mask == 0).sum(1).tolist()
        rows = [row[n:] for row, n in zip(rows, padding, strict=True)]
    return PromptLookup(rows, call.model.device)


class MtpDrafter:
    """Drafts by the model's multi-token prediction head, one after the other.

    The head's cache has an entry for every token that another one follows. Entries of drafts, made
    from the head's own hidden states, are forgotten, and made again from the model's once those are
    there.
    """

    kind = "mtp"

    def __init__(self, call: Call, max_length: int):
        self._model: Any = call.model
        self._do_sample, self._generator = call.do_sample, call.draw.generator
        batch = call.prompt.ids.shape[0]
        chunk = self._model.prefill_chunk
        self._cache = self._model.mtp.new_cache(batch, max_length, chunk)
        self._mark: Mark | None = None
        self._entries = [0] * batch  # of each row after the mark, drafts not counted
        self._before: tuple[Tensor, Tensor] | None = None  # last hidden state and mask of a chunk

    def read_prompt(self, packing: Packing, embeds: Tensor, hidden: Tensor) -> None:
        """See :class:`Drafter`."""
        embeds, hidden = packing.pad(embeds), packing.pad(hidden)
        mask = packing.mask
        if mask is None:
            mask = torch.ones(packing.batch, packing.columns, dtype=torch.bool)
        before, self._before = self._before, (hidden[:, -1:], mask[:, -1:])
        # Each state goes with the next token's embedding: a column further to the right.
        hidden, mask = hidden[:, :-1], mask[:, :-1]
        if before is None:
            embeds = embeds[:, 1:]
        else:
            hidden = torch.cat((before[0], hidden), dim=1)
            mask = torch.cat((before[1], mask), dim=1)
        if not bool(mask.any()):
            return
        pairs = Packing.of(packing.batch, mask.shape[1], mask, hidden.device)
        self._advance(pairs.pack(embeds), pairs.pack(hidden), pairs)

    def propose(self, count: int, chain: ScoreChain, decision: Decision, hidden: Tensor) -> Drafts:
        """See :class:`Drafter`."""
        ids = decision.ids
        batch, columns = ids.shape
        if self._mark is None:
            self._mark = self._cache.mark()
        self._cache.keep_after(self._mark, self._entries)
        packing = Packing.of(batch, columns, None, ids.device)
        embed = self._model.text.embed_tokens
        # The positions that were not reached go along: one shape for all rows, cut off below.
        out = self._advance(embed(ids).flatten(0, 1), hidden[:, :columns].flatten(0, 1), packing)
        new = [len(tokens) for tokens in decision.tokens]
        self._entries = [a + b for a, b in zip(self._entries, new, strict=True)]
        self._cache.keep_after(self._mark, self._entries)
        last = torch.tensor([max(n - 1, 0) for n in new]).to(ids.device)
        state = packing.pad(out)[torch.arange(batch, device=ids.device), last]

        chain = chain.fork()
        single = Packing.of(batch, 1, None, ids.device)
        drafted: list[Tensor] = []
        probs: list[Tensor] = []
        for i in range(count):
            if i:
                state = self._advance(embed(drafted[-1]), state, single)
            scores = chain.scores(self._model.lm_head(state), ids)
            if self._do_sample:
                probs.append(scores.softmax(dim=-1))
                drafted.append(draw(scores, self._generator))
            else:
                drafted.append(scores.argmax(dim=-1))
            chain.record(drafted[-1])
        return Drafts(torch.stack(drafted, dim=1), [count] * batch, probs=tuple(probs))

    def _advance(self, embeds: Tensor, hidden: Tensor, packing: Packing) -> Tensor:
        model = self._model
        out: Tensor = model.mtp.advance(
            embeds, hidden, packing, self._cache, model.rotary, model.backend
        )
        return out


class PromptLookup:
    """Drafts what followed the last occurrence of the newest tokens, in the prompt or the answer.

    The longest of the last three, two or one tokens that occurred before decide. A match that
    reaches the end of the text goes on with the drafts themselves.
    """

    kind = "prompt_lookup"

    def __init__(self, rows: list[list[int]], device: torch.device):
        self._device = device
        self._rows: list[list[int]] = [[] for _ in rows]
        # By n-gram: the position after its latest occurrence that something follows.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in rows]
        self._extend(rows)

    def read_prompt(self, packing: Packing, embeds: Tensor, hidden: Tensor) -> None:
        """See :class:`Drafter`: the ids are all there is to know."""

    def propose(self, count: int, chain: ScoreChain, decision: Decision, hidden: Tensor) -> Drafts:
        """See :class:`Drafter`."""
        self._extend(decision.tokens)
        found = [self._continuation(row, count) for row in range(len(self._rows))]
        counts = [len(tokens) for tokens in found]
        width = max(counts)
        if width == 0:
            return Drafts.none(len(found), self._device)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in found])
        if min(counts) == width:
            return Drafts(ids.to(self._device), counts)
        proposed = torch.arange(width) < torch.tensor(counts)[:, None]
        return Drafts(ids.to(self._device), counts, proposed.to(self._device))

    def _extend(self, tokens: list[list[int]]) -> None:
        for ids, after, new in zip(self._rows, self._after, tokens, strict=True):
            for token in new:
                for n in range(1, min(_LONGEST_NGRAM, len(ids)) + 1):
                    after[tuple(ids[-n:])] = len(ids)
                ids.append(token)

    def _continuation(self, row: int, count: int) -> list[int]:
        ids, after = self._rows[row], self._after[row]
        for n in range(min(_LONGEST_NGRAM, len(ids)), 0, -1):
            start = after.get(tuple(ids[-n:]))
            if start is not None:
                period = len(ids) - start
                return [ids[start + i % period] for i in range(count)]
        return []
