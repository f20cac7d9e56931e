"""Gradients in float64, written out for numpy: what the backward kernels are judged by.

tests/test_backward_oracles.py holds them against autograd. Besides each gradient comes its
magnitude, the size of the largest intermediate value behind each element: `numeric.assert_close`
allows for the arithmetic's share of that where terms cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from oracles import Array, to_float64


class Gradient(NamedTuple):
    """Of one input, with its magnitude, both of the input's shape."""

    value: Array
    magnitude: Array


def silu_and_mul(grad: object, gate: object, up: object) -> tuple[Gradient, Gradient]:
    """Of gate and up, for the gradient of ``silu(gate) * up``."""
    dy, g, u = map(to_float64, (grad, gate, up))
    with np.errstate(over="ignore", invalid="ignore"):
        # exp(-|g|) underflows only where no result of any dtype is left.
        decay = np.exp(-np.abs(g))
        sigmoid = np.where(g >= 0, 1.0, decay) / (1.0 + decay)
        rest = np.where(g >= 0, decay, 1.0) / (1.0 + decay)
        scale = dy * u * sigmoid
        of_gate = Gradient(scale * (1.0 + g * rest), np.abs(scale) * (1.0 + np.abs(g) * rest))
        of_up = dy * g * sigmoid
        return of_gate, Gradient(of_up, np.abs(of_up))


def rms_norm(
    grad: object, x: object, weight: object, eps: float, grad_residual: object | None = None
) -> tuple[Gradient, Gradient]:
    """Of x ``[..., hidden]`` and weight, with what comes past the norm (add_rms_norm) added."""
    values = to_float64(x)
    rows = (-1, 1, values.shape[-1])
    of_x, of_weight = norm_rope(
        to_float64(grad).reshape(rows), values.reshape(rows), weight, None, None, None, eps
    )
    assert of_weight is not None
    value, magnitude = (part.reshape(values.shape) for part in of_x)
    if grad_residual is not None:
        past = to_float64(grad_residual)
        with np.errstate(invalid="ignore"):
            value, magnitude = value + past, magnitude + np.abs(past)
    return Gradient(value, magnitude), of_weight


def norm_rope(
    grad: object,
    x: object | None,
    weight: object | None,
    cos: object | None,
    sin: object | None,
    positions: object | None,
    eps: float,
) -> tuple[Gradient, Gradient | None]:
    """Of x ``[num_tokens, heads, head_dim]`` and of weight (None without one), for the q or the k
    of qk_norm_rope; x is not looked at without a weight. Positions are clamped to the tables."""
    g = to_float64(grad)
    size = np.abs(g)
    if cos is not None and sin is not None:
        c, s = to_float64(cos), to_float64(sin)
        rows = np.clip(np.asarray(positions, dtype=np.int64), 0, len(c) - 1)
        c, s = c[rows][:, None], s[rows][:, None]
        half = g.shape[-1] // 2
        first, second = g[..., :half], g[..., half:]
        g = np.concatenate([first * c + second * s, second * c - first * s], axis=-1)
        length = np.hypot(first, second)
        size = np.concatenate([length, length], axis=-1)
    if weight is None:
        return Gradient(g, size), None
    values, w = to_float64(x), to_float64(weight)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = 1.0 / np.sqrt(np.square(values).mean(-1, keepdims=True) + eps)
        normed = values * inverse
        along = (g * w * normed).mean(-1, keepdims=True)
        of_x = inverse * (g * w - normed * along)
        around = (size * np.abs(w * normed)).mean(-1, keepdims=True)
        magnitude = inverse * (size * np.abs(w) + np.abs(normed) * around)
        of_weight = (g * normed).sum((0, 1))
        return Gradient(of_x, magnitude), Gradient(of_weight, (size * np.abs(normed)).sum((0, 1)))
