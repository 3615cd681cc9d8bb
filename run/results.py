"""Test results: a result line to quote, results.json with everything that the accuracy depends on, and answers.npz."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from episodes.data_report import data_report_sha256
from episodes.sampler import EpisodeSampler
from episodes.splits import EXPECTS
from models.base import FewShotModel, ProtocolName, parameter_count
from run.answers import Answers
from run.evaluation import Evaluation
from run.metrics_log import FEATURES_IN_BF16, write_test
from utils import distributed
from utils.checkpoint import file_digest
from utils.config import REPOSITORY, config_from_dict, config_to_dict, leaves, load_config
from utils.config_changes import LENGTH, differences_from_training
from utils.errors import UserError, counted
from utils.files import new_file, write_atomically, writing
from utils.logs import FILE_ONLY, LOG, set_up_logging
from utils.schema import Config, known_keys
from utils.statistics import Accuracy, accuracy_over_episodes
from utils.utils import device_name, git_state, package_versions

MATCHER = "MATCHER"
MAX_SHOWN = 6
# Keys, or their beginnings, that change the numbers of a test run or of a training run.
TEST_KEYS = (
    "MODEL.", "USE_AMP", "DATA.SEQ_LEN", "DATA.IMG_SIZE", "DATA.SHORT_SIDE", "DATA.IMG_NORM", "TEST.QUERY_PER_CLASS",
)  # fmt: skip
TRAINING_KEYS = (
    "SOLVER.", "DATA.SAMPLING", "DATA.FLIP", "TRAIN.WAY", "TRAIN.SHOT", "TRAIN.QUERY_PER_CLASS", "TRAIN.TRAIN_EPISODES",
    "TRAIN.TASKS_PER_BATCH", "TRAIN.CLIP_GRAD", "TRAIN.PROTOCOL", "TRAIN.CACHED_FEATURES",
    "TRAIN.VAL_FREQ", "TRAIN.VAL_EPISODES", "TRAIN.VAL_WAY",
)  # fmt: skip
# Not listed as differences, since the result line has them anyway, or they change only rounding.
NAMED_ELSEWHERE = ("MODEL.NAME", "MODEL.BACKBONE", "MODEL.SEED", "MODEL.COMPILE", "MODEL.ACTIVATION_CHECKPOINTING")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tested:
    """A tested model: its device, path and content of its checkpoint, and when its test run started."""

    model: FewShotModel
    device: torch.device
    checkpoint: Path
    content: dict[str, Any]
    started: float = field(default_factory=time.monotonic)


def finish_test(
    config: Config, sampler: EpisodeSampler, evaluations: dict[ProtocolName, Evaluation], tested: Tested
) -> dict[str, Any]:
    """Logs, prints and writes the results of a test run; the other processes wait until the files are written.

    Args:
        config: config of the test run.
        sampler: the test episodes.
        evaluations: one for each scored protocol.
        tested: the model.

    Returns:
        content of results.json.
    """

    def finish() -> dict[str, Any]:
        answers = Answers.of(sampler, evaluations)
        results = describe_results(config, sampler, evaluations, answers, tested)
        report(config, results, answers)
        return results

    return distributed.from_main(finish)


def report(config: Config, results: dict[str, Any], answers: Answers) -> None:
    """Logs the details of a test run, prints its result line, and writes its files into the run directory."""
    set_up_logging(Path(config.CHECKPOINT.CHECKPOINT_DIR) / LOG)
    logger.info("accuracy by class, %s protocol:\n%s", results["protocol"], per_class_table(results))
    for protocol, entry in results["accuracy_by_protocol"].items():
        if protocol != results["protocol"]:
            accuracy = Accuracy(entry["accuracy"], entry["interval_95"], results["episodes"])
            logger.info("the same episodes under the %s protocol: %s", protocol, accuracy)
    if results["interval_95_videos"] is not None:
        logger.info(
            "95 %% interval over other videos of these classes: %.2f ± %.2f %% (docs/evaluation.md)",
            results["accuracy"], results["interval_95_videos"],
        )  # fmt: skip
    logger.info("checkpoint: %s, after %d training episodes", results["checkpoint"], results["checkpoint_episodes"])
    for difference in results["differs_from_training"]:
        logger.warning("the test run differs from the training run: %s", difference)
    line = result_line(config, results)
    print(line, flush=True)  # before the file is written, so that a full disk cannot lose it
    logger.info(line, extra=FILE_ONLY)
    directory = Path(config.CHECKPOINT.CHECKPOINT_DIR)
    logger.info("results: %s", write_results(directory, results, answers))
    numbers = {name: results[name] for name in ("accuracy", "interval_95", "interval_95_videos")}
    numbers |= {f"accuracy_{name}": entry["accuracy"] for name, entry in results["accuracy_by_protocol"].items()}
    if results["features_stored_in"] == "bfloat16":
        numbers[FEATURES_IN_BF16] = 1.0
    known = {name: value for name, value in numbers.items() if value is not None}
    write_test(directory, results["checkpoint_episodes"], dict(leaves(results["config"])), known)


def result_line(config: Config, results: dict[str, Any]) -> str:
    """Returns one line to quote: data set, task, accuracy and all settings that the accuracy depends on."""
    line = (
        f"{results['dataset']} {results['way']}-way {results['shot']}-shot, {results['label']} "
        f"({config.MODEL.BACKBONE}): {Accuracy(results['accuracy'], results['interval_95'], results['episodes'])} "
        f"({counted(results['episodes'], 'episode')}, split={results['split']}, protocol={results['protocol']}, "
        f"seed={results['seed']})"
    )
    if results["trained_with_seed"] not in (None, results["seed"]):
        line += f", trained with seed {results['trained_with_seed']}"
    if results["checkpoint_selected_on"] == "test":
        line += ", checkpoint SELECTED ON THE TEST SPLIT"
    if differing := sum(EXPECTS in note for note in results["split_notes"]):
        line += f", NUMBER OF VIDEOS DIFFERS FROM THE CLASS LIST IN {counted(differing, 'class').upper()}"
    line += "".join(f", {name} IN BF16" for name in stored_in_bf16(results))
    line += shown_differences(results["differs_from_default"])
    if results["differs_from_training"]:
        line += ", CONFIG DIFFERS FROM TRAINING"
    return line


def describe_results(
    config: Config,
    sampler: EpisodeSampler,
    evaluations: dict[ProtocolName, Evaluation],
    answers: Answers,
    tested: Tested,
) -> dict[str, Any]:
    """Returns the content of results.json, plain values only.

    Args:
        config: config of the test run.
        sampler: the test episodes.
        evaluations: one for each scored protocol; that of `config.TEST.main_protocol` is the main result.
        answers: the answers of these evaluations.
        tested: the model.
    """
    content, seconds = tested.content, time.monotonic() - tested.started
    main = evaluations[config.TEST.main_protocol]
    accuracy = accuracy_over_episodes(main.per_episode)
    summaries = {protocol: _summary(evaluation, answers) for protocol, evaluation in evaluations.items()}
    return {
        "dataset": sampler.index.dataset,
        "split": sampler.index.split,
        "way": sampler.way,
        "shot": sampler.shot,
        "query_per_class": sampler.query_per_class,
        "episodes": accuracy.episodes,
        "seed": sampler.seed,
        "protocol": main.protocol,
        "accuracy": accuracy.mean,
        "interval_95": accuracy.interval,
        "interval_95_videos": summaries[main.protocol]["interval_95_videos"],
        "accuracy_by_protocol": summaries,
        "per_class": _per_class(sampler, main),
        "per_episode": [round(float(share), 6) for share in main.per_episode],
        "episode_list_sha256": sampler.digest(accuracy.episodes),
        "split_sha256": sampler.index.digest(),
        "split_notes": list(sampler.index.notes),
        "data_report_sha256": data_report_sha256(Path(config.DATA.DATA_DIR)),  # null: not prepared by prepare.py
        "method": config.MODEL.NAME,
        "label": method_label(config),
        "differs_from_default": differs_from_default(config, content["config"]),
        # A checkpoint from before the first episode is of a run that trains nothing.
        "trained_parameters": parameter_count(tested.model) if content["episode"] or not content["config"] else 0,
        "checkpoint": str(tested.checkpoint),
        "checkpoint_sha256": file_digest(tested.checkpoint),
        "checkpoint_episodes": content["episode"],
        "bad_clips": sorted(content.get("bad_clips", {})),
        "features_stored_in": main.stored_in,
        "trained_on_features_stored_in": content.get("cached_in"),  # null without TRAIN.CACHED_FEATURES
        "differs_from_training": differs_from_training(content["config"], config),
        # The released code does not record this, and always uses the test split.
        "checkpoint_selected_on": content.get("selected_on", "test"),
        "trained_with_seed": content["config"]["MODEL"]["SEED"] if content["config"] else None,
        "best_validation_accuracy": _best_validation(content),
        "device": device_name(tested.device),
        "test_seconds": round(seconds, 1),
        "git": git_state(),
        "config": config_to_dict(config),
        "versions": package_versions(),
        "info": config.INFO,
    }


def stored_in_bf16(results: Mapping[str, Any]) -> list[str]:
    """Returns which features were kept in bf16 because of little memory, so that their rounding is in the result."""
    names = {"features_stored_in": "TEST FEATURES", "trained_on_features_stored_in": "TRAINING FEATURES"}
    return [name for field, name in names.items() if results.get(field) == "bfloat16"]  # older results have none


def differs_from_training(trained_with: dict[str, Any] | None, config: Config) -> list[str]:
    """Returns a sentence for each difference between test and training; empty if the checkpoint has no config."""
    return [] if trained_with is None else differences_from_training(trained_with, config_to_dict(config))


def _best_validation(content: dict[str, Any]) -> float | None:
    """Returns the validation accuracy of a checkpoint in percent, or None if it was not validated."""
    best = content.get("best_accuracy", -1.0)
    return best if best >= 0 else None


def _summary(evaluation: Evaluation, answers: Answers) -> dict[str, float | None]:
    accuracy = accuracy_over_episodes(evaluation.per_episode)
    videos = answers.over_videos(100 * answers.is_right(evaluation.protocol))
    return {
        "accuracy": accuracy.mean,
        "interval_95": accuracy.interval,
        "interval_95_videos": videos.interval if videos else None,
    }


def _per_class(sampler: EpisodeSampler, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Returns the accuracy of the queries of each class over all episodes that contain it, in percent."""
    rows = zip(sampler.index.classes, evaluation.right.tolist(), evaluation.query_counts.tolist(), strict=True)
    return [
        {"class": entry.folder, "accuracy": 100 * right / queries if queries else None, "queries": queries}
        for entry, right, queries in rows
    ]


def per_class_table(results: dict[str, Any]) -> str:
    """Formats the per-class accuracies as lines of text, the hardest class first."""
    rows = [row for row in results["per_class"] if row["accuracy"] is not None]
    rows.sort(key=lambda row: row["accuracy"])
    width = max(len(row["class"]) for row in rows)
    return "\n".join(
        f"  {row['class']:{width}}  {row['accuracy']:6.2f} %  of {counted(row['queries'], 'query')}" for row in rows
    )


def write_results(directory: Path, results: dict[str, Any], answers: Answers) -> Path:
    """Writes results.json and answers.npz, or results_2.json and answers_2.npz, ... if they exist; returns the path.

    The results contain the name of the other file.

    Raises:
        UserError: they cannot be written; partial files are deleted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory / "results.json"):
        path = new_file(directory, "results", ".json")
        answers_path = path.with_name(path.stem.replace("results", "answers") + ".npz")
        try:
            write_atomically(answers_path, answers.as_npz())
            results["answers"] = answers_path.name
            write_atomically(path, as_json(results))
        except BaseException:
            path.unlink()
            answers_path.unlink(missing_ok=True)
            raise
    return path


def as_json(content: Any) -> bytes:
    """Returns UTF-8 JSON that reads back as the same text, even if it contains file names that are not UTF-8."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


# --- the names of the method and of unexpected settings in a result -----------------------------------------


def method_label(config: Config) -> str:
    """Returns the method, with its matcher if that is not the default: `otam`, `otam[mean]`."""
    known = known_keys(Config, type(config.MODEL))
    others = [value for key, value in _matchers(config).items() if value != known[key].default]
    return config.MODEL.NAME + "".join(f"[{matcher}]" for matcher in others)


def differs_from_default(config: Config, trained_with: dict[str, Any] | None) -> list[str]:
    """Returns the settings that differ from the method's default config, as `KEY=VALUE`; `DEBUG` comes first.

    The default config is `configs/<method>/<dataset>.yaml`; without this file, the defaults of the method's options.

    Args:
        config: config of the test run.
        trained_with: config of the training run, if known.
    """
    now = dict(leaves(config_to_dict(config)))
    default, has_training = _default_config(config)
    keys = [key for key in now if key.startswith(TEST_KEYS)]
    pairs = [(key, now[key]) for key in keys if key in default and now[key] != default[key]]
    if has_training and trained_with is not None and not config.DEBUG:
        pairs += _training_differences(dict(leaves(trained_with)), now, default)
    pairs.sort(key=lambda pair: not isinstance(pair[1], bool))  # switches first, since an ablation is a switch
    shown = [f"{key}={_text(value)}" for key, value in pairs if key not in NAMED_ELSEWHERE and not _is_matcher(key)]
    return ["DEBUG", *shown] if config.DEBUG else shown


def shown_differences(differences: list[str]) -> str:
    """Returns the end of a result line: the first differences and the number of further ones."""
    more = len(differences) - MAX_SHOWN
    shown = ["DEBUG RUN, NOT A RESULT" if name == "DEBUG" else name for name in differences[:MAX_SHOWN]]
    return "".join(f", {name}" for name in shown) + (f", and {more} more" if more > 0 else "")


def _training_differences(
    trained: dict[str, Any], now: dict[str, Any], default: dict[str, Any]
) -> list[tuple[str, Any]]:
    """Returns the training keys that differ; without training only the number of episodes."""
    keys = [key for key in trained if key.startswith(TRAINING_KEYS) and key in default]
    if not trained.get(LENGTH):
        keys = [key for key in keys if key == LENGTH]
    tested = {key: now[f"TEST.{key.partition('.')[2]}"] or now[key] for key in ("TRAIN.WAY", "TRAIN.SHOT")}
    return [(key, trained[key]) for key in keys if trained[key] not in (default[key], tested.get(key, default[key]))]


def _default_config(config: Config) -> tuple[dict[str, Any], bool]:
    """Returns every value of the default config by dotted key, and whether the config has training settings.

    The matcher is taken from `config`, since other defaults depend on it; the method's label names the matcher.
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
    """Returns the keys of MODEL that name a matcher, with their values."""
    return {key: value for key, value in leaves(config_to_dict(config)) if _is_matcher(key)}


def _is_matcher(key: str) -> bool:
    return key.startswith("MODEL.") and key.rpartition(".")[2] == MATCHER


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
