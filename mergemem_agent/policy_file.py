# SPDX-License-Identifier: MIT
"""Reads policy files, and reports everything that is wrong with them at once.

Each file goes through three steps: `policy_yaml` keeps positions and finds what YAML hides;
`policy_schema` checks the structure by the schema that editors use; `policy_keys` turns each value
into what `policy` works with, and checks what no schema can. What needs all files is checked here.
"""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergemem_agent.error import MergememError
from mergemem_agent.policy import AgentSettings, HugePages, Policy, PolicySet
from mergemem_agent.policy_keys import AGENT_KEYS, POLICY_KEYS, SELECTOR_KEYS, Key
from mergemem_agent.policy_schema import check_structure
from mergemem_agent.policy_yaml import Diagnostic, Document, ValuePath, parse
from mergemem_agent.selector import Selector

__all__ = ["DEFAULT_ROOT", "Diagnostic", "PolicyErrors", "default_paths", "load"]

DEFAULT_ROOT = Path("/etc/mergemem")

_MAXIMUM_FILE_BYTES = 1 << 20
_READ_ATTEMPTS = 5

# Which keys say how to merge, and so say nothing where nothing is merged.
_MERGE_KEYS = tuple(key for key in POLICY_KEYS if key not in ("name", "merge"))


class PolicyErrors(MergememError):
    """All that is wrong with a set of policy files, in order of file and line."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        """Word the errors as compilers do, one a line."""
        self.diagnostics = tuple(diagnostics)
        count = "1 error" if len(diagnostics) == 1 else f"{len(diagnostics)} errors"
        super().__init__(
            "\n".join([f"{count} in policy files", *map(str, diagnostics)]),
            "see docs/policies.md; try a change with: mergemem policy check FILE",
        )


def default_paths(root: Path = DEFAULT_ROOT) -> list[Path]:
    """Return the policy files of the host in order of evaluation; none may be there.

    That is ROOT/mergemem.yaml, then ROOT/policy.d/*.yaml in order of name, without hidden ones:
    those belong to editors, and to Kubernetes, which mounts a ConfigMap as links into ``..data``.
    """
    main = root / "mergemem.yaml"
    fragments = (root / "policy.d").glob("*.yaml")
    visible = sorted(path for path in fragments if not path.name.startswith("."))
    return [main, *visible] if os.path.lexists(main) else visible


def load(paths: Sequence[Path]) -> PolicySet:
    """Read policy files in the given order; without any, the result has no policies.

    Raises PolicyErrors.
    """
    diagnostics: list[Diagnostic] = []
    files: list[_File] = []
    for path, content in _read_together(paths):
        if isinstance(content, Diagnostic):
            diagnostics.append(content)
        else:
            files.append(_convert_file(parse(str(path), content)))
    _check_one_agent(files)
    _check_names(files)
    for file in files:
        diagnostics += file.document.diagnostics
    if diagnostics:
        # A set, since a value may fail two rules of the schema with the same words.
        order = {str(path): index for index, path in enumerate(paths)}
        raise PolicyErrors(sorted(set(diagnostics), key=lambda each: (order[each.file], each)))
    return _assemble(files)


@dataclass
class _File:
    """The arguments for AgentSettings and Policy that one file holds, as far as it is right."""

    document: Document
    agent: dict[str, Any] | None = None
    policies: list[dict[str, Any]] = field(default_factory=list)


def _assemble(files: Sequence[_File]) -> PolicySet:
    given = next((file.agent for file in files if file.agent), {})
    agent = AgentSettings(**(_pressure_budgets(given) | given))
    defaults = {"budget_percent": agent.budget_percent}
    return PolicySet(
        agent, tuple(Policy(**(defaults | policy)) for file in files for policy in file.policies)
    )


def _pressure_budgets(agent: Mapping[str, Any]) -> dict[str, float]:
    """Return what the budgets under pressure are when only the ordinary one is given."""
    percent = agent.get("budget_percent", AgentSettings.budget_percent)
    return {
        "memory_pressure_budget_percent": min(4 * percent, 100.0),
        "cpu_pressure_budget_percent": percent / 5,
    }


def _check_one_agent(files: Sequence[_File]) -> None:
    holders = [file.document for file in files if file.agent is not None]
    for document in holders[1:]:
        first = holders[0].places[("agent",)]
        message = f"agent: given before, at {holders[0].file}:{first.key_line}; allowed: once"
        document.complain(("agent",), message, at_key=True)


def _check_names(files: Sequence[_File]) -> None:
    """Refuse equal names: metrics and messages could not tell those policies apart."""
    firsts: dict[str, str] = {}
    for file in files:
        for index, policy in enumerate(file.policies):
            name = policy.get("name")
            if name in firsts:
                message = f"name: {name!r} is the name of another policy, at {firsts[name]}"
                file.document.complain(("policies", index, "name"), message)
            elif name is not None:
                firsts[name] = policy["source"]


# --- files ---------------------------------------------------------------------------------------


def _read_together(paths: Sequence[Path]) -> list[tuple[Path, str | Diagnostic]]:
    """Read all files as they were at one moment.

    A ConfigMap changes by a rename of the link that all its files are reached through. Whenever
    that falls between two reads, what was read belongs to two versions: read again.
    """
    for _ in range(_READ_ATTEMPTS):
        before = [os.path.realpath(path) for path in paths]
        contents = [(path, _read(path)) for path in paths]
        if before == [os.path.realpath(path) for path in paths]:
            break
    return contents


def _read(path: Path) -> str | Diagnostic:
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
                return Diagnostic(str(path), 1, 1, f"is {kind}; allowed: a YAML file")
            content = file.read(_MAXIMUM_FILE_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Diagnostic(str(path), 1, 1, f"cannot be read: {reason}")
    if len(content) > _MAXIMUM_FILE_BYTES:
        return Diagnostic(str(path), 1, 1, "is larger than 1 MiB: this is no policy file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line_start = content.rfind(b"\n", 0, error.start) + 1
        column = len(content[line_start : error.start].decode("utf-8", "replace")) + 1
        line = content.count(b"\n", 0, error.start) + 1
        return Diagnostic(str(path), line, column, "is not UTF-8 from here on")


# --- values --------------------------------------------------------------------------------------


def _convert_file(document: Document) -> _File:
    """Turn all values into arguments, and leave out those that are wrong, with a diagnostic."""
    if document.data is None and document.diagnostics:
        return _File(document)  # its syntax is wrong: there is nothing to look at
    convert = _Conversion(document, check_structure(document))
    file = _File(document)
    if ("agent",) in document.places:
        file.agent = convert.agent(("agent",))
    file.policies = [convert.policy(path) for path in convert.items(("policies",))]
    return file


class _Conversion:
    """Converts the values of one document, all but those at `bad` paths."""

    def __init__(self, document: Document, bad: frozenset[ValuePath]) -> None:
        self._document = document
        self._bad = bad

    def items(self, path: ValuePath) -> list[ValuePath]:
        """Return the paths of a list's items; none where there is no list."""
        items = self._at(path)
        return [(*path, index) for index in range(len(items))] if isinstance(items, list) else []

    def agent(self, path: ValuePath) -> dict[str, Any]:
        arguments = self.mapping(path, AGENT_KEYS)
        budget = arguments.get("budget_percent", AgentSettings.budget_percent)
        for name, sign, word in (("memory", 1, "lower"), ("cpu", -1, "higher")):
            percent = arguments.get(f"{name}_pressure_budget_percent", budget)
            if (percent - budget) * sign < 0:
                key = f"{name}_pressure_budget"
                message = f"{key}: {percent:g}% is {word} than the budget of {budget:g}%"
                self._document.complain((*path, key), message)
        return arguments

    def policy(self, path: ValuePath) -> dict[str, Any]:
        place = self._document.places[path]
        excludes = tuple(self.selector(item) for item in self.items((*path, "exclude")))
        arguments = self.mapping(path, POLICY_KEYS)
        if arguments.get("merge") is False:
            self._refuse(path, _MERGE_KEYS, "merge: never")
        elif arguments.get("huge") is not HugePages.SPLIT and (*path, "huge") not in self._bad:
            self._refuse(path, ("split_share",), "huge: skip, the default")
        return arguments | {
            "select": self.selector((*path, "select")),
            "exclude": excludes,
            "source": f"{self._document.file}:{place.line}",
        }

    def selector(self, path: ValuePath) -> Selector:
        return Selector(**self.mapping(path, SELECTOR_KEYS))

    def mapping(self, path: ValuePath, keys: Mapping[str, Key]) -> dict[str, Any]:
        arguments = {}
        values = self._at(path)
        for name, value in values.items() if isinstance(values, dict) else ():
            key, value_path = keys.get(name), (*path, name)
            if key is None or value_path in self._bad:
                continue
            if key.has_unit and not self._document.places[value_path].quoted:
                self._document.complain(
                    value_path, f'{name}: {value} is not in quotes; did you mean "{value}"?'
                )
            try:
                arguments[key.argument] = key.convert(value)
            except ValueError as error:
                self._document.complain(value_path, f"{name}: {error}")
        return arguments

    def _refuse(self, path: ValuePath, names: Sequence[str], reason: str) -> None:
        """Complain of keys that are given and have no effect."""
        for name in names:
            if (*path, name) in self._document.places:
                message = f"{name}: has no effect together with {reason}; remove one of them"
                self._document.complain((*path, name), message, at_key=True)

    def _at(self, path: ValuePath) -> Any:
        value = self._document.data
        for step in path:
            try:
                value = value[step]
            except (KeyError, TypeError):
                return None
        return value
