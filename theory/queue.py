r"""The queue of Implicit Diffusion (Algorithm 2) in a linear-Gaussian denoiser, where it is a linear delay equation.

The denoiser samples data N(theta, 1): N Euler steps, h = T/N, of dY = {Y + 2 s(Y, T - t)} dt + sqrt(2) dB from
Y_0 ~ N(0, 1), with the exact score s(y, t) = -(y - theta exp(-t)). The reward is -(y - c)^2 / 2 and the objective
l(theta) = E (Y_N - c)^2 / 2 is *minimised*. Y_N is affine in theta, of slope W, so grad l = W (W theta - c).

A queue of M slots holds the laws p^(0..M). One update, with n = N/M Euler steps for each slot:

    p_{k+1}^(0) = p_0,  p_{k+1}^(m+1) = (block m of n steps)(p_k^(m), theta_k),
    theta_{k+1} = theta_k - eta Gamma(p_k^(M))        ("printed" order)
    theta_{k+1} = theta_k - eta Gamma(p_{k+1}^(M))    ("released" order: what has just been computed)

A law that leaves the queue has seen M different parameters, block b the parameter of M - b updates ago (printed) or of
M - 1 - b updates ago (released). All of it is in the *delay kernel* kappa of

    theta_{k+1} = theta_k - eta (sum_d kappa_d theta_{k-d} - W c),   kappa_d >= 0, sum_d kappa_d = W^2.

Source: Implicit Diffusion, section 3.3 and Figure 3; the box of Algorithm 2 is not in the short version of the paper.
Statements and proofs: docs/implicit.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from theory import checked
from theory.checked import Array
from theory.gaussian import Gaussian

Order = Literal["printed", "released"]
Adjoint = Literal["whole", "queued"]


@dataclass(frozen=True)
class LinearDenoiser:
    """N Euler steps over the horizon T, and the target c of the reward -(y - c)^2 / 2.

    Raises ValueError unless N >= 1, 0 < T < N (so that 0 < h < 1: positive weights, stable steps) and c is finite.

    >>> model = LinearDenoiser(16, 2.0, 1.5)
    >>> round(model.response, 12), round(model.optimum, 12)
    (0.952960734073, 1.57404176937)
    """

    steps: int
    horizon: float
    target: float

    def __post_init__(self) -> None:
        checked.count("steps", self.steps, 1)
        checked.scalar("horizon", self.horizon, 0.0, self.steps, closed="()")
        checked.scalar("target", self.target, -math.inf, math.inf, closed="()")

    @property
    def step(self) -> float:
        """h = T / N."""
        return self.horizon / self.steps

    @property
    def weights(self) -> Array:
        """w_j = 2 h (1 - h)^(N-1-j) exp(-(T - j h)), (N,): E Y_N = sum_j w_j theta_j, theta_j the parameter of step j.

        They are geometric, w_j / w_{j+1} = (1 - h) exp(-h).
        """
        left = self.steps - 1 - np.arange(self.steps)  # steps still to come; T - j h = (left + 1) h
        return np.asarray(2 * self.step * (1 - self.step) ** left * np.exp(-(left + 1) * self.step), dtype=np.float64)

    @property
    def response(self) -> float:
        """W = sum_j w_j, the slope of Y_N in theta; tends to 1 - exp(-2 T) as h -> 0."""
        return math.fsum(self.weights)

    @property
    def variances(self) -> Array:
        """Var Y_j, j = 0..N, (N + 1,): v' = (1 - h)^2 v + 2 h from v = 1. Free of theta, and never below 1.

        >>> LinearDenoiser(2, 1.0, 0.0).variances
        array([1.    , 1.25  , 1.3125])
        """
        limit, decay = 1 / (1 - self.step / 2), (1 - self.step) ** (2 * np.arange(self.steps + 1))
        return np.asarray(limit + (1 - limit) * decay, dtype=np.float64)

    @property
    def optimum(self) -> float:
        """c / W, where grad l vanishes."""
        return self.target / self.response

    def law(self, theta: float) -> Gaussian:
        """The law of Y_N if all steps are taken with theta."""
        return Gaussian.scalar(self.response * theta, float(self.variances[-1]))

    def objective(self, theta: float) -> float:
        """l(theta) = ((W theta - c)^2 + Var Y_N) / 2."""
        return ((self.response * theta - self.target) ** 2 + float(self.variances[-1])) / 2

    def gradient(self, theta: ArrayLike) -> Array:
        """l'(theta) = W (W theta - c), elementwise.

        >>> LinearDenoiser(1, 0.5, 1.0).gradient([0.0]).round(12)
        array([-0.60653066])
        """
        return np.asarray(self.response * (self.response * np.asarray(theta, dtype=np.float64) - self.target))


# --- the queue as a delay equation -------------------------------------------------------------------------------


def block_weights(model: LinearDenoiser, slots: int) -> Array:
    """W_b, b = 0..M-1, (M,): the sums of the weights over M blocks of N/M steps; block 0 is the noisiest.

    Raises ValueError unless M is a positive divisor of N.

    >>> block_weights(LinearDenoiser(4, 1.0, 0.0), 2).round(6)
    array([0.210453, 0.616849])
    >>> block_weights(LinearDenoiser(4, 1.0, 0.0), 3)
    Traceback (most recent call last):
    ...
    ValueError: slots = 3: must divide the 4 steps
    """
    count = _slots(model.steps, slots)
    return np.asarray(model.weights.reshape(count, -1).sum(axis=1))


def delay_kernel(model: LinearDenoiser, slots: int, order: Order = "printed", adjoint: Adjoint = "whole") -> Array:
    """kappa_d, d = 0, 1, ...: the update at k uses theta_{k-d} with this weight. The entries sum to W^2.

    With adjoint "whole" all N adjoint steps are taken in the update in which a batch leaves the queue. With "queued"
    the adjoint advances N/M steps an update as well: each update adds up the parts that M finished batches contribute
    then, W_{M-1-i} for the batch that left the queue i updates ago. Raises ValueError as `block_weights`, or for an
    unknown order or adjoint.

    >>> model = LinearDenoiser(4, 1.0, 0.0)
    >>> delay_kernel(model, 1, "released").round(6), delay_kernel(model, 2).round(6)
    (array([0.684429]), array([0.      , 0.510321, 0.174108]))
    """
    if order not in ("printed", "released"):
        raise ValueError(f"order = {order!r}: must be 'printed' or 'released'")
    kernel = np.convolve(block_weights(model, slots)[::-1], adjoint_weights(model, slots, adjoint))
    return np.concatenate([[0.0], kernel]) if order == "printed" else kernel


def adjoint_weights(model: LinearDenoiser, slots: int, adjoint: Adjoint = "whole") -> Array:
    """The part of W that the batch which left the queue i = 0, 1, ... updates ago contributes now; sums to W.

    Raises ValueError as `delay_kernel`.

    >>> adjoint_weights(LinearDenoiser(4, 1.0, 0.0), 2, "queued").round(6)
    array([0.616849, 0.210453])
    """
    blocks = block_weights(model, slots)
    if adjoint not in ("whole", "queued"):
        raise ValueError(f"adjoint = {adjoint!r}: must be 'whole' or 'queued'")
    return np.array([model.response]) if adjoint == "whole" else blocks[::-1]


def mean_delay(kernel: ArrayLike) -> float:
    """sum_d d kappa_d / sum_d kappa_d, in updates. Raises ValueError unless kappa is a kernel.

    >>> round(mean_delay(delay_kernel(LinearDenoiser(16, 2.0, 1.5), 16)), 8)
    4.12971285
    """
    kappa = _kernel(kernel)
    return float(np.arange(kappa.size) @ kappa / kappa.sum())


def trajectory(model: LinearDenoiser, kernel: ArrayLike, eta: float, start: float, updates: int) -> Array:
    """theta_0, ..., theta_K, (K + 1,), of the queue that has been filled at theta_0 = start, with exact gradients.

    Filling it is what the first updates do if they do not move theta. Raises ValueError unless kappa is a kernel, or
    if the iterates leave the float range.

    >>> kernel = delay_kernel(LinearDenoiser(16, 2.0, 1.5), 4)
    >>> trajectory(LinearDenoiser(16, 2.0, 1.5), kernel, 0.1, 0.0, 5)[[1, 5]].round(12)
    array([0.14294411, 0.65407278])
    """
    kappa = _kernel(kernel)
    delays, count = kappa.size, checked.count("updates", updates, 0)
    theta = np.full(delays + count, checked.scalar("start", start, -math.inf, math.inf, closed="()"))
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(delays - 1, delays - 1 + count):
            past = theta[k - delays + 1 : k + 1][::-1]
            theta[k + 1] = theta[k] - eta * (kappa @ past - model.response * model.target)
    if not np.isfinite(theta).all():
        raise ValueError(f"eta = {eta}: theta leaves the float range within {count} updates")
    return theta[delays - 1 :]


def bias(model: LinearDenoiser, kernel: ArrayLike, parameters: ArrayLike) -> Array:
    """sum_d kappa_d (theta_{k-d} - theta_k), (K + 1,): what the queue's gradient adds to grad l(theta_k).

    `parameters` are theta_0..theta_K, (K + 1,), with theta_k = theta_0 before. To leading order in eta it is
    `leading_bias`. Raises ValueError unless kappa is a kernel.

    >>> model = LinearDenoiser(16, 2.0, 1.5)
    >>> kernel = delay_kernel(model, 16)
    >>> round(float(bias(model, kernel, trajectory(model, kernel, 0.01, 0.0, 100))[-1]), 10)
    -0.0224328249
    """
    kappa, theta = _kernel(kernel), checked.array("parameters", parameters, 1)
    padded = np.concatenate([np.full(kappa.size - 1, theta[0]), theta])
    return np.convolve(padded, kappa, mode="valid") - kappa.sum() * theta


def leading_bias(model: LinearDenoiser, kernel: ArrayLike, eta: float, theta: ArrayLike) -> Array:
    """eta W^2 dbar grad l(theta), elementwise: `bias` up to O(eta^2). Raises ValueError unless kappa is a kernel.

    >>> model = LinearDenoiser(16, 2.0, 1.5)
    >>> leading_bias(model, delay_kernel(model, 16), 0.01, [1.5]).round(6)
    array([-0.002522])
    """
    return np.asarray(eta * model.response**2 * mean_delay(kernel) * model.gradient(theta))


# --- stability ---------------------------------------------------------------------------------------------------


def characteristic_polynomial(kernel: ArrayLike, eta: float) -> Array:
    """Coefficients, highest first, of z^(D+1) - z^D + eta sum_d kappa_d z^(D-d), D the largest delay; (D + 2,).

    theta_k - c/W is a combination of k-th powers of its roots. Raises ValueError unless kappa is a kernel.

    >>> characteristic_polynomial([0.0, 0.5, 0.25], 0.5)
    array([ 1.   , -1.   ,  0.25 ,  0.125])
    """
    kappa = _kernel(kernel)
    polynomial = np.concatenate([[1.0, -1.0], np.zeros(kappa.size - 1)])
    polynomial[1:] += eta * kappa
    return polynomial


def spectral_radius(kernel: ArrayLike, eta: float) -> float:
    """The largest |root| of `characteristic_polynomial`: the queue converges to c/W from everywhere iff it is below 1.

    >>> round(spectral_radius([0.0, 1.0], 0.25), 6)
    0.5
    """
    roots = np.roots(characteristic_polynomial(kernel, eta))
    return float(np.abs(roots).max()) if roots.size else 0.0


def stability_floor(kernel: ArrayLike) -> float:
    """1 / (W^2 max(1, dbar)): the queue converges for every eta in (0, floor), whatever the (non-negative) kernel.

    Proved in docs/implicit.md, "Stability of the queue". Raises ValueError unless kappa is a kernel.

    >>> stability_floor([0.0, 0.0, 0.5])
    1.0
    """
    return 1 / (float(_kernel(kernel).sum()) * max(1.0, mean_delay(kernel)))


def stability_limit(kernel: ArrayLike) -> float:
    """eta_max: the queue converges for 0 < eta < eta_max and not just above it. Nested loop: 2 / W^2.

    The zero of the spectral radius less one, bracketed on a geometric grid of ratio 1.05 that starts at the proven
    `stability_floor`; accurate to about 1e-12. Raises ValueError unless kappa is a kernel.

    >>> model = LinearDenoiser(16, 2.0, 1.5)
    >>> round(stability_limit(delay_kernel(model, 16)), 7)
    1.1171036
    """
    low = 0.999 * stability_floor(kernel)
    high = low
    while spectral_radius(kernel, high) < 1:
        low, high = high, 1.05 * high
    return float(brentq(lambda eta: spectral_radius(kernel, eta) - 1, low, high, xtol=1e-14, rtol=1e-14))


def nested_limit(model: LinearDenoiser) -> float:
    """2 / W^2, the stability limit of gradient descent with the exact gradient (the nested loop).

    >>> round(nested_limit(LinearDenoiser(16, 2.0, 1.5)), 7)
    2.2023178
    """
    return 2 / model.response**2


# --- laws --------------------------------------------------------------------------------------------------------


def slot_laws(model: LinearDenoiser, slots: int, parameters: ArrayLike) -> list[Gaussian]:
    """The laws of the particles in the slots m = 0..M at update k, if the parameters were fixed beforehand.

    `parameters` (M,) are theta_{k-M}, ..., theta_{k-1}. Particles of different slots are independent: a particle is in
    slot m exactly once. Raises ValueError unless M divides N and there are M parameters.

    >>> [float(law.mean[0].round(6)) for law in slot_laws(LinearDenoiser(4, 1.0, 0.0), 2, [1.0, 2.0])]
    [0.0, 0.748276, 1.444151]
    """
    theta, blocks = checked.array("parameters", parameters, 1), block_weights(model, slots)
    if theta.size != blocks.size:
        raise ValueError(f"parameters has {theta.size} entries: must have one for each of the {blocks.size} slots")
    length = model.steps // blocks.size
    laws: list[Gaussian] = []
    for m in range(blocks.size + 1):
        # Slot m has done the blocks 0..m-1, the last of them with theta_{k-1}; W_b counts the decay of the later ones.
        mean = blocks[:m] @ theta[blocks.size - m :] / (1 - model.step) ** (model.steps - m * length)
        laws.append(Gaussian.scalar(float(mean), float(model.variances[m * length])))
    return laws


def parameter_variance(
    model: LinearDenoiser,
    slots: int,
    eta: float,
    updates: int,
    batch: int,
    order: Order = "printed",
    adjoint: Adjoint = "whole",
) -> Array:
    """Var theta_k, k = 0..K, (K + 1,), if every slot carries `batch` particles in place of a law.

    theta_k is then Gaussian with the mean `trajectory`, exactly: a particle's noise enters through one batch only, and
    everything is linear. With noise in the initial queue, filled at theta_0. Raises ValueError as `delay_kernel`.

    >>> model = LinearDenoiser(4, 1.0, 0.0)
    >>> parameter_variance(model, 2, 0.5, 2, 10).round(6)
    array([0.      , 0.01931 , 0.038621])
    """
    checked.count("batch", batch, 1)
    count = checked.count("updates", updates, 0)
    kappa = delay_kernel(model, slots, order, adjoint)
    # theta_{k+i} per unit by which theta_k was moved: the recursion from a history of zeros.
    impulse = np.zeros(kappa.size + count)
    impulse[kappa.size - 1] = 1.0
    for k in range(kappa.size - 1, kappa.size - 1 + count):
        impulse[k + 1] = impulse[k] - eta * (kappa @ impulse[k - kappa.size + 1 : k + 1][::-1])
    impulse = impulse[kappa.size - 1 :]
    parts = adjoint_weights(model, slots, adjoint)
    # A batch that left the queue i updates before the first update still contributes its parts i, i + 1, ...
    noise = np.zeros(count + 1)
    for age in range(parts.size):
        response = np.convolve(impulse, parts[age:])[:count]
        squares = response**2
        noise[1:] += squares if age else np.cumsum(squares)
    return np.asarray(eta**2 * float(model.variances[-1]) / batch * noise)


# --- what it costs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """One update in the steady state, per particle of a batch: network evaluations, adjoint steps, and their depth.

    `depth` is the length of the longest chain of evaluations that wait for each other, in forward evaluations;
    `states` the largest number of stored states.
    """

    forward: int
    backward: int
    depth: float
    states: int


def work(steps: int, slots: int, adjoint: Adjoint = "whole", *, adjoint_cost: float = 2.0) -> Work:
    """The work of one update of a queue of M slots over N steps; M = 1 is the nested loop.

    An adjoint step (one vector-Jacobian product) costs `adjoint_cost` forward evaluations. The total is N + N whatever
    M is; only the depth depends on it. Raises ValueError unless M divides N, and for a negative cost.

    >>> work(64, 1)
    Work(forward=64, backward=64, depth=192.0, states=64)
    >>> work(64, 64), work(64, 64, "queued").depth
    (Work(forward=64, backward=64, depth=129.0, states=2080), 3.0)
    """
    count = _slots(steps, slots)
    checked.scalar("adjoint_cost", adjoint_cost, 0.0, math.inf, closed="[)")
    if adjoint not in ("whole", "queued"):
        raise ValueError(f"adjoint = {adjoint!r}: must be 'whole' or 'queued'")
    length = steps // count
    if adjoint == "whole":
        return Work(steps, steps, length + adjoint_cost * steps, steps * (count + 1) // 2)
    return Work(steps, steps, (1 + adjoint_cost) * length, steps * count)


# --- arguments ---------------------------------------------------------------------------------------------------


def _slots(steps: int, slots: int) -> int:
    count = checked.count("slots", slots, 1)
    if checked.count("steps", steps, 1) % count:
        raise ValueError(f"slots = {slots}: must divide the {steps} steps")
    return count


def _kernel(kernel: ArrayLike) -> Array:
    kappa = checked.array("kernel", kernel, 1)
    if (kappa < 0).any() or not kappa.sum() > 0:
        raise ValueError(f"kernel = {kappa.tolist()}: must be non-negative, and not zero")
    return kappa
