"""The settings in force during one call of ``generate``: merged, checked, lengths worked out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from exafuse.config import ModelConfig
from exafuse.generation.config import GenerationConfig
from exafuse.generation.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 20  # transformers' default, when no length is set anywhere
CACHE_IMPLEMENTATIONS = ("dynamic", "static")

_DRAWING_ONLY = ("temperature", "top_k", "top_p", "min_p")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_length": (lambda v: v >= 1, "at least 1"),
    "max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "temperature": (lambda v: v > 0, "above 0 (for greedy decoding pass do_sample=False)"),
    "top_k": (lambda v: v >= 0, "at least 0 (0 keeps all tokens)"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda v: v > 0, "above 0 (1 is neutral)"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2 (0 is neutral)"),
    "cache_implementation": (
        lambda v: v in CACHE_IMPLEMENTATIONS,
        f"None or one of {', '.join(CACHE_IMPLEMENTATIONS)}",
    ),
}


@dataclass(frozen=True)
class Settings:
    """One call's settings: nothing open, everything in range.

    Attributes:
        sampling: what becomes of the scores.
        eos_token_ids: ids that end a row; all of them exist in the vocabulary.
        pad_token_id: what continues a finished row: the pad id, else the first eos, else None.
        stop_strings: texts that end a row.
        max_new_tokens, max_length: the limits as set, None where open.
        wished: names of the settings that the call itself made.
        static_cache: reserve the cache for the whole length at once.
    """

    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    stop_strings: tuple[str, ...]
    max_new_tokens: int | None
    max_length: int | None
    wished: frozenset[str]
    static_cache: bool


def resolve(
    arguments: GenerationConfig,
    given: GenerationConfig,
    of_model: GenerationConfig,
    vocab_size: int,
) -> Settings:
    """Merge a call's arguments, its ``generation_config`` and the model's; the first to speak wins.

    Raises:
        ValueError: a value out of its range; names it and the limit.
    """
    call = arguments.filled_from(given)
    merged = call.filled_from(of_model)
    wished = frozenset(call.set_values())
    do_sample = merged.do_sample is True
    for name, (in_range, limit) in _RANGES.items():
        value = getattr(merged, name)
        # A model's own temperature 0 is harmless as long as nothing is drawn.
        unused = name in _DRAWING_ONLY and name not in wished and not do_sample
        if value is not None and not unused and not in_range(value):
            raise ValueError(f"{name}: expected {limit}, got {value!r}")
    idle = [name for name in _DRAWING_ONLY if name in arguments.set_values()]
    if idle and not do_sample:
        warnings.warn(
            f"{', '.join(idle)}: no effect on greedy decoding; pass do_sample=True to draw tokens",
            stacklevel=5,
        )
    if arguments.max_length is not None and merged.max_new_tokens is not None:
        warnings.warn(
            f"max_length={merged.max_length}: no effect, max_new_tokens={merged.max_new_tokens} "
            "is set and comes first",
            stacklevel=5,
        )
    for token_id in call.eos_token_id or ():
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"eos_token_id: expected ids from 0 to {vocab_size - 1}, got {token_id}"
            )
    # Checkpoints in the wild name ids their vocabulary does not have; those can never be drawn, and
    # must never be fed (pads are fed to the model for rows that have finished).
    eos = tuple(i for i in merged.eos_token_id or () if 0 <= i < vocab_size)
    pad = merged.pad_token_id
    if pad is not None and not 0 <= pad < vocab_size:
        if "pad_token_id" in wished:
            raise ValueError(f"pad_token_id: expected 0 to {vocab_size - 1}, got {pad}")
        pad = None
    defaults = SamplingParams()
    names = (*_DRAWING_ONLY, "repetition_penalty", "presence_penalty")
    values = {name: getattr(merged, name) for name in names}
    return Settings(
        sampling=SamplingParams(
            do_sample=do_sample,
            **{k: getattr(defaults, k) if v is None else v for k, v in values.items()},
        ),
        eos_token_ids=eos,
        pad_token_id=pad if pad is not None else (eos[0] if eos else None),
        stop_strings=merged.stop_strings or (),
        max_new_tokens=merged.max_new_tokens,
        max_length=merged.max_length,
        wished=wished,
        static_cache=merged.cache_implementation == "static",
    )


def context_length(config: ModelConfig) -> int:
    """Positions the model can be asked for: max_position_embeddings, times what its RoPE stretches.

    llama3 and longrope files name the stretched length themselves; linear and dynamic ones the
    original; yarn files do either, so the larger of the two counts.
    """
    rope, positions = config.rope, config.max_position_embeddings
    factor = rope.factor or 1.0
    if rope.rope_type in ("linear", "dynamic"):
        return int(positions * factor)
    if rope.rope_type == "yarn" and rope.original_max_position_embeddings:
        return max(positions, int(rope.original_max_position_embeddings * factor))
    return positions


def total_length(settings: Settings, columns: int, longest: int, context: int) -> int:
    """Columns of the output at most, for a prompt of ``columns`` with ``longest`` tokens in a row.

    A length that the call asks for must fit the context; one from the model's own settings or the
    default is cut to it.

    Raises:
        ValueError: a prompt that fills the context, a max_length within the prompt, a length that
            the call asks for and the context does not have.
    """
    room = context - longest
    if room < 1:
        raise ValueError(
            f"input_ids: the prompt has {longest} tokens and the context of the model is {context} "
            "positions; expected at least one to be left for the answer"
        )
    if settings.max_new_tokens is not None:
        name, new = "max_new_tokens", settings.max_new_tokens
    elif settings.max_length is not None:
        name, new = "max_length", settings.max_length - columns
        if new < 1:
            raise ValueError(
                f"max_length: expected more than the {columns} tokens of the prompt, got "
                f"{settings.max_length}; it counts the prompt too, max_new_tokens does not"
            )
    else:
        name, new = "", DEFAULT_NEW_TOKENS
    if new > room and name in settings.wished:
        raise ValueError(
            f"{name}: expected at most {room + (columns if name == 'max_length' else 0)}, got "
            f"{new if name == 'max_new_tokens' else settings.max_length}: the prompt has {longest} "
            f"tokens and the context of the model is {context} positions"
        )
    return columns + min(new, room)
