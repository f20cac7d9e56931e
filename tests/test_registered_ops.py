"""The ops as torch operators: schemas, fake results, gradients, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exafuse import reference
from exafuse.ops import registered
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.exafuse
CASES = 120  # random shapes an op


class Draw:
    """Random tensors and sizes of one case."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def size(self, *choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def floats(self, *shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.generator).to(self.dtype)
        return x.requires_grad_(grad)

    def starts(self, total: int, sequences: int) -> Tensor:
        cuts = torch.randint(0, total + 1, (sequences - 1,), generator=self.generator)
        inner = cuts.sort().values.tolist()
        return torch.tensor([0, *inner, total], dtype=torch.int32)


def norm_inputs(d: Draw) -> tuple[Any, ...]:
    hidden = d.size(8, 40, 264)
    return d.floats(d.size(1, 3), d.size(1, 5), hidden), d.floats(hidden), 1e-5


def residual_inputs(d: Draw) -> tuple[Any, ...]:
    x, weight, eps = norm_inputs(d)
    return x, d.floats(*x.shape), weight, eps


def activation_inputs(d: Draw) -> tuple[Any, ...]:
    rows, size = d.size(1, 7), d.size(8, 24, 136)
    if d.size(0, 1):
        return (d.floats(rows, 2 * size),)
    return d.floats(rows, size), d.floats(rows, size)


def rope_inputs(d: Draw) -> tuple[Any, ...]:
    tokens, kv, dim = d.size(1, 5), d.size(1, 2), d.size(8, 16, 40)
    heads = kv * d.size(1, 3)
    qkv: Any = d.floats(tokens, (heads + 2 * kv) * dim)
    if d.size(0, 1):
        qkv = tuple(d.floats(tokens, n * dim) for n in (heads, kv, kv))
    weights = (d.floats(dim), d.floats(dim)) if d.size(0, 1) else (None, None)
    table: tuple[Any, ...] = (None, None, None)
    if d.size(0, 1, 1):
        positions = torch.randint(0, 9, (tokens,), generator=d.generator, dtype=torch.int32)
        table = (d.floats(9, dim // 2, grad=False), d.floats(9, dim // 2, grad=False), positions)
    return (qkv, heads, kv, *weights, *table, 1e-6)


def rotation_inputs(d: Draw) -> tuple[Any, ...]:
    tokens, dim = d.size(1, 5), d.size(8, 24)
    positions = torch.randint(0, 9, (tokens,), generator=d.generator, dtype=torch.int32)
    tables = (d.floats(9, dim // 2, grad=False) for _ in range(2))
    return d.floats(tokens, 4, dim), d.floats(tokens, 2, dim), *tables, positions


def attention_inputs(d: Draw) -> tuple[Any, ...]:
    batch, kv, dim = d.size(1, 2), d.size(1, 2), d.size(8, 24)
    seqlen_q, seqlen_k = d.size(1, 4, 9), d.size(1, 6, 13)
    q = d.floats(batch, seqlen_q, kv * d.size(1, 3), dim)
    k, v = (d.floats(batch, seqlen_k, kv, dim) for _ in range(2))
    return q, k, v, 0.0, None, bool(d.size(0, 1)), (d.size(-1, 0, 3), d.size(-1, 2))


def varlen_inputs(d: Draw) -> tuple[Any, ...]:
    kv, dim, total_q, total_k = d.size(1, 2), 16, d.size(3, 11), d.size(4, 17)
    q = d.floats(total_q, kv * d.size(1, 3), dim)
    k, v = (d.floats(total_k, kv, dim) for _ in range(2))
    offsets = d.starts(total_q, 3), d.starts(total_k, 3), total_q, total_k
    return q, k, v, *offsets, 0.0, None, bool(d.size(0, 1)), (d.size(-1, 2), -1)


def vision_inputs(d: Draw) -> tuple[Any, ...]:
    tokens, kv, dim = d.size(5, 12), d.size(1, 2), d.size(8, 16)
    heads = kv * d.size(1, 2)
    tables = (d.floats(tokens, dim // 2, grad=False).float() for _ in range(2))
    return d.floats(tokens, (heads + 2 * kv) * dim), heads, kv, *tables, d.starts(tokens, 3), tokens


INPUTS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "rms_norm": norm_inputs,
    "add_rms_norm": residual_inputs,
    "rms_norm_add": residual_inputs,
    "silu_and_mul": activation_inputs,
    "qk_norm_rope": rope_inputs,
    "apply_rope": rotation_inputs,
    "flash_attn_func": attention_inputs,
    "flash_attn_varlen_func": varlen_inputs,
    "vision_attn": vision_inputs,
}


def tensors(values: Any) -> list[Tensor]:
    """Every tensor among nested tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return list(itertools.chain.from_iterable(map(tensors, values)))
    return []


def gradients(function: Callable[..., Any], inputs: tuple[Any, ...], seed: int) -> list[Tensor]:
    """Of a random sum over the results, for every input that asks for one."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for result in tensors(function(*inputs)):
        weights = torch.randn(result.shape, generator=generator)
        if result.requires_grad:
            loss = loss + (result.float() * weights).sum()
    wanted = [x for x in tensors(inputs) if x.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INPUTS))
def test_results_and_gradients_are_those_of_the_reference(name: str) -> None:
    mine, theirs = getattr(registered, name), getattr(reference, name)
    for seed in range(CASES):
        inputs = INPUTS[name](Draw(seed))
        with torch.no_grad():
            for a, b in zip(tensors(mine(*inputs)), tensors(theirs(*inputs)), strict=True):
                assert torch.equal(a, b), seed
        for a, b in zip(
            gradients(mine, inputs, seed), gradients(theirs, inputs, seed), strict=True
        ):
            assert a.shape == b.shape
            # A row that sees one key has gradients of 0 that come out of a cancellation.
            assert float((a - b).norm()) <= 2e-6 * float(b.norm()) + 1e-5, seed


@pytest.mark.parametrize("name", list(INPUTS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Against the reference's gradients in fp32 of the same numbers."""
    mine, theirs = getattr(registered, name), getattr(reference, name)
    limit = 8e-3 if dtype == torch.bfloat16 else 1e-3
    for seed in range(20):
        inputs = INPUTS[name](Draw(seed, dtype))

        def widened(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(widened, x))
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().float().requires_grad_(x.requires_grad)

        exact = gradients(theirs, tuple(map(widened, inputs)), seed)
        for a, b in zip(gradients(mine, inputs, seed), exact, strict=True):
            assert a.dtype == dtype
            assert float((a.float() - b).norm()) <= limit * float(b.norm()) + 1e-3, seed


def cache_arguments() -> tuple[Any, ...]:
    d = Draw(5)
    k_cache, v_cache = (d.floats(2, 128, 2, 8, grad=False) for _ in range(2))
    seqlens = torch.tensor([7, 90], dtype=torch.int32)
    q = d.floats(2, 3, 4, 8, grad=False)
    return q, k_cache, v_cache, seqlens, None, None, None, 0.3, -1, 0, None, None, False


def schema_arguments(name: str, seed: int) -> tuple[Any, ...]:
    """Arguments of the registered op itself."""
    inputs = INPUTS[name](Draw(seed))
    if name == "qk_norm_rope":
        qkv, *rest = inputs
        return (*(qkv if isinstance(qkv, tuple) else (qkv, None, None)), *rest)
    if name == "silu_and_mul":
        return (*inputs, None)[:2]
    if name.startswith("flash_attn"):
        *first, _, _, causal, (left, right) = inputs
        return (*first, 0.3, left, 0 if causal else right)
    return (*inputs, 0.3) if name == "vision_attn" else inputs


@pytest.mark.parametrize("name", [n for n in INPUTS if n != "apply_rope"])
@pytest.mark.parametrize("seed", range(3))
def test_opcheck(name: str, seed: int) -> None:
    opcheck(getattr(OPS, name), schema_arguments(name, seed))


def test_opcheck_of_the_ops_that_write_caches() -> None:
    d, arguments = Draw(6), cache_arguments()
    opcheck(OPS.flash_attn_with_kvcache, arguments)
    new = (d.floats(2, 3, 2, 8, grad=False), d.floats(2, 3, 2, 8, grad=False))
    opcheck(OPS.flash_attn_append_kvcache, (*arguments, *new))
    table = (d.floats(9, 4, grad=False), d.floats(9, 4, grad=False))
    positions = torch.arange(5, dtype=torch.int32)
    rope = (None, None, *table, positions, 1e-6)
    qkv = (d.floats(5, 64, grad=False), None, None, 4, 2)
    opcheck(OPS.qk_norm_rope_cache, (*qkv, *rope, *arguments[1:3], torch.arange(5)))


def test_ops_that_write_caches_refuse_gradients() -> None:
    q, k_cache, v_cache, seqlens, *_ = cache_arguments()
    with pytest.raises(ValueError, match="no gradient"):
        registered.flash_attn_with_kvcache(
            q.requires_grad_(), k_cache, v_cache, cache_seqlens=seqlens
        )
    qkv = Draw(1).floats(5, 64)
    with pytest.raises(ValueError, match="no gradient"):
        registered.qk_norm_rope_cache(
            *(qkv, 4, 2, None, None, None, None, None, 1e-6),
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=torch.arange(5),
        )


def block(x: Tensor, weight: Tensor, gate_up: Tensor, qkv: Tensor, norm: Tensor) -> Tensor:
    """Most ops of a decoder layer, one after the other."""
    y = registered.rms_norm(x, weight, 1e-5)
    q, k, v = registered.qk_norm_rope(y @ qkv, 4, 2, norm, norm, None, None, None, 1e-5)
    out = registered.flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(5, 0))
    y, x = registered.add_rms_norm(out.flatten(2)[0], x, weight, 1e-5)
    return registered.rms_norm_add(registered.silu_and_mul(y @ gate_up), x, weight, 1e-5)


def block_inputs(tokens: int) -> tuple[Tensor, ...]:
    d = Draw(tokens)
    return (
        d.floats(tokens, 32),
        d.floats(32),
        d.floats(32, 64).detach().mul(0.2).requires_grad_(),
        d.floats(32, 64).detach().mul(0.2).requires_grad_(),
        d.floats(8),
    )


@pytest.mark.slow
def test_compiles_whole_with_dynamic_shapes_and_equal_gradients() -> None:
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 7, 12, 40):
        inputs = block_inputs(tokens)
        assert torch.allclose(compiled(*inputs), block(*inputs), rtol=1e-5, atol=1e-6)
        for a, b in zip(gradients(compiled, inputs, 1), gradients(block, inputs, 1), strict=True):
            assert float((a - b).norm()) <= 2e-6 * float(b.norm()) + 1e-6


def test_exports() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return block(*inputs)

    inputs = tuple(x.detach() for x in block_inputs(6))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = ({0: tokens}, None, None, None, None)
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(shapes,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        f"exafuse.{op}.default" for op in ("rms_norm", "qk_norm_rope", "flash_attn_func")
    } <= names
    other = tuple(x.detach() for x in block_inputs(11))
    other = (other[0], *inputs[1:])
    assert torch.equal(program.module()(*other), block(*other))


@pytest.mark.slow
def test_compiled_code_copies_no_cache() -> None:
    """A decode step writes and reads its cache in place: nothing of the cache's size is made."""
    from torch._inductor.utils import run_and_get_code

    _, k_cache, v_cache, seqlens, *_ = cache_arguments()
    qkv, slots = Draw(3).floats(2, 64, grad=False), torch.tensor([6, 128 + 89])

    def step(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor) -> Tensor:
        q = registered.qk_norm_rope_cache(
            *(qkv * 2, 4, 2, None, None, None, None, None, 1e-6),
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=slots,
        )
        out = registered.flash_attn_with_kvcache(
            q.view(2, 1, 4, 8), k_cache, v_cache, cache_seqlens=seqlens, causal=True
        )
        return out.flatten(1) + 1

    caches = k_cache.clone(), v_cache.clone()
    expected = step(qkv, *caches, seqlens)
    result, code = run_and_get_code(
        torch.compile(step, fullgraph=True), qkv, k_cache, v_cache, seqlens
    )
    assert torch.allclose(result, expected)
    assert torch.equal(k_cache, caches[0])
    assert "exafuse.qk_norm_rope_cache" in code[0]
    copies = [line for line in code[0].splitlines() if "(2, 128, 2, 8)" in line and "empty" in line]
    assert not copies


def test_fake_and_functional_tensors_take_the_registered_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        x, weight = torch.empty(3, 16), torch.empty(16)
        assert registered.rms_norm(x, weight, 1e-5).shape == (3, 16)
    x, weight = torch.randn(3, 16), torch.randn(16)
    graph = make_fx(lambda x, w: registered.rms_norm(x, w, 1e-5))(x, weight)
    assert "exafuse.rms_norm" in graph.code
    functional = torch.func.functionalize(lambda x, w: registered.rms_norm(x, w, 1e-5))
    assert torch.equal(functional(x, weight), reference.rms_norm(x, weight, 1e-5))
