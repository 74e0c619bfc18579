"""Verdicts on exact numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from verdicts.exact import agreement, ordering

values = arrays(float, 3, elements=st.floats(-10, 10))


@given(values, values, arrays(float, 3, elements=st.floats(0, 5)))
def test_verdicts_follow_the_definition(estimate, reference, tolerance):
    agrees, ordered = agreement(estimate, reference, tolerance), ordering(estimate, reference, tolerance)
    triples = list(zip(estimate, reference, tolerance, strict=True))
    assert (agrees.verdict == "verified") == all(abs(e - r) <= t for e, r, t in triples)
    assert (ordered.verdict == "verified") == all(e - r >= -t for e, r, t in triples)
    for result in (agrees, ordered):
        assert result.samples == 0
        assert np.array_equal(result.lower, estimate - reference)
        assert np.array_equal(result.upper, estimate - reference)


def test_the_worst_coordinate_decides():
    assert agreement([0.0, 3.0, -5.0], 0.0, [1.0, 1.0, 4.0]).coordinate == 1
    assert ordering([0.0, 3.0, -5.0], 0.0, 1.0).coordinate == 2
    assert agreement([0.0, math.nan, 100.0], 0.0, 1.0).coordinate == 1


@pytest.mark.parametrize(("estimate", "reference"), [(math.nan, 0), (0, math.nan), (math.inf, math.inf), (math.inf, 0)])
def test_what_is_not_a_number_refutes(estimate, reference):
    assert agreement([estimate], [reference], 1e300).verdict == "refuted"


def test_nan_is_not_ordered():
    assert ordering([math.nan, 1.0], 0.0, 0.0).verdict == "refuted"


def test_matrices_are_flattened():
    result = agreement(np.eye(2), np.eye(2) + [[0, 0], [1e-3, 0]], 1e-2)
    assert result.verdict == "verified"
    assert result.lower.shape == (4,)
    assert result.coordinate == 2


@pytest.mark.parametrize(
    ("estimate", "reference", "tolerance", "text"),
    [
        ([], 0.0, 0.1, "estimate has shape"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], 0.1, "reference has shape"),
        ([1.0, 2.0], [[1.0, 2.0]], 0.1, "reference has shape"),
        ([1.0], 1.0, -0.1, "tolerance is"),
        ([1.0], 1.0, math.nan, "tolerance is"),
        ([1.0, 2.0], 1.0, [0.1] * 3, "tolerance has shape"),
    ],
)
def test_bad_comparisons_are_named(estimate, reference, tolerance, text):
    with pytest.raises(ValueError, match=text):
        agreement(estimate, reference, tolerance)
