"""What a comparison says beside its numbers: reasons, rounding, noise, and wrong names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.operators import DenseOperator, IdentityOperator, Operator


@pytest.fixture(scope="module")
def problem() -> cs.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.randn(9, 3), torch.randint(0, 2, (9,))
    return cs.Problem(net, nn.CrossEntropyLoss(), data)


def test_the_frame_says_why_a_step_is_missing(problem: cs.Problem) -> None:
    found = cs.compare(cs.ggn(problem), {"K-FAC": cs.kfac(problem)}, gradient=problem)
    frame = found.to_frame().set_index("block")
    assert frame["step_angle"].isna()["2"]
    assert "step_angle" in frame["note"]["2"] and "Pass a larger damping" in frame["note"]["2"]
    assert any("steps of K-FAC are not defined everywhere" in text for text in found.warnings)
    damped = cs.compare(cs.ggn(problem), {"K-FAC": cs.kfac(problem)}, gradient=problem, damping=0.1)
    assert set(damped.to_frame()["note"]) == {""} and not damped.warnings


def test_an_indefinite_reference_is_named_with_the_damping_it_needs() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.106], dtype=torch.float64))
    gradient = torch.ones(3, dtype=torch.float64)
    pair = DenseOperator(matrix), {"it": IdentityOperator(3, 1.0, dtype=torch.float64)}
    found = cs.compare(*pair, gradient=gradient, damping=0.01)
    (warning,) = [text for text in found.warnings if "not defined everywhere" in text]
    assert "singular" not in warning and "indefinite" in warning
    assert "damping= above 0.106" in warning
    assert "a damping above 0.106" in found.rows[0].reasons["step_efficiency"]
    better = cs.compare(*pair, gradient=gradient, damping=0.107)
    assert not [text for text in better.warnings if "not defined everywhere" in text]


def test_damping_without_a_gradient_says_a_word(problem: cs.Problem) -> None:
    pair = cs.ggn(problem), {"K-FAC": cs.kfac(problem)}
    found = cs.compare(*pair, damping=0.1)
    assert any("without gradient=" in text for text in found.warnings)
    assert not cs.compare(*pair, damping=0.1, metrics=["error"]).warnings
    assert not cs.compare(*pair).warnings


def test_another_matrix_and_few_probes_are_remarked_upon(problem: cs.Problem) -> None:
    noisy = cs.hutchinson_diagonal(problem)
    assert "Hutchinson diagonal of the Hessian (1 probe)" in repr(noisy)
    assert noisy.info.settings["matrix"] == "hessian"
    words = str(cs.compare(cs.ggn(problem), {"h": noisy}))
    assert "h is of the Hessian, the reference is the GGN" in words
    assert "h is an estimate from 1 random probe" in words
    same = cs.hutchinson_diagonal(problem, matrix="ggn", probes=50)
    words = str(cs.compare(cs.ggn(problem), {"h": same}))
    assert "is of the" not in words and "random probe" not in words
    fisher = cs.exact_diagonal(problem, "fisher")  # the GGN of this loss
    assert "is of the" not in str(cs.compare(cs.ggn(problem), {"f": fisher}))


@pytest.mark.parametrize("single", [True, False], ids=["float32", "float64"])
def test_rounding_is_no_error(problem: cs.Problem, single: bool) -> None:
    ggn = cs.ggn(problem).to(dtype=torch.float32 if single else torch.float64)
    found = cs.compare(ggn, {"again": (1 + 1e-7) * ggn})
    assert ("equals" in str(found)) is single
    assert ("off by" in str(found)) is not single


def test_a_wrong_name_of_a_row_is_told_apart(problem: cs.Problem) -> None:
    found = cs.compare(cs.ggn(problem), {"K-FAC": cs.kfac(problem)})
    with pytest.raises(cs.errors.UnknownBlockError) as block:
        found.row("3", "K-FAC")
    assert "no block '3'" in str(block.value) and "no approximation" not in str(block.value)
    with pytest.raises(cs.errors.UnknownBlockError) as approximation:
        found.row("2", "k-fac")
    text = str(approximation.value)
    assert "no approximation 'k-fac'" in text and "'K-FAC'?" in text and "no block" not in text
    with pytest.raises(cs.errors.UnknownBlockError, match=r"no block '3'.*no approximation 'k'"):
        found.row("3", "k")


class Broken(Operator):
    """A matrix whose products are not finite."""

    def __init__(self, like: Operator) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.layout = like.layout

    def _matmat(self, vectors: Tensor) -> Tensor:
        return vectors * float("nan")


def test_the_approximation_with_nan_is_named(problem: cs.Problem) -> None:
    ggn = cs.ggn(problem)
    found = cs.compare(ggn, {"mine": Broken(ggn), "K-FAC": cs.kfac(problem)})
    assert any("mine has NaN or infinite entries" in text for text in found.warnings)
    assert found.row("2", "K-FAC").error > 0
