"""One report of a small network, looked at from all sides."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.errors import NonFiniteError, OptionError, OutputError
from curvscope.report import ReportPaths, make_report
from curvscope.report.document import schema

VOID = {"meta", "link", "br", "wbr", "hr", "img", "input", "path", "use", "image", "rect", "stop"}
SECTIONS = {
    "summary",
    "layers",
    "errors",
    "each-layer",
    "concentration",
    "coverage",
    "verification",
    "methods",
    "cost",
    "settings",
}
NASTY = 'a<b>"&'


class Net(nn.Module):
    """Two layers that K-FAC covers, one that it does not, and names that HTML must escape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add_module(NASTY, nn.Linear(4, 5))
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(getattr(self, NASTY)(x))))


def data(samples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=generator)


def problem() -> cs.Problem:
    with torch.random.fork_rng():
        model = Net().double()
    return cs.Problem(model, nn.CrossEntropyLoss(), data(), name="<script>alert(1)</script>")


@pytest.fixture(scope="module")
def given() -> cs.Problem:
    return problem()


@pytest.fixture(scope="module")
def paths(given: cs.Problem, tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    out = tmp_path_factory.mktemp("reports") / "small"
    return make_report(given, out, probes=4, seed=7, command="curvscope report x --out y")


@pytest.fixture(scope="module")
def document(paths: ReportPaths) -> dict:
    return json.loads(paths.json.read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that elements nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.images: list[dict] = []
        self.tables: list[dict] = []
        self.headings: list[int] = []
        self.heads: list[dict] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif "href" in values or "src" in values:
            self.resources.append(values.get("href") or values.get("src") or "")
        if tag in ("img", "svg"):
            self.images.append({"tag": tag, **values})
        if tag == "table":
            self.tables.append({"caption": False})
        if tag == "caption":
            self.tables[-1]["caption"] = True
        if tag == "th":
            self.heads.append(values)
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append((tag, values))

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open and self.open[-1][0] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not any(tag in ("style", "script") for tag, _ in self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def page(paths: ReportPaths) -> Page:
    found = Page()
    found.feed(paths.html.read_text(encoding="utf-8"))
    found.close()
    assert not found.open
    return found


# -- the page ------------------------------------------------------------------------------------


def test_page_is_one_file_that_needs_no_network(paths: ReportPaths, page: Page) -> None:
    html = paths.html.read_text(encoding="utf-8")
    assert len(html.encode()) < 5e6
    assert all(r.startswith(("#", "data:")) for r in page.resources), page.resources
    outside = [x for x in re.findall(r"https?://[^\s\"'<>)]+", html) if "www.w3.org" not in x]
    assert outside == []
    assert "@import" not in html and not re.search(r"url\((?![\"']?(#|data:))", html)
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert (paths.folder / link).is_file()


def test_page_has_every_section_and_layer(page: Page, given: cs.Problem) -> None:
    assert set(page.ids) >= SECTIONS
    assert sum(name.startswith("layer-") for name in page.ids) == len(given.blocks)
    assert len(page.ids) == len(set(page.ids))


def test_page_is_accessible(page: Page, paths: ReportPaths) -> None:
    html = paths.html.read_text(encoding="utf-8")
    assert '<html lang="en">' in html and "viewport" in html
    assert "light-dark(" in html and "@media print" in html
    assert len(page.images) > 10
    for image in page.images:
        text = image.get("alt") if image["tag"] == "img" else image.get("aria-label")
        assert text and len(text) > 20
        assert image["tag"] == "img" or image["role"] == "img"
    assert page.tables and all(table["caption"] for table in page.tables)
    assert all(head.get("scope") in ("row", "col") for head in page.heads)
    assert page.headings[0] == 1 and page.headings.count(1) == 1
    steps = [b - a for a, b in zip(page.headings, page.headings[1:], strict=False)]
    assert max(steps) <= 1  # no level is skipped on the way down


def test_names_from_outside_are_escaped(paths: ReportPaths, page: Page) -> None:
    html = paths.html.read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html
    assert NASTY not in html
    assert any(NASTY in text for text in page.text)


def test_page_tells_what_matters_in_words(page: Page, document: dict) -> None:
    text = " ".join(" ".join(page.text).split())
    for sentence in document["summary"] + document["warnings"]:
        assert " ".join(sentence.split()) in text
    assert any("do not cover norm" in sentence for sentence in document["warnings"])
    assert any("KFRA" in s or "noisy" in s for s in document["warnings"])
    assert "curvscope report x --out y" in text


# -- the data ------------------------------------------------------------------------------------


def test_json_fulfils_its_schema_and_knows_its_files(paths: ReportPaths, document: dict) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(document)
    files = {p.relative_to(paths.folder).as_posix() for p in paths.folder.rglob("*") if p.is_file()}
    assert set(document["files"]) == files
    broken = {**document, "schema": 2}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(broken)


def test_json_has_no_numbers_that_json_has_not(paths: ReportPaths) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(paths.json.read_text(encoding="utf-8"), parse_constant=refuse)


def test_numbers_are_those_of_the_library(document: dict, given: cs.Problem) -> None:
    ggn = cs.ggn(given)
    whole = ggn.dense()
    assert document["problem"]["objective"] == pytest.approx(given.objective())
    assert document["problem"]["gradient_norm"] == pytest.approx(float(given.gradient().norm()))
    for layer in document["layers"]:
        block = ggn.blocks[layer["layer"]].dense()
        assert layer["trace"] == pytest.approx(float(block.trace()))
        assert layer["share"] == pytest.approx(float((block.norm() / whole.norm()) ** 2))
        top = torch.linalg.eigvalsh(block).flip(0)[:3]
        assert layer["top_eigenvalues"] == pytest.approx(top.tolist())
    rows = {
        (row["block"], row["approximation"]): row for row in document["comparisons"]["GGN"]["rows"]
    }
    kfac = cs.kfac(given)
    exact, approximate = ggn.blocks["last"].dense(), kfac.blocks["last"].dense()
    error = float((exact - approximate).norm() / exact.norm())
    assert rows["last", "K-FAC"]["values"]["error"] == pytest.approx(error)
    assert rows["norm", "K-FAC"]["status"] == "uncovered"
    hessian = cs.hessian(given).dense()
    whole_row = next(
        row for row in document["comparisons"]["Hessian"]["rows"] if row["block"] == "(all)"
    )
    truth = float((hessian - whole).norm() / hessian.norm())
    estimate, stderr = whole_row["values"]["error"], whole_row["stderr"].get("error") or 0.0
    assert abs(estimate - truth) <= max(5 * stderr, 1e-6 * truth)
    values = torch.linalg.eigvalsh(hessian)
    assert document["hessian_extremes"]["smallest"][0] == pytest.approx(float(values[0]))
    assert document["hessian_extremes"]["largest"][0] == pytest.approx(float(values[-1]))


def test_every_approximation_is_there_or_has_a_reason(document: dict) -> None:
    entries = {entry["name"]: entry for entry in document["approximations"]}
    assert len(entries) >= 20
    assert all(entry["available"] or entry["reason"] for entry in entries.values())
    assert entries["KFLR"]["same_as"] == "K-FAC"
    assert entries["K-FAC (reduce)"]["same_as"] == "K-FAC"
    assert entries["K-FAC"]["uncovered"].keys() == {"norm"}
    compared = set(document["comparisons"]["GGN"]["approximations"])
    assert compared == {name for name, entry in entries.items() if entry["available"]}


def test_cost_and_settings_are_recorded(document: dict) -> None:
    named = {row["name"]: row for row in document["cost"]}
    assert named["GGN, all blocks"]["passes"] == 3
    assert named["Hutchinson diagonal"]["passes"] == 8  # four probes, two passes each
    assert document["settings"]["seed"] == 7 and document["settings"]["probes"] == 4
    trace = sum(layer["trace"] for layer in document["layers"])
    assert document["settings"]["damping"] == pytest.approx(
        trace / document["problem"]["parameters"], rel=0.06
    )
    assert document["environment"]["versions"]["torch"] == torch.__version__


def test_tables_are_csv_with_a_header(paths: ReportPaths, document: dict) -> None:
    tables = {path.name for path in paths.csv.iterdir()}
    assert tables >= {
        "layers.csv",
        "approximations.csv",
        "errors-ggn.csv",
        "metrics-ggn.csv",
        "best-in-class-ggn.csv",
        "errors-hessian.csv",
        "spectra.csv",
        "eigenvalues.csv",
        "concentration.csv",
        "coverage.csv",
        "verification.csv",
        "trust.csv",
        "cost.csv",
    }
    for path in paths.csv.iterdir():
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1 and len(set(map(len, rows))) == 1, path.name
    with (paths.csv / "layers.csv").open(encoding="utf-8", newline="") as file:
        layers = list(csv.DictReader(file))
    assert [row["layer"] for row in layers] == [row["layer"] for row in document["layers"]]


def test_figures_come_as_svg_and_png(paths: ReportPaths, document: dict) -> None:
    for figure in document["figures"]:
        assert (paths.figures / f"{figure['name']}.svg").read_text("utf-8").startswith("<?xml")
        assert (paths.figures / f"{figure['name']}.png").read_bytes().startswith(b"\x89PNG")
    kinds = {figure["name"].partition("-")[0] for figure in document["figures"]}
    assert kinds == {
        "errors",
        "spectra",
        "blocks",
        "factors",
        "discs",
        "bands",
        "fourier",
        "concentration",
        "coverage",
        "checks",
        "cost",
    }


# -- behaviour -----------------------------------------------------------------------------------


def test_nothing_of_the_problem_is_changed_and_numbers_repeat(
    tmp_path: Path, given: cs.Problem, document: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curvscope.report.figures.plans", lambda found: [])
    monkeypatch.setattr("curvscope.report.figure_plans.plans", lambda found: [])
    again = make_report(given, tmp_path / "r", probes=4, seed=7, verification=False)
    found = json.loads(again.json.read_text("utf-8"))
    assert found["layers"] == document["layers"]
    for name, comparison in found["comparisons"].items():
        first = document["comparisons"][name]["rows"]
        for row, other in zip(comparison["rows"], first, strict=True):
            assert row["values"] == other["values"]
    assert found["verification"] is None
    assert "Verification was not asked for." in found["skipped"]


@pytest.fixture
def _no_computing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise AssertionError("computed although the output cannot be written")

    monkeypatch.setattr("curvscope.report.collect.collect", fail)
    yield


@pytest.mark.usefixtures("_no_computing")
def test_output_is_checked_before_anything_is_computed(tmp_path: Path, given: cs.Problem) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputError, match="not a report of curvscope"):
        make_report(given, tmp_path / "mine")
    with pytest.raises(OptionError, match="probes=1"):
        make_report(given, tmp_path / "r", probes=1)
    with pytest.raises(OptionError, match="damping"):
        make_report(given, tmp_path / "r", damping=math.nan)
    with pytest.raises(OptionError, match="A Problem is needed"):
        make_report(nn.Linear(2, 2), tmp_path / "r")  # type: ignore[arg-type]
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


def test_a_problem_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = problem()
    with torch.no_grad():
        broken.params["last.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"last\.weight"):
        make_report(broken, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
