"""Chapter *Estimators*, continued: variance, cost and memory of the estimators, and what was printed about them."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms.chain import Params
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic
from algorithms.objective import Objective
from claims.claim import Claim
from claims.judges import Sampler, at_least, equals, has_mean
from claims.problems import CHAPTER, additive, gradient_of
from claims.records import Figure, Series
from theory import chains, variance
from theory.credit import Moments, credit_moments
from theory.polynomials import Variables, moments
from toy.experiments import Block, gradients, mapped
from toy.linear_gaussian import LinearGaussian
from toy.memory import peak_saved_bytes
from toy.rewards import Sine
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream


def exact(credit: Credit, **options: Any) -> Moments:
    """Exact moments of an estimator on LG1."""
    problem = additive()
    return credit_moments(problem.exact_chain, problem.exact_reward, credit.outcomes, **options)


# --- Proposition 4.2 ---------------------------------------------------------------------------------------------

SINE = {"k": 3.0, "theta": math.pi / 12, "s": 1.0, "mu": 0.6}


def sine() -> variance.SineMoments:
    return variance.sine_moments(**SINE)


@cache
def sine_problem() -> tuple[LinearGaussian, Params, Objective]:
    chain = chains.LinearGaussianChain([[[0.0]]], [[[1.0]]], [[0.0]], [SINE["s"]], [SINE["theta"]], [0.0], [[1.0]])
    params = {"theta": torch.tensor([SINE["theta"]], dtype=torch.float64)}
    return LinearGaussian.of(chain), params, Objective(Sine(SINE["k"]))


def squares(estimator: Estimator, mean: float) -> Sampler:
    """Squared deviations of the sampled estimates from their exact mean: their mean is the variance."""
    return mapped(gradients(*sine_problem(), estimator), lambda g: (g - mean) ** 2)


def sine_variances(change: str = "") -> Sampler:
    """Variances of FO and ZO side by side, or a planted confusion of them."""
    first = squares(named.first_order(1), sine().mean)
    half = squares(named.half_order(1, 1), sine().mean)
    zeroth = squares(named.zeroth_order(1, SINE["mu"]), sine().smoothed_mean)
    pair = {"": (first, zeroth), "swapped": (zeroth, first), "half order": (half, zeroth)}[change]

    def sampler(stream: Stream) -> Block:
        left, right = (s(stream.child(name)) for s, name in zip(pair, ("left", "right"), strict=True))
        return lambda block: np.concatenate([left(block), right(block)], 1)

    return sampler


PROPOSITION_42 = Claim(
    id="estimators.variance-order",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, Proposition 4.2, eq. (10)",
    title="First order can have the larger variance, for a smooth and bounded reward",
    statement=r"$\mathrm{Var}(\nabla_\theta R(\mathbf{x}_0)) \le \mathrm{Var}(R(\mathbf{x}_0)\,\nabla \ln f(\mathbf{z}))$",
    printed="refuted",
    corrected=(
        r"For $x = \theta + s\epsilon$, $R = \sin(kx)$, $\cos 2k\theta = 0$: $\mathrm{Var}\,\mathrm{FO} > "
        r"\mathrm{Var}\,\mathrm{ZO}$ exactly when $(k\mu)^2\,[1 - e^{-k^2s^2}(1 - e^{-k^2\mu^2})] > 1$; against the "
        r"chain's own noise (half order) when $ks > 1$."
    ),
    why="First order sees the slope of the reward, which a fast oscillation makes large however small its values are. "
    "R here is smooth and bounded; for θ in a bounded set the appendix's assumptions A.1-A.3 all hold.",
    derivation="variance.md#the-sine-example",
    checks=(
        at_least(
            "counterexample",
            "At k = 3, s = 1, μ = 0.6, θ = π/12, is the variance of first order larger than that of zeroth order?",
            ("the larger variance",),
            subject=lambda: ([sine().first_order], [sine().zeroth_order]),
            printed=lambda: ([sine().zeroth_order], [sine().first_order]),
            controls={"k = 1/2": lambda: _slow_sine()},
        ),
        equals(
            "crossover",
            "Do the variances cross where the printed inequality turns: ks = 1, and (kμ)² [...] = 1?",
            ("Var FO / Var HO at ks = 1", "Var FO / Var ZO, s = 0.5", "Var FO / Var ZO, s = 2"),
            subject=lambda: _at_crossover(1.0),
            reference=lambda: np.ones(3),
            controls={"crossover moved by 1 %": lambda: _at_crossover(1.01)},
        ),
        has_mean(
            "sampled variances",
            "Do sampled estimates have the exact variances 4.4994 (first order) and 1.3889 (zeroth order)?",
            ("Var FO", "Var ZO"),
            subject=lambda stream: sine_variances()(stream),
            reference=lambda: np.array([sine().first_order, sine().zeroth_order]),
            margin=0.05,
            margin_from="0.05, 2 % of the difference of the variances; declared before sampling",
            # By simulation 27; 60 is declared.
            kurtosis=60,
            printed=lambda stream: sine_variances("swapped")(stream),
            controls={"half order for first order": lambda stream: sine_variances("half order")(stream)},
        ),
    ),
    figures=lambda context: (_sine_figure(),),
)


def _slow_sine() -> tuple[list[float], list[float]]:
    slow = variance.sine_moments(0.5, math.pi / 2, SINE["s"], SINE["mu"])
    return [slow.first_order], [slow.zeroth_order]


def _at_crossover(factor: float) -> np.ndarray:
    """Ratios of variances at the derived crossovers (cosine 0), each moved by `factor`."""
    k = 1.0
    half = variance.sine_moments(factor * k, math.pi / 4 / (factor * k), 1.0, 0.5)
    ratios = [half.first_order / half.half_order]
    for s in (0.5, 2.0):
        mu = factor * variance.first_zeroth_crossover(k, s)
        moments = variance.sine_moments(k, math.pi / 4, s, mu)
        ratios.append(moments.first_order / moments.zeroth_order)
    return np.array(ratios)


def _sine_figure() -> Figure:
    frequencies = np.geomspace(0.2, 5, 60)
    rows = [variance.sine_moments(k, math.pi / 4 / k, 1.0, SINE["mu"]) for k in frequencies]
    x = tuple(frequencies.tolist())
    return Figure(
        name="sine-crossover",
        title="Variance against the reward's frequency, R = sin(kx)",
        caption="First order overtakes half order at ks = 1 and zeroth order soon after: its variance grows with the "
        "square of the reward's slope, theirs is bounded by the reward's size. s = 1, μ = 0.6, cos 2kθ = 0.",
        alt="Three curves of variance against k on logarithmic axes. First order rises as k squared and crosses the "
        "flat curves of half order at k = 1 and of zeroth order at about k = 1.8.",
        x_label="frequency k of the reward",
        y_label="variance",
        x_scale="log",
        y_scale="log",
        series=(
            Series("first order", x, tuple(r.first_order for r in rows)),
            Series("half order", x, tuple(r.half_order for r in rows), style="dashed"),
            Series("zeroth order, μ = 0.6", x, tuple(r.zeroth_order for r in rows), style="dashed"),
        ),
    )


MUS = (0.05, 0.25, 1.0, 2.0)


def loewner_gaps(credit: Credit | None = None) -> tuple[Any, Any]:
    """Smallest eigenvalue of Cov ZO - Cov(estimator, first order by default) on LG1 for several mu, against zero."""
    cov = exact(credit or credits.first_order(4)).cov
    gaps = [
        variance.loewner_gap(cov, exact(credits.zeroth_order(4), mu=mu, antithetic=two_sided).cov)
        for mu in MUS
        for two_sided in (False, True)
    ]
    return np.array(gaps), np.zeros(len(gaps))


QUADRATIC_CASE = Claim(
    id="estimators.variance-order-quadratic",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/variance.md; a case in which RLR, Proposition 4.2, is true",
    title="Where the reward is quadratic in the parameters, first order is the smaller, in Loewner order",
    statement=(
        r"If $R(\mathbf{x}_0)$ is quadratic in $(\theta_1, \dots, \theta_T)$ given the chain's noise, then "
        r"$\mathrm{FO} = \mathbb{E}[\mathrm{ZO} \mid \epsilon]$ and $\mathrm{Cov}\,\mathrm{FO} \preceq "
        r"\mathrm{Cov}\,\mathrm{ZO}$ for every $\mu$."
    ),
    printed="holds",
    why="First order is then the Rao-Blackwellisation of zeroth order. In general E[ZO | noise] is the first-order "
    "estimator of the *smoothed* reward.",
    derivation="variance.md#quadratic-rewards",
    checks=(
        at_least(
            "Loewner order on LG1",
            "Is the smallest eigenvalue of Cov ZO - Cov FO non-negative at every μ, one- and two-sided?",
            tuple(f"μ = {mu:g}, {sides}" for mu in MUS for sides in ("one-sided", "antithetic")),
            subject=loewner_gaps,
            controls={
                "half order(2) for first order": lambda: loewner_gaps(credits.half_order(4, 2)),
                "order reversed": lambda: loewner_gaps()[::-1],
            },
        ),
        equals(
            "covariance of a quadratic, T = 1",
            "Is the closed covariance of zeroth order what polynomial algebra gives, entry by entry?",
            ("C₁₁", "C₁₂", "C₂₁", "C₂₂"),
            subject=lambda: _quadratic_zeroth().ravel(),
            reference=lambda: _polynomial_zeroth().ravel(),
            controls={"smoothing noise left out": lambda: _quadratic_zeroth(own_only=True).ravel()},
        ),
    ),
)

QUADRATIC: dict[str, Any] = {
    "value": 0.5,
    "gradient": np.array([1.0, -2.0]),
    "hessian": np.array([[1.0, 0.3], [0.3, -2.0]]),
}
QUADRATIC_S, QUADRATIC_MU = 0.7, 0.4


def _quadratic_zeroth(own_only: bool = False) -> np.ndarray:
    s = 1e-9 if own_only else QUADRATIC_S
    return variance.quadratic_covariances(**QUADRATIC, s=s, mu=QUADRATIC_MU).zeroth_order


def _polynomial_zeroth() -> np.ndarray:
    """Covariance of R(s eps + mu xi) xi / mu by the algebra of polynomials in (eps, xi)."""
    eps1, eps2, xi1, xi2 = Variables(("gaussian",) * 4).all()
    v = [eps1 * QUADRATIC_S + xi1 * QUADRATIC_MU, eps2 * QUADRATIC_S + xi2 * QUADRATIC_MU]
    reward = v[0] * QUADRATIC["gradient"][0] + v[1] * QUADRATIC["gradient"][1] + QUADRATIC["value"]
    for i in (0, 1):
        for j in (0, 1):
            reward = reward + v[i] * v[j] * (QUADRATIC["hessian"][i, j] / 2)
    _, cov = moments([reward * xi1 * (1 / QUADRATIC_MU), reward * xi2 * (1 / QUADRATIC_MU)])
    return np.array(cov, dtype=float)


# --- the sufficient condition ------------------------------------------------------------------------------------

THETA_2D, S_2D = np.array([0.3, -0.2]), 0.4
OFFSETS = (0.0, 1.0, 3.0)  # the reward's level, which decides whether the condition holds


def wavy(offset: float) -> tuple[Any, Any, Any]:
    """Reward, gradient and Hessian of offset + sin x1 cos 2 x2 + 0.3 x1 x2 at (n, 2) points."""

    def reward(x: np.ndarray) -> np.ndarray:
        return offset + np.sin(x[:, 0]) * np.cos(2 * x[:, 1]) + 0.3 * x[:, 0] * x[:, 1]

    def gradient(x: np.ndarray) -> np.ndarray:
        first = np.cos(x[:, 0]) * np.cos(2 * x[:, 1]) + 0.3 * x[:, 1]
        second = -2 * np.sin(x[:, 0]) * np.sin(2 * x[:, 1]) + 0.3 * x[:, 0]
        return np.stack([first, second], 1)

    def hessian(x: np.ndarray) -> np.ndarray:
        wave = np.sin(x[:, 0]) * np.cos(2 * x[:, 1])
        mixed = -2 * np.cos(x[:, 0]) * np.sin(2 * x[:, 1]) + 0.3
        return np.stack([np.stack([-wave, mixed], 1), np.stack([mixed, -4 * wave], 1)], 1)

    return reward, gradient, hessian


def bounds_hold(hessian_power: float = 1.0, s_power: int = 2) -> tuple[Any, Any]:
    """Chain of inequalities, as (larger, smaller): bound on Var FO >= Var FO and Var HO >= its bound, three rewards."""
    larger, smaller = [], []
    for offset in OFFSETS:
        reward, gradient, hessian = wavy(offset)
        first_bound = np.trace(variance.first_order_bound(hessian, THETA_2D, S_2D)) * S_2D ** (s_power - 2)
        curved = partial(_multiplied, hessian, hessian_power)
        half_bound = np.trace(variance.half_order_bound(reward, curved, THETA_2D, S_2D))
        larger += [first_bound, np.trace(variance.half_order_covariance(reward, THETA_2D, S_2D))]
        smaller += [np.trace(variance.first_order_covariance(gradient, THETA_2D, S_2D)), half_bound]
    return np.array(larger), np.array(smaller)


def _multiplied(field: Any, factor: float, x: np.ndarray) -> np.ndarray:
    return factor * field(x)


SUFFICIENT = Claim(
    id="estimators.variance-order-sufficient",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/variance.md; a condition under which RLR, Proposition 4.2, is true",
    title="A condition under which first order has the smaller variance: Poincare against Bessel",
    statement=(
        r"For $x = \theta + s\epsilon \in \mathbb{R}^d$ and smooth $R$ with Hessian $H$: $\mathrm{Var}\,\mathrm{FO} \le "
        r"s^2\,\mathbb{E}\|H\|_F^2$ and $\mathrm{Var}\,\mathrm{HO} \ge s^{-2} \|\bar R I + s^2 \bar H\|_F^2$ (bars are "
        r"means). So $s^4\,\mathbb{E}\|H\|_F^2 \le \|\bar R I + s^2 \bar H\|_F^2$ suffices for $\mathrm{Var}\,\mathrm{FO} "
        r"\le \mathrm{Var}\,\mathrm{HO}$."
    ),
    printed="holds",
    why="The reward's level drives the score estimator, its curvature the first-order one: a large mean reward without "
    "a baseline makes the printed order true, for a reason that a baseline removes.",
    derivation="variance.md#a-sufficient-condition",
    checks=(
        at_least(
            "both bounds",
            "On sin x1 cos 2 x2 + 0.3 x1 x2 + level, do both inequalities hold by quadrature?",
            tuple(f"{what}, level {level:g}" for level in OFFSETS for what in ("Var FO", "Var HO")),
            subject=bounds_hold,
            controls={
                "s² replaced by s⁵ in the first bound": lambda: bounds_hold(s_power=5),
                "Hessian eightfold in the second bound": lambda: bounds_hold(hessian_power=8.0),
            },
        ),
    ),
)

# --- half order --------------------------------------------------------------------------------------------------

LENGTHS = (2, 3, 4, 6, 12)


def near_identity(a: float, steps: int = 12) -> chains.LinearGaussianChain:
    """Scalar additive chain with slope a at every step."""
    ones = np.ones((steps, 1, 1))
    return chains.LinearGaussianChain(a * ones, ones, np.zeros((steps, 1)), np.full(steps, 0.5), [0.0], [0.0], [[1.0]])


def score_ratio(a: float, h: int) -> float:
    """Second moment of half order(h) over that of policy gradient for the constant reward 1, by exact covariance."""
    flat = chains.QuadraticReward(1.0, [0.0], [[0.0]])
    blocks, single = (
        credit_moments(near_identity(a), flat, credits.half_order(12, length).outcomes).variance for length in (h, 1)
    )
    return blocks / single


def reward_ratio(h: int, a: float = 1.0) -> float:
    """The same ratio of variances for the reward x - x^2 / 2, returns relative to their mean."""
    chain, reward = near_identity(a), chains.QuadraticReward(0.0, [1.0], [[-1.0]])
    level = float(chains.objective(chain, reward))
    blocks, single = (
        credit_moments(chain, reward, credits.half_order(12, length).outcomes, baseline=level).variance
        for length in (h, 1)
    )
    return blocks / single


HALF_ORDER_GROWTH = Claim(
    id="estimators.half-order-growth",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, section 5 (fixed-horizon half-order optimisation) and Table 1",
    title="Longer half-order chains have more variance where steps are near the identity, not less",
    statement=r"The second part of RLR applies half-order optimisation on a randomly selected $h$-length sub-chain, *ensuring "
    r"unbiasedness while minimising variance*. (Read as: a longer sub-chain lowers the variance of the half-order part.)",
    printed="refuted",
    corrected=(
        r"With slope $a$ per step, the score's second moment is $\big(\sum_{i<h} a^i\big)^2 / h$ times that of the "
        r"policy gradient: $h$ times at $a = 1$. Blocks lower it only below $a_h$: $0.4142$, $0.5829$, $0.6917$, $0.8586$ for "
        r"$h = 2, 5, 10, 50$."
    ),
    why="A block puts the weight of h steps on one noise, where h independent noises would average. Many diffusion steps are close to "
    "the identity, except near narrow data. RLR exchanges zeroth-order for half-order steps, which this does not compare.",
    derivation="variance.md#half-order-blocks",
    checks=(
        equals(
            "growth law",
            "Is the exact ratio, from the covariance of the credit matrix, that of the statement?",
            tuple(f"a = {a}, h = {h}" for a in (1.0, 0.9, 0.3) for h in LENGTHS),
            subject=lambda: np.array([score_ratio(a, h) for a in (1.0, 0.9, 0.3) for h in LENGTHS]),
            reference=lambda: np.array([variance.half_order_ratio(a, h) for a in (1.0, 0.9, 0.3) for h in LENGTHS]),
            controls={
                "growth without the 1/h": lambda: np.array(
                    [h * variance.half_order_ratio(a, h) for a in (1.0, 0.9, 0.3) for h in LENGTHS]
                )
            },
        ),
        equals(
            "thresholds",
            "Is the exact ratio one at the slopes of the statement?",
            tuple(f"h = {h}" for h in LENGTHS),
            subject=lambda: np.array([score_ratio(variance.half_order_threshold(h), h) for h in LENGTHS]),
            reference=lambda: np.ones(len(LENGTHS)),
            controls={
                "slopes 1 % off": lambda: np.array(
                    [score_ratio(1.01 * variance.half_order_threshold(h), h) for h in LENGTHS]
                )
            },
        ),
        at_least(
            "with a reward and its mean as baseline",
            "On the near-identity chain, is the variance of half order(h) larger than that of the policy gradient?",
            tuple(f"h = {h}" for h in LENGTHS),
            subject=lambda: ([reward_ratio(h) for h in LENGTHS], np.ones(len(LENGTHS))),
            printed=lambda: (np.ones(len(LENGTHS)), [reward_ratio(h) for h in LENGTHS]),
            controls={"slope 0.2": lambda: ([reward_ratio(h, 0.2) for h in LENGTHS], np.ones(len(LENGTHS)))},
        ),
    ),
    figures=lambda context: (_growth_figure(),),
)


def _growth_figure() -> Figure:
    lengths = (1, 2, 3, 4, 6, 12)
    series = tuple(
        Series(f"slope a = {a}", tuple(map(float, lengths)), tuple(score_ratio(a, h) for h in lengths))
        for a in (1.0, 0.9, 0.7, 0.4)
    )
    return Figure(
        name="half-order-growth",
        title="Second moment of the half-order score against block length",
        caption="Relative to the policy gradient (block length 1), exact, T = 12. Near-identity steps (a = 1) pay h-fold "
        "for blocks of h; only strongly contracting chains gain.",
        alt="Four curves of relative second moment against block length. For slope 1 the curve equals the length; for "
        "slope 0.4 it falls below one.",
        x_label="block length h",
        y_label="second moment / that of h = 1",
        x_scale="log",
        y_scale="log",
        series=series,
    )


HALF_VERSUS_ZEROTH = Claim(
    id="estimators.half-against-zeroth",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, section 4.2, the remark after Proposition 4.2",
    title="Half order can have the larger variance than zeroth order",
    statement=r"The variance of the half-order estimator is less than or equal to that of the zeroth-order estimator.",
    printed="refuted",
    corrected=r"Neither order holds in general: on LG1 with $\mu = 1$ half order has the larger variance, with "
    r"$\mu = 0.25$ the smaller one.",
    why="Zeroth order divides by μ, half order by the chain's own std: whichever noise is larger tends to win.",
    derivation="variance.md#the-sine-example",
    checks=(
        at_least(
            "counterexample",
            "On LG1 with μ = 1, is the exact variance of half order larger than that of zeroth order?",
            ("h = 2", "h = 4"),
            subject=lambda: _half_and_zeroth(1.0),
            printed=lambda: _half_and_zeroth(1.0)[::-1],
            controls={"μ = 0.25": lambda: _half_and_zeroth(0.25)},
        ),
    ),
)


def _half_and_zeroth(mu: float) -> tuple[Any, Any]:
    half = [exact(credits.half_order(4, h)).variance for h in (2, 4)]
    return half, [exact(credits.zeroth_order(4), mu=mu).variance] * 2


# --- antithetic and Rademacher -----------------------------------------------------------------------------------

SMALL_MUS = (1.0, 0.25, 0.05, 1e-3)

ANTITHETIC = Claim(
    id="estimators.antithetic-zeroth-order",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/credit-matrix.md; RLR's eq. (8) is one-sided, its appendix A.2 gives std 1e-3",
    title="One-sided zeroth order explodes as 1/μ²; the antithetic pair has the same mean and does not",
    statement=(
        r"The one-sided zeroth-order estimate has variance $T p\,\mathbb{E}[R^2] / \mu^2 + O(1)$: on LG1 $1.3 \cdot 10^7$ at "
        r"the paper's $\mu = 10^{-3}$. The average over $\pm\mathbf{z}$ with the chain's noise in common has the same mean and, "
        r"on an additive chain with a quadratic reward, the same variance at every $\mu$: $31.565$."
    ),
    printed="holds",
    why="The one-sided estimate multiplies the whole reward by z / μ². In the pair only the difference survives.",
    derivation="credit-matrix.md#the-exact-covariance",
    checks=(
        at_least(
            "pair against single",
            "Is the exact variance of the antithetic pair no larger than that of two averaged single estimates?",
            tuple(f"μ = {mu:g}" for mu in SMALL_MUS),
            subject=lambda: ([_zeroth(mu) / 2 for mu in SMALL_MUS], [_zeroth(mu, antithetic=True) for mu in SMALL_MUS]),
            controls={
                "pair against first order": lambda: (
                    [exact(credits.first_order(4)).variance] * 4,
                    [_zeroth(mu, antithetic=True) for mu in SMALL_MUS],
                )
            },
        ),
        equals(
            "explosion",
            "Is μ² Var of the one-sided estimate at μ = 1e-3 equal to T p E[R²], to six digits?",
            ("μ² Var",),
            subject=lambda: np.array([1e-6 * _zeroth(1e-3)]),
            reference=lambda: np.array(
                [4 * 2 * float(chains.second_moment_reward(additive().exact_chain, additive().exact_reward))]
            ),
            controls={
                "baseline E R": lambda: np.array([1e-6 * _zeroth(1e-3, baseline=0.8686882378)]),
                "antithetic pair": lambda: np.array([1e-6 * _zeroth(1e-3, antithetic=True)]),
            },
            tolerance=1e-6,
            margin_from="the next term of the expansion is of order μ² = 1e-6",
        ),
        equals(
            "the pair at every μ",
            "Is the exact variance of the antithetic pair on LG1 the same at every μ?",
            tuple(f"μ = {mu:g}" for mu in SMALL_MUS),
            subject=lambda: [_zeroth(mu, antithetic=True) for mu in SMALL_MUS],
            reference=lambda: np.full(len(SMALL_MUS), pair_variance()),
            controls={"one-sided": lambda: [_zeroth(mu) for mu in SMALL_MUS]},
        ),
        has_mean(
            "sampled variance of the pair",
            "Do sampled antithetic estimates on LG1, μ = 0.25, have the exact variances?",
            ("Var θ₁", "Var θ₂"),
            subject=lambda stream: pair_squares()(stream),
            reference=lambda: np.diag(exact(credits.zeroth_order(4), mu=0.25, antithetic=True).cov),
            margin=0.5,
            margin_from="0.5, 3 % of the variances; declared before sampling",
            # The square of a cubic, by importance sampling about 2300. Declared: 3000.
            kurtosis=3000,
            controls={"two independent one-sided estimates": lambda stream: pair_squares(common=False)(stream)},
        ),
    ),
)


def pair_variance() -> float:
    """Trace of the pair's covariance on LG1, from the moments of the reward's slope alone.

    Given the chain's noise the pair is (sum_t G_t . xi_t) sum_t xi_t, a difference quotient of a quadratic, with G_t the
    pathwise gradient of step t.
    """
    chain, reward = additive().exact_chain, additive().exact_reward
    means, covs = chains.marginals(chain)
    slope = reward.linear + reward.quadratic @ means[0]
    second = np.outer(slope, slope) + reward.quadratic @ covs[0] @ reward.quadratic  # E[grad R grad R']
    product, stacked = np.eye(2), []
    for t in range(4):
        stacked.append(product @ chain.B[t])
        product = product @ chain.A[t]
    gram = sum((p.T @ second @ p).trace() for p in stacked)
    total = np.sum(stacked, axis=0)
    mean = total.T @ slope
    # (G . xi) sum_t xi_t has second moment T p |G|^2 + 2 |sum_t G_t|^2.
    return float(4 * 2 * gram + 2 * (total.T @ second @ total).trace() - mean @ mean)


def _zeroth(mu: float, **options: Any) -> float:
    return exact(credits.zeroth_order(4), mu=mu, **options).variance


def pair_squares(common: bool = True) -> Sampler:
    """Squared deviations of antithetic zeroth-order estimates on LG1, with common or independent chain noise."""
    problem = additive()
    mean = gradient_of(problem)
    single = named.zeroth_order(4, 0.25)
    if common:
        estimator = antithetic(single, "parameters")
        return mapped(gradients(problem.chain, problem.params, problem.objective, estimator), lambda g: (g - mean) ** 2)

    def sampler(stream: Stream) -> Block:
        one, two = (
            gradients(problem.chain, problem.params, problem.objective, single)(stream.child(side)) for side in "ab"
        )
        return lambda block: ((one(block) + two(block)) / 2 - mean) ** 2

    return sampler


SPSA = Claim(
    id="estimators.spsa-rademacher",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/variance.md; SPSA as a case of zeroth order, RLR, section 3.2",
    title="For linear functions Rademacher noise has less variance than Gaussian: (p - 1)|g|² against (p + 1)|g|²",
    statement=(
        r"For $f(\theta) = g \cdot \theta$ the two-sided estimate $(g \cdot \xi)\,\xi$ has covariance $|g|^2 I + g "
        r"g^\top$ with Gaussian and $|g|^2 I + g g^\top - 2\,\mathrm{diag}(g_i^2)$ with Rademacher $\xi$."
    ),
    printed="holds",
    why="A sign has no fourth moment to spare: the diagonal loses twice the squared slopes.",
    derivation="variance.md#smoothing",
    checks=(
        equals(
            "covariance entries",
            "Are the closed covariances those of the algebra of polynomials in xi, for g = (1, -2, 0.5)?",
            tuple(f"{kind}, {i}{j}" for kind in ("Gaussian", "Rademacher") for i in "123" for j in "123"),
            subject=lambda: _spsa("gaussian", "rademacher"),
            reference=lambda: np.concatenate([_spsa_polynomial(False), _spsa_polynomial(True)]),
            controls={"Gaussian formula for signs": lambda: _spsa("gaussian", "gaussian")},
        ),
    ),
)

SLOPES = np.array([1.0, -2.0, 0.5])


def _spsa(first: Any, second: Any) -> np.ndarray:
    return np.concatenate([variance.spsa_covariance(SLOPES, kind).ravel() for kind in (first, second)])


def _spsa_polynomial(signs: bool) -> np.ndarray:
    xi = Variables(("rademacher" if signs else "gaussian",) * 3).all()
    along = xi[0] * SLOPES[0] + xi[1] * SLOPES[1] + xi[2] * SLOPES[2]
    return np.array(moments([along * x for x in xi])[1], dtype=float).ravel()


# --- exact covariance and the frontier ---------------------------------------------------------------------------


def second_moments(estimator: Estimator, scale: float = 1.0) -> Sampler:
    """Products of deviations (g_1^2, g_1 g_2, g_2^2) of sampled estimates on LG1 from the exact gradient."""
    problem = additive()
    mean = gradient_of(problem)

    def products(g: np.ndarray) -> np.ndarray:
        d = scale * (g - mean)
        return np.stack([d[:, 0] ** 2, d[:, 0] * d[:, 1], d[:, 1] ** 2], 1)

    return mapped(gradients(problem.chain, problem.params, problem.objective, estimator), products)


def entries(cov: np.ndarray) -> np.ndarray:
    return np.array([cov[0, 0], cov[0, 1], cov[1, 1]])


ENGINE_CASES: dict[str, tuple[Credit, dict[str, Any]]] = {
    "first order": (credits.first_order(4), {}),
    "half order(2), baseline 1": (credits.half_order(4, 2), {"baseline": 1.0}),
    "zeroth order": (credits.zeroth_order(4), {"mu": 0.25}),
    "antithetic zeroth order": (credits.zeroth_order(4), {"mu": 0.25, "antithetic": True}),
    "debiased random truncation": (credits.random_truncation(np.full(4, 0.25), debiased=True), {}),
}


def _engine(engine: str, centred: bool = True) -> np.ndarray:
    """Covariance entries of every case by one engine, or its uncentred second moments."""
    rows = []
    for credit, options in ENGINE_CASES.values():
        moments_of = exact(credit, engine=engine, **options)
        rows.append(entries(moments_of.cov + (0 if centred else np.outer(moments_of.mean, moments_of.mean))))
    return np.concatenate(rows)


COVARIANCE = Claim(
    id="estimators.exact-covariance",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/credit-matrix.md",
    title="The exact covariance of every credit matrix on a linear-Gaussian chain, and the frontier it draws",
    statement=(
        r"On an additive linear-Gaussian chain with a quadratic reward every estimate with a fixed matrix, Gaussian noise and a constant baseline is $c + Lu + \sum_k q_k(u) S_k u$ "
        r"in the standard normal vector $u$ of all noises, and Wick's theorem gives its covariance in closed form."
    ),
    printed="holds",
    why="Two engines, Wick's formula and the algebra of Hermite polynomials, agree to rounding; sampling agrees with "
    "both.",
    derivation="credit-matrix.md#the-exact-covariance",
    checks=(
        equals(
            "two engines",
            "Do Wick's formula and polynomial algebra give the same covariances on LG1?",
            tuple(f"{name}, {entry}" for name in ENGINE_CASES for entry in ("C₁₁", "C₁₂", "C₂₂")),
            subject=lambda: _engine("wick"),
            reference=lambda: _engine("polynomial"),
            controls={"uncentred second moments": lambda: _engine("wick", centred=False)},
        ),
        *(
            has_mean(
                f"sampled covariance, {estimator.name}",
                f"Do sampled estimates of {estimator.name} on LG1 have the exact covariance?",
                ("C₁₁", "C₁₂", "C₂₂"),
                subject=lambda stream, e=estimator: second_moments(e)(stream),
                reference=lambda e=estimator: entries(exact(e.credit).cov),
                margin=margin,
                margin_from=f"{margin:g}, {percent} % of the largest variance; declared before sampling",
                kurtosis=bound,
                controls={"estimates 10 % too large": lambda stream, e=estimator: second_moments(e, 1.1)(stream)},
            )
            for estimator, margin, percent, bound in (
                (named.first_order(4), 0.03, 3, kurtosis(2)),
                # The square of a cubic; the theorem's constant for degree 6 is out of reach. By importance sampling the
                # kurtosis is about 5800; 8000 is declared.
                (named.policy_gradient(4), 1.7, 5, 8000),
            )
        ),
    ),
    figures=lambda context: (_frontier(),),
)


FRONTIER_STEPS, FRONTIER_DIM = 10, 16


def frontier_problem() -> tuple[chains.LinearGaussianChain, chains.QuadraticReward]:
    """A diffusion-like isotropic chain: slope 1 - 1/T, push 1/T, std 1/sqrt(T), concave reward with J = |grad J|^2."""
    steps, d = FRONTIER_STEPS, FRONTIER_DIM
    eye = np.eye(d)
    chain = chains.LinearGaussianChain(
        np.tile((1 - 1 / steps) * eye, (steps, 1, 1)),
        np.tile(eye / steps, (steps, 1, 1)),
        np.zeros((steps, d)),
        np.full(steps, steps**-0.5),
        np.zeros(d),
        np.zeros(d),
        eye,
    )
    reward = chains.QuadraticReward(0.0, np.ones(d), -eye)
    return chain, chains.QuadraticReward(d - float(chains.objective(chain, reward)), np.ones(d), -eye)


def _frontier() -> Figure:
    """Relative root mean squared error of one sample's estimate against its cost in network calls."""
    chain, reward = frontier_problem()
    steps, truth = chain.steps, chains.gradient(chain, reward)
    level = float(chains.objective(chain, reward))
    sweep = 4.0 * steps  # roll-out, recomputation, and a backward pass worth two forward passes
    cases: list[tuple[str, Credit, float, dict[str, Any]]] = [
        ("first order", credits.first_order(steps), sweep, {}),
        *((f"truncated({k})", credits.truncated(steps, k), steps + 3.0 * k, {}) for k in (1, 3)),
        ("debiased random truncation", credits.random_truncation(np.full(steps, 0.1), True), steps + 16.5, {}),
        *((f"half order({h})", credits.half_order(steps, h), sweep, {"baseline": level}) for h in (2, 5)),
        ("policy gradient", credits.policy_gradient(steps), sweep, {"baseline": level}),
        ("zeroth order, μ = 0.1", credits.zeroth_order(steps), 1.0 * steps, {"baseline": level, "mu": 0.1}),
        ("antithetic zeroth order", credits.zeroth_order(steps), 2.0 * steps, {"mu": 0.1, "antithetic": True}),
    ]
    points: dict[str, list[tuple[str, float, float]]] = {"unbiased": [], "biased (a row does not sum to one)": []}
    for name, credit, cost, options in cases:
        m = credit_moments(chain, reward, credit.outcomes, **options)
        error = math.sqrt((m.variance + float(np.sum((m.mean - truth) ** 2))) / float(truth @ truth))
        kind = "unbiased" if np.allclose(credit.row_sums(), 1) else "biased (a row does not sum to one)"
        points[kind].append((name, cost, error))
    return Figure(
        name="frontier",
        title="Error against cost of one sample's gradient",
        caption="Exact root mean squared error relative to |∇J|, T = 10, d = 16, returns relative to their mean. With a "
        "differentiable reward take first order by the sweep: the least error of the unbiased ones, and one step's activations. "
        "With a black-box reward take the policy gradient, or antithetic zeroth order at half its cost when parameters are few; "
        "half-order blocks and one-sided zeroth order lose to both. Truncation can have less error for one sample, but keeps its "
        "bias at any batch size.",
        alt="Scatter of nine estimators: relative error against network calls per sample, both logarithmic. Among unbiased "
        "estimators first order lies lowest; score and zeroth-order estimators lie 7 to 220 times higher; truncated(3) lies just "
        "below first order, but is biased.",
        x_label="network calls per sample (a backward pass counts as two)",
        y_label="relative error of one sample's estimate",
        x_scale="log",
        y_scale="log",
        series=tuple(
            Series(
                kind,
                tuple(cost for _, cost, _ in rows),
                tuple(error for _, _, error in rows),
                style="points",
                labels=tuple(name for name, _, _ in rows),
            )
            for kind, rows in points.items()
        ),
    )


# --- memory ------------------------------------------------------------------------------------------------------

HORIZONS = (5, 10, 20, 40)


def memory_ratios(method: str) -> np.ndarray:
    """Peak bytes saved for back-propagation at several T, relative to the smallest T."""
    peaks = np.array([peak_saved_bytes(steps, method) for steps in HORIZONS], dtype=float)
    return peaks[1:] / peaks[0]


MEMORY = Claim(
    id="estimators.memory-of-full-back-propagation",
    chapter=CHAPTER,
    paper="RLR",
    source="RLR, section 4.1 and Table 1",
    title="Full back-propagation needs one step's activations, whatever the number of steps",
    statement="Performing full back-propagation over the diffusive chain is infeasible due to its memory: about 1 TB "
    "for Stable Diffusion at 50 steps, growing with the number of steps.",
    printed="refuted",
    corrected=r"Recomputing each step's graph from its stored latent, in one backward sweep, gives the same gradient "
    r"with the activations of *one* step, and $T$ latents; it costs one more forward pass per step.",
    why="Known as checkpointing each step; the paper's appendix A.1.4 discusses checkpointing, and its 1 TB is quoted from AlignProp. "
    "The number is about storing graphs, not about a need to: compute grows by one evaluation per step, memory does not.",
    derivation="credit-matrix.md#the-backward-sweep",
    checks=(
        equals(
            "growth of saved activations",
            "Do the bytes that autograd saves at once stay the same from T = 5 to T = 10, 20, 40?",
            tuple(f"T = {steps}, relative to T = 5" for steps in HORIZONS[1:]),
            subject=lambda: memory_ratios("sweep"),
            reference=lambda: np.ones(3),
            printed=lambda: memory_ratios("stored graph"),
            controls={"every second step checkpointed": lambda: memory_ratios("stored, every second step")},
        ),
    ),
)

CLAIMS: tuple[Claim, ...] = (
    PROPOSITION_42,
    QUADRATIC_CASE,
    SUFFICIENT,
    HALF_ORDER_GROWTH,
    HALF_VERSUS_ZEROTH,
    ANTITHETIC,
    SPSA,
    COVARIANCE,
    MEMORY,
)
