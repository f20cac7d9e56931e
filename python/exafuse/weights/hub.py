"""From a folder or a Hub name to a folder: the only place that may reach for the network."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from exafuse.errors import CheckpointError
from exafuse.strict_json import shorten

# All that is ever asked for: weights, configs, the tokenizer and its template.
ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.*")
# A pattern's star also matches a slash: what lies in subfolders (other formats, other sizes) is not
# loaded. The rest is what "vocab.*" would let in.
NEVER = ("*/*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.so")

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether this is written as a Hub name, ``owner/model``."""
    return _HUB_NAME.fullmatch(str(name)) is not None


def resolve_folder(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a Hub name is downloaded, or found in the Hub's cache.

    Args:
        name_or_folder: an existing folder (which wins), or a name like ``owner/model``.
        revision: branch, tag or commit of a Hub name.

    Returns:
        The folder; for a Hub name, the snapshot in the cache.

    Raises:
        CheckpointError: neither a folder nor a name, or the Hub does not give the files; with
            ``HF_HUB_OFFLINE=1``, the files are not in the cache.
        ValueError: a revision that is none, or one given for a folder.
    """
    name, folder = _as_path(name_or_folder)
    if os.path.isdir(folder):
        if revision is not None:
            raise ValueError(
                f"revision: applies to Hub names only, and {shorten(name)} is a folder"
            )
        return folder
    _check_hub_name(name, folder)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(
            f"revision: expected a branch, a tag or a commit of {name}, got {shorten(revision)}"
        )
    return _download(name, revision, ALLOWED)


def resolve_config(name_or_path: str | Path) -> Path:
    """The config.json of a folder, an existing file as it is, or the config.json of a Hub name.

    Of a Hub name nothing but that file is asked for. Errors are those of :func:`resolve_folder`.
    """
    name, path = _as_path(name_or_path)
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        _check_hub_name(name, path)
        path = _download(name, None, ("config.json",))
    return path / "config.json"


def _as_path(name_or_path: str | Path) -> tuple[str, Path]:
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"expected a checkpoint folder or a Hub name, got {shorten(name)}")
    return name, Path(os.path.expanduser(name))


def _check_hub_name(name: str, path: Path) -> None:
    """Raise, with the reason, unless ``name`` has the form of a Hub name."""
    if "://" in name or re.match(r"(www\.)?(huggingface\.co|hf\.co)/", name):
        raise CheckpointError(
            f"{shorten(name)} is a URL; expected a folder or a Hub name like 'owner/model'"
        )
    if os.path.lexists(path):
        raise CheckpointError(
            f"{shorten(name)} is no folder; expected the folder with config.json and the weights"
        )
    if not _HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
        raise CheckpointError(
            f"{shorten(name)}: there is no such folder, and a Hub name has the form 'owner/model'"
        )


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NEVER),
            )
        )
    except LocalEntryNotFoundError as error:
        # The cache may hold a snapshot that lacks some allowed file, for example because another
        # program fetched only what it needed. Missing weights are found out on loading.
        snapshot = getattr(error, "snapshot_path", None)
        if snapshot is not None and constants.is_offline_mode():
            return Path(snapshot)
        at = f" at revision {revision}" if revision else ""
        if constants.is_offline_mode():
            raise CheckpointError(
                f"{name}: there is no such folder, and the Hub's cache ({constants.HF_HUB_CACHE}) "
                f"does not hold it{at}. HF_HUB_OFFLINE=1 forbids downloading: unset it, or run "
                f"`hf download {name}` where there is a network, or give a folder"
            ) from error
        raise CheckpointError(
            f"{name}: there is no such folder, and the Hub cannot be reached to download it{at}: "
            f"{_first_line(error)}"
        ) from error
    # The library lets the errors of its HTTP clients and transfer backends through, which have no
    # base class in common and change from version to version.
    except Exception as error:
        raise CheckpointError(
            f"{name}: there is no such folder, and it cannot be downloaded from the Hub: "
            f"{_first_line(error)}. A private or gated model needs `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no further word').splitlines()[0]}"
