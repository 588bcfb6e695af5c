"""The page about trainings: its numbers are those of the runs, and it works in a real browser."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope import training
from curvscope.errors import OutputError, RunError
from curvscope.report import diff, read_report
from curvscope.report.numbers import shown
from curvscope.report.runs import holds_runs, make_runs_report
from curvscope.report.runs.gather import gather
from curvscope.report.runs.logged import logged_numbers
from curvscope.report.runs.steps import SHARP, step_table
from curvscope.report.runs.tables import monitor_table
from curvscope.report.runs.watched import measured, scheduled, settings
from curvscope.training.measures import REGISTRY
from curvscope.training.schedules import At, Every, PowersOfTwo, Schedule, Share

from .browser import Browser, browser, find


def problem() -> cs.Problem:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(24, 4, generator=generator)
    return cs.Problem(model, nn.CrossEntropyLoss(), (x, (x[:, 0] > 0).long()), name="tiny")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two short trainings with a report; nothing in it may be changed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    optimizers = ["adam:lr=0.05", "kbfgs:lr=0.1"]
    training.train(problem(), optimizers, epochs=4, batch_size=12, out=out)
    make_runs_report(out)
    return out


def test_folders_of_runs_are_told_from_others(trained: Path, tmp_path: Path) -> None:
    assert holds_runs(trained) and holds_runs(next(trained.glob("*/*/*/run.json")).parent)
    assert not holds_runs(tmp_path) and not holds_runs(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no run"):
        make_runs_report(tmp_path, tmp_path / "r")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(OutputError, match="not a report"):
        make_runs_report(trained, tmp_path / "mine")


def test_the_document_says_what_the_runs_hold(trained: Path) -> None:
    document = read_report(trained / "report")
    assert [row["optimizer"] for row in document["optimizers"]] == ["adam", "kbfgs"]
    for row in document["runs"]:
        run = cs.Run(trained / row["path"])
        losses = [r["train_loss"] for r in run.rows("epoch")]
        assert row["train_loss"] == losses[-1] and len(row["progress"]) == 4
        assert row["state"] == "finished"
    with (trained / "report" / "csv" / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    run = cs.Run(trained / document["runs"][1]["path"])
    own = [r for r in rows if r["optimizer"] == "kbfgs" and r["approximation"] == "K-BFGS"]
    assert [float(r["error"]) for r in own] == [r["error"] for r in run.rows("error")]


def test_the_table_of_a_step_has_what_was_last_measured(trained: Path) -> None:
    runs = gather(trained)
    found = step_table(runs)
    assert found is not None
    steps, rows, values = (found.data[name] for name in ("steps", "rows", "values"))
    assert rows == ["block 0", "block 2", SHARP] and steps == sorted(steps)
    run = next(m.run for m in runs.members if m.optimizer == "kbfgs")
    for step, block in ((steps[0], "0"), (steps[-1], "2")):
        past = [r for r in run.rows("error") if r["step"] <= step and r["block"] == block]
        error, cosine = values[steps.index(step)][rows.index(f"block {block}")][1]
        assert error == pytest.approx(past[-1]["error"], rel=1e-4)
        assert cosine == pytest.approx(past[-1]["cosine"], rel=1e-4)
    last = [[cell.text for cell in row] for row in found.table.rows]
    assert last[0][0] == "block 0" and last[0][2] == shown(values[-1][0][1][0])


def test_two_reports_of_trainings_side_by_side(trained: Path, tmp_path: Path) -> None:
    assert diff(trained / "report", trained / "report").same
    document = read_report(trained / "report")
    document["runs"][0]["test_loss"] = 0.5
    document["optimizers"][1]["optimizer"] = "muon"
    found = diff(trained / "report", document, out=tmp_path / "d.html")
    assert {(o.what, o.name) for o in found.only} == {("optimizer", "kbfgs"), ("optimizer", "muon")}
    assert [n.metric for n in found.changed] == ["test_loss"]
    assert (tmp_path / "d.html").read_text().count('<svg class="figure"') >= 5


def test_what_was_watched_is_said_in_words(trained: Path) -> None:
    runs = gather(trained)
    table = monitor_table(runs)
    first = {row[0].small: [cell.text for cell in row] for row in table.rows}
    assert first["loss"][:2] == ["loss of the step, learning rate", "every step"]
    assert "damping: yes" in first["error"][-1]
    named = dict(settings(runs))
    assert named["budget of the monitor"].startswith("none")
    assert "too sharp (limit 2.0" in named["alarms looked out for"]
    page = (trained / "report" / "report.html").read_text()
    assert "Every(n=" not in page and "TooSharp(" not in page and " times</td>" not in page
    for kind in REGISTRY.values():
        if kind.__module__.startswith("curvscope."):
            assert kind.about and kind.about == measured(kind.name)
    assert measured("unheard of") == "unheard of"


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (Every(1), "every step"),
        (Every(1000), "every 1,000 steps"),
        (PowersOfTwo(), "steps 1, 2, 4, 8, ..."),
        (At([7]), "step 7"),
        (At(range(1, 9)), "steps 1, 2, 3, 4, 5, 6, ... (8 steps)"),
        (Share(0.02), "as often as 2 % of the time allow"),
        (Schedule(), None),
    ],
    ids=["each", "thousandth", "powers", "one", "many", "share", "other"],
)
def test_schedules_in_words(schedule: Schedule, words: str | None) -> None:
    assert scheduled(repr(schedule)) == (words or repr(schedule))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("needs Chromium or Chrome on the PATH, or its path in CURVSCOPE_BROWSER")
    with browser(program) as running:
        yield running


def test_the_page_in_a_browser(chromium: Browser, trained: Path) -> None:
    page = trained / "report" / "report.html"
    tab = chromium.tab()
    tab.size(1300, 900)
    tab.media(scheme="light")
    tab.open(page)
    assert {u for u in tab.requests if not u.startswith("data:")} == {page.resolve().as_uri()}
    found = step_table(gather(trained))
    assert found is not None
    data = json.loads(tab.evaluate("document.getElementById('steps-data').textContent"))
    assert data == json.loads(json.dumps(found.data))

    cell = "document.querySelector('#steps tbody tr').cells[2].firstChild.textContent"
    step = "Number(document.getElementById('step-output').textContent)"
    assert tab.evaluate(step) == data["steps"][-1]
    assert tab.evaluate(cell) == shown(data["values"][-1][0][1][0])
    tab.centre("#curvature figure")  # figures become lively when they come near
    tab.evaluate("new Promise(done => setTimeout(done, 200))")
    place = "document.querySelector('#curvature .at-step').getAttribute('x1')"
    before = tab.evaluate(place)
    tab.evaluate("document.getElementById('step').focus()")
    tab.key("Home")
    assert tab.evaluate(step) == data["steps"][0]
    assert tab.evaluate(cell) == shown(data["values"][0][0][1][0])
    assert float(tab.evaluate(place)) < float(before)
    tab.click("[data-turn='1']")
    assert tab.evaluate(step) == data["steps"][1]

    lines = (
        "[...document.querySelectorAll('svg .mark[data-series=\"adam\"]')]"
        ".filter(m => getComputedStyle(m).display !== 'none').length"
    )
    assert tab.evaluate(lines) > 8  # lines of several figures, and their legends
    tab.click(".choices input[value='adam']")
    assert tab.evaluate(lines) == 0
    tab.click("[data-choose=all]")
    tab.evaluate("document.querySelector('#curvature .plot').focus({preventScroll: true})")
    tab.key("ArrowRight")
    said = tab.evaluate("document.getElementById('tip').textContent")
    assert re.search(r"step \d+.*kbfgs", said), said
    buttons = "document.querySelector('#curvature .figure-tools').querySelectorAll('button').length"
    assert tab.evaluate(buttons) == 4  # one set for all panels
    tab.key("+")
    assert tab.evaluate("document.querySelectorAll('#curvature .ticks').length") >= 2

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


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training in a loop of its own, which logs numbers, of a model with an uncovered layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))
    inputs = torch.randn(24, 4)
    targets = (inputs[:, 0] > 0).long()
    watched = cs.Problem(model, nn.CrossEntropyLoss(), (inputs, targets))
    optimizer = cs.optim.KFAC(model, lr=0.05, damping=0.1)
    path = tmp_path_factory.mktemp("run")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    with cs.Monitor(watched, optimizer, path=path, every=4, budget=None) as monitor:
        for step in range(12):
            monitor.step(optimizer.step(closure))
            monitor.log("validation", loss=1.0 / (step + 1), right=step / 12)
            monitor.log("epoch", rate=0.1)
    make_runs_report(path)
    return path


def test_the_page_of_a_single_run_says_what_it_shows(watched: Path) -> None:
    page = (watched / "report" / "report.html").read_text()
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))
    assert "The training loss is that of each step's minibatch, before the step." in text
    assert "epoch's minibatches" not in text and "best learning rate" not in text
    assert "Layer 1 has no panel" in text
    assert "(preconditioned)" not in text
    assert "K-FAC has no path: its snapshots were not kept. A monitor with snapshots=" in text
    assert "of the Hessian H itself, since the curvature of K-FAC leaves parameters out" in text
    svg = (watched / "report" / "figures" / "own-error.svg").read_text()
    assert svg.count("<clipPath ") == 2  # of three layers


def test_numbers_of_the_loop_are_shown(watched: Path, trained: Path) -> None:
    runs = gather(watched)
    assert logged_numbers(runs) == [
        ("validation", "loss"),
        ("validation", "right"),
        ("epoch", "rate"),
    ]
    svg = (watched / "report" / "figures" / "logged.svg").read_text()
    assert svg.count("<clipPath ") == 3
    with (watched / "report" / "csv" / "logged.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert [float(row["loss"]) for row in rows] == [1.0 / (k + 1) for k in range(12)]
    assert (
        not logged_numbers(gather(trained))
        and "Logged by the loop" not in (trained / "report" / "report.html").read_text()
    )


def test_the_slider_of_a_single_run(chromium: Browser, watched: Path) -> None:
    tab = chromium.tab()
    tab.open(watched / "report" / "report.html")
    assert tab.evaluate("document.getElementById('step-output').textContent") == "12"
    last = "document.querySelector('#steps tbody tr:last-child').cells[0].textContent"
    assert SHARP in tab.evaluate(last) and not tab.errors
