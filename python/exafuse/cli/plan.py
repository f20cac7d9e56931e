"""The layer plan of a checkpoint: what every layer attends to, how it is normalised, what its
cache costs.

``exafuse plan FOLDER`` prints it; :func:`plan` returns it. Only config.json is read: no weights,
no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exafuse.config import ModelConfig, load_config
from exafuse.config.layer_plan import FULL
from exafuse.strict_json import shorten
from exafuse.weights.hub import resolve_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class PlannedLayer:
    """One decoder layer. ``window`` counts the tokens a query sees, itself included; None = all
    before it.

    ``cache_slots`` is per sequence; ``cache_bytes`` is keys and values of the whole batch.
    """

    index: int
    layer_type: str
    window: int | None
    rope: bool
    norm: str
    cache_slots: int
    cache_bytes: int

    @property
    def kind(self) -> tuple[str, int | None, bool, str, int, int]:
        """Everything but the index: layers with equal kinds are drawn and printed as one."""
        return (
            self.layer_type,
            self.window,
            self.rope,
            self.norm,
            self.cache_slots,
            self.cache_bytes,
        )

    def describe(self) -> str:
        attention = "all tokens" if self.window is None else f"window {self.window:,}"
        return f"{attention}, {'RoPE' if self.rope else 'NoPE'}, {self.norm}-norm"


@dataclass(frozen=True)
class Plan:
    """The layers of a model for one context length, batch size and cache dtype; ``str()`` is the
    table."""

    config: ModelConfig
    context: int
    batch_size: int
    dtype: str
    layers: tuple[PlannedLayer, ...]

    @property
    def cache_bytes(self) -> int:
        return sum(layer.cache_bytes for layer in self.layers)

    @property
    def full_cache_bytes(self) -> int:
        """What the cache would take if no layer had a window."""
        everywhere = dataclasses.replace(self.config, layer_types=(FULL,) * self.config.num_layers)
        return everywhere.cache_bytes(self.batch_size, self.context, DTYPE_BYTES[self.dtype])

    @property
    def weight_bytes(self) -> int:
        return self.config.num_parameters() * DTYPE_BYTES[self.dtype]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures do not say."""
        limit = self.config.max_position_embeddings
        if self.context > limit:
            # Imports torch, which planning does without otherwise.
            from exafuse.generation.settings import context_length

            limit = context_length(self.config)
        if self.context <= limit:
            return ()
        return (f"the model reads at most {limit:,} tokens; {self.context:,} are beyond that",)

    def groups(self) -> Iterator[tuple[int, int, PlannedLayer]]:
        """Runs of equal consecutive layers: (first index, last index, the first layer of the
        run)."""
        first = 0
        for end in range(1, len(self.layers) + 1):
            if end == len(self.layers) or self.layers[end].kind != self.layers[first].kind:
                yield first, end - 1, self.layers[first]
                first = end

    def kinds(self) -> dict[tuple[Any, ...], list[PlannedLayer]]:
        """The distinct kinds of layers, in order of first appearance, each with its layers."""
        kinds: dict[tuple[Any, ...], list[PlannedLayer]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: sizes in bytes, one entry per layer and one per run of equal
        layers."""
        config = self.config
        return {
            "schema": 1,
            "model_type": config.model_type,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
            "vision": None if config.vision is None else dataclasses.asdict(config.vision),
            "num_mtp_layers": len(config.mtp_layer_types),
            "head": config.head.kind,
            "labels": list(config.head.labels),
            "rope": dataclasses.asdict(config.rope),
            "num_parameters": config.num_parameters(),
            "weight_bytes": self.weight_bytes,
            "context": self.context,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "cache_bytes": self.cache_bytes,
            "notes": list(self.notes),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "groups": [
                {"first": first, "last": last, "count": last - first + 1, "layer": layer.describe()}
                for first, last, layer in self.groups()
            ],
        }

    def __str__(self) -> str:
        config = self.config
        saving = ""
        if self.cache_bytes < self.full_cache_bytes:
            saving = f" ({format_bytes(self.full_cache_bytes)} if every layer kept all tokens)"
        lines = [
            f"{config.model_type}: {config.num_layers} layers, hidden"
            f" {config.hidden_size:,}, MLP {config.intermediate_size:,}, heads"
            f" {config.num_heads}/{config.num_kv_heads} of {config.head_dim}, vocabulary"
            f" {config.vocab_size:,}",
            *_describe_vision(config),
            *_describe_head(config),
            f"{config.num_parameters():,} parameters = {format_bytes(self.weight_bytes)} in"
            f" {self.dtype}",
            f"RoPE {_describe_rope(config)}, up to {config.max_position_embeddings:,} positions",
            f"cache for {self.batch_size} x {self.context:,} tokens in {self.dtype}:"
            f" {format_bytes(self.cache_bytes)}{saving}",
            "",
        ]
        header = ("layers", "attends to", "position", "norm", "cache slots", "cache per layer")
        rows = [header]
        for first, last, layer in self.groups():
            rows.append(
                (
                    f"{first}" if first == last else f"{first}-{last}",
                    "all before" if layer.window is None else f"last {layer.window:,}",
                    "RoPE" if layer.rope else "NoPE",
                    layer.norm,
                    f"{layer.cache_slots:,}",
                    format_bytes(layer.cache_bytes),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def plan(
    source: str | Path | Mapping[str, Any] | ModelConfig,
    context: int | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
) -> Plan:
    """Plan the layers of a checkpoint folder, a config.json, its dict, or a name on the Hub.

    ``context`` is in tokens (None = the model's own limit), ``dtype`` that of cache and weights
    (None = the file's). Of a Hub name only config.json is requested. Raises ConfigError for a
    config that cannot be run, CheckpointError when there is no such file or name, ValueError for
    sizes that are not positive.
    """
    if isinstance(source, str | Path):
        source = resolve_config(source)
    config = source if isinstance(source, ModelConfig) else load_config(source)
    context = config.max_position_embeddings if context is None else context
    dtype = config.dtype if dtype is None else dtype
    if context < 1 or batch_size < 1:
        raise ValueError(
            f"context and batch size must be at least 1, got {context} and {batch_size}"
        )
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")

    slot_bytes = 2 * config.num_kv_heads * config.head_dim * DTYPE_BYTES[dtype] * batch_size
    layers = []
    for layer in config.layers:
        left = layer.window_size[0]
        # A model of this one layer, so that the sum over layers is the model's own figure
        # by construction.
        alone = dataclasses.replace(config, num_layers=1, layer_types=(layer.layer_type,))
        cache_bytes = alone.cache_bytes(batch_size, context, DTYPE_BYTES[dtype])
        layers.append(
            PlannedLayer(
                index=layer.index,
                layer_type=layer.layer_type,
                window=None if left < 0 else left + 1,
                rope=layer.rope,
                norm=layer.norm,
                cache_slots=cache_bytes // slot_bytes,
                cache_bytes=cache_bytes,
            )
        )
    return Plan(config, context, batch_size, dtype, tuple(layers))


def draw(layer_plan: Plan, file: str | Path) -> None:
    """Draw who attends to what, one panel per kind of layer beside the stack of layers, into a
    PNG file.

    Needs matplotlib (``pip install "exafuse[bench]"``); raises ImportError with that advice
    without it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'a picture needs matplotlib: pip install "exafuse[bench]" ({error})'
        ) from error

    kinds = layer_plan.kinds()
    colors = ["#2f6fa7", "#d9822b", "#4d9078", "#8e5ea2", "#b04a5a", "#7a7a7a"]
    color_of = {kind: colors[number % len(colors)] for number, kind in enumerate(kinds)}
    figure = Figure(figsize=(2.2 + 3.6 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, len(kinds) + 1, squeeze=False, width_ratios=[0.5] + [1.0] * len(kinds)
    )[0]
    figure.suptitle(
        f"{layer_plan.config.model_type}, {layer_plan.config.num_layers} layers,"
        f" {layer_plan.context:,} tokens"
    )

    stack = axes[0]
    for layer in layer_plan.layers:
        stack.barh(
            layer.index, 1, height=1, edgecolor="white", linewidth=0.3, color=color_of[layer.kind]
        )
    stack.set(
        xticks=[],
        xlim=(0, 1),
        ylabel="layer",
        title="stack",
        ylim=(-0.5, len(layer_plan.layers) - 0.5),
    )

    for axis, (kind, layers) in zip(axes[1:], kinds.items(), strict=True):
        axis.imshow(
            attention_picture(layers[0].window, layer_plan.context),
            extent=(0, layer_plan.context, layer_plan.context, 0),
            cmap=ListedColormap(["#f2f2f2", color_of[kind]]),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        count = f"{len(layers)} layer" + ("s" if len(layers) > 1 else "")
        axis.set(title=f"{count}: {layers[0].describe()}", xlabel="key", ylabel="query")
        axis.title.set_fontsize(9)
        axis.locator_params(nbins=3)
    figure.savefig(file, format="png", dpi=120)


def attention_picture(window: int | None, context: int, cells: int = 96) -> list[list[int]]:
    """The mask of a layer scaled to at most ``cells`` x ``cells``: 1 where a query (row) sees a
    key (column).

    Up to ``cells`` tokens it is exact. Beyond that a cell stands for many tokens, and a window
    narrower than a cell still gets the diagonal.
    """
    size = min(cells, context)
    width = size if window is None else max(1, min(size, round(window * size / context)))
    return [[int(row - width < column <= row) for column in range(size)] for row in range(size)]


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"; exact below 1 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def _describe_vision(config: ModelConfig) -> list[str]:
    """What a model that sees has besides the layers below, which the cache is for."""
    vision, lines = config.vision, []
    if vision is not None:
        full = ", ".join(map(str, sorted(vision.full_attention_blocks)))
        lines.append(
            f"vision tower: {vision.depth} blocks, hidden {vision.hidden_size:,}, heads"
            f" {vision.num_heads}/{vision.num_kv_heads}, windows of {vision.window_size} pixels,"
            f" whole frames in blocks {full or 'none'}"
        )
    if config.mtp_layer_types:
        lines.append(f"MTP head: {len(config.mtp_layer_types)} layer, with a cache of its own")
    return lines


def _describe_head(config: ModelConfig) -> list[str]:
    """The head of a model that is no language model: it scores texts, and writes none."""
    if config.head.kind == "causal_lm":
        return []
    names = [shorten(name) for name in config.head.labels[:4]]
    names += ["..."] if config.head.labels[4:] else []
    return [f"head: {config.head.describe()}" + (f": {', '.join(names)}" if names else "")]


def _describe_rope(config: ModelConfig) -> str:
    rope = config.rope
    scaling = rope.rope_type if rope.factor is None else f"{rope.rope_type} x{rope.factor:g}"
    return f"{scaling}, theta {rope.theta:,.10g}"
