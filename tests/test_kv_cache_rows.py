"""Rows of a cache that keep different numbers of tokens after a mark."""

from __future__ import annotations

import random

import pytest
import torch
from exafuse.cache_columns import Block, Ragged, first_columns, row_lengths
from test_kv_cache import WINDOW, model


@torch.no_grad()
@pytest.mark.parametrize("chunk", [16, 64, 2048])
def test_rows_that_keep_different_tokens_equal_rows_alone(chunk: int) -> None:
    """Random feeding and cutting, through rings that wrap, against a fresh cache for each row."""
    m, rng = model(prefill_chunk=chunk), random.Random(chunk)
    lengths = [30, 1, 12]
    ids = torch.randint(0, 97, (3, 30))
    mask = (torch.arange(30) >= 30 - torch.tensor(lengths)[:, None]).long()
    cache = m.new_cache(3)
    m.next_logits(ids, cache, mask)
    mark = cache.mark()
    texts = [ids[row, 30 - n :].tolist() for row, n in enumerate(lengths)]
    kept = [0, 0, 0]
    for _ in range(110):
        fed = torch.randint(0, 97, (3, rng.randint(1, 6)))
        m.next_logits(fed, cache)
        taken = [rng.randint(0, fed.shape[1]) for _ in texts]
        for text, row, n in zip(texts, fed.tolist(), taken, strict=True):
            text += row[:n]
        kept = [a + b for a, b in zip(kept, taken, strict=True)]
        cache.keep_after(mark, kept)
        assert cache.lengths == [len(text) for text in texts] == cache.seqlens.tolist()
        assert cache.get_seq_length() == 30 + max(kept)
        assert cache.next_positions.tolist() == cache.lengths
        assert cache.num_positions == 30 + max(kept)
    assert max(cache.lengths) > 128
    step = torch.randint(0, 97, (3, 2))
    together = m.next_logits(step, cache)
    for row, text in enumerate(texts):
        alone = m.next_logits(torch.tensor([text + step[row].tolist()]), m.new_cache(1))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_cannot_be_kept_is_refused() -> None:
    m = model(prefill_chunk=64)
    cache = m.new_cache(2)
    m.next_logits(torch.randint(0, 97, (2, 10)), cache)
    mark = cache.mark()
    m.next_logits(torch.randint(0, 97, (2, 190)), cache)
    with pytest.raises(ValueError, match="tokens: expected 0 to 190 in row 1, got 191"):
        cache.keep_after(mark, [190, 191])
    with pytest.raises(ValueError, match="tokens: expected 0 to 190 in row 0, got -1"):
        cache.keep_after(mark, [-1, 5])
    # 200 tokens in 128 slots: those before the last 128 are gone, and a window reaches 39 back.
    with pytest.raises(ValueError, match="row 1 of a sliding-window layer can be cut back to 111"):
        cache.keep_after(mark, [190, 200 - 128 + WINDOW - 1 - 10 - 1])
    assert cache.lengths == [200, 200], "a refusal changes nothing"
    cache.keep_after(mark, [190, 200 - 128 + WINDOW - 1 - 10])
    assert cache.lengths == [200, 111]


@torch.no_grad()
def test_ragged_rows_are_cropped_and_survive_a_failed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    cache = m.new_cache(3)
    ids = torch.randint(0, 97, (3, 12))
    m.next_logits(ids[:, :4], cache)
    mark = cache.mark()
    m.next_logits(ids[:, 4:], cache)
    cache.keep_after(mark, [8, 0, 3])
    monkeypatch.setattr(m.model.layers[1].mlp, "forward", None)
    with pytest.raises(TypeError):
        m.next_logits(ids[:, :1], cache)
    monkeypatch.undo()
    assert cache.lengths == [12, 4, 7]
    assert cache.get_seq_length() == 12
    cache.crop(9)
    assert cache.lengths == [9, 4, 7]
    cache.crop(5)
    assert cache.lengths == [5, 4, 5]
    logits = m.next_logits(ids[:, :1], cache)
    for row, length in enumerate([5, 4, 5]):
        text = torch.cat((ids[row, :length], ids[row, :1]))[None]
        alone = m.next_logits(text, m.new_cache(1))
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-4)


def test_columns_and_lengths_of_blocks() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    blocks: list[Block | Ragged] = [Block(2, mask), Ragged((0, 3)), Block(2, None)]
    assert row_lengths(blocks, 2) == [1 + 0 + 2, 2 + 3 + 2]
    assert [row_lengths(first_columns(blocks, n), 2) for n in range(8)] == [
        [0, 0],
        [0, 1],
        [1, 2],
        [1, 3],
        [1, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
