"""Corners of the kernels where one thing is unusual and everything beside it is not.

Random cases make all tensors misaligned or far apart together; a kernel that looks at the wrong one
of them passes those. Each test here notices a defect of mutants.toml that no other test does.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from kernel_backends import Backend, backend, emulated
from numeric import assert_bitwise_equal, assert_close
from poison import Guarded, generator, sparse

__all__ = ["backend", "emulated"]  # fixtures

EPS = 1e-5
BF16 = torch.bfloat16


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator("corners", shape)).to(BF16)


@pytest.mark.parametrize("odd", ["x", "residual", "weight", "out", "residual_out"])
def test_one_misaligned_tensor_among_aligned_ones(odd: str, backend: Backend) -> None:
    hidden = 520
    given = {
        "x": normal(3, hidden),
        "residual": normal(3, hidden).flip(0),
        "weight": normal(hidden),
    }
    expected, total = oracles.add_rms_norm(given["x"], given["residual"], given["weight"], EPS)
    outputs = {
        name: Guarded((3, hidden), BF16, offset=int(name == odd))
        for name in ("out", "residual_out")
    }
    if odd in given:
        given[odd] = Guarded(tuple(given[odd].shape), BF16, offset=1).tensor.copy_(given[odd])
    on_device = {name: backend.give(tensor) for name, tensor in given.items()}
    out = tuple(backend.give(guarded.tensor) for guarded in outputs.values())
    backend.ops.add_rms_norm(
        on_device["x"], on_device["residual"], on_device["weight"], EPS, out=out
    )
    y = backend.take_back(out[0], outputs["out"], "out")
    assert_close(y, expected, label=f"misaligned {odd}")
    new_residual = backend.take_back(out[1], outputs["residual_out"], "residual_out")
    assert_close(new_residual, total, label=f"misaligned {odd}")


def test_weight_with_gaps_is_refused(emulated: Backend) -> None:
    with pytest.raises(ValueError, match="weight: expected stride 1 in the last dimension"):
        emulated.ops.rms_norm(normal(3, 64), normal(128)[::2], EPS)


def test_rows_whose_squares_barely_overflow(backend: Backend) -> None:
    """Scaled down, such a row is small enough for an unscaled eps to outweigh it."""
    for hidden in (64, 2056):
        for size in (2.0**60, 2.0**64, 2.0**70):
            x = normal(3, hidden) * size
            weight = torch.ones(hidden, dtype=BF16)
            given = backend.give(x), backend.give(weight)
            y = backend.ops.rms_norm(*given, EPS).cpu()
            assert_close(y, oracles.rms_norm(x, weight, EPS), label=f"{hidden} of {size:.3g}")


def test_functional_outputs_beyond_two_to_the_31(emulated: Backend) -> None:
    head_dim, gap = 16, 2**31 + 8
    qkv = normal(2, 4 * head_dim)
    q, k, v = oracles.split_qkv(qkv, 2, 1)
    far = [sparse(gap + 4 * head_dim, BF16) for _ in range(3)]
    heads = (2, 1, 1)
    out = tuple(
        buffer.as_strided((2, n, head_dim), (gap, head_dim, 1))
        for buffer, n in zip(far, heads, strict=True)
    )
    emulated.ops.qk_norm_rope(qkv, 2, 1, None, None, None, None, None, EPS, out=out)
    for result, expected in zip(out, (q, k, v), strict=True):
        assert_bitwise_equal(result.clone(), torch.from_numpy(expected).to(BF16))


def test_output_that_slides_over_up_is_refused(emulated: Backend) -> None:
    buffer = torch.zeros(512, dtype=BF16)
    up, out = buffer[:192].view(3, 64), buffer[16:208].view(3, 64)
    with pytest.raises(ValueError, match="out: expected exactly the memory of up"):
        emulated.ops.silu_and_mul(normal(3, 64), up, out=out)


@pytest.mark.parametrize("output_first", [True, False])
def test_neighbours_in_memory_do_not_overlap(output_first: bool, emulated: Backend) -> None:
    buffer = torch.zeros(2, 3, 64, dtype=BF16)
    out, x = (buffer[0], buffer[1]) if output_first else (buffer[1], buffer[0])
    x.copy_(normal(3, 64))
    weight = normal(64)
    emulated.ops.rms_norm(x, weight, EPS, out=out)
    assert_close(out, oracles.rms_norm(x, weight, EPS))


def test_same_address_with_other_strides_is_an_overlap(emulated: Backend) -> None:
    buffer = torch.zeros(512, dtype=BF16)
    x = buffer[:192].view(3, 64)
    out = buffer.as_strided((3, 64), (128, 1))
    with pytest.raises(ValueError, match="out: expected exactly the memory of x"):
        emulated.ops.rms_norm(x, normal(64), EPS, out=out)
