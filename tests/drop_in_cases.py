"""What people do with a transformers model, as functions of the model: each returns a result to
compare between the plain model and one that runs on our kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_models
import tiny_vision
import torch
import transformers
from torch import Tensor

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "hidden_size": 96},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 5, "sliding_window_pattern": 4},
}
NEW_TOKENS = 14


def build(family: str, seed: int = 3, **overrides: Any) -> transformers.PreTrainedModel:
    """An fp32 model of a family on SDPA, windows shorter than the prompts."""
    options = {**FAMILIES[family], "pad_token_id": 0, **overrides}
    model = tiny_models.build(family, seed, **options)
    model.set_attn_implementation("sdpa")
    return model


def build_vision_language(seed: int = 3) -> transformers.PreTrainedModel:
    """EXAONE 4.5, as :func:`build`."""
    model = tiny_vision.build({"pad_token_id": 0}, seed=seed)
    model.set_attn_implementation("sdpa")
    return model


def prompts(model: transformers.PreTrainedModel, batch: int = 2, length: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(length * 7 + batch)
    first = 1 + max(tiny_vision.IMAGE, tiny_vision.VIDEO)  # ids of text alone
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(first, vocab_size, (batch, length), generator=generator)


def left_padding(ids: Tensor) -> Tensor:
    """Row 0 has 4 columns of padding, row 1 none, row 2 all but one."""
    mask = torch.ones_like(ids)
    for row, columns in enumerate((4, 0, ids.shape[1] - 1)[: ids.shape[0]]):
        mask[row, :columns] = 0
    return mask


def logits(model: Any) -> Tensor:
    return model(prompts(model)).logits


def hidden_states(model: Any) -> Tensor:
    return torch.stack(model(prompts(model), output_hidden_states=True).hidden_states)


def left_padded(model: Any) -> Tensor:
    ids = prompts(model, batch=3)
    mask = left_padding(ids)
    return model(ids, attention_mask=mask).logits[mask.bool()]


def right_padded(model: Any) -> Tensor:
    ids = prompts(model)
    mask = left_padding(ids).flip(1)
    return model(ids, attention_mask=mask).logits[mask.bool()]


def holes(model: Any) -> Tensor:
    ids = prompts(model)
    mask = torch.ones_like(ids)
    mask[0, 3:6] = 0
    return model(ids, attention_mask=mask).logits[mask.bool()]


def packed(model: Any) -> Tensor:
    """Three sequences in one row, told apart by their positions."""
    ids = prompts(model, batch=1, length=17)
    positions = torch.cat([torch.arange(n) for n in (5, 9, 3)])[None]
    return model(ids, position_ids=positions, use_cache=False).logits


def own_mask(model: Any) -> Tensor:
    """A mask with four dimensions from the caller: columns 2 and 3 are nobody's business."""
    ids = prompts(model)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[4:, 2:4] = False
    minus = torch.finfo(torch.float32).min
    floats = torch.zeros(2, 1, 11, 11).masked_fill(~mask, minus)
    if len(set(getattr(model.config.get_text_config(), "layer_types", None) or [0])) > 1:
        floats = dict.fromkeys(model.config.get_text_config().layer_types, floats)
    return model(ids, attention_mask=floats).logits


def embeds(model: Any) -> Tensor:
    return model(inputs_embeds=model.get_input_embeddings()(prompts(model))).logits


def chunked(model: Any) -> Tensor:
    """A prompt in pieces of several lengths, then single tokens, on one cache."""
    ids, cache, parts = (
        prompts(model, length=25),
        transformers.DynamicCache(config=model.config),
        [],
    )
    for start, stop in ((0, 3), (3, 4), (4, 13), (13, 22), (22, 23), (23, 25)):
        parts.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, 1)


def static_cache(model: Any) -> Tensor:
    ids, cache = prompts(model, length=21), transformers.StaticCache(model.config, max_cache_len=40)
    parts = [model(ids[:, :9], past_key_values=cache).logits]
    for at in range(9, 21):
        parts.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1)


def bare_attention_weights(model: Any) -> Tensor:
    """A batch of one, whose mask transformers likes to drop."""
    ids = prompts(model, batch=1)
    return model(ids, attention_mask=torch.ones_like(ids)).logits


def _generate(**options: Any) -> Callable[[Any], Tensor]:
    def call(model: Any) -> Tensor:
        ids = prompts(model, batch=options.get("batch", 2))
        choices = {k: v for k, v in options.items() if k not in ("batch", "pad")}
        if options.get("pad"):
            choices["attention_mask"] = left_padding(ids)
        return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **choices)

    return call


def continued(model: Any) -> Tensor:
    """A second turn on the cache of the first."""
    ids = prompts(model)
    first = model.generate(
        ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    more = torch.cat([first.sequences, prompts(model, length=4)], 1)
    return model.generate(
        more, past_key_values=first.past_key_values, max_new_tokens=8, do_sample=False
    )


def assisted(model: Any) -> Tensor:
    """Speculation by a smaller model of the same vocabulary."""
    helper = tiny_models.build("llama", 5, pad_token_id=0, num_hidden_layers=1)
    return model.generate(
        prompts(model, batch=1), max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=helper
    )


# Logits or hidden states, compared within a tolerance.
FORWARDS: dict[str, Callable[[Any], Tensor]] = {
    function.__name__: function
    for function in (
        logits,
        hidden_states,
        left_padded,
        right_padded,
        holes,
        packed,
        own_mask,
        embeds,
        chunked,
        static_cache,
        bare_attention_weights,
    )
}
# Token ids, compared exactly.
GENERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "greedy": _generate(),
    "greedy, left padded": _generate(pad=True),
    "static cache": _generate(cache_implementation="static"),
    "static cache, left padded": _generate(cache_implementation="static", pad=True),
    "beams": _generate(num_beams=3),
    "beams, left padded": _generate(num_beams=2, pad=True),
    # With an end, which transformers 5.8 needs here.
    "prompt lookup": _generate(batch=1, prompt_lookup_num_tokens=3, eos_token_id=96),
    "no cache": _generate(use_cache=False),
    "continued": continued,
    "assisted": assisted,
}


def close(result: Tensor, expected: Tensor) -> None:
    """Within the rule of fp32 models: 2e-5 of the largest value."""
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()
    error = float((result - expected).abs().max())
    limit = 2e-5 * float(expected.abs().max())
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"
