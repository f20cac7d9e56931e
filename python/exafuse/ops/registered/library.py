"""How an op becomes ``torch.ops.exafuse.<op>``: definition, implementation, gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from exafuse.reference._check import check_device

# Any: torch leaves its methods untyped.
_library: Any = torch.library.Library("exafuse", "DEF")  # type: ignore[no-untyped-call]
registered = torch.ops.exafuse


class Direct:
    """What runs inside a registered op: the ops on plain tensors, without gradients.

    Attributes:
        ops: the module to take them from; :mod:`exafuse.ops` unless something else is set.
    """

    ops: Any = None

    def __getattr__(self, name: str) -> Any:
        if self.ops is None:
            from exafuse import ops

            self.ops = ops
        return getattr(self.ops, name)


direct = Direct()


def like(x: Tensor) -> Tensor:
    """A result of the shape and dtype of ``x``; results of registered ops are contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def like_if(wanted: bool, x: Tensor) -> Tensor:
    """The same, or the empty tensor that stands for a gradient nobody wants."""
    return like(x) if wanted else x.new_empty(0)


def _plain(x: Any) -> Any:
    """Subclasses without a dispatch of their own arrive here as they are."""
    if isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter):
        return x.as_subclass(Tensor)
    return x


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op.

    Args:
        schema: name, arguments and results, as torch writes them.
        run: computes it, on tensors of any device.
        fake: makes results of the right shape and dtype on tensors without memory.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    @torch.no_grad()
    def implementation(*args: Any, **kwargs: Any) -> Any:
        with _unwatched(), _uncast(args):
            results = run(*map(_plain, args), **{n: _plain(x) for n, x in kwargs.items()})
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(x.contiguous() for x in results)

    def fake_on_one_device(*args: Any, **kwargs: Any) -> Any:
        _check_devices(name, args)
        return fake(*args, **kwargs)

    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"exafuse::{name}", fake_on_one_device, lib=_library)


def _unwatched() -> AbstractContextManager[Any]:
    """Inside, no mode looks at calls: it has seen this one, and the op is to be one."""
    watched = torch._C._len_torch_dispatch_stack()
    context: AbstractContextManager[Any] = _disable_current_modes() if watched else nullcontext()
    return context


def _uncast(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """Inside, autocast is off: plain PyTorch is to compute what a kernel does."""
    kind = next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def check_writable(**tensors: Tensor) -> None:
    """Raise for views that torch writes through a copy, which an op cannot hand back."""
    if torch.compiler.is_compiling():  # which cannot ask, and copies for itself
        return
    for name, tensor in tensors.items():
        if tensor.is_neg() or tensor.is_conj():
            raise ValueError(
                f"{name}: expected memory to write to, got a negated or conjugated view; "
                "call .resolve_neg() or .resolve_conj() first"
            )


def _check_devices(name: str, args: tuple[Any, ...]) -> None:
    """Meta tensors among others would come here, and give results that nobody computed."""
    declared = getattr(registered, name).default._schema.arguments
    tensors = [(d.name, x) for d, x in zip(declared, args, strict=False) if isinstance(x, Tensor)]
    for argument, tensor in tensors:
        check_device(tensors[0][1].device, **{argument: tensor})


def register_batching(name: str, rule: Callable[..., Any]) -> None:
    """Give an op its rule under ``torch.vmap``: ``rule(info, in_dims, *arguments)``."""
    torch.library.register_vmap(f"exafuse::{name}", rule, lib=_library)


def differentiate(name: str, save: Callable[..., None], formula: Callable[..., Any]) -> None:
    """Give an op its gradient.

    Args:
        save: ``save(ctx, inputs, output)`` keeps what the formula needs.
        formula: ``formula(ctx, *gradients of the results)`` -> one gradient or None an input.
    """

    def on_one_mesh(ctx: Any, *grads: Any) -> Any:
        return formula(ctx, *_distributed(grads))

    torch.library.register_autograd(
        f"exafuse::{name}", on_one_mesh, setup_context=save, lib=_library
    )


def _distributed(grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of DTensors, with those of results that nobody used, which autograd makes as plain
    zeros, on the mesh of the others."""
    first = next((x for x in grads if type(x).__name__ == "DTensor"), None)
    if first is None:
        return grads
    from torch.distributed.tensor import DTensor, Replicate

    mesh = first.device_mesh
    whole = [Replicate()] * mesh.ndim
    return tuple(DTensor.from_local(x, mesh, whole) if type(x) is Tensor else x for x in grads)


def differentiate_once(name: str, of: str | None = None) -> None:
    """Say that an op, which computes the gradient of the op ``of``, has none itself.

    torch would give wrong numbers and a warning.
    """

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        op = of or name.removesuffix("_backward")
        raise NotImplementedError(
            f"exafuse.ops.{op}: expected one derivative, got a derivative of its gradient; "
            f"exafuse.reference.{op} has them all"
        )

    differentiate(name, lambda ctx, inputs, output: None, refuse)
