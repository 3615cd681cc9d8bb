"""A user's folder of class folders becomes a data set that a config reads."""

import os
import unicodedata
from pathlib import Path

import pytest
import yaml

from episodes.preparation.custom import class_file, draw_split, new_class_list
from episodes.preparation.custom_config import config_file
from episodes.preparation.report import split_index
from episodes.search import SPLITS
from episodes.splits import load_splits, read_class_list
from run.command import exit_code_of
from run.prepare import main
from run.run import main as train
from tests.helpers.commands import SMALL, prepare
from tests.helpers.own_videos import FOLDERS, kitchen, two_classes_each
from tests.helpers.raw_data import render, write_lists
from utils.config import load_config
from utils.yaml_text import parse_yaml


def test_classes_are_divided_and_named_in_the_config(tmp_path):
    raw = kitchen(tmp_path)
    out = tmp_path / "kitchen"
    ratios = ("--ratios", 0.4, 0.3, 0.3)
    prepare("custom", "--videos", raw, "--out", out, "--size", 32, *ratios)
    loaded = load_config(out / "config.yaml").config
    assert loaded.DATA.DATASET == "kitchen"
    assert loaded.TRAIN.WAY == 2
    indexes = load_splits(Path(loaded.DATA.SPLIT_DIR), Path(loaded.DATA.DATA_DIR), SPLITS)
    names = [entry.folder for split in SPLITS for entry in indexes[split].classes]
    assert sorted(names) == sorted(FOLDERS)
    assert all(index.notes == () and len(index.classes) == 2 and len(index) == 4 for index in indexes.values())


def test_prompts_come_from_folder_names_and_edits_are_kept(tmp_path):
    raw = kitchen(tmp_path)
    arguments = ("custom", "--videos", raw, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    file = tmp_path / "out/splits/classes.yaml"
    content = yaml.safe_load(file.read_text())
    prompts = {entry["folder"]: entry["prompt"] for split in SPLITS for entry in content[split]}
    assert prompts["CutBread"] == "cut bread"
    assert prompts["stir-soup"] == "stir soup"
    file.write_text(file.read_text().replace("cut bread", "cutting bread").replace("flip: false", "flip: true"))
    edited = file.read_text()
    prepare(*arguments)
    assert file.read_text() == edited
    assert any("cutting bread" in index.prompts for index in load_splits(file.parent, raw, SPLITS).values())


def test_a_class_added_later_is_reported_and_not_used(tmp_path):
    raw = kitchen(tmp_path)
    arguments = ("custom", "--videos", raw, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    render(raw / "Bake" / "1.mp4")
    output = prepare(*arguments).stdout
    assert "not in classes.yaml, so not used: Bake" in output
    assert not (tmp_path / "out/frames/Bake").exists()


def test_lists_of_the_user_determine_the_splits(tmp_path):
    raw = kitchen(tmp_path)
    lines = {
        "train": ["CutBread/CutBread & 0.mp4", "knead/knead & 0", "knead/knead & 1"],
        "val": ["Peel/Peel & 1", "stir-soup/stir-soup & 0"],
        "test": ["fry egg/fry egg & 0", "pour_water/pour_water & 1"],
    }
    lists = write_lists(tmp_path / "lists", lines)
    prepare("custom", "--videos", raw, "--out", tmp_path / "out", "--lists", lists, "--size", 32)
    indexes = load_splits(tmp_path / "out/splits", tmp_path / "out/packed", SPLITS)
    assert indexes["train"].video_names == ("CutBread/CutBread & 0", "knead/knead & 0", "knead/knead & 1")
    assert indexes["val"].video_names == ("Peel/Peel & 1", "stir-soup/stir-soup & 0")
    assert all(index.notes == () for index in indexes.values())


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ({"train": ["knead/a"], "val": ["Peel/a"]}, "expected one test list, such as testlist03.txt"),
        ({"train": ["knead/a"], "val": ["knead/b"], "test": ["Peel/a"]}, "is in the train list too"),
        ({"train": ["boil/a"], "val": ["knead/b"], "test": ["Peel/a"]}, "'boil' has no folder"),
    ],
)
def test_inconsistent_lists_are_reported(tmp_path, capsys, lines, expected):
    raw = kitchen(tmp_path, videos=1)
    lists = write_lists(tmp_path / "lists", lines)
    words = ["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--lists", str(lists)]
    assert exit_code_of(lambda: main(words)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", ["some", "", "9" * 5000])
def test_an_invalid_number_of_frames_is_reported(capsys, number):
    with pytest.raises(SystemExit, match="2"):
        main(["custom", "--videos", "raw", "--out", "out", f"--frames={number}"])
    assert "expected a number or all, found '" in capsys.readouterr().err


def test_lists_of_the_user_may_have_any_common_name(tmp_path):
    raw = kitchen(tmp_path, videos=1)
    lists = write_lists(tmp_path / "lists", two_classes_each(), "{}_few_shot.txt")
    prepare("custom", "--videos", raw, "--out", tmp_path / "out", "--lists", lists, "--size", 32)


def test_an_existing_split_folder_is_unchanged(tmp_path, capsys):
    raw = kitchen(tmp_path, videos=1)
    (tmp_path / "out/splits").mkdir(parents=True)
    (tmp_path / "out/splits/classes.yaml").write_text("mine: 1")
    assert exit_code_of(lambda: main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out")])) == 2
    assert "splits exists and was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "out/splits/classes.yaml").read_text() == "mine: 1"


def test_corrected_lists_leave_no_trace_of_the_error(tmp_path):
    raw = kitchen(tmp_path)
    lines = two_classes_each()
    arguments = ("custom", "--videos", raw, "--out", tmp_path / "out", "--size", 32)
    lists = write_lists(tmp_path / "lists", {**lines, "train": [*lines["train"], lines["train"][0]]})
    assert "line 3" in prepare(*arguments, "--lists", lists, exit_code=2).stderr
    assert not (tmp_path / "out").exists()
    write_lists(lists, lines)
    assert "complete: every expected video is there" in prepare(*arguments, "--lists", lists).stdout


# Names that YAML readers parse as another type than text, or as syntax.
ODD_NAMES = [
    "1e5", "null", "0x10", "1_000", "2024-01-01", "on", "~", ".inf", "1:30", "a: b", "a #b", "a, b", "{a}", "[a", "- a",
    "? a", "!x", "&x", "*x", "'", '"', "a\x85b", "a\u2028b", "a\u200bb",
]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_class_file_and_config_survive_a_round_trip(tmp_path, name):
    dataset = name if name.isprintable() else "kitchen"
    split = {"train": [name], "val": ["b"], "test": ["c"]}
    written = new_class_list(tmp_path / "classes.yaml", dataset, split, dict.fromkeys([name, "b", "c"], 2))
    written.path.write_bytes(class_file(written).encode())
    problems: list[str] = []
    assert read_class_list(written.path, problems) == written
    assert problems == []
    indexes = {key: split_index(written, key, tmp_path, [f"{names[0]}/1"]) for key, names in split.items()}
    block = parse_yaml(config_file(indexes, dataset, Path("data") / name), "config")["DATA"]
    assert block == {"DATASET": dataset, "DATA_DIR": f"data/{name}/packed", "SPLIT_DIR": f"data/{name}/splits"}


def test_a_data_set_named_like_a_number_can_be_prepared_twice(tmp_path):
    for folder in ("1e5", "null", "0x10", "on", "1_000", "2024-01-01"):
        render(tmp_path / "raw" / folder / "1.mp4")
    arguments = ("custom", "--videos", tmp_path / "raw", "--out", tmp_path / "1e6", "--size", 32)
    prepare(*arguments)
    assert "6 already prepared, 0 to decode" in prepare(*arguments).stdout


def test_accented_names_are_equal_in_both_unicode_forms(tmp_path, capsys):
    cafe, ete = unicodedata.normalize("NFD", "café"), unicodedata.normalize("NFD", "été")  # as a Mac writes them
    for folder in (cafe, *"bcdef"):
        for name in (ete, "b"):
            render(tmp_path / "raw" / folder / f"{name}.mp4")
    split = {"train": ("café", "b"), "val": "cd", "test": "ef"}
    lines = {key: [f"{folder}/{name}" for folder in names for name in ("été", "b")] for key, names in split.items()}
    lists = write_lists(tmp_path / "lists", lines)
    out = tmp_path / "out"
    prepare("custom", "--videos", tmp_path / "raw", "--out", out, "--lists", lists, "--size", 32)
    assert main(["check", str(out / "config.yaml")]) == 0
    assert "complete: every expected video is there" in capsys.readouterr().out


def test_class_folders_that_are_not_utf8_are_refused_before_writing(tmp_path):
    folders = [tmp_path / "raw" / os.fsdecode(name) for name in (b"caf\xe9", b"a", b"b", b"c", b"d", b"e")]
    for folder in folders:
        render(folder / "1.mp4")
    finished = prepare("custom", "--videos", tmp_path / "raw", "--out", tmp_path / "out", exit_code=2)
    (line,) = finished.stderr.splitlines()
    assert "raw/caf" in line
    assert "not UTF-8; rename it" in line
    assert not (tmp_path / "out").exists()


def test_two_videos_of_a_class_with_one_name_are_reported(tmp_path, capsys):
    raw = kitchen(tmp_path, videos=1)
    for camera in ("left", "right"):
        render(raw / "knead" / camera / "7.mp4")
    assert exit_code_of(lambda: main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out")])) == 2
    output = capsys.readouterr().err
    assert f"{raw}/knead/right/7.mp4: {raw}/knead/left/7.mp4 has the same video name" in output
    assert not (tmp_path / "out").exists()


ADVICE = (
    "INCOMPLETE: 1 expected video is missing, 0 allowed (--allow-missing of run/prepare.py custom); to expect fewer, "
    "lower `videos:` of their classes in splits/classes.yaml, remove them from --lists if it is given, "
    "and prepare again"
)


def last_words(output: str) -> str:
    """Returns the verdict, which is the line after the report's hash."""
    lines = output.splitlines()
    return lines[[line.startswith("report sha256") for line in lines].index(True) + 1]


@pytest.mark.parametrize("with_lists", [False, True])
def test_broken_videos_are_dropped_and_reported_by_the_check(tmp_path, capsys, with_lists):
    raw, out = kitchen(tmp_path, videos=3), tmp_path / "out"
    broken = raw / "knead/knead & 2.mp4"
    broken.write_bytes(b"not a video")
    words = ["custom", "--videos", raw, "--out", out, "--size", 32]
    lines = two_classes_each(videos=2)
    (split,) = [split for split in SPLITS if "knead/knead & 0" in lines[split]]
    if with_lists:
        words += ["--lists", write_lists(tmp_path / "lists", {**lines, split: [*lines[split], "knead/knead & 2"]})]
    check = ["check", str(out / "config.yaml")]
    assert f"expected videos: edit {out}/splits/classes.yaml" in prepare(*words, exit_code=1).stdout
    broken.unlink()
    assert last_words(prepare(*words, exit_code=1).stdout) == ADVICE
    assert last_words((out / "report.txt").read_text()) == ADVICE
    assert main(check) == 1
    assert last_words(capsys.readouterr().out) == ADVICE
    file = out / "splits/classes.yaml"
    file.write_text(file.read_text().replace("prompt: knead, videos: 3", "prompt: knead, videos: 2"))
    write_lists(tmp_path / "lists", lines)
    assert last_words(prepare(*words).stdout) == "complete: every expected video is there"
    assert main(check) == 0
    assert last_words(capsys.readouterr().out) == "complete: every expected video is there"


def test_broken_videos_can_be_allowed(tmp_path, capsys):
    raw, out = kitchen(tmp_path, videos=3), tmp_path / "out"
    (raw / "knead/knead & 1.mp4").write_bytes(b"not a video")
    prepare("custom", "--videos", raw, "--out", out, "--size", 32, "--allow-missing", 1)
    assert main(["check", str(out / "config.yaml")]) == 0
    expected = "1 expected video is missing, 1 allowed (--allow-missing of run/prepare.py custom)"
    assert last_words(capsys.readouterr().out) == expected


def test_another_seed_for_the_same_folder_is_refused(tmp_path):
    raw = kitchen(tmp_path)
    arguments = ("custom", "--videos", raw, "--out", tmp_path / "out", "--size", 32)
    prepare(*arguments)
    assert "seed 0 (requested: 1)" in prepare(*arguments, "--seed", 1, exit_code=2).stderr


def test_results_contain_the_hash_of_the_preparation_report(tmp_path):
    raw = kitchen(tmp_path)
    out = tmp_path / "kitchen"
    prepare("custom", "--videos", raw, "--out", out, "--size", 32, "--ratios", 0.4, 0.3, 0.3)
    train(["--cfg", str(out / "config.yaml"), *SMALL, f"CHECKPOINT.CHECKPOINT_DIR={tmp_path / 'run'}"])
    report = yaml.safe_load((out / "report.json").read_text())
    results = yaml.safe_load((tmp_path / "run/results.json").read_text())
    assert results["data_report_sha256"] == report["sha256"]
    assert results["split_sha256"] == report["report"]["splits"]["test"]["split_sha256"]


def test_written_lists_are_not_mistaken_for_the_users(tmp_path, capsys):
    raw = kitchen(tmp_path, videos=1)
    words = ["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), "--lists", str(tmp_path / "out/splits")]
    assert exit_code_of(lambda: main(words)) == 2
    assert "is where this command writes its own lists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--quality", "0"], "--quality is 0"),
        (["--frames", "0"], "--frames is 0"),
        (["--frames", "-1"], "--frames is -1"),
        (["--workers", "0"], "--workers is 0"),
        (["--allow-missing", "-1"], "--allow-missing is -1"),
        (["--ratios", "1", "0", "0"], "--ratios"),
        (["--videos", "nowhere"], "--videos nowhere is not a folder"),
    ],
)
def test_invalid_options_are_refused_in_one_sentence(tmp_path, capsys, options, expected):
    raw = kitchen(tmp_path, videos=1)
    assert exit_code_of(lambda: main(["custom", "--videos", str(raw), "--out", str(tmp_path / "out"), *options])) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("classes", [3, 4, 6, 7, 10, 51])
def test_splits_are_disjoint_and_use_all_classes(classes, seed):
    folders = [f"class_{number}" for number in range(classes)]
    split = draw_split(folders, [0.6, 0.2, 0.2], seed)
    assert sorted(folder for names in split.values() for folder in names) == sorted(folders)
    assert min(len(names) for names in split.values()) >= (2 if classes >= 6 else 1)
    assert split == draw_split(reversed(folders), [0.6, 0.2, 0.2], seed)
    if classes == 10:
        assert [len(split[name]) for name in SPLITS] == [6, 2, 2]


@pytest.mark.parametrize("classes", range(6, 13))
@pytest.mark.parametrize("ratios", [(0.6, 0.2, 0.2), (98, 1, 1), (1, 98, 1), (1, 1, 98), (1, 50, 50), (50, 50, 1)])
def test_six_or_more_classes_give_each_split_at_least_two(classes, ratios):
    split = draw_split([f"class_{number}" for number in range(classes)], ratios, 0)
    assert min(len(names) for names in split.values()) >= 2
    assert len({folder for names in split.values() for folder in names}) == classes
