"""The chain of a network: guidance, derivatives, checkpoints of its blocks, and the frozen last step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from algorithms.chain import Params, Rollout, step_mean
from algorithms.estimators import first_order, half_order
from algorithms.guidance import Guided, Linearised, Predicting, guided_sampling
from algorithms.rlr import rlr
from scale.lora import load
from scale.memory import LiveBytes
from scale.network import checkpoint_blocks, has_ties
from tests.scale.conftest import Make, error, flat, in_double, leaves, moved, normal

pytest.importorskip("diffusers")

KINDS = ("tiny", "pixel")
LORAS = [{"rank": 2, "alpha": 3.0}, None]
FROZEN = {"scheduler": "ddpm", "steps": 3, "last_step": "frozen"}


# --- guidance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance(make: Make, kind: str, guidance: float) -> None:
    task = in_double(make(kind, sampler={"guidance": guidance}))
    load(task.chain.network, task.params)
    x, timestep, rows = normal(2, *task.chain.shape).double(), torch.tensor(400), torch.tensor([0, 1])
    found = task.chain.output(task.params, x, timestep, rows)

    def told(rows: Tensor) -> Tensor:
        given = task.chain.table[rows]
        given = given.double() if given.is_floating_point() else given
        return task.chain.network(x, timestep, **{task.chain.told: given}).sample

    with_it, without = told(rows), told(torch.full_like(rows, task.chain.unconditional))
    assert error(found, (1 - guidance) * without + guidance * with_it) < 1e-12
    assert error(with_it, without) > 1e-3
    calls = []
    hook = task.chain.network.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    task.chain.output(task.params, x, timestep, rows)
    hook.remove()
    assert calls == [2 if guidance == 1 else 4]


def test_bad_conditions(make: Make) -> None:
    task = make()
    x = normal(2, *task.chain.shape)
    with pytest.raises(ValueError, match=r"^condition must be a row of the chain's table for each sample, got none"):
        task.chain.mean(task.params, x, 1, None)
    with pytest.raises(ValueError, match="guidance must be 1 for a network that knows no empty condition, got 3"):
        replace(task.chain, guidance=3.0, unconditional=None)


def test_samples_do_not_influence_each_other(make: Make) -> None:
    for kind in KINDS:
        task = in_double(make(kind, sampler={"guidance": 2.0}))
        x, rows = normal(3, *task.chain.shape).double(), torch.tensor([0, 1, 1])
        whole = task.chain.mean(task.params, x, 2, rows)
        alone = [task.chain.mean(task.params, x[i : i + 1], 2, rows[i : i + 1]) for i in range(3)]
        assert error(torch.cat(alone), whole) < 1e-12


# --- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_reverse_mode_agree_with_differences(make: Make, kind: str, checkpointing: bool) -> None:
    task = in_double(make(kind, model={"checkpointing": checkpointing}, sampler={"guidance": 2.0}))
    x, v = normal(2, *task.chain.shape).double(), normal(2, *task.chain.shape, seed=1).double()
    rows, along = torch.tensor([0, 1]), moved({k: torch.zeros_like(p) for k, p in task.params.items()}, 1.0, seed=9)

    def value(params: Params, x: Tensor) -> Tensor:
        return (task.chain.mean(params, x, 2, rows) * v).sum()

    def at(h: float) -> Tensor:
        return value({k: p + h * along[k] for k, p in task.params.items()}, x + h * v)

    derivative = (8 * (at(1e-3) - at(-1e-3)) - (at(2e-3) - at(-2e-3))) / 12e-3
    forward = torch.func.jvp(value, (task.params, x), (along, v))[1]
    gradients, gradient = torch.func.grad(value, argnums=(0, 1))(task.params, x)
    reverse = sum((gradients[k] * along[k]).sum() for k in along) + (gradient * v).sum()
    assert error(forward, derivative) < 1e-8
    assert error(reverse, derivative) < 1e-8


# --- guided sampling -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_come_from_the_predicted_noise(make: Make, kind: str, scheduler: str) -> None:
    task = in_double(make(kind, sampler={"guidance": 2.0, "scheduler": scheduler}))
    chain: Predicting = task.chain
    x, rows = normal(2, *chain.shape).double(), torch.tensor([0, 1])
    for t in (1, 3):
        epsilon = chain.predict(task.params, x, t, rows)
        assert error(chain.step(x, epsilon, t), chain.mean(task.params, x, t, rows)) < 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_goes_through_the_network(make: Make, kind: str, checkpointing: bool) -> None:
    task = in_double(make(kind, model={"checkpointing": checkpointing}, sampler={"guidance": 2.0}))
    chain, rows = task.chain, torch.tensor([0, 1])
    x, v = (normal(2, *chain.shape, seed=seed).double() for seed in (0, 1))
    linear = Linearised(normal(*chain.shape, seed=2).double(), 0.2)

    def loss(x: Tensor) -> Tensor:
        x0 = chain.denoised(x, chain.predict(task.params, x, 2, rows), 2)
        return 0.5 * (1.0 - linear(x0)).square().sum()

    params = leaves(task.params)
    guided = Guided(chain, 0.3, 1.0, linear)
    with torch.no_grad():
        found = guided.mean(params, x, 2, rows)
        plain = chain.mean(task.params, x, 2, rows)
        at = [loss(x + h * v) for h in (1e-3, -1e-3, 2e-3, -2e-3)]
        derivative = (8 * (at[0] - at[1]) - (at[2] - at[3])) / 12e-3
        # A step is affine in the noise where x_0 is not clipped: what a unit of it adds to the mean.
        step = replace(chain.sampler, clip=None)
        unit = float((step.step(0 * x, torch.ones_like(x), 2)).mean())
        free = replace(chain, sampler=step)
        moved_by = Guided(free, 0.3, 1.0, linear).mean(params, x, 2, rows) - free.mean(task.params, x, 2, rows)
    slope = moved_by / (unit * 0.3 * chain.noise_level(2))
    assert error((slope * v).sum(), derivative) < 1e-7
    assert error(found, plain) > 1e-3
    assert all(p.grad is None for p in params.values())


def by_hand(task: Any, noise: Tensor, condition: Any, strength: float, target: float, linear: Linearised) -> Tensor:
    """Guided DDIM with the network's output and diffusers' own step."""
    scheduler, x = copy.deepcopy(task.parts["scheduler"]), noise
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(task.chain.steps)
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[timestep]
        leaf = x.clone().requires_grad_()
        output = task.chain.output(task.params, leaf, timestep, condition.steps[0])
        x0 = (leaf - (1 - alpha).sqrt() * output) / alpha.sqrt()
        reward = linear.offset + (x0 * linear.gradient).sum((1, 2, 3))
        (slope,) = torch.autograd.grad((0.5 * (target - reward) ** 2).sum(), leaf)
        x = scheduler.step(output.detach() + (1 - alpha).sqrt() * strength * slope, timestep, x).prev_sample
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_guided_sampling_is_that_of_diffusers_steps(make: Make, kind: str) -> None:
    """With a reward of decoded images; in a batch of all samples and in smaller ones."""
    task = in_double(make(kind, reward={"name": "brightness"}, sampler={"eta": 0.0, "guidance": 2.0}))
    condition, reward = task.of_prompts(torch.zeros(4, dtype=torch.long)), task.objective.reward
    noise = torch.randn(4, *task.chain.shape, generator=task.generator("guided"), dtype=torch.float64)
    nothing = Linearised(torch.zeros(task.chain.shape, dtype=torch.float64), 0.0)
    free = by_hand(task, noise, condition, 1.0, 0.0, nothing)
    centre = free.mean(0, keepdim=True).requires_grad_()
    value = reward(centre, condition.reward[:1])
    (slope,) = torch.autograd.grad(value.sum(), centre)
    linear = Linearised(slope[0], float((value - (slope * centre).sum()).detach()))
    strength = float(1 / slope.square().sum())  # about as strong as can be: a pixel is little of the mean of them all
    guided = by_hand(task, noise, condition, strength, 0.7, linear)
    for batch in (None, 3):
        x0, rounds = guided_sampling(
            task.chain,
            task.params,
            reward,
            strength=strength,
            targets=(0.7,),
            samples=4,
            generator=task.generator("guided"),
            condition=condition,
            batch=batch,
        )
        assert error(x0, guided) < 1e-8
        told = (reward(x, condition.reward).mean() for x in (free, guided))
        assert [r.reward for r in rounds] == pytest.approx([float(r) for r in told], rel=1e-8)
    assert error(guided, free) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_raises_a_linear_reward(make: Make, kind: str) -> None:
    """By each sample's own gradient, in the float32 of real runs.

    Weakly: an untrained network's x_0-hat does not know how little of x_0 is left in x_T, and would overshoot.
    """
    task = make(kind)
    direction = normal(*task.chain.shape) / 8

    def reward(x0: Tensor, condition: Tensor | None) -> Tensor:
        return (x0 * direction).sum((1, 2, 3))

    x0, rounds = guided_sampling(
        task.chain,
        task.params,
        reward,
        strength=float(0.01 / direction.square().sum()),
        targets=(4.0, 8.0),
        samples=4,
        generator=task.generator("guided"),
        condition=task.condition(4),
        gradient="own",
    )
    assert x0.dtype == torch.float32
    rewards = [r.reward for r in rounds]
    assert rewards[0] + 0.2 < rewards[1]
    assert rewards[1] + 0.2 < rewards[2]


def test_samples_of_different_prompts_share_no_gradient(make: Make) -> None:
    task = make(reward={"name": "brightness"})
    options = {"strength": 1.0, "targets": (1.0,), "samples": 2, "generator": torch.Generator()}
    with pytest.raises(ValueError, match="condition must be alike for all samples with gradient='mean'"):
        guided_sampling(task.chain, task.params, task.objective.reward, condition=task.condition(2), **options)
    task = make()
    alike = task.of_prompts(torch.zeros(2, dtype=torch.long))
    reward = replace(task.objective.reward, scorer=replace(task.objective.reward.scorer, differentiable=False))
    with pytest.raises(ValueError, match="reward must be differentiable"):
        guided_sampling(task.chain, task.params, reward, condition=alike, **options)


# --- checkpoints of blocks -----------------------------------------------------------------------------------------


def gradients(task: Any) -> tuple[Tensor, Tensor]:
    """Return the gradient of a step's mean in the parameters and in x."""
    params, x = leaves(moved(task.params, 0.1)), normal(2, *task.chain.shape).requires_grad_()
    mean = step_mean(task.chain, params, x, 2, task.condition(2))
    found = torch.autograd.grad((mean * normal(*mean.shape, seed=1)).sum(), [*params.values(), x])
    return flat(found[:-1]), found[-1]


@pytest.mark.parametrize("lora", LORAS, ids=["lora", "all weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_give_the_same_gradient(make: Make, kind: str, lora: dict[str, Any] | None) -> None:
    task = make(kind, lora=lora)
    plain, plain_x = gradients(task)
    checkpoint_blocks(task.chain.network)
    kept, kept_x = gradients(task)
    assert error(kept, plain) < 1e-6
    assert error(kept_x, plain_x) < 1e-6


@pytest.mark.parametrize(("kind", "lora"), [("tiny", LORAS[0]), ("tiny", None), ("pixel", None)])
def test_checkpoints_of_torchs_own_would_be_wrong(make: Make, kind: str, lora: dict[str, Any] | None) -> None:
    """The trap: the second computation looks the parameters up in the module, where they no longer are."""
    task = make(kind, lora=lora)
    plain, _ = gradients(task)
    network = task.chain.network
    for enable in (
        network.enable_gradient_checkpointing,
        lambda: network.enable_gradient_checkpointing(lambda module, *a: checkpoint(module, *a, use_reentrant=False)),
    ):
        enable()
        network.requires_grad_(True)
        assert error(gradients(task)[0], plain) > 0.1
        network.requires_grad_(False)
        try:  # torch may notice it then, by the number of tensors that are saved
            assert error(gradients(task)[0], plain) > 0.1
        except CheckpointError:
            pass
        checkpoint_blocks(network)
        assert error(gradients(task)[0], plain) < 1e-6


@pytest.mark.parametrize("lora", LORAS, ids=["lora", "all weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_keep_less(make: Make, kind: str, lora: dict[str, Any] | None) -> None:
    def kept(checkpointing: bool) -> int:
        task = make(kind, lora=lora, model={"checkpointing": checkpointing})
        params, x = leaves(task.params), normal(8, *task.chain.shape).requires_grad_()
        with LiveBytes() as count:
            mean = step_mean(task.chain, params, x, 2, task.condition(8))
            after_forward = count.current
            torch.autograd.grad(mean.sum(), [*params.values(), x])
        assert count.peak >= after_forward
        return after_forward

    assert kept(checkpointing=True) < 0.6 * kept(checkpointing=False)


@pytest.mark.parametrize("lora", LORAS, ids=["lora", "all weights"])
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_with_checkpoints(make: Make, kind: str, lora: dict[str, Any] | None) -> None:
    """Costates pulled through x alone (half order), and steps whose parameters differ from sample to sample (RLR)."""
    estimators = [first_order(3), half_order(3, 2), rlr(3, 1, 1e-2, reading="II")]
    found: dict[bool, list[Tensor]] = {}
    for checkpointing in (False, True):
        task = make(kind, lora=lora, model={"checkpointing": checkpointing})
        found[checkpointing] = []
        for estimator in estimators:
            params = leaves(moved(task.params, 0.05))
            noise = estimator.draw(task.chain, params, 3, task.generator("noise"))
            estimator.accumulate(task.chain, params, task.objective, noise, task.condition(3))
            found[checkpointing].append(flat(p.grad for p in params.values() if p.grad is not None))
    for kept, plain in zip(found[True], found[False], strict=True):
        assert error(kept, plain) < 1e-5


def test_each_samples_gradient_with_checkpoints(make: Make) -> None:
    """torch.func's derivatives forbid the hooks of checkpoints: SRT and THO fit themselves by them."""
    found = []
    for checkpointing in (False, True):
        task = make(model={"checkpointing": checkpointing})
        noise = half_order(3, 2).draw(task.chain, task.params, 2, task.generator("noise"))
        each = half_order(3, 2).per_sample(task.chain, task.params, task.objective, noise, task.condition(2))
        found.append(flat(each.values()))
    assert error(found[1], found[0]) < 1e-5


# --- a frozen last step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_last_step_is_the_one_left_out(make: Make, kind: str) -> None:
    """x_0 of the whole chain, whose last step has no noise, is the decoder's input once it has made that step."""
    task = in_double(make(kind, sampler=FROZEN | {"guidance": 2.0}))
    whole = in_double(make(kind, sampler=FROZEN | {"last_step": "keep", "guidance": 2.0}))
    assert (task.chain.steps, whole.chain.steps, whole.chain.std(1)) == (2, 3, 0)
    x, prompts = normal(2, *task.chain.shape).double(), torch.tensor([1, 0])
    rows = torch.tensor([task.prompts.rows[i][0] for i in prompts])
    expected = whole.decode(whole.chain.mean({}, x, 1, rows), prompts)
    assert error(task.decode(x, prompts), expected) < 1e-12
    # The base's step, not the one of the trained parameters; with its own prompt; and made once.
    assert error(task.decode(x, prompts), whole.decode(whole.chain.mean(whole.params, x, 1, rows))) > 1e-6
    assert error(task.decode(x, prompts.flip(0)), expected) > 1e-6
    assert error(task.decode(x, prompts), whole.decode(x)) > 1e-3
    assert torch.equal(whole.chain.finish(x, None), x)


def test_the_frozen_step_is_told_the_finest_text(make: Make) -> None:
    task = make("pixel", prompts={"train": [["1", "0"], "3"]}, sampler=FROZEN)
    seen: list[Any] = []
    hook = task.chain.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    task.decode(normal(3, 1, 8, 8), torch.tensor([0, 1, 0]))
    hook.remove()
    assert seen == [[0, 3, 0]]
    with pytest.raises(ValueError, match="condition must be a row"):
        task.decode(normal(3, 1, 8, 8), None)


@pytest.mark.parametrize(("kind", "empty"), [("tiny", 2), ("pixel", 4)])
def test_the_frozen_step_is_told_nothing_either(make: Make, kind: str, empty: int) -> None:
    prompts = {"train": list(make(kind).config.prompts.train), "conditional": False}
    task = make(kind, prompts=prompts, sampler=FROZEN)
    assert task.decode.rows.tolist() == [empty] * 2
    x = normal(2, *task.chain.shape)
    assert error(task.decode(x, torch.tensor([0, 1])), task.decode(x, torch.tensor([1, 0]))) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_frozen_step(make: Make, kind: str) -> None:
    task = in_double(make(kind, sampler=FROZEN, model={"checkpointing": True}))
    noise = first_order(2).draw(task.chain, task.params, 2, task.generator("noise"))
    condition, params = task.condition(2), leaves(task.params)
    first_order(2).accumulate(task.chain, params, task.objective, noise, condition)

    graph = leaves(task.params)
    x = task.chain.initial(noise.initial)
    for t in (2, 1):
        x = task.chain.mean(graph, x, t, condition.steps[t - 1]) + task.chain.std(t) * noise.steps[t - 1]
    rewards = task.objective.reward(x, condition.reward)
    wanted = torch.autograd.grad(rewards.mean(), list(graph.values()))
    assert error(flat(p.grad for p in params.values() if p.grad is not None), flat(wanted)) < 1e-10
    assert float(flat(wanted).norm()) > 0


def test_rollouts_are_joined_in_order() -> None:
    """What micro-batches of a chain are put together by: samples along the second axis."""
    parts = [Rollout(normal(3, 2, 4, seed=i), normal(2, 2, seed=i)) for i in range(2)]
    joined = Rollout.join(parts)
    assert torch.equal(joined.latents[:, 2:], parts[1].latents)
    assert torch.equal(joined.costs[:, :2], parts[0].costs)


# --- what is asked of the network once ----------------------------------------------------------------------------


def test_tied_parameters_are_found() -> None:
    free = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    for _ in range(2):
        assert not has_ties(free)
        assert has_ties(tied)


def test_known_dtype_follows_the_weights(make: Make) -> None:
    network: Any = make("pixel").chain.network
    assert type(network).__name__ == "UNet2DModel"
    assert network.dtype == torch.float32
    assert copy.deepcopy(network).double().dtype == torch.float64
