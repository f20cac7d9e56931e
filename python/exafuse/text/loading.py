"""Loading the tokenizer of a checkpoint folder.

The text front end comes from transformers; every file is checked here before transformers opens it.

Nothing in the folder is run: remote code is never allowed, the chat template is compiled by
transformers' own sandbox, and config.json is not read by transformers at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exafuse.errors import TemplateError
from exafuse.strict_json import read_json, shorten
from exafuse.weights.hub import is_hub_name, resolve_folder

MIB = 2**20
# The largest published vocabularies (260,000 entries) take 35 MB; templates stay below 50 KB.
FILE_LIMITS_BYTES = {
    "tokenizer.json": 64 * MIB,
    "tokenizer_config.json": 16 * MIB,
    "special_tokens_map.json": 4 * MIB,
    "added_tokens.json": 4 * MIB,
    "vocab.json": 64 * MIB,
    "merges.txt": 64 * MIB,
    "tokenizer.model": 64 * MIB,
    "chat_template.jinja": MIB,
    "chat_template.json": MIB,
    "config.json": 4 * MIB,
}
LEGACY_TEMPLATE = "chat_template.json"  # where processors, not tokenizers, once kept the template
VISION_MODEL_TYPE = "exaone4_5"
REGEX_LIMIT_CHARS = 16_384
# Copies of one sub-pattern that nested counted repetitions such as (x{9}){9} may ask for.
REGEX_LIMIT_REPEATS = 100_000
MODEL_TYPES = ("BPE", "Unigram", "WordLevel", "WordPiece")


def load_processor(folder: str | os.PathLike[str]) -> Any:
    """The text front end of a checkpoint, a folder or a Hub name: the transformers tokenizer, or,
    for a model that sees, a :class:`exafuse.media.processor.Processor` with the tokenizer in it.

    ``trust_remote_code`` is False. Raises ``TemplateError``, with file and
    reason, for tokenizer files that are missing, too large, malformed or contradictory, for token
    ids that the model has no embedding row for (``vocab_size`` of config.json, where there is one),
    and for a chat template that does not compile; ``ConfigError`` for malformed settings of images
    and videos.
    """
    path = Path(folder)
    if not path.is_dir() and is_hub_name(folder):
        path = resolve_folder(str(folder))
    if not path.is_dir():
        raise TemplateError(f"{path}: expected a checkpoint folder with a tokenizer, got no folder")
    num_rows, file_ids = _check_files(path)
    config = _read_object(path / "config.json") if (path / "config.json").exists() else {}
    from transformers import AutoTokenizer

    names = ", ".join(sorted(FILE_LIMITS_BYTES.keys() & {entry.name for entry in path.iterdir()}))
    with template_errors(f"{path}: transformers cannot load the tokenizer from {names}"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), config=_bare_config(path), local_files_only=True, trust_remote_code=False
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"{path}: expected a tokenizer that the tokenizers library runs, got "
            f"{type(tokenizer).__name__}; save it again with transformers 5 to get a tokenizer.json"
        )
    _check_ids(path, tokenizer.get_vocab(), num_rows, file_ids)
    if tokenizer.chat_template is None and (path / LEGACY_TEMPLATE).exists():
        tokenizer.chat_template = _read_object(path / LEGACY_TEMPLATE).get("chat_template")
    _check_templates(path, tokenizer.chat_template)
    if config.get("model_type") == VISION_MODEL_TYPE:
        from exafuse.media.loading import make_processor

        return make_processor(path, config, tokenizer)
    return tokenizer


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of what :func:`load_processor` returned; ``TypeError`` for anything else."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_added_vocab"):
        raise TypeError(
            f"processor: expected what exafuse.load_processor returns, got {shorten(processor)}"
        )
    return tokenizer


@contextmanager
def template_errors(what: str) -> Iterator[None]:
    """Turns whatever transformers, tokenizers or jinja raises inside into a ``TemplateError`` that
    starts with ``what``."""
    try:
        yield
    except TemplateError:
        raise
    except Exception as exc:
        raise TemplateError(f"{what}: {_describe(exc)}") from exc
    except BaseException as exc:
        # A panic in the Rust code of tokenizers derives from BaseException, as Ctrl-C does.
        if type(exc).__name__ != "PanicException":
            raise
        raise TemplateError(f"{what}: {_describe(exc)}") from exc


def _describe(exc: BaseException) -> str:
    reason = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {reason[:500]}" if reason else type(exc).__name__


def _check_files(folder: Path) -> tuple[int | None, dict[str, int]]:
    """Checks the files that transformers will open; returns ``vocab_size`` of config.json, None if
    it says nothing, and the ids of the tokens in tokenizer.json."""
    present = {entry.name for entry in folder.iterdir()}
    if not present & {"tokenizer.json", "vocab.json", "tokenizer.model"}:
        raise TemplateError(
            f"{folder}: expected tokenizer.json (or vocab.json with merges.txt, or "
            "tokenizer.model), got none of them; copy the tokenizer files of the checkpoint here"
        )
    for name, limit in FILE_LIMITS_BYTES.items():
        if name in present:
            _check_regular(folder / name, limit)
    templates = [folder / "chat_template.jinja"] if "chat_template.jinja" in present else []
    for template in [*templates, *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        _check_regular(template, FILE_LIMITS_BYTES["chat_template.jinja"])
        with template_errors(f"{template}: expected a template in UTF-8"):
            template.read_text("utf-8")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        if name in present:
            _read_object(folder / name)
    if "tokenizer_config.json" in present:
        _check_tokenizer_config(folder / "tokenizer_config.json")
    has_json, has_config = "tokenizer.json" in present, "config.json" in present
    ids = _check_tokenizer_json(folder / "tokenizer.json") if has_json else {}
    return _vocab_size(_read_object(folder / "config.json")) if has_config else None, ids


def _check_regular(path: Path, limit_bytes: int) -> None:
    if not path.is_file():  # also False for a dangling link and a FIFO
        raise TemplateError(f"{path}: expected a regular file, got a folder, pipe or dead link")
    size = path.stat().st_size
    if size > limit_bytes:
        raise TemplateError(f"{path}: expected at most {limit_bytes:,} bytes, got {size:,}")


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path, "tokenizer file", FILE_LIMITS_BYTES[path.name], error=TemplateError)
    if not isinstance(value, dict):
        raise TemplateError(f"{path}: expected a JSON object, got {shorten(value)}")
    return value


def _check_tokenizer_config(path: Path) -> None:
    config = _read_object(path)
    if config.get("gguf_file") is not None:
        raise TemplateError(f"{path}: gguf_file is not supported; ship a tokenizer.json")
    names = config.get("fast_tokenizer_files") or []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and re.fullmatch(r"tokenizer[\w.-]*\.json", name) for name in names
    ):
        raise TemplateError(
            f"{path}: fast_tokenizer_files: expected plain file names such as tokenizer.json, "
            f"got {shorten(names)}"
        )
    for name in names:
        if name != "tokenizer.json" and (path.parent / name).exists():
            _check_regular(path.parent / name, FILE_LIMITS_BYTES["tokenizer.json"])
    tokens = config.get("added_tokens_decoder", {})
    if not isinstance(tokens, dict) or not all(re.fullmatch(r"\d{1,9}", key) for key in tokens):
        raise TemplateError(
            f"{path}: added_tokens_decoder: expected an object whose keys are token ids, "
            f"got {shorten(tokens)}"
        )


def _check_tokenizer_json(path: Path) -> dict[str, int]:
    data = _read_object(path)
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") not in MODEL_TYPES:
        raise TemplateError(
            f"{path}: model: expected an object of type {', '.join(MODEL_TYPES)}, "
            f"got {shorten(model)}"
        )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict | list):
        raise TemplateError(f"{path}: model.vocab: expected the vocabulary, got {shorten(vocab)}")
    ids: dict[str, Any] = vocab if isinstance(vocab, dict) else {}
    added = data.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise TemplateError(
            f"{path}: added_tokens: expected a list of objects, got {shorten(added)}"
        )
    entries = [*ids.items(), *((token.get("content"), token.get("id")) for token in added)]
    owner: dict[int, str] = {}
    for content, token_id in entries:
        if not isinstance(content, str) or (not content and content not in ids):
            raise TemplateError(f"{path}: added_tokens: expected a text, got {shorten(content)}")
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise TemplateError(
                f"{path}: token {shorten(content)}: expected an id from 0 to 2147483647, "
                f"got {shorten(token_id)}"
            )
        if owner.setdefault(token_id, content) != content:
            raise TemplateError(
                f"{path}: id {token_id} belongs to two tokens, {shorten(owner[token_id])} and "
                f"{shorten(content)}; every token needs an id of its own"
            )
        if ids.get(content, token_id) != token_id:
            raise TemplateError(
                f"{path}: token {shorten(content)} has two ids, {ids[content]} and {token_id}"
            )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for pattern in _patterns(data.get(part)):
            _check_pattern(path, part, pattern)
    return dict(entries)


def _patterns(value: Any) -> Iterator[str]:
    """Every regular expression inside one part of tokenizer.json. Its depth was bounded by the JSON
    parser."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for item in value.values():
            yield from _patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item)


def _check_pattern(path: Path, part: str, pattern: str) -> None:
    if len(pattern) > REGEX_LIMIT_CHARS:
        raise TemplateError(
            f"{path}: {part}: expected a regular expression of at most {REGEX_LIMIT_CHARS} "
            f"characters, got {len(pattern):,}"
        )
    repeats = 1
    for low, high in re.findall(r"\{(\d{0,9}),?(\d{0,9})\}", pattern):
        repeats *= max(int(low or 0), int(high or 0), 1)
    if repeats > REGEX_LIMIT_REPEATS:
        raise TemplateError(
            f"{path}: {part}: expected at most {REGEX_LIMIT_REPEATS:,} counted repetitions in a "
            f"regular expression, got {repeats:,} in {shorten(pattern)}"
        )


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    text_part = config.get("text_config")
    values = text_part if isinstance(text_part, dict) else config
    rows = values.get("vocab_size", config.get("vocab_size"))
    return rows if isinstance(rows, int) and not isinstance(rows, bool) else None


def _bare_config(folder: Path) -> Any:
    """A configuration that tells AutoTokenizer the model type and nothing else, so that no other
    key of config.json reaches transformers (and none of its defects stops the tokenizer)."""
    from transformers import AutoConfig, PretrainedConfig

    model_type = None
    if (folder / "config.json").exists():
        model_type = _read_object(folder / "config.json").get("model_type")
    try:
        return AutoConfig.for_model(str(model_type))
    except ValueError:  # a model type that this version of transformers does not know
        return PretrainedConfig()


def _check_ids(
    folder: Path, vocab: Mapping[str, int], num_rows: int | None, file_ids: Mapping[str, int]
) -> None:
    rows = 2**31 if num_rows is None else num_rows
    beyond = {t: i for ids in (vocab, file_ids) for t, i in ids.items() if not 0 <= i < rows}
    if beyond:
        token, index = min(beyond.items(), key=lambda item: item[1])
        raise TemplateError(
            f"{folder}: the tokenizer has {len(beyond)} token ids without an embedding row: "
            f"expected ids below vocab_size={num_rows}, got {index} for {shorten(token)}; "
            "tokenizer and config.json belong to different checkpoints"
        )
    moved = [token for token, index in file_ids.items() if vocab.get(token, index) != index]
    if moved:  # the tokenizers library numbers added tokens on from its vocabulary
        raise TemplateError(
            f"{folder / 'tokenizer.json'}: token {shorten(moved[0])} has the id "
            f"{file_ids[moved[0]]} here, but loads with the id {vocab[moved[0]]}; added tokens "
            "need consecutive ids behind the vocabulary"
        )


def _check_templates(folder: Path, templates: Any) -> None:
    """Compiles every chat template. No template is a legal checkpoint: a base model."""
    if templates is None:
        return
    from transformers.utils.chat_template_utils import render_jinja_template

    in_file = (folder / "chat_template.jinja").exists()
    path = folder / ("chat_template.jinja" if in_file else "tokenizer_config.json")
    named = templates if isinstance(templates, dict) else {"default": templates}
    for name, template in named.items():
        if not isinstance(template, str):
            raise TemplateError(
                f"{path}: chat template {shorten(name)}: expected a text, got {shorten(template)}"
            )
        with template_errors(f"{path}: the chat template {shorten(name)} does not compile"):
            # No conversation: compiles (and caches) the template without running it.
            render_jinja_template(conversations=[], chat_template=template)
