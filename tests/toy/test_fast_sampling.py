"""Samplers of few steps: exact laws for Gaussian data, optimal variances by brute force, and a learned network."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.chain import Params, rollout, step_log_prob
from algorithms.estimators import first_order
from algorithms.guidance import Guided, Linearised, Predicting, guided_sampling
from theory import ddpm as theory
from theory import schedules
from theory.gaussian import Gaussian, affine, w2_squared
from theory.mixture import GaussianMixture
from toy.data import DATA
from toy.ddpm import MLPChain, initial_parameters, train
from toy.distances import sliced_wasserstein2
from toy.experiments import generator
from toy.fast_sampling import FastChain, Unexplained, analytic_dpm, ddim, ddpm, subsequence, unexplained_noise
from toy.mixture_chain import MixtureChain
from verdicts.streams import Stream

STREAM = Stream(6).child("tests", "fast sampling")
SCHEDULE = schedules.linear(100, 1e-3, 0.12)
TIMES = (3, 10, 40, 100)
KINDS: tuple[Unexplained, ...] = ("residual", "norm")
LEVELS = SCHEDULE.alpha_bar[[time - 1 for time in TIMES]]
STRIDED = schedules.NoiseSchedule.from_alpha_bar(LEVELS)
SKEWED = Gaussian([0.5, -1.0], [[0.5, 0.3], [0.3, 0.4]])
ROUND = Gaussian([0.5, -1.0], 0.3 * np.eye(2))


@dataclass(frozen=True, eq=False)
class Exact:
    """The best noise prediction, E[noise | x_t], for Gaussian data, plus `bias`."""

    data: Gaussian
    alpha_bar: Tensor
    bias: float = 0.0

    @classmethod
    def of(cls, data: Gaussian, bias: float = 0.0) -> "Exact":
        return cls(data, torch.tensor(SCHEDULE.alpha_bar), bias)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.data.dim,)

    def epsilon(self, params: Params, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
        time = int(t[0])
        assert bool((t == time).all())
        level = float(self.alpha_bar[time - 1])
        cov = torch.tensor(level * self.data.cov + (1 - level) * np.eye(self.data.dim))
        centred = x - math.sqrt(level) * torch.tensor(self.data.mean)
        return math.sqrt(1 - level) * torch.linalg.solve(cov, centred.T).T + self.bias


@dataclass(frozen=True, eq=False)
class ExactMixture:
    """The best noise prediction for mixture data, -sqrt(1 - alpha_bar) times the score."""

    mixture: MixtureChain
    shape: tuple[int, ...] = (2,)

    @property
    def alpha_bar(self) -> Tensor:
        return self.mixture.alpha_bar

    def epsilon(self, params: Params, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
        time = int(t[0])
        return -(1 - self.alpha_bar[time - 1]).sqrt() * self.mixture.score(x, time)


MIXTURE = GaussianMixture([0.6, 0.4], [[-1.0, 0.0], [0.8, 0.5]], [0.05 * np.eye(2), 0.1 * np.eye(2)])


def exact_mixture() -> ExactMixture:
    return ExactMixture(MixtureChain.of(MIXTURE, SCHEDULE))


def output(chain: FastChain | Guided) -> Gaussian:
    """The exact law of x_0 of a chain with affine means, from N(0, I)."""
    law = Gaussian(np.zeros(2), np.eye(2))
    for t in range(chain.steps, 0, -1):
        offset, *columns = chain.mean({}, torch.cat([torch.zeros(1, 2), torch.eye(2)]).double(), t, None).numpy()
        slope = np.stack(columns, 1) - offset[:, None]
        law = affine(law, slope, offset, chain.std(t) ** 2 * np.eye(2))
    return law


def same_law(a: Gaussian, b: Gaussian) -> None:
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(a.cov, b.cov, rtol=1e-11, atol=1e-13)


def points_of(law: Gaussian, n: int, name: str) -> Tensor:
    normal = STREAM.child(name).generator().normal(size=(n, law.dim))
    return torch.tensor(law.mean + normal @ np.linalg.cholesky(law.cov).T)


# Gaussian data: the whole law, exactly


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_has_the_law_of_the_theory(eta: float) -> None:
    chain = ddim(Exact.of(SKEWED), TIMES, eta)
    same_law(output(chain), theory.ddim_law(SKEWED, LEVELS, eta))
    assert all((std > 0) == (eta > 0) for std in chain.stds[1:])
    assert chain.stds[0] == 0


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ddpm_has_the_law_of_ancestral_sampling_on_the_skipping_schedule(variance: theory.Variance) -> None:
    assert variance != "optimal"
    same_law(output(ddpm(Exact.of(SKEWED), TIMES, variance)), theory.ancestral_law(SKEWED, STRIDED, variance))


def optimal_variances(data_variance: float, eta: float) -> np.ndarray:
    """Var(x' | x) for Gaussian data of one variance, by conditioning in the joint law of (x, x') given no x_0."""
    variances = []
    for now, then in zip(LEVELS, [1.0, *LEVELS[:-1]], strict=True):
        given = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        # (x_0, noise, z) are independent; x and x' are linear in them.
        x = np.array([math.sqrt(now), math.sqrt(1 - now), 0.0])
        ahead = np.array([math.sqrt(then), math.sqrt(max(1 - then - given, 0.0)), math.sqrt(given)])
        joint = np.stack([x, ahead]) @ np.diag([data_variance, 1.0, 1.0]) @ np.stack([x, ahead]).T
        variances.append(joint[1, 1] - joint[0, 1] ** 2 / joint[0, 0])
    return np.array(variances)


def test_optimal_variance_of_the_reference_is_the_theory_s_at_eta_1() -> None:
    _, expected = theory.ancestral_steps([0.3], STRIDED, "optimal")
    np.testing.assert_allclose(optimal_variances(0.3, 1.0), expected[:, 0], rtol=1e-10)


def norm_error(n: int, eta: float) -> np.ndarray:
    """Bound on the standard error, (S,), of the variance with "norm", for the best prediction in two dimensions.

    By Jensen E|e|^4 <= E|noise|^4 = d^2 + 2d, so the mean of |e|^2 / d over n points has variance at most 2 / n.
    """
    then = np.array([1.0, *LEVELS[:-1]])
    given = eta**2 * (1 - then) / (1 - LEVELS) * (1 - LEVELS / then)
    gap = np.sqrt(then * (1 - LEVELS) / LEVELS) - np.sqrt(np.maximum(1 - then - given, 0))
    return gap**2 * math.sqrt(2 / n)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_variance_is_the_gaussian_optimum(eta: float) -> None:
    n, full, optimum = 60_000, Exact.of(ROUND), optimal_variances(0.3, eta)
    residual, norm = (
        np.square(analytic_dpm(full, {}, points_of(ROUND, n, "points"), TIMES, STREAM, eta, kind).stds)
        for kind in KINDS
    )
    # The square of a Gaussian in two dimensions has relative deviation 1: four standard errors.
    np.testing.assert_allclose(residual, optimum, rtol=4 / math.sqrt(n))
    assert (np.abs(norm - optimum) < 4 * norm_error(n, eta)).all()
    assert np.abs(np.square(ddpm(full, TIMES, "beta").stds) / optimum - 1).max() > 0.25  # beta is told apart


def test_residual_is_the_steadier_estimate_where_noise_is_explained() -> None:
    full, points = Exact.of(ROUND), points_of(ROUND, 500, "points")
    residual, norm = (
        [unexplained_noise(full, {}, points, (100,), STREAM.child("repeat", i), kind)[0] for i in range(100)]
        for kind in KINDS
    )
    truth = LEVELS[-1] * 0.3 / (LEVELS[-1] * 0.3 + 1 - LEVELS[-1])
    assert np.mean(residual) == pytest.approx(truth, rel=0.02)
    assert np.std(norm) > 10 * np.std(residual)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_the_optimal_variance_few_steps_lose_nothing(eta: float) -> None:
    """Round Gaussian data: every reverse step is the exact conditional, so only x_T ~ N(0, I) is wrong."""
    exact = ddim(Exact.of(ROUND), TIMES, eta)
    chain = FastChain(exact.full, exact.times, exact.given, tuple(np.sqrt(optimal_variances(0.3, eta)).tolist()))
    estimated = analytic_dpm(exact.full, {}, points_of(ROUND, 60_000, "points"), TIMES, STREAM, eta)
    start = LEVELS[-1] * (0.5**2 + 1 + 2 * (1 - math.sqrt(0.3)) ** 2)
    assert w2_squared(output(chain), ROUND) < start
    assert w2_squared(output(estimated), ROUND) < 2 * start + 1e-4
    assert w2_squared(output(exact), ROUND) > 1e-3 or eta == 0  # the variance of DDIM


def test_all_times_give_the_chain_of_all_steps() -> None:
    full = MLPChain.of(schedules.linear(6, 0.05, 0.5))
    params = initial_parameters(full, 12, STREAM)
    x = torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=torch.float64)
    chain = ddpm(full, range(1, 7))
    for t in range(1, 7):
        np.testing.assert_allclose(chain.mean(params, x, t, None), full.mean(params, x, t, None), rtol=1e-12)
        assert chain.std(t) == pytest.approx(full.std(t), rel=1e-12)
    np.testing.assert_allclose(chain.renoise(x, 2 * x), full.renoise(x, 2 * x), rtol=1e-12)


# Mixtures, and predictions that are not the best: the optimal variance by simulation


def simulated(full: Exact | ExactMixture, points: Tensor, eta: float) -> np.ndarray:
    """E|x' - mean(x)|^2 / d along the forward process of DDIM, (S,), and its standard errors: (2, S)."""
    chain = ddim(full, TIMES, eta)
    found = []
    for t in range(1, chain.steps + 1):
        now, then = chain.levels(t)
        source = torch.Generator().manual_seed(STREAM.child("simulated", t).integer())
        noise, z = torch.randn(2, *points.shape, generator=source, dtype=torch.float64)
        x = math.sqrt(now) * points + math.sqrt(1 - now) * noise
        to_noise = (x - math.sqrt(now) * points) / math.sqrt(1 - now)
        ahead = math.sqrt(then) * points + math.sqrt(max(1 - then - chain.given[t - 1] ** 2, 0.0)) * to_noise
        square = (ahead + chain.given[t - 1] * z - chain.mean({}, x, t, None)).square().mean(1)
        found.append((float(square.mean()), float(square.std()) / math.sqrt(len(square))))
    return np.array(found).T


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_is_the_mean_squared_error_of_the_step_on_a_mixture(eta: float) -> None:
    n, full = 40_000, exact_mixture()
    points = torch.tensor(mixture_points(n, "mixture"))
    value, error = simulated(full, torch.tensor(mixture_points(n, "other")), eta)
    residual, norm = (np.square(analytic_dpm(full, {}, points, TIMES, STREAM, eta, kind).stds) for kind in KINDS)
    assert (np.abs(residual - value) < 6 * error).all()  # two estimates of one standard error each
    assert (np.abs(norm - value) < 4 * (error + norm_error(n, eta))).all()
    given = np.square(ddim(full, TIMES, eta).given)
    for wrong in (given + 2 * (residual - given), given + (residual - given) / 2):  # summed over, or halved by, d
        assert (np.abs(wrong - value) > 12 * error).any()


def mixture_points(n: int, name: str) -> np.ndarray:
    source = STREAM.child(name).generator()
    component = source.choice(2, n, p=MIXTURE.weights)
    deviation = np.sqrt([0.05, 0.1])[component, None]
    return np.asarray(MIXTURE.means)[component] + deviation * source.normal(size=(n, 2))


def test_a_biased_prediction_needs_the_residual() -> None:
    """With the bias c in the prediction the optimum grows by c^2 times the squared coefficient; "norm" shrinks."""
    points = points_of(ROUND, 40_000, "points")
    biased = Exact.of(ROUND, bias=0.3)
    value, error = simulated(biased, points_of(ROUND, 40_000, "others"), 1.0)
    residual = np.square(analytic_dpm(biased, {}, points, TIMES, STREAM, 1.0, "residual").stds)
    norm = np.square(analytic_dpm(biased, {}, points, TIMES, STREAM, 1.0, "norm").stds)
    np.testing.assert_allclose(residual, value, rtol=0.02, atol=6 * float(error.max()))
    assert (residual > norm).all()
    assert np.abs(norm / value - 1).max() > 0.1


def test_negative_share_counts_as_nothing_unexplained() -> None:
    points = points_of(ROUND, 500, "points")
    chain = analytic_dpm(Exact.of(ROUND, bias=3.0), {}, points, TIMES, STREAM, unexplained="norm")
    assert chain.stds == ddim(chain.full, TIMES, 1.0).stds


# The learned network


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[MLPChain, Params]:
    return train("three_modes", SCHEDULE, STREAM, tmp_path_factory.mktemp("cache"), width=32, updates=500)


def distance(chain: FastChain, params: Params, fresh: np.ndarray) -> float:
    noise = first_order(chain.steps).draw(chain, params, len(fresh), generator(STREAM.child("samples"), 0))
    samples = rollout(chain, params, noise).latents[0].numpy()
    return sliced_wasserstein2(samples, fresh, STREAM.child("projections").generator())


def test_few_steps_with_the_optimal_variance_beat_few_with_the_usual_ones() -> None:
    """The exact prediction for a mixture, so that the number of steps alone is to blame."""
    full, times, params = exact_mixture(), subsequence(100, 8), {"none": torch.zeros(1)}
    fresh = mixture_points(4000, "fresh")
    analytic = distance(analytic_dpm(full, params, torch.tensor(fresh), times, STREAM), params, fresh)
    all_steps = distance(ddpm(full, range(1, 101)), params, fresh)
    assert analytic < 0.8 * distance(ddpm(full, times, "beta"), params, fresh)
    assert analytic < 0.8 * distance(ddpm(full, times, "posterior"), params, fresh)
    assert all_steps < 0.3 * analytic


def test_learned_network_samples_its_data_in_few_steps(learned: tuple[MLPChain, Params]) -> None:
    full, params = learned
    times, fresh = subsequence(100, 8, "quadratic"), DATA["three_modes"](2000, STREAM.child("fresh").generator())
    raw = STREAM.child("raw").generator().normal(size=(2000, 2))
    far = sliced_wasserstein2(raw, fresh, STREAM.child("projections").generator())
    for chain in (ddpm(full, times), ddim(full, times), analytic_dpm(full, params, torch.tensor(fresh), times, STREAM)):
        assert distance(chain, params, fresh) < 0.75 * far


def test_steps_have_densities_and_gradients(learned: tuple[MLPChain, Params]) -> None:
    full, params = learned
    points = torch.tensor(DATA["three_modes"](200, STREAM.child("data").generator()))
    chain = analytic_dpm(full, params, points, (50, 100), STREAM)
    own = {name: p.clone().requires_grad_() for name, p in params.items()}
    log_prob = step_log_prob(chain, own, points[:5], points[5:10], 1)
    log_prob.sum().backward()
    assert log_prob.shape == (5,)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in own.values())
    with pytest.raises(ValueError, match="step t = 1 has std = 0"):
        step_log_prob(ddim(full, (50, 100)), params, points[:5], points[5:10], 1)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_steps_come_from_the_predicted_noise(eta: float) -> None:
    chain: Predicting = ddim(Exact.of(SKEWED), TIMES, eta)
    x0, noise = points_of(SKEWED, 5, "x0"), points_of(ROUND, 5, "noise")
    for t, level in enumerate(LEVELS, 1):
        x = math.sqrt(level) * x0 + math.sqrt(1 - level) * noise
        torch.testing.assert_close(chain.denoised(x, noise, t), x0, rtol=1e-12, atol=1e-12)
        assert chain.noise_level(t) == pytest.approx(math.sqrt(1 - level), rel=1e-14)
        then = 1.0 if t == 1 else LEVELS[t - 2]
        ahead = math.sqrt(then) * x0 + math.sqrt(max(1 - then - chain.std(t) ** 2, 0.0)) * noise
        torch.testing.assert_close(chain.step(x, noise, t), ahead, rtol=1e-12, atol=1e-12)
        # E[x_0 | x_t], from the joint law of x_0 and x_t
        gain = math.sqrt(level) * SKEWED.cov @ np.linalg.inv(level * SKEWED.cov + (1 - level) * np.eye(2))
        best = SKEWED.mean + (x.numpy() - math.sqrt(level) * SKEWED.mean) @ gain.T
        epsilon = chain.predict({}, x, t, None)
        np.testing.assert_allclose(chain.denoised(x, epsilon, t).numpy(), best, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(chain.mean({}, x, t, None), chain.step(x, epsilon, t), rtol=0, atol=0)


def test_guidance_moves_a_mixture_to_the_mode_that_is_rewarded() -> None:
    chain, params = ddim(exact_mixture(), subsequence(100, 10), 0.5), {"none": torch.zeros(1, dtype=torch.float64)}

    def right(x0: Tensor, condition: Tensor | None) -> Tensor:
        return x0[:, 0]

    source = torch.Generator().manual_seed(STREAM.child("guided").integer())
    x0, (free, guided) = guided_sampling(
        chain, params, right, strength=4.0, targets=(0.8,), samples=400, generator=source
    )
    assert free.reward == pytest.approx(MIXTURE.weights @ np.asarray(MIXTURE.means)[:, 0], abs=0.2)
    assert 0.4 < guided.reward < 1.0
    assert float((x0[:, 0] > 0).double().mean()) > 0.9
    linear = Linearised(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.0)
    law = output(Guided(ddim(Exact.of(ROUND), TIMES), 4.0, 0.8, linear))
    assert law.cov[0, 0] < 0.5 * ROUND.cov[0, 0]
    assert law.cov[1, 1] == pytest.approx(output(ddim(Exact.of(ROUND), TIMES)).cov[1, 1], rel=1e-12)


def test_network_is_told_the_training_time_and_the_prompt() -> None:
    told: list[tuple[float, Tensor | None]] = []

    class Spy(Exact):
        def epsilon(self, params: Params, x: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
            told.append((float(t[0]), prompt))
            return x

    chain = ddim(Spy.of(ROUND), TIMES)
    prompt = torch.ones(3, 1)
    for t in range(1, 5):
        chain.mean({}, torch.zeros(3, 2, dtype=torch.float64), t, prompt)
    assert [time for time, _ in told] == list(TIMES)
    assert all(seen is prompt for _, seen in told)


def test_estimate_depends_on_stream_and_time_alone() -> None:
    full, points = Exact.of(ROUND), points_of(ROUND, 100, "points")
    both = unexplained_noise(full, {}, points, (10, 40), STREAM)
    assert both[1:] == unexplained_noise(full, {}, points, (40,), STREAM)
    assert both != unexplained_noise(full, {}, points, (10, 40), STREAM.child("other"))


# Times, and bad input


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize(("steps", "kept"), [(1, 1), (10, 1), (10, 2), (1000, 10), (10, 3)])
def test_times_run_from_first_to_last(spacing: str, steps: int, kept: int) -> None:
    times = subsequence(steps, kept, "linear" if spacing == "linear" else "quadratic")
    assert len(times) == kept
    assert times[-1] == steps
    assert times[0] == (1 if kept > 1 else steps)
    assert all(a < b for a, b in zip(times, times[1:], strict=False))


def test_linear_spacing_keeps_every_step_if_asked() -> None:
    assert subsequence(7, 7) == tuple(range(1, 8))


FULL = Exact.of(ROUND)
POINTS = torch.zeros(5, 2, dtype=torch.float64)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: subsequence(10, 0), r"kept is 0, must lie in \[1, 10\]"),
    (lambda: subsequence(10, 11), r"kept is 11, must lie in \[1, 10\]"),
    (lambda: subsequence(10, 8, "quadratic"), "kept is 8, too many for quadratic spacing"),
    (lambda: subsequence(10, 5, "cubic"), "spacing is 'cubic'"),  # type: ignore[arg-type]
    (lambda: ddim(FULL, (5, 99)), r"times is \[5, 99\], must increase, .* end at T = 100"),
    (lambda: ddim(FULL, (5, 101)), "end at T = 100"),
    (lambda: ddim(FULL, (0, 100)), "start at 1 or later"),
    (lambda: ddim(FULL, (50, 50, 100)), "must increase"),
    (lambda: ddim(FULL, ()), "must increase"),
    (lambda: ddim(FULL, TIMES, 1.5), r"eta is 1.5, must lie in \[0, 1\]"),
    (lambda: ddim(FULL, TIMES, math.nan), "eta is nan"),
    (lambda: ddpm(FULL, TIMES, "optimal"), "variance is 'optimal', must be 'beta' or 'posterior'"),  # type: ignore[arg-type]
    (lambda: analytic_dpm(FULL, {}, POINTS[:, :1], TIMES, STREAM), r"points has shape \(5, 1\), must be \(n, 2\)"),
    (lambda: analytic_dpm(FULL, {}, POINTS[:0], TIMES, STREAM), r"points has shape \(0, 2\)"),
    (lambda: analytic_dpm(FULL, {}, POINTS / 0, TIMES, STREAM), "points holds a point that is not finite"),
    (lambda: analytic_dpm(FULL, {}, POINTS, TIMES, STREAM, 1.0, "mean"), "unexplained is 'mean'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
