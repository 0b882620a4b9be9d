"""A home of the original OCP, a Node program of the version 3: its database, as it makes it."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Optional

Json = Any

#: The schema of its version 3.14; later ones have added the limits.
_SCHEMA = """
CREATE TABLE api_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT UNIQUE NOT NULL,
    name TEXT NOT NULL,
    created_at TEXT NOT NULL DEFAULT (datetime('now')),
    revoked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE usage_log (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key_id INTEGER REFERENCES api_keys(id),
    key_name TEXT DEFAULT 'anonymous',
    model TEXT,
    prompt_chars INTEGER DEFAULT 0,
    response_chars INTEGER DEFAULT 0,
    elapsed_ms INTEGER DEFAULT 0,
    success INTEGER DEFAULT 1,
    created_at TEXT NOT NULL DEFAULT (datetime('now'))
);
CREATE INDEX idx_usage_created ON usage_log(created_at);
CREATE INDEX idx_usage_key ON usage_log(key_id);
CREATE TABLE response_cache (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    hash TEXT UNIQUE NOT NULL,
    model TEXT,
    response TEXT NOT NULL,
    created_at TEXT NOT NULL DEFAULT (datetime('now')),
    last_hit_at TEXT,
    hits INTEGER DEFAULT 0
);
"""
_LIMITS = "".join(f"ALTER TABLE api_keys ADD COLUMN quota_{period} INTEGER DEFAULT NULL;\n"
                  for period in ("daily", "weekly", "monthly"))


def original_key(seed: object) -> str:
    """A key in the form of the original, always the same for the same seed."""
    return "ocp_" + hashlib.sha256(str(seed).encode()).hexdigest()[:32]


def original_time(at_s: float) -> str:
    """A time as the original's SQLite writes it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at_s))


class OriginalHome:
    """The folder ~/.ocp of the original."""

    def __init__(self, folder: Path, *, has_limits: bool = True) -> None:
        """Make the database in this folder, unless there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.database = folder / "ocp.db"
        if self.database.exists():
            return
        with closing(sqlite3.connect(self.database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(_SCHEMA + (_LIMITS if has_limits else ""))
        # As with its own side files, everybody may read it.
        self.database.chmod(0o644)

    def execute(self, statement: str, *values: object) -> int:
        """Change the database; the id of a new row."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            return connection.execute(statement, values).lastrowid or 0

    def insert(self, table: str, **columns: object) -> int:
        marks = ", ".join("?" * len(columns))
        return self.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", *columns.values())

    def key(self, name: str, key: Optional[object] = None, **columns: object) -> str:
        """Make a key; the key itself."""
        secret = original_key(name) if key is None else key
        self.insert("api_keys", key=secret, name=name, **columns)
        return str(secret)

    def usage(self, count: int, key_id: Optional[int], name: str, **columns: object) -> None:
        """Add so many rows of usage, by default of just now."""
        row: Mapping[str, object] = {
            "model": "sonnet", "prompt_chars": 100, "response_chars": 20, "elapsed_ms": 1500,
            "created_at": original_time(time.time()), **columns}
        row = {"key_id": key_id, "key_name": name, **row}
        statement = (f"INSERT INTO usage_log ({', '.join(row)}) "
                     f"VALUES ({', '.join('?' * len(row))})")
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.executemany(statement, [tuple(row.values())] * count)

    def loosen(self) -> None:
        """Let the tables take anything, as those of a damaged or foreign database."""
        columns = {
            "api_keys": "id, key, name, created_at, revoked, quota_daily, quota_weekly, "
                        "quota_monthly",
            "usage_log": "id, key_id, key_name, model, prompt_chars, response_chars, elapsed_ms, "
                         "success, created_at"}
        with closing(sqlite3.connect(self.database)) as connection:
            for table, names in columns.items():
                connection.execute(f"DROP TABLE {table}")
                connection.execute(f"CREATE TABLE {table} ({names})")

    def tables(self) -> dict[str, Sequence[tuple[Json, ...]]]:
        """Everything in its own tables, and how they are defined."""
        return original_content(self.database)


def original_content(database: Path) -> dict[str, Sequence[tuple[Json, ...]]]:
    """Everything in the original's tables of a database, and how they are defined."""
    names = ("api_keys", "usage_log", "response_cache")
    with closing(sqlite3.connect(database)) as connection:
        connection.text_factory = bytes
        found = {name: connection.execute(f"SELECT * FROM {name} ORDER BY id").fetchall()
                 for name in names}
        found["schema"] = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE tbl_name IN (?, ?, ?) ORDER BY name",
            names).fetchall()
    return found
