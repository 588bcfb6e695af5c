"""The command line: ``curvscope report | diff | train | verify | problems | doctor``.

The commands are in :mod:`curvscope.commands`, one file each.
"""

from __future__ import annotations

import io
import signal
import sys
from typing import Any

EXIT_INTERRUPTED = 130

_EXAMPLES = """
Examples:

  curvscope report digits-cnn --out reports/digits-cnn

  curvscope report mypackage.problems:make --out report --samples 500

  curvscope report mnist-autoencoder --data ~/data/mnist --no-hessian --out report

  curvscope report --config report/report.toml

  curvscope verify digits-transformer

  curvscope train digits-mlp --optimizer kbfgs --optimizer adam --epochs 5 --out runs/digits

  curvscope report runs/digits

  curvscope diff reports/before reports/after --out difference.html

  curvscope doctor

Exit codes: 0 done, 1 a check failed or reports differ, 2 an error with a message, 130 interrupted.
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know every sign
            stream.reconfigure(errors="replace")
    try:
        make_app()()
    except KeyboardInterrupt:
        _say("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)


def _end(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    _say(f"Ended by {signal.Signals(number).name}.")
    sys.exit(128 + number)


def make_app() -> Any:
    """The typer application."""
    import typer

    from .commands import diff, doctor, report, train, verify

    app = typer.Typer(
        name="curvscope",
        help="See the curvature of a neural network's loss, and how wrong approximations of it "
        "are." + "\n" + _EXAMPLES,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def version(asked: bool) -> None:
        if asked:
            from . import __version__

            typer.echo(f"curvscope {__version__}")
            raise typer.Exit

    def common(
        version: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Show the version and exit."
        ),
    ) -> None:
        pass

    app.callback()(common)
    for module in (report, diff, train, verify, doctor):
        module.add(app)
    return app


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
