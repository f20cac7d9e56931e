"""Running one side of a comparison: load a model, read a prompt, decode some tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exafuse.config import LayerPlan, ModelConfig, load_config
from exafuse.models.decoder import Decoder
from exafuse.verification.mtp import PlainHead, draft_logits
from exafuse.verification.tower_trace import traced_tower
from exafuse.weights.checkpoint import Checkpoint
from exafuse.weights.names import num_mtp_layers

EMBEDDING = "embedding"
COMPARED_TOKENS = 512  # of a long prompt the last ones are compared: those see the most
DRAFTS = 3  # tokens that the draft module goes on with after the prompt


@dataclass(frozen=True)
class Trace:
    """What one side computed, in fp32 on the CPU.

    ``hidden``: num_layers + 1 tensors ``[tokens, hidden_size]``, embeddings first, the last one
    after the final norm. ``logits [rows, vocab_size]``: the prompt's, then one row per decoded
    token. ``tokens``: the decoded tokens. ``tower``: by name, what the vision tower computed
    before; see ``traced_tower``. ``drafts [rows, vocab_size]``: what the draft module scores along
    the prompt and after it, None without one.
    """

    hidden: tuple[Tensor, ...]
    logits: Tensor
    tokens: tuple[int, ...]
    tower: dict[str, Tensor] = field(default_factory=dict)
    drafts: Tensor | None = None

    def stages(self, config: ModelConfig) -> list[tuple[str, Tensor]]:
        """Names and ``[rows, width]`` of all before the logits, in the order of the
        computation."""
        first = f"{EMBEDDING}, with the features in their places" if self.tower else EMBEDDING
        names = [first, *(_layer_name(layer) for layer in config.layers)]
        names[-1] += ", with the final norm"
        stages = [*self.tower.items(), *zip(names, self.hidden, strict=True)]
        if self.drafts is not None:
            stages.append(("MTP head, scores of its drafts", self.drafts))
        return stages


def _layer_name(layer: LayerPlan) -> str:
    left = layer.window_size[0]
    window = "all tokens" if left < 0 else f"window {left + 1}"
    return f"layer {layer.index} ({window}, {'RoPE' if layer.rope else 'NoPE'}, {layer.norm}-norm)"


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
    vision: dict[str, Tensor] | None = None,
) -> Trace:
    """Load one side, read the prompt, decode ``tokens`` tokens: its own greedy ones, or ``forced``.

    The weights are those of the file rounded to ``rounded_to``; ``precision`` is what they are
    computed in. ``vision`` holds the inputs for the placeholders in ``ids``. The model is gone when
    this returns.
    """
    dtype = getattr(torch, precision)
    config = load_config(folder)
    if side == "transformers":
        model = _load_transformers(folder, config, precision, rounded_to, device)
    else:
        model = load_exafuse(folder, side, dtype, device, progress)
        if chunk is not None:
            model.prefill_chunk = chunk
    if precision != rounded_to:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, rounded_to)))
    is_ours = side != "transformers"
    head = model.mtp if is_ours else _plain_head(folder, config, dtype, rounded_to, device)
    with torch.inference_mode():
        inputs = {name: value.to(device) for name, value in (vision or {}).items()}
        return _trace(model, head, ids.to(device), tokens, forced, inputs, config)


def _plain_head(
    folder: Path, config: ModelConfig, dtype: torch.dtype, rounded_to: str, device: torch.device
) -> PlainHead | None:
    """The draft module of a folder, which transformers leaves out; None without one."""
    tensors = Checkpoint.open(folder).tensors
    number = num_mtp_layers(tensors) if config.model_type == "exaone4_5" else 0
    if not number:
        return None
    from safetensors import safe_open

    weights = {}
    for name in [name for name in tensors if name.startswith("mtp.")]:
        with safe_open(folder / tensors[name].file, "pt") as file:
            weights[name] = file.get_tensor(name).to(getattr(torch, rounded_to))
    return PlainHead(config.with_mtp_layers(number), weights, device, dtype)


def load_exafuse(
    folder: Path, side: str, dtype: torch.dtype, device: torch.device, progress: bool
) -> Any:
    """Our model on the path ``side``."""
    from exafuse.models import from_pretrained

    return from_pretrained(folder, dtype=dtype, device=device, backend=side, progress=progress)


def _load_transformers(
    folder: Path, config: ModelConfig, precision: str, rounded_to: str, device: torch.device
) -> Any:
    import transformers
    from transformers.utils import logging

    options: dict[str, Any] = {}
    auto_class = transformers.AutoModelForCausalLM
    if config.vision is not None:
        auto_class = transformers.AutoModelForImageTextToText
        # transformers refuses the released file, which has a layer type more than layers.
        options["config"] = transformers.Exaone4_5_Config.from_dict(config.to_dict())
    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # Always made in the file's rounding: a module cast to bf16 later would round its RoPE
        # frequencies as well. fp32 takes the documented formula, half precision the default.
        model = auto_class.from_pretrained(
            str(folder),
            dtype=getattr(torch, rounded_to),
            attn_implementation="eager" if precision == "float32" else "sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
    if precision != rounded_to:
        model = model.float()
    return model.eval().to(device)


def _trace(
    model: Any,
    head: Any,
    ids: Tensor,
    tokens: int,
    forced: tuple[int, ...] | None,
    vision: dict[str, Tensor],
    config: ModelConfig,
) -> Trace:
    tower: Any = nullcontext({})
    if vision:
        assert config.vision is not None
        tower = traced_tower(model.model.visual, config.vision, ("image", "video"))
    with tower as stages:
        out = model(
            ids,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=COMPARED_TOKENS,
            **vision,
        )
    hidden = tuple(state[0, -COMPARED_TOKENS:] for state in out.hidden_states)
    logits, decoded = _decode(model, out.logits[0], out.past_key_values, tokens, forced)
    drafts = None
    if head is not None:
        # Each of the last tokens with the one after it, as a text of its own.
        drafted = torch.tensor(decoded[:DRAFTS], device=ids.device)
        inputs = hidden[0][1:], hidden[-1][:-1], drafted
        if isinstance(head, PlainHead):
            drafts = head.draft_logits(*inputs, model.get_input_embeddings(), model.lm_head)
        else:
            drafts = draft_logits(model, *inputs)
        drafts = drafts.cpu()
    kept = tuple(state.float().cpu() for state in hidden)
    return Trace(kept, logits, tuple(decoded), stages, drafts)


def _decode(
    model: Any, logits: Tensor, cache: Any, tokens: int, forced: tuple[int, ...] | None
) -> tuple[Tensor, list[int]]:
    """The prompt's logits and those of each decoded token; the tokens."""
    rows = [logits.float().cpu()]
    decoded: list[int] = []
    last = rows[0][-1]
    for step in range(tokens):
        decoded.append(int(last.argmax()) if forced is None else forced[step])
        if step == tokens - 1:
            break
        token = torch.tensor([[decoded[-1]]], device=logits.device)
        if isinstance(model, Decoder):
            last = model.next_logits(token, cache)[0]
        else:
            last = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
        last = last.float().cpu()
        rows.append(last[None])
    return torch.cat(rows), decoded
