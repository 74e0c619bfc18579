"""Chapter *Verifier*: the verdicts themselves, judged on laws whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import norm

from claims.claim import Check, Claim, Context
from claims.judges import SampledMean, Sampler
from verdicts import exact
from verdicts.calibration import Law, heavy_tailed_laws, mean_check, operating_rate
from verdicts.means import MeanResult, Plan, planned_half_width
from verdicts.proportions import Verdict, clopper_pearson
from verdicts.streams import Stream

CHAPTER = "Verifier"
ALPHA = 0.05
CONFIDENCE = 0.99
LEDGER_SCALE = 1e-8  # about the share of one reading in a run's budget of 1e-6

Trial = Callable[[Stream], Verdict]


@dataclass(frozen=True)
class Proportion:
    """Frequency of a verdict over repeated checks on every law; the statement is an upper or a lower bound on it.

    The interval is Clopper-Pearson's at 99 %; each law's frequency is a coordinate, and the last one pools them.
    """

    verdict: Verdict
    bound: float
    below: bool
    trials: int | None = None  # of each law; a quarter of the profile's if None

    def __call__(self, subject: Callable[[Law], Trial], context: Context) -> MeanResult:
        trials = self.trials or math.ceil(context.profile.trials / len(heavy_tailed_laws()))
        counts = []
        for law in heavy_tailed_laws():
            rate = operating_rate(subject(law), trials, context.stream.child(law.name))
            counts.append(getattr(rate, self.verdict))
        successes = np.array([*counts, sum(counts)])
        sizes = np.array([trials] * len(counts) + [trials * len(counts)])
        limits = [clopper_pearson(int(k), int(n), CONFIDENCE) for k, n in zip(successes, sizes, strict=True)]
        lower, upper = (np.array(side) - self.bound for side in zip(*limits, strict=True))
        # The pooled frequency decides; the laws stand beside it for the reader.
        last = len(counts)
        met, missed = (upper[last] <= 0, lower[last] > 0) if self.below else (lower[last] >= 0, upper[last] < 0)
        return MeanResult(
            verdict="verified" if met else "refuted" if missed else "inconclusive",
            estimate=successes / sizes,
            reference=np.full(len(sizes), self.bound),
            lower=lower,
            upper=upper,
            margin=np.zeros(len(sizes)),
            samples=int(sizes[last]),
            looks=(),
            coordinate=last,
            measured_kurtosis=np.full(len(sizes), np.nan),
        )


def repeated_clt(law: Law) -> Trial:
    """Planted error: the usual 95 % interval, looked at until it excludes the reference."""

    def trial(stream: Stream) -> Verdict:
        rows = law.draw(stream.generator(), 8192)[:, :1]
        width = float(norm.isf(ALPHA / 2))
        for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
            seen = rows[:n, 0]
            if abs(seen.mean() - law.mean[0]) > width * seen.std(ddof=1) / math.sqrt(n):
                return "refuted"
        return "inconclusive"

    return trial


def ours(bias: float = 0.0, alpha: float = ALPHA, margin: float = 1e-6, rows: int = 50_000) -> Callable[[Law], Trial]:
    """The verdict's own check, with a bias planted in units of the standard deviation."""
    return lambda law: mean_check(law, alpha, margin, bias, rows)


def _check(name: str, question: str, judge: Proportion, subject: Any, controls: dict[str, Any]) -> Check:
    coordinates = (*(law.name for law in heavy_tailed_laws()), "all laws")
    margin = f"an exact binomial interval at {CONFIDENCE:.0%} against the bound {judge.bound:g}"
    # These readings spend nothing of the run's error budget; they measure the machinery that does.
    return Check(name, "frequency", question, coordinates, judge, subject, controls, margin_from=margin)


FALSE_ALARM = Claim(
    id="verifier.false-alarm",
    chapter=CHAPTER,
    paper="verifine",
    about="verifier",
    source="derived in docs/statistics.md",
    title="True statements are refuted, and false ones verified, less often than the stated error probability",
    statement=r"At $\alpha = 0.05$ the confidence sequences exclude the true mean at any look of any coordinate with "
    r"probability below $0.05$, for heavy-tailed score-function estimates too.",
    printed="holds",
    why="The bounds hold for every number of samples under the declared kurtosis; they are conservative, so the "
    "measured rate lies far below the stated one. Intervals from the central limit theorem, looked at repeatedly, do "
    "not pass the same test.",
    derivation="statistics.md#the-verifier-verified",
    checks=(
        _check(
            "false refutations",
            "How often does a check at α = 0.05 refute a true mean, over all looks and both coordinates?",
            Proportion("refuted", ALPHA, below=True),
            ours(),
            {"repeated 95 % CLT intervals": repeated_clt},
        ),
        _check(
            "false verifications",
            "How often does a check at α = 0.05 verify a mean that is off by 1.05 margins?",
            Proportion("verified", ALPHA, below=True),
            ours(bias=0.21, margin=0.2),
            {"a mean that is off by nothing": ours(bias=0.0, margin=0.5)},
        ),
    ),
)


@cache
def moments(sampler: Sampler, stream: Stream, rows: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the size of a pilot of at least so many rows, and its mean and standard deviation, (D,) each."""
    block = sampler(stream)
    drawn = [block(0)]
    while sum(map(len, drawn)) < rows:
        drawn.append(block(len(drawn)))
    sample = np.concatenate(drawn)
    return len(sample), sample.mean(0), sample.std(0)


@dataclass(frozen=True)
class PlannedPower:
    """Predicted probability that each statistical planted error of `claims` is refuted within the profile's budget.

    A pilot gives each error's size and spread; the size counts less four standard errors. Where these would take more
    than half of it in every coordinate, a larger pilot is made. The subject scales the budget of samples; the pilots,
    which know nothing of the budget, are the same for every subject.
    """

    claims: tuple[Claim, ...]
    pilots: tuple[int, int] = (1 << 14, 1 << 16)

    def errors(self) -> list[tuple[str, str, SampledMean, Any]]:
        """(claim, control, judge, subject) of every planted error whose judge compares a sampled mean."""
        return [
            (claim.id, f"{check.name}: {name}", check.judge, subject)
            for claim in self.claims
            for check in claim.checks
            if isinstance(check.judge, SampledMean)
            for name, subject in check.controls.items()
        ]

    def __call__(self, subject: float, context: Context) -> MeanResult:
        profile = context.profile
        budget = replace(context, profile=replace(profile, max_samples=int(subject * profile.max_samples)))
        powers = np.array([self._power(*error, budget) for error in self.errors()])
        return exact.ordering(powers, np.full(len(powers), 0.99), 0.0)

    def _power(self, claim: str, name: str, judge: SampledMean, subject: Sampler, context: Context) -> float:
        stream = Stream(context.stream.seed).child("verifier.power", "pilot", claim, name)
        plan = Plan(alpha=LEDGER_SCALE, kurtosis=judge.kurtosis, max_samples=context.profile.max_samples)
        samples, mean, deviation = moments(subject, stream, self.pilots[0])
        if not (np.abs(mean - np.ravel(judge.reference())) > 8 * deviation / math.sqrt(samples)).any():
            samples, mean, deviation = moments(subject, stream, self.pilots[1])
        width = planned_half_width(plan, deviation)
        size = np.abs(mean - np.ravel(judge.reference())) - 4 * deviation / math.sqrt(samples)
        spread = np.maximum(deviation / math.sqrt(plan.max_samples), np.finfo(float).tiny)
        return float(norm.cdf((size - width) / spread).max())


def power(claims: tuple[Claim, ...]) -> Claim:
    """Return the claim that planted errors are found, with the planned power of every planted error of `claims`."""
    planned = PlannedPower(claims)
    return Claim(
        id="verifier.power",
        chapter=CHAPTER,
        paper="verifine",
        about="verifier",
        source="derived in docs/statistics.md",
        title="Planted errors are found",
        statement=r"At the error share of one reading ($10^{-8}$) planted errors are refuted with probability at least "
        "$0.99$: measured on heavy-tailed laws, and planned for every planted error that is judged by a sampled mean (the learned "
        "sampler's are left out).",
        printed="holds",
        why="Half-widths shrink like six to nine standard errors; the planted errors lie further out than that.",
        derivation="statistics.md#the-verifier-verified",
        checks=(
            _check(
                "measured power",
                "How often is a bias of 0.1 standard deviations refuted within 120 000 samples?",
                Proportion("refuted", 0.99, below=False, trials=134),
                ours(bias=0.1, alpha=LEDGER_SCALE, rows=120_000),
                {"no bias": ours(alpha=LEDGER_SCALE, rows=100_000)},
            ),
            Check(
                "planned power",
                "exact",
                "With sizes and spreads from a pilot, is each planted error refuted within the budget with probability "
                "at least 0.99?",
                tuple(f"{claim}, {name}" for claim, name, _, _ in planned.errors()),
                planned,
                1.0,
                {"a thousandth of the budget": 1e-3},
                margin_from="an inequality; sizes are lowered by four standard errors of the pilot",
            ),
        ),
    )
