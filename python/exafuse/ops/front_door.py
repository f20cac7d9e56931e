"""Which path a call takes: the kernels of an extension, or the reference. One class for all ops.

A call goes to the reference when its tensors live where the kernels do not. It goes to the ops
registered with torch, whose kernels are the same, when autograd or a compiler has to follow it, or
when a tensor has no plain memory (fake, wrapped by a transform, a subclass); everything else goes
to the extension directly. ``EXAFUSE_BACKEND`` chooses for the module
:mod:`exafuse.ops`, read once at import:

* ``auto`` (default): CUDA tensors take the kernels; where those cannot run, the reference, and a
  warning says so once.
* ``cuda``: the same, but CUDA tensors without kernels are a :class:`~exafuse.errors.BackendError`.
* ``reference``: plain PyTorch for every tensor.
* ``emulated``: CPU tensors run the kernels' own source on the emulator of tests/emulator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from exafuse.errors import BackendError

BACKENDS = ("auto", "cuda", "reference", "emulated")

# Every op; a binary without one of them is an old build.
KERNELS = (
    "add_rms_norm",
    "apply_rope",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "qk_norm_rope",
    "qk_norm_rope_cache",
    "rms_norm",
    "rms_norm_add",
    "silu_and_mul",
    "vision_attn",
)
# The kernels that compute gradients, which the registered ops call.
GRADIENTS = (
    "add_rms_norm_backward",
    "qk_norm_rope_backward",
    "rms_norm_backward",
    "silu_and_mul_backward",
)
# What says how much memory some of them want beside their results.
WORKSPACES = (
    "flash_attn_with_kvcache_workspace",
    "qk_norm_rope_backward_workspace",
    "rms_norm_backward_workspace",
    "vision_attn_workspace",
)
OLDEST_GPU = (8, 0)
# Their definitions read lengths or slots, which tensors on the meta device do not have.
READ_NUMBERS = (
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "qk_norm_rope_cache",
    "vision_attn",
)

_REBUILD = (
    "rebuild it, in the folder with exafuse's sources: "
    "pip install --force-reinstall --no-cache-dir --no-deps ."
)
_log = logging.getLogger("exafuse")
# How many modes look at every call, as tracers, fake tensors and profilers do.
_functorch: Any = torch._C._functorch
_DERIVATIVES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack
P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])


def documented_by(definition: Callable[..., object]) -> Callable[[F], F]:
    """Give a method the docstring of the reference op that defines it."""

    def decorate(method: F) -> F:
        method.__doc__ = definition.__doc__
        return method

    return decorate


def with_rows(grad: Tensor) -> Tensor:
    """A gradient as kernels read it: they take any strides between rows, not within them.

    Autograd hands over whatever came: the gradient of a sum is one number, expanded.
    """
    mergeable = grad.dim() <= 5 and (grad.dim() == 0 or grad.stride(-1) == 1)
    # Not contiguous(): nothing is contiguous already, with any strides.
    return grad if mergeable else grad.clone(memory_format=torch.contiguous_format)


class FrontDoor:
    """The choice of path for one backend, made anew for every call and cheap enough for that.

    Args:
        backend: one of :data:`BACKENDS`.

    Attributes:
        path: the backend's name.
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise BackendError(f"backend: expected {', '.join(BACKENDS)}, got {backend!r}")
        self.path = backend
        self._takes_cpu = backend == "emulated"
        self._extension: Any = None  # loaded at the first call that can use it
        self._gave_up = backend == "reference"
        self._said: set[str] = set()
        self._gpus: dict[int, bool] = {}  # by index: whether the kernels run there

    def kernels(self, first: Tensor, *others: Tensor | None) -> Any:
        """The extension that takes a call on these tensors directly, or None.

        ``others`` are those that may carry a gradient besides ``first``. None as well where the
        call has to be seen, by autograd or a compiler: :meth:`beyond` says who takes it then.
        """
        if self._gave_up or not isinstance(first, Tensor) or torch.compiler.is_compiling():
            return None
        if _watchers() or forward_ad._current_level >= 0:
            return None
        if not (self._takes_cpu or first.is_cuda):
            return None
        if torch.is_grad_enabled():
            for tensor in (first, *others):
                if tensor is not None and getattr(tensor, "requires_grad", False):
                    return None
        extension = self._extension or self._load()
        if extension is None or self._takes_cpu or self._gpu_fits(first.get_device()):
            return extension
        return None

    def beyond(self, first: Tensor, definition: Callable[P, R]) -> Callable[P, R]:
        """The function that takes a call which the extension does not take directly.

        The registered op of the name of ``definition``, a reference op, where kernels exist for
        tensors like ``first``: it shows itself to autograd, compilers and wrapped tensors. So it
        does to compilers and tracers everywhere: a definition may look at numbers, which breaks a
        graph and which fake tensors do not have. Else ``definition`` itself, which is what the
        derivatives of torch.func and forward mode go through: registered ops have none of those.
        """
        if self._gave_up or not isinstance(first, Tensor):
            return definition
        if _transform() in _DERIVATIVES or forward_ad._current_level >= 0:
            return definition
        if first.is_meta:
            here = definition.__name__ in READ_NUMBERS
        else:
            here = self._takes_cpu or first.is_cuda or is_traced(first)
        if not here:
            return definition
        if first.is_cuda and not self._gpus.get(first.get_device(), True):
            return definition
        from exafuse.ops import registered

        if type(first).__name__ == "DTensor":
            registered.allow_dtensors(definition.__name__)
        return cast(Callable[P, R], getattr(registered, definition.__name__))

    def written(self, *tensors: Tensor | None) -> None:
        """Tell autograd that a kernel wrote into tensors that the caller brought."""
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)

    def say_once(self, message: str) -> None:
        """Warn of what runs another way than one may expect, once for each message."""
        if message not in self._said:
            self._said.add(message)
            _log.warning(message)

    def path_for(self, device: torch.device) -> tuple[str, str]:
        """``(path, reason)`` of an op with a kernel on tensors of ``device``; never raises."""
        if self.path == "reference":
            return "reference", "EXAFUSE_BACKEND=reference"
        if self.path == "emulated":
            if device.type != "cpu":
                return "reference", f"the emulator takes CPU tensors, not {device.type}"
            problem = emulator_problem()
            return ("reference", problem) if problem else ("emulated", "kernels run on the CPU")
        if device.type != "cuda":
            return "reference", f"{device.type} tensors have no kernels"
        problem = extension_problem() or gpu_problem(device.index)
        return ("reference", problem) if problem else ("cuda", "CUDA kernel")

    def _gpu_fits(self, index: int) -> bool:
        """Whether the kernels run on this GPU, asked once; an error if not, unless ``auto``."""
        fits = self._gpus.get(index)
        if fits is None:
            problem = gpu_problem(index)
            if problem and self.path != "auto":
                raise BackendError(f"backend {self.path!r} cannot run here: {problem}")
            fits = self._gpus[index] = not problem
            if problem:
                self.say_once(f"exafuse runs in plain PyTorch on cuda:{index}: {problem}")
        return fits

    def _load(self) -> Any:
        """The extension, or None after saying why there is none (an error unless ``auto``)."""
        problem = emulator_problem() if self.path == "emulated" else extension_problem()
        if problem:
            if self.path != "auto":
                raise BackendError(f"backend {self.path!r} cannot run here: {problem}")
            self._gave_up = True
            _log.warning("exafuse runs in plain PyTorch on this GPU: %s", problem)
            return None
        self._extension = load_emulated() if self.path == "emulated" else load_cuda()
        return self._extension


def _transform() -> object:
    """The innermost transform of torch.func that is at work, or None."""
    if torch.compiler.is_compiling():
        return None
    interpreter = _functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


def is_traced(tensor: Tensor) -> bool:
    """Whether somebody looks at what becomes of a tensor: a compiler, a mode, a transform, its own
    class."""
    if torch.compiler.is_compiling() or _watchers() or _transform() is not None:
        return True
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def backend_from_environment() -> str:
    """The value of EXAFUSE_BACKEND, checked."""
    backend = os.environ.get("EXAFUSE_BACKEND", "auto")
    if backend not in BACKENDS:
        raise BackendError(f"EXAFUSE_BACKEND: expected {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def load_cuda() -> ModuleType:
    """``exafuse._C``; ImportError if it is not installed, BackendError if it is an old build."""
    return _complete(importlib.import_module("exafuse._C"))


@functools.cache
def load_emulated() -> ModuleType:
    """The emulated extension; ImportError if it was not built, BackendError if it is an old build.

    Looked for in ``EXAFUSE_EMULATED_LIB``, beside this package, and where tests/emulator/build.py
    puts it in a source checkout.
    """
    file = os.environ.get("EXAFUSE_EMULATED_LIB")
    if file is None and importlib.util.find_spec("exafuse._C_emulated") is not None:
        return _complete(importlib.import_module("exafuse._C_emulated"))
    root = Path(__file__).resolve().parents[3]
    path = Path(file) if file else root / "build" / "emulator" / "plain" / "_C_emulated.so"
    if not path.is_file():
        raise ImportError(
            f"the emulated extension is not built (no file {path}); in a source checkout run: "
            "python tests/emulator/build.py --variant plain"
        )
    loader = importlib.machinery.ExtensionFileLoader("_C_emulated", str(path))
    spec = importlib.util.spec_from_loader("_C_emulated", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return _complete(module)


def emulator_problem() -> str:
    """Why the emulated kernels cannot run, or an empty string."""
    try:
        load_emulated()
    except (ImportError, BackendError) as error:
        return str(error)
    return ""


def cuda_problem() -> str:
    """Why the CUDA kernels cannot run on the current GPU, or an empty string."""
    return extension_problem() or gpu_problem()


def extension_problem() -> str:
    """Why the CUDA kernels cannot run in this process on any GPU, or an empty string."""
    try:
        extension = load_cuda()
    except ImportError as error:
        if importlib.util.find_spec("exafuse._C") is None:
            return "exafuse was installed without its compiled extension"
        return f"the compiled extension does not load: {error}"
    except BackendError as error:
        return str(error)
    problem: str = extension.device_problem()
    if problem:
        return problem
    if not torch.cuda.is_available():
        return "this torch sees no GPU (torch.cuda.is_available() is False)"
    return ""


def gpu_problem(index: int | None = None) -> str:
    """Why the CUDA kernels cannot run on this GPU (the current one), or an empty string."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, "
            f"the kernels need {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
        )
    return ""


def _complete(extension: ModuleType) -> ModuleType:
    needed = (*KERNELS, *GRADIENTS, *WORKSPACES, "NotAPlainTensor")
    missing = [name for name in needed if not hasattr(extension, name)]
    if missing:
        remedy = _REBUILD
        if "emulated" in extension.__name__:
            remedy = "rebuild it: python tests/emulator/build.py --variant plain"
        raise BackendError(
            f"{extension.__name__} is an old build that lacks {', '.join(missing)}; {remedy}"
        )
    return extension
