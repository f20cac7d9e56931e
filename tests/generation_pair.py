"""A tiny model in transformers and here, and the prompts that tests of ``generate`` continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import exafuse
import tiny_models
import torch
from exafuse.generation.generate import GenerationConfig
from torch import Tensor

FAMILIES = {
    "llama": {},
    "qwen2": {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 5, "sliding_window_pattern": 4},
}


class Pair:
    """The same weights in transformers and here."""

    def __init__(self, family: str, folder: Path, **overrides: Any) -> None:
        self.theirs = tiny_models.build(family, seed=3, **FAMILIES[family], **overrides)
        tiny_models.save(self.theirs, folder)
        self.ours = exafuse.from_pretrained(
            folder, backend="reference", dtype="float32", device="cpu", progress=False
        )

    def check(self, ids: Tensor, pad: int | None = None, seed: int = 0, **kwargs: Any) -> Tensor:
        """Both continue ``ids`` alike and leave torch's generator alike; returns the answer."""
        torch.manual_seed(seed)
        expected = self.theirs.generate(ids, pad_token_id=pad, **kwargs)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        if pad is not None:
            kwargs["generation_config"] = GenerationConfig(pad_token_id=pad)
        got = self.ours.generate(ids, **kwargs)
        assert got.tolist() == expected.tolist()
        assert got.dtype == torch.int64
        assert torch.equal(torch.get_rng_state(), state), "the global generator moved differently"
        return got


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(10, 97, (batch, length), generator=torch.Generator().manual_seed(batch))


def left_padded(pad: int = 0) -> tuple[Tensor, Tensor]:
    ids, mask = prompt(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in ((0, 4), (2, 7)):
        ids[row, :padding], mask[row, :padding] = pad, 0
    return ids, mask


def token_at(pair: Pair, ids: Tensor, row: int, step: int, **kwargs: Any) -> int:
    """The new token of that row and step in a free run: as an eos it ends the row there at last."""
    torch.manual_seed(0)
    free = pair.theirs.generate(ids, max_new_tokens=step + 1, **kwargs)
    return int(free[row, ids.shape[1] + step])
