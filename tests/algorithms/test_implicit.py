"""The single loop against NumPy loops written anew with the same noise, and against finite differences."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.chain import Params
from algorithms.implicit import (
    BLOCK,
    Guided,
    ImplicitDiffusion,
    KLFromReference,
    Langevin,
    MinusReward,
    UnrolledReward,
    Weighted,
)
from verdicts.streams import Stream

STREAM = Stream(7).child("tests", "implicit")
A, C = 1.5, 2.0


def quadratic(params: Params, x: torch.Tensor) -> torch.Tensor:
    return 0.5 * A * (x - params["theta"][:, None]).square().sum(-1)


class Bowl:
    """V = L x^2 / 2 with a known curvature."""

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def __call__(self, params: Params, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.largest * (x - params["theta"][:, None]).square().sum(-1)

    def curvature(self, params: Params) -> float:
        return self.largest


def reward(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x - C).square().sum(-1)


def source(repetition: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed(STREAM.child(repetition, block).integer())


def noise(repetition: int, steps: int, n: int) -> np.ndarray:
    """Return the noise of the first steps, (steps, n), as the loop draws it."""
    drawn = [
        torch.randn(BLOCK, n, 1, generator=source(repetition, b), dtype=torch.float64)
        for b in range(math.ceil(steps / BLOCK))
    ]
    return torch.cat(drawn)[:steps, :, 0].numpy()


def start(repetitions: int = 1, n: int = 40) -> tuple[Params, torch.Tensor]:
    particles = torch.from_numpy(STREAM.child("start").generator().standard_normal((repetitions, n, 1)))
    return {"theta": torch.full((repetitions, 1), -1.0, dtype=torch.float64)}, particles


def sgd(rate: float) -> Any:
    return lambda tensors: torch.optim.SGD(tensors, lr=rate)


def loop(**changes: Any) -> ImplicitDiffusion:
    params, particles = start(changes.pop("repetitions", 1))
    arguments: dict[str, Any] = {
        "sampler": Langevin(quadratic, 0.1),
        "loss": MinusReward(reward),
        "params": params,
        "particles": particles,
        "optimizer": sgd(0.02),
        "generator_for": source,
        **changes,
    }
    return ImplicitDiffusion(**arguments)


def written_anew(
    order: str, inner: int, restart: bool, updates: int, unbiased: bool = True
) -> tuple[float, np.ndarray]:
    """Return theta and the particles, by a loop over scalars' formulas."""
    _, particles = start()
    first = particles[0, :, 0].numpy()
    x, theta = first.copy(), -1.0
    z = iter(noise(0, updates * inner, len(x)))

    def covariance(x: np.ndarray, theta: float) -> float:
        r, slope = -0.5 * (x - C) ** 2, -A * (x - theta)
        return float(np.cov(r, slope, ddof=1 if unbiased else 0)[0, 1])

    for _ in range(updates):
        gamma, at = 0.1, theta
        gradient = covariance(x, theta)
        if restart:
            x = first.copy()
        for _ in range(inner):
            x = x - gamma * A * (x - at) + math.sqrt(2 * gamma) * next(z)
        if order == "released":
            gradient = covariance(x, theta)
        theta = theta - 0.02 * gradient
    return theta, x


@pytest.mark.parametrize(
    ("order", "inner", "restart"),
    [
        ("printed", 1, False),
        ("released", 1, False),
        ("printed", 3, False),
        ("released", 3, False),
        ("released", 3, True),
    ],
)
def test_the_loop_is_algorithm_1_and_its_relatives(order: str, inner: int, restart: bool) -> None:
    run = loop(order=order, inner=inner, restart=restart)
    run.run(60)
    theta, x = written_anew(order, inner, restart, 60)
    assert float(run.params["theta"].detach()) == pytest.approx(theta, abs=1e-12)
    np.testing.assert_allclose(run.particles[0, :, 0].numpy(), x, atol=1e-12)
    other, _ = written_anew("released" if order == "printed" else "printed", inner, False, 60)
    assert abs(other - theta) > 1e-4


def test_the_released_covariance_divides_by_n() -> None:
    run = loop(loss=MinusReward(reward, unbiased=False))
    run.run(20)
    assert float(run.params["theta"].detach()) == pytest.approx(
        written_anew("printed", 1, False, 20, False)[0], abs=1e-12
    )
    assert abs(written_anew("printed", 1, False, 20)[0] - written_anew("printed", 1, False, 20, False)[0]) > 1e-3


def test_the_covariance_has_the_sign_of_the_gradient() -> None:
    """A long run ends where the reward is largest."""
    run = loop()
    run.run(1500)
    assert float(run.params["theta"].detach()) == pytest.approx(C, abs=0.5)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_unrolling_is_the_derivative_of_the_last_steps(last: int) -> None:
    """Against a difference quotient: the particles before the last steps are held fixed."""
    run = loop(loss=UnrolledReward(reward, last), inner=3, order="released", optimizer=sgd(1.0))
    run.run(1)
    _, particles = start()
    z, gamma = noise(0, 3, 40), 0.1

    def end(theta: float) -> float:
        x = particles[0, :, 0].numpy()
        for i in range(3):
            at = theta if i >= 3 - last else -1.0
            x = x - gamma * A * (x - at) + math.sqrt(2 * gamma) * z[i]
        return float(np.mean(-0.5 * (x - C) ** 2))

    slope = (end(-1 + 1e-5) - end(-1 - 1e-5)) / 2e-5
    assert float(run.params["theta"].detach()) == pytest.approx(-1 + slope, abs=1e-8)
    assert slope > 0.1


def test_unrolling_differentiates_what_depends_on_both() -> None:
    """V = cos(theta x): the second derivative in x and theta is needed, and through two steps that in x twice."""

    def potential(params: Params, x: torch.Tensor) -> torch.Tensor:
        return (params["theta"][:, None] * x).cos().sum(-1)

    run = loop(sampler=Langevin(potential, 0.1), loss=UnrolledReward(reward, 2), inner=2, order="released")
    run.run(1)
    _, particles = start()
    z = noise(0, 2, 40)

    def end(theta: float) -> float:
        x = particles[0, :, 0].numpy()
        for i in range(2):
            x = x + 0.1 * theta * np.sin(theta * x) + math.sqrt(0.2) * z[i]
        return float(np.mean(-0.5 * (x - C) ** 2))

    slope = (end(-1 + 1e-5) - end(-1 - 1e-5)) / 2e-5
    assert float(run.params["theta"].detach()) == pytest.approx(-1 + 0.02 * slope, abs=1e-9)


def test_kl_from_a_reference_is_descended() -> None:
    """For V = a (x - theta)^2 / 2 the gradient a (theta - mean of the reference) at p's own mean needs no samples."""
    points = torch.full((1, 7, 1), 0.7, dtype=torch.float64)
    run = loop(loss=KLFromReference(lambda update: points), optimizer=sgd(0.05))
    run.run(1)
    _, particles = start()
    gradient = -A * (0.7 + 1) + A * (float(particles.mean()) + 1)
    assert float(run.params["theta"].detach()) == pytest.approx(-1 - 0.05 * gradient, abs=1e-12)
    run.run(1999)
    assert float(run.params["theta"].detach()) == pytest.approx(0.7, abs=0.4)


def test_weighted_losses_add() -> None:
    points = torch.full((1, 7, 1), 0.7, dtype=torch.float64)
    single = (MinusReward(reward), KLFromReference(lambda update: points))
    moved = []
    for loss in (*single, Weighted(((2.0, single[0]), (-0.5, single[1])))):
        run = loop(loss=loss, optimizer=sgd(1.0))
        run.run(1)
        moved.append(float(run.params["theta"].detach()) + 1)
    assert moved[2] == pytest.approx(2 * moved[0] - 0.5 * moved[1], abs=1e-12)


def test_a_covariance_beside_an_unrolled_loss_keeps_to_its_particles() -> None:
    """The unrolled loss brings particles with a graph; Gamma must not follow it."""
    points = torch.full((1, 7, 1), 0.7, dtype=torch.float64)
    unrolled = UnrolledReward(reward)
    for other in (MinusReward(reward), KLFromReference(lambda update: points)):
        moved = []
        for loss in (other, unrolled, Weighted(((1.0, other), (1.0, unrolled)))):
            run = loop(loss=loss, optimizer=sgd(1.0), order="released")
            run.run(1)
            moved.append(float(run.params["theta"].detach()) + 1)
        assert moved[2] == pytest.approx(moved[0] + moved[1], abs=1e-12)


def test_guidance_changes_the_law_that_is_sampled() -> None:
    """V - strength R is quadratic here too: its mean is known."""
    strength = 3.0
    run = loop(sampler=Langevin(Guided(quadratic, reward, strength), 0.05), loss=None, optimizer=None, repetitions=200)
    run.run(300)
    mean = (A * -1.0 + strength * C) / (A + strength)
    assert float(run.particles.mean()) == pytest.approx(mean, abs=0.05)
    assert float(run.params["theta"].abs().max()) == 1


def test_a_repetition_does_not_depend_on_the_others() -> None:
    together = loop(repetitions=3)
    together.run(70)
    _, particles = start(3)
    alone = loop(
        params={"theta": torch.full((1, 1), -1.0, dtype=torch.float64)},
        particles=particles[2:],
        generator_for=lambda repetition, block: source(2, block),
    )
    alone.run(70)
    torch.testing.assert_close(together.params["theta"][2:], alone.params["theta"], rtol=0, atol=1e-12)
    assert float(together.params["theta"].detach()[:2].diff(dim=0).abs()) > 1e-4


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_is_resumed_bit_for_bit(optimizer: str) -> None:
    made = sgd(0.02) if optimizer == "sgd" else lambda tensors: torch.optim.Adam(tensors, lr=0.02)
    whole = loop(optimizer=made, inner=3, order="released", restart=True)
    whole.run(41)
    first = loop(optimizer=made, inner=3, order="released", restart=True)
    first.run(17)  # in the middle of a block of noise
    second = loop(optimizer=made, inner=3, order="released", restart=True)
    second.load_state_dict(first.state_dict())
    second.run(24)
    assert torch.equal(whole.particles, second.particles)
    assert torch.equal(whole.params["theta"], second.params["theta"])
    assert second.done == 41


def test_the_callback_sees_every_update() -> None:
    seen: list[tuple[int, float]] = []
    run = loop(callback=lambda update, params, x: seen.append((update, float(params["theta"]))))
    run.run(3)
    run.run(2)
    assert [update for update, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert seen[0][1] == -1
    assert len({theta for _, theta in seen}) == 6


def test_the_given_tensors_are_left_alone() -> None:
    params, particles = start()
    before = particles.clone()
    run = loop(params=params, particles=particles)
    run.run(3)
    assert torch.equal(particles, before)
    assert float(params["theta"]) == -1


def test_what_is_beyond_stability_is_refused_where_it_is_known() -> None:
    with pytest.raises(ValueError, match=r"gamma must be < 2 / L = 0\.5 for this potential, got 0\.5"):
        loop(sampler=Langevin(Bowl(4.0), 0.5))
    loop(sampler=Langevin(Bowl(4.0), 0.49))


@pytest.mark.parametrize("curvature", [25.0, -1.0], ids=["gamma beyond stability", "not integrable"])
def test_divergence_is_reported_where_it_is_not_known(curvature: float) -> None:
    def potential(params: Params, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * curvature * (x - params["theta"][:, None]).square().sum(-1)

    run = loop(sampler=Langevin(potential, 0.1), loss=None, optimizer=None)
    with pytest.raises(FloatingPointError, match=r"update \d+: the particles have left"):
        run.run(1000)


def test_nan_is_reported() -> None:
    def potential(params: Params, x: torch.Tensor) -> torch.Tensor:
        return (x - 100).sqrt().sum(-1)  # not a number where the particles are

    with pytest.raises(FloatingPointError, match="particles have left: max .x. = nan"):
        loop(sampler=Langevin(potential, 0.1), loss=None, optimizer=None).run(1)
    with pytest.raises(FloatingPointError, match="params theta are not finite"):
        loop(loss=MinusReward(lambda x: x.sum(-1) / 0)).run(1)


def test_a_covariance_needs_two_particles() -> None:
    run = loop(particles=torch.zeros(1, 1, 1))
    with pytest.raises(ValueError, match="particles must be >= 2 a repetition for a covariance, got 1"):
        run.run(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": {}}, "params must hold at least one tensor, got none"),
        ({"params": {"theta": torch.zeros(3, 1)}}, r"params must have as many repetitions .* 1, theta is \(3, 1\)"),
        ({"inner": 0}, "inner must be >= 1, got 0"),
        ({"order": "gauss-seidel"}, "order must be 'printed' or 'released', got 'gauss-seidel'"),
        ({"restart": True}, "order must be 'released' for a restarted or unrolled loop"),
        ({"loss": UnrolledReward(reward)}, "order must be 'released' for a restarted or unrolled loop"),
        (
            {"loss": UnrolledReward(reward, 2), "order": "released"},
            "inner must be >= the loss's 2 unrolled steps, got 1",
        ),
        ({"loss": None}, "optimizer must be given exactly with loss"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**changes)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be positive and finite, got 0"):
        Langevin(quadratic, 0.0)
    with pytest.raises(ValueError, match="unrolled must be >= 1, got 0"):
        UnrolledReward(reward, 0)
    with pytest.raises(ValueError, match=r"state must have the shapes of this run, particles \(1, 40, 1\)"):
        loop().load_state_dict(loop(repetitions=2).state_dict())
