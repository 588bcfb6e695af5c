"""Every Python block of README and docs runs, each file from top to bottom as a reader would."""

from __future__ import annotations

import functools
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import curvscope as cs
from curvscope.analysis.metrics import METRICS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes the report of a small problem, once, for pages that read that of digits-cnn."""

    @functools.cache
    def make() -> Path:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        data = torch.randn(12, 4), torch.randint(2, (12,))
        out = tmp_path_factory.mktemp("reports") / "digits-cnn"
        cs.make_report(cs.Problem(model, torch.nn.CrossEntropyLoss(), data), out)
        return out

    return make


@pytest.fixture
def as_before() -> Iterator[None]:
    """Metrics that a page registers and types that it sets are its own."""
    kept, dtype = dict(METRICS), torch.get_default_dtype()
    yield
    METRICS.clear()
    METRICS.update(kept)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
@pytest.mark.usefixtures("as_before")
def test_blocks_run(
    page: Path,
    tmp_path: Path,
    report: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    if "reports/digits-cnn/report.json" in text and page.name != "README.md":
        shutil.copytree(report(), tmp_path / "reports" / "digits-cnn")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        code = compile("\n" * line + match[1], str(page), "exec")
        exec(code, module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`(benchmarks/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
