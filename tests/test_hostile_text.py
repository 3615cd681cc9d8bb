"""Hostile configs, class files and lists: loaded or told in plain sentences, soon and without large memory."""

import contextlib
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from episodes.splits import LARGEST_LIST, load_splits
from tests.config_helpers import FakeOptions, load, load_text, options_of, problem_of, refusal
from tests.conftest import TinyDataset
from tests.shipped import CONFIGS, ROOT
from utils.config import config_from_dict, config_to_dict, save_config
from utils.config_messages import known_keys
from utils.config_yaml import LARGEST_FILE, parse_yaml
from utils.schema import Config

BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)

# What no reader of YAML should act upon, and a part of what is said about it.
HOSTILE_YAML = {
    "billion laughs": (BILLION_LAUGHS, "aliases and anchors"),
    "endless alias": ("a: &a [*a]\n", "aliases and anchors"),
    "merge of an alias": ("a: &a {b: 1}\nc:\n  <<: *a\n", "aliases and anchors"),
    "object": ("INFO: !!python/object/apply:os.system ['touch executed']\n", "tags (!)"),
    "module": ("INFO: !!python/module:os\n", "tags (!)"),
    "local tag": ("INFO: !include /etc/passwd\n", "tags (!)"),
    "binary": ("INFO: !!binary aGVsbG8=\n", "tags (!)"),
    "deep lists": ("[" * 100_000, "too deeply nested"),
    "deep mappings": ("{a: " * 50_000, "too deeply nested"),
    "deep blocks": ("".join(f"{' ' * depth}a:\n" for depth in range(500)), "too deeply nested"),
    "dashes": ("- " * 50_000, "too deeply nested"),
    "tab": ("TRAIN:\n\tSHOT: 1\n", "'\\t'"),
    "NUL": ("INFO: a\0b\n", "unprintable"),
    "terminal escape": ("INFO: \x1b[2J\n", "unprintable"),
    "huge whole number": ("INFO: " + "9" * 100_000, "too long"),
    "huge underscores": ("INFO: 1" + "_" * 100_000 + "1" * 5000, "too long"),
    "duplicate key": ("INFO: a\nINFO: b\n", "occurs twice"),
    "duplicate by spelling": ('INFO: a\n"INFO": b\n', "occurs twice"),
    "key that is a list": ("? [a, b]\n: c\n", "a key must be a word"),
    "key that is a mapping": ("{{a: b}: c}\n", "a key must be a word"),
    "two documents": ("INFO: a\n---\nINFO: b\n", "not a valid"),
    "ten megabytes": ("# " + "x" * 10_000_000, "1,000,000 bytes"),
}
NOT_UTF8 = [b"\xff\xfeI\0N\0F\0O\0", b"INFO: caf\xe9\n", b"\x80", b"\xed\xa0\x80"]


# --- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_config_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, reason = HOSTILE_YAML[name]
    message = problem_of(tmp_path, text)
    assert reason in message
    assert "\n" not in message
    assert len(message) < 300
    assert os.listdir(tmp_path) == ["x.yaml"]


@pytest.mark.parametrize("content", NOT_UTF8)
def test_a_config_in_another_encoding_is_told(tmp_path: Path, content: bytes) -> None:
    assert "not UTF-8 text" in problem_of(tmp_path, content)


@pytest.mark.parametrize("name", [name for name in HOSTILE_YAML if name != "ten megabytes"])
def test_the_same_on_the_command_line_is_told(tmp_path: Path, name: str) -> None:
    text, _ = HOSTILE_YAML[name]
    message = problem_of(tmp_path, "", f"INFO={text}")
    assert message.startswith("INFO on the command line")
    assert "\n" not in message


@pytest.mark.parametrize("key", ["1: 2", "null: x", "true: x", "1.5: x", "'': x", "? \n: x"])
def test_a_key_that_is_no_word_is_an_unknown_key(tmp_path: Path, key: str) -> None:
    assert problem_of(tmp_path, f"{key}\n").startswith("x.yaml")


def test_a_device_without_end_is_read_up_to_the_limit() -> None:
    with pytest.raises(Exception, match="1,000,000 bytes"):
        load(Path("/dev/zero"))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*known_keys(Config, FakeOptions), "x", ""]) | scalars, inner, max_size=4)
    ),
    max_leaves=12,
)
sections = st.dictionaries(
    st.sampled_from([key for key in known_keys(Config, FakeOptions) if "." not in key]),
    st.dictionaries(
        st.sampled_from([key.rpartition(".")[2] for key in known_keys(Config, FakeOptions)]), trees, max_size=4
    ),
    max_size=4,
)


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=150, deadline=None)
@given(data=trees | sections, flow=st.booleans())
def test_any_tree_is_a_config_or_a_user_error_and_a_config_survives_saving(data: Any, flow: bool) -> None:
    with a_folder() as folder:
        text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
        told = refusal(lambda: load_text(folder, text.encode("utf-8", errors="surrogatepass")))
        if told is not None:
            assert told.strip()
            return
        config = load(folder / "x.yaml").config
        save_config(config, folder / "saved.yaml")
        assert load(folder / "saved.yaml").config == config
        assert config_from_dict(config_to_dict(config), "x", options_of) == config


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80))
def test_any_bytes_are_a_config_or_a_user_error(content: bytes) -> None:
    with a_folder() as folder:
        told = refusal(lambda: load_text(folder, content))
        assert told is None or told.strip()


@settings(max_examples=100, deadline=None)
@given(value=scalars | st.lists(scalars.filter(lambda value: value == value), max_size=3))
def test_what_safe_yaml_writes_of_a_plain_value_is_read_the_same(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assume(value != value or yaml.safe_load(text) == value)  # PyYAML itself loses a few, as the line end U+0085
    told: list[Any] = []
    if refusal(lambda: told.append(parse_yaml(text, "x"))) is None:
        assert told[0] == value or value != value


# --- class files and lists --------------------------------------------------------------------------------

FIRST = "test_action_0"


@pytest.fixture
def own(tiny_dataset: TinyDataset, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the splits and of the videos, to be changed."""
    shutil.copytree(tiny_dataset.listed_splits, tmp_path / "splits")
    shutil.copytree(tiny_dataset.videos, tmp_path / "videos")
    return tmp_path / "splits", tmp_path / "videos"


def problems(splits: Path, videos: Path) -> list[str]:
    message = refusal(lambda: load_splits(splits, videos, ["test"]))
    assert message is not None
    return message.split("\n")


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_a_hostile_class_file_is_one_sentence(own: tuple[Path, Path], name: str) -> None:
    splits, videos = own
    text, reason = HOSTILE_YAML[name]
    (splits / "classes.yaml").write_text(text)
    (message,) = problems(splits, videos)
    assert message.startswith(str(splits / "classes.yaml"))
    assert reason in message


@pytest.mark.parametrize("content", NOT_UTF8)
def test_a_class_file_in_another_encoding_is_told(own: tuple[Path, Path], content: bytes) -> None:
    splits, videos = own
    (splits / "classes.yaml").write_bytes(content)
    (message,) = problems(splits, videos)
    assert "the class list file is not UTF-8 text" in message


def test_classes_that_differ_in_case_or_in_the_form_of_an_accent_are_one_class(own: tuple[Path, Path]) -> None:
    splits, videos = own
    content = yaml.safe_load((splits / "classes.yaml").read_text())
    for split, folder in (("train", "caf\u00e9"), ("val", "cafe\u0301"), ("train", FIRST.upper())):
        content[split].append({"folder": folder, "prompt": "x", "videos": 1})
    (splits / "classes.yaml").write_text(yaml.safe_dump(content))
    message = "\n".join(problems(splits, videos))
    assert message.count("is in train and in val") == 1
    assert message.count("is in train and in test") == 1


def test_a_list_of_a_hundred_megabytes_is_refused_unread(own: tuple[Path, Path]) -> None:
    splits, videos = own
    with (splits / "testlist03.txt").open("wb") as file:
        file.truncate(100_000_000)
    assert f"{splits / 'testlist03.txt'}: has more than {LARGEST_LIST:,} bytes" in "\n".join(problems(splits, videos))


@pytest.mark.parametrize("line", ["x" * 1_000_000, f"{FIRST}/" + "x" * 5000, "../" * 100_000, "y" * 300 + "/z"])
def test_a_very_long_line_makes_no_very_long_message(own: tuple[Path, Path], line: str) -> None:
    splits, videos = own
    with (splits / "testlist03.txt").open("a") as file:
        file.write(line + "\n")
    (message,) = problems(splits, videos)
    assert "testlist03.txt line 31" in message
    assert len(message) < 1000


@pytest.mark.parametrize(("listed", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_two_forms_of_an_accent_are_the_same_video(
    own: tuple[Path, Path], listed: str, on_disk: str
) -> None:
    splits, videos = own
    name = "r\u00e9sum\u00e9"
    with (splits / "testlist03.txt").open("a") as file:
        file.write(f"{FIRST}/{unicodedata.normalize(listed, name)}\n")
    video = videos / FIRST / f"{unicodedata.normalize(on_disk, name)}.mp4"
    shutil.copy(videos / FIRST / f"{FIRST}_00.mp4", video)
    index = load_splits(splits, videos, ["test"])["test"]
    assert f"{FIRST}/{name}" in index.video_names  # in the one form, and so is the digest
    assert all(index.path(number).is_file() for number in range(31))


def test_two_files_that_differ_in_the_form_of_an_accent_are_both_named(own: tuple[Path, Path]) -> None:
    splits, videos = own
    (splits / "testlist03.txt").unlink()
    content = (splits / "classes.yaml").read_text().replace("listed", "all")
    (splits / "classes.yaml").write_text(content)
    for name in ("\u00e9.mp4", "e\u0301.mp4"):
        shutil.copy(videos / FIRST / f"{FIRST}_00.mp4", videos / FIRST / name)
    if len(list((videos / FIRST).glob("*\u0301*"))) == len(list((videos / FIRST).iterdir())) - 6:
        pytest.skip("this file system takes the two for one")
    (message,) = problems(splits, videos)
    assert "the same video by name; keep one of them" in message


def test_a_class_folder_is_found_in_either_form_of_an_accent(own: tuple[Path, Path]) -> None:
    splits, videos = own
    composed, split_up = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for file in ("classes.yaml", "testlist03.txt"):
        text = (splits / file).read_text().replace(f"folder: {FIRST}\n", f"folder: {composed}\n")
        (splits / file).write_text(text.replace(f"{FIRST}/", f"{split_up}/"))
    (videos / FIRST).rename(videos / split_up)
    assert len(load_splits(splits, videos, ["test"])["test"]) == 30


def test_a_name_that_differs_in_case_gets_the_right_one_named(own: tuple[Path, Path]) -> None:
    splits, videos = own
    with (splits / "testlist03.txt").open("a") as file:
        file.write(f"{FIRST}/{FIRST.upper()}_00\n")
    (message,) = problems(splits, videos)
    assert message.endswith(f"; there is '{FIRST}_00'")


def test_a_pipe_among_the_videos_is_told_and_keeps_nobody_waiting(own: tuple[Path, Path]) -> None:
    splits, videos = own
    os.mkfifo(videos / FIRST / "pipe.mp4")
    (message,) = problems(splits, videos)
    assert message == f"{videos / FIRST / 'pipe.mp4'}: a pipe or a device, no video file; remove it"


def test_a_pipe_in_place_of_a_list_is_told_and_keeps_nobody_waiting(own: tuple[Path, Path]) -> None:
    splits, videos = own
    for name in ("testlist03.txt", "classes.yaml"):
        (splits / name).unlink()
        os.mkfifo(splits / name)
        (message,) = problems(splits, videos)
        assert name in message


def test_links_in_a_circle_and_out_of_the_root_are_told(own: tuple[Path, Path], tmp_path: Path) -> None:
    splits, videos = own
    (videos / FIRST / "circle.mp4").symlink_to("circle.mp4")
    (videos / FIRST / "deep").symlink_to(Path("..") / FIRST)  # a folder that holds itself
    (videos / FIRST / "out.mp4").symlink_to(splits / "classes.yaml")
    found = "\n".join(problems(splits, videos))
    assert "circle.mp4: a link to a file that does not exist" in found
    assert "out.mp4: a link that leaves the data root" in found


names = st.text(st.characters(exclude_characters="\n\r"), max_size=12) | st.sampled_from(["..", ".", FIRST, "", "\0"])


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(st.lists(names, max_size=3).map("/".join), max_size=6))
def test_any_lines_are_an_index_or_a_user_error(tiny_dataset: TinyDataset, lines: list[str]) -> None:
    with a_folder() as folder:
        shutil.copy(tiny_dataset.listed_splits / "classes.yaml", folder)
        content = "\n".join(lines).encode("utf-8", errors="surrogatepass")
        (folder / "testlist03.txt").write_bytes(content)
        told = refusal(lambda: load_splits(folder, tiny_dataset.videos, ["test"]))
        assert told is None or all(line.strip() for line in told.split("\n"))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_choice_of_videos_comes_back_from_its_list(tiny_dataset: TinyDataset, data: st.DataObject) -> None:
    whole = load_splits(tiny_dataset.splits, tiny_dataset.videos, ["test"])["test"]
    chosen = data.draw(st.lists(st.sampled_from(whole.video_names), unique=True))
    ending = data.draw(st.sampled_from(["\n", "\r\n", ".mp4\n", "  \n", "\n\n"]))
    first_of_each = [f"{entry.folder}/{entry.folder}_00" for entry in whole.classes]  # no class may be empty
    wanted = list(dict.fromkeys([*chosen, *first_of_each]))
    with a_folder() as folder:
        shutil.copy(tiny_dataset.listed_splits / "classes.yaml", folder)
        (folder / "testlist03.txt").write_text("".join(name + ending for name in wanted), newline="")
        index = load_splits(folder, tiny_dataset.videos, ["test"])["test"]
    assert sorted(index.video_names) == sorted(wanted)
    assert list(index.video_names) == [name for name in whole.video_names if name in set(wanted)]


def test_the_limit_of_a_file_leaves_room_for_any_honest_one() -> None:
    assert (
        max(path.stat().st_size for path in [*CONFIGS, *(ROOT / "splits").glob("*/classes.yaml")]) < LARGEST_FILE / 10
    )
