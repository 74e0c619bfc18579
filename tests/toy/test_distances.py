"""Distances: closed forms, brute force, the solver's failures reported, floors that hold what they promise."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from theory.gaussian import Gaussian, w2_squared
from toy import distances
from toy.data import DATA
from toy.distances import Distance, Floor, NotConverged, floor, measure, sliced_wasserstein2, wasserstein2
from verdicts.proportions import clopper_pearson
from verdicts.streams import Stream

STREAM = Stream(6).child("tests", "distances")


def generator(*names: str | int) -> np.random.Generator:
    return STREAM.child(*names).generator()


def cloud(n: int, d: int, *names: str | int) -> np.ndarray:
    return generator(n, d, *names).normal(size=(n, d))


def normal(n: int, source: np.random.Generator) -> np.ndarray:
    return source.normal(size=(n, 2))


def pot() -> Any:
    return distances._pot()


# Exact Wasserstein-2


@pytest.mark.parametrize(("n", "d"), [(2, 1), (50, 2), (300, 3)])
def test_shifted_cloud_is_as_far_as_the_shift(n: int, d: int) -> None:
    points = cloud(n, d, "shift")
    shift = np.arange(1.0, d + 1)
    shuffled = generator("order").permutation(points) + shift
    assert wasserstein2(points, shuffled) == pytest.approx(np.linalg.norm(shift), rel=1e-12)
    assert sliced_wasserstein2(points, points + shift, generator("p")) < np.linalg.norm(shift) * (1 + 1e-12)


@pytest.mark.parametrize("n", [2, 1000])
def test_permuted_cloud_is_at_distance_zero(n: int) -> None:
    points = cloud(n, 2, "zero")
    shuffled = generator("order").permutation(points)
    assert wasserstein2(points, shuffled) < 1e-12
    assert sliced_wasserstein2(points, shuffled, generator("p")) < 1e-12


def test_one_point_repeated_is_at_distance_zero_from_itself() -> None:
    assert wasserstein2(np.full((3, 2), 7.0), np.full((5, 2), 7.0)) == 0


def test_equals_the_best_of_all_assignments() -> None:
    a, b = cloud(6, 3, "brute a"), cloud(6, 3, "brute b")
    costs = [((a - b[list(order)]) ** 2).sum(1).mean() for order in itertools.permutations(range(6))]
    assert wasserstein2(a, b) == pytest.approx(math.sqrt(min(costs)), rel=1e-12)
    assert wasserstein2(a, b) != pytest.approx(min(costs), rel=0.01)  # the forgotten root
    euclidean = linear_sum_assignment(cdist(a, b))
    assert wasserstein2(a, b) != pytest.approx(cdist(a, b)[euclidean].mean(), rel=0.01)  # W1


def test_unequal_sizes_are_clouds_of_repeated_points() -> None:
    a, b = cloud(40, 2, "unequal a"), cloud(60, 2, "unequal b")
    thrice, twice = np.repeat(a, 3, axis=0), np.repeat(b, 2, axis=0)
    assert wasserstein2(a, b) == pytest.approx(wasserstein2(thrice, twice), rel=1e-9)
    apart, together = (sliced_wasserstein2(x, y, generator("p")) for x, y in [(a, b), (thrice, twice)])
    assert apart == pytest.approx(together, rel=1e-12)
    assert wasserstein2(a, b) == pytest.approx(wasserstein2(b, a), rel=1e-9)
    assert wasserstein2(a, b) != pytest.approx(wasserstein2(a, b[:40]), rel=0.01)  # the rest cut off


def test_large_gaussian_samples_on_the_line_have_the_distance_of_their_laws() -> None:
    law, other = Gaussian.scalar(0.5, 0.25), Gaussian.scalar(-0.5, 1.0)
    a = 0.5 + 0.5 * cloud(700, 1, "line a")
    b = -0.5 + cloud(700, 1, "line b")
    truth = math.sqrt(w2_squared(law, other))
    assert wasserstein2(a, b) == pytest.approx(truth, rel=0.06)
    on_the_line = sliced_wasserstein2(a, b, generator("p"), projections=1)  # both directions give the same
    assert on_the_line == pytest.approx(wasserstein2(a, b), rel=1e-9)
    assert wasserstein_distance(a[:, 0], b[:, 0]) < on_the_line  # W1 <= W2, of another library


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1e-6, 1e6, 1e150])
def test_scale_and_origin_do_not_matter(scale: float) -> None:
    a, b = cloud(200, 2, "scale a"), cloud(200, 2, "scale b")
    assert wasserstein2(scale * a, scale * b) == pytest.approx(scale * wasserstein2(a, b), rel=1e-9, abs=0)
    assert wasserstein2(a + 1e6, b + 1e6) == pytest.approx(wasserstein2(a, b), rel=1e-6)


def test_pot_itself_calls_a_wrong_plan_optimal_when_distances_are_small() -> None:
    a, b = cloud(200, 2, "scale a"), cloud(200, 2, "scale b")
    cost, log = pot().emd2_lazy(1e-8 * a, 1e-8 * b, log=True)
    assert (log["result_code"], log["warning"]) == (distances.OPTIMAL, None)
    assert math.sqrt(cost) > 2e-8 * wasserstein2(a, b)


# The solver's failures


@pytest.mark.parametrize("iterations", [1, 10, 100])
def test_too_few_iterations_are_reported(iterations: int) -> None:
    with pytest.raises(NotConverged, match=f"result_code 3 .*numItermax = {iterations}$"):
        wasserstein2(cloud(200, 2, "a"), cloud(200, 2, "b"), iterations)


def test_wrong_answer_declared_optimal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pot().emd2_lazy

    def early(*arguments: object, **options: Any) -> object:
        cost, log = real(*arguments, **(options | {"numItermax": 300}))
        return cost, log | {"result_code": distances.OPTIMAL, "warning": None}

    a, b = cloud(200, 2, "a"), cloud(200, 2, "b")
    monkeypatch.setattr(pot(), "emd2_lazy", early)
    with pytest.raises(NotConverged, match="proved only to within"):
        wasserstein2(a, b)


def test_dual_bound_is_below_the_optimum_for_any_potentials() -> None:
    a, b = cloud(30, 2, "a"), cloud(20, 2, "b")
    for trial in range(20):
        u, v = (generator("potential", trial, size).normal(size=size) for size in (30, 20))
        assert distances._dual_bound(a, b, u, v) <= wasserstein2(a, b) ** 2


def test_pot_is_imported_late_and_without_its_other_back_ends() -> None:
    script = (
        "import sys, toy.distances as d; assert 'ot' not in sys.modules; "
        "d.wasserstein2([[0.0], [1.0]], [[1.0], [2.0]]); assert 'ot' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)


# Sliced Wasserstein-2


@pytest.mark.parametrize(("n", "m"), [(80, 80), (80, 50), (50, 80)])
def test_sliced_distance_is_that_of_pot_on_the_same_directions(n: int, m: int) -> None:
    a, b = cloud(n, 3, "sliced a"), cloud(m, 3, "sliced b") + 0.3
    directions = generator("p").normal(size=(3, 25))
    directions /= np.linalg.norm(directions, axis=0)
    theirs = pot().sliced_wasserstein_distance(a, b, projections=directions, p=2)
    ours = sliced_wasserstein2(a, b, generator("p"), projections=25)
    assert ours == pytest.approx(float(theirs), rel=1e-12)
    assert ours**2 != pytest.approx(float(theirs), rel=0.05)  # the forgotten root


@pytest.mark.parametrize(("n", "m"), [(10_000, 10_000), (10_000, 9000)])
@pytest.mark.parametrize(("origin", "scale"), [(0, 1), (1e3, 1), (0, 1e-100), (0, 1e100)])
def test_close_clouds_anywhere_and_of_any_size_have_the_sliced_distance_of_pot(
    n: int, m: int, origin: float, scale: float
) -> None:
    # Two samples of one law: their distance is a hundredth of their extent, where rounding would show most.
    a, b = cloud(n, 2, "near a"), cloud(m, 2, "near b")
    directions = generator("p").normal(size=(2, 20))
    directions /= np.linalg.norm(directions, axis=0)
    theirs = float(pot().sliced_wasserstein_distance(a, b, projections=directions, p=2))
    ours = sliced_wasserstein2(scale * (a + origin), scale * (b + origin), generator("p"), projections=20)
    assert ours == pytest.approx(scale * theirs, rel=1e-9, abs=0)


def test_square_of_the_sliced_distance_averages_to_that_of_the_sphere() -> None:
    # Shifted clouds: the square is the mean of (direction . shift)^2, which is |shift|^2 / d.
    points, shift = cloud(10, 3, "sphere"), np.array([1.0, 2.0, 2.0])
    square = sliced_wasserstein2(points, points + shift, generator("p"), projections=40_000) ** 2
    assert square == pytest.approx(9 / 3, abs=5 * 9 * math.sqrt(4 / 45 / 40_000))
    few = [sliced_wasserstein2(points, points + shift, generator("few", i), 2) ** 2 for i in range(2000)]
    assert np.mean(few) == pytest.approx(3, abs=5 * float(np.std(few)) / math.sqrt(2000))
    assert np.mean(np.sqrt(few)) < 1.7  # the root itself is biased downwards: sqrt(3) = 1.732


# Floors


DATASETS = [normal, DATA["swiss_roll"]]


@pytest.mark.parametrize("sampler", DATASETS)
def test_interval_holds_a_fresh_distance_as_often_as_it_says(sampler: distances.Sampler) -> None:
    trials, held = 250, 0
    for trial in range(trials):
        found = floor(sampler, 30, 9, STREAM.child("coverage", trial), "sliced_w2")
        assert found.level == pytest.approx(0.8)
        fresh = floor(sampler, 30, 3, STREAM.child("fresh", trial), "sliced_w2", level=0.5).values[0]
        held += found.low <= fresh <= found.high
    low, high = clopper_pearson(held, trials, confidence=0.999)
    assert low <= 0.8 <= high
    assert held < 0.95 * trials  # neither is it an interval that holds everything


def test_floor_of_the_exact_distance_covers_fresh_draws_and_falls_with_n() -> None:
    small = floor(normal, 50, 19, STREAM.child("w2"), level=0.9)
    large = floor(normal, 400, 19, STREAM.child("w2"), level=0.9)
    assert (small.level, small.low, small.high) == (pytest.approx(0.9), min(small.values), max(small.values))
    assert 0 < large.high < small.low
    fresh = wasserstein2(cloud(400, 2, "fresh a"), cloud(400, 2, "fresh b"))
    assert large.low <= fresh <= large.high
    assert large.mean == pytest.approx(np.mean(large.values))


def test_level_chooses_the_order_statistic() -> None:
    all_of_it, half = (floor(normal, 20, 19, STREAM.child("k"), "sliced_w2", level) for level in (0.9, 0.5))
    ordered = sorted(all_of_it.values)
    assert half.values == all_of_it.values
    assert (half.low, half.high, half.level) == (ordered[4], ordered[14], 0.5)


def test_pool_is_split_into_points_that_no_two_clouds_share() -> None:
    pool = np.arange(40.0).reshape(20, 2)
    seen: list[np.ndarray] = []

    def spy(a: np.ndarray, b: np.ndarray, source: np.random.Generator) -> float:
        seen.append(np.concatenate([a, b]))
        return 0.0

    floor(pool, 10, 3, STREAM, spy, level=0.5)
    assert all(sorted(map(tuple, points)) == sorted(map(tuple, pool)) for points in seen)
    assert not np.array_equal(seen[0], seen[1])


def test_pool_and_sampler_of_one_law_have_like_floors() -> None:
    pool = normal(4000, generator("pool"))
    from_pool = floor(pool, 50, 39, STREAM.child("from pool"), "sliced_w2")
    from_law = floor(normal, 50, 39, STREAM.child("from law"), "sliced_w2")
    assert from_pool.mean == pytest.approx(from_law.mean, rel=0.2)


def test_numbers_depend_on_the_stream_alone() -> None:
    state = str(np.random.get_state(legacy=False))  # noqa: NPY002
    first = floor(normal, 20, 9, STREAM.child("same"), "sliced_w2")
    assert first == floor(normal, 20, 9, STREAM.child("same"), "sliced_w2")
    assert first != floor(normal, 20, 9, STREAM.child("other"), "sliced_w2")
    longer = floor(normal, 20, 19, STREAM.child("same"), "sliced_w2")
    assert longer.values[:9] == first.values  # a repetition does not depend on how many there are
    assert len(set(longer.values)) == 19
    assert state == str(np.random.get_state(legacy=False))  # noqa: NPY002

    def unseeded(n: int, source: np.random.Generator) -> np.ndarray:
        return np.random.default_rng().normal(size=(n, 2))

    assert floor(unseeded, 20, 9, STREAM, "sliced_w2") != floor(unseeded, 20, 9, STREAM, "sliced_w2")


# Distances beside their floors


@pytest.mark.parametrize("distance", ["w2", "sliced_w2"])
def test_wrong_law_is_above_the_floor_and_the_right_one_within(distance: distances.Name) -> None:
    sampler = DATA["two_moons"]
    found = floor(sampler, 200, 19, STREAM.child("moons"), distance, level=0.9)
    right = measure(sampler(200, generator("right")), sampler, found, STREAM.child("right"))
    wrong = measure(sampler(200, generator("wrong")) + 0.5, sampler, found, STREAM.child("wrong"))
    assert right.at_floor
    assert found.low <= right.value <= found.high < wrong.value
    assert right.p_value > 0.05
    assert not wrong.at_floor
    assert wrong.p_value == 1 / 200
    assert (wrong.n, wrong.floor_low, wrong.floor_high, wrong.level) == (200, found.low, found.high, found.level)


def test_both_distances_look_at_the_same_points() -> None:
    samples = cloud(50, 2, "samples")
    found = {name: Floor(of, 50, 0.0, 1.0, 0.8, ()) for name, of in distances.DISTANCES.items()}
    exact, sliced = (measure(samples, normal, found[name], STREAM.child("pair")) for name in ("w2", "sliced_w2"))
    assert exact.p_value == sliced.p_value
    assert exact.value > sliced.value
    reference = normal(50, STREAM.child("pair", "reference", "points", 0).generator())
    assert exact.value == wasserstein2(samples, reference)
    assert isinstance(exact, Distance)


# Bad input


GOOD = np.zeros((4, 2))
BAD = [
    (np.zeros(4), r"a has shape \(4,\), must be \(n, d\)"),
    (np.zeros((4, 2, 1)), "a has shape"),
    (np.zeros((1, 2)), "n >= 2"),
    (np.zeros((4, 0)), "d >= 1"),
    (np.full((4, 2), np.nan), "a holds a point that is not finite"),
    (np.full((4, 2), np.inf), "a holds a point that is not finite"),
    (np.zeros((4, 3)), "b has 2 columns, must have 3 as a does"),
]


@pytest.mark.parametrize(("points", "message"), BAD)
def test_bad_clouds_are_refused(points: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wasserstein2(points, GOOD)
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein2(points, GOOD, generator("p"))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: wasserstein2(GOOD, GOOD, 0), "max_iterations is 0"),
    (lambda: sliced_wasserstein2(GOOD, GOOD, generator("p"), 0), "projections is 0"),
    (lambda: floor(normal, 1, 9, STREAM), "n is 1, must be at least 2"),
    (lambda: floor(normal, 20, 8, STREAM), "repetitions is 8, must be at least 9 for level 0.8"),
    (lambda: floor(normal, 20, 38, STREAM, level=0.95), "must be at least 39 for level 0.95"),
    (lambda: floor(normal, 20, 9, STREAM, level=1.0), r"level is 1.0, must lie in \(0, 1\)"),
    (lambda: floor(normal, 20, 9, STREAM, "W2"), "distance is 'W2', must be a function or one of"),  # type: ignore[arg-type]
    (lambda: floor(GOOD, 3, 9, STREAM), "source has 4 points, must have at least 6 for samples of n = 3"),
    (lambda: floor(lambda n, g: GOOD, 20, 9, STREAM), "source gave 4 points, must give the n = 20"),
    (lambda: floor(lambda n, g: GOOD * np.nan, 4, 9, STREAM), "source holds a point that is not finite"),
    (lambda: measure(GOOD, normal, Floor("w2", 5, 0, 1, 0.8, ()), STREAM), "samples has 4 points, .* n = 5"),
    (lambda: measure(cloud(5, 3), normal, Floor("w2", 5, 0, 1, 0.8, ()), STREAM), "b has 2 columns"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
