"""Few-step DDPMs: the network and its training re-derived, seeds independent, cached, and samples near the data."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons, make_swiss_roll

from algorithms.chain import Noise, Params, Perturbation, rollout, step_mean
from algorithms.division import Division
from algorithms.estimators import policy_gradient
from algorithms.losses import Scored, Trajectories, clipped
from algorithms.objective import Objective
from benchmarks.shortcut import PlainNetwork
from toy import data as clouds
from toy import few_step
from toy.few_step import StepConditionedChain, fit, initial_parameters, load, pretrain, schedule, training_set
from verdicts.streams import Stream
from verdicts.two_sample import two_sample

STREAM = Stream(6).child("tests", "few-step")
CHAIN = StepConditionedChain.of(schedule(5))
SMALL = {"updates": 3, "batch": 8, "width": 8}


def close(a: Params, b: Params, rtol: float = 1e-5) -> bool:
    return set(a) == set(b) and all(torch.allclose(a[name], b[name], rtol=rtol, atol=1e-6) for name in a)


def weights(name: str = "weights", width: int = 8) -> Params:
    """Untrained parameters of CHAIN, with biases that are not 0."""
    params = initial_parameters(CHAIN, width, STREAM.child(name))
    source = torch.Generator().manual_seed(3)
    return {k: torch.randn(p.shape, generator=source) if k.startswith("b") else p for k, p in params.items()}


def states(n: int = 7) -> torch.Tensor:
    return torch.from_numpy(STREAM.child("states").generator().normal(size=(n, 2))).float()


# --- the chain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "last"), [(10, "0.951"), (100, "0.605"), (1000, "0.0066")])
def test_schedule_leaves_the_signal_that_the_released_one_leaves(steps: int, last: str) -> None:
    """The last values are from an independent derivation."""
    found = schedule(steps)
    assert f"{found.alpha_bar[-1]:.{len(last) - 2}f}" == last
    logits = torch.linspace(-6, 6, steps, dtype=torch.float64)
    np.testing.assert_allclose(found.beta, torch.sigmoid(logits) * (1e-2 - 1e-5) + 1e-5, rtol=1e-12)


@pytest.mark.parametrize("t", [1, 3, 5])
def test_mean_is_the_ancestral_step_of_the_network_written_out(t: int) -> None:
    params = {k: p.double() for k, p in weights().items()}
    w = {k: p.numpy() for k, p in params.items()}
    expected = []
    for x in states().double().numpy():
        h = x
        for layer in (1, 2, 3):
            h = np.log1p(np.exp(w["scale"][t - 1, layer - 1] * (h @ w[f"w{layer}"] + w[f"b{layer}"])))
        beta = np.asarray(schedule(5).beta)
        noise = h @ w["w4"] + w["b4"]
        level = np.prod(1 - beta[:t])
        expected.append((x - beta[t - 1] * noise / np.sqrt(1 - level)) / np.sqrt(1 - beta[t - 1]))
    np.testing.assert_allclose(CHAIN.mean(params, states().double(), t), expected, rtol=1e-11)
    assert CHAIN.std(t) == pytest.approx(np.sqrt(schedule(5).beta[t - 1]), rel=1e-15)


def test_states_at_different_steps_in_one_call_are_as_one_by_one() -> None:
    x, t = states(), torch.tensor([5, 1, 1, 3, 2, 4, 5])
    together = CHAIN.mean(weights(), x, t)
    alone = torch.cat([CHAIN.mean(weights(), x[i : i + 1], int(t[i])) for i in range(7)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(together, CHAIN.mean(weights(), x, t.flip(0)), atol=1e-4)


def test_means_of_all_steps_in_one_call_are_as_step_by_step() -> None:
    x = torch.stack([(1 + 0.1 * t) * states() for t in range(5)])
    for steps in (torch.arange(1, 6), torch.tensor([2, 2, 5, 1, 3])):
        together = CHAIN.means(weights(), x, steps)
        for i, t in enumerate(steps.tolist()):
            torch.testing.assert_close(together[i], CHAIN.mean(weights(), x[i], t), rtol=1e-5, atol=1e-6)


class StepByStep:
    """A chain without the `means` of all steps at once."""

    def __init__(self, chain: StepConditionedChain) -> None:
        self.steps, self.shape, self.initial, self.mean, self.std = (
            chain.steps, chain.shape, chain.initial, chain.mean, chain.std,
        )  # fmt: skip


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_surrogates_ascend_all_steps_at_once_as_step_by_step(micro_batch: int | None) -> None:
    division, objective = Division(micro_batch), Objective(Quadratic())
    drawn, moved = ({k: p.double() for k, p in weights(name).items()} for name in ("weights", "b"))
    noise = policy_gradient(5).draw(CHAIN, drawn, 8, torch.Generator().manual_seed(3))
    noise = Noise(noise.initial.double(), noise.steps.double(), noise.outcome)
    advantages = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gradients = []
    for chain in (CHAIN, StepByStep(CHAIN)):
        batch = Trajectories.of(chain, drawn, objective, noise, None, division)

        def ratio(row, part, log_prob, cost):
            return clipped(1e-3 * (log_prob - batch.log_probs[row, part]), advantages[row, part], 0.2)  # noqa: B023

        for value in (Scored(advantages), ratio):
            for samples in (None, torch.tensor([6, 1, 2, 7, 0])):
                params = {name: p.clone() for name, p in moved.items()}
                batch.ascend(params, samples, value, 8)
                gradients.append(params)
            params = {name: p.clone() for name, p in moved.items()}
            batch.ascend_pairs(params, torch.tensor([4, 0, 0, 2, 1, 3, 4, 0]), value, 8)
            gradients.append(params)
    for at_once, one_by_one in zip(gradients[:6], gradients[6:], strict=True):
        for name in moved:
            torch.testing.assert_close(at_once[name].grad, one_by_one[name].grad, rtol=1e-9, atol=1e-12)
            assert float(one_by_one[name].grad.norm()) > 1e-6
    assert not torch.allclose(gradients[0]["w2"].grad, gradients[1]["w2"].grad, rtol=1e-2)


@pytest.mark.parametrize("chain", [CHAIN, StepByStep(CHAIN)], ids=["at once", "step by step"])
def test_pairs_over_all_steps_add_up_to_the_whole_ascent(chain: StepConditionedChain) -> None:
    noise = policy_gradient(5).draw(CHAIN, weights(), 6, torch.Generator().manual_seed(3))
    batch = Trajectories.of(chain, weights(), Objective(Quadratic()), noise, None)
    value = Scored(torch.randn(5, 6, generator=torch.Generator().manual_seed(4)))
    whole, pairs = weights("b"), weights("b")
    batch.ascend(whole, None, value, 6)
    for row in range(5):  # the gradients of the pairs are added up
        batch.ascend_pairs(pairs, torch.full((6,), row), value, 6)
    for name in whole:
        torch.testing.assert_close(
            pairs[name].grad, whole[name].grad, rtol=1e-4, atol=1e-4 * float(whole[name].grad.norm())
        )


@dataclass(frozen=True)
class Quadratic:
    differentiable: bool = True

    def __call__(self, x0: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        return -x0.square().sum(1)


@pytest.mark.parametrize("t", [2, torch.tensor([[5, 1, 1, 3, 2, 4, 5], [1, 2, 3, 4, 5, 5, 1]])], ids=["one", "each"])
def test_seeds_in_one_call_are_as_one_by_one(t: int | torch.Tensor) -> None:
    sets = [weights("a"), weights("b")]
    stacked = {name: torch.stack([p[name] for p in sets]) for name in sets[0]}
    x = torch.stack([states(), 2 * states()])
    together = CHAIN.mean(stacked, x, t)
    for s in range(2):
        alone = CHAIN.mean(sets[s], x[s], t if isinstance(t, int) else t[s])
        torch.testing.assert_close(together[s], alone, rtol=1e-5, atol=1e-6)


def test_samples_may_have_their_own_parameters() -> None:
    params, x = weights(), states()
    unit = {k: torch.randn(5, 7, *p.shape, generator=torch.Generator().manual_seed(1)) for k, p in params.items()}
    found = step_mean(CHAIN, params, x, 3, None, Perturbation(0.1, unit, torch.ones(5, 7)))
    for i in range(7):
        own = {k: p + 0.1 * unit[k][2, i] for k, p in params.items()}
        torch.testing.assert_close(found[i : i + 1], CHAIN.mean(own, x[i : i + 1], 3), rtol=1e-5, atol=1e-5)


def test_plain_module_has_the_same_noise_and_gradients() -> None:
    params = {k: p.requires_grad_() for k, p in weights().items()}
    plain = PlainNetwork(5, width=8)
    plain.load({k: p.detach() for k, p in params.items()})
    x, t = states(), torch.tensor([5, 1, 1, 3, 2, 4, 5])
    ours, theirs = CHAIN.epsilon(params, x, t), plain(x, t)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    wanted = dict(plain.named_parameters())
    for i in range(3):
        for name, grad in (("weight", params[f"w{i + 1}"].grad), ("bias", params[f"b{i + 1}"].grad)):
            assert grad is not None
            torch.testing.assert_close(
                grad.T if grad.dim() == 2 else grad, wanted[f"hidden.{i}.linear.{name}"].grad, rtol=1e-4, atol=1e-5
            )
        scale = params["scale"].grad
        assert scale is not None
        torch.testing.assert_close(scale[:, i], wanted[f"hidden.{i}.scale.weight"].grad, rtol=1e-4, atol=1e-5)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "epsilon"), [(5, 1e-8), (33, 1e-20)], ids=["whole table", "row by row"])
def test_training_is_adam_on_the_mean_squared_error_with_a_cosine_rate(steps: int, epsilon: float) -> None:
    """Row by row, the embeddings' epsilon is 0; of the other gradients here none is so small that theirs matters."""
    chain = StepConditionedChain.of(schedule(steps))
    updates, rate = few_step.BLOCK + 6, 3e-3
    points = training_set("swiss_roll", STREAM)
    (found,) = fit(chain, points[None], [STREAM], updates, batch=8, rate=rate, width=8)
    plain = PlainNetwork(steps, width=8)
    plain.load(initial_parameters(chain, 8, STREAM))
    optimizer = torch.optim.Adam(plain.parameters(), lr=rate, eps=epsilon)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    source = torch.Generator().manual_seed(STREAM.child("training").integer())
    blocks = [few_step._block(chain, points[None], [source], 8) for _ in range(2)]
    for u in range(updates):
        x, t, noise = (part[u % few_step.BLOCK, 0] for part in blocks[u // few_step.BLOCK])
        optimizer.zero_grad()
        (plain(x, t) - noise).square().mean().backward()
        optimizer.step()
        scheduler.step()
    expected = PlainNetwork(steps, width=8)
    expected.load(found)
    untrained = PlainNetwork(steps, width=8)
    untrained.load(initial_parameters(chain, 8, STREAM))
    for name, value in plain.named_parameters():
        # Adam's first steps follow the sign of a gradient, so that rounding may grow: still 1e-3 of what was learned.
        moved = (value - untrained.get_parameter(name)).abs().max()
        assert (value - expected.get_parameter(name)).abs().max() < 1e-3 * moved, name


@pytest.mark.parametrize(("seeds", "width"), [(1, 16), (3, 10)])
def test_gradients_by_hand_are_those_of_autograd(seeds: int, width: int) -> None:
    chain, source = StepConditionedChain.of(schedule(4)), torch.Generator().manual_seed(5)
    drawn = [initial_parameters(chain, width, Stream(4).child("by hand", seed)) for seed in range(seeds)]
    params = {name: torch.stack([p[name] for p in drawn]).double().requires_grad_() for name in drawn[0]}
    x, noise = torch.randn(2, seeds, 6, 2, generator=source, dtype=torch.float64)
    t = torch.randint(1, 5, (seeds, 6), generator=source)
    loss = (chain.epsilon(params, x, t) - noise).square().mean((1, 2)).sum()
    expected = torch.autograd.grad(loss, list(params.values()))
    out = {name: torch.full_like(p, torch.nan) for name, p in params.items()}
    with torch.no_grad():
        table, rows = params["scale"].view(seeds * 4, 3 * width), t - 1 + 4 * torch.arange(seeds)[:, None]
        of_scales = few_step._gradients(params, table[rows], x, noise, out)
        out["scale"] = few_step._summed(of_scales, rows, len(table)).view_as(params["scale"])
    for found, grad in zip(out.values(), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-14)


def test_batches_are_the_forward_process_of_the_points_at_every_step() -> None:
    """With one training point, (x_t - sqrt(alpha_bar_t) x_0) / noise is sqrt(1 - alpha_bar_t), for t = 1..T alike."""
    point = torch.tensor([[[0.5, -0.25]]])
    x, t, noise = few_step._block(CHAIN, point, [torch.Generator().manual_seed(1)], 50)
    level = np.cumprod(1 - np.asarray(schedule(5).beta))[t.numpy() - 1][..., None]
    np.testing.assert_allclose(x, np.sqrt(level) * point.numpy() + np.sqrt(1 - level) * noise.numpy(), atol=2e-6)
    counts = np.bincount(t.numpy().ravel(), minlength=6)
    expected = t.numel() / 5
    assert counts[0] == 0
    assert len(counts) == 6
    assert np.all(np.abs(counts[1:] - expected) < 5 * np.sqrt(expected))
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize("steps", [5, 65], ids=["whole table", "row by row"])
@pytest.mark.parametrize("width", [16, 128, 7])
@pytest.mark.parametrize("together", [[4], [9, 4], [1, 2, 4, 3]], ids=["alone", "two", "four"])
def test_seed_does_not_depend_on_the_seeds_trained_with_it(
    together: list[int], width: int, steps: int, tmp_path: Path
) -> None:
    def trained(seeds: list[int], name: str) -> Params:
        _, found = pretrain("two_moons", steps, seeds, STREAM, tmp_path / name, updates=66, batch=16, width=width)
        return found[seeds.index(4)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, other = trained([4, 7, 8], "a"), trained(together, "b")
    finally:
        torch.set_num_threads(threads)
    if width % few_step.LANES:
        assert close(first, other)
    else:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_seeds_differ_in_weights_points_and_batches(tmp_path: Path) -> None:
    _, (a, b) = pretrain("two_moons", 5, [1, 2], STREAM, tmp_path, **SMALL)
    assert not close(a, b, rtol=0.1)
    assert not torch.equal(training_set("two_moons", STREAM.child(1)), training_set("two_moons", STREAM.child(2)))
    source = [torch.Generator().manual_seed(STREAM.child(s, "training").integer()) for s in (1, 2)]
    points = training_set("two_moons", STREAM)[None].expand(2, -1, -1)
    x, t, noise = few_step._block(CHAIN, points, source, 8)
    assert not any(torch.equal(part[:, 0], part[:, 1]) for part in (x, t, noise))


def test_samples_come_closer_to_the_data() -> None:
    """Against fresh points; the sliced Wasserstein-2 distance of two samples, by sorting projections."""
    chain = StepConditionedChain.of(schedule(10))
    points = training_set("swiss_roll", STREAM)
    fresh = training_set("swiss_roll", STREAM.child("fresh"))[:2000]
    source = torch.Generator().manual_seed(2)
    noise = Noise(
        torch.randn(2000, 2, generator=source),
        torch.randn(10, 2000, 2, generator=source),
        torch.zeros(2000, dtype=torch.long),
    )
    angle = torch.linspace(0, torch.pi, 50)
    directions = torch.stack([angle.cos(), angle.sin()])

    def distance(params: Params) -> float:
        samples = rollout(chain, params, noise).latents[0]
        assert samples.dtype == torch.float32
        gaps = (samples @ directions).sort(0).values - (fresh @ directions).sort(0).values
        return float(gaps.square().mean().sqrt())

    (params,) = fit(chain, points[None], [STREAM], 800)
    assert distance(params) < 0.25 < 0.5 < distance(initial_parameters(chain, 128, STREAM))


@pytest.mark.parametrize("updates", [1, few_step.BLOCK, few_step.BLOCK + 1])
def test_progress_counts_up_to_all_updates(updates: int, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    recipe = SMALL | {"updates": updates}
    pretrain("swiss_roll", 5, [1], STREAM, tmp_path, **recipe, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted({min(few_step.BLOCK, updates), updates})
    assert {total for _, total in seen} == {updates}
    pretrain("swiss_roll", 5, [1], STREAM, tmp_path, **recipe, progress=lambda *_: pytest.fail("trained again"))


# --- data ---------------------------------------------------------------------------------------------------------

ROLL = make_swiss_roll(700, noise=0.05, random_state=1)[0][:, [0, 2]] / 20
MOONS = make_moons(700, noise=0.05, random_state=1)[0] / 2 - [0.25, 0.125]


def p_value(x: np.ndarray, y: np.ndarray) -> float:
    return two_sample(x, y, STREAM.child("data-test"), permutations=199).p_value


@pytest.mark.parametrize(("data", "reference"), [("swiss_roll", ROLL), ("two_moons", MOONS)], ids=["roll", "moons"])
def test_points_have_the_law_of_scikit_learns(data: str, reference: np.ndarray) -> None:
    points = training_set(data, STREAM, 700).double().numpy()
    assert p_value(points, reference) > 0.01
    assert p_value(points * 2, reference) < 0.01  # divided by half as much
    assert p_value(points[:, ::-1], reference) < 0.01  # axes swapped


def test_noise_of_the_swiss_roll_is_a_twentieth_of_0_05() -> None:
    """The distance from the curve r = angle / 20; the roll of `toy.data` has ten times the relative noise."""

    def off_curve(points: np.ndarray) -> float:
        angle = np.linspace(1.5 * np.pi, 4.5 * np.pi, 4000)
        curve = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) / 20
        return float(np.sqrt(np.mean(np.linalg.norm(points[:, None] - curve, axis=2).min(1) ** 2)))

    expected = pytest.approx(0.05 / 20, rel=0.15)  # 400 points: standard error 4 %
    assert off_curve(training_set("swiss_roll", STREAM, 400).double().numpy()) == expected
    assert off_curve(ROLL[:400]) == expected
    assert off_curve(clouds.swiss_roll(400, STREAM.child("other").generator()) / 2) != expected


# --- cache and bad input ------------------------------------------------------------------------------------------


def test_cached_seeds_are_loaded_and_only_the_others_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    real = few_step.fit

    def counted(*arguments: object) -> list[Params]:
        counts.append(len(arguments[2]))
        return real(*arguments)

    monkeypatch.setattr(few_step, "fit", counted)
    _, first = pretrain("two_moons", 5, [1, 2], STREAM, tmp_path, **SMALL)
    _, again = pretrain("two_moons", 5, [3, 2, 1], STREAM, tmp_path, **SMALL)
    assert counts == [2, 1]
    assert all(torch.equal(first[0][name], again[2][name]) for name in first[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[0])
    assert len(list(tmp_path.iterdir())) == 3  # and nothing temporary is left behind


@pytest.mark.parametrize(
    "change",
    [{"data": "swiss_roll"}, {"steps": 6}, {"updates": 4}, {"batch": 9}, {"width": 9}, {"rate": 1e-3}],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_recipe_has_its_own_file(change: dict[str, object], tmp_path: Path) -> None:
    recipe = {"data": "two_moons", "steps": 5, "seeds": [1], "stream": STREAM, "cache": tmp_path, **SMALL}
    pretrain(**recipe)
    pretrain(**(recipe | change))
    assert len(list(tmp_path.iterdir())) == 2


def test_parameters_of_another_number_of_steps_are_refused(tmp_path: Path) -> None:
    pretrain("two_moons", 6, [1], STREAM, tmp_path, **SMALL)
    (file,) = tmp_path.iterdir()
    message = r"^params were trained with T = 6 steps, but the chain has T = 5$"
    with pytest.raises(ValueError, match=message):
        load(CHAIN, file)
    with pytest.raises(ValueError, match=message):
        CHAIN.mean(torch.load(file, weights_only=True), states(), 2)


def test_file_that_is_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"scale": Path("x")}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        load(CHAIN, tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "rolls"}, r"^data must be one of \['swiss_roll', 'two_moons'\], got 'rolls'$"),
        ({"steps": 0}, r"^steps must be >= 1, got 0$"),
        ({"updates": 0}, r"^updates must be >= 1, got 0$"),
        ({"batch": 0}, r"^batch must be >= 1, got 0$"),
        ({"width": -1}, r"^width must be >= 1, got -1$"),
    ],
    ids=["data", "steps", "updates", "batch", "width"],
)
def test_bad_input_is_refused_before_anything_is_written(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    recipe = {"data": "two_moons", "steps": 5, "seeds": [1], "stream": STREAM, "cache": tmp_path / "cache", **SMALL}
    with pytest.raises(ValueError, match=message):
        pretrain(**(recipe | change))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=r"^data must be one of"):
        training_set("rolls", STREAM)
