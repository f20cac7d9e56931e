"""``model.generate``: the decoding loop, with transformers' results and no wait per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor

from exafuse.config import ModelConfig
from exafuse.generation.config import GenerationConfig
from exafuse.generation.prompts import Prompt, read_prompt, split_mapping
from exafuse.generation.sampling import (
    LogitsProcessor,
    ScoreChain,
    TokenDraw,
    unusable_rows,
)
from exafuse.generation.settings import Settings, context_length, resolve, total_length
from exafuse.generation.stopping import StopCheck, StoppingCriterion, StopStrings, Streamer, verdict

__all__ = ["GenerateOutput", "GenerationConfig", "generate"]

Progress = Callable[[int, int], None]
_RESERVED_TOKENS = 1024  # a growing cache is given room for this many new tokens at once


class GenerativeModel(Protocol):
    """What the loop needs of a model."""

    config: ModelConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Any: ...

    def next_logits(
        self,
        input_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class GenerateOutput:
    """What ``generate(return_dict_in_generate=True)`` returns.

    Attributes:
        sequences: int64 ``[batch, prompt + new]``.
        scores: with ``output_scores``, final fp32 scores ``[batch, vocab_size]`` of each new token.
        past_key_values: the cache; it holds all tokens but the last, which was never fed.
        draft_stats: None, as nothing was drafted.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None
    past_key_values: Any
    draft_stats: None = None


@torch.no_grad()
def generate(
    model: GenerativeModel,
    inputs: Any = None,
    attention_mask: Any = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    eos_token_id: int | Sequence[int] | EllipsisType | None = ...,
    stop_strings: str | Sequence[str] | None = None,
    streamer: Streamer | None = None,
    logits_processor: Sequence[LogitsProcessor] | None = None,
    stopping_criteria: Sequence[StoppingCriterion] | None = None,
    cache_implementation: str | None = None,
    seed: int | None = None,
    draft: str | None = None,
    num_draft_tokens: int = 3,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
    **model_inputs: Any,
) -> Tensor | GenerateOutput:
    """Continue prompts by greedy choice or by drawing; semantics of transformers 5.23.

    A setting that is None here comes from ``generation_config``, else from the model's own, else
    from transformers' defaults (greedy; 20 new tokens; top_k 50 when drawing).

    Args:
        model: see :class:`GenerativeModel`.
        inputs: int64 ids ``[batch, seq]`` (left-padded), a list of ints, a list of such lists of
            any lengths, or a tokenizer's output with input_ids and perhaps attention_mask.
        attention_mask: ``[batch, seq]``, 0 = left padding. Without one, a pad id that is no eos id
            marks padding.
        generation_config: a GenerationConfig of ours or of transformers, or a mapping.
        max_new_tokens: new tokens at most; goes before ``max_length``, which counts the prompt too.
        do_sample: draw tokens; otherwise temperature, top_k, top_p and min_p have no effect.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty: see ``sampling``.
        eos_token_id: id or ids that end a row and are kept; None = no such id. A finished row goes
            on with the pad id, or the first eos id.
        stop_strings: texts that end a row as soon as its newest token completes one; that token is
            kept whole. Needs ``tokenizer``.
        streamer: ``put`` gets the prompt ``[batch, seq]``, then each step's ids ``[batch]``, on the
            CPU; ``end`` is called in any case, also when generation fails or is interrupted.
        logits_processor: callables (ids, scores) -> scores, run after the penalties.
        stopping_criteria: callables (ids, scores of all steps or None) -> bool or bool ``[batch]``,
            in addition to the limits above. The step that ends everything is followed by one more
            that is thrown away: processors and criteria see it too.
        cache_implementation: None or "dynamic" lets the cache grow, "static" reserves it whole.
        seed: draw from a private generator with this seed; None draws from torch's global one.
        draft, num_draft_tokens: drafting is not available; only None is taken.
        return_dict_in_generate: return a :class:`GenerateOutput`, with scores if ``output_scores``.
        progress: called with (tokens done, tokens in all) while the prompt is read.

    Returns:
        int64 ``[batch, prompt + new]`` on the model's device, as long as the last row to finish.

    Raises:
        ValueError: a value out of range (the text has the limit); ids outside the vocabulary; a
            prompt or length beyond the context. Nothing has been computed then.
        TypeError: an unknown keyword, or an argument of a wrong kind.
        RuntimeError: a row without any finite score (NaN in the model, or everything masked).
    """
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer: expected methods put and end, got {type(streamer).__name__}")
    try:
        _check_draft(draft, num_draft_tokens)
        arguments = GenerationConfig(
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            eos_token_id=_eos_argument(eos_token_id),
            stop_strings=stop_strings,  # type: ignore[arg-type]  # made a tuple by the class
            cache_implementation=cache_implementation,
        )
        given = GenerationConfig.from_object(generation_config or {})
        settings = resolve(arguments, given, model.generation_config, model.config.vocab_size)
        if inputs is None:
            inputs = model_inputs.pop("input_ids", None)
        ids, mask, others = split_mapping(inputs, attention_mask)
        if unknown := sorted(model_inputs | others):
            raise TypeError(f"generate: unexpected {', '.join(map(repr, unknown))}")
        prompt = read_prompt(
            ids,
            mask,
            vocab_size=model.config.vocab_size,
            pad_token_id=settings.pad_token_id,
            eos_token_ids=settings.eos_token_ids,
            device=model.device,
        )
        output = _decode(
            model,
            prompt,
            settings,
            processors=_callables("logits_processor", logits_processor),
            criteria=_callables("stopping_criteria", stopping_criteria),
            streamer=streamer,
            tokenizer=tokenizer,
            draw=TokenDraw(seed, model.device),
            keep_cache=return_dict_in_generate,
            keep_scores=return_dict_in_generate and output_scores,
            progress=progress,
        )
    finally:
        if streamer is not None:
            streamer.end()
    return output if return_dict_in_generate else output.sequences


def _decode(
    model: GenerativeModel,
    prompt: Prompt,
    settings: Settings,
    *,
    processors: tuple[LogitsProcessor, ...],
    criteria: tuple[StoppingCriterion, ...],
    streamer: Streamer | None,
    tokenizer: Any,
    draw: TokenDraw,
    keep_cache: bool,
    keep_scores: bool,
    progress: Progress | None,
) -> GenerateOutput:
    device = model.device
    batch, columns = prompt.ids.shape
    total = total_length(settings, columns, prompt.longest, context_length(model.config))
    ids = torch.empty(batch, total, dtype=torch.int64, device=device)
    ids[:, :columns] = prompt.ids
    # As in transformers: without any notion of eos, finished rows are not padded.
    has_eos = bool(settings.eos_token_ids) or any(hasattr(c, "eos_token_id") for c in criteria)
    pad_id = settings.pad_token_id if has_eos else None
    eos_ids = torch.tensor(settings.eos_token_ids, dtype=torch.int64).to(device)
    watcher = _stop_strings(settings, tokenizer, prompt)
    check = StopCheck(batch, device, pad_id, streamer, watcher)
    chain = ScoreChain(
        settings.sampling, prompt.ids, prompt.mask, model.config.vocab_size, processors
    )
    reserved = total if settings.static_cache else min(total, columns + _RESERVED_TOKENS)
    cache = model.new_cache(batch, reserved)
    if streamer is not None:
        streamer.put(prompt.ids.cpu())

    do_sample = settings.sampling.do_sample
    all_scores: tuple[Tensor, ...] | None = () if keep_scores else None
    unfinished = torch.ones(batch, dtype=torch.bool, device=device)
    length, surplus = columns, False
    logits = model.next_logits(prompt.ids, cache, prompt.mask, progress)
    while True:
        scores = chain.scores(logits, ids[:, :length])
        unusable = unusable_rows(scores, do_sample) & unfinished
        next_ids = draw(scores) if do_sample else scores.argmax(dim=-1)
        if pad_id is not None:
            next_ids = torch.where(unfinished, next_ids, pad_id)
        ids[:, length] = next_ids
        length += 1
        chain.record(next_ids)
        if all_scores is not None:
            all_scores += (scores,)
        if settings.eos_token_ids:
            unfinished = unfinished & ~(next_ids[:, None] == eos_ids).any(dim=-1)
        for criterion in criteria:
            done = verdict(criterion(ids[:, :length], all_scores), batch, device)
            unfinished = unfinished & ~done
        check.send(next_ids, unfinished, unusable)
        # The host looks at the step before while the device works on this one.
        surplus = length > columns + 1 and not check.next_report()
        if surplus or length == total:
            break
        logits = model.next_logits(next_ids[:, None], cache)
    if surplus:  # the last step was queued before the host knew that all rows were done
        length -= 1
        if keep_cache:
            cache.crop(cache.get_seq_length() - 1)
        all_scores = all_scores[:-1] if all_scores is not None else None
        draw.revoke()
    else:
        check.next_report()
    sequences = ids if length == total else ids[:, :length].clone()
    if pad_id is not None:
        for row, new in check.ended_after.items():
            sequences[row, columns + new :] = pad_id
    return GenerateOutput(sequences, all_scores, cache)


def _check_draft(draft: str | None, num_draft_tokens: int) -> None:
    if draft is not None:
        raise ValueError(f"draft: expected None, no kind of drafting is available, got {draft!r}")
    if not isinstance(num_draft_tokens, int) or num_draft_tokens < 1:
        raise ValueError(f"num_draft_tokens: expected 1 or more, got {num_draft_tokens!r}")


def _eos_argument(eos_token_id: Any) -> Any:
    """``...`` leaves the setting open (None in a GenerationConfig), None means no eos id at all."""
    if eos_token_id is ...:
        return None
    return () if eos_token_id is None else eos_token_id


def _callables(name: str, items: Any) -> tuple[Any, ...]:
    if items is None:
        return ()
    if not isinstance(items, Sequence) or not all(callable(item) for item in items):
        raise TypeError(f"{name}: expected a list of callables, got {type(items).__name__}")
    return tuple(items)


def _stop_strings(settings: Settings, tokenizer: Any, prompt: Prompt) -> StopStrings | None:
    if not settings.stop_strings:
        return None
    if tokenizer is None:
        raise ValueError("stop_strings: expected the model's tokenizer too, as tokenizer=")
    return StopStrings(tokenizer, settings.stop_strings, prompt.ids.cpu().numpy())
