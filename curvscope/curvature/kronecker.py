"""Kronecker-factored approximations: K-FAC, EKFAC, KFLR, FOOF and their diagonals.

With N samples, T positions per sample, input rows ``a_nt`` (a 1 appended where the layer has a
bias) and ``g_nt`` the gradient of sample n's unnormalised loss in output row t, a layer's block is
approximated by ``G (x) A`` on its matrix view ``[W b]``:

* ``sharing="expand"``: ``G = (1/M) sum_{n,t} E_y[g_nt g_nt^T]``,
  ``A = (1/(N T)) sum_{n,t} a_nt a_nt^T``;
* ``sharing="reduce"``: positions first, ``G = (1/M) sum_n E_y[(sum_t g_nt)(sum_t g_nt)^T]``,
  ``A = (1/N) sum_n (mean_t a_nt)(mean_t a_nt)^T``  (Eschenhagen et al. 2023).

A layer used several times counts every use as further positions.
"""

from __future__ import annotations

import time

import torch

from ..errors import check_option
from ..modes import plain_mode
from ..operators import (
    BlockDiagonalOperator,
    EigenKroneckerOperator,
    KroneckerOperator,
    Operator,
    kronecker_eigenvalue_correction,
)
from ..problem import Problem
from .factors import assemble, collect_factors, kronecker_info, label_kind, prepared
from .products import GGN, Kind
from .whole import WholeOperator

_TITLES = {"exact": "exact Fisher", "mc": "sampled Fisher", "empirical": "empirical Fisher"}


@plain_mode()
def kfac(
    problem: Problem,
    *,
    fisher: str = "exact",
    sharing: str = "expand",
    samples: int = 1,
    seed: int = 0,
    uncovered: str = "raise",
) -> BlockDiagonalOperator:
    """K-FAC: ``G (x) A`` ``[out * in, out * in]`` for every Linear and convolution layer.

    ``A`` is the second moment of the layer's input rows, ``G`` that of the loss's gradients in its
    output rows; definitions and ``sharing`` are at the top of the module. ``fisher`` says which
    labels the gradients use: the exact expectation, ``"mc"`` (``samples`` labels per term drawn
    with ``seed``) or ``"empirical"`` (the observed ones).

    Blocks without factors are in ``op.uncovered``, with reasons in
    ``op.info.settings["uncovered"]``; products then raise ``UncoveredError`` unless
    ``uncovered="zero"``.

    Cost: per batch one forward pass and one backward pass per output (exact), per drawn label
    (mc), or one (empirical); ``O(rows * (out^2 + in^2))`` for the moments.

    Raises ``OptionError`` for unknown options, ``UnsupportedLossError`` for a loss that is no
    log-likelihood (unless ``"empirical"``), and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Martens and Grosse 2015, eq. 1; for convolutions Grosse and Martens 2016, section 3
    (KFC, here ``"expand"``); for shared weights Eschenhagen et al. 2023, section 3.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.kfac(problem)
    >>> op.blocks["2"].G.shape, op.blocks["2"].A.shape
    (torch.Size([2, 2]), torch.Size([5, 5]))
    >>> bool(cs.compare(cs.ggn(problem), {"K-FAC": op}).best().error < 1)
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = label_kind(problem, fisher, seed, samples)
    at = prepared(problem, kind)
    run = collect_factors(problem, kind, sharing, at)
    what = f"K-FAC ({_TITLES[fisher]}" + (", reduce)" if sharing == "reduce" else ")")
    info = kronecker_info(problem, kind, what, run, fisher=fisher, sharing=sharing)
    blocks: dict[str, Operator] = {
        n: KroneckerOperator(f.G, f.A, f.view, positive_semidefinite=True)
        for n, f in run.factors.items()
    }
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def kflr(
    problem: Problem, *, sharing: str = "expand", uncovered: str = "raise"
) -> BlockDiagonalOperator:
    """KFLR: K-FAC with ``G`` from the exact Hessian of the loss in the outputs.

    ``G = (1/M) sum_{n,t} J_nt^T (d^2 l/dz^2) J_nt`` with ``J_nt`` the Jacobian of the outputs in
    the layer's output row, ``A`` as for :func:`kfac`, whose ``sharing`` and ``uncovered`` it has.
    Defined for any loss that is convex in the outputs; for log-likelihoods it equals K-FAC with
    the exact Fisher.

    Cost: per batch one forward pass and one backward pass per output.

    Raises ``UnsupportedLossError`` for a loss that is not convex in the outputs, ``OptionError``
    for unknown options, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Botev, Ritter and Barber 2017 (there for Linear layers).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> torch.allclose(cs.kflr(problem).dense(), cs.kfac(problem, fisher="exact").dense())
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = Kind(GGN)
    run = collect_factors(problem, kind, sharing, prepared(problem, kind))
    info = kronecker_info(problem, kind, "KFLR", run, sharing=sharing)
    blocks: dict[str, Operator] = {
        n: KroneckerOperator(f.G, f.A, f.view, positive_semidefinite=True)
        for n, f in run.factors.items()
    }
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def foof(
    problem: Problem, *, sharing: str = "expand", scaled: bool = False, uncovered: str = "raise"
) -> BlockDiagonalOperator:
    """FOOF: the input factor alone, ``I (x) A``, with ``A`` as for :func:`kfac`.

    ``scaled=True`` puts ``(tr G / out) I`` in place of ``I``, so that the trace is K-FAC's.
    ``sharing`` and ``uncovered`` are those of :func:`kfac`.

    Cost: one forward pass per batch and no backward pass; ``scaled=True`` costs what
    :func:`kflr` does.

    Raises ``OptionError`` for unknown options, ``UnsupportedLossError`` for ``scaled=True`` with a
    loss that is not convex in the outputs, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Benzing 2022, section 4.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.foof(problem)  # the factor of gradients is a multiple of the identity
    >>> G = op.blocks["2"].G
    >>> torch.equal(G, G[0, 0] * torch.eye(2))
    True
    """
    check_option("sharing", sharing, ("expand", "reduce"))
    kind = Kind(GGN)
    run = collect_factors(problem, kind, sharing, prepared(problem, kind), need_outputs=scaled)
    info = kronecker_info(
        problem, kind, "FOOF (scaled)" if scaled else "FOOF", run, sharing=sharing
    )
    blocks: dict[str, Operator] = {}
    for name, f in run.factors.items():
        eye = torch.eye(f.view.out, dtype=f.A.dtype, device=f.A.device).expand_as(f.G)
        mean = f.G.diagonal(dim1=-2, dim2=-1).mean() if scaled else 1.0
        blocks[name] = KroneckerOperator(eye * mean, f.A, f.view, positive_semidefinite=True)
    return assemble(problem, blocks, info, run.reasons, uncovered)


@plain_mode()
def ekfac(
    problem: Problem,
    *,
    fisher: str = "exact",
    sharing: str = "expand",
    samples: int = 1,
    seed: int = 0,
    uncovered: str = "raise",
) -> BlockDiagonalOperator:
    """EKFAC: K-FAC's eigenbasis with the exact second moments in it.

    With ``u_i`` and ``v_j`` the eigenvectors of K-FAC's ``G`` and ``A``, the eigenvalue for
    ``u_i (x) v_j`` is ``(1/M) sum_n E_y[(sum_t u_i^T g_nt a_nt^T v_j)^2]``: with shared weights the
    sum over positions comes before the square. Of all matrices with this eigenbasis it is the
    nearest to the Fisher block in Frobenius norm. The options are those of :func:`kfac`.

    Cost: twice the passes of :func:`kfac`, and the eigen-decompositions of its factors,
    ``O(out^3 + in^3)`` per layer.

    Raises what :func:`kfac` raises.

    Source: George et al. 2018, section 3 (the diagonal of eq. 8 in the Kronecker eigenbasis).

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op, exact = cs.ekfac(problem), cs.ggn(problem)
    >>> abs(op.trace() - exact.trace()) < 1e-5
    True
    """
    base = kfac(problem, fisher=fisher, sharing=sharing, samples=samples, seed=seed)
    kind = label_kind(problem, fisher, seed, samples)
    start = time.perf_counter()
    exact = WholeOperator(problem, kind, "auto", problem.snapshot())
    blocks: dict[str, Operator] = {}
    for name, block in base.blocks.items():
        assert isinstance(block, KroneckerOperator)
        _, u_g = torch.linalg.eigh(block.G)
        _, u_a = torch.linalg.eigh(block.A)
        moments = kronecker_eigenvalue_correction(exact.blocks[name], u_g, u_a, view=block.view)
        blocks[name] = EigenKroneckerOperator(u_g, u_a, moments.clamp_min(0), block.view)
    reasons = dict(base.info.settings.get("uncovered", {}))
    info = base.info.with_(
        what=base.info.what.replace("K-FAC", "EKFAC"),
        seconds=base.info.seconds + time.perf_counter() - start,
        passes=2 * base.info.passes,
    )
    return assemble(problem, blocks, info, reasons, uncovered)
