"""What `scale/strength.py` finds, as records, and as the table of Generative bilevel's section 6.1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scale.evaluation import aligned
from scale.metrics import Interval


@dataclass(frozen=True)
class Cost:
    """What was spent.

    Attributes:
        calls: of the network on one sample; classifier-free guidance makes two of one step.
        gradients: calls of these that were differentiated, too.
    """

    calls: int = 0
    gradients: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.calls + other.calls, self.gradients + other.gradients, self.seconds + other.seconds)


@dataclass(frozen=True)
class Try:
    """Mean rewards of guided samples, or why there are none."""

    strength: float
    weight: float
    upper: float | None
    lower: float | None
    error: str | None
    cost: Cost


@dataclass(frozen=True)
class Choice:
    """What a method chose for a prompt.

    Attributes:
        strength: lambda; None where every try failed.
        weight: of the upper reward in the guidance.
        tries: guided samplings, of methods that search.
        path: lambda after each update, of the bilevel method.
        floor: how low the gate lets the bilevel method's lambda go; None where it refuses every lambda.
        cost: of the choice; without the samples that are then made with it. The pre-trained samples are bilevel's cost,
            although the targets of all methods are set by them.
    """

    prompt: str
    strength: float | None
    weight: float
    tries: tuple[Try, ...]
    path: tuple[float, ...]
    floor: float | None
    cost: Cost


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        strengths: lambda of each prompt.
        frechet: squared Frechet distance to the reference; None where there are too few samples, or for the row of the
            pre-trained model where the reference is that model itself.
        upper, lower: mean rewards, with their standard errors.
        choosing, sampling: what was spent on choosing lambda, and on the images of the row.
        calls_ratio, seconds_ratio: of all that, to the bilevel method's; None where that is not there.
        note: why numbers are missing.
    """

    method: str
    strengths: tuple[float | None, ...]
    weights: tuple[float, ...]
    samples: int
    frechet: float | None
    upper: tuple[float, float] | None
    lower: tuple[float, float] | None
    choosing: Cost
    sampling: Cost
    calls_ratio: float | None = None
    seconds_ratio: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Tuned:
    """The table, and what led to it.

    Attributes:
        features, reference: what Frechet distances are measured in, and to.
        floor: what as many draws of the reference itself score: mean and limits; None where it is too small for that.
        choices: by method, one for each prompt.
    """

    model: str
    device: str
    upper: str
    lower: str
    prompts: tuple[str, ...]
    features: str
    reference: str
    floor: Interval | None
    rows: tuple[Row, ...]
    choices: dict[str, tuple[Choice, ...]]
    notes: tuple[str, ...]


HEAD = ("method", "lambda", "Frechet", "{upper} (upper)", "{lower} (lower)", "calls", "seconds", "ratio of both")


def _cells(tuned: Tuned) -> list[tuple[str, ...]]:
    """Return the table's cells, the head first."""
    cells = [tuple(name.format(upper=tuned.upper, lower=tuned.lower) for name in HEAD)]
    for row in tuned.rows:
        spent = row.choosing + row.sampling
        ratio = "" if row.calls_ratio is None else f"{row.calls_ratio:.3g}, {row.seconds_ratio:.3g}"
        cells.append(
            (
                row.method,
                _range([s for s in row.strengths if s is not None]),
                "none" if row.frechet is None else f"{row.frechet:.4g}",
                _plus_minus(row.upper),
                _plus_minus(row.lower),
                str(spent.calls),
                f"{spent.seconds:.1f}",
                ratio,
            )
        )
    return cells


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _plus_minus(value: tuple[float, float] | None) -> str:
    return "failed" if value is None else f"{value[0]:.4g} ± {value[1]:.2g}"


def _about(tuned: Tuned) -> list[str]:
    floor = "" if tuned.floor is None else f"; its floor is {tuned.floor.mean:.4g} [{tuned.floor.low:.4g}, "
    return [
        f"Frechet distance in {tuned.features} to {tuned.reference}"
        + (f"{floor}{tuned.floor.high:.4g}]" if tuned.floor else ""),
        "calls of the network on one sample, choosing and sampling together; ratios are to bilevel",
        *(f"{row.method} failed: {row.note}" for row in tuned.rows if row.note),
        *tuned.notes,
    ]


def summary(tuned: Tuned) -> str:
    """Return the table as aligned text for a terminal."""
    head = f"{tuned.model}; {len(tuned.prompts)} prompts, {tuned.rows[0].samples} samples of each method"
    return "\n".join([head, "", *aligned(_cells(tuned)), "", *(f"Note: {note}." for note in _about(tuned))])


def markdown(tuned: Tuned) -> str:
    """Return the table in Markdown."""
    head, *rows = _cells(tuned)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"Entropy strength on {tuned.model}", "", *lines, "", *(f"- {note}." for note in _about(tuned))])
