"""``curvscope diff``."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    EXIT_FAILED,
    DebugOption,
    JsonOption,
    OpenOption,
    helped,
    print_json,
    reported,
    show_page,
)


def add(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command(
        **helped(
            diff,
            "curvscope diff reports/before reports/after --out difference.html",
            "curvscope diff runs/a/report runs/b/report",
            "curvscope diff a b --tolerance 0.05 --json",
        ),
        short_help="Put two reports side by side, number by number.",
    )(diff)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a report, or its report.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other report.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="HTML file to write, with both reports side by side (default: none).",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0.0, help="Relative change up to which two numbers are the same."),
    ] = 1e-3,
    browse: OpenOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two reports, of problems or of trainings: numbers, settings, findings, figures.

    Prints what differs; --out writes the page that shows it. Exits with 0 if the reports say the
    same, with 1 if they differ. Times, machines and versions never make a difference.
    """
    with reported(debug):
        from ..errors import OptionError
        from ..report import diff as compare

        if browse and out is None:
            raise OptionError("--open shows the page that --out FILE.html writes; give that, too.")

        found = compare(a, b, out=out, tolerance=tolerance)
    if json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))
        if out is not None:
            typer.echo(str(out))
    if browse and out is not None:
        show_page(out)
    if not found.same:
        raise typer.Exit(EXIT_FAILED)
