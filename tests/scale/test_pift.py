"""PI-FT's experiment through the front: its preset on the tiny Stable Diffusion, and its twin on digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from algorithms.chain import rollout
from algorithms.estimators import first_order
from scale import digits
from scale.config import load_config
from scale.evaluation import read_evaluation
from scale.launch import launch
from scale.logs import read_metrics
from scale.task import build

# The paper's own prompts are longer than what the tiny tokenizer reads.
pytestmark = pytest.mark.filterwarnings("ignore:prompt .* tokens, the model reads the first:UserWarning")
TINY = ["model={kind: tiny}", "reward={name: brightness}", "device=cpu", "training.updates=1", "training.grid=4"]
SHORT = ["training.grid_every=null", "logging.tensorboard=false", "evaluation={samples: 4, batch: 4}"]


def test_the_papers_ten_trajectories_of_fifty_transitions_run_on_tiny(cache: Path, tmp_path: Path) -> None:
    config = load_config("pift-prompts", [*TINY, *SHORT])
    done = launch(config, tmp_path / "run", cache)
    assert (done.update, done.finished) == (1, True)
    assert (config.training.batch, config.sampler.steps, len(config.prompts.train)) == (10, 50, 4)
    assert build(config, cache).chain.steps == 50
    evaluation = read_evaluation(tmp_path / "run")
    assert evaluation.kl_steps == 50
    assert evaluation.kl is not None
    assert evaluation.kl.low > 0  # one update moved the law of the paths


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits' network lies, after ten updates of its training."""
    cache, train = tmp_path_factory.mktemp("digits"), digits.train_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digits", lambda folder, seed, updates: train(folder, seed, 10))
        digits.digits_model(cache)
    return cache


@pytest.mark.parametrize("method", ["first-order", "policy-gradient", "dpok"])
def test_a_larger_coefficient_keeps_the_digits_closer(method: str, digits_cache: Path, tmp_path: Path) -> None:
    kls = []
    for kl in (1e-6, 1e4):
        folder = tmp_path / f"{kl:g}"
        options = [f"kl={kl}", f"method={{name: {method}}}", "sampler.steps=4", "training.updates=3", "device=cpu"]
        features = "evaluation={samples: 16, features: 'scale.evaluation:pooled'}"
        config = load_config("digits-pift", [*options, *SHORT[:2], features])
        launch(config, folder, digits_cache)
        evaluation = read_evaluation(folder)
        assert evaluation.kl is not None
        kls.append(evaluation.kl.mean)
        assert [line["update"] for line in read_metrics(folder)] == [0, 1, 2, 3]
    assert kls[0] > 3 * kls[1] > 0


def test_the_running_cost_of_the_preset_is_pi_fts(digits_cache: Path) -> None:
    """Lemma 2.5 in means, step by step: beta |M - m|^2 / (2 sigma^2), charged at the controlled chain's states."""
    task = build(load_config("digits-pift", ["sampler.steps=4", "device=cpu"]), digits_cache)
    generator = torch.Generator().manual_seed(1)
    params = {k: p + 0.1 * torch.randn(p.shape, generator=generator) for k, p in task.params.items()}
    noise, condition = first_order(4).draw(task.chain, params, 3, task.generator("noise")), task.condition(3)
    roll = rollout(
        task.chain,
        params,
        noise,
        condition,
        cost=lambda mean, x, t: task.objective.cost(task.chain, mean, x, t, condition.steps[t - 1]),
    )
    for t in range(1, 5):
        own = condition.steps[t - 1]
        with torch.no_grad():
            gap = task.chain.mean(params, roll.latents[t], t, own) - task.chain.mean(
                task.params, roll.latents[t], t, own
            )
        wanted = 0.01 * gap.flatten(1).square().sum(1) / (2 * task.chain.std(t) ** 2)
        assert bool((wanted > 0).all())
        assert torch.allclose(roll.costs[t - 1], wanted, rtol=1e-4)
