"""What is loaded when: importing the package is quick, and heavy packages wait until needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    *("matplotlib", "pandas", "sklearn", "IPython", "ipywidgets", "backpack", "typer", "jinja2"),
    *("rich", "tqdm", "safetensors", "transformers", "lightning", "tensorboard", "wandb"),
    *("torchvision", "scipy.stats", "scipy.sparse.linalg"),
)


def loaded(code: str) -> tuple[set[str], int]:
    """Heavy packages that ``code`` loads beside torch's own, and how many modules it loads."""
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"{code}\n"
        "new = set(sys.modules) - before\n"
        f"print(json.dumps([sorted(new & set({HEAVY!r})), len(new)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    names, count = json.loads(done.stdout)
    return set(names), count


def test_importing_curvscope_loads_next_to_nothing() -> None:
    """Public names are resolved on first use, so that the import costs milliseconds."""
    heavy, count = loaded("import curvscope")
    assert not heavy and count < 5


@pytest.mark.parametrize(
    "code",
    [
        "from curvscope import Problem, hessian, kfac, compare, spectrum, verify, trace, eigsh\n"
        "from curvscope import optim, training, zoo, plot, Monitor, Run, make_report, explore\n"
        "optim.KBFGS, training.trajectories, zoo.load, plot.plot",
        "import curvscope.cli",
    ],
    ids=["everything", "command line"],
)
def test_using_a_part_loads_no_heavy_package(code: str) -> None:
    heavy, count = loaded(code)
    assert not heavy
    assert count < 400  # what is loaded is the package itself and a little of the standard library


def test_every_public_name_is_there_and_listed() -> None:
    code = (
        "import curvscope as cs\n"
        "assert set(dir(cs)) == set(cs.__all__)\n"
        "missing = [name for name in cs.__all__ if not hasattr(cs, name)]\n"
        "assert not missing, missing"
    )
    heavy, _ = loaded(code)
    assert heavy <= {"backpack"}  # cs.backpack is a name, too


def test_showing_an_operator_or_a_result_loads_no_pandas() -> None:
    code = (
        "import curvscope as cs\n"
        "matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])\n"
        "found = cs.compare(matrix, {'a': torch.eye(2)})\n"
        "assert '<table' in found._repr_html_() and repr(found)\n"
        "cs.operators.DenseOperator(matrix)._repr_html_()"
    )
    assert loaded(code)[0] == set()
