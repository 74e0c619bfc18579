"""A launch as a job of its own: on this machine, or on a Slurm cluster, by submitit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scale.config import Config


@dataclass(frozen=True)
class Job:
    """A launch that goes on from its latest checkpoint whenever it is started again."""

    config: Config
    folder: Path
    cache: Path

    def __call__(self) -> int:
        """Run, and return the updates made."""
        from scale.launch import launch

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
) -> str:
    """Submit a launch, and return a line that says what to watch.

    Paths are made absolute: a job starts in a folder of its own.

    Raises:
        ValueError: if submitit is not installed, or there is no Slurm here.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("an executor needs submitit: install verifine[cluster]") from None
    logs = folder.resolve() / "jobs"
    try:
        made = submitit.AutoExecutor(folder=logs, cluster=executor)
    except RuntimeError as fault:
        raise ValueError(f"executor {executor!r} is not to be had here: {fault}") from None
    made.update_parameters(timeout_min=60 * hours, name="verifine", tasks_per_node=1)
    if executor == "slurm":
        made.update_parameters(gpus_per_node=gpus, slurm_signal_delay_s=120)
    job = made.submit(Job(config, folder.resolve(), cache.resolve()))
    if executor == "debug":
        job.result()
    return f"job {job.job_id} writes to {folder}; its output is in {logs}"
