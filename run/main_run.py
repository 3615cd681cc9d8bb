"""One run, in reading order: build, train, validate, test.

The loop knows methods only as `encode`, `match` and `training_losses`; it never checks a method's name.

Under torchrun, R processes run the same code. Process r computes the episodes i with i mod R = r, and every step uses
the gradient of the whole group of episodes, so a config means the same for any R. Only process 0 reads and writes the
run directory.
"""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from torch.utils.data import DataLoader

import models
from episodes.dataset import BadClips, EpisodeClips, EpisodeDataset, episode_loader
from models.base import ProtocolName, parameter_count
from run import run_log, stopping, tracking
from run.answers import Answers
from run.class_texts import ClassTexts
from run.data import RunData, as_run
from run.encoder import BackboneEncoder, Encoder
from run.evaluation import Evaluation, evaluate
from run.features import CachedEpisodes, FeatureCache
from run.meter import Meter
from run.metrics_log import MetricsWriter
from run.results import describe_results, finish_test
from run.run_directory import RunDirectory, TrainingState
from run.solver import Solver
from run.training_step import NotFiniteError, TrainingStep
from utils import distributed
from utils.checkpoint import BEST
from utils.config import config_to_dict, leaves
from utils.errors import UserError
from utils.jobs import progress
from utils.schema import Config
from utils.statistics import accuracy_over_episodes
from utils.utils import choose_device, device_name, git_state, seed_everything, set_determinism


class Learner:
    """One run: `train()` and `test()`."""

    # --- build --------------------------------------------------------------------------------------------

    def __init__(self, config: Config) -> None:
        """Builds everything and checks all input before any file is written.

        Raises:
            UserError: the config, the split, the videos or the weights are not valid.
        """
        self.config = config = as_run(config)
        tracking.raise_if_missing(config)
        git_state()  # the results name the commit at the start, since the clone may change during a long run
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
        self.cache = FeatureCache(config, self.device) if config.TEST.FEATURE_CACHE else None

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
        run_log.start(config, self.model, self.data, self.directory.path, state.episode)
        tracked = dict(leaves(config_to_dict(config))) if config.LOG.WANDB else None
        try:
            with (
                MetricsWriter(self.directory.path, state.episode, state.validation_due, tracked) as writer,
                stopping.deferred(lambda: self.directory.save_stopped(state)),
            ):
                self._train(state, writer)
        except NotFiniteError as error:
            path = self.directory.save_replay(state, error.group, self.data.samplers["train"])
            raise UserError(f"{error}; to find out where: python run/run.py --replay {path}") from error
        finally:
            self.validation_reader.close()

    def _train(self, state: TrainingState, writer: MetricsWriter) -> None:
        """Makes an optimizer step for each group of TASKS_PER_BATCH episodes, then logs, validates and saves if due."""
        train, first, last = self.config.TRAIN, state.episode, self.config.TRAIN.TRAIN_EPISODES
        if not last:
            self.directory.save(BEST, state)
        if state.validation_due and self.config.validates:
            self._save(state, writer, validate=True)
        if first == last:
            return
        with state.meter.pause():
            step = self.training_step(state)
            episodes = self.training_episodes(range(first, last))
        own_episodes = state.bad_clips.watch(state.meter.timed(episodes))
        self.model.train()
        with progress(None, len(episodes), "train") as bar:
            for group in groups(first, last, train.TASKS_PER_BATCH):
                own = distributed.share(group)
                step(group, islice(own_episodes, len(own)))
                state.episode = group.stop
                bar.update(len(own))
                report = is_due(train.PRINT_FREQ, group, last)
                validate = is_due(train.VAL_FREQ, group, last) and self.config.validates
                save = is_due(self.config.CHECKPOINT.SAVE_FREQ, group, last)
                stop = stopping.is_requested()  # a signal waits for the end of a group
                if report or validate or save or stop:
                    step.watch.raise_if_nonfinite()
                    state.bad_clips.share()
                if report:
                    run_log.training(self.config, state, writer)
                if validate or save:
                    self._save(state, writer, validate)
                if stop:
                    raise stopping.request()

    def training_step(self, state: TrainingState) -> TrainingStep:
        """Returns the optimizer step of this training run."""
        return TrainingStep(self.model, self.encoder, state.solver, state.meter, self.text["train"], self.config)

    def training_episodes(self, episodes: range) -> DataLoader[EpisodeClips] | CachedEpisodes:
        """Returns this process's share of training episodes, in order."""
        data, sampler, own = self.config.DATA, self.data.samplers["train"], distributed.share(episodes)
        if not self.config.TRAIN.CACHED_FEATURES:
            dataset = EpisodeDataset(sampler, self.data.clip_options, own, data.MAX_BAD_CLIPS)
            return episode_loader(dataset, data.NUM_WORKERS, self.device)
        backbone = BackboneEncoder(self.model, self.device, data.IMG_NORM, self.config.USE_AMP)
        whole_run = range(max(self.config.TRAIN.TRAIN_EPISODES, episodes.stop))
        return CachedEpisodes(backbone, sampler, self.data.reader(), whole_run, own, self.cache)

    def _save(self, state: TrainingState, writer: MetricsWriter, validate: bool) -> None:
        """Saves, after a validation if it is due; if a signal interrupts the validation, the resumed run repeats it."""
        with state.meter.pause():
            distributed.average_buffers(self.model)
            state.validation_due = validate
            is_last = state.episode == self.config.TRAIN.TRAIN_EPISODES  # without validation the last one is the best
            is_best = self._validate(state, writer) if validate else is_last
            state.validation_due = False
            self.directory.save_on_schedule(state, is_best)

    # --- validate -----------------------------------------------------------------------------------------

    def _validate(self, state: TrainingState, writer: MetricsWriter) -> bool:
        """Measures the accuracy on the validation classes; returns whether it is the best so far."""
        train, protocol = self.config.TRAIN, self.config.TEST.headline
        evaluations = self._evaluate("val", train.VAL_SPLIT, train.VAL_EPISODES, [protocol])
        accuracy = accuracy_over_episodes(evaluations[protocol].per_episode)
        improved = accuracy.mean > state.best_accuracy
        state.best_accuracy = max(state.best_accuracy, accuracy.mean)
        run_log.validation(self.config, state, accuracy, improved, writer)
        return improved

    def _evaluate(
        self, phase: str, split: str, episodes: int, protocols: list[ProtocolName]
    ) -> dict[ProtocolName, Evaluation]:
        """Scores the episodes of a validation (phase "val") or of the test (phase "test") under each protocol."""
        reader = self.validation_reader if phase == "val" else self.data.reader()
        # During training, stored features stay valid only if the backbone is frozen.
        cache = self.cache if phase == "test" or self.config.TRAIN.CACHED_FEATURES else None
        return evaluate(
            self.encoder, self.data.samplers[phase], self.text[split], episodes, protocols, reader,
            self.config.TEST.BATCH_EPISODES, cache,
        )  # fmt: skip

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
        protocols = list(get_args(ProtocolName)) if both else [test.headline]
        evaluations = self._evaluate("test", "test", test.TEST_EPISODES, protocols)

        def conclude() -> dict[str, Any]:
            sampler, parameters = self.data.samplers["test"], parameter_count(self.model)
            answers = Answers.of(sampler, evaluations)
            device, seconds = device_name(self.device), time.monotonic() - started
            results = describe_results(
                self.config, sampler, evaluations, answers, path, content, parameters, device, seconds
            )
            finish_test(self.config, results, answers)
            return results

        return distributed.from_main(conclude)  # the others wait until the files are written


def groups(first: int, last: int, size: int) -> Iterator[range]:
    """Yields the episodes first to last-1 in groups of `size`; the last group may be smaller."""
    for start in range(first, last, size):
        yield range(start, min(start + size, last))


def is_due(frequency: int, group: range, last: int) -> bool:
    """Returns whether a group of episodes reaches a multiple of `frequency` (0: never) or the end of the run."""
    return group.stop == last or (frequency > 0 and group.stop // frequency > group.start // frequency)
