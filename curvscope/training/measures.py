"""What a monitor measures. A measure is one class: a name, a schedule, and :meth:`Measure.take`.

A measure returns rows (dictionaries of numbers and short texts), and tensors where a table is not
enough. What it computes it takes from the :class:`~curvscope.training.moment.Moment`, which
computes shared things once per step. Those that need curvature are in ``curvature_measures``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..analysis.noise import gradient_noise
from ..errors import OptionError, nearest
from .moment import Moment
from .schedules import Every, Schedule, schedule

Rows = list[dict[str, Any]]


class Measure:
    """Base class of what a monitor measures.

    ``name`` names its records, ``about`` says in a few words what they are; ``default`` is its
    schedule; ``weight`` its part of the budget; ``needs_before`` says that it compares with the
    moment before the step (``moment.previous``), on which :meth:`before` is called. ``disturbs`` is
    false for those that neither evaluate the model nor draw random numbers; ``steady`` is true for
    those that take microseconds, which have a part of the budget to themselves; ``by_block`` for
    those whose :meth:`take` measures ``moment.blocks`` only, so that a budget can take them in
    parts.
    """

    name: ClassVar[str] = ""
    about: ClassVar[str] = ""
    default: ClassVar[Schedule] = Every(10)
    weight: ClassVar[float] = 1.0
    needs_before: ClassVar[bool] = False
    disturbs: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    by_block: ClassVar[bool] = False

    def take(self, moment: Moment) -> Rows:
        """The rows of the record; a row may hold ``"tensors"``, a dictionary of them."""
        raise NotImplementedError

    def before(self, moment: Moment) -> None:
        """Compute what :meth:`take` will need of the moment before the step."""

    def price(self, moment: Moment) -> float:
        """About how many gradients over the probe it costs; 0 for next to nothing."""
        return 0.0

    def settings(self) -> dict[str, Any]:
        """Options, for ``run.json``."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}


REGISTRY: dict[str, type[Measure]] = {}


def register(kind: type[Measure]) -> type[Measure]:
    """Class decorator: the measure can be asked for by its name."""
    REGISTRY[kind.name] = kind
    return kind


def choose(
    measures: str | Iterable[Any] | Mapping[Any, Any] | None,
    every: Any,
    defaults: Iterable[str],
) -> list[tuple[Measure, Schedule]]:
    """Measures with their schedules, from what the user wrote.

    What is named beside ``"default"`` replaces the default measure of that name, wherever it
    stands. Raises ``OptionError`` for unknown names, a name twice, or what is no schedule.
    """
    given: Mapping[Any, Any]
    if isinstance(measures, Mapping):
        given = measures
    else:
        entries = [measures] if isinstance(measures, str | Measure) else measures
        given = dict.fromkeys(defaults if entries is None else entries)
    found: dict[str, tuple[Measure, Schedule]] = {}
    explicit: set[str] = set()
    for entry, own in given.items():
        for name in defaults if entry == "default" else [entry]:
            measure = _measure(name)
            if entry != "default" and measure.name in explicit:
                raise OptionError(f"measures= has {measure.name!r} twice.")
            chosen = every if own is None and not isinstance(measure, Loss) else own
            when = measure.default if chosen is None else schedule(chosen)
            if entry != "default":
                explicit.add(measure.name)
                found[measure.name] = (measure, when)
            else:
                found.setdefault(measure.name, (measure, when))
    if not found:
        raise OptionError("measures= is empty: leave it out for the default ones.")
    return list(found.values())


def _measure(entry: Any) -> Measure:
    if isinstance(entry, type) and issubclass(entry, Measure):
        entry = entry()
    if isinstance(entry, Measure):
        return entry
    if not isinstance(entry, str) or entry not in REGISTRY:
        raise OptionError(
            f"There is no measure {entry!r}.{nearest(str(entry), REGISTRY)} "
            f"There are {', '.join(REGISTRY)}, and subclasses of cs.training.Measure."
        )
    return REGISTRY[entry]()


@register
class Loss(Measure):
    """``loss`` as the loop hands it over, and ``lr``, the learning rate."""

    name = "loss"
    about = "loss of the step, learning rate"
    default = Every(1)
    disturbs = False
    steady = True

    def take(self, moment: Moment) -> Rows:
        """One row."""
        given = {} if moment.given else {"given": False}
        return [{"loss": moment.loss, "lr": moment.lr, **given}]


@register
class Gradient(Measure):
    """On the probe: ``objective`` and ``norm``, the length of its gradient."""

    name = "gradient"
    about = "loss and length of the gradient on the probe"

    def take(self, moment: Moment) -> Rows:
        """One row."""
        return [{"objective": moment.objective, "norm": _norm(moment.gradient)}]

    def price(self, moment: Moment) -> float:
        """One gradient."""
        return 1.0


@register
class Update(Measure):
    """The step taken: its ``length``, and the ``angle`` in degrees to minus the probe's gradient.

    Below 90 degrees it descends on the probe. With ``relative``, the length over that of the
    parameters.
    """

    name = "update"
    about = "length and direction of the step taken"
    needs_before = True

    def before(self, moment: Moment) -> None:
        """The gradient at the parameters that the step leaves."""
        _ = moment.gradient

    def take(self, moment: Moment) -> Rows:
        """One row."""
        assert moment.previous is not None
        step, g = step_taken(moment), moment.previous.gradient.double()
        length = _norm(step)
        product = -float(step @ g)
        cosine = product / (length * _norm(g)) if length and _norm(g) else math.nan
        angle = math.degrees(math.acos(min(1.0, max(-1.0, cosine)))) if cosine == cosine else cosine
        size = _norm(flat(moment.previous))
        return [{"length": length, "relative": length / size if size else math.nan, "angle": angle}]

    def price(self, moment: Moment) -> float:
        """One gradient and copies of the parameters."""
        return 1.3


@register
class Decrease(Measure):
    """What the step promised and what it gave, on the probe.

    ``actual`` is ``f(x) - f(x + s)`` for the step ``s`` that was taken, ``linear`` is ``-g^T s``,
    ``predicted`` ``-g^T s - s^T B s / 2`` with the exact reference ``B`` at ``x``, ``own`` the same
    with the optimizer's curvature after the step (NaN where it does not cover all parameters);
    ``ratio`` is actual over predicted, ``own_ratio`` actual over own.
    """

    name = "decrease"
    about = "decrease of the loss, promised and got"
    needs_before = True

    def before(self, moment: Moment) -> None:
        """Gradient and curvature at the parameters that the step leaves."""
        _ = moment.gradient, moment.reference

    def take(self, moment: Moment) -> Rows:
        """One row."""
        assert moment.previous is not None
        before, step = moment.previous, step_taken(moment)
        linear = -float(step @ before.gradient.double())
        B = before.reference
        predicted = linear - float(step @ (B @ step.to(B.dtype)).double().to(step.device)) / 2
        actual = before.objective - moment.objective
        own, op = math.nan, moment.curvature
        if op is not None and not op.uncovered:
            own = linear - float(step @ (op @ step.to(op.dtype)).double().to(step.device)) / 2
        return [
            {
                "actual": actual,
                "linear": linear,
                "predicted": predicted,
                "own": own,
                "ratio": actual / predicted if predicted else math.nan,
                "own_ratio": actual / own if own else math.nan,
            }
        ]

    def price(self, moment: Moment) -> float:
        """Two gradients and a product."""
        return 8.0


@register
class Noise(Measure):
    """``cs.gradient_noise`` on the probe: gradient norm, variance, noise scale, batch sizes."""

    name = "noise"
    about = "noise of the gradient"

    def take(self, moment: Moment) -> Rows:
        """One row."""
        found = gradient_noise(moment.problem)
        return [{k: v for k, v in found.records()[0].items() if isinstance(v, int | float)}]

    def price(self, moment: Moment) -> float:
        """Two passes, and one product with the matrix of second moments."""
        return 20.0


@register
class Diagnostics(Measure):
    """The optimizer's own ``diagnostics()``: a row per block, if it has any."""

    name = "diagnostics"
    about = "what the optimizer says of itself"

    def take(self, moment: Moment) -> Rows:
        """A row per block."""
        own = getattr(moment.optimizer, "diagnostics", None)
        if not callable(own):
            return []
        cheap = "eigenvalues" in inspect.signature(own).parameters
        rows = own(eigenvalues=False) if cheap else own()
        return [
            {("own_step" if k == "step" else k): v for k, v in row.items() if k != "measure"}
            for row in rows
        ]


def flat(moment: Moment) -> Tensor:
    """The problem's parameters at a moment, flat ``[P]`` in float64."""
    wanted = {id(p) for p in moment.problem.params.values()}
    pairs = zip(moment.problem.model.parameters(), moment.at.parameters, strict=True)
    return torch.cat([value.reshape(-1).double() for p, value in pairs if id(p) in wanted])


def step_taken(moment: Moment) -> Tensor:
    """The change of the parameters since the moment before, flat ``[P]`` in float64."""
    assert moment.previous is not None
    return flat(moment) - flat(moment.previous)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))
