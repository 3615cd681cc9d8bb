"""Which files are videos: any suffix of a container, animations by their content, no cover pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from episodes import video
from episodes.packed import packed_videos
from episodes.preparation.cut_off import share_present
from episodes.preparation.list_files import list_lines
from episodes.preparation.names import raw_video_name
from episodes.preparation.raw_layouts import LeftOut, raw_videos
from episodes.search import ClassFolders, video_name
from episodes.video_files import is_video_file
from run.prepare import main
from tests.helpers.videos import NUM_FRAMES, choose_all, numbers, paint, render
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


def write_with_cover(path: Path, film: Path | None) -> Path:
    """Writes a file with audio, an attached picture and, after them, the video stream of another file."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 200, 160, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        picture = av.VideoFrame.from_ndarray(np.zeros((160, 200, 3), np.uint8), format="rgb24")
        packets = [*sound.encode(silence), *sound.encode(), *cover.encode(picture)]
        if film is not None:
            with av.open(str(film)) as source:
                stream = container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        packets.append(packet)
        for packet in packets:
            container.mux(packet)
    return path


@pytest.mark.parametrize("read", [video.probe, lambda path: video.read_frames(path, choose_all)])
def test_a_sound_file_with_cover_art_has_no_video(tmp_path: Path, read) -> None:
    path = write_with_cover(tmp_path / "song.mp4", None)
    with pytest.raises(UserError, match="no video stream") as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_video_with_cover_art_is_read_without_it(tmp_path: Path) -> None:
    film = render(tmp_path / "film.mp4", "libx264", {"g": "2"}, (72, 96))
    path = write_with_cover(tmp_path / "covered.mp4", film)
    assert numbers(path, choose_all) == list(range(NUM_FRAMES))
    assert video.probe(path) == NUM_FRAMES


def test_the_stream_with_moving_pictures_is_read_although_another_precedes_it(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=10) for _ in range(2)]
        for stream, side in zip(streams, (32, 64), strict=True):
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for stream, count in zip(streams, (1, NUM_FRAMES), strict=True):
            black = np.zeros((stream.height, stream.width, 3), np.uint8)
            for _ in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
            container.mux(stream.encode())
    assert video.read_frames(path, choose_all).shape == (NUM_FRAMES, 64, 64, 3)


# --- suffixes ---------------------------------------------------------------------------------------------

# Suffix, as cameras and programs write it -> the container and the encoder that make it.
CONTAINERS = {
    ".m4v": ("mp4", "libx264"), ".MP4V": ("mp4", "mpeg4"), ".qt": ("mov", "libx264"), ".3GP": ("3gp", "libx264"),
    ".3g2": ("3g2", "libx264"), ".f4v": ("f4v", "libx264"), ".divx": ("avi", "mpeg4"), ".mpe": ("mpeg", "mpeg2video"),
    ".VOB": ("vob", "mpeg2video"), ".m2v": ("mpeg2video", "mpeg2video"), ".ts": ("mpegts", "libx264"),
    ".MTS": ("mpegts", "libx264"), ".m2ts": ("mpegts", "libx264"), ".wmv": ("asf", "wmv2"), ".asf": ("asf", "wmv2"),
    ".flv": ("flv", "flv"), ".ogv": ("ogg", "libvpx"), ".ogg": ("ogg", "libvpx"), ".h264": ("h264", "libx264"),
    "": ("mp4", "libx264"),
}  # fmt: skip


def render_container(path: Path, container_format: str, encoder: str) -> Path:
    """Writes ten frames, of which frame i shows i, in a container independent of the suffix."""
    with av.open(str(path), "w", format=container_format) as container:
        try:
            stream = container.add_stream(encoder, rate=25)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this PyAV has no encoder {encoder}")
        stream.height, stream.width, stream.pix_fmt = 72, 96, "yuv420p"
        for number in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(paint(number, 72, 96), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_container_is_found_and_read_under_each_of_its_suffixes(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "class").mkdir()
    path = render_container(tmp_path / "class" / f"clip{suffix}", *CONTAINERS[suffix])
    assert [(found.name, found.path) for found in raw_videos(tmp_path)] == [("clip", path)]
    assert ClassFolders(tmp_path).videos("train", "class", [], []) == {"clip": f"class/{path.name}"}
    assert video_name(path.name) == raw_video_name(path.name) == "clip"
    assert numbers(path, choose_all) == list(range(10))


# --- animations -------------------------------------------------------------------------------------------


def write_animation(path: Path, picture_format: str, **options: object) -> list[np.ndarray]:
    """Writes a dot that moves on a grey background, only the parts that change; returns uint8 frames [H, W, 3]."""
    frames = []
    for number in range(6):
        frame = np.full((40, 60, 3), 96, dtype=np.uint8)
        frame[10:20, 8 * number : 8 * number + 8] = (255, 0, 0)
        frame[25:30, 5 : 15 + 5 * number] = (0, 0, 255)
        frames.append(frame)
    first, *others = [Image.fromarray(frame) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, picture_format, save_all=True, append_images=others, duration=40, **options)
    return frames


ANIMATIONS = {
    "clip.gif": ("GIF", {}),
    "cleared.gif": ("GIF", {"disposal": 2}),
    "clip.apng": ("PNG", {}),
    "clip.png": ("PNG", {"disposal": 1, "blend": 1}),
    "cover_apart.png": ("PNG", {"default_image": True}),
    "clip.webp": ("WEBP", {"lossless": True}),
    "gif_in_name_only.mp4": ("GIF", {}),
    "webp_in_name_only.mp4": ("WEBP", {"lossless": True}),
    "apng_in_name_only.avi": ("PNG", {}),
}


@pytest.mark.parametrize("name", ANIMATIONS)
def test_an_animation_is_read_as_complete_frames(tmp_path: Path, name: str) -> None:
    picture_format, options = ANIMATIONS[name]
    path = tmp_path / "class" / name
    frames = write_animation(path, picture_format, **options)
    if "default_image" in options:
        frames = frames[1:]  # programs without animation support show the first
    np.testing.assert_array_equal(video.read_frames(path, choose_all), np.stack(frames))
    np.testing.assert_array_equal(video.read_frames(path, lambda _: np.array([3, 1, 3])), np.stack(frames)[[3, 1, 3]])
    assert video.probe(path, enough=100) == len(frames)
    assert share_present(path) == 1
    assert [found.path for found in raw_videos(tmp_path)] == [path]
    assert ClassFolders(tmp_path).videos("train", "class", [], []) == {path.stem: f"class/{name}"}


@pytest.mark.parametrize(("name", "shown"), [("clip.gif", 255), ("clip.apng", 0), ("clip.webp", 0)])
def test_transparent_parts_do_not_show_previous_frames(tmp_path: Path, name: str, shown: int) -> None:
    pictures = []
    for number in range(3):
        pixels = np.zeros((20, 60, 4), dtype=np.uint8)
        pixels[5:15, 20 * number : 20 * number + 20] = (200, 30, 30, 255)
        pictures.append(Image.fromarray(pixels))
    options = {"lossless": True} if name.endswith("webp") else {"disposal": 2 if name.endswith("gif") else 1}
    pictures[0].save(tmp_path / name, {"clip.apng": "PNG"}.get(name), save_all=True, append_images=pictures[1:],
                     duration=40, **options)  # fmt: skip
    for number, frame in enumerate(video.read_frames(tmp_path / name, choose_all)):
        assert (frame[5:15, 20 * number : 20 * number + 20] == (200, 30, 30)).all()
        others = np.delete(frame, np.s_[20 * number : 20 * number + 20], axis=1)
        assert (others == shown).all()


def test_still_images_beside_animations_are_not_videos(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp", ".png"):
        Image.new("RGB", (60, 40)).save(tmp_path / f"still{suffix}")
    write_animation(tmp_path / "clip.gif", "GIF")
    left_out: list[LeftOut] = []
    assert [found.path.name for found in raw_videos(tmp_path, (), left_out)] == ["clip.gif"]
    assert sorted(file.name for file in left_out) == ["still.gif", "still.png", "still.webp"]
    assert not any(file.may_be_video for file in left_out)
    assert ClassFolders(tmp_path.parent).videos("train", tmp_path.name, [], []) == {"clip": f"{tmp_path.name}/clip.gif"}


def test_animations_are_found_among_still_png_files(tmp_path: Path) -> None:
    for name in ("a_cover.png", "clip_1.png", "clip_2.png", "z_cover.png"):
        if "cover" in name:
            Image.new("RGB", (60, 40)).save(tmp_path / name)
        else:
            write_animation(tmp_path / name, "PNG")
    assert [found.path.name for found in raw_videos(tmp_path)] == ["clip_1.png", "clip_2.png"]


def test_only_one_png_of_a_frame_folder_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(5):
        Image.new("RGB", (60, 40)).save(tmp_path / "clip" / f"{number}.png")
        Image.new("RGB", (60, 40)).save(tmp_path / "clip" / f"{number}.jpg")
    opened: list[str] = []
    monkeypatch.setattr("episodes.video_files.is_animation", lambda path, damaged: bool(opened.append(path)))
    assert [found.name for found in raw_videos(tmp_path)] == ["clip"]
    assert len(opened) == 1


@pytest.mark.parametrize("cut", [20, 200])
def test_a_damaged_animation_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "clip.webp"
    write_animation(path, "WEBP", lossless=True)
    path.write_bytes(path.read_bytes()[:cut])
    assert is_video_file(str(path))
    with pytest.raises(UserError, match=r"clip\.webp"):
        video.read_frames(path, choose_all)


# --- skipped files ----------------------------------------------------------------------------------------

DataSet = Callable[..., tuple[int, str, dict]]


@pytest.fixture
def own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> DataSet:
    """Prepares six classes of two animations; returns exit code, report.txt and report.json."""
    for number in range(6):
        for clip in ("a", "b"):
            write_animation(tmp_path / "raw" / f"class{number}" / f"{clip}.gif", "GIF")

    def run(*options: str) -> tuple[int, str, dict]:
        out = tmp_path / "out"
        words = ["custom", "--videos", str(tmp_path / "raw"), "--out", str(out), "--size", "32", *options]
        code = main(words)
        capsys.readouterr()
        return code, (out / "report.txt").read_text(), json.loads((out / "report.json").read_text())

    return run


def test_animations_in_class_folders_form_a_data_set(own_data: DataSet) -> None:
    code, text, saved = own_data()
    assert code == 0
    assert text.endswith("complete: every expected video is there\n")
    assert "left out" not in text
    assert [saved["report"]["splits"][split]["found"] for split in ("train", "val", "test")] == [4, 4, 4]


LEFT_OUT = {
    "class0/clip.rmvb": (b".RMF\0\0\0\x12", True),
    "class1/clip.xyz": (b"\x1aE\xdf\xa3 and what follows", True),
    "class2/clip.mp4.part": (b"nothing that is known", True),
    "class3/more.zip": (b"PK\3\4", True),
    "class4/.hidden.mp4": (b"\0\0\0\x18ftypisom", True),
    "loose.mp4": (b"\0\0\0\x18ftypisom", True),
    "class0/notes.txt": (b"About this class.", False),
    "class0/._a.gif": (b"\0\5\x16\7", None),
    "readme.md": (b"About this data.", False),
    "class5/sound.m4a": (b"\0\0\0\x18ftypM4A ", False),
}


def test_skipped_files_are_named_and_the_data_is_incomplete(own_data: DataSet, tmp_path: Path) -> None:
    for name, (content, _) in LEFT_OUT.items():
        (tmp_path / "raw" / name).write_bytes(content)
    code, text, saved = own_data()
    assert code == 1
    named = {entry["video"]: entry["may_be_video"] for entry in saved["left_out"]["named"]}
    assert named == {name: may for name, (_, may) in LEFT_OUT.items() if may is not None}
    assert all(f"left out: {name}: " in text for name in named)
    assert "INCOMPLETE" in text.splitlines()[-1]
    assert "6 files that may be videos are left out" in text.splitlines()[-1]
    code, text, again = own_data("--allow-missing", "6")
    assert code == 0
    assert "complete" not in text.splitlines()[-1]
    assert again["sha256"] == saved["sha256"]  # it decides no result


def test_the_text_report_limits_the_number_of_names(own_data: DataSet, tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / "raw/class0" / f"{number:02d}.txt").write_text("a caption")
    (tmp_path / "raw/class5/zz.rm").write_bytes(b".RMF\0\0\0\x12")
    _, text, saved = own_data()
    lines = [line for line in text.splitlines() if line.startswith("left out: ")]
    assert lines[0] == "left out: 51 files, 1 of them may be videos"
    assert lines[1].startswith("left out: class5/zz.rm: ")
    assert len(lines) < 30
    assert len(saved["left_out"]["named"]) == 51


def test_direct_reading_reports_skipped_files(tmp_path: Path) -> None:
    write_animation(tmp_path / "class" / "clip.gif", "GIF")
    (tmp_path / "class" / "clip.rm").write_bytes(b".RMF\0\0\0\x12")
    (tmp_path / "class" / "notes.txt").write_text("About this class.")
    notes: list[str] = []
    problems: list[str] = []
    assert list(ClassFolders(tmp_path).videos("train", "class", problems, notes) or ()) == ["clip"]
    assert problems == []
    assert len(notes) == 1
    assert "clip.rm" in notes[0]


# --- Git LFS ----------------------------------------------------------------------------------------------


def read_list(path: Path) -> None:
    list_lines(path)


def read_frame(path: Path) -> None:
    video.read_frames(path.parent, choose_all)


READERS_OF_FILES = {
    "clip.mp4": video.probe,
    "clip.gif": video.probe,
    "00001.jpg": read_frame,
    "train.sqlite": packed_videos,
    "trainlist03.txt": read_list,
    "weights.pt": load_checkpoint,
}


@pytest.mark.parametrize("name", READERS_OF_FILES)
def test_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(UserError, match="Git LFS pointer") as caught:
        READERS_OF_FILES[name](path)
    assert str(path) in str(caught.value)
