"""Chapter *Generative bilevel*, continued: learning a noise schedule, and the zeroth-order estimates it is learned by.

One reference case throughout: data N((1, -1/2), diag(1/4, 4)), the cosine family of 1000 steps, S steps of DDIM with the
exact predictor, and F = W2^2 of their output to the data. A toy on the line, with one weight per time, has a lower level
that is solved exactly and not for free.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from torch import Tensor

from algorithms.bilevel import PenaltyBilevel, Record, Smooth, Solver, ZerothOrder
from algorithms.chain import Params
from algorithms.schedule_learning import ScoreMatching, ddim
from algorithms.schedules import PARAMETERS, Family
from claims.bilevel import CHAPTER, PAPER
from claims.claim import Claim
from claims.judges import Sampler, at_least, equals, has_mean
from claims.problems import lazily
from claims.records import Column, Figure, Panel, Series, Table
from theory import schedule_learning, schedules, zeroth_order
from theory.gaussian import Gaussian, w2_squared
from theory.schedule_learning import NAMES, LinearPredictorToy, ScheduleProblem
from theory.schedules import Form
from toy.experiments import generator
from toy.schedule_learning import MEAN, STD, GaussianData
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

ZO_CODE = "Generative bilevel, released code: the zeroth-order gradient of the noise-schedule experiment"
DATA = Gaussian.diagonal(MEAN, np.square(STD))
T = 1000
STEPS = (5, 10, 20)
FORMS: tuple[Form, ...] = ("released", "chen")
COSINE, SIGMOID = (0.0, 1.0, 1.0, 0.008), (-3.0, 3.0, 1.0, 0.0)  # the families' own defaults
AWAY = (0.2, 0.9, 2.0, 0.02)  # a point that is no default and no optimum

Point = tuple[float, ...]


def problem(S: int, form: Form = "released") -> ScheduleProblem:
    return ScheduleProblem(DATA, "cosine", form, T, S)


@cache
def optimum(
    S: int, form: Form = "released", free: tuple[str, ...] = ("end", "tau", "epsilon")
) -> schedule_learning.Optimum:
    return problem(S, form).optimum(free)


def tensors(point: Point) -> Params:
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in zip(PARAMETERS, point, strict=True)}


def many(point: Point) -> Params:
    """The same with an axis of one run in front."""
    return {n: v[None] for n, v in tensors(point).items()}


# --- the gradient of score matching in the schedule -----------------------------------------------------------------

BETA = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
SLOPES = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
OFFSETS = np.array([0.1, -0.2, 0.05, 0.0, 0.2, -0.1])
LINE = Gaussian.scalar(0.7, 0.4)
INDEPENDENT = (
    -1.26670402609755515, -0.940041894280401761, -0.681343504181845668, -0.440234363841624817, -0.256923174192885051,
    -0.0969265561817728206,
)  # fmt: skip
FEW = len(BETA)


def nodes() -> tuple[Tensor, Tensor, Tensor]:
    """x_0, eps and t on which the mean of a quadratic of x_0 and eps, over all t too, is its expectation."""
    rows = [
        (LINE.mean[0] + x * math.sqrt(LINE.cov[0, 0]), e, t)
        for t in range(1, FEW + 1)
        for x in (-1, 1)
        for e in (-1, 1)
    ]
    x, e, t = (torch.tensor(column) for column in zip(*rows, strict=True))
    return x.double()[:, None], e.double()[:, None], t


def through_autograd() -> np.ndarray:
    """dL/dbeta of the expected loss in plain torch."""
    beta = torch.from_numpy(BETA.copy()).requires_grad_()
    x0, eps, t = nodes()
    level = torch.cumprod(1 - beta, 0)[t - 1][:, None]
    noisy = level.sqrt() * x0 + (1 - level).sqrt() * eps
    k, c = (torch.from_numpy(v)[t - 1][:, None] for v in (SLOPES, OFFSETS))
    return torch.autograd.grad((k * noisy + c - eps).square().mean(), beta)[0].numpy()


def closed_gradient(own_step: bool = False) -> np.ndarray:
    return schedule_learning.score_matching_gradient(BETA, SLOPES, OFFSETS, LINE, own_step)


def of_family(target: Any = "epsilon") -> np.ndarray:
    """dg/d(start, end, tau, epsilon) by the torch `ScoreMatching`, whose predictor is held fixed."""

    def network(u: Params, x: Tensor, t: Tensor) -> Tensor:
        return u["slope"][t - 1][:, None] * x + u["offset"][t - 1][:, None]

    level = Smooth(ScoreMatching(Family("cosine", FEW, "released"), network, lambda draw: nodes(), target))
    u = {"slope": torch.from_numpy(SLOPES), "offset": torch.from_numpy(OFFSETS)}
    found = level.gradient(tensors(AWAY), u, (0,), "x")
    return np.array([float(found[n]) for n in NAMES])


def chained(own_step: bool = False) -> np.ndarray:
    """The same from the closed form in beta and the family's exact jacobian."""
    levels = schedules.cosine_family(FEW, *AWAY, form="released")
    rows = schedules.cosine_family_jacobian(FEW, *AWAY, form="released")
    before = levels[:-1, None]
    by_beta = levels[1:, None] * rows[:-1] / before**2 - rows[1:] / before
    beta = 1 - levels[1:] / levels[:-1]
    return schedule_learning.score_matching_gradient(beta, SLOPES, OFFSETS, LINE, own_step) @ by_beta


SCORE = Claim(
    id="generative-bilevel.score-matching-gradient-in-the-schedule",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, appendix D.2, (28) to (31), as reconstructed",
    title="The gradient of score matching in the schedule has a closed form; every later time contributes",
    statement=r"With the predictor held fixed, $\frac{\partial L}{\partial \beta_s} = -\frac1{1 - \beta_s} \sum_{t \ge s} \bar\alpha_t \frac{\partial L}{\partial \bar\alpha_t}$, where "
    r"$\partial L / \partial \bar\alpha_t$ is the mean of $\frac1T (\epsilon_\theta(x_t, t) - \epsilon)^\top \nabla_x \epsilon_\theta \, (x_0/\sqrt{\bar\alpha_t} - \epsilon/\sqrt{1 - \bar\alpha_t})$.",
    printed="holds",
    why=r"A $\beta_s$ moves all later $\bar\alpha_t$. The term $t = s$ alone is right for the last step only; at the first of six it is 28 percent of the gradient.",
    derivation="bilevel.md#score-matching-moves-with-the-schedule",
    checks=(
        equals(
            "in the betas",
            "Is the closed form the derivative that autograd finds, for an affine predictor of six times?",
            tuple(f"β, step {s}" for s in range(1, FEW + 1)),
            subject=closed_gradient,
            reference=through_autograd,
            controls={
                "the term t = s alone": lambda: closed_gradient(own_step=True),
                "without 1/(1 - β)": lambda: closed_gradient() * (1 - BETA),
            },
        ),
        equals(
            "an independent derivation",
            "Does autograd find the numbers of an independent derivation?",
            tuple(f"β, step {s}" for s in range(1, FEW + 1)),
            subject=through_autograd,
            reference=lambda: INDEPENDENT,
            controls={"the term t = s alone": lambda: closed_gradient(own_step=True)},
        ),
        equals(
            "in the family's parameters",
            "Is it what the torch lower level gives for start, end, τ and ε of the cosine family?",
            NAMES,
            subject=of_family,
            reference=chained,
            controls={
                "the term t = s alone": lambda: chained(own_step=True),
                "the loss of v in place of that of the noise": lambda: of_family("v"),
            },
        ),
    ),
)  # fmt: skip

# --- the optimum ----------------------------------------------------------------------------------------------------

# F*, then end, tau and epsilon at start = 0, from an independent derivation (50-digit Newton).
BEST = {
    5: (0.229469909612690611, 0.47125170051990041, 5.22990032482996352, 0.0517222132271159456),
    10: (0.0683674127506752111, 0.745419253418223875, 2.71157916121153929, 0.0369159222525155891),
    20: (0.0187722114195465193, 0.897561493076479093, 1.93544679571985952, 0.0345681780984645881),
}
TAU_ALONE = {5: 0.366217757162341901, 10: 0.0863711010571956723, 20: 0.0210138055655486259}
VALUE_PLACES = tuple(f"{what}, S = {S}" for S in STEPS for what in ("all three", "τ alone"))
BEST_PLACES = tuple(f"{what}, S = {S}" for S in STEPS for what in ("end", "τ", "ε"))
SCATTERED = 300


def values(S: int, form: Form = "released") -> tuple[float, float]:
    return optimum(S, form).value, optimum(S, form, ("tau",)).value


@cache
def scattered(S: int) -> float:
    """The least F of random schedules, in a box that holds the optima."""
    draws = np.random.default_rng(S).random((SCATTERED, 3))
    low, high = np.array([0.3, 0.5, 0.0]), np.array([1.0, 8.0, 0.1])
    return min(problem(S).objective((0.0, *map(float, low + (high - low) * row))) for row in draws)


def torch_output(S: int, point: Point, form: Form = "released", predictor_of: Point | None = None) -> Gaussian:
    """The exact law of torch DDIM with the affine predictor: of two coordinates and two nodes each."""
    exact = GaussianData(Family("cosine", T, form), S)
    with torch.no_grad():
        levels = exact.levels(many(point))[..., 0]
        u = exact.best(many(predictor_of or point))
        ends = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]], dtype=torch.float64)
        x0 = ddim(exact.network, u, ends, levels, exact.times)[0]
    return Gaussian.diagonal(x0.mean(0).numpy(), x0.var(0, unbiased=False).numpy())


def at_both(S: int) -> tuple[Point, Point]:
    return COSINE, tuple(map(float, optimum(S).parameters))


def by_torch(form: Form = "released", predictor: Point | None = None) -> np.ndarray:
    return np.array([w2_squared(torch_output(S, point, form, predictor), DATA) for S in STEPS for point in at_both(S)])


def schedule_figure(context: object) -> tuple[Figure, ...]:
    panels = []
    for S in STEPS:
        visited = schedules.ddim_grid(T, S) + 1
        curves = []
        for label, point in zip(("default cosine", "optimum"), at_both(S), strict=True):
            levels = schedules.cosine_family(T, *point, form="released")
            shown = np.arange(0, T + 1, 10)
            curves.append(Series(label, tuple(map(float, shown)), tuple(map(float, levels[shown]))))
            if label == "optimum":
                dots = tuple(map(float, visited)), tuple(map(float, levels[visited]))
                curves.append(Series("visited times", *dots, style="points"))
        panels.append(Panel(f"S = {S}", tuple(curves)))
    tau = np.geomspace(0.5, 20.0, 80)
    F = problem(10).objective
    valley = tuple(
        Series(f"end = {end:g}", tuple(map(float, tau)), tuple(F((0.0, end, float(t), 0.0369)) for t in tau))
        for end in (0.4, 0.55, 0.745, 0.9, 1.0)
    )
    return (
        Figure(
            name="schedules",
            title="The default cosine schedule and the best of its family, for a sampler of S steps",
            caption="Few steps want a schedule that stops short of pure noise: with five steps the best one ends at 0.029, although sampling starts from N(0, I). More steps bring it back towards the default.",
            alt="Three panels of the signal level against time. The optimum falls earlier than the default for five steps and ends above zero; for twenty steps it has come closer.",
            kind="panels",
            x_label="time t",
            y_label="signal level",
            panels=tuple(panels),
        ),
        Figure(
            name="valley",
            title="F against τ at five values of end (S = 10, ε = 0.0369, start = 0)",
            caption="A valley: every end has a τ that nearly makes up for it, and the bottoms differ far less than the walls. Parameters are a poor measure of how far a search has come.",
            alt="Five curves of F against tau on log scales, each with one minimum; a smaller end has its minimum at a larger tau. The lowest is that of end 0.745.",
            x_label="power τ",
            y_label="F = squared 2-Wasserstein distance",
            x_scale="log",
            y_scale="log",
            series=valley,
        ),
    )


def optimum_table(context: object) -> tuple[Table, ...]:
    rows = []
    for S in STEPS:
        best, chen = optimum(S), optimum(S, "chen")
        rows.append(
            (
                str(S),
                f"{problem(S).objective(COSINE):.6f}",
                f"{values(S)[1]:.6f}",
                f"{best.value:.6f}",
                f"{problem(S).levels(best.parameters)[-1]:.5f}",
                f"{chen.value:.6f}",
            )
        )
    return (
        Table(
            name="optimum",
            title="The least F of the cosine family",
            caption="Nearly half of what five steps gain is gained by not ending in pure noise, which Chen's form always does.",
            columns=(
                Column("S"),
                Column("default"),
                Column("best τ"),
                Column("best end, τ, ε"),
                Column(r"its $\bar\alpha_T$"),
                Column("best, Chen's form"),
            ),
            rows=tuple(rows),
        ),
    )


OPTIMUM = Claim(
    id="generative-bilevel.optimal-schedule-of-gaussian-data",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/bilevel.md, for the problem of Generative bilevel, section 4.2",
    title="The schedule problem has a known answer on Gaussian data: half the distance for 5 steps, a quarter less for 20",
    statement=r"With the exact predictor, data $N((1, -\tfrac12), \mathrm{diag}(\tfrac14, 4))$ and the released cosine family of 1000 steps, the least $W_2^2$ over end, $\tau$, $\epsilon$ is "
    r"$0.2294699$, $0.0683674$, $0.0187722$ for $S = 5, 10, 20$ steps of DDIM, where the default schedule has $0.4647878$, $0.1055050$, $0.0255764$. In Chen's form it is $0.3374$, $0.0788$, $0.0193$.",
    printed="holds",
    why=r"A yardstick for every method that learns a schedule. Part of the gain is bought with $\bar\alpha_T > 0$, which Chen's form does not allow: a start from the wrong law, traded for smaller steps.",
    derivation="bilevel.md#the-gradient-in-the-schedule",
    checks=(
        equals(
            "values",
            "Are the least values those of an independent derivation?",
            VALUE_PLACES,
            subject=lambda: np.array([values(S) for S in STEPS]).ravel(),
            reference=lambda: np.array([(BEST[S][0], TAU_ALONE[S]) for S in STEPS]).ravel(),
            controls={
                "Chen's form": lambda: np.array([values(S, "chen") for S in STEPS]).ravel(),
                "the default": lambda: np.repeat([problem(S).objective(COSINE) for S in STEPS], 2),
            },
        ),
        equals(
            "parameters",
            "Are the best parameters those of an independent derivation?",
            BEST_PLACES,
            subject=lambda: np.array([optimum(S).parameters[1:] for S in STEPS]).ravel(),
            reference=lambda: np.array([BEST[S][1:] for S in STEPS]).ravel(),
            controls={"Chen's form": lambda: np.array([optimum(S, "chen").parameters[1:] for S in STEPS]).ravel()},
            tolerance=2e-6,
            margin_from="2e-6 of the largest entry: F is flat, and its minimum is found to 1e-12",
        ),
        equals(
            "DDIM in torch",
            "Does torch DDIM with the torch family and its best predictor have the stated distances, at the default and the optimum?",
            tuple(f"{what}, S = {S}" for S in STEPS for what in ("default", "optimum")),
            subject=by_torch,
            reference=lambda: np.array([(problem(S).objective(COSINE), BEST[S][0]) for S in STEPS]).ravel(),
            controls={
                "the default schedule's predictor everywhere": lambda: by_torch(predictor=COSINE),
                "Chen's form at the same parameters": lambda: by_torch("chen"),
            },
            tolerance=1e-8,
            margin_from="1e-8: the schedule's last level may be 2e-9",
        ),
        at_least(
            "nothing better",
            f"Is F at least that large for {SCATTERED} random schedules of each S, and in Chen's form?",
            tuple(f"{what}, S = {S}" for S in STEPS for what in ("random", "Chen's form")),
            subject=lambda: (
                np.array([(scattered(S), values(S, "chen")[0]) for S in STEPS]).ravel(),
                np.repeat([BEST[S][0] for S in STEPS], 2),
            ),
            controls={
                "the optimum over τ alone": lambda: (
                    np.array([(scattered(S), values(S, "chen")[0]) for S in STEPS]).ravel(),
                    np.repeat([TAU_ALONE[S] for S in STEPS], 2),
                )
            },
            tolerance=1e-9,
        ),
    ),
    figures=schedule_figure,
    tables=optimum_table,
)  # fmt: skip

# --- start and end --------------------------------------------------------------------------------------------------

MOVED_AT = (250, 500, 750)
ALONG = {"released": 1e-4, "chen": 0.1}
# dF/d start and dF/d end at AWAY, S = 10, from an independent derivation.
START_END = {
    "released": (0.726446640886514547, -0.72719931303630378),
    "chen": (0.0370137523545980171, 0.0573299219334728737),
}
FORM_NAMES = {"released": "released", "chen": "Chen's"}


def moved(form: Form, like: Form | None = None, with_epsilon: bool = True) -> np.ndarray:
    """alpha_bar of the torch family after a move along the line of the form `like`."""
    kind = like or form
    unit = T if kind == "released" else 1
    start, end, tau, epsilon = AWAY
    h = ALONG[kind]
    point = (start + h * (start - unit), end + h * (end - unit), tau, epsilon + h * (1 + epsilon) * with_epsilon)
    return Family("cosine", T, form)(tensors(point))[list(MOVED_AT)].numpy()


def in_forms(entry: Callable[[Form], Any]) -> np.ndarray:
    return np.concatenate([np.atleast_1d(entry(form)) for form in FORMS])


def opposite(form: Form) -> np.ndarray:
    by_start = problem(10, form).gradient(AWAY)[0]
    return np.array([by_start, -by_start])


def mixed_levels(form: Form) -> np.ndarray:
    """start and end of one optimum with the epsilon of the other."""
    three, four = optimum(10, form).parameters, optimum(10, form, NAMES).parameters
    return problem(10, form).levels([*four[:3], three[3]])


START_AND_END = Claim(
    id="generative-bilevel.start-and-end-are-redundant",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, section 6.2",
    title="That start and end move inversely is a property of the parametrisation; with ε there is one parameter too many",
    statement="The learned parameters of the cosine schedule are nontrivial: start and end update inversely.",
    printed="holds-corrected",
    corrected=r"In the released form $\partial_{\mathrm{start}} F = -\partial_{\mathrm{end}} F + O(1/T)$ for every $F$, data and network; in Chen's form the two derivatives are unrelated. In both, "
    r"$\bar\alpha$ is constant along a straight line, $(\mathrm{start} - U, \mathrm{end} - U, 0, 1 + \epsilon)$ with $U = T$ (released) or $1$ (Chen): freeing start gains nothing.",
    why="A learned (start, end, ε) has no meaning of its own. Runs are to be compared by their schedules, not by their parameters.",
    derivation="bilevel.md#redundant-parameters",
    checks=(
        equals(
            "gradients",
            "What are the derivatives of F in start and end, at (0.2, 0.9, 2, 0.02), in an independent derivation?",
            tuple(f"d/d{name}, {FORM_NAMES[form]}" for form in FORMS for name in ("start", "end")),
            subject=lambda: in_forms(lambda form: problem(10, form).gradient(AWAY)[:2]),
            reference=lambda: in_forms(lambda form: np.array(START_END[form])),
            printed=lambda: in_forms(opposite),
            controls={
                "the forms exchanged": lambda: in_forms(
                    lambda form: problem(10, "chen" if form == "released" else "released").gradient(AWAY)[:2]
                )
            },
        ),
        equals(
            "a line of one schedule",
            "Is the torch family after a long move along the line the same schedule?",
            tuple(f"t = {t}, {FORM_NAMES[form]}" for form in FORMS for t in MOVED_AT),
            subject=lambda: in_forms(moved),
            reference=lambda: in_forms(lambda form: schedules.cosine_family(T, *AWAY, form=form)[list(MOVED_AT)]),
            controls={
                "ε left alone": lambda: in_forms(lambda form: moved(form, with_epsilon=False)),
                "Chen's line in both": lambda: in_forms(lambda form: moved(form, "chen")),
            },
        ),
        equals(
            "freeing start",
            "Is the least F over all four parameters the least over end, τ and ε, S = 10?",
            tuple(FORM_NAMES[form] for form in FORMS),
            subject=lambda: in_forms(lambda form: optimum(10, form, NAMES).value),
            reference=lambda: in_forms(lambda form: optimum(10, form).value),
            controls={
                "start and τ alone": lambda: in_forms(lambda form: optimum(10, form, ("start", "tau")).value),
                "τ alone": lambda: in_forms(lambda form: optimum(10, form, ("tau",)).value),
            },
            tolerance=1e-10,
        ),
        equals(
            "one schedule, other parameters",
            "Do the two searches, which end at different start and end, find the same schedule?",
            tuple(f"step {i}, {FORM_NAMES[form]}" for form in FORMS for i in range(1, 11)),
            subject=lambda: in_forms(lambda form: problem(10, form).levels(optimum(10, form, NAMES).parameters)),
            reference=lambda: in_forms(lambda form: problem(10, form).levels(optimum(10, form).parameters)),
            controls={"start and end of one, ε of the other": lambda: in_forms(mixed_levels)},
            tolerance=2e-6,
            margin_from="2e-6: F is flat, and its minimum is found to 1e-12",
        ),
    ),
)  # fmt: skip

# --- perturbations that leave the range -----------------------------------------------------------------------------

DELTA = 0.01


def broken(start: np.ndarray, end: np.ndarray, tau: float = 1.0, epsilon: float = 0.008) -> np.ndarray:
    """Which released cosine schedules (n,) have a beta that is no number, by computing them."""
    y = (np.arange(T + 1) * (end - start)[:, None] + start[:, None]) / T
    f = np.clip(np.cos(0.5 * math.pi * (y + epsilon) / (1 + epsilon)), 0.0, 1.0) ** (2 * tau)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isnan(1 - f[:, 1:] / f[:, :-1]).any(1))


@cache
def by_bisection() -> tuple[float, float]:
    """The shares of failing estimates, one evaluation and two: normal tails in end, averaged over start.

    For each perturbation of start on Gauss-Hermite nodes, the least perturbation of end that breaks the schedule.
    """
    v, weights = np.polynomial.hermite_e.hermegauss(20)
    low, high = np.full(len(v), -8.0), np.full(len(v), 8.0)
    for _ in range(44):
        middle = 0.5 * (low + high)
        fails = broken(DELTA * v, 1 + DELTA * middle)
        low, high = np.where(fails, low, middle), np.where(fails, middle, high)
    # The other point fails where v_end < -high[::-1]: the nodes are symmetric.
    above, below = ndtr(-high), ndtr(-high[::-1])
    assert np.all(high + high[::-1] > 0), "the two tails must not overlap"
    share = weights / weights.sum()
    return float(share @ above), float(share @ (above + below))


def invalid(perturbed: tuple[str, ...] = NAMES) -> np.ndarray:
    return np.array(
        [schedule_learning.invalid_share(COSINE, DELTA, T, perturbed, two_sided) for two_sided in (False, True)]
    )


@cache
def after_projection(project: bool = True, count: int = 400) -> float:
    """The share of perturbed schedules that are no schedules, after `Family.valid` or without it."""
    rows = np.array(COSINE) + DELTA * np.random.default_rng(5).standard_normal((count, 4))
    x = {n: torch.from_numpy(rows[:, i].copy()) for i, n in enumerate(PARAMETERS)}
    if project:
        x = Family("cosine", T, "released").valid(x)
    return float(np.mean(broken(x["start"].numpy(), x["end"].numpy())))


INVALID = Claim(
    id="generative-bilevel.released-perturbations-leave-the-range",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=ZO_CODE,
    title="At the released defaults 94 of 100 two-point estimates evaluate a schedule with a 0/0 in it",
    statement=r"The parameters are perturbed by $\pm\delta v$, $\delta = 0.01$, and both perturbed schedules are sampled with.",
    printed="refuted",
    corrected=r"A $\beta$ is $0/0$ as soon as $(T - 1)(\mathrm{end} - \mathrm{start}) + \mathrm{start} \ge T$. From the defaults $(0, 1, 1, 0.008)$ one of the two points does that with the probability $2\Phi(-\rho)$, "
    r"$\rho = 1 / (\delta \sqrt{(T - 1)^2 + (T - 2)^2})$: 94.354 percent.",
    why="The default lies within 1/T of the edge of where the cosine is positive, the perturbation is ten times as long. The parameters are clamped after an update, but not when they are perturbed. Projecting the perturbed points as well costs nothing.",
    derivation="bilevel.md#start-and-end",
    checks=(
        equals(
            "share",
            "Is that the share, by bisection of computed schedules in end, averaged over start?",
            ("one evaluation", "two-point estimate"),
            subject=invalid,
            reference=lambda: np.array(by_bisection()),
            printed=lambda: np.zeros(2),
            controls={
                "end perturbed alone": lambda: invalid(("end", "tau", "epsilon")),
                "a step of Chen's form": lambda: np.array([0.5, 1.0]),
            },
            tolerance=1e-8,
            margin_from="1e-8: the rounding of a cosine that is nearly zero",
        ),
        equals(
            "number",
            "Is it 94.354 percent of the two-point estimates, and 92.026 percent if end alone is perturbed?",
            ("all four", "end alone"),
            subject=lambda: np.array([invalid()[1], invalid(("end",))[1]]),
            reference=lambda: np.array([0.94354, 0.92026]),
            controls={"one evaluation in place of two": lambda: np.array([invalid()[0], invalid(("end",))[0]])},
            tolerance=5e-6,
            margin_from="half of the last digit",
        ),
        equals(
            "projected",
            "Is every perturbed schedule well-defined once it is moved back into the range?",
            ("share that is not",),
            subject=lambda: after_projection(),
            reference=lambda: 0.0,
            controls={"as released, without it": lambda: after_projection(project=False)},
        ),
    ),
)  # fmt: skip

# --- the sigmoid family ---------------------------------------------------------------------------------------------


def sigmoid_case(point: Point, prior: bool = True) -> np.ndarray:
    """alpha_bar_T, W2^2 of N(0, I) to the law of x_T, and W2^2 of torch DDIM's output (from the former or the latter)."""
    exact = GaussianData(Family("sigmoid", T, "released"), 10)
    with torch.no_grad():
        levels, u = exact.levels(many(point))[..., 0], exact.best(many(point))
        last = float(levels[0, -1])
        noisy = Gaussian.diagonal(math.sqrt(last) * DATA.mean, last * np.diag(DATA.cov) + 1 - last)
        ends = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]]], dtype=torch.float64)
        if not prior:
            ends = torch.from_numpy(noisy.mean + np.sqrt(np.diag(noisy.cov)) * ends.numpy())
        x0 = ddim(exact.network, u, ends, levels, exact.times)[0]
    output = Gaussian.diagonal(x0.mean(0).numpy(), x0.var(0, unbiased=False).numpy())
    return np.array([last, w2_squared(Gaussian.diagonal([0, 0], [1, 1]), noisy), w2_squared(output, DATA)])


def sigmoid_theory() -> np.ndarray:
    def logistic(y: float) -> float:
        return 1 / (1 + math.exp(-y))

    last = logistic(0.008) / logistic(1.008)
    gaps = sum(last * m**2 + (math.sqrt(last * s**2 + 1 - last) - 1) ** 2 for m, s in zip(MEAN, STD, strict=True))
    return np.array([last, gaps, ScheduleProblem(DATA, "sigmoid", "released", T, 10).objective(COSINE)])


SIGMOID_DEFAULTS = Claim(
    id="generative-bilevel.released-sigmoid-starts-from-the-cosine",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source="Generative bilevel, released code: the defaults of the noise-schedule experiment, with the sigmoid scheduler",
    title="The released sigmoid schedule is started from the cosine's defaults, with which it stops at a signal level of 0.685",
    statement=r"The sigmoid schedule is learned from its default, start $= -3$, end $= 3$, $\tau = 1$, $\epsilon = 0$, which ends near pure noise.",
    printed="refuted",
    corrected=r"The defaults of the command line are $(0, 1, 1, 0.008)$ for both families. The sigmoid then ends at $\bar\alpha_T = \sigma(0.008)/\sigma(1.008) = 0.6852$, while sampling starts from $N(0, I)$: "
    r"$W_2^2 = 1.298$ after ten steps with the exact predictor, where $(-3, 3, 1, 0)$ has $0.0846$.",
    why="Unless the four initial values are given by hand, the sampler starts from pure noise where two thirds of the signal should still be there. The exact predictor does not make good for that.",
    derivation="bilevel.md#the-noise-schedule-problem-on-gaussian-data",
    checks=(
        equals(
            "at the defaults",
            "Are the last level, the distance of N(0, I) from the law of x_T, and that of ten torch DDIM steps from the data as stated?",
            ("last level", "prior", "output"),
            subject=lambda: sigmoid_case(COSINE),
            reference=sigmoid_theory,
            printed=lambda: sigmoid_case(SIGMOID),
            controls={"started from the law of x_T": lambda: sigmoid_case(COSINE, prior=False)},
        ),
        equals(
            "numbers",
            "Are they 0.685204 and 1.29824, and 0.00917494 and 0.0845949 from the family's own default?",
            ("last level", "output", "last level, (-3, 3, 1, 0)", "output, (-3, 3, 1, 0)"),
            subject=lambda: np.concatenate([sigmoid_case(point)[[0, 2]] for point in (COSINE, SIGMOID)]),
            reference=lambda: np.array([0.685204, 1.29824, 0.00917494, 0.0845949]),
            controls={
                "the defaults exchanged": lambda: np.concatenate([sigmoid_case(p)[[0, 2]] for p in (SIGMOID, COSINE)])
            },
            tolerance=5e-6,
            margin_from="half of the last digit",
        ),
    ),
)  # fmt: skip

# --- the toy with one weight per time -------------------------------------------------------------------------------

TOY = LinearPredictorToy()
TAUS = (1.0, 2.0)
GAMMAS = (1.0, 10.0, 100.0, 1e4)
# F_gamma' from an independent derivation, tau = 1 and 2.
PENALTY = {
    1.0: (-0.000130108616289875132, 0.00339152382892331955, 0.00691808820819023503, 0.00752969768432197029),
    2.0: (-0.000540725700212161222, -0.00233646433097313601, 0.00189843014228227296, 0.00517173565920098233),
}
PENALTY_PLACES = tuple(f"γ = {gamma:g}, τ = {tau:g}" for tau in TAUS for gamma in GAMMAS)
LEVELS = Family("cosine", TOY.T, "released", {"start": 0.0, "end": 0.9, "epsilon": 0.008})


def weighted(u: Params, x: Tensor, t: Tensor) -> Tensor:
    return u["k"][t - 1][:, None] * x


def toy_upper(x: Params, u: Params, draw: object) -> Tensor:
    """(output deviation - data deviation)^2 by torch DDIM; the output of a start at 1 is its deviation."""
    one = torch.ones(1, 1, dtype=torch.float64)
    times = torch.arange(1, TOY.T + 1)
    slope = ddim(weighted, u, one, LEVELS(x)[1:], times, "epsilon")
    return (slope.squeeze() - math.sqrt(TOY.variance)) ** 2


def toy_lower() -> ScoreMatching:
    s = math.sqrt(TOY.variance)
    rows = [(x, e, t) for t in range(1, TOY.T + 1) for x in (-s, s) for e in (-1.0, 1.0)]
    x, e, t = (torch.tensor(column) for column in zip(*rows, strict=True))
    batch = x.double()[:, None], e.double()[:, None], t
    return ScoreMatching(LEVELS, weighted, lambda draw: batch, "epsilon")


def derivatives(value: Callable[[Tensor], Tensor], k: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = k.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient]
    return gradient.detach(), torch.stack(rows)


class Newton:
    """A solver of both lower problems to rounding, by Newton's method on autograd's Hessian from the last point."""

    def __init__(self, trains_z: bool = True) -> None:
        self.trains_z = trains_z

    def solve(self, x: Params, u: Params, gamma: float | None, update: int) -> Params:
        lower, share = toy_lower(), 1 / gamma if gamma is not None and self.trains_z else 0.0

        def value(k: Tensor) -> Tensor:
            return lower(x, {"k": k}, (update,)) + share * toy_upper(x, {"k": k}, (update,))

        k = torch.from_numpy(TOY.lower_solution(float(x["tau"])))
        for _ in range(40):
            gradient, hessian = derivatives(value, k)
            curvatures, basis = torch.linalg.eigh(hessian)
            step = basis @ ((basis.T @ gradient) / curvatures.abs().clamp(min=1e-8))
            if float(step.abs().max()) < 1e-12:
                break
            size = 1.0
            while float(value(k - size * step)) > float(value(k)) + 1e-14 and size > 1e-6:
                size /= 2
            k = k - size * step
        return {"k": k}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@cache
def torch_penalty(tau: float, gamma: float, trains_z: bool = True) -> float:
    """The gradient that `PenaltyBilevel` estimates in its first update, with exact solvers."""
    records: list[Record] = []
    solver: Solver = Newton(trains_z)
    run = PenaltyBilevel(
        Smooth(toy_upper),
        Smooth(toy_lower()),
        solver,
        {"tau": torch.tensor(tau, dtype=torch.float64)},
        {"k": torch.zeros(TOY.T, dtype=torch.float64)},
        gamma=gamma,
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1e-3),
        callback=lambda update, record: records.append(record),
    )
    run.run(1)
    return float(records[0].gradient["tau"])


def on_toy(gradient: Callable[[float, float], float]) -> np.ndarray:
    return np.array([gradient(tau, gamma) for tau in TAUS for gamma in GAMMAS])


def by_differences(tau: float) -> float:
    """df/dtau with the weights held at k*."""
    k, h = TOY.lower_solution(tau), 1e-3
    f = [TOY.upper(tau + i * h, k) for i in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)


def toy_figure(context: object) -> tuple[Figure, ...]:
    tau = np.linspace(0.4, 3.0, 40)
    x = tuple(map(float, tau))
    curves = [Series("F′", x, tuple(TOY.gradient(t) for t in x))]
    curves += [
        Series(f"penalty, γ = {g:g}", x, tuple(TOY.penalty_gradient(t, g) for t in x)) for g in (1.0, 10.0, 100.0)
    ]
    curves.append(Series("∂f/∂τ alone", x, tuple(by_differences(t) for t in x)))
    curves.append(Series("zero", (x[0], x[-1]), (0.0, 0.0), style="dashed"))
    return (
        Figure(
            name="toy-gradients",
            title="The gradient in τ on the toy: the true one, the penalty's, and what is left if z is never trained",
            caption="With γ = 1, the released default, the penalty gradient has the wrong sign for every τ above 1 that is shown; with γ = 10 above 1.4, with γ = 100 above 2.4. Without a trained z the term through the predictor is missing, whatever γ is.",
            alt="Gradients against tau. The true one stays positive beyond tau = 0.5; those of the penalty fall below it and cross zero, the sooner the smaller gamma is. The direct term alone lies above the true curve from tau = 0.6 on.",
            x_label="power τ",
            y_label="derivative in τ",
            series=tuple(curves),
        ),
    )


SIGN = Claim(
    id="generative-bilevel.penalty-gradient-on-a-schedule",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/bilevel.md, for Generative bilevel, (4), (15) and Algorithm 6",
    title="On a schedule toy the penalty gradient with γ = 1, the released default, has the wrong sign even with exact solvers",
    statement=r"Data $N(0, \tfrac14)$, eight DDIM steps, one weight per time, upper variable $\tau$: $F' = 0.0075362$ at $\tau = 1$ and $0.0052156$ at $2$; $F_\gamma' = -0.0001301$ and $-0.0005407$ with $\gamma = 1$. "
    r"At $\tau = 2$ the sign is wrong for $\gamma = 10$ too. $\gamma (F_\gamma' - F')$ tends to $-0.0649989$ and $-0.4395913$.",
    printed="holds",
    why=r"The bias of order $1/\gamma$ is not small where $F'$ is: at $\tau = 2$ it takes $\gamma = 84$ or so before $F_\gamma'$ is even positive to first order.",
    derivation="bilevel.md#a-predictor-with-one-weight-per-time",
    checks=(
        equals(
            "values",
            "Is the penalty gradient by the envelope theorem that of an independent derivation?",
            PENALTY_PLACES,
            subject=lambda: on_toy(TOY.penalty_gradient),
            reference=lambda: np.array([PENALTY[tau] for tau in TAUS]).ravel(),
            controls={
                "u* for the penalty problem's solution": lambda: on_toy(lambda tau, gamma: by_differences(tau)),
                "F′ itself": lambda: on_toy(lambda tau, gamma: TOY.gradient(tau)),
            },
        ),
        equals(
            "penalty method in torch",
            "Is it what `PenaltyBilevel` estimates, with Newton's method as its solver and autograd through the sampler?",
            PENALTY_PLACES,
            subject=lambda: on_toy(torch_penalty),
            reference=lambda: on_toy(TOY.penalty_gradient),
            controls={"z not trained": lambda: on_toy(lambda tau, gamma: torch_penalty(tau, gamma, False))},
            tolerance=1e-8,
            margin_from="1e-8: γ = 10000 multiplies a difference of two sums",
        ),
        equals(
            "bias",
            "Is 10000 times the remaining difference at γ = 10000 the limit, to first order?",
            tuple(f"τ = {tau:g}" for tau in TAUS),
            subject=lambda: np.array([1e4 * (TOY.penalty_gradient(tau, 1e4) - TOY.gradient(tau)) for tau in TAUS]),
            reference=lambda: np.array([TOY.bias_limits(tau)[1] for tau in TAUS]),
            controls={
                "without the half": lambda: np.array([2 * TOY.bias_limits(tau)[1] for tau in TAUS]),
                "the limit of the values": lambda: np.array([TOY.bias_limits(tau)[0] for tau in TAUS]),
            },
            tolerance=2e-3,
            margin_from="0.002: the next order of 1/γ",
        ),
        at_least(
            "wrong sign",
            "Is F' positive where the penalty gradient is negative?",
            ("F' at τ = 1", "F' at τ = 2", "-F_γ' at τ = 1, γ = 1", "-F_γ' at τ = 2, γ = 1", "-F_γ' at τ = 2, γ = 10"),
            subject=lambda: (
                np.array(
                    [
                        *map(TOY.gradient, TAUS),
                        *(-TOY.penalty_gradient(tau, 1.0) for tau in TAUS),
                        -TOY.penalty_gradient(2.0, 10.0),
                    ]
                ),
                np.full(5, 1e-4),
            ),
            controls={
                "γ = 10000": lambda: (
                    np.array(
                        [*map(TOY.gradient, TAUS), *(-TOY.penalty_gradient(tau, 1e4) for tau in (*TAUS, TAUS[-1]))]
                    ),
                    np.full(5, 1e-4),
                )
            },
        ),
    ),
    figures=toy_figure,
)  # fmt: skip

# --- an optimum that is no good reverse process ---------------------------------------------------------------------

CANCELLING = 0.3622848717


def slopes_at(tau: float) -> tuple[float, float, float]:
    """Output deviation, Var x_T, and the deviation that the same steps would give from the law of x_T."""
    a = LEVELS({"tau": torch.tensor(tau, dtype=torch.float64)})[1:].numpy()
    then = np.concatenate([[1.0], a[:-1]])
    marginal = a * TOY.variance + 1 - a
    slope = float(np.prod((np.sqrt(then * a) * TOY.variance + np.sqrt((1 - then) * (1 - a))) / marginal))
    return slope, float(marginal[-1]), slope * math.sqrt(marginal[-1])


@cache
def root() -> float:
    return float(brentq(lambda tau: slopes_at(tau)[0] - math.sqrt(TOY.variance), 0.2, 1.0, xtol=1e-14))


def cancelled(tau: float) -> np.ndarray:
    output, marginal, own = slopes_at(tau)
    return np.array([math.sqrt(TOY.objective(tau)), marginal, own])


CANCEL = Claim(
    id="generative-bilevel.optimal-schedule-cancels-errors",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/bilevel.md, for the problem of Generative bilevel, section 4.2",
    title="A schedule may be optimal because its errors cancel, not because its steps are good",
    statement=r"On the toy $F = 0$ at $\tau = 0.3622848717$. There $\mathrm{Var}\, x_T = 0.80554$, not $1$: sampling starts too wide by as much as the eight steps lose of the spread. Started from the law of $x_T$, they would end at the deviation $0.44876$ in place of $0.5$.",
    printed="holds",
    why="The upper objective sees the samples only. A learned schedule is tuned to this number of steps and this prior: it need not be better with more steps, or where both are changed.",
    derivation="bilevel.md#the-gradient-in-the-schedule",
    checks=(
        equals(
            "root",
            "Does the exact output have the data's deviation at that τ, found by bisection of a product of eight slopes?",
            ("τ",),
            subject=lambda: root(),
            reference=lambda: CANCELLING,
            controls={"the default": lambda: 1.0},
            tolerance=1e-10,
            margin_from="the last digit that is stated",
        ),
        equals(
            "what cancels",
            "Are the error of the output, Var x_T, and the deviation from the law of x_T as stated?",
            ("root of F", "variance of the last latent", "deviation from its own law"),
            subject=lambda: cancelled(CANCELLING),
            reference=lambda: np.array([0.0, 0.80554, 0.44876]),
            controls={
                "τ = 1": lambda: cancelled(1.0),
                "a process whose steps lose nothing": lambda: np.array([0.0, 1.0, 0.5]),
            },
            tolerance=5e-6,
            margin_from="half of the last digit that is stated",
        ),
    ),
)  # fmt: skip

# --- theta_z is never trained ---------------------------------------------------------------------------------------


def miniature(hold: str, updates: int = 3) -> tuple[float, float]:
    """|z - y| and how far the optimizer's own parameters went, after updates of z that start from y.

    `hold`: which parameters the optimizer of z holds: those of the module that the copy of y replaces ("replaced"),
    those of the copy ("current"), or those of one module into which y is loaded ("loaded").
    """
    x, target = torch.linspace(-1, 1, 8).double()[:, None], torch.linspace(0, 3, 8).double()[:, None]
    network = torch.nn.Linear(1, 1).double()
    theta_y = copy.deepcopy(network)
    held = list(network.parameters())
    before = torch.cat([p.detach().flatten().clone() for p in held])
    optimizer = torch.optim.AdamW(held, lr=0.1)
    for _ in range(updates):
        if hold == "loaded":
            network.load_state_dict(theta_y.state_dict())
        else:
            network = copy.deepcopy(theta_y)
        if hold == "current":
            optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        optimizer.zero_grad()
        current = list(network.parameters())
        loss = (network(x) - target).square().mean()
        for p, g in zip(current, torch.autograd.grad(loss, current), strict=True):
            p.grad = g
        optimizer.step()
    apart = torch.cat(
        [(p - q).detach().flatten() for p, q in zip(network.parameters(), theta_y.parameters(), strict=True)]
    )
    gone = torch.cat([p.detach().flatten() for p in held]) - before
    return float(apart.norm()), float(gone.norm())


UNTRAINED = Claim(
    id="generative-bilevel.released-z-is-never-trained",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source="Generative bilevel, released code: the training loop of the noise-schedule experiment",
    title="The released schedule learner never trains its second network: what is left is zeroth-order descent on f alone",
    statement=r"$z$ takes a step on $f/\gamma + g$ in every update, and the schedule moves along $\nabla_x f(x, z)/\gamma + \nabla_x g(x, z) - \nabla_x g(x, y)$.",
    printed="refuted",
    corrected=r"The optimizer of $z$ holds the parameters of a module that a copy of $y$ replaces in every update. They have no gradients, so that its step does nothing: $z = y$, $\nabla_x g(x, z) - \nabla_x g(x, y)$ is the difference of two batches, with mean zero, and the expected direction is that of $\nabla_x f(x, y)$.",
    why=r"The influence of the schedule on the samples through the trained network, which is what makes the problem a bilevel one, is lost. On the toy the direct term is $0.0091019$ where $F' = 0.0075362$ ($\tau = 1$), and $0.0068575$ where $F' = 0.0052156$ ($\tau = 2$).",
    derivation="bilevel.md#a-predictor-with-one-weight-per-time",
    checks=(
        equals(
            "miniature",
            "In three such updates of a linear module by AdamW, do z and the parameters that the optimizer holds stay where they were?",
            ("|z - y|", "way of the held parameters"),
            subject=lambda: np.array(miniature("replaced")),
            reference=lambda: np.zeros(2),
            printed=lambda: np.array(miniature("current")),
            controls={"y loaded into one module": lambda: np.array(miniature("loaded"))},
        ),
        equals(
            "what is left",
            "Is the penalty method's gradient with z = y, in torch, the derivative of f at fixed weights, whatever γ?",
            PENALTY_PLACES,
            subject=lambda: on_toy(lambda tau, gamma: torch_penalty(tau, gamma, False)),
            reference=lambda: np.repeat([0.0091018594, 0.0068574802], len(GAMMAS)),
            printed=lambda: on_toy(TOY.penalty_gradient),
            controls={"F′ itself": lambda: np.repeat([TOY.gradient(tau) for tau in TAUS], len(GAMMAS))},
            tolerance=1e-9,
            margin_from="the digits that are stated",
        ),
        equals(
            "by differences",
            "Are these numbers differences of f with the weights held at their optimum?",
            tuple(f"τ = {tau:g}" for tau in TAUS),
            subject=lambda: np.array([by_differences(tau) for tau in TAUS]),
            reference=lambda: np.array([0.0091018594, 0.0068574802]),
            controls={"weights that follow": lambda: np.array([TOY.gradient(tau) for tau in TAUS])},
        ),
    ),
)  # fmt: skip

# --- the zeroth-order estimator -------------------------------------------------------------------------------------

G = np.array([0.5, -1.0, 2.0, 0.3])
H = np.array([[2.0, 0.3, 0.0, 0.1], [0.3, 1.0, -0.2, 0.0], [0.0, -0.2, 0.5, 0.4], [0.1, 0.0, 0.4, -1.0]])
N = len(G)
STEP, RELEASED_STEP, SIGMA = 0.5, 0.01, 0.05
BLOCK = 1 << 15
COMPONENTS = tuple(f"component {i}" for i in range(1, N + 1))
AND_SECOND = (*COMPONENTS, "second moment")
ESTIMATORS = ("central", "forward", "residual", "released residual")


def quadratic(z: Any) -> Any:
    """g z + z H z / 2 at (..., n), NumPy or torch."""
    g, h = (torch.from_numpy(G), torch.from_numpy(H)) if isinstance(z, Tensor) else (G, H)
    return z @ g + 0.5 * ((z @ h) * z).sum(-1)


def estimate(kind: str, nu: float, v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Estimates (m, n) at 0 in plain NumPy; w: the direction of the update before."""
    if kind == "central":
        difference = (quadratic(nu * v) - quadratic(-nu * v)) / (2 * nu)
    elif kind == "forward":
        difference = quadratic(nu * v) / nu
    else:
        difference = (quadratic(nu * v) - quadratic(nu * w)) / (nu if kind == "residual" else 2 * nu)
    return difference[:, None] * v


@cache
def by_quadrature(kind: str, nu: float = STEP) -> tuple[float, ...]:
    """Mean and E |estimate|^2 on Gauss-Hermite nodes, exact: degree at most 6 in each direction's entry."""
    x, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()
    v = np.array(list(product(x, repeat=N)))
    p = np.array([math.prod(c) for c in product(weights, repeat=N)])
    if kind in ("central", "forward"):
        found = estimate(kind, nu, v, v)
        return (*map(float, p @ found), float(p @ np.sum(found**2, axis=1)))
    pairs = [np.repeat(v, len(v), axis=0), np.tile(v, (len(v), 1))]
    found, p = estimate(kind, nu, *pairs), np.repeat(p, len(p)) * np.tile(p, len(p))
    return (*map(float, p @ found), float(p @ np.sum(found**2, axis=1)))


def moments(kind: str, nu: float = STEP) -> np.ndarray:
    if kind == "central":
        found = zeroth_order.central_moments(G, nu)
    elif kind == "forward":
        found = zeroth_order.forward_moments(G, H, nu)
    else:
        found = zeroth_order.residual_moments(G, H, nu, 1 / nu if kind == "residual" else 1 / (2 * nu))
    return np.append(found.mean, found.second_moment)


Noisy = Callable[[int, torch.Generator], Callable[[], Tensor | float]]
"""(estimates, source) -> the noise of one evaluation after the other."""


def silent(n: int, source: torch.Generator) -> Callable[[], float]:
    return lambda: 0.0


def independent(n: int, source: torch.Generator) -> Callable[[], Tensor]:
    return lambda: SIGMA * torch.randn(n, generator=source, dtype=torch.float64)


def common(n: int, source: torch.Generator) -> Callable[[], Tensor]:
    held = SIGMA * torch.randn(n, generator=source, dtype=torch.float64)
    return lambda: held


def from_torch(nu: float, noise: Noisy, of: Callable[[Tensor], Tensor]) -> Sampler:
    """Independent estimates of the torch `ZerothOrder` at 0, one per problem of a batch, and `of` them."""

    def sampler(stream: Stream) -> Callable[[int], np.ndarray]:
        def draw(block: int) -> np.ndarray:
            source = generator(stream, block)
            added = noise(BLOCK, source)
            level = ZerothOrder(lambda x, u, draw: quadratic(x["p"]) + added(), nu, lambda draw: source)
            found = level.gradient({"p": torch.zeros(BLOCK, N, dtype=torch.float64)}, {}, (0,), "x")["p"]
            return of(found).numpy()

        return draw

    return sampler


def from_numpy(kind: str, nu: float, of: Callable[[np.ndarray], np.ndarray]) -> Sampler:
    def sampler(stream: Stream) -> Callable[[int], np.ndarray]:
        def draw(block: int) -> np.ndarray:
            v, w = stream.child("block", block).generator().standard_normal((2, BLOCK, N))
            return of(estimate(kind, nu, v, w))

        return draw

    return sampler


def itself(found: Any) -> Any:
    return found


def squared(found: Any) -> Any:
    return (found**2).sum(-1)[:, None]


MEAN_MARGIN = 0.1
FROM_MEAN = "0.1, 4 % of |g| = 2.31; declared before sampling"

ZEROTH = Claim(
    id="generative-bilevel.zeroth-order-moments",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, (14), as reconstructed",
    title="The two-point estimate is unbiased on quadratics, with a second moment of n + 2 squared gradients, whatever its step",
    statement=r"$\hat g = \frac{f(y + \nu v) - f(y - \nu v)}{2\nu} v$, $v \sim N(0, I_n)$, is an estimate of $\nabla f(y)$. On a quadratic $E \hat g = \nabla f(y)$ and $E |\hat g|^2 = (n + 2) |\nabla f(y)|^2$, for every $\nu$ and Hessian. "
    r"The forward difference has $\frac{\nu^2}{4} (n + 4) \{(\mathrm{tr} H)^2 + 2\, \mathrm{tr} H^2\}$ more.",
    printed="holds",
    why="The variance does not fall with ν: it is the price of n dimensions. With a network of a million weights as the variable the squared estimate is a million times the squared gradient.",
    derivation="bilevel.md#the-zeroth-order-estimator",
    checks=(
        equals(
            "quadrature",
            "Are the exact moments those of a quadrature of the two estimators, n = 4, ν = 0.5?",
            tuple(f"{what}, {kind}" for kind in ESTIMATORS[:2] for what in AND_SECOND),
            subject=lambda: np.concatenate([moments(kind) for kind in ESTIMATORS[:2]]),
            reference=lambda: np.concatenate([by_quadrature(kind) for kind in ESTIMATORS[:2]]),
            controls={
                "n squared gradients": lambda: np.concatenate(
                    [np.append(moments(kind)[:N], moments(kind)[N] - 2 * G @ G) for kind in ESTIMATORS[:2]]
                ),
                "central for both": lambda: np.tile(moments("central"), 2),
            },
        ),
        equals(
            "an independent derivation",
            "Are the second moments 32.04 and 42.015?",
            ESTIMATORS[:2],
            subject=lambda: np.array([moments(kind)[N] for kind in ESTIMATORS[:2]]),
            reference=lambda: np.array([32.04, 42.015]),
            controls={"at half the step": lambda: np.array([moments(kind, STEP / 2)[N] for kind in ESTIMATORS[:2]])},
        ),
        has_mean(
            "torch, mean",
            "Is the mean of the torch `ZerothOrder` the gradient?",
            COMPONENTS,
            subject=lazily(lambda: from_torch(STEP, silent, itself)),
            reference=lambda: G,
            margin=MEAN_MARGIN,
            margin_from=FROM_MEAN,
            kurtosis=kurtosis(2),
            controls={"the released residual": lazily(lambda: from_numpy("released residual", STEP, itself))},
        ),
        has_mean(
            "torch, second moment",
            "Is the mean square of the torch `ZerothOrder` n + 2 squared gradients?",
            ("second moment",),
            subject=lazily(lambda: from_torch(STEP, silent, squared)),
            reference=lambda: zeroth_order.central_moments(G, STEP).second_moment,
            margin=2.0,
            margin_from="2, 6 % of the second moment; declared before sampling",
            kurtosis=kurtosis(4),
            controls={
                "the forward difference": lazily(lambda: from_numpy("forward", STEP, squared)),
                "the released residual": lazily(lambda: from_numpy("released residual", STEP, squared)),
            },
        ),
    ),
)  # fmt: skip

RESIDUAL = Claim(
    id="generative-bilevel.released-residual-is-halved",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=ZO_CODE,
    title="The released one-point estimate has half the gradient as its mean",
    statement=r"The one-point estimate $\frac{\ell_t - \ell_{t-1}}{2\delta} v_t$, $\ell_t = f(y_t + \delta v_t)$, has the scale $1/(2\delta)$ of the two-point one.",
    printed="refuted",
    corrected=r"$\ell_{t-1}$ is independent of $v_t$ and only lowers the variance; the mean is half of the smoothed gradient. With the scale $1/\delta$ it is unbiased, with the second moment $(2n + 2) |\nabla f|^2 + \delta^2 (n + 2)\, \mathrm{tr} H^2$ on quadratics.",
    why=r"In the sum $\nabla_x f + \gamma (\ldots)$ half of one term is not half a step size. The two-point estimate, the released default, is not affected.",
    derivation="bilevel.md#the-zeroth-order-estimator",
    checks=(
        equals(
            "quadrature",
            "Is the mean of the estimate as released, by quadrature over both directions, half the gradient?",
            AND_SECOND,
            subject=lambda: moments("released residual"),
            reference=lambda: np.array(by_quadrature("released residual")),
            printed=lambda: moments("residual"),
            controls={
                "a two-point estimate": lambda: moments("central"),
                "half the mean and the second moment": lambda: moments("residual") / 2,
            },
        ),
        equals(
            "with the right scale",
            "Is the estimate with the scale 1/δ unbiased?",
            COMPONENTS,
            subject=lambda: np.array(by_quadrature("residual"))[:N],
            reference=lambda: G,
            controls={"as released": lambda: np.array(by_quadrature("released residual"))[:N]},
        ),
        equals(
            "an independent derivation",
            "Is the second moment as released 15.91875?",
            ("second moment",),
            subject=lambda: moments("released residual")[N],
            reference=lambda: 15.91875,
            controls={"the scale 1/δ": lambda: moments("residual")[N]},
        ),
    ),
)  # fmt: skip


@cache
def noisy_reference(nu: float = RELEASED_STEP) -> float:
    return zeroth_order.central_moments(G, nu, SIGMA**2).second_moment


COMMON = Claim(
    id="generative-bilevel.released-without-common-random-numbers",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=ZO_CODE,
    title="The two values are taken from independent samples, and the small step divides their noise by itself",
    statement=r"$\hat g = \frac{f(y + \delta v) - f(y - \delta v)}{2\delta} v$ with one function $f$ and $\delta = 0.01$, the smaller the better.",
    printed="refuted",
    corrected=r"$f$ is estimated from new samples each time. Noise of variance $\sigma^2$ in each value adds $n \sigma^2 / (2 \delta^2)$ to $E |\hat g|^2$: $5000\, n \sigma^2$. With the same random numbers in both, additive noise cancels.",
    why="Noise of 0.05 in f, with a gradient of 2.3 in four dimensions, makes the second moment 82 instead of 32; what counts is noise over δ. Reusing the initial noise costs nothing.",
    derivation="bilevel.md#the-zeroth-order-estimator",
    checks=(
        has_mean(
            "second moment",
            "Is the mean square of the torch `ZerothOrder`, with noise of 0.05 drawn anew for each value, 82.04?",
            ("second moment",),
            subject=lazily(lambda: from_torch(RELEASED_STEP, independent, squared)),
            reference=noisy_reference,
            printed=lazily(lambda: from_torch(RELEASED_STEP, common, squared)),
            margin=4.0,
            margin_from="4, 5 % of the second moment; declared before sampling",
            kurtosis=kurtosis(4),
            controls={"twice the step": lazily(lambda: from_torch(2 * RELEASED_STEP, independent, squared))},
        ),
        has_mean(
            "common random numbers",
            "Is it that of the estimate without noise, if both values share theirs?",
            ("second moment",),
            subject=lazily(lambda: from_torch(RELEASED_STEP, common, squared)),
            reference=lambda: zeroth_order.central_moments(G, RELEASED_STEP, SIGMA**2, "common").second_moment,
            margin=2.0,
            margin_from="2, 6 % of the second moment; declared before sampling",
            kurtosis=kurtosis(4),
            controls={"noise drawn anew": lazily(lambda: from_torch(RELEASED_STEP, independent, squared))},
        ),
        equals(
            "formula",
            "Does it add n σ²/(2δ²), 50 here, and four times that to the forward difference?",
            ("central", "forward"),
            subject=lambda: np.array(
                [
                    noisy_reference() - moments("central", RELEASED_STEP)[N],
                    zeroth_order.forward_moments(G, H, RELEASED_STEP, SIGMA**2).second_moment
                    - moments("forward", RELEASED_STEP)[N],
                ]
            ),
            reference=lambda: np.array([50.0, 200.0]),
            controls={"central for both": lambda: np.full(2, 50.0), "n σ²/δ²": lambda: np.full(2, 100.0)},
        ),
    ),
)  # fmt: skip

# --- a Frechet distance from 36 samples -----------------------------------------------------------------------------

IMAGES, FEATURES, NARROW = 36, 2048, 64
SPECTRUM = np.linspace(0.2, 3.0, NARROW)


def frechet_to_standard(samples: np.ndarray, deviation: np.ndarray | float = 1.0) -> float:
    """W2^2 of the Gaussian fitted to samples (n, d) to N(0, deviation^2), through the Gram matrix of the samples.

    For C = deviation^2: tr (C^(1/2) S C^(1/2))^(1/2) is the sum of the singular values of the scaled samples.
    """
    n, d = samples.shape
    centred = (samples - samples.mean(0)) / math.sqrt(n - 1)
    gram = (centred * deviation) @ (centred * deviation).T
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0))
    trace = float(np.sum(np.square(np.broadcast_to(deviation, d))))
    return float(np.sum(samples.mean(0) ** 2) + trace + np.sum(centred**2) - 2 * np.sum(roots))


@cache
def simplex(d: int) -> np.ndarray:
    """36 points of mean zero whose covariance is one in 35 directions and zero in all others: the best there are."""
    axes = np.linalg.qr(np.concatenate([np.ones((IMAGES, 1)), np.eye(IMAGES)[:, 1:]], axis=1))[0][:, 1:]
    return np.concatenate([axes * math.sqrt(IMAGES - 1), np.zeros((IMAGES, d - IMAGES + 1))], axis=1)


@cache
def measured() -> tuple[float, ...]:
    """W2^2 of the best 36 points, of 36 samples of the data, and of a model shrunk to their norm; then anisotropic."""
    draws = np.random.default_rng(8).standard_normal((IMAGES, FEATURES))
    deviation = np.sqrt(SPECTRUM)
    narrow = draws[:, :NARROW] * deviation
    return (
        frechet_to_standard(simplex(FEATURES)),
        frechet_to_standard(draws),
        frechet_to_standard(draws * math.sqrt((IMAGES - 1) / FEATURES)),
        frechet_to_standard(narrow, deviation),
        frechet_to_standard(0.7 * narrow, deviation),
    )


@cache
def enough_samples() -> tuple[np.ndarray, np.ndarray]:
    """The same comparison where the samples are many more than the features, eight."""
    draws = np.random.default_rng(9).standard_normal((10000, 8))
    covariances = [np.cov(c * draws.T) for c in (1.0, 0.7)]
    true, shrunk = (
        float(c**2 * np.sum(draws.mean(0) ** 2) + np.sum((np.sqrt(np.linalg.eigvalsh(cov)) - 1) ** 2))
        for c, cov in zip((1.0, 0.7), covariances, strict=True)
    )
    return np.full(2, true), np.full(2, shrunk)


def bounds(missing: int = 0) -> np.ndarray:
    wide = zeroth_order.frechet_rank_bound(np.ones(FEATURES), IMAGES - missing)
    return np.repeat([wide, zeroth_order.frechet_rank_bound(SPECTRUM, IMAGES - missing)], [3, 2])


def on_the_line(kind: str = "both") -> float:
    """E W2^2 of N(0, 1) to the fit of 36 of its samples, by a Riemann sum over the chi law of the deviation."""
    s = np.linspace(0.2, 2.2, 20001)
    density = s ** (IMAGES - 2) * np.exp(-0.5 * (IMAGES - 1) * s**2)
    spread = float(np.sum(density * (s - 1) ** 2) / np.sum(density))
    return 1 / IMAGES + (spread if kind == "both" else 0.0)


FRECHET = Claim(
    id="generative-bilevel.released-distance-from-36-samples",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source="Generative bilevel, released code: the upper objective of the noise-schedule experiment",
    title="A Fréchet distance from 36 images has a floor that no model gets below, and a perfect model is not the best",
    statement="The upper objective is the Fréchet distance, in 2048 features, of 36 samples from the data: zero for a perfect model.",
    printed="refuted",
    corrected=r"The fit of $n$ samples lives in $n - 1$ dimensions. No $n$ samples come nearer than the sum of the $d - n + 1$ least eigenvalues of the data's covariance: 2013 of 2048, were all features equal. On the line the mean at a perfect model is $\frac1n + 2 (1 - c_4(n)) = 0.04201$.",
    why="Only 35 directions can be matched, so that how high the floor is depends on the features' spectrum. In the others the samples have no variance, in these too much: a model that is shrunk is nearer than the true one.",
    derivation="bilevel.md#the-floor-of-a-frechet-distance",
    checks=(
        at_least(
            "floor",
            "Do 36 samples of a perfect model, of shrunk ones, and the best 36 points keep that distance?",
            ("best points", "data", "data, shrunk", "64 unequal features", "64 unequal features, shrunk"),
            subject=lambda: (np.array(measured()), bounds()),
            controls={"one dimension too many": lambda: (np.array(measured()), bounds(1))},
            tolerance=1e-8,
        ),
        at_least(
            "a perfect model is not the best",
            "Are 36 samples of the data farther from it than the same samples, shrunk?",
            ("2048 equal features", "64 unequal features"),
            subject=lambda: (np.array(measured())[[1, 3]], np.array(measured())[[2, 4]]),
            controls={"10000 samples": lambda: enough_samples()},
        ),
        equals(
            "attained",
            "Do the best 36 points attain it?",
            ("best points",),
            subject=lambda: measured()[0],
            reference=lambda: zeroth_order.frechet_rank_bound(np.ones(FEATURES), IMAGES),
            printed=lambda: 0.0,
            controls={"a fit of full rank in 36 dimensions": lambda: float(FEATURES - IMAGES)},
        ),
        equals(
            "on the line",
            "Is the mean at a perfect model, by integration over the law of the sample deviation, and in an independent derivation, 0.04201?",
            ("integral", "independent"),
            subject=lambda: np.full(2, zeroth_order.frechet_floor(IMAGES)),
            reference=lambda: np.array([on_the_line(), 0.0420106649997382209]),
            printed=lambda: np.zeros(2),
            controls={"the error of the mean alone": lambda: np.full(2, on_the_line("mean"))},
        ),
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (
    SCORE, OPTIMUM, START_AND_END, SIGN, CANCEL, INVALID, SIGMOID_DEFAULTS, UNTRAINED, ZEROTH, RESIDUAL, COMMON, FRECHET,
)  # fmt: skip
