"""Execute the notebooks in place:  python notebooks/execute.py [NOTEBOOK ...]   (all by default)

Each runs in an empty folder of its own, on one thread, in a kernel of the interpreter that runs
this script. What is written holds code, prose and outputs, and nothing of the machine: no paths,
no times of execution. Needs nbclient, nbformat and ipykernel, which the extras ``dev`` and
``notebook`` bring.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
NOTEBOOKS = sorted(HERE.glob("[0-9]*.ipynb"))
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


@contextmanager
def environment(folder: Path) -> Any:
    """What the kernel sees: this checkout, one thread, none of the user's own IPython settings."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with mock.patch.dict(os.environ, changed):
        yield


def execute(path: Path, *, timeout: float = 300) -> Any:
    """The notebook with fresh outputs; an error in a cell raises ``CellExecutionError``."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        with environment(folder):
            NotebookClient(
                notebook,
                timeout=timeout,
                kernel_name="python3",
                record_timing=False,
                resources={"metadata": {"path": str(work)}},
            ).execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """The notebook without what differs between machines and executions."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
    return notebook


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all, and write them back."""
    import nbformat

    for path in [Path(name).resolve() for name in names] or NOTEBOOKS:
        start = time.perf_counter()
        notebook = execute(path)
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
