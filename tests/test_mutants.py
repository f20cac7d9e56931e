"""The list of mutants fits the kernels, and its record says that nearly all of them are noticed."""

from __future__ import annotations

import kernel_tests
import mutants
import pytest
from emulator import build, mutation


def test_every_mutant_is_a_valid_and_different_patch() -> None:
    listed = mutants.read_list()
    assert len({(mutant.file, mutant.name) for mutant in listed}) == len(listed)
    assert len(listed) >= 80
    for mutant in listed:
        source = (build.ROOT / "csrc" / mutant.file).read_text()
        assert mutation.apply(mutant, source) != source
        assert mutant.check in mutation.VARIANT_OF_CHECK
        assert mutation.kernels_with(mutant.file), f"{mutant.file} is in no kernel"
        if mutant.kernel:
            assert mutant.kernel in mutation.kernels_with(mutant.file)


def test_every_kernel_file_has_mutants() -> None:
    kernels = {str(p.relative_to(mutation.CSRC)) for p in mutation.CSRC.glob("kernels/**/*.cu")}
    assert kernels <= {mutant.file for mutant in mutants.read_list()}


def test_the_record_counts_enough_killed_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    record = mutants.read_record()
    listed = mutants.read_list()
    assert record.keys() <= {mutant.file for mutant in listed}
    total = sum(len(entry["killed"]) + len(entry["survived"]) for entry in record.values())
    killed = sum(len(entry["killed"]) for entry in record.values())
    stale = list(dict.fromkeys(mutant.file for mutant in mutants.without_verdict(listed)))
    with capsys.disabled():
        print(f"\nmutants: {killed} of {total} killed", end="")
        print(f"; changed since: {', '.join(stale)}" if stale else "", end="")
    assert killed >= mutants.MIN_KILLED * total


@pytest.mark.parametrize(
    ("find", "times"), [("ptx::griddep_wait();", 2), ("not in the file at all", 0)]
)
def test_a_patch_that_fits_no_or_two_places_is_refused(find: str, times: int) -> None:
    text = "  ptx::griddep_wait();\n  ptx::griddep_wait();\n"
    with pytest.raises(ValueError, match=f"found {times} times"):
        mutation.apply(mutation.Mutant("a.cu", "name", find, ""), text)


def test_a_common_header_is_judged_without_the_attention_kernels() -> None:
    assert mutation.kernels_of(mutants.Mutant("common/check.h", "", "", "")) == [
        "qk_norm_rope",
        "rms_norm",
        "silu_and_mul",
    ]
    named = mutants.Mutant("common/check.h", "", "", "", "plain", "attention/decode")
    assert mutation.kernels_of(named) == ["attention/decode"]


def test_every_kernel_source_has_test_files() -> None:
    for kernel in kernel_tests.all_kernels():
        for name in kernel_tests.tests_of(kernel):
            assert (kernel_tests.TESTS / name).exists(), f"{kernel}: there is no tests/{name}"
        exported = (mutation.CSRC / "bindings.cpp").read_text()
        for op in kernel_tests.ops_of(kernel):
            assert f'm.def("{op}"' in exported, f"{kernel}: there is no op {op}"
