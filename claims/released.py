"""Chapter *Estimators*, continued: what released code computes, and what it should."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from algorithms import credit as credits
from algorithms import estimators as named
from algorithms.baselines import Baseline, LeaveOneOut
from algorithms.chain import rollout
from algorithms.credit import Credit
from algorithms.estimators import Estimator, with_baseline
from claims.claim import Claim
from claims.judges import Sampler, equals, has_mean
from claims.problems import (
    CHAPTER,
    FROM_ADDITIVE,
    MARGIN_ADDITIVE,
    THETA,
    additive,
    exact_mean,
    gradient_of,
    lazily,
    sampled,
    scaled,
    step_gradients_of,
)
from theory import chains, variance
from toy.experiments import Block, generator, gradients
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis
from verdicts.streams import Stream

ALIGN_LAW = np.array([0.4, 0.3, 0.2, 0.1])


def inclusion_mean(law: np.ndarray) -> np.ndarray:
    """Mean of the randomly truncated estimate on LG1 from the theory room: sum over t of P(K >= t) g_t."""
    return variance.truncated_mean(step_gradients_of(additive()), np.concatenate([[0.0], law]))


RANDOM_TRUNCATION = Claim(
    id="estimators.random-truncation",
    chapter=CHAPTER,
    paper="AlignProp code",
    about="code",
    source="AlignProp, randomised truncation; an option in RLR's and VADER's code, whose default keeps the last step only",
    title="Random truncation is biased until each step is divided by its inclusion probability",
    statement=r"As released: back-propagate through a random number $K$ of last steps, every reached step with weight one.",
    printed="holds-corrected",
    corrected=r"Its mean is $\sum_t P(K \ge t)\,g_t$. Dividing step $t$ by $P(K \ge t)$ makes it unbiased, provided "
    r"$P(K \ge T) > 0$.",
    why="Early steps are reached rarely, so they are under-paid. AlignProp's own law is redrawn until K < T: it never reaches the "
    "first step and cannot be debiased.",
    derivation="variance.md#random-truncation",
    checks=(
        equals(
            "exact mean of the debiased form",
            "Is the exact mean of the debiased form the gradient?",
            THETA,
            subject=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW, debiased=True)),
            reference=lambda: gradient_of(additive()),
            printed=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW)),
            controls={"divided by P(K = t)": lambda: exact_mean(additive(), _divided_by_mass())},
        ),
        equals(
            "exact mean of the released form",
            "Is the exact mean of plain random truncation the sum of P(K ≥ t) g_t?",
            THETA,
            subject=lambda: exact_mean(additive(), credits.random_truncation(ALIGN_LAW)),
            reference=lambda: inclusion_mean(ALIGN_LAW),
            controls={"P(K > t) in place of P(K ≥ t)": lambda: np.append(ALIGN_LAW[::-1].cumsum()[::-1][1:], 0.0) @ step_gradients_of(additive())},
        ),
        has_mean(
            "sampled mean of the debiased form",
            "Does the sampled debiased form have the exact gradient as its mean?",
            THETA,
            subject=lazily(lambda: sampled(additive(), named.random_truncation(ALIGN_LAW, debiased=True))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE / 5,
            margin_from="0.01, 1 % of |∇J| = 1.19 on this chain; declared before sampling",
            kurtosis=kurtosis(1, rarest=0.1),
            printed=lazily(lambda: sampled(additive(), named.random_truncation(ALIGN_LAW))),
            controls={"divided by P(K = t)": lazily(lambda: sampled(additive(), Estimator("m", _divided_by_mass())))},
        ),
    ),
)  # fmt: skip


def _divided_by_mass() -> Credit:
    plain = credits.random_truncation(ALIGN_LAW)
    return Credit(plain.matrices / ALIGN_LAW[:, None], plain.probabilities)


DIRECT = 1.2  # the scheduler's own slope on x_t; the network supplies the rest of the step's matrix


def kept() -> np.ndarray:
    """P(K >= t) for t = 1..4: how often step t's network output keeps its graph."""
    return ALIGN_LAW[::-1].cumsum()[::-1]


def _split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Direct slopes, network slopes, network inputs of LG1, and the mean costate at x_0."""
    chain, reward = additive().exact_chain, additive().exact_reward
    direct = np.tile(DIRECT * np.eye(2), (4, 1, 1))
    means, _ = chains.marginals(chain)
    return direct, chain.A - direct, chain.B, reward.linear + reward.quadratic @ means[0]


def per_step_mean() -> np.ndarray:
    return variance.independent_truncation_parts(*_split(), kept()).sum(0)


def enumerated_mean(keep: np.ndarray) -> np.ndarray:
    """The same by going through all 16 patterns of cuts, each with its probability and its own product of Jacobians."""
    direct, network, inputs, costate = _split()
    total = np.zeros(2)
    for pattern in itertools.product((0, 1), repeat=4):
        probability = np.prod([q if bit else 1 - q for bit, q in zip(pattern, keep, strict=True)])
        z = costate
        for t, bit in enumerate(pattern):
            total += probability * bit * inputs[t].T @ z
            z = (direct[t] + bit * network[t]).T @ z
    return total


def cut_per_step(once: bool = False, size: int = 1 << 15) -> Sampler:
    """Gradients by plain autograd when network outputs are detached at random, step by step or once per trajectory."""
    problem = additive()
    chain, theta = problem.chain, problem.params["theta"]

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            source = generator(stream, index)
            noise = named.first_order(4).draw(chain, problem.params, size, source)
            leaf = theta.expand(size, 2).clone().requires_grad_()
            uniform = torch.rand(1 if once else 4, size, 1, generator=source, dtype=torch.float64).expand(4, size, 1)
            x = chain.initial(noise.initial)
            for t in range(4, 0, -1):
                full = x @ chain.slope[t - 1].T + leaf @ chain.push[t - 1].T + chain.offset[t - 1]
                output = full - DIRECT * x
                output = torch.where(uniform[t - 1] < kept()[t - 1], output, output.detach())
                x = DIRECT * x + output + chain.std(t) * noise.steps[t - 1]
            (gradient,) = torch.autograd.grad(problem.objective.reward(x, None).sum(), leaf)
            return gradient.numpy()

        return block

    return sampler


def once_mean() -> np.ndarray:
    """Mean when one draw per trajectory decides: the steps up to K keep their graph, the others are cut."""
    direct, network, inputs, costate = _split()
    total, z = np.zeros(2), costate
    for t in range(4):
        total += kept()[t] * inputs[t].T @ z
        z = (direct[t] + network[t]).T @ z
    return total


PER_STEP_TRUNCATION = Claim(
    id="estimators.truncation-per-step",
    chapter=CHAPTER,
    paper="TRL code",
    about="code",
    source="TRL ≤ 0.23, alignprop pipeline step in modeling_sd_base",
    title="Drawing the truncation step inside the denoising loop is not randomised truncation",
    statement="At every denoising step a fresh random step is drawn and the network's output detached before it: "
    "randomised truncation, as one draw per trajectory would be.",
    printed="holds-corrected",
    corrected=(
        r"With $q_t$ the probability that step $t$'s output is kept, $r_t$ the scheduler's direct slope over the whole "
        r"slope (in one dimension), the share of $g_t$ is $q_t \prod_{s<t} (r_s + q_s (1 - r_s))$; one draw per trajectory "
        r"gives $q_t$. Dividing by $q_t$ does not debias it."
    ),
    why="Cuts at independent steps thin out every path through the networks, but the scheduler's direct path is never cut: "
    "where the network contracts, the direct path alone is steeper than the whole, and early steps are paid more than one draw per trajectory would pay them.",
    derivation="variance.md#random-truncation",
    checks=(
        equals(
            "exact mean",
            "Is the closed mean on the additive chain that of going through all 16 patterns of cuts?",
            THETA,
            subject=per_step_mean,
            reference=lambda: enumerated_mean(kept()),
            printed=once_mean,
            controls={"kept with P(K > t)": lambda: enumerated_mean(np.append(kept()[1:], 0.0))},
        ),
        has_mean(
            "sampled mean",
            "Do gradients by plain autograd, with outputs detached step by step, have the closed mean?",
            THETA,
            subject=lazily(cut_per_step),
            reference=per_step_mean,
            margin=MARGIN_ADDITIVE / 5,
            margin_from="0.01, 1 % of |∇J| = 1.19 on this chain; declared before sampling",
            # Linear in the Gaussians given the cuts; the rarest pattern has probability 0.012.
            kurtosis=kurtosis(1, rarest=0.012),
            printed=lazily(lambda: cut_per_step(once=True)),
            controls={"no cut": lazily(lambda: sampled(additive(), named.first_order(4)))},
        ),
    ),
)

# --- baselines, released losses, running costs -------------------------------------------------------------------

GROUP = 4


@dataclass(frozen=True)
class SelfIncluded:
    """Planted error, and what released code does: the group's mean return, the sample's own included."""

    group: int

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        grouped = returns.reshape(-1, self.group)
        return grouped.mean(1, keepdim=True).expand_as(grouped).flatten()


@dataclass(frozen=True)
class PeeksAhead:
    """Planted error: a baseline that depends on the very noise it is paired with."""

    def __call__(self, returns: Tensor, x: Tensor, k: int) -> Tensor:
        return 0.5 * returns


def with_group_baseline(baseline: Baseline) -> Sampler:
    problem = additive()
    estimator = with_baseline(named.policy_gradient(4), baseline)
    return gradients(problem.chain, problem.params, problem.objective, estimator, group=GROUP)


BASELINE = Claim(
    id="estimators.baseline-self-included",
    chapter=CHAPTER,
    paper="DDPO code",
    about="code",
    source="ddpo-pytorch and TRL ≤ 0.23, advantage normalisation",
    title="A batch-mean baseline that includes the sample itself shrinks the policy gradient by 1 - 1/N",
    statement=r"Subtracting the mean reward of the batch, or of the prompt's group of $N$ samples, leaves the policy "
    "gradient unbiased.",
    printed="holds-corrected",
    corrected=r"Its mean is $(1 - \tfrac{1}{N})\,\nabla J$; the mean of the *other* samples leaves it unbiased.",
    why="The sample's own reward in the mean is correlated with its own score: it takes 1/N of the gradient away (0.4 % at N = 256, "
    "a half for pairs). The released code also divides by the standard deviation, which is another matter: that estimate is no "
    "multiple of an unbiased one.",
    derivation="variance.md#self-included-baseline",
    checks=(
        has_mean(
            "leave-one-out",
            f"Does the policy gradient with leave-one-out means of groups of {GROUP} have the exact mean?",
            THETA,
            subject=lazily(lambda: with_group_baseline(LeaveOneOut(GROUP))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            printed=lazily(lambda: with_group_baseline(SelfIncluded(GROUP))),
            controls={"a baseline that sees the noise": lazily(lambda: with_group_baseline(PeeksAhead()))},
        ),
        has_mean(
            "self-included",
            f"Does the self-included mean of groups of {GROUP} give 1 - 1/{GROUP} of the exact gradient?",
            THETA,
            subject=lazily(lambda: with_group_baseline(SelfIncluded(GROUP))),
            reference=lambda: variance.self_included_baseline_factor(GROUP) * gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            controls={"leave-one-out": lazily(lambda: with_group_baseline(LeaveOneOut(GROUP)))},
        ),
    ),
)


def by_log_prob(weigh: Callable[[Tensor], Tensor], size: int = 1 << 14) -> Sampler:
    """Return times the gradient of the steps' log-probabilities by autograd, as released losses compute it.

    `weigh` turns a step's log-densities of the coordinates, (1, d), into its log-probability.
    """
    problem = additive()
    chain = problem.chain

    def log_prob(theta: Tensor, path: Tensor) -> Tensor:
        total = torch.zeros((), dtype=theta.dtype)
        for t in range(1, chain.steps + 1):
            z = (path[t - 1] - chain.mean({"theta": theta}, path[t][None], t, None)) / chain.std(t)
            total = total + weigh(-0.5 * z.square())
        return total

    def sampler(stream: Stream) -> Block:
        def block(index: int) -> np.ndarray:
            noise = named.policy_gradient(4).draw(chain, problem.params, size, generator(stream, index))
            latents = rollout(chain, problem.params, noise).latents.transpose(0, 1)
            scores = torch.func.vmap(torch.func.grad(log_prob), in_dims=(None, 0))(problem.params["theta"], latents)
            returns = problem.objective.reward(latents[:, 0], None)
            return (returns[:, None] * scores).numpy()

        return block

    return sampler


LOG_PROB_MEAN = Claim(
    id="estimators.log-prob-sum",
    chapter=CHAPTER,
    paper="DDPO code",
    about="code",
    source="ddpo-pytorch, ddim_with_logprob; TRL ≤ 0.23, modeling_sd_base; RLR's code inherits TRL's",
    title="Log-probabilities averaged over dimensions give 1/d of the policy gradient",
    statement=r"The step's log-probability is the *mean* over the latent's $d$ coordinates of the Gaussian "
    "log-densities.",
    printed="holds-corrected",
    corrected=r"It is their *sum*. The mean scales the gradient by $1/d$ ($d = 16384$ for Stable Diffusion at 512 "
    r"pixels) and, to first order, a clip range on its ratio by $d$.",
    why="Adam's steps do not see a constant factor; the step size of plain gradient ascent, norm clipping, ratio clipping and "
    "mixtures with other terms (first order, KL) do.",
    derivation="credit-matrix.md#the-backward-sweep",
    checks=(
        has_mean(
            "sampled mean",
            "Do returns times autograd's gradients of the summed log-densities have the exact gradient as their mean (d = 2)?",
            THETA,
            subject=lazily(lambda: by_log_prob(lambda densities: densities.sum())),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            printed=lazily(lambda: by_log_prob(lambda densities: densities.mean())),
            controls={
                "first coordinate left out": lazily(lambda: by_log_prob(lambda densities: densities[0, 1])),
                "sign of the exponent dropped": lazily(lambda: by_log_prob(lambda densities: -densities.sum())),
            },
        ),
        has_mean(
            "sampled mean, the sweep",
            "Does the credit matrix of the policy gradient have the same mean?",
            THETA,
            subject=lazily(lambda: sampled(additive(), named.policy_gradient(4))),
            reference=lambda: gradient_of(additive()),
            margin=MARGIN_ADDITIVE,
            margin_from=FROM_ADDITIVE,
            kurtosis=kurtosis(3),
            controls={
                "sign flipped": lazily(
                    lambda: sampled(additive(), Estimator("-", scaled(credits.policy_gradient(4), -1)))
                )
            },
        ),
    ),
)


CLAIMS: tuple[Claim, ...] = (RANDOM_TRUNCATION, PER_STEP_TRUNCATION, BASELINE, LOG_PROB_MEAN)
