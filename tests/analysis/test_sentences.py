"""What results say in words where a plain template would say nonsense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvscope as cs
from curvscope.analysis.coverage import refusals


@pytest.fixture(scope="module")
def problem() -> cs.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )
    x, y = torch.randn(12, 1, 6, 6).double(), torch.randint(0, 3, (12,))
    return cs.Problem(net.double().eval(), nn.CrossEntropyLoss(), (x, y))


@pytest.fixture(scope="module")
def comparison(problem: cs.Problem) -> cs.analysis.Comparison:
    kfac = cs.kfac(problem)
    return cs.compare(
        cs.hessian(problem),
        {"GGN": cs.ggn(problem), "K-FAC": kfac, "KFLR": cs.kflr(problem), "minus": -1.0 * kfac},
    )


def test_equal_blocks_are_said_to_be_equal(comparison: cs.analysis.Comparison) -> None:
    row = comparison.row("0", "GGN")
    assert row.sentence() == "GGN equals the reference on block 0 up to rounding."
    assert "GGN equals it on every block up to rounding." in comparison.summary()
    assert "off by 0 " not in comparison.summary()


def test_numbers_as_names_are_called_blocks(comparison: cs.analysis.Comparison) -> None:
    assert " on block 0, of which " in comparison.row("0", "K-FAC").sentence()
    assert "on 0" not in str(comparison)


def test_price_of_the_whole_names_what_is_left_out(comparison: cs.analysis.Comparison) -> None:
    text = comparison.row("(all)", "K-FAC").sentence()
    assert (
        "the price of being block-diagonal and Kronecker and of leaving out what it does not cover "
        "(block 1 not covered, taken as zero)"
    ) in text
    assert "leaving out" not in comparison.row("(all)", "GGN").sentence()


def test_opposite_sign_is_no_matter_of_scale(comparison: cs.analysis.Comparison) -> None:
    (text,) = [w for w in comparison.warnings if w.startswith("minus has")]
    assert text == (
        "minus has a trace of the opposite sign on block 0 and block 4 (-1 times that of the "
        "reference): no positive scale mends that."
    )
    assert not any("off in scale" in warning for warning in comparison.warnings)


def test_what_several_leave_out_is_said_once(comparison: cs.analysis.Comparison) -> None:
    (text,) = [w for w in comparison.warnings if "not cover" in w]
    assert text == (
        "K-FAC, KFLR and minus do not cover block 1, which counts as zero in the whole matrix."
    )


def test_refusals_with_the_same_reason_are_one_sentence() -> None:
    given = {
        "BackPACK KFAC": "BackPACK's KFAC does not support layer 'x' (Odd). Use cs.kfac(problem).",
        "BackPACK KFLR": "BackPACK's KFLR does not support layer 'x' (Odd). Use cs.kflr(problem).",
        "A": "There is no pad. Write it otherwise, or use cs.ggn(problem).",
        "B": "There is no pad. Write it otherwise, or use cs.hessian(problem).",
        "C": "It is not convex.",
        "D": "It is not convex.",
        "E": "Alone. Use cs.kfac(problem).",
    }
    assert refusals(given) == [
        "Not BackPACK KFAC and BackPACK KFLR: they do not support layer 'x' (Odd). Use "
        "cs.kfac(problem) or cs.kflr(problem).",
        "Not A and B: There is no pad. Write it otherwise, or use cs.ggn(problem) or "
        "cs.hessian(problem).",
        "Not C and D: It is not convex.",
        "Not E: Alone. Use cs.kfac(problem).",
    ]


def test_whole_matrix_does_not_claim_the_route_of_its_products_for_its_blocks(
    problem: cs.Problem,
) -> None:
    whole = cs.hessian(problem)
    assert "3 blocks by 'auto' routes, products by autograd" in repr(whole)
    assert whole.blocks["4"].info.route == "piecewise-linear"
    assert "3 blocks by 'piecewise-linear', products by autograd" in repr(whole)
    assert "by route 'autograd'" in repr(cs.ggn(problem, route="autograd"))
