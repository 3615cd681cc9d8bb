"""YAML as configs and class lists use it: the plain part of the language, read strictly and written back the same.

Text that people take for a number is one (`1e5`, `5E-5`, `10e-5`), and what surprises them is gone:
`no` and `2024-01-01` are text, a key cannot occur twice, and there are no anchors, aliases or tags.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

LARGEST_FILE = 1_000_000  # bytes; a config has a few thousand, a class list of 1,000 classes about 80,000
DEEPEST_NESTING = 20  # levels; a config has three or four

_NUMBER = re.compile(
    r"""^[-+]?(?:
        [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
      | \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
      | [0-9][0-9_]*[eE][-+]?[0-9]+
      | \.(?:inf|Inf|INF)
    )$|^\.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)
_FLOAT_RESOLVER = ("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


class _StrictLoader(yaml.SafeLoader):
    """Reads null, true, false, numbers, text, lists and mappings; everything else is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as in PyYAML)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Build one node, after refusing what could hide a value or exhaust the stack."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(
                problem="aliases and anchors (* and &) are not supported; quote a text that begins so",
                problem_mark=event.start_mark,
            )
        if event.tag is not None:
            raise yaml.MarkedYAMLError(
                problem="tags (!) are not supported; quote a text that begins so",
                problem_mark=event.start_mark,
            )
        if self.depth == DEEPEST_NESTING:
            raise yaml.MarkedYAMLError(problem="too deeply nested", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, after refusing a key that is given twice, or that could be given in two ways."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=mark)
            if "." in key_node.value:
                raise yaml.MarkedYAMLError(
                    problem=f"write {key_node.value} as a key inside its section; only the command line joins them",
                    problem_mark=mark,
                )
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value} occurs twice, first in line {seen[key]}",
                    problem_mark=mark,
                )
            seen[key] = mark.line + 1
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(*_FLOAT_RESOLVER)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the loader here, or any other YAML reader, would take for something else."""


_Dumper.add_implicit_resolver(*_FLOAT_RESOLVER)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with a line break or another special character is written with escapes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, name: str, kind: str = "config") -> Any:
    """The value of a YAML text. `name` says in messages where the text comes from, `kind` what it should be."""
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{name}{line}: not a valid {kind}: {error.problem}.") from error
    except yaml.reader.ReaderError as error:
        line_number = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{name}, line {line_number}: not a valid {kind}: it holds an unprintable character."
        ) from error
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{name}: not a valid {kind}: it holds a number or a character code that is too long."
        ) from error


def read_yaml_file(path: Path, name: str, kind: str = "config") -> dict[Any, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. `name` and `kind` are for messages."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no such {kind} file.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a usable path"
        raise UserError(f"{name}: the {kind} file cannot be read ({reason}).") from error
    if len(content) > LARGEST_FILE:
        raise UserError(f"{name}: a {kind} file has at most {LARGEST_FILE:,} bytes, this one has more.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: the {kind} file is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    data = parse_yaml(text, name, kind)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{name}: expected sections and keys (KEY: value), found a {_kind(data)}.")
    return data


def _kind(value: Any) -> str:
    """What stands where a mapping was expected."""
    return "list" if isinstance(value, list) else "single value"


def yaml_lines(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each line of `data` as YAML, with the dotted key it sets ('' for the head of a section)."""
    indent = "  " * prefix.count(".")
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield "", f"{indent}{key}:"
            yield from yaml_lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{indent}{key}: {one_line(value)}"


def one_line(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
