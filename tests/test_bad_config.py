"""Hostile and unsupported config files: errors that name file and field, and nothing is run."""

from __future__ import annotations

import json
import os
import random
import sys
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from config_cases import FULL, expect_error
from exafuse.config import load_config
from exafuse.errors import CheckpointError, ConfigError
from exafuse.strict_json import read_json


def test_model_type_and_architectures() -> None:
    supported = ("llama", "qwen2", "exaone4", "exaone4_5")
    expect_error({"model_type": "gpt2", **FULL}, "model_type", "gpt2", *supported)
    expect_error(FULL, "model_type", *supported)
    llama = {"model_type": "llama", **FULL}
    for names in (["Qwen2ForCausalLM"], ["LlamaForCausalLM", "Exaone4ForCausalLM"], ["Evil"]):
        expect_error({**llama, "architectures": names}, "architectures", "LlamaForCausalLM")
    assert "model_type qwen2" in expect_error({**llama, "architectures": ["Qwen2Model"]})
    load_config({**llama, "architectures": ["LlamaForSequenceClassification"]})
    load_config({**llama, "architectures": None})


def test_quantised_checkpoint_is_refused_by_name() -> None:
    for key in ("quantization_config", "compression_config"):
        message = expect_error({"model_type": "llama", **FULL, key: {"quant_method": "awq"}}, key)
        assert "awq" in message
        assert "original checkpoint" in message
    expect_error({"model_type": "llama", **FULL, "quantization_config": "int4"}, "unnamed")


CONFIGS = Path(__file__).parent / "data" / "configs"
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected JSON"),
    "not JSON": (b"{'a': 1}", "expected JSON"),
    "list": (b"[1, 2]", "object"),
    "string": (b'"llama"', "object"),
    "byte-order mark": (b'\xef\xbb\xbf{"model_type": "llama"}', "byte-order mark"),
    "UTF-16": ('{"model_type": "llama"}'.encode("utf-16"), "UTF-8"),
    "Latin-1": (b'{"model_type": "\xe9"}', "UTF-8"),
    "NaN": (b'{"model_type": "llama", "rms_norm_eps": NaN}', "NaN"),
    "Infinity": (b'{"rms_norm_eps": -Infinity}', "Infinity"),
    "beyond float": (b'{"rms_norm_eps": 1e999}', "finite"),
    "5000 digits": (b'{"vocab_size": ' + b"9" * 5000 + b"}", "digits"),
    "duplicate": (b'{"vocab_size": 1, "vocab_size": 2}', "vocab_size"),
    "nested duplicate": (b'{"rope_scaling": {"factor": 1, "factor": 2}}', "factor"),
    "text after": (b'{"model_type": "llama"} {}', "expected JSON"),
    "lone surrogate": (b'{"model_type": "\\ud800"}', "model_type"),
    "100,000 lists": (b"[" * 100_000, "nesting"),
    "100,000 objects": (b'{"a":' * 100_000, "nesting"),
    "50 MB": (b" " * 50_000_000, "bytes"),
    "2 MiB of objects": (b"[" + b"{}," * 699_000 + b"{}]", "object"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, tmp_path: Path) -> None:
    data, word = BAD_FILES[case]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        expect_error(tmp_path, str(path), word)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_random_damage_is_a_config_error(tmp_path: Path) -> None:
    """Bytes of a good file replaced, cut or doubled: a config or a ConfigError, nothing else."""
    rng = random.Random(5)
    good = [path.read_bytes() for path in CONFIGS.glob("*.json")]
    path, messages = tmp_path / "config.json", []
    for _ in range(1000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            stop = start + rng.randint(0, 12)
            data[start:stop] = rng.choice(
                [b"", rng.randbytes(2), data[start:stop] * 2, b"null", b"-", b"9" * 30, b"[", b'"']
            )
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_config(path)
            except ConfigError as error:
                messages.append(str(error))
    assert 500 < len(messages) < 1000
    assert all(str(path) in message for message in messages)


def test_bad_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    for source in (tmp_path / "fifo", tmp_path / "folder", "/dev/zero"):
        with pytest.raises(ConfigError, match="regular file"):
            load_config(source)
    for source in (tmp_path, "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="cannot open"):
            load_config(source)


def test_read_json_takes_the_callers_error(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text('{"a": [1, 2.5, null]}')
    assert read_json(path, "index", 1000) == {"a": [1, 2.5, None]}
    with pytest.raises(CheckpointError, match=r"index\.json: index: expected at most 5 bytes"):
        read_json(path, "index", 5, CheckpointError)


ACTIVE = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline", "pt": ["evil.Model"]}},
    "_attn_implementation_internal": "evil/kernels",
    "attn_implementation": "evil/kernels",
}


@contextmanager
def audited() -> Iterator[list[str]]:
    """The audit events of the block. A hook stays for good, so it is told to stop listening."""
    events: list[str] = []
    listening = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        reopened = event == "open" and isinstance(arguments[0], int)
        if listening and not reopened:
            events.append(f"{event} {arguments[0]}" if event in ("open", "import") else event)

    sys.addaudithook(hook)
    try:
        yield events
    finally:
        listening.clear()


def test_nothing_is_run_imported_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only audit event of a load is the opening of config.json."""
    for name in ("evil", "modeling_llama", "configuration_llama", "exafuse", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of a checkpoint was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **FULL, **ACTIVE}))
    with audited() as events, pytest.warns(UserWarning, match="no code of a checkpoint") as caught:
        load_config(tmp_path)
    assert events == [f"open {path}"]
    assert len(caught) == 1
    assert all(key in str(caught[0].message) for key in ACTIVE)

    path.write_text(json.dumps({"model_type": "llama", **FULL, "hidden_act": "evil"}))
    with audited() as events, pytest.raises(ConfigError):
        load_config(tmp_path)
    assert events == [f"open {path}"]


def test_unknown_keys_are_reported_once() -> None:
    base = {"model_type": "llama", **FULL}
    with pytest.warns(
        UserWarning, match=r"unknown and ignored: 'logit_scale', 'sliding_window'"
    ) as w:
        load_config({**base, "logit_scale": 2.0, "sliding_window": 8, "use_magic": False})
    assert len(w) == 1
    with pytest.warns(UserWarning, match="and 988 more"):
        load_config({**base, **{f"key_{i}": 1 for i in range(1000)}})
    with pytest.warns(UserWarning, match="RoPE type linear"):
        load_config({**base, "rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}})


def test_dual_chunk_attention_is_announced_as_plain() -> None:
    values = {"model_type": "qwen2", **FULL, "dual_chunk_attention_config": {"chunk_size": 8192}}
    with pytest.warns(UserWarning, match="plain attention") as caught:
        load_config(values)
    assert len(caught) == 1
