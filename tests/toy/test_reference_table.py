"""The torch objects, sampled, against the exact moments of LG1: every row of the reference table."""

import numpy as np
import pytest
from scipy.stats import norm

from algorithms import estimators as named
from algorithms.estimators import antithetic
from theory.credit import credit_moments
from theory.instances import additive_instance
from toy.experiments import gradients
from toy.linear_gaussian import Problem
from verdicts.streams import Stream

MU = 0.25
ROWS = {
    "FO": (named.first_order(4), {}),
    "TBP K=1": (named.truncated(4, 1), {}),
    "TBP K=2": (named.truncated(4, 2), {}),
    "TBP K=3": (named.truncated(4, 3), {}),
    "HO h=1": (named.half_order(4, 1), {}),
    "HO h=2": (named.half_order(4, 2), {}),
    "random truncation": (named.random_truncation(np.array([0.4, 0.3, 0.2, 0.1]), debiased=True), {}),
    "ZO one-sided": (named.zeroth_order(4, MU), {"mu": MU}),
    "ZO antithetic": (antithetic(named.zeroth_order(4, MU), "parameters"), {"mu": MU, "antithetic": True}),
    "SPSA": (
        antithetic(named.zeroth_order(4, MU, "rademacher"), "parameters"),
        {"mu": MU, "antithetic": True, "noise": "rademacher"},
    ),
}
# Two means and three entries of the covariance in each row; all rows together err with probability 1e-6.
LIMIT = norm.isf(1e-6 / (2 * 5 * len(ROWS)))


@pytest.mark.parametrize("name", ROWS)
def test_monte_carlo_meets_the_exact_mean_and_covariance(name):
    estimator, options = ROWS[name]
    exact = credit_moments(*additive_instance(), estimator.credit.outcomes, **options)
    problem = Problem.of(additive_instance())
    block = gradients(problem.chain, problem.params, problem.objective, estimator, size=1 << 18)(
        Stream(0).child("reference table", name)
    )
    sample = block(0) - exact.mean
    products = np.stack([sample[:, 0] ** 2, sample[:, 0] * sample[:, 1], sample[:, 1] ** 2], 1)
    rows = np.concatenate([sample, products - exact.cov[[0, 0, 1], [0, 1, 1]]], 1)
    scores = rows.mean(0) / (rows.std(0) / len(rows) ** 0.5)
    assert np.abs(scores).max() < LIMIT
    # The test can fail: five per cent off in the estimate is far beyond the limit in some entry.
    moved = np.concatenate([sample + 0.05 * exact.mean, 1.05**2 * products - exact.cov[[0, 0, 1], [0, 1, 1]]], 1)
    assert np.abs(moved.mean(0) / (moved.std(0) / len(moved) ** 0.5)).max() > LIMIT
    assert sample.dtype == np.float64
