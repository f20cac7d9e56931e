"""generation_config.json: what is taken from it, as in transformers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from exafuse.config import load_config
from exafuse.errors import ConfigError
from exafuse.generation.generate import GenerationConfig

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_models.build("llama", bos_token_id=4, eos_token_id=5, pad_token_id=6)
    return tiny_models.save(model, folder)


def read(folder: Path, data: Any, raw: str | None = None) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(data) if raw is None else raw)
    return GenerationConfig.from_folder(folder, load_config(folder))


def test_every_key_is_taken(checkpoint: Path) -> None:
    data = {
        "max_length": 50,
        "max_new_tokens": 9,
        "do_sample": True,
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "stop_strings": ["a", "b"],
        **TOKEN_IDS,
    }
    config = read(checkpoint, data)
    assert config.to_dict() == data
    assert config.eos_token_id == (2, 3)
    assert GenerationConfig(**config.to_dict()) == config, "to_dict can be read again"
    assert GenerationConfig(eos_token_id=2).to_dict() == {"eos_token_id": 2}


@pytest.mark.parametrize(
    "file",
    [
        {"eos_token_id": 7, "_from_model_config": True, "transformers_version": "4.54.0"},
        {"eos_token_id": [7, 8], "pad_token_id": 9, "cache_implementation": "hybrid"},
        {"temperature": 0.6, "top_p": 0.95, "do_sample": True},
        {"eos_token_id": None},
        {},
        None,
    ],
    ids=str,
)
def test_token_ids_are_chosen_as_in_transformers(
    checkpoint: Path, file: dict[str, Any] | None
) -> None:
    """The file alone counts where there is one, config.json where there is none."""
    path = checkpoint / "generation_config.json"
    if file is None:
        path.unlink(missing_ok=True)
        ours = GenerationConfig.from_folder(checkpoint, load_config(checkpoint))
    else:
        ours = read(checkpoint, file)
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint).generation_config
    eos = theirs.eos_token_id
    expected_eos = tuple(eos) if isinstance(eos, list) else None if eos is None else (eos,)
    assert ours.eos_token_id == expected_eos
    for name in ("pad_token_id", "bos_token_id", "do_sample", "temperature", "top_p"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.cache_implementation is None, "the layout of the cache is not the file's choice"


def test_token_ids_of_a_nested_text_config(tmp_path: Path) -> None:
    nested = {"text_config": {"eos_token_id": 53, "pad_token_id": 0}, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    config = GenerationConfig.from_folder(tmp_path, None)  # type: ignore[arg-type]
    assert (config.eos_token_id, config.pad_token_id) == ((53,), 1)


def test_without_any_file_the_model_config_counts(checkpoint: Path, tmp_path: Path) -> None:
    config = GenerationConfig.from_folder(tmp_path, load_config(checkpoint))
    assert config == GenerationConfig.from_model_config(load_config(checkpoint))
    assert config.to_dict() == {"eos_token_id": 5, "pad_token_id": 6, "bos_token_id": 4}


def test_settings_that_are_not_implemented_are_named_once(checkpoint: Path) -> None:
    data = {"num_beams": 4, "min_length": 10, "no_repeat_ngram_size": 0, "eos_token_id": 2}
    with pytest.warns(UserWarning, match="generation_config.json: ignored") as caught:
        config = read(checkpoint, data)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "num_beams=4" in text
    assert "min_length=10" in text
    assert "no_repeat" not in text, "0 means off"
    assert config.eos_token_id == (2,)


def test_the_defaults_of_transformers_are_neutral(checkpoint: Path) -> None:
    """Old files spell out every default: no warning, and the values mean what they say there."""
    defaults = transformers.GenerationConfig()._get_default_generation_params()
    config = read(checkpoint, defaults | {"bad_words_ids": [], "guidance_scale": 1})
    assert config.top_k == 50
    assert config.max_length == 20
    GenerationConfig.from_object(transformers.GenerationConfig())


BAD_FIELDS = {
    "temperature": ["hot", True, [1], {}],
    "top_k": ["5", 5.0, True, [5]],
    "do_sample": ["true", 1, 0],
    "max_new_tokens": [1.5, "9", False],
    "eos_token_id": ["2", 2.0, [2, "3"], [[2]], True, {"a": 1}],
    "pad_token_id": [[0], "0", 0.0, True],
    "stop_strings": ["", [""], 5, [5]],
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_wrong_types_name_the_file_and_the_field(checkpoint: Path, name: str) -> None:
    for value in BAD_FIELDS[name]:
        with pytest.raises(ConfigError, match=rf"generation_config\.json: {name}: expected"):
            read(checkpoint, {name: value})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("not json", "generation_config.json"),
        ("", "generation_config.json"),
        ('\ufeff{"top_k": 5}', "byte-order mark"),
        ('{"top_k": 5, "top_k": 6}', "got 'top_k' twice"),
        ('{"temperature": NaN}', "NaN"),
        ('{"temperature": 1e999}', "finite"),
        ("[" * 100_000, "generation_config.json"),
        ('{"x": "' + "a" * (5 * 2**20) + '"}', "generation_config.json"),
    ],
    ids=["list", "words", "empty", "bom", "twice", "nan", "infinite", "deep", "large"],
)
def test_malformed_files(checkpoint: Path, raw: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(checkpoint, None, raw)


def test_nothing_a_file_names_is_run(checkpoint: Path) -> None:
    hostile = {"custom_generate": "evil/repo", "auto_map": {"x": "evil.py"}, "__class__": "os"}
    assert read(checkpoint, hostile) == GenerationConfig()


def test_frozen_and_typed_when_made_by_hand() -> None:
    config = GenerationConfig(eos_token_id=[1, 2], stop_strings="a", temperature=1)
    assert (config.eos_token_id, config.stop_strings, config.temperature) == ((1, 2), ("a",), 1.0)
    assert isinstance(config.temperature, float)
    with pytest.raises(AttributeError):
        config.temperature = 0.5  # type: ignore[misc]
    with pytest.raises(ValueError, match="top_k: expected an integer, got 'many'"):
        GenerationConfig(top_k="many")
    with pytest.raises(ValueError, match="eos_token_id: expected an integer or a list"):
        GenerationConfig(eos_token_id=torch.tensor([1.5]))
