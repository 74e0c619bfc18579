import cmath
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory import schedules
from theory.schedules import (
    NoiseSchedule,
    cosine_family,
    cosine_family_jacobian,
    sigmoid_family,
    sigmoid_family_jacobian,
)

betas = st.lists(st.floats(1e-4, 0.99), min_size=1, max_size=12)

# Parameters inside the domains of both forms, and the released defaults, where the last beta is clipped.
COSINE = [(0.2, 0.9, 2.0, 0.02), (0.0, 0.7, 0.8, 0.0), (0.0, 1.0, 1.0, 0.008), (0.3, 1.0, 1.7, 0.1)]
SIGMOID = [(-3.0, 3.0, 1.0, 0.0), (0.1, 1.3, 0.4, -0.3), (-2.0, 5.0, 2.5, 0.7)]


def reference_family(kind: str, form: str, T: int, theta: list[complex]) -> list[complex]:
    """alpha_bar written step by step in complex arithmetic, for complex-step derivatives."""
    start, end, tau, epsilon = theta

    def shape(y: complex) -> complex:
        if kind == "cosine":
            base = cmath.cos((y + epsilon) / (1 + epsilon) * math.pi / 2)
            return base ** (2 * tau) if base.real > 1e-15 else 0.0
        centre = 1.0 if form == "released" else 0.0
        return 1 / (1 + cmath.exp(-((centre - y) / tau + epsilon)))

    if form == "chen":
        values = [shape(start + (end - start) * t / T) for t in range(T + 1)]
        return [(v - values[-1]) / (values[0] - values[-1]) for v in values]
    values = [shape((t * (end - start) + start) / T) for t in range(T + 1)]
    result: list[complex] = [1.0]
    for before, after in zip(values[:-1], values[1:], strict=True):
        ratio = after / before
        result.append(result[-1] * (0.001 if ratio.real < 0.001 else 1.0 if ratio.real > 1 else ratio))
    return result


@pytest.mark.parametrize("form", ["chen", "released"])
@pytest.mark.parametrize(("kind", "theta"), [("cosine", c) for c in COSINE] + [("sigmoid", s) for s in SIGMOID])
def test_families_and_jacobians_equal_complex_steps(kind: str, theta: tuple[float, ...], form: schedules.Form) -> None:
    T = 23
    family, jacobian = (
        (cosine_family, cosine_family_jacobian) if kind == "cosine" else (sigmoid_family, sigmoid_family_jacobian)
    )
    expected = np.real(reference_family(kind, form, T, list(theta)))
    np.testing.assert_allclose(family(T, *theta, form=form), expected, rtol=1e-12, atol=1e-15)
    h = 1e-30
    columns = [
        np.imag(reference_family(kind, form, T, [v + 1j * h * (i == k) for i, v in enumerate(theta)])) / h
        for k in range(4)
    ]
    np.testing.assert_allclose(jacobian(T, *theta, form=form), np.stack(columns, axis=1), rtol=1e-10, atol=1e-13)


def test_the_released_form_confounds_start_and_end() -> None:
    """start is divided by T, so that only end - start matters up to 1/T: the bilevel paper's "inverse" updates."""
    T, theta = 1000, (0.2, 0.9, 2.0, 0.02)
    released = cosine_family_jacobian(T, *theta, form="released")
    correct = cosine_family_jacobian(T, *theta, form="chen")
    for jacobian, aligned in ((released, True), (correct, False)):
        by_start, by_end = jacobian[:, 0], jacobian[:, 1]
        cosine = by_start @ by_end / math.sqrt((by_start @ by_start) * (by_end @ by_end))
        assert (cosine < -0.99999) == aligned
    np.testing.assert_allclose(
        cosine_family(T, 0.2, 0.9, 2.0, 0.02, form="released"),
        cosine_family(T, 0.0, 0.7, 2.0, 0.02, form="released"),
        atol=1e-3,
    )


@given(st.floats(-4, -1), st.floats(1, 4), st.floats(0.2, 3), st.floats(-1, 1))
def test_the_offset_of_the_chen_sigmoid_is_a_shift(s: float, e: float, tau: float, eps: float) -> None:
    shifted = sigmoid_family(17, s - tau * eps, e - tau * eps, tau, 0.0)
    np.testing.assert_allclose(sigmoid_family(17, s, e, tau, eps), shifted, atol=1e-9)


def test_chen_form_covers_its_two_ancestors() -> None:
    u = np.arange(101) / 100
    nichol = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(cosine_family(100, 0, 1, 1, 0.008), nichol / nichol[0], atol=1e-14)
    squashed = 1 / (1 + np.exp(-(6 * u - 3) / 0.7))
    chen = (squashed[-1] - squashed) / (squashed[-1] - squashed[0])
    np.testing.assert_allclose(sigmoid_family(100, -3, 3, 0.7, 0), chen, atol=1e-14)


@given(st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0.1, 4), st.floats(0, 0.2), st.integers(1, 40))
def test_chen_cosine_falls_from_one_to_exactly_zero(s: float, e: float, tau: float, eps: float, T: int) -> None:
    alpha_bar = cosine_family(T, s, e, tau, eps)
    assert alpha_bar[0] == 1
    assert alpha_bar[-1] == 0
    assert (np.diff(alpha_bar) < 0).all()


@given(st.floats(-4, -1), st.floats(1, 4), st.floats(0.2, 3), st.floats(-1, 1), st.integers(1, 40))
def test_chen_sigmoid_falls_from_one_to_exactly_zero(s: float, e: float, tau: float, eps: float, T: int) -> None:
    alpha_bar = sigmoid_family(T, s, e, tau, eps)
    assert alpha_bar[0] == 1
    assert alpha_bar[-1] == 0
    assert (np.diff(alpha_bar) < 0).all()


@given(betas)
def test_schedule_properties_belong_to_the_forward_chain(values: list[float]) -> None:
    schedule = NoiseSchedule(values)
    level = 1.0
    for t, beta in enumerate(values):
        assert schedule.alpha_bar_previous[t] == pytest.approx(level, rel=1e-12)
        # Var(x_{t-1} | x_t, x_0) by Gaussian conditioning of (x_{t-1}, x_t) given x_0.
        prior, cross = 1 - level, math.sqrt(1 - beta) * (1 - level)
        level *= 1 - beta
        assert schedule.alpha_bar[t] == pytest.approx(level, rel=1e-12)
        assert schedule.one_minus_alpha_bar[t] == pytest.approx(1 - level, rel=1e-10)
        assert schedule.posterior_variance[t] == pytest.approx(prior - cross**2 / (1 - level), rel=1e-7, abs=1e-12)
    assert schedule.steps == len(values)
    np.testing.assert_allclose(NoiseSchedule.from_alpha_bar(schedule.alpha_bar).beta, values, rtol=1e-9)


def test_tiny_betas_do_not_cancel() -> None:
    """To first order in beta, 1 - alpha_bar_t is the sum of the betas up to t."""
    beta = 1e-13 * np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    schedule, total = NoiseSchedule(beta), np.cumsum(beta)
    np.testing.assert_allclose(schedule.one_minus_alpha_bar, total, rtol=1e-11)
    np.testing.assert_allclose(schedule.posterior_variance, beta * (total - beta) / total, rtol=1e-11)


def test_named_schedules() -> None:
    # Development study, 2026: what "exp(-x) = 1 - x" costs in the last alpha_bar.
    linear = schedules.linear(1000, 1e-4, 0.02)
    assert linear.alpha_bar[-1] / math.exp(-linear.beta.sum()) == pytest.approx(0.9345281379, rel=1e-9)
    assert linear.alpha_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    vp = schedules.vp_linear(1000)
    assert vp.beta.sum() == pytest.approx(10.05, rel=1e-12)
    cosine = schedules.cosine(1000)
    assert cosine.beta[-1] == pytest.approx(0.999, rel=1e-12)
    assert (cosine.beta[:-1] < 0.999).all()
    sigmoid = schedules.sigmoid(1000)
    assert sigmoid.alpha_bar[-1] == pytest.approx(1e-9, rel=1e-9)
    assert sigmoid.alpha_bar[499] == pytest.approx(0.5, rel=1e-12)


def test_released_families_of_the_study() -> None:
    # Development study, 2026.
    assert sigmoid_family(1000, 0, 1, 1, 0.008, form="released")[-1] == pytest.approx(0.685203955, rel=1e-9)
    assert sigmoid_family(1000, -3, 3, 1, 0, form="released")[-1] == pytest.approx(0.009174937, abs=1e-9)
    # The betas become 0/0 as soon as the cosine vanishes before the last step: for end > T/(T - 1).
    assert np.isfinite(cosine_family(1000, 0, 1.001, 1, 0.008, form="released")).all()
    with pytest.raises(ValueError, match="1 betas are 0/0"):
        cosine_family(1000, 0, 1.0011, 1, 0.008, form="released")
    with pytest.raises(ValueError, match="9 betas are 0/0"):
        cosine_family(1000, 0, 1.01, 1, 0.008, form="released")


@given(st.integers(2, 500), st.data())
def test_ddim_grid_spreads_over_all_steps(T: int, data: st.DataObject) -> None:
    S = data.draw(st.integers(2, T))
    grid = schedules.ddim_grid(T, S)
    assert grid[0] == 0
    assert grid[-1] == T - 1
    assert len(grid) == S
    gaps = np.diff(grid)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert schedules.ddim_grid(T, T).tolist() == list(range(T))


def test_ddim_grid_of_the_study() -> None:
    assert schedules.ddim_grid(1000, 10).tolist() == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule([0.5, 0.0]), r"beta\[1\] = 0.0: must lie in \(0, 1\)"),
        (lambda: NoiseSchedule([]), r"beta has shape \(0,\)"),
        (lambda: NoiseSchedule.from_alpha_bar([0.9, 0.9]), r"alpha_bar\[1\] = 0.9: must be positive and less than 0.9"),
        (lambda: NoiseSchedule.from_alpha_bar([1.0]), r"alpha_bar\[0\] = 1.0: must be positive and less than 1.0"),
        (lambda: NoiseSchedule.from_alpha_bar([0.9, 0.0]), r"alpha_bar\[1\] = 0.0: must be positive"),
        (lambda: schedules.linear(10, 0.1, 1.2), r"beta\[8\] = 1.07.*: must lie in"),
        (lambda: schedules.linear(0, 0.1, 0.2), r"T = 0: must be an integer >= 1"),
        (lambda: schedules.vp_linear(19), r"T = 19: must be so large that every beta is below 1"),
        (lambda: schedules.vp_linear(100, 2.0, 1.0), r"beta_max = 1.0: must lie in \[2.0, inf\)"),
        (lambda: schedules.vp_linear(100, 0.0), r"beta_min = 0.0: must lie in \(0.0, inf\)"),
        (lambda: schedules.cosine(10, -0.1), r"offset = -0.1: must lie in"),
        (lambda: schedules.sigmoid(10, 3.0, -3.0), r"start, end = 3.0, -3.0: must satisfy start < end"),
        (lambda: cosine_family(10, 0.0, 1.1, 1.0, 0.0), r"start, end = 0.0, 1.1: must satisfy 0 <= start < end <= 1"),
        (lambda: cosine_family(10, 0.0, 1.0, 0.0, 0.0), r"tau = 0.0: must lie in"),
        (lambda: cosine_family(10, 0.0, 1.0, 1.0, -0.1), r"epsilon = -0.1: must lie in"),
        (lambda: cosine_family(10, 0.0, 1.0, 1.0, 0.0, form="code"), r"form = 'code': must be 'chen' or 'released'"),
        (lambda: cosine_family_jacobian(10, 0.0, 1.0, 0.5, 0.0), r"tau = 0.5: must exceed 1/2 for a derivative"),
        (lambda: cosine_family_jacobian(100, 0, 1.1, 1, 0, form="released"), r"betas are 0/0"),
        (lambda: sigmoid_family(10, 0.0, math.nan, 1.0, 0.0), r"start, end, tau, epsilon = .*: must be finite"),
        (lambda: sigmoid_family_jacobian(10, 1.0, 0.0, 1.0, 0.0), r"start, end = 1.0, 0.0: must satisfy start < end"),
        (lambda: schedules.ddim_grid(10, 11), r"S = 11: must not exceed T = 10"),
        (lambda: schedules.ddim_grid(10, 1), r"S = 1: must be an integer >= 2"),
        (lambda: schedules.ddim_grid(10, 2.5), r"S = 2.5: must be an integer >= 2"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
