"""The benchmark harness: what it may report, and what it must not let pass."""

from __future__ import annotations

import ast
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from exafuse.config import load_config
from exafuse.reference.attention import visible_keys

from benchmarks import attention_peers, peers, results, roofline, run, shapes, timing
from benchmarks.case import Case, Contender, Maker, Settings, Unsupported
from benchmarks.results import Ceilings, Peer, Result, Row

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
CONFIGS = ROOT / "tests" / "data" / "configs"
CPU = Settings(torch.device("cpu"), quick=True, dtype=torch.float32)
CEILINGS = Ceilings(copy_gbps=100.0, read_gbps=200.0, matmul_tflops=1.0)


def make_row(**changes):
    values = {"suite": "ops", "op": "rms_norm", "case": "1 x 8", "contender": "exafuse"}
    timed = {"status": "ok", "time_us": 2.0, "q1_us": 1.5, "q3_us": 2.5, "repeats": 5}
    return Row(**(values | timed | {"mode": "host", "bytes": 100_000} | changes))


def make_result(*rows, **changes):
    values = {
        **{"exafuse": "0.1.0", "date": "2026-01-01T00:00:00+00:00", "commit": "abc"},
        **{"command": "exafuse bench", "seconds": 1.0, "quick": True, "dtype": "bfloat16"},
        "machine": {"name": "NVIDIA H200", "torch": "2.13.0", "driver": "1.2"},
        **{"peers": {"torch": Peer("2.13.0")}, "ceilings": CEILINGS, "rows": list(rows)},
    }
    return Result(**(values | changes))


def make_case(*contenders, expected=None):
    """Adding one to a matrix of 16 rows."""

    def make(generator):
        return {"x": Maker(generator, torch.float32).normal(16, 8)}

    return Case(
        suite="ops",
        op="add_one",
        name="16 x 8",
        bytes=2 * 16 * 8 * 4,
        make=make,
        expected=expected or (lambda inputs: (inputs["x"] + 1,)),
        contenders=contenders,
    )


def adding(amount):
    return lambda inputs: lambda: (inputs["x"] + amount,)


def measured(*contenders, **options):
    bench = run.Bench(CPU, say=lambda text: None, **options)
    return {row.contender: row for row in bench.measure(make_case(*contenders))}


# ---- sources -------------------------------------------------------------------------------------


def test_every_op_has_a_file_of_benchmarks():
    stems = ("rms_norm", "qk_norm_rope", "silu_and_mul", "flash_attn", "flash_attn_with_kvcache")
    for stem in (*stems, "vision_attn"):
        assert (FOLDER / f"bench_{stem}.py").is_file(), stem
    listed = {name for names in run.CASES.values() for name in names}
    assert listed == {f"bench_{stem}" for stem in (*stems, "vision_attn")}


def test_benchmarks_import_nothing_of_the_tests_and_themselves_relatively():
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests", "benchmarks"}
    own = {path.stem for path in FOLDER.glob("*.py")}
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] not in (helpers | own) - {"results"}, (file, name)


@pytest.mark.parametrize("model", shapes.MODELS, ids=lambda model: model.name)
def test_shapes_are_those_of_the_published_configurations(model):
    config = load_config(CONFIGS / f"{model.name.lower()}.json")
    assert config.hidden_size == model.hidden_size
    assert config.intermediate_size == model.intermediate_size
    heads = (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers)
    assert heads == (model.num_heads, model.num_kv_heads, model.head_dim, model.num_layers)
    for context in (1024, 131072):
        assert config.cache_bytes(1, context, 2) == model.cache_bytes(context, rings=True)


# ---- timing --------------------------------------------------------------------------------------


def test_timing_runs_every_set_of_inputs_alike():
    seen = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    found = timing.time_calls(calls, torch.device("cpu"), timing.Effort(repeats=7, seconds=9))
    assert found.repeats == 7
    assert [seen.count(i) for i in range(3)] == [8, 8, 8]  # one of each to warm up
    assert 0 < found.q1_us <= found.median_us <= found.q3_us


def test_a_slow_call_is_repeated_three_times():
    found = timing.time_calls([lambda: None], torch.device("cpu"), timing.Effort(50, 1e-9))
    assert found.repeats == 3


class FakeGpu:
    """What timing.py asks of CUDA: a call takes 3 us in a graph and 5 alone."""

    def __init__(self, monkeypatch, capture_fails):
        self.in_graph, self.capture_fails, self.log = False, capture_fails, []
        monkeypatch.setattr(timing, "_captured", self.captured)
        monkeypatch.setattr(timing, "_events", self.events)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def captured(self, calls):
        if self.capture_fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.captured_calls = len(calls)
        return lambda: self.log.append("replay")

    def events(self, run, count):
        before = len(self.log)
        run()
        return 3.0 if self.log[before:] == ["replay"] else 5.0


@pytest.mark.parametrize("capture_fails", [False, True])
def test_a_gpu_replays_graphs_where_it_can(capture_fails, monkeypatch):
    gpu = FakeGpu(monkeypatch, capture_fails)
    calls = [lambda i=i: gpu.log.append(i) for i in range(4)]
    found = timing.time_calls(calls, torch.device("cuda"), timing.Effort(repeats=9, seconds=1))
    assert found.repeats == 9
    if capture_fails:
        assert (found.mode, found.median_us) == ("events", 5.0)
        assert found.note == (
            "no graph: RuntimeError: operation not permitted when stream is capturing"
        )
        assert {gpu.log.count(i) for i in range(4)} == {2 + 25 * 10}  # warm, estimate, 25 rounds
    else:
        assert (found.mode, found.median_us, found.note) == ("graph", 3.0, "")
        assert gpu.captured_calls * 5 >= timing.SHORTEST_REPLAY_US  # long beside a graph's start
        assert gpu.log.count("replay") == 10  # one to warm up


@pytest.mark.parametrize(
    ("moved", "held", "expected"),
    [
        (50 << 20, 50 << 20, (3, True)),  # 2.5 caches of 50 MiB
        (1 << 30, 1 << 30, (2, True)),
        (16 << 20, 512 << 20, (8, True)),  # a window of a long cache
        (16 << 20, 4 << 30, (5, False)),  # a quarter of 80 GiB holds five
        (1024, 1024, (timing.MAX_SETS, False)),
        (60 << 30, 60 << 30, (1, True)),
    ],
)
def test_sets_of_inputs_are_larger_than_the_cache(moved, held, expected, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 140 << 30))
    assert timing.sets_needed(moved, held, gpu) == expected
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 0)
    assert timing.sets_needed(moved, held, gpu) == (2, False)


def test_sdpa_without_a_kernel_is_unsupported():
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(Unsupported, match="torch finds no such kernel for 2/2 heads of 8"):
        attention_peers.sdpa("sdpa-cudnn", {"q": q, "k": q, "v": q}, (-1, 0))()


def test_errors_that_a_glance_at_the_mean_would_miss():
    wanted = torch.randn(65536, 16)
    right = wanted.bfloat16().float()
    definition = [wanted.bfloat16()]
    assert timing.error_against([right], definition)[1] == ""
    one_row = right.clone()
    one_row[7] = 0
    assert "one row is off" in timing.error_against([one_row], definition)[1]
    unwritten = right.clone()
    unwritten[65535, 15] = float("nan")
    error, why = timing.error_against([unwritten], definition)
    assert error != error
    assert "relative error nan" in why
    assert "expected shape" in timing.error_against([right[:-1]], definition)[1]
    assert "expected 1 outputs, got 2" in timing.error_against([right, right], definition)[1]


# ---- contenders ----------------------------------------------------------------------------------


def test_what_is_wrong_is_not_timed_and_what_fails_does_not_end_the_run():
    def lacking(inputs):
        raise Unsupported("it has no addition")

    def failing(inputs):
        return lambda: 1 / 0

    def greedy(inputs):
        raise torch.OutOfMemoryError("wants\n80 GiB")

    rows = measured(
        Contender("exafuse", adding(1)),
        Contender("torch", adding(1), "torch"),
        Contender("sdpa-math", adding(2), "torch"),
        Contender("flex", adding(float("nan")), "torch"),
        Contender("varlen", lacking, "torch"),
        Contender("liger", failing, "torch"),
        Contender("quack", greedy, "torch"),
        Contender("flashinfer", adding(1), "flashinfer"),  # not on a CPU
    )
    found = {name: row.status for name, row in rows.items()}
    assert found == {
        **{"exafuse": "ok", "torch": "ok", "sdpa-math": "wrong", "varlen": "unsupported"},
        "flex": "wrong",
        **{"liger": "failed", "quack": "out of memory"},
    }
    assert rows["sdpa-math"].time_us is None
    assert "relative error" in rows["sdpa-math"].reason
    assert rows["varlen"].reason == "it has no addition"
    assert rows["liger"].reason.startswith("ZeroDivisionError")
    assert rows["quack"].reason == "OutOfMemoryError: wants 80 GiB"
    assert rows["exafuse"].path == "reference"
    assert rows["exafuse"].repeats >= 3
    results.from_dict(json.loads(json.dumps(make_result(*rows.values()).to_dict())))


def test_contenders_get_the_same_tensors():
    seen = {}

    def noting(name):
        def prepare(inputs):
            seen.setdefault(name, []).append(inputs["x"].data_ptr())
            return lambda: (inputs["x"] + 1,)

        return prepare

    rows = measured(Contender("exafuse", noting("a")), Contender("torch", noting("b"), "torch"))
    assert seen["a"] == seen["b"]
    assert len(set(seen["a"])) == 2  # sets of inputs that take turns
    assert not rows["exafuse"].cold  # a CPU's cache is not driven out


def test_cases_behind_the_time_limit_are_not_run():
    rows = measured(Contender("exafuse", adding(1)), limit_s=0)
    assert (rows["exafuse"].status, rows["exafuse"].reason) == ("not run", "time was up")


def test_lines_say_what_the_rows_say():
    row = make_row(path="cuda")
    results.finish([row, make_row(contender="torch", time_us=3.0)], CEILINGS)
    line = "exafuse [cuda] 2.00 us [1.50, 2.50] 50.0 GB/s 50.0 % 1.50x torch"
    assert " ".join(run.line_of(row).split()) == line
    row = make_row(status="failed", reason="no", time_us=None)
    assert run.line_of(row).split() == ["exafuse", "failed:", "no"]


# ---- floors and ratios ---------------------------------------------------------------------------


def test_rates_floors_and_ratios():
    ours = make_row()
    slow = make_row(contender="torch", time_us=4.0)
    fast = make_row(contender="compile", time_us=1.0)
    lone = make_row(case="2 x 8", bound="read")
    heavy = make_row(case="3 x 8", flops=10**7)
    wrong = make_row(contender="liger", status="wrong", reason="x", time_us=None)
    results.finish([ours, slow, fast, lone, heavy, wrong], CEILINGS)
    assert ours.gbps == pytest.approx(50)
    assert (ours.floor_us, ours.bound) == (pytest.approx(1.0), "copy")
    assert ours.percent == pytest.approx(50)
    assert (ours.ratio, ours.best_peer) == (pytest.approx(0.5), "compile")
    assert (slow.ratio, fast.ratio) == (pytest.approx(0.25), pytest.approx(1.0))
    assert (lone.floor_us, lone.bound, lone.ratio) == (pytest.approx(0.5), "read", None)
    assert (heavy.floor_us, heavy.bound) == (pytest.approx(10.0), "matmul")
    assert heavy.tflops == pytest.approx(5)
    assert wrong.ratio is None


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0), (3, 2), (0, 0)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (9, 4), (1, 1)])
def test_pairs_are_those_that_the_mask_lets_through(queries, keys, window):
    i = torch.arange(keys - queries, keys)[None]
    mask = visible_keys(i, torch.arange(keys)[None], window)
    assert roofline.visible_pairs(queries, keys, *window) == int(mask.sum())


def test_ceilings_of_this_machine():
    found = roofline.measure(CPU)
    assert found.copy_gbps > 0.1
    assert found.read_gbps > 0.1
    assert found.matmul_tflops > 1e-4


# ---- peers ---------------------------------------------------------------------------------------


def test_peers_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match=r"peers: expected some of torch, compile.*got tourch"):
        peers.probe(torch.device("cpu"), ("torch", "tourch"))


def test_peers_say_why_they_are_absent():
    def broken(module):
        raise OSError("libcuda.so.1 is missing")

    found = peers.probe(torch.device("cpu"), ("torch", "flex"), broken)
    assert found["torch"].problem == ("cannot be imported (OSError: libcuda.so.1 is missing)")
    assert found["compile"].problem == "not asked for"
    assert found["torch"].version == ""
    assert peers.probe(torch.device("cpu"), None)["torch"].version
    assert "GPU" not in peers.probe(torch.device("cpu"), None)["flex"].problem
    gpu_only = peers.probe(torch.device("cpu"), None)["liger"]
    assert gpu_only.problem == "runs on cuda only"


# ---- files ---------------------------------------------------------------------------------------


def test_results_survive_a_file(tmp_path):
    row = make_row(parameters={"tokens": 1}, clocks={"before": {"sm_mhz": 1980.0}})
    results.write(make_result(row), tmp_path / "a" / "r.json")
    again = results.read(tmp_path / "a" / "r.json")
    assert again == make_result(row)
    results.write_csv(again.rows, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as stream:
        (line,) = csv.DictReader(stream)
    assert (line["op"], line["time_us"], json.loads(line["parameters"])) == (
        *("rms_norm", "2.0"),
        {"tokens": 1},
    )


DAMAGE = {
    "rows[0]: missing ['op']": lambda r: r["rows"][0].pop("op"),
    "rows[0]: unknown ['speed']": lambda r: r["rows"][0].update(speed=1),
    "rows[0].time_us: expected float or NoneType, got '2'": lambda r: r["rows"][0].update(
        time_us="2"
    ),
    "rows[0].repeats: expected int, got 1.5": lambda r: r["rows"][0].update(repeats=1.5),
    "rows[0].cold: expected bool, got 1": lambda r: r["rows"][0].update(cold=1),
    "rows[0].status: expected one of": lambda r: r["rows"][0].update(status="great"),
    "rows[0]: expected a time if and only if": lambda r: r["rows"][0].update(time_us=None),
    "rows[0].reason: expected one, as the status is 'failed'": lambda r: r["rows"][0].update(
        status="failed", time_us=None
    ),
    "ceilings: missing ['copy_gbps']": lambda r: r["ceilings"].pop("copy_gbps"),
    "peers.torch: expected an object, got str": lambda r: r["peers"].update(torch="2.13"),
    "schema: expected 1, got 2": lambda r: r.update(schema=2),
    "rows: expected list, got {}": lambda r: r.update(rows={}),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_results_are_refused_by_name(message):
    values = make_result(make_row()).to_dict()
    results.from_dict(values)
    DAMAGE[message](values)
    with pytest.raises(ValueError, match=re.escape(message)):
        results.from_dict(values)


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write(make_result(make_row(error=float("nan"))), tmp_path / "r.json")
    assert not list(tmp_path.glob("*.json"))
