"""Images and files of requests: what they are told as, and how many of them there may be."""
from __future__ import annotations

import base64
import gc
import random
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from project import load_script
from rendering import MODELS, block, conversation, parsing

ocp = load_script("ocp_server.py")

Json = dict[str, Any]

LIMITS = ocp.Limits(
    image_allow_url=False, max_image_bytes=1_000, max_images=5, max_image_total_bytes=4_000
)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
IMAGES = {
    "image/png": PNG,
    "image/jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "image/gif": b"GIF89a\x01\0\x01\0",
    "image/webp": b"RIFF\x1a\0\0\0WEBPVP8 ",
}
PDF = b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n1 0 obj"
#: Data that no model reads, by the type that tells the truth about it.
FOREIGN = {
    "image/heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "image/avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1",
    "image/bmp": b"BM\x46\0\0\0\0\0\0\0\x36\0\0\0",
    "image/tiff": b"II*\0\x08\0\0\0\x01\0",
    "application/zip": b"PK\x03\x04\x14\0\x06\0\x08\0",
    "audio/wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0",
}


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{encoded(content)}"


# -- the same in every dialect ------------------------------------------------


class Wire:
    """How a dialect writes images and files, alone and in the result of a tool."""

    name = ""
    #: Below the path of the part.
    image_field = ""
    file_field = ""

    def image(self, data: str, media_type: str) -> Json:
        raise NotImplementedError

    def file(self, data: str, media_type: str, title: str = "") -> Json:
        raise NotImplementedError

    def address(self, url: str) -> Json:
        """A file by its address."""
        raise NotImplementedError

    def stored(self) -> Json:
        """A file that was stored before."""
        raise NotImplementedError

    def asked(self, *parts: Json) -> Json:
        raise NotImplementedError

    def resulting(self, *parts: Json) -> Json:
        """A request whose last message is the result of a tool."""
        raise NotImplementedError


class ChatWire(Wire):
    name, image_field, file_field = "chat", ".image_url", ".file.file_data"

    def image(self, data: str, media_type: str) -> Json:
        return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}

    def file(self, data: str, media_type: str, title: str = "") -> Json:
        described = {"file_data": f"data:{media_type};base64,{data}", "filename": title}
        return {"type": "file", "file": {k: v for k, v in described.items() if v}}

    def address(self, url: str) -> Json:
        return {"type": "file", "file": {"file_data": url}}

    def stored(self) -> Json:
        return {"type": "file", "file": {"file_id": "file-1"}}

    def asked(self, *parts: Json) -> Json:
        return {"messages": [{"role": "user", "content": list(parts)}]}

    def resulting(self, *parts: Json) -> Json:
        call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        return {"messages": [
            {"role": "user", "content": "Look."}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": list(parts)},
        ]}


class MessagesWire(Wire):
    name, image_field, file_field = "messages", ".source.data", ".source.data"

    def image(self, data: str, media_type: str) -> Json:
        source = {"type": "base64", "media_type": media_type, "data": data}
        return {"type": "image", "source": source}

    def file(self, data: str, media_type: str, title: str = "") -> Json:
        return {**self.image(data, media_type), "type": "document", "title": title}

    def address(self, url: str) -> Json:
        return {"type": "document", "source": {"type": "url", "url": url}}

    def stored(self) -> Json:
        return {"type": "document", "source": {"type": "file", "file_id": "file_1"}}

    def asked(self, *parts: Json) -> Json:
        return {"messages": [{"role": "user", "content": list(parts)}]}

    def resulting(self, *parts: Json) -> Json:
        call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "t1", "content": list(parts)}
        return {"messages": [
            {"role": "user", "content": "Look."}, {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]}


class AnthropicInChatWire(ChatWire):
    """Anthropic's parts in chat completions."""

    name, image_field, file_field = "anthropic in chat", ".source.data", ".source.data"
    image, file = MessagesWire.image, MessagesWire.file
    address, stored = MessagesWire.address, MessagesWire.stored


class ResponsesWire(Wire):
    name, image_field, file_field = "responses", ".image_url", ".file_data"

    def image(self, data: str, media_type: str) -> Json:
        return {"type": "input_image", "image_url": f"data:{media_type};base64,{data}"}

    def file(self, data: str, media_type: str, title: str = "") -> Json:
        data = f"data:{media_type};base64,{data}"
        return {"type": "input_file", "file_data": data, **({"filename": title} if title else {})}

    def address(self, url: str) -> Json:
        return {"type": "input_file", "file_url": url}

    def stored(self) -> Json:
        return {"type": "input_file", "file_id": "file-1"}

    def asked(self, *parts: Json) -> Json:
        return {"input": [{"role": "user", "content": list(parts)}]}

    def resulting(self, *parts: Json) -> Json:
        call = {"type": "function_call", "call_id": "t1", "name": "look", "arguments": "{}"}
        result = {"type": "function_call_output", "call_id": "t1", "output": list(parts)}
        return {"input": [{"role": "user", "content": "Look."}, call, result]}


CHAT_WIRE = ChatWire()
WIRES = [CHAT_WIRE, MessagesWire(), AnthropicInChatWire(), ResponsesWire()]
EVERY_WIRE = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: str(wire.name))
DIALECTS = {"messages": ocp.MESSAGES, "responses": ocp.RESPONSES}
#: Where a part stands in a request of a Wire's, and how it is reached in the Turn.
PLACES: dict[str, Callable[[Wire], Callable[..., Json]]] = {
    "question": lambda wire: wire.asked, "result": lambda wire: wire.resulting,
}
EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def parse(wire: Wire, body: Json, limits: Any = LIMITS, **more: Any) -> Any:
    about = parsing(limits)._replace(**more)
    return DIALECTS.get(wire.name, ocp.CHAT).parse({"model": "claude-sonnet-4-6", **body}, about)


def told(wire: Wire, place: str, part: Json, limits: Any = LIMITS) -> list[Json]:
    """The blocks that a part becomes."""
    last = parse(wire, PLACES[place](wire)(part), limits).messages[-1].content
    return list(last[0]["content"] if place == "result" else last)


def refusal(wire: Wire, body: Json, limits: Any = LIMITS) -> Any:
    with pytest.raises(ocp.OcpError) as caught:
        parse(wire, body, limits)
    return caught.value


def picture(content: bytes, media_type: str = "image/png") -> Json:
    """The block of an image."""
    source = {"type": "base64", "media_type": media_type, "data": encoded(content)}
    return {"type": "image", "source": source}


def paper(content: bytes = PDF, **more: str) -> Json:
    """The block of a PDF."""
    return {**picture(content, "application/pdf"), "type": "document", **more}


# -- types --------------------------------------------------------------------

CARELESS = ["application/octet-stream", "image/*", "image/jpg", "", "image/png;charset=utf-8",
            "binary/octet-stream", "IMAGE/X-PNG", "text/plain", "application/pdf"]


@EVERY_WIRE
@EVERY_PLACE
@pytest.mark.parametrize("media_type", IMAGES)
def test_an_image_is_what_its_data_says_it_is(wire: Wire, place: str, media_type: str) -> None:
    content = IMAGES[media_type]

    for careless in (*CARELESS, *IMAGES):
        for part in (wire.image(encoded(content), careless), wire.file(encoded(content), careless)):
            assert told(wire, place, part) == [picture(content, media_type)], careless


@EVERY_WIRE
@EVERY_PLACE
def test_a_pdf_is_a_document_whatever_it_is_called(wire: Wire, place: str) -> None:
    for careless in (*CARELESS, *IMAGES):
        for part in (wire.image(encoded(PDF), careless), wire.file(encoded(PDF), careless)):
            assert told(wire, place, part) == [paper()], careless


@EVERY_WIRE
@pytest.mark.parametrize("before", [b"\n", b"\x1b%-12345X@PJL\r\n", b"\0" * 1000])
def test_a_pdf_may_begin_with_something_else(wire: Wire, before: bytes) -> None:
    content = before + PDF

    assert told(wire, "question", wire.file(encoded(content), "application/pdf")) == [
        paper(content)]


@EVERY_WIRE
@EVERY_PLACE
@pytest.mark.parametrize("media_type", FOREIGN)
def test_data_that_no_model_reads_is_refused_by_its_path(
    wire: Wire, place: str, media_type: str
) -> None:
    data = encoded(FOREIGN[media_type])
    for called in (media_type, "image/png", "application/pdf", "text/plain", ""):
        for part, field, code in (
            (wire.image(data, called), wire.image_field, "unsupported_image_type"),
            (wire.file(data, called), wire.file_field, "unsupported_file_type"),
        ):
            error = refusal(wire, PLACES[place](wire)(part))

            assert (error.status, error.error_code) == (400, code)
            assert str(error.param).endswith(field) and error.message.startswith(error.param)
            assert all(kind in error.message for kind in IMAGES)
            assert (called in error.message) or called == "image/png"


@EVERY_WIRE
def test_text_is_no_image(wire: Wire) -> None:
    for text in ("<svg xmlns='http://www.w3.org/2000/svg'/>", "Not an image.", "{}"):
        part = wire.image(encoded(text.encode()), "image/svg+xml")

        error = refusal(wire, wire.asked(part))

        assert (error.status, error.error_code) == (400, "unsupported_image_type")
        assert "image/svg+xml" in error.message


# -- base64 -------------------------------------------------------------------


def wrapped(data: str, width: int, end: str) -> str:
    return end.join(data[start:start + width] for start in range(0, len(data), width)) + end


#: What clients do to base64 data, which nobody can take for something else.
MANGLED: dict[str, Callable[[str], str]] = {
    "nothing": lambda data: data,
    "line breaks": lambda data: wrapped(data, 76, "\n"),
    "line breaks of Windows": lambda data: wrapped(data, 64, "\r\n"),
    "blanks": lambda data: " " + wrapped(data, 5, " \t"),
    "the alphabet for addresses": lambda data: data.replace("+", "-").replace("/", "_"),
    "no padding": lambda data: data.rstrip("="),
    "too much padding": lambda data: data + "==",
    "percent signs": lambda data: data.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    "all of it": lambda data: wrapped(
        data.replace("+", "-").replace("/", "_").rstrip("="), 10, "\n"),
}


@EVERY_WIRE
@pytest.mark.parametrize("how", MANGLED)
def test_base64_is_mended(wire: Wire, how: str) -> None:
    dice = random.Random(how)
    for length in range(40):
        content = PNG + bytes(dice.choice(b"\xfb\xef\xbe\xff\x3f\0a") for _ in range(length))

        part = wire.image(MANGLED[how](encoded(content)), "image/png")

        assert told(wire, "question", part) == [picture(content)]


@EVERY_WIRE
@pytest.mark.parametrize(
    "broken", ["", " \n", "iVBORw0K!", "iVBO=Rw0K", "i", "=", "iVBOR", "\u00e9"])
def test_what_is_no_base64_is_refused(wire: Wire, broken: str) -> None:
    error = refusal(wire, wire.asked(block("Look."), wire.image(broken, "image/png")))

    assert error.status == 400
    assert error.param.endswith("[0].content[1]" + wire.image_field)


@pytest.mark.parametrize("how", MANGLED)
def test_mending_twice_changes_nothing(how: str) -> None:
    data, content = ocp.normalized_base64(MANGLED[how](encoded(PNG * 9)))

    assert (data, content) == (encoded(PNG * 9), PNG * 9)
    assert ocp.normalized_base64(data) == (data, content)
    assert ocp.base64_bytes(data) == len(content)


@pytest.mark.parametrize("wire", [CHAT_WIRE, ResponsesWire()], ids=["chat", "responses"])
def test_bare_base64_is_taken_where_a_data_uri_belongs(wire: Wire) -> None:
    data = encoded(PNG)
    for part in ({"type": "image_url", "image_url": {"url": data}},
                 {"type": "input_image", "image_url": data}):
        assert told(wire, "question", part) == [picture(PNG)]
    for part in ({"type": "file", "file": {"file_data": encoded(PDF)}},
                 {"type": "input_file", "file_data": encoded(PDF)}):
        assert told(wire, "question", part) == [paper()]


def test_a_data_uri_is_taken_where_bare_base64_belongs() -> None:
    wire = MessagesWire()

    assert told(wire, "question", wire.image(uri(PNG, "image/png"), "image/jpeg")) == [picture(PNG)]


# -- text files ---------------------------------------------------------------

TEXT = "Stra\u00dfe,\u4e2d\u6587\n1,2\n"
FILES = {
    "text/plain": TEXT.encode(),
    "text/csv": b"\xef\xbb\xbf" + TEXT.encode(),
    "text/markdown": TEXT.encode("utf-16"),
    "application/json": TEXT.encode("utf-32"),
    "text/html;charset=utf-16-be": TEXT.encode("utf-16-be"),
    "text/x-python; charset=\"gb18030\"": TEXT.encode("gb18030"),
    "application/octet-stream": TEXT.encode(),
    "image/svg+xml": TEXT.encode(),
    "": TEXT.encode(),
}


@EVERY_WIRE
@EVERY_PLACE
@pytest.mark.parametrize("media_type", FILES)
def test_a_text_file_is_told_as_text_after_its_name(
    wire: Wire, place: str, media_type: str
) -> None:
    data = encoded(FILES[media_type])

    assert told(wire, place, wire.file(data, media_type, "a.csv")) == [
        block("Title: a.csv"), block(TEXT)]
    assert told(wire, place, wire.file(data, media_type)) == [block(TEXT)]


@EVERY_WIRE
def test_text_of_windows_is_read_and_the_guess_is_told(wire: Wire) -> None:
    part = wire.file(encoded("Gr\u00fc\u00dfe \u2013 5\u20ac".encode("cp1252")), "text/csv")

    found = parse(wire, wire.asked(part))

    assert conversation(found) == [("user", ["Gr\u00fc\u00dfe \u2013 5\u20ac"])]
    assert found.adjusted == (("text_encoding_guessed", 1),)


@EVERY_WIRE
@pytest.mark.parametrize(
    ("media_type", "content"),
    [("application/json", b"Gr\xfc\xdfe"), ("text/plain;charset=ascii", b"\x81\x8d"),
     ("text/plain", b"a\0b"), ("text/plain", b"\xff\xfea"), ("text/plain", b"\x81\x8d\x8f")],
)
def test_a_file_that_cannot_be_read_as_text_is_refused(
    wire: Wire, media_type: str, content: bytes
) -> None:
    error = refusal(wire, wire.asked(wire.file(encoded(content), media_type)))

    assert (error.status, error.error_code) == (400, "unsupported_file_type")


@pytest.mark.parametrize("charset", ["none-such", "hex", "ascii", "utf-16", "", "utf-\0", "cp0"])
def test_where_the_named_encoding_does_not_fit_the_text_is_utf_8(charset: str) -> None:
    part = CHAT_WIRE.file(encoded("\u00e4".encode() * 5 + b"a"), f"text/plain;charset={charset}")

    assert told(CHAT_WIRE, "question", part) == [block("\u00e4" * 5 + "a")]


@pytest.mark.parametrize("charset", ["punycode", "idna", "unicode_escape", "rot13", "undefined"])
def test_encodings_that_are_none_of_files_are_not_tried(charset: str) -> None:
    content = b"a\\u0041-" * 30_000

    part = CHAT_WIRE.file(encoded(content), f"text/plain;charset={charset}")

    assert told(CHAT_WIRE, "question", part) == [block(content.decode())]


@EVERY_WIRE
def test_the_name_of_a_pdf_is_its_title(wire: Wire) -> None:
    found = told(wire, "question", wire.file(encoded(PDF), "application/pdf", "a.pdf"))

    assert found == [paper(title="a.pdf")]


@EVERY_WIRE
def test_an_image_that_comes_as_a_file_is_an_image_after_its_name(wire: Wire) -> None:
    found = told(wire, "question", wire.file(encoded(PNG), "image/png", "a.png"))

    assert found == [block("Title: a.png"), picture(PNG)]


@pytest.mark.parametrize(
    "source", [{"type": "text", "data": "a"}, {"type": "content", "content": "a"},
               {"type": "content", "content": [block("a")]}], ids=str)
@pytest.mark.parametrize("wire", [MessagesWire(), AnthropicInChatWire()], ids=["messages", "chat"])
def test_a_document_of_text_is_the_same_in_chat(wire: Wire, source: Json) -> None:
    part = {"type": "document", "source": source, "title": "t", "context": "c"}

    assert told(wire, "question", part) == [block("Title: t\nContext: c"), block("a")]


# -- addresses and stored files -----------------------------------------------


@EVERY_WIRE
@EVERY_PLACE
def test_a_file_by_its_address_is_passed_on_where_the_operator_allows_it(
    wire: Wire, place: str
) -> None:
    part = wire.address("https://example.org/a.pdf")

    source = {"type": "url", "url": "https://example.org/a.pdf"}
    assert told(wire, place, part, LIMITS._replace(image_allow_url=True)) == [
        {"type": "document", "source": source}]
    error = refusal(wire, PLACES[place](wire)(part))
    assert (error.status, error.error_code) == (400, "remote_url_disabled")
    assert "CLAUDE_IMAGE_ALLOW_URL=1" in error.message


@EVERY_WIRE
@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b.pdf", "gopher:a", "app://a"])
def test_no_other_address_is_passed_on(wire: Wire, url: str) -> None:
    error = refusal(wire, wire.asked(wire.address(url)), LIMITS._replace(image_allow_url=True))

    assert (error.status, error.error_code) == (400, "unsupported_url_scheme")


@EVERY_WIRE
@EVERY_PLACE
def test_a_stored_file_is_refused_with_what_to_do(wire: Wire, place: str) -> None:
    error = refusal(wire, PLACES[place](wire)(wire.stored()))

    assert (error.status, error.error_code) == (400, "unsupported_parameter")
    assert error.param.endswith(".file_id") and "send the file itself" in error.message


def test_a_stored_image_is_refused_by_its_id() -> None:
    error = refusal(CHAT_WIRE, CHAT_WIRE.asked({"type": "input_image", "file_id": "file-1"}))

    assert error.param == "messages[0].content[0].file_id"


# -- bounds -------------------------------------------------------------------


def talk(wire: Wire, count: int, newest: int = 1, content: bytes = PNG) -> Json:
    """A conversation of `count` questions with an image each, and a last one with some."""
    def image() -> Json:
        return wire.image(encoded(content), "image/png")

    messages: list[Json] = []
    for _ in range(count):
        messages.append({"role": "user", "content": [image()]})
        messages.append({"role": "assistant", "content": "So."})
    messages.append({"role": "user", "content": [image() for _ in range(newest)]})
    return {next(iter(wire.asked())): messages}


LEFT_OUT = "[An older image was left out here.]"


def images(found: Any) -> list[str]:
    """What stands at the places of the images, oldest first."""
    return [text for role, texts in conversation(found) for text in texts if role == "user"]


@EVERY_WIRE
@pytest.mark.parametrize(
    ("count", "newest", "kept"),
    [(4, 1, 5), (5, 1, 4), (6, 1, 5), (7, 1, 4), (8, 1, 5), (9, 1, 4), (4, 2, 4), (1, 5, 5),
     (5, 5, 5)],
)
def test_the_oldest_images_make_room_for_the_newest(
    wire: Wire, count: int, newest: int, kept: int
) -> None:
    found = parse(wire, talk(wire, count, newest))

    dropped = count + newest - kept
    assert images(found) == [LEFT_OUT] * dropped + ["image"] * kept
    assert found.adjusted == ((("images_dropped", dropped),) if dropped else ())


@EVERY_WIRE
@pytest.mark.parametrize(
    ("newest", "content", "code"),
    [(6, PNG, "too_many_images"), (1, PNG.ljust(1_001), "image_too_large"),
     (5, PNG.ljust(900), "images_too_large")],
)
def test_what_is_asked_about_is_never_left_out(
    wire: Wire, newest: int, content: bytes, code: str
) -> None:
    for count in (0, 3):
        body = talk(wire, count, newest, content)

        error = refusal(wire, body)

        assert (error.status, error.error_code) == (413, code)
        assert f"[{2 * count}].content[{newest - 1}]" in error.param
        assert parse(wire, body, count_only=True)


@EVERY_WIRE
def test_an_image_that_is_too_large_is_left_out_of_the_history(wire: Wire) -> None:
    body = talk(wire, 1, 1)
    first = next(iter(body.values()))[0]
    first["content"] = [block("a"), wire.image(encoded(PNG.ljust(1_001)), ""), block("b")]

    found = parse(wire, body)

    assert images(found) == ["a", LEFT_OUT, "b", "image"]
    assert found.adjusted == (("images_dropped", 1),)


@EVERY_WIRE
def test_results_of_tools_lose_their_oldest_images_too(wire: Wire) -> None:
    field, messages = next(iter(wire.resulting(
        *[wire.image(encoded(PNG), "image/png")] * 3, wire.file(encoded(PDF), "")).items()))
    asked = next(iter(talk(wire, 0, 4).values()))

    found = parse(wire, {field: [*messages, {"role": "assistant", "content": "Well."}, *asked]})

    [result] = found.messages[2].content
    assert [part.get("text", part["type"]) for part in result["content"]] == [
        LEFT_OUT, LEFT_OUT, LEFT_OUT, "[An older document was left out here.]"]
    assert images(found)[-4:] == ["image"] * 4


@pytest.mark.parametrize(
    ("model", "most"), [("claude-sonnet-4-6", 100), ("claude-opus-5", 600)])
def test_the_api_takes_as_many_images_as_the_model_s_window_allows(model: str, most: int) -> None:
    limits = ocp.Limits(False, 10_485_760, 600, 23_068_672)

    def adjusted(count: int) -> Any:
        body = {**talk(CHAT_WIRE, count - 1), "model": model}
        return ocp.CHAT.parse(body, parsing(limits)).adjusted

    assert MODELS.find(model).context_window == (1_000_000 if most == 600 else 200_000)
    assert adjusted(most) == ()
    assert adjusted(most + 1) == (("images_dropped", 1 + most // 5),)


def test_of_an_earlier_message_with_too_many_images_the_last_ones_stay() -> None:
    body = talk(CHAT_WIRE, 0, 7)
    body["messages"].append({"role": "assistant", "content": "So."})

    assert images(parse(CHAT_WIRE, body))[:7] == [LEFT_OUT] * 2 + ["image"] * 5


# -- which attachments go -----------------------------------------------------


def bounds(count: int, total_bytes: int = 10**9) -> Any:
    return LIMITS._replace(max_images=count, max_image_total_bytes=total_bytes)


def kept_of(sizes: list[list[int | None]], dropped: Iterable[int]) -> list[list[int]]:
    """The sizes of what is kept, message by message."""
    gone, number, result = set(dropped), 0, []
    for own in sizes:
        result.append([])
        for size_bytes in own:
            if number not in gone:
                assert size_bytes is not None
                result[-1].append(size_bytes)
            number += 1
    return result


@pytest.mark.parametrize("seed", range(60))
def test_what_is_kept_is_within_bounds_and_the_newest(seed: int) -> None:
    dice = random.Random(seed)
    limits = bounds(dice.randint(0, 12), dice.randint(1, 200))
    sizes: list[list[int | None]] = [
        [dice.choice([None, 0, 1, 20, 60]) for _ in range(dice.choice([0, 1, 1, 3]))]
        for _ in range(30)
    ]

    dropped = ocp.surplus_attachments(sizes, limits)

    kept = [size_bytes for own in kept_of(sizes, dropped) for size_bytes in own]
    assert len(kept) <= limits.max_images and sum(kept) <= limits.max_image_total_bytes
    numbered = [size_bytes for own in sizes for size_bytes in own]
    fit = [number for number, size_bytes in enumerate(numbered) if size_bytes is not None]
    assert sorted(dropped & set(fit)) == fit[:len(fit) - len(kept)]


@pytest.mark.parametrize("seed", range(60))
def test_what_was_left_out_once_stays_out(seed: int) -> None:
    dice = random.Random(seed)
    limits = bounds(10, 300)
    sizes: list[list[int | None]] = [
        [dice.choice([0, 10, 50, None]) for _ in range(dice.choice([0, 1, 2]))] for _ in range(60)]

    steps = [ocp.surplus_attachments(sizes[:count], limits) for count in range(len(sizes) + 1)]

    assert all(before <= after for before, after in zip(steps, steps[1:]))


def test_a_growing_conversation_changes_at_its_head_once_in_many_messages() -> None:
    steps = [len(ocp.surplus_attachments([[1]] * count, bounds(100))) for count in range(1, 201)]

    changes = [count for count, (before, after) in enumerate(zip(steps, steps[1:]), 2)
               if before != after]
    assert changes == list(range(101, 201, 21))
    assert [steps[count - 1] for count in (100, 101, 121, 122)] == [0, 21, 21, 42]


def test_bytes_count_as_numbers_do() -> None:
    assert ocp.surplus_attachments([[60], [60]], bounds(9, 120)) == set()
    assert ocp.surplus_attachments([[60], [60], [1]], bounds(9, 120)) == {0}
    assert ocp.surplus_attachments([[60, 70]], bounds(9, 120)) == {0}
    assert ocp.surplus_attachments([[5], [100, 20]], bounds(9, 120)) == {0}


class Body(dict[str, Any]):
    """A body of which can be seen whether it is still there."""


@EVERY_WIRE
@EVERY_PLACE
def test_a_body_is_gone_as_soon_as_its_request_is(wire: Wire, place: str) -> None:
    parts = [wire.image(encoded(PNG), "image/png"), wire.file(encoded(PDF), "application/pdf")]
    body = Body(PLACES[place](wire)(*parts), model="claude-sonnet-4-6")
    seen, dialect = weakref.ref(body), DIALECTS.get(wire.name, ocp.CHAT)
    gc.disable()
    try:
        dialect.parse(body, parsing(LIMITS))
        del body
        assert seen() is None
    finally:
        gc.enable()
