"""Implicit Diffusion's queue through the front: on digits and the tiny Stable Diffusion, resumed, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from algorithms.estimators import first_order
from algorithms.queue import Queue
from scale import digits
from scale.config import load_config
from scale.evaluation import read_evaluation
from scale.launch import launch
from scale.logs import read_metrics
from scale.methods import make_method
from scale.task import build

SHORT = ["sampler.steps=4", "method.options.length=2", "device=cpu", "training.grid_every=null", "training.batch=4"]
SHORT += ["logging.tensorboard=false", "evaluation={samples: 8, batch: 8, features: 'scale.evaluation:pooled'}"]


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits' network lies, after ten updates of its training."""
    cache, train = tmp_path_factory.mktemp("digits"), digits.train_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digits", lambda folder, seed, updates: train(folder, seed, 10))
        digits.digits_model(cache)
    return cache


def test_the_preset_is_algorithm_2_with_four_batches(digits_cache: Path) -> None:
    config = load_config("digits-implicit", ["device=cpu"])
    task = build(config, digits_cache)
    method, estimator = make_method(config.method, task.chain, task.params, task.objective, task.generator("pilot"))
    assert isinstance(method, Queue)
    assert (method.length, method.estimator.name, estimator) == (4, first_order(32).name, None)
    assert len(task.objective.running_costs) == 1  # the KL divergence by Girsanov: charged at every step


@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_a_stopped_run_is_resumed_bit_for_bit(micro_batch: str, digits_cache: Path, tmp_path: Path) -> None:
    """The batches in flight are in the checkpoint."""
    options = [*SHORT, f"training.micro_batch={micro_batch}", "training.checkpoint_every=2"]
    launch(load_config("digits-implicit", [*options, "training.updates=5"]), tmp_path / "whole", digits_cache)
    launch(load_config("digits-implicit", [*options, "training.updates=2"]), tmp_path / "cut", digits_cache)
    launch(
        load_config("digits-implicit", [*options, "training.updates=5"]), tmp_path / "cut", digits_cache, resume=True
    )
    seen = [[(m["update"], m["reward/mean"]) for m in read_metrics(tmp_path / name)[1:]] for name in ("whole", "cut")]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 5
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_brightness_rises_on_a_queue(digits_cache: Path, tmp_path: Path) -> None:
    launch(load_config("digits-implicit", [*SHORT, "training.updates=8", "kl=0"]), tmp_path, digits_cache)
    evaluation = read_evaluation(tmp_path)
    assert evaluation.difference.low > 0
    assert evaluation.kl is not None
    assert evaluation.kl.low > 0


def test_colour_images_become_redder(tmp_path: Path) -> None:
    """A pixel model of three channels, from a folder as diffusers checkpoints are (CIFAR-10's reward, section 5.2)."""
    images, labels = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
    recipe = digits.Recipe(updates=5, batch=8, block_out_channels=(8, 16))
    digits.train_unet(images, labels, tmp_path / "model", 0, recipe)
    model = f"model={{kind: pixel, path: {tmp_path / 'model'}}}"
    plain = "evaluation={samples: 8, batch: 8, features: 'scale.evaluation:pooled'}"
    options = [model, "reward={name: redness}", "prompts.train=['0', '1']", *SHORT[:-1], plain, "kl=0", "lora=null"]
    options += ["training.learning_rate=1e-3", "training.updates=10"]
    launch(load_config("digits-implicit", options), tmp_path / "run", tmp_path / "cache")
    evaluation = read_evaluation(tmp_path / "run")
    assert evaluation.difference.low > 0


@pytest.mark.filterwarnings("ignore:prompt .* tokens, the model reads the first:UserWarning")
def test_it_runs_on_the_latents_of_stable_diffusion(cache: Path, tmp_path: Path) -> None:
    """The tiny one, for redness, with prompts of its own for every batch in flight."""
    options = ["model={kind: tiny}", "reward={name: redness}", "lora={rank: 2}", *SHORT, "training.updates=2"]
    done = launch(load_config("digits-implicit", options), tmp_path, cache)
    assert (done.update, done.finished) == (2, True)
    first, *rest = (line["reward/mean"] for line in read_metrics(tmp_path)[1:])
    assert all(torch.tensor([first, *rest]).isfinite())


def test_a_length_that_does_not_divide_the_steps_is_refused_at_load() -> None:
    with pytest.raises(ValueError, match="length of the queue must divide the 32 sampling steps, got 5"):
        load_config("digits-implicit", ["method.options.length=5"])
