"""The sweep against plain back-propagation, against itself in three readouts, and against hand-written sums."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms import baselines
from algorithms.chain import ParameterNoise, rollout, step_log_prob
from algorithms.credit import Credit
from algorithms.estimators import (
    Estimator,
    antithetic,
    first_order,
    half_order,
    policy_gradient,
    truncated,
    with_baseline,
    zeroth_order,
)
from algorithms.objective import Objective, kl_regularised
from tests.algorithms.nonlinear import Smooth, Tanh, generator, parameters

CHAIN, PARAMS, REWARD = Tanh(), parameters(), Objective(Smooth())
KL = kl_regularised(REWARD, 0.7, parameters(5))


def plain_return(chain, params, objective, noise, condition=None):
    """The return of every sample as one graph through the whole chain."""
    x, costs = chain.initial(noise.initial), 0.0
    for t in range(chain.steps, 0, -1):
        mean = chain.mean(params, x, t, condition)
        cost = objective.cost(chain, mean, x, t, condition)
        costs = costs + (0.0 if cost is None else cost)
        x = mean + chain.std(t) * noise.steps[t - 1]
    return objective.reward(x, condition) - costs


def plain_gradient(chain, params, objective, noise, condition=None):
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    plain_return(chain, leaves, objective, noise, condition).mean().backward()
    return {k: v.grad for k, v in leaves.items()}


def batch_mean(per_sample):
    return {k: v.mean(0) for k, v in per_sample.items()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **({"rtol": 1e-11, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("objective", [REWARD, KL], ids=["reward", "kl"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_first_order_is_plain_back_propagation(objective, conditioned):
    estimator = first_order(CHAIN.steps)
    noise = estimator.draw(CHAIN, PARAMS, 7, generator())
    condition = torch.linspace(-1, 1, 21, dtype=torch.float64).reshape(7, 3) if conditioned else None
    expected = plain_gradient(CHAIN, PARAMS, objective, noise, condition)
    assert_same(batch_mean(estimator.per_sample(CHAIN, PARAMS, objective, noise, condition)), expected)


def test_truncated_cuts_the_graph_after_its_last_step():
    length, estimator = 2, truncated(CHAIN.steps, 2)
    noise = estimator.draw(CHAIN, PARAMS, 7, generator())
    leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    x = rollout(CHAIN, PARAMS, noise).latents[length]
    for t in range(length, 0, -1):
        x = CHAIN.mean(leaves, x, t, None) + CHAIN.std(t) * noise.steps[t - 1]
    REWARD.reward(x, None).mean().backward()
    expected = {k: v.grad for k, v in leaves.items()}
    assert_same(batch_mean(estimator.per_sample(CHAIN, PARAMS, REWARD, noise)), expected)


def test_policy_gradient_is_the_return_times_the_gradient_of_the_summed_log_probability():
    estimator = with_baseline(policy_gradient(CHAIN.steps), baselines.Constant(0.4))
    noise = estimator.draw(CHAIN, PARAMS, 7, generator())
    x = rollout(CHAIN, PARAMS, noise).latents
    leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    log_prob = sum(step_log_prob(CHAIN, leaves, x[t], x[t - 1], t) for t in range(1, CHAIN.steps + 1))
    ((REWARD.reward(x[0], None) - 0.4) * log_prob).mean().backward()
    expected = {k: v.grad for k, v in leaves.items()}
    assert_same(batch_mean(estimator.per_sample(CHAIN, PARAMS, REWARD, noise)), expected)


def test_half_order_pulls_one_noise_back_through_its_block():
    h, estimator = 2, half_order(CHAIN.steps, 2)
    noise = estimator.draw(CHAIN, PARAMS, 7, generator())
    x = rollout(CHAIN, PARAMS, noise).latents
    leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    reward, surrogate = REWARD.reward(x[0], None), 0.0
    for j in range(1, CHAIN.steps + 1, h):
        y = x[min(j + h - 1, CHAIN.steps)]
        for t in range(min(j + h - 1, CHAIN.steps), j - 1, -1):
            mean = CHAIN.mean(leaves, y, t, None)
            y = mean + CHAIN.std(t) * noise.steps[t - 1]
        surrogate = surrogate + (reward[:, None] * noise.steps[j - 1] / CHAIN.std(j) * mean).sum(1)
    surrogate.mean().backward()
    expected = {k: v.grad for k, v in leaves.items()}
    assert_same(batch_mean(estimator.per_sample(CHAIN, PARAMS, REWARD, noise)), expected)


def test_zeroth_order_is_the_return_of_the_perturbed_chain_times_the_noise():
    estimator = with_baseline(zeroth_order(CHAIN.steps, std=0.3), baselines.Constant(-0.2))
    noise = estimator.draw(CHAIN, PARAMS, 4, generator())
    expected = {k: torch.zeros_like(v) for k, v in PARAMS.items()}
    for i in range(4):
        x = CHAIN.initial(noise.initial[i : i + 1])
        for t in range(CHAIN.steps, 0, -1):
            moved = {k: v + 0.3 * noise.parameters[k][t - 1, i] for k, v in PARAMS.items()}
            x = CHAIN.mean(moved, x, t, None) + CHAIN.std(t) * noise.steps[t - 1, i : i + 1]
        for k in expected:
            expected[k] += (REWARD.reward(x, None)[0] + 0.2) * noise.parameters[k][:, i].sum(0) / 0.3 / 4
    assert_same(batch_mean(estimator.per_sample(CHAIN, PARAMS, REWARD, noise)), expected)


def random_estimator(seed, outcomes=2):
    """A law over full random credit matrices: every column, signed weights."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(outcomes, CHAIN.steps, CHAIN.steps + 2))
    w[:, :, 1:-1] *= np.tri(CHAIN.steps)
    w[0, 1, -1] = 0.0  # one step of one outcome stays unperturbed
    return Estimator("random", Credit(w, np.full(outcomes, 1 / outcomes)), ParameterNoise(0.2))


@given(seed=st.integers(0, 2**32 - 1), kl=st.booleans(), flips=st.sampled_from([(), ("parameters",), ("chain",)]))
def test_three_readouts_agree(seed, kl, flips):
    objective, estimator = (KL if kl else REWARD), random_estimator(seed)
    for flip in flips:
        estimator = antithetic(estimator, flip)
    estimator = with_baseline(estimator, baselines.LeaveOneOut())
    noise = estimator.draw(CHAIN, PARAMS, 5, generator(seed))
    direction = parameters(seed % 1000 + 7)
    each = estimator.per_sample(CHAIN, PARAMS, objective, noise)
    along = sum((each[k] * direction[k]).flatten(1).sum(1) for k in each)
    torch.testing.assert_close(estimator.directional(CHAIN, PARAMS, objective, noise, direction), along)
    leaves = {k: v.clone().requires_grad_() for k, v in PARAMS.items()}
    estimator.accumulate(CHAIN, leaves, objective, noise)
    estimator.accumulate(CHAIN, leaves, objective, noise)
    assert_same({k: v.grad / 2 for k, v in leaves.items()}, batch_mean(each))


@given(seed=st.integers(0, 2**32 - 1), kl=st.booleans())
def test_the_sweep_is_linear_in_the_matrix(seed, kl):
    """Row by row and column by column, with common noise: sum of W[t,k] h[t,k]."""
    objective, estimator = (KL if kl else REWARD), random_estimator(seed, outcomes=1)
    steps, w = CHAIN.steps, estimator.credit.matrices[0].copy()
    w[:, -1] = 0  # the parameter-noise column changes the roll-out, so it is not linear in its mask
    estimator = Estimator("part", Credit.of(w))
    noise = estimator.draw(CHAIN, PARAMS, 3, generator(seed))
    total = {k: torch.zeros(3, *v.shape, dtype=v.dtype) for k, v in PARAMS.items()}
    for t, k in itertools.product(range(steps), range(steps + 1)):
        if w[t, k]:
            unit = np.zeros_like(w)
            unit[t, k] = 1
            part = Estimator("unit", Credit.of(unit)).per_sample(CHAIN, PARAMS, objective, noise)
            for name in total:
                total[name] += w[t, k] * part[name]
    assert_same(estimator.per_sample(CHAIN, PARAMS, objective, noise), total, atol=1e-10)


def test_results_do_not_depend_on_the_batch_split():
    estimator = random_estimator(3)
    noise = estimator.draw(CHAIN, PARAMS, 6, generator())
    whole = estimator.per_sample(CHAIN, PARAMS, KL, noise)
    for part in (slice(0, 2), slice(2, 6)):
        piece = type(noise)(
            noise.initial[part],
            noise.steps[:, part],
            noise.outcome[part],
            {k: xi[:, part] for k, xi in noise.parameters.items()},
        )
        assert_same(estimator.per_sample(CHAIN, PARAMS, KL, piece), {k: v[part] for k, v in whole.items()}, rtol=1e-12)


@pytest.mark.parametrize("estimator", [policy_gradient(5), half_order(5, 2)], ids=lambda e: e.name)
def test_eta_zero_is_refused_by_score_estimators(estimator):
    frozen = Tanh(eta=0.0)
    noise = estimator.draw(frozen, PARAMS, 2, generator())
    with pytest.raises(ValueError, match=r"std = 0 \(eta = 0\?\)"):
        estimator.per_sample(frozen, PARAMS, REWARD, noise)
    first = first_order(5)  # which needs no score, so eta = 0 is fine for it
    assert_same(
        batch_mean(first.per_sample(frozen, PARAMS, REWARD, noise)), plain_gradient(frozen, PARAMS, REWARD, noise)
    )


def test_column_zero_refuses_a_black_box_reward():
    estimator, objective = first_order(5), Objective(Smooth(differentiable=False))
    noise = estimator.draw(CHAIN, PARAMS, 2, generator())
    with pytest.raises(ValueError, match="differentiable"):
        estimator.per_sample(CHAIN, PARAMS, objective, noise)


def test_a_matrix_for_another_number_of_steps_is_refused():
    noise = first_order(5).draw(CHAIN, PARAMS, 2, generator())
    with pytest.raises(ValueError, match="T = 4 steps, the chain has 5"):
        first_order(4).per_sample(CHAIN, PARAMS, REWARD, noise)


def test_learned_baseline_predicts_the_return_and_is_used_per_step():
    pilot_noise = first_order(5).draw(CHAIN, PARAMS, 4000, generator(3))
    pilot = rollout(CHAIN, PARAMS, pilot_noise)
    returns = REWARD.reward(pilot.latents[0], None)
    value = baselines.Learned.fit(pilot.latents, returns, generator(4))
    fresh = rollout(CHAIN, PARAMS, first_order(5).draw(CHAIN, PARAMS, 4000, generator(5)))
    fresh_returns = REWARD.reward(fresh.latents[0], None)
    residual = [float((fresh_returns - value(fresh_returns, fresh.latents[k], k)).var()) for k in range(1, 6)]
    # The closer to the end, the more of the return the state tells: the residual variance grows with k.
    assert residual[0] < residual[2] < residual[4] < float(fresh_returns.var())
