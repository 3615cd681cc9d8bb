"""Spatial transforms: from decoded frames to square clips of the model's size.

Clips stay uint8 [T, 3, H, W] until they are on the device, which makes them four times smaller to copy than floats.
They are cropped before the copy; `mirror` and `normalise` run on the device. Random values are drawn once per clip, so
that all its frames are cropped and mirrored in the same way.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from utils.errors import UserError

FLIP_PROBABILITY = 0.5

ChannelValues = Sequence[float] | torch.Tensor  # one for each of the three channels


class TrainTransform:
    """Resizing, a random crop, and random mirroring, drawn once per clip."""

    def __init__(self, short_side: int, size: int, flip: bool) -> None:
        """Stores the sizes in pixels.

        Args:
            short_side: length of the frames' shorter side after resizing.
            size: height and width of the crop.
            flip: mirror half of the clips. Off for classes that distinguish left from right.

        Raises:
            UserError: the crop is larger than the resized frame.
        """
        _check_sizes(short_side, size)
        self.short_side = short_side
        self.size = size
        self.flip = flip

    def __call__(self, clip: np.ndarray | torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, bool]:
        """Resizes and crops uint8 [T, H, W, 3], a pure function of clip and `rng`.

        Returns:
            a view, uint8 [T, 3, size, size], and whether to apply `mirror` to it.
        """
        frames = resize_short_side(_channels_first(clip), self.short_side)
        frames = random_crop(frames, self.size, rng)
        # Drawn even if it is not used, so that switching it off does not change later values of `rng`.
        drawn = bool(rng.random() < FLIP_PROBABILITY)
        return frames, self.flip and drawn


class TestTransform:
    """Resizing and a centre crop, without randomness."""

    __test__ = False  # pytest would take the name for a test case

    def __init__(self, short_side: int, size: int) -> None:
        """Stores the sizes in pixels; arguments and errors as in `TrainTransform`."""
        _check_sizes(short_side, size)
        self.short_side = short_side
        self.size = size

    def __call__(self, clip: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Resizes and crops uint8 [T, H, W, 3] to contiguous uint8 [T, 3, size, size]."""
        frames = resize_short_side(_channels_first(clip), self.short_side)
        return center_crop(frames, self.size).contiguous()


def resize_short_side(clip: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes uint8 [T, 3, H, W] to a shorter side of `size` pixels with the same aspect ratio.

    Bilinear with antialiasing. A clip of this size is returned unchanged.
    """
    if min(clip.shape[-2:]) == size:
        return clip
    return functional.resize(clip, [size], interpolation=InterpolationMode.BILINEAR, antialias=True)


def random_crop(clip: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops uint8 [T, 3, H, W] to a random square, the same in all frames: a view, uint8 [T, 3, size, size].

    Raises:
        ValueError: a frame is smaller than the square.
    """
    height, width = _crop_room(clip, size)
    top = int(rng.integers(0, height, endpoint=True))
    left = int(rng.integers(0, width, endpoint=True))
    return clip[..., top : top + size, left : left + size]


def center_crop(clip: torch.Tensor, size: int) -> torch.Tensor:
    """Crops uint8 [T, 3, H, W] to the middle square: uint8 [T, 3, size, size].

    Raises:
        ValueError: a frame is smaller than the square.
    """
    _crop_room(clip, size)
    return functional.center_crop(clip, [size, size])


def mirror(clips: torch.Tensor, mirrored: Sequence[bool]) -> torch.Tensor:
    """Mirrors some of the clips, left to right, on the device where they are.

    Args:
        clips: uint8 [V, T, 3, H, W].
        mirrored: which ones; on the host, so that nothing waits for the device.

    Returns:
        uint8 [V, T, 3, H, W], contiguous.
    """
    result = torch.empty_like(clips, memory_format=torch.contiguous_format)
    for clip, target, is_mirrored in zip(clips, result, mirrored, strict=True):
        target.copy_(clip.flip(-1) if is_mirrored else clip)
    return result


def normalise(frames: torch.Tensor, mean: ChannelValues | None, std: ChannelValues | None) -> torch.Tensor:
    """Normalises pixels for the backbone, on their device.

    Args:
        frames: uint8 [..., 3, H, W].
        mean: of the three channels, in 0..1, best as a tensor on that device; if `mean` and `std` are None, pixels stay
            in 0..1, as in the released code.
        std: of the three channels, in 0..1.

    Returns:
        float32 [..., 3, H, W].

    Raises:
        ValueError: only one of `mean` and `std` is given.
    """
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std belong together, got mean {mean} and std {std}")
    pixels = frames.to(torch.float32, copy=True).div_(255)  # in place: three times as fast on a CPU
    if mean is None or std is None:
        return pixels
    return pixels.sub_(_per_channel(mean, pixels)).div_(_per_channel(std, pixels))


def _per_channel(values: ChannelValues, pixels: torch.Tensor) -> torch.Tensor:
    """Returns three numbers as float32 [3, 1, 1] on the device of `pixels`."""
    return torch.as_tensor(values, dtype=pixels.dtype, device=pixels.device).view(3, 1, 1)


def _channels_first(clip: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Returns a view of uint8 [T, H, W, 3] as [T, 3, H, W]; raises ValueError for another shape or type."""
    frames = torch.as_tensor(clip)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected a clip of uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    # Not made contiguous: torchvision resizes uint8 pixels fastest if the three channels are adjacent.
    return frames.permute(0, 3, 1, 2)


def _crop_room(clip: torch.Tensor, size: int) -> tuple[int, int]:
    """Returns how many pixels a square of `size` can move down and to the right in a clip [T, 3, H, W]."""
    height, width = clip.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"cannot cut {size} x {size} pixels out of frames of {height} x {width}")
    return height - size, width - size


def _check_sizes(short_side: int, size: int) -> None:
    """Raises UserError unless 1 <= size <= short_side."""
    if not 1 <= size <= short_side:
        raise UserError(
            f"The crop must have 1 to {short_side} pixels a side, as frames are resized to a shorter side of "
            f"{short_side}; found {size}: lower the crop size or raise the resize size."
        )
