"""Gaussian mixtures and their exact laws, scores and denoisers along the forward process.

The forward process is x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, eps ~ N(0, I) (Ho et al. 2020, eq. 4);
it maps a mixture to a mixture, so that the score of every noise level is known in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k weights[k] N(means[k], covs[k]) with weights (m,), means (m, d), covs (m, d, d).

    Components may be degenerate (point masses); then only the noised law has a density.
    Raises ValueError if shapes disagree, a weight is not positive, they do not sum to one, or a cov is no covariance.

    >>> GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.0]], [[0.0]]]).cov()
    array([[1.]])
    >>> GaussianMixture([0.5, 0.6], [[-1.0], [1.0]], [[[1.0]], [[1.0]]])
    Traceback (most recent call last):
    ...
    ValueError: weights = [0.5, 0.6]: must be positive and sum to one
    """

    weights: Array
    means: Array
    covs: Array

    def __init__(self, weights: ArrayLike, means: ArrayLike, covs: ArrayLike) -> None:
        w = checked.array("weights", weights, 1)
        m = checked.array("means", means, 2)
        c = checked.array("covs", covs, 3)
        if (w <= 0).any() or abs(float(w.sum()) - 1.0) > 1e-12:
            raise ValueError(f"weights = {w.tolist()}: must be positive and sum to one")
        if m.shape[0] != w.size or c.shape != (*m.shape, m.shape[1]):
            raise ValueError(
                f"means, covs have shapes {m.shape}, {c.shape}: must be (m, d), (m, d, d) with m = {w.size}"
            )
        symmetric = np.stack([checked.covariance(f"covs[{k}]", cov, m.shape[1]) for k, cov in enumerate(c)])
        symmetric.setflags(write=False)
        object.__setattr__(self, "weights", w)
        object.__setattr__(self, "means", m)
        object.__setattr__(self, "covs", symmetric)

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.means.shape[1]

    def mean(self) -> Array:
        """The mean (d,).

        >>> GaussianMixture([0.25, 0.75], [[-1.0], [1.0]], [[[1.0]], [[2.0]]]).mean()
        array([0.5])
        """
        return self.weights @ self.means

    def cov(self) -> Array:
        """The covariance (d, d): within plus between the components.

        >>> GaussianMixture([0.25, 0.75], [[-1.0], [1.0]], [[[1.0]], [[2.0]]]).cov()
        array([[2.5]])
        """
        centred = self.means - self.mean()
        within = np.einsum("k,kij->ij", self.weights, self.covs)
        return within + np.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def log_density(self, x: ArrayLike) -> Array:
        """log p at the rows of x (n, d), as (n,) in nats. Raises ValueError for another shape or singular covariances.

        >>> GaussianMixture([1.0], [[0.0]], [[[1.0]]]).log_density([[0.0]]).round(12)
        array([-0.91893853])
        """
        return np.logaddexp.reduce(self._log_joint(self._points(x)), axis=1)

    def score(self, x: ArrayLike) -> Array:
        """The gradient of log p at the rows of x (n, d), as (n, d). Raises ValueError like `log_density`.

        >>> GaussianMixture([1.0], [[1.0]], [[[2.0]]]).score([[3.0]])
        array([[-1.]])
        """
        points = self._points(x)
        return -np.einsum("nk,nki->ni", self._responsibilities(points), self._whitened(points))

    def noised(self, alpha_bar: float) -> GaussianMixture:
        """The exact law of sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4).

        Raises ValueError unless alpha_bar lies in [0, 1].

        >>> GaussianMixture([1.0], [[2.0]], [[[3.0]]]).noised(0.25).covs
        array([[[1.5]]])
        """
        level = checked.scalar("alpha_bar", alpha_bar, 0.0, 1.0)
        covs = level * self.covs + (1.0 - level) * np.eye(self.dim)
        return GaussianMixture(self.weights, math.sqrt(level) * self.means, covs)

    def noised_score(self, x: ArrayLike, alpha_bar: float) -> Array:
        """The score of the noised law at the rows of x (n, d), as (n, d): what a perfect network has learnt.

        The noise prediction is -sqrt(1 - alpha_bar) times this. Raises ValueError like `noised` and `score`.

        >>> GaussianMixture([1.0], [[0.0]], [[[4.0]]]).noised_score([[5.0]], 0.5)
        array([[-2.]])
        """
        return self.noised(alpha_bar).score(x)

    def posterior_mean(self, x: ArrayLike, alpha_bar: float) -> Array:
        """E[x_0 | x_t = x] at the rows of x (n, d), as (n, d): the denoiser.

        Averages the components' linear regressions, which unlike Tweedie's (x + (1 - alpha_bar) score)/sqrt(alpha_bar)
        stays accurate as alpha_bar vanishes. Raises ValueError like `noised` and `score`.

        >>> GaussianMixture([1.0], [[0.0]], [[[4.0]]]).posterior_mean([[5.0]], 0.0)
        array([[0.]])
        """
        noisy = self.noised(alpha_bar)
        points = noisy._points(x)
        gain = math.sqrt(alpha_bar) * np.einsum("kij,nkj->nki", self.covs, noisy._whitened(points))
        return np.einsum("nk,nki->ni", noisy._responsibilities(points), self.means + gain)

    def _points(self, x: ArrayLike) -> Array:
        points = checked.array("x", x, 2)
        if points.shape[1] != self.dim:
            raise ValueError(f"x has shape {points.shape}: must be (n, {self.dim})")
        return points

    def _factors(self) -> Array:
        try:
            return np.asarray(np.linalg.cholesky(self.covs), dtype=np.float64)
        except np.linalg.LinAlgError:
            raise ValueError(f"covs = {self.covs.tolist()}: must be positive definite for a density") from None

    def _standardised(self, points: Array) -> Array:
        """L[k]^-1 (points[n] - means[k]) as (n, m, d), with covs[k] = L[k] L[k]'."""
        centred = points[:, None] - self.means
        return np.asarray(np.linalg.solve(self._factors(), centred[..., None])[..., 0], dtype=np.float64)

    def _whitened(self, points: Array) -> Array:
        """covs[k]^-1 (points[n] - means[k]) as (n, m, d)."""
        upper = np.swapaxes(self._factors(), 1, 2)
        solved = np.linalg.solve(upper, self._standardised(points)[..., None])[..., 0]
        return np.asarray(solved, dtype=np.float64)

    def _log_joint(self, points: Array) -> Array:
        """log(weights[k] N(points[n]; means[k], covs[k])) as (n, m)."""
        log_root_det = np.log(np.diagonal(self._factors(), axis1=1, axis2=2)).sum(axis=1)
        constant = np.log(self.weights) - log_root_det - 0.5 * self.dim * math.log(2 * math.pi)
        return constant - 0.5 * np.sum(self._standardised(points) ** 2, axis=2)

    def _responsibilities(self, points: Array) -> Array:
        """P(component k | points[n]) as (n, m)."""
        log_joint = self._log_joint(points)
        return np.exp(log_joint - np.logaddexp.reduce(log_joint, axis=1)[:, None])
