"""Chapter *SFT-PG* (shortcut fine-tuning): the gradient of an integral probability metric, its kinks, and surrogates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from algorithms import estimators
from algorithms.chain import rollout
from algorithms.objective import Objective
from claims.claim import Claim, Context
from claims.judges import Sampler, at_least, equals, has_mean
from claims.problems import THETA, additive, lazily
from claims.records import Figure, Series
from theory import chains, ipm, shortcut
from theory.chains import QuadraticReward
from theory.gaussian import Gaussian
from toy.experiments import Block, generator, gradients
from toy.linear_gaussian import Problem
from verdicts.means import gaussian_polynomial_kurtosis
from verdicts.streams import Stream

CHAPTER = "SFT-PG"
PAPER = "SFT-PG"
OWN = "verifine"

WIDTH = 0.7
L2, L1, W1, MMD, TV = (
    ipm.LinearCritics("l2"),
    ipm.LinearCritics("l1"),
    ipm.LipschitzCritics(),
    ipm.KernelCritics(WIDTH),
    ipm.BoundedCritics(),
)
SETS: dict[str, ipm.Critics] = {
    "linear, l2": L2,
    "linear, l1": L1,
    "W1": W1,
    "MMD": MMD,
    "total variation": TV,
}
COV = np.array([[0.5, 0.2], [0.2, 0.8]])


def line(mean: float, std: float) -> Gaussian:
    return Gaussian.scalar(mean, std**2)


def shifted(law: Gaussian, by: ArrayLike) -> Gaussian:
    """The law with its mean moved."""
    return Gaussian(law.mean + np.asarray(by, dtype=float), law.cov)


# --- Theorem 4.1: the policy gradient -----------------------------------------------------------------------------

SQUARE = QuadraticReward(0.0, [0.0], [[2.0]])  # f(x) = x^2
PRINTED_VALUE = 1.05375399718  # of (16) on TWO, from an independent derivation


@cache
def two_steps() -> Problem:
    """TWO: x_1 = x_2 + theta + .8 eps_1, x_0 = x_1 + theta + .5 eps_0, theta = .4, and the critic x^2."""
    return Problem.of((shortcut.two_step_example(), SQUARE))


def exact_forms(form: Callable[[chains.LinearGaussianChain, QuadraticReward], np.ndarray]) -> np.ndarray:
    """A form of the gradient on TWO (one number) and on LG1 (two)."""
    return np.concatenate([form(p.exact_chain, p.exact_reward) for p in (two_steps(), additive())])


def weighted_scores(how: Literal["sum of logs", "log of sum", "last step"]) -> Sampler:
    """f(x_0) times the gradient of a function of the steps' log-densities on TWO, by automatic differentiation."""
    problem = two_steps()
    chain = problem.chain
    drawing = estimators.policy_gradient(chain.steps)

    def combined(theta: Tensor, path: Tensor) -> Tensor:
        logs = []
        for t in range(1, chain.steps + 1):
            mean = chain.mean({"theta": theta}, path[t], t, None)
            logs.append(-0.5 * ((path[t - 1] - mean) / chain.std(t)).square().sum() - math.log(chain.std(t)))
        stacked = torch.stack(logs)
        return {"sum of logs": stacked.sum(), "log of sum": stacked.logsumexp(0), "last step": stacked[0]}[how]

    each = torch.func.vmap(torch.func.grad(combined), in_dims=(None, 1))

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = drawing.draw(chain, problem.params, 1 << 15, generator(stream, index))
            path = rollout(chain, problem.params, noise).latents  # (T + 1, n, d)
            value = problem.objective.reward(path[0], None)
            return (value[:, None] * each(problem.params["theta"], path)).numpy()

        return block

    return sampler


@dataclass(frozen=True)
class ExactWitness:
    """The exact witness as a reward of the torch objects: values only, as the policy gradient wants them."""

    critic: ipm.Critic
    sign: float = 1.0
    differentiable: bool = False

    def __call__(self, x0: Tensor, condition: Tensor | None) -> Tensor:
        return torch.from_numpy(self.sign * self.critic(x0.numpy()))


CLOSE = (0.6, -0.5)  # LG1's sample less the target's mean


@cache
def target() -> Gaussian:
    """A target with the covariance of LG1's sample, not far from it: every set of critics has a closed form."""
    return shifted(ipm.terminal_law(additive().exact_chain), -np.array(CLOSE))


def slope_of(critics: ipm.Critics) -> np.ndarray:
    """Central difference quotients of Phi(law of LG1's sample, target) in theta."""
    chain, h = additive().exact_chain, 1e-5

    def at(theta: np.ndarray) -> float:
        return critics.distance(ipm.terminal_law(replace(chain, theta=theta)), target())

    return np.array([(at(chain.theta + h * e) - at(chain.theta - h * e)) / (2 * h) for e in np.eye(2)])


def chain_slopes(q: Callable[[], Gaussian]) -> np.ndarray:
    return np.concatenate([ipm.chain_gradient(additive().exact_chain, critics, q()) for critics in SETS.values()])


def witness_sampler(q: Callable[[], Gaussian] = target, sign: float = 1.0) -> Sampler:
    """The torch policy gradient on LG1, its reward the total-variation witness against `q`."""
    problem = additive()
    witness = TV.witness(ipm.terminal_law(problem.exact_chain), q())
    objective = Objective(ExactWitness(witness, sign))
    return gradients(problem.chain, problem.params, objective, estimators.policy_gradient(problem.chain.steps))


def mirrored() -> Gaussian:
    """A target on the other side of the second coordinate."""
    return shifted(ipm.terminal_law(additive().exact_chain), (-CLOSE[0], CLOSE[1]))


POLICY_GRADIENT = Claim(
    id="sft-pg.policy-gradient",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, Theorem 4.1, (16) and (18)",
    title="The gradient of the metric is the critic times the sum of scores; (16) prints the score of a sum",
    statement=r"Theorem 4.1: $\nabla_\theta \Phi(p_0^\theta, q_0) = E[f_{\alpha^*}(x_0)\, \nabla_\theta \log \sum_t p_t^\theta(x_t \mid x_{t+1})]$.",
    printed="holds-corrected",
    corrected=r"$\nabla_\theta \Phi(p_0^\theta, q_0) = E[f_{\alpha^*}(x_0) \sum_t \nabla_\theta \log p_t^\theta(x_t \mid x_{t+1})]$ wherever $\Phi$ is "
    r"differentiable, as the last line of the theorem's own proof, (18), has it.",
    why="A path's density is the product of the steps' densities, so its logarithm is a sum of logarithms. With the logarithm of a sum each step's "
    "gradient shrinks by a factor of its own: 1.0537540 in place of 3.2 on two steps. The paper's own proof has the right form.",
    derivation="sft.md#the-gradient",
    checks=(
        equals(
            "sum of scores",
            "Is the sum over steps of E[f score] the gradient of E f, on two steps with f = x² and on LG1?",
            ("TWO: θ", "LG1: θ₁", "LG1: θ₂"),
            subject=lambda: exact_forms(lambda chain, f: shortcut.score_gradient(chain, f).sum(0)),
            reference=lambda: exact_forms(chains.gradient),
            printed=lambda: exact_forms(shortcut.log_sum_gradient),
            controls={
                "score of the last step alone": lambda: exact_forms(lambda chain, f: shortcut.score_gradient(chain, f)[0]),
                "average of the scores": lambda: exact_forms(lambda chain, f: shortcut.score_gradient(chain, f).mean(0)),
            },
        ),
        equals(
            "value of the printed form",
            "On two steps, is (16) as printed 1.05375399718, the number of an independent derivation, where the gradient is 3.2?",
            ("printed form", "gradient"),
            subject=lambda: np.array([exact_forms(form)[0] for form in (shortcut.log_sum_gradient, chains.gradient)]),
            reference=lambda: np.array([PRINTED_VALUE, 3.2]),
            controls={"equal weights for the steps": lambda: np.array([exact_forms(lambda c, f: shortcut.score_gradient(c, f).mean(0))[0], 3.2])},
            tolerance=1e-10,
        ),
        equals(
            "gradient of the metric",
            "On LG1, is the score form with the frozen witness the slope of the closed form of Φ, for five sets of critics?",
            tuple(f"{name}: {theta}" for name in SETS for theta in THETA),
            subject=lambda: chain_slopes(target),
            reference=lambda: np.concatenate([slope_of(critics) for critics in SETS.values()]),
            controls={"witnesses against another target": lambda: chain_slopes(mirrored)},
            tolerance=1e-8,
            margin_from="1e-8: the reference is a difference quotient",
        ),
        has_mean(
            "two steps, sampled",
            "On two steps with the critic x², does the torch policy gradient have the mean 3.2?",
            ("θ",),
            subject=lazily(lambda: gradients(two_steps().chain, two_steps().params, two_steps().objective, estimators.policy_gradient(2))),
            reference=lambda: np.array([3.2]),
            margin=0.2,
            margin_from="0.2, 6 % of the gradient 3.2; declared before sampling",
            # f times the scores is a cubic in the Gaussians. With weights in (0, 1), as in the printed form, it is
            # no polynomial: its measured kurtosis is about 55.
            kurtosis=gaussian_polynomial_kurtosis(3),
            printed=lazily(lambda: weighted_scores("log of sum")),
            controls={"score of the last step alone": lazily(lambda: weighted_scores("last step"))},
        ),
        has_mean(
            "total variation, sampled",
            "On LG1, does the torch policy gradient whose reward is the witness of total variation, a step function, have ∇Φ as its mean?",
            THETA,
            subject=lazily(witness_sampler),
            reference=lambda: ipm.chain_gradient(additive().exact_chain, TV, target()),
            margin=0.1,
            margin_from="0.1, 10 % of |∇Φ| = 1.05 on this chain; declared before sampling",
            # |f| = 1, so the fourth moment is that of the Gaussian S, 3 sigma^4, and |mean| < sigma / 2: the central
            # one is below (3^(1/4) + 1/2)^4 sigma^4 = 11 sigma^4, over at least (3/4)^2 sigma^4.
            kurtosis=20,
            controls={
                "the critic of another target": lazily(lambda: witness_sampler(mirrored)),
                "the opposite critic": lazily(lambda: witness_sampler(sign=-1.0)),
            },
        ),
    ),
)  # fmt: skip

# --- the envelope -------------------------------------------------------------------------------------------------

PLANE_MEAN, PLANE_TARGET = (1.0, 0.5), (-0.3, 0.2)
ENVELOPE_NAMES = (
    "linear: θ₁",
    "linear: θ₂",
    "W1, other variance",
    "MMD, other variance",
    "total variation, other variance",
)
P1, Q1 = line(1.0, 1.0), line(0.0, 0.6)


def following(read: Callable[[ipm.Critic, Gaussian, Gaussian], float]) -> np.ndarray:
    """Derivatives of `read(f_m, p, q)` as the witness alone follows the mean m of p, by central differences."""
    h = 1e-5
    plane = Gaussian(PLANE_MEAN, np.eye(2)), Gaussian(PLANE_TARGET, np.eye(2))

    def slope(critics: ipm.Critics, p: Gaussian, q: Gaussian, v: np.ndarray) -> float:
        up, down = (read(critics.witness(shifted(p, s * h * v), q), p, q) for s in (1, -1))
        return (up - down) / (2 * h)

    first = [slope(L2, *plane, v) for v in np.eye(2)]
    return np.array(first + [slope(critics, P1, Q1, np.ones(1)) for critics in (W1, MMD, TV)])


def without_target(critic: ipm.Critic, p: Gaussian, q: Gaussian) -> float:
    """The integral in the second term of (17) as printed."""
    return critic.expect(p).value


def linear_terms() -> shortcut.EnvelopeTerms:
    return shortcut.envelope_terms(PLANE_MEAN, PLANE_TARGET)


ENVELOPE = Claim(
    id="sft-pg.envelope",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, proof of Theorem 4.1, (17)",
    title="The envelope theorem needs the data's term: without it the second part of (17) is not zero",
    statement=r"In (17) the second part $\nabla_\theta \alpha^*\, \nabla_{\alpha^*} \int p_0^\theta f_{\alpha^*}$ is 0 by the envelope theorem.",
    printed="holds-corrected",
    corrected=r"$\nabla_\theta \alpha^*\, \nabla_{\alpha^*} \big( \int p_0^\theta f_{\alpha^*} - \int q_0 f_{\alpha^*} \big) = 0$ wherever $f_{\alpha^*}$ is differentiable in $\theta$.",
    why=r"$\alpha^*$ maximises $E_p f - E_q f$, not $E_p f$. With linear critics from $(1, .5)$ to $(-.3, .2)$ the printed term is $(-.0442, .1916)$. It would vanish for critics with "
    r"$E_q f_\alpha$ the same for all $\alpha$, which is not assumed. The result is not affected: the first term is $\nabla \Phi$ either way.",
    derivation="sft.md#the-gradient",
    checks=(
        equals(
            "second term",
            "Does the second term vanish, for linear critics in the plane, W1, MMD and total variation?",
            ENVELOPE_NAMES,
            subject=lambda: following(ipm.gap),
            reference=lambda: np.zeros(5),
            printed=lambda: following(without_target),
            controls={"the data's term added": lambda: following(lambda f, p, q: f.expect(p).value + f.expect(q).value)},
            tolerance=1e-8,
            margin_from="1e-8: the subject is a difference quotient",
        ),
        equals(
            "linear critics in closed form",
            "For linear critics, are the printed term, the one with the data and the gradient those of an independent derivation?",
            ("printed term: θ₁", "printed term: θ₂", "with the data: θ₁", "with the data: θ₂", "∇Φ: θ₁", "∇Φ: θ₂"),
            subject=lambda: np.concatenate([linear_terms().printed, linear_terms().with_target, linear_terms().gradient]),
            reference=lambda: np.array([-0.0442139479, 0.1915937744, 0.0, 0.0, 0.9743911957, 0.2248595067]),
            controls={"both terms as printed": lambda: np.concatenate([linear_terms().printed, linear_terms().with_target, linear_terms().gradient + linear_terms().printed])},
            tolerance=1e-10,
            margin_from="1e-10: the reference has ten digits",
        ),
        equals(
            "first term",
            "Is the frozen critic's slope that of Φ, so that nothing is left for the second term?",
            ENVELOPE_NAMES,
            subject=lambda: frozen_slopes(),
            reference=lambda: metric_slopes(),
            controls={"with the second term as printed": lambda: frozen_slopes() + following(without_target)},
            tolerance=1e-8,
            margin_from="1e-8: the reference is a difference quotient",
        ),
    ),
)  # fmt: skip


def frozen_slopes() -> np.ndarray:
    """The slopes of g at the frozen witness, in the order of ENVELOPE_NAMES."""
    plane = ipm.gradient(L2, Gaussian(PLANE_MEAN, np.eye(2)), Gaussian(PLANE_TARGET, np.eye(2)))[0]
    return np.concatenate([plane, *(ipm.gradient(critics, P1, Q1)[0] for critics in (W1, MMD, TV))])


def metric_slopes() -> np.ndarray:
    """Central difference quotients of Phi, in the same order."""
    h = 1e-5
    p, q = Gaussian(PLANE_MEAN, np.eye(2)), Gaussian(PLANE_TARGET, np.eye(2))
    rows = [(L2, p, q, v) for v in np.eye(2)] + [(critics, P1, Q1, np.ones(1)) for critics in (W1, MMD, TV)]
    return np.array([(k.distance(shifted(a, h * v), b) - k.distance(shifted(a, -h * v), b)) / (2 * h) for k, a, b, v in rows])  # fmt: skip


# --- kinks --------------------------------------------------------------------------------------------------------

KINK_STEP = 1e-6
DIRECTION = np.array([0.3, -1.0])
SIDES = ("left", "right")


def quotients(critics: ipm.Critics, p: Gaussian, q: Gaussian, v: ArrayLike) -> tuple[float, float]:
    """Difference quotients of Phi to the left and to the right of p along v."""
    at = critics.distance(p, q)
    step = KINK_STEP * np.asarray(v, dtype=float)
    back, ahead = (critics.distance(shifted(p, side), q) for side in (-step, step))
    return (at - back) / KINK_STEP, (ahead - at) / KINK_STEP


ORIGIN = Gaussian([0.0, 0.0], COV)
TIE = Gaussian([1.0, 1.0], COV)  # against ORIGIN both coordinates of the difference are largest
ACROSS = (-1.0, 1.0)


def at_the_target(read: Callable[[ipm.Critics], Sequence[float]]) -> np.ndarray:
    return np.concatenate([read(critics) for critics in SETS.values()])


def frozen(critic: ipm.Critic, p: Gaussian, v: ArrayLike, size: float = 1.0) -> np.ndarray:
    """What the formula says with the critic `size` times f frozen: the same slope on both sides."""
    return np.full(2, size * float(critic.expect(p).mean_slope @ np.asarray(v)))


def one_critic(size: float) -> np.ndarray:
    """The formula at p = q with `size` times the witness for a step along DIRECTION; 0 makes it the critic f = 0."""
    return at_the_target(
        lambda critics: frozen(critics.witness(ORIGIN, ORIGIN, DIRECTION), ORIGIN, DIRECTION, size).tolist()
    )


def tied(towards: tuple[float, float]) -> np.ndarray:
    """The formula at the tie with the coordinate that wins for a step `towards`: an optimal critic."""
    return frozen(L1.witness(TIE, ORIGIN, towards), TIE, ACROSS)


SMOOTH: dict[str, tuple[ipm.Critics, Gaussian, Gaussian, tuple[float, ...]]] = {
    **{f"{name}, different means": (critics, TIE, shifted(ORIGIN, (0.0, 0.4)), (0.3, -1.0)) for name, critics in SETS.items()},
    **{f"{name}, equal means, other variance": (SETS[name], line(0.2, 1.0), line(0.2, 0.6), (1.0,)) for name in ("W1", "MMD", "total variation")},
}  # fmt: skip


def jumps(pairs: Callable[[Gaussian, Gaussian], tuple[Gaussian, Gaussian]]) -> np.ndarray:
    """Right less left difference quotient in the cases of SMOOTH."""
    rows = []
    for critics, p, q, v in SMOOTH.values():
        left, right = quotients(critics, *pairs(p, q), v)
        rows.append(right - left)
    return np.array(rows)


KINKS = Claim(
    id="sft-pg.kinks",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, Theorem 4.1",
    title="At the target, and at ties, the metric has a kink: there the theorem's formula is no gradient",
    statement=r"Theorem 4.1, read with the sum of scores of (18): if $p f_{\alpha^*}$ and $\nabla_\theta p\, f_{\alpha^*}$ are continuous, then $\nabla_\theta \Phi = E[f_{\alpha^*} \sum_t \nabla_\theta \log p_t]$.",
    printed="holds-corrected",
    corrected=r"If moreover $\Phi$ is differentiable at $\theta$. For the sets of critics here $\Phi$ has two slopes at a kink, the largest and the smallest slope of $g(\cdot, f)$ among the maximising critics $f$; at $p = q$ they differ in every direction of the mean.",
    why="Where sampler and data agree every critic is optimal. The critic 0 is continuous and makes the formula 0; others make it any number between the two slopes. "
    "So the gradient need not shrink near the target: with a fixed learning rate the descent ends up jumping about it.",
    derivation="sft.md#kinks",
    checks=(
        equals(
            "slopes at p = q",
            "At p = q in the plane, along (0.3, -1), are the one-sided slopes of Φ the largest and the smallest slope among the critics?",
            tuple(f"{name}: {side}" for name in SETS for side in SIDES),
            subject=lambda: at_the_target(lambda critics: ipm.one_sided_slopes(critics, ORIGIN, ORIGIN, DIRECTION)),
            reference=lambda: at_the_target(lambda critics: quotients(critics, ORIGIN, ORIGIN, DIRECTION)),
            printed=lambda: one_critic(0.0),
            controls={"one critic for both sides": lambda: one_critic(1.0), "half of it": lambda: one_critic(0.5)},
            tolerance=1e-9,
        ),
        equals(
            "slopes at a tie",
            "For linear critics with weights in the l1 ball and means that differ by (1, 1), has Φ the slopes -1 and 1 along (-1, 1)?",
            SIDES,
            subject=lambda: np.array(ipm.one_sided_slopes(L1, TIE, ORIGIN, ACROSS)),
            reference=lambda: np.array(quotients(L1, TIE, ORIGIN, ACROSS)),
            printed=lambda: tied((1.0, 0.0)),  # the optimal critic f = x_1
            controls={
                "the optimal critic x₂": lambda: tied((0.0, 1.0)),
                "the average of both": lambda: (tied((1.0, 0.0)) + tied((0.0, 1.0))) / 2,
            },
            tolerance=1e-8,
            margin_from="1e-8: the reference is a difference quotient",
        ),
        equals(
            "no kink elsewhere",
            "Elsewhere, also where the means agree and the variances do not, do the quotients to the left and to the right agree?",
            tuple(SMOOTH),
            subject=lambda: jumps(lambda p, q: (p, q)),
            reference=lambda: np.zeros(len(SMOOTH)),
            controls={"at p = q": lambda: jumps(lambda p, q: (q, q))},
            tolerance=2e-5,
            margin_from="2e-5: the step 1e-6 times a second derivative",
        ),
    ),
)  # fmt: skip

# --- Theorem 4.2: the surrogate -----------------------------------------------------------------------------------

Triple = tuple[Gaussian, Gaussian, Gaussian]  # p, q, and p after the step
CASES = tuple((name, d) for name in SETS for d in (1, 2))
CASE_NAMES = tuple(f"{name}, d = {d}" for name, d in CASES)


@cache
def triples(d: int) -> tuple[Triple, ...]:
    """Random steps of all sizes at all distances, and steps across the target from just beside it."""
    rng = Stream(20260101).child("sft-pg").child("triples").child(str(d)).generator()
    cov = COV if d == 2 else np.array([[0.49]])
    q, rows = Gaussian(np.zeros(d), cov), []
    for _ in range(60):
        scale = 10.0 ** rng.uniform(-2, 0.5)
        p = Gaussian(scale * rng.normal(size=d), cov)
        rows.append((p, q, Gaussian(scale * rng.normal(size=d), cov)))
        rows.append((p, q, shifted(p, -0.02 * p.mean)))
    for e in np.eye(d):
        rows.append((Gaussian(1e-5 * e, cov), q, Gaussian(-1e-2 * e, cov)))
    return tuple(rows)


def least(measure: Callable[[ipm.Critics, Gaussian, Gaussian, Gaussian], float]) -> np.ndarray:
    """For each set of critics and dimension, the least `measure`, a share of l |step|, over the triples."""

    def share(critics: ipm.Critics, p: Gaussian, q: Gaussian, moved: Gaussian) -> float:
        return measure(critics, p, q, moved) / (critics.lipschitz(p.cov) * float(np.linalg.norm(moved.mean - p.mean)))

    return np.array([min(share(SETS[name], *row) for row in triples(d)) for name, d in CASES])


def slack(constant: float) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """(L - Phi after the step, 0)."""
    return lambda: (
        least(lambda k, p, q, moved: ipm.surrogate(k, p, q, moved.mean, constant) - k.distance(moved, q)),
        np.zeros(len(CASES)),
    )


def rise(constant: float) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """(L after the step less L before it, 1), both as shares of l |step|."""
    return lambda: (
        least(lambda k, p, q, moved: ipm.surrogate(k, p, q, moved.mean, constant) - k.distance(p, q)),
        np.ones(len(CASES)),
    )


def above_triangle(times: float) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """(L - (Phi before the step + times the distance stepped), 0)."""
    return lambda: (
        least(lambda k, p, q, moved: ipm.surrogate(k, p, q, moved.mean) - k.distance(p, q) - times * k.distance(p, moved)),
        np.zeros(len(CASES)),
    )  # fmt: skip


def needed_constant(start: float, end: float) -> np.ndarray:
    """The constant that makes L an equality for the step of p's mean from start to end, in units of 1e-4.

    The target is at 0; from there the critic is that of the right. The step has the length 1e-4.
    """
    p, q, moved = line(start * 1e-4, 1.0), line(0.0, 1.0), line(end * 1e-4, 1.0)
    rows = []
    for critics in SETS.values():
        missing = critics.distance(moved, q) - ipm.gap(critics.witness(p, q, [1.0]), moved, q)
        rows.append(missing / (critics.lipschitz(q.cov) * 1e-4))
    return np.array(rows)


SURROGATE = Claim(
    id="sft-pg.surrogate",
    chapter=CHAPTER,
    paper=PAPER,
    source="SFT-PG, Theorem 4.2, (19), and appendix B",
    title="The surrogate bounds the metric, with a sharp constant 2, but never decreases: it certifies no step",
    statement=r"$\Phi(\theta') \le L_\theta(\theta') = g(\theta', f_\theta) + 2 l\, |\theta' - \theta|$; a descent of $L_\theta$ implies one of $\Phi$. Ours: with $l$ a Lipschitz constant of every "
    r"$g(\cdot, f)$ the constant 2 is sharp; $L_\theta(\theta') - L_\theta(\theta) \ge l\, |\theta' - \theta|$; and $\Phi(\theta) + \Phi(p_\theta, p_{\theta'}) \le L_\theta(\theta')$.",
    printed="holds",
    why=r"The step costs $2l$ and the frozen critic falls by at most $l$ per unit, so the sufficient condition is never met, and the triangle inequality, which needs no critic, is at least as good. "
    "The constant must serve all critics at once, which the theorem's wording leaves open: one for each is not enough.",
    derivation="sft.md#the-surrogate-of-theorem-42",
    checks=(
        at_least(
            "upper bound",
            "Over 120 steps and those across the target, is the least L - Φ(θ'), as a share of l |θ' - θ|, not negative?",
            CASE_NAMES,
            subject=slack(2.0),
            controls={"constant 1.9": slack(1.9), "constant 1": slack(1.0), "the frozen critic alone": slack(0.0)},
            tolerance=1e-9,
        ),
        equals(
            "sharp constant",
            "At the target, for a step against the critic's side, is 2 the least constant that bounds Φ?",
            tuple(SETS),
            subject=lambda: needed_constant(0.0, -1.0),
            reference=lambda: np.full(len(SETS), 2.0),
            controls={
                "a step to the critic's side": lambda: needed_constant(0.0, 1.0),
                "a step across the target, from half a step beside it": lambda: needed_constant(0.5, -0.5),
            },
            tolerance=1e-7,
            margin_from="1e-7: the step is 1e-4, its square is left out",
        ),
        at_least(
            "never decreases",
            "Over the same steps, does L rise by at least l |θ' - θ|, whatever the step?",
            CASE_NAMES,
            subject=rise(2.0),
            controls={"constant 1.9": rise(1.9), "constant 1/2": rise(0.5)},
            tolerance=1e-9,
        ),
        at_least(
            "triangle inequality",
            "Over the same steps, is L at least Φ(θ) plus the distance stepped?",
            CASE_NAMES,
            subject=above_triangle(1.0),
            controls={"twice the distance stepped": above_triangle(2.0)},
            tolerance=1e-9,
        ),
    ),
)  # fmt: skip

# --- a surrogate that certifies -----------------------------------------------------------------------------------

START, GOAL = line(1.0, 0.5), line(0.0, 0.5)
HILBERT: dict[str, tuple[ipm.Critics, Gaussian, Gaussian, Gaussian]] = {
    "MMD, d = 1": (MMD, START, GOAL, line(0.8, 0.5)),
    "MMD, d = 1, all variances differ": (MMD, line(1.0, 0.5), line(0.0, 0.9), line(0.4, 0.7)),
    "MMD, d = 2": (MMD, Gaussian([1.0, 0.2], COV), ORIGIN, Gaussian([0.6, 0.7], 1.2 * COV)),
    "linear, d = 2": (L2, Gaussian([1.0, 0.2], COV), ORIGIN, Gaussian([0.6, 0.7], 1.2 * COV)),
}


def squares(whole: bool = False) -> np.ndarray:
    """g^2 plus the perpendicular part, or plus the whole of the squared distance stepped."""
    rows = []
    for critics, p, q, moved in HILBERT.values():
        extra = critics.distance(moved, p) ** 2 if whole else ipm.perpendicular_squared(critics, p, q, moved)
        rows.append(ipm.gap(critics.witness(p, q), moved, q) ** 2 + extra)
    return np.array(rows)


@cache
def features(law: Gaussian) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (n, d) and masses (n,) of a Gauss-Hermite rule for the law, exact enough for the kernel."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    grid = np.stack(np.meshgrid(*[nodes] * law.dim, indexing="ij"), -1).reshape(-1, law.dim)
    mass = np.stack(np.meshgrid(*[weights / weights.sum()] * law.dim, indexing="ij"), -1).reshape(-1, law.dim).prod(1)
    heavy = mass > 1e-16
    return law.mean + grid[heavy] @ np.linalg.cholesky(law.cov).T, mass[heavy]


def embedded_products(laws: Sequence[Gaussian], critics: ipm.Critics) -> np.ndarray:
    """The Gram matrix of the laws' mean embeddings by quadrature of the kernel, or of their means."""
    if critics == L2:
        means = np.stack([features(law)[1] @ features(law)[0] for law in laws])
        return means @ means.T

    def product(a: Gaussian, b: Gaussian) -> float:
        (x, u), (y, v) = features(a), features(b)
        distance = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
        return float(u @ np.exp(-distance / (2 * WIDTH**2)) @ v)

    return np.array([[product(a, b) for b in laws] for a in laws])


def projected() -> np.ndarray:
    """|P (mu_moved - mu_p)|^2 from the residual of the projection, in coordinates of the three embeddings."""
    rows = []
    for critics, p, q, moved in HILBERT.values():
        gram = embedded_products((p, q, moved), critics)
        witness, step = np.array([1.0, -1.0, 0.0]), np.array([-1.0, 0.0, 1.0])
        residual = step - (step @ gram @ witness) / (witness @ gram @ witness) * witness
        rows.append(residual @ gram @ residual)
    return np.array(rows)


def perpendiculars(reflected: bool = False) -> np.ndarray:
    rows = []
    for critics, p, q, moved in HILBERT.values():
        rows.append(ipm.perpendicular_squared(critics, *((q, moved, p) if reflected else (p, q, moved))))
    return np.array(rows)


def along(mean: float) -> tuple[float, float, float, float]:
    """Phi, eq. (19)'s bound, the Hilbert bound and g after a step of the mean from 1."""
    moved = line(mean, 0.5)
    return (
        MMD.distance(moved, GOAL),
        ipm.surrogate(MMD, START, GOAL, [mean]),
        ipm.hilbert_surrogate(MMD, START, GOAL, moved),
        ipm.gap(MMD.witness(START, GOAL), moved, GOAL),
    )


STEPS = (0.5, 0.2, 0.1, 0.01, 0.001)


def certificates(column: int) -> tuple[np.ndarray, np.ndarray]:
    """(Phi before the step less a tenth of the step, a bound after it)."""
    bounds = np.array([along(1.0 - h)[column] for h in STEPS])
    return MMD.distance(START, GOAL) - 0.1 * np.array(STEPS), bounds


def bound_and_truth(share: float) -> tuple[np.ndarray, np.ndarray]:
    """(g + share of the perpendicular part / 2g, Phi after the step) in the cases of HILBERT."""
    bounds, truths = [], []
    for critics, p, q, moved in HILBERT.values():
        g = ipm.gap(critics.witness(p, q), moved, q)
        bounds.append(g + share * (ipm.hilbert_surrogate(critics, p, q, moved) - g))
        truths.append(critics.distance(moved, q))
    return np.array(bounds), np.array(truths)


def figures(context: Context) -> tuple[Figure, ...]:
    means = np.linspace(0.2, 1.4, 61)
    columns = np.array([along(float(mean)) for mean in means]).T
    x = tuple(means.tolist())
    names = ("bound (19)", "bound of a Hilbert ball", "metric Φ", "frozen critic g")
    styles: tuple[Literal["line", "dashed"], ...] = ("line", "line", "line", "dashed")
    order = (1, 2, 0, 3)
    level = Series("Φ before the step", x, (MMD.distance(START, GOAL),) * len(x), style="dashed")
    curves = (
        Series(name, x, tuple(columns[i].tolist()), style=style)
        for name, i, style in zip(names, order, styles, strict=True)
    )
    return (
        Figure(
            name="sft-surrogates",
            title="Two upper bounds of the metric after a step from θ = 1 (MMD)",
            caption="Exact, MMD of width 0.7 between N(θ', 1/4) and N(0, 1/4). A bound certifies a step where it lies below the level of Φ before the step. Bound (19) has its only minimum at θ' = 1, where it touches "
            "that level; the bound of a Hilbert ball follows Φ and certifies every step shown towards the target.",
            alt="Five curves over the mean after the step: the level before it; the frozen critic, a little below the rest; the metric and the Hilbert bound almost coincide and fall together towards the target; bound (19) is a V with its corner at the start.",
            x_label="θ' (the target is at 0)",
            y_label="metric and its bounds",
            series=(*curves, level),
        ),
    )  # fmt: skip


HILBERT_SURROGATE = Claim(
    id="sft-pg.hilbert-surrogate",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source="derived in docs/sft.md",
    title="For the MMD there is a surrogate that certifies: Pythagoras in the critics' Hilbert space",
    statement=r"Let $A$ be the unit ball of a Hilbert space, $p_\theta \ne q$, $g = g(\theta', f_\theta)$ and $P_\perp$ the projection of mean embeddings off $f_\theta$. Then "
    r"$\Phi(\theta')^2 = g^2 + |P_\perp(\mu_{\theta'} - \mu_\theta)|^2$ and, where $g > 0$, $\Phi(\theta') \le g + |P_\perp(\mu_{\theta'} - \mu_\theta)|^2 / 2g$: what is added to $g$ is of second order in the step.",
    printed="holds",
    why=r"A step along the critic is already paid for in $g$; only the part across it is unknown to the critic, and it enters squared. So every small enough step against a gradient that is not zero "
    "is certified, from samples of three laws.",
    derivation="sft.md#a-surrogate-that-certifies",
    checks=(
        equals(
            "identity",
            "Is the squared metric after the step the square of the frozen critic's value plus the perpendicular part?",
            tuple(HILBERT),
            subject=squares,
            reference=lambda: np.array([critics.distance(moved, q) ** 2 for critics, _, q, moved in HILBERT.values()]),
            controls={"the whole distance stepped": lambda: squares(whole=True)},
            tolerance=1e-12,
        ),
        equals(
            "perpendicular part",
            "Is the perpendicular part that of an explicit projection of embeddings, with the kernel integrated by quadrature?",
            tuple(HILBERT),
            subject=perpendiculars,
            reference=projected,
            controls={"off another witness": lambda: perpendiculars(reflected=True)},
            tolerance=1e-6,
            margin_from="1e-6: quadrature of the kernel",
        ),
        at_least(
            "upper bound",
            "Is the bound at least the metric after the step?",
            tuple(HILBERT),
            subject=lambda: bound_and_truth(1.0),
            controls={"half the perpendicular part": lambda: bound_and_truth(0.5), "the frozen critic alone": lambda: bound_and_truth(0.0)},
        ),
        at_least(
            "certifies a decrease",
            "After steps from θ = 1 towards the target, is the bound below Φ(θ) by a tenth of the step or more?",
            tuple(f"step {h:g}" for h in STEPS),
            subject=lambda: certificates(2),
            controls={"bound (19)": lambda: certificates(1)},
        ),
        equals(
            "example",
            "From θ = 1 to 0.8, are Φ before and after and the two bounds those of an independent derivation?",
            ("Φ before", "Φ after", "bound (19)", "bound of the Hilbert ball"),
            subject=lambda: np.array([MMD.distance(START, GOAL), *along(0.8)[:3]]),
            reference=lambda: np.array([0.7469481457, 0.6233939631, 0.9519720677, 0.6234543679]),
            controls={"a step of 0.21": lambda: np.array([MMD.distance(START, GOAL), *along(0.79)[:3]])},
            tolerance=1e-10,
            margin_from="1e-10: the reference has ten digits",
        ),
    ),
    figures=figures,
)  # fmt: skip


CLAIMS: tuple[Claim, ...] = (POLICY_GRADIENT, ENVELOPE, KINKS, SURROGATE, HILBERT_SURROGATE)
