"""The OpenAPI document: well formed, complete, and true, as far as schemathesis finds out."""
from __future__ import annotations

import copy
import re
import subprocess
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest

from keys import ADMIN_KEY
from programs import find_client, how_to_install
from project import clean_env, load_script
from server import Server, running_server

Json = Any

ocp = load_script("ocp_server")

METHODS = ("get", "put", "post", "delete", "patch", "head", "options", "trace")
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
#: What a schema may say here, and the kind of its value.
KEYWORDS = {
    "type": (str, list), "properties": dict, "required": list, "items": dict, "enum": list,
    "const": (str, int, float, bool, type(None)), "anyOf": list, "oneOf": list, "allOf": list,
    "minimum": (int, float), "maximum": (int, float), "minLength": int, "maxLength": int,
    "minItems": int, "maxItems": int, "minProperties": int, "maxProperties": int, "pattern": str,
    "format": str, "description": str, "additionalProperties": (bool, dict), "$ref": str,
    "title": str, "default": object, "examples": list,
}
#: An answer that never ends cannot be waited for.
ENDLESS = ("GET", "/api/events")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in mode multi."""
    env = {"CLAUDE_AUTH_MODE": "multi", "OCP_ADMIN_KEY": ADMIN_KEY, "OCP_WRONG_KEY_DELAY": "0"}
    with running_server(tmp_path_factory.mktemp("server"), env=env) as running:
        yield running


@pytest.fixture
def document(open_server: Server) -> Json:
    return open_server.call("GET", "/openapi.json").json()


# ---------------------------------------------------------------------------
# What has to hold of any document
# ---------------------------------------------------------------------------

def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """(method, path, description) of everything that can be asked for."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield method, path, operation


def problems(document: Json) -> list[str]:
    """What is wrong with a document; nothing, if it is one."""
    found = []
    if not re.fullmatch(r"3\.1\.\d+", str(document.get("openapi"))):
        found.append("openapi: no version 3.1")
    for name in ("title", "version"):
        if not isinstance(document.get("info", {}).get(name), str):
            found.append(f"info: no {name}")
    ids: list[str] = []
    for method, path, operation in operations(document):
        ids.append(operation.get("operationId", ""))
        if method not in METHODS:
            found.append(f"{path}: {method} is no method")
        where = f"{method} {path}"
        found += [f"{where}: {problem}" for problem in _of_operation(document, path, operation)]
        if "requestBody" in operation and method in ("get", "head", "delete"):
            found.append(f"{where}: takes a body")
    found += [f"operationId {name!r} twice" for name in set(ids) if ids.count(name) > 1]
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        found += [f"components {name}: {problem}" for problem in _of_schema(document, schema)]
    return found


def _of_operation(document: Json, path: str, operation: Json) -> Iterator[str]:
    if not operation.get("operationId"):
        yield "no operationId"
    yield from _of_parameters(document, path, operation.get("parameters", []))
    if not operation.get("responses"):
        yield "no responses"
    for status, response in operation.get("responses", {}).items():
        if not re.fullmatch("[1-5]([0-9][0-9]|XX)|default", status):
            yield f"status {status!r}"
        if not response.get("description"):
            yield f"{status}: no description"
        yield from _of_content(document, response.get("content", {}))
    if "requestBody" in operation:
        if not operation["requestBody"].get("content"):
            yield "a body of no kind"
        yield from _of_content(document, operation["requestBody"].get("content", {}))
    schemes = document.get("components", {}).get("securitySchemes", {})
    for choice in operation.get("security", []):
        for name in choice:
            if name not in schemes:
                yield f"security {name!r} is not described"


def _of_parameters(document: Json, path: str, parameters: Json) -> Iterator[str]:
    named = [(parameter.get("in"), parameter.get("name")) for parameter in parameters]
    for place, name in named:
        if place not in ("path", "query", "header", "cookie"):
            yield f"parameter {name} stands in {place}"
    if len(set(named)) < len(named):
        yield "a parameter twice"
    in_path = set(re.findall(r"{(\w+)}", path))
    if in_path != {name for place, name in named if place == "path"}:
        yield f"the path has {sorted(in_path)}, which are not its parameters"
    for parameter in parameters:
        if parameter.get("in") == "path" and parameter.get("required") is not True:
            yield f"path parameter {parameter.get('name')} is not required"
        yield from _of_schema(document, parameter.get("schema"))


def _of_content(document: Json, content: Json) -> Iterator[str]:
    for media, entry in content.items():
        if not re.fullmatch(r"[a-z]+/[a-z0-9.+-]+", media):
            yield f"media type {media!r}"
        yield from _of_schema(document, entry.get("schema"))


def _of_schema(document: Json, schema: Json) -> Iterator[str]:
    """What is wrong with a JSON schema, in the dialect of OpenAPI 3.1."""
    if not isinstance(schema, dict):
        yield f"no schema: {schema!r}"
        return
    for word, value in schema.items():
        if word not in KEYWORDS:
            yield f"unknown keyword {word!r}"
        elif not isinstance(value, KEYWORDS[word]):
            yield f"{word}: {value!r}"
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in TYPES:
            yield f"type {kind!r}"
    if "$ref" in schema and _target(document, schema["$ref"]) is None:
        yield f"{schema['$ref']} leads nowhere"
    missing = set(schema.get("required", [])) - set(schema.get("properties", {}))
    if missing:
        yield f"required but not described: {sorted(missing)}"
    try:
        re.compile(schema.get("pattern", ""))
    except re.error:
        yield "no pattern"
    for least, most in (("minimum", "maximum"), ("minLength", "maxLength"),
                        ("minItems", "maxItems")):
        bounds = [schema[word] for word in (least, most) if isinstance(schema.get(word), int)]
        if len(bounds) == 2 and bounds[0] > bounds[1]:
            yield f"{least} above {most}"
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", []),
             *schema.get("oneOf", []), *schema.get("allOf", [])]
    inner += [schema[word] for word in ("items", "additionalProperties")
              if isinstance(schema.get(word), dict)]
    for each in inner:
        yield from _of_schema(document, each)


def _target(document: Json, reference: str) -> Optional[Json]:
    """What a reference within the document leads to, None if nothing."""
    found = document
    for part in reference.split("/")[1:]:
        found = found.get(part) if isinstance(found, dict) else None
    return found if reference.startswith("#/") else None


def test_the_document_is_well_formed(document: Json) -> None:
    assert problems(document) == []


def chat(document: Json) -> Json:
    return document["paths"]["/v1/chat/completions"]["post"]


def model(document: Json) -> Json:
    return document["paths"]["/v1/models/{model}"]["get"]


@pytest.mark.parametrize("spoil, word", [
    (lambda d: d.update(openapi="2.0"), "no version"),
    (lambda d: d["info"].pop("title"), "no title"),
    (lambda d: d["paths"]["/health"].update(fetch=d["paths"]["/health"]["get"]), "is no method"),
    (lambda d: chat(d).pop("operationId"), "no operationId"),
    (lambda d: chat(d).update(operationId="get_health"), "twice"),
    (lambda d: chat(d).pop("responses"), "no responses"),
    (lambda d: chat(d)["responses"].update(ok={"description": "x"}), "status 'ok'"),
    (lambda d: chat(d)["responses"]["200"].pop("description"), "no description"),
    (lambda d: chat(d)["responses"]["200"]["content"].update(json={"schema": {}}), "media type"),
    (lambda d: chat(d)["security"].append({"password": []}), "not described"),
    (lambda d: chat(d).update(requestBody={}), "a body of no kind"),
    (lambda d: model(d).update(requestBody=chat(d)["requestBody"]), "takes a body"),
    (lambda d: model(d).update(parameters=[]), "not its parameters"),
    (lambda d: model(d)["parameters"].append(model(d)["parameters"][0]), "twice"),
    (lambda d: model(d)["parameters"][0].update(required=False), "is not required"),
    (lambda d: model(d)["parameters"][0].update(schema={"type": "text"}), "type 'text'"),
    (lambda d: model(d)["parameters"][0].pop("schema"), "no schema"),
    (lambda d: d["components"]["schemas"].clear(), "leads nowhere"),
    (lambda d: d["components"]["schemas"]["Error"].update(required=["x"]), "not described: "),
    (lambda d: d["components"]["schemas"]["Error"].update(maximal=1), "unknown keyword"),
    (lambda d: d["components"]["schemas"]["Error"].update(minLength="1"), "minLength: "),
    (lambda d: d["components"]["schemas"]["Error"].update(minLength=2, maxLength=1), "above"),
    (lambda d: d["components"]["schemas"]["Error"].update(pattern="("), "no pattern"),
])
def test_a_document_that_is_not_well_formed_is_noticed(
    document: Json, spoil: Callable[[Json], object], word: str
) -> None:
    spoilt = copy.deepcopy(document)
    spoil(spoilt)

    assert [problem for problem in problems(spoilt) if word in problem]


# ---------------------------------------------------------------------------
# What has to hold of ours
# ---------------------------------------------------------------------------

def test_every_route_is_in_the_document_and_nothing_else(document: Json) -> None:
    described = {(method.upper(), path) for method, path, _ in operations(document)}

    assert described == {(route.method, route.path) for route in ocp.ROUTES}


def test_every_summary_is_a_whole_sentence(document: Json) -> None:
    summaries = [operation["summary"] for _, _, operation in operations(document)]

    assert [summary for summary in summaries if not summary.endswith(".")] == []


def test_everybody_may_read_the_document(open_server: Server) -> None:
    reply = open_server.call("GET", "/openapi.json")

    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"


def test_what_needs_no_key_is_said_to_need_none(document: Json, open_server: Server) -> None:
    for method, path, operation in operations(document):
        asked = re.sub("{.*?}", "x", path)
        reply = open_server.call(method.upper(), asked, {} if "requestBody" in operation else None)

        assert (reply.status == 401) is bool(operation["security"]), (method, path)


def test_every_route_that_reads_a_body_describes_it(document: Json, open_server: Server) -> None:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    made = open_server.call("POST", "/api/keys", {"name": "x"}, headers)
    assert made.status == 201
    assert open_server.call("PUT", "/api/keys/x/tenant", {}, headers).status == 201
    for method, path, operation in operations(document):
        if (method.upper(), path) == ENDLESS or method in ("get", "delete"):
            continue
        reply = open_server.call(method.upper(), re.sub("{.*?}", "x", path), "no JSON", headers)

        reads = reply.status == 400 and "not JSON" in reply.text
        # This one says where to look instead, whatever it is asked.
        described = "requestBody" in operation and path != "/v1/embeddings"
        assert reads is described, (method, path, reply)


# ---------------------------------------------------------------------------
# Whether it is true
# ---------------------------------------------------------------------------

SCHEMATHESIS = find_client("schemathesis")
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance",
          "response_schema_conformance")


def schemathesis_run(server: Server, folder: Path) -> subprocess.CompletedProcess[str]:
    """Lets schemathesis ask what the document says can be asked, and see what comes back."""
    command = [
        str(SCHEMATHESIS), "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {ADMIN_KEY}", "--checks", ",".join(CHECKS),
        "--phases", "coverage,fuzzing,stateful",
        "--max-examples", "10", "--seed", "1",
        "--generation-database", "none", "--exclude-path", ENDLESS[1], "--request-timeout", "60",
        "--continue-on-failure", "--no-color", "--report", "junit",
        "--report-junit-path", str(folder / "junit.xml"),
    ]
    return subprocess.run(
        command, cwd=folder, env=clean_env(HOME=str(folder)), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=1200)


@pytest.mark.exhaustive
@pytest.mark.skipif(not SCHEMATHESIS, reason=how_to_install("schemathesis"))
def test_the_server_does_what_the_document_says(
    open_server: Server, document: Json, tmp_path: Path
) -> None:
    done = schemathesis_run(open_server, tmp_path)

    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases = xml.etree.ElementTree.parse(tmp_path / "junit.xml").iter("testcase")
    asked = {str(case.get("name")) for case in cases}
    wanted = {f"{method.upper()} {path}" for method, path, _ in operations(document)}
    # It does not ask for what it has read the document from.
    assert wanted - asked <= {" ".join(ENDLESS), "GET /openapi.json"}
    assert open_server.log_entries("request_broke") == []
