"""One run, in reading order: build, train, validate, test.

The loop knows methods only as `encode`, `match` and `training_losses`; it never checks a method's name.

Under torchrun, R processes run the same code. Process r computes the episodes i with i mod R = r, and every step uses
the gradient of the whole group of episodes, so a config means the same for any R. Only process 0 reads and writes the
run directory.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from torch.utils.data import DataLoader

import models
from episodes.dataset import BadClips, EpisodeClips, EpisodeDataset, episode_loader
from models.base import ProtocolName
from run import run_log, stopping
from run.cached_episodes import CachedEpisodes
from run.data import RunData, effective_config
from run.encoder import Encoder
from run.evaluation import Evaluation, evaluate
from run.feature_cache import ClassTexts, FeatureCache
from run.meter import Meter
from run.results import Tested, finish_test
from run.run_directory import RunDirectory, TrainingState
from run.run_log import RunLog
from run.solver import Solver
from run.training_step import TrainingStep
from utils import distributed
from utils.checkpoint import BEST
from utils.jobs import progress
from utils.schema import Config
from utils.statistics import accuracy_over_episodes
from utils.utils import choose_device, seed_everything, set_determinism


class Learner:
    """One run: `train()` and `test()`."""

    # --- build --------------------------------------------------------------------------------------------

    def __init__(self, config: Config) -> None:
        """Builds everything and checks all input before any file is written.

        Raises:
            UserError: the config, the split, the videos or the weights are not valid.
        """
        self.config = config = effective_config(config)
        run_log.prepare(config)
        self.device = choose_device(config.DEVICE.DEVICE)
        self.data = RunData(config)
        self.directory = RunDirectory(config, self.data.digests())
        set_determinism(config.DEVICE.DETERMINISTIC)
        seed_everything(config.MODEL.SEED)
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
        config = self.config
        solver = Solver(self.model, config.SOLVER, config.TRAIN.TRAIN_EPISODES, config.TRAIN.CLIP_GRAD)
        state = TrainingState(self.model, solver, Meter(self.device), BadClips(config.DATA.MAX_BAD_CLIPS))
        self.directory.begin(state)
        with (
            closing(self.validation_reader),
            self.directory.saved_on_interruption(state, self.data.samplers),
            RunLog(config, self.data, self.directory.path, state) as log,
        ):
            self._train(state, log)

    def _train(self, state: TrainingState, log: RunLog) -> None:
        """Makes an optimizer step for each group of TASKS_PER_BATCH episodes."""
        first, last = state.episode, self.config.TRAIN.TRAIN_EPISODES
        if state.validation_due and self.config.validates:  # the run was stopped during a validation
            self._save(state, log, validate=True)
        if first == last:
            return
        with state.meter.pause():
            step = self.training_step(state)
            episodes = self.training_episodes(range(first, last), state)
        own_episodes = state.bad_clips.watch(state.meter.timed(episodes))
        self.model.train()
        with progress(None, len(episodes), "train") as bar:
            for group in groups(first, last, self.config.TRAIN.TASKS_PER_BATCH):
                own = distributed.share(group)
                step(group, islice(own_episodes, len(own)))
                state.episode = group.stop
                bar.update(len(own))
                self._log_and_save(group, step, state, log)

    def training_step(self, state: TrainingState) -> TrainingStep:
        """Returns the optimizer step of this training run."""
        return TrainingStep(self.model, self.encoder, state.solver, state.meter, self.text["train"], self.config)

    def training_episodes(
        self, episodes: range, state: TrainingState | None = None
    ) -> DataLoader[EpisodeClips] | CachedEpisodes:
        """Returns this process's share of training episodes, in order; the state records how features are cached."""
        if self.config.TRAIN.CACHED_FEATURES:
            return CachedEpisodes(self.config, self.model, self.data, episodes, self.cache, state)
        options, own = self.config.DATA, distributed.share(episodes)
        dataset = EpisodeDataset(self.data.samplers["train"], self.data.clip_options, own, options.MAX_BAD_CLIPS)
        return episode_loader(dataset, options.NUM_WORKERS, self.device)

    def _log_and_save(self, group: range, step: TrainingStep, state: TrainingState, log: RunLog) -> None:
        """Logs, validates and saves after a group of episodes if due; a signal waits for this."""
        config, last = self.config, self.config.TRAIN.TRAIN_EPISODES
        report = is_due(config.TRAIN.PRINT_FREQ, group, last)
        validate = is_due(config.TRAIN.VAL_FREQ, group, last) and config.validates
        save = is_due(config.CHECKPOINT.SAVE_FREQ, group, last)
        stop = stopping.is_requested()
        if report or validate or save or stop:
            step.watch.raise_if_nonfinite()
            state.bad_clips.share()
        if report:
            log.training()
        if validate or save:
            self._save(state, log, validate)
        if stop:
            raise stopping.request()

    def _save(self, state: TrainingState, log: RunLog, validate: bool) -> None:
        """Saves, after a validation if it is due; if a signal interrupts the validation, the resumed run repeats it."""
        with state.meter.pause():
            distributed.average_buffers(self.model)
            state.validation_due = validate
            is_last = state.episode == self.config.TRAIN.TRAIN_EPISODES  # without validation the last one is the best
            is_best = self._validate(state, log) if validate else is_last
            state.validation_due = False
            self.directory.save_on_schedule(state, is_best)

    # --- validate -----------------------------------------------------------------------------------------

    def _validate(self, state: TrainingState, log: RunLog) -> bool:
        """Measures the accuracy on the validation classes; returns whether it is the best so far."""
        protocol = self.config.TEST.main_protocol
        found = self._evaluate("val", self.config.TRAIN.VAL_EPISODES, [protocol])[protocol]
        accuracy = accuracy_over_episodes(found.per_episode)
        improved = accuracy.mean > state.best_accuracy
        state.best_accuracy = max(state.best_accuracy, accuracy.mean)
        log.validation(found, accuracy, improved)
        return improved

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
        test, started = self.config.TEST, time.monotonic()
        if test.ONLY_TEST:
            run_log.splits(self.data)
        path = Path(test.TEST_MODEL_PATH) if test.ONLY_TEST else self.directory.path / BEST
        content = models.load_weights_from(path, self.model, self.config)
        both = self.model.transductive and test.PROTOCOL == "both"
        protocols = list(get_args(ProtocolName)) if both else [test.main_protocol]
        evaluations = self._evaluate("test", test.TEST_EPISODES, protocols)
        tested = Tested(self.model, self.device, path, content, time.monotonic() - started)
        return finish_test(self.config, self.data.samplers["test"], evaluations, tested)


def groups(first: int, last: int, size: int) -> Iterator[range]:
    """Yields the episodes first to last-1 in groups of `size`; the last group may be smaller."""
    for start in range(first, last, size):
        yield range(start, min(start + size, last))


def is_due(frequency: int, group: range, last: int) -> bool:
    """Returns whether a group of episodes reaches a multiple of `frequency` (0: never) or the end of the run."""
    return group.stop == last or (frequency > 0 and group.stop // frequency > group.start // frequency)
