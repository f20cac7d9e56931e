"""The emulator and the formulas agree about each instruction of sm_90a; so does a GPU, if there is
one."""

from __future__ import annotations

import hopper_probes
import pytest
import torch
from hopper_probes import Probes, panels, swizzled

ALL = dict(hopper_probes.all_probes())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("emulated", marks=pytest.mark.emulated),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def probes(request: pytest.FixtureRequest) -> Probes:
    if request.param == "emulated":
        return Probes(hopper_probes.emulated_library(), "emulated")
    problem = hopper_probes.gpu_problem()
    if problem:
        pytest.skip(problem)
    return Probes(hopper_probes.compile_library(), "cuda")


@pytest.mark.parametrize("name", ALL)
def test_instruction_does_what_its_formula_says(probes: Probes, name: str) -> None:
    assert ALL[name](probes) == ""


def test_swizzle_permutes_the_chunks_of_each_row() -> None:
    rows = torch.arange(16 * 64, dtype=torch.int16).reshape(16, 64)
    image = swizzled(rows)
    flat = image.flatten()
    for row in range(16):
        for column in range(64):
            address = row * 128 + column * 2
            assert flat[(address ^ (address >> 3 & 0x70)) // 2] == rows[row, column]
    assert torch.equal(swizzled(image), rows)  # its own inverse


def test_panels_lie_one_behind_the_other() -> None:
    matrix = torch.arange(8 * 96, dtype=torch.int16).reshape(8, 96)
    image = panels(matrix).reshape(2, 8, 64)
    assert torch.equal(swizzled(image[0]), matrix[:, :64])
    assert torch.equal(swizzled(image[1])[:, :32], matrix[:, 64:])
    assert not image[1, 0, 32:].any()


def test_a_wrong_element_is_named() -> None:
    wanted = torch.zeros(4, 4)
    got = wanted.clone()
    got[2, 3] = 5
    problem = hopper_probes.difference(got, wanted)
    assert "1 of 16" in problem
    assert "[2, 3]: expected 0.0, got 5.0" in problem
    assert hopper_probes.difference(wanted, wanted) == ""


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["hopper_probes.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper_probes.main() == hopper_probes.REFUSED
    assert "no GPU here" in capsys.readouterr().err
