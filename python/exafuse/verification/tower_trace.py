"""What a vision tower computes on its way, ours or transformers': the modules have one layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from exafuse.config import VisionConfig


@contextmanager
def traced_tower(
    tower: nn.Module, config: VisionConfig, kinds: Iterable[str]
) -> Iterator[dict[str, Tensor]]:
    """The stages of every call of ``tower`` inside the context, fp32 on the CPU, by their names.

    Args:
        tower: of our model, or of transformers'.
        config: names the blocks that see whole frames.
        kinds: what each call encodes ("image", "video"), in order.

    Yields:
        ``[num_patches, hidden_size]`` of the patch embedding and of each block, in window order,
        and ``[tokens, out_hidden_size]`` in the order of the input.
    """
    stages: dict[str, Tensor] = {}
    calls = iter(kinds)
    kind = ""

    def keep(name: str, value: Any) -> None:
        stages[f"{kind}: {name}"] = value.detach().float().cpu()

    def on_call(_: nn.Module, __: Any) -> None:
        nonlocal kind
        kind = next(calls)

    def on_embedding(_: nn.Module, args: Any) -> None:
        keep("patch embedding", args[0])

    def on_block(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            # Our blocks leave their last addition to the next norm.
            keep(name, out if isinstance(out, Tensor) else out[0] + out[1])

        return hook

    def on_tokens(_: nn.Module, __: Any, out: Any) -> None:
        keep("merger", out[1] if isinstance(out, tuple) else out.pooler_output)

    blocks: Any = tower.blocks
    handles = [
        tower.register_forward_pre_hook(on_call),
        blocks[0].register_forward_pre_hook(on_embedding),
        tower.register_forward_hook(on_tokens),
    ]
    for index, block in enumerate(blocks):
        full = index in config.full_attention_blocks
        sees = "whole frames" if full else f"windows of {config.window_size} pixels"
        handles.append(block.register_forward_hook(on_block(f"tower block {index} ({sees})")))
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()
