"""Several processes are one: accelerate's two make the updates of one, and none runs on without the others."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scale import checkpoints
from scale.config import Config, digest, load_config, print_config
from scale.launch import launch
from scale.logs import read_metrics
from scale.processes import Processes

ROOT = Path(__file__).parents[2]
FAST = ["device=auto", "prompts.held_out=null", "training.grid_every=null", "logging.tensorboard=false"]
FAST += ["evaluation={samples: 2, batch: 2}", "training.micro_batch=null"]
# Small steps, since AdamW turns the rounding of an entry that is almost zero into a whole step, and wide noise on the
# parameters, since RLR divides a difference of two rewards by it.
FAST += ["training.learning_rate=1e-4"]
METHODS = {
    "policy-gradient": "method={name: policy-gradient, baseline: leave-one-out}",
    "rlr": "method={name: rlr, options: {h: 1, std: 0.1}, baseline: leave-one-out}",
}

# Run by both processes: each method to its end; a stop that only the second is asked for; a disk full for the first.
SCRIPT = """
import errno, os, signal, sys
from pathlib import Path

import torch
torch.cuda.is_available = lambda: False  # two processes on one GPU cannot talk through it

from accelerate import PartialState
from scale import launch as module
from scale.config import load_config

destroy = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda *group: None  # there is one group in the life of a process
folder, cache, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])


def joined(task, done):
    state = PartialState()
    assert (state.num_processes, state.process_index) == (2, rank), state
    assert torch.distributed.is_initialized() and torch.distributed.get_world_size() == 2


def run(name, **more):
    config = load_config(folder / f"{name}.yaml")
    return module.launch(config, folder / name, cache, on_start=joined, **more)


def stop(update, updates, reward):
    if rank == 1 and update == 1:
        signal.raise_signal(signal.SIGTERM)


def full(*arguments):
    raise OSError(errno.ENOSPC, "full")


for name in ("policy-gradient", "rlr"):
    done = run(name)
    assert done.finished and (done.evaluation is not None) == (done.weights is not None) == (rank == 0)
    torch.save(done.params, folder / f"{name}-{rank}.pt")
done = run("stopped", on_update=stop)
assert (done.finished, done.update) == (False, 2), done
(folder / f"stopped-{rank}").touch()
torch.distributed.destroy_process_group = destroy
if rank == 0:
    module.checkpoints.save = full
try:
    run("full")
except OSError as fault:
    assert rank == 0 and fault.errno == errno.ENOSPC, fault
except RuntimeError as fault:
    assert rank == 1, fault
else:
    raise AssertionError("the run with a full disk ended well")
assert not torch.distributed.is_initialized()
(folder / f"full-{rank}").touch()
"""


def settings(name: str) -> Config:
    more = ["training.updates=4"] if name in ("stopped", "full") else []
    return load_config("tiny-brightness", [*FAST, METHODS.get(name, METHODS["policy-gradient"]), *more])


@pytest.fixture(scope="module")
def together(cache, tmp_path_factory) -> Path:
    """The folder in which two processes have run the script."""
    folder = tmp_path_factory.mktemp("together")
    for name in (*METHODS, "stopped", "full"):
        (folder / f"{name}.yaml").write_text(print_config(settings(name)))
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(folder), str(cache)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_make_the_updates_of_one(name, together, cache, tmp_path):
    config = settings(name).model_copy(update={"device": "cpu"})
    launch(config, tmp_path / "run", cache)
    for update in (1, 2):
        file = f"checkpoints/checkpoint-{update:06d}.pt"
        alone, both = (checkpoints.load(f / file, digest(config)).state for f in (tmp_path / "run", together / name))
        for p, wanted in both_of(both["params"], alone["params"]):
            torch.testing.assert_close(p, wanted, rtol=0, atol=1e-6)
        # AdamW's first moments: after one update its gradient, after two a weighted sum of both.
        found, wanted = (
            torch.cat([m["exp_avg"].flatten() for m in state["optimizer"]["state"].values()]) for state in (both, alone)
        )
        assert float(wanted.norm()) > 0
        # From the second update on, AdamW has turned rounding into steps.
        assert float((found - wanted).norm()) < {1: 1e-6, 2: 1e-3}[update] * float(wanted.norm())
        assert both["history"]["samples"] == alone["history"]["samples"]
    for line, wanted in zip(read_metrics(together / name), read_metrics(tmp_path / "run"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)


def both_of(a: dict, b: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    assert a.keys() == b.keys()
    return [(a[name], b[name]) for name in a]


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_hold_the_same_bits(name, together):
    first, second = (torch.load(together / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(p, q) for p, q in both_of(first, second))
    held = checkpoints.load(together / name / "checkpoints", digest(settings(name))).state["params"]
    assert all(torch.equal(p, q) for p, q in both_of(first, held))


def test_a_stop_that_reaches_one_process_stops_both_after_the_same_update(together):
    assert (together / "stopped-0").exists()
    assert (together / "stopped-1").exists()
    assert checkpoints.load(together / "stopped" / "checkpoints", digest(settings("stopped"))).update == 2


def test_an_error_of_one_process_ends_both(together):
    assert (together / "full-0").exists()
    assert (together / "full-1").exists()


# Alone where there should be others


def test_a_process_alone_needs_no_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    alone = Processes.here()
    assert (alone.rank, alone.world, alone.main, alone.any(True), alone.any(False)) == (0, 1, True, True, False)
    assert alone.device(torch.device("cuda:3")) == torch.device("cuda:3")
    division = alone.division(2)
    assert (division.micro_batch, division.world) == (2, 1)
    alone.wait()
    alone.leave()


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch, cache, tmp_path):
    import accelerate

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", lambda cpu: SimpleNamespace(num_processes=1, process_index=0))
    said = "2 processes were asked for, 1 met: start them with torchrun --nproc-per-node 2"
    with pytest.raises(ValueError, match=said):
        launch(settings("rlr"), tmp_path / "run", cache)
    assert not (tmp_path / "run").exists()


def test_a_process_whose_partner_does_not_come_is_refused(monkeypatch, cache, tmp_path):
    import datetime

    from accelerate.state import AcceleratorState

    whole = torch.distributed.init_process_group

    def soon(*arguments: object, **options: object) -> None:
        whole(*arguments, **options, timeout=datetime.timedelta(seconds=1))

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", soon)
    try:
        with pytest.raises(ValueError, match="2 processes were asked for, they did not meet"):
            Processes.here(cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_each_process_takes_its_own_gpu():
    third = Processes(2, 4, SimpleNamespace(device=torch.device("cuda:2")))
    assert third.device(torch.device("cuda")) == torch.device("cuda:2")
    assert third.device(torch.device("cpu")) == torch.device("cpu")
    assert not third.main


def test_what_is_gathered_lies_where_the_processes_talk_and_comes_back():
    met = []

    def gather(value: torch.Tensor) -> torch.Tensor:
        met.append(value.device.type)
        return torch.ones(2, *value.shape[1:])

    first = Processes(0, 2, SimpleNamespace(device=torch.device("meta"), gather=gather))
    assert first.any(False)
    assert torch.equal(first.division(None).add(torch.zeros(3)), torch.full((3,), 2.0))
    assert met == ["meta", "meta"]


@pytest.mark.parametrize("well", [True, False])
def test_a_process_that_failed_does_not_wait_for_the_others(well):
    met = []
    accelerator = SimpleNamespace(wait_for_everyone=lambda: met.append("wait"), end_training=lambda: met.append("end"))
    Processes(1, 2, accelerator).leave(together=well)
    assert met == (["wait", "end"] if well else ["end"])


def test_a_failed_launch_leaves_the_others_at_once(monkeypatch, cache, tmp_path):
    left = []
    monkeypatch.setattr(Processes, "leave", lambda processes, together=True: left.append(together))
    config = settings("rlr")
    launch(config.model_copy(update={"device": "cpu"}), tmp_path / "run", cache)
    assert left == [True]
    with pytest.raises(ValueError, match="holds a run already"):
        launch(config, tmp_path / "run", cache)
    assert left == [True, False]
