"""Long videos in windows: which frames a window has, one decode, and the same scores as for single clips."""

import argparse
import os
import sys
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

import fsar
from episodes import decoding, streaming
from episodes.demo.render import write_video
from episodes.video import read_frames
from run.lengths import Length, length
from run.predict import main, parse_arguments
from run.prediction_output import NONE, answers_of
from run.timeline import classify_windows, plan
from run.timeline_picture import _draw_panel, draw
from tests.helpers.tiny_dataset import tiny_video_frames
from videotransforms.volume_transforms import FrameChoice

FPS = 12
CHOICE = FrameChoice(4, "linspace", None)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a video of six consecutive clips of 12 frames: 6 seconds."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_video(path, np.concatenate([tiny_video_frames(f"clip {number}") for number in range(6)]), FPS)
    return path


@pytest.fixture(scope="module")
def classifier() -> fsar.Classifier:
    torch.manual_seed(0)
    model = fsar.build("otam", BACKBONE="tiny", CLIP_WEIGHTS="random", image_size=32)
    support = {name: [tiny_video_frames(name)] for name in ("clip 0", "clip 3")}
    return fsar.Classifier(model, "cpu").fit(support)


@pytest.mark.parametrize(("window", "stride"), [("2s", "1s"), ("1500ms", "700ms"), ("18f", "5f"), ("100s", "1s")])
def test_a_window_has_the_scores_of_its_clip(video, classifier, window, stride):
    timeline = classify_windows(classifier, video, length(window), length(stride))
    frames = read_frames(video, np.arange)
    per_unit = FPS if timeline.unit == "s" else 1
    first = np.ceil(timeline.starts * per_unit - 1e-6).astype(int)
    behind = np.ceil(timeline.stops * per_unit - 1e-6).astype(int)
    clips = [frames[start:stop] for start, stop in zip(first, behind, strict=True)]
    torch.testing.assert_close(timeline.prediction.scores, classifier.predict(clips).scores, rtol=1e-4, atol=1e-4)
    assert timeline.starts[0] == 0
    assert timeline.stops[-1] == pytest.approx(len(frames) / per_unit)


def test_the_video_is_decoded_once(video, classifier, monkeypatch):
    begun = []

    def counted(path: Path):
        begun.append(path)
        return streaming_frames(path)

    streaming_frames = streaming.shown_frames
    monkeypatch.setattr(streaming, "shown_frames", counted)
    monkeypatch.setattr(streaming, "FRAMES_PER_READ", 5)
    monkeypatch.setattr(decoding, "call", lambda function, *arguments: function(*arguments))
    classify_windows(classifier, video, Length(2, "s"), Length(0.5, "s"))
    assert begun == [video]


def test_a_restarted_helper_gives_the_same_frames(video):
    frames = read_frames(video, np.arange)
    for first, stop, indices in [(0, 20, [0, 3, 19]), (20, 30, [25]), (50, 90, [60, 71])]:
        expected = frames[indices]
        assert np.array_equal(streaming._next_frames(video, first, stop, indices), expected)
    assert len(streaming._next_frames(video, 70, 90, [71, 80])) == 1


def test_folders_of_images_have_frames_and_no_times(tiny_dataset, classifier):
    folder = tiny_dataset.frames / "test_action_0" / "test_action_0_00"
    timeline = classify_windows(classifier, folder, Length(6, "f"), Length(3, "f"))
    assert timeline.starts.tolist() == [0, 3, 6]
    with pytest.raises(fsar.UserError, match="16f"):
        classify_windows(classifier, folder, Length(1, "s"), Length(1, "s"))


def test_windows_follow_uneven_frame_times():
    times = np.array([0.0, 0.1, 0.2, 0.3, 2.5, 2.6, 2.7])
    starts, stops, frames = plan(times, Length(1, "s"), Length(1, "s"), CHOICE)
    assert starts == pytest.approx([0, 1, 1.8])
    assert stops[-1] == pytest.approx(2.8)
    assert [sorted(set(chosen.tolist())) for chosen in frames] == [[0, 1, 2, 3], [3], [4, 5, 6]]
    with pytest.raises(fsar.UserError, match=r"--stride 0\.01s .* 0\.1s"):
        plan(times, Length(1, "s"), Length(0.01, "s"), CHOICE)


@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5]])
def test_a_video_shorter_than_a_window_is_one_window_for_any_stride(times):
    starts, stops, frames = plan(np.array(times), Length(1, "s"), Length(0.25, "s"), CHOICE)
    assert (starts.tolist(), stops.tolist()) == ([0], [1])
    assert [sorted(set(chosen.tolist())) for chosen in frames] == [list(range(len(times)))]


def test_segments_join_equal_answers_and_split_overlaps_in_the_middle(video, classifier):
    timeline = classify_windows(classifier, video, Length(2, "s"), Length(1, "s"))
    segments = timeline.segments(["a", "a", "b", "b", "b"])
    assert [part.answer for part in segments] == ["a", "b"]
    assert [edge for part in segments for edge in part[:2]] == pytest.approx([0, 2.5, 2.5, 6])
    best = timeline.prediction.probabilities.amax(dim=-1)
    assert [part.probability for part in segments] == pytest.approx([best[:2].mean().item(), best[2:].mean().item()])


@pytest.mark.parametrize(("rates", "seconds"), [((10, 50), 0.1), ((None, 50), 0.02), ((None, None), 0.04)], ids=str)
@pytest.mark.parametrize("stamps", [[None] * 3, [0, None, 80], [0, 40, 40]], ids=str)
def test_frames_without_usable_times_follow_the_rate(monkeypatch, rates, seconds, stamps):
    stream = SimpleNamespace(average_rate=rates[0], guessed_rate=rates[1], time_base=Fraction(1, 1000))
    packets = [SimpleNamespace(pts=stamp, dts=stamp, is_discard=False) for stamp in stamps]
    monkeypatch.setattr(streaming, "open_video", lambda path: nullcontext((None, stream)))
    monkeypatch.setattr(streaming, "data_packets", lambda container, stream: packets)
    assert streaming._frame_times(Path("video.h264")) == pytest.approx(np.arange(3) * seconds)


@pytest.mark.parametrize("start", [0, 5000])
def test_frame_times_are_those_of_presentation_from_the_first(tmp_path, start):
    """With B-frames, packets come and have decoding times in another order."""
    shown = [0, 40, 80, 120, 600, 640, 700, 1500, 1540, 1580, 1620, 1660]
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3", "b_strategy": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for number, milliseconds in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = start + milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert streaming.frame_times(tmp_path / "uneven.mkv") == pytest.approx(np.array(shown) / 1000)


def test_a_picture_has_a_panel_per_video_and_needs_matplotlib(video, classifier, monkeypatch):
    pytest.importorskip("matplotlib")
    timeline = classify_windows(classifier, video, Length(2, "s"), Length(1, "s"))
    names = ["a $x$ video", os.fsdecode(b"caf\xe9" * 20)]
    answers = [one for name in names for one in answers_of([name] * 5, timeline.prediction, -1.0, timeline)]
    drawn = draw(dict.fromkeys(names, timeline), answers, "svg").decode()
    assert drawn.count("seconds") >= len(names)
    assert draw(dict.fromkeys(names, timeline), answers, "png").startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(fsar.UserError, match=r"requirements-report\.txt"):
        draw(dict.fromkeys(names, timeline), answers, "png")


def test_a_rejected_window_has_its_row_below_the_classes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    prediction = fsar.Prediction(("a", "b"), torch.zeros(3, 2), torch.full((3, 2), 0.5))
    timeline = SimpleNamespace(prediction=prediction, edges=lambda: np.arange(4.0), unit="s")
    panel = figure.subplots()
    _draw_panel(panel, "video", timeline, ["a", NONE, "b"])
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert [(labels[int(line.get_ydata()[0])], list(line.get_xdata())) for line in panel.lines] == [
        ("a", [0, 1]), (NONE, [1, 2]), ("b", [2, 3]),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["2", "0s", "-2s", "0f", "1.5f", "s", "nan", "infs", "2 s", "2m", "1e3s", ""])
def test_a_length_without_unit_or_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        length(text)


def test_lengths_are_seconds_milliseconds_or_frames():
    assert [length(text) for text in ("2s", "500ms", ".5s", "16f")] == [(2, "s"), (0.5, "s"), (0.5, "s"), (16, "f")]


def test_windows_overlap_by_half_in_whole_frames_by_default():
    words = ["--checkpoint", __file__, "--support", "actions", "--query", "clip.mp4", "--window"]
    strides = {window: parse_arguments([*words, window]).stride for window in ("3s", "5f", "1f")}
    assert strides == {"3s": (1.5, "s"), "5f": (2, "f"), "1f": (1, "f")}


@pytest.mark.parametrize(
    "words", [["--stride", "1s"], ["--picture", "a.png"], ["--window", "2s", "--stride", "4f"], ["--window", "2"]]
)
def test_options_that_do_not_fit_together_are_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["--checkpoint", __file__, "--support", "actions", "--query", "clip.mp4", *words])
    assert refused.value.code == 2
    assert words[0] in capsys.readouterr().err
