"""Adapters: nothing is changed by putting them on, they alone are trained, in float32, and their file is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.chain import Params, rollout, step_log_prob
from algorithms.estimators import first_order, policy_gradient
from algorithms.training import FromEstimator, Settings, fine_tune
from scale.lora import add_lora, load, save_lora
from tests.scale.conftest import Make, error, flat, leaves, moved, normal

pytest.importorskip("peft")

KINDS = ("tiny", "pixel")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TRAINED = {"rank": 2, "alpha": 3.0, "targets": ["to_q", "to_v"]}


def a_mean(task: Any, params: Params, t: int = 2) -> Tensor:
    x = normal(2, *task.chain.shape)
    with torch.no_grad():
        return task.chain.mean(params, x, t, task.condition(2).steps[t - 1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_at_the_start_are_off_bit_for_bit(make: Make, kind: str, dtype: str) -> None:
    task = make(kind, model={"dtype": dtype}, lora={"targets": ATTENTION})
    base = make(kind, model={"dtype": dtype}, lora=None)
    assert not any("lora" in name for name, _ in base.chain.network.named_modules())
    for t in range(1, 4):
        own = a_mean(base, {}, t)
        assert torch.equal(a_mean(task, task.params, t), own)
        # Copies lie elsewhere in memory, where a kernel may add up in another order.
        assert error(a_mean(base, base.params, t), own) < 1e-6
        assert not torch.equal(a_mean(task, moved(task.params), t), own)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_are_where_and_what_was_asked_for(make: Make, kind: str) -> None:
    task = make(kind, lora=TRAINED)
    network = task.chain.network
    expected = {
        f"{name}.lora_{side}.default.weight"
        for name, module in make(kind, lora=None).chain.network.named_modules()
        for side in "AB"
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in ("to_q", "to_v")
    }
    assert set(task.params) == expected
    assert expected
    for name, p in task.params.items():
        own = network.get_submodule(name.split(".lora_")[0]).base_layer.weight
        assert p.shape == ((2, own.shape[1]) if "lora_A" in name else (own.shape[0], 2))
        assert bool((p == 0).all()) == ("lora_B" in name)
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    again = make(kind, lora=TRAINED).params
    assert all(torch.equal(p, again[name]) for name, p in task.params.items())
    other = make(kind, lora=TRAINED, training={"seed": 1}).params
    assert not torch.equal(flat(other.values()), flat(again.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_rank_product_is_added(make: Make, kind: str) -> None:
    """The same network without adapters, its weights changed by hand by alpha / rank B A."""
    task, base = make(kind), make(kind, lora=None)
    params = moved(task.params)
    merged = dict(base.params)
    for name in params:
        if ".lora_A." in name:
            product = params[name.replace("lora_A", "lora_B")] @ params[name]
            weight = name.replace(".lora_A.default.weight", ".weight")
            merged[weight] = merged[weight] + 3.0 / 2 * product
    assert error(a_mean(base, merged), a_mean(task, params)) < 1e-5
    assert error(a_mean(base, base.params), a_mean(task, params)) > 1e-3


@pytest.mark.parametrize("lora", [TRAINED, None], ids=["lora", "all weights"])
def test_training_leaves_the_network_as_it_was(make: Make, lora: dict[str, Any] | None) -> None:
    task = make(lora=lora)
    before = {name: value.clone() for name, value in task.chain.network.state_dict().items()}
    method = FromEstimator(first_order(3))
    settings = Settings(updates=2, samples=2, learning_rate=0.1)
    arguments = (method, settings, lambda u: task.generator("update", u), task.condition(2))
    tuned = fine_tune(task.chain, task.params, task.objective, *arguments)
    after = task.chain.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in task.chain.network.parameters())
    # All of them move, but for queries and keys where there is only one pixel to look at: at the lowest resolution.
    still = [name for name, p in tuned.params.items() if torch.equal(p, task.params[name])]
    assert all("mid_block" in name and (".attn1.to_q." in name or ".attn1.to_k." in name) for name in still)
    assert len(still) <= 2
    assert not any(p.requires_grad for p in task.parts["pipeline"].vae.parameters())


@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("tiny", "bfloat16", TRAINED),
        ("tiny", "bfloat16", None),
        ("tiny", "float16", TRAINED),
        ("pixel", "bfloat16", TRAINED),
        ("pixel", "float16", None),
    ],
)
def test_what_is_trained_is_float32_whatever_the_network_is(
    make: Make, kind: str, dtype: str, lora: dict[str, Any] | None
) -> None:
    task, wide = make(kind, model={"dtype": dtype}, lora=lora), make(kind, lora=lora)
    assert {p.dtype for p in task.params.values()} == {torch.float32}
    base = {p.dtype for name, p in task.chain.network.named_parameters() if "lora" not in name}
    assert base == {getattr(torch, dtype)}

    estimator = policy_gradient(3)
    noise = estimator.draw(task.chain, task.params, 2, task.generator("noise"))
    condition = task.condition(2)
    found = []
    for each in (task, wide):
        params = leaves(moved(each.params, 0.01))
        roll = rollout(each.chain, params, noise, condition)
        log_prob = step_log_prob(each.chain, params, roll.latents[2], roll.latents[1], 2, condition)
        returns = estimator.accumulate(each.chain, params, each.objective, noise, condition)
        output = each.chain.output(params, roll.latents[2], torch.tensor(300), condition.steps[1])
        for value in (output, roll.latents, log_prob, returns, each.decode(roll.latents[0])):
            assert value.dtype == torch.float32
        assert {p.grad.dtype for p in params.values() if p.grad is not None} == {torch.float32}
        found.append((roll.latents, flat(p.grad for p in params.values())))
    # Close to the float32 network, but not so close that it could have been the one that was run.
    assert 1e-5 < error(found[0][0], found[1][0]) < 0.05
    assert 1e-5 < error(found[0][1], found[1][1]) < 0.2


@pytest.mark.parametrize("alpha", [2.0, 7.0])
def test_the_file_is_read_by_diffusers(make: Make, tmp_path: Path, alpha: float) -> None:
    task = make(lora={"rank": 2, "alpha": alpha, "targets": ATTENTION})
    params = moved(task.params)
    file = save_lora(task.chain.network, leaves(params), tmp_path)
    assert file.parent == tmp_path
    assert file.is_file()

    def as_read(folder: Path) -> Tensor:
        fresh = make(lora=None)
        fresh.parts["pipeline"].load_lora_weights(folder)
        return a_mean(fresh, {})

    assert error(as_read(tmp_path), a_mean(task, params)) < 1e-6
    assert error(a_mean(task, {}), a_mean(task, params)) > 1e-3

    # The planted mistake: a file that does not say alpha, as diffusers' own call writes it without being told.
    import diffusers
    from peft.utils import get_peft_model_state_dict

    load(task.chain.network, params)
    layers = get_peft_model_state_dict(task.chain.network)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "bare", unet_lora_layers=layers)
    gap = error(as_read(tmp_path / "bare"), a_mean(task, params))
    assert gap < 1e-6 if alpha == 2 else gap > 1e-3


def test_writing_the_file_leaves_the_network_as_it_was(make: Make, tmp_path: Path) -> None:
    """A frozen last step is made with the network as it was given, also after the first checkpoint."""
    task = make(sampler={"scheduler": "ddpm", "steps": 3, "last_step": "frozen"})
    x, prompts = normal(2, *task.chain.shape), torch.tensor([0, 1])
    before = task.decode(x, prompts)
    save_lora(task.chain.network, moved(task.params, 1.0), tmp_path)
    assert torch.equal(task.decode(x, prompts), before)
    load(task.chain.network, moved(task.params, 1.0))
    assert not torch.equal(task.decode(x, prompts), before)


def test_the_file_holds_numbers_and_text_only(make: Make, tmp_path: Path) -> None:
    from safetensors import safe_open

    task = make()
    with safe_open(save_lora(task.chain.network, task.params, tmp_path), "pt") as file:
        assert len(file.keys()) == len(task.params)
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == 3.0


def test_equal_adapters_are_equal_bytes(make: Make, tmp_path: Path) -> None:
    """Two keys of metadata in an order of chance, sixteen times, and eight names of layers from a set."""
    from safetensors import safe_open

    targets = [*ATTENTION, "conv1", "conv2", "proj_in", "proj_out"]
    task = make(lora={"targets": targets})
    params = moved(task.params)
    files = [save_lora(task.chain.network, params, tmp_path / str(i)) for i in range(16)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.target_modules"] == sorted(targets)
        numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert error(flat(numbers[k] for k in sorted(numbers)).sort().values, flat(params.values()).sort().values) == 0
    other = save_lora(task.chain.network, moved(task.params, seed=6), tmp_path)
    assert other.read_bytes() != files[0].read_bytes()


@pytest.mark.parametrize("at", ["diffusers", "disk"])
def test_a_file_that_is_half_written_replaces_none(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    import os

    import safetensors.torch

    task = make()
    file = save_lora(task.chain.network, task.params, tmp_path)
    before = file.read_bytes()

    def half(weights: Any, path: str, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("cut off")

    def full(descriptor: int) -> None:
        raise OSError("cut off")

    if at == "diffusers":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cut off"):
        save_lora(task.chain.network, moved(task.params), tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


def test_bad_settings(make: Make) -> None:
    network = make(lora=None).chain.network
    with pytest.raises(ValueError, match=r"^lora.targets: no module of UNet2DConditionModel is named 'to_x'$"):
        make(lora={"targets": ["to_q", "to_x"]})
    with pytest.raises(ValueError, match="is named 'o_q'"):  # an end of a name, but not a whole part of it
        make(lora={"targets": ["o_q"]})
    for target in ("attn1", "norm1"):
        with pytest.raises(ValueError, match=rf"^lora.targets must name layers .* got \['{target}'\]: ") as caught:
            make(lora={"targets": [target]})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lora.rank must be >= 1, got 0"):
        add_lora(network, 0, 1.0, ATTENTION, 0)
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="lora.alpha must be > 0, got"):
            add_lora(network, 1, alpha, ATTENTION, 0)


def test_convolutions_can_be_adapted(make: Make) -> None:
    task = make(lora={"targets": ["conv1"]})
    assert {p.dim() for p in task.params.values()} == {4}
    assert torch.equal(a_mean(task, task.params), a_mean(make(lora=None), {}))
    assert error(a_mean(task, moved(task.params)), a_mean(task, {})) > 1e-3


def test_the_initial_parameters_belong_to_the_task_alone(make: Make) -> None:
    task = make()
    own = dict(task.chain.network.named_parameters())
    replace(task).params[next(iter(task.params))].add_(1)
    assert not torch.equal(own[next(iter(task.params))], task.params[next(iter(task.params))])
