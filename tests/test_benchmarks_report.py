"""Reports of benchmark runs: the README's numbers, regressions, drawings, the command."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from command_line import run as run_command
from exafuse.cli import commands as cli
from exafuse.cli.benchmarks import load
from test_benchmarks import make_result, make_row

from benchmarks import plots, report, results
from benchmarks.results import Ceilings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def attention_rows():
    """A made-up run with everything that is drawn."""
    rows = []
    for length in (1024, 4096):
        for contender, time_us in (("exafuse", 2.0), ("varlen", 3.0)):
            for window in (-1, 511):
                shared = {"contender": contender, "model": "Llama-3-8B", "bytes": 10**6}
                lengths = {"seqlen_q": length, "seqlen_k": length, "window": [window, 0]}
                rows.append(
                    make_row(
                        **shared | {"suite": "attention", "op": "flash_attn_func"},
                        **{"case": f"{length} {window}", "time_us": time_us * length},
                        **{"parameters": lengths, "flops": 10**9},
                    )
                )
                lengths = {"batch": 1, "seqlen_q": 1, "context": length, "window": [window, 0]}
                rows.append(
                    make_row(
                        **shared | {"suite": "decode", "op": "flash_attn_with_kvcache"},
                        **{"case": f"{length} {window}", "time_us": time_us + length},
                        **{"parameters": lengths, "flops": 10**3, "bound": "read"},
                    )
                )
    rows += [make_row(model="Llama-3-8B"), make_row(model="Llama-3-8B", contender="torch")]
    results.finish(rows, Ceilings(100.0, 200.0, 1.0))
    return rows


def png_size(file):
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n"), file
    return struct.unpack(">II", head[16:24])


# ---- the README ----------------------------------------------------------------------------------


def test_the_numbers_of_the_readme_are_those_of_the_stored_results():
    text = README.read_text(encoding="utf-8")
    assert report.updated_readme(text, report.load()) == text, (
        "write them anew: python -m benchmarks.report --readme README.md"
    )


def test_stored_results_make_the_numbers_of_a_readme(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    stored = tmp_path / "results"
    arguments = ["--results", str(stored), "--readme", str(readme)]
    assert report.main(arguments) == 0
    assert f"{report.BEGIN}\nSpeed: not yet measured on a GPU.\n{report.END}" in readme.read_text()

    results.write(make_result(*attention_rows()), stored / "nvidia-h200" / "ops-torch2.13.0.json")
    (stored / "nvidia-h200" / "ledger.json").write_text("{}")  # of the kernels' tests
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nThe end.\n")
    assert "**NVIDIA H200**, driver 1.2, torch 2.13.0, bfloat16, commit abc, 2026-01-01." in text
    assert "| `flash_attn_func` | Llama-3-8B | 1024 -1 | 2,048 | 49 % | 1.50x | varlen |" in text
    assert "old" not in text

    (stored / "nvidia-h200" / "x.json").write_text("{}")
    assert report.main(arguments) == 2
    assert "x.json: missing ['ceilings'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, report.BEGIN * 2])
def test_a_readme_without_its_markers_is_an_error(text):
    with pytest.raises(ValueError, match="README: expected '<!-- benchmarks: begin -->' and then"):
        report.updated_readme(text, [])


def test_tables_show_every_contender_and_what_became_of_it():
    rows = [make_row(), make_row(contender="torch", time_us=4.0)]
    lost = {"status": "out of memory", "reason": "80 GiB", "time_us": None}
    rows.append(make_row(contender="compile", **lost))
    results.finish(rows, Ceilings(100.0, 200.0, 1.0))
    text = report.markdown(make_result(*rows))
    assert "| - | 1 x 8 | 1 | 2 | 4 | out of memory | 50 % | 2.00x |" in text
    assert "Peers: torch 2.13.0. Absent: none." in text


# ---- comparisons ---------------------------------------------------------------------------------


def test_what_is_over_five_percent_slower_is_a_regression():
    old = make_result(*(make_row(case=case, time_us=100.0) for case in "abcd"))
    lost = {"status": "failed", "reason": "boom", "time_us": None}
    new = make_result(
        make_row(case="a", time_us=104.9),
        make_row(case="b", time_us=105.2),
        make_row(case="c", **lost),
        make_row(case="d", **lost | {"status": "not run"}),
        make_row(case="e", time_us=900.0),  # was not there before
        make_row(case="b", contender="torch", time_us=900.0),
    )
    slower, failed = report.compare(new, old)
    assert slower == "rms_norm  b: 105.20 us, was 100.00 us (+5 %)"
    assert failed == "rms_norm  c: failed, was 100.00 us (boom)"
    assert report.compare(old, old) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quick": False}, "expected a run with quick True, got one with False"),
        ({"dtype": "float16"}, "expected a run with dtype bfloat16, got one with float16"),
        ({"machine": {"name": "A100"}}, "expected a run on NVIDIA H200, got one on A100"),
    ],
)
def test_runs_that_cannot_be_compared_are_an_error(changes, message):
    with pytest.raises(ValueError, match=f"baseline: {message}"):
        report.compare(make_result(), make_result(**changes))


def test_versions_of_torch_that_differ_in_speed():
    machine = {"name": "NVIDIA H200", "torch": "2.11.0"}
    rows = [make_row(time_us=3.0), make_row(case="same")]
    older = make_result(*rows, machine=machine)
    newer = make_result(make_row(), make_row(case="same"))
    (line,) = report.across_versions([older, newer, newer])[:1]
    assert line == "exafuse, rms_norm  1 x 8: 3.00 us with torch 2.11.0, 2.00 us with 2.13.0"
    assert report.across_versions([newer, newer]) == []


# ---- drawings ------------------------------------------------------------------------------------


def test_drawings_of_a_run(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    files = plots.draw([make_result(*attention_rows())], tmp_path)
    assert {file.name for file in files} == {
        *("cache-memory.png", "prefill-growth.png", "decode-latency.png"),
        *(f"roofline-{op}.png" for op in ("rms_norm", "flash_attn_func")),
        "roofline-flash_attn_with_kvcache.png",
        *(f"speed-up-{suite}.png" for suite in ("ops", "attention", "decode")),
    }
    for file in files:
        width, height = png_size(file)
        assert width > 500, file
        assert height > 150, file
        assert file.stat().st_size > 5000, file  # more than an empty frame


def test_without_matplotlib_nothing_is_measured_in_vain(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"exafuse\[bench\]\""):
        plots.check_matplotlib()


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_quick_on_a_cpu(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    file, table, drawings = tmp_path / "r.json", tmp_path / "r.csv", tmp_path / "plots"
    done = run_command(
        [
            *("bench", "--device", "cpu", "--quick"),
            *("--json", str(file), "--csv", str(table), "--png", str(drawings)),
        ],
        timeout=170,
        env={"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    result = results.read(file)
    assert {row.suite for row in result.rows} == {
        *("ops", "attention", "decode", "models", "overhead")
    }
    of_kernels = [row for row in result.rows if row.suite in ("ops", "attention", "decode")]
    assert {row.status for row in of_kernels if row.contender == "exafuse"} == {"ok"}
    assert {row.status for row in of_kernels} <= {"ok", "unsupported"}
    assert {row.contender for row in of_kernels} == {"exafuse", "torch", "sdpa-flash", "sdpa-math"}
    assert all(row.percent and row.ratio for row in of_kernels if row.status == "ok")
    assert len(table.read_text().splitlines()) == len(result.rows) + 1
    drawn = list(drawings.glob("*.png"))
    assert len(drawn) >= 14
    for png in drawn:
        assert png_size(png)[0] > 500, png
    assert f"{len(result.rows)} rows in" in done.stdout
    assert "flash_attn_with_kvcache EXAONE-4.0-32B batch 1, context 512 window 32" in done.stdout


def test_a_run_that_has_become_slower_fails(tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.json"
    monkeypatch.setitem(load("run").CASES, "ops", ("bench_silu_and_mul",))
    command = ["bench", "--device", "cpu", "--quick", "--suite", "ops", "--peers", "torch"]
    assert cli.main([*command, "--json", str(file)]) == 0
    values = json.loads(file.read_text())
    for row, factor in zip(values["rows"], (1e3, 1e3, 1e3, 1e3, 1e3, 1e3, 1e-3, 1e-3), strict=True):
        row["time_us"] *= factor
    file.write_text(json.dumps(values))
    assert cli.main([*command, "--baseline", str(file)]) == 1
    said = capsys.readouterr().out
    assert said.count(" us, was ") == 1
    assert "silu_and_mul EXAONE-4.0-1.2B 16 x 4096: " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tourch"], "--peers: expected some of torch, compile"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cpu", "--minutes", "0"], "--minutes: expected more than 0, got 0.0"),
        (["--device", "cpu", "--baseline", "no.json"], "No such file or directory: 'no.json'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
