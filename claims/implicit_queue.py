"""Chapter *Implicit Diffusion*, continued: samplers that end. The queue and its price."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from algorithms.chain import Params
from algorithms.estimators import first_order
from algorithms.objective import Objective
from algorithms.queue import Queue
from claims.claim import Claim
from claims.implicit import CHAPTER, PAPER
from claims.judges import Sampler, at_least, equals, has_mean
from claims.problems import lazily
from claims.records import Column, Figure, Panel, Series, Table
from theory import queue
from theory.queue import Adjoint, LinearDenoiser, Order
from toy.denoisers import Denoiser, Miss, by_queue, of_a_gaussian
from toy.experiments import generator
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

# --- the queue as a delay equation --------------------------------------------------------------------------------

MODEL = LinearDenoiser(16, 2.0, 1.5)
SLOTS = (1, 4, 16)
COPIES = ("start 0.5", "start c/W", "start 0, step 1.2/W^2")  # side by side in one torch chain
STARTS = (0.5, MODEL.optimum, 0.0)
RATES = (0.1, 0.1, 1.2 / MODEL.response**2)
UPDATES, SHOWN = 40, (1, 5, 20, 40)


@cache
def torch_paths(slots: int) -> np.ndarray:
    """theta_0..theta_K of the torch `Queue` on a noise-free copy of the denoiser, (K + 1, copies)."""
    chain = Denoiser(of_a_gaussian, MODEL.steps, MODEL.horizon, len(COPIES), start=(0.0, 0.0), noise=0.0)
    start, rates = (torch.tensor(v, dtype=torch.float64) for v in (STARTS, RATES))
    method, reward = Queue(first_order(MODEL.steps), slots), Objective(Miss(MODEL.target))
    return by_queue(method, chain, reward, start, rates, UPDATES, 1, torch.Generator().manual_seed(0)).numpy()


Kernel = Callable[[int], np.ndarray]


def printed(slots: int) -> np.ndarray:
    return queue.delay_kernel(MODEL, slots)


def released(slots: int) -> np.ndarray:
    return queue.delay_kernel(MODEL, slots, "released")


def one_delay(delay: Callable[[int], int]) -> Kernel:
    """Planted error: the whole gradient has one delay."""

    def kernel(slots: int) -> np.ndarray:
        kappa = np.zeros(delay(slots) + 1)
        kappa[-1] = MODEL.response**2
        return kappa

    return kernel


def exact_paths(kernel: Kernel) -> np.ndarray:
    """The delay equation's parameters at the updates that are compared: slots, updates, copies in a row."""
    values = [
        queue.trajectory(MODEL, kernel(m), rate, start, UPDATES)[list(SHOWN)]
        for m in SLOTS
        for start, rate in zip(STARTS, RATES, strict=True)
    ]
    return np.concatenate(values)


def not_prefilled() -> np.ndarray:
    """Planted error: the slots hold p_0 at first, which is what parameters 0 would have made of it."""
    values = []
    for m in SLOTS:
        kappa = printed(m)
        for start, rate in zip(STARTS, RATES, strict=True):
            theta = [0.0] * (kappa.size - 1) + [start]
            for _ in range(UPDATES):
                past = np.array(theta[: -kappa.size - 1 : -1])
                theta.append(theta[-1] - rate * float(kappa @ past - MODEL.response * MODEL.target))
            values += [theta[kappa.size - 1 + k] for k in SHOWN]
    return np.array(values)


# theta after 1, 5, 20, 50 updates from 0 with step 0.1, from an independent derivation.
DERIVED_AT = (1, 5, 20, 50)
DERIVED = {
    1: (0.142944110111, 0.638011963895, 1.384565754530, 1.566277811446),
    4: (0.142944110111, 0.654072776924, 1.408532915414, 1.568689698099),
    16: (0.142944110111, 0.687997618243, 1.581963392558, 1.573788540894),
}


def from_zero(kernel: Kernel) -> np.ndarray:
    return np.concatenate([queue.trajectory(MODEL, kernel(m), 0.1, 0.0, 50)[list(DERIVED_AT)] for m in DERIVED])


PARTICLES, NOISY_SLOTS, NOISY_UPDATES, NOISY_STEP, REPETITIONS = 2, 4, 12, 0.3, 8192


def particles(slots: int = NOISY_SLOTS, batch: int = PARTICLES) -> Sampler:
    """theta_12 of independent noisy queues, standardised by the exact mean and variance; and its square."""
    kernel = queue.delay_kernel(MODEL, NOISY_SLOTS)
    mean = queue.trajectory(MODEL, kernel, NOISY_STEP, 0.5, NOISY_UPDATES)[-1]
    variance = queue.parameter_variance(MODEL, NOISY_SLOTS, NOISY_STEP, NOISY_UPDATES, PARTICLES)[-1]
    chain = Denoiser(of_a_gaussian, MODEL.steps, MODEL.horizon, REPETITIONS)
    start, reward = torch.full((REPETITIONS,), 0.5, dtype=torch.float64), Objective(Miss(MODEL.target))

    def sampler(stream: Stream) -> Callable[[int], np.ndarray]:
        def block(index: int) -> np.ndarray:
            method, source = Queue(first_order(MODEL.steps), slots), generator(stream, index)
            theta = by_queue(method, chain, reward, start, NOISY_STEP, NOISY_UPDATES, batch, source)[-1].numpy()
            z = (theta - mean) / math.sqrt(variance)
            return np.stack([z, z**2], axis=1)

        return block

    return sampler


def transients(context: object) -> tuple[Figure, ...]:
    """theta against updates for three queues and the nested loop: lines exact, points from torch."""
    x = tuple(float(k) for k in range(UPDATES + 1))
    nested = queue.trajectory(MODEL, released(1), 0.1, 0.5, UPDATES)
    series = [Series("nested loop", x, tuple(nested.tolist()), style="dashed")]
    for m in SLOTS:
        path = queue.trajectory(MODEL, printed(m), 0.1, 0.5, UPDATES)
        series.append(Series(f"queue, M = {m}", x, tuple(path.tolist())))
    seen = [(float(k), float(torch_paths(m)[k, 0])) for m in SLOTS for k in range(0, UPDATES + 1, 2)]
    series.append(Series("torch", tuple(k for k, _ in seen), tuple(v for _, v in seen), style="points"))
    figure = Figure(
        name="queue-transients",
        title="A stale gradient is too large: the queue runs ahead, overshoots, and ends at the optimum",
        caption=f"Denoiser with N = 16, T = 2, c = 1.5, step 0.1 ($\\eta W^2 = {0.1 * MODEL.response**2:.3f}$), from 0.5. Lines: the delay equation. Points: the torch queue on "
        f"the same chain without noise. All tend to $c / W = {MODEL.optimum:.4f}$.",
        alt="Parameter against updates: the longer the queue, the faster the rise and the larger the overshoot.",
        x_label="update k",
        y_label=r"$\theta_k$",
        series=tuple(series),
    )
    return (figure,)


PLACES = tuple(f"M = {m}, {copy}, k = {k}" for m in SLOTS for copy in COPIES for k in SHOWN)

DELAY = Claim(
    id="implicit-diffusion.queue-delay-equation",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/implicit.md, from Algorithm 2 as reconstructed",
    title="In a linear-Gaussian denoiser the queue is a linear delay equation: each block of steps has its own delay",
    statement=r"$\theta_{k+1} = \theta_k - \eta W \big(\sum_{b=0}^{M-1} W_b\, \theta_{k-M+b} - c\big)$ in the printed order, $W_b$ the weight of the $b$-th block of $N/M$ steps, "
    r"$\sum_b W_b = W$. With particles in place of laws $\theta_k$ is Gaussian with this mean and $\mathrm{Var}\,\theta_k = \eta^2 W^2 v_N B^{-1} \sum_{i<k} g_i^2$, $g$ the impulse response.",
    printed="holds",
    why="A batch that leaves the queue has done its last block with the parameters of one update ago, the block before with those of two, and so on. A particle gives one gradient only, "
    "so that the noise of different updates is independent.",
    derivation="implicit.md#the-queue-as-a-delay-equation",
    checks=(
        equals(
            "torch queue",
            "Does the torch queue, on a copy of the denoiser without noise, follow the delay equation, also where it diverges?",
            PLACES,
            subject=lambda: exact_paths(printed),
            reference=lambda: np.concatenate([torch_paths(m)[list(SHOWN), i] for m in SLOTS for i in range(len(COPIES))]),
            controls={
                "released order": lambda: exact_paths(released),
                "one delay of N for the whole batch": lambda: exact_paths(one_delay(lambda m: MODEL.steps)),
                "one delay of M for the whole batch": lambda: exact_paths(one_delay(lambda m: m)),
                "slots that were not filled beforehand": not_prefilled,
            },
            tolerance=1e-10,
            margin_from="1e-10 of the largest entry: rounding of float64 along 40 updates of a diverging copy",
        ),
        equals(
            "independent numbers",
            "Are the parameters after 1, 5, 20 and 50 updates from 0 those of an independent derivation?",
            tuple(f"M = {m}, k = {k}" for m in DERIVED for k in DERIVED_AT),
            subject=lambda: from_zero(printed),
            reference=lambda: np.concatenate(list(DERIVED.values())),
            controls={"released order": lambda: from_zero(released)},
            tolerance=2e-12,
            margin_from="2e-12: the numbers have twelve decimals",
        ),
        has_mean(
            "particles",
            "With M = 4 and two particles in each slot, are the mean and the variance of the 12th parameter the exact ones?",
            ("mean, in standard deviations", "variance, relative"),
            subject=lazily(particles),
            reference=lambda: np.array([0.0, 1.0]),
            margin=0.05,
            margin_from="0.05 standard deviations and 5 % of the variance, declared before sampling",
            kurtosis=kurtosis(2),
            controls={
                "a queue of length 2": lazily(lambda: particles(slots=2)),
                "three particles": lazily(lambda: particles(batch=3)),
            },
        ),
    ),
    figures=transients,
)  # fmt: skip

# --- bias ---------------------------------------------------------------------------------------------------------


def limits(kernel: Kernel) -> np.ndarray:
    return np.array([queue.trajectory(MODEL, kernel(m), 0.1, 0.0, 1500)[-1] for m in SLOTS])


def short_of_weight(slots: int) -> np.ndarray:
    """Planted error: the newest block counts nine tenths, so that the weights sum to less than W."""
    kappa = printed(slots).copy()
    kappa[1] *= 0.9
    return kappa


def bias_ratio(delay: Callable[[int], float] | None = None) -> np.ndarray:
    """Bias / (eta W^2 dbar grad l) after 2/eta updates, extrapolated from eta = 1/2000 and 1/4000 to 0."""
    ratios = []
    for m in SLOTS:
        kernel, at = printed(m), []
        for eta in (5e-4, 2.5e-4):
            path = queue.trajectory(MODEL, kernel, eta, 0.0, round(2 / eta))
            leading = float(queue.leading_bias(MODEL, kernel, eta, path[-1:])[0])
            scale = 1.0 if delay is None else delay(m) / queue.mean_delay(kernel)
            at.append(float(queue.bias(MODEL, kernel, path)[-1]) / (leading * scale))
        ratios.append(2 * at[1] - at[0])
    return np.array(ratios)


def bias_at_a_tenth(kernel: Kernel) -> np.ndarray:
    path = queue.trajectory(MODEL, kernel(16), 0.01, 0.0, 100)
    found, leading = queue.bias(MODEL, kernel(16), path)[-1], queue.leading_bias(MODEL, kernel(16), 0.01, path[-1:])[0]
    return np.array([found, leading])


UNBIASED = Claim(
    id="implicit-diffusion.queue-unbiased",
    chapter=CHAPTER,
    paper=PAPER,
    source="Implicit Diffusion, section 3.3 and Figure 3 (Algorithm 2 as reconstructed)",
    title="The queue ends at the optimum whatever its length; on the way its bias counts the mean delay, not the length",
    statement=r"The only fixed point of the queue is the optimum $c / W$ of $\ell$. On the way its gradient is $\nabla \ell(\theta_k)$ plus $\eta W^2 \bar d\, \nabla \ell(\theta_k) + O(\eta^2)$, "
    r"$\bar d$ the mean delay in updates, about $N / 2T$ for $M = N$.",
    printed="holds",
    why="At a constant parameter stale and fresh gradients agree. Moving, a stale gradient is too large: the bias points along the gradient. Most of a sample is decided by the last steps, "
    "so a queue of 16 has a mean delay of 4.13 only.",
    derivation="implicit.md#bias-of-the-queue",
    checks=(
        equals(
            "limit",
            "Is the parameter after 1500 updates the optimum of the objective?",
            tuple(f"M = {m}" for m in SLOTS),
            subject=lambda: limits(printed),
            reference=lambda: np.full(len(SLOTS), MODEL.optimum),
            controls={
                "a newest block at nine tenths": lambda: limits(short_of_weight),
                "the continuous-time slope, 1 - exp(-2 T)": lambda: np.full(len(SLOTS), MODEL.target / -math.expm1(-2 * MODEL.horizon)),
            },
        ),
        equals(
            "torch queue stays",
            "Does the torch queue, filled at the optimum, stay there for 40 updates?",
            tuple(f"M = {m}" for m in SLOTS),
            subject=lambda: np.array([torch_paths(m)[-1, 1] for m in SLOTS]),
            reference=lambda: np.full(len(SLOTS), MODEL.optimum),
            controls={"filled at 0.5": lambda: np.array([torch_paths(m)[-1, 0] for m in SLOTS])},
        ),
        equals(
            "transient bias",
            "Does the ratio of the bias to eta W^2 dbar grad l tend to 1 as the step goes to 0?",
            tuple(f"M = {m}" for m in SLOTS),
            subject=bias_ratio,
            reference=lambda: np.ones(len(SLOTS)),
            controls={
                "delay N": lambda: bias_ratio(lambda m: MODEL.steps),
                "delay M": lambda: bias_ratio(lambda m: m),
                "delay N / 2T for every length": lambda: bias_ratio(lambda m: MODEL.steps / MODEL.horizon / 2),
            },
            tolerance=1e-4,
            margin_from="1e-4: what extrapolation from steps 1/2000 and 1/4000 leaves of an error of second order",
        ),
        equals(
            "independent numbers",
            "At step 0.01, M = 16, update 100, are bias and leading term those of an independent derivation?",
            ("bias", "leading term"),
            subject=lambda: bias_at_a_tenth(printed),
            reference=lambda: np.array([-0.0224328249, -0.0207767917]),
            controls={"released order": lambda: bias_at_a_tenth(released)},
            tolerance=1e-10,
            margin_from="1e-10: the numbers have ten decimals",
        ),
    ),
)  # fmt: skip

# --- stability ----------------------------------------------------------------------------------------------------

LONG = LinearDenoiser(40, 10.0, 1.0)  # a kernel that is geometric but for exp(-20)
LONG_SLOTS = (1, 5, 40)


def limits_of(
    model: LinearDenoiser, slots: tuple[int, ...], order: Order = "printed", adjoint: Adjoint = "whole"
) -> np.ndarray:
    """Limits of eta W^2 from the roots of the characteristic polynomial."""
    return (
        np.array([queue.stability_limit(queue.delay_kernel(model, m, order, adjoint)) for m in slots])
        * model.response**2
    )


def ratios() -> np.ndarray:
    """r, the ratio of neighbouring blocks' weights."""
    h = LONG.step
    return np.array([((1 - h) * math.exp(-h)) ** (LONG.steps // m) for m in LONG_SLOTS])


def growth(kernel: np.ndarray, eta: float) -> float:
    """Growth factor of the error over 200 updates, as the largest entry of a window of 50 sees it."""
    error = np.abs(queue.trajectory(MODEL, kernel, eta, 0.0, 400) - MODEL.optimum)
    rounding = 1e-12  # fast decay ends there
    return float((error[-50:].max() + rounding) / (error[-250:-200].max() + rounding))


GROWTH_KERNELS: dict[str, tuple[int, Order, Adjoint]] = {
    **{f"M = {m}, printed": (m, "printed", "whole") for m in SLOTS},
    "M = 4, adjoint queued": (4, "printed", "queued"),
    "M = 16, adjoint queued": (16, "printed", "queued"),
    "M = 4, released": (4, "released", "whole"),
    "M = 16, released": (16, "released", "whole"),
}


def growth_sides(limit: Callable[[np.ndarray], float] = queue.stability_limit) -> tuple[np.ndarray, np.ndarray]:
    """(1, growth 2 % below the limit) and (growth 2 % above, 1)."""
    larger, smaller = [], []
    for case in GROWTH_KERNELS.values():
        kernel = queue.delay_kernel(MODEL, *case)
        larger += [1.0, growth(kernel, 1.02 * limit(kernel))]
        smaller += [growth(kernel, 0.98 * limit(kernel)), 1.0]
    return np.array(larger), np.array(smaller)


def nested_limit(kernel: np.ndarray) -> float:
    return 2 / float(kernel.sum())


def best_radius(model: LinearDenoiser, kernel: np.ndarray) -> float:
    """The least spectral radius over the step."""
    square = model.response**2
    found = minimize_scalar(
        lambda x: queue.spectral_radius(kernel, x / square),
        bounds=(0.0, 1.0),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return float(found.fun)


def best_radii(adjoint: Adjoint = "whole") -> np.ndarray:
    return np.array([best_radius(LONG, queue.delay_kernel(LONG, m, "printed", adjoint)) for m in LONG_SLOTS])


def radii(context: object) -> tuple[Figure, ...]:
    """Spectral radius against eta W^2, for three ways to run the queue."""
    ways: dict[str, tuple[Order, Adjoint]] = {
        "printed order": ("printed", "whole"),
        "printed order, adjoint queued": ("printed", "queued"),
        "released order": ("released", "whole"),
    }
    steps = np.linspace(0.02, 3.0, 75)
    x = tuple(steps.tolist())
    panels = []
    for name, way in ways.items():
        series = [Series("nested loop", x, tuple(np.abs(1 - steps).tolist()), style="dashed")]
        for m in SLOTS:
            kernel = queue.delay_kernel(MODEL, m, *way)
            values = [queue.spectral_radius(kernel, step / MODEL.response**2) for step in steps]
            series.append(Series(f"M = {m}", x, tuple(values)))
        panels.append(Panel(name, tuple(series)))
    figure = Figure(
        name="queue-stability",
        title="How fast the queue forgets, against the step",
        caption="Largest root of the delay equation, N = 16, T = 2; below 1 the queue converges. In the printed order every queue loses stability near $\\eta W^2 = 1$, half the nested "
        "loop's 2, and its best rate is far from the nested loop's 0; a queued adjoint loses more, the released order with a long queue nothing.",
        alt="Three panels of spectral radius against step size: the nested loop is a V with its tip at 1, the queues lie above it.",
        kind="panels",
        x_label=r"$\eta W^2$",
        y_label="spectral radius",
        panels=tuple(panels),
        panel_columns=3,
    )
    return (figure,)


STABILITY = Claim(
    id="implicit-diffusion.queue-stability",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/implicit.md, for Algorithm 2 as reconstructed",
    title="In the printed order the queue is stable up to about half the nested loop's step, and never as fast",
    statement=r"The error is a combination of powers of the roots of $z^{D+1} - z^D + \eta \sum_d \kappa_d z^{D-d}$. For a geometric kernel with block ratio $r$ the printed order is stable "
    r"for $\eta W^2 < 1$, against 2 nested; its least spectral radius is $(1 + r)/2$, at $\eta W^2 = (1 - r)/4$, where the nested loop's is 0 at $\eta W^2 = 1$.",
    printed="holds",
    why="One update of delay already halves the limit: z^2 - z + x has both roots inside the unit circle for x < 1. Longer queues hardly lower it further, because old terms have small weights; "
    "what they lower is the step up to which the error does not oscillate.",
    derivation="implicit.md#stability-of-the-queue",
    checks=(
        at_least(
            "roots and runs",
            "Do runs of the delay equation decay 2 % below the limit that the roots give, and grow 2 % above?",
            tuple(f"{name}, {side}" for name in GROWTH_KERNELS for side in ("below", "above")),
            subject=growth_sides,
            controls={
                "the nested limit": lambda: growth_sides(nested_limit),
                "half the nested limit, whatever the order": lambda: growth_sides(lambda k: nested_limit(k) / 2),
                "the proven floor as the limit": lambda: growth_sides(queue.stability_floor),
            },
        ),
        equals(
            "limit of the printed order",
            "On a long horizon (T = 10), is the limit of eta W^2 equal to 1 for every length?",
            tuple(f"M = {m}" for m in LONG_SLOTS),
            subject=lambda: np.ones(len(LONG_SLOTS)),
            reference=lambda: limits_of(LONG, LONG_SLOTS),
            controls={
                "nested, 2": lambda: np.full(len(LONG_SLOTS), 2.0),
                "one over the mean delay": lambda: np.array([1 / queue.mean_delay(queue.delay_kernel(LONG, m)) for m in LONG_SLOTS]),
            },
            tolerance=1e-6,
            margin_from="1e-6: the horizon cuts the geometric kernel off at exp(-20)",
        ),
        equals(
            "least radius",
            "On the same horizon, is the least spectral radius over all steps (1 + r)/2?",
            tuple(f"M = {m}" for m in LONG_SLOTS),
            subject=lambda: (1 + ratios()) / 2,
            reference=best_radii,
            controls={
                "adjoint queued": lambda: best_radii("queued"),
                "r, the double root without delay": ratios,
            },
            tolerance=1e-3,
            margin_from="1e-3: at a double root an error e of the kernel (e = exp(-20)) and of the step moves the root by sqrt(e)",
        ),
        equals(
            "independent numbers",
            "Are the limits of the step at N = 16, T = 2 those of an independent derivation?",
            tuple(f"M = {m}" for m in SLOTS),
            subject=lambda: limits_of(MODEL, SLOTS) / MODEL.response**2,
            reference=lambda: np.array([1.1011589, 1.0643106, 1.1171036]),
            controls={"1/W^2 for all": lambda: np.full(3, 1 / MODEL.response**2)},
            tolerance=1e-7,
            margin_from="1e-7: the numbers have seven decimals",
        ),
    ),
    figures=radii,
)  # fmt: skip

# --- other orders, and a floor for every kernel -------------------------------------------------------------------


def released_limits(r: np.ndarray) -> np.ndarray:
    return 2 * (1 + r) / (1 - r)


def queued_limits(r: np.ndarray) -> np.ndarray:
    return np.asarray(1 - r**2)


def both_queued_limits(r: np.ndarray) -> np.ndarray:
    return np.minimum(r**-2.0 - 1, 2 * (1 + r) ** 2 / (1 - r) ** 2)


def closed_forms(*laws: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([law(ratios()) for law in laws])


@cache
def random_kernels() -> tuple[np.ndarray, ...]:
    """30 non-negative kernels with up to nine delays, some of them with one delay only."""
    source = Stream(0).child("kernels").generator()
    spread = [source.exponential(size=source.integers(1, 10)) for _ in range(24)]
    single = [np.concatenate([np.zeros(d), [0.7]]) for d in range(6)]
    return (*spread, *single)


def floor_sides(floor: Callable[[np.ndarray], float]) -> tuple[np.ndarray, np.ndarray]:
    kernels = random_kernels()
    return np.array([queue.stability_limit(k) for k in kernels]), np.array([floor(k) for k in kernels])


ORDERS = Claim(
    id="implicit-diffusion.queue-orders",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/implicit.md",
    title="The released order undoes the loss of stability; a queued adjoint adds to it; below a proven floor every queue converges",
    statement=r"For geometric kernels the limits of $\eta W^2$ are $2(1 + r)/(1 - r)$ in the released order, $1 - r^2$ with a queued adjoint in the printed order, and "
    r"$\min\{r^{-2} - 1, 2(1 + r)^2/(1 - r)^2\}$ with both. For every kernel $\kappa \ge 0$ of sum $W^2$ the queue converges if $0 < \eta W^2 < \min(1, 1/\bar d)$.",
    printed="holds",
    why="In the released order the newest block enters at once, and the older ones damp the oscillation that limits the nested loop. The floor is a contraction of the largest error over a window.",
    derivation="implicit.md#stability-of-the-queue",
    checks=(
        equals(
            "closed forms",
            "On a long horizon (T = 10), are the limits of eta W^2 from the roots those of the closed forms?",
            tuple(f"M = {m}, {way}" for way in ("released", "printed, adjoint queued", "released, adjoint queued") for m in LONG_SLOTS),
            subject=lambda: closed_forms(released_limits, queued_limits, both_queued_limits),
            reference=lambda: np.concatenate(
                [limits_of(LONG, LONG_SLOTS, "released"), limits_of(LONG, LONG_SLOTS, "printed", "queued"), limits_of(LONG, LONG_SLOTS, "released", "queued")]
            ),
            controls={
                "2 for the released order": lambda: closed_forms(lambda r: 2 + 0 * r, queued_limits, both_queued_limits),
                "1 for a queued adjoint": lambda: closed_forms(released_limits, np.ones_like, both_queued_limits),
                "without the root at -1": lambda: closed_forms(released_limits, queued_limits, lambda r: np.minimum(r**-2.0 - 1, 1e3)),
            },
            tolerance=1e-6,
            margin_from="1e-6 of the largest limit: the horizon cuts the geometric kernel off at exp(-20)",
        ),
        at_least(
            "floor",
            "Is the limit of 30 kernels, random ones and single delays, at least the proven floor?",
            tuple(f"kernel {i + 1}" for i in range(30)),
            subject=lambda: floor_sides(queue.stability_floor),
            controls={
                "the floor without the mean delay, 1/W^2": lambda: floor_sides(lambda k: 1 / float(k.sum())),
                "the nested limit": lambda: floor_sides(nested_limit),
            },
        ),
    ),
)  # fmt: skip

# --- what the queue gains -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Network calls of one update: samples stepped, calls in a row, calls for the adjoint, and states stored after it."""

    forward: int
    in_a_row: int
    adjoint: int
    states: int


@cache
def counted(slots: int) -> Counts:
    """What the torch `Queue` calls and stores in its third update; slots = 0: a plain roll-out and its adjoint."""
    rolled: list[int] = []
    swept: list[int] = []

    def score(params: Params, y: Tensor, time: float | Tensor) -> Tensor:
        # The queue moves without a graph, all flights in one call (flights, n, d); the adjoint needs a graph.
        (swept if torch.is_grad_enabled() else rolled).append(y.shape[0] if y.dim() == 3 else 1)
        return of_a_gaussian(params, y, time)

    steps = MODEL.steps
    chain, reward = Denoiser(score, steps, MODEL.horizon), Objective(Miss(MODEL.target))
    theta, source = torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(0)
    if not slots:
        noise = first_order(steps).draw(chain, {"theta": theta}, 1, source)
        first_order(steps).accumulate(chain, {"theta": theta}, reward, noise)
        return Counts(sum(rolled), len(rolled), len(swept), steps)
    method = Queue(first_order(steps), slots)
    for _ in range(3):
        rolled.clear()
        swept.clear()
        for _ in method.updates(chain, {"theta": theta}, reward, 1, source):
            pass
    stored = sum(len(flight["latents"]) - 1 for flight in method.state_dict()["flights"])
    return Counts(sum(rolled), len(rolled), len(swept), stored)


def counts(of: Callable[[int], Counts]) -> np.ndarray:
    return np.array([[c.forward, c.in_a_row, c.adjoint, c.states] for c in map(of, SLOTS)], dtype=float).ravel()


def derived(slots: int) -> Counts:
    found = queue.work(MODEL.steps, slots, adjoint_cost=0.0)
    return Counts(found.forward, round(found.depth), found.backward, found.states)


def whole_roll_outs(slots: int) -> Counts:
    """Planted error: every slot works through all N steps."""
    return Counts(MODEL.steps * slots, MODEL.steps, MODEL.steps, MODEL.steps * slots)


def one_state_a_slot(slots: int) -> Counts:
    """Planted error: slots keep their newest state only, from which no adjoint can be taken."""
    right = derived(slots)
    return Counts(right.forward, right.in_a_row, right.adjoint, slots)


LONGER = (4, 16)


def torch_gain() -> np.ndarray:
    """Calls in a row of the plain roll-out and adjoint over those of the queue, as counted."""
    plain = counted(0)
    return np.array([(plain.in_a_row + plain.adjoint) / (c.in_a_row + c.adjoint) for c in map(counted, LONGER)])


def gain(adjoint_cost: float) -> np.ndarray:
    nested = queue.work(MODEL.steps, 1, adjoint_cost=adjoint_cost).depth
    return np.array([nested / queue.work(MODEL.steps, m, adjoint_cost=adjoint_cost).depth for m in LONGER])


PRICED = LinearDenoiser(64, 6.0, 1.0)


def work_table(context: object) -> tuple[Table, ...]:
    """Work, depth, states, limit and best rate for queues over 64 steps; an adjoint step at two evaluations."""
    nested = queue.work(PRICED.steps, 1)
    rows = [
        (
            "nested loop",
            str(nested.forward),
            f"{nested.depth:g}",
            "–",
            str(nested.states),
            "2.000",
            "–",
            "one in all",
            "–",
        )
    ]
    for m in (1, 4, 16, 64):
        whole, queued = queue.work(PRICED.steps, m), queue.work(PRICED.steps, m, "queued")
        kernels = [queue.delay_kernel(PRICED, m, "printed", adjoint) for adjoint in ("whole", "queued")]
        top = [queue.stability_limit(k) * PRICED.response**2 for k in kernels]
        folds = [-1 / math.log(best_radius(PRICED, k)) for k in kernels]
        rows.append((
            f"queue, M = {m}", str(whole.forward), f"{whole.depth:g}", f"{queued.depth:g}", str(whole.states), f"{top[0]:.3f}", f"{top[1]:.3f}", f"{folds[0]:.2f}", f"{folds[1]:.2f}",
        ))  # fmt: skip
    table = Table(
        name="queue-work",
        title="What an update of the queue costs, and what it is worth",
        caption=f"N = 64 steps, T = 6, an adjoint step at two evaluations; per particle of a batch. Evaluations are the same for every queue. Depth falls by the factor M only where the adjoint is "
        f"queued as well (which stores N M states, not the number shown). Stability and the best rate of progress are lost on the way: at its best step the queue of 64 needs "
        f"{float(rows[-1][-2]):.1f} updates for a factor e where the nested loop solves this problem in one.",
        columns=(
            Column("", "left"),
            Column("evaluations"),
            Column("adjoint whole", group="depth"),
            Column("adjoint queued", group="depth"),
            Column("states stored"),
            Column("adjoint whole", group="limit of $\\eta W^2$"),
            Column("adjoint queued", group="limit of $\\eta W^2$"),
            Column("adjoint whole", group="updates for a factor e"),
            Column("adjoint queued", group="updates for a factor e"),
        ),
        rows=tuple(rows),
    )
    return (table,)


GAIN = Claim(
    id="implicit-diffusion.queue-gain",
    chapter=CHAPTER,
    paper=PAPER,
    source="Implicit Diffusion, section 3.3 (running time), with the adjoint gradients of section 5.2",
    title="The queue gains its factor in sampling depth only: with an adjoint after each update the time falls less than twofold",
    statement=r'"Leveraging parallelism, the running time of our algorithm is $\mathcal{O}(K)$, gaining a factor of $T$ compared to the nested-loop approach" ($M = T$, and the gradient by "the adjoint method").',
    printed="holds-corrected",
    corrected=r"An update of a queue of $M$ slots takes $N/M$ sampling steps in a row instead of $N$: a factor $M$ in the depth of *sampling*, and none in work, which stays $N$ evaluations and "
    r"$N$ adjoint steps for a batch. With the adjoint's $N$ steps, at $a$ evaluations each, the whole update gains $(1 + a)N / (N/M + aN) < (1 + a)/a$: the factor $M$ needs the adjoint "
    "in a queue as well, or a gradient that costs no steps in a row.",
    why="The sentence is true of the sampling steps. But a gradient through the sampler has its own N steps in a row, each update. Nor does the factor in time say anything about the progress of an "
    "update, which the delay lowers: see the table.",
    derivation="implicit.md#what-the-queue-gains",
    checks=(
        equals(
            "gain in time",
            "By how much do the network calls in a row of the torch queue, adjoint included, fall short of the nested loop's: as derived, or M-fold?",
            tuple(f"M = {m}" for m in LONGER),
            subject=lambda: gain(1.0),
            reference=torch_gain,
            printed=lambda: np.array(LONGER, dtype=float),
            controls={
                "an adjoint step at two calls": lambda: gain(2.0),
                "no gain at all": lambda: np.ones(len(LONGER)),
            },
        ),
        equals(
            "calls and states",
            "Does the torch queue call the network and store states as often as derived: evaluations, calls in a row, adjoint steps, states?",
            tuple(f"M = {m}, {what}" for m in SLOTS for what in ("evaluations", "calls in a row", "adjoint steps", "states")),
            subject=lambda: counts(derived),
            reference=lambda: counts(counted),
            controls={
                "every slot rolls out whole": lambda: counts(whole_roll_outs),
                "one state a slot": lambda: counts(one_state_a_slot),
            },
        ),
    ),
    tables=work_table,
)  # fmt: skip


CLAIMS: tuple[Claim, ...] = (DELAY, UNBIASED, STABILITY, ORDERS, GAIN)
