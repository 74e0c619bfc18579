r"""Learning a noise schedule on Gaussian data: the bilevel problem with every object exact.

The upper variable is x = (start, end, tau, epsilon) of a schedule family, eqs. (16) and (34) of the bilevel paper; the
lower problem is score matching, eq. (24). With the exact score, which solves the lower problem for every schedule, the
upper objective is

    F(x) = W2^2(law of S DDIM steps, data),

a closed-form function of alpha_bar at the S visited times: `ScheduleProblem` has its value, gradient and minimum. A
predictor with one weight per time gives the penalty method something to do: `LinearPredictorToy`. The gradient of the
score-matching loss in the schedule is `score_matching_gradient`. Proofs stand in docs/bilevel.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, minimize

from theory import checked
from theory.checked import Array
from theory.ddpm import ddim_law, ddim_steps
from theory.gaussian import Gaussian, w2_squared
from theory.schedules import (
    Form,
    NoiseSchedule,
    cosine_family,
    cosine_family_jacobian,
    ddim_grid,
    sigmoid_family,
    sigmoid_family_jacobian,
)

Family = Literal["cosine", "sigmoid"]

NAMES = ("start", "end", "tau", "epsilon")
DEFAULT = {"cosine": (0.0, 1.0, 1.0, 0.008), "sigmoid": (-3.0, 3.0, 1.0, 0.0)}

# Where `optimum` searches: start, end, tau, epsilon. For "cosine", 0 <= start < end <= 1 keeps the cosine positive up
# to the last step, so that no beta is 0/0 in the released form; tau > 1/2 is where the form "chen" has a derivative.
BOX = {
    ("cosine", "released"): ((0.0, 0.9), (0.02, 1.0), (0.05, 100.0), (0.0, 1.0)),
    ("cosine", "chen"): ((0.0, 0.9), (0.02, 1.0), (0.51, 100.0), (0.0, 1.0)),
    ("sigmoid", "released"): ((-6.0, 3.0), (-5.8, 6.0), (0.3, 20.0), (-3.0, 3.0)),
    ("sigmoid", "chen"): ((-6.0, 3.0), (-5.8, 6.0), (0.3, 20.0), (-3.0, 3.0)),
}
# The least share of the way from `start` to the top of the box at which `end` may lie: alpha_bar must fall.
LEAST_SHARE = 0.02


@dataclass(frozen=True, eq=False)
class Optimum:
    """A minimum: parameters (4,), value F, gradient (4,), and how many of the starts reached it to 1e-9."""

    parameters: Array
    value: float
    gradient: Array
    reached: int


@dataclass(frozen=True, eq=False)
class ScheduleProblem:
    """min over (start, end, tau, epsilon) of W2^2 from the output of S DDIM steps with the exact score to the data.

    `family` is "cosine" or "sigmoid", `form` "released" or "chen" (theory.schedules), T the steps of the schedule, of
    which DDIM visits the S of `ddim_grid`. Source: bilevel paper, eqs. (15)-(16), (26), (34), Algorithm 6.
    Raises ValueError for an unknown family or form, eta outside [0, 1], or unless 2 <= S <= T.

    >>> problem = ScheduleProblem(Gaussian.diagonal([1.0, -0.5], [0.25, 4.0]), "cosine", "released", T=1000, S=10)
    >>> round(problem.objective((0.0, 1.0, 1.0, 0.008)), 10)
    0.1055050131
    >>> problem.gradient((0.2, 0.9, 2.0, 0.02)).round(6)
    array([ 0.726447, -0.727199, -0.097068, -0.238708])
    """

    data: Gaussian
    family: Family
    form: Form
    T: int
    S: int
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in DEFAULT:
            raise ValueError(f"family = {self.family!r}: must be 'cosine' or 'sigmoid'")
        if self.form not in ("released", "chen"):
            raise ValueError(f"form = {self.form!r}: must be 'released' or 'chen'")
        checked.scalar("eta", self.eta, 0.0, 1.0)
        ddim_grid(self.T, self.S)

    def levels(self, parameters: ArrayLike) -> Array:
        """alpha_bar (S,) at the visited times. Raises ValueError like the schedule family."""
        values = _parameters(parameters)
        family = cosine_family if self.family == "cosine" else sigmoid_family
        return family(self.T, *values, form=self.form)[1:][ddim_grid(self.T, self.S)]

    def output(self, parameters: ArrayLike) -> Gaussian:
        """The exact law of the samples. Raises ValueError like the schedule family and `ddim_law`."""
        return ddim_law(self.data, self.levels(parameters), self.eta)

    def objective(self, parameters: ArrayLike) -> float:
        """F = W2^2(output, data). Raises ValueError like `output`."""
        return w2_squared(self.output(parameters), self.data)

    def gradient(self, parameters: ArrayLike) -> Array:
        """dF / d(start, end, tau, epsilon), (4,), for every eta; clipped betas count as constants.

        Raises ValueError like `output` and the jacobian of the family.
        """
        values = _parameters(parameters)
        jacobian = cosine_family_jacobian if self.family == "cosine" else sigmoid_family_jacobian
        # At a zero of the cosine and tau < 1/2 a clipped beta meets 0 * inf on the way; the rows are finite.
        with np.errstate(invalid="ignore"):
            rows = jacobian(self.T, *values, form=self.form)[1:][ddim_grid(self.T, self.S)]
        return level_gradient(self.data, self.levels(values), self.eta) @ rows

    def optimum(
        self,
        free: Sequence[str] = ("end", "tau", "epsilon"),
        start: ArrayLike | None = None,
        box: Sequence[tuple[float, float]] | None = None,
    ) -> Optimum:
        """The least F over the `free` parameters in `box`, by L-BFGS-B with the exact gradient from several starts.

        `start` (4,) is the first start and holds the parameters that are not free; by default the family's DEFAULT.
        `box` gives (low, high) of the four parameters, by default BOX. The other starts are fixed points of the box.
        The value is good to 1e-12 and the parameters, where F is flat, to about 1e-6 (redundant ones not at all).
        Raises ValueError for an unknown or repeated name, no name, or a start outside the box in a free parameter.

        >>> problem = ScheduleProblem(Gaussian.diagonal([1.0, -0.5], [0.25, 4.0]), "cosine", "released", T=1000, S=10)
        >>> round(problem.optimum(free=["tau"]).value, 10)
        0.0863711011
        """
        base = _parameters(DEFAULT[self.family] if start is None else start)
        limits = checked.array("box", BOX[self.family, self.form] if box is None else box, 2)
        if limits.shape != (4, 2):
            raise ValueError(f"box has shape {limits.shape}: must be (4, 2), one (low, high) per parameter")
        if not free or len(set(free)) != len(free) or not set(free) <= set(NAMES):
            raise ValueError(f"free = {list(free)}: must be distinct names out of {list(NAMES)}")
        index = [i for i, name in enumerate(NAMES) if name in free]
        for i in index:
            checked.scalar(NAMES[i], float(base[i]), float(limits[i, 0]), float(limits[i, 1]))
        top, share_free = float(limits[1, 1]), "end" in free
        bounds = limits.copy()
        if share_free:
            bounds[1] = LEAST_SHARE, 1.0
        else:
            bounds[0, 1] = min(bounds[0, 1], base[1] - LEAST_SHARE * (limits[1, 1] - limits[1, 0]))

        # The search replaces a free `end` by its share of the way from `start` to the top: start < end becomes a box.
        def parameters_at(point: Array) -> Array:
            parameters = base.copy()
            parameters[index] = point
            if share_free:
                parameters[1] = parameters[0] + parameters[1] * (top - parameters[0])
            return parameters

        def value_and_gradient(point: Array) -> tuple[float, Array]:
            parameters = parameters_at(point)
            gradient = self.gradient(parameters)
            if share_free:
                share = (parameters[1] - parameters[0]) / (top - parameters[0])
                gradient[:2] = gradient[0] + (1.0 - share) * gradient[1], (top - parameters[0]) * gradient[1]
            return self.objective(parameters), gradient[index]

        first = base.copy()
        if share_free:
            first[1] = (base[1] - base[0]) / (top - base[0])
        runs: list[tuple[float, Array]] = []
        for x0 in _starts(first, bounds):
            run = minimize(
                value_and_gradient,
                x0[index],
                jac=True,
                method="L-BFGS-B",
                bounds=Bounds(bounds[index, 0], bounds[index, 1]),
                options={"maxiter": 3000, "maxfun": 6000, "maxcor": 20, "ftol": 1e-16, "gtol": 1e-11},
            )
            runs.append((float(run.fun), run.x))
        least, point = min(runs, key=lambda run: run[0])
        parameters = parameters_at(point)
        reached = sum(value < least + 1e-9 for value, _ in runs)
        return Optimum(parameters, self.objective(parameters), self.gradient(parameters), reached)


def level_gradient(data: Gaussian, alpha_bar: ArrayLike, eta: float = 0.0) -> Array:
    """The derivatives (S,) of W2^2(ddim_law(data, alpha_bar, eta), data) in each alpha_bar.

    Backwards through the recursion V' = c^2 V + sigma^2, e' = c e of variance and mean error; docs/bilevel.md, "The
    gradient in the schedule". A last level of exactly 0, where F has no derivative, counts as a constant: the form
    "chen" pins it there. Raises ValueError like `ddim_steps`.

    >>> level_gradient(Gaussian.scalar(1.0, 1.0), [0.5, 0.25]).round(6)
    array([-0.146234,  0.404701])
    """
    eigenvalues, basis = np.linalg.eigh(data.cov)
    s2 = np.maximum(eigenvalues, 0.0)
    slopes, noise = ddim_steps(s2, alpha_bar, eta)
    now = np.asarray(alpha_bar, dtype=np.float64)
    by_now, by_then, noise_by_now, noise_by_then = _step_derivatives(s2, now, slopes, noise[:, 0], eta)
    # gains[i] is the product of the slopes that follow step i in time, that is of steps 1..i (i = 0: none).
    gains = np.cumprod(np.concatenate([np.ones((1, s2.size)), slopes]), axis=0)
    variances = np.ones((now.size + 1, s2.size))
    for i in range(now.size - 1, -1, -1):
        variances[i] = slopes[i] ** 2 * variances[i + 1] + noise[i]
    error = gains[-1] * (basis.T @ data.mean)
    # F = sum of a_S error^2 + (sqrt(V) - s)^2; for s = 0 the last term is V, whose derivative is 1 also at V = 0.
    deviation = np.sqrt(variances[0])
    by_variance = np.where(s2 > 0, 1.0 - np.sqrt(s2) / np.where(deviation > 0, deviation, 1.0), 1.0)
    others = np.array([np.prod(np.delete(slopes, i, axis=0), axis=0) for i in range(now.size)])
    by_slope = 2.0 * now[-1] * gains[-1] * others * (basis.T @ data.mean) ** 2
    by_slope = by_slope + 2.0 * by_variance * gains[:-1] ** 2 * slopes * variances[1:]
    by_noise = np.sum(by_variance * gains[:-1] ** 2, axis=1)
    gradient = np.sum(by_slope * by_now, axis=1) + by_noise * noise_by_now
    gradient[:-1] += (np.sum(by_slope * by_then, axis=1) + by_noise * noise_by_then)[1:]
    gradient[-1] += float(np.sum(error**2))
    return np.where(now > 0, gradient, 0.0)


def _step_derivatives(s2: Array, now: Array, slopes: Array, noise: Array, eta: float) -> tuple[Array, ...]:
    """Of slopes (S, d) and noise (S,): derivatives in alpha_bar `now` and `then` of each step, then = 1 held fixed."""
    then = np.concatenate([[1.0], now[:-1]])
    marginal = now[:, None] * s2 + (1.0 - now)[:, None]
    inside = (1.0 - now) - eta**2 * (1.0 - now / then)
    # The product (1 - a' - sigma^2)(1 - a) = (1 - a') inside; its root has no derivative at the ends 0, held fixed.
    product = (1.0 - then) * inside
    root = np.sqrt(np.where(product > 0, product, np.inf))
    positive = np.where(now > 0, now, np.inf)
    noise_root_by_now = (1.0 - then) * (eta**2 / then - 1.0) / (2.0 * root)
    noise_root_by_then = -(inside + (1.0 - then) * eta**2 * now / then**2) / (2.0 * root)
    by_now = 0.5 * np.sqrt(then / positive)[:, None] * s2 + noise_root_by_now[:, None]
    by_then = 0.5 * np.sqrt(now / then)[:, None] * s2 + noise_root_by_then[:, None]
    rate = eta**2 * (1.0 - then) / (1.0 - now)
    noise_by_now = noise / (1.0 - now) - rate / then
    noise_by_then = -(eta**2) * (1.0 - now / then) / (1.0 - now) + rate * now / then**2
    return (by_now - slopes * (s2 - 1.0)) / marginal, by_then / marginal, noise_by_now, noise_by_then


def _parameters(parameters: ArrayLike) -> Array:
    values = checked.array("parameters", parameters, 1)
    if values.size != len(NAMES):
        raise ValueError(f"parameters = {values.tolist()}: must have the four entries {', '.join(NAMES)}")
    return values.copy()


def _starts(first: Array, bounds: Array) -> list[Array]:
    """`first` and three points between the bounds (4, 2), the same in every call."""
    low, high = bounds.T
    points = [
        np.array([low[0] + 0.3 * place * (high[0] - low[0]), high[1] - place * (high[1] - low[1]), tau, epsilon])
        for place, tau, epsilon in [(0.1, 0.7, 0.01), (0.4, 1.5, 0.1), (0.7, 3.0, 0.03)]
    ]
    return [np.clip(point, low, high) for point in (first, *points)]


def null_directions(problem: ScheduleProblem, parameters: ArrayLike) -> Array:
    """Directions (k, 4) of parameter space along which alpha_bar, and with it every objective, does not change at all.

    k = 1 for "cosine", whose shape sees start, end and epsilon through two numbers; k = 2 for "sigmoid", which sees all
    four through two. The first is a straight line, the sigmoid's second the tangent of a curve.
    Derived in docs/bilevel.md, "Redundant parameters". Raises ValueError unless there are four.

    >>> problem = ScheduleProblem(Gaussian.scalar(0.0, 4.0), "cosine", "chen", T=100, S=5)
    >>> directions = null_directions(problem, (0.2, 0.9, 2.0, 0.02))
    >>> directions.round(3), bool(abs(directions @ problem.gradient((0.2, 0.9, 2.0, 0.02))) < 1e-12)
    (array([[-0.8 , -0.1 ,  0.  ,  1.02]]), True)
    """
    start, end, tau, epsilon = _parameters(parameters)
    # y(t) = origin + (end - start) t / T with the origin start, or start / T in the released form.
    unit = 1.0 if problem.form == "chen" else problem.T
    if problem.family == "cosine":
        shift = start - unit
        return np.array([[shift, shift + end - start, 0.0, 1.0 + epsilon]])
    centre = 0.0 if problem.form == "chen" else 1.0
    return np.array([[1.0, 1.0, 0.0, 1.0 / (unit * tau)], [0.0, end - start, tau, (centre - start / unit) / tau]])


def start_end_hessian(problem: ScheduleProblem, parameters: ArrayLike) -> Array:
    """The Hessian of F in (start, end), (2, 2), in the basis (1, 1)/sqrt 2, (1, -1)/sqrt 2.

    In the released form its first row is of the order 1/T and its first entry 1/T^2: a common shift of start and end
    moves the schedule by 1/T of it (docs/bilevel.md, "Start and end"). Five-point differences of the exact gradient,
    good to about 1e-6 of each entry. Raises ValueError like `gradient` within 0.03 of `parameters`.

    >>> problem = ScheduleProblem(Gaussian.diagonal([1.0, -0.5], [0.25, 4.0]), "cosine", "released", T=1000, S=10)
    >>> f"{np.linalg.eigvalsh(start_end_hessian(problem, (0.2, 0.9, 2.0, 0.02)))[0]:.1e}"
    '9.1e-07'
    """
    base = _parameters(parameters)
    basis = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0]]) / math.sqrt(2.0)
    rows: list[Array] = []
    long = 0.02 if problem.form == "released" else 0.002
    for direction, step in zip(basis, (long, 0.002), strict=True):
        at = [basis @ problem.gradient(base + k * step * direction) for k in (-2, -1, 1, 2)]
        rows.append((at[0] - 8.0 * at[1] + 8.0 * at[2] - at[3]) / (12.0 * step))
    # A small entry is differenced along the direction in which the gradient hardly changes, where it loses no digits.
    return np.array([rows[0], [rows[0][1], rows[1][1]]])


def invalid_share(
    parameters: ArrayLike, std: float, T: int = 1000, perturbed: Sequence[str] = NAMES, two_sided: bool = True
) -> float:
    """The share of perturbations x +- std v, v ~ N(0, I), that meet a 0/0 beta in the released cosine schedule.

    That happens when the cosine vanishes before the last step, (T - 1)(end - start) + start >= T: one normal tail, or
    two when either of two points may fail. (It neglects end < start and 1 + epsilon or tau below zero.) `perturbed` are
    the parameters that v moves. Raises ValueError for std <= 0, an unknown name, or a centre that is itself invalid.

    >>> round(invalid_share((0.0, 1.0, 1.0, 0.008), 0.01), 6), round(invalid_share((0.0, 0.9, 1.0, 0.008), 0.01), 6)
    (0.943543, 0.0)
    """
    start, end, *_ = _parameters(parameters)
    checked.scalar("std", std, 0.0, math.inf, closed="()")
    checked.count("T", T, 2)
    if not set(perturbed) <= set(NAMES):
        raise ValueError(f"perturbed = {list(perturbed)}: must be names out of {list(NAMES)}")
    room = 1.0 - ((T - 1) * (end - start) + start) / T
    if room <= 0:
        raise ValueError(
            f"parameters = {_parameters(parameters).tolist()}: must keep the cosine positive to step {T - 1}"
        )
    spread = math.hypot((T - 2) / T * ("start" in perturbed), (T - 1) / T * ("end" in perturbed))
    if spread == 0:
        return 0.0
    tail = 0.5 * math.erfc(room / (std * spread * math.sqrt(2.0)))
    return 2.0 * tail if two_sided else tail


@dataclass(frozen=True, eq=False)
class LinearPredictorToy:
    """Penalty bilevel on a schedule with one weight k_t per time: T DDIM steps of data N(0, variance) on the line.

    Upper variable tau, in the released cosine schedule with start 0, end 0.9, epsilon 0.008. Lower variable k (T,), the
    predictor eps(x, t) = k_t x, with g = mean_t E(eps - k_t x_t)^2 and f = (output deviation - data deviation)^2.
    The output deviation is the product of c_t = A_t + B_t k_t. Docs/bilevel.md, "A predictor with one weight per time".
    Raises ValueError unless T >= 1 and variance > 0.

    >>> toy = LinearPredictorToy()
    >>> round(toy.objective(1.0), 12), round(toy.gradient(1.0), 12)
    (0.005832592654, 0.007536194266)
    >>> round(toy.penalty_gradient(1.0, 1.0), 12)
    -0.000130108616
    """

    T: int = 8
    variance: float = 0.25

    def __post_init__(self) -> None:
        checked.count("T", self.T, 1)
        checked.scalar("variance", self.variance, 0.0, math.inf, closed="()")

    def alpha_bar(self, tau: float) -> Array:
        """alpha_bar_t (T,), t = 1..T. Raises ValueError unless tau > 0."""
        return cosine_family(self.T, *self._parameters(tau), form="released")[1:]

    def lower(self, tau: float, k: ArrayLike) -> float:
        """g(tau, k) for weights k (T,)."""
        a, weights = self.alpha_bar(tau), self._weights(k)
        return float(np.mean(1.0 - 2.0 * weights * np.sqrt(1.0 - a) + weights**2 * self._marginal(a)))

    def upper(self, tau: float, k: ArrayLike) -> float:
        """f(tau, k) for weights k (T,)."""
        offset, slope = self._coefficients(self.alpha_bar(tau))
        return float((np.prod(offset + slope * self._weights(k)) - math.sqrt(self.variance)) ** 2)

    def lower_solution(self, tau: float) -> Array:
        """k*(tau) = sqrt(1 - a)/D(a), (T,): the exact noise prediction."""
        a = self.alpha_bar(tau)
        return np.sqrt(1.0 - a) / self._marginal(a)

    def penalty_solution(self, tau: float, gamma: float) -> Array:
        """k^gamma (T,), the minimiser of f + gamma g that Newton's method with line search finds from k*.

        Raises ValueError unless gamma > 0, or if the iteration does not end at a minimum.

        >>> LinearPredictorToy().penalty_solution(1.0, 10.0)[:3].round(6)
        array([0.659842, 1.018102, 1.136259])
        """
        checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
        k = self.lower_solution(tau)
        for _ in range(100):
            gradient, hessian = self._penalised_derivatives(tau, k, gamma)
            eigenvalues, basis = np.linalg.eigh(hessian)
            step = basis @ ((basis.T @ gradient) / np.maximum(np.abs(eigenvalues), 1e-8))
            if np.abs(step).max() < 1e-13 * max(1.0, float(np.abs(k).max())) and eigenvalues[0] > 0:
                return k
            value, size = self._penalised(tau, k, gamma), 1.0
            while self._penalised(tau, k - size * step, gamma) > value + 1e-14 * (1.0 + gamma) and size > 1e-9:
                size *= 0.5
            k = k - size * step
        raise ValueError(f"gamma = {gamma}: Newton's method must end at a minimum, it does not at tau = {tau}")

    def objective(self, tau: float) -> float:
        """F(tau) = f(tau, k*(tau))."""
        return self.upper(tau, self.lower_solution(tau))

    def gradient(self, tau: float) -> float:
        """F'(tau), by the total derivative of the product of c_t(k*)."""
        a, rate = self.alpha_bar(tau), self._rate(tau)
        k = self.lower_solution(tau)
        by_level = self._solution_rate(a)
        return float(self._by_level(tau, k) @ rate + self._by_weight(tau, k) @ (by_level * rate))

    def penalty_objective(self, tau: float, gamma: float) -> float:
        """F_gamma(tau) = f(k^gamma) + gamma (g(k^gamma) - g(k*)). Raises ValueError like `penalty_solution`."""
        k, solved = self.penalty_solution(tau, gamma), self.lower_solution(tau)
        # g(k) - g(k*) as the square that it is: the difference loses its digits for large gamma.
        excess = np.mean(self._marginal(self.alpha_bar(tau)) * (k - solved) ** 2)
        return self.upper(tau, k) + gamma * float(excess)

    def penalty_gradient(self, tau: float, gamma: float) -> float:
        """F_gamma'(tau) by the envelope theorem, eq. (4). Raises ValueError like `penalty_solution`."""
        k, solved = self.penalty_solution(tau, gamma), self.lower_solution(tau)
        a, rate = self.alpha_bar(tau), self._rate(tau)
        # dg/da at k less at k*, with k^2 - k*^2 factored.
        lower = (k - solved) * (1.0 / np.sqrt(1.0 - a) + (k + solved) * (self.variance - 1.0)) / self.T
        return float((self._by_level(tau, k) + gamma * lower) @ rate)

    def bias_limits(self, tau: float) -> tuple[float, float]:
        """The limits of gamma (F_gamma - F) and gamma (F_gamma' - F') as gamma grows: -psi/2 and -psi'/2.

        psi = grad_k f . H^{-1} grad_k f at k*, H = diag(2 D/T).

        >>> tuple(round(limit, 10) for limit in LinearPredictorToy().bias_limits(1.0))
        (-0.0218585839, -0.0649988845)
        """
        a, rate = self.alpha_bar(tau), self._rate(tau)
        offset, slope = self._coefficients(a)
        k = self.lower_solution(tau)
        c = offset + slope * k
        offset_rate, slope_rate = self._coefficient_rates(a, rate)
        c_rate = offset_rate + slope_rate * k + slope * self._solution_rate(a) * rate
        product, logarithmic = float(np.prod(c)), c_rate / c
        gap = product - math.sqrt(self.variance)
        product_rate = product * float(np.sum(logarithmic))
        share = slope / c
        share_rate = slope_rate / c - share * logarithmic
        by_weight = 2.0 * gap * product * share
        by_weight_rate = 2.0 * (product_rate * (product + gap) * share + gap * product * share_rate)
        marginal = self._marginal(a)
        psi = 0.5 * self.T * np.sum(by_weight**2 / marginal)
        marginal_rate = (self.variance - 1.0) * rate
        psi_rate = self.T * np.sum(by_weight * by_weight_rate / marginal)
        psi_rate -= 0.5 * self.T * np.sum(by_weight**2 * marginal_rate / marginal**2)
        return -0.5 * float(psi), -0.5 * float(psi_rate)

    def _parameters(self, tau: float) -> tuple[float, float, float, float]:
        return 0.0, 0.9, tau, 0.008

    def _rate(self, tau: float) -> Array:
        """d alpha_bar / d tau, (T,)."""
        return cosine_family_jacobian(self.T, *self._parameters(tau), form="released")[1:, 2]

    def _weights(self, k: ArrayLike) -> Array:
        weights = checked.array("k", k, 1)
        if weights.size != self.T:
            raise ValueError(f"k has {weights.size} entries: must have T = {self.T}")
        return weights

    def _marginal(self, a: Array) -> Array:
        return a * self.variance + 1.0 - a

    def _coefficients(self, a: Array) -> tuple[Array, Array]:
        """A_t and B_t of the DDIM slope c_t = A_t + B_t k_t, each (T,)."""
        then = np.concatenate([[1.0], a[:-1]])
        return np.sqrt(then / a), np.sqrt(1.0 - then) - np.sqrt(then * (1.0 - a) / a)

    def _coefficient_rates(self, a: Array, rate: Array) -> tuple[Array, Array]:
        """The derivatives of A_t and B_t when alpha_bar moves at `rate`, each (T,)."""
        then, then_rate = np.concatenate([[1.0], a[:-1]]), np.concatenate([[0.0], rate[:-1]])
        offset = np.sqrt(then / a)
        offset_rate = 0.5 * offset * (then_rate / then - rate / a)
        noise, noise_rate = np.sqrt(1.0 - a), -0.5 * rate / np.sqrt(1.0 - a)
        before = np.concatenate([[0.0], noise_rate[:-1]])
        return offset_rate, before - offset_rate * noise - offset * noise_rate

    def _solution_rate(self, a: Array) -> Array:
        """dk*_t / d alpha_bar_t, (T,)."""
        marginal, noise = self._marginal(a), np.sqrt(1.0 - a)
        return -0.5 / (noise * marginal) - noise * (self.variance - 1.0) / marginal**2

    def _others(self, c: Array) -> Array:
        """The product of all c but each in turn, (T,)."""
        return np.array([np.prod(np.delete(c, t)) for t in range(c.size)], dtype=np.float64)

    def _by_weight(self, tau: float, k: Array) -> Array:
        """df/dk, (T,)."""
        offset, slope = self._coefficients(self.alpha_bar(tau))
        c = offset + slope * k
        return 2.0 * (np.prod(c) - math.sqrt(self.variance)) * slope * self._others(c)

    def _by_level(self, tau: float, k: Array) -> Array:
        """df/d alpha_bar at fixed k, (T,)."""
        a = self.alpha_bar(tau)
        offset, slope = self._coefficients(a)
        c = offset + slope * k
        rates = [
            np.add(*np.multiply(self._coefficient_rates(a, unit), (np.ones(self.T), k))) for unit in np.eye(self.T)
        ]
        return 2.0 * (np.prod(c) - math.sqrt(self.variance)) * (np.array(rates) @ self._others(c))

    def _penalised(self, tau: float, k: Array, gamma: float) -> float:
        return self.upper(tau, k) + gamma * self.lower(tau, k)

    def _penalised_derivatives(self, tau: float, k: Array, gamma: float) -> tuple[Array, Array]:
        """Gradient (T,) and Hessian (T, T) of f + gamma g in k."""
        a = self.alpha_bar(tau)
        offset, slope = self._coefficients(a)
        c = offset + slope * k
        single = slope * self._others(c)
        double = np.zeros((self.T, self.T))
        for s in range(self.T):
            for t in range(s):
                double[s, t] = double[t, s] = slope[s] * slope[t] * np.prod(np.delete(c, [s, t]))
        gap = float(np.prod(c)) - math.sqrt(self.variance)
        marginal = self._marginal(a)
        gradient = 2.0 * gap * single + 2.0 * gamma * marginal * (k - np.sqrt(1.0 - a) / marginal) / self.T
        hessian = 2.0 * np.outer(single, single) + 2.0 * gap * double + np.diag(2.0 * gamma * marginal / self.T)
        return gradient, hessian


def score_matching_loss(beta: ArrayLike, slopes: ArrayLike, offsets: ArrayLike, data: Gaussian) -> float:
    """L = mean over t of E|eps - eps_t(x_t)|^2 for the predictor eps_t(x) = slopes_t x + offsets_t per coordinate.

    beta, slopes, offsets are (T,). Source: bilevel paper, eq. (24). Raises ValueError unless the three have one length
    and every beta lies in (0, 1).

    >>> round(score_matching_loss([0.5], [0.0], [0.0], Gaussian.scalar(3.0, 1.0)), 12)
    1.0
    """
    schedule, k, c = _predictor(beta, slopes, offsets)
    a = schedule.alpha_bar[:, None]
    residual_mean = c + k * np.sqrt(a) * data.mean
    spread = k**2 * a * np.diag(data.cov) + (k * np.sqrt(schedule.one_minus_alpha_bar)[:, None] - 1.0) ** 2
    return float(np.sum(residual_mean**2 + spread)) / schedule.steps


def score_matching_gradient(
    beta: ArrayLike, slopes: ArrayLike, offsets: ArrayLike, data: Gaussian, own_step_only: bool = False
) -> Array:
    """dL/dbeta_s, (T,), of `score_matching_loss` with the predictor held fixed.

    Source: bilevel paper, appendix D.2, eqs. (28)-(31): every t >= s contributes, because beta_s moves all later
    alpha_bar. `own_step_only` keeps t = s alone, a mistake that is right at s = T only. Derived in docs/bilevel.md,
    "Score matching moves with the schedule". Raises ValueError like `score_matching_loss`.

    >>> data = Gaussian.scalar(0.7, 0.4)
    >>> score_matching_gradient([0.02, 0.3], [0.3, 0.95], [0.1, -0.1], data).round(6)
    array([-1.596841, -0.742734])
    """
    schedule, k, c = _predictor(beta, slopes, offsets)
    a, noise = schedule.alpha_bar[:, None], np.sqrt(schedule.one_minus_alpha_bar)[:, None]
    mean, variance = data.mean, np.diag(data.cov)
    # E[residual x_0] and E[residual eps] for the residual k x_t + c - eps.
    with_data = k * np.sqrt(a) * (variance + mean**2) + c * mean
    with_noise = k * noise - 1.0
    by_level = np.sum(k * (with_data / np.sqrt(a) - with_noise / noise), axis=1) / schedule.steps
    terms = by_level * schedule.alpha_bar
    later = terms if own_step_only else np.cumsum(terms[::-1])[::-1]
    return -later / schedule.alpha


def _predictor(beta: ArrayLike, slopes: ArrayLike, offsets: ArrayLike) -> tuple[NoiseSchedule, Array, Array]:
    schedule = NoiseSchedule(beta)
    k, c = checked.array("slopes", slopes, 1), checked.array("offsets", offsets, 1)
    if k.size != schedule.steps or c.size != schedule.steps:
        raise ValueError(f"slopes, offsets have {k.size}, {c.size} entries: must have one per beta, {schedule.steps}")
    return schedule, k[:, None], c[:, None]
