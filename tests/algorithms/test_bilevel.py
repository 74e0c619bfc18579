"""The penalty method: gradients against NumPy and theory, the solver's recursion, randomness, gates, and resuming."""

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from algorithms.bilevel import Descent, PenaltyBilevel, Smooth, ZerothOrder
from theory.penalty import Bilevel, Cubic
from theory.zeroth_order import central_moments
from verdicts.streams import Stream

STREAM = Stream(8).child("tests", "bilevel")
RNG = STREAM.child("quadratics").generator()
R, K, M = 3, 2, 3  # problems, entries of x, entries of u


def _quadratics():
    """Linear and quadratic parts of f and g of each problem, in (x, u); g is strongly convex in u."""
    b = RNG.normal(size=(2, R, K + M))
    a = RNG.normal(size=(2, R, K + M, K + M))
    a = a + a.swapaxes(-1, -2)
    a[1] = 0.2 * a[1] + np.eye(K + M) * np.linspace(1.5, 2.5, K + M)
    return b, a


B, A = _quadratics()
X0, U0 = RNG.normal(size=(R, K)), RNG.normal(size=(R, M))


def quadratic(level, problems=R):
    b, a = torch.tensor(B[level][:problems]), torch.tensor(A[level][:problems])

    def value(x, u, draw):
        z = torch.cat([x["x"], u["u"]], -1)
        return (b * z).sum(-1) + 0.5 * torch.einsum("ri,rij,rj->r", z, a, z)

    return value


def point(x=X0, u=U0):
    return {"x": torch.tensor(x)}, {"u": torch.tensor(u)}


def sgd(rate=0.1, momentum=0.0):
    return lambda tensors: torch.optim.SGD(tensors, lr=rate, momentum=momentum)


def adam(rate=0.05):
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


def generator_for(draw):
    return torch.Generator().manual_seed(STREAM.child("directions", *draw).integer())


F, G = Smooth(quadratic(0)), Smooth(quadratic(1))


@dataclass
class Spy:
    """A level that remembers what it was asked, and adds noise which depends on the draw."""

    level: Any
    asked: list = field(default_factory=list)
    noise: float = 0.0

    def gradient(self, x, u, draw, of):
        self.asked.append((draw, of, {n: p.clone() for n, p in u.items()}))
        shift = self.noise * np.sin(sum(7.0**i * d for i, d in enumerate(draw, 1)))
        return {n: p + shift for n, p in self.level.gradient(x, u, draw, of).items()}


@dataclass(frozen=True)
class Fixed:
    """A solver with given answers."""

    y: dict
    z: dict

    def solve(self, x, u, gamma, update):
        return self.y if gamma is None else self.z

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["x", "u"])
def test_smooth_gradient_is_that_of_finite_differences(of):
    def value(x, u, draw):
        return (x["a"] ** 2 * u["b"].sin().sum(-1)).exp() + draw[0] * u["b"].prod(-1) * x["a"]

    at = {"a": np.array([0.3, -0.5]), "b": np.array([[0.2, 0.4], [1.0, -0.7]])}
    name = {"x": "a", "u": "b"}[of]
    tensors = {n: torch.tensor(v) for n, v in at.items()}
    found = Smooth(value).gradient({"a": tensors["a"]}, {"b": tensors["b"]}, (2,), of)

    def at_point(p):
        a, b = (p if n == name else at[n] for n in "ab")
        return np.exp(a**2 * np.sin(b).sum(-1)) + 2 * b.prod(-1) * a

    expected = np.zeros_like(at[name])
    for i in np.ndindex(expected.shape):
        step = np.zeros_like(expected)
        step[i] = 1e-5
        expected[i] = (at_point(at[name] + step) - at_point(at[name] - step)).sum() / 2e-5
    assert list(found) == [name]
    np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-8)


def test_smooth_gradient_is_zero_where_the_objective_does_not_depend():
    x, u = point()
    u["unused"] = torch.ones(R)
    of_x = Smooth(lambda x, u, draw: u["u"].square().sum(-1)).gradient(x, u, (1,), "x")
    of_u = Smooth(lambda x, u, draw: u["u"].square().sum(-1)).gradient(x, u, (1,), "u")
    assert torch.equal(of_x["x"], torch.zeros(R, K).double())
    assert torch.equal(of_u["unused"], torch.zeros(R))
    assert torch.equal(of_u["u"], 2 * u["u"])
    assert not of_x["x"].requires_grad


@pytest.mark.parametrize("gamma", [2.0, 50.0])
def test_gradient_of_the_penalty_function_is_that_of_theory(gamma):
    seen = []
    solver = Descent(F, G, sgd(0.35), (15, 15))
    x, u = point()
    run = PenaltyBilevel(
        F, G, solver, x, u, gamma=gamma + 10.0, optimizer=sgd(0.0), callback=lambda _, r: seen.append(r)
    )
    run.run(25)
    for i in range(R):
        case = Bilevel(Cubic(B[0][i], A[0][i]), Cubic(B[1][i], A[1][i]), K)
        np.testing.assert_allclose(run.y["u"][i].numpy(), case.lower_solution(X0[i]), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(
            run.z["u"][i].numpy(), case.penalty_solution(X0[i], gamma + 10), rtol=1e-9, atol=1e-11
        )
        np.testing.assert_allclose(
            seen[-1].gradient["x"][i].numpy(), case.penalty_gradient(X0[i], gamma + 10), rtol=1e-7, atol=1e-9
        )


def test_run_ends_where_the_penalty_function_is_stationary():
    case = Bilevel(Cubic([0.3, -1.0], [[2.0, 0], [0, 1.0]]), Cubic([0.2, 0.1], [[1.0, -1], [-1, 2.0]]), 1)
    f, g = Smooth(_scalar(case.upper)), Smooth(_scalar(case.lower))
    x, u = {"x": torch.tensor([[2.0]]).double()}, {"u": torch.tensor([[0.0]]).double()}
    run = PenaltyBilevel(f, g, Descent(f, g, sgd(0.3), (5, 5)), x, u, gamma=20.0, optimizer=sgd(0.2))
    run.run(200)
    assert run.updates == 200
    end = run.x["x"][0].numpy()
    assert abs(case.penalty_gradient(end, 20.0)[0]) < 1e-8
    assert abs(case.gradient(end)[0]) > 1e-3  # the bias of the penalty


def _scalar(of):
    b, a = torch.tensor(of.linear), torch.tensor(of.quadratic)

    def value(x, u, draw):
        z = torch.cat([x["x"], u["u"]], -1)
        return z @ b + 0.5 * torch.einsum("ri,ij,rj->r", z, a, z)

    return value


def test_gradient_weighs_the_levels_at_the_solvers_points():
    x, _ = point()
    y, z = {"u": torch.tensor(U0) + 1}, {"u": torch.tensor(U0) - 0.5}
    upper, lower, seen = Spy(F), Spy(G), []
    run = PenaltyBilevel(
        upper, lower, Fixed(y, z), x, y, gamma=lambda update: 2.0 * update, optimizer=sgd(0.1),
        callback=lambda update, r: seen.append((update, r)),
    )  # fmt: skip
    run.run(1)
    run.run(1)

    def slope(level, at, u):
        both = np.concatenate([at, u["u"].numpy()], -1)
        return (B[level] + np.einsum("rij,rj->ri", A[level], both))[:, :K]

    at = X0
    for update, record in seen:
        expected = slope(0, at, z) + 2.0 * update * (slope(1, at, z) - slope(1, at, y))
        np.testing.assert_allclose(record.gradient["x"].numpy(), expected, rtol=1e-12)
        at = at - 0.1 * expected
        np.testing.assert_allclose(record.x["x"].numpy(), at, rtol=1e-12)
        assert record.refused is None
    assert [update for update, _ in seen] == [1, 2]
    assert [(draw, of) for draw, of, _ in upper.asked] == [((1,), "x"), ((2,), "x")]
    assert [draw for draw, _, _ in lower.asked] == [(1,), (1,), (2,), (2,)]  # the same batch at z and y


# --- two values -----------------------------------------------------------------------------------------------------


def test_zeroth_order_estimate_is_the_directional_derivative_of_its_direction():
    std = {"a": 0.5, "b": 0.02}
    x = {"a": torch.tensor([0.1, 0.2]).double(), "b": torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]]).double()}
    of_a, of_b = torch.tensor([1.0, -2.0]).double(), torch.tensor([[0.5, 1.0, -1.0], [2.0, 0.0, 1.0]]).double()
    drawn = []

    def recorded(draw):
        drawn.append(draw)
        return generator_for(draw)

    level = ZerothOrder(
        lambda x, u, draw: x["a"] * of_a + (x["b"] * of_b).sum(-1) + x["b"].square().sum(-1), std, recorded
    )
    found = level.gradient(x, {}, (4, 2), "x")
    assert drawn == [(4, 2, 0)]
    source = generator_for((4, 2, 0))
    va, vb = (torch.randn(s, generator=source, dtype=torch.float64).numpy() for s in ((2,), (2, 3)))
    slope = 0.5 * va * of_a.numpy() + 0.02 * (vb * (of_b + 2 * x["b"]).numpy()).sum(-1)
    np.testing.assert_allclose(found["a"].numpy(), slope * va / 0.5, rtol=1e-10)
    np.testing.assert_allclose(found["b"].numpy(), slope[:, None] * vb / 0.02, rtol=1e-9)
    assert level.calls == 2


def test_zeroth_order_has_the_moments_of_theory_on_a_quadratic():
    n, g, hessian = 100_000, np.array([0.5, -1.0, 2.0]), np.diag([1.0, 3.0, -2.0])
    at = {"a": torch.zeros(n, 2).double(), "b": torch.zeros(n).double()}

    def value(x, u, draw):
        z = torch.cat([u["a"], u["b"][:, None]], -1)
        return z @ torch.tensor(g) + 0.5 * torch.einsum("ri,ij,rj->r", z, torch.tensor(hessian), z)

    found = ZerothOrder(value, 0.3, generator_for).gradient({}, at, (1,), "u")
    estimates = np.concatenate([found["a"].numpy(), found["b"].numpy()[:, None]], -1)
    moments = central_moments(g, 0.3)
    error = np.sqrt(np.diag(moments.covariance) / n)
    assert np.all(np.abs(estimates.mean(0) - g) < 5 * error)  # 6e-7 each; a factor 1 / 2 or 2 is off by > 20
    second = (estimates**2).sum(-1)
    assert abs(second.mean() - moments.second_moment) < 5 * second.std() / np.sqrt(n)
    assert moments.second_moment == pytest.approx((3 + 2) * g @ g)


def test_zeroth_order_uses_the_same_numbers_at_both_points_and_at_the_same_draw():
    draws = []

    def noisy(x, u, draw):
        draws.append(draw)
        noise = torch.randn(R, generator=generator_for(("noise", *draw)), dtype=torch.float64)
        return 1e6 * noise + quadratic(0)(x, u, draw)

    x, u = point()
    level = ZerothOrder(noisy, 0.1, generator_for)
    first, again, other = (level.gradient(x, u, draw, "x")["x"] for draw in ((3,), (3,), (4,)))
    clean = ZerothOrder(quadratic(0), 0.1, generator_for).gradient(x, u, (3,), "x")["x"]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    torch.testing.assert_close(first, clean, rtol=1e-5, atol=1e-6)  # what is common has cancelled, up to rounding
    assert draws == [(3,)] * 4 + [(4,)] * 2


def test_zeroth_order_directions_of_x_and_u_differ():
    same = torch.zeros(50).double()
    level = ZerothOrder(lambda x, u, draw: x["p"].sum() + u["p"].sum(), 1.0, generator_for)
    of_x, of_u = (level.gradient({"p": same}, {"p": same}, (1,), of)["p"] for of in ("x", "u"))
    assert abs(np.corrcoef(of_x.numpy(), of_u.numpy())[0, 1]) < 0.5


@pytest.mark.parametrize("level", [G, ZerothOrder(quadratic(1), 0.2, generator_for)], ids=["smooth", "two-point"])
@pytest.mark.parametrize("of", ["x", "u"])
def test_no_problem_depends_on_another(level, of):
    x, u = point()
    before = level.gradient(x, u, (1,), of)[of]
    x["x"][1:], u["u"][1:] = 17.0, -3.0
    after = level.gradient(x, u, (1,), of)[of]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_perturbed_points_are_valid_and_still_point_downhill():
    slope, std, seen = torch.tensor([1.0, -2.0, 0.5]).double(), 0.4, []

    def value(x, u, draw):
        assert bool((x["x"] >= 0).all())
        seen.append(x["x"])
        return x["x"] @ slope

    def valid(p, of):
        assert of == "x"
        return {n: v.clamp(min=0.0) for n, v in p.items()}

    level = ZerothOrder(value, std, generator_for, valid)
    at = torch.full((200, 3), 0.05, dtype=torch.float64)
    found = level.gradient({"x": at}, {}, (1,), "x")["x"]
    v = torch.randn(200, 3, generator=generator_for((1, 0)), dtype=torch.float64).numpy()
    d = np.maximum(0.05 + std * v, 0) - np.maximum(0.05 - std * v, 0)
    expected = (d @ slope.numpy())[:, None] * d / (4 * std**2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert bool((seen[0] == 0).any())
    assert bool((found @ slope >= 0).all())


# --- the solver -----------------------------------------------------------------------------------------------------


def test_descent_takes_up_where_it_was_and_pulls_z_by_the_gradient_at_its_start():
    gamma, momentum, rate, steps = 5.0, 0.5, 0.1, (2, 3)
    upper, lower = Spy(F), Spy(G, noise=0.3)
    solver = Descent(upper, lower, sgd(rate, momentum), steps)
    x, u = point()
    run = PenaltyBilevel(upper, lower, solver, x, u, gamma=gamma, optimizer=sgd(0.0))

    def slope(level, v):
        both = np.concatenate([X0, v], -1)
        return (B[level] + np.einsum("rij,rj->ri", A[level], both))[:, K:]

    y, z = U0.copy(), U0.copy()
    speed = [np.zeros_like(y), np.zeros_like(z)]
    for update in (1, 2, 3):
        pull = slope(0, z) / gamma
        for k in range(steps[0], 0, -1):
            noise = 0.3 * np.sin(7.0 * update + 49.0 * k)
            speed[0] = momentum * speed[0] + slope(1, y) + noise
            y = y - rate * speed[0]
        for k in range(steps[1], 0, -1):
            noise = 0.3 * np.sin(7.0 * update + 49.0 * k)
            speed[1] = momentum * speed[1] + slope(1, z) + noise + pull
            z = z - rate * speed[1]
        run.run(1)
        np.testing.assert_allclose(run.y["u"].numpy(), y, rtol=1e-11)
        np.testing.assert_allclose(run.z["u"].numpy(), z, rtol=1e-11)
    inner = [draw for draw, of, _ in lower.asked if of == "u"]
    assert inner[:5] == [(1, 2), (1, 1), (1, 3), (1, 2), (1, 1)]  # y's batches are z's last ones
    assert [draw for draw, of, _ in upper.asked if of == "u"] == [(1,), (2,), (3,)]


def test_noise_of_the_batches_cancels_between_y_and_z():
    seen, x_u = [], point()
    for noise in (0.0, 0.3):
        lower = Spy(G, noise=noise)
        run = PenaltyBilevel(
            F, lower, Descent(F, lower, sgd(0.25), (10, 10)), *x_u, gamma=100.0, optimizer=sgd(0.0),
            callback=lambda update, record: seen.append(record.gradient["x"]) if update == 20 else None,
        )  # fmt: skip
        run.run(20)
    # Additive noise moves y and z alike: the gradient changes through f only, not by 100 times what it moves.
    moved = (seen[1] - seen[0]).abs().max()
    assert 1e-4 < moved < 3.0


def test_descent_starts_from_the_u_it_is_given():
    solver = Descent(F, G, sgd(0.1))
    x, u = point()
    first = solver.solve(x, u, None, 1)
    assert torch.equal(solver.solve(x, u, None, 1)["u"], first["u"])
    assert torch.equal(u["u"], torch.tensor(U0))


def test_numbers_of_steps_may_depend_on_the_update():
    lower = Spy(G)
    solver = Descent(F, lower, sgd(), (lambda update: update, 1))
    x, u = point()
    PenaltyBilevel(F, lower, solver, x, u, gamma=1.0, optimizer=sgd()).run(3)
    steps = [draw for draw, of, _ in lower.asked if of == "u"]
    assert steps == [(1, 1), (1, 1), (2, 2), (2, 1), (2, 1), (3, 3), (3, 2), (3, 1), (3, 1)]


def test_problems_run_alone_as_they_run_together():
    def run(problems):
        f, g = Smooth(quadratic(0, problems)), Smooth(quadratic(1, problems))
        start = point(X0[:problems], U0[:problems])
        method = PenaltyBilevel(f, g, Descent(f, g, adam(), (2, 2)), *start, gamma=10.0, optimizer=adam())
        method.run(5)
        return method.x["x"]

    torch.testing.assert_close(run(1)[0], run(R)[0], rtol=1e-12, atol=1e-12)


# --- gate, projection, average --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd(0.1), sgd(0.1, 0.9), adam()], ids=["sgd", "momentum", "adam"])
def test_gate_holds_what_it_refuses_and_nothing_else(optimizer):
    x, u = point()
    kept = {1: [True, True, True], 2: [True, False, True], 3: [False, True, True]}
    update, records = [0], []

    def gate(x, y, z):
        update[0] += 1
        return torch.tensor(kept[update[0]])

    def gated(gate):
        records.clear()
        run = PenaltyBilevel(
            F, G, Descent(F, G, sgd(), (2, 2)), x, u, gamma=5.0, optimizer=optimizer, gate=gate,
            callback=lambda _, record: records.append(record),
        )  # fmt: skip
        run.run(3)
        return [x["x"], *(r.x["x"] for r in records)], [r.refused for r in records]

    path, refused = gated(gate)
    free, _ = gated(None)
    for i in (1, 2, 3):
        assert refused[i - 1].tolist() == [not k for k in kept[i]]
        for problem in range(R):
            assert torch.equal(path[i][problem], path[i - 1][problem]) == (not kept[i][problem])
        assert torch.equal(path[i][2], free[i][2])  # never refused: as without a gate


def test_a_refused_estimate_may_be_infinite():
    x, u = point()
    y, z = {"u": torch.tensor(U0)}, {"u": torch.tensor(U0)}
    z["u"][1] = torch.inf
    run = PenaltyBilevel(
        F, G, Fixed(y, z), x, u, gamma=5.0, optimizer=sgd(0.1, 0.9),
        gate=lambda x, y, z: torch.isfinite(z["u"]).all(-1),
    )  # fmt: skip
    run.run(2)
    assert torch.equal(run.x["x"][1], x["x"][1])
    assert bool(torch.isfinite(run.x["x"]).all())
    without = PenaltyBilevel(F, G, Fixed(y, z), x, u, gamma=5.0, optimizer=sgd())
    with pytest.raises(ValueError, match="x must stay finite, x is not after update 1"):
        without.run(1)


def test_x_is_projected_after_each_update():
    x, u = point()
    run = PenaltyBilevel(
        F, G, Descent(F, G, sgd()), x, u, gamma=5.0, optimizer=sgd(10.0),
        project=lambda x: {"x": x["x"].clamp(-0.1, 0.1)},
    )  # fmt: skip
    run.run(1)
    assert bool((run.x["x"].abs() == 0.1).any())
    assert bool((run.x["x"].abs() <= 0.1).all())


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_average_of_y(decay):
    x, u = point()
    run = PenaltyBilevel(F, G, Descent(F, G, sgd()), x, u, gamma=5.0, optimizer=sgd(0.1), average=decay)
    expected, kept = U0.copy(), [run.averaged]
    for _ in range(3):
        run.run(1)
        expected = decay * expected + (1 - decay) * run.y["u"].numpy()
        np.testing.assert_allclose(run.averaged["u"].numpy(), expected, rtol=1e-13)
        kept.append(run.averaged)
    assert not torch.equal(kept[0]["u"], kept[1]["u"])  # what was returned does not change any more
    assert torch.equal(kept[0]["u"], u["u"])


# --- saving ---------------------------------------------------------------------------------------------------------


def _method(seen):
    upper = ZerothOrder(quadratic(0), 0.1, generator_for)
    x, u = point()
    return PenaltyBilevel(
        upper, G, Descent(upper, G, adam(0.1), (2, 3)), x, u, gamma=lambda update: 5.0 + update, average=0.9,
        optimizer=sgd(0.05, 0.9), project=lambda x: {"x": x["x"].clamp(-2, 2)},
        gate=lambda x, y, z: x["x"][:, 0] < 0.8, callback=lambda update, r: seen.append((update, r)),
    )  # fmt: skip


def test_a_run_resumes_bit_for_bit():
    whole, parts = [], []
    straight = _method(whole)
    straight.run(6)
    first = _method(parts)
    first.run(3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    first.run(2)  # what was saved does not change any more
    del parts[3:]
    resumed = _method(parts)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.updates == 3
    resumed.run(3)
    assert [update for update, _ in parts] == [1, 2, 3, 4, 5, 6]
    for (_, a), (_, b) in zip(whole, parts, strict=True):
        assert torch.equal(a.x["x"], b.x["x"])
        assert torch.equal(a.gradient["x"], b.gradient["x"])
    for name in ("x", "y", "z", "averaged"):
        a, b = getattr(straight, name), getattr(resumed, name)
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_state_of_another_problem_is_refused(name):
    method = _method([])
    state = copy.deepcopy(method.state_dict())
    key = {"x": "x", "y": "u"}[name]
    state[name] = {key: torch.zeros(R + 1, 2)}
    with pytest.raises(ValueError, match=f"the state's {name} must have names and shapes"):
        method.load_state_dict(state)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("inf"), float("nan")])
def test_gamma_must_be_positive_and_finite(gamma):
    for given in (gamma, lambda update: gamma):
        run = PenaltyBilevel(F, G, Descent(F, G, sgd()), *point(), gamma=given, optimizer=sgd())
        with pytest.raises(ValueError, match="gamma must be positive and finite"):
            run.run(1)


@pytest.mark.parametrize("average", [-0.1, 1.0, float("nan")])
def test_average_must_be_a_decay(average):
    with pytest.raises(ValueError, match="average must lie in"):
        PenaltyBilevel(F, G, Descent(F, G, sgd()), *point(), gamma=1.0, optimizer=sgd(), average=average)


@pytest.mark.parametrize("steps", [(0, 1), (1, 0), (lambda update: 2 - update, 1)])
def test_a_solver_must_step(steps):
    run = PenaltyBilevel(F, G, Descent(F, G, sgd(), steps), *point(), gamma=1.0, optimizer=sgd())
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0 in update"):
        run.run(2)


@pytest.mark.parametrize("std", [0.0, -1.0, float("inf"), float("nan"), {"x": 1.0, "u": 0.0}])
def test_std_must_be_positive(std):
    with pytest.raises(ValueError, match="std of the perturbation must be positive and finite"):
        ZerothOrder(quadratic(0), std, generator_for)


def test_every_perturbed_tensor_needs_a_std():
    with pytest.raises(ValueError, match=r"std must name every tensor that is perturbed, got \['u'\] without 'x'"):
        ZerothOrder(quadratic(0), {"u": 1.0}, generator_for).gradient(*point(), (1,), "x")


@dataclass(frozen=True)
class Renamed:
    """A level whose gradient in one variable has another name or shape."""

    of: str
    answer: dict

    def gradient(self, x, u, draw, of):
        return self.answer if of == self.of else G.gradient(x, u, draw, of)


@pytest.mark.parametrize("answer", [{"other": torch.zeros(R, K)}, {}, {"x": torch.zeros(1, K), "u": torch.zeros(1, M)}])
@pytest.mark.parametrize("of", ["x", "u"])
@pytest.mark.parametrize("level", ["upper", "lower"])
def test_gradients_must_match_the_variables(level, of, answer):
    levels = {"upper": F, "lower": G, level: Renamed(of, answer)}
    solver = Descent(levels["upper"], levels["lower"], sgd())
    run = PenaltyBilevel(levels["upper"], levels["lower"], solver, *point(), gamma=1.0, optimizer=sgd())
    with pytest.raises(ValueError, match=rf"the {level} level's gradient in {of} must have names and shapes of"):
        run.run(1)


def test_solver_and_projection_must_match_the_variables():
    good, bad = {"u": torch.tensor(U0)}, {"v": torch.tensor(U0)}
    for solver, which in ((Fixed(bad, good), "y"), (Fixed(good, bad), "z")):
        with pytest.raises(ValueError, match=f"the solver's {which} must have names and shapes"):
            PenaltyBilevel(F, G, solver, *point(), gamma=1.0, optimizer=sgd()).run(1)
    run = PenaltyBilevel(F, G, Fixed(good, good), *point(), gamma=1.0, optimizer=sgd(), project=lambda x: {})
    with pytest.raises(ValueError, match="the projection of x must have names and shapes"):
        run.run(1)
