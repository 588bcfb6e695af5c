"""Problems, operators and results in a notebook: cheap, complete, completed by the Tab key."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.analysis.result import Result
from curvscope.operators import BlockDiagonalOperator, KroneckerOperator, Operator, Provenance

from ..operators.cases import all_cases, concrete_subclasses
from ..plotting import pictures, trainings
from .test_render import well_formed


def problem(name: str = "p") -> cs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    data = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    return cs.Problem(model, nn.CrossEntropyLoss(), data, name=name)


def every_result() -> dict[str, Result]:
    """One of each class, taken from the pictures and made here."""
    from curvscope.analysis.extremes import extremes

    p = problem()
    ggn = cs.ggn(p)
    made: list[Result] = [
        pictures.comparison(),
        cs.coverage(p),
        pictures.verification(),
        pictures.noise(),
        pictures.local(),
        pictures.batches(),
        trainings.trajectories(),
        trainings.surface(),
        cs.spectrum(ggn),
        cs.concentration(cs.kfac(p)),
        cs.trace(ggn, method="hutchinson", budget=20),
        cs.diagonal(ggn, budget=20),
        cs.eigsh(ggn, 2),
        cs.negative_curvature(ggn),
        cs.density(ggn),
        cs.solve(ggn, p.gradient(), damping=0.1),
        extremes(ggn),
        Result(),
    ]
    return {type(result).__name__: result for result in made}


RESULTS = every_result()


def subclasses(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from subclasses(kind)


def test_every_class_of_results_is_looked_at() -> None:
    for part in pkgutil.walk_packages(cs.__path__, "curvscope."):
        if part.name.startswith(("curvscope.analysis", "curvscope.training")):
            importlib.import_module(part.name)
    ours = {c.__name__ for c in subclasses(Result) if c.__module__.startswith("curvscope.")}
    assert ours - {"Estimated"} <= set(RESULTS), ours - set(RESULTS)  # a base without instances


@pytest.mark.parametrize("name", list(RESULTS))
def test_results_show_sentences_and_rows(name: str) -> None:
    text = RESULTS[name]._repr_html_()
    well_formed(text)
    assert name in text and len(text) < 40_000
    first = RESULTS[name].summary().splitlines()[0]
    assert first.split("<")[0].split("&")[0] in text
    if name not in ("Result", "LossSurface"):
        assert "<table" in text
    assert repr(RESULTS[name]).startswith(f"<{name}: ")


def test_large_results_are_cut_without_making_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cs.diagonal(torch.eye(3000, dtype=torch.float64))
    monkeypatch.setattr(type(found), "records", None)
    text = found._repr_html_()
    assert "60 of 3,000 rows" in text and len(text) < 20_000
    assert "<details><summary>3,000 rows</summary>" in text


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, dense matrices and passes over the data are errors."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed for show")

    for kind in [Operator, *subclasses(Operator)]:
        for method in ("_matmat", "_dense", "dense", "diagonal", "eigenvalues", "eigh", "trace"):
            if method in vars(kind):
                monkeypatch.setattr(kind, method, forbidden)
        monkeypatch.setattr(kind, "frobenius_norm", forbidden)
    for method in ("batches", "sum_over_batches", "snapshot", "gradient", "objective"):
        monkeypatch.setattr(cs.Problem, method, forbidden)
    monkeypatch.setattr("curvscope.problem.problem.survey", forbidden)


def operators() -> dict[str, Operator]:
    p = problem()
    kfac, ggn = cs.kfac(p), cs.ggn(p)
    row_wise, touched = cs.hessian(p), cs.ggn(p)
    assert row_wise.blocks["0"].shape and touched.blocks["2"].shape
    partial = BlockDiagonalOperator(
        {"0": kfac.blocks["0"]}, kfac.layout, kfac.members, uncovered_names=("2",)
    )
    optimizer = cs.optim.KFAC(p.model, lr=0.1, damping=0.1, fisher="empirical")
    inputs, targets = p.data.items[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(p.model(inputs), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = {
        "GGN": ggn,
        "GGN with a block computed": touched,
        "Hessian": row_wise,
        "block of it": row_wise.blocks["0"],
        "K-FAC": kfac,
        "block of K-FAC": kfac.blocks["2"],
        "EKFAC": cs.ekfac(p),
        "diagonal K-FAC": cs.diagonal_kf(p).blocks["0"],
        "Hutchinson": cs.hutchinson_diagonal(p, probes=2),
        "sum": ggn + cs.hessian(p),
        "multiple": 2.0 * ggn,
        "damped": ggn.damped(0.1),
        "inverse": kfac.inverse(0.1),
        "part": ggn.restrict(["0.weight"]),
        "bare": cs.operators.DenseOperator(torch.eye(4)),
        "partial": partial,
        "optimizer's": optimizer.curvature(),
        "optimizer's preconditioner": optimizer.preconditioner(),
    }
    return found


OPERATORS = operators()
CASES = all_cases()  # made before computing is forbidden


@pytest.mark.parametrize("name", list(OPERATORS))
def test_operators_show_what_is_known_and_compute_nothing(
    name: str, nothing_is_computed: None
) -> None:
    op = OPERATORS[name]
    text = op._repr_html_()
    well_formed(text)
    assert type(op).__name__ in text and repr(op)
    assert f"{op.shape[0]} × {op.shape[0]}" in text
    for block in op.blocks:
        assert f">{block}</td>" in text
    well_formed(op.blocks._repr_html_())  # type: ignore[attr-defined]
    if op.info != Provenance():  # nothing was said of it
        assert ("exact" if op.info.exact else "approximate") in text


def test_every_class_of_operators_shows_itself(nothing_is_computed: None) -> None:
    """Those of the conformance tests, which have all; a new class is looked at by itself."""
    seen = set()
    for case in CASES:
        text = case.op._repr_html_()
        well_formed(text)
        assert "12 × 12" in text and repr(case.op) and len(text) < 40_000, case.name
        seen.add(type(case.op))
    ours = {kind for kind in concrete_subclasses(Operator) if kind.__module__[:9] == "curvscope"}
    assert ours <= seen, ours - seen


def test_blocks_say_how_they_are_held() -> None:
    assert "made when asked for" in OPERATORS["GGN"]._repr_html_()
    touched = OPERATORS["GGN with a block computed"]._repr_html_()
    assert "made when asked for" not in touched and "rows of the square root" in touched
    assert "3 × 3 ⊗ 5 × 5" in OPERATORS["K-FAC"]._repr_html_()
    partial = OPERATORS["partial"]._repr_html_()
    assert "not covered" in partial and "with_uncovered" in partial
    assert OPERATORS["block of K-FAC"]._repr_html_().count("<img") == 2


def test_blocks_that_are_computed_later_print_their_names() -> None:
    blocks = cs.hessian(problem()).blocks
    assert repr(blocks) == "Blocks(['0', '2'], each computed when it is looked up)"
    assert blocks["2"].shape == (12, 12)
    assert "computed are ['2']" in repr(blocks)
    shown = blocks._repr_html_()  # type: ignore[attr-defined]
    assert shown.count("made when asked for") == 1 and "12 x 12" in shown


def test_problems_show_themselves_before_and_after_a_pass() -> None:
    p = problem("a <name> & more")
    text = p._repr_html_()
    well_formed(text)
    assert "a &lt;name&gt; &amp; more" in text and "samples" not in text
    assert "weight 3 × 4, bias 3" in text and "Linear" in text
    p.check()
    assert "samples" in p._repr_html_()
    frozen = problem()
    part = cs.Problem(frozen.model, nn.CrossEntropyLoss(), frozen.data.items, params=["2"])
    assert "15 parameters of the model are frozen or left out" in part._repr_html_()


def test_showing_a_problem_computes_nothing(nothing_is_computed: None) -> None:
    well_formed(problem()._repr_html_())


class Named(nn.Module):
    """One block whose name is an identifier, and one that has the name of a method of mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.keys = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.keys(self.conv1(x))


def named_blocks() -> Operator:
    torch.manual_seed(0)
    return cs.kfac(cs.Problem(Named(), nn.MSELoss(), (torch.randn(3, 2), torch.randn(3, 2))))


def test_blocks_complete_after_quote_and_dot() -> None:
    op = named_blocks()
    blocks: Any = op.blocks
    assert blocks._ipython_key_completions_() == ["conv1", "keys"]
    assert isinstance(blocks.conv1, KroneckerOperator)
    assert callable(blocks.keys) and list(blocks.keys()) == ["conv1", "keys"]
    assert "conv1" in dir(blocks)
    assert not hasattr(blocks, "conv2") and not hasattr(blocks, "__wrapped__")
    for each in (cs.ggn(problem()).blocks, (2.0 * op).blocks, op.damped(0.1).blocks):
        assert each._ipython_key_completions_() == list(each)  # type: ignore[attr-defined]
    assert list(copy.deepcopy(blocks)) == list(pickle.loads(pickle.dumps(blocks))) == list(blocks)


def test_completion_in_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    # a shell sets the prompts, by which plots see that somebody sits there
    monkeypatch.setattr(sys, "ps1", "", raising=False)
    monkeypatch.setattr(sys, "ps2", "", raising=False)
    monkeypatch.setattr(sys, "ps3", "", raising=False)
    from IPython.core.completer import provisionalcompleter
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.Completer.use_jedi = False
    shell.user_ns["op"] = named_blocks()
    shell.user_ns["found"] = RESULTS["Comparison"]
    with provisionalcompleter():
        for text, wanted in (('op.blocks["', "keys"), ("op.blocks.", ".conv1")):
            found = [c.text for c in shell.Completer.completions(text, len(text))]
            assert wanted in found, (text, found)
        names = [c.text for c in shell.Completer.completions("found.", 6)]
    assert ".plot" in names and ".rows" in names and not [n for n in names if "._" in n]


@pytest.mark.parametrize("name", list(RESULTS))
def test_results_list_what_a_reader_may_use(name: str) -> None:
    names = [n for n in dir(RESULTS[name]) if not n.startswith("__")]
    assert {"plot", "to_frame", "summary", "cost"} <= set(names)
    private = [n for n in names if n.startswith("_")]
    assert private == ["_repr_html_"]
    for each in names:
        getattr(RESULTS[name], each)
