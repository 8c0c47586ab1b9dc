# SPDX-License-Identifier: MIT
"""Policy files: what right ones mean, and that wrong ones say where, what and how instead."""

import os
import pwd
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from mergemem_agent import policy_file
from mergemem_agent.policy import AgentSettings, DomainKind, Policy, Selector
from mergemem_agent.policy_file import Diagnostic, PolicyErrors, default_paths, load
from mergemem_agent.policy_keys import AGENT_KEYS, POLICY_KEYS, SELECTOR_KEYS
from mergemem_agent.policy_schema import schema
from mergemem_agent.policy_yaml import parse

CHECKOUT = Path(__file__).parents[2]
SHIPPED = [
    CHECKOUT / "deploy" / "mergemem.yaml",
    *sorted((CHECKOUT / "deploy" / "policy.d").glob("*.yaml")),
]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str | bytes, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = textwrap.dedent(content).encode()
        path.write_bytes(content)
        return path

    return write_file


def errors_of(*paths: Path) -> tuple[Diagnostic, ...]:
    with pytest.raises(PolicyErrors) as caught:
        load(paths)
    return caught.value.diagnostics


def policy(keys: str = "", select: str = '{executable: "**"}') -> str:
    """Return a file with one policy, its further keys in line 4."""
    return f"policies:\n  - name: web\n    select: {select}\n    {keys}\n"


# --- right files ---------------------------------------------------------------------------------


def test_all_keys(write: Write) -> None:
    path = write("""\
        agent:
          budget: "12.5%"
          memory_pressure: "5%"
          memory_pressure_budget: "80%"
          cpu_pressure: "33%"
          cpu_pressure_budget: "2%"
          metrics_address: "::1"
          metrics_port: 9200
          rescan: "3s"
        policies:
          - name: everything
            select:
              executable: /usr/bin/python3*
              command_line: 'gunicorn: \\w+'
              user: root
              cgroup: /system.slice/*.service
              systemd_unit: web-?.service
              minimum_anonymous: "64MiB"
              minimum_age: "1.5m"
            exclude:
              - user: 7
              - {cgroup: "/a", user: "8"}
            domain: cgroup
            budget: "2%"
            settle: "30s"
            include_undumpable: true
          - {name: never, select: {user: 0}, merge: never}
        """)
    loaded = load([path])
    assert loaded.agent == AgentSettings(
        budget_percent=12.5,
        memory_pressure_percent=5.0,
        cpu_pressure_percent=33.0,
        memory_pressure_budget_percent=80.0,
        cpu_pressure_budget_percent=2.0,
        metrics_address="::1",
        metrics_port=9200,
        rescan_seconds=3.0,
    )
    first, second = loaded.policies
    select = first.select
    assert select.executable is not None
    assert select.executable.pattern == "/usr/bin/python3*"
    assert select.command_line == re.compile(r"gunicorn: \w+")
    assert select.user is not None
    assert (select.user.uid, select.user.name) == (0, "root")
    assert select.cgroup is not None
    assert select.systemd_unit is not None
    assert select.minimum_anonymous_bytes == 64 << 20
    assert select.minimum_age_seconds == 90
    assert [each.user.uid for each in first.exclude if each.user] == [7, 8]
    assert (first.name, first.domain, first.budget_percent) == ("everything", DomainKind.CGROUP, 2)
    assert (first.settle_seconds, first.include_undumpable, first.merge) == (30, True, True)
    assert first.source == f"{path}:11"
    assert not second.merge
    assert second.budget_percent == 12.5, "the agent's budget is the default"


def test_defaults(write: Write) -> None:
    loaded = load([write(policy())])
    assert loaded.agent == AgentSettings()
    [only] = loaded.policies
    assert only == Policy("web", only.select, source=only.source)
    assert (only.domain, only.settle_seconds) == (DomainKind.USER_AND_CGROUP, 10)


def test_budgets_under_pressure_follow_the_budget(write: Write) -> None:
    agent = load([write('agent: {budget: "2%"}')]).agent
    assert agent.memory_pressure_budget_percent == 8
    assert agent.cpu_pressure_budget_percent == pytest.approx(0.4)
    assert load([write('agent: {budget: "30%"}')]).agent.memory_pressure_budget_percent == 100


def test_no_files_no_policies() -> None:
    loaded = load([])
    assert loaded.policies == ()
    assert loaded.agent == AgentSettings()


def test_order_over_files(write: Write) -> None:
    text = (
        "{{policies: [{{name: {0}1, select: {{user: 0}}}}, {{name: {0}2, select: {{user: 0}}}}]}}"
    )
    paths = [write(text.format(name), f"{name}.yaml") for name in ("b", "a")]
    assert [each.name for each in load(paths).policies] == ["b1", "b2", "a1", "a2"]


def test_agent_settings_of_a_later_file_hold_for_earlier_policies(write: Write) -> None:
    paths = [write(policy(), "a.yaml"), write('agent: {budget: "1%"}', "b.yaml")]
    assert load(paths).policies[0].budget_percent == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.name))
def test_shipped_policies(path: Path) -> None:
    assert load([path]).policies


def test_shipped_policies_go_together() -> None:
    loaded = load(SHIPPED)
    assert not loaded.policies[0].merge
    assert len(loaded.policies) >= len(SHIPPED)


# --- one declaration ------------------------------------------------------------------------------


def properties(*names: str) -> dict[str, Any]:
    part: Any = schema()
    for name in names:
        part = part[name]
    return dict(part["properties"])


AGENT = properties("properties", "agent")
POLICY = properties("$defs", "policy")
SELECTOR = properties("$defs", "selector")


def test_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert "anyOf" not in str(schema())


def test_schema_and_loader_know_the_same_keys() -> None:
    assert set(AGENT) == set(AGENT_KEYS)
    assert set(POLICY) == set(POLICY_KEYS) | {"select", "exclude"}
    assert set(SELECTOR) == set(SELECTOR_KEYS)


def test_schema_defaults_are_those_of_the_code() -> None:
    for keys, known, defaults in (
        (AGENT, AGENT_KEYS, AgentSettings()),
        (POLICY, POLICY_KEYS, Policy("x", Selector())),
    ):
        checked = 0
        for name, rules in keys.items():
            if "default" in rules:
                key = known[name]
                assert key.convert(rules["default"]) == getattr(defaults, key.argument), name
                checked += 1
        assert checked >= 4


def test_every_key_has_its_paragraph_in_the_documentation() -> None:
    text = (CHECKOUT / "docs" / "policies.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `([\w.]+)`$", text, re.MULTILINE)
    assert sorted(headings) == sorted([*SELECTOR, *POLICY, *(f"agent.{name}" for name in AGENT)])


def test_the_examples_of_the_documentation_are_right(write: Write) -> None:
    text = (CHECKOUT / "docs" / "policies.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 1 + len(SELECTOR)
    users = {entry.pw_name for entry in pwd.getpwall()}
    for example in examples:
        if "policies:" not in example:
            example = policy(select="\n" + textwrap.indent(example, " " * 6))
        if "www-data" not in example or "www-data" in users:
            load([write(example)])


# --- wrong files ---------------------------------------------------------------------------------

WRONG = [
    # file, place, words that the message must have
    (policy("settle: 10"), "4:13", ['"10s"?', "duration in quotes"]),
    (policy("settle: 10s"), "4:13", ["not in quotes", '"10s"?']),
    (policy("settle: '10sec'"), "4:13", ["unknown unit 'sec'", '"10s"?']),
    (policy("settle: '1ms'"), "4:13", ["out of range", '"100ms" to "1d"']),
    (policy("settle: 12:30:00"), "4:13", ["YAML reads 12:30:00 as the number 45000"]),
    (policy("settle: 2001-01-01"), "4:13", ["YAML reads 2001-01-01 as a date"]),
    (policy("settle:"), "4:12", ["has no value"]),
    (policy("budget: 1e3"), "4:13", ["'1e3'", "percentage in quotes"]),
    (policy("budget: 5.5"), "4:13", ["number 5.5", '"5.5%"?']),
    (policy("budget: '101%'"), "4:13", ["out of range"]),
    (policy("budget: '0%'"), "4:13", ["out of range"]),
    (policy("budget: true"), "4:13", ["found true"]),
    (policy("include_undumpable: on"), "4:25", ["reads on as the boolean true", "mean true?"]),
    (policy("include_undumpable: 'true'"), "4:25", ["found 'true'", "true or false"]),
    (policy("domain: users"), "4:13", ["user+cgroup, user, cgroup", "mean 'user'?"]),
    (policy("merge: no"), "4:12", ["reads no as the boolean false", "allow, never"]),
    (policy("merge: nevr"), "4:12", ["mean 'never'?"]),
    (policy("setle: '10s'"), "4:5", ["unknown key 'setle'", "mean 'settle'?"]),
    (policy("executable: '/x'"), "4:5", ["unknown key", "below 'select'?"]),
    (policy("<<: {}"), "4:5", ["unknown key '<<'"]),
    (policy("on: 1"), "4:5", ["unknown key 'on'"]),
    (policy("[a]: 1"), "4:5", ["key must be one word"]),
    (policy("domain: user\n    domain: host"), "5:5", ["duplicate key", "line 4"]),
    (policy("exclude: {user: 0}"), "4:14", ["a list"]),
    (policy("exclude: []"), "4:14", ["is empty"]),
    (policy("exclude: [{}]"), "4:15", ["exclude[0]: is empty"]),
    (policy("exclude: [{user: 0}, {usr: 0}]"), "4:27", ["mean 'user'?"]),
    (policy("merge: never\n    settle: '10s'"), "5:5", ["no effect"]),
    (policy("merge: never\n    zero_pages: true"), "5:5", ["no effect"]),
    (policy("merge: never\n    max_shared: '1GiB'"), "5:5", ["no effect"]),
    (policy("zero_pages: on"), "4:17", ["reads on as the boolean true", "mean true?"]),
    (policy("huge: splitt"), "4:11", ["skip, split", "mean 'split'?"]),
    (policy("numa: lokal"), "4:11", ["local, any", "mean 'local'?"]),
    (policy("split_share: '25%'"), "4:5", ["no effect", "huge: skip, the default"]),
    (policy("huge: skip\n    split_share: '25%'"), "5:5", ["no effect"]),
    (policy("huge: split\n    split_share: '12.5%'"), "5:18", ["whole percents"]),
    (policy("huge: split\n    split_share: '101%'"), "5:18", ["out of range"]),
    (policy("huge: split\n    split_share: 25"), "5:18", ['mean "25%"?']),
    (policy("max_shared: '4GB'"), "4:17", ['mean "4GiB"?']),
    (policy("max_shared: '1KiB'"), "4:17", ["out of range", "1MiB"]),
    (policy(select="{}"), "3:13", ["is empty", "executable"]),
    (policy(select="[a]"), "3:13", ["found a list"]),
    (policy(select="{user: 017}"), "3:20", ["YAML reads 017 as the number 15"]),
    (policy(select="{user: 1_0}"), "3:20", ["as the number 10"]),
    (policy(select="{user: -1}"), "3:20", ["out of range"]),
    (policy(select="{user: '4294967295'}"), "3:20", ["no user"]),
    (policy(select="{user: " + "9" * 5000 + "}"), "3:20", ["a number"]),
    (policy(select="{user: rooot}"), "3:20", ["no user 'rooot'", "mean 'root'?"]),
    (policy(select="{user: yes}"), "3:20", ["reads yes as"]),
    (policy(select="{command_line: 'a(b'}"), "3:28", ["no regular expression", "position 1"]),
    (policy(select="{command_line: ''}"), "3:28", ["is empty"]),
    (policy(select='{command_line: "\\."}'), "3:30", ["single quotes"]),
    (policy(select="{executable: python3}"), "3:26", ["full path"]),
    (policy(select="{executable: **/x}"), "3:27", ["must be in quotes"]),
    (policy(select="{executable: *x}"), "3:26", ["an alias", 'mean "*x"?']),
    (policy(select="{cgroup: '/[a'}"), "3:22", ["never closed"]),
    (policy(select="{systemd_unit: web}"), "3:28", ['mean "web.service"?']),
    (policy(select="{minimum_anonymous: '64MB'}"), "3:33", ['mean "64MiB"?']),
    (
        policy(select="&a {user: 0}") + "    exclude: [*a]\n",
        "5:15",
        ["exclude[0]: YAML reads *a as an alias"],
    ),
    (policy("exclude: &a [*a]"), "4:18", ["reads *a as an alias"]),
    (policy("settle: !!python/name:os.system ''"), "4:13", ["tagged"]),
    ("policies:\n  - select: {user: 0}\n", "2:5", ["'name' missing"]),
    ("policies:\n  - name: a b\n    select: {user: 0}\n", "2:11", ["letters, digits"]),
    ("policies:\n  - name: 7\n    select: {user: 0}\n", "2:11", ['mean "7"?']),
    ("policies:\n  - web\n", "2:5", ["policies[0]: found 'web'"]),
    ("policies: {}\n", "1:11", ["a list"]),
    ("policies:\n", "1:10", ["has no value"]),
    ("polices: []\n", "1:1", ["mean 'policies'?"]),
    ("agent: {metrics_port: 0}\n", "1:23", ["1 to 65535"]),
    ("agent: {metrics_port: '1'}\n", "1:23", ["whole number"]),
    ("agent: {metrics_address: localhost}\n", "1:26", ["127.0.0.1"]),
    ("agent: {metrics_address: '1.2.3'}\n", "1:26", ["no IP address"]),
    ("agent: {}\n", "1:8", ["is empty"]),
    ("agent: {memory_pressure: '0%'}\n", "1:26", ["1%", "100%"]),
    ("agent: {memory_pressure_budget: '4%'}\n", "1:33", ["lower than the budget of 5%"]),
    ("agent: {budget: '2%', cpu_pressure_budget: '3%'}\n", "1:44", ["higher", "of 2%"]),
    ("", "1:1", ["is empty", "agent, policies"]),
    ("# only a comment\n", "1:1", ["is empty"]),
    ("~\n", "1:1", ["is empty"]),
    ("text\n", "1:1", ["keys agent, policies"]),
    ("agent: {budget: '1%'}\n---\nagent: {}\n", "2:1", ["one document"]),
    ("policies: [\n", "2:1", ["expected"]),
    ("policies:\n\t- a\n", "2:1", ["indent with blanks"]),
    ("policies:\n  - name: a\x01\n", "2:12", ["U+0001"]),
    (b"policies:\n  - name: \xc3\xa4\xff\n", "2:12", ["not UTF-8"]),
    (b"# " + b"x" * (1 << 20), "1:1", ["1 MiB"]),
    ("[" * 20000, "1:1", ["too deeply"]),
]


@pytest.mark.parametrize(
    ("content", "place", "words"), WRONG, ids=lambda value: str(value)[-40:] if value else "empty"
)
def test_wrong_files(write: Write, content: str | bytes, place: str, words: list[str]) -> None:
    path = write(content.encode() if isinstance(content, str) else content)
    [error] = errors_of(path)
    assert str(error).startswith(f"{path}:{place}: "), str(error)
    for word in words:
        assert word in error.message


def test_every_error_is_reported_in_order(write: Write) -> None:
    good, bad = (
        write(policy(), "z.yaml"),
        write(
            """\
        agent: {budget: 5}
        policies:
          - name: web
            select: {user: rooot, command_line: '('}
            exclude: [{}, {cgroup: x}]
            settle: 10
            settle: 11
            typo: 1
          - select: 3
        """,
            "a.yaml",
        ),
    )
    errors = errors_of(good, bad)
    assert [(each.line, each.column) for each in errors] == [
        (1, 17), (3, 11), (4, 20), (4, 41), (5, 15), (5, 28), (6, 13), (7, 5), (8, 5), (9, 5),
        (9, 13),
    ]  # fmt: skip
    assert f"another policy, at {good}:2" in errors[1].message


def test_errors_come_in_the_order_of_the_files(write: Write, tmp_path: Path) -> None:
    paths = [write("x: 1", "z.yaml"), tmp_path / "none.yaml", write("x: 1", "a.yaml")]
    assert [each.file for each in errors_of(*paths)] == [str(path) for path in paths]


def test_names_are_unique_in_a_file_too(write: Write) -> None:
    path = write(policy() + "  - {name: web, select: {user: 0}}\n")
    [error] = errors_of(path)
    assert (error.line, error.column) == (5, 12)


def test_the_agent_is_set_once(write: Write) -> None:
    text = 'agent: {budget: "1%"}'
    first, second = write(text, "a.yaml"), write(text, "b.yaml")
    [error] = errors_of(first, second)
    assert error.file == str(second)
    assert f"{first}:1" in error.message


def test_the_same_file_twice(write: Write) -> None:
    path = write(policy())
    [error] = errors_of(path, path)
    assert "another policy" in error.message


def test_no_file_a_directory_a_pipe_a_dead_link(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for path, words in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "link", "no such file"),
    ):
        [error] = errors_of(path)
        assert words in str(error), str(error)


def test_an_unreadable_file(write: Write) -> None:
    path = write(policy())
    path.chmod(0)
    if os.getuid():
        assert "permission denied" in str(errors_of(path))
        return
    # Root reads everything: ask as somebody else, with all that is needed imported before.
    code = (
        "import os, pathlib, sys, jsonschema\n"
        "from mergemem_agent.policy_file import load, PolicyErrors\n"
        "os.chdir(sys.argv[1]); os.setresuid(65534, 65534, 65534)\n"
        "try: load([pathlib.Path('p.yaml')])\n"
        "except PolicyErrors as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path.parent)], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert "p.yaml:1:1: cannot be read: permission denied" in done.stdout, done.stderr


def test_one_error_says_so(write: Write) -> None:
    with pytest.raises(PolicyErrors) as caught:
        load([write("a: 1")])
    assert caught.value.message.startswith("1 error in policy files\n")
    assert "policy check" in caught.value.hint


SNIPPETS = "policies agent select name user : - { } [ ] ' * &a *a !!int 017 on ~ 10s 5% # | 0"
BREAKS = ("\n", "\n  ", "\n    ", "\t", '"', ": ", "- ")


@given(st.lists(st.sampled_from([*SNIPPETS.split(), *BREAKS]), max_size=15).map("".join))
def test_any_text_is_read_or_refused_in_words(text: str) -> None:
    document = parse("x.yaml", text)
    policy_file._convert_file(document)
    for diagnostic in document.diagnostics:
        assert diagnostic.line >= 1
        assert diagnostic.column >= 1
        assert diagnostic.message
    if not document.diagnostics:
        assert document.data == yaml.safe_load(text)


@given(st.one_of(st.text("0123456789:._+-eExXob", min_size=1, max_size=8), st.text(max_size=4)))
def test_a_scalar_is_what_yaml_reads_or_a_surprise(text: str) -> None:
    """A whole number is one only where it looks like the one that it is."""
    content = f"- {text}\n"
    assume(text.strip() != "=")  # PyYAML knows a meaning for it, and no way to read it
    document = parse("x.yaml", content)
    match document.data:
        case [str() | int() | float() | None as value]:
            assert value == yaml.safe_load(content)[0]
            if isinstance(value, int) and not isinstance(value, bool):
                assert str(value) == text.strip()


# --- where they are ------------------------------------------------------------------------------


def test_default_paths(write: Write, tmp_path: Path) -> None:
    assert default_paths(tmp_path) == []
    for name in (
        "policy.d/20-b.yaml",
        "policy.d/10-a.yaml",
        "policy.d/.#x.yaml",
        "policy.d/README",
    ):
        write("", name)
    assert [path.name for path in default_paths(tmp_path)] == ["10-a.yaml", "20-b.yaml"]
    write("", "mergemem.yaml")
    assert default_paths(tmp_path)[0].name == "mergemem.yaml"


class ConfigMap:
    """A directory as Kubernetes mounts one: links to ..data, and that a link to a version."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def publish(self, version: str, **files: str) -> None:
        (self.root / f"..{version}").mkdir()
        for name, content in files.items():
            (self.root / f"..{version}" / f"{name}.yaml").write_text(content)
            link = self.root / f"{name}.yaml"
            if not link.is_symlink():
                link.symlink_to(f"..data/{name}.yaml")
        (self.root / "..data_tmp").symlink_to(f"..{version}")
        (self.root / "..data_tmp").rename(self.root / "..data")


def versioned(version: str) -> dict[str, str]:
    return {
        name: f"policies: [{{name: {name}-{version}, select: {{user: 0}}}}]" for name in ("a", "b")
    }


@pytest.fixture
def config_map(tmp_path: Path) -> ConfigMap:
    mounted = ConfigMap(tmp_path / "policy.d")
    mounted.publish("v1", **versioned("v1"))
    return mounted


def test_a_config_map(config_map: ConfigMap) -> None:
    paths = default_paths(config_map.root.parent)
    assert [each.name for each in load(paths).policies] == ["a-v1", "b-v1"]
    config_map.publish("v2", **versioned("v2"))
    assert [each.name for each in load(paths).policies] == ["a-v2", "b-v2"]


def test_a_config_map_that_changes_between_two_reads(
    config_map: ConfigMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, versions = policy_file._read, iter(["v2", "v3"])

    def read_and_publish(path: Path) -> str | Diagnostic:
        content = read(path)
        version = next(versions, None)
        if version:
            config_map.publish(version, **versioned(version))
        return content

    monkeypatch.setattr(policy_file, "_read", read_and_publish)
    loaded = load(default_paths(config_map.root.parent))
    assert [each.name for each in loaded.policies] == ["a-v3", "b-v3"]
