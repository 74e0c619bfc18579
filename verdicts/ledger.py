"""The error budget of a whole run: every registered check owns a fixed share of it and may spend it once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence


class Ledger:
    """Shares of one error probability `total` among named checks.

    A sequence of names gives every name an equal share. A mapping gives every name as many equal shares as it counts
    readings. A share depends on the register alone, not on which checks run or in what order, so by the union bound
    the probability of any wrong verdict in any selection of the register is at most `total`.

    Raises:
        ValueError: unless 0 < total < 1, the register is not empty, its names are distinct and its counts positive.

    >>> ledger = Ledger(1e-6, ["a", "b", "c", "d"])
    >>> ledger.spend("b"), ledger.spent, ledger.left
    (2.5e-07, 2.5e-07, 7.5e-07)
    """

    def __init__(self, total: float, checks: Mapping[str, int] | Sequence[str]) -> None:
        if not 0 < total < 1:
            raise ValueError(f"total is {total!r}, must lie in (0, 1)")
        if isinstance(checks, str) or not checks:
            raise ValueError(f"checks is {checks!r}, must be a non-empty list of names or mapping of names to counts")
        counts = dict(checks) if isinstance(checks, Mapping) else dict(Counter(checks))
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"checks gives {name!r} the count {count!r}, must be at least 1")
            if count > 1 and not isinstance(checks, Mapping):
                raise ValueError(f"checks names {name!r} {count} times, must name each once")
        self.total = total
        self._unit = total / sum(counts.values())
        self._counts = counts
        self._spent: set[str] = set()

    def share(self, name: str) -> float:
        """Return the error probability that `name` owns; KeyError names an unregistered check."""
        if name not in self._counts:
            raise KeyError(f"{name!r} is not a registered check")
        return self._counts[name] * self._unit

    def spend(self, name: str) -> float:
        """Return the share of `name` and mark it as spent.

        Raises:
            KeyError: if `name` is not registered.
            ValueError: if it was spent before; a check judged twice would err with up to twice its share.
        """
        share = self.share(name)
        if name in self._spent:
            raise ValueError(f"name is {name!r}, whose share is already spent: there is no second look")
        self._spent.add(name)
        return share

    @property
    def spent(self) -> float:
        """The error probability spent so far."""
        return math.fsum(self.share(name) for name in self._spent)

    @property
    def left(self) -> float:
        """The error probability not yet spent."""
        return math.fsum(self.share(name) for name in self._counts if name not in self._spent)
