"""What every result can do."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import curvscope.analysis as analysis
from curvscope.analysis.result import Cost, Result, listing, number, plain


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Example(Result):
    value: float = 1.5
    vector: torch.Tensor = field(default_factory=lambda: torch.tensor([1.0, math.nan]))
    inner: Mapping[str, object] = field(default_factory=dict)
    picture: object = field(default=None, metadata={"json": False})

    def summary(self) -> str:
        return f"The value is <{self.value}>."


def test_a_result_is_frozen_and_survives_pickling() -> None:
    found = Example(value=2.0, cost=Cost(3, 0.5), warnings=("Careful.",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.value = 3.0  # type: ignore[misc]
    twin = pickle.loads(pickle.dumps(found))
    assert (twin.value, twin.cost, twin.warnings) == (2.0, Cost(3, 0.5), ("Careful.",))


def test_it_prints_as_sentences_with_its_warnings() -> None:
    found = Example(warnings=("One.", "Two."))
    assert str(found) == "The value is <1.5>.\nWarning: One.\nWarning: Two."
    assert repr(found) == "<Example: The value is <1.5>.>"
    html = found._repr_html_()
    assert "&lt;1.5&gt;" in html
    assert "<table" in html
    assert "One." in html


def test_json_has_no_nan_no_tensors_and_no_pictures() -> None:
    found = Example(
        inner={"a": np.float32(1.0), "b": np.arange(2), 3: (True, None), "d": math.inf},
        picture=object(),
        settings={"path": torch.float64, "set": {1}},
    )
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["type"] == "Example"
    assert data["vector"] == [1.0, None]
    assert data["inner"] == {"a": 1.0, "b": [0, 1], "3": [True, None], "d": None}
    assert "picture" not in data
    assert data["cost"] == {"products": 0, "seconds": 0.0}
    assert data["settings"] == {"path": "torch.float64", "set": [1]}
    assert data["converged"] is True


def test_plain_keeps_types_that_json_has() -> None:
    assert plain(True) is True
    assert plain(np.bool_(True)) is True
    assert plain(np.int64(3)) == 3
    assert plain(torch.tensor(2)) == 2
    assert plain(Example())["value"] == 1.5


def test_costs_add_up() -> None:
    assert Cost(1, 0.5) + Cost(2, 1.0) == Cost(3, 1.5)
    assert "3 products" in str(Cost(3, 1.0))


def test_plotting_is_left_to_the_plot_module(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("curvscope.plot")
    stub.plot = lambda result, **options: (result, options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "curvscope.plot", stub)
    import curvscope

    monkeypatch.setattr(curvscope, "plot", stub, raising=False)
    found = Example()
    assert found.plot(log=True) == (found, {"log": True})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.42, "0.42"),
        (1.23456e-8, "1.23e-08"),
        (12345.6, "12,346"),
        (math.nan, "undefined"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinite"),
    ],
)
def test_numbers_in_sentences(value: float, text: str) -> None:
    assert number(value) == text


def test_lists_in_sentences() -> None:
    assert listing(["a"]) == "a"
    assert listing(["a", "b"]) == "a and b"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert listing([*"abcdefg"]) == "a, b, c and 4 more"
    assert listing([]) == ""


def test_every_result_of_the_analyses_has_words_of_its_own() -> None:
    found = [
        analysis.spectrum(np.eye(3)),
        analysis.concentration(np.eye(3)),
        analysis.compare(np.diag([1.0, 2.0]), np.eye(2)),
    ]
    for result in found:
        assert isinstance(result, Result)
        assert type(result).summary is not Result.summary
        assert result.cost.seconds > 0
        assert result.settings
        assert result.to_dict()["type"] == type(result).__name__
        assert len(result.to_frame()) == len(result.records())
