"""The front door: `verifine verify | report | claims | show`.

Exit status 0: every verdict is the recorded one; 1: some verdict differs or is inconclusive; 2: wrong usage or input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

# Before NumPy and torch load: one thread per worker, or the workers fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEFAULT_FOLDER = Path("out/report")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nverifine: interrupted; what was measured is kept, --resume goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as fault:
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
    return parser


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
