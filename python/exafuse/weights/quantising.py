"""Weight-only quantisation of linear layers by torchao, one weight at a time while loading.

What is quantised are the linear layers inside the language model's decoder layers, which hold
nearly all of its weights. Embeddings, the output matrix and other heads, norms, the vision tower
and the draft module keep their dtype: they decide the quality out of proportion to their size.
Activations stay in the model's dtype everywhere.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUANTISATIONS = ("int8", "int4", "fp8")
WORKING_BYTES = 12  # of a weight while it is quantised, beyond itself: copies in fp32
_GROUP_SIZE = 128  # weights of a row that share a scale in int4
_PROBE_SIZE = 1024  # a multiple of what any packed layout rounds up to


class Quantiser:
    """Makes torchao's weights out of plain ones.

    Attributes:
        names: the parameters to quantise.
        what: how the caller named the quantisation, for messages.
    """

    def __init__(self, quantize: Any, model: nn.Module, layers: nn.Module) -> None:
        """
        Args:
            quantize: ``"int8"`` (a scale for each row), ``"fp8"`` (e4m3, likewise), ``"int4"`` (a
                scale and a zero for every 128 weights of a row), or a configuration object of
                torchao that replaces the weights of linear layers.
            model: names the parameters.
            layers: the part of it whose linear layers are quantised.

        Raises:
            ValueError, TypeError: another ``quantize``.
            ImportError: torchao is not installed.
        """
        self._config = _torchao_config(quantize)
        self.what = repr(quantize) if isinstance(quantize, str) else type(quantize).__name__
        inside = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
        self.names = frozenset(
            f"{name}.weight" for name, module in model.named_modules() if id(module) in inside
        )

    def bytes_per_weight(self, dtype: torch.dtype, device: torch.device) -> float:
        """What a weight takes, scales included; measured on a small layer, which is also called.

        Raises:
            ValueError: torchao cannot quantise weights of this dtype on this device, or cannot
                multiply by them.
        """
        if self.what == "'int4'":
            if device.type != "cuda":
                raise ValueError(
                    f"quantize: 'int4' runs on a GPU only (torchao's int4 kernels), got device "
                    f"{device}; 'int8' and 'fp8' run on the CPU too"
                )
            if dtype != torch.bfloat16:
                raise ValueError(
                    f"quantize: 'int4' takes bfloat16 weights only, got {dtype}; "
                    "pass dtype='bfloat16'"
                )
        try:
            plain = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, device=device)
            weight = self("a layer of 1024 x 1024", plain)
            with torch.no_grad():
                F.linear(plain[:2], weight)
        # torchao answers a device or dtype it has no kernel for with any of these.
        except (AssertionError, ImportError, RuntimeError) as error:
            raise ValueError(
                f"quantize: torchao cannot run {self.what} with {dtype} on {device}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return storage_bytes(weight) / weight.numel()

    def __call__(self, name: str, weight: Tensor) -> nn.Parameter:
        """The quantised ``weight [out_features, in_features]``; needs no gradient.

        Raises:
            ValueError: torchao left it as it was, or made more than a weight of it.
        """
        from torchao.quantization import quantize_

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        holder = nn.Sequential(linear)
        quantize_(holder, self._config)
        result: Any = getattr(holder[0], "weight", None)
        if holder[0] is not linear or result is None:
            raise ValueError(
                f"quantize: expected a configuration that replaces weights, {self.what} replaces "
                "the linear layers themselves"
            )
        if not is_quantised(result):
            raise ValueError(
                f"quantize: {self.what} leaves {name} {list(weight.shape)} as it is; expected a "
                "width that its groups of weights divide"
            )
        parameter: nn.Parameter = result.requires_grad_(False)
        if parameter.device.type == "cpu":
            _return_freed_memory()
        return parameter


def _return_freed_memory() -> None:
    """Give the copies that quantising made back to the system. glibc keeps such blocks, and with a
    weight that stays between any two of them they would add up to more than the plain model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _torchao_config(quantize: Any) -> Any:
    if isinstance(quantize, str) and quantize not in QUANTISATIONS:
        raise ValueError(
            f"quantize: expected {', '.join(QUANTISATIONS)} or a torchao configuration, "
            f"got {quantize!r}"
        )
    try:
        from torchao import quantization
        from torchao.core.config import AOBaseConfig
    except ImportError as error:
        raise ImportError(
            f"quantize: needs torchao >= 0.18: pip install 'exafuse[quant]' ({error})"
        ) from error
    if quantize == "int8":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    if quantize == "fp8":
        return quantization.Float8WeightOnlyConfig(set_inductor_config=False)
    if quantize == "int4":
        return quantization.Int4WeightOnlyConfig(
            group_size=_GROUP_SIZE,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    if isinstance(quantize, quantization.FqnToConfig):
        raise ValueError("quantize: expected one configuration for all layers, got FqnToConfig")
    if not isinstance(quantize, AOBaseConfig):
        hint = ""
        if isinstance(getattr(quantize, "quant_type", None), AOBaseConfig):
            hint = "; pass its quant_type"
        raise TypeError(
            f"quantize: expected {', '.join(QUANTISATIONS)} or a torchao configuration, "
            f"got {type(quantize).__name__}{hint}"
        )
    return quantize


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter's values are packed in tensors of another layout."""
    return hasattr(parameter, "__tensor_flatten__")


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a quantised one consists of."""
    if not is_quantised(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(storage_bytes(getattr(tensor, name)) for name in names)


def check_unquantised(model: nn.Module) -> None:
    """Raise a ValueError that says what to save instead if a parameter is quantised."""
    for name, parameter in model.named_parameters():
        if is_quantised(parameter):
            raise ValueError(
                f"{name}: is quantised ({type(parameter).__name__}) and cannot be saved; the "
                "checkpoint that was loaded still holds the weights: load that one again with the "
                "same quantize="
            )
