"""Audits and plans: the chapter *At scale* on a user's model, and what its estimators cost there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from claims.at_scale import chapter
from claims.claim import Claim
from claims.on_model import Model, is_large
from claims.on_samples import MOST, SAMPLED_UP_TO, SameMean
from claims.records import Column, Evidence, Figure, Run, Series, Table, write_atomically
from claims.run import Settings, examine_claim, run_here, source_digest
from scale.audit import measure, predicted_bytes
from scale.config import Config, chain_steps, digest, nearest
from scale.config import Method as Choice
from scale.methods import METHODS, check_options
from scale.plan import COLUMNS, Advice, Measured, prediction_text, recommend, table
from scale.task import Task, build
from verdicts.ledger import Ledger

FILE, MARK = "measured.json", "model.json"
DEFAULTS = ("first-order", "srt", "policy-gradient", "tho", "rlr")


def audit(
    config: Config,
    folder: Path,
    cache: Path,
    resume: bool,
    on_start: Callable[[str, int], None],
    on_done: Callable[[Evidence | str], None],
    jobs: int = 1,
    wanted: Sequence[str] = (),
) -> Run:
    """Judge the chapter's claims on the model of `config`, measure its estimators, and return the run for a report.

    Writes `measured.json`, which `plan` reads, beside the evidence.

    Args:
        jobs: processes that judge claims, on the processor; a GPU is used by one.
        wanted: identifiers of the claims to judge; none for all. The shares of the error budget are the same.

    Raises:
        ValueError: if the model cannot be built, a claim is not known or does not apply, or the folder holds an audit of
            other settings.
    """
    there = _marked(folder)
    if resume and there and there["settings"] != digest(config):
        raise ValueError(f"{folder} holds the audit of other settings: name another folder")
    task = build(config, cache)
    model = _model(config, task)
    claims, names = _chosen(chapter((model,)), wanted), choices(config)
    on_start(task.describe(), len(claims) + len(names))
    mark = {"settings": digest(config), "source": source_digest()}
    if resume and there == mark and (folder / FILE).is_file():
        measured = _read(folder)
        for known in measured:
            on_done(known.estimator)
    else:
        (folder / FILE).unlink(missing_ok=True)
        write_atomically(folder / MARK, json.dumps(mark))
        measured = measure(task, names, config.audit.measured, config.audit.measured_batch, on_done)
        write_atomically(folder / FILE, json.dumps([dataclasses.asdict(m) for m in measured], indent=1))
    settings = Settings(config.training.seed, "standard", folder, config.audit.error, model.name)

    def examined(wanted: tuple[Claim, ...]) -> Iterator[Evidence]:
        groups = _groups(wanted)
        if jobs == 1 or len(groups) == 1 or task.device.type != "cpu":
            found = (_examine(claim, model, settings, cache) for group in groups for claim in group)
        else:
            found = _in_parallel([[claim.id for claim in group] for group in groups], model, settings, cache, jobs)
        for evidence in found:
            # The first claim's page shows the model and its estimators.
            yield (
                replace(evidence, **_told(task, config, measured))
                if evidence.statement.id == claims[0].id
                else evidence
            )

    return run_here(claims, settings, resume, lambda: None, on_done, examined)


def _chosen(claims: tuple[Claim, ...], wanted: Sequence[str]) -> tuple[Claim, ...]:
    known = [claim.id for claim in claims]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--claim {name}: no claim about this model{nearest(name, known)}")
    return tuple(claim for claim in claims if claim.id in wanted or not wanted)


def _marked(folder: Path) -> dict[str, str]:
    file = folder / MARK
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _read(folder: Path) -> list[Measured]:
    return [Measured(**entry) for entry in json.loads((folder / FILE).read_text(encoding="utf-8"))]


def _model(config: Config, task: Task) -> Model:
    """Return the model, with what only the loaded network tells."""
    most = config.audit.samples
    if most is None:
        most = MOST if sum(p.numel() for p in task.chain.network.parameters()) <= SAMPLED_UP_TO else 0
    densities = all(task.chain.std(t) > 0 for t in range(1, task.chain.steps + 1))
    return Model(config.model.path or config.model.kind, config, most > 0, densities, is_large(task))


def _groups(claims: tuple[Claim, ...]) -> list[list[Claim]]:
    """Return the claims that share roll-outs together; those that sample nothing are a group of their own."""
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        sampled = [check.judge.group.name for check in claim.checks if isinstance(check.judge, SameMean)]
        groups.setdefault(sampled[0] if sampled else "", []).append(claim)
    return list(groups.values())


def _examine(claim: Claim, model: Model, settings: Settings, cache: Path) -> Evidence:
    names = [name for each in chapter((model,)) for name in each.statistical_readings()]
    share = Ledger(settings.alpha, names).spend if names else (lambda name: 0.0)
    return examine_claim(claim, settings, share, cache)


def _examine_group(ids: list[str], model: Model, settings: Settings, cache: Path) -> list[Evidence]:
    torch.set_num_threads(1)  # or the processes fight for the cores
    by_id = {claim.id: claim for claim in chapter((model,))}
    return [_examine(by_id[i], model, settings, cache) for i in ids]


def _in_parallel(
    groups: list[list[str]], model: Model, settings: Settings, cache: Path, jobs: int
) -> Iterator[Evidence]:
    """Yield evidence as worker processes hand it back, group by group."""
    import joblib

    parallel: Any = joblib.Parallel
    tasks = (joblib.delayed(_examine_group)(ids, model, settings, cache) for ids in groups)
    for found in parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")(tasks):
        yield from found


def _told(task: Task, config: Config, measured: list[Measured]) -> dict[str, Any]:
    """Return the figures and tables on the model as a whole."""
    return {
        "figures": (_frontier(measured),),
        "tables": (_model_table(task.describe(), config), _measured_table(measured, config)),
    }


def choices(config: Config) -> list[Choice]:
    """Return the estimators that are measured: the settings' own, those asked for, and the usual ones."""
    smooth, steps = Model("", config).differentiable, chain_steps(config)
    usual = [Choice(name=name) for name in DEFAULTS if _suits(name, steps, config.audit.measured_batch)]
    given = [config.method, *config.audit.estimators, *usual]
    fit = [c for c in given if METHODS[c.name].loss is None and (smooth or not METHODS[c.name].differentiable)]
    kept: dict[str, Choice] = {}
    for choice in fit:
        kept.setdefault(choice.name, choice)
    return list(kept.values())


def _suits(name: str, steps: int, batch: int) -> bool:
    """Return whether a method's default options suit a chain of that length."""
    try:
        check_options(name, {}, steps, batch)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Plan:
    """What to take: the measurements, the advice, and the memory as predicted and as measured."""

    model: str
    measured: tuple[Measured, ...]
    advice: Advice
    memory: str


def planned(config: Config, folder: Path, cache: Path, limit: int | None) -> Plan:
    """Return the plan for a model that was audited.

    Raises:
        ValueError: if the folder holds no audit, or one of other settings.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder} holds no audit: run `verifine audit` on the same CONFIG with --out {folder}")
    if _marked(folder).get("settings") != digest(config):
        raise ValueError(f"{folder} holds the audit of other settings: audit this CONFIG, or name another folder")
    measured = tuple(_read(folder))
    model = Model(config.model.path or config.model.kind, config)
    advice = recommend(measured, limit, config.training.batch, model.differentiable)
    first = next((m for m in measured if m.estimator == "first-order"), measured[0])
    predicted = predicted_bytes(config, cache, first.estimator, first.batch)
    return Plan(model.name, measured, advice, f"{first.estimator}: {prediction_text(predicted, first.peak_bytes)}")


def _model_table(description: str, config: Config) -> Table:
    rows = (
        ("model", description),
        ("reward", config.reward.name),
        ("prompts", "; ".join(p if isinstance(p, str) else " / ".join(p) for p in config.prompts.train[:8])),
        ("method", config.method.name),
    )
    return Table(
        "model", "What was audited", "The model and its settings.", (Column("", "left"), Column("", "left")), rows
    )


def _measured_table(measured: list[Measured], config: Config) -> Table:
    advice = recommend(measured, None, config.training.batch, Model("", config).differentiable)
    columns = tuple(Column(name, "left" if i == 0 else "right") for i, name in enumerate(COLUMNS))
    return Table(
        "measured", "Estimators on this model", advice.why, columns, tuple(table(measured, config.training.batch))
    )


def _frontier(measured: list[Measured]) -> Figure:
    series = tuple(
        Series(m.estimator, (m.peak_bytes / 2**20,), (m.relative_variance * m.seconds,), style="points")
        for m in measured
    )
    return Figure(
        name="frontier",
        title="Work and memory of the estimators on this model",
        caption="Relative variance times seconds per sample, against peak memory: lower and further left is better. Biased "
        "estimators are marked in the table.",
        alt="A scatter plot with one point per estimator: peak memory across, work upwards, both logarithmic.",
        x_label="peak memory / MiB",
        y_label="relative variance × seconds per sample",
        x_scale="log",
        y_scale="log",
        series=series,
    )
