"""Numbers in the report: what is printed can be read back."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.numerals import PLAIN, duration, interval, number

FINITE = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e200, max_value=1e200).filter(
    lambda value: value == 0 or abs(value) > 1e-200
)


def value_of(text: str) -> float:
    """Return the number that a reader reads."""
    match = re.fullmatch(r"(−?)([\d.]*)(?: × )?(?:10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?", text.replace("\N{THIN SPACE}", ""))
    assert match, text
    sign, mantissa, power = match.groups()
    exponent = int(power.translate(PLAIN).replace("−", "-")) if power else 0
    return (-1 if sign else 1) * float(f"{mantissa or 1}e{exponent}")


@given(FINITE)
def test_six_digits_can_be_read_back(value: float) -> None:
    assert math.isclose(value_of(number(value)), value, rel_tol=5.1e-6)


@given(FINITE, FINITE)
def test_a_printed_interval_contains_the_measured_one(a: float, b: float) -> None:
    lower, upper = min(a, b), max(a, b)
    text = interval(lower, upper)
    if lower == upper:
        assert math.isclose(value_of(text), lower, rel_tol=6e-3)
        return
    low, high = (value_of(part) for part in text.strip("[]").split(", "))
    assert low <= lower
    assert high >= upper


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (-0.125, "−0.125"),
        (1 / 3, "0.333333"),
        (1e-3, "0.001"),
        (1e-9, "10⁻⁹"),
        (-3.5e-12, "−3.5 × 10⁻¹²"),
        (2.0, "2"),
        (100.0, "100"),
        (99999.96, "100\N{THIN SPACE}000"),
        (1e7, "10⁷"),
        (-0.0, "0"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "undefined"),
    ],
)
def test_small_and_special_numbers_stay_as_they_are(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(59.7, "1 min 0 s"), (0.25, "250 ms"), (3600.0, "1 h 0 min")])
def test_durations_round_into_the_next_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
