r"""Samplers of few steps from a noise prediction that was learned for many: sub-sampled DDPM, DDIM, Analytic-DPM.

Of the T training times keep t_1 < ... < t_S = T, and let a_k be alpha_bar at t_k, a_0 = 1. Step k takes x at level
a = a_k to level a' = a_{k-1}; with the predicted noise e and x_0-hat = (x - sqrt(1 - a) e) / sqrt(a),

    x' = sqrt(a') x_0-hat + sqrt(1 - a' - lambda^2) e + sigma z,        z ~ N(0, I),
    lambda^2 = eta^2 (1 - a')/(1 - a) (1 - a/a').

lambda^2 is the variance of x' given x and x_0 in DDIM's forward process (Song et al. 2021, arXiv 2010.02502, eqs. 7, 12
and 16), and sigma^2 is the sampler's own choice:

* DDIM: sigma = lambda;
* sub-sampled DDPM: eta = 1 and sigma^2 = 1 - a/a', the beta of the skipping forward process, or lambda^2, its
  beta-tilde. At eta = 1 the mean is (x - (1 - a/a')/sqrt(1 - a) e) / sqrt(a/a'), Ho et al. 2020, eq. (11), on the t_k;
* Analytic-DPM: the variance that maximises the likelihood, under the forward process, of x' given x:

    sigma^2 = lambda^2 + (sqrt(a' (1 - a)/a) - sqrt(1 - a' - lambda^2))^2 u.

To derive it, write x' = sqrt(a') x_0 + sqrt(1 - a' - lambda^2) noise + lambda z and x_0 = (x - sqrt(1 - a) noise) /
sqrt(a). Given x, the gap between x' and the step's mean is lambda z plus sqrt(a' (1 - a)/a) - sqrt(1 - a' - lambda^2)
times e - noise, and the best isotropic variance is its mean square per dimension. So u = E|noise - e|^2 / d, the
"residual", for any prediction e (Bao et al. 2022, arXiv 2206.07309). If e = E[noise | x], then E|noise - e|^2 =
d - E|e|^2, the "norm" form (Bao et al. 2022, arXiv 2201.06503, Theorem 1, with score -e / sqrt(1 - a)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from algorithms.chain import Params
from theory import schedules
from verdicts.streams import Stream

Spacing = Literal["linear", "quadratic"]
Variance = Literal["beta", "posterior"]
Unexplained = Literal["norm", "residual"]


class NoisePredictor(Protocol):
    """What is known of the sampler of many steps: `toy.ddpm.MLPChain` is one.

    Attributes:
        alpha_bar: (T,).
        shape: of one sample.
    """

    @property
    def alpha_bar(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def epsilon(self, params: Params, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Return the predicted noise, (n, *shape), for states x (n, *shape) at the training times t (n,)."""
        ...


@dataclass(frozen=True, eq=False)
class FastChain:
    """A `Chain` of S steps through some of the T training times; its parameters are the noise predictor's.

    Attributes:
        times: t_1 < ... < t_S = T, what the network is told.
        given: lambda of each step, S numbers, step k at index k - 1.
        stds: sigma of each step.
    """

    full: NoisePredictor
    times: tuple[int, ...]
    given: tuple[float, ...]
    stds: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full.shape

    def levels(self, t: int) -> tuple[float, float]:
        """Return alpha_bar where step t starts and where it ends."""
        ends = 1.0 if t == 1 else float(self.full.alpha_bar[self.times[t - 2] - 1])
        return float(self.full.alpha_bar[self.times[t - 1] - 1]), ends

    def initial(self, noise: Tensor) -> Tensor:
        return noise

    def renoise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Noise x_0 (n, *shape) to where the last step starts, as the forward process does."""
        level, _ = self.levels(1)
        return math.sqrt(level) * x0 + math.sqrt(1 - level) * noise

    def mean(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        return self.step(x, self.predict(params, x, t, condition), t)

    def predict(self, params: Params, x: Tensor, t: int, condition: Tensor | None) -> Tensor:
        """Return the predicted noise e in x_t = x, (n, *shape)."""
        time = torch.full((len(x),), float(self.times[t - 1]), dtype=x.dtype, device=x.device)
        return self.full.epsilon(params, x, time, condition)

    def denoised(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return x_0-hat, (n, *shape), of a state and the noise in it."""
        level, _ = self.levels(t)
        return (x - math.sqrt(1 - level) * epsilon) / math.sqrt(level)

    def step(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return the mean of x_{t-1}, (n, *shape), for x_t = x and the noise in it."""
        now, then = self.levels(t)
        return math.sqrt(then / now) * x - _gap(now, then, self.given[t - 1]) * epsilon

    def noise_level(self, t: int) -> float:
        """Return sqrt(1 - alpha_bar) where step t starts."""
        return math.sqrt(1 - self.levels(t)[0])

    def std(self, t: int) -> float:
        return self.stds[t - 1]


def subsequence(steps: int, kept: int, spacing: Spacing = "linear") -> tuple[int, ...]:
    """Return `kept` of the times 1..steps, the first and the last among them (of one, the last).

    Equally spaced, or with squares of equally spaced numbers, which are dense where the data is near
    (Song et al. 2021, appendix D.2).

    Raises:
        ValueError: unless 1 <= kept <= steps, the spacing is known, and no two of the times fall together.

    >>> subsequence(1000, 4), subsequence(1000, 4, "quadratic")
    ((1, 334, 667, 1000), (1, 112, 445, 1000))
    """
    if spacing not in ("linear", "quadratic"):
        raise ValueError(f"spacing is {spacing!r}, must be 'linear' or 'quadratic'")
    if not 1 <= kept <= steps:
        raise ValueError(f"kept is {kept}, must lie in [1, {steps}], the steps there are")
    if kept == 1:
        return (steps,)
    if spacing == "linear":
        return tuple(int(index) + 1 for index in schedules.ddim_grid(steps, kept))
    times = tuple(i * i * (steps - 1) // (kept - 1) ** 2 + 1 for i in range(kept))
    if len(set(times)) < kept:
        raise ValueError(f"kept is {kept}, too many for quadratic spacing in {steps} steps: two times fall together")
    return times


def ddpm(full: NoisePredictor, times: Sequence[int], variance: Variance = "beta") -> FastChain:
    """Return ancestral sampling through the given times, t_1 < ... < t_S = T.

    With the variance "posterior" the last step, to x_0, has no noise.

    Raises:
        ValueError: unless the times increase within 1..T and end at T, and the variance is known.
    """
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance is {variance!r}, must be 'beta' or 'posterior'")
    chain = ddim(full, times, eta=1.0)
    if variance == "posterior":
        return chain
    levels = [chain.levels(k) for k in range(1, chain.steps + 1)]
    return FastChain(full, chain.times, chain.given, tuple(math.sqrt(1 - now / then) for now, then in levels))


def ddim(full: NoisePredictor, times: Sequence[int], eta: float = 0.0) -> FastChain:
    """Return DDIM through the given times: deterministic for eta = 0, and for eta = 1 `ddpm` with variance "posterior".

    Raises:
        ValueError: unless the times increase within 1..T and end at T, and 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, must lie in [0, 1]")
    kept = _check_times(len(full.alpha_bar), times)
    bare = FastChain(full, kept, (0.0,) * len(kept), (0.0,) * len(kept))
    levels = [bare.levels(k) for k in range(1, len(kept) + 1)]
    given = tuple(eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then)) for now, then in levels)
    return FastChain(full, kept, given, given)


def analytic_dpm(
    full: NoisePredictor,
    params: Params,
    points: Tensor,
    times: Sequence[int],
    stream: Stream,
    eta: float = 1.0,
    unexplained: Unexplained = "residual",
    condition: Tensor | None = None,
) -> FastChain:
    """Return the sampler with DDIM's mean and the optimal variance, estimated with the network on data points.

    The share u of the noise that x_t leaves unexplained is a mean over `points` (n, *shape), one noise for each and
    time. "residual" is optimal for whatever the network predicts. "norm" is Analytic-DPM's form; it trusts the network
    to be the mean of the noise given x_t, and it is the noisier one in the early steps of sampling, where nearly all
    of the noise is explained: 1 - E|e|^2 / d is there a small difference, which the step multiplies by about a'/a.
    A negative estimate, which "norm" can give, counts as 0.

    Raises:
        ValueError: unless the times increase within 1..T and end at T, 0 <= eta <= 1, there are points of the chain's
            shape, all finite, and `unexplained` is known.
    """
    base = ddim(full, times, eta)
    shares = unexplained_noise(full, params, points, base.times, stream, unexplained, condition)
    stds: list[float] = []
    for k, share in enumerate(shares, 1):
        now, then = base.levels(k)
        given = base.given[k - 1]
        stds.append(math.sqrt(given**2 + _gap(now, then, given) ** 2 * max(share, 0.0)))
    return FastChain(full, base.times, base.given, tuple(stds))


def unexplained_noise(
    full: NoisePredictor,
    params: Params,
    points: Tensor,
    times: Sequence[int],
    stream: Stream,
    unexplained: Unexplained = "residual",
    condition: Tensor | None = None,
) -> tuple[float, ...]:
    """Return for each time the estimate of E|noise - e|^2 / d ("residual") or of 1 - E|e|^2 / d ("norm").

    The noise of a time depends on the stream and that time alone. Raises ValueError like `analytic_dpm`.
    """
    if unexplained not in ("norm", "residual"):
        raise ValueError(f"unexplained is {unexplained!r}, must be 'norm' or 'residual'")
    if points.shape[1:] != full.shape or not len(points):
        raise ValueError(f"points has shape {tuple(points.shape)}, must be (n, {', '.join(map(str, full.shape))})")
    if not bool(torch.isfinite(points).all()):
        raise ValueError("points holds a point that is not finite, all must be")
    shares: list[float] = []
    for time in times:
        source = torch.Generator().manual_seed(stream.child("noise", time).integer())
        noise = torch.randn(points.shape, generator=source, dtype=points.dtype).to(points.device)
        level = float(full.alpha_bar[time - 1])
        x = math.sqrt(level) * points + math.sqrt(1 - level) * noise
        told = torch.full((len(x),), float(time), dtype=x.dtype, device=x.device)
        with torch.no_grad():
            e = full.epsilon(params, x, told, condition)
        shares.append(float((noise - e).square().mean() if unexplained == "residual" else 1 - e.square().mean()))
    return tuple(shares)


def _gap(now: float, then: float, given: float) -> float:
    """How far the step's mean moves per unit of predicted noise: sqrt(a' (1 - a)/a) - sqrt(1 - a' - lambda^2)."""
    # 1 - a' - lambda^2 is at least (1 - a')^2 a / (a' (1 - a)) >= 0; at a' = 1 rounding must not make it negative.
    return math.sqrt(then * (1 - now) / now) - math.sqrt(max(1 - then - given**2, 0.0))


def _check_times(steps: int, times: Sequence[int]) -> tuple[int, ...]:
    kept = tuple(int(time) for time in times)
    increasing = all(a < b for a, b in zip((0, *kept), kept, strict=False))
    if not kept or not increasing or kept[-1] != steps:
        raise ValueError(f"times is {list(times)}, must increase, start at 1 or later, and end at T = {steps}")
    return kept
