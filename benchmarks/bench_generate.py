"""Decode speed beside transformers, on the same checkpoint, prompt and device, in alternating
pairs.

Run as ``python -m exafuse.benchmarks.bench_generate FOLDER`` (installed) or directly from a
checkout. Each pair decodes the same number of greedy tokens once with transformers (sdpa, dynamic
cache) and once with exafuse; the order inside a pair alternates, so a machine that warms up or
slows down favours neither. The figure is the median over the pairs of the ratio of the two
speeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from itertools import pairwise
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import exafuse
import torch
import transformers


class Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with every token."""
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def tokens_per_second(self) -> float:
        """From the median time between two tokens: prefill and a hiccup of the machine drop out."""
        return 1 / statistics.median(b - a for a, b in pairwise(self.stamps[1:]))


def run(
    folder: str, dtype: str, device: str, prompt_tokens: int, num_tokens: int, pairs: int
) -> dict[str, Any]:
    """Alternating pairs; raises if the two sides do not generate the same ids in fp32."""
    kind = getattr(torch, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=kind, attn_implementation="sdpa", device_map=None
    )
    theirs = theirs.to(device).eval()
    ours = exafuse.from_pretrained(folder, dtype=kind, device=device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, ours.config.vocab_size, (1, prompt_tokens), generator=generator)
    ids = ids.to(device)

    def with_transformers(count: int, clock: Clock) -> torch.Tensor:
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )

    def with_exafuse(count: int, clock: Clock) -> torch.Tensor:
        result: torch.Tensor = ours.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, streamer=clock
        )
        return result

    sides = {"transformers": with_transformers, "exafuse": with_exafuse}
    for generate in sides.values():
        generate(4, Clock())  # warm up
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        order = list(sides) if pair % 2 == 0 else list(reversed(sides))
        tokens = {}
        for name in order:
            clock = Clock()
            tokens[name] = sides[name](num_tokens, clock)
            speeds[name].append(clock.tokens_per_second())
        if dtype == "float32" and not torch.equal(tokens["exafuse"], tokens["transformers"]):
            raise RuntimeError("the two sides generated different ids: the timing means nothing")
    ratios = [a / b for a, b in zip(speeds["exafuse"], speeds["transformers"], strict=True)]
    return {
        "folder": os.path.basename(os.path.normpath(folder)),
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": prompt_tokens,
        "new_tokens": num_tokens,
        "tokens_per_s": {name: [round(s, 2) for s in values] for name, values in speeds.items()},
        "ratios": [round(r, 3) for r in ratios],
        "median_ratio": round(statistics.median(ratios), 3),
    }


def main() -> None:
    """Parse the command line, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="checkpoint folder")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    result = run(
        arguments.folder,
        arguments.dtype,
        arguments.device,
        arguments.prompt_tokens,
        arguments.new_tokens,
        arguments.pairs,
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
