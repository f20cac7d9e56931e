"""Generation settings: read from a checkpoint, checked, merged with the arguments of a call.

A value comes from the first of these that sets it: an argument of ``generate``, its
``generation_config``, the model's ``generation_config``, the defaults of transformers 5.23.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exafuse.errors import ConfigError
from exafuse.strict_json import read_json, shorten

if TYPE_CHECKING:
    from exafuse.config import ModelConfig

_FILE_LIMIT_BYTES = 4 * 2**20

# Settings of transformers that change the output and are not implemented here, with the values
# (beside null) that leave the output alone. Any other unknown key is about something else: ignored.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "sequence_bias": ([], {}),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1.0,),
    "watermarking_config": (),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What ``generate`` does when an argument is not given; ``None`` leaves a setting open.

    Types are checked here (ValueError naming the field), ranges when a call uses the value. An int
    or a list is taken for ``eos_token_id``, a str or a list for ``stop_strings``; both are kept as
    tuples, and an empty tuple means "none" where ``None`` means "not set".
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: tuple[str, ...] | None = None
    cache_implementation: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, _typed(field.name, str(field.type), value))

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> GenerationConfig:
        """The settings of a checkpoint folder, chosen as transformers chooses them.

        generation_config.json alone if there is one; else the generation keys of config.json (old
        releases carry them there); else the token ids of ``config``. ConfigError names file and
        field. Keys that would change the output but are not implemented give one UserWarning.
        """
        folder = Path(folder)
        for name, what in (
            ("generation_config.json", "the generation settings"),
            ("config.json", "the model's configuration"),
        ):
            path = folder / name
            if not path.exists():
                continue
            data = read_json(path, what, _FILE_LIMIT_BYTES)
            if not isinstance(data, dict):
                raise ConfigError(f"{path}: expected a JSON object, got {shorten(data)}")
            text_config = data.get("text_config")
            if name == "config.json" and isinstance(text_config, dict):
                token_ids = {k: v for k, v in text_config.items() if k.endswith("_token_id")}
                data = token_ids | data
            # The layout of the cache is ours to choose; only a caller's own wish counts.
            data.pop("cache_implementation", None)
            if ignored := _unsupported_settings(data):
                warnings.warn(
                    f"{path}: ignored, as exafuse does not implement it: {', '.join(ignored)}; "
                    "output may differ from transformers'",
                    stacklevel=2,
                )
            return cls._from_known(data, str(path))
        return cls.from_model_config(config)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> GenerationConfig:
        """Only the special token ids, from a model's configuration."""
        return cls(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )

    @classmethod
    def from_object(cls, settings: object) -> GenerationConfig:
        """A caller's own settings: one of these, a mapping or transformers' equivalent.

        ValueError for a setting that would change the output and is not implemented; TypeError for
        anything that holds no settings.
        """
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, Mapping) and not hasattr(settings, "to_dict"):
            raise TypeError(
                "generation_config: expected exafuse's or transformers' GenerationConfig or a "
                f"mapping, got {type(settings).__name__}"
            )
        data = dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())
        if ignored := _unsupported_settings(data):
            raise ValueError(
                f"generation_config: exafuse does not implement {', '.join(ignored)}; leave it out"
            )
        return cls._from_known(data, "generation_config")

    @classmethod
    def _from_known(cls, data: Mapping[str, Any], where: str) -> GenerationConfig:
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            return cls(**{name: data[name] for name in names if name in data})
        except ValueError as exc:
            raise ConfigError(f"{where}: {exc}") from None

    def filled_from(self, other: GenerationConfig) -> GenerationConfig:
        """This one with its open settings taken from ``other``."""
        return GenerationConfig(**(other.set_values() | self.set_values()))

    def set_values(self) -> dict[str, Any]:
        """The settings that are not open, by name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def to_dict(self) -> dict[str, Any]:
        """What a generation_config.json holds: JSON types, nothing that is open."""
        values = self.set_values()
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        if len(eos := values.get("eos_token_id", ())) == 1:
            values["eos_token_id"] = eos[0]
        return values


def _unsupported_settings(data: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={shorten(data[name])}"
        for name, neutral in _UNSUPPORTED.items()
        if data.get(name) is not None and data[name] not in neutral
    ]


def _typed(name: str, annotation: str, value: object) -> object:
    """``value`` as the field's type, or a ValueError that says what was expected."""
    kind = annotation.removesuffix(" | None")
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "int" and (number := _as_int(value)) is not None:
        return number
    if kind == "float" and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            number_ = float(value)
        except OverflowError:
            number_ = math.inf
        if math.isfinite(number_):
            return number_
    if kind == "tuple[int, ...]":
        items = list(value) if isinstance(value, list | tuple) else [value]
        ints = [number for item in items if (number := _as_int(item)) is not None]
        if len(ints) == len(items):
            return tuple(ints)
    if kind == "tuple[str, ...]":
        texts = list(value) if isinstance(value, list | tuple) else [value]
        if all(isinstance(text, str) and text for text in texts):
            return tuple(texts)
    expected = {
        "bool": "True or False",
        "float": "a finite number",
        "int": "an integer",
        "str": "a string",
        "tuple[int, ...]": "an integer or a list of integers",
        "tuple[str, ...]": "a non-empty string or a list of them",
    }[kind]
    raise ValueError(f"{name}: expected {expected}, got {shorten(value)}")


def _as_int(value: object) -> int | None:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # a float tensor has __index__ and refuses
        return None
