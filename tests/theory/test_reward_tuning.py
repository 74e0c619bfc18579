"""Reference numbers marked "independent derivation" were computed before, and apart from, this code."""

import itertools
import math

import numpy as np
import pytest

from theory.gaussian import Gaussian, kl
from theory.penalty_bounds import Constants
from theory.reward_problem import RewardProblem, least, rising_roots
from theory.reward_tuning import FiniteRewardTuning, Quadratic, RewardTuning
from verdicts.streams import Stream


def line(mean, variance, b1, curve1, b2, curve2) -> RewardTuning:
    return RewardTuning(Gaussian.scalar(mean, variance), Quadratic([b1], [[curve1]]), Quadratic([b2], [[curve2]]))


def random_case(dim: int) -> RewardTuning:
    rng = Stream(8).child(f"tuning/{dim}").generator()
    root, b1, b2 = rng.standard_normal((3, dim, dim))
    upper = Quadratic(rng.standard_normal(dim), 0.3 * (b1 + b1.T))  # indefinite: r1 is not concave
    lower = Quadratic(rng.standard_normal(dim), 0.2 * b2 @ b2.T)
    return RewardTuning(Gaussian(rng.standard_normal(dim), root @ root.T / dim + 0.1 * np.eye(dim)), upper, lower)


A, B = line(0.5, 2.0, 0.7, 0.0, 1.5, 0.0), line(0.0, 1.0, 1.0, 1.0, 2.0, 1.0)
C, D = line(0.0, 1.0, 1.5, 1.0, 2.0, 0.0), line(0.0, 1.0, 1.0, 0.0, -0.05, 0.0)
ATOMS = FiniteRewardTuning([0.7, 0.25, 0.05], [1.0, 0.0, -0.5], [0.0, 0.5, 1.0])
MANY: list[tuple[RewardProblem, float]] = [(A, 1.3), (B, 0.7), (C, 1.0), (D, 1.0), (ATOMS, 1.0), (random_case(3), 4.0)]


# --- the tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "strength", "mean", "variance", "value", "slope", "limit"),
    [
        (A, 1.3, 2.8076923077, 2.0, -1.9653846154, 1.2426035503, 0.2899408284),
        (B, 0.7, 1.1764705882, 0.4117647059, -0.2785467128, 0.05088540607, 0.06196046503),
        (C, 1.0, 2.0, 1.0, -0.5, -1.0, 1.375),
        (D, 1.0, -0.05, 1.0, 0.05, -0.05, 0.5),
    ],
)
def test_exact_bilevel_values(case, strength, mean, variance, value, slope, limit):  # independent derivation
    law = case.tilted(strength)
    found = [law.mean[0], law.cov[0, 0], case.value(strength), case.slope(strength), case.bias_limit(strength)]
    assert found == pytest.approx([mean, variance, value, slope, limit], abs=6e-11)


@pytest.mark.parametrize(
    ("case", "strength", "gamma", "mean", "variance", "value", "slope", "scaled", "released"),
    [
        (A, 1.3, 1, 3.8846153846, 2.0, -2.3423076923, 1.5325443787, 0.2899408284, 1.5325443787),
        (B, 0.7, 1, 1.1111111111, 0.2592592593, -0.3282778457, 0.08030146579, 0.02941605972, 1.1832540654),
        (B, 0.7, 10, 1.1666666667, 0.3888888889, -0.2852396692, 0.05655331487, 0.05667908809, 1.1217709560),
        (B, 0.7, 100, 1.1754385965, 0.4093567251, -0.2792409430, 0.05149939274, 0.06139866751, 1.1132013472),
        (C, 1.0, 10, 1.9545454545, 0.9090909091, -0.5348127373, -0.8767548861, 1.2324511390, 1.0348127373),
        (C, 1.0, 100, 1.9950495050, 0.9900990099, -0.5037210811, -0.9864066021, 1.3593397869, 1.0037210811),
        (D, 1.0, 9, 0.0611111111, 1.0, -0.0055555556, 0.0055555556, 0.5, 0.0055555556),
        (D, 1.0, 11, 0.0409090909, 1.0, 0.0045454545, -0.0045454545, 0.5, -0.0045454545),
    ],
)
def test_penalty_values(case, strength, gamma, mean, variance, value, slope, scaled, released):
    # Independent derivation.
    law = case.tilted(strength, gamma)
    assert [law.mean[0], law.cov[0, 0]] == pytest.approx([mean, variance], abs=6e-11)
    found = case.penalty_slope(strength, gamma)
    assert [case.penalty_value(strength, gamma), found] == pytest.approx([value, slope], abs=6e-11)
    assert gamma * (found - case.slope(strength)) == pytest.approx(scaled, abs=6e-11)
    assert case.released_slope(strength, gamma) == pytest.approx(released, abs=6e-11)


# --- the formulas, each against a computation that shares nothing with it --------------------------------------------


def by_quadrature(case: RewardTuning, strength: float, inverse_gamma: float, function) -> float:
    """E_p of a function of r1(x), r2(x) for the tilt of a one-dimensional case, by the trapezoidal rule."""
    x = np.linspace(-30.0, 40.0, 40001)
    r1, r2 = (r.linear[0] * x - 0.5 * r.quadratic[0, 0] * x**2 for r in (case.upper, case.lower))
    spread = -0.5 * (x - case.data.mean[0]) ** 2 / case.data.cov[0, 0]
    weights = np.exp(spread + (inverse_gamma * r1 + r2) / strength)
    return float(weights @ function(r1, r2) / weights.sum())


@pytest.mark.parametrize("gamma", [None, 3.0])
@pytest.mark.parametrize(("case", "strength"), [(A, 1.3), (B, 0.7), (C, 1.0)])
def test_cumulants_against_quadrature(case, strength, gamma):
    inverse = 0.0 if gamma is None else 1 / gamma
    mean = by_quadrature(case, strength, inverse, lambda r1, r2: r1)
    low = by_quadrature(case, strength, inverse, lambda r1, r2: r2)
    expected = [mean] + [
        by_quadrature(case, strength, inverse, lambda r1, r2, i=i, j=j: (r1 - mean) ** i * (r2 - low) ** j)
        for i, j in ((2, 0), (1, 1), (2, 1))
    ]
    assert tuple(case.cumulants(strength, gamma)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_cumulants_are_derivatives_of_the_partition_function(dim):
    """In d dimensions: of log E exp(t1 r1 + t2 r2) at the tilt, by differences of the Gaussian integral."""
    case, strength = random_case(dim), 4.0
    under, h = case.cumulants(strength), 0.01

    def log_mgf(t1, t2):  # log E_data exp(t1 r1 + (t2 + 1 / strength) r2), by determinants, not by theory.gaussian
        precision = np.linalg.inv(case.data.cov)
        s = t2 + 1 / strength
        tilted = precision + t1 * case.upper.quadratic + s * case.lower.quadratic
        force = precision @ case.data.mean + t1 * case.upper.linear + s * case.lower.linear
        quadratic = force @ np.linalg.solve(tilted, force) - case.data.mean @ precision @ case.data.mean
        return 0.5 * (quadratic - np.linalg.slogdet(tilted @ case.data.cov)[1])

    second = np.array([2, -27, 270, -490, 270, -27, 2]) / 180
    grid = np.array([[log_mgf(i * h, j * h) for j in range(-3, 4)] for i in range(-3, 4)])
    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
    at = np.eye(7)[3]
    expected = [first @ grid @ at / h, second @ grid @ at / h**2, first @ grid @ first / h**2]
    expected.append(second @ grid @ first / h**3)
    assert tuple(under) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert case.log_partition(strength) == pytest.approx(log_mgf(0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize(("case", "strength"), MANY)
def test_slopes_are_derivatives(case, strength):
    def difference(function):
        h = 1e-3 * strength
        return sum(c * function(strength + i * h) for i, c in ((-2, 1), (-1, -8), (1, 8), (2, -1))) / (12 * h)

    assert case.slope(strength) == pytest.approx(difference(case.value), abs=1e-9)
    for gamma in (1.0, 10.0, 100.0):
        slope = difference(lambda s, gamma=gamma: case.penalty_value(s, gamma))
        assert case.penalty_slope(strength, gamma) == pytest.approx(slope, abs=1e-9)
    if case is not A and case is not D:  # reverse KL is another function (linear rewards cannot tell: next test)
        assert abs(case.released_slope(strength, 10.0) - difference(lambda s: case.penalty_value(s, 10.0))) > 1e-2


@pytest.mark.parametrize(("case", "strength"), MANY)
def test_penalty_is_the_mean_along_the_path_from_p_star_to_p_gamma(case, strength):
    """F_gamma = -int E_s r1 ds, F_gamma' = int Cov_s(r1, r2 + s r1/gamma) ds / lambda^2 over s in [0, 1]."""
    gamma = 2.5
    nodes, masses = np.polynomial.legendre.leggauss(20)
    s = 0.5 * (1 + nodes)
    along = [case.cumulants(strength, gamma / each) for each in s]
    value = -sum(0.5 * w * at.mean for w, at in zip(masses, along, strict=True))
    slope = sum(
        0.5 * w * (at.covariance + each * at.variance / gamma) for w, at, each in zip(masses, along, s, strict=True)
    )
    assert case.penalty_value(strength, gamma) == pytest.approx(value, abs=1e-9)
    assert case.penalty_slope(strength, gamma) == pytest.approx(slope / strength**2, abs=1e-9)


@pytest.mark.parametrize(("case", "strength"), MANY)
def test_bias_law(case, strength):
    def scaled(gamma):
        return gamma * (case.penalty_slope(strength, gamma) - case.slope(strength))

    limit = (scaled(500.0) - 6 * scaled(1000.0) + 8 * scaled(2000.0)) / 3
    assert case.bias_limit(strength) == pytest.approx(limit, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize(("case", "strength", "dropped"), [(B, 0.7, 0.09959000901), (C, 1.0, 0.375)])
def test_the_third_cumulant_matters(case, strength, dropped):  # independent derivation
    without = case.cumulants(strength).variance / (2 * strength**2)
    assert without == pytest.approx(dropped, abs=1e-10)
    assert abs(without - case.bias_limit(strength)) > 0.03


def test_linear_rewards_have_a_constant_bias():
    exact = [A.penalty_slope(1.3, g) - A.slope(1.3) for g in (0.5, 1.0, 100.0)]
    assert exact == pytest.approx([0.49 * 2 / (2 * g * 1.69) for g in (0.5, 1.0, 100.0)], abs=1e-12)


# --- the direction of the KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "strength", "gamma"), [(A, 1.3, 1.0), (B, 0.7, 10.0), (C, 1.0, 100.0)])
def test_released_slope_is_the_reverse_divergence(case, strength, gamma):
    near, far = case.tilted(strength, gamma), case.tilted(strength)
    reverse = gamma * (kl(case.data, near) - kl(case.data, far))
    assert case.released_slope(strength, gamma) == pytest.approx(reverse, abs=1e-10)
    forward = gamma * (kl(near, case.data) - kl(far, case.data))
    assert (abs(forward - reverse) < 1e-10) is (case is A)  # linear rewards are blind to the direction


def test_divergence_of_case_b():  # independent derivation
    assert B.divergence(0.7) == pytest.approx(0.841575473, abs=1e-9)
    assert kl(B.data, B.tilted(0.7)) == pytest.approx(1.951306386, abs=1e-9)


def test_optima_of_case_b():  # independent derivation, and F = s (s - 3) / (2 (1 + s)^2)
    for s in (0.3, 0.6, 2.0):
        assert B.value(s) == pytest.approx(s * (s - 3) / (2 * (1 + s) ** 2))
        assert B.slope(s) == pytest.approx((5 * s - 3) / (2 * (1 + s) ** 3))
    assert B.optimum() == pytest.approx(0.6, abs=1e-12)
    assert B.value(0.6) == pytest.approx(-9 / 32)
    found = [B.penalty_optimum(g) for g in (1, 10, 100, 1000)]
    assert found == pytest.approx([0.4554458026, 0.5824261075, 0.5982043484, 0.5998200436], abs=2e-10)
    assert 1e4 * (B.penalty_optimum(1e4) - 0.6) == pytest.approx(-9 / 50, abs=1e-4)
    second = (14 - 10 * 0.6) / (2 * 1.6**4)
    assert -B.bias_limit(0.6) / second == pytest.approx(-9 / 50)
    for gamma in (1.0, 10.0, 1000.0):  # reverse KL: positive everywhere, so descent runs to strength 0
        assert min(B.released_slope(float(s), gamma) for s in np.geomspace(1e-3, 1e3, 60)) > 0
        with pytest.raises(ValueError, match="must rise through zero"):
            B.released_root(gamma)


def test_optima_of_case_c():  # independent derivation
    assert C.optimum() == pytest.approx(4 / 3, abs=1e-12)
    assert C.value(4 / 3) == pytest.approx(-5 / 8)
    roots = [C.released_root(g) for g in (10, 100, 1e6)]
    assert roots == pytest.approx([0.6372036586, 0.6636223074, 0.6666663611], abs=2e-10)
    assert C.released_root(None) == pytest.approx(2 / 3, abs=1e-12)
    # There the tuned model earns exactly what the base model earns, and F is worse than at the optimum by 1.125.
    assert C.value(2 / 3) == pytest.approx(-C.data_reward(), abs=1e-12)
    assert C.value(2 / 3) == pytest.approx(0.5)
    assert C.slope(1.0) == pytest.approx(-1)
    assert C.released_limit(1.0) == pytest.approx(1.0)
    assert C.released_slope(1.0, 1e5) == pytest.approx(C.released_limit(1.0), abs=1e-4)


def test_a_second_false_optimum():  # independent derivation: r2 = x, r1 = 2x - x^2
    case = line(0.0, 1.0, 2.0, 2.0, 1.0, 0.0)
    assert case.optimum() == pytest.approx(1.0)
    assert case.released_root(1e3) == pytest.approx(0.499, abs=5e-4)
    assert [case.slope(0.6), case.released_slope(0.6, 1e3)] == pytest.approx([-3.70, 0.93], abs=5e-3)
    with pytest.raises(ValueError, match="must rise through zero"):
        case.released_root(1.0, 0.25, 20.0)


def test_sign_flip_of_case_d():
    assert D.sign_flip() == pytest.approx(10.0)
    for strength in np.geomspace(1e-2, 1e2, 9):
        s = float(strength)
        assert D.slope(s) < 0 < D.penalty_slope(s, 9.9)
        assert D.penalty_slope(s, 10.1) < 0
        step = 1e-3 * s / D.penalty_slope(s, 9.0)  # a step that Theorem 1's commentary promises to be an improvement
        assert D.value(s - step * D.penalty_slope(s, 9.0)) > D.value(s)
    assert A.sign_flip() == 0.0
    with pytest.raises(ValueError, match="must be linear rewards"):
        B.sign_flip()


def test_released_penalty_scorer_inverts_gamma():  # independent derivation
    assert A.released_tilt(1.3, 10.0).mean[0] == pytest.approx(13.5769, abs=5e-5)
    assert A.tilted(1.3, 10.0).mean[0] == pytest.approx(2.9154, abs=5e-5)
    assert A.released_tilt(1.3, 1.0).mean[0] == pytest.approx(A.tilted(1.3, 1.0).mean[0])


# --- effective sample size ------------------------------------------------------------------------------------------


def test_effective_sample_size():
    assert C.effective_sample_size(1.0) == pytest.approx(math.exp(-4))  # independent derivation
    for case, strength in ((B, 0.7), (C, 2.0)):
        for power in (1.0, 2.0):
            direct = by_quadrature(case, 1e12, 0.0, lambda r1, r2, p=power, s=strength: np.exp(p * r2 / s))
            assert case.log_moment(power, strength) == pytest.approx(math.log(direct), abs=1e-7)
    # r2 = x^2 / 4: the mean of the weights exists above 1/2, their variance above 1.
    wide = line(0.0, 1.0, 1.0, 0.0, 0.0, -0.5)
    assert wide.domain() == 0.5
    assert [wide.effective_sample_size(s) for s in (0.6, 1.0)] == [0.0, 0.0]
    assert 0 < wide.effective_sample_size(1.01) < 0.3


def test_effective_sample_size_of_atoms_is_that_of_weights():
    weights = np.exp(ATOMS.lower / 0.5)
    direct = (ATOMS.probabilities @ weights) ** 2 / (ATOMS.probabilities @ weights**2)
    assert ATOMS.effective_sample_size(0.5) == pytest.approx(direct)


# --- the domain -----------------------------------------------------------------------------------------------------


def test_the_penalty_problem_has_a_smaller_domain():
    case = line(0.0, 1.0, 0.3, -0.5, 1.0, 0.0)  # r2 linear, r1 convex
    assert [case.domain(), case.domain(2.0)] == [0.0, 0.25]
    assert case.slope(0.2525) == pytest.approx(35.76, abs=5e-3)  # independent derivation, as is the next
    assert case.penalty_slope(0.2525, 2.0) == pytest.approx(2.1e5, rel=0.03)
    assert np.isfinite(case.slope(0.2475))
    with pytest.raises(ValueError, match=r"strength = 0.2475: must exceed 0.25, the domain of the penalty problem"):
        case.penalty_value(0.2475, 2.0)


def test_the_penalty_problem_needs_the_lower_one():
    case = line(0.0, 1.0, 0.0, 1.0, 1.0, -0.5)  # r2 convex: p^gamma exists for all strengths at gamma = 1, p* does not
    assert case.domain(1.0) == 0.5
    with pytest.raises(ValueError, match="strength = 0.4: must exceed 0.5"):
        case.penalty_value(0.4, 1.0)


def test_domain_in_several_dimensions_is_where_the_precision_turns_indefinite():
    case = random_case(4)
    assert case.domain() == 0.0
    bound = case.domain(0.2)
    assert bound > 0
    curvature = case.lower.quadratic + case.upper.quadratic / 0.2
    for factor, positive in ((1.01, True), (0.99, False)):
        precision = np.linalg.inv(case.data.cov) + curvature / (factor * bound)
        assert (np.linalg.eigvalsh(precision)[0] > 0) is np.bool_(positive)
    assert np.isfinite(case.penalty_value(1.01 * bound, 0.2))


@pytest.mark.parametrize(
    "of", ["value", "slope", "bias_limit", "tilted", "log_partition", "effective_sample_size", "divergence"]
)
@pytest.mark.parametrize("case", [C, ATOMS], ids=["gaussian", "atoms"])
@pytest.mark.parametrize("strength", [0.0, -1.0, math.nan, math.inf])
def test_strength_must_be_positive(case, of, strength):
    with pytest.raises(ValueError, match="strength = .*: must be positive and finite"):
        getattr(case, of)(strength)


@pytest.mark.parametrize(
    "of", ["tilted", "log_partition", "penalty_value", "penalty_slope", "released_slope", "divergence"]
)
@pytest.mark.parametrize("case", [C, ATOMS], ids=["gaussian", "atoms"])
def test_gamma_must_be_positive(case, of):
    with pytest.raises(ValueError, match="gamma = 0.0: must lie in"):
        getattr(case, of)(1.0, 0.0)
    with pytest.raises(ValueError, match="strength = -1.0: must be positive"):
        getattr(case, of)(-1.0, 2.0)


def test_bad_input():
    wide = line(0.0, 1.0, 1.0, 0.0, 0.0, -0.5)
    with pytest.raises(ValueError, match=r"must exceed 0.5, the domain of the lower problem \(infinite partition"):
        wide.value(0.5)
    with pytest.raises(ValueError, match="quadratic = .*: must be symmetric"):
        Quadratic([1.0, 0.0], [[1.0, 2.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="upper has dimension 2: must be that of data, 1"):
        RewardTuning(Gaussian.scalar(0.0, 1.0), Quadratic([1.0, 0.0]), Quadratic([1.0]))
    with pytest.raises(ValueError, match="low, high = .*: the minimum over strength must lie inside"):
        A.optimum()  # linear rewards: F' never vanishes
    with pytest.raises(ValueError, match="low, high = .*: must be 0 < low < high"):
        C.optimum(3.0, 1.0)
    with pytest.raises(ValueError, match="probabilities = .*: must be non-negative and add up to 1"):
        FiniteRewardTuning([0.5, 0.4], [0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="lower has 3 entries: must have 2, one per atom"):
        FiniteRewardTuning([0.5, 0.5], [0.0, 1.0], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="batch = 0"):
        ATOMS.self_normalised(1.0, 10.0, 0)


def test_search_prefers_the_lower_of_two_minima():
    def value(s):
        return (s - 1) ** 2 * (s - 4) ** 2 + 0.3 * s

    def slope(s):
        return 2 * (s - 1) * (s - 4) * (2 * s - 5) + 0.3

    assert len(rising_roots(slope, 0.1, 10.0)) == 2
    assert least(value, slope, 0.1, 10.0) == pytest.approx(1.0, abs=0.05)
    assert least(value, slope, 0.8, 10.0) < 1
    with pytest.raises(ValueError, match="it is at an end"):
        least(lambda s: -((s - 2) ** 2), lambda s: -2 * (s - 2), 0.1, 10.0)


# --- a finite support -----------------------------------------------------------------------------------------------


def test_three_atoms():  # independent derivation
    assert ATOMS.bias_limit(1.0) == pytest.approx(0.1967001872, abs=1e-10)
    assert 10 * (ATOMS.penalty_slope(1.0, 10.0) - ATOMS.slope(1.0)) == pytest.approx(0.1949638035, abs=1e-10)
    # At gamma = 1e4 the difference of two divergences has eight digits left; the path integral keeps all.
    gamma, total = 1e4, 0.0
    for node, mass in zip(*np.polynomial.legendre.leggauss(8), strict=True):
        s = 0.5 * (1 + node)
        at = ATOMS.cumulants(1.0, gamma / s)
        total += 0.5 * mass * (gamma * (at.covariance - ATOMS.cumulants(1.0).covariance) + s * at.variance)
    assert total == pytest.approx(0.1966986965874546595, abs=1e-11)  # mpmath, 40 digits
    assert gamma * (ATOMS.penalty_slope(1.0, gamma) - ATOMS.slope(1.0)) == pytest.approx(total, abs=2e-7)


def test_finite_lattice_approaches_the_gaussian():
    x = np.linspace(-9, 11, 801)
    masses = np.exp(-0.5 * x**2)
    lattice = FiniteRewardTuning(masses / masses.sum(), 1.5 * x - 0.5 * x**2, 2.0 * x)
    for of in ("value", "slope", "bias_limit", "divergence", "effective_sample_size"):
        assert getattr(lattice, of)(1.0) == pytest.approx(getattr(C, of)(1.0), abs=1e-9)
    for of in ("penalty_value", "penalty_slope", "released_slope"):
        assert getattr(lattice, of)(1.0, 10.0) == pytest.approx(getattr(C, of)(1.0, 10.0), abs=1e-9)
    assert lattice.optimum(0.9, 3.0) == pytest.approx(4 / 3, abs=1e-9)


@pytest.mark.parametrize("gamma", [1.0, 30.0])
def test_batch_moments_by_brute_force(gamma):
    """Over all ordered batches, with the weights written out."""
    strength, batch = 0.8, 4
    forward, released, chances = [], [], []
    for drawn in itertools.product(range(3), repeat=batch):
        index = list(drawn)
        r1, r2 = ATOMS.upper[index], ATOMS.lower[index]

        def kl_forward(rho):
            w = np.exp(rho)
            return (w * rho).sum() / w.sum() - np.log(w.mean())

        near, far = (r1 / gamma + r2) / strength, r2 / strength
        forward.append(gamma * (kl_forward(near) - kl_forward(far)))
        partitions = gamma * (np.log(np.exp(near).mean()) - np.log(np.exp(far).mean()))
        released.append(partitions - r1.mean() / strength)
        chances.append(ATOMS.probabilities[index].prod())
    for found, values in (
        (ATOMS.self_normalised(strength, gamma, batch), np.array(forward)),
        (ATOMS.released_batch(strength, gamma, batch), np.array(released)),
    ):
        mean = chances @ values
        assert tuple(found) == pytest.approx([mean, chances @ (values - mean) ** 2], abs=1e-11)


def test_self_normalised_estimate_is_biased_and_consistent():
    exact = ATOMS.penalty_slope(0.5, 10.0)
    biases = [ATOMS.self_normalised(0.5, 10.0, batch).mean - exact for batch in (1, 8, 40, 80)]
    assert biases[0] == pytest.approx(-exact, abs=1e-12)  # one draw has one weight: the estimate is 0
    assert abs(biases[1]) > 0.05
    assert biases[3] / biases[2] == pytest.approx(0.5, rel=0.1)  # 1 / batch
    zero = FiniteRewardTuning([0.7, 0.3, 0.0], [1.0, 0.0, 9.0], [0.0, 0.5, 9.0])
    assert zero.self_normalised(1.0, 2.0, 3).mean == pytest.approx(
        FiniteRewardTuning([0.7, 0.3], [1.0, 0.0], [0.0, 0.5]).self_normalised(1.0, 2.0, 3).mean
    )


def test_lemma_1_says_nothing_here():  # independent derivation
    """g's Hessian on the atoms is strength / p: its constants, at p* alone and in all of R^3, are already too large."""
    p = ATOMS.tilted(1.0)
    of = Constants(1 / p.max(), float(np.linalg.norm(ATOMS.upper)), 0.0, 1 / p.min(), 1 / p.min() ** 2)
    assert of.published == pytest.approx(1366.157, abs=5e-4)
    assert of.published / ATOMS.bias_limit(1.0) == pytest.approx(6945, abs=0.5)
    rare = FiniteRewardTuning([0.7, 0.299, 0.001], ATOMS.upper, ATOMS.lower)
    least_mass = rare.tilted(1.0).min()
    worse = Constants(1 / rare.tilted(1.0).max(), of.l_f0, 0.0, 1 / least_mass, 1 / least_mass**2)
    assert worse.published > 1e4 * of.published
    assert abs(rare.bias_limit(1.0)) < 1
