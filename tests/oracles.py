"""Double-precision oracles of every op, written from the mathematical definitions.

Nothing here knows the kernels or ``exafuse.reference``: each function is the definition of the op,
evaluated in float64 on the inputs exactly as they are stored. Inputs may be torch tensors (any
dtype, any device) or numpy arrays; results are float64 numpy arrays that have *not* been rounded to
the tensor's dtype, except where the contract of an op fixes an intermediate rounding
(``add_rms_norm``).

Only numpy is imported, so that the oracles also serve runs without torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# (significand bits, smallest normal exponent, largest finite value) of the formats that the ops
# accept.
_FORMATS: dict[str, tuple[int, int, float]] = {
    "bfloat16": (8, -126, float.fromhex("0x1.fep127")),
    "float16": (11, -14, 65504.0),
    "float32": (24, -126, float.fromhex("0x1.fffffep127")),
}


def to_float64(x: object) -> Array:
    """The exact values of a torch tensor or a numpy array as float64."""
    if hasattr(x, "detach"):  # a torch tensor; numpy has no bfloat16, so torch widens it
        return x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.float64)


def dtype_name(x: object) -> str:
    """The dtype of a tensor or array by name, such as "bfloat16", without its library's prefix."""
    return str(x.dtype).removeprefix("torch.")  # type: ignore[attr-defined]


def ulp(x: npt.ArrayLike, dtype: str) -> Array:
    """Distance between neighbouring values of ``dtype`` near ``|x|``, subnormals too."""
    bits, min_exponent, _ = _FORMATS[dtype]
    magnitude = np.abs(np.asarray(x, dtype=np.float64))
    magnitude = np.where(np.isfinite(magnitude), magnitude, 0.0)
    exponent = np.frexp(magnitude)[1] - 1  # magnitude in [2^exponent, 2^(exponent + 1))
    exponent = np.where(magnitude == 0, min_exponent, np.maximum(exponent, min_exponent))
    return np.ldexp(1.0, exponent - (bits - 1))


def round_to(x: npt.ArrayLike, dtype: str) -> Array:
    """``x`` rounded once to ``dtype``: to nearest, ties to even, overflow to infinity."""
    values = np.asarray(x, dtype=np.float64)
    spacing = ulp(values, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.where(np.isfinite(values), np.rint(values / spacing) * spacing, values)
    overflow = np.isfinite(values) & (np.abs(rounded) > _FORMATS[dtype][2])
    return np.where(overflow, np.copysign(np.inf, values), rounded)


# --------------------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------------------


def rms_norm(x: object, weight: object | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; ``weight`` None = all ones."""
    values = to_float64(x)
    with np.errstate(invalid="ignore", over="ignore"):
        normed = values / np.sqrt(np.mean(values * values, axis=-1, keepdims=True) + eps)
        return normed if weight is None else normed * to_float64(weight)


def add_rms_norm(
    x: object, residual: object, weight: object, eps: float, dtype: str | None = None
) -> tuple[Array, Array]:
    """``(y, new_residual)``: the sum is rounded to the tensor's dtype, then that is normed."""
    with np.errstate(invalid="ignore"):
        total = to_float64(x) + to_float64(residual)
    new_residual = round_to(total, dtype or dtype_name(x))
    return rms_norm(new_residual, weight, eps), new_residual


def rms_norm_add(x: object, residual: object, weight: object, eps: float) -> Array:
    """residual + rms_norm(x): the norm is applied to ``x`` alone, before the addition."""
    with np.errstate(invalid="ignore"):
        return to_float64(residual) + rms_norm(x, weight, eps)


# --------------------------------------------------------------------------------------------------
# Rotary embedding
# --------------------------------------------------------------------------------------------------


def rotate(x: Array, cos: object, sin: object, positions: object) -> Array:
    """Rotation of ``x [num_tokens, heads, head_dim]``; dimension i pairs with i + head_dim / 2."""
    rows = np.asarray(positions if not hasattr(positions, "cpu") else positions.cpu())
    c = to_float64(cos)[rows][:, None, :]  # [num_tokens, 1, head_dim / 2]
    s = to_float64(sin)[rows][:, None, :]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    with np.errstate(invalid="ignore"):
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def apply_rope(
    q: object, k: object, cos: object, sin: object, positions: object
) -> tuple[Array, Array]:
    """``(q, k)`` rotated by the table row that ``positions`` names for each token."""
    return (
        rotate(to_float64(q), cos, sin, positions),
        rotate(to_float64(k), cos, sin, positions),
    )


def split_qkv(qkv: object, num_heads: int, num_kv_heads: int) -> tuple[Array, Array, Array]:
    """q, k, v as ``[num_tokens, heads, head_dim]`` from the packed tensor or a tuple of three."""
    if isinstance(qkv, tuple):
        q, k, v = (to_float64(part) for part in qkv)
    else:
        packed = to_float64(qkv)
        head_dim = packed.shape[1] // (num_heads + 2 * num_kv_heads)
        cuts = [num_heads * head_dim, (num_heads + num_kv_heads) * head_dim]
        q, k, v = np.split(packed, cuts, axis=1)
    tokens = q.shape[0]
    head_dim = q.shape[1] // num_heads
    return (
        q.reshape(tokens, num_heads, head_dim),
        k.reshape(tokens, num_kv_heads, head_dim),
        v.reshape(tokens, num_kv_heads, head_dim),
    )


def qk_norm_rope(
    qkv: object,
    num_heads: int,
    num_kv_heads: int,
    q_weight: object | None,
    k_weight: object | None,
    cos: object | None,
    sin: object | None,
    positions: object | None,
    eps: float,
) -> tuple[Array, Array, Array]:
    """Per-head RMSNorm of q and k (weights None = none), then RoPE (cos None = none); v as is."""
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    if cos is not None:
        q, k = rotate(q, cos, sin, positions), rotate(k, cos, sin, positions)
    return q, k, v


def cache_write(
    cache: object, rows: Array, slot_mapping: object
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """``(cache, written)``: ``rows [num_tokens, heads, head_dim]`` scattered into the cache.

    ``cache [rows, slots, heads, head_dim]``, ``written [rows, slots]``. An entry of
    ``slot_mapping`` is row * slots + slot within the row; negative or out of range means "not
    written".
    """
    result = to_float64(cache).copy()
    flat = result.reshape(-1, *result.shape[2:])
    written = np.zeros(flat.shape[0], dtype=bool)
    for token, slot in enumerate(np.asarray(slot_mapping).tolist()):
        if 0 <= slot < flat.shape[0]:
            flat[slot] = rows[token]
            written[slot] = True
    return flat.reshape(result.shape), written.reshape(result.shape[:2])


# --------------------------------------------------------------------------------------------------
# Activation
# --------------------------------------------------------------------------------------------------


def silu_and_mul(gate: object, up: object | None = None) -> Array:
    """gate * sigmoid(gate) * up; with ``up`` None the last dimension of ``gate`` holds gate, then
    up.

    sigmoid(-inf) is 0 and -inf * 0 is NaN, as IEEE arithmetic on the formula says.
    """
    g = to_float64(gate)
    if up is None:
        g, u = np.split(g, 2, axis=-1)
    else:
        u = to_float64(up)
    with np.errstate(invalid="ignore", over="ignore"):
        decay = np.exp(-np.abs(g))  # never overflows; the naive 1 / (1 + exp(-x)) does for x < -709
        sigmoid = np.where(g >= 0, 1.0, decay) / (1.0 + decay)
        return g * sigmoid * u


# --------------------------------------------------------------------------------------------------
# Attention with an explicit mask
# --------------------------------------------------------------------------------------------------


def attention_mask(
    seqlen_q: int, seqlen_k: int, causal: bool = False, window_size: tuple[int, int] = (-1, -1)
) -> npt.NDArray[np.bool_]:
    """``[seqlen_q, seqlen_k]``, true where the query sees the key.

    Bottom-right: the last query sits at the position of the last key. Query at position p sees key
    j iff p - left <= j <= p + right (a side of -1 is open); ``causal`` closes the right side at p.
    """
    left, right = window_size
    if causal:
        right = 0
    position = np.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    key = np.arange(seqlen_k)[None, :]
    visible = np.ones((seqlen_q, seqlen_k), dtype=bool)
    if left >= 0:
        visible &= key >= position - left
    if right >= 0:
        visible &= key <= position + right
    return visible


def attention(
    q: object, k: object, v: object, mask: npt.NDArray[np.bool_], softmax_scale: float | None = None
) -> tuple[Array, Array, Array]:
    """``(out, lse, norm)`` of one sequence: q ``[Tq, H, D]``, k and v ``[Tk, Hkv, D]``, mask ``[Tq,
    Tk]``.

    Query head h uses kv head h // (H / Hkv). A row that sees no key, or none with a score above
    -inf, gives 0 and lse -inf. Keys behind the mask never enter, whatever their bytes (NaN
    included). ``lse [H, Tq]``; ``norm [Tq, H, D]`` is sqrt(P^2 V^2 + out^2), the yardstick of the
    attention tolerance.
    """
    q64, k64, v64 = to_float64(q), to_float64(k), to_float64(v)
    num_heads, num_kv_heads = q64.shape[1], k64.shape[1]
    scale = q64.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    out = np.zeros(q64.shape)
    norm = np.zeros(q64.shape)
    lse = np.full((num_heads, q64.shape[0]), -np.inf)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        for row in range(q64.shape[0]):
            seen = np.flatnonzero(mask[row])
            if seen.size == 0:
                continue
            values = v64[seen, kv_head]
            with np.errstate(invalid="ignore", over="ignore"):
                scores = (k64[seen, kv_head] @ q64[row, head]) * scale
                top = scores.max()
                # No score above -inf: every weight is 0, as if it saw nothing.
                weights = np.zeros(seen.size) if top == -np.inf else np.exp(scores - top)
                total = weights.sum()
                p = weights if top == -np.inf else weights / total
                out[row, head] = p @ values
                norm[row, head] = np.sqrt((p * p) @ (values * values) + out[row, head] ** 2)
                lse[head, row] = top if top == -np.inf else top + np.log(total)
    return out, lse, norm
