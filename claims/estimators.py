"""Chapter *Estimators*, first part: what gradient estimators of a diffusion chain estimate, and what biases them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms.baselines import Baseline, LeaveOneOut
from algorithms.chain import Chain, Condition, ParameterNoise, Params, positive_std, rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic, with_baseline
from algorithms.objective import Objective, kl_regularised
from claims import variances
from claims.claim import Claim
from claims.judges import Sampler, Values, equals, has_mean
from claims.learned import LEARNED
from claims.records import Figure
from theory import chains, instances, variance
from theory.credit import credit_moments, row_moments
from toy.experiments import Block, generator, gradients, mapped
from toy.linear_gaussian import LinearGaussian, Problem
from toy.rewards import Power
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

CHAPTER = "Estimators"
MARGIN_ADDITIVE = 0.05
MARGIN_BILINEAR = 0.02
FROM_ADDITIVE = "0.05, 4 % of |∇J| = 1.19 on this chain; declared before sampling"
FROM_BILINEAR = "0.02, 6 % of |∇J| = 0.326 on this chain; declared before sampling"
THETA = ("θ₁", "θ₂")
MU = 0.5


@cache
def additive() -> Problem:
    """LG1: T = 4, d = p = 2, additive parameters."""
    return Problem.of(instances.additive_instance())


@cache
def bilinear() -> Problem:
    """BLN: T = 3, d = p = 2, parameters that also turn the step's matrix."""
    return Problem.of(instances.bilinear_instance())


def gradient_of(problem: Problem) -> np.ndarray:
    return chains.gradient(problem.exact_chain, problem.exact_reward)


def step_gradients_of(problem: Problem) -> np.ndarray:
    return chains.step_gradients(problem.exact_chain, problem.exact_reward)


def exact_mean(problem: Problem, credit: Credit, **options: Any) -> np.ndarray:
    """The exact mean of a credit matrix's estimate."""
    return credit_moments(problem.exact_chain, problem.exact_reward, credit.outcomes, **options).mean


def sampled(problem: Problem, estimator: Estimator) -> Sampler:
    """Per-sample gradients of the torch objects on the torch twin."""
    return gradients(problem.chain, problem.params, problem.objective, estimator)


def lazily(make: Callable[[], Sampler]) -> Sampler:
    """A sampler built only when it is used, so that listing claims costs nothing."""
    return lambda stream: make()(stream)


def both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.concatenate([first, second])


BOTH = ("θ₁ (additive)", "θ₂ (additive)", "θ₁ (bilinear)", "θ₂ (bilinear)")


def exact_on_both(credit_for: Callable[[int], Credit], **options: Any) -> Values:
    """Exact means on the additive and on the bilinear chain, four numbers; `credit_for(T)` is the matrix."""
    return lambda: both(
        exact_mean(additive(), credit_for(4), **options),
        exact_mean(bilinear(), credit_for(3), **options),
    )


def truth_on_both() -> np.ndarray:
    return both(gradient_of(additive()), gradient_of(bilinear()))


# --- the credit matrix -------------------------------------------------------------------------------------------


@cache
def signed_matrix() -> Credit:
    """A full matrix with signed weights whose rows sum to one, on BLN (T = 3), without the last column."""
    w = np.array([[0.7, 0.3, 0, 0, 0], [-0.6, 1.1, 0.5, 0, 0], [0.2, -0.4, 0.5, 0.7, 0]])
    return Credit.of(w)


def altered(row: int, column: int, by: float) -> Credit:
    w = signed_matrix().matrices[0].copy()
    w[row, column] += by
    return Credit.of(w)


def row_sum_law() -> np.ndarray:
    """Exact mean of a matrix whose rows do not sum to one, as sum over t of row sum times g_t."""
    return altered(1, 1, 0.8).row_sums() @ step_gradients_of(bilinear())


CREDIT_ROWS = Claim(
    id="estimators.credit-rows",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/credit-matrix.md; covers RLR, eqs. (7)-(9) and (14)",
    title="The estimators are credit matrices, unbiased for every chain exactly when their rows sum to one",
    statement=(
        r"Let $h_{t,k}$ be the gradient of step $t$ read from source $k$: the reward ($k = 0$) or the score of the "
        r"noise of step $k \le t$. Then $\mathbb{E}\,h_{t,k} = g_t$ for every $k$, so that "
        r"$\mathbb{E}\sum_{t,k} W_{t,k}\,h_{t,k} = \sum_t \big(\sum_k W_{t,k}\big)\, g_t$: bias is a row sum."
    ),
    printed="holds",
    why="Given everything upstream of source k, each h is the same conditional derivative, written in another way. "
    "First order, half order, policy gradient, truncation and their mixtures differ in W only.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "every source agrees",
            "Is the exact mean of each single h[t,k] on the bilinear chain the same for all k?",
            tuple(f"t={t}, k={k}, {name}" for t in (1, 2, 3) for k in range(t + 1) for name in THETA),
            subject=lambda: _rows(lambda mean: mean),
            reference=lambda: _rows(lambda mean: np.repeat(step_gradients_of(bilinear())[:, None], 4, 1)),
            controls={
                "the score's sign flipped": lambda: _rows(lambda mean: np.concatenate([mean[:, :1], -mean[:, 1:]], 1)),
                "the gradient of another step": lambda: _rows(lambda mean: np.roll(mean, 1, 0)),
            },
        ),
        equals(
            "row sums tell the bias",
            "Is the exact mean of a signed matrix with a row that sums to 1.8 that row sum's multiple of g₂?",
            THETA,
            subject=lambda: exact_mean(bilinear(), altered(1, 1, 0.8)),
            reference=row_sum_law,
            controls={"called unbiased": lambda: gradient_of(bilinear())},
        ),
        has_mean(
            "the sweep samples it",
            "Does the torch sweep with a full signed matrix (rows sum to one) have the exact gradient as its mean?",
            THETA,
            subject=lazily(lambda: sampled(bilinear(), Estimator("signed", signed_matrix()))),
            reference=lambda: gradient_of(bilinear()),
            margin=MARGIN_BILINEAR,
            margin_from=FROM_BILINEAR,
            kurtosis=kurtosis(4),
            controls={
                "row 2 sums to 3": lazily(lambda: sampled(bilinear(), Estimator("off", altered(1, 1, 2.0)))),
                "row 3 sums to -1": lazily(lambda: sampled(bilinear(), Estimator("off", altered(2, 2, -2.0)))),
            },
        ),
    ),
    figures=lambda context: (_matrix_figure(),),
)


def _rows(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Means of all h[t, k] with k <= t on BLN, flattened, after `change` of the (T, T + 1, p) array."""
    mean = change(row_moments(bilinear().exact_chain, bilinear().exact_reward).mean)
    return np.concatenate([mean[t, : t + 2].ravel() for t in range(3)])


def _matrix_figure() -> Figure:
    law = np.array([0.4, 0.3, 0.2, 0.1])
    matrices = {
        "first order": credits.first_order(4),
        "truncated(2)": credits.truncated(4, 2),
        "random truncation": credits.random_truncation(law),
        "its debiased form": credits.random_truncation(law, debiased=True),
        "half order(2)": credits.half_order(4, 2),
        "policy gradient": credits.policy_gradient(4),
        "zeroth order": credits.zeroth_order(4),
    }
    return Figure(
        name="credit-matrices",
        title="The estimators as credit matrices, T = 4",
        caption="Rows are target steps, columns the sources that pay for them: the reward (0), the noise of each step, "
        "the parameter noise (p). A row that does not sum to one is a bias, visible before a sample is drawn; for "
        "random truncation the expected matrix is shown.",
        alt="Seven small tables of weights. First order: column 0 is all ones. Truncated: only its first two rows. "
        "Half order: blocks of two rows share a noise column. Policy gradient: the identity. Zeroth order: last column.",
        kind="matrix",
        x_label="source",
        y_label="step",
        column_labels=("0", "1", "2", "3", "4", "p"),
        matrices=tuple((name, tuple(map(tuple, c.expected().tolist()))) for name, c in matrices.items()),
    )


# --- unbiasedness of the named estimators ------------------------------------------------------------------------


LEVEL, SPREAD, EDGE = 0.3, 0.4, 0.5  # x = 0.3 + 0.4 eps; the kink, or jump, lies at 0.5


def one_step_means(jump_by: str) -> np.ndarray:
    """Means, by the midpoint rule, of the gradient of -|x - 1/2| and of an estimator of the slope of P(x > 1/2)."""
    x = EDGE + 2.5e-4 * (np.arange(-20_000, 20_000) + 0.5)
    density = norm.pdf(x, LEVEL, SPREAD) * 2.5e-4
    step = (x > EDGE).astype(float)
    score = (x - LEVEL) / SPREAD**2
    jump = {"gradient": 0.0 * step, "score": step * score, "score, sign flipped": -step * score}[jump_by]
    return np.array([density @ -np.sign(x - EDGE), density @ jump])


def one_step_slopes() -> np.ndarray:
    """The slopes of the mean rewards in closed form."""
    z = (EDGE - LEVEL) / SPREAD
    return np.array([1 - 2 * norm.sf(z), norm.pdf(z) / SPREAD])


FIRST_ORDER = Claim(
    id="estimators.first-order-unbiased",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, eq. (9) and Proposition 4.1, first part",
    title="Full back-propagation is unbiased",
    statement=r"$\mathbb{E}\big[\nabla_\theta R(\mathbf{x}_0)\big] = \nabla_\theta\,\mathbb{E}[R(\mathbf{x}_0)]$ if $R$ and "
    r"$\phi$ are differentiable almost everywhere and have bounded gradients *or* Lipschitz constants.",
    printed="holds-corrected",
    corrected="It holds if they are Lipschitz; bounded gradients almost everywhere are not enough.",
    why="The law of the noise does not depend on the parameters, so derivative and expectation change places, if the reward has no "
    "jumps: a step function has the bounded gradient zero almost everywhere, and its expected reward has a slope.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "exact mean",
            "Is the exact mean of the first-order estimate the gradient of the exact objective?",
            BOTH,
            subject=exact_on_both(credits.first_order),
            reference=truth_on_both,
            controls={"last step dropped": exact_on_both(lambda steps: credits.truncated(steps, steps - 1))},
        ),
        equals(
            "kink and jump, one step",
            "Is the mean of the gradient the slope of the mean for a kink, and for a jump only that of the score estimator?",
            ("kink", "jump"),
            subject=lambda: one_step_means("score"),
            reference=one_step_slopes,
            tolerance=1e-6,
            margin_from="1e-6: the midpoint rule at a kink or jump errs by about the spacing's square, 6e-8",
            printed=lambda: one_step_means("gradient"),
            controls={"score's sign flipped": lambda: one_step_means("score, sign flipped")},
        ),
        has_mean(
            "sampled mean",
            "Does the sweep with column 0 have the exact gradient as its mean on the bilinear chain?",
            THETA,
            subject=lazily(lambda: sampled(bilinear(), named.first_order(3))),
            reference=lambda: gradient_of(bilinear()),
            margin=MARGIN_BILINEAR / 4,
            margin_from="0.005, 1.5 % of |∇J| = 0.326 on this chain; declared before sampling",
            kurtosis=kurtosis(2),
            controls={
                "last step dropped": lazily(lambda: sampled(bilinear(), named.truncated(3, 2))),
                "first step counted twice": lazily(
                    lambda: sampled(bilinear(), Estimator("twice", _first_step_twice()))
                ),
            },
        ),
    ),
)


def _first_step_twice() -> Credit:
    w = credits.first_order(3).matrices[0].copy()
    w[0, 0] = 2
    return Credit.of(w)


def overlapping(steps: int, length: int = 2) -> Credit:
    """Half-order blocks that start at every step instead of partitioning the chain."""
    w = np.zeros((steps, steps + 2))
    for start in range(steps):
        w[start : start + length, start + 1] += 1
    return Credit.of(w)


def negated(credit: Credit) -> Credit:
    return Credit(-credit.matrices, credit.probabilities)


HALF_ORDER = Claim(
    id="estimators.half-order-unbiased",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, eq. (7) and Theorem 5.1",
    title="Half order is unbiased for every block length, with the score's sign reversed",
    statement=(
        r"$R(\mathbf{x}_0) \sum_j D_\theta^\top \phi_{j_h:j_h+h-1}\,\nabla \ln f(\mathbf{z}_{j_h})$, $f$ the density of "
        r"the noise $\mathbf{z}$, is an unbiased estimator of $\nabla_\theta\,\mathbb{E}[R(\mathbf{x}_0)]$."
    ),
    printed="holds-corrected",
    corrected=(
        r"With $\mathbf{z}_j / \sigma_j^2$ in place of $\nabla \ln f(\mathbf{z}_j) = -\mathbf{z}_j / \sigma_j^2$, and "
        r"blocks that partition $\{1, \dots, T\}$, it is unbiased for every $h$."
    ),
    why="The score belongs to the location of the density, not to its argument: with f the density of z the printed sign climbs "
    "down. Appendix A.7.3 differentiates in the parameter of the density, which is the sign used here. It is no global sign: in "
    "eq. (11) the first-order term keeps its own.",
    derivation="credit-matrix.md#sources-of-credit",
    checks=(
        equals(
            "exact mean",
            "Is the exact mean of half order(2) the gradient of the exact objective?",
            BOTH,
            subject=exact_on_both(lambda steps: credits.half_order(steps, 2)),
            reference=truth_on_both,
            printed=exact_on_both(lambda steps: negated(credits.half_order(steps, 2))),
            controls={"overlapping blocks": exact_on_both(overlapping)},
        ),
        *(
            has_mean(
                f"sampled mean, h = {h}",
                f"Does the sweep with half order({h}) have the exact gradient as its mean on the bilinear chain?",
                THETA,
                subject=lazily(lambda h=h: sampled(bilinear(), named.half_order(3, h))),
                reference=lambda: gradient_of(bilinear()),
                margin=MARGIN_BILINEAR,
                margin_from=FROM_BILINEAR,
                kurtosis=kurtosis(4),
                printed=lazily(lambda h=h: sampled(bilinear(), Estimator("minus", negated(credits.half_order(3, h))))),
                controls={"overlapping blocks": lazily(lambda: sampled(bilinear(), Estimator("o", overlapping(3))))},
            )
            for h in (1, 2, 3)
        ),
    ),
)


def smoothed_gradient(**options: Any) -> np.ndarray:
    problem = bilinear()
    rows = chains.smoothed_step_gradients(problem.exact_chain, problem.exact_reward, MU, **options)
    return rows.sum(0)


@dataclass(frozen=True, eq=False)
class SharedNoise(Estimator):
    """Planted error: one parameter noise for the whole chain, as code that perturbs a module once does."""

    def draw(self, chain: Chain, params: Params, samples: int, generator: torch.Generator) -> named.Noise:
        noise = super().draw(chain, params, samples, generator)
        assert noise.parameters is not None
        shared = {name: xi[:1].expand_as(xi) for name, xi in noise.parameters.items()}
        return replace(noise, parameters=shared)


def zeroth(shared: bool = False, scale: float = 1.0) -> Estimator:
    """Antithetic zeroth order on BLN, or a planted error of it."""
    kind = SharedNoise if shared else Estimator
    w = credits.zeroth_order(3)
    return kind("zeroth", Credit(scale * w.matrices, w.probabilities), ParameterNoise(MU), flips=("parameters",))


ZEROTH_ORDER = Claim(
    id="estimators.zeroth-order-smoothed",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, eq. (8) and Theorem 5.1",
    title="Zeroth order is unbiased for the smoothed objective, not for the objective",
    statement=(
        r"$\sum_{t} R(\mathbf{x}_0)\,\nabla \ln f(\mathbf{z}_t)$ with noise $\mathbf{z}_t$ on the parameters is an "
        r"unbiased estimator of $\nabla_\theta\,\mathbb{E}[R(\mathbf{x}_0)]$."
    ),
    printed="holds-corrected",
    corrected=(
        r"$\sum_t R(\mathbf{x}_0)\,\mathbf{z}_t / \mu^2$ with independent $\mathbf{z}_t \sim \mathcal{N}(0, \mu^2 I)$ is "
        r"unbiased for $\nabla J_\mu$, $J_\mu(\theta) = \mathbb{E}\,J(\theta + \mathbf{z}_1, \dots, \theta + "
        r"\mathbf{z}_T)$; the bias for $J$ is $O(\mu^2)$, and zero for every $\mu$ if $J$ is quadratic."
    ),
    why="The perturbed chain is another chain: its objective is the average of J over the perturbations. The paper's proof, "
    "eqs. (15)-(17), keeps the noise inside the objective; the left side of eq. (12) does not.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "exact mean",
            "Is the exact mean on the bilinear chain the gradient of the exactly smoothed objective?",
            THETA,
            subject=lambda: exact_mean(bilinear(), credits.zeroth_order(3), mu=MU),
            reference=smoothed_gradient,
            printed=lambda: gradient_of(bilinear()),
            controls={
                "one noise for the whole chain": lambda: exact_mean(
                    bilinear(), credits.zeroth_order(3), mu=MU, shared_noise=True
                ),
            },
        ),
        has_mean(
            "sampled mean",
            "Does the antithetic estimate on the bilinear chain, μ = 0.5, have the smoothed gradient as its mean?",
            THETA,
            subject=lazily(lambda: sampled(bilinear(), zeroth())),
            reference=smoothed_gradient,
            margin=MARGIN_BILINEAR,
            margin_from=FROM_BILINEAR,
            # The exact kurtosis of this estimate is out of reach; degree-9 polynomials allow far more. Declared: 2000.
            kurtosis=2000,
            # As printed the mean is the plain gradient: samples less it, plus the reference, should then agree.
            printed=lazily(
                lambda: mapped(
                    sampled(bilinear(), zeroth()), lambda g: g - gradient_of(bilinear()) + smoothed_gradient()
                )
            ),
            controls={
                # Divided by T: the one noise is credited once, not T times.
                "one noise for the whole chain": lazily(lambda: sampled(bilinear(), zeroth(shared=True, scale=1 / 3))),
                "the score's sign flipped": lazily(lambda: sampled(bilinear(), zeroth(scale=-1.0))),
            },
        ),
    ),
)


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

ALIGN_LAW = np.array([0.4, 0.3, 0.2, 0.1])


def inclusion_mean(law: np.ndarray) -> np.ndarray:
    """Mean of the randomly truncated estimate on LG1 from the theory room: sum over t of P(K >= t) g_t."""
    return variance.truncated_mean(step_gradients_of(additive()), np.concatenate([[0.0], law]))


RANDOM_TRUNCATION = Claim(
    id="estimators.random-truncation",
    chapter=CHAPTER,
    paper="AlignProp code",
    about="code",
    source="AlignProp, randomised truncation; an option in RLR's and VADER's code, whose default keeps the last step only",
    title="Random truncation is biased until each step is divided by its inclusion probability",
    statement=r"As released: back-propagate through a random number $K$ of last steps, every reached step with weight one.",
    printed="holds-corrected",
    corrected=r"Its mean is $\sum_t P(K \ge t)\,g_t$. Dividing step $t$ by $P(K \ge t)$ makes it unbiased, provided "
    r"$P(K \ge T) > 0$.",
    why="Early steps are reached rarely, so they are under-paid. AlignProp's own law is redrawn until K < T: it never reaches the "
    "first step and cannot be debiased.",
    derivation="variance.md#random-truncation",
    checks=(
        equals(
            "exact mean of the debiased form",
            "Is the exact mean of the debiased form the gradient?",
            THETA,
            subject=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW, debiased=True)),
            reference=lambda: gradient_of(additive()),
            printed=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW)),
            controls={"divided by P(K = t)": lambda: exact_mean(additive(), _divided_by_mass())},
        ),
        equals(
            "exact mean of the released form",
            "Is the exact mean of plain random truncation the sum of P(K ≥ t) g_t?",
            THETA,
            subject=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW)),
            reference=lambda: inclusion_mean(ALIGN_LAW),
            controls={"P(K > t) in place of P(K ≥ t)": lambda: np.append(ALIGN_LAW[::-1].cumsum()[::-1][1:], 0.0) @ step_gradients_of(additive())},
        ),
        has_mean(
            "sampled mean of the debiased form",
            "Does the sampled debiased form have the exact gradient as its mean?",
            THETA,
            subject=lazily(lambda: sampled(additive(), named.random_truncation(ALIGN_LAW, debiased=True))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE / 5,
            margin_from="0.01, 1 % of |∇J| = 1.19 on this chain; declared before sampling",
            kurtosis=kurtosis(1, rarest=0.1),
            printed=lazily(lambda: sampled(additive(), named.random_truncation(ALIGN_LAW))),
            controls={"divided by P(K = t)": lazily(lambda: sampled(additive(), Estimator("m", _divided_by_mass())))},
        ),
    ),
)  # fmt: skip


def _divided_by_mass() -> Credit:
    plain = credits.random_truncation(ALIGN_LAW)
    return Credit(plain.matrices / ALIGN_LAW[:, None], plain.probabilities)


DIRECT = 1.2  # the scheduler's own slope on x_t; the network supplies the rest of the step's matrix


def kept() -> np.ndarray:
    """P(K >= t) for t = 1..4: how often step t's network output keeps its graph."""
    return ALIGN_LAW[::-1].cumsum()[::-1]


def _split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Direct slopes, network slopes, network inputs of LG1, and the mean costate at x_0."""
    chain, reward = additive().exact_chain, additive().exact_reward
    direct = np.tile(DIRECT * np.eye(2), (4, 1, 1))
    means, _ = chains.marginals(chain)
    return direct, chain.A - direct, chain.B, reward.linear + reward.quadratic @ means[0]


def per_step_mean() -> np.ndarray:
    return variance.independent_truncation_parts(*_split(), kept()).sum(0)


def enumerated_mean(keep: np.ndarray) -> np.ndarray:
    """The same by going through all 16 patterns of cuts, each with its probability and its own product of Jacobians."""
    direct, network, inputs, costate = _split()
    total = np.zeros(2)
    for pattern in itertools.product((0, 1), repeat=4):
        probability = np.prod([q if bit else 1 - q for bit, q in zip(pattern, keep, strict=True)])
        z = costate
        for t, bit in enumerate(pattern):
            total += probability * bit * inputs[t].T @ z
            z = (direct[t] + bit * network[t]).T @ z
    return total


def cut_per_step(once: bool = False, size: int = 1 << 15) -> Sampler:
    """Gradients by plain autograd when network outputs are detached at random, step by step or once per trajectory."""
    problem = additive()
    chain, theta = problem.chain, problem.params["theta"]

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            source = generator(stream, index)
            noise = named.first_order(4).draw(chain, problem.params, size, source)
            leaf = theta.expand(size, 2).clone().requires_grad_()
            uniform = torch.rand(1 if once else 4, size, 1, generator=source, dtype=torch.float64).expand(4, size, 1)
            x = chain.initial(noise.initial)
            for t in range(4, 0, -1):
                full = x @ chain.slope[t - 1].T + leaf @ chain.push[t - 1].T + chain.offset[t - 1]
                output = full - DIRECT * x
                output = torch.where(uniform[t - 1] < kept()[t - 1], output, output.detach())
                x = DIRECT * x + output + chain.std(t) * noise.steps[t - 1]
            (gradient,) = torch.autograd.grad(problem.objective.reward(x, None).sum(), leaf)
            return gradient.numpy()

        return block

    return sampler


def once_mean() -> np.ndarray:
    """Mean when one draw per trajectory decides: the steps up to K keep their graph, the others are cut."""
    direct, network, inputs, costate = _split()
    total, z = np.zeros(2), costate
    for t in range(4):
        total += kept()[t] * inputs[t].T @ z
        z = (direct[t] + network[t]).T @ z
    return total


PER_STEP_TRUNCATION = Claim(
    id="estimators.truncation-per-step",
    chapter=CHAPTER,
    paper="TRL code",
    about="code",
    source="TRL ≤ 0.23, alignprop pipeline step in modeling_sd_base",
    title="Drawing the truncation step inside the denoising loop is not randomised truncation",
    statement="At every denoising step a fresh random step is drawn and the network's output detached before it: "
    "randomised truncation, as one draw per trajectory would be.",
    printed="holds-corrected",
    corrected=(
        r"With $q_t$ the probability that step $t$'s output is kept, $r_t$ the scheduler's direct slope over the whole "
        r"slope (in one dimension), the share of $g_t$ is $q_t \prod_{s<t} (r_s + q_s (1 - r_s))$; one draw per trajectory "
        r"gives $q_t$. Dividing by $q_t$ does not debias it."
    ),
    why="Cuts at independent steps thin out every path through the networks, but the scheduler's direct path is never cut: "
    "where the network contracts, the direct path alone is steeper than the whole, and early steps are paid more than one draw per trajectory would pay them.",
    derivation="variance.md#random-truncation",
    checks=(
        equals(
            "exact mean",
            "Is the closed mean on the additive chain that of going through all 16 patterns of cuts?",
            THETA,
            subject=per_step_mean,
            reference=lambda: enumerated_mean(kept()),
            printed=once_mean,
            controls={"kept with P(K > t)": lambda: enumerated_mean(np.append(kept()[1:], 0.0))},
        ),
        has_mean(
            "sampled mean",
            "Do gradients by plain autograd, with outputs detached step by step, have the closed mean?",
            THETA,
            subject=lazily(cut_per_step),
            reference=per_step_mean,
            margin=MARGIN_ADDITIVE / 5,
            margin_from="0.01, 1 % of |∇J| = 1.19 on this chain; declared before sampling",
            # Linear in the Gaussians given the cuts; the rarest pattern has probability 0.012.
            kurtosis=kurtosis(1, rarest=0.012),
            printed=lazily(lambda: cut_per_step(once=True)),
            controls={"no cut": lazily(lambda: sampled(additive(), named.first_order(4)))},
        ),
    ),
)

# --- baselines, released losses, running costs -------------------------------------------------------------------

GROUP = 4


@dataclass(frozen=True)
class SelfIncluded:
    """Planted error, and what released code does: the group's mean return, the sample's own included."""

    group: int

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        grouped = returns.reshape(-1, self.group)
        return grouped.mean(1, keepdim=True).expand_as(grouped).flatten()


@dataclass(frozen=True)
class PeeksAhead:
    """Planted error: a baseline that depends on the very noise it is paired with."""

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        return 0.5 * returns


def with_group_baseline(baseline: Baseline) -> Sampler:
    problem = additive()
    estimator = with_baseline(named.policy_gradient(4), baseline)
    return gradients(problem.chain, problem.params, problem.objective, estimator, group=GROUP)


BASELINE = Claim(
    id="estimators.baseline-self-included",
    chapter=CHAPTER,
    paper="DDPO code",
    about="code",
    source="ddpo-pytorch and TRL ≤ 0.23, advantage normalisation",
    title="A batch-mean baseline that includes the sample itself shrinks the policy gradient by 1 - 1/N",
    statement=r"Subtracting the mean reward of the batch, or of the prompt's group of $N$ samples, leaves the policy "
    "gradient unbiased.",
    printed="holds-corrected",
    corrected=r"Its mean is $(1 - \tfrac{1}{N})\,\nabla J$; the mean of the *other* samples leaves it unbiased.",
    why="The sample's own reward in the mean is correlated with its own score: it takes 1/N of the gradient away (0.4 % at N = 256, "
    "a half for pairs). The released code also divides by the standard deviation, which is another matter: that estimate is no "
    "multiple of an unbiased one.",
    derivation="variance.md#self-included-baseline",
    checks=(
        has_mean(
            "leave-one-out",
            f"Does the policy gradient with leave-one-out means of groups of {GROUP} have the exact mean?",
            THETA,
            subject=lazily(lambda: with_group_baseline(LeaveOneOut(GROUP))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            printed=lazily(lambda: with_group_baseline(SelfIncluded(GROUP))),
            controls={"a baseline that sees the noise": lazily(lambda: with_group_baseline(PeeksAhead()))},
        ),
        has_mean(
            "self-included",
            f"Does the self-included mean of groups of {GROUP} give 1 - 1/{GROUP} of the exact gradient?",
            THETA,
            subject=lazily(lambda: with_group_baseline(SelfIncluded(GROUP))),
            reference=lambda: variance.self_included_baseline_factor(GROUP) * gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            controls={"leave-one-out": lazily(lambda: with_group_baseline(LeaveOneOut(GROUP)))},
        ),
    ),
)


def by_log_prob(weigh: Callable[[Tensor], Tensor], size: int = 1 << 14) -> Sampler:
    """Return times the gradient of the steps' log-probabilities by autograd, as released losses compute it.

    `weigh` turns a step's log-densities of the coordinates, (1, d), into its log-probability.
    """
    problem = additive()
    chain = problem.chain

    def log_prob(theta: Tensor, path: Tensor) -> Tensor:
        total = torch.zeros((), dtype=theta.dtype)
        for t in range(1, chain.steps + 1):
            z = (path[t - 1] - chain.mean({"theta": theta}, path[t][None], t, None)) / chain.std(t)
            total = total + weigh(-0.5 * z.square())
        return total

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = named.policy_gradient(4).draw(chain, problem.params, size, generator(stream, index))
            latents = rollout(chain, problem.params, noise).latents.transpose(0, 1)
            scores = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0))(problem.params["theta"], latents)
            returns = problem.objective.reward(latents[:, 0], None)
            return (returns[:, None] * scores).numpy()

        return block

    return sampler


LOG_PROB_MEAN = Claim(
    id="estimators.log-prob-sum",
    chapter=CHAPTER,
    paper="DDPO code",
    about="code",
    source="ddpo-pytorch, ddim_with_logprob; TRL ≤ 0.23, modeling_sd_base; RLR's code inherits TRL's",
    title="Log-probabilities averaged over dimensions give 1/d of the policy gradient",
    statement=r"The step's log-probability is the *mean* over the latent's $d$ coordinates of the Gaussian "
    "log-densities.",
    printed="holds-corrected",
    corrected=r"It is their *sum*. The mean scales the gradient by $1/d$ ($d = 16384$ for Stable Diffusion at 512 "
    r"pixels) and, to first order, a clip range on its ratio by $d$.",
    why="Adam's steps do not see a constant factor; the step size of plain gradient ascent, norm clipping, ratio clipping and "
    "mixtures with other terms (first order, KL) do.",
    derivation="credit-matrix.md#the-backward-sweep",
    checks=(
        has_mean(
            "sampled mean",
            "Do returns times autograd's gradients of the summed log-densities have the exact gradient as their mean (d = 2)?",
            THETA,
            subject=lazily(lambda: by_log_prob(lambda densities: densities.sum())),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            printed=lazily(lambda: by_log_prob(lambda densities: densities.mean())),
            controls={
                "first coordinate left out": lazily(lambda: by_log_prob(lambda densities: densities[0, 1])),
                "sign of the exponent dropped": lazily(lambda: by_log_prob(lambda densities: -densities.sum())),
            },
        ),
        has_mean(
            "sampled mean, the sweep",
            "Does the credit matrix of the policy gradient have the same mean?",
            THETA,
            subject=lazily(lambda: sampled(additive(), named.policy_gradient(4))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            controls={
                "sign flipped": lazily(lambda: sampled(additive(), Estimator("-", negated(credits.policy_gradient(4)))))
            },
        ),
    ),
)

KL_STRENGTH, KL_REFERENCE = 0.4, np.array([0.8, 0.3])


def penalty() -> chains.KLPenalty:
    return chains.KLPenalty(KL_STRENGTH, KL_REFERENCE)


def penalised_gradient() -> np.ndarray:
    return chains.gradient(bilinear().exact_chain, bilinear().exact_reward, penalty())


@dataclass(frozen=True, eq=False)
class CostAsReward:
    """Planted error: the KL treated as a part of a black-box reward, without its own gradient in the parameters."""

    strength: float
    reference: Params

    def __call__(self, chain: Chain, mean: Tensor, x: Tensor, t: int, condition: Condition) -> Tensor:
        gap = (mean.detach() - chain.mean(self.reference, x, t, condition)) / positive_std(chain, t)
        return 0.5 * self.strength * gap.square().sum(1)


def penalised(estimator: Estimator, strength: float = KL_STRENGTH, black_box: bool = False) -> Sampler:
    problem = bilinear()
    reference = {"theta": torch.tensor(KL_REFERENCE)}
    objective = kl_regularised(problem.objective, strength, reference)
    if black_box:
        objective = Objective(problem.objective.reward, (CostAsReward(strength, reference),))
    return gradients(problem.chain, problem.params, objective, estimator)


KL_REGULARISED = Claim(
    id="estimators.kl-regularised",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/credit-matrix.md (running costs); the objective of PI-FT and of DPOK",
    title="With a running KL to a reference, every credit matrix with unit rows stays unbiased",
    statement=(
        r"For $\mathbb{E}\big[R(x_0) - \lambda \sum_t \mathrm{KL}(p_\theta(\cdot\,|\,x_t)\,\|\,p_{\mathrm{ref}}(\cdot\,|"
        r"\,x_t))\big]$: source $k$ multiplies its score by the return *after* $k$, the costs of the steps $k, \dots, t$ "
        r"are injected on the way from $k$ to $t$, and $\mathbb{E}\,h_{t,k} = g_t$ as before."
    ),
    printed="holds",
    why="Costs above the noise k cannot be moved by it; those between k and t can be moved by step t and are "
    "differentiated directly.",
    derivation="credit-matrix.md#unbiasedness",
    checks=(
        equals(
            "exact mean",
            "Is the exact mean of the signed matrix the gradient of the exact penalised objective?",
            THETA,
            subject=lambda: exact_mean(bilinear(), signed_matrix(), penalty=penalty()),
            reference=penalised_gradient,
            controls={"KL left out": lambda: exact_mean(bilinear(), signed_matrix())},
        ),
        *(
            has_mean(
                f"sampled mean, {estimator.name}",
                f"Does the sweep with {estimator.name} have the gradient of the exact penalised objective as its mean?",
                THETA,
                subject=lazily(lambda e=estimator: penalised(e)),
                reference=penalised_gradient,
                margin=2 * MARGIN_BILINEAR,
                margin_from="0.04, 1.7 % of |∇J| = 2.38 with the penalty; declared before sampling",
                kurtosis=degree,
                controls={
                    "no direct gradient of the KL": lazily(lambda e=estimator: penalised(e, black_box=True)),
                    "twice the strength": lazily(lambda e=estimator: penalised(e, 2 * KL_STRENGTH)),
                },
            )
            for estimator, degree in (
                (named.first_order(3), kurtosis(2)),
                (named.half_order(3, 2), kurtosis(4)),
                (Estimator("the signed matrix", signed_matrix()), kurtosis(4)),
            )
        ),
    ),
)

CLAIMS: tuple[Claim, ...] = (
    CREDIT_ROWS,
    FIRST_ORDER,
    HALF_ORDER,
    ZEROTH_ORDER,
    QUARTIC_BIAS,
    ZERO_BIAS,
    TRUNCATION,
    JACOBIAN_ORDER,
    RANDOM_TRUNCATION,
    PER_STEP_TRUNCATION,
    BASELINE,
    LOG_PROB_MEAN,
    KL_REGULARISED,
    *LEARNED,
    *variances.CLAIMS,
)
