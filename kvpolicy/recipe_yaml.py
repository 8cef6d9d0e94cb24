"""Reads YAML into plain data that remembers its lines, and refuses whatever is not plain data."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from kvpolicy.errors import RecipeError

__all__ = ["Document", "dump_yaml", "parse_scalar", "path_text", "read_file", "read_mapping", "read_text"]

MAX_BYTES = 1 << 17
MAX_NODES = 20_000
MAX_DEPTH = 40
Path_: TypeAlias = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"
_TOO_DEEP = f"a recipe nests at most {MAX_DEPTH} levels"


def path_text(path: Path_) -> str:
    """`tiers[1].policy.budget`."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


@dataclass
class Document:
    """Plain data, and the file and line of each path in it."""

    data: dict[str, Any]
    file: str
    base: Path | None = None
    """The directory that relative paths in it start from."""
    marks: dict[Path_, tuple[str, int | None]] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """File, line and path, as an error starts."""
        file, line = self.file, None
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                file, line = self.marks[path[:length]]
                break
        text = path_text(path)
        return f"{file}{f':{line}' if line else ''}{f': {text}' if text else ''}"

    def fail(self, path: Path_, message: str) -> NoReturn:
        raise RecipeError(f"{self.where(path)}: {message}")


def read_file(path: Path) -> Document:
    """The document in a file."""
    name = str(path)
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
        raise RecipeError(f"{name}: can't be read: {error}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{name}: a recipe has at most {MAX_BYTES} bytes, found more")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"{name}:{line}: a recipe is a text file in UTF-8, found byte 0x{raw[error.start]:02x}"
        ) from error
    document = read_text(text, name)
    document.base = path.resolve().parent
    return document


def read_text(text: str, file: str) -> Document:
    """The document in a string; `file` names it in errors."""
    if len(text) > MAX_BYTES:
        raise RecipeError(f"{file}: a recipe has at most {MAX_BYTES} bytes, found {len(text)} characters")
    node = _compose(text, file)
    if node is None:
        raise RecipeError(f"{file}: a recipe is a mapping with keys such as name and tiers, found an empty file")
    reader = _Reader(file)
    data = reader.read(node, ())
    if not isinstance(data, dict):
        line = node.start_mark.line + 1
        raise RecipeError(f"{file}:{line}: a recipe is a mapping with keys such as name and tiers, found {_kind(data)}")
    return Document(data, file, None, reader.marks)


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
        raise RecipeError(f"{file}{line}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: {_TOO_DEEP}, found more") from error
    except (YAMLError, ValueError) as error:
        position = getattr(error, "position", None)
        line = f":{text.count(chr(10), 0, position) + 1}" if isinstance(position, int) else ""
        reason = f"character {error.character!r} is not allowed" if hasattr(error, "character") else str(error)
        raise RecipeError(f"{file}{line}: not valid YAML: {reason}") from error


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
        self.count = 0

    def fail(self, node: Node, path: Path_, message: str) -> NoReturn:
        text = path_text(path)
        raise RecipeError(f"{self.file}:{node.start_mark.line + 1}: {text + ': ' if text else ''}{message}")

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
        if not isinstance(node, ScalarNode):
            self.fail(node, path, f"tags are not allowed in a recipe, found {_short_tag(tag)}")
        return self._scalar(node, path, tag.removeprefix(_TAG))

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
            self.fail(node, path, f"not a valid {tag}: {text!r}")
        except KeyError:
            self.fail(node, path, f"tags are not allowed in a recipe, found {_short_tag(str(node.tag))}")

    def _mapping(self, node: MappingNode, path: Path_) -> dict[str, Any]:
        data: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if isinstance(key_node, ScalarNode) and str(key_node.tag) == _TAG + "merge":
                for part in self._merge(value, path):
                    merged = {**part, **merged}
                continue
            if not isinstance(key_node, ScalarNode):
                self.fail(key_node, path, "a key must be a plain word, found a list or a mapping")
            key = str(key_node.value)
            if key in lines:
                self.fail(key_node, (*path, key), f"a key may stand once, found {key!r} also in line {lines[key]}")
            lines[key] = line
            self.marks[(*path, key)] = (self.file, line)
            data[key] = self.read(value, (*path, key))
        return {**{k: v for k, v in merged.items() if k not in data}, **data}

    def _merge(self, node: Node, path: Path_) -> list[dict[str, Any]]:
        before = dict(self.marks)
        parts = [self.read(n, path) for n in (node.value if isinstance(node, SequenceNode) else [node])]
        self.marks.update(before)
        for part in parts:
            if not isinstance(part, dict):
                self.fail(node, path, f"<< takes a mapping or a list of mappings, found {_kind(part)}")
        return parts


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
    node = _compose(text, f"value {text!r}") if text.strip() else None
    if node is None:
        return None
    return _Reader(f"value {text!r}").read(node, ())


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
                    raise RecipeError(f"<mapping>: {path_text(path)}: a key must be a word, found {key!r}")
            return {str(key): copy(item, (*path, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, (*path, i)) for i, item in enumerate(value)]
        return value

    return Document(copy(source, ()), "<mapping>")


def dump_yaml(data: Any) -> str:
    """YAML that reads back as the same data: policies and stores on one line each, without anchors."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 110
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
    return [_styled(item) for item in data] if isinstance(data, list | tuple) else data


def _kind(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    named = {dict: "a mapping", list: "a list", type(None): "nothing (null)"}
    return named.get(type(value), repr(value))


def _short_tag(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag
