"""theory.control_constants against reference numbers, quadrature of the Bellman equation, and extremal systems."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import make_interp_spline
from scipy.stats import chi, norm

from theory import control_constants as cc
from theory.control import ControlSchedule
from theory.control_constants import SystemConstants
from theory.mixture import GaussianMixture

# --- reference numbers, all from an independent derivation -----------------------------------------------------------

DDPM = ControlSchedule.ddpm([0.7, 0.8, 0.9], 1.0)
WELLS = GaussianMixture([0.5, 0.5], [[-1.5], [1.5]], [[[0.3]], [[0.3]]])
SYSTEM = SystemConstants.of_mixture(DDPM, WELLS, 0.65, 0.845).published()
KAPPA_2 = 1.2533141373


def same(found, reference):
    """Equal up to half a unit in the tenth digit, to which the references are rounded."""
    np.testing.assert_allclose(found, reference, rtol=5e-10)


def test_reference_score_constants():
    same(SYSTEM.score_lipschitz, [1.5451174289, 4.5688085328, 12.0891161432])
    same(SYSTEM.score_gradient_lipschitz, [3.4291159101, 13.0078524374, 43.7935829644])


def test_reference_constants_of_the_optimum():
    found = cc.optimal_regularity(DDPM, SYSTEM, 0.5)
    same(found.value_lipschitz, [5.664576786, 3.238271871, 1.513458234, 0.65])
    same(found.value_lipschitz, cc.optimal_lipschitz(DDPM, SYSTEM))
    same(found.value_gradient_lipschitz, [712.4551035, 115.7671225, 12.16278514, 0.845])
    same(found.control_lipschitz, [6.423568191, 14.13761707, 34.17823229])
    same(found.control_gradient_lipschitz, [56.58331431, 172.1276716, 606.6685757])
    plane = cc.optimal_regularity(DDPM, SYSTEM, 0.5, cc.published_kappa(2))
    same(plane.control_gradient_lipschitz, [84.96620875, 255.5278454, 902.9583377])
    same(plane.value_gradient_lipschitz, found.value_gradient_lipschitz)


def test_reference_constants_of_the_iterates():
    found = cc.universal_regularity(DDPM, SYSTEM, 0.5)
    same(found.value_lipschitz, [45.31661428, 12.95308749, 3.026916469, 0.65])
    same(found.value_gradient_lipschitz, [8305.579059, 876.1455968, 55.30984879, 0.845])
    plane = cc.universal_regularity(DDPM, SYSTEM, 0.5, cc.published_kappa(2))
    same(plane.value_gradient_lipschitz, [11515.0291, 1211.408839, 75.61044285, 0.845])
    sharp = cc.universal_regularity(DDPM, SYSTEM, 0.5, sharp=True)
    same(sharp.value_lipschitz, [11.06362653, 5.059799799, 1.891822793, 0.65])
    same(sharp.value_gradient_lipschitz, [3015.092497, 428.3899387, 37.03671282, 0.845])
    same(sharp.value_lipschitz, cc.universal_lipschitz(DDPM, SYSTEM, 0.5, sharp=True))


def test_reference_strengths_and_errors():
    strengths = cc.admissible_strength(DDPM, SYSTEM, 0.5)
    same(strengths, [525.6873581, 22.12393951, 0.169])
    schedule = DDPM.with_strength(strengths)
    one, three = (cc.theorem_bounds(schedule, SYSTEM, 0.5, m) for m in (1, 3))
    same(one.control, [0.01675012897, 0.07648266013, 1.824390958])
    same(one.gradient, [43.90047009, 8.905247646, 1.135093676, 0.0])
    same(three.control, [0.006845004628, 0.0277249643, 0.4560977394])


# --- kappa -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "ratio"), [(1, 1.0), (2, math.pi / 2), (64, 9.987425), (12288, 138.928614)])
def test_the_published_kappa_grows_with_the_dimension(d, ratio):
    assert cc.published_kappa(d) / cc.SHARP_KAPPA == pytest.approx(ratio, rel=1e-6)
    assert cc.published_kappa(d) == pytest.approx(chi(d).mean(), rel=1e-8)


def test_the_sharp_constants_are_moments_of_a_gaussian():
    assert pytest.approx(2 * quad(lambda w: w * norm.pdf(w), 0, 12)[0]) == cc.SHARP_KAPPA
    inner, outer = (
        quad(lambda w: (1 - w * w) * norm.pdf(w), 0, 1)[0],
        quad(lambda w: (w * w - 1) * norm.pdf(w), 1, 12)[0],
    )
    assert pytest.approx(2 * (inner + outer)) == cc.SMOOTHED_BEND


@pytest.mark.parametrize("planted", [1.0, 0.5, 1 / math.sqrt(math.pi), 0.999 * cc.SHARP_KAPPA])
def test_no_kappa_below_the_sharp_one_holds(planted):
    # V = x |x| / 2 (+ 0 in further dimensions) has L1 = 1, and grad h = E|z + sigma W| has the slope kappa / sigma at 0
    sigma, step = 0.3, 1e-4

    def second(z):
        kink = -z / sigma
        return sum(quad(lambda w: np.sign(z + sigma * w) * norm.pdf(w), *part)[0] for part in ((-9, kink), (kink, 9)))

    slope = sigma * (second(step) - second(-step)) / (2 * step)
    assert slope == pytest.approx(cc.SHARP_KAPPA, rel=1e-6)
    assert (slope > planted) == (planted < cc.SHARP_KAPPA)


# --- constants of scores -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.floats(0.0, 4.0), st.floats(0.02, 2.0))
def test_two_equal_wells_in_closed_form(mu, variance):
    schedule = ControlSchedule.ddpm([0.6, 0.95], 1.0)
    data = GaussianMixture([0.5, 0.5], [[-mu], [mu]], [[[variance]], [[variance]]])
    found = SystemConstants.of_mixture(schedule, data, 1.0)
    v = schedule.alpha_bar * variance + 1 - schedule.alpha_bar
    steep = schedule.alpha_bar * mu**2 / v**2  # s' = - 1 / v + steep sech^2
    least, most = -1 / v, steep - 1 / v
    np.testing.assert_allclose(found.score_lipschitz, np.maximum(-least, most), rtol=1e-9)
    bend = (schedule.alpha_bar**0.5 * mu / v) ** 3 * 4 / 3**1.5  # s'' = - 2 (mu / v)^3 sech^2 tanh
    np.testing.assert_allclose(found.score_gradient_lipschitz, bend, rtol=1e-9, atol=1e-12)
    noise = 1 - schedule.alpha
    expansion = np.maximum(abs(1 + noise * least), abs(1 + noise * most))
    np.testing.assert_allclose(found.expansions(schedule), expansion, rtol=1e-9)


MIXTURES = [
    GaussianMixture([0.2, 0.5, 0.3], [[-2.0], [0.1], [3.0]], [[[0.05]], [[1.0]], [[0.3]]]),
    GaussianMixture([1 - 1e-6, 1e-6], [[0.0], [9.0]], [[[0.2]], [[0.4]]]),
    GaussianMixture([0.999, 0.001], [[0.0], [0.0]], [[[1.0]], [[0.0]]]),
    GaussianMixture([0.6, 0.4], [[-1.0], [1.0]], [[[0.0]], [[0.0]]]),
]


@pytest.mark.parametrize("data", MIXTURES, ids=["three wells", "rare", "spike", "points"])
def test_suprema_of_mixture_scores_by_differences(data):
    schedule = ControlSchedule.ddpm([0.7, 0.97], 1.0)
    found = SystemConstants.of_mixture(schedule, data, 1.0)
    for t in range(2):
        grid, spacing = np.linspace(-15, 15, 100_001, retstep=True)
        score = data.noised_score(grid[:, None], schedule.alpha_bar[t])[:, 0]
        slope = np.diff(score) / spacing
        bend = np.diff(slope) / spacing
        assert abs(slope).max() == pytest.approx(found.score_lipschitz[t], rel=1e-4)
        assert abs(bend).max() == pytest.approx(found.score_gradient_lipschitz[t], rel=2e-3)
        expansion = abs(1 + (1 - schedule.alpha[t]) * slope).max()
        assert expansion == pytest.approx(found.expansions(schedule)[t], rel=1e-4)


def test_one_component_is_the_gaussian():
    mixture = SystemConstants.of_mixture(DDPM, GaussianMixture([1.0], [[3.0]], [[[0.3]]]), 1.0)
    gaussian = SystemConstants.of_gaussian(DDPM, 0.3, 1.0)
    np.testing.assert_allclose(mixture.score_lipschitz, gaussian.score_lipschitz, rtol=1e-12)
    np.testing.assert_allclose(mixture.expansions(DDPM), gaussian.expansions(DDPM), rtol=1e-12)
    assert not gaussian.score_gradient_lipschitz.any()
    assert mixture.score_gradient_lipschitz.max() < 1e-9


def test_correlated_gaussian_by_matrices():
    cov = np.array([[2.0, 0.9], [0.9, 0.5]])
    found = SystemConstants.of_gaussian(DDPM, cov, 1.0)
    for t in range(3):
        level = DDPM.alpha_bar[t]
        slope = -np.linalg.inv(level * cov + (1 - level) * np.eye(2))
        assert found.score_lipschitz[t] == pytest.approx(np.linalg.norm(slope, 2))
        expected = np.linalg.norm(np.eye(2) + (1 - DDPM.alpha[t]) * slope, 2)
        assert found.expansions(DDPM)[t] == pytest.approx(expected)


# --- the Bellman equation by quadrature --------------------------------------------------------------------------

GRID = np.linspace(-24.0, 24.0, 2401)
INNER = abs(GRID) <= 8.0
NODES = np.linspace(-8.5, 8.5, 171)
WEIGHTS = norm.pdf(NODES) * (NODES[1] - NODES[0])


class Curve:
    """A function of one variable on a grid; continued linearly."""

    def __init__(self, grid, values):
        self.grid, self.values = grid, values
        self.spline = make_interp_spline(grid, values, k=5)

    def derivative(self, order=1):
        return self.spline.derivative(order)(self.grid)

    def __call__(self, y):
        inside = np.clip(y, self.grid[0], self.grid[-1])
        beyond = y - inside
        values = self.spline(inside)
        return values + self.spline.derivative()(inside) * beyond if beyond.any() else values


def smoothed(sigma, function):
    """H = E function(z + sigma W) and its gradient, without the function's derivative: Stein's identity."""
    grid = np.linspace(-36.0, 36.0, 3601)
    values = [function(grid + sigma * node) for node in NODES]
    average = Curve(grid, sum(w * v for w, v in zip(WEIGHTS, values, strict=True)))
    slope = sum(w * node * v for w, node, v in zip(WEIGHTS, NODES, values, strict=True)) / sigma
    return average, Curve(grid, slope)


def solved(schedule, score, reward, iterations):
    """Controls and value functions on GRID, T and T + 1 of them; iterations None means the optimum."""
    controls, values, after = [], [Curve(GRID, reward(GRID))], reward
    for t in reversed(range(schedule.steps)):
        average, slope = smoothed(schedule.sigma[t], after)
        pretrained = score(t, GRID)
        control = pretrained
        for _ in range(80 if iterations is None else iterations[t]):
            control = pretrained + schedule.gain[t] * slope(schedule.mean(t, GRID, control))
        cost = schedule.strength[t] * schedule.step_kl(t, control[:, None], pretrained[:, None])
        after = Curve(GRID, average(schedule.mean(t, GRID, control)) - cost)
        controls.insert(0, Curve(GRID, control))
        values.insert(0, after)
    return controls, values


def largest(values):
    return float(np.abs(values[INNER]).max())


TWO = ControlSchedule.ddpm([0.8, 0.9], 1.0)
DATA = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.5]], [[0.5]]])


def score_of_data(t, y):
    return DATA.noised_score(y[:, None], TWO.alpha_bar[t])[:, 0]


def softened(k):
    """log cosh(k y) / k: 1-Lipschitz with a k-Lipschitz gradient."""
    return lambda y: (np.logaddexp(k * y, -k * y) - math.log(2)) / k


CASES = [("published", 1.0), ("sharp", 1.0), ("lipschitz", 8.0)]


@pytest.fixture(scope="module", params=CASES, ids=[rule for rule, _ in CASES])
def problem(request):
    rule, k = request.param
    system = SystemConstants.of_mixture(TWO, DATA, 1.0, k)
    if rule == "lipschitz":
        assert (
            cc.admissible_strength(TWO, system, 0.5, rule)[1] < TWO.sigma[1] ** 2 * k
        )  # beyond the reach of the paper
    schedule = TWO.with_strength(cc.admissible_strength(TWO, system, 0.5, rule))
    iterations = [(m, m) for m in range(5)] + [(4, 1)]
    runs = {m: solved(schedule, score_of_data, softened(k), m) for m in iterations}
    return rule, schedule, system, solved(schedule, score_of_data, softened(k), None), runs


def test_observed_regularity_is_within_the_bounds(problem):
    rule, schedule, system, (controls, values), runs = problem
    if rule == "lipschitz":
        bound = cc.optimal_lipschitz(schedule, system)
        everywhere = cc.universal_lipschitz(schedule, system, 0.5, sharp=True)
        for t in range(2):
            assert largest(values[t].derivative()) <= bound[t]
            assert all(largest(run[1][t].derivative()) <= everywhere[t] for run in runs.values())
        return
    used, sharp = (system, True) if rule == "sharp" else (system.published(), False)
    optimum = cc.optimal_regularity(schedule, used, 0.5)
    for t in range(2):
        assert largest(values[t].derivative()) <= optimum.value_lipschitz[t]
        assert largest(values[t].derivative(order=2)) <= optimum.value_gradient_lipschitz[t]
        assert largest(controls[t].derivative()) <= optimum.control_lipschitz[t]
        assert largest(controls[t].derivative(order=2)) <= optimum.control_gradient_lipschitz[t]
    for m, (iterates, functions) in runs.items():
        bound = cc.iterate_regularity(schedule, used, 0.5, m, sharp=sharp)
        for t in range(2):
            assert largest(iterates[t].derivative()) <= bound.control_lipschitz[t] * (1 + 1e-8)
            assert largest(iterates[t].derivative(order=2)) <= bound.control_gradient_lipschitz[t] * (1 + 1e-5)
            assert largest(functions[t].derivative()) <= bound.value_lipschitz[t]
            assert largest(functions[t].derivative(order=2)) <= bound.value_gradient_lipschitz[t]


def test_observed_errors_are_within_the_bounds(problem):
    rule, schedule, system, (controls, values), runs = problem
    for m, (iterates, functions) in runs.items():
        theorem = cc.theorem_bounds(schedule, system, 0.5, m, rule)
        improved = cc.improved_bounds(schedule, system, 0.5, m, rule)
        losses = cc.value_bounds(schedule, system, 0.5, m, rule)
        for t in range(2):
            control = largest(iterates[t].values - controls[t].values)
            gradient = largest(functions[t].derivative() - values[t].derivative())
            gap = (values[t].values - functions[t].values)[INNER]
            assert control <= improved.control[t] + 1e-9 <= theorem.control[t] + 2e-9
            assert gradient <= improved.gradient[t] + 1e-9 <= theorem.gradient[t] + 2e-9
            assert gap.min() >= -1e-9
            assert gap.max() <= losses[t] + 1e-9


def test_the_exponents_cannot_be_raised(problem):
    # Planted: rho^(2.5 m) instead of rho^m for controls, rho^(5 m) instead of rho^(2 m) for values, for gradients
    # the factor of the controls to the power 1 or 3 instead of 2. The last step refutes them all.
    rule, schedule, system, (controls, values), runs = problem
    last, m = 1, 4
    iterates, functions = runs[(m, m)]
    slopes = cc.slope_bound(schedule, system, 0.5, rule)
    rho = float((schedule.sigma**2 * slopes / schedule.strength)[last])
    start = cc.improved_bounds(schedule, system, 0.5, 0, rule)
    assert largest(iterates[last].values - controls[last].values) > start.control[last] * rho ** (2.5 * m)
    early, late = (largest(runs[(k, k)][1][last].derivative() - values[last].derivative()) for k in (2, 4))
    first, second = (largest(runs[(k, k)][0][last].values - controls[last].values) for k in (2, 4))
    assert (second / first) ** 2.5 < late / early < (second / first) ** 1.5
    gap = (values[last].values - functions[last].values)[INNER].max()
    assert gap > cc.value_bounds(schedule, system, 0.5, 0, rule)[last] * rho ** (5 * m)


# --- extremal systems --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extremal():
    """Scores y / 2 and a reward that is y^2 / 2 up to |y| = 8 and linear beyond: all inequalities become equalities."""
    system = SystemConstants([0.5, 0.5], [0.0, 0.0], 8.0, 1.0)
    schedule = TWO.with_strength(cc.admissible_strength(TWO, system, 0.6, "optimal"))

    def huber(y):
        return np.where(abs(y) < 8.0, 0.5 * y**2, 8.0 * abs(y) - 32.0)

    return system, schedule, solved(schedule, lambda t, y: 0.5 * y, huber, None)


def test_the_bounds_of_the_optimum_are_attained(extremal):
    system, schedule, (controls, values) = extremal
    bound = cc.optimal_regularity(schedule, system, 0.6)
    for t in range(2):
        for observed, limit in (
            (values[t].derivative(), bound.value_lipschitz[t]),
            (values[t].derivative(order=2), bound.value_gradient_lipschitz[t]),
            (controls[t].derivative(), bound.control_lipschitz[t]),
        ):
            assert 0.999 < largest(observed) / limit < 1 + 1e-6


def test_planted_mistakes_are_not_bounds(extremal):
    _, schedule, (controls, values) = extremal
    lam, a, slope = 0.6, schedule.alpha[0], 0.5
    growth = 1 + (1 - a) * slope
    first, second = values[1].derivative(), values[1].derivative(order=2)
    curvature = largest(values[0].derivative(order=2))
    assert curvature > growth * growth / a * largest(second) * 1.2  # (15) without 1 / lambda
    assert curvature > growth * growth / (a * math.sqrt(lam)) * largest(second) * 1.2  # with its root
    assert largest(values[0].derivative()) > growth * largest(first) * 1.1  # (14) without 1 / sqrt(alpha)
    steepness = largest(controls[0].derivative())
    assert steepness > (slope + (1 - lam) / (1 - a)) * 1.2  # (16) without 1 / lambda
    assert steepness > (slope + (1 - lam)) / lam * 1.2  # (16) without 1 / (1 - alpha)


def test_the_lipschitz_threshold_is_exact():
    # r = |y|, pre-trained mean 0: stationary M solve M = sigma^2 / beta (2 Phi(M / sigma) - 1)
    schedule = ControlSchedule.ddpm([0.75], 1.0)
    sigma = schedule.sigma[0]
    threshold = sigma**2 * cc.slope_bound(schedule, SystemConstants([1.0], [0.0], 1.0), 0.5, "lipschitz-optimal")[0]
    assert threshold == pytest.approx(0.3989422804, rel=1e-9)  # from an independent derivation
    means = np.linspace(-2, 2, 400_002)
    for factor, solutions in ((1.001, 1), (0.999, 3)):
        residual = sigma**2 / (factor * threshold) * (2 * norm.cdf(means / sigma) - 1) - means
        assert np.count_nonzero(np.diff(np.sign(residual))) == solutions


def test_bounds_of_controls_do_not_bound_the_optimum_s_own_constant():
    # score 0, concave quadratic reward: Lip(U^(1)) = 2.5 exceeds Lip(u*) = 5/3, yet not (44)
    schedule = ControlSchedule.ddpm([0.8], 0.4)
    system = SystemConstants([0.0], [0.0], 1e3, 1.0)
    first = cc.iterate_regularity(schedule, system, 0.5, 1).control_lipschitz[0]
    assert first == pytest.approx(2.5)
    assert cc.optimal_regularity(schedule, system, 0.5).control_lipschitz[0] == pytest.approx(5.0)


# --- explosion with the number of steps --------------------------------------------------------------------------


def vp(steps):
    """The variance-preserving diffusion whose rate rises from 0.1 to 10, in exact steps; noisiest first."""
    time = np.linspace(0, 1, steps + 1)
    return ControlSchedule.ddpm(np.exp(-np.diff(0.1 * time + 4.95 * time**2))[::-1], 1.0)


# Gaussian data of variance 0.25 and a reward with both constants 1. Made with the loops of `reference_strengths`; the
# orders of magnitude agree with an independent derivation for some such schedule (1e5, 1e9, 1e31, 1e16, 1e43).
EXPLOSION = [
    (5, 0.5, 8.68e5, 4.06e4, 1.98, 0.706),
    (10, 0.5, 8.24e9, 2.76e7, 18.9, 0.505),
    (50, 0.5, 2.19e31, 1.47e21, 8.39e14, 0.204),
    (50, 0.8, 2.89e16, 3.65e11, 624.0, 0.511),
    (200, 0.8, 3.06e43, 1.57e26, 1.34e19, 0.25),
]
RULES = ("published", "optimal", "sharp", "lipschitz-optimal")


def reference_strengths(schedule, lam):
    """The largest strengths by the four rules, straight from (14), (15), (39) and its sharper form."""
    q, kappa = 1 - lam, math.sqrt(2 / math.pi)
    gaussian = {"A": 1.0, "B": 1.0}  # published, sharp: L0
    curve = {"A": 1.0, "B": 1.0, "15": 1.0, "14": 1.0}
    needed = dict.fromkeys(RULES, 0.0)
    for t in reversed(range(schedule.steps)):
        a, sigma, level = schedule.alpha[t], schedule.sigma[t], schedule.alpha_bar[t]
        slope = 1 / (0.25 * level + 1 - level)
        for rule, value in zip(RULES, (curve["A"], curve["15"], curve["B"], kappa / sigma * curve["14"]), strict=True):
            needed[rule] = max(needed[rule], sigma**2 * value / q)
        crude, fine = 1 + (1 - a) * slope, abs(1 - (1 - a) * slope)
        curve["15"] *= crude**2 / (lam * a)
        curve["14"] *= fine / math.sqrt(a)
        for name, expansion, ms in (("A", crude, range(3)), ("B", fine, range(1, 40))):
            growth, start = expansion / lam, 0 if name == "A" else 1
            bend = q / lam * kappa * growth**2 / (math.sqrt(a) * sigma * (1 - a))
            l0, l1 = gaussian[name], curve[name]
            worst0 = worst1 = 0.0
            for m in ms:
                met = 1 - start * q**m
                worst0 = max(worst0, q ** (m + 1) * met * growth * l0 / math.sqrt(a))
                total = met * expansion * growth * l1 / a + (1 + m * met) * kappa * growth**2 * l0 / (a * sigma)
                worst1 = max(worst1, q ** (m + 1) * (total + (1 - a) * bend * l0 / math.sqrt(a)))
            gaussian[name] = expansion * l0 / math.sqrt(a) + worst0
            curve[name] = expansion * growth * l1 / a + worst1
    return [needed[rule] for rule in RULES]


@pytest.mark.parametrize(("steps", "lam", "published", "optimal", "sharp", "lipschitz"), EXPLOSION)
def test_required_strengths_explode(steps, lam, published, optimal, sharp, lipschitz):
    schedule = vp(steps)
    system = SystemConstants.of_gaussian(schedule, 0.25, 1.0, 1.0)
    found = [cc.admissible_strength(schedule, system, lam, rule).max() for rule in RULES]
    np.testing.assert_allclose(found, [published, optimal, sharp, lipschitz], rtol=6e-3)
    np.testing.assert_allclose(found, reference_strengths(schedule, lam), rtol=1e-9)


def test_the_lipschitz_rule_for_iterates_still_grows_with_the_number_of_steps_unless_lambda_does():
    found = {}
    for steps in (50, 200, 800):
        schedule = vp(steps)
        system = SystemConstants.of_gaussian(schedule, 0.25, 1.0)
        found[steps] = [
            cc.admissible_strength(schedule, system, lam, "lipschitz").max() for lam in (0.5, 1 - 2 / steps)
        ]
    assert found[800][0] > 1e10 * found[50][0]
    assert all(strength[1] < 20 for strength in found.values())


def test_beyond_the_float_range_no_strength_suffices():
    schedule = vp(2000)
    system = SystemConstants.of_gaussian(schedule, 0.25, 1.0, 1.0)
    assert cc.admissible_strength(schedule, system, 0.5)[0] == math.inf
    assert cc.admissible_strength(schedule, system, 0.5, "sharp")[0] == math.inf
    with pytest.warns(cc.RegularisationWarning, match="= inf"):
        assert not cc.check_strength(schedule, system, 0.5)
    assert not np.isnan(cc.iterate_regularity(schedule, system, 0.5, 3).value_gradient_lipschitz).any()


# --- properties --------------------------------------------------------------------------------------------------

LAM = st.floats(0.02, 0.98)
SEED = st.integers(0, 2**32 - 1)


def random_system(seed):
    rng = np.random.default_rng(seed)
    schedule = ControlSchedule(rng.uniform(0.3, 0.99, 3), rng.uniform(0.1, 1.0, 3), 1.0)
    slopes = rng.exponential(3.0, 3)
    expansion = (1 + (1 - schedule.alpha) * slopes) * rng.uniform(0.3, 1.0, 3)
    bends = rng.exponential(3.0, 3) * rng.integers(0, 2, 3)
    return schedule, SystemConstants(slopes, bends, *rng.exponential(2.0, 2), expansion)


def fields(regularity):
    return np.concatenate([np.ravel(value) for value in vars(regularity).values()])


@given(SEED, LAM)
def test_identity_of_the_growth_factor(seed, lam):
    schedule, system = random_system(seed)
    crude = system.published()
    growth = 1 + (1 - schedule.alpha) * cc.optimal_regularity(schedule, crude, lam).control_lipschitz
    np.testing.assert_allclose(growth, crude.expansions(schedule) / lam, rtol=1e-12)


@given(SEED, LAM, LAM)
def test_everything_shrinks_as_lambda_grows(seed, one, other):
    schedule, system = random_system(seed)
    low, high = sorted((one, other))
    for constants in (
        lambda lam: cc.optimal_regularity(schedule, system, lam),
        lambda lam: cc.universal_regularity(schedule, system, lam),
        lambda lam: cc.universal_regularity(schedule, system, lam, sharp=True),
    ):
        assert (fields(constants(high)) <= fields(constants(low)) * (1 + 1e-12)).all()


@given(SEED, LAM)
def test_order_of_the_constants(seed, lam):
    schedule, system = random_system(seed)
    best = fields(cc.optimal_regularity(schedule, system, lam))
    sharp = fields(cc.universal_regularity(schedule, system, lam, sharp=True))
    crude = fields(cc.universal_regularity(schedule, system, lam))
    published = fields(cc.universal_regularity(schedule, system.published(), lam, cc.published_kappa(5)))
    for smaller, larger in ((best, sharp), (sharp, crude), (crude, published)):
        assert (smaller <= larger * (1 + 1e-12)).all()


@given(SEED, LAM, st.booleans())
def test_the_roughest_iterate_is_the_roughest(seed, lam, sharp):
    schedule, system = random_system(seed)
    limit = cc.universal_regularity(schedule, system, lam, sharp=sharp)
    # (38), (39) are maxima over m: attained where they say, and by no m exceeded
    worst = cc.roughest_iterations(schedule, system, lam, sharp=sharp)
    first = cc.iterate_regularity(schedule, system, lam, worst[0], sharp=sharp).value_lipschitz
    second = cc.iterate_regularity(schedule, system, lam, worst[1], sharp=sharp).value_gradient_lipschitz
    np.testing.assert_allclose(first, limit.value_lipschitz, rtol=1e-12)
    np.testing.assert_allclose(second, limit.value_gradient_lipschitz, rtol=1e-12)
    if not sharp:
        assert not np.any(worst)
    for m in (*range(12), 20, 40, 100, 300):
        found = fields(cc.iterate_regularity(schedule, system, lam, m, sharp=sharp))
        assert (found <= fields(limit) * (1 + 1e-12)).all()


def test_the_roughest_gradient_need_not_come_after_one_update():
    system = SystemConstants([2.5], [0.0], 1e-3, 100.0)
    slope, bend = cc.roughest_iterations(ControlSchedule.ddpm([0.64], 1.0), system, 0.1, sharp=True)
    assert (slope[0], bend[0]) == (7, 7)


@given(SEED, LAM)
def test_bounds_of_iterates_run_from_the_score_to_the_limit(seed, lam):
    schedule, system = random_system(seed)
    start = cc.iterate_regularity(schedule, system, lam, 0)
    np.testing.assert_allclose(start.control_lipschitz, system.score_lipschitz)
    np.testing.assert_allclose(start.control_gradient_lipschitz, system.score_gradient_lipschitz)
    end, limit = cc.iterate_regularity(schedule, system, lam, 10_000), cc.optimal_regularity(schedule, system, lam)
    np.testing.assert_allclose(end.control_lipschitz, limit.control_lipschitz)
    np.testing.assert_allclose(end.control_gradient_lipschitz, limit.control_gradient_lipschitz)
    # the last step starts from the reward, where the residual alone separates iterates from the optimum
    assert end.value_lipschitz[2] == pytest.approx(limit.value_lipschitz[2])
    assert end.value_gradient_lipschitz[2] == pytest.approx(limit.value_gradient_lipschitz[2])


@given(SEED, LAM, st.lists(st.integers(0, 6), min_size=3, max_size=3), st.floats(1.0, 3.0))
def test_theorem_bounds_are_the_explicit_sum(seed, lam, m, slack):
    schedule, system = random_system(seed)
    used = system.published()
    schedule = schedule.with_strength(slack * cc.admissible_strength(schedule, used, lam))
    found = cc.theorem_bounds(schedule, system, lam, m)
    expansion, roots = used.expansions(schedule), np.sqrt(schedule.alpha)
    best, universal = cc.optimal_lipschitz(schedule, used), cc.universal_lipschitz(schedule, used, lam)
    q = 1 - lam
    for t in range(3):
        total = sum(
            math.prod(expansion[j] / (lam * roots[j]) for j in range(t + 1, k))
            * (expansion[k] / roots[k])
            * (best[k + 1] + universal[k + 1] / lam)
            * q ** (m[k] + 1)
            for k in range(t + 1, 3)
        )
        assert found.gradient[t + 1] == pytest.approx(total)
        expected = schedule.gain[t] * (q ** m[t] * best[t + 1] + (1 - q ** m[t]) / lam * total)
        assert found.control[t] == pytest.approx(expected)


@given(SEED, LAM, st.integers(0, 6), st.sampled_from(["published", "sharp", "lipschitz"]), st.floats(1.0, 3.0))
def test_improved_bounds_are_never_worse_and_shrink(seed, lam, m, rule, slack):
    schedule, system = random_system(seed)
    schedule = schedule.with_strength(slack * cc.admissible_strength(schedule, system, lam, rule))
    theorem = cc.theorem_bounds(schedule, system, lam, m, rule)
    improved, next_one = (cc.improved_bounds(schedule, system, lam, k, rule) for k in (m, m + 40))
    assert (improved.gradient <= theorem.gradient * (1 + 1e-9)).all()
    assert (improved.control <= theorem.control * (1 + 1e-9)).all()
    assert (next_one.gradient <= improved.gradient * (1 + 1e-9)).all()
    values = cc.value_bounds(schedule, system, lam, m, rule)
    assert (np.diff(values) <= 0).all()
    assert (cc.value_bounds(schedule, system, lam, m + 1, rule) <= values).all()


@given(SEED, LAM, st.lists(st.integers(0, 6), min_size=3, max_size=3), st.booleans())
def test_improved_bounds_are_the_explicit_recursions(seed, lam, m, kinked):
    schedule, system = random_system(seed)
    rule = "lipschitz" if kinked else "sharp"
    schedule = schedule.with_strength(1.5 * cc.admissible_strength(schedule, system, lam, rule))
    found, losses = cc.improved_bounds(schedule, system, lam, m, rule), cc.value_bounds(schedule, system, lam, m, rule)
    constants = cc.universal_regularity(schedule, system, lam, sharp=True)
    best, kappa = cc.optimal_lipschitz(schedule, system), math.sqrt(2 / math.pi)
    error = loss = 0.0
    for t in (2, 1, 0):
        sigma, strength, root = schedule.sigma[t], schedule.strength[t], math.sqrt(schedule.alpha[t])
        l0, l1 = constants.value_lipschitz[t + 1], constants.value_gradient_lipschitz[t + 1]
        slope = kappa * l0 / sigma if kinked else l1
        rho = sigma**2 * slope / strength
        gap, k = schedule.gain[t], m[t]
        control = gap * (rho**k * best[t + 1] + sum(rho**j for j in range(k)) * error)
        assert found.control[t] == pytest.approx(control)
        expansion = system.expansions(schedule)[t]
        # kappa l1 / sigma over l1 in the one case, 4 phi(1) l0 / sigma^2 over kappa l0 / sigma in the other
        relative = 4 * norm.pdf(1) / (sigma * kappa) if kinked else kappa / sigma
        fast = rho ** (2 * k + 1) * (1 + relative * l0 / ((1 - rho) * slope) * (k + rho / 2))
        slow = rho ** (k + 1) * (best[t + 1] / l0 + 1 / (1 - rho))
        error = expansion / root * (error / (1 - rho) + l0 * min(fast, slow))
        loss += (1 + rho) / 2 * sigma**2 / strength * l0**2 * rho ** (2 * k)
        assert found.gradient[t] == pytest.approx(error)
        assert losses[t] == pytest.approx(loss)


def test_improved_gradients_halve_the_iterations_of_later_steps():
    schedule = TWO.with_strength(cc.admissible_strength(TWO, SystemConstants([1, 1], [1, 1], 1, 1), 0.5))
    system = SystemConstants([1, 1], [1, 1], 1, 1)
    theorem = [cc.theorem_bounds(schedule, system, 0.5, m).gradient[1] for m in (20, 30)]
    improved = [cc.improved_bounds(schedule, system, 0.5, m).gradient[1] for m in (20, 30)]
    assert theorem[1] / theorem[0] == pytest.approx(2.0**-10)
    assert improved[1] / improved[0] == pytest.approx(2.0**-20 * 1.5, rel=0.02)  # m rho^(2 m)


# --- warnings and refusals ---------------------------------------------------------------------------------------


def test_a_weak_strength_is_reported():
    schedule = DDPM.with_strength([0.5, 30.0, 0.1])
    expected = (
        r"^strength\[0\] = 0\.5 < sigma\^2 L1 / \(1 - lambda\) = 525\.7 \(one of 2 such steps\): "
        r"the contraction of Lemma 3\.3 is not guaranteed$"
    )
    with pytest.warns(cc.RegularisationWarning, match=expected):
        assert not cc.check_strength(schedule, SYSTEM, 0.5)
    with pytest.warns(cc.RegularisationWarning, match="concavity of Theorem 2.8"):
        assert not cc.check_strength(schedule, SYSTEM, 0.5, "optimal")
    with pytest.warns(cc.RegularisationWarning, match=r"sqrt\(2 / pi\) sigma L0 / "):
        assert not cc.check_strength(schedule, SYSTEM, 0.5, "lipschitz")
    with pytest.raises(ValueError, match=r"^strength\[0\] = 0.5 < sigma\^2 L1"):
        cc.theorem_bounds(schedule, SYSTEM, 0.5, 3)


@pytest.mark.parametrize("rule", ["published", "optimal", "sharp", "lipschitz", "lipschitz-optimal"])
def test_the_least_admissible_strength_is_accepted_and_any_less_is_not(rule):
    needed = cc.admissible_strength(DDPM, SYSTEM, [0.3, 0.5, 0.7], rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cc.check_strength(DDPM.with_strength(needed), SYSTEM, [0.3, 0.5, 0.7], rule)
    for t in range(3):
        less = DDPM.with_strength(needed * np.where(np.arange(3) == t, 1 - 1e-9, 1))
        with pytest.warns(cc.RegularisationWarning, match=rf"strength\[{t}\]"):
            assert not cc.check_strength(less, SYSTEM, [0.3, 0.5, 0.7], rule)


KINKED = SystemConstants([1, 1, 1], [1, 1, 1], 1.0)
QUADRATIC = SystemConstants([1, 1, 1], [1, 1, 1], math.inf, 1.0)
AFFINE = SystemConstants([1, 1, 1], [0, 0, 0], math.inf, 1.0)


def test_a_reward_is_refused_only_where_its_constant_is_needed():
    for rule, name in (("published", "(39)"), ("sharp", "(39)"), ("optimal", "(15)")):
        with pytest.raises(ValueError, match="^reward_gradient_lipschitz = inf: must be finite for ") as refused:
            cc.admissible_strength(DDPM, KINKED, 0.5, rule)
        assert name in str(refused.value)
    for rule in ("lipschitz", "lipschitz-optimal"):
        assert np.isfinite(cc.admissible_strength(DDPM, KINKED, 0.5, rule)).all()
    for rule in ("published", "sharp", "lipschitz", "lipschitz-optimal", "optimal"):
        with pytest.raises(ValueError, match="^reward_lipschitz = inf: must be finite for "):
            cc.admissible_strength(DDPM, QUADRATIC, 0.5, rule)
    # with affine scores (15) never looks at the Lipschitz constant of the reward
    finite = SystemConstants([1, 1, 1], [0, 0, 0], 1.0, 1.0)
    same(cc.admissible_strength(DDPM, AFFINE, 0.5, "optimal"), cc.admissible_strength(DDPM, finite, 0.5, "optimal"))
    kinked = SystemConstants([1, 1], [1, 1], 1.0)
    strong = TWO.with_strength(100.0)
    assert np.isfinite(cc.improved_bounds(strong, kinked, 0.5, 2, "lipschitz").control).all()


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        (1.2, r"^lam = 1\.2: must lie in \(0, 1\)$"),
        (0.0, r"^lam = 0\.0: must lie in \(0, 1\)$"),
        (math.nan, r"^lam = nan: must lie in \(0, 1\)$"),
        ([0.5, 1.0, 0.5], r"^lam\[1\] = 1\.0: must lie in \(0, 1\)$"),
        ([0.5, 0.5], r"^lam has 2 entries: must have one for each of the 3 of alpha$"),
    ],
)
def test_lambda_is_refused(lam, message):
    with pytest.raises(ValueError, match=message):
        cc.optimal_regularity(DDPM, SYSTEM, lam)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cc.published_kappa(0), "^d = 0: must be"),
        (lambda: SystemConstants([1.0], [1.0, 2.0], 1.0), "^score_gradient_lipschitz has 2 entries"),
        (lambda: SystemConstants([-1.0], [1.0], 1.0), "^score_lipschitz = .* must not be negative"),
        (lambda: SystemConstants([1.0], [1.0], 1.0, 1.0, [-1.0]), "^expansion = .* must not be negative"),
        (lambda: SystemConstants([1.0], [1.0], math.nan), "^reward_lipschitz = nan"),
        (lambda: SystemConstants.of_mixture(TWO, GaussianMixture([1], [[0, 0]], [np.eye(2)]), 1.0), "^data has dim"),
        (lambda: SystemConstants.of_gaussian(TWO, -1.0, 1.0), "^cov = "),
        (lambda: cc.optimal_lipschitz(TWO, SYSTEM), "^score_lipschitz has 3 entries"),
        (lambda: cc.optimal_regularity(DDPM, SYSTEM, 0.5, 0.0), "^kappa = 0.0"),
        (lambda: cc.universal_regularity(DDPM, SYSTEM, 1e-9, sharp=True), "^lam = 1e-09: must be at least 1e-06"),
        (lambda: cc.iterate_regularity(DDPM, SYSTEM, 0.5, 1.5), "^iterations = .* must be integers"),
        (lambda: cc.iterate_regularity(DDPM, SYSTEM, 0.5, -1), r"^iterations\[0\] = -1.0: must be non-negative"),
        (lambda: cc.slope_bound(DDPM, SYSTEM, 0.5, "best"), "^rule = 'best': must be one of published, optimal"),
        (lambda: cc.value_bounds(DDPM, SYSTEM, 0.5, 1, "optimal"), "^rule = 'optimal': must cover the iterates"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
