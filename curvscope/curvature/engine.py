"""How products with a whole matrix are computed: on which graph, one or many at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..errors import MemoryLimitError, OptionError, UnsupportedLayerError, check_option
from ..problem import Problem, Snapshot
from ..problem.data import sample_count, select
from .along import AlongGraph
from .footprint import Footprint
from .forward import linearised
from .graphs import BatchGraph, HessianGraph, LinearisedGraph, Nothing, graph_bytes, split
from .products import HESSIAN, Kind, draw, output_product
from .secondorder import cheap_second_derivatives
from .ways import Times, try_forward, vectorising_pays

ENGINES = ("auto", "fresh", "retained", "vmap", "forward")
_TRY_FROM = 4  # vectors from which vectorising is tried
_LONG = 32  # products with batches from which a first call is worth all trials
_FEW, _FEWEST = 8, 16  # trials take this part of a batch, but so many if there is no limit
_SHARE = 0.25  # of the available memory that graphs may keep by default


def check_engine(mode: str, limit: int | None) -> None:
    """Refuse an unknown engine or a limit that is no number of bytes."""
    check_option("engine", mode, ENGINES)
    if limit is not None and (isinstance(limit, bool) or not limit > 0):
        raise OptionError(f"memory={limit!r} must be a positive number of bytes, or None.")


class Engine:
    """Products ``[d, k] -> [d, k]`` with a matrix of a problem at a snapshot.

    ``mode``, one of

    * ``"fresh"``: a graph per batch and call, shared by the k vectors,
    * ``"retained"``: the graphs of all batches are kept from one call to the next,
    * ``"vmap"``: a fresh graph, the k vectors in one vectorised pass,
    * ``"forward"``: forward mode, ``J v`` in one pass (Hessian: forward over reverse); refused
      where it does not agree with reverse mode,
    * ``"auto"``: graphs are kept from the second call on where they fit into ``limit`` bytes, and
      vectors go through them one by one or vectorised, whichever a short trial on the first batch,
      once per operator, finds faster.

    Where the matrix is ``J^T M J``, ``J v`` comes from forward mode in all of these but ``"vmap"``,
    from the second call on, if it agrees with reverse mode and the trial finds it faster.

    ``limit`` bytes bound what a call allocates at a time, results and vectors apart; batches are
    cut into parts that fit. Without it, graphs may keep a quarter of the memory that is available.
    ``used`` says in words what the last call did.
    """

    def __init__(
        self,
        problem: Problem,
        kind: Kind,
        parameters: Sequence[Tensor],
        at: Snapshot,
        *,
        mode: str = "auto",
        limit: int | None = None,
    ) -> None:
        self.problem, self.kind, self.at, self.mode = problem, kind, at, mode
        self.parameters = list(parameters)
        self.limit = limit
        self.scale = problem.scale
        self.facts = problem.check()
        self.used = ""
        self._calls = 0
        self._kept: list[BatchGraph] | None = None
        self._bytes: int | None = None  # of one batch's graph
        self._fits: int | None = None  # samples that fit into the limit
        self._beside = 0  # bytes that a product takes beside its graph, if there is a limit
        self._fitted = False  # whether the parts of a batch have been chosen
        self._pieces = 1
        self._pure = False  # whether the forward pass is known to leave the parameters alone
        self._trusted = False  # whether double backward has been compared with the adjoint
        self._vectorised: bool | None = {"vmap": True, "auto": None}.get(mode, False)
        self._times: Times | None = None
        self._drawn: list[Tensor] | None = None  # sampled cotangents of a part of a batch
        self._forward_agrees: bool | None = False if mode == "vmap" else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # graphs can be neither copied nor pickled

    def release(self) -> None:
        """Forget the graphs that are kept."""
        self._kept = None

    # -- products --------------------------------------------------------------------------------

    def product(self, vectors: Tensor) -> Tensor:
        """The matrix times the columns of ``vectors``."""
        rows = vectors.mT.contiguous()
        total = torch.zeros_like(rows)
        self._drawn = None  # of a product that was interrupted
        self._calls += 1
        if self._kept is not None:
            try:
                return self._add_kept(rows, total).mT
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                self._kept = None  # the user has trained on: start again from the snapshot
                total.zero_()
        keep = self._wants_to_keep()
        kept: list[BatchGraph] = []
        with self.problem.session(self.at, copy=not self._pure) as members:
            before = [p._version for p in members.parameters]
            self._used(len(rows), keep)
            generator = self.kind.generator()
            for inputs, targets in self._parts(rows, generator):
                graph = self._graph(inputs, targets, rows, generator, keep=keep)
                self._add(graph, rows, total, retain=keep)
                if keep:
                    kept.append(graph)
                del graph  # before the next one is made
            self._used(len(rows), keep)
            self._pure = [p._version for p in members.parameters] == before
        self._kept = kept if keep and self._pure else None
        return total.mT

    def _add_kept(self, rows: Tensor, total: Tensor) -> Tensor:
        assert self._kept is not None
        with self.problem.session(self.at, copy=False):
            self._used(len(rows), True)
            for graph in self._kept:
                self._add(graph, rows, total, retain=True)
        return total

    def _add(self, graph: BatchGraph, rows: Tensor, total: Tensor, *, retain: bool) -> None:
        many = len(rows) >= _TRY_FROM or (self.mode == "vmap" and len(rows) > 1)
        if many and self._vectorised is None:
            self._vectorised = vectorising_pays(graph, rows[:_TRY_FROM])
        vectorised = many and bool(self._vectorised)
        try:
            graph.add(rows, total, self.scale, vectorised=vectorised, retain=retain)
        except (RuntimeError, NotImplementedError) as error:
            if not (vectorised and self.mode == "vmap") or isinstance(
                error, torch.OutOfMemoryError
            ):
                raise
            raise UnsupportedLayerError(
                f"The model cannot be multiplied with several vectors in one pass ({error}). Use "
                "engine='auto'."
            ) from error

    # -- graphs ----------------------------------------------------------------------------------

    def _parts(self, rows: Tensor, generator: torch.Generator) -> Iterator[tuple[Any, Any]]:
        """The batches, cut where their products would not fit into a stated memory."""
        for inputs, targets in self.problem.batches():
            samples = sample_count(inputs, targets)
            if self.limit is not None:
                self._fit(inputs, targets, rows, self.limit)
            elif self._long(len(rows)) and self._vectorised is None and not self.facts.coupled:
                self._try_vectorised(inputs, targets, rows[:_TRY_FROM])
            self._fitted = True
            pieces = 1
            if self._fits is not None and not self.facts.coupled:
                pieces = -(-samples // self._fits)
            self._pieces = max(self._pieces, pieces)
            if pieces == 1:
                yield inputs, targets
                continue
            indices = torch.arange(samples).tensor_split(pieces)
            parts = [tuple(select(x, i, samples) for x in (inputs, targets)) for i in indices]
            drawn = None
            if self.kind.samples is not None:
                # labels of the whole batch: the matrix is the same however it is cut
                z = torch.cat([self.problem.outputs(part).detach() for part, _ in parts])
                drawn = draw(self.problem, self.kind, z, targets, samples, generator)
            for index, (some, theirs) in zip(indices, parts, strict=True):
                if drawn is not None:
                    self._drawn = [
                        u.unflatten(0, (samples, -1))[index.to(u.device)].flatten(0, 1)
                        for u in drawn
                    ]
                yield some, theirs
            self._drawn = None

    def _fit(self, inputs: Any, targets: Any, rows: Tensor, limit: int) -> None:
        """How many samples fit, and whether vectorised products of them do."""
        samples = sample_count(inputs, targets)
        if self._fits is None:
            vectorised = self.mode == "vmap" and len(rows) > 1
            used = rows if vectorised else rows[:1]
            taken = self._footprint(inputs, targets, used, vectorised, limit)
            self._fits = min(taken.samples_within(limit), samples)
            pieces = -(-samples // self._fits)
            self._bytes = int(taken.kept.fixed * pieces + taken.kept.each * samples)
            self._beside = int(taken.peak.at(self._fits) - taken.kept.at(self._fits))
            if self.mode == "retained":
                self._wants_to_keep()  # refuses before graphs are kept that do not fit
        if len(rows) >= _TRY_FROM and self._vectorised is None and not self.facts.coupled:
            self._try_vectorised(inputs, targets, rows[:_TRY_FROM])
        if len(rows) >= _TRY_FROM and self._vectorised is None:
            try:
                taken = self._footprint(inputs, targets, rows, True, limit)
            except Exception:  # operations without a batching rule: many error types
                self._vectorised = False
                return
            if taken.peak.at(self._fits) > limit:
                self._vectorised = False

    def _footprint(
        self, inputs: Any, targets: Any, rows: Tensor, vectorised: bool, limit: int
    ) -> Footprint:
        """What products allocate and graphs keep, from those of a few samples."""
        samples = sample_count(inputs, targets)

        def sizes(count: int) -> tuple[float, float]:
            index = torch.arange(count)
            part = select(inputs, index, samples), select(targets, index, samples)
            total = torch.zeros_like(rows)
            kept = 0
            for check in (True, False):  # the first time, derivatives are checked as well
                with memory.PeakBytes() as peak:
                    graph = self._graph(*part, rows, self.kind.generator())
                    if not check:
                        kept = graph_bytes(graph.roots(), self.parameters)
                    graph.add(rows, total, self.scale, vectorised=vectorised, retain=True)
                del graph
            return peak.bytes, kept

        return Footprint.measure(sizes, samples, coupled=self.facts.coupled, limit=limit)

    def _graph(
        self,
        inputs: Any,
        targets: Any,
        rows: Tensor,
        generator: torch.Generator,
        *,
        keep: bool = False,
    ) -> BatchGraph:
        """The graph of a batch that is to be multiplied with ``rows``."""
        problem, parameters = self.problem, self.parameters
        if self.kind.matrix == HESSIAN:
            if self.mode == "forward":
                return AlongGraph(self, inputs, targets)
            outputs = self._outputs(inputs)
            if not outputs.requires_grad:
                return Nothing()
            total = problem.batch_total(outputs, targets)
            check, self._trusted = not self._trusted, True
            graph: BatchGraph = Nothing()
            if total.requires_grad:
                graph = HessianGraph(total, parameters, check=check)
        else:
            graph = self._linearised(inputs, targets, rows, generator, keep)
        if self._bytes is None:
            self._bytes = graph_bytes(graph.roots(), parameters)
        return graph

    def _outputs(self, inputs: Any) -> Tensor:
        with cheap_second_derivatives(self.problem.model):
            return self.problem.outputs(inputs)

    def _linearised(
        self, inputs: Any, targets: Any, rows: Tensor, generator: torch.Generator, keep: bool
    ) -> BatchGraph:
        problem, parameters = self.problem, self.parameters
        tries = self.mode == "forward" or self._calls > 1
        tries = tries or (self._fitted and self._long(len(rows)))
        if self._forward_agrees is None and tries:
            self._try_forward(inputs, targets)
        use = self._forward_agrees and self._forward_pays(len(rows))
        first = None
        if use and not keep and self._joins(len(rows)):
            outputs, jv = self._jvp(inputs, split(rows[0], parameters), graph=True)
            first = rows, jv
        else:
            outputs = self._outputs(inputs)
        if not outputs.requires_grad:
            return Nothing()
        samples = problem.count_samples(inputs, targets)
        middle = output_product(
            problem, self.kind, outputs, targets, samples, generator, drawn=self._drawn
        )

        def forward(parts: list[Tensor]) -> Tensor:
            return self._jvp(inputs, parts)[1]

        check, self._trusted = not (self._trusted or use), True
        return LinearisedGraph(
            outputs,
            parameters,
            middle,
            forward=forward if use else None,
            first=first,
            check=check,
        )

    def _jvp(
        self, inputs: Any, parts: list[Tensor], *, graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        run = lambda: self.problem.outputs(inputs)  # noqa: E731
        return linearised(self.problem.model, run, self.parameters, parts, graph=graph)

    # -- choices ---------------------------------------------------------------------------------

    def _wants_to_keep(self) -> bool:
        needed = self._needed()
        if self.mode == "retained":
            limit = self.limit or int(0.8 * memory.available_bytes(self.problem.device))
            if needed is not None and needed > limit:
                raise MemoryLimitError(
                    f"Keeping the graphs of all batches takes {memory.format_bytes(needed)} "
                    f"({needed} bytes), but {limit} bytes may be used. Use engine='auto' or "
                    "'fresh', fewer samples (problem.subset), or raise memory=."
                )
            return True
        if self.mode != "auto" or self._calls < 2 or needed is None:
            return False
        limit = self.limit or int(_SHARE * memory.available_bytes(self.problem.device))
        return needed <= limit

    def _needed(self) -> int | None:
        """Bytes of the graphs of all batches, and of what a product needs besides."""
        if self._bytes is None:
            return None
        return self._bytes * self.facts.batches + self._beside

    def _long(self, count: int) -> bool:
        """Whether a first call is long enough for trials that pay in later calls otherwise."""
        return count >= _TRY_FROM and count * self.facts.batches >= _LONG

    def _few(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Some of the samples, for trials; all of them where samples are coupled."""
        if self.facts.coupled:
            return inputs, targets
        samples = sample_count(inputs, targets)
        least = min(samples, 1 if self.limit is not None else _FEWEST)
        index = torch.arange(max(least, samples // _FEW))
        return select(inputs, index, samples), select(targets, index, samples)

    def _try_vectorised(self, inputs: Any, targets: Any, rows: Tensor) -> None:
        """If vectorising is slower for a part of the samples, its memory is no matter."""
        graph = self._graph(*self._few(inputs, targets), rows, self.kind.generator())
        if not vectorising_pays(graph, rows):
            self._vectorised = False

    def _try_forward(self, inputs: Any, targets: Any) -> None:
        part, _ = self._few(inputs, targets)
        self._forward_agrees, self._times = try_forward(
            lambda: self._outputs(part),
            functools.partial(self._jvp, part),
            self.parameters,
            required=self.mode == "forward",
        )

    def _forward_pays(self, count: int) -> bool:
        if self.mode == "forward" or self._times is None:
            return True
        return self._times.forward_pays(
            count, kept=self._wants_to_keep(), joined=self._joins(count)
        )

    def _joins(self, count: int) -> bool:
        """Whether one pass gives the outputs, their graph and the first ``J v``.

        That keeps the graph of ``J v`` as well for a while, more than what a limit allowed for.
        """
        return self.limit is None and not (count >= _TRY_FROM and self._vectorised)

    def _used(self, count: int, keep: bool) -> None:
        words = ["retained graphs" if keep else "a fresh graph per batch"]
        if self.mode == "forward" and self.kind.matrix == HESSIAN:
            words = ["forward over reverse"]
        elif self._forward_agrees and self._forward_pays(count):
            words.append("J v by forward mode")
        if count >= _TRY_FROM and self._vectorised:
            words.append("vectorised")
        if self._pieces > 1:
            words.append(f"batches in {self._pieces} parts")
        self.used = ", ".join(words)
