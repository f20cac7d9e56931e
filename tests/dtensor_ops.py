"""Every op on DTensors of two gloo processes, against the same op on whole tensors: run by
test_torch_composability.py in processes of its own."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from api_calls import CALLS, Arguments, cloned
from exafuse import ops, reference
from torch import Tensor

NONE = ("flash_attn_varlen_func", "flash_attn_with_kvcache", "qk_norm_rope_cache", "vision_attn")
ROWS = ("x", "residual", "gate_up", "gate", "up", "qkv", "q", "k", "v", "positions")


def gradients(results: tuple[Any, ...], arguments: Arguments) -> list[Tensor]:
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(sum((r * r).sum() for r in results), leaves))


def process(rank: int, file: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor import init_device_mesh as mesh_of

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    mesh = mesh_of("cpu", (2,))
    for name, call in CALLS.items():
        arguments = call.arguments(torch.float32)
        splits = [{}, dict.fromkeys(ROWS, 0)]
        if call.op == "flash_attn_func":
            splits.append(dict.fromkeys("qkv", 2))  # heads
        for split in splits:

            def given(x: Any, n: str, split: dict[str, int] = split) -> Any:
                if not isinstance(x, Tensor):
                    return x
                layout = Shard(split[n]) if n in split else Replicate()
                leaf = x.is_floating_point() and n not in ("cos", "sin")
                return distribute_tensor(x, mesh, [layout]).requires_grad_(leaf)

            parts = {n: given(x, n) for n, x in arguments.items()}
            if call.op in NONE:
                with pytest.raises(TypeError, match=f"^{call.op} takes no DTensors.*local_map"):
                    call.run(ops, parts)
                continue
            whole = cloned(arguments)
            for n, x in parts.items():
                if isinstance(x, DTensor):
                    whole[n].requires_grad_(x.requires_grad)
            ours, theirs = call.run(ops, parts), call.run(reference, whole)
            pairs = [*zip(ours, theirs, strict=True)]
            pairs += zip(gradients(ours, parts), gradients(theirs, whole), strict=True)
            for mine, other in pairs:
                assert isinstance(mine, DTensor), name
                assert split == {} or mine.placements != (Replicate(),), name
                torch.testing.assert_close(mine.full_tensor(), other, rtol=1e-4, atol=1e-4)
    row, weight = torch.randn(64, generator=torch.Generator().manual_seed(5)), torch.ones(64)
    part = distribute_tensor(row, mesh, [Shard(0)])  # of a single row there are no rows to split
    whole_weight = distribute_tensor(weight, mesh, [Replicate()])
    for mine, other in (
        (ops.silu_and_mul(part), reference.silu_and_mul(row)),
        (ops.rms_norm(part, whole_weight, 1e-6), reference.rms_norm(row, weight, 1e-6)),
    ):
        torch.testing.assert_close(mine.full_tensor(), other)
    if rank == 0:
        print("all ops", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(process, (sys.argv[1],), nprocs=2)
