"""The report as a whole: everything measured is in it, in both forms, and nothing is fetched."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from claims.records import Run, from_json, to_json
from reports.content import Report, planted, report_of, status
from reports.page import page as page_of
from reports.paper import source
from reports.report import write_report
from tests.reports import fake


class Page(HTMLParser):
    """What a browser sees: identifiers, links, resources, pictures, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.identifiers: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.identifiers.append(str(values["id"]))
        if tag == "a":
            self.links.append(values.get("href") or "")
        self.resources += [str(values[name]) for name in ("src", "srcset", "data", "poster") if values.get(name)]
        self.resources += [
            str(values["href"]) for name in ("href",) if tag in ("link", "image", "use") and name in values
        ]
        if tag in ("svg", "img"):
            self.pictures.append(values)
        if tag not in ("meta", "input", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def run() -> Run:
    return fake.full_run()


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return report_of(run)


@pytest.fixture(scope="module")
def files(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return write_report(run, tmp_path_factory.mktemp("report") / "new")


@pytest.fixture(scope="module")
def page(files: tuple[Path, Path, Path]) -> Page:
    return Page(files[0].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def paper(report: Report) -> str:
    return source(report)


def test_the_evidence_comes_back_whole(run: Run, files: tuple[Path, Path, Path]) -> None:
    again = from_json(Run, files[2].read_text(encoding="utf-8"))
    assert to_json(again) == to_json(run)  # the records themselves differ: a nan is not equal to itself
    assert again.evidence[:13] == run.evidence[:13]


def test_three_files_and_no_litter(files: tuple[Path, Path, Path]) -> None:
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["evidence.json", "index.html", "report.pdf"]
    assert sum(path.stat().st_size for path in files) < 10e6


def test_the_pdf_is_one_with_pages(files: tuple[Path, Path, Path]) -> None:
    data = files[1].read_bytes()
    assert data.startswith(b"%PDF")
    assert int(max(re.findall(rb"/Count (\d+)", data), key=int)) > 5


def test_every_claim_is_in_page_and_paper(run: Run, page: Page, paper: str) -> None:
    for evidence in run.evidence:
        assert f"verifine verify --claim {evidence.statement.id}" in page.text
        assert f"verifine verify --claim {evidence.statement.id}" in paper
        assert f"claim-{re.sub('[^a-z0-9.]+', '-', evidence.statement.id)}" in page.identifiers
        assert evidence.error in page.text


def test_every_verdict_stands_as_a_word_with_its_claim(run: Run, files: tuple[Path, Path, Path], paper: str) -> None:
    articles = re.findall(r'<article class="claim".*?</article>', files[0].read_text(encoding="utf-8"), re.DOTALL)
    parts = re.split(r"#heading\(level: 2\)", paper)[1:]
    for evidence, article, part in zip(run.evidence, articles, parts, strict=True):
        word, shape = status(evidence).word, status(evidence).shape
        assert f'aria-hidden="true">{shape}</span> {word}' in article.split("</p>", 1)[0]
        assert f'"{shape}", "{word}"' in part[:600]
        readings = Counter(r.verdict for check in evidence.checks for r in check.readings)
        for verdict, times in readings.items():
            assert article.count(f"</span> {verdict}</span>") >= times
            assert part.count(f'"{verdict}"') >= times


def test_every_name_title_and_figure_is_in_the_page(run: Run, page: Page) -> None:
    for evidence in run.evidence:
        for label in (evidence.statement.title, evidence.statement.source, evidence.statement.chapter):
            assert "$" in label or label in page.text
        for check in evidence.checks:
            assert check.margin_from.replace("$10^{-9}$", "")[-20:] in page.text
            assert all("$" in reading.name or reading.name in page.text for reading in check.readings)
        assert all(figure.title in page.text and figure.alt in page.text for figure in evidence.figures)


def test_page_and_paper_have_the_same_figures(page: Page, paper: str, report: Report) -> None:
    keys = {name.removeprefix("figure-") for name in page.identifiers if name.startswith("figure-")}
    assert keys == set(re.findall(r'image\("([^"]+)\.svg"', paper))
    assert "frontier" in keys
    assert len(keys) == 17


def test_nothing_is_fetched(page: Page, files: tuple[Path, Path, Path]) -> None:
    text = files[0].read_text(encoding="utf-8")
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(['\"]?([^)'\"]+)", text))
    assert "@import" not in text
    assert "<script src" not in text


def test_letters_are_outlined_once_and_all_their_uses_resolve(page: Page, files: tuple[Path, Path, Path]) -> None:
    text = files[0].read_text(encoding="utf-8")
    outlines = re.findall(r'<path id="[^"]+"([^>]*scale\(0\.015625\)"/>)', text)
    assert len(outlines) == len(set(outlines)) > 40
    uses = re.findall(r'xlink:href="#([^"]+)"', text)
    assert len(uses) > 1000
    assert set(uses) <= set(page.identifiers)


def test_all_links_resolve(page: Page, files: tuple[Path, Path, Path]) -> None:
    assert len(page.identifiers) == len(set(page.identifiers))
    assert "#claim-rlr-.estimator" in page.links
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.identifiers
        else:
            assert (files[0].parent / link).exists()


def test_all_pictures_have_a_text_alternative(page: Page) -> None:
    assert page.pictures[0]["aria-hidden"] == "true"  # the shared outlines of letters, nothing to see
    assert len(page.pictures) == 18
    for picture in page.pictures[1:]:
        names = str(picture["aria-labelledby"]).split()
        assert picture["role"] == "img"
        assert set(names) <= set(page.identifiers)


def test_the_headline_counts(report: Report) -> None:
    assert re.sub(r"\*\*", "", report.headline) == (
        "Of 11 statements in papers and released code, 4 hold as printed, 1 holds after a correction, 3 are refuted as "
        "printed and 3 are inconclusive; of 3 statements of our own, 2 are verified, 1 is refuted and 0 are "
        "inconclusive. 20 of 21 planted errors were found."
    )


def test_the_tables_of_what_is_wrong(report: Report) -> None:
    papers = [(f.section.statement.id, f.wrong_value, f.right_value) for f in report.wrong_in_papers]
    assert papers == [
        ("rlr:.estimator", "0.479808", "0.239904"),
        ("rlr:.variance", "1", "3.5"),
        ("rlr:.memory", "50", "1"),
    ]
    assert report.wrong_in_papers[0].coordinate == r"$\theta_{1}$"
    code = [(f.section.statement.id, f.wrong_value, f.missing) for f in report.wrong_in_code]
    assert code == [("released.step-index", "0.0311", ""), ("released.clip", "", "its code failed in this run")]


def test_a_planted_error_that_one_check_misses_is_not_found(run: Run) -> None:
    both = run.evidence[3]
    assert {badge.key for badge in planted(both).values() if badge} == {"refuted"}
    missed = replace(both.checks[1].readings[2], verdict="inconclusive")
    check = replace(both.checks[1], readings=(*both.checks[1].readings[:2], missed))
    weaker = planted(replace(both, checks=(both.checks[0], check)))
    assert weaker["sign flipped"] is not None
    assert weaker["sign flipped"].key == "inconclusive"


def test_the_spent_error_budget_is_the_sum_over_readings(run: Run, report: Report) -> None:
    total = sum(r.alpha for e in run.evidence for c in e.checks for r in c.readings)
    assert report.spent_total == "6.75 × 10⁻⁸"
    assert total == pytest.approx(6.75e-8)
    assert {basis.name: len(basis.sections) for basis in report.bases} == {
        "Exact computation": 4,
        "Statistics": 8,
        "Both": 1,
        "Nothing yet": 1,
    }


def test_a_finished_run_is_not_called_partial(page: Page) -> None:
    assert "This report is partial" not in page.text


def test_the_page_is_the_same_in_every_run(tmp_path: Path) -> None:
    small = replace(fake.full_run(), evidence=fake.full_run().evidence[:2])
    first = [path.read_bytes() for path in write_report(small, tmp_path / "a")]
    second = [path.read_bytes() for path in write_report(small, tmp_path / "b")]
    assert first[0] == second[0]
    assert first[2] == second[2]


def test_a_partial_run_says_so(tmp_path: Path) -> None:
    index, paper, _ = write_report(fake.partial_run(), tmp_path)
    text = Page(index.read_text(encoding="utf-8")).text
    assert "This report is partial: the run has not finished." in text
    assert "11 of 14 selected claims have no evidence yet" in text
    assert paper.read_bytes().startswith(b"%PDF")


def with_section(run: Run, place: int, **changes: Any) -> Run:
    return replace(run, evidence=tuple(replace(e, **changes) if i == place else e for i, e in enumerate(run.evidence)))


def test_the_first_screen_falls_back_to_the_only_frontier(report: Report, page: Page) -> None:
    assert report.guide is not None
    assert report.guide.advice is None
    assert report.guide.frontier is not None
    assert report.guide.frontier[0].statement.id == "rlr:.estimator"
    assert "Which estimator for my budget? Not measured" not in page.text


def test_advice_brings_its_own_frontier_to_the_first_screen(run: Run) -> None:
    later = with_section(run, 7, figures=(fake.GRID,), tables=(fake.COMPARED, fake.ADVICE))
    report = report_of(replace(later, evidence=(later.evidence[3], later.evidence[7])))
    guide = report.guide
    assert guide is not None
    assert guide.advice is not None
    assert guide.frontier is not None
    assert guide.advice[1].title == fake.ADVICE.title
    assert guide.frontier[1].title == fake.GRID.title
    assert [(s.statement.id, doubt) for s, doubt in guide.origins] == [("rlr:.memory", "")]
    page = Page(page_of(report))
    assert {"table-advice", "figure-frontier", "table-t1-2-1"} <= set(page.identifiers)
    assert len(page.identifiers) == len(set(page.identifiers))
    findings = page.text[: page.text.index("How to read the verdicts")]
    for cell in (fake.ADVICE.rows[0][0], fake.ADVICE.rows[0][1], fake.ADVICE.rows[2][0]):
        assert cell in findings
    assert "here in advance" in source(report)


def test_advice_without_a_frontier_keeps_the_last_frontier_and_doubts_are_told(run: Run) -> None:
    earlier = replace(run.evidence[1], figures=(fake.GRID,))
    advised = replace(run.evidence[6], tables=(fake.ADVICE,))  # a claim that is inconclusive
    guide = report_of(replace(run, evidence=(earlier, run.evidence[3], advised))).guide
    assert guide is not None
    assert guide.frontier is not None
    assert guide.frontier[1].title == fake.FRONTIER.title  # the last
    doubts = {s.statement.id: doubt for s, doubt in guide.origins}
    assert doubts == {"rlr:.rate": "which this run could not verify", "rlr:.estimator": ""}


def test_a_chapter_of_thirty_claims_is_numbered_in_order_and_found_from_the_contents(run: Run) -> None:
    plain = replace(run.evidence[5], checks=())
    many = tuple(
        replace(plain, statement=replace(plain.statement, id=f"many.s{i}", chapter="Many", title=f"Statement {i}"))
        for i in range(30)
    )
    report = report_of(replace(run, evidence=(run.evidence[0], *many, run.evidence[11])))
    assert [chapter.title for chapter in report.chapters] == ["Foundations", "Many", "Verifier"]
    assert [s.number for s in report.chapters[1].sections] == [f"2.{i}" for i in range(1, 31)]
    page = Page(page_of(report))
    assert [link for link in page.links if link.startswith("#claim-many")][:30] == [
        f"#claim-many.s{i}" for i in range(30)
    ]
    assert {f"claim-many.s{i}" for i in range(30)} < set(page.identifiers)
    assert len(page.identifiers) == len(set(page.identifiers))


def test_an_empty_run_gives_a_report(tmp_path: Path) -> None:
    index, paper, evidence = write_report(fake.empty_run(), tmp_path)
    page = Page(index.read_text(encoding="utf-8"))
    assert "This run has checked no statements." in page.text
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.identifiers)
    assert paper.read_bytes().startswith(b"%PDF")
    assert from_json(Run, evidence.read_text(encoding="utf-8")) == fake.empty_run()


def test_the_evidence_is_kept_when_a_text_cannot_be_typeset(tmp_path: Path) -> None:
    run = fake.partial_run()
    bad = replace(run.evidence[0], statement=replace(run.evidence[0].statement, why=r"$\frac{1}$"))
    with pytest.raises(ValueError, match=r"claim foundations\.chain-rule, statement\.why"):
        write_report(replace(run, evidence=(bad,)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.json"]
