# SPDX-License-Identifier: MIT
"""The structure of a policy file, by the very schema that editors use: policy.schema.json.

jsonschema finds what is wrong; the words are made here, from the schema's own: a person wants to
hear which key, what was found, what is allowed and what may have been meant, and not that
"10 is not of type 'string'". The schema does without anyOf, whose errors blame every branch.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from mergemem_agent.policy_yaml import Document, Surprise, ValuePath
from mergemem_agent.quantity import QuantityError, parse_duration, parse_percent, parse_size

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

# By the title of the definition in the schema. The unit is for numbers that came without one.
_QUANTITIES: Mapping[str, tuple[Callable[[str], float], str]] = {
    "duration": (parse_duration, "s"),
    "percent": (parse_percent, "%"),
    "size": (parse_size, "MiB"),
}
_TYPE_NAMES = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "object": "keys with values",
    "string": "text",
}


@cache
def schema() -> dict[str, Any]:
    """Return the published JSON Schema of policy files."""
    text = resources.files("mergemem_agent").joinpath("policy.schema.json").read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def check_structure(document: Document) -> frozenset[ValuePath]:
    """Add a diagnostic for all that does not fit the schema; return the paths of those values."""
    import jsonschema  # 10 MB, not needed by an agent that has no policies

    bad: set[ValuePath] = set()
    for error in jsonschema.Draft202012Validator(schema()).iter_errors(document.data):
        path = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            _complain_of_unknown_keys(document, path, error)
        else:
            bad.add(path)
            document.complain(path, _label(path) + _message(error))
    return frozenset(bad)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'OTHER'?" for a known word that resembles this one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _label(path: ValuePath) -> str:
    """Return the last key of a path, with the indices behind it: "exclude[0]: "."""
    label = ""
    for step in reversed(path):
        if isinstance(step, str):
            return f"{step}{label}: "
        label = f"[{step}]{label}"
    return ""


def _complain_of_unknown_keys(
    document: Document, path: ValuePath, error: "ValidationError"
) -> None:
    instance: Any = error.instance
    known = _rules(error)["properties"]
    for key in instance:
        if key not in known:
            message = f"unknown key {key!r}; allowed: {', '.join(known)}"
            nested = [name for name, keys in _nested_keys(known) if key in keys]
            if nested:
                message += f"; did you mean it below {nested[0]!r}?"
            else:
                message += suggestion(key, known)
            document.complain((*path, key), message, at_key=True)


def _nested_keys(properties: Mapping[str, Any]) -> Iterator[tuple[str, frozenset[str]]]:
    """Return which keys may stand below each of these keys, as far as those are mappings."""
    for name, subschema in properties.items():
        definition = subschema.get("$ref", "").rpartition("/")[2]
        resolved = schema()["$defs"][definition] if definition else subschema
        yield name, frozenset(resolved.get("properties", ()))


def _rules(error: "ValidationError") -> Mapping[str, Any]:
    """Return the part of the schema that was not kept."""
    rules: Any = error.schema  # typed as it might be in any schema: here it is never true or false
    return dict(rules)


def _message(error: "ValidationError") -> str:
    value: Any = error.instance
    rules = _rules(error)
    match error.validator:
        case "required":
            missing = [key for key in rules["required"] if key not in value]
            given = f"; there is {', '.join(value)}" if value else ""
            return f"{' and '.join(map(repr, missing))} missing{given}"
        case "minProperties" | "minItems":
            return f"is empty; allowed: {_allowed(rules)}"
        case "minLength":
            return f"is empty; allowed: {rules.get('description', _allowed(rules))}"
        case "minimum" | "maximum":
            least, most = rules["minimum"], rules["maximum"]
            return f"{value} is out of range; allowed: {least} to {most}"
    if value is None and not error.absolute_path:
        return f"is empty; allowed: {_allowed(rules)}"
    return f"{_found(value, rules)}; allowed: {_allowed(rules)}{_meant(value, rules)}"


def _found(value: Any, rules: Mapping[str, Any]) -> str:
    """Return what is wrong with a value that is of no allowed type or form."""
    if isinstance(value, Surprise):
        return f"YAML reads {value.text} as {value.meaning}"
    if value is None:
        return "has no value"
    if isinstance(value, str):
        if rules.get("title") in _QUANTITIES:
            try:
                _QUANTITIES[rules["title"]][0](value)
            except QuantityError as error:
                return str(error)
        return f"found {value!r}"
    if isinstance(value, bool):
        return f"found {'true' if value else 'false'}"
    if isinstance(value, int | float):
        return f"found the number {value}"
    return "found a list" if isinstance(value, list) else "found keys with values"


def _allowed(rules: Mapping[str, Any]) -> str:
    """Return what the schema allows, in words."""
    if "patternErrorMessage" in rules:
        return str(rules["patternErrorMessage"])
    if "enum" in rules:
        return ", ".join(rules["enum"])
    if "properties" in rules:
        return f"keys {', '.join(rules['properties'])}"
    types = rules["type"] if isinstance(rules["type"], list) else [rules["type"]]
    return " or ".join(_TYPE_NAMES[name] for name in types)


def _meant(value: Any, rules: Mapping[str, Any]) -> str:
    if rules.get("title") in _QUANTITIES:
        parse, unit = _QUANTITIES[rules["title"]]
        return _quantity_meant(value, parse, unit)
    if "enum" in rules:
        return suggestion(value, rules["enum"]) if isinstance(value, str) else ""
    if isinstance(value, int | float) and not isinstance(value, bool) and rules["type"] == "string":
        return f'; did you mean "{value}"?'
    if isinstance(value, Surprise):
        if "string" in rules["type"]:
            return f'; did you mean "{value.text}"?'
        if rules["type"] == "boolean" and value.meaning.startswith("the boolean"):
            return f"; did you mean {value.meaning.rpartition(' ')[2]}?"
    return ""


def _quantity_meant(value: Any, parse: Callable[[str], float], unit: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'; did you mean "{value}{unit}"?'
    if isinstance(value, str):
        try:
            parse(value)
        except QuantityError as error:
            return f'; did you mean "{error.suggestion}"?' if error.suggestion else ""
    return ""
