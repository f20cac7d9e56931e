"""Does a checkpoint give what it should here? Two computations on the same weights, compared.

In fp32 the two sides are held against each other directly. In bf16 and fp16 two correct programs
differ by their roundings: there the other side runs in fp32, and the side under test may be away
from it by a small multiple of what transformers is away in the same dtype.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exafuse.config import ModelConfig, load_config
from exafuse.config.head import require_language_model
from exafuse.errors import BackendError, TemplateError
from exafuse.generation.settings import context_length
from exafuse.verification.pictures import with_pictures
from exafuse.verification.report import Report, compare_fp32, compare_half
from exafuse.verification.sides import Trace, run_side
from exafuse.verification.tiny import TINY_CHUNK, TINY_CONFIGS, TINY_PROMPT_TOKENS, make_tiny
from exafuse.weights.hub import resolve_folder

SIDES = ("reference", "transformers", "cuda", "emulated")
PROMPT = (
    "The oldest lighthouse on this coast was built of limestone in 1843. Its keepers wrote down the"
    " weather four times a day, and their books, of which sixty-one survive, tell of storms, fogs"
    " and 27 shipwrecks. The keeper's daughter"
)


def verify(
    folder_or_name: str | Path,
    against: str | None = None,
    *,
    prompt: str | None = None,
    tokens: int = 64,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> Report:
    """Compare a checkpoint's output with another computation on the same weights.

    A model with a vision tower also gets two images and a video, of random pixels.

    Args:
        folder_or_name: as for ``from_pretrained``.
        against: "reference" (plain PyTorch), "transformers", "cuda" or "emulated"; None =
            reference if the backend is cuda or emulated, else transformers.
        prompt: text that both sides read; None = a built-in one, or random tokens for a
            checkpoint without tokenizer.
        tokens: how many greedy tokens to decode after it, one at a time. Both sides are fed those
            of the other side, so that one near tie does not hide the rest.
        dtype, device, backend: of the side under test, as for ``from_pretrained``.
        progress: show bars while loading.

    Raises:
        ValueError: a side against itself, or unknown names.
        ConfigError: the checkpoint is no language model.
        Whatever ``from_pretrained`` raises.
    """
    folder = resolve_folder(folder_or_name)
    config = load_config(folder)
    require_language_model(config.head, str(folder_or_name), "verify")
    ids = _prompt_ids(folder, config, prompt)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "progress": progress}
    return compare_folder(
        folder, str(folder_or_name), ids, tokens, backend=backend, against=against, **options
    )


def compare_folder(
    folder: Path,
    name: str,
    ids: Tensor,
    tokens: int,
    *,
    backend: str = "auto",
    against: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    prefill_chunk: int | None = None,
) -> Report:
    """:func:`verify` on prompt ids ``[1, prompt_tokens]`` int64, before pictures are put between
    them; ``name`` stands in the report.

    ``prefill_chunk`` makes our models read the prompt in pieces of so many tokens.
    """
    config = load_config(folder)
    vision: dict[str, Tensor] = {}
    if config.vision is not None:
        ids, vision = with_pictures(ids, config)
    _check_lengths(ids.shape[1], tokens, config)
    kind = _dtype_name(dtype, config)
    place = _device(device, backend)
    side = _path_of(backend, place)
    against = (
        ("transformers" if side == "reference" else "reference") if against is None else against
    )
    _check_sides(side, against, kind, config)
    common: dict[str, Any] = {"device": place, "progress": progress, "chunk": prefill_chunk}
    common |= {"vision": vision}

    def run(which: str, precision: str, forced: tuple[int, ...] | None) -> Trace:
        return run_side(which, folder, ids, tokens, forced, precision, kind, **common)

    notes = _notes(config, ids.shape[1] + tokens)
    build: Callable[..., Report] = compare_fp32
    if kind == "float32":
        other = run(against, kind, None)
        traces = [run(side, kind, other.tokens), other]
    else:
        if side == "reference" and against != "transformers":
            side, against = against, side  # the kernels are what may be wrong
        truth = run(against, "float32", None)
        yardstick = "reference" if config.sliding_window == 1 else "transformers"
        traces = [run(which, kind, truth.tokens) for which in (side, yardstick)] + [truth]
        build = compare_half
    return build(
        *traces,
        config,
        model=name,
        side=side,
        against=against,
        dtype=kind,
        device=str(place),
        num_prompt_tokens=ids.shape[1],
        num_tokens=tokens,
        notes=notes,
    )


# ---- arguments ------------------------------------------------------------------------------


def _prompt_ids(folder: Path, config: ModelConfig, prompt: str | None) -> Tensor:
    from exafuse.text.loading import load_processor, tokenizer_of

    try:
        tokenizer = tokenizer_of(load_processor(folder))
    except TemplateError:
        if prompt is not None:
            raise
        return random_ids(48, config.vocab_size)
    ids = tokenizer(PROMPT if prompt is None else prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ValueError("prompt: expected at least one token, got an empty text")
    result: Tensor = ids
    return result


def random_ids(count: int, vocab_size: int, seed: int = 0) -> Tensor:
    """int64 ``[1, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (1, count), generator=generator)


def _check_lengths(num_prompt_tokens: int, tokens: int, config: ModelConfig) -> None:
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    context = context_length(config)
    if num_prompt_tokens + tokens > context:
        raise ValueError(
            f"{num_prompt_tokens} prompt tokens and {tokens} more exceed the model's"
            f" {context} positions: shorten the prompt or lower --tokens"
        )


def _check_sides(side: str, against: str, dtype: str, config: ModelConfig) -> None:
    if against not in SIDES:
        raise ValueError(f"against: expected one of {', '.join(SIDES)}, got {against!r}")
    if against == side:
        raise ValueError(
            f"against: the backend here is {side!r} already, and a side compared with itself proves"
            " nothing; choose another"
        )
    if dtype != "float32" and not {side, against} & {"reference", "transformers"}:
        raise ValueError(
            f"against: in {dtype} compare {side} and {against} with the reference, one at a time"
        )
    if against == "transformers" and config.sliding_window == 1:
        raise ValueError(
            "against: transformers keeps the wrong keys for a window of 1 token; compare with the"
            " reference"
        )


def _dtype_name(dtype: str | torch.dtype | None, config: ModelConfig) -> str:
    name = config.dtype if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, bfloat16, float16 or float32, got {dtype!r}")
    return name


def _device(device: str | torch.device | None, backend: str) -> torch.device:
    needed = {"cuda": "cuda", "emulated": "cpu"}.get(backend)
    if device is not None:
        place = torch.device(device)
        # Elsewhere the ops take the reference: it would be compared with itself, and agree.
        if needed not in (None, place.type):
            raise ValueError(
                f"backend={backend!r}: runs on a {needed} device only, got device={str(place)!r};"
                " leave the device out, or choose another backend"
            )
        return place
    if needed is not None:
        return torch.device(needed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _path_of(backend: str, device: torch.device) -> str:
    """The side that ``backend`` means on ``device``."""
    if backend in ("reference", "cuda", "emulated"):
        return backend
    if backend != "auto":
        raise ValueError(f"backend: expected auto, cuda, emulated or reference, got {backend!r}")
    from exafuse import ops
    from exafuse.ops.front_door import emulator_problem

    path: str = ops.path_for(device)
    if ops.path == "emulated" and path != ops.path and device.type == "cpu":
        raise BackendError(f"EXAFUSE_BACKEND=emulated: {emulator_problem()}")
    return path


def _notes(config: ModelConfig, length: int) -> tuple[str, ...]:
    windows = {plan.window_size[0] + 1 for plan in config.layers if plan.window_size[0] >= 0}
    return tuple(
        f"{length} tokens do not reach the end of the window of {window}: its edge is not tested"
        for window in sorted(windows)
        if length <= window
    )


# ---- tiny models ----------------------------------------------------------------------------


def verify_tiny(
    family: str = "all",
    against: str | None = None,
    *,
    tokens: int = 64,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
) -> Iterator[Report]:
    """:func:`verify` on tiny random models of one family or "all", written to a temporary folder
    and loaded from there by both sides; yields one report per entry of ``TINY_CONFIGS``."""
    families = sorted({str(values["model_type"]) for values in TINY_CONFIGS.values()})
    if family not in ("all", *families):
        raise ValueError(f"family: expected all, {', '.join(families)}, got {family!r}")
    for name, values in TINY_CONFIGS.items():
        if family not in ("all", values["model_type"]):
            continue
        with tempfile.TemporaryDirectory(prefix="exafuse-tiny-") as folder, _one_thread():
            make_tiny(values, Path(folder), dtype)
            report = compare_folder(
                Path(folder),
                f"tiny {name}",
                random_ids(TINY_PROMPT_TOKENS, load_config(values).vocab_size),
                tokens,
                backend=backend,
                against=against,
                dtype=dtype,
                device=device,
                prefill_chunk=TINY_CHUNK,
            )
        yield report


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices of this size take several times longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
