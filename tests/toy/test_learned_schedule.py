"""Algorithm 6 in the plane: its levels are what they say, gradients of F have the right sign, and budgets are equal."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from toy import learned_schedule as learned
from toy.distances import sliced_wasserstein2
from toy.few_step import DATA
from toy.learned_schedule import Clouds, Plan, Trained, learn, quality, samples, schedule, search, train
from toy.schedule_learning import SCALES
from verdicts.streams import Stream

RUNS = 3
SMALL = Plan(updates=12, inner=4, initial=40, width=16, points=512, batch=32, readings=128, samples=64, step=0.5)


@cache
def problem(plan: Plan = SMALL) -> Clouds:
    return Clouds("swiss_roll", RUNS, plan, Stream(5))


@cache
def run(gradient: str = "pathwise") -> Trained:
    return learn(problem(), schedule(RUNS), gradient)  # type: ignore[arg-type]


def test_distance_is_the_squared_sliced_distance_from_the_points() -> None:
    plan = replace(SMALL, points=64)  # one block, so that quantiles are those of the points
    clouds, numbers = Clouds("two_moons", 1, plan, Stream(1)), np.random.default_rng(0)
    cloud = numbers.normal(size=(64, 2))
    expected = sliced_wasserstein2(cloud, clouds.points[0].numpy(), numbers, 20_000) ** 2
    found = float(clouds.distance(torch.from_numpy(cloud).float()[None], (1,))[0])
    assert found == pytest.approx(expected, rel=0.01)


def test_quantiles_are_means_over_blocks() -> None:
    clouds = problem()
    expected = [(clouds.points[0, i : i + 64] @ clouds.directions)[:, 3].sort().values for i in range(0, 512, 64)]
    torch.testing.assert_close(clouds.quantiles[0, :, 3], torch.stack(expected).mean(0))


@pytest.mark.parametrize(("draw", "size"), [((3, 1), 32), ((3,), 128)])
def test_batches_hold_training_points_and_one_time_in_each_part(draw: tuple[int, ...], size: int) -> None:
    data, noise, times = problem().batch(draw)
    assert data.shape == noise.shape == (RUNS, size, 2)
    assert ((times - 1) * size // SMALL.T - torch.arange(size)).abs().max() <= 1
    assert times.min() >= 1
    assert times.max() <= SMALL.T
    known = problem().points
    assert all(bool((data[i, j] == known[i]).all(1).any()) for i in range(RUNS) for j in range(5))
    torch.testing.assert_close(problem().batch(draw)[1], noise, rtol=0, atol=0)


def test_network_depends_on_time_and_on_its_own_run_alone() -> None:
    u = learned.initial_network(RUNS, 16, Stream(2))
    x, times = torch.randn(RUNS, 4, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 300, 600, 1000])
    first = learned.network(u, x, times, 1000)
    assert not torch.allclose(first[:, 0], learned.network(u, x, times.flip(0), 1000)[:, 0])
    moved = {n: torch.cat([p[:1], p[1:] + 1]) for n, p in u.items()}
    second = learned.network(moved, x, times, 1000)
    torch.testing.assert_close(second[0], first[0])
    assert not torch.allclose(second[1], first[1])


def test_pathwise_gradient_of_the_schedule_is_that_of_differences() -> None:
    clouds = problem()
    u = {n: p.double() for n, p in train(clouds, schedule(RUNS)).u.items()}
    # In float64, where differences are exact enough; tau = 1.5 and end = 0.9 lie inside the range.
    x = {n: p.double() for n, p in schedule(RUNS, tau=1.5, end=0.9, epsilon=0.02).items()}
    noise = clouds.noise((1,)).double()

    def value(x: dict[str, torch.Tensor]) -> torch.Tensor:
        out = clouds.upper.sample(x, u, noise)
        projected = (out @ clouds.directions.double()).sort(1).values
        return (projected - clouds.quantiles.double()).square().mean((1, 2))

    def network(u: dict[str, torch.Tensor], x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return learned.network(u, x, times.double(), SMALL.T)

    clouds = Clouds("swiss_roll", RUNS, SMALL, Stream(5))
    clouds.upper.network = network
    told = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        moved = {n: p.clone().requires_grad_() for n, p in x.items()}
        grads = torch.autograd.grad(value(moved).sum(), list(moved.values()))
        for (n, p), grad in zip(x.items(), grads, strict=True):
            up, down = (value({**x, n: p + sign * 1e-6}) for sign in (1, -1))
            torch.testing.assert_close(grad, (up - down) / 2e-6, rtol=1e-4, atol=1e-7)
    finally:
        torch.set_default_dtype(told)


def test_budgets_are_counted_and_equal() -> None:
    base, found = train(problem(), schedule(RUNS)), run()
    assert base.network_updates == found.network_updates == 40 + 2 * 4 * 12
    assert base.sampler_calls == 0
    assert found.sampler_calls == 2 * 12  # f's gradients in x and in u
    assert run("mixed").sampler_calls == 3 * 12  # a pair for x
    assert search(problem(), 2, 2).network_updates == found.network_updates


def test_network_steps_are_as_many_as_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam, closure: None = None) -> None:
        nonlocal made
        made += 1
        step(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    plan = replace(SMALL, updates=3)
    train(problem(plan), schedule(RUNS))
    assert made == plan.network_updates
    made = 0
    learn(problem(plan), schedule(RUNS))
    assert made == plan.network_updates + plan.updates  # and the schedule's own


def test_learning_lowers_the_distance_from_a_bad_schedule_and_a_training_of_the_same_length_does_not() -> None:
    plan = replace(SMALL, updates=30, inner=6, initial=150, S=4)
    clouds, bad = problem(plan), schedule(RUNS, tau=3.0)
    fixed, found = train(clouds, bad), learn(clouds, bad)
    assert bool((quality(clouds, found) < quality(clouds, fixed)).all())
    assert bool((found.x["tau"] < 3).all())


def test_path_starts_at_the_start_and_ends_at_the_schedule_within_its_range() -> None:
    found = run()
    for n, path in found.path.items():
        assert path.shape == (SMALL.updates + 1, RUNS)
        torch.testing.assert_close(path[0], schedule(RUNS)[n])
        torch.testing.assert_close(path[-1], found.x[n], rtol=0, atol=0)
        assert bool(((path[1:] - path[:-1]).abs() < 10 * SMALL.step * SCALES[n]).all())
    assert float(found.x["end"].max()) <= 1
    assert float(found.x["tau"].min()) > 0.5


def test_search_takes_the_candidate_of_the_smallest_value() -> None:
    clouds = problem()
    best = quality(clouds, search(clouds, 3, 3))
    assert bool((best <= quality(clouds, search(clouds, 1, 3)) + 1e-9).all())  # the first of the three


def test_a_network_that_is_trained_samples_nearer_to_the_data() -> None:
    clouds = problem(replace(SMALL, initial=200, S=10))
    fresh = DATA["swiss_roll"](500, np.random.default_rng(1))

    def far(trained: Trained) -> float:
        return sliced_wasserstein2(samples(clouds, trained, 500)[0].double().numpy(), fresh, np.random.default_rng(2))

    x = schedule(RUNS)
    assert far(train(clouds, x)) < 0.7 * far(Trained(x, clouds.initial, 0))
