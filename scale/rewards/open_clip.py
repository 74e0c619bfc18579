"""From open_clip's state dict (ViT towers) to the names and the configuration of transformers' CLIPModel.

open_clip                                     transformers
token_embedding.weight                        text_model.embeddings.token_embedding.weight
positional_embedding                          text_model.embeddings.position_embedding.weight
transformer.resblocks.N.*                     text_model.encoder.layers.N.*
ln_final.*                                    text_model.final_layer_norm.*
text_projection                               text_projection.weight, transposed
visual.class_embedding                        vision_model.embeddings.class_embedding
visual.positional_embedding                   vision_model.embeddings.position_embedding.weight
visual.conv1.weight                           vision_model.embeddings.patch_embedding.weight
visual.ln_pre.*, visual.ln_post.*             vision_model.pre_layrnorm.*, vision_model.post_layernorm.*
visual.transformer.resblocks.N.*              vision_model.encoder.layers.N.*
visual.proj                                   visual_projection.weight, transposed
logit_scale                                   logit_scale

and within a layer: ln_1, ln_2 -> layer_norm1, layer_norm2; mlp.c_fc, mlp.c_proj -> mlp.fc1, mlp.fc2;
attn.out_proj -> self_attn.out_proj; attn.in_proj_* is cut into self_attn.{q,k,v}_proj.*.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"text_projection", "visual.proj"}
WITHIN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the keys and layouts of transformers' CLIPModel.

    Raises:
        ValueError: if a key is not one of a CLIP with two transformers.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        layer = LAYER.fullmatch(key)
        if key in NAMES:
            converted[NAMES[key]] = value.T.contiguous() if key in TRANSPOSED else value
        elif layer is None:
            raise ValueError(f"open_clip key {key!r} is unknown; only ViT models with a text transformer are")
        else:
            converted |= _layer(key, layer, value)
    return converted


def _layer(key: str, match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
    visual, number, part, kind = match.groups()
    prefix = f"{'vision_model' if visual else 'text_model'}.encoder.layers.{number}"
    if part == "attn.in_proj":
        names = (f"{prefix}.self_attn.{which}_proj.{kind}" for which in "qkv")
        return {name: piece.contiguous() for name, piece in zip(names, value.chunk(3), strict=True)}
    if part not in WITHIN_LAYER:
        raise ValueError(f"open_clip key {key!r} is unknown; only ViT models with a text transformer are")
    return {f"{prefix}.{WITHIN_LAYER[part]}.{kind}": value}


def config_of(state: dict[str, Tensor], vision_heads: int, text_heads: int, hidden_act: str, end_of_text: int) -> Any:
    """Return the CLIPConfig of an open_clip state dict; its shapes tell all but these arguments.

    Args:
        hidden_act: "gelu", or "quick_gelu" for OpenAI's models.
        end_of_text: the token at whose place the text is read off.
    """
    from transformers import CLIPConfig

    patches = state["visual.positional_embedding"].shape[0] - 1
    patch = state["visual.conv1.weight"].shape[-1]
    text = {
        "vocab_size": state["token_embedding.weight"].shape[0],
        "max_position_embeddings": state["positional_embedding"].shape[0],
        **_tower(state, "", text_heads, hidden_act),
        "eos_token_id": end_of_text,
        "bos_token_id": end_of_text - 1,
        "pad_token_id": end_of_text,
    }
    vision = {
        "image_size": patch * round(patches**0.5),
        "patch_size": patch,
        **_tower(state, "visual.", vision_heads, hidden_act),
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=state["text_projection"].shape[1])


def _tower(state: dict[str, Tensor], prefix: str, heads: int, hidden_act: str) -> dict[str, Any]:
    layers = {key.split("resblocks.")[1].split(".")[0] for key in state if key.startswith(f"{prefix}transformer.")}
    inner, width = state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "hidden_act": hidden_act,
    }
