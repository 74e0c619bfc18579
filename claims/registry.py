"""All claims, in the order of the report."""

from __future__ import annotations

from claims import estimators, foundations, verifier
from claims.claim import Claim
from verdicts.ledger import Ledger

CHAPTERS: tuple[Claim, ...] = (*foundations.CLAIMS, *estimators.CLAIMS)
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
    for name in ids:
        _known(name, sorted(BY_ID), "claim", "verifine claims")
    names = sorted({c.paper for c in CLAIMS} | {c.chapter for c in CLAIMS})
    lowered = {name.lower(): name for name in names}
    for name in papers:
        _known(name.lower(), sorted(lowered), "paper", "verifine claims")
    wanted = {name.lower() for name in papers}
    chosen = [c for c in CLAIMS if c.id in ids or {c.paper.lower(), c.chapter.lower()} & wanted]
    return tuple(chosen) if ids or papers else CLAIMS


def _known(name: str, known: list[str], what: str, listing: str) -> None:
    import difflib

    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"`{listing}` lists them"
        raise ValueError(f"unknown {what} {name!r}: {hint}")
