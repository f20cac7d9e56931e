"""The libraries that are measured beside exafuse: each optional, found at run time."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .results import Peer

GPU, ANY = ("cuda",), ("cpu", "cuda")


@dataclass(frozen=True)
class Library:
    """A peer: its module, the distribution that has its version, the devices it runs on.

    ``slow_on_cpu``: compiles for so long on a CPU that only ``--peers`` brings it there.
    """

    what: str
    module: str = "torch"
    distribution: str = "torch"
    devices: tuple[str, ...] = ANY
    slow_on_cpu: bool = False


PEERS = {
    "torch": Library("plain torch ops, one after the other"),
    "compile": Library("torch.compile of the definition", slow_on_cpu=True),
    "sdpa-flash": Library("torch SDPA, FlashAttention"),
    "sdpa-cudnn": Library("torch SDPA, cuDNN", devices=GPU),
    "sdpa-efficient": Library("torch SDPA, memory-efficient", devices=GPU),
    "sdpa-math": Library("torch SDPA, plain products"),
    "varlen": Library("torch.nn.attention.varlen", "torch.nn.attention.varlen", devices=GPU),
    "flex": Library(
        "FlexAttention, compiled", "torch.nn.attention.flex_attention", slow_on_cpu=True
    ),
    "transformers": Library("transformers' models", "transformers", "transformers"),
    "liger": Library("Liger kernels", "liger_kernel", "liger-kernel", GPU),
    "flashinfer": Library("FlashInfer", "flashinfer", "flashinfer-python", GPU),
    "quack": Library("QuACK", "quack", "quack-kernels", GPU),
    "flash-attn-4": Library("FlashAttention 4", "flash_attn.cute", "flash-attn-4", GPU),
}


def probe(
    device: torch.device,
    wanted: tuple[str, ...] | None,
    find: Callable[[str], object] = importlib.import_module,
) -> dict[str, Peer]:
    """Version of every peer, or why it is not measured; never raises.

    Raises:
        ValueError: ``wanted`` names a peer that does not exist.
    """
    unknown = [name for name in wanted or () if name not in PEERS]
    if unknown:
        raise ValueError(f"peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    return {name: _probe(name, library, device, wanted, find) for name, library in PEERS.items()}


def _probe(
    name: str,
    library: Library,
    device: torch.device,
    wanted: tuple[str, ...] | None,
    find: Callable[[str], object],
) -> Peer:
    if wanted is not None and name not in wanted:
        return Peer(problem="not asked for")
    if device.type not in library.devices:
        return Peer(problem=f"runs on {', '.join(library.devices)} only")
    if device.type == "cpu" and library.slow_on_cpu and wanted is None:
        return Peer(problem="compiles for long on a CPU: name it in --peers to have it")
    try:
        if importlib.util.find_spec(library.module.partition(".")[0]) is None:
            return Peer(problem="not installed")
        find(library.module)
        return Peer(version=importlib.metadata.version(library.distribution))
    except Exception as error:  # a broken install of somebody else's must not end the run
        return Peer(problem=f"cannot be imported ({type(error).__name__}: {error})")
