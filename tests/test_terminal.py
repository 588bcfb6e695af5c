"""Terminals that cannot do much: without colours, without cursor, with few letters; and none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="needs pseudo-terminals, which Windows has not")

ROOT = Path(__file__).parent.parent
SOURCE = """
import torch
from torch import nn
import curvscope as cs

def make():
    torch.manual_seed(0)
    data = torch.randn(8, 3), torch.arange(8) % 2
    return cs.Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), data, name="λ·net")
"""


def on_terminal(*arguments: str, where: Path, **variables: str) -> tuple[int, str]:
    """Exit code and output of the command on a pseudo-terminal."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "LANG")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "curvscope", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=where,
        env=environment,
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    return process.wait(60), found.decode("utf-8", "replace")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "terminal_net.py").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def test_no_colours_where_none_are_wanted(here: Path) -> None:
    code, text = on_terminal("diff", "a", where=here, TERM="xterm-256color", NO_COLOR="1")
    assert code == 2 and "Missing argument" in text
    assert "\x1b[3" not in text and "\x1b[9" not in text  # foreground colours


def test_a_terminal_without_cursor_gets_plain_lines(here: Path) -> None:
    arguments = ("verify", "terminal_net:make")
    code, text = on_terminal(*arguments, where=here, TERM="dumb")
    assert code == 0, text
    assert "\x1b" not in text and "\r" not in text.replace("\r\n", "\n")
    assert "s] Loading terminal_net:make" in text and "can be trusted" in text


def test_letters_that_the_terminal_lacks_are_replaced(here: Path) -> None:
    arguments = ("verify", "terminal_net:make", "--samples", "6")
    code, text = on_terminal(*arguments, where=here, TERM="xterm", PYTHONIOENCODING="latin-1")
    assert code == 0 and "Traceback" not in text
    assert "?\N{REPLACEMENT CHARACTER}net" in text  # the dot is not UTF-8 here, as asked for
    code, text = on_terminal("report", "ärger", where=here, PYTHONIOENCODING="ascii")
    assert code == 2 and "Traceback" not in text
