"""The benchmarks compare equal work: each naive loop gives the library's numbers. Nothing here is timed."""

import json

import numpy as np
import pytest
import torch

from benchmarks import estimators as bench
from benchmarks import implicit, policy_iteration, unet

CASES = {"linear-gaussian": bench.linear_gaussian(), "mlp": bench.mlp(steps=4)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", bench.pairs(4))
def test_naive_loop_gives_the_librarys_numbers(case, name):
    bench.check(case, name)


# --- the U-Net, here a small one ---------------------------------------------------------------------------------

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
STEPS = 4


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(unet, "UNET", SMALL)
    monkeypatch.setattr(unet, "OUT", tmp_path)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_problem(device="cpu", steps=STEPS, checkpointing=False):
    return unet.problem(8, steps, 1.0, checkpointing, device)


@pytest.mark.parametrize("name", [*unet.ESTIMATORS, unet.ONE_GRAPH])
def test_workload_makes_the_forward_passes_it_announces(name):
    work, problem, passes = unet.workload(name, STEPS), small_problem(), []
    problem.chain.network.register_forward_pre_hook(lambda *_: passes.append(1))
    work.run(problem, 1)
    assert len(passes) == work.forwards


@pytest.mark.parametrize("name", [name for name in unet.ESTIMATORS if name != "truncated"])
def test_estimators_pay_every_step_once_on_average(name):
    least, make = unet.ESTIMATORS[name]
    for steps in (least, least + 3):
        np.testing.assert_allclose(make(steps).credit.row_sums(), 1, atol=1e-12)


def test_srt_runs_the_length_it_has_on_average():
    credit = unet.srt(6).credit
    reach = [(matrix[:, 0] > 0).sum() for matrix in credit.matrices]
    assert credit.probabilities @ reach == pytest.approx(3)
    assert reach[unet.typical(credit)] == 3


def test_one_graph_takes_the_gradient_of_first_order(monkeypatch):
    problem, found = small_problem(), []

    def keep(params, returns):
        found.append({name: p.grad.clone() for name, p in params.items()})
        for p in params.values():
            p.grad = None
        return float(returns.mean())

    monkeypatch.setattr(unet, "finished", keep)
    returns = [unet.workload(name, STEPS).run(problem, 2) for name in ("first-order", unet.ONE_GRAPH)]
    assert returns[0] == pytest.approx(returns[1])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-6)
    assert any(grad.any() for grad in found[0].values())


def test_peak_of_the_sweep_grows_with_its_latents_only_and_that_of_one_graph_with_the_steps():
    def peak(name, steps):
        return unet.counted(unet.workload(name, steps), small_problem(steps=steps), 1)["counted"]

    latents = 4 * 8 * 8 * 4  # bytes of one
    for name in ("first-order", "policy-gradient"):
        assert peak(name, 4) - peak(name, 2) <= 2 * 4 * latents
    assert peak(unet.ONE_GRAPH, 4) > 1.8 * peak(unet.ONE_GRAPH, 2)


def test_short_chains_leave_out_what_they_have_no_room_for():
    names = list(unet.ESTIMATORS)
    assert list(unet.workloads(names, 4)) == names
    assert set(names) - set(unet.workloads(names, 2)) == {"srt", "rlr"}
    assert set(unet.workloads(names, 1)) == {"policy-gradient", "first-order", "truncated", "zeroth-order"}


def test_command_writes_what_it_measured_under_the_name_of_its_options(threads, tmp_path, capsys):
    arguments = ["--size", "8", "--steps", "1", "--checkpointed", "--measure", "counted", "growth", "predicted"]
    unet.main([*arguments, "--estimators", "first-order", "srt"])
    record = json.loads(
        (tmp_path / "unet-64px-1-steps-first-order-srt-checkpointed-predicted-growth-counted.json").read_text()
    )
    assert list(record["sections"]) == list(unet.SECTIONS)
    for (row,) in record["sections"].values():
        assert row["name"] == "first-order"
        assert row["seconds"] > 0
        assert row["growth"] >= 0
        assert row["cpu seconds"] > 0
        assert 0 < row["per further sample"] < row["predicted"] == pytest.approx(row["counted"], rel=0.01)
    assert "srt left out: it needs 4 steps or more" in capsys.readouterr().out


def test_interrupted_command_keeps_what_it_has(threads, tmp_path, monkeypatch, capsys):
    def counted(work, real, batch):
        if work.title == "first order":
            raise KeyboardInterrupt
        return {"counted": 1, "seconds": 2.0, "cpu seconds": 2.0}

    monkeypatch.setitem(unet.MEASURE, "counted", counted)
    unet.main(["--size", "8", "--steps", "2"])
    (file,) = tmp_path.iterdir()
    ((row,),) = json.loads(file.read_text())["sections"].values()
    assert row["name"] == "policy-gradient"
    assert "stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--size", "12"], "--size must be a multiple of 8, got 12"),
        (["--steps", "3", "--estimators", "srt"], "--steps must be >= 4 for srt, got 3"),
        (["--estimators", "ddpo"], "invalid choice: 'ddpo'"),
    ],
)
def test_wrong_options_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        unet.main(arguments)
    assert message in capsys.readouterr().err


# --- policy iteration --------------------------------------------------------------------------------------------


def test_policy_iteration_writes_the_error_of_every_grid_but_the_finest(threads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policy_iteration, "OUT", tmp_path)
    case = policy_iteration.cases(quick=True)[0]
    monkeypatch.setattr(policy_iteration, "cases", lambda quick: [case])
    policy_iteration.main(["--quick"])
    finest, coarse = json.loads((tmp_path / "policy_iteration.json").read_text())["rows"]
    assert finest["error of V"] is None
    assert 0 < coarse["error of V"] < 1e-12 < coarse["ripple"]
    assert coarse["points per axis"] < finest["points per axis"]
    assert "error against the first grid" in capsys.readouterr().out


# --- Implicit Diffusion ------------------------------------------------------------------------------------------


def test_closed_forms_make_the_steps_that_autograd_makes():
    known, found = implicit.our_loop(2), implicit.our_loop(2, autograd=True)
    begun = known.params["theta"].detach().clone()
    for loop in (known, found):
        loop.run(20)
    torch.testing.assert_close(known.params["theta"], found.params["theta"], rtol=0, atol=1e-5)
    torch.testing.assert_close(known.particles, found.particles, rtol=0, atol=1e-4)
    assert float((known.params["theta"].detach() - begun).abs().min()) > 1e-3
    assert not hasattr(found.sampler.potential, "slope")


def test_closed_forms_are_autograds_for_weights_that_do_not_add_to_zero_and_twice():
    mixture, generator = implicit.RELEASED.mixture, torch.Generator().manual_seed(0)
    theta, x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 6), (2, 50, 2), (2, 50))
    )
    params, x = {"theta": theta.requires_grad_()}, x.mul(3).requires_grad_()
    (expected,) = torch.autograd.grad((weight * mixture(params, x)).sum(), theta)
    torch.testing.assert_close(mixture.pull(params, x, weight)["theta"], expected)
    (expected,) = torch.autograd.grad(mixture(params, x).sum(), x, create_graph=True)
    slope = mixture.slope(params, x)
    torch.testing.assert_close(slope, expected)
    twice = [torch.autograd.grad(each.sin().sum(), (theta, x)) for each in (slope, expected)]
    torch.testing.assert_close(*twice)


@pytest.fixture
def jax(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    found = implicit.load_jax()
    if found is None:
        pytest.skip("JAX is not installed")
    return found


@pytest.mark.parametrize("known", [False, True], ids=["grad", "closed forms"])
@pytest.mark.parametrize("autograd", [False, True], ids=["ours by closed forms", "ours by autograd"])
def test_the_loop_in_jax_makes_the_same_of_the_same_noise(jax, autograd, known):
    assert implicit.disagreement(jax, autograd, known) < implicit.TOLERANCE


def test_a_loop_in_jax_that_differs_is_found(jax, monkeypatch):
    right = implicit.JaxLoop.__init__

    def quieter(self, jax, known):
        right(self, jax, known)
        move = self.move
        self.move = lambda theta, x, noise: move(theta, x, 0.999 * noise)

    monkeypatch.setattr(implicit.JaxLoop, "__init__", quieter)
    assert implicit.disagreement(jax) > 10 * implicit.TOLERANCE


def test_both_ways_in_jax_make_all_the_steps(jax):
    whole, called = implicit.JaxLoop(jax), implicit.JaxLoop(jax)
    called.call_steps(11)
    short = np.asarray(called.state[0])
    called.call_steps(1)
    for _ in range(2):
        whole.call_whole(6)
    np.testing.assert_allclose(whole.state[0], called.state[0], atol=1e-5)
    assert np.abs(np.asarray(whole.state[0]) - short).max() > 1e-3


def test_implicit_writes_its_times_with_or_without_jax(threads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(implicit, "OUT", tmp_path)
    monkeypatch.setattr(implicit, "load_jax", lambda: None)
    implicit.main(["--quick"])
    record = json.loads((tmp_path / "implicit.json").read_text())
    assert [row["loop"] for row in record["seconds"]] == ["ours", "ours, autograd", "ours"]
    assert record["ratios"] == []
    assert "JAX is not installed" in capsys.readouterr().out


def test_ratios_compare_single_repetitions():
    def row(name, repetitions, compiled, plain):
        turns = [{"with compilation": (compiled, compiled), "without compilation": (plain, plain)}] * 3
        return implicit.row(name, repetitions, 100, turns)

    ours = implicit.row("ours", 1, 100, [{"without compilation": (1.0, seconds)} for seconds in (3.0, 1.0, 2.0)])
    assert ours["ms a step and repetition"] == 20
    rows = [ours, row("JAX, jitted step", 1, 8.0, 4.0), row("JAX, jitted step", 10, 80.0, 40.0)]
    (found,) = implicit.ratios(rows)
    assert found["processor, without compilation"] == 0.5
    assert found["processor, with compilation"] == 0.25
    assert found["wall, with compilation"] == 0.125
