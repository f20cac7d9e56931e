"""vision_attn: rotation and attention of a vision tower, in windows and over whole images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from exafuse import ops, reference
from torch import Tensor

from . import attention_peers
from .bench_qk_norm_rope import rope_tables
from .case import Call, Case, Contender, Inputs, Maker, Settings, unwritten_like
from .roofline import attention_flops
from .shapes import VISION, VisionShape

SUITE = "attention"
EVERY_TOKEN = (-1, -1)


def cases(settings: Settings) -> Iterator[Case]:
    """Both towers: one image in windows, and the same image as a whole."""
    tokens = settings.sizes.vision_tokens
    for shape in VISION:
        yield _case(settings, shape, [shape.window] * (tokens // shape.window), "windows")
        yield _case(settings, shape, [tokens], "one segment")


def _case(settings: Settings, shape: VisionShape, lengths: Sequence[int], kind: str) -> Case:
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tokens = sum(lengths)

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        cos, sin = rope_tables(tokens, head_dim, maker.device)
        return {
            "qkv": maker.normal(tokens, (heads + 2 * kv_heads) * head_dim),
            "cos": cos,
            "sin": sin,
            "cu_seqlens": attention_peers.offsets(lengths, maker.device),
        }

    def arguments(inputs: Inputs) -> tuple:
        tables = (inputs["cos"], inputs["sin"], inputs["cu_seqlens"])
        return (inputs["qkv"], heads, kv_heads, *tables, max(lengths))

    def exafuse(inputs: Inputs) -> Call:
        values = arguments(inputs)
        out = unwritten_like(inputs["qkv"], tokens, heads, head_dim)
        return lambda: (ops.vision_attn(*values, out=out),)

    def split(inputs: Inputs) -> tuple[Tensor, ...]:
        packed = inputs["qkv"].view(tokens, heads + 2 * kv_heads, head_dim)
        return packed.split([heads, kv_heads, kv_heads], dim=1)

    def rotated(inputs: Inputs, attend) -> Call:
        """Rotation as transformers does it, then ``attend(q, k, v)``, both in the time."""
        cos, sin = (torch.cat((inputs[x], inputs[x]), -1)[:, None] for x in ("cos", "sin"))
        q, k, v = split(inputs)

        def turn(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

        return lambda: (attend(turn(q), turn(k), v),)

    def sdpa(name: str, inputs: Inputs) -> Call:
        """One batched call, as all segments are equally long."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = {
                name: x.reshape(len(lengths), lengths[0], x.shape[1], head_dim)
                for name, x in (("q", q), ("k", k), ("v", v))
            }
            out = attention_peers.sdpa(name, parts, EVERY_TOKEN)()[0]
            return out.reshape(tokens, heads, head_dim)

        return rotated(inputs, attend)

    def varlen(inputs: Inputs) -> Call:
        starts = (inputs["cu_seqlens"], inputs["cu_seqlens"])
        attend = attention_peers.varlen_function(heads != kv_heads, EVERY_TOKEN)
        longest = max(lengths)
        return rotated(inputs, lambda q, k, v: attend(q, k, v, *starts, longest, longest))

    pairs = sum(length * length for length in lengths)
    return Case(
        suite=SUITE,
        op="vision_attn",
        name=f"{tokens} in {kind}" + (f" of {lengths[0]}" if len(lengths) > 1 else ""),
        model=shape.name,
        parameters={"tokens": tokens, "segment": lengths[0], "num_heads": heads}
        | {"num_kv_heads": kv_heads, "head_dim": head_dim},
        bytes=tokens * head_dim * (2 * (heads + kv_heads) * settings.element + 4),
        flops=attention_flops(pairs, heads, head_dim),
        make=make,
        expected=lambda inputs: (reference.vision_attn(*arguments(inputs)),),
        contenders=[
            Contender("exafuse", exafuse),
            *(
                Contender(name, lambda inputs, name=name: sdpa(name, inputs), name)
                for name in attention_peers.SDPA
            ),
            Contender("varlen", varlen, "varlen"),
        ],
    )
