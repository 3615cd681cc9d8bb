"""Rejects queries of unknown classes with a threshold from the scores of validation episodes."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from episodes.dataset import ClipReader
from episodes.sampler import EpisodeSampler
from episodes.splits import SplitIndex
from models.base import FewShotModel
from run.data import clip_options, load_splits_of
from run.encoder import Encoder
from run.evaluation import precompute_queries, precompute_supports, score_episodes, stored_in
from run.feature_cache import ClassTexts
from run.features import encode_videos
from utils.checkpoint import file_digest
from utils.errors import UserError
from utils.schema import Config

EPISODES = 1000
MIN_CLASSES = 3


@dataclass(frozen=True)
class BestScores:
    """The score of the best class for each query.

    known: float32 [n], of queries of known classes.
    unknown: float32 [m], of queries of unknown classes.
    stored_in: type of the features in memory, "float32" or "bfloat16"; see `bank_memory`.
    """

    known: np.ndarray
    unknown: np.ndarray
    stored_in: str = "float32"

    def rates(self, threshold: float) -> dict[str, float]:
        """Returns the percentages of rejected known queries and accepted unknown ones, and the area under the ROC."""
        ordered = np.sort(self.known)
        below, at_most = np.searchsorted(ordered, self.unknown), np.searchsorted(ordered, self.unknown, "right")
        higher = 1 - (below + at_most) / 2 / len(ordered)  # share of known queries above each unknown; ties count half
        return {
            "false_reject_percent": 100 * float((self.known < threshold).mean()),
            "false_accept_percent": 100 * float((self.unknown >= threshold).mean()),
            "area_under_roc": float(higher.mean()),
        }


def open_splits(config: Config, splits: list[str], way: int, shot: int) -> dict[str, SplitIndex]:
    """Returns splits with at least `way` + 1 classes and `shot` + 1 videos per class.

    Raises:
        UserError: a split is missing or too small.
    """
    indexes = load_splits_of(config, splits)
    for split, index in indexes.items():
        if len(index.classes) < MIN_CLASSES:
            raise UserError(
                f"{split} of {index.dataset} has {len(index.classes)} classes, and a threshold needs {MIN_CLASSES}, "
                "two known and one unknown: move classes to this split"
            )
        if len(index.classes) <= way:
            raise UserError(
                f"{split} of {index.dataset} has {len(index.classes)} classes, at least one of which must be unknown: "
                f"lower --way to {len(index.classes) - 1} or less"
            )
        fewest = min(len(videos) for videos in index.videos_of_class)
        if fewest < 2:
            raise UserError(f"a class of {split} has 1 video, and a threshold needs 2 of each class: add videos to it")
        if fewest <= shot:
            raise UserError(f"a class of {split} has {fewest} videos: lower --shot to {fewest - 1} or less")
    return indexes


def best_scores(model: FewShotModel, config: Config, index: SplitIndex, way: int, shot: int) -> BestScores:
    """Scores one query of each class, known and unknown, in episodes of `way` known classes."""
    data, device = config.DATA, next(model.parameters()).device
    _, _, seed = config.test_task
    sampler = EpisodeSampler(index, min(2 * way, len(index.classes)), shot, 1, seed)
    whole = [sampler.episode(i) for i in range(EPISODES)]
    specs = [replace(spec, class_ids=spec.class_ids[:way], support=spec.support[:way]) for spec in whole]
    videos = np.unique(np.concatenate([np.append(spec.support, spec.query) for spec in specs])).tolist()
    reader = ClipReader(clip_options(config), data.NUM_WORKERS)
    encoder = Encoder(model, device, data.IMG_NORM, amp=False)  # as in `fsar.Classifier`, which applies the threshold
    bank = encode_videos(encoder, index, videos, reader)
    prompts = {entry.folder: entry.prompt for entry in index.classes}
    text = ClassTexts(model).features(prompts, f"{index.split} classes")
    supports = precompute_supports(model, bank, index, videos, text)
    queries = precompute_queries(model, bank, videos, device)
    batches: list[Tensor] = score_episodes(
        model, specs, supports, queries, text, ["inductive"], config.TEST.BATCH_EPISODES
    )["inductive"]
    best = np.concatenate([batch.amax(dim=-1).flatten().cpu().numpy() for batch in batches])
    is_known = np.concatenate([spec.query_labels for spec in whole]) < way
    return BestScores(best[is_known], best[~is_known], stored_in(bank, supports, queries))


def read_threshold(path: Path, checkpoint: Path) -> dict[str, Any]:
    """Reads a file of run/calibrate.py for a checkpoint.

    Returns:
        threshold, way and shot.

    Raises:
        UserError: the file is missing, was not written by run/calibrate.py, or belongs to another checkpoint.
    """
    write = f"write it with: python run/calibrate.py --checkpoint {checkpoint} --out FILE"
    try:
        content = json.loads(path.read_bytes())
        result = {"threshold": float(content["threshold"]), **{key: int(content[key]) for key in ("way", "shot")}}
        digest = content["checkpoint_sha256"]
        if not math.isfinite(result["threshold"]):
            raise ValueError("the threshold is not finite")
    except FileNotFoundError as error:
        raise UserError(f"--reject {path}: no such file; {write}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"--reject {path} does not contain a threshold; {write}") from error
    if digest != file_digest(checkpoint):
        raise UserError(f"--reject {path} was measured with another checkpoint; {write}")
    return result
