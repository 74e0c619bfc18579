"""All claims, in the order of the report."""

from __future__ import annotations

import difflib

from claims import (
    at_scale,
    biases,
    bilevel,
    bilevel_descent,
    bilevel_guidance,
    bilevel_learned,
    bilevel_schedule,
    bilevel_search,
    bilevel_tuning,
    estimators,
    foundations,
    frontier,
    implicit,
    implicit_digits,
    implicit_experiments,
    implicit_hexagon,
    implicit_paths,
    implicit_queue,
    implicit_rates,
    learned,
    pift,
    pift_constants,
    pift_convergence,
    pift_experiments,
    pift_learned,
    pift_limits,
    pift_parametric,
    pift_quadratic,
    released,
    rlr,
    rlr_convergence,
    rlr_reported,
    rlr_variances,
    sft,
    sft_baselines,
    sft_experiments,
    sft_fast,
    telescoped,
    training,
    variances,
    verifier,
)
from claims.claim import Claim
from verdicts.ledger import Ledger

CHAPTERS: tuple[Claim, ...] = (
    *foundations.CLAIMS,
    *estimators.CLAIMS,
    *biases.CLAIMS,
    *released.CLAIMS,
    *learned.CLAIMS,
    *variances.CLAIMS,
    *rlr.CLAIMS,
    *rlr_variances.CLAIMS,
    *rlr_convergence.CLAIMS,
    *rlr_reported.CLAIMS,
    *telescoped.CLAIMS,
    *frontier.CLAIMS,
    *training.CLAIMS,
    *pift.CLAIMS,
    *pift_constants.CLAIMS,
    *pift_quadratic.CLAIMS,
    *pift_convergence.CLAIMS,
    *pift_parametric.CLAIMS,
    *pift_limits.CLAIMS,
    *pift_experiments.CLAIMS,
    *pift_learned.CLAIMS,
    *sft.CLAIMS,
    *sft_baselines.CLAIMS,
    *sft_experiments.CLAIMS,
    *sft_fast.CLAIMS,
    *implicit.CLAIMS,
    *implicit_rates.CLAIMS,
    *implicit_hexagon.CLAIMS,
    *implicit_experiments.CLAIMS,
    *implicit_queue.CLAIMS,
    *implicit_paths.CLAIMS,
    *implicit_digits.CLAIMS,
    *bilevel.CLAIMS,
    *bilevel_descent.CLAIMS,
    *bilevel_tuning.CLAIMS,
    *bilevel_guidance.CLAIMS,
    *bilevel_schedule.CLAIMS,
    *bilevel_search.CLAIMS,
    *bilevel_learned.CLAIMS,
    *at_scale.CLAIMS,
)
CLAIMS: tuple[Claim, ...] = (*CHAPTERS, verifier.FALSE_ALARM, verifier.power(CHAPTERS))
BY_ID: dict[str, Claim] = {claim.id: claim for claim in CLAIMS}


def ledger(total: float) -> Ledger:
    """Return the error ledger: `total` split equally over all statistical readings of all registered claims.

    The shares do not depend on which claims a run selects, so a claim's evidence does not either.
    """
    return Ledger(total, [name for claim in CLAIMS for name in claim.statistical_readings()])


def select(ids: list[str], papers: list[str]) -> tuple[Claim, ...]:
    """Return the claims with these identifiers and of these papers or chapters (all, if both lists are empty).

    Raises:
        ValueError: for an unknown identifier or paper, naming the nearest known one.
    """
    names = sorted({c.paper for c in CLAIMS} | {c.chapter for c in CLAIMS})
    for name in ids:
        if name not in BY_ID:
            raise ValueError(_unknown("claim", name, sorted(BY_ID)))
    wanted = {name.lower() for name in papers}
    for name in papers:
        if name.lower() not in {known.lower() for known in names}:
            raise ValueError(_unknown("paper", name, names))
    chosen = [c for c in CLAIMS if c.id in ids or {c.paper.lower(), c.chapter.lower()} & wanted]
    return tuple(chosen) if ids or papers else CLAIMS


def _unknown(what: str, name: str, known: list[str]) -> str:
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, 1)
    hint = f"did you mean {lowered[near[0]]!r}?" if near else "`verifine claims` lists them"
    return f"unknown {what} {name!r}: {hint}"
