"""Loads a config. Rising precedence: defaults of the schema, experiment file, KEY=VALUE on the command line.

    loaded = load_config("configs/clipspm/demo.yaml", ["TRAIN.SHOT=5", "MODEL.HSMR.ENABLED=false"])
    loaded.config.TRAIN.SHOT            # 5
    loaded.origins["TRAIN.SHOT"]        # 'command line'

All problems of a config are reported together, one per line, before a run begins.
"""

import difflib
import functools
import logging
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
from pydantic.fields import FieldInfo

from utils.errors import UserError
from utils.experiment_file import LEGACY_KEYS, LEGACY_VALUES, PRESET_HINT, read_experiment
from utils.files import write_atomically
from utils.method_options import method_names, options_without_torch, raise_if_unknown
from utils.schema import Config, ModelOptions, is_section, known_keys
from utils.yaml_text import parse_yaml, yaml_lines

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT, COMMAND_LINE = "default", "command line"
RUN_DIRECTORY = "CHECKPOINT.CHECKPOINT_DIR"
OVERVIEW_HEAD = """\
# Every key that all methods share, with its default: an overview, which no command reads. A method's own keys
# (MODEL.HSMR and the like) are in models/model_<name>.py. An experiment file holds what differs from the defaults,
# KEY=VALUE on the command line overrides it, and --print-config shows every value and its origin. Written by
#   python -c "from utils.config import overview; print(overview(), end='')" > configs/base.yaml
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConfig:
    """A config, the origin of each value by dotted key, and the warnings of loading it."""

    config: Config
    origins: dict[str, str]
    warnings: list[str]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), warn: Callable[[str], None] = logger.warning
) -> LoadedConfig:
    """Returns the config of an experiment file with `KEY=VALUE` overrides.

    Raises:
        UserError: the config is not valid; the message has a line for each problem.
    """
    loaded = _resolve(read_experiment(Path(path)), overrides)
    for warning in loaded.warnings:
        warn(warning)
    return loaded


def config_from_dict(
    data: Mapping[str, Any], source: str = "the stored config", overrides: Sequence[str] = ()
) -> Config:
    """Returns the config from the output of `config_to_dict`, checked like a file.

    Args:
        data: sections and keys; a dotted key names its sections too.
        source: origin of the data, for messages.
        overrides: `KEY=VALUE` pairs that take precedence over the data.

    Raises:
        UserError: the config is not valid.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: expected sections and keys, found {_show_value(data)}.")
    return _resolve([(source, data)], overrides).config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as plain dicts, lists and scalars, for JSON and checkpoints."""
    return config.model_dump(mode="json")


def save_config(config: Config, path: str | Path) -> None:
    """Writes every value of the config as YAML that `load_config` reads back to an equal config."""
    text = "".join(f"{line}\n" for _, line in yaml_lines(config_to_dict(config)))
    write_atomically(Path(path), text.encode())


def format_config(loaded: LoadedConfig) -> str:
    """Returns the resolved config as YAML, with the origin of every value as a comment."""
    lines = list(yaml_lines(config_to_dict(loaded.config)))
    column = min(max(len(line) for _, line in lines), 60)
    return "".join(f"{line:{column}}  # {loaded.origins[key]}\n" if key else f"{line}\n" for key, line in lines)


def overview() -> str:
    """Returns the text of configs/base.yaml: every common key with its default and description."""
    known = known_keys(Config, ModelOptions)
    lines = [OVERVIEW_HEAD]
    for key, line in yaml_lines(config_to_dict(Config())):
        lines.append(f"{line:34} # {known[key].description}" if key else f"\n{line}")
    return "\n".join(lines) + "\n"


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of nested sections with its dotted key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- merging and checking ---------------------------------------------------------------------------------

Entry = tuple[str, Any, Any]  # origin, key, value or section


def _resolve(files: Iterable[tuple[str, Mapping[Any, Any]]], overrides: Sequence[str]) -> LoadedConfig:
    """Returns the config of files and overrides, or raises one UserError with all problems.

    Mistakes are found without PyTorch, whose import takes seconds, unless the method is a class outside models/.
    """
    entries: list[Entry] = [(origin, key, value) for origin, data in files for key, value in data.items()]
    problems: list[str] = []
    for argument in overrides:
        try:
            entries.append((COMMAND_LINE, *_parse_override(argument)))
        except UserError as error:
            problems.append(str(error))
    merged = _Merged(entries, None)
    if "MODEL.NAME" not in merged.problems:
        try:
            with suppress(NameError):  # a check in the options may need a package that was not imported
                merged = _Merged(entries, _quick_options_of(merged.method))
            if merged.options is None or not (problems or merged.problems):
                merged = _Merged(entries, _options_of(merged.method))
        except UserError as error:
            problems.append(f"{merged.origins.get('MODEL.NAME', DEFAULT)}: {error}")
    problems += merged.problems.values()
    if merged.config is None or problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    origins = {key: merged.origins.get(key, DEFAULT) for key, _ in leaves(config_to_dict(merged.config))}
    return LoadedConfig(merged.config, origins, [*merged.warnings, PRESET_HINT] if merged.warnings else [])


def _parse_override(argument: str) -> tuple[str, Any]:
    """Returns key and value of `KEY=VALUE`; an empty value is the empty text, so that `INFO=` clears a note."""
    key, equals, text = argument.partition("=")
    key = key.strip()
    if not equals or not key:
        found = _show_value(argument)
        raise UserError(f"{COMMAND_LINE}: expected KEY=VALUE such as TRAIN.SHOT=5, found {found}.")
    return key, parse_yaml(text, _place(_show_key(key), COMMAND_LINE)) if text else ""


def _options_of(method: str) -> type[ModelOptions]:
    from models import options_of  # imported late: models imports torch and this module

    return options_of(method)


def _quick_options_of(method: str) -> type[ModelOptions] | None:
    """Returns a copy of the class to check a config with, None if only its import can provide the class."""
    if ":" in method or "torch" in sys.modules:
        return None
    raise_if_unknown(method)
    return options_without_torch(method)


class _Merged:
    """Entries in rising precedence, merged and checked against the schema.

    Attributes:
        config: the checked config; None if it is not valid, or if its method is not known.
        data: nested sections and keys -> the merged values.
        origins: dotted key -> origin of its value.
        problems: dotted key or another text -> a sentence.
        warnings: a sentence for each old key or value.
    """

    def __init__(self, entries: Iterable[Entry], options: type[ModelOptions] | None) -> None:
        """Merges and checks entries; if `options`, the method's class, is None, its keys are not checked."""
        self.options = options
        self.known = known_keys(Config, options or ModelOptions)
        self.data: dict[str, Any] = {"MODEL": {}}
        self.origins: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.warnings: list[str] = []
        for entry in entries:
            self._take(*entry)
        self.config = self._validate()

    @property
    def method(self) -> Any:
        """The value of MODEL.NAME, which may be wrong."""
        return self.data["MODEL"].get("NAME", ModelOptions().NAME)

    def _take(self, origin: str, key: Any, value: Any) -> None:
        """Records one key, or all keys of a section; later entries replace earlier ones."""
        if key not in self.known:
            self._handle_unknown(origin, key)
        elif not is_section(self.known[key]):
            renamed = LEGACY_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
            if renamed is not None:
                self.warnings.append(f"{origin}: {key} {value} is now called {renamed}.")
            *sections, name = key.split(".")
            section = functools.reduce(lambda outer, inner: outer.setdefault(inner, {}), sections, self.data)
            section[name] = value if renamed is None else renamed
            self.origins[key] = origin
        elif isinstance(value, Mapping):
            for inner, inner_value in value.items():
                self._take(origin, f"{key}.{inner}", inner_value)
        elif value is not None:  # a section with all its keys commented out is empty
            keys = [name for name in self.known if name.rpartition(".")[0] == key]
            self.problems[key] = (
                f"{_place(key, origin)}: expected a section with keys such as {_join_words(keys[:3])}, "
                f"found {_show_value(value)}."
            )

    def _handle_unknown(self, origin: str, key: Any) -> None:
        """Adds a warning or a problem for a key that is not in the schema."""
        if self.options is None and str(key).startswith("MODEL."):
            return
        if key in LEGACY_KEYS:
            self.warnings.append(f"{origin}: {key} is no longer used: {LEGACY_KEYS[key]}.")
        else:
            hint = _owners(str(key)) or _suggest(str(key), self.known)
            self.problems[f"{key} in {origin}"] = f"{origin}: unknown key {_show_key(key)}{hint}"

    def _validate(self) -> Config | None:
        """Returns the config of the merged values; None, with their problems added, if it is not valid."""
        model, config = None, None
        try:
            model = (self.options or ModelOptions).model_validate(self.data["MODEL"])
        except pydantic.ValidationError as error:
            self._note(error, ["MODEL"])
        try:
            # If MODEL is wrong, the other sections are checked with its common keys unchecked.
            common = {key: value for key, value in self.data["MODEL"].items() if key in ModelOptions.model_fields}
            config = Config.model_validate({**self.data, "MODEL": model or ModelOptions.model_construct(**common)})
        except pydantic.ValidationError as error:
            self._note(error, [])
        if model is None or config is None or self.options is None:
            return None
        return self._named_run(config)

    def _named_run(self, config: Config) -> Config:
        """Returns the config with `{KEY}` in CHECKPOINT_DIR replaced by values."""
        values = dict(leaves(config_to_dict(config)))

        def value_of(match: re.Match[str]) -> str:
            if match[1] not in values:
                where = _place(RUN_DIRECTORY, self.origins[RUN_DIRECTORY])
                self.problems[RUN_DIRECTORY] = f"{where}: unknown key {match[0]}{_suggest(match[1], self.known)}"
            return str(values.get(match[1])).replace("/", "-")

        name = re.sub(r"\{([A-Z][A-Z0-9_.]*)\}", value_of, config.CHECKPOINT.CHECKPOINT_DIR)
        checkpoint = config.CHECKPOINT.model_copy(update={"CHECKPOINT_DIR": name})
        return config.model_copy(update={"CHECKPOINT": checkpoint})

    def _note(self, failure: pydantic.ValidationError, path: list[str]) -> None:
        """Adds one problem for each key below `path` that pydantic complains about."""
        errors_of: dict[str, list[Any]] = {}
        for error in failure.errors(include_url=False):
            parts = list(path)
            for part in error["loc"]:  # continues below a key, into list entries and the parts of a union
                if ".".join([*parts, str(part)]) not in self.known:
                    break
                parts.append(str(part))
            errors_of.setdefault(".".join(parts), []).append(error)
        for key, errors in errors_of.items():
            if key in self.origins:
                value = functools.reduce(lambda section, name: section[name], key.split("."), self.data)
                self.problems[key] = f"{_place(key, self.origins[key])}: {_explain(self.known[key], errors, value)}"
            elif errors[0]["type"] == "missing":
                self.problems[key] = f"{key} has no default: set it to {_expected(self.known[key].annotation)}."
            else:  # rules on several keys of a section; their messages name the keys
                self.problems[key] = "\n".join(str(error["ctx"]["error"]) for error in errors)


# --- messages ---------------------------------------------------------------------------------------------

_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}
# pydantic's name of an error -> what was expected, and where pydantic has the limit.
_LIMITS = {
    "greater_than_equal": ("at least {}", "ge"),
    "greater_than": ("more than {}", "gt"),
    "less_than_equal": ("at most {}", "le"),
    "less_than": ("less than {}", "lt"),
    "too_short": ("at least {} entries", "min_length"),
    "too_long": ("at most {} entries", "max_length"),
    "string_too_short": ("non-empty text", "min_length"),
    "finite_number": ("a finite number", ""),
}


def _place(key: str, origin: str) -> str:
    """Returns `TRAIN.SHOT in configs/x.yaml`, or `TRAIN.SHOT on the command line`."""
    return f"{key} on the {origin}" if origin == COMMAND_LINE else f"{key} in {origin}"


def _show_key(key: object) -> str:
    """Returns a key as in the file, or escaped if it cannot be printed."""
    text = str(key)
    return text if text.isprintable() and text else repr(text)


def _show_value(value: Any, longest: int = 80) -> str:
    """Returns a short form of a value: text in quotes, a section by its keys."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, Mapping):
        text = f"a section with the keys {', '.join(map(_show_key, value))}" if value else "an empty section"
    elif isinstance(value, list):
        text = f"[{', '.join(map(_show_value, value))}]"
    else:
        text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _expected(annotation: Any) -> str:
    """Returns the values that a key of this type accepts: `int | None` -> 'a whole number or null'."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expected(parts[0])
    if origin in (Union, types.UnionType):
        return _join_words([_expected(part) for part in parts])
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin is list:
        entry = get_args(parts[0])[0] if get_origin(parts[0]) is Annotated else parts[0]
        return f"a list of {_PLURALS.get(entry, 'values')}"
    return _TYPE_WORDS.get(annotation, "another kind of value")


def _explain(field: FieldInfo, errors: Sequence[Mapping[str, Any]], value: Any) -> str:
    """Returns the end of a sentence on one key: 'expected at least 1, found 0.'

    `errors` are pydantic's for this key, one for each part of a union; its wording is not used.
    """
    for error in errors:
        if error["type"] == "value_error":  # a rule of the schema or of the method, with its message
            return str(error["ctx"]["error"])
        if error["type"] in _LIMITS:  # the type is right, so the range alone matters
            words, limit = _LIMITS[error["type"]]
            bound = error.get("ctx", {}).get(limit, 0)
            bound = int(bound) if float(bound).is_integer() else bound
            return f"expected {words.format(bound)}, found {_show_value(value)}."
    hint = (
        " (put it in quotes to make it text)" if field.annotation is str and not isinstance(value, str | None) else ""
    )
    return f"expected {_expected(field.annotation)}, found {_show_value(value)}{hint}."


def _join_words(words: Sequence[str]) -> str:
    """Returns 'a', 'a or b', 'a, b or c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _owners(key: str) -> str:
    """Returns the end of a sentence on a key that only other methods have; '' if no method has it."""
    if not key.startswith("MODEL."):
        return ""
    options_of = {name: options for name in method_names() if (options := options_without_torch(name))}
    owners = [name for name, options in options_of.items() if options.reads(key.removeprefix("MODEL."))]
    return f" for this MODEL.NAME; it is an option of {_join_words(owners)}." if owners else ""


def _suggest(key: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence on an unknown key: '; did you mean TRAIN.SHOT?', or the keys of its section."""
    names = list(known)
    section, _, leaf = key.rpartition(".")
    same_leaf = [name for name in names if name.rpartition(".")[2].lower() == leaf.lower()]
    siblings = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == section}
    suggestions = (
        [name for name in same_leaf if name.lower() == key.lower()]
        or difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.85)  # a typo in the section's name
        or same_leaf[:3]
        or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1)]
        or difflib.get_close_matches(key, [] if siblings else names, n=1, cutoff=0.8)
    )
    if suggestions:
        return f"; did you mean {_join_words(suggestions)}?"
    return f"; {section or 'a config'} has {', '.join(siblings)}." if siblings else "."
