# SPDX-License-Identifier: MIT
"""The keys of a policy file: what each becomes, and what a schema cannot check of its value.

policy.schema.json has the types, the defaults and a sentence for each; docs/policies.md the rest.
"""

import ipaddress
import pwd
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mergemem_agent.policy import DomainKind, HugePages, NumaNodes
from mergemem_agent.policy_schema import suggestion
from mergemem_agent.quantity import parse_duration, parse_percent, parse_size
from mergemem_agent.selector import Glob, User


class KeyValueError(ValueError):
    """A value that the schema lets through and that is wrong all the same."""


def _within(parse_text: Callable[[str], float], least: str, most: str) -> Callable[[str], float]:
    """Return a parser that also checks bounds."""

    def parse_bounded(text: str) -> float:
        value = parse_text(text)
        if not parse_text(least) <= value <= parse_text(most):
            raise KeyValueError(f'{text!r} is out of range; allowed: "{least}" to "{most}"')
        return value

    return parse_bounded


def _within_size(least: str, most: str) -> Callable[[str], int]:
    bounded = _within(parse_size, least, most)
    return lambda text: int(bounded(text))


def _regular_expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise KeyValueError(f"{text!r} is no regular expression: {error}") from None


def _whole_percent(text: str) -> int:
    value = parse_percent(text)
    if value != int(value) or not 1 <= value <= 100:
        raise KeyValueError(f'{text!r} is out of range; allowed: whole percents, "1%" to "100%"')
    return int(value)


_MAXIMUM_UID = 2**32 - 2  # the one above stands for "no user"


def _user(value: str | int) -> User:
    if isinstance(value, int):
        return User(value)
    if re.fullmatch("[0-9]{1,10}", value) and int(value) <= _MAXIMUM_UID:
        return User(int(value))
    try:
        return User(pwd.getpwnam(value).pw_uid, value)
    except (KeyError, ValueError):
        known = [entry.pw_name for entry in pwd.getpwall()]
        message = f"there is no user {value!r} here; allowed: a user of this host, or a number"
        raise KeyValueError(message + suggestion(value, known)) from None


def _unit(text: str) -> Glob:
    if "." not in text and not text.endswith(("*", "]", "?")):
        message = f'{text!r} names no kind of unit; did you mean "{text}.service"?'
        raise KeyValueError(message)
    return Glob(text)


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        message = f'{text!r} is no IP address; allowed: one such as "127.0.0.1" or "::1"'
        raise KeyValueError(message) from None


@dataclass(frozen=True)
class Key:
    """What a key becomes: which argument of AgentSettings, Policy or Selector, and made how.

    `convert` takes a value that fits the schema, and raises ValueError. A value with a unit has to
    be in quotes: nobody should have to know which of ``10s``, ``5%``, ``1e3`` and ``1:30`` YAML
    leaves as they are.
    """

    argument: str
    convert: Callable[[Any], Any]
    has_unit: bool = False


_budget_percent = _within(parse_percent, "0.1%", "100%")
_BUDGET = Key("budget_percent", _budget_percent, has_unit=True)
# At "100%" no pressure is ever above the threshold.
_pressure_percent = _within(parse_percent, "1%", "100%")

_MAX_SHARED = Key("max_shared_bytes", _within_size("1MiB", "1024TiB"), has_unit=True)

AGENT_KEYS: Mapping[str, Key] = {
    "budget": _BUDGET,
    "memory_pressure": Key("memory_pressure_percent", _pressure_percent, has_unit=True),
    "memory_pressure_budget": Key("memory_pressure_budget_percent", _budget_percent, has_unit=True),
    "cpu_pressure": Key("cpu_pressure_percent", _pressure_percent, has_unit=True),
    "cpu_pressure_budget": Key("cpu_pressure_budget_percent", _budget_percent, has_unit=True),
    "metrics_address": Key("metrics_address", _address),
    "metrics_port": Key("metrics_port", int),
    "rescan": Key("rescan_seconds", _within(parse_duration, "1s", "1h"), has_unit=True),
    "max_shared": _MAX_SHARED,
    "hints": Key("hints", lambda choice: choice == "auto"),
}
POLICY_KEYS: Mapping[str, Key] = {
    "name": Key("name", str),
    "merge": Key("merge", lambda verdict: verdict == "allow"),
    "domain": Key("domain", DomainKind),
    "budget": _BUDGET,
    "settle": Key("settle_seconds", _within(parse_duration, "100ms", "1d"), has_unit=True),
    "include_undumpable": Key("include_undumpable", bool),
    "zero_pages": Key("zero_pages", bool),
    "huge": Key("huge", HugePages),
    "split_share": Key("split_percent", _whole_percent, has_unit=True),
    "numa": Key("numa", NumaNodes),
    "max_shared": _MAX_SHARED,
}
SELECTOR_KEYS: Mapping[str, Key] = {
    "executable": Key("executable", Glob),
    "command_line": Key("command_line", _regular_expression),
    "user": Key("user", _user),
    "cgroup": Key("cgroup", Glob),
    "systemd_unit": Key("systemd_unit", _unit),
    "minimum_anonymous": Key("minimum_anonymous_bytes", parse_size, has_unit=True),
    "minimum_age": Key("minimum_age_seconds", parse_duration, has_unit=True),
}
