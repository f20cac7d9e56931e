"""rms_norm, add_rms_norm (pre-norm models) and rms_norm_add (EXAONE 4)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from exafuse import ops, reference
from torch import Tensor

from .case import EPS, Call, Case, Contender, Inputs, Maker, Settings, compiled, unwritten_like
from .shapes import ModelShape

SUITE = "ops"


def cases(settings: Settings) -> Iterator[Case]:
    """The norm between sublayers, of every model's width."""
    for model in settings.sizes.models:
        for tokens in settings.sizes.tokens:
            yield _case(settings, model, tokens, "rms_norm", tensors=2)
            op = "rms_norm_add" if model.post_norm else "add_rms_norm"
            yield _case(settings, model, tokens, op, tensors=3 if model.post_norm else 4)


def _case(settings: Settings, model: ModelShape, tokens: int, op: str, tensors: int) -> Case:
    width = model.hidden_size

    def make(generator: torch.Generator) -> Inputs:
        maker = Maker(generator, settings.dtype)
        inputs = {"x": maker.normal(tokens, width), "weight": maker.weight(width)}
        if op != "rms_norm":
            inputs["residual"] = maker.normal(tokens, width)
        return inputs

    return Case(
        suite=SUITE,
        op=op,
        name=f"{tokens} x {width}",
        model=model.name,
        parameters={"tokens": tokens, "hidden_size": width},
        bytes=(tensors * tokens * width + width) * settings.element,
        make=make,
        expected=lambda inputs: _as_tuple(getattr(reference, op)(*_arguments(inputs))),
        contenders=_contenders(op),
    )


def _arguments(inputs: Inputs) -> tuple[Any, ...]:
    """In the order of the ops: x, the residual if there is one, weight, eps."""
    residual = (inputs["residual"],) if "residual" in inputs else ()
    return (inputs["x"], *residual, inputs["weight"], EPS)


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _contenders(op: str) -> list[Contender]:
    found = [
        Contender("exafuse", lambda inputs: _exafuse(op, inputs)),
        Contender("torch", _with(_TORCH[op]), "torch"),
        Contender("compile", _with(compiled(_TORCH[op])), "compile"),
    ]
    for peer, functions in (("liger", _LIGER), ("flashinfer", _FLASHINFER), ("quack", _QUACK)):
        if op in functions:
            found.append(Contender(peer, functions[op], peer))
    return found


def _exafuse(op: str, inputs: Inputs) -> Call:
    y = unwritten_like(inputs["x"])
    out = (y, unwritten_like(y)) if op == "add_rms_norm" else y
    arguments, function = _arguments(inputs), getattr(ops, op)
    return lambda: _as_tuple(function(*arguments, out=out))


def _with(function: Callable[..., Any]) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        arguments = _arguments(inputs)
        return lambda: _as_tuple(function(*arguments))

    return prepare


# ---- plain torch, as one would write it ----------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, eps), total


def _rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return residual + F.rms_norm(x, x.shape[-1:], weight, eps)


_TORCH: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_add": _rms_norm_add,
}

# ---- libraries -----------------------------------------------------------------------------------


def _liger(name: str, inputs: Inputs) -> Call:
    function = getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
    arguments = _arguments(inputs)
    return lambda: _as_tuple(function(*arguments))


def _flashinfer_norm(inputs: Inputs) -> Call:
    norm = importlib.import_module("flashinfer").rmsnorm
    x, weight, eps = _arguments(inputs)
    out = unwritten_like(x)

    def call() -> tuple[Tensor]:
        norm(x, weight, eps, out=out)
        return (out,)

    return call


def _flashinfer_add(inputs: Inputs) -> Call:
    add = importlib.import_module("flashinfer").fused_add_rmsnorm
    x, residual, weight, eps = _arguments(inputs)
    x, residual = x.clone(), residual.clone()  # it writes both in place

    def call() -> tuple[Tensor, Tensor]:
        add(x, residual, weight, eps)
        return x, residual

    return call


def _quack_norm(inputs: Inputs) -> Call:
    norm = importlib.import_module("quack").rmsnorm
    x, weight, eps = _arguments(inputs)
    return lambda: (norm(x, weight, eps=eps),)


def _quack_add(inputs: Inputs) -> Call:
    norm = importlib.import_module("quack").rmsnorm
    x, residual, weight, eps = _arguments(inputs)
    return lambda: _as_tuple(norm(x, weight, residual=residual, eps=eps, prenorm=True))


_Functions = dict[str, Callable[[Inputs], Call]]
_LIGER: _Functions = {
    "rms_norm": lambda inputs: _liger("liger_rms_norm", inputs),
    "add_rms_norm": lambda inputs: _liger("liger_fused_add_rms_norm", inputs),
}
_FLASHINFER: _Functions = {"rms_norm": _flashinfer_norm, "add_rms_norm": _flashinfer_add}
_QUACK: _Functions = {"rms_norm": _quack_norm, "add_rms_norm": _quack_add}
