"""Everything about one Problem in one page: see :func:`make_report`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..display import Card, Shown, Table
from ..errors import OptionError, check_count
from ..problem import Problem
from .differences import Difference, diff
from .read import read_report
from .write import atomic_folder, check_output

__all__ = ["Difference", "ReportPaths", "check_output", "diff", "make_report", "read_report"]


@dataclass(frozen=True)
class ReportPaths(Shown):
    """Where a report lies: its folder, the page, the data, the tables and the figures."""

    folder: Path
    html: Path
    json: Path
    csv: Path
    figures: Path

    @classmethod
    def of(cls, folder: Path) -> ReportPaths:
        """The paths of a report in ``folder``."""
        return cls(
            folder,
            folder / "report.html",
            folder / "report.json",
            folder / "csv",
            folder / "figures",
        )

    def __fspath__(self) -> str:
        return str(self.html)

    def __repr__(self) -> str:
        return f"ReportPaths({str(_near(self.folder))!r}: {', '.join(n for _, n in self._files())})"

    def _files(self) -> list[tuple[str, str]]:
        files = [("the page", self.html), ("the data", self.json)]
        files += [("tables", self.csv), ("figures", self.figures)]
        return [(about, path.name) for about, path in files]

    def _card_(self) -> Card:
        folder = _near(self.folder)
        rows = [{"file": about, "path": str(folder / name)} for about, name in self._files()]
        return Card(
            title=f"Report in {folder}",
            tables=[Table(rows)],
            hints=[f"cs.explore({str(folder)!r})"],
        )


def _near(path: Path) -> Path:
    """``path`` from the working directory on, if it lies there."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):  # OSError: the working directory is gone
        return path


def make_report(
    problem: Problem,
    out: str | os.PathLike[str],
    *,
    hessian: bool | None = None,
    verification: bool | None = None,
    probes: int | None = None,
    damping: float | None = None,
    seed: int = 0,
    quick: bool = False,
    command: str = "",
    config: Mapping[str, Any] | None = None,
) -> ReportPaths:
    """Compute everything about a problem and write it as one page with its data into ``out``.

    The folder gets ``report.html`` (one file that needs no network), ``report.json`` (all numbers
    and settings; see ``docs/report-schema.md``), ``report.toml`` (the options, to make it again),
    ``csv/`` and ``figures/`` (SVG and PNG). It takes
    its name at the very end: after an error or an interruption there is what was there before.

    Parameters
    ----------
    problem
        What to look at; nothing of it is changed.
    out
        The folder. It may exist if it is empty or an earlier report and nothing else.
    hessian
        Whether to compute the Hessian beside the GGN: by far the larger part of the time for
        networks that are not piecewise linear. Default: it is, unless ``quick``.
    verification
        Whether to run :func:`curvscope.verify`. Default: unless ``quick``.
    probes
        Of the Hutchinson diagonals; at least two, since one has no standard error. Default: 16, or
        8 with ``quick``.
    damping
        Added to both matrices in metrics of steps and determinants. Default: the mean eigenvalue of
        the GGN, to two digits.
    seed
        Of everything random.
    quick
        At most 256 samples (drawn with ``seed``) and, unless asked for above, no Hessian, no
        verification and 8 probes, as ``curvscope report --quick`` does.
    command
        How the report was asked for, repeated in it.
    config
        All options of ``curvscope report`` by name, which are written as ``report.toml`` for
        ``curvscope report --config``. Default: those above.

    Cost: on two cores, 75 seconds for ``digits-cnn`` (1,898 parameters) and several minutes for
    ``digits-transformer``, whose Hessian takes a thousand passes over the data; ``quick`` leaves
    that out. The page lists the seconds of every computation.

    Returns the paths. Raises ``OutputError``, before computing anything, for a folder that cannot
    be written or holds something else, and the errors of the problem itself.

    Examples
    --------
    >>> import curvscope as cs
    >>> problem = cs.zoo.load("digits-cnn")  # doctest: +SKIP
    >>> paths = cs.make_report(problem, "reports/digits-cnn")  # doctest: +SKIP
    >>> paths.html  # doctest: +SKIP
    PosixPath('reports/digits-cnn/report.html')
    """
    if not isinstance(problem, Problem):
        raise OptionError(f"A Problem is needed, not {type(problem).__name__}.")
    if not isinstance(quick, bool):
        raise OptionError(f"quick={quick!r} must be True or False.")
    from .config import QUICK, QUICK_SAMPLES, check_keys

    usual = QUICK if quick else {"hessian": True, "verify": True, "probes": 16}
    hessian = bool(usual["hessian"] if hessian is None else hessian)
    verification = bool(usual["verify"] if verification is None else verification)
    probes = usual["probes"] if probes is None else probes
    probes = check_count("probes", probes, 2)
    if damping is not None and not (0 <= damping < float("inf")):
        raise OptionError(f"damping={damping!r} must be a finite number of at least 0.")
    from .collect import collect
    from .findings import Settings

    settings = Settings(hessian, verification, probes, damping, seed)
    if config is None:
        config = {
            "seed": seed,
            "hessian": hessian,
            "verify": verification,
            "probes": probes,
            "damping": damping,
            "quick": quick or None,
        }
    check_keys(config, "config=")
    if quick and problem.n_samples > QUICK_SAMPLES:
        problem = problem.subset(QUICK_SAMPLES, seed)
    with atomic_folder(out) as (draft, target):
        _write(collect(problem, settings), draft, command, config)
    return ReportPaths.of(target)


def _write(found: Any, folder: Path, command: str, config: Mapping[str, Any]) -> None:
    from ..progress import stage, track
    from .config import toml
    from .document import make_document, write_json, write_tables
    from .figure_plans import plans
    from .figures import make_pictures
    from .page import render

    (folder / "figures").mkdir()
    (folder / "csv").mkdir()
    drawn = make_pictures(found, folder / "figures")
    stage("Figures")
    pictures = list(track(drawn, "Figures", total=len(plans(found))))
    document = make_document(found, pictures, command)
    document["config"] = {name: value for name, value in config.items() if value is not None}
    (folder / "report.toml").write_text(toml(document["config"]), encoding="utf-8")
    (folder / "report.html").write_text(render(found, pictures, document), encoding="utf-8")
    write_tables(found, folder / "csv")
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    document["files"] = sorted([*files, "report.json"])
    write_json(document, folder / "report.json")
