"""How a result names its method and the settings that it was not expected to have."""

import json
from typing import Any

from utils.config import REPOSITORY, config_from_dict, config_to_dict, leaves, load_config
from utils.config_changes import LENGTH
from utils.errors import UserError
from utils.schema import Config, known_keys

MATCHER = "MATCHER"
MOST_SHOWN = 6
# Sections of settings that change a number, and the keys in them that a result line names anyway or that change
# rounding or the log alone.
OF_THE_TEST = (
    "MODEL.",
    "USE_AMP",
    "DATA.SEQ_LEN",
    "DATA.SAMPLING",
    "DATA.IMG_SIZE",
    "DATA.SHORT_SIDE",
    "DATA.IMG_NORM",
)
OF_THE_TRAINING = (
    "SOLVER.", "DATA.FLIP", "TRAIN.WAY", "TRAIN.SHOT", "TRAIN.QUERY_PER_CLASS", "TRAIN.TRAIN_EPISODES",
    "TRAIN.TASKS_PER_BATCH", "TRAIN.CLIP_GRAD", "TRAIN.PROTOCOL", "TRAIN.CACHED_FEATURES",
)  # fmt: skip
NAMED_ANYWAY = ("MODEL.NAME", "MODEL.BACKBONE", "MODEL.SEED", "MODEL.COMPILE", "MODEL.ACTIVATION_CHECKPOINTING")


def method_label(config: Config) -> str:
    """The method, with its matcher where that is not the method's own: `otam`, `otam[mean]`."""
    known = known_keys(Config, type(config.MODEL))
    others = [value for key, value in _matchers(config).items() if value != known[key].default]
    return config.MODEL.NAME + "".join(f"[{matcher}]" for matcher in others)


def differs_from_default(config: Config, trained_with: dict[str, Any] | None) -> list[str]:
    """Settings of a result that are not those of its method's default config, as `KEY=VALUE`; `DEBUG` comes first.

    That config is `configs/<method>/<dataset>.yaml`; for a data set without one, the defaults of the method's options.

    Args:
        config: of the test.
        trained_with: the config that the tested checkpoint was trained with, if it is known.
    """
    now = dict(leaves(config_to_dict(config)))
    default, has_training = _default_config(config)
    keys = [key for key in now if key.startswith(OF_THE_TEST)]
    found = [(key, now[key]) for key in keys if key in default and now[key] != default[key]]
    if has_training and trained_with is not None and not config.DEBUG:
        found += _training_differences(dict(leaves(trained_with)), now, default)
    found.sort(key=lambda item: not isinstance(item[1], bool))  # switches first: an ablation is one
    shown = [f"{key}={_text(value)}" for key, value in found if key not in NAMED_ANYWAY and not _is_matcher(key)]
    return ["DEBUG", *shown] if config.DEBUG else shown


def shown_differences(differences: list[str]) -> str:
    """The end of a result line: the first differences, and how many more there are."""
    more = len(differences) - MOST_SHOWN
    shown = ["DEBUG RUN, NOT A RESULT" if name == "DEBUG" else name for name in differences[:MOST_SHOWN]]
    return "".join(f", {name}" for name in shown) + (f", and {more} more" if more > 0 else "")


def _training_differences(
    trained: dict[str, Any], now: dict[str, Any], default: dict[str, Any]
) -> list[tuple[str, Any]]:
    """Keys and values of the training; with nothing trained, the number of episodes alone."""
    keys = [key for key in trained if key.startswith(OF_THE_TRAINING) and key in default]
    if not trained.get(LENGTH):
        keys = [key for key in keys if key == LENGTH]
    tested = {key: now[f"TEST.{key.partition('.')[2]}"] or now[key] for key in ("TRAIN.WAY", "TRAIN.SHOT")}
    return [(key, trained[key]) for key in keys if trained[key] not in (default[key], tested.get(key))]


def _default_config(config: Config) -> tuple[dict[str, Any], bool]:
    """Every value of the default config by dotted key, and whether it says how to train.

    It has the matcher of `config`, on which other defaults depend; the method's label names the matcher.
    """
    matchers = _matchers(config)
    path = REPOSITORY / "configs" / config.MODEL.NAME / f"{config.DATA.DATASET}.yaml"
    if path.is_file():
        overrides = [f"{key}={value}" for key, value in matchers.items()]
        return dict(leaves(config_to_dict(load_config(path, overrides, warn=lambda _: None).config))), True
    data: dict[str, Any] = {"MODEL.NAME": config.MODEL.NAME, "USE_AMP": False, **matchers}
    try:
        default = config_from_dict(data)
    except UserError:  # a method whose options have no defaults
        return {}, False
    values = dict(leaves(config_to_dict(default)))
    return {key: value for key, value in values.items() if key.startswith(("MODEL.", "USE_AMP"))}, False


def _matchers(config: Config) -> dict[str, Any]:
    """The keys of MODEL that name a matcher, with their values."""
    return {key: value for key, value in leaves(config_to_dict(config)) if _is_matcher(key)}


def _is_matcher(key: str) -> bool:
    return key.startswith("MODEL.") and key.rpartition(".")[2] == MATCHER


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
