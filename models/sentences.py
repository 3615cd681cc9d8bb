"""The sentences that describe each class: from the templates, or from a user's file (MODEL.TEXT_FILE).

The file is YAML or JSON and has one or more sentences for each class, under its prompt in the split's classes.yaml.
Case, spaces and punctuation are ignored: `ride_bike`, `ride bike` and `RideBike` are the same class.

    ride bike:
      - a person sits on a bicycle and pedals
      - a rider steers a bike along a road
"""

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from models.text import TEMPLATES, Normalisation, TemplateSet, has_a_word
from utils.errors import UserError, first_of
from utils.schema import ModelOptions, PathText
from utils.yaml_text import parse_yaml, read_text_file

MAX_SHOWN = 10  # classes listed in a message


class TextOptions(ModelOptions):
    """The keys of MODEL for the text features of the classes."""

    TEXT_TEMPLATES: TemplateSet = Field("actionclip16", description="sentences averaged into a class text")
    TEXT_FILE: PathText = Field(
        "", description="YAML or JSON file with sentences for each class, instead of the templates; empty: none"
    )
    TEXT_NORMALISE: Normalisation = Field(
        "none", description="normalise to unit length: none, each sentence's feature, or each+mean, their mean too"
    )


class ClassSentences:
    """The sentences of the classes, from the options of a method."""

    def __init__(self, options: TextOptions) -> None:
        self.options = options

    def of(self, prompt_names: Sequence[str]) -> list[list[str]]:
        """Returns one or more sentences for each of C class names.

        Raises:
            UserError: the file is missing or not valid, or has no sentences for some classes.
        """
        if not self.options.TEXT_FILE:
            templates = TEMPLATES[self.options.TEXT_TEMPLATES]
            return [[template.format(name) for template in templates] for name in prompt_names]
        described = {letters(name): sentences for name, sentences in self._file.items()}
        if missing := [name for name in prompt_names if letters(name) not in described]:
            shown = ", ".join(first_of([self._with_nearest(name) for name in missing], MAX_SHOWN))
            raise UserError(
                f"MODEL.TEXT_FILE: {self.options.TEXT_FILE} has no sentences for {shown}: add them, or set "
                "MODEL.TEXT_FILE to an empty text to describe the classes by MODEL.TEXT_TEMPLATES"
            )
        return [described[letters(name)] for name in prompt_names]

    @functools.cached_property
    def _file(self) -> dict[str, list[str]]:
        return read_sentences(Path(self.options.TEXT_FILE).expanduser())

    def _with_nearest(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._file, n=1)
        return repr(name) + (f" (it has {nearest[0]!r})" if nearest else "")


def letters(name: str) -> str:
    """Returns the letters and digits of a name in lower case, the key for looking up classes."""
    return "".join(filter(str.isalnum, name.casefold()))


def read_sentences(path: Path) -> dict[str, list[str]]:
    """Returns the sentences of each class in a file.

    Raises:
        UserError: the file is unreadable or not valid; the message has one line per invalid class.
    """
    name = f"MODEL.TEXT_FILE: {path}"
    text = read_text_file(path, name, "text")
    content = _parse_json(text, name) if path.suffix.lower() == ".json" else parse_yaml(text, name, "text file", True)
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{name}: expected classes with a list of sentences each (ride bike: [a person rides a bike])")
    described: dict[str, list[str]] = {}
    problems: list[str] = []
    by_letters: dict[str, str] = {}
    by_text: dict[tuple[str, ...], str] = {}
    for key, value in content.items():
        sentences = [value] if isinstance(value, str) else value
        if not isinstance(key, str):
            problems.append(f"the class {key!r} is not text; put it in quotes")
        elif not isinstance(sentences, list) or not sentences or not all(map(_is_sentence, sentences)):
            problems.append(f"expected a sentence or a list of sentences for class {key!r}, each with a word in it")
        elif (other := by_letters.setdefault(letters(key), key)) != key:
            problems.append(f"{other!r} and {key!r} are the same class; keep one of them")
        elif (other := by_text.setdefault(tuple(sentences), key)) != key:
            problems.append(f"classes {other!r} and {key!r} have the same sentences, so text cannot separate them")
        else:
            described[key] = sentences
    if problems:
        raise UserError("\n".join(f"{name}: {problem}" for problem in first_of(problems, MAX_SHOWN, " problems")))
    return described


def _is_sentence(value: Any) -> bool:
    return isinstance(value, str) and has_a_word(value)


def _parse_json(text: str, name: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if duplicate := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{name}: the class {duplicate!r} occurs twice; keep one of them")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}: not valid JSON: {error.msg}.") from error
    except RecursionError as error:
        raise UserError(f"{name}: not valid JSON: it is too deeply nested.") from error
