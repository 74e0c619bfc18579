"""Adam on a table of which each update sees few rows: the same numbers as for the whole table, at the rows' price.

A row without a gradient still moves: its first moment m dies out as beta_1^k and its second, v, as beta_2^k. With
Adam's epsilon at 0, its move i updates after its last gradient is the one of that gradient's own update, m / sqrt(v),
times (beta_1 / sqrt(beta_2))^i and the rate of that update with both bias corrections. So the sum of the moves that a
row has missed is m / sqrt(v) times a difference of two numbers of one list, and a row can catch up when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class RowAdam:
    """Adam (Kingma and Ba 2015, algorithm 1, epsilon = 0) for a table (rows, width), which it changes in place.

    Every update is a `read` of the rows that it needs and a `step` with their gradients; `finish` after the last one.
    In between, rows that were not read lag behind.

    Args:
        rates: the learning rate of each update, all of them.
        betas: decay rates of the first and the second moment.

    Raises:
        ValueError: unless the table is (rows, width) and 0 <= betas[0] < sqrt(betas[1]) < 1, so that a row without
            gradients comes to rest.
    """

    def __init__(self, table: Tensor, rates: Sequence[float], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        if table.dim() != 2:
            raise ValueError(f"table must be shaped (rows, width), got {tuple(table.shape)}")
        if not 0 <= betas[0] < betas[1] ** 0.5 < 1:
            raise ValueError(f"betas must satisfy 0 <= betas[0] < sqrt(betas[1]) < 1, got {betas}")
        self._table, self._betas = table, betas
        self._first, self._root = torch.zeros_like(table), torch.zeros_like(table)  # m and sqrt(v)
        self._seen = np.zeros(len(table), dtype=np.int64)  # the update that each row is at
        self._done = 0
        updates = np.arange(1, len(rates) + 1)
        self._scale = np.asarray(rates) * np.sqrt(1 - betas[1] ** updates) / (1 - betas[0] ** updates)
        # to_come[s]: what is to be taken from a row in all updates after s, if it has no gradient after s, over its
        # m / sqrt(v) at s.
        self._shrink = betas[0] / betas[1] ** 0.5
        self._to_come = np.zeros(len(rates) + 1)
        for s in range(len(rates), 0, -1):
            self._to_come[s - 1] = self._shrink * (self._scale[s - 1] + self._to_come[s])

    def read(self, rows: Tensor) -> Tensor:
        """Return these rows as they are before the next update, (k, width); rows (k,) must be distinct."""
        values, first, root = self._current(rows)
        self._held = rows, values, first, root
        return values

    def step(self, gradient: Tensor) -> None:
        """Make the next update with the gradient (k, width) of the rows that were read last.

        Raises:
            IndexError: if all updates have been made.
        """
        rows, values, first, root = self._held
        first.lerp_(gradient, 1 - self._betas[0])
        root.square_().mul_(self._betas[1]).addcmul_(gradient, gradient, value=1 - self._betas[1]).sqrt_()
        values.sub_(_direction(first, root), alpha=float(self._scale[self._done]))
        for whole, part in ((self._table, values), (self._first, first), (self._root, root)):
            whole.numpy()[rows.numpy()] = part.numpy()  # index_copy_ takes three times as long
        self._done += 1
        self._seen[rows.numpy()] = self._done

    def finish(self) -> None:
        """Let every row catch up with the updates made so far."""
        everyone = torch.arange(len(self._table))
        for whole, part in zip((self._table, self._first, self._root), self._current(everyone), strict=True):
            whole.copy_(part)
        self._seen[:] = self._done

    def _current(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return these rows' values, m and sqrt(v) after all updates made so far."""
        lag = self._done - self._seen[rows.numpy()]
        missed = self._to_come[self._done - lag] - self._shrink**lag * self._to_come[self._done]
        values, first, root = (whole.index_select(0, rows) for whole in (self._table, self._first, self._root))
        values.addcmul_(self._column(-missed), _direction(first, root))
        first.mul_(self._column(self._betas[0] ** lag))
        root.mul_(self._column(self._betas[1] ** (lag / 2)))
        return values, first, root

    def _column(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._table.dtype)[:, None]


def _direction(first: Tensor, root: Tensor) -> Tensor:
    """Return m / sqrt(v), 0 where there was no gradient yet, and next to it where its square is too small a number."""
    return first / root.clamp_min(torch.finfo(root.dtype).tiny ** 0.5)
