"""A real checkpoint end to end: its own words, transformers' tokens, its memory and its speed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import exafuse
import fetch_smollm2
import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
FOLDER = fetch_smollm2.DEFAULT_FOLDER
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not fetch_smollm2.is_complete(FOLDER),
        reason=f"needs the checkpoint that tests/fetch_smollm2.py writes to {FOLDER.name}",
    ),
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model() -> exafuse.models.causal_lm.CausalLM:
    return exafuse.from_pretrained(FOLDER, device="cpu", backend="reference")


def test_says_paris(model: exafuse.models.causal_lm.CausalLM) -> None:
    reply = exafuse.chat(
        model, exafuse.load_processor(FOLDER), QUESTION, max_new_tokens=32, do_sample=False
    )
    assert "Paris" in reply.answer, reply.text


def test_agrees_with_transformers_over_64_greedy_tokens() -> None:
    report = exafuse.verify(FOLDER, against="transformers", dtype="float32", tokens=64)
    assert report.ok, str(report)
    assert report.to_dict()["greedy"]["matched"] == 64


def test_left_padded_batch_generates_what_each_prompt_does_alone(
    model: exafuse.models.causal_lm.CausalLM,
) -> None:
    tokenizer = exafuse.load_processor(FOLDER)
    prompts = ["The capital of France is", "Once upon a time, in a small village by the sea, there"]
    together = model.generate([tokenizer(p).input_ids for p in prompts], max_new_tokens=16)
    for row, prompt in zip(together, prompts, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        alone = model.generate(ids, max_new_tokens=16)
        assert row[-16:].tolist() == alone[0, -16:].tolist()


LOADING = """
import json, re, sys
import torch, transformers, exafuse
from exafuse import models

def memory(field):  # getrusage would count the parent's peak as well
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before = memory("VmRSS")
model = exafuse.from_pretrained(sys.argv[1], device="cpu", progress=False)
grown = memory("VmHWM") - before
size = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
print(json.dumps({"grown": grown, "model": size}))
"""


def test_loading_needs_little_more_than_the_model() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOADING, str(FOLDER)], capture_output=True, text=True, check=True
    )
    figures = json.loads(result.stdout)
    print(
        f"peak while loading: {figures['grown'] / 2**20:.0f} MiB for {figures['model'] / 2**20:.0f}"
    )
    # The largest shard is the model itself here, so the promise would be twice this.
    assert figures["grown"] >= figures["model"], "the measurement must see the model"
    assert figures["grown"] <= figures["model"] + 128 * 2**20


def test_decodes_about_as_fast_as_transformers() -> None:
    """On two cores, fp32, against sdpa and a dynamic cache: the median of five alternating
    pairs."""
    script = ROOT / "benchmarks" / "bench_generate.py"
    command = [sys.executable, str(script), str(FOLDER), "--dtype", "float32", "--device", "cpu"]
    command += ["--new-tokens", "24"]
    # Threads that sleep while they wait: a busy machine then slows both sides alike.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(result.stdout)
    print(f"decode speed over transformers: {figures['median_ratio']}, pairs {figures['ratios']}")
    assert figures["median_ratio"] >= 0.9, figures


def test_the_readme_example_runs_as_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example, *others = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert ".cache/smollm2" in example
    for other in others:  # those need weights that no registry has
        compile(other, "README.md", "exec")
    exec(example.replace('".cache/smollm2"', repr(str(FOLDER))), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed


def test_transformers_reads_what_we_save(
    model: exafuse.models.causal_lm.CausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    for (name, a), (_, b) in zip(
        theirs.state_dict().items(), original.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
