"""The error budget: fixed shares, spent once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verdicts.ledger import Ledger

names = st.lists(st.text(max_size=5), min_size=1, max_size=12, unique=True)


@given(names, st.data())
def test_shares_are_equal_and_do_not_depend_on_the_order_of_spending(register, data):
    order = data.draw(st.permutations(register))
    subset = order[: data.draw(st.integers(0, len(order)))]
    ledger = Ledger(1e-3, register)
    for name in subset:
        assert ledger.spend(name) == ledger.share(name) == pytest.approx(1e-3 / len(register))
    assert ledger.spent == pytest.approx(1e-3 * len(subset) / len(register))
    assert ledger.spent + ledger.left == pytest.approx(1e-3)


def test_a_check_with_three_readings_owns_three_shares():
    ledger = Ledger(0.04, {"one": 1, "three": 3})
    assert (ledger.share("one"), ledger.share("three")) == pytest.approx((0.01, 0.03))


def test_there_is_no_second_look():
    ledger = Ledger(1e-6, ["a", "b"])
    ledger.spend("a")
    with pytest.raises(ValueError, match="'a'.*no second look"):
        ledger.spend("a")
    assert ledger.spend("b") == 5e-7
    assert ledger.left == 0


@pytest.mark.parametrize("act", ["share", "spend"])
def test_unknown_names_are_named(act):
    ledger = Ledger(1e-6, ["a"])
    with pytest.raises(KeyError, match="missing"):
        getattr(ledger, act)("missing")
    assert ledger.spent == 0


@pytest.mark.parametrize(
    ("total", "checks", "text"),
    [
        (0.0, ["a"], "total is"),
        (1.0, ["a"], "total is"),
        (0.1, [], "checks is"),
        (0.1, "name", "checks is"),
        (0.1, ["a", "a"], "'a' 2 times"),
        (0.1, {"a": 0}, "'a' the count 0"),
    ],
)
def test_bad_budgets_are_named(total, checks, text):
    with pytest.raises(ValueError, match=text):
        Ledger(total, checks)
