"""Every registered claim is complete: source, texts that can be typeset, a derivation, checks that can fail."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import verifine
from claims.claim import PROFILES, Check, Claim, Context, examine
from claims.judges import Agreement, Ordering
from claims.records import CheckEvidence, Column, Evidence, Figure, Provenance, Run, Table
from claims.registry import BY_ID, CLAIMS, ledger, select
from claims.run import ALPHA
from claims.verifier import PlannedPower, Proportion
from reports.report import check_markup
from verdicts.calibration import heavy_tailed_laws
from verdicts.streams import Stream

DOCS = Path(verifine.__file__).parent / "docs"
CHECKS = [(claim, check) for claim in CLAIMS for check in claim.checks]

every_claim = pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
every_check = pytest.mark.parametrize(("claim", "check"), CHECKS, ids=[f"{k.id}: {c.name}" for k, c in CHECKS])


def test_there_are_claims_about_papers_code_and_the_verifier_with_distinct_identifiers() -> None:
    assert len(CLAIMS) >= 16
    assert len(BY_ID) == len(CLAIMS)
    assert {claim.about for claim in CLAIMS} == {"paper", "code", "own", "verifier"}
    assert {claim.printed for claim in CLAIMS} == {"holds", "holds-corrected", "refuted"}


@every_claim
def test_identifier_is_chapter_dot_name(claim: Claim) -> None:
    chapter, name = claim.id.split(".")
    assert chapter == claim.chapter.lower().replace(" ", "-")
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)


@every_claim
def test_nothing_that_the_reader_needs_is_empty(claim: Claim) -> None:
    for text in (claim.paper, claim.source, claim.title, claim.statement, claim.why, claim.derivation):
        assert text.strip()
    assert "\n" not in claim.title
    assert claim.checks


@every_claim
def test_correction_is_given_exactly_where_the_printed_form_is_wrong_and_it_is_refuted(claim: Claim) -> None:
    wrong = claim.printed != "holds"
    assert any(check.printed is not None for check in claim.checks) == wrong
    assert bool(claim.corrected) == wrong


@every_claim
def test_derivation_stands_in_the_docs(claim: Claim) -> None:
    name, _, anchor = claim.derivation.partition("#")
    headings = [line for line in (DOCS / name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert headings
    assert not anchor or anchor in map(verifine.slug, headings)


@every_check
def test_check_says_what_it_asks_and_carries_a_planted_error(claim: Claim, check: Check) -> None:
    assert check.name.strip()
    assert check.question.strip().endswith("?")
    assert check.margin_from.strip()
    assert check.controls
    assert all(name.strip() for name in (*check.controls, *check.coordinates))
    assert len(set(check.coordinates)) == len(check.coordinates) > 0
    names = [(role, name) for role, name, _ in check.readings()]
    assert len(set(names)) == len(names)


def test_checks_of_one_claim_have_different_names() -> None:
    assert len({(claim.id, check.name) for claim, check in CHECKS}) == len(CHECKS)


def compared(check: Check) -> list[int]:
    """How many numbers each subject of an exact check gives, and its reference."""
    if isinstance(check.judge, Agreement):
        return [np.size(values()) for values in (check.judge.reference, *(s for _, _, s in check.readings()))]
    if isinstance(check.judge, Ordering):
        return [np.size(side) for _, _, subject in check.readings() for side in subject()]
    if isinstance(check.judge, Proportion):
        return [len(heavy_tailed_laws()) + 1]
    assert isinstance(check.judge, PlannedPower)
    return [len(check.judge.errors())]


EXACT = [(claim, check) for claim, check in CHECKS if check.kind == "exact"]


@pytest.mark.parametrize(("claim", "check"), EXACT, ids=[f"{k.id}: {c.name}" for k, c in EXACT])
def test_coordinates_name_every_number_of_an_exact_check(claim: Claim, check: Check) -> None:
    assert set(compared(check)) == {len(check.coordinates)}


def test_coordinates_name_every_number_of_a_statistical_reference() -> None:
    for claim, check in CHECKS:
        if check.kind == "statistical" and hasattr(check.judge, "reference"):
            assert np.size(check.judge.reference()) == len(check.coordinates), claim.id


def test_every_text_can_be_typeset() -> None:
    evidence = tuple(
        Evidence(
            claim.record(),
            "inconclusive",
            False,
            tuple(CheckEvidence(c.name, c.kind, c.question, c.margin_from, c.coordinates, ()) for c in claim.checks),
            (),
            0.0,
        )
        for claim in CLAIMS
    )
    provenance = Provenance(0, "smoke", ALPHA, "", 0.0, "", "", {}, 1, tuple(BY_ID), True)
    check_markup(Run(provenance, evidence))


def test_ledger_grants_every_statistical_reading_a_share_and_no_more_than_alpha_in_all() -> None:
    book = ledger(ALPHA)
    shares = [book.spend(name) for claim in CLAIMS for name in claim.statistical_readings()]
    assert len(shares) == sum(len(check.readings()) for _, check in CHECKS if check.sampled) > 0
    assert min(shares) > 0
    assert math.fsum(shares) <= ALPHA * (1 + 1e-12)
    assert book.left == 0


def test_record_lists_kinds_and_planted_errors_once() -> None:
    record = BY_ID["estimators.half-order-unbiased"].record()
    assert record.kinds == ("exact", "statistical")
    assert record.controls == ("overlapping blocks",)


def test_tables_are_measured_beside_the_figures_from_the_same_stream(tmp_path: Path) -> None:
    def drawn(context: Context) -> str:
        return f"{context.stream.generator().normal():.6f}"

    def figures(context: Context) -> tuple[Figure, ...]:
        return (Figure("f", drawn(context), "c", "a"),)

    def tables(context: Context) -> tuple[Table, ...]:
        return (Table("t", "t", "c", (Column("a"),), ((drawn(context),),)),)

    claim = replace(BY_ID["foundations.elbo"], checks=(), figures=figures, tables=tables)
    evidence = examine(claim, Context(Stream(0), 0.0, PROFILES["smoke"], tmp_path), lambda reading: 0.0)
    assert evidence.tables[0].rows == ((evidence.figures[0].title,),)


def test_selection_is_by_identifier_paper_or_chapter_in_registry_order() -> None:
    assert select([], []) == CLAIMS
    assert [c.id for c in select(["verifier.power", "foundations.elbo"], [])] == ["foundations.elbo", "verifier.power"]
    assert select([], ["rlr"]) == tuple(c for c in CLAIMS if "RLR" in (c.paper, c.chapter)) != ()
    assert select([], ["Verifier"]) == tuple(c for c in CLAIMS if c.chapter == "Verifier") != ()
    both = select(["foundations.elbo"], ["verifier"])
    assert {c.id for c in both} == {"foundations.elbo", "verifier.false-alarm", "verifier.power"}
