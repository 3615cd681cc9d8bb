"""One run, in reading order: build, train, validate, test; `run/run.py` is the command.

The loop knows methods only as `encode`, `match` and `training_losses`; it never checks a method's name.

Under torchrun, R processes run the same code. Process r computes the episodes i with i mod R = r, and every step uses
the gradient of the whole group of episodes, so a config means the same for any R. Only process 0 reads and writes the
run directory.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import models
from models.base import ProtocolName
from run.cached_episodes import CachedEpisodes, TrainingEpisodes
from run.data import RunData, effective_config
from run.encoder import Encoder
from run.evaluation import Evaluation, evaluate
from run.feature_cache import ClassTexts, FeatureCache
from run.recording import prepare_recording, recording
from run.results import Tested, finish_test
from run.run_directory import RunDirectory, TrainingState
from run.training_step import TrainingStep
from utils import distributed
from utils.checkpoint import BEST
from utils.schema import Config
from utils.utils import prepare_device


class Learner:
    """One run: `train()` and `test()`."""

    # --- build --------------------------------------------------------------------------------------------

    def __init__(self, config: Config) -> None:
        """Builds everything and checks all input before any file is written.

        Raises:
            UserError: the config, the split, the videos or the weights are not valid.
        """
        self.config = config = effective_config(config)
        self.device = prepare_device(config)
        prepare_recording(config)
        self.data = RunData(config)
        self.directory = RunDirectory(config, self.data.digests())
        self.model = models.build(config.MODEL, config.DATA.IMG_SIZE)
        if config.trains:
            self.model.set_training_classes(len(self.data.splits["train"].classes))
        self.model.to(self.device)
        distributed.copy_weights_from_main(self.model)
        texts = ClassTexts(self.model)
        self.text = {split: texts.features(*self.data.prompts(split)) for split in self.data.splits}
        self.model.drop_text_tower()
        self.encoder = Encoder(self.model, self.device, config.DATA.IMG_NORM, config.USE_AMP)
        self.validation_reader = self.data.reader(keep_workers=True)
        self.cache = FeatureCache(config) if config.TEST.FEATURE_CACHE else None

    # --- train --------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the start or from the last checkpoint; writes `best` and `last` to the run directory.

        Raises:
            UserError: the directory contains another run, a video is unreadable, the loss is not finite, ...
            StopRequested: a signal was received; `last` contains the current state.
        """
        state = TrainingState.new(self.model, self.device, self.config)
        with closing(self.validation_reader), recording(self.directory, self.data, state, self.validate) as recorder:
            remaining = range(state.episode, self.config.TRAIN.TRAIN_EPISODES)
            if not remaining:
                return
            with state.meter.pause():
                step = self.training_step(state)
                episodes = recorder.watched(self.training_episodes(remaining, state))
            self.model.train()
            for group in groups(remaining, self.config.TRAIN.TASKS_PER_BATCH):
                step(group, episodes)
                recorder.after_step(group, step.watch)  # logs, validates and saves if due

    def training_step(self, state: TrainingState) -> TrainingStep:
        """Returns the optimizer step of this training run."""
        return TrainingStep(self.model, self.encoder, state.solver, state.meter, self.text["train"], self.config)

    def training_episodes(self, episodes: range, state: TrainingState | None = None) -> TrainingEpisodes:
        """Returns this process's share of training episodes, in order; the state records how features are cached."""
        if self.config.TRAIN.CACHED_FEATURES:
            return CachedEpisodes(self.config, self.model, self.data, episodes, self.cache, state)
        return self.data.training_episodes(distributed.share(episodes), self.device)

    # --- validate -----------------------------------------------------------------------------------------

    def validate(self) -> Evaluation:
        """Scores the validation episodes with the current weights."""
        protocol = self.config.TEST.main_protocol
        return self._evaluate("val", self.config.TRAIN.VAL_EPISODES, [protocol])[protocol]

    def _evaluate(self, phase: str, episodes: int, protocols: list[ProtocolName]) -> dict[ProtocolName, Evaluation]:
        """Scores the episodes of a validation (phase "val") or of the test (phase "test") under each protocol."""
        sampler = self.data.samplers[phase]
        reader = self.validation_reader if phase == "val" else self.data.reader()
        # During training, stored features stay valid only if the backbone is frozen.
        cache = self.cache if phase == "test" or self.config.TRAIN.CACHED_FEATURES else None
        text, batch_episodes = self.text[sampler.index.split], self.config.TEST.BATCH_EPISODES
        return evaluate(self.encoder, sampler, text, episodes, protocols, reader, batch_episodes, cache)

    # --- test ---------------------------------------------------------------------------------------------

    def test(self) -> dict[str, Any]:
        """Tests TEST.TEST_MODEL_PATH, or the best checkpoint of this run; returns the content of results.json.

        Raises:
            UserError: the checkpoint is missing, or does not fit the config.
        """
        test = self.config.TEST
        path = Path(test.TEST_MODEL_PATH) if test.ONLY_TEST else self.directory.path / BEST
        tested = Tested(self.model, self.device, path, models.load_weights_from(path, self.model, self.config))
        evaluations = self._evaluate("test", test.TEST_EPISODES, test.protocols(self.model.transductive))
        return finish_test(self.config, self.data.samplers["test"], evaluations, tested)


def groups(episodes: range, size: int) -> Iterator[range]:
    """Yields the episodes in groups of `size`; the last group may be smaller."""
    for start in range(0, len(episodes), size):
        yield episodes[start : start + size]
