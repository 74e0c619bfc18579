"""Measures of a set of samples, in float64: Frechet distance with its floor, diversity, means with intervals.

A feature extractor maps images to vectors; it is a callable, or the name "module:function" of one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import svdvals
from scipy.spatial.distance import cdist
from scipy.stats import t as student
from torch import Tensor

from verdicts.streams import Stream

Array = NDArray[np.float64]

_BLOCK = 512  # rows of the matrix of distances that are held at a time


class Extractor(Protocol):
    """A map from images to features; the features of an image must not depend on the others in its batch."""

    def __call__(self, images: Tensor) -> Tensor | NDArray:
        """Map images (n, C, H, W) in [0, 1] to features (n, d)."""
        ...


class Interval(NamedTuple):
    """A mean and the limits of an interval around it."""

    mean: float
    low: float
    high: float


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    error: float


class PromptMean(NamedTuple):
    """The values of one prompt: how many, their mean, and its standard error (None for a single value)."""

    prompt: int
    samples: int
    mean: float
    error: float | None


def frechet_distance(features_a: ArrayLike, features_b: ArrayLike, shrinkage: float = 0.0) -> float:
    """Return the squared Frechet distance between the Gaussians with the features' means and covariances.

    |m_a - m_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))^(1/2)), of features (n, d) and (m, d), with unbiased covariances.
    It overstates the distance of the laws by about a constant over the number of samples: print it with
    `frechet_floor`. With A = R^T R and B = S^T S the last trace is the sum of the singular values of S R^T, real by
    construction; A and B themselves are never formed, so no digits are lost where they are nearly singular.

    Args:
        shrinkage: weight in [0, 1) of tr(A)/d I in A, and likewise in B. Above 0, fewer than d + 1 samples are
            accepted. It biases the distance, so give the same to everything that is compared.

    Raises:
        ValueError: if a set has fewer than d + 1 samples and shrinkage is 0, if the dimensions differ, if a feature is
            not finite, or if shrinkage is out of range.
    Source: Heusel et al. (2017), GANs trained by a two time-scale update rule, eq. (6); Dowson and Landau (1982), The
        Frechet distance between multivariate normal distributions.

    >>> frechet_distance([[0.0], [2.0]], [[3.0], [5.0]])
    9.0
    """
    a, b = _features("features_a", features_a), _features("features_b", features_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_b has {b.shape[1]} columns, must have those of features_a, {a.shape[1]}")
    if not 0 <= shrinkage < 1:
        raise ValueError(f"shrinkage must lie in [0, 1), got {shrinkage}")
    for name, x in (("features_a", a), ("features_b", b)):
        _check_samples(name, len(x), x.shape[1], shrinkage)
    r, s = _factor(a, shrinkage), _factor(b, shrinkage)
    gap = float(np.square(a.mean(0) - b.mean(0)).sum())
    traces = float(np.square(r).sum() + np.square(s).sum())
    return gap + max(traces - 2 * float(svdvals(s @ r.T).sum()), 0.0)


def frechet_floor(
    reference: ArrayLike,
    n: int,
    stream: Stream,
    repeats: int = 20,
    against: int | None = None,
    shrinkage: float = 0.0,
) -> Interval:
    """Return what a perfect sampler scores: the Frechet distance of n draws from the reference to others from it.

    Each repeat draws, without replacement, n and `against` rows that are disjoint. The interval is Student's for one
    more score: a distance above it is worse than a perfect sampler's in 97.5 % of the cases. To compare like with
    like, compute the distance itself from n samples to `against` rows of the reference.

    Args:
        reference: features (N, d).
        against: rows on the other side; by default the N - n that are left.

    Raises:
        ValueError: as of `frechet_distance`; if n + against > N or repeats < 2.
    """
    rows = _features("reference", reference)
    other = len(rows) - n if against is None else against
    for name, size in (("n", n), ("against", other)):
        _check_samples(name, size, rows.shape[1], shrinkage)
    if n + other > len(rows):
        raise ValueError(f"n + against is {n + other}, must be at most the rows of reference, {len(rows)}")
    if repeats < 2:
        raise ValueError(f"repeats must be >= 2, got {repeats}")
    scores = []
    for i in range(repeats):
        order = stream.child("frechet-floor", i).generator().permutation(len(rows))
        scores.append(frechet_distance(rows[order[:n]], rows[order[n : n + other]], shrinkage))
    return one_more(scores)


def one_more(scores: Sequence[float]) -> Interval:
    """Return the mean of scores >= 0, and Student's 95 % interval for one more of them.

    Raises:
        ValueError: if there are fewer than two.
    """
    repeats = len(scores)
    if repeats < 2:
        raise ValueError(f"scores must be at least two, got {repeats}")
    mean = float(np.mean(scores))
    width = float(student.ppf(0.975, repeats - 1) * np.std(scores, ddof=1) * math.sqrt(1 + 1 / repeats))
    return Interval(mean, max(mean - width, 0.0), mean + width)


def diversity(features: ArrayLike) -> Estimate:
    """Return the mean Euclidean distance between two different samples, over all pairs of rows of features (n, d).

    The mean over pairs is a U-statistic, so it is unbiased at every n; its error is that of the jackknife. For rows of
    unit length the distance is sqrt(2 (1 - cosine)). Time grows as n^2 d, memory as n.

    Raises:
        ValueError: if there are fewer than 3 samples or a feature is not finite.
    Source: Arvesen (1969), Jackknifing U-statistics.

    >>> diversity([[0.0], [1.0], [3.0]]).value
    2.0
    """
    rows = _features("features", features)
    n = len(rows)
    if n < 3:
        raise ValueError(f"features has {n} rows, must have at least 3")
    sums = np.concatenate([cdist(rows[i : i + _BLOCK], rows).sum(1) for i in range(0, n, _BLOCK)])
    without = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2))
    return Estimate(
        float(sums.sum() / (n * (n - 1))), float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
    )


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the mean of independent values (n,) with Student's interval, exact for Gaussian ones.

    Raises:
        ValueError: if there are fewer than 2 values, one is not finite, or confidence is outside (0, 1).
    Source: Student (1908), The probable error of a mean.

    >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(low, 4), round(high, 4)
    (2.0, -0.4841, 4.4841)
    """
    x = _values(values)
    if len(x) < 2:
        raise ValueError(f"values has {len(x)} entries, must have at least 2")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, must lie in (0, 1)")
    mean = float(x.mean())
    width = float(student.isf((1 - confidence) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - width, mean + width)


def per_prompt(values: ArrayLike, prompt_index: ArrayLike) -> list[PromptMean]:
    """Return a row for each prompt, by rising index, of values (n,) whose prompts are prompt_index (n,).

    Raises:
        ValueError: if the shapes differ, a value is not finite, or an index is not an integer >= 0.

    >>> per_prompt([1.0, 5.0, 3.0], [2, 0, 2])
    [PromptMean(prompt=0, samples=1, mean=5.0, error=None), PromptMean(prompt=2, samples=2, mean=2.0, error=1.0)]
    """
    x, index = _values(values), np.asarray(prompt_index)
    if index.shape != x.shape:
        raise ValueError(f"prompt_index has shape {index.shape}, must be that of values, {x.shape}")
    if not np.issubdtype(index.dtype, np.integer) or index.min() < 0:
        raise ValueError(f"prompt_index must hold integers >= 0, got {index.dtype} with smallest {index.min()}")
    return [_prompt_mean(int(prompt), x[index == prompt]) for prompt in np.unique(index)]


def pixels(images: Tensor) -> Tensor:
    """Take the pixels themselves as features: (n, C, H, W) to (n, C H W), enough for small grey images."""
    return images.flatten(1)


def named(name: str) -> Extractor:
    """Return the extractor "module:function", such as "scale.metrics:pixels".

    Raises:
        ValueError: if the name has another form, or the module or the function in it is not found.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"extractor is {name!r}, must have the form module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as fault:
        raise ValueError(f"extractor is {name!r}, its module must be importable ({fault})") from None
    except AttributeError:
        raise ValueError(f"extractor is {name!r}, {module} must hold {function}") from None
    if not callable(found):
        raise ValueError(f"extractor is {name!r}, must be callable, got {type(found).__name__}")
    return cast(Extractor, found)


def extract(extractor: Extractor, images: Tensor, batch: int = 64) -> Array:
    """Return the features (n, d) of images (n, C, H, W) in [0, 1], `batch` of them at a time, without gradients.

    Raises:
        ValueError: if images are not as above, batch < 1, or the extractor does not give a finite row per image.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (n, C, H, W) with n >= 1, got {tuple(images.shape)}")
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images must lie in [0, 1], got [{float(images.min())}, {float(images.max())}]")
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    blocks = []
    with torch.no_grad():
        for part in images.split(batch):
            features = extractor(part)
            if isinstance(features, Tensor):
                features = features.detach().cpu().double().numpy()
            if features.ndim != 2 or len(features) != len(part):
                raise ValueError(f"extractor gave shape {tuple(features.shape)}, must give ({len(part)}, d)")
            blocks.append(features)
    return _features("features", np.concatenate(blocks))


def _features(name: str, features: ArrayLike) -> Array:
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} has shape {x.shape}, must be (n, d) with d >= 1")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise ValueError(f"{name} must be finite, {int(bad.sum())} of {len(x)} rows are not, first row {bad.argmax()}")
    return x


def _values(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"values has shape {x.shape}, must be (n,) with n >= 1")
    if not np.isfinite(x).all():
        raise ValueError(f"values must be finite, {int((~np.isfinite(x)).sum())} of {len(x)} are not")
    return x


def _check_samples(name: str, samples: int, dimension: int, shrinkage: float) -> None:
    least = 2 if shrinkage > 0 else dimension + 1
    if samples < least:
        rule = "2" if shrinkage > 0 else f"d + 1 = {least}, else the covariance is singular; or give a shrinkage > 0"
        raise ValueError(f"{name} has {samples} samples, must have at least {rule}")


def _factor(x: Array, shrinkage: float) -> Array:
    """Return R with R^T R = the covariance of x, shrunk."""
    n, d = x.shape
    r = _triangular((x - x.mean(0)) / math.sqrt(n - 1))
    if shrinkage == 0:
        return r
    scale = math.sqrt(shrinkage * float(np.square(r).sum()) / d)
    return _triangular(np.concatenate([math.sqrt(1 - shrinkage) * r, scale * np.eye(d)]))


def _triangular(x: Array) -> Array:
    """Return R (min(n, d), d) with R^T R = x^T x, from x itself: its squares would lose half the digits."""
    return np.asarray(np.linalg.qr(x, mode="r"))


def _prompt_mean(prompt: int, x: Array) -> PromptMean:
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return PromptMean(prompt, len(x), float(x.mean()), error)
