"""From settings to what is fine-tuned: the chain, its trained parameters, the objective, the prompts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithms.chain import Params, StepConditions
from algorithms.objective import Objective, kl_regularised
from scale.config import Config, Prompt, read_prompts
from scale.libraries import quiet
from scale.lora import add_lora, all_parameters
from scale.network import NetworkChain, checkpoint_blocks
from scale.pixel import PixelDecoder, load_unet, pixel_chain
from scale.prompts import Prompts
from scale.reward import DecodedReward
from scale.rewards import make_scorer
from scale.sampler import GaussianSteps, gaussian_steps
from scale.stable_diffusion import DTYPES, LatentDecoder, load_pipeline, stable_diffusion_chain
from scale.tiny import tiny_stable_diffusion
from verdicts.streams import Stream

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}


@dataclass(frozen=True, eq=False)
class Task:
    """A model and what is asked of it.

    Attributes:
        chain: the sampler.
        params: its trained parameters at the start, on the device: with them the model is the one that was given.
        objective: the expected reward of the decoded sample, less the path KL where the settings ask for it.
        decode: from x_0 and the prompts' numbers to images in [0, 1].
        prompts: those of the training, then those held out.
        training: how many of the prompts are for training.
        parts: what was loaded: "network", "scheduler", and for Stable Diffusion "pipeline".
    """

    config: Config
    chain: NetworkChain
    params: Params
    objective: Objective
    decode: PixelDecoder | LatentDecoder
    prompts: Prompts
    training: int
    parts: dict[str, Any]
    device: torch.device

    @property
    def stream(self) -> Stream:
        """The root of the run's random streams."""
        return Stream(self.config.training.seed)

    def generator(self, *names: str | int) -> torch.Generator:
        """Return the torch generator of an address below the root."""
        return torch.Generator().manual_seed(self.stream.child(*names).integer())

    def condition(self, samples: int, start: int = 0, held_out: bool = False) -> StepConditions:
        """Return the condition of `samples` samples, whose prompts follow one another from number `start` on."""
        first, count = (self.training, len(self.prompts) - self.training) if held_out else (0, self.training)
        if not count:
            first, count = 0, self.training
        chosen = first + (torch.arange(samples) + start) % count
        return self.of_prompts(chosen)

    def of_prompts(self, chosen: Tensor) -> StepConditions:
        """Return the condition of samples with the prompts of these numbers (n,)."""
        told = self.prompts.condition(chosen, self.chain.steps)
        if self.config.prompts.conditional:
            return told
        return replace(told, steps=torch.full_like(told.steps, _empty_row(self.chain)))

    def describe(self) -> str:
        """Return one line on the model, for reports."""
        model, trained = self.config.model, sum(p.numel() for p in self.params.values())
        of = sum(p.numel() for p in self.chain.network.parameters())
        name = model.kind if model.path is None else f"{model.kind} {model.path}"
        return (
            f"{name}: {self.chain.sampler.describe()}; latents {' x '.join(map(str, self.chain.shape))}, guidance "
            f"{self.chain.guidance:g}; {trained} of {of} parameters are trained"
        )


def build(config: Config, cache: Path, progress: bool = False) -> Task:
    """Load the model and make the task that the settings describe.

    Args:
        cache: folder of models that are made here, and of downloads.

    Raises:
        ValueError: if a part cannot be loaded or does not fit the others.
    """
    device = pick_device(config.device)
    given = [*read_prompts(config.prompts.train), *read_prompts(config.prompts.held_out or ())]
    training = len(read_prompts(config.prompts.train))
    if config.model.kind in ("digits", "pixel"):
        made = _pixel(config, cache, device, progress)
    else:
        made = _stable_diffusion(config, cache, device, _texts(given))
    chain, known, parts = made
    prompts = Prompts.of(given, known)
    params = {name: p.to(device) for name, p in _trained(config, chain.network).items()}
    if config.model.checkpointing:
        checkpoint_blocks(chain.network)
    last = [rows[-1] if config.prompts.conditional else _empty_row(chain) for rows in prompts.rows]
    finest = torch.tensor(last)
    decode = (
        PixelDecoder(chain, finest) if "pipeline" not in parts else LatentDecoder(parts["pipeline"].vae, chain, finest)
    )
    scorer = make_scorer(config.reward.name, config.reward.options, cache, device)
    objective = Objective(DecodedReward(decode, scorer, prompts.texts))
    if config.kl > 0:
        objective = kl_regularised(objective, config.kl, params)
    return Task(config, chain, params, objective, decode, prompts, training, parts, device)


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU, if there is one.

    Raises:
        ValueError: if it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(device.type, 1)
    if (device.index or 0) >= there:
        raise ValueError(f"device {name!r} is not there: torch {torch.__version__} sees {there or 'no'} such GPU")
    return device


def make_sampler(config: Config, own: Any) -> GaussianSteps:
    """Return the Gaussian steps of the scheduler that the settings name, with the checkpoint's noise schedule."""
    scheduler = own
    if config.sampler.scheduler != "own":
        kind = getattr(importlib.import_module("diffusers"), SCHEDULERS[config.sampler.scheduler])
        # A latent has no range to be clipped to; schedulers that never clip leave it unsaid, and the default is to.
        options = {} if config.model.kind in ("digits", "pixel") else {"clip_sample": False}
        with quiet():
            scheduler = kind.from_config(own.config, **options)
    return gaussian_steps(scheduler, config.sampler.steps, config.sampler.eta, config.sampler.last_step)


Made = tuple[NetworkChain, Sequence[str], dict[str, Any]]


def _pixel(config: Config, cache: Path, device: torch.device, progress: bool) -> Made:
    path = config.model.path
    if config.model.kind == "digits":
        from scale.digits import digits_model

        path = str(digits_model(cache, progress=progress))
    network, own = load_unet(str(path), DTYPES[config.model.dtype], config.model.revision)
    known = network.config.num_class_embeds
    classes = known - (config.model.no_class == "last")
    if not classes:
        raise ValueError("model.no_class must be none for a network that knows one label only, got last")
    side = network.config.sample_size
    if config.model.resolution not in (None, side):
        raise ValueError(f"model.resolution must be null or {side} for this model, got {config.model.resolution}")
    chain = pixel_chain(network.to(device), make_sampler(config, own), classes, config.sampler.guidance, device)
    return chain, [str(i) for i in range(classes)], {"network": network, "scheduler": own}


def _stable_diffusion(config: Config, cache: Path, device: torch.device, texts: list[str]) -> Made:
    path = config.model.path
    if config.model.kind == "tiny":
        path = str(tiny_stable_diffusion(cache / "tiny-stable-diffusion"))
    pipeline = load_pipeline(str(path), config.model.dtype, config.model.revision).to(device)
    sampler = make_sampler(config, pipeline.scheduler)
    arguments = (pipeline, sampler, texts, config.sampler.guidance, config.model.resolution, device)
    return (
        stable_diffusion_chain(*arguments),
        texts,
        {"network": pipeline.unet, "scheduler": pipeline.scheduler, "pipeline": pipeline},
    )


def _empty_row(chain: NetworkChain) -> int:
    """Return the table's row for "no condition"."""
    if chain.unconditional is None:
        raise ValueError("prompts.conditional must be true for a network that knows no empty condition, got false")
    return chain.unconditional


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    """Return all texts of the prompts, each once."""
    return list(dict.fromkeys(text for p in prompts for text in ((p,) if isinstance(p, str) else p)))


def _trained(config: Config, network: Any) -> Params:
    if config.lora is None:
        return all_parameters(network)
    seed = Stream(config.training.seed).child("lora").integer() % 2**63
    return add_lora(network, config.lora.rank, config.lora.alpha, config.lora.targets, seed)
