"""Reads YAML into plain data that remembers its lines, and refuses whatever is not plain data."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from kvpolicy.errors import RecipeError
from kvpolicy.words import clip, in_words, quoted

SPEC_VERSION = 1
MAX_BYTES = 1 << 17
MAX_NODES = 20_000
MAX_DEPTH = 40
MAX_PROBLEMS = 100
"""Problems of a recipe that one error tells."""
Path_: TypeAlias = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
IS = "a recipe is a mapping with keys such as name and tiers"
_TOO_DEEP = f"a recipe nests at most {MAX_DEPTH} levels"


class _Bad:
    def __repr__(self) -> str:
        return "BAD"


BAD = _Bad()
"""Stands where a value is not valid and the document says so already, so that the rest can be checked."""


def path_text(path: Path_) -> str:
    """`tiers[1].policy.budget`."""
    text = ""
    for step in path:
        word = f"[{step}]" if isinstance(step, int) else clip(step, 40)
        text += word if isinstance(step, int) or not text else f".{word}"
    return text


@dataclass
class Document:
    """Plain data, the file and line of each path in it, and what is wrong with it."""

    data: dict[str, Any]
    file: str
    base: Path | None = None
    """The directory that relative paths in it start from."""
    marks: dict[Path_, tuple[str, int | None]] = field(default_factory=dict)

    problems: dict[str, tuple[str, int]] = field(default_factory=dict)
    """What is wrong, each with its file and line."""

    def where(self, path: Path_) -> tuple[str, int | None]:
        """File and line of a path, or of the nearest one above it that has a line."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                return self.marks[path[:length]]
        return self.file, None

    def note(self, path: Path_, message: str, shown: str | None = None) -> None:
        """Remember a problem: what must hold, and what was found. `shown` stands for the path."""
        file, line = self.where(path)
        text = path_text(path) if shown is None else shown
        self.add(f"{clip(file, 300)}{f':{line}' if line else ''}{f': {text}' if text else ''}: {message}", file, line)

    def add(self, problem: str, file: str, line: int | None) -> None:
        """Remember a problem that says itself where it is."""
        self.problems.setdefault(problem, (file, line or 0))
        if len(self.problems) >= MAX_PROBLEMS:
            self.check(f"{clip(self.file, 300)}: {MAX_PROBLEMS} problems or more; those above were found first")

    def check(self, *more: str) -> None:
        """Raise what was noted, if anything was: a problem a line, in the order of the file."""
        if not self.problems:
            return
        files = list(dict.fromkeys([self.file, *(file for file, _ in self.problems.values())]))
        lines = sorted(self.problems, key=lambda p: (files.index(self.problems[p][0]), self.problems[p][1]))
        raise RecipeError("\n".join([*lines, *more]))

    def fail(self, path: Path_, message: str) -> NoReturn:
        """Raise what was noted and this, where nothing that follows could be checked."""
        self.note(path, message)
        self.check()
        raise AssertionError("a problem was noted")


def read_file(path: Path, is_: str = IS) -> Document:
    """The document in a file; `is_` says of one that is no mapping what it should be."""
    file, name = str(path), clip(str(path), 300)
    try:
        if path.is_dir():
            raise RecipeError(f"{name}: a recipe is a file, found a directory; name a .yaml file in it")
        if not path.exists():
            raise RecipeError(f"{name}: no such file")
        if not path.is_file():
            raise RecipeError(f"{name}: a recipe is a regular file, found something else")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{name}: a recipe has at most {MAX_BYTES} bytes, found more")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{name}:{line}: a recipe is a text file in UTF-8, found byte 0x{raw[error.start]:02x}"
        ) from error
    document = read_text(text, file, is_)
    document.base = path.resolve().parent
    return document


def read_text(text: str, file: str, is_: str = IS) -> Document:
    """The document in a string; `file` names it in errors."""
    name = clip(file, 300)
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{name}: a recipe has at most {MAX_BYTES} bytes, found {len(text)} characters")
    node = _compose(text, name)
    if node is None:
        raise RecipeError(f"{name}: {is_}, found an empty file")
    reader = _Reader(file)
    data = reader.read(node, ())
    if isinstance(data, dict):
        return Document(data, file, None, reader.marks, reader.problems.problems)
    reader.problems.check()
    line, kind = node.start_mark.line + 1, "nothing (null)" if data is None else in_words(data)
    raise RecipeError(f"{name}:{line}: {is_}, found {kind}")


def _compose(text: str, file: str) -> Node | None:
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.composer.warn_double_anchors = False
        _check_size(yaml, text, file)
        node: Node | None = yaml.compose(io.StringIO(text))
        return node
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        reason = " ".join(str(part) for part in (error.context, error.problem) if part)
        raise RecipeError(f"{file}{line}: not valid YAML: {clip(reason, 200)}") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: {_TOO_DEEP}, found more") from error
    except (YAMLError, ValueError) as error:
        position = getattr(error, "position", None)
        line = f":{text.count(chr(10), 0, position) + 1}" if isinstance(position, int) else ""
        reason = f"character {error.character!r} is not allowed" if hasattr(error, "character") else str(error)
        raise RecipeError(f"{file}{line}: not valid YAML: {clip(reason, 200)}") from error


def _check_size(yaml: YAML, text: str, file: str) -> None:
    """Count before anything is built, which takes seconds where there is much."""
    depth = count = 0
    for event in yaml.parse(io.StringIO(text)):
        count += isinstance(event, NodeEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{file}: {_TOO_DEEP}, found more")
        if count > MAX_NODES:
            raise RecipeError(f"{file}: a recipe has at most {MAX_NODES} values, found more")


class _Reader:
    """Expands nodes to plain data. No object is ever built from a tag."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.marks: dict[Path_, tuple[str, int | None]] = {}
        self.problems = Document({}, file)
        self.count = 0

    def note(self, node: Node, path: Path_, message: str) -> None:
        """A problem in the node's own line, whatever line its path has."""
        line, text = node.start_mark.line + 1, path_text(path)
        where = f"{clip(self.file, 300)}:{line}: {text + ': ' if text else ''}"
        self.problems.add(where + message, self.file, line)

    def fail(self, node: Node, path: Path_, message: str) -> NoReturn:
        self.note(node, path, message)
        self.problems.check()
        raise AssertionError("a problem was noted")

    def read(self, node: Node, path: Path_) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            self.fail(node, path, f"a recipe has at most {MAX_NODES} values, aliases expanded, found more")
        if len(path) > MAX_DEPTH:
            self.fail(node, (), f"{_TOO_DEEP}, found more (does an alias contain itself?)")
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            return [self._item(child, (*path, i)) for i, child in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node, path, tag.removeprefix(_TAG))
        self.note(node, path, f"tags are not allowed in a recipe, found {_short_tag(tag)}")
        return BAD

    def _item(self, node: Node, path: Path_) -> Any:
        self.marks[path] = (self.file, node.start_mark.line + 1)
        return self.read(node, path)

    def _scalar(self, node: ScalarNode, path: Path_, tag: str) -> Any:
        text = node.value
        if tag in ("str", "timestamp"):
            return text
        try:
            return _plain(tag, text)
        except ValueError:
            self.note(node, path, f"not a valid {tag}: {quoted(text)}")
        except KeyError:
            self.note(node, path, f"tags are not allowed in a recipe, found {_short_tag(str(node.tag))}")
        return BAD

    def _mapping(self, node: MappingNode, path: Path_) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, ScalarNode) and str(key_node.tag) == _TAG + "merge":
                self._merge(value, path, merged)
                continue
            if not isinstance(key_node, ScalarNode):
                self.note(key_node, path, "a key must be a plain word, found a list or a mapping")
                continue
            key = str(key_node.value)
            if key in lines:
                message = f"a key may stand once, found {quoted(key)} also in line {lines[key]}"
                self.note(key_node, (*path, key), message)
                continue
            lines[key] = line
            self.marks[(*path, key)] = (self.file, line)
            data[key] = self.read(value, (*path, key))
        return {**{k: v for k, v in merged.items() if k not in data}, **data}

    def _merge(self, node: Node, path: Path_, merged: dict[str, Any]) -> None:
        """Add what `<<` names to `merged`; what stands there already wins, and its lines do, too."""
        own, self.marks = self.marks, {}
        parts = [self.read(n, path) for n in (node.value if isinstance(node, SequenceNode) else [node])]
        for place, mark in self.marks.items():
            own.setdefault(place, mark)
        self.marks = own
        for part in parts:
            if isinstance(part, dict):
                for key, item in part.items():
                    merged.setdefault(key, item)
            elif part is not BAD:
                self.note(node, path, f"<< takes a mapping or a list of mappings, found {in_words(part)}")


def _plain(tag: str, text: str) -> Any:
    digits = text.replace("_", "").lower()
    if tag == "null":
        return None
    if tag == "bool":
        return {"true": True, "false": False}[digits]
    if tag == "int":
        sign, digits = (-1, digits[1:]) if digits.startswith("-") else (1, digits.lstrip("+"))
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10)
        if len(digits) > 30:
            raise ValueError
        return sign * int(digits, base)
    if tag == "float":
        return float(digits.replace(".inf", "inf").replace(".nan", "nan"))
    raise KeyError(tag)


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it: `4` a number, `int` a word."""
    name = f"value {quoted(text)}"
    node = _compose(text, name) if text.strip() else None
    if node is None:
        return None
    reader = _Reader(name)
    value = reader.read(node, ())
    reader.problems.check()
    return value


def read_mapping(source: Mapping[Any, Any]) -> Document:
    """A document from a Python mapping, copied; instances of plugins may stand in it."""
    count = 0

    def copy(value: Any, path: Path_) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or len(path) > MAX_DEPTH:
            raise RecipeError(f"<mapping>: {_TOO_DEEP} and {MAX_NODES} values, found more; does it contain itself?")
        if isinstance(value, Mapping):
            for key in value:
                if isinstance(key, bool) or not isinstance(key, str | int):
                    where = f"<mapping>: {path_text(path)}{': ' if path else ''}"
                    raise RecipeError(f"{where}a key must be a word, found {in_words(key)}")
            return {str(key): copy(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, (*path, i)) for i, item in enumerate(value)]
        return value

    return Document(copy(source, ()), "<mapping>")


def dump_yaml(data: Any) -> str:
    """YAML that reads back as the same data: policies and stores on one line each, without anchors."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 1 << 30  # folding text loses spaces in some places
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(_styled(data), stream)
    return stream.getvalue()


def _styled(data: Any) -> Any:
    if isinstance(data, dict):
        mapping = CommentedMap({key: _styled(value) for key, value in data.items()})
        if data and not any(isinstance(value, dict | list) for value in data.values()):
            mapping.fa.set_flow_style()
        return mapping
    if isinstance(data, str) and not data.isprintable():  # plain, a mark of byte order would be dropped
        return DoubleQuotedScalarString(data)
    return [_styled(item) for item in data] if isinstance(data, list | tuple) else data


def _short_tag(tag: str) -> str:
    return clip(f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag)
