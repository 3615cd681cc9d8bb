"""Plain words for what is wrong in a config: what was expected, what was found, what was perhaps meant."""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic.fields import FieldInfo

from utils.schema import Section

COMMAND_LINE = "command line"

_PLAIN_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def place(key: str, origin: str) -> str:
    """`TRAIN.SHOT in configs/x.yaml`, or `TRAIN.SHOT on the command line`."""
    return f"{key} on the {origin}" if origin == COMMAND_LINE else f"{key} in {origin}"


def show_key(key: object) -> str:
    """A key as the file writes it, unless that could not be printed."""
    text = str(key)
    return text if text.isprintable() and text else repr(text)


def show_value(value: Any) -> str:
    """A found value in short: text in quotes, a section by its keys."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return _shorten(f"a section with the keys {', '.join(map(show_key, value))}" if value else "an empty section")
    if isinstance(value, list):
        return _shorten(f"[{', '.join(map(show_value, value))}]")
    return _shorten(repr(value))


def _shorten(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def expected_type(annotation: Any, length: int | None = None) -> str:
    """What a key of this type takes: `int | None` -> 'a whole number or null'."""
    if get_origin(annotation) is Annotated:
        return expected_type(get_args(annotation)[0], length)
    if get_origin(annotation) in (Union, types.UnionType):
        return join_words([expected_type(part, length) for part in get_args(annotation)])
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if get_origin(annotation) is list:
        entry = get_args(annotation)[0]
        entry = get_args(entry)[0] if get_origin(entry) is Annotated else entry
        return f"a list of {f'{length} ' if length else ''}{_PLURALS.get(entry, 'values')}"
    return _PLAIN_TYPES.get(annotation, "another kind of value")


def explain(field: FieldInfo, errors: Sequence[Mapping[str, Any]], value: Any) -> str:
    """The end of a sentence on one key: 'expected at least 1, found 0.'

    `errors` are pydantic's for this key, one for each part of a union; its wording is not used.
    """
    for error in errors:
        if error["type"] == "value_error":  # a method's own rule, in its own words
            return str(error["ctx"]["error"])
    for error in errors:
        if error["type"] in _LIMITS:  # the type is right, so the range alone is worth saying
            words, limit = _LIMITS[error["type"]]
            bound = error["ctx"][limit]
            bound = int(bound) if float(bound).is_integer() else bound
            return f"expected {words} {bound}, found {show_value(value)}."
        if error["type"] == "finite_number":
            return f"expected a finite number, found {show_value(value)}."
        if error["type"] == "string_too_short":
            return "expected text, found an empty one."
    hint = ""
    if field.annotation is str and not isinstance(value, str | None):
        hint = " (put it in quotes to make it text)"
    return f"expected {expected_type(field.annotation, _fixed_length(field))}, found {show_value(value)}{hint}."


def _fixed_length(field: FieldInfo) -> int | None:
    """The number of entries that a list must have, where it must have one."""
    shortest = [rule.min_length for rule in field.metadata if hasattr(rule, "min_length")]
    longest = [rule.max_length for rule in field.metadata if hasattr(rule, "max_length")]
    return shortest[0] if shortest and shortest == longest else None


def join_words(words: Sequence[str]) -> str:
    """'a', 'a or b', 'a, b or c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def known_keys(section: type[Section], options: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key and section of a config by its dotted name; `options` takes the place of MODEL."""
    known: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        known[key] = field
        if is_section(key, known):
            inner = options if key == "MODEL" else field.annotation
            known.update(known_keys(cast(type[Section], inner), options, f"{key}."))
    return known


def is_section(key: str, known: Mapping[str, FieldInfo]) -> bool:
    """Whether a known name is that of a section and not of a value."""
    annotation = known[key].annotation
    return isinstance(annotation, type) and issubclass(annotation, Section)


def suggest(key: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown key: '; did you mean TRAIN.SHOT?', or what its section has."""
    names = list(known)
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in names if name.rpartition(".")[2].lower() == leaf.lower()]
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    found = (
        [name for name in same_leaf if name.lower() == key.lower()]
        or difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.85)  # a typo in the section's name
        or same_leaf[:3]
        or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
        or difflib.get_close_matches(key, [] if siblings else names, n=1, cutoff=0.8)
    )
    if found:
        return f"; did you mean {join_words(found)}?"
    return f"; {section or 'a config'} has {', '.join(siblings)}." if siblings else "."
