"""Values from which the output of an attention kernel tells exactly which keys each query saw.

With keys of zeros every visible key weighs the same, 1 / n of n keys, and n is exp(lse). The value
of key c is 2^(c // head_dim) in column c % head_dim and zero elsewhere, so column d of n times the
output is a number whose bits are the visible ones among the keys d, d + head_dim, ... One head and
one call reveal 6 * head_dim keys in bfloat16 and 9 * head_dim in float16.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

CHUNKS = {torch.bfloat16: 6, torch.float16: 9}

Seen = npt.NDArray[np.bool_]


def values(codes: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`[keys, 1, head_dim]`: the value of the key of each code."""
    assert not (codes >= CHUNKS[dtype] * head_dim).any(), "more keys than the dtype can tell apart"
    result = torch.zeros(codes.numel(), 1, head_dim)
    result[torch.arange(codes.numel()), 0, codes % head_dim] = 2.0 ** (codes // head_dim)
    return result.to(dtype)


def seen(out: torch.Tensor, lse: torch.Tensor, codes: int) -> Seen:
    """`[rows, codes]`: which codes the queries of `out [rows, head_dim]`, `lse [rows]` saw."""
    head_dim = out.shape[1]
    number = np.exp(lse.double().numpy())
    count = np.rint(number)
    assert (np.abs(number - count) <= 1e-4 * count).all(), "lse is not the log of a number of keys"
    sums = out.double().numpy() * count[:, None]
    bits = np.rint(sums)
    assert (np.abs(sums - bits) < 0.4).all(), "the output is no mean of values"  # NaN fails too
    planes = bits.astype(np.int64)[:, None, :] >> np.arange(-(-codes // head_dim))[None, :, None]
    result = (planes & 1).astype(bool).reshape(len(out), planes.shape[1] * head_dim)
    assert (result.sum(1) == count).all(), "a key was counted more than once, or one of no code"
    return result[:, :codes]
