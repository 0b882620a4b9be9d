"""The server, but more patient with a real claude, which takes its time on a busy machine.

How long ocp_server.py waits is set for people's machines. What a contract test asks is whether
claude does a thing at all, and that must not depend on what else the machine is doing."""

from __future__ import annotations

from collections.abc import Mapping

from project import load_script

server = load_script("ocp_server")

#: Constants of ocp_server.py, and what they are here, in seconds.
PATIENCE_S = {
    "_REPLY_TIMEOUT_S": 60.0, "_END_GRACE_S": 30.0, "_FIRST_LOOK_S": 60.0,
    "_REWIND_TIMEOUT_S": 30.0, "PLAN_QUERY_TIMEOUT_S": 45.0, "_VERSION_PROBE_TIMEOUT_S": 120.0,
    "_PRIMING_TIMEOUT_S": 60.0,
}


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run the server like this; its exit code."""
    for name, seconds in PATIENCE_S.items():
        assert getattr(server, name) < seconds
        setattr(server, name, seconds)
    return int(server.main(arguments, environ))
