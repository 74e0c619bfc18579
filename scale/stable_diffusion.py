"""Stable Diffusion (1.x, 2.x) with LoRA as a `Chain` over latents; loaded by diffusers' own code."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale.libraries import from_pretrained, named_class, quiet
from scale.network import NetworkChain
from scale.sampler import GaussianSteps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class StableDiffusionChain(NetworkChain):
    """The U-Net's chain over latents (4, height / 8, width / 8); conditions are rows of the table of prompts."""


@dataclass(frozen=True, eq=False)
class LatentDecoder:
    """From latents to images in [0, 1], through the VAE; the range [-1, 1] is converted here, once.

    Attributes:
        chain: makes the last step, where that was frozen out of the chain.
        rows: for each prompt, the row of its finest text; used for a frozen last step only.
    """

    vae: Any
    chain: NetworkChain
    rows: Tensor

    def __call__(self, x0: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Decode latents (n, 4, h, w) of samples with these prompts (n,) to images (n, 3, height, width)."""
        if self.chain.sampler.frozen_last:
            x0 = self.chain.finish(x0, None if prompt is None else self.rows.to(prompt.device)[prompt])
        config = self.vae.config
        latents = x0 / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (images.to(x0.dtype) / 2 + 0.5).clamp(0, 1)


def load_pipeline(path: str, dtype: str = "float32", revision: str | None = None) -> Any:
    """Load a text-to-image pipeline from a hub id or a local folder, in eval mode and without gradients.

    Raises:
        ValueError: if there is none, or if it is not a Stable Diffusion 1.x or 2.x.
    """
    diffusers: Any = importlib.import_module("diffusers")
    index = Path(path) / "model_index.json"
    if Path(path).is_dir() and not index.exists():
        raise ValueError(f"model.path: the folder {path!r} holds no pipeline: there is no model_index.json in it")
    if index.exists():
        kind = named_class(index, "model.path")
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"model.path: {path!r} is a {kind}, must be a StableDiffusionPipeline (1.x or 2.x)")
    options: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "dtype": DTYPES[dtype]}
    if revision is not None:
        options["revision"] = revision
    with quiet():  # the class is imported here, and notes what else could be installed
        load = diffusers.StableDiffusionPipeline.from_pretrained
    pipeline = from_pretrained(load, path, "model.path", **options)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    return pipeline


def embed(pipeline: Any, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Return the text encoder's states of the texts, (len(texts), tokens, width)."""
    tokenizer, length = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    for text in texts:
        count = len(tokenizer(text, verbose=False).input_ids)
        if count > length:
            warnings.warn(f"prompt {text!r} has {count} tokens, the model reads the first {length}", stacklevel=2)
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    options = {}
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        options["attention_mask"] = tokens.attention_mask.to(device)
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids.to(device), **options)[0]


def stable_diffusion_chain(
    pipeline: Any,
    sampler: GaussianSteps,
    texts: Sequence[str],
    guidance: float,
    resolution: int | None = None,
    device: torch.device | str = "cpu",
) -> StableDiffusionChain:
    """Return the chain of a loaded pipeline; its table holds the texts' states, and the empty text's in the last row.

    Args:
        resolution: height and width of the images in pixels; the checkpoint's own by default.

    Raises:
        ValueError: if the resolution is not a multiple of what a latent stands for.
    """
    factor, channels = pipeline.vae_scale_factor, pipeline.unet.config.in_channels
    side = resolution or pipeline.unet.config.sample_size * factor
    # Every level of the U-Net but the last halves its input.
    multiple = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if side % multiple:
        raise ValueError(f"model.resolution must be a multiple of {multiple} for this model, got {side}")
    return StableDiffusionChain(
        network=pipeline.unet,
        sampler=sampler,
        shape=(channels, side // factor, side // factor),
        told="encoder_hidden_states",
        table=embed(pipeline, [*texts, ""], device),
        guidance=guidance,
        unconditional=len(texts),
    )
