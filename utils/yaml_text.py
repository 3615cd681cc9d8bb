"""A plain subset of YAML for configs and class lists, read strictly, and written so that reading gives the same values.

`1e5`, `5E-5` and `10e-5` are numbers, `no` and `2024-01-01` are text, a key cannot occur twice, and anchors, aliases
and tags are rejected.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, seen_from

LARGEST_FILE = 1_000_000  # bytes; a config has a few thousand, a class list of 1,000 classes about 80,000
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # how Python represents bytes of a path that are not UTF-8

# Type -> pattern of the text that is read as this type, and its possible first characters.
_TYPES: dict[str, tuple[str, list[str]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(yaml.SafeLoader):
    """A loader of null, true, false, numbers, text, lists and mappings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as in PyYAML)
    dots_separate_keys = True  # a dot separates sections, and so cannot be part of a key

    def check_printable(self, data: str) -> None:
        """Rejects control characters, but accepts bytes of a path that is not UTF-8 (PEP 383)."""
        super().check_printable(NOT_UTF8.sub("", data))

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Builds one node; rejects tags, and anchors and aliases, which could grow without limit."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            problem = "anchors (&), aliases (*) and tags (!) are not supported; quote a text that begins so"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping; rejects a key that occurs twice or that joins a section and a key by a dot."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                problem = f"the key {name} occurs twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if "." in name and self.dots_separate_keys and isinstance(key, yaml.ScalarNode):
                problem = f"write {name} as a key inside its section; dots are for the command line only"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = line
        return super().construct_mapping(node, deep)


class _LoaderOfNames(_Loader):
    """A loader that accepts dots in keys, as in file names."""

    dots_separate_keys = False


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes every text that this loader, or another YAML reader, would not read as text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Writes text; line breaks and other special characters are escaped."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _type, (_pattern, _first) in _TYPES.items():
    _resolver = (f"tag:yaml.org,2002:{_type}", re.compile(f"^(?:{_pattern})$"), _first)
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)


def parse_yaml(text: str, name: str, kind: str = "config", dots_in_keys: bool = False) -> Any:
    """Returns the value of a YAML text.

    Args:
        text: the YAML text.
        name: origin of the text, for messages.
        kind: kind of the text, for messages.
        dots_in_keys: whether a dot may be part of a key.

    Raises:
        UserError: the text is not valid; the message names the line if it is known.
    """
    try:
        return yaml.load(text, _LoaderOfNames if dots_in_keys else _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it contains an unprintable character"
        if r"'\t'" in problem:
            problem = "a tab; indent with spaces"
        raise UserError(f"{name}{line}: not a valid {kind}: {problem}.") from error
    except (ValueError, OverflowError, RecursionError) as error:
        problem = "it contains a number or a character code that is too long, or is too deeply nested"
        raise UserError(f"{name}: not a valid {kind}: {problem}.") from error


def read_yaml_file(path: Path, name: str, kind: str = "config") -> dict[Any, Any]:
    """Returns the mapping in a YAML file; an empty file is an empty mapping. `name` and `kind` as in `parse_yaml`.

    Raises:
        UserError: the file is unreadable, too large, not UTF-8, not valid, or not a mapping.
    """
    data = parse_yaml(read_text_file(path, name, kind), name, kind)
    if not isinstance(data, dict | None):
        found = "list" if isinstance(data, list) else "single value"
        raise UserError(f"{name}: expected sections and keys (KEY: value), found a {found}.")
    return data or {}


def read_text_file(path: Path, name: str, kind: str) -> str:
    """Returns the text of a file; `name` and `kind` as in `parse_yaml`.

    Raises:
        UserError: the file is unreadable, too large, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise UserError(f"{name}: no such {kind} file{seen_from(path)}; check the path.") from error
    except IsADirectoryError as error:
        raise UserError(f"{name}: expected a {kind} file, found a folder; name a file in it.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        raise UserError(
            f"{name}: the {kind} file is unreadable ({reason}); check the path and its permissions."
        ) from error
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{name}: a {kind} file has at most {LARGEST_FILE:,} bytes, this one has more; check that it is the "
            "right file."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the {kind} file is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def yaml_lines(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted key ('' for the head of a section) and the YAML line of each entry of `data`."""
    indent = "  " * prefix.count(".")
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield "", f"{indent}{key}:"
            yield from yaml_lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{indent}{key}: {one_line(value)}"


def one_line(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def printable(name: str) -> str:
    """Returns a name on one line: a file name may contain line breaks, and bytes that are not text."""
    return name if name.isprintable() else repr(name)[1:-1]
