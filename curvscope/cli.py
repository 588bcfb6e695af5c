"""The command line: ``curvscope report | verify | problems``."""

# No postponed annotations here: typer reads those of the nested commands, whose names live in a
# function because typer is imported only when the command line is used.

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EXAMPLES = """
Examples:

  curvscope report digits-cnn --out reports/digits-cnn

  curvscope report mypackage.problems:make --out report --samples 500

  curvscope report mnist-autoencoder --data ~/data/mnist --no-hessian --out report

  curvscope verify digits-transformer
"""


def main() -> None:
    """Run the command line; exits with 0, 2 for an error with a message, 130 for Ctrl-C.

    When told to end (SIGTERM, SIGHUP), it removes what it has begun to write, and exits with 128
    and the signal's number.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _end)
    try:
        make_app()()
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)


def _end(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    _say(f"Ended by {signal.Signals(number).name}; nothing was written.")
    sys.exit(128 + number)


def make_app() -> Any:
    """The typer application."""
    import typer

    from .errors import CurvscopeError

    app = typer.Typer(
        name="curvscope",
        help="See the curvature of a neural network's loss, and how wrong approximations of it "
        "are." + "\n" + _EXAMPLES,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def names(incomplete: str) -> list[str]:
        from . import zoo

        return [name for name in zoo.names() if name.startswith(incomplete)]

    problem_argument = Annotated[
        str,
        typer.Argument(
            metavar="PROBLEM",
            help="A name of the zoo (see curvscope problems), or package.module:function for a "
            "function that returns a curvscope.Problem.",
            autocompletion=names,
            show_default=False,
        ),
    ]
    data_option = Annotated[
        Path | None,
        typer.Option(help="Folder with the data, for problems that need one.", show_default=False),
    ]
    samples_option = Annotated[
        int | None,
        typer.Option(
            min=1, help="How many samples to take (default: the problem's).", show_default=False
        ),
    ]
    seed_option = Annotated[int, typer.Option(min=0, help="Of everything random.")]
    dtype_option = Annotated[
        str | None,
        typer.Option(metavar="float32|float64", help="Compute in it.", show_default=False),
    ]
    device_option = Annotated[
        str | None, typer.Option(help="Compute there: cpu, cuda, ...", show_default=False)
    ]
    threads_option = Annotated[
        int | None,
        typer.Option(min=1, help="Threads to compute with.", show_default=False),
    ]
    debug_option = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")]

    @contextlib.contextmanager
    def reported(debug: bool) -> Iterator[None]:
        """Errors as one message and an exit code; progress as bars or, in a log, as lines."""
        from .progress import show_progress, show_stages

        try:
            with show_progress() if sys.stderr.isatty() else show_stages():
                yield
        except CurvscopeError as error:
            if debug:
                raise
            _say(f"Error: {error}")
            raise typer.Exit(EXIT_ERROR) from None
        except KeyboardInterrupt:
            _say("Interrupted; nothing was written.")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    def version(asked: bool) -> None:
        if asked:
            from . import __version__

            typer.echo(f"curvscope {__version__}")
            raise typer.Exit

    @app.callback()
    def common(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=version, is_eager=True, help="Show the version and exit."
            ),
        ] = False,
    ) -> None:
        pass

    @app.command(
        epilog="Example: curvscope report digits-cnn --out reports/digits-cnn",
        short_help="Write a page about a problem: exact curvature, approximations, errors.",
    )
    def report(
        problem: problem_argument,
        out: Annotated[
            Path,
            typer.Option(
                "--out",
                "-o",
                help="Folder to write; an earlier report there is replaced, anything else never.",
                show_default=False,
            ),
        ],
        data: data_option = None,
        samples: samples_option = None,
        seed: seed_option = 0,
        dtype: dtype_option = None,
        device: device_option = None,
        threads: threads_option = None,
        hessian: Annotated[
            bool, typer.Option(help="Whether to compute the Hessian beside the GGN.")
        ] = True,
        verify: Annotated[bool, typer.Option(help="Whether to check the problem as well.")] = True,
        probes: Annotated[
            int, typer.Option(min=2, help="Random probes of the Hutchinson diagonals.")
        ] = 16,
        damping: Annotated[
            float | None,
            typer.Option(
                min=0.0,
                help="Added to the matrices in metrics of steps (default: the GGN's mean "
                "eigenvalue).",
                show_default=False,
            ),
        ] = None,
        quick: Annotated[
            bool,
            typer.Option(
                "--quick", help="At most 256 samples, no Hessian, no verification, 8 probes."
            ),
        ] = False,
        debug: debug_option = False,
    ) -> None:
        """Compute a problem's curvature and write report.html, report.json, tables and figures.

        The page is one file and opens without network.
        """
        with reported(debug):
            from .report import check_output, make_report

            if quick:
                hessian, verify, probes = False, False, min(probes, 8)
            check_output(out)
            loaded = _load(problem, data, samples, seed, dtype, device, threads)
            if quick and loaded.n_samples > 256:
                loaded = loaded.subset(256, seed)
            paths = make_report(
                loaded,
                out,
                hessian=hessian,
                verification=verify,
                probes=probes,
                damping=damping,
                seed=seed,
                command=shlex.join(["curvscope", *sys.argv[1:]]),
            )
        typer.echo(str(paths.html))

    @app.command(
        epilog="Example: curvscope verify digits-transformer",
        short_help="Check a problem: what may be trusted on it.",
    )
    def verify(
        problem: problem_argument,
        data: data_option = None,
        samples: samples_option = None,
        seed: seed_option = 0,
        dtype: dtype_option = None,
        device: device_option = None,
        threads: threads_option = None,
        debug: debug_option = False,
    ) -> None:
        """Check a problem against finite differences, double backward and enumeration.

        Exits with 1 if a check of the problem or of curvscope failed.
        """
        with reported(debug):
            from .analysis import verify as run

            loaded = _load(problem, data, samples, seed, dtype, device, threads)
            result = run(loaded, seed=seed)
        typer.echo(str(result))
        if not result.trusted:
            raise typer.Exit(1)

    @app.command(short_help="List the ready problems of the zoo.")
    def problems() -> None:
        """List the names that report and verify know, with what they are."""
        from .zoo.registry import ENTRIES

        width = max(map(len, ENTRIES))
        for name, entry in ENTRIES.items():
            typer.echo(f"{name:<{width}}  {entry.description}")

    return app


def _load(
    problem: str,
    data: Path | None,
    samples: int | None,
    seed: int,
    dtype: str | None,
    device: str | None,
    threads: int | None,
) -> Any:
    """The problem that the arguments of a command mean."""
    import torch

    from .errors import OptionError, check_option
    from .loading import load_problem
    from .progress import stage

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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
