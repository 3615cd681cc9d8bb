"""Test runs that keep features in a folder."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from episodes.splits import SplitIndex
from models.base import FewShotModel
from run import evaluation, feature_cache
from run.encoder import Encoder
from run.features import FeatureBank
from run.main_run import Learner
from tests.helpers.tiny_dataset import TinyDataset
from tests.helpers.tiny_runs import tiny_config, trained
from utils.checkpoint import BEST
from utils.schema import ModelOptions

SAME = ("accuracy", "accuracy_by_protocol", "per_episode", "per_class")


class Tests:
    """Runs tests of one checkpoint with one folder of features and counts the encoded videos."""

    __test__ = False  # pytest would collect the name as a test class

    def __init__(self, data: TinyDataset, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.checkpoint, self.folder = data, checkpoint, folder
        self.encoded = 0
        self.scores: list[torch.Tensor] = []
        encode, match = feature_cache.encode_videos, FewShotModel.score_precomputed

        def counted(encoder: Encoder, index: SplitIndex, videos: Sequence[int], *arguments: Any) -> FeatureBank:
            self.encoded += len(videos)
            return encode(encoder, index, videos, *arguments)

        def kept(model: FewShotModel, *arguments: Any) -> torch.Tensor:
            self.scores.append(match(model, *arguments))
            return self.scores[-1]

        for module in (evaluation, feature_cache):
            monkeypatch.setattr(module, "encode_videos", counted)
        monkeypatch.setattr(FewShotModel, "score_precomputed", kept)

    def __call__(self, *overrides: str) -> dict[str, Any]:
        only = ["TEST.ONLY_TEST=true", f"TEST.TEST_MODEL_PATH={self.checkpoint}", *overrides]
        return self.learner("tests", *only).test()

    def learner(self, run: str, *overrides: str, model: ModelOptions | None = None) -> Learner:
        """Returns a run of 20 test episodes with the folder of features, by default of the checkpoint's method."""
        self.encoded = 0
        self.scores.clear()
        kept = ["TEST.TEST_EPISODES=20", f"TEST.FEATURE_CACHE={self.folder}", *overrides]
        config = tiny_config(self.data, self.folder.with_name(run), *kept)
        return Learner(config.model_copy(update={"MODEL": model}) if model else config)

    def as_loaded(self, model: ModelOptions, *overrides: str) -> dict[str, Any]:
        """Returns the result of a method that is not trained."""
        run = f"{model.NAME}_{uuid.uuid4().hex}"
        learner = self.learner(run, "TRAIN.TRAIN_EPISODES=0", *overrides, model=model)
        learner.train()
        return learner.test()

    def files(self) -> list[Path]:
        """Returns all files but the descriptions and locks."""
        return sorted(path for path in self.folder.iterdir() if path.suffix not in (".json", ".lock"))


def trained_checkpoint(data: TinyDataset, directory: Path) -> Path:
    """Returns the best checkpoint of a short training run."""
    trained(data, directory, "TRAIN.TRAIN_EPISODES=2")
    return directory / BEST
