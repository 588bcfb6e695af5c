"""Interrupted work goes on to the same bits; files of other work are refused."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import curvscope as cs
from curvscope.errors import DataError, OutputError
from curvscope.operators import FunctionOperator

from .matrices import Interrupted, by_products, normal, spectra, with_spectrum

MATRIX = with_spectrum(spectra(150)["outliers and bulk"])
RIGHT, NEAR = (
    normal(150, 2, seed=8),
    with_spectrum(1 / (1 + spectra(150)["outliers and bulk"].abs())),
)
JOBS: dict[str, Callable[..., Any]] = {
    "trace": lambda op, **k: cs.trace(op, tol=0, budget=100, **k),
    "hutch++": lambda op, **k: cs.trace(op, method="hutch++", tol=0, budget=150, **k),
    "xtrace": lambda op, **k: cs.trace(op, method="xtrace", tol=0, budget=80, **k),
    "diagonal": lambda op, **k: cs.diagonal(op, tol=0, budget=100, **k),
    "xdiag": lambda op, **k: cs.diagonal(op, method="xdiag", tol=0, budget=80, **k),
    "eigsh": lambda op, **k: cs.eigsh(op, 6, tol=1e-9, method="lanczos", **k),
    "blocks": lambda op, **k: cs.eigsh(op, 4, tol=1e-7, method="lanczos", block=3, **k),
    "negative": lambda op, **k: cs.negative_curvature(op, **k),
    "slq": lambda op, **k: cs.density(op, probes=20, steps=12, **k),
    "selective": lambda op, **k: cs.density(
        op, probes=3, steps=60, reorthogonalise="selective", **k
    ),
    "cg": lambda op, **k: cs.solve(op, RIGHT, damping=20, method="cg", tol=1e-10, **k),
    "minres": lambda op, **k: cs.solve(op, RIGHT, preconditioner=NEAR, tol=1e-10, **k),
    "kpm": lambda op, **k: cs.density(op, method="kpm", probes=12, steps=12, **k),
}


def same(one: Any, two: Any) -> bool:
    """Every field but the seconds, bit for bit."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if field.name == "cost":
            a, b = a.products, b.products
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


@pytest.mark.parametrize("name", list(JOBS))
def test_interrupted_anywhere_it_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    job, path = JOBS[name], tmp_path / "state.pt"
    whole = job(by_products(MATRIX), checkpoint=path)
    path.unlink()
    generator = torch.Generator().manual_seed(5)
    later = int(torch.randint(3, 12, (1,), generator=generator))
    stops = 0
    for after in (2, 3, later, 9, 10**9):
        product = Interrupted(MATRIX, after)
        try:
            found = job(FunctionOperator(product, 150, check=False), checkpoint=path)
        except KeyboardInterrupt:
            stops += 1
            continue
        break
    assert stops >= 2 and same(found, whole)
    # finished work is not done again, but for the product that recognises the matrix
    product = Interrupted(MATRIX, 10**9)
    assert same(job(FunctionOperator(product, 150, check=False), checkpoint=path), whole)
    assert name in ("eigsh", "blocks", "negative") or 10**9 - product.left <= 2
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_while_bases_are_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setattr(sys.modules["curvscope.analysis.estimators.eigsh"], "_CAPACITY", 24)
    matrix, path = with_spectrum(spectra(150)["indefinite"]), tmp_path / "state.pt"
    whole = cs.eigsh(by_products(matrix), 6, tol=1e-7, method="lanczos", checkpoint=path)
    path.unlink()
    for after in (25, 20, 10**9):
        op = FunctionOperator(Interrupted(matrix, after), 150, check=False)
        try:
            found = cs.eigsh(op, 6, tol=1e-7, method="lanczos", checkpoint=path)
        except KeyboardInterrupt:
            continue
    assert same(found, whole)


def test_a_larger_budget_goes_on_from_a_finished_run(tmp_path: Path) -> None:
    path, op = tmp_path / "state.pt", by_products(MATRIX)
    small = cs.trace(op, tol=0, budget=48, checkpoint=path)
    large = cs.trace(op, tol=0, budget=96, checkpoint=path)
    assert small.products == 49 and large.products == 97
    torch.testing.assert_close(large.value, cs.trace(op, tol=0, budget=96).value)


def test_other_settings_matrices_and_files_are_refused(tmp_path: Path) -> None:
    path, op = tmp_path / "state.pt", by_products(MATRIX)
    cs.trace(op, budget=32, checkpoint=path)
    for call, message in (
        (lambda: cs.trace(op, seed=1, checkpoint=path), "its settings is"),
        (lambda: cs.diagonal(by_products(MATRIX[:9, :9]), checkpoint=path), "its size is 150"),
        (lambda: cs.trace(by_products(MATRIX * 1.001), checkpoint=path), "of another matrix"),
        (lambda: cs.eigsh(op, checkpoint=path, method="lanczos"), "its settings is"),
    ):
        with pytest.raises(DataError, match=message):
            call()
    for content in (b"", b"text", pickle.dumps({"meta": "{}"})):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is no checkpoint"):
            cs.trace(op, checkpoint=path)
    with pytest.raises(OutputError, match="is missing"):
        cs.trace(op, checkpoint=tmp_path / "nowhere" / "state.pt")


def test_files_hold_no_code(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    cs.eigsh(by_products(MATRIX), 3, method="lanczos", checkpoint=path)
    content = torch.load(path, weights_only=True)
    assert set(content) == {"meta", "fingerprint", "numbers", "tensors"}
