"""What two runs of the same weights may differ by, and the report on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exafuse.config import LayerPlan, ModelConfig
from exafuse.verify_sides import Trace

# fp32: error of a logit relative to the largest logit; relative L2 error of a layer's output.
FP32_LOGIT_LIMIT = 2e-5
FP32_LAYER_LIMIT = 1e-5
# Below this gap between the two best logits (or twice the error allowed) either may win.
TIE_GAP = 1e-4
# bf16 and fp16: multiples of the other side's own error against fp32.
KL_RATIO, KL_FLOOR = 1.1, 1e-6
LOGIT_RATIO = 1.25
LAYER_RATIO = 1.5


@dataclass(frozen=True)
class LayerError:
    """Relative L2 error of one layer's output and the most it may be."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Report:
    """The outcome of one comparison. ``failures`` says in words what went over a limit."""

    model: str
    side: str
    against: str
    dtype: str
    device: str
    num_prompt_tokens: int
    num_tokens: int
    layers: tuple[LayerError, ...]
    max_logit: float
    logit_error: float
    logit_limit: float
    kl: float
    kl_limit: float | None
    top1_agreement: float
    greedy_prefix: int
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def first_diverging_layer(self) -> str | None:
        """The name of the first layer over its limit; None if every layer is within."""
        return next((layer.name for layer in self.layers if not layer.ok), None)

    @property
    def worst_layer(self) -> LayerError:
        """The layer nearest to, or farthest beyond, its limit."""
        return max(self.layers, key=lambda layer: _ratio(layer.error, layer.limit))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = dataclasses.asdict(self)
        values["layers"] = [dataclasses.asdict(layer) | {"ok": layer.ok} for layer in self.layers]
        return {
            "schema": 1,
            "ok": self.ok,
            "first_diverging_layer": self.first_diverging_layer,
            **values,
        }

    def summary(self) -> str:
        """One line."""
        verdict = "agrees with" if self.ok else "DIFFERS from"
        return (
            f"{self.model}: {self.side} {verdict} {self.against} in {self.dtype}: worst layer"
            f" {self.worst_layer.error:.1e}, logits {self.logit_error:.1e} of {self.max_logit:.1f},"
            f" greedy {self.greedy_prefix}/{self.num_tokens}"
        )

    def __str__(self) -> str:
        rule = "relative L2 error" if self.dtype == "float32" else "relative L2 error against fp32"
        worst = self.worst_layer
        lines = [
            f"{self.model}: {self.side} against {self.against}, {self.dtype} on {self.device}",
            f"  {self.num_prompt_tokens} prompt tokens, {self.num_tokens} greedy tokens",
            f"  layers           worst {rule} {worst.error:.2e}, limit {worst.limit:.2e}"
            f" ({worst.name})",
            f"  logits           largest error {self.logit_error:.2e}, limit"
            f" {self.logit_limit:.2e} (largest logit {self.max_logit:.2f})",
            f"  KL divergence    {self.kl:.2e} nat"
            + ("" if self.kl_limit is None else f", limit {self.kl_limit:.2e}"),
            f"  top-1 agreement  {100 * self.top1_agreement:.2f} %",
            f"  greedy prefix    {self.greedy_prefix} of {self.num_tokens} tokens equal",
            *(f"  note: {note}" for note in self.notes),
        ]
        if not self.ok:
            lines.append(f"  layers, {rule}:")
            lines += [
                f"    {layer.error:.2e} {'     ' if layer.ok else 'OVER '} {layer.name}"
                for layer in self.layers
            ]
        lines += [f"  FAILED: {failure}" for failure in self.failures]
        return "\n".join(lines if self.failures else [*lines, "  OK"])


def compare_fp32(ours: Trace, other: Trace, config: ModelConfig, **about: Any) -> Report:
    layers = tuple(
        LayerError(name, _relative_l2(a, b), FP32_LAYER_LIMIT)
        for name, a, b in zip(_layer_names(config), ours.hidden, other.hidden, strict=True)
    )
    max_logit = float(other.logits.abs().max())
    limit = FP32_LOGIT_LIMIT * max_logit
    return _report(ours, other, layers, max_logit, limit, None, max(TIE_GAP, 2 * limit), **about)


def compare_half(
    ours: Trace, other: Trace, truth: Trace, config: ModelConfig, **about: Any
) -> Report:
    layers = []
    for name, a, b, exact in zip(
        _layer_names(config), ours.hidden, other.hidden, truth.hidden, strict=True
    ):
        # Half a unit in the last place is what any correct program may add.
        floor = torch.finfo(getattr(torch, about["dtype"])).eps / 2
        limit = LAYER_RATIO * max(_relative_l2(b, exact), floor)
        layers.append(LayerError(name, _relative_l2(a, exact), limit))
    logit_limit = LOGIT_RATIO * _max_error(other.logits, truth.logits)
    kl_limit = KL_RATIO * _mean_kl(other.logits, truth.logits) + KL_FLOOR
    max_logit = float(truth.logits.abs().max())
    return _report(ours, truth, tuple(layers), max_logit, logit_limit, kl_limit, None, **about)


def _report(
    ours: Trace,
    other: Trace,
    layers: tuple[LayerError, ...],
    max_logit: float,
    logit_limit: float,
    kl_limit: float | None,
    tie_gap: float | None,
    **about: Any,
) -> Report:
    """``tie_gap`` None: differing top-1 tokens are counted, but are no failure."""
    logit_error = _max_error(ours.logits, other.logits)
    kl = _mean_kl(ours.logits, other.logits)
    equal = ours.logits.argmax(-1) == other.logits.argmax(-1)
    steps = equal[len(equal) - about["num_tokens"] :].tolist()
    failures = []
    first = next((layer for layer in layers if not layer.ok), None)
    if first is not None:
        failures.append(
            f"{first.name} diverges first: error {first.error:.2e}, limit {first.limit:.2e}"
        )
    if not logit_error <= logit_limit:
        where = "lm_head diverges: " if first is None else ""
        failures.append(f"{where}logit error {logit_error:.2e}, limit {logit_limit:.2e}")
    if kl_limit is not None and not kl <= kl_limit:
        failures.append(f"KL divergence {kl:.2e}, limit {kl_limit:.2e}")
    if tie_gap is not None:
        best = other.logits.topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] > tie_gap
        wrong = int((clear & ~equal).sum())
        if wrong:
            failures.append(f"{wrong} of {len(equal)} top-1 tokens differ without a near tie")
    return Report(
        layers=layers,
        max_logit=max_logit,
        logit_error=logit_error,
        logit_limit=logit_limit,
        kl=kl,
        kl_limit=kl_limit,
        top1_agreement=float(equal.float().mean()),
        greedy_prefix=steps.index(False) if False in steps else len(steps),
        failures=tuple(failures),
        **about,
    )


def _relative_l2(a: Tensor, b: Tensor) -> float:
    """NaN anywhere gives inf: a comparison with a limit must come out as over."""
    value = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
    return math.inf if math.isnan(value) else value


def _max_error(a: Tensor, b: Tensor) -> float:
    value = float((a - b).abs().max())
    return math.inf if math.isnan(value) else value


def _mean_kl(a: Tensor, b: Tensor) -> float:
    """Mean over rows of KL(softmax(a) || softmax(b)) in nat."""
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    value = float((log_a.exp() * (log_a - log_b)).sum(-1).mean())
    return math.inf if math.isnan(value) else max(value, 0.0)


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit > 0 else math.inf


def _layer_names(config: ModelConfig) -> list[str]:
    names = ["embedding", *(_layer_name(layer) for layer in config.layers)]
    names[-1] += ", with the final norm"
    return names


def _layer_name(layer: LayerPlan) -> str:
    left = layer.window_size[0]
    window = "all tokens" if left < 0 else f"window {left + 1}"
    return f"layer {layer.index} ({window}, {'RoPE' if layer.rope else 'NoPE'}, {layer.norm}-norm)"
