"""The learned sampler: reproducible, cached, and better than an untrained one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms.chain import Params, rollout
from algorithms.estimators import first_order
from theory import schedules
from toy.data import DATA
from toy.ddpm import MLPChain, initial_parameters, train
from toy.experiments import generator
from verdicts.streams import Stream
from verdicts.two_sample import two_sample

SCHEDULE = schedules.linear(6, 0.05, 0.5)
STREAM = Stream(3).child("tests", "ddpm")
CLOUD = DATA["three_modes"](600, STREAM.child("cloud").generator())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MLPChain, Params, Path]:
    cache = tmp_path_factory.mktemp("cache")
    return (*train("three_modes", SCHEDULE, STREAM, cache, width=24, updates=400), cache)


def same(a: Params, b: Params) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def untrained(chain: MLPChain) -> Params:
    return initial_parameters(chain, 24, STREAM)


def test_training_again_without_the_cache_gives_the_same_numbers(tmp_path: Path) -> None:
    chain, first = train("two_moons", SCHEDULE, STREAM, tmp_path / "a", width=8, updates=20)
    _, again = train("two_moons", SCHEDULE, STREAM, tmp_path / "b", width=8, updates=20)
    _, other = train("two_moons", SCHEDULE, STREAM.child("other"), tmp_path / "a", width=8, updates=20)
    assert same(first, again)
    assert not same(first, other)
    assert not same(first, initial_parameters(chain, 8, STREAM))
    assert len(list((tmp_path / "a").iterdir())) == 2  # and nothing temporary is left behind


def test_cached_file_is_used_and_holds_what_was_trained(
    trained: tuple[MLPChain, Params, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params, cache = trained
    monkeypatch.setattr("toy.ddpm._fit", lambda *arguments: pytest.fail("trained although the cache holds the result"))
    chain, loaded = train("three_modes", SCHEDULE, STREAM, cache, width=24, updates=400)
    assert same(params, loaded)
    assert torch.equal(chain.alpha_bar, torch.tensor(SCHEDULE.alpha_bar))


@pytest.mark.parametrize("change", [{"data": "two_moons"}, {"width": 9}, {"updates": 4}])
def test_every_part_of_the_recipe_has_its_own_file(change: dict[str, object], tmp_path: Path) -> None:
    recipe = {
        "data": "three_modes",
        "schedule": SCHEDULE,
        "stream": STREAM,
        "cache": tmp_path,
        "width": 8,
        "updates": 3,
    }
    train(**recipe)
    train(**(recipe | change))
    assert len(list(tmp_path.iterdir())) == 2


def test_other_schedule_has_its_own_file(tmp_path: Path) -> None:
    for last in (0.5, 0.4):
        train("three_modes", schedules.linear(6, 0.05, last), STREAM, tmp_path, width=8, updates=3)
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data must be one of .*'swiss_roll'.*, got 'rolls'$"):
        train("rolls", SCHEDULE, STREAM, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def denoising_loss(chain: MLPChain, params: Params) -> float:
    """Mean squared error of the predicted noise on fresh data, all steps alike; 1 for the prediction zero."""
    source = torch.Generator().manual_seed(STREAM.child("loss").integer())
    clean = torch.tensor(np.repeat(CLOUD, 6, 0))
    t = torch.arange(1, 7).repeat(len(CLOUD))
    noise = torch.randn(clean.shape, generator=source, dtype=torch.float64)
    level = chain.alpha_bar[t - 1][:, None]
    predicted = chain.epsilon(params, level.sqrt() * clean + (1 - level).sqrt() * noise, t.double())
    return float((predicted - noise).square().mean())


def test_training_lowers_the_denoising_loss(trained: tuple[MLPChain, Params, Path]) -> None:
    chain, params, _ = trained
    loss = denoising_loss(chain, params)
    assert loss < 0.7 < 1 < denoising_loss(chain, untrained(chain))


def test_samples_come_closer_to_the_data(trained: tuple[MLPChain, Params, Path]) -> None:
    chain, params, _ = trained
    noise = first_order(6).draw(chain, params, 600, generator(STREAM.child("samples"), 0))

    def distance(p: Params) -> float:
        samples = rollout(chain, p, noise).latents[0].numpy()
        return two_sample(samples, CLOUD, STREAM.child("distance"), permutations=1).statistic

    assert distance(params) < distance(untrained(chain)) / 5


def test_step_is_the_ancestral_step_of_the_predicted_noise() -> None:
    chain = MLPChain.of(SCHEDULE)
    params, t = untrained(chain), 4
    x = torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=torch.float64)
    beta, level = SCHEDULE.beta[t - 1], SCHEDULE.alpha_bar[t - 1]
    epsilon = chain.epsilon(params, x, torch.tensor([4.0, 4.0], dtype=torch.float64))
    expected = (x - beta / np.sqrt(1 - level) * epsilon) / np.sqrt(1 - beta)
    np.testing.assert_allclose(chain.mean(params, x, t, None), expected, rtol=1e-13)
    assert chain.std(t) == pytest.approx(np.sqrt(beta), rel=1e-15)
    assert not torch.equal(epsilon, chain.epsilon(params, x, torch.tensor([3.0, 3.0], dtype=torch.float64)))
