"""The names and shapes of a checkpoint must be the model's, and which head it has is a rule."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from exafuse.weights import loading as weights

FAMILIES = list(files.VARIANTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_tensor_is_named(tmp_path: Path, family: str) -> None:
    files.make(tmp_path, family)
    state = files.read(tmp_path)
    for name in state:
        files.write(tmp_path, {other: t for other, t in state.items() if other != name})
        message = files.refused(tmp_path, "1 tensors are missing", repr(name))
        assert ("tie_word_embeddings is false" in message) == (name == "lm_head.weight")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.4.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "lm_head.bias",
        "model.lm_head.weight",
        "score.weight",
        "rotary_emb.inv_freq.weight",
        "model.model.norm.weight",
    ],
)
def test_an_added_tensor_is_named(tmp_path: Path, name: str) -> None:
    files.make(tmp_path)
    files.write(tmp_path, {**files.read(tmp_path), name: torch.zeros(3)})
    files.refused(tmp_path, "1 tensors are unexpected", repr(name))


def test_a_renamed_tensor_is_missing_and_unexpected(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    state["model.layers.1.self_attn.q_normal.weight"] = state.pop(
        "model.layers.1.self_attn.q_norm.weight"
    )
    files.write(tmp_path, state)
    files.refused(tmp_path, "'model.layers.1.self_attn.q_norm.weight'", "q_normal")


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    dropped = sorted(name for name in state if "layers.2." in name)
    for name in dropped:
        state[f"{name}.{'x' * 5000}\n\x1b[31m"] = state.pop(name)
    files.write(tmp_path, state)
    message = files.refused(tmp_path, f"{len(dropped)} tensors are missing", "and 6 more")
    assert sum(name in message.split("unexpected")[0] for name in dropped) == 5
    assert "\x1b" not in message
    assert "\n" not in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misshapen_tensor_is_named(tmp_path: Path, family: str) -> None:
    files.make(tmp_path, family)
    state = files.read(tmp_path)
    for name, tensor in state.items():
        longer = torch.cat([tensor, tensor[:1]])
        files.write(tmp_path, {**state, name: longer})
        files.refused(tmp_path, repr(name), f"got {list(longer.shape)}", str(list(tensor.shape)))
    name = "model.layers.0.mlp.down_proj.weight"
    for wrong in (state[name].T, state[name].flatten(), state[name][None], torch.zeros(())):
        files.write(tmp_path, {**state, name: wrong})
        files.refused(tmp_path, repr(name), f"got {list(wrong.shape)}")


def test_heads_cannot_be_moved_between_q_and_k(tmp_path: Path) -> None:
    """Rows that add up to the merged matrix are not enough: each part has its own count."""
    files.make(tmp_path)
    state = files.read(tmp_path)
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    both = torch.cat([state[q], state[k]])
    files.write(tmp_path, {**state, q: both[:48], k: both[48:]})
    files.refused(tmp_path, "2 tensors have another shape", q, k)


def test_rotary_tables_and_mtp_are_left_out(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "mtp.fc.weight": torch.full((64, 128), torch.nan, dtype=torch.float16),
    }
    files.write(tmp_path, {**state, **extra})
    files.assert_same(files.without_tied_head(files.load(tmp_path, check_finite=True)), state)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_backbone_prefixes(tmp_path: Path, prefix: str) -> None:
    files.make(tmp_path, "llama")
    state = files.read(tmp_path)
    renamed = {
        prefix + n.removeprefix("model.") if n.startswith("model.") else n: t
        for n, t in state.items()
    }
    assert renamed.keys() != state.keys()
    files.write(tmp_path, renamed)
    files.assert_same(files.without_tied_head(files.load(tmp_path)), state)
    # The message uses the file's own spelling for what is wrong with the file.
    files.write(tmp_path, {**renamed, f"{prefix}norm.weight": torch.zeros(3)})
    files.refused(tmp_path, f"'{prefix}norm.weight'", "got [3]")


def test_mixed_prefixes_are_refused(tmp_path: Path) -> None:
    files.make(tmp_path, "llama")
    state = files.read(tmp_path)
    # Either of the two could be the one that is meant.
    files.write(tmp_path, {**state, "norm.weight": state["model.norm.weight"] + 1})
    files.refused(tmp_path, "expected one prefix", "'norm.weight'")


# ------------------------------------------------------------------------------------- tied weights


def test_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    model = files.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_with_an_equal_head_in_the_file(tmp_path: Path, recwarn) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    files.write(tmp_path, {**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    model = files.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not recwarn.list
    weights.save_weights(model, tmp_path / "saved")
    files.assert_same(files.read(tmp_path / "saved"), state)


def test_tied_with_another_head_in_the_file(tmp_path: Path) -> None:
    hf = files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # the last value of all
    files.write(tmp_path, {**state, "lm_head.weight": head})
    with pytest.warns(UserWarning, match="tie_word_embeddings is true"):
        model = files.load(tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    files.assert_same(weights.unmerged_state_dict(model), files.read(tmp_path))
    theirs = type(hf).from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, head)
    weights.save_weights(model, tmp_path / "saved")
    files.assert_same(files.read(tmp_path / "saved"), files.read(tmp_path))


def test_tied_without_an_embedding(tmp_path: Path) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    files.write(tmp_path, state)
    files.refused(tmp_path, "1 tensors are missing: 'model.embed_tokens.weight'")
