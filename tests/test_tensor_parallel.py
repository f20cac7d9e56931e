"""Patched models under transformers' tensor parallelism: two processes on the CPU, over gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import drop_in_cases
import pytest
import tiny_models
import torch
import transformers
from command_line import make_folder

ROOT = Path(__file__).parents[1]
NUM_PROCESSES = 2

# Every family in one start of the processes; what is compared is written by the first of them.
SCRIPT = """
import sys
from pathlib import Path

import exafuse
import torch
from exafuse.integrations import layers
from transformers import AutoModelForCausalLM

heads = []
plain_attention = layers.attention

def attention(module, query, key, *args, **kwargs):
    heads.append((query.shape[1], key.shape[1]))
    return plain_attention(module, query, key, *args, **kwargs)

layers.attention = attention
def gradients(model, ids):
    # The loss, and the gradients of what this process holds.
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [(name, p.grad) for name, p in model.named_parameters()]
    return loss.detach(), {n: g.to_local() if hasattr(g, "to_local") else g for n, g in grads}

for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    ids = torch.load(folder / "ids.pt")
    result = {"plain gradients": gradients(model, ids)[1]}
    exafuse.patch(model)
    result["tokens"] = model.generate(ids, max_new_tokens=8, do_sample=False)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    result["padded"] = padded
    result["loss"], result["gradients"] = gradients(model, ids)
    result["heads"] = sorted(set(heads))
    heads.clear()
    if torch.distributed.get_rank() == 0:
        torch.save(result, folder / "result.pt")
torch.distributed.destroy_process_group()
"""


def torchrun(script: Path, *arguments: str) -> str:
    """Standard output of the script in all processes; the port is the system's choice."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(NUM_PROCESSES), str(script), *arguments]
    path = [str(ROOT / "python"), *(path for path in sys.path if path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, check=False, env=environment, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_results_equal_those_of_one_process(tmp_path: Path) -> None:
    folders = {}
    for family in drop_in_cases.FAMILIES:
        sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}
        model = drop_in_cases.build(family, **sizes)
        tiny_models.save(model, tmp_path / family)
        torch.save(drop_in_cases.prompts(model), tmp_path / family / "ids.pt")
        folders[family] = model
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun(script, *(str(tmp_path / family) for family in folders))
    for family, model in folders.items():
        result = torch.load(tmp_path / family / "result.pt")
        assert result["heads"] == [(3, 1)], "each process computes its share of the heads"
        ids = drop_in_cases.prompts(model)
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(result["tokens"], model.generate(ids, **options)), family
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        expected = model.generate(ids, attention_mask=mask, **options)
        assert torch.equal(result["padded"], expected), family
        loss = model(ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(result["loss"], loss.detach())
        shards = 0
        for name, parameter in model.named_parameters():
            ours, theirs = result["gradients"][name], result["plain gradients"][name]
            shards += ours.shape != parameter.shape
            error = float((ours - theirs).norm())
            assert error <= 1e-4 * float(theirs.norm()) + 1e-7, (family, name, error)
        assert shards >= 7 * model.config.num_hidden_layers


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = tmp_path / "parallel.py"
    script.write_text(code)
    folder = make_folder(tmp_path / "model", None)
    printed = torchrun(script, str(folder), "The ferry")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = tokenizer("The ferry", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=32, do_sample=False)
    assert printed == tokenizer.decode(out[0], skip_special_tokens=True) + "\n"
