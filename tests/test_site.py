"""The documentation builds without a warning, and what it builds needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.browser import browser, find

pytest.importorskip("mkdocs")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; the build itself is the test that it has no warning."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Loads(HTMLParser):
    """What a page makes a browser load (links that a reader follows are no such thing)."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source", "video", "audio", "embed")
        if loads and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(str(given.get("href")))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 5
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.loaded, page
        for target in loads.loaded:
            assert not re.match(r"(\w+:)?//", target), f"{page.name} loads {target}"
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        for target in re.findall(r"url\(\s*['\"]?([^'\")]+)", text):
            assert not re.match(r"(https?:)?//", target), f"{style.name} loads {target}"


def test_formulas_and_roles_are_drawn(site: Path) -> None:
    """No TeX, and no role of a docstring, is left for the reader to decode."""
    conventions = (site / "conventions.html").read_text(encoding="utf-8")
    assert "<math" in conventions and r"\frac" not in re.sub(r'"[^"]*"', "", conventions)
    for page in sorted(site.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text, page
        assert not re.search(r":(func|class|meth|mod):", text), page


def test_every_notebook_is_a_page(site: Path) -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = site / "notebooks" / f"{path.stem}.html"
        text = page.read_text(encoding="utf-8")
        assert f'href="{path.name}"' in text, "a link to the notebook itself"
        assert 'id="output-' not in text, "outputs are in place"
        for picture in re.findall(rf'src="({path.stem}-\d+\.\w+)"', text):
            assert (page.parent / picture).stat().st_size > 0


@pytest.mark.skipif(find() is None, reason="no Chromium or Chrome on this machine")
def test_pages_open_without_errors_and_fit_a_phone(site: Path) -> None:
    """In a real browser, from the disk, as somebody without a server and a network would."""
    program = find()
    assert program is not None
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    with browser(program) as running:
        tab = running.tab()
        tab.size(390, 800, phone=True)
        for page in pages:
            if page.parent.name == "reference" and page.stem not in ("problem", "command-line"):
                continue  # all alike, and slow to lay out
            tab.open(page)
            assert tab.errors == [], page
            assert tab.evaluate(wide) <= 1, f"{page} is wider than a phone"
            assert not [url for url in tab.requests if url.startswith("http")], page


@pytest.mark.skipif(find() is None, reason="no Chromium or Chrome on this machine")
def test_search_works_from_disk(site: Path) -> None:
    program = find()
    assert program is not None
    with browser(program) as running:
        tab = running.tab()
        tab.size(1200, 800)
        tab.open(site / "explanations" / "dropped.html")
        tab.click("label[for=__search].md-search__icon, .md-search__input")
        tab.wait("document.activeElement.matches('.md-search__input')", 60)
        for letter in "Hutchinson":  # the page listens to keys
            tab.key(letter)
        tab.wait("document.querySelectorAll('.md-search-result__item').length > 3", 60)
        assert tab.errors == []
