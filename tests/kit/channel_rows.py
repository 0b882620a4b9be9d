"""Accounts, messages and a made-up channel, for tests of what lies between platforms and agents."""

from __future__ import annotations

import itertools
import json
import queue
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, Mapping, Optional

from project import load_script
from waiting import eventually

Json = Any
channels = load_script("ocp_channels")
# Nobody here types: a lane need not wait long for the rest of a thought.
channels._QUIET_S = 0.05


def message(text: str = "hello", *, id: str = "1", sender: str = "1000", chat: str = "",
            kind: str = "direct", **fields: Json) -> Any:
    """A message with defaults for everything."""
    values = {"sender_name": f"Person {sender}", "is_mentioned": kind == "direct", "quoted": "",
              "attachments": (), "at_s": 0.0, "route": {"to": chat or sender}, **fields}
    return channels.Message(id=id, chat=chat or sender, kind=kind, sender=sender, text=text,
                            **values)


class MadeUp(channels.Channel):  # type: ignore[name-defined,misc]
    """A platform without a network: it keeps what it is told, and fails as it is told."""

    def __init__(self, tools: Any, http: Any) -> None:
        super().__init__(tools, http)
        #: Texts in order; an edit as ("id", text).
        self.sent: list[Any] = []
        self.failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
        self.typed = 0

    def probe(self) -> str:
        return "@made_up"

    def run(self) -> None:
        self.tools.note_frame()
        self.tools.stop.wait()

    def send(self, route: Json, part: Any) -> str:
        self._fail()
        self.sent.append(part.text)
        return str(len(self.sent))

    def edit(self, route: Json, message_id: str, part: Any) -> None:
        self._fail()
        self.sent.append((message_id, part.text))

    def type(self, route: Json, is_over: bool = False) -> None:
        self.typed += not is_over

    def _fail(self) -> None:
        try:
            raise self.failures.get_nowait()
        except queue.Empty:
            pass


ROW = channels.Row("made-up", ("mu",), "Made up", MadeUp, 4000, {"token": "MADE_UP_TOKEN"},
                   {"groups": channels.mapping_value, "guilds": channels.mapping_value})
MadeUp.row = ROW


def settings_of(path: Any, environ: Optional[Mapping[str, str]] = None, row: Any = ROW) -> Any:
    """The settings of a file, whose channels are the made-up one."""
    return channels.parse_settings(channels.read_file(str(path)), str(path), environ or {}, [row])


def account(row: Any = ROW, **values: Json) -> Any:
    """An account with these settings of its own."""
    content = {"channels": {row.id: {"token": "secret-token", **values}}}
    return channels.parse_settings(content, "none", {}, [row]).accounts[0]


class Chat:
    """A gateway in this process, with one account of the made-up channel."""

    def __init__(self, agent_url: str, top: Optional[Json] = None, row: Any = ROW,
                 **values: Json) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ocp-ch-", dir="/tmp"))
        path = self.path = self.folder / "channels.json"
        path.write_text(json.dumps({
            "agentUrl": agent_url, "callbackPort": 0, **(top or {}),
            "channels": {row.id: {"token": "secret-token", "allowFrom": ["1000"], **values}}}))
        path.chmod(0o600)
        self.app = channels.App(
            str(self.folder), lambda: settings_of(path, row=row),
            channels.Log(str(self.folder / "channels.log"), None), {})
        self._thread = threading.Thread(target=self.app.run)
        self._ids = itertools.count(1)

    def __enter__(self) -> Chat:
        self._thread.start()
        eventually(lambda: self.app.lanes.accounts)
        self.live = next(iter(self.app.lanes.accounts.values()))
        eventually(lambda: self.live.status == "running")
        self.channel: MadeUp = self.live.channel
        self.store = self.app._store
        return self

    def __exit__(self, *_: object) -> None:
        self.app.is_over.set()
        self._thread.join()
        shutil.rmtree(self.folder)

    def say(self, text: str, **fields: Json) -> None:
        """Let somebody write."""
        self.live.accept(message(text, **{"id": str(next(self._ids)), **fields}))

    def outbox(self) -> list[tuple[str, str]]:
        """Status and text of every part."""
        return [(row["status"], row["text"]) for row in self.store.rows(
            "SELECT status, text FROM outbox ORDER BY id")]
