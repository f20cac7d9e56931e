"""Where a decoding step goes: a torch.profiler trace and a table of its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .case import Settings

STEPS = 8


def write(settings: Settings, name: str, model: Any) -> list[Path]:
    """Profile a prompt of 128 tokens and a few steps after it; the files that were written."""
    from .bench_models import decode_step, filled_cache, prompt
    from .machine import slug

    assert settings.profile is not None
    folder = Path(settings.profile)
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    context = min(1024, model.config.max_position_embeddings // 2)
    cache = filled_cache(model, 1, context, context + 2 * STEPS, seed=1)
    ids = prompt(model, 1, 1, settings)[:, 0]
    step = decode_step(model, ids, cache, context + 2 * STEPS, graph=False)
    step()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(settings.device)
    trace, table = folder / f"{slug(name)}-decode.json", folder / f"{slug(name)}-decode.txt"
    profile.export_chrome_trace(str(trace))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    text = profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    table.write_text(f"{name}: {STEPS} steps after {context} tokens\n{text}\n", encoding="utf-8")
    print(f"written: {trace}\nwritten: {table}")
    return [trace, table]
