"""A launch as a job of its own: on this machine, or on a Slurm cluster, by submitit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scale.config import Config, learns_from_data


@dataclass(frozen=True)
class Job:
    """A launch that goes on from its latest checkpoint whenever it is started again."""

    config: Config
    folder: Path
    cache: Path

    def __call__(self) -> int:
        """Run, as one of several processes where the job has several tasks, and return the updates made."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        from scale.launch import launch

        if JobEnvironment().num_tasks > 1:
            # Every process sees all GPUs of its machine, and takes the one of its local rank.
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return launch(self.config, self.folder, self.cache, resume=True).update

    def checkpoint(self) -> Any:
        """Return the job to be queued again when Slurm takes the machine back."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    config: Config,
    folder: Path,
    cache: Path,
    executor: Literal["local", "slurm", "debug"],
    gpus: int = 1,
    hours: int = 24,
    resume: bool = False,
) -> str:
    """Submit a launch, and return a line that says what to watch.

    Paths are made absolute: a job starts in a folder of its own.

    Args:
        gpus: one process runs on each; none is asked for where the settings name the CPU.
        resume: go on with the run that the folder holds.

    Raises:
        ValueError: if submitit is not installed, there is no Slurm here, or the folder holds another run, or one and
            `resume` is not asked for; if several processes are asked for and the method runs in one only.
    """
    used = 0 if config.device == "cpu" else gpus
    if used > 1 and learns_from_data(config):
        raise ValueError(
            f"gpus must be 1 for method.name = {config.method.name}, which runs in one process, got {gpus}"
        )
    try:
        import submitit
    except ImportError:
        raise ValueError("an executor needs submitit: install verifine[cluster]") from None
    from scale.launch import check_folder

    check_folder(config, folder, resume)
    logs = folder.resolve() / "jobs"
    try:
        made = submitit.AutoExecutor(folder=logs, cluster=executor)
    except RuntimeError as fault:
        raise ValueError(f"executor {executor!r} is not to be had here: {fault}") from None
    made.update_parameters(timeout_min=60 * hours, name="verifine", tasks_per_node=max(used, 1), gpus_per_node=used)
    if executor == "slurm":
        made.update_parameters(slurm_signal_delay_s=120)
    job = made.submit(Job(config, folder.resolve(), cache.resolve()))
    if executor == "debug":
        job.result()
    return f"job {job.job_id} writes to {folder}; its output is in {logs}"
