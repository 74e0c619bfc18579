"""Permutation tests: statistics against their definitions, p-values against their exact law under the null."""

from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from verdicts.streams import Stream
from verdicts.two_sample import two_sample

STATISTICS = ("energy", "sliced_wasserstein")


def distance(a, b):
    return np.mean([np.linalg.norm(p - q) for p, q in product(a, b)])


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000))
def test_energy_distance_is_its_definition(n, m, seed):
    generator = Stream(seed).generator()
    x, y = generator.normal(size=(n, 3)), generator.normal(size=(m, 3)) + [1, 0, -2]
    expected = 2 * distance(x, y) - distance(x, x) - distance(y, y)
    assert two_sample(x, y, Stream(0), 1, "energy").statistic == pytest.approx(expected)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000))
def test_sliced_wasserstein_on_the_line_is_the_distance_of_the_quantile_functions(n, m, seed):
    """Every direction of the line is +-1; n m copies of the points make clouds of equal size, which sorting couples."""
    generator = Stream(seed).generator()
    x, y = generator.normal(size=n), 2 * generator.normal(size=m) + 1
    expected = np.mean((np.repeat(np.sort(x), m) - np.repeat(np.sort(y), n)) ** 2)
    measured = two_sample(x[:, None], y[:, None], Stream(0), 1, "sliced_wasserstein").statistic
    assert measured == pytest.approx(expected)


def test_sliced_wasserstein_of_a_shift():
    """Along direction u a shift by v costs (u v)^2, which averages to |v|^2 / d over directions, here 25 / 2."""
    x = Stream(3).generator().normal(size=(50, 2))
    statistics = [two_sample(x, x + [3, -4], Stream(s), 1, "sliced_wasserstein").statistic for s in range(200)]
    # 6400 directions with values in [0, 25]: Hoeffding allows 0.86 with probability 1e-6.
    assert np.mean(statistics) == pytest.approx(12.5, abs=0.86)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_p_values_are_uniform_under_the_null(statistic):
    """With 19 permutations of continuous data the p-value is uniform on {1/20, ..., 1}."""
    trials, root = 600, Stream(17, (statistic,))
    p_values = []
    for trial in range(trials):
        x = root.child("data", trial).generator().standard_t(3, size=(22, 2))
        p_values.append(two_sample(x[:9], x[9:], root.child("test", trial), 19, statistic).p_value)
    for level in (0.05, 0.2, 0.5):
        count = int(np.sum(np.array(p_values) <= level + 1e-9))
        assert binom.ppf(1.5e-7, trials, level) <= count <= binom.isf(1.5e-7, trials, level)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_differences_are_seen(statistic):
    generator = Stream(5).generator()
    x, y = generator.normal(size=(80, 2)), generator.normal(size=(60, 2))
    test = partial(two_sample, x, stream=Stream(9), permutations=199, statistic=statistic)
    assert test(y + [1.5, 0]).p_value == 1 / 200
    assert test(4 * y).p_value == 1 / 200


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_result_is_a_function_of_data_and_stream(statistic):
    x = Stream(5).generator().normal(size=(30, 2))
    results = [two_sample(x[:11], x[11:], Stream(s), 99, statistic) for s in (1, 1, 2)]
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_equal_points_show_nothing(statistic):
    """All labellings tie; ties count against significance even where rounding splits them."""
    same = np.full((7, 2), 0.1)
    assert two_sample(same, same[:5], Stream(1), 99, statistic).p_value == 1
    points = Stream(2).generator().normal(size=(3, 2))
    repeated = np.repeat(points, 8, axis=0)
    assert two_sample(repeated, repeated[::-1], Stream(1), 99, statistic).p_value == 1


@pytest.mark.parametrize(
    ("x", "y", "permutations", "statistic", "text"),
    [
        (np.ones(3), np.ones((3, 1)), 9, "energy", "x has shape"),
        (np.ones((3, 1)), np.ones((1, 1)), 9, "energy", "y has shape"),
        (np.ones((3, 1)), np.ones((3, 2)), 9, "energy", "y has 2 columns"),
        (np.full((3, 1), np.nan), np.ones((3, 1)), 9, "energy", "x holds"),
        (np.ones((3, 1)), np.ones((3, 1)), 0, "energy", "permutations is"),
        (np.ones((3, 1)), np.ones((3, 1)), 9, "median", "statistic is"),
    ],
)
def test_bad_input_is_named(x, y, permutations, statistic, text):
    with pytest.raises(ValueError, match=text):
        two_sample(x, y, Stream(1), permutations, statistic)
