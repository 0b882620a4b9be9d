"""The QR codes of logins on a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

from channel_tools import channels
from programs import client_folders, find_client, how_to_install

#: A decoder, and a node that runs it, if they are installed.
DECODERS = [path for folder in client_folders()
            for path in folder.glob("node_modules/jsqr/dist/jsQR.js")]
NODE = find_client("node")
#: Reads codes, rows of zeros and ones, as a camera sees them: four points for a module.
DECODE = """
const jsQR = require(process.argv[1]);
const read = (code) => {
  const side = 4 * (code.length + 8);
  const points = new Uint8ClampedArray(4 * side * side).fill(255);
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
    const at = 4 * (y * side + x);
    if (code[(y >> 2) - 4]?.[(x >> 2) - 4]) points.fill(0, at, at + 3);
  }
  return jsQR(points, side, side)?.data ?? null;
};
console.log(JSON.stringify(JSON.parse(require("fs").readFileSync(0)).map(read)));
"""


def modules_of(lines: list[str]) -> list[list[bool]]:
    """The modules that lines of a terminal show, with the light ones around them."""
    shown = {" ": (False, False), "\u2580": (True, False), "\u2584": (False, True),
             "\u2588": (True, True)}
    rows = []
    for line in lines:
        assert line.startswith("\x1b[30;107m") and line.endswith("\x1b[0m")
        pairs = [shown[letter] for letter in line[9:-4]]
        rows += [[upper for upper, _ in pairs], [lower for _, lower in pairs]]
    return rows


@pytest.mark.skipif(not (DECODERS and NODE), reason=how_to_install("jsqr"))
@pytest.mark.slow
def test_a_decoder_reads_codes_of_every_size() -> None:
    link = "https://liteapp.weixin.qq.com/q/7GiQu1?qrcode=" + "0123456789abcdef" * 16
    sizes = (1, 17, 18, 32, 33, 53, 54, 78, 79, 106, 107, 134, 135, 154, 155, 192, 193, 230, 231,
             271)
    texts = [link[:size] for size in sizes]
    codes = [[list(map(int, line)) for line in channels.qr_code(text.encode())] for text in texts]
    done = subprocess.run(
        [str(NODE), "-e", DECODE, str(DECODERS[0])], input=json.dumps(codes), text=True,
        stdout=subprocess.PIPE, timeout=60, check=True)
    assert json.loads(done.stdout) == texts
    assert sorted({len(code) for code in codes}) == [17 + 4 * number for number in range(1, 11)]


def test_a_link_that_is_too_long_has_no_code() -> None:
    assert len(channels.qr_code(b"x" * 271)) == 57
    with pytest.raises(ValueError):
        channels.qr_code(b"x" * 272)


@pytest.mark.parametrize("size", [10, 200])
def test_a_terminal_shows_every_module_with_light_ones_around_it(size: int) -> None:
    data = b"https://x.y/"[:size] * (size // 10)
    code = channels.qr_code(data)
    for columns, quiet in ((len(code) + 8, 4), (len(code) + 7, 2)):
        shown = modules_of(channels.qr_lines(data, columns))
        assert [row[quiet:quiet + len(code)] for row in shown[quiet:quiet + len(code)]] == code
        assert sum(map(sum, shown)) == sum(map(sum, code))
        assert len(shown) >= len(code) + 2 * quiet
    assert channels.qr_lines(data, len(code) + 3) == []


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_link_itself_is_always_there(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    for link in ("https://x.y/z", "https://x.y/" + "z" * 300):
        channels.Console().show_link(link)
        out = capsys.readouterr().out
        assert out.endswith(f"{link}\n")
        assert ("\u2588" in out) == (is_terminal and len(link) < 272)


def test_what_a_platform_says_cannot_command_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or " 12 ")
    channels.Console().say("a\x1b[2Jb")
    assert capsys.readouterr().out == "a?[2Jb\n"
    assert channels.Console().ask("Number\x07?") == "12" and asked == ["Number?? "]


def test_a_question_that_nobody_can_answer_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(channels.Fatal) as fatal:
        channels.Console().ask("Number?")
    assert fatal.value.fix == "run it on a terminal"
