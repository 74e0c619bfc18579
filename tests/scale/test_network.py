"""The chain of a network: guidance, derivatives, checkpoints of its blocks, and the frozen last step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from algorithms.chain import Params, Rollout, step_mean
from algorithms.estimators import first_order, half_order
from algorithms.rlr import rlr
from scale.lora import load
from scale.memory import LiveBytes
from scale.network import checkpoint_blocks
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
