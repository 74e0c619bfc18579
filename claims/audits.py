"""Audits and plans: the chapter *At scale* on a user's model, and what its estimators cost there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from claims.at_scale import chapter, differentiable
from claims.claim import Claim
from claims.on_model import Model, prepared
from claims.records import Column, Evidence, Figure, Run, Series, Table, write_atomically
from claims.run import Settings, examine_claim, run_here
from scale.audit import measure, predicted_bytes
from scale.config import Config, chain_steps, digest
from scale.config import Method as Choice
from scale.methods import METHODS, check_options
from scale.plan import COLUMNS, Advice, Measured, prediction_text, recommend, table
from verdicts.ledger import Ledger

FILE = "measured.json"
DEFAULTS = ("first-order", "srt", "policy-gradient", "tho", "rlr")


def audit(
    config: Config,
    folder: Path,
    cache: Path,
    resume: bool,
    on_start: Callable[[str, int], None],
    on_done: Callable[[Evidence | str], None],
) -> Run:
    """Judge the chapter's claims on the model of `config`, measure its estimators, and return the run for a report.

    Writes `measured.json`, which `plan` reads, beside the evidence.

    Raises:
        ValueError: if the model cannot be built, or the folder holds an audit of other settings.
    """
    model = Model(config.model.path or config.model.kind, config)
    marked = folder / "model.json"
    if resume and marked.exists() and json.loads(marked.read_text(encoding="utf-8")) != _identity(config):
        raise ValueError(f"{folder} holds the audit of other settings: name another folder")
    at = prepared(model, cache, config.training.seed)
    claims = chapter((model,))
    names = choices(config)
    on_start(at.task.describe(), len(claims) + len(names))
    write_atomically(marked, json.dumps(_identity(config)))
    measured = measure(at.task, names, config.audit.measured, config.audit.measured_batch, on_done)
    write_atomically(folder / FILE, json.dumps([dataclasses.asdict(m) for m in measured], indent=1))
    told = replace(
        claims[0],
        figures=lambda context: (_frontier(measured),),
        tables=lambda context: (_model_table(at.task.describe(), config), _measured_table(measured, config)),
    )
    claims = (told, *claims[1:])
    sampled = [name for claim in claims for name in claim.statistical_readings()]
    share = Ledger(config.audit.error, sampled).spend if sampled else (lambda name: 0.0)
    settings = Settings(config.training.seed, "standard", folder, config.audit.error)

    def examined(wanted: tuple[Claim, ...]) -> Iterator[Evidence]:
        yield from (examine_claim(claim, settings, share, cache) for claim in wanted)

    return run_here(claims, settings, resume, lambda: None, on_done, examined)


def choices(config: Config) -> list[Choice]:
    """Return the estimators that are measured: the settings' own, those asked for, and the usual ones."""
    smooth, steps = differentiable(Model("", config)), chain_steps(config)
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
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{folder} holds no audit: run `verifine audit` on the same CONFIG with --out {folder}")
    if json.loads((folder / "model.json").read_text(encoding="utf-8")) != _identity(config):
        raise ValueError(f"{folder} holds the audit of other settings: audit this CONFIG, or name another folder")
    measured = tuple(Measured(**entry) for entry in json.loads(file.read_text(encoding="utf-8")))
    model = Model(config.model.path or config.model.kind, config)
    advice = recommend(measured, limit, config.training.batch, differentiable(model))
    first = next((m for m in measured if m.estimator == "first-order"), measured[0])
    predicted = predicted_bytes(config, cache, first.estimator, first.batch)
    return Plan(model.name, measured, advice, f"{first.estimator}: {prediction_text(predicted, first.peak_bytes)}")


def _identity(config: Config) -> dict[str, str]:
    return {"settings": digest(config)}


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
    advice = recommend(measured, None, config.training.batch, differentiable(Model("", config)))
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
