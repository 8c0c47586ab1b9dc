# SPDX-License-Identifier: MIT
"""Selectors: what a policy says of the processes it means, and how each of its keys is matched."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergemem_agent.cgroup_path import units_of
from mergemem_agent.procfs import Process
from mergemem_agent.quantity import format_duration, format_size


class GlobError(ValueError):
    """The pattern can never match anything, or not what it seems to."""


@dataclass(frozen=True)
class Glob:
    """A pattern for paths and names, which has to match all of the text.

    ``*`` is any text without a slash, ``**`` any text at all, ``?`` one character but the slash,
    ``[abc]``, ``[a-z]`` and ``[!abc]`` one character of a set, never the slash; ``{one,two}`` is
    either, and may hold all of the others. Everything else stands for itself; ``[*]`` is a star.
    Raises GlobError for a set or a pair of braces that is not closed.
    """

    pattern: str

    def __post_init__(self) -> None:
        """Refuse bad patterns at once, not at the first process."""
        _ = self._expression

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(_translate(self.pattern), re.DOTALL)

    def matches(self, text: str) -> bool:
        """Tell whether the whole text fits."""
        return self._expression.fullmatch(text) is not None

    def matches_path_or_parent(self, path: str) -> bool:
        """Tell whether an absolute path or one of the directories above it fits."""
        while True:
            if self.matches(path):
                return True
            if path == "/":
                return False
            path = path.rpartition("/")[0] or "/"


# "?+" does not give back: the "]" right after "[" or "[!" is a member of the set, not its end.
_TOKEN = re.compile(r"\*\*+|\*|\?|\[!?+\]?+[^]]*\]|\{[^{}]*\}|.", re.DOTALL)
_MEMBER = re.compile(r"(.)-(.)|(.)", re.DOTALL)


def _translate(pattern: str) -> str:
    return "".join(_translate_token(token) for token in _TOKEN.findall(pattern))


def _translate_token(token: str) -> str:
    if token in ("[", "{"):
        what = "a set that is" if token == "[" else "alternatives that are"
        raise GlobError(f"{token!r} begins {what} never closed; for itself write '[{token}]'")
    if token[0] == "[":
        return _translate_set(token)
    if token[0] == "{":
        return f"(?:{'|'.join(map(_translate, token[1:-1].split(',')))})"
    if token.startswith("**"):
        return ".*"
    return {"*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))


def _translate_set(token: str) -> str:
    inverted = token.startswith("[!")
    members = token[2:-1] if inverted else token[1:-1]
    if "/" in members:
        raise GlobError(f"the set {token!r} holds a slash, which sets never match")
    parts = []
    for first, last, single in _MEMBER.findall(members):
        if first > last:
            raise GlobError(f"the range {first}-{last} in {token!r} runs backwards")
        parts.append(re.escape(single) or f"{re.escape(first)}-{re.escape(last)}")
    return f"(?!/)[{'^' if inverted else ''}{''.join(parts)}]"


@dataclass(frozen=True)
class User:
    """A real user: the number that is compared, and the name it was written as, if it was."""

    uid: int
    name: str = ""

    def __str__(self) -> str:
        """Return what the policy says, with the number."""
        return f"{self.name} ({self.uid})" if self.name else str(self.uid)


@dataclass(frozen=True)
class KeyCheck:
    """One key of a selector held against one process, in words."""

    key: str
    wanted: str
    found: str
    matched: bool


@dataclass(frozen=True)
class SelectorCheck:
    """All keys of a selector held against one process."""

    keys: tuple[KeyCheck, ...]

    @property
    def matched(self) -> bool:
        """Every key has to match."""
        return all(check.matched for check in self.keys)


@dataclass(frozen=True)
class Selector:
    """Conditions on a process, all of which have to hold. None: not asked for."""

    executable: Glob | None = None
    command_line: re.Pattern[str] | None = None
    user: User | None = None
    cgroup: Glob | None = None
    systemd_unit: Glob | None = None
    minimum_anonymous_bytes: int | None = None
    minimum_age_seconds: float | None = None

    def matches(self, process: Process) -> bool:
        """Tell whether every condition holds, and ask no more than it takes."""
        for key in _KEYS:
            wanted = getattr(self, key.attribute)
            if wanted is not None and not key.matches(wanted, process):
                return False
        return True

    def check(self, process: Process) -> SelectorCheck:
        """Tell of every condition whether it holds, and why."""
        return SelectorCheck(
            tuple(
                KeyCheck(
                    key.name, key.show(wanted), key.found(process), key.matches(wanted, process)
                )
                for key in _KEYS
                if (wanted := getattr(self, key.attribute)) is not None
            )
        )


@dataclass(frozen=True)
class _Key:
    """How one key is matched and explained; `show` words what is wanted, `found` what is there."""

    name: str
    attribute: str
    matches: Callable[[Any, Process], bool]
    show: Callable[[Any], str]
    found: Callable[[Process], str]


# Cheap ones first: `Selector.matches()` stops at the first that fails.
_KEYS = (
    _Key(
        "user",
        "user",
        matches=lambda user, process: user.uid == process.uid,
        show=str,
        found=lambda process: str(process.uid),
    ),
    _Key(
        "minimum_anonymous",
        "minimum_anonymous_bytes",
        matches=lambda least, process: process.anonymous_bytes >= least,
        show=format_size,
        found=lambda process: format_size(process.anonymous_bytes),
    ),
    _Key(
        "minimum_age",
        "minimum_age_seconds",
        matches=lambda least, process: process.age_seconds >= least,
        show=format_duration,
        found=lambda process: format_duration(process.age_seconds),
    ),
    _Key(
        "executable",
        "executable",
        # Not even "**" matches what could not be read.
        matches=lambda glob, process: bool(process.executable) and glob.matches(process.executable),
        show=lambda glob: glob.pattern,
        found=lambda process: process.executable or "(unreadable)",
    ),
    _Key(
        "cgroup",
        "cgroup",
        matches=lambda glob, process: glob.matches_path_or_parent(process.cgroup),
        show=lambda glob: glob.pattern,
        found=lambda process: process.cgroup,
    ),
    _Key(
        "systemd_unit",
        "systemd_unit",
        matches=lambda glob, process: any(map(glob.matches, units_of(process.cgroup))),
        show=lambda glob: glob.pattern,
        found=lambda process: ", ".join(units_of(process.cgroup)) or "(none)",
    ),
    _Key(
        "command_line",
        "command_line",
        matches=lambda regex, process: regex.search(" ".join(process.command_line)) is not None,
        show=lambda regex: regex.pattern,
        found=lambda process: " ".join(process.command_line),
    ),
)
