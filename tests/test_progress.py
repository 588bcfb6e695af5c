"""Progress: silent unless asked for, bars in terminals and notebooks, text without widgets."""

from __future__ import annotations

import sys
import time

import nbclient
import nbformat
import pytest

from curvscope import progress
from curvscope.progress import show_progress, track

LOOP = """
import time
from curvscope.progress import show_progress, track
with show_progress():
    for _ in track(range(8), "looking"):
        time.sleep(0.2)
"""
WITHOUT = "import sys\nsys.modules['ipywidgets'] = None\n"


def run(code: str) -> list[dict[str, object]]:
    """The outputs of one cell in a kernel of its own."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return list(notebook.cells[0].outputs)


def slow(count: int = 6) -> list[int]:
    done = []
    for k in track(range(count), "counting"):
        time.sleep(0.25)
        done.append(k)
    return done


def test_nothing_is_written_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert slow() == list(range(6))
    with show_progress(), show_progress(False):
        assert slow() == list(range(6))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_once_a_second_has_passed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show_progress():
        assert slow() == list(range(6))
        assert list(track(range(3), "quick")) == [0, 1, 2]
    written = capsys.readouterr().err
    assert "counting" in written and "6" in written and "quick" not in written


def test_a_notebook_shows_a_widget() -> None:
    pytest.importorskip("ipywidgets")
    outputs = run(LOOP)
    kinds = {kind for output in outputs for kind in output.get("data", {})}  # type: ignore[attr-defined]
    assert "application/vnd.jupyter.widget-view+json" in kinds, outputs
    assert "pip install" not in str(outputs)


def test_a_notebook_without_widgets_shows_text_and_says_what_to_install() -> None:
    outputs = run(WITHOUT + LOOP + LOOP)
    text = "".join(str(output.get("text", "")) for output in outputs)
    assert "looking" in text and "8" in text
    assert text.count("pip install ipywidgets") == 1
    assert "Warning" not in text


def test_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not progress._in_notebook()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert not progress._installed("ipywidgets") and progress._installed("json")
