"""Chapter *SFT-PG*: its baseline, its critic's regulariser and its Wasserstein bound, where all three can be computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from algorithms.baselines import Baseline
from algorithms.estimators import policy_gradient, with_baseline
from claims.claim import Claim, Context
from claims.judges import Sampler, at_least, equals, exceeds, has_mean
from claims.problems import lazily
from claims.records import Column, Figure, Series, Table
from theory import ddpm, shortcut
from theory.chains import LinearGaussianChain, QuadraticReward, marginals
from theory.gaussian import Gaussian, affine, condition, w2_squared
from theory.schedules import NoiseSchedule, ddim_grid
from toy.distances import wasserstein2
from toy.experiments import Block, generator
from toy.few_step import swiss_roll
from toy.linear_gaussian import Problem
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

CHAPTER = "SFT-PG"
PAPER = "SFT-PG"

Pair = tuple[np.ndarray, np.ndarray]
Instance = tuple[LinearGaussianChain, QuadraticReward]
Functions = Sequence[QuadraticReward]
Rule = Callable[[LinearGaussianChain, QuadraticReward], "Functions | None"]

# --- the optimal baseline -----------------------------------------------------------------------------------------


def square(constant: float = 0.0, dim: int = 1) -> QuadraticReward:
    """|x|^2 + constant."""
    return QuadraticReward(constant, [0.0] * dim, 2.0 * np.eye(dim))


def correlated() -> LinearGaussianChain:
    """x_0 = 3/4 x_1 + theta + eps / 2 at theta = 1/2, x_1 standard normal: a value function that is not constant."""
    return LinearGaussianChain([[[0.75]]], [[[1.0]]], [[0.0]], [0.5], [0.5], [0.0], [[1.0]])


@cache
def instances() -> dict[str, Instance]:
    fair = shortcut.one_step_example(1)
    return {
        "$x_0 = \\epsilon$, $f = x^2$": (fair, square()),
        "$x_0 = \\epsilon$, $f = x^2 - 2$": (fair, square(-2.0)),
        "$x_0 = \\frac34 x_1 + \\frac12 + \\frac12\\epsilon$, $f = x^2$": (correlated(), square()),
        "two steps, $f = x^2$": (shortcut.two_step_example(), square()),
    }


INSTANCES = ("ε, x²", "ε, x² - 2", "¾ x₁ + ½ + ½ ε, x²", "two steps, x²")


def shifted(functions: Functions, by: Sequence[float]) -> list[QuadraticReward]:
    return [QuadraticReward(f.constant + b, f.linear, f.quadratic) for f, b in zip(functions, by, strict=True)]


def per_step(chain: LinearGaussianChain, critic: QuadraticReward) -> Functions:
    """E[f |s_t|^2 | x] / E|s_t|^2: best for each step's variance by itself. V plus tr(J' Q J) / E|s_t|^2, J = dx_0/dtheta_t."""
    gain, extra = np.eye(chain.dim), []
    for matrix, columns, weight in zip(chain.A, chain.B, shortcut.score_moments(chain), strict=True):
        into = gain @ columns
        extra.append(float(np.trace(into.T @ critic.quadratic @ into)) / weight)
        gain = gain @ matrix
    return shifted(shortcut.value_functions(chain, critic), extra)


def mean_return(chain: LinearGaussianChain, critic: QuadraticReward) -> Functions:
    """E f as a constant."""
    means, covs = marginals(chain)
    mean, cov = means[0], covs[0]
    level = (
        critic.constant
        + critic.linear @ mean
        + 0.5 * (mean @ critic.quadratic @ mean + np.trace(critic.quadratic @ cov))
    )
    return shortcut.constant_baselines(chain, [float(level)] * chain.steps)


def best_constants(chain: LinearGaussianChain, critic: QuadraticReward) -> Functions:
    return shortcut.constant_baselines(chain, shortcut.optimal_constants(chain, critic))


RULES: dict[str, Rule] = {
    "none": lambda chain, critic: None,
    "E f": mean_return,
    "best constants": best_constants,
    "V": shortcut.value_functions,
    "b*": shortcut.optimal_baselines,
}


def variances(*rules: Rule) -> np.ndarray:
    """Exact variances, (instances, rules)."""
    rows = [[float(shortcut.estimator_variance(c, f, rule(c, f))) for rule in rules] for c, f in instances().values()]
    return np.array(rows)


def by_quadrature(*rules: Rule) -> np.ndarray:
    """The same by integrating the estimator over its noises on a Gauss-Hermite grid, exact for polynomials."""
    rows = []
    for chain, critic in instances().values():
        nodes, masses = np.polynomial.hermite_e.hermegauss(9)
        axes = np.meshgrid(*[nodes] * (chain.steps + 1), indexing="ij")
        weight = np.prod(np.meshgrid(*[masses / masses.sum()] * (chain.steps + 1), indexing="ij"), axis=0)
        states = [chain.mean_T[0] + math.sqrt(chain.cov_T[0, 0]) * axes[-1]]
        for t in reversed(range(chain.steps)):
            drift = chain.A[t, 0, 0] * states[0] + chain.B[t, 0] @ chain.theta + chain.c[t, 0]
            states.insert(0, drift + chain.std[t] * axes[t])
        row = []
        for rule in rules:
            functions = rule(chain, critic) or shortcut.constant_baselines(chain, [0.0] * chain.steps)
            estimate = np.zeros_like(weight)
            for t in range(chain.steps):
                score = chain.B[t, 0, 0] * axes[t] / chain.std[t]
                estimate += (on_line(critic, states[0]) - on_line(functions[t], states[t + 1])) * score
            mean = np.sum(weight * estimate)
            row.append(float(np.sum(weight * (estimate - mean) ** 2)))
        rows.append(row)
    return np.array(rows)


def on_line(f: QuadraticReward, x: np.ndarray) -> np.ndarray:
    return float(f.constant) + float(f.linear[0]) * x + 0.5 * float(f.quadratic[0, 0]) * x**2


def none_is_better(least: Rule) -> Pair:
    """Variances of the other five rules, and of `least` moved by constants, against that of `least` itself."""
    others = [rule for rule in (*RULES.values(), per_step) if rule is not least]
    others += [lambda c, f, by=by: shifted(functions_of(least, c, f), [by] * c.steps) for by in (-0.3, 0.3)]
    larger = variances(*others)
    return larger.ravel(), np.repeat(variances(least), larger.shape[1])


OTHERS = ("none", "E f", "best constants", "the other of V and b*", "each step by itself", "0.3 lower", "0.3 higher")


def functions_of(rule: Rule, chain: LinearGaussianChain, critic: QuadraticReward) -> Functions:
    functions = rule(chain, critic)
    assert functions is not None
    return functions


DIMENSIONS = (1, 2, 3, 10)
WIDTHS = (1.0, 0.5, 0.1, 0.01)


def dimension_ratios(rule: Rule = shortcut.value_functions, best: Rule = shortcut.optimal_baselines) -> np.ndarray:
    """Variance of V over that of b* for x_0 = eps in d dimensions, f = |x|^2."""
    ratios = []
    for d in DIMENSIONS:
        chain, critic = shortcut.one_step_example(d), square(dim=d)
        values = [shortcut.estimator_variance(chain, critic, r(chain, critic)) for r in (rule, best)]
        ratios.append(float(values[0] / values[1]))
    return np.array(ratios)


def bump_ratios(baseline: Callable[[float], float] = lambda value: value) -> np.ndarray:
    """Variances of V over those of b* for narrow critics exp(-x^2 / 2 width^2), by the trapezoidal rule."""
    ratios = []
    for width in WIDTHS:
        x = np.linspace(-12.0, 12.0, 48001)
        law = np.exp(-0.5 * x**2)
        law /= law.sum()
        f = np.exp(-0.5 * (x / width) ** 2)
        optimal = law @ (f * x**2) / (law @ x**2)
        ratios.append(law @ ((f - baseline(law @ f)) * x) ** 2 / (law @ ((f - optimal) * x) ** 2))
    return np.array(ratios)


def excess(first: Rule, size: int = 1 << 16) -> Sampler:
    """Squared errors of torch's policy gradient with the baseline `first` less those with another, on equal roll-outs.

    First column: f = x^2 - 2 without state; none is the other. Second: the correlated chain; b* is the other.
    """
    pairs = [
        (Problem.of((shortcut.one_step_example(1), square(-2.0))), RULES["none"]),
        (Problem.of((correlated(), square())), RULES["b*"]),
    ]

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            columns = []
            for number, (problem, other) in enumerate(pairs):
                plain = policy_gradient(1)
                noise = plain.draw(problem.chain, problem.params, size, generator(stream.child(str(number)), index))
                truth = shortcut.score_gradient(problem.exact_chain, problem.exact_reward).sum(0)
                squares = []
                for rule in (first, other):
                    functions = rule(problem.exact_chain, problem.exact_reward)
                    estimator = plain if functions is None else with_baseline(plain, torch_baseline(functions))
                    each = estimator.per_sample(problem.chain, problem.params, problem.objective, noise)["theta"]
                    squares.append((each.numpy()[:, 0] - truth[0]) ** 2)
                columns.append(squares[0] - squares[1])
            return np.stack(columns, 1)

        return block

    return sampler


def torch_baseline(functions: Functions) -> Baseline:
    """b_{k-1}(x_k) for the noise of step k."""

    def baseline(returns: Tensor, x: Tensor, k: int) -> Tensor:
        f = functions[k - 1]
        linear, quadratic = torch.tensor(f.linear), torch.tensor(f.quadratic)
        return float(f.constant) + x @ linear + 0.5 * ((x @ quadratic) * x).sum(1)

    return baseline


def baseline_table(context: Context) -> tuple[Table, ...]:
    values = variances(*RULES.values())
    rows = [(name, *(f"{v:.6g}" for v in row)) for name, row in zip(instances(), values, strict=True)]
    for d in (2, 10):
        chain, critic = shortcut.one_step_example(d), square(dim=d)
        cells = [
            f"{float(shortcut.estimator_variance(chain, critic, rule(chain, critic))):.6g}" for rule in RULES.values()
        ]
        rows.append((f"$d = {d}$, $x_0 = \\epsilon$, $f = \\lvert x \\rvert^2$", *cells))
    return (
        Table(
            name="optimal-baseline",
            title="Exact variances of the policy gradient by baseline",
            caption="Total variance of $\\sum_t (f - b_t) s_t$. The value function never has the least of a row, "
            "and in the second row it is worse than no baseline at all.",
            columns=(
                Column("chain and critic", "left"),
                Column("none"),
                Column("$E f$"),
                Column("best constants"),
                Column("$V$"),
                Column("$b^*$"),
            ),
            rows=tuple(rows),
        ),
    )


OPTIMAL_BASELINE = Claim(
    id="sft-pg.optimal-baseline",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, sentence below (21)",
    title="The value function is not the variance-optimal baseline, and can be worse than none",
    statement=r"The choice of $V^\omega_{t+1}(x_{t+1})$ in $\sum_t (f(x_0) - V^\omega_{t+1}(x_{t+1})) \nabla_\theta \log p_t$ that minimises the variance is $E[f(x_0) \mid x_{t+1}]$.",
    printed="holds-corrected",
    corrected=r"It is $b_t^*(x_{t+1}) = E[f \langle s_t, S\rangle \mid x_{t+1}] / E[|s_t|^2 \mid x_{t+1}]$ with $s_t = \nabla_\theta \log p_t$, $S = \sum_t s_t$. For $x_0 = \theta + \epsilon$, $\theta = 0$, the variances "
    r"without baseline, with $V$ and with $b^*$ are 15, 10 and 6 for $f = x^2$, and 7, 10 and 6 for $f = x^2 - 2$. For $f = |x|^2$ in $d$ dimensions $V$ loses $(d+4)/(d+2)$; for a narrow critic the loss is unbounded.",
    why="V makes the return less its baseline small on average; the variance weighs it by the squared score. Where critic and squared score go together, as at a critic that is steep far out, the two differ. "
    "Per step the score also meets the other steps' scores, so that not even each step's own optimum is right.",
    derivation="sft.md#the-value-function-is-not-optimal",
    checks=(
        at_least(
            "least variance",
            "Is no variance below that with b*, on four chains?",
            tuple(f"{name}: {other}" for name in INSTANCES for other in OTHERS),
            subject=lambda: none_is_better(RULES["b*"]),
            printed=lambda: none_is_better(RULES["V"]),
            controls={
                "each step's own optimum": lambda: none_is_better(per_step),
                "the best constants": lambda: none_is_better(RULES["best constants"]),
            },
            tolerance=1e-9,
        ),
        equals(
            "variances",
            "Are the exact variances those of the estimator integrated over its noises, and 15, 10, 6 and 7, 10, 6?",
            tuple(f"{name}: {rule}" for name in INSTANCES for rule in RULES) + tuple(f"{name}, by hand: {rule}" for name in INSTANCES[:2] for rule in ("none", "V", "b*")),
            subject=lambda: np.concatenate([variances(*RULES.values()).ravel(), variances(*plain_three())[:2].ravel()]),
            reference=lambda: np.concatenate([by_quadrature(*RULES.values()).ravel(), [15, 10, 6, 7, 10, 6]]),
            controls={"each step's own optimum for b*": lambda: np.concatenate([variances(*list(RULES.values())[:4], per_step).ravel(), [15, 10, 6, 7, 10, 6]])},
        ),
        equals(
            "dimensions",
            "Is the variance with V over that with b* (d + 4)/(d + 2) for f = |x|²?",
            tuple(f"d = {d}" for d in DIMENSIONS),
            subject=dimension_ratios,
            reference=lambda: np.array([(d + 4) / (d + 2) for d in DIMENSIONS]),
            controls={
                "no baseline for V": lambda: dimension_ratios(RULES["none"]),
                "the best constants for V": lambda: dimension_ratios(RULES["best constants"]),
            },
        ),
        equals(
            "narrow critics",
            "For the critic exp(-x²/2τ²), is the variance with V over that with b* the closed form, which has no bound as τ falls?",
            tuple(f"τ = {width:g}" for width in WIDTHS),
            subject=lambda: np.array([b.value / b.optimal for b in map(shortcut.bump_variances, WIDTHS)]),
            reference=bump_ratios,
            controls={"no baseline": lambda: bump_ratios(lambda value: 0.0)},
        ),
        has_mean(
            "sampled",
            "Are the squared errors of torch's policy gradient with V larger than without a baseline (f = x² - 2, by 10 - 7) and than with b* (third chain, by 45/4 - 41/4)?",
            ("V less none", "V less b*"),
            subject=lazily(lambda: excess(RULES["V"])),
            reference=lambda: np.array([3.0, 1.0]),
            margin=lambda: np.array([0.3, 0.15]),
            margin_from="10 and 15 % of the two differences; declared before sampling",
            # With equal roll-outs the terms of degree six cancel: polynomials of degree four in x_1 and epsilon.
            kurtosis=kurtosis(4),
            controls={"b* for V": lazily(lambda: excess(RULES["b*"])), "V + 1/4": lazily(lambda: excess(raised))},
        ),
    ),
    tables=baseline_table,
)  # fmt: skip


def plain_three() -> tuple[Rule, Rule, Rule]:
    return RULES["none"], RULES["V"], RULES["b*"]


def raised(chain: LinearGaussianChain, critic: QuadraticReward) -> Functions:
    """Planted error: V + 1/4."""
    return shifted(shortcut.value_functions(chain, critic), [0.25] * chain.steps)


# --- the regulariser ----------------------------------------------------------------------------------------------

SHIFT, STRENGTH = 0.5, 0.1  # q = N(m + v^(1/2) / 2, v); the paper's lambda for toy data, T = 10
SLOPES = (0.1, 1.0, 4.0, 10.0, 1e2, 1e4, 1e6)


def objective(slope: float, target: str, strength: float = STRENGTH) -> float:
    """(24) on the two-step chain for the critic -slope (x - m) / v^(1/2) and the best baseline, from its value functions."""
    chain = shortcut.two_step_example()
    means, covs = marginals(chain)
    spread = float(covs[0, 0, 0])
    critic = QuadraticReward(0.0, [-slope / math.sqrt(spread)], [[0.0]])
    values = shortcut.value_functions(chain, critic)
    # E(V - target)^2: the target is V itself, or f with E Var(f | x_{t+1}) = Var f - Var V.
    penalty = 0.0
    if target == "f":
        penalty = sum(slope**2 - float(v.linear[0]) ** 2 * float(covs[t + 1, 0, 0]) for t, v in enumerate(values))
    gap = float(critic.linear[0]) * -SHIFT * math.sqrt(spread)  # E_p f - E_q f
    return gap - strength * penalty


def supremum(strength: float = STRENGTH) -> float:
    rho = shortcut.input_correlations(shortcut.two_step_example())
    return shortcut.sampled_regulariser_supremum(rho, SHIFT, strength)


def bounded(target: str, strength: float = STRENGTH) -> Pair:
    return np.full(len(SLOPES), supremum()), np.array([objective(a, target, strength) for a in SLOPES])


@cache
def sampler_correlations(steps: int) -> np.ndarray:
    """Correlations of x_0 with x_{t+1} in ancestral sampling of N(1/2, .09), released schedule, noise beta."""
    slopes, noise = ddpm.ancestral_steps([0.09], shortcut.released_schedule(steps), "beta")
    eye, zero = np.ones((steps, 1, 1)), np.zeros((steps, 1))
    chain = LinearGaussianChain(slopes[:, :, None], eye, zero, np.sqrt(noise[:, 0]), [0.0], [0.0], [[1.0]])
    return shortcut.input_correlations(chain)


@cache
def cases() -> dict[str, tuple[np.ndarray, float]]:
    """Correlations and lambda per step; lambda T is one for the last two, as in the released code."""
    return {
        "independent, T = 1": (np.zeros(1), STRENGTH),
        "independent, T = 10": (np.zeros(10), STRENGTH),
        "correlation .6": (np.array([0.6]), STRENGTH),
        "correlations .9, -.5, .1": (np.array([0.9, -0.5, 0.1]), STRENGTH),
        "sampler, T = 10": (sampler_correlations(10), 0.1),
        "sampler, T = 100": (sampler_correlations(100), 0.01),
    }


CASES = (
    "independent, T = 1",
    "independent, T = 10",
    "correlation .6",
    "correlations .9, -.5, .1",
    "sampler, T = 10",
    "sampler, T = 100",
)


def suprema(factor: float = 1.0) -> np.ndarray:
    return np.array([shortcut.sampled_regulariser_supremum(rho, SHIFT, factor * s) for rho, s in cases().values()])


def limits() -> np.ndarray:
    """chi^2 / (4 lambda T), right only for independent inputs."""
    return np.array([math.expm1(SHIFT**2) / (4 * s * len(rho)) for rho, s in cases().values()])


def ceilings() -> np.ndarray:
    return np.array([math.expm1(SHIFT**2) / (4 * s * np.sum(1 - rho**2)) for rho, s in cases().values()])


def maximised(degree: int = 20) -> np.ndarray:
    """The maximum over polynomial critics: conditional means node by node, one linear system, no eigenfunctions."""
    z, w = np.polynomial.hermite_e.hermegauss(64)
    w = w / w.sum()
    scale = np.sqrt([float(math.factorial(k)) for k in range(1, degree + 1)])

    def basis(x: np.ndarray) -> np.ndarray:
        return np.polynomial.hermite_e.hermevander(x, degree)[..., 1:] / scale

    own = basis(z)
    gap = w @ own - w @ basis(z + SHIFT)
    values = []
    for rho, strength in cases().values():
        penalty = np.zeros((degree, degree))
        for r in rho:
            given = np.einsum("j,ijk->ik", w, basis(r * z[:, None] + math.sqrt(1 - r**2) * z))
            penalty += own.T @ (w[:, None] * own) - given.T @ (w[:, None] * given)
        values.append(gap @ np.linalg.solve(penalty, gap) / (4 * strength))
    return np.array(values)


REGULARISER = Claim(
    id="sft-pg.regulariser",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, (22) and (24)",
    title="The regulariser as printed regularises nothing; the released one gives a finite critic",
    statement=r"Training critic and baseline together to maximise $g - \lambda \sum_t E(V^\omega_{t+1}(x_{t+1}) - E[f(x_0) \mid x_{t+1}])^2$ keeps the critic's value from exploding.",
    printed="holds-corrected",
    corrected=r"That supremum is infinite: the baseline may be $E[f \mid x_{t+1}]$ itself, and the value grows linearly in the critic. With $f(x_0)$ for its conditional expectation, as released, it is finite if $\chi^2(q \| p) < \infty$: for one law shifted by "
    r"$\delta$ standard deviations, $\sum_{k \ge 1} (\delta^{2k}/k!) / (4\lambda \sum_t (1 - \rho_t^{2k}))$, $\rho_t$ the correlation of $x_0$ and $x_{t+1}$; $\chi^2/(4 \lambda T)$ if all $\rho_t = 0$, more otherwise.",
    why="Fitting a sampled return leaves its conditional variance as loss however good the baseline; that residue is the whole penalty. It is nearly zero at the last steps, where the input already fixes the output: on a sampler of ten steps the supremum is 34 times the chi-squared limit.",
    derivation="sft.md#the-regulariser",
    checks=(
        at_least(
            "bounded",
            "On the two-step chain, is the value at linear critics of growing scale below a finite supremum?",
            tuple(f"scale {slope:g}" for slope in SLOPES),
            subject=lambda: bounded("f"),
            printed=lambda: bounded("E[f | x]"),
            controls={"a hundredth of λ": lambda: bounded("f", STRENGTH / 100)},
        ),
        equals(
            "linear growth",
            "As printed, is the value divided by the scale 1/2, the shift, at every scale?",
            tuple(f"scale {slope:g}" for slope in SLOPES),
            subject=lambda: np.array([objective(slope, "E[f | x]") / slope for slope in SLOPES]),
            reference=lambda: np.full(len(SLOPES), SHIFT),
            controls={"the sampled return": lambda: np.array([objective(slope, "f") / slope for slope in SLOPES])},
        ),
        equals(
            "the supremum",
            "Is the series the maximum over polynomial critics of degree 20, found by quadrature and a linear system?",
            CASES,
            subject=suprema,
            reference=maximised,
            controls={"χ²/(4λT) for every chain": limits, "λ doubled": lambda: suprema(2.0)},
            tolerance=1e-7,
            margin_from="1e-7 of the largest: conditional means near correlation 1 and the linear system's rounding",
        ),
        equals(
            "numbers",
            "For independent inputs, are the suprema those of an independent derivation?",
            ("T = 1", "T = 10"),
            subject=lambda: suprema()[:2],
            reference=lambda: np.array([0.7100635417, 0.0710063542]),
            controls={"χ² = δ²": lambda: SHIFT**2 / (4 * STRENGTH * np.array([1, 10])), "λ doubled": lambda: suprema(2.0)[:2]},
            tolerance=1e-10,
            margin_from="1e-10: the reference is given to ten decimals",
        ),
        at_least(
            "far from the limit",
            "On the sampler of N(1/2, .09), is the supremum at least 34 (T = 10) and 2.6 times (T = 100) what independent inputs give?",
            ("T = 10", "T = 100"),
            subject=lambda: (maximised()[4:], np.array([34, 2.6]) * limits()[4:]),
            controls={"independent inputs": lambda: (limits()[4:], np.array([34, 2.6]) * limits()[4:])},
        ),
        at_least(
            "between two multiples of chi-squared",
            "Does the supremum lie between χ²/(4λT) and χ²/(4λ Σ(1 - ρ²))?",
            tuple(f"{side}: {name}" for side in ("above the first", "below the second") for name in CASES),
            subject=lambda: (np.concatenate([suprema(), ceilings()]), np.concatenate([limits(), suprema()])),
            controls={"exchanged": lambda: (np.concatenate([limits(), suprema()]), np.concatenate([suprema(), ceilings()]))},
        ),
    ),
)  # fmt: skip

# --- the Wasserstein bound ----------------------------------------------------------------------------------------

DATA = (0.5, 0.09)
CHAINS = (10, 100, 1000)
NOISES: tuple[ddpm.Variance, ...] = ("optimal", "beta", "posterior")
# From an independent derivation: I(T), W2(p_0, q_0) and I(T) W2(p_T, q_T).
DERIVED = {
    10: (0.6520058768, 0.4929007980, 0.5210218167),
    100: (0.1557334216, 0.0642611681, 0.0793854476),
    1000: (0.0073360869, 0.0002972041, 0.0002980128),
}


@cache
def distances(steps: int, noise: ddpm.Variance = "optimal") -> np.ndarray:
    """W2(p_t, q_t), t = 0..T."""
    return shortcut.reverse_w2(*DATA, shortcut.released_schedule(steps), noise)


def start_term(steps: int) -> float:
    """I(T) W2(p_T, q_T)."""
    return shortcut.contraction(DATA[1], shortcut.released_schedule(steps)) * float(distances(steps)[-1])


def start_alone(noise: ddpm.Variance) -> Pair:
    return np.array([start_term(T) for T in CHAINS]), np.array([distances(T, noise)[0] for T in CHAINS])


def with_noise_term(factor: float = 1.0) -> Pair:
    """The bound with the noise's own term, for beta and beta-tilde."""
    larger, smaller = [], []
    for noise in NOISES[1:]:
        for T in CHAINS:
            schedule = shortcut.released_schedule(T)
            slopes = ddpm.ancestral_steps([DATA[1]], schedule)[0][:, 0]
            deviations = factor * shortcut.noise_deviations(DATA[1], schedule, noise)
            larger.append(shortcut.noise_error_bound(slopes, deviations, float(distances(T)[-1])))
            smaller.append(distances(T, noise)[0])
    return np.array(larger), np.array(smaller)


def sharpness(variance: float) -> np.ndarray:
    """W2(p_0, q_0) over I(T) W2(p_T, q_T)."""
    ratios = []
    for T in CHAINS:
        schedule = shortcut.released_schedule(T)
        found = shortcut.reverse_w2(DATA[0], variance, schedule)
        ratios.append(found[0] / (shortcut.contraction(variance, schedule) * found[-1]))
    return np.array(ratios)


def derived(name: int) -> np.ndarray:
    return np.array([row[name] for row in DERIVED.values()])


def slopes_product(wrong: bool = False) -> np.ndarray:
    """I(T) as the product of regression slopes of x_{t-1} on x_t; wrong: those of the forward step."""
    values = []
    for T in CHAINS:
        spread, product = DATA[1], 1.0
        for beta in shortcut.released_schedule(T).beta:
            following = (1 - beta) * spread + beta
            product *= math.sqrt(1 - beta) * (1.0 if wrong else spread / following)
            spread = following
        values.append(product)
    return np.array(values)


def bound_figure(context: Context) -> tuple[Figure, ...]:
    lengths = [int(n) for n in np.unique(np.geomspace(10, 1000, 21).round())]
    x = tuple(float(n) for n in lengths)
    names = {"optimal": "exact noise", "beta": "noise β", "posterior": "posterior noise"}
    curves = [Series(names[n], x, tuple(float(distances(T, n)[0]) / start_term(T) for T in lengths)) for n in NOISES]
    return (
        Figure(
            name="wasserstein-bound",
            title="Distance to the data over the bound without its first term",
            caption="$W_2(p_0, q_0) / I(T) W_2(p_T, q_T)$ for data $N(1/2, .09)$, exact means, the released schedule at each $T$. With the exact noise it stays "
            "below one; with $\\beta_t$, or the posterior's $\\tilde\\beta_t$, it passes one on the right, where the start no longer matters and the noise does.",
            alt="Three curves against the number of steps: one stays below one, two rise above it beyond about 500 steps.",
            x_label="steps $T$",
            y_label="$W_2(p_0, q_0)$ / bound",
            x_scale="log",
            y_scale="log",
            series=(*curves, Series("bound", x, (1.0,) * len(x), style="dashed")),
        ),
    )  # fmt: skip


W2_GAUSSIAN = Claim(
    id="sft-pg.w2-gaussian",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, (9), made explicit for Gaussian data",
    title="The Wasserstein bound holds with a closed form for I(T), but its first term cannot be dropped",
    statement=r"$W_2(p_0, q_0) \le O(\sqrt J) + I(T) W_2(p_T, q_T)$. For data $N(m, v)$ on the line and exact reverse kernels the second term alone suffices, $I(T) = \sqrt{\bar\alpha_T}\, v/(\bar\alpha_T v + 1 - \bar\alpha_T)$. "
    r"With exact means but noise $\beta_t$ or $\tilde\beta_t$ it does not; the missing term is the noise's, $\sum_t (\prod_{s<t} \kappa_s)^2 d_t^2$ under the root, $d_t$ the error of the standard deviation and $\kappa_s$ the steps' slopes.",
    printed="holds",
    why="Coupling the chains with one noise contracts their distance by each step's slope, and the slopes telescope to I(T). At T = 1000, v = .09, the usual noises leave .00067 and .00125 where the start term is .00030: the floor of J counts.",
    derivation="sft.md#the-wasserstein-bound",
    checks=(
        at_least(
            "exact kernels",
            "Is I(T) W₂(p_T, q_T) at least W₂(p_0, q_0)?",
            tuple(f"T = {T}" for T in CHAINS),
            subject=lambda: start_alone("optimal"),
            controls={"noise β": lambda: start_alone("beta"), "noise β̃": lambda: start_alone("posterior")},
        ),
        at_least(
            "usual noises",
            "With the noise's own term, does the bound hold for β and β̃?",
            tuple(f"{noise}, T = {T}" for noise in ("β", "β̃") for T in CHAINS),
            subject=with_noise_term,
            controls={"a tenth of the noise's term": lambda: with_noise_term(0.1)},
        ),
        equals(
            "numbers",
            "Are I(T), W₂(p_0, q_0) and I(T) W₂(p_T, q_T) those of an independent derivation?",
            tuple(f"{what}, T = {T}" for what in ("I(T)", "W₂(p_0, q_0)", "start term") for T in CHAINS),
            subject=lambda: np.concatenate([[shortcut.contraction(DATA[1], shortcut.released_schedule(T)) for T in CHAINS], start_alone("optimal")[1], start_alone("optimal")[0]]),
            reference=lambda: np.concatenate([derived(0), derived(1), derived(2)]),
            controls={"I(T) without v": lambda: np.concatenate([np.array([shortcut.contraction(1.0, shortcut.released_schedule(T)) for T in CHAINS]), derived(1), derived(2)]), "noise β": lambda: np.concatenate([derived(0), start_alone("beta")[1], derived(2)])},
            tolerance=1e-10,
            margin_from="1e-10: the reference is given to ten decimals",
        ),
        equals(
            "sharp for v = 1",
            "For data N(1/2, 1), is W₂(p_0, q_0) equal to the start term?",
            tuple(f"T = {T}" for T in CHAINS),
            subject=lambda: sharpness(1.0),
            reference=lambda: np.ones(len(CHAINS)),
            controls={"v = .09": lambda: sharpness(DATA[1])},
        ),
        equals(
            "the product",
            "Is I(T) the product of the slopes of x_{t-1} on x_t, by conditioning?",
            tuple(f"T = {T}" for T in CHAINS),
            subject=slopes_product,
            reference=lambda: np.array([shortcut.contraction(DATA[1], shortcut.released_schedule(T)) for T in CHAINS]),
            controls={"slopes of the forward steps": lambda: slopes_product(True)},
        ),
    ),
    figures=bound_figure,
)  # fmt: skip

# --- the optimal reverse variance ---------------------------------------------------------------------------------

PLANE = (0.09, 4.0)  # variances of two eigenvectors


def rough() -> NoiseSchedule:
    return NoiseSchedule([0.1, 0.3, 0.05, 0.6])


def conditional_variances() -> np.ndarray:
    """Var(x_{t-1} | x_t), (T, 2), by conditioning joint Gaussians."""
    columns = []
    for v in PLANE:
        law, column = Gaussian.scalar(0.0, v), []
        for beta in rough().beta:
            pair = affine(law, [[1.0], [math.sqrt(1 - beta)]], [0.0, 0.0], np.diag([0.0, beta]))
            column.append(float(condition(pair, [1], [0.0]).cov[0, 0]))
            law = Gaussian(pair.mean[1:], pair.cov[1:, 1:])
        columns.append(column)
    return np.array(columns).T


def step_costs(chosen: np.ndarray) -> np.ndarray:
    """E KL of the exact reverse steps t >= 2 (beta-tilde_1 = 0) to steps of the same mean and the chosen variance."""
    ratio = conditional_variances()[1:] / chosen[1:, None]
    return 0.5 * np.sum(ratio - 1 - np.log(ratio), axis=1)


def cheapest(chosen: Callable[[], np.ndarray]) -> Pair:
    """KL of each step t >= 2 with beta, beta-tilde and variances 5 % off, against that with `chosen`."""
    best = chosen()
    rivals = [rough().beta, rough().posterior_variance, 0.95 * best, 1.05 * best]
    larger = np.concatenate([step_costs(r) for r in rivals])
    return larger, np.tile(step_costs(best), len(rivals))


def analytic() -> np.ndarray:
    return shortcut.analytic_variance(PLANE, rough())


SAMPLERS = ("T = 10", "T = 100", "T = 1000 sub-sampled to 10", "T = 1000 sub-sampled to 100")


@cache
def sampler_errors() -> np.ndarray:
    """W2(output, N(1/2, .09)), (4 samplers, noise beta, beta-tilde, optimal)."""
    full = shortcut.released_schedule(1000)
    schedules = [shortcut.released_schedule(10), shortcut.released_schedule(100)]
    schedules += [NoiseSchedule.from_alpha_bar(full.alpha_bar[ddim_grid(1000, steps)]) for steps in (10, 100)]
    return np.array([list(shortcut.sampler_w2(Gaussian.scalar(*DATA), s).values()) for s in schedules])


def pushed(noise: ddpm.Variance) -> np.ndarray:
    """The same for the first two samplers, by pushing the law N(0, 1) through the steps."""
    values = []
    for T in (10, 100):
        schedule = shortcut.released_schedule(T)
        slopes, variance = (row[:, 0] for row in ddpm.ancestral_steps([DATA[1]], schedule, noise))
        levels = np.sqrt(np.concatenate([[1.0], schedule.alpha_bar])) * DATA[0]
        law = Gaussian.scalar(0.0, 1.0)
        for t in reversed(range(T)):
            law = affine(law, [[slopes[t]]], [levels[t] - slopes[t] * levels[t + 1]], [[variance[t]]])
        values.append(math.sqrt(w2_squared(law, Gaussian.scalar(*DATA))))
    return np.array(values)


def variance_table(context: Context) -> tuple[Table, ...]:
    rows = []
    for name, errors in zip(SAMPLERS, sampler_errors(), strict=True):
        rows.append(
            (name, *(f"{e:.6f}" for e in errors), ("$\\beta$", "$\\tilde\\beta$", "optimal")[int(np.argmin(errors))])
        )
    return (
        Table(
            name="reverse-variance",
            title="$W_2$ to the data by reverse variance, exact means",
            caption="Data $N(1/2, .09)$, released schedule. The KL-optimal variance makes sub-sampling free, but on a chain that starts too far from $q_T$ it is not the best of the three.",
            columns=(Column("sampler", "left"), Column("$\\beta$"), Column("$\\tilde\\beta$"), Column("optimal"), Column("least", "left")),
            rows=tuple(rows),
        ),
    )  # fmt: skip


REVERSE_VARIANCE = Claim(
    id="sft-pg.reverse-variance",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/sft.md; Analytic-DPM (Bao et al. 2022), Theorem 1",
    title="The KL-optimal reverse variance is neither usual one; for Gaussian data it frees sub-sampling but does not mend a short schedule",
    statement=r"For Gaussian data with eigenvalues $v_i$ the isotropic reverse variance of least KL is $\beta_t\, \frac1d \sum_i D_{t-1}(v_i)/D_t(v_i)$, $D_t(v) = \bar\alpha_t v + 1 - \bar\alpha_t$: the formula of Analytic-DPM. On $N(1/2, .09)$ it makes sub-sampling 1000 steps to 10 cost nothing. "
    r"With the released schedule at $T = 10$ or 100, where $p_T \ne q_T$, $\tilde\beta_t$ gives the smaller $W_2$.",
    printed="holds",
    why="The optimum is the mean conditional variance of the step, exact on the line at every stride. The path KL starts from the right law; a sampler that starts too wide gains from a little less noise.",
    derivation="sft.md#the-optimal-reverse-variance",
    checks=(
        equals(
            "the formula",
            "Is Analytic-DPM's formula the mean of the conditional variances, eigenvalues .09 and 4?",
            tuple(f"t = {t}" for t in range(1, 5)),
            subject=analytic,
            reference=lambda: conditional_variances().mean(axis=1),
            controls={"β": lambda: rough().beta, "β̃": lambda: rough().posterior_variance, "harmonic mean": lambda: 1 / np.mean(1 / conditional_variances(), axis=1)},
        ),
        at_least(
            "least KL",
            "Does each step cost at least as much with β, β̃, or a variance 5 % off?",
            tuple(f"{rival}, t = {t}" for rival in ("β", "β̃", "5 % less", "5 % more") for t in (2, 3, 4)),
            subject=lambda: cheapest(analytic),
            controls={"the harmonic mean": lambda: cheapest(lambda: 1 / np.mean(1 / conditional_variances(), axis=1)), "β": lambda: cheapest(lambda: rough().beta)},
        ),
        at_least(
            "sub-sampling",
            "Sub-sampled to 10 and 100 steps, is W₂ with β and β̃ at least 20 times that with the optimal variance?",
            ("β, 10", "β̃, 10", "β, 100", "β̃, 100"),
            subject=lambda: (sampler_errors()[2:, :2].ravel(), 20 * np.repeat(sampler_errors()[2:, 2], 2)),
            controls={"short schedules": lambda: (sampler_errors()[:2, :2].ravel(), 20 * np.repeat(sampler_errors()[:2, 2], 2))},
        ),
        equals(
            "nothing is lost",
            "With the optimal variance, is W₂ after sub-sampling that of all 1000 steps?",
            ("10 steps", "100 steps"),
            subject=lambda: sampler_errors()[2:, 2],
            reference=lambda: np.full(2, distances(1000)[0]),
            controls={"β̃": lambda: sampler_errors()[2:, 1]},
            tolerance=1e-10,
        ),
        at_least(
            "short schedules",
            "With the released schedule at T = 10 and 100, is W₂ with the optimal variance above that with β̃, and with β above both?",
            ("optimal above β̃, T = 10", "optimal above β̃, T = 100", "β above optimal, T = 10", "β above optimal, T = 100"),
            subject=lambda: (np.concatenate([pushed("optimal"), pushed("beta")]), np.concatenate([pushed("posterior"), pushed("optimal")])),
            controls={"sub-sampled chains": lambda: (np.concatenate([sampler_errors()[2:, 2], sampler_errors()[2:, 0]]), np.concatenate([sampler_errors()[2:, 1], sampler_errors()[2:, 2]]))},
            tolerance=0.0,
        ),
        equals(
            "two routes",
            "Are the distances on the short schedules those of a law pushed through the steps?",
            tuple(f"{noise}, T = {T}" for noise in ("β", "β̃", "optimal") for T in (10, 100)),
            subject=lambda: sampler_errors()[:2].T.ravel(),
            reference=lambda: np.concatenate([pushed("beta"), pushed("posterior"), pushed("optimal")]),
            controls={"β and β̃ exchanged": lambda: sampler_errors()[:2, [1, 0, 2]].T.ravel()},
        ),
    ),
    tables=variance_table,
)  # fmt: skip

# --- Table 1 ------------------------------------------------------------------------------------------------------

POINTS = 10_000
PRINTED = 0.0064  # Table 1, "T = 10, SFT-PG (B)"


def projected_squares(what: str = "W2", size: int = 256) -> Sampler:
    """Squared W2, in units of 10^-4, of two fresh clouds of the swiss roll on one random direction each time."""

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            source = stream.child("block", index).generator()
            values = np.empty((size, 1))
            for i in range(size):
                # The points of toy.few_step.swiss_roll in one direction: arm r (cos r, sin r), round noise, scale 1/20.
                r = 1.5 * math.pi * (1 + 2 * source.random(2 * POINTS, dtype=np.float32))
                arm = r * np.cos(r - np.float32(math.pi * source.random()))
                x = (arm + 0.05 * source.standard_normal(2 * POINTS, dtype=np.float32)) / 20
                first, second = x[:POINTS], x[POINTS:]
                if what == "location":
                    values[i] = float(first.mean() - second.mean()) ** 2
                else:
                    values[i] = np.mean((np.sort(first) - np.sort(second)) ** 2)
            return 1e4 * (values / 4 if what == "half" else values)

        return block

    return sampler


def sliced_below(factor: float = math.sqrt(2)) -> Pair:
    """W2 of three pairs of clouds of 300 points, and `factor` times their root mean square over 32 even directions."""
    larger, smaller = [], []
    angles = np.pi * np.arange(32) / 32
    directions = np.stack([np.cos(angles), np.sin(angles)])  # mean of u u' is exactly I/2
    for number in range(3):
        source = Stream(1).child("pair", number).generator()
        x, y = swiss_roll(300, source), swiss_roll(300, source) * np.array([1.0, 1.0 + 0.1 * number])
        gaps = np.sort(x @ directions, axis=0) - np.sort(y @ directions, axis=0)
        larger.append(wasserstein2(x, y))
        smaller.append(factor * math.sqrt(float(np.mean(gaps**2))))
    return np.array(larger), np.array(smaller)


TABLE_1 = Claim(
    id="sft-pg.table-1",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="on SFT-PG, Table 1; derived here",
    title="No sampler can average the .0064 of Table 1 in exact Wasserstein-2: it is below the sampling floor",
    statement=r"Let $\hat q$, $\hat q'$ be independent clouds of $n$ points of $q$ in the plane. For every law $p$ and every cloud $\hat p$ of $n$ points of it, independent of $\hat q$, $E\,W_2^2(\hat p, \hat q) \ge E\,SW_2^2(\hat q, \hat q')$, $SW_2$ the sliced distance. "
    r"For 10 000 points of the swiss roll, scaled as in the released script, the right side exceeds $.0064^2$, the square of the best value of Table 1.",
    printed="holds",
    why="A projection shortens squared distances to one half on average. On the line the cost is a sum over order statistics, of the variances of both clouds and a squared difference of means: dropping all but the variances of the data's cloud leaves half of the floor. "
    "A single evaluation may lie lower, and the released script evaluates the sliced distance, whose floor this is.",
    derivation="sft.md#the-sampling-floor-of-table-1",
    checks=(
        exceeds(
            "floor",
            "Does the mean squared projected distance of two fresh clouds of 10 000 points of the data exceed .0064²?",
            ("mean square, in units of 10⁻⁴",),
            subject=lazily(projected_squares),
            bound=lambda: np.array([1e4 * PRINTED**2]),
            # Nearly a quadratic form of a Gaussian process (a Brownian bridge): at most 16.8 in the limit. Declared: twice that.
            kurtosis=34,
            controls={"data at half the scale": lazily(lambda: projected_squares("half")), "the difference of the means alone": lazily(lambda: projected_squares("location"))},
        ),
        at_least(
            "projections",
            "For three pairs of small clouds, is W₂ at least √2 times the sliced distance?",
            ("equal laws", "one axis stretched by .1", "by .2"),
            subject=sliced_below,
            controls={"five times": lambda: sliced_below(5.0)},
        ),
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (OPTIMAL_BASELINE, REGULARISER, W2_GAUSSIAN, REVERSE_VARIANCE, TABLE_1)
