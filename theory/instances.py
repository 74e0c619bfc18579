"""Small chains with every effect switched on, for exact checks and reference tables."""

from __future__ import annotations

import numpy as np

from theory.chains import LinearGaussianChain, QuadraticReward


def additive_instance() -> tuple[LinearGaussianChain, QuadraticReward]:
    """LG1: an additive chain with T = 4, d = p = 2, non-commuting matrices and an asymmetric concave reward.

    The table of docs/credit-matrix.md refers to it (with parameter noise of standard deviation 0.25).

    >>> chain, reward = additive_instance()
    >>> chain.steps, chain.dim, chain.parameters, chain.additive
    (4, 2, 2, True)
    """
    chain = LinearGaussianChain(
        A=np.array(
            [[[0.9, 0.2], [-0.1, 0.8]], [[0.7, -0.3], [0.4, 0.9]], [[1, 0.5], [0, 0.6]], [[0.8, 0.1], [0.2, 0.7]]]
        ),
        B=np.array(
            [[[1, 0.5], [-0.3, 0.8]], [[0.4, -0.6], [0.7, 0.2]], [[-0.5, 0.9], [0.6, 0.3]], [[0.3, 0.4], [-0.8, 1]]]
        ),
        c=np.array([[0.1, -0.2], [0.05, 0.1], [0, 0.3], [-0.1, 0]]),
        std=np.array([0.3, 0.5, 0.4, 0.6]),
        theta=np.array([0.4, -0.7]),
        mean_T=np.zeros(2),
        cov_T=np.eye(2),
    )
    return chain, _reward()


def bilinear_instance() -> tuple[LinearGaussianChain, QuadraticReward]:
    """BLN: a bilinear chain with T = 3, d = p = 2, whose matrices A_t and N_{t,i} do not commute with one another.

    The parameters act both on the linear part and on the offset, x_T is correlated and not centred, and the objective
    is of degree six in theta: smoothing biases, Jacobian products and state-dependent slopes all show.

    >>> chain, reward = bilinear_instance()
    >>> chain.steps, chain.dim, chain.parameters, chain.additive
    (3, 2, 2, False)
    """
    chain = LinearGaussianChain(
        A=np.array([[[0.8, 0.3], [-0.2, 0.7]], [[0.6, -0.4], [0.5, 0.9]], [[0.9, 0.1], [0.2, 0.5]]]),
        B=np.array([[[0.6, 0.2], [-0.3, 0.5]], [[0.1, -0.4], [0.7, 0.3]], [[-0.2, 0.8], [0.4, 0.1]]]),
        c=np.array([[0.1, -0.2], [0.2, 0.0], [-0.1, 0.3]]),
        std=np.array([0.4, 0.6, 0.5]),
        theta=np.array([0.3, -0.5]),
        mean_T=np.array([0.4, -0.3]),
        cov_T=np.array([[1.0, 0.3], [0.3, 0.6]]),
        N=np.array(
            [
                [[[0.3, -0.2], [0.1, 0.4]], [[-0.1, 0.5], [0.2, 0.0]]],
                [[[0.2, 0.4], [-0.3, 0.1]], [[0.0, -0.2], [0.6, 0.3]]],
                [[[-0.4, 0.1], [0.2, 0.3]], [[0.5, 0.0], [-0.1, -0.2]]],
            ]
        ),
    )
    return chain, _reward()


def _reward() -> QuadraticReward:
    return QuadraticReward(
        constant=np.array(1.5), linear=np.array([0.6, -0.4]), quadratic=np.array([[-1.0, 0.3], [0.3, -0.5]])
    )
