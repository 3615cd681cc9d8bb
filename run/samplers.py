"""The episodes that a config makes of its splits, in one place for the run and for a look at the data before it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import models
from episodes.sampler import EpisodeSampler
from episodes.splits import TOO_FEW_CLASSES, SplitIndex, load_splits
from utils.config import prepare_command, shipped_split_directory, split_directory
from utils.errors import UserError
from utils.schema import Config


def as_run(config: Config) -> Config:
    """Returns the config without training where its method has nothing to train."""
    if models.method_class(config.MODEL.NAME).trains:
        return config
    return config.model_copy(update={"TRAIN": config.TRAIN.model_copy(update={"TRAIN_EPISODES": 0})})


def needed_splits(config: Config) -> list[str]:
    """Returns which of train, val and test a run reads."""
    uses = {"train": config.trains, "val": config.validates and config.TRAIN.VAL_SPLIT == "val", "test": True}
    return [split for split, used in uses.items() if used]


def load_splits_of(config: Config, needed: Sequence[str] | None) -> dict[str, SplitIndex]:
    """Returns the needed splits of a config's data, as `load_splits`; None needs all that have classes."""
    return load_splits(
        split_directory(config),
        Path(config.DATA.DATA_DIR),
        needed,
        shipped_split_directory(config),
        prepare_command(config),
    )


def build_samplers(config: Config, splits: Mapping[str, SplitIndex], problems: list[str]) -> dict[str, EpisodeSampler]:
    """Returns the episodes of training, validation and test; a sentence on each impossible kind joins `problems`."""
    train, test, seed = config.TRAIN, config.TEST, config.MODEL.SEED
    test_seed = seed if test.SEED is None else test.SEED
    way, as_in_test = test.WAY or train.WAY, (test.SHOT or train.SHOT, test.QUERY_PER_CLASS, test_seed)
    wanted = {"test": (splits["test"], way, *as_in_test)}
    if config.trains:
        wanted["train"] = (splits["train"], train.WAY, train.SHOT, train.QUERY_PER_CLASS, seed)
    if config.validates:
        index = splits[train.VAL_SPLIT]
        val_way = train.VAL_WAY or max(2, min(way, len(index.classes)))
        wanted["val"] = (index, val_way, *as_in_test)
    samplers = {}
    for name, arguments in wanted.items():
        try:
            samplers[name] = EpisodeSampler(*arguments)
        except UserError as error:
            problems.append(str(error))
    return samplers


def impossible_episodes(config: Config, splits: Mapping[str, SplitIndex]) -> list[str]:
    """Returns a sentence for each class or split that is too small for the episodes of a config."""
    config = as_run(config)
    problems = [
        f"{split} has no classes, which the config needs; {TOO_FEW_CLASSES[split]}"
        for split in needed_splits(config)
        if split not in splits
    ]
    if not problems:
        build_samplers(config, splits, problems)
    return [line for problem in problems for line in problem.splitlines()]
