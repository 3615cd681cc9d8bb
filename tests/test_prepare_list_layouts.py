"""The list folders that public code ships: each is read, or refused with the cause."""

import json
from pathlib import Path

import pytest

from episodes.preparation.list_files import list_file, unused_lists
from episodes.preparation.plan import Plan, make_plan
from episodes.preparation.raw_lists import Evidence, read_lists
from episodes.preparation.variants import CMN, CMN_ONLY, HYRSM, HYRSM_ONLY
from episodes.search import SPLITS
from episodes.splits import ClassEntry, ClassList
from tests.helpers.raw_data import write_lists
from utils.errors import UserError

NAMES = {
    "train": ["brush_hair", "clap"],
    "val": ["cartwheel", "golf"],
    "test": ["fencing", "kick"],
}
CLASSES = {split: [ClassEntry(name, name.replace("_", " "), 2) for name in names] for split, names in NAMES.items()}
PLAIN = {"train": ["brush_hair/a_0"], "val": ["cartwheel/b_0"], "test": ["fencing/c_0"]}
CLASS_OF = {"a_0": "brush_hair", "a_1": "brush_hair", "d_0": "clap", "b_0": "cartwheel", "c_0": "fencing"}
FOLDERS = Evidence(CLASS_OF.get)


def read(tmp_path: Path, evidence: Evidence | None = None, **lines: list[str]) -> dict[str, list[tuple[str, str]]]:
    lists = read_lists(write_lists(tmp_path / "lists", {**PLAIN, **lines}), CLASSES, evidence)
    return {split: [(video.folder, video.name) for video in videos] for split, videos in lists.items()}


def problem(tmp_path: Path, evidence: Evidence | None = None, **lines: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, evidence, **lines)
    return str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "0,a_0",
        "0 a_0.avi",
        "a_0.avi 0",
        "a_0,0",
        "/data/hmdb51/frames/a_0 405 0",
        "C:\\data\\hmdb51\\frames\\a_0.avi 405 0",
        "frames/a_0 2 405 00",
        "0/a_0",
    ],
)
def test_a_bare_number_means_the_class_of_the_videos_folder(tmp_path, line):
    assert read(tmp_path, FOLDERS, train=[line, "1,d_0"])["train"] == [("brush_hair", "a_0"), ("clap", "d_0")]


@pytest.mark.parametrize(
    "line",
    [
        "brush_hair/a_0.avi 0",
        "brush_hair/a_0.avi\t0",
        "brush_hair/a_0.avi,0",
        "brush_hair/a_0 120 0",
        "0 brush_hair/a_0.avi",
        "0,brush_hair/a_0.avi",
        "brush_hair\\a_0.avi",
        "D:\\hmdb51\\brush_hair\\a_0.avi",
        "/data/hmdb51/brush_hair/a_0.avi",
        "./brush_hair/a_0.avi",
        "brush_hair\ta_0.avi",
        "a_0.avi,brush hair",
        "brush_hair,a_0.avi,0",
        "videos/a_0.avi,brush_hair",
        "brush_hair/a_0.avi,Brush hair",
        "videos/a_0.avi brush hair",
        "brush_hair/a_0\tbrush_hair\t0",
        '"brush_hair/a_0.avi" 0',
        "'videos/a_0.avi';'brush_hair'",
    ],
)
def test_class_and_name_are_parsed_from_any_layout(tmp_path, line):
    assert read(tmp_path, train=[line, "clap/d_0.avi"])["train"] == [("brush_hair", "a_0"), ("clap", "d_0")]


@pytest.mark.parametrize(
    "line",
    [
        "# the videos of this split",
        "#",
        "# clap/d_9.avi",
        "#brush_hair/a_9 0",
        "path,label",
        "video_path label",
        '"Video";"Class"',
    ],
)
def test_comments_and_column_names_are_skipped(tmp_path, line):
    train = [line, "brush_hair/a_0 0", line, "clap/d_0 1"]
    assert read(tmp_path, train=train)["train"] == [("brush_hair", "a_0"), ("clap", "d_0")]


def test_names_resembling_comments_or_columns_are_read(tmp_path):
    classes = {**CLASSES, "train": [ClassEntry("#tag", "tag", 1), ClassEntry("video", "video", 1)]}
    lists = write_lists(tmp_path / "lists", {**PLAIN, "train": ["#tag/a_0", "#1.avi 0", "video,label"]})
    found = read_lists(lists, classes, Evidence({"a_0": "#tag", "#1": "#tag", "label": "video"}.get))["train"]
    assert [(video.folder, video.name) for video in found] == [("#tag", "a_0"), ("#tag", "#1"), ("video", "label")]


def test_a_list_of_only_comments_is_empty(tmp_path):
    assert "empty" in problem(tmp_path, train=["# clap/d_0", "# clap/d_1"])


def test_a_missing_video_gets_the_class_of_its_label_number(tmp_path):
    lines = ["1,gone", "0,a_0", "1,d_0"]
    assert read(tmp_path, FOLDERS, train=lines)["train"][0] == ("clap", "gone")


@pytest.mark.parametrize("numbers", ["{}", "405 {}", "2 405 {}", "405, 0{}"])
def test_the_last_number_is_the_label(tmp_path, numbers):
    lines = [f"{name} {numbers.format(label)}" for name, label in (("a_0", 0), ("d_0", 1), ("gone", 1), ("lost", 0))]
    found = read(tmp_path, FOLDERS, train=lines)["train"]
    assert found == [("brush_hair", "a_0"), ("clap", "d_0"), ("clap", "gone"), ("brush_hair", "lost")]


def test_an_unexplained_number_is_refused_once_with_the_fixes(tmp_path):
    message = problem(tmp_path, train=["19/78687", "19/5", "141/42326"])
    assert len(message.splitlines()) == 1
    for part in ("line 1", "number 19", "labels.json", "2 more lines"):
        assert part in message


def test_label_numbers_are_resolved_with_labels_json(tmp_path):
    labels = Evidence(label_names={"19": "Brush hair", "141": "clap", "31": "Cartwheel", "5": "Sleeping"})
    assert read(tmp_path, labels, train=["19/7", "141/8"])["train"] == [("brush_hair", "7"), ("clap", "8")]
    assert "'Cartwheel'" in problem(tmp_path, labels, train=["31/7"])
    assert "val split" in problem(tmp_path, labels, train=["31/7"])
    assert "'Sleeping'" in problem(tmp_path, labels, train=["5/7"])


def test_a_class_after_the_name_must_match_the_folder(tmp_path):
    for behind in ("clap", "golf"):
        message = problem(tmp_path, train=["clap/d_0.avi", f"brush_hair/a_0.avi,{behind}"])
        for part in ("line 2", "'brush_hair'", f"'{behind}'"):
            assert part in message
    assert "val split" in problem(tmp_path, train=["videos/a_0.avi,golf"])
    names = [("brush_hair", "a, b"), ("brush_hair", "my clap")]
    assert read(tmp_path, train=["brush_hair/a, b.avi", "brush_hair/my clap"])["train"] == names


@pytest.mark.parametrize("line", ["fencing/x", "train0//videos/fencing/x.mp4", "clap/fencing/x", "0 /data/Fencing/x"])
def test_a_line_whose_folder_is_a_class_of_another_split_is_refused(tmp_path, line):
    message = problem(tmp_path, train=["train0//videos/brush_hair/a_0.mp4", line])
    assert "line 2" in message
    assert "test split" in message


def test_a_video_in_a_class_of_another_split_is_refused(tmp_path):
    assert "val split" in problem(tmp_path, FOLDERS, train=["0,b_0"])


@pytest.mark.parametrize(
    "lines",
    [
        ["train0//v/brush_hair/a", "train1//v/clap/b", "train0//v/clap/c"],
        ["train0//v/brush_hair/a", "train1//v/clap/b", "train7//v/clap/c"],
        ["brush_hair/a 0", "clap/b 1", "clap/c 0"],
        ["0,brush_hair/a", "1,clap/b", "1,brush_hair/c"],
    ],
)
def test_a_number_that_disagrees_with_the_folder_is_refused(tmp_path, lines):
    assert "line 3" in problem(tmp_path, train=lines)


def test_frame_counts_after_names_are_not_labels(tmp_path):
    lines = [f"{name}/{number} {40 + 3 * number + len(name)}" for number in range(4) for name in NAMES["train"]]
    assert len(read(tmp_path, train=lines)["train"]) == 8


def test_a_position_that_disagrees_with_the_folder_is_refused(tmp_path):
    assert read(tmp_path, FOLDERS, train=["train0/a_0", "train1/d_0"])["train"] == [
        ("brush_hair", "a_0"),
        ("clap", "d_0"),
    ]
    message = problem(tmp_path, FOLDERS, train=["train1/a_0", "train0/d_0"])
    assert "'brush_hair'" in message
    assert "'clap'" in message


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["testlist03.txt", "test_class2id.txt"], "testlist03.txt"),
        (["testlist03.txt", "testlist03_bk.txt", "testlist03_old.txt"], "testlist03.txt"),
        (["test_few_shot.txt", "testing_notes.txt"], "test_few_shot.txt"),
        (["meta_test.txt", "meta_train.txt"], "meta_test.txt"),
        (["hmdb51_test_split_1_videos.txt", "hmdb51_train_split_1_videos.txt"], "hmdb51_test_split_1_videos.txt"),
        (["test.list", "test.csv"], "test.list"),
        (["test.txt", "test_class_index.txt"], "test.txt"),
    ],
)
def test_the_list_is_found_among_the_other_files_of_a_folder(tmp_path, names, chosen):
    for name in names:
        text = {"test_class2id.txt": "fencing\nkick\n", "test_class_index.txt": "fencing 0\nkick 1\n"}
        (tmp_path / name).write_text(text.get(name, "fencing/x\n"))
    assert list_file(tmp_path, "test").name == chosen


def test_skipped_lists_are_reported(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}list03.txt").write_text("fencing/x\n")
    (tmp_path / "testlist03_old.txt").write_text("fencing/y\n")
    (tmp_path / "test_class2id.txt").write_text("fencing\n")
    assert unused_lists(tmp_path) == ["testlist03_old.txt"]


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("test.txt", "fencing\nkick\n", "names a class and a video"),
        ("test.pkl", "x", "convert it"),
        ("test.txt", "<!DOCTYPE html>\n<a href='/x'>", "web page"),
        ("test.txt", "version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ],
)
def test_a_file_that_is_not_a_list_is_refused_by_name_with_the_cause(tmp_path, name, text, cause):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        list_file(tmp_path, "test")
    assert name in str(caught.value)
    assert cause in str(caught.value)


TABLES = {
    "columns of paths and numbers": ("csv", "path,label\nx/brush_hair/a_0.avi,0\nx/clap/d_0.avi,1\n"),
    "columns of names and classes": ("csv", "video,class\na_0.avi,brush hair\n\nd_0.avi,clap\n"),
    "quoted values, further columns": ("csv", 'Label,Frames,File\n"Brush, hair",40,v/a_0.avi\n"clap",9,d_0\n'),
    "tabs": ("tsv", "file_name\tlabel_id\tclass_name\na_0\t0\tbrush_hair\nd_0\t1\tclap\n"),
    "columns in a text file": ("txt", "class;video;frames\nbrush_hair;a_0;5\nclap;d_0;6\n"),
    "no names of columns": ("csv", "a_0.avi,brush hair\nclap,d_0.avi\n"),
    "objects": ("json", '[{"id": "a_0", "template": "[Brush] hair", "label": "x"}, {"id": "d_0", "label": "clap"}]'),
    "an object on each line": ("jsonl", '{"video": "a_0", "label": "brush_hair"}\n{"video": "d_0", "label": "clap"}\n'),
    "videos of each class": ("json", '{"brush_hair": ["a_0.avi"], "clap": ["clap/d_0.avi"]}'),
    "few-shot image lists": (
        "json", '{"label_names": ["clap", "brush_hair"], "image_names": ["v/a_0.avi", "d_0"], "image_labels": [1, 0]}'
    ),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "text"), TABLES.values(), ids=TABLES)
def test_tables_with_named_columns_and_json_are_lists(tmp_path, suffix, text):
    write_lists(tmp_path, PLAIN)
    (tmp_path / "trainlist03.txt").unlink()
    (tmp_path / f"train.{suffix}").write_text(text)
    found = read_lists(tmp_path, CLASSES)["train"]
    assert [(video.folder, video.name) for video in found] == [("brush_hair", "a_0"), ("clap", "d_0")]


def test_the_times_of_a_kinetics_table_are_part_of_the_name(tmp_path):
    write_lists(tmp_path, PLAIN)
    (tmp_path / "trainlist03.txt").rename(tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split\nclap,-514AQUrSow,58.0,68,train\nclap,-514AQUrSox,,,train\n"
    )
    names = [video.name for video in read_lists(tmp_path, CLASSES)["train"]]
    assert names == ["-514AQUrSow_000058_000068", "-514AQUrSox"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[]", "JSON"),
        ('{"a_0": {"annotations": {"label": "clap"}}}', "JSON"),
        ('{"clap": ["a_0"', "unknown form"),
        ('{"clap": [["a_0"]]}', "entry 1"),
        ('[{"id": "a_0", "label": "clap"}, {"id": "a_1"}]', "entry 2"),
        ('{"label_names": ["clap"], "image_names": ["a_0"], "image_labels": [7]}', "entry 1"),
        ("path,label\nv/brush_hair/a_0,clap\nd_0,brush hair\n", "brush_hair/a_0"),
        ("[" * 100_000, "unknown form"),
    ],
)
def test_other_tables_are_refused_by_file_and_cause(tmp_path, text, cause):
    write_lists(tmp_path, PLAIN)
    (tmp_path / "trainlist03.txt").unlink()
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_lists(tmp_path, CLASSES)
    assert str(tmp_path / "train.json") in str(caught.value)
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_table_beside_text_lists_is_not_a_list(tmp_path):
    (write_lists(tmp_path, PLAIN) / "train.json").write_text('[{"id": "5", "template": "clap"}]')
    assert read_lists(tmp_path, CLASSES)["train"][0].name == "a_0"


def test_the_json_lists_of_few_shot_image_classification_are_found_by_their_names(tmp_path):
    for name in ("base", "val", "novel"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [list_file(tmp_path, split).stem for split in SPLITS] == ["base", "val", "novel"]


def test_a_line_that_begins_with_a_bracket_is_not_json(tmp_path):
    classes = {**CLASSES, "train": [ClassEntry("train0", "[Something] colliding with [something]", 1)]}
    lists = write_lists(tmp_path, {**PLAIN, "train": ["[Something] colliding with [something]/42326"]})
    assert read_lists(lists, classes)["train"][0].name == "42326"


def test_lists_in_a_subfolder_are_named(tmp_path):
    write_lists(tmp_path / "kinetics_CMN", PLAIN)
    with pytest.raises(UserError, match="kinetics_CMN"):
        list_file(tmp_path, "test")


# --- recognising lists ------------------------------------------------------------------------------------


def kinetics_plan(tmp_path: Path, ids: list[str]) -> Plan:
    lines = {"train": ["clap/a0123456789"], "val": ["golf/b0123456789"], "test": [f"kick/{name}" for name in ids]}
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw/a0123456789.mp4").touch()
    class_list = ClassList(tmp_path, "kinetics", True, True, CLASSES)
    return make_plan("kinetics", class_list, tmp_path / "raw", write_lists(tmp_path / "lists", lines), [])


@pytest.mark.parametrize(("marks", "variant"), [(CMN_ONLY, CMN), (HYRSM_ONLY, HYRSM)])
def test_the_kinetics_test_list_is_recognised_by_its_videos(tmp_path, marks, variant):
    names = [f"{name}_000001_000011" for name in sorted(marks)]
    others = [f"x{number:010d}" for number in range(2400 - len(names))]
    plan = kinetics_plan(tmp_path, names + others)
    assert plan.variant == variant
    assert plan.notes == ()


@pytest.mark.parametrize("marks", [[], sorted(CMN_ONLY)[1:], sorted(CMN_ONLY | HYRSM_ONLY)])
def test_another_kinetics_test_list_of_the_same_length_is_not_named(tmp_path, marks):
    plan = kinetics_plan(tmp_path, marks + [f"x{number:010d}" for number in range(2400 - len(marks))])
    assert plan.variant == ""
    assert "2,400" in plan.notes[0]


def test_ssv2_lists_with_label_numbers_are_read_with_labels_json_beside_them(tmp_path):
    prompts = {split: [f"Doing [something] {split}"] for split in SPLITS}
    entries = {split: [ClassEntry(f"{split}0", prompts[split][0], 1)] for split in SPLITS}
    numbers = {"train": "19", "val": "31", "test": "126"}
    lists = write_lists(tmp_path / "lists", {split: [f"{numbers[split]}/{numbers[split]}7"] for split in SPLITS})
    (tmp_path / "raw").mkdir()
    for number in numbers.values():
        (tmp_path / "raw" / f"{number}7.webm").touch()
    class_list = ClassList(tmp_path, "ssv2", True, False, entries)
    with pytest.raises(UserError, match=r"labels\.json"):
        make_plan("ssv2_full", class_list, tmp_path / "raw", lists, [])
    labels = {prompts[split][0].replace("[", "").replace("]", ""): numbers[split] for split in SPLITS}
    (lists / "labels.json").write_text(json.dumps(labels))
    plan = make_plan("ssv2_full", class_list, tmp_path / "raw", lists, [])
    assert [video.full_name for video in plan.videos] == ["train0/197", "val0/317", "test0/1267"]
    (lists / "labels.json").unlink()
    annotations = [{"id": f"{number}7", "template": prompts[split][0]} for split, number in numbers.items()]
    (lists / "train.json").write_text(json.dumps(annotations))
    assert make_plan("ssv2_full", class_list, tmp_path / "raw", lists, []).videos == plan.videos
