"""The queue against a loop written anew, whose gradient back-propagates through the whole chain at given latents."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from algorithms.baselines import LeaveOneOut
from algorithms.chain import Noise, Params, StepConditions, rollout
from algorithms.division import Division
from algorithms.estimators import antithetic, first_order, policy_gradient, truncated, with_baseline
from algorithms.objective import Objective, kl_regularised
from algorithms.queue import Queue
from algorithms.training import FromEstimator, Settings, Trainer, fine_tune
from tests.algorithms.nonlinear import Smooth, Tanh, parameters

STEPS, SAMPLES = 6, 5
CHAIN, PARAMS, REWARD = Tanh(STEPS), parameters(), Objective(Smooth())
KL = kl_regularised(REWARD, 0.2, parameters(5))
SETTINGS = Settings(updates=7, samples=SAMPLES, learning_rate=0.05)
LENGTHS = [1, 2, 3, 6]


def generator_for(update: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + update)


@dataclass(frozen=True)
class AtOnce(Tanh):
    """The same chain, which can take all steps in one call."""

    def means(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
        return torch.stack([self.mean(params, at, t, None) for at, t in zip(x, steps.tolist(), strict=True)])


class WrittenAnew:
    """Algorithm 2 with a list of slots, plain ascent and no sweep."""

    def __init__(self, length: int, objective: Objective, rate: float) -> None:
        self.length, self.objective, self.rate = length, objective, rate
        self.slots: list[tuple[Noise, list[Tensor]]] = []

    def move(self, params: Params) -> None:
        for noise, path in self.slots:
            for _ in range(STEPS // self.length):
                t = STEPS + 1 - len(path)
                path.append(CHAIN.mean(params, path[-1], t, None) + CHAIN.std(t) * noise.steps[t - 1])

    def start(self, generator: torch.Generator) -> None:
        noise = first_order(STEPS).draw(CHAIN, PARAMS, SAMPLES, generator)
        self.slots.insert(0, (noise, [CHAIN.initial(noise.initial)]))

    def gradient(self, path: list[Tensor], params: Params) -> Params:
        """Return the gradient of ascent at these latents: values are kept, derivatives are those of the chain."""
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        x, total = path[0], torch.zeros(())
        for i in range(STEPS):
            t = STEPS - i
            mean = CHAIN.mean(leaves, x, t, None)
            cost = self.objective.cost(CHAIN, mean, x, t, None)
            total = total - (0 if cost is None else cost.mean())
            x = path[i + 1] + mean - mean.detach()
        total = total + self.objective.reward(x, None).mean()
        grads = torch.autograd.grad(total, list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def run(self, updates: int) -> Params:
        params = {name: p.clone() for name, p in PARAMS.items()}
        for update in range(1, updates + 1):
            source = generator_for(update)
            if not self.slots:
                for _ in range(self.length):
                    self.start(source)
                    self.move(params)
            _, path = self.slots.pop()
            gradient = self.gradient(path, params)
            self.start(source)
            self.move(params)
            params = {name: p + self.rate * gradient[name] for name, p in params.items()}
        return params


def by_queue(queue: Queue, objective: Objective, updates: int, rate: float, chain: Tanh = CHAIN) -> Params:
    params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    for update in range(1, updates + 1):
        for _ in queue.updates(chain, params, objective, SAMPLES, generator_for(update)):
            with torch.no_grad():
                for p in params.values():
                    assert p.grad is not None
                    p += rate * p.grad
                    p.grad = None
    return {name: p.detach() for name, p in params.items()}


def far(a: Params, b: Params) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("objective", [REWARD, KL], ids=["reward", "with running costs"])
def test_the_queue_is_algorithm_2(length: int, objective: Objective) -> None:
    found = by_queue(Queue(first_order(STEPS), length), objective, 9, 0.05)
    expected = WrittenAnew(length, objective, 0.05).run(9)
    assert far(found, expected) < 1e-12
    assert far(found, PARAMS) > 1e-2
    other = WrittenAnew(2 if length != 2 else 3, objective, 0.05).run(9)
    assert far(found, other) > 1e-4  # the delay shows


@pytest.mark.parametrize("length", LENGTHS)
def test_all_flights_in_one_call_are_one_by_one(length: int) -> None:
    """Of a chain that can take every step at once."""
    queue = Queue(first_order(STEPS), length)
    assert far(by_queue(queue, REWARD, 5, 0.05, AtOnce(STEPS)), WrittenAnew(length, REWARD, 0.05).run(5)) < 1e-12


def test_a_network_is_called_once_for_every_step_of_a_move() -> None:
    calls = []

    @dataclass(frozen=True)
    class Counting(AtOnce):
        def means(self, params: Params, x: Tensor, steps: Tensor) -> Tensor:
            calls.append(steps.tolist())
            return super().means(params, x, steps)

    queue = Queue(first_order(STEPS), 3)
    by_queue(queue, REWARD, 1, 0.05, Counting(STEPS))
    calls.clear()
    by_queue(queue, REWARD, 1, 0.05, Counting(STEPS))
    assert calls == [[6, 4, 2], [5, 3, 1]]


def test_without_a_delay_in_the_parameters_it_is_the_plain_gradient() -> None:
    """The first update's roll-out was made by the initial parameters: the gradient is full back-propagation's."""
    queue, grads = Queue(first_order(STEPS), 3), []
    params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    for _ in queue.updates(CHAIN, params, KL, SAMPLES, generator_for(1)):
        grads.append({name: p.grad for name, p in params.items()})
    noise = first_order(STEPS).draw(CHAIN, PARAMS, SAMPLES, generator_for(1))
    plain = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    returns = first_order(STEPS).accumulate(CHAIN, plain, KL, noise)
    for name, p in plain.items():
        torch.testing.assert_close(grads[0][name], p.grad, rtol=0, atol=1e-13)
    assert len(returns) == SAMPLES


@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "condition of each step"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(cut: int, conditioned: bool) -> None:
    def condition(update: int) -> StepConditions | None:
        source = torch.Generator().manual_seed(update)
        return StepConditions(torch.randn(STEPS, SAMPLES, 3, generator=source).double()) if conditioned else None

    def trainer(updates: int = 7) -> Trainer:
        queue = Queue(first_order(STEPS), 3)
        return Trainer(CHAIN, PARAMS, KL, queue, replace(SETTINGS, updates=updates), generator_for, condition)

    whole = trainer()
    whole.run()
    first, file = trainer(), io.BytesIO()
    first.run(cut)
    torch.save(first.state_dict(), file)
    first.run()  # the state is a copy, which this leaves alone
    file.seek(0)
    second = trainer()
    second.load_state_dict(torch.load(file, weights_only=True))
    second.run()
    assert far(whole.result().params, second.result().params) == 0
    assert vars(whole.result().history) == vars(second.result().history)


@pytest.mark.parametrize("chain", [CHAIN, AtOnce(STEPS)], ids=["one by one", "at once"])
def test_micro_batches_and_processes_change_nothing(chain: Tanh) -> None:
    expected = by_queue(Queue(first_order(STEPS), 2), KL, 4, 0.05, chain)
    assert far(by_queue(Queue(first_order(STEPS), 2, Division(2)), KL, 4, 0.05, chain), expected) < 1e-12

    def shared(rank: int) -> Params:
        """Return what one of two processes adds, on a batch that splits: the sum is the whole's."""
        params = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
        queue = Queue(first_order(STEPS), 2, Division(1, rank, 2))
        for _ in queue.updates(chain, params, KL, 4, generator_for(1)):
            pass
        return {name: p.grad for name, p in params.items() if p.grad is not None}

    whole = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    for _ in Queue(first_order(STEPS), 2).updates(chain, whole, KL, 4, generator_for(1)):
        pass
    one, other = shared(0), shared(1)
    for name, p in whole.items():
        torch.testing.assert_close(one[name] + other[name], p.grad, rtol=0, atol=1e-12)


def test_it_trains() -> None:
    settings = replace(SETTINGS, updates=60, samples=64, learning_rate=0.02)
    run = fine_tune(CHAIN, PARAMS, REWARD, Queue(first_order(STEPS), 3), settings, generator_for)
    direct = fine_tune(CHAIN, PARAMS, REWARD, FromEstimator(first_order(STEPS)), settings, generator_for)
    gain = run.history.mean_return[-1] - run.history.mean_return[0]
    assert gain > 0.7 * (direct.history.mean_return[-1] - direct.history.mean_return[0]) > 0.3


@pytest.mark.parametrize(
    ("estimator", "length", "message"),
    [
        (first_order(STEPS), 0, "length must be >= 1, got 0"),
        (
            with_baseline(policy_gradient(STEPS), LeaveOneOut()),
            2,
            "must use the reward's gradient alone.*'policy gradient'",
        ),
        (antithetic(first_order(STEPS), "chain"), 2, "must use the reward's gradient alone, without copies"),
    ],
)
def test_what_a_queue_cannot_do_is_refused(estimator, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Queue(estimator, length)


def test_a_length_that_does_not_divide_the_horizon_is_refused() -> None:
    with pytest.raises(ValueError, match="length of the queue must divide the chain's T = 6 steps, got 4"):
        by_queue(Queue(first_order(STEPS), 4), REWARD, 1, 0.1)


def test_truncated_gradients_are_taken_too() -> None:
    one, other = (by_queue(Queue(truncated(STEPS, k), 3), REWARD, 3, 0.05) for k in (1, STEPS))
    assert far(other, by_queue(Queue(first_order(STEPS), 3), REWARD, 3, 0.05)) < 1e-13
    assert far(one, other) > 1e-3


def test_a_saved_queue_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be that of the saved queue, 2, got 3"):
        Queue(first_order(STEPS), 3).load_state_dict(Queue(first_order(STEPS), 2).state_dict())


def test_scores_of_other_parameters_are_refused_by_the_sweep() -> None:
    noise = policy_gradient(STEPS).draw(CHAIN, PARAMS, 3, generator_for(1))
    with pytest.raises(ValueError, match="must use column 0 alone for roll-outs that other parameters made"):
        policy_gradient(STEPS).accumulate(CHAIN, PARAMS, REWARD, noise, roll=rollout(CHAIN, PARAMS, noise))
