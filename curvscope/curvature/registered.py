"""Approximations of the user's own, by name, for everything that goes through all of them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ApproximationError, CurvscopeError, OptionError, nearest
from ..operators import Operator
from ..problem import Problem

Make = Callable[[Problem], Operator]

REGISTERED: dict[str, Registered] = {}
"""What :func:`register_approximation` was given, by name, in that order."""

_TAKEN = frozenset(
    """K-FAC|K-FAC (reduce)|K-FAC (sampled)|K-FAC (sampled, reduce)|K-FAC (empirical)
    K-FAC (empirical, reduce)|EKFAC|KFLR|KFRA|FOOF|diagonal K-FAC|AdaFisher factors
    AdaFisher factors (min-max)|Hutchinson diagonal|Hutchinson diagonal (spatial)|exact diagonal
    empirical Fisher|nearest Kronecker|nearest diagonal Kronecker|nearest identity
    Hessian|GGN|Fisher""".replace("\n    ", "|").split("|")
)


@dataclass(frozen=True)
class Registered:
    """An approximation of the user's own: its name, a sentence about it, and its function."""

    name: str
    about: str
    function: Make

    def make(self, problem: Problem) -> Operator:
        """The operator; ``OptionError`` for anything that is none over the problem's parameters.

        What the function raises becomes an ``ApproximationError`` with the name and the line, but
        for errors of curvscope and ``MemoryError``.
        """
        try:
            op = self.function(problem)
        except (CurvscopeError, MemoryError):
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or ["without a message"])[0]
            raise ApproximationError(
                f"The approximation {self.name!r} raised {type(error).__name__}: {text}"
                f"{place_of(error)}."
            ) from error
        if not isinstance(op, Operator):
            raise OptionError(
                f"The approximation {self.name!r} returned {type(op).__name__}; it must return an "
                "Operator, such as BlockDiagonalOperator(blocks, problem.layout, problem.blocks)."
            )
        if op.layout != problem.layout:
            raise OptionError(
                f"The approximation {self.name!r} returned an operator of {op.shape[0]:,} rows "
                "that is not over the problem's parameters; give it layout=problem.layout."
            )
        return op


def place_of(error: Exception) -> str:
    """Where the user's code raised: the last line outside of this package and of torch."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    own = [frame for frame in frames if not frame.filename.startswith(inside)]
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def register_approximation(name: str, *, about: str = "") -> Callable[[Make], Make]:
    """Make a function ``problem -> Operator`` known by ``name`` to reports, coverage and checks.

    A decorator. From then on :func:`curvscope.make_report` shows the approximation beside all
    others, :func:`curvscope.coverage` has a column for it, :func:`curvscope.verify` checks it on
    the problem at hand (symmetry, products, one result for any way to cut the data into batches,
    scale), and the monitor's measure ``"fresh"`` takes it along. ``about`` is the sentence that
    stands beside it in reports; by default the first one of the function's docstring. The function
    itself is returned as it is. Registering a name again replaces what it stood for, in its old
    place.

    Raises ``OptionError`` for an empty name, the name of an approximation of curvscope's own, and
    what cannot be called. Where the function raises, reports and coverage list the approximation
    as not available, with the error and its place.

    Cost: none; the function is called when it is needed.

    Source: none; the approximation's own docstring names its paper.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> from curvscope.operators import BlockDiagonalOperator, IdentityOperator
    >>> @cs.register_approximation("unit", about="The identity, whatever the network.")
    ... def unit(problem):
    ...     sizes = {b: problem.layout.restrict(m).numel for b, m in problem.blocks.items()}
    ...     blocks = {name: IdentityOperator(size) for name, size in sizes.items()}
    ...     return BlockDiagonalOperator(blocks, problem.layout, problem.blocks)
    >>> model, data = torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0]))
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> cs.coverage(problem).shares["unit"]
    1.0
    >>> cs.forget_approximation("unit")
    """
    if not isinstance(name, str) or not name.strip():
        raise OptionError(f"An approximation needs a name, not {name!r}.")
    if name in _TAKEN:
        raise OptionError(f"{name!r} is an approximation of curvscope's own; take another name.")

    def register(function: Make) -> Make:
        if not callable(function):
            raise OptionError(f"{name!r} must be a function of a Problem, not {function!r}.")
        doc = (getattr(function, "__doc__", None) or "").strip().split("\n\n")[0]
        REGISTERED[name] = Registered(name, about or " ".join(doc.split()), function)
        return function

    return register


def forget_approximation(name: str) -> None:
    """Undo :func:`register_approximation`.

    Cost: none. Raises ``OptionError``, with the nearest names, for a name that is not registered.
    Source: none.

    Examples
    --------
    >>> import curvscope as cs
    >>> from curvscope.operators import DiagonalOperator
    >>> @cs.register_approximation("gradient squared")
    ... def squared(problem):
    ...     return DiagonalOperator(problem.gradient().square(), layout=problem.layout)
    >>> cs.forget_approximation("gradient squared")
    """
    if name not in REGISTERED:
        names = ", ".join(map(repr, REGISTERED)) or "none"
        raise OptionError(
            f"No approximation {name!r} is registered.{nearest(str(name), REGISTERED)} Registered "
            f"are: {names}."
        )
    del REGISTERED[name]
