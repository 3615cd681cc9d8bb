"""The Learner: builds data and model from a config, trains, validates, tests.

The loop knows methods only as `encode`, `match` and `training_losses`; it never asks for a method's name.
"""

import logging
import time
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import models
from episodes.checks import check_videos
from episodes.dataset import ClipOptions, EpisodeClips, EpisodeDataset, episode_loader
from episodes.sampler import EpisodeSampler
from episodes.splits import load_splits
from models.base import Episode, EpisodeLabels, EpisodeOutput, Protocol, parameter_count
from run.evaluation import Encoder, Evaluation, evaluate
from run.meter import Meter
from run.results import describe_results, per_class_table, result_line
from run.solver import Solver
from utils.checkpoint import BEST, LAST, load_checkpoint, load_weights, save_checkpoint
from utils.config import (
    config_to_dict,
    refuse_other_config,
    save_config,
    shipped_split_directory,
    split_directory,
)
from utils.errors import UserError
from utils.metrics import accuracy_over_episodes
from utils.records import MetricsWriter, can_resume, open_run_directory, write_results
from utils.released import convert_released, is_released
from utils.schema import Config
from utils.utils import choose_device, progress, seed_everything, set_up_logging

logger = logging.getLogger(__name__)


class Learner:
    """One run: `train()` and `test()`."""

    def __init__(self, config: Config) -> None:
        """Builds everything and checks all input; nothing is written before this has succeeded.

        Raises:
            UserError: any mistake in the config, the split, the videos or the weights.
        """
        self.config = config
        self.directory = Path(config.CHECKPOINT.CHECKPOINT_DIR)
        self.device = choose_device(config.DEVICE.DEVICE)
        only_test = config.TEST.ONLY_TEST
        self.validates = not only_test and config.TRAIN.VAL_FREQ > 0

        needed = ["test"] if only_test else ["train", "test"]
        if self.validates and config.TRAIN.VAL_SPLIT == "val":
            needed.append("val")
        self.splits = load_splits(
            split_directory(config), Path(config.DATA.DATA_DIR), needed, shipped_split_directory(config)
        )
        self.samplers = self._build_samplers(only_test)
        if config.DATA.CHECK_VIDEOS:
            check_videos(list(self.splits.values()), config.DATA.SEQ_LEN, config.DATA.NUM_WORKERS)

        seed_everything(config.MODEL.SEED)
        self.model = models.build(config.MODEL, config.DATA.IMG_SIZE).to(self.device)
        self.text = {name: self.model.class_text(index.prompts) for name, index in self.splits.items()}
        self.model.drop_text_tower()
        self.encoder = Encoder(self.model, self.device, config.DATA.IMG_NORM, config.USE_AMP)

    def _build_samplers(self, only_test: bool) -> dict[str, EpisodeSampler]:
        """The episodes of training, validation and test; impossible ones are refused here."""
        train, test, seed = self.config.TRAIN, self.config.TEST, self.config.MODEL.SEED
        way, shot = test.WAY or train.WAY, test.SHOT or train.SHOT
        samplers = {"test": EpisodeSampler(self.splits["test"], way, shot, test.QUERY_PER_CLASS, seed)}
        if only_test:
            return samplers
        samplers["train"] = EpisodeSampler(self.splits["train"], train.WAY, train.SHOT, train.QUERY_PER_CLASS, seed)
        if self.validates:
            index = self.splits[train.VAL_SPLIT]
            samplers["val"] = EpisodeSampler(index, way, shot, test.QUERY_PER_CLASS, seed)
        return samplers

    def _clip_options(self) -> ClipOptions:
        data = self.config.DATA
        flip = next(iter(self.splits.values())).horizontal_flip if data.FLIP is None else data.FLIP
        return ClipOptions(data.SEQ_LEN, data.SAMPLING, data.IMG_SIZE, data.SHORT_SIDE, flip)

    # --- training -----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the start or from the last checkpoint, and leaves `best` and `last` in the run directory.

        Raises:
            UserError: the directory holds another run, a video cannot be read, the loss is not finite, ...
        """
        config = self.config
        resume = config.CHECKPOINT.RESUME_FROM_CHECKPOINT
        open_run_directory(self.directory, resume)
        solver = Solver(self.model, config.SOLVER, config.TRAIN.TRAIN_EPISODES)
        self.best = -1.0
        first = self._resume(solver) if resume and can_resume(self.directory) else 0
        set_up_logging(self.directory / "log.txt")
        save_config(config, self.directory / "config.yaml")
        self._log_start(first)
        writer = MetricsWriter(self.directory, first)
        try:
            self._train_loop(solver, writer, first)
            if not self.config.TRAIN.TRAIN_EPISODES:
                self._save(BEST, solver, 0)
        finally:
            writer.close()

    def _train_loop(self, solver: Solver, writer: MetricsWriter, first: int) -> None:
        """The loop: one episode after the other, one optimizer step for each group of TASKS_PER_BATCH."""
        train, seed = self.config.TRAIN, self.config.MODEL.SEED
        last = train.TRAIN_EPISODES
        dataset = EpisodeDataset(self.samplers["train"], self._clip_options(), first, last)
        loader = episode_loader(dataset, self.config.DATA.NUM_WORKERS, self.device)
        meter = Meter(self.device)
        bar = progress(loader, last - first, "train")
        self.model.train()
        for clips in meter.timed(bar):
            # Dropout of episode i is a function of i too: a resumed run needs no saved generator.
            torch.manual_seed((seed << 32) + clips.index)
            output, labels = self._forward(clips)
            done = clips.index + 1
            group_start = clips.index - clips.index % train.TASKS_PER_BATCH
            group_size = min(train.TASKS_PER_BATCH, last - group_start)
            (output.total / group_size).backward()
            meter.add(output, labels)
            if done - group_start < group_size:
                continue
            solver.step(done)
            before = time.perf_counter()
            if _passed(train.PRINT_FREQ, group_start, done) or done == last:
                self._report(meter, solver, writer, done, bar)
            validated = self.validates and (_passed(train.VAL_FREQ, group_start, done) or done == last)
            improved = validated and self._validate(writer, done)
            if validated or done == last or _passed(self.config.CHECKPOINT.SAVE_FREQ, group_start, done):
                self._save(LAST, solver, done)
            if improved or (done == last and not self.validates):
                self._save(BEST, solver, done)
            meter.pause(time.perf_counter() - before)

    def _forward(self, clips: EpisodeClips) -> tuple[EpisodeOutput, Tensor]:
        """Scores and losses of one training episode, and its query labels int64 [1, Q] on the device."""
        train = self.config.TRAIN
        support_count = train.WAY * train.SHOT
        features = self.encoder(clips.clips)  # one backbone call for support and queries together
        class_ids = clips.class_ids.to(self.device).unsqueeze(0)
        labels = EpisodeLabels(clips.query_labels.to(self.device).unsqueeze(0), class_ids, self.text["train"])
        episode = Episode(
            support=rearrange(features[:support_count], "(n k) ... -> 1 n k ...", n=train.WAY),
            query=features[support_count:].unsqueeze(0),
            class_text=self.text["train"][class_ids],
        )
        return self.model.training_losses(episode, labels, train.PROTOCOL), labels.query

    def _report(self, meter: Meter, solver: Solver, writer: MetricsWriter, done: int, bar: tqdm) -> None:
        values = meter.take() | {"learning_rate": solver.learning_rate}
        if not values["loss"] < float("inf"):
            raise UserError(
                f"the loss is not finite ({values['loss']}) at training episode {done}; the checkpoints before it are "
                f"kept: lower SOLVER.LR or set SOLVER.CLIP_GRAD"
            )
        writer.write(done, "train", values)
        bar.set_postfix(loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.1f}%")
        if bar.disable:
            total = self.config.TRAIN.TRAIN_EPISODES
            logger.info(
                "train %d/%d: loss %.4f, accuracy %.1f %%, %.2f episodes/s, %.0f %% of it waiting for data",
                done, total, values["loss"], values["accuracy"],
                values["episodes_per_second"], values["data_wait_percent"],
            )  # fmt: skip

    def _validate(self, writer: MetricsWriter, done: int) -> bool:
        """Accuracy on the validation classes under the test protocol; true if it is the best so far."""
        protocol = self.config.TEST.PROTOCOL
        result = self._evaluate("val", self.config.TRAIN.VAL_SPLIT, self.config.TRAIN.VAL_EPISODES, [protocol])
        accuracy = accuracy_over_episodes(result[protocol].per_episode)
        writer.write(done, "val", {"accuracy": accuracy.mean, "interval": accuracy.interval})
        improved = accuracy.mean > self.best
        self.best = max(self.best, accuracy.mean)
        logger.info(
            "validation after %d episodes, split %s: %s%s",
            done, self.config.TRAIN.VAL_SPLIT, accuracy, ", the best so far" if improved else "",
        )  # fmt: skip
        return improved

    def _save(self, name: str, solver: Solver, done: int) -> None:
        content: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": solver.optimizer.state_dict(),
            "episode": done,
            "best_accuracy": self.best,
            "config": config_to_dict(self.config),
        }
        save_checkpoint(self.directory / name, content)

    def _resume(self, solver: Solver) -> int:
        """Restores the last checkpoint; returns the number of episodes that it has seen."""
        path = self.directory / LAST
        content = load_checkpoint(path)
        refuse_other_config(content["config"], config_to_dict(self.config), path)
        load_weights(self.model, content["model"], path)
        solver.optimizer.load_state_dict(content["optimizer"])
        self.best = content["best_accuracy"]
        return content["episode"]

    def _log_start(self, first: int) -> None:
        config, count = self.config, parameter_count(self.model)
        logger.info(
            "%s on %s, %s trained parameters, device %s, run directory %s",
            config.MODEL.NAME, config.MODEL.BACKBONE, f"{count:,}", self.device, self.directory,
        )  # fmt: skip
        for name, index in self.splits.items():
            logger.info("%s: %d classes, %d videos", name, len(index.classes), len(index))
            for note in index.notes:
                logger.info("%s: %s", name, note)
        if first:
            logger.info("resumed after %d episodes", first)

    # --- testing ------------------------------------------------------------------------------------------

    def test(self) -> dict[str, Any]:
        """Tests TEST.TEST_MODEL_PATH, or the best checkpoint of this run; returns what results.json holds.

        Raises:
            UserError: no such checkpoint, or one that does not fit the config.
        """
        test = self.config.TEST
        path = Path(test.TEST_MODEL_PATH) if test.ONLY_TEST else self.directory / BEST
        content = load_checkpoint(path)
        if is_released(content):
            content, report = convert_released(content, self.model.released, path)
            logger.info("\n".join(report))
        load_weights(self.model, content["model"], path)
        protocols = list(get_args(Protocol)) if self.model.transductive else [test.PROTOCOL]
        evaluations = self._evaluate("test", "test", test.TEST_EPISODES, protocols)
        results = describe_results(
            self.config, self.samplers["test"], evaluations, path, content, parameter_count(self.model)
        )
        results_path = write_results(self.directory, results)
        logger.info("accuracy by class, %s protocol:\n%s", test.PROTOCOL, per_class_table(results))
        for protocol, evaluation in evaluations.items():
            if protocol != test.PROTOCOL:
                accuracy = accuracy_over_episodes(evaluation.per_episode)
                logger.info("the same episodes under the %s protocol: %s", protocol, accuracy)
        logger.info("checkpoint: %s, after %d training episodes", path, content["episode"])
        logger.info("results: %s", results_path)
        print(result_line(self.config, results))
        return results

    def _evaluate(
        self, sampler: str, split: str, episodes: int, protocols: list[Protocol]
    ) -> dict[Protocol, Evaluation]:
        return evaluate(
            self.encoder,
            self.samplers[sampler],
            self.text[split],
            episodes,
            protocols,
            self._clip_options(),
            self.config.DATA.NUM_WORKERS,
            self.config.TEST.BATCH_EPISODES,
        )


def _passed(frequency: int, before: int, after: int) -> bool:
    """Whether a multiple of `frequency` lies in (before, after]; never for frequency 0."""
    return frequency > 0 and after // frequency > before // frequency
