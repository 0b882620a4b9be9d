"""The documents say what the code does: tables are the code's own, examples work as pasted.

With OCP_UPDATE_DOCS=1 the tables in README.md and docs/api.md are written anew instead of compared.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from project import REPO, clean_env, load_script
from server import running_server

ocp = load_script("ocp_server")
README = Path(REPO, "README.md")
DOCS = Path(REPO, "docs")


def routes_table() -> str:
    """The routes as the README shows them."""
    rows = [f"| {r.method} | `{r.path}` | {r.access.value} |" for r in ocp.ROUTES]
    return "\n".join(["| method | path | who may use it |", "| --- | --- | --- |", *rows])


def removed_table() -> str:
    """The settings that mean nothing any more."""
    rows = [f"| `{name}` | {why} |" for name, why in ocp.REMOVED_SETTINGS]
    lead = "Settings of the original that mean nothing here; the start warns about them:"
    return "\n".join([lead, "", "| variable | why |", "| --- | --- |", *rows])


def measured_tables() -> str:
    """What was measured of the first token, as the benchmarks' own page shows it."""
    text = Path(REPO, "bench", "README.md").read_text("utf-8")
    found = re.search(r"<!-- table: first_token -->\n(.*?)<!-- end table -->", text, re.S)
    assert found is not None
    return found[1].strip("\n")


def _thousands(tokens: int) -> str:
    return "1M" if tokens == 1_000_000 else f"{tokens // 1_000}K"


def _prices(prices: Any) -> str:
    return ", ".join(f"{price:g}" for price in prices)


def model_row(model: Any) -> str:
    """A model as docs/api.md shows it."""
    answer = _thousands(model.max_tokens)
    if model.default_max_tokens != model.max_tokens:
        answer += f"; {_thousands(model.default_max_tokens)} without a limit"
    off = model.thinking_off
    if model.thinking_off_max_effort:
        off += f", up to {model.thinking_off_max_effort}"
    default = f"; default {model.default_effort}" if model.default_effort else ""
    prices = _prices(model.prices)
    if model.long_prompt_prices:
        prices += (f"; above {_thousands(model.long_prompt_tokens)} prompt tokens "
                   f"{_prices(model.long_prompt_prices)}")
    cells = (
        f"`{model.id}`" + ("" if model.listed else ", not listed"),
        _thousands(model.context_window) + (", 1M with `[1m]`" if model.long_context else ""),
        answer, "yes" if model.sampling else "no", model.thinking, off,
        "yes" if model.forced_tools else "no", "yes" if model.fast_mode else "no",
        (", ".join(model.efforts) or "none") + default,
        ".".join(map(str, model.first_cli or ocp.OLDEST_CLAUDE)), prices,
    )
    return f"| {' | '.join(cells)} |"


def models_table() -> str:
    """The models of models.json."""
    heads = ("model", "window", "longest answer", "sampling", "thinking", "thinking off",
             "forced tools", "fast mode", "effort", "claude from",
             "USD per million tokens: input, output, cache write 5 min, 1 h, cache read")
    rows = map(model_row, ocp.Models(ocp.BUILTIN_MODELS).all())
    return "\n".join([f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|", *rows])


#: The page and the content of each generated table.
BLOCKS = {
    "measured": (README, measured_tables),
    "settings": (README, ocp.settings_markdown),
    "routes": (README, routes_table),
    "removed": (README, removed_table),
    "models": (DOCS / "api.md", models_table),
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_a_table_of_a_page_equals_the_table_of_the_code(name: str) -> None:
    page, table = BLOCKS[name]
    text = page.read_text("utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n)(.*?)(\n?<!-- end {name} -->)", re.S)
    wanted = table()
    if os.environ.get("OCP_UPDATE_DOCS"):
        page.write_text(pattern.sub(lambda m: f"{m[1]}{wanted}\n<!-- end {name} -->", text))
        return
    found = pattern.search(text)
    assert found is not None and found[2] == wanted


def test_every_error_of_the_readme_exists_with_its_status() -> None:
    text = README.read_text("utf-8")
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)`(?: / `(\w+)`)? \|.*\| (yes|no) \|$", text, re.M)
    kinds = {
        (str(kind.status), kind.openai_type, kind.code or "", kind.retryable)
        for kind in all_errors(ocp.OcpError)
    }
    for status, openai_type, code, again in rows:
        assert (status, openai_type, code, again == "yes") in kinds
    named = {code or openai_type for _, openai_type, code, _ in rows}
    shown = {kind.code or kind.openai_type for kind in all_errors(ocp.OcpError)}
    # Of these the message says all: they are matters of one request.
    assert shown - named == {"permission_error", "unsupported_parameter"}


def all_errors(kind: type[Exception]) -> set[type[Exception]]:
    """`kind` and everything derived from it."""
    return {kind}.union(*(all_errors(below) for below in kind.__subclasses__()))


def shell_blocks() -> list[str]:
    """What the README says to paste into a shell."""
    return re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), re.S)


def test_the_two_commands_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.read_text("utf-8").splitlines()[:25])
    assert "python3 ocp_server.py" in first_screen
    assert "python3 tests/run.py" in first_screen


@pytest.mark.slow
def test_the_curl_example_works_as_pasted_with_the_demo(tmp_path: Path) -> None:
    examples = [block for block in shell_blocks() if block.startswith("curl")]
    examples = [block for block in examples if "HOST" not in block]
    assert examples
    with running_server(tmp_path, args=("--demo",)) as server:
        for example in examples:
            command = example.replace("http://127.0.0.1:3456", server.url)
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True
            )
            assert "demo" in done.stdout and done.stdout.rstrip().endswith("data: [DONE]")
            assert done.stdout.count('"content":') > 5


@pytest.mark.slow
def test_the_command_for_tools_works_as_pasted(tmp_path: Path, free_home: Path) -> None:
    (command,) = [block.strip() for block in shell_blocks() if "/connect |" in block]
    with running_server(tmp_path, args=("--demo",)) as server:
        pasted = command.replace("http://HOST:3456", server.url).replace(
            "HOST", f"127.0.0.1:{server.port}")
        done = subprocess.run(
            ["bash", "-c", f"{pasted} --only codex --yes"], capture_output=True, text=True,
            timeout=300, check=True, env=clean_env(HOME=str(free_home)))
    assert "answers: This is the demo" in done.stdout and "--undo" in done.stdout
    assert server.url in (free_home / ".codex/config.toml").read_text()


PAGES = ["README.md", "bench/README.md", *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = Path(REPO, page)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text("utf-8")):
        assert (source.parent / target).exists(), target


def test_the_openapi_document_is_the_one_that_the_server_serves() -> None:
    page = Path(REPO, "docs", "openapi.json")
    wanted = json.dumps(ocp.openapi(ocp.ROUTES), indent=1) + "\n"
    if os.environ.get("OCP_UPDATE_DOCS"):
        page.write_text(wanted)
    assert page.read_text("utf-8") == wanted


def test_the_architecture_names_what_there_is() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    tables = text.partition("### The walk of one")[2].partition("\n## ")[0]
    # ClassNames, ClassName.method, and methods of Dialect.
    names = set(re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)?)`", tables))
    methods = re.search(r"subclass of `Dialect` \(([^)]*)\)", tables)
    assert methods is not None and len(names) > 15
    names |= {f"Dialect.{name}" for name in re.findall(r"\w+", methods[1])}

    def exists(name: str) -> bool:
        owner, _, attribute = name.partition(".")
        found = getattr(ocp, owner, None)
        return found is not None and (not attribute or hasattr(found, attribute))

    assert [name for name in sorted(names) if not exists(name)] == []


def test_the_walk_of_a_request_names_sections_that_there_are() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    walk = text.partition("### The walk of one")[2].partition("\n#")[0]
    rows = re.findall(r"^\| [^|]+ \| [^|]*`[^|]* \| ([^|`]+) \|$", walk, re.M)
    source = Path(REPO, "ocp_server.py").read_text("utf-8")
    titles = re.findall(r"^# ==== \d+\. (.+?) =+$", source, re.M)

    named = {name for row in rows for name in row.split(", ")}

    assert len(named) > 10
    # A title may be cut after its first words.
    assert [name for name in sorted(named) if not any(t.startswith(name) for t in titles)] == []
