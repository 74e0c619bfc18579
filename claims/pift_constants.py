"""Chapter *PI-FT*, continued: constants. What (14)-(17) and (38)-(46) bound, how sharply, and which strengths they ask for.

Observed constants are suprema over a window, by the quadrature of theory/control_bellman.py. EXTREMAL makes the bounds
equalities: scores y / 2 and a reward that is y^2 / 2 up to |y| = 8 and linear beyond; near the origin all is
linear-quadratic, far out the value has the largest slope there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import numpy as np
from scipy.special import erf
from scipy.stats import chi

from claims.claim import Claim
from claims.judges import at_least, equals
from claims.pift_problems import CHAPTER, PAPER, WINDOW, two_modes
from claims.pift_problems import DATA as SMALL
from claims.records import Column, Figure, Panel, Series, Table
from theory.control import ControlSchedule
from theory.control_bellman import (
    ControlProblem,
    Lookahead,
    Solution,
    contraction,
    errors,
    iterates,
    jacobian,
    lookahead,
    optimum,
)
from theory.control_constants import (
    SHARP_KAPPA,
    Regularity,
    Rule,
    SystemConstants,
    admissible_strength,
    iterate_regularity,
    optimal_regularity,
    published_kappa,
    theorem_bounds,
    universal_regularity,
)
from theory.control_rewards import Ridge
from verdicts.streams import Stream

Sides = tuple[np.ndarray, np.ndarray]

# --- problems -----------------------------------------------------------------------------------------------------

POINTS, SEEN = 801, 401  # of the quadrature's grid on [-20, 20], and of the window
BEND = 8.0  # where EXTREMAL's reward turns linear


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, its exact constants, and the lambda for which its strengths are the least admissible ones."""

    problem: ControlProblem
    system: SystemConstants
    lam: float

    @property
    def steps(self) -> int:
        return self.problem.schedule.steps


def huber(y: np.ndarray) -> np.ndarray:
    """y^2 / 2 up to BEND, linear beyond: 8-Lipschitz with a 1-Lipschitz gradient; (n, 1) to (n,)."""
    size = np.abs(y[:, 0])
    return np.where(size < BEND, 0.5 * size**2, BEND * size - 0.5 * BEND**2)


LEVELS = {
    "MIX": (0.8, 0.9),
    "GSP": (0.7, 0.8, 0.9),
    "SINE": (0.7, 0.8, 0.9),
    "EXTREMAL": (0.8, 0.9),
    "CONCAVE": (0.8,),
}
REWARDS = {"MIX": Ridge("log cosh"), "GSP": Ridge("softplus", 0.5, 2.0, 0.4), "SINE": Ridge("sin", 0.5, 1.3)}
LINEAR = {"EXTREMAL": (0.6, 0.5, 1.0), "CONCAVE": (0.5, 0.0, -1.0)}  # lambda, slope of the scores, sign of the reward
DATA = {**SMALL, "SINE": two_modes(1.5, 0.3)}


@cache
def case(name: str, rule: Rule = "optimal", times: float = 1.0) -> Case:
    """A problem at `times` the least strengths of a rule; lambda is .5 unless LINEAR says otherwise."""
    free = ControlSchedule.ddpm(LEVELS[name], 1.0)
    if name in LINEAR:
        lam, slope, sign = LINEAR[name]
        system = SystemConstants([slope] * free.steps, [0.0] * free.steps, BEND, 1.0)
        scores, kinks = [lambda y: slope * y] * free.steps, (-BEND, BEND)
        schedule = free.with_strength(times * admissible_strength(free, system, lam, rule))
        return Case(ControlProblem(schedule, scores, lambda y: sign * huber(y), kinks=kinks), system, lam)
    reward, lam = REWARDS[name], 0.5
    system = SystemConstants.of_mixture(free, DATA[name], reward.lipschitz, reward.gradient_lipschitz)
    schedule = free.with_strength(times * admissible_strength(free, system, lam, rule))
    return Case(ControlProblem.of_mixture(schedule, DATA[name], reward), system, lam)


def window(name: str) -> float:
    return 12.0 if name in LINEAR else WINDOW  # beyond where EXTREMAL's value turns linear


def largest(solution: Solution, t: int, width: float, points: int = SEEN) -> np.ndarray:
    """Largest |V'|, |V''|, |u'|, |u''| on [-width, width]."""

    def first(y: np.ndarray) -> np.ndarray:
        step = solution.at(t, y)
        return np.stack([step.gradient[:, 0], step.control_jacobian[:, 0, 0]], axis=1)

    grid = np.linspace(-width, width, points)[:, None]
    both = np.stack([first(grid), jacobian(first, grid)[:, :, 0]], axis=2)  # (points, V or u, first or second)
    return np.abs(both).max(axis=0).ravel()


@cache
def observed(name: str, times: float = 1.0) -> np.ndarray:
    """Largest |V'|, |V''|, |u'|, |u''| of the optimum on the window, (4, T)."""
    found = optimum(case(name, "optimal", times).problem, points=POINTS)
    return np.array([largest(found, t, window(name)) for t in range(case(name).steps)]).T


# --- (14) to (17), as they stand in the paper ---------------------------------------------------------------------


def value_constants(of: Case, power: float = 1.0, root: bool = True) -> np.ndarray:
    """(14) and (15), (2, T). Planted: another power of 1 / lambda in (15), or (14) without 1 / sqrt(alpha)."""
    slope, bend, found = of.system.reward_lipschitz, of.system.reward_gradient_lipschitz, []
    for t in reversed(range(of.steps)):
        a = float(of.problem.schedule.alpha[t])
        grown = 1 + (1 - a) * float(of.system.score_lipschitz[t])
        carried = grown**2 / (of.lam**power * math.sqrt(a)) * bend
        bend = ((1 - a) * float(of.system.score_gradient_lipschitz[t]) * slope + carried) / math.sqrt(a)
        slope *= grown / (math.sqrt(a) if root else 1.0)
        found.insert(0, (slope, bend))
    return np.array(found).T


def control_constants(of: Case, kappa: float = SHARP_KAPPA, divided: bool = True, by_noise: bool = True) -> np.ndarray:
    """(16) and (17), (2, T). Planted: no 1 / lambda in (16), or 1 - lambda not divided by 1 - alpha there."""
    schedule, system, q = of.problem.schedule, of.system, 1 - of.lam
    noise = 1 - schedule.alpha
    slope = (system.score_lipschitz + q / (noise if by_noise else 1.0)) / (of.lam if divided else 1.0)
    spread = q * kappa * (1 + noise * slope) ** 2 / (np.sqrt(schedule.alpha) * schedule.sigma * noise)
    return np.stack([slope, (system.score_gradient_lipschitz + spread) / of.lam])


SMOOTH = ("MIX", "GSP", "SINE")
BOUNDED = tuple((name, times) for name in (*SMOOTH, "EXTREMAL") for times in (1.0, 4.0))
Formula = Callable[[Case], np.ndarray]


def bound_and_observed(rows: slice, formula: Formula) -> Sides:
    """The formula's constants and the observed ones at once and four times the least strengths."""
    pairs = [(formula(case(name)), observed(name, times)[rows]) for name, times in BOUNDED]
    larger, smaller = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))
    return larger, smaller


def share_attained(rows: slice, formula: Formula) -> np.ndarray:
    """Observed constants of EXTREMAL over the formula's."""
    return (observed("EXTREMAL")[rows] / formula(case("EXTREMAL"))).ravel()


def places(what: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        f"{name}, {times:g} times the least strengths, {q}, t = {t}"
        for name, times in BOUNDED
        for q in what
        for t in range(len(LEVELS[name]))
    )


OF_VALUES, OF_CONTROLS = slice(0, 2), slice(2, 4)
ROUNDING = 1e-8  # of second derivatives by differences
ATTAINED = "0.1 %, declared beforehand: a supremum observed on a finite window"
# SINE, lambda = 1/2, rows (14) and (15), (16) and (17): from an independent derivation.
VALUES_OF_SINE = (5.664576786, 3.238271871, 1.513458234, 712.4551035, 115.7671225, 12.16278514)
CONTROLS_OF_SINE = (6.423568191, 14.13761707, 34.17823229, 56.58331431, 172.1276716, 606.6685757)
FINE = "1e-9: the typed numbers have ten digits"

VALUE_PLANTS: dict[str, Formula] = {
    "(15) without 1 / lambda": lambda of: value_constants(of, power=0.0),
    "(15) with lambda^(1/2)": lambda of: value_constants(of, power=0.5),
    "(14) without 1 / sqrt(alpha)": lambda of: value_constants(of, root=False),
}

VALUES = Claim(
    id="pi-ft.value-constants",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Theorem 2.8 (i) and (14)-(15), as reconstructed",
    title="The Lipschitz constants of the optimal value and of its gradient are right, and some system attains them",
    statement=r"With $L_{0,T} = L_0^r$, $L_{1,T} = L_1^r$ and strengths $\beta_t \ge \sigma_t^2 L_{1,t+1} / (1 - \lambda_t)$, the value $V_t^*$ and its gradient have the Lipschitz constants "
    r"$L_{0,t} = \frac{1}{\sqrt{\alpha_t}} (1 + (1 - \alpha_t) L_0^s) L_{0,t+1}$ and $L_{1,t} = \frac{1}{\sqrt{\alpha_t}} \big[(1 - \alpha_t) L_1^s L_{0,t+1} + \frac{(1 + (1 - \alpha_t) L_0^s)^2}{\lambda_t \sqrt{\alpha_t}} L_{1,t+1}\big]$, whatever the strengths are.",
    printed="holds",
    why="One step of the Bellman equation stretches space by at most (1 + (1 - alpha) L) / sqrt(alpha), and the feedback of the optimal control by at most 1 / lambda more. With the score y / 2 and a reward that bends up at most "
    "everywhere near the origin both happen at once, so neither constant can be lowered for all systems (the term with the score's bend is 0 there).",
    derivation="pift.md#regularity-of-the-optimum",
    checks=(
        at_least(
            "never exceeded",
            "With the scores and rewards of MIX, GSP, SINE and EXTREMAL, are (14) and (15) at least the largest |V'| and |V''| on the window, at the least strengths and at four times these?",
            places(("(14)", "(15)")),
            subject=lambda: bound_and_observed(OF_VALUES, value_constants),
            controls={name: lambda plant=plant: bound_and_observed(OF_VALUES, plant) for name, plant in VALUE_PLANTS.items()},
            tolerance=ROUNDING,
        ),
        equals(
            "attained",
            "On EXTREMAL (score y/2, reward y^2/2 up to |y| = 8, linear beyond), are the largest |V'| and |V''| equal to (14) and (15)?",
            tuple(f"{q}, t = {t}" for q in ("(14)", "(15)") for t in (0, 1)),
            subject=lambda: share_attained(OF_VALUES, value_constants),
            reference=lambda: np.ones(4),
            controls={name: lambda plant=plant: share_attained(OF_VALUES, plant) for name, plant in VALUE_PLANTS.items()},
            tolerance=1e-3,
            margin_from=ATTAINED,
        ),
        equals(
            "derived twice",
            "Are the formulas, and the function of the exact computations that applies them, those of an independent derivation, on SINE?",
            tuple(f"{by}, {q}, t = {t}" for by in ("formulas", "function") for q in ("(14)", "(15)") for t in range(3)),
            subject=lambda: both_routes(value_constants, lambda r: (r.value_lipschitz[:-1], r.value_gradient_lipschitz[:-1]), VALUES_OF_SINE),
            reference=lambda: np.ones(12),
            controls={
                name: lambda plant=plant: both_routes(plant, lambda r: (r.value_lipschitz[:-1], r.value_gradient_lipschitz[:-1]), VALUES_OF_SINE)
                for name, plant in VALUE_PLANTS.items()
            },
            margin_from=FINE,
        ),
    ),
)  # fmt: skip


def both_routes(formula: Formula, rows: Callable[[Regularity], Any], typed: tuple[float, ...]) -> np.ndarray:
    """The formula's constants of SINE, and those of theory/control_constants.py, over the typed ones."""
    of = case("SINE")
    applied = optimal_regularity(of.problem.schedule, of.system.published(), of.lam)
    return np.concatenate([formula(of).ravel(), np.concatenate(rows(applied))]) / np.array(typed * 2)


# --- (16), (17) ---------------------------------------------------------------------------------------------------

CONTROL_PLANTS: dict[str, Formula] = {
    "(16) without 1 / lambda": lambda of: control_constants(of, divided=False),
    "1 - lambda not divided by 1 - alpha": lambda of: control_constants(of, by_noise=False),
}
KINKED_LAMBDAS = (0.5, 0.8, 0.95, 0.99, 0.999)


def kinked(lam: float) -> Case:
    """One step, score y / 2, reward y |y| / 2: grad h jumps as fast as a 1-Lipschitz gradient lets it."""
    schedule = ControlSchedule.ddpm([0.8], 0.2 / (1 - lam))
    problem = ControlProblem(schedule, [lambda y: 0.5 * y], lambda y: 0.5 * y[:, 0] * np.abs(y[:, 0]), kinks=[0.0])
    return Case(problem, SystemConstants([0.5], [0.0], math.inf, 1.0), lam)


@cache
def kinked_bend(lam: float) -> float:
    """The largest |u''| of that system on [-3, 3], by quadrature."""
    return float(largest(optimum(kinked(lam).problem), 0, 3.0, 1601)[3])


def share_of_17(formula: Formula) -> np.ndarray:
    return np.array([kinked_bend(lam) / formula(kinked(lam))[1, 0] for lam in KINKED_LAMBDAS])


def share_in_closed_form() -> np.ndarray:
    """lambda^3 max_x exp(-x^2 / 2) / (1 - (1 - lambda) erf(x / sqrt 2))^3: |u''| of that system over (17)."""
    x = np.linspace(0.0, 4.0, 40001)
    return np.array([lam**3 * (np.exp(-(x**2) / 2) / (1 - (1 - lam) * erf(x / math.sqrt(2))) ** 3).max() for lam in KINKED_LAMBDAS])  # fmt: skip


SYSTEMS = 4


def random_cases() -> list[Case]:
    """Systems of three steps with constants of any size."""
    rng = Stream(5).child("pi-ft", "constants").generator()
    found = []
    for lam in rng.uniform(0.05, 0.95, SYSTEMS):
        schedule = ControlSchedule(rng.uniform(0.3, 0.99, 3), rng.uniform(0.1, 1.0, 3), 1.0)
        system = SystemConstants(rng.exponential(3.0, 3), rng.exponential(3.0, 3), 1.0, 1.0)
        problem = ControlProblem(schedule, [lambda y: 0 * y] * 3, lambda y: y[:, 0])
        found.append(Case(problem, system, float(lam)))
    return found


def growth_factor(formula: Formula) -> np.ndarray:
    """(1 + (1 - alpha) L0u) lambda / (1 + (1 - alpha) L0s) of random systems: 1."""
    ratios = []
    for of in random_cases():
        noise = 1 - of.problem.schedule.alpha
        ratios.append((1 + noise * formula(of)[0]) * of.lam / (1 + noise * of.system.score_lipschitz))
    return np.concatenate(ratios)


CONTROLS = Claim(
    id="pi-ft.control-constants",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Theorem 2.8 (iii) and (16)-(17), as reconstructed; the identity is ours",
    title="The Lipschitz constants of the optimal control are right: one is attained, the other in the limit of large lambda",
    statement=r"$u_t^*$ and its gradient have the Lipschitz constants $L_0^u = \frac{1}{\lambda} \big(L_0^s + \frac{1 - \lambda}{1 - \alpha}\big)$ and "
    r"$L_1^u = \frac{1}{\lambda} \big[L_1^s + \frac{(1 - \lambda) \kappa (1 + (1 - \alpha) L_0^u)^2}{\sqrt\alpha\, \sigma (1 - \alpha)}\big]$, free of $\beta$; and $1 + (1 - \alpha) L_0^u = (1 + (1 - \alpha) L_0^s) / \lambda$.",
    printed="holds",
    why="The control is the score plus a gain times the smoothed slope of the value; lambda is the strong concavity that is left. The gradient's constant adds the largest bend to the largest slope, which no point has both of unless lambda is near 1: "
    "its share attained is at least lambda cubed.",
    derivation="pift.md#regularity-of-the-optimum",
    checks=(
        at_least(
            "never exceeded",
            "With the scores and rewards of MIX, GSP, SINE and EXTREMAL, are (16) and (17) at least the largest |u'| and |u''| on the window, at the least strengths and at four times these?",
            places(("(16)", "(17)")),
            subject=lambda: bound_and_observed(OF_CONTROLS, control_constants),
            controls={name: lambda plant=plant: bound_and_observed(OF_CONTROLS, plant) for name, plant in CONTROL_PLANTS.items()},
            tolerance=ROUNDING,
        ),
        equals(
            "(16) is attained",
            "On EXTREMAL (score y/2, reward y^2/2 up to |y| = 8, linear beyond), is the largest |u'| equal to (16)?",
            ("t = 0", "t = 1"),
            subject=lambda: share_attained(slice(2, 3), lambda of: control_constants(of)[:1]),
            reference=lambda: np.ones(2),
            controls={name: lambda plant=plant: share_attained(slice(2, 3), lambda of: plant(of)[:1]) for name, plant in CONTROL_PLANTS.items()},
            tolerance=1e-3,
            margin_from=ATTAINED,
        ),
        equals(
            "(17) in the limit",
            "With the reward y|y|/2, is the largest |u''| over (17) the closed form that tends to 1 as lambda does?",
            tuple(f"lambda = {lam:g}" for lam in KINKED_LAMBDAS),
            subject=lambda: share_of_17(control_constants),
            reference=share_in_closed_form,
            controls={
                "(16) without 1 / lambda in it": lambda: share_of_17(CONTROL_PLANTS["(16) without 1 / lambda"]),
                "kappa of the plane": lambda: share_of_17(lambda of: control_constants(of, kappa=published_kappa(2))),
                "kappa = 1/2": lambda: share_of_17(lambda of: control_constants(of, kappa=0.5)),
            },
            tolerance=1e-4,
            margin_from="1e-4: a maximum over 1601 points",
        ),
        equals(
            "identity",
            "On random systems, is 1 + (1 - alpha) L0u equal to (1 + (1 - alpha) L0s) / lambda?",
            tuple(f"system {k}, t = {t}" for k in range(1, SYSTEMS + 1) for t in range(3)),
            subject=lambda: growth_factor(control_constants),
            reference=lambda: np.ones(3 * SYSTEMS),
            controls={name: lambda plant=plant: growth_factor(plant) for name, plant in CONTROL_PLANTS.items()},
            tolerance=1e-12,
        ),
        equals(
            "derived twice",
            "Are the formulas, and the function of the exact computations that applies them, those of an independent derivation, on SINE?",
            tuple(f"{by}, {q}, t = {t}" for by in ("formulas", "function") for q in ("(16)", "(17)") for t in range(3)),
            subject=lambda: both_routes(control_constants, lambda r: (r.control_lipschitz, r.control_gradient_lipschitz), CONTROLS_OF_SINE),
            reference=lambda: np.ones(12),
            controls={
                name: lambda plant=plant: both_routes(plant, lambda r: (r.control_lipschitz, r.control_gradient_lipschitz), CONTROLS_OF_SINE)
                for name, plant in CONTROL_PLANTS.items()
            },
            margin_from=FINE,
        ),
    ),
)  # fmt: skip

# --- kappa --------------------------------------------------------------------------------------------------------

POTENTIALS, RIDGES = 24, 5
DIMENSIONS = (1, 2, 64, 12288)
RATIOS = (1.0, 1.5707963268, 9.987425, 138.928614)  # of the two kappas, from an independent derivation
KAPPAS = {"kappa = 1/2": 0.5, "kappa = 1 / sqrt(pi)": 1 / math.sqrt(math.pi)}


def ridge_share(weights: np.ndarray, angles: np.ndarray) -> float:
    """Lip(grad h) sigma / L1 of V = sum_k weights_k t_k |t_k| / 2 in the plane, t_k = the coordinate along angles_k.

    The Hessian is constant on the cells between the lines t_k = 0, which gives L1; grad h has erf(t_k / (sigma sqrt 2))
    for the signs, its derivative is sought on a grid of points and directions (sigma = 1).
    """
    units = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    matrices = weights[:, None, None] * np.einsum("ki,kj->kij", units, units)
    edges = np.sort(np.concatenate([angles + math.pi / 2, angles - math.pi / 2]) % (2 * math.pi))
    inside = edges + np.diff(np.append(edges, edges[0] + 2 * math.pi)) / 2
    signs = np.sign(np.stack([np.cos(inside), np.sin(inside)], axis=1) @ units.T)
    largest = np.linalg.norm(np.einsum("ck,kij->cij", signs, matrices), ord=2, axis=(1, 2)).max()
    axis, turns = np.linspace(-2.0, 2.0, 21), np.linspace(0.0, math.pi, 61)
    points = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    slopes = SHARP_KAPPA * np.exp(-((points @ units.T) ** 2) / 2)  # of erf(t / sqrt 2)
    along = np.stack([np.cos(turns), np.sin(turns)], axis=1) @ units.T
    derivatives = np.einsum("pk,ek,kij->peij", slopes, along, matrices)
    return float(np.linalg.norm(derivatives, ord=2, axis=(2, 3)).max() / largest)


@cache
def ridge_shares() -> np.ndarray:
    """That of one ridge, which has all there is, and of random sums of ridges."""
    rng = Stream(5).child("pi-ft", "kappa").generator()
    random = [(rng.normal(size=RIDGES), rng.uniform(0.0, 2 * math.pi, RIDGES)) for _ in range(POTENTIALS)]
    return np.array([ridge_share(*pair) for pair in [(np.ones(1), np.zeros(1)), *random]])


def kappa_by_quadrature(sigma: float) -> float:
    """sigma times the slope of grad h at 0 for V = y |y| / 2: smoothed piece by piece, no closed form."""
    schedule = ControlSchedule([0.8], [sigma], 1.0)
    problem = ControlProblem(schedule, [lambda y: 0 * y], lambda y: y[:, 0])
    ahead = lookahead(problem, 0, lambda y: 0.5 * y[:, 0] * np.abs(y[:, 0]), [0.0], half_width=6.0, points=1201)
    step = 1e-3 * sigma
    below, above = ahead.hessian(np.array([[-step], [step]]))[:, 0, 0]
    return float(sigma * (above - below) / (2 * step))


WIDTHS = (0.2, 0.5, 1.0)


def _kappa_figure() -> Figure:
    grid = np.unique(np.geomspace(1, 16384, 60).round())
    x = tuple(grid.tolist())
    marked = (2, 64, 3072, 12288)
    at = tuple(published_kappa(d) / SHARP_KAPPA for d in marked)
    return Figure(
        name="pi-ft-kappa",
        title="How much larger the published smoothing constant is than the sharp one",
        caption="The ratio is 1 in one dimension and grows like $\\sqrt{\\pi d / 2}$: 10 for 64 numbers, 139 for an image of $64 \\times 64 \\times 3$. The sharp constant does not depend on the dimension.",
        alt="A rising straight line on doubly logarithmic axes from 1 at dimension 1 to about 160 at dimension 16384, its asymptote dashed beside it.",
        x_label="dimension $d$",
        y_label="published $\\kappa$ over $\\sqrt{2 / \\pi}$",
        x_scale="log",
        y_scale="log",
        series=(
            Series("published over sharp", x, tuple(published_kappa(int(d)) / SHARP_KAPPA for d in grid)),
            Series("$\\sqrt{\\pi d / 2}$", x, tuple(np.sqrt(math.pi * grid / 2).tolist()), style="dashed"),
            Series("some dimensions", tuple(map(float, marked)), at, style="points", labels=tuple(f"{r:.3g} at {d}" for r, d in zip(at, marked, strict=True))),
        ),
    )  # fmt: skip


KAPPA = Claim(
    id="pi-ft.kappa",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md; sharpens the constant below PI-FT, (17)",
    title="The smoothing constant is sqrt(2/pi) in every dimension; the published one holds and is larger by sqrt(pi d / 2)",
    statement=r"If $\nabla V$ is $L_1$-Lipschitz then $\nabla E[\nabla V(z + \sigma W)]$ is $\kappa L_1 / \sigma$-Lipschitz in the operator norm with $\kappa = \sqrt{2 / \pi}$, whatever the dimension, and no smaller $\kappa$ will do. "
    r"The published $\kappa_d = \sqrt2\, \Gamma(\frac{d+1}{2}) / \Gamma(\frac d2) = E|N(0, I_d)|$ is the same for $d = 1$ and an upper bound for $d \ge 2$.",
    printed="holds",
    why="An entry of the matrix needs one coordinate of the noise only: project first, then take the absolute value. The published proof takes the norm of the whole noise vector.",
    derivation="pift.md#the-smoothing-constant-kappa",
    checks=(
        at_least(
            "never exceeded in the plane",
            "Is sqrt(2/pi) at least the share sigma Lip(grad h) / L1 of one ridge and of random sums of ridges?",
            ("one ridge", *(f"potential {k}" for k in range(1, POTENTIALS + 1))),
            subject=lambda: (np.full(POTENTIALS + 1, SHARP_KAPPA), ridge_shares()),
            controls={name: lambda planted=planted: (np.full(POTENTIALS + 1, planted), ridge_shares()) for name, planted in KAPPAS.items()},
        ),
        equals(
            "attained",
            "For V = x1 |x1| / 2, is sigma times the slope of grad h at the origin equal to sqrt(2/pi)?",
            tuple(f"sigma = {sigma:g}" for sigma in WIDTHS),
            subject=lambda: np.array([kappa_by_quadrature(sigma) / SHARP_KAPPA for sigma in WIDTHS]),
            reference=lambda: np.ones(len(WIDTHS)),
            controls={
                name: lambda planted=planted: np.array([kappa_by_quadrature(sigma) / planted for sigma in WIDTHS])
                for name, planted in {**KAPPAS, "the published kappa of the plane": 1.2533141373155}.items()
            },
            tolerance=1e-5,
            margin_from="1e-5: the slope is a difference quotient over 0.002 sigma",
        ),
        equals(
            "the published one",
            "Is the published kappa over sqrt(2/pi) the mean norm of a Gaussian vector over that of a Gaussian number?",
            tuple(f"{route}, d = {d}" for route in ("formula", "mean of the chi law") for d in DIMENSIONS),
            subject=lambda: ratios_over_typed(published_kappa, lambda d: float(chi(d).mean())),
            reference=lambda: np.ones(2 * len(DIMENSIONS)),
            controls={
                "sqrt(d)": lambda: ratios_over_typed(math.sqrt, math.sqrt),
                "the Gammas exchanged": lambda: ratios_over_typed(lambda d: 2 / published_kappa(d), lambda d: 2 / published_kappa(d)),
            },
            tolerance=1e-7,
            margin_from="1e-7: the typed numbers have seven digits",
        ),
    ),
    figures=lambda context: (_kappa_figure(),),
)  # fmt: skip


def ratios_over_typed(*routes: Callable[[int], float]) -> np.ndarray:
    return np.array([route(d) / SHARP_KAPPA / typed for route in routes for d, typed in zip(DIMENSIONS, RATIOS, strict=True)])  # fmt: skip


# --- all iterates -------------------------------------------------------------------------------------------------

ITERATED = ("MIX", "EXTREMAL", "CONCAVE")
COUNTS = tuple(range(7))
CONSTANTS = ("V", "gradient of V", "U", "gradient of U")


@cache
def after(name: str, m: int) -> Solution:
    return iterates(case(name, "published").problem, m, points=POINTS)


@cache
def observed_after(name: str, m: int) -> np.ndarray:
    """Largest |V'|, |V''|, |U'|, |U''| after m iterations at every step, at the least strengths of Theorem 3.1, (4, T)."""
    found = after(name, m)
    return np.array([largest(found, t, window(name)) for t in range(case(name).steps)]).T


def _stacked(of: Regularity) -> np.ndarray:
    values = of.value_lipschitz[:-1], of.value_gradient_lipschitz[:-1]
    return np.stack([*values, of.control_lipschitz, of.control_gradient_lipschitz])


Bound = Callable[[Case, int], np.ndarray]


def bound_after(of: Case, m: int) -> np.ndarray:
    """(45), (46), (44) after m iterations, sharper residuals, (4, T)."""
    return _stacked(iterate_regularity(of.problem.schedule, of.system.published(), of.lam, m, sharp=True))


def bound_by_the_scores(of: Case, m: int) -> np.ndarray:
    found = bound_after(of, m)
    return np.concatenate([found[:2], [of.system.score_lipschitz, of.system.score_gradient_lipschitz]])


def bound_one_iteration_late(of: Case, m: int) -> np.ndarray:
    return np.concatenate([bound_after(of, m)[:2], bound_after(of, max(m - 1, 0))[2:]])


def bound_without_lambda(of: Case, m: int) -> np.ndarray:
    """(46) of a system whose feedback were 1, not 1 / lambda."""
    steps, ahead = (
        of.problem.schedule,
        universal_regularity(of.problem.schedule, of.system.published(), of.lam, sharp=True),
    )
    grown = of.system.published().expansions(steps)
    bend = (1 - steps.alpha) * of.system.score_gradient_lipschitz * ahead.value_lipschitz[1:] / np.sqrt(steps.alpha)
    found = bound_after(of, m)
    found[1] = bend + grown**2 / steps.alpha * ahead.value_gradient_lipschitz[1:]
    return found  # fmt: skip


def bounds_and_iterates(bound: Bound) -> Sides:
    pairs = [(bound(case(name, "published"), m), observed_after(name, m)) for name in ITERATED for m in COUNTS]
    larger, smaller = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))
    return larger, smaller


def universal(sharp: bool, at_one: bool = False) -> Sides:
    """(38), (39) and the largest (45), (46) over m <= 40, on SINE and on a system whose roughest iterate is the 7th."""
    larger, smaller = [], []
    steep = ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 1e-3, 100.0), 0.1
    of = case("SINE")
    for schedule, system, lam in ((of.problem.schedule, of.system.published(), of.lam), steep):
        each = [iterate_regularity(schedule, system, lam, m, sharp=sharp) for m in range(41)]
        limit = each[1] if at_one else universal_regularity(schedule, system, lam, sharp=sharp)
        larger += [limit.value_lipschitz[:-1], limit.value_gradient_lipschitz[:-1]]
        smaller.append(np.max([r.value_lipschitz[:-1] for r in each], axis=0))
        smaller.append(np.max([r.value_gradient_lipschitz[:-1] for r in each], axis=0))
    return np.concatenate(larger), np.concatenate(smaller)


def both_universal(at_one: bool = False) -> Sides:
    (a, b), (c, d) = universal(False, at_one), universal(True, at_one)
    return np.concatenate([a, c]), np.concatenate([b, d])


@cache
def concave_slopes() -> np.ndarray:
    """|U^(m)'| at the origin of CONCAVE, m = 0..6, by quadrature."""
    return np.array([abs(after("CONCAVE", m).at(0, [[0.0]]).control_jacobian[0, 0, 0]) for m in COUNTS])


def concave_closed_form(q: float = 0.5, start: float = 0.0) -> np.ndarray:
    """The same for a reward -y^2 / 2 everywhere: 5/3 (1 - (-q)^m), q the strength's ratio."""
    return 5 / 3 * (1 - (1 - start) * (-q) ** np.arange(len(COUNTS)))


def concave_suprema() -> np.ndarray:
    return np.array([observed_after("CONCAVE", m)[2, 0] for m in COUNTS])


def as_constants_proved(below: float = 1.0) -> Sides:
    of = case("CONCAVE", "published")
    return np.full(len(COUNTS), below * control_constants(of)[0, 0]), concave_suprema()


def as_constants_actual() -> Sides:
    actual = largest(optimum(case("CONCAVE", "published").problem), 0, 12.0)[2]
    return np.full(len(COUNTS), actual), concave_suprema()


ITERATE_PLANTS: dict[str, Bound] = {
    "controls by the scores' constants": bound_by_the_scores,
    "(44) one iteration late": bound_one_iteration_late,
    "(46) without 1 / lambda": bound_without_lambda,
}


def _iterate_table() -> Table:
    rows = []
    for name in ITERATED:
        of = case(name, "published")
        for t in range(of.steps):
            worst = [
                max(observed_after(name, m)[k, t] / max(bound_after(of, m)[k, t], 1e-9) for m in COUNTS[1:])
                for k in range(4)
            ]
            rows.append(
                (
                    name,
                    f"{t}",
                    f"{of.problem.schedule.strength[t]:.4g}",
                    *(f"{share:.3f}" if share > 5e-4 else f"{share:.0e}" for share in worst),
                )
            )
    return Table(
        name="pi-ft-iterate-constants",
        title="The largest share of its bound that an iterate attains",
        caption="Observed over (44)-(46) with the sharper residuals, the largest among $m = 1, \\dots, 6$. The bound of the control is attained at the last step of EXTREMAL and on CONCAVE, that of the value nearly; those of the gradients are wide, and widest at early steps, whose admissible strengths are far larger than needed.",
        columns=(Column("problem", "left"), Column("$t$"), Column("strength"), *(Column(what) for what in ("$V$", "$\\nabla V$", "$U$", "$\\nabla U$"))),
        rows=tuple(rows),
    )  # fmt: skip


ITERATES = Claim(
    id="pi-ft.iterate-constants",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Lemma 3.2, (44)-(46), (38)-(39) and the sentence after Lemma 3.2; the formulas are proved again, their print is not legible to us",
    title="All iterates obey bounds that do not depend on their number, but an iterate can be rougher than the optimal control",
    statement=r"The Lipschitz and gradient Lipschitz constants of $U^{(m)}$ are bounded by those of the optimal control $u^*$; see (44).",
    printed="holds-corrected",
    corrected=r"They are bounded by the a-priori constants (16), (17) *proved for* $u^*$. By its actual ones they are not: $s = 0$, $\alpha = 0.8$, $\sigma^2 = 0.2$, $\beta = 0.4$ and a Lipschitz reward that is $-y^2 / 2$ near the origin have "
    r"$\mathrm{Lip}(U^{(1)}) = 5/2$, $\mathrm{Lip}(U^{(3)}) = 15/8$, $\mathrm{Lip}(u^*) = 5/3$. For the values, (45), (46) hold for every $m$ and (38), (39) for all at once.",
    why="Where the next value is concave the iterates overshoot, alternating about the optimal control, and the overshoot is steeper than the limit. What the lemma's proof shows, and what the convergence theorem uses, is the bound by the constants.",
    derivation="pift.md#regularity-of-all-iterates",
    checks=(
        at_least(
            "dominated",
            "Are (44), (45), (46) at least the largest derivatives on the window after m = 0..6 iterations at every step?",
            tuple(f"{name}, m = {m}, {what}, t = {t}" for name in ITERATED for m in COUNTS for what in CONSTANTS for t in range(len(LEVELS[name]))),
            subject=lambda: bounds_and_iterates(bound_after),
            controls={name: lambda plant=plant: bounds_and_iterates(plant) for name, plant in ITERATE_PLANTS.items()},
            tolerance=1e-6,
        ),
        at_least(
            "for all iterates at once",
            "Are (38), (39), in the printed and in our sharper structure, at least (45), (46) for every m up to 40?",
            tuple(f"{form}, {what}" for form in ("printed structure", "sharper") for what in (*(f"SINE, {q}, t = {t}" for q in ("(38)", "(39)") for t in range(3)), "steep reward, (38)", "steep reward, (39)")),
            subject=both_universal,
            controls={"the residual at m = 1": lambda: both_universal(at_one=True)},
            tolerance=1e-9,
        ),
        equals(
            "overshoot",
            "On CONCAVE (score 0, reward -y^2/2 up to |y| = 8), are the slopes of U^(m) at the origin the closed form 0, 5/2, 5/4, 15/8, ...?",
            tuple(f"m = {m}" for m in COUNTS),
            subject=concave_slopes,
            reference=concave_closed_form,
            controls={
                "without the alternating sign": lambda: concave_closed_form(q=-0.5),
                "starting half-way to the optimum": lambda: concave_closed_form(start=0.5),
            },
            tolerance=1e-8,
            margin_from="1e-8: quadrature of second derivatives",
        ),
        at_least(
            "bounded by the constants",
            "On CONCAVE, is the constant of the optimal control at least the Lipschitz constant of U^(m)?",
            tuple(f"m = {m}" for m in COUNTS),
            subject=as_constants_proved,
            printed=as_constants_actual,
            controls={"a third of (16)": lambda: as_constants_proved(1 / 3)},
        ),
    ),
    tables=lambda context: (_iterate_table(),),
)  # fmt: skip

# --- the strengths that are asked for -----------------------------------------------------------------------------

RULES: tuple[Rule, ...] = get_args(Rule)
SHOWN = ((5, 0.5), (10, 0.5), (50, 0.5), (50, 0.8), (200, 0.8))


def diffusion(steps: int) -> ControlSchedule:
    """The variance-preserving diffusion whose rate rises from 0.1 to 10, in exact steps; noisiest first."""
    time = np.linspace(0.0, 1.0, steps + 1)
    return ControlSchedule.ddpm(np.exp(-np.diff(0.1 * time + 4.95 * time**2))[::-1], 1.0)


@cache
def needed(steps: int, lam: float, rule: Rule) -> float:
    """The largest strength that a rule asks for: Gaussian data of variance 0.25, both constants of the reward 1."""
    schedule = diffusion(steps)
    system = SystemConstants.of_gaussian(schedule, 0.25, 1.0, 1.0)
    return float(admissible_strength(schedule, system, lam, rule).max())


def needed_by_hand(steps: int, lam: float, power: float = 1.0, stretched: bool = True) -> np.ndarray:
    """log10 of the same by the five rules, straight from the recursions. Planted: lambda^power, or A = 1 in (14)-(39)."""
    schedule, q = diffusion(steps), 1 - lam
    gain = 1 / lam**power
    first = {"published": 1.0, "optimal": 1.0, "sharp": 1.0, "lipschitz": 1.0, "lipschitz-optimal": 1.0}
    second = dict(first)
    most = dict.fromkeys(RULES, 0.0)
    level = 1.0
    for a in schedule.alpha[::-1]:
        level, c = level * a, 1 - a
        sigma, slope = math.sqrt(c), 1 / (0.25 * level + 1 - level)
        for rule in RULES:
            smoothed = SHARP_KAPPA * first[rule] / sigma if rule.startswith("lipschitz") else second[rule]
            most[rule] = max(most[rule], c * smoothed / q)
            crude = rule in ("published", "optimal")
            grown = (1 + c * slope if crude else abs(1 - c * slope)) if stretched else 1.0
            low, high = first[rule], second[rule]
            first[rule], second[rule] = grown * low / math.sqrt(a), grown**2 * gain * high / a
            if rule.endswith("optimal"):
                continue
            own_bend = gain * q * SHARP_KAPPA * (grown * gain) ** 2 / (math.sqrt(a) * sigma * c)
            extra = [0.0, 0.0]
            for m in range(60) if not crude else (0,):
                met = 1.0 if crude else 1 - q**m
                if not crude and m == 0:
                    continue
                extra[0] = max(extra[0], q ** (m + 1) * met * grown * gain * low / math.sqrt(a))
                terms = met * grown**2 * gain * high / a
                terms += (1 + m * met) * SHARP_KAPPA * (grown * gain) ** 2 * low / (a * sigma)
                extra[1] = max(extra[1], q ** (m + 1) * (terms + c * own_bend * low / math.sqrt(a)))
            first[rule] += extra[0]
            second[rule] += extra[1]
    return np.log10([most[rule] for rule in RULES])


def all_by_hand(**planted: Any) -> np.ndarray:
    return np.concatenate([needed_by_hand(steps, lam, **planted) for steps, lam in SHOWN])


def growth_per_step(power: float = 1.0) -> Sides:
    """Factors of (15) and (39) per step, and lambda^-power, at T = 50."""
    schedule = diffusion(50)
    system = SystemConstants.of_gaussian(schedule, 0.25, 1.0, 1.0).published()
    factors, least = [], []
    for lam in (0.5, 0.8):
        for made in (optimal_regularity, universal_regularity):
            constants = made(schedule, system, lam).value_gradient_lipschitz
            factors.append((constants[:-1] / constants[1:]).min())
            least.append(lam**-power)
    return np.array(factors), np.array(least)


APART: dict[Rule, float] = {"published": 1e15, "optimal": 1e11}


def apart(more: float = 1.0) -> Sides:
    """What (39) and (15) ask for, and APART times (times `more`) what suffices for a well-posed problem, at T = 50."""
    pairs = [(lam, rule, times) for lam in (0.5, 0.8) for rule, times in APART.items()]
    asked = [needed(50, lam, rule) for lam, rule, _ in pairs]
    return np.array(asked), np.array([more * times * needed(50, lam, "lipschitz-optimal") for lam, _, times in pairs])


def _strength_table() -> Table:
    return Table(
        name="pi-ft-required-strength",
        title="The largest strength that each condition asks for",
        caption="Variance-preserving diffusion in $T$ steps, Gaussian data of variance 0.25, reward with both constants 1. What the theorem asks for is out of reach at 50 steps; a strength below 1 suffices for a well-posed problem.",
        columns=(
            Column("$T$, $\\lambda$", "left"),
            Column("(39), Theorem 3.1", group="iterates"),
            Column("(39) sharper", group="iterates"),
            Column("Lipschitz only", group="iterates"),
            Column("(15), Theorem 2.8", group="optimum"),
            Column("Lipschitz only", group="optimum"),
        ),
        rows=tuple(
            (f"{steps}, {lam:g}", *(f"{needed(steps, lam, rule):.3g}" for rule in ("published", "sharp", "lipschitz", "optimal", "lipschitz-optimal")))
            for steps, lam in SHOWN
        ),
    )  # fmt: skip


def _strength_figure() -> Figure:
    grid = tuple(int(t) for t in np.unique(np.geomspace(3, 200, 16).round()))
    x = tuple(map(float, grid))

    def curve(label: str, rule: Rule) -> Series:
        return Series(label, x, tuple(needed(t, 0.8, rule) for t in grid))

    through_gradients = (
        curve("Theorem 3.1, (39)", "published"),
        curve("Theorem 2.8, (15)", "optimal"),
        curve("(39) sharper", "sharp"),
    )
    scaled = Series("iterates, λ = 1 - 2/T", x, tuple(needed(t, 1 - 2 / t, "lipschitz") for t in grid), style="dashed")
    through_values = (curve("optimum", "lipschitz-optimal"), curve("iterates", "lipschitz"), scaled)
    return Figure(
        name="pi-ft-strength-against-steps",
        title="Strength asked for against the number of steps",
        caption="Gaussian data, $\\lambda = 0.8$ unless named. Left: every condition through the constant of the gradient grows exponentially in $T$. Right, other scale: through the reward's own Lipschitz constant the optimum needs less and less; "
        "the iterates need more and more at a fixed $\\lambda$ and little where $\\lambda = 1 - 2 / T$.",
        alt="Two panels on doubly logarithmic axes: on the left three curves rise to between 1e19 and 1e43 at 200 steps; on the right all stay below 50.",
        kind="panels",
        x_label="steps $T$",
        y_label="largest strength asked for",
        x_scale="log",
        y_scale="log",
        panels=(Panel("through the gradient's constant", through_gradients), Panel("Lipschitz only", through_values)),
        panel_columns=2,
        shared_axes="none",
    )  # fmt: skip


REQUIRED = Claim(
    id="pi-ft.required-strength",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="about PI-FT, Theorem 3.1 and (39), (15); the grouping of (39) is ours",
    title="The strength that the convergence theorem asks for grows exponentially with the number of steps",
    statement=r"At a constant $\lambda$, (15) and (39) grow by at least $1 / \lambda$ per step, so Theorems 2.8 and 3.1 ask for strengths of order $\lambda^{-T}$ or more. On a variance-preserving diffusion with Gaussian data, $T = 50$, $\lambda = 0.5$ or $0.8$, they ask for more than $10^{11}$ and $10^{15}$ times what suffices for a well-posed problem.",
    printed="holds",
    why="Each step passes its worst bend on to the next as if all of them happened at the same place. The paper's runs have 50 steps and a fixed coefficient: their constants are not known, but unless they are much kinder than in this example the theorem says nothing about such runs. "
    "A theory through the reward's Lipschitz constant asks for at most 10 here up to 800 steps, if lambda is 1 - 2 / T; at a constant lambda it grows too.",
    derivation="pift.md#admissible-strengths",
    checks=(
        equals(
            "by hand",
            "Are the strengths that the five conditions ask for those of a loop written separately, in decimal logarithms?",
            tuple(f"T = {steps}, lambda = {lam:g}, {rule}" for steps, lam in SHOWN for rule in RULES),
            subject=all_by_hand,
            reference=lambda: np.log10([needed(steps, lam, rule) for steps, lam in SHOWN for rule in RULES]),
            controls={
                "lambda^(1/2) for lambda": lambda: all_by_hand(power=0.5),
                "steps that do not stretch": lambda: all_by_hand(stretched=False),
            },
            tolerance=1e-10,
        ),
        at_least(
            "growth per step",
            "At T = 50, do (15) and (39) grow at every step by at least 1 / lambda?",
            tuple(f"{of}, lambda = {lam:g}" for lam in (0.5, 0.8) for of in ("(15)", "(39)")),
            subject=growth_per_step,
            controls={"at least 1 / lambda squared": lambda: growth_per_step(2.0)},
        ),
        at_least(
            "far apart",
            "At T = 50, are the strengths of Theorem 3.1 and of Theorem 2.8 at least 1e15 and 1e11 times one that suffices for a well-posed problem?",
            tuple(f"{of}, lambda = {lam:g}" for lam in (0.5, 0.8) for of in ("Theorem 3.1", "Theorem 2.8")),
            subject=apart,
            controls={"a thousand times more": lambda: apart(1e3)},
        ),
    ),
    figures=lambda context: (_strength_figure(),),
    tables=lambda context: (_strength_table(),),
)  # fmt: skip

# --- rewards that are merely Lipschitz ----------------------------------------------------------------------------

SIGMA = 0.5
CRITICAL = SHARP_KAPPA * SIGMA  # of r = |y|
FRACTIONS = (0.95, 0.8, 0.5)
MAXIMISERS = (0.2803024165, 0.6076753303, 1.2365239675)  # at these shares of it, from an independent derivation
THRESHOLDS = {"sigma L0": SIGMA, "sigma L0 / 2": SIGMA / 2}


def absolute(y: np.ndarray) -> np.ndarray:
    return np.abs(y[:, 0])


@cache
def before_absolute() -> Lookahead:
    """One step before r = |y|, sigma = 1/2, smoothed piece by piece."""
    problem = ControlProblem(ControlSchedule.ddpm([0.75], 1.0), [lambda y: 0 * y], absolute)
    return lookahead(problem, 0, absolute, [0.0], half_width=8.0, points=1601)


def stationary_points(strength: float) -> int:
    """Zeros of M - sigma^2 h(M) / strength, the pre-trained mean being 0."""
    means = np.linspace(-2.0, 2.0, 20002)[:, None]
    residual = means[:, 0] - SIGMA**2 / strength * before_absolute().gradient(means)[:, 0]
    return int(np.count_nonzero(np.diff(np.sign(residual))))


def counts_about(threshold: float) -> np.ndarray:
    return np.array([stationary_points(factor * threshold) for factor in (1.001, 0.999)], dtype=float)


def maximisers(threshold: float = CRITICAL) -> np.ndarray:
    """The positive maximiser of H(M) - strength M^2 / (2 sigma^2), on a grid and then a parabola through the best three."""
    found = []
    means = np.linspace(0.0, 2.0, 4001)
    for fraction in FRACTIONS:
        gained = before_absolute().value(means[:, None]) - fraction * threshold * means**2 / (2 * SIGMA**2)
        i = int(np.clip(gained.argmax(), 1, means.size - 2))
        below, at, above = gained[i - 1 : i + 2]
        found.append(means[i] + 0.5 * (means[1] - means[0]) * (below - above) / (below - 2 * at + above))
    return np.array(found)


LIPSCHITZ_COUNTS = (0, 1, 2, 4, 8)


@cache
def absolute_case(name: str) -> Case:
    """MIX or GSP with the reward |y|, at the least strengths of the Lipschitz-only rule for iterates, lambda = 1/2."""
    free = ControlSchedule.ddpm(LEVELS[name], 1.0)
    system = SystemConstants.of_mixture(free, DATA[name], 1.0)
    schedule = free.with_strength(admissible_strength(free, system, 0.5, "lipschitz"))
    return Case(ControlProblem.of_mixture(schedule, DATA[name], absolute, kinks=[0.0]), system, 0.5)


LIPSCHITZ_STEPS = tuple((name, t) for name in ("MIX", "GSP") for t in range(len(LEVELS[name])))


@cache
def absolute_best(name: str) -> Solution:
    return optimum(absolute_case(name).problem, points=POINTS)


@cache
def absolute_errors(name: str, m: int) -> np.ndarray:
    of = absolute_case(name)
    run = iterates(of.problem, m, points=POINTS)
    return np.array([errors(run, absolute_best(name), t, WINDOW, 321).control for t in range(of.steps)])


def lipschitz_errors(power: int = 1) -> Sides:
    larger, smaller = [], []
    for name in ("MIX", "GSP"):
        of = absolute_case(name)
        for m in LIPSCHITZ_COUNTS:
            larger.append(theorem_bounds(of.problem.schedule, of.system, of.lam, power * m, "lipschitz").control)
            smaller.append(absolute_errors(name, m))
    return np.concatenate(larger), np.concatenate(smaller)


@cache
def factors() -> np.ndarray:
    """The contraction factor seen at each step, by the values of two iterations."""
    return np.array([contraction(iterates(absolute_case(n).problem, 2), t, WINDOW, 801) for n, t in LIPSCHITZ_STEPS])


def rule_and_factor(kappa: float = SHARP_KAPPA) -> Sides:
    """kappa sigma L0 / strength, which is 1 - lambda for the sharp kappa, and the factor seen."""
    return np.full(len(LIPSCHITZ_STEPS), 0.5 * kappa / SHARP_KAPPA), factors()


LIPSCHITZ_ONLY = Claim(
    id="pi-ft.lipschitz-only",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md; removes (11) from PI-FT, Assumption 2.6",
    title="The reward's gradient need not be Lipschitz: a strength above sqrt(2/pi) sigma L0 is enough, and the threshold is exact",
    statement=r"If the reward is Lipschitz and $\beta_t > \sqrt{2/\pi}\, \sigma_t L_{0,t+1}$ with (14), the control problem is well posed. If $\beta_t \ge \sqrt{2/\pi}\, \sigma_t \bar L_{0,t+1} / (1 - \lambda)$ with the constants of all iterates, (38), "
    r"policy iteration contracts by $1 - \lambda$ and Theorem 3.1 holds. For $r = |y|$ and one step the problem has one stationary point above $\sqrt{2/\pi}\, \sigma$ and three below.",
    printed="holds",
    why="The noise of the step smooths the reward before the control sees it: by parts, the smoothed gradient of an L-Lipschitz function has slope at most sqrt(2/pi) L / sigma. Assumption (11) is not needed, and (14) knows neither the strength nor lambda, so the condition for the optimum is explicit.",
    derivation="pift.md#admissible-strengths",
    checks=(
        equals(
            "the threshold is exact",
            "With r = |y|, are there one and three stationary points 0.1 % above and below sqrt(2/pi) sigma?",
            ("0.1 % above", "0.1 % below"),
            subject=lambda: counts_about(CRITICAL),
            reference=lambda: np.array([1.0, 3.0]),
            controls={name: lambda planted=planted: counts_about(planted) for name, planted in THRESHOLDS.items()},
            margin_from="none: whole numbers",
        ),
        equals(
            "maximisers below it",
            "Are the maximisers at 95, 80 and 50 % of the threshold those of an independent derivation?",
            tuple(f"{100 * fraction:g} % of the threshold" for fraction in FRACTIONS),
            subject=maximisers,
            reference=lambda: np.array(MAXIMISERS),
            controls={name: lambda planted=planted: maximisers(planted) for name, planted in THRESHOLDS.items()},
            tolerance=1e-6,
            margin_from="1e-6: a parabola through three points 0.0005 apart",
        ),
        at_least(
            "contraction",
            "With r = |y| and the scores of MIX and GSP, is 1 - lambda = 1/2 at least the contraction factor seen at every step?",
            tuple(f"{name}, t = {t}" for name, t in LIPSCHITZ_STEPS),
            subject=rule_and_factor,
            controls={name: lambda planted=planted: rule_and_factor(planted) for name, planted in KAPPAS.items()},
            tolerance=1e-8,
        ),
        at_least(
            "Theorem 3.1 without (11)",
            "Are the control errors after m = 0, 1, 2, 4, 8 iterations below the theorem's bounds with these constants?",
            tuple(f"{name}, m = {m}, t = {t}" for name in ("MIX", "GSP") for m in LIPSCHITZ_COUNTS for t in range(len(LEVELS[name]))),
            subject=lipschitz_errors,
            controls={"bounds that fall as (1 - lambda)^(2m)": lambda: lipschitz_errors(2)},
            tolerance=1e-9,
        ),
    ),
)  # fmt: skip

# --- two requirements in one condition ----------------------------------------------------------------------------

SHARES = (0.9, 0.6, 0.3)  # strengths as shares of sigma^2 sup |h'|, the least for which the iteration surely contracts
STARTS = (0.05, 0.15, 0.4)


@cache
def before_concave(share: float) -> Lookahead:
    """One step, score 0, reward -log cosh 3y, at that share of sigma^2 sup |h'|; concave, so well posed at any."""
    reward = Ridge("log cosh", -1.0, 3.0)
    free = ControlProblem(ControlSchedule.ddpm([0.8], 1.0), [lambda y: 0 * y], reward)
    strength = -share * lookahead(free, 0, reward).curvature_on_grid[0]
    return lookahead(ControlProblem(free.schedule.with_strength(strength), free.scores, reward), 0, reward)


def limits(damping: Callable[[float], float]) -> np.ndarray:
    """Means after 400 iterations from the pre-trained ones, at STARTS."""
    y = np.array(STARTS)[:, None]
    return np.concatenate([before_concave(share).iterated_mean(y, 400, damping(1 / share))[:, 0] for share in SHARES])


def maximised() -> np.ndarray:
    """The maximiser of the same problems by comparing values on a grid, with a parabola through the best three."""
    found, means = [], np.linspace(-1.0, 1.0, 4001)
    for share in SHARES:
        ahead = before_concave(share)
        for y in STARTS:
            pretrained = ahead.pretrained_mean(np.array([[y]]))
            values = ahead.policy_value(means[:, None], pretrained)
            i = int(values.argmax())
            below, at, above = values[i - 1 : i + 2]
            found.append(means[i] + 0.5 * (means[1] - means[0]) * (below - above) / (below - 2 * at + above))
    return np.array(found)


def cautious(rho: float) -> float:
    """A damping that keeps the iteration increasing in its start: it ends at the next stationary point uphill."""
    return 1 / (1 + rho)


SIDED = ("GSP", "SINE", "EXTREMAL", "CONCAVE")
SIDES = {"GSP": (0.5, 0.0), "SINE": (0.845, 0.845), "EXTREMAL": (1.0, 0.0), "CONCAVE": (0.0, 1.0)}  # of the reward
WEAK = 0.1  # times the least strength of Theorem 2.8, on CONCAVE


def sided_case(name: str) -> Case:
    return case(name, "optimal", WEAK if name == "CONCAVE" else 1.0)


def sided_bounds(feedback: float = 1.0) -> np.ndarray:
    """l+ and l- of every step: bounds on the largest eigenvalue of the value's Hessian, and of minus it."""
    found = []
    for name in SIDED:
        of, (up, down), slope = sided_case(name), SIDES[name], sided_case(name).system.reward_lipschitz
        schedule, rows = of.problem.schedule, []
        grown = of.system.expansions(schedule)
        for t in reversed(range(of.steps)):
            a = float(schedule.alpha[t])
            inverse = feedback * float(schedule.sigma[t] ** 2 / schedule.strength[t])
            bent = (1 - a) / math.sqrt(a) * float(of.system.score_gradient_lipschitz[t]) * slope
            stretch = float(grown[t]) ** 2 / a
            up, down = bent + stretch * up / (1 - inverse * up), bent + stretch * down / (1 + inverse * down)
            slope *= float(grown[t]) / math.sqrt(a)
            rows.append((up, down))
        found.append(np.array(rows[::-1]).ravel())
    return np.concatenate(found)


@cache
def sided_observed() -> np.ndarray:
    found = []
    for name in SIDED:
        best = optimum(sided_case(name).problem, points=POINTS)
        grid = np.linspace(-window(name), window(name), SEEN)[:, None]
        for t in range(sided_case(name).steps):
            bends = best.second_derivatives(t, grid)[0]
            found += [bends.max(), -bends.min()]
    return np.array(found)


HEIGHT, TILT, PHASES = math.exp(-2 * SIGMA**2), 0.15, 1000  # H(M) = HEIGHT sin 2M + TILT M, smoothed exactly


def phases() -> np.ndarray:
    """Pre-trained means over one period of the problem, which is pi."""
    return np.linspace(0.0, math.pi, PHASES, endpoint=False)


def updated(mean: np.ndarray, share: float) -> np.ndarray:
    return phases() + (2 * HEIGHT * np.cos(2 * mean) + TILT) / (4 * HEIGHT * share)


@cache
def waves(share: float, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Means after 3000 iterations on r = sin 2y + .15 y, and how far the last one still moves them."""
    mean = phases()
    for _ in range(3000):
        mean = mean + damping * (updated(mean, share) - mean)
    return mean, np.abs(updated(mean, share) - mean)


def settled(share: float, damping: float = 1.0) -> float:
    """The share of means from which the iteration converges."""
    return float((waves(share, damping)[1] < 1e-6).mean())


def objective(mean: np.ndarray, share: float, start: np.ndarray) -> np.ndarray:
    return HEIGHT * np.sin(2 * mean) + TILT * mean - 2 * HEIGHT * share * (mean - start) ** 2


@cache
def hill(share: float) -> tuple[np.ndarray, np.ndarray]:
    """The objective's largest value over all means for each start, and its first local maximum uphill of the start."""
    reach = (2 * HEIGHT + TILT) / (4 * HEIGHT * share)
    moves = np.linspace(-reach, reach, 4001)
    best, first = [], []
    for start in phases():
        values = objective(start + moves, share, start)
        i, way = 2000, 1 if values[2001] > values[1999] else -1
        while 0 < i < 4000 and values[i + way] > values[i]:
            i += way
        best.append(values.max())
        first.append(values[i])
    return np.array(best), np.array(first)


LOSS = 1e-5  # in value, above the square of the spacing of the grid in `hill`


def lost_by_iterating(share: float, damping: float) -> float:
    """The share of means whose iteration ends (or is, after 3000 iterations) below the best value."""
    return float((hill(share)[0] - objective(waves(share, damping)[0], share, phases()) > LOSS).mean())


def lost_by_climbing() -> np.ndarray:
    return np.array([float((hill(share)[0] - hill(share)[1] > LOSS).mean()) for share in SHARES])


MOST_SETTLED = (0.75, 0.3, 0.22)


def _wave_table() -> Table:
    return Table(
        name="pi-ft-two-requirements",
        title="Below the contraction threshold: how often the iteration converges, and to what",
        caption="One step, $r = \\sin 2y + 0.15 y$, $\\sigma = 1/2$, all pre-trained means of one period. Damped by $1 / (1 + \\rho)$ the iteration always converges, but below the threshold of the convex side it can end at a lesser of several maxima.",
        columns=(
            Column("strength over $\\sigma^2 \\sup|h'|$"),
            Column("policy iteration converges (%)"),
            Column("damped: converges (%)"),
            Column("damped: not the best maximum (%)"),
        ),
        rows=tuple(
            (f"{share:g}", f"{100 * settled(share):.1f}", f"{100 * settled(share, cautious(1 / share)):.1f}", f"{100 * lost_by_iterating(share, cautious(1 / share)):.1f}")
            for share in SHARES
        ),
    )  # fmt: skip


TWO_REQUIREMENTS = Claim(
    id="pi-ft.two-requirements",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="about PI-FT, Theorems 2.8 and 3.1; derived in docs/pift.md",
    title="One condition on the strength stands for two: the problem needs it where values are convex, the iteration also where they are concave",
    statement=r"The one-step problem is strongly concave iff $\beta > \sigma^2 \sup \lambda_{\max}(\nabla h)$; policy iteration contracts if also $\beta > \sigma^2 \sup \lambda_{\max}(-\nabla h)$, and damped by $1 / (1 + \rho^-)$ it needs the first only. With $\epsilon = \sigma^2 / \beta$, "
    r"$-\ell^-_t \preceq \nabla^2 V_t^* \preceq \ell^+_t$, $\ell^\pm_t = \frac{1 - \alpha}{\sqrt\alpha} L_1^s L_{0,t+1} + \frac{A^2}{\alpha} \frac{\ell^\pm_{t+1}}{1 \mp \epsilon \ell^\pm_{t+1}}$: feedback steepens convex values and flattens concave ones.",
    printed="holds",
    why="The update is gradient ascent with a fixed step: where the objective is more concave than the step allows it overshoots, though the maximum is unique. The bounds follow from the Hessian of the value, x / (1 - eps x) being increasing. "
    "Below the first threshold there can be several maxima, and then no iteration is safe.",
    derivation="pift.md#iterations-that-do-not-converge",
    checks=(
        equals(
            "concave: a unique maximum, a failing iteration",
            "With r = -log cosh 3y below the contraction threshold, does the damped iteration end at the maximiser found by comparing values?",
            tuple(f"{share:g} of the threshold, y = {y:g}" for share in SHARES for y in STARTS),
            subject=lambda: limits(cautious),
            reference=maximised,
            controls={"undamped": lambda: limits(lambda rho: 1.0)},
            tolerance=1e-6,
            margin_from="1e-6: a parabola through three points 0.0005 apart",
        ),
        at_least(
            "two-sided bounds",
            "Are the bounds on the value's Hessian from above and below never exceeded on the window, at a tenth of the least strength for CONCAVE?",
            tuple(f"{name}, {side}, t = {t}" for name in SIDED for t in range(len(LEVELS[name])) for side in ("above", "below")),
            subject=lambda: (sided_bounds(), sided_observed()),
            controls={
                "without feedback": lambda: (sided_bounds(0.0), sided_observed()),
                "feedback of the other sign": lambda: (sided_bounds(-1.0), sided_observed()),
            },
            tolerance=ROUNDING,
        ),
        at_least(
            "fewer converge",
            "With r = sin 2y + .15 y at 90, 60, 30 % of the threshold, does policy iteration converge from at most 75, 30, 22 % of the means of a period?",
            tuple(f"{share:g} of the threshold" for share in SHARES),
            subject=lambda: (np.array(MOST_SETTLED), np.array([settled(share) for share in SHARES])),
            controls={"damped": lambda: (np.array(MOST_SETTLED), np.array([settled(share, cautious(1 / share)) for share in SHARES]))},
        ),
        equals(
            "lesser maxima",
            "From which share of the means does the damped iteration miss the best maximum: the share whose first maximum uphill is a lesser one?",
            tuple(f"{share:g} of the threshold" for share in SHARES),
            subject=lambda: np.array([lost_by_iterating(share, cautious(1 / share)) for share in SHARES]),
            reference=lost_by_climbing,
            controls={"undamped": lambda: np.array([lost_by_iterating(share, 1.0) for share in SHARES])},
            tolerance=2e-3,
            margin_from="0.2 %: two of 1000 means, for those at the edge",
        ),
    ),
    tables=lambda context: (_wave_table(),),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (VALUES, CONTROLS, KAPPA, ITERATES, REQUIRED, LIPSCHITZ_ONLY, TWO_REQUIREMENTS)
