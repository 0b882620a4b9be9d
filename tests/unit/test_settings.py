"""Settings: every row of the table, the rules across rows, and what is said about them."""
from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, Optional

import pytest

from project import load_script

ocp = load_script("ocp_server.py")

ROWS = {row.metadata["env"]: row for row in dataclasses.fields(ocp.Config)}
FLAGS = {name: row for name, row in ROWS.items() if isinstance(row.default, bool)}
NUMBERS = {
    name: row for name, row in ROWS.items() if isinstance(row.default, int) and name not in FLAGS
}
TEXTS = {name: row for name, row in ROWS.items() if isinstance(row.default, str)}
CHOICES = {name: row for name, row in TEXTS.items() if row.metadata["choices"]}
#: Texts that may hold anything and that no rule looks at.
FREE_TEXTS = sorted(
    name for name, row in TEXTS.items() if name not in CHOICES and not row.metadata["secret"]
)
SECRETS = sorted(name for name, row in ROWS.items() if row.metadata["secret"])
NOT_NUMBERS = ("abc", "1.5", "0x10", "1e3", "--1", "1_000", "1,000", "1 000", "\u0661")


def value_of(environ: dict[str, str], name: str) -> Any:
    return getattr(ocp.load_config(environ), ROWS[name].name)


def complaints(environ: dict[str, str]) -> list[str]:
    """The lines of the ConfigError that this environment gives; none when it is fine."""
    try:
        ocp.load_config(environ)
    except ocp.ConfigError as error:
        return str(error).splitlines()
    return []


def wrongly_refused(values: dict[str, str], begun: dict[str, str]) -> dict[str, list[str]]:
    """Of rows that are set to something wrong, each alone: those whose complaint is not one line
    that begins like this, with what was said."""
    assert values
    told = {name: complaints({name: value}) for name, value in values.items()}
    return {name: lines for name, lines in told.items()
            if len(lines) != 1 or not lines[0].startswith(begun[name])}


# -- rows ---------------------------------------------------------------------
#
# What holds of every row is checked for all of them in one test for each value, which shows the
# rows for which it does not hold.


def test_an_empty_environment_gives_the_defaults() -> None:
    assert ocp.load_config({}) == ocp.Config()


def test_the_default_of_a_row_is_a_value_that_the_row_takes() -> None:
    defaults = {name: row.default for name, row in ROWS.items()}
    shown = {name: str(int(value)) if isinstance(value, bool) else str(value)
             for name, value in defaults.items()}

    assert {name: value_of({name: text}, name) for name, text in shown.items()} == defaults


@pytest.mark.parametrize("blank", ["", "  ", "\t\n"])
def test_a_blank_variable_counts_as_not_set(blank: str) -> None:
    assert ROWS
    assert [name for name in ROWS if ocp.load_config({name: blank}) != ocp.Config()] == []


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_both_ends_of_a_range_are_taken(name: str) -> None:
    ends = [ROWS[name].metadata[end] for end in ("minimum", "maximum")]

    taken = [value_of({name: f" {end} "}, name) for end in ends if end is not None]

    assert taken == [end for end in ends if end is not None]


def test_a_number_below_the_range_is_refused_by_name() -> None:
    below = {name: row.metadata["minimum"] - 1 for name, row in NUMBERS.items()}

    begun = {name: f"{name}: '{value}' is out of range" for name, value in below.items()}
    assert wrongly_refused({name: str(value) for name, value in below.items()}, begun) == {}


def test_a_number_above_the_range_is_refused_by_name_and_told_the_range() -> None:
    ranges = {name: (row.metadata["minimum"], row.metadata["maximum"])
              for name, row in NUMBERS.items() if row.metadata["maximum"] is not None}

    told = {name: complaints({name: str(most + 1)}) for name, (_, most) in ranges.items()}

    begun = {name: f"{name}: '{most + 1}' is out of range: must be from {least} to {most}"
             for name, (least, most) in ranges.items()}
    assert {name: line[:len(begun[name])] for name, [line] in told.items()} == begun


@pytest.mark.parametrize("garbage", NOT_NUMBERS)
def test_what_is_no_number_is_refused_by_name(garbage: str) -> None:
    told = {name: complaints({name: garbage}) for name in NUMBERS}

    begun = {name: f"{name}: {garbage!r} is not a whole number" for name in NUMBERS}
    assert {name: line[:len(begun[name])] for name, [line] in told.items()} == begun


@pytest.mark.parametrize(("name", "text", "value"), [
    ("CLAUDE_TIMEOUT", "90s", 90_000), ("CLAUDE_TIMEOUT", "1h", 3_600_000),
    ("CLAUDE_TIMEOUT", " 2 M ", 120_000), ("CLAUDE_TIMEOUT", "90000", 90_000),
    ("CLAUDE_SESSION_TTL", "1d", 86_400_000), ("CLAUDE_HEARTBEAT_INTERVAL", "500ms", 500),
    ("CLAUDE_QUEUE_RETRY_AFTER", "1m", 60), ("CLAUDE_QUEUE_RETRY_AFTER", "7", 7),
    ("OCP_USAGE_DAYS", "30d", 30), ("CLAUDE_CACHE_TTL", "0s", 0),
])
def test_a_duration_may_be_written_with_its_unit(name: str, text: str, value: int) -> None:
    assert value_of({name: text}, name) == value


@pytest.mark.parametrize(("name", "text", "words"), [
    ("CLAUDE_TIMEOUT", "2h", "from 1000 to 3600000 ms (1s to 1h)"),
    ("CLAUDE_TIMEOUT", "soon", "nor a duration such as 30s, 90m or 1h"),
    ("CLAUDE_TIMEOUT", "1.5h", "nor a duration"), ("CLAUDE_TIMEOUT", "1h30m", "nor a duration"),
    ("CLAUDE_MAX_QUEUE", "1m", "is not a whole number"),
])
def test_a_duration_that_cannot_be_used_is_refused(name: str, text: str, words: str) -> None:
    [line] = complaints({name: text})

    assert line.startswith(f"{name}: {text!r}") and words in line


@pytest.mark.parametrize(("duration_ms", "text"), [
    (0, "0s"), (1, "1ms"), (1500, "1500ms"), (90_000, "90s"), (120_000, "2m"), (5_400_000, "90m"),
    (3_600_000, "1h"), (86_400_000, "1d"), (34_560_000_000, "400d"),
])
def test_a_duration_is_shown_in_its_longest_unit(duration_ms: int, text: str) -> None:
    assert ocp.format_duration(duration_ms) == text
    assert ocp.parse_duration_ms(text) == duration_ms


def test_a_number_beyond_all_measure_is_refused_by_name() -> None:
    begun = {name: f"{name}: " for name in NUMBERS}

    assert wrongly_refused(dict.fromkeys(NUMBERS, "9" * 5000), begun) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("TRUE", True), ("Yes", True), ("on", True)]
    + [("0", False), ("false", False), ("No", False), ("OFF", False)],
)
def test_a_flag_takes_the_usual_words_in_any_case(text: str, value: bool) -> None:
    assert FLAGS
    assert [name for name in FLAGS if value_of({name: text}, name) is not value] == []


@pytest.mark.parametrize("garbage", ["2", "maybe", "-1", "y e s"])
def test_any_other_word_for_a_flag_is_refused_by_name(garbage: str) -> None:
    begun = {name: f"{name}: {garbage!r} is neither" for name in FLAGS}

    assert wrongly_refused(dict.fromkeys(FLAGS, garbage), begun) == {}


@pytest.mark.parametrize(
    ("name", "choice"),
    [(name, choice) for name, row in sorted(CHOICES.items()) for choice in row.metadata["choices"]],
)
def test_every_choice_of_a_row_is_one_that_it_takes(name: str, choice: str) -> None:
    assert ocp.parse_setting(ROWS[name], choice) == choice


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_any_other_choice_is_refused_and_the_choices_are_named(name: str) -> None:
    [line] = complaints({name: "whatever"})

    assert line.startswith(f"{name}: 'whatever'")
    assert all(choice in line for choice in ROWS[name].metadata["choices"])


@pytest.mark.parametrize("name", FREE_TEXTS)
def test_a_text_is_taken_without_the_white_space_around_it(name: str) -> None:
    others = {"OCP_TLS_CERT": "/cert.pem", "OCP_TLS_KEY": "/key.pem"} if "TLS" in name else {}
    of_a_form = {
        "OCP_MODEL_ALIASES": "some=text", "OCP_PUBLIC_URL": "http://some.text",
        "OCP_TAG_FROM": "X-Some-Text, body"}
    text = of_a_form.get(name, "some text")

    assert value_of({**others, name: f"  {text}\n"}, name) == text


@pytest.mark.parametrize("text", ["gpt-4o", "gpt-4o=", "=sonnet", "a=b=c", "a=b,c"])
def test_an_alias_has_a_name_and_a_model(text: str) -> None:
    [line] = complaints({"OCP_MODEL_ALIASES": text})

    assert line.startswith("OCP_MODEL_ALIASES takes entries such as")
    with pytest.raises(ValueError, match=re.escape(line)):
        ocp.parse_aliases(text)


def test_aliases_are_read_without_regard_to_case_and_spaces() -> None:
    assert ocp.parse_aliases("GPT-4o = Sonnet:Low , fast=haiku") == {
        "gpt-4o": "sonnet:low", "fast": "haiku"}


def test_a_variable_that_is_no_setting_is_none_of_our_business() -> None:
    assert complaints({"CLAUDE_PROXY_PROT": "abc", "EDITOR": "vi"}) == []


def test_settings_cannot_be_changed_by_accident() -> None:
    config = ocp.load_config({})

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.port = 1


def test_the_state_folder_may_be_named_with_a_tilde() -> None:
    config = ocp.load_config({"OCP_HOME": "~/elsewhere"})

    assert config.home_path == os.path.join(Path.home(), "elsewhere")


# -- all problems at once -----------------------------------------------------


def test_every_problem_is_told_at_once() -> None:
    wrong = sorted({**NUMBERS, **FLAGS, **CHOICES})

    lines = complaints(dict.fromkeys(wrong, "garbage"))

    assert sorted(line.partition(":")[0] for line in lines) == wrong


def test_a_broken_rule_is_told_together_with_a_broken_row() -> None:
    lines = complaints({"CLAUDE_TIMEOUT": "soon", "CLAUDE_AUTH_MODE": "shared"})

    assert [line.split(" ")[0] for line in lines] == ["CLAUDE_TIMEOUT:", "CLAUDE_AUTH_MODE=shared"]


def test_no_complaint_repeats_a_secret() -> None:
    secrets = {name: f"s3cret-{name.lower()}" for name in SECRETS}
    wrong = dict.fromkeys({**NUMBERS, **FLAGS}, "garbage")

    told = "\n".join(complaints({**wrong, **secrets, "CLAUDE_AUTH_MODE": "none"}))

    assert "PROXY_API_KEY" in told
    assert "s3cret" not in told


# -- rules across rows --------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "none"),
        ({"PROXY_API_KEY": "k"}, "shared"),
        ({"CLAUDE_AUTH_MODE": "none"}, "none"),
        ({"CLAUDE_AUTH_MODE": "shared", "PROXY_API_KEY": "k"}, "shared"),
    ],
)
def test_the_access_mode_follows_from_the_key_unless_it_is_named(
    environ: dict[str, str], mode: str
) -> None:
    assert ocp.load_config(environ).mode == mode


@pytest.mark.parametrize(
    ("environ", "variables"),
    [
        ({"CLAUDE_AUTH_MODE": "shared"}, ("CLAUDE_AUTH_MODE=shared", "PROXY_API_KEY")),
        (
            {"CLAUDE_AUTH_MODE": "none", "PROXY_API_KEY": "k"},
            ("CLAUDE_AUTH_MODE=none", "PROXY_API_KEY"),
        ),
        (
            {"CLAUDE_AUTH_MODE": "multi", "PROXY_API_KEY": "k"},
            ("CLAUDE_AUTH_MODE=multi", "PROXY_API_KEY", "/api/keys"),
        ),
        (
            {"CLAUDE_AUTH_MODE": "shared", "PROXY_API_KEY": "k", "PROXY_ANONYMOUS_KEY": "a"},
            ("PROXY_ANONYMOUS_KEY", "CLAUDE_AUTH_MODE=multi"),
        ),
        (
            {"CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a", "OCP_ADMIN_KEY": "a"},
            ("OCP_ADMIN_KEY",),
        ),
        ({"OCP_TLS_CERT": "/c.pem"}, ("OCP_TLS_CERT", "OCP_TLS_KEY")),
        (
            {
                "CLAUDE_AUTH_MODE": "multi", "PROXY_ANONYMOUS_KEY": "a",
                "CLAUDE_BIND": "0.0.0.0", "CLAUDE_ALLOWED_TOOLS": "Read",
            },
            ("PROXY_ADVERTISE_ANON_KEY=0",),
        ),
        (
            {"PROXY_API_KEY": "hunter22", "OCP_ADMIN_KEY": "hunter22"},
            ("OCP_ADMIN_KEY", "admin"),
        ),
        ({"OCP_ALLOWED_ORIGINS": "*"}, ("OCP_ALLOWED_ORIGINS",)),
        ({"CLAUDE_ALLOWED_TOOLS": "Read", "CLAUDE_BIND": "0.0.0.0"}, ("PROXY_API_KEY",)),
        ({"CLAUDE_SKIP_PERMISSIONS": "1", "CLAUDE_BIND": "::"}, ("PROXY_API_KEY",)),
        ({"CLAUDE_MCP_CONFIG": "/m.json", "CLAUDE_BIND": "10.0.0.1"}, ("127.0.0.1",)),
        ({"OCP_PUBLIC_URL": "ocp.example.org"}, ("OCP_PUBLIC_URL", "https://")),
        ({"OCP_ALERT_URL": "hooks.example.org/a"}, ("OCP_ALERT_URL", "https://")),
    ],
    ids=["shared without a key", "a key that none ignores", "a key that multi ignores",
         "anonymous in shared", "anonymous admins", "half a certificate",
         "tools for whoever asks", "one key for two",
         "any origin", "open with tools", "open without permissions", "open with servers",
         "an address without its scheme", "a webhook without its scheme"],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    environ: dict[str, str], variables: tuple[str, ...]
) -> None:
    [line] = complaints(environ)

    assert all(variable in line for variable in variables)


@pytest.mark.parametrize(
    "origins",
    ["*", "https://*", "http://*:80", "https://a*", "https://*.", "*://a", "*.example.org",
     "https://example.*", "https://ok.example, https://*", "HTTPS://*"],
)
def test_an_origin_that_every_site_would_fit_is_refused(origins: str) -> None:
    [line] = complaints({"OCP_ALLOWED_ORIGINS": origins})

    assert "OCP_ALLOWED_ORIGINS" in line


@pytest.mark.parametrize(
    "origins",
    ["https://app.example.org", "http://localhost:8080/", "https://*.example.org",
     "http://localhost:*", "vscode-webview://*", "chrome-extension://*/, app://obsidian.md"],
)
def test_an_origin_may_be_a_pattern(origins: str) -> None:
    assert ocp.load_config({"OCP_ALLOWED_ORIGINS": origins}).allowed_origins == origins


@pytest.mark.parametrize(
    "environ",
    [{"CLAUDE_ALLOWED_TOOLS": "Read"}, {"CLAUDE_SKIP_PERMISSIONS": "1"},
     {"CLAUDE_MCP_CONFIG": "/m.json", "CLAUDE_BIND": "0.0.0.0", "PROXY_API_KEY": "hunter22"}],
)
def test_agent_mode_is_for_those_who_have_the_key_or_the_machine(environ: dict[str, str]) -> None:
    assert ocp.load_config(environ).is_agent


def test_without_a_setting_for_it_there_is_no_agent_mode() -> None:
    assert not ocp.Config().is_agent


def test_no_configuration_shows_its_keys() -> None:
    config = ocp.load_config({"PROXY_API_KEY": "hunter22", "OCP_ADMIN_KEY": "hunter23"})

    assert "hunter2" not in repr(config)


# -- settings that are no more ------------------------------------------------


@pytest.mark.parametrize(("pattern", "why"), ocp.REMOVED_SETTINGS)
def test_a_removed_setting_is_found_with_its_reason(pattern: str, why: str) -> None:
    name = pattern.replace("*", "ANYTHING")

    assert ocp.removed_settings({name: "1", "PATH": "/bin"}) == [(name, why)]


def test_removed_settings_are_listed_in_order_of_their_names() -> None:
    environ = {"OCP_LOCAL_TOOLS": "", "CLAUDE_NO_CONTEXT": "1", "CLAUDE_TUI_ROWS": "9"}

    found = [name for name, _ in ocp.removed_settings(environ)]

    assert found == ["CLAUDE_NO_CONTEXT", "CLAUDE_TUI_ROWS", "OCP_LOCAL_TOOLS"]


@pytest.mark.parametrize(("name", "meant"), [
    ("CLAUDE_MAX_CONCURENT", "CLAUDE_MAX_CONCURRENT"), ("OCP_WARM_PROCESES", "OCP_WARM_PROCESSES"),
    ("CLAUDE_PROXY_PROT", "CLAUDE_PROXY_PORT"), ("PROXY_API_KYE", "PROXY_API_KEY"),
    ("OCP_BIND", "CLAUDE_BIND"), ("CLAUDE_TIMEOUT_MS", "CLAUDE_TIMEOUT"), ("OCP_FOO", ""),
    ("CLAUDE_PROXY_FOO", ""),
])
def test_a_variable_that_is_no_setting_is_told_with_the_nearest_one(name: str, meant: str) -> None:
    assert ocp.unknown_settings({name: "1", "PATH": "/bin"}) == [(name, meant)]
    assert ocp.unknown_settings({name: " "}) == []


@pytest.mark.parametrize("name", [
    *ROWS, "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_MAX_RETRIES", "CLAUDE_CONFIG_DIR", "CLAUDECODE",
    "CLAUDE_AGENT_SDK_VERSION", "CLAUDE_STREAM_IDLE_TIMEOUT_MS", "OCP_URL", "OCP_CONNECT_KEY",
    "CLAUDE_TUI_MODE", "PROXY_HOST", "HTTP_PROXY",
])
def test_a_variable_that_others_know_is_none_of_our_business_either(name: str) -> None:
    assert ocp.unknown_settings({name: "1"}) == []


def test_a_variable_that_is_passed_to_claude_is_known() -> None:
    assert ocp.unknown_settings({"OCP_MINE": "1", "OCP_PASS_ENV": "A,OCP_M*"}) == []


def test_the_settings_file_counts_less_than_the_environment(tmp_path: Path) -> None:
    (tmp_path / "ocp.env").write_text("A=1\nB='two  words'\nC=3\nD=4\n")
    environ = {"OCP_HOME": str(tmp_path), "A": "mine", "C": " ", "D": "4"}

    found = ocp.read_environment(environ, {"D": ("5", "--dee")})

    assert found.file == str(tmp_path / "ocp.env")
    assert {name: found.variables[name] for name in "ABCD"} == {
        "A": "mine", "B": "two  words", "C": "3", "D": "5"}
    assert [found.source(name) for name in "ABCD"] == [
        "environment", found.file, found.file, "--dee"]


def test_without_a_settings_file_there_is_the_environment(tmp_path: Path) -> None:
    found = ocp.read_environment({"OCP_HOME": str(tmp_path)}, {})

    assert (found.file, found.variables) == ("", {"OCP_HOME": str(tmp_path)})


def test_no_setting_is_called_removed() -> None:
    assert ocp.removed_settings(dict.fromkeys(ROWS, "1")) == []


# -- the table itself ---------------------------------------------------------


def test_no_two_rows_share_a_variable() -> None:
    assert len(ROWS) == len(dataclasses.fields(ocp.Config))


def test_a_row_says_its_unit_in_its_name() -> None:
    units = {"ms": "_ms", "s": "_s", "bytes": "_bytes"}

    assert [name for name, row in ROWS.items() if not row.metadata["help"]] == []
    assert [name for name, row in ROWS.items()
            if not row.name.endswith(units.get(row.metadata["unit"], ""))] == []


def test_the_readme_table_has_one_line_of_five_cells_for_every_row() -> None:
    lines = ocp.settings_markdown().splitlines()[2:]

    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

    assert [row[0] for row in cells] == [f"`{name}`" for name in ROWS]
    assert all(len(row) == 5 and row[1] and row[4] for row in cells)


@pytest.mark.parametrize(
    ("name", "default", "span"),
    [
        ("CLAUDE_PROXY_PORT", "3456", "0 to 65535"),
        ("CLAUDE_TIMEOUT", "600000 ms (10m)", "1000 to 3600000"),
        ("CLAUDE_MAX_IMAGES", "600", "0 up"),
        ("CLAUDE_IMAGE_ALLOW_URL", "0", ""),
        ("PROXY_API_KEY", "empty", ""),
        ("CLAUDE_BIND", "127.0.0.1", ""),
        ("OCP_WARM_TOTAL", "follows memory", "0 to 32"),
        ("OCP_PARKED_PROCESSES", "follows memory", "0 to 64"),
    ],
)
def test_the_readme_table_shows_defaults_units_and_ranges(
    name: str, default: str, span: str
) -> None:
    text = ocp.settings_markdown()

    live = f"`{ROWS[name].metadata['live']}`" if ROWS[name].metadata["live"] else ""
    assert f"| `{name}` | {default} | {span} | {live} | {ROWS[name].metadata['help']} |" in text


@pytest.mark.parametrize(
    ("text", "items"),
    [("", ()), (" , ,", ()), ("a", ("a",)), (" a ,b,, c ", ("a", "b", "c"))],
)
def test_a_comma_separated_setting_is_read_without_its_blanks(
    text: str, items: tuple[str, ...]
) -> None:
    assert ocp.split_list(text) == items


# -- defaults that follow the memory ------------------------------------------

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("memory_gb", "spares", "parked"),
    [(0.1, 1, 1), (1, 1, 1), (2, 1, 1), (4, 1, 2), (8, 2, 4), (16, 4, 8), (25, 4, 8),
     (1_000, 4, 8)],
)
def test_idle_processes_take_an_eighth_of_the_memory(
    memory_gb: float, spares: int, parked: int
) -> None:
    memory_bytes = int(memory_gb * GB)

    found = ocp.load_config({}, memory_bytes)

    assert (found.warm_total, found.parked_processes) == (spares, parked)
    assert spares + parked <= max(2, memory_bytes / 8 / 155_000_000)
    assert dataclasses.replace(found, warm_total=4, parked_processes=4) == ocp.Config()


@pytest.mark.parametrize("memory_bytes", [None, GB, 100 * GB])
def test_what_the_owner_has_set_follows_nothing(memory_bytes: Optional[int]) -> None:
    found = ocp.load_config({"OCP_PARKED_PROCESSES": "7", "OCP_WARM_TOTAL": "0"}, memory_bytes)

    assert (found.parked_processes, found.warm_total) == (7, 0)


def test_a_machine_that_does_not_tell_its_memory_has_the_plain_defaults() -> None:
    assert ocp.load_config({}, None) == ocp.Config()


#: Listings of control groups, the files below their root, and the limits that hold.
GROUPS = {
    "none": ("0::/\n", {}, []),
    "no limit": ("0::/a.slice/b\n", {"a.slice/b/memory.max": "max\n"}, []),
    "the service and its slice": (
        "0::/a.slice/b.service\n",
        {"a.slice/memory.max": "900\n", "a.slice/b.service/memory.max": "700\n"}, [900, 700]),
    "a container": ("0::/\n", {"memory.max": "500\n"}, [500]),
    "a container that sees its place outside": (
        "0::/../../docker/x\n", {"memory.max": "500\n"}, [500]),
    "the first version": (
        "12:cpu,cpuacct:/x\n5:memory:/docker/x\n",
        {"memory/memory.limit_in_bytes": "400\n", "cpu/memory.max": "1\n"}, [400]),
    "both versions": (
        "5:memory:/x\n0::/y\n",
        {"memory/x/memory.limit_in_bytes": "300\n", "y/memory.max": "200\n"}, [300, 200]),
    "what cannot be read": ("nonsense\n0::/a\n", {"a/memory.max": "much\n"}, []),
}


@pytest.mark.parametrize("name", GROUPS)
def test_limits_of_control_groups_are_found(name: str, tmp_path: Path) -> None:
    text, files, limits = GROUPS[name]
    listing, root = tmp_path / "listing", tmp_path / "root"
    listing.write_text(text)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    assert ocp.control_group_limits(str(listing), str(root)) == limits


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert ocp.control_group_limits(str(tmp_path / "none"), str(tmp_path)) == []


def test_the_memory_is_that_of_the_machine_or_of_its_control_group(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(ocp.os, "sysconf", sizes.__getitem__)
    found = []
    for limits in ([], [2**62], [900_000, 800_000]):
        monkeypatch.setattr(ocp, "control_group_limits", lambda limits=limits: limits)
        found.append(ocp.machine_memory_bytes.__wrapped__())

    assert found == [4_096_000, 4_096_000, 800_000]


def test_a_system_that_does_not_know_its_pages_does_not_tell(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(ocp.os, "sysconf", unknown)

    assert ocp.machine_memory_bytes.__wrapped__() is None
