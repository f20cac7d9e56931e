"""Which tests are about which kernel source, for everything that runs tests by kernel.

A kernel is named by its path below csrc/kernels without `.cu`. By itself csrc/kernels/<name>.cu is
tested by tests/test_<name>.py; the attention kernels, several sources behind one op, are listed.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

TESTS = Path(__file__).resolve().parent
KERNEL_FOLDER = TESTS.parent / "csrc" / "kernels"

_PREFILL = ("test_flash_attn.py", "test_flash_attn_with_kvcache.py")
_DECODE = ("test_flash_attn_with_kvcache.py",)
_VISION = ("test_vision_attn.py",)
_EVERY_ATTENTION = ("test_attention_needles.py", "test_attention_visible.py")
# Patterns of kernels; the first that fits says. The op's own tests come first.
_LISTED = (
    ("attention/vision*", _VISION),
    ("attention/decode*", _DECODE),
    ("attention/combine*", _DECODE),
    ("attention/append*", _DECODE),
    ("attention/*kvcache", _DECODE),
    ("attention/prefill_sm90", ("test_prefill_sm90.py",)),
    ("attention/prefill", ("test_prefill_sm90.py", *_PREFILL)),
    ("attention/*", _PREFILL),
    ("sum_partials", ("test_rms_norm_backward.py",)),
)
# What bindings.cpp exports of each kernel, where that is not what the test files are called.
_OPS = (
    ("attention/vision*", ("vision_attn",)),
    ("attention/decode*", ("flash_attn_with_kvcache",)),
    ("attention/combine*", ("flash_attn_with_kvcache",)),
    ("attention/append*", ("flash_attn_with_kvcache",)),
    ("attention/*kvcache", ("flash_attn_with_kvcache",)),
    ("attention/*", ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")),
    ("qk_norm_rope", ("qk_norm_rope", "qk_norm_rope_cache", "apply_rope")),
    ("rms_norm", ("rms_norm", "add_rms_norm", "rms_norm_add")),
    ("rms_norm_backward", ("rms_norm_backward", "add_rms_norm_backward")),
    ("sum_partials", ("rms_norm_backward", "add_rms_norm_backward")),
)


def _first(patterns: tuple[tuple[str, tuple[str, ...]], ...], kernel: str) -> tuple[str, ...]:
    return next((found for pattern, found in patterns if fnmatch(kernel, pattern)), ())


def all_kernels() -> list[str]:
    """Every kernel source, sorted."""
    paths = KERNEL_FOLDER.rglob("*.cu")
    return sorted(p.relative_to(KERNEL_FOLDER).with_suffix("").as_posix() for p in paths)


def tests_of(kernel: str) -> tuple[str, ...]:
    """The kernel's test files, by name; they need not exist."""
    return _first(_LISTED, kernel) or (f"test_{Path(kernel).name}.py",)


def environment_of(kernel: str) -> dict[str, str]:
    """What makes a GPU that has another kernel for the same calls take this one."""
    return {"EXAFUSE_ATTENTION": "sm80"} if kernel == "attention/prefill_sm80" else {}


def corner_tests_of(kernel: str) -> str:
    """The test file of a few seconds that goes through the kernel in all ways."""
    if fnmatch(kernel, "attention/vision*"):
        return "test_kernel_corners_vision.py"
    if kernel == "attention/prefill_sm90":
        return "test_kernel_corners_sm90.py"
    if kernel.startswith("attention/"):
        return "test_kernel_corners_attention.py"
    if kernel.endswith("_backward") or kernel == "sum_partials":
        return tests_of(kernel)[0]
    return "test_kernel_corners.py"


def mutant_tests_of(kernel: str) -> tuple[str, ...]:
    """The test files that may notice a defect of the kernel: its own, and those of several ops."""
    if kernel == "attention/prefill_sm90":
        return tests_of(kernel)
    if kernel.startswith("attention/") and not fnmatch(kernel, "attention/vision*"):
        return (*tests_of(kernel), *_EVERY_ATTENTION)
    return tests_of(kernel)


def ops_of(kernel: str) -> tuple[str, ...]:
    """The functions of the extension that launch the kernel."""
    return _first(_OPS, kernel) or (Path(kernel).name,)


def all_tests() -> list[str]:
    """The test files of all kernels, each once, sorted."""
    return sorted({file for kernel in all_kernels() for file in tests_of(kernel)})
