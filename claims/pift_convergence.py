"""Chapter *PI-FT*, continued: how fast policy iteration converges. Lemmas 3.3 and 3.4, Theorem 3.1, and sharper ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from claims.claim import Claim
from claims.judges import at_least, equals
from claims.pift_problems import CHAPTER, NAMES, PAPER, POINTS, WINDOW, best, iterated, problem, two_modes
from claims.records import Column, Figure, Panel, Series, Table
from theory.control import ControlSchedule
from theory.control_bellman import (
    ControlProblem,
    Solution,
    contraction,
    errors,
    iterates,
    optimum,
    step_errors,
)
from theory.control_constants import (
    SystemConstants,
    admissible_strength,
    improved_bounds,
    theorem_bounds,
    value_bounds,
)
from theory.control_rewards import Ridge

# --- observed errors and their bounds -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A problem at the least strengths that Theorem 3.1 admits for a lambda, with its exact constants."""

    problem: ControlProblem
    system: SystemConstants
    lam: float


@cache
def case(name: str) -> Case:
    """SINE: T = 3, data 1/2 N(+-1.5, .3), reward .5 sin 1.3 y, lambda .5. TANH: data 1/2 N(+-1, .5), lambda .7."""
    alphas, data, reward, lam = {
        "SINE": ((0.7, 0.8, 0.9), two_modes(1.5, 0.3), Ridge("sin", 0.5, 1.3), 0.5),
        "TANH": ((0.8, 0.85, 0.9), two_modes(1.0, 0.5), Ridge("tanh"), 0.7),
    }[name]
    free = ControlSchedule.ddpm(alphas, 1.0)
    system = SystemConstants.of_mixture(free, data, reward.lipschitz, reward.gradient_lipschitz)
    schedule = free.with_strength(admissible_strength(free, system, lam))
    return Case(ControlProblem.of_mixture(schedule, data, reward), system, lam)


CASES, STEPS = ("SINE", "TANH"), 3
COUNTS = (0, 1, 2, 4, 8)
QUANTITIES = ("control", "gradient of the value", "value")


@cache
def optimal(name: str) -> Solution:
    return optimum(case(name).problem)


@cache
def after(name: str, *counts: int) -> Solution:
    return iterates(case(name).problem, counts)


@cache
def observed(name: str, m: int) -> np.ndarray:
    """Largest errors on the window after m iterations at every step: (quantity, t)."""
    return np.array([errors(after(name, m, m, m), optimal(name), t, WINDOW, 321) for t in range(STEPS)]).T


def bounds(name: str, m: int, improved: bool = False, exponent: Callable[[int], Any] = lambda m: m) -> np.ndarray:
    """The bounds on the same, (quantity, t); `exponent` plants another power of the rate."""
    of, law = case(name), improved_bounds if improved else theorem_bounds
    arguments = (of.problem.schedule, of.system, of.lam, exponent(m))
    found = law(*arguments)
    return np.stack([found.control, found.gradient[:-1], value_bounds(*arguments)[:-1]])


Sides = tuple[np.ndarray, np.ndarray]


def bound_and_observed(rows: slice, improved: bool, exponent: Callable[[int], Any] = lambda m: m) -> Sides:
    pairs = [(bounds(n, m, improved, exponent)[rows], observed(n, m)[rows]) for n in CASES for m in COUNTS]
    larger, smaller = (np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True))
    return larger, smaller


def places(rows: slice) -> tuple[str, ...]:
    return tuple(
        f"{n}, m = {m}, {q}, t = {t}" for n in CASES for m in COUNTS for q in QUANTITIES[rows] for t in range(STEPS)
    )


FIRST_TWO, LAST = slice(0, 2), slice(2, 3)
DENSE = tuple(range(11))


def convergence_figure() -> Figure:
    """Observed errors of SINE at each step against iterations, with both bounds."""
    panels = []
    for q, quantity in enumerate(QUANTITIES):
        for t in range(STEPS):
            seen = np.array([observed("SINE", m)[q, t] for m in DENSE])
            kept = seen > 1e-13  # below that the quadrature's own error is what is seen
            x = tuple(float(m) for m in DENSE)
            series = [
                Series("observed", tuple(np.array(x)[kept].tolist()), tuple(seen[kept].tolist()), style="points"),
                Series("our bound", x, tuple(float(bounds("SINE", m, True)[q, t]) for m in DENSE)),
            ]
            if q < 2:
                printed = tuple(float(bounds("SINE", m)[q, t]) for m in DENSE)
                series.append(Series("Theorem 3.1", x, printed, style="dashed"))
            panels.append(Panel(f"{quantity}, t = {t}", tuple(series)))
    return Figure(
        name="pi-ft-convergence",
        title="Errors of policy iteration, observed and proved",
        caption="SINE at the least strengths that Theorem 3.1 admits. Every observed error lies below its bound. The last step's control "
        "error falls by the rate $\\rho$ per iteration, values and their gradients by $\\rho^2$, as our bounds say and the printed ones do not; the earlier "
        "steps, whose strengths are hundreds of times what they need, are limited by the last one's value and fall by $\\rho^2$ too.",
        alt="Nine panels on logarithmic axes: observed errors against iterations for three steps and three quantities, below the bounds.",
        kind="panels",
        x_label="iterations $m$ at every step",
        y_label="largest error on $[-8, 8]$",
        y_scale="log",
        panels=tuple(panels),
        panel_columns=3,
        shared_axes="grid",
    )


def squared(m: int) -> int:
    return 2 * m


THEOREM = Claim(
    id="pi-ft.theorem-3-1",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Theorem 3.1, (40)-(41), and Lemmas 3.3, 3.4, as reconstructed and proved again",
    title="Theorem 3.1 holds: errors of controls and of value gradients lie below the proved bounds, at the admissible strengths",
    statement=r"If $\beta_t \ge \sigma_t^2 \bar L_{1,t+1} / (1 - \lambda)$ then $\|U_t^{(m)} - u_t^*\|_\infty \le g_t L^*_{0,t+1} (1 - \lambda)^m + \frac{g_t}{\lambda} \sum_{k > t} "
    r"\big(\prod_{t < j < k} C_j\big) D_k (1 - \lambda)^{m + 1}$, and likewise for the gradients of the values.",
    printed="holds",
    why="The control update contracts by at most 1 - lambda, and the error of the next value's gradient enters multiplied by the expansion of the steps between. "
    "The strengths are the least admissible ones: hundreds of times what the first steps need.",
    derivation="pift.md#errors-of-pi-ft",
    checks=(
        at_least(
            "observed below the bound",
            "On SINE and TANH, are the largest errors on [-8, 8] after m = 0, 1, 2, 4, 8 iterations below the bounds, at every step?",
            places(FIRST_TWO),
            subject=lambda: bound_and_observed(FIRST_TWO, False),
            controls={"a bound that falls as (1 - lambda)^(2m)": lambda: bound_and_observed(FIRST_TWO, False, squared)},
        ),
    ),
    figures=lambda context: (convergence_figure(),),
)  # fmt: skip

# --- the exact error ----------------------------------------------------------------------------------------------

ITERATIONS = (1, 2, 4)


def _averaged_hessian(name: str, m: int) -> tuple[np.ndarray, ...]:
    """e^m, e^{m+1}, grad U^m, and tau times the average of grad h between the optimal mean and M^m, at POINTS."""
    ahead, y = best(name).lookahead(0), np.array(POINTS)[:, None]
    star = ahead.optimum(y)
    *_, now, then = ahead.iterates(y, m + 1)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    between = [star.mean + 0.5 * (1 + x) * (now.mean - star.mean) for x in nodes]
    average = sum(0.5 * w * ahead.hessian(z)[:, 0, 0] for w, z in zip(weights, between, strict=True))
    own = ahead.hessian(now.mean)[:, 0, 0]
    jacobians = now.control_jacobian[:, 0, 0], then.control_jacobian[:, 0, 0]
    return (
        (now.control - star.control)[:, 0],
        *jacobians,
        ahead.ratio * (average - own),
        now.gradient[:, 0] - star.gradient[:, 0],
    )


def gradient_error(name: str, m: int, first: float = 1.0, second: float = 1.0) -> np.ndarray:
    schedule = problem(name).schedule
    alpha, sigma, strength = (float(v[0]) for v in (schedule.alpha, schedule.sigma, schedule.strength))
    e, slope, next_slope, bent, _ = _averaged_hessian(name, m)
    bracket = first * (next_slope - slope) + second * bent * (1 / (1 - alpha) + slope)
    return strength * (1 - alpha) ** 2 / (alpha * sigma**2) * bracket * e


def on_both(numbers: Callable[[str, int], np.ndarray]) -> np.ndarray:
    return np.concatenate([numbers(name, m) for name in NAMES for m in ITERATIONS])


IDENTITY = Claim(
    id="pi-ft.error-identity",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md; sharpens PI-FT, Lemma 3.4",
    title="The error of a value's gradient is exactly the control's error times another small factor",
    statement=r"With $e^m = U^m - u^*$ and one next value: $\nabla V^{(m)} - \nabla V^* = \frac{\beta (1 - \alpha)^2}{\alpha \sigma^2} "
    r"\big[\nabla U^{m+1} - \nabla U^m + \frac{\sigma^2}{\beta} (H_m - \nabla h(M^m)) (\frac{I}{1 - \alpha} + \nabla U^m)\big]^\top e^m$, $H_m$ the average of $\nabla h$ between $M^*$ and $M^m$.",
    printed="holds",
    why="Both factors fall geometrically, so their product falls at twice the exponent: the published Lemma 3.4 bounds one of them by a constant.",
    derivation="pift.md#error-identity",
    checks=(
        equals(
            "an identity",
            "At t = 0 of MIX and GSP after 1, 2 and 4 iterations, is this the difference of the two gradients?",
            tuple(f"{name}, m = {m}, y = {y:g}" for name in NAMES for m in ITERATIONS for y in POINTS),
            subject=lambda: on_both(gradient_error),
            reference=lambda: on_both(lambda name, m: _averaged_hessian(name, m)[-1]),
            controls={
                "the change of the Jacobian dropped": lambda: on_both(lambda name, m: gradient_error(name, m, first=0.0)),
                "the curvature's difference dropped": lambda: on_both(lambda name, m: gradient_error(name, m, second=0.0)),
            },
            tolerance=1e-9,
            margin_from="1e-9: two quadratures and a Gauss-Legendre average",
        ),
    ),
)  # fmt: skip


def rates_table() -> Table:
    """Factors per iteration, observed between m = 3 and 5 on the optimal next value, beside the contraction."""
    y, rows = np.linspace(-WINDOW, WINDOW, 321)[:, None], []
    for name in NAMES:
        for t in range(problem(name).schedule.steps):
            ahead = best(name).lookahead(t)
            star, path = ahead.optimum(y), ahead.iterates(y, 5)
            early, late = (np.array(step_errors(path[m], star)) for m in (3, 5))
            rho = contraction(best(name), t, WINDOW)
            seen = np.sqrt(late / early)  # two iterations lie between
            rows.append((f"{name}, $t = {t}$", *(f"{v:.3f}" for v in (rho, seen[0], rho**2, seen[1], seen[2]))))
    return Table(
        name="pi-ft-rates",
        title="Factors per iteration, observed beside the contraction",
        caption="Largest errors on $[-8, 8]$ between the third and the fifth iteration, on the optimal next value. Controls fall by at most $\\rho$ per iteration, values and their gradients by about $\\rho^2$.",
        columns=(
            Column("step", "left"),
            Column("$\\rho$"),
            Column("control"),
            Column("$\\rho^2$"),
            Column("gradient"),
            Column("value"),
        ),
        rows=tuple(rows),
    )


def later_table() -> Table:
    """The control error at t = 0 of MIX with fewer iterations at the later step."""
    rows = []
    for m in (4, 8, 12):
        seen = [errors(iterated("MIX", (m, n)), best("MIX"), 0, WINDOW, 321).control for n in (m, m // 2, 1, 0)]
        rows.append((f"{m}", *(f"{error:.2e}" for error in seen)))
    return Table(
        name="pi-ft-later-steps",
        title="A later step needs fewer iterations",
        caption="Largest control error at $t = 0$ of MIX, whose steps contract by 0.40 and 0.23. With half the iterations at the later step nothing is lost; with one, little at first.",
        columns=(
            Column("iterations $m$ at $t = 0$"),
            Column("$m$ at $t = 1$"),
            Column("$m / 2$"),
            Column("one"),
            Column("none"),
        ),
        rows=tuple(rows),
    )


def local_curvature(name: str) -> np.ndarray:
    """What (V* - V^m) / |e^m|^2 tends to at t = 0: half the curvature of the one-step problem at its maximum."""
    ahead, y = best(name).lookahead(0), np.array(POINTS)[:, None]
    schedule = problem(name).schedule
    alpha, sigma, strength = (float(v[0]) for v in (schedule.alpha, schedule.sigma, schedule.strength))
    hessian = ahead.hessian(ahead.optimum(y).mean)[:, 0, 0]
    return 0.5 * (1 - alpha) ** 2 / alpha * (strength / sigma**2 - hessian)


def gap_over_square(name: str, m: int = 3, power: int = 2) -> np.ndarray:
    """(V* - V^m) / |e^m|^power over its limit, 1 for the second power."""
    ahead, y = best(name).lookahead(0), np.array(POINTS)[:, None]
    star, now = ahead.optimum(y), ahead.iterates(y, m)[-1]
    return (star.value - now.value) / np.abs((now.control - star.control)[:, 0]) ** power / local_curvature(name)


TWICE = Claim(
    id="pi-ft.twice-the-rate",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md; sharpens PI-FT, Theorem 3.1",
    title="Gradients of values converge at twice the exponent of Theorem 3.1, so later steps need fewer iterations",
    statement=r"With the contraction $\rho_t = \sigma_t^2 \sup|\nabla h_t| / \beta_t \le 1 - \lambda_t$ that is there: $E_t \le \frac{A_t}{\lambda_t \sqrt{\alpha_t}} E_{t+1} + O(m_t \rho_t^{2 m_t})$ "
    r"for the gradients of the values, hence $\|U_t^{(m)} - u_t^*\| = O(\rho_t^{m} \vee \max_{k>t} m \rho_k^{2m})$; pointwise $(V^*_t - V_t^{(m)}) / |e^m|^2$ tends to half the curvature of the one-step problem.",
    printed="holds",
    why="A value is flat at its optimum: an error e of the control costs e squared. Theorem 3.1 has the single exponent in every term.",
    derivation="pift.md#twice-the-exponent-for-values",
    checks=(
        at_least(
            "observed below the sharper bound",
            "On SINE and TANH, are the largest errors of controls and value gradients below the sharper bounds, at every step?",
            places(FIRST_TWO),
            subject=lambda: bound_and_observed(FIRST_TWO, True),
            controls={"a bound that falls twice as fast again": lambda: bound_and_observed(FIRST_TWO, True, squared)},
        ),
        equals(
            "the value's gap is quadratic",
            "At t = 0 of MIX and GSP, is the value's gap half the one-step curvature times the squared control error, after 3 iterations?",
            tuple(f"{name}, y = {y:g}" for name in NAMES for y in POINTS),
            subject=lambda: np.concatenate([gap_over_square(name) for name in NAMES]),
            reference=lambda: np.ones(len(NAMES) * len(POINTS)),
            controls={
                "linear in the control's error": lambda: np.concatenate([gap_over_square(name, power=1) for name in NAMES]),
                "before the first iteration": lambda: np.concatenate([gap_over_square(name, m=0) for name in NAMES]),
            },
            tolerance=3e-3,
            margin_from="0.3 %: the next term of the expansion, of the size of the remaining error; declared beforehand",
        ),
    ),
    tables=lambda context: (rates_table(), later_table()),
)  # fmt: skip


def gap_sides(exponent: Callable[[int], Any] = lambda m: m) -> Sides:
    return bound_and_observed(LAST, True, exponent)


@cache
def never_above() -> Sides:
    """The optimal value, and the one after m iterations, at a few points: (V*, V^m)."""
    larger, smaller = [], []
    for name in CASES:
        for t in range(STEPS):
            star = optimal(name).at(t, np.array(POINTS)[:, None]).value
            for m in COUNTS:
                larger.append(star)
                smaller.append(after(name, m, m, m).at(t, np.array(POINTS)[:, None]).value)
    return np.concatenate(larger), np.concatenate(smaller)


VALUE_GAP = Claim(
    id="pi-ft.value-gap",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/pift.md; PI-FT has no bound on values",
    title="What is lost by stopping early adds up over the steps and is not multiplied",
    statement=r"$0 \le V_t^* - V_t^{(m)} \le \sum_{k \ge t} \frac{1 + \rho_k}{2} \frac{\sigma_k^2}{\beta_k} \bar L_{0,k+1}^2\, \rho_k^{2 m_k}$: no product of growth factors, and twice the exponent.",
    printed="holds",
    why="Values are expectations: an error of the next one enters undiminished but not enlarged. The iterate is a policy, so its value is never above the optimum.",
    derivation="pift.md#errors-of-values-add-up",
    checks=(
        at_least(
            "observed below the bound",
            "On SINE and TANH, is the largest loss of value on [-8, 8] below the bound, at every step?",
            places(LAST),
            subject=gap_sides,
            controls={"a bound that falls as rho^(3m)": lambda: gap_sides(lambda m: 1.5 * m if m % 2 == 0 else 2 * m)},
        ),
        at_least(
            "never above the optimum",
            "Is the value of every iterate at most the optimal one, at three points and every step?",
            tuple(f"{n}, t = {t}, m = {m}, y = {y:g}" for n in CASES for t in range(STEPS) for m in COUNTS for y in POINTS),
            subject=never_above,
            controls={"the optimum less 1e-6": lambda: (never_above()[0] - 1e-6, never_above()[1])},
            tolerance=1e-11,
        ),
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (THEOREM, IDENTITY, TWICE, VALUE_GAP)
