"""A stand-in for the program docker: containers are folders.

FakeDocker makes them and puts the program on a PATH. Below its folder:
    NAME/inspect.json   what `docker inspect` says
    NAME/root/          the files of the container
    NAME/owners.json    path -> [uid, gid, mode], of the files that are not 1000, 1000, 0600
    NAME/reach.json     an address inside -> the address here that it leads to
    calls.jsonl         every call, its words in a line
    fail.json           [[pattern, code, message], ...]: calls that match it, joined by spaces, fail
    images.json         the variables of images, by their names
    gone                an id that `docker ps` lists and nothing else knows
    hang                calls that contain its text never end
    change.json         [pattern, path, text, times]: a call that matches changes that file first
In a container there are `id`, `mkdir`, `mv`, `rm`, `node` as ocp_tenants.py calls it, and
`openclaw` with `config validate` and `secrets reload`.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

Json = Any
ROOT = Path(os.environ.get("FAKE_DOCKER", "/nonexistent"))
NODE_UID = 1000
#: What openclaw.json of a container says unless told otherwise: comments, an order of its own.
CONFIG = """// Made by hand.
{
  gateway: { port: 18789, }, // the usual one
  "agents": {
    "defaults": { "model": { "primary": "anthropic/claude-sonnet-5-5" } },
  },
}
"""


# ---------------------------------------------------------------------------
# What tests use
# ---------------------------------------------------------------------------

class FakeDocker:
    """The containers below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "containers"
        self.bin = folder / "bin"
        self.folder.mkdir(parents=True)
        self.bin.mkdir()
        program = self.bin / "docker"
        program.write_text(
            f"#!{sys.executable} -IS\nimport sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "import fake_docker\nsys.exit(fake_docker.main(sys.argv[1:]))\n")
        program.chmod(0o755)

    @property
    def environ(self) -> dict[str, str]:
        return {"FAKE_DOCKER": str(self.folder), "PATH": str(self.bin)}

    def add(
        self, name: str, labels: Optional[Mapping[str, str]] = None, env: Sequence[str] = (),
        image: str = "ghcr.io/openclaw/openclaw:2026.9.6", config: Optional[str] = CONFIG,
        is_running: bool = True, mounts: Sequence[Mapping[str, str]] = (),
        state: str = "/home/node/.openclaw", reach: Optional[Mapping[str, str]] = None,
    ) -> Path:
        """Make a container. Returns the folder of its files."""
        number = len(list(self.folder.iterdir()))
        place = self.folder / name
        root = place / "root"
        (root / state.lstrip("/")).mkdir(parents=True)
        if config is not None:
            (root / state.lstrip("/") / "openclaw.json").write_text(config)
        (place / "inspect.json").write_text(json.dumps({
            "Id": f"{number:064x}", "Name": f"/{name}", "State": {"Running": is_running},
            "Config": {"Env": list(env), "Labels": dict(labels or {}), "Image": image,
                       "User": "node"},
            "Mounts": [dict(each) for each in mounts],
            "HostConfig": {"NetworkMode": "bridge"},
            "NetworkSettings": {"Networks": {"bridge": {"Gateway": "172.17.0.1"}}}}))
        (place / "reach.json").write_text(json.dumps(dict(reach or {})))
        return root

    def compose(self, project: str, **more: Any) -> Path:
        """Make the gateway of a compose project."""
        labels = {"com.docker.compose.service": "openclaw-gateway",
                  "com.docker.compose.project": project, **more.pop("labels", {})}
        return self.add(f"{project}-openclaw-gateway-1", labels, **more)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name)

    def change(self, name: str, **fields: Json) -> None:
        """Change what `docker inspect` says of a container."""
        file = self.folder / name / "inspect.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    def owner(self, name: str, path: str) -> list[int]:
        """uid, gid and mode of a file."""
        return list(owners(self.folder / name).get(path, [NODE_UID, NODE_UID, 0o600]))

    def calls(self) -> list[list[str]]:
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines]

    def forget_calls(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def fail(self, *rows: tuple[str, int, str]) -> None:
        """Let calls that match a pattern fail; without one, none does."""
        (self.folder / "fail.json").write_text(json.dumps(rows))

    def hang(self, text: str) -> None:
        (self.folder / "hang").write_text(text)

    def change_before(self, pattern: str, path: Path, text: str, times: int) -> None:
        """Let a file change just before calls that match a pattern."""
        (self.folder / "change.json").write_text(json.dumps([pattern, str(path), text, times]))


# ---------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------

def owners(place: Path) -> dict[str, list[int]]:
    file = place / "owners.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def set_owner(place: Path, path: str, owner: Optional[Sequence[int]]) -> None:
    now = owners(place)
    now.pop(path, None)
    if owner is not None:
        now[path] = list(owner)
    (place / "owners.json").write_text(json.dumps(now))


def daemon_says(message: str) -> int:
    print(f"Error response from daemon: {message}", file=sys.stderr)
    return 1


def container(name: str) -> Optional[Path]:
    """The folder of a container, by its name or its id."""
    for place in sorted(ROOT.glob("*/inspect.json")):
        told = json.loads(place.read_text())
        if name in (told["Name"].lstrip("/"), told["Id"], told["Id"][:12]):
            return place.parent
    return None


def inspected(place: Path) -> Json:
    return json.loads((place / "inspect.json").read_text())


def inside(place: Path, path: str) -> Path:
    assert path.startswith("/") and ".." not in path.split("/"), path
    return place / "root" / path.lstrip("/")


def ps(words: list[str]) -> int:
    assert words == ["--no-trunc", "--quiet", "--all"], words
    for file in sorted(ROOT.glob("*/inspect.json")):
        print(json.loads(file.read_text())["Id"])
    gone = ROOT / "gone"
    print(gone.read_text() if gone.exists() else "")
    return 0


def inspect(words: list[str]) -> int:
    if words[:3] == ["--type", "image", "--"]:
        images = json.loads((ROOT / "images.json").read_text())
        print(json.dumps([{"Config": {"Env": images[words[3]]}}]))
        return 0
    assert words[:2] == ["--type", "container"], words
    places = [(name, container(name)) for name in words[2:]]
    print(json.dumps([inspected(place) for _, place in places if place]))
    gone = [name for name, place in places if place is None]
    for name in gone:
        print(f"Error: No such container: {name}", file=sys.stderr)
    return 1 if gone else 0


def entry_of(place: Path, path: Path, name: str) -> tarfile.TarInfo:
    inner = "/" + str(path.relative_to(place / "root"))
    entry = tarfile.TarInfo(name)
    default = [NODE_UID, NODE_UID, 0o755 if path.is_dir() else 0o600]
    entry.uid, entry.gid, entry.mode = owners(place).get(inner, default)
    if path.is_symlink():
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
    elif path.is_dir():
        entry.type = tarfile.DIRTYPE
    elif path.is_fifo():
        entry.type = tarfile.FIFOTYPE
    else:
        entry.size = path.stat().st_size
    return entry


def copy_out(place: Path, path: str) -> int:
    source = inside(place, path)
    if not source.exists() and not source.is_symlink():
        return daemon_says(f"Could not find the file {path} in container {place.name}")
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        found = [source]
        if source.is_dir() and not source.is_symlink():
            found += sorted(source.rglob("*"))
        for each in found:
            entry = entry_of(place, each, str(each.relative_to(source.parent)))
            with open(each, "rb") if entry.isfile() else io.BytesIO() as file:
                tar.addfile(entry, file if entry.isfile() else None)
    return 0


def copy_in(place: Path, folder: str) -> int:
    content = sys.stdin.buffer.read()
    target = inside(place, folder)
    if not target.is_dir():
        return daemon_says(f"Could not find the file {folder} in container {place.name}")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for entry in tar:
            path = target / entry.name
            if entry.isdir():
                path.mkdir(exist_ok=True)
            else:
                file = tar.extractfile(entry)
                assert file, entry.name
                # As docker: a draft that is renamed, so that a link is replaced and not followed.
                draft = path.with_name(path.name + ".docker")
                draft.write_bytes(file.read())
                os.replace(draft, path)
            inner = f"{folder.rstrip('/')}/{entry.name}"
            set_owner(place, inner, [entry.uid, entry.gid, entry.mode])
    return 0


def cp(words: list[str]) -> int:
    assert words[0] == "--" and len(words) == 3, words
    name, _, path = (words[2] if words[1] == "-" else words[1]).partition(":")
    place = container(name)
    if place is None:
        return daemon_says(f"No such container: {name}")
    return copy_in(place, path) if words[1] == "-" else copy_out(place, path)


def execute(words: list[str]) -> int:
    while words[0] != "--":
        assert words[0] in ("--interactive",) or words[0].startswith("--env="), words
        words = words[1:]
    place = container(words[1])
    if place is None:
        return daemon_says(f"No such container: {words[1]}")
    if not inspected(place)["State"]["Running"]:
        return daemon_says(f"container {words[1]} is not running")
    program = PROGRAMS.get(words[2])
    if program is None:
        print(f'exec: "{words[2]}": executable file not found in $PATH', file=sys.stderr)
        return 127
    return program(place, words[3:])


def move(place: Path, words: list[str]) -> int:
    assert words[:2] == ["-T", "--"], words
    source, target = words[2:]
    if not inside(place, source).exists():
        print(f"mv: cannot stat {source!r}", file=sys.stderr)
        return 1
    try:
        os.replace(inside(place, source), inside(place, target))
    except OSError as error:
        print(f"mv: cannot move {source!r} to {target!r}: {error.strerror}", file=sys.stderr)
        return 1
    moved = owners(place)
    for path in [each for each in moved if each == target or each.startswith(f"{target}/")]:
        set_owner(place, path, None)
    for path, owner in moved.items():
        if path == source or path.startswith(f"{source}/"):
            set_owner(place, path, None)
            set_owner(place, target + path[len(source):], owner)
    return 0


def remove(place: Path, words: list[str]) -> int:
    assert words[0] in ("-f", "-rf") and words[1] == "--", words
    for path in words[2:]:
        inner = inside(place, path)
        if words[0] == "-rf" and inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
        else:
            inner.unlink(missing_ok=True)
        for owned in owners(place):
            if owned == path or owned.startswith(f"{path}/"):
                set_owner(place, owned, None)
    return 0


def make_folder(place: Path, words: list[str]) -> int:
    assert words[:2] == ["-p", "--"], words
    inside(place, words[2]).mkdir(parents=True, exist_ok=True)
    return 0


def print_id(place: Path, words: list[str]) -> int:
    assert words == ["-u"], words
    user = inspected(place)["Config"]["User"].partition(":")[0]
    print(user if user.isdecimal() else 0 if user in ("", "root") else NODE_UID)
    return 0


def node(place: Path, words: list[str]) -> int:
    """What the script of ocp_tenants.py does: ask /health, or send one question."""
    assert words[0] == "-e", words
    url, certificate, *more = words[2:]
    reach = json.loads((place / "reach.json").read_text())
    if url not in reach:
        print("fetch failed", file=sys.stderr)
        return 1
    # The names in a certificate are those of the test's machine.
    tls = urllib.request.HTTPSHandler(
        context=ssl.create_default_context(cadata=certificate)) if certificate else None
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), *([tls] if tls else []))
    request = urllib.request.Request(reach[url] + "/health")
    if more:
        key = inside(place, more[0]).read_text().strip()
        question = {"model": "haiku", "messages": [{"role": "user", "content": "Reply: pong"}]}
        request = urllib.request.Request(
            reach[url] + "/v1/chat/completions", json.dumps(question).encode(),
            {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=10) as answer:
            print(answer.read().decode())
    except OSError as problem:
        print(problem, file=sys.stderr)
        if isinstance(problem, urllib.error.HTTPError):
            print(problem.read().decode())
        return 1
    return 0


def openclaw(place: Path, words: list[str]) -> int:
    if words == ["config", "validate", "--json"]:
        file = place / "invalid"
        if file.exists():
            print(json.dumps({"valid": False, "issues": [{"message": file.read_text()}]}))
            return 1
        print('{"valid": true}')
        return 0
    if words == ["secrets", "reload"]:
        print("Secrets reloaded.")
        return 0
    print("unknown command", file=sys.stderr)
    return 1


PROGRAMS = {"id": print_id, "mkdir": make_folder, "mv": move, "rm": remove, "node": node,
            "openclaw": openclaw}
COMMANDS = {"ps": ps, "inspect": inspect, "cp": cp, "exec": execute}


def prepared(line: str) -> int:
    """Do what a test has prepared for such a call; the exit code if it is to fail, else 0."""
    hang, fail, change = ROOT / "hang", ROOT / "fail.json", ROOT / "change.json"
    if hang.exists() and hang.read_text() in line:
        time.sleep(600)
    if change.exists():
        pattern, path, text, times = json.loads(change.read_text())
        if times and re.search(pattern, line):
            Path(path).write_text(text.replace("TIMES", str(times)))
            change.write_text(json.dumps([pattern, path, text, times - 1]))
    for pattern, code, message in json.loads(fail.read_text()) if fail.exists() else []:
        if re.search(pattern, line):
            print(message, file=sys.stderr)
            return int(code)
    return 0


def main(words: list[str]) -> int:
    with open(ROOT / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(words) + "\n")
    return prepared(" ".join(words)) or COMMANDS[words[0]](words[1:])
