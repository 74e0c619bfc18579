"""theory.girsanov against joint laws of paths, log-ratios of sampled paths, closed forms and finite differences."""

import math

import numpy as np
import pytest

from theory import control_linear_quadratic, girsanov
from theory.control import ControlSchedule
from theory.gaussian import Gaussian
from theory.girsanov import AffineScores, Drift, discrete_adjoint, euler_adjoint, euler_paths
from verdicts.streams import Stream

STANDARD = Gaussian.scalar(0.0, 1.0)


def slopes(slope, steps=50, horizon=2.0, shift=0.0):
    return AffineScores(np.full((steps, 1, 1), slope), np.full((steps, 1), shift), horizon / steps)


def random_scores(name, steps=6, dim=2):
    generator = Stream(11).child(name).generator()
    F = -0.5 * np.eye(dim) + 0.4 * generator.normal(size=(steps, dim, dim))
    return AffineScores(F, generator.normal(size=(steps, dim)), 0.2)


# --- the path KL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_path_kl_is_the_kl_of_the_joint_laws(dim):
    scores, reference = random_scores("tuned", dim=dim), random_scores("reference", dim=dim)
    root = np.tril(np.ones((dim, dim)))
    start = Gaussian(np.arange(dim, dtype=float), root @ root.T)
    found = float(girsanov.path_kl(scores, reference, start).sum())
    problem, K, k = girsanov.as_control(scores, reference)
    assert found == pytest.approx(control_linear_quadratic.path_kl(problem, K, k, start), rel=1e-9)
    steps = control_linear_quadratic.evaluate(problem, K, k, start).step_kl
    np.testing.assert_allclose(girsanov.path_kl(scores, reference, start), steps, rtol=1e-12)
    ends = control_linear_quadratic.marginals(problem, K, k, start)
    np.testing.assert_allclose(ends[-1].cov, scores.laws(start)[-1].cov, rtol=1e-12)
    assert girsanov.marginal_kl(scores, reference, start) < found


def test_path_kl_against_log_ratios_of_sampled_paths():
    """The constant in front: 1, not 1/2 (drifts for scores) and not 2."""
    scores, reference, paths = slopes(-0.7), slopes(-1.0), 20000
    h, generator = scores.step, Stream(5).child("log-ratio").generator()
    y, log_ratio = generator.normal(size=paths), np.zeros(paths)
    for _ in range(50):
        mean, other = y + h * (y - 1.4 * y), y + h * (y - 2 * y)
        y = mean + math.sqrt(2 * h) * generator.normal(size=paths)
        log_ratio += ((y - other) ** 2 - (y - mean) ** 2) / (4 * h)
    exact = float(girsanov.path_kl(scores, reference, STANDARD).sum())
    error = log_ratio.std() / math.sqrt(paths)
    assert log_ratio.mean() == pytest.approx(exact, abs=4.5 * error)
    assert 10 * error < exact / 2
    assert exact == pytest.approx(0.3155906964, abs=1e-10)  # from an independent derivation


@pytest.mark.parametrize("horizon", [0.5, 3.0])
def test_constant_shift(horizon):
    """Path KL delta^2 T grows without bound, the marginal one tends to 2 delta^2."""
    path, marginal = girsanov.diffusion_kl(lambda t: ([[-1.0]], [0.5]), lambda t: ([[-1.0]], [0.0]), STANDARD, horizon)
    assert path == pytest.approx(0.25 * horizon, rel=1e-9)
    assert marginal == pytest.approx(2 * 0.25 * math.expm1(-horizon) ** 2, rel=1e-9)
    assert marginal < path


@pytest.mark.parametrize("horizon", [0.5, 3.0])
def test_shifted_data(horizon):
    """s - s_0 = delta e^{-(T - t)}, the exact scores of N(delta, 1): both KLs are nearly delta^2 / 2."""
    path, marginal = girsanov.diffusion_kl(
        lambda t: ([[-1.0]], [0.5 * math.exp(t - horizon)]), lambda t: ([[-1.0]], [0.0]), STANDARD, horizon
    )
    reach = -math.expm1(-2 * horizon)
    assert path == pytest.approx(0.125 * reach, rel=1e-9)
    assert marginal == pytest.approx(0.125 * reach**2, rel=1e-9)


def test_euler_path_kl_tends_to_that_of_the_diffusion_at_first_order():
    exact = girsanov.diffusion_kl(lambda t: ([[-0.7]], [0.2]), lambda t: ([[-1.0]], [0.0]), STANDARD, 2.0)
    errors = []
    for steps in (200, 400, 800):
        scores, reference = slopes(-0.7, steps, shift=0.2), slopes(-1.0, steps)
        path = girsanov.path_kl(scores, reference, STANDARD).sum()
        errors.append(np.array([path, girsanov.marginal_kl(scores, reference, STANDARD)]) - exact)
    np.testing.assert_allclose(errors[0] / errors[1], 2, atol=0.05)
    np.testing.assert_allclose(errors[1] / errors[2], 2, atol=0.03)


@pytest.mark.parametrize("alpha", [0.9, 0.99, 0.999])
def test_the_ddpm_step_is_the_euler_step_to_second_order(alpha):
    h = -0.5 * math.log(alpha)
    weight = float(ControlSchedule.ddpm([alpha], 1.0).step_kl(0, [1.0], [0.0]))
    assert weight == pytest.approx(math.expm1(2 * h) / 2, rel=1e-12)
    assert weight - h == pytest.approx(h**2 + 2 * h**3 / 3, rel=0.05 * h)
    assert 0.9 * h < weight < 1.2 * h  # neither half nor twice


# --- its gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient_is_a_finite_difference_of_the_path_kl(dim):
    scores, reference, direction = (random_scores(name, dim=dim) for name in ("tuned", "reference", "direction"))
    start = Gaussian(np.ones(dim), 0.5 * np.eye(dim))

    def moved(eps):
        tuned = AffineScores(scores.F + eps * direction.F, scores.f + eps * direction.f, scores.step)
        return float(girsanov.path_kl(tuned, reference, start).sum())

    eps = 1e-5
    difference = (moved(eps) - moved(-eps)) / (2 * eps)
    exact = girsanov.path_kl_gradient(scores, reference, start, direction.F, direction.f)
    frozen = girsanov.path_kl_gradient(scores, reference, start, direction.F, direction.f, frozen_states=True)
    assert exact == pytest.approx(difference, rel=1e-7)
    assert abs(frozen - difference) > 0.05 * abs(difference)


def test_frozen_states_are_right_only_where_the_gap_is_free_of_the_state():
    ones, zeros = np.ones((50, 1, 1)), np.zeros((50, 1))
    scores, reference = slopes(-0.7), slopes(-1.0)
    exact = girsanov.path_kl_gradient(scores, reference, STANDARD, ones, zeros)
    frozen = girsanov.path_kl_gradient(scores, reference, STANDARD, ones, zeros, frozen_states=True)
    assert (exact, frozen) == pytest.approx((2.813517973856, 2.103937976209), rel=1e-11)  # a quarter is missing
    assert frozen == pytest.approx(2 * 0.3155906964313888 / 0.3, rel=1e-12)
    shifted = slopes(-1.0, shift=0.5)
    both = [
        girsanov.path_kl_gradient(shifted, reference, STANDARD, 0 * ones, zeros + 1, frozen_states=frozen_states)
        for frozen_states in (False, True)
    ]
    assert both == pytest.approx([2.0, 2.0], rel=1e-12)


def test_frozen_states_can_have_the_wrong_sign():
    """s - s_0 = c - y from Y_0 near 1: raising c shrinks the early gap, and the later states follow c."""
    reference, start = slopes(-1.0, 50, 1.7), Gaussian.scalar(1.0, 0.1)

    def kl(c):
        return float(girsanov.path_kl(slopes(-2.0, 50, 1.7, c), reference, start).sum())

    direction = np.zeros((50, 1, 1)), np.ones((50, 1))
    exact, frozen = (
        girsanov.path_kl_gradient(slopes(-2.0, 50, 1.7, 0.5), reference, start, *direction, frozen_states=frozen_states)
        for frozen_states in (False, True)
    )
    assert exact == pytest.approx((kl(0.5001) - kl(0.4999)) / 0.0002, rel=1e-7)
    assert exact < -0.02 < 0.02 < frozen


# --- the adjoint -------------------------------------------------------------------------------------------------


def sampled(steps, paths=2000, horizon=2.0):
    generator = Stream(2).child("adjoint").child(str(steps)).generator()
    h = horizon / steps
    return generator.normal(size=paths), math.sqrt(h) * generator.normal(size=(paths, steps)), h


def test_discrete_adjoint_is_the_finite_difference_at_fixed_noise():
    start, noise, h = sampled(32, 50)
    paths = euler_paths(Drift(0.7, 0.1), start, noise, h)
    found = discrete_adjoint(Drift(0.7, 0.1), paths, h, np.cos(paths[:, -1]))
    eps = 1e-6
    for i, (da, db) in enumerate([(eps, 0.0), (0.0, eps)]):
        ends = [euler_paths(Drift(0.7 + s * da, 0.1 + s * db), start, noise, h)[:, -1] for s in (1, -1)]
        np.testing.assert_allclose(found[:, i], (np.sin(ends[0]) - np.sin(ends[1])) / (2 * eps), atol=3e-8)
    other = euler_adjoint(Drift(0.7, 0.1), paths, h, np.cos(paths[:, -1]))
    assert np.abs(other - found).max() > 1e-2


def test_discrete_adjoint_is_forward_sensitivity():
    start, noise, h = sampled(32, 50)
    drift = Drift(0.7, 0.1)
    paths = euler_paths(drift, start, noise, h)
    tangent = np.zeros((50, 2))
    for s in range(32):
        tangent = (1 + h * drift.in_x(paths[:, s]))[:, None] * tangent + h * drift.in_theta(paths[:, s])
    found = discrete_adjoint(drift, paths, h, np.cos(paths[:, -1]))
    np.testing.assert_allclose(found, np.cos(paths[:, -1])[:, None] * tangent, rtol=1e-10, atol=1e-12)


def test_the_euler_adjoint_is_wrong_by_order_h():
    rms = []
    for steps in (16, 64, 256):
        start, noise, h = sampled(steps)
        drift = Drift(0.7, 0.0)
        paths = euler_paths(drift, start, noise, h)
        gap = euler_adjoint(drift, paths, h, paths[:, -1]) - discrete_adjoint(drift, paths, h, paths[:, -1])
        rms.append(np.sqrt(np.mean(gap**2, axis=0)))
    slope = np.log2(np.array(rms[:-1]) / np.array(rms[1:])) / 2
    assert (np.array(rms[0]) > 0.05).all()
    np.testing.assert_allclose(slope, 1, atol=0.15)  # neither 1/2 nor 2


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AffineScores([[[1.0]]], [[0.0], [0.0]], 0.1), "F has shape"),
        (lambda: AffineScores([[[1.0]]], [[0.0]], 0.0), "step = 0.0: must lie in"),
        (lambda: girsanov.path_kl(slopes(-1.0), slopes(-1.0, 40), STANDARD), "reference has 40 steps"),
        (lambda: girsanov.path_kl(slopes(-1.0), slopes(-1.0), Gaussian.diagonal([0, 0], [1, 1])), "start has dim"),
        (lambda: girsanov.path_kl_gradient(slopes(-1.0), slopes(-1.0), STANDARD, [[[1.0]]], [[0.0]]), "dF has shape"),
        (lambda: euler_paths(Drift(0.7, 0.0), [0.0], [[0.0], [0.0]], 0.1), "start has shape"),
        (lambda: discrete_adjoint(Drift(0.7, 0.0), [[0.0, math.nan]], 0.1, [1.0]), "paths = .*: must be finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
