"""``model.generate``: the decoding loop, with transformers' results and no wait per token."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from exafuse.generation.call import Call, GenerativeModel, Progress
from exafuse.generation.config import GenerationConfig
from exafuse.generation.decoding import decode
from exafuse.generation.graphs import say_once
from exafuse.generation.output import DraftStats, GenerateOutput
from exafuse.generation.prompts import read_prompt, split_mapping
from exafuse.generation.sampling import LogitsProcessor, TokenDraw
from exafuse.generation.settings import resolve
from exafuse.generation.speculative import decode_with_drafts
from exafuse.generation.stopping import StoppingCriterion, Streamer

__all__ = ["DraftStats", "GenerateOutput", "GenerationConfig", "generate"]

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


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
    cuda_graph: bool = False,
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
        draft: propose tokens ahead, so that one call of the model can bring several: "mtp" with the
            head that EXAONE 4.5 checkpoints have for it, "prompt_lookup" with what followed the
            same tokens earlier in the text. Greedy answers are the same up to rounding, drawn ones
            have the same distribution (but other tokens for a seed). ``logits_processor`` and
            ``stopping_criteria`` then go with a single row only.
        num_draft_tokens: proposed in a step at most.
        cuda_graph: capture the decoding step and replay it for every token, so that a step costs
            what its kernels cost. Reserves the whole cache. Where a step cannot be captured (on the
            CPU, with callables of yours, with drafts) a warning says so once and nothing changes.
        return_dict_in_generate: return a :class:`GenerateOutput`, with scores if ``output_scores``
            and figures of the drafting.
        progress: called with (tokens done, tokens in all) while the prompt is read.
        model_inputs: ``pixel_values``, ``image_grid_thw``, ``pixel_values_videos`` and
            ``video_grid_thw`` of a multimodal model; they go with the prompt and are not repeated.

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
        if isinstance(num_draft_tokens, bool) or not isinstance(num_draft_tokens, int):
            raise TypeError(f"num_draft_tokens: expected an int, got {num_draft_tokens!r}")
        if num_draft_tokens < 1:
            raise ValueError(f"num_draft_tokens: expected 1 or more, got {num_draft_tokens}")
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
        media = _media(model, model_inputs, others)
        prompt = read_prompt(
            ids,
            mask,
            vocab_size=model.config.vocab_size,
            pad_token_id=settings.pad_token_id,
            eos_token_ids=settings.eos_token_ids,
            device=model.device,
        )
        call = Call(
            model=model,
            prompt=prompt,
            settings=settings,
            processors=_callables("logits_processor", logits_processor),
            criteria=_callables("stopping_criteria", stopping_criteria),
            streamer=streamer,
            tokenizer=tokenizer,
            draw=TokenDraw(seed, model.device),
            keep_cache=return_dict_in_generate and getattr(model, "keeps_cache", True),
            keep_scores=return_dict_in_generate and output_scores,
            progress=progress,
            media=media,
            cuda_graph=cuda_graph,
        )
        if draft is None:
            output = decode(call)
        else:
            if cuda_graph:
                say_once("with drafts, rows advance by numbers of tokens that differ")
            output = decode_with_drafts(call, draft, num_draft_tokens)
    finally:
        if streamer is not None:
            streamer.end()
    return output if return_dict_in_generate else output.sequences


def _media(
    model: GenerativeModel, arguments: Mapping[str, Any], of_mapping: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The pixel tensors among the keywords of a call and what a mapping of inputs holds."""
    if twice := sorted(arguments.keys() & of_mapping.keys()):
        raise TypeError(f"{', '.join(twice)}: given twice, in the mapping and as an argument")
    values = {**arguments, **of_mapping}
    media = {name: values.pop(name) for name in MEDIA if name in values}
    media = {name: value for name, value in media.items() if value is not None}
    if media and not getattr(model, "has_vision", False):
        values |= media
    if values:
        hint = " (this model has no vision tower)" if values.keys() & set(MEDIA) else ""
        if "pad_token_id" in values:
            hint = ' (pass generation_config={"pad_token_id": ...})'
        names = ", ".join(map(repr, sorted(values)))
        raise TypeError(f"generate: unexpected {names}{hint or _hint(values)}")
    return media


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


def _hint(names: Iterable[str]) -> str:
    """What may have been meant by keywords that are none of ours."""
    if any("beam" in name for name in names):
        return " (no beams here: a transformers model after exafuse.patch(model) has them)"
    known = inspect.signature(generate).parameters
    near = {match for name in names for match in difflib.get_close_matches(name, known, n=1)}
    return f" (did you mean {', '.join(sorted(near))}?)" if near else ""
