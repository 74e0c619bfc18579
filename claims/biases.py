"""Chapter *Estimators*, continued: the biases of parameter noise and of truncation."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms.chain import ParameterNoise, Params
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic
from algorithms.objective import Objective
from claims.claim import Claim
from claims.judges import Sampler, equals, has_mean
from claims.problems import (
    CHAPTER,
    FROM_ADDITIVE,
    MARGIN_ADDITIVE,
    MU,
    THETA,
    additive,
    bilinear,
    both,
    exact_mean,
    gradient_of,
    lazily,
    sampled,
    step_gradients_of,
)
from theory import chains, variance
from toy.experiments import gradients, mapped
from toy.linear_gaussian import LinearGaussian, Problem
from toy.rewards import Power
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis

# --- smoothing bias ----------------------------------------------------------------------------------------------

QUARTIC = {"theta": 0.4, "mu": 0.5, "s": 0.3}


@cache
def one_step() -> tuple[LinearGaussian, Params]:
    """x_0 = theta + s eps as a chain of one step."""
    chain = chains.LinearGaussianChain(
        [[[0.0]]], [[[1.0]]], [[0.0]], [QUARTIC["s"]], [QUARTIC["theta"]], [0.0], [[1.0]]
    )
    return LinearGaussian.of(chain), {"theta": torch.tensor([QUARTIC["theta"]], dtype=torch.float64)}


def quartic_bias(factor: float) -> np.ndarray:
    return np.array([factor * QUARTIC["theta"] * QUARTIC["mu"] ** 2])


def quartic_exact(kind: chains.Noise) -> np.ndarray:
    noisy = variance.smoothed_moment(4, QUARTIC["theta"], QUARTIC["mu"], QUARTIC["s"], kind)
    plain = variance.smoothed_moment(4, QUARTIC["theta"], 0.0, QUARTIC["s"])
    return np.array([noisy.estimate - plain.derivative])


def quartic_sampled(kind: chains.Noise) -> Sampler:
    chain, params = one_step()
    estimator = antithetic(named.zeroth_order(1, QUARTIC["mu"], kind), "parameters")
    derivative = variance.smoothed_moment(4, QUARTIC["theta"], 0.0, QUARTIC["s"]).derivative
    return mapped(gradients(chain, params, Objective(Power(4)), estimator), lambda g: g - derivative)


QUARTIC_BIAS = Claim(
    id="estimators.smoothing-bias-quartic",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/variance.md; RLR, eq. (8), on $R(x) = x^4$",
    title="The smoothing bias of zeroth order on x⁴ is exactly 12 θμ²",
    statement=r"The zeroth-order estimator of $\nabla_\theta\,\mathbb{E}[(\theta + s\epsilon)^4]$ has the bias $12\,\theta\mu^2$ with "
    r"Gaussian and $4\,\theta\mu^2$ with Rademacher parameter noise, for every $s$.",
    printed="holds",
    why="Take the fourth power of θ + μξ + sε, multiply by ξ/μ and average: E ξ⁴ = 3 for a Gaussian, 1 for a sign.",
    derivation="variance.md#smoothing",
    checks=(
        equals(
            "exact bias",
            "Does expanding the fourth power give 12 θμ² (Gaussian) and 4 θμ² (Rademacher)?",
            ("Gaussian", "Rademacher"),
            subject=lambda: both(quartic_exact("gaussian"), quartic_exact("rademacher")),
            reference=lambda: both(quartic_bias(12), quartic_bias(4)),
            controls={
                "no bias": lambda: np.zeros(2),
                "Gaussian factor for signs": lambda: both(quartic_bias(12), quartic_bias(12)),
                "second-order term only": lambda: both(quartic_bias(6), quartic_bias(2)),
            },
        ),
        has_mean(
            "sampled bias, Gaussian",
            "Is the sampled estimate, less the true derivative, 12 θμ² = 1.2 on average?",
            ("bias",),
            subject=lazily(lambda: quartic_sampled("gaussian")),
            reference=lambda: quartic_bias(12),
            margin=0.05,
            margin_from="0.05, 4 % of the bias; declared before sampling",
            kurtosis=kurtosis(5),
            controls={
                "bias counted twice": lazily(
                    lambda: mapped(quartic_sampled("gaussian"), lambda g: g + quartic_bias(12))
                ),
                "signs for Gaussians": lazily(lambda: quartic_sampled("rademacher")),
            },
        ),
        has_mean(
            "sampled bias, Rademacher",
            "Is the sampled estimate with random signs, less the true derivative, 4 θμ² = 0.4 on average?",
            ("bias",),
            subject=lazily(lambda: quartic_sampled("rademacher")),
            reference=lambda: quartic_bias(4),
            margin=0.02,
            margin_from="0.02, 5 % of the bias; declared before sampling",
            kurtosis=kurtosis(5),
            controls={"Gaussians for signs": lazily(lambda: quartic_sampled("gaussian"))},
        ),
    ),
)

ZERO_BIAS = Claim(
    id="estimators.smoothing-bias-zero",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/credit-matrix.md; RLR, Theorem 5.1, in the case where it holds for the objective itself",
    title="Zeroth order has no smoothing bias where the objective is quadratic in the parameters",
    statement=r"If $J(\theta_1, \dots, \theta_T)$ is quadratic in the per-step parameters, then $\nabla J_\mu = "
    r"\nabla J$ for every $\mu$; an additive linear-Gaussian chain with a quadratic reward is such a case.",
    printed="holds",
    why="A quadratic's gradient is linear, and the noise has mean zero.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "exact mean at three μ",
            "Is the exact mean on the additive chain the gradient itself at μ = 0.05, 0.5 and 2?",
            tuple(f"{name}, μ = {mu}" for mu in (0.05, 0.5, 2.0) for name in THETA),
            subject=lambda: _zeroth_means(additive(), 4),
            reference=lambda: np.tile(gradient_of(additive()), 3),
            controls={
                "a chain whose matrix turns": lambda: (
                    _zeroth_means(bilinear(), 3) - np.tile(gradient_of(bilinear()) - gradient_of(additive()), 3)
                )
            },
        ),
        has_mean(
            "sampled mean",
            "Does the antithetic sampled estimate on the additive chain, μ = 0.5, have the gradient as its mean?",
            THETA,
            subject=lazily(lambda: sampled(additive(), antithetic(named.zeroth_order(4, MU), "parameters"))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            controls={
                "step 1 left out": lazily(lambda: sampled(additive(), _without_first_step())),
            },
        ),
    ),
)


def _zeroth_means(problem: Problem, steps: int) -> np.ndarray:
    return np.concatenate([exact_mean(problem, credits.zeroth_order(steps), mu=mu) for mu in (0.05, 0.5, 2.0)])


def _without_first_step() -> Estimator:
    w = credits.zeroth_order(4).matrices[0].copy()
    w[0, -1] = 0
    return antithetic(Estimator("zeroth", Credit.of(w), ParameterNoise(MU)), "parameters")


# --- truncation --------------------------------------------------------------------------------------------------


def omitted(first: int) -> np.ndarray:
    """Sum of the true per-step gradients of LG1 from step `first` on."""
    return step_gradients_of(additive())[first - 1 :].sum(0)


def truncation_gap(length: int) -> np.ndarray:
    return gradient_of(additive()) - exact_mean(additive(), credits.truncated(4, length))


TRUNCATION = Claim(
    id="estimators.truncation-bias",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, Proposition 4.1, second part",
    title="The bias of truncated back-propagation is the omitted steps, not two more",
    statement=(
        r"The structural bias of back-propagation truncated to $T'$ steps is $\mathbb{E}\Big[\big(\sum_{i=T'-1}^{T} "
        r"\tfrac{\partial \phi_i}{\partial \theta} \prod_{j=1}^{i-1} \tfrac{\partial \phi_j}{\partial \mathbf{x}_j}"
        r"\big)^\top \tfrac{dR}{d\mathbf{x}_0}\Big]$."
    ),
    printed="holds-corrected",
    corrected=r"The sum starts at $i = T' + 1$, and the Jacobians stand as $\tfrac{\partial \phi_1}{\partial "
    r"\mathbf{x}_1} \cdots \tfrac{\partial \phi_{i-1}}{\partial \mathbf{x}_{i-1}} \tfrac{\partial \phi_i}{\partial "
    r"\theta}$.",
    why="Eq. (14), with K for T', keeps the steps 1..T', so T'-1 and T' are not missing. On LG1 with T' = 2 the printed sum is the "
    "whole gradient, as if the truncated estimate were zero on average.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "exact bias",
            "Is the exact bias on the additive chain at T' = 2 and 3 the sum of g_i over i ≥ T' + 1?",
            tuple(f"{name}, T' = {k}" for k in (2, 3) for name in THETA),
            subject=lambda: both(omitted(3), omitted(4)),
            reference=lambda: both(truncation_gap(2), truncation_gap(3)),
            printed=lambda: both(omitted(1), omitted(2)),
            controls={"sum from T'": lambda: both(omitted(2), omitted(3))},
        ),
        has_mean(
            "sampled bias",
            "Is the sampled truncated estimate (T' = 2) short of the gradient by g₃ + g₄ on average?",
            THETA,
            subject=lazily(lambda: _shortfall(named.truncated(4, 2))),
            reference=lambda: omitted(3),
            margin=MARGIN_ADDITIVE / 5,
            margin_from="0.01, 1 % of |∇J| = 1.19 on this chain; declared before sampling",
            kurtosis=kurtosis(1),
            printed=lazily(lambda: mapped(_shortfall(named.truncated(4, 2)), lambda g: g + omitted(3) - omitted(1))),
            controls={"truncated at 3": lazily(lambda: _shortfall(named.truncated(4, 3)))},
        ),
    ),
)


def _shortfall(estimator: Estimator) -> Sampler:
    return mapped(sampled(additive(), estimator), lambda g: gradient_of(additive()) - g)


def product_order(order: str) -> np.ndarray:
    """First-order gradient of LG1 with the Jacobian products written in a given order (all matrices are 2 x 2)."""
    chain, reward = additive().exact_chain, additive().exact_reward
    means, _ = chains.marginals(chain)
    slope = reward.linear + reward.quadratic @ means[0]
    total = np.zeros(2)
    for t in range(4):
        factors = [chain.A[j] for j in range(t)]
        product = np.linalg.multi_dot([np.eye(2), *factors, np.eye(2)])
        reverse = np.linalg.multi_dot([np.eye(2), *factors[::-1], np.eye(2)])
        matrix = {
            "chain rule": product @ chain.B[t],
            "printed": chain.B[t] @ product,
            "reversed": reverse @ chain.B[t],
            "printed reversed": chain.B[t] @ reverse,
        }[order]
        total += matrix.T @ slope
    return total


JACOBIAN_ORDER = Claim(
    id="estimators.jacobian-order",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, eq. (9)",
    title="The Jacobians of full back-propagation do not commute: the printed product is another matrix",
    statement=(
        r"$\nabla_\theta R(\mathbf{x}_0) = \Big[\tfrac{\partial \phi_1}{\partial \theta} + \sum_{i=2}^{T} "
        r"\tfrac{\partial \phi_i}{\partial \theta} \prod_{j=1}^{i-1} \tfrac{\partial \phi_j}{\partial \mathbf{x}_j}"
        r"\Big]^\top \tfrac{dR}{d\mathbf{x}_0}$"
    ),
    printed="holds-corrected",
    corrected=r"$\Big[\sum_{i=1}^{T} \tfrac{\partial \phi_1}{\partial \mathbf{x}_1} \cdots \tfrac{\partial "
    r"\phi_{i-1}}{\partial \mathbf{x}_{i-1}} \tfrac{\partial \phi_i}{\partial \theta}\Big]^\top "
    r"\tfrac{dR}{d\mathbf{x}_0}$",
    why="The chain rule puts the parameter derivative last; appendix A.7.1 has it so until its last line. As printed the shapes fit only if dim θ = dim x, and "
    "even then the value is wrong.",
    derivation="credit-matrix.md#the-backward-sweep",
    checks=(
        equals(
            "expected gradient",
            "Does the product give the gradient of the exact objective on the additive chain?",
            THETA,
            subject=lambda: product_order("chain rule"),
            reference=lambda: gradient_of(additive()),
            printed=lambda: product_order("printed"),
            controls={
                "Jacobians in reverse": lambda: product_order("reversed"),
                "printed, Jacobians in reverse": lambda: product_order("printed reversed"),
            },
        ),
    ),
)


CLAIMS: tuple[Claim, ...] = (QUARTIC_BIAS, ZERO_BIAS, TRUNCATION, JACOBIAN_ORDER)
