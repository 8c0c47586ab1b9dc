# SPDX-License-Identifier: MIT
"""YAML with the position of every value kept, and without YAML's surprises.

YAML 1.1 reads ``on`` as true, ``017`` as 15 and ``12:30:00`` as 45000, and PyYAML takes the last
of duplicate keys without a word. So the nodes are walked here: whatever does not mean what it
looks like becomes a `Surprise`, which no schema accepts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

ValuePath = tuple[str | int, ...]


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One error in a file; line and column count from 1."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        """Return it as compilers do, so that editors can jump to the place."""
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


@dataclass(frozen=True)
class Surprise:
    """A plain scalar that YAML takes for something else than a person would."""

    text: str
    meaning: str


@dataclass(frozen=True)
class Place:
    """Where a value stands: its line and column, those of its key, and whether it is in quotes."""

    line: int
    column: int
    key_line: int
    key_column: int
    quoted: bool


@dataclass
class Document:
    """The content of one file: plain data (dict, list, str, int, float, bool, None, Surprise).

    `places` has every value by its path, such as ``("policies", 0, "name")``; the path of the
    document itself is ``()``.
    """

    file: str
    data: Any = None
    places: dict[ValuePath, Place] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def complain(self, path: ValuePath, message: str, at_key: bool = False) -> None:
        """Add an error at a value or at its key."""
        place = self.places[path]
        line, column = (place.key_line, place.key_column) if at_key else (place.line, place.column)
        self.diagnostics.append(Diagnostic(self.file, line, column, message))


_ALIAS = "!alias"


class _Loader(yaml.SafeLoader):
    """Leaves a scalar where an alias stands.

    An alias would be the very node that it names: without a position of its own, perhaps inside of
    itself, perhaps ten times over and in it ten times the next.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ALIAS, f"*{event.anchor}", event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


def parse(file: str, text: str) -> Document:
    """Read one YAML document. Errors of syntax are in its `diagnostics`, and `data` is None then.

    The loader written in Python is used on purpose: the one in C recurses on the stack of C,
    which a file of ten thousand brackets overflows. Policy files are short.
    """
    document = Document(file, places={(): Place(1, 1, 1, 1, False)})
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.data = _Walk(document).value(node, (), node.start_mark)
    except yaml.MarkedYAMLError as error:
        document.diagnostics.append(_syntax_error(file, error))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        # PyYAML gives a number, and its types a text.
        message = f"the character U+{int(error.character):04X} is not allowed in YAML"
        document.diagnostics.append(Diagnostic(file, line, column, message))
    except RecursionError:
        document.diagnostics.append(Diagnostic(file, 1, 1, "nested too deeply"))
    finally:
        if loader is not None:
            loader.dispose()
    return document


def _syntax_error(file: str, error: yaml.MarkedYAMLError) -> Diagnostic:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    message = " ".join(part for part in (error.problem, error.context) if part)
    if "alias" in message:
        message += '; a text that begins with * must be in quotes, such as "**/bin/php-fpm*"'
    elif "escape character" in message:
        message += "; put regular expressions in single quotes, where \\ stands for itself"
    elif "single document" in message:
        message = "a second YAML document begins here; allowed: one document in each file"
    elif "cannot start any token" in message:
        message += "; put texts that begin so in quotes, and indent with blanks only"
    return Diagnostic(file, line, column, message)


_STRING = "tag:yaml.org,2002:str"
_INTEGER = "tag:yaml.org,2002:int"
_FLOAT = "tag:yaml.org,2002:float"
_BOOLEAN = "tag:yaml.org,2002:bool"
_NULL = "tag:yaml.org,2002:null"
_DATE = "tag:yaml.org,2002:timestamp"
# These two are how YAML 1.1 reads a lone << and a lone =.
_TEXT_TAGS = frozenset({_STRING, "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"})

_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_PLAIN_FLOAT = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,18}")


class _Walk:
    """One pass over the nodes, which fills in the document's places and diagnostics."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def value(self, node: yaml.Node, path: ValuePath, key_mark: yaml.Mark) -> Any:
        mark = node.start_mark
        quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
        self._document.places[path] = Place(
            mark.line + 1, mark.column + 1, key_mark.line + 1, key_mark.column + 1, quoted
        )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [
                self.value(item, (*path, index), item.start_mark)
                for index, item in enumerate(node.value)
            ]
        return _scalar(node) if isinstance(node, yaml.ScalarNode) else None

    def _mapping(self, node: yaml.MappingNode, path: ValuePath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                self._complain(mark, "a key must be one word")
                continue
            # By its text, whatever type YAML gives it: an unknown key gets one message, not two.
            key = key_node.value
            if key in data:
                self._complain(mark, f"duplicate key {key!r}, first given in line {lines[key]}")
                continue
            lines[key] = mark.line + 1
            data[key] = self.value(value_node, (*path, key), mark)
        return data

    def _complain(self, mark: yaml.Mark, message: str) -> None:
        self._document.diagnostics.append(
            Diagnostic(self._document.file, mark.line + 1, mark.column + 1, message)
        )


_BOOLEANS: Mapping[str, bool] = {"true": True, "false": False}


def _scalar(node: yaml.ScalarNode) -> Any:
    """Return what a scalar means, or a Surprise where that is not what it looks like."""
    tag, text = node.tag, node.value
    if tag in _TEXT_TAGS:
        return text
    if tag == _NULL:
        return None
    if tag == _BOOLEAN:
        if text in _BOOLEANS:
            return _BOOLEANS[text]
        boolean = "true" if text.lower() in ("yes", "on", "true") else "false"
        return Surprise(text, f"the boolean {boolean}")
    if tag == _INTEGER:
        return int(text) if _PLAIN_INTEGER.fullmatch(text) else Surprise(text, _number(node))
    if tag == _FLOAT:
        return float(text) if _PLAIN_FLOAT.fullmatch(text) else Surprise(text, _number(node))
    meanings = {_DATE: "a date", _ALIAS: "an alias, which is not supported here"}
    return Surprise(text, meanings.get(tag, f"something tagged {tag}"))


def _number(node: yaml.ScalarNode) -> str:
    constructor = yaml.constructor.SafeConstructor()
    try:
        if node.tag == _INTEGER:
            return f"the number {constructor.construct_yaml_int(node)}"
        return f"the number {constructor.construct_yaml_float(node)}"
    except (ValueError, IndexError):  # a tag that was written out, or thousands of digits
        return "a number"
