"""No video or image can crash, hang or exhaust a run: each is read, or refused in one sentence."""

import io
import os
import re
import signal
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from episodes import decoding, limits, video
from tests.helpers.videos import choose_spread, render
from utils.errors import UserError
from videotransforms.volume_transforms import FrameChoice


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    """Writes a video with groups of pictures so short that decord is used."""
    return render(tmp_path / "intact.mp4", "libx264", {"g": "2"}, (48, 64), 24)


@pytest.fixture(autouse=True)
def _own_helper() -> Iterator[None]:
    """Starts each test without a helper process, and stops the helper of the test."""
    yield
    decoding._rejected.clear()
    helper = getattr(decoding._thread, "helper", None)
    if helper is not None:
        helper.close()
        decoding._thread.helper = None


def refusal(read: Callable[[Path], object], path: Path) -> str:
    """Returns the error message of a file, one sentence."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message
    return message


def read(path: Path) -> np.ndarray:
    return decoding.read_frames(path, choose_spread)[0]


# --- the process that decodes -----------------------------------------------------------------------------


def test_isolated_frames_equal_those_of_direct_reading(intact: Path) -> None:
    np.testing.assert_array_equal(read(intact), video.read_frames(intact, choose_spread))
    assert decoding.probe(intact) == video.probe(intact)


def test_isolated_errors_equal_those_of_direct_reading(intact: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexError, match="which has 24"):
        decoding.read_frames(intact, np.atleast_1d)  # the frame with the number of all frames
    text = tmp_path / "text.mp4"
    text.write_text("This is not a video.\n" * 50)
    assert refusal(read, text) == refusal(lambda path: video.read_frames(path, choose_spread), text)


def test_one_process_reads_many_videos_and_is_replaced_in_time(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "READS_PER_HELPER", 3)
    helpers = []
    for _ in range(6):
        read(intact)
        helpers.append(decoding._thread.helper.process.pid)
    assert len(set(helpers[:3])) == len(set(helpers[3:])) == 1
    assert helpers[0] != helpers[3]


def test_an_interrupted_read_does_not_affect_the_next(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = render(tmp_path / "other.mp4", "libx264", {"g": "2"}, (32, 32), 24)
    read(intact)

    with monkeypatch.context() as patch:
        patch.setattr(decoding._thread.helper, "connection", _Interrupting(decoding._thread.helper.connection))
        with pytest.raises(KeyboardInterrupt):
            read(other)
    assert read(intact).shape == (8, 48, 64, 3)


class _Interrupting:
    """A connection that is interrupted after the job was sent."""

    def __init__(self, connection: Connection) -> None:
        self.send = connection.send

    def recv(self) -> None:
        raise KeyboardInterrupt


def test_each_thread_and_forked_process_has_its_helper(intact: Path) -> None:
    expected = read(intact)
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(read(intact))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(frames, expected) for frames in found)
    assert len(found) == 3
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(read(intact), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(read(intact), expected)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGALRM, signal.SIGKILL])
def test_a_random_crash_does_not_change_frames_or_later_draws(intact: Path, number: int) -> None:
    choice = FrameChoice(8, "segments", np.random.default_rng(0))
    read(intact)
    os.kill(decoding._thread.helper.process.pid, number)
    frames, after = decoding.read_frames(intact, choice)
    expected = FrameChoice(8, "segments", np.random.default_rng(0))
    np.testing.assert_array_equal(frames, video.read_frames(intact, expected))
    assert after.rng is not None
    assert expected.rng is not None
    assert after.rng.random() == expected.rng.random()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_helper_ignores_signals_to_the_job(intact: Path, number: int) -> None:
    read(intact)
    before = decoding._thread.helper.process.pid
    os.kill(before, number)
    read(intact)
    assert decoding._thread.helper.process.pid == before


SENDS_READY = (
    "import os, signal, sys, time; from multiprocessing.connection import Connection; "
    "connection = Connection({descriptor}); connection.send('ready'); connection.recv(); "
)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashes the decoder (SIGSEGV)"),
        ("os.abort()", "crashes the decoder (SIGABRT)"),
        ("signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(60)", "takes longer than 120 seconds"),
        (f"sys.exit({decoding.MEMORY_EXIT})", "more than 4 GiB of memory"),
    ],
)
def test_a_video_that_crashes_the_decoder_twice_is_refused_and_the_next_is_read(
    intact: Path, monkeypatch: pytest.MonkeyPatch, end: str, reason: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "HELPER", SENDS_READY + end)
        assert reason in refusal(read, intact)
    assert reason in refusal(read, intact)  # remembered, so that it is not read again
    assert read(intact.rename(intact.with_name("next.mp4"))).shape == (8, 48, 64, 3)


def test_a_failed_process_start_is_not_attributed_to_the_video(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "HELPER", "raise SystemExit(5)")
    with pytest.raises(RuntimeError, match="did not start"):
        read(intact)


def _instead(first: str, reading: str) -> str:
    """Returns the code of a helper that evaluates `reading` where it should read frames."""
    return (
        f"import sys; sys.path[0] = {{repository!r}}; from episodes import decoding, video; {first}; "
        f"video.read_frames = lambda *_: {reading}; decoding.serve({{descriptor}}, {{decord}})"
    )


def test_a_hang_in_a_c_function_stops_at_the_time_limit(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A sum of this length never returns to the interpreter, like a decoder in an endless loop.
    monkeypatch.setattr(decoding, "HELPER", _instead("decoding.MAX_READING_SECONDS = 1", "sum(range(10**18))"))
    assert "takes longer than" in refusal(read, intact)


def test_memory_is_limited(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = _instead("import numpy", "numpy.ones(decoding.LARGEST_MEMORY, dtype='u1')")
    monkeypatch.setattr(decoding, "HELPER", greedy)
    assert "more than 4 GiB of memory" in refusal(read, intact)


@pytest.mark.parametrize(("offset", "number"), [(8, 0x86), (12, 0x7FFFFFFF), (12, 0x80000018)])
def test_a_video_that_aborts_decord_is_read_with_pyav(intact: Path, tmp_path: Path, offset: int, number: int) -> None:
    """Found by fuzz_reader.py: with these counts of time steps decord ends its process (std::bad_alloc)."""
    content = bytearray(intact.read_bytes())
    table = content.index(b"stts")
    content[table + offset : table + offset + 4] = struct.pack(">I", number)
    path = tmp_path / "aborts.mp4"
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path), read(intact))


def test_damage_that_persists_in_a_flushed_decoder_is_handled(intact: Path, tmp_path: Path) -> None:
    """Found by fuzz_reader.py: decoding a second time gave another number of frames."""
    whole = render(tmp_path / "whole.avi", "mpeg4", {"g": "4", "bf": "2"}, (48, 64), 24).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.avi"
    for _ in range(60):
        content = bytearray(whole)
        start = content.index(b"movi")
        for position in rng.integers(start, len(content), 200):
            content[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            assert len(video.read_frames(path, choose_spread)) == 8
        except UserError:
            continue


def test_colours_that_cannot_be_converted_are_refused(tmp_path: Path) -> None:
    """Found by fuzz_reader.py: a stream whose frames name an unknown colour matrix."""
    colours = {"color_primaries": "bt709", "color_trc": "bt709", "colorspace": "bt709"}
    path = render(tmp_path / "colours.mpeg", "mpeg2video", {"g": "4", **colours}, (48, 64), 24)
    # The extension of a sequence's header that names primaries, transfer and matrix by number; 200 does not exist.
    content, found = re.subn(rb"(\x00\x00\x01\xb5[\x20-\x2f]\x01\x01)\x01", b"\\1\xc8", path.read_bytes())
    assert found
    path.write_bytes(content)
    assert "colours" in refusal(read, path)


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_a_pipe_or_a_device_instead_of_a_file_does_not_block(tmp_path: Path, make: Callable) -> None:
    as_video, folder = tmp_path / "video.mp4", tmp_path / "frames"
    folder.mkdir()
    make(as_video)
    make(folder / "00001.jpg")
    for reader in (read, decoding.probe):
        refusal(reader, as_video)
        with pytest.raises(UserError, match=r"00001\.jpg is not a regular file"):
            reader(folder)


def test_absurd_sizes_in_a_header_are_refused_before_decoding(tmp_path: Path) -> None:
    content = bytearray(render(tmp_path / "small.avi", "rawvideo", {}, (48, 64), 4).read_bytes())
    path = tmp_path / "huge.avi"
    for width, height in ((100_000, 100_000), (16_000, 16_000), (2**31 - 1, 2**31 - 1)):
        start = content.index(b"strf") + 12
        content[start : start + 8] = struct.pack("<ii", width, height)
        path.write_bytes(content)
        refusal(read, path)
        refusal(decoding.probe, path)


def test_frames_that_are_too_large_are_refused_with_both_numbers(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LARGEST_FRAME", 48 * 64 - 1)
    message = refusal(lambda path: video.read_frames(path, choose_spread), intact)
    assert "64 x 48 pixels, the limit is 3,071" in message


def test_a_file_that_is_too_large_is_refused_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    with path.open("wb") as file:
        file.truncate(limits.LARGEST_FILE + 1)  # takes no space on the disk
    assert "2,147,483,649 bytes, the limit is 2,147,483,648" in refusal(read, path)
    assert "2,147,483,649 bytes" in refusal(decoding.probe, path)


def test_ten_hours_of_one_tiny_frame_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ten_hours.mkv"
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuvj420p"
        [packet, *_] = stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24"))
        container.start_encoding()
        content, time_base = bytes(packet), stream.time_base
        for number in range(limits.MAX_FRAMES + 1):
            copy = av.Packet(content)
            copy.stream, copy.pts, copy.dts, copy.is_keyframe = stream, number * 9, number * 9, True
            copy.time_base = time_base / 9
            container.mux(copy)
    assert "has more than 100,000 frames: cut it into clips" in refusal(read, path)
    decoding.probe(path)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:{other}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.mp4\n",
        "ffconcat version 1.0\nfile '{other}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_a_playlist_of_other_files_is_not_a_video(intact: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.mp4"
    path.write_text(text.format(other=intact))
    refusal(read, path)


@pytest.mark.parametrize("name", ["a:b", "concat:x", "http:", "50%03d", "ä é", "-i"])
def test_unusual_file_names_are_treated_as_plain_names(
    intact: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = intact.parent / name
    folder.mkdir()
    intact.rename(folder / "x%d.mp4")
    monkeypatch.chdir(intact.parent)
    assert len(read(Path(name) / "x%d.mp4")) == 8


# --- images -----------------------------------------------------------------------------------------------


def frame_folder(tmp_path: Path, content: bytes) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir(exist_ok=True)
    (folder / "00001.jpg").write_bytes(content)
    return folder


def refused_image(tmp_path: Path, content: bytes) -> str:
    """Returns the error message of a folder with this image, one sentence."""
    folder = frame_folder(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read(folder)
    assert "00001.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("side", [10_000, 11_000, 20_000])  # below, between and above Pillow's own limits
def test_an_image_bomb_is_refused_without_decoding(tmp_path: Path, side: int) -> None:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    assert "pixels" in refused_image(tmp_path, buffer.getvalue())


def test_a_png_of_terabytes_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    refused_image(tmp_path, bytes(content))


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Returns a PNG file whose chunks have valid checksums."""
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("damage", ["colours without a palette", "a profile cut off behind the pixels"])
def test_a_png_that_breaks_pillow_is_refused(tmp_path: Path, damage: str) -> None:
    kind = 3 if damage.startswith("colours") else 0
    header, pixels = struct.pack(">IIBBBBB", 8, 8, 8, kind, 0, 0, 0), zlib.compress(bytes(9 * 8))
    before, behind = ([(b"tRNS", b"\xff\0")], []) if kind else ([], [(b"iCCP", b"ICC profile\0")])
    refused_image(tmp_path, png_of([(b"IHDR", header), *before, (b"IDAT", pixels), *behind, (b"IEND", b"")]))


def test_a_jpeg_with_too_many_scans_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (200, 200), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    assert read(frame_folder(tmp_path, content)).shape == (8, 200, 200, 3)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    bomb = content[:-2] + last_scan * limits.MAX_SCANS + content[-2:]
    assert "more than 100 scans" in refused_image(tmp_path, bomb)


@pytest.mark.parametrize("form", ["EPS", "PDF", "ICO"])
def test_an_image_of_a_risky_format_is_refused_under_any_name(tmp_path: Path, form: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, form)
    refused_image(tmp_path, buffer.getvalue())
