"""Forward paths and their log-likelihood ratio, against SciPy's densities and a case without any divergence."""

import math

import numpy as np
import torch
from scipy.stats import norm

from theory import schedules
from theory.chains import LinearGaussianChain
from theory.mixture import GaussianMixture
from toy.experiments import generator
from toy.linear_gaussian import LinearGaussian
from toy.mixture_chain import MixtureChain
from toy.paths import forward_path, log_normal, path_log_ratio
from verdicts.streams import Stream

SCHEDULE = schedules.linear(3, 0.1, 0.4)
STREAM = Stream(5).child("tests", "paths")


def test_log_normal_is_the_summed_log_density() -> None:
    x, mean = np.array([[0.3, -1.0], [2.0, 0.5]]), np.array([0.1, 0.4])
    expected = norm.logpdf(x, mean, math.sqrt(0.7)).sum(1)
    np.testing.assert_allclose(log_normal(torch.tensor(x), torch.tensor(mean), 0.7), expected, rtol=1e-14)


def test_forward_path_noises_step_by_step() -> None:
    x0 = torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)
    path = forward_path(x0, SCHEDULE, torch.Generator().manual_seed(3))
    source = torch.Generator().manual_seed(3)
    assert len(path) == SCHEDULE.steps + 1
    assert torch.equal(path[0], x0)
    for t, beta in enumerate(SCHEDULE.beta, start=1):
        eps = torch.randn(2, 2, generator=source, dtype=torch.float64)
        expected = math.sqrt(1 - beta) * path[t - 1] + math.sqrt(beta) * eps
        np.testing.assert_allclose(path[t], expected, rtol=1e-15)


def test_ratio_vanishes_on_every_path_where_the_sampler_is_the_reversal() -> None:
    """Data N(0, 1) stays N(0, 1), and its forward chain is reversible: the same step backwards."""
    steps = SCHEDULE.steps
    shrink = np.sqrt(1 - SCHEDULE.beta)[:, None, None]
    exact = LinearGaussianChain(
        shrink, np.zeros((steps, 1, 1)), np.zeros((steps, 1)), np.sqrt(SCHEDULE.beta), [0.0], [0.0], [[1.0]]
    )
    params = {"theta": torch.zeros(1, dtype=torch.float64)}
    block = path_log_ratio(LinearGaussian.of(exact), params, SCHEDULE, 0.0, 1.0, size=50)(STREAM)
    np.testing.assert_allclose(block(0), np.zeros((50, 1)), atol=1e-12)


def test_ratio_is_the_difference_of_the_paths_log_densities() -> None:
    mean, variance, size = 0.8, 0.4, 20
    chain = MixtureChain.of(GaussianMixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.2]], [[0.3]]]), SCHEDULE)
    params = {"bias": torch.tensor([0.2], dtype=torch.float64), "gain": torch.tensor([-0.1], dtype=torch.float64)}
    source = generator(STREAM, 4)  # the same draws once more
    x0 = mean + math.sqrt(variance) * torch.randn(size, 1, generator=source, dtype=torch.float64)
    path = [x[:, 0].numpy() for x in forward_path(x0, SCHEDULE, source)]
    q = norm.logpdf(path[0], mean, math.sqrt(variance))
    p = norm.logpdf(path[-1])
    for t, beta in enumerate(SCHEDULE.beta, start=1):
        q = q + norm.logpdf(path[t], math.sqrt(1 - beta) * path[t - 1], math.sqrt(beta))
        step = chain.mean(params, torch.tensor(path[t])[:, None], t, None)[:, 0].numpy()
        p = p + norm.logpdf(path[t - 1], step, math.sqrt(beta))
    found = path_log_ratio(chain, params, SCHEDULE, mean, variance, size)(STREAM)(4)
    np.testing.assert_allclose(found[:, 0], q - p, atol=1e-12)
