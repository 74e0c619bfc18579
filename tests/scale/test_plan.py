"""The plan: properties that every advice must have, and cases decided by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.plan import (
    COLUMNS,
    Measured,
    dominates,
    in_bytes,
    pareto,
    predicted_peak,
    prediction_error,
    prediction_text,
    recommend,
    table,
    tied,
    work,
    work_error,
)

GIB = 2**30


def measured(
    name: str,
    variance: float = 1.0,
    seconds: float = 1.0,
    peak: float = 10,
    per_sample: float = 1,
    error: float = 0.0,
    bias: str = "none",
    batch: int = 2,
    needs: bool = False,
) -> Measured:
    return Measured(name, variance, error, seconds, int(peak), batch, int(per_sample), 3.0, bias, needs)


# Small integers, so that ties and equal numbers are common.
small = st.integers(0, 6)
records = st.builds(
    measured,
    name=st.just("?"),
    variance=small,
    seconds=st.integers(1, 6),
    peak=st.integers(0, 40),
    per_sample=small,
    error=small.map(lambda quarters: quarters / 4),
    bias=st.sampled_from(["none", "leaves steps out"]),
    batch=st.integers(1, 4),
    needs=st.booleans(),
)
lists = st.lists(records, min_size=1, max_size=7).map(
    lambda found: [replace(m, estimator=f"estimator {i}") for i, m in enumerate(found)]
)
limits = st.none() | st.integers(1, 50)
batches = st.integers(1, 9)


def named(found: list[Measured], name: str | None) -> Measured:
    return next(m for m in found if m.estimator == name)


# --- properties ----------------------------------------------------------------------------------------------------


@given(lists, limits, batches, st.booleans())
def test_what_is_recommended_fits_is_unbiased_able_and_not_dominated(found, limit, batch, differentiable) -> None:
    advice = recommend(found, limit, batch, differentiable)
    able = [m for m in found if m.unbiased and (differentiable or not m.differentiable_reward)]
    fitting = [m for m in able if limit is None or m.fixed_bytes + m.bytes_per_sample <= limit]
    if advice.estimator is None:
        assert not fitting
        assert (advice.batch, advice.passes, advice.peak_bytes, advice.ties) == (0, 0, 0, ())
        return
    chosen = named(found, advice.estimator)
    assert chosen in fitting
    assert not any(dominates(m, chosen, batch) for m in fitting)
    assert 1 <= advice.batch <= batch <= advice.batch * advice.passes < batch + advice.batch
    assert advice.peak_bytes == chosen.fixed_bytes + advice.batch * chosen.bytes_per_sample
    assert limit is None or advice.peak_bytes <= limit
    if limit is not None and advice.batch < batch:  # one more would not fit
        assert chosen.fixed_bytes + (advice.batch + 1) * chosen.bytes_per_sample > limit
    least = min(work(m) for m in fitting)
    assert any(tied(chosen, m) for m in fitting if work(m) == least)
    if not advice.ties:
        assert work(chosen) == least
    assert chosen.estimator in advice.why


@given(lists, limits, batches, st.randoms(use_true_random=False))
def test_order_does_not_matter(found, limit, batch, random) -> None:
    shuffled = random.sample(found, len(found))
    assert recommend(shuffled, limit, batch) == recommend(found, limit, batch)
    assert pareto(shuffled, batch) == pareto(found, batch)
    assert table(shuffled, batch) == table(found, batch)


@given(lists, batches)
def test_frontier_is_a_partition_and_its_best_are_what_a_staircase_finds(found, batch) -> None:
    frontier = pareto(found, batch)
    parts = [*frontier.best, *frontier.dominated, *frontier.biased]
    assert sorted(m.estimator for m in parts) == sorted(m.estimator for m in found)
    assert all(not m.unbiased for m in frontier.biased)
    # Another way to the same set: walk by rising work, keep what needs less memory than all before.
    kept: list[str] = []
    points = sorted({(work(m), m.peak(batch)) for m in found if m.unbiased})
    least = math.inf
    for point in points:
        if point[1] < least:
            least = point[1]
            kept += [m.estimator for m in found if m.unbiased and (work(m), m.peak(batch)) == point]
    assert sorted(m.estimator for m in frontier.best) == sorted(kept)


@given(lists, st.integers(1, 50), batches)
def test_more_memory_never_hurts(found, limit, batch) -> None:
    exact = [replace(m, relative_variance_error=0.0) for m in found]
    tight, loose = recommend(exact, limit, batch), recommend(exact, limit + 7, batch)
    none = recommend(exact, None, batch)
    assert tight.without_limit == loose.without_limit == none.estimator == none.without_limit
    if tight.estimator is not None:
        assert work(named(exact, loose.estimator)) <= work(named(exact, tight.estimator))


@given(lists, limits, batches)
def test_biased_estimators_change_nothing(found, limit, batch) -> None:
    unbiased = [m for m in found if m.unbiased]
    if unbiased:
        assert recommend(unbiased, limit, batch) == recommend(found, limit, batch)


@given(lists, batches)
def test_table_is_sorted_by_work_and_has_all_columns(found, batch) -> None:
    rows = table(found, batch)
    assert all(len(row) == len(COLUMNS) for row in rows)
    works = [work(named(found, row[0])) for row in rows]
    assert works == sorted(works)
    best = {m.estimator for m in pareto(found, batch).best}
    assert {row[0] for row in rows if row[COLUMNS.index("frontier")] == "yes"} == best


# --- by hand -------------------------------------------------------------------------------------------------------

FULL = measured("full", variance=1, seconds=2, peak=16 * GIB, per_sample=6 * GIB, error=0.05, needs=True)
HALF = measured("half", variance=5, seconds=1, peak=9 * GIB, per_sample=2 * GIB, error=0.1)
CHEAP = measured("cheap", variance=40, seconds=1, peak=5 * GIB, per_sample=GIB // 2, error=1)
POOR = measured("poor", variance=50, seconds=1, peak=12 * GIB, per_sample=4 * GIB, error=1)
SHORT = measured("short", variance=0.1, seconds=1, peak=4 * GIB, per_sample=GIB // 2, bias="leaves out steps t > 1")
ALL = [POOR, SHORT, HALF, CHEAP, FULL]


def test_work_is_variance_times_seconds() -> None:
    m = measured("m", variance=3, seconds=0.5, error=0.2)
    assert (work(m), work_error(m)) == (1.5, 0.1)


def test_frontier_by_hand() -> None:
    frontier = pareto(ALL)
    assert [m.estimator for m in frontier.best] == ["full", "half", "cheap"]
    assert [m.estimator for m in frontier.dominated] == ["poor"]
    assert [m.estimator for m in frontier.biased] == ["short"]


def test_frontier_depends_on_the_batch_at_which_memory_is_compared() -> None:
    steep = measured("steep", variance=2, peak=2, per_sample=2, batch=1)  # nothing fixed
    flat = measured("flat", variance=1, peak=11, per_sample=1, batch=1)
    assert [m.estimator for m in pareto([steep, flat], 1).best] == ["flat", "steep"]
    assert [m.estimator for m in pareto([steep, flat], 20).best] == ["flat"]


@pytest.mark.parametrize(
    ("limit", "name", "batch", "passes"),
    [
        (None, "full", 8, 1),
        (64 * GIB, "full", 8, 1),
        (4 * GIB + 8 * 6 * GIB, "full", 8, 1),  # to the byte
        (4 * GIB + 8 * 6 * GIB - 1, "full", 7, 2),
        (10 * GIB, "full", 1, 8),
        (10 * GIB - 1, "half", 2, 4),
        (7 * GIB, "half", 1, 8),
        (7 * GIB - 1, "cheap", 5, 2),
        (4 * GIB + GIB // 2, "cheap", 1, 8),
        (4 * GIB, None, 0, 0),
    ],
)
def test_the_limit_decides(limit: int | None, name: str | None, batch: int, passes: int) -> None:
    advice = recommend(ALL, limit, 8)
    assert (advice.estimator, advice.batch, advice.passes) == (name, batch, passes)
    assert advice.without_limit == "full"


def test_sentences() -> None:
    assert recommend(ALL, None, 8).why == (
        "Take full: its work of 2.00 ± 0.10 s is the least of the unbiased estimators."
    )
    assert recommend(ALL, 7 * GIB, 8).why == (
        "Take half, 1 sample at a time: its work of 5.00 ± 0.10 s is the least of the unbiased estimators that fit "
        "under 7.00 GiB (without the limit: full, 2.00 ± 0.10 s)."
    )
    assert recommend(ALL, GIB, 8).why == (
        "Nothing fits under 1.00 GiB: the unbiased estimator that needs least, cheap, takes 4.50 GiB for one sample."
    )
    assert recommend([SHORT], None, 8).why == (
        "Nothing can be recommended: no estimator is unbiased, and a biased one's work cannot be compared."
    )
    assert recommend([FULL], None, 8, differentiable_reward=False).why == (
        "Nothing can be recommended: no estimator is unbiased and able to do without the reward's gradient."
    )


def test_a_reward_without_a_gradient_leaves_out_what_needs_it() -> None:
    advice = recommend(ALL, None, 8, differentiable_reward=False)
    assert (advice.estimator, advice.without_limit) == ("half", "half")


def test_ties_go_to_the_cheaper_in_memory_and_only_ties_do() -> None:
    large = measured("large", variance=1.0, peak=50, error=0.3)
    little = measured("little", variance=1.9, peak=20, error=0.4)  # 0.9 apart; two standard errors are 1.0
    advice = recommend([large, little], None, 4)
    assert (advice.estimator, advice.ties) == ("little", ("large",))
    assert advice.why == (
        "Take little: its work of 1.90 ± 0.40 s is not told apart from that of large by two standard errors, and it "
        "needs the least memory of them."
    )
    sharper = replace(little, relative_variance_error=0.3)  # two standard errors are 0.85
    advice = recommend([large, sharper], None, 4)
    assert (advice.estimator, advice.ties) == ("large", ())


def test_a_tie_does_not_carry_a_dominated_estimator_to_the_top() -> None:
    best = measured("best", variance=1.0, peak=50)
    vague = measured("vague", variance=2.0, peak=20, error=1.0)  # ties with best, for it is poorly known
    sharp = measured("sharp", variance=1.5, peak=20)  # known to be worse than best, and beats vague
    advice = recommend([best, vague, sharp], None, 1)
    assert (advice.estimator, advice.ties) == ("best", ("vague",))
    assert advice.why.endswith("it needs the least memory of those that no other beats in both.")


def test_equal_estimators_are_told_apart_by_name_alone() -> None:
    twins = [measured("b"), measured("a")]
    assert recommend(twins, None, 1).estimator == "a"
    assert [m.estimator for m in pareto(twins).best] == ["a", "b"]


def test_a_slope_above_the_measured_average_does_not_promise_less_than_was_measured() -> None:
    m = measured("m", peak=100, per_sample=60, batch=2)  # a line would start at -20
    assert m.fixed_bytes == 0
    assert m.peak(2) >= m.peak_bytes
    assert m.fits(119) == 1


def test_further_samples_may_cost_nothing() -> None:
    m = measured("m", peak=100, per_sample=0)
    assert (m.fits(99), m.fits(100)) == (0, math.inf)
    assert recommend([m], 100, 1000).batch == 1000


def test_predictions_and_how_far_off_they_were() -> None:
    assert predicted_peak(100, 7, 3) == 121
    assert prediction_error(95, 100) == pytest.approx(-0.05)
    assert prediction_text(3 * GIB, 2 * GIB) == "predicted 3.00 GiB, measured 2.00 GiB: 50.0 % too high"
    assert prediction_text(1.9 * GIB, 2 * GIB) == "predicted 1.90 GiB, measured 2.00 GiB: 5.0 % too low"
    assert prediction_text(2 * GIB, 2 * GIB + 1).endswith("exact to 0.05 %")
    assert in_bytes(12_345_678) == "11.8 MiB"


def test_table_by_hand() -> None:
    assert [row[0] for row in table(ALL)] == ["short", "full", "half", "cheap", "poor"]
    assert table(ALL, batch=2)[1] == (
        "full",
        "none",
        "1.000 ± 0.050",
        "3.00",
        "2.00",
        "2.00 ± 0.10",
        "16.0 GiB",
        "6.00 GiB",
        "reward's gradient",
        "yes",
    )
    assert [row[-1] for row in table(ALL)] == ["biased", "yes", "yes", "yes", "no"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: measured("m", variance=math.nan), r"^relative_variance of m must be >= 0 and finite, got nan$"),
        (lambda: measured("m", variance=math.inf), r"^relative_variance of m must be >= 0 and finite, got inf$"),
        (lambda: measured("m", error=-1), r"^relative_variance_error of m must be >= 0 and finite, got -1$"),
        (lambda: measured("m", seconds=0), r"^seconds of m must be positive and finite, got 0$"),
        (lambda: measured("m", peak=-1), r"^peak_bytes of m must be >= 0 and finite, got -1$"),
        (lambda: measured("m", batch=0), r"^batch must be >= 1, got 0$"),
        (lambda: measured("", batch=1), r"^estimator must not be empty, got ''$"),
        (lambda: measured("m", bias=""), r"^bias must not be empty, got ''$"),
        (lambda: recommend([], None, 1), r"^measured must hold at least one estimator, got none$"),
        (
            lambda: recommend([HALF, HALF], None, 1),
            r"^measured must name each estimator once, got 'half' more than once$",
        ),
        (lambda: recommend([HALF], 0, 1), r"^memory_limit_bytes must be positive and finite, or None, got 0$"),
        (lambda: recommend([HALF], math.nan, 1), r"^memory_limit_bytes must be positive and finite, or None, got nan$"),
        (lambda: recommend([HALF], None, 0), r"^batch must be >= 1, got 0$"),
        (lambda: predicted_peak(-1, 0, 1), r"^fixed_bytes must be >= 0, got -1$"),
        (lambda: predicted_peak(1, -2, 1), r"^per_sample_bytes must be >= 0, got -2$"),
        (lambda: prediction_error(1, 0), r"^measured must be > 0 bytes, got 0$"),
    ],
)
def test_bad_input_is_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
