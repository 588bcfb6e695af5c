"""``curvscope doctor``."""

import typer

from .options import EXIT_FAILED, DebugOption, JsonOption, helped, print_json, reported


def add(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command(
        **helped(doctor, "curvscope doctor", "curvscope doctor --json > machine.json"),
        short_help="Look at versions, devices, memory and optional packages.",
    )(doctor)


def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say what this machine offers, what is missing, and whether curvscope computes correctly here.

    Exits with 1 if something has to be mended.
    """
    with reported(debug):
        from ..doctor import as_dict, examine

        found = examine()
    if json:
        print_json(as_dict(found))
    else:
        typer.echo(str(found))
    if not found.healthy:
        raise typer.Exit(EXIT_FAILED)
