"""The cache: rings against linear buffers, growth, rollback, and what survives an interruption."""

from __future__ import annotations

import dataclasses
from typing import Any

import exafuse
import pytest
import torch
from exafuse import kv_cache
from exafuse.models.causal_lm import CausalLM
from torch import Tensor

WINDOW = 40


def model(prefill_chunk: int = 2048, **overrides: Any) -> CausalLM:
    """A hybrid EXAONE 4 whose rings hold 128 slots when the prefill chunk is at most 89."""
    config: dict[str, Any] = {
        "model_type": "exaone4",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        **overrides,
    }
    made = exafuse.from_config(config, dtype="float32", device="cpu", backend="reference", seed=1)
    made.prefill_chunk = prefill_chunk
    return made


def feed(m: CausalLM, ids: Tensor, sizes: list[int]) -> Tensor:
    cache = m.new_cache(ids.shape[0])
    return torch.cat(
        [
            m(chunk, past_key_values=cache, use_cache=True).logits
            for chunk in ids.split(sizes, dim=1)
        ],
        1,
    )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 64, 89])
def test_rings_that_wrap_equal_one_shot(chunk: int) -> None:
    ids = torch.randint(0, 97, (2, 400))
    whole = model()(ids, use_cache=False).logits
    m = model(prefill_chunk=chunk)
    cached = m(ids)
    cache = cached.past_key_values
    assert [layer.ring for layer in cache.layers] == [True, False, True]
    assert cache.layers[0].k.shape[1] == 128
    torch.testing.assert_close(cached.logits, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 300, [130, 1, 1, 167, 1], [299, 1], [3, 297]])
def test_any_split_gives_the_same_logits(sizes: list[int]) -> None:
    ids = torch.randint(0, 97, (2, 300))
    m = model(prefill_chunk=80)
    torch.testing.assert_close(
        feed(m, ids, sizes), m(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_ragged_batch_over_wrapping_rings_equals_each_row_alone() -> None:
    m = model(prefill_chunk=48)
    lengths = [300, 17, 129, 1]
    ids = torch.randint(0, 97, (4, 300))
    mask = torch.zeros(4, 300, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 300 - length :] = 1
    cache = m.new_cache(4)
    together = [m.next_logits(ids, cache, attention_mask=mask)]
    steps = torch.randint(0, 97, (4, 3))
    together += [m.next_logits(steps[:, i : i + 1], cache) for i in range(3)]
    assert cache.lengths == [n + 3 for n in lengths]
    assert cache.seqlens.tolist() == cache.lengths
    for row, length in enumerate(lengths):
        alone = m.new_cache(1)
        rows = [m.next_logits(ids[row : row + 1, 300 - length :], alone)]
        rows += [m.next_logits(steps[row : row + 1, i : i + 1], alone) for i in range(3)]
        for a, b in zip(together, rows, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_slots_never_written_cannot_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(prefill_chunk=64)
    ids = torch.randint(0, 97, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :9] = 0
    plain = m(ids, attention_mask=mask).logits
    cache = m.new_cache(2)
    for layer in cache.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    poisoned = m(ids, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(plain, poisoned)


@torch.no_grad()
def test_memory_of_a_sliding_layer_stays_at_its_ring() -> None:
    m = model(prefill_chunk=64)
    cache = m.new_cache(1)
    sizes = []
    for _ in range(12):
        m(torch.randint(0, 97, (1, 60)), past_key_values=cache)
        sizes.append([layer.k.shape[1] for layer in cache.layers])
    assert sizes[-1][0] == 128
    assert sizes[-1][1] >= 720
    expected = sum(2 * 4 * 2 * 16 * slots for slots in sizes[-1])
    assert cache.nbytes == expected


@torch.no_grad()
def test_a_cache_that_does_not_fit_is_refused_and_the_old_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m = model()
    with pytest.raises(exafuse.DoesNotFitError, match="tokens in 2 rows"):
        m.new_cache(2, max_length=10**12)
    cache = m.new_cache(1)
    ids = torch.randint(0, 97, (1, 30))
    m(ids[:, :20], past_key_values=cache)
    monkeypatch.setattr(kv_cache, "_UNCHECKED_BYTES", 0)
    monkeypatch.setattr("exafuse.weights.memory.free_bytes", lambda device: 10)
    with pytest.raises(exafuse.DoesNotFitError):
        m(torch.randint(0, 97, (1, 500)), past_key_values=cache)
    monkeypatch.undo()
    after = m(ids[:, 20:], past_key_values=cache).logits
    expected = m(ids, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_crop_then_continue_equals_never_having_gone_there() -> None:
    m = model(prefill_chunk=64)
    ids = torch.randint(0, 97, (2, 100))
    cache = m.new_cache(2)
    m(ids[:, :60], past_key_values=cache)
    m(torch.randint(0, 97, (2, 9)), past_key_values=cache)
    cache.crop(60)
    again = m(ids[:, 60:], past_key_values=cache).logits
    torch.testing.assert_close(again, m(ids, use_cache=False).logits[:, 60:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_crop_refuses_what_the_ring_has_overwritten() -> None:
    m = model(prefill_chunk=64)
    cache = m.new_cache(1)
    m(torch.randint(0, 97, (1, 200)), past_key_values=cache)
    cache.crop(200 - 128 + WINDOW - 1)  # the oldest length whose whole window is still stored
    m = model(prefill_chunk=64)
    cache = m.new_cache(1)
    m(torch.randint(0, 97, (1, 200)), past_key_values=cache)
    with pytest.raises(ValueError, match="cut back to 111"):
        cache.crop(110)
    with pytest.raises(ValueError, match="expected 0 to 200"):
        cache.crop(201)


@torch.no_grad()
def test_crop_judges_each_row_by_its_own_tokens() -> None:
    m = model(prefill_chunk=64)
    ids, mask = torch.randint(0, 97, (2, 200)), torch.ones(2, 200, dtype=torch.int64)
    mask[1, :197] = 0
    cache = m.new_cache(2)
    m.next_logits(ids, cache, attention_mask=mask)
    cache.crop(198)
    assert cache.lengths == [198, 1]
    again = m.next_logits(ids[:, 198:], cache)
    fresh = m.new_cache(2)
    expected = m.next_logits(ids, fresh, attention_mask=mask)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_interrupted_call_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    ids = torch.randint(0, 97, (1, 30))
    cache = m.new_cache(1)
    m(ids[:, :20], past_key_values=cache)
    layer = m.model.layers[1]
    original = layer.mlp.forward

    def interrupt(*args: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.mlp, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        m(ids[:, 20:], past_key_values=cache)
    assert cache.lengths == [20]
    assert cache.get_seq_length() == 20
    monkeypatch.setattr(layer.mlp, "forward", original)
    after = m(ids[:, 20:], past_key_values=cache).logits
    expected = m(ids, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_forward_refuses_what_it_cannot_honour() -> None:
    m = model()
    ids = torch.randint(0, 97, (2, 6))
    holey = torch.tensor([[1, 1, 0, 1, 1, 1]] * 2)
    for arguments, message in (
        ({"attention_mask": holey}, "padding between tokens"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "2-D"),
        ({"attention_mask": torch.ones(2, 5)}, r"expected \(2, 6\)"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_ids": torch.zeros(3, 6, dtype=torch.int64)}, "position_ids"),
        ({"inputs_embeds": torch.zeros(2, 6, 64)}, "exactly one"),
        ({"past_key_values": m.new_cache(3)}, "3 rows"),
        ({"labels": ids, "logits_to_keep": 1}, "labels"),
    ):
        with pytest.raises(ValueError, match=message):
            m(ids, **arguments)
    for bad in (torch.tensor([[97]]), torch.tensor([[-1]]), torch.ones(1, 2), ids[:, :0], ids[0]):
        with pytest.raises(ValueError, match="input_ids"):
            m(bad)
    with pytest.raises(TypeError, match="KVCache"):
        m(ids, past_key_values=((torch.zeros(1),),))


def test_loss_matches_transformers_and_trains() -> None:
    m = model()
    ids = torch.randint(0, 97, (2, 12))
    labels = ids.clone()
    labels[0, :4] = -100
    out = m(ids, labels=labels)
    assert out.past_key_values is None, "a needed gradient turns the cache off"
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.testing.assert_close(out.loss, ForCausalLMLoss(out.logits, labels, vocab_size=97))
    torch.testing.assert_close(
        m(ids, labels=labels, num_items_in_batch=7).loss,
        ForCausalLMLoss(out.logits, labels, vocab_size=97, num_items_in_batch=7),
    )
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@torch.no_grad()
def test_packed_sequences_by_position_jumps_equal_each_alone() -> None:
    m = model()
    ids = torch.randint(0, 97, (1, 150))
    positions = torch.cat((torch.arange(90), torch.arange(60)))[None]
    packed = m(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([m(part, use_cache=False).logits for part in (ids[:, :90], ids[:, 90:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_output_forms() -> None:
    m = model()
    ids = torch.randint(0, 97, (2, 6))
    out = m(ids, output_hidden_states=True)
    assert out["logits"] is out[0] is out.logits
    assert m(ids, return_dict=False)[0].equal(out.logits)
    assert len(out.hidden_states) == m.config.num_layers + 1
    assert m(ids, logits_to_keep=2).logits.equal(out.logits[:, -2:])
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(m(ids, logits_to_keep=kept).logits, out.logits[:, kept])
    embeds = m.model.embed_tokens(ids)
    assert m(inputs_embeds=embeds).logits.equal(out.logits)
    assert dataclasses.is_dataclass(out)
