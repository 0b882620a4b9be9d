"""A real browser, driven over the DevTools protocol with the standard library alone.

Index: 1 WebSocket   2 a browser   3 a page

A test asks for it with running_browser() and is skipped when there is no browser on PATH.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

from project import clean_env
from waiting import eventually

Json = Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_INSTALL = "no browser: install chromium (Debian: apt install chromium)"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
    "--no-first-run", "--no-default-browser-check", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--disable-default-apps", "--metrics-recording-only", "--mute-audio", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
#: What Input.dispatchKeyEvent wants beside the name of a key.
KEY_CODES = {
    "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37,
    "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}
KEY_TEXTS = {"Enter": "\r", " ": " "}


def browser_program() -> Optional[str]:
    """The path of a browser that speaks the DevTools protocol, None if there is none."""
    named = os.environ.get("OCP_TEST_BROWSER")
    return named or next(filter(None, map(shutil.which, PROGRAMS)), None)


# ---------------------------------------------------------------------------
# 1 WebSocket
# ---------------------------------------------------------------------------

class WebSocket:
    """Text messages to and from one address on this machine."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._unread = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall((
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self._unread:
            self._receive(time.monotonic() + 120)
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101"), head

    def send(self, text: str) -> None:
        content, mask = text.encode(), os.urandom(4)
        if len(content) < 126:
            size = struct.pack("!B", 0x80 | len(content))
        elif len(content) < 1 << 16:
            size = struct.pack("!BH", 0x80 | 126, len(content))
        else:
            size = struct.pack("!BQ", 0x80 | 127, len(content))
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(content))
        self._socket.sendall(b"\x81" + size + mask + masked)

    def receive(self, timeout_s: float) -> Optional[str]:
        """The next message, None if none comes in time."""
        deadline_s = time.monotonic() + timeout_s
        message = b""
        while True:
            frame = self._frame(deadline_s)
            if frame is None:
                return None
            first, content = frame
            message += content
            # Pings and the like have numbers from 8 on.
            if first & 0x80 and first & 0x0f < 8:
                return message.decode()

    def _frame(self, deadline_s: float) -> Optional[tuple[int, bytes]]:
        """The first byte and the content of a whole frame."""
        while True:
            found = self._whole_frame()
            if found:
                return found
            if not self._receive(deadline_s):
                return None

    def _whole_frame(self) -> Optional[tuple[int, bytes]]:
        if len(self._unread) < 2:
            return None
        first, length = self._unread[0], self._unread[1] & 0x7f
        extra = {126: ("!H", 2), 127: ("!Q", 8)}.get(length)
        start = 2 + (extra[1] if extra else 0)
        if len(self._unread) < start:
            return None
        if extra:
            length = struct.unpack(extra[0], self._unread[2:start])[0]
        if len(self._unread) < start + length:
            return None
        content = self._unread[start:start + length]
        self._unread = self._unread[start + length:]
        return first, content

    def _receive(self, deadline_s: float) -> bool:
        """Whether more has come in time. Raises AssertionError when the other end has closed."""
        left_s = max(0.0, deadline_s - time.monotonic())
        if not select.select([self._socket], [], [], left_s)[0]:
            return False
        piece = self._socket.recv(1 << 16)
        assert piece, "the browser has closed the connection"
        self._unread += piece
        return True

    def close(self) -> None:
        self._socket.close()


# ---------------------------------------------------------------------------
# 2 A browser
# ---------------------------------------------------------------------------

class Browser:
    """A running browser; pages of it are tabs, each with a storage of its own for the session."""

    def __init__(self, port: int) -> None:
        self._port = port

    @contextmanager
    def page(self, url: str, width: int = 1280, dark: bool = False) -> Iterator[Page]:
        """A new tab at this address, which is closed at the end of the block."""
        target = self._call("PUT", "/json/new?about:blank")
        path = target["webSocketDebuggerUrl"].partition(str(self._port))[2]
        page = Page(WebSocket(self._port, path))
        try:
            for domain in ("Page", "Runtime", "Log"):
                page.call(f"{domain}.enable")
            page.resize(width)
            page.prefer(dark)
            page.go(url)
            yield page
        finally:
            page.close()
            self._call("GET", f"/json/close/{target['id']}")

    def _call(self, method: str, path: str) -> Json:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request(method, path)
            answer = connection.getresponse().read()
            return json.loads(answer) if answer[:1] in (b"{", b"[") else None
        finally:
            connection.close()


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`, which is gone at the end of the block."""
    program = browser_program()
    assert program, HOW_TO_INSTALL
    profile = folder / "profile"
    profile.mkdir(parents=True)
    with open(folder / "browser.log", "wb") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
            env=clean_env(HOME=str(folder)))
    try:
        yield Browser(_port_of(profile))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port_of(profile: Path) -> int:
    file = profile / "DevToolsActivePort"

    def words() -> list[str]:
        return file.read_text().split() if file.exists() else []

    return int(eventually(words, 120)[0])


# ---------------------------------------------------------------------------
# 3 A page
# ---------------------------------------------------------------------------

class Page:
    """One tab: what it shows, and what a user does with it."""

    def __init__(self, connection: WebSocket) -> None:
        self._connection = connection
        self._calls = 0
        #: Errors and warnings of the console, and exceptions that nobody caught.
        self.complaints: list[str] = []

    def call(self, method: str, **parameters: Json) -> dict[str, Json]:
        """The result of one DevTools command; events that come meanwhile are noted."""
        self._calls += 1
        number = self._calls
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        deadline_s = time.monotonic() + 120
        while True:
            text = self._connection.receive(max(0.0, deadline_s - time.monotonic()))
            assert text is not None, f"no answer to {method}"
            message = json.loads(text)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Json] = message["result"]
                return result
            self._note(message)

    def _note(self, message: Mapping[str, Json]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", str(details)))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.complaints.append(str(parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            entry = parameters["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    def evaluate(self, expression: str) -> Json:
        """The value of an expression, of a promise what it resolves to."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def until(self, expression: str, timeout_s: float = 120) -> Json:
        """The first true value of an expression."""
        try:
            return eventually(lambda: self.evaluate(expression), timeout_s)
        except AssertionError as error:
            shown = self.evaluate("document.body.innerText")
            raise AssertionError(f"never: {expression}\n{self.complaints}\n{shown}") from error

    def text(self, selector: str = "body") -> str:
        """The visible text of an element, an empty string if there is none."""
        found = self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText")
        return str(found or "")

    def sees(self, text: str, selector: str = "body", timeout_s: float = 120) -> None:
        """Waits until a visible text is there."""
        place = f"document.querySelector({json.dumps(selector)})?.innerText"
        self.until(f"({place} || '').includes({json.dumps(text)})", timeout_s)

    # -- as a user -------------------------------------------------------------

    def press(self, key: str, times: int = 1, shift: bool = False) -> None:
        for _ in range(times):
            event = {"key": key, "code": "Space" if key == " " else key,
                     "windowsVirtualKeyCode": KEY_CODES[key], "modifiers": 8 if shift else 0}
            text = {"text": KEY_TEXTS[key]} if key in KEY_TEXTS else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def tab_to(self, name: str, most: int = 80, shift: bool = False) -> None:
        """Presses Tab until the focus is at the element of this id, label or text."""
        for _ in range(most):
            if self.focused() == name:
                return
            self.press("Tab", shift=shift)
        raise AssertionError(f"Tab never comes to {name!r}, it is at {self.focused()!r}")

    def focused(self) -> str:
        """The id of what has the focus, or its label, or its text."""
        return str(self.evaluate(
            "(() => { const e = document.activeElement; return e.id || "
            "e.getAttribute('aria-label') || e.innerText || e.tagName; })()"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    # -- surroundings ----------------------------------------------------------

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)

    def prefer(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._connection.close()
