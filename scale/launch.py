"""A fine-tuning run: the shared loop on a model, with logs, checkpoints, image grids and a result that others can load.

The folder of a run holds config.yaml, metrics.jsonl, images/, checkpoints/, tensorboard/ and, at the end, the trained
weights, evaluation.json and evaluation.png. A run that was killed and is resumed ends with the same weights, bit for
bit, as one that was not: update u draws from a stream of its own, and its prompts follow from u.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from algorithms.chain import Params, for_reward, of_samples, rollout
from algorithms.division import Division
from algorithms.estimators import policy_gradient, with_redrawn_noise
from algorithms.shortcut import ShortcutResult
from algorithms.training import FineTuned, FromEstimator, Method, Settings, Trainer
from scale import checkpoints
from scale.checkpoints import write_atomically
from scale.config import Config, differences, digest, learns_from_data, load_config, print_config
from scale.evaluation import Evaluation, evaluate
from scale.grids import grid
from scale.logs import open_log
from scale.lora import save_lora
from scale.methods import make_method
from scale.processes import Processes
from scale.shortcut import ShortcutRun
from scale.task import Task, build, pick_device

OnUpdate = Callable[[int, int, float], None]
"""Called as on_update(update, updates, mean return of its roll-outs) after each update; with `data`, the critic's."""

Run = Trainer | ShortcutRun


@dataclass(frozen=True, eq=False)
class Launched:
    """How a run ended.

    Attributes:
        update: updates made.
        finished: whether these are all; else the run was asked to stop, and can be resumed.
        weights: file of the trained weights, of a finished run.
    """

    update: int
    finished: bool
    params: Params
    weights: Path | None = None
    evaluation: Evaluation | None = None


def launch(
    config: Config,
    folder: Path,
    cache: Path,
    resume: bool = False,
    start: Path | None = None,
    progress: bool = False,
    on_start: Callable[[Task, int], None] = lambda task, done: None,
    on_update: OnUpdate = lambda update, updates, reward: None,
    on_evaluation: Callable[[int, int], None] = lambda done, total: None,
) -> Launched:
    """Fine-tune the model of `config`, writing to `folder`; every process of a run calls this with the same arguments.

    Args:
        cache: folder of models that are made here, and of downloads.
        resume: go on from the folder's latest checkpoint, if there is one.
        start: a checkpoint to go on from, instead of the latest.
        progress: show what is made before the run, on the terminal.
        on_start: called with the task and the updates made before, once nothing stands in the way.

    Raises:
        ValueError: if the folder holds another run, or one and `resume` is not asked for; if a checkpoint is not good.
        OSError: if something cannot be written; the last good checkpoint is kept.
        FloatingPointError: if a gradient is not finite, the critic's included.
    """
    asked = pick_device(config.device)
    processes = Processes.here(cpu=asked.type == "cpu")
    try:
        if processes.world > 1 and learns_from_data(config):
            raise ValueError(f"method.name = {config.method.name} runs in one process, got {processes.world}")
        again = check_folder(config, folder, resume or start is not None)
        if not processes.main:
            processes.wait()  # until the first has made what is made once: the cached models
        own = config.model_copy(update={"device": str(processes.device(asked))})
        task = build(own, cache, progress and processes.main)
        if processes.main:
            processes.wait()
        trainer = _train(config, folder, task, again, start, on_start, on_update, processes)
    except BaseException:
        processes.leave(together=False)
        raise
    processes.leave()  # before the evaluation, so that no process waits in vain for the one that makes it
    tuned, finished = trainer.result(), trainer.done >= config.training.updates
    if not finished or not processes.main:
        return Launched(trainer.done, finished, tuned.params)
    weights = save_weights(task, chosen(tuned), folder)
    found = evaluate(task, chosen(tuned), folder, on_evaluation, update=trainer.done, cache=cache)
    return Launched(trainer.done, True, tuned.params, weights, found)


def _train(
    config: Config,
    folder: Path,
    task: Task,
    again: bool,
    start: Path | None,
    on_start: Callable[[Task, int], None],
    on_update: OnUpdate,
    processes: Processes,
) -> Run:
    trainer = _trainer(task, processes.division(config.training.micro_batch))
    if again or start is not None:
        _restore(trainer, folder, start, digest(config))
    if processes.main:
        write_atomically(folder / "config.yaml", print_config(config).encode())
    on_start(task, trainer.done)
    with _log(config, folder, trainer.done if again else None, processes) as log, _stoppable() as asked:
        if trainer.done == 0:
            log.write(0, {}, _grids(task, task.params, 0))
        stop = False
        while trainer.done < config.training.updates and not stop:
            trainer.run(1)
            update, params, scalars = trainer.done, trainer.result().params, _scalars(trainer)
            stop = processes.any(bool(asked))
            last = stop or update == config.training.updates
            if processes.main:
                # The line before the checkpoint: a kill between the two costs nothing.
                log.write(update, scalars, _grids(task, params, update))
                if last or update % config.training.checkpoint_every == 0:
                    checkpoints.save(
                        folder / "checkpoints", update, trainer.state_dict(), digest(config), config.training.keep
                    )
            on_update(update, config.training.updates, scalars.get("reward/mean", scalars.get("return/mean", 0.0)))
    return trainer


def load_run(folder: Path, cache: Path, overrides: tuple[str, ...] = ()) -> tuple[Task, Params, int]:
    """Return the task of a run, its latest parameters (their average, where one is kept) and the updates made.

    Raises:
        ValueError: if the folder holds no run, or no good checkpoint.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no run: there is no config.yaml in it")
    config = load_config(folder / "config.yaml", overrides)
    update, state = checkpoints.load(folder / "checkpoints", digest(config))
    task = build(config, cache)
    state = state["generator"] if learns_from_data(config) else state
    params = state["params"] if state["ema"] is None else state["ema"]
    return task, {name: p.to(task.device) for name, p in params.items()}, update


def chosen(tuned: FineTuned | ShortcutResult) -> Params:
    """Return what a run is judged by: the moving average where one is kept, else the parameters."""
    return tuned.params if tuned.ema is None else tuned.ema


def save_weights(task: Task, params: Params, folder: Path) -> Path:
    """Write trained weights as safetensors: adapters of Stable Diffusion as `load_lora_weights` reads them."""
    if "pipeline" in task.parts and task.config.lora is not None:
        return save_lora(task.chain.network, params, folder / "lora")
    from safetensors.torch import save

    file = folder / "weights.safetensors"
    write_atomically(file, save({name: p.detach().cpu().contiguous() for name, p in params.items()}))
    return file


def images(
    task: Task, params: Params, samples: int, *address: str | int, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) and rewards (n,) of samples whose noise has this address below the root stream."""
    condition = task.condition(samples, held_out=held_out)
    noise = policy_gradient(task.chain.steps).draw(task.chain, params, samples, task.generator(*address))
    made, rewards = [], []
    for piece in Division(task.config.evaluation.batch).pieces(samples):
        part = of_samples(condition, piece)
        x0 = rollout(task.chain, params, noise.of(piece), part).latents[0]
        with torch.no_grad():
            made.append(task.decode(x0, for_reward(part)).cpu())
            rewards.append(task.objective.reward(x0, for_reward(part)).cpu())
    return torch.cat(made), torch.cat(rewards)


def check_folder(config: Config, folder: Path, resume: bool) -> bool:
    """Return whether the folder holds this run, to be gone on with.

    Raises:
        ValueError: if it holds another run, or this one and `resume` is not asked for.
    """
    file = folder / "config.yaml"
    if not file.exists():
        return False
    if not resume:
        raise ValueError(f"{folder} holds a run already: resume it, or name another folder")
    held = load_config(file)
    if digest(held) != digest(config):
        raise ValueError(f"{folder} holds a run with other settings: {', '.join(differences(held, config))} differ")
    return True


def _trainer(task: Task, division: Division) -> Run:
    config, training = task.config, task.config.training
    settings = Settings(
        updates=training.updates,
        samples=training.batch,
        learning_rate=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        clip=training.clip,
        ema=training.ema,
    )
    if learns_from_data(config):
        return ShortcutRun(task, settings, division.micro_batch)
    pilot, condition = task.generator("pilot"), task.condition(4096)
    method: Method
    method, _ = make_method(config.method, task.chain, task.params, task.objective, pilot, condition, division)
    if isinstance(method, FromEstimator):
        method = replace(method, estimator=with_redrawn_noise(method.estimator))
    return Trainer(
        task.chain,
        task.params,
        task.objective,
        method,
        settings,
        lambda update: task.generator("update", update),
        lambda update: task.condition(training.batch, start=(update - 1) * training.batch),
    )


def _restore(trainer: Run, folder: Path, start: Path | None, expected: str) -> None:
    held = folder / "checkpoints"
    if start is None and (not held.is_dir() or checkpoints.latest(held) is None):
        return  # killed before its first checkpoint
    trainer.load_state_dict(checkpoints.load(start or held, expected).state)


def _scalars(trainer: Run) -> dict[str, float]:
    if isinstance(trainer, ShortcutRun):
        return trainer.scalars()
    history = trainer.history
    return {
        "reward/mean": history.mean_return[-1],
        "gradient/norm": history.gradient_norm[-1],
        "samples": history.samples[-1],
    }


def _grids(task: Task, params: Params, update: int) -> dict[str, Image.Image]:
    training = task.config.training
    if training.grid_every is None or update % training.grid_every and update != training.updates:
        return {}
    made, rewards = images(task, params, training.grid, "grid")
    return {"samples": grid(made, captions=[f"{r:.3g}" for r in rewards.tolist()])}


class _Silent:
    """The log of a process that does not write."""

    def write(self, *arguments: Any) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _log(config: Config, folder: Path, resumed: int | None, processes: Processes) -> Iterator[Any]:
    if not processes.main:
        yield _Silent()
        return
    trackers = ["tensorboard"] * config.logging.tensorboard + ["wandb"] * (config.logging.wandb is not None)
    log = open_log(folder, trackers, resumed, config.model_dump(mode="json", warnings=False))
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Note Ctrl-C and termination instead of dying of them, so that the update at hand is finished and saved.

    The second Ctrl-C interrupts at once.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, note) for number in numbers]
    except ValueError:  # not in the main thread, where signals do not arrive
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
