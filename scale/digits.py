"""Real images without a download: scikit-learn's handwritten digits, and a small diffusion model trained on them.

Images are in [0, 1] everywhere outside `train_unet`, which scales them to [-1, 1], once. A model is kept in diffusers'
own layout, `unet/` (safetensors) and `scheduler/`, so that `UNet2DModel.from_pretrained` and every scheduler of
diffusers read it. It is conditioned on a class label; the label after the last class means "no class", for
classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from verdicts.streams import Stream

DIGITS = 10
NO_DIGIT = 10
"""The label that means "no class" to the digits' network."""

TRAINING_IMAGES = 1437
"""Images in the split "train", four in five; the other 360 are the split "test"."""

UPDATES = 1500
"""Default length of the training: about 90 s of one core."""

VERSION = 1
"""Part of the digest of a recipe; to be raised when the code below trains otherwise with the same settings."""

OnUpdate = Callable[[int, int, float], None]
"""Called as on_update(update, updates, loss) after each update, numbered from 1."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    # The three below keep every step's law Gaussian with positive variance at eta > 0, the last one included; their
    # defaults clip the mean and end in a step without noise, and neither has a log-density.
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def digit_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits: images (1797, 1, 8, 8) float32 in [0, 1], labels (1797,) int64.

    They are the test part of the UCI "Optical recognition of handwritten digits" set (Alpaydin and Kaynak 1998).
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)  # pixels (1797, 64), 0..16
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(labels).long()


def digit_split(part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one part of a fixed random split: 1437 to train on, 360 held out.

    The same writers are in both parts, so the test part tells memory from learning but not one hand from another.

    Raises:
        ValueError: if the part is unknown.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part is {part!r}, must be 'train' or 'test'")
    images, labels = digit_images()
    order = torch.from_numpy(Stream(0).child("scale", "digits", "split").generator().permutation(len(images)))
    chosen = order[:TRAINING_IMAGES] if part == "train" else order[TRAINING_IMAGES:]
    return images[chosen], labels[chosen]


def image_folder(path: Path, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Read a folder of class sub-folders of PNG and JPEG files, classes and files in the order of their names.

    Images are turned upright (EXIF), cut to the square at their centre and resized.

    Args:
        path: the folder; the label of an image is the index of its sub-folder.
        size: height and width of the result, in pixels.
        channels: 1 for grey, 3 for RGB.

    Returns:
        Images (n, channels, size, size) float32 in [0, 1], and labels (n,) int64.

    Raises:
        ValueError: if size or channels is out of range, path is no folder, a class holds no image (or there is no
            class), or a file cannot be read as an 8-bit image; the message names the file.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"path must be a folder of class sub-folders, got {path}")
    images, labels = [], []
    for label, folder in enumerate(sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith("."))):
        files = sorted(f for f in folder.iterdir() if _is_image(f))
        if not files:
            raise ValueError(f"path must hold PNG or JPEG files in every class sub-folder, found none in {folder}")
        images += [_read_image(file, size, channels) for file in files]
        labels += [label] * len(files)
    if not images:
        raise ValueError(f"path must hold class sub-folders of PNG or JPEG files, found none in {path}")
    return torch.stack(images), torch.tensor(labels)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in (".png", ".jpg", ".jpeg") and not file.name.startswith(".") and file.is_file()


def _read_image(file: Path, size: int, channels: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if opened.mode.startswith(("I", "F")):  # 16 and 32 bits: a conversion to 8 bits would clip them
                raise ValueError(f"path holds a file of more than 8 bits per channel ({opened.mode}): {file}")
            upright = ImageOps.exif_transpose(opened).convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"path holds a file that cannot be read as an image: {file} ({error})") from error
    pixels = np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(size, size, channels).transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained.

    Attributes:
        updates: optimizer steps.
        batch: images in a step.
        learning_rate: of Adam, after a linear rise over the first steps and before a linear fall to 0 at the end.
        ema: decay of the moving average of the weights, which is what is kept; smaller in the first steps.
        label_dropout: share of images whose label is replaced by "no class".
        block_out_channels: channels at each resolution, halved from one to the next; attention is at the lowest.

    Raises:
        ValueError: if an attribute is out of range.
    """

    updates: int = UPDATES
    batch: int = 64
    learning_rate: float = 4e-3
    ema: float = 0.99
    label_dropout: float = 0.1
    block_out_channels: tuple[int, ...] = (16, 32)

    def __post_init__(self) -> None:
        for name in ("updates", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        for name in ("ema", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if len(self.block_out_channels) < 2 or any(c < 8 or c % 8 for c in self.block_out_channels):
            raise ValueError(
                f"block_out_channels must be two or more multiples of 8, got {tuple(self.block_out_channels)}"
            )


def unet_config(size: int, channels: int, classes: int, recipe: Recipe) -> dict[str, Any]:
    """Return the keywords of diffusers' `UNet2DModel` for images (channels, size, size) of so many classes.

    Raises:
        ValueError: if size cannot be halved as often as the recipe asks for.
    """
    plain = len(recipe.block_out_channels) - 1
    if size % 2**plain:
        raise ValueError(f"size must be a multiple of {2**plain}, got {size}")
    return {
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": 1,
        "block_out_channels": recipe.block_out_channels,
        "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        "norm_num_groups": 8,
        "attention_head_dim": None,  # one head: several are slower on a CPU
        "num_class_embeds": classes + 1,
    }


def train_unet(
    images: Tensor,
    labels: Tensor,
    folder: Path,
    seed: int,
    recipe: Recipe | None = None,
    on_update: OnUpdate | None = None,
) -> None:
    """Train a class-conditional network on images by denoising score matching and write it to a new folder.

    The loss is the mean squared error of the predicted noise, "L_simple" of DDPM (Ho et al. 2020, eq. 14). The folder
    appears at once when everything is in it; a training that fails or is interrupted leaves nothing (one that is
    killed can leave a hidden sibling, never the folder). It runs on the CPU with torch's current number of threads;
    equal arguments give equal weights on one machine with one number of threads.

    Args:
        images: (n, channels, size, size) float in [0, 1].
        labels: (n,) int64, 0, 1, ...; the number of classes is the largest label plus one.
        folder: must not exist yet; gets `unet/` and `scheduler/`.
        seed: integer in [0, 2^64).

    Raises:
        ValueError: if the images or labels have another shape or range, or the folder exists.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    recipe = recipe or Recipe()
    _check(images, labels)
    config = unet_config(images.shape[-1], images.shape[1], int(labels.max()) + 1, recipe)
    stream = Stream(seed).child("scale", "digits", "training")
    with _appearing(Path(folder)) as unfinished:
        with torch.random.fork_rng(devices=[]):  # diffusers draws initial weights from the global generator only
            torch.manual_seed(stream.child("weights").integer())
            unet = UNet2DModel(**config)
        scheduler = DDIMScheduler(**SCHEDULER)
        generator = torch.Generator().manual_seed(stream.child("batches").integer())
        _fit(unet, scheduler, images, labels, recipe, generator, on_update)
        unet.save_pretrained(unfinished / "unet", safe_serialization=True)
        scheduler.save_pretrained(unfinished / "scheduler")


def _check(images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or images.shape[-1] != images.shape[-2] or not len(images):
        raise ValueError(f"images must have shape (n, channels, size, size) with n >= 1, got {tuple(images.shape)}")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError(f"images must be floating-point numbers in [0, 1], got {images.dtype} {_range(images)}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64 or bool((labels < 0).any()):
        raise ValueError(
            f"labels must be int64 >= 0 of shape ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
        )


def _range(values: Tensor) -> str:
    return f"in [{values.min().item():g}, {values.max().item():g}]"


def _fit(
    unet: Any,
    scheduler: Any,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    on_update: OnUpdate | None,
) -> None:
    """Train `unet` in place and leave the moving average of its weights in it."""
    x_0 = 2 * images.float() - 1
    no_class = unet.config.num_class_embeds - 1
    weights = list(unet.parameters())
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.Adam(weights, lr=recipe.learning_rate)
    unet.train()
    for update in range(1, recipe.updates + 1):
        chosen = torch.randint(len(x_0), (recipe.batch,), generator=generator)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.label_dropout
        t = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch,), generator=generator)
        noise = torch.randn(recipe.batch, *x_0.shape[1:], generator=generator)
        x_t = scheduler.add_noise(x_0[chosen], noise, t)
        predicted = unet(x_t, t, class_labels=labels[chosen].masked_fill(dropped, no_class)).sample
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * _warmth(update, recipe.updates)
        optimizer.step()
        decay = min(recipe.ema, update / (update + 10))
        with torch.no_grad():
            for kept, w in zip(average, weights, strict=True):
                kept.lerp_(w, 1 - decay)
        if on_update is not None:
            on_update(update, recipe.updates, loss.item())
    with torch.no_grad():
        for kept, w in zip(average, weights, strict=True):
            w.copy_(kept)
    unet.eval()


def _warmth(update: int, updates: int) -> float:
    """Return the learning rate of an update as a share of the largest: up over 5 % of the updates, then down."""
    return min(update / (0.05 * updates), (updates - update + 1) / updates)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` if the block ends well and is removed if it does not."""
    if folder.exists():
        raise ValueError(f"folder must not exist yet, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as sibling:
        unfinished = Path(sibling) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(folder)


def train_digits(folder: Path, seed: int, updates: int = UPDATES, on_update: OnUpdate | None = None) -> None:
    """Train the digits' network on the split "train" and write it to a new folder; see `train_unet`."""
    images, labels = digit_split("train")
    train_unet(images, labels, folder, seed, Recipe(updates=updates), on_update)


def digits_model(cache: Path, seed: int = 0, updates: int = UPDATES, progress: bool = False) -> Path:
    """Return the folder of the digits' network, trained at first use.

    Its name carries a digest of everything the weights depend on, so that another recipe is another folder.

    Raises:
        ValueError: if updates < 1 or the seed is out of range.
    """
    recipe = Recipe(updates=updates)
    facts = {
        "version": VERSION,
        "unet": unet_config(8, 1, DIGITS, recipe),
        "scheduler": SCHEDULER,
        "recipe": asdict(recipe),
        "seed": Stream(seed).seed,
    }
    folder = Path(cache) / f"digits-{digest(facts)}"
    if folder.exists():
        return folder
    try:
        if progress:
            with _bar("Training the digits' network") as on_update:
                train_digits(folder, seed, updates, on_update)
        else:
            train_digits(folder, seed, updates)
    except (OSError, ValueError):
        if not folder.exists():  # if it does, another process was faster with the same recipe
            raise
    return folder


def digest(facts: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that name the facts, which must be JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _bar(title: str) -> Iterator[OnUpdate]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:  # standard output is for results
        task = bar.add_task(title)
        yield lambda update, updates, loss: bar.update(
            task, total=updates, completed=update, description=f"{title}, loss {loss:.3f}"
        )
