"""Two reports side by side: what counts as a difference, what is named, and the page."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import curvscope as cs
from curvscope.cli import make_app
from curvscope.errors import OptionError, OutputError, ReportError
from curvscope.report import diff, read_report
from curvscope.report.differences.model import NOISE, SAME, Value, state_of
from curvscope.report.differences.page import tables
from curvscope.report.headings import heading

from .browser import Browser, browser, find

Document = dict[str, Any]


@pytest.fixture(scope="module")
def folder(small_report: Path) -> Path:
    return small_report


@pytest.fixture(scope="module")
def document(folder: Path) -> Document:
    return read_report(folder)


def other(document: Document, change: Callable[[Document], None]) -> Document:
    made = copy.deepcopy(document)
    change(made)
    return made


def row(document: Document, name: str, block: str = "(all)") -> Document:
    rows = document["comparisons"]["GGN"]["rows"]
    return next(r for r in rows if (r["approximation"], r["block"]) == (name, block))


def test_a_report_equals_itself_and_times_and_machines_do_not_count(document: Document) -> None:
    def change(d: Document) -> None:
        d["seconds"] *= 3
        d["created"] = "2030-01-01T00:00:00+00:00"
        d["environment"]["versions"]["torch"] = "99.0"
        d["command"] = "curvscope report elsewhere"
        d["config"]["out"] = "elsewhere"
        for line in d["cost"]:
            line["seconds"] *= 2

    assert diff(document, document).same
    found = diff(document, other(document, change))
    assert found.same and not found.changed and not found.only
    assert {w.name for w in found.words} == {"torch", "command"}
    assert set(found.counts()) == {SAME} and len(found.numbers) > 300
    assert "say the same" in str(found) and "torch" in str(found)


def test_changed_numbers_are_found_and_ranked(document: Document) -> None:
    def change(d: Document) -> None:
        row(d, "K-FAC")["values"]["error"] *= 1.5
        row(d, "EKFAC")["values"]["cosine"] += 0.01
        row(d, "KFRA")["values"]["error"] *= 1 + 1e-5  # below the tolerance
        d["layers"][0]["trace"] *= 10

    found = diff(document, other(document, change))
    assert not found.same
    assert [(n.name or n.place, n.metric) for n in found.changed] == [
        (document["layers"][0]["layer"], "trace"),
        ("K-FAC", "error"),
        ("EKFAC", "cosine"),
    ]
    first = found.changed[0]
    assert first.relative == pytest.approx(9.0) and first.difference > 0
    assert len(diff(document, other(document, change), tolerance=1e-7).changed) == 4
    frame = found.to_frame()
    assert len(frame) == len(found.numbers) and frame["relative"].abs().max() == first.relative


def test_standard_errors_explain_a_change_or_do_not(folder: Path) -> None:
    document = read_report(folder)
    name, spread = "Hutchinson diagonal", 0.01
    row(document, name)["stderr"]["error"] = spread  # of a comparison that estimates
    for factor, state in ((3.0, NOISE), (9.0, "changed")):

        def change(d: Document, factor: float = factor) -> None:
            row(d, name)["values"]["error"] += factor * spread

        found = diff(document, other(document, change), tolerance=0.0)
        (number,) = [n for n in found.numbers if n.state != SAME]
        assert (number.name, number.state) == (name, state)
        assert found.same == (state == NOISE)


def test_small_numbers_are_compared_on_their_natural_scale() -> None:
    assert state_of(Value(1e-9, scale=1e-3), Value(3e-9, scale=1e-3), 1e-3) == SAME
    assert state_of(Value(1e-9), Value(3e-9), 1e-3) == "changed"
    assert state_of(Value(0.0), Value(0.0), 0.0) == SAME
    assert state_of(Value(math.inf), Value(math.inf), 0.0) == SAME
    assert state_of(None, Value(1.0), 0.0) == "only in B"
    assert state_of(Value(1.0), Value(math.nan), 0.0) == "only in A"


def test_what_only_one_has_is_named_and_not_compared(document: Document) -> None:
    block = next(iter(document["problem"]["blocks"]))

    def change(d: Document) -> None:
        del d["problem"]["blocks"][block]
        d["layers"] = [one for one in d["layers"] if one["layer"] != block]
        for entry in d["approximations"]:
            if entry["name"] == "KFRA":
                entry["available"] = False
        d["comparisons"]["GGN"]["rows"] = [
            r
            for r in d["comparisons"]["GGN"]["rows"]
            if r["block"] != block and r["approximation"] != "KFRA"
        ]

    found = diff(document, other(document, change))
    assert {(one.what, one.name, one.in_a) for one in found.only} == {
        ("block", block, True),
        ("approximation", "KFRA", True),
    }
    assert not found.same and not found.changed
    assert f"Only A has the block {block}." in str(found)
    assert "Only B" in str(diff(other(document, change), document))


def test_settings_verdicts_and_sentences_that_differ(document: Document) -> None:
    def change(d: Document) -> None:
        d["settings"]["seed"] = 7
        d["problem"]["samples"] += 1
        d["warnings"].append("Beware of the dog.")
        d["summary"][0] = d["summary"][0].replace("0.", "1.")  # numbers alone
        d["layers"][0]["best_approximation"] = "FOOF"

    found = diff(document, other(document, change))
    words = {(w.table, w.name): w for w in found.words}
    assert words["settings", "seed"].b == "7" and ("settings", "samples") in words
    assert words["warnings", "Beware of the dog."].a is None
    assert words["verdicts", f"closest to {document['layers'][0]['layer']}"].b == "FOOF"
    (said,) = [w for w in found.words if w.table == "summary"]
    assert not said.counts and said.a and said.b
    assert not found.same


def test_trainings_are_compared_too(trainings: Document) -> None:
    def change(d: Document) -> None:
        d["runs"][0]["test_loss"] = 0.5
        d["optimizers"][1]["cosine_at_end"] = 0.9
        d["runs"][1]["state"] = "diverged"

    assert diff(trainings, trainings).same
    found = diff(trainings, other(trainings, change))
    assert {(n.table, n.place, n.metric) for n in found.changed} == {
        ("trainings", "kbfgs, lr 0.3, seed 0", "test_loss"),
        ("optimizers", "adam", "cosine at the end"),
    }
    assert [w.name for w in found.words] == ["end of adam, lr 0.01, seed 0"]


@pytest.fixture
def trainings(document: Document) -> Document:
    def run(name: str, lr: float) -> Document:
        facts = {"train_loss": 0.3, "test_loss": 0.4, "test_accuracy": 0.9, "state": "finished"}
        return {"optimizer": name, "lr": lr, "seed": 0, "alarms": [], **facts}

    def optimizer(name: str, lr: float) -> Document:
        rates = [{"lr": lr, "score": 0.3, "runs": []}]
        ends = {"error_at_end": 0.5, "cosine_at_end": 0.8}
        return {"optimizer": name, "best_lr": lr, "rates": rates, **ends}

    pairs = (("kbfgs", 0.3), ("adam", 0.01))
    return {
        "kind": "curvscope report of runs",
        "schema": 1,
        **{k: document[k] for k in ("created", "command", "environment")},
        "problem": "digits-mlp",
        "plan": {"epochs": 3, "runs": []},
        "summary": ["All is well."],
        "warnings": [],
        "figures": [],
        "optimizers": [optimizer(*pair) for pair in pairs],
        "runs": [run(*pair) for pair in pairs],
    }


def test_what_cannot_be_compared_is_refused(
    document: Document, trainings: Document, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ReportError, match=r"a problem and .* one of trainings"):
        diff(document, trainings)
    with pytest.raises(ReportError, match="layout 2"):
        diff(document, document | {"schema": 2})
    with pytest.raises(ReportError, match="is damaged: an entry"):
        diff(document, document | {"layers": [{}]})
    with pytest.raises(ReportError, match="There is no"):
        diff(folder, tmp_path / "nowhere")
    for tolerance in (-1, math.nan, "much"):
        with pytest.raises(OptionError, match="tolerance="):
            diff(document, document, tolerance=tolerance)  # type: ignore[arg-type]


def test_the_page_replaces_only_pages_of_ours(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "d.html"
    diff(folder, folder, out=page)
    diff(folder, folder, out=page)
    assert [p.name for p in tmp_path.iterdir()] == ["d.html"]
    page.write_text("years of work")
    with pytest.raises(OutputError, match="no page of curvscope"):
        diff(folder, folder, out=page)
    for place, match in ((tmp_path, "is a folder"), (tmp_path / "x" / "d.html", "no folder")):
        with pytest.raises(OutputError, match=match):
            diff(folder, folder, out=place)
    assert page.read_text() == "years of work"


def test_figures_with_more_than_drawing_are_left_out(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "b"
    shutil.copytree(folder, place)
    figure = place / "figures" / "errors.svg"
    clean = figure.read_text()
    for bad in (
        "<script>alert(7)</script>",
        '<image href="http://x.org/a.png"/>',
        "<g onload='x'/>",
    ):
        figure.write_text(clean.replace("</svg>", f"{bad}</svg>"))
        text = diff(folder, place, out=tmp_path / "d.html") and (tmp_path / "d.html").read_text()
        assert "Report B has no such figure" in text
        assert "alert(7)" not in text and "x.org" not in text and "onload" not in text


def run(*arguments: str) -> Any:
    return CliRunner().invoke(make_app(), list(arguments))


def test_exit_codes_and_json(folder: Path, document: Document, tmp_path: Path) -> None:
    result = run("diff", str(folder), str(folder))
    assert result.exit_code == 0 and "say the same" in result.stdout

    def change(d: Document) -> None:
        row(d, "K-FAC")["values"]["error"] *= 2

    (tmp_path / "report.json").write_text(json.dumps(other(document, change)))
    result = run("diff", str(folder), str(tmp_path), "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1 and not told["same"]
    (number,) = told["numbers"]
    assert (number["name"], number["relative"]) == ("K-FAC", pytest.approx(1.0))
    assert run("diff", str(folder), str(tmp_path), "--tolerance", "0.6").exit_code == 0
    for wrong in ([str(folder)], [str(folder), str(tmp_path / "no")], [str(folder), "--tolerance"]):
        result = run("diff", *wrong)
        assert result.exit_code == 2 and "Traceback" not in result.output
    result = run("diff", str(folder), str(folder), "-o", str(tmp_path / "report.json"))
    assert result.exit_code == 2 and "no page of curvscope" in " ".join(result.stderr.split())
    result = run("diff", str(folder), str(folder), "--open")
    assert result.exit_code == 2 and "--out FILE.html" in " ".join(result.stderr.split())
    assert cs.report.diff is diff


# -- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("needs Chromium or Chrome on the PATH, or its path in CURVSCOPE_BROWSER")
    with browser(program) as running:
        yield running


def test_the_page_in_a_browser(
    chromium: Browser, folder: Path, document: Document, tmp_path: Path
) -> None:
    def change(d: Document) -> None:
        row(d, "K-FAC")["values"]["error"] *= 1.5
        d["warnings"].append("<b>Beware</b> of the dog.")

    place = tmp_path / "b"
    shutil.copytree(folder, place)
    (place / "report.json").write_text(json.dumps(other(document, change)))
    figure = place / "figures" / "errors.svg"
    figure.write_text(figure.read_text().replace("relative Frob", "Relative Frob"))
    page = tmp_path / "d.html"
    diff(folder, place, out=page)
    assert page.stat().st_size < 5_000_000
    tab = chromium.tab()
    tab.size(1300, 900)
    tab.media(scheme="light")
    tab.open(page)
    assert tab.errors == []
    assert {u for u in tab.requests if not u.startswith("data:")} == {page.resolve().as_uri()}
    text = tab.evaluate("document.body.innerText")
    assert "<b>Beware</b> of the dog." in text and "+50.0 %" in text
    assert tab.evaluate("document.querySelectorAll('figure.pair svg.figure').length") == 2
    assert tab.evaluate("document.querySelectorAll('figure.same svg.figure').length") > 5
    shown = (
        "[...document.querySelectorAll('tr[data-series=\"K-FAC\"]')].filter(r => r.offsetParent)"
    )
    assert tab.evaluate(f"{shown}.length") > 0
    tab.click(".choices input[value='K-FAC']")
    assert tab.evaluate(f"{shown}.length") == 0
    for scheme in ("light", "dark"):
        tab.media(scheme=scheme)
        worst = tab.evaluate(Path(__file__).with_name("contrast.js").read_text(encoding="utf-8"))
        assert worst[0] >= 4.5, worst
    for width in (320, 390, 1024):
        tab.size(width, 844, phone=width < 800)
        tab.open(page)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.media(kind="print")
    tab.size(690, 1000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 690
    assert tab.errors == []
    assert tab.pdf().startswith(b"%PDF")


def test_headings_and_places_are_those_of_the_report(document: Document) -> None:
    """No name of a column as it is in the code, and blocks that are numbers say that they are."""

    def change(d: Document) -> None:
        row(d, "K-FAC", "0")["values"]["error"] *= 1.5
        d["layers"][0]["negative_eigenvalues"] = 7

    document = json.loads(json.dumps(document).replace('"last"', '"0"'))
    found = diff(document, other(document, change))
    made = {title: [table for _, table in parts] for title, parts in tables(found)}
    names = {number.metric for number in found.numbers}
    for columns in ([c for t in parts for c in t.columns] for parts in made.values()):
        titles = {column.title for column in columns}
        assert not titles & {name for name in names if heading(name).title != name}
        assert not any("_" in title for title in titles)
    concentrated = made["Concentration"][0]
    assert [c.title for c in concentrated.columns][1:] == [
        heading(key).title
        for key in ("diagonal_share", "score", "disjoint", "dominant", "kaiser", "snr")
    ]
    assert all(column.doc for column in concentrated.columns[1:])
    assert "block 0, exact block" in [r[0].text for r in concentrated.rows]
    first = found.changed[0]
    assert (first.place, first.where) == ("0", "K-FAC, block 0")
    assert "error of K-FAC, block 0, from" in str(found)
