"""Draws results as PNG files: how near the ceilings, how far ahead of peers, how costs grow."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .results import Ceilings, Result, Row
from .shapes import MODELS

INK, GREY = "#222222", "#999999"
# exafuse stands out; peers keep their colour in every figure.
COLOURS = {
    "exafuse": "#c1121f",
    "torch": "#6c757d",
    "compile": "#1d3557",
    "sdpa-flash": "#2a9d8f",
    "sdpa-cudnn": "#457b9d",
    "sdpa-efficient": "#8ab17d",
    "sdpa-math": "#adb5bd",
    "varlen": "#e9c46a",
    "flex": "#7b2cbf",
    "liger": "#bc6c25",
    "flashinfer": "#f4a261",
    "quack": "#0077b6",
    "flash-attn-4": "#40916c",
    "transformers eager": "#8d99ae",
    "transformers sdpa": "#457b9d",
    "transformers static, compiled": "#7b2cbf",
}
CONTEXTS = tuple(2**power for power in range(10, 18))  # 1k to 128k tokens


def check_matplotlib() -> None:
    """ImportError with a remedy where nothing can be drawn; asked before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('png: drawing needs matplotlib: pip install "exafuse[bench]"')


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Every figure that the results have rows for; the files, in the order drawn."""
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    files = [_cache_memory(folder / "cache-memory.png")]
    for result in results[:1]:
        rows = [row for row in result.rows if row.time_us is not None]
        with_floors = [row for row in rows if row.bytes]
        for op in dict.fromkeys(row.op for row in with_floors):
            of_op = [row for row in with_floors if row.op == op]
            files.append(_roofline(op, of_op, result, folder / f"roofline-{op}.png"))
        for suite in dict.fromkeys(row.suite for row in rows if _has_ratio(row)):
            of_suite = [row for row in rows if row.suite == suite and _has_ratio(row)]
            files.append(_speed_up(suite, of_suite, result, folder / f"speed-up-{suite}.png"))
        growth = [row for row in with_floors if row.op == "flash_attn_func"]
        growth = [r for r in growth if r.parameters["seqlen_q"] == r.parameters["seqlen_k"]]
        if growth:
            files.append(_growth(growth, result, folder / "prefill-growth.png"))
        decode = [row for row in with_floors if row.op == "flash_attn_with_kvcache"]
        decode = [r for r in decode if r.parameters["batch"] == r.parameters["seqlen_q"] == 1]
        if decode:
            files.append(_decode(decode, result, folder / "decode-latency.png"))
    return files


def _has_ratio(row: Row) -> bool:
    return row.contender == "exafuse" and row.ratio is not None


# ---- the parts of a figure -----------------------------------------------------------------------


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of its own, without pyplot's registry, and its axes: two in a row, if not one."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width, height), layout="constrained"
    )
    columns = min(panels, 2)
    axes = list(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.set_axis_off()
    axes = axes[:panels]
    for ax in axes:
        ax.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, title: str, note: str, file: Path) -> Path:
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left", fontweight="bold")
    if note:
        figure.supxlabel(note, fontsize=7.5, color=GREY, x=0.01, ha="left")
    figure.savefig(file, dpi=130)
    return file


def _about(result: Result) -> str:
    """Where the figures come from, small, below the figure."""
    machine = result.machine
    parts = [str(machine["name"])]
    if machine.get("driver"):
        parts.append(f"driver {machine['driver']}")
    parts += [f"torch {machine['torch']}", result.dtype, f"exafuse {result.exafuse}"]
    # Without kernels our bars are plain PyTorch, and say so as the printed rows do.
    paths = sorted({row.path for row in result.rows if row.path})
    parts[-1] += f" [{', '.join(paths)}]" if paths else ""
    if result.commit:
        parts.append(result.commit)
    parts.append(result.date[:10])
    return ", ".join(parts) + (", quick" if result.quick else "")


def _colour(contender: str) -> str:
    return COLOURS.get(contender, "#e5989b" if contender.startswith("exafuse") else INK)


def _order(contender: str) -> int:
    """exafuse comes first in legends."""
    return 0 if contender == "exafuse" else 1


def _tokens(count: float, _: object = None) -> str:
    """1024 as 1k."""
    return f"{count / 1024:g}k" if count >= 1024 else f"{count:g}"


def _token_axis(ax: Any, values: Iterable[int], label: str) -> None:
    ticker = importlib.import_module("matplotlib.ticker")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(set(values)))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(_tokens))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_xlabel(label)


def _plain_log(axis: Any) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5, 10 where there is room, else decades."""
    ticker = importlib.import_module("matplotlib.ticker")
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _legend(ax: Any, **options: Any) -> None:
    ax.legend(frameon=False, fontsize=8, **options)


# ---- roofline ------------------------------------------------------------------------------------


def _roofline(op: str, rows: Sequence[Row], result: Result, file: Path) -> Path:
    """Matrix rate over intensity where that can be the limit, else bandwidth over bytes moved."""
    figure, (ax,) = _figure(1, 7.2, 4.6)
    if any(row.bound == "matmul" for row in rows):
        _matrix_roof(ax, rows, result.ceilings)
    else:
        _bandwidth_roof(ax, rows, result.ceilings)
    _plain_log(ax.xaxis)
    _plain_log(ax.yaxis)
    _legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, f"{op}: what of the ceiling is reached", _about(result), file)


def _points(ax: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]):
    for name in sorted({row.contender for row in rows}, key=lambda name: (_order(name), name)):
        own = [row for row in rows if row.contender == name]
        ax.scatter(
            [x(row) for row in own],
            [y(row) for row in own],
            s=46 if name == "exafuse" else 26,
            color=_colour(name),
            edgecolor="white",
            linewidth=0.6,
            label=name,
            zorder=4 if name == "exafuse" else 3,
        )


def _matrix_roof(ax: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    rows = [row for row in rows if row.flops]
    intensity = [row.flops / row.bytes for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    knee = ceilings.matmul_tflops * 1e3 / ceilings.copy_gbps  # FLOP per byte
    high = max(high, 2 * knee)
    low = min(low, knee / 2)
    xs = [low, knee, high]
    roof = [min(x * ceilings.copy_gbps / 1e3, ceilings.matmul_tflops) for x in xs]
    ax.plot(xs, roof, color=INK, linewidth=1.2, label="ceiling")
    ax.set_xlim(low, high)
    _points(ax, rows, lambda row: row.flops / row.bytes, lambda row: row.tflops or 0.0)
    ax.set_xlabel("FLOP per byte moved")
    ax.set_ylabel("TFLOP/s")


def _bandwidth_roof(ax: Any, rows: Sequence[Row], ceilings: Ceilings) -> None:
    reads = all(row.bound == "read" for row in rows)
    rate = ceilings.read_gbps if reads else ceilings.copy_gbps
    label = f"{'reading' if reads else 'copying'}, measured"
    ax.axhline(rate, color=INK, linewidth=1.2, label=label)
    _points(ax, rows, lambda row: row.bytes / 1e6, lambda row: row.gbps or 0.0)
    ax.set_xlabel("megabytes moved at least")
    ax.set_ylabel("GB/s")


# ---- speed-up ------------------------------------------------------------------------------------


def _speed_up(suite: str, rows: Sequence[Row], result: Result, file: Path) -> Path:
    """A bar a case: the best peer's time over ours."""
    ticker = importlib.import_module("matplotlib.ticker")
    figure, (ax,) = _figure(1, 9.0, 1.4 + 0.24 * len(rows))
    labels = [f"{row.op}  {row.model}  {row.case}" for row in rows]
    ratios = [row.ratio or 0.0 for row in rows]
    places = range(len(rows))
    bars = [ratio - 1 for ratio in ratios]
    faster = ["#2a9d8f" if ratio >= 1 else "#c1121f" for ratio in ratios]
    ax.barh(places, bars, left=1.0, color=faster, height=0.66)
    ax.axvline(1, color=INK, linewidth=1.0)
    ax.set_xscale("log", base=2)
    low, high = min(*ratios, 0.5), max(*ratios, 2.0)
    ax.set_xlim(low / 1.5, high * 2.6)  # room for the words
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}x"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    for place, ratio, row in zip(places, ratios, rows, strict=True):
        text = f" {ratio:.2f}x {row.best_peer}"
        ax.text(max(ratio, 1.0), place, text, va="center", fontsize=7, color=INK)
    ax.set_yticks(list(places), labels, fontsize=7)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(False, axis="y")
    return _save(figure, f"{suite}: speed over the fastest peer", _about(result), file)


# ---- growth --------------------------------------------------------------------------------------


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    return by_model


def _line(ax: Any, rows: Sequence[Row], axis: str, style: str, label: str) -> None:
    ordered = sorted(rows, key=lambda row: row.parameters[axis])
    name = rows[0].contender
    ax.plot(
        [row.parameters[axis] for row in ordered],
        [row.time_us for row in ordered],
        style,
        color=_colour(name),
        linewidth=2.0 if name == "exafuse" else 1.2,
        markersize=4.5,
        label=label,
        zorder=4 if name == "exafuse" else 3,
    )


def _over_length(panels: dict[str, list[Row]], axis: str, label: str) -> tuple[Any, list[Any]]:
    """A panel a model: time over length, plain attention solid, windows dashed, floors dotted."""
    width, height = (6.0 if len(panels) == 1 else 10.0), 3.9 * -(-len(panels) // 2)
    figure, axes = _figure(len(panels), width, height)
    for ax, (model, rows) in zip(axes, panels.items(), strict=True):
        for name in sorted({row.contender for row in rows}, key=lambda name: (_order(name), name)):
            own = [row for row in rows if row.contender == name]
            whole = [row for row in own if row.parameters["window"][0] < 0]
            windowed = [row for row in own if row.parameters["window"][0] >= 0]
            if whole:
                _line(ax, whole, axis, "-o", name)
            if windowed:
                width = windowed[0].parameters["window"][0] + 1
                _line(ax, windowed, axis, "--s", f"{name}, window {width}")
        floors = {
            row.parameters[axis]: row.floor_us for row in rows if row.parameters["window"][0] < 0
        }
        ordered = sorted(floors.items())
        ax.plot(*zip(*ordered, strict=True), ":", color=INK, linewidth=1.2, label="floor")
        _token_axis(ax, (row.parameters[axis] for row in rows), label)
        _plain_log(ax.yaxis)
        ax.set_title(model, fontsize=10, loc="left")
    # One legend for all panels; the floor is in each.
    entries = {name: line for ax in axes for line, name in zip(*_entries(ax), strict=True)}
    figure.legend(
        entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=8
    )
    for ax in axes[::2]:
        ax.set_ylabel("microseconds")
    return figure, axes


def _entries(ax: Any) -> tuple[list[Any], list[str]]:
    """Lines and names of a panel."""
    return ax.get_legend_handles_labels()


def _growth(rows: Sequence[Row], result: Result, file: Path) -> Path:
    figure, _ = _over_length(_panels(rows), "seqlen_k", "tokens in the prompt")
    return _save(figure, "Prefill attention: time of one layer", _about(result), file)


def _decode(rows: Sequence[Row], result: Result, file: Path) -> Path:
    figure, _ = _over_length(_panels(rows), "context", "tokens in the cache")
    return _save(figure, "Decode attention: time of one layer, one token", _about(result), file)


def _cache_memory(file: Path) -> Path:
    """Computed, not measured: the cache of one sequence, with rings and without."""
    figure, (ax,) = _figure(1, 7.2, 4.4)
    colours = ("#c1121f", "#457b9d", "#2a9d8f", "#bc6c25")
    for model, colour in zip(MODELS, colours, strict=True):
        sizes = [model.cache_bytes(context, rings=True) / 2**30 for context in CONTEXTS]
        label = model.name if model.window is None else f"{model.name}, rings"
        ax.plot(CONTEXTS, sizes, "-o", color=colour, linewidth=1.8, markersize=4, label=label)
        if model.window is not None:
            whole = [model.cache_bytes(context, rings=False) / 2**30 for context in CONTEXTS]
            label = f"{model.name}, every token kept"
            ax.plot(CONTEXTS, whole, "--o", color=colour, linewidth=1.2, markersize=3, label=label)
    _plain_log(ax.yaxis)
    _token_axis(ax, CONTEXTS, "tokens")
    ax.set_ylabel("GiB of keys and values, 16 bit")
    _legend(ax, loc="upper left")
    return _save(figure, "Cache of one sequence, by the models' shapes", "", file)
