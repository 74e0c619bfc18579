"""Scores by CLIP, all through transformers' CLIPModel: CLIP score, PickScore, HPSv2, and LAION's aesthetic score.

Every image is scored against its own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from scale.rewards.images import CLIP_MEAN, CLIP_STD, resize_and_crop, standardise, three_channels
from scale.rewards.open_clip import config_of, to_transformers
from scale.rewards.weights import fill, from_source, linear_head, pretrained, state_of, weights_file

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICK_SCORE = "yuvalkirstain/PickScore_v1"
HPS = "xswu/HPSv2:HPS_v2_compressed.pt"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth"


@dataclass(frozen=True, eq=False)
class PromptScore:
    """Cosine of the embeddings of image and prompt, times exp(logit scale) if `scaled`."""

    name: str
    model: Any
    tokenizer: Any
    scaled: bool
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (image_embedding(self.model, images) * self._text_embedding(prompts)).sum(1)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine

    @torch.no_grad()
    def _text_embedding(self, prompts: Sequence[str]) -> Tensor:
        # Padded to the full length, so that a text's embedding does not depend on the other texts of the batch.
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        output = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(output.pooler_output, dim=1)


@dataclass(frozen=True, eq=False)
class AestheticScore:
    """LAION's aesthetic predictor: a linear head on the normalised image embedding; prompts play no part."""

    model: Any
    head: nn.Module
    name: str = "aesthetic"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(image_embedding(self.model, images)).squeeze(1)


def image_embedding(model: Any, images: Tensor) -> Tensor:
    """Return the normalised embeddings, (n, width), of images (n, 1 or 3, height, width) in [0, 1]."""
    pixels = three_channels(images).to(device=model.device, dtype=model.dtype)
    pixels = standardise(resize_and_crop(pixels, model.config.vision_config.image_size), CLIP_MEAN, CLIP_STD)
    return normalize(model.get_image_features(pixels).pooler_output, dim=1)


def clip_score(
    cache: Path,
    device: torch.device,
    *,
    model: str = "openai/clip-vit-base-patch16",
    tokenizer: str | None = None,
    scaled: bool = False,
) -> PromptScore:
    """CLIP's cosine of image and prompt.

    Args:
        model: folder or hub id of a CLIPModel.
        tokenizer: folder or hub id of its tokenizer; by default the model's.
        scaled: whether to multiply by the model's exp(logit scale), about 100.

    Raises:
        ValueError: if model or tokenizer cannot be loaded or do not fit.
    """
    network = _clip_model(model, cache, device)
    return PromptScore("clip", network, _tokenizer(tokenizer or model, network, cache), scaled)


def pick_score(
    cache: Path, device: torch.device, *, model: str = PICK_SCORE, tokenizer: str | None = None
) -> PromptScore:
    """PickScore (Kirstain et al. 2023, Pick-a-Pic): exp(logit scale) times the cosine, of a CLIP-H trained on choices.

    Args:
        model: folder or hub id of its CLIPModel.
        tokenizer: folder or hub id; by default CLIP-H's for the released model, else the model's.

    Raises:
        ValueError: if model or tokenizer cannot be loaded or do not fit.
    """
    network = _clip_model(model, cache, device)
    source = tokenizer or (CLIP_H if model == PICK_SCORE else model)
    return PromptScore("pickscore", network, _tokenizer(source, network, cache), scaled=True)


def hps(cache: Path, device: torch.device, *, model: str = HPS, tokenizer: str | None = None) -> PromptScore:
    """Human preference score v2 (Wu et al. 2023): the plain cosine of a CLIP ViT-H/14 trained on preferences.

    Args:
        model: open_clip's checkpoint, as released: a file, or "owner/name:file" on the hub; or the folder or hub id
            of a CLIPModel.
        tokenizer: folder or hub id; by default CLIP-H's for an open_clip checkpoint, else the model's.

    Raises:
        ValueError: if model or tokenizer cannot be loaded or do not fit.
    """
    if ":" in model or Path(model).expanduser().is_file():
        texts = from_source(_tokenizer_class(), tokenizer or CLIP_H, cache)
        network = from_open_clip(state_of(weights_file(model, cache)), model, texts.eos_token_id).to(device)
        return PromptScore("hpsv2", network, _fitting(texts, network, tokenizer or CLIP_H), scaled=False)
    network = _clip_model(model, cache, device)
    return PromptScore("hpsv2", network, _tokenizer(tokenizer or model, network, cache), scaled=False)


def aesthetic(cache: Path, device: torch.device, *, model: str = CLIP_L, head: str = AESTHETIC_HEAD) -> AestheticScore:
    """LAION's aesthetic score (Schuhmann 2022, "sac+logos+ava1-l14-linearMSE"), about 1 to 10.

    Args:
        model: folder or hub id of CLIP ViT-L/14.
        head: weights of the head: a .safetensors or torch file, or "owner/name:file" on the hub.

    Raises:
        ValueError: if model or head cannot be loaded or do not fit.
    """
    network = _clip_model(model, cache, device)
    layers = linear_head(network.config.projection_dim)
    state = {key.removeprefix("layers."): value for key, value in state_of(weights_file(head, cache)).items()}
    fill(layers, state, head)
    return AestheticScore(network, layers.to(device))


def from_open_clip(state: dict[str, Tensor], source: str, end_of_text: int, heads: tuple[int, int] = (16, 16)) -> Any:
    """Return the frozen CLIPModel of an open_clip state dict; `heads`, of vision and text, default to ViT-H/14's.

    Raises:
        ValueError: if a key is unknown, missing or of another shape.
    """
    from transformers import CLIPModel

    network = CLIPModel(config_of(state, *heads, hidden_act="gelu", end_of_text=end_of_text))
    fill(network, to_transformers(state), source)
    return network.eval().requires_grad_(False)


def _clip_model(model: str, cache: Path, device: torch.device) -> Any:
    from transformers import CLIPModel

    return pretrained(CLIPModel, model, cache, device)


def _tokenizer_class() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer


def _tokenizer(source: str, network: Any, cache: Path) -> Any:
    return _fitting(from_source(_tokenizer_class(), source, cache), network, source)


def _fitting(tokenizer: Any, network: Any, source: str) -> Any:
    known, needed = len(tokenizer), network.config.text_config.vocab_size
    if known != needed:  # transformers builds a tokenizer of a few tokens, silently, where the vocabulary is not found
        raise ValueError(f"tokenizer {source!r} must have the text model's {needed} tokens, got {known}")
    return tokenizer
