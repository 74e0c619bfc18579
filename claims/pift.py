"""Chapter *PI-FT*: the control problem, its optimality conditions, and policy iteration done twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from algorithms.chain import Chain, Params, rollout, step_log_prob
from algorithms.estimators import policy_gradient
from algorithms.objective import KLToReference
from algorithms.policy_iteration import Grid, PolicyIteration, Solution, policy_chain
from claims.claim import Claim
from claims.judges import Sampler, equals, has_mean
from claims.pift_problems import (
    CHAPTER,
    DATA,
    NAMES,
    PAPER,
    PLANE_DATA,
    PLANE_DIRECTIONS,
    POINTS,
    best,
    iterated,
    linear_quadratic,
    plane,
    problem,
)
from claims.problems import lazily
from theory.control import ControlSchedule
from theory.control_bellman import Step, iterates
from theory.control_linear_quadratic import optimum as riccati
from toy.control import AffineScore, ControlledChain
from toy.experiments import Block, generator
from toy.rewards import LogCosh, Softplus, Tanh
from toy.rewards import Sum as SumOf
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

AT = tuple(f"y = {y:g}" for y in POINTS)
QUADRATURE = "two quadratures, each accurate to 1e-10; the planted errors are larger by orders"


def points() -> np.ndarray:
    return np.array(POINTS)[:, None]


# --- the divergence of a step -------------------------------------------------------------------------------------

STATES, CONTROLS = (0.4, -1.1), (1.3, 0.2)  # of two dimensions


def step_kl(by: Callable[[float], float] = lambda alpha: 1 / alpha) -> np.ndarray:
    """Lemma 2.5 at every step of MIX in each of two states; `by` is its dependence on alpha besides (1 - alpha)^2."""
    schedule, rows = problem("MIX").schedule, []
    for t in range(schedule.steps):
        score = problem("MIX").scores[t](np.array(STATES)[:, None])
        exact = schedule.step_kl(t, np.array(CONTROLS)[:, None], score)
        rows.append(exact * schedule.alpha[t] * by(float(schedule.alpha[t])))
    return np.concatenate(rows)


def step_kl_by_definition() -> np.ndarray:
    """E log (density of the controlled step / density of the pre-trained step), by quadrature over the step's noise."""
    schedule, rows = problem("MIX").schedule, []
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)  # exact: the logarithm is quadratic in the noise
    weights = weights / weights.sum()
    for t in range(schedule.steps):
        scores = problem("MIX").scores[t](np.array(STATES)[:, None])[:, 0]
        for y, u, s in zip(STATES, CONTROLS, scores, strict=True):
            controlled, pretrained = schedule.mean(t, y, u), schedule.mean(t, y, s)
            sigma = float(schedule.sigma[t])
            drawn = controlled + sigma * nodes
            log_ratio = ((drawn - pretrained) ** 2 - (drawn - controlled) ** 2) / (2 * sigma**2)
            rows.append(float(weights @ log_ratio))
    return np.array(rows)


STEP_KL = Claim(
    id="pi-ft.step-kl",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Lemma 2.5 and (6), as reconstructed",
    title="The KL divergence of a controlled step is a weighted squared difference of scores",
    statement=r"$\mathrm{KL}(\text{step under } u \,\|\, \text{pre-trained step}) = \dfrac{(1 - \alpha_t)^2}{2 \alpha_t \sigma_t^2} |u - s_t(y)|^2$ in nats.",
    printed="holds",
    why="Two Gaussians of equal covariance differ by their means, and these by the difference of the scores times (1 - alpha) / sqrt(alpha).",
    derivation="pift.md#the-divergence-of-a-step",
    checks=(
        equals(
            "by its definition",
            "Is the formula the mean log-ratio of the two densities, at both steps of MIX in two states?",
            tuple(f"t = {t}, y = {y:g}" for t in (0, 1) for y in STATES),
            subject=step_kl,
            reference=step_kl_by_definition,
            controls={
                "the factor 1 / alpha dropped": lambda: step_kl(lambda alpha: 1.0),
                "1 / alpha^2 for 1 / alpha": lambda: step_kl(lambda alpha: alpha**-2),
            },
            tolerance=1e-12,
        ),
    ),
)  # fmt: skip

# --- the divergence of paths --------------------------------------------------------------------------------------


@cache
def controlled() -> tuple[ControlledChain, Params]:
    """The torch twin of LQ under its optimal control: K phi is what the control adds to the score."""
    exact = linear_quadratic()
    best_control = riccati(exact)
    chain = ControlledChain.of(exact.schedule, AffineScore.of(exact.F, exact.f))
    added = np.concatenate([best_control.K - exact.F, (best_control.k - exact.f)[:, :, None]], axis=2)
    return chain, {"K": torch.tensor(added)}


def log_ratios(under: str, size: int = 1 << 13) -> Sampler:
    """Log-ratio of the densities of whole paths, controlled over pre-trained, and the sum of the steps' KL."""

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            chain, params = controlled()
            zero = chain.parameters()
            noise = policy_gradient(chain.steps).draw(chain, params, size, generator(stream, index))
            x = rollout(chain, params if under == "controlled" else zero, noise).latents
            ratio = torch.zeros(size, dtype=torch.float64)
            cost = KLToReference(1.0, zero)
            charged = torch.zeros(size, dtype=torch.float64)
            for t in range(1, chain.steps + 1):
                ratio += step_log_prob(chain, params, x[t], x[t - 1], t) - step_log_prob(chain, zero, x[t], x[t - 1], t)
                charged += cost(chain, chain.mean(params, x[t], t, None), x[t], t, None)
            return torch.stack([ratio, charged], 1).numpy()

        return block

    return sampler


PATH_KL_OF_LQ = 0.030623776923  # of LQ's optimum, from an independent derivation by the joint Gaussian of all states

# A check of pi-ft.path-kl, whose exact ones stand with the linear-quadratic case.
SAMPLED_PATHS = has_mean(
    "sampled paths",
    "On LQ's optimal chain, do the log-ratio of sampled paths and the sum of the running costs both have the exact path KL as their mean?",
    ("log-ratio of path densities", "sum of running costs"),
    subject=lazily(lambda: log_ratios("controlled")),
    reference=lambda: np.full(2, PATH_KL_OF_LQ),
    margin=0.003,
    margin_from="0.003 nats, a tenth of the divergence 0.0306; declared before sampling",
    kurtosis=kurtosis(2),  # both are quadratic in the Gaussian noise
    controls={"paths of the pre-trained chain": lazily(lambda: log_ratios("pre-trained"))},
)  # fmt: skip

# --- optimality ---------------------------------------------------------------------------------------------------

Gain = Callable[[ControlSchedule], float]
GAINS: dict[str, Gain] = {
    "the gain without sqrt(alpha)": lambda s: float(s.gain[-1] / np.sqrt(s.alpha[-1])),
    "1 / sqrt(alpha) for sqrt(alpha)": lambda s: float(s.gain[-1] / s.alpha[-1]),
    "sigma for sigma^2": lambda s: float(s.gain[-1] / s.sigma[-1]),
}


def last_step_gradient(name: str, z: float) -> float:
    """h at the last step, straight from the reward's gradient: a sum over the noise, no spline, no grid."""
    w = np.linspace(-9.0, 9.0, 361)
    weight = np.exp(-0.5 * w**2)
    sigma = float(problem(name).schedule.sigma[-1])
    slope = problem(name).reward.gradient((z + sigma * w)[:, None])[:, 0]  # type: ignore[attr-defined]
    return float(weight @ slope / weight.sum())


def fixed_point(name: str, gain: Gain = lambda s: float(s.gain[-1])) -> np.ndarray:
    """u = s + gain h(M(u)) at the last step, by iteration."""
    schedule, found = problem(name).schedule, []
    for y, s in zip(POINTS, problem(name).scores[-1](points())[:, 0], strict=True):
        u = s
        for _ in range(200):
            u = s + gain(schedule) * last_step_gradient(name, float(schedule.mean(schedule.steps - 1, y, u)))
        found.append(u)
    return np.array(found)


@cache
def brute_force(name: str) -> np.ndarray:
    """The maximiser of the last step's Bellman equation, by Brent's method on E r(Y_T) - strength KL."""
    schedule, t = problem(name).schedule, problem(name).schedule.steps - 1
    w = np.linspace(-9.0, 9.0, 361)
    weight = np.exp(-0.5 * w**2) / np.exp(-0.5 * w**2).sum()
    found = []
    for y, s in zip(POINTS, problem(name).scores[t](points())[:, 0], strict=True):

        def loss(u: float, y: float = y, s: float = s) -> float:
            mean = float(schedule.mean(t, y, u))
            gained = weight @ problem(name).reward((mean + schedule.sigma[t] * w)[:, None])
            return float(schedule.strength[t] * schedule.step_kl(t, [u], [s]) - gained)

        found.append(minimize_scalar(loss, bracket=(s - 1.0, s + 1.0), tol=1e-12).x)
    return np.array(found)


OPTIMAL_CONTROL = Claim(
    id="pi-ft.optimal-control",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, (9) and (18), as reconstructed",
    title="The optimal control is the score plus a gain times the smoothed slope of the next value",
    statement=r"$u^*_t(y) = s_t(y) + \dfrac{\sqrt{\alpha_t}\, \sigma_t^2}{\beta_t (1 - \alpha_t)}\, E[\nabla V^*_{t+1}(M^* + \sigma_t W)]$, $M^*$ the optimal step's mean, wherever the one-step problem is concave.",
    printed="holds",
    why="The stationarity condition of the Bellman equation, divided by the KL's curvature (1 - alpha)^2 beta / (alpha sigma^2).",
    derivation="pift.md#one-step-of-the-bellman-equation",
    checks=(
        equals(
            "the last step by brute force",
            "Does the fixed point maximise the Bellman equation's right side, at the last step of MIX and GSP?",
            tuple(f"{name}, {at}" for name in NAMES for at in AT),
            subject=lambda: np.concatenate([fixed_point(name) for name in NAMES]),
            reference=lambda: np.concatenate([brute_force(name) for name in NAMES]),
            controls={
                label: lambda gain=gain: np.concatenate([fixed_point(name, gain) for name in NAMES]) for label, gain in GAINS.items()
            },
            tolerance=1e-7,
            margin_from="1e-7: a maximum found by comparing values is no sharper than the root of rounding",
        ),
    ),
)  # fmt: skip


def value_slope(name: str, jacobian: str = "score", root: bool = True) -> np.ndarray:
    """(34) at t = 0, from its factors; planted: the control's Jacobian for the score's, or 1 / sqrt(alpha) dropped."""
    exact = problem(name)
    alpha, step = float(exact.schedule.alpha[0]), best(name).at(0, points())
    ahead = best(name).lookahead(0)
    inner = exact.score_jacobian(0, points()) if jacobian == "score" else step.control_jacobian
    slope = (1 + (1 - alpha) * inner[:, 0, 0]) * ahead.gradient(step.mean)[:, 0]
    return slope / np.sqrt(alpha) if root else slope


def difference_quotient(values: Callable[[np.ndarray], np.ndarray], spacing: float = 2e-3) -> np.ndarray:
    """The derivative at POINTS by central differences of order eight."""
    weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
    return sum(
        (c * (values(points() + k * spacing) - values(points() - k * spacing)) for k, c in weights.items()),
        start=np.zeros(len(POINTS)),
    ) / spacing  # fmt: skip


VALUE_GRADIENT = Claim(
    id="pi-ft.value-gradient",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, (34), as reconstructed",
    title="The optimal value's gradient needs the score's Jacobian only, not the control's",
    statement=r"$\nabla V^*_t(y) = \dfrac{1}{\sqrt{\alpha_t}} (I + (1 - \alpha_t) \nabla s_t(y))^\top E[\nabla V^*_{t+1}(M^* + \sigma_t W)]$.",
    printed="holds",
    why="At a maximum the control's own change costs nothing (the envelope theorem).",
    derivation="pift.md#gradient-and-hessian-of-the-optimal-value",
    checks=(
        equals(
            "by differences of the value",
            "At t = 0 of MIX and GSP, is this the derivative of the optimal value?",
            tuple(f"{name}, {at}" for name in NAMES for at in AT),
            subject=lambda: np.concatenate([value_slope(name) for name in NAMES]),
            reference=lambda: np.concatenate([difference_quotient(lambda y, name=name: best(name).at(0, y).value) for name in NAMES]),
            controls={
                "the control's Jacobian for the score's": lambda: np.concatenate([value_slope(name, "control") for name in NAMES]),
                "1 / sqrt(alpha) dropped": lambda: np.concatenate([value_slope(name, root=False) for name in NAMES]),
            },
            tolerance=1e-8,
            margin_from="1e-8: differences of a value that is known to 1e-12",
        ),
    ),
)  # fmt: skip

# --- policy iteration, twice --------------------------------------------------------------------------------------

COUNTS = {"MIX": ((0, 0), (1, 1), (2, 3), (5, 5)), "GSP": ((1, 1, 1), (2, 2, 2))}
REWARDS = {"MIX": LogCosh(), "GSP": Softplus(2.0, 0.2)}
GRIDS = {"MIX": Grid(-14.0, 14.0, 281), "GSP": Grid(-14.0, 14.0, 281)}


def twin(name: str) -> tuple[Chain, Params]:
    """The torch chain of a problem, without control."""
    chain = ControlledChain.of(problem(name).schedule, DATA[name])
    return chain, chain.parameters()


@cache
def in_torch(name: str, counts: tuple[int, ...] | None, damping: float = 1.0) -> Solution:
    """Policy iteration by the torch object: so many iterations at each step (paper's order), or to convergence."""
    chain, params = twin(name)
    strength = problem(name).schedule.strength[::-1].tolist()  # the chain counts its steps backwards
    found = PolicyIteration(chain, params, REWARDS[name], strength, GRIDS[name], damping)
    return found.solve_to(1e-12) if counts is None else found.solve(counts[::-1])


def torch_numbers(solution: Solution, t: int, name: str) -> np.ndarray:
    """Value, its gradient and the control at POINTS, at the paper's time t."""
    schedule = problem(name).schedule
    step, x = schedule.steps - t, torch.tensor(points())
    with torch.no_grad():
        value, mean = solution.value(step, x), solution.mean(step, x)
    control = schedule.control(t, points(), mean.numpy())
    return np.concatenate([value.numpy(), solution.gradient(step, x).numpy()[:, 0], control[:, 0]])


def theory_numbers(step: Step) -> np.ndarray:
    return np.concatenate([step.value, step.gradient[:, 0], step.control[:, 0]])


def both_problems(numbers: Callable[[str, tuple[int, ...]], np.ndarray]) -> np.ndarray:
    return np.concatenate([numbers(name, counts) for name in NAMES for counts in COUNTS[name]])


def by_torch(damping: float = 1.0, less: int = 0) -> np.ndarray:
    def numbers(name: str, counts: tuple[int, ...]) -> np.ndarray:
        used = tuple(max(m - less, 0) for m in counts)
        return torch_numbers(in_torch(name, used, damping), 0, name)

    return both_problems(numbers)


PLANE_COUNTS, PLANE_POINTS = (2, 3), np.array([[-1.0, 0.5], [0.3, -0.7], [1.5, 1.0]])


def in_the_plane(step: Step) -> np.ndarray:
    return np.concatenate([step.value, step.gradient.ravel(), step.control.ravel()])


@cache
def plane_in_torch(counts: tuple[int, int]) -> np.ndarray:
    """Value, gradient and control of PLANE at t = 0 by the torch object, after so many iterations at each step."""
    schedule, chain = plane().schedule, ControlledChain.of(plane().schedule, PLANE_DATA)
    first, second = PLANE_DIRECTIONS
    reward, grid = SumOf((LogCosh(first, 0.6), Tanh(second, 0.7))), Grid([-8.0] * 2, [8.0] * 2, [97] * 2)
    algorithm = PolicyIteration(chain, chain.parameters(), reward, schedule.strength[::-1].tolist(), grid)
    found, x = algorithm.solve(counts[::-1]), torch.tensor(PLANE_POINTS)
    with torch.no_grad():
        value, mean = found.value(chain.steps, x).numpy(), found.mean(chain.steps, x).numpy()
    control = schedule.control(0, PLANE_POINTS, mean)
    return np.concatenate([value, found.gradient(chain.steps, x).numpy().ravel(), control.ravel()])


PLANE_NAMES = tuple(f"value at {p.tolist()}" for p in PLANE_POINTS) + tuple(
    f"{what} {i} at {p.tolist()}" for what in ("slope", "control") for p in PLANE_POINTS for i in (1, 2)
)
QUANTITIES = ("value", "slope of the value", "control")

ALGORITHM = Claim(
    id="pi-ft.algorithm",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, Algorithm 1, (35)-(36), as reconstructed",
    title="Policy iteration written twice, with two quadratures, gives one answer to nine digits",
    statement="The function-space algorithm that runs on any one- or two-dimensional chain (kernel sums on a grid, torch) and the literal Algorithm 1 of the exact computations (splines, another quadrature) give the "
    "same values, gradients and controls after the same numbers of iterations at every step, and the same optimum.",
    printed="holds",
    why="What is said about the algorithm below is said about this code.",
    derivation="pift.md#gradient-of-an-iterates-value",
    checks=(
        equals(
            "after given iterations",
            "Do both give the same value, slope and control at t = 0 of MIX and GSP?",
            tuple(f"{name} {counts}, {what}, {at}" for name in NAMES for counts in COUNTS[name] for what in QUANTITIES for at in AT),
            subject=by_torch,
            reference=lambda: both_problems(lambda name, counts: theory_numbers(iterated(name, counts).at(0, points()))),
            controls={
                "one iteration less": lambda: by_torch(less=1),
                "damped by 0.9": lambda: by_torch(0.9),
            },
            tolerance=1e-9,
            margin_from=QUADRATURE,
        ),
        equals(
            "the optimum",
            "Does iterating until nothing moves give the optimum that Newton's method finds?",
            tuple(f"{name}, {what}, {at}" for name in NAMES for what in QUANTITIES for at in AT),
            subject=lambda: np.concatenate([torch_numbers(in_torch(name, None), 0, name) for name in NAMES]),
            reference=lambda: np.concatenate([theory_numbers(best(name).at(0, points())) for name in NAMES]),
            controls={"after two iterations": lambda: np.concatenate([torch_numbers(in_torch(name, (2,) * problem(name).schedule.steps), 0, name) for name in NAMES])},
            tolerance=1e-9,
            margin_from=QUADRATURE,
        ),
        equals(
            "in two dimensions",
            "Do both give the same value, gradient and control at t = 0 of PLANE after 2 and 3 iterations at its two steps?",
            PLANE_NAMES,
            subject=lambda: plane_in_torch(PLANE_COUNTS),
            reference=lambda: in_the_plane(iterates(plane(), PLANE_COUNTS).at(0, PLANE_POINTS)),
            controls={"the two numbers of iterations exchanged": lambda: plane_in_torch((3, 2))},
            tolerance=1e-9,
            margin_from=QUADRATURE,
        ),
    ),
)  # fmt: skip

# --- (55) ---------------------------------------------------------------------------------------------------------


def iterate_slope(name: str, m: int, second: float = 1.0) -> np.ndarray:
    """(55) after m iterations at t = 0, the next value being the optimal one; `second` multiplies its second term."""
    exact = problem(name)
    schedule, ahead = exact.schedule, best(name).lookahead(0)
    alpha, sigma, strength = (float(v[0]) for v in (schedule.alpha, schedule.sigma, schedule.strength))
    *_, now, then = ahead.iterates(points(), m + 1)
    own = exact.score_jacobian(0, points())[:, 0, 0]
    first = (1 + (1 - alpha) * own) * ahead.gradient(now.mean)[:, 0] / np.sqrt(alpha)
    weight = strength * (1 - alpha) ** 2 / (alpha * sigma**2)
    return first + second * weight * (now.control_jacobian[:, 0, 0] - own) * (then.control - now.control)[:, 0]


def iterate_quotient(name: str, m: int) -> np.ndarray:
    return difference_quotient(lambda y: best(name).lookahead(0).iterates(y, m)[-1].value)


ITERATIONS = (1, 2, 4)
ITERATE_GRADIENT = Claim(
    id="pi-ft.iterate-gradient",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, (55), as reconstructed",
    title="Before convergence the value's gradient has a second term, the move still to come",
    statement=r"$\nabla V^{(m)} = \frac{1}{\sqrt\alpha} (I + (1 - \alpha) \nabla s)^\top h(M^m) + \frac{\beta (1 - \alpha)^2}{\alpha \sigma^2} (\nabla U^m - \nabla s)^\top (U^{m+1} - U^m)$.",
    printed="holds",
    why="The policy is not yet a maximiser, so its own change counts; it counts by what the next iteration would still change.",
    derivation="pift.md#gradient-of-an-iterates-value",
    checks=(
        equals(
            "by differences of the iterate's value",
            "At t = 0 of MIX and GSP, is this the derivative of the value after 1, 2 and 4 iterations?",
            tuple(f"{name}, m = {m}, {at}" for name in NAMES for m in ITERATIONS for at in AT),
            subject=lambda: np.concatenate([iterate_slope(name, m) for name in NAMES for m in ITERATIONS]),
            reference=lambda: np.concatenate([iterate_quotient(name, m) for name in NAMES for m in ITERATIONS]),
            controls={
                "the second term dropped": lambda: np.concatenate([iterate_slope(name, m, 0.0) for name in NAMES for m in ITERATIONS]),
                "its sign flipped": lambda: np.concatenate([iterate_slope(name, m, -1.0) for name in NAMES for m in ITERATIONS]),
            },
            tolerance=1e-8,
            margin_from="1e-8: differences of a value that is known to 1e-12",
        ),
    ),
)  # fmt: skip

# --- the value is what the policy earns ---------------------------------------------------------------------------


def earned(counts: tuple[int, ...], paid: bool = True, size: int = 1 << 12) -> Sampler:
    """Reward less KL of sampled paths of the policy after so many iterations, on MIX."""

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            solution = in_torch("MIX", counts)
            chain, strength = policy_chain(solution), solution.problem.strength
            noise = policy_gradient(chain.steps).draw(chain, twin("MIX")[1], size, generator(stream, index))

            def cost(mean: Tensor, x: Tensor, t: int) -> Tensor:
                gap = mean - solution.problem.reference(t, x)
                return strength[t - 1] * gap.square().sum(1) / (2 * chain.std(t) ** 2)

            roll = rollout(chain, {}, noise, cost=cost)
            returns = REWARDS["MIX"](roll.latents[0], None)
            return (returns - roll.costs.sum(0) if paid else returns)[:, None].numpy()

        return block

    return sampler


POLICY_VALUE = Claim(
    id="pi-ft.policy-value",
    chapter=CHAPTER,
    paper=PAPER,
    source="PI-FT, (2) and (36), as reconstructed",
    title="The value that Algorithm 1 reports is what its policy earns when it is run",
    statement=r"$E\,V_0^{(m)}(Y_0) = E[r(Y_T)] - \sum_t \beta_t E[\mathrm{KL}_t]$ along the chain that the controls $U^{(m)}$ drive, after any number of iterations.",
    printed="holds",
    why="(36) evaluates the very policy it is given: no optimality is needed.",
    derivation="pift.md#gradient-of-an-iterates-value",
    checks=(
        has_mean(
            "sampled paths",
            "On MIX after one iteration at each step, do sampled paths earn the reported value?",
            ("reward less KL",),
            subject=lazily(lambda: earned((1, 1))),
            reference=lambda: np.array([in_torch("MIX", (1, 1)).objective()]),
            margin=0.02,
            margin_from="0.02, 3 % of the value 0.6; the KL paid is 0.08; declared before sampling",
            # log cosh of a state with Gaussian tails, less a bounded cost: lighter than an exponential, whose kurtosis is 9.
            kurtosis=15,
            controls={
                "the KL not paid": lazily(lambda: earned((1, 1), paid=False)),
                "the policy of no iteration": lazily(lambda: earned((0, 0))),
            },
        ),
    ),
)  # fmt: skip

CLAIMS: tuple[Claim, ...] = (
    STEP_KL,
    OPTIMAL_CONTROL,
    VALUE_GRADIENT,
    ALGORITHM,
    ITERATE_GRADIENT,
    POLICY_VALUE,
)
