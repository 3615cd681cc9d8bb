"""Loading a config: schema defaults < configs/base.yaml < experiment file < KEY=VALUE on the command line.

    loaded = load_config("configs/clipspm/demo.yaml", ["TRAIN.SHOT=5", "MODEL.HSMR.ENABLED=false"])
    loaded.config.TRAIN.SHOT            # 5
    loaded.origins["TRAIN.SHOT"]        # 'command line'

Everything that is wrong with a config is reported together, one line a problem, before a run begins.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from utils.config_messages import (
    COMMAND_LINE,
    expected_type,
    explain,
    is_section,
    join_words,
    known_keys,
    place,
    show_key,
    show_value,
    suggest,
)
from utils.config_yaml import parse_yaml, read_yaml_file, yaml_lines
from utils.errors import UserError
from utils.jobs import write_whole
from utils.legacy_config import LEGACY_KEYS, LEGACY_VALUES, PRESET_HINT
from utils.schema import DATASETS, DEMO_DATASET, Config, ModelOptions

REPOSITORY = Path(__file__).resolve().parent.parent
BASE_NAME = "configs/base.yaml"
DEFAULT = "default"

# A resumed run may differ in these (beginnings of) keys without becoming another experiment.
MAY_CHANGE_ON_RESUME = (
    "INFO", "TEST.", "CHECKPOINT.", "DEVICE.", "DATA.DATA_DIR", "DATA.SPLIT_DIR", "DATA.NUM_WORKERS",
    "DATA.CHECK_VIDEOS", "DATA.MAX_BAD_CLIPS", "TRAIN.PRINT_FREQ", "TRAIN.CHUNK", "MODEL.ACTIVATION_CHECKPOINTING",
    "MODEL.COMPILE",
)  # fmt: skip
# Of these, what a validation asks: as long as one is to come, its accuracy is compared with those before.
VALIDATION_TASK = ("TEST.WAY", "TEST.SHOT", "TEST.QUERY_PER_CLASS", "TEST.SEED", "TEST.PROTOCOL")

# Benchmarks that are all videos of their classes; of the others, lists name the videos.
WITHOUT_LISTS = ("hmdb51", "ucf101")

LENGTH = "TRAIN.TRAIN_EPISODES"
RUN_DIRECTORY = "CHECKPOINT.CHECKPOINT_DIR"

# What a checkpoint's weights were trained for, and what of it a test decides for itself.
PART_OF_THE_MODEL = ("MODEL.", "DATA.DATASET", "DATA.SEQ_LEN", "DATA.IMG_SIZE", "DATA.SHORT_SIDE", "DATA.IMG_NORM")
OWN_TO_THE_TEST = ("MODEL.SEED", "MODEL.TRAINABLE", "MODEL.ACTIVATION_CHECKPOINTING", "MODEL.COMPILE")

logger = logging.getLogger(__name__)

OptionsOf = Callable[[str], type[ModelOptions]]


@dataclass(frozen=True)
class LoadedConfig:
    """A config, where each of its values comes from (by dotted key), and what was said while loading."""

    config: Config
    origins: dict[str, str]
    warnings: list[str]


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    warn: Callable[[str], None] = logger.warning,
    options_of: OptionsOf | None = None,
    methods: Callable[[], Iterable[str]] | None = None,
) -> LoadedConfig:
    """Load an experiment file over configs/base.yaml, with `KEY=VALUE` overrides over both.

    Raises UserError with a line for each problem. `options_of` (a method's name -> its options class) and
    `methods` (all names) are the registry's in `models` unless given.
    """
    resolver = _Resolver(options_of or _registered_options, methods or _registered_methods)
    resolver.add_file(BASE_NAME, read_yaml_file(REPOSITORY / BASE_NAME, BASE_NAME))
    name = str(path)
    resolver.add_file(name, read_yaml_file(Path(path), name))
    for argument in overrides:
        resolver.add_override(argument)
    loaded = resolver.resolve()
    for warning in loaded.warnings:
        warn(warning)
    return loaded


def config_to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, as JSON and checkpoints take it."""
    return config.model_dump(mode="json")


def config_from_dict(
    data: Mapping[str, Any],
    source: str = "the stored config",
    options_of: OptionsOf | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """The config that `config_to_dict` made `data` from, checked like a file, with `KEY=VALUE` overrides over it.

    `source` is for messages; `options_of` as in `load_config`.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: expected sections and keys, found {show_value(data)}.")
    resolver = _Resolver(options_of or _registered_options, _registered_methods)
    resolver.add_file(source, data)
    for argument in overrides:
        resolver.add_override(argument)
    return resolver.resolve().config


def save_config(config: Config, path: str | Path) -> None:
    """Write every value of the config as YAML that `load_config` reads back to an equal config."""
    text = "".join(f"{line}\n" for _, line in yaml_lines(config_to_dict(config)))
    write_whole(Path(path), text.encode())


def format_config(loaded: LoadedConfig) -> str:
    """The resolved config as YAML, with the origin of every value as a comment."""
    lines = list(yaml_lines(config_to_dict(loaded.config)))
    column = min(max(len(line) for _, line in lines), 60)
    return "".join(f"{line:{column}}  # {loaded.origins[key]}\n" if key else f"{line}\n" for key, line in lines)


def refuse_other_config(
    stored: Mapping[str, Any], now: Mapping[str, Any], path: Path, episode: int, validates: bool
) -> None:
    """Refuse to resume with a config that would make another experiment of the run.

    The note, the hardware, paths and, once all validations are done, what is tested may change. So may
    TRAIN.TRAIN_EPISODES, unless the learning rate of the steps already made depended on it.

    Args:
        stored, now: the config of the checkpoint and that of the run.
        path: of the checkpoint, for messages.
        episode: the number of episodes that the checkpoint has seen.
        validates: whether there is a validation to come.

    Raises UserError naming the keys that differ.
    """
    before, after = dict(leaves(stored)), dict(leaves(now))
    differ = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    fixed = VALIDATION_TASK if validates else ()
    differ = [key for key in differ if key in fixed or not key.startswith(MAY_CHANGE_ON_RESUME)]
    if LENGTH in differ and after["SOLVER.LR_SCH"] != "cosine" and after[LENGTH] >= episode:
        differ.remove(LENGTH)
    if differ:
        shown = ", ".join(f"{key} was {before.get(key)}, is {after.get(key)}" for key in differ[:5])
        reason = f"; {LENGTH} {_why_not_length(after, episode)}" if LENGTH in differ else ""
        raise UserError(
            f"cannot resume {path} with another config ({shown}{reason}): "
            "set the keys back, or start a new run with another CHECKPOINT.CHECKPOINT_DIR."
        )


def _why_not_length(now: Mapping[str, Any], episode: int) -> str:
    """Why a run cannot be given this length once it has begun: the end of a sentence that begins with the key."""
    if now[LENGTH] < episode:
        return f"cannot be less than the {episode} that were trained already"
    return "cannot change while SOLVER.LR_SCH is cosine, whose rate depends on it"


def differences_from_training(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a test does otherwise than the training of its checkpoint: the method's options and the clips.

    Some of it is meant (another inference mode, another matcher), some is a mistake: it is told, not refused.
    """
    before, after = dict(leaves(stored)), dict(leaves(now))
    keys = [key for key in sorted(before | after) if key.startswith(PART_OF_THE_MODEL) and key not in OWN_TO_THE_TEST]
    return [
        f"{key}: trained with {before.get(key)}, tested with {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested sections with its dotted key."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def split_directory(config: Config) -> Path:
    """The folder of the split: DATA.SPLIT_DIR, or the one that belongs to DATA.DATASET."""
    if config.DATA.SPLIT_DIR:
        return Path(config.DATA.SPLIT_DIR)
    if config.DATA.DATASET == DEMO_DATASET:
        return Path("data/demo/splits")  # made beside the demo's videos, so not a part of the repository
    return REPOSITORY / "splits" / DATASETS[config.DATA.DATASET]


def shipped_split_directory(config: Config) -> Path | None:
    """The shipped folder of a known benchmark, which has the class list where DATA.SPLIT_DIR holds only lists."""
    name = config.DATA.DATASET
    return REPOSITORY / "splits" / DATASETS[name] if name in DATASETS else None


def prepare_command(config: Config) -> str:
    """The command that prepares the data which a config names."""
    name, folder = config.DATA.DATASET, Path(config.DATA.DATA_DIR)
    if name == DEMO_DATASET:
        return "python run/prepare.py demo"
    known = name in DATASETS
    words = [f"python run/prepare.py {name if known else 'custom'} --videos DIR"]
    if known and name not in WITHOUT_LISTS:
        words.append("--lists DIR")
    if folder.name == "packed" and folder.parent != Path("data") / name:
        words.append(f"--out {shlex.quote(str(folder.parent))}")
    elif not known and folder.name != "packed":
        words.append("--out DIR")
    return " ".join(words)


def _registered_options(name: str) -> type[ModelOptions]:
    from models import options_of  # imported late: the registry imports every method, and those import utils

    return options_of(name)


def _registered_methods() -> Iterable[str]:
    from models import available

    return available()


class _Resolver:
    """Collects keys from all sources in rising precedence, then checks them together."""

    def __init__(self, options_of: OptionsOf, methods: Callable[[], Iterable[str]]) -> None:
        self.options_of = options_of
        self.methods = methods
        self.entries: list[tuple[str, Any, Any]] = []  # origin, key, value or section
        self.known: dict[str, FieldInfo] = {}  # every key and section of the config's method
        self.values: dict[str, Any] = {}  # dotted key -> the value that holds
        self.origins: dict[str, str] = {}  # dotted key -> where that value comes from
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def add_file(self, origin: str, data: Mapping[Any, Any]) -> None:
        """Add the content of a file."""
        self.entries += [(origin, key, value) for key, value in data.items()]

    def add_override(self, argument: str) -> None:
        """Add a `KEY=VALUE` of the command line."""
        key, equals, text = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            found = show_value(argument)
            self.problems.append(f"{COMMAND_LINE}: expected KEY=VALUE such as TRAIN.SHOT=5, found {found}.")
            return
        try:
            # An empty value is the empty text: `INFO=` is how one clears a note.
            value = parse_yaml(text, place(show_key(key), COMMAND_LINE)) if text else ""
        except UserError as error:
            self.problems.append(str(error))
            return
        self.entries.append((COMMAND_LINE, key, value))

    def resolve(self) -> LoadedConfig:
        """Check everything and build the config, or raise one UserError with all problems."""
        options = self._find_options()
        self.known = known_keys(Config, options or ModelOptions)
        for origin, key, value in self.entries:
            self._take(origin, key, value, method_is_known=options is not None)
        config = self._validate(options or ModelOptions)
        if config is None or self.problems:
            raise UserError("\n".join(dict.fromkeys(self.problems)))
        keys = [key for key, _ in yaml_lines(config_to_dict(config)) if key]
        warnings = [*self.warnings, PRESET_HINT] if self.warnings else []
        return LoadedConfig(config, {key: self.origins.get(key, DEFAULT) for key in keys}, warnings)

    def _find_options(self) -> type[ModelOptions] | None:
        """The options class of the method that the sources name; None if there is no such method."""
        name, origin = ModelOptions().NAME, DEFAULT
        for source, key, value in self.entries:
            if key == "MODEL" and isinstance(value, Mapping) and "NAME" in value:
                name, origin = value["NAME"], source
            elif key == "MODEL.NAME":
                name, origin = value, source
        if not isinstance(name, str) or not name:
            return None  # the value is reported with the other wrong values
        try:
            return self.options_of(name)
        except UserError as error:
            self.problems.append(f"{origin}: {error}")
            return None

    def _take(self, origin: str, key: Any, value: Any, method_is_known: bool) -> None:
        """Record one key, or all keys of a section; later sources overwrite earlier ones."""
        if key not in self.known:
            if key in LEGACY_KEYS:
                self.warnings.append(f"{origin}: {key} is no longer used: {LEGACY_KEYS[key]}.")
            elif method_is_known or not str(key).startswith("MODEL."):
                self.problems.append(f"{origin}: unknown key {show_key(key)}{self._hint(str(key))}")
        elif not is_section(key, self.known):
            new_name = LEGACY_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
            if new_name is not None:
                self.warnings.append(f"{origin}: {key} {value} is now called {new_name}.")
            self.values[key] = value if new_name is None else new_name
            self.origins[key] = origin
        elif isinstance(value, Mapping):
            for inner, inner_value in value.items():
                self._take(origin, f"{key}.{inner}", inner_value, method_is_known)
        elif value is not None:  # a head with all its keys commented out is an empty section
            keys = [name for name in self.known if name.rpartition(".")[0] == key]
            self.problems.append(
                f"{place(key, origin)}: expected a section with keys such as {join_words(keys[:3])}, "
                f"found {show_value(value)}."
            )

    def _hint(self, key: str) -> str:
        """The end of the sentence on an unknown key."""
        if key.startswith("MODEL."):
            owners = [name for name in self.methods() if key in known_keys(Config, self.options_of(name))]
            if owners:
                return f" for this MODEL.NAME; it is an option of {join_words(owners)}."
        return suggest(key, self.known)

    def _validate(self, options: type[ModelOptions]) -> Config | None:
        """The config made of the recorded values; None after noting what is wrong with them."""
        data: dict[str, Any] = {"MODEL": {}}
        for key, value in self.values.items():
            *sections, leaf = key.split(".")
            inner = data
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = value
        model: ModelOptions | None = None
        try:
            model = options.model_validate(data["MODEL"])
        except pydantic.ValidationError as error:
            self._report(error, ["MODEL"])
        try:
            # With a wrong MODEL, a stand-in lets the other sections be checked all the same.
            config = Config.model_validate({**data, "MODEL": model or ModelOptions()})
        except pydantic.ValidationError as error:
            self._report(error, [])
            return None
        return self._named_run(config) if model is not None else None

    def _named_run(self, config: Config) -> Config:
        """The config with the values that `{KEY}` in CHECKPOINT_DIR stands for."""
        values = dict(leaves(config_to_dict(config)))

        def value_of(match: re.Match[str]) -> str:
            if match[1] not in values:
                where = place(RUN_DIRECTORY, self.origins[RUN_DIRECTORY])
                self.problems.append(f"{where}: unknown key {match[0]}{suggest(match[1], self.known)}")
            return str(values.get(match[1])).replace("/", "-")

        name = re.sub(r"\{([A-Z][A-Z0-9_.]*)\}", value_of, config.CHECKPOINT.CHECKPOINT_DIR)
        checkpoint = config.CHECKPOINT.model_copy(update={"CHECKPOINT_DIR": name})
        return config.model_copy(update={"CHECKPOINT": checkpoint})

    def _report(self, failure: pydantic.ValidationError, path: list[str]) -> None:
        """Note one problem for each key that pydantic complains about below `path`."""
        errors_of: dict[str, list[Any]] = {}
        for error in failure.errors(include_url=False):
            parts = list(path)
            for part in error["loc"]:  # goes on below a key, into list entries and the parts of a union
                if ".".join([*parts, str(part)]) not in self.known:
                    break
                parts.append(str(part))
            errors_of.setdefault(".".join(parts), []).append(error)
        for key, errors in errors_of.items():
            if key in self.values:
                text = explain(self.known[key], errors, self.values[key])
                self.problems.append(f"{place(key, self.origins[key])}: {text}")
            elif errors[0]["type"] == "missing":
                expected = expected_type(self.known[key].annotation)
                self.problems.append(f"{key} has no default: set it to {expected}.")
            else:  # a rule on several keys of a section, which names them itself
                self.problems += [str(error["ctx"]["error"]) for error in errors]
