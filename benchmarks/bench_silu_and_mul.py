"""silu_and_mul, the activation between the two products of a feed-forward layer."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from exafuse import ops, reference
from torch import Tensor

from .case import Call, Case, Contender, Inputs, Maker, Settings, compiled, unwritten_like
from .shapes import ModelShape

SUITE = "ops"


def cases(settings: Settings) -> Iterator[Case]:
    """Every model's feed-forward width."""
    for model in settings.sizes.models:
        for tokens in settings.sizes.tokens:
            yield _case(settings, model, tokens)


def _case(settings: Settings, model: ModelShape, tokens: int) -> Case:
    width = model.intermediate_size

    def make(generator: torch.Generator) -> Inputs:
        return {"gate_up": Maker(generator, settings.dtype).normal(tokens, 2 * width)}

    return Case(
        suite=SUITE,
        op="silu_and_mul",
        name=f"{tokens} x {width}",
        model=model.name,
        parameters={"tokens": tokens, "intermediate_size": width},
        bytes=3 * tokens * width * settings.element,
        make=make,
        expected=lambda inputs: (reference.silu_and_mul(inputs["gate_up"]),),
        contenders=_contenders(),
    )


def _contenders() -> list[Contender]:
    by_compiler = compiled(_silu_and_mul)
    return [
        Contender("exafuse", _exafuse),
        Contender("torch", lambda inputs: lambda: (_silu_and_mul(inputs["gate_up"]),), "torch"),
        Contender("compile", lambda inputs: lambda: (by_compiler(inputs["gate_up"]),), "compile"),
        Contender("liger", _liger, "liger"),
        Contender("flashinfer", _flashinfer, "flashinfer"),
    ]


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _out(gate_up: Tensor) -> Tensor:
    return unwritten_like(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)


def _exafuse(inputs: Inputs) -> Call:
    gate_up = inputs["gate_up"]
    out = _out(gate_up)
    return lambda: (ops.silu_and_mul(gate_up, out=out),)


def _liger(inputs: Inputs) -> Call:
    swiglu = importlib.import_module("liger_kernel.transformers.functional").liger_swiglu
    gate, up = (part.contiguous() for part in inputs["gate_up"].chunk(2, dim=-1))
    return lambda: (swiglu(gate, up),)


def _flashinfer(inputs: Inputs) -> Call:
    silu_and_mul = importlib.import_module("flashinfer").silu_and_mul
    gate_up = inputs["gate_up"]
    out = _out(gate_up)

    def call() -> tuple[Tensor]:
        silu_and_mul(gate_up, out)
        return (out,)

    return call
