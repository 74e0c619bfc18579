"""A very small Stable Diffusion with random weights, in the layout of a real checkpoint: for tests and dry runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from scale.libraries import quiet

MERGES = ("d i", "g i", "t h", "th e</w>")
LENGTH = 8


def tiny_stable_diffusion(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of about 6 MB that `StableDiffusionPipeline.from_pretrained` reads; return its folder.

    Images have 16 x 16 pixels, latents 4 x 4 x 4; prompts 8 tokens. A folder that is complete is left as it is.
    """
    if (folder / "model_index.json").exists():
        return folder
    diffusers: Any = importlib.import_module("diffusers")  # whose annotations refuse what its own checkpoints hold
    transformers: Any = importlib.import_module("transformers")

    tokenizer = _tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):  # the libraries draw initial weights from the global generator only
        torch.manual_seed(seed)
        text_encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = diffusers.UNet2DConditionModel(
            sample_size=2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = diffusers.AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = (vae, text_encoder, tokenizer, unet, scheduler)
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with quiet():
        diffusers.StableDiffusionPipeline(*parts, **extras).save_pretrained(folder)
    return folder


def _tokenizer(folder: Path) -> Any:
    """Write a byte-level vocabulary with a few merges, and read it back as the tokenizer of a checkpoint is."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(f"{s}</w>" for s in symbols), *(m.replace(" ", "") for m in MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(dict.fromkeys(words))}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    if len(tokenizer) < len(symbols):
        raise RuntimeError(f"the tokenizer written to {folder} was read back with {len(tokenizer)} tokens")
    return tokenizer
