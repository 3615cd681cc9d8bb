"""Runs the tested model on selected videos of its test split, to show more than its answers.

Shapes: V videos, T frames, N ways, K shots, Q queries, C classes, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from episodes.dataset import VideoDataset
from models.explanation import Explanation, Measure
from run.answers import Answers
from run.data import clip_options, load_splits_of
from run.encoder import BackboneEncoder, Encoder
from run.feature_cache import ClassTexts
from utils.checkpoint import file_digest
from utils.errors import UserError
from utils.schema import Config
from utils.utils import choose_device, seed_everything

VIDEOS_AT_A_TIME = 16
SAME_SCORE = 1e-2  # fraction of the range of an episode's scores; another device or batch size changes far less


class TestVideos:
    """The clips of a test split as the model sees them, by their names in the answers."""

    def __init__(self, config: Config) -> None:
        """Raises UserError if the data is not where the config expects it."""
        self.index = load_splits_of(config, ["test"])["test"]
        self._options = clip_options(config)
        self._numbers = {name: number for number, name in enumerate(self.index.video_names)}

    def read(self, names: Sequence[str]) -> Tensor:
        """Returns the clips of videos, uint8 [V, T, 3, H, W]. Raises UserError: one is missing or unreadable."""
        if missing := [name for name in names if name not in self._numbers]:
            raise UserError(f"{self.index.root} has no video {missing[0]}; set DATA.DATA_DIR to the folder that has it")
        clips = VideoDataset(self.index, self._options, [self._numbers[name] for name in names])
        return torch.stack([clips[i] for i in range(len(clips))])


@dataclass(frozen=True)
class ExplainedQuery:
    """One query of an episode: its clips, the model's explanation, and whether the scores match the test run.

    query: uint8 [T, 3, H, W]. support: uint8 [N, K, T, 3, H, W]. explanation: for this query alone, B = Q = 1; None
    without a model.
    """

    query: Tensor
    support: Tensor
    explanation: Explanation | None
    reproduces_scores: bool = True


@dataclass(frozen=True)
class ExplainedVideos:
    """A model's explanation of V videos as queries among all C classes of the split.

    encoded: float32 [V, T * D], the backbone's features of all frames in order. behind: module name -> the features
    after that module. measures: as `Explanation.measures`, with values [V, 1 or C, X].
    """

    encoded: np.ndarray
    behind: dict[str, np.ndarray]
    measures: dict[str, Measure]


class TestedModel:
    """The model of a test run, with the tested weights."""

    def __init__(self, config: Config, results: dict[str, Any], answers: Answers, directory: Path) -> None:
        """Builds the model. Raises UserError if that fails, or the checkpoint is missing or was changed."""
        path = tested_checkpoint(results, directory)
        self.device = choose_device(config.DEVICE.DEVICE)
        seed_everything(config.MODEL.SEED)
        self.model = models.build(config.MODEL, config.DATA.IMG_SIZE).to(self.device)
        prompts = dict(zip(answers.classes.tolist(), answers.prompts.tolist(), strict=True))
        self.text = ClassTexts(self.model).features(prompts, "the classes of the test run")
        self.model.drop_text_tower()
        models.load_weights_from(path, self.model, config)
        self.model.eval()
        settings = self.device, config.DATA.IMG_NORM, config.USE_AMP
        self.backbone, self.encoder = BackboneEncoder(self.model, *settings), Encoder(self.model, *settings)

    @torch.no_grad()
    def query(self, videos: TestVideos, answers: Answers, protocol: Any, episode: int, query: int) -> ExplainedQuery:
        """Explains one query of the test run under a protocol."""
        clips = _episode_clips(videos, answers, episode)
        encoded = torch.cat([self.encoder(part) for part in clips.split(VIDEOS_AT_A_TIME)])
        ways, shots = answers.support.shape[1:]
        support = encoded[: ways * shots].unflatten(0, (1, ways, shots))
        queries, text = encoded[ways * shots :][None], self.text[answers.class_ids[episode]][None]
        expected = answers.scores[protocol][episode, query]
        scores = self.model.score(support, queries, text, protocol)[0, query].cpu().numpy()
        together = self.model.transductive and protocol == "transductive"
        chosen = queries if together else queries[:, query : query + 1]
        explanation = _one_query(self.model.explain(support, chosen, text), query if together else 0)
        repeats = bool(np.abs(scores - expected).max() <= SAME_SCORE * max(float(np.ptp(expected)), 1e-6))
        return replace(_clips_of(clips, answers, query), explanation=explanation, reproduces_scores=repeats)

    @torch.no_grad()
    def split(self, videos: TestVideos, answers: Answers, names: Sequence[str]) -> ExplainedVideos:
        """Explains videos as queries among all classes, with one support video per class."""
        _, first = np.unique(answers.class_ids.ravel(), return_index=True)
        present = np.unique(answers.class_ids)
        supports = answers.support.reshape(-1, answers.support.shape[2])[first, 0]
        support = self.encoder(videos.read([str(answers.videos[v]) for v in supports]))[None, :, None]
        text = self.text[present][None]
        encoded, parts = [], []
        for start in range(0, len(names), VIDEOS_AT_A_TIME):
            features = self.backbone.backbone(videos.read(names[start : start + VIDEOS_AT_A_TIME]))
            encoded.append(_in_order(features.float()[None])[0])
            for query in self.encoder.finish(features):  # one at a time: it must not depend on the others
                parts.append(self.model.explain(support, query[None, None], text))
        modules = parts[0].features
        behind = {name: np.stack([_in_order(part.features[name])[0, 0] for part in parts]) for name in modules}
        measures = {
            name: replace(measure, values=torch.stack([part.measures[name].values[0, 0].cpu() for part in parts]))
            for name, measure in parts[0].measures.items()
        }
        return ExplainedVideos(np.concatenate(encoded), behind, measures)


def clips_of_query(videos: TestVideos, answers: Answers, episode: int, query: int) -> ExplainedQuery:
    """Returns the clips of one query of the test run and of its support videos, without a model."""
    return _clips_of(_episode_clips(videos, answers, episode), answers, query)


def tested_checkpoint(results: dict[str, Any], directory: Path) -> Path:
    """Returns the path of the tested checkpoint: that in the results, or the same name in the run directory.

    Raises:
        UserError: it is missing, or has other content.
    """
    named = Path(results["checkpoint"])
    for path in (named, directory / named.name):
        if path.is_file() and file_digest(path) == results["checkpoint_sha256"]:
            return path
    raise UserError(
        f"the tested checkpoint {named} is missing or was changed; put it into {directory} for figures of the model"
    )


def _episode_clips(videos: TestVideos, answers: Answers, episode: int) -> Tensor:
    """Returns the support videos by class, then the queries: uint8 [N*K + Q, T, 3, H, W]."""
    numbers = [*answers.support[episode].ravel(), *answers.query[episode]]
    return videos.read([str(answers.videos[number]) for number in numbers])


def _clips_of(clips: Tensor, answers: Answers, query: int) -> ExplainedQuery:
    """Selects the clips of one query from those of its episode, uint8 [N*K + Q, T, 3, H, W]."""
    ways, shots = answers.support.shape[1:]
    return ExplainedQuery(clips[ways * shots + query], clips[: ways * shots].unflatten(0, (ways, shots)), None)


def _one_query(explanation: Explanation, query: int) -> Explanation:
    """Returns the explanation of one of the queries, Q = 1, on the CPU."""
    part = slice(query, query + 1)
    return Explanation(
        {n: None if pairs is None else pairs[:, part].cpu() for n, pairs in explanation.pairings.items()},
        {n: features[:, part].cpu() for n, features in explanation.features.items()},
        {n: replace(m, values=m.values[:, part].cpu()) for n, m in explanation.measures.items()},
    )


def _in_order(features: Tensor) -> np.ndarray:
    """Averages each frame over space and joins the frames: [B, V, T, ..., D] -> float32 [B, V, T * D]."""
    places = tuple(range(3, features.ndim - 1))
    frames = features.mean(dim=places) if places else features
    return frames.flatten(2).float().cpu().numpy()
