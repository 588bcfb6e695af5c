"""Reading reports: what is there, what is damaged, and what only a newer version knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import curvscope as cs
from curvscope.errors import CurvscopeError, OutputError, ReportError
from curvscope.report import check_output, read_report
from curvscope.report.write import KIND, RUNS_KIND


@pytest.fixture(scope="module")
def folder(small_report: Path) -> Path:
    return small_report


def changed(folder: Path, to: Path, **entries: Any) -> Path:
    """A report.json like that in ``folder`` but for some entries; ``None`` takes one away."""
    document = json.loads((folder / "report.json").read_text("utf-8")) | entries
    to.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in document.items() if value is not None}
    (to / "report.json").write_text(json.dumps(kept), encoding="utf-8")
    return to


def test_a_folder_and_the_files_in_it_are_the_same_report(folder: Path) -> None:
    whole = read_report(folder)
    assert whole["kind"] == KIND and whole["schema"] == 1
    for name in ("report.json", "report.html", "report.toml"):
        assert read_report(folder / name) == whole
    assert read_report(str(folder)) == whole


def test_newer_layouts_are_refused_with_both_versions(folder: Path, tmp_path: Path) -> None:
    versions = {"versions": {"curvscope": "9.1.0"}}
    place = changed(folder, tmp_path / "r", schema=2, environment=versions, comparisons=None)
    with pytest.raises(ReportError) as caught:
        read_report(place)
    text = str(caught.value)
    for part in ("curvscope 9.1.0", "layout 2", cs.__version__, "up to 1", "Update", "report.html"):
        assert part in text
    place = changed(folder, tmp_path / "s", schema=3, environment=None)
    with pytest.raises(ReportError, match="written by a newer curvscope in layout 3"):
        read_report(place)


def test_a_newer_report_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    place = changed(folder, tmp_path / "r", schema=2, files=["report.json"])
    with pytest.raises(OutputError, match=r"layout 2; .*not replaced"):
        check_output(place)
    check_output(changed(folder, place, schema=1, files=["report.json"]))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "damaged: it is empty"),
        ('{"kind": "curvscope report", "sch', "damaged: it is no JSON"),
        ("\udcff\udcfe", "damaged: it is no text"),
        ("[" * 100_000, "damaged: it is no JSON"),
        ("[]", "not a report of curvscope: its entry 'kind' is missing"),
        ('{"kind": "a thesis"}', "not a report of curvscope: its entry 'kind' is 'a thesis'"),
        (json.dumps({"kind": KIND}), "damaged: its entry 'schema' is None"),
        (json.dumps({"kind": KIND, "schema": "1"}), "damaged: its entry 'schema' is '1'"),
        (json.dumps({"kind": RUNS_KIND, "schema": 1}), "damaged: its entry 'created' is missing"),
    ],
    ids=["empty", "cut", "binary", "deep", "list", "other", "bare", "string", "runs"],
)
def test_damage_is_named(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ReportError, match=match):
        read_report(tmp_path)


def test_missing_and_wrong_entries_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="'comparisons' is missing"):
        read_report(changed(folder, tmp_path, comparisons=None))
    with pytest.raises(ReportError, match="'layers' is not a list"):
        read_report(changed(folder, tmp_path, layers={}))


def test_what_is_no_report_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"There is no .*nowhere; give the folder"):
        read_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match=r"holds no report\.json.*curvscope report PROBLEM"):
        read_report(tmp_path)
    inner = tmp_path / "report"
    inner.mkdir()
    (inner / "report.json").write_text("{}")
    with pytest.raises(ReportError, match=r"Did you mean .*report"):
        read_report(tmp_path)
    assert issubclass(ReportError, CurvscopeError) and issubclass(ReportError, ValueError)
