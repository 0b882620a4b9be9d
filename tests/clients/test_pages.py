"""The pages for browsers as text, and how they are sent: the dashboard and the page of a key."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import NamedTuple, Optional

import pytest

from project import REPO, load_script
from server import Server

ocp = load_script("ocp_server")


class WebPage(NamedTuple):
    """A page: its file, its path, and some of the paths that it fetches."""

    file: str
    path: str
    fetches: frozenset[str]

    @property
    def text(self) -> str:
        return (REPO / self.file).read_text("utf-8")

    def inside(self, tag: str) -> str:
        """What the only element with this tag holds."""
        return self.text.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]


PAGES = (
    WebPage("dashboard.html", "/dashboard", frozenset(
        ("/api/events", "/api/keys/{x}/quota", "/settings", "/sessions/{x}"))),
    WebPage("me.html", "/me", frozenset(("/health", "/v1/key", "/api/usage", "/v1/models"))),
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.file)


# ---------------------------------------------------------------------------
# As text
# ---------------------------------------------------------------------------

class Tags(HTMLParser):
    """The tags of a page; raises AssertionError when they do not fit into each other."""

    VOID = frozenset(("meta", "link", "input", "br"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, Optional[str]]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> at {self.getpos()} in {self.open}"
        self.open.pop()


@each_page
def test_a_page_is_ascii_and_not_too_wide(page: WebPage) -> None:
    assert page.text.isascii()
    lines = page.text.split("\n")
    assert [line for line in lines if len(line) > 100 or line != line.rstrip()] == []


@each_page
def test_the_policy_lets_everything_in_a_page_work(page: WebPage) -> None:
    found = Tags(page.text).found
    names = [tag for tag, _ in found]
    assert names.count("style") == names.count("script") == 1
    inline = [(tag, name) for tag, attributes in found for name in attributes
              if name.startswith("on") or name == "style"]
    assert inline == []


@each_page
def test_every_reference_in_a_page_leads_to_one_element(page: WebPage) -> None:
    found = Tags(page.text).found
    ids = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {str(attributes[name]) for _, attributes in found
              for name in ("for", "aria-labelledby", "aria-describedby") if name in attributes}
    wanted |= set(re.findall(r'byId\("([^"]+)"\)', page.inside("script")))
    assert wanted <= set(ids)


@each_page
def test_every_input_has_a_label(page: WebPage) -> None:
    found = Tags(page.text).found
    labelled = {attributes.get("for") for tag, attributes in found if tag == "label"}
    bare = [attributes for tag, attributes in found if tag == "input"
            and attributes.get("type") != "checkbox" and attributes["id"] not in labelled]
    assert bare == []


@each_page
def test_nothing_comes_from_outside(page: WebPage) -> None:
    assert not re.search(r"https?://|\burl\(|@import|\bimport\b\s*[\(\"']", page.text)


@each_page
def test_text_is_never_parsed_as_a_page_or_a_program(page: WebPage) -> None:
    words = "innerHTML|outerHTML|insertAdjacentHTML|document\\.write|\\beval\\(|new Function|srcdoc"
    assert not re.search(words, page.text)
    assert "localStorage" not in page.text and "document.cookie" not in page.text


@each_page
def test_every_path_that_is_fetched_is_a_route(page: WebPage) -> None:
    router = ocp.Router(ocp.ROUTES)
    texts = re.findall(r"[\"'`](/[a-z][^\"'`]*)[\"'`]", page.inside("script"))
    # {x} for what is filled in.
    paths = {re.sub(r"\$\{[^}]*\}", "{x}", text).partition("?")[0] for text in texts}
    assert page.fetches <= paths
    assert [path for path in paths - {"/v1"} if not router.matches(path)] == []


@each_page
def test_no_function_of_a_page_is_defined_twice(page: WebPage) -> None:
    names = re.findall(r"^(?:async )?function (\w+)", page.inside("script"), re.M)
    assert len(names) > 20 and len(set(names)) == len(names)


Colour = tuple[int, ...]


def colours(block: str) -> dict[str, Colour]:
    """The colours that a block of the style defines, by their names."""
    found = re.findall(r"--([\w-]+): #([0-9a-f]{3,6});", block)
    wide = [(name, code if len(code) == 6 else "".join(c + c for c in code))
            for name, code in found]
    return {name: tuple(bytes.fromhex(code)) for name, code in wide}


def schemes_of(page: WebPage) -> dict[str, dict[str, Colour]]:
    light, dark = page.inside("style").split("@media (prefers-color-scheme: dark)")
    return {"light": colours(light), "dark": colours(dark)}


def contrast(one: Colour, other: Colour) -> float:
    """As WCAG defines it."""
    def luminance(colour: Colour) -> float:
        parts = [value / 255 for value in colour]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                            for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    lights = sorted((luminance(one), luminance(other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@each_page
def test_colours_have_enough_contrast(page: WebPage, scheme: str) -> None:
    table = schemes_of(page)[scheme]
    texts = [(text, ground) for text in ("text", "quiet", "good", "warn", "bad", "accent")
             for ground in ("card", "page")]
    texts += [(text, "sunken") for text in ("text", "quiet", "good", "warn", "bad")]
    texts += [("on-accent", "accent"), ("card", "bad"), ("text", "tint")]
    # Those of a chart are in the page that has one.
    charts = [name for name in table if re.fullmatch("s[0-6]", name)]
    shapes = [(name, "card") for name in ("edge", *charts)]
    weak = [(pair, least) for pairs, least in ((texts, 4.5), (shapes, 3.0)) for pair in pairs
            if contrast(table[pair[0]], table[pair[1]]) < least]
    assert weak == []


def test_a_colour_is_the_same_in_all_pages() -> None:
    dashboard, own = map(schemes_of, PAGES)
    for scheme, table in own.items():
        assert table.items() <= dashboard[scheme].items()


# ---------------------------------------------------------------------------
# Over HTTP
# ---------------------------------------------------------------------------

@each_page
def test_the_policy_names_the_style_and_the_script(
    shared_server: Server, page: WebPage
) -> None:
    reply = shared_server.call("GET", page.path)
    policy = dict(part.split(" ", 1) for part in
                  reply.headers["Content-Security-Policy"].split("; "))

    def named(tag: str) -> str:
        digest = hashlib.sha256(page.inside(tag).encode()).digest()
        return "'sha256-" + base64.b64encode(digest).decode() + "'"

    assert (policy["style-src"], policy["script-src"]) == (named("style"), named("script"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.headers["Referrer-Policy"] == "no-referrer"
    assert reply.text == page.text


@each_page
def test_a_page_that_the_browser_has_is_not_sent_again(
    shared_server: Server, page: WebPage
) -> None:
    first = shared_server.call("GET", page.path)
    tag = first.headers["ETag"]
    again = shared_server.call("GET", page.path, headers={"If-None-Match": tag})
    other = shared_server.call("GET", page.path, headers={"If-None-Match": '"another"'})
    assert (again.status, again.body) == (304, b"")
    assert (other.status, other.body) == (200, first.body)
