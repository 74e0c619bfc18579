"""Chapter *RLR*, continued: the variance of the estimator, its bounds, and how it compares with its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms import rlr
from algorithms.baselines import Constant
from algorithms.chain import ParameterNoise
from algorithms.credit import Credit
from algorithms.estimators import Estimator, antithetic, with_baseline
from claims.claim import Claim
from claims.judges import Sampler, at_least, equals, has_mean
from claims.problems import RLR, additive, gradient_of, lazily, sampled, step_gradients_of
from claims.records import Figure, Series
from theory import chains, isotropic, lower_bounds, telescoped, variance
from theory import rlr as exact
from theory.credit import credit_moments
from toy.experiments import Block, generator, mapped, statistics
from toy.linear_gaussian import Problem
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

Pair = tuple[np.ndarray, np.ndarray]  # (larger, smaller), as `at_least` wants it

STEPS, MU = 4, 0.25  # of LG1, and the parameter noise of its table of reference values
PAPER_MU = 1e-3  # RLR, appendix A.2: text to image, with h = 2
FROM_SECOND = "rounding of an independent derivation, given to ten digits or more"


@cache
def level() -> float:
    """The objective J of LG1, the baseline of most comparisons."""
    return float(chains.objective(additive().exact_chain, additive().exact_reward))


def blocks(length: int, steps: int = STEPS) -> Credit:
    """RLR with blocks of `length` steps (reading II), at a uniform position."""
    return rlr.credits(steps, length, reading="II")


def exact_first(credit: Credit) -> Credit:
    """The same with step 1 paid by the reward's gradient, as in RLR."""
    w = credit.matrices.copy()
    w[:, 0] = 0
    w[:, 0, 0] = 1
    return Credit(w, credit.probabilities)


def without_block(steps: int = STEPS) -> Credit:
    """RLR without its half-order part: step 1 by the reward's gradient, 2..T by parameter noise."""
    return exact_first(credits.zeroth_order(steps))


def on_lg1(credit: Credit, mu: float = MU, **options: Any) -> float:
    """Exact variance on LG1, baseline J unless given."""
    problem = additive()
    chosen = {"baseline": level(), "mu": mu, **options}
    return credit_moments(problem.exact_chain, problem.exact_reward, credit.outcomes, **chosen).variance


# --- the variance of term A --------------------------------------------------------------------------------------


def influences() -> np.ndarray:
    """D_t = A_1 ... A_{t-1} B_t on LG1, (T, d, p)."""
    chain, product, rows = additive().exact_chain, np.eye(2), []
    for a, b in zip(chain.A, chain.B, strict=True):
        rows.append(product @ b)
        product = product @ a
    return np.array(rows)


def covariance_of_a(mu: float, noisy: Callable[[np.ndarray], np.ndarray] = lambda c: c) -> np.ndarray:
    """B_1' Q Cov(x_0) Q B_1 on LG1, the mean over the two positions of blocks of two."""
    problem, total = additive(), np.zeros((2, 2))
    spread = chains.marginals(problem.exact_chain)[1][0]
    slope = problem.exact_reward.quadratic @ problem.exact_chain.B[0]
    for probability, w in blocks(2).outcomes:
        steps = noisy(w[:, -1] != 0)
        moved = sum((d @ d.T for d, on in zip(influences(), steps, strict=True) if on), np.zeros((2, 2)))
        total += probability * slope.T @ (spread + mu**2 * moved) @ slope
    return total


def term_covariances(length: int, mu: float, baseline: float) -> exact.TermCovariances:
    problem = additive()
    law = blocks(length).outcomes
    return exact.term_covariances(problem.exact_chain, problem.exact_reward, law, baseline=baseline, mu=mu)


def upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(2)]


A_MUS = (MU, 1.0)
A_ENTRIES = tuple(f"μ = {mu:g}, {entry}" for mu in A_MUS for entry in ("C₁₁", "C₁₂", "C₂₂"))


def a_variances() -> np.ndarray:
    """Var A on LG1 without parameter noise and in the roll-out of RLR."""
    return np.array([on_lg1(credits.truncated(STEPS, 1)), float(np.trace(term_covariances(2, MU, 0.0).A))])


def first_terms(mu: float) -> Sampler:
    """Squared deviations of term A in RLR's own roll-outs: the estimate less itself without row 1, on common noise."""
    problem = additive()
    whole = rlr.rlr(STEPS, 2, mu, reading="II")
    w = whole.credit.matrices.copy()
    w[:, 0] = 0
    rest = replace(whole, credit=Credit(w, whole.credit.probabilities))

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            arguments = (problem.chain, problem.params, problem.objective)
            noise = whole.draw(problem.chain, problem.params, 1 << 14, generator(stream, index))
            both = [e.per_sample(*arguments, noise)["theta"] for e in (whole, rest)]
            return _squares((both[0] - both[1]).numpy())

        return block

    return sampler


def _squares(estimates: np.ndarray) -> np.ndarray:
    return ((estimates - step_gradients_of(additive())[0]) ** 2).sum(1, keepdims=True)


VAR_A = Claim(
    id="rlr.var-a",
    chapter=RLR,
    paper="RLR",
    source="RLR, A.7.4, after eq. (19)",
    title="The first-order term of RLR has a variance: the sample at which it differentiates is random",
    statement=r"Term $A$ of eq. (18) is exact back-propagation without injected noise, so $\mathrm{Var}(A) = 0$.",
    printed="refuted",
    corrected=r"In an additive chain with a quadratic reward of Hessian $Q$, $\mathrm{Cov}(A) = B_1^\top Q\,\mathrm{Cov}(x_0)\,Q B_1$, and the parameter noise of "
    r"term $C$ adds $\mu^2\sum_{t\in C} D_t D_t^\top$ to $\mathrm{Cov}(x_0)$. On the additive chain LG1 (T = 4), $\mu = 0.25$, blocks of two: 1.170214916; without parameter noise 1.144269361.",
    why="A holds dR/dx₀ (eq. 18 leaves that factor out), and x₀ is the end of a random chain that all three terms share. A vanishing variance needs "
    "a reward that is linear in what step 1 can reach.",
    derivation="rlr.md#terms-a-b-c",
    checks=(
        equals(
            "the numbers",
            "On the additive chain LG1 (T = 4), are the exact variances of A 1.144269361 (no parameter noise) and 1.170214916 (in RLR's roll-out)?",
            ("no parameter noise", "in RLR's roll-out, μ = 0.25"),
            subject=a_variances,
            reference=lambda: np.array([1.144269361093, 1.170214916083]),  # by the algebra of a second derivation
            printed=lambda: np.zeros(2),
            controls={"parameter noise forgotten": lambda: a_variances()[[0, 0]]},
            margin_from=FROM_SECOND,
        ),
        equals(
            "closed form",
            "On the additive chain LG1 (T = 4), blocks of two, is the covariance of A in RLR's roll-out B₁ᵀQ Cov(x₀) Q B₁?",
            A_ENTRIES,
            subject=lambda: np.concatenate([upper(term_covariances(2, mu, 0.0).A) for mu in A_MUS]),
            reference=lambda: np.concatenate([upper(covariance_of_a(mu)) for mu in A_MUS]),
            controls={
                "noise on the block's steps in place of the others": lambda: np.concatenate(
                    [upper(covariance_of_a(mu, lambda c: ~c & np.array([False, True, True, True]))) for mu in A_MUS]
                )
            },
        ),
        has_mean(
            "sampled",
            "In roll-outs of RLR in torch (the additive chain LG1, T = 4, blocks of two, μ = 1), do the terms A have the exact variance?",
            ("Var A",),
            subject=lazily(lambda: first_terms(1.0)),
            reference=lambda: np.array([np.trace(covariance_of_a(1.0))]),
            margin=0.03,
            margin_from="0.03, 2 % of the variance; declared before sampling",
            kurtosis=kurtosis(2, rarest=0.5),
            controls={
                "in roll-outs without parameter noise": lazily(lambda: mapped(sampled(additive(), named.truncated(STEPS, 1)), _squares)),
            },
        ),
    ),
)  # fmt: skip


# --- the bound (19) ----------------------------------------------------------------------------------------------

Terms = tuple[str, exact.TermCovariances]


@cache
def bounded() -> tuple[Terms, ...]:
    """Terms of RLR on three chains; in the last three instances they are positively correlated."""
    chain, reward = exact.rational_chain(4)
    split = exact.disjoint_chain()
    return (
        ("LG1, baseline 0", term_covariances(2, MU, 0.0)),
        ("LG1, baseline J", term_covariances(2, MU, level())),
        ("LG1, one block, baseline J", term_covariances(3, MU, level())),
        ("fractions, baseline 2", exact.term_covariances(chain, reward, exact.law(4, 1, "I"), baseline=2, mu=1)),
        ("split parameters", exact.term_covariances(*split, exact.law(2, 1, "II"))),
    )


def directions(size: int) -> tuple[tuple[str, np.ndarray], ...]:
    """The directions in which a variance is looked at; the trace is their sum over the coordinates."""
    return () if size == 1 else (("θ₁", np.array([1, 0])), ("θ₂", np.array([0, 1])), ("θ₁ + θ₂", np.array([1, 1])))


Bound = Callable[[list[float]], float]


def bounds_and_variances(bound: Bound = exact.sum_bound) -> tuple[np.ndarray, np.ndarray]:
    """(bound, variance) for traces and directions of every instance."""
    larger, smaller = [], []
    for _, parts in bounded():
        for weigh in [np.trace, *(lambda m, u=u: u @ m @ u for _, u in directions(len(parts.A)))]:
            larger.append(bound([float(weigh(part)) for part in (parts.A, parts.B, parts.C)]))
            smaller.append(float(weigh(parts.total)))
    return np.array(larger), np.array(smaller)


def single_cross(variances: list[float]) -> float:
    """Planted error: the cross terms without their factor of two."""
    return (sum(variances) + exact.sum_bound(variances)) / 2


BOUND_NAMES = tuple(
    f"{name}, {what}"
    for name, size in zip(
        ("LG1, baseline 0", "LG1, baseline J", "LG1, one block", "fractions", "split parameters"),
        (2, 2, 2, 1, 2),
        strict=True,
    )
    for what in ("trace", *(direction for direction, _ in directions(size)))
)

BOUND = Claim(
    id="rlr.variance-bound",
    chapter=RLR,
    paper="RLR",
    source="RLR, A.7.4, eq. (19)",
    title="The bound on RLR's variance by the variances of its terms holds for traces and in every direction",
    statement=r"$\mathrm{Var}(A+B+C) \le \mathrm{Var}\,A + \mathrm{Var}\,B + \mathrm{Var}\,C + 2\big(\sqrt{\mathrm{Var}A\,\mathrm{Var}B} + \sqrt{\mathrm{Var}A\,\mathrm{Var}C} "
    r"+ \sqrt{\mathrm{Var}B\,\mathrm{Var}C}\big)$.",
    printed="holds",
    why="The triangle inequality of the standard deviation. On the additive chain LG1 (T = 4) it is 2.3 and 2.4 times the variance, because the terms are nearly uncorrelated; and by itself it says "
    "nothing about how large the three variances are. (As an inequality of matrices it fails: rlr.variance-bound-matrix.)",
    derivation="rlr.md#bound-19",
    checks=(
        at_least(
            "traces and directions",
            "On three chains, is the bound at least the exact variance, as a trace and in each direction?",
            BOUND_NAMES,
            subject=bounds_and_variances,
            controls={
                "without the cross terms": lambda: bounds_and_variances(sum),
                "cross terms without their factor 2": lambda: bounds_and_variances(single_cross),
            },
        ),
        equals(
            "the numbers",
            "On the additive chain LG1 (T = 4), μ = 0.25, blocks of two, are variance and bound 81.10876982 and 186.6417498, with baseline J 47.43116713 and 115.4937652?",
            ("variance", "bound", "variance, baseline J", "bound, baseline J"),
            subject=lambda: _numbers(exact.sum_bound),
            reference=lambda: np.array([81.10876982, 186.6417498, 47.43116713, 115.4937652]),  # typed in from an earlier derivation
            controls={"without the cross terms": lambda: _numbers(sum)},
            margin_from="the ten digits of numbers typed in from an earlier derivation",
        ),
    ),
)  # fmt: skip


def _numbers(bound: Bound) -> np.ndarray:
    larger, smaller = bounds_and_variances(bound)
    first, second = BOUND_NAMES.index("LG1, baseline 0, trace"), BOUND_NAMES.index("LG1, baseline J, trace")
    return np.array([smaller[first], larger[first], smaller[second], larger[second]])


# --- the bound (19) for matrices ---------------------------------------------------------------------------------


def by_deviations(parts: list[np.ndarray]) -> list[float]:
    """Shares proportional to the standard deviations: those that make the bound's trace smallest."""
    roots = [math.sqrt(float(np.trace(part))) for part in parts]
    return [root / sum(roots) for root in roots]


def evenly(parts: list[np.ndarray]) -> list[float]:
    return [1 / len(parts)] * len(parts)


Shares = Callable[[list[np.ndarray]], list[float]]
SHARES: tuple[Shares, ...] = (by_deviations, evenly)
MATRIX_NAMES = ("LG1, baseline 0", "LG1, baseline J", "LG1, one block", "split parameters")
MATRIX_COORDINATES = tuple(f"{name}, {s}" for s in ("shares by deviation", "equal shares") for name in MATRIX_NAMES)


def matrix_parts() -> list[tuple[list[np.ndarray], np.ndarray]]:
    """Covariances of the terms that are there, and of their sum, where the estimate has two coordinates."""
    rows = []
    for _, terms in bounded():
        if len(terms.A) == 2:
            parts = [np.asarray(part, dtype=float) for part in (terms.A, terms.B, terms.C)]
            rows.append(([part for part in parts if part.any()], np.asarray(terms.total, dtype=float)))
    return rows


def weighted(parts: list[np.ndarray], shares: Shares) -> np.ndarray:
    return exact.matrix_bound(parts, shares(parts))


def unweighted(parts: list[np.ndarray], shares: Shares) -> np.ndarray:
    """Planted error: (19) for a root of the product that vanishes, as it does for the split parameters."""
    return np.sum(parts, axis=0)


def rooted(parts: list[np.ndarray], shares: Shares) -> np.ndarray:
    """Planted error: each covariance divided by the root of its share."""
    return np.sum([part / math.sqrt(share) for part, share in zip(parts, shares(parts), strict=True)], axis=0)


def gaps(bound: Callable[[list[np.ndarray], Shares], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Smallest eigenvalue of (bound less covariance), against zero."""
    values = [
        float(np.linalg.eigvalsh(bound(parts, shares) - total)[0])
        for shares in SHARES
        for parts, total in matrix_parts()
    ]
    return np.array(values), np.zeros(len(values))


def split_excess(total: Callable[[exact.TermCovariances], Any]) -> np.ndarray:
    """Of the chain with split parameters: the product Cov A Cov B, entry by entry, and the eigenvalues of an excess."""
    terms = bounded()[-1][1]
    product = np.asarray(terms.A @ terms.B, dtype=float).ravel()
    excess = np.asarray(total(terms) - terms.A - terms.B - terms.C, dtype=float)
    return np.concatenate([product, np.linalg.eigvalsh(excess)])


BOUND_MATRIX = Claim(
    id="rlr.variance-bound-matrix",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="derived in docs/rlr.md; RLR, A.7.4, eq. (19), read with covariance matrices",
    title="For covariance matrices eq. (19) fails whatever the root means; with shares that sum to one it holds",
    statement=r"There is an RLR estimator with $\mathrm{Cov}A\,\mathrm{Cov}B = 0$ and $\mathrm{Cov}(A+B) \not\preceq \mathrm{Cov}A + \mathrm{Cov}B$. For weights $w_i > 0$ that sum to one, "
    r"$\mathrm{Cov}\big(\sum_i X_i\big) \preceq \sum_i \mathrm{Cov}(X_i)/w_i$; with weights proportional to the standard deviations its trace is eq. (19).",
    printed="holds",
    why="Two terms that move different parameters have covariances whose product vanishes, and can still be correlated with each other: both use the same x₀. The paper writes "
    "Var without saying of what; for numbers it is right (rlr.variance-bound).",
    derivation="rlr.md#bound-19-for-matrices",
    checks=(
        equals(
            "the counterexample",
            "With a parameter for each of two steps, is Cov A Cov B zero, and are the eigenvalues of Cov(A + B) - Cov A - Cov B ±9/2?",
            ("product₁₁", "product₁₂", "product₂₁", "product₂₂", "smaller eigenvalue", "larger eigenvalue"),
            subject=lambda: split_excess(lambda terms: terms.total),
            reference=lambda: np.array([0, 0, 0, 0, -4.5, 4.5]),
            controls={"terms from independent roll-outs": lambda: split_excess(lambda terms: terms.A + terms.B + terms.C)},
        ),
        at_least(
            "the valid form",
            "Is the smallest eigenvalue of the sum of Cov / share less the covariance non-negative?",
            MATRIX_COORDINATES,
            subject=lambda: gaps(weighted),
            controls={"the sum of the covariances": lambda: gaps(unweighted), "roots of the shares": lambda: gaps(rooted)},
        ),
        equals(
            "its trace",
            "With shares by deviation, is its trace the scalar bound?",
            MATRIX_NAMES,
            subject=lambda: np.array([np.trace(weighted(parts, by_deviations)) for parts, _ in matrix_parts()]),
            reference=lambda: np.array([exact.sum_bound([float(np.trace(p)) for p in parts]) for parts, _ in matrix_parts()]),
            controls={"equal shares": lambda: np.array([np.trace(weighted(parts, evenly)) for parts, _ in matrix_parts()])},
        ),
    ),
)  # fmt: skip


# --- the length of the block -------------------------------------------------------------------------------------

FAMILY_STEPS, FAMILY_DIM = 10, 16
LENGTHS = range(1, FAMILY_STEPS)


@cache
def family() -> float:
    """|grad J|^2 in the isotropic family, the unit of its variances."""
    return FAMILY_DIM * (1 - (1 - 1 / FAMILY_STEPS) ** FAMILY_STEPS) ** 2


def in_family(credit: Credit, mu: float = PAPER_MU, antithetic: bool = False) -> float:
    """Variance / |grad J|^2 in the isotropic family (near-identity steps), T = 10, d = 16, baseline J."""
    size = (FAMILY_STEPS, FAMILY_DIM, 1.0)
    return isotropic.variance(*size, credit.outcomes, baseline=FAMILY_DIM, mu=mu, antithetic=antithetic) / family()


def over_lengths(mu: float, antithetic: bool) -> np.ndarray:
    return np.array([in_family(blocks(length, FAMILY_STEPS), mu, antithetic) for length in LENGTHS])


def lg1_lengths(antithetic: bool, **options: Any) -> np.ndarray:
    return np.array([on_lg1(blocks(length), antithetic=antithetic, **options) for length in (1, 2, 3)])


def at_best_noise(length: int) -> float:
    """One-sided RLR on LG1 at its best mu; with blocks of T - 1 steps nothing is left to parameter noise."""
    return on_lg1(blocks(length)) if length == STEPS - 1 else exact.best_noise(coefficients(blocks(length)))[1]


def best_over_mu(length: int) -> float:
    """The variance of one-sided RLR in the family at its best parameter noise, on a fine grid."""
    return min(in_family(blocks(length, FAMILY_STEPS), float(mu)) for mu in np.geomspace(1, 6, 60))


def at_best() -> Pair:
    """Variances of one-sided RLR for every block length, on LG1 and in the family, each length at its best mu."""
    return np.array([at_best_noise(n) for n in (1, 2, 3)]), np.array([best_over_mu(n) for n in LENGTHS])


def at_fixed(antithetic: bool) -> Pair:
    """The same at mu = 0.25."""
    return lg1_lengths(antithetic), over_lengths(MU, antithetic)


def not_falling(few: np.ndarray, many: np.ndarray) -> Pair:
    """(larger, smaller): up and down on LG1, always up in the family."""
    return np.concatenate([[few[1], few[1]], many[1:]]), np.concatenate([[few[0], few[2]], many[:-1]])


def falling(few: np.ndarray, many: np.ndarray) -> Pair:
    """(larger, smaller): every longer block has the smaller variance."""
    return np.concatenate([few[:-1], many[:-1]]), np.concatenate([few[1:], many[1:]])


UP_AND_DOWN = ("LG1, 2 over 1", "LG1, 2 over 3", *(f"family, {n} over {n - 1}" for n in LENGTHS[1:]))
DOWN = ("LG1, 1 over 2", "LG1, 2 over 3", *(f"family, {n} over {n + 1}" for n in LENGTHS[:-1]))

BLOCK_LENGTH = Claim(
    id="rlr.block-length",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="derived in docs/rlr.md; the question of RLR, section 5, fixed-horizon half-order optimization",
    title="A longer half-order block need not lower RLR's variance: at the best parameter noise for each length it can raise it",
    statement="The variance of RLR is not monotone in the length of the half-order block. One-sided, each length at its best μ, it goes up and then down on the additive chain LG1 "
    "(T = 4: 27.29, 28.50, 14.84), and up with every further step in the near-identity family (T = 10, d = 16: from 65.5 to 108.5 |∇J|²). The same holds of antithetic pairs. One-sided at the fixed μ = 0.25 it falls in both.",
    printed="holds",
    why="The score of a block sums the influence of all its steps on one noise: its second moment grows like the length when steps hardly contract (docs/variance.md). Where parameter noise dominates, a longer block gains more by leaving "
    "fewer steps to that noise. (The paper says that the sub-chain minimizes variance and that the budget decides on its length. It states no law in the length, so nothing printed is refuted here.)",
    derivation="rlr.md#block-length-and-parameter-noise",
    checks=(
        at_least(
            "one-sided, best noise",
            "One-sided and each length at its best μ, has RLR more variance with blocks of 2 than of 1 and of 3 on the additive chain LG1 (T = 4), and more with every further step in the near-identity family?",
            UP_AND_DOWN,
            subject=lambda: not_falling(*at_best()),
            controls={"at the fixed μ = 0.25": lambda: not_falling(*at_fixed(False))},
        ),
        at_least(
            "antithetic",
            "Is it the same for antithetic pairs at μ = 0.25?",
            UP_AND_DOWN,
            subject=lambda: not_falling(*at_fixed(True)),
            controls={"one-sided noise": lambda: not_falling(*at_fixed(False))},
        ),
        at_least(
            "one-sided, fixed noise",
            "One-sided at μ = 0.25, has every longer block less variance, on the additive chain LG1 (T = 4) and in the near-identity family?",
            DOWN,
            subject=lambda: falling(*at_fixed(False)),
            controls={"antithetic pairs": lambda: falling(*at_fixed(True)), "each length at its best μ": lambda: falling(*at_best())},
        ),
        equals(
            "the numbers on LG1",
            "On the additive chain LG1 (T = 4), μ = 0.25, are the variances for blocks of 1, 2, 3 those of the table, one-sided and antithetic?",
            tuple(f"{sides}, blocks of {n}" for sides in ("one-sided", "antithetic") for n in (1, 2, 3)),
            subject=lambda: np.concatenate([lg1_lengths(False), lg1_lengths(True)]),
            # From a second derivation.
            reference=lambda: np.array(
                [69.111066211055, 47.431167126630, 14.843439699194, 13.489362616628, 19.768633629092, 14.843439699194]
            ),
            controls={"baseline 0": lambda: np.concatenate([lg1_lengths(sides, baseline=0.0) for sides in (False, True)])},
            margin_from=FROM_SECOND,
        ),
        equals(
            "the numbers in the family",
            "At μ = 0.001, is the antithetic variance in the near-identity family 23.47 |∇J|² with blocks of 2 and 52.99 |∇J|² with blocks of 5?",
            ("blocks of 2", "blocks of 5"),
            subject=lambda: over_lengths(PAPER_MU, True)[[1, 4]],
            reference=lambda: np.array([23.47, 52.99]),  # typed in from an earlier derivation, which gives four digits
            controls={"blocks of 1 and 4": lambda: over_lengths(PAPER_MU, True)[[0, 3]]},
            tolerance=1e-4,
            margin_from="the four digits of numbers typed in from an earlier derivation",
        ),
    ),
    figures=lambda context: (_lengths_figure(),),
)  # fmt: skip


def _lengths_figure() -> Figure:
    x = tuple(float(length) for length in LENGTHS)
    rival = in_family(credits.policy_gradient(FAMILY_STEPS))
    return Figure(
        name="rlr-block-length",
        title="RLR's variance against the length of its half-order block",
        caption="Near-identity chain, T = 10, d = 16, exact, in units of |∇J|². With antithetic parameter noise every further step of the block adds variance: from three steps on "
        "RLR is above REINFORCE (and above antithetic zeroth order, which is at 29.8). One-sided noise at μ = 0.25 falls with the length, because fewer steps are left to it, but lies above; even at its best size, chosen for each length, it never reaches REINFORCE.",
        alt="Three curves against block length 1 to 9 on a logarithmic axis. The antithetic one rises from 20 to 108, crossing the dashed horizontal line of REINFORCE at 31; the one-sided one falls "
        "from 3700 to 108; the one-sided one at its best noise rises from 65 to 108.",
        x_label="steps in the half-order block",
        y_label="variance / |∇J|²",
        y_scale="log",
        series=(
            Series("RLR, antithetic", x, tuple(over_lengths(MU, True).tolist())),
            Series("RLR, one-sided, μ = 0.25", x, tuple(over_lengths(MU, False).tolist())),
            Series("RLR, one-sided, best μ", x, tuple(best_over_mu(length) for length in LENGTHS)),
            Series("REINFORCE", (x[0], x[-1]), (rival, rival), style="dashed"),
        ),
    )  # fmt: skip


# --- the lowest variance of all ----------------------------------------------------------------------------------


def coefficients(credit: Credit, antithetic: bool = False, baseline: float | None = None) -> np.ndarray:
    """Of the variance on LG1 as a polynomial in mu: those of 1/mu^2, 1, mu^2 and mu^4."""
    problem = additive()
    b = level() if baseline is None else baseline
    return exact.noise_coefficients(
        problem.exact_chain, problem.exact_reward, credit.outcomes, baseline=b, antithetic=antithetic
    )


def reinforce(first: bool = False) -> Credit:
    plain = credits.policy_gradient(STEPS)
    return exact_first(plain) if first else plain


LOSES = (
    "LG1, one-sided at the paper's μ and h, against REINFORCE",
    "LG1, one-sided, μ = 0.25, against REINFORCE",
    "family, one-sided at its best μ, against REINFORCE",
    "family, antithetic, blocks of 5, against antithetic zeroth order",
)


def losers() -> list[float]:
    far = [best_over_mu(2), in_family(blocks(5, FAMILY_STEPS), antithetic=True)]
    return [on_lg1(blocks(2), PAPER_MU), on_lg1(blocks(2)), *far]


def short_antithetic() -> list[float]:
    """RLR at its best in their places: antithetic, blocks of one step."""
    near, far = on_lg1(blocks(1), antithetic=True), in_family(blocks(1, FAMILY_STEPS), antithetic=True)
    return [near, near, far, far]


def swapped(pair: Pair) -> Pair:
    return pair[1], pair[0]


def where_rlr_loses(ours: Callable[[], list[float]] = losers) -> Pair:
    """(RLR, rival)."""
    rivals = [
        on_lg1(reinforce()),
        on_lg1(reinforce()),
        in_family(credits.policy_gradient(FAMILY_STEPS)),
        in_family(credits.zeroth_order(FAMILY_STEPS), antithetic=True),
    ]
    return np.array(ours()), np.array(rivals)


WINS = (
    "LG1, one-sided, μ = 0.25, against one-sided zeroth order",
    "LG1, one-sided at its best μ, against REINFORCE",
    "LG1, antithetic, blocks of 1, against REINFORCE",
    "family, antithetic, blocks of 2, against REINFORCE",
    "family, antithetic, blocks of 2, against antithetic zeroth order",
)


def where_rlr_wins(length: int = 2, best: Callable[[], float] = lambda: at_best_noise(2)) -> Pair:
    """(rival, RLR)."""
    family_length = blocks(length, FAMILY_STEPS)
    rivals = [
        on_lg1(credits.zeroth_order(STEPS)),
        on_lg1(reinforce()),
        on_lg1(reinforce()),
        in_family(credits.policy_gradient(FAMILY_STEPS)),
        in_family(credits.zeroth_order(FAMILY_STEPS), antithetic=True),
    ]
    ours = [
        on_lg1(blocks(2)),
        best(),
        on_lg1(blocks(1), antithetic=True),
        in_family(family_length, antithetic=True),
        in_family(family_length, antithetic=True),
    ]
    return np.array(rivals), np.array(ours)


def against_first_step(first: bool = True) -> Pair:
    """(larger, smaller) against REINFORCE with an exact first step: RLR loses once and wins twice."""
    far = credits.policy_gradient(FAMILY_STEPS)
    near, far = on_lg1(reinforce(first=first)), in_family(exact_first(far) if first else far)
    short, two = on_lg1(blocks(1), antithetic=True), in_family(blocks(2, FAMILY_STEPS), antithetic=True)
    return np.array([at_best_noise(2), near, far]), np.array([near, short, two])


def per_call(credit: Credit, variance_of: Callable[..., float], antithetic: bool = True) -> float:
    """Variance times network calls of one estimate; an antithetic pair runs everything twice."""
    runs = 2 if antithetic and credit.uses_parameter_noise else 1
    return variance_of(credit, MU, antithetic=antithetic) * runs * credit.calls()


def against_no_block(antithetic: bool = True) -> Pair:
    """(RLR, RLR without half order), variance times calls, for every block length."""
    ours = [per_call(blocks(n), on_lg1) for n in (1, 2, 3)]
    ours += [per_call(blocks(n, FAMILY_STEPS), in_family) for n in LENGTHS]
    plain = [per_call(without_block(), on_lg1, antithetic)] * 3
    plain += [per_call(without_block(FAMILY_STEPS), in_family, antithetic)] * len(LENGTHS)
    return np.array(ours), np.array(plain)


TABLE = (
    "one-sided, μ = 0.25",
    "one-sided, best μ",
    "antithetic, blocks of 1",
    "antithetic, blocks of 2",
    "REINFORCE",
    "REINFORCE, exact first step",
)


def table(first_step: Callable[[], float] = lambda: on_lg1(reinforce(first=True))) -> np.ndarray:
    ours = [on_lg1(blocks(2)), at_best_noise(2), on_lg1(blocks(1), antithetic=True), on_lg1(blocks(2), antithetic=True)]
    return np.array([*ours, on_lg1(reinforce()), first_step()])


LOWEST = Claim(
    id="rlr.lowest-variance",
    chapter=RLR,
    paper="RLR",
    source="RLR, A.7.4, last paragraph; section 5; abstract",
    title="RLR does not have the lowest variance among RLR, zeroth order and reinforcement learning",
    statement="Of the unbiased estimators that remain where full back-propagation is infeasible, RLR, zeroth order and RL, RLR achieves the lowest variance.",
    printed="refuted",
    corrected="No order holds. On the additive chain LG1 (T = 4; baseline J, blocks of two) one-sided RLR has 1.7 million at the paper's μ = 10⁻³ and 47.43 at μ = 0.25, against 40.85 of REINFORCE; at its best μ, which the paper does not look for, "
    "28.50. Antithetic RLR, two roll-outs, is below REINFORCE and zeroth order when blocks are short (13.49 on LG1; 19.7 and 23.5 |∇J|² in the near-identity family, T = 10, d = 16, "
    "where REINFORCE has 30.6 and antithetic zeroth order 29.8), and more than its rivals when they are long (53.0 for blocks of five). REINFORCE with RLR's exact first step, a rival that the paper does not consider, has 19.18 on LG1.",
    why="The argument is Proposition 4.2 and the remark after it, both false in general (estimators.variance-order, estimators.half-against-zeroth). On the instances computed here (2 and 16 parameters) the exact first step and the antithetic pair help, and "
    "antithetic RLR without its half-order block has less variance per network call than with any block. With many parameters it is the zeroth-order part that ruins it (rlr.frontier-measured: 770 parameters). "
    "The paper's μ = 0.001 is an absolute size for its LoRA weights, carried over to our parameters; one-sided, variance goes like p/μ². Eq. 11 is one-sided; the antithetic form (SPSA) is mentioned as covered in its section 3.2. "
    "(That full back-propagation is infeasible is another claim: estimators.memory-of-full-back-propagation.)",
    derivation="rlr.md#block-length-and-parameter-noise",
    checks=(
        at_least(
            "where it loses",
            "In four comparisons, is the variance of RLR larger than that of a policy gradient or of zeroth order?",
            LOSES,
            subject=where_rlr_loses,
            printed=lambda: swapped(where_rlr_loses()),
            controls={"antithetic RLR with blocks of one step": lambda: where_rlr_loses(short_antithetic)},
        ),
        at_least(
            "where it wins",
            "In five others, is the variance of RLR the smaller one?",
            WINS,
            subject=where_rlr_wins,
            controls={
                "blocks of 5 in the family": lambda: where_rlr_wins(length=5),
                "the paper's μ in place of the best": lambda: where_rlr_wins(best=lambda: on_lg1(blocks(2), PAPER_MU)),
            },
        ),
        at_least(
            "against a rival of ours",
            "Against REINFORCE with RLR's exact first step, which the paper does not consider, does RLR lose one-sided at its best μ and win as a short antithetic pair?",
            ("LG1, one-sided at its best μ: RLR over the rival", "LG1, antithetic, blocks of 1: the rival over RLR", "family, antithetic, blocks of 2: the rival over RLR"),
            subject=against_first_step,
            controls={"REINFORCE without the exact first step": lambda: against_first_step(first=False)},
        ),
        at_least(
            "per network call, without the block",
            "Is variance times network calls of antithetic RLR larger, for every block length, than without its half-order part?",
            (*(f"LG1, blocks of {n}" for n in (1, 2, 3)), *(f"family, blocks of {n}" for n in LENGTHS)),
            subject=against_no_block,
            controls={"one-sided noise without the block": lambda: against_no_block(antithetic=False)},
        ),
        equals(
            "the numbers",
            "On the additive chain LG1 (T = 4), baseline J, are the variances 47.43, 28.50 (best μ), 13.49 and 19.77 (antithetic), and of REINFORCE 40.85 and 19.18?",
            TABLE,
            subject=table,
            # From a second derivation; the second and the last by its algebra, but after its report.
            reference=lambda: np.array(
                [47.431167126630, 28.504683420599, 13.489362616628, 19.768633629092, 40.846008137317, 19.176351141792]
            ),
            controls={"REINFORCE less the variance of its first step": lambda: table(lambda: on_lg1(reinforce()) - on_lg1(_only_first()))},
            margin_from=FROM_SECOND,
        ),
    ),
    figures=lambda context: (_noise_figure(),),
)  # fmt: skip


def _only_first() -> Credit:
    w = np.zeros((STEPS, STEPS + 2))
    w[0, 1] = 1
    return Credit.of(w)


def _noise_figure() -> Figure:
    mus = np.geomspace(PAPER_MU, 3, 60)
    powers = mus[:, None] ** np.array([-2, 0, 2, 4])
    x = tuple(mus.tolist())
    curves = {
        "RLR, one-sided": coefficients(blocks(2)),
        "RLR, antithetic": coefficients(blocks(2), antithetic=True),
        "zeroth order, one-sided": coefficients(credits.zeroth_order(STEPS)),
        "zeroth order, antithetic": coefficients(credits.zeroth_order(STEPS), antithetic=True),
    }
    lines = {"REINFORCE": on_lg1(reinforce()), "REINFORCE, exact first step": on_lg1(reinforce(first=True))}
    return Figure(
        name="rlr-noise",
        title="Variance against the parameter noise: RLR and its rivals",
        caption="The additive chain LG1 (T = 4), blocks of two, baseline J, exact. One-sided RLR blows up like 1/μ²: at the paper's μ = 10⁻³ it is 42 000 times as variable as REINFORCE, and even at its best μ it "
        "stays above REINFORCE with the same exact first step (a rival of ours). That μ is an absolute size, chosen in the paper for LoRA weights. Antithetic RLR (two roll-outs) does not depend on μ over most of the range, just above that line.",
        alt="Variance against μ from 0.001 to 3, both logarithmic. Two one-sided curves fall from above a million with slope minus two, dip to 29 and 74 near μ = 0.6 and rise again; two antithetic curves are flat at 20 and 32, RLR's rising beyond "
        "μ = 1; dashed lines mark REINFORCE at 41 and, with exact first step, at 19.",
        x_label="standard deviation μ of the parameter noise",
        y_label="variance",
        x_scale="log",
        y_scale="log",
        series=(
            *(Series(name, x, tuple((powers @ c).tolist())) for name, c in curves.items()),
            *(Series(name, (x[0], x[-1]), (value, value), style="dashed") for name, value in lines.items()),
        ),
    )  # fmt: skip


# --- one-sided noise ---------------------------------------------------------------------------------------------

NOISE_CASES = tuple((length, baseline) for baseline in (0.0, None) for length in (1, 2, 3))
NOISE_NAMES = tuple(f"blocks of {n}, baseline {'J' if b is None else '0'}" for n, b in NOISE_CASES)


def leading(antithetic: bool = False) -> np.ndarray:
    return np.array([coefficients(blocks(n), antithetic, b)[0] for n, b in NOISE_CASES])


def predicted(perturbed: Callable[[int], int], parameters: int = 2) -> np.ndarray:
    """p |C| E (R - baseline)^2, |C| = perturbed(block length)."""
    square = float(chains.second_moment_reward(additive().exact_chain, additive().exact_reward))
    moments = [square if b == 0.0 else square - level() ** 2 for _, b in NOISE_CASES]
    return np.array([parameters * perturbed(n) * m for (n, _), m in zip(NOISE_CASES, moments, strict=True)])


def left_over(length: int) -> int:
    """|C|: the steps that are neither the first nor in the block."""
    return STEPS - 1 - length


def scaled_squares(estimator: Estimator) -> Sampler:
    """mu^2 |estimate|^2 at the paper's mu, baseline J."""
    based = with_baseline(estimator, Constant(level()))
    return mapped(sampled(additive(), based), lambda g: PAPER_MU**2 * (g**2).sum(1, keepdims=True))


def one_sided(credit: Credit) -> Estimator:
    return Estimator("RLR", credit, ParameterNoise(PAPER_MU))


ONE_SIDED = Claim(
    id="rlr.one-sided-noise",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="derived in docs/rlr.md; RLR, eq. (11) and appendix A.2",
    title="One-sided parameter noise makes the variance of RLR grow like 1/μ²; an antithetic pair removes that term",
    statement=r"In an additive chain $\mathrm{Var} = c_{-1}\mu^{-2} + c_0 + c_1\mu^2 + c_2\mu^4$. One-sided, $c_{-1} = p\,|C|\,\mathbb{E}(R_0 - \beta)^2$, with $p$ parameters, $|C|$ perturbed steps and the unperturbed reward "
    r"$R_0$; for the average over $\pm\xi$, $c_{-1} = 0$.",
    printed="holds",
    why="The score of the parameter noise is ξ/μ, and one-sided it multiplies the whole reward, not the change that the noise makes: variance goes like p/μ². The paper perturbs with μ = 10⁻³ (images) and 10⁻⁴ (video), absolute sizes "
    "for its LoRA weights; here 10⁻³ is carried over to two parameters. Its eq. 11 is one-sided; in section 3.2 it mentions the antithetic form (SPSA) as covered.",
    derivation="rlr.md#block-length-and-parameter-noise",
    checks=(
        equals(
            "the leading coefficient",
            "On the additive chain LG1 (T = 4), is the coefficient of 1/μ² in the exact variance p |C| E (R₀ - β)²?",
            NOISE_NAMES,
            subject=leading,
            reference=lambda: predicted(left_over),
            controls={
                "noise on all of 2..T": lambda: predicted(lambda length: STEPS - 1),
                "the number of parameters left out": lambda: predicted(left_over, parameters=1),
            },
        ),
        equals(
            "antithetic",
            "On the additive chain LG1 (T = 4), is that coefficient zero for the antithetic pair?",
            NOISE_NAMES,
            subject=lambda: leading(antithetic=True),
            reference=lambda: np.zeros(len(NOISE_CASES)),
            controls={"one-sided": leading},
        ),
        equals(
            "at the paper's size",
            "On the additive chain LG1 (T = 4), baseline J, μ = 0.001, is μ² times the variance 1.731638929 (blocks of two), 42 395 times REINFORCE's?",
            ("μ² Var", "ratio to REINFORCE / 10⁴"),
            subject=lambda: _at_the_papers_size(PAPER_MU),
            # Typed in from an earlier derivation and, to more digits, from the algebra of a second one.
            reference=lambda: np.array([1.7316389289246, 1731638.9289246 / 40.846008137317 / 1e4]),
            controls={"μ = 0.05": lambda: _at_the_papers_size(0.05)},
            margin_from=FROM_SECOND,
        ),
        has_mean(
            "sampled",
            "On the additive chain LG1 (T = 4) at μ = 0.001, does μ² |estimate|² of one-sided RLR in torch (blocks of two) have the exact mean 1.7316?",
            ("μ² E |estimate|²",),
            subject=lazily(lambda: scaled_squares(one_sided(blocks(2)))),
            reference=lambda: np.array([PAPER_MU**2 * (on_lg1(blocks(2), PAPER_MU) + np.sum(gradient_of(additive()) ** 2))]),
            margin=0.05,
            margin_from="0.05, 3 % of the value; declared before sampling",
            # The square of a quadratic of the chain's noise times a chi-square: 1370 by quadrature. Declared, not a
            # theorem's bound: 1500.
            kurtosis=1500,
            controls={
                "blocks of one": lazily(lambda: scaled_squares(one_sided(blocks(1)))),
                "antithetic": lazily(lambda: scaled_squares(antithetic(one_sided(blocks(2)), over="parameters"))),
            },
        ),
    ),
)  # fmt: skip


def _at_the_papers_size(mu: float) -> np.ndarray:
    value = on_lg1(blocks(2), mu)
    return np.array([mu**2 * value, value / on_lg1(reinforce()) / 1e4])


# --- equation (21) -----------------------------------------------------------------------------------------------

SHIFTS = (1.0, 0.1, 0.01)
REWARD, CENTRE = (1.0, 0.5, -1.0), 0.3  # R(z) = 1 + z/2 - z^2, z ~ N(0.3, 1)


def by_quadrature(power: float, damped: bool = True) -> np.ndarray:
    """E ((w - 1) / shift^power)^2 R^2 - mean^2 at each shift, by Gauss and Hermite's rule."""
    eps, weights = variance.gaussian_rule(1, 80)
    reward = np.polynomial.polynomial.polyval(CENTRE + eps[:, 0], REWARD)
    mean = weights @ (reward * eps[:, 0])
    values = []
    for shift in SHIFTS:
        ratio = np.exp(shift * eps[:, 0] - damped * shift**2 / 2)
        values.append(weights @ ((ratio - 1) / shift**power * reward) ** 2 - mean**2)
    return np.array(values)


@cache
def one_step(constant: float, linear: float, quadratic: float, theta: float) -> Problem:
    """x_0 = theta + eps, T = 1, with a quadratic reward."""
    chain = chains.LinearGaussianChain([[[0.0]]], [[[1.0]]], [[0.0]], [1.0], [theta], [0.0], [[1.0]])
    return Problem.of((chain, chains.QuadraticReward(constant, [linear], [[quadratic]])))


def polynomial_problem() -> Problem:
    return one_step(REWARD[0], REWARD[1], 2 * REWARD[2], CENTRE)


def score_squares() -> Sampler:
    """Squared deviations of the score estimator in torch."""
    mean = lower_bounds.score_mean(REWARD, CENTRE)
    return mapped(sampled(polynomial_problem(), named.half_order(1, 1)), lambda g: (g - mean) ** 2)


def ratio_squares(shift: float, power: float) -> Sampler:
    """((w - 1) / shift^power)^2 R^2 - mean^2 at samples of the same chain."""
    problem = polynomial_problem()
    mean = lower_bounds.score_mean(REWARD, CENTRE)

    def statistic(x: torch.Tensor) -> torch.Tensor:
        w = torch.exp(shift * (x - CENTRE) - shift**2 / 2)
        reward = REWARD[0] + REWARD[1] * x + REWARD[2] * x**2
        return ((w - 1) / shift**power * reward) ** 2 - mean**2

    return statistics(problem.chain, problem.params, named.half_order(1, 1), statistic)


def at_limit(of: Callable[..., float]) -> np.ndarray:
    return np.array([of(REWARD, CENTRE, shift) for shift in (*SHIFTS, 0.0)])


def limits_at_zero() -> np.ndarray:
    return np.array([at_limit(f)[-1] for f in (lower_bounds.quotient_variance, lower_bounds.printed_variance)])


DENSITY_RATIO = Claim(
    id="rlr.density-ratio",
    chapter=RLR,
    paper="RLR",
    source="RLR, A.7.4, eq. (21)",
    title="The variance of the score estimator as a limit of density ratios lacks a factor 1/h²",
    statement=r"$\mathrm{Var}(\eta) = \lim_{h\to0} \mathbb{E}[(w(\theta,h) - 1)^2 R(z)^2] - \mu(\theta)^2$, $w$ the ratio of the densities at $\theta + h$ and $\theta$.",
    printed="holds-corrected",
    corrected=r"$\mathrm{Var}(\eta) = \lim_{h\to0} \mathbb{E}\big[\big(\tfrac{w(\theta,h) - 1}{h}\big)^2 R(z)^2\big] - \mu(\theta)^2$. As printed the limit is $-\mu(\theta)^2$, which is no variance.",
    why="w - 1 is of order h: eq. 20, just before, divides it by h. (The paper defines η as an expectation, whose variance is zero; the random variable is meant.)",
    derivation="convergence.md#equation-21",
    checks=(
        equals(
            "before the limit",
            "For R = 1 + z/2 - z², θ = 0.3, h = 1, 0.1, 0.01, is the closed form what quadrature of ((w - 1)/h)² R² gives?",
            tuple(f"h = {shift:g}" for shift in SHIFTS),
            subject=lambda: at_limit(lower_bounds.quotient_variance)[:-1],
            reference=lambda: by_quadrature(1.0),
            printed=lambda: at_limit(lower_bounds.printed_variance)[:-1],
            controls={"w without its exp(-h²/2)": lambda: by_quadrature(1.0, damped=False)},
        ),
        equals(
            "the limit",
            "Are the limits the variance 9.7836, and as printed -μ² = -0.01?",
            ("corrected", "printed form"),
            subject=limits_at_zero,
            reference=lambda: np.array([9.7836, -0.01]),
            printed=lambda: np.array([at_limit(lower_bounds.printed_variance)[-1], -0.01]),
            controls={"μ² not taken off": lambda: limits_at_zero() + lower_bounds.score_mean(REWARD, CENTRE) ** 2},
        ),
        has_mean(
            "sampled",
            "Do score estimates in torch have the variance that the corrected limit gives?",
            ("Var η",),
            subject=lazily(score_squares),
            reference=lambda: at_limit(lower_bounds.quotient_variance)[-1:],
            margin=0.4,
            margin_from="0.4, 4 % of the variance; declared before sampling",
            # By quadrature 4526. Declared, not a theorem's bound: 5000.
            kurtosis=5000,
            printed=lazily(lambda: ratio_squares(0.01, 0.0)),
            controls={"divided by h once": lazily(lambda: ratio_squares(0.01, 0.5))},
        ),
    ),
)  # fmt: skip


# --- the Hammersley-Chapman-Robbins bound ------------------------------------------------------------------------

WIDTHS = (0.1, 0.3, 0.5, 1.0, 3.0)
CENTRES = (0.0, 2.0)
BUMPS = tuple((theta, width) for theta in CENTRES for width in WIDTHS)
BUMP_NAMES = tuple(f"θ = {theta:g}, s = {width:g}" for theta, width in BUMPS)
Bump = Callable[[float, float], float]


def over_bumps(larger: Bump, smaller: Bump) -> Pair:
    return np.array([larger(*bump) for bump in BUMPS]), np.array([smaller(*bump) for bump in BUMPS])


def square_outside(theta: float, width: float) -> float:
    """Planted error: the denominator (E|w - 1|)^2; its limit is 2/pi times the right one's."""
    return lower_bounds.cramer_rao_bound(theta, width) * math.pi / 2


def weight_moments(moment: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """(E[w - 1])^2 and E of a square, by quadrature, at each shift."""
    eps, weights = variance.gaussian_rule(1, 80)
    rows = []
    for shift in SHIFTS:
        w = np.exp(shift * eps[:, 0] - shift**2 / 2)
        rows += [float(weights @ (w - 1)) ** 2, float(weights @ moment(w))]
    return np.array(rows)


BUMP_WIDTH, BUMP_SHIFT = 0.5, 0.5


def bump_differences(change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Sampler:
    """A statistic of (w, R, z) at samples of z ~ N(0, 1) by the torch chain."""
    problem = one_step(0.0, 0.0, 0.0, 0.0)

    def statistic(z: torch.Tensor) -> torch.Tensor:
        w = torch.exp(BUMP_SHIFT * z - BUMP_SHIFT**2 / 2)
        return change(w, torch.exp(-(z**2) / (2 * BUMP_WIDTH**2)), z)

    return statistics(problem.chain, problem.params, named.half_order(1, 1), statistic)


CHAPMAN_ROBBINS = Claim(
    id="rlr.chapman-robbins",
    chapter=RLR,
    paper="RLR",
    source="RLR, A.7.4, after eq. (21)",
    title="The bound after Hammersley, Chapman and Robbins compares the means of two statistics, and can exceed the variance",
    statement=r"By the Hammersley-Chapman-Robbins bound an upper bound for the variance is $\mathrm{Var}(\eta) \ge \sup_h \frac{(\mu(\theta+h) - \mu(\theta))^2}{\mathbb{E}[w(\theta,h)-1]^2}$, $\mu$ the estimator's mean; it is "
    "the minimal variance that the estimator can achieve.",
    printed="holds-corrected",
    corrected=r"$\mathrm{Var}_\theta(\eta) \ge \sup_{h\ne0} \frac{(\mathbb{E}_{\theta+h}\eta - \mathbb{E}_\theta\eta)^2}{\mathbb{E}_\theta[(w-1)^2]}$ with the *same* function $\eta$ of $z$ in both means. It is a lower bound; no multiple of it bounds the variance from above.",
    why="μ is defined as the estimator's mean, and μ(θ + h) is then the mean of R(z)(z - θ - h), another statistic: for R = exp(-2z²), θ = 0, the quotient so read gives 0.128, the variance is 0.037, the right bound 0.008. "
    "Two slips are easily mended: \"upper\" (the next line speaks of the least variance), and a denominator that is zero if read (E[w - 1])²; we test it as E[(w - 1)²].",
    derivation="convergence.md#the-hammersley-chapman-robbins-bound",
    checks=(
        at_least(
            "a lower bound",
            "For R = exp(-z²/(2s²)), ten pairs of θ and s, is the exact variance at least the bound?",
            BUMP_NAMES,
            subject=lambda: over_bumps(lower_bounds.bump_variance, lower_bounds.chapman_robbins_bound),
            printed=lambda: over_bumps(lower_bounds.bump_variance, lower_bounds.printed_supremum),
            controls={
                "as an upper bound": lambda: over_bumps(lower_bounds.chapman_robbins_bound, lower_bounds.bump_variance),
                "(E|w - 1|)² for E[(w - 1)²], h → 0": lambda: over_bumps(lower_bounds.bump_variance, square_outside),
            },
        ),
        equals(
            "the denominator",
            "At h = 1, 0.1, 0.01, is (E[w - 1])² zero and E[(w - 1)²] = exp(h²) - 1?",
            tuple(f"{what}, h = {shift:g}" for shift in SHIFTS for what in ("(E[w - 1])²", "E[(w - 1)²]")),
            subject=lambda: weight_moments(lambda w: (w - 1) ** 2),
            reference=lambda: np.array([v for shift in SHIFTS for v in (0.0, lower_bounds.weight_variance(shift))]),
            controls={"E[w²]": lambda: weight_moments(lambda w: w**2)},
            tolerance=1e-12,
        ),
        equals(
            "the example",
            "At θ = 0, s = 1/2, are the variance 1/27, the right bound 1/125, and the printed form with its denominator repaired 16/125?",
            ("variance", "right bound", "printed form, repaired"),
            subject=lambda: _example(lower_bounds.chapman_robbins_bound),
            reference=lambda: np.array([1 / 27, 1 / 125, 16 / 125]),
            controls={"the quotient at h = 1/2 for the supremum": lambda: _example(lambda theta, width: lower_bounds.chapman_robbins_quotient(theta, width, 0.5))},
        ),
        has_mean(
            "the numerator, sampled",
            "At θ = 0, s = h = 1/2, do samples give the numerator E[(w - 1)η] = E_{θ+h} η - E_θ η?",
            ("E[(w - 1)η]",),
            subject=lazily(lambda: bump_differences(lambda w, r, z: (w - 1) * r * z)),
            reference=lambda: np.array([lower_bounds.fixed_statistic_mean(0.0, BUMP_WIDTH, BUMP_SHIFT)]),
            margin=0.002,
            margin_from="0.002, 5 % of the value; declared before sampling",
            # A bounded reward: 1.8 by quadrature. Declared, not a theorem's bound: 10.
            kurtosis=10,
            printed=lazily(lambda: bump_differences(lambda w, r, z: w * r * (z - BUMP_SHIFT) - r * z)),
            controls={"the ratio without its -1 squared": lazily(lambda: bump_differences(lambda w, r, z: (w - 1) ** 2 * r * z))},
        ),
    ),
)  # fmt: skip


def _example(bound: Bump) -> np.ndarray:
    at = (0.0, BUMP_WIDTH)
    return np.array([lower_bounds.bump_variance(*at), bound(*at), lower_bounds.printed_supremum(*at)])


# --- the best constant baseline ----------------------------------------------------------------------------------

# Optimal baseline and variance there on LG1, mu = 0.25, blocks of two: a second derivation, with more digits than needed.
BASELINES: tuple[tuple[str, Credit, bool, float, float], ...] = (
    ("REINFORCE", credits.policy_gradient(STEPS), False, 0.789595372254, 40.590228964883),
    ("half order(2)", credits.half_order(STEPS, 2), False, 0.818743903181, 61.345123971112),
    ("zeroth order", credits.zeroth_order(STEPS), False, 0.745411490144, 144.447194581623),
    ("RLR", blocks(2), False, 0.826670724249, 47.343938272107),
    ("RLR, antithetic", blocks(2), True, 0.809854373172, 19.708376301235),
)
BASELINE_NAMES = tuple(name for name, *_ in BASELINES)


@cache
def best_baselines() -> np.ndarray:
    problem = additive()
    arguments = (problem.exact_chain, problem.exact_reward)
    return np.array(
        [telescoped.optimal_baseline(*arguments, c.outcomes, mu=MU, antithetic=pair) for _, c, pair, *_ in BASELINES]
    )


def at_baselines(values: Iterable[float]) -> np.ndarray:
    return np.array([on_lg1(c, baseline=b, antithetic=pair) for (_, c, pair, *_), b in zip(BASELINES, values, strict=True)])  # fmt: skip


def around(centre: np.ndarray, step: float = 0.02) -> Pair:
    """Variances a little to both sides of the baselines, and at them."""
    here = at_baselines(centre)
    return np.concatenate([at_baselines(centre - step), at_baselines(centre + step)]), np.concatenate([here, here])


def closed_baselines(smoothed: bool = True) -> np.ndarray:
    """J + tr(Hessian of J) / E|S|^2 of the first three, with J the smoothed objective where parameters are perturbed."""
    problem = additive()
    curvature, total = problem.exact_reward.quadratic, influences().sum(0)
    bend = float(np.trace(total.T @ curvature @ total))
    silent = chains.QuadraticReward(0.0, np.zeros(2), np.zeros((2, 2)))
    values = []
    for _, credit, *_ in BASELINES[:3]:
        score = credit_moments(problem.exact_chain, silent, credit.outcomes, baseline=-1.0, mu=MU).variance
        noisy = smoothed and credit.uses_parameter_noise
        smooth = chains.smoothed_objective(problem.exact_chain, problem.exact_reward, MU) if noisy else level()
        values.append(float(smooth) + bend / score)
    return np.array(values)


def weighted_returns(baseline: float) -> Sampler:
    """(R - baseline) S^2 of the score estimator on x_0 = eps, R = x^2: two estimates on common noise give S."""
    problem = one_step(0.0, 0.0, 2.0, 0.0)
    plain = named.half_order(1, 1)

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = plain.draw(problem.chain, problem.params, 1 << 15, generator(stream, index))
            arguments = (problem.chain, problem.params, problem.objective, noise)
            raw, less, ours = (
                with_baseline(plain, Constant(b)).per_sample(*arguments)["theta"] for b in (0.0, 1.0, baseline)
            )
            return (ours * (raw - less)).numpy()

        return block

    return sampler


def one_step_baseline() -> float:
    problem = one_step(0.0, 0.0, 2.0, 0.0)
    return telescoped.optimal_baseline(
        problem.exact_chain, problem.exact_reward, credits.policy_gradient(1).matrices[0]
    )


OPTIMAL_BASELINE = Claim(
    id="rlr.optimal-baseline",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="derived in docs/telescoped.md",
    title="The constant baseline of least variance is not the mean reward, but close to it on the additive chain LG1 (T = 4)",
    statement=r"An estimate $(R - \beta)S$ with score $S$ has the least variance at $\beta^* = \mathbb{E}[R|S|^2]/\mathbb{E}|S|^2$. Where $J$ is quadratic and every step's gradient is estimated by scores, "
    r"$\beta^* = J_\mu + \Delta J/\mathbb{E}|S|^2$.",
    printed="holds",
    why="The variance is a parabola in β with curvature E|S|². Where J is concave the best baseline lies below the mean reward: large scores go with unusual, low rewards. On the additive chain LG1 (T = 4) the gain over β = J is 0.2 to 1.3 %: "
    "J is a good choice there. In one step with R = x² it is not: β* = 3, J = 1.",
    derivation="telescoped.md#baselines",
    checks=(
        equals(
            "the baselines on LG1",
            "On the additive chain LG1 (T = 4), μ = 0.25, are the optimal baselines those of an independent derivation?",
            BASELINE_NAMES,
            subject=best_baselines,
            reference=lambda: np.array([row[3] for row in BASELINES]),
            controls={"the mean reward": lambda: np.full(len(BASELINES), level()), "REINFORCE's for all": lambda: np.full(len(BASELINES), best_baselines()[0])},
        ),
        equals(
            "the variances there",
            "Are the variances at these baselines those of the independent derivation?",
            BASELINE_NAMES,
            subject=lambda: at_baselines(best_baselines()),
            reference=lambda: np.array([row[4] for row in BASELINES]),
            controls={"at the mean reward": lambda: at_baselines([level()] * len(BASELINES))},
        ),
        equals(
            "closed form",
            "For REINFORCE, half order and zeroth order, is β* = J_μ + ΔJ / E|S|²?",
            BASELINE_NAMES[:3],
            subject=lambda: best_baselines()[:3],
            reference=closed_baselines,
            controls={"zeroth order with J unsmoothed": lambda: closed_baselines(smoothed=False), "without ΔJ: the mean reward": lambda: np.full(3, level())},
        ),
        at_least(
            "a minimum",
            "Is the variance larger at β* - 0.02 and at β* + 0.02 than at β*?",
            tuple(f"{name}, {side}" for side in ("below", "above") for name in BASELINE_NAMES),
            subject=lambda: around(best_baselines()),
            controls={"around the mean reward": lambda: around(np.full(len(BASELINES), level()))},
        ),
        has_mean(
            "sampled",
            "In one step with R = x², does (R - β*) S² in torch have the mean zero, β* = 3?",
            ("E[(R - β*) S²]",),
            subject=lazily(lambda: weighted_returns(one_step_baseline())),
            reference=lambda: np.zeros(1),
            margin=0.1,
            margin_from="0.1, 5 % of the value 2 at the mean reward; declared before sampling",
            # By quadrature 495, below the theorem's 817 for degree 4.
            kurtosis=kurtosis(4),
            controls={"the mean reward, 1": lazily(lambda: weighted_returns(1.0))},
        ),
    ),
)  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    VAR_A,
    BOUND,
    BOUND_MATRIX,
    BLOCK_LENGTH,
    LOWEST,
    ONE_SIDED,
    DENSITY_RATIO,
    CHAPMAN_ROBBINS,
    OPTIMAL_BASELINE,
)
