"""ImageReward (Xu et al. 2023): BLIP reads the prompt with the image in view; a linear head scores the first token.

The released `ImageReward.pt` becomes transformers' BlipVisionModel and BlipTextModel by renaming alone:

released                                      here
blip.visual_encoder.cls_token                 vision_model.embeddings.class_embedding
blip.visual_encoder.pos_embed                 vision_model.embeddings.position_embedding
blip.visual_encoder.patch_embed.proj.*        vision_model.embeddings.patch_embedding.*
blip.visual_encoder.blocks.N.norm1|2.*        vision_model.encoder.layers.N.layer_norm1|2.*
blip.visual_encoder.blocks.N.attn.qkv.*       vision_model.encoder.layers.N.self_attn.qkv.*
blip.visual_encoder.blocks.N.attn.proj.*      vision_model.encoder.layers.N.self_attn.projection.*
blip.visual_encoder.blocks.N.mlp.*            vision_model.encoder.layers.N.mlp.*
blip.visual_encoder.norm.*                    vision_model.post_layernorm.*
blip.text_encoder.*                           text_encoder.*
mlp.layers.N.*                                head.N.*

Left out, since the score does not use them: blip.vision_proj.*, blip.text_proj.*, and the buffer of position numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scale.rewards.images import CLIP_MEAN, CLIP_STD, resize_and_crop, standardise, three_channels
from scale.rewards.weights import fill, from_source, linear_head, state_of, weights_file

IMAGE_REWARD = "THUDM/ImageReward:ImageReward.pt"
BERT = "google-bert/bert-base-uncased"
# Shift and scale of the raw score in the authors' inference code (ImageReward/ImageReward.py).
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LONGEST_PROMPT = 35

RENAMED = (
    (r"blip\.visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)",
        r"vision_model.encoder.layers.\1.self_attn.projection.\2",
    ),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision_model.post_layernorm.\1"),
    (r"blip\.text_encoder\.(.+)", r"text_encoder.\1"),
    (r"mlp\.layers\.(.+)", r"head.\1"),
)
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..+|blip\.text_encoder\.embeddings\.position_ids")


class ImageRewardModel(nn.Module):
    """Vision transformer, text encoder with cross-attention, linear head."""

    def __init__(self, config: Any) -> None:
        """Build from a transformers BlipConfig."""
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.config = config
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.head = linear_head(config.text_config.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return the raw scores (n,) of standardised pixels and of tokens (n, length) with their padding mask."""
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        read = self.text_encoder(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state
        return self.head(read[:, 0]).squeeze(1)


@dataclass(frozen=True, eq=False)
class ImageRewardScore:
    """(raw score - MEAN) / STD."""

    model: ImageRewardModel
    tokenizer: Any
    name: str = "imagereward"
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        weight = next(self.model.head.parameters())
        pixels = three_channels(images).to(weight)
        pixels = resize_and_crop(pixels, self.model.config.vision_config.image_size)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LONGEST_PROMPT, return_tensors="pt"
        ).to(weight.device)
        raw = self.model(standardise(pixels, CLIP_MEAN, CLIP_STD), tokens["input_ids"], tokens["attention_mask"])
        return (raw - MEAN) / STD


def image_reward(
    cache: Path, device: torch.device, *, model: str = IMAGE_REWARD, tokenizer: str = BERT
) -> ImageRewardScore:
    """ImageReward, from the released checkpoint or from a folder that `convert` wrote.

    The released weights were not at hand when this was written: layout and forward pass are checked against a
    re-derivation of the released code on random weights, the published scores are not.

    Args:
        model: the released file, "owner/name:file" on the hub, or a folder with config.json and model.safetensors.
        tokenizer: folder or hub id of the uncased BERT tokenizer.

    Raises:
        ValueError: if model or tokenizer cannot be loaded or do not fit.
    """
    from transformers import BertTokenizer, BlipConfig

    folder = Path(model).expanduser()
    if folder.is_dir():
        config = from_source(BlipConfig, model, cache)
        state = state_of(weights_file(str(folder / "model.safetensors"), cache))
    else:
        config, state = released_config(), renamed(state_of(weights_file(model, cache)))
    network = ImageRewardModel(config).eval().requires_grad_(False)
    fill(network, state, model)
    texts = from_source(BertTokenizer, tokenizer, cache)
    if not 5 < len(texts) <= config.text_config.vocab_size:  # 5: transformers builds an empty one in silence
        raise ValueError(
            f"tokenizer {tokenizer!r} must have 6 to {config.text_config.vocab_size} tokens, got {len(texts)}"
        )
    return ImageRewardScore(network.to(device), texts)


def convert(checkpoint: Path, folder: Path, config: Any = None) -> None:
    """Write the released checkpoint to `folder` as config.json and model.safetensors.

    Args:
        checkpoint: the released file, read with weights_only.
        folder: where to write; made if need be.
        config: a BlipConfig; by default the released model's.

    Raises:
        ValueError: if a key of the checkpoint is unknown, missing or of another shape.
    """
    from safetensors.torch import save_file

    config = config or released_config()
    state = renamed(state_of(weights_file(str(checkpoint), folder)))
    with torch.device("meta"):
        shapes = ImageRewardModel(config)
    fill(shapes, {key: value.to("meta") for key, value in state.items()}, str(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the released state dict under the names used here.

    Raises:
        ValueError: if a key is neither known nor known to be unused.
    """
    return {_renamed(key): value for key, value in state.items() if not UNUSED.fullmatch(key)}


def _renamed(key: str) -> str:
    for pattern, name in RENAMED:
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise ValueError(f"ImageReward key {key!r} is unknown")


def released_config() -> Any:
    """Return the released model's BlipConfig: ViT-L/16 at 224 pixels, BERT-base with 12 heads and two added tokens.

    Heads and epsilons are the released code's (timm's ViT has 1e-6), not the defaults of transformers.
    """
    from transformers import BlipConfig

    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    text = {"vocab_size": 30524, "hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
    return BlipConfig(vision_config=vision, text_config=text)
