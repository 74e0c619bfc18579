"""Shortcut fine-tuning through the front: on digits, on the tiny Stable Diffusion, resumed, and refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import verifine
from algorithms.chain import Noise, rollout
from algorithms.critics import CriticReward, MLPCritic, MLPValue, gradient_penalty
from algorithms.objective import Objective
from scale import checkpoints, digits, evaluation
from scale.cluster import submit
from scale.config import NOT_IN_DIGEST, Config, digest, load_config
from scale.critics import ConvCritic, default_widths, halvings
from scale.evaluation import read_evaluation
from scale.launch import Launched, launch, load_run
from scale.logs import read_metrics
from scale.methods import METHODS
from scale.processes import Processes
from scale.shortcut import ShortcutRun, encoded, make_shortcut, training_data
from scale.task import build
from tests.scale.conftest import normal

FAST = ["device=cpu", "training.updates=3", "training.checkpoint_every=1", "logging.tensorboard=false"]
FAST += ["training={batch: 6, micro_batch: 3, grid: 4, grid_every: 3, learning_rate: 1e-3, updates: 3, keep: 5}"]
FAST += ["training.checkpoint_every=1", "sampler.steps=3", "evaluation={samples: 40, batch: 20}"]
PG = "method={name: sft-pg, options: {critic_steps: 2, generator_steps: 2, batches: clipped}}"
LINES = {"update", "critic/value", "critic/penalty", "return/mean", "gradient/norm", "samples"}


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the digits' network lies, after ten updates of its training."""
    cache, train = tmp_path_factory.mktemp("digits"), digits.train_digits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_digits", lambda folder, seed, updates: train(folder, seed, 10))
        digits.digits_model(cache)
    return cache


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of eight small pictures."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for i in range(16):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02}.png")
    return folder


def on_digits(*more: str) -> Config:
    return load_config("digits-brightness", ["prompts.held_out=null", PG, *FAST, *more])


def on_tiny(photos: Path, *more: str) -> Config:
    return load_config("tiny-brightness", ["prompts.held_out=null", PG, *FAST, f"data.folder={photos}", *more])


def same_state(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the bit, tensors and numbers alike."""
    if isinstance(b, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in b:
            same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_state(x, y, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Launched]:
    config, folder = on_digits(), tmp_path_factory.mktemp("whole") / "run"
    return config, folder, launch(config, folder, digits_cache)


# A run


def test_a_run_on_digits_leaves_all_that_other_runs_leave(whole: tuple[Config, Path, Launched]) -> None:
    config, folder, done = whole
    assert (done.update, done.finished) == (3, True)
    assert done.weights is not None
    assert done.weights.is_file()
    lines = read_metrics(folder)
    assert [line["update"] for line in lines] == [0, 1, 2, 3]
    assert all(set(line) - {"images"} == LINES for line in lines[1:])
    assert [line["samples"] for line in lines[1:]] == [18, 36, 54]  # two batches for the critic, one for the sampler
    assert all(line["gradient/norm"] > 0 and line["critic/penalty"] > 0 for line in lines[1:])
    assert (folder / "images/samples-000003.png").is_file()
    held = checkpoints.load(folder / "checkpoints", digest(config)).state
    same_state(done.params, held["generator"]["params"])
    assert load_config(folder / "config.yaml") == config


def test_its_critic_and_its_baseline_have_learned(whole: tuple[Config, Path, Launched], digits_cache: Path) -> None:
    config, folder, _ = whole
    _, start = make_shortcut(build(config, digits_cache))
    held = checkpoints.load(folder / "checkpoints", digest(config)).state["adversary"]
    for before, after in ((start.params, held["critic"]), (start.value_params, held["value"])):
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before)


def test_its_evaluation_is_against_digits_that_nothing_has_learned_from(
    whole: tuple[Config, Path, Launched],
) -> None:
    found = read_evaluation(whole[1])
    assert found.frechet.reference == "held-out digits"
    assert (found.frechet.samples, found.frechet.features) == (40, "digit classifier")
    assert found.frechet.against == len(evaluation.digits_like(list(range(8)), "test")) == 224
    assert found.frechet.floor is not None
    assert found.frechet.base is not None
    assert found.frechet.base > found.frechet.floor.high  # a network of ten updates makes no digits
    held_out, learned = (evaluation.digits_like(list(range(8)), part) for part in ("test", "train"))
    both = torch.cat([held_out, learned]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both)


def test_a_killed_run_goes_on_bit_for_bit(
    whole: tuple[Config, Path, Launched], digits_cache: Path, tmp_path: Path
) -> None:
    config, wanted, _ = whole
    folder = Path(shutil.copytree(wanted, tmp_path / "copy"))
    for file in ("weights.safetensors", "evaluation.json", "evaluation.png", "images/samples-000003.png"):
        (folder / file).unlink()
    for update in (2, 3):  # killed in the second update, with the log's line written and no checkpoint
        (folder / f"checkpoints/checkpoint-{update:06d}.pt").unlink()
    assert launch(config, folder, digits_cache, resume=True).finished
    for update in (1, 2, 3):
        a, b = (f / f"checkpoints/checkpoint-{update:06d}.pt" for f in (folder, wanted))
        same_state(checkpoints.load(a, digest(config)).state, checkpoints.load(b, digest(config)).state)
    for file in ("metrics.jsonl", "weights.safetensors", "evaluation.json", "evaluation.png"):
        assert (folder / file).read_bytes() == (wanted / file).read_bytes(), file


def test_a_run_loads_again(whole: tuple[Config, Path, Launched], digits_cache: Path) -> None:
    _, folder, done = whole
    _, params, update = load_run(folder, digits_cache)
    assert update == 3
    same_state(params, done.params)


METHOD_OPTIONS = {
    "sft": "{critic_steps: 1, critic: mlp, regulariser: gradient-penalty}",
    "sft-pg": "{critic_steps: 1, value_widths: null, regulariser: spectral, batches: buffer}",
}


@pytest.mark.parametrize("name", METHOD_OPTIONS)
def test_it_runs_on_the_latents_of_stable_diffusion(name: str, photos: Path, cache: Path, tmp_path: Path) -> None:
    method = f"method={{name: {name}, options: {METHOD_OPTIONS[name]}}}"
    config = on_tiny(photos, method, "training.updates=2", "kl=0.1", "training.ema=0.5")
    done = launch(config, tmp_path / "run", cache)
    assert done.weights == tmp_path / "run/lora/pytorch_lora_weights.safetensors"
    assert done.evaluation is not None
    assert done.evaluation.kl is not None
    assert done.evaluation.kl.mean > 0
    assert any("learned from" in note for note in done.evaluation.notes)
    assert all(np.isfinite(line["critic/value"]) for line in read_metrics(tmp_path / "run")[1:])


def test_a_folder_of_images_teaches_digits_too(photos: Path, digits_cache: Path) -> None:
    data = training_data(build(on_digits(f"data.folder={photos}"), digits_cache))
    assert data.shape == (16, 1, 8, 8)
    assert -1 <= float(data.min()) < -0.1 < 0.1 < float(data.max()) <= 1


# The data


def test_the_digits_data_are_those_of_the_prompts_in_the_samplers_range(digits_cache: Path) -> None:
    data = training_data(build(on_digits('prompts.train=["3", "3", "5"]'), digits_cache))
    images, labels = digits.digit_split("train")
    known = {tuple(x.flatten().tolist()): int(label) for x, label in zip(images, labels, strict=True)}
    found = [known[tuple(((x + 1) / 2).flatten().tolist())] for x in data]
    assert set(found) == {3, 5}
    assert found.count(3) == pytest.approx(2 * found.count(5), abs=2)
    assert (float(data.min()), float(data.max())) == (-1, 1)


def test_latents_are_what_the_decoder_undoes(photos: Path, cache: Path) -> None:
    """A VAE of random weights does not invert itself: its encoder's mean, and the decoder's input, are held apart."""
    task = build(on_tiny(photos), cache)
    vae, seen = task.parts["pipeline"].vae, []
    data = training_data(task)
    assert data.shape == (16, *task.chain.shape)
    pictures = digits.image_folder(photos, 16, 3)[0]
    mean = vae.encode(2 * pictures[3:4] - 1).latent_dist.mean
    torch.testing.assert_close(data[3:4] / vae.config.scaling_factor, mean, rtol=1e-4, atol=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        decode = vae.decode
        patch.setattr(vae, "decode", lambda z, **options: seen.append(z) or decode(z, **options))
        task.decode(data[3:4])
    torch.testing.assert_close(seen[0], mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(encoded(vae, 2 * pictures - 1, 3), data, rtol=1e-4, atol=1e-6)


def test_changed_data_are_another_run(photos: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    config = on_tiny(folder)
    settings = ShortcutRun(build(config, cache), _settings(config), None)
    settings.run(1)
    state = settings.state_dict()
    ShortcutRun(build(config, cache), _settings(config), None).load_state_dict(state)
    Image.new("RGB", (20, 20)).save(folder / "a" / "00.png")
    with pytest.raises(ValueError, match="data.folder must hold the images of the saved run, it has changed"):
        ShortcutRun(build(config, cache), _settings(config), None).load_state_dict(state)


def _settings(config: Config) -> Any:
    from algorithms.training import Settings

    return Settings(config.training.updates, config.training.batch, config.training.learning_rate)


# The networks


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 2, 2), (4, 8, 8), (3, 32, 32), (4, 9, 12)])
def test_the_critic_is_torchs_own_convolutions(shape: tuple[int, ...]) -> None:
    from torch import nn

    widths = default_widths(shape)
    critic = ConvCritic(shape, widths)
    params = critic.initial(torch.Generator().manual_seed(2))
    left = [side // 2 ** len(widths) for side in shape[1:]]
    layers: list[nn.Module] = []
    for inputs, outputs in zip((shape[0], *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
    layers.append(nn.Conv2d(widths[-1], 1, (min(4, left[0]), min(4, left[1]))))
    with torch.no_grad():
        for i, layer in enumerate(layers[::2]):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            layer.weight.copy_(params[f"weight{i}"])
            layer.bias.copy_(params[f"bias{i}"])
    x = normal(5, *shape)
    wanted = nn.Sequential(*layers)(x).mean((1, 2, 3))
    torch.testing.assert_close(critic(params, x), wanted)
    torch.testing.assert_close(critic(params, x)[2:3], critic(params, x[2:3]))
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    gradient_penalty(lambda y: critic(leaves, y), x, x.flip(0), torch.full((5,), 0.3)).backward()
    assert all(leaves[f"weight{i}"].grad is not None for i in range(len(widths) + 1))


def test_the_papers_critic_has_the_papers_sizes() -> None:
    params = ConvCritic((3, 32, 32), (256, 512, 1024)).initial(torch.Generator())
    assert [tuple(p.shape) for name, p in params.items() if "weight" in name] == [
        (256, 3, 4, 4),
        (512, 256, 4, 4),
        (1024, 512, 4, 4),
        (1, 1024, 4, 4),
    ]
    assert halvings((1, 28, 28)) == 4


@pytest.mark.parametrize(("shape", "widths"), [((1, 8, 8), (1, 1, 1, 1)), ((4, 8), (8,)), ((1, 8, 8), ())])
def test_a_critic_that_does_not_fit_is_refused(shape: tuple[int, ...], widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths must be|shape must be"):
        ConvCritic(shape, widths)


def test_the_gradient_through_the_sampler_is_the_critics(digits_cache: Path) -> None:
    """The pathwise step, on a real network, against a difference quotient of the mean critic along the gradient."""
    task = build(on_digits("method={name: sft}"), digits_cache)
    method, adversary = make_shortcut(task)
    objective = Objective(CriticReward(adversary.critic, adversary.params))
    estimator = method.estimator(task.chain.steps, lambda returns, x, k: torch.zeros_like(returns))
    params = {name: p.detach().clone().requires_grad_() for name, p in task.params.items()}
    noise, condition = (
        Noise(normal(4, 1, 8, 8), normal(3, 4, 1, 8, 8, seed=1), torch.zeros(4).long()),
        task.condition(4),
    )
    estimator.accumulate(task.chain, params, objective, noise, condition)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
    length = float(torch.cat([g.flatten() for g in grads.values()]).norm())

    def mean_return(step: float) -> float:
        moved = {name: (p + step * grads[name] / length).detach() for name, p in params.items()}
        x0 = rollout(task.chain, moved, noise, condition).latents[0]
        return -float(adversary.critic(adversary.params, x0).double().mean())

    assert (mean_return(0.01) - mean_return(-0.01)) / 0.02 == pytest.approx(length, rel=0.02)


def test_options_reach_the_algorithm(digits_cache: Path) -> None:
    options = (
        "{critic: mlp, critic_widths: [5, 6], value_widths: [7], strength: 2.5, critic_steps: 4, ratio_clip: 0.3, "
    )
    options += "generator_steps: 3, batches: clipped, critic_learning_rate: 0.01, regulariser: conditional-baseline}"
    method, adversary = make_shortcut(build(on_digits(f"method={{name: sft-pg, options: {options}}}"), digits_cache))
    assert (method.gradient, method.regulariser, method.batches) == ("policy", "conditional baseline", "clipped")
    assert (method.strength, method.critic_steps, method.generator_steps) == (2.5, 4, 3)
    assert (method.ratio_clip, method.critic_learning_rate) == (0.3, 0.01)
    assert adversary.critic == MLPCritic(64, (5, 6))
    assert adversary.value == MLPValue(64, 3, (7,))
    for name, regulariser, strength in (("sft", "gradient penalty", 0.1), ("sft-pg", "baseline", 1 / 3)):
        method, adversary = make_shortcut(build(on_digits(f"method={{name: {name}}}"), digits_cache))
        assert (method.regulariser, method.strength) == (regulariser, pytest.approx(strength))
        assert adversary.critic == ConvCritic((1, 8, 8), (32, 64))
        assert (adversary.value is None) == (name == "sft")


# What is refused


@pytest.mark.parametrize(
    ("model", "overrides", "said"),
    [
        ("tiny", [PG], "data.folder must be a folder of images where method.name = sft-pg"),
        ("digits", ["data.folder=x"], "data.folder must be null where method.name = rlr learns from the reward, got x"),
        ("digits", [PG, "sampler={scheduler: ddpm, last_step: frozen}"], "sampler.last_step must be keep or a number"),
        ("digits", [PG, "sampler.eta=0"], "sampler.eta must be > 0 where method.name = sft-pg uses the score"),
        ("digits", ["method={name: sft, options: {batches: clipped}}"], "unknown key method.options.batches"),
        ("digits", ["method={name: sft, options: {critic_widths: 5}}"], "must be a list, got 5"),
        (
            "digits",
            ["method={name: sft-pg, options: {value_widths: null}}"],
            "value_widths must be given for the regul",
        ),
        ("digits", [PG, "method.baseline=2.0"], "takes no baseline"),
        ("digits", ["audit.estimators=[sft]"], "audit.estimators.0.name must be an estimator of a reward's gradient"),
    ],
)
def test_settings_that_do_not_suit_are_refused_at_load(model: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(f"{model}-brightness", overrides)
    assert said in str(caught.value)


def test_a_folder_without_enough_images_is_refused(
    photos: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["launch", "tiny-brightness", "--out", str(tmp_path / "run"), "--cache", str(cache)]
    ask += [word for given in ("device=cpu", PG) for word in ("--set", given)]
    for folder, more, said in (
        (photos, ["--set", "training.batch=17", "--set", "training.micro_batch=null"], "at least a batch of 17 images"),
        (photos / "a", [], "data.folder: path must hold class sub-folders of PNG or JPEG files"),
        (photos, ["--set", "method.options.critic_widths=[8, 8]"], "method.options.critic_widths: widths must be at"),
    ):
        assert verifine.main([*ask, "--set", f"data.folder={folder}", *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in line, line
        assert not (tmp_path / "run/config.yaml").exists()


def test_several_processes_are_refused(digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Processes(0, 2, None)
    monkeypatch.setattr(Processes, "here", classmethod(lambda cls, cpu: alone))
    monkeypatch.setattr(Processes, "leave", lambda self, together=True: None)
    with pytest.raises(ValueError, match="method.name = sft-pg runs in one process, got 2"):
        launch(on_digits(), tmp_path / "run", digits_cache)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="gpus must be 1 for method.name = sft-pg"):
        submit(on_digits("device=cuda"), tmp_path / "run", digits_cache, "local", gpus=2)


def test_an_audit_of_a_critic_that_changes_is_refused(
    digits_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["audit", "digits-brightness", "--out", str(tmp_path / "audit"), "--cache", str(digits_cache)]
    assert verifine.main([*ask, "--set", PG, "--set", "device=cpu"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "method.name must be a method that learns from the reward for an audit or plan, got sft-pg" in line
    assert "method={name: policy-gradient}" in line
    assert METHODS["policy-gradient"].unbiased


def test_a_run_from_the_reward_keeps_the_digest_that_it_had() -> None:
    """Runs of releases that knew no data are resumed; a folder of data makes another run."""
    data = Config().model_dump()
    assert data.pop("data") == {"folder": None}
    for key in NOT_IN_DIGEST:
        section, _, name = key.rpartition(".")
        del (data[section] if section else data)[name]
    assert digest(Config()) == hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    assert digest(on_digits()) != digest(on_digits("data.folder=x")) != digest(on_digits("data.folder=y"))
