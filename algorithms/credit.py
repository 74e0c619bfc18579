"""The credit matrix: which source of gradient information pays for which step.

Row t (array index t - 1) is the target step; columns are the sources: 0 is the reward's gradient at x_0, k = 1..T is
the score of the noise drawn at step k <= t, and the last column, T + 1, is the noise put on step t's parameters.
A law over finitely many matrices, drawn per sample and independently of the roll-out, is as good as one matrix.
The estimate is unbiased exactly when every row of the expected matrix sums to one (docs/credit-matrix.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Credit:
    """A finite law of credit matrices.

    Attributes:
        matrices: (m, T, T + 2) float64, one matrix per outcome.
        probabilities: (m,), positive, summing to one.
        stratified: draw a batch's outcomes with counts within one of their expectations, not independently.

    Raises:
        ValueError: if a shape is wrong, a row credits noise drawn after its step acted (k > t), an entry is not
            finite, or the probabilities are not a law.
    """

    matrices: np.ndarray
    probabilities: np.ndarray
    stratified: bool = False

    def __post_init__(self) -> None:
        w, p = np.asarray(self.matrices, float), np.asarray(self.probabilities, float)
        object.__setattr__(self, "matrices", w)
        object.__setattr__(self, "probabilities", p)
        if w.ndim != 3 or w.shape[1] < 1 or w.shape[2] != w.shape[1] + 2:
            raise ValueError(f"matrices must have shape (m, T, T + 2), got {w.shape}")
        if not np.isfinite(w).all():
            raise ValueError("matrices must be finite")
        if p.shape != w.shape[:1] or (p <= 0).any() or abs(p.sum() - 1) > 1e-12:
            raise ValueError(f"probabilities must be {w.shape[0]} positive numbers with sum 1, got {p}")
        steps = np.arange(1, self.steps + 1)
        acausal = (w[:, :, 1:-1] != 0) & (steps[None, :] > steps[:, None])
        if acausal.any():
            _, t, k = np.argwhere(acausal)[0] + 1
            raise ValueError(f"row t = {t} credits the noise of step k = {k}: needs k <= t, that noise came before")

    @classmethod
    def of(cls, matrix: np.ndarray) -> Credit:
        """Return the law that always gives `matrix` (T, T + 2)."""
        return cls(np.asarray(matrix, float)[None], np.ones(1))

    @property
    def steps(self) -> int:
        """T."""
        return self.matrices.shape[1]

    @property
    def outcomes(self) -> list[tuple[float, np.ndarray]]:
        """The law as (probability, matrix) pairs."""
        return list(zip(self.probabilities.tolist(), self.matrices, strict=True))

    def expected(self) -> np.ndarray:
        """Return the expected matrix (T, T + 2)."""
        return np.tensordot(self.probabilities, self.matrices, 1)

    def row_sums(self) -> np.ndarray:
        """Return the expected row sums (T,): E[estimate] = sum_t row_sums[t] g_t, so all ones means unbiased."""
        return self.expected().sum(1)

    @property
    def columns(self) -> list[int]:
        """Columns 0..T that carry weight in some outcome."""
        return np.flatnonzero((self.matrices[:, :, :-1] != 0).any((0, 1))).tolist()

    @property
    def uses_parameter_noise(self) -> bool:
        return bool((self.matrices[:, :, -1] != 0).any())

    @property
    def by_reward_alone(self) -> bool:
        """Whether the reward's gradient, column 0, is the only source: no noise has a score in the estimate."""
        return self.columns == [0] and not self.uses_parameter_noise

    def last_row(self, column: int) -> int:
        """Return the largest step t that `column` pays for, in any outcome: its costate lives up to there."""
        return int(np.flatnonzero((self.matrices[:, :, column] != 0).any(0)).max()) + 1

    def visits(self) -> np.ndarray:
        """Return (m, T) bool: whether the backward sweep must visit step t for a sample with the i-th matrix."""
        w = self.matrices[:, :, :-1] != 0
        later = w[:, ::-1].cumsum(1)[:, ::-1] > 0  # (m, T, T + 1): some row from t on is paid by column k
        born = np.arange(self.steps + 1) <= np.arange(1, self.steps + 1)[:, None]
        return (later & born).any(2)

    def calls(self) -> float:
        """Return the expected number of network evaluations of one sample, a backward pass into parameters being two.

        T for the roll-out; one for each step that the sweep visits, two more where its row is paid, and one more for
        each costate that takes a backward pass into the state alone.
        """
        w = self.matrices[:, :, :-1] != 0
        born = np.arange(self.steps + 1) <= np.arange(1, self.steps + 1)[:, None]
        pulled = (w[:, ::-1].cumsum(1)[:, ::-1] - w > 0) & born  # a row after t is paid by the costate
        paid = w.any(2)
        alone = pulled.sum(2) - ((pulled & w).sum(2) == 1) * (w.sum(2) == 1)
        return self.steps + float(self.probabilities @ (self.visits() + 2 * paid + alone).sum(1))

    def live_costates(self) -> int:
        """Return the largest number of costates that the backward sweep holds at once: its cost per step."""
        spans = [(max(k, 1), self.last_row(k)) for k in self.columns]
        return max((sum(a <= t <= b for a, b in spans) for t in range(1, self.steps + 1)), default=0)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw each sample's outcome, (samples,)."""
        if len(self.probabilities) == 1:
            return torch.zeros(samples, dtype=torch.long)
        law = torch.from_numpy(self.probabilities)
        if self.stratified:
            # Systematic sampling: one uniform number places `samples` equidistant points on the distribution function.
            points = (torch.rand(1, generator=generator, dtype=law.dtype) + torch.arange(samples)) / samples
            outcome = torch.searchsorted(law.cumsum(0)[:-1].contiguous(), points, right=True)
            return outcome[torch.randperm(samples, generator=generator)]
        return torch.multinomial(law, samples, replacement=True, generator=generator)


def first_order(steps: int) -> Credit:
    """Full back-propagation: column 0 is all ones (RLR, eq. 9)."""
    return truncated(steps, steps)


def truncated(steps: int, length: int) -> Credit:
    """Truncated back-propagation through the last `length` steps, DRaFT-K: rows t > length sum to zero."""
    _check_length(steps, length)
    w = np.zeros((steps, steps + 2))
    w[:length, 0] = 1
    return Credit.of(w)


def random_truncation(law: np.ndarray, debiased: bool = False, stratified: bool = False) -> Credit:
    """Back-propagation through a random number K of last steps (AlignProp); `law[i]` = P(K = i + 1), i < T.

    With `debiased`, row t is divided by P(K >= t), which makes it unbiased. With `stratified` too it is SRT: the counts
    of the K's in a batch are no longer random, and neither is what they added to the variance (docs/stratified.md).

    Raises:
        ValueError: if `law` is not a probability vector, or debiasing meets a step that is never reached.
    """
    law = np.asarray(law, float)
    if law.ndim != 1 or not len(law) or (law < 0).any() or abs(law.sum() - 1) > 1e-12:
        raise ValueError(f"law must be a probability vector over K = 1..T, got {law}")
    steps, reach = len(law), law[::-1].cumsum()[::-1]
    if debiased and not reach[-1] > 0:
        raise ValueError(f"law must give K = {steps} positive probability to be debiased, got {reach[-1]}")
    scale = 1 / reach if debiased else np.ones(steps)
    lengths = np.flatnonzero(law) + 1
    w = np.stack([truncated(steps, int(k)).matrices[0] * scale[:, None] for k in lengths])
    return Credit(w, law[lengths - 1], stratified)


def half_order(steps: int, length: int) -> Credit:
    """Half-order estimator over consecutive blocks of `length` steps, the last one shorter if need be (RLR, eq. 7).

    Each block's rows point at the noise of its smallest step, the last noise that all of them can still move.
    """
    _check_length(steps, length)
    w = np.zeros((steps, steps + 2))
    for t in range(steps):
        w[t, t - t % length + 1] = 1
    return Credit.of(w)


def policy_gradient(steps: int) -> Credit:
    """REINFORCE along the chain, DDPO's gradient: every step is paid by its own noise."""
    return half_order(steps, 1)


def zeroth_order(steps: int) -> Credit:
    """Zeroth-order estimator: every step is paid by the noise on its own parameters (RLR, eq. 8)."""
    _check_length(steps, 1)
    w = np.zeros((steps, steps + 2))
    w[:, -1] = 1
    return Credit.of(w)


def _check_length(steps: int, length: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if not 1 <= length <= steps:
        raise ValueError(f"length must lie in 1..{steps}, got {length}")
