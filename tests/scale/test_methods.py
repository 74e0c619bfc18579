"""The table of methods: every name gives the algorithm it stands for, unbiased exactly where the table says so."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from algorithms import credit as credits
from algorithms import rlr
from algorithms.baselines import Constant, LeaveOneOut
from algorithms.chain import ParameterNoise, StepConditions
from algorithms.division import Division
from algorithms.estimators import Estimator
from algorithms.losses import DPOK, PPO, DraftLV
from algorithms.objective import Objective
from algorithms.queue import Queue
from algorithms.telescoped import band
from algorithms.training import FromEstimator
from algorithms.truncations import alignprop_law
from scale.config import Method, dotted_keys
from scale.methods import METHODS, find, make_baseline, make_estimator, make_method, read_options, scored_steps

STEPS = 20
LOSSES = {"ddpo": PPO, "dpok": DPOK, "draft-lv": DraftLV, "implicit-diffusion": Queue}
FROM_DATA = {"sft", "sft-pg"}  # held against their algorithm in test_sft.py
FROM_REWARD = [name for name in METHODS if name not in FROM_DATA]
ESTIMATORS = [name for name in FROM_REWARD if name not in LOSSES]
# Written down apart from the table, from docs/credit-matrix.md and the papers.
UNBIASED = {"first-order", "srt", "half-order", "policy-gradient", "zeroth-order", "rlr", "tho"}
NEEDS_GRADIENT = {
    "first-order",
    "truncated",
    "align-prop",
    "srt",
    "rlr",
    "rlr-as-printed",
    "rlr-as-released",
    "draft-lv",
    "implicit-diffusion",
    "vader",
}


@dataclass(frozen=True)
class MLP:
    """mean = 0.9 x + W2 tanh(W1 x + condition); std grows with t."""

    steps: int = STEPS
    shape: tuple = (2,)

    def initial(self, noise):
        return noise

    def mean(self, params, x, t, condition):
        hidden = x @ params["W1"].T
        return 0.9 * x + torch.tanh(hidden if condition is None else hidden + condition) @ params["W2"].T

    def std(self, t):
        return 0.1 + 0.01 * t

    def renoise(self, x0, noise):
        return x0 + 0.1 * noise


@dataclass(frozen=True)
class Sine:
    differentiable: bool = True

    def __call__(self, x0, condition):
        return torch.sin(x0).sum(1)


OBJECTIVE = Objective(Sine())


def parameters():
    g = generator(3)
    return {
        "W1": 0.5 * torch.randn(3, 2, generator=g, dtype=torch.float64),
        "W2": 0.2 * torch.randn(2, 3, generator=g, dtype=torch.float64),
    }


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def choice(name, baseline="none", **options):
    return Method.model_validate({"name": name, "options": options, "baseline": baseline})


def estimator(name, baseline="none", chain=None, objective=OBJECTIVE, **options):
    return make_estimator(choice(name, baseline, **options), chain or MLP(), parameters(), objective, generator())


@pytest.mark.parametrize("name", FROM_REWARD)
def test_every_name_makes_a_method_that_gives_a_gradient(name):
    params = {key: p.requires_grad_() for key, p in parameters().items()}
    method, made = make_method(choice(name), MLP(), params, OBJECTIVE, generator())
    if name in LOSSES:
        assert type(method) is LOSSES[name]
        assert made is None
    else:
        assert isinstance(method, FromEstimator)
        assert method.estimator is made
    returns = next(iter(method.updates(MLP(), params, OBJECTIVE, 4, generator(1), None)))
    assert len(returns) % 4 == 0
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in params.values())
    assert any(float(p.grad.abs().max()) > 0 for p in params.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_row_sums_are_one_exactly_where_the_table_says_unbiased(name):
    assert METHODS[name].unbiased == (name in UNBIASED)
    gap = np.abs(estimator(name).credit.row_sums() - 1).max()
    assert (gap < 1e-12) == (name in UNBIASED)


def test_debiased_random_truncation_is_unbiased_and_visits_the_whole_chain():
    plain, debiased = estimator("align-prop"), estimator("align-prop", debiased=True)
    assert np.abs(plain.credit.row_sums() - 1).max() > 0.9
    assert np.abs(debiased.credit.row_sums() - 1).max() < 1e-12
    assert debiased.credit.visits()[-1].all()
    reach = np.array([debiased.credit.probabilities[debiased.credit.matrices[:, t, 0] > 0].sum() for t in range(STEPS)])
    assert reach[-1] == pytest.approx(0.05)


def test_a_planted_bias_is_seen_in_the_row_sums():
    doubled = Estimator("planted", credits.Credit.of(credits.half_order(STEPS, 2).matrices[0] * 2))
    assert np.abs(doubled.credit.row_sums() - 1).max() == 1


@pytest.mark.parametrize("name", FROM_REWARD)
def test_a_reward_without_gradient_is_refused_exactly_where_one_is_needed(name):
    assert METHODS[name].differentiable == (name in NEEDS_GRADIENT)
    black_box = Objective(Sine(differentiable=False))
    if name in NEEDS_GRADIENT:
        with pytest.raises(ValueError, match=f"method {name} needs a differentiable reward, Sine is not"):
            make_method(choice(name), MLP(), parameters(), black_box, generator())
    else:
        make_method(choice(name), MLP(), parameters(), black_box, generator())


@pytest.mark.parametrize("name", METHODS)
def test_the_table_is_complete(name):
    entry = METHODS[name]
    assert entry.published
    assert sum(f is not None for f in (entry.make, entry.fit, entry.loss, entry.shortcut)) == 1
    assert all(field.description for field in entry.options.model_fields.values())
    assert set(choice(name).options) == set(dotted_keys(entry.options))


@pytest.mark.parametrize("name", sorted(FROM_DATA))
def test_what_learns_from_data_is_no_method_of_a_reward(name):
    assert METHODS[name].shortcut is not None
    assert not METHODS[name].unbiased
    for make in (make_method, make_estimator):
        with pytest.raises(ValueError, match=f"{name} learns from data"):
            make(choice(name), *_rest())


def test_options_reach_the_algorithm():
    same = np.testing.assert_array_equal
    same(estimator("truncated", length=3).credit.matrices, credits.truncated(STEPS, 3).matrices)
    same(estimator("half-order", length=3).credit.matrices, credits.half_order(STEPS, 3).matrices)
    same(estimator("align-prop").credit.probabilities, _positive(alignprop_law(STEPS, 16.8, 2.0)))
    same(estimator("align-prop", mean=10, std=3).credit.probabilities, _positive(alignprop_law(STEPS, 10, 3)))
    same(estimator("rlr-as-printed", h=3, sign=-1).credit.matrices, rlr.as_printed(STEPS, 3, -1).matrices)
    released = rlr.as_released(STEPS, 1, 0.05, 1e-3)
    same(estimator("rlr-as-released", draws=1, first=0.05, half=1e-3).credit.matrices, released.matrices)
    same(estimator("vader", mode="specific", skipped=5).credit.matrices, credits.truncated(STEPS, 15).matrices)
    narrowed = estimator("rlr", h=2, reading="II", first=4, last=6).credit
    same(narrowed.matrices, rlr.credits(STEPS, 2, law={4: 1 / 3, 5: 1 / 3, 6: 1 / 3}, reading="II").matrices)
    assert len(estimator("rlr", h=2, first=4).credit.probabilities) == STEPS - 2 - 4 + 1


def _positive(law):
    return law[law > 0]


def test_parameter_noise_and_its_two_signs():
    assert estimator("zeroth-order", std=0.2, kind="rademacher").parameter_noise == ParameterNoise(0.2, "rademacher")
    for name, one_sided in (("zeroth-order", {"antithetic": False}), ("rlr", {"zeroth": "one-sided"})):
        assert estimator(name).flips == ("parameters",)
        assert estimator(name, **one_sided).flips == ()
        assert estimator(name, std=0.3).parameter_noise == ParameterNoise(0.3)


def test_losses_get_their_options():
    made = make_method(choice("ddpo", clip=0.1, epochs=2, minibatches=3, advantage="leave-one-out", group=4), *_rest())[
        0
    ]
    assert made == PPO(0.1, 2, 3, "leave-one-out", 4)
    assert make_method(choice("draft-lv", copies=5), *_rest())[0] == DraftLV(5)
    assert make_method(choice("dpok", 0.5), *_rest())[0] == DPOK(Constant(0.5))
    with pytest.raises(ValueError, match="ddpo is a surrogate loss"):
        make_estimator(choice("ddpo"), *_rest())


def _rest():
    return MLP(), parameters(), OBJECTIVE, generator()


@pytest.mark.parametrize("name", FROM_REWARD)
def test_a_division_is_handed_over(name):
    division = Division(micro_batch=2)
    assert make_method(choice(name), *_rest(), division=division)[0].division is division
    assert make_method(choice(name), *_rest())[0].division == Division()


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if METHODS[name].baseline])
def test_baselines_reach_the_estimators_that_take_one(name):
    assert estimator(name).baseline == Constant(0.0)
    assert estimator(name, baseline=2.0).baseline == Constant(2.0)
    assert estimator(name, baseline="leave-one-out").baseline == LeaveOneOut()


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline must be"):
        make_baseline("leave-two-out")


def test_a_pilot_is_drawn_from_the_generator_alone_and_only_where_it_is_needed():
    for name in FROM_REWARD:
        g = generator(5)
        before = g.get_state()
        torch.manual_seed(1)
        global_before = torch.get_rng_state()
        make_method(choice(name), MLP(), parameters(), OBJECTIVE, g)
        assert bool((g.get_state() == before).all()) == (name not in ("srt", "tho"))
        assert bool((torch.get_rng_state() == global_before).all())
    a, b = (make_estimator(choice("tho"), MLP(), parameters(), OBJECTIVE, generator(7)) for _ in range(2))
    np.testing.assert_array_equal(a.credit.matrices, b.credit.matrices)


def test_tho_stays_in_its_band_and_spares_the_gradient_of_a_black_box():
    inside = band(STEPS, 3, pathwise=True)
    weights = estimator("tho", width=3).credit.matrices[0]
    assert (weights[:, :-1][~inside] == 0).all()
    assert (weights[:3, 0] != 0).all()
    for made in (
        estimator("tho", width=3, objective=Objective(Sine(differentiable=False))),
        estimator("tho", width=3, pathwise=False),
    ):
        assert (made.credit.matrices[0][:, 0] == 0).all()


def test_srt_has_the_length_that_was_asked_for():
    made = estimator("srt", length=6.5)
    assert made.credit.stratified
    lengths = (made.credit.matrices[:, :, 0] > 0).sum(1)
    assert float(made.credit.probabilities @ lengths) == pytest.approx(6.5)


@pytest.mark.parametrize("name", ["srt", "tho"])
def test_a_pilot_sees_the_first_samples_of_the_condition_and_needs_enough(name):
    options = {"pilot": 16, **({"batch": 4} if name == "tho" else {})}
    needed = 4 if name == "tho" else 16
    condition = torch.linspace(-1, 1, 3 * 20).reshape(20, 3).double()
    stepwise = StepConditions(condition.expand(STEPS, 20, 3), condition)

    def fitted(given):
        return make_estimator(choice(name, **options), *_rest(), given).credit

    first, same = fitted(condition), fitted(condition[:needed])
    np.testing.assert_array_equal(first.matrices, same.matrices)
    np.testing.assert_array_equal(first.probabilities, fitted(stepwise).probabilities)
    other = fitted(condition.flip(0))
    assert not (
        np.array_equal(first.matrices, other.matrices) and np.array_equal(first.probabilities, other.probabilities)
    )
    for short in (condition[: needed - 1], StepConditions(stepwise.steps[:, : needed - 1])):
        with pytest.raises(ValueError, match=f"condition must hold the pilot's {needed} samples, got {needed - 1}"):
            fitted(short)


@pytest.mark.parametrize("name", FROM_REWARD)
def test_scored_steps_are_those_whose_noise_must_not_vanish(name):
    """Take the noise off one step after another: exactly the steps of the list must be missed."""
    scored = set(scored_steps(name, {}, STEPS))
    for t in (1, 2, STEPS):
        chain = _WithoutNoise(at=t)
        params = {key: p.requires_grad_() for key, p in parameters().items()}
        method, _ = make_method(choice(name), MLP(), params, OBJECTIVE, generator())
        run = method.updates(chain, params, OBJECTIVE, 40, generator(1), None)
        if t in scored:
            with pytest.raises(ValueError, match=f"step t = {t} has std = 0"):
                next(iter(run))
        else:
            next(iter(run))


@dataclass(frozen=True)
class _WithoutNoise(MLP):
    at: int = 1

    def std(self, t):
        return 0.0 if t == self.at else super().std(t)


def test_short_chains_are_refused_with_the_algorithms_own_words():
    with pytest.raises(ValueError, match="steps must be >= 2 for RLR"):
        make_estimator(choice("rlr"), replace(MLP(), steps=1), parameters(), OBJECTIVE, generator())


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean policy-gradient"):
        find("policy-gradiant")
    with pytest.raises(ValueError, match="options of rlr: unknown key redaing, did you mean reading"):
        read_options("rlr", {"redaing": "I"})
    with pytest.raises(ValueError, match="options of ddpo: clip must be < 1, got 1.5"):
        read_options("ddpo", {"clip": 1.5})
