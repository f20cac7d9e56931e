"""Steps of our generation that transformers' ``generate`` does not have."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from exafuse.generation.sampling import presence_penalty


class PresencePenalty(LogitsProcessor):  # type: ignore[misc]
    """``presence_penalty`` for ``generate`` of transformers, which refuses the keyword.

    Subtracts the penalty from the score of every token that the model has generated so far, once
    however often it occurred; what stands in the prompt alone is not penalised. As
    ``presence_penalty`` of our own generation, the OpenAI API and vLLM. It comes after
    transformers' own penalties and before temperature, top-k and top-p::

        penalty = exafuse.PresencePenalty(1.5, prompt_length=inputs["input_ids"].shape[1])
        model.generate(**inputs, logits_processor=[penalty])

    Args:
        penalty: from -2 to 2; above 0 it discourages repeats, below 0 it invites them.
        prompt_length: columns of the prompt's ids, padding on the left included; 0 for
            ``inputs_embeds``. None = what is there at the first call, for one ``generate`` that
            adds a token a step (drawn, greedy, beams; not speculation); take a new object for
            the next.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: an argument is no number.
    """

    supports_continuous_batching = False

    def __init__(self, penalty: float, prompt_length: int | None = None) -> None:
        if isinstance(penalty, bool) or not isinstance(penalty, int | float):
            raise TypeError(f"penalty: expected a number, got {type(penalty).__name__}")
        if prompt_length is not None and (
            isinstance(prompt_length, bool) or not isinstance(prompt_length, int)
        ):
            raise TypeError(
                "prompt_length: expected an integer or None, got "
                f"{type(prompt_length).__name__}; pass inputs['input_ids'].shape[1]"
            )
        if not -2 <= penalty <= 2:
            raise ValueError(f"penalty: expected from -2 to 2 (0 is neutral), got {penalty}")
        if prompt_length is not None and prompt_length < 0:
            raise ValueError(f"prompt_length: expected at least 0, got {prompt_length}")
        self.penalty = float(penalty)
        self.prompt_length = prompt_length
        self._first: tuple[int, int] | None = None  # (rows, columns) at the first call
        self._next_length = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Penalised ``scores [batch, vocab_size]`` after ``input_ids [batch, length so far]``.

        Raises:
            ValueError: there are fewer ids than ``prompt_length``, or, without it, the call does
                not continue the one before.
        """
        length = input_ids.shape[1]
        prompt_length = self._seen_prompt(input_ids) if self.prompt_length is None else None
        if prompt_length is None:
            prompt_length = self.prompt_length or 0
            if length < prompt_length:
                raise ValueError(
                    f"prompt_length: expected at most the {length} ids of the first step, got "
                    f"{prompt_length}"
                )
        seen = torch.zeros_like(scores, dtype=torch.bool)
        seen.scatter_(1, input_ids[:, prompt_length:], True)
        return presence_penalty(scores, seen, self.penalty)

    def _seen_prompt(self, input_ids: Tensor) -> int:
        """The prompt's length where nobody said it."""
        rows, length = input_ids.shape
        if self._first is None or self._first == (rows, length):  # the same prompt once more
            self._first = rows, length
        elif self._first[0] != rows or length != self._next_length:
            raise ValueError(
                f"PresencePenalty: expected {self._first[0]} rows of {self._next_length} ids, as "
                f"continues the call before, got {rows} of {length}; make a new one for each "
                "generate call, and pass prompt_length=inputs['input_ids'].shape[1] with "
                "assisted generation"
            )
        self._next_length = length + 1
        return self._first[1]
