"""How far two runs of the same weights may be apart, and the report on it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exafuse.config import ModelConfig
from exafuse.verification.sides import EMBEDDING, Trace

# fp32: error of a logit relative to the largest logit; relative L2 error of a token's hidden state.
FP32_LOGIT_LIMIT = 2e-5
FP32_LAYER_LIMIT = 1e-5
# Below this gap between the two best logits (or twice the error allowed) either may win.
TIE_GAP = 1e-4
# bf16 and fp16: multiples of what transformers' own roundings make there. Root mean squares over
# tokens hardly scatter between correct programs (0.5 to 1.1 times transformers' was seen on tiny
# and real models); the worst token and the KL divergence, which a few tokens decide, do.
LAYER_RATIO = 1.5
LOGIT_RATIO = 1.25
KL_RATIO, KL_FLOOR = 2.0, 1e-6
WORST_RATIO = 4.0


@dataclass(frozen=True)
class LayerError:
    """Errors of a layer's output: relative L2 of each token's hidden state; their root mean square,
    the largest, at which of the compared tokens that is, and what the two may be."""

    name: str
    error: float
    limit: float
    worst_error: float
    worst_limit: float
    worst_token: int

    @property
    def excess(self) -> float:
        """At most 1 if the layer is within its limits."""
        return max(_ratio(self.error, self.limit), _ratio(self.worst_error, self.worst_limit))

    @property
    def ok(self) -> bool:
        return self.excess <= 1


@dataclass(frozen=True)
class Check:
    """One figure about the logits; ``limit`` None = only shown."""

    name: str
    value: float
    limit: float | None

    @property
    def ok(self) -> bool:
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", limit {self.limit:.2e}"
        return f"{self.name} {self.value:.2e}{limit}"


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
    checks: tuple[Check, ...]
    max_logit: float
    top1_agreement: float
    greedy_prefix: int
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is within its limit."""
        return not self.failures

    @property
    def first_diverging_layer(self) -> str | None:
        """The name of the first layer over a limit; None if every layer is within."""
        return next((layer.name for layer in self.layers if not layer.ok), None)

    @property
    def worst_layer(self) -> LayerError:
        """The layer nearest to its limit, or farthest beyond."""
        return max(self.layers, key=lambda layer: layer.excess)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite errors (NaN in the output) as text."""
        values = dataclasses.asdict(self)
        for key in ("layers", "checks"):
            items = getattr(self, key)
            values[key] = [_finite(dataclasses.asdict(item)) | {"ok": item.ok} for item in items]
        matched = values.pop("greedy_prefix")
        values["greedy"] = {"matched": matched, "of": values.pop("num_tokens")}
        return {
            "schema": 1,
            "ok": self.ok,
            "first_diverging_layer": self.first_diverging_layer,
            **_finite(values),
        }

    def summary(self) -> str:
        """One line."""
        verdict = "agrees with" if self.ok else "DIFFERS from"
        # In half precision near ties fall either way, and the first one ends the common prefix.
        tokens = f"top-1 {100 * self.top1_agreement:.1f} %"
        if self.dtype == "float32":
            tokens = f"greedy {self.greedy_prefix}/{self.num_tokens}"
        return (
            f"{self.model}: {self.side} {verdict} {self.against} in {self.dtype}: layers"
            f" {self.worst_layer.error:.1e}, logits {self.checks[0].value:.1e} of"
            f" {self.max_logit:.1f}, {tokens}"
        )

    def __str__(self) -> str:
        is_fp32 = self.dtype == "float32"
        rule = "" if is_fp32 else "; errors are against fp32, limits from transformers' own"
        worst = self.worst_layer
        lines = [
            f"{self.model}: {self.side} against {self.against}, {self.dtype} on {self.device}",
            f"  read {self.num_prompt_tokens} tokens, decoded {self.num_tokens} greedily{rule}",
            f"  layers           relative error {worst.error:.2e}, limit {worst.limit:.2e}; worst"
            f" token {worst.worst_error:.2e}, limit {worst.worst_limit:.2e}",
            f"                   in {worst.name}, which is nearest to its limit",
            f"  logits           {self.checks[0]} (largest logit {self.max_logit:.2f})",
            *(f"                   {check}" for check in self.checks[1:]),
            f"  top-1 agreement  {100 * self.top1_agreement:.2f} %",
            f"  greedy prefix    {self.greedy_prefix} of {self.num_tokens} tokens equal",
            *(f"  note: {note}" for note in self.notes),
        ]
        if not self.ok:
            lines += ["  layer by layer, relative error (worst token):"]
            lines += [
                f"    {'     ' if layer.ok else 'OVER '}{layer.error:.2e} ({layer.worst_error:.2e})"
                f"  {layer.name}"
                for layer in self.layers
            ]
            return "\n".join([*lines, *(f"  FAILED: {failure}" for failure in self.failures)])
        return "\n".join([*lines, "  OK"])


def compare_fp32(ours: Trace, other: Trace, config: ModelConfig, **about: Any) -> Report:
    """Hold two fp32 traces against each other; ``about`` are the report's descriptive fields."""
    layers = []
    for (name, a), (_, b) in zip(ours.stages(config), other.stages(config), strict=True):
        layers.append(_layer_error(name, a, b, FP32_LAYER_LIMIT, FP32_LAYER_LIMIT))
    limit = FP32_LOGIT_LIMIT * float(other.logits.abs().max())
    checks = (
        Check("largest error", _max_error(ours.logits, other.logits), limit),
        Check("KL divergence", _mean_kl(ours.logits, other.logits), None),
    )
    return _report(ours, other, layers, checks, max(TIE_GAP, 2 * limit), **about)


def compare_half(
    ours: Trace, yardstick: Trace, truth: Trace, config: ModelConfig, **about: Any
) -> Report:
    """Hold ``ours`` against the fp32 trace ``truth``, by the measure of what ``yardstick``, of the
    same dtype as ``ours``, is away from it."""
    # Half a unit in the last place is what any correct layer may be wrong by; an embedding is
    # looked up and has no error.
    half_ulp = torch.finfo(getattr(torch, about["dtype"])).eps / 2
    layers: list[LayerError] = []
    for (name, a), (_, b), (_, exact) in zip(
        *(trace.stages(config) for trace in (ours, yardstick, truth)), strict=True
    ):
        errors, floor = _row_errors(b, exact), 0.0 if name == EMBEDDING else half_ulp
        limit = LAYER_RATIO * _slack(len(exact)) * max(_rms(errors), floor)
        worst_limit = WORST_RATIO * max(float(errors.max()), floor)
        layers.append(_layer_error(name, a, exact, limit, worst_limit))
    slack = _slack(len(truth.logits))

    def check(name: str, measure: Any, factor: float, floor: float = 0.0) -> Check:
        allowed = factor * measure(yardstick.logits, truth.logits) + floor
        return Check(name, measure(ours.logits, truth.logits), allowed)

    checks = (
        check("rms error", lambda a, b: _rms(a.double() - b), LOGIT_RATIO * slack),
        check("largest error", _max_error, WORST_RATIO),
        check("KL divergence", _mean_kl, KL_RATIO * slack, KL_FLOOR),
    )
    return _report(ours, truth, layers, checks, None, **about)


def _report(
    ours: Trace,
    other: Trace,
    layers: list[LayerError],
    checks: tuple[Check, ...],
    tie_gap: float | None,
    **about: Any,
) -> Report:
    """``tie_gap`` None: differing top-1 tokens are counted, but are no failure."""
    equal = ours.logits.argmax(-1) == other.logits.argmax(-1)
    steps = equal[len(equal) - about["num_tokens"] :].tolist()
    failures = []
    first = next((layer for layer in layers if not layer.ok), None)
    if first is not None:
        failures.append(
            f"{first.name} is the first to diverge: error {first.error:.2e}, at token"
            f" {first.worst_token} {first.worst_error:.2e}"
        )
    where = "the head diverges, " if first is None else ""
    failures += [f"{where}logits: {check}" for check in checks if not check.ok]
    if tie_gap is not None:
        best = other.logits.topk(min(2, other.logits.shape[-1]), dim=-1).values
        clear = best[:, 0] - best[:, -1] > tie_gap
        if wrong := int((clear & ~equal).sum()):
            failures.append(f"{wrong} of {len(equal)} top-1 tokens differ without a near tie")
    return Report(
        layers=tuple(layers),
        checks=checks,
        max_logit=float(other.logits.abs().max()),
        top1_agreement=float(equal.float().mean()),
        greedy_prefix=steps.index(False) if False in steps else len(steps),
        failures=tuple(failures),
        **about,
    )


def _layer_error(name: str, a: Tensor, b: Tensor, limit: float, worst_limit: float) -> LayerError:
    errors = _row_errors(a, b)
    worst = int(errors.argmax())
    return LayerError(name, _rms(errors), limit, float(errors[worst]), worst_limit, worst)


def _row_errors(a: Tensor, b: Tensor) -> Tensor:
    """Relative L2 error of each row, fp64 ``[rows]``. By rows, because in real models a few tokens
    have hidden states a thousand times larger than the rest, and would decide alone."""
    norm = b.double().norm(dim=-1).clamp(min=1e-30)
    # NaN would pass every comparison with a limit as "not over".
    return torch.nan_to_num((a.double() - b).norm(dim=-1) / norm, nan=math.inf, posinf=math.inf)


def _rms(values: Tensor) -> float:
    return _number(values.square().mean().sqrt())


def _max_error(a: Tensor, b: Tensor) -> float:
    return _number((a - b).abs().max())


def _mean_kl(a: Tensor, b: Tensor) -> float:
    """Mean over rows of KL(softmax(a) || softmax(b)) in nat."""
    log_a, log_b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return max(_number((log_a.exp() * (log_a - log_b)).sum(-1).mean()), 0.0)


def _number(value: Tensor) -> float:
    number = float(value)
    return math.inf if math.isnan(number) else number


def _ratio(error: float, limit: float) -> float:
    if error == 0:
        return 0.0
    return error / limit if math.isfinite(error) and limit > 0 else math.inf


def _slack(rows: int) -> float:
    """Few tokens scatter more: 2 for one token, 1.1 for a hundred."""
    return 1 + 1 / math.sqrt(rows)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {
        key: "inf" if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
