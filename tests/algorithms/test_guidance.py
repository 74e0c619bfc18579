"""Guided sampling: against a NumPy recursion for Gaussian data, laws in closed form, and mistakes that are planted."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import dawsn

from algorithms.chain import StepConditions
from algorithms.guidance import Guided, Linearised, Predicting, guided_sampling, linearise
from verdicts.streams import Stream

STREAM = Stream(8).child("tests", "guidance")
LEVELS = (0.97, 0.8, 0.5, 0.2, 0.03)  # alpha_bar_1 .. alpha_bar_T
MEAN, COV = np.array([0.5, -1.0]), np.array([[0.9, 0.3], [0.3, 0.4]])
PARAMS = {"bend": torch.tensor(0.0, dtype=torch.float64)}


@dataclass(frozen=True)
class Gaussian:
    """DDIM on the exact noise prediction for N(mean, cov), plus bend * tanh(x) + prompt."""

    levels: tuple[float, ...] = LEVELS
    mean_of_data: np.ndarray = field(default_factory=lambda: MEAN)
    cov: np.ndarray = field(default_factory=lambda: COV)
    eta: float = 0.0

    @property
    def steps(self):
        return len(self.levels)

    @property
    def shape(self):
        return self.mean_of_data.shape

    def initial(self, noise):
        return noise

    def then(self, t):
        return 1.0 if t == 1 else self.levels[t - 2]

    def std(self, t):
        now, then = self.levels[t - 1], self.then(t)
        return self.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))

    def noise_level(self, t):
        return math.sqrt(1 - self.levels[t - 1])

    def predict(self, params, x, t, condition):
        a = self.levels[t - 1]
        precision = torch.tensor(np.linalg.inv(a * self.cov + (1 - a) * np.eye(len(self.cov)))).to(x)
        centred = x - math.sqrt(a) * torch.tensor(self.mean_of_data).to(x)
        told = 0.0 if condition is None else 0.1 * condition[:, None]
        return math.sqrt(1 - a) * centred @ precision + params["bend"].to(x) * torch.tanh(x) + told

    def denoised(self, x, epsilon, t):
        a = self.levels[t - 1]
        return (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)

    def step(self, x, epsilon, t):
        then = self.then(t)
        ahead = math.sqrt(1 - then - self.std(t) ** 2)
        return math.sqrt(then) * self.denoised(x, epsilon, t) + ahead * epsilon

    def mean(self, params, x, t, condition):
        return self.step(x, self.predict(params, x, t, condition), t)


CHAIN = Gaussian(eta=0.4)
SLOPE, OFFSET, TARGET, STRENGTH = np.array([0.8, -0.6]), 0.3, 2.0, 0.7
LINEAR = Linearised(torch.tensor(SLOPE), OFFSET)
X = torch.tensor(STREAM.child("x").generator().normal(size=(4, 2)))


def recursion(
    x, t, eta, slope=SLOPE, offset: Any = OFFSET, target=TARGET, strength=STRENGTH, level=0.5, sign=1, through=True
):
    """One guided DDIM step in NumPy, written with x_0-hat in place of the noise: x_0-hat moves along Cov(x_0, x_t).

    `level` is the power of 1 - alpha_bar, `through` whether the network is differentiated: both for mistakes.
    """
    a = LEVELS[t - 1]
    then = 1.0 if t == 1 else LEVELS[t - 2]
    gain = math.sqrt(a) * COV @ np.linalg.inv(a * COV + (1 - a) * np.eye(2))
    x0 = MEAN + (x - math.sqrt(a) * MEAN) @ gain.T
    miss = target - offset - (x0 * slope).sum(1, keepdims=True)
    back = slope @ gain if through else slope / math.sqrt(a)
    x0 = x0 + sign * strength * (1 - a) ** (0.5 + level) / math.sqrt(a) * miss * back
    noise = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    given = eta**2 * (1 - then) / (1 - a) * (1 - a / then)
    return math.sqrt(then) * x0 + math.sqrt(1 - then - given) * noise


def test_the_chain_satisfies_the_protocol():
    assert isinstance(CHAIN, Predicting)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_step_is_the_recursion(t):
    guided = Guided(CHAIN, STRENGTH, TARGET, LINEAR)
    found = guided.mean(PARAMS, X, t, None).numpy()
    np.testing.assert_allclose(found, recursion(X.numpy(), t, 0.4), rtol=1e-12, atol=1e-13)
    assert guided.std(t) == CHAIN.std(t)
    assert (guided.steps, guided.shape) == (CHAIN.steps, CHAIN.shape)
    assert guided.initial(X) is X


MISTAKES = {
    "no noise level": {"level": 0.0},
    "level twice": {"level": 1.0},
    "away from the target": {"sign": -1},
    "square without its half": {"strength": 2 * STRENGTH},
    "mean over the batch": {"strength": STRENGTH / 4},
    "network not differentiated": {"through": False},
    "no offset": {"offset": 0.0},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_would_be_seen(mistake):
    found = Guided(CHAIN, STRENGTH, TARGET, LINEAR).mean(PARAMS, X, 3, None).numpy()
    assert np.abs(found - recursion(X.numpy(), 3, 0.4, **mistake)).max() > 0.02


def test_gradient_of_a_bent_network_is_that_of_differences():
    params = {"bend": torch.tensor(0.6, dtype=torch.float64)}
    prompt = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    for t in (1, 3, 5):

        def loss(x, t=t):
            x0 = CHAIN.denoised(x, CHAIN.predict(params, x, t, prompt), t)
            return 0.5 * (TARGET - OFFSET - x0 @ torch.tensor(SLOPE)) ** 2

        unit, h = torch.eye(2, dtype=torch.float64), 1e-4
        slope = torch.stack([(loss(X + h * e) - loss(X - h * e)) / (2 * h) for e in unit], 1)
        epsilon = CHAIN.predict(params, X, t, prompt) + CHAIN.noise_level(t) * STRENGTH * slope
        found = Guided(CHAIN, STRENGTH, TARGET, LINEAR).mean(params, X, t, prompt)
        torch.testing.assert_close(found, CHAIN.step(X, epsilon, t), rtol=1e-7, atol=1e-8)


def test_samples_do_not_influence_each_other_and_may_have_their_own_reward():
    own = Linearised(
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5], [-1.0, 0.0]]).double(), torch.arange(4.0).double()
    )
    for linear in (LINEAR, own):
        whole = Guided(CHAIN, STRENGTH, TARGET, linear).mean(PARAMS, X, 2, None)
        for i in range(4):
            part = slice(i, i + 1)
            alone = Guided(CHAIN, STRENGTH, TARGET, linear.of(part)).mean(PARAMS, X[part], 2, None)
            torch.testing.assert_close(whole[part], alone, rtol=1e-13, atol=1e-14)
    expected = recursion(X.numpy()[1:2], 2, 0.4, slope=np.array([0.0, 2.0]), offset=1.0)
    np.testing.assert_allclose(whole[1:2].numpy(), expected, rtol=1e-12)


def test_every_step_may_have_its_own_strength():
    each = (0.1, 0.2, 0.3, 0.4, 0.5)
    for t in (1, 5):
        found = Guided(CHAIN, each, TARGET, LINEAR).mean(PARAMS, X, t, None).numpy()
        np.testing.assert_allclose(found, recursion(X.numpy(), t, 0.4, strength=each[t - 1]), rtol=1e-12)


def test_parameters_and_latents_get_no_gradient():
    params = {"bend": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}
    x = X.clone().requires_grad_()
    guided = Guided(CHAIN, STRENGTH, TARGET, LINEAR)
    mean = guided.mean(params, x, 2, None)
    assert not mean.requires_grad
    assert params["bend"].grad is None
    assert x.grad is None
    with torch.no_grad():
        torch.testing.assert_close(guided.mean(params, x, 2, None), mean, rtol=0, atol=0)


@dataclass(frozen=True)
class Shrinking:
    """x_0-hat = x / 2 at noise level 1/2, for latents of any shape."""

    shape: tuple[int, ...] = (2, 3, 4)
    steps: int = 2

    def initial(self, noise):
        return noise

    def predict(self, params, x, t, condition):
        return x

    def denoised(self, x, epsilon, t):
        return x - 0.5 * epsilon

    def step(self, x, epsilon, t):
        return self.denoised(x, epsilon, t)

    def mean(self, params, x, t, condition):
        return 0.5 * x

    def std(self, t):
        return 0.0

    def noise_level(self, t):
        return 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_shape_in_the_latents_own_type(dtype):
    x = torch.linspace(-1, 1, 72, dtype=dtype).reshape(3, 2, 3, 4)
    slope = torch.linspace(0, 1, 24, dtype=dtype).reshape(2, 3, 4)
    found = Guided(Shrinking(), 0.8, 1.5, Linearised(slope, 0.25)).mean({}, x, 1, None)
    miss = 1.5 - 0.25 - (x / 2 * slope).sum((1, 2, 3))
    # epsilon moves by -0.5 * 0.8 * miss * slope / 2, and the step takes half of that off.
    torch.testing.assert_close(found, x / 2 + 0.1 * miss[:, None, None, None] * slope)
    assert found.dtype == dtype


# Laws, in the limit of many steps


def law(chain, strength, target, slope):
    """Exact mean and variance of x_0 from N(0, 1), for a deterministic chain with affine means."""
    guided = Guided(chain, strength, target, Linearised(torch.tensor([slope]), 0.0))
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t in range(chain.steps, 0, -1):
        x = guided.mean(PARAMS, x, t, None)
    return np.array([float(x[0, 0]), float(x[1, 0] - x[0, 0]) ** 2])


def fine(steps):
    """DDIM on steps equal in log-SNR, but for the last, which ends at no noise."""
    log_snr = np.linspace(12, -18, steps)
    return Gaussian(tuple((1 / (1 + np.exp(-log_snr))).tolist()), np.array([0.5]), np.array([[2.0]]))


@pytest.mark.parametrize("b", [0.5, 2.0])
def test_guided_ddim_overshoots_as_the_ode_does(b):
    """With z^2 = b g^2 s^2 / 2 the ODE ends in mean m + (y - g m) / g 2 z D(z) and variance s^2 exp(-2 z^2)."""
    m, s2, g, y = 0.5, 2.0, 0.8, 3.0
    z = math.sqrt(b * g**2 * s2 / 2)
    limit = np.array([m + (y - g * m) / g * 2 * z * dawsn(z), s2 * math.exp(-2 * z**2)])
    coarse, half = (law(fine(steps), b, y, g) for steps in (150, 300))
    np.testing.assert_allclose(2 * half - coarse, limit, rtol=3e-3)
    # Not the tilt's variance s2; and with b = 2, a mean reward beyond y.
    assert limit[1] < 0.6 * s2
    assert (g * limit[0] > y) == (b == 2.0)


def test_exact_strength_samples_the_posterior():
    """b_t = 1 / (noise + g^2 Var(x_0 | x_t)) makes the law that of x_0 given y = g x_0 + N(0, noise)."""
    m, s2, g, y, noise = 0.5, 2.0, 0.8, 3.0, 0.7
    found = []
    for steps in (150, 300):
        chain = fine(steps)
        strengths = [1 / (noise + g**2 * s2 * (1 - a) / (a * s2 + 1 - a)) for a in chain.levels]
        found.append(law(chain, strengths, y, g))
    gain = s2 * g / (g**2 * s2 + noise)
    posterior = np.array([m + gain * (y - g * m), s2 * (1 - gain * g)])
    np.testing.assert_allclose(2 * found[1] - found[0], posterior, rtol=3e-3)


# Algorithm 5

CENTRE = np.array([1.5, 1.0])


def reward(x0, condition=None):
    """A bent reward, whose gradient at the mean is not the mean gradient."""
    gap = x0 - torch.tensor(CENTRE).to(x0)
    told = 0.0 if condition is None else condition * x0[:, 0]
    return -torch.log1p(gap.square().sum(1)) + told


def by_hand(x0):
    gap = x0 - CENTRE
    size = 1 + (gap**2).sum(1, keepdims=True)
    return -np.log(size[:, 0]), -2 * gap / size


def brute(gradient, targets, n, eta, seed, strength=1.5, redraw=False):
    """Algorithm 5 in NumPy, on the noise of the same seed."""
    source = torch.Generator().manual_seed(seed)

    def drawn():
        first = torch.randn(n, 2, generator=source, dtype=torch.float64).numpy()
        return first, torch.randn(len(LEVELS), n, 2, generator=source, dtype=torch.float64).numpy()

    noise, stds = drawn(), [Gaussian(eta=eta).std(t) for t in range(1, len(LEVELS) + 1)]
    slope, rewards = np.zeros((n, 2)), []
    offset: Any = np.zeros((n, 1))
    x = noise[0]
    for target in (0.0, *targets):
        if redraw and rewards:
            noise = drawn()
        x = noise[0]
        for t in range(len(LEVELS), 0, -1):
            x = recursion(x, t, eta, slope=slope, offset=offset, target=target, strength=strength)
            x = x + stds[t - 1] * noise[1][t - 1]
        value, slopes = by_hand(x)
        rewards.append(value.mean())
        centre = x.mean(0)
        if gradient == "mean":
            value, slopes = by_hand(centre[None])
            slope, offset = slopes[0], value[0] - slopes[0] @ centre
        elif gradient == "samples":
            slope = slopes.mean(0)
            offset = value.mean() - slope @ centre
        else:
            value = value if gradient == "own" else np.full(n, value.mean())
            slope, offset = slopes, (value - (slopes * x).sum(1))[:, None]
    return x, rewards


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("gradient", ["mean", "samples", "own", "released"])
def test_rounds_are_those_of_algorithm_5(gradient, eta):
    n, targets = 6, (-0.5, 0.0, 0.5)
    chain = Gaussian(eta=eta)
    options = {"strength": 1.5, "targets": targets, "samples": n, "gradient": gradient}
    found, rounds = guided_sampling(chain, PARAMS, reward, generator=torch.Generator().manual_seed(3), **options)
    strength = 1.5 / n if gradient == "released" else 1.5
    expected, rewards = brute(gradient, targets, n, eta, 3, strength)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose([r.reward for r in rounds], rewards, rtol=1e-10)
    assert [r.target for r in rounds] == [None, *targets]
    for other in {"mean", "samples", "own", "released"} - {gradient}:
        assert np.abs(brute(other, targets, n, eta, 3, strength)[0] - expected).max() > 1e-3


def test_redrawn_noise_is_the_generators_next():
    found, _ = guided_sampling(
        Gaussian(eta=0.6),
        PARAMS,
        reward,
        strength=1.5,
        targets=(0.0, 0.5),
        samples=5,
        generator=torch.Generator().manual_seed(4),
        redraw=True,
    )
    np.testing.assert_allclose(found.numpy(), brute("mean", (0.0, 0.5), 5, 0.6, 4, redraw=True)[0], rtol=1e-10)
    assert np.abs(brute("mean", (0.0, 0.5), 5, 0.6, 4)[0] - found.numpy()).max() > 0.1


def test_guidance_raises_the_reward():
    source = torch.Generator().manual_seed(1)
    _, rounds = guided_sampling(
        CHAIN, PARAMS, reward, strength=1.0, targets=(-0.5, -0.2, 0.0), samples=400, generator=source
    )
    rewards = [r.reward for r in rounds]
    assert all(b > a + 0.02 for a, b in zip(rewards, rewards[1:], strict=False))


@pytest.mark.parametrize("gradient", ["mean", "samples", "own", "released"])
def test_batches_do_not_move_the_result(gradient):
    """With conditions that change along the chain, and every batch's own rows of them."""
    told = torch.linspace(-1, 1, 35, dtype=torch.float64).reshape(5, 7)
    apart = torch.arange(7.0).double() / 7 if gradient in ("own", "released") else torch.full((7,), 0.3).double()
    condition = StepConditions(told, apart)
    seen = []
    options = {"strength": 0.8, "targets": (0.0, 1.0), "samples": 7, "condition": condition, "gradient": gradient}
    results = [
        guided_sampling(
            CHAIN,
            PARAMS,
            reward,
            generator=torch.Generator().manual_seed(2),
            batch=batch,
            callback=lambda number, done, x0: seen.append((number, done.target, len(x0))),
            **options,
        )
        for batch in (None, 7, 3, 1, 100)
    ]
    assert seen == [(0, None, 7), (1, 0.0, 7), (2, 1.0, 7)] * 5
    for x0, rounds in results[1:]:
        torch.testing.assert_close(x0, results[0][0], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose([r.reward for r in rounds], [r.reward for r in results[0][1]], rtol=1e-12)


def test_released_form_is_a_mean_over_a_broadcast_column():
    """A column (n, 1) of rewards less (n,) products is (n, n), and the loss is the mean over all of it."""
    gap = X - torch.tensor(CENTRE)
    slopes = -2 * gap / (1 + gap.square().sum(1, keepdim=True))
    biases = reward(X)[:, None] - (slopes * X).sum(1)
    leaf = (1.5 * X).requires_grad_()
    x0 = CHAIN.denoised(leaf, CHAIN.predict(PARAMS, leaf, 2, None), 2)
    loss = 0.5 * torch.nn.functional.mse_loss((slopes * x0).sum(1) + biases, torch.full((4, 4), TARGET).double())
    (slope,) = torch.autograd.grad(loss, leaf)
    epsilon = CHAIN.predict(PARAMS, 1.5 * X, 2, None) + CHAIN.noise_level(2) * STRENGTH * slope
    linear = linearise(reward, X, gradient="released")
    found = Guided(CHAIN, STRENGTH / 4, TARGET, linear).mean(PARAMS, 1.5 * X, 2, None)
    torch.testing.assert_close(found, CHAIN.step(1.5 * X, epsilon, 2), rtol=1e-12, atol=1e-13)


def test_linearised_at_the_mean_is_exact_there():
    linear = linearise(reward, X)
    centre = X.mean(0, keepdim=True)
    torch.testing.assert_close(linear(centre), reward(centre))
    torch.testing.assert_close(linearise(reward, X, gradient="own")(X), reward(X))
    affine = linearise(lambda x0, condition: 2.0 + x0 @ torch.tensor(SLOPE), X, gradient="samples")
    torch.testing.assert_close(affine.gradient, torch.tensor(SLOPE))
    assert float(affine.offset) == pytest.approx(2.0)


def test_reward_parameters_get_no_gradient():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    linear = linearise(lambda x0, condition: torch.tanh(x0 @ weight), X)
    assert weight.grad is None
    assert isinstance(linear.offset, torch.Tensor)
    assert not linear.gradient.requires_grad
    assert not linear.offset.requires_grad


# Bad input


def sampled(chain: Any = CHAIN, params=PARAMS, reward=reward, **changed):
    options = {"strength": 1.0, "targets": (0.0, 1.0), "samples": 3, "generator": torch.Generator()} | changed
    return guided_sampling(chain, params, reward, **options)


class Bare:
    steps, shape = 2, (2,)

    def initial(self, noise):
        return noise

    def mean(self, params, x, t, condition):
        return x

    def std(self, t):
        return 1.0


BARE: Any = Bare()
PROMPTS = torch.arange(3)
REFUSED = [
    (lambda: sampled(strength=0.0), "strength must be positive and finite, got 0.0"),
    (lambda: sampled(strength=-1.0), "strength must be positive and finite"),
    (lambda: sampled(strength=math.nan), "strength must be positive and finite"),
    (lambda: sampled(strength=math.inf), "strength must be positive and finite"),
    (lambda: sampled(strength=(1.0, 2.0)), "strength has 2 entries: must have one for each of the chain's 5 steps"),
    (lambda: sampled(strength=(1.0, 2.0, 0.0, 1.0, 1.0)), "strength must be positive and finite"),
    (lambda: sampled(targets=()), r"targets must be finite numbers, at least one, that do not fall, got \[\]"),
    (lambda: sampled(targets=(1.0, 0.5)), r"that do not fall, got \[1.0, 0.5\]"),
    (lambda: sampled(targets=(math.nan,)), "targets must be finite"),
    (lambda: sampled(samples=0), "samples must be >= 1, got 0"),
    (lambda: sampled(batch=0), "batch must be >= 1, got 0"),
    (lambda: sampled(params={}), "params must hold a tensor"),
    (lambda: sampled(gradient="median"), "gradient must be one of mean, samples, own, released, got 'median'"),
    (lambda: sampled(gradient="own", redraw=True), "redraw must be False with gradient='own'"),
    (lambda: sampled(condition=PROMPTS), "condition must be alike for all samples with gradient='mean'"),
    (lambda: sampled(condition=PROMPTS, gradient="samples"), "use 'own'"),
    (lambda: sampled(reward=lambda x0, c: x0.detach().sum(1)), "reward must be differentiable"),
    (
        lambda: sampled(reward=lambda x0, c: PARAMS["bend"].clone().requires_grad_().expand(len(x0))),
        "no gradient in the",
    ),
    (lambda: sampled(reward=lambda x0, c: x0), r"reward must return shape \(3,\), one number per sample, got \(3, 2\)"),
    (lambda: sampled(reward=lambda x0, c: x0.sum(1, keepdim=True)), r"reward must return shape \(3,\)"),
    (lambda: sampled(reward=lambda x0, c: x0.sum(1) / 0), "reward must be finite, got -?inf"),
    (lambda: sampled(reward=lambda x0, c: (0 * x0).square().sum(1).sqrt()), "reward must have finite gradients"),
    (lambda: sampled(chain=BARE), "Bare has no method predict, denoised, step, noise_level"),
    (lambda: Guided(BARE, 1.0, 1.0, LINEAR), "chain must predict noise, but Bare has no method predict"),
    (lambda: Guided(CHAIN, 0.0, 1.0, LINEAR), "strength must be positive and finite"),
    (lambda: Guided(CHAIN, 1.0, math.inf, LINEAR), "target must be finite, got inf"),
    (lambda: LINEAR(torch.zeros(3, 4)), r"gradient has shape \(2,\): must be \(4,\), or \(3, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
