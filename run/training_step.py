"""One optimizer step: forward and backward for a group of episodes, then the update of the weights.

Shapes: N ways, K shots, Q queries, C training classes, D width of the text features.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.base import Episode, EpisodeLabels, EpisodeOutput, FewShotModel
from run.cached_episodes import EpisodeFeatures, TrainingEpisode
from run.encoder import Encoder
from run.meter import Meter
from run.solver import Solver
from utils import distributed
from utils.errors import UserError
from utils.schema import Config


class TrainingStep:
    """Performs the steps of a training run; nothing here waits for a GPU.

    Attributes:
        watch: records whether all losses and gradients so far were finite.
    """

    def __init__(
        self, model: FewShotModel, encoder: Encoder, solver: Solver, meter: Meter, class_text: Tensor, config: Config
    ) -> None:
        """Stores the parts of a training run.

        Args:
            model, encoder, solver, meter: the parts.
            class_text: float [C, D], text features of all training classes.
            config: its TRAIN section and MODEL.SEED are used.
        """
        self.model, self.encoder, self.solver, self.meter = model, encoder, solver, meter
        self.class_text, self.options, self.seed = class_text, config.TRAIN, config.MODEL.SEED
        self.device = class_text.device
        self.watch = FiniteWatch(self.device)

    def __call__(self, group: range, episodes: Iterator[TrainingEpisode]) -> None:
        """Performs a step with the mean gradient of a group of episodes.

        Args:
            group: numbers of all episodes of the group.
            episodes: yields the episodes that this process computes; the step takes those of the group.

        Raises:
            NotFiniteError: see `FiniteWatch`.
        """
        loss = torch.zeros((), device=self.device)
        for episode in islice(episodes, len(distributed.share(group))):
            output, query_labels = self.add_gradient(episode, len(group))
            loss += output.total.detach() / len(group)
            self.meter.add(output, query_labels)
        distributed.sum_gradients(self.solver.parameters)
        norm = self.solver.gradient_norm()
        self.watch.record(group, distributed.sum_of_all(loss), norm)
        self.solver.step(group.stop, norm, skip=self.watch.flag)

    def add_gradient(self, episode: TrainingEpisode, group_size: int) -> tuple[EpisodeOutput, Tensor]:
        """Adds the gradient of one episode; returns its output and its query labels, int64 [1, Q]."""
        # Dropout of episode i is a function of (seed, i), so a resumed run needs no saved generator.
        torch.manual_seed(dropout_seed(self.seed, episode.index))
        output, query_labels = self.forward(episode)
        (output.total / group_size).backward()
        return output, query_labels

    def forward(self, episode: TrainingEpisode) -> tuple[EpisodeOutput, Tensor]:
        """Returns scores and losses of one training episode, and its query labels, int64 [1, Q] on the device."""
        support_count = self.options.WAY * self.options.SHOT
        features, losses = self._encode(episode)  # support and queries together
        class_ids, query_labels = (
            ids.to(self.device, non_blocking=True).unsqueeze(0) for ids in (episode.class_ids, episode.query_labels)
        )
        parts = Episode(
            support=rearrange(features[:support_count], "(n k) ... -> 1 n k ...", n=self.options.WAY),
            query=features[support_count:].unsqueeze(0),
            class_text=self.class_text[class_ids],
        )
        labels = EpisodeLabels(query_labels, class_ids, self.class_text)
        output = self.model.training_losses(parts, labels, self.options.PROTOCOL)
        return EpisodeOutput(output.scores, output.losses | losses), query_labels

    def _encode(self, episode: TrainingEpisode) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns features float32 [N*K + Q, T, *F] on the device, and the losses of individual videos."""
        if isinstance(episode, EpisodeFeatures):
            features = episode.features.to(self.device, non_blocking=True)
            return self.encoder.finish_for_training(features, None)
        clips = episode.on(self.device)
        frames = self.encoder.frames(clips) if self.model.needs_frames else None
        features = self.encoder.backbone(clips if frames is None else frames, self.options.CHUNK)
        return self.encoder.finish_for_training(features, frames)


def dropout_seed(seed: int, episode: int) -> int:
    """Returns the seed of all random numbers of a training episode, such as dropout.

    Both numbers are mixed into every bit, since PyTorch's CPU generator uses only the lowest 32.

    Args:
        seed: seed of the run.
        episode: number of the episode.
    """
    return int(np.random.SeedSequence([seed, episode]).generate_state(1, np.uint64)[0])


# --- losses and gradients that are not finite ---------------------------------------------------------------


class NotFiniteError(UserError):
    """A group of training episodes had a loss or a gradient that is not finite; its step was skipped.

    Attributes:
        group: the numbers of the episodes.
    """

    def __init__(self, group: range, loss: float, gradient_norm: float) -> None:
        self.group = group
        super().__init__(
            f"the loss ({loss:g}) or the norm of the gradient ({gradient_norm:g}) of training episodes {group.start} "
            f"to {group.stop - 1} is not finite; no checkpoint was written after that: start a new run with a lower "
            "SOLVER.LR or with TRAIN.CLIP_GRAD; a resumed run keeps both settings"
        )


class FiniteWatch:
    """Checks every group before its optimizer step, and records the first one that is not finite.

    A GPU works through a queue of steps, and the host can only read a number from it once the queue is empty. So the
    result stays on the GPU as `flag`. If it is set, the fused optimizer skips this step and all later ones:
    weights and optimizer state do not change. The host reads the flag (`raise_if_nonfinite`) before it logs, validates
    or saves. On a CPU nothing is queued, and the flag is read at every step.

    Attributes:
        flag: float32 [] on the device; 1 once a group was not finite.
        checks_every_step: whether `record` itself raises.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)
        self.checks_every_step = device.type == "cpu"
        self._first = torch.zeros(4, dtype=torch.float64, device=device)  # start and stop of the group, loss, norm

    def record(self, group: range, loss: Tensor, gradient_norm: Tensor) -> None:
        """Records the mean loss of a group and the norm of its gradient.

        Args:
            group: numbers of the episodes.
            loss, gradient_norm: float [], the same on all processes.

        Raises:
            NotFiniteError: one of them is not finite, and the device is a CPU.
        """
        start, stop = (torch.full_like(self.flag, number, dtype=torch.float64) for number in (group.start, group.stop))
        seen = torch.stack((start, stop, loss.double(), gradient_norm.double()))
        is_bad = ~seen.isfinite().all()
        self._first = torch.where(is_bad & (self.flag == 0), seen, self._first)
        self.flag = torch.where(is_bad, 1.0, self.flag)
        if self.checks_every_step:
            self.raise_if_nonfinite()

    def raise_if_nonfinite(self) -> None:
        """Waits for the device and reads the result.

        Raises:
            NotFiniteError: a recorded group was not finite.
        """
        if self.flag.item():
            start, stop, loss, norm = self._first.tolist()
            raise NotFiniteError(range(int(start), int(stop)), loss, norm)
