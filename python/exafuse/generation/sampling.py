"""From logits to the next token: penalties, warpers and the draw.

Every function here is pure: fp32 scores ``[batch, vocab_size]`` in, new fp32 scores of the same
shape out, nothing read back to the host. Removed tokens get -inf. Rules and order are those of
transformers 5.23 (``generation/logits_process.py``), bit for bit in fp32, so one torch seed draws
the same tokens there and here. ``presence_penalty``, which transformers does not have, is that of
the OpenAI API and of vLLM.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""A caller's own step: ids ``[batch, length]`` and scores ``[batch, vocab_size]`` -> scores."""


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative scores of the ids marked in ``seen``.

    ``seen`` is bool ``[batch, vocab_size]``; a penalty above 1 discourages repeats, below 1
    invites them. Once per distinct id, however often it occurred (Keskar et al. 2019, "CTRL").
    """
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalised, scores)


def presence_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Subtract ``penalty`` from the scores of the ids marked in ``seen`` (bool, same shape)."""
    return torch.where(seen, scores - penalty, scores)


def apply_temperature(scores: Tensor, temperature: float) -> Tensor:
    """Divide by ``temperature`` (> 0): below 1 sharpens the distribution, above 1 flattens it."""
    return scores / temperature


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Keep the ``top_k`` (>= 1) highest scores of a row, and all that equal the lowest kept
    one."""
    lowest_kept = torch.topk(scores, min(top_k, scores.size(-1))).values[..., -1:]
    return scores.masked_fill(scores < lowest_kept, -math.inf)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most probable tokens that together reach ``top_p`` (0 < top_p <= 1).

    Nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    ascending, order = torch.sort(scores, descending=False)
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= (1 - top_p)
    removed[..., -1:] = False
    return scores.masked_fill(removed.scatter(1, order, removed), -math.inf)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Remove tokens less probable than ``min_p`` (0 to 1) times the likeliest one, which stays."""
    probs = scores.softmax(dim=-1)
    removed = probs < min_p * probs.amax(dim=-1, keepdim=True)
    removed.scatter_(-1, torch.topk(probs, 1, dim=-1).indices, False)
    return scores.masked_fill(removed, -math.inf)


def draw(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id a row, int64 ``[batch]``, drawn with probability softmax(scores).

    ``generator`` None means torch's global one. argmax(p / q) with q ~ Exp(1) is what
    ``torch.multinomial`` computes for one sample (tested to be bitwise the same). It is written
    out because ``multinomial`` first reads two checks back to the host, which on a GPU would
    drain the queue at every token; here the check is ``unusable_rows``.
    """
    return draw_from(scores.softmax(dim=-1), generator)


def draw_from(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id a row, int64 ``[batch]``, with probability in proportion to fp32 ``weights``
    ``[batch, vocab_size]``."""
    noise = torch.empty_like(weights).exponential_(1, generator=generator)
    return (weights / noise).argmax(dim=-1)


def unusable_rows(scores: Tensor, do_sample: bool) -> Tensor:
    """Bool ``[batch]`` on the scores' device: rows no token can be chosen from.

    A row is unusable if it holds a NaN or nothing above -inf. For a draw +inf is one more reason
    (its softmax is NaN), while greedy choice takes it. NaN survives every function above.
    """
    highest = scores.amax(dim=-1)  # NaN if there is one
    return ~highest.isfinite() if do_sample else ~(highest > -math.inf)


def seeded_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own that draws what torch's global one would after manual_seed(seed)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2**63 - 1, got {seed!r}")
    return torch.Generator(device=device).manual_seed(seed)


def global_generator(device: torch.device) -> torch.Generator:
    """The generator that draws on ``device`` when none is named."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


class TokenDraw:
    """``draw`` from one generator, with the last draw revocable.

    ``seed`` None draws from torch's global generator, which then has to be left as if a step that
    was queued needlessly had never been drawn; an int makes a private one.
    """

    def __init__(self, seed: int | None, device: torch.device):
        self._private = None if seed is None else seeded_generator(seed, device)
        self._shared = global_generator(device)
        self._before = self._after = self._shared.get_state()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around what may call :meth:`once`, so that it can be revoked."""
        if self._private is not None:
            yield
            return
        self._before = self._shared.get_state()
        yield
        self._after = self._shared.get_state()

    def once(self, scores: Tensor) -> Tensor:
        """Ids int64 ``[batch]``; see ``draw``. Touches no state but the generator's own."""
        return draw(scores, self._private)

    @property
    def generator(self) -> torch.Generator | None:
        """The private generator; None = torch's global one."""
        return self._private

    def revoke(self) -> None:
        """Undo the last draw's effect on the global generator, unless others drew since."""
        if torch.equal(self._shared.get_state(), self._after):
            self._shared.set_state(self._before)


@dataclass(frozen=True)
class SamplingParams:
    """The values in force during one call. The neutral value of a step skips it."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0


class ScoreChain:
    """All steps from the model's logits to the final scores of one batch, in transformers' order.

    Repetition penalty (ids of prompt and output, left padding excluded), presence penalty (ids of
    the output only), the caller's processors; when drawing also temperature, top-k, top-p, min-p.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        vocab_size: int,
        processors: Sequence[LogitsProcessor] = (),
    ):
        self._params = params
        self._processors = tuple(processors)
        # One more column than there are ids takes what must not be marked.
        unmarked = torch.zeros(
            prompt_ids.size(0), vocab_size + 1, dtype=torch.bool, device=prompt_ids.device
        )
        self._seen: Tensor | None = None
        self._seen_in_output: Tensor | None = None
        if params.repetition_penalty != 1.0:
            real = prompt_ids
            if prompt_mask is not None:
                padding = (prompt_mask == 0).to(prompt_ids.device)
                real = prompt_ids.masked_fill(padding, vocab_size)
            self._seen = unmarked.scatter(1, real, True)[:, :vocab_size]
        if params.presence_penalty != 0.0:
            self._seen_in_output = unmarked[:, :vocab_size].clone()

    def scores(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Final scores, fp32, from the last position's logits ``[batch, vocab_size]`` of any
        dtype.

        ``ids`` int64 ``[batch, length so far]`` goes to the caller's processors.
        """
        params = self._params
        scores = logits.to(torch.float32, copy=True)  # a caller's processor may write into it
        if self._seen is not None:
            scores = repetition_penalty(scores, self._seen, params.repetition_penalty)
        if self._seen_in_output is not None:
            scores = presence_penalty(scores, self._seen_in_output, params.presence_penalty)
        for processor in self._processors:
            scores = _checked_result(processor, processor(ids, scores), scores)
        if not params.do_sample:
            return scores
        if params.temperature != 1.0:
            scores = apply_temperature(scores, params.temperature)
        if params.top_k > 0:
            scores = keep_top_k(scores, params.top_k)
        if params.top_p < 1.0:
            scores = keep_top_p(scores, params.top_p)
        if params.min_p is not None:
            scores = keep_min_p(scores, params.min_p)
        return scores

    def record(self, next_ids: Tensor, rows: Tensor | None = None) -> None:
        """Mark the ids int64 ``[batch]`` that were appended to the rows, or to those of ``rows``
        (bool ``[batch]``)."""
        ids = next_ids[:, None]
        for seen in (self._seen, self._seen_in_output):
            if seen is not None:
                seen.scatter_(1, ids, True if rows is None else seen.gather(1, ids) | rows[:, None])

    def fork(self) -> ScoreChain:
        """A chain that goes on from here by itself, without the caller's processors."""
        other = copy.copy(self)
        other._processors = ()
        other._seen = None if self._seen is None else self._seen.clone()
        other._seen_in_output = (
            None if self._seen_in_output is None else self._seen_in_output.clone()
        )
        return other


def _checked_result(processor: LogitsProcessor, result: object, scores: Tensor) -> Tensor:
    if isinstance(result, Tensor) and result.shape == scores.shape and result.is_floating_point():
        return result
    got = (
        f"{result.dtype} {list(result.shape)}"
        if isinstance(result, Tensor)
        else type(result).__name__
    )
    raise ValueError(
        f"logits_processor {type(processor).__name__}: expected it to return scores "
        f"{list(scores.shape)}, got {got}"
    )
