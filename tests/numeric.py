"""Judges that compare a kernel's output with a float64 oracle, element by element and row by row.

Every judge compares all elements, looks at the pattern of NaN and infinity first, and on failure
raises an AssertionError that names the worst position, both values, the size of the error in ulps
and the share of wrong elements. Tolerances are fixed per op and dtype; no test picks its own.

Only numpy is imported; torch tensors are accepted wherever an array is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from oracles import Array, dtype_name, round_to, to_float64, ulp

# Relative L2 error of one row, for rows long enough that rounding errors average out.
ROW_TOLERANCE = {"bfloat16": 2.0e-3, "float16": 2.6e-4, "float32": 1.0e-6}
ROW_MINIMUM = 256

# What the arithmetic inside a kernel may add to the one rounding of its output, relative to the
# largest intermediate value: 16-bit tensors are computed in fp32, fp32 tensors in fp64.
COMPUTE_NOISE = {"bfloat16": 2.0**-21, "float16": 2.0**-21, "float32": 2.0**-44}

# Attention: normalised row error and the factor for short heads, whose rows scatter more.
ATTENTION_TOLERANCE = {"bfloat16": 2.6e-3, "float16": 3.5e-4, "float32": 2.0e-6}
SHORT_HEAD = 64
SHORT_HEAD_FACTOR = 1.6

_largest_errors: dict[str, float] = {}


def largest_errors() -> dict[str, float]:
    """By dtype, the largest error in ulps that any judge of this process has seen so far.

    Of the correctly rounded value; for attention, ulps are those of the largest output of a case.
    """
    return dict(_largest_errors)


def _note(dtype: str, ulps: float) -> None:
    _largest_errors[dtype] = max(_largest_errors.get(dtype, 0.0), ulps)


def _where(index: int, shape: tuple[int, ...]) -> str:
    return str(tuple(int(i) for i in np.unravel_index(index, shape))) if shape else "()"


def _show(x: float) -> str:
    return f"{x:.9g} ({float(x).hex()})" if np.isfinite(x) else str(x)


def assert_same_special_values(actual: object, expected: object, label: str = "output") -> None:
    """NaN, +inf and -inf must stand at the same places in both."""
    a, e = to_float64(actual), to_float64(expected)
    assert a.shape == e.shape, f"{label}: expected shape {e.shape}, got {a.shape}"
    kinds = {"NaN": np.isnan, "+inf": np.isposinf, "-inf": np.isneginf}
    for kind, test in kinds.items():
        wrong = test(a) != test(e)
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            raise AssertionError(
                f"{label}: {kind} at the wrong places in {int(wrong.sum())} of {a.size} elements; "
                f"first at {_where(first, a.shape)}: got {_show(a.flat[first])}, expected "
                f"{_show(e.flat[first])}"
            )


def assert_bitwise_equal(actual: object, expected: object, label: str = "output") -> None:
    """Same dtype, same shape, same bytes (so -0.0 differs from 0.0, and NaN payloads count)."""
    a_bits, a_shape = _bits(actual)
    e_bits, e_shape = _bits(expected)
    assert dtype_name(actual) == dtype_name(expected), (
        f"{label}: expected dtype {dtype_name(expected)}, got {dtype_name(actual)}"
    )
    assert a_shape == e_shape, f"{label}: expected shape {e_shape}, got {a_shape}"
    wrong = a_bits != e_bits
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.size} elements differ in their bits; first at "
            f"{_where(first, a_shape)}: got {to_float64(actual).flat[first]:.9g} "
            f"(0x{int(a_bits.flat[first]):x}), expected {to_float64(expected).flat[first]:.9g} "
            f"(0x{int(e_bits.flat[first]):x})"
        )


def _bits(x: object) -> tuple[npt.NDArray[np.unsignedinteger], tuple[int, ...]]:
    """The elements of a tensor or array as unsigned integers of the same width."""
    if hasattr(x, "detach"):
        import torch

        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        array = x.detach().cpu().contiguous().view(integer).numpy()
    else:
        array = np.ascontiguousarray(x)
    return array.view(f"u{array.itemsize}"), tuple(array.shape)


def assert_close(
    actual: object,
    expected: npt.ArrayLike,
    *,
    magnitude: npt.ArrayLike | None = None,
    ulp_of: npt.ArrayLike | None = None,
    dtype: str | None = None,
    row_tolerance: float | None = None,
    correctly_rounded: float | None = 0.999,
    label: str = "output",
) -> None:
    """The rule of the memory-bound ops: ``actual`` is ``expected`` computed and rounded once.

    Every element lies within 1 ulp of the correctly rounded value, plus the noise of the arithmetic
    before the rounding: a share (COMPUTE_NOISE) of ``magnitude``, the size of the largest
    intermediate value behind that element. By default that is the value itself; ops that add two
    terms, which may cancel, pass the sum of their magnitudes. ``ulp_of`` replaces the value whose
    ulp counts (RoPE: the larger one of the rotated pair). ``correctly_rounded`` is the share of
    elements that must equal the oracle rounded once (None: not asked). Rows (last dimension) of at
    least 256 elements are also held to the relative L2 error of their dtype, each row for itself.
    """
    name = dtype or dtype_name(actual)
    e = np.asarray(expected, dtype=np.float64)
    a = to_float64(actual)
    rounded = round_to(e, name)
    assert_same_special_values(a, rounded, label)
    if a.size == 0:
        return
    finite = np.isfinite(rounded)
    e = np.where(finite, e, 0.0)
    a = np.where(finite, a, 0.0)
    rounded = np.where(finite, rounded, 0.0)
    size = np.abs(e) if magnitude is None else np.asarray(magnitude, dtype=np.float64)
    size = np.where(np.isfinite(size), size, 0.0)
    ulp_size = np.maximum(np.abs(e), np.abs(rounded)) if ulp_of is None else np.asarray(ulp_of)
    spacing = np.broadcast_to(ulp(ulp_size, name), e.shape)
    noise = COMPUTE_NOISE[name] * size
    _note(name, float((np.abs(a - rounded) / spacing).max()))
    _assert_elements(a, e, np.abs(a - rounded), spacing + noise, spacing, label)
    if correctly_rounded is not None:
        _assert_share_rounded(a, rounded, correctly_rounded, label)
    if a.ndim and a.shape[-1] >= ROW_MINIMUM:
        limit = ROW_TOLERANCE[name] if row_tolerance is None else row_tolerance
        _assert_rows(a, e, rounded, noise, limit, label)


def _assert_elements(
    a: Array, e: Array, error: Array, tolerance: Array, spacing: Array, label: str
) -> None:
    wrong = ~(error <= tolerance)
    if not wrong.any():
        return
    ratio = np.where(wrong, error / np.maximum(tolerance, np.finfo(float).tiny), 0.0)
    worst = int(np.argmax(ratio))
    first = int(np.flatnonzero(wrong)[0])
    raise AssertionError(
        f"{label}: {int(wrong.sum())} of {a.size} elements ({100 * wrong.mean():.3g} %) are off; "
        f"worst at {_where(worst, a.shape)}: got {_show(a.flat[worst])}, expected "
        f"{_show(e.flat[worst])}, error {error.flat[worst]:.3g} = "
        f"{error.flat[worst] / spacing.flat[worst]:.3g} ulp, allowed "
        f"{tolerance.flat[worst]:.3g}; first at {_where(first, a.shape)}: got "
        f"{_show(a.flat[first])}, expected {_show(e.flat[first])}"
    )


def _assert_share_rounded(a: Array, rounded: Array, share: float, label: str) -> None:
    missed = int((a != rounded).sum())
    mean = (1.0 - share) * a.size
    allowed = mean + 4.0 * np.sqrt(mean) + 2.0  # small tensors scatter: four deviations, and two
    assert missed <= allowed, (
        f"{label}: {missed} of {a.size} elements are not the correctly rounded result; at most "
        f"{allowed:.0f} may miss it by one ulp"
    )


def _assert_rows(
    a: Array, e: Array, rounded: Array, noise: Array, tolerance: float, label: str
) -> None:
    error = np.linalg.norm(a - e, axis=-1)
    scale = np.linalg.norm(e, axis=-1)
    # A few large elements may carry a row, and terms may cancel: what one rounding and the
    # arithmetic before it cost is never an error.
    cost = 1.05 * np.linalg.norm(rounded - e, axis=-1) + np.linalg.norm(noise, axis=-1)
    wrong = ~(error <= np.maximum(tolerance * scale, cost))
    wrong &= scale >= 1e-20  # a tiny row is judged by its elements alone
    if wrong.any():
        relative = np.where(wrong, error / np.maximum(scale, 1e-300), 0.0)
        worst = int(np.argmax(relative))
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.size} rows exceed a relative L2 error of "
            f"{tolerance:.3g}; worst row {_where(worst, error.shape)}: {relative.flat[worst]:.3g}"
        )


def assert_rope_close(
    actual: object,
    expected: npt.ArrayLike,
    *,
    magnitude: npt.ArrayLike | None = None,
    dtype: str | None = None,
    label: str = "output",
) -> None:
    """RoPE with or without the norm before it: 1 ulp of the larger element of each rotated pair.

    ``actual [..., head_dim]``; dimension i pairs with i + head_dim / 2. The length of each pair is
    kept to 1 ulp + 1e-6 as well.
    """
    name = dtype or dtype_name(actual)
    e = np.asarray(expected, dtype=np.float64)
    half = e.shape[-1] // 2
    first, second = e[..., :half], e[..., half:]
    length = np.hypot(first, second)
    larger = np.maximum(np.abs(first), np.abs(second))
    both = np.concatenate([larger, larger], axis=-1)
    size = np.concatenate([length, length], axis=-1) if magnitude is None else magnitude
    # A pair whose rotation cancels in one element may miss the nearest value of that small element.
    assert_close(
        actual, e, magnitude=size, ulp_of=both, dtype=name, correctly_rounded=0.99, label=label
    )
    a = to_float64(actual)
    with np.errstate(invalid="ignore"):
        drift = np.abs(np.hypot(a[..., :half], a[..., half:]) - length)
        limit = ulp(length, name) + 1e-6 * length
        wrong = np.isfinite(drift) & np.isfinite(length) & (drift > limit)
    if wrong.any():
        worst = int(np.argmax(np.where(wrong, drift / np.maximum(limit, 1e-300), 0.0)))
        raise AssertionError(
            f"{label}: the rotation changed the length of {int(wrong.sum())} of {wrong.size} "
            f"pairs; worst at pair {_where(worst, drift.shape)}: off by {drift.flat[worst]:.3g}, "
            f"allowed {limit.flat[worst]:.3g}"
        )


def assert_attention_close(
    actual: object,
    expected: npt.ArrayLike,
    norm: npt.ArrayLike,
    *,
    dtype: str | None = None,
    label: str = "output",
) -> None:
    """Attention output ``[..., head_dim]``, each row for itself, against what was summed up for it.

    ``norm(out - ref) <= c * norm(sqrt(P^2 V^2 + ref^2))`` with ``norm`` from
    ``oracles.attention``: where values cancel, even a perfect kernel fails a plain relative error,
    and this one does not.
    """
    name = dtype or dtype_name(actual)
    a, e = to_float64(actual), np.asarray(expected, dtype=np.float64)
    assert_same_special_values(a, round_to(e, name), label)
    limit = ATTENTION_TOLERANCE[name] * (SHORT_HEAD_FACTOR if e.shape[-1] < SHORT_HEAD else 1.0)
    finite = np.isfinite(e)
    with np.errstate(invalid="ignore"):  # inf - inf, of no interest
        error = np.linalg.norm(np.where(finite, a - e, 0.0), axis=-1)
    scale = np.linalg.norm(np.where(finite, np.asarray(norm), 0.0), axis=-1)
    wrong = ~(error <= limit * scale)
    if wrong.any():
        ratio = np.where(wrong, error / np.maximum(scale, 1e-300), 0.0)
        worst = int(np.argmax(ratio))
        row = np.unravel_index(worst, error.shape)
        column = int(np.argmax(np.abs(a[row] - e[row])))
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.size} rows exceed {limit:.3g}; worst row "
            f"{_where(worst, error.shape)}: {ratio.flat[worst]:.3g}, largest at column {column}: "
            f"got {_show(a[row][column])}, expected {_show(e[row][column])}"
        )


def assert_largest_error(
    actual: object,
    expected: npt.ArrayLike,
    peer_error: float,
    *,
    dtype: str | None = None,
    label: str = "output",
) -> None:
    """The largest error is at most that of another implementation in the same dtype, plus one ulp
    of the largest expected value."""
    name = dtype or dtype_name(actual)
    a, e = to_float64(actual), np.asarray(expected, dtype=np.float64)
    if a.size == 0:
        return
    error = np.abs(a - e)
    spacing = float(ulp(np.abs(e).max(), name))
    _note(name, float(error.max()) / spacing)
    worst = int(np.argmax(error))
    assert error.flat[worst] <= peer_error + spacing, (
        f"{label}: largest error {error.flat[worst]:.3g} at {_where(worst, a.shape)} (got "
        f"{_show(a.flat[worst])}, expected {_show(e.flat[worst])}), that of torch's attention is "
        f"{peer_error:.3g}, one ulp {spacing:.3g}"
    )


def assert_lse_close(actual: object, expected: npt.ArrayLike, label: str = "lse") -> None:
    """Logs of sums of exponentials, fp32: within 1e-5 + 1e-6 |lse|, -inf exactly."""
    a, e = to_float64(actual), np.asarray(expected, dtype=np.float64)
    assert_same_special_values(a, e, label)
    with np.errstate(invalid="ignore"):
        error = np.where(np.isfinite(e), np.abs(a - e), 0.0)
        limit = 1e-5 + 1e-6 * np.where(np.isfinite(e), np.abs(e), 0.0)
    wrong = ~(error <= limit)
    if wrong.any():
        worst = int(np.argmax(error / limit))
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {a.size} are off; worst at {_where(worst, a.shape)}: "
            f"got {_show(a.flat[worst])}, expected {_show(e.flat[worst])}, error "
            f"{error.flat[worst]:.3g}, allowed {limit.flat[worst]:.3g}"
        )
