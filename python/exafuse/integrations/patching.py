"""``exafuse.patch(model)``: our kernels inside the layers of a transformers model.

Only the ``forward`` of layers of this one instance is replaced, and remembered. Parameters, module
names and classes stay, so ``state_dict``, ``save_pretrained``, adapters, quantised linear layers,
offloading hooks and tensor-parallel plans go on working; :func:`unpatch` gives the original back.
"""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from torch import nn

from exafuse.integrations import layers
from exafuse.integrations.transformers import NAME, register
from exafuse.layers import resolve_backend

Model = TypeVar("Model", bound=nn.Module)

# By class name in transformers: families that only differ in names share a forward.
_SHARED: dict[str, Callable[..., Any]] = {
    "RMSNorm": layers.rms_norm,
    "MLP": layers.mlp,
    "Attention": layers.self_attention,
    "RotaryEmbedding": layers.rotary_embedding,
    "DecoderLayer": layers.pre_norm_layer,
}
_FAMILIES = ("Llama", "Qwen2", "Exaone4", "Exaone4_5_")
FORWARDS: dict[str, Callable[..., Any]] = {
    **{family + layer: _SHARED[layer] for family in _FAMILIES for layer in _SHARED},
    "Exaone4DecoderLayer": layers.post_norm_layer,
    "Exaone4_5_DecoderLayer": layers.post_norm_layer,
    "Exaone4_5_VisionAttention": layers.vision_attention,
    "Exaone4_5_VisionBlock": layers.vision_block,
    "Exaone4_5_VisionModel": layers.vision_tower,
}

# On a patched model or layer: the configs whose attention was changed, and what it was.
_ATTENTION = "_exafuse_attention"
_FORWARD = layers.FORWARD


def patch(model: Model, backend: str = "auto") -> Model:
    """Run the layers of a transformers model on our kernels, in place.

    Llama, Qwen2, EXAONE 4 and EXAONE 4.5: norms, QK-norm with RoPE, attention over whatever cache
    the model uses, the MLP's activation, and the vision tower's attention. Everything else of the
    model stays as it is, its weights and its config too (but for the attention implementation,
    which becomes ``"exafuse"`` until :func:`unpatch`).

    Args:
        model: a transformers model, or one wrapped around it (an adapter).
        backend: ``"auto"`` (kernels on a GPU, plain PyTorch elsewhere), ``"cuda"``,
            ``"reference"`` or ``"emulated"``.

    Returns:
        The same model.

    Raises:
        ValueError: the model is patched already, or has no layer that we know.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a loaded transformers model, got {type(model).__name__}")
    if is_patched(model):
        raise ValueError("model: is patched already; call exafuse.unpatch(model) first")
    register()
    if not replace_forwards(model, resolve_backend(backend)):
        ours = type(model).__module__.startswith("exafuse.")
        raise ValueError(
            "model: expected a transformers model of Llama, Qwen2, EXAONE 4 or EXAONE 4.5, got "
            + (
                f"exafuse's own {type(model).__name__}, which runs on the kernels as it is"
                if ours
                else f"{type(model).__name__} without any of their layers"
            )
        )
    use_our_attention(model)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`, or what :func:`exafuse.patch_transformers` did to a model built under it:
    the model computes what plain transformers computes, bit by bit.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(
            "model: expected one that exafuse.patch was called on, or that was loaded under "
            "exafuse.patch_transformers"
        )
    for module in model.modules():
        for config, name in vars(module).pop(_ATTENTION, ()):
            config._attn_implementation_internal = name
        if _FORWARD in vars(module):
            _restore_forward(module)
    return model


@contextmanager
def patched(model: Model, backend: str = "auto") -> Iterator[Model]:
    """:func:`patch` for the length of a ``with`` block."""
    patch(model, backend)
    try:
        yield model
    finally:
        unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether any layer of the model runs one of our forwards."""
    return any(_FORWARD in vars(module) for module in model.modules())


def replace_forwards(model: nn.Module, ops: ModuleType) -> bool:
    """Give every layer that we know, and that has none yet, our forward on ``ops``.

    Returns:
        Whether there is any such layer.
    """
    known = [(module, FORWARDS[name]) for module, name in _known_layers(model)]
    for module, forward in known:
        if _FORWARD not in vars(module) and not _is_wrapped_norm(module):
            # An offloading hook keeps the forward that it wraps under another name.
            attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
            vars(module)[_FORWARD] = vars(module).get(attribute, _ABSENT)
            method = types.MethodType(_method(forward, ops, type(module)), module)
            setattr(module, attribute, method)
    return bool(known)


def _is_wrapped_norm(module: nn.Module) -> bool:
    """Whether something else has replaced the forward of a norm, which then stays as it is."""
    wrapped = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    return wrapped and type(module).__name__.endswith("RMSNorm")


def use_our_attention(model: nn.Module, instead_of: Container[str] | None = None) -> None:
    """Set the configs in the model to our attention; :func:`unpatch` sets them back.

    ``instead_of``: only those that name one of these; None = all.
    """
    before = []
    for config, name in _attention_implementations(model):
        if instead_of is None or name in instead_of:
            before.append((config, name))
            config._attn_implementation_internal = NAME
    if before:
        vars(model)[_ATTENTION] = before


def _restore_forward(module: nn.Module) -> None:
    before = vars(module).pop(_FORWARD)
    hooked = vars(module).get("_old_forward")  # a hook that came after us wraps our method
    if isinstance(hooked, types.MethodType) and hasattr(hooked.__func__, _FORWARD):
        if before is _ABSENT:
            before = types.MethodType(type(module).forward, module)
        module._old_forward = before
    elif before is _ABSENT:
        del module.forward
    else:
        module.forward = before


class _Absent:
    """Stands for an attribute that was not there; one of it, also in copies of a model."""

    def __deepcopy__(self, memo: object) -> _Absent:
        return self

    def __reduce__(self) -> NoReturn:
        # pickle would store the names of our forwards, and find transformers' own behind them.
        raise pickle.PicklingError(
            "a patched model cannot be pickled; save its state_dict(), use save_pretrained, or "
            "call exafuse.unpatch(model) first and exafuse.patch(model) where it is loaded"
        )


_ABSENT = _Absent()


def _known_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Layers of transformers' own classes that have a forward here."""
    for module in model.modules():
        cls = type(module)
        if cls.__name__ in FORWARDS and cls.__module__.startswith("transformers.models."):
            yield module, cls.__name__


def _attention_implementations(model: nn.Module) -> list[tuple[Any, str]]:
    """Each config in the model, once, with the attention that it names."""
    found: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config, config._attn_implementation_internal
    return list(found.values())


def _method(
    forward: Callable[..., Any], ops: ModuleType, cls: type[nn.Module]
) -> Callable[..., Any]:
    """``forward`` as a method, with the signature of the one that it replaces."""

    @functools.wraps(cls.forward)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(ops, self, *args, **kwargs)

    setattr(method, _FORWARD, True)  # how an undo knows it
    return method
