"""How readings become a verdict: nothing counts that has not been seen to fail."""

from dataclasses import replace
from pathlib import Path

import pytest

from claims.claim import PROFILES, Check, Claim, Context, examine, settle
from claims.records import CheckEvidence, Evidence, Printed, Reading, Role, Verdict
from claims.registry import BY_ID
from verdicts.streams import Stream


def check(*rows: tuple[Role, Verdict]) -> CheckEvidence:
    readings = tuple(
        Reading(role, f"{role} {i}", verdict, (0.0,), (0.0,), (0.0,), (0.0,), (1.0,), 1, 0.0, 0.0)
        for i, (role, verdict) in enumerate(rows)
    )
    return CheckEvidence("check", "exact", "?", "", ("x",), readings)


CLAIM: tuple[Role, Verdict] = ("claim", "verified")
FOUND: tuple[Role, Verdict] = ("control", "refuted")
WRONG: tuple[Role, Verdict] = ("printed", "refuted")
GOOD = check(CLAIM, FOUND)
GOOD_PRINTED = check(CLAIM, WRONG, FOUND)


@pytest.mark.parametrize(
    ("printed", "checks", "expected"),
    [
        ("holds", [GOOD], ("verified", True)),
        ("holds", [GOOD, check(CLAIM, FOUND, FOUND)], ("verified", True)),
        ("holds-corrected", [GOOD, GOOD_PRINTED], ("verified", True)),
        ("refuted", [GOOD_PRINTED], ("verified", True)),
        # the statement itself
        ("holds", [check(("claim", "refuted"), FOUND)], ("refuted", False)),
        ("holds", [GOOD, check(("claim", "refuted"), FOUND)], ("refuted", False)),
        ("holds", [check(("claim", "refuted"))], ("refuted", False)),
        ("holds", [check(("claim", "inconclusive"), FOUND)], ("inconclusive", False)),
        ("holds", [GOOD, check(("claim", "inconclusive"), FOUND)], ("inconclusive", False)),
        ("holds", [check(("claim", "inconclusive"), FOUND), check(("claim", "refuted"), FOUND)], ("refuted", False)),
        # planted errors: absent, not found, or not found in one check of two
        ("holds", [check(CLAIM)], ("inconclusive", False)),
        ("holds", [GOOD, check(CLAIM)], ("inconclusive", False)),
        ("holds", [check(CLAIM, ("control", "verified"))], ("inconclusive", False)),
        ("holds", [check(CLAIM, ("control", "inconclusive"))], ("inconclusive", False)),
        ("holds", [check(CLAIM, FOUND, ("control", "inconclusive"))], ("inconclusive", False)),
        ("holds", [GOOD, check(CLAIM, ("control", "verified"))], ("inconclusive", False)),
        # nothing measured
        ("holds", [], ("inconclusive", False)),
        ("holds", [check(FOUND)], ("inconclusive", False)),
        # the printed form is not what the registry says of it
        ("holds-corrected", [GOOD], ("verified", False)),
        ("holds-corrected", [check(CLAIM, ("printed", "verified"), FOUND)], ("verified", False)),
        ("refuted", [check(CLAIM, ("printed", "inconclusive"), FOUND)], ("verified", False)),
        ("refuted", [GOOD_PRINTED, check(CLAIM, ("printed", "verified"), FOUND)], ("verified", False)),
        ("holds", [GOOD_PRINTED], ("verified", False)),
    ],
)
def test_verdict_and_whether_it_is_the_recorded_one(
    printed: Printed, checks: list[CheckEvidence], expected: tuple[Verdict, bool]
) -> None:
    assert settle(printed, tuple(checks)) == expected


# The same, end to end, on a registered claim with an exact and a statistical check.

TRUNCATION = BY_ID["estimators.truncation-bias"]
EXACT, SAMPLED = TRUNCATION.checks


def examined(claim: Claim, cache: Path) -> Evidence:
    return examine(claim, Context(Stream(0), 0.0, PROFILES["smoke"], cache), lambda reading: 1e-8)


def verdicts(evidence: Evidence, role: Role) -> list[Verdict]:
    return [r.verdict for c in evidence.checks for r in c.readings if r.role == role]


def test_claim_is_verified_as_it_stands(tmp_path: Path) -> None:
    evidence = examined(TRUNCATION, tmp_path)
    assert (evidence.verdict, evidence.as_recorded) == ("verified", True)
    assert verdicts(evidence, "control") == verdicts(evidence, "printed") == ["refuted", "refuted"]
    assert [r.alpha for r in evidence.checks[0].readings] == [0.0] * 3  # exact checks spend nothing
    assert [r.alpha for r in evidence.checks[1].readings] == [1e-8] * 3


@pytest.mark.parametrize(
    ("checks", "control"),
    [
        ((EXACT, replace(SAMPLED, controls={})), ["refuted"]),
        ((replace(EXACT, controls={}), SAMPLED), ["refuted"]),
        ((EXACT, replace(SAMPLED, controls={"truncated at 3": SAMPLED.subject})), ["refuted", "verified"]),
        ((replace(EXACT, controls={"sum from T'": EXACT.subject}), SAMPLED), ["verified", "refuted"]),
    ],
    ids=["sampled removed", "exact removed", "sampled neutralised", "exact neutralised"],
)
def test_claim_whose_planted_error_is_removed_or_harmless_is_inconclusive(
    checks: tuple[Check, Check], control: list[Verdict], tmp_path: Path
) -> None:
    evidence = examined(replace(TRUNCATION, checks=checks), tmp_path)
    assert verdicts(evidence, "claim") == ["verified", "verified"]
    assert verdicts(evidence, "control") == control
    assert (evidence.verdict, evidence.as_recorded) == ("inconclusive", False)


def test_planted_error_in_the_place_of_the_statement_refutes_it(tmp_path: Path) -> None:
    (wrong,) = SAMPLED.controls.values()
    evidence = examined(replace(TRUNCATION, checks=(EXACT, replace(SAMPLED, subject=wrong))), tmp_path)
    assert (evidence.verdict, evidence.as_recorded) == ("refuted", False)


def test_budget_that_is_too_small_is_inconclusive_and_not_verified(tmp_path: Path) -> None:
    claim = replace(TRUNCATION, checks=(SAMPLED,))
    poor = replace(PROFILES["smoke"], max_samples=1 << 15, margin_scale=0.01)
    evidence = examine(claim, Context(Stream(0), 0.0, poor, tmp_path), lambda reading: 1e-8)
    assert verdicts(evidence, "claim") == ["inconclusive"]
    assert (evidence.verdict, evidence.as_recorded) == ("inconclusive", False)
