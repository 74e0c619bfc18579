"""Schedule families: against theory's in both forms, autograd against its jacobian, ranges and their projection."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.schedules import LEAST_COSINE_TAU, PARAMETERS, Family, ddim_times
from theory import schedules as theory

SHAPES, FORMS, T = ("cosine", "sigmoid"), ("chen", "released"), 40
OF_THEORY = {
    "cosine": (theory.cosine_family, theory.cosine_family_jacobian),
    "sigmoid": (theory.sigmoid_family, theory.sigmoid_family_jacobian),
}
POINTS = {
    "cosine": [
        (0.0, 1.0, 1.0, 0.008), (0.2, 0.9, 2.0, 0.02), (0.0, 1.0, 0.7, 0.0), (0.3, 0.31, 20.0, 0.5),
        (0.0, 1.0, 3.0, 0.0),
    ],
    "sigmoid": [(-3.0, 3.0, 1.0, 0.0), (0.0, 3.0, 0.3, -1.0), (-1.0, 6.0, 0.1, 2.0), (0.2, 0.9, 5.0, 0.1)],
}  # fmt: skip
CASES = [(shape, form, point) for shape in SHAPES for form in FORMS for point in POINTS[shape]]


def parameters(point, names=PARAMETERS, dtype=torch.float64):
    full = dict(zip(PARAMETERS, point, strict=True))
    return {n: torch.tensor(full[n], dtype=dtype) for n in names}


@pytest.mark.parametrize(("shape", "form", "point"), CASES)
def test_levels_are_those_of_theory(shape, form, point):
    found = Family(shape, T, form)(parameters(point)).numpy()
    np.testing.assert_allclose(found, OF_THEORY[shape][0](T, *point, form=form), rtol=1e-9, atol=1e-13)
    assert found[0] == 1
    assert np.all(np.diff(found) <= 0)
    if form == "chen":
        assert found[-1] == 0


@pytest.mark.parametrize(("shape", "form", "point"), CASES)
def test_autograd_gives_the_jacobian_of_theory(shape, form, point):
    family = Family(shape, T, form)
    values = tuple(parameters(point)[n] for n in PARAMETERS)
    jacobian = torch.autograd.functional.jacobian(lambda *v: family(dict(zip(PARAMETERS, v, strict=True))), values)
    found = torch.stack(jacobian, -1).numpy()
    expected = OF_THEORY[shape][1](T, *point, form=form)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * max(1.0, np.abs(expected).max()))


def test_the_clip_of_beta_is_a_constant():
    point = (0.0, 1.0, 1.0, 0.0)
    family, x = Family("cosine", T, "released"), parameters(point)
    levels = family(x)
    assert (levels[-1] / levels[-2]).item() == pytest.approx(1 - 0.999)
    x["end"].requires_grad_()
    before, last = family(x)[-2:]
    (slope,) = torch.autograd.grad(last, x["end"], retain_graph=True)
    (slope_before,) = torch.autograd.grad(before, x["end"])
    assert float(slope) == pytest.approx(1e-3 * float(slope_before))
    assert float(slope_before) < -1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_levels_below_tau_of_one_half_are_exact_too(form, tau):
    point = (0.0, 1.0, tau, 0.0)
    expected = theory.cosine_family(T, *point, form=form)
    np.testing.assert_allclose(Family("cosine", T, form)(parameters(point)).numpy(), expected, rtol=1e-10, atol=1e-14)


def test_the_derivative_in_end_that_does_not_exist_is_refused():
    x = parameters((0.0, 1.0, 0.5, 0.0))
    x["end"].requires_grad_()
    with pytest.raises(ValueError, match=r"tau must exceed 1/2 for a derivative in end at end = 1, got 0.5"):
        Family("cosine", T)(x)
    Family("cosine", T, "released")(x).sum().backward()
    assert x["end"].grad is not None
    assert bool(torch.isfinite(x["end"].grad))
    y = parameters((0.0, 1.0, 0.5, 0.0))
    y["tau"].requires_grad_()
    (found,) = torch.autograd.grad(Family("cosine", T)(y).sum(), y["tau"])
    high, low = (theory.cosine_family(T, 0.0, 1.0, 0.5 + s, 0.0).sum() for s in (1e-6, -1e-6))
    assert float(found) == pytest.approx((high - low) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("point", [(-100.0, -99.0, 0.5, 0.0), (5.0, 6.0, 1e-3, 0.0), (3.0, 4.0, 1.0, 0.0)])
def test_a_sigmoid_that_underflows_keeps_its_ratios(form, point):
    start, end, tau, epsilon = point
    y = start + (end - start) * np.arange(T + 1) / T if form == "chen" else (
        start / T + (end - start) * np.arange(T + 1) / T
    )  # fmt: skip
    log_f = -np.logaddexp(0, -(((0.0 if form == "chen" else 1.0) - y) / tau + epsilon))
    if form == "chen":
        expected = np.exp(log_f - log_f[0]) * np.expm1(log_f[-1] - log_f) / np.expm1(log_f[-1] - log_f[0])
    else:
        expected = np.concatenate([[1], np.cumprod(1 - np.clip(-np.expm1(np.diff(log_f)), 0, 0.999))])
    found = Family("sigmoid", T, form)(parameters(point)).numpy()
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_parameters_that_are_not_given_are_fixed():
    family = Family("cosine", T, "released", {"tau": 2.0})
    found = family({"end": torch.tensor([0.8, 0.9], dtype=torch.float64)})
    assert found.shape == (2, T + 1)
    for levels, end in zip(found.numpy(), (0.8, 0.9), strict=True):
        np.testing.assert_allclose(levels, theory.cosine_family(T, 0.0, end, 2.0, 0.008, "released"), rtol=1e-12)
    single = Family("sigmoid", T)({"tau": torch.tensor(1.0)})
    assert single.shape == (T + 1,)
    assert single.dtype == torch.float32


def test_start_and_end_act_through_their_difference_but_for_a_share_of_start():
    family = Family("cosine", T, "released")
    at, h = np.array((0.5, 0.9, 2.0, 0.02)), 0.01
    along = at + h * np.array([at[0] - T, at[1] - T, 0.0, 1 + at[3]])
    torch.testing.assert_close(family(parameters(at)), family(parameters(along)), rtol=1e-12, atol=1e-14)
    beyond = family(parameters((0.5, 1.4, 1.0, 0.008)))  # y_T = 0.9125
    np.testing.assert_allclose(
        beyond.numpy(), theory.cosine_family(T, 0.5, 1.4, 1.0, 0.008, form="released"), rtol=1e-12
    )


@pytest.mark.parametrize(
    ("shape", "form", "point", "message"),
    [
        ("cosine", "chen", (0.5, 0.5, 1, 0), "end must exceed start, got 0.5"),
        ("sigmoid", "released", (1.0, -1.0, 1, 0), "end must exceed start, got -1"),
        ("cosine", "chen", (0.0, 1.0, 0.0, 0), "tau must be positive, got 0"),
        ("sigmoid", "chen", (-3.0, 3.0, -1.0, 0), "tau must be positive, got -1"),
        ("cosine", "released", (0.0, 1.0, 1.0, -0.01), "epsilon must be >= 0, got -0.01"),
        ("cosine", "chen", (-0.1, 1.0, 1.0, 0), "start must be >= 0 for the cosine to fall, got -0.1"),
        ("cosine", "released", (-0.1, 0.5, 1.0, 0), "start must be >= 0 for the cosine to fall, got -0.1"),
        ("cosine", "chen", (0.5, 1.01, 1.0, 0), "end must be <= 1 for"),
        ("cosine", "released", (0.0, 1.01, 1.0, 0), r"end must be <= 1 \+ start \(T - 1\) / T for"),
        ("cosine", "released", (0.5, 1.49, 1.0, 0), r"end must be <= 1 \+ start \(T - 1\) / T for"),
        ("cosine", "chen", (0.0, 1e-12, 1.0, 0), "end must be so far from start that alpha_bar falls"),
        ("sigmoid", "chen", (-900.0, -800.0, 1.0, 0), "end must be so far from start that alpha_bar falls"),
        ("cosine", "chen", (0.0, math.nan, 1.0, 0), "end must be finite, got nan"),
        ("sigmoid", "chen", (-3.0, 3.0, math.inf, 0), "tau must be finite, got inf"),
    ],
)
def test_parameters_out_of_range(shape, form, point, message):
    x = {n: torch.stack([v, v]) for n, v in parameters(POINTS[shape][0]).items()}
    for n, v in zip(PARAMETERS, point, strict=True):
        x[n][1] = v
    with pytest.raises(ValueError, match=message):
        Family(shape, T, form)(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Family("linear", T), "shape must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Family("cosine", T, "printed"), "form must be 'chen' or 'released'"),  # pyright: ignore[reportArgumentType]
        (lambda: Family("cosine", 0), "T must be >= 1"),
        (lambda: Family("cosine", T, fixed={"stop": 1.0}), "fixed must hold parameters of"),
        (lambda: Family("cosine", T)({"stop": torch.tensor(1.0)}), "x must hold parameters of"),
        (lambda: Family("cosine", T).valid({"stop": torch.tensor(1.0)}), "x must hold parameters of"),
        (lambda: Family("cosine", T).valid({"tau": torch.tensor(math.nan)}), "tau must be finite"),
        (lambda: Family("cosine", T, fixed={"epsilon": -1.0}).valid({"tau": torch.tensor(1.0)}), "epsilon must"),
        (lambda: ddim_times(10, 1), "S must lie in"),
        (lambda: ddim_times(10, 11), "S must lie in"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ANY = st.floats(-10, 10, allow_nan=False)
SOME_NAMES = st.sets(st.sampled_from(PARAMETERS), min_size=1).map(sorted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@given(point=st.tuples(ANY, ANY, ANY, ANY), names=SOME_NAMES, single=st.booleans())
def test_valid_makes_any_point_admissible_and_moves_it_only_once(shape, form, point, names, single):
    family = Family(shape, T, form)
    x = parameters(point, names, torch.float32 if single else torch.float64)
    before = {n: v.clone() for n, v in x.items()}
    margin = 0.05 if shape == "sigmoid" else 1e-3  # a saturated sigmoid is not moved: see `valid`
    moved = family.valid(x, margin)
    assert list(moved) == names
    assert all(torch.equal(x[n], before[n]) for n in names)
    for v in moved.values():
        v.requires_grad_()
    levels = family(moved)
    assert bool(torch.isfinite(levels).all())
    assert levels[0].item() == 1
    assert bool((levels.diff() <= 0).all())
    again = family.valid({n: v.detach() for n, v in moved.items()}, margin)
    for n in names:
        torch.testing.assert_close(again[n], moved[n].detach(), rtol=1e-6, atol=1e-6)


UNIT = st.floats(0, 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@given(shares=st.tuples(UNIT, UNIT, UNIT, UNIT), names=SOME_NAMES)
def test_valid_leaves_what_is_admissible(shape, form, shares, names):
    margin = 1e-3
    if shape == "cosine":
        start = shares[0] * (1 if form == "chen" else 5) * (1 - 2 * margin)
        top = 1.0 if form == "chen" else 1 + start * (T - 1) / T
        point = (start, start + margin + 1e-9 + shares[1] * (top - start - margin - 2e-9))
        point = (*point, LEAST_COSINE_TAU + 10 * shares[2], shares[3])
    else:
        start = 6 * shares[0] - 3
        point = (start, start + margin + 1e-9 + 6 * shares[1], 0.1 + 10 * shares[2], 6 * shares[3] - 3)
    others = {n: v for n, v in zip(PARAMETERS, point, strict=True) if n not in names}
    x = parameters(point, names)
    moved = Family(shape, T, form, others).valid(x, margin)
    assert all(torch.equal(moved[n], x[n]) for n in names)


def test_valid_moves_each_parameter_to_the_end_of_its_range():
    def valid(form, **values):
        found = Family("cosine", T, form).valid({n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()})
        return {n: round(float(v), 12) for n, v in found.items()}

    assert valid("chen", end=1.3, tau=0.2, epsilon=-1.0) == {"end": 1.0, "tau": 0.51, "epsilon": 0.0}
    assert valid("released", end=1.3, tau=0.2) == {"end": 1.0, "tau": 0.51}
    assert valid("chen", start=0.5, end=1.3) == {"start": 0.5, "end": 1.0}
    assert valid("released", start=0.4, end=1.3) == {"start": 0.4, "end": 1.3}
    assert valid("released", start=0.4, end=1.5) == {"start": 0.4, "end": 1.39}
    assert valid("chen", start=-0.5, end=-1.0) == {"start": 0.0, "end": 0.001}
    assert valid("chen", start=7.0) == {"start": 0.999}
    assert valid("released", start=100.0, end=0.0) == {"start": 39.96, "end": 39.961}


@pytest.mark.parametrize(("steps", "S"), [(1000, 10), (40, 40), (7, 3), (2, 2)])
def test_ddim_times_are_those_of_theory(steps, S):
    assert ddim_times(steps, S).tolist() == (theory.ddim_grid(steps, S) + 1).tolist()
