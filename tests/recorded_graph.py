"""A CUDA graph's stand-in on the CPU: records what a step queues, and queues it again.

As with a graph, a replay runs no Python of the step: the same operators and kernels on the same
memory, with the numbers that the host knew when it was recorded. So a step that bakes in something
that changes (a length, a position, a tensor that is made anew) answers wrongly here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from exafuse.ops import front_door
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recorder(TorchDispatchMode):
    """Runs and records every operator within ``with``, and every kernel of :meth:`watched`."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[Callable[[], None]] = []
        self._kept: list[Any] = []  # a graph's memory stays its own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten._local_scalar_dense:
            raise RuntimeError("operation not permitted when stream is capturing: a host read")
        results = func(*args, **kwargs)
        self._kept.append((args, kwargs, results))
        fresh = not any(result.alias_info for result in func._schema.returns)
        if fresh or func._schema.is_mutable:
            self.commands.append(lambda: _again(func, args, kwargs, results, fresh))
        return results

    def watched(self, extension: Any) -> SimpleNamespace:
        """The functions of an extension; calls within ``with`` are recorded."""

        def recorded(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if _active is self:
                    self._kept.append((args, kwargs))
                    self.commands.append(lambda: function(*args, **kwargs))
                return function(*args, **kwargs)

            return call

        names = [name for name in dir(extension) if not name.startswith("__")]
        members = {name: getattr(extension, name) for name in names}
        return SimpleNamespace(
            **{
                name: recorded(member)
                if callable(member) and not isinstance(member, type) and "workspace" not in name
                else member
                for name, member in members.items()
            }
        )

    def replay(self) -> None:
        """Everything that was recorded, once more."""
        for command in self.commands:
            command()


_active: Recorder | None = None


def _again(func: Any, args: Any, kwargs: Any, results: Any, fresh: bool) -> None:
    values = func(*args, **kwargs)
    if fresh:  # its results belong where the commands after it expect them
        for old, new in zip(tree_flatten(results)[0], tree_flatten(values)[0], strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)


class RecordedGraphs:
    """Takes the place of ``exafuse.generation.graphs.capture`` for a model on emulated kernels.

    A capture runs nothing and is followed by a replay; here it runs the step, and the first replay
    does nothing.
    """

    def __init__(self, backend: Any) -> None:
        self.captures = 0
        self.replays = 0
        self._backend = backend

    def capture(
        self, step: Callable[[], None], generator: torch.Generator | None, device: torch.device
    ) -> Callable[[], None]:
        global _active
        recorder = _active = Recorder()
        extension, watchers = self._backend._extension, front_door._watchers
        self._backend._extension = recorder.watched(extension)
        front_door._watchers = lambda: 0  # a capture is no mode: ops go to the kernels directly
        try:
            with recorder:
                step()
        finally:
            _active, self._backend._extension = None, extension
            front_door._watchers = watchers
        self.captures += 1
        first = True

        def replay() -> None:
            nonlocal first
            if not first:
                self.replays += 1
                recorder.replay()
            first = False

        return replay
