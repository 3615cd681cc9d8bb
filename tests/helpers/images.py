"""Frames of image folders, read as a run reads them."""

from pathlib import Path

import numpy as np

from episodes.video import read_frames

SIDE = 8


def read(folder: Path) -> np.ndarray:
    return read_frames(folder, np.arange)
