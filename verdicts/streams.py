"""Addressed random streams: one root seed, and a path of names below it.

A stream is its address. The numbers of a check depend on the root seed and on the check's own path and on nothing
else: not on the order of the checks, not on which of them run, not on how many processes share the work.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

SEED_LIMIT = 2**64


@dataclass(frozen=True)
class Stream:
    """A random stream named by a root seed and a path of strings and integers.

    Two streams share their numbers only if seed and path are equal element by element, types included: the address
    is hashed as a JSON list, so that ("a", "bc") differs from ("ab", "c") and 1 from "1".

    Raises:
        ValueError: if `seed` is not an integer in [0, 2^64), or a path element is neither a string nor an integer.

    >>> root = Stream(7)
    >>> root.child("rlr", 3) == root.child("rlr").child(3)
    True
    >>> bool(root.child("a").generator().random() == root.child("b").generator().random())
    False
    """

    seed: int
    path: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if not _is_integer(self.seed) or not 0 <= self.seed < SEED_LIMIT:
            raise ValueError(f"seed is {self.seed!r}, must be an integer in [0, 2^64)")
        for name in self.path:
            if not (isinstance(name, str) or _is_integer(name)):
                raise ValueError(f"path holds {name!r}, its elements must be strings or integers")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "path", tuple(n if isinstance(n, str) else int(n) for n in self.path))

    def child(self, *names: str | int) -> Stream:
        """Return the stream whose path continues this one's by `names`."""
        return Stream(self.seed, self.path + names)

    def generator(self) -> np.random.Generator:
        """Return a fresh Philox generator at the start of this stream."""
        entropy = int.from_bytes(self._digest("generator"), "big")
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

    def integer(self) -> int:
        """Return this stream's integer in [0, 2^63), a seed for generators of other libraries."""
        return int.from_bytes(self._digest("integer")[:8], "big") >> 1

    def _digest(self, purpose: str) -> bytes:
        address = json.dumps([purpose, self.seed, list(self.path)], ensure_ascii=True)
        return hashlib.sha256(address.encode("ascii")).digest()


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
