"""``curvscope verify`` and ``curvscope problems``."""

import typer

from .options import (
    EXIT_FAILED,
    DataOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ProblemArgument,
    SamplesOption,
    SeedOption,
    ThreadsOption,
    helped,
    load,
    print_json,
    reported,
)


def add(app: typer.Typer) -> None:
    """Register both commands with ``app``."""
    app.command(
        **helped(
            verify,
            "curvscope verify digits-transformer",
            "curvscope verify mynet:make --samples 64 --json > verdict.json",
        ),
        short_help="Check a problem: what may be trusted on it.",
    )(verify)
    app.command(
        **helped(problems, "curvscope problems --json"),
        short_help="List the ready problems of the zoo.",
    )(problems)


def verify(
    problem: ProblemArgument,
    data: DataOption = None,
    samples: SamplesOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a problem against finite differences, double backward and enumeration.

    Exits with 1 if a check of the problem or of curvscope failed.
    """
    with reported(debug):
        from ..analysis import verify as run

        loaded = load(
            problem,
            data=data,
            samples=samples,
            seed=seed,
            dtype=dtype,
            device=device,
            threads=threads,
        )
        result = run(loaded, seed=seed, samples=samples)
    if json:
        print_json({**result.to_dict(), "trusted": result.trusted})
    else:
        typer.echo(str(result))
    if not result.trusted:
        raise typer.Exit(EXIT_FAILED)


def problems(json: JsonOption = False) -> None:
    """List the names that report and verify know, with what they are."""
    from ..zoo.registry import ENTRIES

    if json:
        print_json({name: entry.description for name, entry in ENTRIES.items()})
        return
    width = max(map(len, ENTRIES))
    for name, entry in ENTRIES.items():
        typer.echo(f"{name:<{width}}  {entry.description}")
