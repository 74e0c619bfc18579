"""The mean's confidence sequence: each inequality on its own, then the verdicts."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.hermite_e import hermegauss, hermeval
from scipy.stats import binom

from verdicts import means
from verdicts.calibration import heavy_tailed_laws
from verdicts.means import Plan, above, equivalence, gaussian_polynomial_kurtosis, pilot_samples
from verdicts.streams import Stream

RARE = 5e-7  # probability with which a correct program fails a test below in one of its two coordinates
LAWS = {law.name: law for law in heavy_tailed_laws()}


def phi(x):
    return means._truncated_sum(np.asarray(x, dtype=float)[..., None])


def gaussians(mean, deviation, seed=1, rows=700):
    """Return a sampler of independent normal coordinates."""
    mean, deviation = np.asarray(mean, dtype=float), np.asarray(deviation, dtype=float)
    return lambda block: mean + deviation * Stream(seed).child(block).generator().standard_normal((rows, len(mean)))


def at_most(count, trials, probability):
    """Return whether `count` events of at most `probability` are compatible, up to RARE."""
    return count <= binom.isf(RARE, trials, probability)


# The truncation


def test_truncation_lies_between_its_two_logarithms():
    x = np.concatenate([np.linspace(-6, 6, 24001), np.logspace(-8, 150, 2000), -np.logspace(-8, 150, 2000)])
    with np.errstate(over="ignore"):
        upper, lower = np.log1p(x + x**2 / 2), -np.log1p(-x + x**2 / 2)
    assert np.all(phi(x) <= upper + 1e-15)
    assert np.all(phi(x) >= lower - 1e-15)


def test_truncation_is_odd_nondecreasing_and_steep_enough_for_the_bracket():
    x = np.linspace(0, 4, 4001)
    assert np.array_equal(phi(-x), -phi(x))
    assert np.all(np.diff(phi(x)) >= -1e-15)
    inside = x[x <= math.sqrt(2)]
    assert np.all(phi(inside) >= 2 * inside / 3 - 1e-15)


@given(st.integers(0, 10_000), st.floats(-2, 2))
def test_sums_of_many_looks_are_the_sums_of_each(seed, centre):
    """The shared power sums give what evaluating phi look by look gives, whether or not rows are truncated."""
    rows = Stream(seed).generator().standard_t(2, size=(3, 40))
    lambdas = np.array([[1.0, 0.3, 5.0], [0.2, 0.1, 0.4], [0.01, 0.02, 0.03]])
    sums = np.ones((3, 3))
    means._add_truncated(sums, lambdas, rows - centre)
    expected = 1 + phi(lambdas[:, :, None] * (rows - centre)).sum(axis=-1)
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)


# The kurtosis assumption


def polynomial_kurtosis(coefficients):
    """Return the exact kurtosis of sum_jk c_jk h_j(z_1) h_k(z_2), by quadrature."""
    degree = len(coefficients) - 1
    nodes, weights = hermegauss(2 * degree + 1)
    basis = np.stack([hermeval(nodes, np.eye(degree + 1)[k]) / math.sqrt(math.factorial(k)) for k in range(degree + 1)])
    values = basis.T @ coefficients @ basis
    both = np.outer(weights, weights) / weights.sum() ** 2
    centred = values - np.sum(both * values)
    return np.sum(both * centred**4) / np.sum(both * centred**2) ** 2


@given(st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_gaussian_polynomials_keep_below_the_bound(degree, seed, positive):
    coefficients = Stream(seed).generator().standard_normal((degree + 1, degree + 1))
    coefficients = np.abs(coefficients) if positive else coefficients
    total = np.add.outer(np.arange(degree + 1), np.arange(degree + 1))
    coefficients[total > degree] = 0
    assert polynomial_kurtosis(coefficients) <= gaussian_polynomial_kurtosis(degree) * (1 + 1e-9)


@pytest.mark.parametrize("degree", range(1, 13))
def test_the_bound_is_tight_to_a_factor(degree):
    """It lies between the kurtosis of the top Hermite polynomial and the Bonami lemma's 9^degree."""
    nodes, weights = hermegauss(2 * degree + 1)
    top = hermeval(nodes, np.eye(degree + 1)[degree])
    weights = weights / weights.sum()
    hermite = (weights @ top**4) / (weights @ top**2) ** 2
    assert hermite * (1 - 1e-9) <= gaussian_polynomial_kurtosis(degree) <= min(9**degree, 1.4 * hermite)


def test_the_bound_holds_for_products_of_signs_and_gaussians():
    """(e1 + e2 + e3) z with signs e has degree 2; E(sum e)^4 = 21, so its kurtosis is 21 * 3 / 9 = 7."""
    signs = np.array(list(product([-1, 1], repeat=3)))
    fourth, second = np.mean(signs.sum(axis=1) ** 4), np.mean(signs.sum(axis=1) ** 2)
    assert 3 * fourth / second**2 == pytest.approx(7)
    assert 7 <= gaussian_polynomial_kurtosis(2)


@given(st.floats(0.001, 0.5), st.floats(-3, 3), st.floats(0.01, 100))
def test_the_bound_holds_for_a_random_choice_of_polynomial(rarest, shift, scale):
    """With probability `rarest` scale z + shift, otherwise z; exact moments of the mixture."""
    mean = rarest * shift
    moments = []
    for power in (2, 4):
        parts = []
        for s, m in ((scale, shift - mean), (1.0, -mean)):
            parts.append(m**2 + s**2 if power == 2 else m**4 + 6 * m**2 * s**2 + 3 * s**4)
        moments.append(rarest * parts[0] + (1 - rarest) * parts[1])
    assert moments[1] / moments[0] ** 2 <= gaussian_polynomial_kurtosis(1, rarest)


def test_a_random_choice_can_exceed_the_bound_without_it():
    assert 0.01 * 3 * 100**4 / (0.01 * 100**2 + 0.99) ** 2 > gaussian_polynomial_kurtosis(1)


# The variance bound


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=5), st.data())
def test_second_moment_of_pairs_is_kurtosis_plus_three_halves(atoms, data):
    """Exact on every discrete law: E Y^2 = (kappa + 3) / 2 Var^2."""
    weights = np.array([data.draw(st.floats(0.05, 1)) for _ in atoms])
    weights, atoms = weights / weights.sum(), np.array(atoms)
    centred = atoms - weights @ atoms
    variance = weights @ centred**2
    if variance < 1e-3:
        return
    kurtosis = weights @ centred**4 / variance**2
    second = weights @ (np.subtract.outer(atoms, atoms) ** 2 / 2) ** 2 @ weights
    constant = means._pair_constant(Plan(alpha=0.1, kurtosis=max(1.0, kurtosis), max_samples=1))
    assert second == pytest.approx(constant * variance**2, rel=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_variance_bound_fails_no_more_often_than_allowed(name):
    law, trials = LAWS[name], 500
    plan = Plan(alpha=0.8, kurtosis=law.kurtosis, max_samples=10**6)
    count = means._variance_pairs(plan, 2)
    failures, naive_failures = np.zeros(2, int), np.zeros(2, int)
    for trial in range(trials):
        pairs = means._Pairs(plan, 2)
        pairs.add(law.draw(Stream(4).child(name, trial).generator(), 2 * count).T)
        bound = pairs.variance_bound(0)
        failures += bound < np.square(law.deviation)
        naive_failures += bound * (1 - pairs._shortfall(0, count)) < np.square(law.deviation)
    allowed = math.exp(-means._variance_log(plan, 2, 0))
    assert at_most(failures.max(), trials, allowed)
    assert not at_most(naive_failures.min(), trials, allowed)  # the factor is needed: the mean of Y alone fails


def test_first_variance_bound_is_twice_the_mean_of_pairs():
    plan = Plan(alpha=1e-6, kurtosis=100, max_samples=10**7)
    pairs = means._Pairs(plan, 2)
    pairs.add(np.ones((2, 2)) * np.array([1.0, 3.0]))
    pairs.count = means._variance_pairs(plan, 2)
    assert pairs._shortfall(0, pairs.count) == pytest.approx(0.5, rel=1e-3)


# Intervals of the mean


@pytest.mark.parametrize("name", LAWS)
def test_catoni_interval_covers_as_often_as_declared(name):
    law, trials, failure, n = LAWS[name], 800, 0.2, 250
    variance = np.square(law.deviation)
    missed, narrow_missed = np.zeros(2, int), np.zeros(2, int)
    for trial in range(trials):
        rows = law.draw(Stream(6).child(name, trial).generator(), n).T
        centre, radius = means._catoni_interval(np.ascontiguousarray(rows), variance, math.log(2 / failure))
        missed += np.abs(centre - law.mean) > radius
        narrow_missed += np.abs(centre - law.mean) > radius / 3
    assert at_most(missed.max(), trials, failure)
    assert not at_most(narrow_missed.max(), trials, failure)  # a third of the width does not cover


def test_catoni_interval_solves_its_equation():
    rows = Stream(8).generator().standard_t(3, size=(2, 500)) + [[1.0], [-200.0]]
    variance, log_term = np.array([3.0, 5.0]), 6.0
    centre, radius = means._catoni_interval(rows, variance, log_term)
    rate = np.sqrt(2 * log_term / (500 * variance))
    for end, level in ((centre - radius, 2 * log_term), (centre + radius, -2 * log_term)):
        np.testing.assert_allclose(phi(rate[:, None] * (rows - end[:, None])).sum(axis=1), level, rtol=1e-6)


@pytest.mark.parametrize("dimension", [1, 7])
def test_error_probabilities_of_all_looks_add_up_to_alpha(dimension):
    plan = Plan(alpha=0.01, kurtosis=9, max_samples=10**6)
    looks = range(20_000)
    spent = sum(2 * math.exp(-means._log_term(plan, dimension, j)) for j in looks)
    spent += sum(math.exp(-means._variance_log(plan, dimension, j)) for j in looks)
    assert 0.999 * plan.alpha < dimension * spent <= plan.alpha


def test_looks_are_the_formula_of_the_documentation():
    """Look by look from the rows themselves, without running sums."""
    alpha, kappa = 0.05, 8
    plan = Plan(alpha=alpha, kurtosis=kappa, max_samples=4000, rounding=0.0)
    block = Stream(9).generator().standard_t(9, size=(4000, 2)) * [1.0, 30.0] + [0.5, -7.0]
    looks = list(means._looks(lambda index: block, np.zeros(2), plan))
    pilot_end = pilot_samples(plan, 2)
    ends = [2 * means._variance_pairs(plan, 2), *(look[0] for look in looks)]
    assert len(ends) > 4
    assert ends[1] == pilot_end
    assert ends[-1] == 4000

    def error(share, look):
        return share * alpha / 2 / ((look + 1) * (look + 2))

    def bound(squares, count, look):
        return np.mean(squares, axis=0) / (1 - math.sqrt((kappa + 3) * math.log(1 / error(0.25, look)) / count))

    # Every stretch between two looks is paired within itself.
    stretches = [block[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 : len(rows) // 2 * 2]) for rows in stretches]
    squares = [(first - second) ** 2 / 2 for first, second in halves]
    pilots = np.concatenate(squares[:2])
    variance, centre, radius = bound(squares[0], len(squares[0]), 0), looks[0][1], looks[0][2]
    for look, (samples, estimate, half_width, _) in enumerate(looks[1:], start=1):
        n = samples - pilot_end
        log_term = math.log(2 / error(0.75, look))
        rate = np.sqrt(2 * log_term / n / (bound(pilots, len(pilots) + n // 2, look) + radius**2))
        scaled = np.clip(rate * (block[pilot_end:samples] - centre), -math.sqrt(2), math.sqrt(2))
        seen = np.concatenate(squares[: look + 2])
        variance = np.minimum(variance, bound(seen, len(seen), look))
        np.testing.assert_allclose(estimate, centre + (scaled - scaled**3 / 6).mean(axis=0) / rate, rtol=1e-10)
        np.testing.assert_allclose(half_width, rate * (variance + radius**2) / 2 + log_term / n / rate, rtol=1e-10)


# Verdicts

PLAN = Plan(alpha=1e-6, kurtosis=4, max_samples=200_000)
MEAN, DEVIATION = np.array([1.0, -20.0, 300.0]), np.array([0.5, 3.0, 0.01])


def test_a_true_reference_is_verified():
    result = equivalence(gaussians(MEAN, DEVIATION), MEAN, 0.1 * DEVIATION, PLAN)
    assert result.verdict == "verified"
    assert np.all(np.abs(result.lower) <= 0.1 * DEVIATION)
    assert np.all(np.abs(result.upper) <= 0.1 * DEVIATION)
    assert np.all(np.abs(result.estimate - MEAN) <= 0.1 * DEVIATION)
    assert result.measured_kurtosis == pytest.approx(3, abs=0.5)
    assert result.note == ""


@pytest.mark.parametrize("coordinate", range(3))
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_planted_bias_is_refuted_and_found(coordinate, sign):
    reference = MEAN - sign * 0.3 * DEVIATION * np.eye(3)[coordinate]
    result = equivalence(gaussians(MEAN, DEVIATION), reference, 0.1 * DEVIATION, PLAN)
    assert result.verdict == "refuted"
    assert result.coordinate == coordinate
    assert sign * (result.estimate - reference)[coordinate] > 0
    assert result.lower[coordinate] <= sign * 0.3 * DEVIATION[coordinate] <= result.upper[coordinate]


def test_a_bias_within_the_margin_is_not_resolved_by_a_short_run_but_reported():
    result = equivalence(gaussians(MEAN, DEVIATION), MEAN, 1e-3 * DEVIATION, PLAN)
    assert result.verdict == "inconclusive"
    assert result.samples == PLAN.max_samples
    widths = (result.upper - result.lower) / 2
    ideal = DEVIATION * np.sqrt(2 * math.log(2e6) / PLAN.max_samples)
    assert np.all(widths > ideal)
    assert np.all(widths < 1.6 * ideal)


def test_one_margin_serves_all_coordinates():
    result = equivalence(gaussians([0.0, 5.0], [1.0, 2.0]), [0.0, 5.0], 0.3, PLAN)
    assert result.verdict == "verified"
    assert result.margin.tolist() == [0.3, 0.3]
    assert result.coordinate == 1


def test_intervals_only_shrink_and_are_reported_as_they_come():
    seen = []
    result = equivalence(gaussians(MEAN, DEVIATION), MEAN, 0.02 * DEVIATION, PLAN, on_look=seen.append)
    assert len(seen) == len(result.looks) > 3
    for look, reported in zip(result.looks, seen, strict=True):
        assert look is reported
        assert np.all((look.lower <= look.estimate) & (look.estimate <= look.upper))
    for earlier, later in zip(result.looks, result.looks[1:], strict=False):
        assert earlier.samples < later.samples
        assert np.all(earlier.lower <= later.lower)
        assert np.all(earlier.upper >= later.upper)
    assert result.looks[0].samples == pilot_samples(PLAN, 3)
    assert np.array_equal(result.looks[-1].upper, result.upper)


def test_blocks_are_asked_in_order_once_and_no_further_than_needed():
    asked = []
    sampler = gaussians(MEAN, DEVIATION)

    def recording(block):
        asked.append(block)
        return sampler(block)

    result = equivalence(recording, MEAN, 0.1 * DEVIATION, PLAN)
    assert asked == list(range(math.ceil(result.samples / 700)))


def test_a_verdict_is_a_function_of_the_blocks():
    for block in (5, 0, 3):
        gaussians(MEAN, DEVIATION)(block)  # what else was asked before changes nothing
    first, second = (equivalence(gaussians(MEAN, DEVIATION), MEAN, 0.05 * DEVIATION, PLAN) for _ in range(2))
    assert np.array_equal(first.estimate, second.estimate)
    assert np.array_equal(first.lower, second.lower)
    other = equivalence(gaussians(MEAN, DEVIATION, seed=2), MEAN, 0.05 * DEVIATION, PLAN)
    assert not np.array_equal(first.lower, other.lower)


@pytest.mark.parametrize("rows", [2, 3, 101])
def test_block_sizes_need_not_divide_anything(rows):
    plan = Plan(alpha=0.01, kurtosis=4, max_samples=5000)
    result = equivalence(gaussians([2.0], [1.0], rows=rows), [2.0], 0.5, plan)
    assert result.verdict == "verified"


def test_above_and_below():
    sampler = gaussians([1.0, 2.0], [1.0, 1.0])
    verified, refuted, undecided = (above(sampler, bound, PLAN) for bound in ([0.9, 1.5], [0.9, 2.1], [0.9, 2.0]))
    assert (verified.verdict, refuted.verdict, undecided.verdict) == ("verified", "refuted", "inconclusive")
    assert (refuted.coordinate, undecided.coordinate) == (1, 1)
    assert np.all(verified.lower > 0)
    assert refuted.upper[1] < 0
    assert verified.estimate == pytest.approx([1.0, 2.0], abs=0.1)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_budgets_that_end_with_the_pilots(extra):
    needed = pilot_samples(PLAN, 3)
    plan = Plan(alpha=1e-6, kurtosis=4, max_samples=needed + extra)
    result = equivalence(gaussians(MEAN, DEVIATION), MEAN, 1e-3 * DEVIATION, plan)
    assert result.verdict == "inconclusive"
    if extra < 0:
        assert str(needed) in result.note
        assert result.samples == 0
        assert np.all(result.upper == math.inf)
    else:
        assert result.samples == needed + extra
        assert np.all(np.isfinite(result.upper))


def test_constant_coordinates_are_known_to_rounding():
    constant = np.array([0.1, 0.0, -1e12])
    sampler = lambda block: np.broadcast_to(constant, (500, 3))  # noqa: E731
    same = equivalence(sampler, constant * (1 + 4e-16), 1e-9 * (1 + np.abs(constant)), PLAN)
    assert same.verdict == "verified"
    assert np.all(same.upper - same.lower <= 1e-13 * np.abs(constant) + 1e-60)
    assert np.isnan(same.measured_kurtosis).all()
    assert equivalence(sampler, constant + [1e-11, 0, 0], 1e-9, PLAN).verdict == "refuted"
    assert equivalence(sampler, constant + [0, 1e-50, 0], 1e-9, PLAN).verdict == "refuted"


def test_scales_far_apart_do_not_overflow():
    scale = np.array([1e-60, 1.0, 1e60])
    assert equivalence(gaussians(scale, scale), scale, 0.2 * scale, PLAN).verdict == "verified"
    assert equivalence(gaussians(scale, scale), [1e-60, 1.0, 1.3e60], 0.2 * scale, PLAN).coordinate == 2


def test_kurtosis_beyond_the_declared_bound_is_not_verified():
    """Rows 0 with rare jumps of +-1 have kurtosis 1000; declared is 4."""

    def sampler(block):
        generator = Stream(12).child(block).generator()
        return generator.choice([-1.0, 0.0, 1.0], p=[0.0005, 0.999, 0.0005], size=(1000, 1))

    result = equivalence(sampler, [0.0], 0.5, PLAN)
    assert result.verdict == "inconclusive"
    assert result.measured_kurtosis[0] > 100
    assert "declared at most 4" in result.note
    honest = Plan(alpha=1e-6, kurtosis=1000, max_samples=10**6)
    assert equivalence(sampler, [0.0], 0.5, honest).verdict == "verified"


def test_a_drifting_sampler_is_noticed():
    """The first look sees mean 0, the later ones mean 2: their intervals of one constant mean are disjoint."""
    pilots = pilot_samples(PLAN, 1)

    def sampler(block):
        rows = Stream(13).child(block).generator().standard_normal((pilots, 1))
        return rows if block == 0 else rows + 2

    result = equivalence(sampler, [0.0], 1e-3, PLAN)
    assert result.verdict == "inconclusive"
    assert "disagree" in result.note


def faulty(fault):
    def sampler(block):
        rows = np.ones((10, 2))
        return fault(rows) if block == 3 else rows

    return sampler


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda rows: rows * [1, np.nan], r"sample\(3\) holds nan"),
        (lambda rows: rows * [np.inf, 1], r"sample\(3\) holds inf"),
        (lambda rows: rows * 1e80, r"sample\(3\) holds 1e\+80"),
        (lambda rows: rows[:4], r"sample\(3\) has 4 rows, must have 10"),
        (lambda rows: rows[:, :1], r"sample\(3\) has shape \(10, 1\)"),
        (lambda rows: rows[0], r"sample\(3\) has shape \(2,\)"),
    ],
)
def test_faulty_blocks_are_named(fault, text):
    with pytest.raises(ValueError, match=text):
        equivalence(faulty(fault), [1.0, 1.0], 0.1, PLAN)


def test_single_rows_cannot_be_paired():
    with pytest.raises(ValueError, match="n >= 2"):
        equivalence(gaussians([0.0], [1.0], rows=1), [0.0], 0.1, PLAN)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"alpha": 0.0}, "alpha is"),
        ({"alpha": 1.0}, "alpha is"),
        ({"kurtosis": 0.9}, "kurtosis is"),
        ({"kurtosis": math.nan}, "kurtosis is"),
        ({"max_samples": 0}, "max_samples is"),
        ({"rounding": -1e-16}, "rounding is"),
    ],
)
def test_bad_plans_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        Plan(**({"alpha": 0.1, "kurtosis": 3.0, "max_samples": 100} | fields))


@pytest.mark.parametrize(
    ("reference", "margin", "text"),
    [
        ([[0.0]], 0.1, "reference has shape"),
        ([math.nan, 0.0], 0.1, "reference has shape"),
        ([0.0, 0.0], 0.0, "margin is"),
        ([0.0, 0.0], [0.1, -0.1], "margin is"),
        ([0.0, 0.0], [0.1] * 3, "margin has shape"),
    ],
)
def test_bad_questions_are_named(reference, margin, text):
    with pytest.raises(ValueError, match=text):
        equivalence(gaussians([0.0, 0.0], [1.0, 1.0]), reference, margin, PLAN)


@pytest.mark.parametrize(("degree", "rarest", "text"), [(0, 1.0, "degree"), (13, 1.0, "degree"), (2, 0.0, "rarest")])
def test_bad_polynomials_are_named(degree, rarest, text):
    with pytest.raises(ValueError, match=text):
        gaussian_polynomial_kurtosis(degree, rarest)
