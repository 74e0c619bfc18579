"""Runs side by side: each has the gradient that it has alone, whatever its samples do."""

import numpy as np
import pytest
import torch

from algorithms.baselines import LeaveOneOut
from algorithms.chain import ParameterNoise, Perturbation, step_mean
from algorithms.credit import Credit
from algorithms.estimators import Estimator
from algorithms.objective import Objective
from theory import schedules
from toy.ddpm import MLPChain, initial_parameters
from toy.parallel import Parallel, SideBySide
from toy.rewards import Bump
from verdicts.streams import Stream

T, BATCH, SEEDS = 3, 5, (4, 1, 9)
CHAIN = MLPChain.of(schedules.linear(T, 0.05, 0.5))


def mixed_law() -> Credit:
    """Two outcomes: one back-propagates through the last step, the other moves the parameters where it pays too."""
    plain, moved = np.zeros((T, T + 2)), np.zeros((T, T + 2))
    plain[0, 0] = 1
    moved[:, 0], moved[1:, -1], moved[2, 2] = 0.5, 0.7, -0.3
    return Credit(np.stack([plain, moved]), np.array([0.4, 0.6]))


def test_gradients_are_those_of_the_single_runs_where_moved_and_unmoved_samples_visit_different_steps() -> None:
    made = Estimator("mixed", mixed_law(), ParameterNoise(0.1), LeaveOneOut(), ("parameters", "chain"))
    objective = Objective(Bump(0.3, 1.0))
    starts = [initial_parameters(CHAIN, 4, Stream(seed)) for seed in SEEDS]

    def sources() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in SEEDS]

    counts = [made.draw(CHAIN, p, BATCH, g).outcome.sum() for p, g in zip(starts, sources(), strict=True)]
    assert len({int(count) for count in counts}) > 1  # some runs have to be padded

    stacked = {name: torch.stack([p[name] for p in starts]).requires_grad_() for name in starts[0]}
    method = SideBySide(made, lambda update: sources())
    chain = Parallel(CHAIN, len(SEEDS))
    (together,) = method.updates(chain, stacked, objective, BATCH * len(SEEDS), torch.Generator())
    together = together.unflatten(0, (-1, len(SEEDS), BATCH))  # copy by copy, in each run by run
    for i, (start, source) in enumerate(zip(starts, sources(), strict=True)):
        leaves = {name: p.clone().requires_grad_() for name, p in start.items()}
        returns = made.accumulate(CHAIN, leaves, objective, made.draw(CHAIN, leaves, BATCH, source))
        torch.testing.assert_close(together[:, i].flatten(), returns, rtol=1e-12, atol=1e-14)
        for name, p in leaves.items():
            torch.testing.assert_close(stacked[name].grad[i], p.grad, rtol=1e-10, atol=1e-12)


def test_moved_samples_must_tell_their_runs() -> None:
    chain = Parallel(CHAIN, 2)
    params = initial_parameters(CHAIN, 4, Stream(1))
    unit = {name: torch.zeros(T, 2, *p.shape, dtype=p.dtype) for name, p in params.items()}
    moved = Perturbation(0.1, unit, torch.ones(T, 2))
    x = torch.zeros(2, 2, dtype=torch.float64)
    step_mean(chain, chain.stacked(params), x, 1, torch.arange(2), moved)
    with pytest.raises(ValueError, match="^condition must tell each sample's run"):
        step_mean(chain, chain.stacked(params), x, 1, None, moved)
