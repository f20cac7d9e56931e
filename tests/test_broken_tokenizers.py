"""Broken tokenizer files: an error of ours that names file and reason, nothing run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_tokenizers
import pytest
import transformers
from exafuse import TemplateError
from exafuse.text.chat import encode_chat, load_processor

LIMIT_SECONDS = 2.0


def checkpoint(folder: Path) -> Path:
    path = chat_tokenizers.save_family("exaone4", folder / "checkpoint")
    vocab_size = len(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]) + 40
    (path / "config.json").write_text(
        json.dumps({"model_type": "exaone4", "vocab_size": vocab_size})
    )
    return path


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Applies ``change`` to the JSON object in the file ``name``; what it returns goes ahead."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        result = change(value)
        (folder / name).write_text(json.dumps(value if result is None else result))

    return apply


def write(name: str, data: str | bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return apply


def grow(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def replace_by(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return apply


def vocab(value: dict[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = value["model"]["vocab"]
    return entries


def set_regex(pattern: str) -> Callable[[Path], None]:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = {"type": "Sequence", "pretokenizers": [split]}
    return edit("tokenizer.json", lambda value: value.update(pre_tokenizer=parts))


def add_token(**token: Any) -> Callable[[Path], None]:
    full = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return edit(
        "tokenizer.json",
        lambda value: value["added_tokens"].append({**full, "special": True, **token}),
    )


JSON, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: (what is done to the folder, the file that the error names, what it says)
    "500 MB": (grow(JSON, 500 * 10**6), JSON, "expected at most"),
    "empty": (write(JSON, ""), JSON, "expected JSON"),
    "not json": (write(JSON, "tokens: yes"), JSON, "expected JSON"),
    "cut off": (grow(JSON, 5000), JSON, "expected JSON"),
    "not utf-8": (write(JSON, b'{"model": "\xff"}'), JSON, "expected UTF-8"),
    "byte-order mark": (write(JSON, b"\xef\xbb\xbf{}"), JSON, "byte-order mark"),
    "nan": (write(JSON, '{"model": NaN}'), JSON, "NaN"),
    "duplicate key": (write(JSON, '{"model": {}, "model": {}}'), JSON, "got 'model' twice"),
    "deep nesting": (write(JSON, "[" * 100_000), JSON, "nesting too deep"),
    "a list": (write(JSON, "[]"), JSON, "expected a JSON object"),
    "no model": (write(JSON, "{}"), JSON, "model: expected an object"),
    "unknown model": (
        edit(JSON, lambda value: value["model"].update(type="Magic")),
        JSON,
        "expected an object of type BPE",
    ),
    "vocabulary a number": (
        edit(JSON, lambda value: value["model"].update(vocab=3)),
        JSON,
        "model.vocab: expected the vocabulary",
    ),
    "negative id": (edit(JSON, lambda value: vocab(value).update(a=-1)), JSON, "got -1"),
    "float id": (edit(JSON, lambda value: vocab(value).update(a=1.5)), JSON, "got 1.5"),
    "boolean id": (edit(JSON, lambda value: vocab(value).update(a=True)), JSON, "got True"),
    "text id": (edit(JSON, lambda value: vocab(value).update(a="1")), JSON, "got '1'"),
    "id beyond 2^31": (
        edit(JSON, lambda value: vocab(value).update(a=2**40)),
        JSON,
        "expected an id",
    ),
    "two tokens of one id": (
        edit(JSON, lambda value: vocab(value).update(zz=5)),
        JSON,
        "id 5 belongs to two tokens",
    ),
    "added id taken": (add_token(id=5, content="<new>"), JSON, "id 5 belongs to two tokens"),
    "token of two ids": (add_token(id=690, content="a"), JSON, "has two ids"),
    "added id negative": (add_token(id=-1, content="<new>"), JSON, "got -1"),
    "added id missing": (add_token(content="<new>"), JSON, "got None"),
    "added token without text": (add_token(id=690, content=""), JSON, "expected a text"),
    "added token a number": (add_token(id=690, content=3), JSON, "expected a text, got 3"),
    "added tokens an object": (
        edit(JSON, lambda value: value.update(added_tokens={})),
        JSON,
        "added_tokens: expected a list",
    ),
    "id without embedding row": (
        add_token(id=9000, content="<new>"),
        "",
        "without an embedding row",
    ),
    "id with a gap": (add_token(id=690, content="<new>"), JSON, "loads with the id"),
    "row count too small": (
        edit("config.json", lambda value: value.update(vocab_size=100)),
        "",
        "expected ids below vocab_size=100",
    ),
    "huge regex": (set_regex("(a|b)" * 200_000), JSON, "at most 16384 characters"),
    "multiplying regex": (set_regex("(((a{999}){999}){999})"), JSON, "counted repetitions"),
    "broken regex": (set_regex("(((("), JSON, "cannot load"),
    "unknown normaliser": (
        edit(JSON, lambda value: value.update(normalizer={"type": "Magic"})),
        JSON,
        "cannot load",
    ),
    "normaliser with broken table": (
        edit(
            JSON,
            lambda value: value.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/w=="}
            ),
        ),
        JSON,
        "cannot load",
    ),
    "merge of unknown parts": (
        edit(JSON, lambda value: value["model"].update(merges=[["no", "such"]])),
        JSON,
        "cannot load",
    ),
    "merges a number": (
        edit(JSON, lambda value: value["model"].update(merges=3)),
        JSON,
        "cannot load",
    ),
    "a folder": (replace_by(JSON, Path.mkdir), JSON, "expected a regular file"),
    "a pipe": (replace_by(JSON, os.mkfifo), JSON, "expected a regular file"),
    "a dead link": (
        replace_by(JSON, lambda path: path.symlink_to("nowhere")),
        JSON,
        "expected a regular file",
    ),
    "no tokenizer": (lambda folder: (folder / JSON).unlink(), "", "expected tokenizer.json"),
    "config a list": (write(CONFIG, "[]"), CONFIG, "expected a JSON object"),
    "config not json": (write(CONFIG, "{"), CONFIG, "expected JSON"),
    "config 40 MB": (grow(CONFIG, 40 * 10**6), CONFIG, "expected at most"),
    "config names gguf": (
        edit(CONFIG, lambda value: value.update(gguf_file="/etc/passwd")),
        CONFIG,
        "gguf_file is not supported",
    ),
    "config names a file outside": (
        edit(CONFIG, lambda value: value.update(fast_tokenizer_files=["tokenizer.1/../../x.json"])),
        CONFIG,
        "fast_tokenizer_files: expected plain file names",
    ),
    "config with a bad token id": (
        edit(CONFIG, lambda value: value.update(added_tokens_decoder={"-1": {"content": "x"}})),
        CONFIG,
        "keys are token ids",
    ),
    "config with a bad token": (
        edit(CONFIG, lambda value: value.update(added_tokens_decoder={"3": 5})),
        CONFIG,
        "cannot load",
    ),
    "token map a list": (
        write("special_tokens_map.json", "[]"),
        "special_tokens_map.json",
        "object",
    ),
    "template a number": (
        lambda folder: (
            (folder / TEMPLATE).unlink(),
            edit(CONFIG, lambda value: value.update(chat_template=3))(folder),
        ),
        CONFIG,
        "expected a text, got 3",
    ),
    "template does not parse": (write(TEMPLATE, "{% if %}"), TEMPLATE, "does not compile"),
    "template 2 MB": (write(TEMPLATE, "x" * 2 * 10**6), TEMPLATE, "expected at most"),
    "template not utf-8": (write(TEMPLATE, b"\xff\xfe"), TEMPLATE, "in UTF-8"),
    "template too deep": (write(TEMPLATE, "{{ " + "(" * 9000), TEMPLATE, "does not compile"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tokenizer(tmp_path: Path, name: str) -> None:
    damage, file, reason = BROKEN[name]
    folder = checkpoint(tmp_path)
    load_processor(folder)  # in order before; and transformers is imported, which is not timed
    damage(folder)
    start = time.perf_counter()
    with pytest.raises(TemplateError, match=re.escape(str(folder))) as caught:
        load_processor(folder)
    seconds = time.perf_counter() - start
    message = str(caught.value)
    assert file in message
    assert reason in message
    assert len(message) < 2000
    assert seconds < LIMIT_SECONDS


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="got no folder"):
        load_processor(tmp_path / "nothing")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_remote_code_is_not_run(tmp_path: Path, place: str) -> None:
    """auto_map is an error or ignored; the module beside the tokenizer is never imported."""
    folder = checkpoint(tmp_path)
    trace = tmp_path / "was_run"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    mapping = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
    edit(place, lambda value: value.update(auto_map=mapping, tokenizer_class="Evil"))(folder)
    with contextlib.suppress(TemplateError):
        load_processor(folder)
    assert not trace.exists()
    assert "evil" not in sys.modules


def test_files_outside_the_folder_are_not_used(tmp_path: Path) -> None:
    """Old configurations carry absolute paths of their author's machine: the folder's files win."""
    folder = checkpoint(tmp_path)
    other = chat_tokenizers.save_family("qwen2", tmp_path / "other")
    paths = {"tokenizer_file": str(other / JSON), "vocab_file": str(other / JSON)}
    paths["special_tokens_map_file"] = "/nowhere/special_tokens_map.json"
    edit(CONFIG, lambda value: value.update(paths))(folder)
    try:
        processor = load_processor(folder)
    except TemplateError as error:
        if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
            raise
        pytest.skip(f"transformers {transformers.__version__} reads them, and we refuse: {error}")
    assert "<|im_end|>" not in processor.get_vocab()


def test_only_the_model_type_of_config_json_reaches_transformers(tmp_path: Path) -> None:
    """Configurations that transformers stumbles over, and models that it does not know."""
    folder = checkpoint(tmp_path)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    for values in (
        {"model_type": "exaone4", "sliding_window_pattern": "LLLG", "sliding_window": None},
        {"model_type": "no_such_model", "vocab_size": rows},
        {"model_type": ["exaone4"]},
        {"text_config": {"vocab_size": rows}},
    ):
        (folder / "config.json").write_text(json.dumps(values))
        assert load_processor(folder).chat_template
    (folder / "config.json").unlink()
    assert load_processor(folder).chat_template
    (folder / TEMPLATE).unlink()
    base_model = load_processor(folder)
    assert base_model.chat_template is None
    with pytest.raises(TemplateError, match="no chat template"):
        encode_chat(base_model, [{"role": "user", "content": "a"}])


def test_several_templates(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools!")
    tokenizer = load_processor(folder)
    hello = [{"role": "user", "content": "a"}]
    assert tokenizer.decode(encode_chat(tokenizer, hello, tools=[{"name": "f"}])) == "tools!"
    assert tokenizer.decode(encode_chat(tokenizer, hello)).startswith("[|user|]")
    (extra / "tool_use.jinja").write_text("{% if %}")
    with pytest.raises(TemplateError, match="'tool_use' does not compile"):
        load_processor(folder)
