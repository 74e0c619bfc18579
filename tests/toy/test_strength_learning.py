"""Algorithm 2 on samples, against the optima of the closed form and against a loop written out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from toy.strength_learning import Plan, tune
from verdicts.streams import Stream

STREAM = Stream(8).child("strength")


def case_b(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """N(0, 1), r1 = x - x^2/2, r2 = 2x - x^2/2: the optimum is 3/5."""
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    return x - x**2 / 2, 2 * x - x**2 / 2


PLAN = Plan(512, updates=120, late=40)


def test_finds_the_optimum_from_both_sides():
    found = tune(case_b, (0.25, 2.0), PLAN, 8, STREAM).found
    np.testing.assert_allclose(found, 0.6, rtol=0.05)


def test_released_direction_does_not():
    plan = dataclasses.replace(PLAN, direction="reverse", effective=0.0)
    assert (tune(case_b, (0.25, 2.0), plan, 4, STREAM).found < 0.06).all()


def test_average_is_of_the_last_strengths_and_starts_share_samples():
    done = tune(case_b, (0.5, 1.5, 0.5), Plan(64, updates=7, late=3, effective=0.0), 4, STREAM)
    assert done.path.shape == (8, 3, 4)
    assert done.refused.shape == (7, 3, 4)
    np.testing.assert_array_equal(done.path[0], np.repeat([[0.5], [1.5], [0.5]], 4, 1))
    np.testing.assert_allclose(done.found, done.path[-3:].mean(0), rtol=1e-12)
    np.testing.assert_array_equal(done.path[:, 0], done.path[:, 2])
    assert (np.ptp(done.path[-1], axis=1) > 0).all()  # runs have their own samples


def test_path_is_adam_on_the_weighted_divergences():
    """One run, in numpy."""
    plan, gamma = Plan(200, updates=6, late=1, rate=0.3, halving=2.0, effective=0.0), 100.0
    strength, first, second, expected = 1.5, 0.0, 0.0, [1.5]
    for update in range(1, 7):
        generator = torch.Generator().manual_seed(STREAM.child("samples", update).integer())
        r1, r2 = (r.numpy() for r in case_b(generator, 200))

        def divergence(reward, strength=strength):
            w = np.exp(reward / strength)
            w /= w.sum()
            return float(w @ np.log(200 * w))

        g = gamma * (divergence(r1 / gamma + r2) - divergence(r2))
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        step = first / (1 - 0.9**update) / (math.sqrt(second / (1 - 0.999**update)) + 1e-8)
        strength = max(strength - 0.3 / (1 + (update - 1) / 2.0) * step, 0.05)
        expected.append(strength)
    done = tune(case_b, (1.5,), plan, 1, STREAM)
    np.testing.assert_allclose(done.path[:, 0, 0], expected, rtol=1e-9)


def test_gate_is_recorded_and_stops_the_run():
    done = tune(case_b, (1.0,), Plan(64, updates=4, late=1, effective=63.9), 2, STREAM)
    assert done.refused.all()
    assert (done.path == 1.0).all()
    assert not tune(case_b, (1.0,), Plan(64, updates=4, late=1, effective=2.0), 2, STREAM).refused.any()


@pytest.mark.parametrize("late", [0, 8])
def test_bad_input(late):
    with pytest.raises(ValueError, match=rf"late must lie in \[1, updates\], got {late} of 7"):
        tune(case_b, (1.0,), Plan(64, updates=7, late=late), 1, STREAM)
