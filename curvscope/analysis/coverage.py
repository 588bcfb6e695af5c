"""Which parameter each method covers, how, and what it leaves out."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..display import Table
from ..errors import CurvscopeError, OptionError, counted, nearest
from ..problem import Problem
from .batches import cut
from .methods import METHODS, Look, Method, own_methods
from .result import Cost, Result, listing, number

COVERED, UNCOVERED, IGNORED = "covered", "uncovered", "ignored"
INCLUDED, WITHOUT_INFLUENCE = "included", "without influence"
FROZEN, LEFT_OUT = "frozen", "left out"

__all__ = ["Cell", "Coverage", "ParameterRow", "coverage"]


@dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """One parameter of the model; a tied one stands here once.

    ``names`` are all names that it goes by, ``name`` the first. ``block`` is its block (empty
    unless included), ``layer`` the type of the module that owns it. ``state`` is ``"included"``,
    ``"without influence"`` (included, but the outputs do not depend on it, so that its gradient is
    always zero), ``"frozen"`` or ``"left out"`` (by ``params=``); ``note`` says so in a sentence.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    size: int
    block: str
    layer: str
    state: str
    note: str = ""

    @property
    def included(self) -> bool:
        return self.state in (INCLUDED, WITHOUT_INFLUENCE)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One parameter under one method.

    ``status`` is ``"covered"`` (by ``route``), ``"uncovered"`` or ``"ignored"`` (not part of the
    problem). ``reason`` says why it is not covered, or why only by the slowest route.
    """

    parameter: str
    method: str
    status: str
    route: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Coverage(Result):
    """Parameters (rows) against methods (columns); returned by :func:`coverage`.

    ``cells`` holds a :class:`Cell` for every row and method, row by row. ``shares`` is the part of
    the included parameters, counted by entries, that a method covers. ``not_available`` says why a
    method refuses the whole problem. ``buffers`` maps the names of the model's buffers, which no
    method covers, to their sizes.
    """

    problem: str
    methods: tuple[str, ...]
    parameters: tuple[ParameterRow, ...]
    cells: tuple[Cell, ...]
    shares: Mapping[str, float]
    not_available: Mapping[str, str]
    buffers: Mapping[str, int]

    def cell(self, parameter: str, method: str) -> Cell:
        """The cell of a parameter (by any of its names) and a method."""
        row = self.row(parameter)
        if method not in self.methods:
            raise OptionError(
                f"There is no method {method!r}.{nearest(method, self.methods)} "
                f"Methods: {', '.join(self.methods)}."
            )
        place = self.parameters.index(row) * len(self.methods) + self.methods.index(method)
        return self.cells[place]

    def row(self, parameter: str) -> ParameterRow:
        """The row of a parameter, by any of its names; ``OptionError`` if unknown."""
        for row in self.parameters:
            if parameter in row.names:
                return row
        names = [name for row in self.parameters for name in row.names]
        raise OptionError(f"The model has no parameter {parameter!r}.{nearest(parameter, names)}")

    def matrix(self) -> Tensor:
        """``[rows, methods]``: 1 covered, 0 not covered, NaN not part of the problem."""
        value = {COVERED: 1.0, UNCOVERED: 0.0, IGNORED: math.nan}
        flat = torch.tensor([value[c.status] for c in self.cells], dtype=torch.float64)
        return flat.reshape(len(self.parameters), len(self.methods))

    def routes(self, method: str) -> dict[str, int]:
        """Route -> how many parameter entries go by it under a method."""
        found: dict[str, int] = {}
        for row in self.parameters:
            route = self.cell(row.name, method).route
            if route:
                found[route] = found.get(route, 0) + row.size
        return found

    def records(self) -> list[dict[str, Any]]:
        """A record per parameter, with the route of every method (empty if not covered).

        ``reasons`` says why a method leaves this parameter out or takes the slowest route; why
        methods refuse the whole problem is said by :attr:`not_available`, by :meth:`details` for
        every cell.
        """
        rows = []
        for row in self.parameters:
            record: dict[str, Any] = {
                "parameter": " = ".join(row.names),
                "block": row.block,
                "layer": row.layer,
                "size": row.size,
                "state": row.state,
            }
            for method in self.methods:
                record[method] = self.cell(row.name, method).route
            record["reasons"] = self._reasons(row)
            rows.append(record)
        return rows

    def _own_reasons(self, row: ParameterRow) -> dict[str, list[str]]:
        """Reasons of a parameter's own cells -> the methods that have it."""
        groups: dict[str, list[str]] = {}
        for method in self.methods if row.included else ():
            reason = self.cell(row.name, method).reason
            if reason and method not in self.not_available:
                groups.setdefault(reason, []).append(method)
        return groups

    def _reasons(self, row: ParameterRow) -> str:
        groups = self._own_reasons(row).items()
        return " ".join(f"{', '.join(m)}: {reason}" for reason, m in groups) or row.note

    def _shown_rows(self, most: int) -> tuple[list[dict[str, Any]], int]:
        rows, total = super()._shown_rows(most)
        return [{k: v for k, v in row.items() if k != "reasons"} for row in rows], total

    def _more_tables(self) -> list[Table]:
        groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for row in self.parameters:
            for reason, methods in self._own_reasons(row).items():
                groups.setdefault((tuple(methods), reason), []).append(row.name)
        rows = [
            {"methods": ", ".join(methods), "parameters": listing(names, 3), "reason": reason}
            for (methods, reason), names in groups.items()
        ]
        table = Table(rows, title="Reasons", folded=True, where="details()")
        return [table] if rows else []

    def details(self) -> Any:
        """A frame with a row per parameter and method: status, route, reason."""
        import pandas as pd

        columns = ["parameter", "method", "status", "route", "reason"]
        rows = [[getattr(cell, key) for key in columns] for cell in self.cells]
        return pd.DataFrame(rows, columns=columns)

    def summary(self) -> str:
        """What each method covers, by which route, and what none of them sees."""
        included = [row for row in self.parameters if row.included]
        size = sum(row.size for row in included)
        lines = [
            f"{self.problem}: {size:,} parameters in "
            f"{counted(len({r.block for r in included}), 'block')}; {len(self.methods)} methods "
            f"({self.cost})."
        ]
        groups: dict[tuple[float, tuple[str, ...]], list[str]] = {}
        for method in self.methods:
            if method in self.not_available:
                continue
            missing = tuple(
                row.name for row in included if self.cell(row.name, method).status == UNCOVERED
            )
            routes = self.routes(method)
            ways = [f"{route} {number(100 * n / size)} %" for route, n in routes.items()]
            several = f" ({', '.join(ways)})" if len(routes) > 1 else ""
            groups.setdefault((self.shares[method], missing), []).append(method + several)
        for (share, missing), methods in groups.items():
            without = f", without {listing(missing)}" if missing else ""
            lines.append(f"{number(100 * share)} % covered by {listing(methods, 99)}{without}.")
        lines += refusals(self.not_available)
        for state, verb in ((FROZEN, "Frozen"), (LEFT_OUT, "Left out by params=")):
            rows = [row for row in self.parameters if row.state == state]
            if rows:
                names = listing([row.name for row in rows])
                lines.append(f"{verb}: {names} ({sum(row.size for row in rows):,} entries).")
        tied = [" = ".join(row.names) for row in self.parameters if len(row.names) > 1]
        if tied:
            lines.append(f"Tied: {listing(tied)}, counted once.")
        if self.buffers:
            lines.append(f"Buffers, which nothing covers: {listing(list(self.buffers))}.")
        return "\n".join(lines)


_ADVICE = re.compile(r"(?P<link>\. U|, or u)se (?P<call>cs\.[^;]+)\.$")


_ADVISED = {"cs.kfac(": "K-FAC", "cs.kflr(": "KFLR", "cs.kfra(": "KFRA"}


def _advised(reason: str, shares: Mapping[str, float]) -> str:
    """A reason without advice to use what does not cover the model either."""
    match = _ADVICE.search(reason)
    if match is None:
        return reason
    named = [name for call, name in _ADVISED.items() if match["call"].startswith(call)]
    if all(shares[name] == 1 for name in named):
        return reason
    return f"{reason[: match.start()]}."


def refusals(reasons: Mapping[str, str]) -> list[str]:
    """A sentence per reason why methods refuse a problem, methods with the same one together."""
    groups: dict[str, list[str]] = {}
    for method, reason in reasons.items():
        # BackPACK names its extension in the reason; so does the method
        same = reason.replace(f"BackPACK's {method.removeprefix('BackPACK ')} ", "BackPACK's part ")
        groups.setdefault(_ADVICE.sub("", same), []).append(method)
    lines = []
    for reason, methods in groups.items():
        if len(methods) == 1:
            lines.append(f"Not {methods[0]}: {reasons[methods[0]]}")
            continue
        because = reason.replace("BackPACK's part does", "they do")
        advice = [match for m in methods if (match := _ADVICE.search(reasons[m]))]
        if advice:
            calls = listing(list(dict.fromkeys(match["call"] for match in advice)), 99)
            because += f"{advice[0]['link']}se {calls.replace(' and ', ' or ')}."
        lines.append(f"Not {listing(methods, 99)}: {because}")
    return lines


def coverage(problem: Problem) -> Coverage:
    """Parameter by parameter: which method covers it, by which route, and why another does not.

    Nothing is computed but what the plans need: one forward pass and a few backward passes on at
    most 16 samples of the first batch, and BackPACK on three of them. Later batches may be used
    differently by the model; the methods themselves notice that.

    Also listed: frozen parameters and those left out with ``params=``, parameters that the outputs
    do not depend on, buffers, and all names of tied parameters.

    Cost: a fraction of a second for small networks, independent of the size of the data.

    Raises ``OptionError`` for anything but a Problem, and the errors of the problem itself
    (``DataError``, ``NonFiniteError``, ``NonDeterministicError``). A method that refuses the
    problem is no error: ``.not_available`` holds its reason.

    Source: the conditions are those of the methods' own functions, which are asked here.

    Examples
    --------
    >>> import torch
    >>> import curvscope as cs
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = torch.eye(3), torch.tensor([0, 1, 0])
    >>> problem = cs.Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> found = cs.coverage(problem)
    >>> found.cell("0.weight", "K-FAC").status, found.shares["K-FAC"]
    ('covered', 1.0)
    """
    start = time.perf_counter()
    if not isinstance(problem, Problem):
        raise OptionError(f"A Problem is needed, not {type(problem).__name__}.")
    problem.check()
    look = Look.at(_small(problem))
    rows = _rows(problem, look)
    refusals: dict[str, str] = {}
    cells: dict[tuple[str, str], Cell] = {}
    methods = {**METHODS, **own_methods()}
    for name, method in methods.items():
        reason = method.refusal(look)
        if reason is not None:
            refusals[name] = reason
        for row in rows:
            cells[row.name, name] = _cell(look, row, name, method, refusals.get(name))
    size = sum(row.size for row in rows if row.included)
    shares = {
        name: sum(r.size for r in rows if cells[r.name, name].status == COVERED) / size
        for name in methods
    }
    refusals = {name: _advised(reason, shares) for name, reason in refusals.items()}
    dead = [row.name for row in rows if row.state == WITHOUT_INFLUENCE]
    warnings = (
        (
            f"The outputs do not depend on {listing(dead)}: the gradient is always zero there. Is "
            "the layer meant to be used in the forward pass?",
        )
        if dead
        else ()
    )
    return Coverage(
        problem=problem.name,
        methods=tuple(methods),
        parameters=tuple(rows),
        cells=tuple(cells[row.name, name] for row in rows for name in methods),
        shares=shares,
        not_available=refusals,
        buffers={name: b.numel() for name, b in problem.user_model.named_buffers()},
        cost=Cost(seconds=time.perf_counter() - start),
        settings={},
        warnings=warnings,
    )


def _cell(look: Look, row: ParameterRow, name: str, method: Method, refusal: str | None) -> Cell:
    if not row.included:
        return Cell(parameter=row.name, method=name, status=IGNORED, reason=row.note)
    if refusal is not None:
        return Cell(parameter=row.name, method=name, status=UNCOVERED, reason=refusal)
    route, reason = method.cover(look, row.block)
    status = COVERED if route else UNCOVERED
    return Cell(
        parameter=row.name, method=name, status=status, route=route, reason=_sentence(reason)
    )


def _sentence(text: str) -> str:
    """A fragment as a sentence."""
    if not text:
        return ""
    first = text[0].upper() if text[0].isalpha() else text[0]
    return first + text[1:] + ("" if text.endswith(".") else ".")


def _small(problem: Problem) -> Problem:
    """The first batch, at most 16 samples of it where they can be taken out."""
    with problem.session():
        batch = next(problem.batches())
        size = problem.count_samples(*batch)
    if size > 16:
        try:
            small = problem.with_data(cut(batch, [16, size - 16])[:1])
            small.check()
            return small
        except CurvscopeError:  # samples that do not lie along the first axis
            pass
    return problem.with_data([batch])


def _rows(problem: Problem, look: Look) -> list[ParameterRow]:
    model = problem.user_model
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    block_of = {member: name for name, members in problem.blocks.items() for member in members}
    rows = []
    for name, parameter in model.named_parameters():
        note = ""
        if name in problem.params:
            state = INCLUDED
            if not look.uses[name]:
                state = WITHOUT_INFLUENCE
                note = "The outputs do not depend on it, so its gradient is always zero."
        elif parameter.requires_grad:
            state, note = LEFT_OUT, "Left out with params=."
        else:
            state, note = FROZEN, "Frozen: requires_grad is False."
        rows.append(
            ParameterRow(
                name=name,
                names=tuple(names[id(parameter)]),
                shape=tuple(parameter.shape),
                size=parameter.numel(),
                block=block_of.get(name, ""),
                layer=_layer(modules, name),
                state=state,
                note=note,
            )
        )
    return rows


def _layer(modules: Mapping[str, nn.Module], parameter: str) -> str:
    # the output layer of MultiheadAttention is a Linear under a longer name
    kind = type(modules[parameter.rpartition(".")[0]]).__name__
    return kind.removeprefix("NonDynamicallyQuantizable")
