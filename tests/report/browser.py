"""A real browser for the tests of pages: Chromium, spoken to over its debugging pipe.

Needs nothing but the program itself. ``find()`` says where it is; the tests skip without one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 60.0


def find() -> str | None:
    """The path of a Chromium or Chrome; the variable CURVSCOPE_BROWSER comes first."""
    named = os.environ.get("CURVSCOPE_BROWSER")
    return named or next((path for path in map(shutil.which, NAMES) if path), None)


class BrowserError(AssertionError):
    """The browser refused a command, or a script in the page failed."""


class Tab:
    """One page: what it logs, and what one does with it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, params, self._session)

    def hear(self, method: str, params: dict[str, Any]) -> None:
        """Events of this tab: errors and requests are kept."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(str(details.get("exception", details).get("description", details)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(" ".join(str(a.get("value", a)) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path) -> None:
        self._loaded = False
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while not self._loaded:
            if time.monotonic() > end:
                raise BrowserError(f"{path} did not load in {PATIENCE} s")
            self.evaluate("0")
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 30)))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}\n{answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, patience: float = 10.0) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + patience
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise BrowserError(f"{condition} did not come true in {patience} s")
            time.sleep(0.05)

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def media(self, *, scheme: str = "light", kind: str = "") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=kind, features=features)

    def key(self, name: str, *, shift: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowDown": 40}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "Home": 36, "End": 35}
        common = {"key": name, "code": name, "windowsVirtualKeyCode": codes.get(name, 0)}
        text = {"Enter": "\r", " ": " "}.get(name) or (name if len(name) == 1 else None)
        down = {**common, "modifiers": 8 if shift else 0, **({"text": text} if text else {})}
        self.send("Input.dispatchKeyEvent", type="keyDown", **down)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """``kind``: moved, pressed or released."""
        button = {} if kind == "moved" else {"button": "left", "clickCount": 1}
        held = {"buttons": 1} if kind == "moved" and self._held else {}
        self._held = kind == "pressed" or (kind == "moved" and self._held)
        self.send(
            "Input.dispatchMouseEvent", type=f"mouse{kind.title()}", x=x, y=y, **button, **held
        )

    _held = False

    def click(self, selector: str) -> None:
        """A click with the mouse in the middle of an element."""
        x, y = self.centre(selector)
        for kind in ("moved", "pressed", "released"):
            self.mouse(kind, x, y)

    def centre(self, selector: str) -> tuple[float, float]:
        """Where an element is on the screen, after it was scrolled there."""
        found = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return found[0], found[1]

    def screenshot(self, path: Path, *, full: bool = False) -> Path:
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=full)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path

    def pdf(self) -> bytes:
        answer = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(answer["data"])


class Browser:
    """A headless Chromium; see :func:`browser`."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._count = 0
        self._buffer = b""
        self._tabs: dict[str, Tab] = {}

    def tab(self, *, scripts: bool = True) -> Tab:
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        found = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})
        made = Tab.__new__(Tab)
        self._tabs[found["sessionId"]] = made
        made.__init__(self, found["sessionId"])  # type: ignore[misc]
        if not scripts:
            made.send("Emulation.setScriptExecutionDisabled", value=True)
        return made

    def send(self, method: str, params: dict[str, Any], session: str = "") -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while True:
            answer = self._read(end)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if answer.get("sessionId") in self._tabs:
                self._tabs[answer["sessionId"]].hear(answer["method"], answer["params"])

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._back, 1 << 20) if ready else b""
            if not more:
                raise BrowserError(f"The browser does not answer (status {self._process.poll()}).")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A headless browser with a profile of its own, closed in the end."""
    read_here, write_there = os.pipe()
    read_there, write_here = os.pipe()

    def descriptors() -> None:  # Chromium reads from 3 and writes to 4
        first, second = os.dup(read_there), os.dup(write_there)
        os.dup2(first, 3)
        os.dup2(second, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-extensions",
                "--hide-scrollbars",
                "--host-resolver-rules=MAP * ~NOTFOUND",  # no network, whatever a page asks for
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        try:
            yield Browser(process, write_here, read_here)
        finally:
            os.close(write_here)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(10)
            if process.poll() is None:
                process.kill()
            os.close(read_here)
