"""The chain over pixels against a loop with diffusers' own scheduler, and the loading of folders, good and bad."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.chain import Noise, rollout
from scale.pixel import load_unet, pixel_chain
from tests.scale.conftest import Make, error, normal

diffusers = pytest.importorskip("diffusers")

STEPS = 4


def by_hand(unet: Any, scheduler: Any, x: Tensor, labels: Tensor, guidance: float = 1.0) -> Tensor:
    """Sample with `scheduler.step`, the noise drawn from generator number 3; label 4 is "no class"."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(3)
    options = {"eta": 1.0} if isinstance(scheduler, diffusers.DDIMScheduler) else {}
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = unet(x, timestep, class_labels=labels).sample
            if guidance != 1:
                empty = unet(x, timestep, class_labels=torch.full_like(labels, 4)).sample
                output = empty + guidance * (output - empty)
            x = scheduler.step(output, timestep, x, generator=generator, **options).prev_sample
    return x


def its_noise(x: Tensor) -> Noise:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(x.shape, generator=generator) for _ in range(STEPS)]
    return Noise(x, torch.stack(drawn[::-1]), torch.zeros(len(x), dtype=torch.long))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_the_chain_is_the_schedulers_loop(make: Make, pixel_folder: Path, scheduler: str, guidance: float) -> None:
    task = make("pixel", sampler={"scheduler": scheduler, "steps": STEPS, "guidance": guidance})
    x, labels = normal(3, 1, 8, 8), torch.tensor([0, 3, 0])
    ours = rollout(task.chain, task.params, its_noise(x), task.condition(3)).latents[0]

    unet, own = load_unet(str(pixel_folder))
    if scheduler == "ddpm":
        own = diffusers.DDPMScheduler.from_config(own.config)
    theirs = by_hand(unet, own, x, labels, guidance)
    assert error(ours, theirs) < 1e-5
    wrong = by_hand(unet, own, x, torch.tensor([0, 3, 1]), guidance), by_hand(unet, own, x, labels, 2.0)
    assert min(error(other, theirs) for other in wrong) > 1e-3


def one_label(folder: Path) -> None:
    config = dict(load_unet(str(folder))[0].config) | {"num_class_embeds": 1}
    diffusers.UNet2DModel.from_config(config).save_pretrained(folder / "unet")


def put_scheduler(folder: Path, scheduler: Any) -> None:
    scheduler.save_pretrained(folder / "scheduler")


def test_the_checkpoints_own_scheduler_is_the_one_it_names(make: Make, pixel_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pixel_folder, tmp_path / "edited"))
    put_scheduler(folder, diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.5))
    task = make(
        "pixel", model={"kind": "pixel", "path": str(folder)}, sampler={"scheduler": "own", "steps": STEPS, "eta": 1.0}
    )
    assert task.chain.sampler.scheduler == "DDPMScheduler"
    x = normal(2, 1, 8, 8)
    ours = rollout(task.chain, task.params, its_noise(x), task.condition(2)).latents[0]
    unet, _ = load_unet(str(folder))
    scheduler = diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=0.5)
    assert error(ours, by_hand(unet, scheduler, x, torch.tensor([0, 3]))) < 1e-5
    as_ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    assert error(ours, by_hand(unet, as_ddim, x, torch.tensor([0, 3]))) > 1e-2


def test_images_are_in_their_range(make: Make) -> None:
    decode = make("pixel").decode
    pixels = torch.tensor([-1.0, -0.5, 0.0, 1.0, -3.0, 3.0]).reshape(1, 1, 2, 3).requires_grad_()
    images = decode(pixels)
    assert images.flatten().tolist() == [0, 0.25, 0.5, 1, 0, 1]
    (gradient,) = torch.autograd.grad(images.sum(), pixels)
    assert gradient.flatten().tolist() == [0.5, 0.5, 0.5, 0.5, 0, 0]


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no folder", shutil.rmtree, "there is no folder '.*edited', and it is no hub id"),
    ("no unet", lambda f: shutil.rmtree(f / "unet"), "the folder '.*edited' has no sub-folder 'unet'"),
    ("no scheduler", lambda f: shutil.rmtree(f / "scheduler"), "edited' has no sub-folder 'scheduler'"),
    ("no config", lambda f: (f / UNET).unlink(), "unet/config.json' must be JSON that has a _class_name"),
    ("no class", lambda f: rewrite(f / UNET, num_class_embeds=None), "edited' is told no class"),
    ("text", lambda f: rewrite(f / UNET, _class_name="UNet2DConditionModel"), "is a UNet2DConditionModel, must be a"),
    ("unknown", lambda f: rewrite(f / SCHEDULER, _class_name="MyScheduler"), "is a MyScheduler, which diffusers does"),
    ("cut", lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"12345678"), "cannot load .*unet"),
    ("one label", lambda f: one_label(f), "^model.no_class must be none for a network that knows one label only"),
    ("PNDM", lambda f: put_scheduler(f, diffusers.PNDMScheduler()), "scheduler PNDMScheduler is not supported: it is"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_bad_folders(
    make: Make, pixel_folder: Path, tmp_path: Path, name: str, spoil: Callable[[Path], Any], message: str
) -> None:
    folder = Path(shutil.copytree(pixel_folder, tmp_path / "edited"))
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        make("pixel", model={"kind": "pixel", "path": str(folder)}, sampler={"scheduler": "own"})
    assert "\n" not in str(caught.value)


def test_other_bad_input(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^prompt '7' is not one of those that the model knows: 0, 1, 2, 3$"):
        make("pixel", prompts={"train": ["0", "7"]})
    with pytest.raises(ValueError, match=r"^prompt '4' is not one of those"):  # the label of "no class"
        make("pixel", prompts={"train": ["4"]})
    with pytest.raises(ValueError, match=r"^model.resolution must be null or 8 for this model, got 16$"):
        make("pixel", model={"resolution": 16})
    with pytest.raises(ValueError, match=r"^model.revision must be null for a local folder, got 'main'$"):
        make("pixel", model={"revision": "main"})
    assert make("pixel", model={"resolution": 8}).chain.shape == (1, 8, 8)


FILES = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}


def test_a_hub_id_is_downloaded_and_loaded_like_a_folder(
    make: Make, pixel_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that holds a pickle and text beside the folder's own files, and hands out what it is asked for."""
    import huggingface_hub

    hub = Path(shutil.copytree(pixel_folder, tmp_path / "hub"))
    (hub / "unet/diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (hub / "README.md").write_text("text")
    asked = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        folder = tmp_path / f"downloaded-{len(asked)}"
        names = [str(file.relative_to(hub)) for file in hub.rglob("*") if file.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / name, folder / name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    task = make("pixel", model={"path": "an/id", "revision": "v1"})
    assert asked == [("an/id", "v1")]
    found = {str(f.relative_to(tmp_path / "downloaded-1")) for f in (tmp_path / "downloaded-1").rglob("*.*")}
    assert found == FILES
    x, condition = normal(2, 1, 8, 8), task.condition(2).steps[1]
    with torch.no_grad():
        means = [t.chain.mean(t.params, x, 2, condition) for t in (task, make("pixel"))]
    assert torch.equal(*means)

    make("pixel", model={"path": "an/id"})
    assert asked[1:] == [("an/id", None)]
    shutil.copytree(pixel_folder, tmp_path / "an/id")  # a folder of that name comes first
    make("pixel", model={"path": "an/id"})
    assert len(asked) == 2


def test_weights_are_safetensors_or_refused(make: Make, pixel_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pixel_folder, tmp_path / "edited"))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    torch.save(diffusers.UNet2DModel.from_pretrained(folder / "unet").state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ValueError, match=r"^model.path: cannot load the folder '.*unet': .*safetensors") as caught:
        make("pixel", model={"path": str(folder)})
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"^model.path: cannot load 'an/id' from the hub .*: no route to host$"):
        make("pixel", model={"path": "an/id"})
    with pytest.raises(ValueError, match="^model.path: there is no folder 'not an id', and it is no hub id"):
        make("pixel", model={"path": "not an id"})


def test_a_network_may_have_no_label_for_no_class(make: Make, pixel_folder: Path) -> None:
    """The same network of five labels: four classes and "no class", or five classes."""
    sections = {"prompts": {"train": ["0", "4"]}, "sampler": {"steps": STEPS}}
    task = make("pixel", model={"no_class": "none"}, **sections)
    assert task.chain.unconditional is None
    x = normal(3, 1, 8, 8)
    ours = rollout(task.chain, task.params, its_noise(x), task.condition(3)).latents[0]
    assert error(ours, by_hand(*load_unet(str(pixel_folder)), x, torch.tensor([0, 4, 0]))) < 1e-5
    assert make("pixel", prompts={"train": ["0", "3"]}).chain.unconditional == 4
    with pytest.raises(ValueError, match=r"^prompt '5' is not one of those that the model knows: 0, 1, 2, 3, 4$"):
        make("pixel", model={"no_class": "none"}, prompts={"train": ["5"]})


def test_guidance_needs_a_label_of_its_own_for_no_class(make: Make) -> None:
    task = make("pixel")
    network, sampler = task.chain.network, task.chain.sampler
    with pytest.raises(ValueError, match="guidance must be 1 for a network that knows no empty condition, got 2"):
        pixel_chain(network, sampler, classes=5, guidance=2.0)
    assert pixel_chain(network, sampler, classes=5, guidance=1.0).unconditional is None
    assert pixel_chain(network, sampler, classes=4, guidance=2.0).unconditional == 4
    with pytest.raises(ValueError, match="the network knows 5 classes, got 6"):
        pixel_chain(network, sampler, classes=6, guidance=1.0)
