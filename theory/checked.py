"""Arguments turned into read-only float64 arrays, or refused in one line that names argument, value and rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def array(name: str, value: ArrayLike, ndim: int) -> Array:
    """A read-only float64 copy of `value` with `ndim` axes and finite, real entries.

    Raises ValueError if the value is not numeric, has another number of axes, is empty, or is not finite.

    >>> array("mean", [1, 2], 1)
    array([1., 2.])
    >>> array("mean", [1, float("nan")], 1)
    Traceback (most recent call last):
    ...
    ValueError: mean = [1.0, nan]: must be finite
    """
    try:
        result = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: must be an array of real numbers") from None
    if result.ndim != ndim or result.size == 0:
        raise ValueError(f"{name} has shape {result.shape}: must be non-empty with {ndim} axes")
    if not np.isfinite(result).all():
        raise ValueError(f"{name} = {_short(result)}: must be finite")
    result.setflags(write=False)
    return result


def scalar(name: str, value: float, low: float, high: float, *, closed: str = "[]") -> float:
    """`value` as a float if it lies between `low` and `high`; `closed` says which ends belong, as in "[)".

    Raises ValueError otherwise, and for NaN.

    >>> scalar("eta", 1.0, 0.0, 1.0)
    1.0
    >>> scalar("alpha_bar", 1.0, 0.0, 1.0, closed="[)")
    Traceback (most recent call last):
    ...
    ValueError: alpha_bar = 1.0: must lie in [0.0, 1.0)
    """
    number = float(value)
    above = number >= low if closed[0] == "[" else number > low
    below = number <= high if closed[1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} = {number}: must lie in {closed[0]}{low}, {high}{closed[1]}")
    return number


def count(name: str, value: int, low: int) -> int:
    """`value` if it is an integer not below `low`; raises ValueError otherwise.

    >>> count("T", 0, 1)
    Traceback (most recent call last):
    ...
    ValueError: T = 0: must be an integer >= 1
    """
    if int(value) != value or value < low:
        raise ValueError(f"{name} = {value}: must be an integer >= {low}")
    return int(value)


def covariance(name: str, value: ArrayLike, dim: int) -> Array:
    """`value` as a symmetric positive semi-definite matrix (dim, dim), read-only.

    Raises ValueError if the shape is another, or if symmetry or positivity fail by more than rounding.

    >>> covariance("cov", [[1, 2], [2, 1]], 2)
    Traceback (most recent call last):
    ...
    ValueError: cov = [[1.0, 2.0], [2.0, 1.0]]: must be positive semi-definite (least eigenvalue -1)
    """
    matrix = array(name, value, 2)
    if matrix.shape != (dim, dim):
        raise ValueError(f"{name} has shape {matrix.shape}: must be {(dim, dim)}")
    # Products such as M C M' are symmetric and positive only up to rounding, which grows with the largest entry.
    rounding = 64 * dim * np.finfo(np.float64).eps * float(np.abs(matrix).max())
    if np.abs(matrix - matrix.T).max() > rounding:
        raise ValueError(f"{name} = {_short(matrix)}: must be symmetric")
    symmetric = 0.5 * (matrix + matrix.T)
    least = float(np.linalg.eigvalsh(symmetric)[0])
    if least < -rounding:
        raise ValueError(f"{name} = {_short(matrix)}: must be positive semi-definite (least eigenvalue {least:.6g})")
    symmetric.setflags(write=False)
    return symmetric


def _short(value: Array) -> str:
    text = str(value.tolist())
    return text if len(text) <= 80 else f"{text[:77]}..."
