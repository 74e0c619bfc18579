"""Gaussian laws and the exact operations on them.

A law N(m, C) may be degenerate (C singular): point masses and noise-free steps are needed as limits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from theory import checked
from theory.checked import Array


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The law N(mean, cov) with mean (d,) and covariance (d, d), positive semi-definite.

    Raises ValueError if shapes disagree, an entry is not finite, or cov is not symmetric positive semi-definite.

    >>> Gaussian([1.0, -0.5], [[0.25, 0.0], [0.0, 4.0]]).dim
    2
    >>> Gaussian([0.0], [[-1.0]])
    Traceback (most recent call last):
    ...
    ValueError: cov = [[-1.0]]: must be positive semi-definite (least eigenvalue -1)
    """

    mean: Array
    cov: Array

    def __init__(self, mean: ArrayLike, cov: ArrayLike) -> None:
        checked_mean = checked.array("mean", mean, 1)
        object.__setattr__(self, "mean", checked_mean)
        object.__setattr__(self, "cov", checked.covariance("cov", cov, checked_mean.size))

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.mean.size

    @staticmethod
    def scalar(mean: float, variance: float) -> Gaussian:
        """N(mean, variance) on the line; raises ValueError for a negative variance.

        >>> Gaussian.scalar(1.0, 0.25).cov
        array([[0.25]])
        """
        return Gaussian.diagonal([mean], [variance])

    @staticmethod
    def diagonal(mean: ArrayLike, variances: ArrayLike) -> Gaussian:
        """Independent coordinates with the given mean (d,) and variances (d,).

        Raises ValueError for a negative variance or different lengths.

        >>> Gaussian.diagonal([0.0, 1.0], [1.0, -2.0])
        Traceback (most recent call last):
        ...
        ValueError: variances = [1.0, -2.0]: must be non-negative
        """
        diagonal = checked.array("variances", variances, 1)
        if (diagonal < 0).any():
            raise ValueError(f"variances = {diagonal.tolist()}: must be non-negative")
        return Gaussian(mean, np.diag(diagonal))


def kl(p: Gaussian, q: Gaussian) -> float:
    """KL(p || q) in nats; infinite unless p is absolutely continuous with respect to q.

    A degenerate p against a full-rank q is infinitely far; two laws on the same subspace are compared on it.
    Raises ValueError if the dimensions differ.

    >>> round(kl(Gaussian.scalar(1.0, 1.0), Gaussian.scalar(0.0, 1.0)), 12)
    0.5
    >>> kl(Gaussian.scalar(0.0, 0.0), Gaussian.scalar(0.0, 1.0))
    inf
    """
    _same_dimension(p, q)
    eigenvalues, basis = np.linalg.eigh(q.cov)
    kept = eigenvalues > _rounding(q.cov)
    shift = p.mean - q.mean
    lost = basis[:, ~kept]
    if lost.size and not _vanish_on(lost, p, shift):
        return math.inf
    whiten = basis[:, kept] / np.sqrt(eigenvalues[kept])
    # The eigenvalues of the *difference* keep their relative accuracy when p is close to q.
    excess = np.linalg.eigvalsh(whiten.T @ (p.cov - q.cov) @ whiten)
    if excess.size and excess[0] <= -1.0 + 64 * excess.size * np.finfo(np.float64).eps:
        return math.inf
    mahalanobis = float(np.sum((whiten.T @ shift) ** 2))
    return 0.5 * (float(np.sum(excess - np.log1p(excess))) + mahalanobis)


def w2_squared(p: Gaussian, q: Gaussian) -> float:
    """The squared 2-Wasserstein distance: squared mean distance plus squared Bures distance.

    Computed as min over rotations U of ||A - B U||^2 with A, B the square roots of the covariances, which unlike
    tr(P + Q - 2 (Q^1/2 P Q^1/2)^1/2) does not cancel when p is close to q. Raises ValueError if the dimensions differ.

    >>> w2_squared(Gaussian.scalar(1.0, 4.0), Gaussian.scalar(0.0, 1.0))
    2.0
    """
    _same_dimension(p, q)
    root_p, root_q = _root(p.cov), _root(q.cov)
    left, _, right = np.linalg.svd(root_q @ root_p)
    return float(np.sum((p.mean - q.mean) ** 2) + np.sum((root_p - root_q @ (left @ right)) ** 2))


def entropy(p: Gaussian) -> float:
    """The differential entropy in nats; -inf for a degenerate law.

    >>> round(entropy(Gaussian.scalar(3.0, 1.0)), 12)
    1.418938533205
    """
    eigenvalues = np.linalg.eigvalsh(p.cov)
    if eigenvalues[0] <= _rounding(p.cov):
        return -math.inf
    return 0.5 * (p.dim * math.log(2 * math.pi * math.e) + float(np.sum(np.log(eigenvalues))))


def affine(p: Gaussian, matrix: ArrayLike, offset: ArrayLike, noise_cov: ArrayLike | None = None) -> Gaussian:
    """The law of matrix @ x + offset + noise for x ~ p; matrix (k, d), offset (k,), noise_cov (k, k).

    Raises ValueError if shapes disagree or noise_cov is not a covariance.

    >>> affine(Gaussian.scalar(1.0, 2.0), [[3.0]], [0.5], [[1.0]]).cov
    array([[19.]])
    """
    linear = checked.array("matrix", matrix, 2)
    shift = checked.array("offset", offset, 1)
    if linear.shape != (shift.size, p.dim):
        raise ValueError(f"matrix has shape {linear.shape}: must be {(shift.size, p.dim)} for this offset and law")
    cov = linear @ p.cov @ linear.T
    if noise_cov is not None:
        cov = cov + checked.covariance("noise_cov", noise_cov, shift.size)
    return Gaussian(linear @ p.mean + shift, cov)


def condition(p: Gaussian, observed: Sequence[int], values: ArrayLike) -> Gaussian:
    """The law of the other coordinates given that the coordinates `observed` take `values`, both (k,), 0 < k < d.

    Raises ValueError if indices repeat, are out of range or leave nothing, or if the observed block is singular.

    >>> law = condition(Gaussian([0.0, 0.0], [[2.0, 1.0], [1.0, 1.0]]), [1], [3.0])
    >>> law.mean, law.cov
    (array([3.]), array([[1.]]))
    """
    known = list(observed)
    seen = checked.array("values", values, 1)
    if len(set(known)) != len(known) or not all(0 <= i < p.dim for i in known) or not 0 < len(known) < p.dim:
        raise ValueError(f"observed = {known}: must be distinct indices in 0..{p.dim - 1} that leave a coordinate free")
    if seen.size != len(known):
        raise ValueError(f"values has {seen.size} entries: must have one for each of observed = {known}")
    free = [i for i in range(p.dim) if i not in known]
    block = p.cov[np.ix_(known, known)]
    if np.linalg.eigvalsh(block)[0] <= _rounding(p.cov):
        raise ValueError(f"observed = {known}: the covariance of these coordinates must be positive definite")
    lower = np.linalg.cholesky(block)
    cross = np.linalg.solve(lower, p.cov[np.ix_(known, free)])
    innovation = np.linalg.solve(lower, seen - p.mean[known])
    return Gaussian(p.mean[free] + cross.T @ innovation, p.cov[np.ix_(free, free)] - cross.T @ cross)


def tilt(p: Gaussian, linear: ArrayLike, quadratic: ArrayLike) -> tuple[Gaussian, float]:
    """The law proportional to p(x) exp(b.x - x'Bx/2), and log E_p[exp(b.x - x'Bx/2)].

    b = `linear` (d,), B = `quadratic` (d, d), symmetric but not necessarily positive. With x = m + A z, C = AA', the
    exponent is a quadratic in the standard normal z with matrix I + A'BA, so singular C needs no special case.
    Raises ValueError if shapes disagree or the tilted density cannot be normalised (I + A'BA not positive definite).

    >>> law, log_normaliser = tilt(Gaussian.scalar(0.5, 2.0), [1.0], [[0.0]])
    >>> round(float(law.mean[0]), 12), round(log_normaliser, 12)
    (2.5, 1.5)
    """
    b = checked.array("linear", linear, 1)
    matrix = checked.array("quadratic", quadratic, 2)
    if b.shape != (p.dim,) or matrix.shape != (p.dim, p.dim):
        raise ValueError(f"linear, quadratic have shapes {b.shape}, {matrix.shape}: must be (d,), (d, d), d = {p.dim}")
    if not np.allclose(matrix, matrix.T, rtol=1e-12, atol=0.0):
        raise ValueError(f"quadratic = {matrix.tolist()}: must be symmetric")
    root = _root(p.cov)
    curvature = np.eye(p.dim) + root @ matrix @ root
    eigenvalues, basis = np.linalg.eigh(0.5 * (curvature + curvature.T))
    if eigenvalues[0] <= _rounding(curvature):
        raise ValueError(
            f"quadratic = {matrix.tolist()}: must leave the inverse covariance plus quadratic positive definite"
        )
    slope = basis.T @ root @ (b - matrix @ p.mean)
    scaled = root @ basis / np.sqrt(eigenvalues)
    law = Gaussian(p.mean + scaled @ (slope / np.sqrt(eigenvalues)), scaled @ scaled.T)
    at_mean = float(b @ p.mean - 0.5 * p.mean @ matrix @ p.mean)
    return law, at_mean + 0.5 * float(np.sum(slope**2 / eigenvalues - np.log(eigenvalues)))


def _same_dimension(p: Gaussian, q: Gaussian) -> None:
    if p.dim != q.dim:
        raise ValueError(f"q has dimension {q.dim}: must be that of p, {p.dim}")


def _rounding(matrix: Array) -> float:
    """Below this an eigenvalue of `matrix` cannot be told from zero."""
    return 64 * matrix.shape[0] * float(np.finfo(np.float64).eps) * float(np.abs(matrix).max())


def _vanish_on(directions: Array, p: Gaussian, shift: Array) -> bool:
    """Whether p has neither spread nor shift along the columns of `directions`."""
    spread = np.abs(directions.T @ p.cov @ directions).max()
    scale = max(float(np.abs(p.mean).max()), float(np.abs(shift).max()))
    offset = np.abs(directions.T @ shift).max()
    return bool(spread <= _rounding(p.cov) and offset <= 64 * p.dim * np.finfo(np.float64).eps * scale)


def _root(cov: Array) -> Array:
    eigenvalues, basis = np.linalg.eigh(cov)
    return (basis * np.sqrt(np.maximum(eigenvalues, 0.0))) @ basis.T
