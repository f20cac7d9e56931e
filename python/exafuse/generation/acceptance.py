"""Which drafted tokens stand: decided position by position, on the device.

The model has scored a row's newest token and the k drafts after it in one call, so that the scores
at position j are right as long as the first j drafts are. Greedy choice accepts a draft that is the
model's own choice. A draw accepts draft d, which was drawn with probability q(d), with probability
min(1, p(d) / q(d)), and otherwise draws from max(p - q, 0): the token then has the distribution p
of a plain draw (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding"). The first token that is no draft ends the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exafuse.generation.sampling import ScoreChain, draw, draw_from, unusable_rows
from exafuse.generation.stopping import StoppingCriterion, verdict


@dataclass(frozen=True)
class Drafts:
    """Proposed tokens of every row.

    Attributes:
        ids: int64 ``[batch, k]`` on the device.
        counts: how many of them are proposals in each row; the others are filler.
        proposed: bool ``[batch, k]``, the same on the device; None = all are proposals.
        probs: k times fp32 ``[batch, vocab_size]``, what each was drawn from; empty where nothing
            was drawn.
    """

    ids: Tensor
    counts: list[int]
    proposed: Tensor | None = None
    probs: tuple[Tensor, ...] = ()

    @classmethod
    def none(cls, batch_size: int, device: torch.device) -> Drafts:
        """No draft in any row."""
        return cls(torch.empty(batch_size, 0, dtype=torch.int64, device=device), [0] * batch_size)

    def distribution(self, position: int, like: Tensor) -> Tensor:
        """fp32 ``[batch, vocab_size]``: what the drafts of a position were drawn from; zeros in
        rows without a proposal."""
        if self.probs:
            q = self.probs[position]
        else:
            q = torch.zeros_like(like).scatter(1, self.ids[:, position, None], 1.0)
        return q if self.proposed is None else q * self.proposed[:, position, None]


@dataclass(frozen=True)
class Decision:
    """What a step brings to each row; on the host, but for ``ids`` and ``scores``.

    Attributes:
        ids: int64 ``[batch, k + 1]`` on the device; a row's first ``len(tokens[row])`` count.
        tokens: the same, without what does not count.
        accepted: how many of them were drafts.
        ended: whether the last of them ends the row.
        unusable: position at which the row had no score to choose by, or -1.
        scores: fp32 ``[batch, vocab_size]`` of each position, on the device, if they were kept.
    """

    ids: Tensor
    tokens: list[list[int]]
    accepted: list[int]
    ended: list[bool]
    unusable: list[int]
    scores: tuple[Tensor, ...]


@dataclass
class OneRow:
    """The ids of a batch of one row on the device, for callables that want to see them.

    ``ids`` is int64 ``[1, total]``, of which ``length`` are there; ``scores`` of all new tokens, or
    None where they are not kept.
    """

    ids: Tensor
    length: int
    criteria: tuple[StoppingCriterion, ...]
    scores: tuple[Tensor, ...] | None

    def append(self, next_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the next token ``[1]``; bool ``[1]``, whether a criterion ends the row with it."""
        self.ids[:, self.length] = next_ids
        self.length += 1
        if self.scores is not None:
            self.scores += (scores,)
        ended = torch.zeros(1, dtype=torch.bool, device=self.ids.device)
        for criterion in self.criteria:
            ended |= verdict(criterion(self.ids[:, : self.length], self.scores), 1, ended.device)
        return ended


def decide(
    logits: Tensor,
    drafts: Drafts,
    chain: ScoreChain,
    *,
    running: Tensor,
    room: Tensor,
    eos_ids: Tensor,
    do_sample: bool,
    generator: torch.Generator | None,
    one_row: OneRow | None = None,
    keep_scores: bool = False,
) -> Decision:
    """Judge the drafts of a step; waits for the device once, and with ``one_row`` at every token.

    Args:
        logits: ``[batch, k + 1, vocab_size]``, after the newest token and after each draft.
        drafts: k to a row.
        chain: from logits to scores; it has recorded all tokens so far and records the new ones.
        running: bool ``[batch]``; the other rows get nothing.
        room: int64 ``[batch]``, most tokens that a running row can take, at least 1.
        eos_ids: int64; each ends a row.
        do_sample, generator: whether and with what to draw.
        one_row: for a batch of one whose callables see each position as they would without drafts:
            in order, once, and only where it is reached.
        keep_scores: put them into the result.
    """
    batch, positions = logits.shape[:2]
    device = logits.device
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    accepted, unusable = counts.clone(), counts - 1
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    alive, ids, kept = running, [], []
    for j in range(positions):
        prefix = drafts.ids[:0] if one_row is None else one_row.ids[:, : one_row.length]
        scores = chain.scores(logits[:, j], prefix)
        unusable = torch.where(
            alive & (unusable < 0) & unusable_rows(scores, do_sample), j, unusable
        )
        last = j == positions - 1
        if last:
            next_ids = draw(scores, generator) if do_sample else scores.argmax(dim=-1)
            is_draft = torch.zeros_like(alive)
        elif do_sample:
            next_ids, is_draft = _draw_or_accept(scores, drafts, j, generator)
        else:
            next_ids = scores.argmax(dim=-1)
            is_draft = next_ids == drafts.ids[:, j]
            if drafts.proposed is not None:
                is_draft &= drafts.proposed[:, j]
        chain.record(next_ids, alive)
        ids.append(next_ids)
        if keep_scores:
            kept.append(scores)
        counts, accepted = counts + alive, accepted + (alive & is_draft)
        here = (next_ids[:, None] == eos_ids).any(dim=-1)
        if one_row is not None:
            here = here | one_row.append(next_ids, scores)
        ended = ended | (alive & here)
        alive = alive & is_draft & ~here & (counts < room)
        if one_row is not None and not bool(alive):
            break
    columns = torch.stack(ids, dim=1)
    report = torch.stack((counts, accepted, ended.long(), unusable), dim=1)
    host = torch.cat((report, columns), dim=1).tolist()
    return Decision(
        ids=columns,
        tokens=[row[4 : 4 + row[0]] for row in host],
        accepted=[row[1] for row in host],
        ended=[bool(row[2]) for row in host],
        unusable=[row[3] for row in host],
        scores=tuple(kept),
    )


def _draw_or_accept(
    scores: Tensor, drafts: Drafts, position: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Next ids int64 ``[batch]``, distributed as softmax(scores), and which are the drafts."""
    p = scores.softmax(dim=-1)
    q = drafts.distribution(position, p)
    draft_ids = drafts.ids[:, position]
    p_draft, q_draft = (t.gather(1, draft_ids[:, None]).squeeze(1) for t in (p, q))
    chance = torch.rand(p.shape[0], device=p.device, generator=generator)
    accepted = chance * q_draft < p_draft
    if drafts.proposed is not None:
        accepted &= drafts.proposed[:, position]
    rest = (p - q).clamp(min=0)
    # Where p and q are one distribution a rejection is due to rounding alone.
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    return torch.where(accepted, draft_ids, draw_from(rest, generator)), accepted
