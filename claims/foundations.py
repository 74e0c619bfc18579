"""Chapter *Foundations*: denoising diffusion on data with closed forms, where every sampler's error is a number."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from algorithms.chain import Params
from algorithms.estimators import first_order
from claims.claim import Claim, Context
from claims.judges import Sampler, at_least, equals, has_mean
from claims.records import Figure, Series
from theory import ddpm, gaussian, schedules
from theory.gaussian import Gaussian
from theory.mixture import GaussianMixture
from theory.schedules import NoiseSchedule
from toy.experiments import mapped, statistics
from toy.mixture_chain import MixtureChain
from toy.paths import path_log_ratio
from verdicts.means import gaussian_polynomial_kurtosis as kurtosis

CHAPTER = "Foundations"
Variance = Literal["beta", "posterior", "optimal"]
MEAN, VARIANCE, STEPS = 1.0, 0.25, 20
CASES = ((0.25, 1.0), (4.0, -0.5))  # (s^2, m)


@cache
def schedule(steps: int = STEPS) -> NoiseSchedule:
    """The variance-preserving schedule of the exact studies."""
    return schedules.vp_linear(steps)


def data(variance: float = VARIANCE, mean: float = MEAN) -> Gaussian:
    return Gaussian.scalar(mean, variance)


@cache
def gaussian_chain(steps: int = STEPS) -> tuple[MixtureChain, Params]:
    """The torch sampler with the exact score of N(1, 1/4), step variance beta, no control."""
    law = GaussianMixture([1.0], [[MEAN]], [[[VARIANCE]]])
    chain = MixtureChain.of(law, schedule(steps))
    return chain, chain.parameters()


# --- the posterior mean ------------------------------------------------------------------------------------------

BETAS = np.array([0.1, 0.3, 0.2])


def printed_coefficients(shift: int) -> np.ndarray:
    """Coefficients of x_0 at t = 2, 3 with beta_{t - shift} in the numerator."""
    s = NoiseSchedule(BETAS)
    t = np.array([2, 3])
    return np.sqrt(s.alpha_bar[t - 2]) * s.beta[t - 1 - shift] / (1 - s.alpha_bar[t - 1])


def conditioned_coefficients() -> np.ndarray:
    """The same by conditioning the joint Gaussian of (x_0, x_{t-1}, x_t): the mean's change with x_0."""
    rows = []
    for t in (2, 3):
        a = np.sqrt(NoiseSchedule(BETAS).alpha_bar[t - 2])
        step = math.sqrt(1 - BETAS[t - 1])
        before = np.array([a, math.sqrt(1 - a**2), 0.0])  # of (x_0, noise so far, noise of step t)
        joint = np.stack([[1.0, 0, 0], before, step * before + [0, 0, math.sqrt(BETAS[t - 1])]])
        law = gaussian.affine(Gaussian(np.zeros(3), np.eye(3)), joint, np.zeros(3))
        rows.append(gaussian.condition(law, [0, 2], [1.0, 0.0]).mean[0])
    return np.array(rows)


POSTERIOR_MEAN = Claim(
    id="foundations.posterior-mean",
    chapter=CHAPTER,
    paper="SFT-PG",
    source="SFT-PG, eq. (2)",
    title="The posterior mean's coefficient of x₀ carries the wrong β",
    statement=r"$\tilde\mu_{t+1}(x_{t+1}, x_0) = \frac{\sqrt{\bar\alpha_t}\,\beta_t}{1 - \bar\alpha_{t+1}}\,x_0 + "
    r"\frac{\sqrt{\alpha_{t+1}}\,(1 - \bar\alpha_t)}{1 - \bar\alpha_{t+1}}\,x_{t+1}$, with $\alpha_{t+1} = 1 - "
    r"\beta_{t+1}$.",
    printed="holds-corrected",
    corrected=r"The numerator of the first coefficient is $\sqrt{\bar\alpha_t}\,\beta_{t+1}$.",
    why=r"The noise between $x_t$ and $x_{t+1}$ has variance $\beta_{t+1}$ under the paper's own definition of $\alpha$. For a "
    r"constant schedule the slip is invisible. With $\beta_t$ as in eq. (1) the numerator is right and $\alpha_{t+1} = 1 - "
    r"\beta_{t+1}$ is the slip: either way (1) and (2) do not agree.",
    derivation="ddpm.md#the-posterior-mean",
    checks=(
        equals(
            "coefficient of x₀",
            "For beta = (0.1, 0.3, 0.2), is the coefficient that of conditioning the joint Gaussian?",
            ("t = 1", "t = 2"),
            subject=lambda: ddpm.ddpm_posterior_mean_coefficients(NoiseSchedule(BETAS))[0][1:],
            reference=conditioned_coefficients,
            printed=lambda: printed_coefficients(1),
            controls={
                "coefficient of the other variable": lambda: ddpm.ddpm_posterior_mean_coefficients(
                    NoiseSchedule(BETAS)
                )[1][1:]
            },
        ),
    ),
)

# --- choice of the reverse variance ------------------------------------------------------------------------------


def output_gap(variance: float, choice: Variance, steps: int = 200) -> float:
    """Output variance of ancestral sampling less the data's, without the prior's share (alpha_bar_T is 4e-5)."""
    return float(ddpm.ancestral_law(data(variance, 0.0), schedule(steps), choice).cov[0, 0]) - variance


def ratio_to_exact(variance: float, choice: Variance) -> np.ndarray:
    """Chosen over exact reverse variance at steps 2, 7 and 20."""
    chosen = ddpm.ancestral_steps([variance], schedule(), choice)[1][:, 0]
    exact = ddpm.ancestral_steps([variance], schedule(), "optimal")[1][:, 0]
    return (chosen / exact)[[1, 6, 19]]


def neighbour_variance(variance: float, t: int) -> float:
    """Var(x_{t-1} | x_t) by conditioning the joint Gaussian of (x_{t-1}, x_t)."""
    before = float(schedule().alpha_bar_previous[t - 1]) * (variance - 1) + 1
    beta = float(schedule().beta[t - 1])
    joint = gaussian.affine(
        Gaussian(np.zeros(2), np.diag([before, beta])), [[1.0, 0.0], [math.sqrt(1 - beta), 1.0]], np.zeros(2)
    )
    return float(gaussian.condition(joint, [1], [0.0]).cov[0, 0])


VARIANCE_CHOICE = Claim(
    id="foundations.reverse-variance",
    chapter=CHAPTER,
    paper="DDPM",
    source="Ho et al. 2020, section 3.2; SFT-PG, after eq. (3)",
    title="Step variance beta is exact for unit-variance data, beta-tilde for a point mass, neither in between",
    statement=r"$\sigma_t^2 = \beta_t$ is optimal for $x_0 \sim \mathcal{N}(0, I)$ and $\sigma_t^2 = \tilde\beta_t$ for "
    r"$x_0$ deterministically set to one point; for $\mathcal{N}(m, s^2)$ the exact reverse variance is "
    r"$\beta_t D_{t-1} / D_t$, $D_t = \bar\alpha_t s^2 + 1 - \bar\alpha_t$.",
    printed="holds",
    why="The reverse kernel's variance interpolates between the two as s goes from 0 to 1, and exceeds beta beyond.",
    derivation="ddpm.md#ancestral-sampling",
    checks=(
        equals(
            "ratio to the exact variance",
            "Is beta over the exact variance one at s = 1, and beta-tilde over it one as s → 0, at t = 2, 7, 20?",
            tuple(f"{name}, t = {t}" for name in ("beta, s = 1", "beta-tilde, s = 1e-8") for t in (2, 7, 20)),
            subject=lambda: np.concatenate([ratio_to_exact(1.0, "beta"), ratio_to_exact(1e-16, "posterior")]),
            reference=lambda: np.ones(6),
            controls={
                "choices swapped": lambda: np.concatenate(
                    [ratio_to_exact(1.0, "posterior"), ratio_to_exact(1e-16, "beta")]
                ),
                "s² = 1/4 for both": lambda: np.concatenate(
                    [ratio_to_exact(0.25, "beta"), ratio_to_exact(0.25, "posterior")]
                ),
            },
        ),
        equals(
            "the exact variance",
            r"Is $\beta_t D_{t-1} / D_t$ the conditional variance from the joint law of two neighbouring states?",
            tuple(f"s² = {v:g}, t = {t}" for v, _ in CASES for t in (2, 7, 20)),
            subject=lambda: np.concatenate(
                [ddpm.ancestral_steps([v], schedule(), "optimal")[1][[1, 6, 19], 0] for v, _ in CASES]
            ),
            reference=lambda: np.array([neighbour_variance(v, t) for v, _ in CASES for t in (2, 7, 20)]),
            controls={
                "beta": lambda: np.concatenate(
                    [ddpm.ancestral_steps([v], schedule(), "beta")[1][[1, 6, 19], 0] for v, _ in CASES]
                ),
            },
        ),
    ),
    figures=lambda context: (_variance_figure(),),
)


def _variance_figure() -> Figure:
    steps = np.unique(np.geomspace(20, 5000, 24).astype(int))
    choices: tuple[Variance, ...] = ("beta", "posterior")
    series = tuple(
        Series(
            f"{'beta' if choice == 'beta' else 'beta-tilde'}, s² = {variance:g}",
            tuple(map(float, steps)),
            tuple(abs(output_gap(variance, choice, int(n))) / variance for n in steps),
            style="line" if choice == "beta" else "dashed",
        )
        for choice in choices
        for variance in (0.25, 4.0)
    )
    return Figure(
        name="variance-error",
        title="Error of the sampled variance against the number of steps",
        caption="Relative error of the output variance with the exact score. It falls like 1/T for beta; for "
        "beta-tilde more slowly, like log T / T, and with the other sign for s < 1.",
        alt="Four descending curves, nearly straight on logarithmic axes, relative error against number of steps.",
        x_label="steps T",
        y_label="|V - s²| / s²",
        x_scale="log",
        y_scale="log",
        series=series,
    )


def moments_of(change: str = "") -> Sampler:
    """Sampled (x_0, x_0^2) of the torch sampler, or of a planted error of it."""
    chain, params = gaussian_chain()
    if change == "wrong score":
        chain = MixtureChain.of(GaussianMixture([1.0], [[MEAN]], [[[1.4 * VARIANCE]]]), schedule())
    if change == "control left on":
        params = {**params, "bias": torch.full((1,), 0.05, dtype=torch.float64)}
    return statistics(chain, params, first_order(STEPS), lambda x: torch.cat([x, x**2], 1))


def exact_moments(choice: Variance = "beta") -> np.ndarray:
    law = ddpm.ancestral_law(data(), schedule(), choice)
    return np.array([law.mean[0], law.cov[0, 0] + law.mean[0] ** 2])


ANCESTRAL_LAW = Claim(
    id="foundations.ancestral-law",
    chapter=CHAPTER,
    paper="DDPM",
    source="Ho et al. 2020, Algorithm 2; Generative bilevel, eqs. (23)-(25)",
    title="The exact law of ancestral sampling with the exact score",
    statement=r"On $\mathcal{N}(m, s^2)$ ancestral sampling is the Gaussian recursion with slopes $\sqrt{\alpha_t}\,"
    r"D_{t-1}/D_t$: its output law is known in closed form for every $T$ and every choice of step variance.",
    printed="holds",
    why="The exact score of a Gaussian is linear; a linear recursion of Gaussians stays Gaussian.",
    derivation="ddpm.md#ancestral-sampling",
    checks=(
        has_mean(
            "simulated moments",
            "Do samples of the torch sampler (T = 20, beta) have the exact first and second moments?",
            ("E x", "E x²"),
            subject=lambda stream: moments_of()(stream),
            reference=exact_moments,
            margin=0.005,
            margin_from="0.005, a tenth of the discretisation's own error of the variance (0.049); declared beforehand",
            kurtosis=kurtosis(2),
            controls={
                "score of data with 1.4 times the variance": lambda stream: moments_of("wrong score")(stream),
                "a control of 0.05 left on": lambda stream: moments_of("control left on")(stream),
            },
        ),
        equals(
            "brute force",
            "Is the closed recursion the law that composing 20 affine maps gives, for both data laws?",
            tuple(f"{what}, s² = {v:g}" for v, _ in CASES for what in ("mean", "variance")),
            subject=lambda: np.concatenate([_law_numbers(ddpm.ancestral_law(data(v, m), schedule())) for v, m in CASES]),
            reference=lambda: np.concatenate([_law_numbers(_composed(v, m)) for v, m in CASES]),
            controls={
                "no noise at the last step": lambda: np.concatenate(
                    [_law_numbers(_composed(v, m, last_noise=0.0)) for v, m in CASES]
                ),
                "posterior variance": lambda: np.concatenate(
                    [_law_numbers(ddpm.ancestral_law(data(v, m), schedule(), "posterior")) for v, m in CASES]
                ),
            },
        ),
    ),
    figures=lambda context: (law_figure(context),),
)  # fmt: skip


def _law_numbers(law: Gaussian) -> np.ndarray:
    return np.array([law.mean[0], law.cov[0, 0]])


def reverse_step(s: NoiseSchedule, t: int, variance: float, mean: float) -> tuple[float, float]:
    """Slope and offset of (x + beta score(x)) / sqrt(1 - beta), score(x) = -(x - sqrt(alpha_bar) m) / D."""
    beta, alpha_bar = float(s.beta[t - 1]), float(s.alpha_bar[t - 1])
    marginal = alpha_bar * variance + 1 - alpha_bar
    root = math.sqrt(1 - beta)
    return (1 - beta / marginal) / root, beta * math.sqrt(alpha_bar) * mean / marginal / root


def _composed(variance: float, mean: float, last_noise: float = 1.0) -> Gaussian:
    """Push N(0, 1) through the reverse steps one affine map at a time, from the score's definition."""
    s, law = schedule(), Gaussian.scalar(0.0, 1.0)
    for t in range(s.steps, 0, -1):
        slope, offset = reverse_step(s, t, variance, mean)
        noise = s.beta[t - 1] * (last_noise if t == 1 else 1.0)
        law = gaussian.affine(law, [[slope]], [offset], [[noise]])
    return law


def law_figure(context: Context) -> Figure:
    """Histogram of simulated samples beside the exact densities of the sampler's output and of the data."""
    chain, params = gaussian_chain()
    block = statistics(chain, params, first_order(STEPS), lambda x: x, size=1 << 16)(context.stream)
    heights, edges = np.histogram(block(0)[:, 0], bins=48, range=(-1.5, 3.5), density=True)
    x = np.linspace(-1.5, 3.5, 121)

    def density(mean: float, variance: float) -> tuple[float, ...]:
        values = np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        return tuple(values.tolist())

    law = ddpm.ancestral_law(data(), schedule())
    return Figure(
        name="exact-and-simulated-law",
        title="Exact and simulated law of a 20-step sampler",
        caption="Samples of the torch sampler (bars, 65 536) follow the exact output law (solid), which is wider than the data "
        "(dashed): variance 0.299 against 0.25. The error is the discretisation's, and known.",
        alt="A bell-shaped histogram with a solid curve on top of it and a slightly narrower dashed curve, all centred at one.",
        x_label="x₀",
        y_label="density",
        series=(
            Series(
                "simulated", tuple((0.5 * (edges[1:] + edges[:-1])).tolist()), tuple(heights.tolist()), style="bars"
            ),
            Series("exact output law", tuple(x.tolist()), density(float(law.mean[0]), float(law.cov[0, 0]))),
            Series("data", tuple(x.tolist()), density(MEAN, VARIANCE), style="dashed"),
        ),
    )


# --- path KL -----------------------------------------------------------------------------------------------------


@cache
def short_schedule() -> NoiseSchedule:
    """Ten steps that stop early (alpha_bar_T = 0.31), so that the prior term is not negligible."""
    return schedules.linear(10, 0.02, 0.2)


def joint_laws(variance: float, mean: float) -> tuple[Gaussian, Gaussian]:
    """Joint Gaussians of all T + 1 states on the short schedule, forward and reverse, by matrices."""
    s = short_schedule()
    steps = s.steps
    forward = np.zeros((steps + 1, steps + 1))  # x_t from (x_0, noises)
    forward[0, 0] = math.sqrt(variance)
    for t in range(1, steps + 1):
        forward[t] = math.sqrt(1 - s.beta[t - 1]) * forward[t - 1]
        forward[t, t] = math.sqrt(s.beta[t - 1])
    means = mean * np.sqrt(np.concatenate([[1.0], s.alpha_bar]))
    reverse, centre = np.zeros((steps + 1, steps + 1)), np.zeros(steps + 1)
    reverse[steps, steps] = 1.0
    for t in range(steps, 0, -1):
        slope, offset = reverse_step(s, t, variance, mean)
        reverse[t - 1] = slope * reverse[t]
        reverse[t - 1, t - 1] = math.sqrt(s.beta[t - 1])
        centre[t - 1] = slope * centre[t] + offset
    return Gaussian(means, forward @ forward.T), Gaussian(centre, reverse @ reverse.T)


def decomposed_kl(variance: float, mean: float, drop: str = "") -> float:
    """The closed decomposition on the short schedule, whole or with a part left out."""
    path = ddpm.path_kl(data(variance, mean), short_schedule())
    return {"": path.total, "prior": float(path.steps.sum()), "step 1": path.total - float(path.steps[0])}[drop]


def path_total(variance: float, mean: float) -> float:
    return ddpm.path_kl(data(variance, mean), schedule()).total


def marginal_kl(variance: float, mean: float, steps: int = STEPS, choice: Variance = "beta") -> float:
    return gaussian.kl(data(variance, mean), ddpm.ancestral_law(data(variance, mean), schedule(steps), choice))


def log_ratios(change: str = "") -> Sampler:
    """Sampled log-likelihood ratios of forward against sampler paths, from step densities of the torch chain."""
    if change == "control left on":
        chain, params = gaussian_chain()
        return path_log_ratio(chain, {**params, "bias": torch.full((1,), 0.1).double()}, schedule(), MEAN, VARIANCE)
    sampler = path_log_ratio(*gaussian_chain(), schedule(), MEAN, VARIANCE)
    return mapped(sampler, lambda r: 2 * r) if change == "counted twice" else sampler


PATH_KL = Claim(
    id="foundations.path-kl",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md; the exact form of Ho et al. 2020, eq. (5), on Gaussian data",
    title="The path KL is a prior term plus one variance term per step, and bounds the marginal KL",
    statement=(
        r"$\mathrm{KL}(q_{0:T} \,\|\, p_{0:T}) = \tfrac12(D_T - 1 - \log D_T + \bar\alpha_T m^2) + \sum_t \tfrac12 (r_t - "
        r"1 - \log r_t)$, $r_t$ the exact over the chosen reverse variance, and $\mathrm{KL}(q_{0:T} \,\|\, p_{0:T}) "
        r"\ge \mathrm{KL}(q_0 \,\|\, p_0)$."
    ),
    printed="holds",
    why="With the exact score the step means agree for every state, so only variances remain; forgetting the path cannot "
    "increase a divergence.",
    derivation="ddpm.md#the-path-kl",
    checks=(
        equals(
            "against joint Gaussians",
            "Is the decomposition the KL of the joint laws of all 11 states, built by matrices?",
            tuple(f"s² = {v:g}, m = {m:g}" for v, m in CASES),
            subject=lambda: np.array([decomposed_kl(v, m) for v, m in CASES]),
            reference=lambda: np.array([gaussian.kl(*joint_laws(v, m)) for v, m in CASES]),
            controls={
                "prior term dropped": lambda: np.array([decomposed_kl(v, m, "prior") for v, m in CASES]),
                "step 1 dropped": lambda: np.array([decomposed_kl(v, m, "step 1") for v, m in CASES]),
            },
        ),
        at_least(
            "path above marginal",
            "Is the path KL at least the marginal KL of the output, for T = 20, 100, 1000?",
            tuple(f"s² = {v:g}, T = {n}" for v, _ in CASES for n in (20, 100, 1000)),
            subject=lambda: _path_and_marginal(),
            controls={"order reversed": lambda: _path_and_marginal()[::-1]},
        ),
        has_mean(
            "sampled log-likelihood ratio",
            "Is the mean log-likelihood ratio along simulated forward paths the exact path KL (0.0543)?",
            ("path KL",),
            subject=lambda stream: log_ratios()(stream),
            reference=lambda: np.array([path_total(VARIANCE, MEAN)]),
            margin=0.005,
            margin_from="0.005, 9 % of the path KL; declared before sampling",
            kurtosis=kurtosis(2),
            controls={
                "counted twice": lambda stream: log_ratios("counted twice")(stream),
                "a control of 0.1 left on": lambda stream: log_ratios("control left on")(stream),
            },
        ),
    ),
)


def _path_and_marginal() -> tuple[Any, Any]:
    cells = [(v, m, n) for v, m in CASES for n in (20, 100, 1000)]
    paths = [ddpm.path_kl(data(v, m), schedule(n)).total for v, m, n in cells]
    return np.array(paths), np.array([marginal_kl(v, m, n) for v, m, n in cells])


ELBO = Claim(
    id="foundations.elbo",
    chapter=CHAPTER,
    paper="SFT-PG",
    source="SFT-PG, eq. (5)",
    title="The likelihood bound is printed with its fraction inverted",
    statement=(
        r"$\mathbb{E}_{q_0}[-\log p_0(x_0)] \le \mathbb{E}_q\big[-\log \tfrac{q(x_{1:T} \mid x_0)}{p_{0:T}(x_{0:T})}\big]$"
    ),
    printed="holds-corrected",
    corrected=(
        r"The fraction is $p_{0:T} / q(x_{1:T} \mid x_0)$: $\mathbb{E}[-\log p_0] \le -\mathrm{ELBO} = H(q_0) + "
        r"\mathrm{KL}(q_{0:T} \,\|\, p_{0:T})$."
    ),
    why="As printed the right-hand side is the ELBO itself, which is below. Ho et al. 2020, eq. (3), has it right. The bound is "
    "loose by the path KL less the marginal KL: of order 1/T against 1/T².",
    derivation="ddpm.md#the-path-kl",
    checks=(
        at_least(
            "bound",
            "Is the right-hand side at least the cross-entropy -E log p₀, integrated on a grid?",
            tuple(f"s² = {v:g}" for v, _ in CASES),
            subject=lambda: _bound_and_entropy(-1.0),
            printed=lambda: _bound_and_entropy(1.0),
            controls={"bound and cross-entropy swapped": lambda: _bound_and_entropy(-1.0)[::-1]},
        ),
        equals(
            "ELBO by joint matrices",
            "Is the negative ELBO the mean of log q - log p under the joint law of all 11 states, built by matrices?",
            tuple(f"s² = {v:g}" for v, _ in CASES),
            subject=lambda: np.array([-ddpm.elbo(data(v, m), short_schedule()) for v, m in CASES]),
            reference=lambda: np.array([_joint_negative_elbo(v, m) for v, m in CASES]),
            controls={
                "prior term dropped": lambda: np.array(
                    [gaussian.entropy(data(v, m)) + decomposed_kl(v, m, "prior") for v, m in CASES]
                ),
                "step 1 dropped": lambda: np.array(
                    [gaussian.entropy(data(v, m)) + decomposed_kl(v, m, "step 1") for v, m in CASES]
                ),
            },
        ),
    ),
)


def _bound_and_entropy(sign: float) -> tuple[Any, Any]:
    """`sign` times the ELBO, and the cross-entropy of the sampler's output."""
    bounds = [sign * ddpm.elbo(data(v, m), schedule()) for v, m in CASES]
    return np.array(bounds), np.array([_cross_entropy(v, m) for v, m in CASES])


def _joint_negative_elbo(variance: float, mean: float) -> float:
    """E_q[log q(x_{1:T} | x_0) - log p(x_{0:T})] from the joint Gaussians, term by term."""
    forward, reverse = joint_laws(variance, mean)
    solve = np.linalg.solve(reverse.cov, np.eye(reverse.dim))
    gap = forward.mean - reverse.mean
    log_det = np.linalg.slogdet(2 * np.pi * reverse.cov)[1]
    minus_log_p = 0.5 * (log_det + np.trace(solve @ forward.cov) + gap @ solve @ gap)
    conditional_entropy = 0.5 * np.log(2 * np.pi * np.e * short_schedule().beta).sum()
    return float(minus_log_p - conditional_entropy)


def _cross_entropy(variance: float, mean: float) -> float:
    """-E log p_0 under the data, by the trapezoidal rule."""
    law = ddpm.ancestral_law(data(variance, mean), schedule())
    x = mean + math.sqrt(variance) * np.linspace(-12, 12, 4001)
    density = np.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    log_p = -0.5 * (x - law.mean[0]) ** 2 / law.cov[0, 0] - 0.5 * math.log(2 * math.pi * law.cov[0, 0])
    return float(-(density * log_p).sum() * (x[1] - x[0]))


# --- many steps --------------------------------------------------------------------------------------------------


def extrapolated(quantity: Any) -> float:
    """Limit of a sequence with an expansion in 1/T, by two rounds of Richardson's extrapolation."""
    coarse, middle, fine = (quantity(n) for n in (2000, 4000, 8000))
    return ((4 * (2 * fine - middle)) - (2 * middle - coarse)) / 3


def scaled_quantities(variance: float, power: int = 1) -> np.ndarray:
    """T * path KL (steps only), T * (V - s^2) and T^2 * KL(data || output), started from q(x_T), extrapolated."""
    path = extrapolated(lambda n: n**power * ddpm.path_kl(data(variance), schedule(n)).steps.sum())
    gap = extrapolated(lambda n: n**power * (matched_variance(variance, n) - variance))
    square = extrapolated(lambda n: n ** (power + 1) * matched_kl(variance, n))
    return np.array([path, gap, square])


def matched_kl(variance: float, steps: int) -> float:
    """KL(data || output) of that sampler, whose mean is exact."""
    excess = variance / matched_variance(variance, steps) - 1
    return 0.5 * (excess - math.log1p(excess))


def matched_variance(variance: float, steps: int) -> float:
    """Output variance of ancestral sampling with variance beta, started from the data's own law at T."""
    slopes, noise = (a[:, 0] for a in ddpm.ancestral_steps([variance], schedule(steps)))
    v = 1 + float(schedule(steps).alpha_bar[-1]) * (variance - 1)
    for slope, added in zip(slopes[::-1], noise[::-1], strict=True):
        v = slope**2 * v + added
    return float(v)


def limits(variance: float, factor: float = 1.0) -> np.ndarray:
    constants = ddpm.limit_constants([variance], [MEAN])
    return np.array([factor * constants.path_kl[0], constants.variance_gap[0], constants.marginal_kl[0]])


LIMITS = Claim(
    id="foundations.many-steps",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md; sharpens SFT-PG, section 3, and Generative bilevel, section 2",
    title="With the exact score the path KL falls like 1/T and the marginal KL like 1/T², with known constants",
    statement=(
        r"For the VP-linear schedule with $\sigma_t^2 = \beta_t$: $T \cdot \mathrm{KL}_{\mathrm{path}} \to \int_0^1 "
        r"\tfrac14 \big(\tfrac{\beta \bar\alpha (1 - s^2)}{D}\big)^2 du$ and $T (V_0 - s^2) \to s^4 (1 - s^2) \int_0^1 "
        r"\tfrac{\beta^2 \bar\alpha^2}{D^3} du =: K$, $T^2 \cdot \mathrm{KL}(q_0 \,\|\, p_0) \to \tfrac14 (K / s^2)^2$, all with $x_T$ drawn from $q_T$."
    ),
    printed="holds",
    why="The error of a step's variance is of order 1/T² relative, and there are T of them: first order in the law, "
    "second in its divergence.",
    derivation="ddpm.md#many-steps",
    checks=(
        equals(
            "constants",
            "Do the exact sums at T = 2000, 4000, 8000, extrapolated, meet the integrals?",
            tuple(f"{what}, s² = {v:g}" for v, _ in CASES for what in ("T path KL", "T (V - s²)", "T² marginal KL")),
            subject=lambda: np.concatenate([scaled_quantities(v) for v, _ in CASES]),
            reference=lambda: np.concatenate([limits(v) for v, _ in CASES]),
            tolerance=2e-7,
            margin_from="2e-7 relative: what two rounds of extrapolation leave",
            controls={
                "1/2 in place of 1/4": lambda: np.concatenate([limits(v, 2.0) for v, _ in CASES]),
                "rate 1/T²": lambda: np.concatenate([scaled_quantities(v, 2) for v, _ in CASES]),
            },
        ),
    ),
    figures=lambda context: (_limits_figure(),),
)


def _limits_figure() -> Figure:
    steps = np.unique(np.geomspace(20, 4000, 24).astype(int))
    x = tuple(map(float, steps))
    series = []
    for v, m in CASES:
        paths = [ddpm.path_kl(data(v, m), schedule(int(n))).steps.sum() for n in steps]
        marginals = [marginal_kl(v, m, int(n)) for n in steps]
        series.append(Series(f"path KL, s² = {v:g}", x, tuple(map(float, paths))))
        series.append(Series(f"marginal KL, s² = {v:g}", x, tuple(marginals), style="dashed"))
    return Figure(
        name="kl-rates",
        title="Path and marginal KL against the number of steps",
        caption="Exact. The path KL (solid) falls like 1/T, the marginal KL (dashed) like 1/T²: the score-matching "
        "objective of a perfect model overstates its sampling error, ever more so.",
        alt="Two pairs of descending lines on logarithmic axes with slopes minus one (path) and minus two (marginal).",
        x_label="steps T",
        y_label="KL in nats",
        x_scale="log",
        y_scale="log",
        series=tuple(series),
    )


def posterior_steps(variance: float, steps: int, first: int = 2) -> float:
    """Path KL of beta-tilde without the steps before `first`."""
    path = ddpm.path_kl(data(variance), schedule(steps), "posterior")
    return float(path.steps[first - 1 :].sum())


def posterior_limit(variance: float) -> float:
    """Limit of the same for T -> infinity: the known log T / T term removed, then Richardson's extrapolation."""
    beta0, slope = 0.1, 19.9
    epsilon = slope / (2 * beta0) + beta0 * (0.5 - 1 / variance)

    def corrected(n: int) -> float:
        return posterior_steps(variance, n) - epsilon / 2 * math.log(n) / n

    return 2 * corrected(4_000_000) - corrected(2_000_000)


POSTERIOR_VARIANCE = Claim(
    id="foundations.posterior-variance",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md; on a choice left open by Ho et al. 2020, section 3.2, and SFT-PG, after eq. (3)",
    title="With beta-tilde the path KL of a perfect model is infinite, and without step 1 tends to half of Euler's gamma",
    statement=(
        r"With the step variance $\tilde\beta_t$ the path KL is $+\infty$ ($\sigma_1 = 0$); its steps $t \ge 2$ tend to "
        r"$\gamma_E / 2 = 0.2886$ nats per dimension for every $s > 0$, if $\beta(0) > 0$, while with $\beta_t$ they tend to zero."
    ),
    printed="holds",
    why="Near the data the exact over the chosen variance is t/(t-1), however fine the schedule: the likelihood never "
    "sees the samples become right, though their law does. Ho et al. report similar samples, and treat step 1 by a "
    "separate decoder.",
    derivation="ddpm.md#the-posterior-variance-does-not-vanish",
    checks=(
        equals(
            "limit",
            "Do the exact sums at two and four million steps, extrapolated, meet γ/2 for three data variances?",
            tuple(f"s² = {v:g}" for v in (0.25, 1.0, 4.0)),
            subject=lambda: np.array([posterior_limit(v) for v in (0.25, 1.0, 4.0)]),
            reference=lambda: np.full(3, 0.5 * np.euler_gamma),
            tolerance=1e-5,
            margin_from="1e-5: terms of order (log T / T)² and rounding of four million summands",
            controls={
                "variance beta": lambda: np.array(
                    [float(ddpm.path_kl(data(v), schedule(4000), "beta").steps[1:].sum()) for v in (0.25, 1.0, 4.0)]
                ),
                "steps from t = 3": lambda: np.array([posterior_steps(v, 200_000, first=3) for v in (0.25, 1.0, 4.0)]),
            },
        ),
        at_least(
            "step 1",
            "Is the first step's share infinite for beta-tilde?",
            ("step 1",),
            subject=lambda: (ddpm.path_kl(data(), schedule(), "posterior").steps[:1], [np.finfo(float).max]),
            controls={
                "beta": lambda: (ddpm.path_kl(data(), schedule(), "beta").steps[:1], [np.finfo(float).max]),
            },
        ),
    ),
)

# --- DDIM --------------------------------------------------------------------------------------------------------


@cache
def two_dimensional() -> Gaussian:
    return Gaussian.diagonal([1.0, -0.5], [0.25, 4.0])


def grid_levels(steps: int) -> np.ndarray:
    s = schedules.cosine(1000)
    return s.alpha_bar[schedules.ddim_grid(1000, steps)]


def law_vector(law: Gaussian) -> np.ndarray:
    return np.concatenate([law.mean, np.diag(law.cov)])


LAW_NAMES = ("mean 1", "mean 2", "variance 1", "variance 2")

DDIM_ANGLES = Claim(
    id="foundations.ddim-angles",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md from Song et al. 2021, eq. (12) at eta = 0",
    title="Deterministic DDIM on Gaussian data is a product of cosines",
    statement=r"With the exact score and angles $\varphi = \arctan\big(\tfrac1s \sqrt{(1 - \bar\alpha)/\bar\alpha}\big)$, "
    r"the output's standard deviation is $\tfrac{s}{\sqrt{D_T}} \prod_i \cos(\varphi_i - \varphi_{i-1})$.",
    printed="holds",
    why="In the plane of (data, noise) a deterministic step is a projection onto the next direction.",
    derivation="ddpm.md#the-angle-formula",
    checks=(
        equals(
            "angles against the recursion",
            "Are the closed form and the step-by-step recursion one law, for 5, 10 and 50 steps of the cosine schedule?",
            tuple(f"{name}, S = {n}" for n in (5, 10, 50) for name in LAW_NAMES),
            subject=lambda: np.concatenate(
                [law_vector(ddpm.ddim_angle_law(two_dimensional(), grid_levels(n))) for n in (5, 10, 50)]
            ),
            reference=lambda: np.concatenate(
                [law_vector(ddpm.ddim_law(two_dimensional(), grid_levels(n))) for n in (5, 10, 50)]
            ),
            controls={
                "eta = 0.2": lambda: np.concatenate(
                    [law_vector(ddpm.ddim_law(two_dimensional(), grid_levels(n), eta=0.2)) for n in (5, 10, 50)]
                ),
                "one level less": lambda: np.concatenate(
                    [law_vector(ddpm.ddim_angle_law(two_dimensional(), grid_levels(n)[1:])) for n in (5, 10, 50)]
                ),
            },
        ),
    ),
)

OPTIMAL_CELLS = tuple((s, n) for s in (0.5, 1.0, 2.0) for n in (5, 10, 50))


def schedule_w2(s: float, levels: np.ndarray) -> float:
    law = ddpm.ddim_law(Gaussian.scalar(0.0, s**2), levels)
    return gaussian.w2_squared(Gaussian.scalar(0.0, s**2), law)


def rivals_and_optimum(optimum: Any) -> tuple[Any, Any]:
    """W2^2 of 20 perturbed schedules (the best of them) and of the proposed one, for every s and S."""
    generator = np.random.default_rng(0)  # perturbations only pick rivals; any others must lose as well
    rivals, proposed = [], []
    for s, steps in OPTIMAL_CELLS:
        base = optimum(s, steps)
        angles = np.arctan(np.sqrt((1 - base[:-1]) / base[:-1]) / s)
        moved = [
            1
            / (
                1
                + s**2 * np.tan(np.sort(np.clip(angles + 0.02 * generator.standard_normal(steps - 1), 1e-3, 1.56))) ** 2
            )
            for _ in range(20)
        ]
        cosine = np.cos(np.pi / 2 * np.arange(1, steps) / steps) ** 2
        candidates = [*moved, 1 / (1 + s**2 * np.tan(np.pi / 2 * np.arange(1, steps) / steps) ** 2), cosine]
        rivals.append(min(schedule_w2(s, np.append(levels, 0.0)) for levels in candidates))
        proposed.append(schedule_w2(s, base))
    return np.array(rivals), np.array(proposed)


def cosine_levels(s: float, steps: int) -> np.ndarray:
    levels = np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps) ** 2
    levels[-1] = 0.0
    return levels


DDIM_SCHEDULE = Claim(
    id="foundations.ddim-schedule",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md; what the schedule learning of Generative bilevel, eq. (16), should find",
    title="The best few-step DDIM schedule for N(0, s²) has equal angles: the cosine schedule for s = 1 only",
    statement=(
        r"Among schedules that end at $\bar\alpha = 0$, $\bar\alpha_i = \big(1 + s^2 \tan^2 \tfrac{\pi i}{2S}\big)^{-1}$ "
        r"minimises $W_2$ of $S$-step deterministic DDIM, with $W_2^2 = s^2 \big(1 - \cos^S \tfrac{\pi}{2S}\big)^2$; for "
        r"$s = 1$ it is $\cos^2 \tfrac{\pi i}{2S}$."
    ),
    printed="holds",
    why="The logarithm of a cosine is concave, so equal turns lose least.",
    derivation="ddpm.md#equal-angles-are-optimal",
    checks=(
        equals(
            "value",
            "Is W₂² of the equal-angle schedule, by the recursion, the closed value?",
            tuple(f"s = {s:g}, S = {n}" for s, n in OPTIMAL_CELLS),
            subject=lambda: np.array([schedule_w2(s, ddpm.optimal_ddim_schedule(s, n)) for s, n in OPTIMAL_CELLS]),
            reference=lambda: np.array([ddpm.optimal_ddim_w2_squared(s, n) for s, n in OPTIMAL_CELLS]),
            controls={
                "cosine schedule for every s": lambda: np.array(
                    [schedule_w2(s, cosine_levels(s, n)) for s, n in OPTIMAL_CELLS]
                ),
            },
        ),
        at_least(
            "no rival is better",
            "Are 20 perturbed schedules and the plain cosine at least as far from the data?",
            tuple(f"s = {s:g}, S = {n}" for s, n in OPTIMAL_CELLS),
            subject=lambda: rivals_and_optimum(ddpm.optimal_ddim_schedule),
            controls={"cosine schedule for every s": lambda: rivals_and_optimum(cosine_levels)},
        ),
    ),
    figures=lambda context: (_schedule_figure(),),
)


def _schedule_figure() -> Figure:
    steps = 10
    x = tuple(i / steps for i in range(steps + 1))
    series = tuple(
        Series(
            f"s = {s:g}" + (" (cosine)" if s == 1 else ""),
            x,
            (1.0, *ddpm.optimal_ddim_schedule(s, steps).tolist()),
            style="line" if s == 1 else "dashed",
        )
        for s in (0.25, 0.5, 1.0, 2.0, 4.0)
    )
    return Figure(
        name="optimal-ddim-schedules",
        title="Optimal ten-step DDIM schedules",
        caption="The narrower the data, the longer the schedule should stay near the clean end: one schedule cannot be "
        "best for data whose scales differ.",
        alt="Five descending curves of ᾱ against the fraction of steps; smaller s stays high longer, larger s "
        "falls sooner; s = 1 is the cosine schedule.",
        x_label="fraction of the steps",
        y_label="ᾱ",
        series=series,
    )


DDIM_ETA_ONE = Claim(
    id="foundations.ddim-eta-one",
    chapter=CHAPTER,
    paper="DDIM",
    source="Song et al. 2021, section 4.1",
    title="DDIM with eta = 1 and no skipping is ancestral sampling with the posterior variance",
    statement=r"At $\eta = 1$ on all $T$ steps the generative process of DDIM becomes DDPM (with $\sigma_t^2 = "
    r"\tilde\beta_t$).",
    printed="holds",
    why="The direction term then carries exactly the posterior mean's coefficient.",
    derivation="ddpm.md#ddim",
    checks=(
        equals(
            "law",
            "Are the two output laws one, on two-dimensional data and 200 steps?",
            LAW_NAMES,
            subject=lambda: law_vector(ddpm.ddim_law(two_dimensional(), schedule(200).alpha_bar, eta=1.0)),
            reference=lambda: law_vector(ddpm.ancestral_law(two_dimensional(), schedule(200), "posterior")),
            controls={
                "beta": lambda: law_vector(ddpm.ancestral_law(two_dimensional(), schedule(200), "beta")),
                "every second step": lambda: law_vector(
                    ddpm.ddim_law(two_dimensional(), schedule(200).alpha_bar[1::2], eta=1.0)
                ),
            },
        ),
    ),
)

# --- scores ------------------------------------------------------------------------------------------------------

SCORE_LEVELS = np.array([0.95, 0.5, 0.1])


def floor_by_conditioning(level: float, variance: float) -> float:
    """Var(eps | x_t) from the joint Gaussian of (x_0, eps)."""
    joint = Gaussian(np.zeros(2), np.diag([variance, 1.0]))
    map_ = np.array([[0.0, 1.0], [math.sqrt(level), math.sqrt(1 - level)]])
    return float(gaussian.condition(gaussian.affine(joint, map_, np.zeros(2)), [1], [0.0]).cov[0, 0])


SCORE_FLOOR = Claim(
    id="foundations.score-matching-floor",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="derived in docs/ddpm.md; the loss of Generative bilevel, eq. (24)",
    title="The score-matching loss of a perfect model is not zero",
    statement=r"$\min_\theta \mathbb{E}\|\epsilon - \epsilon_\theta(x_t, t)\|^2 = \bar\alpha_t s^2 / D_t$ per coordinate, for "
    r"$x_0 \sim \mathcal{N}(m, s^2)$.",
    printed="holds",
    why="Part of the noise cannot be told from the data: a comparison of schedules by their training loss compares "
    "these floors first.",
    derivation="ddpm.md#the-optimal-score",
    checks=(
        equals(
            "floor",
            "Is the closed floor the conditional variance of the noise given the noised state, from the joint Gaussian?",
            tuple(f"ᾱ = {a:g}, s² = {v:g}" for a in SCORE_LEVELS for v, _ in CASES),
            subject=lambda: np.array(
                [ddpm.minimal_score_matching_loss(data(v), [a])[0] for a in SCORE_LEVELS for v, _ in CASES]
            ),
            reference=lambda: np.array([floor_by_conditioning(a, v) for a in SCORE_LEVELS for v, _ in CASES]),
            controls={
                "zero": lambda: np.zeros(6),
                "noise share 1 - ᾱ": lambda: np.repeat(1 - SCORE_LEVELS, 2),
            },
        ),
    ),
)


@cache
def planar_mixture() -> GaussianMixture:
    return GaussianMixture(
        [0.5, 0.3, 0.2], [[-1.0, -0.5], [0.9, -0.2], [0.1, 1.0]], [v * np.eye(2) for v in (0.04, 0.09, 0.16)]
    )


POINTS = np.array([[0.2, -0.4], [-1.3, 0.6], [0.8, 1.1]])


def torch_scores() -> np.ndarray:
    chain = MixtureChain.of(planar_mixture(), schedules.linear(5, 0.1, 0.5))
    return np.concatenate([chain.score(torch.tensor(POINTS), t).numpy().ravel() for t in (1, 3, 5)])


def numpy_scores(offset: int = 0) -> np.ndarray:
    levels = schedules.linear(5, 0.1, 0.5).alpha_bar
    steps = [max(t - offset, 1) for t in (1, 3, 5)]
    return np.concatenate([planar_mixture().noised_score(POINTS, levels[t - 1]).ravel() for t in steps])


def tweedie(sign: float = 1.0) -> np.ndarray:
    """Posterior means E[x_0 | x_t] by Tweedie's formula from the score, at three levels."""
    rows = []
    for a in SCORE_LEVELS:
        score = planar_mixture().noised_score(POINTS, a)
        rows.append(((POINTS + sign * (1 - a) * score) / math.sqrt(a)).ravel())
    return np.concatenate(rows)


def posterior_means() -> np.ndarray:
    """The same by weighing the components' own posterior means."""
    mixture, rows = planar_mixture(), []
    for a in SCORE_LEVELS:
        variances = mixture.covs[:, 0, 0]
        marginal = a * variances + 1 - a
        gaps = POINTS[:, None] - math.sqrt(a) * mixture.means
        weight = mixture.weights * np.exp(-0.5 * (gaps**2).sum(2) / marginal) / marginal
        weight /= weight.sum(1, keepdims=True)
        means = mixture.means + (math.sqrt(a) * variances / marginal)[:, None] * gaps
        rows.append((weight[..., None] * means).sum(1).ravel())
    return np.concatenate(rows)


MIXTURE_SCORE = Claim(
    id="foundations.mixture-score",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="Tweedie's formula; derived in docs/ddpm.md",
    title="The noised mixture's score is exact at every level, and gives the posterior mean",
    statement=r"$\nabla \log q_t$ of a noised Gaussian mixture is closed, and $\mathbb{E}[x_0 \mid x_t] = (x_t + (1 - "
    r"\bar\alpha_t) \nabla \log q_t(x_t)) / \sqrt{\bar\alpha_t}$.",
    printed="holds",
    why="Noise turns a mixture into a mixture. The exact-score chains of the next chapter stand on this.",
    derivation="ddpm.md#the-optimal-score",
    checks=(
        equals(
            "two implementations",
            "Do the torch chain's score and the NumPy theory's agree at three points and three levels?",
            tuple(f"t = {t}, point {i}, x{j}" for t in (1, 3, 5) for i in (1, 2, 3) for j in (1, 2)),
            subject=torch_scores,
            reference=numpy_scores,
            controls={"level of the step before": lambda: numpy_scores(offset=1)},
        ),
        equals(
            "Tweedie",
            "Is Tweedie's formula the mean of the components' own posterior means?",
            tuple(f"ᾱ = {a:g}, point {i}, x{j}" for a in SCORE_LEVELS for i in (1, 2, 3) for j in (1, 2)),
            subject=tweedie,
            reference=posterior_means,
            controls={"sign of the score flipped": lambda: tweedie(-1.0)},
        ),
    ),
)


# --- released schedule -------------------------------------------------------------------------------------------


def schedule_gradients(form: Any, base: tuple[float, float] = (0.2, 0.9)) -> np.ndarray:
    """d alpha_bar / d start and d alpha_bar / d end at t = 250, 500, 750 of 1000."""
    jacobian = schedules.cosine_family_jacobian(1000, *base, 2.0, 0.02, form)
    return jacobian[[250, 500, 750], :2].T.ravel()


def chen_differences() -> np.ndarray:
    """The same for Chen's schedule by complex steps of its definition, written out here."""

    def alpha_bar(start: complex, end: complex) -> NDArray[np.complex128]:
        u = np.arange(1001) / 1000

        def shape(y: Any) -> Any:
            return np.cos((y + 0.02) / 1.02 * np.pi / 2) ** 4

        f = shape(u * (end - start) + start)
        return ((f - shape(end)) / (shape(start) - shape(end)))[[250, 500, 750]]

    step = 1e-30
    by_start, by_end = alpha_bar(0.2 + step * 1j, 0.9), alpha_bar(0.2, 0.9 + step * 1j)
    return np.concatenate([by_start.imag, by_end.imag]) / step


def offset_share() -> np.ndarray:
    """Derivative of the released alpha_bar when start and end move together: y_t moves by 1/T for all t."""
    y = (np.array([0, 250, 500, 750]) * (0.9 - 0.2) + 0.2) / 1000
    log_slope = -2 * 2.0 * np.tan((y + 0.02) / 1.02 * np.pi / 2) * np.pi / 2 / 1.02
    levels = schedules.cosine_family(1000, 0.2, 0.9, 2.0, 0.02, "released")[[250, 500, 750]]
    return levels * (log_slope[1:] - log_slope[0]) / 1000


RELEASED_SCHEDULE = Claim(
    id="foundations.released-schedule",
    chapter=CHAPTER,
    paper="Generative bilevel code",
    about="code",
    source="bilevel_diffusion, noise_schedule (cosine schedule), against Chen 2023, Algorithm 1",
    title="In the released noise schedule start and end are one parameter, up to 1/T",
    statement=r"The learned cosine schedule has four parameters: start, end, $\tau$ and $\epsilon$.",
    printed="holds-corrected",
    corrected=r"It has three: time runs to $T$ before the offset is added, so that start enters as start$/T$ and, up to "
    r"$1/T$, only end $-$ start matters. In Chen's form the two gradients are independent.",
    why="The paper reports that start and end update inversely; up to 1/T their gradients are each other's "
    "negative by construction.",
    derivation="ddpm.md#schedule-families",
    checks=(
        equals(
            "gradients in start and end",
            "Are the gradients of ᾱ those of Chen's definition at (0.2, 0.9, 2, 0.02)?",
            tuple(f"d/d{name}, t = {t}" for name in ("start", "end") for t in (250, 500, 750)),
            subject=lambda: schedule_gradients("chen"),
            reference=chen_differences,
            printed=lambda: schedule_gradients("released"),
            controls={"start and end swapped": lambda: np.roll(schedule_gradients("chen"), 3)},
        ),
        equals(
            "their sum in the released form",
            r"Is the released form's gradient along (1, 1) the offset's share of it, $\bar\alpha_t\,(f'(y_t)/f(y_t) - "
            r"f'(y_0)/f(y_0)) / T$?",
            ("t = 250", "t = 500", "t = 750"),
            subject=lambda: schedule_gradients("released").reshape(2, 3).sum(0),
            reference=offset_share,
            controls={"Chen's form": lambda: schedule_gradients("chen").reshape(2, 3).sum(0)},
        ),
    ),
)


CLAIMS: tuple[Claim, ...] = (
    POSTERIOR_MEAN,
    VARIANCE_CHOICE,
    ANCESTRAL_LAW,
    PATH_KL,
    ELBO,
    LIMITS,
    POSTERIOR_VARIANCE,
    DDIM_ANGLES,
    DDIM_SCHEDULE,
    DDIM_ETA_ONE,
    SCORE_FLOOR,
    MIXTURE_SCORE,
    RELEASED_SCHEDULE,
)
