"""The emulator's controls: schedule, seed, GPU, arithmetic; and which kernels it launched."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SCHEDULES = ("forward", "reverse", "random")
LANDINGS = ("latest", "early", "random")


class LaunchRecord(NamedTuple):
    """One kernel launch as it happened."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int


class Counts(NamedTuple):
    """What the blocks of one launch did together; see struct Counts in core/state.h."""

    mma: int
    global_read: int
    global_written: int
    shared_read: int
    shared_written: int
    barriers: int
    atomics: int


class Emulator:
    """The controls of one loaded extension (``_C_emulated.so`` or ``_honesty.so``)."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.exafuse_emulator_num_launches.restype = ctypes.c_uint64
        self._library.exafuse_emulator_launch.argtypes = [
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]

    def set(self, name: str, value: object) -> None:
        """``schedule`` forward|reverse|random, ``seed`` (int), ``gpu`` sm_80 (the default)|sm_90|
        sm_90_small, ``approx`` perturbed|exact, ``mma`` single|double, ``landing``
        latest|early|random (when copies of boxes arrive), ``slow_warp`` chance|none|(int): a warp
        that runs when no other can; by chance in the random schedule."""
        if self._library.exafuse_emulator_set(name.encode(), str(value).encode()) != 0:
            raise ValueError(f"the emulator does not know {name}={value}")

    @contextmanager
    def schedule(
        self, name: str, seed: int = 1, landing: str = "latest", slow_warp: int | str = "chance"
    ) -> Iterator[None]:
        """Runs the block's threads in another order inside the ``with``."""
        self.set("schedule", name)
        self.set("seed", seed)
        self.set("landing", landing)
        self.set("slow_warp", slow_warp)
        try:
            yield
        finally:
            self.set("schedule", "forward")
            self.set("seed", 1)
            self.set("landing", "latest")
            self.set("slow_warp", "chance")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what launches do inside the ``with``; :meth:`counts` says it."""
        self.set("count", "on")
        try:
            yield
        finally:
            self.set("count", "off")

    def counts(self) -> list[Counts]:
        """One entry a launch, in the order of :meth:`launches`; zeros where nobody counted."""
        numbers = (ctypes.c_uint64 * len(Counts._fields))()
        found = []
        for i in range(max(0, self.num_launches() - 4096), self.num_launches()):
            if self._library.exafuse_emulator_counts(ctypes.c_uint64(i), numbers) != 0:
                raise IndexError(f"the emulator has no launch {i}")
            found.append(Counts(*numbers))
        return found

    def num_launches(self) -> int:
        """How many kernels were launched since the library was loaded or the list was cleared."""
        return int(self._library.exafuse_emulator_num_launches())

    def clear_launches(self) -> None:
        self._library.exafuse_emulator_clear_launches()

    def launches(self) -> list[LaunchRecord]:
        """The launches so far, oldest first; of more than 4,096 the newest."""
        text = ctypes.create_string_buffer(4096)
        records = []
        for i in range(max(0, self.num_launches() - 4096), self.num_launches()):
            if self._library.exafuse_emulator_launch(i, text, len(text)) != 0:
                raise IndexError(f"the emulator has no launch {i}")
            name, *numbers = text.value.decode().rsplit("|", 7)
            n = [int(number) for number in numbers]
            records.append(LaunchRecord(name, (n[0], n[1], n[2]), (n[3], n[4], n[5]), n[6]))
        return records
