"""Small models for the tests: the tiny Stable Diffusion and an untrained U-Net over pixels, each written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.chain import Params
from algorithms.objective import Objective, kl_regularised

PROMPTS = {"tiny": ["the digit", "a thing"], "pixel": ["0", "3"]}

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def pixel_folder(cache: Path) -> Path:
    """An untrained class-conditional U-Net over one channel of 8 x 8 pixels, with 4 classes and "no class"."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from scale.digits import SCHEDULER, Recipe, unet_config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DModel(**unet_config(8, 1, 4, Recipe(block_out_channels=(8, 16))))
    folder = cache / "pixel"
    unet.save_pretrained(folder / "unet")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def make(cache: Path, pixel_folder: Path) -> Make:
    """Return make(kind, **sections), which builds a task of three steps, two prompts and few adapters."""
    from scale.config import Config, parse
    from scale.task import build

    def made(kind: str = "tiny", **sections: Any) -> Any:
        data: dict[str, Any] = {
            "model": {"kind": kind} | ({"path": str(pixel_folder)} if kind == "pixel" else {}),
            "lora": {"rank": 2, "alpha": 3.0, "targets": ["to_q", "to_v"]},
            "sampler": {"steps": 3},
            "prompts": {"train": PROMPTS[kind]},
            "reward": {"name": "symmetry"},
            "method": {"name": "first-order"},
            "device": "cpu",
        }
        for name, section in sections.items():
            both = isinstance(section, dict) and isinstance(data.get(name), dict)
            data[name] = data[name] | section if both else section
        return build(parse(Config, data, "test"), cache)

    return made


def moved(params: Params, by: float = 0.2, seed: int = 5) -> Params:
    """Return parameters away from the start, where half of the adapters' gradient is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {k: p + by * torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}


def in_double(task: Any) -> Any:
    """Turn a task's models into float64, and return the task with its parameters, moved, in float64."""
    task.chain.network.double()
    if "pipeline" in task.parts:
        task.parts["pipeline"].vae.double()
    params = {name: p.double() for name, p in task.params.items()}
    objective = Objective(task.objective.reward)
    if task.config.kl > 0:
        objective = kl_regularised(objective, task.config.kl, params)
    return replace(task, params=moved(params), objective=objective)


def leaves(params: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in params.items()}


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((found - wanted).norm() / wanted.norm())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
