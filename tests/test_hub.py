"""From a folder or a Hub name to a folder: offline from the cache, and against a Hub of our own."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from exafuse import CheckpointError
from exafuse.weights import hub
from exafuse.weights.checkpoint import WEIGHTS_NAME, Checkpoint
from huggingface_hub import constants

NAME = "owner/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of the Hub's library, which is offline."""
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return path


def lay_out(cache: Path, source: Path, name: str = NAME, ref: str = "main") -> Path:
    """Put a checkpoint into a cache by hand, as the library would; return its snapshot."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs" / ref).parent.mkdir(parents=True)
    (repo / "refs" / ref).write_text(COMMIT)
    for path in source.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (repo / "blobs" / digest).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


# ----------------------------------------------------------------------------------------- folders


def test_an_existing_folder_wins(cache: Path, tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path / "source")
    lay_out(cache, tmp_path / "source")
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_folder(NAME) == Path(NAME)
    assert hub.resolve_folder(tmp_path / NAME) == tmp_path / NAME
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve_folder("~/owner") == tmp_path / "owner"
    with pytest.raises(ValueError, match=r"revision: .*is a folder"):
        hub.resolve_folder(NAME, revision="main")


BAD_NAMES = {
    "https://huggingface.co/owner/model": "is a URL",
    "http://127.0.0.1/owner/model": "is a URL",
    "file:///etc": "is a URL",
    "hf://owner/model": "is a URL",
    "huggingface.co/owner": "is a URL",
    "./missing": "no such folder",
    "../owner/model": "no such folder",
    "/nowhere/owner/model": "no such folder",
    "owner/model/sub": "no such folder",
    "owner/../model": "no such folder",
    "owner/..": "no such folder",
    "owner--model": "no such folder",
    "smollm": "no such folder",  # more likely a folder's name mistyped than the Hub's gpt2
    "models--owner--model": "no such folder",
    "owner\\model": "no such folder",
    "C:\\models\\x": "no such folder",
    "owner/model\n": "no such folder",
    "owner/mo del": "no such folder",
    "owner/model\0": "no such folder",
    "-owner/model": "no such folder",
    "owner/model?x=1": "no such folder",
    "owner/model#frag": "no such folder",
    "owner/%2e%2e": "no such folder",
    "~nobody-here/model": "no such folder",
    "own\u00e9r/model": "no such folder",
    "x" * 5000 + "/y" * 3: "no such folder",
    "": "expected a checkpoint folder",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_neither_folder_nor_hub_name(cache: Path, monkeypatch, name: str) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append(a))
    with pytest.raises(CheckpointError, match=BAD_NAMES[name]) as caught:
        hub.resolve_folder(name)
    assert not asked
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_file_instead_of_a_folder(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    path.touch()
    with pytest.raises(CheckpointError, match=r"is no folder; expected the folder with"):
        hub.resolve_folder(str(path))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_config_of_a_name_that_is_none(cache: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=BAD_NAMES[name]):
        hub.resolve_config(name)


def test_config_of_a_folder_a_file_and_a_name(cache: Path, tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    assert hub.resolve_config(config) == config
    assert hub.resolve_config(str(config.parent)) == config
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE=1"):
        hub.resolve_config(NAME)
    snapshot = lay_out(cache, config.parent)
    for path in [*snapshot.iterdir()]:
        if path.name != "config.json":
            path.unlink()  # nothing else is needed
    assert hub.resolve_config(NAME).read_bytes() == config.read_bytes()


@pytest.mark.parametrize(
    "revision",
    ["../../x", "/etc/passwd", "a/../b", "a..b", "..", "", "a b", "x\0", "--flag", "a//b", "a/"],
)
def test_revisions_that_are_none(cache: Path, revision: str) -> None:
    with pytest.raises(ValueError, match="revision: expected a branch, a tag or a commit"):
        hub.resolve_folder(NAME, revision)


# ----------------------------------------------------------------------------------------- offline


@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["single", "sharded"])
def test_a_cache_laid_by_hand_resolves_offline(cache: Path, tmp_path: Path, shard: str) -> None:
    files.make(tmp_path / "source", "exaone4", shard)
    snapshot = lay_out(cache, tmp_path / "source")
    for revision in (None, "main", COMMIT):
        assert hub.resolve_folder(NAME, revision).resolve() == snapshot.resolve()
    model = files.load(hub.resolve_folder(NAME))
    expected = files.read(tmp_path / "source")
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_a_revision_with_a_slash(cache: Path, tmp_path: Path) -> None:
    files.make(tmp_path / "source")
    snapshot = lay_out(cache, tmp_path / "source", ref="refs/pr/1")
    assert hub.resolve_folder(NAME, "refs/pr/1").resolve() == snapshot.resolve()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        hub.resolve_folder(NAME)


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    for revision in (None, "v2", COMMIT):
        with pytest.raises(CheckpointError) as caught:
            hub.resolve_folder(NAME, revision)
        message = str(caught.value)
        for words in (NAME, str(cache), "HF_HUB_OFFLINE=1", f"hf download {NAME}", "give a folder"):
            assert words in message
        assert revision is None or revision in message


def test_a_cache_that_lacks_a_shard(cache: Path, tmp_path: Path) -> None:
    """Resolves, and loading names the file: only the index knows what is needed."""
    files.make(tmp_path / "source", max_shard_size="60KB")
    missing = sorted((tmp_path / "source").glob("*.safetensors"))[1]
    missing.unlink()
    lay_out(cache, tmp_path / "source")
    with pytest.raises(CheckpointError, match=f"{missing.name}: is missing; the download may be"):
        Checkpoint.open(hub.resolve_folder(NAME))


def test_a_snapshot_that_lacks_an_unneeded_file(cache: Path, tmp_path: Path) -> None:
    """Another program may have fetched only what it wanted; the listing tells the library so."""
    files.make(tmp_path / "source")
    snapshot = lay_out(cache, tmp_path / "source")
    entries = {name: {"size": 1, "blob_id": "0" * 40} for name in ("config.json", "extra.json")}
    trees = snapshot.parent.parent / "trees"
    trees.mkdir()
    listing = {"format_version": 1, "files": entries}
    (trees / f"{COMMIT}.json").write_text(json.dumps(listing))
    assert hub.resolve_folder(NAME).resolve() == snapshot.resolve()


# --------------------------------------------------------------------------------- a Hub of our own


class FakeHub(http.server.ThreadingHTTPServer):
    """The part of the Hub's interface that a download uses, over a folder of files.

    ``requests`` records every one; beyond ``limit`` each is refused, so that no client can loop.
    """

    daemon_threads = True

    def __init__(self, folder: Path, status: int = 200, limit: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.status = status
        self.limit = limit
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if len(self.server.requests) > self.server.limit:
            self.reply(418, b"{}")
        elif self.server.status != 200:
            self.reply(self.server.status, b'{"error": "as told"}')
        elif path.startswith(f"/api/models/{NAME}/revision/") or path == f"/api/models/{NAME}":
            siblings = [{"rfilename": name} for name in self.names()]
            self.reply(200, {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{NAME}/tree/"):
            self.reply(200, [self.entry(name) for name in self.names()])
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
            if name in self.names():
                self.reply(200, (self.server.folder / name).read_bytes())
            else:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def names(self) -> list[str]:
        paths = self.server.folder.rglob("*")
        return sorted(str(p.relative_to(self.server.folder)) for p in paths if p.is_file())

    def entry(self, name: str) -> dict[str, object]:
        content = (self.server.folder / name).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": blob}

    def reply(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        etag = hashlib.sha1(content).hexdigest()
        always = {"Content-Length": str(len(content)), "ETag": f'"{etag}"'}
        for key, value in {**always, "X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A repository as careless authors leave them: weights twice over, code, and subfolders."""
    path = tmp_path / "source"
    files.make(path, max_shard_size="60KB")
    for name in WANTED_TOO + UNWANTED:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"content of {name}")
    return path


WANTED_TOO = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
]
UNWANTED = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "vocab.bin",
    "vocab.py",
    "vocab.pkl",
    "modeling_exaone4.py",
    "configuration_exaone4.py",
    "training_args.bin",
    "consolidated.00.pth",
    "model.pt",
    "model.ckpt",
    "tf_model.h5",
    "model.onnx",
    "model.gguf",
    "README.md",
    ".gitattributes",
    "runs/events.out",
    "original/model.safetensors",
    "onnx/config.json",
    "code/setup.py",
]

CHILD = """
import sys
from exafuse.weights import hub
print("folder:", hub.resolve_folder(sys.argv[1]))
"""


def child(
    url: str, home: Path, name: str = NAME, **environment: str
) -> subprocess.CompletedProcess:
    """Resolve a name in a process of its own, which may use the network: 127.0.0.1 at ``url``."""
    kept = ("HF_", "HUGGING", "TRANSFORMERS_")
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(kept) and not key.lower().endswith("_proxy")
    }
    clean |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "*",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.run(
        [sys.executable, "-c", CHILD, name],
        capture_output=True,
        env={**clean, **environment},
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def fake_hub(source: Path) -> Iterator[FakeHub]:
    server = FakeHub(source)
    yield server
    server.shutdown()
    server.server_close()


def test_only_what_is_allowed_is_requested(fake_hub: FakeHub, source: Path, tmp_path: Path) -> None:
    done = child(fake_hub.url, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split("folder: ")[1].strip())
    present = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    weights = [path.name for path in source.glob("*.safetensors")]
    configs = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    assert present == sorted([*weights, *configs, *WANTED_TOO])

    requested = {r.split(f"/{COMMIT}/")[1] for r in fake_hub.requests if "/resolve/" in r}
    assert requested == set(present)
    assert not requested & set(UNWANTED)
    assert not any(r.endswith((".bin", ".py", ".pt", ".pkl")) for r in fake_hub.requests)
    assert len(fake_hub.requests) <= 2 * len(present) + 4

    model = files.load(folder)
    expected = files.read(source)["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, expected)

    # Once cached, the name resolves to the same folder without a network.
    before = len(fake_hub.requests)
    again = child(fake_hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again.stdout.split("folder: ")[1].strip() == str(folder)
    assert len(fake_hub.requests) == before


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_refuses(source: Path, tmp_path: Path, status: int) -> None:
    server = FakeHub(source, status=status, limit=40)
    done = child(server.url, tmp_path / "home")
    server.shutdown()
    server.server_close()
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"exafuse.errors.CheckpointError: {NAME}: there is no such folder")
    assert 1 <= len(server.requests) <= 10


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    done = child("http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr.strip().splitlines()[-1]
    assert "cannot be reached" in done.stderr.strip().splitlines()[-1]


def test_bad_names_never_reach_the_network(fake_hub: FakeHub, tmp_path: Path) -> None:
    done = child(fake_hub.url, tmp_path / "home", name=f"{fake_hub.url}/owner/model")
    assert "is a URL" in done.stderr
    assert fake_hub.requests == []
