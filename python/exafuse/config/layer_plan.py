"""Which layer attends how: the families' rules for layer types, and the plan they lead to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, cast

from exafuse.config.fields import Fields
from exafuse.config.rope import MAX_POSITIONS

LayerType = Literal["full_attention", "sliding_attention"]
FULL: Final[LayerType] = "full_attention"
SLIDING: Final[LayerType] = "sliding_attention"
NORM_PLACEMENT: Final[dict[str, Literal["pre", "post"]]] = {
    "llama": "pre",
    "qwen2": "pre",
    "exaone4": "post",
    "exaone4_5": "post",
}


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer does.

    ``window_size`` is (left, right) as the attention ops take it: keys left and right of the
    query, without the query itself, -1 for open. ``rope`` False means no positional embedding at
    all (NoPE). ``norm`` is "pre" (the input of attention and MLP is normalised) or "post" (their
    output is).
    """

    index: int
    layer_type: LayerType
    window_size: tuple[int, int]
    rope: bool
    norm: Literal["pre", "post"]


def plan_layers(
    model_type: str, layer_types: tuple[LayerType, ...], sliding_window: int | None
) -> tuple[LayerPlan, ...]:
    """The plan of every layer.

    ``sliding_window`` counts the query itself, ``window_size`` does not: this is the one place
    where the first becomes the second. EXAONE rotates q and k only in sliding layers, unless the
    model has no window at all; the other families rotate everywhere.
    """
    plans = []
    for index, layer_type in enumerate(layer_types):
        slides = layer_type == SLIDING
        left = sliding_window - 1 if slides and sliding_window is not None else -1
        norm = NORM_PLACEMENT[model_type]
        rope = norm == "pre" or slides or sliding_window is None
        plans.append(LayerPlan(index, layer_type, (left, 0), rope, norm))
    return tuple(plans)


def read_llama_layers(config: Fields, num_layers: int) -> tuple[LayerType, ...]:
    """Llama attends to everything in every layer; a file that says otherwise is another model."""
    given = _read_layer_types(config, num_layers)
    if given is not None and SLIDING in given:
        raise config.error("layer_types", "only full_attention in a llama model")
    return (FULL,) * num_layers


def read_qwen2_layers(config: Fields, num_layers: int) -> tuple[int | None, tuple[LayerType, ...]]:
    """Window and layer types of Qwen2: windows only if ``use_sliding_window``, from
    ``max_window_layers`` on."""
    use_window = config.boolean("use_sliding_window", False)
    window = config.optional_integer("sliding_window", 4096, 1, MAX_POSITIONS)
    first_sliding = config.integer("max_window_layers", 28, 0, MAX_POSITIONS)
    given = _read_layer_types(config, num_layers)
    if not use_window:
        window = None
    if given is None:
        given = tuple(
            SLIDING if window is not None and i >= first_sliding else FULL
            for i in range(num_layers)
        )
    elif window is None and SLIDING in given:
        raise config.error(
            "layer_types",
            "only full_attention, because use_sliding_window is false or sliding_window null",
        )
    return window, given


def read_exaone_layers(
    config: Fields, num_layers: int, *, may_be_longer: bool
) -> tuple[int | None, tuple[LayerType, ...]]:
    """Window and layer types of EXAONE 4.

    ``layer_types`` is taken as it is. Without it ``sliding_window_pattern`` decides: n makes
    every n-th layer global, a string of L (sliding) and G (global) is repeated, and no window
    means that all layers are global. The last layer has no special rule. With ``may_be_longer``,
    entries beyond ``num_layers`` belong to the multi-token prediction module and come last.
    """
    window = config.optional_integer("sliding_window", 4096, 1, MAX_POSITIONS)
    pattern = _read_pattern(config, has_window=window is not None)
    given = _read_layer_types(config, num_layers, may_be_longer=may_be_longer)
    if given is not None:
        if window is None and SLIDING in given:
            raise config.error(
                "sliding_window", "a number of tokens, because layer_types has sliding_attention"
            )
        return window, given
    if window is None:
        return None, (FULL,) * num_layers
    if pattern is None:
        raise config.error(
            "sliding_window_pattern",
            f"a pattern (4 or 'LLLG'), because sliding_window is {window}; for a model without "
            "windows set sliding_window to null",
        )
    return window, tuple(
        SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(num_layers)
    )


def _read_pattern(config: Fields, *, has_window: bool) -> str | None:
    """``sliding_window_pattern`` as a string of L and G; an integer n means n - 1 times L, then
    G."""
    key = "sliding_window_pattern"
    value = config.raw(key) if config.present(key) else 4
    if value is None:
        return None
    if isinstance(value, str):
        if not value or set(value) - {"L", "G"}:
            raise config.error(key, "a string of L (sliding) and G (global), an integer or null")
        return value
    # transformers writes 0 for a model without windows.
    every = config.integer(key, 4, 1 if has_window else 0, 2**14)
    return "L" * (every - 1) + "G"


def _read_layer_types(
    config: Fields, num_layers: int, *, may_be_longer: bool = False
) -> tuple[LayerType, ...] | None:
    given = config.strings("layer_types")
    if given is None:
        return None
    for index, name in enumerate(given):
        if name not in (FULL, SLIDING):
            raise config.error(f"layer_types[{index}]", f"{FULL} or {SLIDING}", got=repr(name[:40]))
    if len(given) < num_layers or (len(given) > num_layers and not may_be_longer):
        raise config.error(
            "layer_types",
            f"{num_layers} entries, one per layer (num_hidden_layers)",
            f"{len(given)}",
        )
    return cast(tuple[LayerType, ...], given)
