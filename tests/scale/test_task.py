"""Whole tasks: every estimator and loss on both kinds of chain, micro-batches, and settings that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms.baselines import LeaveOneOut
from algorithms.chain import Noise, Params, rollout, step_log_prob
from algorithms.division import Division
from algorithms.estimators import (
    Estimator,
    antithetic,
    first_order,
    half_order,
    policy_gradient,
    stratified_truncation,
    truncated,
    with_baseline,
    with_redrawn_noise,
    zeroth_order,
)
from algorithms.losses import DPOK, PPO, DraftLV, Trajectories
from algorithms.objective import kl_regularised
from algorithms.rlr import rlr
from algorithms.stratified import fitted_truncation
from algorithms.telescoped import band, telescoped
from algorithms.training import FromEstimator, Settings, fine_tune
from scale.lora import load
from scale.task import Task, pick_device
from tests.scale.conftest import Make, error, flat, in_double, leaves, moved, normal

diffusers = pytest.importorskip("diffusers")

KINDS = ("tiny", "pixel")
T, N = 3, 3


@pytest.fixture(scope="module")
def tasks(make: Make) -> dict[str, Task]:
    """One task of each kind in float64, away from the start, with guidance; nothing here changes them."""
    return {kind: in_double(make(kind, sampler={"guidance": 2.0})) for kind in KINDS}


def gradient(params: Params) -> Tensor:
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in params.values())


def one_graph(task: Task, params: Params, noise: Noise, condition: Any) -> tuple[list[Tensor], Tensor]:
    """Return the latents x_0..x_T and the rewards of a roll-out in one graph."""
    latents = [task.chain.initial(noise.initial)]
    for t in range(T, 0, -1):
        mean = task.chain.mean(params, latents[0], t, condition.steps[t - 1])
        latents.insert(0, mean + task.chain.std(t) * noise.steps[t - 1])
    return latents, task.objective.reward(latents[0], condition.reward)


# --- estimators ----------------------------------------------------------------------------------------------------


def test_first_order_is_the_derivative_of_the_whole_sampler(tasks: dict[str, Task]) -> None:
    """Written out with diffusers' own modules, DDIM's formulas and the adapters in their places: nothing of ours."""
    task = tasks["tiny"]
    pipeline = task.parts["pipeline"]
    load(pipeline.unet, task.params)
    own = dict(pipeline.unet.named_parameters())
    trained = [own[name].requires_grad_() for name in task.params]
    noise = first_order(T).draw(task.chain, task.params, N, task.generator("noise"))

    alphas = pipeline.scheduler.alphas_cumprod.double()
    told, empty = (
        e.double() for e in pipeline.encode_prompt([task.prompts.texts[i] for i in (0, 1, 0)], "cpu", 1, True)
    )
    x = noise.initial
    for i, now in enumerate((667, 334, 1)):
        outputs = [pipeline.unet(x, now, encoder_hidden_states=text).sample for text in (empty, told)]
        eps = outputs[0] + 2.0 * (outputs[1] - outputs[0])
        a, before = alphas[now], alphas[max(now - 333, 0)]
        var = (1 - before) / (1 - a) * (1 - a / before)
        x = (
            before.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt()
            + (1 - before - var).sqrt() * eps
            + var.sqrt() * noise.steps[T - 1 - i]
        )
    images = (pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    rewards = -(images - images.flip(3)).square().mean((1, 2, 3))
    wanted = torch.autograd.grad(rewards.mean(), trained)
    pipeline.unet.requires_grad_(False)

    params = leaves(task.params)
    returns = first_order(T).accumulate(task.chain, params, task.objective, noise, task.condition(N))
    assert error(returns, rewards.detach()) < 1e-10
    assert error(gradient(params), flat(wanted)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_first_order_is_autograd_through_chain_and_decoder(tasks: dict[str, Task], kind: str) -> None:
    task, params = tasks[kind], leaves(tasks[kind].params)
    noise, condition = first_order(T).draw(task.chain, params, N, task.generator("noise")), task.condition(N)
    returns = first_order(T).accumulate(task.chain, params, task.objective, noise, condition)
    graph = leaves(task.params)
    _, rewards = one_graph(task, graph, noise, condition)
    assert error(returns, rewards.detach()) < 1e-12
    wanted = flat(torch.autograd.grad(rewards.mean(), list(graph.values())))
    assert error(gradient(params), wanted) < 1e-10
    # Cut off before the last step of sampling it is another one.
    short = leaves(task.params)
    truncated(T, 1).accumulate(task.chain, short, task.objective, noise, condition)
    assert error(gradient(short), wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_gradient_is_the_score_times_the_return(tasks: dict[str, Task], kind: str) -> None:
    task, params, graph = tasks[kind], leaves(tasks[kind].params), leaves(tasks[kind].params)
    estimator = with_baseline(policy_gradient(T), LeaveOneOut())
    noise, condition = estimator.draw(task.chain, params, N, task.generator("noise")), task.condition(N)
    estimator.accumulate(task.chain, params, task.objective, noise, condition)

    with torch.no_grad():
        latents, rewards = one_graph(task, task.params, noise, condition)
    advantage = rewards - (rewards.sum() - rewards) / (N - 1)
    score = sum(step_log_prob(task.chain, graph, latents[t], latents[t - 1], t, condition) for t in range(1, T + 1))
    wanted = torch.autograd.grad((advantage * score).mean(), list(graph.values()))
    assert error(gradient(params), flat(wanted)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_density_is_a_normal_one(tasks: dict[str, Task], kind: str) -> None:
    task, x = tasks[kind], normal(N, *tasks[kind].chain.shape).double()
    condition, x_next = task.condition(N), 0.5 * x
    for t in range(1, T + 1):
        mean, std = task.chain.mean(task.params, x, t, condition.steps[t - 1]), task.chain.std(t)
        wanted = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).sum(1)
        assert error(step_log_prob(task.chain, task.params, x, x_next, t, condition), wanted) < 1e-12


def the_tho(task: Task) -> Estimator:
    arguments = (task.objective, band(T, 2), task.generator("pilot"))
    return telescoped(task.chain, task.params, *arguments, pilot=8, batch=2, condition=task.condition(2))


def the_srt(task: Task) -> Estimator:
    arguments = (task.objective, 2.0, task.generator("pilot"))
    return fitted_truncation(task.chain, task.params, *arguments, pilot=4, condition=task.condition(4))


ESTIMATORS: dict[str, Callable[[Task], Estimator]] = {
    "first order": lambda task: first_order(T),
    "truncated": lambda task: truncated(T, 2),
    "half order": lambda task: with_baseline(half_order(T, 2), LeaveOneOut()),
    "policy gradient": lambda task: with_baseline(policy_gradient(T), LeaveOneOut()),
    "zeroth order": lambda task: antithetic(zeroth_order(T, 1e-2), over="parameters"),
    "rlr": lambda task: with_redrawn_noise(rlr(T, 1, 1e-2, reading="II", zeroth="antithetic")),
    "tho": the_tho,
    "srt": the_srt,
}


@pytest.mark.parametrize("name", list(ESTIMATORS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_batchs_gradient_is_the_mean_of_its_samples_however_it_is_cut(
    tasks: dict[str, Task], kind: str, name: str
) -> None:
    task = tasks[kind]
    estimator = ESTIMATORS[name](task)
    assert np.allclose(estimator.credit.row_sums(), 1) == (name != "truncated")
    noise, condition = estimator.draw(task.chain, task.params, N, task.generator("noise")), task.condition(N)
    each = estimator.per_sample(task.chain, task.params, task.objective, noise, condition)
    wanted = flat(value.mean(0) for value in each.values())
    assert float(wanted.norm()) > 0
    for division in (Division(), Division(micro_batch=2)):
        params = leaves(task.params)
        estimator.accumulate(task.chain, params, task.objective, noise, condition, division)
        assert error(gradient(params), wanted) < 1e-9
    along = moved({k: torch.zeros_like(p) for k, p in task.params.items()}, 1.0, seed=8)
    slopes = estimator.directional(task.chain, task.params, task.objective, noise, along, condition)
    inner = torch.stack([flat(value[i] for value in each.values()) @ flat(along.values()) for i in range(N)])
    assert error(slopes, inner) < 1e-8


def test_micro_batches_of_a_leave_one_out_baseline_need_the_whole_batch(tasks: dict[str, Task]) -> None:
    """The planted mistake: micro-batches as batches of their own, each with a baseline of its own."""
    task, estimator = tasks["pixel"], with_baseline(policy_gradient(T), LeaveOneOut())
    noise, condition = estimator.draw(task.chain, task.params, 4, task.generator("noise")), task.condition(4)
    whole, cut, apart = (leaves(task.params) for _ in range(3))
    arguments = (task.chain, whole, task.objective, noise, condition)
    estimator.accumulate(*arguments)
    estimator.accumulate(task.chain, cut, task.objective, noise, condition, Division(micro_batch=2))
    for part in (slice(0, 2), slice(2, 4)):
        own = replace(condition, steps=condition.steps[:, part], reward=condition.reward[part])
        estimator.accumulate(task.chain, apart, task.objective, noise.of(part), own)
    assert error(gradient(cut), gradient(whole)) < 1e-10
    assert error(gradient(apart) / 2, gradient(whole)) > 1e-2


# --- surrogate losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_are_one_before_the_first_update(tasks: dict[str, Task], kind: str) -> None:
    task = tasks[kind]
    noise, condition = policy_gradient(T).draw(task.chain, task.params, 4, task.generator("noise")), task.condition(4)
    for division in (Division(), Division(micro_batch=2)):
        batch = Trajectories.of(task.chain, task.params, task.objective, noise, condition, division)
        for t in range(1, T + 1):
            x, x_next = batch.roll.latents[t], batch.roll.latents[t - 1]
            now = step_log_prob(task.chain, task.params, x, x_next, t, condition)
            constant = now - batch.log_probs[t - 1]
            assert float((constant - constant[0]).abs().max()) < 1e-9
            later = step_log_prob(task.chain, moved(task.params), x, x_next, t, condition)
            assert float((later - now).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_of_ppo_is_the_policy_gradient(tasks: dict[str, Task], kind: str) -> None:
    task, params, plain = tasks[kind], leaves(tasks[kind].params), leaves(tasks[kind].params)
    condition = task.condition(4)
    method = PPO(clip=0.1, advantage="leave-one-out", division=Division(micro_batch=3))
    next(iter(method.updates(task.chain, params, task.objective, 4, task.generator("u"), condition)))
    estimator = with_baseline(policy_gradient(T), LeaveOneOut())
    noise = policy_gradient(T).draw(task.chain, plain, 4, task.generator("u"))
    estimator.accumulate(task.chain, plain, task.objective, noise, condition)
    assert error(gradient(params), gradient(plain)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_dpok_with_a_penalty(make: Make, kind: str) -> None:
    """Autograd of the reward times the densities, less the KL of two normal laws of equal width."""
    task = in_double(make(kind, kl=0.3))
    params, graph, condition = leaves(task.params), leaves(task.params), task.condition(4)
    base = {name: p.double() for name, p in make(kind).params.items()}
    method = DPOK(division=Division(micro_batch=3))
    (returns,) = method.updates(task.chain, params, task.objective, 4, task.generator("u"), condition)

    noise = policy_gradient(T).draw(task.chain, task.params, 4, task.generator("u"))
    with torch.no_grad():
        latents, rewards = one_graph(task, task.params, noise, condition)
    score, penalty = torch.zeros(4).double(), torch.zeros(4).double()
    for t in range(1, T + 1):
        law, reference = (
            torch.distributions.Normal(task.chain.mean(p, latents[t], t, condition.steps[t - 1]), task.chain.std(t))
            for p in (graph, base)
        )
        score = score + law.log_prob(latents[t - 1]).flatten(1).sum(1)
        penalty = penalty + 0.3 * torch.distributions.kl_divergence(law, reference).flatten(1).sum(1)
    wanted = flat(torch.autograd.grad((rewards * score - penalty).mean(), list(graph.values())))
    assert error(gradient(params), wanted) < 1e-9
    assert error(returns, rewards - penalty.detach()) < 1e-9
    assert float(penalty.detach().min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_draft_lv(tasks: dict[str, Task], kind: str) -> None:
    """The last step's own start, and one start noised again from x_0 by diffusers' forward process."""
    task, params, graph = tasks[kind], leaves(tasks[kind].params), leaves(tasks[kind].params)
    condition, method = task.condition(4), DraftLV(copies=1, division=Division(micro_batch=2))
    noise = method.draw(task.chain, params, 4, task.generator("noise"))
    method.accumulate(task.chain, params, task.objective, noise, condition)

    latents = rollout(task.chain, task.params, noise.chain, condition).latents
    alphas = task.parts["scheduler"].alphas_cumprod.double()
    kept = alphas[1] / alphas[0]  # from where step 1 leads, timestep 0, back to where it starts, timestep 1
    starts = [latents[1], kept.sqrt() * latents[0] + (1 - kept).sqrt() * noise.renoise[0]]
    total = torch.zeros(()).double()
    for x, eps in zip(starts, (noise.chain.steps[0], noise.last[0]), strict=True):
        x0 = task.chain.mean(graph, x, 1, condition.steps[0]) + task.chain.std(1) * eps
        total = total + task.objective.reward(x0, condition.reward).mean() / 2
    wanted = torch.autograd.grad(total, list(graph.values()))
    assert error(gradient(params), flat(wanted)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_zero_at_the_start_and_pulls_back_later(make: Make, kind: str) -> None:
    task = make(kind, kl=0.5)
    noise, condition = first_order(T).draw(task.chain, task.params, 2, task.generator("noise")), task.condition(2)
    for params, penalised in ((task.params, False), (moved(task.params), True)):
        at = leaves(params)
        returns = first_order(T).accumulate(task.chain, at, task.objective, noise, condition)
        latents = rollout(task.chain, params, noise, condition).latents
        gap = task.objective.reward(latents[0], condition.reward) - returns
        wanted = torch.zeros(2)
        for t in range(1, T + 1):
            means = [task.chain.mean(p, latents[t], t, condition.steps[t - 1]) for p in (params, task.params)]
            law, reference = (torch.distributions.Normal(mean, task.chain.std(t)) for mean in means)
            wanted += 0.5 * torch.distributions.kl_divergence(law, reference).flatten(1).sum(1)
        assert torch.allclose(gap, wanted, rtol=1e-3, atol=1e-6)
        assert bool((gap > 1e-4).all()) if penalised else torch.equal(gap, torch.zeros(2))


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_the_reward(make: Make, kind: str) -> None:
    lora, learning_rate = ({"rank": 4, "alpha": 8.0}, 0.05) if kind == "tiny" else (None, 0.005)
    task = make(kind, reward={"name": "brightness"}, lora=lora)
    settings = Settings(updates=5, samples=4, learning_rate=learning_rate)
    tuned = fine_tune(
        task.chain,
        task.params,
        task.objective,
        FromEstimator(first_order(T), Division(micro_batch=2)),
        settings,
        lambda update: task.generator("update", update),
        task.condition(4),
    ).params
    noise, condition = first_order(T).draw(task.chain, task.params, 32, task.generator("test")), task.condition(32)
    before, after = (
        task.objective.reward(rollout(task.chain, params, noise, condition).latents[0], condition.reward)
        for params in (task.params, tuned)
    )
    gain = after - before
    assert float(gain.mean()) > 5 * float(gain.std()) / 32**0.5


def test_a_task_is_made_again_from_its_settings(make: Make) -> None:
    one, two, other = make(), make(), make(training={"seed": 3})
    assert all(torch.equal(p, two.params[name]) for name, p in one.params.items())
    numbers = [torch.randn(4, generator=task.generator("a", 1)).tolist() for task in (one, two, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert torch.randn(4, generator=one.generator("a", 2)).tolist() != numbers[0]


def test_the_description_counts(make: Make) -> None:
    task = make("pixel")
    trained = sum(p.numel() for p in task.params.values())
    base = sum(p.numel() for p in make("pixel", lora=None).chain.network.parameters())
    assert task.describe().startswith("pixel ")
    assert f"latents 1 x 8 x 8, guidance 1; {trained} of {base + trained} parameters are trained" in task.describe()
    assert f"{base} of {base} parameters are trained" in make("pixel", lora=None).describe()


# --- settings that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["policy-gradient", "half-order", "ddpo", "dpok", "tho"])
def test_a_score_needs_noise(make: Make, method: str) -> None:
    with pytest.raises(ValueError, match=r"^test: sampler.eta must be > 0 where method.name = ") as caught:
        make(sampler={"eta": 0.0}, method={"name": method})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_without_noise_has_no_score(make: Make, kind: str) -> None:
    task = make(kind, sampler={"eta": 0.0})
    condition, params = task.condition(2), leaves(task.params)
    noise = first_order(T).draw(task.chain, params, 2, task.generator("noise"))
    first_order(T).accumulate(task.chain, params, task.objective, noise, condition)
    for estimator in (policy_gradient(T), half_order(T, 2)):
        with pytest.raises(ValueError, match=r"^step t = 1 has std = 0 \(eta = 0\?\): its noise has no score"):
            estimator.accumulate(task.chain, params, task.objective, noise, condition)
    with pytest.raises(ValueError, match="has std = 0"):
        Trajectories.of(task.chain, params, task.objective, noise, condition)
    with pytest.raises(ValueError, match="has std = 0"):
        step_log_prob(task.chain, params, noise.initial, noise.initial, 2, condition)
    penalised = kl_regularised(task.objective, 1.0, task.params)
    with pytest.raises(ValueError, match="has std = 0"):
        first_order(T).accumulate(task.chain, params, penalised, noise, condition)


def test_more_texts_than_steps(make: Make) -> None:
    with pytest.raises(ValueError, match="must not have more parts than the chain has steps, 3"):
        make(prompts={"train": [["the", "a", "thing", "digit"]]})
    frozen = {"scheduler": "ddpm", "last_step": "frozen"}  # a step less
    with pytest.raises(ValueError, match="must not have more parts than the chain has steps, 1"):
        make(prompts={"train": [["the", "digit"]]}, sampler={**frozen, "steps": 2})
    assert make(prompts={"train": [["the", "digit"]]}, sampler={**frozen, "steps": 3}).condition(2).steps.shape == (
        2,
        2,
    )


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for sees in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda sees=sees: sees)
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees > 0)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device("auto").type == ("cuda" if sees else "cpu")
        with pytest.raises(ValueError, match=rf"^device 'cuda:2' is not there: torch .* sees {sees or 'no'} such GPU$"):
            pick_device("cuda:2")
        with pytest.raises(ValueError, match="^device 'mps' is not there: torch .* sees no such GPU$"):
            pick_device("mps")
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_a_hub_id_without_a_network_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=r"^model.path: cannot load 'an/id' from the hub .*: no route to host$"):
        make(model={"kind": "stable-diffusion", "path": "an/id"})
    with pytest.raises(ValueError, match="^model.path: there is no folder 'not an id', and it is no hub id"):
        make(model={"kind": "stable-diffusion", "path": "not an id"})
    with pytest.raises(ValueError, match="^model.path: there is no folder"):
        make(model={"kind": "stable-diffusion", "path": str(tmp_path / "nothing")})


def test_loading_is_quiet_and_leaves_the_libraries_as_they_were(capfd: pytest.CaptureFixture[str], make: Make) -> None:
    import diffusers.utils.logging as ours
    import transformers.utils.logging as theirs

    both: tuple[Any, ...] = (ours, theirs)
    for logging in both:
        logging.set_verbosity_info()
        logging.disable_progress_bar()
    ours.enable_progress_bar()
    capfd.readouterr()
    try:
        make()
        assert "it/s" not in capfd.readouterr().err
        assert [logging.is_progress_bar_enabled() for logging in both] == [True, False]
        assert [logging.get_verbosity() for logging in both] == [20, 20]
    finally:
        for logging in both:
            logging.set_verbosity_warning()
            logging.enable_progress_bar()


def test_srt_by_a_law_of_its_own(tasks: dict[str, Task]) -> None:
    """Stratified lengths: with a law of halves every batch of four has two of each, whatever the seed."""
    task, estimator = tasks["pixel"], stratified_truncation(np.array([0.5, 0.0, 0.5]))
    for seed in range(5):
        noise = estimator.draw(task.chain, task.params, 4, torch.Generator().manual_seed(seed))
        assert sorted(noise.outcome.tolist()) == [0, 0, 1, 1]
