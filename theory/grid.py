r"""Chains in one dimension, exactly, by quadrature on a grid: any smooth mean, any reward.

The chain is x_{t-1} = mean_t(x_t) + std_t eps_t with x_T ~ N(0, 1). Densities are pushed forward and value functions
pulled back with the trapezoidal rule, whose error for smooth, decaying integrands falls faster than any power of the
spacing; a kink or a jump of the reward lowers that to the spacing's square, if it lies midway between two points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from theory import checked

Array = npt.NDArray[np.float64]
Mean = Callable[[Array], tuple[Array, Array]]
"""Points (n,) to the step's mean (n,) and its derivatives in the parameters (n, p)."""


def step_gradients(
    means: Sequence[Mean], stds: Sequence[float], reward: Callable[[Array], Array], half_width: float, points: int
) -> Array:
    """Exact g_t = d E[R(x_0)] / d theta_t of a one-dimensional chain, shape (T, p); index 0 is step t = 1.

    The grid has `points` points on [-half_width, half_width]; mass outside is lost, so take it wide. Raises ValueError
    unless there is one positive std per mean, half_width is positive, and points are at least 3 and so many that their
    spacing is at most half of every std.

    >>> shift = lambda x: (0.5 * x + 2.0, np.ones((len(x), 1)))  # x_0 = x_1 / 2 + theta + eps / 2 at theta = 2
    >>> step_gradients([shift], [0.5], lambda x: x**2, 12.0, 801).round(10)
    array([[4.]])
    """
    if not means or len(means) != len(stds):
        raise ValueError(f"stds has {len(stds)} entries: must be one per mean, {len(means)}, and at least one")
    for std in stds:
        checked.scalar("stds", std, 0.0, np.inf, closed="()")
    checked.scalar("half_width", half_width, 0.0, np.inf, closed="()")
    checked.count("points", points, 3)
    x = np.linspace(-half_width, half_width, points)
    spacing = float(x[1] - x[0])
    if spacing > min(stds) / 2:
        raise ValueError(
            f"points = {points}: the spacing {spacing:.3g} must not exceed half of the least std {min(stds):g}"
        )
    steps = [mean(x) for mean in means]
    kernels = [_kernel(x, mean, std, spacing) for (mean, _), std in zip(steps, stds, strict=True)]

    densities = [np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)]  # of x_T, x_{T-1}, ..., x_1
    for kernel in kernels[:0:-1]:
        densities.append(kernel.T @ densities[-1])
    value = reward(x)
    rows: list[Array] = []
    for (mean, slopes), std, kernel, density in zip(steps, stds, kernels, densities[::-1], strict=True):
        # d/dm of the integral of N(y; m, std^2) V(y): the score of the location.
        derivative = (kernel * (x[None, :] - mean[:, None])) @ value / std**2
        rows.append((density * derivative * spacing) @ slopes)
        value = kernel @ value
    return np.stack(rows)


def _kernel(x: Array, mean: Array, std: float, spacing: float) -> Array:
    """Transition weights [i, j] from x_i to the cell of x_j."""
    z = (x[None, :] - mean[:, None]) / std
    return np.exp(-(z**2) / 2) * (spacing / (std * np.sqrt(2 * np.pi)))
