"""theory.queue against a queue that really keeps its slots, particles, frequency-domain stability and counted work."""

import math
from typing import Any

import numpy as np
import pytest

from theory import queue
from theory.girsanov import Drift, discrete_adjoint, euler_paths
from theory.queue import LinearDenoiser, delay_kernel
from verdicts.streams import Stream

MODEL = LinearDenoiser(16, 2.0, 1.5)
SLOTS = (1, 2, 4, 8, 16)
ORDERS = ("printed", "released")
ADJOINTS = ("whole", "queued")
WRONG: Any = "wrong"  # not of the type that is asked for


def euler_mean(model, mean, theta, steps):
    """The mean after the given steps of the sampler, from the denoiser's drift and nothing else."""
    for j in steps:
        score = -(mean - theta * math.exp(-(model.horizon - j * model.step)))
        mean = mean + model.step * (mean + 2 * score)
    return mean


def run_slots(model, slots, eta, start, updates, order, adjoint="whole"):
    """Algorithm 2 on the means: M slots, advanced one block an update; finished batches carry their own adjoint."""
    length = model.steps // slots
    blocks = [range(m * length, (m + 1) * length) for m in range(slots)]
    theta, path, means = start, [start], [0.0]
    for m in range(slots):
        means.append(euler_mean(model, means[-1], start, blocks[m]))
    finished = [[means[-1] - model.target, 1.0, slots - 1 - i] for i in range(slots)][1:]
    for entry, age in zip(finished, range(1, slots), strict=True):
        entry[1] = (1 - model.step) ** (age * length)
    for _ in range(updates):
        after = [0.0] + [euler_mean(model, means[m], theta, blocks[m]) for m in range(slots)]
        error = (after if order == "released" else means)[-1] - model.target
        if adjoint == "whole":
            active = [[error, 1.0, slots - 1]]
            gradient = sum(advance(model, active[0], blocks) for _ in range(slots))
        else:
            finished.insert(0, [error, 1.0, slots - 1])
            gradient = sum(advance(model, entry, blocks) for entry in finished)
            finished = [entry for entry in finished if entry[2] >= 0]
        theta, means = theta - eta * gradient, after
        path.append(theta)
    return np.array(path), means


def advance(model, entry, blocks):
    """One block of the adjoint A_s = (1 - h) A_{s+1} from the end, and its part of the gradient."""
    error, decay, block = entry
    total = 0.0
    for j in reversed(blocks[block]):
        total += 2 * model.step * math.exp(-(model.horizon - j * model.step)) * decay * error
        decay *= 1 - model.step
    entry[1], entry[2] = decay, block - 1
    return total


def test_response_and_variances_are_those_of_the_euler_steps():
    assert euler_mean(MODEL, 0.0, 1.0, range(16)) == pytest.approx(MODEL.response, rel=1e-14)
    variance = [1.0]
    for _ in range(16):
        variance.append((1 - MODEL.step) ** 2 * variance[-1] + 2 * MODEL.step)
    np.testing.assert_allclose(MODEL.variances, variance, rtol=1e-14)
    assert MODEL.response == pytest.approx(0.952960734073, abs=1e-12)  # from an independent derivation
    ratios = MODEL.weights[:-1] / MODEL.weights[1:]
    np.testing.assert_allclose(ratios, (1 - MODEL.step) * math.exp(-MODEL.step), rtol=1e-13)


def test_response_tends_to_its_limit_at_first_order():
    errors = [LinearDenoiser(steps, 2.0, 0.0).response - (1 - math.exp(-4)) for steps in (256, 512, 1024)]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.01)


def test_gradient_is_the_slope_of_the_objective():
    theta, step = 0.7, 1e-4
    slope = (MODEL.objective(theta + step) - MODEL.objective(theta - step)) / (2 * step)
    assert float(MODEL.gradient(theta)) == pytest.approx(slope, rel=1e-9)
    assert float(MODEL.gradient(MODEL.optimum)) == pytest.approx(0, abs=1e-15)
    law = MODEL.law(theta)
    expected = ((law.mean[0] - 1.5) ** 2 + law.cov[0, 0]) / 2
    assert MODEL.objective(theta) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slots", SLOTS)
def test_delay_equation_is_the_queue_that_keeps_its_slots(slots, order, adjoint):
    found = queue.trajectory(MODEL, delay_kernel(MODEL, slots, order, adjoint), 0.1, 0.3, 60)
    expected, _ = run_slots(MODEL, slots, 0.1, 0.3, 60, order, adjoint)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("slots", SLOTS[1:])
def test_wrong_indices_are_noticed(slots):
    expected, _ = run_slots(MODEL, slots, 0.1, 0.3, 60, "printed")
    printed, released = (delay_kernel(MODEL, slots, order) for order in ORDERS)
    backwards = np.concatenate([[0.0], printed[:0:-1]])  # block 0 taken for the freshest
    whole_horizon = np.eye(slots + 1)[slots] * printed.sum()  # every step M updates old
    for wrong in (released, backwards, whole_horizon):
        assert np.abs(queue.trajectory(MODEL, wrong, 0.1, 0.3, 60) - expected).max() > 5e-3


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (1, [0.142944110111, 0.638011963895, 1.384565754530, 1.566277811446]),
        (4, [0.142944110111, 0.654072776924, 1.408532915414, 1.568689698099]),
        (16, [0.142944110111, 0.687997618243, 1.581963392558, 1.573788540894]),
    ],
)
def test_trajectories_from_an_independent_derivation(slots, expected):
    found = queue.trajectory(MODEL, delay_kernel(MODEL, slots), 0.1, 0.0, 50)
    np.testing.assert_allclose(found[[1, 5, 20, 50]], expected, atol=1e-12)


@pytest.mark.parametrize("slots", SLOTS)
def test_one_slot_released_is_the_nested_loop_and_every_queue_has_its_optimum(slots):
    nested = [0.3]
    for _ in range(30):
        nested.append(nested[-1] - 0.1 * float(MODEL.gradient(nested[-1])))
    np.testing.assert_allclose(queue.trajectory(MODEL, delay_kernel(MODEL, 1, "released"), 0.1, 0.3, 30), nested)
    for order in ORDERS:
        for adjoint in ADJOINTS:
            kernel = delay_kernel(MODEL, slots, order, adjoint)
            assert kernel.sum() == pytest.approx(MODEL.response**2, rel=1e-14)
            assert queue.trajectory(MODEL, kernel, 0.1, 0.0, 2000)[-1] == pytest.approx(MODEL.optimum, abs=1e-12)


# --- bias --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slots", SLOTS)
def test_bias_is_what_the_slots_add_to_the_gradient(slots, order):
    path, _ = run_slots(MODEL, slots, 0.1, 0.3, 40, order)
    used = (path[:-1] - path[1:]) / 0.1
    found = queue.bias(MODEL, delay_kernel(MODEL, slots, order), path)[:-1]
    np.testing.assert_allclose(found, used - MODEL.gradient(path[:-1]), atol=1e-13)


@pytest.mark.parametrize(("slots", "order"), [(1, "printed"), (4, "printed"), (4, "released"), (16, "printed")])
def test_leading_bias_is_off_by_the_square_of_eta(slots, order):
    kernel, errors = delay_kernel(MODEL, slots, order), []
    for eta in (2e-4, 1e-4, 5e-5):
        path = queue.trajectory(MODEL, kernel, eta, 0.0, 40)
        errors.append(queue.bias(MODEL, kernel, path)[-1] - queue.leading_bias(MODEL, kernel, eta, path)[-1])
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, abs=0.05)


def test_bias_from_an_independent_derivation():
    kernel = delay_kernel(MODEL, 16)
    path = queue.trajectory(MODEL, kernel, 0.01, 0.0, 100)
    assert queue.bias(MODEL, kernel, path)[-1] == pytest.approx(-0.0224328249, abs=1e-10)
    assert queue.leading_bias(MODEL, kernel, 0.01, path)[-1] == pytest.approx(-0.0207767917, abs=1e-10)
    horizon = 16 * 0.01 * MODEL.response**2 * float(MODEL.gradient(path[-1]))  # the delay of the oldest step for dbar
    assert abs(horizon) > 3 * 0.0224328249


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("steps", [16, 64])
def test_mean_delay_in_closed_form(slots, steps):
    model = LinearDenoiser(steps, 2.0, 0.0)
    q = (1 - model.step) * math.exp(-model.step)
    expected = 1 / (1 - q ** (steps / slots)) - slots * q**steps / (1 - q**steps)
    assert queue.mean_delay(delay_kernel(model, slots)) == pytest.approx(expected, rel=1e-12)
    assert queue.mean_delay(delay_kernel(model, slots, "released")) == pytest.approx(expected - 1, abs=1e-12)


def test_how_good_the_rule_n_over_2t_is():
    """Off by 3/8 of an update and by the truncation N q^N / (1 - q^N): -6.8 % at T = 2, +1.8 % at T = 6."""
    ratios = []
    for horizon in (2.0, 6.0):
        model = LinearDenoiser(256, horizon, 0.0)
        ratios.append(queue.mean_delay(delay_kernel(model, 256)) / (256 / (2 * horizon)))
    assert ratios == pytest.approx([0.9318, 1.0176], abs=1e-4)


# --- stability ---------------------------------------------------------------------------------------------------


def least_crossing(kernel):
    """The least eta > 0 with a root on the unit circle: 1 - z = eta K(z) at z = e^{iw}, where that eta is real."""

    def eta(w):
        z = np.exp(1j * np.asarray(w))
        return (1 - z) / np.polynomial.polynomial.polyval(1 / z, kernel)

    grid = np.linspace(1e-6, math.pi, 8001)
    values, found = eta(grid), []
    for i in np.flatnonzero(values.imag[:-1] * values.imag[1:] <= 0):
        low, high = grid[i], grid[i + 1]
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if eta(low).imag * eta(middle).imag > 0 else (low, middle)
        found.append(float(eta(low).real))
    found.append(float(eta(math.pi).real))
    return min(value for value in found if value > 0)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slots", SLOTS)
def test_stability_limit_by_roots_and_by_frequencies(slots, order, adjoint):
    kernel = delay_kernel(MODEL, slots, order, adjoint)
    limit = queue.stability_limit(kernel)
    assert limit == pytest.approx(least_crossing(kernel), rel=1e-10)
    assert 0.999 * queue.stability_floor(kernel) < limit
    below, above = (np.abs(queue.trajectory(MODEL, kernel, x * limit, 0.0, 4000) - MODEL.optimum) for x in (0.8, 1.01))
    assert below[-200:].max() < 1e-6
    assert above[-200:].max() > 2 * above[:200].max()


def test_divergence_is_reported():
    with pytest.raises(ValueError, match=r"eta = 5.0: theta leaves the float range within 2000 updates"):
        queue.trajectory(MODEL, delay_kernel(MODEL, 4), 5.0, 0.0, 2000)


def test_limits_from_an_independent_derivation():
    found = [queue.stability_limit(delay_kernel(MODEL, slots)) for slots in (1, 4, 16)]
    assert found == pytest.approx([1.1011589, 1.0643106, 1.1171036], abs=5e-8)
    assert queue.nested_limit(MODEL) == pytest.approx(2.2023178, abs=5e-8)
    assert queue.stability_limit(delay_kernel(MODEL, 1, "released")) == pytest.approx(queue.nested_limit(MODEL), 1e-12)


@pytest.mark.parametrize("q", [0.2, 0.4, 0.6])
def test_geometric_kernels_have_their_limits_in_closed_form(q):
    tail = (1 - q) * q ** np.arange(int(-40 / math.log(q)))
    tail /= tail.sum()
    assert queue.stability_limit(np.concatenate([[0.0], tail])) == pytest.approx(1, rel=1e-6)
    assert queue.stability_limit(tail) == pytest.approx(2 * (1 + q) / (1 - q), rel=1e-6)
    # Critically damped at eta W^2 = (1 - q) / 4, where the radius is least: (1 + q) / 2.
    kernel = np.concatenate([[0.0], tail])
    best = queue.spectral_radius(kernel, (1 - q) / 4)
    assert best == pytest.approx((1 + q) / 2, abs=1e-4)  # a double root, of a truncated kernel
    assert all(queue.spectral_radius(kernel, factor * (1 - q) / 4) > best + 1e-3 for factor in (0.8, 1.25))


@pytest.mark.parametrize("slots", [16, 32, 64])
def test_limits_of_a_long_horizon_are_those_of_geometric_kernels(slots):
    """With q = exp(-2 n h) (about) and no truncation: 1, 2 (1 + q) / (1 - q), and 1 - q^2, 1 / q^2 - 1 if queued."""
    model = LinearDenoiser(64, 10.0, 0.0)
    q = ((1 - model.step) * math.exp(-model.step)) ** (64 / slots)
    reversals = 2 * (1 + q) / (1 - q)  # z = -1
    expected = [1, 1 - q**2, reversals, min(1 / q**2 - 1, reversals**2 / 2)]
    kernels = [delay_kernel(model, slots, order, adjoint) for order in ORDERS for adjoint in ADJOINTS]
    found = [queue.stability_limit(kernel) * kernel.sum() for kernel in kernels]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_a_single_delay_has_the_textbook_limit(delay):
    kernel = np.eye(delay + 1)[delay]
    assert queue.stability_limit(kernel) == pytest.approx(2 * math.sin(math.pi / (4 * delay + 2)), rel=1e-10)


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", SLOTS)
def test_slot_laws_are_those_of_the_slots(slots):
    path, means = run_slots(MODEL, slots, 0.02, 0.2, 25, "printed")
    laws = queue.slot_laws(MODEL, slots, path[25 - slots : 25])
    np.testing.assert_allclose([law.mean[0] for law in laws], means, atol=1e-13)
    expected = MODEL.variances[:: 16 // slots]
    np.testing.assert_allclose([law.cov[0, 0] for law in laws], expected, rtol=1e-13)
    stale = MODEL.law(path[25]).mean[0]
    assert abs(laws[-1].mean[0] - stale) > 1e-4  # the last slot has not the law of the current parameter


def simulate(model, slots, eta, updates, batch, repetitions, order, adjoint, generator):
    """theta_K of independent queues with `batch` particles in each slot, filled at theta_0 = 0; whole or queued."""
    length, h = model.steps // slots, model.step
    theta, finished = np.zeros(repetitions), []

    def block(y, m):
        for j in range(m * length, (m + 1) * length):
            score = -(y - theta[:, None] * math.exp(-(model.horizon - j * h)))
            y = y + h * (y + 2 * score) + math.sqrt(2 * h) * generator.normal(size=y.shape)
        return y

    def fresh():
        return generator.normal(size=(repetitions, batch))

    def filled(m):
        return fresh() if m == 0 else block(filled(m - 1), m - 1)

    slots_now = [filled(m) for m in range(slots + 1)]
    finished = [filled(slots).mean(1) - model.target for _ in range(slots - 1)]
    parts = queue.adjoint_weights(model, slots, adjoint)
    for _ in range(updates):
        after = [fresh()] + [block(slots_now[m], m) for m in range(slots)]
        finished.insert(0, (after if order == "released" else slots_now)[-1].mean(1) - model.target)
        gradient = sum(part * error for part, error in zip(parts, finished, strict=False))
        theta, slots_now = theta - eta * gradient, after
    return theta


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("order", ORDERS)
def test_parameter_law_against_particles(order, adjoint):
    model, repetitions = LinearDenoiser(8, 2.0, 1.5), 20000
    generator = Stream(7).child("queue").child(order).child(adjoint).generator()
    theta = simulate(model, 4, 0.4, 3, 3, repetitions, order, adjoint, generator)
    mean = queue.trajectory(model, delay_kernel(model, 4, order, adjoint), 0.4, 0.0, 3)[-1]
    variance = queue.parameter_variance(model, 4, 0.4, 3, 3, order, adjoint)[-1]
    assert theta.mean() == pytest.approx(mean, abs=4.5 * math.sqrt(variance / repetitions))
    assert theta.var() == pytest.approx(variance, rel=4.5 * math.sqrt(2 / repetitions))
    other = "queued" if adjoint == "whole" else "whole"  # the control: it would be noticed
    wrong = queue.parameter_variance(model, 4, 0.4, 3, 3, order, other)[-1]
    assert abs(wrong / variance - 1) > 9 * math.sqrt(2 / repetitions)


def test_noise_of_the_nested_loop_in_closed_form():
    eta, decay = 0.2, 1 - 0.2 * MODEL.response**2
    gradient = MODEL.response**2 * MODEL.variances[-1] / 10
    expected = eta**2 * gradient * (1 - decay ** (2 * np.arange(31))) / (1 - decay**2)
    np.testing.assert_allclose(queue.parameter_variance(MODEL, 1, eta, 30, 10, "released"), expected, rtol=1e-12)


# --- a nonlinear chain -------------------------------------------------------------------------------------------


def nonlinear_queue(slots, eta, updates):
    """The queue on a nonlinear chain at fixed noise, all slots sharing it: b of `Drift`, reward -(y - 1/2)^2 / 2."""
    generator = Stream(3).child("nonlinear").generator()
    steps, h = 8, 0.25
    noise, start = math.sqrt(h) * generator.normal(size=(200, steps)), generator.normal(size=200)
    length, b, path = steps // slots, 0.0, []
    held = [euler_paths(Drift(0.7, b), start, noise, h)[:, : m * length + 1] for m in range(slots + 1)]
    for _ in range(updates):
        final = held[-1][:, -1] - 0.5
        gradient = discrete_adjoint(Drift(0.7, b), held[-1], h, final)[:, 1].mean()
        after = [held[0]]
        for m in range(slots):
            block = slice(m * length, (m + 1) * length)
            moved = euler_paths(Drift(0.7, b), held[m][:, -1], noise[:, block], h)
            after.append(np.concatenate([held[m], moved[:, 1:]], axis=1))
        b, held = b - eta * gradient, after
        path.append(b)
    exact = discrete_adjoint(Drift(0.7, b), euler_paths(Drift(0.7, b), start, noise, h), h, held[-1][:, -1] - 0.5)
    return np.array(path), exact[:, 1].mean()


def test_a_nonlinear_queue_has_the_stationary_points_of_the_nested_loop():
    paths, gradients = zip(*(nonlinear_queue(slots, 0.2, 250) for slots in (1, 2, 4, 8)), strict=True)
    assert np.abs(gradients).max() < 1e-9
    ends = [path[-1] for path in paths]
    np.testing.assert_allclose(ends, ends[0], atol=1e-8)
    assert abs(ends[0]) > 0.05
    assert abs(paths[0][5] - paths[3][5]) > 1e-3  # though they get there by different ways


# --- work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("slots", SLOTS)
def test_work_by_counting(slots, adjoint):
    length = 16 // slots
    forward = [length for _ in range(slots)]  # slots in parallel
    stored = [m * length for m in range(1, slots + 1)]
    if adjoint == "whole":
        backward, depth = [16], max(forward) + 2.0 * 16
    else:
        backward, depth = [length] * slots, max(forward) + 2.0 * length
        stored += [m * length for m in range(1, slots)]  # what batches on the way back still need
    found = queue.work(16, slots, adjoint)
    assert (found.forward, found.backward) == (sum(forward), sum(backward)) == (16, 16)
    assert (found.depth, found.states) == (depth, sum(stored))


def test_without_a_queued_adjoint_the_gain_in_depth_is_at_most_one_half():
    gains = [queue.work(64, 1).depth / queue.work(64, slots).depth for slots in (1, 4, 16, 64)]
    assert gains == sorted(gains)
    assert gains[-1] < 1.5
    assert queue.work(64, 1).depth / queue.work(64, 64, "queued").depth == 64


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearDenoiser(0, 1.0, 0.0), "steps = 0: must be an integer >= 1"),
        (lambda: LinearDenoiser(4, 4.0, 0.0), r"horizon = 4.0: must lie in \(0.0, 4\)"),
        (lambda: LinearDenoiser(4, 1.0, math.nan), "target = nan"),
        (lambda: queue.block_weights(MODEL, 3), "slots = 3: must divide the 16 steps"),
        (lambda: queue.work(16, 5), "slots = 5: must divide the 16 steps"),
        (lambda: queue.work(16, 4, WRONG), "adjoint = 'wrong'"),
        (lambda: queue.block_weights(MODEL, 0), "slots = 0: must be an integer >= 1"),
        (lambda: delay_kernel(MODEL, 4, WRONG), "order = 'wrong': must be 'printed' or 'released'"),
        (lambda: delay_kernel(MODEL, 4, "printed", WRONG), "adjoint = 'wrong'"),
        (lambda: queue.slot_laws(MODEL, 4, [0.0]), "parameters has 1 entries: must have one for each of the 4"),
        (lambda: queue.stability_limit([0.5, -0.1]), "kernel = .*: must be non-negative"),
        (lambda: queue.mean_delay([0.0]), "kernel = .*: must be non-negative, and not zero"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
