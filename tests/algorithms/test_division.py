"""However a batch is divided, over micro-batches and over processes, its gradient is the whole batch's."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.baselines import LeaveOneOut
from algorithms.chain import ParameterNoise, StepConditions
from algorithms.credit import Credit, half_order
from algorithms.division import WHOLE, Division
from algorithms.estimators import (
    Estimator,
    antithetic,
    stratified_truncation,
    with_baseline,
    with_redrawn_noise,
    zeroth_order,
)
from algorithms.losses import DPOK, PPO, DraftLV
from algorithms.objective import Objective, kl_regularised
from algorithms.rlr import rlr
from algorithms.training import FromEstimator
from tests.algorithms.nonlinear import Smooth, Tanh, parameters


class Renoisable(Tanh):
    def renoise(self, x0, noise):
        return 0.9 * x0 + 0.3 * noise


CHAIN, PARAMS = Renoisable(steps=3), parameters()
REWARD = Objective(Smooth())
KL = kl_regularised(REWARD, 0.2, parameters(5))
SAMPLES = 12
CONDITION = StepConditions(torch.linspace(-1, 1, 3 * SAMPLES * 3, dtype=torch.float64).reshape(3, SAMPLES, 3))


def mixture():
    w = half_order(3, 2).matrices[0]
    w[:, -1] = [0.3, 0.0, -0.5]
    other = half_order(3, 1).matrices[0]
    return Estimator("mixture", Credit([w, other], [0.3, 0.7]), ParameterNoise(0.2))


ESTIMATORS = {
    "mixture": with_baseline(mixture(), LeaveOneOut()),
    "rlr": with_redrawn_noise(with_baseline(rlr(3, 1, 0.1, reading="II", zeroth="antithetic"), LeaveOneOut())),
    "srt": stratified_truncation([0.5, 0.3, 0.2]),
    "zeroth order": antithetic(zeroth_order(3, 0.1), "parameters"),
}
METHODS = {
    **{name: lambda division, e=e: FromEstimator(e, division) for name, e in ESTIMATORS.items()},
    "ppo": lambda division: PPO(0.1, epochs=2, minibatches=3, group=4, division=division),
    "ppo, leave-one-out": lambda division: PPO(0.1, advantage="leave-one-out", division=division),
    "dpok": lambda division: DPOK(LeaveOneOut(), division),
    "draft-lv": lambda division: DraftLV(2, division),
}


class Processes:
    """Threads in the place of processes: they meet at a barrier to exchange tensors."""

    def __init__(self, world):
        self.world, self.barrier, self.held = world, threading.Barrier(world, timeout=60), [None] * world

    def exchange(self, rank, value):
        self.held[rank] = value.clone()
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found

    def division(self, rank, micro_batch):
        return Division(
            micro_batch,
            rank,
            self.world,
            gather=lambda value: torch.cat(self.exchange(rank, value)),
            add=lambda value: torch.stack(self.exchange(rank, value)).sum(0),
        )

    def run(self, work):
        found, faults = [None] * self.world, []

        def task(rank):
            try:
                found[rank] = work(rank)
            except Exception as fault:  # a thread's exception would be lost
                faults.append(fault)
                self.barrier.abort()

        threads = [threading.Thread(target=task, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]
        return found


def outcome(method, division, objective):
    """Gradients of every optimizer step (the parameters stay) and the returns."""
    at = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    found = []
    for returns in METHODS[method](division).updates(
        CHAIN, at, objective, SAMPLES, torch.Generator().manual_seed(3), CONDITION
    ):
        found.append((returns, {name: p.grad for name, p in at.items()}))
        for p in at.values():
            p.grad = None
    return found


def assert_same(found, whole):
    assert len(found) == len(whole)
    for (returns, grads), (all_returns, all_grads) in zip(found, whole, strict=True):
        torch.testing.assert_close(returns.sort().values, all_returns.sort().values)
        for name in grads:
            torch.testing.assert_close(grads[name], all_grads[name], rtol=1e-10, atol=1e-12)


@given(method=st.sampled_from(sorted(METHODS)), micro=st.integers(1, SAMPLES), kl=st.booleans())
def test_micro_batches_are_one_batch(method, micro, kl):
    objective = KL if kl else REWARD
    assert_same(outcome(method, Division(micro), objective), outcome(method, WHOLE, objective))


@given(method=st.sampled_from(sorted(METHODS)), world=st.sampled_from([2, 3]), micro=st.sampled_from([None, 1, 3]))
def test_processes_give_the_gradient_of_one(method, world, micro):
    processes = Processes(world)
    found = processes.run(lambda rank: outcome(method, processes.division(rank, micro), KL))
    for one in found:
        assert_same(one, outcome(method, WHOLE, KL))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0][1].values(), found[1][0][1].values(), strict=True))


def test_a_baseline_of_the_own_share_alone_would_be_noticed():
    processes = Processes(2)

    def share_alone(rank):
        blind = replace(processes.division(rank, None), gather=lambda value: value)
        estimator = with_baseline(mixture(), LeaveOneOut())
        at = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
        noise = estimator.draw(CHAIN, PARAMS, SAMPLES, torch.Generator().manual_seed(3))
        # What a process that forgets the others does: its own samples' baseline.
        own = blind.own(SAMPLES)
        estimator.accumulate(CHAIN, at, REWARD, noise.of(own), StepConditions(CONDITION.steps[:, own]))
        return torch.cat([p.grad.flatten() for p in at.values()])

    alone = torch.stack(processes.run(share_alone)).mean(0)
    whole = torch.cat([g.flatten() for g in outcome("mixture", WHOLE, REWARD)[0][1].values()])
    assert not torch.allclose(alone, whole, rtol=1e-3)


def test_redrawn_noise_is_the_same_whenever_it_is_asked_for():
    estimator = with_redrawn_noise(zeroth_order(3, 0.1))
    noise = estimator.draw(CHAIN, PARAMS, 5, torch.Generator().manual_seed(0))
    for name, xi in noise.parameters.items():
        assert xi[1].shape == (5, *PARAMS[name].shape)
        assert torch.equal(xi[1], xi[1])
        assert torch.equal((-xi)[1], -(xi[1]))
        some = torch.tensor([3, 0])
        assert torch.equal(xi[:, some][2], xi[2][some])
        assert not torch.equal(xi[0], xi[1])
        assert not torch.equal(xi[0][0], xi[0][1])
    drawn = torch.cat([noise.parameters[name][t].flatten() for name in PARAMS for t in range(3)])
    assert abs(float(drawn.mean())) < 0.35  # 180 numbers: 4.7 standard deviations
    assert abs(float(drawn.std()) - 1) < 0.25


def test_redrawn_noise_gives_the_gradient_of_the_same_noise_kept():
    estimator = ESTIMATORS["rlr"]
    noise = estimator.draw(CHAIN, PARAMS, 6, torch.Generator().manual_seed(0))
    kept = replace(noise, parameters={k: torch.stack([xi[t] for t in range(3)]) for k, xi in noise.parameters.items()})
    found = [estimator.per_sample(CHAIN, PARAMS, KL, each) for each in (noise, kept)]
    for name in PARAMS:
        assert torch.equal(found[0][name], found[1][name])


def test_bad_divisions_are_refused():
    with pytest.raises(ValueError, match="micro_batch must be >= 1 or None, got 0"):
        Division(0)
    with pytest.raises(ValueError, match=r"rank must lie in 0..world - 1, got rank = 2, world = 2"):
        Division(None, 2, 2)
    with pytest.raises(ValueError, match="samples must be a multiple of the 3 processes, got 4"):
        Division(None, 0, 3).own(4)
