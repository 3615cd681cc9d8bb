"""Split lists: what is read from disk."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from episodes.search import SPLITS, is_system_folder
from episodes.splits import SplitIndex, load_splits
from episodes.video import probe
from tests.helpers.split_files import FIRST_CLASS, FIRST_LINE, append_to_test_list, change_class_file, problems_of
from tests.helpers.tiny_dataset import (
    TINY_CLASSES,
    TINY_FRAMES,
    TINY_VIDEOS_PER_CLASS,
    TinyDataset,
    tiny_class_names,
    tiny_video_names,
)
from utils.errors import UserError

SHIPPED = Path(__file__).resolve().parents[1] / "splits"
# Folder: classes and videos of train, val and test.
SHIPPED_COUNTS = {
    "hmdb_ARN": ((31, 10, 10), (4280, 1194, 1292)),
    "ucf_ARN": ((70, 10, 21), (9154, 1421, 2745)),
    "kinetics_CMN": ((64, 12, 24), (6400, 1200, 2400)),
    "ssv2_CMN": ((64, 12, 24), (6400, 1200, 2400)),
    "ssv2_OTAM": ((64, 12, 24), (77500, 1926, 2857)),
}


def describe(index: SplitIndex) -> tuple[tuple[str, ...], list[int], str]:
    """Returns everything in an index that must not depend on the layout on disk."""
    return index.video_names, index.class_of_video.tolist(), index.digest()


# --- the shipped splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED_COUNTS)
def test_shipped_split_loads_with_the_counts_of_its_benchmark(name: str, tmp_path: Path) -> None:
    content = yaml.safe_load((SHIPPED / name / "classes.yaml").read_text(encoding="utf-8"))
    lists = tmp_path / "lists"
    lists.mkdir()
    for split in SPLITS:
        folders = [entry["folder"] for entry in content[split]]
        for folder in folders:
            (tmp_path / "videos" / folder).mkdir(parents=True)
            (tmp_path / "videos" / folder / "a.avi").write_bytes(b"video")
        if content["videos"] == "listed":
            (lists / f"{split}list03.txt").write_text("".join(f"{folder}/a\n" for folder in folders))

    indexes = load_splits(lists, tmp_path / "videos", SPLITS, shipped_dir=SHIPPED / name)

    classes, videos = SHIPPED_COUNTS[name]
    assert tuple(len(indexes[split].classes) for split in SPLITS) == classes
    assert tuple(sum(entry.expected_videos for entry in indexes[split].classes) for split in SPLITS) == videos
    assert sum(classes) == len({entry.folder for index in indexes.values() for entry in index.classes})
    assert sum(classes) == len({entry.prompt for index in indexes.values() for entry in index.classes})
    # Direction is the label in Something-Something.
    assert all(index.horizontal_flip is not name.startswith("ssv2") for index in indexes.values())
    assert (content["videos"] == "listed") is (name in ("kinetics_CMN", "ssv2_CMN", "ssv2_OTAM"))


# --- reading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_and_list_gives_the_same_videos_and_digest(
    tiny_dataset: TinyDataset, tiny_packed: Path, split: str
) -> None:
    roots = (tiny_dataset.videos, tiny_dataset.frames, tiny_dataset.split_frames, tiny_packed)
    indexes = [
        load_splits(splits, root, [split])[split]
        for root in roots
        for splits in (tiny_dataset.splits, tiny_dataset.listed_splits)
    ]
    expected = tuple(f"{name}/{video}" for name in tiny_class_names(split) for video in tiny_video_names(name))
    assert indexes[0].video_names == expected
    assert all(describe(index) == describe(indexes[0]) for index in indexes)
    assert all(probe(index.path(video)) == TINY_FRAMES for index in indexes for video in range(len(index)))
    assert not any(index.notes for index in indexes)


def test_videos_in_split_folders_are_found(own: TinyDataset, tmp_path: Path) -> None:
    for split in SPLITS:
        for name in tiny_class_names(split):
            shutil.copytree(own.videos / name, tmp_path / "by_split" / split / name)
    one, other = (load_splits(own.splits, root, SPLITS) for root in (own.videos, tmp_path / "by_split"))
    assert all(describe(one[split]) == describe(other[split]) for split in SPLITS)


def test_a_class_is_found_in_the_folder_of_another_split(own: TinyDataset) -> None:
    expected = describe(load_splits(own.splits, own.videos, ["test"])["test"])
    (own.videos / "train").mkdir()
    shutil.move(own.videos / FIRST_CLASS, own.videos / "train" / FIRST_CLASS)
    assert describe(load_splits(own.splits, own.videos, ["test"])["test"]) == expected


def test_index_orders_videos_by_class_and_groups_them(tiny_dataset: TinyDataset) -> None:
    index = load_splits(tiny_dataset.splits, tiny_dataset.videos, ["train"])["train"]
    assert len(index) == TINY_CLASSES["train"] * TINY_VIDEOS_PER_CLASS
    assert index.prompts == [name.replace("_", " ") for name in tiny_class_names("train")]
    assert index.class_of_video.dtype == "int64"
    for class_id, videos in enumerate(index.videos_of_class):
        assert {index.video_names[video].split("/")[0] for video in videos} == {index.classes[class_id].folder}
        assert len(videos) == TINY_VIDEOS_PER_CLASS


def test_only_the_needed_splits_are_searched_on_disk(own: TinyDataset) -> None:
    for name in tiny_class_names("train"):
        shutil.rmtree(own.videos / name)
    (own.listed_splits / "trainlist03.txt").unlink()
    assert list(load_splits(own.listed_splits, own.videos, ["test"])) == ["test"]


def test_lists_may_be_written_in_any_form(own: TinyDataset) -> None:
    expected = describe(load_splits(own.listed_splits, own.videos, ["test"])["test"])
    path = own.listed_splits / "testlist03.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    # As saved by an editor of another system: other order, byte order mark, line ends, blanks, file suffixes.
    text = "\ufeff" + "\r\n".join(f" {line}.avi \r\n" for line in reversed(lines))
    path.write_bytes(text.encode("utf-8"))
    assert describe(load_splits(own.listed_splits, own.videos, ["test"])["test"]) == expected


def test_a_list_selects_videos_and_a_different_count_is_a_note(own: TinyDataset) -> None:
    path = own.listed_splits / "testlist03.txt"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if not line.endswith("_00")))
    index = load_splits(own.listed_splits, own.videos, ["test"])["test"]
    assert len(index) == 5 * (TINY_VIDEOS_PER_CLASS - 1)
    assert index.notes[0] == "test_action_0 has 5 videos, the class list expects 6"
    assert len(index.notes) == 5


def test_extra_videos_are_reported_in_a_note(own: TinyDataset) -> None:
    shutil.copy(own.videos / f"{FIRST_LINE}.mp4", own.videos / FIRST_CLASS / "one_more.mp4")
    index = load_splits(own.splits, own.videos, ["test"])["test"]
    assert index.notes == (f"{FIRST_CLASS} has 7 videos, the class list expects 6",)


def test_hidden_and_other_files_are_not_videos(own: TinyDataset) -> None:
    expected = describe(load_splits(own.splits, own.videos, ["test"])["test"])
    for name in ("notes.txt", ".hidden.mp4", "._test_action_0_00.mp4"):
        (own.videos / FIRST_CLASS / name).write_bytes(b"x")
    (own.videos / FIRST_CLASS / ".cache").mkdir()
    assert describe(load_splits(own.splits, own.videos, ["test"])["test"]) == expected


def test_video_names_may_contain_dots(own: TinyDataset) -> None:
    folder = own.videos / FIRST_CLASS
    shutil.copy(folder / f"{FIRST_CLASS}_00.mp4", folder / "v_1.5.mp4")
    append_to_test_list(own.listed_splits, f"{FIRST_CLASS}/v_1.5")
    index = load_splits(own.listed_splits, own.videos, ["test"])["test"]
    assert index.path(index.video_names.index(f"{FIRST_CLASS}/v_1.5")) == folder / "v_1.5.mp4"
    # Nor does a name with a dot match the video whose name ends before the dot.
    number = append_to_test_list(own.listed_splits, f"{FIRST_LINE}.5")
    (problem,) = problems_of(own.listed_splits, own.videos, ["test"])
    assert f"testlist03.txt line {number}: no video '{FIRST_CLASS}_00.5'" in problem


def test_lists_of_the_user_are_combined_with_the_shipped_class_file(own: TinyDataset, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    shutil.move(own.listed_splits / "classes.yaml", shipped / "classes.yaml")
    index = load_splits(own.listed_splits, own.videos, ["test"], shipped_dir=shipped)["test"]
    assert len(index) == 30


def test_lists_of_the_user_take_precedence_over_shipped_ones(own: TinyDataset, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shutil.copytree(own.listed_splits, shipped)
    append_to_test_list(shipped, "../elsewhere")
    assert len(load_splits(own.listed_splits, own.videos, ["test"], shipped_dir=shipped)["test"]) == 30


def test_root_may_be_a_link(own: TinyDataset, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(own.videos, target_is_directory=True)
    one, other = (load_splits(own.splits, root, SPLITS) for root in (own.videos, link))
    assert all(describe(one[split]) == describe(other[split]) for split in SPLITS)


def test_links_that_stay_below_the_root_are_followed(own: TinyDataset) -> None:
    store = own.videos / "store"
    store.mkdir()
    video = own.videos / f"{FIRST_LINE}.mp4"
    shutil.move(video, store / "some.mp4")
    video.symlink_to(store / "some.mp4")
    shutil.move(own.videos / "test_action_1", store / "class")
    (own.videos / "test_action_1").symlink_to(store / "class", target_is_directory=True)
    assert len(load_splits(own.splits, own.videos, ["test"])["test"]) == 30


# --- the digest -------------------------------------------------------------------------------------------


def test_digest_distinguishes_splits_classes_prompts_and_videos(own: TinyDataset) -> None:
    digests = {load_splits(own.splits, own.videos, [split])[split].digest() for split in SPLITS}

    def digest() -> str:
        return load_splits(own.splits, own.videos, ["test"])["test"].digest()

    unchanged = digest()
    change_class_file(own.splits, lambda content: content["test"][0].update(prompt="something else"))
    digests.add(digest())
    change_class_file(own.splits, lambda content: content["test"][0].update(prompt="test action 0"))
    assert digest() == unchanged
    change_class_file(own.splits, lambda content: content["test"].reverse())
    digests.add(digest())
    (own.videos / f"{FIRST_LINE}.mp4").unlink()
    digests.add(digest())
    assert len(digests) == 6


def test_a_file_name_that_is_not_utf8_has_a_digest(own: TinyDataset) -> None:
    folder = os.fsencode(own.videos / FIRST_CLASS)
    try:
        os.rename(folder + f"/{FIRST_CLASS}_00.mp4".encode(), folder + b"/\xff.mp4")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(load_splits(own.splits, own.videos, ["test"])["test"].digest()) == 64


@pytest.mark.parametrize("column", [" 0", "\t3", ",12", " 120 3", ".MP4"])
def test_a_label_or_a_suffix_after_the_name_is_ignored(tiny_dataset: TinyDataset, tmp_path: Path, column: str) -> None:
    plain = load_splits(tiny_dataset.listed_splits, tiny_dataset.videos, ["train"])["train"]
    lists = tmp_path / "lists"
    shutil.copytree(tiny_dataset.listed_splits, lists)
    path = lists / "trainlist03.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}{column}\r\n" for line in lines), encoding="utf-8")
    labelled = load_splits(lists, tiny_dataset.videos, ["train"])["train"]
    assert describe(labelled) == describe(plain)
    path.write_text(f"{lines[0]}{column}\n{lines[0]}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: .* line 1"):
        load_splits(lists, tiny_dataset.videos, ["train"])


def test_system_folders_of_a_nas_contain_no_videos(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    shutil.copytree(tiny_dataset.videos, root)
    before = describe(load_splits(tiny_dataset.splits, root, ["train"])["train"])
    for folder in root.iterdir():
        for name in ("@eaDir", "#recycle", "__MACOSX"):
            (folder / name).mkdir()
    assert describe(load_splits(tiny_dataset.splits, root, ["train"])["train"]) == before


def test_system_folders_are_not_classes_in_any_case() -> None:
    assert all(is_system_folder(name) for name in ("@eaDir", "System Volume Information", "__MACOSX", "lost+found"))
    assert not is_system_folder("recycling")
