"""flash_attn_func and flash_attn_varlen_func: prompts, chunks of prompts, packed sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from exafuse import ops, reference

from . import attention_peers
from .attention_peers import Window
from .case import Call, Case, Contender, Inputs, Maker, Settings, unwritten_like
from .roofline import attention_flops, visible_pairs
from .shapes import ModelShape

SUITE = "attention"
CAUSAL = (-1, 0)


def cases(settings: Settings) -> Iterator[Case]:
    """Causal prompts of every model, its window where it has one, a late chunk, packed prompts."""
    sizes = settings.sizes
    for model in sizes.models:
        window = sizes.window_of(model)
        for length in sizes.prefill:
            yield _dense(settings, model, length, length, CAUSAL)
            if window is not None and length > window:
                yield _dense(settings, model, length, length, (window - 1, 0))
        for queries, keys in sizes.chunks:
            yield _dense(settings, model, queries, keys, CAUSAL)
        yield _packed(settings, model, sizes.packed)


def window_name(window: Window) -> str:
    """How a case is called: the window counts the query itself."""
    if window == (-1, -1):
        return "all"
    return "causal" if window[0] < 0 else f"window {window[0] + 1}"


def _dense(settings: Settings, model: ModelShape, queries: int, keys: int, window: Window) -> Case:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        return {
            "q": maker.normal(1, queries, heads, head_dim),
            "k": maker.normal(1, keys, kv_heads, head_dim),
            "v": maker.normal(1, keys, kv_heads, head_dim),
        }

    def exafuse(inputs: Inputs) -> Call:
        q, k, v = (inputs[name] for name in "qkv")
        out = unwritten_like(q)
        return lambda: (ops.flash_attn_func(q, k, v, window_size=window, out=out),)

    pairs = visible_pairs(queries, keys, *window)
    lengths = f"{keys}" if queries == keys else f"{queries} on {keys}"
    # A chunk at the end of a windowed prompt would not read the keys before its window.
    read_keys = keys if window[0] < 0 else min(keys, queries + window[0])
    return Case(
        suite=SUITE,
        op="flash_attn_func",
        name=f"{lengths} {window_name(window)}",
        model=model.name,
        parameters={"seqlen_q": queries, "seqlen_k": keys, "window": list(window)}
        | {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
        bytes=2 * (queries * heads + read_keys * kv_heads) * head_dim * settings.element,
        flops=attention_flops(pairs, heads, head_dim),
        make=make,
        expected=lambda i: (reference.flash_attn_func(i["q"], i["k"], i["v"], window_size=window),),
        contenders=[Contender("exafuse", exafuse), *attention_peers.contenders(window)],
    )


def _packed(settings: Settings, model: ModelShape, lengths: Sequence[int]) -> Case:
    heads, kv_heads, head_dim, total = (
        *(model.num_heads, model.num_kv_heads, model.head_dim),
        sum(lengths),
    )

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        return {
            "q": maker.normal(total, heads, head_dim),
            "k": maker.normal(total, kv_heads, head_dim),
            "v": maker.normal(total, kv_heads, head_dim),
            "cu_seqlens": attention_peers.offsets(lengths, maker.device),
        }

    def arguments(inputs: Inputs) -> tuple:
        starts = (inputs["cu_seqlens"], inputs["cu_seqlens"])
        return (*(inputs[name] for name in "qkv"), *starts, max(lengths), max(lengths))

    def exafuse(inputs: Inputs) -> Call:
        values, out = arguments(inputs), unwritten_like(inputs["q"])
        return lambda: (ops.flash_attn_varlen_func(*values, causal=True, out=out),)

    def varlen(inputs: Inputs) -> Call:
        q, k, v = (inputs[name] for name in "qkv")
        return attention_peers.varlen_packed(q, k, v, lengths, lengths, CAUSAL)

    pairs = sum(visible_pairs(length, length, *CAUSAL) for length in lengths)
    return Case(
        suite=SUITE,
        op="flash_attn_varlen_func",
        name=f"{'+'.join(map(str, lengths))} causal",
        model=model.name,
        parameters={"lengths": list(lengths), "window": list(CAUSAL)}
        | {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim},
        bytes=2 * total * (heads + kv_heads) * head_dim * settings.element,
        flops=attention_flops(pairs, heads, head_dim),
        make=make,
        expected=lambda i: (reference.flash_attn_varlen_func(*arguments(i), causal=True),),
        contenders=[
            Contender("exafuse", exafuse),
            Contender("varlen", varlen, "varlen"),
            *(
                Contender(name, lambda i, name=name: _one_by_one(name, i, lengths), name)
                for name in ("sdpa-flash", "sdpa-cudnn", "sdpa-math")
            ),
        ],
    )


def _one_by_one(name: str, inputs: Inputs, lengths: Sequence[int]) -> Call:
    """SDPA has no packed layout: a call for each sequence."""
    parts = [inputs[name].split(list(lengths)) for name in "qkv"]
    calls = [
        attention_peers.sdpa(name, {"q": q[None], "k": k[None], "v": v[None]}, CAUSAL)
        for q, k, v in zip(*parts, strict=True)
    ]
    return lambda: (torch.cat([call()[0][0] for call in calls]),)
