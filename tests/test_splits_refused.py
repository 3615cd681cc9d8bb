"""Split lists: the sentence for every mistake in them."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from episodes.search import SPLITS
from episodes.splits import MAX_PROBLEMS_SHOWN, load_splits
from tests.helpers.split_files import FIRST_CLASS, FIRST_LINE, append_to_test_list, change_class_file, problems_of
from tests.helpers.tiny_dataset import TinyDataset, tiny_video_names
from utils.errors import UserError

# --- errors in the videos on disk -------------------------------------------------------------------------


def test_missing_root_is_reported_with_its_path(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    (problem,) = problems_of(tiny_dataset.splits, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in problem
    assert "DATA.DATA_DIR" in problem


def test_missing_class_file_and_missing_root_are_reported_together(tmp_path: Path) -> None:
    problems = problems_of(tmp_path / "splits", tmp_path / "nowhere")
    assert len(problems) == 2
    assert str(tmp_path / "splits" / "classes.yaml") in problems[1]
    assert "DATA.SPLIT_DIR" in problems[1]


def test_a_class_without_folder_is_reported_with_both_possible_locations(own: TinyDataset) -> None:
    shutil.rmtree(own.videos / FIRST_CLASS)
    (problem,) = problems_of(own.splits, own.videos)
    assert f"'{FIRST_CLASS}' of test has no folder" in problem
    assert str(own.videos / FIRST_CLASS) in problem
    assert str(own.videos / "test" / FIRST_CLASS) in problem


def test_a_class_without_video_is_an_error(own: TinyDataset) -> None:
    for path in (own.videos / FIRST_CLASS).iterdir():
        path.unlink()
    (problem,) = problems_of(own.splits, own.videos)
    for part in (f"test: class '{FIRST_CLASS}' has no video", "classes.yaml"):
        assert part in problem


@pytest.mark.parametrize("listed", [False, True])
def test_empty_video_file_is_reported_once_with_its_path(own: TinyDataset, listed: bool) -> None:
    path = own.videos / f"{FIRST_LINE}.mp4"
    path.write_bytes(b"")
    (problem,) = problems_of(own.listed_splits if listed else own.splits, own.videos)
    assert problem.startswith(f"{path}: the video file is empty")


def test_two_files_for_one_video_are_both_named(own: TinyDataset) -> None:
    path = own.videos / f"{FIRST_LINE}.mp4"
    shutil.copy(path, path.with_suffix(".avi"))
    (problem,) = problems_of(own.splits, own.videos)
    assert str(path) in problem
    assert str(path.with_suffix(".avi")) in problem


def test_frame_folder_beside_the_file_of_the_same_video_is_refused(own: TinyDataset) -> None:
    path = own.videos / FIRST_LINE
    path.mkdir()
    (path / "1.jpg").touch()
    (problem,) = problems_of(own.splits, own.videos)
    assert f"{path}.mp4" in problem
    assert "keep one of them" in problem


@pytest.mark.parametrize("name", [f"{FIRST_LINE}.mp4", FIRST_LINE, FIRST_CLASS])
def test_link_that_leaves_the_root_is_refused(own: TinyDataset, tmp_path: Path, name: str) -> None:
    link, outside = own.videos / name, tmp_path / "outside"
    if name == FIRST_LINE:  # a folder of frames in place of the file
        (own.videos / f"{FIRST_LINE}.mp4").unlink()
        outside.mkdir()
    else:
        shutil.move(link, outside)
    link.symlink_to(outside, target_is_directory=outside.is_dir())
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(f"{link}: ")
    assert str(own.videos) in problem


def test_dangling_and_circular_links_are_reported(own: TinyDataset) -> None:
    one, other = own.videos / f"{FIRST_LINE}.mp4", own.videos / "test_action_1" / "test_action_1_00.mp4"
    for path, target in ((one, own.videos / "gone.mp4"), (other, other)):
        path.unlink()
        path.symlink_to(target)
    problems = problems_of(own.splits, own.videos)
    assert [problem.split(": ")[0] for problem in problems] == [str(one), str(other)]
    assert all("a link to a file that does not exist" in problem for problem in problems)


# --- errors in the lists ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("../x", "data root"),
        ("test_action_0/..", "data root"),
        ("test_action_0/../../x", "data root"),
        ("/etc/passwd", "data root"),
        ("/test_action_0/test_action_0_00", "data root"),
        ("test_action_0/a\0b", "control character or a backslash"),
        ("test_action_0/a\tb", "control character or a backslash"),
        ("test_action_0/a\tb\t3", "control character or a backslash"),  # only numbers are labels
        ("test_action_0\\a", "control character or a backslash"),
        ("test_action_0/..\\..\\a", "control character or a backslash"),
        ("test_action_0_00", "is not of the form class/video"),
        ("test/test_action_0/test_action_0_00", "is not of the form class/video"),
        ("test_action_0/", "is not of the form class/video"),
        ("test_action_0//a", "is not of the form class/video"),
        ("./a", "is not of the form class/video"),
        ("dance/a", "class 'dance' is not among the test classes"),
        ("train_action_0/train_action_0_00", "class 'train_action_0' is not among the test classes"),
        ("test_action_0/gone", "no video 'gone' in"),
    ],
)
def test_bad_line_of_a_list_is_reported_with_path_and_line_number(own: TinyDataset, line: str, reason: str) -> None:
    number = append_to_test_list(own.listed_splits, "", line)
    (problem,) = problems_of(own.listed_splits, own.videos)
    assert problem.startswith(f"{own.listed_splits / 'testlist03.txt'} line {number + 1}: ")
    assert reason in problem


@pytest.mark.parametrize("suffix", ["", ".mp4"])
def test_duplicate_line_is_reported_with_both_line_numbers(own: TinyDataset, suffix: str) -> None:
    number = append_to_test_list(own.listed_splits, FIRST_LINE + suffix)
    path = own.listed_splits / "testlist03.txt"
    (problem,) = problems_of(own.listed_splits, own.videos)
    assert problem.startswith(f"{path} line {number}: '{FIRST_LINE}{suffix}' is already in {path} line 1")


def test_line_numbers_match_those_of_an_editor(own: TinyDataset) -> None:
    number = append_to_test_list(own.listed_splits, "\x0b\x0c\x1c\x85\u2028", "dance/a")
    (problem,) = problems_of(own.listed_splits, own.videos)
    assert f"line {number + 1}:" in problem


def test_a_listed_set_needs_the_list_of_each_used_split(own: TinyDataset) -> None:
    for split in ("train", "val"):
        (own.listed_splits / f"{split}list03.txt").unlink()
    problems = problems_of(own.listed_splits, own.videos)
    assert len(problems) == 2
    for split, problem in zip(("train", "val"), problems, strict=True):
        assert str(own.listed_splits / f"{split}list03.txt") in problem
        assert "DATA.SPLIT_DIR" in problem


def test_list_that_is_not_utf8_is_reported_with_its_path(own: TinyDataset) -> None:
    path = own.listed_splits / "testlist03.txt"
    path.write_bytes("test_action_0/caf\u00e9".encode("latin-1"))
    assert f"{path}: not UTF-8 text; save it as UTF-8" in problems_of(own.listed_splits, own.videos)


def test_all_problems_are_reported_together(own: TinyDataset) -> None:
    append_to_test_list(own.listed_splits, "../x", "dance/a", FIRST_LINE, "test_action_0/gone")
    (own.listed_splits / "vallist03.txt").unlink()
    (own.videos / "train_action_0" / "train_action_0_00.mp4").write_bytes(b"")
    shutil.rmtree(own.videos / "train_action_1")
    change_class_file(
        own.listed_splits, lambda content: content["val"].append({"folder": "", "prompt": "x", "videos": 6})
    )
    problems = problems_of(own.listed_splits, own.videos)
    assert len(problems) == 8
    for part in (
        "outside the data root",
        "dance",
        "is already in",
        "gone",
        "vallist03",
        "is empty",
        "train_action_1",
        "one folder",
    ):
        assert sum(part in problem for problem in problems) == 1, part


def test_problems_of_lists_are_reported_along_with_a_missing_root(own: TinyDataset, tmp_path: Path) -> None:
    append_to_test_list(own.listed_splits, "dance/a")
    problems = problems_of(own.listed_splits, tmp_path / "nowhere")
    assert len(problems) == 2
    assert "no such data folder" in problems[0]
    assert "dance" in problems[1]


def test_the_number_of_reported_problems_is_limited(own: TinyDataset) -> None:
    append_to_test_list(own.listed_splits, *(f"dance/{number}" for number in range(1000)))
    problems = problems_of(own.listed_splits, own.videos)
    assert len(problems) == MAX_PROBLEMS_SHOWN + 1
    assert problems[-1] == f"... and {1000 - MAX_PROBLEMS_SHOWN} more problems"


# --- errors in the class file -----------------------------------------------------------------------------


def test_a_class_in_two_splits_is_refused_even_if_one_is_used(own: TinyDataset) -> None:
    change_class_file(own.splits, lambda content: content["test"].append(dict(content["train"][2])))
    (problem,) = problems_of(own.splits, own.videos, ["val"])
    assert problem.startswith(f"{own.splits / 'classes.yaml'}: class 'train_action_2' is in train and in test")


def test_class_twice_in_a_split_is_refused(own: TinyDataset) -> None:
    change_class_file(own.splits, lambda content: content["test"].append(dict(content["test"][0])))
    (problem,) = problems_of(own.splits, own.videos)
    assert f"class '{FIRST_CLASS}' is twice in test" in problem


def test_classes_differing_only_in_case_are_refused(own: TinyDataset) -> None:
    change_class_file(own.splits, lambda content: content["test"][1].update(folder=FIRST_CLASS.upper()))
    problems = problems_of(own.splits, own.videos)
    assert any(f"class '{FIRST_CLASS.upper()}' is twice in test" in problem for problem in problems)


@pytest.mark.parametrize(
    "text",
    [
        b"dataset: [tiny",
        b"a: b: c",
        b"\xff\xfe\x00",
        b"\t- x",
        b"dataset: !!python/name:os.system",
    ],
)
def test_class_file_that_is_not_yaml_is_reported_in_one_sentence(own: TinyDataset, text: bytes) -> None:
    (own.splits / "classes.yaml").write_bytes(text)
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(str(own.splits / "classes.yaml"))
    assert "class list" in problem


@pytest.mark.parametrize("text", ["- a\n", "tiny\n"])
def test_class_file_that_is_not_a_mapping_is_reported(own: TinyDataset, text: str) -> None:
    (own.splits / "classes.yaml").write_text(text)
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(f"{own.splits / 'classes.yaml'}: expected sections and keys")


@pytest.mark.parametrize("text", ["", "dataset: tiny\n"])
def test_class_file_without_its_keys_is_reported_with_the_expected_ones(own: TinyDataset, text: str) -> None:
    (own.splits / "classes.yaml").write_text(text)
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(f"{own.splits / 'classes.yaml'}: expected the keys dataset, horizontal_flip, test,")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset", 51),
        ("dataset", "two\n\nlines"),
        ("videos", "some"),
        ("videos", ["all"]),
        ("horizontal_flip", "maybe"),
        ("test", "jump"),
        ("test", 3),
        ("test", {"jump": 3}),
    ],
)
def test_wrong_value_of_a_class_file_is_reported_with_its_key(own: TinyDataset, key: str, value: object) -> None:
    change_class_file(own.splits, lambda content: content.update({key: value}))
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(f"{own.splits / 'classes.yaml'}: expected ")
    assert f"{key}:" in problem
    assert f"found {value!r}" in problem


@pytest.mark.parametrize(
    "entry",
    [
        "jump",
        None,
        {"folder": "jump", "prompt": "jump"},
        {"folder": "jump", "prompt": "jump", "videos": "six"},
        {"folder": "jump", "prompt": "jump", "videos": True},
        {"folder": "jump", "prompt": 3, "videos": 6},
        {"folder": False, "prompt": "no", "videos": 6},
        {"folder": "jump", "prompt": "jump", "videos": 6, "more": 1},
        {"folder": "../jump", "prompt": "jump", "videos": 6},
        {"folder": "/jump", "prompt": "jump", "videos": 6},
        {"folder": "a/jump", "prompt": "jump", "videos": 6},
        {"folder": "a\\jump", "prompt": "jump", "videos": 6},
        {"folder": "a\n\nb", "prompt": "jump", "videos": 6},
        {"folder": ".", "prompt": "jump", "videos": 6},
        {"folder": "", "prompt": "jump", "videos": 6},
    ],
)
def test_bad_class_of_a_class_file_is_reported_with_its_position(own: TinyDataset, entry: object) -> None:
    change_class_file(own.splits, lambda content: content["test"].insert(1, entry))
    (problem,) = problems_of(own.splits, own.videos)
    assert problem.startswith(f"{own.splits / 'classes.yaml'}: class 2 of test: ")


def test_a_root_with_the_videos_of_another_data_set_is_reported_in_two_sentences(own: TinyDataset) -> None:
    for folder in own.videos.iterdir():
        folder.rename(folder.with_name(f"{folder.name}_of_another_set"))
    problems = problems_of(own.splits, own.videos, ["test"])
    assert len(problems) == 2
    assert f"'{FIRST_CLASS}' of test" in problems[0]
    assert all(fact in problems[1] for fact in (str(own.videos), "DATA.DATA_DIR", "DATA.DATASET"))


def test_a_class_with_an_impossible_name_is_reported_as_missing(own: TinyDataset) -> None:
    entry = {"folder": "x" * 1000, "prompt": "x", "videos": 6}
    change_class_file(own.splits, lambda content: content["test"].append(entry))
    (problem,) = problems_of(own.splits, own.videos)
    assert "has no folder" in problem


# --- any content of a file --------------------------------------------------------------------------------

line_text = st.one_of(
    st.text(max_size=20),
    st.lists(
        st.sampled_from(["test_action_0", "test_action_0_00", "..", ".", "", "/", "\0", "\\", "x"]), max_size=4
    ).map("/".join),
    st.sampled_from([f"{FIRST_CLASS}/{video}" for video in tiny_video_names(FIRST_CLASS)]),
)


def assert_loads_or_is_refused(splits: Path, videos: Path) -> None:
    """Asserts that loading succeeds, or raises a UserError without empty lines."""
    message = "fine"
    try:
        load_splits(splits, videos, ["test"])
    except UserError as error:
        message = str(error)
    assert all(line.strip() for line in message.split("\n"))


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.lists(line_text, max_size=8).map("\n".join).map(str.encode), st.binary(max_size=60)))
def test_any_list_loads_or_is_reported(tiny_dataset: TinyDataset, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        splits = Path(folder)
        shutil.copy(tiny_dataset.listed_splits / "classes.yaml", splits)
        (splits / "testlist03.txt").write_bytes(content)
        assert_loads_or_is_refused(splits, tiny_dataset.videos)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["all", FIRST_CLASS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["folder", "prompt", "videos"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(["dataset", "videos", "horizontal_flip", *SPLITS]), values, max_size=3))
def test_any_class_file_loads_or_is_reported(tiny_dataset: TinyDataset, changes: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        splits = Path(folder) / "splits"
        shutil.copytree(tiny_dataset.splits, splits)
        change_class_file(splits, lambda content: content.update(changes))
        assert_loads_or_is_refused(splits, tiny_dataset.videos)
