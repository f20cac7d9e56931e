"""The machine code of the sm_90a prefill kernel: every variant does its products in groups, waits
for them where the source says, and computes its exponentials beneath them. What undoes that shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import compiled_kernels
import pytest
import sass_sm90
from sass_sm90 import KERNEL, SOURCE, Listing, Variant, complaints, findings, listings

# Template arguments of the variant that is compiled with a defect.
PLANTED = "__nv_bfloat16, 128, 128, 128"
VARIANT = Variant("bf16", 128, 128, 128)
HOST_PART = "// --- host ---"


@dataclass(frozen=True)
class Compiled:
    """What became of one source: ptxas's words, and the kernels by readable name."""

    output: str
    kernels: dict[str, Listing]


def compiled(source: Path, cubin: Path) -> Compiled:
    try:
        output = sass_sm90.compile_source(source, cubin)
        return Compiled(output, listings(cubin))
    except compiled_kernels.ToolMissing as missing:
        return pytest.skip(str(missing))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The source as it is, every variant of it."""
    return compiled(SOURCE, tmp_path_factory.mktemp("sm90") / "prefill.cubin")


def variants_in_the_source() -> set[Variant]:
    """From the lines that offer tiles to the dispatch: some for every head, some for one."""
    text = SOURCE.read_text(encoding="utf-8")
    body = text[text.index("void dispatch_tile") : text.index("PrefillTile prefill_tile_sm90")]
    cols: tuple[int, ...] = (64, 96, 128)
    found = set()
    for line in body.splitlines():
        if match := re.search(r"kCols == (\d+)", line):
            cols = (int(match[1]),)
        elif "} else {" in line:
            cols = (128,)
        elif match := re.search(r"offer\(cols, ValueTag<(\d+)>\{\}, ValueTag<(\d+)>", line):
            tile = (int(match[1]), int(match[2]))
            found |= {Variant(dtype, c, *tile) for dtype in ("bf16", "fp16") for c in cols}
    return found


@pytest.mark.slow
def test_every_variant_overlaps_as_the_source_says(whole: Compiled) -> None:
    assert complaints(whole.output) == []
    wrong = []
    for name, listing in whole.kernels.items():
        print(sass_sm90.line_of(Variant.of(name), listing))
        wrong += [f"{name}: {finding}" for finding in findings(Variant.of(name), listing)]
    assert wrong == []


@pytest.mark.slow
def test_every_tile_is_compiled_for_both_types(whole: Compiled) -> None:
    assert {Variant.of(name) for name in whole.kernels} == variants_in_the_source()
    assert len(whole.kernels) >= 14


def test_the_extension_holds_the_same_code() -> None:
    binary = compiled_kernels.installed_extension()
    if binary is None:
        pytest.skip("the extension is not built here: make install")
    try:
        kernels = listings(binary)
    except compiled_kernels.ToolMissing as missing:
        pytest.skip(str(missing))
    # Whatever else it was built for, this kernel is built for sm_90a.
    assert {Variant.of(name) for name in kernels} == variants_in_the_source()
    wrong = [
        f"{name}: {finding}"
        for name, listing in kernels.items()
        for finding in findings(Variant.of(name), listing)
    ]
    assert wrong == []


# ---- the gate itself -----------------------------------------------------------------------------

WAIT_WITH_BRANCH = """\
        if (tile > active.begin) {
          ptx::mbarrier_wait(barrier_at(shared.full_k, stage_of(item + 1)), parity_of(item + 1));
        }
        queries.wait_for_out();
"""
BETWEEN_GROUPS = """\
        pass_turn(consumer);
        queries.template wait_for_scores<1>();
"""


def planted(folder: Path, *edits: tuple[str, str]) -> Compiled:
    """One variant of the source after edits, each of a text that it holds once."""
    text = SOURCE.read_text(encoding="utf-8")
    text = text[: text.index(HOST_PART)]
    for role in ("producer", "consumer"):  # their headers in place of their names
        header = SOURCE.with_name(f"prefill_sm90_{role}.cuh")
        inclusion = f'#include "kernels/attention/{header.name}"\n'
        assert inclusion in text
        text = text.replace(
            inclusion, header.read_text(encoding="utf-8").replace("#pragma once", "")
        )
    for old, new in edits:
        assert text.count(old) == 1, f"the source has changed: {text.count(old)} of {old!r}"
        text = text.replace(old, new)
    text += f"template __global__ void {KERNEL}<{PLANTED}>(\n"
    text += "    const __grid_constant__ PrefillSm90Params);\n}\n}\n"
    (folder / SOURCE.name).write_text(text, encoding="utf-8")
    return compiled(folder / SOURCE.name, folder / "planted.cubin")


def only(result: Compiled) -> Listing:
    (listing,) = result.kernels.values()
    return listing


def test_the_variant_without_a_defect_is_clean(tmp_path: Path) -> None:
    result = planted(tmp_path)
    assert complaints(result.output) == []
    assert findings(VARIANT, only(result)) == []


def test_a_serialisation_is_seen(tmp_path: Path) -> None:
    # The output is touched while products still add to it.
    result = planted(tmp_path, (BETWEEN_GROUPS, f"queries.rescale_out();\n{BETWEEN_GROUPS}"))
    listing = only(result)
    assert complaints(result.output) != []
    assert len(listing.waits) > 16
    found = "\n".join(findings(VARIANT, listing))
    assert "starts of groups (WARPGROUP.ARRIVE): expected 4" in found
    assert "waits for products (WARPGROUP.DEPBAR): expected (0, 1, 0, 0)" in found


def test_a_wait_drawn_above_the_softmax_is_seen(tmp_path: Path) -> None:
    # Without a branch between them ptxas moves the second wait up to the first.
    result = planted(tmp_path, (WAIT_WITH_BRANCH, "        queries.wait_for_out();\n"))
    listing = only(result)
    assert complaints(result.output) == []  # it says nothing
    assert listing.waits == (0, 1, 0, 0)
    assert listing.beneath() != [66]
    assert any(line.startswith("exponentials beneath") for line in findings(VARIANT, listing))


def test_too_few_registers_are_seen(tmp_path: Path) -> None:
    result = planted(tmp_path, ("kConsumers == 2 ? 232 : 160", "kConsumers == 2 ? 152 : 160"))
    found = "\n".join(findings(VARIANT, only(result)))
    assert "local memory (STL, LDL): expected 0" in found


def test_a_copy_by_one_thread_of_many_is_seen(tmp_path: Path) -> None:
    # Then the compiler does not know that the operands are the same in the whole warp.
    result = planted(
        tmp_path,
        ("if (warp > 0) {\n", "if (threadIdx.x > 0 && threadIdx.x != 64) {\n"),
        ("else if (ptx::elect_one())", "else"),
    )
    assert any("BRA.U.ANY" in line for line in findings(VARIANT, only(result)))


LINES = """\
        /*0010*/                   HGMMA.64x96x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;  /* 0x1 */
        /*0020*/              @!P0 WARPGROUP.DEPBAR.LE gsb0, 0x1 ;                       /* 0x2 */
        /*0030*/                   MUFU.EX2 R7, R201 ;                                   /* 0x3 */
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                       /* 0x4 */
        /*0050*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0 ;              /* 0x5 */
        /*0060*/                   @P1 BRA.U.ANY UP0, 0x40 ;                             /* 0x6 */
        /*0070*/                   DEPBAR.LE SB0, 0x0 ;                                  /* 0x7 */
        /*0080*/                   BRA 0x80;                                             /* 0x8 */
"""


def test_a_listing_is_read() -> None:
    listing = Listing.of(LINES.splitlines())
    assert listing.products == {"64x96x16": 1}
    assert listing.waits == (1, 0)  # not the wait for a copy's group
    assert listing.exponentials == (0, 1, 0)
    assert listing.beneath() == [1]
    assert listing.registers == (160,)
    assert listing.highest_register == 201
    assert listing.count("BRA") == 2
    found = "\n".join(findings(Variant("bf16", 96, 192, 96), listing))
    for what in ("products", "groups", "waits", "exponentials", "setmaxnreg", "BRA.U.ANY"):
        assert what in found


def test_names_say_the_variant() -> None:
    name = f"prefill_sm90: {KERNEL}<fp16, 64, 192, 128>"
    assert Variant.of(name) == Variant("fp16", 64, 192, 128)
    assert Variant.of(name).consumers == 3
    with pytest.raises(LookupError, match="expected prefill_sm90_kernel<"):
        Variant.of("prefill_sm80: prefill_sm80_kernel<fp16, 64>")
