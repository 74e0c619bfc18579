"""Algorithm 6 on digits: its distance, that it trains what the baseline trains, its costs, and clear errors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scale.digits import digit_split
from scale.learned_schedule import DEFAULT, FrechetTo, LearnedSchedule, PixelMLP, Setting, Trained, learn, train
from scale.metrics import frechet_distance
from verdicts.streams import Stream

SMALL = Setting(T=50, S=3, updates=3, first=4, inner=2, batch=16, wide=32, samples=20, gamma=1e4)


def corners(images):
    return torch.stack([images[:, 0, 2:4, 2], images[:, 0, 5, 3:5]], 1).flatten(1)


def problem(setting=SMALL, seed=1, features=corners):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = PixelMLP(width=16)
    return LearnedSchedule(digit_split("train")[0][:200], features, module, setting, Stream(seed))


def test_the_distance_is_that_of_the_metrics():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 5, generator=generator, dtype=torch.float64) * s + 1 for n, s in ((40, 1.0), (30, 0.3)))
    assert float(FrechetTo(a)(b)) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert float(FrechetTo(a)(a)) == pytest.approx(0, abs=1e-9)


def test_the_distance_has_its_gradient():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (20, 8))
    distance, b = FrechetTo(a), b.requires_grad_()
    assert torch.autograd.gradcheck(distance, (b,))


def test_a_dead_feature_does_not_make_the_gradient_nan():
    a, b = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    b = (b * torch.tensor([1.0, 1.0, 0.0])).requires_grad_()
    (grad,) = torch.autograd.grad(FrechetTo(a)(b), b)
    assert bool(torch.isfinite(grad).all())


def test_a_run_that_cannot_move_the_schedule_trains_what_the_baseline_trains():
    still = replace(SMALL, rate=1e-300)
    one, other = learn(problem(still)), train(problem(still))
    assert {n: float(v) for n, v in one.x.items()} == pytest.approx(DEFAULT, abs=1e-15)
    for name, weights in other.u.items():
        torch.testing.assert_close(one.u[name], weights, rtol=0, atol=0)


@pytest.mark.parametrize("pull", ["pathwise", "zeroth-order"])
def test_the_cost_is_two_trainings_and_the_sampler(pull):
    s = replace(SMALL, pull=pull)
    alone, bilevel = train(problem(s)), learn(problem(s))
    assert alone.images == s.steps * s.batch == (4 + 3 * 2) * 16
    calls = 2 + (1 if pull == "pathwise" else 2)
    updates = s.updates + 1
    assert bilevel.images == 2 * alone.images + updates * (2 * s.wide + calls * s.S * s.samples)


def test_a_run_moves_the_schedule_within_its_range_and_repeats():
    one, other = learn(problem()), learn(problem())
    assert one.path == other.path
    assert one.path != learn(problem(seed=2)).path
    assert [len(path) for path in one.path.values()] == [SMALL.updates + 2] * 3
    for name, path in one.path.items():
        assert path[0] == path[1] == DEFAULT[name]  # the initial epoch leaves it
        assert path[-1] == float(one.x[name]) != DEFAULT[name]
    SMALL.family.values(one.x)


def test_the_baseline_keeps_its_schedule():
    trained = train(problem(), {"tau": 1.5})
    assert {n: float(v) for n, v in trained.x.items()} == DEFAULT | {"tau": 1.5}


def test_the_sampler_returns_the_clean_image_of_an_exact_network():
    """Of one image a network that knows it predicts v exactly, and every schedule's samples are that image."""
    made = problem()
    clean = 2 * made.images[0] - 1

    def exact(u, x, times):
        level = made.setting.family(made_x)[times][:, None, None, None]
        noise = (x - level.sqrt() * clean) / (1 - level).sqrt()
        return level.sqrt() * noise - (1 - level).sqrt() * clean

    made_x = {name: torch.tensor(v, dtype=torch.float64) for name, v in (DEFAULT | {"end": 0.8}).items()}
    made.upper.network = exact
    images = made.sample(Trained(made_x, {}, {}, 0, 0.0), torch.randn(4, 1, 8, 8))
    np.testing.assert_allclose(images, made.images[:1].expand(4, 1, 8, 8), atol=1e-5)


def test_training_lowers_the_loss_it_is_said_to_lower():
    made = problem(replace(SMALL, first=300, batch=64, average=0.0))
    trained = train(made)
    before, after = (float(made.lower(trained.x, u, (9,))) for u in (made.initial(), trained.u))
    assert after < 0.75 * before


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("updates", 0, "updates must be >= 1, got 0"),
        ("samples", 0, "samples must be >= 1, got 0"),
        ("S", 1, "S must lie in"),
        ("gamma", 0.0, "gamma must be positive"),
        ("rate", float("nan"), "rate must be positive"),
        ("average", 1.0, "average must lie in"),
        ("pull", "none", "pull must be"),
    ],
)
def test_settings_out_of_range(name, value, rule):
    with pytest.raises(ValueError, match=rule):
        replace(SMALL, **{name: value})


def test_too_few_samples_for_a_distance():
    with pytest.raises(ValueError, match="samples is 4, must be at least d \\+ 1 = 5"):
        problem(replace(SMALL, samples=4))
    with pytest.raises(ValueError, match="reference has 200 samples, must have at least d \\+ 1 = 257"):
        problem(features=lambda images: images.flatten(1).repeat(1, 4))


def test_a_schedule_out_of_range():
    with pytest.raises(ValueError, match="tau must be positive"):
        train(problem(), {"tau": -1.0})
