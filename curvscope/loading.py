"""From the PROBLEM of a command line to a Problem: a zoo name or ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import zoo
from .errors import CurvscopeError, OptionError, UnknownProblemError, nearest
from .problem import Problem
from .problem.state import random_state

_FORM = "PROBLEM is a name of the zoo (curvscope problems) or package.module:function."


def load_problem(
    name: str,
    *,
    data: str | Path | None = None,
    samples: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> Problem:
    """The problem called ``name``.

    A function gets those of ``data``, ``samples``, ``seed``, ``dtype`` and ``device`` that were
    given and that it has as arguments. What it does not take is done to its result (``samples`` by
    :meth:`Problem.subset`, ``dtype`` and ``device`` by computing there), except for ``data``.
    The working directory is importable meanwhile, and with a ``seed`` the global random states are
    set from it for the function and its module, so that the same call gives the same problem.

    Raises ``UnknownProblemError`` (with the nearest names) for what cannot be found or imported,
    ``OptionError`` for a function that fails, returns something else, or takes no ``data``, and for
    more ``samples`` than there are.
    """
    options: dict[str, Any] = {
        "data": data,
        "samples": samples,
        "seed": seed,
        "dtype": dtype,
        "device": device,
    }
    given = {key: value for key, value in options.items() if value is not None}
    if ":" in name:
        with _working_directory(), _seeded(seed):
            problem, rest = _call(name, _function(name), given)
    else:
        rest = {"device": given.pop("device")} if "device" in given else {}
        _known(name)
        problem = zoo.load(name, **given)
    return _finish(problem, rest, seed or 0)


def _known(name: str) -> None:
    """Raise ``UnknownProblemError`` for a name that is not in the zoo."""
    if name in zoo.names():
        return
    if "/" in name or "\\" in name:
        there = "holds no runs" if Path(name).is_dir() else "does not exist"
        raise UnknownProblemError(
            f"The folder {name!r} {there}: a report takes one that curvscope train or a Monitor "
            f"has written. {_FORM}"
        )
    hint = nearest(name, zoo.names())
    if "." in name and not hint:
        hint = f" For a function of your own write {name.replace('.', ':', 1)!r} with a colon."
    raise UnknownProblemError(
        f"There is no problem {name!r}.{hint} The zoo has {', '.join(zoo.names())}. {_FORM}"
    )


def _function(name: str) -> Any:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UnknownProblemError(f"{name!r} names no function. {_FORM}")
    file = Path(module_name)
    if file.suffix == ".py" or len(file.parts) > 1:
        raise UnknownProblemError(
            f"{module_name!r} is a file, not a module: write {file.stem}:{path}, in the directory "
            f"of {file.stem}.py or with that in PYTHONPATH."
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = error.name is not None and (module_name + ".").startswith(error.name + ".")
        if own:
            text = f"There is no module {error.name!r} (looked in {Path.cwd()} and sys.path)."
        else:
            text = f"Importing {module_name!r} failed: it needs {error.name!r}; install that."
        raise UnknownProblemError(f"{text} {_FORM}") from error
    except Exception as error:
        raise UnknownProblemError(
            f"Importing {module_name!r} failed with {type(error).__name__}: {error}. Run with "
            "--debug to see where."
        ) from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [n for n, value in vars(found).items() if callable(value)]
            raise UnknownProblemError(
                f"{module_name!r} has no function {path!r}.{nearest(part, names)}"
            )
        found = getattr(found, part)
    return found


def _call(name: str, function: Any, given: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
    """The function's problem, and the options that it did not take."""
    if isinstance(function, Problem):
        return function, _without_data(name, given)
    if not callable(function):
        raise OptionError(f"{name!r} is {_a(function)}, not a function that returns a Problem.")
    accepted = _arguments(function)
    mine = {key: value for key, value in given.items() if accepted is None or key in accepted}
    rest = _without_data(name, {key: v for key, v in given.items() if key not in mine})
    try:
        problem = function(**mine)
    except CurvscopeError:
        raise
    except Exception as error:
        raise OptionError(
            f"{name} raised {type(error).__name__}: {error}. Run with --debug to see where."
        ) from error
    if not isinstance(problem, Problem):
        raise OptionError(
            f"{name} returned {_a(problem)}, not a curvscope.Problem. Let it end in "
            "return curvscope.Problem(model, loss, data)."
        )
    return problem, rest


def _a(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"


def _arguments(function: Any) -> set[str] | None:
    """Names of the keyword arguments; ``None`` if it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _without_data(name: str, rest: dict[str, Any]) -> dict[str, Any]:
    if "data" in rest:
        raise OptionError(f"{name} takes no data= argument, so --data cannot be passed to it.")
    return {key: value for key, value in rest.items() if key != "seed"}


def _finish(problem: Problem, rest: dict[str, Any], seed: int) -> Problem:
    changes = {key: rest[key] for key in ("dtype", "device") if key in rest}
    if changes:
        with problem.session():
            batches = list(problem.batches())
        problem = problem.with_data(batches, **changes)
    if "samples" not in rest:
        return problem
    wanted, there = rest["samples"], problem.n_samples
    if wanted > there:
        raise OptionError(
            f"samples={wanted}: {problem.name} has {there:,} samples; take at most {there:,}, or "
            "leave samples (--samples) out for all of them."
        )
    return problem if wanted == there else problem.subset(wanted, seed)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Global random states set from ``seed``, and put back afterwards."""
    with random_state():
        if seed is not None:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield


@contextmanager
def _working_directory() -> Iterator[None]:
    """The working directory first on ``sys.path``, as for ``python -m``."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
