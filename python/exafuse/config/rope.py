"""RoPE parameters of a config: both layouts of the file, and what each type needs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, cast

from exafuse.config.fields import REQUIRED, Fields
from exafuse.strict_json import shorten

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

MAX_POSITIONS: Final = 2**31 - 1  # positions are int32 on the device
_DEFAULT_THETA: Final = 10000.0
_MAX_THETA: Final = 1e18
_MAX_FACTOR: Final = 1e6


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one model.

    ``theta`` is the base of the frequencies. Every other field is None unless the type reads it
    and the config gives it; ``rotary.py`` holds the defaults of the formulas. ``short_factor``
    and ``long_factor`` have head_dim / 2 entries. ``original_max_position_embeddings`` is always
    set for llama3, yarn and longrope.
    """

    rope_type: RopeType = "default"
    theta: float = _DEFAULT_THETA
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, object] | None:
        """The ``rope_scaling`` entry of a config.json; None for the default type."""
        if self.rope_type == "default":
            return None
        result: dict[str, object] = {"rope_type": self.rope_type}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("rope_type", "theta") and value is not None:
                result[field.name] = list(value) if isinstance(value, tuple) else value
        if self.rope_type == "yarn":
            result.setdefault("factor", None)  # the key must be there; null means max / original
        return result


@dataclass(frozen=True)
class _Parameters:
    """The positive numbers that a type reads, and whether it knows an original length."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    has_original_length: bool = False


_TYPES: Final[dict[str, _Parameters]] = {
    "default": _Parameters(),
    "linear": _Parameters(("factor",)),
    "dynamic": _Parameters(("factor",)),
    "llama3": _Parameters(("factor", "low_freq_factor", "high_freq_factor"), (), True),
    "yarn": _Parameters((), ("factor", "attention_factor", "beta_fast", "beta_slow"), True),
    "longrope": _Parameters((), ("factor", "attention_factor"), True),
}


def read_rope(config: Fields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """The RoPE parameters of ``config``, by transformers' precedence.

    A non-empty ``rope_scaling`` (the older layout) replaces ``rope_parameters`` as a whole;
    ``rope_theta`` inside the dict beats the one beside it; ``original_max_position_embeddings``
    beside it beats the one inside, and ``max_position_embeddings`` stands in where neither is
    there.
    """
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    rope = scaling if scaling is not None and scaling.unread() else parameters
    outer_theta = _read_theta(config)
    _refuse_partial_rotation(config)
    if rope is None:
        return RopeConfig(theta=outer_theta or _DEFAULT_THETA)

    _refuse_partial_rotation(rope)
    for key in ("full_attention", "sliding_attention"):
        if rope.has(key):
            raise rope.error(key, "one set of RoPE parameters for all layers", "one per layer type")
    rope_type = _read_type(rope)
    values = _read_numbers(rope, rope_type, head_dim)
    values["theta"] = _read_theta(rope) or outer_theta or _DEFAULT_THETA
    if _TYPES[rope_type].has_original_length:
        values["original_max_position_embeddings"] = _read_original_length(
            config, rope, rope_type, max_position_embeddings
        )
    unread = rope.unread()
    if unread:
        warnings.warn(
            f"{config.file}: {rope.prefix.rstrip('.')}: not used by RoPE type {rope_type} and "
            f"ignored: {', '.join(shorten(key) for key in unread[:8])}",
            stacklevel=2,
        )
    return RopeConfig(rope_type=rope_type, **values)


def _read_type(rope: Fields) -> RopeType:
    kinds = {key: rope.string(key, REQUIRED) for key in ("rope_type", "type") if rope.has(key)}
    rope_type = kinds.get("rope_type", kinds.get("type", "default"))
    if kinds.get("type", rope_type) != rope_type:
        raise rope.error("type", f"the same as rope_type ({shorten(rope_type)}), or only one key")
    if rope_type not in _TYPES:
        key = "rope_type" if "rope_type" in kinds else "type"
        raise rope.error(key, f"one of {', '.join(_TYPES)}")
    return cast(RopeType, rope_type)


def _read_theta(fields_: Fields) -> float | None:
    # At 1 all frequencies are equal, and yarn divides by the logarithm.
    return fields_.optional_number("rope_theta", 1.0, _MAX_THETA, above=True)


def _read_numbers(rope: Fields, rope_type: RopeType, head_dim: int) -> dict[str, Any]:
    names = _TYPES[rope_type]
    values: dict[str, Any] = {
        key: rope.number(key, REQUIRED, 0.0, _MAX_FACTOR, above=True) for key in names.required
    }
    for key in names.optional:
        values[key] = rope.optional_number(key, 0.0, _MAX_FACTOR, above=True)

    if rope_type == "dynamic" and head_dim <= 2:
        raise rope.error("rope_type", "a head_dim above 2 with dynamic", f"head_dim {head_dim}")
    if rope_type == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise rope.error(
            "high_freq_factor", f"more than low_freq_factor ({values['low_freq_factor']:g})"
        )
    if rope_type == "yarn":
        if not rope.present("factor"):
            raise rope.error("factor", "a number, or null for max / original length")
        for key in ("mscale", "mscale_all_dim"):
            values[key] = rope.optional_number(key, 0.0, _MAX_FACTOR)
        values["truncate"] = rope.optional_boolean("truncate")
    if rope_type == "longrope":
        for key in ("short_factor", "long_factor"):
            values[key] = rope.numbers(key, head_dim // 2, 0.0, _MAX_FACTOR)
            if values[key] is None:
                raise rope.error(key, f"a list of {head_dim // 2} numbers, half of head_dim")
    return values


def _read_original_length(
    config: Fields, rope: Fields, rope_type: RopeType, max_position_embeddings: int
) -> int:
    key = "original_max_position_embeddings"
    low = 2 if rope_type == "longrope" else 1  # longrope divides by its logarithm
    outer = config.optional_integer(key, None, low, MAX_POSITIONS)
    inner = rope.optional_integer(key, None, low, MAX_POSITIONS)
    original = outer or inner or max_position_embeddings
    if original < low:
        raise rope.error(key, f"at least {low} with {rope_type}", str(original))
    return original


def _refuse_partial_rotation(fields_: Fields) -> None:
    factor = fields_.optional_number("partial_rotary_factor", 0.0, 1.0, above=True)
    if factor is not None and factor != 1.0:
        raise fields_.error("partial_rotary_factor", "1.0 (heads are rotated as a whole)")
