"""Chapter *Generative bilevel*, continued: the strength of entropy regularisation, tuned by a second reward (Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from algorithms.bilevel import PenaltyBilevel, Record
from algorithms.tilting import (
    STRENGTH,
    WEIGHTS,
    MinusUpper,
    Regularised,
    Tilt,
    divergence,
    effective_share,
    log_weights,
    uniform,
)
from algorithms.tilting import at_least as floored
from claims.bilevel import CHAPTER, PAPER
from claims.claim import Check, Claim, Context
from claims.judges import at_least, equals, has_mean
from claims.records import Column, Figure, Panel, Series, Table
from claims.training import Wins, shared
from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture
from theory.mixture_tilt import MixtureRewardTuning
from theory.reward_problem import RewardProblem
from theory.reward_tuning import FiniteRewardTuning, Quadratic, RewardTuning
from toy.strength_learning import Course, Plan, Points, tune
from verdicts.streams import Stream

OWN = "verifine"
PROBLEM = "Generative bilevel, section 4.1, (9) and (12) as reconstructed"
RELEASED = "Generative bilevel, released code: reward fine-tuning"

Direction = Literal["forward", "reverse"]


def line(mean: float, variance: float, b1: float, curve1: float, b2: float, curve2: float) -> RewardTuning:
    """Data N(mean, variance), rewards b x - curve x^2 / 2."""
    return RewardTuning(Gaussian.scalar(mean, variance), Quadratic([b1], [[curve1]]), Quadratic([b2], [[curve2]]))


A, B = line(0.5, 2.0, 0.7, 0.0, 1.5, 0.0), line(0.0, 1.0, 1.0, 1.0, 2.0, 1.0)
C, D = line(0.0, 1.0, 1.5, 1.0, 2.0, 0.0), line(0.0, 1.0, 1.0, 0.0, -0.05, 0.0)
E = line(0.0, 1.0, 2.0, 2.0, 1.0, 0.0)  # milder than C: its false optimum is within reach of samples
LINES: dict[str, tuple[RewardTuning, float]] = {"A": (A, 1.3), "B": (B, 0.7), "C": (C, 1.0), "D": (D, 1.0)}
GAMMAS = (1.0, 10.0, 100.0)

# Three atoms, and twenty samples among which they have exactly these shares.
SHARES, UPPER, LOWER = (14, 5, 1), (1.0, 0.0, -0.5), (0.0, 0.5, 1.0)
ATOMS = FiniteRewardTuning(np.array(SHARES) / 20, UPPER, LOWER)
TWENTY = (
    torch.tensor(np.repeat(UPPER, SHARES), dtype=torch.float64),
    torch.tensor(np.repeat(LOWER, SHARES), dtype=torch.float64),
)


# --- the same on a grid of the line, which knows no closed form ----------------------------------------------------


class Numbers(NamedTuple):
    log_partition: float
    mean: float
    variance: float
    forward: float  # KL of the tilt from the data
    reverse: float
    upper: float  # E r1 under the tilt
    covariance: float
    share: float  # relative effective sample size


def on_line(case: RewardTuning, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two rewards at points of the line."""
    return tuple(float(r.linear[0]) * x - 0.5 * float(r.quadratic[0, 0]) * x**2 for r in (case.upper, case.lower))  # type: ignore[return-value]


@cache
def summed(case: RewardTuning, strength: float, a: float = 0.0, b: float = 1.0) -> Numbers:
    """Everything about p_data exp((a r1 + b r2) / strength), by sums over a grid."""
    mean, spread = float(case.data.mean[0]), math.sqrt(float(case.data.cov[0, 0]))
    x = mean + spread * np.linspace(-20.0, 20.0, 8001)
    p = np.exp(-0.5 * ((x - mean) / spread) ** 2)
    p /= p.sum()
    r1, r2 = on_line(case, x)
    exponent = (a * r1 + b * r2) / strength
    top = float((np.log(np.maximum(p, 1e-300)) + exponent).max())
    weighted = p * np.exp(exponent - top)
    z = float(weighted.sum())
    log_z, q = math.log(z) + top, weighted / z
    centre = float(q @ x)
    second = float(p @ np.exp(2 * (exponent - log_z)))
    return Numbers(
        log_z,
        centre,
        float(q @ (x - centre) ** 2),
        float(q @ exponent) - log_z,
        log_z - float(p @ exponent),
        float(q @ r1),
        float(q @ ((r1 - q @ r1) * (r2 - q @ r2))),
        1 / second,
    )


def both(case: RewardTuning, strength: float, gamma: float) -> tuple[Numbers, Numbers]:
    """Of p^gamma and of p*."""
    return summed(case, strength, 1 / gamma), summed(case, strength)


def over_lines(
    of: Callable[[RewardTuning, float, float], float | Sequence[float]],
    cases: str = "ABCD",
    gammas: Sequence[float] = GAMMAS,
) -> np.ndarray:
    """A number, or several, for every case and gamma."""
    return np.array([of(*LINES[name], gamma) for name in cases for gamma in gammas]).ravel()


def places(*what: str, cases: str = "ABCD", gammas: Sequence[float] = GAMMAS) -> tuple[str, ...]:
    return tuple(", ".join(filter(None, (w, f"case {c}, γ = {g:g}"))) for c in cases for g in gammas for w in what)


@cache
def optimum(case: RewardProblem, gamma: float | None = None) -> float:
    """Of F, or of F_gamma."""
    return case.optimum() if gamma is None else case.penalty_optimum(gamma)


@cache
def false_optimum(case: RewardProblem, gamma: float | None = None) -> float:
    return case.released_root(gamma)


# --- the torch objects on the twenty samples -------------------------------------------------------------------------


def torch_weights(
    gamma: float | None, strength: float = 1.0, mixed: Literal["penalty", "released"] = "penalty"
) -> np.ndarray:
    """The three atoms' weights by the solver of Algorithm 2."""
    at = {STRENGTH: torch.tensor(strength, dtype=torch.float64)}
    found = Tilt(lambda update: TWENTY, mixed).solve(at, {}, gamma, 1)[WEIGHTS].exp()
    return np.array([float(part.sum()) for part in found.split(SHARES)])


def torch_gradient(
    gamma: float,
    strength: float = 1.0,
    direction: Direction = "forward",
    mixed: Literal["penalty", "released"] = "penalty",
    rewards: tuple[Tensor, Tensor] = TWENTY,
) -> float:
    """The gradient that an update of `PenaltyBilevel` sees."""
    x, seen = torch.tensor(strength, dtype=torch.float64), list[Record]()
    run = PenaltyBilevel(
        MinusUpper(),
        Regularised(direction),
        Tilt(lambda update: rewards, mixed),
        {STRENGTH: x},
        uniform(x, len(rewards[0])),
        gamma=gamma,
        optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.0),
        project=floored(1e-3),
        callback=lambda update, record: seen.append(record),
    )
    run.run(1)
    return float(seen[0].gradient[STRENGTH])


ATOM_STRENGTHS = (0.5, 1.0, 2.0)
ATOM_PLACES = tuple(f"λ = {s:g}, γ = {g:g}" for s in ATOM_STRENGTHS for g in GAMMAS)


def over_atoms(of: Callable[[float, float], float]) -> np.ndarray:
    return np.array([of(s, g) for s in ATOM_STRENGTHS for g in GAMMAS])


def derivative(value: Callable[[float], float], at: float, h: float = 2e-3) -> float:
    """Central differences with two steps of Richardson's extrapolation, of order h^6."""
    near, middle, far = ((value(at + k * h) - value(at - k * h)) / (2 * k * h) for k in (1, 2, 4))
    first, second = (4 * near - middle) / 3, (4 * middle - far) / 3
    return (16 * first - second) / 15


# --- tilts and the penalty function ------------------------------------------------------------------------------------


def laws(of: Callable[[RewardTuning, float, float], Gaussian], gammas: Sequence[float] = GAMMAS) -> np.ndarray:
    def numbers(case: RewardTuning, strength: float, gamma: float) -> list[float]:
        law = of(case, strength, gamma)
        return [float(law.mean[0]), float(law.cov[0, 0])]

    return over_lines(numbers, gammas=gammas)


def penalty_by_sums(case: RewardTuning, strength: float, gamma: float) -> float:
    """f + gamma (g - g*) at p^gamma, from expectations and divergences."""
    z, y = both(case, strength, gamma)
    exponents = [n.forward + n.log_partition for n in (z, y)]
    lower = [-(s * strength - a * n.upper) for s, a, n in zip(exponents, (1 / gamma, 0.0), (z, y), strict=True)]
    g = [low + strength * n.forward for low, n in zip(lower, (z, y), strict=True)]
    return -z.upper + gamma * (g[0] - g[1])


def objective(p: np.ndarray, strength: float, gamma: float) -> np.ndarray:
    """f + gamma g at laws (n, 3) on the atoms."""
    safe = np.maximum(p, 1e-300)
    distance = (p * np.log(safe / ATOMS.probabilities)).sum(-1)
    return -p @ ATOMS.upper + gamma * (-p @ ATOMS.lower + strength * distance)


@cache
def other_laws() -> np.ndarray:
    """A lattice of laws on three atoms."""
    steps = np.arange(1, 200)
    i, j = (grid.ravel() for grid in np.meshgrid(steps, steps))
    inside = i + j < 200
    return np.stack([i, j, 200 - i - j], -1)[inside] / 200


def beaten_by(candidate: Callable[[float, float], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The least objective on the lattice and on the way from it to p^gamma, beside the candidate's."""
    best, own = [], []
    for strength, gamma in product(ATOM_STRENGTHS, GAMMAS):
        law = ATOMS.tilted(strength, gamma)
        others = np.concatenate([other_laws(), law + 1e-3 * (other_laws() - law)])
        best.append(float(objective(others, strength, gamma).min()))
        own.append(float(objective(candidate(strength, gamma), strength, gamma)))
    return np.array(best), np.array(own)


TILTS = Claim(
    id="generative-bilevel.tuning-tilts",
    chapter=CHAPTER,
    paper=PAPER,
    source=PROBLEM,
    title="Both lower solutions are tilts of the pre-trained law, and the penalty function is a difference of log partition functions",
    statement=r"The lower problem of (9) is solved by $p^* \propto p_{data}\, e^{r_2/\lambda}$, the penalty problem by $p^\gamma \propto p_{data}\, e^{(r_1/\gamma + r_2)/\lambda}$. "
    r"So $F_\gamma = -\gamma\lambda\,(\log Z^\gamma - \log Z^*)$ and $F_\gamma' = \gamma\,\{\mathrm{KL}(p^\gamma \| p_{data}) - \mathrm{KL}(p^* \| p_{data})\}$.",
    printed="holds",
    why="An expected reward with a KL term is, up to a constant, λ times the KL divergence from the tilt. The upper reward enters with weight 1/γ: the penalty problem is the lower one with a slightly different reward.",
    derivation="bilevel.md#reward-tuning-both-laws-both-objectives",
    checks=(
        equals(
            "laws",
            "Are mean and variance of the penalty problem's law in the closed Gaussian form those of the tilt on a grid?",
            places("mean", "variance"),
            subject=lambda: laws(lambda case, s, g: case.tilted(s, g)),
            reference=lambda: over_lines(lambda case, s, g: summed(case, s, 1 / g)[1:3]),
            controls={
                "the lower problem's": lambda: laws(lambda case, s, g: case.tilted(s)),
                "γ r₁ + r₂": lambda: laws(lambda case, s, g: case.released_tilt(s, g)),
                "1/λ for λ": lambda: laws(lambda case, s, g: case.tilted(1 / s, g)),
            },
        ),
        at_least(
            "minimum",
            "On three atoms, is f + γ g nowhere below its value at the tilt: on a lattice of 19 701 laws, and near the tilt?",
            ATOM_PLACES,
            subject=lambda: beaten_by(ATOMS.tilted),
            controls={
                "the lower problem's tilt": lambda: beaten_by(lambda s, g: ATOMS.tilted(s)),
                "γ r₁ + r₂": lambda: beaten_by(lambda s, g: ATOMS.tilted(s, 1 / g)),
            },
            tolerance=1e-11,
        ),
        equals(
            "penalty function",
            "Is the difference of log partition functions f + γ (g - g*) at the tilt, from expectations on a grid?",
            places(""),
            subject=lambda: over_lines(lambda case, s, g: case.penalty_value(s, g)),
            reference=lambda: over_lines(penalty_by_sums),
            controls={
                "without λ": lambda: over_lines(lambda case, s, g: case.penalty_value(s, g) / s),
                "F itself": lambda: over_lines(lambda case, s, g: case.value(s)),
            },
        ),
        equals(
            "weights in torch",
            "Are the weights of Algorithm 2 on twenty samples the tilts of the law that gives each of them a twentieth?",
            tuple(f"{law}, atom {k + 1}" for law in ("p*", "p^γ, γ = 3") for k in range(3)),
            subject=lambda: np.concatenate([torch_weights(None), torch_weights(3.0)]),
            reference=lambda: np.concatenate([ATOMS.tilted(1.0), ATOMS.tilted(1.0, 3.0)]),
            controls={
                "γ r₁ + r₂": lambda: np.concatenate([torch_weights(None), torch_weights(3.0, mixed="released")]),
                "twice the strength": lambda: np.concatenate([torch_weights(g, 2.0) for g in (None, 3.0)]),
            },
        ),
        equals(
            "gradient in torch",
            "Is the gradient that an update sees the derivative of the penalty function, by finite differences?",
            ATOM_PLACES,
            subject=lambda: over_atoms(lambda s, g: torch_gradient(g, s)),
            reference=lambda: over_atoms(lambda s, g: derivative(lambda v: ATOMS.penalty_value(v, g), s, 1e-2)),
            controls={
                "the reverse divergence": lambda: over_atoms(lambda s, g: torch_gradient(g, s, "reverse")),
                "γ r₁ + r₂": lambda: over_atoms(lambda s, g: torch_gradient(g, s, mixed="released")),
                "F'": lambda: over_atoms(lambda s, g: ATOMS.slope(s)),
            },
            tolerance=1e-7,
            margin_from="1e-7 of the largest entry: finite differences of order six, of values with rounding γ times 1e-16",
        ),
    ),
)  # fmt: skip


SMALL = (1.0, 3.0, 10.0)  # beyond, the released tilts leave the grid


def scorer_table(context: object) -> tuple[Table, ...]:
    rows = []
    for gamma in (1.0, 3.0, 10.0, 100.0):
        meant, found = C.tilted(1.0, gamma), C.released_tilt(1.0, gamma)
        cells = [f"{float(v):.4f}" for law in (meant, found) for v in (law.mean[0], law.cov[0, 0])]
        rows.append((f"{gamma:g}", *cells))
    names = ("mean", "variance")
    return (
        Table(
            name="scorer",
            title=r"The penalty problem's law, and what the released weight of the rewards asks for ($p_{data} = N(0, 1)$, $r_1 = 1.5x - x^2/2$, $r_2 = 2x$, $\lambda = 1$)",
            caption="As γ grows the penalty problem's law tends to the lower one's, N(2, 1). The released one forgets the lower reward, and the data with it.",
            columns=(
                Column("γ"),
                *(Column(n, group="r₁/γ + r₂") for n in names),
                *(Column(n, group="γ r₁ + r₂") for n in names),
            ),
            rows=tuple(rows),
        ),
    )


SCORER = Claim(
    id="generative-bilevel.released-penalty-scorer",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=f"{RELEASED}, class PenaltyScorer",
    title="The released penalty reward weights the upper reward by γ instead of 1/γ",
    statement=r"The reward $\gamma r_1 + r_2$ that guides the samples of the penalty problem makes their law $p^\gamma$.",
    printed="refuted",
    corrected=r"It makes it $p^{1/\gamma}$: right at $\gamma = 1$ only, and a tilt by $r_1$ alone, of strength $\lambda/\gamma$, as $\gamma \to \infty$.",
    why="Minimising f + γ g is minimising f/γ + g. With the factor on the wrong reward a larger penalty means less of it. (In the code the upper reward is also rounded to a constant, so that its gradient never reaches the sampler.)",
    derivation="bilevel.md#the-released-gradient-the-reverse-divergence",
    checks=(
        equals(
            "law",
            "Are mean and variance of the tilt by γ r₁ + r₂ on a grid those of the penalty problem at 1/γ?",
            places("mean", "variance", gammas=SMALL),
            subject=lambda: over_lines(lambda case, s, g: summed(case, s, g)[1:3], gammas=SMALL),
            reference=lambda: laws(lambda case, s, g: case.tilted(s, 1 / g), SMALL),
            printed=lambda: laws(lambda case, s, g: case.tilted(s, g), SMALL),
            controls={
                "without the lower reward": lambda: over_lines(lambda case, s, g: summed(case, s, g, 0.0)[1:3], gammas=SMALL),
                "half of γ": lambda: over_lines(lambda case, s, g: summed(case, s, g / 2)[1:3], gammas=SMALL),
            },
        ),
        equals(
            "right at one",
            "At γ = 1, is it the penalty problem's law?",
            tuple(f"{what}, case {name}" for name in LINES for what in ("mean", "variance")),
            subject=lambda: np.array([summed(*LINES[name], 1.0)[1:3] for name in LINES]).ravel(),
            reference=lambda: laws(lambda case, s, g: case.tilted(s, g)).reshape(4, 3, 2)[:, 0].ravel(),
            controls={
                "at γ = 1.1": lambda: np.array([summed(*LINES[name], 1.1)[1:3] for name in LINES]).ravel(),
            },
        ),
    ),
    tables=scorer_table,
)  # fmt: skip

# --- the divergence, and F' --------------------------------------------------------------------------------------------


def in_terms_of_rewards(under: Literal["tilt", "data", "unnormalised"]) -> np.ndarray:
    """E r2 / lambda - log Z, the mean under a law of choice."""
    found = []
    for case, strength in LINES.values():
        y = summed(case, strength)
        law = case.data if under == "data" else case.tilted(strength)
        mean = case.lower.mean(law) / strength
        found.append((mean * math.exp(y.log_partition) if under == "unnormalised" else mean) - y.log_partition)
    return np.array(found)


DIVERGENCE = Claim(
    id="generative-bilevel.tilt-divergence",
    chapter=CHAPTER,
    paper=PAPER,
    source="Generative bilevel, Proposition 1, (13) as reconstructed",
    title="The divergence in the gradient needs the mean reward of the tuned model, not of the pre-trained one",
    statement=r"$\mathrm{KL}(p^* \| p_{data}) = \frac1\lambda E_{p^*} r_2 - \log E_d\, e^{r_2/\lambda}$, in terms of samples; and so for $p^\gamma$ with $r_1/\gamma + r_2$.",
    printed="holds",
    why="The logarithm of the ratio of densities is the exponent less log Z. Its mean is taken under the first argument of the divergence: with pre-trained samples, by weights that are normalised. With their plain mean it is minus the reverse divergence.",
    derivation="bilevel.md#reward-tuning-both-laws-both-objectives",
    checks=(
        equals(
            "formula",
            "With the mean under the tilt, is that the divergence between the two Gaussians?",
            tuple(f"case {name}" for name in LINES),
            subject=lambda: in_terms_of_rewards("tilt"),
            reference=lambda: np.array([case.divergence(s) for case, s in LINES.values()]),
            controls={
                "the mean under the data": lambda: in_terms_of_rewards("data"),
                "the reverse divergence": lambda: -in_terms_of_rewards("data"),
                "weights not normalised": lambda: in_terms_of_rewards("unnormalised"),
            },
        ),
        equals(
            "by brute force",
            "Is it the sum of p* log(p*/p) over three atoms, and torch's over twenty samples?",
            tuple(f"{by}, λ = {s:g}" for by in ("theory", "torch") for s in ATOM_STRENGTHS),
            subject=lambda: np.array(
                [ATOMS.divergence(s) for s in ATOM_STRENGTHS]
                + [float(divergence(log_weights(TWENTY[1], torch.tensor(s, dtype=torch.float64)))) for s in ATOM_STRENGTHS]
            ),
            reference=lambda: np.tile([float(q @ np.log(q / ATOMS.probabilities)) for q in map(ATOMS.tilted, ATOM_STRENGTHS)], 2),
            controls={
                "from the atoms' plain mean": lambda: np.tile(
                    [ATOMS.probabilities @ ATOMS.lower / s - ATOMS.log_partition(s) for s in ATOM_STRENGTHS], 2
                ),
                "reverse": lambda: np.tile(
                    [float(ATOMS.probabilities @ np.log(ATOMS.probabilities / q)) for q in map(ATOMS.tilted, ATOM_STRENGTHS)], 2
                ),
            },
        ),
    ),
)  # fmt: skip

SLOPE_STRENGTHS = (0.4, 0.7, 1.3, 3.0)
SLOPE_PLACES = tuple(f"case {name}, λ = {s:g}" for name in LINES for s in SLOPE_STRENGTHS)


def over_slopes(of: Callable[[RewardTuning, float], float]) -> np.ndarray:
    return np.array([of(case, s) for case, _ in LINES.values() for s in SLOPE_STRENGTHS])


HYPERGRADIENT = Claim(
    id="generative-bilevel.tuning-hypergradient",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source=f"the problem of {PROBLEM}",
    title="The exact derivative in the entropy strength is the covariance of the two rewards under the tuned model, over λ²",
    statement=r"For $F(\lambda) = -E_{p^*} r_1$: $F' = \mathrm{Cov}_{p^*}(r_1, r_2)/\lambda^2$. The strength should fall while the rewards agree on the tuned model's samples, and rise when they do not.",
    printed="holds",
    why="A change of λ moves the tilt along the centred lower reward, −(r₂ − E r₂)/λ². The optimum is where tuning harder has stopped to pay: there the two rewards are uncorrelated under the tuned model.",
    derivation="bilevel.md#reward-tuning-both-laws-both-objectives",
    checks=(
        equals(
            "derivative",
            "Is the covariance over λ², in closed form, the derivative of the mean reward on a grid, by finite differences?",
            SLOPE_PLACES,
            subject=lambda: over_slopes(lambda case, s: case.slope(s)),
            reference=lambda: over_slopes(lambda case, s: derivative(lambda v: -summed(case, v).upper, s, 2e-3 * s)),
            controls={
                "over λ": lambda: over_slopes(lambda case, s: case.slope(s) * s),
                "under the data": lambda: over_slopes(lambda case, s: case.slope(1e6) * 1e12 / s**2),
                "variance of the lower reward": lambda: over_slopes(
                    lambda case, s: RewardTuning(case.data, case.lower, case.lower).slope(s)
                ),
            },
            tolerance=1e-8,
            margin_from="1e-8 of the largest entry: finite differences of order six",
        ),
        equals(
            "known optima",
            "Are the optima of cases B, C and E 3/5, 4/3 and 1, and is the covariance zero there?",
            ("λ*, B", "λ*, C", "λ*, E", "covariance, B", "covariance, C", "covariance, E"),
            subject=lambda: np.array([0.6, 4 / 3, 1.0] + [summed(case, s).covariance for case, s in ((B, 0.6), (C, 4 / 3), (E, 1.0))]),
            reference=lambda: np.array([optimum(B), optimum(C), optimum(E), 0.0, 0.0, 0.0]),
            controls={
                "of the penalty problem, γ = 100": lambda: np.array([optimum(case, 100.0) for case in (B, C, E)] + [0.0] * 3),
                "the covariance of the data": lambda: np.array([0.6, 4 / 3, 1.0] + [summed(case, 1e6).covariance for case in (B, C, E)]),
            },
        ),
    ),
)  # fmt: skip

# --- the released gradient -----------------------------------------------------------------------------------------------


def est1(upper: Tensor, lower: Tensor, strength: float, gamma: float) -> float:
    """The released estimate, from plain means over samples."""
    r1, r2 = upper.numpy(), lower.numpy()
    log_means = [math.log(np.mean(np.exp(r / strength))) for r in (r1 / gamma + r2, r2)]
    return float(-np.mean(r1) / strength + gamma * (log_means[0] - log_means[1]))


def differences(case: RewardTuning, strength: float, gamma: float, direction: Direction) -> float:
    z, y = both(case, strength, gamma)
    return gamma * (getattr(z, direction) - getattr(y, direction))


RELEASED_GRADIENT = Claim(
    id="generative-bilevel.released-tuning-gradient",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=f"{RELEASED}, est1",
    title="The released gradient has the divergences the wrong way round, and stops where tuning has gained nothing",
    statement=r"The released estimate $-\frac1\lambda \bar r_1 + \gamma\,(\log \overline{e^{(r_1/\gamma + r_2)/\lambda}} - \log \overline{e^{r_2/\lambda}})$, means over pre-trained samples, estimates (12).",
    printed="refuted",
    corrected=r"It estimates $\gamma\,\{\mathrm{KL}(p_{data} \| p^\gamma) - \mathrm{KL}(p_{data} \| p^*)\}$, which tends to $(E_{p^*} r_1 - E_d r_1)/\lambda$: zero where the tuned model has the upper reward of the one that was not tuned.",
    why="The plain mean of samples of the pre-trained model puts that law first in the divergence. Smallest example: $N(0,1)$, $r_1 = 1.5x - x^2/2$, $r_2 = 2x$, λ = 1, γ = 100: +1.0037 for −0.9864. "
    "Gaussian data with linear rewards cannot tell the two apart, at any γ.",
    derivation="bilevel.md#the-released-gradient-the-reverse-divergence",
    checks=(
        equals(
            "population value",
            "Is its limit of many samples the difference of the reverse divergences on a grid?",
            places("", cases="BC"),
            subject=lambda: over_lines(lambda case, s, g: case.released_slope(s, g), "BC"),
            reference=lambda: over_lines(lambda case, s, g: differences(case, s, g, "reverse"), "BC"),
            printed=lambda: over_lines(lambda case, s, g: case.penalty_slope(s, g), "BC"),
            controls={
                "-F_γ / λ": lambda: over_lines(lambda case, s, g: -case.penalty_value(s, g) / s, "BC"),
                "without γ": lambda: over_lines(lambda case, s, g: case.released_slope(s, g) / g, "BC"),
            },
        ),
        equals(
            "smallest example",
            "Are the released value and the right one those of an independent derivation, +1.0037210811 and -0.9864066021?",
            ("released", "(12)"),
            subject=lambda: np.array([C.released_slope(1.0, 100.0), C.penalty_slope(1.0, 100.0)]),
            reference=lambda: np.array([1.0037210811039721, -0.986406602131322355]),
            controls={
                "exchanged": lambda: np.array([C.penalty_slope(1.0, 100.0), C.released_slope(1.0, 100.0)]),
                "limits of large γ": lambda: np.array([C.released_limit(1.0), C.slope(1.0)]),
            },
        ),
        equals(
            "in samples",
            "On twenty samples, is the released formula what this repository's reverse variant computes, and theory's for that law?",
            tuple(f"{by}, {place}" for by in ("torch", "theory") for place in ATOM_PLACES),
            subject=lambda: np.concatenate(
                [over_atoms(lambda s, g: torch_gradient(g, s, "reverse")), over_atoms(lambda s, g: ATOMS.released_slope(s, g))]
            ),
            reference=lambda: np.tile(over_atoms(lambda s, g: est1(*TWENTY, s, g)), 2),
            printed=lambda: np.concatenate(
                [over_atoms(lambda s, g: torch_gradient(g, s)), over_atoms(lambda s, g: ATOMS.penalty_slope(s, g))]
            ),
            controls={
                "the opposite sign": lambda: -np.tile(over_atoms(lambda s, g: est1(*TWENTY, s, g)), 2),
                "γ r₁ + r₂": lambda: np.tile(over_atoms(lambda s, g: torch_gradient(g, s, "reverse", "released")), 2),
            },
        ),
        equals(
            "false optimum",
            "Where its limit vanishes, has the tuned model on a grid the mean upper reward of the model that was not tuned?",
            tuple(f"case {name}" for name in "CE"),
            subject=lambda: np.array([summed(case, false_optimum(case)).upper for case in (C, E)]),
            reference=lambda: np.array([case.data_reward() for case in (C, E)]),
            printed=lambda: np.array([summed(case, optimum(case)).upper for case in (C, E)]),
            controls={
                "at the root for γ = 10": lambda: np.array([summed(case, false_optimum(case, 10.0)).upper for case in (C, E)]),
            },
        ),
        equals(
            "its places",
            "In case C, is it at λ = 2/3, and at 0.6636223074 and 0.6372036587 for γ = 100 and 10, as an independent derivation has it?",
            ("limit", "γ = 100", "γ = 10"),
            subject=lambda: np.array([false_optimum(C), false_optimum(C, 100.0), false_optimum(C, 10.0)]),
            reference=lambda: np.array([2 / 3, 0.663622307388255154, 0.637203658611228884]),
            controls={
                "the optima": lambda: np.array([optimum(C), optimum(C, 100.0), optimum(C, 10.0)]),
                "the limit for all": lambda: np.full(3, false_optimum(C)),
            },
        ),
        equals(
            "linear rewards cannot tell",
            "With linear rewards, are both directions the same number at every γ, so that a test with them would pass the released code?",
            places("", cases="AD"),
            subject=lambda: over_lines(lambda case, s, g: differences(case, s, g, "reverse"), "AD"),
            reference=lambda: over_lines(lambda case, s, g: differences(case, s, g, "forward"), "AD"),
            controls={
                "the same in cases B and C": lambda: over_lines(lambda case, s, g: differences(case, s, g, "reverse"), "BC"),
                "a curvature of 0.01 in r₁": lambda: np.array(
                    [differences(line(0.5, 2.0, 0.7, 0.01, 1.5, 0.0), 1.3, g, "reverse") for g in (*GAMMAS, *GAMMAS)]
                ),
            },
        ),
    ),
)  # fmt: skip

# --- the domain ------------------------------------------------------------------------------------------------------------

CONVEX = line(0.0, 1.0, 0.3, -0.5, 1.0, 0.0)  # r1 = 0.3 x + x^2 / 4, r2 = x
DOMAIN_GAMMAS = (0.5, 2.0, 10.0)
INSIDE, OUTSIDE = 1.05, 0.95  # times the bound
FAR = (500.0, 1000.0)


def truncated(strength: float, gamma: float, reach: float) -> float:
    """log of the integral of the penalty problem's unnormalised density over [-reach, reach]."""
    x = np.linspace(-reach, reach, 200_001)
    r1, r2 = on_line(CONVEX, x)
    exponent = (r1 / gamma + r2) / strength - x**2 / 2
    top = exponent.max()
    return float(top + math.log(np.exp(exponent - top).sum() * (x[1] - x[0])) - 0.5 * math.log(2 * math.pi))


def grows(factor: float) -> np.ndarray:
    """By how much the logarithm grows when the reach doubles, at strengths factor times 1/(2 gamma)."""
    return np.array(
        [truncated(factor * 0.5 / g, g, FAR[1]) - truncated(factor * 0.5 / g, g, FAR[0]) for g in DOMAIN_GAMMAS]
    )


def bound_of(curvature: float, variance: float = 1.0) -> np.ndarray:
    return np.array([line(0.0, variance, 0.3, -curvature, 1.0, 0.0).domain(g) for g in DOMAIN_GAMMAS])


def domain_table(context: object) -> tuple[Table, ...]:
    rows = []
    for strength in (0.2525, 0.255, 0.275, 0.35, 0.5, 1.0):
        rows.append((f"{strength:g}", f"{CONVEX.slope(strength):.3f}", f"{CONVEX.penalty_slope(strength, 2.0):.3g}"))
    rows.append(("0.25 and less", "finite down to 0", "infinite"))
    return (
        Table(
            name="domain",
            title=r"Gradients towards the edge of the penalty problem's domain ($p_{data} = N(0,1)$, $r_1 = 0.3x + x^2/4$, $r_2 = x$, $\gamma = 2$)",
            caption="The bilevel problem's gradient shows nothing of the edge at λ = 1/4, where that of the penalty problem diverges.",
            columns=(Column("λ"), Column("F'"), Column("F_γ'")),
            rows=tuple(rows),
        ),
    )


DOMAIN = Claim(
    id="generative-bilevel.penalty-domain",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source=f"the problem of {PROBLEM}, and the released projection on λ ≥ 0",
    title="The penalty problem can be infinite where the bilevel problem is finite: the strength must stay above a bound, and above zero",
    statement=r"On $N(m, s^2)$ with $r_2$ linear and $r_1 = b_1 x + \frac b2 x^2$, $b > 0$, $F$ is finite at every $\lambda > 0$, and $F_\gamma = -\infty$ for $\lambda \le s^2 b/\gamma$. At $\lambda = 0$ no tilt exists; the released code projects on $[0, \infty)$ and divides by λ.",
    printed="holds",
    why="A convex reward beats the Gaussian's tails as soon as its weight b/(γλ) reaches 1/s². A projection needs a positive floor, and one above this bound; with samples in the place of the law nothing warns of it but the weights.",
    derivation="bilevel.md#reward-tuning-gaussian-data",
    checks=(
        equals(
            "just inside",
            f"At {INSIDE} times the bound, is the integral over a long interval the closed form?",
            tuple(f"γ = {g:g}" for g in DOMAIN_GAMMAS),
            subject=lambda: np.array([truncated(INSIDE * 0.5 / g, g, FAR[1]) for g in DOMAIN_GAMMAS]),
            reference=lambda: np.array([CONVEX.log_partition(INSIDE * 0.5 / g, g) for g in DOMAIN_GAMMAS]),
            controls={
                "just outside": lambda: np.array([truncated(OUTSIDE * 0.5 / g, g, FAR[1]) for g in DOMAIN_GAMMAS]),
                "the lower problem's": lambda: np.array([CONVEX.log_partition(INSIDE * 0.5 / g) for g in DOMAIN_GAMMAS]),
            },
        ),
        at_least(
            "just outside",
            f"At {OUTSIDE} times the bound, does the logarithm of the integral grow by more than 100 when the interval doubles?",
            tuple(f"γ = {g:g}" for g in DOMAIN_GAMMAS),
            subject=lambda: (grows(OUTSIDE), np.full(3, 100.0)),
            controls={
                "just inside": lambda: (grows(INSIDE), np.full(3, 100.0)),
                "far inside": lambda: (grows(4.0), np.full(3, 100.0)),
            },
        ),
        equals(
            "the bound",
            "Is the bound s²b/γ, and zero for the lower problem?",
            (*(f"γ = {g:g}, s² = {v:g}" for v in (1.0, 2.5) for g in DOMAIN_GAMMAS), "lower problem"),
            subject=lambda: np.concatenate([bound_of(0.5), bound_of(0.5, 2.5), [CONVEX.domain()]]),
            reference=lambda: np.array([v * 0.5 / g for v in (1.0, 2.5) for g in DOMAIN_GAMMAS] + [0.0]),
            controls={
                "s for s²": lambda: np.concatenate([bound_of(0.5), bound_of(0.5, math.sqrt(2.5)), [0.0]]),
                "the same for both problems": lambda: np.concatenate([bound_of(0.5), bound_of(0.5, 2.5), bound_of(0.5)[1:2]]),
            },
        ),
        equals(
            "finite without the penalty",
            "At those strengths outside the penalty's domain, is F the finite number of the grid?",
            tuple(f"λ = {OUTSIDE * 0.5 / g:g}" for g in DOMAIN_GAMMAS[:2]),
            subject=lambda: np.array([CONVEX.value(OUTSIDE * 0.5 / g) for g in DOMAIN_GAMMAS[:2]]),
            reference=lambda: np.array([-summed(CONVEX, OUTSIDE * 0.5 / g).upper for g in DOMAIN_GAMMAS[:2]]),
            controls={"of a concave r₁": lambda: np.array([line(0.0, 1.0, 0.3, 0.5, 1.0, 0.0).value(OUTSIDE * 0.5 / g) for g in DOMAIN_GAMMAS[:2]])},
        ),
    ),
    tables=domain_table,
)  # fmt: skip

# --- linear rewards ------------------------------------------------------------------------------------------------------

PLANE = RewardTuning(Gaussian([0.2, -0.4], [[1.0, 0.3], [0.3, 0.5]]), Quadratic([0.6, -0.5]), Quadratic([0.4, 0.9]))
NARROW = (0.9, 1.5, 3.0)
LINEAR_PLACES = tuple(f"λ = {s:g}, γ = {g:g}" for s in NARROW for g in GAMMAS)


def by_nodes(strength: float, gamma: float) -> float:
    """The penalty function in the plane, by Gauss and Hermite's rule."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    w = np.multiply.outer(weights, weights).ravel() / (2 * math.pi)
    x = PLANE.data.mean + z @ np.linalg.cholesky(PLANE.data.cov).T
    r1, r2 = x @ PLANE.upper.linear, x @ PLANE.lower.linear
    log_z = [math.log(float(w @ np.exp(r / strength))) for r in (r1 / gamma + r2, r2)]
    return -gamma * strength * (log_z[0] - log_z[1])


def linear_slope(bias: Callable[[float], float]) -> np.ndarray:
    """F' of the plane's problem plus bias(gamma) / lambda^2."""
    cross = float(PLANE.upper.linear @ PLANE.data.cov @ PLANE.lower.linear)
    return np.array([(cross + bias(g)) / s**2 for s in NARROW for g in GAMMAS])


def own_variance(reward: Quadratic) -> float:
    return float(reward.linear @ PLANE.data.cov @ reward.linear)


LINEAR = Claim(
    id="generative-bilevel.linear-tuning-bias",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source=f"the problem of {PROBLEM}",
    title="With linear rewards the penalty's bias is one term at every γ, always upwards, and neither problem has an optimum",
    statement=r"On $N(m, S)$ with $r_i = b_i^\top x$: $F' = b_1^\top S b_2/\lambda^2$ and, for every γ and λ, $F_\gamma' = F' + b_1^\top S b_1/(2\gamma\lambda^2)$. Neither changes sign in λ.",
    printed="holds",
    why="Linear rewards move the mean and nothing else, so the expansion in 1/γ ends after one term. It always pulls λ down, whichever way the truth points; and an example of this kind has nothing to tune.",
    derivation="bilevel.md#reward-tuning-gaussian-data",
    checks=(
        equals(
            "bias",
            "In two dimensions, is that the derivative of the penalty function by quadrature and finite differences?",
            LINEAR_PLACES,
            subject=lambda: linear_slope(lambda g: own_variance(PLANE.upper) / (2 * g)),
            reference=lambda: np.array([derivative(lambda v, g=g: by_nodes(v, g), s, 1e-2 * s) for s in NARROW for g in GAMMAS]),
            controls={
                "no bias": lambda: linear_slope(lambda g: 0.0),
                "twice the bias": lambda: linear_slope(lambda g: own_variance(PLANE.upper) / g),
                "downwards": lambda: linear_slope(lambda g: -own_variance(PLANE.upper) / (2 * g)),
                "of the lower reward": lambda: linear_slope(lambda g: own_variance(PLANE.lower) / (2 * g)),
            },
            tolerance=1e-7,
            margin_from="1e-7 of the largest entry: finite differences of order six",
        ),
        equals(
            "no optimum",
            "Is λ² F' the same number at every strength?",
            tuple(f"{of}, λ = {s:g}" for of in ("F", "F_γ, γ = 10") for s in NARROW),
            subject=lambda: np.array(
                [s**2 * PLANE.slope(s) for s in NARROW] + [s**2 * PLANE.penalty_slope(s, 10.0) for s in NARROW]
            ),
            reference=lambda: np.repeat([PLANE.slope(1.0), PLANE.penalty_slope(1.0, 10.0)], 3),
            controls={
                "with a quadratic reward": lambda: np.array(
                    [s**2 * C.slope(s) for s in NARROW] + [s**2 * C.penalty_slope(s, 10.0) for s in NARROW]
                ),
                "λ F'": lambda: np.array([s * PLANE.slope(s) for s in NARROW] + [s * PLANE.penalty_slope(s, 10.0) for s in NARROW]),
            },
        ),
    ),
)  # fmt: skip

# --- estimating from pre-trained samples ------------------------------------------------------------------------------------

BATCHES = (1, 2, 3, 5)
SIXTEEN = 0.31546606  # mean over batches of 16 in case C, of an independent derivation, standard error 0.0004
GROUP, ROWS = 8, 4096


def torch_mean(batch: int, direction: Direction = "forward", gamma: float = 10.0) -> float:
    """The mean of torch's estimate over all sequences of so many atoms."""
    sequences = np.array(list(product(range(3), repeat=batch)))
    chances = ATOMS.probabilities[sequences].prod(1)
    r1, r2 = (torch.tensor(np.array(r)[sequences], dtype=torch.float64) for r in (UPPER, LOWER))
    return float(chances @ estimates(r1, r2, 1.0, gamma, direction).numpy())


def estimates(r1: Tensor, r2: Tensor, strength: float, gamma: float, direction: Direction = "forward") -> Tensor:
    """Of the gradient, from batches of samples in the last axis."""
    at = torch.full(r1.shape[:-1], strength, dtype=r1.dtype)
    z, y = log_weights(r1 / gamma + r2, at), log_weights(r2, at)
    return gamma * (divergence(z, direction) - divergence(y, direction))


def in_case_c(batch: int, direction: Direction = "forward") -> Callable[[Stream], Callable[[int], np.ndarray]]:
    """Means over groups of batches of the estimate at lambda = 1, gamma = 100."""

    def of(stream: Stream) -> Callable[[int], np.ndarray]:
        def block(index: int) -> np.ndarray:
            generator = torch.Generator().manual_seed(stream.child(index).integer())
            x = torch.randn(ROWS, GROUP, batch, generator=generator, dtype=torch.float64)
            found = estimates(*rewards_at(C, x), 1.0, 100.0, direction)
            return found.mean(1, keepdim=True).numpy()

        return block

    return of


def rewards_at(case: RewardTuning, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(float(r.linear[0]) * x - 0.5 * float(r.quadratic[0, 0]) * x**2 for r in (case.upper, case.lower))  # type: ignore[return-value]


SIZES, SEEN_BATCHES = (16, 64, 256, 1024, 4096), 2000
SHARE_CASES = ("A", "C")
SHARE_STRENGTHS = (0.9, 1.3, 3.0)


def shares(factor: float) -> np.ndarray:
    """exp(-factor b'Sb / lambda^2)."""
    spread = {name: float(LINES[name][0].lower.linear[0] ** 2 * LINES[name][0].data.cov[0, 0]) for name in SHARE_CASES}
    return np.array([math.exp(-factor * spread[name] / s**2) for name in SHARE_CASES for s in SHARE_STRENGTHS])


@cache
def sizes_measured(seed: int) -> np.ndarray:
    """Mean and standard error of the estimate in case C, for each size of batch, (5, 2)."""
    rows = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(Stream(seed).child("toy", "strength", "sizes", size).integer())
        x = torch.randn(SEEN_BATCHES, size, generator=generator)
        found = estimates(*rewards_at(C, x), 1.0, 100.0)
        rows.append((float(found.mean()), float(found.std()) / math.sqrt(SEEN_BATCHES)))
    return np.array(rows)


def sizes_figure(context: Context) -> tuple[Figure, ...]:
    found, x, truth = sizes_measured(context.stream.seed), tuple(map(float, SIZES)), C.penalty_slope(1.0, 100.0)
    mean, error = found[:, 0], 4 * found[:, 1]
    ends = (x[0], x[-1])
    return (
        Figure(
            name="batch-bias",
            title="Mean of the self-normalised estimate of the gradient against the batch (λ = 1, γ = 100)",
            caption=f"N(0,1), r₁ = 1.5x − x²/2, r₂ = 2x; {SEEN_BATCHES} batches of each size, four standard errors. The weights' effective size is 1.8 % of the batch. With 16 samples the mean has the wrong sign; with 4096 a fifth of the gradient is still missing.",
            alt="The mean falls from 0.3 at 16 samples through zero between 64 and 256 samples to −0.8 at 4096, above the dashed line of the truth at −0.99.",
            x_label="samples in a batch",
            y_label="mean estimate",
            x_scale="log",
            series=(
                Series("mean estimate", x, tuple(mean), tuple(mean - error), tuple(mean + error)),
                Series("gradient of the penalty function", ends, (truth, truth), style="dashed"),
                Series("zero", ends, (0.0, 0.0), style="dashed"),
            ),
        ),
    )


def shares_table(context: object) -> tuple[Table, ...]:
    rows = []
    for strength, note in (
        (0.5, ""),
        (false_optimum(C, 100.0), "the released gradient's root"),
        (1.0, ""),
        (4 / 3, "λ*"),
        (2.0, ""),
        (5.0, ""),
    ):
        share = C.effective_sample_size(strength)
        rows.append((f"{strength:.4g}", note, f"{share:.2g}", f"{math.ceil(50 / share)}"))
    return (
        Table(
            name="effective-share",
            title=r"Samples that it takes to be worth 50, in the same case",
            caption=r"The share is $e^{-4/\lambda^2}$ here: below λ = 1 the number of pre-trained samples that tell the gradient explodes.",
            columns=(Column("λ"), Column("", "left"), Column("effective share"), Column("samples for 50")),
            rows=tuple(rows),
        ),
    )  # fmt: skip


ESTIMATE = Claim(
    id="generative-bilevel.self-normalised-gradient",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source="the question of Generative bilevel, Remark 1 and Appendix E.2: an estimate from pre-trained samples",
    title="From pre-trained samples the gradient can only be estimated with a bias, which may turn its sign, unless the weights are even",
    statement=r"The estimate of (12) by self-normalised weights on $M$ samples of the pre-trained model is biased at every $M$, and 0 at $M = 1$. In the case $N(0,1)$, $r_1 = 1.5x - x^2/2$, $r_2 = 2x$, λ = 1, γ = 100 its mean at $M = 16$ is $+0.315$ for $-0.986$. "
    r"The relative effective sample size is $e^{-b_2^\top S b_2/\lambda^2}$ for a linear $r_2$.",
    printed="holds",
    why="A mean under the tilt is a ratio of two means under the data. While the tilt is farther away than the farthest of the samples, the weights sit on that sample and its reward is mistaken for the tuned model's. The harder the tuning, the worse: exponentially in 1/λ².",
    derivation="bilevel.md#estimating-from-data",
    checks=(
        equals(
            "small batches",
            "On three atoms, is the mean of torch's estimate over all sequences the one enumerated by counts?",
            tuple(f"M = {m}" for m in BATCHES),
            subject=lambda: np.array([torch_mean(m) for m in BATCHES]),
            reference=lambda: np.array([ATOMS.self_normalised(1.0, 10.0, m).mean for m in BATCHES]),
            controls={
                "no bias": lambda: np.full(len(BATCHES), ATOMS.penalty_slope(1.0, 10.0)),
                "the reverse direction": lambda: np.array([torch_mean(m, "reverse") for m in BATCHES]),
                "one sample more": lambda: np.array([torch_mean(m + 1) for m in BATCHES]),
            },
        ),
        equals(
            "nothing from one",
            "Is the estimate zero with one sample, and is the gradient that of an independent derivation at γ = 10?",
            ("M = 1", "gradient"),
            subject=lambda: np.array([torch_mean(1), ATOMS.penalty_slope(1.0, 10.0)]),
            reference=lambda: np.array([0.0, -0.17371831040642434]),
            controls={"two samples": lambda: np.array([torch_mean(2), ATOMS.penalty_slope(1.0, 10.0)])},
        ),
        has_mean(
            "sixteen samples",
            "In the Gaussian case, is the mean over batches of 16 the +0.3155 of an independent derivation?",
            ("mean estimate",),
            subject=in_case_c(16),
            reference=lambda: np.array([SIXTEEN]),
            margin=0.01,
            margin_from="0.01: a 25th of one estimate's standard deviation, 0.243; the reference itself is known to 0.0004",
            kurtosis=8.0,  # of means of 8 batches; so one estimate may have 43. It has about 4
            controls={
                "batches of 20": in_case_c(20),
                "the reverse direction": in_case_c(16, "reverse"),
            },
        ),
        equals(
            "effective size",
            "Is the relative effective sample size of a linear reward's weights that exponential, by sums on a grid?",
            tuple(f"case {name}, λ = {s:g}" for name in SHARE_CASES for s in SHARE_STRENGTHS),
            subject=lambda: shares(1.0),
            reference=lambda: np.array([summed(LINES[name][0], s).share for name in SHARE_CASES for s in SHARE_STRENGTHS]),
            controls={"half the exponent": lambda: shares(0.5), "twice the exponent": lambda: shares(2.0)},
        ),
        equals(
            "effective size in torch",
            "On twenty samples, is the share that the gate looks at that of the law which gives each of them a twentieth?",
            tuple(f"λ = {s:g}" for s in ATOM_STRENGTHS),
            subject=lambda: np.array([float(effective_share(log_weights(TWENTY[1], torch.tensor(s, dtype=torch.float64)))) for s in ATOM_STRENGTHS]),
            reference=lambda: np.array([ATOMS.effective_sample_size(s) for s in ATOM_STRENGTHS]),
            controls={
                "exp(entropy)/n": lambda: np.array([math.exp(-ATOMS.divergence(s)) for s in ATOM_STRENGTHS]),
                "with the upper reward": lambda: np.array([ATOMS.effective_sample_size(s, 3.0) for s in ATOM_STRENGTHS]),
            },
        ),
    ),
    figures=lambda context: sizes_figure(shared(context)),
    tables=shares_table,
)  # fmt: skip

# --- Algorithm 2 on samples ------------------------------------------------------------------------------------------------

MIXTURE = MixtureRewardTuning(
    GaussianMixture(
        [0.5, 0.3, 0.2],
        [[-1.5, 0.0], [0.6, 1.2], [1.6, -1.0]],
        [[[0.15, 0.0], [0.0, 0.15]], [[0.2, 0.1], [0.1, 0.2]], [[0.15, -0.05], [-0.05, 0.25]]],
    ),
    Quadratic([0.8, 0.8], [[1.0, 0.0], [0.0, 1.0]]),
    Quadratic([1.5, 0.0], [[0.2, 0.0], [0.0, 0.2]]),
)
RUNS = 48  # of each start: three losses still decide "more than half" at a share of 2e-9
GAMMA, FLOOR = 100.0, 0.05
NEAR, NEAR_FALSE, GAIN, STAY = 0.05, 0.1, 0.2, 0.25
TUNED: dict[str, RewardTuning | MixtureRewardTuning] = {"B": B, "C": C, "E": E, "mixture": MIXTURE}
STARTS = {"B": (0.2, 1.0, 3.0), "C": (0.9, 2.0, 5.0), "E": (0.6, 1.5, 4.0), "mixture": (0.5, 1.0, 6.0)}
SAMPLES = {"B": 1024, "C": 4096, "E": 2048, "mixture": 1024}
RELEASED_PLAN = Plan(1024, updates=100, late=40, direction="reverse", effective=0.0)
REWARDS = {
    "B": "r₁ = x − x²/2, r₂ = 2x − x²/2",
    "C": "r₁ = 1.5x − x²/2, r₂ = 2x",
    "E": "r₁ = 2x − x², r₂ = x",
}
PILOTS = "margins and lengths were chosen after pilot runs of other root seeds, 1 and 2"


class Setup(NamedTuple):
    case: str
    starts: tuple[float, ...]
    plan: Plan


SETUPS: dict[str, Setup] = {
    **{name: Setup(name, STARTS[name], Plan(SAMPLES[name])) for name in TUNED},
    "C, released": Setup("C", STARTS["C"], replace(RELEASED_PLAN, n=4096)),
    "E, released": Setup("E", STARTS["E"], replace(RELEASED_PLAN, n=8192)),
    **{f"{name}, released": Setup(name, STARTS[name], RELEASED_PLAN) for name in ("B", "mixture")},
    "too small": Setup("C", (0.5,), Plan(4096)),
    "too small, no gate": Setup("C", (0.5,), Plan(4096, effective=0.0)),
    "too few, no gate": Setup("C", (0.9, 2.0), Plan(16, effective=0.0)),
}  # fmt: skip


def drawn(name: str) -> Points:
    """Samples of the case's pre-trained law, as rewards."""
    case = TUNED[name]

    def on_the_line(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        assert isinstance(case, RewardTuning)
        mean, spread = float(case.data.mean[0]), math.sqrt(float(case.data.cov[0, 0]))
        return rewards_at(case, mean + spread * torch.randn(count, generator=generator))

    def in_the_plane(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor(np.cumsum(MIXTURE.data.weights)[:-1], dtype=torch.float32)
        component = torch.searchsorted(bounds, torch.rand(count, generator=generator))
        roots = torch.tensor(np.linalg.cholesky(MIXTURE.data.covs), dtype=torch.float32)
        means = torch.tensor(MIXTURE.data.means.copy(), dtype=torch.float32)
        z = torch.randn(count, 2, generator=generator)
        x = means[component] + (roots[component] @ z[..., None])[..., 0]
        return quadratic(MIXTURE.upper, x), quadratic(MIXTURE.lower, x)

    return on_the_line if isinstance(case, RewardTuning) else in_the_plane


def quadratic(reward: Quadratic, x: Tensor) -> Tensor:
    b, matrix = (torch.tensor(np.array(v), dtype=x.dtype) for v in (reward.linear, reward.quadratic))
    return x @ b - 0.5 * ((x @ matrix) * x).sum(-1)


@cache
def course(context: Context, name: str) -> Course:
    """All runs of a set-up; checks, figures and tables share them."""
    setup, stream = SETUPS[name], Stream(context.stream.seed).child("toy", "strength", name)
    return tune(drawn(setup.case), setup.starts, setup.plan, RUNS, stream)


Pairs = Callable[[Context], list[tuple[np.ndarray, np.ndarray]]]


def within(names: Sequence[str], released: bool = False, share: float = NEAR, false: bool = False) -> Pairs:
    """A share of the optimum (or of the false one) and the distances from it, for every case and start."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = []
        for name in names:
            aim = false_optimum(TUNED[name], GAMMA) if false else optimum(TUNED[name])
            for row in course(context, f"{name}, released" if released else name).found:
                pairs.append((np.full(RUNS, share * aim), np.abs(row - aim)))
        return pairs

    return of


def from_starts(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"case {name}, from λ = {s:g}" for name in names for s in STARTS[name])


CLOSED = ("B", "C", "E")

FOUND = Claim(
    id="generative-bilevel.tuning-finds-the-strength",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source="the question of Generative bilevel, Algorithm 2 and section 6.1, on closed forms",
    title="Algorithm 2 with normalised weights finds the optimal entropy strength within 5 %, from below and from above",
    statement=f"With {', '.join(f'{SAMPLES[c]} ({c})' for c in CLOSED)} fresh pre-trained samples an update, γ = {GAMMA:g}, the forward divergences by self-normalised weights and a gate of 50 effective samples, "
    f"the mean of the last {Plan(1).late} of {Plan(1).updates} strengths is within {NEAR:.0%} of the exact optimum in more than half of all runs: cases B (λ* = 3/5), C (4/3) and E (1), three starts each.".replace("%", r"\%"),
    printed="holds",
    why="Both lower problems have solutions in closed form on the samples, so an update costs no sampling at all. What is left is the noise and the bias of weights, 1 % or less at these sizes, and a bias of order 1/γ.",
    derivation="bilevel.md#estimating-from-data",
    checks=(
        Check(
            "within five per cent",
            "statistical",
            "Does a run end within 5 % of the optimum of the closed form, in more than half of all runs?",
            from_starts(CLOSED),
            Wins(),
            within(CLOSED),
            {
                "the released gradient": within(CLOSED, released=True),
            },
            margin_from=f"a sign test over {RUNS} runs of each start; 5 % was asked for beforehand, {PILOTS}",
        ),
    ),
    figures=lambda context: (paths_figure(shared(context)),),
    tables=lambda context: (runs_table(shared(context), CLOSED),),
)  # fmt: skip


def refusing(name: str = "too small", start: int = 0) -> Pairs:
    """At most one update in twenty is followed, and the strength stays within a quarter of where it was."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        done = course(context, name)
        followed = 1 - done.refused[:, start].mean(0)
        moved = np.abs(done.found[start] / done.path[0, start] - 1)
        return [(np.full(RUNS, 0.05), followed), (np.full(RUNS, STAY), moved)]

    return of


def falling(name: str, starts: tuple[int, int]) -> Pairs:
    """Ends below twice the floor."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.full(RUNS, 2 * FLOOR), course(context, name).found[i]) for i in starts]

    return of


GATE = Claim(
    id="generative-bilevel.tuning-gate",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source="the question of Generative bilevel, Remark 1: an estimate from pre-trained samples",
    title="A gate on the effective sample size refuses, and reports, the updates that pre-trained samples cannot support",
    statement=f"Case C. From λ = 0.5, where the relative effective size is $e^{{-16}}$, a gate of 50 lets at most one update in twenty pass with 4096 samples, and the strength stays within a quarter of where it was. With 16 samples and no gate runs fall to below {2 * FLOOR:g} from 0.9 and from 2, "
    "away from the optimum 4/3 on both sides of it.",
    printed="holds",
    why="A biased gradient looks like any other; the weights tell. The gate errs on the careful side: with 4096 samples the same runs from 0.5 reach the optimum without it (table), because a batch's largest sample still is beyond the best point of r₁. "
    "With 16 it is not. A run that is refused everything has to start from a larger strength.",
    derivation="bilevel.md#estimating-from-data",
    checks=(
        Check(
            "refused",
            "statistical",
            "From λ = 0.5, is at most one update in twenty followed, and does the strength stay within a quarter of where it was, in more than half of all runs?",
            ("updates followed", "change of the strength"),
            Wins(looks=2),
            refusing(),
            {"from λ = 2": refusing("C", 1)},
            margin_from=f"a sign test over {RUNS} runs; {PILOTS}. A first look, at root seed 0, asked for 5 % and was inconclusive: a single update that passes moves the strength by more. This is the second look, and the interval pays for both",
        ),
        Check(
            "why a gate",
            "statistical",
            "With 16 samples and no gate, does a run end below twice the floor, in more than half of all runs?",
            ("from λ = 0.9", "from λ = 2"),
            Wins(),
            falling("too few, no gate", (0, 1)),
            {"4096 samples and the gate": falling("C", (0, 1))},
            margin_from=f"a sign test over {RUNS} runs of each start; {PILOTS}",
        ),
    ),
    tables=lambda context: (gate_table(shared(context)),),
)  # fmt: skip


def tuned_reward(name: str, strength: np.ndarray) -> np.ndarray:
    """E r1 of the exactly tuned model."""
    return np.array([-TUNED[name].value(float(s)) for s in strength])


FALSE_ENDS = ("E", "mixture")


def no_gain(released: bool = True) -> Pairs:
    """The untuned model's reward plus a fifth of what there is to gain, and the tuned model's."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = []
        for name in ("C", *FALSE_ENDS):
            base = TUNED[name].data_reward()
            bar = base + GAIN * (-TUNED[name].value(optimum(TUNED[name])) - base)
            for row in course(context, f"{name}, released" if released else name).found:
                pairs.append((np.full(RUNS, bar), tuned_reward(name, row)))
        return pairs

    return of


def at_floor(released: bool = True) -> Pairs:
    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        done = course(context, "B, released" if released else "B")
        return [(np.full(RUNS, 1.01 * FLOOR), row) for row in done.found]

    return of


RELEASED_RUNS = Claim(
    id="generative-bilevel.released-tuning-runs",
    chapter=CHAPTER,
    paper=PAPER,
    about="code",
    source=f"{RELEASED}, est1, in the same algorithm",
    title="Runs with the released gradient end at its false optimum, where tuning has gained nothing, or at the floor",
    statement="Descent along the released gradient finds the optimal entropy strength.",
    printed="refuted",
    corrected=f"In more than half of all runs, from three starts each: within {NEAR_FALSE:.0%} of the root of the released gradient in case E and on a Gaussian mixture; in case B, where it has none, at the floor {FLOOR:g}; in cases C, E and on the mixture with at most {GAIN:.0%} of the upper reward that there is to gain.".replace("%", r"\%"),
    why="Its root is where the tuned model's upper reward is back at the untuned model's. In case C even that root (0.6636) is out of reach: with 4096 samples, of which half a sample is effective there, runs end lower still, at about 0.5.",
    derivation="bilevel.md#the-released-gradient-the-reverse-divergence",
    checks=(
        Check(
            "false optimum",
            "statistical",
            "Does a run end within 10 % of the root of the released gradient, in more than half of all runs?",
            from_starts(FALSE_ENDS),
            Wins(),
            within(FALSE_ENDS, released=True, share=NEAR_FALSE, false=True),
            {"the right gradient": within(FALSE_ENDS, share=NEAR_FALSE, false=True)},
            printed=within(FALSE_ENDS, released=True, share=NEAR_FALSE),
            margin_from=f"a sign test over {RUNS} runs of each start; {PILOTS}",
        ),
        Check(
            "nothing gained",
            "statistical",
            "Is the upper reward of the exactly tuned model there at most the untuned model's plus a fifth of what there is to gain?",
            from_starts(("C", *FALSE_ENDS)),
            Wins(looks=2),
            no_gain(),
            {"the right gradient": no_gain(released=False)},
            margin_from=f"a sign test over {RUNS} runs of each start; {PILOTS}. A first look, at root seed 0, had half as many samples in case E and a bar of 5 %, and was inconclusive. This is the second look, and the interval pays for both",
        ),
        Check(
            "floor",
            "statistical",
            "In case B, does a run end at the floor?",
            from_starts(("B",)),
            Wins(),
            at_floor(),
            {"the right gradient": at_floor(released=False)},
            margin_from=f"a sign test over {RUNS} runs of each start, within 1 % of the floor; {PILOTS}",
        ),
    ),
    tables=lambda context: (runs_table(shared(context), (*CLOSED, "mixture"), released=True),),
)  # fmt: skip


def paths_figure(context: Context) -> Figure:
    panels = []
    for name in CLOSED:
        ours, theirs = course(context, name).path, course(context, f"{name}, released").path
        x = tuple(map(float, range(len(ours))))
        series = [
            _band(f"forward, {which} start", ours[:, i]) for i, which in enumerate(("lowest", "middle", "highest"))
        ]
        series += [_band(f"released, {which} start", theirs[:, i]) for i, which in ((0, "lowest"), (2, "highest"))]
        series.append(Series("exact optimum", (x[0], x[-1]), (optimum(TUNED[name]),) * 2, style="dashed"))
        if name != "B":
            root = false_optimum(TUNED[name], GAMMA)
            series.append(Series("root of the released gradient", (x[0], x[-1]), (root, root), style="dashed"))
        panels.append(Panel(f"{name}: {REWARDS[name]}", tuple(series)))
    return Figure(
        name="tuning-paths",
        title="The entropy strength during Algorithm 2, N(0,1), with the right gradient and with the released one",
        caption=f"Medians and ranges of {RUNS} runs. From every start the right gradient leads to the exact optimum. The released one leads in E to its own root, in B, where it has none, to the floor, and in C below its root, which the samples do not reach.",
        alt="Three panels over updates. Three curves merge at the dashed optimum; two others fall, to the second dashed line in E, below it in C, and to the bottom in B.",
        kind="panels",
        x_label="update",
        y_label="strength λ",
        y_scale="log",
        panels=tuple(panels),
    )


def _band(label: str, path: np.ndarray) -> Series:
    """The median and range of paths (updates + 1, runs)."""
    x = tuple(map(float, range(len(path))))
    return Series(label, x, tuple(np.median(path, 1)), tuple(path.min(1)), tuple(path.max(1)))


def runs_table(context: Context, names: Sequence[str], released: bool = False) -> Table:
    rows = []
    for name in names:
        case = TUNED[name]
        aim = optimum(case)
        for i, start in enumerate(STARTS[name]):
            found = course(context, f"{name}, released" if released else name).found[i]
            reward = tuned_reward(name, found)
            if released:
                root = "none" if name == "B" else f"{false_optimum(case, GAMMA):.4f}"
                more = (root, f"{reward.mean():.4f}", f"{case.data_reward():.4f}", f"{-case.value(aim):.4f}")
            else:
                more = (f"{100 * np.abs(found / aim - 1).max():.1f}", f"{reward.mean():.5f}", f"{-case.value(aim):.5f}")
            rows.append((name, f"{start:g}", f"{aim:.4f}", f"{found.mean():.4f} ± {found.std(ddof=1):.4f}", *more))
    tail = (
        (Column("its root"), Column("E r₁ there"), Column("untuned"), Column("best"))
        if released
        else (Column("largest error, %"), Column("E r₁ there"), Column("best"))
    )
    which = "the released gradient" if released else "the right gradient"
    return Table(
        name="released-tuning-runs" if released else f"tuning-runs-{'-'.join(names).lower()}",
        title=f"Where runs of Algorithm 2 with {which} end",
        caption=f"Mean ± standard deviation of {RUNS} runs of each start, γ = {GAMMA:g}. E r₁ is that of the exactly tuned model at the strength found.",
        columns=(Column("case", "left"), Column("from λ ="), Column("λ*"), Column("λ found"), *tail),
        rows=tuple(rows),
    )


def gate_table(context: Context) -> Table:
    rows = []
    for name, text, start in (
        ("too small", "4096 samples, gate of 50", 0),
        ("too small, no gate", "4096 samples, no gate", 0),
        ("C", "4096 samples, gate of 50", 0),
        ("C", "4096 samples, gate of 50", 1),
        ("too few, no gate", "16 samples, no gate", 0),
        ("too few, no gate", "16 samples, no gate", 1),
    ):
        done = course(context, name)
        found, refused = done.found[start], done.refused[:, start].sum(0)
        gate = f"{refused.mean():.1f} of {len(done.refused)}" if "no gate" not in name else "–"
        rows.append((text, f"{SETUPS[name].starts[start]:g}", gate, f"{found.mean():.4f} ± {found.std(ddof=1):.4f}"))
    return Table(
        name="tuning-gate",
        title="Case C with and without the gate: where runs end (λ* = 1.3333)",
        caption=f"Mean ± standard deviation of {RUNS} runs; refused updates: mean over runs.",
        columns=(Column("samples", "left"), Column("from λ ="), Column("updates refused"), Column("λ found")),
        rows=tuple(rows),
    )


# --- a mixture in the plane -------------------------------------------------------------------------------------------------

PLANE_STRENGTHS = (0.5, 2.0)
PLANE_PLACES = tuple(f"{what}, λ = {s:g}" for s in PLANE_STRENGTHS for what in ("E r₁", "F'", "KL", "effective share"))


@cache
def plane() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Points of a grid, the data's probabilities there, and both rewards."""
    axis = np.linspace(-5.0, 6.0, 221)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    p = np.exp(MIXTURE.data.log_density(x))
    r1, r2 = (x @ r.linear - 0.5 * np.einsum("ni,ij,nj->n", x, r.quadratic, x) for r in (MIXTURE.upper, MIXTURE.lower))
    return x, p / p.sum(), r1, r2


def by_grid(strength: float, gamma: float | None = None) -> tuple[float, float, float, float]:
    """E r1, Cov / lambda^2, KL, relative effective sample size."""
    _, p, r1, r2 = plane()
    exponent = (r2 if gamma is None else r2 + r1 / gamma) / strength
    w = np.exp(exponent)
    z = float(p @ w)
    q = p * w / z
    mean = float(q @ r1)
    slope = float(q @ ((r1 - mean) * (r2 - q @ r2))) / strength**2
    return mean, slope, float(q @ exponent) - math.log(z), z**2 / float(p @ w**2)


def mixture_numbers(case: MixtureRewardTuning = MIXTURE) -> np.ndarray:
    rows = [(-case.value(s), case.slope(s), case.divergence(s), case.effective_sample_size(s)) for s in PLANE_STRENGTHS]
    return np.array(rows).ravel()


def mixture_wrong(wrong: Literal["weights", "means"]) -> np.ndarray:
    """The same numbers of a tilt with the data's weights, or with the data's components, by the grid."""
    x, p, r1, r2 = plane()
    rows = []
    for s in PLANE_STRENGTHS:
        law = MIXTURE.tilted(s)
        bad = (
            GaussianMixture(MIXTURE.data.weights, law.means, law.covs)
            if wrong == "weights"
            else GaussianMixture(law.weights, MIXTURE.data.means, MIXTURE.data.covs)
        )
        q = np.exp(bad.log_density(x))
        q /= q.sum()
        mean = float(q @ r1)
        slope = float(q @ ((r1 - mean) * (r2 - q @ r2))) / s**2
        kept = p > 1e-280
        distance = float(q[kept] @ np.log(np.maximum(q[kept], 1e-300) / p[kept]))
        rows.append((mean, slope, distance, 1 / float(np.sum(q[kept] ** 2 / p[kept]))))
    return np.array(rows).ravel()


MIXTURE_CLAIM = Claim(
    id="generative-bilevel.tuning-a-mixture",
    chapter=CHAPTER,
    paper=OWN,
    about="own",
    source="the question of Generative bilevel, Algorithm 2, on a mixture in the plane",
    title="On a mixture in the plane the tilt is a mixture in closed form, and Algorithm 2 finds the optimal strength within 5 %",
    statement=r"Quadratic rewards tilt $\sum_k w_k N(m_k, C_k)$ into $\sum_k (w_k Z_k/Z)\, N(M_k, V_k)$, component by component. On three components in the plane the optimum is $\lambda^* = 1.8391$, "
    rf"and Algorithm 2 with {SAMPLES['mixture']} samples an update ends within 5 \% of it from λ = 0.5, 1 and 6 in more than half of all runs.",
    printed="holds",
    why="A product of exponentials of quadratics is one again. Tuning does two things here, it moves the components and it moves their weights; the weights carry most of what goes wrong when λ is too small.",
    derivation="bilevel.md#reward-tuning-gaussian-mixtures",
    checks=(
        equals(
            "closed form",
            "Are mean upper reward, F', divergence and effective size those of sums over a grid of the plane?",
            PLANE_PLACES,
            subject=mixture_numbers,
            reference=lambda: np.array([by_grid(s) for s in PLANE_STRENGTHS]).ravel(),
            controls={
                "the data's weights": lambda: mixture_wrong("weights"),
                "the data's components": lambda: mixture_wrong("means"),
            },
            tolerance=1e-8,
            margin_from="1e-8 of the largest entry: sums over a grid of spacing 0.05",
        ),
        equals(
            "optimum",
            "At the optimum of the closed form, does F' on the grid vanish; and that of the penalty problem at its own?",
            ("F'", "F_γ', γ = 100"),
            subject=lambda: slopes_by_grid(optimum(MIXTURE), optimum(MIXTURE, GAMMA)),
            reference=lambda: np.zeros(2),
            controls={
                "exchanged": lambda: slopes_by_grid(optimum(MIXTURE, GAMMA), optimum(MIXTURE)),
                "the released root": lambda: slopes_by_grid(false_optimum(MIXTURE, GAMMA), false_optimum(MIXTURE, GAMMA)),
            },
        ),
        Check(
            "within five per cent",
            "statistical",
            "Does a run end within 5 % of the optimum, in more than half of all runs?",
            from_starts(("mixture",)),
            Wins(),
            within(("mixture",)),
            {"the released gradient": within(("mixture",), released=True)},
            margin_from=f"a sign test over {RUNS} runs of each start; 5 % was asked for beforehand, {PILOTS}",
        ),
    ),
    figures=lambda context: (clouds_figure(shared(context)),),
    tables=lambda context: (runs_table(shared(context), ("mixture",)),),
)  # fmt: skip


def slopes_by_grid(strength: float, penalty_strength: float) -> np.ndarray:
    divergences = [by_grid(penalty_strength, g)[2] for g in (GAMMA, None)]
    return np.array([by_grid(strength)[1], GAMMA * (divergences[0] - divergences[1])])


SHOWN = 600  # points of a cloud
TOO_SMALL, TOO_LARGE = 0.3, 8.0


def cloud(law: GaussianMixture, stream: Stream) -> np.ndarray:
    generator = stream.generator()
    component = generator.choice(law.weights.size, size=SHOWN, p=law.weights)
    z = generator.standard_normal((SHOWN, 2))
    return law.means[component] + np.einsum("nij,nj->ni", np.linalg.cholesky(law.covs)[component], z)


def clouds_figure(context: Context) -> Figure:
    stream = Stream(context.stream.seed).child("toy", "strength", "clouds")
    found = float(course(context, "mixture").found.mean())
    data = _scatter("pre-trained", cloud(MIXTURE.data, stream.child("data")))
    aim = np.linalg.solve(MIXTURE.upper.quadratic, MIXTURE.upper.linear)[None]
    panels = []
    for text, strength in (("too small", TOO_SMALL), ("as found", found), ("too large", TOO_LARGE)):
        tuned = _scatter("tuned", cloud(MIXTURE.tilted(strength), stream.child(text)))
        reward = -MIXTURE.value(strength)
        title = f"{text}, λ = {strength:.3g}: E r₁ = {reward:.2f}"
        panels.append(Panel(title, (data, tuned, _scatter("maximum of r₁", aim))))
    return Figure(
        name="tuning-clouds",
        title="Samples of the tuned model at three strengths, over those of the pre-trained one",
        caption=f"{SHOWN} points each, from the exact laws. r₂ = 1.5x − |x|²/10 asks for the right; r₁ falls with the distance from (0.8, 0.8), and is {MIXTURE.data_reward():.2f} without tuning. Too small a strength leaves one component alone and pushes it out; too large a one leaves the model as it was.",
        alt="Three scatter plots. At the smallest strength all tuned points lie at the right component, beyond it; at the one found they share out over all three components; at the largest they cover the pre-trained cloud.",
        kind="panels",
        x_label="x₁",
        y_label="x₂",
        panels=tuple(panels),
    )


def _scatter(label: str, x: np.ndarray) -> Series:
    return Series(label, tuple(map(float, x[:, 0])), tuple(map(float, x[:, 1])), style="points")


CLAIMS: tuple[Claim, ...] = (
    TILTS,
    DIVERGENCE,
    HYPERGRADIENT,
    DOMAIN,
    LINEAR,
    ESTIMATE,
    FOUND,
    GATE,
    MIXTURE_CLAIM,
    RELEASED_GRADIENT,
    SCORER,
    RELEASED_RUNS,
)
