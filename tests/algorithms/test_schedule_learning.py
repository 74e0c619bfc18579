"""The two levels of schedule learning: values and gradients for affine predictors against closed forms of theory."""

import math

import numpy as np
import pytest
import torch

from algorithms.schedule_learning import Quality, ScoreMatching, ddim
from algorithms.schedules import Family
from theory.ddpm import ddim_law, minimal_score_matching_loss
from theory.gaussian import Gaussian, w2_squared
from theory.schedule_learning import score_matching_loss
from theory.schedules import cosine_family, sigmoid_family

T, S, FORMS, TARGETS = 24, 5, ("chen", "released"), ("epsilon", "v")
MEAN, COV = np.array([1.0, -0.5]), np.array([[0.25, 0.3], [0.3, 4.0]])
DATA = Gaussian(MEAN, COV)
FAMILY = Family("cosine", T, "released", {"start": 0.0})
X = {"end": torch.tensor([0.9, 0.7], dtype=torch.float64), "tau": torch.tensor([1.0, 2.0], dtype=torch.float64)}


def grad(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def levels_of(x=X, family=FAMILY):
    return family(x).detach().numpy()


def exact(alpha_bar, target):
    """The best prediction of eps or v for the data, (*batch, n, 2), from the posterior mean of x_0 at each level."""

    def network(u, x, times):
        found = np.empty(x.shape)
        for i in range(len(x)):
            for j in range(x.shape[1]):
                a, at = alpha_bar[i, int(times[j])], x[i, j].detach().numpy()
                gain = math.sqrt(a) * COV @ np.linalg.inv(a * COV + (1 - a) * np.eye(2))
                clean = MEAN + gain @ (at - math.sqrt(a) * MEAN)
                noise = np.linalg.solve(a * COV + (1 - a) * np.eye(2), math.sqrt(1 - a) * (at - math.sqrt(a) * MEAN))
                found[i, j] = noise if target == "epsilon" else math.sqrt(a) * noise - math.sqrt(1 - a) * clean
        return torch.from_numpy(found)

    return network


# --- the sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_ddim_has_the_law_of_theory(target):
    upper = Quality(
        FAMILY, exact(levels_of(), target), lambda samples, draw: samples[:, 0, 0], lambda draw: X["end"], S
    )
    upper.target = target
    corners = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double().expand(2, 3, 2)  # an affine map, by three points
    found = upper.sample(X, {}, corners).numpy()
    for i in range(2):
        law = ddim_law(DATA, levels_of()[i][upper.times.numpy()])
        matrix = found[i, 1:] - found[i, 0]
        np.testing.assert_allclose(found[i, 0], law.mean, rtol=1e-9)
        np.testing.assert_allclose(matrix.T @ matrix, law.cov, rtol=1e-8)
    assert (upper.calls, upper.network_calls) == (1, S)


@pytest.mark.parametrize("form", FORMS)
def test_both_targets_are_the_same_sampler(form):
    levels = levels_of({"tau": torch.tensor([0.8], dtype=torch.float64)}, Family("cosine", T, form))[:, [3, 9, 20]]
    times = torch.tensor([3, 9, 20])
    a = {int(t): float(levels[0, i]) for i, t in enumerate(times)}
    noise = torch.linspace(-2, 2, 10).double().reshape(1, 5, 2)

    def of_noise(u, x, t):
        return torch.tanh(u["w"] * x) + 0.01 * t[:, None].double()

    def of_v(u, x, t):
        level = a[int(t[0])]
        clean = (x - math.sqrt(1 - level) * of_noise(u, x, t)) / math.sqrt(level)
        return math.sqrt(level) * of_noise(u, x, t) - math.sqrt(1 - level) * clean

    u = {"w": torch.tensor(0.7, dtype=torch.float64)}
    first = ddim(of_noise, u, noise, torch.tensor(levels), times, "epsilon")
    second = ddim(of_v, u, noise, torch.tensor(levels), times, "v")
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    x = noise.numpy()
    for t, then in ((20, a[9]), (9, a[3]), (3, 1.0)):
        eps = np.tanh(0.7 * x) + 0.01 * t
        x = math.sqrt(then) * (x - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t]) + math.sqrt(1 - then) * eps
    np.testing.assert_allclose(first.numpy(), x, rtol=1e-10)


def test_ddim_takes_schedules_without_a_batch():
    levels, times = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([1, 5])
    noise = torch.linspace(-1, 1, 12).double().reshape(3, 2, 2)  # (n, *shape)
    seen = []

    def network(u, x, t):
        seen.append(t.tolist())
        return x * t[:, None, None]

    one = ddim(network, {}, noise, levels, times)
    torch.testing.assert_close(ddim(network, {}, noise[1:2], levels, times), one[1:2])
    assert seen[:2] == [[5, 5, 5], [1, 1, 1]]


def test_v_starts_from_pure_noise_and_epsilon_may_not():
    levels, times = torch.tensor([0.9, 0.0], dtype=torch.float64), torch.tensor([1, 5])
    noise = torch.ones(4, 1).double()
    found = ddim(lambda u, x, t: -0.3 * torch.ones_like(x), {}, noise, levels, times)
    # At 0 the prediction of x_0 is -v and that of eps is x.
    x = math.sqrt(0.9) * 0.3 + math.sqrt(0.1)
    np.testing.assert_allclose(found.numpy(), math.sqrt(0.9) * x + math.sqrt(0.1) * 0.3, rtol=1e-12)
    with pytest.raises(ValueError, match="target must be 'v' where alpha_bar is 0"):
        ddim(lambda u, x, t: x, {}, noise, levels, times, "epsilon")


# --- the upper level ------------------------------------------------------------------------------------------------


def crosses(draw, n=2):
    """Four points with mean zero and unit covariance."""
    return torch.cat([torch.eye(2), -torch.eye(2)]).double().expand(n, 4, 2) * math.sqrt(2.0)


def w2(samples, draw):
    deviation = samples.var(1, correction=0).sqrt()
    return ((samples.mean(1) - torch.tensor([1.0, -0.5])) ** 2 + (deviation - torch.tensor([0.5, 2.0])) ** 2).sum(-1)


DIAGONAL = Gaussian.diagonal([1.0, -0.5], [0.25, 4.0])


def affine(u, x, times):
    place = {int(t): i for i, t in enumerate(U_TIMES)}[int(times[0])]
    return u["slope"][:, place] * x + u["offset"][:, place]


U_TIMES = (1, 6, 12, 18, 24)
U = {
    "slope": torch.linspace(-0.8, 0.6, 20).double().reshape(2, 5, 1, 2),
    "offset": torch.linspace(0.3, -0.4, 20).double().reshape(2, 5, 1, 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_quality_and_its_gradient_are_those_of_the_recursion(form):
    family = Family("cosine", T, form)

    def value(end, tau, i, slope=None):  # in NumPy, for run i
        a = cosine_family(T, 0.0, end, tau, 0.008, form)[list(U_TIMES)]
        slopes, offsets = (U[n][i, :, 0].numpy() for n in ("slope", "offset"))
        slopes = slopes if slope is None else slope
        mean, deviation = np.zeros(2), np.ones(2)
        for k in range(S - 1, -1, -1):
            then = 1.0 if k == 0 else a[k - 1]
            c, s, c2, s2 = np.sqrt([a[k], 1 - a[k], then, 1 - then])
            scale = c2 * (c - s * slopes[k]) + s2 * (c * slopes[k] + s)
            mean = scale * mean + (s2 * c - c2 * s) * offsets[k]
            deviation = deviation * np.abs(scale)
        target = Gaussian.diagonal([1.0, -0.5], [0.25, 4.0])
        return w2_squared(Gaussian.diagonal(mean, deviation**2), target)

    x = {"end": torch.tensor([0.95, 0.7], dtype=torch.float64), "tau": torch.tensor([1.0, 1.5], dtype=torch.float64)}
    if form == "chen":
        x["end"][0] = 1.0
        del x["end"]
        x["tau"] = torch.tensor([1.0, 1.5], dtype=torch.float64)
    upper = Quality(family, affine, w2, crosses, S)
    for v in x.values():
        v.requires_grad_()
    u = {n: p.clone().requires_grad_() for n, p in U.items()}
    found = upper(x, u, (1,))
    found.sum().backward()
    end = x["end"].tolist() if "end" in x else [1.0, 1.0]
    h = 1e-5
    for i, tau in enumerate(x["tau"].tolist()):
        assert found[i].item() == pytest.approx(value(end[i], tau, i), rel=1e-9)
        by_tau = (value(end[i], tau + h, i) - value(end[i], tau - h, i)) / (2 * h)
        assert grad(x["tau"])[i].item() == pytest.approx(by_tau, rel=1e-6)
        if "end" in x:
            by_end = (value(end[i] + h, tau, i) - value(end[i] - h, tau, i)) / (2 * h)
            assert grad(x["end"])[i].item() == pytest.approx(by_end, rel=1e-6)
        step = np.zeros((5, 2))
        step[2, 1] = h
        slopes = U["slope"][i, :, 0].numpy()
        by_slope = (value(end[i], tau, i, slopes + step) - value(end[i], tau, i, slopes - step)) / (2 * h)
        assert grad(u["slope"])[i, 2, 0, 1].item() == pytest.approx(by_slope, rel=1e-6)


def test_quality_asks_for_the_draws_numbers_and_counts():
    asked = []

    def noise(draw):
        asked.append(("noise", draw))
        return crosses(draw)

    def distance(samples, draw):
        asked.append(("distance", draw))
        return w2(samples, draw)

    upper = Quality(FAMILY, affine, distance, noise, S)
    first, second = upper(X, U, (7,)), upper(X, U, (7,))
    assert torch.equal(first, second)
    assert first.shape == (2,)
    assert asked == [("noise", (7,)), ("distance", (7,))] * 2
    assert (upper.calls, upper.network_calls) == (2, 2 * S)
    assert upper.times.tolist() == list(U_TIMES)


# --- the lower level ------------------------------------------------------------------------------------------------

POINTS = 4  # (x_0, eps) = (m +- s, +-1): all moments of the second order of independent normal pairs


def pairs(mean=0.7, std=0.6):
    """Every time of 1..T with the four points, as a batch: (1, 4 T, 1), (1, 4 T, 1), (4 T,)."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    data, noise = (mean + std * signs[:, 0]).repeat(T), signs[:, 1].repeat(T)
    times = torch.arange(1, T + 1).repeat_interleave(POINTS)
    return data[None, :, None], noise[None, :, None], times


SLOPES, OFFSETS = np.linspace(0.2, 1.1, T), np.linspace(-0.3, 0.4, T)


def of_noise(u, x, times):
    return (u["slope"][times - 1] * x[..., 0] + u["offset"][times - 1])[..., None]


LINE = {"slope": torch.tensor(SLOPES), "offset": torch.tensor(OFFSETS)}


@pytest.mark.parametrize("shape", ["cosine", "sigmoid"])
def test_score_matching_loss_and_its_gradient_are_those_of_theory(shape):
    of_theory = {"cosine": cosine_family, "sigmoid": sigmoid_family}[shape]

    def loss(end, tau):
        levels = of_theory(T, 0.0, end, tau, 0.008, "released")
        return score_matching_loss(1 - levels[1:] / levels[:-1], SLOPES, OFFSETS, Gaussian.scalar(0.7, 0.36))

    family = Family(shape, T, "released", {"start": 0.0, "epsilon": 0.008})
    x = {
        "end": torch.tensor([0.9], dtype=torch.float64).requires_grad_(),
        "tau": torch.tensor([1.2], dtype=torch.float64).requires_grad_(),
    }
    found = ScoreMatching(family, of_noise, lambda draw: pairs(), "epsilon")(x, LINE, (1,))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(loss(0.9, 1.2), rel=1e-12)
    found.sum().backward()
    h = 1e-5
    assert grad(x["end"]).item() == pytest.approx((loss(0.9 + h, 1.2) - loss(0.9 - h, 1.2)) / (2 * h), rel=1e-7)
    assert grad(x["tau"]).item() == pytest.approx((loss(0.9, 1.2 + h) - loss(0.9, 1.2 - h)) / (2 * h), rel=1e-7)


def test_loss_of_v_is_that_of_noise_over_alpha_bar():
    family, x = Family("cosine", T, "released"), {"end": torch.tensor([0.9], dtype=torch.float64)}
    a = family(x)[0]

    def of_v(u, at, times):
        level = a[times][:, None]
        epsilon = of_noise(u, at, times)
        clean = (at - (1 - level).sqrt() * epsilon) / level.sqrt()
        return level.sqrt() * epsilon - (1 - level).sqrt() * clean

    for t in (1, 7, T):
        data, noise, times = (p[..., POINTS * (t - 1) : POINTS * t, :] if p.ndim == 3 else p for p in pairs())
        one = (data, noise, times[POINTS * (t - 1) : POINTS * t])
        of_noise_loss = ScoreMatching(family, of_noise, lambda draw, one=one: one, "epsilon")(x, LINE, (1,))
        of_v_loss = ScoreMatching(family, of_v, lambda draw, one=one: one)(x, LINE, (1,))
        assert of_v_loss.item() * a[t].item() == pytest.approx(of_noise_loss.item(), rel=1e-10)


def test_score_matching_averages_numbers_and_reads_the_draw():
    data = torch.linspace(-1, 1, 24).double().reshape(2, 3, 2, 2)  # two problems, three samples of shape (2, 2)
    times = torch.tensor([2, 9, T])

    def batch(draw):
        return data * draw[0], data.flip(1) + draw[1], times

    lower = ScoreMatching(FAMILY, lambda u, x, t: u["w"] * x + t[:, None, None], batch)
    found = lower(X, {"w": torch.tensor(0.3, dtype=torch.float64)}, (3, 4)).numpy()
    for i in range(2):
        total = 0.0
        for j, t in enumerate(times.tolist()):
            a = levels_of()[i, t]
            x0, eps = data[i, j].numpy() * 3, data.flip(1)[i, j].numpy() + 4
            at, v = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps, math.sqrt(a) * eps - math.sqrt(1 - a) * x0
            total += ((0.3 * at + t - v) ** 2).mean() / 3
        assert found[i] == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_the_exact_prediction_attains_the_least_loss(target):
    rng = np.random.default_rng(0)
    n, t = 500, 9
    level = torch.tensor(levels_of()[:, t])[:, None, None]
    # Points (x_0, eps) with exactly the second moments: Gaussian ones, whitened together.
    raw = rng.normal(size=(n, 4))
    raw = raw - raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / n)).T
    data = torch.tensor(MEAN + white[:, :2] @ np.linalg.cholesky(COV).T).expand(2, n, 2)
    noise = torch.tensor(white[:, 2:]).expand(2, n, 2)
    lower = ScoreMatching(FAMILY, exact(levels_of(), target), lambda draw: (data, noise, torch.full((n,), t)), target)
    found = lower(X, {}, (1,)).numpy()
    best = minimal_score_matching_loss(DATA, levels_of()[:, t]) / 2
    np.testing.assert_allclose(found, best if target == "epsilon" else best / level[:, 0, 0].numpy(), rtol=1e-9)


def test_the_gradient_is_finite_where_chens_form_ends():
    family, x = Family("cosine", T), {"tau": torch.tensor([1.0], dtype=torch.float64).requires_grad_()}
    lower = ScoreMatching(family, of_noise, lambda draw: pairs())
    lower(x, LINE, (1,)).sum().backward()
    h = 1e-5
    high, low = (lower({"tau": torch.tensor([1 + s], dtype=torch.float64)}, LINE, (1,)).item() for s in (h, -h))
    assert grad(x["tau"]).item() == pytest.approx((high - low) / (2 * h), rel=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreMatching(FAMILY, affine, lambda draw: pairs(), "x0"), "target must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Quality(FAMILY, affine, w2, crosses, S, "x0"), "target must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: ddim(affine, U, crosses((1,)), torch.ones(1), torch.ones(1), "x0"), "target must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: Quality(FAMILY, affine, w2, crosses, 1), "S must lie in"),
        (lambda: Quality(FAMILY, affine, w2, crosses, T + 1), "S must lie in"),
    ],
)  # fmt: skip
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
