"""The explorer: what is chosen shows in every view; without widgets there is another way."""

from __future__ import annotations

import html
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.analysis.result import plain
from curvscope.explorer.reading import read
from curvscope.report import ReportPaths
from curvscope.report.headings import heading

from ..display.test_render import well_formed
from ..plotting import pictures

pytest.importorskip("ipywidgets")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of K-FAC, watched closely."""
    path = tmp_path_factory.mktemp("runs") / "kfac"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    inputs, targets = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    problem = cs.Problem(model, nn.CrossEntropyLoss(), (inputs, targets), name="net")
    optimizer = cs.optim.KFAC(model, lr=0.1, damping=0.1)
    measures = ["loss", "error", "best", "fresh", "sharpness", "spectrum", "concentration"]
    with cs.Monitor(problem, optimizer, path, every=1, measures=measures, budget=None) as monitor:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        for _ in range(3):
            monitor.step(optimizer.step(closure))
    return path


def document() -> dict[str, Any]:
    """A report's document of two references, as ``read_report`` gives it."""
    torch.manual_seed(1)
    matrix = pictures.positive(4)
    spectrum = plain(cs.spectrum(matrix).to_dict())
    concentration = plain(cs.concentration(matrix, samples=4).to_dict())
    ggn = plain(pictures.comparison().to_dict())
    hessian = json.loads(json.dumps(ggn))
    hessian["rows"] = [r for r in hessian["rows"] if r["approximation"] == "K-FAC"]
    return {
        "kind": "curvscope report",
        "schema": 1,
        "problem": {"name": "small <net>"},
        "warnings": ["Mind the <gap>."],
        "comparisons": {"GGN": ggn, "Hessian": hessian},
        "spectra": {"first": {"GGN": spectrum, "K-FAC": spectrum, "diagonal": spectrum}},
        "concentration": {"first": {"block": concentration, "factors": {"G": concentration}}},
    }


def values(board: Any) -> dict[str, str]:
    found = {name: view.value for name, view in board.views.items()}
    for text in found.values():
        well_formed(text)
    return found


def test_a_run_offers_its_steps_blocks_and_methods(run: Path) -> None:
    board = cs.explore(cs.Run(run))
    controls = board.controls
    assert set(controls) == {"reference", "step", "block", "approximation", "metric"}
    assert controls["step"].options == (1, 2, 3) and controls["step"].value == 3
    assert [v for _, v in controls["block"].options][:2] == ["0", "2"]
    methods = [v for _, v in controls["approximation"].options]
    assert "K-FAC" in methods and "K-FAC (fresh)" in methods
    assert "step=3" in repr(board) and "K-FAC" in repr(board)
    first = values(board)
    assert all("<svg" in first[name] for name in ("errors", "spectra", "training"))
    assert "step 3" in first["table"] and "Concentration of block 0" in first["factors"]


def test_a_run_shows_itself(run: Path) -> None:
    found = cs.Run(run)
    text = found._repr_html_()
    well_formed(text)
    assert "net, K-FAC" in text and "loss, over the steps" in text and "error of block 2" in text
    assert all(f">{measure}</td>" in text for measure in found.measures)
    assert "_scan" not in dir(found) and {"frame", "alarms", "spectra"} <= set(dir(found))


def test_the_paths_of_a_report_show_themselves(tmp_path: Path) -> None:
    text = ReportPaths.of(tmp_path / "a <b>")._repr_html_()
    well_formed(text)
    assert "a &lt;b&gt;/report.html" in text


def test_the_paths_of_a_report_are_short_where_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inside = ReportPaths.of(tmp_path / "reports" / "net")
    assert repr(inside).startswith("ReportPaths('reports/net': report.html, report.json")
    assert str(tmp_path) not in inside._repr_html_()
    assert inside.html == tmp_path / "reports" / "net" / "report.html"  # the paths stay whole
    assert repr(ReportPaths.of(tmp_path.parent / "other")).startswith(
        f"ReportPaths('{tmp_path.parent}/other'"
    )


def test_every_control_of_a_run_changes_the_views_that_it_concerns(run: Path) -> None:
    board = cs.explore(str(run))
    seen = [values(board)]
    changed = []
    for name, value in (
        ("step", 1),
        ("block", "2"),
        ("approximation", "K-FAC (fresh)"),
        ("metric", "cosine"),
    ):
        board.controls[name].value = value
        seen.append(values(board))
        changed.append({view for view in seen[-1] if seen[-1][view] != seen[-2][view]})
    assert changed[0] == {"errors", "spectra", "table", "factors", "training"}
    assert {"errors", "table", "factors"} <= changed[1]
    assert {"errors", "table"} <= changed[2] and {"errors", "table"} <= changed[3]
    assert "cosine on block 2 over the steps, K-FAC (fresh) in bold" in seen[-1]["errors"]
    assert seen[-1]["table"].count("▶") == 1


def test_the_table_shows_the_numbers_of_the_record(run: Path) -> None:
    found = cs.Run(run)
    board = cs.explore(found)
    board.controls["step"].value, board.controls["block"].value = 2, "2"
    rows = [r for r in found.rows("error") if r["step"] == 2 and r["block"] == "2"]
    best = [r for r in found.rows("best") if r["step"] == 2 and r["block"] == "2"]
    shown = values(board)["table"]
    assert f'data-v="{rows[0]["error"]!r}"' in shown
    assert f'data-v="{best[0]["best_in_class"]!r}"' in shown


def test_a_report_has_references_and_no_steps() -> None:
    board = cs.explore(document())
    assert "step" not in board.controls
    assert [v for _, v in board.controls["reference"].options] == ["GGN", "Hessian"]
    first = values(board)
    assert "small &lt;net&gt;" in first["table"] and "<svg" in first["spectra"]
    assert "error of K-FAC by block, upright lines the best of its class" in first["errors"]
    assert "eigenvalues of first: GGN, K-FAC" in first["spectra"] and first["training"] == ""
    assert "the block" in first["factors"] and ">G<" in first["factors"]
    board.controls["approximation"].value = "diagonal"
    assert "eigenvalues of first: GGN, diagonal" in values(board)["spectra"]
    board.controls["block"].value = "second"
    second = values(board)
    assert "There are no eigenvalues of second of the GGN to show." in second["spectra"]
    assert "cs.eigsh(cs.ggn(problem).blocks[&#x27;second&#x27;], 10)" in second["spectra"]
    assert "cs.concentration(cs.ggn(problem).blocks" in second["factors"]
    assert "not here" in second["table"] and "uncovered" in second["table"]


def test_headings_are_those_of_reports(run: Path) -> None:
    board = cs.explore(document())
    metrics = {v: shown for shown, v in board.controls["metric"].options}
    assert {name: heading(name).title for name in metrics} == metrics
    board.controls["metric"].value = "best_in_class"
    shown = values(board)
    assert "best of class of K-FAC" in shown["errors"]
    assert ">best of class</th>" in shown["table"]
    for key in ("diagonal_share", "null_share", "disjoint", "dominant", "kaiser", "snr"):
        doc = html.escape(heading(key).doc, quote=True)
        assert f'title="{doc}">{heading(key).title}</th>' in shown["factors"], key
    assert ">diagonal share</th>" in values(cs.explore(cs.Run(run)))["factors"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (lambda: pictures.comparison(), "cs.spectrum(cs.ggn(problem).blocks["),
        (lambda: cs.compare(torch.eye(2), {"one": torch.eye(2)}), "cs.spectrum(operator).plot()"),
    ],
    ids=["blocks", "whole"],
)
def test_what_is_not_there_comes_with_what_to_do(source: Any, says: str) -> None:
    assert says in values(cs.explore(source()))["spectra"]


def test_another_reference_brings_its_own_methods() -> None:
    board = cs.explore(document())
    board.controls["block"].value = "second"
    board.controls["approximation"].value = "diagonal"
    board.controls["reference"].value = "Hessian"
    assert board.choice["approximation"] == "K-FAC" and board.choice["block"] == "second"
    assert "against the Hessian" in values(board)["table"]


def test_a_comparison_shows_errors_and_the_best_of_each_class() -> None:
    board = cs.explore(pictures.comparison())
    found = values(board)
    assert "0.50" in found["table"] or "0.5" in found["table"]
    board.controls["block"].value = "(all)"
    assert "0.50 ± 0.05" in values(board)["table"]
    board.controls["metric"].value = "cosine"
    assert "cosine of K-FAC by block" in values(board)["errors"]
    assert "the whole matrix" in values(board)["table"]


def test_it_shows_itself_as_a_widget() -> None:
    board = cs.explore(pictures.comparison())
    bundle = board._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_figures_are_shown_by_the_widgets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a prompt or in a notebook, pyplot shows its figures by itself at the end of a cell."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = plt.get_fignums()
    board = cs.explore(document())
    board.controls["block"].value = "second"
    assert plt.get_fignums() == before


def test_a_report_on_disk_is_found_by_folder_and_file(tmp_path: Path) -> None:
    rest = {name: [] for name in ("summary", "figures", "layers", "approximations", "cost")}
    whole = {"created": "", "command": "", "environment": {}, "settings": {}, **rest, **document()}
    (tmp_path / "report.json").write_text(json.dumps(whole))
    for path in (tmp_path, str(tmp_path / "report.json")):
        assert cs.explore(path).choice["block"] == "first"
    (tmp_path / "report.json").write_text(json.dumps({**whole, "schema": 99}))
    with pytest.raises(cs.errors.ReportError, match="newer"):
        cs.explore(tmp_path)


def test_what_cannot_be_explored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cs.errors.ReportError, match="holds no report"):
        cs.explore(tmp_path)
    (tmp_path / "kfac").mkdir()
    (tmp_path / "kfac" / "run.json").write_text("{}")
    with pytest.raises(cs.errors.RunError, match=r"a folder of runs; .*kfac"):
        cs.explore(tmp_path)
    (tmp_path / "kfac" / "run.json").unlink()
    deep = tmp_path / "kfac" / "lr=0.1" / "seed=0"  # as several trainings leave them
    deep.mkdir(parents=True)
    (deep / "run.json").write_text("{}")
    with pytest.raises(cs.errors.RunError, match=r"a folder of runs; .*lr=0\.1/seed=0"):
        cs.explore(tmp_path)
    with pytest.raises(cs.errors.OptionError, match=r"not Spectrum. Results have \.plot"):
        cs.explore(cs.spectrum(torch.eye(2)))
    with pytest.raises(cs.errors.ReportError, match="explore one of their runs"):
        cs.explore({"kind": "curvscope report of runs"})


def test_a_run_without_records_says_so(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    problem = cs.Problem(model, nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cs.Monitor(problem, optimizer, tmp_path / "run", measures=["loss"]).close()
    with pytest.raises(cs.errors.NotDefinedError, match="recorded nothing yet"):
        cs.explore(tmp_path / "run")


def test_a_run_that_compared_nothing_still_shows_its_loss(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    problem = cs.Problem(model, nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cs.Monitor(
        problem, optimizer, tmp_path / "run", measures=["loss"], every=1, budget=None
    ) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 2)).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step(loss)
    board = cs.explore(tmp_path / "run")
    found = values(board)
    assert "<svg" in found["training"] and "No approximation was compared" in found["errors"]
    assert "compared nothing" in board.box.children[-1].value


def test_without_ipywidgets_the_message_names_the_package_and_the_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(cs.errors.MissingPackageError, match="pip install ipywidgets") as caught:
        cs.explore(pictures.comparison())
    assert "result.plot()" in str(caught.value) and "run.frame" in str(caught.value)


def test_undefined_numbers_of_a_report_are_nan() -> None:
    given = document()
    given["comparisons"]["GGN"]["rows"][0]["values"]["error"] = None
    data = read(given)
    assert math.isnan(data.rows[0]["error"])
    assert data.metrics[0] == "error" and "size" not in data.metrics
