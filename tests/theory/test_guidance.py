"""theory.guidance against moment equations in diffusion time, quadrature, finite differences and Gaussian algebra."""

import math

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from theory import ddpm, guidance, schedules
from theory.gaussian import Gaussian, kl, tilt
from verdicts.streams import Stream

LINE = Gaussian.scalar(0.5, 2.0)  # with g = 0.8 and y = 3 the reference case of the numbers below
SAMPLERS: list[guidance.Sampler] = ["sde", "ode"]
ROTATION = np.linalg.qr(np.array([[1.0, 0.4, -0.3], [0.2, 1.0, 0.5], [-0.6, 0.1, 1.0]]))[0]
SKEW = Gaussian([0.3, -1.0, 0.7], ROTATION @ np.diag([0.2, 1.0, 3.0]) @ ROTATION.T)
OBLIQUE = np.array([0.8, -0.5, 0.3])  # no eigenvector of SKEW.cov
CASES = [(LINE, np.array([0.8]), 3.0), (SKEW, 0.6 * ROTATION[:, 2], 2.0), (SKEW, 1.3 * ROTATION[:, 0], -1.0)]
COSINE = schedules.cosine(1000).alpha_bar


def diffused(data, g, target, strength, sampler, horizon=60.0):
    """Output law and Girsanov integral by moment equations in x_t, alpha_bar = exp(-t): no information clock."""
    d = data.dim

    def drift(t):
        a = math.exp(-t)
        precision = np.linalg.inv(a * data.cov + (1 - a) * np.eye(d))
        k = math.sqrt(a) * precision @ data.cov @ g  # gradient of g'E[x_0 | x_t] in x_t
        b = strength(a)
        centre = math.sqrt(a) * data.mean
        pull, force = -b * np.outer(k, k), b * (target - g @ data.mean + k @ centre) * k
        weight = 1.0 if sampler == "sde" else 0.5
        matrix = 0.5 * np.eye(d) + weight * (pull - precision)
        return matrix, weight * (force + precision @ centre), pull, force

    def derivative(tau, state):
        mean, cov = state[:d], state[d:-1].reshape(d, d)
        matrix, offset, pull, force = drift(horizon - tau)
        noise = np.eye(d) if sampler == "sde" else np.zeros((d, d))
        push = pull @ mean + force
        rate = 0.5 * (push @ push + np.trace(pull @ cov @ pull.T))
        return np.concatenate([matrix @ mean + offset, (matrix @ cov + cov @ matrix.T + noise).ravel(), [rate]])

    start = np.concatenate([np.zeros(d), np.eye(d).ravel(), [0.0]])
    end = solve_ivp(derivative, (0.0, horizon), start, method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    cov = end[d:-1].reshape(d, d)
    return Gaussian(end[:d], (cov + cov.T) / 2), end[-1]


def assert_same_law(found, expected, rtol=1e-7):
    np.testing.assert_allclose(found.mean, expected.mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(found.cov, expected.cov, rtol=rtol, atol=rtol)


# --- constant strength -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_law_solves_the_moment_equations(case, strength, sampler):
    data, g, target = CASES[case]
    law, _ = diffused(data, g, target, lambda a: strength, sampler)
    assert_same_law(guidance.guided_law(data, g, target, strength, sampler), law)
    other = guidance.guided_law(data, g, target, 2 * strength, sampler)  # the factor of (.)^2 without its half
    assert np.abs(other.mean - law.mean).max() > 1e-2


def test_reward_of_the_sde_needs_no_eigenvector():
    """The reward's law and the path KL depend on C through g'Cg alone; the ODE's reward does not."""
    variance, gap = float(OBLIQUE @ SKEW.cov @ OBLIQUE), 2.0 - float(OBLIQUE @ SKEW.mean)
    for sampler in SAMPLERS:
        law, _ = diffused(SKEW, OBLIQUE, 2.0, lambda a: 1.5, sampler)
        found = [float(OBLIQUE @ (law.mean - SKEW.mean)), float(OBLIQUE @ law.cov @ OBLIQUE)]
        expected = guidance.reward_moments(variance, gap, 1.5, sampler)
        if sampler == "sde":
            np.testing.assert_allclose(found, expected, rtol=1e-7)
        else:
            assert abs(found[0] / expected[0] - 1) > 1e-3
    with pytest.raises(ValueError, match="gradient = .*: must be an eigenvector of data.cov"):
        guidance.guided_law(SKEW, OBLIQUE, 2.0, 1.5)


@pytest.mark.parametrize(
    ("strength", "sampler", "mean", "variance"),
    [
        (0.5, "sde", 2.03629962186, 1.12806671804),
        (0.5, "ode", 2.18822039089, 1.05458484809),
        (2.0, "sde", 3.49875959356, 0.388290616057),
        (2.0, "ode", 4.33083536407, 0.154609480887),
        (10.0, "ode", 4.11269714161, 5.521545144e-6),
    ],
)
def test_reference_numbers(strength, sampler, mean, variance):
    law = guidance.guided_law(LINE, [0.8], 3.0, strength, sampler)  # numbers from an independent derivation
    assert law.mean[0] == pytest.approx(mean, rel=1e-11)
    assert law.cov[0, 0] == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_guidance_leaves_the_data(sampler):
    assert_same_law(guidance.guided_law(SKEW, np.zeros(3), 5.0, 1.0, sampler), SKEW, 1e-15)
    assert_same_law(guidance.guided_law(SKEW, ROTATION[:, 1], 5.0, 0.0, sampler), SKEW, 1e-15)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1e-3, 0.1, 1.0, 10.0])
def test_no_strength_gives_the_tilt(strength, sampler):
    """Less variance than the tilt at every strength, hence a positive KL to every tilt, whatever its lambda."""
    law = guidance.guided_law(LINE, [0.8], 3.0, strength, sampler)
    assert law.cov[0, 0] < LINE.cov[0, 0]
    nearest = Gaussian(law.mean, LINE.cov)  # the tilt of the same mean
    assert kl(law, nearest) > 1e-8
    # Saturation: the tilt's reward grows without bound as lambda falls, the guided one stays near the target.
    assert 0.8 * guidance.guided_law(LINE, [0.8], 3.0, 1e3, sampler).mean[0] < 3.05
    assert 0.8 * guidance.target_tilt(LINE, [0.8], 1e-3).mean[0] > 1000


# --- overshoot ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [0.0, 0.3, 1.0, 1.5019752682686115, 4.0])
def test_overshoot_is_its_integral(z):
    integral = quad(lambda s: math.exp(s**2 - z**2), 0.0, z, epsabs=1e-13)[0]
    assert guidance.overshoot(z) == pytest.approx(2 * z * integral, rel=1e-12, abs=1e-15)


def test_overshoot_has_its_maximum():
    grid = np.linspace(0.0, 8.0, 8001)
    values = np.array([guidance.overshoot(z) for z in grid])
    best = guidance.overshoot(guidance.OVERSHOOT_ARGUMENT)
    assert best == pytest.approx(guidance.OVERSHOOT_MAXIMUM, rel=1e-15)
    assert values.max() <= best
    assert abs(grid[values.argmax()] - guidance.OVERSHOOT_ARGUMENT) < 1e-3
    assert guidance.OVERSHOOT_MAXIMUM == pytest.approx(1.2847494397, abs=1e-10)  # from an independent derivation
    assert guidance.overshoot(40.0) == pytest.approx(1 + 1 / (2 * 40.0**2), rel=1e-5)
    assert guidance.overshoot(0.924) < 1 < guidance.overshoot(0.9242)


# --- exact strength, tilt, joint limit ----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("data", "g"), [(LINE, np.array([0.8])), (SKEW, OBLIQUE)])
def test_exact_strength_ends_in_the_posterior(data, g, sampler):
    law, girsanov = diffused(data, g, 3.0, lambda a: guidance.exact_strength(data, g, 0.7, [a])[0], sampler)
    posterior = guidance.posterior_law(data, g, 3.0, 0.7)
    assert_same_law(law, posterior)
    precision = np.linalg.inv(data.cov)
    expected = np.linalg.inv(precision + np.outer(g, g) / 0.7)
    assert_same_law(posterior, Gaussian(expected @ (precision @ data.mean + g * 3.0 / 0.7), expected), 1e-12)
    if sampler == "sde":  # a conditioned diffusion: nothing is lost between path and output
        assert girsanov == pytest.approx(kl(posterior, data), rel=1e-7)


def test_posterior_numbers():
    law = guidance.posterior_law(LINE, [0.8], 3.0, 0.7)  # from an independent derivation
    assert law.mean[0] == pytest.approx(2.6010101010, abs=1e-10)
    assert law.cov[0, 0] == pytest.approx(0.7070707071, abs=1e-10)


def test_tilt():
    law, _ = tilt(SKEW, OBLIQUE / 0.4, np.zeros((3, 3)))
    assert_same_law(guidance.target_tilt(SKEW, OBLIQUE, 0.4), law, 1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("strength", [0.01, 1.0, 10.0])
def test_matched_kl_is_the_kl_of_the_laws(lam, strength, sampler):
    target = 0.8 * 0.5 + 1 / (lam * strength)
    law = guidance.guided_law(LINE, [0.8], target, strength, sampler)
    expected = kl(law, guidance.target_tilt(LINE, [0.8], lam))
    assert guidance.matched_kl(1.28 * strength, 1.28 / lam**2, sampler) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("lam", "sde", "ode"), [(0.1, 55.5315, 59.2667), (1, 0.3120885, 0.3507882), (10, 0.0037885, 0.0039378)]
)
def test_matched_kl_numbers(lam, sde, ode):
    """b = 1/lambda, y = g m + 1; from an independent derivation, printed to seven decimals or six digits."""
    assert guidance.matched_kl(1.28 / lam, 1.28 / lam**2) == pytest.approx(sde, rel=2e-6, abs=6e-8)
    assert guidance.matched_kl(1.28 / lam, 1.28 / lam**2, "ode") == pytest.approx(ode, rel=2e-6, abs=6e-8)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_matched_kl_vanishes_like_its_leading_term(shift, sampler):
    errors = [
        guidance.matched_kl(x, shift, sampler) / guidance.matched_kl_leading(x, shift, sampler) - 1
        for x in (0.02, 0.01, 0.005)
    ]
    assert abs(errors[2]) < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.05)
    if shift:  # the shares of the mean differ: 1/2 and 2/9
        swapped = guidance.matched_kl_leading(0.005, shift, "ode" if sampler == "sde" else "sde")
        assert abs(guidance.matched_kl(0.005, shift, sampler) / swapped - 1) > 0.1
    assert guidance.matched_kl(0.0, shift, sampler) == 0.0


# --- path KL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "g"), [(LINE, np.array([0.8])), (SKEW, OBLIQUE)])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_path_kl_solves_girsanov(data, g, strength):
    law, girsanov = diffused(data, g, 3.0, lambda a: strength, "sde")
    found = guidance.path_kl(float(g @ data.cov @ g), 3.0 - float(g @ data.mean), strength)
    assert found == pytest.approx(girsanov, rel=1e-7)
    assert kl(law, data) < 0.99 * found


@pytest.mark.parametrize(
    ("strength", "path", "marginal"), [(0.5, 0.6798131437, 0.6583917526), (2.0, 3.8755480455, 2.6647866239)]
)
def test_path_kl_numbers(strength, path, marginal):
    assert guidance.path_kl(1.28, 2.6, strength) == pytest.approx(path, abs=1e-10)  # from an independent derivation
    assert kl(guidance.guided_law(LINE, [0.8], 3.0, strength), LINE) == pytest.approx(marginal, abs=1e-10)


@pytest.mark.parametrize(
    ("lam", "tilted", "sde", "ode"),
    [(0.1, 64.0, 1.53145, 6.38268), (1.0, 0.64, 0.3940512, 0.5621509), (10.0, 0.0064, 0.0094031, 0.0098054)],
)
def test_kl_to_the_data_numbers(lam, tilted, sde, ode):
    """Tilt, SDE and ODE with b = 1/lambda, y = g m + 1: at small lambda little of the tilt is reached."""
    laws = [guidance.target_tilt(LINE, [0.8], lam)]
    laws += [guidance.guided_law(LINE, [0.8], 1.4, 1 / lam, sampler) for sampler in SAMPLERS]
    np.testing.assert_allclose([kl(law, LINE) for law in laws], [tilted, sde, ode], rtol=1e-6, atol=6e-8)


# --- DDIM --------------------------------------------------------------------------------------------------------


def brute_step(data, a, next_a, g, target, strength, x):
    """One guided DDIM step as code does it: predicted noise, look-ahead loss, its gradient by central differences."""

    def noise(point):
        variance = a * data.cov + (1 - a) * np.eye(data.dim)
        return math.sqrt(1 - a) * np.linalg.solve(variance, point - math.sqrt(a) * data.mean)

    def loss(point):
        clean = (point - math.sqrt(1 - a) * noise(point)) / math.sqrt(a)
        return 0.5 * (target - g @ clean) ** 2

    gradient = [(loss(x + 0.5 * e) - loss(x - 0.5 * e)) for e in np.eye(data.dim)]  # exact: the loss is quadratic
    guided = noise(x) + math.sqrt(1 - a) * strength * np.array(gradient)
    return math.sqrt(next_a) * (x - math.sqrt(1 - a) * guided) / math.sqrt(a) + math.sqrt(1 - next_a) * guided


@pytest.mark.parametrize(("data", "g"), [(LINE, np.array([0.8])), (SKEW, OBLIQUE)])
def test_ddim_steps_against_brute_force(data, g):
    levels, strengths = [0.9, 0.9, 0.5, 0.02], [0.3, 1.0, 2.0, 0.7]
    matrices, offsets = guidance.guided_ddim_steps(data, levels, g, 2.0, strengths)
    points = Stream(3).child("points").generator().normal(size=(4, data.dim))
    for i, x in enumerate(points):
        expected = brute_step(data, levels[i], ([1.0, *levels])[i], g, 2.0, strengths[i], x)
        np.testing.assert_allclose(matrices[i] @ x + offsets[i], expected, rtol=1e-9, atol=1e-9)


def test_ddim_law_against_samples():
    levels = [0.95, 0.7, 0.3, 0.0001]
    law = guidance.guided_ddim_law(SKEW, levels, OBLIQUE, 2.0, 1.5)
    x = Stream(4).child("start").generator().normal(size=(40000, 3))
    matrices, offsets = guidance.guided_ddim_steps(SKEW, levels, OBLIQUE, 2.0, 1.5)
    for i in reversed(range(4)):
        x = x @ matrices[i].T + offsets[i]
    errors = np.sqrt(np.diag(law.cov) / 40000)
    assert (np.abs(x.mean(axis=0) - law.mean) < 5 * errors).all()
    np.testing.assert_allclose(np.cov(x.T), law.cov, atol=0.1 * np.abs(law.cov).max())


def test_ddim_without_guidance():
    for levels in ([0.9, 0.5, 0.1], [0.9, 0.5, 0.0]):
        assert_same_law(guidance.guided_ddim_law(SKEW, levels, OBLIQUE, 2.0, 0.0), ddpm.ddim_law(SKEW, levels), 1e-12)


def test_ddim_level_zero_is_a_limit():
    """An x_T that is pure noise is guided all the same: the pull does not depend on x there."""
    exact = guidance.guided_ddim_law(SKEW, [0.9, 0.4, 0.0], OBLIQUE, 2.0, 1.0)
    near = guidance.guided_ddim_law(SKEW, [0.9, 0.4, 1e-14], OBLIQUE, 2.0, 1.0)
    assert_same_law(exact, near, 1e-5)
    assert (
        np.abs(exact.mean - guidance.guided_ddim_law(SKEW, [0.9, 0.4, 0.0], OBLIQUE, 2.0, [1, 1, 0]).mean).max() > 0.01
    )


@pytest.mark.parametrize(
    ("S", "mean", "variance"), [(50, 2.8392254811, 0.7102140006), (1000, 2.8306669498, 0.7452768483)]
)
def test_ddim_numbers(S, mean, variance):
    """Cosine schedule with 1000 steps, b = 1/1.3; from an independent derivation."""
    law = guidance.guided_ddim_law(LINE, COSINE[schedules.ddim_grid(1000, S)], [0.8], 3.0, 1 / 1.3)
    assert (law.mean[0], law.cov[0, 0]) == pytest.approx((mean, variance), abs=1e-10)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_ddim_tends_to_the_ode(case):
    """First order in 1/S, on a cosine grid down to level zero."""
    data, g, target = CASES[case]
    limit = guidance.guided_law(data, g, target, 2.0, "ode")
    gaps = []
    for S in (200, 400, 800):
        levels = np.cos(0.5 * np.pi * np.arange(1, S + 1) / S) ** 2
        levels[-1] = 0.0
        law = guidance.guided_ddim_law(data, levels, g, target, 2.0)
        gaps.append([np.abs(law.mean - limit.mean).max(), np.abs(law.cov - limit.cov).max()])
    ratios = np.array(gaps)[:-1] / np.array(gaps)[1:]
    assert (ratios > 1.8).all()
    assert np.max(gaps[-1]) < 0.02


def test_ddim_overshoots_and_the_sde_does_not():
    g = np.array([1.0])
    strength = 2 * guidance.OVERSHOOT_ARGUMENT**2
    data = Gaussian.scalar(0.0, 1.0)
    reached = guidance.guided_ddim_law(data, ddpm.optimal_ddim_schedule(1.0, 1000), g, 1.0, strength).mean[0]
    assert reached == pytest.approx(guidance.OVERSHOOT_MAXIMUM, abs=3e-3)
    assert guidance.guided_law(data, g, 1.0, strength).mean[0] == pytest.approx(1 - math.exp(-strength), rel=1e-12)


# --- rounds ------------------------------------------------------------------------------------------------------

BALL = Gaussian([0.4, -0.2], 1.5 * np.eye(2))
LINEAR, CURVATURE = np.array([1.0, -0.5]), np.array([[0.3, 0.1], [0.1, 0.2]])


def reward(x):
    return float(LINEAR @ x - 0.5 * x @ CURVATURE @ x)


def slope(x):
    return np.array([(reward(x + 0.5 * e) - reward(x - 0.5 * e)) for e in np.eye(2)])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("intercept", [False, True])
def test_rounds(sampler, intercept):
    """Each round by the moment equations, with the gradient by differences at the mean of the last round."""
    laws = guidance.rounds(BALL, LINEAR, CURVATURE, [1.0, 1.5, 2.0], 0.8, sampler, intercept=intercept)
    mean = BALL.mean
    for law, target in zip(laws, [1.0, 1.5, 2.0], strict=True):
        g = slope(mean)
        aim = target - (reward(mean) - g @ mean if intercept else 0.0)
        expected, _ = diffused(BALL, g, aim, lambda a: 0.8, sampler)
        assert_same_law(law, expected)
        mean = expected.mean


def test_limit_rounds_are_the_limit_of_rounds():
    lam, strength = 1.2, 1e-6
    limit = guidance.limit_rounds(BALL, LINEAR, CURVATURE, lam, 4)
    mean, targets = BALL.mean, []
    for law in limit:
        targets.append(float(slope(mean) @ BALL.mean) + 1 / (lam * strength))
        mean = law.mean
    found = guidance.rounds(BALL, LINEAR, CURVATURE, targets, strength)
    for one, other in zip(found, limit, strict=True):
        assert_same_law(one, other, 1e-5)


def test_limit_rounds_reach_the_mean_of_the_tilt_and_miss_its_covariance():
    lam = 1.2
    assert guidance.contraction(BALL, CURVATURE, lam) < 1
    last = guidance.limit_rounds(BALL, LINEAR, CURVATURE, lam, 200)[-1]
    target, _ = tilt(BALL, LINEAR / lam, CURVATURE / lam)
    np.testing.assert_allclose(last.mean, target.mean, rtol=1e-12)
    missed = guidance.missed_covariance_kl(BALL, CURVATURE, lam)
    assert missed == pytest.approx(kl(last, target), rel=1e-10)
    assert missed > 0.01


@pytest.mark.parametrize(("lam", "converges"), [(0.99, False), (1.01, True)])
def test_rounds_diverge_below_the_threshold(lam, converges):
    """lambda above s^2 B; at case N(0, 1), r = 2x - x^2/2 the threshold is 1."""
    data = Gaussian.scalar(0.0, 1.0)
    means = [law.mean[0] for law in guidance.limit_rounds(data, [2.0], [[1.0]], lam, 2000)]
    error = [abs(mean - 2 / (1 + lam)) for mean in means]
    assert guidance.contraction(data, [[1.0]], lam) == pytest.approx(1 / lam)
    assert error[1] / error[0] == pytest.approx(1 / lam, rel=1e-9)
    assert (error[-1] < 1e-6) == converges
    assert (error[-1] > 1e6) == (not converges)


def test_a_rising_target_at_constant_strength_drives_the_mean_away():
    data = Gaussian.scalar(0.0, 1.0)
    means = [law.mean[0] for law in guidance.rounds(data, [1.0], [[1.0]], np.linspace(1.0, 20.0, 12), 1.0)]
    assert np.abs(means).max() > 5  # the reward -(x - 1)^2/2 + 1/2 is best at 1


# --- the released batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_batch_pull_is_the_derivative_of_the_broadcast_loss(batch):
    generator = Stream(6).child(f"batch-{batch}").generator()
    predicted, last, rewards = generator.normal(size=(3, batch))

    def loss(values):
        biases = -last + rewards[:, None]  # (B,) and (B, 1)
        target = np.full((batch, 1), 1.7)
        return 0.5 * np.mean((values + biases - target) ** 2)

    pull = [-(loss(predicted + e) - loss(predicted - e)) / 2 for e in np.eye(batch)]
    found = guidance.batch_pull(predicted, last, rewards, 1.7)
    np.testing.assert_allclose(found, pull, rtol=1e-10, atol=1e-12)
    intended = 1.7 - (rewards + predicted - last)
    if batch == 1:
        np.testing.assert_allclose(found, intended)
    else:
        assert np.abs(batch * found - intended).max() > 0.1
        np.testing.assert_allclose(np.sum(batch * found), np.sum(intended))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guidance.reward_moments(-1.0, 1.0, 1.0), r"variance = -1.0: must lie in \[0.0, inf\)"),
        (lambda: guidance.reward_moments(1.0, math.nan, 1.0), r"gap = nan: must lie in \(-inf, inf\)"),
        (lambda: guidance.reward_moments(1.0, 1.0, -0.1), r"strength = -0.1: must lie in"),
        (lambda: guidance.matched_kl(1.0, 1.0, "ddim"), "sampler = 'ddim': must be 'sde' or"),  # type: ignore[arg-type]
        (lambda: guidance.overshoot(-1.0), "z = -1.0: must lie in"),
        (lambda: guidance.path_kl(1.0, 1.0, math.inf), "strength = inf: must lie in"),
        (lambda: guidance.guided_law(LINE, [1.0, 2.0], 1.0, 1.0), "gradient has 2 entries: must have 1"),
        (lambda: guidance.guided_law(LINE, [1.0], math.inf, 1.0), r"gap = inf: must lie in"),
        (lambda: guidance.exact_strength(LINE, [1.0], 0.0, [0.5]), r"noise_variance = 0.0: must lie in \(0.0, inf\)"),
        (lambda: guidance.exact_strength(LINE, [1.0], 1.0, [1.5]), r"alpha_bar = \[1.5\]: must lie in \[0, 1\]"),
        (lambda: guidance.target_tilt(LINE, [1.0], 0.0), r"entropy_strength = 0.0: must lie in"),
        (lambda: guidance.matched_kl(-1.0, 0.0), "x = -1.0: must lie in"),
        (lambda: guidance.guided_ddim_law(LINE, [0.5, 0.9], [1.0], 1.0, 1.0), "alpha_bar = .*: must fall"),
        (lambda: guidance.guided_ddim_law(LINE, [0.5, 0.0, 0.0], [1.0], 1.0, 1.0), "alpha_bar = .*: must fall"),
        (lambda: guidance.guided_ddim_law(LINE, [1.0], [1.0], 1.0, 1.0), "alpha_bar = .*: must fall"),
        (lambda: guidance.guided_ddim_law(LINE, [0.5], [1.0], 1.0, -1.0), "strength = -1.0: must be non-negative"),
        (lambda: guidance.guided_ddim_law(LINE, [0.5], [1.0], 1.0, [1.0, 1.0]), "strength has shape"),
        (lambda: guidance.rounds(BALL, LINEAR, [[1.0]], [1.0], 1.0), "linear, quadratic have shapes"),
        (lambda: guidance.rounds(BALL, LINEAR, [[1, 1], [0, 1]], [1.0], 1.0), "quadratic = .*: must be symmetric"),
        (lambda: guidance.limit_rounds(BALL, LINEAR, CURVATURE, 1.0, 0), "count = 0: must be an integer >= 1"),
        (lambda: guidance.missed_covariance_kl(LINE, [[-1.0]], 1.0), "quadratic = .*: must leave"),
        (lambda: guidance.batch_pull([1.0], [1.0, 2.0], [1.0], 0.0), "predicted, ... have lengths 1, 2, 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
