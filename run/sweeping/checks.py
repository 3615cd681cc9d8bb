"""Checks the data of all runs of a sweep once, before the first one starts."""

from collections.abc import Iterable, Sequence

from run.data import RunData, effective_config, needed_splits
from run.sweeping.plan import SweepRun
from utils.errors import UserError
from utils.schema import Config


def check_data(runs: Sequence[SweepRun]) -> None:
    """Opens the videos of each data set once, and checks that the episodes of every run are possible.

    Raises:
        UserError: the data of a run is not valid; the message has one line per problem.
    """
    opened: set[tuple[str, ...]] = set()
    problems: dict[str, None] = {}
    for config in _different_data(effective_config(run.config) for run in runs):
        data, splits = config.DATA, needed_splits(config)
        videos = {(data.DATA_DIR, data.SPLIT_DIR, data.DATASET, str(data.SEQ_LEN), split) for split in splits}
        if videos <= opened:
            config = config.model_copy(update={"DATA": data.model_copy(update={"CHECK_VIDEOS": False})})
        opened |= videos
        try:
            RunData(config)
        except UserError as error:
            problems.update(dict.fromkeys(str(error).splitlines()))
    if problems:
        raise UserError("\n".join(problems))


def _different_data(configs: Iterable[Config]) -> list[Config]:
    """Returns one config for each combination of data and episodes; those that use the most splits come first."""
    different: dict[str, Config] = {}
    for config in configs:
        different.setdefault(f"{config.DATA!r} {config.TRAIN!r} {config.TEST!r}", config)
    return sorted(different.values(), key=lambda config: -len(needed_splits(config)))
