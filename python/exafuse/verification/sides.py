"""Running one side of a comparison: load a model, read a prompt, decode some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COMPARED_TOKENS = 512  # of a long prompt the last ones are compared: those see the most


@dataclass(frozen=True)
class Trace:
    """What one side computed, in fp32 on the CPU.

    ``hidden``: num_layers + 1 tensors ``[tokens, hidden_size]``, embeddings first, the last one
    after the final norm. ``logits [rows, vocab_size]``: the prompt's, then one row per decoded
    token. ``tokens``: the decoded tokens.
    """

    hidden: tuple[Tensor, ...]
    logits: Tensor
    tokens: tuple[int, ...]


def run_side(
    side: str,
    folder: Path,
    ids: Tensor,
    tokens: int,
    forced: tuple[int, ...] | None,
    precision: str,
    rounded_to: str,
    *,
    device: torch.device,
    progress: bool = False,
    chunk: int | None = None,
) -> Trace:
    """Load one side, read the prompt, decode ``tokens`` tokens: its own greedy ones, or ``forced``.

    The weights are those of the file rounded to ``rounded_to``; ``precision`` is what they are
    computed in. The model is gone when this returns.
    """
    dtype = getattr(torch, precision)
    if side == "transformers":
        model = _load_transformers(folder, precision, rounded_to, device)
    else:
        model = load_exafuse(folder, side, dtype, device, progress)
        if chunk is not None:
            model.prefill_chunk = chunk
    if precision != rounded_to:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, rounded_to)))
    with torch.inference_mode():
        return _trace(model, ids.to(device), tokens, forced, is_ours=side != "transformers")


def load_exafuse(
    folder: Path, side: str, dtype: torch.dtype, device: torch.device, progress: bool
) -> Any:
    """Our model on the path ``side``."""
    from exafuse.models import from_pretrained

    return from_pretrained(folder, dtype=dtype, device=device, backend=side, progress=progress)


def _load_transformers(folder: Path, precision: str, rounded_to: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # Always made in the file's rounding: a module cast to bf16 later would round its RoPE
        # frequencies as well. fp32 takes the documented formula, half precision the default.
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=getattr(torch, rounded_to),
            attn_implementation="eager" if precision == "float32" else "sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
    if precision != rounded_to:
        model = model.float()
    return model.eval().to(device)


def _trace(
    model: Any, ids: Tensor, tokens: int, forced: tuple[int, ...] | None, *, is_ours: bool
) -> Trace:
    out = model(ids, use_cache=True, output_hidden_states=True, logits_to_keep=COMPARED_TOKENS)
    hidden = tuple(state[0, -COMPARED_TOKENS:].float().cpu() for state in out.hidden_states)
    rows = [out.logits[0].float().cpu()]
    cache = out.past_key_values
    decoded: list[int] = []
    last = rows[0][-1]
    for step in range(tokens):
        decoded.append(int(last.argmax()) if forced is None else forced[step])
        if step == tokens - 1:
            break
        token = torch.tensor([[decoded[-1]]], device=ids.device)
        if is_ours:
            last = model.next_logits(token, cache)[0]
        else:
            last = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
        last = last.float().cpu()
        rows.append(last[None])
    return Trace(hidden, torch.cat(rows), tuple(decoded))
