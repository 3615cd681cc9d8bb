"""One video to frames: the right ones, complete or not at all; a crash does not affect other videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from episodes.preparation import extract as extract_module
from episodes.preparation.extract import COMMENT, Task, encode, extract, kept_indices, record_of
from episodes.preparation.settings import PRESETS, FrameSettings, claim_folder
from episodes.video import read_frames
from tests.helpers.raw_data import all_files, render
from utils.errors import UserError
from videotransforms.volume_transforms import spread_indices

SMALL = FrameSettings(frames=4, size=32)
ALL = FrameSettings(frames=None, size=32, shape="short")


def task_of(tmp_path: Path, source: Path, settings: FrameSettings = SMALL) -> Task:
    return Task("c/v", source, tmp_path / "frames" / "c" / "v", tmp_path / "partial", settings)


def test_extracted_frames_equal_those_of_a_test_clip(tmp_path):
    source = render(tmp_path / "a.avi", frames=20)
    task = task_of(tmp_path, source, FrameSettings(frames=8, size=48, shape="short", quality=1))
    assert extract(task) == ""
    kept = read_frames(task.target, np.arange)
    expected = read_frames(source, lambda count: spread_indices(count, 8))
    assert kept.shape == (8, 48, 64, 3)
    for number, frame in enumerate(kept):
        distances = [np.abs(np.asarray(Image.fromarray(other).resize((64, 48))) - frame.astype(int)).mean()
                     for other in expected]  # fmt: skip
        assert int(np.argmin(distances)) == number


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 50])
def test_a_clip_from_extracted_frames_equals_the_clip_from_the_video(count):
    kept = kept_indices(count, FrameSettings(frames=8))
    again = kept[spread_indices(len(kept), 8)]
    assert again.tolist() == spread_indices(count, 8).tolist()


def test_all_frames_can_be_extracted_in_several_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(extract_module, "BYTES_AT_A_TIME", 1)
    task = task_of(tmp_path, render(tmp_path / "a.mp4", frames=21), ALL)
    assert extract(task) == ""
    record = record_of(task.target)
    assert record is not None
    assert (record.frames, record.kept) == (21, 21)
    in_one = Task("c/w", task.source, tmp_path / "w", tmp_path / "partial", ALL)
    monkeypatch.undo()
    assert extract(in_one) == ""
    assert all_files(task.target) == all_files(in_one.target)


@pytest.mark.parametrize(
    ("video", "shape", "size"),  # (height, width) of the video, (width, height) of its frames
    [
        ((36, 48), "square", (32, 32)),
        ((36, 48), "short", (42, 32)),  # 42.7 is rounded down, as torchvision does
        ((48, 36), "short", (32, 42)),
    ],
)
def test_frames_have_the_requested_size(tmp_path, video, shape, size):
    task = task_of(tmp_path, render(tmp_path / "a.avi", size=video), FrameSettings(size=32, shape=shape))
    extract(task)
    with Image.open(task.target / "00000001.jpg") as image:
        assert image.size == size


def test_a_video_too_narrow_for_its_aspect_ratio_is_reported(tmp_path):
    (tmp_path / "narrow").mkdir()
    Image.new("RGB", (1, 300)).save(tmp_path / "narrow" / "1.png")
    task = task_of(tmp_path, tmp_path / "narrow", FrameSettings(shape="short"))
    assert "1 x 300 pixels would be stored as 256 x 76800" in extract(task)
    assert not task.target.exists()
    assert extract(task_of(tmp_path, tmp_path / "narrow", FrameSettings())) == ""


def test_quality_is_that_of_ffmpeg():
    """The first row of the table that ffmpeg's -q:v 5 writes, and 4:2:0 for the colours."""
    content = encode(np.zeros((20, 30, 3), dtype=np.uint8), FrameSettings(), b"frame 1 of 1")
    start = content.index(b"\xff\xdb") + 5
    zigzag = [8, 10, 10, 11, 10, 11, 13, 13]  # from the corner: 16 x 5 / 8 = 10, 19 x 5 / 8 = 11.9, 22 x 5 / 8 = 13.75
    assert list(content[start : start + len(zigzag)]) == zigzag
    assert content.count(b"\xff\xdb") == 1


def test_a_folder_records_the_number_of_frames(tmp_path):
    source = render(tmp_path / "a.avi", frames=14)
    task = task_of(tmp_path, source)
    extract(task)
    record = record_of(task.target)
    assert record is not None
    assert (record.frames, record.kept, record.source_bytes) == (14, 4, source.stat().st_size)


@pytest.mark.parametrize("settings", [SMALL, ALL])
def test_each_frame_records_its_number_in_the_video(tmp_path, settings):
    task = task_of(tmp_path, render(tmp_path / "a.avi", frames=14), settings)
    extract(task)
    recorded = []
    for file in sorted(task.target.iterdir()):
        with Image.open(file) as image:
            recorded.append(int(COMMENT.fullmatch(image.info["comment"])[1]))
    assert recorded == [index + 1 for index in kept_indices(14, settings)]


@pytest.mark.parametrize(("share", "percent"), [(0.5749, 57), (0.5751, 58), (0.899, 90), (0.9, 100), (1.0, 100)])
def test_a_folder_records_the_length_of_a_truncated_video(tmp_path, monkeypatch, share, percent):
    monkeypatch.setattr(extract_module, "_share_present", lambda source: share)
    task = task_of(tmp_path, render(tmp_path / "a.avi"))
    extract(task)
    record = record_of(task.target)
    assert record is not None
    assert record.percent == percent


@pytest.mark.parametrize("damage", ["remove", "empty", "add", "foreign"])
def test_an_incomplete_folder_is_not_trusted(tmp_path, damage):
    task = task_of(tmp_path, render(tmp_path / "a.avi"))
    extract(task)
    image = task.target / "00000003.jpg"
    if damage == "remove":
        image.unlink()
    elif damage == "empty":
        image.write_bytes(b"")
    elif damage == "add":
        (task.target / "00000005.jpg").write_bytes(image.read_bytes())
    else:
        Image.new("RGB", (32, 32)).save(task.target / "00000001.jpg")
    assert record_of(task.target) is None


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_a_broken_video_is_reported_by_name_and_leaves_nothing(tmp_path, content):
    source = tmp_path / "deep" / "a.avi"
    source.parent.mkdir()
    source.write_bytes(content)
    task = task_of(tmp_path, source)
    output = extract(task)
    assert "a.avi" in output
    assert str(tmp_path) not in output
    assert not task.target.exists()
    assert list(task.partial.iterdir()) == []


def test_a_folder_of_images_is_a_video(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for number in range(1, 13):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(source / f"{number}.png")
    task = task_of(tmp_path, source)
    assert extract(task) == ""
    reds = read_frames(task.target, np.arange)[:, 5, 5, 0]
    assert np.abs(reds - 20.0 * (spread_indices(12, 4) + 1)).max() < 8


def test_preset_names_match_their_settings():
    assert "_256x256q5_l8" in PRESETS
    assert {settings.name for settings in PRESETS.values()} == set(PRESETS)


def test_a_folder_with_other_settings_is_refused_in_one_sentence(tmp_path):
    claim_folder(tmp_path / "out", "hmdb51", SMALL)
    claim_folder(tmp_path / "out", "hmdb51", SMALL)
    with pytest.raises(UserError, match=r"prepared with size 32 \(requested: 64\), shape square \(requested: short\)"):
        claim_folder(tmp_path / "out", "hmdb51", FrameSettings(frames=4, size=64, shape="short"))


def test_the_error_about_other_settings_names_all_frames(tmp_path):
    some, every = FrameSettings(frames=8), FrameSettings(frames=None)
    claim_folder(tmp_path / "some", "hmdb51", some)
    with pytest.raises(UserError, match=r"prepared with frames 8 \(requested: all\);"):
        claim_folder(tmp_path / "some", "hmdb51", every)
    claim_folder(tmp_path / "every", "hmdb51", every)
    with pytest.raises(UserError, match=r"prepared with frames all \(requested: 8\);"):
        claim_folder(tmp_path / "every", "hmdb51", some)


@pytest.mark.parametrize("name", ["frames", "packed", "splits"])
def test_files_of_the_user_are_never_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="was not written by this command"):
        claim_folder(tmp_path, "hmdb51", SMALL)
