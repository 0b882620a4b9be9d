"""Makes the pictures of the documents from the real programs, with the demo's made-up data.

    python3 tools/pictures.py [--into docs/pictures]

It starts `ocp_server.py --demo` with an empty HOME on a free port of this machine, looks at the
dashboard in a real browser, and runs a few commands in front of it:

    dashboard-light.png, dashboard-dark.png    the overview while two answers are streamed
    dashboard-phone.png                        the same on a phone
    try-it.png                                 a conversation in the dashboard
    terminal.svg                               the start of the demo, a request, `ocp status`

In what the commands print, the port becomes 3456 and the folder of the run becomes ~. Nothing else
is changed. Needs chromium and curl.

Index: 1 the demo   2 pictures of the dashboard   3 the terminal   4 program
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Iterator, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kit"))

import browser  # noqa: E402
from http_client import http_call  # noqa: E402
from project import REPO, clean_env, free_port  # noqa: E402
from waiting import eventually  # noqa: E402

#: No picture may be larger.
MAX_BYTES = 150_000


# ---------------------------------------------------------------------------
# 1 The demo
# ---------------------------------------------------------------------------

class Demo(NamedTuple):
    """A running demo."""

    home: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        return clean_env(HOME=str(self.home), OCP_URL=self.url, CLAUDE_PROXY_PORT=str(self.port))

    def as_shown(self, text: str) -> str:
        """What a program printed, as it would be with the usual port and home."""
        return text.replace(str(self.port), "3456").replace(str(self.home), "~")

    def ask(self, model: str, text: str) -> None:
        """Ask and wait for the answer."""
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        http_call(self.port, "POST", "/v1/chat/completions", body)


def usual_port() -> int:
    """3456, or another one where that is taken."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 3456))
        return 3456
    return free_port()


@contextmanager
def running_demo(folder: Path) -> Iterator[Demo]:
    """A demo that ends with the block."""
    demo = Demo(folder / "home", usual_port())
    demo.home.mkdir()
    with open(folder / "server.out", "wb") as out, open(folder / "server.err", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(REPO / "ocp_server.py"), "--demo"], stdin=subprocess.DEVNULL,
            stdout=out, stderr=log, env=demo.env(), cwd=demo.home)
        try:
            eventually(lambda: "Try it" in (folder / "server.out").read_text(), 60)
            yield demo
        finally:
            process.terminate()
            process.wait(60)


# ---------------------------------------------------------------------------
# 2 Pictures of the dashboard
# ---------------------------------------------------------------------------

class Shot(NamedTuple):
    """One picture: its file, its size, points for a pixel, and the scheme."""

    name: str
    width: int
    height: int
    scale: int = 1
    dark: bool = False


OVERVIEWS = (
    Shot("dashboard-light.png", 1180, 1092),
    Shot("dashboard-dark.png", 1180, 1092, dark=True),
    Shot("dashboard-phone.png", 360, 760, scale=2),
)
TRY_IT = Shot("try-it.png", 1180, 760)
#: The demo says so much of a question again, word by word.
LONG_QUESTION = "one two three four five six seven eight nine ten " * 4


def take(page: browser.Page, shot: Shot, folder: Path) -> None:
    """What is on the screen, as a file."""
    picture = page.call("Page.captureScreenshot", format="png")
    (folder / shot.name).write_bytes(base64.b64decode(picture["data"]))


@contextmanager
def opened(
    chrome: browser.Browser, demo: Demo, view: str, shot: Shot
) -> Iterator[browser.Page]:
    with chrome.page(f"{demo.url}/dashboard#{view}", shot.width, shot.dark) as page:
        page.call("Emulation.setDeviceMetricsOverride", width=shot.width, height=shot.height,
                  deviceScaleFactor=shot.scale, mobile=shot.width < 600)
        page.sees("Live", "#link")
        yield page


def take_overview(chrome: browser.Browser, demo: Demo, shot: Shot, folder: Path) -> None:
    """The overview while two answers are streamed."""
    with opened(chrome, demo, "overview", shot) as page:
        page.sees("laptop", "#shares")
        page.until("document.querySelectorAll('#chart .s0').length > 0")
        page.click("#choices input[value=week]")
        page.until("document.querySelector('#chart').getAttribute('aria-label').includes('7 days')")
        askers = [threading.Thread(target=demo.ask, args=(model, LONG_QUESTION))
                  for model in ("sonnet", "opus")]
        for asker in askers:
            asker.start()
        page.until("document.querySelector('#running').innerText.split('after').length > 2")
        take(page, shot, folder)
        for asker in askers:
            asker.join()


def take_try_it(chrome: browser.Browser, demo: Demo, folder: Path) -> None:
    """A conversation of two questions."""
    with opened(chrome, demo, "try", TRY_IT) as page:
        page.until("document.querySelector('#try-model').value !== ''")
        page.evaluate("document.querySelector('#try-text').focus()")
        for question in ("Is this a model?", "What else can I try here?"):
            page.write(question)
            page.press("Enter")
            page.until("store.talk.exchanges.length > 0 && !store.talk.abort")
        page.evaluate("document.activeElement.blur()")
        # The last frame of the answer.
        page.evaluate("new Promise((done) => setTimeout(done, 200))")
        take(page, TRY_IT, folder)


# ---------------------------------------------------------------------------
# 3 The terminal
# ---------------------------------------------------------------------------

COLUMNS = 108
CHAR_WIDTH, LINE_HEIGHT, MARGIN, BAR_HEIGHT = 8.0, 19, 18, 34
#: Prompt, command, output, the bar's dots.
COLOURS = {"prompt": "#5ccb8e", "typed": "#ffffff", "said": "#c3ccd8"}
DOTS = ("#ff5f57", "#febc2e", "#28c840")
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def shell(demo: Demo, *command: str) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, env=demo.env(), cwd=demo.home,
        timeout=60, check=True)
    return demo.as_shown(done.stdout.decode())


def wrapped(text: str) -> list[str]:
    """The lines of a text as a terminal breaks them."""
    return [line[at:at + COLUMNS] for line in text.rstrip("\n").split("\n")
            for at in range(0, max(1, len(line)), COLUMNS)]


def terminal_session(demo: Demo, banner: str) -> list[tuple[str, str]]:
    """Commands and what they print."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    curl = ["curl", "-s", f"{demo.url}/v1/chat/completions", "-d", body]
    ocp = [sys.executable, str(REPO / "ocp.py"), "status"]
    answer = shell(demo, *curl)
    return [
        ("python3 ocp_server.py --demo &", demo.as_shown(banner)),
        (demo.as_shown(shlex.join(curl)).replace("http://127.0.0.1", "127.0.0.1"), answer),
        ("ocp status", shell(demo, *ocp)),
    ]


def escaped(text: str) -> str:
    """The text in XML. Programs that draw SVG leave out spaces otherwise."""
    return escape(text).replace(" ", "&#160;")


def terminal_svg(session: list[tuple[str, str]]) -> str:
    """The session as it looks in a window."""
    lines = []
    for command, output in session:
        first, *rest = wrapped(f"$ {command}")
        lines.append(f'<tspan fill="{COLOURS["prompt"]}">$</tspan>'
                     f'<tspan fill="{COLOURS["typed"]}">{escaped(first[1:])}</tspan>')
        lines += [f'<tspan fill="{COLOURS["typed"]}">{escaped(line)}</tspan>' for line in rest]
        lines += [escaped(line) for line in wrapped(output)] + [""]
    width = round(COLUMNS * CHAR_WIDTH + 2 * MARGIN)
    height = BAR_HEIGHT + LINE_HEIGHT * len(lines) + MARGIN // 2
    texts = [f'<text x="{MARGIN}" y="{BAR_HEIGHT + LINE_HEIGHT * (at + 1) - 6}">{line}</text>'
             for at, line in enumerate(lines) if line]
    dots = [f'<circle cx="{MARGIN + 18 * at}" cy="17" r="5.5" fill="{colour}"/>'
            for at, colour in enumerate(DOTS)]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" '
        'aria-label="A terminal: the demo starts, answers a request, and tells its status">',
        f'<rect width="{width}" height="{height}" rx="10" fill="#151a22"/>', *dots,
        f'<g font-family="{FONT}" font-size="13.3" fill="{COLOURS["said"]}">',
        *texts, "</g>", "</svg>", ""])


# ---------------------------------------------------------------------------
# 4 Program
# ---------------------------------------------------------------------------

def make_pictures(folder: Path) -> None:
    """Write all pictures into this folder."""
    with tempfile.TemporaryDirectory() as name, running_demo(Path(name)) as demo:
        session = terminal_session(demo, (Path(name) / "server.out").read_text())
        (folder / "terminal.svg").write_text(terminal_svg(session))
        with browser.running_browser(Path(name) / "browser") as chrome:
            for shot in OVERVIEWS:
                take_overview(chrome, demo, shot, folder)
            take_try_it(chrome, demo, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--into", type=Path, default=REPO / "docs" / "pictures")
    folder: Path = parser.parse_args().into
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.time()
    make_pictures(folder)
    too_large = 0
    for path in sorted(folder.iterdir()):
        if path.stat().st_mtime >= started_s - 1:
            size = path.stat().st_size
            too_large += size > MAX_BYTES
            print(f"{path.name}: {size:,} bytes" + (" - too large" if size > MAX_BYTES else ""))
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
