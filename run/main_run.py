"""The Learner: builds data and model from a config, trains, validates, tests.

The loop knows methods only as `encode`, `match` and `training_losses`; it never asks for a method's name.

Started by torchrun, R processes go through the same lines side by side. Process r takes the episodes i with
i mod R = r, and every step is made with the gradient of the whole group of episodes, so that a config means the same
for any R. Process 0 alone reads and writes the run directory.
"""

import logging
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, get_args

from torch import Tensor
from torch.utils.data import DataLoader

import models
from episodes.bad_clips import BadClips
from episodes.checks import check_videos
from episodes.class_lists import CLASS_FILE
from episodes.dataset import ClipOptions, ClipReader, EpisodeClips, EpisodeDataset, episode_loader
from episodes.splits import SplitIndex
from models.base import ProtocolName, parameter_count
from models.class_texts import class_texts
from run import stopping
from run.cached_features import CachedEpisodes
from run.encoder import BackboneEncoder, Encoder
from run.evaluation import Evaluation, evaluate
from run.feature_cache import FeatureCache
from run.labels import method_label
from run.meter import Meter, rate
from run.results import describe_results, differs_from_training, per_class_table, result_line
from run.samplers import as_run, build_samplers, load_splits_of, needed_splits
from run.saving import CheckpointFiles
from run.solver import Solver
from run.state import TrainingState
from run.training_step import NotFiniteError, TrainingStep
from utils import distributed
from utils.checkpoint import BEST, LAST, load_checkpoint, load_weights
from utils.config import save_config
from utils.errors import UserError
from utils.metrics import accuracy_over_episodes
from utils.records import MetricsWriter, write_results, writing
from utils.released import convert_released, is_released
from utils.schema import Config
from utils.utils import FILE_ONLY, choose_device, progress, seed_everything, set_determinism, set_up_logging

logger = logging.getLogger(__name__)


class Learner:
    """One run: `train()` and `test()`."""

    def __init__(self, config: Config) -> None:
        """Builds everything and checks all input; nothing is written before this has succeeded.

        Raises:
            UserError: any mistake in the config, the split, the videos or the weights.
        """
        self.config = config = as_run(config)
        self.device = choose_device(config.DEVICE.DEVICE)
        self.splits = load_splits_of(config, needed_splits(config))
        self.files = CheckpointFiles(config, self._data())
        self.directory = self.files.directory
        problems: list[str] = []
        self.samplers = build_samplers(config, self.splits, problems)
        if config.DATA.CHECK_VIDEOS:
            problems += distributed.from_main(self._problems_of_videos)
        if problems:
            raise UserError("\n".join(problems))

        set_determinism(config.DEVICE.DETERMINISTIC)
        seed_everything(config.MODEL.SEED)
        self.model = models.build(config.MODEL, config.DATA.IMG_SIZE).to(self.device)
        distributed.copy_weights_from_main(self.model)  # the seed has made them equal; this makes it sure
        self.text = {name: self._class_texts(index) for name, index in self.splits.items()}
        self.model.drop_text_tower()
        self.encoder = Encoder(self.model, self.device, config.DATA.IMG_NORM, config.USE_AMP)
        self.validation_reader = self._reader(keep_workers=True)
        self.cache = FeatureCache(config, self.device) if config.TEST.FEATURE_CACHE else None

    def _class_texts(self, index: SplitIndex) -> Tensor:
        """The text features of a split's classes, float32 [C, D]; see `class_texts` for what is refused."""
        prompts = {entry.folder: entry.prompt for entry in index.classes}
        return class_texts(self.model, prompts, f"{CLASS_FILE}, {index.split} classes of {index.dataset}")

    def _problems_of_videos(self) -> list[str]:
        """A sentence about each video that cannot be opened."""
        try:
            check_videos(list(self.splits.values()), self.config.DATA.SEQ_LEN, self.config.DATA.NUM_WORKERS)
        except UserError as error:
            return str(error).splitlines()
        return []

    def _data(self) -> dict[str, str]:
        """What of the data decides the training and its validations: by name, so that a resumed run can compare it."""
        train = self.config.TRAIN
        used = {"train", train.VAL_SPLIT} if self.config.validates else {"train"}
        digests = {f"the {name} split": self.splits[name].digest() for name in sorted(used & self.splits.keys())}
        return digests | {"whether clips are mirrored": str(self._clip_options().flip)}

    def _clip_options(self) -> ClipOptions:
        data = self.config.DATA
        flip = next(iter(self.splits.values())).horizontal_flip if data.FLIP is None else data.FLIP
        return ClipOptions(data.SEQ_LEN, data.SAMPLING, data.IMG_SIZE, data.SHORT_SIDE, flip)

    def _reader(self, keep_workers: bool = False) -> ClipReader:
        return ClipReader(self._clip_options(), self.config.DATA.NUM_WORKERS, keep_workers)

    # --- training -----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the start or from the last checkpoint, and leaves `best` and `last` in the run directory.

        Raises:
            UserError: the directory holds another run, a video cannot be read, the loss is not finite, ...
            StopRequested: a signal came; `last` holds the run as it is then.
        """
        config = self.config
        checkpoint = self.files.open()
        solver = Solver(self.model, config.SOLVER, config.TRAIN.TRAIN_EPISODES, config.TRAIN.CLIP_GRAD)
        state = TrainingState(self.model, solver, Meter(self.device), BadClips(config.DATA.MAX_BAD_CLIPS))
        if checkpoint:
            state.restore(checkpoint, self.directory / LAST)
            self.files.complete(state)
        else:
            self.files.save(LAST, state)  # from its first file on, a run directory can be resumed
        if distributed.is_main():
            set_up_logging(self.directory / "log.txt")
            with writing(path := self.directory / "config.yaml"):
                save_config(config, path)
        self._log_start(state.episode)
        try:
            metrics = MetricsWriter(self.directory, state.episode, state.validation_due)
            with metrics as writer, stopping.deferred():
                self._train_loop(state, writer)
        except NotFiniteError as error:
            path = self.files.save_replay(state, error.group, self.samplers["train"])
            raise UserError(f"{error}; see where with: python run/run.py --replay {path}") from error
        finally:
            self.validation_reader.close()

    def _train_loop(self, state: TrainingState, writer: MetricsWriter) -> None:
        """The loop: one group of TASKS_PER_BATCH episodes after the other, one optimizer step for each."""
        train, first, last = self.config.TRAIN, state.episode, self.config.TRAIN.TRAIN_EPISODES
        with state.meter.pause():
            if not last:
                self.files.save(BEST, state)
            if state.validation_due and self.config.validates:
                self._validate_and_save(state, writer)
            if first == last:
                return
            step = self.training_step(state)
            episodes = self.training_episodes(range(first, last))
        own_episodes = state.meter.timed(episodes)
        self.model.train()
        with progress(None, len(episodes), "train") as bar:
            for start in range(first, last, train.TASKS_PER_BATCH):  # whatever interrupts waits for the end of a group
                group = range(start, min(start + train.TASKS_PER_BATCH, last))
                own_of_group = state.bad_clips.watch(islice(own_episodes, len(distributed.share(group))))
                step(group, own_of_group)
                bar.update(len(distributed.share(group)))
                state.episode = done = group.stop
                prints = _passed(train.PRINT_FREQ, start, done) or done == last
                validates = self.config.validates and (_passed(train.VAL_FREQ, start, done) or done == last)
                saves = done == last or _passed(self.config.CHECKPOINT.SAVE_FREQ, start, done)
                stops = stopping.is_requested()
                if prints or validates or saves or stops:
                    step.watch.raise_if_nonfinite()
                    state.bad_clips.share()
                if prints:
                    self._report(state, writer)
                if validates or saves:
                    with state.meter.pause():
                        distributed.average_buffers(self.model)
                        if validates:
                            self._validate_and_save(state, writer)
                        else:
                            self.files.save_on_schedule(state, is_best=done == last and not self.config.validates)
                if stops:
                    self._save_and_stop(state)

    def training_step(self, state: TrainingState) -> TrainingStep:
        """What makes the steps of a training."""
        return TrainingStep(self.model, self.encoder, state.solver, state.meter, self.text["train"], self.config)

    def training_episodes(self, episodes: range) -> DataLoader[EpisodeClips] | CachedEpisodes:
        """This process's share of training episodes, in order."""
        data, sampler, own = self.config.DATA, self.samplers["train"], distributed.share(episodes)
        if not self.config.TRAIN.CACHED_FEATURES:
            dataset = EpisodeDataset(sampler, self._clip_options(), own, data.MAX_BAD_CLIPS)
            return episode_loader(dataset, data.NUM_WORKERS, self.device)
        encoder = BackboneEncoder(self.model, self.device, data.IMG_NORM, self.config.USE_AMP)
        whole_run = range(max(self.config.TRAIN.TRAIN_EPISODES, episodes.stop))
        return CachedEpisodes(encoder, sampler, self._reader(), whole_run, own, self.cache)

    def _validate_and_save(self, state: TrainingState, writer: MetricsWriter) -> None:
        """Validates and saves; a signal meanwhile leaves the validation to the run that resumes this one."""
        state.validation_due = True
        try:
            stopping.check()
            is_best = self._validate(state, writer)
        except stopping.StopRequested:
            self._save_and_stop(state)
        state.validation_due = False
        self.files.save_on_schedule(state, is_best)

    def _save_and_stop(self, state: TrainingState) -> NoReturn:
        distributed.average_buffers(self.model)
        self.files.save(LAST, state)
        raise stopping.request(
            f" after {state.episode} episodes, saved in {self.directory / LAST}: continue with --resume"
        )

    def _report(self, state: TrainingState, writer: MetricsWriter) -> None:
        others = {"learning_rate": state.solver.learning_rate, "bad_clips": len(state.bad_clips.reasons)}
        values, done = state.meter.take() | others, state.episode
        writer.write(done, "train", values)
        logger.info(
            "train %d/%d: loss %.4f, accuracy %.1f %%, %s, %.0f %% of it waiting for data",
            done, self.config.TRAIN.TRAIN_EPISODES, values["loss"], values["accuracy"],
            rate(values["episodes_per_second"]), values["data_wait_percent"],
        )  # fmt: skip

    def _validate(self, state: TrainingState, writer: MetricsWriter) -> bool:
        """Accuracy on the validation classes under the test protocol; true if it is the best so far."""
        protocol = self.config.TEST.PROTOCOL
        train = self.config.TRAIN
        cache = self.cache if train.CACHED_FEATURES else None  # otherwise the backbone is still learning
        result = self._evaluate("val", train.VAL_SPLIT, train.VAL_EPISODES, [protocol], self.validation_reader, cache)
        accuracy = accuracy_over_episodes(result[protocol].per_episode)
        interval = {} if accuracy.interval is None else {"interval": accuracy.interval}
        writer.write(state.episode, "val", {"accuracy": accuracy.mean, **interval})
        improved = accuracy.mean > state.best_accuracy
        state.best_accuracy = max(state.best_accuracy, accuracy.mean)
        logger.info(
            "validation after %d episodes, split %s: %s%s",
            state.episode, self.config.TRAIN.VAL_SPLIT, accuracy, ", the best so far" if improved else "",
        )  # fmt: skip
        return improved

    def _log_start(self, first: int) -> None:
        config, count = self.config, parameter_count(self.model)
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info(
            "%s on %s, %s of %s parameters trained, device %s, run directory %s",
            method_label(config), config.MODEL.BACKBONE, f"{count:,}", f"{whole:,}", self.device, self.directory,
        )  # fmt: skip
        self._log_splits()
        if config.validates and (way := self.samplers["val"].way) != self.samplers["test"].way:
            logger.warning("validation is %d-way (TRAIN.VAL_WAY), the test %d-way", way, self.samplers["test"].way)
        if config.TEST.TEST_MODEL_PATH:
            logger.warning("TEST.TEST_MODEL_PATH is not used, as TEST.ONLY_TEST is false: the run tests its own best")
        if first:
            logger.info("resumed after %d episodes", first)
        processes, group = distributed.world_size(), config.TRAIN.TASKS_PER_BATCH
        if processes > 1:
            logger.info("%d processes share the episodes", processes)
        if processes > group:
            logger.warning(
                "TRAIN.TASKS_PER_BATCH is %d, so only %d of %d processes have an episode at each step",
                group, group, processes,
            )  # fmt: skip

    def _log_splits(self) -> None:
        for name, index in self.splits.items():
            logger.info("%s: %d classes, %d videos", name, len(index.classes), len(index))
            for note in index.notes:
                logger.warning("%s: %s", name, note)

    # --- testing ------------------------------------------------------------------------------------------

    def test(self) -> dict[str, Any]:
        """Tests TEST.TEST_MODEL_PATH, or the best checkpoint of this run; returns what results.json holds.

        Raises:
            UserError: no such checkpoint, or one that does not fit the config.
        """
        test = self.config.TEST
        if test.ONLY_TEST:
            self._log_splits()
        path = Path(test.TEST_MODEL_PATH) if test.ONLY_TEST else self.directory / BEST
        content = distributed.from_main(lambda: load_checkpoint(path))
        if is_released(content):
            content, report = convert_released(content, self.model.released, path)
            logger.info("\n".join(report))
        try:
            load_weights(self.model, content["model"], path)
        except UserError as error:
            differences = "".join(f"; {line}" for line in differs_from_training(content["config"], self.config))
            raise UserError(f"{error}{differences}") from error
        protocols = list(get_args(ProtocolName)) if self.model.transductive else [test.PROTOCOL]
        evaluations = self._evaluate("test", "test", test.TEST_EPISODES, protocols, self._reader(), self.cache)
        return distributed.from_main(lambda: self._conclude(path, content, evaluations))

    def _conclude(
        self, path: Path, content: dict[str, Any], evaluations: dict[ProtocolName, Evaluation]
    ) -> dict[str, Any]:
        """Writes results.json and says what is in it; returns it."""
        test = self.config.TEST
        results = describe_results(
            self.config, self.samplers["test"], evaluations, path, content, parameter_count(self.model)
        )
        logger.info("accuracy by class, %s protocol:\n%s", test.PROTOCOL, per_class_table(results))
        for protocol, evaluation in evaluations.items():
            if protocol != test.PROTOCOL:
                accuracy = accuracy_over_episodes(evaluation.per_episode)
                logger.info("the same episodes under the %s protocol: %s", protocol, accuracy)
        logger.info("checkpoint: %s, after %d training episodes", path, content["episode"])
        for difference in results["differs_from_training"]:
            logger.warning("the test differs from the training: %s", difference)
        line = result_line(self.config, results)
        print(line, flush=True)  # before the file, so that a full disk cannot take it
        logger.info(line, extra=FILE_ONLY)
        logger.info("results: %s", write_results(self.directory, results))
        return results

    def _evaluate(
        self,
        sampler: str,
        split: str,
        episodes: int,
        protocols: list[ProtocolName],
        reader: ClipReader,
        cache: FeatureCache | None = None,
    ) -> dict[ProtocolName, Evaluation]:
        return evaluate(
            self.encoder,
            self.samplers[sampler],
            self.text[split],
            episodes,
            protocols,
            reader,
            self.config.TEST.BATCH_EPISODES,
            cache,
        )


def _passed(frequency: int, before: int, after: int) -> bool:
    """Whether a multiple of `frequency` lies in (before, after]; never for frequency 0."""
    return frequency > 0 and after // frequency > before // frequency
