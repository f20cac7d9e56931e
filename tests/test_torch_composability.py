"""Every op under what torch does to functions: tracing, mapping, derivatives, export, sharding.

On plain PyTorch and on the emulated kernels alike. Each either works as on plain tensors or refuses
in words that name the op; docs/torch.md has the table.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from api_calls import CALLS, ROWS, Arguments, Call, cloned
from exafuse import ops, reference
from exafuse.ops.registered import library
from kernel_backends import Backend, emulated
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

__all__ = ["emulated"]  # a fixture

WRITES = [n for n, call in CALLS.items() if call.mutated]
INFERENCE = [n for n, c in CALLS.items() if c.op in ("flash_attn_with_kvcache",)] + WRITES
DIFFERENTIABLE = [n for n in CALLS if n not in INFERENCE]
TESTS = Path(__file__).parent


@pytest.fixture(params=["auto", "emulated"])
def module(request: pytest.FixtureRequest, emulated: Backend) -> ModuleType:
    return ops if request.param == "auto" else emulated.ops


def close(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    return {n: x for n, x in arguments.items() if isinstance(x, Tensor)}


def mapped(call: Call, module: ModuleType, arguments: Arguments, names: list[str]) -> None:
    """Three examples by vmap are those of three calls."""
    examples = [call.arguments(torch.float32, seed) for seed in range(3)]
    stacked = {n: torch.stack([example[n] for example in examples]) for n in names}
    given = {n: x.clone() for n, x in stacked.items()}

    def one(parts: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return call.run(module, {**arguments, **parts})[: len(call.buffers)]

    results = torch.vmap(one)(given)
    for i in range(3):
        alone = {**cloned(arguments), **{n: x[i].clone() for n, x in stacked.items()}}
        close([x[i] for x in results], call.run(reference, alone)[: len(call.buffers)])
        for name in call.mutated:
            close([given[name][i]], [alone[name]])


@pytest.mark.parametrize("name", CALLS)
def test_vmap(name: str, module: ModuleType) -> None:
    """Rows alone are mapped in one launch, weights too one by one; never by the slow fallback."""
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    floats = [n for n, x in tensors_of(arguments).items() if x.is_floating_point()]
    rows = [n for n in ("x", "gate_up", "gate", "qkv", "q") if n in arguments][:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped(call, module, arguments, floats)
        if not call.mutated:
            mapped(call, module, arguments, rows)
            return
        with pytest.raises(ValueError, match=r"^k_cache: every example of vmap would write into"):
            mapped(call, module, arguments, rows)


@pytest.mark.emulated
def test_vmap_over_rows_is_one_launch(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    from emulator.control import Emulator
    from kernel_backends import emulator_library

    monkeypatch.setattr(library.direct, "ops", emulated.ops)
    x, weight = torch.randn(5, 2, 64), torch.randn(64)
    emulator = Emulator(emulator_library())
    emulator.clear_launches()
    result = torch.vmap(lambda row: emulated.ops.rms_norm(row, weight, 1e-6), in_dims=1)(x)
    assert emulator.num_launches() == 1
    close([result], [reference.rms_norm(x.transpose(0, 1), weight, 1e-6)])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", CALLS)
def test_make_fx_records_the_op(name: str, mode: str, module: ModuleType) -> None:
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    inputs = tensors_of(arguments)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = {**arguments, **dict(zip(inputs, values, strict=True))}
        return call.run(module, given)[: len(call.buffers)]

    graph = make_fx(function, tracing_mode=mode)(*cloned(inputs).values())
    assert "torch.ops.exafuse." in graph.code
    other = call.arguments(torch.float32, seed=1)
    expected = call.run(reference, cloned(other))[: len(call.buffers)]
    close(graph(*tensors_of(other).values()), expected)


@pytest.mark.parametrize("name", CALLS)
def test_functionalize(name: str, module: ModuleType) -> None:
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    inputs = tensors_of(arguments)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = {**arguments, **dict(zip(inputs, values, strict=True))}
        return call.run(module, given)[: len(call.buffers)]

    wrapped = torch.func.functionalize(function)
    if call.mutated:
        with pytest.raises(RuntimeError, match="exafuse::"):
            wrapped(*cloned(inputs).values())
        return
    close(wrapped(*cloned(inputs).values()), call.run(reference, cloned(arguments)))


def first_float(arguments: Arguments) -> str:
    return next(n for n, x in tensors_of(arguments).items() if x.is_floating_point())


@pytest.mark.parametrize("name", CALLS)
def test_functional_derivatives(name: str, module: ModuleType) -> None:
    """grad and jvp of torch.func, and dual numbers, against the reference's own."""
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    leaf = first_float(arguments)

    def with_module(which: ModuleType) -> Any:
        def results(x: Tensor) -> tuple[Tensor, ...]:
            return call.run(which, {**cloned(arguments), leaf: x})[: len(call.buffers)]

        return results

    def squares(which: ModuleType) -> Any:
        return lambda x: sum((r * r).sum() for r in with_module(which)(x))

    if name in INFERENCE:
        with pytest.raises(ValueError, match="gradient"):
            torch.func.grad(squares(module))(arguments[leaf])
        return
    x, tangent = arguments[leaf], torch.randn_like(arguments[leaf])
    close([torch.func.grad(squares(module))(x)], [torch.func.grad(squares(reference))(x)])
    ours, theirs = (torch.func.jvp(with_module(m), (x,), (tangent,)) for m in (module, reference))
    close(ours[1], theirs[1])
    assert any(bool(t.any()) for t in ours[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for result, expected in zip(with_module(module)(dual), theirs[1], strict=True):
            along = torch.autograd.forward_ad.unpack_dual(result).tangent
            close([torch.zeros_like(expected) if along is None else along], [expected])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_examples(name: str, module: ModuleType) -> None:
    """vmap of grad, which is how people get the gradient of each example."""
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    leaf = first_float(arguments)
    examples = torch.stack([call.arguments(torch.float32, seed)[leaf] for seed in range(2)])

    def loss(which: ModuleType) -> Any:
        def of(x: Tensor) -> Tensor:
            results = call.run(which, {**arguments, leaf: x})
            return torch.stack([(r * r).sum() for r in results]).sum()

        return of

    together = torch.vmap(torch.func.grad(loss(module)))(examples)
    for example, x in zip(together, examples, strict=True):
        close([example], [torch.func.grad(loss(reference))(x)])


class Recorder(TorchDispatchMode):
    """Notes the ops that a profiler or a tracer would see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_modes_see_one_op(name: str, module: ModuleType) -> None:
    call = CALLS[name]
    arguments = call.arguments(torch.float32)
    expected = call.run(reference, cloned(arguments))
    with Recorder() as recorder:
        results = call.run(module, arguments)
    close(results, expected)
    ours = [op for op in recorder.seen if op.startswith("exafuse.")]
    assert len(ours) == 1


@pytest.mark.parametrize("name", CALLS)
def test_wrapper_subclasses_see_the_op(name: str, module: ModuleType) -> None:
    """Tensors of two tensors: their class runs the op on each of the two."""
    call = CALLS[name]
    first, second = (cloned(call.arguments(torch.float32, seed)) for seed in range(2))
    pairs = {n: TwoTensor(x, second[n]) for n, x in tensors_of(cloned(first)).items()}
    results = call.run(module, {**first, **pairs})
    for part, arguments in (("a", first), ("b", cloned(second))):
        expected = call.run(reference, cloned(arguments))
        close([getattr(x, part) for x in results], expected)


class Block(nn.Module):
    """An op as a layer, its floating-point arguments but the first as parameters."""

    def __init__(self, call: Call, module: ModuleType) -> None:
        super().__init__()
        self.call, self.module = call, module
        arguments = call.arguments(torch.float32)
        self.leaf = first_float(arguments)
        self.rest = {n: x for n, x in arguments.items() if n != self.leaf}
        for name in [n for n in self.rest if n in ("weight", "q_weight", "k_weight")]:
            self.register_parameter(name, nn.Parameter(self.rest.pop(name)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        given = {**self.rest, **dict(self.named_parameters()), self.leaf: x}
        return self.call.run(self.module, given)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_call_and_checkpointing(name: str, module: ModuleType) -> None:
    block = Block(CALLS[name], module)
    x = CALLS[name].arguments(torch.float32, 1)[block.leaf].requires_grad_()
    other = {n: p.detach() + 1 for n, p in block.named_parameters()}
    again = Block(CALLS[name], reference)
    again.load_state_dict(other)
    close(torch.func.functional_call(block, other, (x,)), again(x))
    parameters = [x, *block.parameters()]
    results = []
    for way in (block, lambda y: checkpoint(block, y, use_reentrant=False)):
        loss = sum((r * r).sum() for r in way(x))
        results.append(torch.autograd.grad(loss, parameters))
    for mine, other_ in zip(*results, strict=True):
        assert torch.equal(mine, other_)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_export_keeps_the_op(name: str, module: ModuleType) -> None:
    block = Block(CALLS[name], module)
    x = CALLS[name].arguments(torch.float32, 1)[block.leaf]
    program = torch.export.export(block, (x,), strict=False)
    assert [n for n in program.graph.nodes if str(n.target).startswith("exafuse.")]
    close(program.module()(x), Block(CALLS[name], reference)(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_compiles_whole_for_any_number_of_rows(name: str) -> None:
    """One graph for two sizes; what an op writes into is written by the compiled code too."""
    call = CALLS[name]
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    inputs = tensors_of(call.arguments(torch.float32))
    numbers = {n: x for n, x in call.arguments(torch.float32).items() if n not in inputs}

    def compiled_part(*values: Tensor) -> tuple[Tensor, ...]:
        return call.run(ops, {**numbers, **dict(zip(inputs, values, strict=True))})

    compiled = torch.compile(compiled_part, fullgraph=True, dynamic=True, backend=backend)
    for rows in (None, 2):
        given = call.arguments(torch.float32, seed=1)
        given = cloned(given | {n: given[n][:rows] for n in ROWS[name]})
        plain = cloned(given)
        results = compiled(*tensors_of(given).values())
        close(results, call.run(reference, plain))
    assert len(graphs) == 1
    assert [n for n in graphs[0].graph.nodes if "exafuse" in str(n.target)]


@pytest.mark.slow
def test_dtensors_of_two_processes(tmp_path: Path) -> None:
    """Replicated, split over rows and, for attention, over heads: results and gradients."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "dtensor_ops.py"), str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "all ops" in done.stdout, done.stderr[-3000:]
