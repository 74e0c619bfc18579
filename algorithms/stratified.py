"""SRT: unbiased truncated back-propagation with fixed counts of lengths in every batch, its law fitted on a pilot."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq, isotonic_regression

from algorithms.baselines import Constant
from algorithms.chain import Chain, Condition, Params
from algorithms.credit import first_order
from algorithms.estimators import Estimator, stratified_truncation
from algorithms.objective import Objective
from algorithms.sweep import PerSource, sweep


def fitted_truncation(
    chain: Chain,
    params: Params,
    objective: Objective,
    expected_length: float,
    generator: torch.Generator,
    *,
    pilot: int = 512,
    condition: Condition = None,
) -> Estimator:
    """Fit the lengths' law of least variance at a given expected length, and return SRT with it.

    The pilot's roll-outs are used for nothing else, so that the estimate stays unbiased given them.

    Raises:
        ValueError: unless 1 < expected_length <= T and pilot >= 2; if the reward is not differentiable.
    """
    if pilot < 2:
        raise ValueError(f"pilot must be >= 2 roll-outs, got {pilot}")
    credit = first_order(chain.steps)
    noise = Estimator("pilot", credit).draw(chain, params, pilot, generator)
    read = PerSource(params, pilot)
    fixed = {name: p.detach() for name, p in params.items()}
    sweep(chain, fixed, objective, credit, Constant(), 0.0, noise, condition, read)
    parts = torch.stack([read.total[t, 0] for t in range(1, chain.steps + 1)])  # (T, n, p)
    tails = parts.flip(0).cumsum(0).flip(0)
    reach = survival(tails.var(1).sum(1).double().cpu().numpy(), expected_length)
    return stratified_truncation(length_law(reach))


def survival(tail_variances: np.ndarray, expected_length: float) -> np.ndarray:
    """Return P(K >= t), (T,), of least variance with E K = expected_length and P(K >= 1) = 1.

    Args:
        tail_variances: (T,), tr Cov(g_t + ... + g_T) of the pathwise parts of one sample.

    Raises:
        ValueError: unless 1 < expected_length <= T.
    """
    steps = len(tail_variances)
    if not 1 < expected_length <= steps:
        raise ValueError(f"expected_length must lie in (1, {steps}] (T), got {expected_length}")
    # Beyond step 1: proportional to the root of the decrements, made non-increasing, and at most one.
    decrements = tail_variances[1:] - np.append(tail_variances[2:], 0.0)
    roots = np.sqrt(isotonic_regression(decrements, increasing=False).x.clip(min=0))

    def excess(scale: float) -> float:
        return float(np.minimum(1.0, scale * roots).sum()) - (expected_length - 1)

    positive = roots[roots > 0]
    if expected_length == steps or len(positive) < steps - 1:
        return np.r_[1.0, np.full(steps - 1, (expected_length - 1) / (steps - 1))]
    scale = brentq(excess, 0.0, 1 / float(positive.min()))
    return np.r_[1.0, np.minimum(1.0, scale * roots)]


def length_law(reach: np.ndarray) -> np.ndarray:
    """Return P(K = t), (T,), from P(K >= t)."""
    law = reach - np.append(reach[1:], 0.0)
    return law.clip(min=0) / law.clip(min=0).sum()
