"""What ``generate(return_dict_in_generate=True)`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class DraftStats:
    """How drafting went, summed over the rows of a call.

    Attributes:
        kind: "mtp" or "prompt_lookup".
        steps: calls of the model after the prompt; each verifies the drafts of every row.
        row_steps: the same counted for each row that was still running.
        drafted: tokens proposed to those rows.
        accepted: how many of them became tokens of the answer.
        new_tokens: tokens that the steps brought: those accepted, and the model's own after them.
    """

    kind: str
    steps: int
    row_steps: int
    drafted: int
    accepted: int
    new_tokens: int

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposed tokens that were accepted; 0 if none was proposed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row gained a step; 1 is the rate without drafts. 0 without any step."""
        return self.new_tokens / self.row_steps if self.row_steps else 0.0


@dataclass(frozen=True)
class GenerateOutput:
    """What ``generate(return_dict_in_generate=True)`` returns.

    Attributes:
        sequences: int64 ``[batch, prompt + new]``.
        scores: with ``output_scores``, final fp32 scores ``[batch, vocab_size]`` of each new token.
            With drafts, those of a row that has ended are 0.
        past_key_values: the cache; it holds all tokens but the last, which was never fed. None from
            a model that transformers runs.
            With drafts, it holds no token of a row after its end.
        draft_stats: of a call with ``draft``, else None.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None
    past_key_values: Any
    draft_stats: DraftStats | None = None
