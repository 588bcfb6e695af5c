"""The page in a real browser: no errors, sorting, filtering, switching, colours, phone, paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .browser import Browser, Tab, browser, find

pytestmark = pytest.mark.skipif(
    find() is None,
    reason="needs Chromium or Chrome on the PATH, or its path in CURVSCOPE_BROWSER",
)


@pytest.fixture(scope="module")
def html(small_report: Path) -> Path:
    return small_report / "report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = find()
    assert program is not None
    with browser(program) as running:
        yield running


@pytest.fixture
def tab(chromium: Browser, html: Path) -> Tab:
    made = chromium.tab()
    made.size(1300, 900)
    made.media(scheme="light")
    made.open(html)
    return made


ERRORS = "document.querySelector('#errors table')"


def rows(tab: Tab) -> list[str]:
    """Names of the rows of the table of errors that are shown, in their order."""
    return tab.evaluate(
        f"[...{ERRORS}.tBodies[0].rows].filter(r => r.offsetParent !== null)"
        ".map(r => r.cells[0].firstChild.textContent)"
    )


def near(tab: Tab, selector: str) -> None:
    """Scroll there and wait until the page has noticed."""
    tab.centre(selector)
    tab.evaluate("new Promise(done => setTimeout(done, 200))")


def tip(tab: Tab) -> str:
    return tab.evaluate("(t => t.hidden ? '' : t.textContent)(document.getElementById('tip'))")


def test_opens_without_errors_and_asks_for_nothing(tab: Tab, html: Path) -> None:
    assert tab.errors == []
    own = html.resolve().as_uri()
    assert {url for url in tab.requests if not url.startswith("data:")} == {own}
    for place in range(0, int(tab.evaluate("document.body.scrollHeight")), 800):
        tab.evaluate(f"scrollTo({{top: {place}, behavior: 'instant'}})")
    near(tab, "footer")
    assert tab.errors == []


def test_tables_sort_by_mouse_and_keyboard(tab: Tab) -> None:
    first = rows(tab)
    tab.click("#errors table thead th:nth-child(2) button")
    values = tab.evaluate(
        f"[...{ERRORS}.tBodies[0].rows].map(r => r.cells[1].dataset.sort ?? null)"
    )
    numbers = [float(v) for v in values if v is not None]
    assert numbers == sorted(numbers) and len(set(numbers)) > 3
    assert None not in values[: len(numbers)]  # what has no value comes last
    head = f"{ERRORS}.tHead.rows[0].cells"
    assert tab.evaluate(f"{head}[1].ariaSort") == "ascending"
    tab.key("Enter")
    assert tab.evaluate(f"{head}[1].ariaSort") == "descending"
    tab.key("Tab", shift=True)
    tab.key("Enter")
    assert rows(tab) == tab.evaluate(
        f"{json.dumps(first)}.sort((a, b) => a.localeCompare(b, 'en', {{numeric: true}}))"
    )
    assert tab.evaluate(f"[...{head}].map(h => h.ariaSort)")[:2] == ["ascending", "none"]


def test_tables_filter_by_words_and_conditions(tab: Tab) -> None:
    everything = rows(tab)
    field = "#errors .table:has(caption) input[type=search]"
    tab.click(field)
    tab.type("k-fac sampled")
    assert rows(tab) == [n for n in everything if "K-FAC" in n and "sampled" in n] != []
    said = tab.evaluate("document.querySelector('#errors .tools output').textContent")
    assert said == f"{len(rows(tab))} of {len(everything)} rows"
    tab.evaluate(f"document.querySelector({json.dumps(field)}).select()")
    tab.type("whole matrix < 0.9, diagonal")
    shown = tab.evaluate(
        f"[...{ERRORS}.tBodies[0].rows].filter(r => r.offsetParent !== null)"
        ".map(r => Number(r.cells[1].dataset.sort))"
    )
    assert all(value < 0.9 for value in shown)
    tab.evaluate(f"document.querySelector({json.dumps(field)}).select()")
    tab.type(" ")
    assert rows(tab) == everything


def test_check_boxes_switch_rows_and_marks(tab: Tab) -> None:
    name = "K-FAC"
    box = f".choices input[value='{name}']"
    marks = (
        f"[...document.querySelectorAll('svg .mark[data-series=\"{name}\"]')]"
        ".filter(m => getComputedStyle(m).display !== 'none').length"
    )
    assert name in rows(tab) and tab.evaluate(marks) > 5
    tab.evaluate(f"document.querySelector({json.dumps(box)}).focus()")
    tab.key(" ")
    assert name not in rows(tab) and "K-FAC (sampled)" in rows(tab)
    assert tab.evaluate(marks) == 0
    tab.click("[data-choose=none]")
    assert rows(tab) == []
    tab.click("[data-choose=all]")
    assert name in rows(tab) and tab.evaluate(marks) > 5


def test_figures_say_their_values(tab: Tab) -> None:
    mark = "#errors svg .mark[data-series='K-FAC'] path"
    near(tab, mark)
    x, y = tab.centre(mark)
    tab.mouse("moved", x, y)
    assert re.fullmatch(r"K-FAC on the whole matrix: error 0\.\d+.*", tip(tab))
    tab.evaluate("document.querySelector('#errors .plot').focus({preventScroll: true})")
    tab.key("ArrowRight")
    first = tip(tab)
    tab.key("ArrowRight")
    assert first and tip(tab) and tip(tab) != first
    tab.key("Escape")
    assert tip(tab) == ""


def test_spectra_are_read_and_zoomed(tab: Tab) -> None:
    near(tab, ".plane")
    figure = "document.querySelector('.plane').closest('.plot')"
    tab.evaluate(f"{figure}.focus({{preventScroll: true}})")
    tab.key("ArrowRight")
    assert re.match(r"rank 1 .*GGN: \d", tip(tab))
    path = "document.querySelector('.plane .mark path').getAttribute('d')"
    before = tab.evaluate(path)
    x, y = tab.centre(".plane")
    for kind, dx in (
        ("moved", -60),
        ("pressed", -60),
        ("moved", 0),
        ("moved", 40),
        ("released", 40),
    ):
        tab.mouse(kind, x + dx, y + dx)
    assert tab.evaluate(path) != before
    assert tab.evaluate("document.querySelectorAll('.plane .ticks text').length") >= 4
    tab.key("0")
    assert tab.evaluate("document.querySelector('.plane .ticks')") is None
    numbers = [
        [float(x) for x in re.findall(r"-?[\d.]+", text)] for text in (before, tab.evaluate(path))
    ]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
    tab.key("+")
    assert tab.evaluate(path) != before and tab.errors == []


def test_a_figure_fills_the_screen_and_comes_back(tab: Tab) -> None:
    near(tab, "#errors .figure-tools button")
    width = "document.querySelector('svg.figure').getBoundingClientRect().width"
    small = tab.evaluate(width)
    tab.click("#errors .figure-tools button")
    assert tab.evaluate("document.querySelector('dialog').open")
    assert tab.evaluate(width.replace("svg.figure", "dialog svg.figure")) > small
    tab.key("Escape")
    tab.evaluate("new Promise(done => setTimeout(done, 100))")
    assert tab.evaluate("document.querySelector('#errors figure svg.figure') !== null")
    assert tab.evaluate("document.activeElement.textContent") == "enlarge"


def test_colours_follow_the_system_and_the_button(tab: Tab) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(paper)
    tab.media(scheme="dark")
    dark = tab.evaluate(paper)
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 24, 28)"
    tab.click("#theme")  # automatic -> light
    assert tab.evaluate(paper) == light
    tab.click("#theme")
    tab.media(scheme="light")
    assert tab.evaluate(paper) == dark
    tab.click("#theme")
    assert tab.evaluate(paper) == light
    assert "automatic" in tab.evaluate("document.getElementById('theme').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(tab: Tab, scheme: str) -> None:
    """At least 4.5 to 1 for all text on the colours that lie behind it (WCAG AA)."""
    tab.media(scheme=scheme)
    worst = tab.evaluate(Path(__file__).with_name("contrast.js").read_text(encoding="utf-8"))
    assert worst[0] >= 4.5, worst


def test_keyboard_reaches_content_and_layers(tab: Tab) -> None:
    tab.key("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "To the content"
    tab.key("Enter")
    assert tab.evaluate("location.hash") == "#main"
    link = "nav a[href^='#layer-']"
    tab.evaluate(f"document.querySelector({json.dumps(link)}).focus()")
    tab.key("Enter")
    name = tab.evaluate(f"document.querySelector({json.dumps(link)}).textContent")
    here = "document.querySelector('nav [aria-current]').textContent"
    tab.wait(f"{here} === {json.dumps(name)}")
    assert tab.evaluate("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 1
    assert tab.errors == []


@pytest.mark.parametrize("width", [320, 390, 768, 1024])
def test_no_width_scrolls_sideways(tab: Tab, width: int, html: Path) -> None:
    tab.size(width, 844, phone=width < 800)
    tab.open(html)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    closed = not tab.evaluate("document.querySelector('nav details').open")
    assert closed == (width < 1024)


def test_captions_are_not_cut_off_on_a_phone(tab: Tab, html: Path) -> None:
    tab.size(390, 800, phone=True)
    tab.open(html)
    inside = "[...document.querySelectorAll('caption')].map(c => c.getBoundingClientRect())"
    ends = tab.evaluate(f"{inside}.filter(box => box.width > 0).map(box => box.right)")
    assert ends and max(ends) <= 390
    # the first column stays when a wide table is scrolled, its title too
    moved = tab.evaluate(
        "(() => { const box = [...document.querySelectorAll('.scroll')]"
        ".find(e => e.scrollWidth > e.clientWidth + 50); box.scrollLeft = 50;"
        "const at = s => box.querySelector(s).getBoundingClientRect().left"
        "- box.getBoundingClientRect().left;"
        "return [at('caption'), at('thead th'), at('tbody th')]; })()"
    )
    assert moved == pytest.approx([0, 0, 0], abs=1)


def test_without_scripts_everything_is_there(chromium: Browser, html: Path) -> None:
    plain = chromium.tab(scripts=False)
    plain.size(1300, 900)
    plain.media(scheme="light")
    plain.send("Page.navigate", url=html.resolve().as_uri())
    plain.send("Emulation.setScriptExecutionDisabled", value=True)
    shown = plain.evaluate  # the debugger may still ask
    plain.wait("document.readyState === 'complete' && document.querySelector('footer') !== null")
    assert not shown("document.documentElement.classList.contains('js')")
    assert shown("document.querySelectorAll('svg.figure .mark > title').length") > 50
    assert shown("document.querySelectorAll('th button').length") == 0
    hidden = "[...document.querySelectorAll('.needs-js')].every(e => e.offsetParent === null)"
    assert shown(hidden)
    assert shown("document.querySelector('nav details').open")


def test_paper(tab: Tab) -> None:
    tab.media(scheme="dark", kind="print")
    tab.size(690, 1000)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 690
    broken = tab.evaluate(
        "[...document.querySelectorAll('td.num')].map(cell => cell.firstChild).filter(text => {"
        "if (!text || text.nodeType !== 3 || /\\s/.test(text.data.trim())) return false;"
        "const range = document.createRange(); range.selectNodeContents(text);"
        "return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1;"
        "}).map(text => text.data)"
    )
    assert broken == []  # a number stands in one line
    lines = tab.evaluate(
        "[...document.querySelectorAll('.wide thead .num .title')].map(title => {"
        "const range = document.createRange(); range.selectNodeContents(title);"
        "return new Set([...range.getClientRects()].map(box => Math.round(box.left))).size; })"
    )
    assert len(lines) > 10 and set(lines) == {1}  # so does an upright heading
    head = "document.querySelector('thead th button')"
    assert tab.evaluate(f"getComputedStyle({head}).display") == "contents"  # printed on each page
    gone = "['.side', '.bar', '.tools', '.figure-tools'].every(s => document.querySelector(s)"
    assert tab.evaluate(f"{gone}.offsetParent === null)")
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
