"""The exact matrices: Hessian, generalised Gauss-Newton, Fisher, empirical Fisher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import (
    DataError,
    OptionError,
    UnsupportedLossError,
    check_count,
    check_option,
    check_seed,
)
from ..modes import plain_mode
from ..problem import Problem, Snapshot, require_problem
from ..problem.data import select
from ..problem.refusals import require_sample_gradients
from .engine import check_engine
from .gram import record_batch
from .products import EMPIRICAL, FISHER, GGN, HESSIAN, Kind
from .whole import WholeOperator

_ROUTES = ("auto", "gram", "rows", "autograd", "backpack")


@plain_mode()
def _make(
    problem: Problem, kind: Kind, route: str, engine: str, memory: int | None
) -> WholeOperator:
    check_option("route", route, _ROUTES)
    check_engine(engine, memory)
    require_problem(problem)
    if route == "backpack" and (kind.matrix == EMPIRICAL or kind.samples is not None):
        raise OptionError(
            f"route='backpack' gives the exact matrix only, not the {kind.title}; use "
            "route='auto', or cs.backpack.batch_grad and cs.backpack.sqrt_ggn(mc=...)."
        )
    problem.check()
    if kind.matrix == EMPIRICAL:
        require_sample_gradients(problem, kind.title)
    at = problem.snapshot()
    if kind.needs_samples:
        check_sample_axis(problem, kind, at)
    return WholeOperator(problem, kind, route, at, engine=engine, memory=memory)


def check_sample_axis(problem: Problem, kind: Kind, at: Snapshot) -> None:
    """Gradients of single samples need outputs that say which sample they belong to."""
    with problem.session(at):
        inputs, targets = next(problem.batches())
        recording = record_batch(problem, inputs, targets)
        alone = _last_samples(problem, inputs, recording.samples)
    n, outputs = recording.samples, recording.outputs
    known = outputs.ndim > 0 and outputs.shape[0] == n
    folded = recording.separable_outputs and any(a is not None for a in recording.axes)
    if not (known or folded):
        raise DataError(
            f"Outputs of shape {list(outputs.shape)} do not say which of the {n} samples (first "
            f"axis of the inputs) they belong to, so the {kind.title} is not defined. Return "
            "outputs with the samples first from forward=, for instance [N, C, T] for tokens."
        )
    if alone is None or outputs.shape[0] % n:
        return
    expected = outputs.detach()[-alone[1] * (outputs.shape[0] // n) :].reshape(-1)
    tolerance = 10 * torch.finfo(problem.dtype).eps ** 0.5
    if len(alone[0]) != len(expected) or not torch.allclose(
        alone[0], expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    ):
        raise DataError(
            f"Outputs of shape {list(outputs.shape)} do not hold the {n} samples one after the "
            f"other: the last {alone[1]} alone give other values than in the batch. So the "
            f"{kind.title} is not defined. Return the samples first from forward= "
            "(time-first models: transpose), and samples that do not depend on each other."
        )


def _last_samples(problem: Problem, inputs: Any, samples: int) -> tuple[Tensor, int] | None:
    """Flat outputs of the last one or two samples by themselves, and how many these are."""
    count = 2 if samples > 2 else 1
    if samples < 2 or problem.batchnorm == "batch":
        return None
    try:
        part = select(inputs, torch.arange(samples - count, samples), samples)
        return problem.outputs(part).detach().reshape(-1), count
    except (RuntimeError, ValueError, TypeError, IndexError):  # a model for fixed batches
        return None


def hessian(
    problem: Problem, *, route: str = "auto", engine: str = "auto", memory: int | None = None
) -> WholeOperator:
    """The Hessian ``d^2 f / d theta^2`` ``[P, P]`` of the objective, whole and by block.

    Returns an operator with lazy ``.blocks``, each computed at first access by the cheapest valid
    route (its ``info.route``): layers that only piecewise linear operations follow have their
    Gauss-Newton block; Linear layers in other nets ``(1/M) sum_n H_n (x) a_n a_n^T`` with ``H_n``
    the Hessian of sample n's loss in the layer's output; everything else comes from double
    backward. ``route`` forces ``"gram"``, ``"rows"`` or ``"autograd"``.

    ``engine`` says how products ``op @ V`` are computed and ``memory`` bounds, in bytes, what
    their graphs hold: see :class:`~curvscope.curvature.engine.Engine`. Both are the same for the
    other matrices.

    Cost: nothing until used. A product takes two backward passes over the data per column. A block
    takes one backward pass per output (gram), one double backward pass per output unit and position
    of the layer, at most (rows), or one product per parameter (autograd).

    Raises ``OptionError`` for an unknown route; at first use ``UnsupportedLayerError`` where a
    forced route is not valid or an operation has no second derivative, ``MemoryLimitError`` before
    a matrix that does not fit is formed, and the errors of the problem itself (``DataError``,
    ``NonFiniteError``, ``NonDeterministicError``).

    Source: Pearlmutter 1994 for products by double differentiation; Botev, Ritter and Barber 2017,
    section 2, for ``H_n (x) a_n a_n^T``.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.hessian(problem)
    >>> (op @ torch.ones(26)).shape
    torch.Size([26])
    >>> op.blocks["2"].info.route
    'piecewise-linear'
    """
    if route == "backpack":
        raise OptionError("BackPACK has no full Hessian block; use cs.backpack.diag_hessian.")
    return _make(problem, Kind(HESSIAN), route, engine, memory)


def ggn(
    problem: Problem, *, route: str = "auto", engine: str = "auto", memory: int | None = None
) -> WholeOperator:
    """The generalised Gauss-Newton ``(1/M) sum_m J_m^T (d^2 l_m/dz_m^2) J_m`` ``[P, P]``.

    ``J_m`` is the Jacobian of term m's outputs ``z_m`` in the parameters; what the loss itself
    takes from parameters (a penalty in a callable) is not in it. It is positive semi-definite where
    the loss is convex in the outputs. Blocks are ``V V^T`` (factored for layers too large to form)
    where samples do not couple, else from double backward.
    ``route="backpack"`` takes BackPACK's ``SqrtGGNExact``; the other options are those of
    :func:`hessian`.

    Cost: nothing until used. All blocks together take one backward pass per output of a sample; a
    product takes three passes per column.

    Raises what :func:`hessian` raises, and ``BackpackError`` for what BackPACK cannot do.

    Source: Schraudolph 2002; Martens 2020, section 8.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.ggn(problem)
    >>> list(op.blocks), op.blocks["2"].shape
    (['0', '2'], (10, 10))
    >>> bool((op.blocks["2"].eigenvalues() > -1e-6).all())
    True
    """
    return _make(problem, Kind(GGN), route, engine, memory)


def fisher(
    problem: Problem,
    samples: int | None = None,
    *,
    seed: int = 0,
    route: str = "auto",
    engine: str = "auto",
    memory: int | None = None,
) -> WholeOperator:
    """The Fisher information ``(1/M) sum_m c_m E_{y~p}[grad log p(y) grad log p(y)^T]`` ``[P, P]``.

    ``p`` is the model's own distribution of labels and ``c_m`` the weight of term m.
    ``samples=None`` takes the expectation exactly (it then equals the GGN); ``samples=n`` draws n
    labels per term with ``seed``, which is unbiased. The other options are those of
    :func:`hessian`.

    Cost: nothing until used. One backward pass per output (exact) or per drawn label for all
    blocks; three passes per product and column.

    Raises ``UnsupportedLossError`` for a loss that is no log-likelihood, ``OptionError`` for
    ``samples`` below one, and what :func:`hessian` raises.

    Source: Martens 2020, section 5, the Fisher of the model's predictive distribution.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> exact, sampled = cs.fisher(problem), cs.fisher(problem, samples=2, seed=1)
    >>> torch.allclose(exact.dense(), cs.ggn(problem).dense(), atol=1e-6)
    True
    >>> exact.info.exact, sampled.info.exact
    (True, False)
    """
    samples = None if samples is None else check_count("samples", samples)
    if problem.loss.likelihood is None:
        raise UnsupportedLossError(problem.loss.no_likelihood("Its Fisher"))
    kind = Kind(FISHER, samples=samples, seed=check_seed(seed))
    return _make(problem, kind, route, engine, memory)


def empirical_fisher(
    problem: Problem,
    *,
    per: str = "sample",
    route: str = "auto",
    engine: str = "auto",
    memory: int | None = None,
) -> WholeOperator:
    """The empirical Fisher ``(1/M) sum_n g_n g_n^T`` ``[P, P]``, which is not the Fisher.

    ``g_n`` is the gradient of sample n's summed terms at the observed labels, each term scaled by
    ``1/sqrt(c_m)`` so that a class weight of 2 is the same as duplication; ``per="term"`` takes
    tokens or pixels one by one. The other options are those of :func:`hessian`.

    Cost: nothing until used. One backward pass for all blocks (``per="term"``: one per position);
    three passes per product and column.

    Raises ``DataError`` where the outputs of a sample cannot be told apart from another's,
    ``UnsupportedLossError`` where the loss uses parameters itself (a penalty), ``OptionError`` for
    unknown options, and what :func:`hessian` raises.

    Source: Kunstner, Balles and Hennig 2019, eq. 3, who say why it is not the Fisher.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Linear(3, 2)
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> op = cs.empirical_fisher(problem)
    >>> op.shape, op.info.what
    ((8, 8), 'empirical Fisher')
    """
    check_option("per", per, ("sample", "term"))
    return _make(problem, Kind(EMPIRICAL, per=per), route, engine, memory)
