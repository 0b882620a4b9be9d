"""What a request and a piece of an answer cost the server in processor time.

    python3 bench/cost.py [--before FOLDER] [--rounds 8]

One run, Markdown on stdout. No claude is needed: a program that speaks its protocol prints its
answer at once (a burst), or one piece each millisecond (a trickle). The versions take turns, and
the best round of each counts: other work on the machine only makes rounds slower.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

Json = Any

MODEL = "claude-sonnet-4-6"
#: The conversation of the request: a system prompt, and exchanges with a call of a tool.
MESSAGES, TOOLS = 202, 40
#: How many pieces an answer has, and the option of the scripted claude.
PIECES = {"burst": 20_000, "trickle": 1_500}
#: How often a step is repeated in one process.
REPEATS = 8

_SCRIPTED_CLAUDE = '''
import json, os, sys, time
def put(*lines):
    data = b"".join(json.dumps(line).encode() + b"\\n" for line in lines)
    while data:
        data = data[os.write(1, data):]
def event(kind, **fields):
    return {"type": "stream_event", "event": {"type": kind, **fields}}
if "--version" in sys.argv:
    print("2.1.330 (Claude Code)")
    sys.exit()
usage = {"input_tokens": 1, "output_tokens": 1}
result = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1}
for text in sys.stdin:
    line = json.loads(text)
    if line["type"] == "control_request":
        reply = {"subtype": "success", "request_id": line["request_id"], "response": {}}
        put({"type": "control_response", "response": reply})
    if line["type"] != "user":
        continue
    kind, count = line["message"]["content"][-1]["text"].split()
    put(event("message_start", message={"id": "msg_1", "model": "m", "usage": usage}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}))
    delta = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "word "})
    if kind == "burst":
        put(*[delta] * int(count))
    else:
        for _ in range(int(count)):
            put(delta)
            time.sleep(0.001)
    put(event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage),
        event("message_stop"), result)
'''


# ---------------------------------------------------------------------------
# One request
# ---------------------------------------------------------------------------

def text_of(chars: int, dice: random.Random) -> str:
    """Words of about so many characters."""
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(chars // 6)]
    return " ".join(words)


def request_body() -> bytes:
    """A chat request that continues a long conversation with tools, always the same."""
    dice = random.Random(1)
    messages: list[Json] = [{"role": "system", "content": text_of(12_000, dice)}]
    while len(messages) < MESSAGES - 1:
        number = len(messages)
        arguments = json.dumps({"path": text_of(40, dice), "content": text_of(1000, dice)})
        function = {"name": f"tool_{number % TOOLS}", "arguments": arguments}
        call = {"id": f"call_{number}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": text_of(600, dice)},
            {"role": "assistant", "content": text_of(200, dice), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": text_of(6600, dice)},
            {"role": "assistant", "content": text_of(2200, dice)},
        ]
    messages.append({"role": "user", "content": text_of(600, dice)})
    tools = []
    for number in range(TOOLS):
        fields = {text_of(12, dice): {"type": "string", "description": text_of(60, dice)}
                  for _ in range(8)}
        schema = {"type": "object", "properties": fields}
        tools.append({"type": "function", "function": {
            "name": f"tool_{number}", "description": text_of(400, dice), "parameters": schema}})
    body = {"model": MODEL, "stream": True, "messages": messages, "tools": tools}
    return json.dumps(body).encode("ascii")


def load_server(tree: Path) -> Json:
    """The module ocp_server.py of a version."""
    spec = importlib.util.spec_from_file_location("measured_server", tree / "ocp_server.py")
    if spec is None or spec.loader is None:
        raise common.BenchError(f"no ocp_server.py in {tree}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def steps_of(ocp: Json, tree: Path) -> dict[str, Callable[[Json], Json]]:
    """The steps of a continued request in their order; each gets the Turn."""
    data = request_body()
    limits = ocp.Limits(False, 10**7, 100, 10**8)
    parsing = ocp.ParseEnvironment(
        ocp.load_models(str(tree)), MODEL, limits, recall=None, item=None,
        session=lambda *_: [])
    return {
        "parse": lambda _: ocp.CHAT.parse(ocp.from_json(data), parsing),
        "truncate": lambda turn: ocp.truncate_to_budget(turn, 10**7)[0],
        "estimate": ocp.estimate_tokens,
        "history": lambda turn: ocp.history_of(turn, "key:1", ""),
        "usage row": ocp.prompt_chars,
    }


def measure_request(tree: Path) -> dict[str, float]:
    """The processor seconds of each step, at best."""
    steps = steps_of(load_server(tree), tree)
    best_s = dict.fromkeys(steps, float("inf"))
    for _ in range(REPEATS):
        turn = None
        for name, step in steps.items():
            started_s = time.process_time()
            found = step(turn)
            best_s[name] = min(best_s[name], time.process_time() - started_s)
            turn = found if name in ("parse", "truncate") else turn
    return best_s


def request_in_a_process(tree: Path) -> dict[str, float]:
    """measure_request in a process of its own, so that the versions have nothing in common."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", str(tree)], check=True, stdout=subprocess.PIPE,
        timeout=common.PATIENCE_S)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------------------
# One piece of an answer
# ---------------------------------------------------------------------------

def write_scripted_claude(folder: Path) -> Path:
    """The program in `folder` that OCP takes for claude."""
    script, program = folder / "claude.py", folder / "claude"
    script.write_text(_SCRIPTED_CLAUDE)
    words = " ".join(shlex.quote(word) for word in (sys.executable, "-I", "-S", str(script)))
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return program


def processor_s(pid: int) -> float:
    """The processor time that the threads of a process have used, from the kernel's books."""
    total_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total_ns += int(path.read_text().split()[0])
    return total_ns / 1e9


def stream_answer(connection: socket.socket, question: str) -> None:
    """Ask for a streamed answer and read it to its end. Raises BenchError."""
    message = {"role": "user", "content": question}
    body = json.dumps({"model": MODEL, "stream": True, "messages": [message]}).encode()
    head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    connection.sendall(head.encode() + body)
    end = b""
    while not end.endswith(b"0\r\n\r\n"):
        piece = connection.recv(1 << 18)
        end = (end + piece)[-100:]
        if not piece:
            raise common.BenchError("the answer broke off")
    if b"[DONE]" not in end:
        raise common.BenchError("the answer failed")


def measure_pieces(ocp: common.Ocp) -> dict[str, float]:
    """The processor seconds of the server for each piece of a burst and of a trickle."""
    found = {}
    for kind, count in PIECES.items():
        with socket.create_connection(("127.0.0.1", ocp.port), common.PATIENCE_S) as connection:
            # Starts the thread of the connection and a process, which is then there.
            stream_answer(connection, f"{kind} 10")
            before_s = processor_s(ocp.pid)
            stream_answer(connection, f"{kind} {count}")
            found[kind] = (processor_s(ocp.pid) - before_s) / count
    return found


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------

class Cost(NamedTuple):
    """What one version costs at best, in seconds."""

    request_s: Mapping[str, float]
    piece_s: Mapping[str, float]


def best_of(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The smallest value of each name."""
    return {name: min(each[name] for each in rounds) for name in rounds[0]}


def rows_of(costs: Sequence[Cost]) -> list[list[str]]:
    """The lines of the table: each version's number, and the last one as a part of the first."""
    lines: list[tuple[str, list[float]]] = []
    for name in costs[0].request_s:
        lines.append((f"{name}, ms", [cost.request_s[name] * 1e3 for cost in costs]))
    totals = [sum(cost.request_s.values()) * 1e3 for cost in costs]
    lines.append(("a continued request, ms", totals))
    without = [total - cost.request_s["parse"] * 1e3 for total, cost in zip(totals, costs)]
    lines.append(("the same without parse, ms", without))
    for name in costs[0].piece_s:
        lines.append((f"a piece in a {name}, us", [cost.piece_s[name] * 1e6 for cost in costs]))
    return [
        [name, *(f"{value:.2f}" for value in values),
         *([f"{values[-1] / values[0]:.2f}"] if len(values) > 1 else [])]
        for name, values in lines
    ]


def measure(trees: Sequence[Path], rounds: int) -> list[Cost]:
    """The costs of each version; the versions take turns."""
    requests: list[list[dict[str, float]]] = [[] for _ in trees]
    pieces: list[list[dict[str, float]]] = [[] for _ in trees]
    with contextlib.ExitStack() as stack:
        servers = []
        for tree in trees:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            environ = common.clean_environment(folder, "http://127.0.0.1:9")
            program = write_scripted_claude(folder)
            servers.append(stack.enter_context(
                common.Ocp(folder, program, MODEL, environ, tree=tree)))
        for number in range(rounds):
            common.progress(f"cost: round {number + 1} of {rounds}")
            for at, tree in enumerate(trees):
                requests[at].append(request_in_a_process(tree))
                pieces[at].append(measure_pieces(servers[at]))
    return [Cost(best_of(one), best_of(other)) for one, other in zip(requests, pieces)]


def run(options: argparse.Namespace) -> str:
    """Return the table."""
    trees = [*([options.before] if options.before else []), common.REPO]
    head = ["processor time", *(["before", "now", "now / before"] if options.before else ["now"])]
    rows = rows_of(measure(trees, options.rounds))
    size_kb = len(request_body()) / 1e3
    last = (f"{options.rounds} rounds; the request has {size_kb:.0f} KB, {MESSAGES} messages and "
            f"{TOOLS} tools; {common.machine()}")
    return "\n".join([common.markdown_table(head, rows), "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 when it could not be measured."""
    parser = argparse.ArgumentParser(description="What requests and answers cost the server.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--before", type=Path, help="folder of the version to compare with")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure_request(options.measure)))
        return 0
    return common.report("cost", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
