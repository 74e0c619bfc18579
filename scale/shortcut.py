"""Shortcut fine-tuning (SFT and SFT-PG) of a task: its data, its critic, and its run with a record of the data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithms.critics import MLPCritic, MLPValue
from algorithms.shortcut import Adversary, ShortcutFineTuning, ShortcutTrainer
from algorithms.training import Settings
from scale.critics import ConvCritic, default_widths
from scale.evaluation import digits_like
from scale.methods import SFT, find, read_options
from scale.task import Task

ENCODED = 8
"""Images encoded at once; a constant, so that a run's data do not change with settings that may."""


class ShortcutRun(ShortcutTrainer):
    """A run on a task; its state says which data it learns from, and is refused for others."""

    def __init__(self, task: Task, settings: Settings, micro_batch: int | None = None) -> None:
        training = task.config.training
        method, adversary = make_shortcut(task)
        data = training_data(task)
        self._folder, self._data_digest = task.config.data.folder, _digest(data)
        super().__init__(
            task.chain,
            task.params,
            data,
            adversary,
            method,
            settings,
            lambda update: task.generator("update", update),
            lambda update: task.condition(training.batch, start=(update - 1) * training.batch),
            task.objective.running_costs,
            micro_batch,
        )

    def scalars(self) -> dict[str, float]:
        """Return what the last update saw, for the log."""
        history = self.result().history
        return {
            "critic/value": history.critic_value[-1],
            "critic/penalty": history.penalty[-1],
            "return/mean": history.generator_return[-1],
            "gradient/norm": history.gradient_norm[-1],
            "samples": history.samples[-1],
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "data": self._data_digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: as of `ShortcutTrainer`; if the run that was saved had other data.
        """
        if state["data"] != self._data_digest:
            raise ValueError(f"data.folder must hold the images of the saved run, it has changed: {self._folder}")
        super().load_state_dict(state)


def make_shortcut(task: Task) -> tuple[ShortcutFineTuning, Adversary]:
    """Return the method that the settings name, and its critic and baseline network, freshly drawn.

    Raises:
        ValueError: if the critic does not fit the sampler's samples.
    """
    choice, chain = task.config.method, task.chain
    options, make = read_options(choice.name, choice.options), find(choice.name).shortcut
    assert isinstance(options, SFT)
    assert make is not None
    try:
        if options.critic == "conv":
            critic = ConvCritic(chain.shape, tuple(options.critic_widths or default_widths(chain.shape)))
        else:
            critic = MLPCritic(_dimension(chain.shape), tuple(options.critic_widths or (128, 128)))
    except ValueError as fault:
        raise ValueError(f"method.options.critic_widths: {fault}") from None
    method = make(options, chain.steps)
    params = _drawn(critic, task, "critic")
    if options.value_widths is None or (method.gradient == "pathwise" and not method.needs_value):
        return method, Adversary(critic, params)
    value = MLPValue(_dimension(chain.shape), chain.steps, tuple(options.value_widths))
    return method, Adversary(critic, params, value, _drawn(value, task, "value"))


def training_data(task: Task) -> Tensor:
    """Return what the critic is shown, (N, *chain.shape): pixels in [-1, 1], or the means of the VAE's posteriors.

    The digits' own are the training images of the digits that are asked for, in the shares in which they are.

    Raises:
        ValueError: if the folder cannot be read as images of the model.
    """
    from scale.digits import image_folder

    config, shape = task.config, task.chain.shape
    if config.data.folder is None:
        images = digits_like(asked_digits(task), "train")
    else:
        side, channels = (shape[1], shape[0]) if "pipeline" not in task.parts else (_side(task), 3)
        if shape[1] != shape[2]:
            raise ValueError(f"data.folder needs a model of square images, it makes {shape[1]} x {shape[2]}")
        try:
            images, _ = image_folder(Path(config.data.folder), side, channels)
        except ValueError as fault:
            raise ValueError(f"data.folder: {fault}") from None
    if len(images) < config.training.batch:
        raise ValueError(f"data.folder must hold at least a batch of {config.training.batch} images, got {len(images)}")
    scaled = 2 * images - 1
    return scaled if "pipeline" not in task.parts else encoded(task.parts["pipeline"].vae, scaled)


@torch.no_grad()
def encoded(vae: Any, images: Tensor, batch: int = ENCODED) -> Tensor:
    """Return the latents (n, 4, h, w) of images (n, 3, H, W) in [-1, 1], on the CPU, at the scale of the U-Net.

    They are the posterior's means, no draws, so that they are the same in every run.
    """
    like = next(vae.parameters())
    parts = [vae.encode(part.to(like)).latent_dist.mode().float().cpu() for part in images.split(batch)]
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (torch.cat(parts) - shift) * vae.config.scaling_factor


def asked_digits(task: Task) -> list[int]:
    """Return the digits that the prompts of the training ask for, one for each prompt; all of them where none is told.

    Prompts of several parts count with their last.
    """
    if not task.config.prompts.conditional:
        return list(range(10))
    return [int(text) for text in task.prompts.texts[: task.training]]


def _side(task: Task) -> int:
    return task.chain.shape[1] * task.parts["pipeline"].vae_scale_factor


def _dimension(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _drawn(network: Any, task: Task, name: str) -> dict[str, Tensor]:
    return {key: p.to(task.device) for key, p in network.initial(task.generator("shortcut", name)).items()}


def _digest(data: Tensor) -> str:
    return hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()
