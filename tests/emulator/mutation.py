"""Applies a defect to a copy of csrc/, builds the extension of it, and runs who must notice.

Objects that a defect does not touch are taken from the finished build of the variant; only kernels
that include the changed file are compiled again, with the variant's own commands. Who noticed a
mutant the last time is asked first; then come the quick tests, then the others that may notice, of
which those marked `sanitized` alone where a file has any.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple

import kernel_tests

from emulator import build, sanitizers

sys.path.append(str(build.ROOT / "cmake"))

import kernel_hash

CSRC = build.ROOT / "csrc"
TESTS = build.ROOT / "tests"
# Checks of arguments are tested by these, whatever the kernel.
HOST_TESTS = (
    "test_bad_arguments.py",
    "test_bad_memory.py",
    "test_bad_gradients.py",
    "test_ops.py",
)
VARIANT_OF_CHECK = {"plain": "plain", "asan": "asan", "tsan": "tsan"}
TEST_LIMIT_S = 150


class Mutant(NamedTuple):
    """One defect: `find` in `file` (below csrc/) becomes `replace`; `check` must notice.

    Of a header that several kernels include, `kernel` ("attention/decode") may name the one that
    is built and tested.
    """

    file: str
    name: str
    find: str
    replace: str
    check: str = "plain"
    kernel: str = ""


class Verdict(NamedTuple):
    """What became of a mutant: "killed" by something, "survived", or "broken" (no valid patch)."""

    mutant: Mutant
    outcome: str
    by: str
    seconds: float


def apply(mutant: Mutant, text: str) -> str:
    """The mutated source; ValueError unless `find` stands exactly once (white space aside)."""
    pattern = re.compile(r"\s+".join(re.escape(word) for word in mutant.find.split()))
    found = pattern.findall(text)
    if len(found) != 1:
        raise ValueError(f"{mutant.file}: '{mutant.name}': found {len(found)} times: {mutant.find}")
    return pattern.sub(lambda _: mutant.replace, text)


def source_hash(file: str) -> str:
    """Hash of a source file below csrc/ and all headers it includes; see kernel_hash.py."""
    return kernel_hash.source_hash(file, CSRC)


@cache
def kernels_with(file: str) -> list[str]:
    """The kernels (paths below csrc/kernels without `.cu`) that are the file, or include it."""
    sources = {path.relative_to(CSRC).as_posix() for path in CSRC.glob("kernels/**/*.cu")}
    found = [name for name in sources if file in kernel_hash.includes(name, CSRC)]
    return sorted(name.removeprefix("kernels/").removesuffix(".cu") for name in found)


def kernels_of(mutant: Mutant) -> list[str]:
    """The kernels that a mutant is built into.

    The attention kernels take long to compile and test, and gradients come on top of the ops: a
    header that others include as well is judged by the others.
    """
    if mutant.kernel:
        return [mutant.kernel]
    kernels = kernels_with(mutant.file)
    slower = ("attention/*", "*_backward", "sum_partials")
    quick = [k for k in kernels if not any(fnmatch(k, pattern) for pattern in slower)]
    return quick or kernels


def corners_for(mutant: Mutant) -> list[str]:
    """Test files of a few seconds that may notice a mutant."""
    names = (kernel_tests.corner_tests_of(kernel) for kernel in kernels_of(mutant))
    return [str(TESTS / name) for name in dict.fromkeys(names)]


def tests_for(mutant: Mutant) -> list[str]:
    """Test files that may notice a mutant, the likeliest first."""
    kernels = kernels_of(mutant)
    listed = (kernel_tests.mutant_tests_of(kernel) for kernel in kernels)
    files = list(dict.fromkeys(name for names in listed for name in names))
    is_host = mutant.file.endswith(".h") or "check_" in mutant.find or "is_aligned" in mutant.find
    if is_host:
        files = [*HOST_TESTS, *files]
    elif not all(kernel.startswith("attention/") for kernel in kernels):
        files = [*files, *HOST_TESTS]
    paths = [*corners_for(mutant), *(str(TESTS / name) for name in files)]  # the quickest first
    return [path for path in dict.fromkeys(paths) if Path(path).exists()]


class Workshop:
    """A folder with a copy of csrc/ in which one mutant after the other is built and judged.

    `killers` says which test noticed a mutant before, by file and name.
    """

    def __init__(self, folder: Path, killers: dict[tuple[str, str], str]) -> None:
        self.folder = folder
        self.killers = killers
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CSRC, folder / "csrc")

    def judge(self, mutant: Mutant) -> Verdict:
        """Builds the mutant and runs its check."""
        start = time.monotonic()
        copy = self.folder / "csrc" / mutant.file
        try:
            copy.write_text(apply(mutant, (CSRC / mutant.file).read_text()))
            library = self.compile(kernels_of(mutant), VARIANT_OF_CHECK[mutant.check])
        except (ValueError, subprocess.CalledProcessError) as error:
            output = getattr(error, "stderr", "") or str(error)
            return Verdict(mutant, "broken", output[:2000], time.monotonic() - start)
        finally:
            shutil.copy(CSRC / mutant.file, copy)
        try:
            by = self.check(mutant, library)
        except subprocess.TimeoutExpired:  # under a sanitizer that is slow by itself
            by = None
        outcome = "survived" if by is None else "killed"
        return Verdict(mutant, outcome, by or "", time.monotonic() - start)

    def compile(self, kernels: list[str], variant: str) -> Path:
        """The extension with these kernels compiled from the copy."""
        built = build.folder_of(variant)
        commands = json.loads((built / "compile_commands.json").read_text())
        # The new objects come first: of an inline function in several, the linker takes the first.
        objects: list[str] = []
        rebuilt = 0
        changed = {str(CSRC / "kernels" / f"{kernel}.cu") for kernel in kernels}
        for command in commands:
            output = Path(command["directory"]) / command["output"]
            if "_honesty" in command["output"] or "_hopper_probes" in command["output"]:
                continue
            if command["file"] not in changed:
                objects.append(str(output))
                continue
            source = self.folder / "csrc" / Path(command["file"]).relative_to(CSRC)
            target = self.folder / f"{source.stem}.{variant}.o"
            words = command["command"].split()
            words = [word.replace(f"-I{CSRC}", f"-I{self.folder}/csrc") for word in words]
            words = [word for word in words if word not in ("-g", "-g1")]
            words[words.index("-o") + 1] = str(target)
            words[words.index("-c") + 1] = str(source)
            words += ["-O1", "-w"]
            subprocess.run(words, check=True, capture_output=True, text=True)
            objects.insert(rebuilt, str(target))
            rebuilt += 1
        library = self.folder / variant / "_C_emulated.so"
        library.parent.mkdir(exist_ok=True)
        flags = {"asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}
        link = ["g++", "-shared", "-o", str(library), *objects, *flags.get(variant, [])]
        subprocess.run(link, check=True, capture_output=True, text=True)
        return library

    def check(self, mutant: Mutant, library: Path) -> str | None:
        """What noticed the defect, or None."""
        if mutant.check == "tsan":
            return self._race_cases(mutant, library)
        if mutant.check == "asan":
            return self._tests_under_asan(mutant, library)
        log = self.folder / "tests.log"
        killer = self.killers.get((mutant.file, mutant.name))
        if killer and (by := run_tests([killer], library, log)):
            return by
        tests = tests_for(mutant)
        return run_tests(tests, library, log, subset=True)

    def _race_cases(self, mutant: Mutant, library: Path) -> str | None:
        environment = sanitizers.environment("tsan")
        environment["PYTHONPATH"] = f"{library.parent}{os.pathsep}{environment['PYTHONPATH']}"
        program = [str(TESTS / "emulator" / "race_cases.py"), "--cases", "40"]
        for op in dict.fromkeys(op for k in kernels_of(mutant) for op in kernel_tests.ops_of(k)):
            program += ["--op", op]
        done = subprocess.run(
            [*sanitizers.prefix("tsan"), sys.executable, *program, "--schedule", "random"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TEST_LIMIT_S,
            check=False,
        )
        return None if done.returncode == 0 else "race_cases.py under TSan"

    def _tests_under_asan(self, mutant: Mutant, library: Path) -> str | None:
        environment = sanitizers.environment("asan")
        environment["EXAFUSE_EMULATED_LIB"] = str(library)
        environment["EXAFUSE_TEST_SUBSET"] = "sanitized"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *_pytest_arguments(), *tests_for(mutant)],
            env=environment,
            cwd=build.ROOT,
            capture_output=True,
            text=True,
            timeout=TEST_LIMIT_S,
            check=False,
        )
        return None if done.returncode == 0 else "the kernel tests under ASan"


def _pytest_arguments() -> list[str]:
    options = ["-x", "-q", "-m", "not gpu", "-p", "no:cacheprovider", "--no-header"]
    # pytest's own limit is a Python signal handler: a kernel that never returns outlasts it.
    return [*options, "-o", "timeout=0"]


def _status_of(child: int) -> int | None:
    """What waitpid says of a child; None if it had to be killed because it passed the limit."""
    deadline = time.monotonic() + TEST_LIMIT_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(tests: list[str], library: Path, log: Path, subset: bool = False) -> str | None:
    """Runs pytest in a fork of this process, which has torch loaded; the test that failed, or None.

    A crash or a run beyond the limit counts as noticed, too; tests that do not exist do not.
    `subset`: of files that mark some of their tests as `sanitized`, these alone.
    """
    import pytest
    import torch

    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(build.ROOT)
        os.environ["EXAFUSE_EMULATED_LIB"] = str(library)
        os.environ["EXAFUSE_TEST_SUBSET"] = "sanitized" if subset else ""
        sys.path[:0] = [str(TESTS), str(build.ROOT / "python")]
        code = 3
        try:
            code = int(pytest.main([*_pytest_arguments(), *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = _status_of(child)
    if status is None:
        return "the time limit"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    if os.WEXITSTATUS(status) in (0, 4, 5):  # passed; no such test; none selected
        return None
    # Names of tests may hold blanks; behind " - " comes the message.
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", log.read_text(), re.MULTILINE)
    return found[1] if found else f"pytest, exit status {os.WEXITSTATUS(status)}"


def variants_of(mutants: list[Mutant]) -> Iterator[str]:
    """The builds that a list of mutants needs."""
    yield from dict.fromkeys(VARIANT_OF_CHECK[mutant.check] for mutant in mutants)
