"""Scores by models, on tiny random ones loaded through the same path: against the models themselves, written out here.

Forward passes in the *released* layouts (open_clip, BLIP's own code) are re-derived below in plain torch, so that the
conversions of keys are checked by what the converted models compute.
"""

import json
import math
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, softmax

from scale.reward import DecodedReward
from scale.rewards import make_scorer
from scale.rewards.blip import MEAN, STD, convert, released_config, renamed
from scale.rewards.clip import from_open_clip
from scale.rewards.images import resize_and_crop, standardise, three_channels
from scale.rewards.open_clip import to_transformers
from scale.rewards.weights import linear_head, state_of, weights_file
from tests.scale.test_rewards_pairing import PROMPTS, check_pairing, example_images

SIDE, PATCH, WIDTH, TOKENS = 16, 8, 16, 12
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(module: nn.Module, std=0.3, seed=3) -> Any:
    """Make every weight count: transformers draws them so small that a mistake could hide."""
    draw = generator(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "logit_scale":
                p.copy_(
                    std * torch.randn(p.shape, generator=draw) + (1.0 if "norm" in name.lower() and p.dim() == 1 else 0)
                )
    return module


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIPModel and a byte-level tokenizer with one merge, in the files of the hub."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "ca", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    assert len(tokenizer) == len(vocabulary)
    tower = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": TOKENS, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {"image_size": SIDE, "patch_size": PATCH}
    shared = {**tower, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=10)
    randomise(CLIPModel(config)).save_pretrained(folder)
    return folder


def clip_scorer(name, folder, tmp_path, **options) -> Any:
    return make_scorer(name, {"model": str(folder), **options}, tmp_path, "cpu")


# Preprocessing


@pytest.mark.parametrize(
    ("mode", "filter_"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)]
)
@pytest.mark.parametrize("size", [(50, 50), (40, 61), (61, 40), (9, 13)])
def test_resizing_is_pillows(mode, filter_, size):
    # A smooth image in the middle of the range: what remains is Pillow's rounding to 8 bits, twice.
    i, j = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    image = (0.5 + 0.3 * torch.sin(i / 5) * torch.cos(j / 7))[None, None]
    pillow = Image.fromarray((image[0, 0] * 255).round().to(torch.uint8).numpy())
    short = min(size)
    height, width = (int(SIDE * s / short) for s in size)
    pillow = pillow.resize((width, height), filter_)
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    pillow = pillow.crop((left, top, left + SIDE, top + SIDE))
    expected = torch.tensor(list(pillow.tobytes())).reshape(SIDE, SIDE) / 255
    torch.testing.assert_close(resize_and_crop(image, SIDE, mode)[0, 0], expected, atol=1.6 / 255, rtol=0)


def test_images_of_the_right_size_are_left_alone():
    images = example_images(side=SIDE)
    assert torch.equal(resize_and_crop(images, SIDE), images)
    wide = example_images(side=SIDE + 4)[..., :SIDE, :]
    assert torch.equal(resize_and_crop(wide, SIDE), wide[..., 2:-2])


def test_channels():
    grey = example_images(1)
    assert torch.equal(three_channels(grey), torch.cat([grey] * 3, 1))
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        three_channels(example_images(2))


def test_standardise_channel_by_channel():
    images = torch.full((1, 3, 1, 1), 0.5)
    expected = [(0.5 - m) / s for m, s in zip(CLIP_MEAN, CLIP_STD, strict=True)]
    assert standardise(images, tuple(CLIP_MEAN), tuple(CLIP_STD)).flatten().tolist() == pytest.approx(expected)


# CLIP


def clip_by_hand(folder, images, prompts):
    """Cosines through CLIPModel's own joint forward pass, one pair at a time, with texts that are not padded."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(str(folder)).eval()
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    logits = []
    for image, prompt in zip(pixels, prompts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=TOKENS)["input_ids"]
        logits.append(model(input_ids=ids, pixel_values=image[None]).logits_per_image.item())
    return torch.tensor(logits), model.logit_scale.exp().item()


@pytest.mark.parametrize(
    ("name", "options", "scaled"),
    [
        ("clip", {}, False),
        ("clip", {"scaled": True}, True),
        ("pickscore", {}, True),
        ("hpsv2", {}, False),
    ],
)
def test_prompt_scores_are_the_models(clip_folder, tmp_path, name, options, scaled):
    images = example_images(side=SIDE)
    logits, scale = clip_by_hand(clip_folder, images, PROMPTS)
    assert logits.std() > 0.01 * scale
    expected = logits if scaled else logits / scale
    scores = clip_scorer(name, clip_folder, tmp_path, **options)(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_prompt_scores_pair_each_image_with_its_own_prompt(clip_folder, tmp_path, name):
    check_pairing(clip_scorer(name, clip_folder, tmp_path), example_images(), PROMPTS, reads=True, rtol=1e-4)


def test_long_prompts_are_cut_and_grey_images_repeated(clip_folder, tmp_path):
    scorer = clip_scorer("clip", clip_folder, tmp_path)
    grey = example_images(1, n=1)
    torch.testing.assert_close(scorer(grey, ["a" + " cat" * 40]), scorer(grey.repeat(1, 3, 1, 1), ["a" + " cat" * 30]))


def directional_check(scorer, images, prompts):
    """Central differences in float64 along a random direction of the pixels, of the sum of scores."""
    x = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(x, prompts).sum(), x)
    assert gradient.flatten(1).abs().sum(1).min() > 0
    direction = torch.randn(images.shape, generator=generator(9), dtype=torch.float64)
    h = 1e-5
    with torch.no_grad():
        slope = (scorer(x + h * direction, prompts) - scorer(x - h * direction, prompts)).sum() / (2 * h)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2"])
def test_clip_gradients_reach_the_pixels(clip_folder, tmp_path, name):
    scorer = clip_scorer(name, clip_folder, tmp_path)
    scorer.model.double()
    directional_check(scorer, example_images(), PROMPTS)
    assert all(p.grad is None and not p.requires_grad for p in scorer.model.parameters())


def test_through_the_decoded_reward(clip_folder, tmp_path):
    scorer = clip_scorer("pickscore", clip_folder, tmp_path)
    x0 = (2 * example_images() - 1).requires_grad_()
    places = torch.tensor([3, 1, 1, 0])
    scores = DecodedReward(lambda x, places: 0.5 * x + 0.5, scorer, tuple(PROMPTS))(x0, places)
    torch.testing.assert_close(scores, scorer(0.5 * x0 + 0.5, [PROMPTS[i] for i in places]))
    (gradient,) = torch.autograd.grad(scores.sum(), x0)
    assert gradient.flatten(1).abs().sum(1).min() > 0


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_aesthetic(clip_folder, tmp_path, suffix):
    from safetensors.torch import save_file
    from transformers import CLIPModel

    head = randomise(linear_head(10), std=0.1)
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    assert sorted(state) == sorted(f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias"))
    file = tmp_path / f"head.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    scorer = clip_scorer("aesthetic", clip_folder, tmp_path, head=str(file))

    images = example_images(side=SIDE)
    pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    features = CLIPModel.from_pretrained(str(clip_folder)).eval().get_image_features(pixels).pooler_output
    expected = features / features.square().sum(1, keepdim=True).sqrt()
    for i in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    torch.testing.assert_close(scorer(images, PROMPTS), expected[:, 0].detach(), rtol=1e-4, atol=1e-5)

    check_pairing(scorer, example_images(), PROMPTS, reads=False, rtol=1e-4)
    scorer.model.double()
    scorer.head.double()
    directional_check(scorer, example_images(), PROMPTS)


def test_a_head_that_does_not_fit(clip_folder, tmp_path):
    def load(state):
        torch.save(state, tmp_path / "head.pth")
        return clip_scorer("aesthetic", clip_folder, tmp_path, head=str(tmp_path / "head.pth"))

    with pytest.raises(ValueError, match=r"'0.weight' must be \(1024, 10\), got \(1024, 768\)"):
        load(linear_head(768).state_dict())
    with pytest.raises(ValueError, match=r"lack '0.bias'"):
        load({key: value for key, value in linear_head(10).state_dict().items() if key != "0.bias"})


# open_clip


def attention(x, heads, in_weight, in_bias, out_weight, out_bias, mask=None, keys=None):
    """Multi-head attention, written out; in_weight stacks queries, keys, values."""
    width = x.shape[-1]
    q, k, v = linear(x, in_weight, in_bias).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
    weights = q @ k.mT / math.sqrt(width // heads)
    weights = softmax(weights if mask is None else weights + mask, -1)
    return linear((weights @ v).transpose(1, 2).flatten(2), out_weight, out_bias)


def norm(state, name, x, eps=1e-5):
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def open_clip_tower(state, prefix, x, heads, mask=None):
    layers = {int(k.split("resblocks.")[1].split(".")[0]) for k in state if k.startswith(f"{prefix}transformer.")}
    for i in sorted(layers):
        p = f"{prefix}transformer.resblocks.{i}"
        h = norm(state, f"{p}.ln_1", x)
        weights = [
            state[f"{p}.attn.{k}"] for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        ]
        x = x + attention(h, heads, *weights, mask=mask)
        h = gelu(linear(norm(state, f"{p}.ln_2", x), state[f"{p}.mlp.c_fc.weight"], state[f"{p}.mlp.c_fc.bias"]))
        x = x + linear(h, state[f"{p}.mlp.c_proj.weight"], state[f"{p}.mlp.c_proj.bias"])
    return x


def open_clip_cosines(state, pixels, tokens, heads):
    """Cosines of image i and text i in open_clip's layout; texts are read at their largest token, the last one."""
    x = nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = open_clip_tower(state, "visual.", norm(state, "visual.ln_pre", x), heads)
    image = norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    causal = torch.full((y.shape[1], y.shape[1]), -math.inf).triu(1)
    y = norm(state, "ln_final", open_clip_tower(state, "", y, heads, causal))
    text = y[torch.arange(len(y)), tokens.argmax(1)] @ state["text_projection"]
    return torch.cosine_similarity(image, text)


def open_clip_state(vocabulary: int, width=WIDTH, inner=24, layers=2, projection=10) -> dict[str, Tensor]:
    draw = generator(8)

    def weight(*shape, mean=0.0):
        return mean + 0.3 * torch.randn(shape, generator=draw)

    state = {
        "positional_embedding": weight(TOKENS, width),
        "text_projection": weight(width, projection),
        "logit_scale": torch.tensor(2.0),
        "token_embedding.weight": weight(vocabulary, width),
        "visual.class_embedding": weight(width),
        "visual.positional_embedding": weight((SIDE // PATCH) ** 2 + 1, width),
        "visual.proj": weight(width, projection),
        "visual.conv1.weight": weight(width, 3, PATCH, PATCH),
    }
    norms = ["ln_final", "visual.ln_pre", "visual.ln_post"]
    for prefix in [f"{tower}transformer.resblocks.{i}" for tower in ("", "visual.") for i in range(layers)]:
        norms += [f"{prefix}.ln_1", f"{prefix}.ln_2"]
        state |= {f"{prefix}.attn.in_proj_weight": weight(3 * width, width)}
        state |= {f"{prefix}.attn.in_proj_bias": weight(3 * width)}
        for name, rows, columns in [
            ("attn.out_proj", width, width),
            ("mlp.c_fc", inner, width),
            ("mlp.c_proj", width, inner),
        ]:
            state |= {f"{prefix}.{name}.weight": weight(rows, columns), f"{prefix}.{name}.bias": weight(rows)}
    for name in norms:
        state |= {f"{name}.weight": weight(width, mean=1.0), f"{name}.bias": weight(width)}
    return state


def open_clip_tokens(folder, prompts):
    """open_clip's own padding, by zeros."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    ids = [tokenizer(p, truncation=True, max_length=TOKENS)["input_ids"] for p in prompts]
    return torch.tensor([i + [0] * (TOKENS - len(i)) for i in ids]), len(tokenizer)


def test_hps_from_open_clips_checkpoint_is_open_clips_cosine(clip_folder, tmp_path, monkeypatch):
    from scale.rewards import clip

    tokens, vocabulary = open_clip_tokens(clip_folder, PROMPTS)
    state = open_clip_state(vocabulary)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "hps.pt")
    two_heads = lambda state, source, end: from_open_clip(state, source, end, heads=(2, 2))  # noqa: E731
    monkeypatch.setattr(clip, "from_open_clip", two_heads)
    scorer = make_scorer("hpsv2", {"model": str(tmp_path / "hps.pt"), "tokenizer": str(clip_folder)}, tmp_path, "cpu")
    images = example_images(side=SIDE)
    pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    expected = open_clip_cosines(state, pixels, tokens, heads=2)
    assert expected.std() > 0.01
    torch.testing.assert_close(scorer(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)


def test_open_clip_keys_round_trip(clip_folder):
    """A CLIPModel's weights, put into open_clip's layout by hand, come back as they were."""
    from transformers import CLIPModel

    ours = CLIPModel.from_pretrained(str(clip_folder)).state_dict()
    theirs = {}
    for prefix, tower in [("", "text_model"), ("visual.", "vision_model")]:
        for i in range(2):
            here, there = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                stacked = torch.cat([ours[f"{here}.self_attn.{c}_proj.{kind}"] for c in "qkv"])
                theirs[f"{there}.attn.in_proj_{kind}"] = stacked
                for a, b in [
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ]:
                    theirs[f"{there}.{b}.{kind}"] = ours[f"{here}.{a}.{kind}"]
    for a, b in [
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
    ]:
        theirs |= {f"{b}.{kind}": ours[f"{a}.{kind}"] for kind in ("weight", "bias")}
    theirs |= {
        "logit_scale": ours["logit_scale"],
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "text_projection": ours["text_projection.weight"].T,
        "visual.class_embedding": ours["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ours["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": ours["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": ours["visual_projection.weight"].T,
    }
    assert theirs.keys() == open_clip_state(10).keys()
    back = to_transformers(theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize(
    "key", ["visual.trunk.x", "transformer.resblocks.0.ls_1.gamma", "visual.transformer.resblocks.0.ls.weight"]
)
def test_unknown_open_clip_keys(key):
    with pytest.raises(ValueError, match=f"open_clip key '{key}' is unknown"):
        to_transformers({key: torch.zeros(1)})


def test_open_clip_weights_that_are_missing(clip_folder):
    state = open_clip_state(10)
    del state["visual.ln_post.bias"]
    with pytest.raises(ValueError, match=r"lack 'vision_model.post_layernorm.bias'"):
        from_open_clip(state, "a file", 9, heads=(2, 2))


# BLIP


BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "on", "7", "##s"]
SEEN, READ = 24, 16


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(BLIP_WORDS) + "\n")
    return folder


def tiny_blip_config():
    from transformers import BlipConfig

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": SEEN, "intermediate_size": 32, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
    text = {
        "vocab_size": len(BLIP_WORDS) + 2,
        "hidden_size": READ,
        "intermediate_size": 20,
        "max_position_embeddings": 40,
    }
    text |= {"layer_norm_eps": 1e-12, "bos_token_id": 2, "sep_token_id": 3}
    return BlipConfig(vision_config=vision | tower, text_config=text | tower)


def released_state() -> dict[str, Tensor]:
    """Random weights in the layout of `ImageReward.pt`, written from the released modules (vit.py, med.py)."""
    draw = generator(4)
    state: dict[str, Tensor] = {}

    def dense(name, rows, columns, std=0.3):
        state[f"{name}.weight"] = std * torch.randn((rows, columns), generator=draw)
        state[f"{name}.bias"] = std * torch.randn(rows, generator=draw)

    def norms(name, width):
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=draw)
        state[f"{name}.bias"] = 0.3 * torch.randn(width, generator=draw)

    eye = "blip.visual_encoder"
    state[f"{eye}.cls_token"] = torch.randn((1, 1, SEEN), generator=draw)
    state[f"{eye}.pos_embed"] = torch.randn((1, 5, SEEN), generator=draw)
    state[f"{eye}.patch_embed.proj.weight"] = 0.1 * torch.randn((SEEN, 3, 16, 16), generator=draw)
    state[f"{eye}.patch_embed.proj.bias"] = torch.randn(SEEN, generator=draw)
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        norms(f"{block}.norm1", SEEN)
        norms(f"{block}.norm2", SEEN)
        dense(f"{block}.attn.qkv", 3 * SEEN, SEEN)
        dense(f"{block}.attn.proj", SEEN, SEEN)
        dense(f"{block}.mlp.fc1", 32, SEEN)
        dense(f"{block}.mlp.fc2", SEEN, 32)
    norms(f"{eye}.norm", SEEN)
    reader = "blip.text_encoder"
    state[f"{reader}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{reader}.embeddings.word_embeddings.weight"] = torch.randn((len(BLIP_WORDS) + 2, READ), generator=draw)
    state[f"{reader}.embeddings.position_embeddings.weight"] = torch.randn((40, READ), generator=draw)
    norms(f"{reader}.embeddings.LayerNorm", READ)
    for i in range(2):
        layer = f"{reader}.encoder.layer.{i}"
        for part, source in (("attention", READ), ("crossattention", SEEN)):
            dense(f"{layer}.{part}.self.query", READ, READ)
            dense(f"{layer}.{part}.self.key", READ, source)
            dense(f"{layer}.{part}.self.value", READ, source)
            dense(f"{layer}.{part}.output.dense", READ, READ)
            norms(f"{layer}.{part}.output.LayerNorm", READ)
        dense(f"{layer}.intermediate.dense", 20, READ)
        dense(f"{layer}.output.dense", READ, 20)
        norms(f"{layer}.output.LayerNorm", READ)
    dense("blip.vision_proj", 6, SEEN)
    dense("blip.text_proj", 6, READ)
    sizes = [READ, 1024, 128, 64, 16, 1]
    for i, rows, columns in zip((0, 2, 4, 6, 7), sizes[1:], sizes[:-1], strict=True):
        dense(f"mlp.layers.{i}", rows, columns, std=0.15)
    return state


def image_reward_by_hand(state, pixels, tokens, mask):
    """The released forward pass on standardised pixels and padded tokens."""

    def affine(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    patches = nn.functional.conv2d(
        pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], 1)
    x = x + state[f"{eye}.pos_embed"]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        weights = [state[f"{block}.attn.{k}"] for k in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")]
        x = x + attention(norm(state, f"{block}.norm1", x, 1e-6), 2, *weights)
        x = x + affine(f"{block}.mlp.fc2", gelu(affine(f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6))))
    seen = norm(state, f"{eye}.norm", x, 1e-6)

    y = state[f"{reader}.embeddings.word_embeddings.weight"][tokens]
    y = y + state[f"{reader}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(state, f"{reader}.embeddings.LayerNorm", y, 1e-12)
    hidden_padding = (1.0 - mask[:, None, None, :]) * -10000.0
    for i in range(2):
        layer = f"{reader}.encoder.layer.{i}"
        for part, source, shift in (("attention", None, hidden_padding), ("crossattention", seen, 0.0)):
            q, k, v = (
                affine(f"{layer}.{part}.self.{which}", y if which == "query" or source is None else source)
                .unflatten(-1, (2, -1))
                .transpose(1, 2)
                for which in ("query", "key", "value")
            )
            context = softmax(q @ k.mT / math.sqrt(READ // 2) + shift, -1) @ v
            out = affine(f"{layer}.{part}.output.dense", context.transpose(1, 2).flatten(2))
            y = norm(state, f"{layer}.{part}.output.LayerNorm", out + y, 1e-12)
        h = affine(f"{layer}.output.dense", gelu(affine(f"{layer}.intermediate.dense", y)))
        y = norm(state, f"{layer}.output.LayerNorm", h + y, 1e-12)
    score = y[:, 0]
    for i in (0, 2, 4, 6, 7):
        score = affine(f"mlp.layers.{i}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def image_reward_folder(tmp_path):
    torch.save(released_state(), tmp_path / "ImageReward.pt")
    convert(tmp_path / "ImageReward.pt", tmp_path / "converted", tiny_blip_config())
    return tmp_path / "converted"


def image_reward_scorer(folder, bert_folder, tmp_path) -> Any:
    return make_scorer("imagereward", {"model": str(folder), "tokenizer": str(bert_folder)}, tmp_path, "cpu")


def blip_tokens():
    """PROMPTS in BLIP_WORDS, padded to 35, by hand."""
    words = [["a", "cat"], ["the", "dog"], ["7", "cat", "##s"], ["a", "cat", "on", "the", "dog"]]
    ids = [[2, *(BLIP_WORDS.index(w) for w in sentence), 3] for sentence in words]
    tokens = torch.tensor([i + [0] * (35 - len(i)) for i in ids])
    return tokens, torch.tensor([[1] * len(i) + [0] * (35 - len(i)) for i in ids])


def test_image_reward_is_the_released_forward_pass(image_reward_folder, bert_folder, tmp_path):
    scorer = image_reward_scorer(image_reward_folder, bert_folder, tmp_path)
    images = example_images(side=32)
    pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    expected = image_reward_by_hand(released_state(), pixels, *blip_tokens())
    assert expected.std() > 0.05
    torch.testing.assert_close(scorer(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_image_reward_from_the_released_file_itself(image_reward_folder, bert_folder, tmp_path, monkeypatch):
    from scale.rewards import blip

    monkeypatch.setattr(blip, "released_config", tiny_blip_config)
    images = example_images(side=32)
    from_file = image_reward_scorer(tmp_path / "ImageReward.pt", bert_folder, tmp_path)(images, PROMPTS)
    from_folder = image_reward_scorer(image_reward_folder, bert_folder, tmp_path)(images, PROMPTS)
    assert torch.equal(from_file, from_folder)


def test_image_reward_pairs_and_differentiates(image_reward_folder, bert_folder, tmp_path):
    scorer = image_reward_scorer(image_reward_folder, bert_folder, tmp_path)
    check_pairing(scorer, example_images(side=32), PROMPTS, reads=True, rtol=1e-4)
    scorer.model.double()
    directional_check(scorer, example_images(side=40), PROMPTS)


def test_image_reward_keys_round_trip():
    """Each weight used arrives once and unchanged; what is dropped is what the score does not use."""
    state = released_state()
    ours = renamed(state)
    dropped = {key for key in state if not any(value is state[key] for value in ours.values())}
    assert dropped == {"blip.text_encoder.embeddings.position_ids"} | {
        f"blip.{name}_proj.{kind}" for name in ("vision", "text") for kind in ("weight", "bias")
    }
    assert len(ours) == len(state) - len(dropped)
    with pytest.raises(ValueError, match="ImageReward key 'blip.visual_encoder.blocks.0.adapter.x' is unknown"):
        renamed({"blip.visual_encoder.blocks.0.adapter.x": torch.zeros(1)})


def test_the_released_models_size():
    """446.2 million weights, counted by hand: ViT-L/16, BERT-base with cross-attention, head."""
    from scale.rewards.blip import ImageRewardModel

    with torch.device("meta"):
        model = ImageRewardModel(released_config())
    wide, deep = 1024, 768
    block = 4 * wide**2 + 4 * wide + 8 * wide**2 + 5 * wide + 4 * wide
    eye = 24 * block + wide * (3 * 256 + 1) + wide + 197 * wide + 2 * wide
    own = 4 * deep**2 + 4 * deep + 2 * deep
    cross = 2 * (deep**2 + deep) + 2 * (wide * deep + deep) + 2 * deep
    reader = 12 * (own + cross + 8 * deep**2 + 5 * deep + 2 * deep) + (30524 + 512) * deep + 2 * deep
    sizes = [768, 1024, 128, 64, 16, 1]
    head = sum(a * b + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert sum(p.numel() for p in model.parameters()) == eye + reader + head
    assert (model.config.text_config.layer_norm_eps, model.config.vision_config.layer_norm_eps) == (1e-12, 1e-6)
    assert model.config.text_config.num_attention_heads == 12
    assert model.config.vision_config.num_attention_heads == 16


# ResNet


@pytest.fixture(scope="session")
def resnet_folder(tmp_path_factory):
    from transformers import ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(layer_type="basic", embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_labels=3)
    randomise(ResNetForImageClassification(config)).save_pretrained(folder)  # as released: with a classifier
    return folder


def resnet_scorer(folder, tmp_path, **options) -> Any:
    return make_scorer("resnet", {"model": str(folder), **options}, tmp_path, "cpu")


def test_resnet_is_a_random_direction_of_the_features_of_standardised_images(resnet_folder, tmp_path):
    from transformers import ResNetForImageClassification

    network = ResNetForImageClassification.from_pretrained(str(resnet_folder)).eval().resnet
    images = example_images(side=32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = network((images - mean[:, None, None]) / std[:, None, None]).pooler_output[:, :, 0, 0].detach()
    assert features.shape == (4, 6)
    scores = {seed: resnet_scorer(resnet_folder, tmp_path, side=32, seed=seed)(images, PROMPTS) for seed in (0, 1)}
    for seed, score in scores.items():
        direction = torch.randn(6, generator=generator(seed)) / math.sqrt(6)
        torch.testing.assert_close(score, features @ direction)
    assert not torch.allclose(scores[0], scores[1])


def test_resnet_pairs_and_differentiates(resnet_folder, tmp_path):
    scorer = resnet_scorer(resnet_folder, tmp_path, side=32)
    check_pairing(scorer, example_images(side=36), PROMPTS, reads=False, rtol=1e-4)
    double = type(scorer)(scorer.model.double(), scorer.direction.double(), scorer.side)
    directional_check(double, example_images(side=32), PROMPTS)


def test_the_random_resnet_is_seeded_and_leaves_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    scorers = [resnet_scorer("random", tmp_path, seed=seed, side=32) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (scorer(example_images(), PROMPTS) for scorer in scorers)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert (
        sum(p.numel() for p in scorers[0].model.parameters()) == 11_689_512 - 513_000
    )  # ResNet-18 less its classifier


# Weights that are not there or do not fit


@pytest.mark.parametrize("name", ["clip", "pickscore", "hpsv2", "aesthetic", "resnet", "imagereward"])
def test_missing_folders_are_named(tmp_path, name, bert_folder, clip_folder):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"nowhere' (is not a folder.*hub ids need network|does not exist; on the hub)"
    ):
        make_scorer(name, {"model": missing}, tmp_path, "cpu")
    if name in ("clip", "pickscore", "hpsv2"):
        with pytest.raises(ValueError, match=r"nowhere' is not a folder.*hub ids need network"):
            make_scorer(name, {"model": str(clip_folder), "tokenizer": missing}, tmp_path, "cpu")


def test_hub_ids_without_network(tmp_path, monkeypatch):
    import huggingface_hub
    from transformers import CLIPModel

    asked = []

    def offline(source, *args, **options):
        asked.append((source, options))
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(CLIPModel, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'somebody/model' is not a folder.*hub ids need network \(no route\)"):
        make_scorer("clip", {"model": "somebody/model"}, tmp_path, "cpu")
    source, options = asked[0]
    assert source == "somebody/model"
    assert options["use_safetensors"] is True
    assert options["cache_dir"] == str(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"'somebody/model:file.pt' is not .*hub ids need network \(no route\)"):
        weights_file("somebody/model:file.pt", tmp_path)


def test_a_model_with_missing_weights_is_refused(clip_folder, tmp_path):
    """transformers draws what is missing at random, and says so in the log only."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(clip_folder, tmp_path / "cut")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no fitting weights for visual_projection.weight \(1 in all\)"):
        clip_scorer("clip", folder, tmp_path)


def test_a_folder_of_torch_files_loads_too_but_never_unpickles(clip_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = shutil.copytree(clip_folder, tmp_path / "torch")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"folder .*torch' cannot be loaded \("):
        clip_scorer("clip", folder, tmp_path)
    torch.save(state, folder / "pytorch_model.bin")
    images = example_images()
    expected = clip_scorer("clip", clip_folder, tmp_path)(images, PROMPTS)
    assert torch.equal(clip_scorer("clip", folder, tmp_path)(images, PROMPTS), expected)
    torch.save(state | {"logit_scale": _Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="Weights only load failed"):
        clip_scorer("clip", folder, tmp_path)


def test_a_tokenizer_without_its_vocabulary_is_refused(clip_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(ValueError, match="tokenizer .*empty'"):
        clip_scorer("clip", clip_folder, tmp_path, tokenizer=str(tmp_path / "empty"))


class _Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"weight": _Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"'trap.pt' must hold tensors only \(Weights only load failed"):
        state_of(tmp_path / "trap.pt")
    assert "unpickled" not in capsys.readouterr().out
    torch.save({"weight": "text"}, tmp_path / "text.pt")
    with pytest.raises(ValueError, match="tensors only, got str 'weight'"):
        state_of(tmp_path / "text.pt")
