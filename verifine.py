"""The front door: `verifine verify | report | claims | show`; on models `audit | plan | launch | evaluate | tune`.

Exit status 0: every verdict is the recorded one; 1: some verdict differs or is inconclusive; 2: wrong usage or input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

# Before NumPy and torch load: one thread per worker, or the workers fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEFAULT_FOLDER = Path("out/report")
CACHE = Path("out/cache")  # of models that are made once


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nverifine: interrupted; what was measured is kept, --resume goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError) as fault:
        print(f"verifine: {_one_line(fault)}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of this program are; its subparsers inherit that."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="verifine",
        description="Verify what papers and code claim about reward fine-tuning of diffusion models.",
        epilog="Exit status: 0 every verdict is the recorded one, 1 some verdict differs or is inconclusive, 2 usage.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="measure claims and write their evidence", formatter_class=_Help)
    verify.set_defaults(command=_verify)
    verify.add_argument("--claim", action="append", default=[], metavar="ID", help="only this claim (repeatable)")
    verify.add_argument(
        "--paper", action="append", default=[], metavar="NAME", help="only this paper or chapter (repeatable)"
    )
    verify.add_argument(
        "--profile",
        choices=["smoke", "standard", "full"],
        default="standard",
        help="margins and effort: a minute, minutes, or hours",
    )
    verify.add_argument("--seed", type=_seed, default=0, help="root seed of every random stream, 0 <= SEED < 2^64")
    verify.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1, help="worker processes")
    verify.add_argument(
        "--cluster", metavar="ADDRESS", help="hand the claims to the Dask cluster with this scheduler address"
    )
    verify.add_argument("--out", type=Path, default=DEFAULT_FOLDER, metavar="RUN", help="folder of the run")
    verify.add_argument(
        "--resume", action="store_true", help="keep evidence already in RUN if seed, profile and source are the same"
    )

    report = commands.add_parser("report", help="write index.html, report.pdf and evidence.json", formatter_class=_Help)
    report.set_defaults(command=_report)
    report.add_argument(
        "run", type=Path, nargs="?", default=DEFAULT_FOLDER, metavar="RUN", help="folder of a run, or an evidence.json"
    )
    report.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: RUN's folder)")

    claims = commands.add_parser("claims", help="list the claims", formatter_class=_Help)
    claims.set_defaults(command=_claims)
    claims.add_argument("--json", action="store_true", help="a list of objects instead of a table")

    show = commands.add_parser("show", help="a claim's statement, derivation and last evidence", formatter_class=_Help)
    show.set_defaults(command=_show)
    show.add_argument("claim", metavar="CLAIM", help="identifier, as listed by `verifine claims`")
    show.add_argument("--run", type=Path, default=DEFAULT_FOLDER, metavar="RUN", help="folder whose evidence is shown")

    audit = commands.add_parser("audit", help="check the gradient on a model, in minutes", formatter_class=_Help)
    audit.set_defaults(command=_audit)
    _add_config(audit)
    audit.add_argument("--out", type=Path, default=Path("out/audit"), metavar="RUN", help="folder of the audit")
    audit.add_argument("--resume", action="store_true", help="keep what is already in RUN if the settings are the same")
    audit.add_argument("--claim", action="append", default=[], metavar="ID", help="only this claim (repeatable)")
    audit.add_argument("--jobs", type=_jobs, default=os.cpu_count() or 1, help="worker processes, on the processor")

    plan = commands.add_parser("plan", help="which estimator for this model and budget", formatter_class=_Help)
    plan.set_defaults(command=_plan)
    _add_config(plan)
    plan.add_argument(
        "--audit", type=Path, default=Path("out/audit"), metavar="RUN", help="folder of the model's audit"
    )
    plan.add_argument("--memory", type=_size, metavar="SIZE", help="memory limit, as 24GiB or 8000MB")

    launch = commands.add_parser("launch", help="fine-tune a model", formatter_class=_Help)
    launch.set_defaults(command=_launch)
    _add_config(launch)
    launch.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: out/runs/NAME of CONFIG)")
    launch.add_argument(
        "--resume", action="store_true", help="go on from the latest checkpoint in RUN, if there is one"
    )
    launch.add_argument("--from", type=Path, dest="start", metavar="FILE", help="go on from this checkpoint")
    launch.add_argument("--print-config", action="store_true", help="print all settings with what they mean, and stop")
    launch.add_argument(
        "--executor",
        choices=["here", "local", "slurm"],
        default="here",
        help="here; as a job of its own on this machine; or submit to Slurm",
    )
    launch.add_argument("--gpus", type=_jobs, default=1, help="GPUs of a job, a process on each")
    launch.add_argument("--hours", type=_jobs, default=24, help="time limit of a job")

    evaluate = commands.add_parser(
        "evaluate", help="compare a run's model with the one it came from", formatter_class=_Help
    )
    evaluate.set_defaults(command=_evaluate)
    evaluate.add_argument("run", type=Path, metavar="RUN", help="folder of a launch")
    evaluate.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another evaluation setting")
    evaluate.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="models made here")

    tune = commands.add_parser(
        "tune",
        help="choose the entropy strength of guided sampling",
        description="Guide samples to a high `reward` with the strength that a second reward, `strength.upper`, "
        "chooses: by the bilevel method, grid, random and Bayesian search, and a weighted sum of both. Writes the "
        "table (strength.json, strength.md) and images/METHOD.png. Exit status 1: a method found no strength, or its "
        "samples diverged.",
        formatter_class=_Help,
    )
    tune.set_defaults(command=_tune)
    _add_config(tune, "bilevel-strength-sd15")
    tune.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: out/tune/NAME of CONFIG)")
    tune.add_argument(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one of bilevel, grid, random, bayesian and weighted-sum (repeatable)",
    )
    tune.add_argument("--resume", action="store_true", help="go on with RUN; what it holds is not made again")
    return parser


def _add_config(parser: argparse.ArgumentParser, preset: str = "digits-brightness") -> None:
    parser.add_argument(
        "config", nargs="?", default=preset, metavar="CONFIG", help="a YAML file, or the name of a preset"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting (repeatable)")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="models made here, downloads")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with defaults, except where there is none to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from claims.records import Evidence
    from claims.registry import select
    from claims.run import Settings, run

    chosen = select(options.claim, options.paper)
    settings = Settings(options.seed, options.profile, options.out)
    _check_writable(options.out)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console)
    bar = progress.add_task("measuring", total=len(chosen))
    with contextlib.ExitStack() as shown:

        def on_start() -> None:
            console.print(
                f"verifine: {len(chosen)} claims, profile {options.profile}, seed {options.seed}, "
                f"{options.cluster or f'{options.jobs} jobs'}, evidence in {options.out}"
            )
            shown.enter_context(progress)

        def on_done(evidence: Evidence) -> None:
            progress.console.print(_summary_line(evidence), highlight=False, markup=False)
            progress.advance(bar)

        whole = run(chosen, settings, options.jobs, options.resume, on_start, on_done, options.cluster)
    off = [e for e in whole.evidence if not e.as_recorded]
    planted: dict[tuple[str, str], bool] = {}  # an error planted in several checks is found if each of them refutes it
    for evidence in whole.evidence:
        for reading in (r for c in evidence.checks for r in c.readings if r.role == "control"):
            key = (evidence.statement.id, reading.name)
            planted[key] = planted.get(key, True) and reading.verdict == "refuted"
    print(
        f"{len(whole.evidence) - len(off)} of {len(whole.evidence)} verdicts as recorded; "
        f"{sum(planted.values())} of {len(planted)} planted errors found; "
        f"{whole.provenance.seconds:.0f} s"
    )
    for evidence in off:
        print(f"NOT AS RECORDED: {_summary_line(evidence)}")
    return 1 if off else 0


def _report(options: argparse.Namespace) -> int:
    from claims.records import Run
    from claims.run import load, read

    if options.run.is_file():
        whole, folder = read(Run, options.run), options.out or options.run.parent
    else:
        whole, folder = load(options.run), options.out or options.run
    _check_writable(folder)
    from rich.console import Console

    from reports.report import write_report

    with Console(stderr=True).status(f"setting {len(whole.evidence)} claims as a page and as a paper"):
        written = write_report(whole, folder)
    for path in written:
        print(path)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from claims.registry import CLAIMS

    records = [claim.record() for claim in CLAIMS]
    if options.json:
        keys = ("id", "chapter", "paper", "source", "title", "statement", "printed", "corrected", "controls", "kinds")
        print(json.dumps([{key: getattr(r, key) for key in keys} for r in records], indent=1, ensure_ascii=False))
        return 0
    width = max(len(r.id) for r in records)
    for r in records:
        print(f"{r.id:{width}}  {r.printed:15}  {r.source}")
        print(f"{'':{width}}  {r.title}")
        print(f"{'':{width}}  {'+'.join(r.kinds)}; planted errors: {', '.join(r.controls)}\n")
    print(f"{len(records)} claims")
    return 0


def _show(options: argparse.Namespace) -> int:
    from claims.records import Evidence
    from claims.registry import select
    from claims.run import read

    (claim,) = select([options.claim], [])
    record = claim.record()
    print(f"{record.title}\n\n{record.id}; {record.source}; printed form: {record.printed}\n")
    print(f"As stated:  {record.statement}\n")
    if record.corrected:
        print(f"Corrected:  {record.corrected}\n")
    print(f"Why:        {record.why}\n")
    print(_derivation(record.derivation))
    file = options.run / "claims" / f"{record.id}.json"
    if not file.exists():
        print(f"\nNo evidence in {options.run} yet: verifine verify --claim {record.id} --out {options.run}")
        return 0
    evidence = read(Evidence, file)
    print(f"\nLast evidence ({file}): {_summary_line(evidence)}")
    for check in evidence.checks:
        print(f"\n  {check.name} ({check.kind}): {check.question}\n  margin: {check.margin_from}")
        for r in check.readings:
            i = r.looks_of
            print(
                f"    {r.verdict:12} {r.role:8} {r.name:40} {check.coordinates[i]}: {r.estimate[i]:.8g} against "
                f"{r.reference[i]:.8g}, difference in [{r.lower[i]:.3g}, {r.upper[i]:.3g}], n = {r.samples}"
            )
    return 0


def _derivation(pointer: str) -> str:
    """Return the section of docs/ that `pointer` ("file.md#heading") names, or where to find it."""
    name, _, anchor = pointer.partition("#")
    file = Path(__file__).parent / "docs" / name
    if not file.exists():
        return f"Derivation: docs/{pointer}"
    lines = file.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("#") and (not anchor or anchor == slug(line))]
    if not starts:
        return f"Derivation: docs/{pointer}"
    depth = len(lines[starts[0]]) - len(lines[starts[0]].lstrip("#"))
    rest = range(starts[0] + 1, len(lines))
    end = next((i for i in rest if lines[i].startswith("#") and lines[i].split(" ")[0] <= "#" * depth), len(lines))
    return f"Derivation (docs/{pointer})\n\n" + "\n".join(lines[starts[0] : end]).strip()


def slug(heading: str) -> str:
    """Return the anchor of a Markdown heading, as code hosts build it."""
    words = "".join(c for c in heading.lstrip("# ").lower() if c.isalnum() or c in " -")
    return words.strip().replace(" ", "-")


def _audit(options: argparse.Namespace) -> int:
    from rich.console import Console

    from claims.audits import audit
    from claims.records import Evidence
    from reports.report import write_report
    from scale.config import load_config

    config = load_config(options.config, options.set)
    _check_writable(options.out)
    console = Console(stderr=True)
    with _progress(console) as progress:
        bar = progress.add_task("auditing", total=None)

        def on_start(description: str, steps: int) -> None:
            progress.console.print(f"verifine: {description}", highlight=False, markup=False)
            progress.update(bar, total=steps)

        def on_done(done: Evidence | str) -> None:
            line = done if isinstance(done, str) else _summary_line(done)
            progress.console.print(line, highlight=False, markup=False)
            progress.advance(bar)

        whole = audit(
            config, options.out, options.cache, options.resume, on_start, on_done, options.jobs, options.claim
        )
    for path in write_report(whole, options.out):
        print(path)
    off = [e for e in whole.evidence if not e.as_recorded]
    print(f"{len(whole.evidence) - len(off)} of {len(whole.evidence)} statements verified on this model")
    return 1 if off else 0


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from claims.audits import planned
    from scale.config import load_config
    from scale.plan import COLUMNS, table

    # Those that fit into 80 columns; the audit's page has all.
    shown = ("estimator", "relative variance", "seconds per sample", "work", "peak memory", "frontier")
    config = load_config(options.config, options.set)
    console = Console()
    with console.status("predicting memory on the meta device"):
        plan = planned(config, options.audit, options.cache, options.memory)
    drawn = Table(*shown, title=f"Estimators on {plan.model}, batches of {config.training.batch}")
    for row in table(plan.measured, config.training.batch):
        drawn.add_row(*(row[COLUMNS.index(name)] for name in shown))
    console.print(drawn)
    print(plan.advice.why)
    print(plan.memory)
    return 0


def _launch(options: argparse.Namespace) -> int:
    from scale.config import load_config, print_config

    config = load_config(options.config, options.set)
    if options.print_config:
        print(print_config(config), end="")
        return 0
    folder = options.out or Path("out/runs") / Path(options.config).stem
    _check_writable(folder)
    if options.executor != "here":
        from scale.cluster import submit

        if options.start is not None:
            raise ValueError(f"--from {options.start} needs --executor here: a job goes on from the latest checkpoint")
        asked = (options.executor, options.gpus, options.hours, options.resume)
        print(submit(config, folder, options.cache, *asked))
        return 0
    from rich.console import Console

    from scale.evaluation import summary
    from scale.launch import launch
    from scale.task import Task

    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    with _progress(console) as progress:
        bar = progress.add_task("training", total=config.training.updates)
        judged = progress.add_task("evaluating", total=None, visible=False)

        def on_start(task: Task, done: int) -> None:
            progress.console.print(f"verifine: {task.describe()}; run in {folder}", highlight=False, markup=False)
            progress.update(bar, completed=done)

        def on_update(update: int, updates: int, reward: float) -> None:
            progress.update(bar, completed=update, description=f"training, return {reward:.4g}")

        def on_evaluation(done: int, total: int) -> None:
            progress.update(judged, completed=done, total=total, visible=True)

        done = launch(
            config, folder, options.cache, options.resume, options.start, True, on_start, on_update, on_evaluation
        )
    if not done.finished:
        print(f"verifine: stopped after update {done.update}, all of it saved; --resume goes on", file=sys.stderr)
        return 130
    if done.evaluation is not None:
        print(summary(done.evaluation))
        print(f"weights: {done.weights}\npictures: {folder / 'evaluation.png'}, {folder / 'images'}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from scale.evaluation import evaluate, summary
    from scale.launch import load_run

    task, params, update = load_run(options.run, options.cache, tuple(options.set))
    with _progress(Console(stderr=True)) as progress:
        bar = progress.add_task("evaluating", total=None)
        found = evaluate(
            task,
            params,
            options.run,
            lambda done, total: progress.update(bar, completed=done, total=total),
            update=update,
            cache=options.cache,
        )
    print(summary(found))
    return 0


def _tune(options: argparse.Namespace) -> int:
    from rich.console import Console

    from scale.config import load_config
    from scale.strength import MARKDOWN, tune
    from scale.strength_table import summary
    from scale.task import Task

    config = load_config(options.config, options.set)
    folder = options.out or Path("out/tune") / Path(options.config).stem
    _check_writable(folder)
    with _progress(Console(stderr=True)) as progress:
        bar = progress.add_task("choosing", total=None)

        def on_start(task: Task, steps: int) -> None:
            progress.console.print(f"verifine: {task.describe()}; run in {folder}", highlight=False, markup=False)
            progress.update(bar, total=steps)

        def on_step(line: str) -> None:
            progress.console.print(line, highlight=False, markup=False)
            progress.advance(bar)

        found = tune(config, folder, options.cache, options.method, options.resume, True, on_start, on_step)
    print(summary(found))
    print(f"table: {folder / MARKDOWN}\npictures: {folder / 'images'}")
    return 1 if any(row.note for row in found.rows) else 0


def _progress(console: Any) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console)


def _size(text: str) -> int:
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GiB or 8000MB")
    return int(float(found[1]) * units[found[2].upper()])


def _summary_line(evidence: object) -> str:
    from claims.records import Evidence

    assert isinstance(evidence, Evidence)
    mark = "ok " if evidence.as_recorded else "!! "
    error = f"  {evidence.error}" if evidence.error else ""
    return f"{mark}{evidence.verdict:12} {evidence.statement.id} ({evidence.seconds:.1f} s){error}"


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it, if nothing can be written to `folder`."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as fault:
        raise ValueError(f"--out {folder} cannot be written: {fault.strerror or fault}") from None


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number with 0 <= seed < 2^64")
    return int(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def _one_line(fault: Exception | str) -> str:
    return " ".join(str(fault).split())


if __name__ == "__main__":
    sys.exit(main())
