"""YAML as configs use it: numbers are numbers, and an unreadable file is one sentence."""

from pathlib import Path

import pytest

from tests.config_helpers import load, load_text, problem_of
from utils.config_yaml import LARGEST_FILE, parse_yaml
from utils.errors import UserError


@pytest.mark.parametrize("text", ["1e5", "1E5", "10e4", "1.0e5", "1e+5", "100_000.0", "+1e5"])
def test_every_spelling_of_a_number_is_a_number(text: str) -> None:
    assert parse_yaml(text, "x") == 1e5
    assert isinstance(parse_yaml(text, "x"), float)


@pytest.mark.parametrize(("text", "value"), [("5E-5", 5e-5), ("10e-5", 1e-4), (".5", 0.5), ("0", 0), ("-3", -3)])
def test_small_and_negative_numbers(text: str, value: float) -> None:
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "12:30", "010", "0x1f", "1.2.3", "e5", "<<", "="])
def test_what_only_looks_like_another_type_is_text(text: str) -> None:
    assert parse_yaml(text, "x") == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "TRAIN:\n  SHOT: 1\n  SHOT: 2\n",
            "x.yaml, line 3: not a valid config: the key SHOT occurs twice, first in line 2.",
        ),
        ("TRAIN: &a {SHOT: 1}\n", "x.yaml, line 1: not a valid config: aliases and anchors"),
        ("TRAIN: *a\n", "x.yaml, line 1: not a valid config: aliases and anchors"),
        ("INFO: !!python/name:os.system\n", "x.yaml, line 1: not a valid config: tags"),
        ("INFO: a\nTRAIN: {SHOT: 1\n", "x.yaml, line 3: not a valid config: "),
        ("INFO: a: b\n", "x.yaml, line 1: not a valid config: "),
        ("A: 1\nTRAIN.SHOT: 1\n", "x.yaml, line 2: not a valid config: write TRAIN.SHOT as a key inside its section"),
        ("{[1]: 2}\n", "x.yaml, line 1: not a valid config: a key must be a word"),
        ("INFO: a\n---\nINFO: b\n", "x.yaml, line 2: not a valid config: "),
        ("INFO: a\nDEBUG: \x00\n", "x.yaml, line 2: not a valid config: it holds an unprintable character."),
        ("[" * 5000, "x.yaml, line 1: not a valid config: too deeply nested."),
        ("DATA: {SEQ_LEN: " + "9" * 5000 + "}", "x.yaml: not a valid config: it holds a number"),
        ('INFO: "\\UFFFFFFFF"', "x.yaml: not a valid config: it holds a number or a character code"),
        ("- TRAIN\n", "x.yaml: expected sections and keys (KEY: value), found a list."),
        ("TRAIN\n", "x.yaml: expected sections and keys (KEY: value), found a single value."),
        (b"INFO: \xff\n", "x.yaml: the config file is not UTF-8 text (byte 6)"),
        (b"#" * (LARGEST_FILE + 1), "x.yaml: a config file has at most 1,000,000 bytes"),
    ],
)
def test_an_unreadable_file_is_one_sentence_with_its_name(tmp_path: Path, text: str | bytes, words: str) -> None:
    found = problem_of(tmp_path, text)
    assert found.startswith(words)
    assert "\n" not in found


def test_a_byte_order_mark_is_no_part_of_the_config(tmp_path: Path) -> None:
    assert load_text(tmp_path, b"\xef\xbb\xbfINFO: note\n").config.INFO == "note"


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.yaml: there is no such config file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="the config file cannot be read"):
        load(tmp_path)
    with pytest.raises(UserError, match="the config file cannot be read"):
        load(Path("a\0b"))
