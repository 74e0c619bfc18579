"""The six ways on short runs: addressed streams, repetitions of their own, the cache, and which way they move."""

from pathlib import Path

import numpy as np
import pytest

from theory import gibbs
from toy.implicit_experiments import RELEASED, SCRATCH, Course, Way, run
from verdicts.streams import Stream

STREAM = Stream(7).child("tests", "implicit-experiments")


def short(way: Way, cache: Path, updates: int = 40, repetitions: int = 2, **changes: object) -> Course:
    return run(RELEASED, way, updates, STREAM, cache, repetitions, particles=200, points=4, **changes)  # type: ignore[arg-type]


def test_what_a_course_holds(tmp_path: Path) -> None:
    found = short(Way(), tmp_path)
    assert found.updates.tolist() == [0, 10, 20, 30, 40]
    assert found.thetas.shape == (5, 2, 6)
    assert found.particles.shape == (5, 200, 2)
    x = found.particles[-1].astype(float)
    assert found.rewards[-1, 0] == pytest.approx(gibbs.RELEASED.reward(x).mean(), abs=1e-6)
    last = found.thetas[-1, 0].astype(float)
    assert found.likelihoods[-1, 0] == pytest.approx(gibbs.RELEASED.mixture.log_density(x, last).mean(), abs=1e-5)
    assert found.thetas[0].tolist() == [list(RELEASED.start)] * 2


def test_a_run_is_loaded_the_second_time(tmp_path: Path) -> None:
    first, seen = short(Way(), tmp_path), []
    again = short(Way(), tmp_path, progress=lambda done, total: seen.append(done))
    assert not seen
    for name, value in vars(first).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    short(Way(), tmp_path, progress=lambda done, total: seen.append((done, total)), updates=8)
    assert seen == [(0, 8), (2, 8), (4, 8), (6, 8), (8, 8)]


def test_repetitions_differ_and_streams_are_addresses(tmp_path: Path) -> None:
    found = short(Way(), tmp_path / "a")
    assert not np.allclose(found.thetas[-1, 0], found.thetas[-1, 1], atol=1e-4)
    np.testing.assert_array_equal(short(Way(), tmp_path / "b").thetas, found.thetas)
    other = run(RELEASED, Way(), 40, STREAM.child("other"), tmp_path, 2, particles=200, points=4)
    assert not np.allclose(other.thetas[-1], found.thetas[-1], atol=1e-4)


@pytest.mark.parametrize(
    ("way", "moves"),
    [
        (Way(), True),
        (Way(5), True),
        (Way(5, "unrolled"), True),
        (Way(gradient=None), False),
        (Way(gradient=None, guidance=10.0), False),
    ],
)
def test_parameters_move_where_they_should_and_the_reward_rises(way: Way, moves: bool, tmp_path: Path) -> None:
    found = short(way, tmp_path, updates=100)
    assert np.array_equal(found.thetas[-1], found.thetas[0]) != moves
    if moves:
        rho = gibbs.component_rewards(gibbs.RELEASED.mixture, gibbs.RELEASED.reward)
        before, after = (-gibbs.objective(rho, found.thetas[k, 0].astype(float)) for k in (0, -1))
        assert after > before + 1e-4
    if way.guidance:
        assert found.rewards[-1].mean() > short(Way(gradient=None), tmp_path, updates=100).rewards[-1].mean() + 0.05


def test_the_planted_sign_descends_the_reward(tmp_path: Path) -> None:
    up, down = (short(Way(sign=sign), tmp_path, updates=100).thetas[-1].mean(0) for sign in (1.0, -1.0))
    assert up[0] > RELEASED.start[0] > down[0]


def test_training_from_samples_of_the_target_lowers_the_divergence(tmp_path: Path) -> None:
    found = run(SCRATCH, Way(gradient="reference"), 100, STREAM, tmp_path, 2, particles=200, points=4)
    mixture = gibbs.SoftmaxMixture(gibbs.hexagon_with_origin(4.0), 1.0)
    kl = [gibbs.kl(mixture, SCRATCH.target, theta.astype(float)) for theta in found.thetas[:, 0]]
    assert kl[0] == pytest.approx(5.955895162684, abs=1e-6)  # from an independent derivation
    assert all(np.diff(kl) < 0)


def test_bad_points_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="points must be >= 1 and divide updates = 40, got 7"):
        run(RELEASED, Way(), 40, STREAM, tmp_path, points=7)
