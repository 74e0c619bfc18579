"""Low-rank adaptation (Hu et al. 2022) through peft: which parameters are trained, and their file."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from algorithms.chain import Params
from scale.checkpoints import write_atomically

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""


def add_lora(network: Any, rank: int, alpha: float, targets: Sequence[str], seed: int) -> Params:
    """Put low-rank adapters on the target modules, freeze all else, and return the adapters' parameters (float32).

    The second factor is zero, so that the network computes what it did before, bit for bit.

    Raises:
        ValueError: if rank < 1 or alpha <= 0, if no module of the network has a name that ends in a target's, or if one
            that has cannot be adapted.
    """
    if rank < 1:
        raise ValueError(f"lora.rank must be >= 1, got {rank}")
    if not alpha > 0:
        raise ValueError(f"lora.alpha must be > 0, got {alpha}")
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name, _ in network.named_modules()):
            raise ValueError(f"lora.targets: no module of {type(network).__name__} is named {target!r}")
    peft: Any = importlib.import_module("peft")
    network.requires_grad_(False)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=False)
    try:
        if hasattr(network, "add_adapter"):
            network.add_adapter(settings)
        else:
            peft.inject_adapter_in_model(settings, network)
    except ValueError as fault:
        reason = " ".join(str(fault).split())[:300]
        raise ValueError(f"lora.targets must name layers that peft can adapt, got {list(targets)}: {reason}") from fault
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for name, p in network.named_parameters():
        if ".lora_" not in name:
            continue
        p.data = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        if ".lora_A." in name:
            drawn = torch.empty(p.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            p.data.copy_(drawn)
        params[name] = p.detach().clone()
    network.requires_grad_(False)
    return params


def all_parameters(network: nn.Module) -> Params:
    """Return float32 copies of all of the network's parameters: what is trained without adapters."""
    network.requires_grad_(False)
    return {name: p.detach().to(torch.float32, copy=True) for name, p in network.named_parameters()}


def save_lora(network: Any, params: Params, folder: Path) -> Path:
    """Write the adapters of a Stable Diffusion U-Net as a file that `pipeline.load_lora_weights(folder)` reads.

    The scale alpha / rank goes with them; a file without it would be read as alpha = rank. Equal adapters give equal
    bytes, and a kill at any moment leaves the old file or the new one.

    Raises:
        OSError: if the file cannot be written; the old one is left.
    """
    diffusers: Any = importlib.import_module("diffusers")
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    # Not through the network itself: it stays as it was given, which is what a frozen last step is made with.
    layers = get_peft_model_state_dict(network, state_dict={name: p.detach() for name, p in params.items()})
    settings = {
        part: {key: sorted(value) if isinstance(value, set) else value for key, value in own.items()}
        for part, own in _collate_lora_metadata({"unet": network}).items()
    }
    with tempfile.TemporaryDirectory() as aside:
        diffusers.StableDiffusionPipeline.save_lora_weights(aside, unet_lora_layers=layers, **settings)
        written = (Path(aside) / LORA_FILE).read_bytes()
    file = folder / LORA_FILE
    write_atomically(file, _with_sorted_header(written))
    return file


def _with_sorted_header(written: bytes) -> bytes:
    """Return a safetensors file with the keys of its header in order; the library leaves the metadata's to chance.

    A file is the length of the header in 8 bytes, little-endian; the header, in JSON padded with spaces to a multiple
    of 8; the numbers, whose places in what follows are in the header.
    """
    end = 8 + int.from_bytes(written[:8], "little")
    header = json.dumps(json.loads(written[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + written[end:]


def load(network: nn.Module, params: Params) -> None:
    """Copy parameters into the network."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, p in params.items():
            own[name].copy_(p)
