"""`ocp tenants skills`: what is read of an instance's skills, and how they are copied."""

from __future__ import annotations

import io
import itertools
import json
import os
import stat
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any, Iterator, Optional

import pytest

from depth import by_depth
from fake_docker import NODE_UID
from project import REPO
from tenants_lab import Lab, real_docker_lab, tenants, tenants_lab

STATE = "home/node/.openclaw"
SKILLS = f"{STATE}/workspace/skills"
CONTAINER = "alice-openclaw-gateway-1"
TEXT = "---\nname: ../../x\ndescription: d\n---\n"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with tenants_lab(tmp_path) as made:
        yield made


def skill(folder: Path, text: str = TEXT, **files: str) -> Path:
    """Make or change a skill."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"SKILL.md": text, **files}.items():
        (folder / name).write_text(content)
    return folder


def alice(lab: Lab, **more: Any) -> Path:
    """A container with a tenant; the folder of its files."""
    root = lab.docker.compose("alice", reach=lab.reach(), **more)
    lab.run("add", "alice")
    return root


def own(lab: Lab, name: str = "alice") -> Path:
    return lab.ocp_home / "tenants" / name / "skills"


def states(lab: Lab, *words: str) -> dict[str, str]:
    [told] = lab.json("skills", "list", *words)["tenants"]
    return {each["name"]: each["state"] for each in told["skills"]}


# ---------------------------------------------------------------------------
# Tars from outside
# ---------------------------------------------------------------------------

def entry(name: str, content: Optional[bytes] = b"x", **fields: Any) -> tuple[tarfile.TarInfo, Any]:
    made = tarfile.TarInfo(name)
    made.size = len(content or b"")
    made.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    for field, value in fields.items():
        setattr(made, field, value)
    return made, io.BytesIO(content or b"") if made.isreg() else None


def tar_of(*entries: tuple[tarfile.TarInfo, Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for each, file in entries:
            tar.addfile(each, file)
    return out.getvalue()


def collected(stream: Any, write: Any = None) -> Any:
    root = tenants.Root("/r", ("skills",))
    return tenants.collect(root, tenants.tar_members(stream), write)


HOSTILE = {
    "a link": entry("skills/good/l", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": entry("skills/good/h", type=tarfile.LNKTYPE, linkname="skills/good/SKILL.md"),
    "a device": entry("skills/good/d", type=tarfile.CHRTYPE),
    "a fifo": entry("skills/good/f", type=tarfile.FIFOTYPE),
    "above": entry("skills/../../evil"), "inside above": entry("skills/good/../../evil"),
    "absolute": entry("/etc/evil"), "empty part": entry("skills//evil"),
    "dot": entry("./evil"), "other case": entry("skills/good/skill.MD"),
    "folder in other case": entry("skills/GOOD/x"), "twice": entry("skills/good/SKILL.md"),
    "below a file": entry("skills/good/SKILL.md/x"), "newline": entry("skills/good/a\nb"),
    "not UTF-8": entry("skills/good/\udcff"), "long": entry("skills/good/" + "n" * 256),
    "deep": entry("skills/good/" + "d/" * 20 + "x"),
    "big": entry("skills/good/b", b"b" * 1_000_001)}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_skill_may_hold_is_left_out_and_named(name: str) -> None:
    written: list[str] = []
    content = tar_of(entry("skills", None), entry("skills/good/SKILL.md"), HOSTILE[name],
                     entry("skills/good/run.sh", mode=0o755))

    found = collected(io.BytesIO(content), lambda path, *_: written.append(path))

    assert written == ["good/SKILL.md", "good/run.sh"] and len(found.left_out) == 1
    assert found.skills["good"].files.keys() == {"SKILL.md", "run.sh"}
    assert found.skills["good"].files["run.sh"].is_executable


@pytest.mark.parametrize(("home", "reason"), [
    ("--help", "not a valid"), ("$(touch x)", "not a valid"), ("a;b", "not a valid"),
    ("n" * 65, "not a valid"),
    ("1/2/3/4/5/6/7/deep", "too deep"), ("GOOD2", ""), ("Bad Name!", "not a valid")])
def test_a_skill_whose_folder_has_no_fit_name_is_left_out(home: str, reason: str) -> None:
    content = tar_of(entry("skills/good/SKILL.md"), entry(f"skills/{home}/SKILL.md"))

    found = collected(io.BytesIO(content))

    assert "good" in found.skills and reason in found.left_out.get(home, "")
    assert (len(found.skills) == 2) is not bool(reason)


def test_a_skill_without_a_usable_skill_md_or_with_too_much_is_left_out_whole() -> None:
    many = [entry(f"skills/many/{number}") for number in range(501)]
    large = [entry(f"skills/large/{number}", b"x" * 1_000_000) for number in range(11)]
    content = tar_of(
        entry("skills/linked/SKILL.md", type=tarfile.SYMTYPE, linkname="x"),
        entry("skills/linked/x"), entry("skills/many/SKILL.md"), *many,
        entry("skills/large/SKILL.md"), *large, entry("skills/.hidden/a/SKILL.md"),
        entry("skills/in/folder/SKILL.md"), entry("skills/in/folder/below/SKILL.md"))

    found = collected(io.BytesIO(content))

    assert found.skills.keys() == {"folder"}
    assert found.left_out.keys() == {"linked/SKILL.md", "many", "large"}
    assert found.skills["folder"].files.keys() == {"SKILL.md", "below/SKILL.md"}


class Endless:
    """A tar's first bytes, and zeros without end."""

    def __init__(self, head: bytes) -> None:
        self.head, self.count = head, 0

    def read(self, size: int) -> bytes:
        given, self.head = self.head[:size], self.head[size:]
        self.count += size
        return given.ljust(size, b"\0")


def pax_header(size: int) -> bytes:
    return entry("x", type=tarfile.XHDTYPE, size=size)[0].tobuf()


@pytest.mark.parametrize(("head", "most_bytes"), [
    (entry("skills/bomb", size=1_000_000_000)[0].tobuf(), 201_000_000),
    (pax_header(1_000_000_000), 200_000),
    (entry("x", type=tarfile.GNUTYPE_LONGNAME, size=1_000_000_000)[0].tobuf(), 200_000)])
def test_a_tar_without_end_is_given_up_before_it_fills_the_memory(
    head: bytes, most_bytes: int
) -> None:
    stream = Endless(head)
    tracemalloc.start()
    try:
        with pytest.raises(tenants.Problem):
            collected(stream)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert stream.count < most_bytes


def test_long_headers_of_many_entries_are_not_kept() -> None:
    large = tarfile.TarInfo("skills/x")
    large.pax_headers = {"comment": "c" * 90_000}
    one = large.tobuf(tarfile.PAX_FORMAT)
    stream = io.BytesIO(one * 200)
    tracemalloc.start()
    try:
        collected(stream)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_tar_of_too_many_entries_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "_MAX_ENTRIES", 50)

    with pytest.raises(tenants.Problem, match="more than 50 entries"):
        collected(io.BytesIO(tar_of(*(entry(f"skills/{number}") for number in range(60)))))


@pytest.mark.parametrize(("part", "code"), [(0.6, 0), (0.6, 1), (0.99, 1)])
def test_half_a_stream_changes_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, part: float, code: int
) -> None:
    skill(alice(lab) / SKILLS / "one", more="x" * 3000)
    lab.run("skills", "pull")
    before = lab.everything()
    content = tar_of(entry("skills/one/SKILL.md", b"new" * 600))[:512 + 1800]

    class Half:
        def __init__(self) -> None:
            self.output = io.BytesIO(content[:int(len(content) * part)])

        kill = finish = lambda *_: tenants.Ran(code, b"", "connection lost")
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    running = tenants.Running
    monkeypatch.setattr(tenants, "Running", lambda command, *more: (
        Half() if command[3:4] == [f"{CONTAINER}:/{SKILLS}"] else running(command, *more)))

    ran = lab.run("skills", "pull", "--overwrite")

    assert ran.code == 1 and "FAILED" in ran.stdout and lab.everything() == before


# ---------------------------------------------------------------------------
# The states
# ---------------------------------------------------------------------------

def fake_skill(text: str, where: str) -> Any:
    root = tenants.Root(where, ("skills",))
    return tenants.Skill("s", root, "s", {"SKILL.md": tenants.File(False, 1, text)}, True)


def sides(here: str, there: str, known: str) -> Any:
    found = [tenants.Found({"s": fake_skill(text, where)} if text else {}, {})
             for text, where in ((here, "/h"), (there, "/t"))]
    record = {"s": {"digest": fake_skill(known, "/h").digest}} if known else {}
    root = tenants.Root("/t", ("skills",))
    return tenants.Sides(None, root, root, *found, record)


#: Here, there, at the last sync; the state; what bisync, pull and push do; what with --overwrite.
TABLE = [
    ("", "a", "", "new there", "pull pull -", "pull pull -"),
    ("a", "", "", "new here", "push - push", "push - push"),
    ("a", "a", "", "the same", "- - -", "- - -"), ("a", "a", "b", "the same", "- - -", "- - -"),
    ("a", "b", "a", "changed there", "- pull -", "- pull push"),
    ("a", "b", "b", "changed here", "- - push", "- pull push"),
    ("a", "b", "c", "changed on both sides", "- - -", "- pull push"),
    ("a", "b", "", "changed on both sides", "- - -", "- pull push"),
    ("a", "", "a", "gone there", "- - -", "- - push"),
    ("", "a", "a", "gone here", "- - -", "- pull -")]


@pytest.mark.parametrize(("here", "there", "known", "state", "plain", "overwriting"), TABLE)
def test_each_state_of_a_skill_has_its_row(
    here: str, there: str, known: str, state: str, plain: str, overwriting: str
) -> None:
    for overwrites, actions in ((False, plain), (True, overwriting)):
        steps = [tenants.steps_of(sides(here, there, known), each, overwrites)[0]
                 for each in tenants.DIRECTIONS]
        assert [each.state for each in steps] == [state] * 3
        assert " ".join(each.action or "-" for each in steps) == actions
        assert all(each.reason for each in steps if not each.action and state != "the same")
    assert {row[3] for row in TABLE} == tenants.STATES.keys()


def test_the_table_of_the_page_is_that_of_the_code() -> None:
    text = (REPO / "docs/tenants.md").read_text()
    for state, cells in tenants.STATES.items():
        words = " | ".join("`--overwrite`" if cell.endswith("!") else cell for cell in cells)
        assert " ".join(f"| {state} | {words} |".split()) in text


# ---------------------------------------------------------------------------
# Pull
# ---------------------------------------------------------------------------

def test_skills_of_all_places_are_pulled_private_and_whole(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "group/one", **{"run.sh": "#!/bin/sh\n"})
    skill(root / STATE / "skills/two")
    skill(root / "home/node/.agents/skills/three")
    skill(root / STATE / "skills/one", "of lower rank")
    skill(root / "app/skills/bundled")
    (lab.docker.folder / CONTAINER / "owners.json").write_text(json.dumps({
        f"/{SKILLS}/group/one/run.sh": [NODE_UID, NODE_UID, 0o775]}))

    ran = lab.run("skills", "pull")

    assert ran.code == 0 and "pulled: one, three, two" in ran.stdout
    assert sorted(os.listdir(own(lab))) == ["one", "three", "two"]
    assert (own(lab) / "one/SKILL.md").read_text() == TEXT
    modes = [stat.S_IMODE((own(lab) / path).stat().st_mode)
             for path in ("", "one", "one/SKILL.md", "one/run.sh")]
    assert modes == [0o700, 0o700, 0o600, 0o700]
    assert "pulled: bundled" in lab.run("skills", "pull", "--bundled").stdout


def test_a_second_sync_writes_nothing(lab: Lab) -> None:
    skill(alice(lab) / SKILLS / "one")
    lab.run("skills", "pull")
    before, times = lab.everything(), lab.times()
    lab.docker.forget_calls()

    for action in ("pull", "push", "bisync"):
        assert "1 skill the same" in lab.run("skills", action).stdout
    assert lab.everything() == before and lab.times() == times
    assert {call[0] for call in lab.docker.calls()} == {"ps", "inspect", "cp"}
    assert not [call for call in lab.docker.calls() if call[:3] == ["cp", "--", "-"]]


def test_what_is_replaced_is_in_the_backup_and_nothing_is_deleted(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "one", old="1")
    skill(root / SKILLS / "gone")
    lab.run("skills", "pull")
    (root / SKILLS / "one/old").unlink()
    skill(root / SKILLS / "one", "new")
    (root / SKILLS / "gone/SKILL.md").unlink()
    assert lab.run("skills", "diff").stdout.count("files") == 1

    ran = lab.run("skills", "pull")

    assert "pulled: one" in ran.stdout and "left, gone there" in ran.stdout
    assert os.listdir(own(lab) / "one") == ["SKILL.md"] and (own(lab) / "gone").is_dir()
    [kept] = (lab.ocp_home / "tenants/alice/backup").iterdir()
    assert sorted(os.listdir(kept / "one")) == ["SKILL.md", "old"] and str(kept) in ran.stdout
    skill(root / SKILLS / "one", "newer")
    lab.run("skills", "pull")
    assert len(list(kept.parent.iterdir())) == 2


def test_a_dry_run_tells_the_same_and_changes_nothing(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "one")
    skill(own(lab) / "two")
    before = lab.everything()

    for action, words in (("pull", "to pull: one"), ("push", "to push: two"),
                          ("clean", "nothing to move")):
        assert words in lab.run("skills", action, "--dry-run").stdout
    assert lab.everything() == before


def test_a_folder_without_a_skill_md_is_named_and_not_replaced(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "loose")
    (own(lab) / "loose").mkdir(parents=True)
    (own(lab) / "loose/README.md").write_text("mine")

    for action in ("list", "pull"):
        assert "left out here: loose (no SKILL.md)" in lab.run("skills", action).stdout
    assert [each.name for each in (own(lab) / "loose").iterdir()] == ["README.md"]


def test_a_skill_that_could_not_be_kept_whole_is_not_replaced(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "one")
    lab.run("skills", "pull")
    (own(lab) / "one/large").write_bytes(b"x" * 1_000_001)
    skill(root / SKILLS / "one", "new")

    ran = lab.run("skills", "pull", "--overwrite")

    assert "a part was left out" in ran.stdout
    assert (own(lab) / "one/SKILL.md").read_text() == TEXT


def test_a_skill_that_changes_while_it_is_copied_is_not_taken(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "one")
    lab.docker.change_before(
        f"^cp -- .*{SKILLS} -", root / SKILLS / "one/SKILL.md", "TIMES", times=9)

    ran = lab.run("skills", "pull")

    assert ran.code == 1 and "one was changed just now: run this again" in ran.stdout
    assert not (own(lab) / "one").exists()


@pytest.mark.parametrize("place", ["alice", "alice/skills", "alice/backup"])
def test_no_link_in_the_tenants_folder_is_followed(lab: Lab, tmp_path: Path, place: str) -> None:
    root = alice(lab)
    skill(root / SKILLS / "one")
    if place == "alice/backup":
        lab.run("skills", "pull")
        skill(root / SKILLS / "one", "new")
    outside = tmp_path / "outside"
    outside.mkdir()
    target = lab.ocp_home / "tenants" / place
    if target.is_dir():
        target.rename(tmp_path / "away")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(outside)

    ran = lab.run("skills", "pull")

    assert ran.code == 1 and "FAILED" in ran.stdout and not list(outside.iterdir())


def test_a_link_that_takes_the_place_of_a_folder_meanwhile_is_not_followed(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skill(alice(lab) / SKILLS / "one")
    outside = tmp_path / "outside"
    outside.mkdir()
    write_below = tenants.write_below

    def write(at: int, path: str, *more: Any) -> None:
        os.mkdir("one", dir_fd=at)
        os.rename("one", "away", src_dir_fd=at, dst_dir_fd=at)
        os.symlink(outside, "one", dir_fd=at)
        write_below(at, path, *more)

    monkeypatch.setattr(tenants, "write_below", write)

    assert "FAILED" in lab.run("skills", "pull").stdout and not list(outside.iterdir())


# ---------------------------------------------------------------------------
# Push
# ---------------------------------------------------------------------------

def test_pushed_skills_belong_to_the_containers_user_and_replace_whole_folders(lab: Lab) -> None:
    root = alice(lab)
    lab.docker.change(CONTAINER, Config={
        **json.loads((lab.docker.folder / CONTAINER / "inspect.json").read_text())["Config"],
        "User": "1234"})
    skill(root / SKILLS / "group/one", old="1")
    lab.run("skills", "pull")
    (own(lab) / "one/old").unlink()
    skill(own(lab) / "one", "mine")
    skill(own(lab) / "two/")
    (own(lab) / "two/SKILL.md").chmod(0o700)

    ran = lab.run("skills", "push")

    assert ran.code == 0 and "pushed: one, two" in ran.stdout, ran
    assert os.listdir(root / SKILLS / "group/one") == ["SKILL.md"]
    assert (root / SKILLS / "group/one/SKILL.md").read_text() == "mine"
    assert sorted(os.listdir(root / SKILLS)) == ["group", "two"]
    assert lab.docker.owner(CONTAINER, f"/{SKILLS}/two") == [1234, 1234, 0o700]
    assert lab.docker.owner(CONTAINER, f"/{SKILLS}/two/SKILL.md") == [1234, 1234, 0o700]
    assert lab.docker.owner(CONTAINER, f"/{SKILLS}/group/one/SKILL.md") == [1234, 1234, 0o600]
    [kept] = (lab.ocp_home / "tenants/alice/backup").iterdir()
    assert (kept / "one/old").read_text() == "1"
    assert states(lab) == {"one": "the same", "two": "the same"}


def test_openclaws_own_skills_are_never_written(lab: Lab) -> None:
    root = alice(lab)
    skill(root / "app/skills/weather")
    lab.run("skills", "pull", "--bundled")
    skill(own(lab) / "weather", "mine")

    for more in ((), ("--bundled",)):
        ran = lab.run("skills", "push", "--overwrite", *more)
        assert "pushed" not in ran.stdout, ran
    assert not (root / SKILLS).exists()
    assert (root / "app/skills/weather/SKILL.md").read_text() == TEXT


def test_into_a_stopped_container_only_new_skills_are_pushed(lab: Lab) -> None:
    root = alice(lab, is_running=False)
    skill(root / SKILLS / "one")
    lab.run("skills", "pull")
    skill(own(lab) / "one", "mine")
    skill(own(lab) / "two")

    ran = lab.run("skills", "push")

    assert "pushed: two" in ran.stdout and "start it" in ran.stdout
    assert (root / SKILLS / "two/SKILL.md").exists()
    assert (root / SKILLS / "one/SKILL.md").read_text() == TEXT


def test_local_instances_are_synced_too_where_their_workspace_is(lab: Lab) -> None:
    workspace = lab.home / "space"
    lab.local(text=f'{{agents: {{defaults: {{workspace: "~/{workspace.name}"}}}}}}')
    lab.run("add", "openclaw-local")
    there, mine = workspace / "skills", own(lab, "openclaw-local")
    skill(there / "group/one", old="1")
    lab.run("skills", "pull")
    skill(mine / "two")
    skill(mine / "one", "mine")
    (mine / "one/old").unlink()

    ran = lab.run("skills", "push")

    assert ran.code == 0 and "pushed: one, two" in ran.stdout, ran
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()) == [
        "group/one/SKILL.md", "two/SKILL.md"]
    [kept] = (lab.ocp_home / "tenants/openclaw-local/backup").iterdir()
    assert (kept / "one/old").exists()


def test_bisync_copies_new_ones_both_ways_and_leaves_differences(lab: Lab) -> None:
    root = alice(lab)
    skill(root / SKILLS / "there")
    skill(root / SKILLS / "both", "1")
    skill(own(lab) / "both", "2")
    skill(own(lab) / "here")

    ran = lab.run("skills", "bisync")

    assert "pulled: there" in ran.stdout and "pushed: here" in ran.stdout
    assert "changed on both sides (pull --overwrite or push --overwrite): both" in ran.stdout
    assert "pulled: both" in lab.run("skills", "bisync", "--pull", "--overwrite").stdout


# ---------------------------------------------------------------------------
# Clean, setup, ends in the middle
# ---------------------------------------------------------------------------

def test_clean_moves_what_came_by_a_sync_and_is_unchanged_to_the_backup(lab: Lab) -> None:
    root = alice(lab)
    for name in ("one", "two", "three"):
        skill(root / SKILLS / name)
    skill(own(lab) / "mine")
    lab.run("skills", "pull")
    skill(own(lab) / "two", "changed")
    (own(lab) / "three/large").write_bytes(b"x" * 1_000_001)

    ran = lab.run("skills", "clean")

    assert "Z: one\n" in ran.stdout and "incomplete: three, two\n" in ran.stdout
    assert sorted(os.listdir(own(lab))) == ["mine", "three", "two"]
    [kept] = (lab.ocp_home / "tenants/alice/backup").iterdir()
    assert os.listdir(kept) == ["one"]
    assert "pulled: one" in lab.run("skills", "pull").stdout
    assert ": one, two\n" in lab.run("skills", "clean", "--overwrite").stdout


@pytest.mark.parametrize(("words", "is_set_up", "is_pulled"), [
    ((), True, True), (("--no-skills",), True, False), (("--dry-run",), False, False)])
def test_setup_pulls_skills_unless_told_otherwise(
    lab: Lab, words: tuple[str, ...], is_set_up: bool, is_pulled: bool
) -> None:
    skill(lab.docker.compose("alice", reach=lab.reach()) / SKILLS / "one")

    ran = lab.run("setup", "--yes", *words)

    assert ran.code == 0 and ("1 skill to pull" in ran.stdout) is ("--no-skills" not in words)
    assert bool(lab.server.keys) is is_set_up
    assert (own(lab) / "one").exists() is is_pulled
    if is_set_up and not is_pulled:
        assert "pulled: one" in lab.run("setup", "--skills").stdout
    if is_set_up:
        assert "as it should be\n" in lab.run("setup", "--yes").stdout


def test_skills_that_cannot_be_read_stop_no_setup(lab: Lab) -> None:
    lab.docker.compose("alice", reach=lab.reach())
    lab.docker.fail(("^cp .*skills -", 1, "input/output error"))

    ran = lab.run("setup", "--yes")

    assert ran.code == 1 and "skills FAILED: input/output error" in ran.stdout
    assert "alice" in lab.server.tenants


class Killed(BaseException):
    """The program ends here, as by SIGKILL."""


def run_killed(at: int, do: Any) -> bool:
    """Call `do`, which ends at its n-th rename or program; whether it came to that."""
    steps = itertools.count()

    def counted(original: Any) -> Any:
        def step(*args: Any, **more: Any) -> Any:
            if next(steps) >= at:
                raise Killed
            return original(*args, **more)
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tenants, "Running", counted(tenants.Running))
        patch.setattr(tenants.os, "rename", counted(os.rename))
        patch.setattr(tenants, "remove_below", counted(tenants.remove_below))
        try:
            do()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("action", ["pull", "push"])
def test_after_an_end_at_any_step_a_skill_is_whole_and_the_next_run_goes_on(
    lab: Lab, action: str
) -> None:
    root = alice(lab)
    there, here = root / SKILLS / "one", own(lab) / "one"
    target = here if action == "pull" else there
    skill(there, "0", more="0")
    lab.run("skills", "pull")
    for number, at in enumerate(range(0, 60, by_depth(5, 3, 1)), 1):
        skill(there if action == "pull" else here, str(number), more=str(number))

        was_killed = run_killed(at, lambda: lab.run("skills", action))

        if target.exists():
            assert (target / "SKILL.md").read_text() == (target / "more").read_text(), at
        assert lab.run("skills", action).code == 0, at
        assert (target / "more").read_text() == str(number), at
        assert not [path for path in target.parent.iterdir() if path.name != "one"], at
        if not was_killed:
            break
    assert not was_killed


@pytest.mark.exhaustive
def test_the_real_docker_client_copies_skills_over_a_stand_in_for_its_daemon(
    tmp_path: Path
) -> None:
    with real_docker_lab(tmp_path) as lab:
        root = alice(lab)
        skill(root / SKILLS / "one")

        assert "pulled: one" in lab.run("skills", "pull").stdout
        skill(own(lab) / "one", "mine")
        skill(own(lab) / "two")
        ran = lab.run("skills", "push")

        assert ran.code == 0 and "pushed: one, two" in ran.stdout, ran
        assert (root / SKILLS / "one/SKILL.md").read_text() == "mine"
        assert sorted(os.listdir(root / SKILLS)) == ["one", "two"]
