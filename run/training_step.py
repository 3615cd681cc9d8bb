"""One optimizer step: a group of episodes forward and backward, then the update of the weights.

Shapes: N ways, K shots, Q queries, C training classes, D width of the text features.
"""

from collections.abc import Iterable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from episodes.dataset import EpisodeClips
from models.base import Episode, EpisodeLabels, EpisodeOutput, FewShotModel
from run.cached_features import EpisodeFeatures
from run.evaluation import Encoder
from run.finite import FiniteWatch
from run.meter import Meter
from run.solver import Solver
from utils import distributed
from utils.schema import Config


class TrainingStep:
    """Makes the steps of a training; nothing in it waits for a GPU.

    Attributes:
        watch: knows whether all steps so far were finite.
    """

    def __init__(
        self, model: FewShotModel, encoder: Encoder, solver: Solver, meter: Meter, class_text: Tensor, config: Config
    ) -> None:
        """Takes the parts of a training.

        Args:
            model, encoder, solver, meter: as they are called.
            class_text: float [C, D], the texts of all training classes.
            config: reads TRAIN and MODEL.SEED.
        """
        self.model, self.encoder, self.solver, self.meter = model, encoder, solver, meter
        self.class_text, self.options, self.seed = class_text, config.TRAIN, config.MODEL.SEED
        self.device = class_text.device
        self.watch = FiniteWatch(self.device)

    def __call__(self, group: range, own_episodes: Iterable[EpisodeClips | EpisodeFeatures]) -> None:
        """A step with the mean gradient of a group, of whose episodes this process has some.

        Raises:
            NotFiniteError: see `FiniteWatch`.
        """
        loss = torch.zeros((), device=self.device)
        for episode in own_episodes:
            output, query_labels = self.add_gradient(episode, len(group))
            loss += output.total.detach() / len(group)
            self.meter.add(output, query_labels)
        distributed.sum_gradients(self.solver.parameters)
        norm = self.solver.gradient_norm()
        self.watch.look(group, distributed.sum_of_all(loss), norm)
        self.solver.step(group.stop, norm, skip=self.watch.found)

    def add_gradient(self, episode: EpisodeClips | EpisodeFeatures, group_size: int) -> tuple[EpisodeOutput, Tensor]:
        """Adds one episode's part to the gradient of its group; returns the output and the labels int64 [1, Q]."""
        # Dropout of episode i is a function of (seed, i) too: a resumed run needs no saved generator.
        torch.manual_seed(dropout_seed(self.seed, episode.index))
        output, query_labels = self.forward(episode)
        (output.total / group_size).backward()
        return output, query_labels

    def forward(self, episode: EpisodeClips | EpisodeFeatures) -> tuple[EpisodeOutput, Tensor]:
        """Scores and losses of one training episode, and its query labels int64 [1, Q] on the device."""
        support_count = self.options.WAY * self.options.SHOT
        features = self._encode(episode)  # support and queries together
        class_ids, query_labels = (
            ids.to(self.device, non_blocking=True).unsqueeze(0) for ids in (episode.class_ids, episode.query_labels)
        )
        parts = Episode(
            support=rearrange(features[:support_count], "(n k) ... -> 1 n k ...", n=self.options.WAY),
            query=features[support_count:].unsqueeze(0),
            class_text=self.class_text[class_ids],
        )
        labels = EpisodeLabels(query_labels, class_ids, self.class_text)
        return self.model.training_losses(parts, labels, self.options.PROTOCOL), query_labels

    def _encode(self, episode: EpisodeClips | EpisodeFeatures) -> Tensor:
        """float32 [N*K + Q, T, *F] on the device."""
        if isinstance(episode, EpisodeFeatures):
            return self.encoder.finish(episode.features.to(self.device, non_blocking=True))
        return self.encoder(episode.on(self.device), self.options.CHUNK)


def dropout_seed(seed: int, episode: int) -> int:
    """The seed of all that is drawn while a model trains on an episode, from the seed of the run and its number.

    Both are mixed into every bit, since PyTorch's generator on a CPU takes only the lowest 32.
    """
    return int(np.random.SeedSequence([seed, episode]).generate_state(1, np.uint64)[0])
