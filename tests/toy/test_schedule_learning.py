"""Gaussian data: the exact predictor, the loss without sampling, and the sampler's quality against theory."""

import math

import numpy as np
import pytest
import torch

from algorithms.schedule_learning import Quality, ScoreMatching
from algorithms.schedules import Family
from theory.ddpm import ddim_law, minimal_score_matching_loss
from theory.gaussian import Gaussian
from theory.schedule_learning import ScheduleProblem
from toy.schedule_learning import MEAN, STD, GaussianData, Lower

T, S = 50, 6
FAMILY = Family("cosine", T, "released", {"start": 0.2})
PROBLEM = GaussianData(FAMILY, S)
DATA = Gaussian.diagonal(MEAN, np.square(STD))
X = {"end": torch.tensor([0.9, 0.7], dtype=torch.float64), "tau": torch.tensor([2.0, 1.0], dtype=torch.float64)}
THEORY = ScheduleProblem(DATA, "cosine", "released", T, S)


def grad(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def full(i):
    return (0.2, float(X["end"][i]), float(X["tau"][i]), 0.008)


def crosses(draw):
    """Four points with mean zero and unit covariance of n - 1, of two runs."""
    return math.sqrt(1.5) * torch.cat([torch.eye(2), -torch.eye(2)]).double().expand(2, 4, 2)


def test_levels_are_those_of_theory_and_follow_x():
    found = PROBLEM.levels(X)
    assert found.shape == (2, S, 1)
    for i in range(2):
        np.testing.assert_allclose(found[i, :, 0].numpy(), THEORY.levels(full(i)), rtol=1e-10)
    assert PROBLEM.levels(X) is found
    other = {n: v.clone() for n, v in X.items()}
    other["tau"] += 1
    assert not torch.allclose(PROBLEM.levels(other), found)
    tracked = {n: v.clone().requires_grad_() for n, v in X.items()}
    assert PROBLEM.levels(tracked).requires_grad


def test_best_predictor_solves_the_lower_level_at_the_least_loss():
    u = {n: p.requires_grad_() for n, p in PROBLEM.best(X).items()}
    loss = PROBLEM.loss(X, u, (1,))
    grads = torch.autograd.grad(loss.sum(), list(u.values()))
    assert all(float(g.abs().max()) < 1e-12 for g in grads)
    for i in range(2):
        levels = THEORY.levels(full(i))
        least = np.mean(minimal_score_matching_loss(DATA, levels) / levels) / 2  # the loss of v, per number
        assert loss[i].item() == pytest.approx(least, rel=1e-10)
    moved = {n: p.detach() + 0.1 for n, p in u.items()}
    assert bool((PROBLEM.loss(X, moved, (1,)) > loss).all())


def test_loss_is_the_mean_of_score_matching_over_the_sampler_s_times():
    generator = torch.Generator().manual_seed(0)
    u = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in PROBLEM.best(X).items()}
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    data = (torch.tensor(MEAN) + torch.tensor(STD) * signs[:, :1]).expand(2, 4, 2)
    noise = signs[:, 1:].expand(2, 4, 2)
    found = torch.zeros(2).double()
    for t in PROBLEM.times:
        lower = ScoreMatching(FAMILY, PROBLEM.network, lambda draw, t=t: (data, noise, t.expand(4)))
        found += lower(X, u, (1,)) / S
    torch.testing.assert_close(found, PROBLEM.loss(X, u, (1,)), rtol=1e-12, atol=0.0)


def test_sampler_with_the_best_predictor_has_the_law_and_the_distance_of_theory():
    upper = Quality(FAMILY, PROBLEM.network, PROBLEM.distance, crosses, S)
    samples = upper.sample(X, PROBLEM.best(X), crosses((1,)))
    found = upper(X, PROBLEM.best(X), (1,))
    for i in range(2):
        law = ddim_law(DATA, THEORY.levels(full(i)))
        np.testing.assert_allclose(samples[i].mean(0).numpy(), law.mean, rtol=1e-10)
        np.testing.assert_allclose(samples[i].var(0).numpy(), np.diag(law.cov), rtol=1e-9)
        assert found[i].item() == pytest.approx(THEORY.objective(full(i)), rel=1e-9)


def test_gradient_through_predictor_and_sampler_is_that_of_theory():
    x = {n: v.clone().requires_grad_() for n, v in X.items()}
    upper = Quality(FAMILY, PROBLEM.network, PROBLEM.distance, crosses, S)
    upper(x, PROBLEM.best(x), (1,)).sum().backward()
    for i in range(2):
        _, end, tau, _ = THEORY.gradient(full(i))
        assert grad(x["end"])[i].item() == pytest.approx(end, rel=1e-8)
        assert grad(x["tau"])[i].item() == pytest.approx(tau, rel=1e-8)


def test_runs_are_independent():
    x = {n: v.clone() for n, v in X.items()}
    x["tau"][1] = 3.0
    u, v = PROBLEM.best(X), PROBLEM.best(x)
    assert all(torch.equal(u[n][0], v[n][0]) and not torch.equal(u[n][1], v[n][1]) for n in u)
    assert torch.equal(PROBLEM.loss(X, u, (1,))[0], PROBLEM.loss(x, u, (1,))[0])


def test_gradient_by_hand_is_autograds():
    u = {
        n: v + 0.1 * torch.linspace(-1, 1, v.numel(), dtype=v.dtype).reshape(v.shape)
        for n, v in PROBLEM.best(X).items()
    }
    leaves = {n: v.clone().requires_grad_() for n, v in u.items()}
    PROBLEM.loss(X, leaves, (1,)).sum().backward()
    found = Lower(PROBLEM).gradient(X, u, (1,), "u")
    for n, leaf in leaves.items():
        torch.testing.assert_close(found[n], grad(leaf), rtol=1e-12, atol=1e-15)
