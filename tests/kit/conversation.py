"""A client in the middle of a conversation, and how the server came to its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from dialects import TOOL_DIALECTS, Answer, Dialect, Result, Tool, dialect_name
from rig import ANSWER_S, MODEL, Rig
from waiting import eventually

Json = Any

EVERY_DIALECT = pytest.mark.parametrize("dialect", TOOL_DIALECTS, ids=dialect_name)
WHOLE_AND_STREAMED = pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])


class Conversation:
    """A client in the middle of a conversation, which it sends whole with every request."""

    def __init__(
        self, rig: Rig, dialect: Dialect, tools: Sequence[Tool] = (), system: str = "",
        streams: bool = False, **fields: Json,
    ) -> None:
        self.rig = rig
        self.dialect = dialect
        self.tools = tools
        self.system = system
        #: Further fields of every request.
        self.fields = {"stream": True, **fields} if streams else fields
        self.messages: list[Json] = []

    def branch(self) -> Conversation:
        """Return another client that knows the same conversation."""
        other = Conversation(self.rig, self.dialect, self.tools, self.system, **self.fields)
        other.messages = json.loads(json.dumps(self.messages))
        return other

    def body(self, **fields: Json) -> dict[str, Json]:
        """Return the next request."""
        dialect = self.dialect
        messages = [*dialect.system_messages(self.system), *self.messages]
        body = {"model": MODEL, dialect.field: messages, **dialect.system_fields(self.system),
                **self.fields, **fields}
        if self.tools:
            body["tools"] = dialect.tools(self.tools)
        return body

    def send(self, **fields: Json) -> Answer:
        """Send the conversation as it stands. The answer becomes part of it."""
        reply = self.rig.server.call(
            "POST", self.dialect.path, self.body(**fields), timeout_s=ANSWER_S)
        answer = self.dialect.read_answer(reply)
        # Failures that a test expects have a status.
        assert reply.status != 200 or not answer.error, reply.text[-500:]
        self.messages += answer.repeated
        return answer

    def ask(self, content: Json, **fields: Json) -> Answer:
        """Send a message of the user."""
        self.messages.append({"role": "user", "content": content})
        return self.send(**fields)

    def send_results(self, results: Sequence[tuple[str, Result]], **fields: Json) -> Answer:
        """Send tool results, by the ids of their calls."""
        self.messages += self.dialect.results(results)
        return self.send(**fields)


def path_of(rig: Rig, answer: Answer) -> str:
    """Return how the server came to the answer: fresh, continued, rewound or rebuilt."""
    def found() -> list[str]:
        return [str(entry["path"]) for entry in rig.server.log_entries("answer_finished")
                if entry["request_id"] == answer.request_id]

    return eventually(found)[0]


def is_continued(rig: Rig, answers: Iterable[Answer]) -> bool:
    """Return whether a conversation was continued from its beginning, which may have been put to
    a process that had forgotten another one."""
    first, *later = [path_of(rig, answer) for answer in answers]
    return first in ("fresh", "rewound") and set(later) <= {"continued"}


def stats(rig: Rig) -> dict[str, int]:
    """Return the server's counters."""
    found: dict[str, int] = rig.server.call("GET", "/health").json()["stats"]
    return found
