"""YAML as configs and class lists use it: numbers are numbers, and an unreadable file is one sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.helpers.configs import BILLION_LAUGHS, load_text, problem_of, refusal
from tests.helpers.shipped import CONFIGS, ROOT
from utils.config import load_config
from utils.errors import UserError
from utils.yaml_text import LARGEST_FILE, one_line, parse_yaml, read_text_file

NUMBERS = {
    "1e5": 1e5, "1E5": 1e5, "10e4": 1e5, "1.0e5": 1e5, "1e+5": 1e5, "100_000.0": 1e5, "+1e5": 1e5, "5E-5": 5e-5,
    "10e-5": 1e-4, ".5": 0.5, "0": 0, "-3": -3,
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_every_spelling_of_a_number_is_a_number(text: str, value: float) -> None:
    assert (parse_yaml(text, "x"), type(parse_yaml(text, "x"))) == (value, type(value))
    assert parse_yaml(one_line(text), "x") == yaml.safe_load(one_line(text)) == text


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "12:30", "010", "0x1f", "1.2.3", "e5", "<<", "="])
def test_values_that_resemble_other_types_are_text(text: str) -> None:
    assert parse_yaml(text, "x") == text


# Text -> the line of the error (None if unknown) and a fact of the message.
UNREADABLE = {
    "duplicate key": ("TRAIN:\n  SHOT: 1\n  SHOT: 2\n", 3, "SHOT"),
    "duplicate by spelling": ('INFO: a\n"INFO": b\n', 2, "INFO"),
    "billion laughs": (BILLION_LAUGHS, 1, "*"),
    "endless alias": ("INFO: a\na: &a [*a]\n", 2, "*"),
    "object": ("INFO: !!python/object/apply:os.system ['touch executed']\n", 1, "!"),
    "wrong tag": ("INFO: !!bool x\n", 1, "!"),
    "unclosed": ("INFO: a\nTRAIN: {SHOT: 1\n", 3, ""),
    "tab": ("TRAIN:\n\tSHOT: 1\n", 2, ""),
    "joined key": ("A: 1\nTRAIN.SHOT: 1\n", 2, "TRAIN.SHOT"),
    "key that is a list": ("{[1]: 2}\n", 1, "key"),
    "two documents": ("INFO: a\n---\nINFO: b\n", 2, ""),
    "NUL": ("INFO: a\nDEBUG: \x00\n", None, "unprintable"),
    "deep lists": ("[" * 100_000, None, "nested"),
    "deep mappings": ("{a: " * 50_000, None, "nested"),
    "huge number": ("INFO: " + "9" * 100_000, None, "long"),
    "huge character": ('INFO: "\\UFFFFFFFF"', None, "long"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_text_is_reported_in_one_sentence_with_its_line(tmp_path: Path, name: str) -> None:
    text, line, fact = UNREADABLE[name]
    for found in (problem_of(tmp_path, text), problem_of(tmp_path, "", f"INFO={text}")):
        assert found.startswith(("x.yaml", "INFO on the command line"))
        assert (f", line {line}: " in found) == (line is not None)
        assert fact in found
        assert "\n" not in found
        assert len(found) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


def test_deeply_nested_values_are_user_errors(tmp_path: Path) -> None:
    for depth in range(20, 1000, 70):
        assert problem_of(tmp_path, "", f"SOLVER.BETAS={'[' * depth}{']' * depth}").startswith("SOLVER.BETAS on")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"- TRAIN\n", "list"),
        (b"TRAIN\n", "single value"),
        (b"INFO: \xff\n", "UTF-8"),
        (b"\xff\xfeI\0N\0F\0O\0", "UTF-8"),
        (b"#" * (LARGEST_FILE + 1), f"{LARGEST_FILE:,} bytes"),
    ],
)
def test_a_file_that_is_not_a_config_is_reported_in_one_sentence(tmp_path: Path, content: bytes, fact: str) -> None:
    found = problem_of(tmp_path, content)
    assert found.startswith("x.yaml: ")
    assert fact in found
    assert "\n" not in found


def test_unreadable_paths_are_user_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path, Path("a\0b"), Path("/dev/zero")):
        with pytest.raises(UserError, match="config file"):
            load_config(path)


def test_a_byte_order_mark_is_not_part_of_the_config(tmp_path: Path) -> None:
    assert load_text(tmp_path, b"\xef\xbb\xbfINFO: note\n").config.INFO == "note"
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa text")
    assert read_text_file(path, "text", "text") == "a text"


def test_shipped_files_are_far_below_the_size_limit() -> None:
    files = [*CONFIGS, *(ROOT / "splits").glob("*/classes.yaml")]
    assert max(path.stat().st_size for path in files) < LARGEST_FILE / 10


YAML_MARKS = [*"\n:-{}[],&*!|>'\"%@#?~ \t\\", ": ", "\n  ", "- ", "<<", "---", "!!int"]
PIECES = st.sampled_from([*YAML_MARKS, "TRAIN", "SHOT", "MODEL", "NAME", "HSMR", "5", "1e5"]) | st.text(max_size=3)
IN_ONE_FOLDER = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@IN_ONE_FOLDER
@given(pieces=st.lists(PIECES, max_size=25), content=st.binary(max_size=80), override=st.text(max_size=12))
def test_any_text_loads_or_raises_a_user_error(
    tmp_path: Path, pieces: list[str], content: bytes, override: str
) -> None:
    text = "".join(pieces).encode("utf-8", errors="surrogatepass")
    for data, overrides in (
        (content, ()), (text, ()), (text, (f"INFO={override}",)), (text, (f"{override}=1",)), (text, (override,)),
    ):  # fmt: skip
        message = refusal(lambda data=data, overrides=overrides: load_text(tmp_path, data, *overrides))
        assert message is None or (message.strip() and "pydantic" not in message)


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)


EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")


def parts_of(value: Any) -> list[Any]:
    """Returns the scalars of a value."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return list(parts)


@IN_ONE_FOLDER
@example(value="0E0")
@given(value=scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.sampled_from("ab"), scalars, max_size=2))
def test_written_values_are_read_equally_by_other_parsers(value: Any) -> None:
    assert parse_yaml(one_line(value), "x") == value
    text = yaml.safe_dump(value, allow_unicode=True)
    assume(yaml.safe_load(text) == value)  # PyYAML itself loses a few, such as the line end U+0085
    # PyYAML writes the text 1e5 without quotes, since YAML 1.1 has no such number; YAML 1.2 and this reader have it.
    assume(not any(EXPONENT.fullmatch(str(part)) for part in parts_of(value) if isinstance(part, str)))
    read: list[Any] = []
    assert refusal(lambda: read.append(parse_yaml(text, "x"))) is not None or read == [value]
