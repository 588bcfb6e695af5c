"""What commands have in common: options, loading the problem, and how errors are said."""

# No postponed annotations in this folder: typer reads those of the commands.

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

EXIT_FAILED = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def helped(function: Callable[..., None], *examples: str) -> dict[str, Any]:
    """The help of a command: its docstring as flowing text, and examples a line each."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return {
        "help": "\n\n".join(" ".join(text.split()) for text in paragraphs),
        "epilog": "\n\n".join([f"Example{'s' if len(examples) > 1 else ''}:", *examples]),
    }


def _names(incomplete: str) -> list[str]:
    from .. import zoo

    return [name for name in zoo.names() if name.startswith(incomplete)]


_PROBLEM = {
    "metavar": "PROBLEM",
    "help": "A name of the zoo (see curvscope problems), or package.module:function for a "
    "function that returns a curvscope.Problem.",
    "autocompletion": _names,
    "show_default": False,
}
ProblemArgument = Annotated[str, typer.Argument(**_PROBLEM)]
ProblemOrNone = Annotated[str | None, typer.Argument(**_PROBLEM)]
DataOption = Annotated[
    Path | None,
    typer.Option(help="Folder with the data, for problems that need one.", show_default=False),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many samples to take (default: the problem's).", show_default=False
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Of everything random.")]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="float32|float64", help="Compute in it.", show_default=False),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Compute there: cpu, cuda, ...", show_default=False)
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with.", show_default=False)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON to standard output instead of sentences.")
]
OpenOption = Annotated[bool, typer.Option("--open", help="Show the page in a browser.")]


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Errors as one message and an exit code; progress as bars or, in a log, as lines."""
    from ..errors import CurvscopeError
    from ..progress import show_progress, show_stages

    try:
        with show_progress() if _draws_bars() else show_stages():
            yield
    except CurvscopeError as error:
        if debug:
            raise
        say(f"Error: {error}")
        raise typer.Exit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        say("Interrupted; nothing was written.")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def show_page(page: Path) -> None:
    """Open a page in the person's browser; a machine without one is told where the page lies."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        say(f"No browser could be opened here; open {page} in one.")


def _draws_bars() -> bool:
    """Whether a person watches, on a terminal that can draw a line again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def load(
    problem: str,
    *,
    data: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Any:
    """The problem that the arguments of a command mean.

    Raises ``OptionError`` for a data type or device that cannot be used, and what
    :func:`curvscope.loading.load_problem` raises.
    """
    import torch

    from ..errors import OptionError, check_option
    from ..loading import load_problem
    from ..progress import stage

    kinds = {"float32": torch.float32, "float64": torch.float64}
    if dtype is not None:
        check_option("--dtype", dtype, kinds)
    if device is not None:
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            raise OptionError(f"--device {device} cannot be used here: {first}") from error
    stage(f"Loading {problem}")
    if threads is not None:
        torch.set_num_threads(threads)
    return load_problem(
        problem,
        data=data,
        samples=samples,
        seed=seed,
        dtype=kinds[dtype] if dtype else None,
        device=device,
    )


def print_json(value: Any) -> None:
    """``value`` as indented JSON; numbers that JSON does not have become ``null``."""
    from ..analysis.result import plain

    typer.echo(json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """A line for the person at the terminal, beside what a pipe gets."""
    print(text, file=sys.stderr, flush=True)
