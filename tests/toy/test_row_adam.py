"""Row by row, Adam makes the moves that torch's makes on the whole table."""

import re

import pytest
import torch

from toy.row_adam import RowAdam
from verdicts.streams import Stream

STREAM = Stream(6).child("tests", "row-adam")
ROWS, WIDTH = 12, 3


def whole_table(
    table: torch.Tensor, rows: list[torch.Tensor], gradients: list[torch.Tensor], rates: list[float], betas
) -> list[torch.Tensor]:
    """Return the table after each update of torch's Adam with dense gradients."""
    found = table.clone().requires_grad_()
    # Of rows that never had a gradient 0 / 0 is to be 0, as 0 / 1e-200 is.
    optimizer = torch.optim.Adam([found], betas=betas, eps=1e-200)
    after = []
    for row, gradient, rate in zip(rows, gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        found.grad = torch.zeros_like(found).index_add_(0, row, gradient)
        optimizer.step()
        after.append(found.detach().clone())
    return after


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.7, 0.5)])
@pytest.mark.parametrize("updates", [1, 40, 700])
def test_rows_move_as_under_adam_on_the_whole_table(updates: int, betas: tuple[float, float]) -> None:
    """Row 0 is never seen, row 1 in the first update only: its gradient's last moves are made by `finish`."""
    source = torch.Generator().manual_seed(STREAM.child(updates).integer())
    table = torch.randn(ROWS, WIDTH, generator=source, dtype=torch.float64)
    rows = [2 + torch.randperm(ROWS - 2, generator=source)[:4] for _ in range(updates)]
    rows[0][0] = 1
    gradients = [torch.randn(4, WIDTH, generator=source, dtype=torch.float64) for _ in rows]
    rates = [0.1 * (1 - update / updates) for update in range(updates)]
    expected = whole_table(table, rows, gradients, rates, betas)
    found = table.clone()
    adam = RowAdam(found, rates, betas)
    for before, row, gradient in zip([table, *expected], rows, gradients, strict=False):
        torch.testing.assert_close(adam.read(row), before[row], rtol=1e-11, atol=1e-12)
        adam.step(gradient)
    adam.finish()
    torch.testing.assert_close(found, expected[-1], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found[0], table[0], rtol=0, atol=0)
    assert (found[1] - table[1]).abs().min() > 0


def moved_by(size: float) -> float:
    """How far two gradients of this size move a row in 300 updates, in float32."""
    table = torch.zeros(2, 16)
    adam = RowAdam(table, [0.1] * 300)
    for row in [0, 0, *[1] * 298]:
        adam.read(torch.tensor([row]))
        adam.step(torch.full((1, 16), 1.0 if row else size))
    adam.finish()
    assert torch.isfinite(table).all()
    return float(table[0].abs().max())


@pytest.mark.parametrize("size", [1e-12, 1e-17, 1e-19, 1e-21, 1e-23, 1e-30, 1e-40])
def test_a_gradient_whose_square_vanishes_moves_no_row_farther_than_another(size: float) -> None:
    """Such as that of a unit far in the flat part of its softplus."""
    assert moved_by(size) <= 1.1 * moved_by(1.0)


def test_finish_twice_moves_nothing_more() -> None:
    table = torch.ones(4, 2, dtype=torch.float64)
    adam = RowAdam(table, [0.1, 0.1, 0.1])
    adam.read(torch.tensor([1, 3]))
    adam.step(torch.ones(2, 2, dtype=torch.float64))
    adam.read(torch.tensor([0]))
    adam.step(torch.ones(1, 2, dtype=torch.float64))
    adam.finish()
    once = table.clone()
    adam.finish()
    torch.testing.assert_close(table, once, rtol=0, atol=0)


def test_one_update_too_many_is_refused_and_moves_nothing() -> None:
    table = torch.ones(2, 2)
    adam = RowAdam(table, [])
    adam.read(torch.tensor([0]))
    with pytest.raises(IndexError):
        adam.step(torch.ones(1, 2))
    assert torch.equal(table, torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_anything_but_a_table_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"table must be shaped (rows, width), got {shape}")):
        RowAdam(torch.zeros(shape), [0.1])


@pytest.mark.parametrize("betas", [(-0.1, 0.999), (0.9, 0.81), (0.9, 1.0)])
def test_betas_of_which_a_row_would_not_come_to_rest_are_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"^betas must satisfy 0 <= betas\[0\] < sqrt\(betas\[1\]\) < 1, got "):
        RowAdam(torch.zeros(1, 1), [0.1], betas)
