"""``exafuse serve``: transformers' own server, with our kernels in the model that it loads."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exafuse.cli.quantised import check_for_transformers
from exafuse.cli.registry import BACKENDS, DTYPES, Run, command
from exafuse.config.fields import Fields
from exafuse.config.head import HeadConfig, named_head, require_language_model
from exafuse.config.quantisation import read_quantisation
from exafuse.errors import CheckpointError, ConfigError
from exafuse.text.response_template import add_response_template

MODEL_TYPES = ("exaone4", "exaone4_5", "llama", "qwen2")
_LIBRARIES = ("fastapi", "uvicorn", "openai", "pydantic")
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# What is answered. The server has more: some load whatever model a request names.
_ROUTES = (
    *("/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses"),
    *("/docs", "/openapi.json"),
)
# Open answers get so long to come to their end when the server is told to stop.
_GRACE_SECONDS = 5.0


@command("serve", "Answer HTTP requests as the OpenAI API does: transformers' server, our kernels.")
def _serve(parser: argparse.ArgumentParser) -> Run:
    add = parser.add_argument
    add("model", help="checkpoint folder or Hub name")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone)",
    )
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add("--dtype", choices=DTYPES, default="auto", help="default: the file's")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="default: auto")
    add("--thinking", action=argparse.BooleanOptionalAction, help="for models that can think")
    add("--seed", type=int, metavar="N", help="of what is drawn")
    add("--cors", action="store_true", help="let web pages of any origin ask")
    add(
        "--media-urls",
        action="store_true",
        help="open pictures and videos that a request names by address or by path on this machine "
        "(default: only those within the request, as data: URLs)",
    )
    add("--log-level", choices=_LOG_LEVELS, default="warning", help="default: warning")

    def run(arguments: argparse.Namespace) -> int:
        from exafuse.weights.hub import resolve_folder

        _check_libraries()
        folder = resolve_folder(arguments.model)
        _check_checkpoint(folder)
        _check_address(arguments.host, arguments.port)

        from exafuse.integrations.monkey_patching import patched_transformers

        with patched_transformers(arguments.backend):
            return _run(_start(folder, arguments), folder)

    return run


def _start(folder: Path, arguments: argparse.Namespace) -> Any:
    """transformers' server with the model loaded, beginning to listen in a thread of its own."""
    from transformers.cli.serve import Serve

    options = {
        "force_model": str(folder),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "host": arguments.host,
        "port": arguments.port,
        "enable_cors": arguments.cors,
        "log_level": arguments.log_level,
        "default_seed": arguments.seed,
        "attn_implementation": "sdpa",  # and none that a file names
        "trust_remote_code": False,
        "non_blocking": True,
    }
    if arguments.thinking is not None:
        options["chat_template_kwargs"] = json.dumps({"enable_thinking": arguments.thinking})
    unknown = options.keys() - inspect.signature(Serve.__init__).parameters.keys()
    if unknown:
        raise ConfigError(
            f"serve: transformers' server takes no {', '.join(sorted(unknown))}; expected "
            "transformers >= 5.23"
        )

    class PinnedServe(Serve):  # type: ignore[misc]
        """Answers for the one model alone."""

        def start_server(self) -> None:
            for loaded in self._model_manager.loaded_models.values():
                add_response_template(loaded.processor, loaded.model.config.model_type)
            # Its own list is that of the Hub's cache, and an error where there is none.
            entry = {"id": str(folder), "object": "model", "created": int(time.time())}
            models = [{**entry, "owned_by": ""}]
            self._model_manager.get_gen_models = lambda: models
            if not arguments.media_urls:
                _refuse_media_urls(self._chat_handler, self._response_handler)
            routes = self.server.config.app.router.routes
            routes[:] = [route for route in routes if route.path in _ROUTES]
            super().start_server()

    return PinnedServe(**options)


def _refuse_media_urls(*handlers: Any) -> None:
    """Answer 400 to requests that name a picture or video instead of enclosing it.

    transformers would open any address, and any file that this process may read.
    """
    from fastapi import HTTPException

    def enclosed(convert: Callable[..., Any]) -> Callable[..., Any]:
        def converted(*arguments: Any, **options: Any) -> Any:
            messages = convert(*arguments, **options)
            contents = [message["content"] for message in messages]
            parts = [part for content in contents if isinstance(content, list) for part in content]
            for part in parts:
                if "url" in part and not str(part["url"]).startswith("data:"):
                    raise HTTPException(
                        400,
                        f"{part['type']}: expected it in the request, as a data: URL; the server "
                        "opens addresses and files with --media-urls only",
                    )
            return messages

        return converted

    for handler in handlers:
        convert = handler.get_processor_inputs_from_messages
        handler.get_processor_inputs_from_messages = enclosed(convert)


def _run(serve: Any, folder: Path) -> int:
    """Say where the server listens, and end it when a signal comes."""
    server, thread = serve.server, serve._thread
    with _stop_signals() as stop:
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        if server.started:
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"serving {folder} on http://{host}:{port}", flush=True)
        while thread.is_alive() and not stop.wait(0.5):
            pass
        ended_by_itself = not stop.is_set()
        server.should_exit = True
        thread.join(_GRACE_SECONDS)
        server.force_exit = True  # open connections are cut
        serve.kill_server()
    if ended_by_itself:
        raise OSError("serve: the server ended by itself; its log above says why")
    _leave_to_threads()
    return 0


def _leave_to_threads() -> None:
    """End the process here if a thread may still compute an answer: nothing stops one, and the
    interpreter's own end would take torch from under it, and abort."""
    if any(thread.daemon and thread.is_alive() for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _check_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"serve: transformers' server needs {', '.join(missing)}: pip install 'exafuse[serve]'"
        )


def _check_checkpoint(folder: Path) -> None:
    """What transformers' server would stumble over later, in words."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(
            f"{folder}: expected a checkpoint folder, with config.json, weights and tokenizer; "
            "it has no config.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON ({error})") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{file}: model_type: expected one of {', '.join(MODEL_TYPES)}, got {model_type!r}; "
            "for other models run `transformers serve`"
        )
    if not config.get("architectures"):
        raise ConfigError(
            f"{file}: architectures: expected a list with the model's class, which transformers' "
            'server loads, such as ["LlamaForCausalLM"]'
        )
    kind = named_head(Fields(config, str(file)), model_type)
    require_language_model(HeadConfig(kind), str(folder), "serve")
    check_for_transformers(folder, read_quantisation(folder)[0])
    if "@" in str(folder):
        raise ValueError(
            f"model: {folder}: transformers' server takes what follows an @ for a revision; give "
            "a path without one"
        )


def _check_address(host: str, port: int) -> None:
    """Fail before the model is loaded."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected from 0 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OSError(
            f"serve: cannot listen on {host}, port {port}: {error}; --port 0 takes a free one"
        ) from error
