"""Our kernels in every model that transformers builds, by its registry of replacement classes.

``transformers.monkey_patching`` looks classes up by name while ``from_pretrained`` and
``from_config`` build a model. What is registered here builds the layer that was asked for, of
transformers' own class, and then does to it what :func:`exafuse.patch` does: the model's class
names, parameters and ``state_dict`` are those of plain transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from exafuse.integrations.patching import replace_forwards, use_our_attention
from exafuse.integrations.transformers import register
from exafuse.layers import resolve_backend

# Names that mean one class in all of transformers (Qwen2MLP, for one, means several); attention,
# MLP and inner norms are built inside the decoder layers.
_LAYERS: dict[str, tuple[str, ...]] = {
    "llama": ("LlamaDecoderLayer", "LlamaRMSNorm", "LlamaRotaryEmbedding"),
    "qwen2": ("Qwen2DecoderLayer", "Qwen2RMSNorm", "Qwen2RotaryEmbedding"),
    "exaone4": ("Exaone4DecoderLayer", "Exaone4RMSNorm", "Exaone4RotaryEmbedding"),
    "exaone4_5": ("Exaone4_5_VisionModel",),
}
# What transformers chooses where nobody asks for an attention.
_DEFAULT_ATTENTION = ("sdpa",)

_ops: ModuleType | None = None  # of the backend in force; None = layers are built plain
_replacements: dict[str, type[nn.Module]] = {}  # by pattern of the class name
_aliases: dict[str, Any] = {}  # what _close_aliases took away


def patch_transformers(backend: str = "auto") -> None:
    """Let every model that transformers builds from now on run on our kernels.

    Concerns ``from_pretrained`` and ``from_config`` of Llama, Qwen2, EXAONE 4 and EXAONE 4.5, also
    where ``pipeline`` or another library calls them; not models that exist already, nor a class
    that is called directly (``LlamaModel(config)``). The attention becomes ``"exafuse"`` where it
    would be ``"sdpa"``, which transformers takes by itself; any other that is asked for stays.
    ``exafuse.unpatch(model)`` makes one such model plain again.

    Args:
        backend: as for :func:`exafuse.patch`.

    Raises:
        ValueError: called for a second time.
        ImportError: transformers is not installed or too old.
    """
    global _ops
    if _ops is not None:
        raise ValueError(
            "patch_transformers: is in force already; call exafuse.unpatch_transformers() first"
        )
    registry = _registry()
    register()
    ops = resolve_backend(backend)
    if not _replacements:
        for family, names in _LAYERS.items():
            package = f"transformers.models.{family}"
            module = importlib.import_module(f"{package}.modeling_{family}")
            for name in names:
                _replacements[f"^{name}$"] = _replacement(getattr(module, name))
    registry.register_patch_mapping(_replacements)
    _close_aliases()
    _ops = ops


def unpatch_transformers() -> None:
    """Undo :func:`patch_transformers`: later models are plain, those that exist stay as they are.

    Raises:
        ValueError: it is not in force.
    """
    global _ops
    if _ops is None:
        raise ValueError(
            "unpatch_transformers: expected a call of exafuse.patch_transformers before"
        )
    _ops = None
    registry = _registry()
    ours = [key for key in registry.get_patch_mapping() if key in _replacements]
    registry.unregister_patch_mapping(ours)
    _restore_names()
    while _aliases:
        name, listing = _aliases.popitem()
        vars(sys.modules[name])["__dir__"] = listing


@contextmanager
def patched_transformers(backend: str = "auto") -> Iterator[None]:
    """:func:`patch_transformers` for the length of a ``with`` block."""
    patch_transformers(backend)
    try:
        yield
    finally:
        unpatch_transformers()


def _registry() -> ModuleType:
    try:
        return importlib.import_module("transformers.monkey_patching")
    except ImportError as error:
        raise ImportError(
            "exafuse.patch_transformers needs transformers >= 5.8, with its module "
            f"monkey_patching: pip install 'transformers>=5.8' ({error}); exafuse.patch(model) "
            "does the same to a loaded model"
        ) from error


def _restore_names() -> None:
    """Give transformers' modules their classes back: it does not, when building a model fails."""
    for module in _modules().values():
        for replacement in _replacements.values():
            if vars(module).get(replacement.__name__) is replacement:
                setattr(module, replacement.__name__, vars(replacement)["_original"])


def _close_aliases() -> None:
    """Let nobody list the modules of transformers 5.8 that stand for renamed ones: building a model
    under a replacement does, and listing one imports an image processor, with what that needs."""
    for name, module in _modules().items():
        listing = vars(module).get("__dir__")
        if listing is not None and vars(module).get("__file__") is None:
            _aliases[name] = listing
            vars(module)["__dir__"] = list


def _modules() -> dict[str, ModuleType]:
    """Those of transformers that are loaded."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.") and isinstance(module, ModuleType)
    }


class _StandsFor(type):
    """Metaclass of replacements: transformers asks them whose instance a layer is."""

    def __instancecheck__(cls, instance: Any) -> bool:
        # transformers also leaves replacements behind in its classes, after they are unregistered.
        return isinstance(instance, vars(cls).get("_original", ())) or super().__instancecheck__(
            instance
        )


def _replacement(original: type[nn.Module]) -> type[nn.Module]:
    """A class that builds ``original`` with our forward, while :func:`patch_transformers` is in
    force, and plain otherwise."""

    def build(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        if cls is not replacement:  # somebody's subclass of it
            made: nn.Module = original.__new__(cls)
            return made
        layer = original(*args, **kwargs)
        if _ops is not None:
            replace_forwards(layer, _ops)
            use_our_attention(layer, _DEFAULT_ATTENTION)
        return layer

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__new__": build,
        "_original": original,
    }
    replacement: Any = _StandsFor(original.__name__, (original,), namespace)
    built: type[nn.Module] = replacement
    return built
