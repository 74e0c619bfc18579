"""Counted memory: the sweep's does not grow with the chain, a stored graph's does."""

import pytest
import torch

from toy.memory import SavedBytes, peak_saved_bytes


def test_counter_counts_what_one_product_saves_and_gives_it_back() -> None:
    x = torch.ones(3, 5, dtype=torch.float64, requires_grad=True)
    count = SavedBytes()
    with count:
        y = x.exp()  # saves its result, 15 doubles
        assert (count.current, count.peak) == (120, 120)
        y.sum().backward()
    del y
    assert (count.current, count.peak) == (0, 120)


def test_sweep_needs_the_same_whatever_the_length_of_the_chain() -> None:
    assert len({peak_saved_bytes(steps, "sweep") for steps in (2, 7, 40)}) == 1


@pytest.mark.parametrize("method", ["stored graph", "stored, every second step"])
def test_stored_graph_grows_by_the_same_amount_with_every_pair_of_steps(method: str) -> None:
    peaks = [peak_saved_bytes(steps, method) for steps in (4, 8, 12, 16)]
    growth = {b - a for a, b in zip(peaks, peaks[1:], strict=False)}
    assert len(growth) == 1
    assert growth.pop() > 0


def test_half_of_the_steps_need_less_than_the_whole_graph_and_more_than_the_sweep() -> None:
    sweep, half, whole = (
        peak_saved_bytes(40, method) for method in ("sweep", "stored, every second step", "stored graph")
    )
    assert sweep < half < whole
    assert half == pytest.approx(whole / 2, rel=0.02)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^method must be 'sweep'.*got 'folded'$"):
        peak_saved_bytes(4, "folded")
