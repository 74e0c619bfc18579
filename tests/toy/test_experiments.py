"""Blocks of estimates: the same whenever they are asked for, different otherwise, and what they say they are."""

import numpy as np
import pytest
import torch

from algorithms.chain import rollout
from algorithms.estimators import Estimator, antithetic, first_order, half_order, truncated
from algorithms.objective import Objective, kl_regularised
from theory import schedules
from theory.mixture import GaussianMixture
from toy.experiments import directional_differences, generator, gradients, mapped, statistics
from toy.mixture_chain import MixtureChain
from toy.rewards import Bump, Sine
from verdicts.streams import Stream

CHAIN = MixtureChain.of(
    GaussianMixture([0.3, 0.7], [[-1.0, 0.2], [0.8, -0.4]], [0.1 * np.eye(2), 0.2 * np.eye(2)]),
    schedules.linear(4, 0.1, 0.5),
)
PARAMS = {
    "gain": torch.tensor([[0.3, -0.2]], dtype=torch.float64)[0],
    "bias": torch.tensor([0.1, 0.4], dtype=torch.float64),
}
SINE, BUMP = Objective(Sine(2.0)), Objective(Bump(0.5, 1.0))
ROOT = Stream(1).child("tests", "experiments")

SAMPLERS = {
    "gradients": gradients(CHAIN, PARAMS, SINE, half_order(4, 2), size=24),
    "directional": directional_differences(
        CHAIN, PARAMS, [(SINE, half_order(4, 2)), (BUMP, truncated(4, 2))], first_order(4), PARAMS, size=24
    ),
    "statistics": statistics(CHAIN, PARAMS, first_order(4), lambda x: x**2, size=24),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_block_is_the_same_whenever_asked_and_no_other(name: str) -> None:
    sampler = SAMPLERS[name]
    block = sampler(ROOT)
    third, first = block(3), block(0)
    np.testing.assert_array_equal(third, sampler(ROOT)(3))
    np.testing.assert_array_equal(first, block(0))
    assert not np.isin(third, first).any()
    assert not np.isin(third, sampler(ROOT.child("other"))(3)).any()
    assert len(np.unique(third, axis=0)) == 24


def test_gradients_are_the_flattened_parameters_in_their_order() -> None:
    estimator = half_order(4, 2)
    noise = estimator.draw(CHAIN, PARAMS, 24, generator(ROOT, 2))
    each = estimator.per_sample(CHAIN, PARAMS, SINE, noise)
    np.testing.assert_array_equal(SAMPLERS["gradients"](ROOT)(2), torch.cat([each["gain"], each["bias"]], 1))


def test_groups_are_averages_of_consecutive_samples() -> None:
    single = SAMPLERS["gradients"](ROOT)(1)
    grouped = gradients(CHAIN, PARAMS, SINE, half_order(4, 2), size=24, group=3)(ROOT)(1)
    np.testing.assert_allclose(grouped, [single[i : i + 3].mean(0) for i in range(0, 24, 3)], rtol=1e-13, atol=1e-15)


def test_directional_differences_are_inner_products_of_per_sample_gradients() -> None:
    noise = first_order(4).draw(CHAIN, PARAMS, 24, generator(ROOT, 0))

    def along(objective: Objective, estimator: object) -> np.ndarray:
        each = estimator.per_sample(CHAIN, PARAMS, objective, noise)
        return sum((each[name] * PARAMS[name]).sum(1) for name in PARAMS).numpy()

    pairs = [(SINE, half_order(4, 2)), (BUMP, truncated(4, 2))]
    expected = np.stack([along(o, e) - along(o, first_order(4)) for o, e in pairs], 1)
    np.testing.assert_allclose(SAMPLERS["directional"](ROOT)(0), expected, rtol=1e-10, atol=1e-12)


def test_directional_differences_do_not_take_one_roll_out_for_another() -> None:
    """An antithetic copy visits the same steps at other states, a running cost has derivatives of its own."""
    charged = kl_regularised(SINE, 0.4, {name: 0.5 * p for name, p in PARAMS.items()})
    pairs = [(SINE, antithetic(half_order(4, 2), "chain")), (charged, first_order(4)), (SINE, first_order(4))]
    found = directional_differences(CHAIN, PARAMS, pairs, truncated(4, 3), PARAMS, size=24)(ROOT)(0)
    noise = truncated(4, 3).draw(CHAIN, PARAMS, 24, generator(ROOT, 0))

    def along(objective: Objective, estimator: Estimator) -> torch.Tensor:
        return estimator.directional(CHAIN, PARAMS, objective, noise, PARAMS)

    expected = torch.stack([along(o, e) - along(o, truncated(4, 3)) for o, e in pairs], 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert np.abs(expected).min(0).max() > 0


def test_statistics_are_of_the_output() -> None:
    noise = first_order(4).draw(CHAIN, PARAMS, 24, generator(ROOT, 0))
    x0 = rollout(CHAIN, PARAMS, noise).latents[0]
    np.testing.assert_array_equal(SAMPLERS["statistics"](ROOT)(0), x0**2)


def test_mapped_blocks_are_the_images_of_the_same_blocks() -> None:
    doubled = mapped(SAMPLERS["statistics"], lambda block: 2 * block[:, :1])(ROOT)
    np.testing.assert_array_equal(doubled(5), 2 * SAMPLERS["statistics"](ROOT)(5)[:, :1])
