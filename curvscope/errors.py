"""Every error that curvscope raises on purpose.

All of them derive from :class:`CurvscopeError`. Where Python has a fitting built-in class
(``ValueError``, ``MemoryError``, ...) the error derives from that as well, so code that does
not know curvscope can still catch it. A message says what is wrong and what to do instead.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable


class CurvscopeError(Exception):
    """Base class of every error raised on purpose."""


class OptionError(CurvscopeError, ValueError):
    """An argument has a value that the function does not accept."""


class ShapeError(CurvscopeError, ValueError):
    """A vector or matrix does not have the shape that an operator needs."""


class ParameterMismatchError(CurvscopeError, ValueError):
    """Two operators, or an operator and a model, do not speak of the same parameters."""


class UnknownBlockError(CurvscopeError, KeyError):
    """A block name that the operator or problem does not have."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class UncoveredError(CurvscopeError, ValueError):
    """A product was asked of an operator that does not define some of the parameters."""


class NotDefinedError(CurvscopeError, ValueError):
    """A quantity does not exist for this matrix (logarithm of an indefinite determinant, ...)."""


class SingularError(CurvscopeError, ValueError):
    """An inverse was asked of a matrix that has none at this damping."""


class ModelError(CurvscopeError, ValueError):
    """The model cannot be used (no trainable parameters, unknown parameter names, ...)."""


class UnsupportedLossError(CurvscopeError, ValueError):
    """The loss cannot be normalised exactly, or lacks what a matrix needs of it."""


class UnsupportedLayerError(CurvscopeError, ValueError):
    """A method is not defined, or is known to be wrong, for a layer of the model."""


class NonDeterministicError(CurvscopeError, ValueError):
    """Model or data give different values when evaluated twice."""


class NonFiniteError(CurvscopeError, ValueError):
    """NaN or infinity in parameters, activations, loss or a matrix."""


class DataError(CurvscopeError, ValueError):
    """The data are empty, can be read only once, or have an unknown form."""


class TargetError(DataError):
    """Targets do not fit the outputs and the loss."""


class BatchNormError(CurvscopeError, ValueError):
    """``batchnorm="batch"`` cannot be combined with what else was asked."""


class MemoryLimitError(CurvscopeError, MemoryError):
    """A dense object would not fit into the memory that is available."""


class BackpackError(CurvscopeError, ValueError):
    """BackPACK refuses the model, or is known to be wrong for it."""


class UnknownProblemError(CurvscopeError, KeyError):
    """A problem name that is neither in the zoo nor importable."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class OutputError(CurvscopeError, OSError):
    """Output cannot be written to the given place."""


class RunError(CurvscopeError, ValueError):
    """A folder is no run, a damaged one, or that of another training."""


class ReportError(CurvscopeError, ValueError):
    """A folder holds no report, a damaged one, or one that only a newer version can read."""


class ApproximationError(CurvscopeError, RuntimeError):
    """The function of an approximation that the user registered raised an error of its own."""


class StopTraining(CurvscopeError):
    """An alarm ends the training: raised out of ``monitor.step`` where the user asked for it."""


class MissingPackageError(CurvscopeError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the closest known names, or ``""``."""
    written: dict[str, list[str]] = {}
    for each in known:
        written.setdefault(each.lower(), []).append(each)
    found = difflib.get_close_matches(str(name).lower(), list(written), n=count, cutoff=0.4)
    close = [each for lowered in found for each in written[lowered]][:count]
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def counted(count: int, noun: str) -> str:
    """``"1 block"``, ``"1,200 blocks"``, ``"2 entries"``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}{'es' * noun.endswith('ch') or 's'}"
    return f"{count:,} {noun if count == 1 else many}"


def check_count(argument: str, value: object, least: int = 1) -> int:
    """``value`` as an ``int`` (NumPy's too); ``OptionError`` unless it is one from ``least`` on."""
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not good or value < least:  # type: ignore[operator]
        raise OptionError(f"{argument}={value!r} must be an integer of at least {least}.")
    return int(value)  # type: ignore[call-overload]


def check_seed(seed: object) -> int:
    """``seed`` as an ``int`` of either sign; ``OptionError`` unless it is one."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise OptionError(f"seed={seed!r} must be an integer, such as 0.")
    return int(seed)


def check_option(argument: str, value: object, allowed: Iterable[object]) -> None:
    """Raise :class:`OptionError` unless ``value`` is one of ``allowed``."""
    choices = list(allowed)
    if value not in choices:
        hint = nearest(str(value), [c for c in choices if isinstance(c, str)])
        listing = ", ".join(map(repr, choices))
        raise OptionError(f"{argument}={value!r} is not one of {listing}.{hint}")
