"""A launch as a job: it runs, goes on where it was, starts a process on each GPU, and says what is missing."""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import verifine
from scale import checkpoints, cluster
from scale.cluster import Job, submit
from scale.config import digest, load_config

submitit = pytest.importorskip("submitit")

FAST = ["device=cpu", "prompts.held_out=null", "training.grid_every=null", "logging.tensorboard=false"]
FAST += ["evaluation={samples: 2, batch: 2}", "sampler.steps=2", "method={name: policy-gradient}"]


@pytest.fixture(scope="module")
def config():
    return load_config("tiny-brightness", FAST)


class Recorder:
    """An executor that notes what it was asked for, and submits nothing."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self.folder, self.parameters, self.jobs = folder, {}, []
        self.job_id = "7"

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters |= parameters

    def submit(self, job: Job) -> Any:
        self.jobs.append(job)
        return self


@pytest.fixture
def recorded(monkeypatch):
    made: list[Recorder] = []

    def executor(folder: Path, cluster: str) -> Recorder:
        made.append(Recorder(folder, cluster))
        return made[-1]

    monkeypatch.setattr(submitit, "AutoExecutor", executor)
    return made


def test_a_job_runs_the_launch_and_goes_on_when_it_is_asked_again(config, cache, tmp_path, monkeypatch):
    def closing(logger: logging.Logger, handler: logging.Handler) -> None:
        remove(logger, handler)
        handler.close()  # submitit's debug executor leaves its log files open

    remove = logging.Logger.removeHandler
    monkeypatch.setattr(logging.Logger, "removeHandler", closing)
    monkeypatch.chdir(tmp_path)
    said = submit(config, Path("run"), cache, "debug")
    assert said.endswith(f"writes to run; its output is in {tmp_path / 'run' / 'jobs'}")
    assert checkpoints.load(tmp_path / "run" / "checkpoints", digest(config)).update == 2
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["update"] == 2
    with pytest.raises(ValueError, match="holds a run already: resume it, or name another folder"):
        submit(config, Path("run"), cache, "debug")
    longer = config.model_copy(update={"training": config.training.model_copy(update={"updates": 3})})
    submit(longer, Path("run"), cache, "debug", resume=True)
    assert checkpoints.load(tmp_path / "run" / "checkpoints", digest(config)).update == 3


def test_a_job_is_queued_again_as_it_is(config, tmp_path):
    job = Job(config, tmp_path / "run", tmp_path / "cache")
    again = job.checkpoint()
    assert again.function is job


@pytest.mark.parametrize(("device", "gpus", "processes"), [("auto", 4, 4), ("cuda", 1, 1), ("cpu", 4, 1)])
def test_a_process_runs_on_each_gpu(device, gpus, processes, tmp_path, recorded):
    config = load_config("tiny-brightness", [*FAST, f"device={device}"])
    submit(config, tmp_path / "run", tmp_path / "cache", "slurm", gpus=gpus, hours=3)
    (made,) = recorded
    assert made.parameters["tasks_per_node"] == processes
    assert made.parameters["gpus_per_node"] == (0 if device == "cpu" else gpus)
    assert made.parameters["timeout_min"] == 180
    assert made.jobs == [Job(config, tmp_path / "run", tmp_path / "cache")]


def test_a_job_of_several_tasks_joins_them(config, cache, tmp_path, monkeypatch):
    import submitit.helpers

    import scale.launch

    joined = []

    class Environment:
        num_tasks = 2

    class Group:
        def export(self, **options: bool) -> None:
            joined.append(options)

    def launched(*arguments: object, **options: object) -> Any:
        raise LookupError("launched")

    monkeypatch.setattr(submitit, "JobEnvironment", Environment)
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", Group)
    monkeypatch.setattr(scale.launch, "launch", launched)
    with pytest.raises(LookupError, match="launched"):
        Job(config, tmp_path, cache)()
    assert joined == [{"set_cuda_visible_devices": False, "overwrite": True}]


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is a Slurm here")
def test_without_slurm_the_line_says_so(config, cache, tmp_path):
    with pytest.raises(ValueError, match="executor 'slurm' is not to be had here: .*slurm"):
        submit(config, tmp_path / "run", cache, "slurm")


def test_without_submitit_the_line_says_what_to_install(config, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"needs submitit: install verifine\[cluster\]"):
        submit(config, tmp_path / "run", cache, "local")


def test_the_front_door_hands_a_launch_over(cache, tmp_path, monkeypatch, capsys):
    handed = []

    def handing(*arguments: object) -> str:
        handed.append(arguments)
        return "job 7 writes there"

    monkeypatch.setattr(cluster, "submit", handing)
    ask = ["launch", "tiny-brightness", "--out", str(tmp_path / "run"), "--cache", str(cache), "--executor", "slurm"]
    assert verifine.main([*ask, "--gpus", "2", "--hours", "5", "--resume"]) == 0
    assert capsys.readouterr().out == "job 7 writes there\n"
    assert handed == [(load_config("tiny-brightness"), tmp_path / "run", cache, "slurm", 2, 5, True)]
    assert verifine.main([*ask, "--from", "a.pt"]) == 2
    said = "verifine: --from a.pt needs --executor here: a job goes on from the latest checkpoint\n"
    assert capsys.readouterr().err == said
