"""``attn_implementation="exafuse"``: our attention in any transformers model.

:func:`register` adds an attention function and its mask function under the same name. The mask
function answers with a :class:`CompactMask`; a mask that is none (packed sequences, holes, masks of
the caller's own, overlays) stays explicit, and that call runs on torch's SDPA, which one warning
says.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from exafuse import ops
from exafuse.integrations.compact_mask import CompactMask, same_function

NAME = "exafuse"
MAX_HEAD_DIM = 128  # of the kernels; a multiple of 8

_log = logging.getLogger("exafuse")
_said: set[str] = set()


def register() -> str:
    """Make ``attn_implementation="exafuse"`` known to transformers, in this process.

    Returns:
        The name, for ``from_pretrained(..., attn_implementation=exafuse_name)`` and
        ``model.set_attn_implementation(exafuse_name)``. Calling again changes nothing.

    Raises:
        ImportError: transformers is not installed, or older than 5.8.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            f"exafuse needs transformers >= 5.8 for this: pip install 'transformers>=5.8' ({error})"
        ) from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    backend: ModuleType | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers.

    Args:
        module: the attention layer; ``is_causal`` is read from it where the call does not say.
        query: ``[batch, num_heads, seqlen_q, head_dim]``, any strides.
        key, value: ``[batch, num_kv_heads, seqlen_k, head_dim]``, after the cache.
        attention_mask: a packed :class:`CompactMask`, an explicit mask, or None.
        scaling: softmax scale; None = ``head_dim ** -0.5``.
        dropout: only 0 runs on the kernels.
        sliding_window: where no mask says it: keys that a query sees, itself included.
        backend: the ops to run on; default :mod:`exafuse.ops`.
        kwargs: ``cu_seq_lens_q/k`` and ``max_length_q/k`` describe packed sequences; everything
            else that changes the result is refused.

    Returns:
        ``[batch, seqlen_q, num_heads, head_dim]`` and None: weights are never formed.

    Raises:
        ValueError: softcap, attention sinks, a position bias or a paged cache is asked for.
    """
    backend = backend or ops
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: attn_implementation={NAME!r} has no such attention; load the model with "
                'attn_implementation="eager"'
            )
    if kwargs.get("output_attentions"):
        say_once('attention weights are never formed: use attn_implementation="eager" for them')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = CompactMask.unpack(attention_mask)
    if attention_mask is None:
        mask = CompactMask(causal, sliding_window)
    query, key, value = _autocast(query, key, value)
    reason = _why_not(query, key, value, dropout, mask)
    if reason:
        say_once(f"this attention runs on torch's SDPA: {reason}")
        if mask is not None:
            attention_mask = mask.explicit(query.shape[2], key.shape[2], query.device)
        return _sdpa(module, query, key, value, attention_mask, scaling, dropout, causal)
    assert mask is not None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"softmax_scale": scaling, "window_size": mask.window_size}
    if kwargs.get("cu_seq_lens_q") is not None:
        starts_q, starts_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        longest_q, longest_k = int(kwargs["max_length_q"]), int(kwargs["max_length_k"])
        packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out = backend.flash_attn_varlen_func(
            *packed, starts_q, starts_k, longest_q, longest_k, **options
        )
        return out.view(q.shape), None
    if mask.lengths is None:
        return backend.flash_attn_func(q, k, v, **options), None
    return (
        backend.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=mask.lengths, cache_leftpad=mask.first, **options
        ),
        None,
    )


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """A mask function of transformers; arguments as its ``sdpa_mask``.

    Returns:
        A packed :class:`CompactMask` where a window, a causal bound and padding at one end say it
        all, else an explicit mask.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    plain = bool(kwargs.get("allow_is_causal_skip"))
    kind = _kind(mask_function, local_size, plain, kwargs.get("config"))
    if kind is not None:
        causal, window = kind
        padding = None
        if attention_mask is not None:
            padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        last = q_offset - kv_offset + q_length if causal else kv_length  # slots that hold keys
        only_new_keys = causal and q_length == kv_length
        bounds = _bounds(batch_size, last, kv_length, padding, only_new_keys, device)
        if bounds is not None:
            return CompactMask(causal, window, *bounds).pack(batch_size, device)
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    explicit: Tensor = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        device=device,
        **kwargs,
    )
    return explicit


def _kind(
    mask_function: Any, local_size: int | None, plain: bool, config: Any
) -> tuple[bool, int | None] | None:
    """``(causal, window)`` of a mask function that is nothing more than these.

    ``plain``: transformers says that nothing was joined to a window or to chunks of that size.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sliding_window_causal_mask_function,
    )

    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    if local_size and torch.compiler.is_compiling():  # compilers cannot look into functions
        is_window = getattr(config, "sliding_window", None) == local_size
        is_chunk = getattr(config, "attention_chunk_size", None) is not None
        return (True, local_size) if plain and is_window and not is_chunk else None
    if local_size and same_function(mask_function, sliding_window_causal_mask_function(local_size)):
        return True, local_size
    return None


def _bounds(
    batch_size: int,
    last: int | Tensor,
    kv_length: int,
    padding: Tensor | None,
    only_new_keys: bool,
    device: torch.device | str,
) -> tuple[Tensor | None, Tensor | None] | None:
    """``(lengths, first)`` of :class:`CompactMask`; None where padding is not at one end."""
    if padding is not None:
        if torch.compiler.is_compiling():  # its values decide, and nobody may look at them
            return None
        if bool(padding.all()) and padding.shape[1] == kv_length:
            padding = None
    if padding is None and isinstance(last, int) and last == kv_length:
        return None, None
    # Filled on the device: a copy from the host has no place in a captured graph.
    lengths = torch.full((batch_size,), 1, dtype=torch.int64, device=device) * last
    if padding is None:
        return lengths, torch.zeros_like(lengths)
    slots = torch.arange(padding.shape[1], device=padding.device)
    first = padding.int().argmax(1)
    end = padding.shape[1] - padding.flip(1).int().argmax(1)
    empty = ~padding.any(1)
    run = (slots >= first[:, None]) & (slots < end[:, None])
    # Padding behind the last token is seen by padding alone where all keys are of this call;
    # otherwise the last token must be the last key.
    at_end = torch.ones_like(empty) if only_new_keys else end == lengths.clamp(max=kv_length)
    if not bool((((run == padding).all(1) & at_end) | empty).all()):
        return None
    return lengths, torch.where(empty, lengths, first)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, q, k and v in its dtype: RoPE may have made some of them fp32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, mask: CompactMask | None
) -> str:
    """Why the kernels cannot run this call; empty if they can."""
    head_dim = query.shape[-1]
    if mask is None:
        return "the mask is more than a window with padding at one end"
    if dropout > 0:
        return f"dropout={dropout}"
    if head_dim != value.shape[-1] or head_dim % 8 or head_dim > MAX_HEAD_DIM:
        return (
            f"head_dim {head_dim} of the keys, {value.shape[-1]} of the values; kernels take "
            f"equal ones, a multiple of 8 up to {MAX_HEAD_DIM}"
        )
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if needs_grad and mask.lengths is not None:
        return "gradients over a padded batch or a static cache"
    return ""


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal
    )
    return out, None


def say_once(message: str) -> None:
    """Warn of this once in the life of the process."""
    # A compiled graph cannot speak; the same call without compilation does.
    if not torch.compiler.is_compiling() and message not in _said:
        _said.add(message)
        _log.warning("%s", message)
