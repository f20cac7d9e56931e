"""flash_attn_with_kvcache: a decode step, alone and in batches, and a few drafted tokens."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from exafuse import ops, reference

from . import attention_peers
from .attention_peers import Window
from .bench_flash_attn import CAUSAL, window_name
from .case import Call, Case, Contender, Inputs, Maker, Settings, Unsupported, unwritten_like
from .roofline import attention_flops, visible_pairs
from .shapes import ModelShape

SUITE = "decode"
PAGE = 16  # slots a page, for libraries that read paged caches only


def cases(settings: Settings) -> Iterator[Case]:
    """Contexts and batches for every model; its window where the context is longer."""
    sizes = settings.sizes
    for model in sizes.models:
        window = sizes.window_of(model)
        for batch, context in sizes.decode:
            yield _case(settings, model, batch, 1, context, CAUSAL)
            if window is not None and context > window:
                yield _case(settings, model, batch, 1, context, (window - 1, 0))
        for queries, context in sizes.drafts:
            yield _case(settings, model, 1, queries, context, CAUSAL)


def _case(
    settings: Settings, model: ModelShape, batch: int, queries: int, context: int, window: Window
) -> Case:
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        return {
            "q": maker.normal(batch, queries, heads, head_dim),
            "k": maker.normal(batch, context, kv_heads, head_dim),
            "v": maker.normal(batch, context, kv_heads, head_dim),
            "cache_seqlens": torch.full((batch,), context, dtype=torch.int32, device=maker.device),
        }

    def exafuse(inputs: Inputs) -> Call:
        q, k_cache, v_cache = (inputs[name] for name in "qkv")
        lengths, out = inputs["cache_seqlens"], unwritten_like(q)

        def call():
            result = ops.flash_attn_with_kvcache(
                q, k_cache, v_cache, cache_seqlens=lengths, window_size=window, out=out
            )
            return (result,)

        return call

    def expected(inputs: Inputs):
        result = reference.flash_attn_with_kvcache(
            *(inputs[name] for name in "qkv"),
            cache_seqlens=inputs["cache_seqlens"],
            window_size=window,
        )
        return (result,)

    pairs = batch * visible_pairs(queries, context, *window)
    read_keys = context if window[0] < 0 else min(context, queries + window[0])
    name = f"batch {batch}, context {context} {window_name(window)}"
    return Case(
        suite=SUITE,
        op="flash_attn_with_kvcache",
        name=name if queries == 1 else f"{name}, {queries} tokens",
        model=model.name,
        parameters={"batch": batch, "seqlen_q": queries, "context": context}
        | {"window": list(window), "num_heads": heads, "num_kv_heads": kv_heads}
        | {"head_dim": head_dim},
        bytes=2 * batch * (queries * heads + read_keys * kv_heads) * head_dim * settings.element,
        flops=attention_flops(pairs, heads, head_dim),
        make=make,
        expected=expected,
        contenders=[Contender("exafuse", exafuse), *_peers(window, queries)],
        reads=True,
    )


def _peers(window: Window, queries: int) -> list[Contender]:
    """One query over its window: peers get those keys alone, which needs no mask of them."""
    if queries > 1:
        return attention_peers.contenders(window)
    left = window[0]

    def narrowed(contender: Contender) -> Contender:
        def prepare(inputs: Inputs) -> Call:
            seen = slice(None) if left < 0 else slice(-left - 1, None)
            return contender.prepare(inputs | {x: inputs[x][:, seen] for x in "kv"})

        return Contender(contender.name, prepare, contender.peer)

    found = [narrowed(c) for c in attention_peers.contenders((-1, -1)) if c.name != "flashinfer"]
    return [*found, Contender("flashinfer", lambda i: _flashinfer(i, left), "flashinfer")]


def _flashinfer(inputs: Inputs, left: int) -> Call:
    """Its planned decode over pages; the plan is made once, as a serving engine does a step."""
    module = importlib.import_module("flashinfer")
    q, k, v = (inputs[name] for name in "qkv")
    batch, context, kv_heads, head_dim = k.shape
    if context % PAGE:
        raise Unsupported(f"a context of {context} is no multiple of its pages of {PAGE}")
    pages = context // PAGE
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    whole = {"dtype": torch.int32, "device": q.device}
    wrapper.plan(
        torch.arange(0, (batch + 1) * pages, pages, **whole),
        torch.arange(batch * pages, **whole),
        torch.full((batch,), PAGE, **whole),
        *(q.shape[2], kv_heads, head_dim, PAGE),
        window_left=left,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    cache = tuple(x.view(batch * pages, PAGE, kv_heads, head_dim) for x in (k, v))
    queries = q[:, 0]
    return lambda: (wrapper.run(queries, cache)[:, None],)
