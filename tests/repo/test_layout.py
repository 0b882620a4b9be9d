"""The shape of the scripts and of the tests: what style and order the code promises to keep."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Iterator, NamedTuple, Union

import pytest

from project import REPO

SCRIPTS = sorted(REPO.glob("*.py"))
SERVER = REPO / "ocp_server.py"
TESTS = REPO / "tests"
#: Where test files lie.
ROOMS = ("unit", "server", "channels", "contract", "scripts", "clients", "repo")
#: What a test in unit has no use for: it starts no process. A module, or a name in one.
STARTS_PROCESSES = {
    "subprocess", "multiprocessing", "pty", "forks", "server", "rig", "browser", "claude_driver",
    "shell_claude", "processes.run_to_end", "os.fork", "os.posix_spawn", "os.system",
}
#: Fixtures of tests/conftest.py that start a server.
SERVER_FIXTURES = {"server", "shared_server"}
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 40
MAX_CLASS_LINES = 400

#: How many lines each section of ocp_server.py is meant to have, and how far beyond it may be.
SECTION_LINES = {
    "Small tools": 280, "Settings": 680, "Errors": 380, "Log": 320, "Models": 760,
    "Turns and events": 820, "Store": 430, "Tenants": 90, "Keys and callers": 660,
    "Prices and limits": 190, "Usage rows": 290, "Usage and quotas": 400, "Tags": 120,
    "Patterns": 100, "JSON Schema": 580,
    "Model schemas": 440, "Request fields": 390, "Attachments": 370, "Content": 380, "Tools": 560,
    "Dialects": 370, "Chat completions": 420, "Messages": 240, "Response items": 300,
    "Responses": 460, "Claude protocol": 220, "Claude input": 410, "Plan and failures": 320,
    "Claude answers": 640, "Claude program": 630, "Skills": 195, "Own tools": 480,
    "Agents of tenants": 255,
    "Claude process": 640, "Gate": 160,
    "Conversations": 160, "Process pool": 400, "Sessions and responses": 250, "Cache": 250,
    "Account": 300, "Logins": 90, "Sign-in": 220, "Alerts": 440, "Metrics": 140,
    "Connections": 390,
    "The original OCP": 290, "State folder": 175, "Capture": 240, "Jobs": 320,
    "Running turns": 480, "Answering": 350, "App": 420, "Routes": 80, "HTTP server": 780,
    "Dashboard": 70, "API endpoints": 360, "Health and logs": 220, "Key endpoints": 390,
    "Tenant endpoints": 310, "Usage endpoints": 330,
    "Management endpoints": 210, "Pages and OpenAPI": 280,
    "Table of routes": 62, "Demo claude": 190, "Command line": 355,
}
#: The same of ocp_channels.py.
CHANNELS_SECTION_LINES = {
    "Small tools": 90, "Contracts": 180, "Settings": 360, "Log": 60, "Store": 230, "HTTP": 345,
    "WebSocket": 190, "QR code": 190, "Text": 220, "Opcode gateway": 200, "Telegram": 280,
    "Discord": 200, "QQ": 220, "DingTalk": 280, "WeChat": 320, "Channel table": 10, "Access": 130,
    "Agent": 240, "Callbacks": 180, "Turns": 780, "App": 280, "Plugins": 70, "Command line": 620,
}
SECTION_OVERRUN = 0.25

#: Modules of 3.9 that 3.13 no longer has.
REMOVED_MODULES = {
    "aifc", "asynchat", "asyncore", "audioop", "binhex", "cgi", "cgitb", "chunk", "crypt",
    "distutils", "formatter", "imghdr", "imp", "lib2to3", "mailcap", "msilib", "nis", "nntplib",
    "ossaudiodev", "parser", "pipes", "smtpd", "sndhdr", "spwd", "sunau", "symbol", "telnetlib",
    "uu", "xdrlib",
}
#: What a script may import: in the standard library of 3.9 and of every later version.
#: An interpreter can list only its own modules, and 3.9 not even these.
ALLOWED_MODULES = {
    "__future__", "argparse", "array", "ast", "base64", "binascii", "bisect", "calendar", "codecs",
    "collections", "concurrent", "contextlib", "copy", "csv", "ctypes", "dataclasses", "datetime",
    "difflib", "email", "enum", "errno", "fcntl", "filecmp", "fnmatch", "functools", "gc",
    "getpass", "glob", "grp", "gzip", "hashlib", "heapq", "hmac", "html", "http", "importlib",
    "inspect", "io", "ipaddress", "itertools", "json", "logging", "math", "mimetypes", "operator",
    "os", "pathlib", "platform", "plistlib", "pprint", "pwd", "queue", "random", "re", "resource",
    "secrets", "select", "selectors", "shlex", "shutil", "signal", "site", "socket", "socketserver",
    "sqlite3", "ssl", "stat", "string", "struct", "subprocess", "sys", "sysconfig", "tarfile",
    "tempfile", "textwrap", "threading", "time", "traceback", "types", "typing", "unicodedata",
    "urllib", "uuid", "warnings", "weakref", "webbrowser", "zipfile", "zlib",
}
#: Names that a section of ocp_server.py may use although a later one defines them.
ALLOWED_FORWARD: frozenset[str] = frozenset()

AnyFunction = Union[ast.FunctionDef, ast.AsyncFunctionDef]

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.name))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), path.name, feature_version=(3, 9))


# ---------------------------------------------------------------------------
# Every script
# ---------------------------------------------------------------------------

_OF_THE_SERVICE = ["ocp.py", "setup.py_install.py", "uninstall.py"]
_WITH_TENANTS = sorted([*_OF_THE_SERVICE, "ocp_tenants.py"])
#: Scripts that have to work alone, and therefore hold copies of a few functions.
SHARED = {
    "drain": ["ocp.py", "setup.py_install.py"],
    "exit": sorted([*_WITH_TENANTS, "ocp_channels.py"]), "run_program": _OF_THE_SERVICE,
    "write_whole": sorted([*_WITH_TENANTS, "ocp_channels.py"]),
    "read_record": _WITH_TENANTS, "confirm": _WITH_TENANTS,
    "env_file": ["ocp.py", "ocp_server.py", "ocp_tenants.py", "setup.py_install.py"],
    "os_reason": ["ocp_tenants.py", "setup.py_install.py", "uninstall.py"],
    "wrong_lines": ["ocp_server.py", "setup.py_install.py"],
    "removed_settings": ["ocp_server.py", "setup.py_install.py"],
    "shown_path": ["setup.py_install.py", "uninstall.py"],
    "http_json": ["ocp.py", "ocp_tenants.py", "setup.py_install.py"],
    "any_certificate": ["ocp.py", "ocp_tenants.py", "setup.py_install.py"],
    "certificate": ["ocp.py", "ocp_connect.py", "ocp_server.py"],
}


def shared_pieces(path: Path) -> dict[str, str]:
    """What a script has between the marks of shared pieces, by name."""
    found = re.findall(r"(?s)# --- shared: (\w+)\n(.*?)# --- end shared\n", path.read_text())
    names = [name for name, _ in found]
    assert len(names) == len(set(names)) == path.read_text().count("# --- shared")
    return dict(found)


def test_what_scripts_share_is_the_same_to_the_byte() -> None:
    pieces = {path.name: shared_pieces(path) for path in SCRIPTS}
    holders = {name: [script for script in sorted(pieces) if name in pieces[script]]
               for name in {name for found in pieces.values() for name in found}}
    assert holders == SHARED
    for name, scripts in holders.items():
        assert len({pieces[script][name] for script in scripts}) == 1, name


@pytest.mark.parametrize("name", [*_WITH_TENANTS, "ocp_channels.py"])
def test_the_index_of_a_script_lists_its_sections_in_order(name: str) -> None:
    text = (REPO / name).read_text()
    titles = re.findall(r"^# ==== (\d+)\. (.+?) =+$", text, re.M)
    head = text.partition("from __future__")[0]
    assert re.findall(r"^#? +(\d+)\. +(.+?)(?:  .*)?$", head, re.M) == titles
    assert [int(number) for number, _ in titles] == list(range(1, len(titles) + 1))


@each_script
def test_source_is_ascii_and_not_too_wide(path: Path) -> None:
    wrong = [
        f"{path.name}:{number}" for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if not line.isascii() or len(line) > MAX_COLUMNS or line != line.rstrip()]
    assert not wrong


@each_script
def test_source_parses_as_python_3_9(path: Path) -> None:
    assert tree_of(path).body


@each_script
def test_module_has_a_docstring_and_lazy_annotations(path: Path) -> None:
    tree = tree_of(path)
    futures = [name.name for node in tree.body if isinstance(node, ast.ImportFrom)
               and node.module == "__future__" for name in node.names]
    assert ast.get_docstring(tree)
    assert "annotations" in futures


#: Docstrings that are still to be made alike.
MIXED_DOCSTRINGS = {"ocp_server.py", "ocp_channels.py"}


@pytest.mark.parametrize("path", [
    path for path in SCRIPTS if path.name not in MIXED_DOCSTRINGS], ids=lambda path: path.name)
def test_a_docstring_says_raises_of_the_errors_after_what_it_returns(path: Path) -> None:
    wrong = [node.name for node in ast.walk(tree_of(path))
             if isinstance(node, (ast.ClassDef, ast.FunctionDef))
             and re.search(r"\.\s+Raise\b", ast.get_docstring(node) or "")]
    assert not wrong


@each_script
def test_no_global_statement(path: Path) -> None:
    lines = [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)]
    assert not lines


@each_script
def test_no_function_is_too_long(path: Path) -> None:
    too_long = longer_than(MAX_FUNCTION_LINES, path, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not too_long, "a long function does several things: give each of them a name"


@each_script
def test_no_class_is_too_long(path: Path) -> None:
    too_long = longer_than(MAX_CLASS_LINES, path, ast.ClassDef)
    assert not too_long, "a long class is several objects: move the state of one into a new class"


def longer_than(max_lines: int, path: Path, *kinds: type[ast.stmt]) -> dict[str, int]:
    """The functions or classes of a script that have more lines, and how many each has."""
    found = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, kinds):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > max_lines:
                found[f"{path.name}:{node.lineno} {node.name}"] = lines  # type: ignore[attr-defined]
    return found


@each_script
def test_every_parameter_and_result_is_annotated(path: Path) -> None:
    bare = [
        f"{path.name}:{node.lineno} {node.name}" for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and not is_annotated(node)]
    assert not bare


def is_annotated(node: AnyFunction) -> bool:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [each for each in (arguments.vararg, arguments.kwarg) if each]
    return node.returns is not None and all(
        each.annotation or each.arg in ("self", "cls") for each in named)


@each_script
def test_imports_are_the_standard_library_of_3_9_to_3_13(path: Path) -> None:
    assert not imported_modules(tree_of(path)) - ALLOWED_MODULES


def test_the_allowed_modules_are_there_now_and_stay() -> None:
    assert not ALLOWED_MODULES & REMOVED_MODULES
    assert not [name for name in sorted(ALLOWED_MODULES) if importlib.util.find_spec(name) is None]


@each_script
def test_no_script_imports_another_one(path: Path) -> None:
    scripts = {each.name.partition(".")[0] for each in SCRIPTS}
    assert not imported_modules(tree_of(path)) & scripts


def imported_modules(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a script has no package to import from"
            found.add((node.module or "").partition(".")[0])
    return found


# ---------------------------------------------------------------------------
# The sections of ocp_server.py and ocp_channels.py
# ---------------------------------------------------------------------------

CHANNELS = REPO / "ocp_channels.py"
each_in_sections = pytest.mark.parametrize("path", (SERVER, CHANNELS), ids=lambda path: path.name)


#: What each section is meant to have, by the script.
MEANT_LINES = {SERVER: SECTION_LINES, CHANNELS: CHANNELS_SECTION_LINES}


class Section(NamedTuple):
    number: int
    title: str
    #: Line of the banner.
    line: int


def sections(path: Path) -> list[Section]:
    found = []
    for line, text in enumerate(path.read_text().split("\n"), 1):
        banner = re.match(r"# ==== (\d+)\. (.+?) =+$", text)
        if banner:
            found.append(Section(int(banner[1]), banner[2], line))
    return found


@each_in_sections
def test_banners_are_complete_and_full_width(path: Path) -> None:
    lines = path.read_text().split("\n")
    wrong = [line for line in lines if line.startswith("# ====")
             and not re.fullmatch(r"# ==== \d+\. \S.*\S =+", line)]
    narrow = [lines[section.line - 1] for section in sections(path)
              if len(lines[section.line - 1]) != 79]
    assert not wrong
    assert not narrow


def test_sections_are_numbered_in_order_and_listed_in_the_docstring() -> None:
    titles = [(section.number, section.title) for section in sections(SERVER)]
    docstring = ast.get_docstring(tree_of(SERVER)) or ""
    index = [(int(number), title.strip())
             for number, title in re.findall(r"^ *(\d+)\. +(.+?)(?:  .*)?$", docstring, re.M)]
    assert [number for number, _ in titles] == list(range(1, len(titles) + 1))
    assert titles
    assert index == titles


@each_in_sections
def test_every_section_says_what_it_owns(path: Path) -> None:
    lines = path.read_text().split("\n")
    size = section_lines(path)
    silent = [section.title for section in sections(path)
              if size[section.title] > 3 and not lines[section.line].startswith("# ")]
    assert not silent


def section_lines(path: Path) -> dict[str, int]:
    """How many lines each section has, by its title."""
    found = sections(path)
    ends = [*(section.line for section in found[1:]), path.read_text().count("\n") + 1]
    return {section.title: end - section.line for section, end in zip(found, ends)}


@each_in_sections
def test_every_section_has_a_size_that_it_is_meant_to_have(path: Path) -> None:
    missing = [title for title in section_lines(path) if title not in MEANT_LINES[path]]
    assert not missing, "put the size that a new section is meant to have into SECTION_LINES"


@each_in_sections
def test_no_section_has_outgrown_its_size(path: Path) -> None:
    meant = MEANT_LINES[path]
    outgrown = {
        title: f"{lines} lines, meant to have {meant[title]}"
        for title, lines in section_lines(path).items()
        if lines > meant.get(title, lines) * (1 + SECTION_OVERRUN)}
    assert not outgrown, (
        "first take something away: what is written twice, what no caller needs, what a table "
        "says shorter. Then split a section that has come to own two things. Raise its number in "
        "SECTION_LINES only when what it owns has grown, and say why in the commit")


@each_in_sections
def test_no_section_uses_a_name_of_a_later_one(path: Path) -> None:
    tree = tree_of(path)
    starts = [section.line for section in sections(path)]

    def section_at(line: int) -> int:
        return sum(start <= line for start in starts)

    home = {name: section_at(line) for name, line in top_level_names(tree)}
    forward = sorted({
        f"line {node.lineno}: {node.id} of section {home[node.id]}"
        for node in used_names(tree)
        if home.get(node.id, 0) > section_at(node.lineno) and node.id not in ALLOWED_FORWARD})
    assert not forward


@each_script
def test_no_name_of_a_script_is_defined_twice(path: Path) -> None:
    names = [name for node in tree_of(path).body for name in set(names_defined_by(node))
             if not isinstance(node, (ast.If, ast.Try))]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, "the second definition is in force for users of the first one too"


def test_every_allowed_exception_is_still_needed() -> None:
    assert not ALLOWED_FORWARD - {name for name, _ in top_level_names(tree_of(SERVER))}


def top_level_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every name that the module defines, with the line where it does so first."""
    seen = set()
    for node in tree.body:
        for name in names_defined_by(node):
            if name not in seen:
                seen.add(name)
                yield name, node.lineno


def names_defined_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Attribute):
                # Belongs to what was defined before.
                continue
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
    elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from names_defined_by(child)


def used_names(tree: ast.AST, local: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every name that is read below `tree` and means one of the module's.

    Annotations are left out, because they are never evaluated. `local` are the names that a
    function around has for itself."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            # Defaults and decorators belong to the scope around the function.
            outside = [*child.args.defaults, *child.args.kw_defaults]
            outside += getattr(child, "decorator_list", [])
            for each in outside:
                yield from used_names(ast.Expression(each), local) if each else ()
            body = child.body if isinstance(child.body, list) else [child.body]
            inside = local | local_names(child)
            yield from used_names(ast.Module(body, []), inside)  # type: ignore[arg-type]
        elif isinstance(child, ast.AnnAssign):
            parts = [child.target] + ([child.value] if child.value else [])
            for part in parts:
                yield from used_names(ast.Expression(part), local)
        elif isinstance(child, ast.Name):
            if isinstance(child.ctx, ast.Load) and child.id not in local:
                yield child
        else:
            yield from used_names(child, local)


def local_names(function: Union[AnyFunction, ast.Lambda]) -> frozenset[str]:
    """The names that a function has for itself: its parameters and what it defines."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
             *(each for each in (arguments.vararg, arguments.kwarg) if each)]
    defined = {each.arg for each in named}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or (
                isinstance(node, ast.ExceptHandler) and node.name):
            defined.add(str(node.name))
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
    if not isinstance(function, ast.Lambda):
        # Its own name belongs to the scope around it.
        defined.discard(function.name)
    return frozenset(defined)


def test_the_search_for_used_names_sees_all_depths() -> None:
    tree = ast.parse(
        "def f(a: Kind, b=Default) -> Kind:\n"
        "    here: Kind = Deep\n"
        "    def g(): return lambda c=Lazy: (a, here, c, Deeper)\n"
        "class C(Base):\n"
        "    field: Kind = Value\n"
        "    @Mark\n"
        "    def m(self): return [x for x in Many if x is Same]\n"
        "Top = f'{Shown}'\n")
    used = {node.id for node in used_names(tree)}
    assert used == {"Default", "Deep", "Lazy", "Deeper", "Base", "Value", "Mark", "Many",
                    "Same", "Shown"}


# ---------------------------------------------------------------------------
# The tests
# ---------------------------------------------------------------------------

TEST_FILES = sorted(TESTS.rglob("test_*.py"))


def test_every_test_file_lies_in_a_room() -> None:
    elsewhere = [str(path.relative_to(TESTS)) for path in TEST_FILES
                 if path.parent not in [TESTS / room for room in ROOMS]]
    assert TEST_FILES
    assert not elsewhere


def test_no_file_of_the_tests_imports_from_a_test_file() -> None:
    names = {path.stem for path in TEST_FILES} | {"conftest", "tests", *ROOMS} - {"server"}
    wrong = [f"{path.relative_to(TESTS)}: {name}" for path in sorted(TESTS.rglob("*.py"))
             for name in re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.M)
             if name.startswith(".") or name.partition(".")[0] in names]
    assert not wrong


def test_what_is_in_unit_starts_no_process() -> None:
    wrong = [f"{path.name}: {what}" for path in sorted((TESTS / "unit").glob("*.py"))
             for what in sorted(starters(ast.parse(path.read_text())))]
    assert not wrong


def starters(tree: ast.Module) -> set[str]:
    """What a test file uses of that which starts processes."""
    used = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            used |= {f"a fixture {each.arg}" for each in node.args.args}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("usefixtures"):
            used |= {f"a fixture {each.value}" for each in node.args
                     if isinstance(each, ast.Constant)}
    return used & (STARTS_PROCESSES | {f"a fixture {name}" for name in SERVER_FIXTURES})


def imported_names(tree: ast.AST) -> set[str]:
    """Modules that are imported, and names that are imported from one, each with its module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize(("source", "found"), [
    ("from server import running_server", {"server"}),
    ("def test_x():\n    import subprocess as s", {"subprocess"}),
    ("from processes import descriptors", set()),
    ("from processes import run_to_end as run", {"processes.run_to_end"}),
    ("import os\nos.fork()", {"os.fork"}),
    ("def test_x(shared_server): pass", {"a fixture shared_server"}),
    ("@pytest.mark.usefixtures('server')\ndef test_x(): pass", {"a fixture server"}),
])
def test_the_search_for_what_starts_processes_sees_every_form(
    source: str, found: set[str]
) -> None:
    assert starters(ast.parse(source)) == found
