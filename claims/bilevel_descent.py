"""Chapter *Generative bilevel*, continued: Theorem 1, what is said to follow from it, and errors of the inner solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri

from algorithms.bilevel import PenaltyBilevel
from algorithms.tilting import STRENGTH, MinusUpper, Regularised, Tilt, uniform
from algorithms.tilting import at_least as no_smaller_than
from claims.bilevel import (
    CASE_B,
    CASE_D,
    CHAPTER,
    PAPER,
    SIZES,
    TOY,
    Array,
    Pair,
    in_torch,
    problem,
    quadrature_slope,
    sgd,
)
from claims.claim import Claim
from claims.judges import at_least, equals
from claims.records import Figure, Panel, Series
from theory import penalty_bounds as bounds
from theory.penalty import Bilevel, Cubic
from theory.penalty_bounds import Constants
from theory.reward_tuning import RewardTuning
from verdicts.streams import Stream

# --- Theorem 1 ------------------------------------------------------------------------------------------------------

LOW = 0.05
SMOOTHNESS = (14 - 10 * LOW) / (2 * (1 + LOW) ** 4)  # sup |F''| of case B on [0.05, inf)
SHARES = (1.0, 0.3, 0.01)  # of the largest step 1/L
DESCENT_GAMMAS = (1.0, 10.0, 1e3)
STARTS = np.geomspace(LOW, 20.0, 120)


def value_b(strength: Any) -> Any:
    """F of case B by hand: lambda (lambda - 3) / (2 (1 + lambda)^2)."""
    return strength * (strength - 3) / (2 * (1 + strength) ** 2)


def slope_b(strength: Any) -> Any:
    return (5 * strength - 3) / (2 * (1 + strength) ** 3)


@cache
def penalty_slopes(gamma: float) -> Array:
    return np.array([CASE_B.penalty_slope(float(s), gamma) for s in STARTS])


def tuning_slacks(error: float = 1.0, longer: float = 1.0, mapping: float = 0.25) -> Array:
    """The least slack of the inequality over the starts, for each step and gamma, projected on [LOW, inf)."""
    found = []
    for share in SHARES:
        for gamma in DESCENT_GAMMAS:
            eta, slope = longer * share / SMOOTHNESS, penalty_slopes(gamma)
            after = np.maximum(STARTS - eta * slope, LOW)
            step = (STARTS - after) / eta
            allowed = value_b(STARTS) - mapping * eta * step**2 + error * eta * (slope - slope_b(STARTS)) ** 2
            found.append(float(np.min(allowed - value_b(after))))
    return np.array(found)


SPECTRUM = np.array([4.0, 1.0, 0.2])
NOISES = (0.0, 0.3, 2.0)


def noisy_slacks(error: float = 1.0, share: float = 1.0, mapping: float = 0.25) -> Array:
    """The same for x'diag(SPECTRUM)x/2 on the positive orthant, with random errors of the direction."""
    found = []
    for noise in NOISES:
        rng = Stream(8).child(f"descent/{noise}").generator()
        x = np.abs(rng.standard_normal((4000, 3)))
        eta, slope = share / SPECTRUM.max(), x * SPECTRUM
        direction_ = slope + noise * rng.standard_normal(x.shape)
        after = np.maximum(x - eta * direction_, 0.0)
        fall = 0.5 * (x**2 - after**2) @ SPECTRUM
        step = np.sum(((x - after) / eta) ** 2, axis=1)
        slack = fall - mapping * eta * step + error * eta * np.sum((direction_ - slope) ** 2, axis=1)
        found.append(float(slack.min()))
    return np.array(found)


def no_slack(slack: Array) -> Pair:
    return slack, np.zeros_like(slack)


def parabola_slacks(scale: float = 1.0) -> Array:
    """F = x^2/2, eta = 1, from 1 along 1 + e: the inequality's slack by the theory room."""
    return np.array(
        [
            bounds.descent_slack(lambda x: 0.5 * float(x @ x), lambda x: x, [1.0], [1.0 + scale * e], 1.0)
            for e in (-0.5, 0.0, 0.4, 1.0, 3.0)
        ]
    )


DESCENT = Claim(
    id="generative-bilevel.theorem-1-descent",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, Theorem 1 and appendix D.3, as reconstructed",
    title="One step of the method lowers the objective but for the squared error of the gradient",
    statement=r"Let $X$ be closed and convex, $\nabla F$ $L$-Lipschitz on it, $\eta \le 1/L$, $x \in X$, $x^+ = \Pi_X(x - \eta \hat g)$, $G = (x - x^+)/\eta$ and $e = \hat g - \nabla F(x)$. Then $F(x^+) \le F(x) - \frac\eta4 \|G\|^2 + \eta \|e\|^2$.",
    printed="holds",
    why="The step is descent where $\\|G\\| > 2\\|e\\|$, and only there. $e$ holds the bias of the penalty and the inner errors. In reward tuning $X$ has to keep away from $\\lambda = 0$, where $F'$ is not Lipschitz.",
    derivation="bilevel.md#theorem-1-the-descent-inequality-and-what-does-not-follow-from-it",
    checks=(
        at_least(
            "reward tuning",
            "Is the least slack over 120 starts positive in case B, on strengths of at least 0.05?",
            tuple(f"eta = {share:g}/L, gamma = {gamma:g}" for share in SHARES for gamma in DESCENT_GAMMAS),
            subject=lambda: no_slack(tuning_slacks()),
            controls={
                "without the squared error": lambda: no_slack(tuning_slacks(error=0.0)),
                "a quarter of the squared error": lambda: no_slack(tuning_slacks(error=0.25)),
                "the whole of |G|^2": lambda: no_slack(tuning_slacks(mapping=1.0)),
            },
        ),
        at_least(
            "noise and projection",
            "Is it positive for a quadratic on an orthant, whatever the error of the direction?",
            tuple(f"noise {noise:g}" for noise in NOISES),
            subject=lambda: no_slack(noisy_slacks()),
            controls={
                "without the squared error": lambda: no_slack(noisy_slacks(error=0.0)),
                "steps of 3/L": lambda: no_slack(noisy_slacks(share=3.0)),
                "all of |G|^2": lambda: no_slack(noisy_slacks(mapping=1.0)),
            },
        ),
        equals(
            "tight",
            "On the parabola with eta = 1, from 1 along 1 + e, is the slack (1 - e)^2/4, and so zero at e = 1?",
            tuple(f"e = {e}" for e in (-0.5, 0, 0.4, 1, 3)),
            subject=parabola_slacks,
            reference=lambda: np.array([(1 - e) ** 2 / 4 for e in (-0.5, 0.0, 0.4, 1.0, 3.0)]),
            controls={
                "half the error": lambda: parabola_slacks(0.5),
                "an error of the other sign": lambda: parabola_slacks(-1.0),
            },
        ),
    ),
)  # fmt: skip

# --- "Guaranteed to perform better" ---------------------------------------------------------------------------------

SMALL_GAMMAS = (1.0, 3.0, 9.0)
LAMBDAS = (0.3, 1.0, 5.0)
RUN_STARTS = (1.0, 1.5, 3.0)
RUN_GAMMAS = (1.0, 5.0)
UPDATES, RATE = 60, 0.01


def one_step(case: RewardTuning, strength: float, slope: float, eta: float = 0.01) -> tuple[float, float]:
    """F after the step and before it."""
    return case.value(strength - eta * slope), case.value(strength)


def swapped(after: Array, before: Array) -> Pair:
    return before, after


def steps_of_d(gamma_factor: float = 1.0, exact: bool = False) -> Pair:
    """F after and before one step in case D, from every strength at every gamma."""
    rows = [
        one_step(CASE_D, s, CASE_D.slope(s) if exact else CASE_D.penalty_slope(s, gamma_factor * gamma))
        for gamma in SMALL_GAMMAS
        for s in LAMBDAS
    ]
    after, before = np.array(rows).T
    return after, before


@cache
def trajectory(gamma: float, starts: tuple[float, ...] = RUN_STARTS, updates: int = UPDATES) -> Array:
    """The strengths (updates + 1, starts) of Algorithm 2 in torch on case D, on 4000 quantiles of the data."""
    x = torch.from_numpy(ndtri((np.arange(4000) + 0.5) / 4000)).expand(len(starts), -1)
    rewards = float(CASE_D.upper.linear[0]) * x, float(CASE_D.lower.linear[0]) * x
    strength = torch.tensor(starts).double()
    seen: list[Array] = [np.array(starts)]
    run = PenaltyBilevel(
        MinusUpper(),
        Regularised(),
        Tilt(lambda update: rewards),
        {STRENGTH: strength},
        uniform(strength, x.shape[-1]),
        gamma=gamma,
        optimizer=sgd(RATE),
        project=no_smaller_than(0.05),
        callback=lambda update, record: seen.append(record.x[STRENGTH].numpy().copy()),
    )
    run.run(updates)
    return np.array(seen)


def runs(gammas: Iterable[float]) -> Pair:
    """F at the end and at the start of the torch runs."""
    value = np.vectorize(CASE_D.value)
    ends = [(value(trajectory(g)[-1]), value(trajectory(g)[0])) for g in gammas]
    return np.concatenate([end for end, _ in ends]), np.concatenate([start for _, start in ends])


# From an independent derivation: F_gamma' of the schedule toy at (tau, gamma) where its sign is wrong, and F'.
WRONG_SIGNS = {
    (1.0, 1.0): -0.000130108616289875132,
    (2.0, 1.0): -0.000540725700212161222,
    (2.0, 10.0): -0.00233646433097313601,
}
TOY_SLOPES = (0.00753619426567568687, 0.00521556330359086652, 0.00521556330359086652)
TOY_PLACES = tuple(f"tau = {tau:g}, gamma = {gamma:g}" for tau, gamma in WRONG_SIGNS)


def toy_slopes(larger: float = 1.0) -> Array:
    return np.array([TOY.penalty_gradient(tau, larger * gamma) for tau, gamma in WRONG_SIGNS])


B_GAMMAS = (1.0, 10.0, 100.0)


def falls_in_b(where: float) -> Pair:
    """The least fall of F in a step of case B over starts with |F_gamma'| > `where` |F_gamma' - F'|, by gamma."""
    found = []
    for gamma in B_GAMMAS:
        slope = penalty_slopes(gamma)
        after = np.maximum(STARTS - slope / SMOOTHNESS, LOW)
        inside = np.abs(STARTS - after) * SMOOTHNESS > where * np.abs(slope - slope_b(STARTS))
        found.append(float(np.min((value_b(STARTS) - value_b(after))[inside])))
    return np.array(found), np.zeros(len(B_GAMMAS))


def signs_by_gamma(factor: float = 0.5, variance: float = 1.0) -> Array:
    """F_gamma' of case D at lambda = 1 as b1'S b2 + factor b1'S b1 / gamma."""
    return np.array([-0.05 * variance + factor / gamma for gamma in (5.0, 10.0, 20.0)])


def sign_figure(context: object) -> tuple[Figure, ...]:
    x = tuple(map(float, np.geomspace(1.0, 1e3, 40)))

    def curve(label: str, share: Callable[[float], float]) -> Series:
        return Series(label, x, tuple(max(share(g), -2.0) for g in x))

    shares = (
        curve("case D, every λ", lambda g: CASE_D.penalty_slope(1.0, g) / CASE_D.slope(1.0)),
        curve("schedule toy, τ = 1", lambda g: TOY.penalty_gradient(1.0, g) / TOY.gradient(1.0)),
        curve("schedule toy, τ = 2", lambda g: TOY.penalty_gradient(2.0, g) / TOY.gradient(2.0)),
        Series("no information", (x[0], x[-1]), (0.0, 0.0), style="dashed"),
    )
    updates = tuple(map(float, range(UPDATES + 1)))
    panels = []
    for start in RUN_STARTS:
        path = []
        for gamma in (1.0, 100.0):
            strengths = trajectory(gamma)[:, RUN_STARTS.index(start)]
            path.append(Series(f"γ = {gamma:g}", updates, tuple(float(CASE_D.value(float(s))) for s in strengths)))
        panels.append(Panel(f"from λ = {start:g}", tuple(path)))
    return (
        Figure(
            name="wrong-sign",
            title="The penalty function's slope, as a share of the true one",
            caption="Below the dashed line every step, however small, goes the wrong way: to γ = 10 in case D, to 49 on the toy at τ = 2. Values under −2 are drawn at −2. γ = 1 is the default of the released code.",
            alt="Three curves over gamma from 1 to 1000 that start below zero and rise to one; they cross zero at gamma = 10 for case D, at 1.5 for the toy at tau = 1 and at 49 at tau = 2.",
            x_label="γ",
            y_label="F_γ′ / F′",
            x_scale="log",
            series=shares,
        ),
        Figure(
            name="wrong-way",
            title="Algorithm 2 on case D, in torch, from three strengths: the objective F that it is to lower",
            caption="With γ = 1 every run raises its objective from the first update to the last, from everywhere. With γ = 100 every run lowers it.",
            alt="Three panels of F against the update. The curve of gamma = 1 rises in each, that of gamma = 100 falls slowly.",
            kind="panels",
            x_label="update",
            y_label="F",
            panels=tuple(panels),
            shared_axes="none",
        ),
    )  # fmt: skip


BETTER = Claim(
    id="generative-bilevel.not-guaranteed-to-perform-better",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, section 5, last paragraph before the experiments",
    title="The method is not guaranteed to perform better: at small γ it can raise its objective from every start",
    statement="Theorem 1 applies to both applications, so that regardless of initialisation the law generated with the hyperparameter of the bilevel algorithm is guaranteed to perform better.",
    printed="refuted",
    corrected=r"A step with $\eta \le 1/L$ lowers $F$ where $\|G\| > 2 \|\hat g - \nabla F\|$: far from a stationary point, for $\gamma$ large enough. For linear rewards with $b_1^\top S b_2 < 0$ that takes $\gamma > -b_1^\top S b_1 / (2\, b_1^\top S b_2)$; below it every step raises $F$, from every $\lambda$.",
    why="The error of order $1/\\gamma$ does not vanish as the gradient does, and at a small $\\gamma$ it may be the larger anywhere. The released default is $\\gamma = 1$: there the slope has the wrong sign in case D and on the schedule toy.",
    derivation="bilevel.md#a-gradient-of-the-wrong-sign",
    checks=(
        at_least(
            "every start",
            "In case D with gamma below 10, is F after one step no less than before, at every strength?",
            tuple(f"gamma = {gamma:g}, lambda = {s:g}" for gamma in SMALL_GAMMAS for s in LAMBDAS),
            subject=steps_of_d,
            printed=lambda: swapped(*steps_of_d()),
            controls={
                "gamma 20 times as large": lambda: steps_of_d(20.0),
                "the true gradient": lambda: steps_of_d(exact=True),
            },
        ),
        at_least(
            "whole runs",
            f"Is it so after {UPDATES} updates of the algorithm in torch?",
            tuple(f"gamma = {gamma:g}, from lambda = {s:g}" for gamma in RUN_GAMMAS for s in RUN_STARTS),
            subject=lambda: runs(RUN_GAMMAS),
            printed=lambda: swapped(*runs(RUN_GAMMAS)),
            controls={"gamma of 20 and 100": lambda: runs((20.0, 100.0))},
        ),
        equals(
            "threshold",
            "In case D, is the slope -0.05 + 1/(2 gamma), which is zero at gamma = 10?",
            ("gamma = 5", "gamma = 10", "gamma = 20"),
            subject=lambda: np.array([CASE_D.penalty_slope(1.0, gamma) for gamma in (5.0, 10.0, 20.0)]),
            reference=signs_by_gamma,
            controls={
                "the true slope": lambda: np.full(3, CASE_D.slope(1.0)),
                "without the one half": lambda: signs_by_gamma(1.0),
            },
        ),
        equals(
            "one step of case B",
            "At gamma = 1 and eta = 0.1, from 0.5: does F rise from -0.2777777778 to -0.2776289301?",
            ("before", "after"),
            subject=lambda: step_of_b(quadrature_slope(CASE_B, 0.5, 1.0)),
            reference=lambda: np.array([-0.2777777778, -0.2776289301]),
            controls={
                "the true gradient": lambda: step_of_b(quadrature_slope(CASE_B, 0.5, None)),
                "gamma = 100": lambda: step_of_b(quadrature_slope(CASE_B, 0.5, 100.0)),
            },
            tolerance=1e-9,
        ),
        equals(
            "noise schedule",
            "On the schedule toy, has the penalty's slope the negative values of an independent derivation?",
            TOY_PLACES,
            subject=toy_slopes,
            reference=lambda: np.array(list(WRONG_SIGNS.values())),
            controls={
                "the true slope": lambda: np.array(TOY_SLOPES),
                "gamma 100 times as large": lambda: toy_slopes(100.0),
            },
            tolerance=1e-11,
        ),
        at_least(
            "where it is sure",
            "In case B, does F fall from every start at which |G| is more than twice the error?",
            tuple(f"gamma = {gamma:g}" for gamma in B_GAMMAS),
            subject=lambda: falls_in_b(2.0),
            controls={"from every start": lambda: falls_in_b(0.0)},
        ),
    ),
    figures=sign_figure,
)  # fmt: skip


def step_of_b(slope: float) -> Array:
    return np.array([value_b(0.5), value_b(0.5 - 0.1 * slope)])


# --- inner errors ---------------------------------------------------------------------------------------------------

INNER_GAMMAS = (10.0, 100.0, 1e3)
EPSILON = 1e-4
Errors = Callable[[Bilevel], Pair]  # of u* and of u^gamma


@cache
def quadratic(dim: int, size: int) -> tuple[Bilevel, Array]:
    """`problem` without its cubic terms: its constants hold everywhere."""
    case, x = problem(dim, size)
    upper, lower = (Cubic(of.linear, of.quadratic) for of in (case.upper, case.lower))
    return Bilevel(upper, lower, dim), x


def apart(case: Bilevel) -> Pair:
    """Errors of y and z, each of size EPSILON, that have nothing to do with each other."""
    rng = Stream(8).child("inner").generator()
    y, z = rng.standard_normal((2, case.lower.linear.size - case.dim))
    return EPSILON * y / np.linalg.norm(y), EPSILON * z / np.linalg.norm(z)


def opposite(case: Bilevel) -> Pair:
    """The worst: along what A stretches most, with opposite signs."""
    k = case.dim
    worst = np.linalg.svd(case.lower.quadratic[:k, k:])[2][0]
    return EPSILON * worst, -EPSILON * worst


def shared(case: Bilevel) -> Pair:
    y, _ = opposite(case)
    return y, y


def inner_error(case: Bilevel, x: Array, gamma: float, errors: Errors) -> Array:
    """What the errors do to the gradient of PenaltyBilevel in torch, (dim,)."""
    moved_y, moved_z = errors(case)
    noisy = in_torch(case, x, gamma, lambda y, z: (y + moved_y, z + moved_z))
    return noisy - in_torch(case, x, gamma, lambda y, z: (y, z))


def first_order(case: Bilevel, gamma: float, errors: Errors, factor: bool = True, joint: bool = True) -> Array:
    """gamma A (e_z - e_y) + grad_xu f e_z."""
    k, (y, z) = case.dim, errors(case)
    cross = case.lower.quadratic[:k, k:]
    pull = (gamma if factor else 1.0) * cross @ (z - y if joint else z)
    return pull + case.upper.quadratic[:k, k:] @ z


KINDS: dict[str, Errors] = {"unrelated": apart, "opposite": opposite, "shared": shared}
INNER_CASE = (1, 3)
INNER_PLACES = tuple(f"{kind}, gamma = {g:g}" for kind in KINDS for g in INNER_GAMMAS)


def all_errors(of: Callable[[Bilevel, Array, float, Errors], Array]) -> Array:
    case, x = quadratic(*INNER_CASE)
    return np.concatenate([of(case, x, g, errors) for errors in KINDS.values() for g in INNER_GAMMAS])


def bounded_errors(bound: Callable[[Constants, float], float]) -> Pair:
    """The bound and the worst errors' size, by problem and gamma."""
    allowed, found = [], []
    for sizes in SIZES:
        case, x = quadratic(*sizes)
        for gamma in INNER_GAMMAS:
            allowed.append(bound(bounds.constants(case, x, gamma), gamma))
            found.append(float(np.linalg.norm(first_order(case, gamma, opposite))))
    return np.array(allowed), np.array(found)


def shared_sizes(allowed: float, errors: Errors = shared) -> Pair:
    """l_f1 eps, and the size of the error at each gamma when both solutions share theirs."""
    case, x = quadratic(*INNER_CASE)
    top = bounds.constants(case, x, 10.0).l_f1 * EPSILON
    sizes = [float(np.linalg.norm(inner_error(case, x, g, errors))) for g in INNER_GAMMAS]
    return np.full(len(sizes), allowed * top), np.array(sizes)


ACCURACIES = (1e-2, 1e-4, 1e-6)
BUDGET = Constants(mu=1.0, l_f0=1.0, l_f1=0.5, l_g1=3.0, l_g2=1.0)


def least_sum(epsilon: float, constant: float) -> float:
    """The least of C/gamma + 2 gamma l_g1 eps over a fine grid of gamma."""
    grid = np.geomspace(1e-1, 1e6, 400001)
    return float(np.min(constant / grid + 2 * grid * BUDGET.l_g1 * epsilon))


def best_sums(power: float = 0.5, both_inner: float = 2.0) -> Array:
    return np.array([2 * (both_inner * BUDGET.sharp * BUDGET.l_g1 * e) ** power for e in ACCURACIES])


def inner_figure(context: object) -> tuple[Figure, ...]:
    case, x = quadratic(*INNER_CASE)
    grid = tuple(map(float, np.geomspace(2.0, 1e5, 40)))
    bias = [np.linalg.norm(case.bias(x, g)) / g for g in grid]
    lines = [Series("bias, no inner error", grid, tuple(map(float, bias)))]
    for label, errors in (("opposite", opposite), ("unrelated", apart), ("shared", shared)):
        total = [np.linalg.norm(case.bias(x, g) / g + first_order(case, g, errors)) for g in grid]
        lines.append(Series(f"inner errors of {EPSILON:g}, {label}", grid, tuple(map(float, total))))
    return (
        Figure(
            name="inner-errors",
            title="The error of the gradient against γ when both lower solutions are off by 0.0001",
            caption="Past its best γ the error grows: the inner errors are multiplied by γ. Errors that the two solutions share cancel, and γ may be as large as you like.",
            alt="Log-log plot over gamma. The bias falls like 1/gamma. With inner errors that differ the sum turns at a gamma near 100 and rises like gamma; with shared errors it follows the bias.",
            x_label="γ",
            y_label="error of the gradient",
            x_scale="log",
            y_scale="log",
            series=tuple(lines),
        ),
    )


INNER = Claim(
    id="generative-bilevel.inner-errors-times-gamma",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/bilevel.md, for (4) and Algorithm 1 of Generative bilevel",
    title="Errors of the lower solutions are multiplied by γ, unless the two solutions share them",
    statement=r"With errors $e_y$, $e_z$ of $u^*$, $u^\gamma$ the gradient is off by $\gamma A (e_z - e_y) + \nabla^2_{xu} f\, e_z$ to first order, at most $(l_{f,1} + \gamma l_{g,1}) \|e_z\| + \gamma l_{g,1} \|e_y\|$. "
    r"If both are $\varepsilon$ the sum with $C_\sharp/\gamma$ is never below $2 \sqrt{2\, C_\sharp\, l_{g,1}\, \varepsilon}$: an error of order $1/\gamma$ needs $\varepsilon = O(\gamma^{-2})$.",
    printed="holds",
    why="A larger penalty asks for a more accurate solver: $\\gamma$ is not free. What both solutions have in common cancels, so warm starts, batches and random numbers should be shared.",
    derivation="bilevel.md#theorem-1-the-descent-inequality-and-what-does-not-follow-from-it",
    checks=(
        equals(
            "first order",
            "Is that what inexact solutions do to the gradient of the torch method, exactly for quadratics?",
            INNER_PLACES,
            subject=lambda: all_errors(lambda case, x, g, errors: first_order(case, g, errors)) / EPSILON,
            reference=lambda: all_errors(inner_error) / EPSILON,
            controls={
                "not multiplied by gamma": lambda: all_errors(lambda case, x, g, e: first_order(case, g, e, factor=False)) / EPSILON,
                "only the penalty problem's error": lambda: all_errors(lambda case, x, g, e: first_order(case, g, e, joint=False)) / EPSILON,
            },
            tolerance=1e-8,
            margin_from="1e-8 of the largest: rounding of gradients times gamma over the size of the errors",
        ),
        at_least(
            "bound",
            "Is the bound at least the error of the worst directions?",
            tuple(f"dimensions {s[0]} and {s[1]}, gamma = {g:g}" for s in SIZES for g in INNER_GAMMAS),
            subject=lambda: bounded_errors(lambda of, g: bounds.inner_error_bound(of, g, EPSILON, EPSILON)),
            controls={
                "not multiplied by gamma": lambda: bounded_errors(lambda of, g: (of.l_f1 + 2 * of.l_g1) * EPSILON),
                "by the root of gamma": lambda: bounded_errors(lambda of, g: (of.l_f1 + 2 * math.sqrt(g) * of.l_g1) * EPSILON),
            },
        ),
        at_least(
            "shared errors",
            "Are shared errors, in torch, never multiplied by gamma: at most l_f1 times their size?",
            tuple(f"gamma = {g:g}" for g in INNER_GAMMAS),
            subject=lambda: shared_sizes(1.0),
            controls={
                "unrelated errors": lambda: shared_sizes(1.0, apart),
                "a hundredth of that": lambda: shared_sizes(0.01),
            },
        ),
        equals(
            "best gamma",
            "Is the least of C/gamma + 2 gamma l_g1 eps, searched on a grid, twice the root of 2 C l_g1 eps?",
            tuple(f"eps = {e:g}" for e in ACCURACIES),
            subject=best_sums,
            reference=lambda: np.array([least_sum(e, BUDGET.sharp) for e in ACCURACIES]),
            controls={
                "the inner error of one solution": lambda: best_sums(both_inner=1.0),
                "in proportion to eps": lambda: best_sums(power=1.0),
            },
            tolerance=1e-8,
            margin_from="1e-8: the grid of gamma",
        ),
    ),
    figures=inner_figure,
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (DESCENT, BETTER, INNER)
