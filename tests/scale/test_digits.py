"""The digits: data, folders of images, the network's training and its folder, and the classifier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from scale import digits
from scale.digit_classifier import DigitClassifier, digit_classifier, digit_features
from scale.digits import (
    NO_DIGIT,
    Recipe,
    digit_images,
    digit_split,
    digits_model,
    image_folder,
    train_digits,
    train_unet,
)

UPDATES = 60


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training of a few seconds through the cache, with what the network was fed and how it reported."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    seen: dict[str, Any] = {"pixels": [], "labels": [], "reports": []}
    forward, add_noise = UNet2DModel.forward, DDIMScheduler.add_noise

    def feed(self: UNet2DModel, x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        seen["labels"].append(class_labels)
        return forward(self, x, t, class_labels)

    def corrupt(self: DDIMScheduler, x_0: Tensor, noise: Tensor, t: Any) -> Tensor:
        seen["pixels"].append(x_0)
        return add_noise(self, x_0, noise, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet2DModel, "forward", feed)
        patch.setattr(DDIMScheduler, "add_noise", corrupt)
        train = train_digits
        patch.setattr(
            digits, "train_digits", lambda *a: train(*a, on_update=lambda *report: seen["reports"].append(report))
        )
        cache = tmp_path_factory.mktemp("digits")
        seen["folder"] = digits_model(cache, updates=UPDATES)
    return seen


@pytest.fixture(scope="module")
def network(short: dict[str, Any]) -> Any:
    return load_network(short["folder"])


@pytest.fixture(scope="module")
def classifier_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(scope="module")
def classifier(classifier_cache: Path) -> DigitClassifier:
    return digit_classifier(classifier_cache)


def load_network(folder: Path) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    network: Any = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
    return network.eval()


def load_scheduler(folder: Path, steps: int) -> Any:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    return scheduler


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


# --- the data ---


def test_digits_are_the_grey_levels_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = digit_images()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 1)
    data: Any = load_digits()
    assert np.array_equal((16 * images[:, 0]).numpy(), data.images)
    assert np.array_equal(labels.numpy(), data.target)


def test_split_is_a_partition() -> None:
    def rows(images: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
        return [(*image.flatten().tolist(), label) for image, label in zip(images, labels.tolist(), strict=True)]

    train, test = rows(*digit_split("train")), rows(*digit_split("test"))
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(train + test) == sorted(rows(*digit_images()))
    assert digit_split("test")[1].bincount().min() >= 20


def test_split_never_changes() -> None:
    assert digit_split("test")[1][:20].tolist() == FIRST_HELD_OUT


FIRST_HELD_OUT = [8, 1, 9, 4, 8, 0, 6, 4, 4, 2, 3, 3, 8, 1, 3, 4, 9, 2, 8, 5]


def test_split_refuses_an_unknown_part() -> None:
    with pytest.raises(ValueError, match="part is 'validation'"):
        digit_split("validation")  # type: ignore[arg-type]


# --- folders of images ---


def write(file: Path, pixels: Any, mode: str | None = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(file, **options)
    return file


def test_image_folder_reads_classes_in_order(tmp_path: Path) -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    colour = np.zeros((4, 4, 3), np.uint8)
    colour[..., 0], colour[..., 2] = 255, 51
    write(tmp_path / "b" / "1.png", colour)
    write(tmp_path / "a" / "2.PNG", grey)
    write(tmp_path / "a" / "1.jpeg", np.full((4, 4), 128, np.uint8))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    images, labels = image_folder(tmp_path, 4, 3)
    assert images.shape == (3, 3, 4, 4)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 1]
    assert torch.allclose(images[0], torch.tensor(128 / 255), atol=2 / 255)
    for channel in range(3):
        assert np.array_equal((images[1, channel] * 255).round().numpy(), grey)
    assert torch.allclose(images[2].amax((1, 2)), torch.tensor([1.0, 0.0, 0.2]))
    assert image_folder(tmp_path, 2, 1)[0].shape == (3, 1, 2, 2)


def test_image_folder_cuts_the_square_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    write(tmp_path / "a" / "wide.png", wide)
    assert image_folder(tmp_path, 4, 1)[0].min() == 1


def test_image_folder_turns_photographs_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    half = np.zeros((16, 16), np.uint8)
    half[:8] = 255
    write(tmp_path / "a" / "photo.jpg", half, exif=exif)
    image = image_folder(tmp_path, 16, 1)[0][0, 0]
    assert image[:8].max() < 0.1
    assert image[8:].min() > 0.9


def test_image_folder_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        image_folder(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        image_folder(tmp_path, 8, 4)
    with pytest.raises(ValueError, match="path must be a folder .*missing"):
        image_folder(tmp_path / "missing", 8, 1)
    write(tmp_path / "loose.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="found none in"):
        image_folder(tmp_path, 8, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none in .*empty"):
        image_folder(tmp_path, 8, 1)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_image_folder_names_a_broken_file(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path / "a" / "broken.png", np.random.default_rng(0).integers(0, 255, (9, 9), dtype=np.uint8))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="cannot be read as an image: .*broken.png"):
        image_folder(tmp_path, 8, 1)


def test_image_folder_does_not_clip_deep_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a" / "deep.png", np.full((4, 4), 30000, np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits .*deep.png"):
        image_folder(tmp_path, 4, 1)


# --- the network ---


def test_pixels_are_scaled_to_plus_minus_one_once(short: dict[str, Any]) -> None:
    levels = torch.cat(short["pixels"]).unique()
    assert torch.equal(levels, torch.arange(17) / 8 - 1)


def test_labels_are_dropped_at_the_stated_rate(short: dict[str, Any]) -> None:
    labels = torch.cat(short["labels"])
    assert len(labels) == 64 * UPDATES
    dropped = (labels == NO_DIGIT).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=5 * math.sqrt(0.1 * 0.9 / len(labels)))
    assert set(labels.tolist()) == set(range(11))


def test_loss_goes_down(short: dict[str, Any], network: Any) -> None:
    updates, totals, losses = zip(*short["reports"], strict=True)
    assert updates == tuple(range(1, UPDATES + 1))
    assert set(totals) == {UPDATES}
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])
    # The kept average predicts the noise of held-out digits, corrupted by the closed form of the forward process;
    # predicting zero costs 1.
    images, labels = digit_split("test")
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(1000, labels.shape, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    kept = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).exp()[t]
    kept = kept.float().reshape(-1, 1, 1, 1)
    x_t = kept.sqrt() * (2 * images - 1) + (1 - kept).sqrt() * noise
    with torch.no_grad():
        predicted = network(x_t, t, class_labels=labels).sample
    assert (predicted - noise).square().mean() < 0.5


def test_samples_are_of_the_class_asked_for(short: dict[str, Any], network: Any, classifier: DigitClassifier) -> None:
    # After 60 updates with guidance about half the samples are; one in ten would be by chance.
    scheduler = load_scheduler(short["folder"], 10)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    x = torch.randn(200, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            noise = network(x, t, class_labels=torch.full_like(labels, NO_DIGIT)).sample
            noise = noise + 4 * (network(x, t, class_labels=labels).sample - noise)
            own = torch.randn(x.shape, generator=generator)
            x = scheduler.step(noise, t, x, eta=1.0, variance_noise=own).prev_sample
        right = classifier(((x + 1) / 2).clamp(0, 1)).argmax(1) == labels
    assert right.float().mean() > 0.3


def test_network_is_conditioned_and_has_targets_for_lora(network: Any) -> None:
    assert network.config.num_class_embeds == 11
    targets = {name.rsplit("attentions.", 1)[1][2:] for name, _ in network.named_modules() if ".to_" in name}
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= targets
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        one, other = network(x, t, class_labels=torch.tensor([3, NO_DIGIT])).sample
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("steps", [10, 50])
def test_every_step_of_the_scheduler_has_noise_and_an_unclipped_mean(short: dict[str, Any], steps: int) -> None:
    scheduler = load_scheduler(short["folder"], steps)
    assert scheduler.timesteps[-1] == 1
    x, zero, one = torch.full((1, 1), 5.0), torch.zeros(1, 1), torch.ones(1, 1)
    kept = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0).exp()
    for t in scheduler.timesteps:
        still, moved = (scheduler.step(zero, t, x, eta=1.0, variance_noise=z).prev_sample for z in (zero, one))
        now, before = kept[t].item(), kept[max(int(t) - 1000 // steps, 0)].item()
        std = math.sqrt((1 - before) / (1 - now) * (1 - now / before))
        assert (moved - still).item() == pytest.approx(std, rel=1e-2)
        assert std > 5e-3
        assert still.item() == pytest.approx(5 * math.sqrt(before / now), rel=1e-3)


def test_training_is_deterministic_and_seeded(tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        train_digits(tmp_path / name, seed, updates=3)
    one, same, other = (weights(tmp_path / name) for name in ("one", "same", "other"))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_moving_average_is_kept(tmp_path: Path) -> None:
    images, labels = digit_split("train")
    for name, ema in (("average", 0.9), ("last", 0.0)):
        train_unet(images, labels, tmp_path / name, 0, Recipe(updates=3, batch=8, ema=ema))
    average, last = weights(tmp_path / "average"), weights(tmp_path / "last")
    assert not all(torch.equal(average[k], last[k]) for k in average)


def test_model_is_trained_once_per_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(folder: Path, *arguments: Any) -> None:
        trained.append(arguments)
        folder.mkdir(parents=True)

    monkeypatch.setattr(digits, "train_digits", train)
    folders = [digits_model(tmp_path / "new", seed, updates) for seed, updates in ((0, 1), (0, 1), (1, 1), (0, 2))]
    assert trained == [(0, 1), (1, 1), (0, 2)]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    monkeypatch.setattr(digits, "SCHEDULER", digits.SCHEDULER | {"beta_end": 0.03})
    assert digits_model(tmp_path / "new", 0, 1) not in folders


def test_model_shows_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = digits_model(tmp_path, updates=1, progress=True)
    assert "Training the digits' network" in capsys.readouterr().err
    assert all(torch.equal(w, weights(folder)[k]) for k, w in weights(digits_model(tmp_path, updates=1)).items())


def test_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def stop(update: int, updates: int, loss: float) -> None:
        assert list(tmp_path.iterdir())  # the unfinished folder, beside the final one
        if update == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_digits(tmp_path / "model", 0, 3, stop)
    assert not list(tmp_path.iterdir())


def test_failed_saving_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    def fail(self: Any, folder: Path) -> None:
        assert (folder.parent / "unet").is_dir()
        raise OSError("no space left")

    monkeypatch.setattr(DDIMScheduler, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        digits_model(tmp_path, updates=1)
    assert not list(tmp_path.iterdir())


def test_a_faster_process_is_welcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = train_digits

    def overtaken(folder: Path, *arguments: Any) -> None:
        train(folder, 0, 1, lambda *_: (folder / "unet").mkdir(parents=True))

    monkeypatch.setattr(digits, "train_digits", overtaken)
    folder = digits_model(tmp_path, updates=1)
    assert list(tmp_path.iterdir()) == [folder]


def test_training_takes_images_of_a_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        write(tmp_path / "images" / f"class {i % 3}" / f"{i}.png", image)
    images, labels = image_folder(tmp_path / "images", 16, 3)
    train_unet(images, labels, tmp_path / "model", 0, Recipe(updates=1, batch=2, block_out_channels=(8, 8, 16)))
    network = load_network(tmp_path / "model")
    assert (network.config.sample_size, network.config.in_channels, network.config.num_class_embeds) == (16, 3, 4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 8, 6), torch.zeros(2).long(), r"images must have shape .*got \(2, 1, 8, 6\)"),
        (torch.zeros(0, 1, 8, 8), torch.zeros(0).long(), "images must have shape"),
        (torch.full((2, 1, 8, 8), 16.0), torch.zeros(2).long(), r"images must be .* in \[16, 16\]"),
        (torch.full((2, 1, 8, 8), math.nan), torch.zeros(2).long(), "images must be .*nan"),
        (torch.zeros(2, 1, 8, 8).byte(), torch.zeros(2).long(), "images must be .*uint8"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(3).long(), r"labels must be .*\(3,\)"),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), "labels must be .*float32"),
        (torch.zeros(2, 1, 8, 8), torch.tensor([0, -1]), "labels must be int64 >= 0"),
        (torch.zeros(2, 1, 7, 7), torch.zeros(2).long(), "size must be a multiple of 2, got 7"),
    ],
)
def test_training_refuses_bad_data(tmp_path: Path, images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_unet(images, labels, tmp_path / "model", 0)
    assert not list(tmp_path.iterdir())


def test_training_refuses_bad_settings(tmp_path: Path) -> None:
    for name, value in {
        "updates": 0,
        "batch": 0,
        "learning_rate": 0.0,
        "ema": 1.0,
        "label_dropout": -0.1,
        "block_out_channels": (16, 12),
    }.items():
        with pytest.raises(ValueError, match=name):
            Recipe(**{name: value})
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="folder must not exist yet, got .*model"):
        train_digits(tmp_path / "model", 0, updates=1)
    with pytest.raises(ValueError, match="seed is 1.5"):
        digits_model(tmp_path, 1.5)  # type: ignore[arg-type]


# --- the classifier ---


def test_classifier_reads_held_out_digits(classifier: DigitClassifier) -> None:
    images, labels = digit_split("test")
    assert not classifier.training
    assert not any(w.requires_grad for w in classifier.parameters())
    with torch.no_grad():
        assert (classifier(images).argmax(1) == labels).float().mean() >= 0.97


def test_classifier_is_read_back_from_its_cache(
    classifier: DigitClassifier, classifier_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scale.digit_classifier._trained", lambda: pytest.fail("trained twice"))
    again = digit_classifier(classifier_cache)
    assert all(torch.equal(w, again.state_dict()[k]) for k, w in classifier.state_dict().items())
    assert [file.suffix for file in classifier_cache.iterdir()] == [".safetensors"]


def test_features_are_the_last_layers_input(classifier: DigitClassifier) -> None:
    images = digit_split("test")[0][:5].requires_grad_()
    features = digit_features(classifier, images)
    assert features.shape == (5, 32)
    assert torch.equal(features @ classifier.head.weight.T + classifier.head.bias, classifier(images))
    (gradient,) = torch.autograd.grad(features.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert features.detach().std(0).min() > 0  # no dead feature, so covariances are regular


def test_features_refuse_what_is_not_a_digit(classifier: DigitClassifier) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(n, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        digit_features(classifier, torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="classifier must be a DigitClassifier, got Linear"):
        digit_features(torch.nn.Linear(1, 1), torch.zeros(2, 1, 8, 8))
