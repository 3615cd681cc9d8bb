"""The config: every section and key with its type, range, default and meaning.

A method adds its own options by subclassing `ModelOptions` in its own file, with a nested `Section` for
each of its parts, so that `MODEL.HSMR.ENABLED: false` is as well checked as `TRAIN.SHOT: 5`. A field's
type is a `Section`, or made of `bool`, `int`, `float`, `str`, `Literal`, `list[...]` and `None`.
"""

import difflib
import re
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from utils.yaml_text import NOT_UTF8

# Name of a benchmark -> its folder under splits/.
DATASETS: dict[str, str] = {
    "hmdb51": "hmdb_ARN",
    "ucf101": "ucf_ARN",
    "kinetics": "kinetics_CMN",
    "ssv2_full": "ssv2_OTAM",
    "ssv2_small": "ssv2_CMN",
}
DEMO_DATASET = "demo"
DEMO_DATASETS = {DEMO_DATASET: "motions", "demo_actions": "actions"}  # name -> set of `run/prepare.py demo`

LARGEST_SEED = 2**32 - 1  # the limit of numpy
LARGEST_SIDE = 2**14  # pixels of a frame; one such frame takes 3 GB as float

HEAD_ONLY = "head"
LAST_BLOCKS = re.compile(r"last_([1-9][0-9]*)")


def _accept_any_path(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Accepts a path with bytes that are not UTF-8, which pydantic does not count as text."""
    is_utf8 = not isinstance(value, str) or not NOT_UTF8.search(value)
    return check(value) if is_utf8 else value


PathText = Annotated[str, WrapValidator(_accept_any_path)]


class Section(BaseModel):
    """A group of keys: no unknown key, no silent conversion, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _accept_whole_floats(cls, value: Any, info: ValidationInfo) -> Any:
        """Converts `TRAIN_EPISODES: 1e5` to 100000."""
        types = mentioned_types(cls.model_fields[str(info.field_name)].annotation)
        if int not in types or float in types:
            return value
        if isinstance(value, list):
            return [_whole(entry) for entry in value]
        return _whole(value)


def _whole(value: Any) -> Any:
    """Returns a float without a fraction as an int; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def mentioned_types(annotation: Any) -> set[Any]:
    """Returns every plain type that an annotation is made of: `int | list[float]` -> {int, float}."""
    parts = get_args(annotation)
    if not parts:
        return {annotation}
    return set().union(*(mentioned_types(part) for part in parts))


class ModelOptions(Section):
    """The method and its backbone; the base class of every method's options."""

    NAME: str = Field("clipspm", min_length=1, description="the method, a file models/model_<name>.py")
    BACKBONE: str = Field("RN50", min_length=1, description="tiny, tiny-vit, RN50, ViT-B/16 or another open_clip name")
    CLIP_WEIGHTS: PathText = Field(
        "openai", min_length=1, description="open_clip tag, .pt or .safetensors file, random, or demo (tiny, tiny-vit)"
    )
    QUICK_GELU: bool = Field(
        True, description="activation of CLIP's transformers for a local file or random weights; a tag has its own"
    )
    FREEZE_BN: bool = Field(True, description="keep the backbone's batch norm statistics as they are")
    TRAINABLE: str = Field(
        "all", description="what to train: all, head (frozen backbone), or last_N (head and last N blocks)"
    )
    ACTIVATION_CHECKPOINTING: bool = Field(
        False, description="compute each block of the backbone again in the backward pass: less memory"
    )
    COMPILE: bool = Field(False, description="compile the backbone: minutes at the start, faster steps")
    SEED: int = Field(6, ge=0, le=LARGEST_SEED, description="seed of the weights, episodes and augmentation")

    @property
    def key_of_backbone_layers(self) -> str:
        """The key by which the method trains layers within or beside the backbone, '' if it has none."""
        return ""

    @classmethod
    def reads(cls, key: str) -> bool:
        """Returns whether the method has a key of MODEL, such as HSMR.WEIGHT, and accepts more than its default."""
        field = known_keys(cls, cls).get(key)
        values = get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
        return field is not None and len(values) != 1

    @field_validator("TRAINABLE")
    @classmethod
    def _check_trainable(cls, value: str) -> str:
        if value not in ("all", HEAD_ONLY) and not LAST_BLOCKS.fullmatch(value):
            raise ValueError(f"expected all, {HEAD_ONLY} or last_N with N from 1, such as last_2, found {value!r}.")
        return value


class TrainOptions(Section):
    """Training episodes and the validation during training."""

    WAY: int = Field(5, ge=2, description="classes in an episode")
    SHOT: int = Field(1, ge=1, description="support videos per class")
    QUERY_PER_CLASS: int = Field(4, ge=1, description="query videos per class")
    TRAIN_EPISODES: int = Field(20000, ge=0, description="episodes to train on; 0: test the weights as loaded")
    VAL_FREQ: int = Field(1000, ge=0, description="episodes between validations; 0: no validation")
    PRINT_FREQ: int = Field(100, ge=1, description="episodes between log lines")
    TASKS_PER_BATCH: int = Field(16, ge=1, description="episodes whose gradients make one step")
    CLIP_GRAD: float = Field(0.0, ge=0, description="largest norm of the gradient of a step; 0: no limit")
    VAL_SPLIT: Literal["val", "test"] = Field(
        "val", description="classes that select the best checkpoint (released code: test)"
    )
    VAL_WAY: int | None = Field(
        None,
        ge=2,
        description="classes in a validation episode; null: as in the test run, or all of VAL_SPLIT if fewer",
    )
    VAL_EPISODES: int = Field(2000, ge=1, description="episodes of one validation")
    PROTOCOL: Literal["transductive", "inductive"] = Field(
        "inductive", description="transductive: queries of an episode are scored together"
    )
    CHUNK: int = Field(0, ge=0, description="videos encoded at a time, each chunk twice: less memory; 0: all at once")
    CACHED_FEATURES: bool = Field(
        False, description="train on each video's test clip, encoded once by a frozen backbone: no augmentation"
    )


class TestOptions(Section):
    """Test episodes."""

    ONLY_TEST: bool = Field(False, description="test TEST_MODEL_PATH without training")
    WAY: int | None = Field(None, ge=2, description="classes in an episode; null: TRAIN.WAY")
    SHOT: int | None = Field(None, ge=1, description="support videos per class; null: TRAIN.SHOT")
    QUERY_PER_CLASS: int = Field(1, ge=1, description="query videos per class")
    SEED: int | None = Field(
        None, ge=0, le=LARGEST_SEED, description="seed of test and validation episodes; null: MODEL.SEED"
    )
    TEST_EPISODES: int = Field(
        10000, ge=0, description="episodes to test on; 0: no test run, the test split is not read"
    )
    TEST_MODEL_PATH: PathText = Field("", description="checkpoint to test")
    PROTOCOL: Literal["both", "inductive", "transductive"] = Field(
        "both", description="protocol of test runs; both: inductive is the main result and used in validation"
    )
    BATCH_EPISODES: int = Field(0, ge=0, description="episodes scored in one call; 0: chosen for the device")
    FEATURE_CACHE: PathText = Field(
        "", description="folder that keeps backbone features for test runs and TRAIN.CACHED_FEATURES; empty: none"
    )

    @property
    def main_protocol(self) -> Literal["inductive", "transductive"]:
        """The protocol of the main result and of validations."""
        return "inductive" if self.PROTOCOL == "both" else self.PROTOCOL

    def protocols(self, transductive: bool) -> list[Literal["inductive", "transductive"]]:
        """Returns the protocols of a test run; only for a transductive method, both differ."""
        return ["inductive", "transductive"] if transductive and self.PROTOCOL == "both" else [self.main_protocol]


class DataOptions(Section):
    """Where the videos are and how a clip is made from one."""

    DATASET: str = Field("demo", description=", ".join((*DEMO_DATASETS, *DATASETS)) + " or your own")
    DATA_DIR: PathText = Field(
        "data/demo/videos", min_length=1, description="folder of the videos, frames or packed stores"
    )
    SPLIT_DIR: PathText = Field("", description="folder of the split; empty: the one shipped for DATASET")
    SEQ_LEN: int = Field(8, ge=1, description="frames in a clip")
    SAMPLING: Literal["linspace", "segments"] = Field(
        "linspace", description="frames of a training clip: evenly spaced (linspace), or one at random of each segment"
    )
    IMG_SIZE: int = Field(224, ge=1, le=LARGEST_SIDE, description="side of the square crop in pixels")
    SHORT_SIDE: int = Field(256, ge=1, le=LARGEST_SIDE, description="short side of a frame before the crop")
    IMG_NORM: bool = Field(True, description="normalise the colours as the backbone expects")
    FLIP: bool | None = Field(None, description="mirror training clips at random; null: as the split allows")
    NUM_WORKERS: int = Field(8, ge=0, description="processes that read videos; 0: the main process reads")
    CHECK_VIDEOS: bool = Field(True, description="open every video once before the run")
    MAX_BAD_CLIPS: int = Field(
        10, ge=0, description="unreadable training videos that may be replaced by others of their class"
    )


class CheckpointOptions(Section):
    """Where a run is stored, and whether it resumes."""

    CHECKPOINT_DIR: PathText = Field(
        "checkpoints/run",
        min_length=1,
        description="folder of the run; {KEY} becomes its value, e.g. {TRAIN.SHOT}",
    )
    SAVE_FREQ: int = Field(1000, ge=0, description="episodes between saves; 0: at validation and at the end")
    KEEP: int = Field(2, ge=0, description="newest checkpoints to keep in addition to the best and the last")
    RESUME_FROM_CHECKPOINT: bool = Field(False, description="resume from checkpoint_last.pt (--resume)")


class SolverOptions(Section):
    """The optimiser and its learning rate."""

    OPTIM_METHOD: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="adam, adamw (decoupled weight decay) or sgd"
    )
    LR: float = Field(1e-5, gt=0, description="learning rate")
    BETAS: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        [0.5, 0.999], min_length=2, max_length=2, description="adam's decay rates of the two moments"
    )
    EPS: float = Field(1e-8, gt=0, description="adam's epsilon, added to the root of the second moment")
    MOMENTUM: float = Field(0.9, ge=0, lt=1, description="momentum of sgd")
    WEIGHT_DECAY: float = Field(5e-5, ge=0, description="weight decay")
    LR_SCH: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=1)]] | Literal["none", "cosine"] = Field(
        "none", description="none, cosine, or the episodes after which the rate is divided by ten, or as in LR_FACTORS"
    )
    LR_FACTORS: list[Annotated[float, Field(ge=0)]] | None = Field(
        None, description="factor on LR after each episode of LR_SCH; null: each divides by ten"
    )
    WARMUP_EPISODES: int = Field(0, ge=0, description="episodes over which the rate rises")
    WARMUP_FACTOR: float = Field(0.0, ge=0, le=1, description="factor on the rate at the start of the warm-up")

    @property
    def milestones(self) -> list[int]:
        """The episodes of LR_SCH at which the learning rate changes."""
        if isinstance(self.LR_SCH, str):
            return []
        return [self.LR_SCH] if isinstance(self.LR_SCH, int) else self.LR_SCH


class DeviceOptions(Section):
    """Where to compute."""

    DEVICE: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto uses a GPU if there is one")
    DETERMINISTIC: bool = Field(False, description="bit-identical runs on the same hardware, slower")


class LogOptions(Section):
    """Where the metrics of a run are logged besides its directory."""

    WANDB: bool = Field(False, description="also log to Weights & Biases (pip install wandb)")


class Config(Section):
    """A resolved config; `MODEL` is an instance of the options class of its method."""

    INFO: str = Field("", description="a note, copied to the results")
    DEBUG: bool = Field(False, description="a short run to check that everything works")
    USE_AMP: bool = Field(False, description="bf16 autocast for the backbone")
    MODEL: SerializeAsAny[ModelOptions] = Field(ModelOptions(), description="the method and its backbone")
    TRAIN: TrainOptions = Field(TrainOptions(), description="training and validation")
    TEST: TestOptions = Field(TestOptions(), description="testing")
    DATA: DataOptions = Field(DataOptions(), description="videos and clips")
    CHECKPOINT: CheckpointOptions = Field(CheckpointOptions(), description="saving and resuming")
    SOLVER: SolverOptions = Field(SolverOptions(), description="optimiser")
    DEVICE: DeviceOptions = Field(DeviceOptions(), description="hardware")
    LOG: LogOptions = Field(LogOptions(), description="tracking")

    @property
    def trains(self) -> bool:
        """Whether the run trains before it tests."""
        return not self.TEST.ONLY_TEST and self.TRAIN.TRAIN_EPISODES > 0

    @property
    def validates(self) -> bool:
        """Whether the run validates while it trains."""
        return self.trains and self.TRAIN.VAL_FREQ > 0

    @property
    def tests(self) -> bool:
        """Whether the run tests; the test split is read only then, or to validate on the test classes."""
        return self.TEST.TEST_EPISODES > 0

    @property
    def test_task(self) -> tuple[int, int, int]:
        """Way, shot and seed of the test episodes."""
        seed = self.MODEL.SEED if self.TEST.SEED is None else self.TEST.SEED
        return self.TEST.WAY or self.TRAIN.WAY, self.TEST.SHOT or self.TRAIN.SHOT, seed

    @model_validator(mode="after")
    def _check_conflicts(self) -> "Config":
        """Checks all rules on several keys; reports every violation, one per line."""
        problems = _conflicts(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _conflicts(config: Config) -> list[str]:
    """Returns one sentence for each pair of keys that cannot both hold; it names both and the fix."""
    problems = []
    if config.TEST.ONLY_TEST and not config.TEST.TEST_MODEL_PATH:
        problems.append(
            "TEST.ONLY_TEST is true but TEST.TEST_MODEL_PATH is empty: "
            "set TEST.TEST_MODEL_PATH to the checkpoint to test, or TEST.ONLY_TEST to false."
        )
    if config.TEST.ONLY_TEST and not config.tests:
        problems.append(
            "TEST.ONLY_TEST is true but TEST.TEST_EPISODES is 0, so nothing would run: "
            "set TEST.TEST_EPISODES to the number of test episodes, or TEST.ONLY_TEST to false."
        )
    if config.DATA.SHORT_SIDE < config.DATA.IMG_SIZE:
        problems.append(
            f"DATA.SHORT_SIDE ({config.DATA.SHORT_SIDE}) is less than DATA.IMG_SIZE "
            f"({config.DATA.IMG_SIZE}), so the crop does not fit: "
            f"set DATA.SHORT_SIDE to at least {config.DATA.IMG_SIZE}."
        )
    problems += [*_backbone_conflicts(config), *_schedule_conflicts(config.SOLVER)]
    name = config.DATA.DATASET
    if not config.DATA.SPLIT_DIR and name not in DEMO_DATASETS and name not in DATASETS:
        known = [*DATASETS, *DEMO_DATASETS]
        nearest = difflib.get_close_matches(name, known, n=1)
        problems.append(
            f"DATA.DATASET {name!r} has no shipped split and DATA.SPLIT_DIR is empty: set DATA.SPLIT_DIR "
            f"to the folder of its split, or DATA.DATASET to one of {', '.join(known)}"
            + (f" (did you mean {nearest[0]}?)." if nearest else ".")
        )
    return problems


def _backbone_conflicts(config: Config) -> list[str]:
    """Returns sentences on conflicts between keys that affect training of the backbone."""
    problems = []
    model, train = config.MODEL, config.TRAIN
    if not config.trains:
        return []
    if train.CACHED_FEATURES and model.TRAINABLE != HEAD_ONLY:
        problems.append(
            f"TRAIN.CACHED_FEATURES is true but MODEL.TRAINABLE is {model.TRAINABLE}, so cached features would be "
            f"outdated: set MODEL.TRAINABLE to {HEAD_ONLY}, or TRAIN.CACHED_FEATURES to false."
        )
    if train.CACHED_FEATURES and (key := model.key_of_backbone_layers):
        problems.append(
            f"TRAIN.CACHED_FEATURES is true but MODEL.{key} is {getattr(model, key)}, whose layers within the backbone "
            "would stay untrained: set TRAIN.CACHED_FEATURES to false."
        )
    encodes_twice = {"TRAIN.CHUNK": train.CHUNK, "MODEL.ACTIVATION_CHECKPOINTING": model.ACTIVATION_CHECKPOINTING}
    for key, value in encodes_twice.items():
        if value and not model.FREEZE_BN and model.TRAINABLE != HEAD_ONLY:
            problems.append(
                f"{key} is {str(value).lower()} but MODEL.FREEZE_BN is false, and batch norms would count every frame "
                f"twice: set MODEL.FREEZE_BN to true (a backbone without batch norms ignores it), or {key} to "
                f"{str(type(value)()).lower()}."
            )
    return problems


def _schedule_conflicts(solver: SolverOptions) -> list[str]:
    """Returns a sentence if LR_FACTORS does not fit the milestones in LR_SCH."""
    factors, milestones = solver.LR_FACTORS, solver.milestones
    if factors is None or (len(factors) == len(milestones) > 0 and milestones == sorted(set(milestones))):
        return []
    return [
        f"SOLVER.LR_FACTORS is {factors} but SOLVER.LR_SCH is {solver.LR_SCH}: set LR_SCH to as many rising episodes "
        "as there are factors, or LR_FACTORS to null."
    ]


# --- keys -------------------------------------------------------------------------------------------------


def known_keys(section: type[Section], options: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Returns every key and section of a config by its dotted name; `options` is the class of the MODEL section."""
    known: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        known[key] = field
        if is_section(field):
            inner = options if key == "MODEL" else cast(type[Section], field.annotation)
            known.update(known_keys(inner, options, f"{key}."))
    return known


def is_section(field: FieldInfo) -> bool:
    """Returns whether a field is a section and not a value."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)
