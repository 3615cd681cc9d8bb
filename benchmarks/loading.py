"""Time to load one training episode from a packed store, compared with a literal loader: python benchmarks/loading.py

One process and one thread read 5-way 5-shot episodes with 4 queries per class, 45 clips of 8 JPEG frames of 256 x 256
pixels, and crop them to 224 x 224 pixels. Two sides take turns:

framework   `EpisodeDataset` on a packed store, to one uint8 tensor, as in a DataLoader worker; mirroring, reordering
            and normalisation remain for the device
literal     JPEG files opened one by one with PIL, which resizes, crops and flips each frame; ToTensor, normalise, stack

Then the work of a worker after decoding, for three ways to divide cropping, mirroring and reordering between worker and
device, and the framework alone on stores of 1,000 and 77,500 videos with simpler frames.

All frames are generated in a temporary folder, which is removed at the end. The times include no disk access, since
the files were just written and are in the page cache.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torchvision
import yaml
from PIL import Image
from torchvision.transforms import functional

from benchmarks.machine import machine
from episodes.dataset import ClipOptions, EpisodeDataset, VideoDataset
from episodes.packed import write_packed
from episodes.sampler import EpisodeSampler, EpisodeSpec
from episodes.splits import SplitIndex, load_splits
from run.command import run_command
from videotransforms.video_transforms import mirror, normalise
from videotransforms.volume_transforms import spread_indices

WAY, SHOT, QUERY_PER_CLASS = 5, 5, 4
FRAMES, SIDE, SIZE = 8, 256, 224
WIDE = 340  # pixels, as in most real videos
JPEG_QUALITY = 80
BLOBS = 12  # JPEG files of about 8 KB, like those of Something-Something
BLOBS_OF_LARGE_STORE = 3  # as small as possible, to save disk space; the two stores are compared with each other
CLASSES = 10
VIDEOS_PER_CLASS = 20
STORE_SIZES = (1_000, 77_500)
SEED = 6
OPTIONS = ClipOptions(FRAMES, "linspace", SIZE, SIDE, flip=True)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LARGEST_DIFFERENCE = 1e-5  # of normalised pixels; both decode with the same library, and no frame is resized


# --- the data ---------------------------------------------------------------------------------------------


def picture(rng: np.random.Generator, blobs: int) -> Image.Image:
    """Returns an image of 256 x 256 pixels with `blobs` x `blobs` patches of colour that blend into one another."""
    coarse = rng.integers(0, 256, (blobs, blobs, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_frames(folder: Path, number: int, blobs: int) -> list[tuple[str, list[Path]]]:
    """Writes JPEG folders `class/video` of different frames; returns the name and files of each video."""
    rng = np.random.default_rng(number)
    videos = []
    for video in range(number):
        name = f"{video % CLASSES:02d}/{video:06d}"
        (folder / name).mkdir(parents=True)
        files = [folder / name / f"{frame:05d}.jpg" for frame in range(1, FRAMES + 1)]
        for file in files:
            picture(rng, blobs).save(file, quality=JPEG_QUALITY)
        videos.append((name, files))
    return videos


def pack(folder: Path, videos: Iterable[tuple[str, Sequence[Path]]], number: int) -> SplitIndex:
    """Packs all videos; returns the training split of the store."""
    folder.mkdir(parents=True)
    write_packed(folder / "train.sqlite", videos)
    classes = [
        {"folder": f"{c:02d}", "prompt": f"action {c}", "videos": len(range(c, number, CLASSES))}
        for c in range(CLASSES)
    ]
    content = {"dataset": "benchmark", "videos": "all", "horizontal_flip": True, "val": [], "test": []}
    content["train"] = classes
    (folder / "classes.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_splits(folder, folder, ["train"])["train"]


# --- the literal side -------------------------------------------------------------------------------------


def literal_clip(folder: Path, box: tuple[int, int, int, int] | None, mirrored: bool) -> torch.Tensor:
    """Returns float32 [T, 3, H, W], computed frame by frame; `box` None crops the centre."""
    files = sorted(os.listdir(folder))
    frames = []
    for index in spread_indices(len(files), FRAMES):
        image = Image.open(folder / files[index]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        image = functional.center_crop(image, [SIZE, SIZE]) if box is None else image.crop(box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        frames.append(functional.normalize(functional.to_tensor(image), MEAN, STD))
    return torch.stack(frames)


def literal_episode(root: Path, index: SplitIndex, spec: EpisodeSpec, rng: np.random.Generator) -> torch.Tensor:
    """Returns the clips of an episode, float32 [N*K + Q, T, 3, H, W]."""
    clips = []
    for video in (*spec.support.ravel(), *spec.query):
        left, top = (int(value) for value in rng.integers(0, SIDE - SIZE, 2, endpoint=True))
        box = (left, top, left + SIZE, top + SIZE)
        clips.append(literal_clip(root / index.video_names[video], box, mirrored=bool(rng.random() < 0.5)))
    return torch.stack(clips)


def largest_difference(root: Path, index: SplitIndex) -> float:
    """Returns the largest difference between the two sides on the test clips of a few videos, in normalised pixels."""
    clips = VideoDataset(index, OPTIONS, range(5))
    ours = torch.stack([normalise(clips[video], MEAN, STD) for video in range(5)])
    literal = torch.stack([literal_clip(root / name, None, False) for name in index.video_names[:5]])
    return float((ours - literal).abs().max())


# --- the times --------------------------------------------------------------------------------------------


def milliseconds(make: Callable[[int], object], episode: int) -> float:
    before = time.process_time()
    make(episode)
    return 1000 * (time.process_time() - before)


def describe(times: Sequence[float]) -> str:
    spread = f"median of {len(times)}, {min(times):.1f} to {max(times):.1f}"
    return f"{statistics.median(times):7.1f} ms per episode ({spread})"


def dataset_of(index: SplitIndex, episodes: int) -> EpisodeDataset:
    return EpisodeDataset(EpisodeSampler(index, WAY, SHOT, QUERY_PER_CLASS, SEED), OPTIONS, range(episodes))


def compare(folder: Path, episodes: int) -> tuple[bool, dict[str, float]]:
    """Times both sides in turn on the same videos; returns whether they agree, and the median milliseconds of each."""
    number = CLASSES * VIDEOS_PER_CLASS
    videos = write_frames(folder / "frames", number, BLOBS)
    index = pack(folder / "packed", videos, number)
    dataset = dataset_of(index, episodes + 1)
    rng = np.random.default_rng(SEED)
    size = (folder / "packed" / "train.sqlite").stat().st_size

    def literal(episode: int) -> torch.Tensor:
        return literal_episode(folder / "frames", index, dataset.sampler.episode(episode), rng)

    times: dict[str, list[float]] = {"framework": [], "literal": []}
    megabytes = {"framework": dataset[0].clips.nbytes / 1e6, "literal": literal(0).nbytes / 1e6}
    for episode in range(1, episodes + 1):
        times["framework"].append(milliseconds(dataset.__getitem__, episode))
        times["literal"].append(milliseconds(literal, episode))
    print(f"{number} videos of {FRAMES} frames, {size / number / FRAMES / 1000:.1f} KB per frame in the store")
    for side, values in times.items():
        print(f"{side:9}  {describe(values)}, {megabytes[side]:5.1f} MB")
    medians = {side: statistics.median(values) for side, values in times.items()}
    ratio = medians["literal"] / medians["framework"]
    print(f"ratio      {ratio:7.2f} in time, {megabytes['literal'] / megabytes['framework']:.2f} in memory")
    difference = largest_difference(folder / "frames", index)
    print(f"largest difference of a normalised pixel on 5 test clips: {difference:.1e} (allowed {LARGEST_DIFFERENCE})")
    return difference <= LARGEST_DIFFERENCE, medians


def time_shares(repeats: int) -> float:
    """Times the work after decoding an episode, for three ways to share it between worker and device.

    The last two lines are the device's part in the framework, if this CPU is the device.

    Returns:
        the median milliseconds of the device's part.
    """
    clips = WAY * (SHOT + QUERY_PER_CLASS)
    frames = np.random.default_rng(SEED).integers(0, 256, (FRAMES, SIDE, WIDE, 3), dtype=np.uint8)
    cut = frames[:, 10 : 10 + SIZE, 20 : 20 + SIZE]
    reordered = torch.empty((clips, FRAMES, 3, SIZE, SIZE), dtype=torch.uint8)
    as_decoded = torch.empty((clips, FRAMES, SIZE, SIZE, 3), dtype=torch.uint8)
    whole = torch.empty((clips, *frames.shape), dtype=torch.uint8)

    def augment_in_worker(_: int) -> None:
        for number, clip in enumerate(reordered.numpy()):
            np.copyto(clip, (cut[:, :, ::-1] if number % 2 else cut).transpose(0, 3, 1, 2))

    def crop_in_worker(_: int) -> None:
        for clip in as_decoded:
            clip.copy_(torch.from_numpy(cut))

    def send_whole_frames(_: int) -> None:
        for clip in whole:
            clip.copy_(torch.from_numpy(frames))

    def augment_on_device(_: int) -> None:
        mirror(as_decoded.movedim(-1, 2), [number % 2 == 1 for number in range(clips)])

    def normalise_on_device(_: int) -> None:
        normalise(reordered, MEAN, STD)

    ways = {
        "a worker cuts, mirrors and reorders": (augment_in_worker, reordered),
        "a worker cuts (ours)": (crop_in_worker, as_decoded),
        "a worker sends whole frames": (send_whole_frames, whole),
        "the device mirrors and reorders (ours)": (augment_on_device, None),
        "the device normalises (ours)": (normalise_on_device, None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, (way, _) in ways.items():
            times[name].append(milliseconds(way, repeat))
    print(f"after decoding {clips} clips of {FRAMES} frames of {WIDE} x {SIDE} pixels:")
    for name, (_, sent) in ways.items():
        copied = "" if sent is None else f", {sent.nbytes / 1e6:.1f} MB to the device"
        print(f"  {name:38} {describe(times[name][1:])}{copied}")  # the first run also allocates memory
    return sum(statistics.median(times[name][1:]) for name, (_, sent) in ways.items() if sent is None)


def time_large_store(folder: Path, number: int, episodes: int) -> None:
    """Times the framework on a store of `number` videos that share the frames of a few videos."""
    originals = [files for _, files in write_frames(folder / "frames", CLASSES, BLOBS_OF_LARGE_STORE)]
    names = ((f"{video % CLASSES:02d}/{video:06d}", originals[video % len(originals)]) for video in range(number))
    before = time.perf_counter()
    index = pack(folder / "packed", names, number)
    written = time.perf_counter() - before
    before = time.perf_counter()
    load_splits(folder / "packed", folder / "packed", ["train"])
    loaded = time.perf_counter() - before
    dataset = dataset_of(index, episodes + 1)
    _ = dataset[0]
    times = [milliseconds(dataset.__getitem__, episode) for episode in range(1, episodes + 1)]
    size = (folder / "packed" / "train.sqlite").stat().st_size
    print(
        f"{number:6,} videos  {describe(times)}; store of {size / 1e9:.2f} GB, written in {written:.1f} s, "
        f"its split listed in {loaded:.2f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20, help="timed on each side (default: %(default)s)")
    parser.add_argument("--stores", nargs="*", type=int, default=STORE_SIZES, help="videos of the large stores")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (needs 3 GB)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python {' '.join(sys.argv)}")
    print(f"{machine(uses_gpu=False)}; torchvision {torchvision.__version__}, Pillow {Image.__version__}")
    print(
        f"{WAY}-way {SHOT}-shot, {QUERY_PER_CLASS} queries per class, {FRAMES} frames, {SIZE} x {SIZE} pixels; "
        "processor time of one thread"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        agrees, medians = compare(Path(temporary) / "compare", arguments.episodes)
        whole = medians["framework"] + time_shares(arguments.episodes)
        print(f"with what is left to the device, if that is this CPU: {whole:.1f} ms, {medians['literal'] / whole:.2f}")
        for number in arguments.stores:
            with tempfile.TemporaryDirectory(dir=temporary) as folder:
                time_large_store(Path(folder), number, arguments.episodes)
    return 0 if agrees else 1  # times are meaningless if the pixels differ


if __name__ == "__main__":
    run_command(main)
