"""Video lists in every layout in use, and the error messages for unsupported ones."""

import json
from pathlib import Path

import pytest

from episodes.preparation.annotations import check_classes, check_labels, templates
from episodes.preparation.names import class_key, prompt_of, raw_video_name, why_not_storable
from episodes.preparation.plan import make_plan
from episodes.preparation.raw_lists import Evidence, read_lists
from episodes.preparation.variants import SSV2_FULL_TRAIN_LISTS
from episodes.splits import ClassEntry, read_class_list
from tests.helpers.raw_data import write_lists
from tests.helpers.shipped import ROOT
from utils.errors import UserError

CLASSES = {
    "train": [ClassEntry("train24", "Closing [something]", 2), ClassEntry("train25", "Folding [something]", 2)],
    "val": [ClassEntry("baking_cookies", "baking cookies", 1)],
    "test": [ClassEntry("massaging_person's_head", "massaging person's head", 1)],
}
VAL, TEST = ["baking cookies/-514AQUrSow_000058_000068"], ["massaging persons head/a"]


def read(tmp_path: Path, train: list[str], **options: str) -> list[tuple[str, str]]:
    lists = write_lists(tmp_path / "lists", {"train": train, "val": VAL, "test": TEST}, **options)
    return [(video.folder, video.name) for video in read_lists(lists, CLASSES)["train"]]


def problem_of(tmp_path: Path, train: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, train)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "train24/78687",
        "train24/78687.webm",
        "train24//videos/78687.webm",
        "videos/train24/78687",
        "Closing something/78687",
        "closing_[something]/78687.mp4",
        "\ufefftrain24/78687",
        "  train24/78687  ",
    ],
)
def test_a_line_means_the_same_video_in_every_layout(tmp_path, line):
    assert read(tmp_path, [line, "train25/5"]) == [("train24", "78687"), ("train25", "5")]


@pytest.mark.parametrize("pattern", ["{}list03.txt", "{}list07.txt", "{}_few_shot.txt", "{}.list"])
def test_lists_are_found_under_common_names(tmp_path, pattern):
    assert read(tmp_path, ["train24/1"], pattern=pattern) == [("train24", "1")]


def test_classes_numbered_from_zero_are_positions(tmp_path):
    assert read(tmp_path, ["train0/7", "train1/8"]) == [("train24", "7"), ("train25", "8")]


def test_folders_that_look_like_numbers_are_folders(tmp_path):
    """As in the shipped lists of Something-Something, whose folders are numbered by the benchmark, not by position."""
    classes = {**CLASSES, "train": [ClassEntry("train1", "Closing [something]", 1), ClassEntry("train0", "Folding", 1)]}
    lists = write_lists(tmp_path / "lists", {"train": ["train0/7", "train1/8"], "val": VAL, "test": TEST})
    found = [(video.folder, video.name) for video in read_lists(lists, classes)["train"]]
    assert found == [("train0", "7"), ("train1", "8")]


def test_the_folder_in_a_line_takes_precedence_over_its_number(tmp_path):
    """In the Kinetics lists of CLIP-FSAR the classes are numbered by the alphabet."""
    assert read(tmp_path, ["train1//train_256/closing_something/x.mp4"]) == [("train24", "x")]


def test_windows_line_ends_blank_lines_and_labels_are_ignored(tmp_path):
    lines = ["train24/v_a_g01_c01.avi 1", "", "train25/v_b_g01_c01.avi 2"]
    assert read(tmp_path, lines, end="\r\n") == [("train24", "v_a_g01_c01"), ("train25", "v_b_g01_c01")]


@pytest.mark.parametrize(("lines", "names"), [
    (["train24/take 1", "train24/take 2"], ["take 1", "take 2"]),
    (["train24/take 1 0", "train25/take 2.mp4 1", "train25/gone 1"], ["take 1", "take 2", "gone"]),
    (["train24/gone 1", "train24/gone 2"], ["gone 1", "gone 2"]),
    (["train24/take 1\t0", "train25/take 2.mp4,1"], ["take 1", "take 2"]),
    (["0 train24/take 1", "1,train25/take 2.mp4"], ["take 1", "take 2"]),
])  # fmt: skip
def test_a_number_at_the_end_is_a_label_only_where_the_name_without_it_exists(tmp_path, lines, names):
    lists = write_lists(tmp_path, {"train": lines, "val": VAL, "test": TEST})
    evidence = Evidence(exists=lambda folder, name: name in ("take 1", "take 2"))
    assert [video.name for video in read_lists(lists, CLASSES, evidence)["train"]] == names


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("../train24/7", "outside the folder"),
        ("train24/..", "outside the folder"),
        ("train24/../../7", "outside the folder"),
        ("train24/a\x00b", "control character"),
        ("..\\train24\\7", "outside the folder"),
        ("78687", "not of the form class/video"),
        ("train99/7", "not one of the train classes"),
        ("baking cookies/7", "a class of the val split"),
        ("train24/.hidden", "begins with a dot"),
    ],
)
def test_an_unsafe_or_unknown_line_is_refused_with_its_number(tmp_path, line, expected):
    output = problem_of(tmp_path, ["train24/1", line])
    assert "trainlist03.txt line 2" in output
    assert expected in output


def test_a_video_named_twice_is_refused_with_both_lines(tmp_path):
    assert "line 1" in problem_of(tmp_path, ["train24/1", "Closing something/1.webm"])


def test_all_problems_are_reported_together_up_to_a_limit(tmp_path):
    output = problem_of(tmp_path, [f"train99/{number}" for number in range(50)]).splitlines()
    assert len(output) == 31
    assert "20 more" in output[-1]


def test_a_missing_list_and_two_of_one_split_are_reported(tmp_path):
    lists = write_lists(tmp_path, {"train": ["train24/1"], "val": VAL})
    with pytest.raises(UserError, match="expected one test list"):
        read_lists(lists, CLASSES)
    write_lists(tmp_path, {"train": ["train24/1"], "test": TEST}, "{}list07.txt")
    with pytest.raises(UserError, match=r"found trainlist03.txt, trainlist07.txt"):
        read_lists(lists, CLASSES)


def test_a_list_that_is_not_utf8_is_reported(tmp_path):
    lists = write_lists(tmp_path, {"train": ["train24/1"], "val": VAL, "test": TEST})
    (lists / "trainlist03.txt").write_bytes("train24/é".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_lists(lists, CLASSES)


@pytest.mark.parametrize("videos", SSV2_FULL_TRAIN_LISTS)
def test_the_two_train_lists_of_ssv2_full_are_recognised_and_named(tmp_path, videos):
    class_list = read_class_list(ROOT / "splits" / "ssv2_OTAM" / "classes.yaml", [])
    share = videos / sum(entry.expected_videos for entry in class_list.classes["train"])
    lines, number = {"train": [], "val": [], "test": []}, 0
    for split, entries in class_list.classes.items():
        for entry in entries:
            for _ in range(max(1, int(entry.expected_videos * (share if split == "train" else 1)))):
                number += 1
                lines[split].append(f"{entry.folder}/{number}")
    while len(lines["train"]) < videos:
        number += 1
        lines["train"].append(f"train1/{number}")
    del lines["test"][-100:]  # a truncated list does not reduce the expected number of videos
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "1.webm").touch()
    plan = make_plan("ssv2_full", class_list, raw, write_lists(tmp_path / "lists", lines), [])
    assert f"{videos:,}" in plan.variant
    assert sum(count for (split, _), count in plan.expected.items() if split == "train") == videos
    assert sum(count for (split, _), count in plan.expected.items() if split != "train") == 1926 + 2857


def test_annotations_give_templates_and_ids_are_numbers(tmp_path):
    path = tmp_path / "something-something-v2-train.json"
    path.write_text(json.dumps([{"id": "7", "template": "Closing [something]", "label": "closing a jar"}]))
    assert templates([tmp_path]) == {"7": "Closing [something]"}
    path.write_text(json.dumps([{"id": "../7", "template": "Closing [something]"}]))
    with pytest.raises(UserError, match="expected a number"):
        templates([tmp_path])
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        templates([tmp_path])


def test_a_list_with_classes_in_another_order_is_detected(tmp_path):
    lists = read_lists(write_lists(tmp_path, {"train": ["train0/7"], "val": VAL, "test": TEST}), CLASSES)
    check_classes(lists, CLASSES, {"7": "Closing [something]"})
    with pytest.raises(UserError, match=r"'Closing \[something\]'.*'Folding \[something\]'"):
        check_classes(lists, CLASSES, {"7": "Folding [something]"})


def test_labels_without_a_class_are_reported(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"Closing something": "0"}))
    with pytest.raises(UserError, match="3 classes"):
        check_labels([tmp_path], CLASSES)


@pytest.mark.parametrize("folder", ["hmdb_ARN", "ucf_ARN", "kinetics_CMN", "ssv2_CMN", "ssv2_OTAM"])
def test_benchmark_classes_differ_beyond_spelling(folder):
    classes = read_class_list(ROOT / "splits" / folder / "classes.yaml", []).classes
    for kind in ("folder", "prompt"):
        keys = [class_key(getattr(entry, kind)) for entries in classes.values() for entry in entries]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("folder", "prompt"),
    [
        ("CutBread", "cut bread"), ("cut_bread", "cut bread"), ("Cut-Bread", "cut bread"), ("TVShow", "tv show"),
        ("jump2", "jump 2"), ("müll raus", "müll raus"), ("_", "_"),
    ],
)  # fmt: skip
def test_prompts_are_words_of_folder_names(folder, prompt):
    assert prompt_of(folder) == prompt


def test_only_video_suffixes_are_removed_from_names():
    assert raw_video_name("a.b.AVI") == "a.b"
    assert raw_video_name("a.mp4.webm") == "a"
    assert raw_video_name("v1.2") == "v1.2"
    assert raw_video_name(".mp4") == ".mp4"


@pytest.mark.parametrize("name", ["a\nb", "a\\b", " a", "a ", ".a", "\udcff"])
def test_names_that_lists_cannot_contain_are_refused(name):
    assert why_not_storable(name)


@pytest.mark.parametrize("name", ["#1", "(Rad)!", "a & b", "ü", "a'b\"c", "x" * 200])
def test_unusual_names_are_accepted(name):
    assert why_not_storable(name) == ""
