"""Prompts, and what a chain is told of them at its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.chain import StepConditions

Prompt = str | Sequence[str]
"""A text, or texts from coarse to fine, given to equal parts of the chain (RLR's diffusive chain-of-thought)."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts as rows of a chain's table.

    Attributes:
        texts: what the reward is told: each prompt's last, finest text.
        rows: for each prompt the rows of its texts, from coarse to fine.
    """

    texts: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], known: Sequence[str]) -> Prompts:
        """Look prompts up among the texts that a chain's table knows, in the order of its rows.

        Raises:
            ValueError: if there is no prompt, or one without a text, or a text is not known.
        """
        if not prompts:
            raise ValueError("prompts must hold at least one, got none")
        listed = [(p,) if isinstance(p, str) else tuple(p) for p in prompts]
        if () in listed:
            raise ValueError(f"prompts must have at least one text each, number {listed.index(()) + 1} has none")
        index = {text: row for row, text in enumerate(known)}
        for text in (text for texts in listed for text in texts):
            if text not in index:
                raise ValueError(f"prompt {text!r} is not one of those that the model knows: {', '.join(known)}")
        return cls(tuple(texts[-1] for texts in listed), tuple(tuple(index[t] for t in texts) for texts in listed))

    def __len__(self) -> int:
        return len(self.texts)

    def condition(self, chosen: Tensor, steps: int) -> StepConditions:
        """Return the condition of samples with the chosen prompts (n,), for a chain of `steps` steps.

        Step t = T is told the first, coarsest of a prompt's texts, step 1 its last.

        Raises:
            ValueError: if a prompt has more texts than the chain has steps.
        """
        longest = max(map(len, self.rows))
        if longest > steps:
            raise ValueError(f"prompts may have at most one text per step ({steps}), got one with {longest}")
        table = torch.tensor(
            [[rows[(steps - t) * len(rows) // steps] for rows in self.rows] for t in range(1, steps + 1)]
        )
        return StepConditions(table.to(chosen.device)[:, chosen], chosen)
