"""Rotary tables against transformers' own module, bit for bit, and what depends on the call."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers
from exafuse.config import RopeConfig, load_config
from exafuse.rotary import RotaryState, RotaryTable, attention_factor, rope_frequencies
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def config_of(rope: dict[str, Any], head_dim: int, max_positions: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 4 * head_dim,
        "num_attention_heads": 4,
        "max_position_embeddings": max_positions,
        "rope_parameters": dict(rope),
    }


class Pair:
    """One rotation twice: our table with one conversation's state, and transformers' module."""

    def __init__(self, rope: dict[str, Any], head_dim: int, max_positions: int) -> None:
        values = config_of(rope, head_dim, max_positions)
        config = load_config(values)
        self.config = config.rope
        self.table = RotaryTable(config.rope, head_dim, max_positions)
        self.state = RotaryState()
        del values["model_type"]
        self.module = LlamaRotaryEmbedding(transformers.LlamaConfig(**values))
        if rope["rope_type"] == "dynamic":
            self._skip_if_growth_is_forgotten()

    def _skip_if_growth_is_forgotten(self) -> None:
        probe = copy.deepcopy(self.module)
        probe(torch.zeros(1), torch.arange(probe.original_max_seq_len + 1)[None])
        if probe.max_seq_len_cached == probe.original_max_seq_len:
            version = transformers.__version__
            pytest.skip(f"transformers {version} forgets how far a dynamic RoPE has grown")

    def assert_equal(self, positions: torch.Tensor) -> None:
        """cos and sin at int64 ``positions [n]``, which are one call, agree in every bit."""
        cos, sin = self.table(int(positions.max()) + 1, "cpu", self.state)
        theirs_cos, theirs_sin = self.module(torch.zeros(1), positions[None])
        half = cos.shape[1]
        assert cos.dtype == sin.dtype == torch.float32
        assert torch.equal(cos[positions], theirs_cos[0, :, :half])
        assert torch.equal(sin[positions], theirs_sin[0, :, :half])

    def frequencies(self) -> torch.Tensor:
        """What transformers rotates with after its last call."""
        return self.module.inv_freq


def random_rope(rng: random.Random, kind: str, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": kind}
    rope["rope_theta"] = rng.choice([1e4, 5e5, 1e6, rng.uniform(100, 1e7)])
    if kind != "default":
        rope["factor"] = rng.choice([1.0, rng.uniform(1, 40)])
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = rng.choice([32, 64, 100, 8192])
    optional: dict[str, Any] = {}
    if kind == "llama3":
        rope |= {"low_freq_factor": rng.uniform(0.5, 2), "high_freq_factor": rng.uniform(2.5, 8)}
    elif kind == "yarn":
        optional = {
            "mscale": rng.uniform(0.1, 2),
            "mscale_all_dim": rng.uniform(0.1, 2),
            "attention_factor": rng.uniform(0.5, 2),
            "beta_fast": rng.uniform(8, 64),
            "beta_slow": rng.uniform(0.1, 4),
            "truncate": rng.random() < 0.5,
        }
        rope["factor"] = rng.choice([rope["factor"], None])
    elif kind == "longrope":
        rope["short_factor"] = [rng.uniform(1, 2) for _ in range(head_dim // 2)]
        rope["long_factor"] = [rng.uniform(1, 60) for _ in range(head_dim // 2)]
        optional = {"attention_factor": rng.uniform(0.5, 2)}
        if rng.random() < 0.5:
            del rope["factor"]
    return rope | {key: value for key, value in optional.items() if rng.random() < 0.4}


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", TYPES)
def test_rotary_equals_transformers(kind: str, seed: int) -> None:
    """Random parameters; five calls of one conversation, shorter and longer than the context."""
    rng = random.Random(f"{kind}-{seed}")
    head_dim = rng.choice([4, 8, 16, 24, 64, 80, 96, 128])
    max_positions = rng.choice([64, 256, 2048])
    pair = Pair(random_rope(rng, kind, head_dim), head_dim, max_positions)
    for _ in range(5):
        pair.assert_equal(torch.arange(rng.randint(1, 2 * max_positions)))


@pytest.mark.parametrize("kind", TYPES)
def test_rotary_equals_transformers_to_131072(kind: str) -> None:
    rope = random_rope(random.Random(7), kind, 64)
    positions = torch.cat([torch.arange(0, 131072, 61), torch.arange(131000, 131072)])
    for max_positions in (131072, 4096):
        Pair(rope, 64, max_positions).assert_equal(positions)


@pytest.mark.parametrize(("theta", "original"), [(100.0, 10**6), (1e4, 8), (2.0, 64)])
def test_yarn_ramp_ends_at_the_edges_of_the_head(theta: float, original: int) -> None:
    """Pairs that turn 1 and 32 times within the original context may lie outside the head."""
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0}
    pair = Pair({**rope, "original_max_position_embeddings": original}, 32, 256)
    pair.assert_equal(torch.arange(256))


def test_llama3_of_exaone() -> None:
    """EXAONE 4: of 64 pairs 27 keep their frequency, 7 are smoothed, 30 are divided by 16."""
    rope = RopeConfig(
        rope_type="llama3",
        theta=1e6,
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = rope_frequencies(RopeConfig(theta=1e6), 128, 131072)
    scaled = rope_frequencies(rope, 128, 131072)
    kept = int((scaled == plain).sum())
    divided = int((scaled == plain / 16).sum())
    assert (kept, 64 - kept - divided, divided) == (27, 7, 30)
    assert attention_factor(rope, 131072) == 1.0


def test_dynamic_grows_and_resets() -> None:
    """The base grows with the longest call, stays at the context length, resets below it."""
    pair = Pair({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 16, 32)
    original = rope_frequencies(pair.config, 16, 32)
    calls = ((32, 0), (33, 33), (40, 40), (36, 40), (32, 40), (31, 0), (33, 33), (20, 0), (32, 0))
    for length, stretched in calls:
        pair.assert_equal(torch.arange(length))
        expected = rope_frequencies(pair.config, 16, 32, stretched) if stretched else original
        assert torch.equal(pair.frequencies(), expected)


def test_dynamic_decodes_step_by_step_like_transformers() -> None:
    pair = Pair({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}, 16, 32)
    pair.assert_equal(torch.arange(30))
    for position in range(30, 45):
        pair.assert_equal(torch.tensor([position]))


def test_dynamic_state_belongs_to_the_conversation() -> None:
    """Two conversations on one model do not stretch each other."""
    rope = RopeConfig(rope_type="dynamic", factor=2.0)
    table = RotaryTable(rope, 16, 32)
    long, short = RotaryState(), RotaryState()
    stretched = table(40, "cpu", long)[0]
    assert torch.equal(table(33, "cpu", short)[0], table(33, "cpu", None)[0])
    assert not torch.equal(table(33, "cpu", short)[0][:33], stretched[:33])
    assert torch.equal(table(33, "cpu", long)[0], stretched)


def test_longrope_is_chosen_by_the_call() -> None:
    """Up to the original length short factors, beyond it long ones for all rows, and back again."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    pair = Pair({**rope, **factors}, 16, 256)
    short, long = (rope_frequencies(pair.config, 16, 256, n) for n in (64, 65))
    assert torch.equal(long, short / 4)
    for length, expected in ((64, short), (65, long), (5, short), (200, long), (64, short)):
        pair.assert_equal(torch.arange(length))
        assert torch.equal(pair.frequencies(), expected)
    # one long row decides for the whole batch: the table goes by the largest position
    pair.assert_equal(torch.tensor([0, 1, 2, 100]))


def test_yarn_mscale_alone_is_ignored() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "theta": 1e4}
    plain = RopeConfig(**rope, original_max_position_embeddings=64)
    alone = RopeConfig(**rope, original_max_position_embeddings=64, mscale=0.5)
    both = RopeConfig(**rope, original_max_position_embeddings=64, mscale=0.5, mscale_all_dim=0.5)
    assert attention_factor(alone, 256) == attention_factor(plain, 256) != 1.0
    assert attention_factor(both, 256) == 1.0


def test_table_grows_by_doubling_up_to_the_context() -> None:
    table = RotaryTable(RopeConfig(), 8, 3000)
    rows = [table(n, "cpu", None)[0].shape[0] for n in (1, 256, 257, 512, 1025, 2049, 2, 5000)]
    assert rows == [256, 256, 512, 512, 1025, 2050, 2050, 5000]
    first = table(3000, "cpu", None)
    assert table(17, torch.device("cpu"), RotaryState())[0] is first[0]
    assert RotaryTable(RopeConfig(), 8, 16)(1, "cpu", None)[0].shape == (16, 4)


def test_short_longrope_table_ends_at_the_original_length() -> None:
    rope = RopeConfig(
        rope_type="longrope",
        short_factor=(1.0,) * 4,
        long_factor=(2.0,) * 4,
        original_max_position_embeddings=64,
    )
    table = RotaryTable(rope, 8, 1000)
    assert table(3, "cpu", None)[0].shape[0] == 64
    assert table(65, "cpu", None)[0].shape[0] == 256


def test_tables_made_under_inference_mode_can_train() -> None:
    table = RotaryTable(RopeConfig(), 8, 64)
    with torch.inference_mode():
        cos, _ = table(4, "cpu", None)
    assert not cos.is_inference()
    x = torch.ones(4, 4, requires_grad=True)
    (x * cos[:4]).sum().backward()
    assert torch.equal(x.grad, cos[:4])


def test_table_ignores_the_default_dtype() -> None:
    rope = RopeConfig(rope_type="dynamic", factor=2.0)
    expected = RotaryTable(rope, 16, 32)(40, "cpu", None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = RotaryTable(rope, 16, 32)(40, "cpu", None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_positions: expected at least 1, got 0"):
        RotaryTable(RopeConfig(), 8, 64)(0, "cpu", None)
    with pytest.raises(ValueError, match="expected factor"):
        RotaryTable(RopeConfig(rope_type="linear"), 8, 64)(1, "cpu", None)
