"""``exafuse verify``, ``plan`` and ``info``: is it right, what would it cost, what runs here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from exafuse.cli.registry import BACKENDS, DTYPES, Run, command


@command("verify", "Compare a checkpoint's output with another path, layer by layer.")
def _verify(parser: argparse.ArgumentParser) -> Run:
    sides = ("reference", "transformers", "cuda", "emulated")
    families = ("all", "llama", "qwen2", "exaone4", "exaone4_5")
    add = parser.add_argument
    add("model", nargs="?", help="checkpoint folder or Hub name")
    add("--tiny", choices=families, help="tiny random models of these families instead")
    add("--against", choices=sides, help="default: reference for kernels, else transformers")
    add("--tokens", type=int, default=64, metavar="N", help="greedy tokens (default: 64)")
    add("--prompt", metavar="TEXT", help="what the model reads first")
    add("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="the side under test")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress bars")

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.verification.verify import verify, verify_tiny

        if (arguments.model is None) == (arguments.tiny is None):
            raise ValueError("verify: expected either a checkpoint or --tiny")
        options: dict[str, Any] = {
            "tokens": arguments.tokens,
            "device": arguments.device,
            "backend": arguments.backend,
        }
        if arguments.tiny:
            if arguments.prompt is not None:
                raise ValueError("--prompt: tiny models have no tokenizer")
            reports = []
            for report in verify_tiny(
                arguments.tiny, arguments.against, dtype=arguments.dtype, **options
            ):
                reports.append(report)
                if not arguments.json:
                    print(report.summary() if report.ok else report, flush=True)
            if arguments.json:
                print(json.dumps([report.to_dict() for report in reports], indent=2))
            return 0 if all(report.ok for report in reports) else 1
        report = verify(
            arguments.model,
            arguments.against,
            prompt=arguments.prompt,
            dtype=arguments.dtype,
            progress=not arguments.quiet,
            **options,
        )
        print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
        return 0 if report.ok else 1

    return run


@command("info", "Show what is installed and which path each op takes on this machine.")
def _info(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if anything keeps the kernels off"
    )

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli import info

        result = info.report()
        print(info.to_json(result) if arguments.json else info.render(result))
        return 1 if arguments.strict and result["problems"] else 0

    return run


@command("plan", "Show each layer's window, RoPE or NoPE, norms and cache, from config.json alone.")
def _plan(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("model", help="checkpoint folder, config.json, or Hub name")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (default: the model's)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--png", metavar="FILE", help="draw who attends to what (matplotlib)")

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.cli.plan import draw, plan

        dtype = None if arguments.dtype == "auto" else arguments.dtype
        result = plan(arguments.model, arguments.context, arguments.batch, dtype)
        if arguments.png:
            draw(result, arguments.png)
        print(json.dumps(result.to_dict(), indent=2) if arguments.json else result)
        return 0

    return run
