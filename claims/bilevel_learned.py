"""Chapter *Generative bilevel*, continued: a noise schedule learned while the network is trained, in the plane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from claims import bilevel_digits as digits
from claims.bilevel import CHAPTER
from claims.claim import Check, Claim, Context
from claims.records import Column, Figure, Panel, Series, Table
from claims.training import Wins, shared
from toy.distances import Array, Floor, floor, sliced_wasserstein2, wasserstein2
from toy.few_step import DATA
from toy.learned_schedule import Clouds, Plan, Trained, learn, samples, schedule, search, train
from verdicts.streams import Stream

ROLL, MOONS = "swiss_roll", "two_moons"
TITLES = {ROLL: "swiss roll", MOONS: "two moons"}
DEFAULT, SEARCH, LEARNED = "default schedule", "random search", "learned schedule"
SWAPPED, AWAY = "learned schedule, default's network", "schedule moved the other way"
LONG_SEARCH, AGAIN, PAIRS = (
    "random search, full budget each",
    "learned schedule, trained again",
    "learned from pairs of calls",
)
RUNS = 36  # enough to show "more than half" at a reading's share of the error, also if one pair goes the other way
CANDIDATES = 4
POINTS, PROJECTIONS = 2000, 50
EXACT_RUNS, EXACT_POINTS = 8, {"smoke": 500, "standard": 500, "full": 2000}  # 2000 take a second for each pair
SHOWN = 1000  # points of a cloud in a picture
PLAN = Plan()


def root(context: Context) -> Stream:
    """Training's streams lie below this one, so that checks, figures and tables share their runs."""
    return Stream(context.stream.seed).child("toy", "learned schedule")


@cache
def problem(context: Context, data: str) -> Clouds:
    return Clouds(data, RUNS, PLAN, root(context).child(data))


@cache
def trained(context: Context, data: str, arm: str) -> Trained:
    """All runs of one way to a schedule and a network."""
    levels = problem(context, data)
    if arm == DEFAULT:
        return train(levels, schedule(RUNS))
    if arm in (LEARNED, PAIRS):
        return learn(levels, schedule(RUNS), "pathwise" if arm == LEARNED else "mixed")
    if arm == AGAIN:
        return train(levels, trained(context, data, LEARNED).x)
    if arm in (SWAPPED, AWAY):
        network, learned = trained(context, data, DEFAULT), trained(context, data, LEARNED)
        return replace(network, x=learned.x if arm == SWAPPED else schedule(RUNS, tau=2.0))
    return search(levels, CANDIDATES, CANDIDATES if arm == SEARCH else 1)


@cache
def clouds(context: Context, data: str, arm: str) -> Array:
    """Fresh samples of all runs, (runs, POINTS, 2)."""
    return samples(problem(context, data), trained(context, data, arm), POINTS).double().numpy()


def fresh(context: Context, data: str, run: int) -> Array:
    """Points of the data that nothing was trained on."""
    return DATA[data](POINTS, root(context).child(data, "fresh", run).generator())


def sliced(a: Array, b: Array, generator: np.random.Generator) -> float:
    return sliced_wasserstein2(a, b, generator, PROJECTIONS)


@cache
def distances(context: Context, data: str, arm: str) -> np.ndarray:
    """Sliced distances of each run's samples to fresh points, the same for all arms, (runs,)."""
    streams = [root(context).child("projections", run) for run in range(RUNS)]
    return np.array(
        [
            sliced(cloud, fresh(context, data, run), own.generator())
            for run, (cloud, own) in enumerate(zip(clouds(context, data, arm), streams, strict=True))
        ]
    )


@cache
def exact_distances(context: Context, data: str, arm: str) -> np.ndarray:
    """Exact distances of fewer points of the first runs, (EXACT_RUNS,)."""
    n, found = EXACT_POINTS[context.profile.name], clouds(context, data, arm)
    return np.array([wasserstein2(found[run, :n], fresh(context, data, run)[:n]) for run in range(EXACT_RUNS)])


@cache
def least(context: Context, data: str, exact: bool) -> Floor:
    """How far two fresh clouds of the data are from each other."""
    stream = root(context).child("floor", data)
    if exact:
        return floor(DATA[data], EXACT_POINTS[context.profile.name], 9, stream, "w2", 0.8)
    return floor(DATA[data], POINTS, 39, stream, sliced, 0.9)


Pairs = Callable[[Context], list[tuple[np.ndarray, np.ndarray]]]


def nearer(arm: str, than: str) -> Pairs:
    """Whether the runs of an arm end nearer to the data than those of another."""
    return lambda context: [(distances(context, ROLL, than), distances(context, ROLL, arm))]


LEARNED_SCHEDULE = Claim(
    id="generative-bilevel.learned-schedule",
    chapter=CHAPTER,
    paper="verifine",
    about="own",
    source="the question of Generative bilevel, section 6.2 and Algorithm 6, on a toy",
    title="Learned while the network is trained, a schedule for five DDIM steps ends nearer to a swiss roll than the cosine schedule at equal network updates",
    statement=f"On the swiss roll, with {PLAN.S} deterministic DDIM steps, Algorithm 6 from the cosine schedule on (end, $\\tau$ and $\\epsilon$ in the released form, gradients of $f$ by autograd) ends with samples nearer to fresh points, "
    "in sliced Wasserstein-2, than a network trained for as many updates on the cosine schedule alone, and than the best of four random schedules that share these updates, in more than half of all runs.",
    printed="holds",
    why="Five steps cannot afford the default's last times, which have almost no signal: a smaller end keeps some of it, and a small $\\tau$ spends more steps at low noise. Schedule and network belong together: the default's own network hardly gains from the learned schedule (table). "
    "What is gained is the cloud's spread: no sampler here follows the arm, and all distances are far above the sampling floor. Gradients are not free: Algorithm 6 calls the sampler, which the default does not; and with one pair of calls an update for the schedule (eq. 14), as in the paper, pilots ended level with the default, for the noise of the pairs. "
    "The paper's comparison is on MNIST with FID, where a search has more trials and one run is reported. On 8 × 8 digits, the last table, a short run settles nothing: “better than the default” was refuted at a first look with a larger step, and is inconclusive now; searches of ten candidates, at about twice the seconds, found better schedules (benchmarks/README.md).",
    derivation="bilevel.md#learning-a-schedule-in-the-plane",
    checks=(
        Check(
            "below the default",
            "statistical",
            "Is the learned schedule's sliced distance to fresh points below the default's at equal network updates, in more than half of all runs?",
            ("below the default",),
            Wins(looks=2),
            nearer(LEARNED, DEFAULT),
            {"the order reversed": nearer(DEFAULT, LEARNED), "the schedule moved the other way, τ = 2": nearer(AWAY, DEFAULT)},
            margin_from=f"a sign test over {RUNS} runs, paired by training points, initial weights and fresh points: no margin. Steps, penalty and lengths were chosen on root seeds 101, 103 and 104; "
            "root seed 0 was looked at once with a shorter step, with the same verdict, and the interval pays for both. A third planted error, the default's network on the learned schedule, was left out after that look: "
            "it need not be one, and its row in the table is below the default in more than half of all runs",
        ),
        Check(
            "below a random search",
            "statistical",
            f"Is it below that of the best of {CANDIDATES} random schedules, each with a network trained for one part in {CANDIDATES} of the updates, in more than half of all runs?",
            ("below the search",),
            Wins(looks=2),
            nearer(LEARNED, SEARCH),
            {"the order reversed": nearer(SEARCH, LEARNED), "the default schedule": nearer(DEFAULT, SEARCH)},
            margin_from=f"a sign test over {RUNS} runs: no margin. At root seed 0, with the shorter step, 27 of 36 runs were below: inconclusive. This is the second look, and the interval pays for both",
        ),
    ),
    figures=lambda context: (*_figures(shared(context)), *digits.figures(shared(context))),
    tables=lambda context: (*_tables(shared(context)), digits.table(shared(context))),
)  # fmt: skip


def _tables(context: Context) -> tuple[Table, ...]:
    return tuple(_table(context, data) for data in ((ROLL, MOONS) if context.profile.name == "full" else (ROLL,)))


def _table(context: Context, data: str) -> Table:
    dear = (LONG_SEARCH, PAIRS, AGAIN) if context.profile.name == "full" else ()
    rows, base = [], distances(context, data, DEFAULT)
    for arm in (DEFAULT, SEARCH, LEARNED, SWAPPED, *dear):
        made, found = trained(context, data, arm), distances(context, data, arm)
        # A schedule that was learned first has been paid for, too.
        before = trained(context, data, LEARNED) if arm in (SWAPPED, AGAIN) else None
        updates = made.network_updates + (before.network_updates if before else 0)
        calls = made.sampler_calls + (before.sampler_calls if before else 0)
        won = "" if arm == DEFAULT else f"{int((found < base).sum())} of {RUNS}"
        x = ", ".join(f"{float(made.x[n].mean()):.3f}" for n in ("end", "tau", "epsilon"))
        rows.append(
            (arm, str(updates), str(calls), x, _spread(found), _spread(exact_distances(context, data, arm)), won)
        )
    floors = [_interval(least(context, data, exact)) for exact in (False, True)]
    rows.append(("two fresh clouds", "", "", "", *floors, ""))
    missing = (
        ""
        if dear
        else " The full profile adds two moons, random search with the whole budget for each candidate, learning from pairs of calls, and the learned schedule with a network trained again."
    )
    return Table(
        name=f"generative-bilevel-learned-{data.replace('_', '-')}",
        title=f"Schedules for {PLAN.S} DDIM steps on the {TITLES[data]}: Wasserstein-2 in units of $10^{{-2}}$",
        caption=f"Mean ± standard deviation of {RUNS} runs ({EXACT_RUNS} for the exact distance); floors: mean [interval] of two fresh clouds. Network updates have {PLAN.batch} points; a sampler call has {PLAN.S} steps with {PLAN.samples} points."
        + missing,
        columns=(
            Column("training", "left"),
            Column("network updates"),
            Column("sampler calls"),
            Column(r"mean end, $\tau$, $\epsilon$"),
            Column(f"sliced, n = {POINTS}"),
            Column(f"exact, n = {EXACT_POINTS[context.profile.name]}"),
            Column("below the default"),
        ),
        rows=tuple(rows),
    )  # fmt: skip


def _spread(values: np.ndarray) -> str:
    return f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"


def _interval(found: Floor) -> str:
    return f"{100 * found.mean:.2f} [{100 * found.low:.2f}, {100 * found.high:.2f}]"


def _figures(context: Context) -> tuple[Figure, ...]:
    panels, truth = [], _points("data", fresh(context, ROLL, 0)[:SHOWN])
    for arm in (DEFAULT, SEARCH, LEARNED):
        panels.append(Panel(arm, (truth, _points("samples", clouds(context, ROLL, arm)[0, :SHOWN]))))
    shown = Figure(
        name="generative-bilevel-learned-clouds",
        title=f"Samples of {PLAN.S} DDIM steps after equal numbers of network updates",
        caption=f"{SHOWN} samples of the first run over as many fresh points. None follows the arm with so few steps: the default's cloud is shrunk, the learned schedule's has the data's spread.",
        alt="Three round clouds over a spiral: the default's covers its middle alone, the other two all of it; random search puts more points outside.",
        kind="panels",
        panel_columns=3,
        panels=tuple(panels),
    )
    return shown, _levels(context), _path(context)


def _levels(context: Context) -> Figure:
    family, every = problem(context, ROLL).family, 20
    t = tuple(map(float, range(0, PLAN.T + 1, every)))
    series = []
    for arm in (DEFAULT, SEARCH, LEARNED):
        levels = family(trained(context, ROLL, arm).x)[:, ::every].double().numpy()
        series.append(Series(arm, t, tuple(levels.mean(0)), tuple(levels.min(0)), tuple(levels.max(0))))
    return Figure(
        name="generative-bilevel-learned-levels",
        title="The schedules in the end",
        caption=f"Mean and range of {RUNS} runs. The learned schedule keeps part of the signal up to the last step; runs agree on it.",
        alt="The default falls to zero along a cosine; the learned curve lies above it and ends well above zero.",
        x_label=r"$t$",
        y_label=r"$\bar\alpha_t$",
        series=tuple(series),
    )


def _path(context: Context) -> Figure:
    path = trained(context, ROLL, LEARNED).path
    steps = tuple(map(float, range(PLAN.updates + 1)))

    def curve(name: str, label: str) -> Series:
        values = torch.as_tensor(path[name]).double().numpy()
        return Series(label, steps, tuple(values.mean(1)), tuple(values.min(1)), tuple(values.max(1)))

    return Figure(
        name="generative-bilevel-learned-path",
        title="The schedule's parameters along Algorithm 6",
        caption=f"Mean and range of {RUNS} runs, from the default on. $\\tau$ goes to the end of its range, 0.51.",
        alt="Tau falls from 1 to its lower limit, end from 1 to about 0.8, and epsilon stays near 0.",
        x_label="updates of the schedule",
        y_label="value",
        series=(curve("end", "end"), curve("tau", "tau"), curve("epsilon", "epsilon")),
    )


def _points(label: str, points: Array) -> Series:
    return Series(label, tuple(map(float, points[:, 0])), tuple(map(float, points[:, 1])), style="points")


CLAIMS: tuple[Claim, ...] = (LEARNED_SCHEDULE,)
