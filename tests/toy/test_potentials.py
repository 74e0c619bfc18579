"""Potentials and rewards against theory's, which share no code with them."""

import numpy as np
import pytest
import torch

from algorithms.implicit import ImplicitDiffusion, KLFromReference, Langevin, MinusReward
from theory import gibbs
from toy.implicit_experiments import PRINTED, RELEASED
from toy.potentials import (
    HalfPlaneBump,
    Nearness,
    Scaled,
    SoftmaxMixture,
    SquareNearness,
    Translated,
    hexagon,
)
from verdicts.streams import Stream

STREAM = Stream(7).child("tests", "potentials")
POINTS = 4 * STREAM.child("points").generator().standard_normal((2, 50, 2))
THETA = STREAM.child("theta").generator().standard_normal((2, 6))


@pytest.mark.parametrize("variance", [1.0, 0.5])
def test_the_mixture_is_theorys(variance: float) -> None:
    """Repetition by repetition: value, derivatives by autograd and in closed form, and density."""
    ours, exact = SoftmaxMixture(hexagon(3.0), variance), gibbs.SoftmaxMixture(gibbs.hexagon(3.0), variance)
    x = torch.from_numpy(POINTS).requires_grad_()
    params = {"theta": torch.from_numpy(THETA).requires_grad_()}
    weight = torch.from_numpy(STREAM.child("weight").generator().standard_normal((2, 50)))
    energy = ours(params, x)
    (slope,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
    (pull,) = torch.autograd.grad((weight * energy).sum(), params["theta"])
    with torch.no_grad():
        known, pulled = ours.slope(params, x), ours.pull(params, x, weight)
    torch.testing.assert_close(known, slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(pulled, {"theta": pull}, rtol=0, atol=1e-12)
    for r in range(2):
        np.testing.assert_allclose(energy[r].detach(), exact.potential(POINTS[r], THETA[r]), atol=1e-12)
        np.testing.assert_allclose(slope[r], exact.grad_x(POINTS[r], THETA[r]), atol=1e-12)
        forces = exact.grad_theta(POINTS[r], THETA[r])
        np.testing.assert_allclose(pull[r], (weight[r, :, None].numpy() * forces).sum(0), atol=1e-12)
        density = ours.log_density(params, x)[r].detach()
        np.testing.assert_allclose(density, exact.log_density(POINTS[r], THETA[r]), atol=1e-12)


@pytest.mark.parametrize("loss", ["reward", "reference"])
def test_losses_take_the_closed_form_where_there_is_one(loss: str) -> None:
    """One update by closed form is one by autograd, of the same potential with its closed forms hidden."""
    mixture = SoftmaxMixture(hexagon(3.0), 1.0)
    source = torch.Generator().manual_seed(1)
    reference = torch.randn(2, 30, 2, generator=source, dtype=torch.float64) + 1
    moved = []
    for potential in (mixture, lambda params, x: mixture(params, x)):
        loop = ImplicitDiffusion(
            Langevin(potential, 0.1),
            MinusReward(RELEASED.reward) if loss == "reward" else KLFromReference(lambda update: reference),
            {"theta": torch.from_numpy(THETA)},
            torch.from_numpy(POINTS),
            lambda tensors: torch.optim.SGD(tensors, lr=1.0),
            lambda repetition, block: torch.Generator().manual_seed(repetition),
        )
        loop.run(3)
        moved.append(loop.params["theta"].detach() - torch.from_numpy(THETA))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-12)
    assert float(moved[0].abs().max()) > 1e-3


@pytest.mark.parametrize("origin", [False, True])
def test_the_hexagon_is_theorys(origin: bool) -> None:
    exact = gibbs.hexagon_with_origin(4.0) if origin else gibbs.hexagon(4.0)
    np.testing.assert_allclose(hexagon(4.0, origin), exact, atol=1e-12)


def test_the_reward_is_theorys() -> None:
    exact = gibbs.HalfPlaneReward([4.0, 3.8], 20.0, 2.5)
    found = HalfPlaneBump((4.0, 3.8), 20.0, 2.5)(torch.from_numpy(POINTS))
    np.testing.assert_allclose(found, [exact(x) for x in POINTS], atol=1e-14)
    assert 0 < float((found == 0).double().mean()) < 1


def test_the_smooth_reward_tends_to_the_sharp_one_and_has_a_gradient_across_the_edge() -> None:
    sharp, x = HalfPlaneBump((1.0, 0.0), 2.0, 1.0), torch.from_numpy(POINTS)
    near = HalfPlaneBump((1.0, 0.0), 2.0, 1.0, smooth=1e-3)(x)
    np.testing.assert_allclose(near, sharp(x), atol=1e-6)
    edge = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(HalfPlaneBump((1.0, 0.0), 2.0, 1.0, smooth=0.5)(edge).sum(), edge)
    height = np.exp(-0.5)
    assert float(slope[0, 0, 0]) == pytest.approx(height * (0.25 / 0.5 + 0.5), abs=1e-12)  # (gate times bump)'


def test_the_settings_are_theorys() -> None:
    """Two places hold the constants, on purpose: the exact room and the sampled one share no code."""
    printed = gibbs.printed(4.0, 0.2, 0.1)
    for ours, exact in ((RELEASED, gibbs.RELEASED), (PRINTED, printed)):
        assert ours.variance == exact.mixture.variance
        assert ours.start == exact.theta0
        assert (ours.gamma, ours.rate) == (exact.gamma, exact.eta)
        assert (*ours.reward.centre, ours.reward.width, ours.reward.scale) == (
            *exact.reward.goal,
            exact.reward.tau,
            exact.reward.alpha,
        )


def test_the_quadratic_problems_by_hand() -> None:
    x = torch.tensor([[[1.0, 3.0]], [[2.0, 0.0]]], dtype=torch.float64)
    theta = {"theta": torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)}
    assert Translated(2.0)(theta, x).tolist() == [[5.0], [2.0]]
    assert Scaled()({"theta": torch.zeros(2, 1, dtype=torch.float64)}, x).tolist() == [[5.0], [2.0]]
    assert Nearness(1.0, 3.0)(x).tolist() == [[-6.0], [-3.0]]
    assert SquareNearness(4.0)(x).tolist() == [[-18.0], [0.0]]


def test_curvatures_bound_the_step() -> None:
    for potential, params, bound in (
        (SoftmaxMixture(hexagon(4.0), 0.5), {"theta": torch.zeros(1, 6)}, 1.0),
        (Translated(4.0), {"theta": torch.zeros(1, 1)}, 0.5),
        (Scaled(), {"theta": torch.tensor([[0.0], [np.log(8.0)]])}, 0.25),
    ):
        Langevin(potential, 0.99 * bound).check(params)
        with pytest.raises(ValueError, match=rf"gamma must be < 2 / L = {bound:g}"):
            Langevin(potential, 1.01 * bound).check(params)


def test_a_law_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stiffness must be > 0, or exp\(-V\) is not integrable, got -1"):
        Langevin(Translated(-1.0), 0.1).check({"theta": torch.zeros(1, 1)})
