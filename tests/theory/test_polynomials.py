"""Polynomial algebra against quadrature, against its own definition, and on the smoothing bias of x^4."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from theory.polynomials import (
    Polynomial,
    Variables,
    derivative,
    evaluate,
    even_part,
    expectation,
    inner_product,
    moments,
)

MIXED = Variables(("gaussian", "rademacher", "gaussian"))


@st.composite
def polynomials(draw, variables=MIXED):
    """Random polynomials of degree at most 4 in each variable, with small rational coefficients."""
    symbols = variables.all()
    total = variables.constant(draw(st.integers(-3, 3)))
    for _ in range(draw(st.integers(1, 5))):
        term = variables.constant(Fraction(draw(st.integers(-9, 9)), draw(st.integers(1, 5))))
        for symbol in symbols:
            for _ in range(draw(st.integers(0, 4))):
                term = term * symbol
        total = total + term
    return total


def quadrature(function):
    """Mean of a function of (normal, sign, normal) by Gauss-Hermite nodes and enumeration."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(12)
    weights = weights / weights.sum()
    return sum(
        weights[i] * weights[j] * 0.5 * function([nodes[i], sign, nodes[j]])
        for i, j, sign in itertools.product(range(12), range(12), (-1.0, 1.0))
    )


@given(polynomials(), polynomials())
def test_moments_agree_with_quadrature(p, q):
    assert float(expectation(p)) == pytest.approx(quadrature(lambda u: evaluate(p, u)), rel=1e-9, abs=1e-9)
    product = quadrature(lambda u: evaluate(p, u) * evaluate(q, u))
    scale = float(inner_product(p, p) + inner_product(q, q))  # cancellation in the quadrature is relative to this
    assert float(inner_product(p, q)) == pytest.approx(product, abs=1e-11 * scale)


@given(polynomials(), polynomials())
def test_inner_product_is_the_mean_of_the_product_exactly(p, q):
    assert inner_product(p, q) == expectation(p * q)
    mean, cov = moments([p, q])
    assert mean == [expectation(p), expectation(q)]
    assert cov[0][1] == cov[1][0] == expectation(p * q) - mean[0] * mean[1]


@given(polynomials(), polynomials(), st.tuples(st.integers(-3, 3), st.sampled_from([-1, 1]), st.integers(-3, 3)))
def test_the_algebra_is_that_of_functions(p, q, point):
    x, y = evaluate(p, point), evaluate(q, point)
    assert evaluate(p * q, point) == x * y
    assert evaluate(p + q, point) == x + y
    assert evaluate(2 - p, point) == 2 - x
    mirrored = [-point[0], -point[1], point[2]]
    assert evaluate(even_part(p, [0, 1]), point) == Fraction(x + evaluate(p, mirrored)) / 2


@given(polynomials())
def test_stein_identity(p):
    """E[z p] = E[dp/dz] for a normal variable."""
    assert expectation(MIXED.variable(2) * p) == expectation(derivative(p, 2))


@pytest.mark.parametrize(("law", "factor"), [("gaussian", 12), ("rademacher", 4)])
def test_smoothing_bias_of_the_fourth_power(law, factor):
    """One step x = theta + std eps + mu xi with reward x^4: the zeroth-order mean is off by factor * theta mu^2."""
    theta, std, mu = Fraction(2, 5), Fraction(1, 2), Fraction(1, 4)
    eps, xi = Variables(("gaussian", law)).all()
    x = theta + std * eps + mu * xi
    zeroth_order = expectation(x * x * x * x * xi) / mu
    truth = 4 * theta**3 + 12 * theta * std**2
    assert zeroth_order - truth == factor * theta * mu**2


def test_coefficients_that_cancel_leave_no_terms():
    z = Variables(("gaussian",)).variable(0)
    assert (z * z - z * z).terms == {}
    assert ((z + 1) * (z - 1)).exponents() == {(2,): 1, (0,): -1}


def test_a_sign_squares_to_one():
    xi = Variables(("rademacher",)).variable(0)
    assert (xi * xi * xi).exponents() == {(1,): 1}


def high_power(z: Polynomial) -> Polynomial:
    for _ in range(8):
        z = z * z
    return z


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: Variables(("uniform",)), r"laws contains 'uniform'"),
        (lambda: Variables(("gaussian",), limit=0), r"limit is 0; it must be at least 1"),
        (lambda: MIXED.variable(3), r"index is 3; it must be in 0..2"),
        (lambda: derivative(MIXED.variable(0), 1), r"index is 1; it must name a gaussian variable"),
        (lambda: MIXED.variable(0) + Variables(("gaussian",)).variable(0), r"different variables"),
        (lambda: evaluate(MIXED.variable(0), [1]), r"point has 1 numbers; it must have 3"),
        (lambda: high_power(MIXED.variable(0)), r"degree 256; it must be at most 255"),
    ],
)
def test_bad_input_is_named(action, message):
    with pytest.raises(ValueError, match=message):
        action()


def test_the_monomial_limit_is_enforced():
    a, b, c, d = Variables(("gaussian",) * 4, limit=9).all()
    assert len(((a + b + c) * (a + b + c)).terms) == 6
    with pytest.raises(ValueError, match=r"a polynomial has 1\d monomials or more; the limit of its variables is 9"):
        _ = (a + b + c + d) * (a + b + c + d)
