"""Whole models with random weights: prompts read, first token, decoding, beside transformers.

The cache of a decoding case is filled with random keys and values, so that a long context costs no
prompt. transformers' model works on the very weights of ours, as views. Times hold the host's part:
they are what a caller waits for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import exafuse
import torch
from exafuse import ops
from exafuse.generation import graphs
from torch import Tensor

from . import model_profile, transformers_models
from .case import Settings
from .model_configs import BenchModel, lengths
from .results import Row
from .timing import clocks, one_line

# Of the logits, in the 2-norm, between two implementations with the same weights.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
Steps = Callable[[], Tensor]  # one call of a model; returns logits [batch, vocab_size]


def run(settings: Settings) -> Iterator[Row]:
    """The rows of the suite ``models``."""
    plan = lengths(settings.device.type, settings.quick)
    for model in plan.models:
        try:
            ours = exafuse.from_config(
                model.config, dtype=settings.dtype, device=settings.device, seed=0
            )
        except (exafuse.DoesNotFitError, torch.OutOfMemoryError) as error:
            yield blank(settings, "prefill", model.name, "all", 0, 0, "exafuse", error)
            continue
        peer = transformers_models.Peer(ours, model, settings)
        for tokens in plan.prompts:
            yield from _prefill(settings, model, ours, peer, tokens)
        if model.image_grid is not None:
            yield from _image(settings, model, ours, peer)
        for batch, context in plan.decode:
            yield from _decode(settings, model, ours, peer, batch, context, plan.steps)
        if settings.profile:
            model_profile.write(settings, model.name, ours)
        del ours, peer
        free(settings.device)


# ---- cases ---------------------------------------------------------------------------------------


def _prefill(
    settings: Settings, model: BenchModel, ours: Any, peer: transformers_models.Peer, tokens: int
) -> Iterator[Row]:
    if reason := too_long(ours, tokens):
        yield blank(settings, "prefill", model.name, f"1 x {tokens}", 0, 0, "exafuse", reason)
        return
    ids = prompt(ours, 1, tokens, settings)
    size = (weight_bytes(ours) + kv_bytes(ours, 1, tokens), prefill_flops(ours, tokens))

    def read() -> Tensor:
        return ours.next_logits(ids, ours.new_cache(1, tokens))

    case = ("prefill", model.name, f"1 x {tokens}", *size)
    expected = yield from _timed(settings, case, "exafuse", read, tokens)
    if expected is not None:
        yield from _peers(settings, case, peer.prefill(ids), tokens, expected)

    def first() -> Tensor:
        return ours.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None).cpu()

    case = ("first_token", model.name, f"1 x {tokens}", *size)
    if (yield from _timed(settings, case, "exafuse", first, tokens)) is not None:
        yield from _peers(settings, case, peer.first_token(ids), tokens, None)


def _image(
    settings: Settings, model: BenchModel, ours: Any, peer: transformers_models.Peer
) -> Iterator[Row]:
    """A prompt with one image: the tower, the merger and the language model over its tokens."""
    assert model.image_grid is not None
    frames, height, width = model.image_grid
    vision = ours.config.vision
    count = frames * height * width // vision.merge_unit
    ids = prompt(ours, 1, count + 32, settings)
    ids[:, 16 : 16 + count] = ours.config.image_token_id
    pixels = torch.randn(frames * height * width, vision.patch_values, device=settings.device)
    inputs = {
        "pixel_values": pixels.to(settings.dtype),
        "image_grid_thw": torch.tensor([model.image_grid], device=settings.device),
    }

    def read() -> Tensor:
        return ours.next_logits(ids, ours.new_cache(1, ids.shape[1]), **inputs)

    tokens = ids.shape[1]
    size = weight_bytes(ours, vision=True) + kv_bytes(ours, 1, tokens)
    name = f"1 x {tokens}, an image of {width * vision.patch_size} x {height * vision.patch_size}"
    case = ("prefill", model.name, name, size, prefill_flops(ours, tokens))
    expected = yield from _timed(settings, case, "exafuse", read, tokens)
    if expected is not None:
        yield from _peers(settings, case, peer.prefill(ids, **inputs), tokens, expected)


def _decode(
    settings: Settings,
    model: BenchModel,
    ours: Any,
    peer: transformers_models.Peer,
    batch: int,
    context: int,
    steps: int,
) -> Iterator[Row]:
    name = f"{batch} x 1 at {context}"
    room = context + 8 * steps + 64
    if reason := too_long(ours, context):
        yield blank(settings, "decode", model.name, name, 0, 0, "exafuse", reason)
        return
    size = weight_bytes(ours) + kv_bytes(ours, batch, context)
    case = ("decode", model.name, name, size, 2 * batch * products(ours))
    ids = prompt(ours, batch, 1, settings)[:, 0]
    expected: Tensor | None = None
    for contender in ("exafuse", "exafuse, no graph"):
        try:
            cache = filled_cache(ours, batch, context, room, seed=1)
        except (exafuse.DoesNotFitError, torch.OutOfMemoryError) as error:
            yield blank(settings, *case, contender, error)
            return
        graph = contender == "exafuse" and settings.device.type == "cuda"
        if contender != "exafuse" and settings.device.type != "cuda":
            continue  # nothing to leave out
        step = decode_step(ours, ids.clone(), cache, room, graph)
        logits = yield from _timed(settings, case, contender, step, batch, steps)
        expected = logits if expected is None else expected
        del step, cache
        free(settings.device)
    if expected is not None:
        yield from _peers(
            settings, case, peer.decode(ids, batch, context, room), batch, expected, steps
        )


def decode_step(model: Any, ids: Tensor, cache: Any, room: int, graph: bool) -> Steps:
    """One greedy token of every row from fixed buffers; as a CUDA graph from the second call on."""
    rotary = model.fixed_rotary(cache, room)
    logits: list[Tensor] = [ids]

    def step() -> None:
        logits[0] = model.fixed_logits(ids, cache, rotary)
        ids.copy_(logits[0].argmax(dim=-1))

    replay: Callable[[], None] | None = None
    calls = 0

    def call() -> Tensor:
        nonlocal replay, calls
        if graph and calls == 1:
            replay = graphs.capture(step, None, ids.device)
        calls += 1
        (replay or step)()
        cache.count_step()
        return logits[0]

    return call


def filled_cache(model: Any, batch: int, context: int, room: int, seed: int) -> Any:
    """A cache of random keys and values, as if ``context`` tokens a row had been read."""
    cache = model.new_cache(batch, room)
    contents = random_kv(model, batch, context, seed)
    for layer, (keys, values) in zip(cache.layers, contents, strict=True):
        slots = layer.k.shape[1]
        kept = min(context, slots)
        positions = torch.arange(context - kept, context, device=keys.device)
        places = positions % slots if layer.ring else positions
        layer.k[:, places], layer.v[:, places] = keys[:, -kept:], values[:, -kept:]
    cache.advance([context] * batch, context)
    cache.next_positions = cache.next_positions + context
    cache.num_positions = context
    return cache


def random_kv(model: Any, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values ``[batch, context, num_kv_heads, head_dim]`` of one layer after the other."""
    config = model.config
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (batch, context, config.num_kv_heads, config.head_dim)
    for _ in config.layers:
        pair = [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2)]
        yield pair[0].normal_(generator=generator), pair[1].normal_(generator=generator)


# ---- what it costs -------------------------------------------------------------------------------


def products(model: Any) -> int:
    """Weights that a token is multiplied with; the embedding is a lookup."""
    layers = sum(p.numel() for p in model.text.layers.parameters() if p.dim() == 2)
    return layers + int(model.lm_head.weight.numel())


def weight_bytes(model: Any, vision: bool = False) -> int:
    """Bytes of the weights that a call reads."""
    read = [*model.text.layers.parameters(), *model.text.norm.parameters(), model.lm_head.weight]
    if vision:
        read += list(model.model.visual.parameters())
    return sum(p.nbytes for p in read)


def kv_bytes(model: Any, batch: int, context: int) -> int:
    """Keys and values that every layer sees: those of its window, or all."""
    config = model.config
    token = 2 * config.num_kv_heads * config.head_dim * model.dtype.itemsize
    lengths = [
        context if plan.window_size[0] < 0 else min(context, plan.window_size[0] + 1)
        for plan in config.layers
    ]
    return batch * token * sum(lengths)


def prefill_flops(model: Any, tokens: int) -> int:
    """Matrix products of a prompt: every weight of the layers, the visible halves of attention,
    and the scores after the last token."""
    config = model.config
    head = int(model.lm_head.weight.numel())
    pairs = 0
    for plan in config.layers:
        window = tokens if plan.window_size[0] < 0 else min(tokens, plan.window_size[0] + 1)
        pairs += window * (window + 1) // 2 + (tokens - window) * window
    attention = 4 * config.num_heads * config.head_dim * pairs
    return 2 * tokens * (products(model) - head) + 2 * head + attention


def prompt(model: Any, batch: int, tokens: int, settings: Settings) -> Tensor:
    """Random ids ``[batch, tokens]`` that are no placeholders of images."""
    generator = torch.Generator(settings.device).manual_seed(2)
    low = 100 if model.config.vocab_size > 200 else 0
    shape = (batch, tokens)
    return torch.randint(
        low, model.config.vocab_size, shape, generator=generator, device=settings.device
    )


def too_long(model: Any, tokens: int) -> str:
    """Why the model cannot read so many tokens, or an empty string."""
    limit = model.config.max_position_embeddings
    return f"the context of the model is {limit}" if tokens > limit else ""


# ---- measuring -----------------------------------------------------------------------------------


def _peers(
    settings: Settings,
    case: tuple[str, str, str, int, int],
    contenders: Iterator[tuple[str, Steps | Exception]],
    tokens: int,
    expected: Tensor | None,
    steps: int = 1,
) -> Iterator[Row]:
    """Rows of transformers; a contender that cannot be prepared is an exception in its place."""
    for name, call in contenders:
        if isinstance(call, Exception):
            yield blank(settings, *case, name, call)
        else:
            yield from _timed(settings, case, name, call, tokens, steps, expected)
        free(settings.device)


def _timed(
    settings: Settings,
    case: tuple[str, str, str, int, int],
    contender: str,
    call: Steps,
    tokens: int,
    steps: int = 1,
    expected: Tensor | None = None,
) -> Iterator[Row] | Any:
    """A row, timed in rounds of ``steps`` calls after a first one whose logits are checked.

    Returns the logits of the first call, or None if it failed.
    """
    device = settings.device
    row = blank(settings, *case, contender, "not run")
    row.clocks = {"before": clocks(device)}
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        logits = call().clone()
        if expected is not None and expected.is_floating_point():
            row.error = float((logits.float() - expected.float()).norm() / expected.float().norm())
            if not row.error <= TOLERANCE[settings.dtype]:
                row.status = "wrong"
                row.reason = f"logits differ from exafuse's by {row.error:.2g}"
                yield row
                return logits
        call()  # a graph is captured here, a compiler may compile again
        times = _rounds(call, steps, settings)
    except (exafuse.DoesNotFitError, torch.OutOfMemoryError) as error:
        row.status, row.reason = "out of memory", one_line(error)
        yield row
        return None
    except Exception as error:  # a peer's defect must not end the run, ours is one of many rows
        row.status, row.reason = "failed", one_line(error)
        yield row
        return None
    row.q1_us, row.time_us, row.q3_us = statistics.quantiles(times, n=4, method="inclusive")
    row.status, row.reason, row.repeats = "ok", "", len(times) * steps
    row.mode = "host"
    row.clocks["after"] = clocks(device)
    row.extra = {"tokens_per_s": tokens / row.time_us * 1e6}
    if device.type == "cuda":
        row.extra["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    yield row
    return logits


def _rounds(call: Steps, steps: int, settings: Settings) -> list[float]:
    """Microseconds of a call, over at least three rounds; the device has finished in each."""
    times: list[float] = []
    started = time.monotonic()
    while len(times) < 3 or (len(times) < 7 and time.monotonic() - started < 2):
        synchronize(settings.device)
        start = time.perf_counter()
        for _ in range(steps):
            call()
        synchronize(settings.device)
        times.append((time.perf_counter() - start) * 1e6 / steps)
    return times


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what a contender has left behind."""
    from .run import free as give_back

    give_back(device)


def blank(
    settings: Settings,
    op: str,
    model: str,
    case: str,
    num_bytes: int,
    flops: int,
    contender: str,
    reason: Exception | str,
) -> Row:
    """A row that has not run: ``reason`` says why, or is replaced when it does."""
    status = "not run" if reason == "not run" else "unsupported"
    if isinstance(reason, Exception):
        short = isinstance(reason, exafuse.DoesNotFitError | torch.OutOfMemoryError)
        status, reason = "out of memory" if short else "unsupported", one_line(reason)
    path = ops.path_for(settings.device) if contender.startswith("exafuse") else ""
    return Row(
        *("models", op, case, contender, status, reason, model),
        path=path,
        bytes=num_bytes,
        flops=flops,
    )
