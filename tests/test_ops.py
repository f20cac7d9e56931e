"""The front door: which path each call takes, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from emulator.control import Emulator
from exafuse import ops, reference
from exafuse.ops import front_door
from exafuse.ops.front_door import FrontDoor
from kernel_backends import Backend, emulated, emulator_library

__all__ = ["emulated"]  # a fixture

BF16 = torch.bfloat16


def calls(dtype: torch.dtype = BF16) -> dict[str, Callable[[ModuleType], Any]]:
    """One small call of every op that has a kernel, on CPU tensors."""
    gen = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=gen).to(dtype)

    x, residual, weight = draw(3, 64), draw(3, 64), draw(64)
    qkv, head_weight, gate_up = draw(4, 64), draw(16), draw(3, 128)
    q, k = draw(4, 2, 16), draw(4, 1, 16)
    table = draw(5, 8).float(), draw(5, 8).float(), torch.tensor([0, 4, 2, 2], dtype=torch.int32)
    prepare = (qkv, 2, 1, head_weight, head_weight, *table, 1e-6)

    def cached(m: ModuleType) -> Any:
        caches = [torch.zeros(2, 8, 1, 16, dtype=dtype) for _ in range(2)]
        slots = torch.tensor([3, -1, 9, 0])
        out = m.qk_norm_rope_cache(
            *prepare, k_cache=caches[0], v_cache=caches[1], slot_mapping=slots
        )
        return out, *caches

    queries, few, keys = draw(1, 20, 2, 16), draw(1, 2, 2, 16), draw(1, 40, 1, 16)
    causal: dict[str, Any] = {"causal": True, "window_size": (9, -1)}
    starts = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32)
    seen = torch.tensor([33], dtype=torch.int32)
    packed = queries[0], keys[0], keys[0].flip(0), *starts, 20, 40
    tables = draw(4, 8).float(), draw(4, 8).float(), torch.tensor([0, 3, 4], dtype=torch.int32)

    return {
        "flash_attn_func": lambda m: m.flash_attn_func(queries, keys, keys.flip(1), **causal),
        "flash_attn_varlen_func": lambda m: m.flash_attn_varlen_func(*packed, **causal),
        "flash_attn_with_kvcache": lambda m: m.flash_attn_with_kvcache(
            few, keys, keys.flip(1), cache_seqlens=seen, **causal
        ),
        "vision_attn": lambda m: m.vision_attn(qkv, 2, 1, *tables, 3),
        "rms_norm": lambda m: m.rms_norm(x, weight, 1e-6),
        "add_rms_norm": lambda m: m.add_rms_norm(x, residual, weight, 1e-6),
        "rms_norm_add": lambda m: m.rms_norm_add(x, residual, weight, 1e-6),
        "qk_norm_rope": lambda m: m.qk_norm_rope(*prepare),
        "qk_norm_rope_cache": cached,
        "apply_rope": lambda m: m.apply_rope(q, k, *table),
        "silu_and_mul": lambda m: m.silu_and_mul(gate_up),
    }


# In the order of their launches.
KERNELS_OF = {
    "flash_attn_func": ["prefill_sm80_kernel"],
    "flash_attn_varlen_func": ["prefill_sm80_kernel"],
    "flash_attn_with_kvcache": ["decode_kernel"],
    "vision_attn": ["vision_window_kernel"],
    "rms_norm": ["rms_norm_kernel"],
    "add_rms_norm": ["rms_norm_kernel"],
    "rms_norm_add": ["rms_norm_kernel"],
    "qk_norm_rope": ["heads_kernel"],
    "qk_norm_rope_cache": ["heads_kernel"],
    "apply_rope": ["heads_kernel"],
    "silu_and_mul": ["silu_and_mul_kernel"],
}
assert set(KERNELS_OF) == set(calls()) == set(front_door.KERNELS)


def tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", KERNELS_OF)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_emulated_ops_launch_their_kernels_and_agree_with_the_reference(
    name: str, dtype: torch.dtype, emulated: Backend
) -> None:
    emulator = Emulator(emulator_library())
    emulator.clear_launches()
    results = tensors(calls(dtype)[name](emulated.ops))
    launched = [record.kernel for record in emulator.launches()]
    expected = KERNELS_OF[name]
    attention = "attn" in name
    if attention and dtype == torch.float32:
        expected = []
    assert len(launched) == len(expected)
    for kernel, words in zip(launched, expected, strict=True):
        assert words in kernel
    for ours, theirs in zip(results, tensors(calls(dtype)[name](reference)), strict=True):
        assert ours.dtype == theirs.dtype
        # The weights of values are rounded to the dtype: attn*.py holds them to their tolerance.
        bounds = {"rtol": 2e-2, "atol": 1e-2} if attention else {}
        torch.testing.assert_close(ours, theirs, **bounds)


@pytest.mark.parametrize("name", KERNELS_OF)
def test_cpu_tensors_take_the_reference(name: str) -> None:
    auto, cuda = FrontDoor("auto"), FrontDoor("cuda")
    assert auto.kernels(torch.zeros(1)) is None
    assert cuda.kernels(torch.zeros(1)) is None
    for ours, theirs in zip(
        tensors(calls()[name](ops.for_path("auto"))), tensors(calls()[name](reference)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_autograd_is_followed(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for which in ("x", "weight"):
        gradients = []
        for module in (emulated.ops, reference):
            torch.manual_seed(0)
            x, weight = torch.randn(3, 64), torch.randn(64)
            leaf = {"x": x, "weight": weight}[which].requires_grad_()
            emulator.clear_launches()
            y = module.rms_norm(x, weight, 1e-6)
            assert emulator.num_launches() == 0
            y.square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.no_grad():
        assert not emulated.ops.rms_norm(x, torch.ones(64), 1e-6).requires_grad
    assert emulator.num_launches() == 1


def test_parts_of_a_projection_carry_gradients_too(emulated: Backend) -> None:
    parts = [torch.randn(2, width) for width in (32, 16, 16)]
    weights = [torch.randn(2, heads, 16) for heads in (2, 1, 1)]
    for number in range(3):
        gradients = []
        for module in (emulated.ops, reference):
            leaves = [p.clone().requires_grad_(i == number) for i, p in enumerate(parts)]
            results = module.qk_norm_rope(tuple(leaves), 2, 1, None, None, None, None, None, 1e-6)
            sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
            gradients.append(leaves[number].grad)
        torch.testing.assert_close(*gradients)


def test_a_preallocated_output_refuses_a_gradient(emulated: Backend) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    for module in (ops, emulated.ops, reference):
        with pytest.raises(ValueError, match="a preallocated output cannot carry a gradient"):
            module.rms_norm(x, torch.ones(64), 1e-6, out=torch.empty(3, 64))


def test_the_cache_write_refuses_a_gradient(emulated: Backend) -> None:
    qkv = torch.randn(2, 64, requires_grad=True)
    cache = torch.zeros(1, 8, 1, 16)
    for module in (ops, emulated.ops, reference):
        with pytest.raises(ValueError, match="has no gradient"):
            module.qk_norm_rope_cache(
                *(qkv, 2, 1, None, None, None, None, None, 1e-6),
                k_cache=cache,
                v_cache=cache.clone(),
                slot_mapping=torch.arange(2),
            )


def test_autograd_notices_what_a_kernel_overwrote(emulated: Backend) -> None:
    buffer, factor = torch.ones(3, 64), torch.ones(3, 64, requires_grad=True)
    product = (buffer * factor).sum()  # saves the buffer
    emulated.ops.rms_norm(torch.randn(3, 64), torch.ones(64), 1e-6, out=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    cache = torch.ones(1, 8, 1, 16)
    product = (cache * torch.ones(1, 8, 1, 16, requires_grad=True)).sum()
    emulated.ops.qk_norm_rope_cache(
        *(torch.randn(2, 64), 2, 1, None, None, None, None, None, 1e-6),
        k_cache=torch.ones(1, 8, 1, 16),
        v_cache=cache,
        slot_mapping=torch.arange(2),
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_may_be_outputs(emulated: Backend) -> None:
    with torch.inference_mode():
        out = torch.empty(3, 64)
    emulated.ops.rms_norm(torch.randn(3, 64), torch.ones(64), 1e-6, out=out)
    assert not out.isnan().any()


class Wrapped(torch.Tensor):
    """A subclass, as quantisation libraries make them."""


class Recorder:
    """Stands for a module of ops; a call of any gives its arguments, the first one apart."""

    def __getattr__(self, name: str) -> Any:
        return lambda first, *rest, **keywords: (first, (rest, keywords))


@pytest.mark.parametrize("name", KERNELS_OF)
def test_tensors_without_plain_memory_are_taken(name: str, emulated: Backend) -> None:
    """Meta tensors and subclasses: the same call works, without the kernels of this backend."""
    x = torch.randn(4, 64)
    emulator = Emulator(emulator_library())
    emulator.clear_launches()
    if name in ("rms_norm", "silu_and_mul"):
        operands = (torch.ones(64), 1e-6) if name == "rms_norm" else ()
        function, plain = getattr(emulated.ops, name), getattr(reference, name)
        assert function(x.to("meta"), *(t.to("meta") for t in operands[:1]), *operands[1:]).is_meta
        wrapped = function(x.as_subclass(Wrapped), *operands)
        assert torch.equal(wrapped.as_subclass(torch.Tensor), plain(x, *operands))
        mapped = torch.vmap(lambda row: function(row, *operands))(x)
        assert torch.equal(mapped, plain(x, *operands))
        negated = function(torch._neg_view(x), *operands)
        assert torch.equal(negated, plain(-x, *operands))
        assert emulator.num_launches() == 0
        return
    sub = x.as_subclass(Wrapped)
    residual, weight = torch.randn(4, 64), torch.ones(64)
    prepare = (2, 1, None, None, None, None, None, 1e-6)
    cache = {f"{c}_cache": torch.zeros(1, 8, 1, 16) for c in "kv"}
    table = (torch.ones(2, 8), torch.ones(2, 8), torch.zeros(4, dtype=torch.int32))
    heads = (sub.view(4, 4, 16)[:, :2], x.view(4, 4, 16)[:, 2:])
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "add_rms_norm": ((sub, residual, weight, 1e-6), {}),
        "rms_norm_add": ((sub, residual, weight, 1e-6), {}),
        "qk_norm_rope": ((sub, *prepare), {}),
        "qk_norm_rope_cache": ((sub, *prepare), {**cache, "slot_mapping": torch.arange(4)}),
        "apply_rope": ((*heads, *table), {}),
    }
    if name not in arguments:
        sub, rest = calls()[name](Recorder())
        arguments[name] = ((sub.as_subclass(Wrapped), *rest[0]), rest[1])
    positional, keywords = arguments[name]
    results = tensors(getattr(emulated.ops, name)(*positional, **keywords))
    expected = tensors(getattr(reference, name)(*positional, **keywords))
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))
    assert emulator.num_launches() == 0


@pytest.mark.parametrize("backend", ["auto", "emulated", "reference"])
@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "rms_norm_add", "apply_rope", "silu_and_mul"]
)
def test_what_is_no_tensor_is_named_on_every_path(
    name: str, backend: str, emulated: Backend
) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": ("x", torch.ones(64), 1e-6),
        "add_rms_norm": ("x", torch.ones(64), torch.ones(64), 1e-6),
        "rms_norm_add": ("x", torch.ones(64), torch.ones(64), 1e-6),
        "apply_rope": ("x", torch.ones(1, 1, 16), torch.ones(1, 8), torch.ones(1, 8), None),
        "silu_and_mul": ("x", torch.ones(64)),
    }
    with pytest.raises(TypeError, match=r"expected a torch.Tensor, got str"):
        getattr(ops.for_path(backend), name)(*arguments[name])


def test_compilers_see_registered_ops(emulated: Backend) -> None:
    """No graph break: the front door steps aside while a call is traced."""

    def step(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        y = emulated.ops.rms_norm(x, torch.ones(64), 1e-6)
        return emulated.ops.flash_attn_func(q, k, k, causal=True).flatten(2) + y

    inputs = torch.randn(1, 3, 64), torch.randn(1, 3, 4, 16), torch.randn(1, 5, 2, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
