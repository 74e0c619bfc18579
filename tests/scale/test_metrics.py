"""Metrics of samples, against closed forms, other algorithms and exact enumerations."""

import itertools
import math
import sys
import types

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from scale import metrics
from verdicts.streams import Stream

ROOT = Stream(4)


def gaussians(*names, shape):
    return ROOT.child(*names).generator().standard_normal(shape)


def with_moments(name: str, n: int, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """A cloud whose sample mean and unbiased covariance are exactly the given ones."""
    x = gaussians("cloud", name, shape=(n, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T).reshape(len(mean), -1))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook's formula with a general matrix square root of the unsymmetric product."""
    gap = np.sum((a.mean(0) - b.mean(0)) ** 2)
    x, y = np.cov(a.T), np.cov(b.T)
    return float(gap + np.trace(x + y - 2 * np.real(scipy.linalg.sqrtm(x @ y))))


def random_covariance(name: str, d: int) -> np.ndarray:
    a = gaussians("covariance", name, shape=(d, d))
    return a @ a.T + 0.1 * np.eye(d)


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    d = 4
    basis = np.linalg.qr(gaussians("basis", shape=(d, d)))[0]
    s, u = np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 2.0, 0.1, 4.0])
    m, k = np.arange(4.0), np.array([1.0, -1.0, 2.0, 0.0])
    a = with_moments("a", 50, m, basis @ np.diag(s**2) @ basis.T)
    b = with_moments("b", 70, k, basis @ np.diag(u**2) @ basis.T)
    exact = np.sum((m - k) ** 2) + np.sum((s - u) ** 2)
    assert metrics.frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)
    biased = (49 / 50) * s**2, (69 / 70) * u**2  # planted: covariances with 1/n
    wrong = np.sum((m - k) ** 2) + np.sum((np.sqrt(biased[0]) - np.sqrt(biased[1])) ** 2)
    assert abs(wrong - exact) > 1e-3


def test_frechet_distance_of_covariances_that_do_not_commute():
    for i, d in enumerate((2, 5, 20)):
        x, y = random_covariance(f"x{i}", d), random_covariance(f"y{i}", d)
        assert np.abs(x @ y - y @ x).max() > 0.1
        a, b = with_moments(f"a{i}", 60, np.zeros(d), x), with_moments(f"b{i}", 40, np.ones(d), y)
        distance = metrics.frechet_distance(a, b)
        assert distance == pytest.approx(by_matrix_root(a, b), rel=1e-8)
        roots = scipy.linalg.sqrtm(x), scipy.linalg.sqrtm(y)
        as_if_commuting = d + np.trace(x + y - 2 * np.real(roots[0] @ roots[1]))  # planted
        assert abs(as_if_commuting - distance) > 1e-4 * distance


def test_frechet_distance_is_symmetric_and_invariant_and_zero_for_equal_sets():
    a, b = gaussians("s", shape=(30, 6)) * 3, gaussians("t", shape=(45, 6)) + 1
    distance = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-12)
    turn = np.linalg.qr(gaussians("turn", shape=(6, 6)))[0]
    assert metrics.frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(distance, rel=1e-10)
    assert metrics.frechet_distance(a[::-1], a) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(a, a + 2) == pytest.approx(24, rel=1e-12)


def test_frechet_distance_keeps_its_digits_where_covariances_are_nearly_singular():
    """30 features that span 3 directions: the roots of a formed product are off by 1e-8 in each of the other 27."""
    d = 30
    a, b = gaussians("n", shape=(200, d)), gaussians("o", shape=(200, d))
    a[:, 3:] *= 1e-9
    b[:, 3:] *= 1e-9
    exact = metrics.frechet_distance(a[:, :3], b[:, :3])  # what is left out is 27 * 1e-18 in all
    turn = np.linalg.qr(gaussians("turn", shape=(d, d)))[0]
    a, b = a @ turn, b @ turn
    assert metrics.frechet_distance(a, b) == pytest.approx(exact, abs=1e-13)
    x, y = np.cov(a.T), np.cov(b.T)
    eigenvalues = np.linalg.eigvals(x @ y)  # planted: roots of the formed product
    formed = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(x + y) - 2 * np.sqrt(np.abs(eigenvalues)).sum()
    assert abs(formed - exact) > 1e-10


def test_duplicated_features_give_no_complex_numbers():
    a = np.repeat(gaussians("dup", shape=(40, 3)), 2, axis=1)
    b = np.repeat(gaussians("dup2", shape=(40, 3)), 2, axis=1)
    half = metrics.frechet_distance(a[:, ::2], b[:, ::2])
    assert metrics.frechet_distance(a, b) == pytest.approx(2 * half, rel=1e-10)
    assert metrics.frechet_distance(np.ones((5, 3)), np.zeros((6, 3))) == 3.0


def test_shrinkage_is_the_convex_combination_that_it_says():
    a, b = gaussians("few", shape=(5, 8)), 2 * gaussians("few2", shape=(6, 8))

    def shrunk(x, weight):
        c = np.cov(x.T)
        return (1 - weight) * c + weight * np.trace(c) / 8 * np.eye(8)

    x, y = shrunk(a, 0.3), shrunk(b, 0.3)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(x + y - 2 * np.real(scipy.linalg.sqrtm(x @ y)))
    assert metrics.frechet_distance(a, b, shrinkage=0.3) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "options", "rule"),
    [
        (np.ones((4, 4)), np.ones((9, 4)), {}, r"features_a has 4 samples, must have at least d \+ 1 = 5.*shrinkage"),
        (np.ones((9, 4)), np.ones((4, 4)), {}, "features_b has 4 samples"),
        (np.ones((1, 4)), np.ones((9, 4)), {"shrinkage": 0.1}, "features_a has 1 samples, must have at least 2"),
        (np.ones((9, 4)), np.ones((9, 3)), {}, "features_b has 3 columns, must have those of features_a, 4"),
        (np.full((9, 4), np.nan), np.ones((9, 4)), {}, "features_a must be finite, 9 of 9 rows"),
        (np.ones((9, 4)), np.r_[np.ones((8, 4)), [[1, np.inf, 1, 1]]], {}, "features_b must be finite.*first row 8"),
        (np.ones(9), np.ones((9, 4)), {}, r"features_a has shape \(9,\), must be \(n, d\)"),
        (np.ones((9, 0)), np.ones((9, 0)), {}, "d >= 1"),
        (np.ones((9, 4)), np.ones((9, 4)), {"shrinkage": 1.0}, r"shrinkage must lie in \[0, 1\)"),
    ],
)
def test_frechet_distance_refuses_bad_input(a, b, options, rule):
    with pytest.raises(ValueError, match=rule):
        metrics.frechet_distance(a, b, **options)


def test_the_floor_is_what_a_perfect_sampler_scores():
    """Fresh samples of the true law, as many as the floor assumes, score what the floor foretells."""
    d, n, m = 8, 100, 400
    scale = np.linspace(0.5, 2, d)
    reference = gaussians("reference", shape=(2000, d)) * scale
    floor = metrics.frechet_floor(reference, n, ROOT.child("floor"), repeats=40, against=m)
    scores = [
        metrics.frechet_distance(gaussians("p", i, shape=(n, d)) * scale, gaussians("q", i, shape=(m, d)) * scale)
        for i in range(200)
    ]
    assert np.mean(scores) == pytest.approx(floor.mean, rel=0.1)
    inside = np.mean([floor.low <= score <= floor.high for score in scores])
    assert 0.88 <= inside <= 1
    mean_interval = metrics.mean_interval(scores)  # planted: an interval for the mean is no interval for one score
    assert np.mean([mean_interval.low <= score <= mean_interval.high for score in scores]) < 0.5
    worse = metrics.frechet_distance(gaussians("w", shape=(n, d)) * scale * 1.4, gaussians("v", shape=(m, d)) * scale)
    assert worse > floor.high


def test_the_floor_falls_as_one_over_n():
    reference = gaussians("falling", shape=(4000, 5))
    floors = [metrics.frechet_floor(reference, n, ROOT, repeats=30, against=n).mean for n in (50, 200, 800)]
    assert floors[0] > floors[1] > floors[2] > 0
    for larger, smaller in itertools.pairwise(floors):
        assert larger / smaller == pytest.approx(4, rel=0.35)


def test_the_floor_draws_disjoint_rows_and_depends_on_its_stream_alone(monkeypatch):
    reference = np.arange(20.0)[:, None]
    drawn = []
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b, shrinkage: drawn.append((a[:, 0], b[:, 0])) or 1.0)
    metrics.frechet_floor(reference, 5, ROOT, repeats=3)
    metrics.frechet_floor(reference, 5, ROOT, repeats=2)
    for a, b in drawn:
        assert sorted([*a, *b]) == list(range(20))
        assert len(a) == 5
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    assert all(np.array_equal(x[0], y[0]) for x, y in zip(drawn[:2], drawn[3:], strict=True))


@pytest.mark.parametrize(
    ("n", "options", "rule"),
    [
        (3, {}, r"n has 3 samples, must have at least d \+ 1 = 4"),
        (18, {}, "against has 2 samples"),
        (10, {"against": 11}, r"n \+ against is 21, must be at most the rows of reference, 20"),
        (10, {"repeats": 1}, "repeats must be >= 2"),
    ],
)
def test_the_floor_refuses_bad_input(n, options, rule):
    with pytest.raises(ValueError, match=rule):
        metrics.frechet_floor(gaussians("r", shape=(20, 3)), n, ROOT, **options)


def test_diversity_and_its_jackknife_equal_their_definitions(monkeypatch):
    x = gaussians("diverse", shape=(23, 4))

    def mean_over_pairs(rows):
        return np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(rows, 2)])

    without = np.array([mean_over_pairs(np.delete(x, i, axis=0)) for i in range(23)])
    error = math.sqrt(22 / 23 * np.sum((without - without.mean()) ** 2))
    for block in (512, 5):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        found = metrics.diversity(x)
        assert found.value == pytest.approx(mean_over_pairs(x), rel=1e-12)
        assert found.error == pytest.approx(error, rel=1e-10)
    assert metrics.diversity(np.ones((4, 2))) == (0.0, 0.0)


def test_diversity_is_unbiased_and_its_error_is_the_spread_that_is_seen():
    """Two Gaussian points are 2/sqrt(pi) apart in the mean."""
    found = [metrics.diversity(gaussians("u", i, shape=(8, 1))) for i in range(4000)]
    values = np.array([f.value for f in found])
    exact, noise = 2 / math.sqrt(math.pi), values.std() / math.sqrt(4000)
    assert abs(values.mean() - exact) < 4 * noise
    assert abs(values.mean() * 7 / 8 - exact) > 10 * noise  # planted: pairs of a sample with itself
    seen = np.sqrt(np.mean([f.error**2 for f in found]))
    assert 0.95 < seen / values.std() < 1.25  # the jackknife's variance errs upwards (Efron and Stein, 1981)


def test_student_s_interval_covers_at_its_confidence():
    trials = 4000
    for confidence in (0.8, 0.95):
        intervals = [metrics.mean_interval(gaussians("i", i, shape=4), confidence) for i in range(trials)]
        covered = np.mean([low <= 0 <= high for _, low, high in intervals])
        assert abs(covered - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / trials)
    assert metrics.mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_per_prompt_is_a_table_by_rising_index():
    values, index = gaussians("values", shape=60), ROOT.child("index").generator().integers(0, 5, 60) * 3
    table = metrics.per_prompt(values, index)
    assert [row.prompt for row in table] == sorted(set(index.tolist()))
    assert sum(row.samples for row in table) == 60
    assert sum(row.samples * row.mean for row in table) == pytest.approx(values.sum())
    mean, low, high = metrics.mean_interval(values[index == 3], 0.6826894921370859)
    row = table[1]
    assert row.mean == mean
    factor = (high - mean) / row.error
    assert factor == pytest.approx(scipy.stats.t.ppf(0.8413447460685429, row.samples - 1))
    shuffle = ROOT.child("shuffle").generator().permutation(60)
    for a, b in zip(metrics.per_prompt(values[shuffle], index[shuffle]), table, strict=True):
        assert a == pytest.approx(b)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: metrics.diversity(np.ones((2, 3))), "features has 2 rows, must have at least 3"),
        (lambda: metrics.diversity([[1.0], [np.nan], [0.0]]), "features must be finite.*first row 1"),
        (lambda: metrics.mean_interval([1.0]), "values has 1 entries, must have at least 2"),
        (lambda: metrics.mean_interval([1.0, np.nan]), "values must be finite, 1 of 2 are not"),
        (lambda: metrics.mean_interval([1.0, 2.0], 1.0), r"confidence is 1.0, must lie in \(0, 1\)"),
        (lambda: metrics.mean_interval([]), "must be"),
        (lambda: metrics.per_prompt([1.0, 2.0], [0]), r"prompt_index has shape \(1,\)"),
        (lambda: metrics.per_prompt([1.0], [0.5]), "prompt_index must hold integers >= 0"),
        (lambda: metrics.per_prompt([1.0], [-1]), "prompt_index must hold integers >= 0"),
    ],
)
def test_bad_input_is_refused(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()


def test_extractors_are_found_by_name(monkeypatch):
    assert metrics.named("scale.metrics:pixels") is metrics.pixels
    module = types.ModuleType("my_features")
    module.size = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_features", module)
    for name, rule in {
        "scale.metrics": "must have the form module:function",
        ":pixels": "must have the form",
        "scale.nothing:pixels": "its module must be importable",
        "scale.metrics:nothing": "scale.metrics must hold nothing",
        "my_features:size": "must be callable, got int",
    }.items():
        with pytest.raises(ValueError, match=rule):
            metrics.named(name)


def test_features_are_extracted_in_batches_to_the_same_result():
    images = torch.rand(7, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = metrics.extract(metrics.pixels, images, batch=7)
    assert whole.dtype == np.float64
    assert whole.shape == (7, 12)
    assert np.array_equal(metrics.extract(metrics.pixels, images, batch=2), whole)
    as_numpy = metrics.extract(lambda x: x.flatten(1).detach().numpy(), images, batch=3)
    assert np.array_equal(as_numpy, whole)


@pytest.mark.parametrize(
    ("extractor", "images", "rule"),
    [
        (metrics.pixels, torch.rand(3, 2, 2), "images must have shape"),
        (metrics.pixels, 2 * torch.ones(3, 1, 2, 2), r"images must lie in \[0, 1\], got \[2.0, 2.0\]"),
        (metrics.pixels, torch.full((3, 1, 2, 2), math.nan), r"images must lie in \[0, 1\]"),
        (lambda x: x, torch.rand(3, 1, 2, 2), r"extractor gave shape \(3, 1, 2, 2\), must give \(3, d\)"),
        (lambda x: x.flatten(1)[:1], torch.rand(3, 1, 2, 2), r"extractor gave shape \(1, 4\)"),
        (lambda x: x.flatten(1) / 0, torch.zeros(3, 1, 2, 2), "features must be finite"),
    ],
)
def test_bad_images_and_bad_extractors_are_refused(extractor, images, rule):
    with pytest.raises(ValueError, match=rule):
        metrics.extract(extractor, images)
