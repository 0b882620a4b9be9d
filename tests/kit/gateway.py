"""A running ocp_channels.py with its own OCP_HOME, between a fake platform and a fake agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

from fake_agent import FakeAgent
from fake_telegram import FakeTelegram
from forks import Fork, forker
from processes import Ran
from project import REPO, clean_env
from waiting import eventually

Json = Any
SCRIPT = REPO / "ocp_channels.py"
HURRIED = Path(__file__).with_name("hurried_gateway.py")


class Gateway:
    """The program in a folder of its own. Its path is short, because a socket's has to be."""

    def __init__(self, telegram: Optional[FakeTelegram], agent: FakeAgent,
                 top: Optional[Json] = None, channels: Optional[Json] = None,
                 **channel: Json) -> None:
        """`channels` are other ones than the account of Telegram, which has the settings of
        `channel`."""
        self.telegram: Any = telegram
        self.agent = agent
        self.home = Path(tempfile.mkdtemp(prefix="ocp-ch-", dir="/tmp"))
        self.settings: Json = {
            "agentUrl": agent.url, **(top or {}),
            "channels": channels or {"telegram": {
                "botToken": self.telegram.token, "apiRoot": self.telegram.url,
                "allowFrom": ["1000"], **channel}}}
        self.process: Optional[Fork] = None

    def __enter__(self) -> Gateway:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        return {**clean_env(), "HOME": str(self.home), "OCP_HOME": str(self.home)}

    def run(self, *arguments: str, env: Optional[Mapping[str, str]] = None) -> Ran:
        """Run a command to its end."""
        return forker(SCRIPT).run(arguments, {**self.env, **(env or {})}, self.home, 60)

    def write(self) -> None:
        """Write the settings."""
        path = self.home / "channels.json"
        path.write_text(json.dumps(self.settings))
        path.chmod(0o600)

    def start(self, *arguments: str, pauses: Sequence[str] = ()) -> Gateway:
        """Start it in the foreground, and wait until it runs. `pauses` are other ones than its own,
        such as "_DRAIN_S=1"."""
        self.write()
        # A killed one leaves its socket behind.
        (self.home / "channels.sock").unlink(missing_ok=True)
        nothing = Path(os.devnull)
        self.process = forker(HURRIED if pauses else SCRIPT).fork(
            [*pauses, "start", "--log-file", *arguments], self.env, self.home, nothing, nothing)
        eventually(lambda: (self.home / "channels.sock").exists())
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def terminate(self) -> int:
        """End it in good order, and return its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(40)
        self.process = None
        return code

    def status(self) -> Json:
        """What `status --json` prints."""
        return json.loads(self.run("status", "--json").stdout)

    @property
    def log(self) -> str:
        return (self.home / "channels.log").read_text()

    def rows(self, statement: str) -> list[Any]:
        """What the database has."""
        if not os.path.exists(self.home / "channels.db"):
            return []
        with closing(sqlite3.connect(self.home / "channels.db", timeout=10)) as database:
            return database.execute(statement).fetchall()
