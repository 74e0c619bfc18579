"""The loop: resumed runs, hand-written Adam, averages, conditions, and its errors."""

import io
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.baselines import LeaveOneOut
from algorithms.chain import rollout
from algorithms.division import Division
from algorithms.estimators import antithetic, first_order, policy_gradient, with_baseline, zeroth_order
from algorithms.losses import PPO
from algorithms.objective import Objective, kl_regularised
from algorithms.training import FromEstimator, Settings, Trainer, fine_tune
from tests.algorithms.nonlinear import Smooth, Tanh, parameters

CHAIN, PARAMS, REWARD = Tanh(steps=3), parameters(), Objective(Smooth())
KL = kl_regularised(REWARD, 0.2, parameters(5))
SETTINGS = Settings(updates=5, samples=6, learning_rate=0.03, weight_decay=0.1, clip=9.0, ema=0.7)
METHODS = {
    "first order": FromEstimator(first_order(3)),
    "baseline": FromEstimator(with_baseline(policy_gradient(3), LeaveOneOut()), Division(micro_batch=4)),
    "zeroth order": FromEstimator(antithetic(zeroth_order(3, 0.1), "parameters")),
    "ppo": PPO(0.1, epochs=2, minibatches=2),
}


def generator_for(update):
    return torch.Generator().manual_seed(1000 + update)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@given(name=st.sampled_from(sorted(METHODS)), cut=st.integers(0, 5), ema=st.sampled_from([None, 0.7]))
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(name, cut, ema):
    settings = replace(SETTINGS, ema=ema)
    whole = fine_tune(CHAIN, PARAMS, KL, METHODS[name], settings, generator_for)

    first = Trainer(CHAIN, PARAMS, KL, METHODS[name], replace(settings, updates=max(cut, 1)), generator_for)
    first.run(cut)
    state, file = first.state_dict(), io.BytesIO()
    first.settings = settings
    first.run()  # the state is a copy, which this leaves alone
    assert_equal(first.result().params, whole.params)
    torch.save(state, file)
    file.seek(0)
    second = Trainer(CHAIN, parameters(8), KL, METHODS[name], settings, generator_for)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.done == cut
    second.run()
    again = second.result()
    assert_equal(again.params, whole.params)
    assert vars(again.history) == vars(whole.history)
    if ema is None:
        assert again.ema is None
        assert whole.ema is None
    else:
        assert_equal(again.ema, whole.ema)


def test_the_loop_is_adam_by_hand():
    """Two moments with bias correction, decoupled decay, global clipping, and the average from the initial values."""
    estimator = first_order(3)
    result = fine_tune(CHAIN, PARAMS, KL, FromEstimator(estimator), SETTINGS, generator_for)
    flat = torch.cat([p.flatten() for p in PARAMS.values()])
    average, m, v, norms = flat.clone(), torch.zeros_like(flat), torch.zeros_like(flat), []
    for u in range(1, 6):
        at = dict(zip(PARAMS, (flat[:9].reshape(3, 3), flat[9:]), strict=True))
        grad = estimator.per_sample(CHAIN, at, KL, estimator.draw(CHAIN, at, 6, generator_for(u)))
        g = torch.cat([value.mean(0).flatten() for value in grad.values()])
        norms.append(float(g.norm()))
        g = g * min(1.0, 9.0 / norms[-1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**u) / ((v / (1 - 0.999**u)).sqrt() + 1e-8)
        flat = flat * (1 - 0.03 * 0.1) + 0.03 * step
        average = 0.7 * average + 0.3 * flat
    assert min(norms) < 9.0 < max(norms)
    torch.testing.assert_close(torch.cat([p.flatten() for p in result.params.values()]), flat)
    torch.testing.assert_close(torch.cat([p.flatten() for p in result.ema.values()]), average)
    assert result.history.gradient_norm == pytest.approx(norms)


def test_history_notes_returns_and_counts_roll_outs():
    estimator = with_baseline(policy_gradient(3), LeaveOneOut())
    result = fine_tune(CHAIN, PARAMS, KL, FromEstimator(estimator), SETTINGS, generator_for)
    assert result.history.samples == [6, 12, 18, 24, 30]
    noise = estimator.draw(CHAIN, PARAMS, 6, generator_for(1))
    roll = rollout(CHAIN, PARAMS, noise, cost=lambda mean, x, t: KL.cost(CHAIN, mean, x, t, None))
    returns = KL.reward(roll.latents[0], None) - roll.costs.sum(0)
    assert result.history.mean_return[0] == pytest.approx(float(returns.mean()))

    assert fine_tune(CHAIN, PARAMS, KL, METHODS["ppo"], SETTINGS, generator_for).history.samples == [6, 12, 18, 24, 30]
    both = fine_tune(CHAIN, PARAMS, KL, METHODS["zeroth order"], SETTINGS, generator_for)
    assert both.history.samples == [12, 24, 36, 48, 60]  # each with its antithetic copy


def test_each_update_gets_its_own_condition():
    asked = []

    def condition(update):
        asked.append(update)
        return torch.full((6, 3), float(update), dtype=torch.float64)

    changing = fine_tune(CHAIN, PARAMS, REWARD, METHODS["first order"], SETTINGS, generator_for, condition)
    assert asked == [1, 2, 3, 4, 5]
    fixed = fine_tune(CHAIN, PARAMS, REWARD, METHODS["first order"], SETTINGS, generator_for, condition(1))
    assert changing.history.mean_return[0] == fixed.history.mean_return[0]
    assert changing.history.mean_return[1] != fixed.history.mean_return[1]


def test_the_return_rises_and_the_given_parameters_stay():
    before = {name: p.clone() for name, p in PARAMS.items()}
    settings = Settings(updates=40, samples=64, learning_rate=0.02)
    result = fine_tune(CHAIN, PARAMS, REWARD, METHODS["first order"], settings, generator_for)
    assert_equal(PARAMS, before)
    assert all(p.grad is None and not p.requires_grad for p in [*PARAMS.values(), *result.params.values()])
    assert result.history.mean_return[-1] > result.history.mean_return[0] + 1
    assert result.ema is None


def test_the_callback_sees_every_update_and_cannot_change_the_run():
    seen = []

    def callback(update, params, ema):
        seen.append((update, params["b"].clone(), ema["b"].clone()))
        params["b"].fill_(float("nan"))
        ema["b"].fill_(float("nan"))

    result = fine_tune(CHAIN, PARAMS, REWARD, METHODS["ppo"], SETTINGS, generator_for, callback=callback)
    assert [update for update, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert torch.equal(seen[0][1], PARAMS["b"])
    assert torch.equal(seen[0][2], PARAMS["b"])
    assert torch.equal(seen[-1][1], result.params["b"])
    assert torch.equal(seen[-1][2], result.ema["b"])


@dataclass(frozen=True)
class Gives:
    """A method whose gradient in b is `value` from the second update on; it has no gradient in W."""

    value: float

    def updates(self, chain, params, objective, samples, generator, condition):
        second = generator.initial_seed() >= 1002
        params["b"].grad = torch.full_like(params["b"], self.value if second else 1.0)
        yield torch.zeros(samples)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(value):
    trainer = Trainer(CHAIN, PARAMS, REWARD, Gives(value), SETTINGS, generator_for)
    with pytest.raises(FloatingPointError, match="gradient of update 2 is not finite, in b"):
        trainer.run()
    assert trainer.done == 1
    assert all(bool(p.isfinite().all()) for p in trainer.result().params.values())


def test_a_method_without_a_gradient_is_refused():
    class Idle:
        def updates(self, chain, params, objective, samples, generator, condition):
            yield from ()

    with pytest.raises(ValueError, match="method Idle gave no gradient in update 1"):
        fine_tune(CHAIN, PARAMS, REWARD, Idle(), SETTINGS, generator_for)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"updates": 0}, "updates must be >= 1, got 0"),
        ({"samples": 0}, "samples must be >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers in"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
        ({"clip": 0.0}, "clip must be > 0 or None, got 0.0"),
        ({"ema": 1.0}, "ema must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="params must hold at least one tensor"):
        Trainer(CHAIN, {}, REWARD, METHODS["ppo"], SETTINGS, generator_for)
    with pytest.raises(ValueError, match="'k' is torch.int64"):
        Trainer(CHAIN, {"k": torch.ones(2, dtype=torch.long)}, REWARD, METHODS["ppo"], SETTINGS, generator_for)


def test_a_state_of_another_run_is_refused():
    state = Trainer(CHAIN, PARAMS, REWARD, METHODS["ppo"], SETTINGS, generator_for).state_dict()
    other = Trainer(CHAIN, PARAMS, REWARD, METHODS["ppo"], replace(SETTINGS, learning_rate=0.1), generator_for)
    with pytest.raises(ValueError, match=r"learning_rate = 0\.1 was 0\.03"):
        other.load_state_dict(state)
    smaller = Trainer(CHAIN, {"W": PARAMS["W"]}, REWARD, METHODS["ppo"], SETTINGS, generator_for)
    with pytest.raises(ValueError, match="names and shapes of the saved run"):
        smaller.load_state_dict(state)
