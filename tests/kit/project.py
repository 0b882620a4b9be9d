"""The project under test: its folder, its scripts as modules, small things for every test."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

Json = Any
REPO = Path(__file__).resolve().parents[2]
#: Files that tests compare with, or read.
DATA = REPO / "tests" / "kit" / "data"
#: What real versions of claude have printed, line by line.
TRANSCRIPTS = DATA / "transcripts"


def free_port() -> int:
    """A port that nobody has, for a server that is started later. It is none of those that the
    system gives to whoever asks for any: others would get it meanwhile."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue  # Somebody has it.
            return port


def load_script(name: str) -> ModuleType:
    """A top-level script as a module, loaded once. Its name with or without the last ".py"."""
    path = REPO / name if name.endswith(".py") else REPO / f"{name}.py"
    module_name = path.stem.replace(".", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up there while it is being executed.
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def run_compiled(script: Path) -> list[str]:
    """Return the arguments for Python that run the `main` of a script, which it compiles only once.

    As a program a script is compiled at every start, which takes longer than most tests; as a
    module it is not."""
    return ["-c", f"import sys; sys.path.insert(0, {str(script.parent)!r}); "
                  f"import {script.stem}; {script.stem}.main(sys.argv[1:])"]


def clean_env(**more: str) -> dict[str, str]:
    """The few inherited variables that a program needs, and `more`."""
    kept = ("PATH", "LANG", "VIRTUAL_ENV")
    inherited = {name: os.environ[name] for name in kept if name in os.environ}
    return {"LANG": "C.UTF-8", **inherited, **more}


def read_json_lines(path: Path) -> list[Json]:
    """The complete lines of a file, [] if it does not exist."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1]]
