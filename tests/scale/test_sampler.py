"""The table of Gaussian steps against each scheduler's own `step`, and against exact moments of Gaussian data."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from scale.sampler import GaussianSteps, gaussian_steps

diffusers = pytest.importorskip("diffusers")

# diffusers' Euler schedulers convert tensors by a protocol that NumPy 2 deprecates; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
COUNTS = (1, 2, 5, 10, 50)
SHAPE = (3, 2, 4, 4)


def in_float64(scheduler: Any) -> Any:
    """Return a copy that computes its steps in float64 from the same float32 tables."""
    wide = copy.deepcopy(scheduler)
    wide.alphas_cumprod = wide.alphas_cumprod.double()
    if hasattr(wide, "final_alpha_cumprod"):
        wide.final_alpha_cumprod = wide.final_alpha_cumprod.double()
    return wide


def normal(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def own_step(scheduler: Any, t: int, x: Tensor, output: Tensor, eta: float) -> tuple[Tensor, float]:
    """Return mean and standard deviation of the scheduler's own step t of T, from two of its draws."""

    def draw(seed: int) -> Tensor:
        fresh = copy.deepcopy(scheduler)
        index = len(fresh.timesteps) - t
        if hasattr(fresh, "set_begin_index"):
            fresh.set_begin_index(index)
        timestep = fresh.timesteps[index]
        fresh.scale_model_input(x, timestep)
        options = {"eta": eta} if type(fresh).__name__ in ("DDIMScheduler", "TCDScheduler") else {}
        return fresh.step(output, timestep, x, generator=torch.Generator().manual_seed(seed), **options).prev_sample

    first, second = normal(1, x.dtype), normal(2, x.dtype)
    sample = draw(1)
    gap = first - second
    std = float(((sample - draw(2)) * gap).sum() / gap.square().sum())
    return sample - std * first, std


def gap(made: GaussianSteps, scheduler: Any, eta: float = 1.0, dtype: torch.dtype = torch.float64) -> float:
    """Return the largest difference between table and scheduler, of means or stds, relative to the latents' size."""
    own = copy.deepcopy(scheduler)
    own.set_timesteps(made.steps)
    differences = []
    # All steps of short chains; of long ones the first two, the last two and some between.
    for t in {1, 2, made.steps // 2, made.steps - 1, made.steps} & set(range(1, made.steps + 1)):
        x, output = made.initial_std * normal(10 + t, dtype), normal(100 + t, dtype)
        mean, std = own_step(own, t, x, output, eta)
        ours = made.mean(x, output, t)
        assert ours.dtype == dtype
        assert made.timesteps[t - 1] == own.timesteps[made.steps - t]
        seen = made.network_input(x, t)
        fresh = copy.deepcopy(own)
        torch.testing.assert_close(seen, fresh.scale_model_input(x, made.timesteps[t - 1]), rtol=1e-6, atol=1e-7)
        size = 1 + float(torch.maximum(mean.abs(), x.abs()).max())
        differences += [float((ours - mean).abs().max()) / size, abs(made.std(t) - std) / (1 + std)]
    return max(differences)


def schedulers(**extra: Any) -> list[Any]:
    """Return every supported scheduler in Stable Diffusion's schedule; `extra` is DDIM's."""
    schedule = {k: SD[k] for k in ("beta_schedule", "beta_start", "beta_end")}
    return [
        diffusers.DDIMScheduler(**SD | extra),
        diffusers.DDPMScheduler(**schedule, clip_sample=False),
        diffusers.LCMScheduler(**schedule),
        diffusers.TCDScheduler(**schedule),
        diffusers.EulerAncestralDiscreteScheduler(**schedule),
    ]


# Against the scheduler's own step


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_is_its_scheduler(spacing: str, steps: int) -> None:
    for prediction in PREDICTIONS:
        for clip, one, eta in ((True, True, 0.3), (False, False, 1.0), (True, False, 1.0), (False, True, 0.3)):
            scheduler = diffusers.DDIMScheduler(
                timestep_spacing=spacing,
                prediction_type=prediction,
                clip_sample=clip,
                clip_sample_range=0.7,
                set_alpha_to_one=one,
            )
            made = gaussian_steps(scheduler, steps, eta)
            assert gap(made, in_float64(scheduler), eta) < 1e-11


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_is_its_scheduler(variance: str, steps: int) -> None:
    for prediction, clip in ((p, c) for p in PREDICTIONS for c in (True, False)):
        for spacing in SPACINGS:
            scheduler = diffusers.DDPMScheduler(
                variance_type=variance, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing
            )
            # 1.1e-10: the scheduler raises a variance of 0 to 1e-20.
            assert gap(gaussian_steps(scheduler, steps), in_float64(scheduler)) < 1.1e-10


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm_and_tcd_are_their_schedulers(prediction: str, steps: int) -> None:
    for clip in (True, False):
        scheduler = diffusers.LCMScheduler(prediction_type=prediction, clip_sample=clip)
        # The boundary scalings are float32 in the scheduler, whose timestep is a tensor.
        assert gap(gaussian_steps(scheduler, steps), in_float64(scheduler)) < 2e-7
        tcd = diffusers.TCDScheduler(prediction_type=prediction, clip_sample=clip)
        for eta in (0.0, 0.3, 0.7, 1.0):
            assert gap(gaussian_steps(tcd, steps, eta), in_float64(tcd), eta) < 1e-11


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_euler_is_its_scheduler(spacing: str, steps: int) -> None:
    for prediction in ("epsilon", "v_prediction"):
        scheduler = diffusers.EulerAncestralDiscreteScheduler(prediction_type=prediction, timestep_spacing=spacing)
        made = gaussian_steps(scheduler, steps)
        # It computes in float32, whatever it is given.
        assert gap(made, scheduler) < 1e-6
        own = copy.deepcopy(scheduler)
        own.set_timesteps(steps)
        assert made.initial_std == float(own.init_noise_sigma)
        assert made.initial(torch.ones(1)) == own.init_noise_sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_untouched_schedulers_agree_to_their_float32_coefficients(dtype: torch.dtype) -> None:
    for scheduler in schedulers():
        for steps in (2, 10, 50):
            assert gap(gaussian_steps(scheduler, steps), scheduler, dtype=dtype) < 1e-6


def test_stable_diffusion_has_a_density_at_every_step() -> None:
    scheduler = diffusers.DDIMScheduler(**SD)
    for steps in COUNTS:
        for eta in (0.3, 1.0):
            made = gaussian_steps(scheduler, steps, eta)
            assert gap(made, in_float64(scheduler), eta) < 1e-11
            assert made.without_density == ()
    assert gaussian_steps(scheduler, 50).std(1) == pytest.approx(0.0206, abs=5e-5)
    assert gaussian_steps(scheduler, 50).timesteps[[0, -1]].tolist() == [1, 981]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_zero_terminal_snr(prediction: str, spacing: str) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": prediction, "timestep_spacing": spacing}
    for steps in (2, 7, 50):
        ddim = diffusers.DDIMScheduler(**SD | {"steps_offset": 0} | options)
        assert gap(gaussian_steps(ddim, steps, 0.3), in_float64(ddim), 0.3) < 1e-11
        ddpm = diffusers.DDPMScheduler(**options)
        assert gap(gaussian_steps(ddpm, steps), in_float64(ddpm)) < 1.1e-10
        # At eta = 1 only rounding is left under diffusers' root, at times below 0, and its sample is nan. Ours is
        # the mean without that direction: sqrt(alpha_bar_prev) times the predicted x_0.
        made = gaussian_steps(ddim, steps, 1.0)
        output = normal(0, torch.float64)
        predicted = output if prediction == "sample" else -output
        prev = float(ddim.alphas_cumprod[999 - 1000 // steps])
        mean = made.mean(normal(1, torch.float64), output, steps)
        torch.testing.assert_close(mean, math.sqrt(prev) * predicted, rtol=1e-7, atol=1e-7)
        assert made.std(steps) == pytest.approx(math.sqrt(1 - prev))


def test_zero_terminal_snr_needs_another_prediction_than_epsilon() -> None:
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="cannot predict x_0 at a timestep without signal"):
        gaussian_steps(scheduler, 10)
    # 'leading' spacing never asks at the last training step.
    leading = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert gap(gaussian_steps(leading, 10), in_float64(leading)) < 1e-11


# The noise that an output stands for


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predicted_noise_and_x0_are_the_schedulers(prediction: str) -> None:
    x, output = normal(1, torch.float64), normal(2, torch.float64)
    options = {"prediction_type": prediction, "clip_sample": False}
    made_by = [diffusers.DDIMScheduler(**SD | options), diffusers.DDPMScheduler(**options)]
    made_by += [diffusers.LCMScheduler(**options), diffusers.TCDScheduler(prediction_type=prediction)]
    for scheduler in map(in_float64, made_by):
        made = gaussian_steps(scheduler, 10)
        scheduler.set_timesteps(10)
        for t in (1, 4, 10):
            timestep = made.timesteps[t - 1]
            alpha = float(scheduler.alphas_cumprod[int(timestep)])
            epsilon = made.noise(x, output, t)
            x0 = made.denoised(x, epsilon, t)
            assert made.noise_level(t) == pytest.approx(math.sqrt(1 - alpha), rel=1e-12)
            torch.testing.assert_close(math.sqrt(alpha) * x0 + math.sqrt(1 - alpha) * epsilon, x, rtol=1e-9, atol=1e-9)
            if isinstance(scheduler, diffusers.DDIMScheduler | diffusers.DDPMScheduler):
                own = scheduler.step(output, timestep, x).pred_original_sample
                torch.testing.assert_close(x0, own, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(made.step(x, epsilon, t), made.mean(x, output, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predicted_noise_of_ancestral_euler(prediction: str) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(prediction_type=prediction)
    made = gaussian_steps(scheduler, 10)
    scheduler.set_timesteps(10)
    x, output = normal(1, torch.float64), normal(2, torch.float64)
    for t in (10, 4, 1):
        sigma = float(scheduler.sigmas[10 - t])
        epsilon = made.noise(x, output, t)
        assert made.noise_level(t) == sigma
        torch.testing.assert_close(made.denoised(x, epsilon, t) + sigma * epsilon, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(made.step(x, epsilon, t), made.mean(x, output, t), rtol=1e-10, atol=1e-10)
        fresh = copy.deepcopy(scheduler)
        fresh.set_begin_index(10 - t)
        fresh.scale_model_input(x, fresh.timesteps[10 - t])
        own = fresh.step(output, fresh.timesteps[10 - t], x).pred_original_sample
        torch.testing.assert_close(made.denoised(x, epsilon, t), own.double(), rtol=1e-5, atol=1e-5)


def test_predicted_x0_is_not_clipped_but_the_step_is() -> None:
    made = gaussian_steps(diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.1), 5)
    x, output = normal(1, torch.float64), normal(2, torch.float64)
    assert float(made.denoised(x, output, 3).abs().max()) > 0.1
    assert torch.equal(made.noise(x, output, 3), output)
    assert torch.equal(made.step(x, output, 3), made.mean(x, output, 3))


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_noise_alone_says_nothing_of_x0(prediction: str) -> None:
    options = {"rescale_betas_zero_snr": True, "prediction_type": prediction, "timestep_spacing": "trailing"}
    made = gaussian_steps(diffusers.DDIMScheduler(**SD | {"steps_offset": 0} | options), 5)
    x, output = normal(1, torch.float64), normal(2, torch.float64)
    assert torch.equal(made.noise(x, output, 5), x)
    for call in (made.denoised, made.step):
        with pytest.raises(ValueError, match="epsilon says nothing of x_0 at a timestep without signal"):
            call(x, x, 5)
    epsilon = made.noise(x, output, 4)
    torch.testing.assert_close(made.step(x, epsilon, 4), made.mean(x, output, 4), rtol=1e-9, atol=1e-9)


def test_the_comparison_finds_planted_mistakes() -> None:
    scheduler = diffusers.DDIMScheduler(**SD)
    made = gaussian_steps(scheduler, 10)
    alphas = [float(scheduler.alphas_cumprod[int(i)]) for i in made.timesteps]

    def planted(prev: list[float], subtract: bool = True, root: bool = True) -> GaussianSteps:
        """Return a DDIM table (eta = 1, epsilon) written from the paper's eq. (12), with room for mistakes."""
        rows = []
        for row, alpha, below in zip(made.table, alphas, prev, strict=True):
            variance = (1 - below) / (1 - alpha) * (1 - alpha / below)
            direction = math.sqrt(1 - below - subtract * variance)
            std = math.sqrt(variance) if root else variance
            rows.append(replace(row, from_x0=math.sqrt(below), from_output=direction, std=std))
        return replace(made, table=tuple(rows))

    final = float(scheduler.final_alpha_cumprod)
    right = [final, *alphas[:-1]]
    own = in_float64(scheduler)
    assert gap(planted(right), own) < 1e-11
    assert gap(planted([final, final, *alphas[:-2]]), own) > 1e-2  # alpha_prev of the wrong neighbour
    assert gap(planted([1.0, *alphas[:-1]]), own) > 1e-4  # set_alpha_to_one ignored
    assert gap(planted(right, subtract=False), own) > 1e-2  # sigma^2 not subtracted under the root
    assert gap(planted(right, root=False), own) > 1e-2  # the variance taken for the standard deviation
    assert gap(replace(made, clip=1.0), own) > 1e-2
    assert gap(gaussian_steps(scheduler, 10, 0.9), own) > 1e-2


def test_the_scheduler_is_left_as_it_is() -> None:
    for scheduler in schedulers():
        scheduler.set_timesteps(7)
        before = {k: copy.deepcopy(v) for k, v in vars(scheduler).items()}
        gaussian_steps(scheduler, 5)
        assert vars(scheduler).keys() == before.keys()
        for key, value in before.items():
            now = vars(scheduler)[key]
            assert torch.equal(now, value) if isinstance(value, Tensor) else now == value


# The last step


def test_a_last_step_without_noise_is_never_silent() -> None:
    for scheduler in schedulers(set_alpha_to_one=True):
        kept = gaussian_steps(scheduler, 5)
        assert kept.std(1) == 0
        assert kept.without_density == (1,)
        assert not kept.frozen_last
        assert "no density at t = 1" in kept.describe()

        given = gaussian_steps(scheduler, 5, last_step=0.02)
        x, output = normal(1, torch.float64), normal(2, torch.float64)
        assert given.std(1) == 0.02
        assert given.without_density == ()
        assert torch.equal(given.mean(x, output, 1), kept.mean(x, output, 1))
        assert [given.std(t) for t in range(2, 6)] == [kept.std(t) for t in range(2, 6)]

        frozen = gaussian_steps(scheduler, 5, last_step="frozen")
        assert (frozen.steps, frozen.frozen_last, frozen.without_density) == (4, True, ())
        assert torch.equal(frozen.timesteps, kept.timesteps[1:])
        assert frozen.finish_timestep == kept.timesteps[0]
        assert torch.equal(frozen.finish(x, output), kept.mean(x, output, 1))
        assert torch.equal(frozen.finish_input(x), kept.network_input(x, 1))
        for t in range(1, 5):
            assert torch.equal(frozen.mean(x, output, t), kept.mean(x, output, t + 1))
            assert frozen.std(t) == kept.std(t + 1)
        assert "every step has a density; its noise-free last step is frozen" in frozen.describe()


def test_a_last_step_with_noise_is_not_replaced() -> None:
    scheduler = diffusers.DDIMScheduler(**SD)
    for last_step in ("frozen", 0.02):
        with pytest.raises(ValueError, match=r"for a last step without noise; this one .* std 0.0206"):
            gaussian_steps(scheduler, 50, last_step=last_step)
    with pytest.raises(ValueError, match="finish needs steps made with last_step='frozen'"):
        gaussian_steps(scheduler, 50).finish(torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="finish needs"):
        gaussian_steps(scheduler, 50).finish_input(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="freezing the only step leaves no chain"):
        gaussian_steps(diffusers.DDPMScheduler(), 1, last_step="frozen")


def test_without_noise_there_are_no_densities() -> None:
    made = gaussian_steps(diffusers.DDIMScheduler(**SD), 10, eta=0.0)
    assert made.without_density == tuple(range(1, 11))
    assert "no density at 10 of 10 steps" in made.describe()
    assert "\n" not in made.describe()


# Exact moments: x_0 ~ N(0, s^2), whose best predictor of the noise is linear


def level(made: GaussianSteps, scheduler: Any, timestep: int) -> tuple[float, float]:
    """Return (a, b) with x = a x_0 + b noise at a timestep, from the betas."""
    alpha_bar = float((1 - scheduler.betas.double())[: timestep + 1].prod())
    if made.scheduler == "EulerAncestralDiscreteScheduler":
        return 1.0, math.sqrt((1 - alpha_bar) / alpha_bar)
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def variance_at(place: tuple[float, float], s: float) -> float:
    return place[0] ** 2 * s**2 + place[1] ** 2


def pushed(made: GaussianSteps, t: int, place: tuple[float, float], s: float, variance: float) -> tuple[float, float]:
    """Return the exact variance of x_{t-1} if x_t has the given one: as the step is, and with what it leaves out.

    The step takes x_0 for its best prediction. The spread of x_0 about it, s^2 b^2 / (a^2 s^2 + b^2), is left out.
    """
    (a, b), one = place, torch.ones(1, 1, dtype=torch.float64)
    slope = float(made.mean(one, b / variance_at(place, s) * one, t))
    on_x0 = float(made.mean(0 * one, -a / b * one, t))  # with the true noise (x - a x_0) / b
    step = slope**2 * variance + made.std(t) ** 2
    return step, step + on_x0**2 * s**2 * b**2 / variance_at(place, s)


def off_the_marginals(made: GaussianSteps, scheduler: Any, ends: tuple[float, float], s: float = 0.5) -> float:
    """Return how far, relatively, the completed steps are from leading from each level's marginal to the next one's."""
    places = [ends, *(level(made, scheduler, int(i)) for i in made.timesteps)]
    worst = 0.0
    for t in range(1, made.steps + 1):
        reached = pushed(made, t, places[t], s, variance_at(places[t], s))[1]
        worst = max(worst, abs(reached / variance_at(places[t - 1], s) - 1))
    return worst


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_every_step_leads_from_marginal_to_marginal(steps: int) -> None:
    clean = (1.0, 0.0)
    for eta in (0.0, 0.3, 1.0):
        ddim = diffusers.DDIMScheduler(**SD)
        made = gaussian_steps(ddim, steps, eta)
        assert off_the_marginals(made, ddim, level(made, ddim, 0)) < 1e-5
        assert off_the_marginals(made, ddim, clean) > 1e-4  # the ends are told apart
        tcd = diffusers.TCDScheduler()
        made = gaussian_steps(tcd, steps, eta)
        assert off_the_marginals(made, tcd, level(made, tcd, 0)) < 1e-5
    for spacing in SPACINGS:
        ddpm = diffusers.DDPMScheduler(clip_sample=False, timestep_spacing=spacing)
        assert off_the_marginals(gaussian_steps(ddpm, steps), ddpm, clean) < 1e-5
    euler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="leading")
    made = gaussian_steps(euler, steps)
    assert off_the_marginals(made, euler, clean) < 1e-5


def test_the_marginals_find_planted_mistakes_and_an_oddity_of_diffusers() -> None:
    clean = (1.0, 0.0)
    for scheduler in (
        diffusers.DDPMScheduler(clip_sample=False),
        diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="leading"),
    ):
        made = gaussian_steps(scheduler, 10)
        halved = replace(made, table=tuple(replace(row, std=row.std / 2) for row in made.table))
        assert off_the_marginals(halved, scheduler, clean) > 0.01
        shifted = replace(made, timesteps=made.timesteps + 10)
        assert off_the_marginals(shifted, scheduler, clean) > 0.01
    # DDIM's stride ignores the spacing, so that with 'linspace' a step leads to another level than the next one's.
    odd = diffusers.DDIMScheduler(**SD | {"timestep_spacing": "linspace"})
    made = gaussian_steps(odd, 10)
    assert off_the_marginals(made, odd, level(made, odd, 0)) > 0.01


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
def test_a_thousand_ddpm_steps_make_gaussian_data(s: float) -> None:
    ends = {}
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = diffusers.DDPMScheduler(variance_type=variance_type, clip_sample=False)
        made = gaussian_steps(scheduler, 1000)
        variance = whole = 1.0
        for t in range(1000, 0, -1):
            place = level(made, scheduler, int(made.timesteps[t - 1]))
            variance, whole = (pushed(made, t, place, s, variance)[0], pushed(made, t, place, s, whole)[1])
        ends[variance_type] = variance
        if variance_type == "fixed_small":
            assert whole == pytest.approx(s**2, rel=1e-3)
    assert ends["fixed_large"] == pytest.approx(s**2, rel=0.01)
    # The smaller variance is right for data without spread only (Ho et al., section 3.2): short by less than 2 %.
    assert 0.98 * s**2 < ends["fixed_small"] < s**2


@pytest.mark.parametrize("last_step", ["keep", "frozen"])
@pytest.mark.parametrize("s", [0.1, 2.0])
def test_a_renoised_sample_has_the_law_of_x_1(s: float, last_step: Any) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for scheduler, ends in (
        (diffusers.DDPMScheduler(clip_sample=False), (1.0, 0.0)),
        (diffusers.DDIMScheduler(clip_sample=False), (1.0, 0.0)),
        (diffusers.DDIMScheduler(**SD), None),
        (diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="leading"), (1.0, 0.0)),
        (diffusers.LCMScheduler(), (1.0, 0.0)),
        (diffusers.TCDScheduler(), None),
    ):
        if last_step == "frozen" and ends is None and type(scheduler).__name__ == "DDIMScheduler":
            continue  # its last step has noise
        made = gaussian_steps(scheduler, 20, last_step=last_step)
        if made.finish_timestep is not None:
            end = level(made, scheduler, int(made.finish_timestep))
        else:
            end = ends or level(made, scheduler, 0)
        start = level(made, scheduler, int(made.timesteps[0]))
        scale, std = float(made.renoise(one, 0 * one)), float(made.renoise(0 * one, one))
        assert scale**2 * variance_at(end, s) + std**2 == pytest.approx(variance_at(start, s), rel=1e-5)


def test_renoising_clean_samples_is_the_schedulers_own() -> None:
    for scheduler in schedulers(set_alpha_to_one=True):
        if type(scheduler).__name__ == "TCDScheduler":
            continue  # its last step ends at alpha_bar of timestep 0, not at 1
        made = gaussian_steps(scheduler, 5)
        x, noise = normal(1, torch.float64), normal(2, torch.float64)
        own = copy.deepcopy(scheduler)
        own.set_timesteps(5)
        expected = own.add_noise(x, noise, own.timesteps[-1:].expand(len(x)))
        torch.testing.assert_close(made.renoise(x, noise), expected, rtol=1e-5, atol=1e-6)


# Derivatives


@pytest.mark.parametrize("clip", [True, False])
def test_means_are_differentiable(clip: bool) -> None:
    made = gaussian_steps(diffusers.DDIMScheduler(clip_sample=clip), 5, last_step=0.1)
    x = (0.1 * normal(1, torch.float64)[:1, :1]).requires_grad_()
    output = (0.1 * normal(2, torch.float64)[:1, :1]).requires_grad_()
    for t in range(1, 6):
        assert torch.autograd.gradcheck(lambda a, b, t=t: made.mean(a, b, t), (x, output))

    def one(a: Tensor) -> Tensor:
        return made.mean(a[None], output.detach()[0][None], 2)[0]

    batch = torch.stack([x.detach()[0], 2 * x.detach()[0]])
    together = made.mean(batch, output.detach()[0].expand(2, -1, -1, -1), 2)
    torch.testing.assert_close(torch.func.vmap(one)(batch), together)


def test_clipping_cuts_the_gradient_where_it_acts() -> None:
    made = gaussian_steps(diffusers.DDIMScheduler(prediction_type="sample", clip_sample=True), 5, last_step=0.1)
    output = torch.tensor([[0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    made.mean(torch.zeros(1, 2, dtype=torch.float64), output, 1).sum().backward()
    assert output.grad is not None
    assert output.grad.tolist() == [[1.0, 0.0]]


# Refusals


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("DPMSolverMultistepScheduler", "multistep"),
        ("PNDMScheduler", "multistep"),
        ("UniPCMultistepScheduler", "multistep"),
        ("EulerDiscreteScheduler", "deterministic"),
        ("FlowMatchEulerDiscreteScheduler", "deterministic"),
        ("HeunDiscreteScheduler", "two network outputs"),
        ("DDIMParallelScheduler", "not known here"),
    ],
)
def test_other_schedulers_are_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^scheduler {name} is not supported: .*{why}.*; supported are DDIMSch.*TCD"):
        gaussian_steps(getattr(diffusers, name)(), 10)


def test_a_subclass_may_step_otherwise_and_is_refused() -> None:
    class Altered(diffusers.DDIMScheduler):
        pass

    with pytest.raises(ValueError, match="scheduler Altered is not supported"):
        gaussian_steps(Altered(), 10)


@pytest.mark.parametrize(
    ("scheduler", "options", "arguments", "message"),
    [
        ("DDIMScheduler", {}, {"steps": 0}, "steps must be an integer >= 1, got 0"),
        ("DDIMScheduler", {}, {"steps": 2.5}, "steps must be an integer >= 1, got 2.5"),
        ("DDIMScheduler", {}, {"steps": True}, "steps must be an integer >= 1, got True"),
        ("DDIMScheduler", {}, {"steps": 1001}, "steps must be <= 1000, the scheduler's training steps, got 1001"),
        ("LCMScheduler", {}, {"steps": 51}, "steps must be <= 50, the LCMScheduler's original_inference_steps"),
        ("DDIMScheduler", {}, {"eta": -0.1}, r"eta must be in \[0, 1\], got -0.1"),
        ("DDIMScheduler", {}, {"eta": 1.1}, r"eta must be in \[0, 1\], got 1.1"),
        ("DDIMScheduler", {}, {"eta": math.nan}, r"eta must be in \[0, 1\], got nan"),
        ("DDPMScheduler", {}, {"eta": 0.3}, "eta must be 1.0 for DDPMScheduler, whose noise follows from its schedule"),
        ("LCMScheduler", {}, {"eta": 0.0}, "eta must be 1.0 for LCMScheduler"),
        ("EulerAncestralDiscreteScheduler", {}, {"eta": 0.5}, "eta must be 1.0 for EulerAncestral"),
        ("DDIMScheduler", {}, {"last_step": 0.0}, "last_step must be 'keep', 'frozen' or a finite number > 0, got 0.0"),
        ("DDIMScheduler", {}, {"last_step": math.inf}, "last_step must be .* got inf"),
        ("DDIMScheduler", {}, {"last_step": True}, "last_step must be .* got True"),
        ("DDIMScheduler", {}, {"last_step": "drop"}, "last_step must be .* got 'drop'"),
        ("DDIMScheduler", {"thresholding": True}, {}, "thresholding=True is not supported"),
        ("DDIMScheduler", {"prediction_type": "flow"}, {}, "prediction_type must be one of epsilon, sample, v_pred"),
        (
            "EulerAncestralDiscreteScheduler",
            {"prediction_type": "sample"},
            {},
            "epsilon, v_prediction for Euler",
        ),
        ("DDPMScheduler", {"variance_type": "learned"}, {}, "variance_type must be .* got 'learned'"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}, "variance_type must be .* got 'learned_range'"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, {}, "'fixed_large_log': .* root of a logarithm"),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"steps": 61}, "steps = 61 gives 62 timesteps"),
        ("DDIMScheduler", {"steps_offset": 1}, {"steps": 1000}, r"timesteps 1..1000 .* outside its table 0..999"),
    ],
)
def test_bad_input(scheduler: str, options: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        gaussian_steps(getattr(diffusers, scheduler)(**options), **{"steps": 10} | arguments)
    assert "\n" not in str(raised.value)


def test_bad_steps_and_outputs() -> None:
    made = gaussian_steps(diffusers.DDIMScheduler(**SD), 10)
    x = torch.zeros(2, 4, 3, 3)
    for t in (0, 11):
        with pytest.raises(ValueError, match=rf"t must be in 1..10, got {t}"):
            made.std(t)
    with pytest.raises(ValueError, match=r"output has shape \(2, 8, 3, 3\), the latents \(2, 4, 3, 3\)"):
        made.mean(x, torch.zeros(2, 8, 3, 3), 1)
    assert made.mean(x, x.double(), 1).dtype == torch.float32


def test_descriptions() -> None:
    assert gaussian_steps(diffusers.DDIMScheduler(**SD), 50).describe() == (
        "DDIMScheduler, 50 steps, eta 1, guidance excluded: std 0.4545 at the first step (t = 50), 0.02065 at the last "
        "(t = 1); every step has a density"
    )
