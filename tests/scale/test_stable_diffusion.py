"""The chain over latents against diffusers' own pipeline, and the loading of checkpoints, good and bad."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.chain import Noise, rollout
from scale.lora import load
from scale.stable_diffusion import LatentDecoder, embed, load_pipeline, stable_diffusion_chain
from scale.task import SCHEDULERS
from scale.tiny import tiny_stable_diffusion
from tests.scale.conftest import Make, error, moved, normal

diffusers = pytest.importorskip("diffusers")

STEPS, SAMPLES = 4, 2
TEXTS = ["the digit", "a thing"]


@pytest.fixture(scope="module")
def checkpoint(cache: Path) -> Path:
    return tiny_stable_diffusion(cache / "tiny-stable-diffusion")


@pytest.fixture
def edited(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "edited"))


def pipeline_calls(pipeline: Any, x: Tensor, guidance: float, kind: str, eta: float = 1.0, texts: Any = TEXTS) -> Any:
    """Return x_0 or the images of diffusers' own call, the steps' noise drawn from generator number 3."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": guidance, "eta": eta, "output_type": kind, "num_inference_steps": STEPS}
    return pipeline(list(texts), latents=x.clone(), generator=torch.Generator().manual_seed(3), **options).images


def its_noise(x: Tensor) -> Noise:
    """Return the noise that such a call uses: one draw a step, from the first step, t = T, on."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(x.shape, generator=generator) for _ in range(STEPS)]
    return Noise(x, torch.stack(drawn[::-1]), torch.zeros(len(x), dtype=torch.long))


# diffusers' Euler schedulers convert tensors by a protocol that NumPy 2 deprecates; nothing of ours does.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "guidance"),
    [("ddim", 1.0), ("ddim", 5.0), ("ddpm", 1.0), ("ddpm", 5.0), ("euler-ancestral", 5.0), ("lcm", 5.0)],
)
def test_the_chain_is_the_pipeline(make: Make, checkpoint: Path, scheduler: str, guidance: float) -> None:
    task = make(sampler={"scheduler": scheduler, "steps": STEPS, "guidance": guidance})
    params = moved(task.params)
    x = normal(SAMPLES, *task.chain.shape)
    ours = rollout(task.chain, params, its_noise(x), task.condition(SAMPLES)).latents[0]

    # Another copy of the model, in which the adapters' parameters have been put for good.
    other = make(lora={"rank": 2, "alpha": 3.0}).parts["pipeline"]
    load(other.unet, params)
    other.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(other.scheduler.config)
    theirs = pipeline_calls(other, x, guidance, "latent")
    assert error(ours, theirs) < 1e-5
    assert error(task.decode(ours), pipeline_calls(other, x, guidance, "pt")) < 1e-5

    # What the comparison sees: the prompts exchanged, no adapters, the noise in the wrong order, another guidance.
    swapped = rollout(task.chain, params, its_noise(x), task.condition(SAMPLES, start=1)).latents[0]
    base = rollout(task.chain, {}, its_noise(x), task.condition(SAMPLES)).latents[0]
    noise = Noise(x, its_noise(x).steps.flip(0), its_noise(x).outcome)
    wrong_order = rollout(task.chain, params, noise, task.condition(SAMPLES)).latents[0]
    unguided = pipeline_calls(other, x, 3.0, "latent")
    assert min(error(wrong, theirs) for wrong in (swapped, base, wrong_order, unguided)) > 1e-3


def test_eta_is_the_pipelines(make: Make) -> None:
    task = make(sampler={"eta": 0.4, "steps": STEPS})
    x = normal(SAMPLES, *task.chain.shape)
    ours = rollout(task.chain, task.params, its_noise(x), task.condition(SAMPLES)).latents[0]
    assert error(ours, pipeline_calls(task.parts["pipeline"], x, 1.0, "latent", eta=0.4)) < 1e-5
    assert error(ours, pipeline_calls(task.parts["pipeline"], x, 1.0, "latent", eta=0.6)) > 1e-2


def test_the_checkpoints_own_scheduler_may_predict_velocities(make: Make, edited: Path) -> None:
    config = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    found = {}
    for prediction in ("v_prediction", "epsilon"):
        scheduler = diffusers.DDIMScheduler(prediction_type=prediction, timestep_spacing="trailing", **config)
        put_scheduler(edited, scheduler)
        model = {"kind": "stable-diffusion", "path": str(edited)}
        task = make(model=model, sampler={"scheduler": "own", "steps": STEPS, "guidance": 2.0})
        x = normal(SAMPLES, *task.chain.shape)
        ours = rollout(task.chain, task.params, its_noise(x), task.condition(SAMPLES)).latents[0]
        found[prediction] = pipeline_calls(task.parts["pipeline"], x, 2.0, "latent")
        assert error(ours, found[prediction]) < 1e-5
    assert error(found["epsilon"], found["v_prediction"]) > 1e-2


def test_a_clipped_range_is_not_put_on_latents(make: Make, edited: Path) -> None:
    # PNDM never clips and need not say so; the default of the schedulers that are made from its settings is to clip.
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    put_scheduler(edited, diffusers.PNDMScheduler(**config))
    plain = diffusers.DDIMScheduler.from_config(diffusers.PNDMScheduler(**config).config)
    assert plain.config.clip_sample  # the trap
    for scheduler in ("ddim", "ddpm", "lcm"):
        task = make(
            model={"kind": "stable-diffusion", "path": str(edited)}, sampler={"scheduler": scheduler, "steps": STEPS}
        )
        assert task.chain.sampler.clip is None


def test_images_are_in_their_range_and_have_a_gradient(make: Make) -> None:
    task = make()
    latents = normal(3, *task.chain.shape).requires_grad_()
    images = task.decode(latents)
    assert images.shape == (3, 3, 16, 16)
    assert images.dtype == torch.float32
    vae = task.parts["pipeline"].vae
    by_hand = vae.decode(latents / vae.config.scaling_factor).sample
    assert torch.equal(images, ((by_hand + 1) / 2).clamp(0, 1))
    assert float(torch.autograd.grad(images.sum(), latents)[0].abs().min()) > 0
    vae.decoder.conv_out.weight.mul_(50)  # far out of the range, on both sides
    extreme = task.decode(latents.detach())
    assert (float(extreme.min()), float(extreme.max())) == (0, 1)


def test_the_shift_of_a_vae_is_undone(make: Make) -> None:
    task = make()
    latents = normal(1, *task.chain.shape)
    vae = copy.deepcopy(task.parts["pipeline"].vae)
    plain = task.decode(latents)
    vae.register_to_config(shift_factor=0.7)
    decode = LatentDecoder(vae, task.chain, torch.zeros(2, dtype=torch.long))
    scale = vae.config.scaling_factor
    assert torch.allclose(decode(latents - 0.7 * scale), plain, atol=1e-5)
    assert error(decode(latents), plain) > 1e-3


def test_texts_are_embedded_as_the_pipeline_does(checkpoint: Path) -> None:
    pipeline = load_pipeline(str(checkpoint))
    theirs, empty = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
    table = embed(pipeline, [*TEXTS, ""])
    assert torch.equal(table[:2], theirs)
    assert torch.equal(table[2:], empty[:1])
    assert error(table[0], table[1]) > 0.1


def test_a_prompt_that_is_cut_off_is_warned_about(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = load_pipeline(str(checkpoint))
    with pytest.warns(UserWarning, match="'the digit a thing' has 11 tokens, the model reads the first 8"):
        embed(pipeline, ["the digit a thing"])
    assert "indexing errors" not in capsys.readouterr().err  # as transformers would have it


def test_another_resolution(make: Make) -> None:
    task = make(model={"kind": "tiny", "resolution": 32})
    assert task.chain.shape == (4, 4, 4)
    x = normal(1, 4, 4, 4)
    ours = rollout(task.chain, task.params, Noise(x, normal(3, 1, 4, 4, 4), torch.zeros(1)), task.condition(1))
    assert task.decode(ours.latents[0]).shape == (1, 3, 32, 32)


def test_the_resolution_must_fit_the_levels_of_the_network(make: Make, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^model.resolution must be a multiple of 16 for this model, got 24$"):
        make(model={"kind": "tiny", "resolution": 24})
    task = make()
    with pytest.raises(ValueError, match=r"multiple of 16 for this model, got 20$"):
        stable_diffusion_chain(task.parts["pipeline"], task.chain.sampler, TEXTS, 1.0, resolution=20)


def put_scheduler(folder: Path, scheduler: Any) -> None:
    scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    found = json.loads(index.read_text())
    found["scheduler"] = ["diffusers", type(scheduler).__name__]
    index.write_text(json.dumps(found))


def put_class(folder: Path, name: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no folder", shutil.rmtree, "there is no folder '.*edited', and it is no hub id"),
    (
        "no index",
        lambda f: (f / "model_index.json").unlink(),
        "edited' holds no pipeline: there is no model_index.json",
    ),
    ("half an index", lambda f: cut(f / "model_index.json"), "model_index.json' must be JSON that has a _class_name"),
    ("a list", lambda f: (f / "model_index.json").write_text("[1]"), "must be JSON that has a _class_name"),
    ("another class", lambda f: put_class(f, "StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline, must be a"),
    ("no vae", lambda f: shutil.rmtree(f / "vae"), "cannot load the folder '.*edited'.*config.json"),
    ("no weights", lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "cannot load .*edited"),
    ("cut unet", lambda f: cut(f / "unet/diffusion_pytorch_model.safetensors"), "cannot load .*unet"),
    ("cut vae", lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors"), "cannot load .*vae"),
    ("cut encoder", lambda f: cut(f / "text_encoder/model.safetensors"), "cannot load .*edited"),
    (
        "own",
        lambda f: put_scheduler(f, diffusers.PNDMScheduler(steps_offset=1)),
        "scheduler PNDMScheduler is not supported: it is",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "message"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_bad_checkpoints(make: Make, edited: Path, name: str, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(edited)
    with pytest.raises(ValueError, match=message) as caught:
        make(
            model={"kind": "stable-diffusion", "path": str(edited)},
            sampler={"scheduler": "own" if name == "own" else "ddim"},
        )
    assert "\n" not in str(caught.value)


def test_a_good_checkpoint_loads_frozen_and_in_eval_mode(checkpoint: Path) -> None:
    pipeline = load_pipeline(str(checkpoint), "bfloat16")
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in module.parameters())
