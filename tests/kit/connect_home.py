"""A HOME on which ocp_connect.py works, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from project import load_script

connect = load_script("ocp_connect")
KEY = "ocp_" + "s3cret" * 5 + "42"
MODELS = (
    connect.Model("claude-opus-5-5", "Claude Opus 5.5", 1_000_000, 128_000, True),
    connect.Model("claude-sonnet-5-5", "Claude Sonnet 5.5", 1_000_000, 128_000, True),
    connect.Model("claude-haiku-4-5", "Claude Haiku 4.5", 200_000, 32_000, False),
)
SERVER = connect.Server("http://192.0.2.7:3456", "1.2.3", MODELS, KEY)
OTHER = SERVER._replace(url="http://192.0.2.8:3456")


class Home:
    """A home folder, and ocp_connect at work in it."""

    def __init__(self, folder: Path, platform: str = "linux", has_systemd: bool = False) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.machine = connect.Machine(
            str(folder), {"PATH": str(folder / "bin"), "SHELL": "/bin/bash"}, platform,
            has_systemd)

    def context(
        self, record: Any, server: Any = SERVER, role: Any = connect.Role.AUTO,
        allow_fallback: bool = False, **more: Any,
    ) -> Any:
        def original_text(path: str) -> str:
            original, _ = connect.original_content(
                connect.read_bytes(path), record.files.get(path), record)
            return str(connect.decoded(original))

        return connect.Context(
            self.machine, server, role, allow_fallback, True, original_text, **more)

    def plan(self, *tools: str, **more: Any) -> Any:
        record = connect.load_record(self.machine.state_folder)
        chosen = [tool for tool in connect.TOOLS if tool.name in tools]
        context = self.context(record, **{"asked": tools, **more})
        return connect.make_plan(context, chosen, record)

    def connect(self, *tools: str, **more: Any) -> Any:
        """Plans and writes; nothing may fail."""
        record = connect.load_record(self.machine.state_folder)
        chosen = [tool for tool in connect.TOOLS if tool.name in tools]
        context = self.context(record, **{"asked": tools, **more})
        plan = connect.make_plan(context, chosen, record)
        writer = connect.Writer(self.machine, record, KEY)
        writer.connect(plan, "url")
        assert not writer.failures
        return plan

    def undo(self, *tools: str) -> Any:
        record = connect.load_record(self.machine.state_folder)
        plan = connect.plan_undo(record, tools)
        writer = connect.Writer(self.machine, record, KEY)
        writer.undo(plan)
        assert not writer.failures
        return plan

    def put(self, path: str, content: bytes | str) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return target

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.folder)): path.read_bytes()
                for path in self.folder.rglob("*") if path.is_file()}
