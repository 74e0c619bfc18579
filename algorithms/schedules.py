"""Noise schedules of a few parameters, which autograd can differentiate (Generative bilevel, eqs. 16 and 34).

A family maps parameters {"start", "end", "tau", "epsilon"}, each (*batch,), to alpha_bar_t for t = 0..T, of shape
(*batch, T + 1):

    cosine    f(y) = cos(pi/2 (y + epsilon) / (1 + epsilon))^(2 tau)          (Nichol and Dhariwal 2021; Chen 2023)
    sigmoid   f(y) = 1 / (1 + exp((y - k) / tau - epsilon))                   (Chen 2023)

"chen":      alpha_bar = (f(y) - f(end)) / (f(start) - f(end)),  y = start + (end - start) t / T,  k = 0
"released":  beta = 1 - f(y_t) / f(y_{t-1}) clipped to [0, 0.999],  y = (start + (end - start) t) / T,  k = 1

The second is what the code published with the bilevel paper does. It divides start by T, so that start and end act
through their difference, but for 1 / T of start.

For the cosine 0 <= start < end, and y must not pass 1, where the cosine is zero: end <= 1 in the form "chen", and
end <= 1 + start (T - 1) / T in the released one. There tau > 1/2 is where f has a finite slope: at end = 1 and
tau <= 1/2 the form "chen" has values, but no derivative in end. `valid` keeps every cosine's tau off that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from algorithms.chain import Params

Form = Literal["chen", "released"]
Shape = Literal["cosine", "sigmoid"]
PARAMETERS = ("start", "end", "tau", "epsilon")
DEFAULTS: dict[Shape, dict[str, float]] = {
    "cosine": {"start": 0.0, "end": 1.0, "tau": 1.0, "epsilon": 0.008},  # Nichol and Dhariwal's
    "sigmoid": {"start": -3.0, "end": 3.0, "tau": 1.0, "epsilon": 0.0},  # Chen's
}
MAX_BETA = 0.999
LOG_OF_ZERO = -1e6  # so low that no tau > 1e-3 lifts f off zero, and finite, as -inf has no gradient
LEAST_COSINE_TAU = 0.51  # what `valid` leaves: the cosine's power 2 tau has a finite slope at zero


@dataclass(frozen=True)
class Family:
    """A family of schedules of T steps; parameters that are not given are fixed.

    Attributes:
        fixed: values of parameters that are not learned, over the defaults of the shape.

    Raises:
        ValueError: if the shape, the form or a fixed name is unknown, or T < 1; in a call, for parameters that are
            unknown, not finite or out of range, that leave no fall of alpha_bar above rounding, or at which a
            derivative is wanted that does not exist.
    """

    shape: Shape
    T: int
    form: Form = "chen"
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shape not in DEFAULTS:
            raise ValueError(f"shape must be one of {sorted(DEFAULTS)}, got {self.shape!r}")
        if self.form not in ("chen", "released"):
            raise ValueError(f"form must be 'chen' or 'released', got {self.form!r}")
        if self.T < 1:
            raise ValueError(f"T must be >= 1, got {self.T}")
        _check_names("fixed", self.fixed)

    def __call__(self, x: Params) -> Tensor:
        """Return alpha_bar (*batch, T + 1), from 1 on; it falls, in the form "chen" to 0."""
        start, end, tau, epsilon = self.values(x)
        log_f = self._log_shape(*(v[..., None] for v in (start, end, tau, epsilon)))
        # Through log f, so that a shape that falls below the smallest number still has its ratios.
        if self.form == "chen":
            logs, last = log_f - log_f[..., :1], log_f[..., -1:] - log_f[..., :1]
            _check("end", end, last.detach()[..., 0] < 0, "must be so far from start that alpha_bar falls")
            return logs.exp() * torch.expm1(last - logs) / torch.expm1(last)
        beta = (-torch.expm1(log_f.diff(dim=-1))).clamp(0, MAX_BETA)
        return torch.cat([torch.ones_like(log_f[..., :1]), torch.cumprod(1 - beta, -1)], -1)

    def _log_shape(self, start: Tensor, end: Tensor, tau: Tensor, epsilon: Tensor) -> Tensor:
        """log f(y_t) for t = 0..T, (*batch, T + 1), of parameters (*batch, 1)."""
        u = torch.arange(self.T + 1, dtype=end.dtype, device=end.device) / self.T
        # In the form "chen" written so that y_T = end exactly.
        y = (1 - u) * start + u * end if self.form == "chen" else start / self.T + u * (end - start)
        if self.shape == "sigmoid":
            return torch.nn.functional.logsigmoid(((0.0 if self.form == "chen" else 1.0) - y) / tau + epsilon)
        if self.form == "chen" and end.requires_grad:
            _check("tau", tau, (tau > 0.5) | (end < 1), "must exceed 1/2 for a derivative in end at end = 1")
        # As a sine of the complement, whose zero at y = 1 is exact; there the derivative is zero, or of a clipped beta.
        cosine = torch.sin(0.5 * math.pi * (1 - y) / (1 + epsilon))
        logs = cosine.clamp(min=torch.finfo(cosine.dtype).tiny).log()
        return 2 * tau * torch.where(cosine > 0, logs, LOG_OF_ZERO)

    def values(self, x: Params) -> tuple[Tensor, ...]:
        """Return start, end, tau and epsilon, each (*batch,), checked."""
        values = tuple(self._full(x).values())
        start, end, tau, epsilon = (v.detach() for v in values)
        for name, value in zip(PARAMETERS, values, strict=True):
            _check(name, value, torch.isfinite(value), "must be finite")
        _check("tau", tau, tau > 0, "must be positive")
        _check("end", end, start < end, "must exceed start")
        if self.shape == "cosine":
            _check("epsilon", epsilon, epsilon >= 0, "must be >= 0")
            # Beyond them the cosine is not monotone, or betas are 0/0.
            _check("start", start, start >= 0, "must be >= 0 for the cosine to fall")
            latest = self._latest_end(start)
            rule = (
                f"must be <= 1{'' if self.form == 'chen' else ' + start (T - 1) / T'} for the cosine to stay positive"
            )
            _check("end", end, end <= latest, rule)
        return values

    def valid(self, x: Params, margin: float = 1e-3) -> Params:
        """Return the parameters moved, one by one, into the range where the family is defined and has a derivative.

        That is tau >= margin, or `LEAST_COSINE_TAU` for the cosine, end >= start + margin, and the rest as in a call.
        Points of this range stay. Only what is in x is moved. A sigmoid of the form "chen" with an end so far below 0
        (745 tau in float64) that its logarithm is 0 to rounding is not moved, and refused by a call.

        Raises:
            ValueError: if a parameter is unknown or not finite, or where one that is fixed is out of range.
        """
        p = self._full(x)
        p["tau"] = p["tau"].clamp(min=max(margin, LEAST_COSINE_TAU) if self.shape == "cosine" else margin)
        if self.shape == "cosine":
            p["epsilon"] = p["epsilon"].clamp(min=0.0)
            if "start" in x:
                p["start"] = p["start"].clamp(0.0, (1 if self.form == "chen" else self.T) * (1 - margin))
        if "end" in x:
            p["end"] = torch.maximum(p["end"], p["start"] + margin)
            if self.shape == "cosine":
                p["end"] = torch.minimum(p["end"], self._latest_end(p["start"]))
        elif "start" in x:
            p["start"] = torch.minimum(p["start"], p["end"] - margin)
        moved = {n: p[n] for n in x}
        self.values(moved)
        return moved

    def _full(self, x: Params) -> Params:
        _check_names("x", x)
        given = next(iter(x.values()), torch.ones(()))
        full = {**DEFAULTS[self.shape], **self.fixed}
        return {n: x[n] if n in x else torch.full_like(given, full[n]) for n in PARAMETERS}

    def _latest_end(self, start: Tensor) -> Tensor:
        """The end at which y_T = 1."""
        return torch.ones_like(start) if self.form == "chen" else 1 + start * (self.T - 1) / self.T


def ddim_times(T: int, S: int) -> Tensor:
    """Return the S times floor(i (T - 1) / (S - 1)) + 1, i = 0..S-1, of 1..T that DDIM visits (Song et al. 2021).

    Raises:
        ValueError: unless 2 <= S <= T.
    """
    if not 2 <= S <= T:
        raise ValueError(f"S must lie in [2, T = {T}], got {S}")
    return torch.arange(S) * (T - 1) // (S - 1) + 1


def _check_names(name: str, given: Mapping[str, object]) -> None:
    unknown = sorted(set(given) - set(PARAMETERS))
    if unknown:
        raise ValueError(f"{name} must hold parameters of {PARAMETERS}, got {unknown[0]!r}")


def _check(name: str, value: Tensor, holds: Tensor, rule: str) -> None:
    if not bool(holds.all()):
        raise ValueError(f"{name} {rule}, got {float(value.detach().expand(holds.shape)[~holds][0]):g}")
