r"""The Langevin experiment of Implicit Diffusion (5.1, A.1), exactly: softmax mixtures and their reward.

The potential is V(x, theta) = -log sum_i sigma_i exp(-|x - mu_i|^2 / (2 s^2)), sigma = softmax(theta), and the
Gibbs law pi_theta ~ exp(-V) is the mixture sum_i sigma_i N(mu_i, s^2 I). The objective is *minimised*:

    l(theta) = -E_{pi_theta} R = -sum_j sigma_j rho_j,      dl/dtheta_j = Cov(R, dV/dtheta_j) = -sigma_j (rho_j - rho),

rho_j the reward's mean over component j, rho = sum_j sigma_j rho_j. gamma is the step of the unadjusted Langevin
chain, x <- x - gamma grad_x V + sqrt(2 gamma) z, and eta the step of theta. Every closed form has a quadrature next to
it, which shares nothing with it but the potential. Proofs stand in docs/implicit.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax, logsumexp, ndtr, softmax

from theory import checked
from theory.checked import Array

# --- The family -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SoftmaxMixture:
    """V(x, theta) = -log sum_i softmax(theta)_i exp(-|x - mu_i|^2 / (2 variance)), centres mu (k, d); A.1.

    Methods take points x (n, d) and theta (k,). Raises ValueError unless the centres are finite with two axes, the
    variance is positive and finite, and (in the methods) theta and x have those shapes.

    >>> SoftmaxMixture([[0.0], [3.0]], 1.0).potential([[0.0]], [0.0, -50.0]).round(12) + 0.0
    array([0.])
    >>> SoftmaxMixture([[0.0], [3.0]], 1.0).weights([0.0, 0.0, 0.0])
    Traceback (most recent call last):
    ...
    ValueError: theta has shape (3,): must be (2,), one entry per centre
    """

    centres: Array
    variance: float

    def __init__(self, centres: ArrayLike, variance: float) -> None:
        object.__setattr__(self, "centres", checked.array("centres", centres, 2))
        object.__setattr__(self, "variance", checked.scalar("variance", variance, 0.0, math.inf, closed="()"))

    @property
    def dim(self) -> int:
        """The dimension d of x."""
        return self.centres.shape[1]

    def weights(self, theta: ArrayLike) -> Array:
        """softmax(theta), (k,): the masses of the components under pi_theta."""
        return softmax(self._theta(theta))

    def potential(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """V(x, theta), (n,); as printed, without the constant that would normalise exp(-V)."""
        return -logsumexp(self._exponents(x, theta), axis=1)

    def responsibilities(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """w_j(x), the probability of component j given x, (n, k)."""
        return softmax(self._exponents(x, theta), axis=1)

    def grad_x(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """grad_x V = (x - sum_j w_j(x) mu_j) / variance, (n, d)."""
        return (self._points(x) - self.responsibilities(x, theta) @ self.centres) / self.variance

    def grad_theta(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """dV/dtheta_j = -(w_j(x) - sigma_j), (n, k)."""
        return self.weights(theta) - self.responsibilities(x, theta)

    def log_density(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """log pi_theta(x), (n,), normalised: -V less (d / 2) log(2 pi variance), whatever theta."""
        return -self.potential(x, theta) - 0.5 * self.dim * math.log(2.0 * math.pi * self.variance)

    def density(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """pi_theta(x), (n,), normalised."""
        return np.exp(self.log_density(x, theta))

    def _theta(self, theta: ArrayLike) -> Array:
        value = checked.array("theta", theta, 1)
        if value.size != len(self.centres):
            raise ValueError(f"theta has shape {value.shape}: must be ({len(self.centres)},), one entry per centre")
        return value

    def _points(self, x: ArrayLike) -> Array:
        value = checked.array("x", x, 2)
        if value.shape[1] != self.dim:
            raise ValueError(f"x has shape {value.shape}: must be (n, {self.dim})")
        return value

    def _exponents(self, x: ArrayLike, theta: ArrayLike) -> Array:
        points = self._points(x)
        squares = (points**2).sum(axis=1)[:, None] - 2.0 * points @ self.centres.T + (self.centres**2).sum(axis=1)
        return log_softmax(self._theta(theta)) - squares / (2.0 * self.variance)


def hexagon(radius: float) -> Array:
    """mu_j = radius (cos((j - 1) pi / 3), sin((j - 1) pi / 3)), j = 1..6: (6, 2). ValueError unless radius > 0.

    >>> hexagon(4.0)[1].round(6)
    array([2.      , 3.464102])
    """
    checked.scalar("radius", radius, 0.0, math.inf, closed="()")
    angles = np.arange(6) * (math.pi / 3.0)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def hexagon_with_origin(radius: float) -> Array:
    """The hexagon and, last, the origin: the seven wells of A.1, "Training from scratch"; (7, 2).

    >>> hexagon_with_origin(4.0)[-1]
    array([0., 0.])
    """
    return np.concatenate([hexagon(radius), np.zeros((1, 2))])


# --- The reward -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HalfPlaneReward:
    """R(x) = 1(x_1 > 0) exp(-|x - goal|^2 / tau) / alpha on the plane, goal (2,); A.1.

    Raises ValueError unless goal has two finite entries and tau, alpha are positive.

    >>> HalfPlaneReward([1.0, 0.0], 1.0, 2.0)([[1.0, 0.0], [-1.0, 0.0]])
    array([0.5, 0. ])
    """

    goal: Array
    tau: float
    alpha: float

    def __init__(self, goal: ArrayLike, tau: float, alpha: float) -> None:
        point = checked.array("goal", goal, 1)
        if point.size != 2:
            raise ValueError(f"goal = {point.tolist()}: must have two entries")
        object.__setattr__(self, "goal", point)
        object.__setattr__(self, "tau", checked.scalar("tau", tau, 0.0, math.inf, closed="()"))
        object.__setattr__(self, "alpha", checked.scalar("alpha", alpha, 0.0, math.inf, closed="()"))

    def __call__(self, x: ArrayLike) -> Array:
        """R at the points x (n, 2): (n,)."""
        points = checked.array("x", x, 2)
        shift = points - self.goal
        bump = np.exp(-np.square(shift).sum(axis=1) / self.tau) / self.alpha
        return np.where(points[:, 0] > 0.0, bump, 0.0)

    def gaussian_mean(self, means: ArrayLike, variance: float) -> Array:
        """E R over N(mean, variance I) for each row of means (k, 2): (k,), in closed form.

        The product of the Gaussian and the exponential is a Gaussian again, of which the half plane keeps a share.
        Raises ValueError unless variance > 0.

        >>> HalfPlaneReward([0.0, 0.0], 2.0, 1.0).gaussian_mean([[0.0, 0.0]], 1.0)  # a half of a half
        array([0.25])
        """
        centres = checked.array("means", means, 2)
        checked.scalar("variance", variance, 0.0, math.inf, closed="()")
        total = self.tau + 2.0 * variance
        height = self.tau / (self.alpha * total) * np.exp(-((centres - self.goal) ** 2).sum(axis=1) / total)
        first = (self.tau * centres[:, 0] + 2.0 * variance * self.goal[0]) / total
        share = np.asarray(ndtr(first / math.sqrt(variance * self.tau / total)), dtype=np.float64)
        return height * share


class Setting(NamedTuple):
    """Constants of the experiment: mixture, reward, theta_0 (k,), Langevin step gamma, step eta of theta."""

    mixture: SoftmaxMixture
    reward: HalfPlaneReward
    theta0: tuple[float, ...]
    gamma: float
    eta: float


RELEASED = Setting(
    SoftmaxMixture(hexagon(4.0), 1.0), HalfPlaneReward([4.0, 3.8], 20.0, 2.5), (1.5, 0.0, 1.5, 0.0, 1.5, 0.0), 0.2, 0.1
)
"""The defaults of the released code. All constants differ from A.1; the goal is A.1's times the radius."""


def printed(radius: float, gamma: float, eta: float) -> Setting:
    """The constants of A.1, which gives neither the hexagon's radius nor the two steps.

    >>> printed(4.0, 0.1, 0.1).mixture.variance
    0.5
    """
    checked.scalar("gamma", gamma, 0.0, math.inf, closed="()")
    checked.scalar("eta", eta, 0.0, math.inf, closed="()")
    mixture = SoftmaxMixture(hexagon(radius), 0.5)
    return Setting(mixture, HalfPlaneReward([1.0, 0.95], 1.0, 1.0), (1.0, 0.0, 1.0, 0.0, 1.0, 0.0), gamma, eta)


SCRATCH_THETA0_PRINTED = (-7.0,) * 7 + (11.0,)
"""theta_0 of A.1, "Training from scratch", as printed: eight entries for seven wells."""
SCRATCH_THETA0 = (-7.0,) * 6 + (11.0,)
"""What must be meant: six vertices at -7 and the origin at 11."""
SCRATCH_TARGET = (1.5, 0.0, 1.5, 0.0, 1.5, 0.0, 0.0)
"""theta* of the same paragraph."""


# --- Objective and exact gradient descent ---------------------------------------------------------------------------


def component_rewards(mixture: SoftmaxMixture, reward: HalfPlaneReward, variance: float | None = None) -> Array:
    """rho_j = E R over N(mu_j, variance I), (k,); the mixture's own variance unless another is given.

    >>> component_rewards(RELEASED.mixture, RELEASED.reward)[:3].round(6)
    array([0.188628, 0.298296, 0.004477])
    """
    return reward.gaussian_mean(mixture.centres, mixture.variance if variance is None else variance)


def objective(rho: ArrayLike, theta: ArrayLike) -> float:
    """l(theta) = -sum_j softmax(theta)_j rho_j. Its infimum, -max rho, is attained only at infinity (if rho varies).

    >>> objective([1.0, 0.0], [0.0, 0.0])
    -0.5
    """
    levels, parameters = _pair(rho, theta)
    return -float(softmax(parameters) @ levels)


def gradient(rho: ArrayLike, theta: ArrayLike) -> Array:
    """grad l = -sigma_j (rho_j - sum_i sigma_i rho_i), (k,). Its entries sum to zero: descent conserves sum theta.

    >>> gradient([1.0, 0.0], [0.0, 0.0])
    array([-0.25,  0.25])
    """
    levels, parameters = _pair(rho, theta)
    sigma = softmax(parameters)
    return -sigma * (levels - sigma @ levels)


def descent(rho: ArrayLike, theta0: ArrayLike, eta: float, steps: int) -> Array:
    """theta_0, ..., theta_steps of theta <- theta - eta grad l(theta): (steps + 1, k).

    Algorithm 1 with infinitely many particles and infinitely fast sampling. Raises ValueError unless eta > 0 and
    steps >= 0, and if the shapes of rho and theta0 differ.

    >>> descent([1.0, 0.0], [0.0, 0.0], 0.4, 1)
    array([[ 0. ,  0. ],
           [ 0.1, -0.1]])
    """
    levels, parameters = _pair(rho, theta0)
    checked.scalar("eta", eta, 0.0, math.inf, closed="()")
    path = np.empty((checked.count("steps", steps, 0) + 1, parameters.size))
    path[0] = parameters
    for k in range(steps):
        path[k + 1] = path[k] - eta * gradient(levels, path[k])
    return path


def langevin_variance(variance: float, gamma: float) -> float:
    """variance / (1 - gamma / (2 variance)): what a mode N(mu, variance I) becomes under unadjusted Langevin.

    Exact for a single component. In a mixture it holds within a mode as long as the modes overlap little; see
    docs/implicit.md for the error at radius 4. Raises ValueError unless 0 < gamma < 2 variance, the stability bound.

    >>> round(langevin_variance(1.0, 0.2), 6)
    1.111111
    """
    checked.scalar("variance", variance, 0.0, math.inf, closed="()")
    checked.scalar("gamma", gamma, 0.0, 2.0 * variance, closed="()")
    return variance / (1.0 - gamma / (2.0 * variance))


# --- The plateau ----------------------------------------------------------------------------------------------------


def steps_near(values: ArrayLike, level: float, tolerance: float) -> int:
    """How many entries of a trajectory (steps,) lie within tolerance * |level| of the level: the length of a plateau.

    >>> steps_near([0.0, 0.9, 1.05, 2.0], 1.0, 0.1)
    2
    """
    checked.scalar("tolerance", tolerance, 0.0, math.inf, closed="[)")
    return int((np.abs(checked.array("values", values, 1) - level) <= tolerance * abs(level)).sum())


def vertex_rates(rho: ArrayLike, theta: ArrayLike) -> Array:
    """d log(sigma_i / sigma_j) / d(eta t) of the gradient flow, j the heaviest component, (k,); zero at i = j.

    They vanish at the vertex like the weights themselves, 2 sigma_i sigma_j (rho_i - rho_j) for two components: the
    linearisation there has rate zero, weights grow like 1 / (c - t) and not like exp(t). Hence the long plateaus.

    >>> vertex_rates([0.0, 1.0], [10.0, 0.0]).round(9)
    array([0.0000e+00, 9.0792e-05])
    """
    flow = -gradient(rho, theta)
    return flow - flow[int(np.argmax(_pair(rho, theta)[1]))]


def crossing_time(gap: float, logit: float, target: float = 0.0) -> float:
    """eta t in which two components' logit theta_b - theta_a climbs from `logit` to `target`, gap = rho_b - rho_a > 0.

    (F(target) - F(logit)) / gap with F(u) = u + sinh u, exactly for the gradient flow of two components: about
    1 / (2 gap sigma_b) from a small weight sigma_b. Raises ValueError unless gap > 0 and logit <= target.

    >>> round(crossing_time(0.1, -4.0), 3)
    312.899
    """
    checked.scalar("gap", gap, 0.0, math.inf, closed="()")
    checked.scalar("logit", logit, -700.0, target)
    checked.scalar("target", target, logit, 700.0)
    return (target + math.sinh(target) - logit - math.sinh(logit)) / gap


# --- Quadrature -----------------------------------------------------------------------------------------------------


class Atoms(NamedTuple):
    """A law, or a quadrature rule, on finitely many points: points (n, 2), masses (n,)."""

    points: Array
    masses: Array

    def mean(self, values: Array) -> Array:
        """sum_i masses_i values_i for values (n, ...)."""
        return np.tensordot(self.masses, values, axes=1)


def rule(mixture: SoftmaxMixture, nodes: int = 14, reach: float = 10.0) -> Atoms:
    """A product Gauss-Legendre rule for integrals over the plane, in panels with x_1 = 0 and x_2 = 0 as edges.

    The panels are at most one standard deviation wide and reach `reach` standard deviations beyond the centres. A jump
    of the integrand at x_1 = 0 therefore costs no accuracy: nodes = 14 gives twelve digits of everything here. Raises
    ValueError unless the mixture lies in the plane, nodes >= 1 and reach > 0.

    >>> rule(SoftmaxMixture([[0.0, 0.0]], 1.0), nodes=2, reach=1.0).masses.sum().round(12)
    np.float64(4.0)
    """
    if mixture.dim != 2:
        raise ValueError(f"mixture has dimension {mixture.dim}: quadrature needs 2")
    checked.scalar("reach", reach, 0.0, math.inf, closed="()")
    x1, w1 = _panels(*_span(mixture, reach, math.sqrt(mixture.variance)), checked.count("nodes", nodes, 1))
    return _product(x1, w1, x1, w1)


def law(mixture: SoftmaxMixture, theta: ArrayLike, at: Atoms | None = None) -> Atoms:
    """pi_theta as atoms: the rule `at` (default `rule(mixture)`), its masses times the density.

    >>> round(float(law(RELEASED.mixture, RELEASED.theta0).masses.sum()), 12)
    1.0
    """
    base = rule(mixture) if at is None else at
    return Atoms(base.points, base.masses * mixture.density(base.points, theta))


def expectation(mixture: SoftmaxMixture, theta: ArrayLike, function: Callable[[Array], Array]) -> Array:
    """E_{pi_theta} f by quadrature, absolute error below 1e-11 max |f|; f maps points (n, 2) to (n, ...).

    f may jump across x_1 = 0 and must otherwise be smooth on the scale of a standard deviation.

    >>> expectation(RELEASED.mixture, RELEASED.theta0, RELEASED.reward).round(11)
    np.float64(0.07253288433)
    """
    atoms = law(mixture, theta)
    return atoms.mean(function(atoms.points))


def covariance_gradient(mixture: SoftmaxMixture, theta: ArrayLike, reward: Callable[[Array], Array]) -> Array:
    """grad l = Cov_{pi_theta}(R, grad_theta V), (k,), by quadrature: the other way to `gradient`.

    >>> covariance_gradient(RELEASED.mixture, RELEASED.theta0, RELEASED.reward)[0].round(10)
    np.float64(-0.0316388155)
    """
    return _covariance(law(mixture, theta), mixture, theta, reward)


def mean_log_density(mixture: SoftmaxMixture, under: ArrayLike, theta: ArrayLike) -> float:
    """E_{pi_under} log pi_theta by quadrature: the log-likelihood of Figure 5 for exact samples of pi_under.

    >>> round(mean_log_density(SoftmaxMixture([[0.0, 0.0]], 1.0), [0.0], [0.0]), 10)  # -log(2 pi) - 1
    -2.8378770664
    """
    return float(expectation(mixture, under, lambda x: mixture.log_density(x, theta)))


def kl(mixture: SoftmaxMixture, first: ArrayLike, second: ArrayLike) -> float:
    """KL(pi_first || pi_second) by quadrature, in nats.

    >>> kl(RELEASED.mixture, RELEASED.theta0, RELEASED.theta0)
    0.0
    """
    return float(expectation(mixture, first, lambda x: mixture.log_density(x, first) - mixture.log_density(x, second)))


def kl_gradient(mixture: SoftmaxMixture, reference: ArrayLike, theta: ArrayLike) -> Array:
    """Gradient of KL(pi_reference || pi_theta) in theta: E_reference grad_theta V - E_theta grad_theta V, (k,).

    The second expectation vanishes for a softmax mixture, so that the gradient is softmax(theta) - E_reference w.
    Descent *subtracts* it; the released code adds its estimate.

    >>> kl_gradient(RELEASED.mixture, RELEASED.theta0, RELEASED.theta0).round(12) + 0.0
    array([0., 0., 0., 0., 0., 0.])
    """
    base = rule(mixture)
    force = mixture.grad_theta(base.points, theta)
    return law(mixture, reference, base).mean(force) - law(mixture, theta, base).mean(force)


# --- The estimator of a finite batch --------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean (k,) and covariance (k, k) of an estimator."""

    mean: Array
    covariance: Array


def batch_moments(masses: ArrayLike, rewards: ArrayLike, forces: ArrayLike, particles: int) -> Moments:
    """Exact moments of mean(R g) - mean(R) mean(g) over a batch of independent draws; g = grad_theta V.

    The law has atoms of the given masses (n,), where R is rewards (n,) and g is forces (n, k): a discrete law, or
    `law(mixture, theta)`. The mean is (1 - 1/N) Cov(R, g), N = particles; times N / (N - 1) it is unbiased. Successive
    steps of Langevin particles are correlated, so that theta's noise over many steps exceeds a sum of these.
    Raises ValueError unless the masses sum to one within 1e-9 and particles >= 2.

    >>> batch_moments([0.5, 0.5], [0.0, 1.0], [[0.0], [1.0]], 2).mean  # half of the variance 1/4
    array([0.125])
    """
    p, r, g = (
        checked.array("masses", masses, 1),
        checked.array("rewards", rewards, 1),
        checked.array("forces", forces, 2),
    )
    if abs(float(p.sum()) - 1.0) > 1e-9:
        raise ValueError(f"masses sum to {p.sum()}: must sum to one")
    if not len(p) == len(r) == len(g):
        raise ValueError(f"masses, rewards, forces have {len(p)}, {len(r)}, {len(g)} atoms: must be equally many")
    n = checked.count("particles", particles, 2)
    r, g = r - p @ r, g - p @ g
    cross = p @ (r[:, None] * g)
    # The joint cumulant of R, R, g_i, g_j and the pairings: covariances of k-statistics.
    second, spread = p @ r**2, (p[:, None] * g).T @ g
    fourth = ((p * r**2)[:, None] * g).T @ g - second * spread - 2.0 * np.outer(cross, cross)
    unbiased = fourth / n + (second * spread + np.outer(cross, cross)) / (n - 1)
    shrink = 1.0 - 1.0 / n
    return Moments(shrink * cross, shrink**2 * unbiased)


def batch_gradient_moments(
    mixture: SoftmaxMixture, theta: ArrayLike, reward: Callable[[Array], Array], particles: int
) -> Moments:
    """`batch_moments` of the released gradient estimate for N = particles independent draws of pi_theta.

    >>> batch_gradient_moments(RELEASED.mixture, RELEASED.theta0, RELEASED.reward, 2).mean[0].round(10)
    np.float64(-0.0158194078)
    """
    atoms = law(mixture, theta)
    return batch_moments(atoms.masses, reward(atoms.points), mixture.grad_theta(atoms.points, theta), particles)


# --- Algorithm 1 with infinitely many particles ---------------------------------------------------------------------


class State(NamedTuple):
    """One step of the mean field: theta (k,) and the law p of the particles."""

    theta: Array
    p: Atoms


def mean_field(
    setting: Setting, order: str = "printed", nodes: int = 6, spacing: float = 0.25, reach: float = 6.5
) -> Iterator[State]:
    """Yields (theta_k, p_k), k = 0, 1, ...: Algorithm 1 with infinitely many particles, p_0 = N(0, I); never ends.

    p_{k+1} is p_k under one unadjusted Langevin step, theta_{k+1} = theta_k - eta Gamma(p, theta_k) with p = p_k
    (order "printed") or p_{k+1} ("released"). The density lives on a fixed product rule, Gauss-Legendre panels with an
    edge at x_1 = 0 (`nodes` to a panel of one unit) times a trapezoidal rule in x_2 (`spacing` units), out to `reach`
    standard deviations beyond the centres; the unit is one of those or, if less, sqrt(5 gamma). The kernel
    N(x - gamma grad V, 2 gamma I) is a product over coordinates, so that a step is one matrix product; nothing is
    interpolated. At the defaults rewards and thetas are good to about 1e-7 after 30 steps of RELEASED. Raises
    ValueError if the order is another word, gamma lies outside (0, 2 variance), the mixture is not in the plane, or the
    mass strays from one by 1e-4 (a rule too coarse or too narrow).

    >>> import itertools
    >>> states = list(itertools.islice(mean_field(RELEASED), 2))
    >>> round(float(states[1].p.masses.sum()), 6)
    1.0
    """
    mixture, reward, theta0, gamma, eta = setting
    if order not in ("printed", "released"):
        raise ValueError(f"order = {order!r}: must be 'printed' or 'released'")
    if mixture.dim != 2:
        raise ValueError(f"mixture has dimension {mixture.dim}: quadrature needs 2")
    langevin_variance(mixture.variance, gamma)  # checks gamma
    unit = min(math.sqrt(mixture.variance), math.sqrt(5.0 * gamma))
    span = _span(mixture, reach, unit)
    x1, w1 = _panels(*span, nodes)
    half = math.ceil(span[0] / (spacing * unit))
    x2 = spacing * unit * np.arange(-half, half + 1, dtype=np.float64)
    base = _product(x1, w1, x2, np.full(x2.size, spacing * unit))
    theta = np.array(theta0, dtype=np.float64)
    p = Atoms(base.points, base.masses * np.exp(-0.5 * (base.points**2).sum(axis=1)) / (2.0 * math.pi))
    while True:
        if not abs(float(p.masses.sum()) - 1.0) < 1e-4:
            raise ValueError(f"p has mass {p.masses.sum()}: must stay 1; take more nodes or a smaller spacing")
        yield State(theta, p)
        drifted = p.points - gamma * mixture.grad_x(p.points, theta)
        first, second = _kernel(x1, drifted[:, 0], gamma), _kernel(x2, drifted[:, 1], gamma)
        density = first @ (p.masses[:, None] * second.T)
        moved = Atoms(base.points, base.masses * density.ravel())
        theta = theta - eta * _covariance(p if order == "printed" else moved, mixture, theta, reward)
        p = moved


def _kernel(targets: Array, means: Array, gamma: float) -> Array:
    """N(targets_a; means_j, 2 gamma), (a, j)."""
    return np.exp(-((targets[:, None] - means) ** 2) / (4.0 * gamma)) / math.sqrt(4.0 * math.pi * gamma)


def _covariance(p: Atoms, mixture: SoftmaxMixture, theta: ArrayLike, reward: Callable[[Array], Array]) -> Array:
    values, force = reward(p.points), mixture.grad_theta(p.points, theta)
    return p.mean(values[:, None] * force) - p.mean(values) * p.mean(force)


def _pair(rho: ArrayLike, theta: ArrayLike) -> tuple[Array, Array]:
    levels, parameters = checked.array("rho", rho, 1), checked.array("theta", theta, 1)
    if levels.shape != parameters.shape:
        raise ValueError(f"theta has shape {parameters.shape}: must be that of rho, {levels.shape}")
    return levels, parameters


def _span(mixture: SoftmaxMixture, reach: float, panel: float) -> tuple[float, int]:
    """Half the side of a square that holds the mixture, and how many panels of at most that width fill the half."""
    half = float(np.abs(mixture.centres).max()) + reach * math.sqrt(mixture.variance)
    return half, math.ceil(half / panel)


def _panels(half: float, panels: int, nodes: int) -> tuple[Array, Array]:
    """Gauss-Legendre points and weights on [-half, half] in 2 * panels equal panels; 0 is an edge."""
    z, w = np.polynomial.legendre.leggauss(nodes)
    width = half / panels
    left = width * np.arange(-panels, panels)[:, None]
    return (left + 0.5 * width * (1.0 + z)).ravel(), np.tile(0.5 * width * w, 2 * panels)


def _product(x1: Array, w1: Array, x2: Array, w2: Array) -> Atoms:
    points = np.stack(np.meshgrid(x1, x2, indexing="ij"), axis=-1).reshape(-1, 2)
    return Atoms(points, np.outer(w1, w2).ravel())
