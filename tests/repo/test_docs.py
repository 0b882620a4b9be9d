"""The documents say what the code does: tables are the code's own, examples work as pasted.

With OCP_UPDATE_DOCS=1 what is generated is written instead of compared.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from project import REPO, clean_env, load_script
from prose import wrapped
from server import running_server

ocp = load_script("ocp_server")
manager = load_script("ocp")
README = Path(REPO, "README.md")
DOCS = Path(REPO, "docs")


def routes_table() -> str:
    """The routes as docs/api.md shows them."""
    rows = [f"| {r.method} | `{r.path}` | {r.access.value} |" for r in ocp.ROUTES]
    return "\n".join(["| method | path | needs |", "| --- | --- | --- |", *rows])


def removed_table() -> str:
    """The settings that mean nothing any more."""
    rows = [f"| `{name}` | {why} |" for name, why in ocp.REMOVED_SETTINGS]
    lead = "Settings of the original that mean nothing here; the start warns about them:"
    return "\n".join([lead, "", "| variable | why |", "| --- | --- |", *rows])


#: A claude that is started for the question, in the table of the benchmark.
COLD = "cold `claude -p`, OCP's arguments"


def measured_sentence() -> str:
    """The first table of the benchmark of the first token, the newest claude's, in a sentence."""
    text = Path(REPO, "bench", "README.md").read_text("utf-8")
    table = text.partition("<!-- table: first_token -->\n")[2]
    median = dict(re.findall(r"^\| (\S.*?) +\| +([\d.,]+) \|", table, re.M)[::-1])
    machine = re.search(r"^\d+ rounds, .*?(\d+) cores,.* claude ([\d.]+)$", table, re.M)
    assert machine is not None

    def took(line: str) -> str:
        return f"{float(median[line].replace(',', '')):.0f} ms"

    return textwrap.fill(
        f"Measured with claude {machine[2]} on {machine[1]} cores, with a local stand-in for the "
        f"API: the first token took {took('OCP, after another question')} from a process that had "
        f"answered before, {took('OCP, spare ready')} from a new one, and {took(COLD)} from a "
        "`claude -p` started for the question ([bench/README.md](bench/README.md)).",
        width=118, break_on_hyphens=False)


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
    "measured": (README, measured_sentence),
    "settings": (DOCS / "settings.md", ocp.settings_markdown),
    "routes": (DOCS / "api.md", routes_table),
    "removed": (DOCS / "settings.md", removed_table),
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


def test_every_error_of_the_page_exists_with_its_status() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
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


def test_the_two_commands_and_that_for_tools_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.read_text("utf-8").splitlines()[:25])
    assert "python3 ocp_server.py" in first_screen
    assert "python3 tests/run.py" in first_screen
    assert "/connect | python3 - HOST" in first_screen


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len(README.read_text("utf-8").split()) <= 800


def test_the_readme_names_the_oldest_python_and_claude_that_will_do() -> None:
    text = " ".join(README.read_text("utf-8").split())
    assert f"`claude` {'.'.join(map(str, ocp.OLDEST_CLAUDE))} or later" in text
    # The version gates of the scripts are held to their docstrings by tests of their own.
    assert "Python 3.9 or later" in text


@pytest.mark.slow
def test_the_python_example_works_as_pasted_with_the_demo(tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="the package openai: python3 .ci/install.py .venv")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    with running_server(tmp_path, args=("--demo",)) as server:
        done = subprocess.run(
            [sys.executable, "-c", example.replace("http://127.0.0.1:3456", server.url)],
            capture_output=True, text=True, timeout=300, check=True, env=clean_env())
    assert "demo" in done.stdout


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
    assert "answers: This is the demo" in done.stdout and "| python3 - undo" in done.stdout
    assert server.url in (free_home / ".codex/config.toml").read_text()


def connect_parser() -> str:
    """The help of ocp_connect.py."""
    return str(load_script("ocp_connect").build_parser().format_help())


def install_parser() -> str:
    """The help of the installer."""
    return str(load_script("setup.py_install").argument_parser().format_help())


def code_of(page: str) -> str:
    """All that a page shows as code."""
    text = Path(REPO, page).read_text("utf-8")
    return "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S)
                     + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))


#: Pages that tell people and programs what to type.
PAGES_TO_FOLLOW = ("README.md", *(f"docs/{name}.md" for name in (
    "ask-your-ai", "clients", "errors", "install", "migration", "operating", "settings",
    "troubleshooting", "upgrading")))


@pytest.mark.parametrize("page", PAGES_TO_FOLLOW)
def test_the_commands_that_a_page_tells_to_type_exist(page: str) -> None:
    code = code_of(page).replace("docker compose exec ocp ", "")
    words = re.findall(r"(?<![\w/.-])(?:ocp|ocp\.py) ([a-z]+)(?![\w/:.])", code)
    options = {"ocp_connect": connect_parser(), "setup.py_install": install_parser()}
    known = {command.name for command in manager.COMMANDS}

    assert [word for word in words if word not in known] == []
    for script, text in options.items():
        for line in code.splitlines():
            if f"{script}.py" in line or (script == "ocp_connect" and "/connect |" in line):
                asked = re.findall(r"(?<=\s)--[a-z-]+", line)
                assert [option for option in asked if option not in text] == [], line


@pytest.mark.parametrize("page", PAGES_TO_FOLLOW)
def test_the_variables_that_a_page_names_mean_something(page: str) -> None:
    names = re.findall(r"\b(?:OCP|CLAUDE|PROXY)_[A-Z_]+\b(?!\*)", code_of(page))
    source = "".join(Path(REPO, name).read_text("utf-8") for name in (
        "ocp_server.py", "ocp.py", "ocp_connect.py", "setup.py_install.py", "compose.yaml",
        "Dockerfile"))
    assert [name for name in set(names) if name not in source] == []


def test_the_prompt_for_a_repair_names_what_doctor_prints() -> None:
    prompt = (DOCS / "ask-your-ai.md").read_text("utf-8").partition("## Repair OCP")[2]
    source = Path(REPO, "ocp.py").read_text("utf-8")
    fields = re.findall(r'"([a-z_]+)"', prompt)

    assert {"checks", "next_action", "ai_executable", "human_required", "verify"} <= set(fields)
    assert [field for field in fields if f'"{field}"' not in source] == []


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "tests/README.md",
         *sorted(f"docs/{p.name}" for p in DOCS.glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    for heading in re.findall(r"^#+ (.+)$", prose, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    source = Path(REPO, page)
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", source.read_text("utf-8"))
    for target, anchor in links:
        page_of_target = source.parent / target if target else source
        assert page_of_target.exists(), target
        assert not anchor or anchor in anchors(page_of_target), f"{target}#{anchor}"


def test_the_versions_that_tools_were_tried_with_are_those_that_the_tests_use() -> None:
    page = (DOCS / "clients.md").read_text("utf-8")
    tables = page.partition("## Which tools")[2].partition("\n## ")[0]
    tried = re.findall(r"`([^`]+)` (\d[\d.]*\d)", tables)
    used = Path(REPO, ".ci", "versions.txt").read_text("utf-8").split()

    assert len(tried) > 20
    assert [f"{name} {version}" for name, version in tried
            if not {f"{name}@{version}", f"{name}=={version}"} & set(used)] == []


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_the_prose_of_a_page_fits_an_editor(page: str) -> None:
    """Links, tables and code may be as long as they have to be."""
    source = Path(REPO, page)
    if os.environ.get("OCP_UPDATE_DOCS"):
        source.write_text(wrapped(source.read_text("utf-8")), "utf-8")
    text = source.read_text("utf-8")
    prose = re.sub(r"^```.*?^```|^ *\|.*?$|^    .*?$", "", text, flags=re.S | re.M)
    assert [line for line in prose.splitlines() if len(line) > 120 and "](" not in line] == []


def test_wrapping_prose_changes_nothing_but_the_ends_of_lines() -> None:
    prose = "word " * 40
    kept = [f"# {prose}", f"| {prose} |", f"code {prose}", f"    {prose}"]
    page = [kept[0], "", prose, f"- {prose}1. - {prose}", kept[1], "```sh", kept[2], "```", kept[3]]

    done = wrapped("\n".join(page))

    assert done.split() == " ".join(page).split() and wrapped(done) == done
    assert [line for line in done.splitlines() if len(line) > 120] == kept


def test_every_page_stands_in_the_list_of_pages() -> None:
    listed = set(re.findall(r"\]\(([\w.-]+)\)", (DOCS / "README.md").read_text("utf-8")))
    pages = {path.name for path in DOCS.iterdir() if path.is_file()} - {"README.md"}
    assert pages == listed


def test_the_openapi_document_is_the_one_that_the_server_serves() -> None:
    page = Path(REPO, "docs", "openapi.json")
    wanted = json.dumps(ocp.openapi(ocp.ROUTES), indent=1) + "\n"
    if os.environ.get("OCP_UPDATE_DOCS"):
        page.write_text(wanted)
    assert page.read_text("utf-8") == wanted


def test_the_architecture_names_what_there_is() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    tables = text.partition("### The path of one")[2].partition("\n## ")[0]
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


def test_the_path_of_a_request_names_sections_that_there_are() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    path = text.partition("### The path of one")[2].partition("\n#")[0]
    rows = re.findall(r"^\| [^|]+ \| [^|]*`[^|]* \| ([^|`]+) \|$", path, re.M)
    source = Path(REPO, "ocp_server.py").read_text("utf-8")
    titles = re.findall(r"^# ==== \d+\. (.+?) =+$", source, re.M)

    named = {name for row in rows for name in row.split(", ")}

    assert len(named) > 10
    # A title may be cut after its first words.
    assert [name for name in sorted(named) if not any(t.startswith(name) for t in titles)] == []


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (DOCS / "pictures").iterdir()}
    assert {name: size for name, size in sizes.items() if size > 150_000} == {}
