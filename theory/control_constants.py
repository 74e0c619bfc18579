r"""Lipschitz constants, admissible strengths and error bounds of PI-FT, all explicit and all proved again.

Notation of `theory.control`, and per step: L_s, L_s' bound |grad s_t| and the Lipschitz constant of grad s_t, A bounds
|I + (1 - alpha) grad s_t| (the step's `expansion`, at most 1 + (1 - alpha) L_s), q = 1 - lambda. Value functions carry
an index t = 0..T, T being the reward; everything else has one entry for each of the T steps. All matrix norms are
operator norms, all function norms suprema. `lam` (lambda_t) is no parameter of the algorithm: it says how much strong
concavity the strength leaves, sigma^2 |grad h| / beta <= 1 - lambda.

The formulas (14)-(17) of the paper are unambiguous; of (38)-(41) and (44)-(46) its text fixes the structure, and what
stands here is proved in docs/pift.md. Numbers beyond the float range are inf: no strength is large enough.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from theory import checked
from theory.checked import Array
from theory.control import ControlSchedule, per_step
from theory.mixture import GaussianMixture

SHARP_KAPPA = math.sqrt(2 / math.pi)
"""E|N(0, 1)|: grad h is kappa L1 / sigma-Lipschitz in every dimension, and no smaller kappa will do."""

SMOOTHED_BEND = 4 / math.sqrt(2 * math.pi * math.e)
"""E|N(0, 1)^2 - 1|: grad h is this times L0 / sigma^2-Lipschitz for a V that is merely L0-Lipschitz."""

LEAST_LAM = 1e-6  # the largest residual of the sharp constants is sought among about 1.5 / lam iterations


def published_kappa(d: int) -> float:
    """sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2) = E|N(0, I_d)|, the kappa of PI-FT, eq. (17).

    Equal to `SHARP_KAPPA` for d = 1 and larger by about sqrt(pi d / 2) else. Raises ValueError unless d >= 1.

    >>> round(published_kappa(2) / SHARP_KAPPA, 6)
    1.570796
    """
    checked.count("d", d, 1)
    return math.sqrt(2.0) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))


class RegularisationWarning(UserWarning):
    """A strength below the one that a guarantee of PI-FT asks for."""


# --- the system --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SystemConstants:
    """What Assumptions 2.6 and 2.7 of PI-FT ask for: constants of the scores (T,) and of the reward.

    `expansion` (T,) bounds |I + (1 - alpha) grad s_t|; without it 1 + (1 - alpha) score_lipschitz is used, as in the
    paper. A reward that is not Lipschitz, or whose gradient is not, has the constant inf; what needs it refuses it.

    Raises ValueError for constants that are negative or NaN, or lengths that differ.

    >>> SystemConstants([2.0], [0.0], 1.0).reward_gradient_lipschitz
    inf
    >>> SystemConstants([2.0], [0.0], -1.0)
    Traceback (most recent call last):
    ...
    ValueError: reward_lipschitz = -1.0: must lie in [0.0, inf]
    """

    score_lipschitz: Array
    score_gradient_lipschitz: Array
    reward_lipschitz: float
    reward_gradient_lipschitz: float
    expansion: Array | None

    def __init__(
        self,
        score_lipschitz: ArrayLike,
        score_gradient_lipschitz: ArrayLike,
        reward_lipschitz: float,
        reward_gradient_lipschitz: float = math.inf,
        expansion: ArrayLike | None = None,
    ) -> None:
        slopes = checked.array("score_lipschitz", score_lipschitz, 1)
        given = {"score_lipschitz": slopes, "score_gradient_lipschitz": score_gradient_lipschitz}
        if expansion is not None:
            given["expansion"] = expansion
        for name, value in given.items():
            array = checked.array(name, value, 1)
            if array.size != slopes.size:
                raise ValueError(f"{name} has {array.size} entries: must have the {slopes.size} of score_lipschitz")
            if (array < 0).any():
                raise ValueError(f"{name} = {array.tolist()}: must not be negative")
            object.__setattr__(self, name, array)
        if expansion is None:
            object.__setattr__(self, "expansion", None)
        for name, number in (
            ("reward_lipschitz", reward_lipschitz),
            ("reward_gradient_lipschitz", reward_gradient_lipschitz),
        ):
            object.__setattr__(self, name, checked.scalar(name, number, 0.0, math.inf))

    @staticmethod
    def of_gaussian(
        schedule: ControlSchedule,
        cov: ArrayLike,
        reward_lipschitz: float,
        reward_gradient_lipschitz: float = math.inf,
    ) -> SystemConstants:
        """Exact scores of noised Gaussian data with covariance `cov` (d, d), or a variance if d = 1; closed form.

        Raises ValueError if cov is no covariance.

        >>> of = SystemConstants.of_gaussian(ControlSchedule.ddpm([0.8], 1.0), 0.25, 1.0)
        >>> of.score_lipschitz, of.expansion
        (array([2.5]), array([0.5]))
        """
        matrix = np.atleast_2d(np.asarray(cov, dtype=np.float64))
        spectrum = np.linalg.eigvalsh(checked.covariance("cov", matrix, matrix.shape[0])).clip(min=0.0)
        level = schedule.alpha_bar[:, None]
        slopes = 1.0 / (level * spectrum + 1.0 - level)  # s = - slopes (y - mean) in the eigendirections
        expansion = np.abs(1.0 - (1.0 - schedule.alpha)[:, None] * slopes).max(axis=1)
        return SystemConstants(
            slopes.max(axis=1), np.zeros(schedule.steps), reward_lipschitz, reward_gradient_lipschitz, expansion
        )

    @staticmethod
    def of_mixture(
        schedule: ControlSchedule,
        data: GaussianMixture,
        reward_lipschitz: float,
        reward_gradient_lipschitz: float = math.inf,
    ) -> SystemConstants:
        """Exact scores of noised 1-D mixture data: suprema over the line of |s'|, |s''| and |1 + (1 - alpha) s'|.

        Sought on a grid that is fine around all means and all crossings of two components, then polished, and compared
        with the limit at infinity: to 1e-9 of the value, or of 1 / v and v^(-3/2) for v the largest variance of a
        component. Raises ValueError if the data have more than one dimension.

        >>> data = GaussianMixture([0.5, 0.5], [[-1.5], [1.5]], [[[0.3]], [[0.3]]])
        >>> SystemConstants.of_mixture(ControlSchedule.ddpm([0.9], 1.0), data, 1.0).score_lipschitz.round(9)
        array([12.08911614])
        """
        if data.dim != 1:
            raise ValueError(f"data has dimension {data.dim}: must be 1")
        extremes = np.array([_score_extremes(data.noised(float(level))) for level in schedule.alpha_bar])
        least, most, bend = extremes.T
        expansion = np.maximum(*(np.abs(1.0 + (1.0 - schedule.alpha) * slope) for slope in (least, most)))
        return SystemConstants(np.maximum(-least, most), bend, reward_lipschitz, reward_gradient_lipschitz, expansion)

    def published(self) -> SystemConstants:
        """The same without a sharper `expansion`: what the paper's formulas use.

        >>> SystemConstants([2.0], [0.0], 1.0, expansion=[0.5]).published().expansion is None
        True
        """
        return SystemConstants(
            self.score_lipschitz, self.score_gradient_lipschitz, self.reward_lipschitz, self.reward_gradient_lipschitz
        )

    def expansions(self, schedule: ControlSchedule) -> Array:
        """A_t (T,): the smaller of `expansion` and 1 + (1 - alpha) score_lipschitz; both bound the same thing.

        Raises ValueError unless there is one score for each step of the schedule.

        >>> SystemConstants([2.0], [0.0], 1.0).expansions(ControlSchedule.ddpm([0.8], 1.0))
        array([1.4])
        """
        slopes = per_step("score_lipschitz", self.score_lipschitz, schedule.steps, positive=False)
        crude = 1.0 + (1.0 - schedule.alpha) * slopes
        return crude if self.expansion is None else np.minimum(crude, self.expansion)


def _score_extremes(law: GaussianMixture) -> tuple[float, float, float]:
    """inf s', sup s' and sup |s''| over the line, for the score s of a 1-D mixture."""
    weights, means, variances = law.weights, law.means[:, 0], law.covs[:, 0, 0]

    def derivatives(y: ArrayLike) -> tuple[Array, Array]:
        """s' and s'': second and third cumulants of the components' log-densities' derivatives."""
        gap = np.asarray(y, dtype=np.float64)[..., None] - means
        joint = np.log(weights) - 0.5 * np.log(variances) - 0.5 * gap**2 / variances
        share = np.exp(joint - joint.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        slope = -gap / variances
        centred = slope - (share * slope).sum(axis=-1, keepdims=True)
        curvature = -(share / variances).sum(axis=-1, keepdims=True)
        first = curvature[..., 0] + (share * centred**2).sum(axis=-1)
        return first, (share * (centred**3 - 3.0 * centred * (1.0 / variances + curvature))).sum(axis=-1)

    grid = _mixture_grid(weights.tolist(), means.tolist(), variances.tolist())
    slopes, bends = derivatives(grid)
    tail = float(-1.0 / variances.max())  # the limit of s' on either side; that of s'' is 0
    least = -_supremum(lambda y: -derivatives(y)[0], grid, -slopes)
    most = _supremum(lambda y: derivatives(y)[0], grid, slopes)
    return min(least, tail), max(most, tail), _supremum(lambda y: np.abs(derivatives(y)[1]), grid, np.abs(bends))


def _mixture_grid(weights: list[float], means: list[float], variances: list[float]) -> Array:
    """Points of the line, dense wherever the shares of the components change: ascending."""
    widest = math.sqrt(max(variances))
    low, high = min(means) - 12 * widest, max(means) + 12 * widest
    centres = [(mean, math.sqrt(variance)) for mean, variance in zip(means, variances, strict=True)]
    for j in range(len(means)):
        for k in range(j):
            # log of the ratio of the two components: a y^2 + b y + c
            a = 0.5 * (1 / variances[k] - 1 / variances[j])
            b = means[j] / variances[j] - means[k] / variances[k]
            c = 0.5 * (means[k] ** 2 / variances[k] - means[j] ** 2 / variances[j])
            c += math.log(weights[j] / weights[k]) + 0.5 * math.log(variances[k] / variances[j])
            for root in _real_roots(a, b, c):
                # A transition moves s' by less than steepness^2. The two of a pair are alike, and the farther one is
                # beyond the grid's reach only if the variances are almost equal.
                steepness = abs(2 * a * root + b)
                if steepness * widest > 1e-5 and abs(root) < 1e6 * (high - low):
                    centres.append((root, 1 / steepness))
            if abs(a) * widest**2 > 1e-10:
                centres.append((-b / (2 * a), abs(a) ** -0.5))  # where the ratio is extreme, if they never cross
    spread = np.linspace(-24.0, 24.0, 961)
    clusters = np.array([centre + scale * spread for centre, scale in centres])
    return np.unique(np.concatenate([np.linspace(low, high, 4001), clusters.ravel()]))


def _real_roots(a: float, b: float, c: float) -> list[float]:
    """Real roots of a y^2 + b y + c, without cancellation; none of a constant."""
    if a == 0:
        return [-c / b] if b != 0 else []
    square = b * b - 4 * a * c
    if square < 0:
        return []
    larger = -0.5 * (b + math.copysign(math.sqrt(square), b))
    return [larger / a, c / larger] if larger != 0 else [0.0]


def _supremum(function: Callable[[ArrayLike], Array], grid: Array, values: Array) -> float:
    """The maximum of a smooth function with these values on a grid that resolves its local maxima."""
    inner = 1 + np.flatnonzero((values[1:-1] >= values[:-2]) & (values[1:-1] >= values[2:]))
    best = float(values.max())
    for i in inner[np.argsort(values[inner])[-4:]]:
        left, right = float(grid[i - 1]), float(grid[i + 1])
        found = minimize_scalar(
            lambda y: -float(function(y)),
            bounds=(left, right),
            method="bounded",
            options={"xatol": 1e-7 * (right - left)},
        )
        best = max(best, -float(found.fun))
    return best


# --- one step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """The constants of one step; the value function after it is L0-Lipschitz, its gradient L1-Lipschitz."""

    alpha: float
    sigma: float
    score_lipschitz: float
    score_gradient: float
    expansion: float
    lam: float
    kappa: float

    @property
    def growth(self) -> float:
        """A / lambda: bounds |I + (1 - alpha) grad U| for the optimum and all iterates."""
        return self.expansion / self.lam

    @property
    def control_lipschitz(self) -> float:
        """(16), with A in place of 1 + (1 - alpha) L_s."""
        return self.score_lipschitz + (1 - self.lam) * self.growth / (1 - self.alpha)

    @property
    def control_gradient(self) -> float:
        """(17)."""
        bend = self.kappa * self.growth * self.growth / (math.sqrt(self.alpha) * self.sigma * (1 - self.alpha))
        return (self.score_gradient + (1 - self.lam) * bend) / self.lam

    def optimal_lipschitz(self, lipschitz: float) -> float:
        """(14)."""
        return _product(self.expansion / math.sqrt(self.alpha), lipschitz)

    def optimal_gradient(self, lipschitz: float, gradient: float) -> float:
        """(15)."""
        bent = _product(1 - self.alpha, self.score_gradient, lipschitz)
        carried = _product(self.expansion, self.growth / math.sqrt(self.alpha), gradient)
        return (bent + carried) / math.sqrt(self.alpha)

    def lipschitz_residual(self, m: Array, lipschitz: float, sharp: bool) -> Array:
        """What (45) adds to (14) at the iterations m >= 1, or m >= 0 if not sharp."""
        q = 1 - self.lam
        with np.errstate(over="ignore"):
            met = 1 - q**m if sharp else np.ones_like(m)
            return q ** (m + 1) * met * _product(self.growth / math.sqrt(self.alpha), lipschitz)

    def gradient_residual(self, m: Array, lipschitz: float, gradient: float, sharp: bool) -> Array:
        """What (46) adds to (15) at the iterations m >= 1, or m >= 0 if not sharp."""
        q = 1 - self.lam
        slope = _product(self.expansion, self.growth / self.alpha, gradient)
        bend = _product(self.kappa, self.growth, self.growth / (self.alpha * self.sigma), lipschitz)
        rest = _product((1 - self.alpha) / math.sqrt(self.alpha), self.control_gradient, lipschitz)
        with np.errstate(over="ignore"):
            met = 1 - q**m if sharp else np.ones_like(m)
            return q ** (m + 1) * (met * slope + (1 + m * met) * bend + rest)

    def candidates(self, sharp: bool) -> Array:
        """Iterations among which both residuals are largest (docs/pift.md, "Which iterate is the roughest")."""
        if not sharp:
            return np.zeros(1)
        if self.lam < LEAST_LAM:
            raise ValueError(f"lam = {self.lam}: must be at least {LEAST_LAM} for the sharp constants")
        return np.arange(1.0, 2 + math.ceil(1.45 / -math.log1p(-self.lam)))


def _product(*factors: float) -> float:
    """The product, in which a zero beats an overflow."""
    return 0.0 if 0.0 in factors else math.prod(factors)


def _steps(schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, kappa: float) -> list[_Step]:
    margins = _margins(lam, schedule.steps)
    checked.scalar("kappa", kappa, 0.0, math.inf, closed="()")
    expansions = system.expansions(schedule)
    return [
        _Step(
            alpha=float(schedule.alpha[t]),
            sigma=float(schedule.sigma[t]),
            score_lipschitz=float(system.score_lipschitz[t]),
            score_gradient=float(system.score_gradient_lipschitz[t]),
            expansion=float(expansions[t]),
            lam=float(margins[t]),
            kappa=kappa,
        )
        for t in range(schedule.steps)
    ]


def _margins(lam: ArrayLike, steps: int) -> Array:
    if np.ndim(lam) == 0:
        checked.scalar("lam", float(np.asarray(lam)), 0, 1, closed="()")
    values = per_step("lam", lam, steps, positive=False)
    outside = np.flatnonzero((values <= 0) | (values >= 1))
    if outside.size:
        raise ValueError(f"lam[{outside[0]}] = {values[outside[0]]}: must lie in (0, 1)")
    return values


def _counts(iterations: ArrayLike, steps: int) -> Array:
    counts = per_step("iterations", iterations, steps, positive=False)
    if (counts != np.floor(counts)).any():
        raise ValueError(f"iterations = {counts.tolist()}: must be integers")
    return counts


def _require(system: SystemConstants, *, lipschitz: str = "", gradient: str = "") -> None:
    """Refuses an infinite constant of the reward if a purpose is given for it."""
    for name, value, purpose in (
        ("reward_lipschitz", system.reward_lipschitz, lipschitz),
        ("reward_gradient_lipschitz", system.reward_gradient_lipschitz, gradient),
    ):
        if purpose and not math.isfinite(value):
            raise ValueError(f"{name} = {value}: must be finite for {purpose}")


# --- regularity --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Regularity:
    """Lipschitz constants of the value functions (T + 1,) and controls (T,), and of their gradients."""

    value_lipschitz: Array
    value_gradient_lipschitz: Array
    control_lipschitz: Array
    control_gradient_lipschitz: Array


def optimal_lipschitz(schedule: ControlSchedule, system: SystemConstants) -> Array:
    """Lipschitz constants (T + 1,) of the optimal value functions: (14), which knows neither strength nor lambda.

    Raises ValueError if the reward is not Lipschitz or the number of scores differs from that of steps.

    >>> optimal_lipschitz(ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8))
    array([1.9, 0.8])
    """
    _require(system, lipschitz="(14)")
    values = [system.reward_lipschitz]
    for factor in reversed((system.expansions(schedule) / np.sqrt(schedule.alpha)).tolist()):
        values.insert(0, _product(factor, values[0]))
    return np.array(values)


def optimal_regularity(
    schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, kappa: float = SHARP_KAPPA
) -> Regularity:
    """Constants of the optimal value functions and controls: PI-FT, Theorem 2.8, (14)-(17).

    They hold if every strength is at least `admissible_strength` by the rule "optimal". A reward that is not Lipschitz
    (a quadratic one) is allowed if all scores are affine. Raises ValueError if lambda lies outside (0, 1), a length
    differs, or a constant of the reward that is needed is infinite.

    >>> schedule = ControlSchedule.ddpm([0.64], 1.0)
    >>> optimal_regularity(schedule, SystemConstants([2.5], [0.0], 0.8, 0.5), 0.5).value_gradient_lipschitz
    array([5.640625, 0.5     ])
    >>> optimal_regularity(schedule, SystemConstants([2.5], [0.0], 0.8), 0.5)
    Traceback (most recent call last):
    ...
    ValueError: reward_gradient_lipschitz = inf: must be finite for (15)
    """
    curved = bool(system.score_gradient_lipschitz.any())
    _require(system, lipschitz="(15) with scores that are not affine" if curved else "", gradient="(15)")
    steps = _steps(schedule, system, lam, kappa)
    slopes, bends = [system.reward_lipschitz], [system.reward_gradient_lipschitz]
    for step in reversed(steps):
        bends.insert(0, step.optimal_gradient(slopes[0], bends[0]))
        slopes.insert(0, step.optimal_lipschitz(slopes[0]))
    return _regularity(slopes, bends, steps)


def universal_lipschitz(
    schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, *, sharp: bool = False
) -> Array:
    """Lipschitz constants (T + 1,) of the value functions of PI-FT, whatever the numbers of iterations: (38).

    `sharp` uses that the residual of (45) is 0 before the first iteration. Needs sigma^2 |grad h| / beta <= 1 - lambda,
    not that the reward's gradient is Lipschitz. Raises ValueError like `optimal_lipschitz`, and for lambda.

    >>> universal_lipschitz(ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8), 0.5)
    array([3.8, 0.8])
    """
    _require(system, lipschitz="(38)")
    values = [system.reward_lipschitz]
    for step in reversed(_steps(schedule, system, lam, SHARP_KAPPA)):  # (38) does not look at kappa
        values.insert(0, _worst_lipschitz(step, values[0], sharp)[0])
    return np.array(values)


def universal_regularity(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    kappa: float = SHARP_KAPPA,
    *,
    sharp: bool = False,
) -> Regularity:
    """Constants of the value functions and controls of PI-FT, whatever the numbers of iterations: (38), (39), (44).

    They hold if every strength is at least `admissible_strength` by the rule "published" or "sharp". Raises ValueError
    like `optimal_regularity`, always asks for a Lipschitz reward, and if sharp for lambda >= 1e-6.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> universal_regularity(schedule, system, 0.5).value_gradient_lipschitz.round(6)
    array([32.463965,  0.5     ])
    """
    slopes, bends, _ = _universal(schedule, system, lam, kappa, sharp)
    return _regularity(slopes, bends, _steps(schedule, system, lam, kappa))


def roughest_iterations(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    kappa: float = SHARP_KAPPA,
    *,
    sharp: bool = False,
) -> tuple[Array, Array]:
    """The numbers of iterations (T,) at which (45) and (46) are largest, as (38) and (39) ask for.

    0 always for the printed structure; at least 1 if sharp. Raises ValueError like `universal_regularity`.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> roughest_iterations(schedule, system, 0.1, sharp=True)
    (array([7.]), array([1.]))
    """
    worst = np.array(_universal(schedule, system, lam, kappa, sharp)[2])
    return worst[:, 0], worst[:, 1]


def iterate_regularity(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    iterations: ArrayLike,
    kappa: float = SHARP_KAPPA,
    *,
    sharp: bool = False,
) -> Regularity:
    """Constants after m_t = `iterations` updates at step t and any numbers at the later steps: (44), (45), (46).

    The value function after the step is granted the universal constants. The bounds of the controls rise from those of
    the scores at m = 0 towards (16), (17). Raises ValueError like `universal_regularity`, and unless m_t are integers
    >= 0.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> [round(float(iterate_regularity(schedule, system, 0.5, m).value_lipschitz[0]), 6) for m in (0, 1, 9)]
    [3.8, 2.85, 1.903711]
    """
    counts = _counts(iterations, schedule.steps)
    steps = _steps(schedule, system, lam, kappa)
    slopes, bends, _ = _universal(schedule, system, lam, kappa, sharp)
    left = (1.0 - _margins(lam, schedule.steps)) ** counts
    limit = _regularity(slopes, bends, steps)
    values, gradients = limit.value_lipschitz.copy(), limit.value_gradient_lipschitz.copy()
    for t, (step, m) in enumerate(zip(steps, counts, strict=True)):
        first = step.optimal_lipschitz(slopes[t + 1])
        second = step.optimal_gradient(slopes[t + 1], bends[t + 1])
        if m > 0 or not sharp:  # the residual vanishes before the first iteration
            first += float(step.lipschitz_residual(m, slopes[t + 1], sharp))
            second += float(step.gradient_residual(m, slopes[t + 1], bends[t + 1], sharp))
        values[t], gradients[t] = first, second
    return Regularity(
        values,
        gradients,
        _between(system.score_lipschitz, limit.control_lipschitz, left),
        _between(system.score_gradient_lipschitz, limit.control_gradient_lipschitz, left),
    )


def _between(start: Array, limit: Array, left: Array) -> Array:
    return left * start + (1.0 - left) * limit


def _regularity(slopes: list[float], bends: list[float], steps: list[_Step]) -> Regularity:
    controls = np.array([(step.control_lipschitz, step.control_gradient) for step in steps])
    return Regularity(np.array(slopes), np.array(bends), controls[:, 0], controls[:, 1])


def _universal(
    schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, kappa: float, sharp: bool
) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    """(38), (39) and the iterations that attain them."""
    _require(system, lipschitz="(38)", gradient="(39)")
    slopes, bends = [system.reward_lipschitz], [system.reward_gradient_lipschitz]
    worst: list[tuple[float, float]] = []
    for step in reversed(_steps(schedule, system, lam, kappa)):
        slope, first = _worst_lipschitz(step, slopes[0], sharp)
        m = step.candidates(sharp)
        residuals = step.gradient_residual(m, slopes[0], bends[0], sharp)
        worst.insert(0, (first, float(m[residuals.argmax()])))
        bends.insert(0, step.optimal_gradient(slopes[0], bends[0]) + float(residuals.max()))
        slopes.insert(0, slope)
    return slopes, bends, worst


def _worst_lipschitz(step: _Step, lipschitz: float, sharp: bool) -> tuple[float, float]:
    m = step.candidates(sharp)
    residuals = step.lipschitz_residual(m, lipschitz, sharp)
    return step.optimal_lipschitz(lipschitz) + float(residuals.max()), float(m[residuals.argmax()])


# --- strengths ---------------------------------------------------------------------------------------------------

Rule = Literal["published", "optimal", "sharp", "lipschitz", "lipschitz-optimal"]


def slope_bound(
    schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, rule: Rule, kappa: float = SHARP_KAPPA
) -> Array:
    """Bounds (T,) on |grad h_t|, h_t = E grad V_{t+1}(. + sigma_t W), by the rule named.

    - "published": L1 of (39), for all iterates of PI-FT, A = 1 + (1 - alpha) L_s; Theorem 3.1 asks for this one;
    - "optimal": L1 of (15), for the optimum only; Theorem 2.8 asks for this one;
    - "sharp": as "published", with the sharp residuals and the expansion of `system`;
    - "lipschitz": sqrt(2 / pi) L0 / sigma, L0 of the sharp (38), for all iterates and any Lipschitz reward;
    - "lipschitz-optimal": the same with L0 of (14), for the optimum only.

    Raises ValueError for an unknown rule, and where a constant of the reward that the rule needs is infinite.

    >>> slope_bound(ControlSchedule.ddpm([0.64], 1.0), SystemConstants([2.5], [0.0], 0.8), 0.5, "lipschitz").round(6)
    array([1.063846])
    """
    if rule == "published":
        return universal_regularity(schedule, system.published(), lam, kappa).value_gradient_lipschitz[1:]
    if rule == "optimal":
        return optimal_regularity(schedule, system.published(), lam, kappa).value_gradient_lipschitz[1:]
    if rule == "sharp":
        return universal_regularity(schedule, system, lam, kappa, sharp=True).value_gradient_lipschitz[1:]
    if rule == "lipschitz":
        return SHARP_KAPPA * universal_lipschitz(schedule, system, lam, sharp=True)[1:] / schedule.sigma
    if rule == "lipschitz-optimal":
        return SHARP_KAPPA * optimal_lipschitz(schedule, system)[1:] / schedule.sigma
    raise ValueError(f"rule = {rule!r}: must be one of {', '.join(get_args(Rule))}")


def admissible_strength(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    rule: Rule = "published",
    kappa: float = SHARP_KAPPA,
) -> Array:
    """The least strengths (T,) for which a rule guarantees sigma^2 |grad h| / beta <= 1 - lambda.

    sigma^2 L1_{t+1} / (1 - lambda), or sqrt(2 / pi) sigma L0_{t+1} / (1 - lambda) for the rules "lipschitz". The
    schedule's own strength is not looked at. Sources: PI-FT, Theorems 2.8 and 3.1; rules and errors: `slope_bound`.

    >>> system = SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> admissible_strength(ControlSchedule.ddpm([0.64], 1.0), system, 0.5)
    array([0.36])
    """
    return _needed(schedule, slope_bound(schedule, system, lam, rule, kappa), lam)


def check_strength(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    rule: Rule = "published",
    kappa: float = SHARP_KAPPA,
) -> bool:
    """Whether the schedule's strengths are admissible by a rule; if not, warns about the step that is furthest off.

    Warns with `RegularisationWarning`. Raises ValueError like `slope_bound`.

    >>> check_strength(ControlSchedule.ddpm([0.64], 0.4), SystemConstants([2.5], [0.0], 0.8, 0.5), 0.5)
    True
    """
    message = _shortfall(schedule, admissible_strength(schedule, system, lam, rule, kappa), rule)
    if message:
        warnings.warn(message, RegularisationWarning, stacklevel=2)
    return not message


def _needed(schedule: ControlSchedule, slopes: Array, lam: ArrayLike) -> Array:
    with np.errstate(over="ignore"):
        return schedule.sigma**2 * slopes / (1.0 - _margins(lam, schedule.steps))


def _shortfall(schedule: ControlSchedule, needed: Array, rule: Rule) -> str:
    """One line about the step whose strength misses what is needed by the largest factor; empty if none does."""
    short = np.flatnonzero(schedule.strength < needed)
    if not short.size:
        return ""
    t = short[np.argmax(needed[short] / schedule.strength[short])]
    condition = "sqrt(2 / pi) sigma L0" if rule.startswith("lipschitz") else "sigma^2 L1"
    lost = "strong concavity of Theorem 2.8" if rule.endswith("optimal") else "contraction of Lemma 3.3"
    others = f" (one of {short.size} such steps)" if short.size > 1 else ""
    return (
        f"strength[{t}] = {schedule.strength[t]:.4g} < {condition} / (1 - lambda) = {needed[t]:.4g}{others}: "
        f"the {lost} is not guaranteed"
    )


# --- errors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ErrorBounds:
    """Bounds on sup |U_t^(m_t) - u*_t|, control (T,), and on sup |grad V_t^(m_t) - grad V*_t|, gradient (T + 1,)."""

    control: Array
    gradient: Array


def control_error(
    schedule: ControlSchedule,
    lam: ArrayLike,
    iterations: ArrayLike,
    next_lipschitz: ArrayLike,
    next_gradient_error: ArrayLike,
) -> Array:
    """Lemma 3.3: sup |U_t^(m) - u*_t| <= g_t (q^m L*_0 + (1 - q^m) E / lambda), all (T,).

    `next_lipschitz` (T,) is the Lipschitz constant L*_0 of V*_{t+1}, `next_gradient_error` (T,) the error E of the
    gradient of V_{t+1}. Needs sigma^2 |grad h| / beta <= q = 1 - lambda for the h of the value function that was used.
    Raises ValueError for lambda outside (0, 1), lengths that differ, m no integers >= 0.

    >>> control_error(ControlSchedule.ddpm([0.81], 0.5), 0.5, 2, 1.0, 0.1)
    array([0.72])
    """
    margins = _margins(lam, schedule.steps)
    start = per_step("next_lipschitz", next_lipschitz, schedule.steps, positive=False)
    inherited = per_step("next_gradient_error", next_gradient_error, schedule.steps, positive=False)
    left = (1.0 - margins) ** _counts(iterations, schedule.steps)
    return schedule.gain * (left * start + (1.0 - left) / margins * inherited)


def gradient_recursion(
    schedule: ControlSchedule,
    expansion: ArrayLike,
    lam: ArrayLike,
    iterations: ArrayLike,
    next_optimal_lipschitz: ArrayLike,
    next_lipschitz: ArrayLike,
) -> tuple[Array, Array]:
    """Lemma 3.4, (71): factor C and residual D q^(m + 1), both (T,), of E_t <= C E_{t+1} + D q^(m + 1).

    C = A / (lambda sqrt(alpha)), D = A (L*_0 + L_0 / lambda) / sqrt(alpha), with the constants (T,) of V*_{t+1} and of
    the value function used in its place. Raises ValueError like `control_error`.

    >>> gradient_recursion(ControlSchedule.ddpm([0.64], 1.0), 1.6, 0.5, 1, 1.0, 1.0)
    (array([4.]), array([1.5]))
    """
    count = schedule.steps
    margins, m = _margins(lam, count), _counts(iterations, count)
    scale = per_step("expansion", expansion, count, positive=False) / np.sqrt(schedule.alpha)
    best = per_step("next_optimal_lipschitz", next_optimal_lipschitz, count, positive=False)
    used = per_step("next_lipschitz", next_lipschitz, count, positive=False)
    return scale / margins, scale * (best + used / margins) * (1 - margins) ** (m + 1)


def theorem_bounds(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    iterations: ArrayLike,
    rule: Rule = "published",
    kappa: float = SHARP_KAPPA,
) -> ErrorBounds:
    """Theorem 3.1, (40)-(41): bounds on the errors of PI-FT after m_t = `iterations` updates at step t.

    The rule says which constants and which condition on the strength are used; "published" is the theorem. Raises
    ValueError if a strength is below `admissible_strength`, for a rule that covers the optimum only, and like
    `slope_bound` and `control_error`.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 0.4), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> bounds = theorem_bounds(schedule, system, 0.5, 3)
    >>> bounds.control.round(9), bounds.gradient.round(9)
    (array([0.2]), array([0.35625, 0.     ]))
    """
    constants = _convergent(schedule, system, lam, rule, kappa)
    factor, residual = gradient_recursion(
        schedule, constants.expansion, lam, iterations, constants.optimal, constants.universal
    )
    gradient = _unrolled(factor, residual)
    return ErrorBounds(control_error(schedule, lam, iterations, constants.optimal, gradient[1:]), gradient)


def improved_bounds(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    iterations: ArrayLike,
    rule: Rule = "published",
    kappa: float = SHARP_KAPPA,
) -> ErrorBounds:
    """Theorem 3.1 with the contraction rho <= 1 - lambda that is there, and gradients of values at rho^(2 m + 1).

    Own theorem (docs/pift.md, "Twice the exponent for values"); at each step the smaller of the new bound and of
    Lemma 3.4, so never above `theorem_bounds`. Raises ValueError like `theorem_bounds`.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 0.4), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> improved_bounds(schedule, system, 0.5, 3).gradient.round(9)
    array([0.09567592, 0.        ])
    """
    constants = _convergent(schedule, system, lam, rule, kappa)
    rho, m = constants.rho, _counts(iterations, schedule.steps)
    inverse = schedule.sigma**2 / schedule.strength
    scale = constants.expansion / np.sqrt(schedule.alpha)
    left = 1.0 - rho  # at least lambda
    slow = scale * rho ** (m + 1) * (constants.optimal + constants.universal / left)
    curved = inverse**2 * constants.bend * constants.universal / left
    powers = np.where(m > 0, m * rho ** np.maximum(2 * m - 1, 0), 0.0) + 0.5 * rho ** (2 * m)
    fast = scale * constants.universal * (rho ** (2 * m + 1) + curved * powers)
    gradient = _unrolled(scale / left, np.minimum(slow, fast))
    control = schedule.gain * (rho**m * constants.optimal + (1.0 - rho**m) / left * gradient[1:])
    return ErrorBounds(control, gradient)


def value_bounds(
    schedule: ControlSchedule,
    system: SystemConstants,
    lam: ArrayLike,
    iterations: ArrayLike,
    rule: Rule = "published",
    kappa: float = SHARP_KAPPA,
) -> Array:
    """Bounds (T + 1,) on sup (V*_t - V_t^(m_t)), which is never negative: additive in time.

    sum over k >= t of (1 + rho_k) sigma_k^2 L0_{k+1}^2 rho_k^(2 m_k) / (2 beta_k). Own theorem (docs/pift.md, "Errors
    of values add up"). Raises ValueError like `theorem_bounds`.

    >>> schedule, system = ControlSchedule.ddpm([0.64], 0.4), SystemConstants([2.5], [0.0], 0.8, 0.5)
    >>> value_bounds(schedule, system, 0.5, [0]).round(9)
    array([0.4176, 0.    ])
    """
    constants = _convergent(schedule, system, lam, rule, kappa)
    rho, m = constants.rho, _counts(iterations, schedule.steps)
    inverse = schedule.sigma**2 / schedule.strength
    losses = 0.5 * (1.0 + rho) * inverse * constants.universal**2 * rho ** (2 * m)
    return _unrolled(np.ones(schedule.steps), losses)


@dataclass(frozen=True, eq=False)
class _Convergent:
    """Constants (T,) of a schedule for which PI-FT contracts: those of V_{t+1} where a value function is meant."""

    expansion: Array
    rho: Array
    optimal: Array  # L0 of (14)
    universal: Array  # L0 of (38)
    bend: Array  # Lipschitz constant of grad h


def _convergent(
    schedule: ControlSchedule, system: SystemConstants, lam: ArrayLike, rule: Rule, kappa: float
) -> _Convergent:
    if rule.endswith("optimal"):
        raise ValueError(f"rule = {rule!r}: must cover the iterates, not the optimum only")
    slopes = slope_bound(schedule, system, lam, rule, kappa)
    short = _shortfall(schedule, _needed(schedule, slopes, lam), rule)
    if short:
        raise ValueError(short)
    used = system.published() if rule == "published" else system
    universal = universal_lipschitz(schedule, used, lam, sharp=rule != "published")[1:]
    smoothed = rule == "lipschitz"
    return _Convergent(
        used.expansions(schedule),
        schedule.sigma**2 * slopes / schedule.strength,
        optimal_lipschitz(schedule, used)[1:],
        universal,
        SMOOTHED_BEND * universal / schedule.sigma**2 if smoothed else kappa * slopes / schedule.sigma,
    )


def _unrolled(factor: Array, residual: Array) -> Array:
    """E_t = factor_t E_{t+1} + residual_t with E_T = 0, as (T + 1,)."""
    errors = np.zeros(factor.size + 1)
    for t in reversed(range(factor.size)):
        errors[t] = factor[t] * errors[t + 1] + residual[t]
    return errors
