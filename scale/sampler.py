"""The Gaussian steps of a diffusers scheduler, as a table of coefficients.

A scheduler's own `step` draws noise, keeps an index and rounds its coefficients in float32. Here each step t = T..1 is

    x_0hat  = clamp(predict_x x + predict_output output)
    x_{t-1} = from_x0 x_0hat + from_x x + from_output output + std eps,      eps ~ N(0, I),

with x = x_t and one output of the network (after guidance). That is functional, differentiable, and has a density
wherever std > 0. The numbers come in float64 from the scheduler's own alpha-bar (or sigma) table and its own timesteps.

Sources: DDPM (Ho et al. 2020), eqs. (6), (7); DDIM (Song et al. 2021), eqs. (12), (16); zero terminal SNR (Lin et al.
2023); ancestral Euler steps (Karras et al. 2022, as in k-diffusion); LCM (Luo et al. 2023); TCD (Zheng et al. 2024).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

Linear = tuple[float, float]
"""Coefficients of x_t and of the network's output."""

LastStep = Literal["keep", "frozen"] | float


@dataclass(frozen=True)
class Step:
    """One step's coefficients (see the module).

    Attributes:
        predict: coefficients of x and of the output in the predicted x_0.
        noise: coefficients of x and of the output in the predicted noise.
        level: standard deviation of the noise in x.
        from_x0, from_x, from_output: coefficients of the mean.
        std: standard deviation of the noise; 0 for a deterministic step.
        forward: (a, b): the forward process from the noise level where the step ends to the one where it starts maps x
            to a x + b noise.
        input_scale: what x is multiplied by before the network sees it.
    """

    predict: Linear
    noise: Linear
    level: float
    from_x0: float
    from_x: float
    from_output: float
    std: float
    forward: tuple[float, float]
    input_scale: float = 1.0

    def mean(self, x: Tensor, output: Tensor, clip: float | None) -> Tensor:
        """Return the mean of the next latent, (n, *shape), in the dtype of x."""
        if output.shape != x.shape:
            raise ValueError(
                f"output has shape {tuple(output.shape)}, the latents {tuple(x.shape)}: they must agree (a network "
                "that also predicts a variance is not supported)"
            )
        output = output.to(x.dtype)
        on_x, on_output = self.predict
        if clip is None:
            # One coefficient each: no division by a small sqrt(alpha-bar) that is multiplied away again.
            return (self.from_x0 * on_x + self.from_x) * x + (self.from_x0 * on_output + self.from_output) * output
        x0 = (on_x * x + on_output * output).clamp(-clip, clip)
        return self.from_x0 * x0 + self.from_x * x + self.from_output * output

    def output(self, x: Tensor, epsilon: Tensor) -> Tensor:
        """Return the network's output that stands for the noise `epsilon` in x, both (n, *shape).

        Raises:
            ValueError: if x is all noise, whatever the output.
        """
        on_x, on_output = self.noise
        if on_output == 0:
            raise ValueError(
                "epsilon says nothing of x_0 at a timestep without signal (rescale_betas_zero_snr): use "
                "timestep_spacing='leading', or a schedule that keeps some signal"
            )
        return epsilon if self.noise == (0.0, 1.0) else (epsilon - on_x * x) / on_output


@dataclass(frozen=True, eq=False)
class GaussianSteps:
    """The steps t = T..1 of a sampler; `gaussian_steps` makes it.

    Attributes:
        scheduler: class name of the diffusers scheduler.
        eta: the noise scale that the table was made with.
        timesteps: (T,); `timesteps[t - 1]` is what the network is told at step t, as the scheduler gives it.
        table: `table[t - 1]` holds step t's coefficients.
        initial_std: standard deviation of x_T.
        clip: bound on the predicted x_0, or None.
        frozen: the noise-free step after step 1 if it was taken out of the chain, else None.
        finish_timestep: () what the network is told in that step, or None.
    """

    scheduler: str
    eta: float
    timesteps: Tensor
    table: tuple[Step, ...]
    initial_std: float
    clip: float | None = None
    frozen: Step | None = None
    finish_timestep: Tensor | None = None

    @property
    def steps(self) -> int:
        """T, the number of Gaussian steps."""
        return len(self.table)

    @property
    def frozen_last(self) -> bool:
        """Whether a noise-free last step was taken out of the chain, to be made by `finish`."""
        return self.frozen is not None

    @property
    def without_density(self) -> tuple[int, ...]:
        """The steps t whose noise is 0, so that x_{t-1} given x_t has no density."""
        return tuple(t for t in range(1, self.steps + 1) if not self.std(t) > 0)

    def initial(self, noise: Tensor) -> Tensor:
        """Map standard normal noise (n, *shape) to x_T (n, *shape)."""
        return self.initial_std * noise

    def network_input(self, x: Tensor, t: int) -> Tensor:
        """Return what the network sees of x_t = x at step t, (n, *shape)."""
        return self._at(t).input_scale * x

    def mean(self, x: Tensor, output: Tensor, t: int) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x and the network's output (after guidance), all (n, *shape).

        Raises:
            ValueError: if there is no step t, or the output has another shape than x.
        """
        return self._at(t).mean(x, output, self.clip)

    def noise(self, x: Tensor, output: Tensor, t: int) -> Tensor:
        """Return the noise in x_t = x that the network's output stands for, (n, *shape)."""
        on_x, on_output = self._at(t).noise
        return output if (on_x, on_output) == (0.0, 1.0) else on_x * x + on_output * output

    def denoised(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return x_0-hat of x_t = x and the noise in it, all (n, *shape).

        It is not clipped: the clip's derivative is 0 wherever it acts, and a gradient through it would be lost.

        Raises:
            ValueError: if x_t is all noise, so that x_0 does not follow (zero terminal SNR).
        """
        on_x, on_output = self._at(t).predict
        return on_x * x + on_output * self._at(t).output(x, epsilon)

    def step(self, x: Tensor, epsilon: Tensor, t: int) -> Tensor:
        """Return the mean of x_{t-1} given x_t = x and the noise in it, all (n, *shape); raises like `denoised`."""
        return self.mean(x, self._at(t).output(x, epsilon), t)

    def noise_level(self, t: int) -> float:
        """Return the standard deviation of the noise in x_t: sqrt(1 - alpha-bar), or Euler's sigma."""
        return self._at(t).level

    def std(self, t: int) -> float:
        """Return the standard deviation of step t's noise; 0 for a deterministic step."""
        return self._at(t).std

    def renoise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Map the chain's x_0 and standard normal noise (n, *shape) to x_1 (n, *shape), as the forward process does.

        It starts from the noise level that step 1 leads to. Where that is none (DDPM, `set_alpha_to_one`) this is the
        scheduler's `add_noise`; with `set_alpha_to_one=False`, or where the last step is frozen, x_0 still holds noise,
        and `add_noise` would overshoot.
        """
        scale, std = self._at(1).forward
        return scale * x0 + std * noise

    def finish_input(self, x: Tensor) -> Tensor:
        """Return what the network sees in the frozen last step, (n, *shape).

        Raises:
            ValueError: if no step is frozen.
        """
        return self._frozen().input_scale * x

    def finish(self, x: Tensor, output: Tensor) -> Tensor:
        """Make the frozen, noise-free last step from the chain's x_0 = x and the network's output, (n, *shape).

        Raises:
            ValueError: if no step is frozen, or the output has another shape than x.
        """
        return self._frozen().mean(x, output, self.clip)

    def describe(self) -> str:
        """Return one line for reports."""
        bare = self.without_density
        if not bare:
            density = "every step has a density"
        elif len(bare) <= 3:
            density = f"no density at t = {', '.join(map(str, bare))}"
        else:
            density = f"no density at {len(bare)} of {self.steps} steps"
        tail = "; its noise-free last step is frozen, outside the chain" if self.frozen_last else ""
        return (
            f"{self.scheduler}, {self.steps} steps, eta {self.eta:g}, guidance excluded: std "
            f"{self.std(self.steps):.4g} at the first step (t = {self.steps}), {self.std(1):.4g} at the last (t = 1); "
            f"{density}{tail}"
        )

    def _at(self, t: int) -> Step:
        if not 1 <= t <= self.steps:
            raise ValueError(f"t must be in 1..{self.steps}, got {t}")
        return self.table[t - 1]

    def _frozen(self) -> Step:
        if self.frozen is None:
            raise ValueError("finish needs steps made with last_step='frozen'; here the last step is part of the chain")
        return self.frozen


def gaussian_steps(scheduler: Any, steps: int, eta: float = 1.0, last_step: LastStep = "keep") -> GaussianSteps:
    """Return the Gaussian steps of a diffusers scheduler, which is left as it is.

    Supported are DDIMScheduler, DDPMScheduler (fixed variances), EulerAncestralDiscreteScheduler, LCMScheduler and
    TCDScheduler. What each does is kept, also where it surprises: DDIM steps to timestep - (training steps // steps),
    which is the next timestep of its list with 'leading' spacing, but not always with 'trailing' and rarely with
    'linspace'; TCD and Euler never clip. A variance that DDPM raises to 1e-20, for a logarithm's sake, counts as 0.

    Args:
        scheduler: its configuration and spacing decide; its `set_timesteps(steps)` is called on a copy.
        steps: number of steps of the sampler.
        eta: scale of the noise in [0, 1] (TCD's gamma, whose default there is 0.3). The other schedulers have none:
            their noise follows from the schedule alone, and only 1.0 is accepted.
        last_step: what to do with a last step that has no noise, hence no density (DDPM, `set_alpha_to_one=True`,
            Euler, LCM, TCD). "keep": it stays as configured, std(1) = 0. A positive number: the noise that it is given,
            its mean unchanged. "frozen": it leaves the chain, which then has steps - 1 steps, and `finish` makes it.
            The last two are refused where the last step has noise of its own, which would otherwise be lost in silence.

    Raises:
        ValueError: if the scheduler, its prediction type, variance type or thresholding is not supported; if steps, eta
            or last_step is out of range, or the scheduler's timesteps for it are; if x_0 cannot be predicted (zero
            terminal SNR with epsilon prediction).
    """
    name = type(scheduler).__name__
    if name not in TABLES:
        raise ValueError(
            f"scheduler {name} is not supported: {REFUSED.get(name, UNKNOWN)}; supported are {', '.join(TABLES)}"
        )
    _check(name, scheduler.config, steps, eta, last_step)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(int(steps))
    timesteps = own.timesteps.detach().cpu().flip(0)
    _check_timesteps(name, timesteps, int(steps), scheduler.config.num_train_timesteps)
    made = GaussianSteps(
        scheduler=name,
        eta=float(eta),
        timesteps=timesteps,
        table=tuple(TABLES[name](own, float(eta))[::-1]),
        initial_std=float(own.init_noise_sigma),
        clip=float(own.config.clip_sample_range) if name in CLIPPING and own.config.clip_sample else None,
    )
    return _with_last_step(made, last_step)


def _with_last_step(made: GaussianSteps, last_step: LastStep) -> GaussianSteps:
    if last_step == "keep":
        return made
    last, earlier = made.table[0], made.table[1:]
    if last.std > 0:
        raise ValueError(
            f"last_step={last_step!r} is for a last step without noise; this one of {made.scheduler} has std "
            f"{last.std:.4g}: use 'keep'"
        )
    if last_step != "frozen":
        return replace(made, table=(replace(last, std=float(last_step)), *earlier))
    if not earlier:
        raise ValueError("last_step='frozen' needs steps >= 2: freezing the only step leaves no chain")
    return replace(
        made, timesteps=made.timesteps[1:], table=earlier, frozen=last, finish_timestep=made.timesteps[0].clone()
    )


def _check(name: str, config: Any, steps: int, eta: float, last_step: LastStep) -> None:
    """Raise ValueError if an argument or the configuration is refused."""
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if steps > config.num_train_timesteps:
        raise ValueError(f"steps must be <= {config.num_train_timesteps}, the scheduler's training steps, got {steps}")
    if name in ("LCMScheduler", "TCDScheduler") and steps > config.original_inference_steps:
        raise ValueError(
            f"steps must be <= {config.original_inference_steps}, the {name}'s original_inference_steps, got {steps}"
        )
    if name in WITH_ETA and not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if name not in WITH_ETA and eta != 1:
        raise ValueError(f"eta must be 1.0 for {name}, whose noise follows from its schedule alone, got {eta}")
    if isinstance(last_step, str):
        if last_step not in ("keep", "frozen"):
            raise ValueError(f"last_step must be 'keep', 'frozen' or a number > 0, got {last_step!r}")
    elif isinstance(last_step, bool) or not 0 < last_step < math.inf:
        raise ValueError(f"last_step must be 'keep', 'frozen' or a finite number > 0, got {last_step!r}")
    if config.get("thresholding", False):
        raise ValueError("thresholding=True is not supported: its bound is a quantile of each sample's predicted x_0")
    known = PREDICTIONS[:1] + PREDICTIONS[2:] if name == "EulerAncestralDiscreteScheduler" else PREDICTIONS
    if config.prediction_type not in known:
        raise ValueError(
            f"prediction_type must be one of {', '.join(known)} for {name}, got {config.prediction_type!r}"
        )
    if name == "DDPMScheduler" and config.variance_type not in VARIANCES:
        why = (
            "its step takes the square root of a logarithm"
            if config.variance_type == "fixed_large_log"
            else "the network's parameters would move the noise too"
        )
        raise ValueError(f"variance_type must be one of {', '.join(VARIANCES)}, got {config.variance_type!r}: {why}")


def _check_timesteps(name: str, timesteps: Tensor, steps: int, training: int) -> None:
    """Raise ValueError if the scheduler's own timesteps are not `steps` numbers that its table holds."""
    if len(timesteps) != steps:
        raise ValueError(f"steps = {steps} gives {len(timesteps)} timesteps in {name} (rounding): use another number")
    if name != "EulerAncestralDiscreteScheduler" and not (timesteps.min() >= 0 and timesteps.max() < training):
        raise ValueError(
            f"steps = {steps} gives timesteps {int(timesteps.min())}..{int(timesteps.max())} in {name}, outside its "
            f"table 0..{training - 1}: lower steps_offset or steps"
        )


# The tables. Each lists the steps in the order of sampling, t = T first.


def _predictions(kind: str, alpha_bar: float) -> tuple[Linear, Linear]:
    """Return the predicted x_0 and the predicted noise, for x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if kind == "sample":
        return (0.0, 1.0), (1 / noise, -signal / noise)
    if kind == "v_prediction":
        return (signal, -noise), (noise, signal)
    if signal == 0:
        raise ValueError(
            "prediction_type='epsilon' cannot predict x_0 at a timestep without signal (rescale_betas_zero_snr): use "
            "'v_prediction' or 'sample', or timestep_spacing='leading'"
        )
    return (1 / signal, -noise / signal), (0.0, 1.0)


def _forward(alpha_bar: float, alpha_bar_prev: float) -> tuple[float, float]:
    """Return the forward process's coefficients from the level alpha_bar_prev to alpha_bar."""
    kept = alpha_bar / alpha_bar_prev
    return math.sqrt(kept), math.sqrt(1 - kept)


def _alphas(scheduler: Any) -> list[float]:
    """Return the scheduler's own alpha-bar table, rounded to float32 as it is."""
    return scheduler.alphas_cumprod.detach().to("cpu", torch.float64).tolist()


def _ddim(scheduler: Any, eta: float) -> list[Step]:
    config, alphas, final = scheduler.config, _alphas(scheduler), float(scheduler.final_alpha_cumprod)
    stride = config.num_train_timesteps // scheduler.num_inference_steps

    def step(timestep: int) -> Step:
        alpha = alphas[timestep]
        prev = alphas[timestep - stride] if timestep >= stride else final
        variance = eta**2 * (1 - prev) / (1 - alpha) * (1 - alpha / prev)
        # With zero terminal SNR and eta = 1 nothing is left under the root but rounding.
        direction = math.sqrt(max(0.0, 1 - prev - variance))
        x0, noise = _predictions(config.prediction_type, alpha)
        return Step(
            predict=x0,
            noise=noise,
            level=math.sqrt(1 - alpha),
            from_x0=math.sqrt(prev),
            from_x=direction * noise[0],
            from_output=direction * noise[1],
            std=math.sqrt(variance),
            forward=_forward(alpha, prev),
        )

    return [step(timestep) for timestep in scheduler.timesteps.tolist()]


def _ddpm(scheduler: Any, eta: float) -> list[Step]:
    config, alphas, timesteps = scheduler.config, _alphas(scheduler), scheduler.timesteps.tolist()

    def step(timestep: int, following: int | None) -> Step:
        alpha = alphas[timestep]
        prev = 1.0 if following is None else alphas[following]
        kept = alpha / prev
        posterior = (1 - prev) / (1 - alpha) * (1 - kept)
        variance = 1 - kept if config.variance_type == "fixed_large" else posterior
        x0, noise = _predictions(config.prediction_type, alpha)
        return Step(
            predict=x0,
            noise=noise,
            level=math.sqrt(1 - alpha),
            from_x0=math.sqrt(prev) * (1 - kept) / (1 - alpha),
            from_x=math.sqrt(kept) * (1 - prev) / (1 - alpha),
            from_output=0.0,
            std=math.sqrt(variance) if timestep > 0 else 0.0,
            forward=_forward(alpha, prev),
        )

    return [step(*pair) for pair in zip(timesteps, [*timesteps[1:], None], strict=True)]


def _euler_ancestral(scheduler: Any, eta: float) -> list[Step]:
    sigmas = scheduler.sigmas.detach().to("cpu", torch.float64).tolist()
    epsilon = scheduler.config.prediction_type == "epsilon"

    def step(sigma: float, sigma_next: float) -> Step:
        scale = 1 / math.sqrt(sigma**2 + 1)
        # sigma_up^2 + sigma_down^2 = sigma_next^2 makes sigma_down = sigma_next^2 / sigma.
        down = (sigma_next / sigma) ** 2
        return Step(
            predict=(1.0, -sigma) if epsilon else (scale**2, -sigma * scale),
            noise=(0.0, 1.0) if epsilon else (sigma * scale**2, scale),
            level=sigma,
            from_x0=1 - down,
            from_x=down,
            from_output=0.0,
            std=sigma_next * math.sqrt(1 - down),
            forward=(1.0, math.sqrt(sigma**2 - sigma_next**2)),
            input_scale=scale,
        )

    return [step(*pair) for pair in zip(sigmas, sigmas[1:], strict=False)]


def _lcm(scheduler: Any, eta: float) -> list[Step]:
    config, alphas, timesteps = scheduler.config, _alphas(scheduler), scheduler.timesteps.tolist()

    def step(timestep: int, following: int | None) -> Step:
        alpha = alphas[timestep]
        prev = 1.0 if following is None else alphas[following]
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        x0, noise = _predictions(config.prediction_type, alpha)
        return Step(
            predict=x0,
            noise=noise,
            level=math.sqrt(1 - alpha),
            from_x0=math.sqrt(prev) * out,
            from_x=math.sqrt(prev) * skip,
            from_output=0.0,
            std=math.sqrt(1 - prev),
            forward=_forward(alpha, prev),
        )

    return [step(*pair) for pair in zip(timesteps, [*timesteps[1:], None], strict=True)]


def _tcd(scheduler: Any, eta: float) -> list[Step]:
    config, alphas, timesteps = scheduler.config, _alphas(scheduler), scheduler.timesteps.tolist()

    def step(timestep: int, following: int | None) -> Step:
        target = 0 if following is None else following
        # In the scheduler's own arithmetic: floor makes of another rounding another timestep.
        between = int(torch.floor((1 - eta) * torch.tensor(target)))
        alpha, prev, alpha_between = alphas[timestep], alphas[target], alphas[between]
        x0, noise = _predictions(config.prediction_type, alpha)
        back, std = _forward(prev, alpha_between)
        direction = back * math.sqrt(1 - alpha_between)
        return Step(
            predict=x0,
            noise=noise,
            level=math.sqrt(1 - alpha),
            from_x0=back * math.sqrt(alpha_between),
            from_x=direction * noise[0],
            from_output=direction * noise[1],
            std=std,
            forward=_forward(alpha, prev),
        )

    return [step(*pair) for pair in zip(timesteps, [*timesteps[1:], None], strict=True)]


TABLES: dict[str, Callable[[Any, float], list[Step]]] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
}
WITH_ETA = ("DDIMScheduler", "TCDScheduler")
CLIPPING = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")

_MULTISTEP = "it is multistep: a step's mean depends on earlier outputs, so that the latents are no Markov chain"
_NO_NOISE = "its steps are deterministic, without noise and hence without a density"
_TWO_OUTPUTS = "a step takes two network outputs, not one"
UNKNOWN = "it is not known here that its step is Gaussian, with a mean in x_t and one network output"
REFUSED = {
    "DDIMInverseScheduler": "it runs from data to noise, " + _NO_NOISE,
    "DEISMultistepScheduler": _MULTISTEP,
    "DPMSolverMultistepScheduler": _MULTISTEP,
    "DPMSolverSDEScheduler": _TWO_OUTPUTS,
    "DPMSolverSinglestepScheduler": "a step's mean depends on several network outputs, at other timesteps",
    "EDMDPMSolverMultistepScheduler": _MULTISTEP,
    "EDMEulerScheduler": _NO_NOISE,
    "EulerDiscreteScheduler": _NO_NOISE,
    "FlowMatchEulerDiscreteScheduler": _NO_NOISE,
    "FlowMatchHeunDiscreteScheduler": _TWO_OUTPUTS,
    "HeunDiscreteScheduler": _TWO_OUTPUTS,
    "IPNDMScheduler": _MULTISTEP,
    "KDPM2AncestralDiscreteScheduler": _TWO_OUTPUTS,
    "KDPM2DiscreteScheduler": _TWO_OUTPUTS,
    "LMSDiscreteScheduler": _MULTISTEP,
    "PNDMScheduler": _MULTISTEP,
    "SASolverScheduler": _MULTISTEP,
    "UniPCMultistepScheduler": _MULTISTEP,
}
