"""The benchmarks compare equal work: each naive loop gives the library's numbers. Nothing here is timed."""

import pytest

from benchmarks import estimators as bench

CASES = {"linear-gaussian": bench.linear_gaussian(), "mlp": bench.mlp(steps=4)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", bench.pairs(4))
def test_naive_loop_gives_the_librarys_numbers(case, name):
    bench.check(case, name)
