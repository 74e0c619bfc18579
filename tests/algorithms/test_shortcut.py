"""Shortcut fine-tuning: exact gradients and signs, the kernel witness, penalties, all arms, resumed runs, bad input."""

import io
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch

from algorithms import shortcut
from algorithms.chain import Noise, rollout
from algorithms.critics import (
    CriticReward,
    KernelCritic,
    MLPCritic,
    MLPValue,
    ValueBaseline,
    baseline_gradients,
    baseline_penalty,
    continuations,
    evaluate,
    gradient_penalty,
    spectrally_normalised,
)
from algorithms.estimators import policy_gradient
from algorithms.objective import KLToReference, Objective
from algorithms.shortcut import Adversary, ShortcutFineTuning, ShortcutTrainer
from algorithms.training import Settings
from tests.algorithms.nonlinear import Tanh, generator, parameters

DOUBLE = torch.float64


@dataclass(frozen=True)
class Affine:
    """x_{t-1} = slope x_t + t theta + std eps: E x_0 = slope^T E x_T + sum_t slope^(t-1) t theta."""

    steps: int = 2
    shape: tuple = (2,)
    slope: float = 0.7
    noise: float = 0.5

    def initial(self, noise):
        return noise

    def mean(self, params, x, t, condition):
        return self.slope * x + t * params["theta"] + (0.0 if condition is None else condition)

    def std(self, t):
        return self.noise


@dataclass(frozen=True)
class LinearCritic:
    def __call__(self, params, x):
        return x.flatten(1) @ params["w"] + params["b"]


def linear(w, b=0.3):
    return {"w": torch.tensor(w, dtype=DOUBLE), "b": torch.tensor(b, dtype=DOUBLE)}


def signs(chain):
    """All +-1 noises: an exact quadrature for what is at most cubic in each number."""
    d = chain.shape[0]
    each = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=d * (chain.steps + 1))), dtype=DOUBLE)
    parts = each.reshape(len(each), chain.steps + 1, d)
    return Noise(parts[:, 0], parts[:, 1:].transpose(0, 1), torch.zeros(len(each), dtype=torch.int64))


def generator_for(update):
    return torch.Generator().manual_seed(500 + update)


def networks(chain, seed=3, width=16):
    d, g = math.prod(chain.shape), torch.Generator().manual_seed(seed)
    critic, value = MLPCritic(d, (width, width)), MLPValue(d, chain.steps, (width,))
    return Adversary(critic, critic.initial(g, DOUBLE), value, value.initial(g, DOUBLE))


def data(n=400, shift=0.0, d=2):
    return shift + torch.randn(n, d, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)


# -- the generator's gradient


@pytest.mark.parametrize("gradient", ["pathwise", "policy"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_linear_critic_gives_minus_the_gradient_of_its_mean_exactly(gradient, sign):
    chain, params = Affine(), {"theta": torch.tensor([0.2, -0.4], dtype=DOUBLE)}
    w = [1.5, -0.8]
    reward = CriticReward(LinearCritic(), linear([sign * v for v in w]))
    adversary = networks(chain)
    baseline = ValueBaseline(adversary.value, adversary.value_params)
    estimator = ShortcutFineTuning(gradient, "gradient penalty").estimator(2, baseline)
    estimator.accumulate(chain, params, Objective(reward), signs(chain))
    found = params["theta"].grad
    truth = -(1 + 2 * chain.slope) * torch.tensor(w, dtype=DOUBLE)  # -grad E f, with dE x_0 / dtheta = 1 + 2 slope
    torch.testing.assert_close(found, sign * truth, rtol=1e-12, atol=1e-12)


def test_pathwise_and_policy_gradient_agree_in_mean():
    chain, params, n = Tanh(steps=3), parameters(), 30000
    points = torch.randn(2, 40, 3, generator=generator(4), dtype=DOUBLE)
    witness = {"generated": points[0] + 1.0, "data": points[1] - 1.0}
    direction = parameters(7)

    def sampled(gradient, seed, sign=1.0):
        critic = KernelCritic(2.0)
        flipped = {"generated": witness["data"], "data": witness["generated"]}
        reward = CriticReward(critic, witness if sign > 0 else flipped)
        own = networks(chain)
        estimator = ShortcutFineTuning(gradient, "spectral").estimator(3, ValueBaseline(own.value, own.value_params))
        noise = estimator.draw(chain, params, n, generator(seed))
        each = estimator.directional(chain, params, Objective(reward), noise, direction)
        return float(each.mean()), float(each.std()) / n**0.5

    (a, sa), (b, sb), (c, sc) = sampled("pathwise", 1), sampled("policy", 2), sampled("policy", 3, sign=-1.0)
    assert abs(a) > 10 * math.hypot(sa, sb)  # the sample tells the sign
    assert abs(a - b) < 4.5 * math.hypot(sa, sb)
    assert abs(a - c) > 10 * math.hypot(sa, sc)


@pytest.mark.parametrize("gradient", ["pathwise", "policy"])
@pytest.mark.parametrize("regulariser", ["gradient penalty", "spectral", "baseline"])
def test_an_update_uses_the_trained_critic_on_fresh_roll_outs(gradient, regulariser):
    chain, params, adversary = Tanh(steps=3), parameters(), networks(Tanh(steps=3))
    method = ShortcutFineTuning(gradient, regulariser, critic_steps=2)
    trainer = ShortcutTrainer(chain, params, data(d=3), adversary, method, Settings(1, 8, 0.01), generator_for)
    trainer.run()
    result, g = trainer.result(), generator_for(1)
    policy_gradient(3).draw(chain, params, 16, g)  # what both of the critic's steps draw
    torch.randint(400, (16,), generator=g)
    if regulariser == "gradient penalty":
        torch.rand(16, generator=g, dtype=DOUBLE)
    after = result.adversary
    effective = spectrally_normalised(after.params) if regulariser == "spectral" else after.params
    objective = Objective(CriticReward(after.critic, effective))
    estimator = method.estimator(3, ValueBaseline(after.value, after.value_params))
    own = {name: p.clone() for name, p in params.items()}
    returns = estimator.accumulate(chain, own, objective, estimator.draw(chain, own, 8, g))
    norm = torch.cat([p.grad.flatten() for p in own.values()]).norm()
    assert result.history.gradient_norm == pytest.approx([float(norm)], rel=1e-9)
    assert result.history.generator_return == pytest.approx([float(returns.mean())], rel=1e-9)
    for name, p in own.items():  # Adam's first step is of the size of the learning rate, uphill
        torch.testing.assert_close(result.params[name], p.detach() + 0.01 * p.grad.sign(), rtol=0, atol=1e-6)
    assert any(not torch.equal(after.params[k], adversary.params[k]) for k in after.params)
    assert result.history.samples == [24]


def test_clipped_with_one_step_is_fresh_and_with_more_stays_close():
    chain, costs = Tanh(steps=3), (KLToReference(0.3, parameters(5)),)

    def run(**options):
        method = ShortcutFineTuning("policy", "baseline", critic_steps=2, **options)
        arguments = (chain, parameters(), data(d=3), networks(chain), method, Settings(3, 8, 0.01), generator_for)
        trainer = ShortcutTrainer(*arguments, running_costs=costs)
        trainer.run()
        return trainer.result()

    fresh, clipped = run(), run(batches="clipped")
    for name in fresh.params:
        torch.testing.assert_close(clipped.params[name], fresh.params[name], rtol=1e-9, atol=1e-9)
    more = run(batches="clipped", generator_steps=3)
    assert more.history.samples == fresh.history.samples == [24, 48, 72]
    assert run(generator_steps=3).history.samples == [40, 80, 120]
    assert not torch.allclose(more.params["W"], fresh.params["W"], atol=1e-4)


def test_clipping_stops_at_the_edge_of_the_range():
    """A huge first step leaves all ratios that would grow further beyond the range, so those get no second gradient."""
    chain, params = Affine(), {"theta": torch.zeros(2, dtype=DOUBLE)}
    norms = {}
    for clip in (1e-6, 0.999):
        method = ShortcutFineTuning(
            "policy", "gradient penalty", 1, generator_steps=2, batches="clipped", ratio_clip=clip
        )
        rounds = shortcut._Rounds(method, networks(chain), data(), shortcut.Division())
        leaves = {"theta": params["theta"].clone().requires_grad_()}
        objective = Objective(CriticReward(LinearCritic(), linear([1.0, 1.0])))
        steps = rounds.updates(chain, leaves, objective, 64, generator(2))
        next(steps)
        first = leaves["theta"].grad.clone()
        with torch.no_grad():
            leaves["theta"] += 1e-3 * first / first.norm()
        leaves["theta"].grad = None
        next(steps)
        norms[clip] = float(leaves["theta"].grad @ first / first.norm() ** 2)
    assert norms[0.999] == pytest.approx(1, abs=0.05)  # nothing clipped: nearly the same gradient
    assert norms[1e-6] < 0.5


def test_buffer_takes_the_critic_roll_outs_without_ratios():
    chain, params = Tanh(steps=3), parameters()
    method = ShortcutFineTuning("policy", "baseline", critic_steps=1, batches="buffer")
    condition = torch.randn(8, 3, generator=generator(6), dtype=DOUBLE)
    arguments = (chain, params, data(d=3), networks(chain), method, Settings(1, 8, 0.01), generator_for, condition)
    trainer = ShortcutTrainer(*arguments)
    trainer.run()
    result = trainer.result()
    objective = Objective(CriticReward(result.adversary.critic, result.adversary.params))
    estimator = method.estimator(3, ValueBaseline(result.adversary.value, result.adversary.value_params))
    noise = estimator.draw(chain, params, 8, generator_for(1))
    own = {name: p.clone() for name, p in params.items()}
    estimator.accumulate(chain, own, objective, noise, condition)
    norm = torch.cat([p.grad.flatten() for p in own.values()]).norm()
    assert result.history.gradient_norm == pytest.approx([float(norm)], rel=1e-9)
    assert result.history.samples == [8]


# -- the critic


def test_the_critic_climbs_the_difference_of_means():
    """Adam's first step on a linear critic without penalty is the sign of mean(generated) - mean(data)."""
    chain, params = Affine(), {"theta": torch.zeros(2, dtype=DOUBLE)}
    real, w = data() + torch.tensor([5.0, -5.0], dtype=DOUBLE), linear([0.1, 0.2])
    method = ShortcutFineTuning("pathwise", "gradient penalty", critic_steps=1, strength=0.0)
    trainer = ShortcutTrainer(
        chain, params, real, Adversary(LinearCritic(), w), method, Settings(1, 64, 0.01), generator_for
    )
    trainer.run()
    moved = trainer.result().adversary.params["w"] - w["w"]
    torch.testing.assert_close(moved, torch.tensor([-1e-3, 1e-3], dtype=DOUBLE), rtol=1e-4, atol=0)


@pytest.mark.parametrize("regulariser", ["gradient penalty", "baseline", "conditional baseline"])
def test_the_critic_is_pulled_by_its_regulariser(regulariser):
    """With a huge strength Adam's first step is down the penalty: a shorter slope, or a bias nearer to the baseline."""
    chain, params, value = Affine(), {"theta": torch.zeros(2, dtype=DOUBLE)}, networks(Affine())
    w = linear([3.0, -4.0], b=50.0)
    adversary = Adversary(LinearCritic(), w, value.value, value.value_params)
    method = ShortcutFineTuning("policy", regulariser, critic_steps=1, strength=1e6)
    trainer = ShortcutTrainer(chain, params, data(), adversary, method, Settings(1, 64, 0.01), generator_for)
    trainer.run()
    after = trainer.result().adversary.params
    if regulariser == "gradient penalty":
        torch.testing.assert_close(after["w"] - w["w"], torch.tensor([-1e-3, 1e-3], dtype=DOUBLE), rtol=1e-3, atol=0)
        assert trainer.result().history.penalty == pytest.approx([16.0])
    else:
        assert float(after["b"] - w["b"]) == pytest.approx(-1e-3, rel=1e-3)


@pytest.mark.parametrize("w", [[3.0, 4.0], [0.3, -0.4], [0.0, 0.0]])
def test_gradient_penalty_of_an_affine_critic_is_exact(w):
    params = {name: p.requires_grad_() for name, p in linear(w).items()}
    u = torch.rand(30, generator=generator(), dtype=DOUBLE)
    penalty = gradient_penalty(lambda x: evaluate(LinearCritic(), params, x), data(30), data(30, 2.0), u)
    norm = math.hypot(*w)
    assert float(penalty.detach()) == pytest.approx((norm - 1) ** 2, abs=1e-14)
    (grad,) = torch.autograd.grad(penalty, params["w"])
    truth = 2 * (norm - 1) * params["w"].detach() / norm if norm else torch.zeros(2, dtype=DOUBLE)
    torch.testing.assert_close(grad, truth)


def test_gradient_penalty_is_taken_between_the_samples():
    """|grad| of x^2 / 2 is |x|, so the penalty tells the points."""
    x, y = data(5), data(5, 3.0)
    u = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.9], dtype=DOUBLE)
    found = gradient_penalty(lambda z: 0.5 * z.square().sum(1), x, y, u)
    points = [float(w) * a + (1 - float(w)) * b for w, a, b in zip(u, x, y, strict=True)]
    assert float(found.detach()) == pytest.approx(sum((float(p.norm()) - 1) ** 2 for p in points) / 5)


def test_kernel_witness_and_distance_against_loops():
    x, y, z = data(7), data(5, 1.0)[:, :2], data(4, -0.5)
    critic, h = KernelCritic(0.8), 0.8

    def k(a, b):
        return math.exp(-sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / (2 * h * h))

    witness = [sum(k(s, a) for a in x) / 7 - sum(k(s, b) for b in y) / 5 for s in z]
    params = {"generated": x, "data": y}
    assert evaluate(critic, params, z).tolist() == pytest.approx(witness, rel=1e-12)
    xx = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    yy = sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    xy = sum(k(a, b) for a in x for b in y) / 35
    assert float(critic.distance(x, y)) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    # E_p f with f held fixed has the gradient of MMD^2 / 2, here of the biased estimate's.
    moved = x.clone().requires_grad_()
    biased = critic._kernel(moved, moved).mean() - 2 * critic._kernel(moved, y).mean()
    (whole,) = torch.autograd.grad(biased / 2, moved)
    (frozen,) = torch.autograd.grad(evaluate(critic, params, moved).mean(), moved)
    torch.testing.assert_close(frozen, whole)


def test_the_witness_does_not_hold_the_samples_it_scores():
    """Bandwidth -> 0: f is 0 at fresh samples, and 1 / m at its own, which would be the return."""
    chain, params = Affine(), {"theta": torch.zeros(2, dtype=DOUBLE)}
    for gradient in ("pathwise", "policy"):
        method = ShortcutFineTuning(gradient, None, critic_steps=2)
        arguments = (chain, params, data(), Adversary(KernelCritic(1e-6)), method, Settings(1, 4, 0.01), generator_for)
        trainer = ShortcutTrainer(*arguments)
        trainer.run()
        assert trainer.result().history.generator_return == [0.0]


def test_spectral_normalisation_makes_a_perceptron_lipschitz():
    critic = MLPCritic(2, (16, 16))
    params = {k: 5 * p for k, p in critic.initial(generator(), DOUBLE).items()}
    normal = spectrally_normalised(params)
    for name, p in normal.items():
        if p.dim() == 2:
            assert float(torch.linalg.svdvals(p)[0]) == pytest.approx(1)
        else:
            assert torch.equal(p, params[name])
    x, y = data(200), data(200, 1.0).flip(0)

    def slopes(own):
        return float(((critic(own, x) - critic(own, y)).abs() / (x - y).norm(dim=1)).max())

    assert slopes(normal) <= 1 < slopes(params)


# -- the baseline


def test_continuations_start_where_they_should():
    chain, params = replace(Tanh(steps=4), eta=0.0), parameters()
    condition = torch.randn(5, 3, generator=generator(2), dtype=DOUBLE)
    noise = policy_gradient(4).draw(chain, params, 5, generator())
    latents = rollout(chain, params, noise, condition).latents
    latents[2] += 1.0  # no longer on its own path: its row must be told apart
    ends = continuations(chain, params, latents, generator(3), condition)
    for t in (1, 3, 4):
        torch.testing.assert_close(ends[t - 1], latents[0])
    x = chain.mean(params, latents[2], 2, condition)
    torch.testing.assert_close(ends[1], chain.mean(params, x, 1, condition))


def test_the_printed_penalty_vanishes_at_the_true_baseline_and_the_released_one_does_not():
    """f(x) = w.x on the affine chain: Var(f | x_t) = |w|^2 std^2 (1 + slope^2 + ... + slope^(2t - 2))."""
    chain, params, n = Affine(steps=3), {"theta": torch.tensor([0.2, -0.1], dtype=DOUBLE)}, 50000
    w = torch.tensor([1.0, -0.5], dtype=DOUBLE)
    noise = policy_gradient(3).draw(chain, params, n, generator(5))
    latents = rollout(chain, params, noise).latents
    drift = {t: sum(chain.slope ** (s - 1) * s for s in range(1, t + 1)) * params["theta"] for t in (1, 2, 3)}
    values = torch.stack([(chain.slope**t * latents[t] + drift[t]) @ w for t in (1, 2, 3)])
    score, again = latents[0] @ w, continuations(chain, params, latents, generator(6)) @ w
    variances = [1.25 * 0.25 * sum(chain.slope ** (2 * s) for s in range(t)) for t in (1, 2, 3)]
    # one sum over t has std <= sqrt(3 sum_t Var_t^2), twice that squared without the second end
    margin = 5 * math.sqrt(6 * sum(v * v for v in variances) / n)
    assert margin < 0.05 * sum(variances)
    assert float(baseline_penalty(values, score)) == pytest.approx(sum(variances), abs=margin)
    assert float(baseline_penalty(values, score, again)) == pytest.approx(0, abs=margin)
    off = float(baseline_penalty(values + 0.3, score, again))
    assert off == pytest.approx(3 * 0.09, abs=margin + 0.6 * math.sqrt(9 * max(variances) / n) * 5)


def test_baseline_penalty_sums_over_steps_and_means_over_samples():
    values, score = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 1.0])
    assert float(baseline_penalty(values, score)) == pytest.approx((0.25 + 1 + 0.25 + 4) / 2)
    score.requires_grad_()
    (grad,) = torch.autograd.grad(baseline_penalty(values, score), score)  # f is regularised, not only V
    torch.testing.assert_close(grad, torch.tensor([0.0, 1.0]))


def test_networks_can_be_stacked_over_seeds():
    chain, stack = Tanh(steps=3), [networks(Tanh(steps=3), seed) for seed in (1, 2)]
    x, steps = torch.randn(3, 5, 3, generator=generator(), dtype=DOUBLE), torch.arange(1, 4)
    critics = {k: torch.stack([a.params[k] for a in stack]) for k in stack[0].params}
    values = {k: torch.stack([a.value_params[k] for a in stack]) for k in stack[0].value_params}
    scored = torch.func.vmap(lambda p: evaluate(stack[0].critic, p, x[0]))(critics)
    valued = torch.func.vmap(lambda p: stack[0].value(p, x, steps))(values)
    for i, own in enumerate(stack):
        torch.testing.assert_close(scored[i], own.critic(own.params, x[0]))
        torch.testing.assert_close(valued[i], own.value(own.value_params, x, steps))
        one = ValueBaseline(own.value, own.value_params)(x[0, :, 0], x[1], 2)
        torch.testing.assert_close(-one, valued[i][1])
    assert chain.steps == stack[0].value.steps


# -- runs

ARMS = {
    "SFT (GP)": ShortcutFineTuning("pathwise", "gradient penalty", critic_steps=3),
    "SFT (spectral)": ShortcutFineTuning("pathwise", "spectral", critic_steps=3),
    "SFT-PG (GP)": ShortcutFineTuning("policy", "gradient penalty", critic_steps=3),
    "SFT-PG (B)": ShortcutFineTuning("policy", "baseline", critic_steps=3),
    "SFT-PG (B, printed)": ShortcutFineTuning("policy", "conditional baseline", critic_steps=2),
    "SFT-PG (B), clipped": ShortcutFineTuning("policy", "baseline", 3, generator_steps=3, batches="clipped"),
    "SFT-PG (B), pairs": ShortcutFineTuning("policy", "baseline", 3, generator_steps=2, batches="pairs"),
    "SFT-PG (B), algorithm 1": ShortcutFineTuning("policy", "baseline", 3, generator_steps=2, batches="buffer"),
    "MMD, pathwise": ShortcutFineTuning("pathwise", None, critic_steps=2),
    "MMD, policy": ShortcutFineTuning("policy", None, critic_steps=2),
}


def play(arm, updates, samples=32, seed=3, **options):
    chain, params = Affine(), {"theta": torch.tensor([0.8, -0.8], dtype=DOUBLE)}  # E x_0 = +-1.92, the data's 0
    adversary = networks(chain, seed)
    if arm.startswith("MMD"):
        with_value = {"value": adversary.value, "value_params": adversary.value_params}
        adversary = Adversary(KernelCritic(1.5), **(with_value if arm == "MMD, policy" else {}))
    settings, method = (
        Settings(updates, samples, 0.01, clip=10.0, ema=0.5),
        replace(ARMS[arm], critic_learning_rate=0.02),
    )
    return ShortcutTrainer(chain, params, data(), adversary, method, settings, generator_for, **options)


def shift(result):
    """|E x_0 - E data|; at the start 2.7."""
    return float((2.4 * result.params["theta"] - data().mean(0)).norm())


# The printed regulariser limits no critic and the run keeps oscillating; the other two left out are in the next test.
@pytest.mark.parametrize("arm", [a for a in ARMS if a not in ("SFT-PG (B, printed)", "SFT-PG (B)", "MMD, policy")])
def test_every_arm_moves_a_shifted_start_to_the_data(arm):
    trainer = play(arm, 80)
    start = shift(trainer.result())
    trainer.run()
    assert shift(trainer.result()) < 0.5 * start


@pytest.mark.parametrize("arm", ["MMD, policy", "SFT-PG (B)"])
def test_mmd_falls_and_a_wrong_sign_is_caught(arm, monkeypatch):
    def ratio(most):
        trainer = play(arm, most)
        distances = []
        for updates in (0, most):
            trainer.run(updates)
            params = trainer.result().params
            noise = policy_gradient(2).draw(Affine(), params, 500, generator(11))
            x0 = rollout(Affine(), params, noise).latents[0]
            distances.append(float(KernelCritic(1.5).distance(x0, data(500))))
        return distances[1] / distances[0]

    assert ratio(80) < 0.5
    monkeypatch.setattr(CriticReward, "__call__", lambda self, x0, c: evaluate(self.critic, self.params, x0))
    assert ratio(80) > 1.1


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("arm", list(ARMS))
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(arm):
    whole = play(arm, 4)
    whole.run()
    first = play(arm, 4)
    first.run(2)
    state, file = first.state_dict(), io.BytesIO()
    first.run()  # the state is a copy, which this leaves alone
    torch.save(state, file)
    file.seek(0)
    second = play(arm, 4, seed=8)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.done == 2
    second.run()
    for again in (first.result(), second.result()):
        expected = whole.result()
        assert_equal(again.params, expected.params)
        assert_equal(again.ema, expected.ema)
        assert_equal(again.adversary.params, expected.adversary.params)
        assert_equal(again.adversary.value_params, expected.adversary.value_params)
        assert vars(again.history) == vars(expected.history)
    assert all(len(column) == 4 for column in vars(whole.result().history).values())


@pytest.mark.parametrize("arm", ["SFT (GP)", "SFT-PG (B), clipped", "SFT-PG (B), algorithm 1", "MMD, policy"])
def test_micro_batches_change_nothing_but_rounding(arm):
    results = []
    for micro_batch in (None, 5):
        trainer = play(arm, 2, micro_batch=micro_batch, condition=torch.full((32, 2), 0.1, dtype=DOUBLE))
        trainer.run()
        results.append(trainer.result())
    torch.testing.assert_close(results[0].params, results[1].params, rtol=1e-6, atol=1e-6)


def test_the_callers_tensors_are_left_alone():
    adversary, params = networks(Affine()), {"theta": torch.zeros(2, dtype=DOUBLE)}
    before = {k: p.clone() for k, p in (adversary.params | adversary.value_params | params).items()}
    ShortcutTrainer(Affine(), params, data(), adversary, ARMS["SFT-PG (B)"], Settings(2, 8, 0.1), generator_for).run()
    assert_equal(adversary.params | adversary.value_params | params, before)


# -- bad input


@dataclass(frozen=True)
class Column:
    """A critic that gives (n, 1)."""

    def __call__(self, params, x):
        return (x @ params["w"])[:, None]


def build(chain=None, real=None, adversary=None, method=None, samples=8):
    chain = chain or Affine()
    real = data() if real is None else real
    arguments = (chain, {"theta": torch.zeros(2, dtype=DOUBLE)}, real, adversary or networks(chain))
    return ShortcutTrainer(*arguments, method or ARMS["SFT-PG (B)"], Settings(1, samples, 0.1), generator_for)


BAD = [
    (lambda: ShortcutFineTuning("forward", "baseline"), "gradient must be one of"),
    (lambda: ShortcutFineTuning("policy", "dropout"), "regulariser must be one of"),
    (lambda: ShortcutFineTuning("policy", "baseline", critic_steps=0), "critic_steps must be >= 1, got 0"),
    (lambda: ShortcutFineTuning("policy", "baseline", generator_steps=0), "generator_steps must be >= 1, got 0"),
    (lambda: ShortcutFineTuning("policy", "baseline", strength=-1.0), "strength must be >= 0"),
    (lambda: ShortcutFineTuning("policy", "baseline", strength=math.nan), "strength must be >= 0"),
    (lambda: ShortcutFineTuning("policy", "baseline", batches="old"), "batches must be one of"),
    (lambda: ShortcutFineTuning("pathwise", "baseline", batches="clipped"), "batches must be 'fresh'"),
    (lambda: ShortcutFineTuning("policy", "baseline", ratio_clip=1.0), "ratio_clip must lie in"),
    (lambda: ShortcutFineTuning("policy", "baseline", critic_learning_rate=0.0), "critic_learning_rate must be"),
    (lambda: ShortcutFineTuning("policy", "baseline", critic_betas=(0.9, 1.0)), "critic_betas must be"),
    (lambda: KernelCritic(0.0), "bandwidth must be positive"),
    (lambda: KernelCritic(1.0).distance(data(1), data(5)), "MMD needs >= 2 samples of each, got 1 and 5"),
    (lambda: MLPCritic(0), "dimension must be >= 1"),
    (lambda: MLPValue(2, 0), "steps must be >= 1"),
    (lambda: MLPCritic(2, (4, 0)), "hidden must be widths"),
    (lambda: Adversary(MLPCritic(2)), "params of a trained critic"),
    (lambda: Adversary(KernelCritic(1.0), linear([1.0])), "params of KernelCritic"),
    (lambda: Adversary(KernelCritic(1.0), value=MLPValue(2, 2)), "value_params must be given exactly with value"),
    (lambda: build(real=data(d=3)), r"data must be \(N, \*chain.shape\) with shape \(2,\), got \(400, 3\)"),
    (lambda: build(real=data(7)), "data must be at least a batch of 8, got 7"),
    (lambda: build(real=data() * math.inf), "data must be finite"),
    (lambda: build(adversary=networks(Affine(steps=3))), "value must be for T = 2 steps as the chain is, got 3"),
    (lambda: build(adversary=networks(Affine(shape=(3,)))), "critic must be of the data's dimension 2, got 3"),
    (lambda: build(method=ARMS["SFT (GP)"], adversary=Adversary(Column(), linear([1.0, 1.0]))), r"got \(2, 1\)"),
    (lambda: build(adversary=Adversary(LinearCritic(), linear([1.0, 1.0]))), "value must be a network"),
    (
        lambda: build(adversary=replace(networks(Affine()), value_params=MLPValue(2, 2).initial(torch.Generator()))),
        "params of critic and value must be of one dtype and device, got torch.float32 on cpu, torch.float64 on cpu",
    ),
    (lambda: build(method=ARMS["MMD, policy"]), "regulariser must be given for a trained critic"),
    (lambda: build(adversary=Adversary(KernelCritic(1.0)), method=ARMS["SFT-PG (GP)"]), "regulariser must be None"),
    (
        lambda: build(
            adversary=Adversary(KernelCritic(1.0)), method=ShortcutFineTuning("policy", None, batches="buffer")
        ),
        "batches must not be 'buffer'",
    ),
    (
        lambda: build(adversary=Adversary(LinearCritic(), linear([1.0, 1.0])), method=ARMS["SFT-PG (GP)"], samples=1),
        "samples must be >= 2 without a baseline network",
    ),
    (
        lambda: build(
            adversary=Adversary(KernelCritic(1.0)), method=ShortcutFineTuning("pathwise", None, 1), samples=1
        ),
        "samples must be >= 2 for KernelCritic",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_saved_run_of_another_method_or_shape_is_refused():
    state = play("SFT-PG (B)", 2).state_dict()
    with pytest.raises(ValueError, match=r"method must be that of the saved run, regulariser = 'gradient penalty'"):
        play("SFT-PG (GP)", 2).load_state_dict(state)
    other = build(adversary=networks(Affine(), width=8), method=replace(ARMS["SFT-PG (B)"], critic_learning_rate=0.02))
    with pytest.raises(ValueError, match="critic must have the names and shapes"):
        other.load_state_dict(state)


def test_a_critic_that_blows_up_stops_the_run():
    adversary = networks(Affine())
    adversary = replace(adversary, params={k: p * 1e200 for k, p in adversary.params.items()})
    trainer = build(adversary=adversary)
    with pytest.raises(FloatingPointError, match="of the critic or the baseline is not finite"):
        trainer.run()


@pytest.mark.parametrize("shape", [(2,), (3, 2)])
@pytest.mark.parametrize(
    ("n", "hidden", "value_hidden"), [(5, (16, 8), (4, 7)), (12, (6,), (20, 5, 9)), (1, (3, 3), (2,))]
)
def test_gradients_by_hand_are_those_of_autograd(n, hidden, value_hidden, shape):
    d, g, strength = math.prod(shape), generator(7), 0.3
    critic, value = MLPCritic(d, hidden), MLPValue(d, 4, value_hidden)
    params, value_params = critic.initial(g, DOUBLE), value.initial(g, DOUBLE)
    value_params = {k: p * torch.rand(p.shape, generator=g, dtype=DOUBLE) for k, p in value_params.items()}
    latents = torch.randn(5, n, *shape, generator=g, dtype=DOUBLE)
    real = torch.randn(n, *shape, generator=g, dtype=DOUBLE)
    out = tuple({k: torch.full_like(p, torch.nan) for k, p in each.items()} for each in (params, value_params))
    found = baseline_gradients(critic, params, value, value_params, latents, real, strength, out)

    leaves = [p.requires_grad_() for p in (*params.values(), *value_params.values())]
    generated, of_data = evaluate(critic, params, latents[0]), evaluate(critic, params, real)
    gap = generated.mean() - of_data.mean()
    penalty = baseline_penalty(value(value_params, latents[1:], torch.arange(1, 5)), generated)
    grads = torch.autograd.grad(strength * penalty - gap, leaves)
    torch.testing.assert_close(found, (gap.detach(), penalty.detach()))
    for (name, ours), grad in zip([*out[0].items(), *out[1].items()], grads, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-12, atol=1e-13, msg=name)
