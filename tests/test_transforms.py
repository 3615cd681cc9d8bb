"""Temporal and spatial transforms: the released rules, and one draw for a clip."""

import numpy as np
import pytest
import torch

from utils.errors import UserError
from videotransforms.video_transforms import (
    TestTransform,
    TrainTransform,
    center_crop,
    mirror,
    normalise,
    random_crop,
    resize_short_side,
)
from videotransforms.volume_transforms import (
    FrameChoice,
    jittered_indices,
    segment_indices,
    spread_indices,
)

SIZES = [(num_frames, length) for num_frames in [*range(1, 40), 100, 301] for length in (1, 2, 3, 5, 8, 16)]


def released_indices(num_frames: int, length: int, start: int, end: int) -> list[int]:
    """Returns indices by the released rule, for a given start and end."""
    if num_frames == length:
        return list(range(num_frames))
    if num_frames < length:
        return list(range(num_frames)) + [num_frames - 1] * (length - num_frames)
    if end - start < length:
        start = 0
        end = num_frames - 1
    return [int(position) for position in np.linspace(start, end, num=length)]


def check_clip(indices: np.ndarray, num_frames: int, length: int) -> None:
    """Checks the properties of every choice of frames."""
    assert indices.dtype == np.int64
    assert indices.shape == (length,)
    assert indices.min() >= 0
    assert indices.max() < num_frames
    assert (np.diff(indices) >= 0).all()


@pytest.mark.parametrize(("num_frames", "length"), SIZES)
def test_spread_equals_the_published_test_rule(num_frames: int, length: int) -> None:
    indices = spread_indices(num_frames, length)
    check_clip(indices, num_frames, length)
    assert indices.tolist() == released_indices(num_frames, length, 1, num_frames - 2)


def test_spread_equals_examples_computed_by_hand() -> None:
    assert spread_indices(24, 8).tolist() == [1, 4, 7, 10, 13, 16, 19, 22]
    assert spread_indices(3, 8).tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert spread_indices(8, 8).tolist() == list(range(8))


@pytest.mark.parametrize(("num_frames", "length"), SIZES)
def test_jitter_equals_the_published_training_rule(num_frames: int, length: int) -> None:
    pad = min(5, int((num_frames - length) / 2))
    starts = range(pad + 1) if pad >= 1 else [0]
    ends = range(num_frames - 1 - pad, num_frames) if pad >= 1 else [num_frames - 1]
    allowed = {tuple(released_indices(num_frames, length, start, end)) for start in starts for end in ends}
    for seed in range(20):
        indices = jittered_indices(num_frames, length, np.random.default_rng(seed))
        check_clip(indices, num_frames, length)
        assert tuple(indices.tolist()) in allowed


def test_jitter_reaches_every_start_and_end() -> None:
    rng = np.random.default_rng(0)
    clips = [jittered_indices(40, 8, rng) for _ in range(500)]
    assert {int(clip[0]) for clip in clips} == set(range(6))
    assert {int(clip[-1]) for clip in clips} == set(range(34, 40))


@pytest.mark.parametrize(("num_frames", "length"), SIZES)
def test_segments_give_one_frame_each(num_frames: int, length: int) -> None:
    for seed in range(5):
        indices = segment_indices(num_frames, length, np.random.default_rng(seed))
        check_clip(indices, num_frames, length)
        if num_frames <= length:
            assert indices.tolist() == spread_indices(num_frames, length).tolist()
        else:
            for segment, index in enumerate(indices.tolist()):
                assert segment * num_frames // length <= index < (segment + 1) * num_frames // length


def test_segments_reach_every_frame() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([segment_indices(19, 4, rng) for _ in range(300)])
    assert set(drawn.tolist()) == set(range(19))


@pytest.mark.parametrize("sampling", ["linspace", "segments"])
def test_chooser_draws_in_training_and_spreads_in_testing(sampling: str) -> None:
    train = FrameChoice(8, sampling, np.random.default_rng(3))
    again = FrameChoice(8, sampling, np.random.default_rng(3))
    clips = [train(60) for _ in range(10)]
    np.testing.assert_array_equal(clips, [again(60) for _ in range(10)])
    assert len({tuple(clip.tolist()) for clip in clips}) > 1
    test = FrameChoice(8, sampling, None)
    np.testing.assert_array_equal(test(60), spread_indices(60, 8))


def test_invalid_sampling_and_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="'linspace' or 'segments', found 'random'"):
        FrameChoice(8, "random", None)
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        FrameChoice(0, "linspace", None)
    with pytest.raises(ValueError, match="at least 1 frame to choose from, got 0"):
        spread_indices(0, 8)
    with pytest.raises(ValueError, match="at least 1 frame to choose from, got 0"):
        segment_indices(0, 8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 1 frame to choose from, got 0"):
        jittered_indices(0, 8, np.random.default_rng(0))


@pytest.fixture
def clip() -> np.ndarray:
    """Returns noise of uint8 [4, 48, 64, 3]."""
    return np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(48, 64, (24, 32)), (64, 48, (32, 24)), (49, 65, (24, 31)), (20, 30, (24, 36))]
)
def test_resize_keeps_the_aspect_ratio(height: int, width: int, expected: tuple[int, int]) -> None:
    resized = resize_short_side(torch.zeros(2, 3, height, width, dtype=torch.uint8), 24)
    assert resized.dtype == torch.uint8
    assert resized.shape == (2, 3, *expected)


def test_resize_is_antialiased_and_skips_the_right_size() -> None:
    stripes = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    stripes[..., ::4] = 200  # without antialiasing every pixel of the result would lie between two stripes: 0
    assert resize_short_side(stripes, 64) is stripes
    middle = resize_short_side(stripes, 16)[..., 2:-2]
    assert (middle.int() - 50).abs().max() <= 2


def test_resize_does_not_overshoot_at_an_edge() -> None:
    step = torch.full((1, 3, 64, 64), 60, dtype=torch.uint8)
    step[..., 30:] = 180
    for size in (24, 100):  # as a bicubic resize would, both ways
        resized = resize_short_side(step, size)
        assert (int(resized.min()), int(resized.max())) == (60, 180)


def test_transforms_return_uint8_of_the_requested_size(clip: np.ndarray) -> None:
    trained, _ = TrainTransform(36, 32, flip=True)(clip, np.random.default_rng(0))
    tested = TestTransform(36, 32)(clip)
    for result in (trained, tested):
        assert result.dtype == torch.uint8
        assert result.shape == (4, 3, 32, 32)
    assert tested.is_contiguous()


def test_test_transform_is_the_centre_crop_of_the_resized_clip(clip: np.ndarray) -> None:
    resized = resize_short_side(torch.from_numpy(clip).permute(0, 3, 1, 2), 36)  # 36 x 48
    assert torch.equal(TestTransform(36, 32)(clip), resized[..., 2:34, 8:40])


def test_numpy_and_tensor_clips_give_equal_results(clip: np.ndarray) -> None:
    assert torch.equal(TestTransform(36, 32)(clip), TestTransform(36, 32)(torch.from_numpy(clip)))


def test_train_transform_is_pure(clip: np.ndarray) -> None:
    transform = TrainTransform(48, 32, flip=True)
    before = clip.copy()
    first = [transform(clip, np.random.default_rng(seed)) for seed in range(20)]
    second = [transform(clip, np.random.default_rng(seed)) for seed in range(20)]
    for (one, one_mirrored), (other, other_mirrored) in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert one_mirrored == other_mirrored
    assert len({frames.numpy().tobytes() for frames, _ in first}) > 10
    np.testing.assert_array_equal(clip, before)


def test_all_frames_share_one_random_draw() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for seed in range(10):
        frames, _ = TrainTransform(40, 32, flip=True)(np.stack([frame] * 3), np.random.default_rng(seed))
        assert torch.equal(frames[0], frames[1])
        assert torch.equal(frames[0], frames[2])


def test_flip_mirrors_half_of_the_clips_and_does_not_move_the_crop(clip: np.ndarray) -> None:
    for seed in range(20):
        plain, never = TrainTransform(48, 32, flip=False)(clip, np.random.default_rng(seed))
        cut, _ = TrainTransform(48, 32, flip=True)(clip, np.random.default_rng(seed))
        assert torch.equal(cut, plain)
        assert not never
    transform, small, rng = TrainTransform(4, 4, flip=True), clip[:1, :4, :4], np.random.default_rng(0)
    assert abs(sum(transform(small, rng)[1] for _ in range(4000)) - 2000) < 130  # four standard deviations


def test_mirror_flips_only_the_named_clips() -> None:
    clips = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (4, 2, 5, 6, 3), dtype=np.uint8))
    clips = clips.movedim(-1, 2)  # as returned by a worker, in channels-last memory
    before = clips.clone()
    found = mirror(clips, [True, False, False, True])
    assert found.is_contiguous()
    assert torch.equal(found[[1, 2]], clips[[1, 2]])
    for column in range(6):
        assert torch.equal(found[[0, 3]][..., column], clips[[0, 3]][..., 5 - column])
    assert torch.equal(clips, before)


def test_disabling_flip_keeps_the_generator_state(clip: np.ndarray) -> None:
    generators = [np.random.default_rng(5), np.random.default_rng(5)]
    for generator, flip in zip(generators, (True, False), strict=True):
        TrainTransform(48, 32, flip=flip)(clip, generator)
    assert generators[0].random() == generators[1].random()


def test_random_crop_reaches_every_position() -> None:
    frames = torch.arange(5 * 6, dtype=torch.uint8).view(1, 1, 5, 6).expand(2, 3, 5, 6)
    rng = np.random.default_rng(0)
    corners = {int(random_crop(frames, 3, rng)[0, 0, 0, 0]) for _ in range(300)}
    assert corners == {6 * top + left for top in range(3) for left in range(4)}


def test_crops_larger_than_the_frame_are_refused(clip: np.ndarray) -> None:
    small = torch.zeros(1, 3, 10, 20, dtype=torch.uint8)
    with pytest.raises(ValueError, match="11 x 11 pixels out of frames of 10 x 20"):
        center_crop(small, 11)
    with pytest.raises(ValueError, match="11 x 11 pixels out of frames of 10 x 20"):
        random_crop(small, 11, np.random.default_rng(0))
    for make in (lambda: TestTransform(32, 33), lambda: TrainTransform(32, 33, flip=False)):
        with pytest.raises(UserError, match="found 33"):
            make()
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\]"):
        TestTransform(32, 32)(clip.astype(np.float32))
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\]"):
        TestTransform(32, 32)(clip.transpose(0, 3, 1, 2))


def test_normalise_equals_the_formula() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 4, 3, 5, 6), dtype=np.uint8))
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    result = normalise(frames, mean, std)
    assert result.dtype == torch.float32
    assert result.shape == frames.shape
    for channel in range(3):
        expected = (frames[:, :, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(result[:, :, channel].double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(normalise(frames, None, None).double(), frames.double() / 255, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="belong together"):
        normalise(frames, mean, None)


def test_normalise_in_place_is_bit_exact_and_keeps_the_frames() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    mean, std = torch.tensor((0.48, 0.46, 0.41)), torch.tensor((0.27, 0.26, 0.28))
    expected = (pixels.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for frames in (pixels, pixels.float()):
        before = frames.clone()
        assert torch.equal(normalise(frames, mean, std), expected)
        assert torch.equal(frames, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_normalise_stays_on_the_device() -> None:
    frames = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    result = normalise(frames.cuda(), mean, std)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), normalise(frames, mean, std))
