"""Chapter *RLR*, continued: fine-tuning a learned sampler by every method. The paper's Figures 3 and 4, Tables 4 and 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from algorithms import estimators as named
from algorithms.chain import Condition, StepConditions, for_reward, rollout
from claims.claim import Check, Claim, Context
from claims.judges import SampledAbove
from claims.problems import RLR
from claims.records import Column, Figure, Panel, Series, Table
from toy import prompts
from toy.comparison import ABLATION, BLACK_BOX, METHODS, Curve, Curves, Plan, runs, swiss_roll, truncation
from toy.experiments import Block, generator
from verdicts.means import MeanResult
from verdicts.proportions import clopper_pearson
from verdicts.streams import Stream

Prompt = Callable[[int], Condition]
PAIRED = 36  # enough to show "more than half" at a reading's share of the error, also if one pair goes the other way
FEW = {"smoke": 3, "standard": 10, "full": 36}
PLANS = {"smoke": Plan(calls=12_800, points=4), "standard": Plan(calls=25_600, points=7), "full": Plan(points=13)}


@cache
def some_runs(name: str, reward: str, context: Context, first: int) -> list[Curve]:
    """Some training runs on the swiss-roll sampler, those of the seeds from `first` on: the same everywhere.

    A table's seeds are one batch. So the runs in it, equal to rounding however they are batched, do not depend on
    what else this process measures.
    """
    root, last = Stream(context.stream.seed), min(first + FEW[context.profile.name], PAIRED)
    problem = swiss_roll(reward, root, context.cache)
    stream = root.child("toy", "comparison", reward)
    return runs(name, problem, PLANS[context.profile.name], stream, range(first, last))


def curves(name: str, reward: str, context: Context, seeds: int) -> Curves:
    """The first `seeds` runs of one method, a whole number of batches."""
    starts = range(0, seeds, FEW[context.profile.name])
    return Curves.of([run for first in starts for run in some_runs(name, reward, context, first)])


def shared(context: Context) -> Context:
    """The context without what differs between checks and figures, so that they share their runs."""
    return replace(context, stream=Stream(context.stream.seed), alpha=0.0)


class Wins:
    """In more than half of all training runs the first method of each pair ends above the second: a sign test.

    The interval is Clopper-Pearson's, its error split over the pairs; a tie counts against the statement. A check that
    was looked at before with other draws pays for all its looks, so that the first verdicts are part of the same error.
    """

    def __init__(self, looks: int = 1) -> None:
        self.looks = looks

    def __call__(
        self, subject: Callable[[Context], list[tuple[np.ndarray, np.ndarray]]], context: Context
    ) -> MeanResult:
        pairs = subject(shared(context))
        won = np.array([int((a > b).sum()) for a, b in pairs])
        trials = np.array([len(a) for a, _ in pairs])
        confidence = 1 - context.alpha / (self.looks * len(pairs))
        limits = [clopper_pearson(int(k), int(n), confidence) for k, n in zip(won, trials, strict=True)]
        lower, upper = (np.array(side) - 0.5 for side in zip(*limits, strict=True))
        decided = int(np.argmin(lower))
        return MeanResult(
            verdict="verified" if (lower > 0).all() else "refuted" if (upper < 0).any() else "inconclusive",
            estimate=won / trials,
            reference=np.full(len(pairs), 0.5),
            lower=lower,
            upper=upper,
            margin=np.zeros(len(pairs)),
            samples=int(trials.min()),
            looks=(),
            coordinate=decided,
            measured_kurtosis=np.full(len(pairs), np.nan),
        )


def finals(*pairs: tuple[str, str]) -> Callable[[Context], list[tuple[np.ndarray, np.ndarray]]]:
    """Final rewards on the broad reward, paired by seed."""

    def of(context: Context) -> list[tuple[np.ndarray, np.ndarray]]:
        return [tuple(curves(name, "broad", context, PAIRED).final for name in pair) for pair in pairs]  # type: ignore[misc]

    return of


def wins(name: str, question: str, *pairs: tuple[str, str]) -> Check:
    coordinates = tuple(f"{a} above {b}" for a, b in pairs)
    swapped = tuple((b, a) for a, b in pairs)
    margin = (
        f"a sign test over {PAIRED} paired runs: no margin; the pairs were chosen after pilot runs of another root seed"
    )
    return Check(name, "statistical", question, coordinates, Wins(), finals(*pairs), {"the order reversed": finals(*swapped)}, margin_from=margin)  # fmt: skip


TRAINING = Claim(
    id="rlr.training",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="the question of RLR, Figure 4 and Tables 2 and 5, on a toy",
    title="Trained at equal cost on a toy, RLR with the paper's noise ends below DDPO and first order",
    statement="On this run's learned swiss-roll sampler with the broad mixture reward, at equal network calls, batch and Adam settings, fine-tuning by RLR (corrected, sub-chain 2, one-sided noise of 0.001) ends "
    "below DDPO's policy gradient and below first order in more than half of all runs.",
    printed="holds",
    why="Its gradient is mostly noise here, which Adam turns into a random walk of the parameters. (In pilots on other seeds it improved on the pre-trained sampler at none of three learning rates. The noise of 0.001 "
    "is the paper's size for other parameters, its Figure 4 compares at equal training steps, and its experiments are on Stable Diffusion with released code that has no zeroth-order part: a toy cannot contradict them.)",
    derivation="rlr.md#block-length-and-parameter-noise",
    checks=(
        wins(
            "who ends above RLR",
            "Does DDPO, and does first order, end above RLR in more than half of all runs?",
            ("DDPO", "RLR"),
            ("first order", "RLR"),
        ),
    ),
    figures=lambda context: (_training_figure(shared(context)),),
    tables=lambda context: (_training_table(shared(context)), _ablation_table(shared(context))),
)  # fmt: skip

BIAS = Claim(
    id="rlr.biased-training",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="the question of RLR, section 4.1 and Figures 3 and 4, on a toy",
    title="On the toy, back-propagation through the last step alone trains better than DDPO at equal cost: bias need not show",
    statement="On this run's learned swiss-roll sampler with the broad mixture reward, DRaFT-1 ends above DDPO's policy gradient at equal network calls in more than half of all runs.",
    printed="holds",
    why="The last step's gradient has little variance and a direction that is good enough for a reward that the last step can raise, at a third of the calls. This says nothing for rewards that it cannot raise, "
    "and the paper's collapse of truncated back-propagation is an observation on another model: see the figure for ours.",
    derivation="variance.md#random-truncation",
    checks=(
        wins("DRaFT-1 above DDPO", "Does DRaFT-1 end above DDPO in more than half of all runs?", ("DRaFT-1", "DDPO")),
    ),
    figures=lambda context: (_truncation_figure(shared(context)),),
)  # fmt: skip

# --- pictures and tables ------------------------------------------------------------------------------------------

TASKS = {"broad": "broad reward", "narrow": "narrow reward", "black box": "black-box reward"}


def _methods(task: str) -> tuple[str, ...]:
    return BLACK_BOX if task == "black box" else METHODS


def _band(name: str, x: np.ndarray, found: Curves) -> Series:
    """Mean over the runs with a band of one standard deviation."""
    mean, spread = found.reward.mean(0), found.reward.std(0, ddof=1)
    y, lower, upper = (tuple(np.round(v, 5).tolist()) for v in (mean, mean - spread, mean + spread))
    return Series(name, tuple(x.tolist()), y, lower, upper)


def _trained(name: str, task: str, context: Context, seeds: int) -> Series:
    found = curves(name, task, context, seeds)
    return _band(name, found.calls / 1000, found)


def _training_figure(context: Context) -> Figure:
    seeds = FEW[context.profile.name]
    panels = tuple(
        Panel(title, tuple(_trained(name, task, context, seeds) for name in _methods(task)))
        for task, title in TASKS.items()
    )
    return Figure(
        name="training",
        title="Reward against network calls, fine-tuning the swiss-roll sampler",
        caption=f"Mean of {seeds} runs, band of one standard deviation. Final rewards in order, broad reward: {_order('broad', context, seeds)}. Narrow reward: {_order('narrow', context, seeds)}.",
        alt="Three panels of learning curves with bands, one curve for each method; the caption gives their order at the end.",
        kind="panels",
        x_label="thousand network calls",
        y_label="mean reward of fresh samples",
        panels=panels,
        panel_columns=3,
        shared_axes="none",
    )  # fmt: skip


def _order(task: str, context: Context, seeds: int) -> str:
    """The methods in the order of their mean final rewards."""
    means = {name: curves(name, task, context, seeds).final.mean() for name in _methods(task)}
    return ", ".join(f"{name} {means[name]:.2f}" for name in sorted(means, key=lambda n: -means[n]))


def _interval(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def _training_table(context: Context) -> Table:
    seeds = FEW[context.profile.name]
    columns = [Column("method", "left")]
    for title in TASKS.values():
        columns += [Column("final reward", group=title), Column("fallen runs", group=title)]
    rows = []
    for name in dict.fromkeys((*METHODS, *BLACK_BOX)):
        cells = [name]
        for task in TASKS:
            if name not in _methods(task):
                cells += ["-", "-"]
                continue
            found = curves(name, task, context, seeds)
            fallen = int((found.final < 0.5 * found.reward[:, 0]).sum())
            cells += [_interval(found.final), f"{fallen} of {seeds}"]
        rows.append(tuple(cells))
    return Table(
        name="training",
        title=f"Reward at equal cost: {PLANS[context.profile.name].calls} network calls, batch {PLANS[context.profile.name].batch}",
        caption="Mean ± standard deviation over the runs; a fallen run ends below half of where it started. One learning rate (0.01) for all methods, chosen on other seeds as the best for the median method. "
        "The cost of pilots, antithetic copies and repeated passes counts; memory is one step's activations for all.",
        columns=tuple(columns),
        rows=tuple(rows),
    )  # fmt: skip


# Paper, Table 5: PickScore, ImageReward.
PAPER_ABLATION = {
    "V1: without HO and ZO": ("18.43", "60.07"),
    "V2: without ZO": ("19.28", "63.85"),
    "V3: without HO": ("20.11", "68.35"),
    "RLR": ("21.38", "76.55"),
}


def _ablation_table(context: Context) -> Table:
    seeds = FEW[context.profile.name]
    rows = []
    for label, (pick, image) in PAPER_ABLATION.items():
        name = ABLATION.get(label, "RLR")
        ours = [_interval(curves(name, task, context, seeds).final) for task in ("broad", "narrow")]
        rows.append((label, pick, image, *ours))
    antithetic = [_interval(curves("RLR, antithetic", task, context, seeds).final) for task in ("broad", "narrow")]
    rows.append(("RLR, antithetic", "-", "-", *antithetic))
    return Table(
        name="ablation",
        title="The paper's ablation (Table 5) beside ours",
        caption="In the paper every part helps. The toy's runs are at equal network calls; its V3 and RLR have one-sided parameter noise of 0.001, and V1 is DRaFT-1.",
        columns=(
            Column("variant", "left"),
            Column("PickScore", group="paper"),
            Column("ImageReward", group="paper"),
            Column("broad reward", group="toy"),
            Column("narrow reward", group="toy"),
        ),
        rows=tuple(rows),
    )


LENGTHS = (1, 2, 5, 10)


def _truncation_figure(context: Context) -> Figure:
    """Figure 3: the same number of updates for every length, at two learning rates."""
    seeds, updates = (
        min(10, FEW[context.profile.name]),
        {"smoke": 20, "standard": 60, "full": 200}[context.profile.name],
    )
    root = Stream(context.stream.seed)
    problem = swiss_roll("narrow", root, context.cache)
    panels, fallen = [], []
    for rate in (0.01, 0.02):
        plan = replace(PLANS[context.profile.name], learning_rate=rate)
        series, counts = [], []
        for length in LENGTHS:
            found = truncation(length, problem, plan, updates, root.child("toy", "truncation", str(rate)), range(seeds))
            series.append(_band(f"K = {length}", found.updates, found))
            counts.append(f"{int((found.final < 0.5 * found.reward[:, 0]).sum())} (K = {length})")
        fallen.append(f"rate {rate:g}: {', '.join(counts)} of {seeds}")
        panels.append(Panel(f"learning rate {rate:g}", tuple(series)))
    return Figure(
        name="truncation",
        title="Truncated back-propagation through the last K of 10 steps, narrow reward",
        caption=f"Mean of {seeds} runs, band of one standard deviation, the same number of updates for every K; K = 10 is full back-propagation. Runs that end below half of where they began: {'; '.join(fallen)}.",
        alt="Two panels of learning curves with bands for K = 1, 2, 5 and 10, at two learning rates.",
        kind="panels",
        x_label="updates",
        y_label="mean reward of fresh samples",
        panels=tuple(panels),
        panel_columns=2,
        shared_axes="all",
    )  # fmt: skip


# --- diffusive chain-of-thought -----------------------------------------------------------------------------------


class PromptGain:
    """The mean reward gained by the multi-scale prompt over the original one, on the same noise, is above a bound."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def __call__(self, subject: tuple[Prompt, Prompt], context: Context) -> MeanResult:
        root = Stream(context.stream.seed)
        tasks = [prompts.problem(prompt, root, context.cache) for prompt in subject]

        def sampler(stream: Stream) -> Block:
            def block(index: int) -> np.ndarray:
                rewards = []
                for task in tasks:
                    noise = named.first_order(prompts.STEPS).draw(
                        task.chain, task.params, 2048, generator(stream, index)
                    )
                    condition = task.condition(2048)
                    x0 = rollout(task.chain, task.params, noise, condition).latents[0]
                    rewards.append(task.objective.reward(x0, for_reward(condition)))
                return (rewards[0] - rewards[1])[:, None].numpy()

            return block

        # Differences of rewards in [0, 1]: bounded, with a measured kurtosis below 6. Declared: 20.
        return SampledAbove(lambda: np.array([self.bound]), kurtosis=20)(sampler, context)


GAIN = 0.02


def wrong_scale(samples: int) -> Condition:
    """The multi-scale prompt with the other fine cluster."""
    prompt = prompts.multi_scale(samples)
    assert isinstance(prompt, StepConditions)
    return StepConditions(prompt.steps * prompt.steps.new_tensor([1.0, -1.0]))


PROMPTS = Claim(
    id="rlr.diffusive-chain-of-thought",
    chapter=RLR,
    paper="verifine",
    about="own",
    source="the question of RLR, section 6.4 and Table 4, on a toy",
    title="A prompt that names the fine scale at the fine steps raises the reward without any fine-tuning",
    statement="On a coarse-to-fine mixture, conditioning the fine steps of the base sampler on the fine prompt raises the mean reward.",
    printed="holds",
    why="The prompt tells the sampler what the reward wants, and the original one does not: more information wins, as it should. What restricting j to the deficient steps adds is in the table; "
    "a law of j neither biases the estimate nor lowers its variance on principle (rlr.law-of-j, rlr.position).",
    derivation="rlr.md#variance-over-the-position",
    checks=(
        Check(
            "gain of the prompt",
            "statistical",
            f"Is the mean reward with the multi-scale prompt more than {GAIN} above the one with the original prompt?",
            ("gain in reward",),
            PromptGain(GAIN),
            (prompts.multi_scale, prompts.original),
            {"the prompts exchanged": (prompts.original, prompts.multi_scale), "the fine scale named wrongly": (wrong_scale, prompts.original)},
            margin_from=f"an inequality: {GAIN}, an eighth of a typical reward; declared before sampling",
        ),
    ),
    tables=lambda context: (_prompt_table(shared(context)),),
)  # fmt: skip

# Paper, Table 4: PickScore, ImageReward.
PAPER_PROMPTS = {
    "base": ("15.33", "33.45"),
    "base, multi-scale prompt": ("16.38", "39.24"),
    "RLR": ("18.05", "43.09"),
    "RLR, DCoT": ("19.45", "49.88"),
}


def _prompt_table(context: Context) -> Table:
    seeds, root = FEW[context.profile.name], Stream(context.stream.seed)
    plan = PLANS[context.profile.name]
    found = prompts.table(plan, root.child("toy", "prompts"), root, context.cache, range(seeds))
    rows = [(name, *PAPER_PROMPTS.get(name, ("-", "-")), _interval(curve.final)) for name, curve in found.items()]
    return Table(
        name="diffusive-chain-of-thought",
        title="The paper's Table 4 beside ours",
        caption=f"Mean ± standard deviation of {seeds} runs at equal network calls. DCoT: multi-scale prompt, and j restricted to the deficient steps; RLR antithetic. The prompt tells the sampler what the reward wants.",
        columns=(
            Column("prompt and method", "left"),
            Column("PickScore", group="paper"),
            Column("ImageReward", group="paper"),
            Column("reward", group="toy"),
        ),
        rows=tuple(rows),
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (TRAINING, BIAS, PROMPTS)
