"""attn_implementation="exafuse" in transformers models, against their own attention."""

from __future__ import annotations

import logging
from typing import Any

import drop_in_cases
import pytest
import torch
import transformers
from exafuse import ops
from exafuse.integrations import transformers as integration
from exafuse.integrations.compact_mask import CompactMask, same_function
from transformers import masking_utils

FAMILIES = list(drop_in_cases.FAMILIES)
# Those whose mask says more than a window with padding at one end.
EXPLICIT = {"holes", "packed", "own_mask"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return drop_in_cases.build(request.param)


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()
    integration._said.clear()


def both(model: Any, call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The result with our attention, and with transformers' eager one."""
    results = []
    for name in (integration.NAME, "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(call(model))
    return results[0], results[1]


@pytest.mark.parametrize("name", list(drop_in_cases.FORWARDS))
def test_logits_equal_those_of_eager_attention(
    model: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "exafuse"):
        ours, eager = both(model, drop_in_cases.FORWARDS[name])
    drop_in_cases.close(ours, eager)
    warnings = [r for r in caplog.records if "SDPA" in r.message]
    assert len(warnings) == (name in EXPLICIT), "a fallback says so, once"


@pytest.mark.parametrize("name", list(drop_in_cases.GENERATIONS))
def test_greedy_tokens_equal_those_of_eager_attention(
    model: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "exafuse"):
        ours, eager = both(model, drop_in_cases.GENERATIONS[name])
    assert torch.equal(ours, eager)
    assert not [r for r in caplog.records if "SDPA" in r.message]


def test_the_name_is_taken_at_load(model: Any, tmp_path: Any) -> None:
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=integration.register())
    with torch.no_grad():
        drop_in_cases.close(drop_in_cases.logits(loaded), drop_in_cases.logits(model))


def test_gradients_equal_those_of_eager_attention(model: Any) -> None:
    ids = drop_in_cases.prompts(model)
    gradients = []
    for name in (integration.NAME, "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for ours, eager in zip(*gradients, strict=True):
        assert float((ours - eager).norm()) <= 2e-5 * float(eager.norm()) + 1e-9


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "cache"])
def test_what_would_change_the_result_is_refused(name: str) -> None:
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"{name}: .*eager"):
        integration.attention(torch.nn.Module(), q, q, q, None, **{name: torch.ones(1)})


@pytest.mark.parametrize("head_dim", [4, 20, 136])
def test_head_dims_without_a_kernel_run_on_sdpa(
    head_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = drop_in_cases.build("llama", head_dim=head_dim)
    with caplog.at_level(logging.WARNING, "exafuse"):
        ours, eager = both(model, drop_in_cases.FORWARDS["left_padded"])
    drop_in_cases.close(ours, eager)
    assert f"head_dim {head_dim}" in caplog.text


def test_dropout_runs_on_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    model = drop_in_cases.build("llama", attention_dropout=0.5).train()
    model.set_attn_implementation(integration.NAME)
    with caplog.at_level(logging.WARNING, "exafuse"), torch.no_grad():
        results = [drop_in_cases.logits(model) for _ in range(2)]
    assert "dropout=0.5" in caplog.text
    assert not torch.equal(*results), "dropout was left out"


def test_an_encoder_sees_both_sides_and_no_padding() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (3, 13))
    for mask in (drop_in_cases.left_padding(ids), drop_in_cases.left_padding(ids).flip(1)):
        ours, eager = both(
            model, lambda m, mask=mask: m(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        )
        drop_in_cases.close(ours, eager)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("bounded", [True, False])
def test_a_compact_mask_survives_its_tensor(
    causal: bool, window: int | None, bounded: bool
) -> None:
    bounds = (torch.tensor([5, 3]), torch.tensor([0, 1])) if bounded else (None, None)
    mask = CompactMask(causal, window, *bounds)
    packed = mask.pack(2, "cpu")
    assert packed.shape[0] == 2
    assert packed.ndim == 4
    read = CompactMask.unpack(packed)
    assert read is not None
    assert (read.causal, read.window) == (causal, window)
    for mine, theirs in zip(bounds, (read.lengths, read.first), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.tolist() == theirs.tolist()
    # By the definition, query by query and slot by slot.
    explicit = mask.explicit(2, 6, torch.device("cpu"))
    for row in range(explicit.shape[0]):
        length, first = (int(bounds[0][row]), int(bounds[1][row])) if bounded else (6, 0)
        for query in range(2):
            at = length - 2 + query
            for slot in range(6):
                seen = first <= slot < length
                seen &= not causal or slot <= at
                seen &= window is None or slot > at - window
                assert bool(explicit[row, 0, query, slot]) == seen


def test_ordinary_masks_are_not_taken_for_compact_ones() -> None:
    for mask in (
        torch.zeros(2, 1, 3, 3),
        torch.ones(2, 1, 3, 3, dtype=torch.bool),
        torch.ones(2, 3, dtype=torch.int32),
        None,
    ):
        assert CompactMask.unpack(mask) is None


def test_a_window_with_something_joined_to_it_is_no_plain_window() -> None:
    window = masking_utils.sliding_window_causal_mask_function
    assert same_function(window(4), window(4))
    assert not same_function(window(4), window(5))
    assert not same_function(window(4), masking_utils.causal_mask_function)
    joined = masking_utils.and_masks(window(4), lambda b, h, q, k: k != 2)
    assert not same_function(joined, window(4))
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    assert not same_function(chunked, window(4))


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("name", ["left_padded", "chunked", "static_cache"])
def test_bf16_runs_on_the_kernels(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to fp32 as transformers' own attention in bf16."""
    from kernel_backends import _emulated

    emulated = _emulated().ops
    call = drop_in_cases.FORWARDS[name]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        exact = call(model)
        half = drop_in_cases.build(model.config.model_type).bfloat16()
        plain = call(half).float()
        half.set_attn_implementation(integration.NAME)
        monkeypatch.setattr(integration.attention, "__kwdefaults__", {"backend": emulated, **{}})
        ours = call(half).float()
    assert emulated is not ops
    mine, theirs = (float((x - exact).norm() / exact.norm()) for x in (ours, plain))
    assert mine <= 1.25 * theirs, f"error {mine:.3e}, transformers {theirs:.3e}"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_rounds_as_little_as_transformers(model: Any, use_cache: bool, grad: bool) -> None:
    """RoPE makes q and k fp32 under autocast, v is not: attention runs in autocast's dtype."""
    ids = drop_in_cases.prompts(model)
    model.set_attn_implementation("eager")
    exact = model(ids).logits.detach()
    errors = []
    for name in (integration.NAME, "eager"):
        model.set_attn_implementation(name)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            logits = model(ids, use_cache=use_cache).logits.detach().float()
        errors.append(float((logits - exact).norm() / exact.norm()))
    assert errors[0] <= 1.5 * errors[1], errors


def test_an_int32_mask_of_the_caller_is_refused() -> None:
    q = torch.zeros(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"attention_mask: expected a bool.*int32 \(1, 1, 5, 5\)"):
        integration.attention(torch.nn.Module(), q, q, q, mask)


@pytest.mark.parametrize("window", [None, 2])
def test_without_a_mask_queries_stand_at_the_end_of_the_keys(window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, n, 8, generator=generator) for n in (3, 8, 8))
    out, _ = integration.attention(torch.nn.Module(), q, k, v, None, sliding_window=window)
    mask = CompactMask(True, window).explicit(3, 8, torch.device("cpu"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    drop_in_cases.close(out, expected.transpose(1, 2))
