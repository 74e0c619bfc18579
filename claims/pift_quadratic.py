"""Chapter *PI-FT*, continued: what linear scores and quadratic rewards decide exactly.

Algorithm 1 in closed form, what its rate depends on, damping, divergences of paths, the exponential tilt, and the
trade-off along the strength. LQ is the small problem of claims/pift_problems.py; PLANE is its like in the plane.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from algorithms.chain import Condition
from algorithms.policy_iteration import Grid, PolicyIteration
from claims.claim import Claim
from claims.judges import at_least, equals
from claims.pift import SAMPLED_PATHS
from claims.pift_problems import CHAPTER, PAPER, POINTS, START, linear_quadratic
from claims.records import Column, Figure, Panel, Series, Table
from theory.control import ControlSchedule
from theory.control_linear_quadratic import (
    DivergenceWarning,
    LinearQuadratic,
    Solution,
    contraction,
    curvature,
    evaluate,
    marginals,
    optimum,
    path_law,
    policy_iteration,
    reward_tilted_law,
    state_law,
    tilt_gap,
    tilt_gap_leading,
    tilted_path_law,
    value_of,
)
from theory.gaussian import Gaussian, kl, tilt
from toy.control import AffineScore, ControlledChain

EXACT = "1e-13: rounding of float64, relative to the largest entry"

# --- the problems -------------------------------------------------------------------------------------------------

PLANE_STRENGTHS = (0.9, 0.6, 0.5)
PLANE_START = Gaussian([0.3, -0.2], [[1.1, 0.3], [0.3, 0.8]])


@cache
def plane(strength: float | tuple[float, ...] = PLANE_STRENGTHS, definite: bool = False) -> LinearQuadratic:
    """PLANE: T = 3, correlated data, sigma^2 other than 1 - alpha; the reward is a saddle, or concave if definite."""
    schedule = ControlSchedule([0.6, 0.75, 0.9], [0.55, 0.4, 0.3], strength)
    Q = [[1.0, 0.4], [0.4, 0.5 if definite else -0.5]]
    return LinearQuadratic.of_gaussian(schedule, [0.4, -0.6], [[0.5, 0.2], [0.2, 0.3]], Q, [0.3, 0.7])


def at_strength(problem: LinearQuadratic, strength: float | np.ndarray) -> LinearQuadratic:
    return LinearQuadratic(problem.schedule.with_strength(strength), problem.F, problem.f, problem.Q, problem.q)


def one_step(strength: float) -> LinearQuadratic:
    """alpha = 0.8, sigma^2 = 0.2, a score of zero, reward (y - y^2) / 2: the curvature is 0.2 / strength."""
    return LinearQuadratic(ControlSchedule.ddpm([0.8], strength), [[[0.0]]], [[0.0]], [[1.0]], [0.5])


def unwarned(problem: LinearQuadratic, iterations: int | Sequence[int], damping: float | np.ndarray = 1.0) -> Solution:
    """Algorithm 1 where it is meant to diverge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DivergenceWarning)
        return policy_iteration(problem, iterations, damping)


def mean_maps(problem: LinearQuadratic) -> tuple[np.ndarray, np.ndarray]:
    """Phi (T, d, d) and phi (T, d): the pre-trained step has the mean Phi y + phi."""
    alpha = problem.schedule.alpha
    matrices = np.eye(problem.dim) + (1 - alpha)[:, None, None] * problem.F
    return matrices / np.sqrt(alpha)[:, None, None], ((1 - alpha) / np.sqrt(alpha))[:, None] * problem.f


# --- Algorithm 1 in closed form -----------------------------------------------------------------------------------

COUNTED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("LQ", (1, 1, 1, 1)),
    ("LQ", (2, 1, 3, 2)),
    ("PLANE", (1, 1, 1)),
    ("PLANE", (3, 0, 2)),
)


def named(name: str) -> LinearQuadratic:
    return linear_quadratic() if name == "LQ" else plane()


def coefficients(solution: Solution) -> np.ndarray:
    """K, k, P, p, c at t = 0."""
    return np.concatenate([np.ravel(part[0]) for part in (solution.K, solution.k, solution.P, solution.p, solution.c)])


def literal(less: int = 0) -> np.ndarray:
    """Algorithm 1 as printed, (35) and (36) in turn."""
    runs = [policy_iteration(named(name), [max(m - less, 0) for m in counts]) for name, counts in COUNTED]
    return np.concatenate([coefficients(run) for run in runs])


def closed_form(
    problem: LinearQuadratic, counts: Sequence[int], sign: float, exponent: Callable[[int], int]
) -> np.ndarray:
    """The same coefficients from powers of N = sign * epsilon P; `exponent` of N in the values, 2m + 1 if all is right."""
    schedule, eye = problem.schedule, np.eye(problem.dim)
    Phi, phi = mean_maps(problem)
    P, p, c = problem.Q, problem.q, 0.0
    K, k = problem.F[0], problem.f[0]
    for t in reversed(range(schedule.steps)):
        epsilon, alpha = schedule.sigma[t] ** 2 / schedule.strength[t], schedule.alpha[t]
        R, N, m = np.linalg.inv(eye + epsilon * P), sign * epsilon * P, counts[t]
        power, rest = np.linalg.matrix_power(N, m), eye - np.linalg.matrix_power(N, exponent(m))
        matrix = R @ Phi[t] + power @ (Phi[t] - R @ Phi[t])
        offset = R @ (phi[t] + epsilon * p) + power @ (phi[t] - R @ (phi[t] + epsilon * p))
        K, k = (np.sqrt(alpha) * matrix - eye) / (1 - alpha), np.sqrt(alpha) * offset / (1 - alpha)
        slack = P @ phi[t] - p
        c += (
            -0.5 * schedule.sigma[t] ** 2 * np.trace(P)
            + 0.5 * epsilon * p @ R @ p
            - 0.5 * phi[t] @ P @ R @ phi[t]
            + p @ R @ phi[t]
        )
        c -= 0.5 * epsilon * slack @ R @ np.linalg.matrix_power(N, max(exponent(m) - 1, 0)) @ slack
        P, p = Phi[t].T @ P @ R @ rest @ Phi[t], -Phi[t].T @ R @ rest @ slack
    return np.concatenate([np.ravel(part) for part in (K, k, P, p, c)])


def in_powers(sign: float = -1.0, exponent: Callable[[int], int] = lambda m: 2 * m + 1) -> np.ndarray:
    return np.concatenate([closed_form(named(name), counts, sign, exponent) for name, counts in COUNTED])


def entries(name: str) -> tuple[str, ...]:
    if name == "LQ":
        return ("K", "k", "P", "p", "c")
    matrix, vector = [f"[{i}, {j}]" for i in (0, 1) for j in (0, 1)], [f"[{i}]" for i in (0, 1)]
    return (
        *(f"K{i}" for i in matrix),
        *(f"k{i}" for i in vector),
        *(f"P{i}" for i in matrix),
        *(f"p{i}" for i in vector),
        "c",
    )


@dataclass(frozen=True)
class QuadraticReward:
    """LQ's reward in torch."""

    differentiable: bool = True

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return 0.7 * x0[:, 0] - 0.6 * x0[:, 0] ** 2


def on_a_grid(counts: Sequence[int]) -> np.ndarray:
    """Value and control at t = 0 of LQ by the torch object, which knows nothing of quadratics."""
    schedule = linear_quadratic().schedule
    chain = ControlledChain.of(schedule, AffineScore.of(linear_quadratic().F, linear_quadratic().f))
    strength = schedule.strength[::-1].tolist()
    found = PolicyIteration(chain, chain.parameters(), QuadraticReward(), strength, Grid(-14.0, 14.0, 281)).solve(
        tuple(counts)[::-1]
    )
    y = torch.tensor(POINTS, dtype=torch.float64)[:, None]
    with torch.no_grad():
        value, mean = found.value(chain.steps, y), found.mean(chain.steps, y)
    return np.concatenate([value.numpy(), schedule.control(0, y.numpy(), mean.numpy())[:, 0]])


def by_coefficients(counts: Sequence[int]) -> np.ndarray:
    K, k, P, p, c = closed_form(linear_quadratic(), counts, -1.0, lambda m: 2 * m + 1)
    y = np.array(POINTS)
    return np.concatenate([-0.5 * P * y**2 + p * y + c, K * y + k])


CLOSED_FORM = Claim(
    id="pi-ft.closed-form",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Algorithm 1 and (35)-(36), as reconstructed; closed form derived in docs/pift.md",
    title="For linear scores and a quadratic reward Algorithm 1 has a closed form, in powers of one matrix",
    statement=r"Let $\epsilon = \sigma_t^2 / \beta_t$, $P$ the matrix of the value that Algorithm 1 left at $t + 1$, $N = -\epsilon P$, $R = (I + \epsilon P)^{-1}$. After $m$ iterations the control's error is $N^m$ times that of the score, "
    r"and the value has $P_t = \Phi^\top P R (I - N^{2m+1}) \Phi$; likewise $p_t$ and $c_t$.",
    printed="holds",
    why="In the means of the steps an iteration is an affine map with linear part N. The control's error enters the value squared, so values converge with twice the exponent; the sign makes concave directions alternate.",
    derivation="pift.md#algorithm-1-in-closed-form",
    checks=(
        equals(
            "against Algorithm 1",
            "Do powers of N give the control and the value at t = 0 that the iterations give, on LQ and PLANE?",
            tuple(f"{name} {counts}, {entry}" for name, counts in COUNTED for entry in entries(name)),
            subject=in_powers,
            reference=literal,
            controls={
                "N^{2m} in the values": lambda: in_powers(exponent=lambda m: 2 * m),
                "N^{m+1} in the values": lambda: in_powers(exponent=lambda m: m + 1),
                "the plus sign": lambda: in_powers(sign=1.0),
                "one iteration less": lambda: literal(less=1),
            },
            tolerance=1e-13,
            margin_from=EXACT,
        ),
        equals(
            "against the algorithm on a grid",
            "Does the torch object, kernel sums on a grid, give the value and the control of the closed form on LQ after (2, 1, 3, 2) iterations?",
            tuple(f"{what}, y = {y:g}" for what in ("value", "control") for y in POINTS),
            subject=lambda: by_coefficients((2, 1, 3, 2)),
            reference=lambda: on_a_grid((2, 1, 3, 2)),
            controls={
                "one iteration less at t = 0": lambda: by_coefficients((1, 1, 3, 2)),
                "one iteration less at t = 3": lambda: by_coefficients((2, 1, 3, 1)),
            },
            tolerance=1e-11,
            margin_from="1e-11: sums over a grid are exact for quadratics, up to rounding",
        ),
    ),
)  # fmt: skip

# --- what the rate depends on -------------------------------------------------------------------------------------

DECLARED = (0.5, 0.8)  # lambda, both admissible at both strengths
RATE_STRENGTHS = (0.8, 1.6)
CASES = tuple((b, declared, t) for b in RATE_STRENGTHS for declared in DECLARED for t in range(4))


@cache
def observed_factors(strength: float) -> tuple[float, ...]:
    """|error after two iterations| / |error after one| of LQ's control at each t, the later steps having converged."""
    problem = at_strength(linear_quadratic(), strength)
    best, factors = optimum(problem), []
    for t in range(4):
        one, two = (policy_iteration(problem, [0] * t + [m] + [60] * (3 - t)) for m in (1, 2))
        factors.append(float(abs((two.K[t] - best.K[t]) / (one.K[t] - best.K[t])).item()))
    return tuple(factors)


def predicted(by: Callable[[float, float, int], float]) -> np.ndarray:
    return np.array([by(b, declared, t) for b, declared, t in CASES])


def factor(strength: float, t: int, power: int = 2) -> float:
    """sigma^power |P_{t+1}| / strength, by the Riccati recursion."""
    problem = at_strength(linear_quadratic(), strength)
    return float(abs(optimum(problem).P[t + 1]).item() * problem.schedule.sigma[t] ** power / strength)


def bound_and_observed(inadmissible: bool = False) -> tuple[np.ndarray, np.ndarray]:
    bounds = predicted(lambda b, declared, t: 1 - (0.97 if inadmissible else declared))
    return bounds, predicted(lambda b, declared, t: observed_factors(b)[t])


def _rate_figure() -> Figure:
    lines, updates = [], tuple(float(m) for m in range(9))
    for b in (0.4, *RATE_STRENGTHS):
        problem = at_strength(linear_quadratic(), b)
        best = optimum(problem).K[3].item()
        errors = [abs(policy_iteration(problem, [0, 0, 0, m]).K[3].item() - best) for m in range(9)]
        lines.append(Series(f"strength {b:g}", updates, tuple(e / errors[0] for e in errors)))
    bounds = [
        Series(f"(1 - λ)^m, λ = {x:g}", updates, tuple((1 - x) ** m for m in range(9)), style="dashed")
        for x in DECLARED
    ]
    return Figure(
        name="rate-by-strength",
        title="Error of the control at the last step of LQ against iterations",
        caption="Relative to the start, exact. The strength sets the slope. Both values of λ are admissible at strengths 0.8 and 1.6, where each gives a valid but different bound; λ = 0.8 is not admissible at 0.4, and no bound there.",
        alt="Three straight lines on a logarithmic axis, steeper for larger strengths; two dashed lines, of which both lie above the curves of strengths 0.8 and 1.6.",
        x_label="iterations m",
        y_label="error / error of the score",
        y_scale="log",
        series=(*lines, *bounds),
        end_labels=True,
    )  # fmt: skip


FACTOR = Claim(
    id="pi-ft.contraction-factor",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, section 3.2, the text after Theorem 3.1; read as: the factor of an iteration is 1 - λ",
    title="The rate of Algorithm 1 is set by the strength; λ is a constant of the proof and only bounds it",
    statement=r"The parameter $\lambda$ of Theorem 3.1 determines the rate, an iteration multiplying the error by $1 - \lambda$; a larger $\lambda$ converges faster.",
    printed="refuted",
    corrected=r"No line of the algorithm contains $\lambda$. In the linear-quadratic case an iteration multiplies the error by $-\sigma_t^2 P_{t+1} / \beta_t$ exactly, whatever $\lambda$ one declares; "
    r"every $\lambda \le 1 - \sigma_t^2 |P_{t+1}| / \beta_t$ is admissible and gives the bound $1 - \lambda$.",
    why="The paper goes on to say that a large λ needs a large strength. That is the sound part: where the strength is raised in step with λ, the strength does the work. At a given strength a smaller λ changes nothing but the bound. "
    "Rewards here are not Lipschitz, so λ is compared with the actual curvature of the values.",
    derivation="pift.md#algorithm-1-in-closed-form",
    checks=(
        equals(
            "observed factor",
            "Which expression is the ratio of successive errors of Algorithm 1 on LQ, at two strengths and two admissible λ?",
            tuple(f"strength {b:g}, λ = {declared:g}, t = {t}" for b, declared, t in CASES),
            subject=lambda: predicted(lambda b, declared, t: factor(b, t)),
            reference=lambda: predicted(lambda b, declared, t: observed_factors(b)[t]),
            printed=lambda: predicted(lambda b, declared, t: 1 - declared),
            controls={
                "sigma for sigma^2": lambda: predicted(lambda b, declared, t: factor(b, t, power=1)),
                "the strength left out": lambda: predicted(lambda b, declared, t: b * factor(b, t)),
                "1 - factor": lambda: predicted(lambda b, declared, t: 1 - factor(b, t)),
            },
            tolerance=1e-9,
            margin_from="1e-9: errors of 1e-2 and more, known to rounding",
        ),
        at_least(
            "the bound",
            "Is 1 - λ at least the observed factor, for every admissible λ?",
            tuple(f"strength {b:g}, λ = {declared:g}, t = {t}" for b, declared, t in CASES),
            subject=bound_and_observed,
            controls={"λ = 0.97, not admissible": lambda: bound_and_observed(inadmissible=True)},
        ),
    ),
    figures=lambda context: (_rate_figure(),),
)  # fmt: skip

# --- larger strength ----------------------------------------------------------------------------------------------

# One step with sigma = 1/2 and the reward sin 2y, whose gradient is 4-Lipschitz: PI-FT's condition is strength > 1.
SINE_VARIANCE = 0.25
SINE_STATES: dict[float, tuple[float, ...]] = {  # pre-trained mean of the step: strengths
    -0.3: (1.02, 1.05, 1.2, 1.5, 2.0, 4.0),
    -0.6: (0.62, 0.65, 0.75, 0.9, 1.2, 4.0),
}
SINE_CASES = tuple((m, b) for m, strengths in SINE_STATES.items() for b in strengths)
FASTER = (
    (-0.3, 1.02, 1.2),
    (-0.3, 1.2, 1.5),
    (-0.3, 1.5, 2.0),
    (-0.6, 0.62, 0.75),
    (-0.6, 0.75, 0.9),
)  # m, weaker, stronger


def slope(z: np.ndarray | float) -> np.ndarray:
    """h(z) = E r'(z + sigma W), by the exact smoothing E cos 2(z + sigma W) = exp(-2 sigma^2) cos 2z."""
    return 2 * np.exp(-2 * SINE_VARIANCE) * np.cos(2 * np.asarray(z))


def slope_by_quadrature(z: np.ndarray | float) -> np.ndarray:
    """The same by the trapezoidal rule."""
    w = np.linspace(-9.0, 9.0, 181)
    weight = np.exp(-0.5 * w**2) / np.exp(-0.5 * w**2).sum()
    return 2 * np.cos(2 * (np.asarray(z)[..., None] + np.sqrt(SINE_VARIANCE) * w)) @ weight


def iterated_mean(m: float | np.ndarray, strength: float, updates: int = 400) -> np.ndarray:
    mean = np.asarray(m, dtype=float)
    for _ in range(updates):
        mean = m + SINE_VARIANCE / strength * slope(mean)
    return mean


def sine_rate(
    m: float | np.ndarray, strength: float, *, power: float = 1.0, smoothed: bool = True, at_limit: bool = True
) -> np.ndarray:
    """sigma^2 |h'(M*)| / strength at the limit M* of the iteration."""
    bend = 4 * (np.exp(-2 * SINE_VARIANCE) if smoothed else 1.0)
    at = iterated_mean(m, strength) if at_limit else m
    return SINE_VARIANCE**power * np.abs(bend * np.sin(2 * np.asarray(at))) / strength


def sine_rates(**planted: bool | float) -> np.ndarray:
    return np.array([float(sine_rate(m, b, **planted)) for m, b in SINE_CASES])  # type: ignore[arg-type]


def observed_sine_rates(apart: float = 1e-4) -> np.ndarray:
    """Two runs that stand `apart` on either side of the limit: their distance after one more iteration over before."""
    rates = []
    for m, b in SINE_CASES:
        limit = m + 0.0
        for _ in range(400):
            limit = m + SINE_VARIANCE / b * float(slope_by_quadrature(limit))
        after = m + SINE_VARIANCE / b * slope_by_quadrature(limit + apart * np.array([-1.0, 1.0]))
        rates.append(abs(after[1] - after[0]) / (2 * apart))
    return np.array(rates)


def sine_error(m: float, strength: float, updates: int) -> float:
    return float(abs(iterated_mean(m, strength, updates) - iterated_mean(m, strength)))


def at_the_state() -> tuple[np.ndarray, np.ndarray]:
    """As printed: the rate at the weaker strength and at the stronger one, at one state."""
    return tuple(np.array([float(sine_rate(m, case[i])) for m, *case in FASTER]) for i in (0, 1))  # type: ignore[return-value]


def over_all_states() -> tuple[np.ndarray, np.ndarray]:
    """The same, the largest over the states' pre-trained means."""
    states = np.linspace(-2.0, 2.0, 4001)
    return tuple(np.array([sine_rate(states, case[i]).max() for _, *case in FASTER]) for i in (0, 1))  # type: ignore[return-value]


def two_steps(Q: tuple[float, float], strength: float) -> LinearQuadratic:
    """T = 2, alpha = (.1, .98), data on the line through (3/5, 4/5), reward -(Q_1 y_1^2 + Q_2 y_2^2) / 2."""
    direction = np.array([0.6, 0.8])
    schedule = ControlSchedule.ddpm([0.1, 0.98], strength)
    return LinearQuadratic.of_gaussian(schedule, [0.0, 0.0], np.outer(direction, direction), np.diag(Q), [0.0, 0.0])


SADDLE = (20.0, -5.0)
SEMIDEFINITE = ((20.0, 5.0), (20.0, 0.0), (-0.4, -0.1))


def saddle_factors(strength: float) -> np.ndarray:
    """Contraction at t = 0, 1 with the values that 400 iterations leave."""
    problem = two_steps(SADDLE, strength)
    return contraction(problem, unwarned(problem, [0, 400]).P)


def saddle_by_hand(strength: float) -> tuple[float, float]:
    """The factors from the scalars of docs/pift.md: P_1 is a multiple of vv'."""
    x_1, x_2 = 0.4 / strength, 0.1 / strength
    return 0.9 * 0.98 * 50 * abs(9 / 25 * x_1 / (1 + x_1) - 16 / 25 * x_2 / (1 - x_2)), max(x_1, x_2)


def two_strengths(signs: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Factors of both steps at strength 1/2 and at strength 1, for each Q."""

    def factors(strength: float) -> np.ndarray:
        problems = [two_steps(Q, strength) for Q in signs]
        return np.concatenate([contraction(problem, optimum(problem).P) for problem in problems])

    return factors(0.5), factors(1.0)


def swapped(pair: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return pair[1], pair[0]


SHOWN_STATES = (-0.3, -0.2)


def _strength_figure() -> Figure:
    near, far = np.geomspace(1.005, 10.0, 120), np.geomspace(0.46, 10.0, 160)
    x, wide = tuple(near.tolist()), tuple(far.tolist())
    factors = np.array([contraction(two_steps(SADDLE, b), optimum(two_steps(SADDLE, b)).P) for b in wide])
    states = tuple(
        Series(f"at pre-trained mean {m:g}", x, tuple(float(sine_rate(m, b)) for b in x)) for m in SHOWN_STATES
    )
    bent = 4 * np.exp(-2 * SINE_VARIANCE)
    largest = Series("largest over states", x, tuple((SINE_VARIANCE * bent / near).tolist()))
    bound = Series("σ² L₁ / β", x, tuple((SINE_VARIANCE * 4 / near).tolist()), style="dashed")
    return Figure(
        name="rate-against-strength",
        title="Factor of one iteration against the strength",
        caption="Left: one step, reward sin 2y, at strengths that Theorem 3.1 admits. The bound and the largest factor fall; at a given state the factor may rise. "
        "Right: two linear steps with a saddle reward. Between strengths 0.68 and 2.55 the first step diverges, below and above it converges.",
        alt="Left panel: the dashed bound and the largest factor below it fall with the strength, while the factors at two states vanish at one strength, rise after it and fall slowly. Right panel: the factor of the first step drops to zero at strength one half, rises above one and falls again.",
        kind="panels",
        x_label="strength β",
        y_label="factor",
        x_scale="log",
        panels=(
            Panel("reward sin 2y, one step", (*states, largest, bound)),
            Panel(
                "saddle, two steps",
                (
                    Series("first step", wide, tuple(factors[:, 0].tolist())),
                    Series("second step", wide, tuple(factors[:, 1].tolist())),
                    Series("divergence above", (wide[0], wide[-1]), (1.0, 1.0), style="dashed"),
                ),
            ),
        ),
        panel_columns=2,
        shared_axes="none",
    )  # fmt: skip


def _strength_table() -> Table:
    def error_of(m: float, b: float, updates: int) -> str:
        error = sine_error(m, b, updates)
        return f"{error:.1e}" if error > 1e-13 else "below 1e-13"

    rows = tuple(
        (f"{m:g}", f"{b:g}", f"{float(sine_rate(m, b)):.4f}", f"{SINE_VARIANCE * 4 / b:.4f}", error_of(m, b, 5), error_of(m, b, 12))
        for m, b in SINE_CASES
    )  # fmt: skip
    return Table(
        "slower-at-larger-strength",
        "Reward sin 2y, one step with σ = 1/2",
        "The printed bound σ² L₁ / β is below 1, and Theorem 3.1 applies, for β > 1. At either state the factor and the errors first rise with the strength and then fall.",
        (
            Column("pre-trained mean"),
            Column("strength"),
            Column("factor, at the limit"),
            Column("its bound"),
            Column("after 5", group="error of the mean"),
            Column("after 12", group="error of the mean"),
        ),
        rows,
    )


LARGER = Claim(
    id="pi-ft.larger-strength",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, sections 3.2 and 5, in words",
    title="A larger strength does not always converge faster: its bound falls, the rate at a state may rise",
    statement="Increasing the coefficient of the KL term accelerates the convergence of PI-FT.",
    printed="refuted",
    corrected=r"The bound $\sigma^2 L_1 / \beta$ falls, and so does the factor $\sigma^2 \sup |\nabla h| / \beta$ over all states while the next value is held fixed, and the exact factor in the linear-quadratic case with $Q \succeq 0$ or $Q \preceq 0$. "
    r"At one state the rate is $\sigma^2 |\nabla h(M^*)| / \beta$; as $\beta$ moves $M^*$ this can rise nearly thirtyfold between two admissible strengths; over several steps with an indefinite $Q$ a larger $\beta$ can turn convergence into divergence.",
    why="The strength does two things: it divides the slope, and it moves the point where the slope is taken, or the value function whose slope it is. "
    "The example with sin 2y lies inside the hypotheses of Theorem 3.1 for a mean of -0.3, not for all strengths shown at -0.6; the linear-quadratic one lies outside.",
    derivation="pift.md#larger-strength-faster-convergence",
    checks=(
        equals(
            "the rate at a state",
            "With reward sin 2y, how much closer does one iteration bring two runs near their limit (by quadrature)?",
            tuple(f"pre-trained mean {m:g}, strength {b:g}" for m, b in SINE_CASES),
            subject=sine_rates,
            reference=observed_sine_rates,
            controls={
                "the slope at the pre-trained mean": lambda: sine_rates(at_limit=False),
                "the reward's own bend, not smoothed": lambda: sine_rates(smoothed=False),
                "sigma for sigma^2": lambda: sine_rates(power=0.5),
            },
            tolerance=1e-7,
            margin_from="1e-7: a difference quotient of step 1e-4",
        ),
        at_least(
            "over all states, and at one",
            "With reward sin 2y, is the factor at a strength at least the factor at a larger one (largest over states; as printed: at a state)?",
            tuple(f"from {weak:g} to {strong:g}, pre-trained mean {m:g}" for m, weak, strong in FASTER),
            subject=over_all_states,
            printed=at_the_state,
            controls={"the two strengths exchanged": lambda: swapped(over_all_states())},
        ),
        at_least(
            "quadratic rewards",
            "Over two linear steps, are the factors at strength 1/2 at least those at strength 1 (Q of one sign; as printed: any Q)?",
            tuple(f"Q = diag{Q}, t = {t}" for Q in SEMIDEFINITE for t in (0, 1)),
            subject=lambda: two_strengths(SEMIDEFINITE),
            printed=lambda: two_strengths((SADDLE,) * 3),
            controls={"the two strengths exchanged": lambda: swapped(two_strengths(SEMIDEFINITE))},
        ),
        equals(
            "the saddle",
            "Are the factors of the saddle, with the values that Algorithm 1 leaves, those computed by hand: (0, 0.8), (1.4, 0.4), (0.72, 0.1)?",
            tuple(f"strength {b:g}, t = {t}" for b in (0.5, 1.0, 4.0) for t in (0, 1)),
            subject=lambda: np.concatenate([saddle_by_hand(b) for b in (0.5, 1.0, 4.0)]),
            reference=lambda: np.concatenate([saddle_factors(b) for b in (0.5, 1.0, 4.0)]),
            controls={
                "the convex direction left out": lambda: np.concatenate(
                    [(0.9 * 0.98 * 50 * 0.36 * (0.4 / b) / (1 + 0.4 / b), 0.4 / b) for b in (0.5, 1.0, 4.0)]
                ),
                "a factor 1 / strength of strength 1/2": lambda: np.concatenate([np.array(saddle_by_hand(0.5)) * 0.5 / b for b in (0.5, 1.0, 4.0)]),
            },
            tolerance=1e-12,
        ),
    ),
    figures=lambda context: (_strength_figure(),),
    tables=lambda context: (_strength_table(),),
)  # fmt: skip

# --- damping ------------------------------------------------------------------------------------------------------

RHOS = (0.6, 0.9, 2.0)
UPDATES = 6


def damping_for(rho: float) -> float:
    return 2 / (2 + rho)


def errors_of_one_step(rho: float, damping: float, updates: int) -> list[float]:
    """Signed errors of the control's slope after 0, 1, ..., updates iterations, as multiples of the first."""
    problem = one_step(0.2 / rho)
    best = optimum(problem).K.item()
    found = [unwarned(problem, m, damping).K.item() - best for m in range(updates + 1)]
    return [error / found[0] for error in found]


def observed_damping(exchanged: bool = False) -> np.ndarray:
    """The ratio of two successive errors, undamped and damped."""
    rows = []
    for rho in RHOS:
        for damping in (1.0, damping_for(rho)):
            errors = errors_of_one_step(rho, 1.0 if exchanged else damping, UPDATES)
            rows.append(np.sign(errors[-1] / errors[-2]) * abs(errors[-1]) ** (1 / UPDATES))
    return np.array(rows)


STIFF = (0.3, 0.05, 0.01)  # strengths


def after_damping(strength: float, rule: Callable[[np.ndarray], np.ndarray], updates: int) -> np.ndarray:
    """P_0 and p_0 of the concave PLANE; the damping of each step by its rho, of the values that the algorithm has."""
    problem, eta = plane(strength, definite=True), np.ones(3)
    for t in (2, 1, 0):
        rho = np.abs(curvature(problem, unwarned(problem, [0] * (t + 1) + [updates] * (2 - t), eta).P)).max(axis=1)
        eta[t] = rule(rho)[t]
    found = unwarned(problem, updates, eta)
    return np.concatenate([found.K[0].ravel(), found.k[0]])


def all_stiff(rule: Callable[[np.ndarray], np.ndarray], updates: int) -> np.ndarray:
    return np.concatenate([after_damping(b, rule, updates) for b in STIFF])


def _damping_figure() -> Figure:
    updates, series = tuple(float(m) for m in range(31)), []
    for rho in RHOS:
        for name, damping in (("undamped", 1.0), ("damped", damping_for(rho))):
            errors = [abs(e) for e in errors_of_one_step(rho, damping, 30)]
            kept = [(m, e) for m, e in zip(updates, errors, strict=True) if e > 1e-15]  # below it is rounding
            series.append(
                Series(
                    f"ρ = {rho:g}, {name}",
                    tuple(m for m, _ in kept),
                    tuple(e for _, e in kept),
                    style="line" if name == "undamped" else "dashed",
                )
            )
    return Figure(
        name="damping",
        title="Error of the control against iterations, with and without damping",
        caption="One step, concave reward; relative to the start. At ρ = 2 the problem is well posed and Algorithm 1 doubles its error at every iteration; damped by 2 / (2 + ρ) = 1/2 it halves it.",
        alt="Six straight lines on a logarithmic axis: undamped the error falls for ρ = 0.6, hardly for 0.9 and grows for 2; damped it falls in all three cases.",
        x_label="iterations",
        y_label="error / first error",
        y_scale="log",
        series=tuple(series),
        end_labels=True,
    )  # fmt: skip


DAMPING = Claim(
    id="pi-ft.damping",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md",
    title="Algorithm 1 diverges on concave problems that have one solution; a damped update converges for every strength",
    statement=r"Let $\rho = \sigma_t^2 \max |\mathrm{eig}\, P_{t+1}| / \beta_t$. A concave quadratic reward has one optimal control for every $\beta > 0$, but Algorithm 1 multiplies its error by $-\rho$ and diverges for $\rho > 1$. "
    r"Keeping the part $1 - \eta$ of the control at each iteration, $\eta = 2 / (2 + \rho)$, it contracts by $\rho / (2 + \rho) < 1$ or better.",
    printed="holds",
    why="A strength above σ² L₁ answers two needs at once: that the problem be concave, which only convex directions of the value endanger, and that the fixed-point iteration contract, which steep concave directions endanger too. The second need goes away with damping.",
    derivation="pift.md#divergence-and-damping",
    checks=(
        equals(
            "factors of one step",
            "Is the error's factor -ρ without damping and -ρ / (2 + ρ) with it?",
            tuple(f"ρ = {rho:g}, {name}" for rho in RHOS for name in ("undamped", "damped")),
            subject=lambda: np.array([value for rho in RHOS for value in (-rho, -rho / (2 + rho))]),
            reference=observed_damping,
            controls={
                "concave, so it converges at ρ / (1 + ρ)": lambda: np.array([value for rho in RHOS for value in (-rho / (1 + rho), -rho / (2 + rho))]),
                "without the alternation": lambda: np.array([value for rho in RHOS for value in (rho, rho / (2 + rho))]),
                "damping without effect": lambda: observed_damping(exchanged=True),
            },
            tolerance=1e-9,
            margin_from="1e-9: errors down to 6e-5 of the first, known to rounding",
        ),
        equals(
            "stiff problems in the plane",
            "On the concave PLANE at three small strengths, do 1500 damped iterations at each step give the optimal control at t = 0?",
            tuple(f"strength {b:g}, {entry}" for b in STIFF for entry in entries("PLANE")[:6]),
            subject=lambda: all_stiff(lambda rho: 2 / (2 + rho), 1500),
            reference=lambda: np.concatenate([np.r_[optimum(plane(b, definite=True)).K[0].ravel(), optimum(plane(b, definite=True)).k[0]] for b in STIFF]),
            controls={
                "without damping, 2 iterations": lambda: all_stiff(np.ones_like, 2),
                "damped by 2 / (2 + ρ), 2 iterations": lambda: all_stiff(lambda rho: 2 / (2 + rho), 2),
            },
            tolerance=1e-9,
        ),
    ),
    figures=lambda context: (_damping_figure(),),
)  # fmt: skip

# --- divergence of paths ------------------------------------------------------------------------------------------

OTHER_START = Gaussian.scalar(0.4, 0.7)
PLANE_OTHER = Gaussian([-0.1, 0.2], [[0.9, -0.2], [-0.2, 1.3]])
PATH_CASES = (
    "LQ, optimal control",
    "LQ, one iteration",
    "PLANE, optimal control",
    "PLANE, one iteration",
    "LQ, other initial law",
    "PLANE, other initial law",
)


def path_case(case: str) -> tuple[LinearQuadratic, Solution, Gaussian, Gaussian]:
    """Problem, control, initial law of the controlled chain, initial law of the pre-trained one."""
    problem = linear_quadratic() if case.startswith("LQ") else plane()
    start, other = (START, OTHER_START) if case.startswith("LQ") else (PLANE_START, PLANE_OTHER)
    control = policy_iteration(problem, 1) if "iteration" in case else optimum(problem)
    return problem, control, start, other if "other" in case else start


def joint_kl(reverse: bool = False, last_only: bool = False) -> np.ndarray:
    """KL of the joint Gaussian laws of Y_0, ..., Y_T; planted: of Y_T alone."""
    values = []
    for case in PATH_CASES:
        problem, control, start, other = path_case(case)
        laws = path_law(problem, control.K, control.k, start), path_law(problem, problem.F, problem.f, other)
        if last_only:
            laws = state_law(laws[0], -1, problem.dim), state_law(laws[1], -1, problem.dim)
        values.append(kl(*laws[::-1]) if reverse else kl(*laws))
    return np.array(values)


def summed_kl(reverse: bool = False, initial: bool = True) -> np.ndarray:
    """The sum of the steps' KL under the controlled law, or under the pre-trained one, with the initial laws' KL."""
    values = []
    for case in PATH_CASES:
        problem, control, start, other = path_case(case)
        if reverse:
            steps, begin = evaluate(problem, control.K, control.k, other).step_kl_pretrained, kl(other, start)
        else:
            steps, begin = evaluate(problem, control.K, control.k, start).step_kl, kl(start, other)
        values.append(float(steps.sum()) + begin * initial)
    return np.array(values)


PATH_DIVERGENCE = Claim(
    id="pi-ft.path-kl",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Remark 2.4, as reconstructed",
    title="The steps' KL sum up to the KL of the paths: controlled law against pre-trained, never the reverse",
    statement=r"$\mathrm{KL}(P^U \| P^{pre}) = \sum_t E[\mathrm{KL}_t(Y_t)]$ with $Y_t$ under the *controlled* law, for equal laws of $Y_0$; different ones add their divergence. Under the pre-trained law the same sum is $\mathrm{KL}(P^{pre} \| P^U)$.",
    printed="holds",
    why="The chain rule of the divergence. Both steps have covariance σ² I, so each step's divergence is the same in both directions, and the law of the states alone decides which direction the sum is.",
    derivation="pift.md#path-divergence",
    checks=(
        equals(
            "under the controlled law",
            "Is the sum of the steps' KL, from two moments per step, that of the joint Gaussian laws of all states?",
            PATH_CASES,
            subject=summed_kl,
            reference=joint_kl,
            controls={
                "the states' law the pre-trained one": lambda: summed_kl(reverse=True),
                "KL of the last states alone": lambda: joint_kl(last_only=True),
                "different initial laws not counted": lambda: summed_kl(initial=False),
            },
            tolerance=1e-12,
        ),
        equals(
            "under the pre-trained law",
            "Is the sum under the pre-trained law the divergence in the other direction?",
            PATH_CASES,
            subject=lambda: summed_kl(reverse=True),
            reference=lambda: joint_kl(reverse=True),
            controls={"the same direction": joint_kl},
            tolerance=1e-12,
        ),
        equals(
            "two numbers of LQ",
            "Are the two directions on LQ the numbers of an independent derivation?",
            ("controlled from pre-trained", "pre-trained from controlled"),
            subject=lambda: np.array([joint_kl()[0], joint_kl(reverse=True)[0]]),
            reference=lambda: np.array([0.030623776923, 0.035412495666]),
            controls={"the directions exchanged": lambda: np.array([joint_kl(reverse=True)[0], joint_kl()[0]])},
            tolerance=2e-12,
            margin_from="2e-12: the numbers are typed with twelve digits",
        ),
        SAMPLED_PATHS,
    ),
)  # fmt: skip

# --- the optimal value --------------------------------------------------------------------------------------------

VALUE_NAMES = ("LQ, standard normal start", "LQ, N(0.4, 0.7) start", "PLANE", "PLANE, concave reward")


def value_case(name: str) -> tuple[LinearQuadratic, Gaussian]:
    if name.startswith("LQ"):
        return linear_quadratic(), START if "standard" in name else OTHER_START
    return plane(definite="concave" in name), PLANE_START


def expected_value(constant: str = "trace") -> np.ndarray:
    """E V*_0(Y_0) from the coefficients; planted: log det for the trace in c_0, or neither."""
    values = []
    for name in VALUE_NAMES:
        problem, start = value_case(name)
        best, schedule = optimum(problem), problem.schedule
        second = start.cov + np.outer(start.mean, start.mean)
        value = -0.5 * np.sum(best.P[0] * second) + best.p[0] @ start.mean + best.c[0]
        x = curvature(problem, best.P)
        trace = 0.5 * float(schedule.strength @ x.sum(axis=1))
        log_det = 0.5 * float(schedule.strength @ np.log1p(x).sum(axis=1))
        values.append(value + {"trace": 0.0, "log det": trace - log_det, "none": trace}[constant])
    return np.array(values)


def earned(policy: Callable[[LinearQuadratic], Solution] = optimum) -> np.ndarray:
    """J by moments of the forward chain."""
    values = []
    for name in VALUE_NAMES:
        problem, start = value_case(name)
        control = policy(problem)
        values.append(evaluate(problem, control.K, control.k, start).objective)
    return np.array(values)


VALUE = Claim(
    id="pi-ft.quadratic-value",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, (2)-(3), (8) and (9), as reconstructed",
    title="The Riccati recursion's value is what its control earns, to rounding",
    statement=r"$J(u^*) = E\,V^*_0(Y_0)$ with $V^*_t = -\frac12 y^\top P_t y + p_t^\top y + c_t$ and $c_t$ losing $\frac{\sigma_t^2}{2} \mathrm{tr}\, P_{t+1}$ at each step: the price of the noise, which no control of the mean avoids.",
    printed="holds",
    why="Backwards by the Bellman equation, forwards by two moments of the controlled chain: two computations of one number. With log det in the trace's place it would be the value of the exponential tilt, which no control attains.",
    derivation="pift.md#riccati-recursion",
    checks=(
        equals(
            "forwards and backwards",
            "Is the objective of the optimal control, from the chain's moments, the mean of the optimal value at the start?",
            VALUE_NAMES,
            subject=expected_value,
            reference=earned,
            controls={
                "log det in place of the trace": lambda: expected_value("log det"),
                "no price of the noise": lambda: expected_value("none"),
                "the pre-trained control's objective": lambda: earned(lambda problem: value_of(problem, problem.F, problem.f)),
            },
            tolerance=1e-12,
        ),
        equals(
            "one number of LQ",
            "Is the optimal objective of LQ that of an independent derivation?",
            ("J*",),
            subject=lambda: earned()[:1],
            reference=lambda: np.array([0.025211470907]),
            controls={"after one iteration": lambda: earned(lambda problem: policy_iteration(problem, 1))[:1]},
            tolerance=2e-12,
            margin_from="2e-12: the number is typed with twelve digits",
        ),
    ),
)  # fmt: skip

# --- the exponential tilt -----------------------------------------------------------------------------------------

TILT_STRENGTHS = (0.8, 8.0, 80.0)
TILT_NAMES = ("LQ", "PLANE")


def tilt_problem(name: str, strength: float = 0.8) -> LinearQuadratic:
    return at_strength(linear_quadratic(), strength) if name == "LQ" else plane(strength)


def tilt_points(name: str) -> list[np.ndarray]:
    return [np.array([y]) if name == "LQ" else np.array([y, 0.5 - y]) for y in POINTS]


def difference_of_values() -> np.ndarray:
    """beta log E_pre[exp(r(Y_T) / beta) | Y_0 = y] - V*_0(y), the first by the law of Y_T given Y_0 = y alone."""
    values = []
    for name in TILT_NAMES:
        problem = tilt_problem(name)
        strength, best = problem.schedule.strength[0], optimum(problem)
        for y in tilt_points(name):
            last = marginals(problem, problem.F, problem.f, Gaussian(y, np.zeros((problem.dim, problem.dim))))[-1]
            tilted = strength * tilt(last, problem.q / strength, problem.Q / strength)[1]
            values.append(tilted - float(best.value(0, y)))
    return np.array(values)


def everywhere(gap: Callable[[LinearQuadratic], float]) -> np.ndarray:
    return np.array([gap(tilt_problem(name)) for name in TILT_NAMES for _ in POINTS])


def divergence_from_tilt(name: str, strength: float, *, weighted: bool = True, reverse: bool = False) -> float:
    """beta KL(P^{u*} || P^tilt) from the two joint laws."""
    problem, start = tilt_problem(name, strength), START if name == "LQ" else PLANE_START
    best = optimum(problem)
    laws = path_law(problem, best.K, best.k, start), tilted_path_law(problem, start)
    return (strength if weighted else 1.0) * (kl(*laws[::-1]) if reverse else kl(*laws))


TILT_CASES = tuple((name, b) for name in TILT_NAMES for b in (0.8, 2.0))


def gap_over_leading(half: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """max |x| over the steps, and |gap / leading term - 1|, which is about 2x / 3 where x is small."""
    curvatures, deviations = [], []
    for name in TILT_NAMES:
        for b in TILT_STRENGTHS:
            problem = tilt_problem(name, b)
            curvatures.append(np.abs(curvature(problem, optimum(problem).P)).max())
            deviations.append(abs(tilt_gap(problem).sum() / (half * tilt_gap_leading(problem).sum()) - 1))
    return np.array(curvatures), np.array(deviations)


def _tilt_table() -> Table:
    problem = linear_quadratic()
    best = optimum(problem)
    laws = {
        "optimal control": path_law(problem, best.K, best.k, START),
        "tilted chain": tilted_path_law(problem, START),
        "pre-trained chain": path_law(problem, problem.F, problem.f, START),
    }
    ends = {name: state_law(law, -1, 1) for name, law in laws.items()}
    ends["law ∝ p e^{r/β}"] = reward_tilted_law(problem, START)
    rows = tuple((name, f"{law.mean.item():.6f}", f"{law.cov.item():.6f}") for name, law in ends.items())
    return Table(
        "ends-of-the-tilt",
        "Laws of the sample Y₄ of LQ, Y₀ standard normal",
        "The optimal control has the tilted chain's mean and a larger variance: it cannot narrow the noise of its steps. Neither ends in the pre-trained law weighted by exp(r/β), as Y₀ is not tilted.",
        (Column("chain", align="left"), Column("mean"), Column("variance")),
        rows,
    )  # fmt: skip


TILT_GAP = Claim(
    id="pi-ft.tilt-gap-quadratic",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="beside PI-FT, section 4.2; derived in docs/pift.md",
    title="In discrete time the optimal control is not the exponential tilt; the gap has a closed form and is of order σ⁴",
    statement=r"With one strength $\beta$ let $V^{tilt}_t = \beta \log E_{pre}[e^{r/\beta} \mid Y_t]$. Then $V^{tilt}_0 - V^*_0 = \sum_t \left[\frac{\sigma_t^2}{2} \mathrm{tr}\, P_{t+1} - \frac\beta2 \log\det(I + \frac{\sigma_t^2}{\beta} P_{t+1})\right] "
    r"= \beta\, \mathrm{KL}(P^{u^*} \| P^{tilt}) \ge 0$, at every state, with leading term $\sum_t \sigma_t^4\, \mathrm{tr}(P_{t+1}^2) / (4 \beta)$.",
    printed="holds",
    why="Section 4.2 says that continuous time keeps the form of the control and of the value equation, and it does. What comes only with the limit is that the equation becomes linear in exp(V/β): before it, the tilted steps have another covariance, which no control of the mean can give.",
    derivation="pift.md#the-exponential-tilt-exactly",
    checks=(
        equals(
            "difference of the values",
            "Is the difference of the two values, the tilted one from the law of the sample alone, this sum at every state?",
            tuple(f"{name}, point {i + 1}" for name in TILT_NAMES for i in range(len(POINTS))),
            subject=lambda: everywhere(lambda problem: float(tilt_gap(problem).sum())),
            reference=difference_of_values,
            controls={
                "no gap: the optimum is the tilt": lambda: everywhere(lambda problem: 0.0),
                "its leading term": lambda: everywhere(lambda problem: float(tilt_gap_leading(problem).sum())),
                "the first step's share alone": lambda: everywhere(lambda problem: float(tilt_gap(problem)[0])),
            },
            tolerance=1e-13,
            margin_from=EXACT,
        ),
        equals(
            "divergence of the paths",
            "Is the sum β times the KL of the controlled path from the tilted one?",
            tuple(f"{name}, strength {b:g}" for name, b in TILT_CASES),
            subject=lambda: np.array([tilt_gap(tilt_problem(name, b)).sum() for name, b in TILT_CASES]),
            reference=lambda: np.array([divergence_from_tilt(name, b) for name, b in TILT_CASES]),
            controls={
                "KL without the strength": lambda: np.array([divergence_from_tilt(name, b, weighted=False) for name, b in TILT_CASES]),
                "KL of the tilted path from the controlled": lambda: np.array([divergence_from_tilt(name, b, reverse=True) for name, b in TILT_CASES]),
            },
            tolerance=1e-12,
        ),
        at_least(
            "leading term",
            "Is the relative error of the leading term at most the largest curvature σ² |P| / β, at three strengths?",
            tuple(f"{name}, strength {b:g}" for name in TILT_NAMES for b in TILT_STRENGTHS),
            subject=gap_over_leading,
            controls={"1 / (2β) for 1 / (4β)": lambda: gap_over_leading(2.0)},
        ),
    ),
    tables=lambda context: (_tilt_table(),),
)  # fmt: skip

# --- reward against divergence ------------------------------------------------------------------------------------

MULTIPLES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
FAMILIES = {"LQ": 0.1, "PLANE": 0.5}  # the least strength of each family


@cache
def on_frontier(name: str, strength: float) -> tuple[float, float]:
    """E r and path KL of the optimal control."""
    problem = tilt_problem(name, strength)
    best = optimum(problem)
    found = evaluate(problem, best.K, best.k, START if name == "LQ" else PLANE_START)
    return found.reward, float(found.step_kl.sum())


def pretrained_reward(name: str) -> float:
    problem = tilt_problem(name)
    return evaluate(problem, problem.F, problem.f, START if name == "LQ" else PLANE_START).reward


def falling() -> tuple[np.ndarray, np.ndarray]:
    """Reward and KL at each strength, and at the next larger one."""
    pairs = [
        (least * a, least * b, name)
        for name, least in FAMILIES.items()
        for a, b in zip(MULTIPLES, MULTIPLES[1:], strict=False)
    ]
    now = [value for a, _, name in pairs for value in on_frontier(name, a)]
    then = [value for _, b, name in pairs for value in on_frontier(name, b)]
    return np.array(now), np.array(then)


def candidates(name: str, strength: float) -> list[tuple[float, float]]:
    """Reward and KL of other policies: optima at other strengths, Algorithm 1's, the pre-trained, perturbed ones."""
    problem, start = tilt_problem(name, strength), START if name == "LQ" else PLANE_START
    best = optimum(problem)
    policies = [(problem.F, problem.f), *((run.K, run.k) for run in (unwarned(problem, 1), unwarned(problem, 2)))]
    policies += [(best.K * (1 + step), best.k + step) for step in (-0.05, 0.02)]
    found = [evaluate(problem, K, k, start) for K, k in policies]
    return [(e.reward, float(e.step_kl.sum())) for e in found] + [
        on_frontier(name, 0.7 * strength),
        on_frontier(name, 1.4 * strength),
    ]


FRONTIER_CASES = tuple((name, least * multiple) for name, least in FAMILIES.items() for multiple in (2.0, 10.0))
CANDIDATES = (
    "pre-trained",
    "one iteration",
    "two iterations",
    "perturbed by -5 %",
    "perturbed by 2 %",
    "optimum of 0.7 β",
    "optimum of 1.4 β",
)


def supported(charged: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """R - beta D at the optimum, and at each other policy; planted: rewards alone."""
    here, there = [], []
    for name, b in FRONTIER_CASES:
        weight = b if charged else 0.0
        reward, divergence = on_frontier(name, b)
        for other_reward, other_divergence in candidates(name, b):
            here.append(reward - weight * divergence)
            there.append(other_reward - weight * other_divergence)
    return np.array(here), np.array(there)


def tangent(name: str, strength: float, spacing: float = 0.01) -> float:
    """dR / dD along the frontier, both by central differences of order four in log beta."""
    shifted = {j: np.array(on_frontier(name, strength * float(np.exp(j * spacing)))) for j in (-2, -1, 1, 2)}
    change = 8 * (shifted[1] - shifted[-1]) - (shifted[2] - shifted[-2])
    return float(change[0] / change[1])


def back_to_pretrained(share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(R(beta) - R(pre-trained)) / beta, and the KL at beta; planted: a share of the bound."""
    bounds, found = [], []
    for name, least in FAMILIES.items():
        for multiple in MULTIPLES:
            reward, divergence = on_frontier(name, least * multiple)
            bounds.append(share * (reward - pretrained_reward(name)) / (least * multiple))
            found.append(divergence)
    return np.array(bounds), np.array(found)


def shifted_score(shift: float) -> tuple[float, float]:
    """Reward and KL of the score plus a constant, on LQ."""
    problem = linear_quadratic()
    found = evaluate(problem, problem.F, problem.f + shift, START)
    return found.reward, float(found.step_kl.sum())


def _pareto_figure() -> Figure:
    points = [(pretrained_reward("LQ"), 0.0), *(on_frontier("LQ", float(b)) for b in np.geomspace(30.0, 0.05, 90))]
    shown = (0.05, 0.1, 0.2, 0.4, 0.8, 2.0)
    marked = [on_frontier("LQ", b) for b in shown]
    others = [shifted_score(float(shift)) for shift in np.linspace(0.0, 0.8, 40)]
    return Figure(
        name="reward-against-kl",
        title="Expected reward against path KL along the strength, on LQ",
        caption="Exact. Both fall as the strength grows, towards the pre-trained chain at the left end; the slope of the frontier is the strength. The score plus a constant, not optimal at any strength, stays below.",
        alt="A concave rising curve of expected reward against path KL, with strengths marked on it, the smallest furthest to the right; the dashed curve of the score plus a constant starts at the same point and lies below.",
        x_label="KL of the path from the pre-trained path, nats",
        y_label="expected reward",
        series=(
            Series("optimal controls", tuple(d for _, d in points), tuple(r for r, _ in points)),
            Series("at strengths", tuple(d for _, d in marked), tuple(r for r, _ in marked), style="points", labels=tuple(f"{b:g}" for b in shown)),
            Series("score plus a constant", tuple(d for _, d in others), tuple(r for r, _ in others), style="dashed"),
        ),
    )  # fmt: skip


PARETO = Claim(
    id="pi-ft.pareto",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="the question of PI-FT, section 5 and Figure 3; derived in docs/pift.md",
    title="A larger strength buys closeness with reward: at the optimum both the reward and the divergence fall",
    statement=r"For one strength $\beta$ at all steps the reward $R(\beta)$ and the path KL $D(\beta)$ of the optimal control are non-increasing in $\beta$; no control has more reward and less KL; the frontier's slope is $dR/dD = \beta$; "
    r"and $D(\beta) \le (R(\beta) - R_{pre}) / \beta$, so the optimal chain returns to the pre-trained one as $\beta$ grows.",
    printed="holds",
    why="Add the two inequalities that say that each optimum beats the other under its own strength. The paper's text reports both trends of its training runs, Figure 3(b, c). Where section 3.2 says that a bigger coefficient may take the optimal control far away from something "
    "(the word is lost in our text), that cannot be the pre-trained score; the unregularised optimum would fit.",
    derivation="pift.md#reward-and-divergence-along-the-strength",
    checks=(
        at_least(
            "both fall",
            "Are reward and path KL of the optimum at each strength at least those at the next larger one?",
            tuple(
                f"{name}, {what}, strength {least * a:g} to {least * b:g}"
                for name, least in FAMILIES.items()
                for a, b in zip(MULTIPLES, MULTIPLES[1:], strict=False)
                for what in ("reward", "KL")
            ),
            subject=falling,
            controls={"further from the pre-trained at larger strength": lambda: swapped(falling())},
        ),
        at_least(
            "nothing beyond the frontier",
            "Has the optimum at a strength at least the reward less strength times KL of every other control tried?",
            tuple(f"{name}, strength {b:g}: {other}" for name, b in FRONTIER_CASES for other in CANDIDATES),
            subject=supported,
            controls={"rewards alone": lambda: supported(charged=False)},
        ),
        equals(
            "slope of the frontier",
            "Is dR/dD along the frontier the strength?",
            tuple(f"{name}, strength {b:g}" for name, b in FRONTIER_CASES),
            subject=lambda: np.array([tangent(name, b) for name, b in FRONTIER_CASES]),
            reference=lambda: np.array([b for _, b in FRONTIER_CASES]),
            controls={"its reciprocal": lambda: np.array([1 / tangent(name, b) for name, b in FRONTIER_CASES])},
            tolerance=1e-6,
            margin_from="1e-6: differences of order four with step 0.01 in log β",
        ),
        at_least(
            "back to the pre-trained chain",
            "Is the path KL at most the gain in reward over the pre-trained chain, divided by the strength?",
            tuple(f"{name}, strength {least * multiple:g}" for name, least in FAMILIES.items() for multiple in MULTIPLES),
            subject=back_to_pretrained,
            controls={"a third of it": lambda: back_to_pretrained(1 / 3)},
        ),
    ),
    figures=lambda context: (_pareto_figure(),),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (
    CLOSED_FORM,
    FACTOR,
    LARGER,
    DAMPING,
    PATH_DIVERGENCE,
    VALUE,
    TILT_GAP,
    PARETO,
)
