"""Reference numbers marked "development study, 2026" were computed before, and apart from, this code."""

import cmath
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory import ddpm
from theory.gaussian import Gaussian, affine, condition, entropy, kl, w2_squared
from theory.schedules import NoiseSchedule, cosine_family, cosine_family_jacobian, ddim_grid, sigmoid_family, vp_linear

DATA = Gaussian.diagonal([1.0, -0.5], [0.25, 4.0])
TILTED = Gaussian([1.0, -0.5], [[1.3, -0.8], [-0.8, 2.1]])
COSINE = cosine_family(1000, 0.0, 1.0, 1.0, 0.008, form="released")[1:]
OTHER = cosine_family(1000, 0.2, 0.9, 2.0, 0.02, form="released")[1:]
SIGMOID = sigmoid_family(1000, -3.0, 3.0, 1.0, 0.0, form="released")[1:]
TEN, FIFTY = ddim_grid(1000, 10), ddim_grid(1000, 50)

seeds = st.integers(0, 2**32 - 1)
choices = st.sampled_from(["beta", "posterior", "optimal"])
betas = st.lists(st.floats(1e-3, 0.95), min_size=1, max_size=8)


def random_data(seed: int, dim: int = 2) -> Gaussian:
    generator = np.random.default_rng(seed)
    factor = generator.uniform(-1.5, 1.5, (dim, dim))
    return Gaussian(generator.uniform(-2, 2, dim), factor @ factor.T + 0.05 * np.eye(dim))


# Brute force: explicit matrices in data coordinates, no eigenvectors and no scalar formulas.


def noise_prediction(data: Gaussian, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset of E[eps | x_t], by conditioning the joint law of (eps, x_t) coordinate by coordinate."""
    d = data.dim
    eye, zero = np.eye(d), np.zeros((d, d))
    sources = Gaussian(np.concatenate([data.mean, np.zeros(d)]), np.block([[data.cov, zero], [zero, eye]]))
    mixing = np.block([[zero, eye], [math.sqrt(level) * eye, math.sqrt(1 - level) * eye]])
    joint = affine(sources, mixing, np.zeros(2 * d))
    observed = list(range(d, 2 * d))
    offset = condition(joint, observed, np.zeros(d)).mean
    columns = [condition(joint, observed, row).mean - offset for row in eye]
    return np.stack(columns, axis=1), offset


def forward_joint(data: Gaussian, schedule: NoiseSchedule) -> Gaussian:
    """The law of (x_0, ..., x_T)."""
    d, joint = data.dim, data
    for beta in schedule.beta:
        keep = np.eye(joint.dim)
        new = math.sqrt(1 - beta) * keep[-d:]
        noise = np.zeros((joint.dim + d, joint.dim + d))
        noise[-d:, -d:] = beta * np.eye(d)
        joint = affine(joint, np.vstack([keep, new]), np.zeros(joint.dim + d), noise)
    return joint


def model_joint(data: Gaussian, schedule: NoiseSchedule, variance: str) -> Gaussian:
    """The law of (x_0, ..., x_T) under ancestral sampling: x_T first, then one block in front per step."""
    d = data.dim
    joint = Gaussian(np.zeros(d), np.eye(d))
    forward = forward_joint(data, schedule)
    for t in range(schedule.steps, 0, -1):
        beta, level = schedule.beta[t - 1], schedule.alpha_bar[t - 1]
        matrix, offset = noise_prediction(data, level)
        weight = beta / math.sqrt(1 - level)
        step = (np.eye(d) - weight * matrix) / math.sqrt(1 - beta)
        if variance == "optimal":
            pair = affine(forward, np.eye(forward.dim)[(t - 1) * d : (t + 1) * d], np.zeros(2 * d))
            added = condition(pair, list(range(d, 2 * d)), np.zeros(d)).cov
        elif variance == "posterior":
            before = schedule.alpha_bar[t - 2] if t > 1 else 1.0
            added = beta * (1 - before) / (1 - level) * np.eye(d)
        else:
            added = beta * np.eye(d)
        keep = np.eye(joint.dim)
        noise = np.zeros((joint.dim + d, joint.dim + d))
        noise[:d, :d] = added
        shift = np.concatenate([-weight / math.sqrt(1 - beta) * offset, np.zeros(joint.dim)])
        joint = affine(joint, np.vstack([step @ keep[:d], keep]), shift, noise)
    return joint


def first_block(joint: Gaussian, d: int) -> Gaussian:
    return affine(joint, np.eye(joint.dim)[:d], np.zeros(d))


def ddim_brute_force(data: Gaussian, levels: np.ndarray, eta: float) -> Gaussian:
    """Song et al. 2021, eq. (12), as one matrix product over the stacked noises."""
    law = Gaussian(np.zeros(data.dim), np.eye(data.dim))
    eye = np.eye(data.dim)
    for now, then in zip(levels[::-1], [*levels[-2::-1], 1.0], strict=True):
        matrix, offset = noise_prediction(data, now)
        variance = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        direction = math.sqrt(max(1 - then - variance, 0.0)) - math.sqrt(then * (1 - now) / now)
        law = affine(law, math.sqrt(then / now) * eye + direction * matrix, direction * offset, variance * eye)
    return law


@pytest.mark.parametrize("variance", ["beta", "posterior", "optimal"])
@pytest.mark.parametrize("data", [TILTED, random_data(7, 3)])
def test_ancestral_law_equals_brute_force(data: Gaussian, variance: ddpm.Variance) -> None:
    schedule = NoiseSchedule([0.05, 0.4, 0.15, 0.6, 0.3])
    expected = first_block(model_joint(data, schedule, variance), data.dim)
    law = ddpm.ancestral_law(data, schedule, variance)
    np.testing.assert_allclose(law.mean, expected.mean, atol=1e-12)
    np.testing.assert_allclose(law.cov, expected.cov, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("data", [TILTED, random_data(7, 3)])
def test_ddim_law_equals_brute_force(data: Gaussian, eta: float) -> None:
    levels = np.array([0.93, 0.7, 0.32, 0.1, 0.03])
    expected = ddim_brute_force(data, levels, eta)
    law = ddpm.ddim_law(data, levels, eta)
    np.testing.assert_allclose(law.mean, expected.mean, atol=1e-12)
    np.testing.assert_allclose(law.cov, expected.cov, atol=1e-12)


@pytest.mark.parametrize("variance", ["beta", "optimal"])
@pytest.mark.parametrize("data", [TILTED, random_data(7, 3)])
def test_path_kl_is_the_kl_of_the_joint_laws(data: Gaussian, variance: ddpm.Variance) -> None:
    schedule = NoiseSchedule([0.05, 0.4, 0.15, 0.6])
    forward, model = forward_joint(data, schedule), model_joint(data, schedule, variance)
    parts = ddpm.path_kl(data, schedule, variance)
    assert parts.total == pytest.approx(kl(forward, model), rel=1e-10)
    # The decomposition: dropping x_0, ..., x_{k-1} drops exactly the steps 1..k.
    for k in range(1, schedule.steps + 1):
        rows = np.eye(forward.dim)[k * data.dim :]
        tail = kl(affine(forward, rows, np.zeros(len(rows))), affine(model, rows, np.zeros(len(rows))))
        assert parts.prior + parts.steps[k:].sum() == pytest.approx(tail, rel=1e-9)


def test_path_kl_with_the_posterior_variance_is_infinite_in_its_first_step_only() -> None:
    schedule = NoiseSchedule([0.05, 0.4, 0.15, 0.6])
    parts = ddpm.path_kl(TILTED, schedule, "posterior")
    assert parts.steps[0] == parts.total == math.inf
    assert ddpm.elbo(TILTED, schedule, "posterior") == -math.inf
    forward, model = forward_joint(TILTED, schedule), model_joint(TILTED, schedule, "posterior")
    rows = np.eye(forward.dim)[2:]
    tail = kl(affine(forward, rows, np.zeros(8)), affine(model, rows, np.zeros(8)))
    assert parts.prior + parts.steps[1:].sum() == pytest.approx(tail, rel=1e-10)


@given(seeds, betas, choices)
def test_the_path_is_further_away_than_its_end(seed: int, values: list[float], variance: ddpm.Variance) -> None:
    data, schedule = random_data(seed), NoiseSchedule(values)
    parts = ddpm.path_kl(data, schedule, variance)
    marginal = kl(data, ddpm.ancestral_law(data, schedule, variance))
    assert (parts.steps >= 0).all()
    assert marginal <= parts.total * (1 + 1e-10) + 1e-14
    if variance != "posterior":
        assert ddpm.elbo(data, schedule, variance) <= -entropy(data) - marginal + 1e-9
    if variance == "optimal":
        assert (parts.steps == 0).all()


@given(seeds, betas)
def test_ddim_at_eta_one_without_skipping_is_ancestral_sampling(seed: int, values: list[float]) -> None:
    data, schedule = random_data(seed), NoiseSchedule(values)
    ddim = ddpm.ddim_law(data, schedule.alpha_bar, 1.0)
    ancestral = ddpm.ancestral_law(data, schedule, "posterior")
    np.testing.assert_allclose(ddim.mean, ancestral.mean, atol=1e-9)
    np.testing.assert_allclose(ddim.cov, ancestral.cov, atol=1e-9)
    assert w2_squared(ddim, ddpm.ancestral_law(data, schedule, "beta")) > 1e-8


@given(seeds, betas, st.booleans())
def test_the_angle_formula_is_the_deterministic_recursion(seed: int, values: list[float], to_zero: bool) -> None:
    levels = np.append(np.cumprod(1 - np.array(values)), [0.0] * to_zero)
    data = random_data(seed)
    closed, recursion = ddpm.ddim_angle_law(data, levels), ddpm.ddim_law(data, levels)
    np.testing.assert_allclose(closed.mean, recursion.mean, atol=1e-12)
    np.testing.assert_allclose(closed.cov, recursion.cov, atol=1e-12)


@given(seeds, st.integers(2, 8), st.floats(0.2, 5))
def test_equal_angles_beat_every_schedule_that_ends_in_noise(seed: int, steps: int, std: float) -> None:
    data = Gaussian.scalar(0.7, std**2)
    best = ddpm.ddim_law(data, ddpm.optimal_ddim_schedule(std, steps))
    cuts = np.sort(np.random.default_rng(seed).uniform(0.02, 0.98, steps - 1))[::-1]
    other = ddpm.ddim_law(data, np.append(cuts, 0.0))
    assert w2_squared(best, data) == pytest.approx(ddpm.optimal_ddim_w2_squared(std, steps), rel=1e-10)
    assert w2_squared(best, data) <= w2_squared(other, data) * (1 + 1e-12)
    assert kl(data, best) <= kl(data, other) * (1 + 1e-12)
    assert kl(best, data) <= kl(other, data) * (1 + 1e-12)


def test_equal_angles_are_not_optimal_if_sampling_may_start_before_pure_noise() -> None:
    """For N(0, 1) the prior is the data, so that any schedule ending near alpha_bar = 1 is better."""
    data = Gaussian.scalar(0.0, 1.0)
    assert w2_squared(ddpm.ddim_law(data, [0.9999, 0.999]), data) < 1e-6 < ddpm.optimal_ddim_w2_squared(1.0, 2)
    # Development study, 2026: under-dispersion cancels against a wide prior, to an error of exactly zero.
    tau = 0.3622848724
    shape = np.cos((0.9 * np.arange(9) / 8 + 0.008) / 1.008 * math.pi / 2) ** (2 * tau)
    narrow = Gaussian.scalar(0.0, 0.25)
    assert w2_squared(ddpm.ddim_law(narrow, shape[1:] / shape[0]), narrow) < 1e-18


def test_the_optimal_schedule_is_the_cosine_at_unit_variance() -> None:
    expected = cosine_family(25, 0.0, 1.0, 1.0, 0.0)[1:]
    np.testing.assert_allclose(ddpm.optimal_ddim_schedule(1.0, 25), expected, atol=1e-15)
    # S (1 - Q/s) -> pi^2/8.
    gap = 4000 * math.sqrt(ddpm.optimal_ddim_w2_squared(3.0, 4000)) / 3.0
    assert gap == pytest.approx(math.pi**2 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("schedule_std", "data_std", "steps", "expected"),
    [
        (1.0, 1.0, 5, 0.7780932140),
        (1.0, 1.0, 10, 0.8834851837),
        (2.0, 2.0, 50, 0.9756239433),
        (1.0, 2.0, 10, 0.8560736926),
        (1.0, 0.5, 10, 0.8560736926),
    ],
)
def test_shrinkage_of_the_study(schedule_std: float, data_std: float, steps: int, expected: float) -> None:
    # Development study, 2026.
    law = ddpm.ddim_law(Gaussian.scalar(1.0, data_std**2), ddpm.optimal_ddim_schedule(schedule_std, steps))
    assert math.sqrt(law.cov[0, 0]) / data_std == pytest.approx(expected, rel=1e-9)


STUDY = [  # mean, variances, W2^2, KL(data || out), KL(out || data); development study, 2026
    (
        ddpm.ddim_law(DATA, COSINE[TEN]),
        [0.999979249414, -0.499958481333, 0.177286178332, 2.83897102792],
        [0.1055050131, 0.06628112606, 0.05271791269],
    ),
    (
        ddpm.ddim_law(DATA, COSINE[FIFTY]),
        [0.99997611958, -0.499952234903, 0.234799992076, 3.75746971439],
        [0.004030517593, 0.00200335701, 0.00192142098],
    ),
    (
        ddpm.ddim_law(DATA, COSINE, 1.0),
        [0.999999999393, -0.499999995142, 0.247996702558, 3.98288562755],
        [2.237498768e-5, 2.082869874e-5, 2.072876341e-5],
    ),
    (
        ddpm.ancestral_law(DATA, NoiseSchedule.from_alpha_bar(COSINE), "beta"),
        [0.999999999393, -0.499999995142, 0.250459873526, 3.99266284145],
        [3.578997228e-6, 1.687080234e-6, None],
    ),
    (
        ddpm.ddim_law(DATA, OTHER[TEN]),
        [0.914547247045, -0.327063951678, 0.185082926379, 3.03211237976],
        [0.1090069911, 0.07079166231, 0.0563684918],
    ),
    (
        ddpm.ddim_law(DATA, OTHER[TEN], 0.5),
        [0.9434713925969, -0.3555127531642, 0.1753758254314, 3.0251686987815],
        [0.09863276287857, 0.06950745452539, 0.05482686357533],
    ),
    (
        ddpm.ddim_law(DATA, SIGMOID[TEN]),
        [0.965741880578, -0.415550371049, 0.127915722675, 3.10922659384],
        [0.08459493514, 0.1651822077, 0.108728293],
    ),
]


@pytest.mark.parametrize(("law", "moments", "errors"), STUDY)
def test_output_laws_of_the_study(law: Gaussian, moments: list[float], errors: list[float | None]) -> None:
    np.testing.assert_allclose(np.concatenate([law.mean, np.diag(law.cov)]), moments, rtol=5e-12)
    measured = [w2_squared(law, DATA), kl(DATA, law), kl(law, DATA)]
    for value, expected in zip(measured, errors, strict=True):
        assert expected is None or value == pytest.approx(expected, rel=1e-9)


def test_the_mismatched_sigmoid_and_the_best_schedule_of_the_study() -> None:
    # Development study, 2026.
    defaults = sigmoid_family(1000, 0.0, 1.0, 1.0, 0.008, form="released")[1:]
    assert w2_squared(ddpm.ddim_law(DATA, defaults[TEN]), DATA) == pytest.approx(1.2982, abs=5e-5)
    best = cosine_family(1000, 0.0, 0.7454193, 2.7115792, 0.0369159, form="released")[1:]
    assert w2_squared(ddpm.ddim_law(DATA, best[TEN]), DATA) == pytest.approx(0.06836741275, rel=1e-9)
    steep = cosine_family(1000, 0.0, 1.0, 1.4933733021, 0.008, form="released")[1:]
    assert w2_squared(ddpm.ddim_law(DATA, steep[TEN]), DATA) == pytest.approx(0.08637110106, rel=1e-9)


def w2_gradient(levels: np.ndarray) -> np.ndarray:
    """d W2^2 / d alpha_bar of deterministic DDIM on DATA, by complex steps through the scalar recursion."""

    def error(values: list[complex]) -> complex:
        total: complex = 0.0
        for m, variance in zip(DATA.mean, np.diag(DATA.cov), strict=True):
            gain: complex = 1.0
            for now, then in zip(values, [1.0, *values[:-1]], strict=True):
                up = cmath.sqrt(now * then) * variance + cmath.sqrt((1 - then) * (1 - now))
                gain *= up / (now * variance + 1 - now)
            total += values[-1] * m**2 * gain**2 + (gain - math.sqrt(variance)) ** 2
        return total

    h = 1e-30
    return np.array([error([v + 1j * h * (i == k) for i, v in enumerate(levels)]).imag / h for k in range(len(levels))])


def test_schedule_gradients_of_the_study() -> None:
    # Development study, 2026: gradient of W2^2 with respect to (start, end, tau, epsilon), ten DDIM steps.
    for theta, expected in (
        ((0.0, 1.0, 1.0, 0.008), [0.3400893551, -0.3405819275, -0.1163858269, -0.1507842488]),
        ((0.2, 0.9, 2.0, 0.02), [0.7264466409, -0.7271993130, -0.0970677565, -0.2387079375]),
    ):
        levels = cosine_family(1000, *theta, form="released")[1:][TEN]
        jacobian = cosine_family_jacobian(1000, *theta, form="released")[1:][TEN]
        np.testing.assert_allclose(w2_gradient(levels) @ jacobian, expected, rtol=1e-8)


def test_chen_gradients_are_independent() -> None:
    """start and end pull in the same direction here; the study's values hold with the last beta clipped to 0.999."""
    theta = (0.2, 0.9, 2.0, 0.02)
    levels = cosine_family(1000, *theta)[1:]
    jacobian = cosine_family_jacobian(1000, *theta)[1:]
    clipped, clipped_jacobian = levels.copy(), jacobian.copy()
    clipped[-1], clipped_jacobian[-1] = 0.001 * levels[-2], 0.001 * jacobian[-2]
    # Development study, 2026.
    np.testing.assert_allclose(
        (w2_gradient(clipped[TEN]) @ clipped_jacobian[TEN])[:2], [0.0370105621, 0.0582124546], rtol=1e-8
    )
    # Unclipped the last level is 0 and stays so; its square root is not differentiable, and multiplies a zero.
    interior = TEN[:-1]
    h = 1e-6
    for k in range(2):
        shifted = [np.array(theta) + sign * h * np.eye(4)[k] for sign in (1, -1)]
        up, down = (w2_squared(ddpm.ddim_law(DATA, cosine_family(1000, *s)[1:][TEN]), DATA) for s in shifted)
        gradient = angle_gradient(levels[interior]) @ jacobian[interior]
        assert gradient[k] == pytest.approx((up - down) / (2 * h), rel=1e-6)


def angle_gradient(interior: np.ndarray) -> np.ndarray:
    """d W2^2 / d alpha_bar for the grid `interior` followed by 0, by complex steps through the angle formula."""

    def error(values: list[complex]) -> complex:
        total: complex = 0.0
        for variance in np.diag(DATA.cov):
            s = math.sqrt(variance)
            angles = [0.0, *[cmath.atan(cmath.sqrt((1 - a) / a) / s) for a in values], math.pi / 2]
            product: complex = 1.0
            for before, after in zip(angles[:-1], angles[1:], strict=True):
                product *= cmath.cos(after - before)
            total += (s * product - s) ** 2
        return total

    h = 1e-30
    n = len(interior)
    return np.array([error([v + 1j * h * (i == k) for i, v in enumerate(interior)]).imag / h for k in range(n)])


@pytest.mark.parametrize(
    ("variance", "mean", "T", "path", "marginal", "output", "negative_elbo"),
    [  # development study, 2026
        (0.25, 1.0, 20, 0.0542559595568, 0.00753586998862, 0.298942839598, 0.780047312201),
        (0.25, 1.0, 1000, 0.00111212186883, 2.89004425815e-6, 0.25085190678, 0.726903474514),
        (4.0, -0.5, 20, 0.0503965085666, 0.00455146069163, 3.50549809599, 2.16248222233),
        (4.0, -0.5, 1000, 8.57774977847e-4, 1.36412851419e-6, 3.99067364621, 2.11294348874),
    ],
)
def test_path_and_marginal_kl_of_the_study(
    variance: float, mean: float, T: int, path: float, marginal: float, output: float, negative_elbo: float
) -> None:
    data, schedule = Gaussian.scalar(mean, variance), vp_linear(T)
    law = ddpm.ancestral_law(data, schedule)
    assert ddpm.path_kl(data, schedule).total == pytest.approx(path, rel=1e-11)
    assert kl(data, law) == pytest.approx(marginal, rel=1e-9)
    assert law.cov[0, 0] == pytest.approx(output, rel=1e-11)
    assert -ddpm.elbo(data, schedule) == pytest.approx(negative_elbo, rel=1e-11)


def test_limit_constants_of_the_study() -> None:
    constants = ddpm.limit_constants([0.25, 4.0], [1.0, -0.5])
    # Development study, 2026.
    np.testing.assert_allclose(constants.path_kl, [1.09191724, 0.85010324], rtol=1e-8)
    np.testing.assert_allclose(constants.variance_gap, [0.84941210, -9.31630100], rtol=1e-8)
    np.testing.assert_allclose(constants.marginal_kl, [2.88600368, 1.35614788], rtol=1e-8)


@pytest.mark.parametrize(("variance", "mean"), [(0.25, 1.0), (4.0, -0.5)])
def test_the_limits_are_approached_at_rate_one_over_T(variance: float, mean: float) -> None:
    data = Gaussian.scalar(mean, variance)
    constants = ddpm.limit_constants([variance], [mean])

    def scaled(T: int) -> np.ndarray:
        schedule = vp_linear(T)
        parts = ddpm.path_kl(data, schedule)
        level = schedule.alpha_bar[-1]
        last = level * variance + 1 - level
        # What the wrong prior leaves behind, which does not vanish as T grows: docs/ddpm.md, "Many steps".
        prior_gap = (level * variance / last) ** 2 * (1 - variance)
        gap = ddpm.ancestral_law(data, schedule).cov[0, 0] - variance - prior_gap
        marginal = kl(Gaussian.scalar(0.0, variance), Gaussian.scalar(0.0, variance + gap))
        return np.array([T * parts.steps.sum(), T * gap, T**2 * marginal])

    limits = np.array([constants.path_kl[0], constants.variance_gap[0], constants.marginal_kl[0]])
    coarse, middle, fine = (scaled(T) for T in (1000, 2000, 4000))
    # An expansion in powers of 1/T: two rounds of Richardson's extrapolation leave 1/T^3.
    np.testing.assert_allclose((8 * fine - 6 * middle + coarse) / 3, limits, rtol=1e-7)
    np.testing.assert_allclose((coarse - limits) / (fine - limits), 4.0, rtol=0.15)
    # The midpoint rule has alpha_bar_T -> exp(-10.05), hence the floor of the path KL.
    assert ddpm.path_kl(data, vp_linear(100_000)).prior == pytest.approx(constants.prior[0], rel=2e-3)


@pytest.mark.parametrize("variances", [[0.25], [4.0], [0.25, 4.0]])
@pytest.mark.parametrize(("beta_min", "beta_max"), [(0.1, 20.0), (10.0, 10.0)])
def test_the_posterior_variance_costs_half_of_eulers_constant_per_dimension(
    variances: list[float], beta_min: float, beta_max: float
) -> None:
    data = Gaussian.diagonal(np.zeros(len(variances)), variances)
    drift = sum((beta_max - beta_min) / (2 * beta_min) + beta_min * (0.5 - 1 / v) for v in variances)

    def without_log(T: int) -> float:
        """The steps t > 1 less the term of order log(T)/T: docs/ddpm.md."""
        steps = ddpm.path_kl(data, vp_linear(T, beta_min, beta_max), "posterior").steps
        return steps[1:].sum() - 0.5 * drift * math.log(T) / T

    limit = len(variances) * 0.2886078325
    assert limit == pytest.approx(len(variances) * ddpm.POSTERIOR_VARIANCE_LIMIT, abs=1e-9)
    assert 2 * without_log(400_000) - without_log(200_000) == pytest.approx(limit, abs=1e-7)


def test_the_posterior_variance_of_the_study_at_a_million_steps() -> None:
    # Development study, 2026; without the first step and without the prior.
    for variance, expected in ((0.25, 0.2891045769), (4.0, 0.2891194463)):
        parts = ddpm.path_kl(Gaussian.scalar(1.0, variance), vp_linear(1_000_000), "posterior")
        assert parts.steps[1:].sum() == pytest.approx(expected, rel=1e-9)


def test_the_posterior_variance_costs_more_if_the_rate_starts_at_zero() -> None:
    """alpha_bar = cos^2 gives r = (t/(t-1))^2 near the data, and the limit gamma + pi^2/12."""
    levels = np.cos(0.5 * math.pi * 0.999 * np.arange(1, 200_001) / 200_000) ** 2
    parts = ddpm.path_kl(Gaussian.scalar(0.0, 0.25), NoiseSchedule.from_alpha_bar(levels), "posterior")
    assert parts.steps[1:].sum() == pytest.approx(np.euler_gamma + math.pi**2 / 12, abs=1e-4)


@given(seeds, betas, choices)
def test_cancellation_free_ratios_are_the_ratios(seed: int, values: list[float], variance: ddpm.Variance) -> None:
    """The step costs recomputed from the variances that the sampler uses."""
    data, schedule = random_data(seed), NoiseSchedule(values)
    spread = np.linalg.eigvalsh(data.cov)
    exact = ddpm.ancestral_steps(spread, schedule, "optimal")[1]
    chosen = ddpm.ancestral_steps(spread, schedule, variance)[1]
    start = 1 if variance == "posterior" else 0
    ratio = exact[start:] / chosen[start:]
    expected = 0.5 * np.sum(ratio - 1 - np.log(ratio), axis=1)
    np.testing.assert_allclose(ddpm.path_kl(data, schedule, variance).steps[start:], expected, rtol=1e-7, atol=1e-12)


def test_degenerate_data() -> None:
    """A point mass is reproduced exactly by deterministic DDIM and by the posterior variance, which is exact for it."""
    point, schedule = Gaussian([0.3, -1.0], np.zeros((2, 2))), NoiseSchedule([0.2, 0.5, 0.6])
    for law in (ddpm.ancestral_law(point, schedule, "posterior"), ddpm.ddim_law(point, schedule.alpha_bar)):
        np.testing.assert_allclose(law.mean, point.mean, atol=1e-15)
        np.testing.assert_allclose(law.cov, point.cov, atol=1e-15)
    np.testing.assert_allclose(ddpm.ddim_angle_law(point, schedule.alpha_bar).cov, point.cov, atol=0)
    np.testing.assert_allclose(ddpm.path_kl(point, schedule, "posterior").steps, 0, atol=1e-15)
    assert ddpm.path_kl(point, schedule, "beta").steps[0] == math.inf
    np.testing.assert_allclose(ddpm.ancestral_law(point, schedule, "beta").cov, 0.2 * np.eye(2), atol=1e-15)
    np.testing.assert_allclose(ddpm.minimal_score_matching_loss(point, [0.5]), [0.0], atol=0)


def test_data_on_an_oblique_line() -> None:
    """The eigenvalue that rounding leaves is recognised as zero: the variance beta smears the line."""
    schedule = NoiseSchedule([0.2, 0.5, 0.6])
    for slope in (2.0, 0.3, -1.7):
        line = Gaussian([0.0, 0.0], np.outer([1.0, slope], [1.0, slope]))
        parts = ddpm.path_kl(line, schedule, "beta")
        assert parts.steps[0] == math.inf
        assert np.isfinite(parts.steps[1:]).all()
        closed, recursion = ddpm.ddim_angle_law(line, schedule.alpha_bar), ddpm.ddim_law(line, schedule.alpha_bar)
        np.testing.assert_allclose(closed.cov, recursion.cov, atol=1e-12)
        assert kl(line, ddpm.ancestral_law(line, schedule, "beta")) == math.inf


@given(betas)
def test_beta_is_exact_for_unit_variance(values: list[float]) -> None:
    data, schedule = Gaussian.diagonal([1.5, -0.5], [1.0, 1.0]), NoiseSchedule(values)
    parts = ddpm.path_kl(data, schedule, "beta")
    np.testing.assert_allclose(parts.steps, 0, atol=1e-14)
    assert parts.prior == pytest.approx(0.5 * schedule.alpha_bar[-1] * 2.5, rel=1e-12)


@pytest.mark.parametrize("level", [0.01, 0.5, 0.97])
def test_minimal_loss_is_the_residual_of_the_regression(level: float) -> None:
    matrix, offset = noise_prediction(TILTED, level)
    # eps - prediction(x_t) as a linear map of (x_0 - m, eps).
    on_data, on_noise = -math.sqrt(level) * matrix, np.eye(2) - math.sqrt(1 - level) * matrix
    expected = np.trace(on_data @ TILTED.cov @ on_data.T) + np.trace(on_noise @ on_noise.T)
    np.testing.assert_allclose(math.sqrt(level) * matrix @ TILTED.mean + offset, 0, atol=1e-12)
    assert ddpm.minimal_score_matching_loss(TILTED, [level])[0] == pytest.approx(expected, rel=1e-12)


@given(betas)
def test_posterior_mean_is_the_conditional_mean(values: list[float]) -> None:
    """Condition (x_{t-1}, x_t) given x_0 on x_t, with the general Gaussian rule."""
    schedule = NoiseSchedule(values)
    of_x0, of_xt = ddpm.ddpm_posterior_mean_coefficients(schedule)
    x0, xt = 0.8, -1.7
    for t in range(1, schedule.steps):
        before, alpha = schedule.alpha_bar_previous[t], schedule.alpha[t]
        previous = Gaussian.scalar(math.sqrt(before) * x0, 1 - before)
        pair = affine(previous, [[1.0], [math.sqrt(alpha)]], [0.0, 0.0], np.diag([0.0, 1 - alpha]))
        law = condition(pair, [1], [xt])
        assert of_x0[t] * x0 + of_xt[t] * xt == pytest.approx(law.mean[0], abs=1e-9)
        assert schedule.posterior_variance[t] == pytest.approx(law.cov[0, 0], rel=1e-6, abs=1e-12)
    assert of_x0[0] == pytest.approx(1, rel=1e-10)
    assert of_xt[0] == 0


def test_the_printed_index_of_sft_pg_is_wrong() -> None:
    """Equation (2) with t = 1 weighs x_0 with beta_1 where beta_2 belongs."""
    schedule = NoiseSchedule([0.1, 0.3])
    of_x0, of_xt = ddpm.ddpm_posterior_mean_coefficients(schedule)
    printed = of_x0[1] * schedule.beta[0] / schedule.beta[1]
    # Development study, 2026.
    assert of_x0[1] == pytest.approx(0.7692026741, rel=1e-9)
    assert printed == pytest.approx(0.2564008914, rel=1e-9)
    # The noise-free point x_t = sqrt(alpha_bar_t) x_0 must be followed back to sqrt(alpha_bar_{t-1}) x_0.
    back = of_xt[1] * math.sqrt(schedule.alpha_bar[1])
    assert of_x0[1] + back == pytest.approx(math.sqrt(schedule.alpha_bar[0]), rel=1e-12)
    assert abs(printed + back - math.sqrt(schedule.alpha_bar[0])) > 0.5


POINT = Gaussian.scalar(0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddpm.ddim_law(DATA, [0.5, 0.6]), r"alpha_bar = \[0.5, 0.6\]: must not increase"),
        (lambda: ddpm.ddim_law(DATA, [0.5, 0.0, 0.0]), r"alpha_bar = .*: must not increase, and may be zero only at"),
        (lambda: ddpm.ddim_law(DATA, [1.0, 0.5]), r"alpha_bar = \[1.0, 0.5\]: must lie in \[0, 1\)"),
        (lambda: ddpm.ddim_law(DATA, [0.5], 1.5), r"eta = 1.5: must lie in \[0.0, 1.0\]"),
        (lambda: ddpm.ddim_angle_law(DATA, [0.5, 0.6]), r"alpha_bar = \[0.5, 0.6\]: must not increase"),
        (lambda: ddpm.ddim_steps([-1.0], [0.5]), r"variances = \[-1.0\]: must be non-negative"),
        (lambda: ddpm.path_kl(DATA, vp_linear(20), "exact"), r"variance = 'exact': must be 'beta', 'posterior' or"),
        (lambda: ddpm.ancestral_law(DATA, vp_linear(20), "exact"), r"variance = 'exact': must be"),
        (lambda: ddpm.elbo(POINT, vp_linear(20)), r"data.cov = \[\[0.0\]\]: must be positive definite"),
        (lambda: ddpm.optimal_ddim_schedule(0.0, 5), r"data_std = 0.0: must lie in \(0.0, inf\)"),
        (lambda: ddpm.optimal_ddim_w2_squared(1.0, 0), r"steps = 0: must be an integer >= 1"),
        (lambda: ddpm.minimal_score_matching_loss(DATA, [1.0]), r"alpha_bar = \[1.0\]: must lie in \[0, 1\)"),
        (lambda: ddpm.limit_constants([1.0], [0.0, 0.0]), r"data_variance, data_mean = .*: must be of one length"),
        (lambda: ddpm.limit_constants([0.0], [0.0]), r"data_variance, data_mean = .*: .* variances positive"),
        (lambda: ddpm.limit_constants([1.0], [0.0], 2.0, 1.0), r"beta_max = 1.0: must lie in \[2.0, inf\)"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
