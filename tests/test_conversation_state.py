"""What a model and its cache remember between calls: positions, padding, dtype, failures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import exafuse
import pytest
import tiny_models
import torch
import transformers
from test_kv_cache import model


def padded(rows: list[int], columns: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (len(rows), columns))
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for row, length in enumerate(rows):
        mask[row, : length if side == "right" else columns] = 1
        if side == "left":
            mask[row, : columns - length] = 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_can_be_continued_by_either_entry(side: str) -> None:
    """Each row goes on as it would alone, whichever of forward and next_logits comes first."""
    m = model()
    lengths = [60, 7]
    ids, mask = padded(lengths, 60, side)
    more = torch.randint(0, 97, (2, 3))
    for first in ("forward", "next_logits"):
        cache = m.new_cache(2)
        if first == "forward":
            m(ids, attention_mask=mask, past_key_values=cache)
        else:
            m.next_logits(ids, cache, attention_mask=mask)
        middle = m.next_logits(more[:, :1], cache)
        last = m(more[:, 1:], past_key_values=cache).logits
        for row in range(2):
            alone = torch.cat((ids[row][mask[row].bool()], more[row]))[None]
            expected = m(alone, use_cache=False).logits[0]
            torch.testing.assert_close(middle[row], expected[-3], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(last[row], expected[-2:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_crop_counts_padding_as_what_it_was() -> None:
    m = model()
    ids, mask = padded([6, 3], 6, "right")
    cache = m.new_cache(2)
    m(ids, attention_mask=mask, past_key_values=cache)
    cache.crop(3)
    assert cache.lengths == [3, 3]
    assert cache.next_positions.tolist() == [3, 3]
    ids, mask = padded([6, 3], 6, "left")
    cache = m.new_cache(2)
    m.next_logits(ids, cache, attention_mask=mask)
    cache.crop(4)
    assert cache.lengths == [4, 1]


@torch.no_grad()
def test_an_emptied_cache_is_as_good_as_new() -> None:
    m = model(prefill_chunk=64)
    cache = m.new_cache(1)
    m(torch.randint(0, 97, (1, 200)), past_key_values=cache)
    cache.crop(0)
    ids = torch.randint(0, 97, (1, 10))
    again = m(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, m(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    cache.crop(5)


@torch.no_grad()
def test_a_mask_cannot_rewrite_what_is_cached() -> None:
    m = model()
    cache = m.new_cache(2)
    m(torch.randint(0, 97, (2, 5)), past_key_values=cache)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match="expected 5 cached tokens in row 1, got 3"):
        m(torch.randint(0, 97, (2, 1)), attention_mask=mask, past_key_values=cache)
    assert cache.lengths == [5, 5]


@torch.no_grad()
def test_chunks_of_nothing_but_padding_are_skipped() -> None:
    m = model(prefill_chunk=16)
    ids, mask = padded([30, 5], 60, "left")
    expected = model().next_logits(ids, model().new_cache(2), attention_mask=mask)
    got = m.next_logits(ids, m.new_cache(2), attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    out = m(ids, attention_mask=mask, output_hidden_states=True)
    whole = m(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(out.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert len(out.hidden_states) == len(whole.hidden_states)
    with pytest.raises(ValueError, match="padding only"):
        m.next_logits(ids, m.new_cache(2), attention_mask=torch.zeros_like(mask))


@torch.no_grad()
def test_the_chunk_of_the_cache_counts() -> None:
    m = model(prefill_chunk=16)
    cache = m.new_cache(1)
    m.prefill_chunk = 2048
    ids = torch.randint(0, 97, (1, 150))
    expected = m(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(m.next_logits(ids, cache), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_call_that_fails_late_undoes_itself_or_spoils_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = model(prefill_chunk=16)
    ids = torch.randint(0, 97, (1, 300))
    for length, spoiled in ((40, False), (300, True)):
        cache = m.new_cache(1)
        m(ids[:, :20], past_key_values=cache)
        calls = []

        def interrupt(done: int, total: int, calls: list[int] = calls, stop: int = length) -> None:
            calls.append(done)
            if done >= stop - 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            m.next_logits(ids[:, 20:length], cache, progress=interrupt)
        assert cache.lengths == [20]
        assert len(calls) > 1
        if spoiled:
            with pytest.raises(ValueError, match="interrupted"):
                m.next_logits(ids[:, 20:40], cache)
        else:
            after = m.next_logits(ids[:, 20:40], cache)
            expected = m(ids[:, :40], use_cache=False).logits[:, -1]
            torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_keys_older_than_the_window_may_be_anything() -> None:
    m = model(prefill_chunk=64)
    ids = torch.randint(0, 97, (2, 100))
    caches = [m.new_cache(2), m.new_cache(2)]
    for cache in caches:
        m(ids, past_key_values=cache)
    for layer in caches[1].layers:
        if layer.ring:
            layer.k[:, :50], layer.v[:, :50] = float("nan"), float("nan")
    token = torch.randint(0, 97, (2, 1))
    clean, poisoned = (m.next_logits(token, cache) for cache in caches)
    assert torch.equal(clean, poisoned)


def test_frozen_embeddings_and_given_embeddings_train() -> None:
    m = model()
    m.model.embed_tokens.weight.requires_grad_(False)
    ids = torch.randint(0, 97, (2, 8))
    m(ids, labels=ids).loss.backward()
    m(inputs_embeds=m.model.embed_tokens(ids), labels=ids).loss.backward()
    assert m.model.layers[0].mlp.down_proj.weight.grad is not None


def test_a_model_can_be_copied_and_pickled(tmp_path: Path) -> None:
    m = model()
    ids = torch.randint(0, 97, (1, 8))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(m)(ids).logits, m(ids).logits)
    assert copy.deepcopy(m).backend is m.backend


@torch.no_grad()
def test_what_is_saved_says_its_own_dtype(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path / "a")
    for dtype in ("bfloat16", "float16", "float32"):
        m = exafuse.from_pretrained(source, dtype=dtype, device="cpu")
        m.save_pretrained(tmp_path / dtype)
        written = json.loads((tmp_path / dtype / "config.json").read_text())
        assert written["torch_dtype"] == dtype == m.config.dtype
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
        assert theirs.dtype == m.dtype
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(theirs.state_dict()[name], m.get_parameter(name))


def test_a_backend_and_a_device_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.build("llama"), tmp_path)
    with pytest.raises((ValueError, exafuse.BackendError), match="cuda"):
        exafuse.from_pretrained(source, backend="cuda", device="cpu")
    with pytest.raises(ValueError, match="vision tower"):
        model()(torch.zeros(1, 1, dtype=torch.int64), pixel_values=torch.zeros(1))
