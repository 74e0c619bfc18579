"""The torch denoisers against their exact twins: laws, gradients, the queue; and the cubature's moments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from algorithms.chain import rollout
from algorithms.estimators import first_order
from algorithms.losses import AnyStep
from algorithms.objective import Objective
from algorithms.queue import Queue
from theory import queue as exact
from theory.gaussian import Gaussian
from theory.girsanov import AffineScores, Drift, discrete_adjoint, euler_paths
from toy.denoisers import Denoiser, Miss, Nothing, affine, by_queue, cubature, of_a_gaussian, two_wells

LINEAR = Denoiser(of_a_gaussian, 6, 1.5, dim=2)
THETA = {"theta": torch.tensor([0.7, -1.1], dtype=torch.float64)}


def average(values: torch.Tensor) -> np.ndarray:
    return values.mean(0).numpy()


def test_the_linear_denoiser_has_the_law_of_its_twin() -> None:
    twin = exact.LinearDenoiser(6, 1.5, 0.0)
    last = rollout(LINEAR, THETA, cubature(LINEAR)).latents[0]
    means = twin.response * THETA["theta"].numpy()
    np.testing.assert_allclose(average(last), means, rtol=0, atol=1e-13)
    np.testing.assert_allclose(average((last - torch.tensor(means)) ** 2), twin.variances[-1], rtol=0, atol=1e-13)
    silent = replace(LINEAR, start=(0.0, 0.0), noise=0.0)
    np.testing.assert_allclose(rollout(silent, THETA, cubature(silent)).latents[0][3], means, rtol=0, atol=1e-13)


def test_the_affine_denoiser_has_the_laws_of_its_twin() -> None:
    chain = Denoiser(affine, 5, 1.0, start=(0.4, 1.3))
    params = {"slope": torch.tensor(0.3, dtype=torch.float64), "shift": torch.tensor(-0.2, dtype=torch.float64)}
    laws = AffineScores([[[-0.7]]] * 5, [[-0.2]] * 5, 0.2).laws(Gaussian.scalar(0.4, 1.69))
    latents = rollout(chain, params, cubature(chain)).latents
    for law, states in zip(laws, latents.flip(0), strict=True):
        np.testing.assert_allclose(average(states), law.mean, rtol=0, atol=1e-13)
        np.testing.assert_allclose(average((states - law.mean[0]) ** 2), law.cov[0], rtol=0, atol=1e-13)


def test_the_two_wells_have_the_paths_and_the_gradient_of_their_twin() -> None:
    chain, drift = Denoiser(two_wells, 8, 2.0), Drift(0.7, 0.3)
    params = {"theta": torch.tensor([0.7, 0.3], dtype=torch.float64)}
    noise = first_order(8).draw(chain, params, 4, torch.Generator().manual_seed(1))
    latents = rollout(chain, params, noise).latents.flip(0)[..., 0].T.numpy()
    increments = 0.5 * noise.steps.flip(0)[..., 0].T.numpy()
    paths = euler_paths(drift, noise.initial[:, 0].numpy(), increments, 0.25)
    np.testing.assert_allclose(latents, paths, rtol=0, atol=1e-13)
    found = first_order(8).per_sample(chain, params, Objective(Miss(0.5)), noise)["theta"]
    slope = -(paths[:, -1] - 0.5)
    np.testing.assert_allclose(found, discrete_adjoint(drift, paths, 0.25, slope), rtol=0, atol=1e-12)


def test_all_steps_at_once_are_the_steps_one_by_one() -> None:
    assert isinstance(LINEAR, AnyStep)
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    together = LINEAR.means(THETA, x, torch.tensor([6, 4, 1]))
    for i, t in enumerate((6, 4, 1)):
        torch.testing.assert_close(together[i], LINEAR.mean(THETA, x[i], t, None), rtol=0, atol=1e-15)


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_the_queue_of_a_silent_denoiser_is_the_delay_equation(slots: int) -> None:
    silent, twin = replace(LINEAR, start=(0.0, 0.0), noise=0.0), exact.LinearDenoiser(6, 1.5, 1.0)
    start, rates = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.1, 0.4]).double()
    queue, source = Queue(first_order(6), slots), torch.Generator().manual_seed(2)
    found = by_queue(queue, silent, Objective(Miss(1.0)), start, rates, 9, 1, source).numpy()
    for i in range(2):
        rate, first = float(rates[i]), float(start[i])
        printed = exact.trajectory(twin, exact.delay_kernel(twin, slots), rate, first, 9)
        np.testing.assert_allclose(found[:, i], printed, rtol=0, atol=1e-12)
        released = exact.trajectory(twin, exact.delay_kernel(twin, slots, "released"), rate, first, 9)
        assert np.abs(found[:, i] - released).max() > 1e-2


def test_the_cubature_has_the_moments_of_normal_noise() -> None:
    noise = cubature(LINEAR)
    numbers = torch.cat([noise.initial[None], noise.steps]).movedim(1, 0).flatten(1)
    assert numbers.shape == (28, 14)
    np.testing.assert_allclose(average(numbers), 0, atol=1e-15)
    second = numbers.T @ numbers / len(numbers)
    np.testing.assert_allclose(second, np.eye(14), rtol=0, atol=1e-14)
    assert average(numbers**4)[0] == pytest.approx(14)  # not 3: of degree 4 it is wrong


def test_nothing_is_a_reward_of_no_gradient() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    value = Nothing()(x, None)
    value.sum().backward()
    assert x.grad is not None
    assert value.tolist() == [0.0] * 3
    assert x.grad.abs().max() == 0
