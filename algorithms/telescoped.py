"""Telescoped half order (THO): the credit matrix of least variance within a band, its weights fitted on a pilot.

Every source k of row t has the same mean, so any row of weights that sums to one is unbiased; a band of width m never
differentiates through more than m steps at once. The weights of least variance solve a linear system in the second
moments E<h[t, k], h[s, l]>, estimated on roll-outs that are used for nothing else: given the pilot the weights are
constants, so the estimate stays unbiased (docs/telescoped.md).
"""

from __future__ import annotations

import numpy as np
import torch

from algorithms.baselines import Baseline, Constant
from algorithms.chain import Chain, Condition, Params
from algorithms.credit import Credit
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from algorithms.sweep import PerSource, sweep


def band(steps: int, width: int, pathwise: bool = True) -> np.ndarray:
    """Return the sources (T, T + 1) within `width` steps of their row; column 0 for the rows t <= width if `pathwise`.

    Without column 0 the reward may be a black box.

    Raises:
        ValueError: unless 1 <= width <= T.
    """
    if not 1 <= width <= steps:
        raise ValueError(f"width must lie in 1..{steps} (T), got {width}")
    t, k = np.arange(1, steps + 1)[:, None], np.arange(steps + 1)
    scores = (k >= 1) & (k <= t) & (t - k < width)
    return scores | ((k == 0) & (t <= width)) if pathwise else scores


def telescoped(
    chain: Chain,
    params: Params,
    objective: Objective,
    support: np.ndarray,
    generator: torch.Generator,
    *,
    baseline: Baseline = Constant(0.0),  # noqa: B008, a value
    pilot: int = 4096,
    batch: int = 512,
    condition: Condition = None,
    name: str = "THO",
) -> Estimator:
    """Fit THO's weights on `pilot` roll-outs and return the estimator, with the baseline it was fitted for.

    Args:
        support: (T, T + 1) bool, the sources that each row may use, as `band` gives.
        condition: of every batch of `batch` roll-outs.

    Raises:
        ValueError: if a row has no source, or the pilot is not a whole number of batches per fold.
    """
    if batch < 1 or pilot % (FOLDS * batch) or pilot < FOLDS * batch:
        raise ValueError(
            f"pilot must be a multiple of {FOLDS} batches (the folds of a cross-validation), got pilot = {pilot}, "
            f"batch = {batch}"
        )
    sources = Estimator("sources", _ones(support), baseline=baseline)
    index, fixed = np.argwhere(support), {name: p.detach() for name, p in params.items()}
    grams = np.zeros((FOLDS, len(index), len(index)))
    for fold in np.arange(pilot // batch) % FOLDS:
        noise = sources.draw(chain, params, batch, generator)
        readout = PerSource(params, batch)
        sweep(chain, fixed, objective, sources.credit, baseline, 0.0, noise, condition, readout)
        h = torch.stack([readout.total[int(t) + 1, int(k)] for t, k in index], 1).flatten(2)  # (n, sources, p)
        grams[fold] += torch.einsum("nip,njp->ij", h, h).double().cpu().numpy() * FOLDS / pilot
    return Estimator(name, Credit.of(fitted_weights(grams, support)), baseline=baseline)


FOLDS = 4
RIDGES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)


def fitted_weights(grams: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the weights (T, T + 2) of least second moment, shrunk towards the nearest source of each row.

    How much is settled by cross-validation: a small pilot would otherwise fit its own noise, and the weights lose
    to the policy gradient that they contain.

    Args:
        grams: (folds, S, S), second moments estimated on disjoint parts of the pilot.
        support: (T, T + 1) bool.
    """
    total, rows = grams.sum(0), support.nonzero()

    def held_out(ridge: float) -> float:
        risk = 0.0
        for gram in grams:
            w = least_squares_weights((total - gram) / (len(grams) - 1), support, ridge)[rows]
            risk += float(w @ gram @ w)
        return risk

    return least_squares_weights(total / len(grams), support, min(RIDGES, key=held_out))


def least_squares_weights(gram: np.ndarray, support: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """Return the credit matrix (..., T, T + 2) of least second moment with unit rows.

    With `ridge`, ridge * sum_i gram[i, i] (w_i - a_i)^2 is added, where a gives all of each row's weight to its last
    source in `support` (the step's own noise, where that is there): the policy gradient at ridge = infinity.

    Args:
        gram: (..., S, S), E<h_i, h_j> over the S sources of `support` in row order; one credit matrix for each.
        support: (T, T + 1) bool.

    Raises:
        ValueError: if shapes disagree or a row has no source.
    """
    steps, index = len(support), np.argwhere(support)
    sources = len(index)
    if gram.shape[-2:] != (sources, sources):
        raise ValueError(f"gram must be {sources} x {sources} for this support, got {gram.shape}")
    if not support.any(1).all():
        raise ValueError(f"support gives row t = {int(np.argmin(support.any(1))) + 1} no source")
    rows = (index[:, 0] == np.arange(steps)[:, None]).astype(float)
    anchor = np.append(index[1:, 0] != index[:-1, 0], True).astype(float)
    weights = np.zeros((*gram.shape[:-2], steps, steps + 2))
    if np.isinf(ridge):
        weights[..., index[:, 0], index[:, 1]] = anchor
        return weights
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    scale = np.maximum(diagonal.sum(-1, keepdims=True) / sources, np.finfo(float).tiny)
    penalty = ridge * diagonal / scale
    # The gradient of the Lagrangian, and the rows' sums.
    system = np.zeros((*gram.shape[:-2], sources + steps, sources + steps))
    system[..., :sources, :sources] = gram / scale[..., None] + penalty[..., None] * np.eye(sources)
    system[..., :sources, sources:] = rows.T
    system[..., sources:, :sources] = rows
    wanted = np.concatenate([penalty * anchor, np.ones((*gram.shape[:-2], steps))], -1)
    weights[..., index[:, 0], index[:, 1]] = _least_norm(system, wanted)[..., :sources]
    return weights / weights.sum(-1, keepdims=True)


def _least_norm(system: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the solutions (..., n) of least norm of systems (..., n, n): sources may be dependent."""
    left, values, right = np.linalg.svd(system)
    kept = values > 1e-12 * values[..., :1]
    parts = np.divide(np.einsum("...ij,...i->...j", left, wanted), values, out=np.zeros_like(values), where=kept)
    return np.einsum("...ji,...j->...i", right, parts)


def pathwise_then_scores(steps: int, length: int) -> Credit:
    """The first `length` rows by first order, the others by the policy gradient: a plain member of THO's family."""
    weights = np.zeros((steps, steps + 2))
    for t in range(1, steps + 1):
        weights[t - 1, 0 if t <= length else t] = 1
    return Credit.of(weights)


def _ones(support: np.ndarray) -> Credit:
    steps = len(support)
    if support.shape != (steps, steps + 1):
        raise ValueError(f"support must have shape (T, T + 1), got {support.shape}")
    return Credit.of(np.concatenate([support.astype(float), np.zeros((steps, 1))], 1))
