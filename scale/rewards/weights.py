"""Weights by folder, file or hub id: safetensors, or tensors-only torch files; nothing is ever unpickled."""

from __future__ import annotations

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

LINEAR_HEAD = (1024, 128, 64, 16, 1)
NOT_FOUND = "model {0!r} is not a folder or file here, nor could it be had from the hub; hub ids need network"


def pretrained(kind: Any, model: str, cache: Path, device: torch.device) -> Any:
    """Load a transformers model, frozen and in evaluation mode.

    Args:
        kind: a model class of transformers.
        model: folder, or hub id (from safetensors only).
        cache: hub ids are kept in `cache / "hub"`.

    Raises:
        ValueError: if it cannot be found or loaded, or if weights are missing from it.
    """
    folder = Path(model).expanduser()
    safe = not folder.is_dir() or any(folder.glob("*.safetensors"))
    loaded, info = from_source(
        kind, model, cache, use_safetensors=safe, weights_only=True, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        keys = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(f"model {model!r} has no fitting weights for {', '.join(keys[:3])} ({len(keys)} in all)")
    return loaded.to(device).eval().requires_grad_(False)


def from_source(kind: Any, source: str, cache: Path, **options: Any) -> Any:
    """Return kind.from_pretrained(source), from a folder or from the hub.

    Raises:
        ValueError: if the source is neither a folder nor a hub id, or cannot be loaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        try:
            return kind.from_pretrained(str(folder), local_files_only=True, **options)
        except OSError as error:
            raise ValueError(f"folder {str(source)!r} cannot be loaded ({_first_line(error)})") from error
    try:
        return kind.from_pretrained(_hub_id(source), cache_dir=str(cache / "hub"), **options)
    except OSError as error:
        raise ValueError(f"{NOT_FOUND.format(source)} ({_first_line(error)})") from error


def weights_file(source: str, cache: Path) -> Path:
    """Return the file `source`: a path, or "owner/name:file" on the hub.

    Raises:
        ValueError: if it is neither, or cannot be fetched.
    """
    local = Path(source).expanduser()
    if local.is_file():
        return local
    owner, colon, name = str(source).rpartition(":")
    if not colon:
        raise ValueError(f"file {str(source)!r} does not exist; on the hub it would be 'owner/name:file'")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_hub_id(owner), name, cache_dir=str(cache / "hub")))
    except OSError as error:
        raise ValueError(f"{NOT_FOUND.format(source)} ({_first_line(error)})") from error


def _hub_id(source: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(source)):
        raise ValueError(NOT_FOUND.format(source))
    return str(source)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def state_of(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a torch file, unwrapped from "state_dict" if need be.

    Raises:
        ValueError: if it holds more than tensors.
    """
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(f"file {file.name!r} must hold tensors only ({_first_line(error)})") from error
    state = state.get("state_dict", state)
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(
            f"file {file.name!r} must hold tensors only, got {type(state[other[0]]).__name__} {other[0]!r}"
        )
    return state


def linear_head(width: int) -> nn.Sequential:
    """Return layers width-1024-128-64-16-1 without activations, the head of LAION's aesthetic score and ImageReward.

    Dropout does nothing in evaluation; it is there because the released keys count it.
    """
    sizes = (width, *LINEAR_HEAD)
    first, second, third, fourth, fifth = (nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
    layers = (first, nn.Dropout(0.2), second, nn.Dropout(0.2), third, nn.Dropout(0.1), fourth, fifth)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def fill(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, key by key.

    Raises:
        ValueError: if a key is missing, too many, or of another shape.
    """
    own = module.state_dict()
    for key in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"weights {source!r} {'lack' if key in own else 'have a surplus'} {key!r}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(f"weights {source!r}: {key!r} must be {tuple(own[key].shape)}, got {tuple(value.shape)}")
    module.load_state_dict(state)
