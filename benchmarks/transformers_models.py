"""transformers' models on the weights of ours: eager, SDPA, static cache with torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from exafuse.weights.names import saved_name, unmerged_state_dict
from torch import Tensor

from .case import Settings, Unsupported
from .model_configs import BenchModel

ATTENTION = ("eager", "sdpa")


class Peer:
    """One model of ours in transformers; its parameters are views of ours and cost no memory.

    Every method yields (name, call) for each way transformers has to do it, or (name, exception)
    for a way that is closed.
    """

    def __init__(self, ours: Any, model: BenchModel, settings: Settings) -> None:
        self._ours, self._model, self._settings = ours, model, settings
        self._problem: Exception | None = None
        if settings.peers is not None and "transformers" not in settings.peers:
            self._problem = Unsupported("not asked for")
            return
        try:
            self._theirs = _build(ours, model.config)
        except Exception as error:  # an older transformers lacks a family, or wants torchvision
            self._problem = error

    def prefill(self, ids: Tensor, **inputs: Tensor) -> Iterator[tuple[str, Any]]:
        """Logits after the last token of a prompt, with a cache left behind."""
        for name in self._ways():
            if self._problem is not None:
                yield name, self._problem
                continue
            yield (
                name,
                lambda: self._theirs(ids, use_cache=True, logits_to_keep=1, **inputs).logits[:, -1],
            )

    def first_token(self, ids: Tensor) -> Iterator[tuple[str, Any]]:
        """``generate`` of one token, on the host."""
        for name in self._ways():
            if self._problem is not None:
                yield name, self._problem
                continue
            mask = torch.ones_like(ids)
            yield (
                name,
                lambda mask=mask: self._theirs.generate(
                    *(ids,),
                    **{"attention_mask": mask, "max_new_tokens": 1, "do_sample": False},
                    pad_token_id=0,
                ).cpu(),
            )

    def decode(self, ids: Tensor, batch: int, context: int, room: int) -> Iterator[tuple[str, Any]]:
        """One greedy token of every row after ``context`` random keys and values."""
        for name in (*self._ways(), "transformers static, compiled"):
            if self._problem is not None:
                yield name, self._problem
                continue
            static = "static" in name
            if static and self._settings.device.type != "cuda":
                yield name, Unsupported("compiles for long on a CPU")
                continue
            try:
                cache = self._filled(batch, context, room if static else None)
            except torch.OutOfMemoryError as error:
                yield name, error
                continue
            yield name, self._step(ids.clone()[:, None], cache, context, static)

    def _ways(self) -> Iterator[str]:
        """Names of the attention implementations, each set when its turn comes."""
        for kind in ATTENTION:
            if self._problem is None:
                self._theirs.set_attn_implementation(kind)
            yield f"transformers {kind}"

    def _filled(self, batch: int, context: int, room: int | None) -> Any:
        from transformers import DynamicCache, StaticCache

        from .bench_models import random_kv

        config = self._theirs.config.get_text_config()
        cache = (
            DynamicCache(config=config)
            if room is None
            else StaticCache(config=config, max_cache_len=room)
        )
        for layer, (keys, values) in enumerate(random_kv(self._ours, batch, context, seed=1)):
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        return cache

    def _step(self, ids: Tensor, cache: Any, context: int, compiled: bool) -> Any:
        forward = self._theirs.forward
        if compiled:
            forward = torch.compile(forward, mode="reduce-overhead", fullgraph=False)
        positions = torch.full_like(ids, context)

        def call() -> Tensor:
            output = forward(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits: Tensor = output.logits[:, -1].clone()
            ids.copy_(logits.argmax(dim=-1, keepdim=True))
            positions.add_(1)
            return logits

        return call


def _build(ours: Any, values: dict[str, Any]) -> Any:
    """transformers' model of the same config; nothing is allocated but its tables."""
    import transformers

    config = transformers.AutoConfig.for_model(**values)
    kind = transformers.AutoModelForCausalLM
    if "vision_config" in values:
        kind = transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        theirs = kind.from_config(config, dtype=ours.dtype)
    weights = {saved_name(n, ours): tensor for n, tensor in unmerged_state_dict(ours).items()}
    missing, _ = theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    needed = [
        name for name in missing if not (name == "lm_head.weight" and config.tie_word_embeddings)
    ]
    if needed:
        raise Unsupported(f"transformers wants {needed[0]} and {len(needed) - 1} more")
    for module in theirs.modules():  # tables are no weights: made where they can be computed
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(ours.device):
                fresh = type(module)(getattr(module, "config", None) or module.dim)
            for name, value in fresh.named_buffers(recurse=False):
                module.register_buffer(name, value, persistent=False)
    return theirs.eval()
