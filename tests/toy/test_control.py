"""PI-FT's controlled chain against the theory's schedule, scores and Gaussian laws, and its rewards."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from algorithms import estimators as named
from algorithms.chain import rollout
from algorithms.objective import KLToReference, Objective
from theory.control import ControlSchedule
from theory.mixture import GaussianMixture
from toy.control import AffineScore, ControlledChain, LinearControl, MixtureScore, MLPControl
from toy.rewards import Indicator, LogCosh, Softplus, Sum, Tanh
from verdicts.streams import Stream

STREAM = Stream(3).child("tests", "control")
# sigma^2 is not 1 - alpha, so that the two cannot be exchanged unnoticed.
SCHEDULE = ControlSchedule([0.7, 0.8, 0.85, 0.9], [0.6, 0.5, 0.3, 0.25], 0.4)
T = SCHEDULE.steps
LAW = GaussianMixture(
    [0.2, 0.5, 0.3], [[-1.0, 0.4], [0.8, -0.3], [0.1, 1.2]], [0.1 * np.eye(2), [[0.5, 0.2], [0.2, 0.3]], np.eye(2)]
)
ONE = GaussianMixture([1.0], [[0.7, -0.2]], [[[0.5, 0.2], [0.2, 0.3]]])
POINTS = np.array([[0.0, 0.0], [1.5, -2.0], [-0.9, 0.5], [6.0, 5.0]])
X = torch.tensor(POINTS)
CONTROLS = {
    "affine": LinearControl(T, 2),
    "tanh": LinearControl(T, 2, "tanh"),
    "MLP": MLPControl(T, 2, 5, STREAM),
}

every_control = pytest.mark.parametrize("name", list(CONTROLS))


def drawn(control: LinearControl | MLPControl) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in control.parameters().items()
    }


@pytest.mark.parametrize("i", range(T))
def test_score_is_that_of_the_mixture_noised_to_the_level_of_the_step(i: int) -> None:
    expected = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[i]))
    np.testing.assert_allclose(MixtureScore.of(LAW, SCHEDULE)(X, i), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("i", range(T))
def test_score_of_one_gaussian_is_affine(i: int) -> None:
    expected = ONE.noised_score(POINTS, float(SCHEDULE.alpha_bar[i]))
    np.testing.assert_allclose(AffineScore.gaussian(ONE, SCHEDULE)(X, i), expected, rtol=1e-12, atol=1e-13)


@every_control
@pytest.mark.parametrize("t", [1, 3, T])
def test_without_control_it_is_the_pretrained_model(name: str, t: int) -> None:
    """Step t of the chain is the schedule's step T - t, whose level is the product of the alphas from there on."""
    chain, i = ControlledChain.of(SCHEDULE, LAW, CONTROLS[name]), T - t
    score = LAW.noised_score(POINTS, float(np.prod(SCHEDULE.alpha[i:])))
    expected = SCHEDULE.mean(i, POINTS, score)
    np.testing.assert_allclose(chain.mean(chain.parameters(), X, t, None), expected, rtol=1e-12)
    assert chain.std(t) == SCHEDULE.sigma[i]
    assert (chain.steps, chain.shape) == (T, (2,))


@pytest.mark.parametrize("t", [1, 2, T])
def test_linear_control_adds_its_own_matrix_of_the_features(t: int) -> None:
    chain, i = ControlledChain.of(SCHEDULE, LAW, CONTROLS["tanh"]), T - t
    params = drawn(CONTROLS["tanh"])
    phi = np.concatenate([POINTS, np.tanh(POINTS), np.ones((4, 1))], 1)
    control = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[i])) + phi @ params["K"][i].numpy().T
    np.testing.assert_allclose(chain.mean(params, X, t, None), SCHEDULE.mean(i, POINTS, control), rtol=1e-12)


@pytest.mark.parametrize("t", [1, T])
def test_mlp_control_by_hand(t: int) -> None:
    chain, i = ControlledChain.of(SCHEDULE, LAW, CONTROLS["MLP"]), T - t
    params = drawn(CONTROLS["MLP"])
    w1, b1, w2 = (params[name].numpy() for name in ("w1", "b1", "w2"))
    seen = np.concatenate([POINTS, np.full((4, 1), i / T)], 1)
    control = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[i])) + np.tanh(seen @ w1 + b1) @ w2
    np.testing.assert_allclose(chain.mean(params, X, t, None), SCHEDULE.mean(i, POINTS, control), rtol=1e-12)


@every_control
def test_kl_to_the_pretrained_step_is_lemma_2_5(name: str) -> None:
    chain, params = ControlledChain.of(SCHEDULE, LAW, CONTROLS[name]), drawn(CONTROLS[name])
    charge = KLToReference(1.0, chain.parameters())
    for t in range(1, T + 1):
        i = T - t
        score = LAW.noised_score(POINTS, float(SCHEDULE.alpha_bar[i]))
        expected = SCHEDULE.step_kl(i, score + chain.control(params, X, i).numpy(), score)
        kl = charge(chain, chain.mean(params, X, t, None), X, t, None)
        assert kl.min() > 0
        np.testing.assert_allclose(kl, expected, rtol=1e-9)


@every_control
def test_parameters_are_drawn_afresh_and_every_one_but_the_output_has_no_effect_at_first(name: str) -> None:
    chain = ControlledChain.of(SCHEDULE, LAW, CONTROLS[name])
    changed = chain.parameters()
    for value in changed.values():
        value += 1
    fresh = chain.parameters()
    assert not chain.control(fresh, X, 0).any()
    assert chain.control(changed, X, 0).all()
    for key, value in chain.parameters().items():
        assert torch.equal(value, fresh[key])


@every_control
def test_per_sample_gradients_sum_to_the_batch_gradient(name: str) -> None:
    """The chain may be vectorised over its samples, as estimators do."""
    chain = ControlledChain.of(SCHEDULE, LAW, CONTROLS[name])
    params = {key: value.requires_grad_() for key, value in drawn(CONTROLS[name]).items()}
    objective = Objective(Tanh((0.3, 0.9)), (KLToReference(0.4, chain.parameters()),))
    estimator = named.first_order(T)
    noise = estimator.draw(chain, params, 6, torch.Generator().manual_seed(2))
    each = estimator.per_sample(chain, params, objective, noise)
    estimator.accumulate(chain, params, objective, noise)
    for key, p in params.items():
        assert p.grad is not None
        assert p.grad.any()
        torch.testing.assert_close(each[key].mean(0), p.grad, rtol=1e-10, atol=1e-12)


def test_sampled_moments_of_a_gaussian_chain_are_the_exact_ones() -> None:
    """With one Gaussian and affine features every step is affine: mean and covariance of Y_T in closed form."""
    chain, params = ControlledChain.of(SCHEDULE, ONE), drawn(LinearControl(T, 2))
    mean, cov = np.zeros(2), np.eye(2)
    for i, (alpha, sigma) in enumerate(zip(SCHEDULE.alpha, SCHEDULE.sigma, strict=True)):
        level = np.prod(SCHEDULE.alpha[i:])
        precision = np.linalg.inv(level * ONE.covs[0] + (1 - level) * np.eye(2))
        K = params["K"][i].numpy()
        slope = (np.eye(2) + (1 - alpha) * (K[:, :2] - precision)) / math.sqrt(alpha)
        offset = (1 - alpha) * (K[:, 2] + precision @ ONE.means[0] * math.sqrt(level)) / math.sqrt(alpha)
        mean, cov = slope @ mean + offset, slope @ cov @ slope.T + sigma**2 * np.eye(2)
    n = 1 << 17
    noise = named.first_order(T).draw(chain, params, n, torch.Generator().manual_seed(STREAM.integer()))
    x0 = rollout(chain, params, noise).latents[0].numpy()
    off = np.linalg.solve(np.linalg.cholesky(cov), (x0 - mean).T)  # standard normal
    assert np.abs(off.mean(1)).max() < 5 / math.sqrt(n)
    assert np.abs(off @ off.T / n - np.eye(2)).max() < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("reward", "value"),
    [
        (LogCosh(weight=2.0), lambda x: 2 * np.log(np.cosh(x[:, 0]))),
        (LogCosh((1.0, -0.5), 0.6), lambda x: 0.6 * np.log(np.cosh(x[:, 0] - 0.5 * x[:, 1]))),
        (Tanh(), lambda x: np.tanh(x[:, 0])),
        (Tanh((0.3, 0.9), -0.7), lambda x: -0.7 * np.tanh(0.3 * x[:, 0] + 0.9 * x[:, 1])),
        (Softplus(4.0, 0.2), lambda x: np.log1p(np.exp(4 * (x[:, 0] - 0.2))) / 4),
        (Softplus(2.0, -0.1, (0.5, 1.0), 3.0), lambda x: 1.5 * np.log1p(np.exp(2 * (x[:, 0] / 2 + x[:, 1] + 0.1)))),
        (Sum((LogCosh((1.0, -0.5)), Tanh((3, 9)))), lambda x: np.log(np.cosh(x @ [1, -0.5])) + np.tanh(x @ [3, 9])),
    ],
    ids=["log cosh", "log cosh 2-D", "tanh", "tanh 2-D", "softplus", "softplus 2-D", "sum"],
)  # fmt: skip
def test_smooth_rewards(reward: Sum, value: Callable[[np.ndarray], np.ndarray]) -> None:
    directions = reward.terms if isinstance(reward, Sum) else (reward,)
    x = X[:, : len(directions[0].direction)].contiguous()
    np.testing.assert_allclose(reward(x, None), value(x.numpy()), rtol=1e-13)
    assert reward.differentiable
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: reward(y, None), leaf)
    assert torch.autograd.gradgradcheck(lambda y: reward(y, None), leaf)  # log cosh is smooth at 0 too


BOUNDS = [
    (LogCosh((3.0,), -0.5), 1.5, 4.5),
    (Tanh((2.0,), 0.5), 1.0, 0.5 * 4 * 4 / 3**1.5),
    (Softplus(8.0, 0.3, (2.0,), 0.5), 1.0, 0.5 * 4 * 8 / 4),
]


@pytest.mark.parametrize(("reward", "slope", "bend"), BOUNDS, ids=["log cosh", "tanh", "softplus"])
def test_documented_bounds_on_gradient_and_hessian_are_sharp(
    reward: LogCosh | Tanh | Softplus, slope: float, bend: float
) -> None:
    x = torch.linspace(-30, 30, 240_001, dtype=torch.float64)[:, None].requires_grad_()
    (first,) = torch.autograd.grad(reward(x, None).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for found, bound in ((first, slope), (second, bend)):
        assert bound * 0.9999 < float(found.detach().abs().max()) <= bound * (1 + 1e-12)


def test_rewards_do_not_overflow_far_out() -> None:
    far = torch.tensor([[-1e4], [1e4]], dtype=torch.float64)
    np.testing.assert_allclose(LogCosh()(far, None), 1e4 - math.log(2), rtol=1e-14)
    np.testing.assert_allclose(Softplus(2.0)(far, None), [0, 1e4], atol=1e-12)


def test_a_sum_with_a_black_box_is_one() -> None:
    assert not Sum((Tanh(), Indicator(0.0))).differentiable


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearControl(2, 1, "cubic"), r"^features must be 'affine' or 'tanh', got 'cubic'$"),
        (lambda: AffineScore.of(np.zeros((3, 2, 2)), np.zeros((2, 2))), r"^slope, offset have shapes \(3, 2, 2\)"),
        (lambda: AffineScore.gaussian(LAW, SCHEDULE), r"^law has 3 components: must have one"),
        (lambda: ControlledChain.of(SCHEDULE, AffineScore.of([[[1.0]]], [[0.0]])), r"^law has scores of 1 steps"),
        (lambda: Softplus(0.0), r"^sharpness must be > 0, got 0.0$"),
        (lambda: Sum(()), r"^terms must be at least one reward, got none$"),
    ],
)
def test_bad_input_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as fault:
        call()
    assert "\n" not in str(fault.value)
