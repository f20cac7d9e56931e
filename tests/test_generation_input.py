"""What ``generate`` takes, and what it refuses before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exafuse.generation.generate import GenerationConfig
from generation_pair import Pair, prompt
from scripted_model import ScriptedModel
from transformers import GenerationConfig as TheirConfig


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llama", tmp_path_factory.mktemp("llama"))


def test_kinds_of_input_that_mean_the_same(llama: Pair) -> None:
    ids = prompt(1, 6)
    expected = llama.ours.generate(ids, max_new_tokens=5)
    same: list[Any] = [
        ids[0],
        ids.to(torch.int32),
        ids.numpy(),
        ids[0].tolist(),
        ids.tolist(),
        tuple(ids[0].tolist()),
        [ids[0]],
        {"input_ids": ids},
        {"input_ids": ids.tolist(), "attention_mask": [[1] * 6], "token_type_ids": [[0] * 6]},
    ]
    for inputs in same:
        assert torch.equal(llama.ours.generate(inputs, max_new_tokens=5), expected)
    assert torch.equal(llama.ours.generate(input_ids=ids, max_new_tokens=5), expected)


def test_config_objects_that_mean_the_same(llama: Pair) -> None:
    ids = prompt(1, 6)
    values = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 10}
    outputs = []
    for config in (GenerationConfig(**values), TheirConfig(**values), values):
        outputs.append(llama.ours.generate(ids, generation_config=config, seed=1))
    outputs.append(llama.ours.generate(ids, **values, seed=1))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    shorter = llama.ours.generate(ids, generation_config=values, max_new_tokens=2, seed=1)
    assert torch.equal(shorter, outputs[0][:, :8]), "an argument goes before the config"


def test_the_models_own_config_is_the_default(llama: Pair) -> None:
    ids = prompt(1, 6)
    own = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 9}
    expected = llama.ours.generate(ids, **own, seed=3)
    llama.ours.generation_config = GenerationConfig(**own)
    try:
        assert torch.equal(llama.ours.generate(ids, seed=3), expected)
        greedy = llama.ours.generate(ids, do_sample=False)
    finally:
        llama.ours.generation_config = GenerationConfig()
    assert torch.equal(greedy, llama.ours.generate(ids, max_new_tokens=9))


# ---- what is refused ----------------------------------------------------------------------------

BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "negative": ([[1, 2], [3, -1]], r"integers from 0 to 96 .vocab_size 97., got -1 at row 1"),
    "beyond the vocabulary": ([3, 97], r"integers from 0 to 96 .*got 97 at row 0, column 1"),
    "beyond int64": ([3, 2**64], r"got 1844\d+ at row 0, column 1"),
    "float in a list": ([1, 2.0], r"got 2.0 at row 0, column 1"),
    "bool in a list": ([1, True], r"got True at row 0, column 1"),
    "None in a list": ([None], r"got None at row 0, column 0"),
    "str in a list": (["a", "b"], r"got 'a' at row 0, column 0"),
    "list among ints": ([1, [2]], r"got \[2\] at row 0, column 1"),
    "list inside a row": ([[1], [2, [3]]], r"got \[3\] at row 1, column 1"),
    "nothing": ([], "at least one token, got an empty list"),
    "an empty row": ([[1], []], "at least one token in row 1, got none"),
    "empty tensor": (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
    "no rows": (torch.zeros(0, 4, dtype=torch.int64), "at least one token"),
    "0-D": (torch.tensor(3), r"expected \(batch, columns\)"),
    "3-D": (torch.zeros(1, 2, 3, dtype=torch.int64), r"expected \(batch, columns\)"),
    "float tensor": (torch.ones(1, 3), "expected int64 token ids, got torch.float32"),
    "bool tensor": (torch.ones(1, 3, dtype=torch.bool), "got torch.bool"),
    "negative tensor": (torch.tensor([[1, -5]]), "ids from 0 to 96, got -5"),
    "large tensor": (torch.tensor([[1, 2**40]]), "ids from 0 to 96, got 1099511627776"),
    "unsigned 64 bits": (np.array([[1, 2**64 - 1]], dtype=np.uint64), "got numpy uint64"),
    "float array": (np.ones((1, 3)), "got numpy float64"),
    "object array": (np.array([[1], [2, 3]], dtype=object), "got numpy object"),
    "no input_ids": ({"ids": [1]}, "expected the key 'input_ids', got .'ids'."),
    "as long as the context": ([1] * 64, "64 tokens and the context of the model is 64 positions"),
    "longer than the context": ([1] * 65, "65 tokens and the context of the model is 64"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(name: str) -> None:
    inputs, message = BAD_PROMPTS[name]
    model = ScriptedModel([[1]])
    with pytest.raises(ValueError, match=message):
        model.generate(inputs)
    assert not model.caches, "refused before anything was computed"


@pytest.mark.parametrize("inputs", ["text", b"bytes", None, 5, {1, 2}], ids=repr)
def test_what_holds_no_ids(inputs: Any) -> None:
    with pytest.raises(TypeError, match="input_ids: expected token ids"):
        ScriptedModel([[1]]).generate(inputs)


BAD_MASKS: dict[str, tuple[Any, Any, str]] = {
    "other length": ([[1, 2]], [[1]], r"the shape of the ids \[1, 2\], got \[1, 1\]"),
    "other batch": ([[1, 2]], torch.ones(2, 2), r"the shape of the ids \[1, 2\], got \[2, 2\]"),
    "4-D": ([[1, 2]], torch.ones(1, 1, 2, 2), r"\[batch, seq\], got \[1, 1, 2, 2\]"),
    "right padding": ([[1, 2], [3, 4]], [[1, 1], [1, 0]], "padding at the left only.* row 1"),
    "a hole": ([[1, 2, 3]], [[1, 0, 1]], "padding at the left only.* row 0"),
    "all padding": ([[1, 2]], [[0, 0]], "padding at the left only"),
    "other values": ([[1, 2]], [[1, 3]], "only 0 .padding. and 1"),
    "additive": ([[1, 2]], [[0.0, -3e38]], "only 0 .padding. and 1"),
    "ragged": ([[1, 2], [3]], [[1, 1], [1, 1]], r"rows of \[2, 1\] values like the ids"),
    "words": ([[1, 2]], [["a", "b"]], "0 and 1"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks(name: str) -> None:
    inputs, mask, message = BAD_MASKS[name]
    model = ScriptedModel([[1], [1]], generation_config=GenerationConfig(pad_token_id=0))
    with pytest.raises(ValueError, match=f"attention_mask: expected.*{message}"):
        model.generate(inputs, attention_mask=mask)


def test_a_pad_id_inside_the_prompt_is_not_guessed_about() -> None:
    model = ScriptedModel([[1]], generation_config=GenerationConfig(pad_token_id=0))
    with pytest.raises(ValueError, match="taken from pad_token_id=0; pass attention_mask"):
        model.generate([[5, 0, 6]])
    assert model.generate([[5, 0, 6]], attention_mask=[[1, 1, 1]]).shape == (1, 23)


def test_ragged_lists_need_some_pad_id() -> None:
    with pytest.raises(ValueError, match="rows of different lengths need a pad token"):
        ScriptedModel([[1], [1]]).generate([[1, 2], [3]])


BAD_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_new_tokens": ((0, -1), "at least 1"),
    "max_length": ((0, -1), "at least 1"),
    "temperature": ((0, 0.0, -1.0), "above 0 .for greedy decoding pass do_sample=False."),
    "top_k": ((-1,), "at least 0"),
    "top_p": ((0, 0.0, -0.1, 1.01), "above 0 and at most 1"),
    "min_p": ((-0.1, 1.01), "from 0 to 1"),
    "repetition_penalty": ((0, -1.0), "above 0"),
    "presence_penalty": ((2.1, -2.1), "from -2 to 2"),
    "cache_implementation": (("hybrid", "quantized", ""), "None or one of dynamic, static"),
    "eos_token_id": ((97, -1, [3, 97]), "ids from 0 to 96"),
}


# Never taken from a checkpoint: its cache layout, and ids that do not exist are passed over.
ONLY_FROM_CALLS = ("cache_implementation", "eos_token_id")
WAYS = [
    (name, way)
    for name in BAD_VALUES
    for way in ("argument", "config", "model")
    if way != "model" or name not in ONLY_FROM_CALLS
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_values_out_of_range(name: str, way: str) -> None:
    values, limit = BAD_VALUES[name]
    for value in values:
        settings = {"do_sample": True, name: value}
        model, kwargs = ScriptedModel([[1]]), settings
        if way == "config":
            kwargs = {"generation_config": GenerationConfig(**settings)}
        if way == "model":
            kwargs, model.generation_config = {}, GenerationConfig(**settings)
        with pytest.raises(ValueError, match=f"{name}: expected {limit}"):
            model.generate([1], **kwargs)
        assert not model.caches


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("max_new_tokens", "an integer"),
        ("top_k", "an integer"),
        ("temperature", "a finite number"),
        ("presence_penalty", "a finite number"),
        ("do_sample", "True or False"),
        ("eos_token_id", "an integer or a list of integers"),
        ("stop_strings", "a non-empty string or a list of them"),
    ],
)
def test_values_of_a_wrong_kind(name: str, expected: str) -> None:
    wrong = ["hot", [1.5], float("nan"), float("inf"), object(), True, ""]
    if name == "do_sample":
        wrong = ["yes", 1, 0, []]
    if name == "stop_strings":
        wrong = ["", [""], 3, [3], ["a", ""]]
    for value in wrong:
        with pytest.raises(ValueError, match=f"{name}: expected {expected}, got"):
            ScriptedModel([[1]]).generate([1], **{name: value})


def test_numbers_of_other_libraries_are_numbers() -> None:
    model = ScriptedModel([[1, 2, 3]])
    out = model.generate(
        [np.int64(1)],
        max_new_tokens=np.int32(2),
        do_sample=True,
        top_p=np.float32(0.5),
        temperature=1,
        repetition_penalty=2,
        eos_token_id=torch.tensor(9),
        seed=0,
    )
    assert out.shape == (1, 3)


def test_kinds_of_drafting() -> None:
    model = ScriptedModel([[1]])
    with pytest.raises(ValueError, match="draft: expected None, 'mtp' or 'prompt_lookup', got 'g'"):
        model.generate([1], draft="g")
    with pytest.raises(ValueError, match=r"'mtp' needs .*head.* has none; use draft='prompt_look"):
        model.generate([1], draft="mtp")


def test_other_refusals() -> None:
    model = ScriptedModel([[1]])
    with pytest.raises(TypeError, match="unexpected 'num_beams', 'pixel_values'"):
        model.generate([1], num_beams=4, pixel_values=torch.ones(1))
    with pytest.raises(TypeError, match=r"no beams here: .* exafuse.patch\(model\)"):
        model.generate([1], num_beams=4)
    with pytest.raises(TypeError, match=r"'max_new_token' \(did you mean max_new_tokens\?\)"):
        model.generate([1], max_new_token=4)
    with pytest.raises(TypeError, match="unexpected 'pixel_values'"):
        model.generate({"input_ids": [1], "pixel_values": torch.ones(1)})
    with pytest.raises(TypeError, match="attention_mask: given twice"):
        model.generate({"input_ids": [1], "attention_mask": [1]}, attention_mask=[1])
    with pytest.raises(TypeError, match="streamer: expected methods put and end, got list"):
        model.generate([1], streamer=[])
    with pytest.raises(TypeError, match="logits_processor: expected a list of callables"):
        model.generate([1], logits_processor=lambda ids, scores: scores)
    with pytest.raises(TypeError, match="stopping_criteria: expected a list of callables"):
        model.generate([1], stopping_criteria=[3])
    with pytest.raises(TypeError, match=r"stopping_criteria: expected bool or bool .1., got None"):
        model.generate([1], stopping_criteria=[lambda ids, scores: None])
    with pytest.raises(TypeError, match=r"generation_config: expected .* got str"):
        model.generate([1], generation_config="greedy")
    with pytest.raises(ValueError, match=r"exafuse does not implement num_beams=4, typical_p=0.9"):
        model.generate([1], generation_config=TheirConfig(num_beams=4, typical_p=0.9))
    with pytest.raises(ValueError, match="max_length: expected more than the 3 tokens"):
        model.generate([1, 2, 3], max_length=3)
    with pytest.raises(TypeError, match="pixel_values: given twice"):
        model.generate({"input_ids": [1], "pixel_values": 1}, pixel_values=torch.ones(1))
    with pytest.raises(TypeError, match=r"unexpected 'pixel_values' .this model has no vision"):
        model.generate([1], pixel_values=torch.ones(1))
    assert model.generate([1], pixel_values=None, max_new_tokens=1).shape == (1, 2)
    with pytest.raises(ValueError, match="num_draft_tokens: expected 1 or more, got 0"):
        model.generate([1], num_draft_tokens=0)
    with pytest.raises(TypeError, match=r"num_draft_tokens: expected an int, got 2.0"):
        model.generate([1], num_draft_tokens=2.0)
    with pytest.raises(ValueError, match="seed: expected an integer"):
        model.generate([1], do_sample=True, seed=-1)
    with pytest.raises(ValueError, match="stop_strings: expected the model's tokenizer"):
        model.generate([1], stop_strings="end")
    with pytest.raises(ValueError, match="pad_token_id: expected 0 to 96, got 97"):
        model.generate([1], generation_config={"pad_token_id": 97})


def test_settings_that_only_drawing_reads() -> None:
    model = ScriptedModel([[1, 2]])
    with pytest.warns(UserWarning, match="temperature, top_p: no effect on greedy decoding"):
        model.generate([1], temperature=0.5, top_p=0.9)
    model.generation_config = GenerationConfig(temperature=0.0, top_k=-1, do_sample=False)
    assert model.generate([1]).shape == (1, 21), "the model's own are harmless while greedy"
