"""``curvscope report``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OpenOption,
    ProblemOrNone,
    SamplesOption,
    SeedOption,
    ThreadsOption,
    helped,
    load,
    print_json,
    reported,
    show_page,
)


def add(app: typer.Typer) -> None:
    """Register the command with ``app``."""
    app.command(
        **helped(
            report,
            "curvscope report digits-cnn --out reports/digits-cnn --open",
            "curvscope report mynet:make -o reports/mynet --quick",
            "curvscope report --config reports/mynet/report.toml --hessian",
            "curvscope report runs/digits",
        ),
        short_help="Write a page about a problem: exact curvature, approximations, errors.",
    )(report)


def report(
    context: typer.Context,
    problem: ProblemOrNone = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write; an earlier report there is replaced, anything else never.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            help="TOML file with any of these options, also problem and out; what the command line "
            "says comes first. Every report holds its own as report.toml.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
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
            help="Added to the matrices in metrics of steps (default: the GGN's mean eigenvalue).",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            help="At most 256 samples and, unless asked for, no Hessian, no verification, 8 probes."
        ),
    ] = False,
    browse: OpenOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compute a problem's curvature and write report.html, report.json, tables and figures.

    The page is one file and opens without network. In place of PROBLEM a folder that curvscope
    train or a Monitor has written gives the page of those trainings, in FOLDER/report unless --out
    says where; --quick leaves out the loss surface.
    """
    with reported(debug):
        from ..report.config import OPTIONS, QUICK, read_config

        file = read_config(config) if config is not None else {}
        asked = {name for name in OPTIONS if _by_hand(context, name)}
        values = {
            name: file[name] if name in file and name not in asked else context.params[name]
            for name in OPTIONS
        }
        if values["quick"]:
            values.update({k: v for k, v in QUICK.items() if k not in asked and k not in file})
        if _of_runs(values):
            paths = _report_runs(values)
        else:
            paths = _report_problem(values)
    if json:
        print_json({name: str(getattr(paths, name)) for name in ("folder", "html", "json")})
    else:
        typer.echo(str(paths.html))
    if browse:
        show_page(paths.html)


def _report_problem(values: dict[str, Any]) -> Any:
    """The page of a problem."""
    from ..report import check_output, make_report

    problem, out = _needed(values)
    check_output(out)
    names = ("data", "samples", "seed", "dtype", "device", "threads")
    loaded = load(problem, **{name: values[name] for name in names})
    return make_report(
        loaded,
        out,
        hessian=values["hessian"],
        verification=values["verify"],
        probes=values["probes"],
        damping=values["damping"],
        seed=values["seed"],
        quick=values["quick"],
        command=_command(),
        config={k: str(v) if isinstance(v, Path) else v for k, v in values.items()},
    )


def _of_runs(values: dict[str, Any]) -> bool:
    """Whether what stands for the problem is a folder of trainings."""
    from ..report.runs import holds_runs
    from ..zoo import names

    given = values["problem"]
    return bool(given) and given not in names() and holds_runs(given)


def _report_runs(values: dict[str, Any]) -> Any:
    """The page of trainings; into their own folder unless told otherwise."""
    from ..report import check_output
    from ..report.runs import make_runs_report

    folder = Path(values["problem"])
    out = Path(values["out"]) if values["out"] else folder / "report"
    check_output(out)
    return make_runs_report(folder, out, surface=not values["quick"], command=_command())


def _command() -> str:
    return shlex.join(["curvscope", *sys.argv[1:]])


def _by_hand(context: typer.Context, name: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def _needed(values: dict[str, Any]) -> tuple[str, Path]:
    """The problem and the folder, without which there is nothing to do."""
    from ..errors import OptionError

    if not values["problem"]:
        raise OptionError(
            "Which PROBLEM? Give a name of the zoo (curvscope problems) or "
            "package.module:function, as in: curvscope report digits-cnn --out reports/digits-cnn"
        )
    if not values["out"]:
        raise OptionError(
            'Where to? Give the folder to write: --out FOLDER, or out = "FOLDER" in the file of '
            "--config."
        )
    return str(values["problem"]), Path(values["out"])
