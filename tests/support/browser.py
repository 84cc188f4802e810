"""A real browser for tests: headless chromium, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PATIENCE_SECONDS = 60.0
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, where chromium refuses its own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


class Browser:
    """One page: what it shows, what it asked of any network, what its console said.

    To start chromium takes longer than most of its tests: `new_page` makes another one of it, with
    nothing of the one before.
    """

    def __init__(self, chromium: Path, profile: Path, width: int = 1200, height: int = 900) -> None:
        (ours_out, self._to), (self._from, ours_in) = os.pipe(), os.pipe()
        # The browser reads descriptor 3 and writes 4; a shell puts the pipes there.
        shell = f'exec "$@" 3<&{ours_out} 4>&{ours_in}'
        options = (*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}")
        self._chromium = subprocess.Popen(
            ["bash", "-c", shell, "browser", str(chromium), *options],
            pass_fds=(ours_out, ours_in),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours_out)
        os.close(ours_in)
        self._read = b""
        self._count = 0
        self._session: str | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._context = ""
        self._size = width, height
        self.new_page()

    def new_page(self) -> None:
        """Begin anew: no storage, no requests, no words of the console."""
        self._session = None
        if self._context:
            self._ask("Target.disposeBrowserContext", browserContextId=self._context)
        self._context = self._ask("Target.createBrowserContext")["browserContextId"]
        place = {"url": "about:blank", "browserContextId": self._context}
        target = self._ask("Target.createTarget", **place)["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.requests: list[str] = []
        self.console: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self.resize(*self._size)

    def open(self, address: str) -> None:
        """Go there and wait until the page and its script are done."""
        self._ask("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The first true value of a JavaScript expression."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up:
            if value := self.run(script):
                return value
            self._listen(0.05)
        raise AssertionError(f"never true: {script}; console: {self.console}")

    def hover(self, selector: str) -> None:
        """Move the pointer to the middle of an element."""
        self._mouse("mouseMoved", selector)

    def click(self, selector: str) -> None:
        """Press and release the pointer on the middle of an element."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._mouse(kind, selector)

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key)

    def resize(self, width: int, height: int, *, is_phone: bool = False) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )

    def look(self, *, is_dark: bool = False, media: str = "") -> None:
        """Prefer dark or light; show as on `screen` or in `print`."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self, path: Path) -> None:
        """The page as a PDF on A4."""
        sheet = self._ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(sheet["data"]))

    def close(self) -> None:
        self._chromium.terminate()
        self._chromium.wait(20)
        os.close(self._to)
        os.close(self._from)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _mouse(self, kind: str, selector: str) -> None:
        box = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({ block: 'nearest' }); const r = e.getBoundingClientRect();"
            "return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        x, y = self.run(box)
        pressed = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        call: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._to, json.dumps(call).encode() + b"\0")
        give_up = time.monotonic() + PATIENCE_SECONDS
        while self._count not in self._answers:
            assert time.monotonic() < give_up, f"chromium does not answer {method}"
            self._listen(0.5)
        answer = self._answers.pop(self._count)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _listen(self, seconds: float) -> None:
        """Take what the browser says, waiting so long for it."""
        if not select.select([self._from], [], [], seconds)[0]:
            return
        piece = os.read(self._from, 1 << 20)
        assert piece, "chromium ended"
        *messages, self._read = (self._read + piece).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif heard := _HEARD.get(message["method"]):
                heard(self, message["params"])


def _asked(browser: Browser, event: dict[str, Any]) -> None:
    browser.requests.append(event["request"]["url"])


def _said(browser: Browser, event: dict[str, Any]) -> None:
    browser.console.append(json.dumps(event))


_HEARD: dict[str, Callable[[Browser, dict[str, Any]], None]] = {
    "Network.requestWillBeSent": _asked,
    "Log.entryAdded": _said,
    "Runtime.consoleAPICalled": _said,
    "Runtime.exceptionThrown": _said,
}
