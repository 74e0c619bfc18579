"""Reference numbers marked "independent" are from an independent derivation; those marked "50 digits" from mpmath."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize

from theory import schedule_learning as sl
from theory.ddpm import ddim_angle_law, ddim_law
from theory.gaussian import Gaussian, w2_squared
from theory.schedule_learning import LinearPredictorToy, ScheduleProblem
from theory.schedules import cosine_family

DATA = Gaussian.diagonal([1.0, -0.5], [0.25, 4.0])
FULL = Gaussian([1.0, -0.5], [[1.3, -0.8], [-0.8, 2.1]])
OTHER = (0.2, 0.9, 2.0, 0.02)
TEN = ScheduleProblem(DATA, "cosine", "released", T=1000, S=10)
CHEN = ScheduleProblem(DATA, "cosine", "chen", T=1000, S=10)
CASES = [
    ("cosine", "released", OTHER),
    ("cosine", "chen", OTHER),
    ("sigmoid", "released", (-3.0, 3.0, 1.0, 0.1)),
    ("sigmoid", "chen", (-2.0, 3.0, 1.2, 0.1)),
]


def differences(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Five-point differences."""
    unit = np.eye(x.size)
    return np.array(
        [(f(x - 2 * h * e) - 8 * f(x - h * e) + 8 * f(x + h * e) - f(x + 2 * h * e)) / 12 / h for e in unit]
    )


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("family", "form", "x"), CASES)
def test_the_gradient_equals_differences(family: sl.Family, form: sl.Form, x: tuple[float, ...], eta: float) -> None:
    problem = ScheduleProblem(FULL, family, form, T=50, S=7, eta=eta)
    expected = differences(problem.objective, np.array(x), 1e-4)
    np.testing.assert_allclose(problem.gradient(x), expected, atol=1e-9)


@pytest.mark.parametrize("data", [DATA, FULL, Gaussian.scalar(0.7, 0.0)])
def test_the_level_gradient_equals_the_angle_formula(data: Gaussian) -> None:
    levels = np.array([0.93, 0.7, 0.32, 0.1, 0.03])
    expected = differences(lambda a: w2_squared(ddim_angle_law(data, a), data), levels, 1e-4)
    np.testing.assert_allclose(sl.level_gradient(data, levels), expected, atol=1e-8)
    noisy = differences(lambda a: w2_squared(ddim_law(data, a, 0.6), data), levels, 1e-4)
    np.testing.assert_allclose(sl.level_gradient(data, levels, 0.6), noisy, atol=1e-8)


def test_objective_and_gradient_equal_independent_numbers() -> None:
    assert TEN.objective((0.0, 1.0, 1.0, 0.008)) == pytest.approx(0.105505013131, abs=1e-12)
    assert TEN.objective(OTHER) == pytest.approx(0.109006991147, abs=1e-12)
    default = [0.3400893551, -0.3405819275, -0.1163858269, -0.1507842488]
    other = [0.7264466409, -0.7271993130, -0.0970677565, -0.2387079375]
    np.testing.assert_allclose(TEN.gradient((0.0, 1.0, 1.0, 0.008)), default, atol=1e-10)
    np.testing.assert_allclose(TEN.gradient(OTHER), other, atol=1e-10)
    noisy = ScheduleProblem(DATA, "cosine", "released", 1000, 10, eta=0.5)
    assert noisy.objective(OTHER) == pytest.approx(0.09863276287857, abs=1e-13)
    # The released sigmoid at the cosine's defaults stops far from pure noise.
    sigmoid = ScheduleProblem(DATA, "sigmoid", "released", 1000, 10)
    assert sigmoid.levels((0.0, 1.0, 1.0, 0.008))[-1] == pytest.approx(0.685203955, abs=1e-9)
    assert sigmoid.objective((0.0, 1.0, 1.0, 0.008)) == pytest.approx(1.2982, abs=1e-4)
    assert sigmoid.objective((-3.0, 3.0, 1.0, 0.0)) == pytest.approx(0.08459493514, abs=1e-11)


def test_the_optimum_equals_the_independent_one() -> None:
    best = TEN.optimum()
    assert best.value == pytest.approx(0.06836741275, abs=5e-12)
    np.testing.assert_allclose(best.parameters, [0.0, 0.7454193, 2.7115792, 0.0369159], atol=1e-6)
    assert best.reached == 4
    tau = TEN.optimum(free=["tau"])
    assert tau.value == pytest.approx(0.08637110106, abs=5e-12)
    assert tau.parameters[2] == pytest.approx(1.4933733021, abs=1e-6)


@pytest.mark.parametrize("S", [5, 20, 50])
def test_the_optimum_is_stationary_and_a_simplex_search_finds_no_better(S: int) -> None:
    problem = ScheduleProblem(DATA, "cosine", "released", 1000, S)
    best = problem.optimum()
    assert np.abs(best.gradient[1:]).max() < 1e-7
    assert best.reached == 4

    def value(z: np.ndarray) -> float:
        end, tau, epsilon = z
        valid = 0.05 < end <= 1 and tau > 0 and epsilon >= 0
        return problem.objective((0.0, end, tau, epsilon)) if valid else 10.0

    options = {"xatol": 1e-7, "fatol": 1e-13, "maxiter": 500}
    simplex = minimize(value, np.array([0.8, 1.5, 0.02]), method="Nelder-Mead", options=options)
    assert simplex.fun > best.value - 1e-12
    assert simplex.fun == pytest.approx(best.value, abs=1e-8)


def test_freeing_start_gains_nothing_and_the_sigmoid_has_one_optimum_in_two_numbers() -> None:
    assert TEN.optimum(free=sl.NAMES).value == pytest.approx(TEN.optimum().value, abs=1e-12)
    sigmoid = ScheduleProblem(DATA, "sigmoid", "released", 1000, 10)
    every, few = sigmoid.optimum(free=sl.NAMES), sigmoid.optimum(free=["end", "epsilon"])
    assert every.value == pytest.approx(few.value, abs=1e-12)
    assert every.value > TEN.optimum().value + 1e-3


@pytest.mark.parametrize(("family", "form", "x"), CASES)
def test_null_directions_do_not_move_the_schedule(family: sl.Family, form: sl.Form, x: tuple[float, ...]) -> None:
    problem = ScheduleProblem(DATA, family, form, T=100, S=10)
    directions = sl.null_directions(problem, x)
    np.testing.assert_allclose(directions @ problem.gradient(x), 0.0, atol=1e-12)
    # The first is a straight line in parameter space: a finite distance along it that keeps the parameters valid.
    moved = problem.levels(np.array(x) + 0.1 * directions[0] / np.abs(directions[0]).max())
    np.testing.assert_allclose(moved, problem.levels(x), atol=1e-13)
    if family == "sigmoid":
        start, end, tau, epsilon = x
        origin = 1.0 - start / problem.T if form == "released" else -start
        curve = (start, start + 1.3 * (end - start), 1.3 * tau, epsilon + origin / tau * (1 - 1 / 1.3))
        np.testing.assert_allclose(problem.levels(curve), problem.levels(x), atol=1e-13)
    rank = np.linalg.matrix_rank(directions)
    assert rank == (1 if family == "cosine" else 2)
    # No further direction: the schedule's jacobian has exactly the remaining rank.
    jacobian = np.array([problem.levels(np.array(x) + h * e) for e in np.eye(4) for h in (1e-5, -1e-5)])
    rates = (jacobian[::2] - jacobian[1::2]) / 2e-5
    singular = np.linalg.svd(rates, compute_uv=False)
    assert singular[4 - rank - 1] > 1e-5 > 1e-8 > singular[4 - rank]


def test_start_and_end_are_degenerate_in_the_released_form_only() -> None:
    ratio = np.divide(*TEN.gradient(OTHER)[:2])
    assert ratio == pytest.approx(-0.9989649713, abs=1e-10)  # independent
    hessian = sl.start_end_hessian(TEN, OTHER)
    low, high = np.linalg.eigvalsh(hessian)
    # 50 digits; the independent derivation's -1.3e-7 is not reproduced.
    assert (low, high) == pytest.approx((9.124885825e-7, 16.3847616), rel=1e-5)
    assert hessian[0, 0] == pytest.approx(4.869355513e-6, rel=1e-6)
    chen = sl.start_end_hessian(CHEN, OTHER)
    assert tuple(np.linalg.eigvalsh(chen)) == pytest.approx((0.02217994919, 2.105290658), rel=1e-6)  # 50 digits
    assert CHEN.gradient(OTHER)[:2] == pytest.approx((0.037013752355, 0.057329921933), abs=1e-11)  # 50 digits


def test_the_degeneracy_shrinks_with_the_number_of_steps() -> None:
    first, second = (
        sl.start_end_hessian(ScheduleProblem(DATA, "cosine", "released", T, 10), OTHER)[0] for T in (1000, 4000)
    )
    assert first[0] / second[0] == pytest.approx(16.0, rel=0.05)
    assert first[1] / second[1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("perturbed", [sl.NAMES, ("end",), ("start", "tau")])
def test_the_invalid_share_equals_simulation(perturbed: tuple[str, ...]) -> None:
    x, T = np.array([0.0, 1.0, 1.0, 0.008]), 1000
    directions = np.random.default_rng(5).standard_normal((3000, 4)) * [name in perturbed for name in sl.NAMES]

    def invalid(z: np.ndarray) -> bool:
        y = (np.arange(T + 1) * (z[1] - z[0]) + z[0]) / T
        f = np.maximum(np.cos((y + z[3]) / (1 + z[3]) * math.pi / 2), 0.0) ** (2 * z[2])
        with np.errstate(invalid="ignore", divide="ignore"):
            return bool(np.isnan(1.0 - f[1:] / f[:-1]).any())

    forward = np.array([invalid(x + 0.01 * v) for v in directions])
    either = forward | np.array([invalid(x - 0.01 * v) for v in directions])
    for found, two_sided in ((forward.mean(), False), (either.mean(), True)):
        share = sl.invalid_share(x, 0.01, T, perturbed, two_sided)
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 3000)


def test_an_invalid_schedule_is_what_the_share_counts() -> None:
    cosine_family(1000, 0.0, 1.0010, 1.0, 0.008, form="released")
    with pytest.raises(ValueError, match="1 betas are 0/0"):
        cosine_family(1000, 0.0, 1.0011, 1.0, 0.008, form="released")
    assert sl.invalid_share((0.0, 1.0, 1.0, 0.008), 0.01) == pytest.approx(0.9435434856, abs=1e-9)
    assert sl.invalid_share((0.0, 1.0, 1.0, 0.008), 0.01, perturbed=["end"]) == pytest.approx(0.9202648559, abs=1e-9)


TOY = LinearPredictorToy()
# tau, F, F', F'_gamma at gamma = 1, 10, 100, 1e4, limit of the bias of F and of F'; independent.
TABLE = [
    (1.0, 0.005832592654, 0.007536194266, [-0.000130108616, 0.003391523829, 0.006918088208, 0.007529697684])
    + (-0.0218585839, -0.0649988845),
    (2.0, 0.011702603454, 0.005215563304, [-0.000540725700, -0.002336464331, 0.001898430142, 0.005171735659])
    + (-0.2204643467, -0.4395913008),
]


@pytest.mark.parametrize(("tau", "value", "slope", "penalised", "value_limit", "slope_limit"), TABLE)
def test_the_toy_equals_independent_numbers(
    tau: float, value: float, slope: float, penalised: list[float], value_limit: float, slope_limit: float
) -> None:
    assert (TOY.objective(tau), TOY.gradient(tau)) == pytest.approx((value, slope), abs=1e-12)
    found = [TOY.penalty_gradient(tau, gamma) for gamma in (1.0, 10.0, 100.0, 1e4)]
    np.testing.assert_allclose(found, penalised, atol=1e-12)
    assert found[0] < 0 < slope
    assert TOY.bias_limits(tau) == pytest.approx((value_limit, slope_limit), abs=1e-10)


@pytest.mark.parametrize("toy", [TOY, LinearPredictorToy(5, 2.0), LinearPredictorToy(1, 0.5)])
def test_the_toy_equals_brute_force(toy: LinearPredictorToy) -> None:
    tau = 1.3
    gradient = differences(lambda x: toy.objective(x[0]), np.array([tau]), 1e-3)[0]
    assert toy.gradient(tau) == pytest.approx(gradient, abs=1e-10)
    for gamma in (3.0, 300.0):
        k = toy.penalty_solution(tau, gamma)

        def total(weights: np.ndarray, gamma: float = gamma) -> float:
            return toy.upper(tau, weights) + gamma * toy.lower(tau, weights)

        search = minimize(total, toy.lower_solution(tau), method="BFGS", options={"gtol": 1e-9 * gamma})
        assert total(k) <= search.fun + 1e-13 * gamma
        value = total(k) - gamma * toy.lower(tau, toy.lower_solution(tau))
        assert toy.penalty_objective(tau, gamma) == pytest.approx(value, abs=1e-12 * gamma)
        slope = differences(lambda x, gamma=gamma: toy.penalty_objective(x[0], gamma), np.array([tau]), 1e-3)[0]
        assert toy.penalty_gradient(tau, gamma) == pytest.approx(slope, abs=1e-9)
    # Richardson in 1/gamma.
    scaled = [gamma * (toy.penalty_gradient(tau, gamma) - toy.gradient(tau)) for gamma in (1e5, 2e5)]
    assert 2 * scaled[1] - scaled[0] == pytest.approx(toy.bias_limits(tau)[1], rel=1e-4)
    values = [gamma * (toy.penalty_objective(tau, gamma) - toy.objective(tau)) for gamma in (1e5, 2e5)]
    assert 2 * values[1] - values[0] == pytest.approx(toy.bias_limits(tau)[0], rel=1e-4)


def test_the_toy_is_ddim_with_that_predictor() -> None:
    """At k* it is the exact score, whose output law is known; at other k the steps are simulated on two points."""
    law = ddim_law(Gaussian.scalar(0.0, TOY.variance), TOY.alpha_bar(1.0))
    assert TOY.objective(1.0) == pytest.approx(w2_squared(law, Gaussian.scalar(0.0, TOY.variance)), abs=1e-14)
    k, x = np.linspace(0.3, 1.0, 8), 1.0
    levels = [1.0, *TOY.alpha_bar(1.0)]
    for t in range(8, 0, -1):
        noise = k[t - 1] * x
        x0 = (x - math.sqrt(1 - levels[t]) * noise) / math.sqrt(levels[t])
        x = math.sqrt(levels[t - 1]) * x0 + math.sqrt(1 - levels[t - 1]) * noise
    assert TOY.upper(1.0, k) == pytest.approx((abs(x) - 0.5) ** 2, rel=1e-12)


BETA = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
SLOPES = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
OFFSETS = np.array([0.1, -0.2, 0.05, 0.0, 0.2, -0.1])


def test_the_score_matching_gradient_equals_independent_numbers_and_refutes_the_own_step() -> None:
    data = Gaussian.scalar(0.7, 0.4)
    gradient = sl.score_matching_gradient(BETA, SLOPES, OFFSETS, data)
    expected = [-1.2667040261, -0.9400418943, -0.6813435042, -0.4402343638, -0.2569231742, -0.0969265562]
    np.testing.assert_allclose(gradient, expected, atol=1e-10)
    wrong = sl.score_matching_gradient(BETA, SLOPES, OFFSETS, data, own_step_only=True)
    assert wrong[0] == pytest.approx(-0.3554389245, abs=1e-10)
    assert np.all(np.abs(wrong - gradient)[:-1] > 0.08)
    assert wrong[-1] == gradient[-1]


@pytest.mark.parametrize("data", [DATA, FULL])
def test_the_score_matching_gradient_equals_differences_of_the_loss(data: Gaussian) -> None:
    expected = differences(lambda beta: sl.score_matching_loss(beta, SLOPES, OFFSETS, data), BETA, 1e-4)
    np.testing.assert_allclose(sl.score_matching_gradient(BETA, SLOPES, OFFSETS, data), expected, atol=1e-9)


def test_the_score_matching_loss_equals_simulation() -> None:
    generator, n = np.random.default_rng(6), 100_000
    x0 = generator.multivariate_normal(FULL.mean, FULL.cov, n)
    eps = generator.standard_normal((n, 2))
    losses = np.zeros(n)
    for a, k, c in zip(np.cumprod(1 - BETA), SLOPES, OFFSETS, strict=True):
        x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
        losses += np.sum((eps - k * x - c) ** 2, axis=1) / 6
    found = sl.score_matching_loss(BETA, SLOPES, OFFSETS, FULL)
    assert abs(losses.mean() - found) < 4 * losses.std() / math.sqrt(n)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ScheduleProblem(DATA, "linear", "released", 10, 5),
            r"family = 'linear': must be 'cosine' or 'sigmoid'",
        ),
        (lambda: ScheduleProblem(DATA, "cosine", "old", 10, 5), r"form = 'old': must be 'released' or 'chen'"),
        (lambda: ScheduleProblem(DATA, "cosine", "chen", 10, 11), r"S = 11: must not exceed T = 10"),
        (lambda: ScheduleProblem(DATA, "cosine", "chen", 10, 5, eta=1.5), r"eta = 1.5: must lie in"),
        (lambda: TEN.objective((0.0, 1.0, 1.0)), r"parameters = .*: must have the four entries"),
        (lambda: TEN.objective((0.0, 1.01, 1.0, 0.008)), r"start, end = 0.0, 1.01: must keep the cosine positive"),
        (lambda: TEN.gradient((0.0, 1.0, -1.0, 0.008)), r"tau = -1.0: must lie in"),
        (lambda: TEN.optimum(free=["end", "end"]), r"free = \['end', 'end'\]: must be distinct names"),
        (lambda: TEN.optimum(free=[]), r"free = \[\]: must be distinct names"),
        (lambda: TEN.optimum(start=(0.0, 1.0, 500.0, 0.0)), r"tau = 500.0: must lie in \[0.05, 100.0\]"),
        (lambda: TEN.optimum(box=[(0, 1)]), r"box has shape \(1, 2\): must be \(4, 2\)"),
        (lambda: sl.invalid_share((0.0, 1.1, 1.0, 0.0), 0.01), r"parameters = .*: must keep the cosine positive"),
        (lambda: sl.invalid_share(OTHER, 0.01, perturbed=["gamma"]), r"perturbed = \['gamma'\]: must be names"),
        (lambda: LinearPredictorToy(8, 0.0), r"variance = 0.0: must lie in"),
        (lambda: TOY.upper(1.0, [1.0]), r"k has 1 entries: must have T = 8"),
        (lambda: TOY.penalty_solution(1.0, 0.0), r"gamma = 0.0: must lie in"),
        (lambda: sl.score_matching_loss(BETA, SLOPES[1:], OFFSETS, DATA), r"slopes, offsets have 5, 6 entries"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
