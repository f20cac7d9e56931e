"""The decoding step as a CUDA graph: one replay a token in place of hundreds of launches.

Everything that changes from step to step lives in device tensors that stay where they are: the
newest tokens, the lengths of the rows, their positions, the marks of the penalties. The launches of
the kernels depend on the room in the cache alone, which is made for the whole answer beforehand.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exafuse.generation.call import Call

_log = logging.getLogger("exafuse")
_said: set[str] = set()


def say_once(problem: str) -> None:
    """Warn, once for each reason, that a call asked for a graph and runs without."""
    if problem not in _said:
        _said.add(problem)
        _log.warning("cuda_graph: every step is launched from Python: %s", problem)


def problem(call: Call) -> str:
    """Why the steps of a call cannot be captured, or an empty string."""
    if call.processors or call.criteria:
        return "logits_processor and stopping_criteria are Python that runs at every token"
    if not hasattr(call.model, "fixed_logits"):
        return f"{type(call.model).__name__} has no step of fixed buffers"
    if limit := call.rope_change():
        return f"the frequencies of its RoPE change beyond {limit} positions"
    return device_problem(call.model.device)


def device_problem(device: torch.device) -> str:
    """Why steps on this device cannot be captured, or an empty string."""
    return "" if device.type == "cuda" else f"the model is on the {device.type}"


def capture(
    step: Callable[[], None], generator: torch.Generator | None, device: torch.device
) -> Callable[[], None]:
    """What ``step`` queues on ``device``, as a function that queues it again.

    Nothing runs yet. ``step`` must have run once before, because libraries set themselves up at
    their first call.

    Args:
        step: takes and returns nothing; works on tensors that it finds at the same place each time.
        generator: that it draws from, besides torch's global one.
        device: of the tensors, whichever is the current one.

    Raises:
        RuntimeError: something in it waits for the device, or allocates outside torch.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    # Other threads may allocate meanwhile: what they do is no concern of this capture.
    stream = _stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """To capture on. torch's own belongs to the device that was current at the first capture of
    the process: on another device nothing would be captured, and replays would do nothing."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class GraphStep:
    """Feeds ``ids`` to the model and hands the logits to ``choose``, which writes new ``ids``.

    The first call launches everything, the second captures it, the others replay.

    Args:
        call: of ``generate``; :func:`problem` has found none.
        cache: after the prompt, with room for the whole answer.
        ids: int64 ``[batch]``, the newest tokens.
        choose: takes logits ``[batch, vocab_size]``.
    """

    def __init__(
        self, call: Call, cache: Any, ids: Tensor, choose: Callable[[Tensor], None]
    ) -> None:
        self._call, self._cache, self._ids, self._choose = call, cache, ids, choose
        self._rotary = call.model.fixed_rotary(cache, call.end)
        self._calls = 0
        self._replay: Callable[[], None] = self._step

    def __call__(self, text: Tensor) -> None:
        """One token of every row; ``text`` is not looked at."""
        if self._calls == 1:
            try:
                device = self._call.model.device
                self._replay = capture(self._step, self._call.draw.generator, device)
            except RuntimeError as error:
                say_once(f"the step cannot be captured: {error}")
        self._calls += 1
        self._replay()
        self._cache.count_step()

    def _step(self) -> None:
        self._choose(self._call.model.fixed_logits(self._ids, self._cache, self._rotary))
