"""Before and after: paired in noise and prompts, right against diffusers' own steps, and honest about few samples."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from algorithms.chain import StepConditions, at_step, step_log_prob
from scale import digits, evaluation
from scale.config import digest, load_config
from scale.evaluation import Evaluation, PromptRow, digits_like, evaluate, pooled, read_evaluation, summary
from scale.grids import before_after
from scale.lora import load
from scale.metrics import Estimate, Interval
from scale.task import Task, build
from verdicts.streams import Stream

N = 70
DIGITS = [
    "lora=null",
    "method={name: first-order}",
    "sampler.steps=3",
    f"evaluation.samples={N}",
    "evaluation.batch=35",
    "training.grid=4",
    "training.seed=5",
    "audit.estimators=[]",
]
TINY = ["sampler.steps=3", "prompts.train=[a]", "prompts.held_out=null", "evaluation.batch=20"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def make(cache):
    """Build a task on the digits' network after ten updates, or on the tiny Stable Diffusion."""
    whole = digits.digits_model

    def made(preset: str = "digits-brightness", *overrides: str) -> Task:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits, "digits_model", lambda folder, progress: whole(folder, updates=10))
            usual = DIGITS if preset.startswith("digits") else TINY
            return build(load_config(preset, [*usual, *overrides]), cache)

    return made


@pytest.fixture(scope="module")
def task(make):
    return make()


def moved(task: Task, size: float = 0.01) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: p + size * torch.randn(p.shape, generator=generator) for name, p in task.params.items()}


@pytest.fixture(scope="module")
def tuned(task):
    return moved(task)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def found(task, tuned, folder, cache):
    return evaluate(task, tuned, folder, update=12, cache=cache)


# --- against diffusers' own network and steps ---


def by_hand(task: Task, params: dict, samples: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample with a plain network and diffusers' scheduler: latents x_T..x_0, and images."""
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    network = UNet2DModel(**digits.unet_config(8, 1, 10, digits.Recipe()))
    network.load_state_dict(params)
    scheduler = DDIMScheduler(**digits.SCHEDULER)
    steps = task.config.sampler.steps
    scheduler.set_timesteps(steps)
    labels = torch.tensor([8, 9] * (samples // 2))
    noise = []
    for i in range(samples):
        seed = Stream(5).child("evaluation", "noise", i).integer()
        noise.append(torch.randn(steps + 1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))
    noise = torch.stack(noise, 1)
    x = noise[0]
    latents = [x]
    with torch.no_grad():
        for k, timestep in enumerate(scheduler.timesteps):
            output = network.eval()(x, timestep, class_labels=labels).sample
            x = scheduler.step(output, timestep, x, eta=1.0, variance_noise=noise[steps - k]).prev_sample
            latents.append(x)
    return torch.stack(latents), (x / 2 + 0.5).clamp(0, 1)


def student(x: torch.Tensor) -> tuple[float, float, float]:
    low, high = stats.t.interval(0.95, len(x) - 1, x.mean().item(), stats.sem(x.numpy()))
    return x.mean().item(), float(low), float(high)


def distance_by_hand(found: Evaluation, task: Task, tuned: dict) -> float:
    """Return how far the reported rewards are from those of `by_hand`, by prompt and over all."""
    base, after = (by_hand(task, p)[1].double().mean((1, 2, 3)) for p in (task.params, tuned))
    gaps = [
        np.subtract(student(x), y)
        for x, y in ((base, found.base), (after, found.tuned), (after - base, found.difference))
    ]
    assert [row.prompt for row in found.prompts] == ["8", "9"]
    for first, row in enumerate(found.prompts):
        own = after[first::2] - base[first::2]
        told = (row.samples, row.base, row.tuned, row.difference, row.error)
        right = (N // 2, base[first::2].mean(), after[first::2].mean(), own.mean(), stats.sem(own.numpy()))
        gaps.append(np.subtract(told, right))
    return float(np.abs(np.concatenate(gaps)).max())


def test_rewards_are_those_of_diffusers_own_steps(found, task, tuned):
    assert distance_by_hand(found, task, tuned) < 1e-5
    assert abs(found.difference.mean) > 1e-3  # so there is something to be right about
    assert found.held_out
    assert not found.notes
    assert found.samples == N


def told_another(condition: StepConditions) -> StepConditions:
    return dataclasses.replace(condition, steps=condition.steps.flip(1).roll(1, 1))


@pytest.mark.parametrize("mistake", ["the network is told the prompt of another sample", "prompts are shifted"])
def test_prompts_of_other_samples_are_caught(mistake, task, tuned, tmp_path, cache, monkeypatch):
    sample, prompts = evaluation._sample, evaluation._prompts
    if mistake == "prompts are shifted":
        monkeypatch.setattr(evaluation, "_prompts", lambda *a: prompts(*a).roll(1))
        assert [row.prompt for row in evaluate(task, tuned, tmp_path, cache=cache).prompts] == ["8", "9"]
    else:
        monkeypatch.setattr(evaluation, "_sample", lambda a, b, c, d, *e: sample(a, b, c, told_another(d), *e))
    assert distance_by_hand(evaluate(task, tuned, tmp_path, cache=cache), task, tuned) > 1e-4


# --- pairing ---


def nothing_changed(found: Evaluation) -> bool:
    none = (0.0, 0.0, 0.0)
    return found.difference == none and found.kl == none and all(row.difference == 0 for row in found.prompts)


def same(task: Task) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in task.params.items()}


def test_equal_parameters_differ_by_exactly_nothing(task, tmp_path, cache):
    found = evaluate(task, same(task), tmp_path, cache=cache)
    assert nothing_changed(found)
    assert found.base == found.tuned
    assert found.base_diversity == found.tuned_diversity
    assert found.frechet.base == found.frechet.tuned


def test_equal_parameters_of_stable_diffusion_differ_by_exactly_nothing(make, tmp_path):
    task = make("tiny-brightness", "evaluation.samples=20")
    found = evaluate(task, same(task), tmp_path)
    assert nothing_changed(found)
    changed = evaluate(task, moved(task, 0.1), tmp_path)
    assert not nothing_changed(changed)
    assert changed.base == found.base


@pytest.mark.parametrize("mistake", ["unpaired noise", "unpaired prompts"])
def test_models_that_are_not_paired_are_caught(mistake, task, tmp_path, cache, monkeypatch):
    sample = evaluation._sample

    def unpaired(task, params, noise, condition, *rest):
        if params is not task.params:
            if mistake == "unpaired noise":
                noise = noise.flip("chain")
            else:
                condition = told_another(condition)
        return sample(task, params, noise, condition, *rest)

    monkeypatch.setattr(evaluation, "_sample", unpaired)
    assert not nothing_changed(evaluate(task, same(task), tmp_path, cache=cache))


def numbers(found: Evaluation) -> list[float]:
    def leaves(x):
        if isinstance(x, dict):
            return [y for item in x.values() for y in leaves(item)]
        if isinstance(x, list | tuple):
            return [y for item in x for y in leaves(item)]
        return [x] if isinstance(x, int | float) else []

    return leaves(dataclasses.asdict(found))


@pytest.mark.parametrize("batch", [9, 70])
def test_the_batch_changes_nothing(batch, make, tuned, found, tmp_path, cache, monkeypatch):
    other = make("digits-brightness", f"evaluation.batch={batch}")
    seen = []
    again = evaluate(other, tuned, tmp_path, lambda *at: seen.append(at), update=12, cache=cache)
    assert len(numbers(again)) > 30
    assert numbers(again) == pytest.approx(numbers(found), rel=1e-5, abs=1e-5)
    assert seen == [(min(i + batch, N), N) for i in range(0, N, batch)]
    noise = evaluation._noise
    monkeypatch.setattr(evaluation, "_noise", lambda task, i: noise(task, range(len(i))))  # the same in every batch
    if batch == 9:
        assert numbers(evaluate(other, tuned, tmp_path, cache=cache))[1:] != pytest.approx(numbers(found)[1:], rel=1e-3)


def test_fewer_samples_are_the_first_of_more(make, tuned, tmp_path, cache, task):
    few = evaluate(make("digits-brightness", "evaluation.samples=10"), tuned, tmp_path, cache=cache)
    assert few.base.mean == pytest.approx(by_hand(task, task.params, 10)[1].mean().item(), abs=1e-5)


# --- KL ---


def kl_by_hand(task: Task, tuned: dict) -> torch.Tensor:
    """Return |mean - mean_base|^2 / (2 std^2) summed over the steps (n,), by DDIM's eqs. (12) and (16) in float64.

    The latents are those of diffusers; its own means would lose digits, as its 1 - alpha-bar is 1e-4 in float32.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    latents, _ = by_hand(task, tuned)
    scheduler = DDIMScheduler(**digits.SCHEDULER)
    scheduler.set_timesteps(task.config.sampler.steps)
    stride = 1000 // task.config.sampler.steps
    network = UNet2DModel(**digits.unet_config(8, 1, 10, digits.Recipe())).eval()
    total = torch.zeros(N, dtype=torch.float64)
    for x, timestep in zip(latents, scheduler.timesteps, strict=False):
        here = float(scheduler.alphas_cumprod[timestep])
        there = float(scheduler.alphas_cumprod[max(int(timestep) - stride, 0)])
        variance = (1 - there) / (1 - here) * (1 - here / there)
        means = []
        for params in (tuned, task.params):
            network.load_state_dict(params)
            with torch.no_grad():
                noise = network(x, timestep, class_labels=torch.tensor([8, 9] * (N // 2))).sample.double()
            x0 = (x.double() - math.sqrt(1 - here) * noise) / math.sqrt(here)
            means.append(math.sqrt(there) * x0 + math.sqrt(1 - there - variance) * noise)
        total += (means[0] - means[1]).square().sum((1, 2, 3)) / (2 * variance)
    return total


@pytest.mark.parametrize("steps", [1, 3])
def test_the_kl_is_the_closed_form_of_diffusers_steps(steps, make, tuned, tmp_path, cache):
    task = make("digits-brightness", f"sampler.steps={steps}")
    kl = evaluate(task, tuned, tmp_path, cache=cache).kl
    assert kl == pytest.approx(student(kl_by_hand(task, tuned)), rel=1e-5)


def test_the_kl_is_the_mean_log_density_ratio(found, task, tuned):
    latents, _ = by_hand(task, tuned)
    condition = task.of_prompts(torch.tensor([8, 9] * (N // 2)))
    ratio = torch.zeros(N)
    with torch.no_grad():
        for x, x_next, t in zip(latents, latents[1:], (3, 2, 1), strict=False):
            ratio += step_log_prob(task.chain, tuned, x, x_next, t, condition)
            ratio -= step_log_prob(task.chain, task.params, x, x_next, t, condition)
    # Step by step, given x_t, the ratio is Gaussian about the KL with variance 2 KL.
    error = math.sqrt(2 * found.kl.mean / N)
    assert abs(ratio.mean().item() - found.kl.mean) < 4 * error
    assert 4 * error < found.kl.mean / 2  # a factor of 2 would be seen


def test_a_step_without_density_is_left_out_and_said_so(make, tuned, tmp_path, cache):
    task = make("digits-brightness", "sampler.scheduler=ddpm")
    assert [task.chain.std(t) > 0 for t in (1, 2, 3)] == [False, True, True]
    found = evaluate(task, tuned, tmp_path, cache=cache)
    assert (found.kl_steps, found.left_out) == (2, 1)
    assert found.notes == ("the KL leaves out 1 of 3 steps, which have no noise: no density",)
    condition = task.of_prompts(torch.tensor([8, 9] * (N // 2)))
    noise = evaluation._noise(task, range(N))
    x, total = noise.initial, torch.zeros(N)
    with torch.no_grad():
        for t in (3, 2):
            mean = task.chain.mean(tuned, x, t, at_step(condition, t))
            own, base = (step_log_prob(task.chain, p, x, mean, t, condition) for p in (tuned, task.params))
            total += own - base  # at the tuned mean the log-ratio is the KL
            x = mean + task.chain.std(t) * noise.steps[t - 1]
    assert found.kl.mean == pytest.approx(total.mean().item(), rel=1e-4)


def test_a_chain_without_noise_has_no_kl(make, tuned, tmp_path, cache):
    task = make("digits-brightness", "sampler.eta=0", "evaluation.samples=2")
    found = evaluate(task, tuned, tmp_path, cache=cache)
    assert found.kl is None
    assert (found.kl_steps, found.left_out) == (0, 3)
    assert "no KL: no step has noise, hence none a density" in found.notes
    assert read_evaluation(tmp_path) == found
    kl = next(line for line in summary(found).splitlines() if line.startswith("KL to base"))
    assert kl.split() == ["KL", "to", "base,", "nats", "0", "none"]


def test_what_is_left_in_the_network_does_not_matter(make, tuned, tmp_path, cache):
    task = make("digits-brightness", "sampler.scheduler=ddpm", "sampler.last_step=frozen")
    found = evaluate(task, tuned, tmp_path, cache=cache)
    load(task.chain.network, tuned)  # as a run does that has just written its weights
    assert evaluate(task, tuned, tmp_path, cache=cache) == found


# --- distances ---


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images.mean((1, 2, 3))[:, None]


def write_images(folder: Path, images: np.ndarray) -> None:
    for i, image in enumerate(images):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(i % 2) / f"{i:03}.png")


def test_distances_to_a_folder(make, tuned, tmp_path, cache):
    write_images(tmp_path / "real", np.full((2 * N + 3, 8, 8), 51, dtype=np.uint8))
    task = make(
        "digits-brightness", f"evaluation.reference={tmp_path / 'real'}", f"evaluation.features={__name__}:brightness"
    )
    found = evaluate(task, tuned, tmp_path, cache=cache).frechet
    # All of the folder is one grey, 51 / 255: the distance is (mean - 0.2)^2 + variance.
    for params, told in ((task.params, found.base), (tuned, found.tuned)):
        x = by_hand(task, params)[1].double().mean((1, 2, 3))
        assert told == pytest.approx((x.mean().item() - 0.2) ** 2 + x.var().item(), abs=1e-6)
    assert found.floor == pytest.approx((0, 0, 0), abs=1e-12)
    assert (found.samples, found.against, found.dimension) == (N, N + 3, 1)
    assert (found.reference, found.features) == (str(tmp_path / "real"), f"{__name__}:brightness")


def test_digits_are_compared_with_real_ones_in_the_classifiers_features(found):
    f = found.frechet
    assert (f.reference, f.features, f.dimension, f.samples) == ("real digits", "digit classifier", 32, N)
    assert f.against == 2 * 174 - N  # 174 eights, 180 nines
    # A network after ten updates makes no digits.
    assert min(f.base, f.tuned) > 2 * f.floor.high > 2 * f.floor.mean > 0


def test_real_digits_have_the_shares_of_those_asked_for():
    images, labels = digits.digit_images()
    label = {tuple(image.flatten().tolist()): int(y) for image, y in zip(images, labels, strict=True)}

    def shares(asked):
        real = [label[tuple(image.flatten().tolist())] for image in digits_like(asked)]
        return {digit: real.count(digit) for digit in sorted(set(real))}

    # Of the ten digits there are 178, 182, 177, 183, 181, 182, 181, 179, 174, 180.
    assert shares([8, 9]) == {8: 174, 9: 174}
    assert shares([3] * 1000) == {3: 183}
    assert shares([1, 1, 7]) == {1: 182, 7: 91}
    assert shares([0, 1] * 500) == {0: 178, 1: 178}


def test_a_network_that_is_told_no_digit_is_compared_with_all(make, tuned, tmp_path, cache):
    task = make("digits-brightness", "prompts.conditional=false")
    assert evaluate(task, tuned, tmp_path, cache=cache).frechet.against == 10 * 174 - N


def test_pooled_features_are_means_over_parts():
    x = torch.rand(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    parts = [
        x[:, c, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2))
        for c, i, j in itertools.product(range(2), range(4), range(4))
    ]
    assert torch.allclose(pooled(x), torch.stack(parts, 1))


def rows(n: int, d: int, *names: str | int) -> np.ndarray:
    return Stream(3).child(*names).generator().normal(size=(n, d))


def test_without_a_reference_the_floor_is_that_of_the_base():
    """Equal laws are above their floor rarely, and below it too: with paired noise on both sides it would be always."""
    above = below = 0
    for i in range(200):
        base = rows(60, 2, "base", i)
        f, _ = evaluation._frechet(base, base.copy(), None, "f", "base model", Stream(i))
        assert f.base is None
        assert (f.samples, f.against) == (30, 30)
        above, below = above + (f.tuned > f.floor.high), below + (f.tuned < f.floor.low)
    assert above <= 20
    assert below <= 20
    shifted, _ = evaluation._frechet(base, base + 1, None, "f", "base model", Stream(0))
    assert shifted.tuned > 2 * shifted.floor.high


def test_sides_without_a_reference_share_no_sample(monkeypatch):
    sides = []
    monkeypatch.setattr(evaluation, "frechet_distance", lambda a, b: sides.append((a, b)) or 1.0)
    base = np.arange(21.0)[:, None]
    evaluation._frechet(base, base + 100, None, "f", "base model", Stream(0))
    chosen, others = (set(side.flatten()) for side in sides[0])
    assert len(chosen) == 10
    assert {x - 100 for x in chosen} | others == set(range(21))


def test_sides_without_a_reference_share_their_prompts():
    """With more prompts than each side has samples, the first half of the samples would have other prompts."""
    base = rows(60, 1, "a") + np.repeat([0.0, 10.0], 30)[:, None]
    f, _ = evaluation._frechet(base, base, None, "f", "base model", Stream(0))
    assert f.tuned < f.floor.high < 50


def test_the_same_images_of_both_models_are_compared(monkeypatch):
    sides = []
    monkeypatch.setattr(evaluation, "frechet_distance", lambda a, b: sides.append((a, b)) or 1.0)
    f, _ = evaluation._frechet(rows(50, 1, "a"), rows(50, 1, "a") + 9, rows(61, 1, "r"), "f", "r", Stream(0))
    (base, others), (tuned, same_others) = sides
    assert np.array_equal(tuned, base + 9)
    assert np.array_equal(others, same_others)
    assert (f.samples, f.against, len(base), len(others)) == (30, 31, 30, 31)


@pytest.mark.parametrize(
    ("samples", "reference", "note"),
    [
        (3, 100, "f has 3 features, which needs 4 samples and 8 reference images, got 3 and 100"),
        (100, 7, "f has 3 features, which needs 4 samples and 8 reference images, got 100 and 7"),
        (7, None, "f has 3 features, which needs 8 samples, got 7"),
        (4, 8, None),
        (8, None, None),
    ],
)
def test_too_few_samples_have_no_distance(samples, reference, note):
    real = None if reference is None else rows(reference, 3, "r")
    f, notes = evaluation._frechet(rows(samples, 3, "a"), rows(samples, 3, "b"), real, "f", "r", Stream(0))
    assert notes == ([] if note is None else [f"no Frechet distance: {note}"])
    assert (f.tuned is None) == (f.floor is None) == (note is not None)


def test_few_samples_are_evaluated_and_said_to_be_few(make, tmp_path):
    task = make("tiny-brightness", "evaluation.samples=2", "prompts.train=[a, b, c]")
    found = evaluate(task, moved(task, 0.1), tmp_path)
    assert found.base_diversity is None
    assert found.tuned_diversity is None
    assert (found.frechet.base, found.frechet.tuned, found.frechet.floor) == (None, None, None)
    assert [row.error for row in found.prompts] == [None, None]
    assert not found.held_out
    assert found.notes == (
        "no prompts are held out: these are those of the training, with fresh noise",
        "2 samples show only the first 2 of 3 prompts",
        "no diversity: it needs 3 samples, got 2",
        "no Frechet distance: means over 4 x 4 parts has 48 features, which needs 98 samples, got 2",
    )
    assert read_evaluation(tmp_path) == found


def test_stable_diffusion_is_compared_with_its_base(make, tmp_path):
    task = make("tiny-brightness", "evaluation.samples=98", "evaluation.batch=49", "prompts.train=[a, b, c]")
    found = evaluate(task, moved(task, 0.5), tmp_path)
    f = found.frechet
    assert (f.reference, f.dimension, f.samples, f.against, f.base) == ("base model", 48, 49, 49, None)
    assert f.tuned > 0
    assert 0 < f.floor.low < f.floor.high
    assert "98 samples are no multiple of 3 prompts: the first ones weigh more" in found.notes
    assert [row.samples for row in found.prompts] == [33, 33, 32]


# --- what is written ---


def test_the_file_is_read_back(found, folder, task):
    assert read_evaluation(folder) == found == read_evaluation(folder / "evaluation.json")
    data = json.loads((folder / "evaluation.json").read_text())
    assert data["config"] == digest(task.config)
    assert data["update"] == 12
    assert data["reward"] == "brightness"
    assert data["difference"] == found.difference._asdict()
    assert data["prompts"][1]["error"] == found.prompts[1].error
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "evaluation.png"]


def test_a_file_that_is_no_evaluation_is_refused(found, folder, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_evaluation(tmp_path)
    data = json.loads((folder / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps(data | {"base": {"mean": "high"}}))
    with pytest.raises(ValueError, match=r"is no evaluation: base"):
        read_evaluation(tmp_path)


def test_the_picture_shows_the_first_samples_of_both(folder, task, tuned):
    sides = [by_hand(task, p)[1][:4] for p in (task.params, tuned)]
    rewards = [side.mean((1, 2, 3)).tolist() for side in sides]
    shown = np.asarray(Image.open(folder / "evaluation.png")).astype(int)

    def apart(order):
        titles = ("base model", "fine-tuned")
        drawn = before_after(*[sides[i] for i in order], titles=titles, rewards=tuple(rewards[i] for i in order))
        return (np.abs(np.asarray(drawn).astype(int) - shown) > 1).mean()

    assert apart((0, 1)) < 1e-3 < apart((1, 0))


# --- the summary ---


def test_the_summary_is_aligned_and_complete(found):
    lines = summary(found).splitlines()
    assert lines[0] == (
        f"Fine-tuned against base after update 12: {N} samples of each, the same noise and 2 held-out prompts"
    )
    start = lines.index(next(line for line in lines if line.startswith("prompt")))
    for table in (lines[2:8], lines[start : start + 3]):
        for title in ("fine-tuned", "difference"):
            column = table[0].index(title)
            assert all(line[column - 2 : column].strip() == "" for line in table)
            assert any(line[column : column + 1].strip() for line in table[1:])
    reward = next(line for line in lines if line.startswith("reward brightness"))
    d = found.difference
    assert reward.endswith(f"{d.mean:+.4g} [{d.low:+.4g}, {d.high:+.4g}]")
    assert f"{found.kl.mean:.4g} [{found.kl.low:.4g}, {found.kl.high:.4g}]" in lines[4]
    assert f"{found.frechet.tuned:.4g}" in lines[6]
    assert f"{found.frechet.floor.high:.4g}" in lines[7]
    assert max(map(len, lines)) <= 120


def test_the_summary_of_many_long_prompts_is_short(found):
    row = PromptRow("a very long prompt that says more than there is room for", 1, 0.1, 0.2, 0.1, None)
    many = dataclasses.replace(found, prompts=(row,) * 45, notes=("something",), base_diversity=Estimate(1.0, 0.1))
    lines = summary(many).splitlines()
    assert len(lines) < 35
    assert max(map(len, lines)) <= 120
    assert "... and 33 more in evaluation.json" in lines
    assert lines[-1] == "Note: something."
    assert any(line.startswith("a very long prompt that says ...  1") for line in lines)


def test_numbers_of_an_evaluation_are_plain(found):
    assert all(type(x) in (int, float, bool) for x in numbers(found))
    assert isinstance(found.base, Interval)


# --- refusals ---


def test_parameters_that_do_not_fit_are_refused(task, tuned, tmp_path, cache):
    name = next(iter(tuned))
    fewer = {key: p for key, p in tuned.items() if key != name}
    for wrong in (fewer, tuned | {"other": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"tuned must have the parameters of the task, .* in one of them only"):
            evaluate(task, wrong, tmp_path, cache=cache)
    with pytest.raises(ValueError, match=r"has shape \(3,\), must have"):
        evaluate(task, tuned | {name: torch.zeros(3)}, tmp_path, cache=cache)


def test_a_model_that_diverged_is_refused(task, tuned, tmp_path, cache):
    name = "conv_out.bias"
    with pytest.raises(ValueError, match="tuned parameters must give finite samples and a finite KL, sample 0 is not"):
        evaluate(task, tuned | {name: torch.full_like(tuned[name], math.inf)}, tmp_path, cache=cache)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize("key", ["features", "reference"])
def test_settings_that_cannot_be_used_are_refused_before_anything_is_sampled(
    key, make, tuned, tmp_path, cache, monkeypatch
):
    monkeypatch.setattr(evaluation, "_sample", lambda *a: pytest.fail("sampled"))
    task = make("digits-brightness", f"evaluation.{key}=absent")
    with pytest.raises(ValueError, match=rf"^evaluation\.{key}: .*absent"):
        evaluate(task, tuned, tmp_path, cache=cache)
