"""Parameters while a checkpoint is read into them: their memory, and how much it will be."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from exafuse.weights.quantising import WORKING_BYTES, Quantiser


class Target:
    """A parameter to be. Its memory is taken when the first of its tensors is read, and given up
    for that of the quantised weight after the last.

    Attributes:
        missing: tensors of the checkpoint that are still to come.
    """

    def __init__(
        self,
        name: str,
        old: nn.Parameter,
        dtype: torch.dtype,
        device: torch.device,
        quantiser: Quantiser | None,
    ) -> None:
        self.missing = 0
        self._name, self._old, self._dtype, self._device = name, old, dtype, device
        self._quantiser = quantiser if quantiser is not None and name in quantiser.names else None
        self._quantised: nn.Parameter | None = None

    @cached_property
    def values(self) -> Tensor:
        """What is read, in the shape and dtype of the parameter."""
        return torch.empty(self._old.shape, dtype=self._dtype, device=self._device)

    def read_one(self) -> None:
        """One tensor less is missing."""
        self.missing -= 1
        if self._quantiser is not None and not self.missing:
            self._quantised = self._quantiser(self._name, self.values)
            del self.values

    def parameter(self) -> nn.Parameter:
        """The parameter, once nothing is missing."""
        if self._quantised is not None:
            return self._quantised
        return nn.Parameter(self.values, self._old.requires_grad)


def needed_bytes(
    parameters: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    quantiser: Quantiser | None,
) -> tuple[int, str]:
    """Bytes that loading takes at most, and what they are taken for."""
    quantised = [] if quantiser is None else [parameters[n].numel() for n in quantiser.names]
    plain = sum(parameter.numel() for parameter in parameters.values()) - sum(quantised)
    num_bytes = plain * dtype.itemsize
    if quantiser is None or not quantised:
        return num_bytes, f"the weights in {dtype}"
    packed = sum(quantised) * quantiser.bytes_per_weight(dtype, device)
    working = max(quantised) * (dtype.itemsize + WORKING_BYTES)
    return num_bytes + int(packed) + working, f"the weights quantised as {quantiser.what}"
