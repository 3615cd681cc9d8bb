"""Builds the data of a config: splits, samplers of episodes, and readers of clips."""

import hashlib
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import models
from episodes.checks import report_sequences, unreadable_videos
from episodes.dataset import ClipOptions, ClipReader, EpisodeClips, EpisodeDataset, episode_loader
from episodes.sampler import EpisodeSampler
from episodes.splits import CLASS_FILE, TOO_FEW_CLASSES, SplitIndex, load_splits
from models.sentences import ClassSentences, TextOptions
from run.feature_cache import READING_CODE, data_digest, files_digest, store_of
from utils import distributed
from utils.config import REPOSITORY
from utils.errors import UserError
from utils.files import cache_folder
from utils.schema import DATASETS, DEMO_DATASET, DEMO_DATASETS, Config
from utils.utils import package_versions

WITHOUT_LISTS = ("hmdb51", "ucf101")  # use all videos of their classes; the other benchmarks need --lists

logger = logging.getLogger(__name__)


class RunData:
    """The data of one run.

    Attributes:
        splits: train, val, test -> index, for the splits that the run uses.
        samplers: train, val, test -> episodes of training, validation and test.
        clip_options: settings that turn a video into a clip.
    """

    def __init__(self, config: Config) -> None:
        """Finds the videos of a config and checks them.

        Raises:
            UserError: lists, classes or videos are wrong; the message has one sentence per error.
        """
        self.config = config
        self.splits = load_splits_of(config, needed_splits(config))
        problems: list[str] = []
        self.samplers = build_samplers(config, self.splits, problems)
        indexes, length = list(self.splits.values()), config.DATA.SEQ_LEN
        if config.DATA.CHECK_VIDEOS:
            problems += distributed.from_main(
                lambda: unreadable_videos(indexes, length, config.DATA.NUM_WORKERS, check_record(indexes, length))
            )
        elif distributed.is_main():
            report_sequences(indexes)
        if problems:
            raise UserError("\n".join(problems))
        flip = next(iter(self.splits.values())).horizontal_flip if config.DATA.FLIP is None else config.DATA.FLIP
        self.clip_options = clip_options(config, flip)

    def training_episodes(self, episodes: range, device: torch.device) -> DataLoader[EpisodeClips]:
        """Returns a loader of training episodes, in order; workers read them ahead."""
        options = self.config.DATA
        dataset = EpisodeDataset(self.samplers["train"], self.clip_options, episodes, options.MAX_BAD_CLIPS)
        return episode_loader(dataset, options.NUM_WORKERS, device)

    def reader(self, keep_workers: bool = False) -> ClipReader:
        """Returns a reader of test clips; see `ClipReader` for `keep_workers`."""
        return ClipReader(self.clip_options, self.config.DATA.NUM_WORKERS, keep_workers)

    def prompts(self, split: str) -> tuple[dict[str, str], str]:
        """Returns class -> prompt of a split, and the source of the prompts for error messages."""
        index = self.splits[split]
        source = f"{CLASS_FILE}, {split} classes of {index.dataset}"
        return {entry.folder: entry.prompt for entry in index.classes}, source

    def log_splits(self) -> None:
        """Logs the size and the notes of each split."""
        for name, index in self.splits.items():
            logger.info("%s: %d classes, %d videos", name, len(index.classes), len(index))
            for note in index.notes:
                logger.warning("%s: %s", name, note)

    def digests(self) -> dict[str, str]:
        """Returns name -> digest of all data that affects training; a resumed run compares them."""
        used = {"train", self.config.TRAIN.VAL_SPLIT} if self.config.validates else {"train"}
        digests = {f"the {name} split": self.splits[name].digest() for name in sorted(used & self.splits.keys())}
        digests["whether clips are mirrored"] = str(self.clip_options.flip)
        model = self.config.MODEL
        if isinstance(model, TextOptions) and model.TEXT_FILE:
            names = [prompt for name in sorted(used & self.splits.keys()) for prompt in self.splits[name].prompts]
            sentences = json.dumps(ClassSentences(model).of(names))
            digests["the sentences in MODEL.TEXT_FILE"] = hashlib.sha256(sentences.encode()).hexdigest()
        return digests


def clip_options(config: Config, flip: bool = False) -> ClipOptions:
    """Returns the settings that turn a video into a clip; `flip` matters only in training."""
    data = config.DATA
    return ClipOptions(data.SEQ_LEN, data.SAMPLING, data.IMG_SIZE, data.SHORT_SIDE, flip)


def check_record(indexes: Sequence[SplitIndex], clip_length: int) -> Path | None:
    """Returns the file that records a check of these videos, keyed by their paths, sizes and modification times.

    Returns None if one of them is a folder of images, since looking at every image takes as long as the check.
    """
    outside_stores = (index.root / path for index in indexes for path in index.video_paths if not store_of(path))
    if any(map(os.path.isdir, outside_stores)):
        return None
    content = [clip_length, [data_digest(index) for index in indexes], files_digest(READING_CODE), package_versions()]
    return cache_folder() / f"checked_{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.json"


def effective_config(config: Config) -> Config:
    """Returns the config with training disabled if its method has nothing to train."""
    if models.method_class(config.MODEL.NAME).trains:
        return config
    return config.model_copy(update={"TRAIN": config.TRAIN.model_copy(update={"TRAIN_EPISODES": 0})})


def needed_splits(config: Config) -> list[str]:
    """Returns the splits that a run reads."""
    validates_on = config.TRAIN.VAL_SPLIT if config.validates else None
    uses = {"train": config.trains, "val": validates_on == "val", "test": config.tests or validates_on == "test"}
    return [split for split, used in uses.items() if used]


def split_directory(config: Config) -> Path:
    """Returns the folder of the split: DATA.SPLIT_DIR, or the folder of DATA.DATASET."""
    if config.DATA.SPLIT_DIR:
        return Path(config.DATA.SPLIT_DIR)
    if config.DATA.DATASET in DEMO_DATASETS:
        return Path("data") / config.DATA.DATASET / "splits"  # rendered with the videos, not part of the repository
    return REPOSITORY / "splits" / DATASETS[config.DATA.DATASET]


def shipped_split_directory(config: Config) -> Path | None:
    """Returns the shipped folder of a benchmark; it provides the class list if DATA.SPLIT_DIR contains only lists."""
    name = config.DATA.DATASET
    return REPOSITORY / "splits" / DATASETS[name] if name in DATASETS else None


def prepare_command(config: Config) -> str:
    """Returns the command that prepares the data of a config."""
    name, folder = config.DATA.DATASET, Path(config.DATA.DATA_DIR)
    if name in DEMO_DATASETS:
        which = "" if name == DEMO_DATASET else f" --set {DEMO_DATASETS[name]}"
        return f"python run/prepare.py demo{which}"
    known = name in DATASETS
    words = [f"python run/prepare.py {name if known else 'custom'} --videos DIR"]
    if known and name not in WITHOUT_LISTS:
        words.append("--lists DIR")
    if folder.name == "packed" and folder.parent != Path("data") / name:
        words.append(f"--out {shlex.quote(str(folder.parent))}")
    elif not known and folder.name != "packed":
        words.append("--out DIR")
    return " ".join(words)


def load_splits_of(config: Config, needed: Sequence[str] | None) -> dict[str, SplitIndex]:
    """Returns the needed splits of a config's data, or with None all splits with classes; see `load_splits`."""
    return load_splits(
        split_directory(config),
        Path(config.DATA.DATA_DIR),
        needed,
        shipped_split_directory(config),
        prepare_command(config),
    )


def build_samplers(config: Config, splits: Mapping[str, SplitIndex], problems: list[str]) -> dict[str, EpisodeSampler]:
    """Returns the episode samplers for training, validation and test; appends impossible episodes to `problems`."""
    train, (way, shot, seed), queries = config.TRAIN, config.test_task, config.TEST.QUERY_PER_CLASS
    tasks = {}
    if config.tests:
        tasks["test"] = (splits["test"], way, shot, queries, seed)
    if config.trains:
        tasks["train"] = (splits["train"], train.WAY, train.SHOT, train.QUERY_PER_CLASS, config.MODEL.SEED)
    if config.validates:
        index = splits[train.VAL_SPLIT]
        val_way = train.VAL_WAY or max(2, min(way, len(index.classes)))
        tasks["val"] = (index, val_way, shot, queries, seed)
    samplers = {}
    for name, arguments in tasks.items():
        try:
            samplers[name] = EpisodeSampler(*arguments)
        except UserError as error:
            problems.append(str(error))
    return samplers


def impossible_episodes(config: Config, splits: Mapping[str, SplitIndex]) -> list[str]:
    """Returns a sentence for each class or split that is too small for the episodes of a config."""
    config = effective_config(config)
    problems = [
        f"{split} has no classes, which the config needs; {TOO_FEW_CLASSES[split]}"
        for split in needed_splits(config)
        if split not in splits
    ]
    if not problems:
        build_samplers(config, splits, problems)
    return [line for problem in problems for line in problem.splitlines()]
