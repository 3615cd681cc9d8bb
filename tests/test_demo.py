"""The demo set: what its clips, its files and its command promise."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from episodes.demo.motions import MOTIONS
from episodes.demo.render import DEMO_SETS, REVERSED_PAIRS, SPLITS, render_clip, render_demo, write_video
from run import app
from run.prepare import main as prepare_command
from tests.helpers.shipped import ROOT
from utils.config import load_config
from utils.errors import UserError

CLIPS_PER_CLASS = 16


def all_files(folder: Path) -> dict[str, bytes]:
    """Returns relative path -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `prepare.py demo` as a user does."""
    command = [sys.executable, "run/prepare.py", "demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a set with one clip per class; tests only read it."""
    out = tmp_path_factory.mktemp("demo") / "set"
    render_demo(out, seed=3, train_clips=1, eval_clips=1, workers=1)
    return out


def test_splits_share_no_class_and_are_large_enough() -> None:
    names = [name for motions in SPLITS.values() for name in motions]
    assert len(names) == len(set(names))
    assert set(names) == set(MOTIONS)
    assert len(names) >= 32
    assert {split: len(motions) for split, motions in SPLITS.items()} == {"train": 24, "val": 6, "test": 10}


def test_prompts_are_all_different() -> None:
    assert len({motion.prompt for motion in MOTIONS.values()}) == len(MOTIONS)


def test_reversed_pairs_are_test_classes() -> None:
    members = [name for pair in REVERSED_PAIRS for name in pair]
    assert len(REVERSED_PAIRS) >= 4
    assert len(members) == len(set(members))
    assert set(members) <= set(SPLITS["test"])


def test_members_of_a_pair_are_time_reversals_of_each_other() -> None:
    for forward, backward in REVERSED_PAIRS:
        there = MOTIONS[forward].tracks(np.random.default_rng(0), 24)
        back = MOTIONS[backward].tracks(np.random.default_rng(0), 24)
        for one, other in zip(there, back, strict=True):
            for field in ("x", "y", "size", "angle", "opacity"):
                np.testing.assert_array_equal(getattr(one, field), getattr(other, field)[::-1])


HEADINGS = {  # to the right, down
    "move_left": (-1, 0), "move_right": (1, 0), "move_up": (0, -1), "move_down": (0, 1), "move_up_left": (-1, -1),
    "move_down_right": (1, 1), "move_up_right": (1, -1), "move_down_left": (-1, 1), "speed_up": (1, 0),
    "slow_down": (1, 0), "arc_right": (1, 0), "zigzag_right": (1, 0), "zigzag_down": (0, 1), "approach": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_objects_move_as_their_words_say(seed: int) -> None:
    tracks = {name: motion.tracks(np.random.default_rng(seed), 24) for name, motion in MOTIONS.items()}
    for name, heading in HEADINGS.items():
        (track,) = tracks[name]
        moved = np.array([track.x[-1] - track.x[0], track.y[-1] - track.y[0]])
        assert moved @ heading > 0.9 * np.linalg.norm(moved) * np.linalg.norm(heading), name
    for name in ("orbit_clockwise", "spiral_in", "arc_right"):
        (track,) = tracks[name]
        steps, reached = np.diff([track.x, track.y]), [track.x[:-1] - 0.5, track.y[:-1] - track.y.mean()]
        assert (reached[0] * steps[1] - reached[1] * steps[0]).sum() > 0, name  # y points down, so this is clockwise
    for name, field in (("rotate_clockwise", "angle"), ("grow", "size"), ("approach", "size"), ("fade_in", "opacity")):
        assert (np.diff(getattr(tracks[name][0], field)) >= 0).all(), name
    shake, nod = tracks["shake"][0], tracks["nod"][0]
    assert np.ptp(shake.x) > np.ptp(shake.y) == np.ptp(nod.x) == 0 < np.ptp(nod.y)
    left, right = tracks["meet"]
    assert (np.diff(np.hypot(left.x - right.x, left.y - right.y)) <= 0).all()


@pytest.mark.parametrize("motion", list(MOTIONS))
def test_clip_is_a_pure_function_of_class_seed_and_number(motion: str) -> None:
    clip = render_clip(motion, seed=0, number=0)
    assert clip.shape == (24, 72, 72, 3)
    assert clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, render_clip(motion, seed=0, number=0))
    assert not np.array_equal(clip, render_clip(motion, seed=1, number=0))
    assert not np.array_equal(clip, render_clip(motion, seed=0, number=1))


def test_clips_of_two_classes_with_the_same_number_share_no_random_values(monkeypatch: pytest.MonkeyPatch) -> None:
    first = replace(DEMO_SETS["motions"], draw=lambda rng, *_: rng.random(size=1))
    monkeypatch.setitem(DEMO_SETS, "motions", first)
    assert len({render_clip(motion, seed=0, number=0).item() for motion in MOTIONS}) == len(MOTIONS)


@pytest.mark.parametrize("motion", list(MOTIONS))
def test_every_clip_has_a_visible_object_and_motion(motion: str) -> None:
    for number in range(4):
        clip = render_clip(motion, seed=0, number=number).astype(np.float32)
        change = np.ptp(clip, axis=0).max(axis=-1)  # of each pixel over time, [H, W]
        assert (change > 32.0).mean() > 0.03


def test_unknown_motion_is_refused() -> None:
    with pytest.raises(UserError, match="unknown class 'fly'"):
        render_clip("fly", seed=0, number=0)


def small_frames(clip: np.ndarray) -> np.ndarray:
    """Averages a clip over 4x4 pixels: uint8 [T, 72, 72, 3] to float32 [T, 18, 18, 3]."""
    return clip.reshape(clip.shape[0], 18, 4, 18, 4, 3).astype(np.float32).mean(axis=(2, 4))


def average_frame(clip: np.ndarray) -> np.ndarray:
    """Returns the mean over time, which ignores the order of frames: float32 [18 * 18 * 3]."""
    return small_frames(clip).mean(axis=0).ravel()


def average_change(clip: np.ndarray) -> np.ndarray:
    """Returns the same without the background's colours: mean distance from the median frame, float32 [18 * 18]."""
    return foreground(clip).mean(axis=0).ravel()


def foreground(clip: np.ndarray) -> np.ndarray:
    """Returns how much each frame differs from the median over time: float32 [T, 18, 18]."""
    frames = small_frames(clip)
    return np.abs(frames - np.median(frames, axis=0)).mean(axis=-1)


def ordered_change(clip: np.ndarray) -> np.ndarray:
    """Returns the foreground of 8 frames in order, each of unit length, float32 [8 * 18 * 18]."""
    maps = foreground(clip)[np.linspace(0, len(clip) - 1, 8).round().astype(int)]
    return (maps / (np.linalg.norm(maps, axis=(1, 2), keepdims=True) + 1e-6)).ravel()


def prototype_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the nearest-prototype accuracy of two classes, each float32 [clips, D], on the held-out half."""
    half = len(first) // 2
    correct = []
    for support, query in [(slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))]:
        prototypes = np.stack([first[support].mean(axis=0), second[support].mean(axis=0)])
        for label, features in enumerate([first[query], second[query]]):
            distance = np.linalg.norm(features[:, None] - prototypes[None], axis=-1)  # [queries, 2]
            correct.append(distance.argmin(axis=1) == label)
    return float(np.mean(correct))


def test_only_frame_order_distinguishes_members_of_a_pair() -> None:
    accuracy: dict[str, list[float]] = {"average frame": [], "average change": [], "ordered change": []}
    for pair in REVERSED_PAIRS:
        clips = [[render_clip(motion, 0, number) for number in range(CLIPS_PER_CLASS)] for motion in pair]
        for name, feature in zip(accuracy, [average_frame, average_change, ordered_change], strict=True):
            first, second = (np.stack([feature(clip) for clip in members]) for members in clips)
            accuracy[name].append(prototype_accuracy(first, second))
    assert np.mean(accuracy["average frame"]) == pytest.approx(0.5, abs=0.15)
    assert np.mean(accuracy["average change"]) == pytest.approx(0.5, abs=0.15)
    assert np.mean(accuracy["ordered change"]) > 0.85


def test_files_are_h264_with_24_frames_close_to_the_drawing(small_set: Path) -> None:
    for motion in ("move_left", "spiral_in"):
        with av.open(str(small_set / "videos" / motion / f"{motion}_0000.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert float(stream.average_rate) == 12.0
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        drawn = render_clip(motion, seed=3, number=0)
        assert frames.shape == drawn.shape
        assert np.abs(frames.astype(int) - drawn).mean() < 12.0


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = render_clip("bounce", seed=0, number=0)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_split_files_name_exactly_the_videos(small_set: Path) -> None:
    classes = yaml.safe_load((small_set / "splits" / "classes.yaml").read_text())
    assert classes["dataset"] == "demo"
    assert classes["videos"] == "listed"
    assert classes["horizontal_flip"] is False
    listed: list[str] = []
    for split, motions in SPLITS.items():
        assert [entry["folder"] for entry in classes[split]] == motions
        assert [entry["prompt"] for entry in classes[split]] == [MOTIONS[name].prompt for name in motions]
        assert {entry["videos"] for entry in classes[split]} == {1}
        listed += (small_set / "splits" / f"{split}list03.txt").read_text().splitlines()
    found = [path.relative_to(small_set / "videos") for path in small_set.glob("videos/*/*")]
    assert sorted(listed) == sorted(str(path.with_suffix("")) for path in found)


def test_an_interrupted_rendering_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "set"
    render_demo(out, seed=5, train_clips=1, eval_clips=1, workers=1)
    whole = all_files(out)
    kept = out / "videos" / "grow" / "grow_0000.mp4"
    kept_at = kept.stat().st_mtime_ns
    (out / "videos" / "meet" / "meet_0000.mp4").unlink()
    (out / "videos" / "meet" / ".meet_0000.mp4.1.part").write_bytes(b"half a video")
    for path in (out / "splits").iterdir():
        path.unlink()

    render_demo(out, seed=5, train_clips=1, eval_clips=1, workers=1)

    again = all_files(out)
    assert again.pop("videos/meet/.meet_0000.mp4.1.part") == b"half a video"
    assert again == whole
    assert kept.stat().st_mtime_ns == kept_at


def test_a_failed_write_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "clip.mp4", render_clip("grow", seed=0, number=0))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_set_is_recognised(small_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    render_demo(small_set, seed=3, train_clips=1, eval_clips=1)
    assert "exists already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob("*")} == before


@pytest.mark.parametrize("other", [{"seed": 4}, {"train_clips": 2}, {"eval_clips": 2}])
def test_other_parameters_are_refused(small_set: Path, other: dict[str, int]) -> None:
    before = all_files(small_set)
    with pytest.raises(UserError, match=r"other parameters.*--out") as caught:
        render_demo(small_set, **{"seed": 3, "train_clips": 1, "eval_clips": 1, **other})
    assert str(small_set) in str(caught.value)
    assert all_files(small_set) == before


def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "classes.yaml").write_text("mine")
    with pytest.raises(UserError, match="nor a demo set"):
        render_demo(tmp_path, train_clips=1, eval_clips=1)
    assert all_files(tmp_path) == {"splits/classes.yaml": b"mine"}


def test_an_unwritable_location_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="--out"):
        render_demo(tmp_path / "file", train_clips=1, eval_clips=1)
    with pytest.raises(UserError, match="cannot write"):
        render_demo(tmp_path / "file" / "below", train_clips=1, eval_clips=1)


def test_command_renders_with_several_workers_and_reports_the_next_step(small_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    numbers = ["--seed", "3", "--train-clips", "1", "--eval-clips", "1", "--workers", "2"]
    done = prepare("--out", str(out), *numbers)
    assert done.returncode == 0, done.stderr
    assert str(out / "videos") in done.stdout
    assert "python run/run.py --cfg configs/clipspm/demo.yaml" in done.stdout
    assert all_files(out) == all_files(small_set)

    again = prepare("--out", str(out), *numbers)
    assert again.returncode == 0
    assert "exists already" in again.stdout


@pytest.mark.parametrize("option", ["--train-clips", "--eval-clips", "--workers"])
def test_command_reports_a_bad_number_in_one_line(tmp_path: Path, option: str) -> None:
    done = prepare("--out", str(tmp_path / "demo"), option, "0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert option.strip("-").replace("-", "_") in done.stderr
    assert not (tmp_path / "demo").exists()


def test_the_progress_bar_ends_at_100_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stderr", terminal)
    render_demo(tmp_path / "set", train_clips=1, eval_clips=1, workers=1)
    shown = terminal.getvalue().split("\r")
    total = sum(len(motions) for motions in SPLITS.values())
    assert "rendering:   0%" in shown[1]
    assert "rendering: 100%" in shown[-1]
    assert f"{total}/{total}" in shown[-1]


def test_progress_in_a_file_is_written_in_lines(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("utils.jobs.SECONDS_BETWEEN_LINES", 0.0)
    render_demo(tmp_path / "set", train_clips=1, eval_clips=1, workers=1)
    lines = capsys.readouterr().err.splitlines()
    total = len(list(tmp_path.rglob("*.mp4")))
    assert any(line.startswith("rendering: 3 of ") for line in lines)
    assert lines[-1] == f"rendering: {total:,} of {total:,} clips"


def test_the_next_command_names_the_rendered_folder(tmp_path, capsys):
    out = tmp_path / "my demo"
    options = ["demo", "--out", str(out), "--train-clips", "1", "--eval-clips", "1", "--workers", "1"]
    assert prepare_command(options) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next:"))
    loaded = load_config(ROOT / words[3], words[4:]).config
    assert (str(out / "videos"), str(out / "splits")) == (loaded.DATA.DATA_DIR, loaded.DATA.SPLIT_DIR)


def test_the_query_of_the_apps_example_is_not_one_of_its_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "DEMO", tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.mp4").touch()
    query, *fields = app.demo_example()
    clips = [clip for clip in fields[app.CLASSES :] if clip]
    assert clips == [[str(tmp_path / name / "0.mp4")] for name in ("a", "b")]
    assert query == str(tmp_path / "a/1.mp4")
