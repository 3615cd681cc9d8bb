"""Reads published numbers from the header of a config.

    # Published by the authors, 5-way 1 / 3 / 5 shot (not measured by us):
    #   RN50      77.4 / 82.6 / 84.5
    #   ViT-B/16 MODEL.COMBINE=true  78.2 / - / 88.6   where the numbers come from

A line applies to its backbone, by default that of the config, and its settings, on the data set of the config.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from utils.config import config_to_dict, leaves, load_config
from utils.schema import Config
from utils.yaml_text import parse_yaml

HEAD = re.compile(r"^# Published.*?, 5-way (?:(?P<shots>[\d/ ]+) shot )?\(not measured by us.*\):$")
LINE = re.compile(
    r"^#   (?P<backbone>(?!-|\d)[^\s=]+ +)?(?P<settings>(?:[A-Z][A-Z0-9_.]*=\S+ +)*)"
    r"(?P<numbers>(?:\d+\.\d+|-)(?: / (?:\d+\.\d+|-))*)(?:$|  +(?P<note>.*))"
)
WAY = 5
# Keys of MODEL that do not change the method. CLIP-FSAR's numbers for five shots were measured with the last one.
NEUTRAL_KEYS = ("MODEL.BACKBONE", "MODEL.SEED", "MODEL.COMPILE", "MODEL.ACTIVATION_CHECKPOINTING", "MODEL.MERGE_BEFORE")


@dataclass(frozen=True)
class Published:
    """A published accuracy in percent, not measured by this project, and its source."""

    accuracy: float
    note: str


def published(file: Path, config: Config) -> Published | None:
    """Returns the published number of a run, or None if its config has none or the run changes the method or the data.

    Args:
        file: the experiment file of the run.
        config: config of the run.
    """
    own = _own_config(file)
    if config.DATA.DATASET != own.DATA.DATASET:
        return None
    way, shot, _ = config.test_task
    now, before = (dict(leaves(config_to_dict(c))) for c in (config, own))
    changed = {key for key in now if key.startswith("MODEL.") and now[key] != before.get(key)} - set(NEUTRAL_KEYS)
    best, most = None, -1
    for shots, line in lines_of(file):
        settings = dict(word.split("=", 1) for word in line["settings"].split())
        number = dict(zip(shots or [shot], line["numbers"].split(" / "), strict=False)).get(shot, "-")
        fits = way == WAY and (line["backbone"].strip() or own.MODEL.BACKBONE) == config.MODEL.BACKBONE
        fits = fits and all(now.get(key) == parse_yaml(value, key) for key, value in settings.items())
        if fits and changed <= settings.keys() and number != "-" and len(settings) > most:
            best, most = Published(float(number), line["note"]), len(settings)  # the most specific line wins
    return best


@functools.cache
def _own_config(file: Path) -> Config:
    """Returns the config of an experiment file without overrides."""
    return load_config(file, warn=lambda _: None).config


@functools.cache
def lines_of(file: Path) -> list[tuple[list[int], dict[str, str]]]:
    """Returns the lines of published numbers in a header: the shots of their numbers (empty: all), and their parts."""
    lines: list[tuple[list[int], dict[str, str]]] = []
    shots: list[int] | None = None
    for text in file.read_text(encoding="utf-8").splitlines():
        if head := HEAD.match(text):
            shots = [int(number) for number in re.findall(r"\d+", head["shots"] or "")]
        elif shots is not None and (line := LINE.match(text)):
            lines.append((shots, {name: part or "" for name, part in line.groupdict().items()}))
        else:
            shots = None
    return lines
