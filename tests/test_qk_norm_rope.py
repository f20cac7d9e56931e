"""qk_norm_rope, qk_norm_rope_cache and apply_rope against the fp64 oracle: all elements."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import oracles
import pytest
import torch
from emulator.control import Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal, assert_close, assert_rope_close
from poison import CANARY, Guarded, before_guard_page, extreme_rows, generator, layouts, sparse

__all__ = ["backend", "emulated"]  # fixtures

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEAD_DIMS = [8, 16, 24, 32, 40, 56, 64, 72, 80, 96, 104, 112, 120, 128]
HEADS = [(1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (7, 1), (8, 2), (14, 2), (12, 4), (40, 8)]


@dataclass
class Case:
    """The arguments of one call, on the CPU, in whatever layout."""

    qkv: torch.Tensor | tuple[torch.Tensor, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    eps: float = 1e-6
    num_tokens: int = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        first = self.qkv if isinstance(self.qkv, torch.Tensor) else self.qkv[0]
        self.num_tokens, self.dtype = first.shape[0], first.dtype

    def arguments(self, backend: Backend) -> list[Any]:
        give = backend.give_optional
        packed = isinstance(self.qkv, torch.Tensor)
        qkv = backend.give(self.qkv) if packed else tuple(map(backend.give, self.qkv))
        return [
            *(qkv, self.num_heads, self.num_kv_heads, give(self.q_weight), give(self.k_weight)),
            *(give(self.cos), give(self.sin), give(self.positions), self.eps),
        ]

    def heads(self, part: int) -> int:
        return self.num_heads if part == 0 else self.num_kv_heads

    def output(self, part: int, gaps: tuple[int, int] = (0, 0), offset: int = 0) -> Guarded:
        """A buffer for q, k or v, with `gaps` behind each head and each token."""
        heads = self.heads(part)
        head_stride = self.head_dim + gaps[0]
        strides = (heads * head_stride + gaps[1], head_stride, 1)
        return Guarded((self.num_tokens, heads, self.head_dim), self.dtype, strides, offset)

    def expected(self) -> tuple[oracles.Array, ...]:
        return oracles.qk_norm_rope(
            *(self.qkv, self.num_heads, self.num_kv_heads, self.q_weight, self.k_weight),
            *(self.cos, self.sin, self.positions, self.eps),
        )

    def v(self) -> torch.Tensor:
        if not isinstance(self.qkv, torch.Tensor):
            return self.qkv[2].reshape(self.num_tokens, self.num_kv_heads, self.head_dim)
        shape = (self.num_tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return self.qkv.reshape(shape)[:, -self.num_kv_heads :]

    def check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        expected = self.expected()
        for name, result, want in (("q", q, expected[0]), ("k", k, expected[1])):
            if self.cos is None:
                # Heads of 8 to 128 elements: too short for the relative error of a row.
                assert_close(result, want, label=name)
            else:
                assert_rope_close(result, want, label=name)
        assert_bitwise_equal(v.contiguous(), self.v().contiguous(), "v")


def tables(rows: int, half: int, *key: object) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles, fp32."""
    angles = torch.rand(rows, half, generator=generator("angles", *key), dtype=torch.float64) * 9
    return angles.cos().float(), angles.sin().float()


def make_case(
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int],
    tokens: int,
    *key: object,
    norm: bool = True,
    rope: bool = True,
    mixed: bool = False,
) -> Case:
    """With `mixed`, layouts and the dtypes of weights and tables vary too."""
    num_heads, num_kv_heads = heads
    gen = generator(dtype, head_dim, heads, tokens, *key)
    choose = random.Random(repr((str(dtype), head_dim, heads, tokens, key)))
    align = 16 // dtype.itemsize

    def arranged(x: torch.Tensor) -> torch.Tensor:
        return choose.choice(list(layouts(x, align)))[1] if mixed else x

    def weight() -> torch.Tensor:
        drawn = torch.randn(head_dim, generator=gen) + 1
        return arranged(drawn if mixed and choose.random() < 0.3 else drawn.to(dtype))

    def projection(count: int) -> torch.Tensor:
        scale = choose.choice([1e-3, 1.0, 1.0, 100.0]) if mixed else 1.0
        drawn = torch.randn(tokens, count * head_dim, generator=gen) * scale
        return arranged(drawn.to(dtype))

    if mixed and choose.random() < 0.5:
        qkv: Any = (projection(num_heads), projection(num_kv_heads), projection(num_kv_heads))
    else:
        qkv = projection(num_heads + 2 * num_kv_heads)
    case = Case(qkv, num_heads, num_kv_heads, head_dim, eps=choose.choice([1e-5, 1e-6]))
    if norm:
        case.q_weight, case.k_weight = weight(), weight()
    if rope:
        rows = choose.choice([1, 3, 50])
        pair = tables(rows, head_dim // 2, *key)
        half_precision = mixed and choose.random() < 0.3
        case.cos, case.sin = (arranged(t.to(dtype) if half_precision else t) for t in pair)
        case.positions = torch.randint(0, rows, (tokens,), generator=gen, dtype=torch.int32)
    return case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_calls(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"qk {dtype}")
    cases = 400 * case_factor()
    for number in range(cases):
        case = make_case(
            dtype,
            choose.choice(HEAD_DIMS),
            choose.choice(HEADS),
            choose.choice([1, 2, 3, 5, 9, 17]),
            number,
            norm=choose.random() < 0.7,
            rope=choose.random() < 0.7,
            mixed=True,
        )
        if choose.random() < 0.1:  # one norm without the other
            case.q_weight = None
        align = 16 // dtype.itemsize
        gaps = (choose.choice([0, 0, 1, align]), choose.choice([0, 0, 1, align]))
        outputs = [case.output(part, gaps, choose.choice([0, 0, 1])) for part in range(3)]
        given = tuple(backend.give(guarded.tensor) for guarded in outputs)
        try:
            returned = backend.ops.qk_norm_rope(*case.arguments(backend), out=given)
            assert all(a is b for a, b in zip(returned, given, strict=True))
            case.check(
                *(backend.take_back(*pair, "out") for pair in zip(given, outputs, strict=True))
            )
        except AssertionError as error:
            raise AssertionError(
                f"case {number}: {case.num_tokens} tokens, {case.num_heads}/{case.num_kv_heads} "
                f"heads of {case.head_dim}, {error}"
            ) from error
    backend.count(cases)


@dataclass
class CacheKind:
    """How a cache of `[rows, slots, kv heads, head_dim]` lies in memory."""

    name: str

    def make(self, rows: int, slots: int, heads: int, dim: int, dtype: torch.dtype) -> Any:
        """(k, v, buffers): views of canaries."""
        if self.name == "k and v in one buffer":
            both = Guarded((rows, slots, 2, heads, dim), dtype)
            return both.tensor[:, :, 0], both.tensor[:, :, 1], [both]
        if self.name == "heads before slots":
            pair = [Guarded((rows, heads, slots, dim), dtype) for _ in range(2)]
            return pair[0].tensor.transpose(1, 2), pair[1].tensor.transpose(1, 2), pair
        gap = {"plain": 0, "aligned gaps": 8, "odd gaps": 1}[self.name]
        strides = [1, dim + gap, heads * (dim + gap) + gap]
        strides.append(slots * strides[2] + gap)
        shape = (rows, slots, heads, dim)
        pair = [Guarded(shape, dtype, tuple(reversed(strides)), offset=gap) for _ in range(2)]
        return pair[0].tensor, pair[1].tensor, pair


KINDS = [
    CacheKind(name)
    for name in (
        *("plain", "aligned gaps", "odd gaps"),
        *("heads before slots", "k and v in one buffer"),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_writes(dtype: torch.dtype, backend: Backend) -> None:
    """Slots in any order, -1 and numbers beyond the cache; the rest of the cache stays canaries."""
    choose = random.Random(f"cache {dtype}")
    cases = 250 * case_factor()
    for number in range(cases):
        heads = choose.choice(HEADS)
        tokens = choose.choice([1, 2, 3, 7, 12])
        case = make_case(
            dtype,
            choose.choice(HEAD_DIMS),
            heads,
            tokens,
            "cache",
            number,
            norm=choose.random() < 0.6,
            rope=choose.random() < 0.6,
            mixed=True,
        )
        rows, slots = choose.choice([(1, 16), (2, 7), (3, 128), (5, 3)])
        numbers = choose.sample(range(rows * slots), min(tokens, rows * slots))
        out_of_range = [-1, -1, -2, rows * slots, 2**40, -(2**62)]
        mapping = [s if choose.random() < 0.75 else choose.choice(out_of_range) for s in numbers]
        mapping += [-1] * (tokens - len(mapping))
        slot_mapping = torch.tensor(mapping, dtype=torch.int64)
        kind = choose.choice(KINDS)
        k_cache, v_cache, buffers = kind.make(rows, slots, heads[1], case.head_dim, dtype)

        outputs = [case.output(part) for part in range(3)]
        given = tuple(backend.give(guarded.tensor) for guarded in outputs)
        backend.ops.qk_norm_rope(*case.arguments(backend), out=given)
        q, k, v = (backend.take_back(*pair, "out") for pair in zip(given, outputs, strict=True))
        case.check(q, k, v)

        guarded_q = case.output(0)
        q_given = backend.give(guarded_q.tensor)
        caches = [backend.give(k_cache), backend.give(v_cache)]
        if len(buffers) == 1 and backend.device.type != "cpu":
            caches[1] = caches[0].as_strided(
                v_cache.shape, v_cache.stride(), v_cache.storage_offset()
            )
        returned = backend.ops.qk_norm_rope_cache(
            *case.arguments(backend),
            k_cache=caches[0],
            v_cache=caches[1],
            slot_mapping=backend.give(slot_mapping),
            out=q_given,
        )
        assert returned is q_given
        assert_bitwise_equal(backend.take_back(q_given, guarded_q, "q"), q, "q")
        for name, cache, buffer, tokens_of in zip(
            "kv", caches, buffers if len(buffers) == 2 else buffers * 2, (k, v), strict=True
        ):
            label = f"case {number}: {name}_cache, {kind.name}"
            whole = backend.take_back(cache, buffer, label)
            view = (k_cache if name == "k" else v_cache) if backend.name == "emulated" else None
            view = cache.cpu() if view is None else view
            assert whole is not None
            expected = torch.full_like(view, 0).contiguous()
            expected.view(torch.uint8).fill_(CANARY)
            flat = expected.flatten(0, 1)
            for token, slot in enumerate(mapping):
                if 0 <= slot < rows * slots:
                    flat[slot] = tokens_of[token]
            assert_bitwise_equal(view.contiguous(), expected, label)
    backend.count(2 * cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_alone(dtype: torch.dtype, backend: Backend) -> None:
    choose = random.Random(f"rope {dtype}")
    cases = 200 * case_factor()
    align = 16 // dtype.itemsize
    for number in range(cases):
        dim, heads = choose.choice(HEAD_DIMS), choose.choice(HEADS)
        tokens = choose.choice([1, 2, 5, 9, 33])
        gen = generator("alone", dtype, number)
        dense = [torch.randn(tokens, h, dim, generator=gen).to(dtype) for h in heads]
        q, k = (choose.choice(list(layouts(t, align)))[1] for t in dense)
        cos, sin = tables(7, dim // 2, number)
        if choose.random() < 0.5:
            cos, sin = cos.to(dtype), sin.to(dtype)
        positions = torch.randint(0, 7, (tokens,), generator=gen, dtype=torch.int32)
        case = Case(q.reshape(tokens, -1), 1, 1, dim)
        case.num_tokens = tokens
        outputs = [Guarded((tokens, h, dim), dtype, offset=choose.choice([0, 0, 1])) for h in heads]
        given = tuple(backend.give(guarded.tensor) for guarded in outputs)
        arguments = [backend.give(t) for t in (q, k, cos, sin, positions)]
        backend.ops.apply_rope(*arguments, out=given)
        expected = oracles.apply_rope(q, k, cos, sin, positions)
        for pair, want in zip(zip(given, outputs, strict=True), expected, strict=True):
            assert_rope_close(backend.take_back(*pair, "rope"), want, label=f"case {number}")
    backend.count(cases)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_heads(dtype: torch.dtype, backend: Backend) -> None:
    """NaN, infinity, zero and huge heads side by side: no head touches its neighbour."""
    ran = 0
    for dim in (8, 64, 72, 128):
        rows = extreme_rows(dim, dtype)
        top = torch.finfo(dtype).max
        rows["greatest"] = torch.full((dim,), top).to(dtype)
        if dtype == torch.bfloat16:
            rows["squares beyond fp32"] = rows["ones"] * 1e30
        heads = torch.stack(list(rows.values()))
        qkv = heads.flip(0).repeat(3, 1).reshape(1, -1).repeat(2, 1)
        weight = (torch.rand(dim, generator=generator("w", dim)) + 0.5).to(dtype)
        case = Case(qkv, len(rows), len(rows), dim, weight, weight)
        outputs = [case.output(part) for part in range(3)]
        given = tuple(backend.give(guarded.tensor) for guarded in outputs)
        backend.ops.qk_norm_rope(*case.arguments(backend), out=given)
        case.check(*(backend.take_back(*pair, "out") for pair in zip(given, outputs, strict=True)))
        ran += 2 * len(rows)
    backend.count(ran)


def test_positions_that_formats_stumble_on(backend: Backend) -> None:
    """Table rows at the edges of bf16's and fp16's integers and at the end of a long context."""
    dim = 64
    places = [0, 1, 255, 256, 257, 4095, 4096, 65503, 65504, 131071]
    inverse = 1e6 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(131072, dtype=torch.float64)[:, None] * inverse
    case = make_case(torch.bfloat16, dim, (4, 2), len(places), "positions")
    case.cos, case.sin = angles.cos().float(), angles.sin().float()
    case.positions = torch.tensor(places, dtype=torch.int32)
    q, k, v = (t.cpu() for t in backend.ops.qk_norm_rope(*case.arguments(backend)))
    case.check(q, k, v)


def test_positions_beyond_the_table_read_its_last_row(backend: Backend) -> None:
    case = make_case(torch.float32, 16, (2, 1), 4, "clamp")
    case.cos, case.sin = tables(3, 8)
    case.positions = torch.tensor([-5, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    results = [t.cpu() for t in backend.ops.qk_norm_rope(*case.arguments(backend))]
    case.positions = torch.tensor([0, 2, 2, 0], dtype=torch.int32)
    case.check(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_without_norm_and_rotation_keep_their_bits(
    dtype: torch.dtype, backend: Backend
) -> None:
    case = make_case(dtype, 80, (5, 1), 3, norm=False, rope=False)
    outputs = [case.output(part) for part in range(3)]
    given = tuple(backend.give(guarded.tensor) for guarded in outputs)
    backend.ops.qk_norm_rope(*case.arguments(backend), out=given)
    results = [backend.take_back(*pair, "out") for pair in zip(given, outputs, strict=True)]
    assert_bitwise_equal(torch.cat(results, 1).reshape(3, -1), case.qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_token_alone(dtype: torch.dtype, backend: Backend) -> None:
    """A token alone, in a batch, packed or as three projections, aligned or not: the same bits."""
    ran = 0
    for dim in (8, 72, 128):
        for heads in ((3, 1), (40, 8)):
            case = make_case(dtype, dim, heads, 9, "bits")
            assert isinstance(case.qkv, torch.Tensor)
            if dtype == torch.bfloat16:
                case.qkv[4, :dim] = 1e30  # a head that is summed twice, beside others that are not
            results = [t.cpu() for t in backend.ops.qk_norm_rope(*case.arguments(backend))]
            cuts = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
            views: list[Any] = [view for _, view in layouts(case.qkv)]
            views.append(case.qkv.split(cuts, dim=1))
            for view in views:
                other = Case(view, *heads, dim, case.q_weight, case.k_weight, case.cos, case.sin)
                other.positions, other.eps = case.positions, case.eps
                for a, b in zip(
                    backend.ops.qk_norm_rope(*other.arguments(backend)), results, strict=True
                ):
                    assert_bitwise_equal(a.cpu().contiguous(), b.contiguous())
            for token in (0, 4, 5, 8):
                alone = Case(case.qkv[token : token + 1], *heads, dim, case.q_weight, case.k_weight)
                alone.cos, alone.sin, alone.eps = case.cos, case.sin, case.eps
                assert case.positions is not None
                alone.positions = case.positions[token : token + 1]
                for a, b in zip(
                    backend.ops.qk_norm_rope(*alone.arguments(backend)), results, strict=True
                ):
                    assert_bitwise_equal(a.cpu().contiguous(), b[token : token + 1].contiguous())
            ran += len(views) + 5
    backend.count(ran)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_be_their_part_of_the_input(dtype: torch.dtype, backend: Backend) -> None:
    for dim, heads in ((64, (4, 2)), (72, (3, 1))):
        case = make_case(dtype, dim, heads, 5, "alias")
        expected = [t.cpu().clone() for t in backend.ops.qk_norm_rope(*case.arguments(backend))]
        arguments = case.arguments(backend)
        arguments[0] = arguments[0].clone()
        parts = arguments[0].view(5, -1, dim).split([heads[0], heads[1], heads[1]], dim=1)
        backend.ops.qk_norm_rope(*arguments, out=parts)
        for part, want in zip(parts, expected, strict=True):
            assert_bitwise_equal(part.cpu().contiguous(), want.contiguous())
        q, k = (backend.give(t.clone()) for t in expected[:2])
        table = [backend.give_optional(t) for t in (case.cos, case.sin, case.positions)]
        rotated = [t.cpu() for t in backend.ops.apply_rope(q, k, *table)]
        backend.ops.apply_rope(q, k, *table, out=(q, k))
        for part, want in zip((q, k), rotated, strict=True):
            assert_bitwise_equal(part.cpu(), want)
    backend.count(8)


def test_v_is_a_view_when_no_output_is_given(backend: Backend) -> None:
    for mixed in (False, True):
        case = make_case(torch.bfloat16, 64, (4, 2), 3, "view", 3, mixed=mixed)
        arguments = case.arguments(backend)
        q, k, v = backend.ops.qk_norm_rope(*arguments)
        source = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][2]
        assert v.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        case.check(q.cpu(), k.cpu(), v.cpu())


def test_nothing_to_do(backend: Backend) -> None:
    case = make_case(torch.bfloat16, 64, (4, 2), 0)
    q, k, v = backend.ops.qk_norm_rope(*case.arguments(backend))
    assert q.shape == (0, 4, 64)
    assert k.shape == v.shape == (0, 2, 64)
    cache = backend.give(torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16))
    mapping = backend.give(torch.zeros(0, dtype=torch.int64))
    q = backend.ops.qk_norm_rope_cache(
        *case.arguments(backend), k_cache=cache, v_cache=cache.clone(), slot_mapping=mapping
    )
    assert q.shape == (0, 4, 64)
    assert not cache.any()


def test_a_cache_without_slots_takes_nothing(backend: Backend) -> None:
    case = make_case(torch.bfloat16, 64, (4, 2), 2)
    cache = backend.give(torch.zeros(1, 0, 2, 64, dtype=torch.bfloat16))
    q = backend.ops.qk_norm_rope_cache(
        *case.arguments(backend),
        k_cache=cache,
        v_cache=cache.clone(),
        slot_mapping=backend.give(torch.zeros(2, dtype=torch.int64)),
    )
    assert_bitwise_equal(q.cpu(), backend.ops.qk_norm_rope(*case.arguments(backend))[0].cpu())


def test_bits_do_not_depend_on_the_schedule(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    for dtype in DTYPES:
        for dim, heads in ((8, (3, 1)), (72, (2, 2)), (128, (40, 8))):
            case = make_case(dtype, dim, heads, 5, "schedule")
            expected = emulated.ops.qk_norm_rope(*case.arguments(emulated))
            for schedule, seed in (("reverse", 1), ("random", 1), ("random", 2)):
                with emulator.schedule(schedule, seed):
                    results = emulated.ops.qk_norm_rope(*case.arguments(emulated))
                for result, want in zip(results, expected, strict=True):
                    assert_bitwise_equal(result.contiguous(), want.contiguous(), schedule)
    emulated.count(36)


def test_offsets_beyond_two_to_the_31(emulated: Backend) -> None:
    """Token and cache strides of 2^31 + 8 elements, then slot numbers beyond 2^31."""
    dim, heads, gap = 64, (2, 1), 2**31 + 8
    case = make_case(torch.bfloat16, dim, heads, 2, "far")
    assert isinstance(case.qkv, torch.Tensor)
    far = sparse(gap + 4 * dim, torch.bfloat16).as_strided((2, 4 * dim), (gap, 1))
    case.qkv = far.copy_(case.qkv)
    caches = [
        sparse(2 * gap + 8 * dim, torch.bfloat16).as_strided((2, 2, 1, dim), (gap, dim, dim, 1))
        for _ in range(2)
    ]
    q = emulated.ops.qk_norm_rope_cache(
        *case.arguments(emulated),
        k_cache=caches[0],
        v_cache=caches[1],
        slot_mapping=torch.tensor([3, 0]),
    )
    case.check(
        q,
        torch.stack([caches[0][1, 1], caches[0][0, 0]]),
        torch.stack([caches[1][1, 1], caches[1][0, 0]]),
    )

    case = make_case(torch.bfloat16, 8, (1, 1), 1, "many slots")
    slots, slot = 2**31 + 16, 2**31 + 5
    long = [sparse(slots * 8, torch.bfloat16).view(1, slots, 1, 8) for _ in range(2)]
    q = emulated.ops.qk_norm_rope_cache(
        *case.arguments(emulated),
        k_cache=long[0],
        v_cache=long[1],
        slot_mapping=torch.tensor([slot]),
    )
    case.check(q, long[0][:, slot], long[1][:, slot])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_no_byte_past_the_end(dtype: torch.dtype, emulated: Backend) -> None:
    for dim in (8, 72, 128):
        case = make_case(dtype, dim, (3, 1), 2, "guard")
        assert isinstance(case.qkv, torch.Tensor)
        for name in ("qkv", "q_weight", "k_weight", "cos", "sin", "positions"):
            tensor = getattr(case, name)
            copy = before_guard_page(tuple(tensor.shape), tensor.dtype).copy_(tensor)
            setattr(case, name, copy)
        out = tuple(before_guard_page((2, heads, dim), dtype) for heads in (3, 1, 1))
        emulated.ops.qk_norm_rope(*case.arguments(emulated), out=out)
        case.check(*out)
    emulated.count(3)
