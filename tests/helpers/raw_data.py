"""Miniature raw downloads: rendered videos with the file names and folders of the benchmarks."""

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import yaml

CODECS = {".avi": "mpeg4", ".mp4": "libx264", ".webm": "libvpx-vp9", ".mkv": "libx264"}

# Video names as they occur in HMDB51.
HMDB_NAMES = (
    "(Rad)Schlag_die_Bank!_{}_f_cm_np1_le_med_0", "Golf_Swing_#6Iron_{}_f_cm_np1_fr_med_1",
    "Geena_&_Radschl_ge___;-)_{}_f_cm_np1_fr_med_2",
)  # fmt: skip
HMDB_CLASSES = {"train": ["brush_hair", "clap", "climb_stairs"], "val": ["cartwheel", "golf"], "test": ["eat", "kick"]}
UCF_CLASSES = {"train": ["ApplyEyeMakeup", "HandstandPushups"], "val": ["BasketballDunk"], "test": ["YoYo"]}
KINETICS_CLASSES = {
    "train": ["water_skiing", "massaging_person's_head"],
    "val": ["baking_cookies"],
    "test": ["ski_jumping", "unboxing"],
}
SSV2_PROMPTS = {
    "train": ["Closing [something]", "Moving [part] of [something]"],
    "val": ["Pouring [something] into [something]"],
    "test": ["Plugging [something] into [something]"],
}


def render(path: Path, frames: int = 14, size: tuple[int, int] = (36, 48)) -> Path:
    """Writes a small video, different for each name, with the usual codec of the suffix. `size` is (height, width)."""
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    background = rng.integers(0, 128, size=(*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={".mkv": "matroska"}.get(path.suffix, path.suffix[1:])) as container:
        stream = container.add_stream(CODECS[path.suffix], rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if path.suffix == ".webm":
            stream.codec_context.options = {"deadline": "realtime", "cpu-used": "8"}
        for number in range(frames):
            image = background.copy()
            image[8:20, 2 * number : 2 * number + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(buffer.getvalue())
    return path


def write_class_file(
    folder: Path, dataset: str, classes: dict[str, list[str]], videos: int, listed: bool, prompts: Sequence[str] = ()
) -> Path:
    """Writes a class file like the shipped ones; returns its folder."""
    content: dict[str, object] = {"dataset": dataset, "videos": "listed" if listed else "all", "horizontal_flip": True}
    texts = iter(prompts)
    for split, names in classes.items():
        content[split] = [
            {"folder": name, "prompt": next(texts, name.replace("_", " ")), "videos": videos} for name in names
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder


def hmdb(root: Path) -> tuple[Path, Path]:
    """Returns (raw videos, split folder) of a miniature HMDB51: 7 classes of 3 videos."""
    for names in HMDB_CLASSES.values():
        for name in names:
            for pattern in HMDB_NAMES:
                render(root / "raw" / name / f"{pattern.format(name)}.avi")
    return root / "raw", write_class_file(root / "split", "hmdb51", HMDB_CLASSES, 3, listed=False)


def write_lists(folder: Path, lines: dict[str, list[str]], pattern: str = "{}list03.txt", end: str = "\n") -> Path:
    """Writes the three lists; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in lines.items():
        text = "".join(f"{name}{end}" for name in names)
        (folder / pattern.format(split)).write_bytes(text.encode())
    return folder


def all_files(folder: Path) -> dict[str, bytes]:
    """Returns relative path -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ucf(root: Path) -> tuple[Path, Path]:
    """Returns (raw videos, split folder) of a miniature UCF101, below the folder of its archive."""
    for names in UCF_CLASSES.values():
        for name in names:
            for clip in (1, 2):
                render(root / "raw" / "UCF-101" / name / f"v_{name}_g01_c{clip:02d}.avi")
    return root / "raw", write_class_file(root / "split", "ucf101", UCF_CLASSES, 2, listed=False)


def youtube_id(name: str, number: int) -> str:
    """Returns 11 characters, some of them awkward: `-_12_4567aB`."""
    return f"-_{zlib.crc32(name.encode()) % 90 + 10}_{number}567aB"


def kinetics(root: Path) -> tuple[Path, Path, Path]:
    """Returns (raw videos, split folder, lists) of a miniature Kinetics with mixed spaces, underscores and times."""
    lines: dict[str, list[str]] = {}
    for split, names in KINETICS_CLASSES.items():
        for name in names:
            spaced = name.replace("_", " ")
            files = [
                root / "raw" / "train" / spaced / f"{youtube_id(name, 0)}_000010_000020.mp4",
                root / "raw" / "val_256" / name / f"{youtube_id(name, 1)}.mkv",
            ]
            for path in files:
                render(path)
            lines.setdefault(split, []).extend(f"{spaced}/{youtube_id(name, n)}_000010_000020" for n in (0, 1))
    split_dir = write_class_file(root / "split", "kinetics", KINETICS_CLASSES, 2, listed=True)
    return root / "raw", split_dir, write_lists(root / "lists", lines)


def ssv2(root: Path, first: int = 0) -> tuple[Path, Path, Path]:
    """Returns (raw videos, split folder, lists) of a miniature Something-Something V2 with its annotations.

    The classes are numbered within their split, in the class file from `first` on for train and val.
    """
    classes: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {}
    annotated: dict[str, list[dict[str, object]]] = {"train": [], "validation": []}
    number = 100
    for split, prompts in SSV2_PROMPTS.items():
        start = 0 if split == "test" else first
        classes[split] = [f"{split}{start + position}" for position in range(len(prompts))]
        for position, prompt in enumerate(prompts):
            for _ in range(2):
                number += 37
                render(root / "raw" / "20bn-something-something-v2" / f"{number}.webm")
                lines.setdefault(split, []).append(f"{split}{position}/{number}")
                label = prompt.replace("[", "").replace("]", "").replace("something", "a cup")
                entry = {"id": str(number), "label": label, "template": prompt, "placeholders": ["a cup"]}
                annotated["validation" if split == "val" else "train"].append(entry)
    prompts_in_order = [prompt for prompts in SSV2_PROMPTS.values() for prompt in prompts]
    for part, entries in annotated.items():
        (root / "raw" / f"something-something-v2-{part}.json").write_text(json.dumps(entries), encoding="utf-8")
    labels = {prompt.replace("[", "").replace("]", ""): str(i) for i, prompt in enumerate(prompts_in_order)}
    (root / "raw" / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    split_dir = write_class_file(root / "split", "ssv2", classes, 2, True, prompts_in_order)
    return root / "raw", split_dir, write_lists(root / "lists", lines, "{}_few_shot.txt")


SMALL_EPISODES = ("TRAIN.WAY=2", "TRAIN.SHOT=1", "TRAIN.QUERY_PER_CLASS=1")
