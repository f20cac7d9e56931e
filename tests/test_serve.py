"""`exafuse serve`: transformers' server over loopback, with our kernels in the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import WEATHER, make_chat_folder
from command_line import SOURCE, exit_code, run
from exafuse.cli import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 12
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "How many apples are left in the baskets?"},
]
# The server with a line for every layer's first call of ours, so that a test can count them.
SPY = """
import sys
from exafuse import cli, ops

def told(name, original):
    def call(*args, **kwargs):
        if name not in seen:
            seen.add(name)
            print("ran", name, file=sys.stderr, flush=True)
        return original(*args, **kwargs)
    return call

seen = set()
for name in ("qk_norm_rope", "rms_norm_add", "silu_and_mul", "flash_attn_func"):
    setattr(ops, name, told(name, getattr(ops, name)))
raise SystemExit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_folder(tmp_path_factory.mktemp("chat"), "exaone4")


@contextmanager
def serving_process(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address; whatever happens, it is ended."""
    path = os.pathsep.join((str(SOURCE), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SPY, "serve", str(folder), "--port", "0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving (.*) on (http://127\.0\.0\.1:\d+)\n", line)
        if found is None:
            process.kill()
            raise AssertionError(f"{line!r}\n{process.communicate()[1]}")
        assert found[1] == str(folder)
        yield process, found[2]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with serving_process(folder) as (process, url):
        yield url
        post(url)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        for name in ("qk_norm_rope", "rms_norm_add", "silu_and_mul", "flash_attn_func"):
            assert f"ran {name}\n" in errors, f"the model never called {name}\n{errors}"


def post(url: str, **body: Any) -> Any:
    """The answer's body: text, or what its JSON says."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(
            {"messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS, **body}
        ).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    return text if body.get("stream") else json.loads(text)


def plain_answer(folder: Path, messages: list[dict[str, str]], **options: Any) -> tuple[str, int]:
    """Greedy words of plain transformers, and the length of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True), length


def test_the_list_of_models_is_the_one_that_answers(folder: Path, address: str) -> None:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
        models = json.load(response)["data"]
    assert [model["id"] for model in models] == [str(folder)]
    assert post(address, model=models[0]["id"])["choices"]


def test_a_chat_completion_says_what_transformers_says(folder: Path, address: str) -> None:
    reply = post(address, model=str(folder))
    expected, length = plain_answer(folder, MESSAGES)
    assert len(expected) > 4
    assert reply["choices"][0]["message"]["content"] == expected
    assert reply["usage"]["prompt_tokens"] == length
    assert 4 < reply["usage"]["completion_tokens"] <= NEW_TOKENS


def test_a_stream_says_the_same_piece_by_piece(folder: Path, address: str) -> None:
    lines = post(address, stream=True).splitlines()
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in lines
        if line.startswith("data: ") and line != "data: [DONE]"
    ]
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert sum(map(bool, pieces)) > 2
    assert "".join(pieces) == plain_answer(folder, MESSAGES)[0]


def test_tools_reach_the_template(folder: Path, address: str) -> None:
    reply = post(address, tools=[WEATHER])
    expected, length = plain_answer(folder, MESSAGES, tools=[WEATHER])
    assert reply["usage"]["prompt_tokens"] == length
    assert length > plain_answer(folder, MESSAGES)[1]
    assert reply["choices"][0]["message"]["content"] == expected


def test_the_client_library_is_understood(folder: Path, address: str) -> None:
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60) as client:
        reply = client.chat.completions.create(
            model=str(folder), messages=MESSAGES, temperature=0, max_tokens=NEW_TOKENS
        )
    assert reply.choices[0].message.content == plain_answer(folder, MESSAGES)[0]


def test_health_and_wrong_requests(address: str) -> None:
    with urllib.request.urlopen(f"{address}/health", timeout=60) as response:
        assert json.load(response) == {"status": "ok"}
    with pytest.raises(urllib.error.HTTPError) as error:
        post(address, model="another/model")
    assert error.value.code == 400
    error.value.close()


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/audio/transcriptions"])
def test_no_request_loads_or_unloads_a_model(address: str, path: str) -> None:
    request = urllib.request.Request(
        f"{address}{path}", b'{"model": "another/model"}', {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 404
    error.value.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("pickle", "expected model.safetensors"),
        ("adapter", "adapter_config.json"),
        ("method", "quant_method of .* got 'hub_kernel'"),
    ],
)
def test_what_transformers_would_run_or_follow_is_refused(
    folder: Path, tmp_path: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    copy = tmp_path / "copy"
    if change == "pickle":
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    elif change == "adapter":
        (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    else:
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "hub_kernel"}
        (copy / "config.json").write_text(json.dumps(config))
    assert exit_code(["serve", str(copy)]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error


@pytest.mark.parametrize("kind", ["image_url", "video_url", "input_image"])
@pytest.mark.parametrize(
    ("url", "answered"),
    [
        ("data:image/png;base64,iVBORw0KGgo=", True),
        ("/etc/passwd", False),
        ("file:///etc/passwd", False),
        ("http://169.254.169.254/", False),
        ("iVBORw0KGgo=", False),  # could be a path
    ],
)
def test_a_request_cannot_have_files_opened(kind: str, url: str, answered: bool) -> None:
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.utils import Modality

    handler = ChatCompletionHandler.__new__(ChatCompletionHandler)
    part = {"type": kind, kind.replace("input_image", "image_url"): {"url": url}}
    text = {"role": "user", "content": "hello"}
    messages = [text, {"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]
    expected = handler.get_processor_inputs_from_messages(messages, Modality.VLM)
    assert expected[1]["content"][1]["url"] == url, "transformers hands it on as it is"
    serving._refuse_media_urls(handler)
    if answered:
        assert handler.get_processor_inputs_from_messages(messages, Modality.VLM) == expected
    else:
        with pytest.raises(HTTPException, match="as a data: URL") as caught:
            handler.get_processor_inputs_from_messages(messages, Modality.VLM)
        assert caught.value.status_code == 400
    assert handler.get_processor_inputs_from_messages([text], Modality.LLM)


@pytest.mark.slow
def test_it_ends_at_an_interrupt_while_it_answers(folder: Path) -> None:
    """Thinking on, and an answer under way that nobody waits for."""
    with serving_process(folder, "--thinking", "--seed", "3") as (process, url):
        thinking, length = plain_answer(folder, MESSAGES, enable_thinking=True)
        reply = post(url)
        assert reply["usage"]["prompt_tokens"] == length
        assert thinking.endswith(reply["choices"][0]["message"]["content"])
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"messages": MESSAGES, "max_tokens": 1500, "stream": True}).encode()
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            assert b"200 OK" in connection.recv(4096)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=40)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "gpt2"},
            "model_type: expected one of exaone4.*got 'gpt2'.*transformers serve",
        ),
        ({"architectures": None}, "architectures: expected a list"),
        (None, "has no config.json"),
        ("{", "expected JSON"),
    ],
)
def test_folders_that_cannot_be_served(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if change is not None:
        text = change if isinstance(change, str) else json.dumps(config | change)
        (tmp_path / "config.json").write_text(text)
    assert exit_code(["serve", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert error.count("\n") == 1


def test_wrong_places_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "a@b"
    link.symlink_to(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for argv, words in (
            ([str(link)], "an @ for a revision"),
            ([str(folder), "--port", "70000"], "--port: expected from 0 to 65535, got 70000"),
            ([str(folder), "--port", port], f"cannot listen on 127.0.0.1, port {port}"),
            ([str(folder), "--host", "no.such.host.invalid"], "cannot listen on no.such.host"),
            (["no/such"], "no such folder"),
        ):
            assert exit_code(["serve", *argv]) == 2
            assert words in capsys.readouterr().err


def test_missing_libraries_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "_LIBRARIES", ("json", "no_such_a", "no_such_b"))
    assert exit_code(["serve", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "needs no_such_a, no_such_b: pip install 'exafuse[serve]'" in error


@pytest.mark.slow
def test_a_folder_without_tokenizer_is_one_line(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    result = run(["serve", str(tmp_path), "--port", "0"])
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "exafuse: error: " in result.stderr
