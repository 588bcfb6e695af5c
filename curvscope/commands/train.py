"""``curvscope train``."""

import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    DataOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    ProblemArgument,
    ThreadsOption,
    helped,
    print_json,
    reported,
    say,
)

_PROBE = 256  # samples
_GO_ON = "has everything up to the last epoch. Give the same command again."


def add(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command(
        **helped(
            train,
            "curvscope train digits-mlp --optimizer kbfgs --optimizer adam --epochs 5 "
            "--out runs/digits",
            "curvscope report runs/digits",
            "curvscope train digits-cnn --optimizer kfac --optimizer adafisher --lr 0.01 --lr 0.03 "
            "--lr 0.1 --seeds 3 --epochs 10 --out runs/cnn",
            "curvscope train digits-cnn --optimizer pytorch_optimizer:AdaBelief:lr=0.01 "
            "--epochs 5 --out runs/belief",
        ),
        short_help="Train a problem with several optimizers, watched, and keep everything.",
    )(train)


def train(
    problem: ProblemArgument,
    optimizer: Annotated[
        list[str],
        typer.Option(
            "--optimizer",
            metavar="NAME[:OPTION=VALUE,...]",
            help="kbfgs, kbfgs-l, kfac, adafisher, adafisherw, adahessian, mfac, one of torch's "
            "(adam, sgd, ...), or package.module:Class. May be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder of the trainings: new, or one to go on with.",
            show_default=False,
        ),
    ],
    epochs: Annotated[int, typer.Option(min=1, help="How many times all samples are seen.")] = 10,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Default: that of the zoo's recipe.", show_default=False),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            help="Learning rate of optimizers that have none of their own; several make a grid.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0 on.")] = 1,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="Let learning rates fall to 0 along half a cosine.")
    ] = False,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Measure curvature every so many steps (default: about 10 times per training).",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Most that the monitor may take, as a share of training time (default: no cap). "
            "The first and last measurements are taken in any case, and their time told apart.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples on which curvature is measured (default: 256, or all if fewer).",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a problem with every optimizer, learning rate and seed, each under a monitor.

    Interrupted trainings go on when the same command is given again, and finished ones are left
    alone. curvscope report FOLDER makes a page of them. Exits with 1 if a training failed;
    divergence is no failure but a result.
    """
    with reported(debug), _kept(out), _warnings_as_lines():
        import torch

        from ..training.probe import AtMost
        from ..training.trainings import train as run

        if threads is not None:
            torch.set_num_threads(threads)
        options: dict[str, Any] = {"probe": AtMost(_PROBE) if probe is None else probe}
        if every is not None:
            options["every"] = every
        found = run(
            problem,
            optimizer,
            epochs=epochs,
            batch_size=batch_size,
            lrs=lr or None,
            seeds=seeds,
            schedule="cosine" if cosine else "constant",
            budget=budget or None,
            monitor=options,
            out=out,
            data=data,
            device=device,
            command=shlex.join(["curvscope", *sys.argv[1:]]),
        )
    if json:
        print_json({"folder": str(found.folder), "runs": [_row(run) for run in found.runs]})
    else:
        typer.echo(str(found))
    if found.failed:
        raise typer.Exit(EXIT_FAILED)


def _row(run: Any) -> dict[str, Any]:
    return {**vars(run), "path": str(run.path)}


@contextlib.contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say what an interruption leaves: the trainings up to their last epochs."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted; {out} {_GO_ON}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except SystemExit as error:
        if isinstance(error.code, int) and error.code > 128:  # SIGTERM, SIGHUP
            say(f"{out} {_GO_ON}")
        raise


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings of monitors without file names and source lines."""
    from ..training.alarms import MonitorWarning

    before = warnings.showwarning

    def show(message: Any, category: Any, *rest: Any, **more: Any) -> None:
        if issubclass(category, MonitorWarning):
            say(f"           {message}")
        else:
            before(message, category, *rest, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", MonitorWarning)
        warnings.showwarning = show
        yield
